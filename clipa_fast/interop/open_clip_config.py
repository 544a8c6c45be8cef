"""open_clip's model and preprocessing json to our ModelConfig, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from clipa_fast.config import ModelConfig, TowerSize
from clipa_fast.errors import UserError
from clipa_fast.model.architecture import CONVENTIONS, PIXEL_NORMS, Architecture, architecture
from clipa_fast.model.presets import PAPER_VOCAB_SIZE, TEXT, VISION, towers

# What open_clip takes where its json says nothing.
_VISION_DEFAULTS = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
    "patch_dropout": 0.0,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "pool_type": "tok",
    "act_kwargs": None,
    "norm_kwargs": None,
}
_TEXT_DEFAULTS = {
    "context_length": 77,
    "vocab_size": 49408,
    "hf_tokenizer_name": None,
    "tokenizer_mode": None,
    "tokenizer_kwargs": None,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
    "pad_id": 0,
    "no_causal_mask": False,
    "final_ln_after_pool": False,
    "pool_type": "argmax",
    "act_kwargs": None,
    "norm_kwargs": None,
}
# Fields that change nothing at these values and are refused at others, since they ask for parts the towers lack.
_ABSENT = {
    "ls_init_value": None,
    "attentional_pool": False,
    "attn_pooler_queries": 256,
    "attn_pooler_heads": 8,
    "output_tokens": False,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
    "timm_model_name": None,
    "timm_model_pretrained": False,
    "timm_pool": "avg",
    "timm_proj": "linear",
    "timm_proj_bias": False,
    "timm_drop": 0.0,
    "timm_drop_path": None,
    "embed_cls": False,
    "eos_id": 2,
    "proj_bias": False,
    "proj_type": "linear",
    "hf_model_name": None,
    "hf_model_pretrained": True,
    "hf_proj_type": "mlp",
    "hf_pooler_type": "mean_pooler",
}
_POOLS = {"last": "last", "argmax": "end"}
_FILTERS = {"bilinear": "bilinear", "bicubic": "bicubic"}
_RESIZES: dict[str, Literal["squash", "shorter_side"]] = {"squash": "squash", "shortest": "shorter_side"}


@dataclass(frozen=True)
class Described:
    """A model as a json describes it, without its weights."""

    config: ModelConfig
    image_size: int
    text_length: int


def from_open_clip(content: dict[str, Any], where: str) -> Described:
    """Reads the content of an open_clip_config.json, or of one of open_clip's own model configs.

    Raises:
      UserError: a field is missing, or asks for something that the towers here do not have.
    """
    model = content.get("model_cfg", content)
    if not isinstance(model, dict) or not all(
        isinstance(model.get(name), kind)
        for name, kind in (("embed_dim", int), ("vision_cfg", dict), ("text_cfg", dict))
    ):
        raise UserError(f"config: {where} has no embed_dim, vision_cfg and text_cfg, which open_clip's json has")
    for name in ("multimodal_cfg", "init_logit_bias"):
        if model.get(name) is not None:
            raise UserError(f"config: {where}: {name} is not supported: only CLIP with two towers is")
    vision = _with_defaults(model["vision_cfg"], _VISION_DEFAULTS, f"{where}: vision_cfg")
    text = _with_defaults(model["text_cfg"], _TEXT_DEFAULTS, f"{where}: text_cfg")
    _accept(where, "vision_cfg.pool_type", vision["pool_type"], ("avg", "tok"))
    _accept(where, "vision_cfg.patch_size", type(vision["patch_size"]), (int,))
    _accept(where, "vision_cfg.image_size", type(vision["image_size"]), (int,))
    _accept(where, "vision_cfg.layers", type(vision["layers"]), (int,))
    if vision["pool_type"] == "avg":
        _accept(where, "vision_cfg.final_ln_after_pool (with average pooling)", vision["final_ln_after_pool"], (True,))
    _accept(where, "text_cfg.pool_type", text["pool_type"], tuple(_POOLS))
    quick = bool(model.get("quick_gelu", False))
    activation, eps = (
        _same(where, name, *(read(part) for part in (vision, text)))
        for name, read in (("act_kwargs", lambda part: _activation(part, quick, where)), ("norm_kwargs", _norm_eps))
    )
    preprocess = content.get("preprocess_cfg") or {}
    about = Architecture(
        activation=activation,
        norm_eps=eps,
        image_positions="stored",
        pre_norm=not vision["no_ln_pre"],
        image_pool="gap" if vision["pool_type"] == "avg" else "tok",
        causal_text=not text["no_causal_mask"],
        text_pool=_POOLS[text["pool_type"]],
        pixel_norm=_pixel_norm(preprocess, where),
        resize=_choice(where, "preprocess_cfg.resize_mode", preprocess.get("resize_mode", "shortest"), _RESIZES),
        resize_filter=_choice(
            where, "preprocess_cfg.interpolation", preprocess.get("interpolation", "bicubic"), _FILTERS
        ),
        text_rule=(content.get("clipa_fast") or {}).get("text_rule", "open_clip"),
    )
    _accept(where, "clipa_fast.text_rule", about.text_rule, ("clipa", "open_clip"))
    sizes = (
        _tower(vision, vision["width"] // vision["head_width"], f"{where}: vision_cfg"),
        _tower(text, text["heads"], f"{where}: text_cfg"),
    )
    config = shortest_config(about, *sizes, model["embed_dim"], vision["patch_size"], text["vocab_size"])
    return Described(config, vision["image_size"], text["context_length"])


def to_open_clip(described: Described, tokenizer_name: str | None, strip_sep: bool = True) -> dict[str, Any]:
    """The content of an open_clip_config.json that makes open_clip build this very model.

    Args:
      described: the model.
      tokenizer_name: what open_clip's HFTokenizer is to load; None: CLIP's own byte-pair encoding.
      strip_sep: whether that tokenizer's [SEP] gives way to padding.
    """
    sizes, about = towers(described.config), architecture(described.config)
    kwargs: dict[str, Any] = {}
    if about.activation == "gelu_tanh":
        kwargs["act_kwargs"] = {"approximate": "tanh"}
    if about.norm_eps != 1e-5:
        kwargs["norm_kwargs"] = {"eps": about.norm_eps}
    vision = {
        "image_size": described.image_size,
        "layers": sizes.vision.depth,
        "width": sizes.vision.width,
        "head_width": sizes.vision.width // sizes.vision.num_heads,
        "mlp_ratio": _mlp_ratio(sizes.vision),
        "patch_size": sizes.patch_size,
        "no_ln_pre": not about.pre_norm,
        "pool_type": "avg" if about.image_pool == "gap" else "tok",
        "final_ln_after_pool": about.image_pool == "gap",
        **kwargs,
    }
    text = {
        "context_length": described.text_length,
        "vocab_size": described.config.vocab_size or PAPER_VOCAB_SIZE,
        "width": sizes.text.width,
        "heads": sizes.text.num_heads,
        "layers": sizes.text.depth,
        "mlp_ratio": _mlp_ratio(sizes.text),
        "pool_type": {ours: theirs for theirs, ours in _POOLS.items()}[about.text_pool],
        "no_causal_mask": not about.causal_text,
        **kwargs,
    }
    if tokenizer_name is not None:
        text |= {"hf_tokenizer_name": tokenizer_name}
        text |= {"tokenizer_kwargs": {"strip_sep_token": True}} if strip_sep else {}
    model = {"embed_dim": sizes.embed_dim, "vision_cfg": vision, "text_cfg": text}
    if about.activation == "quick_gelu":
        model["quick_gelu"] = True
    mean, std = PIXEL_NORMS[about.pixel_norm]
    preprocess = {
        "size": described.image_size,
        "mean": list(mean),
        "std": list(std),
        "interpolation": about.resize_filter,
        "resize_mode": {ours: theirs for theirs, ours in _RESIZES.items()}[about.resize],
    }
    return {"model_cfg": model, "preprocess_cfg": preprocess, "clipa_fast": {"text_rule": about.text_rule}}


def shortest_config(
    about: Architecture, vision: TowerSize, text: TowerSize, embed_dim: int, patch_size: int, vocab_size: int
) -> ModelConfig:
    """The shortest ModelConfig that says this: the nearest convention and, where one fits, a preset."""
    fields = [field.name for field in dataclasses.fields(Architecture)]

    def overrides(convention: str) -> dict[str, Any]:
        base = CONVENTIONS[convention]
        return {name: getattr(about, name) for name in fields if getattr(about, name) != getattr(base, name)}

    convention: Any = min(CONVENTIONS, key=lambda name: len(overrides(name)))
    letter = next((name for name in VISION if VISION[name] == vision), "B")
    fits = VISION[letter] == vision
    return ModelConfig(
        preset=f"{letter}/{patch_size}",
        convention=convention,
        vocab_size=vocab_size,
        vision=None if fits else vision,
        text=None if TEXT[letter] == text else text,
        embed_dim=None if TEXT[letter].width == embed_dim else embed_dim,
        **overrides(convention),
    )


def _with_defaults(part: dict[str, Any], defaults: dict[str, Any], where: str) -> dict[str, Any]:
    for name, value in part.items():
        if name in defaults:
            continue
        if name not in _ABSENT:
            raise UserError(f"config: {where}.{name}: unknown field")
        # The end token's id matters to one kind of pooling alone, which is refused.
        if value != _ABSENT[name] and name != "eos_id":
            raise UserError(f"config: {where}.{name}: {value!r} is not supported; accepted: {_ABSENT[name]!r}")
    return {**defaults, **part}


def _activation(part: dict[str, Any], quick: bool, where: str) -> str:
    kwargs = part["act_kwargs"] or {}
    if quick:
        _accept(where, "act_kwargs (with quick_gelu)", kwargs, ({},))
        return "quick_gelu"
    _accept(where, "act_kwargs", kwargs, ({}, {"approximate": "tanh"}, {"approximate": "none"}))
    return "gelu_tanh" if kwargs.get("approximate") == "tanh" else "gelu"


def _norm_eps(part: dict[str, Any]) -> float:
    return float((part["norm_kwargs"] or {}).get("eps", 1e-5))


def _same(where: str, name: str, vision: Any, text: Any) -> Any:
    if vision != text:
        raise UserError(f"config: {where}: {name} differ between the towers ({vision}, {text}); accepted: equal ones")
    return vision


def _pixel_norm(preprocess: dict[str, Any], where: str) -> str:
    given = tuple(
        tuple(preprocess.get(name) or default)
        for name, default in zip(("mean", "std"), PIXEL_NORMS["openai"], strict=True)
    )
    for name, values in PIXEL_NORMS.items():
        if all(abs(a - b) < 1e-6 for ours, theirs in zip(values, given, strict=True) for a, b in zip(ours, theirs)):  # noqa: B905
            return name
    raise UserError(f"config: {where}: mean and std {given} are none of {', '.join(PIXEL_NORMS)}")


def _choice(where: str, name: str, value: Any, choices: Mapping[str, Any]) -> Any:
    _accept(where, name, value, tuple(choices))
    return choices[value]


def _accept(where: str, name: str, value: Any, accepted: tuple) -> None:
    if value not in accepted:
        told = ", ".join(getattr(entry, "__name__", repr(entry)) for entry in accepted)
        raise UserError(f"config: {where}: {name}: {value!r} is not supported; accepted: {told}")


def _tower(part: dict[str, Any], heads: int, where: str) -> TowerSize:
    size = TowerSize(part["width"], part["layers"], int(part["width"] * part["mlp_ratio"]), heads)
    if min(dataclasses.astuple(size)) < 1:
        raise UserError(f"config: {where}: sizes must be positive, got {size}")
    return size


def _mlp_ratio(size: TowerSize) -> float:
    ratio = size.mlp_dim / size.width
    for digits in (1, 4, 9):
        # open_clip cuts width * ratio off to a whole number.
        rounded = round(ratio, digits)
        for candidate in (rounded, rounded + 10**-digits):
            if int(size.width * candidate) == size.mlp_dim:
                return candidate
    raise AssertionError(f"no ratio for {size}")
