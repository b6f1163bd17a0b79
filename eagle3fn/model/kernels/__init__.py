"""Kernels for a GPU, each behind the signature of its plain expression."""
