"""Kinds of reward servers: one file each, and nothing else. The listing is the registry; see ``base``."""
