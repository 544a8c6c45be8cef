"""The TPU implementation of the contrastive losses: Pallas kernels and how they are called."""
