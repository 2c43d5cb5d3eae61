"""What all of the plugin stands on; it imports nothing of it."""
