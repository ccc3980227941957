"""What runs: executables, and the weights that they use."""
