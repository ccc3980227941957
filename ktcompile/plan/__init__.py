"""Placement of experts as pure policy: facts, hardware, costs and routing profiles go in, a frozen plan comes out."""
