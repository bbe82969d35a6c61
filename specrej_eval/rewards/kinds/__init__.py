"""Ways to name a reward: one file each, and nothing else. The listing is the registry; see ``base``."""
