"""Turns what runs have written into tables. Reads files only; never loads a model."""
