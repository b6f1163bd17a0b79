"""SpecForge's training as values: its recipe, its files, its script's arguments, and the proof that they are its own."""
