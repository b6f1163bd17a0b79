"""What every stage speaks: types, configuration, gradients, files and errors."""
