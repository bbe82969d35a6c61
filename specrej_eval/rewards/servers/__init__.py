"""Rewards behind HTTP: reward servers, judges, and the protocols they speak."""
