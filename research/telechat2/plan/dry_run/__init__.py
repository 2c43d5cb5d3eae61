"""A plan compiled for the Ascend target on a machine without NPUs."""
