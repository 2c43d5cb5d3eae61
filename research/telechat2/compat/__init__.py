"""The only place that knows the MindFormers version."""
