"""Chat templates: a conversation becomes text and tokens, and what was rendered is read back."""
