"""`import clipa_kernels.flax`: the flax integration under its short name."""

from clipa_kernels.integrations.flax import attention_fn, fused_attention

__all__ = ["attention_fn", "fused_attention"]
