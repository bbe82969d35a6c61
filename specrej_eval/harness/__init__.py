"""Adapters between the generator and an evaluation harness, one folder for each harness."""
