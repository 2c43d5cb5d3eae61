"""Serving: the folder that MindIE starts from."""
