"""The folder that MindIE serves."""
