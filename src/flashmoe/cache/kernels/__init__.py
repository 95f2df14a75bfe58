"""The compiled loops that all eviction policies share."""
