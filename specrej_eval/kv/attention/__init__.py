"""Backends of attention over (shared prefix, own suffix): one file each.

A backend has ``prefill`` and ``decode``; ``sdpa`` runs anywhere and says what they take and return.
"""
