"""Measurements. Run from a checkout: `python -m bench train_step --help`."""
