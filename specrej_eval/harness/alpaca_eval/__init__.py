"""alpaca_eval: decoders, a judge, and what its command line needs around them."""
