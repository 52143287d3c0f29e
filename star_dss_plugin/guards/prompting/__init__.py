"""Build a guard's prompts: templates, and the position where each prefix of a response ends."""
