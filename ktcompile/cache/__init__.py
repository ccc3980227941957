"""The prefix cache: which keys and values of earlier prompts are kept, where, and for how long."""
