"""Predict most scores of a verdict guard from its hidden states, and compute the rest exactly."""
