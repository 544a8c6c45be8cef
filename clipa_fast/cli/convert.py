"""What `clipa-fast import` and `clipa-fast export` do."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from clipa_fast.errors import UserError
from clipa_fast.interop.open_clip_config import Described
from clipa_fast.interop.open_clip_export import export_open_clip
from clipa_fast.interop.parameter_names import paths
from clipa_fast.interop.pretrained import Pretrained, open_pretrained
from clipa_fast.interop.stablehlo_export import export_stablehlo
from clipa_fast.model.presets import towers


def import_command(
    source: str,
    output: Path,
    *,
    tokenizer: str | None = None,
    image_size: int | None = None,
    image_pool: str = "gap",
    console: Console | None = None,
) -> None:
    """Reads a model of any origin, checks every tensor, and writes it in open_clip's format.

    Args:
      source, tokenizer, image_size, image_pool: see `open_pretrained`.
      output: the new folder.

    Raises:
      UserError: what `open_pretrained` and `export_open_clip` find wrong.
    """
    model = open_pretrained(source, tokenizer=tokenizer, image_size=image_size, image_pool=image_pool)
    _write(model, output, "open_clip", None, console or Console())


def export_command(
    model: str,
    output: Path,
    *,
    format: str = "open_clip",
    tokenizer: str | None = None,
    hub_name: str | None = None,
    console: Console | None = None,
) -> None:
    """Writes a trained model for others: open_clip's format, or StableHLO with a loader that needs jax alone.

    Args:
      model: a run's folder, or any other source of `open_pretrained`.
      output: the new folder.
      format: "open_clip" or "stablehlo".
      tokenizer: replaces the tokenizer beside the weights.
      hub_name: ORG/NAME of the hub repository that an open_clip folder is meant for.

    Raises:
      UserError: what reading and writing find wrong.
    """
    if format == "stablehlo" and hub_name is not None:
        raise UserError(f"hub_name: only for format open_clip, got {hub_name!r}")
    _write(open_pretrained(model, tokenizer=tokenizer), output, format, hub_name, console or Console())


def _write(model: Pretrained, output: Path, format: str, hub_name: str | None, console: Console) -> None:
    described = Described(model.config, model.image_size, model.text_length)
    sizes = towers(model.config)
    console.print(
        f"{model.name}: {model.config.preset}, image tower {sizes.vision.width} x {sizes.vision.depth}, text tower"
        f" {sizes.text.width} x {sizes.text.depth}, {model.image_size} px, {model.text_length} text tokens",
        highlight=False,
    )
    params = model.read_params()
    count = sum(leaf.size for leaf in paths(params).values())
    console.print(f"{count:,} parameters read; writing {output}", highlight=False)
    notes: list[str] = []
    if format == "open_clip":
        notes = export_open_clip(params, described, model.tokenizer, output, hub_name=hub_name)
    else:
        export_stablehlo(params, described, model.tokenizer, output)
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    files = sorted(output.iterdir())
    console.print("\n".join(f"  {file.name}  {file.stat().st_size / 1e6:,.1f} MB" for file in files), highlight=False)
