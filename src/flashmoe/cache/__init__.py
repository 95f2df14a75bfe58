"""The expert cache: slots in RAM, residency, eviction, and how slots are filled."""
