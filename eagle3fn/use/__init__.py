"""What a trained draft is used for: export, speculative decoding, evaluation, report."""
