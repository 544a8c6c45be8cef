"""The run's configuration: typed, frozen, read from YAML, overridable by flags. The only truth about a run.

Nothing here imports jax, so that `--help` and data workers stay light.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import dacite
import yaml

from clipa_fast.errors import UserError


@dataclass(frozen=True)
class TowerSize:
    """Sizes of one transformer tower."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int


@dataclass(frozen=True)
class ModelConfig:
    """The two towers."""

    preset: str = "B/16"
    """Size and patch, such as S/16, B/16, L/14, H/14 or bigG/14 (`clipa-fast recipes` lists the sizes)."""
    convention: Literal["clipa", "open_clip", "openai"] = "clipa"
    """clipa: tanh GELU, LayerNorm eps 1e-6, fixed sin-cos image positions. open_clip: CLIPA as open_clip ships it, with
    exact GELU, eps 1e-5, a stored table. openai: the classic CLIP, with quick GELU, eps 1e-5, a stored table, LayerNorm
    before the first block, class token, causal text read at its end token. The fields from image_pool to text_rule
    replace single choices of a convention."""
    image_pool: Literal["gap", "tok"] | None = None
    """gap: mean over patches, then LayerNorm (clipa, open_clip). tok: LayerNorm, then the class token (openai)."""
    image_positions: Literal["sincos", "stored"] | None = None
    """sincos: fixed, recomputed for any grid. stored: a table of parameters."""
    pre_norm: bool | None = None
    """LayerNorm between the patch embedding and the first block of the image tower."""
    activation: Literal["gelu_tanh", "gelu", "quick_gelu"] | None = None
    """Of both towers' MLPs. quick_gelu: x * sigmoid(1.702 x)."""
    norm_eps: float | None = None
    """Added to the variance in every LayerNorm."""
    causal_text: bool | None = None
    """Whether a text token sees only those before it."""
    text_pool: Literal["last", "end"] | None = None
    """Where the text is read. last: the last position. end: the largest token, which CLIP's end token is."""
    pixel_norm: Literal["imagenet", "openai", "inception", "glyphs"] | None = None
    """Mean and deviation that pixels are normalised with."""
    resize: Literal["squash", "shorter_side"] | None = None
    """How evaluation makes a picture square: squash it, or cut the middle out (openai)."""
    resize_filter: Literal["bilinear", "bicubic"] | None = None
    """How evaluation interpolates; bicubic for openai."""
    text_rule: Literal["clipa", "open_clip"] | None = None
    """How WordPiece fills a row. clipa: [CLS] and length - 1 pieces, the text as it is. open_clip: one piece less, as
    its [SEP] gives way to padding, and the text repaired by ftfy first."""
    vocab_size: int | None = None
    """Rows of the token table. None: 32,000 as in the papers, or the size of a vocabulary trained on the run's
    captions."""
    vision: TowerSize | None = None
    """Replaces the preset's image tower."""
    text: TowerSize | None = None
    """Replaces the preset's text tower."""
    embed_dim: int | None = None
    """Replaces the preset's joint embedding width."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype. Parameters, softmax and loss are float32 always."""
    remat: Literal["none", "image", "text", "both"] = "none"
    """Which tower recomputes its blocks in the backward pass."""
    remat_policy: Literal["nothing", "attention", "dots"] = "nothing"
    """What a recomputed block keeps all the same: nothing, the output of attention, or that of every dense layer
    (CLIPA's "minimal")."""
    attention: Literal["auto", "xla", "tpu", "gpu"] = "auto"
    """Implementation of attention. auto: the best that can serve the call on this machine."""
    scan_unroll: int = 1
    """Blocks per step of the scan over layers: more compiles longer and can run faster."""


