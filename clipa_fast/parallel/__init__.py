"""Devices and processes: meshes, shardings, jax.distributed, settings of the CPU backend."""
