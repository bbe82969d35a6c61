"""Kernels for a CPU, compiled from one C++ file on the machine that uses them."""
