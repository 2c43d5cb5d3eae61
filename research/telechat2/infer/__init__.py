"""Prediction by several processes, each with a slice of every matrix; a person at a terminal."""
