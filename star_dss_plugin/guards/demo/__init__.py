"""Provide a demonstration guard on SmolLM2-135M, which gives no protection."""
