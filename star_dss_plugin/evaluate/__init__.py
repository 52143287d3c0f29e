"""Evaluation of finetuned models: what they refuse, what they can do, and how robustly."""
