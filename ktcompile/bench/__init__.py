"""Benchmarks: what a piece of work takes, beside the machine's own ceilings and beside its peers."""
