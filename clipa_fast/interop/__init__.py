"""Weights of other origins in, and ours out: open_clip's files, CLIPA's npz, StableHLO."""
