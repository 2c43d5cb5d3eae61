"""What is known of a training run before it starts: parallel plans compiled and read without an NPU."""
