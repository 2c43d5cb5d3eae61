"""Settings and their rules, without MindSpore."""
