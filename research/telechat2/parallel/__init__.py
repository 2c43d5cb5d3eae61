"""Parallel plans, applied to a model from outside."""
