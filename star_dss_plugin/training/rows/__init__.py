"""Prepare rows and streams of a trainer, and collate them with their scores."""
