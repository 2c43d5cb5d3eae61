"""The parts of the model, without devices and processes."""
