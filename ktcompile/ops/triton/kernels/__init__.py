"""The kernels themselves. Their arguments are those of the wrappers one package up, checked there."""
