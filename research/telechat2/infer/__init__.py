"""The "front-end parallel" model: prediction by several processes, each with a slice of every matrix."""
