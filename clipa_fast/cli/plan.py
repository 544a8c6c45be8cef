"""`clipa-fast plan`: its flags and what it prints. Imports no jax."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from clipa_fast.config import ModelConfig, StageConfig, load_config
from clipa_fast.errors import UserError
from clipa_fast.model.presets import towers
from clipa_fast.planning.budget import Offer, Offers, spend
from clipa_fast.planning.check import Check, all_checks, calibrations_that_agree, summary, to_rows
from clipa_fast.planning.devices import find_device
from clipa_fast.planning.plan import Plan, make_plan
from clipa_fast.planning.stages import parse_stages, short_count, short_run
from clipa_fast.planning.step_time import Throughput, throughput_for
from clipa_fast.recipes import RECIPES

_OFFERS_SHOWN = 12


@dataclass(frozen=True)
class PlanCommand:
    """What a run costs: compute, device-hours, dollars, memory; or the best run that a budget buys."""

    model: str | None = None
    """Preset, such as H/14; with --budget only this one is looked at."""
    stages: str | None = None
    """SIDE[mMASKED][tTEXT]@SAMPLES, by commas: 70@12.8B,224m30@512M. 8 text tokens below 224 px, else 32."""
    recipe: str | None = None
    """A recipe's model and stages instead."""
    config: Path | None = None
    """A run's YAML file instead."""
    chip: Literal["a100-40gb", "a100-80gb", "h100", "h200", "v5e", "v5p", "v6e", "tpu7x"] = "a100-80gb"
    """Device."""
    devices: int | None = None
    """How many; None: the smallest slice that fits, and larger ones."""
    price: float | None = None
    """Dollars of a device-hour; None: the published one, which is known of a100-80gb alone."""
    batch: int | None = None
    """Global batch; None: the papers' 65,536 below 224 px, 32,768 at 224, 16,384 from 336 on."""
    data: str | None = None
    """laion400m, laion2b or datacomp1b: what accuracy the papers found with it."""
    calibrate: str = "paper"
    """paper, or a history of python -m bench with train_step rows of the chip."""
    budget: float | None = None
    """Dollars: the best runs by the papers' accuracies that cost no more."""
    check: bool = False
    """Print the planner's figures beside the published ones."""
    output: Path | None = None
    """Write everything there as JSON too."""


def plan_command(options: PlanCommand, console: Console | None = None) -> None:
    """Prints a plan, what a budget buys, or the check.

    Raises:
      UserError: an option is wrong, or a check found a figure out of tolerance.
    """
    console = console or Console()
    if options.output is not None and not options.output.parent.is_dir():
        raise UserError(f"output: no such folder: {options.output.parent}")
    if options.check:
        checks = all_checks()
        _print_checks(checks, console)
        _write(options.output, json.dumps(to_rows(checks), indent=1))
        if not all(check.within is not False for check in checks):
            raise UserError(f"check: {summary(checks)}")
        return
    device = find_device(options.chip)
    price = device.price if options.price is None else options.price
    throughput = throughput_for(device, options.calibrate)
    if options.budget is not None:
        if price is None:
            raise UserError(f"price: none known of {options.chip}; accepted: dollars of a device-hour")
        offers = spend(options.budget, price, throughput, model=options.model, data=options.data)
        _print_offers(offers, options.budget, throughput, console)
        rows = [_offer_row(offer) for offer in offers.affordable]
        _write(options.output, json.dumps({"budget": options.budget, "offers": rows}, indent=1))
        return
    model, stages = _what(options)
    plan = make_plan(model, stages, device, throughput, price=price, devices=options.devices, data=options.data)
    _print_plan(plan, console)
    _write(options.output, plan.to_json())


def _what(options: PlanCommand) -> tuple[ModelConfig, tuple[StageConfig, ...]]:
    given = [name for name in ("stages", "recipe", "config") if getattr(options, name) is not None]
    if len(given) != 1:
        raise UserError(
            f"plan: got {' and '.join(given) or 'none'} of stages, recipe and config; accepted: one of them"
        )
    if options.stages is not None:
        if options.model is None:
            raise UserError("model: needed with --stages; accepted: a preset such as H/14")
        model = ModelConfig(preset=options.model)
        towers(model)
        return model, parse_stages(options.stages, model, options.batch)
    if options.model is not None or options.batch is not None:
        name = "model" if options.model is not None else "batch"
        raise UserError(f"{name}: a {given[0]} has its own; accepted: with --stages")
    if options.recipe is not None and options.recipe not in RECIPES:
        raise UserError(f"recipe: unknown {options.recipe!r}; accepted: {', '.join(RECIPES)}")
    run = RECIPES[options.recipe] if options.recipe is not None else load_config(options.config or "")
    return run.model, run.stages


def _table(title: str, *heads: str, words: int = 1) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index < words else "right", no_wrap=index >= words)
    return table


