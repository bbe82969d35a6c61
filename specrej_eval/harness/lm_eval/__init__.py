"""lm-eval: the models `specrej` and `best_of_n`, and what its command line needs around them."""
