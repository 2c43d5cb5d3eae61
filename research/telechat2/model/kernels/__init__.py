"""Fused Ascend kernels, their reference implementations, and the choice between them."""
