"""How a guard is asked: templates, prompts and where a prefix of an answer ends in them."""
