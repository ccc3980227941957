"""Blocks of keys and values that outlive the request that computed them: their names."""
