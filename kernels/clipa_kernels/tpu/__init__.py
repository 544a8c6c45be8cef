"""Attention and contrastive-loss kernels for TPU, written in Pallas."""
