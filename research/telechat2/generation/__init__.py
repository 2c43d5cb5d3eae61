"""The host's side of generation."""
