"""A run's plan: compute, time, money and memory of each stage, as data. Imports no jax."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from clipa_fast.config import ModelConfig, StageConfig
from clipa_fast.errors import UserError
from clipa_fast.model.costs import image_gmac, pair_gmac, transformer_gmac
from clipa_fast.model.mask_sizes import count_kept
from clipa_fast.model.presets import grid_size, towers
from clipa_fast.planning.accuracy import Accuracy, look_up
from clipa_fast.planning.devices import Device
from clipa_fast.planning.memory import USABLE, memory_per_device, smallest_slice
from clipa_fast.planning.stages import short_run
from clipa_fast.planning.step_time import TRAIN_FLOPS_PER_MAC, Throughput, outside


@dataclass(frozen=True)
class StagePlan:
    """One stage. GMAC are forward and of one pair; FLOPs are of training, all samples."""

    name: str
    image_tokens: int
    text_tokens: int
    samples: int
    batch: int
    image_gmac: float
    text_gmac: float
    gmac: float
    flops: float
    pairs_per_second: float
    hours: float
    dollars: float | None


@dataclass(frozen=True)
class SlicePlan:
    """The run on so many devices; bytes are those of the stage that needs most."""

    devices: int
    days: float
    replicated_bytes: float
    sharded_bytes: float
    fits_replicated: bool
    fits_sharded: bool


@dataclass(frozen=True)
class Plan:
    """A whole run.

    Attributes:
      model: preset.
      run: the stages in short form.
      chip: device planned for.
      price: dollars of a device-hour; None: not known, and so no dollars.
      stages: each stage.
      flops: training FLOPs of all stages.
      hours: device-hours.
      dollars: of the device-hours.
      error: relative error of the calibration; None: not checked on this device.
      basis: what the calibration rests on.
      error_of: what the error is the largest of.
      warning: why the calibration does not hold for this model; empty where it does.
      slices: the run on several numbers of devices.
      smallest_replicated: fewest devices that hold it with parameters whole on each; None: the largest slice does not.
      smallest_sharded: the same with parameters, moments and gradients spread.
      data: data set whose published accuracies were looked at; None: none asked for.
      accuracy: ImageNet top-1 by the papers; None where they do not tell.
    """

    model: str
    run: str
    chip: str
    price: float | None
    stages: tuple[StagePlan, ...]
    flops: float
    hours: float
    dollars: float | None
    error: float | None
    basis: str
    error_of: str
    warning: str
    slices: tuple[SlicePlan, ...]
    smallest_replicated: int | None
    smallest_sharded: int | None
    data: str | None
    accuracy: Accuracy | None

    def to_json(self) -> str:
        """Everything as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1)


def make_plan(
    model: ModelConfig,
    stages: Sequence[StageConfig],
    device: Device,
    throughput: Throughput,
    *,
    price: float | None = None,
    devices: int | None = None,
    data: str | None = None,
) -> Plan:
    """Plans a run.

    Args:
      model: the towers.
      stages: in order.
      device: what it runs on.
      throughput: the device's speed.
      price: dollars of a device-hour.
      devices: how many; None: the smallest slice that fits and larger ones.
      data: name of the data set, to look up the papers' accuracy.

    Raises:
      UserError: no stage, or fewer than one device.
    """
    stages = tuple(stages)
    if not stages:
        raise UserError("stages: none given")
    if devices is not None and devices < 1:
        raise UserError(f"devices: got {devices}; accepted: 1 and more")
    if price is not None and not price >= 0:
        raise UserError(f"price: got {price}; accepted: dollars an hour, 0 and more")
    plans = tuple(_plan_stage(model, stage, throughput, price) for stage in stages)
    hours = sum(stage.hours for stage in plans)
    replicated, sharded = (smallest_slice(model, stages, device, sharded=whole) for whole in (False, True))
    if devices is not None:
        counts: tuple[int, ...] = (devices,)
    else:
        first = sharded or device.slices[-1]
        counts = tuple(count for count in device.slices if count >= first)[:4]
    return Plan(
        model=model.preset,
        run=short_run(stages),
        chip=device.name,
        price=price,
        stages=plans,
        flops=sum(stage.flops for stage in plans),
        hours=hours,
        dollars=None if price is None else hours * price,
        error=throughput.error,
        basis=throughput.basis,
        error_of=throughput.error_of,
        warning=outside(model, throughput),
        slices=tuple(_plan_slice(model, stages, device, count, hours) for count in counts),
        smallest_replicated=replicated,
        smallest_sharded=sharded,
        data=data,
        accuracy=None if data is None else look_up(model, data.lower(), stages),
    )


def _plan_stage(model: ModelConfig, stage: StageConfig, throughput: Throughput, price: float | None) -> StagePlan:
    sizes = towers(model)
    seconds = throughput.seconds_per_pair(model, stage)
    hours = seconds * stage.samples / 3600
    gmac = pair_gmac(model, stage)
    return StagePlan(
        name=stage.name,
        image_tokens=count_kept(stage.image_mask, stage.mask_ratio, grid_size(stage.image_size, sizes.patch_size)) + 1,
        text_tokens=stage.text_length,
        samples=stage.samples,
        batch=stage.batch_size,
        image_gmac=image_gmac(sizes.vision, sizes.patch_size, stage.image_size, stage.mask_ratio, stage.image_mask),
        text_gmac=transformer_gmac(sizes.text, stage.text_length),
        gmac=gmac,
        flops=TRAIN_FLOPS_PER_MAC * 1e9 * gmac * stage.samples,
        pairs_per_second=1 / seconds,
        hours=hours,
        dollars=None if price is None else hours * price,
    )


def _plan_slice(
    model: ModelConfig, stages: Sequence[StageConfig], device: Device, devices: int, hours: float
) -> SlicePlan:
    replicated, sharded = (
        max(memory_per_device(model, stage, devices, sharded=spread).total for stage in stages)
        for spread in (False, True)
    )
    room = USABLE * device.memory_bytes
    return SlicePlan(devices, hours / devices / 24, replicated, sharded, replicated <= room, sharded <= room)
