"""A whole model on the CPU: what ktcompile makes of it beside what its users would run instead."""
