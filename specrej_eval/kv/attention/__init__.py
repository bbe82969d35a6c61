"""Attention over (shared prefix, own suffix): the function transformers calls, and the backends behind it.

A backend is one file with two functions, ``prefill`` and ``decode`` (see ``sdpa`` for the contract).
"""
