"""Adapters that put the kernels under other libraries' layers."""
