"""The GPU implementation of attention: Pallas kernels and how they are called."""
