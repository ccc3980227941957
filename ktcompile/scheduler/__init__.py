"""Which tokens of which requests are computed next: plain numbers, no tensors."""
