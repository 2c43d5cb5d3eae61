"""Checkpoints: one table of names and shapes, streamed in either direction (torch <-> MindSpore)."""
