"""Reward models: one family, one file. Scores are floats, higher is better; the file name is the family's name."""
