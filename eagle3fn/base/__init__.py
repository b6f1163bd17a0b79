"""Shared by every stage: types, configuration, gradients, files and errors."""