COMPUTING_FIELDS = ("dtype", "remat", "remat_policy", "attention", "scan_unroll")
"""Fields of ModelConfig that say how a model is computed, not which one it is."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as the papers use it, Adafactor to save memory, or Muon to save samples."""

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    """adafactor keeps two vectors for the second moment of a matrix; with beta1 = 0 it keeps no first moment either.
    muon makes the update of a dense layer's matrix orthogonal and keeps no second moment of it; the rest gets Adam. In
    short runs it learned more from each sample than adamw at the same learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment; Adafactor's follows the number of steps, and muon has none for matrices."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment; muon adds it to a matrix's norm too."""
    weight_decay: float = 0.2
    """Decoupled weight decay, times the learning rate."""
    decay: Literal["kernels", "all_but_norms", "matrices"] = "kernels"
    """What is decayed: kernels (CLIPA's JAX code), all_but_norms (its t5x branch: token table and class token too),
    matrices (open_clip: every parameter of two and more dimensions)."""
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the first moment; bfloat16 saves memory (the papers' H, g and bigG runs)."""
    clip_norm: float | None = None
    """Clip the global gradient norm. The papers do not."""
    max_logit_scale: float | None = None
    """Clamp the temperature's multiplier after each step. open_clip: 100; CLIPA's JAX code: none."""
    ema_decay: float | None = None
    """Keep a moving average of the parameters with this decay per step, for `eval --ema`. Starts with each stage."""


@dataclass(frozen=True)
class StageConfig:
    """One stage of a run: what is seen, at which size, for how long."""

    name: str = "pretrain"
    """Shown in progress, metrics and report."""
    image_size: int = 112
    """Side of the square training picture in pixels; a multiple of the patch."""
    text_length: int = 16
    """Tokens per caption, [CLS] included."""
    samples: int = 1_000_000
    """Samples seen; rounded down to whole batches."""
    batch_size: int = 512
    """Global batch."""
    micro_batches: int = 1
    """Parts that a batch passes through the towers in, to save memory. The loss is still that of the whole batch, at
    the price of one more forward pass."""
    base_learning_rate: float = 8e-6
    """Peak learning rate per 256 samples of batch: peak = base * batch / 256."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0, before the half cosine to 0."""
    mask_ratio: float = 0.0
    """Share of the patches dropped in training, in [0, 1)."""
    image_mask: Literal["random", "grid", "block"] = "random"
    """Which patches a mask drops."""
    text_reduction: Literal["truncate", "random", "shuffle", "block", "syntax"] = "truncate"
    """How captions longer than text_length lose tokens in training."""
    min_crop_area: float = 0.4
    """Smallest share of the picture that a random crop keeps; 1: no crop."""
    min_zoom: float = 1.0
    """Smallest share of the training picture's side that a crop is shrunk to, its edge pixels repeated around it, so
    that things are seen smaller than they are too; 1: never shrunk."""
    jitter: bool = False
    """Colour jitter and random grey, as in the papers' H and bigG runs."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


GLYPHS = "glyphs"  # the name of the built-in set among shards


@dataclass(frozen=True)
class DataConfig:
    """Where pictures and captions come from."""

    train: tuple[str, ...] = (GLYPHS,)
    """Tar shards: paths or URLs (gs://, s3://, https://, "pipe:COMMAND"), globs or brace lists; or the built-in set
    `glyphs`."""
    weights: tuple[float, ...] = ()
    """Share of the batch that each entry of `train` gets, on any scale; empty: as many as it has samples."""
    tokenizer: str | None = None
    """BERT vocab.txt, a tokenizers .json, CLIP's bpe_simple_vocab_16e6.txt.gz, a folder holding one of them, or
    hf://ORG/NAME. `captions`: a WordPiece trained on the run's captions. None: what lies beside the weights of
    init_from, else captions."""
    trained_vocab_size: int = 4096
    """Entries of the WordPiece trained on the run's captions."""
    crop_filter: Literal["bilinear", "bicubic", "area"] = "bilinear"
    """How training crops are resized. bilinear: CLIPA's pixels. area: faster, where decoding keeps devices waiting;
    needs OpenCV (pip install 'clipa-fast[fast]')."""
    workers: int = 2
    """Processes that decode and crop; threads where the pictures fit in memory."""
    cache_mb: int = 512
    """Memory for decoded pictures, in MB: sets that fit are decoded once."""
    shuffle_shards: int = 64
    """Shards mixed at a time, where there are too many samples to be permuted whole (250,000)."""
    max_bad_share: float = 0.1
    """Share of bad samples above which the run stops with a report; below, they are skipped and counted."""
    cache_gb: float = 32.0
    """Local disk for copies of remote shards, in GB."""


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over devices. The batch is spread over all of them."""

    devices: int | None = None
    """Devices used, over all processes. None: every one there is; of a CPU, one a process."""
    fsdp: int | None = None
    """Devices that share one copy of parameters and optimizer state. None: as few as its memory asks for."""
    exchange: Literal["all_gather", "ring"] = "all_gather"
    """How features reach other devices for the loss; ring holds fewer of them at once."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stages: tuple[StageConfig, ...] = (StageConfig(),)
    """Stages in order; each carries the parameters on and starts the optimizer afresh."""
    init_from: str | None = None
    """Weights to start from instead of random ones: a run's folder, a folder or file in open_clip's format, an .npz of
    CLIPA's JAX code, or hf://ORG/NAME. They bring their tokenizer and their `model` along, of which dtype, remat,
    attention and scan_unroll stay free."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    seed: int = 0
    """Fixes initialisation, masks, crops and the order of the data."""
    log_every: int = 50
    """Steps between metrics rows."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is written at each stage's end too."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk."""
    keep_checkpoint_hours: float | None = None
    """Besides the newest, keep a checkpoint for good every so many hours. None: none."""
    checkpoint_dir: str | None = None
    """Folder or bucket (gs://...) of the checkpoints; all processes must see the same one. None: in the run's."""
    non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is no number ends the run, or its step is left out. Both write non_finite.jsonl."""
    wandb: str | None = None
    """Project at Weights & Biases that metrics go to as well; needs the package wandb."""


def load_config(path: str | Path) -> RunConfig:
    """Reads a run's YAML file.

    Raises:
      UserError: missing file, invalid YAML, unknown field (with the nearest known one), wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config: no such file: {path}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config: {path} is not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"config: {path} cannot be read: {error.strerror}") from error
    return config_from_dict({} if raw is None else raw, where=str(path))


def config_from_dict(raw: dict[str, Any], where: str = "config") -> RunConfig:
    """The run described by plain dicts and lists. Raises UserError as `load_config` does."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected a mapping of fields, got {type(raw).__name__}")
    hooks = {
        float: _to_float,
        int: _to_int,
        tuple[str, ...]: _to_strings,
        tuple[float, ...]: _to_floats,
        tuple[StageConfig, ...]: _to_stages,
    }
    try:
        return dacite.from_dict(RunConfig, raw, dacite.Config(strict=True, type_hooks=hooks))
    except dacite.UnexpectedDataError as error:
        unknown = min(error.keys, key=str)
        near = difflib.get_close_matches(str(unknown), _field_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{where}: unknown field {unknown!r}{hint}") from error
    except dacite.WrongTypeError as error:
        accepted = " or ".join(_accepted(error.field_type))
        raise UserError(f"{where}: {error.field_path}: got {error.value!r}; accepted: {accepted}") from error
    except dacite.DaciteError as error:
        raise UserError(f"{where}: {error}") from error


def config_to_yaml(config: RunConfig) -> str:
    """The whole config, defaults included, as YAML that `load_config` reads back equal."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _accepted(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [repr(value) for value in get_args(kind)]
    if get_origin(kind) in (Union, UnionType):
        return [name for part in get_args(kind) for name in _accepted(part)]
    if get_origin(kind) is tuple:
        return [{str: "a list of texts", float: "a list of numbers"}.get(get_args(kind)[0], "a list of mappings")]
    if dataclasses.is_dataclass(kind):
        return [f"a mapping of {kind.__name__}'s fields"]
    return ["nothing" if kind is type(None) else getattr(kind, "__name__", str(kind))]


def _to_float(value: Any) -> float:
    # YAML 1.1 reads 8e-6 as a string, and to Python true is a number.
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)
    raise dacite.WrongTypeError(float, value)


def _to_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise dacite.WrongTypeError(int, value)


def _to_strings(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if isinstance(values, list | tuple) and all(isinstance(entry, str) for entry in values):
        return tuple(values)
    raise dacite.WrongTypeError(tuple[str, ...], value)


def _to_floats(value: Any) -> tuple[float, ...]:
    if isinstance(value, list | tuple):
        return tuple(_to_float(entry) for entry in value)
    raise dacite.WrongTypeError(tuple[float, ...], value)


def _to_stages(value: Any) -> tuple[dict, ...]:
    if isinstance(value, list | tuple) and all(isinstance(entry, dict) for entry in value):
        return tuple(value)
    raise dacite.WrongTypeError(tuple[StageConfig, ...], value)


def _field_names() -> list[str]:
    parts = (RunConfig, ModelConfig, DataConfig, StageConfig, OptimizerConfig, ParallelConfig, TowerSize)
    return [f.name for part in parts for f in dataclasses.fields(part)]
