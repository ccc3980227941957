"""Where keys and values of sequences lie: blocks of positions, and who holds them."""
