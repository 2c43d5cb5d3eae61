"""What depends on the version of MindFormers."""
