"""What the prefix caches of running engines are worth: traces of prompts, one prompt after the other."""
