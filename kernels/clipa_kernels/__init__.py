"""Fused kernels for CLIP at few tokens: attention for 8 to 577 tokens and the contrastive losses."""
