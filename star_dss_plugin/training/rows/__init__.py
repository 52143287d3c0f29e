"""Rows and streams of a trainer: made ready, and recognised in a batch with their columns."""
