"""Llama models in either direction: names, rows and folders."""
