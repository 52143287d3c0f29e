"""Build a guard's prompts: chat template, tokenization, and the end of each response prefix."""
