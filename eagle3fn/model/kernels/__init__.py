"""Kernels for a GPU, each with the signature of its plain expression."""
