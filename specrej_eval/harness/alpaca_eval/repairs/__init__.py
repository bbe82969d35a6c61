# torch-free
"""Defects of alpaca_eval 0.6.6 with today's packages, repaired in memory. One file each; the listing is the registry.

A file has a table ``AFTER`` or ``BEFORE``: alpaca_eval's module -> functions that are called with it once it has been
(or is about to be) executed; what a ``BEFORE`` function returns is called afterwards, to clean up. Each function looks
for itself whether this alpaca_eval needs it, and none depends on another one. Where no release needs one any more,
delete its file.
"""
