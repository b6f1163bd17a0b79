"""Serving engines: their processes, what they say of a target, and what they need of a draft."""
