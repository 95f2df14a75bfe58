"""The cache: slots in RAM, who sits in them, and how they are filled."""
