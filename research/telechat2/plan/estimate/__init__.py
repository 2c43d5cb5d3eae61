"""Memory, communication and time of a plan, estimated without compiling."""
