"""What policies of the prefix cache are worth: traces of prompts, replayed through tiers without a model."""
