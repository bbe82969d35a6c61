"""What runs say about methods: estimates, intervals and bounds over recorded numbers. NumPy and SciPy, no torch.

One file a measure. Each says its formula and where it comes from, and takes arrays whose first axis is the prompts: a
prompt is the unit of chance, and scores of different prompts are never pooled.
"""

RESAMPLES = 10_000
"""Of a bootstrap."""
