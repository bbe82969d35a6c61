"""Strategies: arithmetic on scores. No torch, no I/O, no loop. One file each; the file name is the name."""
