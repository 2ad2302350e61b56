"""Flax models on jaxkern's ops."""
