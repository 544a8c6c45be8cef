"""Memory of one device in training, by arithmetic, and the smallest slice that holds a run. Imports no jax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clipa_fast.config import ModelConfig, StageConfig, TowerSize
from clipa_fast.model.costs import num_parameters
from clipa_fast.model.mask_sizes import count_kept
from clipa_fast.model.presets import grid_size, towers
from clipa_fast.planning.devices import Device

USABLE = 0.9  # of a device's memory; the rest is the runtime's, and what the arithmetic leaves out
_BF16, _FLOAT32 = 2, 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while training with recomputed blocks and bf16 activations.

    Attributes:
      state: float32 parameters and AdamW's two moments.
      gradients: float32.
      activations: the saved input of every block, and what the widest block's backward pass holds.
      loss: features of the global batch, gathered, and their gradients.
    """

    state: float
    gradients: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.state + self.gradients + self.activations + self.loss


def memory_per_device(model: ModelConfig, stage: StageConfig, devices: int, *, sharded: bool) -> Memory:
    """Memory at the stage's global batch.

    Args:
      model: the towers.
      stage: sizes and global batch.
      devices: devices that the batch is spread over.
      sharded: whether parameters, moments and gradients are spread over the devices too, or whole on each.
    """
    parameters = num_parameters(model, stage)
    moment = _BF16 if stage.optimizer.first_moment_dtype == "bfloat16" else _FLOAT32
    share = devices if sharded else 1
    pairs = -(-stage.batch_size // devices)
    sizes = towers(model)
    patches = count_kept(stage.image_mask, stage.mask_ratio, grid_size(stage.image_size, sizes.patch_size))
    both = ((sizes.vision, patches + 1), (sizes.text, stage.text_length))
    saved = sum(pairs * tokens * size.depth * size.width * _BF16 for size, tokens in both)
    block = max(pairs * tokens * _block_elements(size) * _BF16 for size, tokens in both)
    return Memory(
        state=parameters * (2 * _FLOAT32 + moment) / share,
        gradients=parameters * _FLOAT32 / share,
        activations=saved + block,
        loss=2 * stage.batch_size * sizes.embed_dim * _BF16 + 4 * pairs * sizes.embed_dim * _FLOAT32,
    )


def _block_elements(size: TowerSize) -> int:
    """Elements per token that a block's backward pass holds at once.

    Two normed inputs, query, key, value, attention and its projection, the sum, as many gradients, and the MLP's hidden
    layer before and after GELU with one gradient.
    """
    return 14 * size.width + 3 * size.mlp_dim


def smallest_slice(model: ModelConfig, stages: Sequence[StageConfig], device: Device, *, sharded: bool) -> int | None:
    """Fewest devices on which every stage fits in the usable memory; None where the largest slice is too small."""
    for devices in device.slices:
        totals = [memory_per_device(model, stage, devices, sharded=sharded).total for stage in stages]
        if max(totals) <= USABLE * device.memory_bytes:
            return devices
    return None
