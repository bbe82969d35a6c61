"""Reward families: one file each, and nothing else. The listing is the registry; the file name is the family's name."""
