"""Engines compute label probabilities for token sequences that share prefixes."""
