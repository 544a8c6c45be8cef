"""How fast a run goes, how busy its devices are, and how long it waits for input."""

from __future__ import annotations

import time
from typing import Any

import jax

from clipa_fast.config import RunConfig, StageConfig
from clipa_fast.hardware import GPU_PEAKS, chip_of_kind
from clipa_fast.model.costs import pair_gmac
from clipa_fast.model.mask_sizes import count_kept
from clipa_fast.model.presets import grid_size, towers


def tokens_per_pair(config: RunConfig, stage: StageConfig) -> int:
    """Tokens that the towers see of one pair: kept patches, class token and text."""
    grid = grid_size(stage.image_size, towers(config.model).patch_size)
    return count_kept(stage.image_mask, stage.mask_ratio, grid) + 1 + stage.text_length


def pair_flops(config: RunConfig, stage: StageConfig) -> float:
    """Floating point operations that training on one pair needs: two a MAC, the backward pass twice the forward.

    What a run recomputes to save memory is not counted, nor is the loss.
    """
    return 6e9 * pair_gmac(config.model, stage)


def peak_flops(device_kind: str) -> float | None:
    """bf16 operations per second of one device, None where not known."""
    chip = chip_of_kind(device_kind)
    if chip is not None:
        return chip.peak_flops
    return next((peak for start, peak in GPU_PEAKS.items() if device_kind.startswith(start)), None)


class Throughput:
    """Rates of a stage from one logged step to the next.

    Args:
      config: the run.
      stage: the stage.
      done: steps already done when it starts.
      devices: how many share the batch.
    """

    def __init__(self, config: RunConfig, stage: StageConfig, done: int, devices: int):
        self._batch, self._tokens = stage.batch_size, tokens_per_pair(config, stage)
        peak = peak_flops(jax.local_devices()[0].device_kind)
        self._pair_share = None if peak is None else pair_flops(config, stage) / (peak * devices)
        self._step, self._time, self._waited = done, time.perf_counter(), 0.0

    def row(self, done: int, waited: float) -> dict[str, Any]:
        """What a metrics row says of the steps since the last one; `waited` are the seconds without input so far.

        steps_per_second, pairs_per_second, tokens_per_second; input_wait, the share of the time that no batch was
        ready; mfu, the share of the devices' peak that the model's own operations reach, where the peak is known;
        device_memory_gb and device_memory_peak_gb of this process's first device, where it tells.
        """
        now = time.perf_counter()
        elapsed = now - self._time
        rate = (done - self._step) / elapsed
        row: dict[str, Any] = {
            "steps_per_second": rate,
            "pairs_per_second": rate * self._batch,
            "tokens_per_second": rate * self._batch * self._tokens,
            "input_wait": (waited - self._waited) / elapsed,
        }
        if self._pair_share is not None:
            row["mfu"] = rate * self._batch * self._pair_share
        memory = jax.local_devices()[0].memory_stats() or {}
        for name, key in (("device_memory_gb", "bytes_in_use"), ("device_memory_peak_gb", "peak_bytes_in_use")):
            if key in memory:
                row[name] = memory[key] / 1e9
        self._step, self._time, self._waited = done, now, waited
        return row
