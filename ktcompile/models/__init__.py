"""Models: what transformers is told about ktcompile, and the model that ships with it."""
