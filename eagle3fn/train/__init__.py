"""Loss to state: gradients, optimizer, step, checkpoint, loop."""
