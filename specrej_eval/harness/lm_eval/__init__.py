"""lm-eval: the models `specrej` and `best_of_n`, and what its command line needs around them."""

LM_EVAL_MODELS = {
    "specrej": "specrej_eval.harness.lm_eval.model:SpecRejLM",
    "best_of_n": "specrej_eval.harness.lm_eval.model:BestOfNLM",
    "best-of-n": "specrej_eval.harness.lm_eval.model:BestOfNLM",
}
"""The names `lm_eval --model` takes -> ``module:class``. lm-eval imports the class on first use; the string has
to name the module that defines it."""
