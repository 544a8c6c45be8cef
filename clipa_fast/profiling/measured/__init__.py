"""Measured profiles: steps of a real run under jax's profiler."""