def _print_plan(plan: Plan, console: Console) -> None:
    heads = ("stage", "tokens", "samples", "GMAC/pair", "PFLOP", "pairs/s", "hours", "$")
    table = _table(f"{plan.model} on {plan.chip}: {plan.run}", *heads)
    for stage in plan.stages:
        tokens = f"{stage.image_tokens}+{stage.text_tokens}"
        cells = (f"{stage.gmac:.4g}", f"{stage.flops / 1e15:,.0f}", f"{stage.pairs_per_second:,.1f}")
        table.add_row(
            stage.name, tokens, short_count(stage.samples), *cells, f"{stage.hours:,.0f}", _dollars(stage.dollars)
        )
    table.add_row("all", "", "", "", f"{plan.flops / 1e15:,.0f}", "", f"{plan.hours:,.0f}", _dollars(plan.dollars))
    console.print(table)
    console.print(
        "GMAC forward; FLOP of training, 6 per MAC, recomputation not counted; pairs/s and hours of one device.",
        f"Speed {plan.basis}.",
        _error(plan.error, plan.error_of),
        sep="\n",
        highlight=False,
    )
    if plan.warning:
        console.print(f"Warning: {plan.warning}.", highlight=False)
    table = _table("", "devices", "wall time", "GB each, replicated", "GB each, sharded", words=0)
    for part in plan.slices:
        marks = ("" if fits else " too much" for fits in (part.fits_replicated, part.fits_sharded))
        sizes = (part.replicated_bytes, part.sharded_bytes)
        memory = (f"{size / 1e9:.1f}{mark}" for size, mark in zip(sizes, marks, strict=True))
        table.add_row(f"{part.devices:,}", _days(part.days), *memory)
    console.print(table)
    console.print(
        "Memory by arithmetic (state, gradients, recomputed blocks in bf16, loss), at the stage that needs most.",
        f"Smallest slice that fits: {_slice(plan.smallest_sharded)} with parameters sharded,"
        f" {_slice(plan.smallest_replicated)} with parameters whole on each device.",
        sep="\n",
        highlight=False,
    )
    if plan.data is not None:
        console.print(_accuracy_line(plan), highlight=False)


def _accuracy_line(plan: Plan) -> str:
    found = plan.accuracy
    if found is None:
        return (
            f"ImageNet: the papers have no such run of {plan.model} on {plan.data}, nor two around it that differ from"
            " it in one setting; not extrapolated."
        )
    if found.published:
        return f"ImageNet zero-shot top-1: {found.estimate:.1f} % (published)."
    return (
        f"ImageNet zero-shot top-1: {found.estimate:.1f} %, interpolated between published {found.low:.1f}"
        f" and {found.high:.1f} %."
    )


def _print_offers(offers: Offers, budget: float, throughput: Throughput, console: Console) -> None:
    heads = ("model", "data", "stages", "ImageNet", "bounds", "hours", "$")
    table = _table(f"Best of the papers' runs for ${budget:,.0f}", *heads, words=3)
    for offer in offers.affordable[:_OFFERS_SHOWN]:
        found = offer.run.accuracy
        bounds = "published" if found.published else f"{found.low:.1f}-{found.high:.1f}"
        stages = short_run(offer.run.stages).replace(",", ", ")
        cells = (f"{found.estimate:.1f}", bounds, f"{offer.hours:,.0f}", _dollars(offer.dollars))
        table.add_row(offer.run.model.preset, offer.run.data, stages, *cells)
    console.print(table)
    lines = [
        f"{throughput.device}: speed {throughput.basis}.",
        _error(throughput.error, throughput.error_of),
    ]
    best = offers.affordable[0]
    if throughput.error is not None and best.dollars * (1 + throughput.error) > budget:
        lines.append(f"At the upper end of that error the first costs ${best.dollars * (1 + throughput.error):,.0f}.")
    if offers.cheapest_beyond is not None:
        beyond = offers.cheapest_beyond
        lines.append(
            f"The next better published run costs ${beyond.dollars:,.0f}: {beyond.run.model.preset} on"
            f" {beyond.run.data}, {short_run(beyond.run.stages)}, {beyond.run.accuracy.estimate:.1f} %."
        )
    else:
        lines.append("No published run is better: what more money buys is not extrapolated.")
    console.print(*lines, sep="\n", highlight=False)


def _offer_row(offer: Offer) -> dict:
    found = offer.run.accuracy
    return {
        "model": offer.run.model.preset,
        "data": offer.run.data,
        "stages": short_run(offer.run.stages),
        "imagenet": found.estimate,
        "bounds": [found.low, found.high],
        "hours": offer.hours,
        "dollars": offer.dollars,
    }


def _print_checks(checks: list[Check], console: Console) -> None:
    for group in dict.fromkeys(check.group for check in checks):
        rows = [check for check in checks if check.group == group]
        notes = any(check.note for check in rows)
        table = _table(group, "", "planner", "published", "off by", "within", *(["note"] if notes else []))
        if notes:
            table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
        for check in rows:
            mark = {True: "yes", False: "NO", None: ""}[check.within]
            figures = (f"{check.computed:,.{check.digits}f}", f"{check.published:,.10g}", f"{check.deviation:+.1%}")
            table.add_row(check.name, *figures, mark, *([check.note] if notes else []))
        console.print(table)
    agree, pairs = calibrations_that_agree()
    console.print(
        f"{summary(checks)}.",
        "The speed is calibrated on the two bills that differ by one stage alone. Of all"
        f" {pairs} pairs of bills, {agree} predict the seven within 10 %: most pairs are too much alike to tell the two"
        " numbers of the model apart.",
        sep="\n",
        highlight=False,
    )


def _write(path: Path | None, text: str) -> None:
    if path is not None:
        path.write_text(text + "\n")


def _error(error: float | None, of: str) -> str:
    return "Error unknown." if error is None else f"Error ±{error:.1%}, the largest of {of}."


def _dollars(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _days(days: float) -> str:
    return f"{days:,.1f} days" if days >= 2 else f"{24 * days:,.1f} h"


def _slice(devices: int | None) -> str:
    return "none" if devices is None else f"{devices:,}"
