"""Attention and contrastive-loss kernels for NVIDIA GPUs, written in Pallas for Triton."""
