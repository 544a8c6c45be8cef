"""Fused kernels for CLIP at few tokens: attention for 8 to 577 tokens and the contrastive losses.

Needs jax and NumPy only; `clipa_kernels.flax`, imported on demand, needs flax. Every function takes
`implementation`: None picks the best that can serve the call on the platform traced for, a name insists on it, and
`default_implementation` sets a name for calls that give none. `explain` tells which one a call would take and why,
`supports` whether a certain one can. `clipa_kernels.reference` holds the float64 meaning of each function.
"""

from clipa_kernels.attention.api import dot_product_attention, flat_attention
from clipa_kernels.contrastive.api import contrastive_loss, sigmoid_loss
from clipa_kernels.dispatch import Explanation, Support, default_implementation
from clipa_kernels.explanation import explain, supports

__all__ = [
    "Explanation",
    "Support",
    "contrastive_loss",
    "default_implementation",
    "dot_product_attention",
    "explain",
    "flat_attention",
    "sigmoid_loss",
    "supports",
]
