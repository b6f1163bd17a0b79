"""Trained parameters to the world: export, speculative decoding, evaluation."""
