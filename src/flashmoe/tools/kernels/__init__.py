"""Compute kernels for this processor: compiled from the wheel's own source archive, or taken from files."""
