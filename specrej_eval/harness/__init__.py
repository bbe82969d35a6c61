"""Adapters between the generator and an evaluation harness, one file for each harness."""
