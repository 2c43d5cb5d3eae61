"""Weights stored for tensor-parallel inference."""
