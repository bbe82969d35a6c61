"""The engine over a transformers model: shared prefix, groups of rows, sampling, all in PyTorch."""
