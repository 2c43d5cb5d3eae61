"""Slices of a cluster's parameters: strategies, re-sharding."""
