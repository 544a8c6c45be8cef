"""Which tensor of a foreign file holds which of our parameters: open_clip's state dict and CLIPA's npz.

Both describe themselves as one table, from the last names of our parameter's path to their name and the way they lay
the numbers out; reading and writing follow from it. In open_clip's names `{i}` is the layer, as ours are stacked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from clipa_fast.config import ModelConfig
from clipa_fast.errors import UserError
from clipa_fast.interop.tensors import Tensor, Tensors
from clipa_fast.training.step import Params, init_params

Path = tuple[str, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How another library stores one of our parameters (one layer of it).

    Attributes:
      shape: our shape to theirs.
      to_ours: their array and our shape to our array.
      to_theirs: our array to theirs.
    """

    shape: Callable[[Shape], Shape]
    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


AS_IS = Layout(lambda shape: shape, lambda array, shape: array, lambda array: array)
TRANSPOSED = Layout(lambda shape: shape[::-1], lambda array, shape: array.T, lambda array: array.T)
# torch's convolutions are [out, in, height, width].
CONVOLUTION = Layout(
    lambda shape: (shape[3], shape[2], *shape[:2]),
    lambda array, shape: array.transpose(2, 3, 1, 0),
    lambda array: array.transpose(3, 2, 0, 1),
)


def _reshaped(shape: Callable[[Shape], Shape]) -> Layout:
    return Layout(shape, lambda array, ours: array.reshape(ours), lambda array: array.reshape(shape(array.shape)))


@dataclass(frozen=True)
class Place:
    """Where one of our parameters lies: tensor, layout, and which third of a tensor that holds query, key and value."""

    name: str
    layout: Layout = AS_IS
    third: int | None = None


Places = dict[Path, Place]
"""By our path; of a stacked parameter the name holds `{i}`."""


def open_clip_places(params: Any, text_prefix: str = "") -> Places:
    """Where open_clip's CLIP keeps the parameters; `text_prefix` is "text." in its CustomTextCLIP."""
    towers = {"vision": _OPEN_CLIP_VISION, "text": _OPEN_CLIP_TEXT}
    places = {}
    for path in paths(params):
        tower, *rest = path
        if tower == "log_logit_scale":
            places[path] = Place("logit_scale")
        elif "blocks" in rest:
            place = _OPEN_CLIP_BLOCK[tuple(rest[rest.index("blocks") + 1 :])]
            prefix = "visual." if tower == "vision" else text_prefix
            name = f"{prefix}transformer.resblocks.{{i}}.{place.name}"
            places[path] = Place(name, place.layout, place.third)
        else:
            place = towers[tower][tuple(rest)]
            places[path] = Place((text_prefix if tower == "text" else "") + place.name, place.layout)
    return places


def clipa_places(params: Any, vision_heads: int, text_heads: int) -> Places:
    """Where CLIPA's npz keeps the parameters; our shapes are wanted flat, theirs have heads."""
    places = {}
    for path in paths(params):
        tower, *rest = path
        prefix, heads = ("img", vision_heads) if tower == "vision" else ("txt", text_heads)
        if tower == "log_logit_scale":
            places[path] = Place("t", _reshaped(lambda shape: (1,)))
        elif "blocks" in rest:
            name, layout = _clipa_block(tuple(rest[rest.index("blocks") + 1 :]), heads)
            places[path] = Place(f"{prefix}/Transformer/encoderblock_{{i}}/{name}", layout)
        else:
            name, layout = _CLIPA[tuple(rest)]
            places[path] = Place(f"{prefix}/{name}", layout)
    return places


def expected_tensors(params: Any, places: Places) -> dict[str, Shape]:
    """Names and shapes of the tensors that hold `params` (arrays, or their shapes)."""
    expected = {}
    for path, leaf in paths(params).items():
        place, shape = places[path], leaf.shape
        for layer in range(shape[0]) if "{i}" in place.name else (None,):
            theirs = place.layout.shape(shape if layer is None else shape[1:])
            if place.third is not None:
                theirs = (3 * theirs[0], *theirs[1:])
            expected[place.name if layer is None else place.name.format(i=layer)] = theirs
    return expected


Put = Callable[[np.ndarray], Any]
"""What becomes of each parameter as soon as it is read, such as moving it to a device."""


def read_parameters(tensors: Tensors, shapes: Any, places: Places, where: str, put: Put = np.asarray) -> Params:
    """Our parameters, float32, out of a file's tensors; one layer is read at a time.

    Args:
      tensors: the file's.
      shapes: our tree of shapes.
      places: where each lies.
      where: the file, for messages.
      put: see `Put`.

    Raises:
      UserError: tensors are missing, unknown or of another shape; all of them are named.
    """
    check_tensors(tensors, expected_tensors(shapes, places), where)

    def read(path: Path, shape: Shape) -> np.ndarray:
        place = places[path]
        if "{i}" not in place.name:
            return _ours(tensors[place.name], place, shape)
        out = np.empty(shape, np.float32)
        for layer in range(shape[0]):
            out[layer] = _ours(tensors[place.name.format(i=layer)], place, shape[1:])
        return out

    return tree({path: put(read(path, leaf.shape)) for path, leaf in paths(shapes).items()})


def write_tensors(params: Params, places: Places) -> dict[str, Tensor]:
    """The tensors that hold `params`, each made when read."""
    ours, parts = paths(params), {}
    for path, place in places.items():
        for layer in range(ours[path].shape[0]) if "{i}" in place.name else (None,):
            name = place.name if layer is None else place.name.format(i=layer)
            parts.setdefault(name, []).append((place, path, layer))

    def read(own: list) -> np.ndarray:
        arrays = []
        for place, path, layer in sorted(own, key=lambda part: part[0].third or 0):
            value = ours[path] if layer is None else ours[path][layer]
            arrays.append(place.layout.to_theirs(np.asarray(value, np.float32)))
        return np.asarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays), order="C")

    expected = expected_tensors(params, places)
    return {name: Tensor(expected[name], functools.partial(read, own)) for name, own in parts.items()}


def check_tensors(tensors: Tensors, expected: Mapping[str, Shape], where: str) -> None:
    """Raises UserError unless the names and shapes are those expected; the message lists what differs."""
    found = {name: tensor.shape for name, tensor in tensors.items()}
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    misshapen = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != tuple(shape)
    ]
    problems = [("missing", missing), ("unknown", unknown), ("of another shape", misshapen)]
    told = "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems if names)
    if told:
        raise UserError(f"weights: {where} does not fit the model: {told}")


def model_shapes(config: ModelConfig, image_size: int, text_length: int) -> Any:
    """Our tree of parameter shapes; nothing is computed or allocated."""
    return jax.eval_shape(lambda: init_params(config, image_size, text_length, 0))


def paths(params: Any) -> dict[Path, Any]:
    """The leaves of nested dicts by their path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(entry.key for entry in path): leaf for path, leaf in leaves}


def tree(leaves: Mapping[Path, Any]) -> Params:
    """Nested dicts of leaves by their path."""
    out: Params = {}
    for path, leaf in leaves.items():
        node = out
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return out


def _ours(tensor: Tensor, place: Place, shape: Shape) -> np.ndarray:
    array = tensor.read()
    if place.third is not None:
        size = array.shape[0] // 3
        array = array[place.third * size : (place.third + 1) * size]
    return np.asarray(place.layout.to_ours(array, shape), np.float32, order="C")


def _torch_norm(ours: str, theirs: str) -> Places:
    return {(ours, "scale"): Place(f"{theirs}.weight"), (ours, "bias"): Place(f"{theirs}.bias")}


def _torch_dense(ours: Path, theirs: str) -> Places:
    return {(*ours, "kernel"): Place(f"{theirs}.weight", TRANSPOSED), (*ours, "bias"): Place(f"{theirs}.bias")}


_OPEN_CLIP_VISION: Places = {
    ("class_token",): Place("visual.class_embedding"),
    ("position_table",): Place("visual.positional_embedding"),
    ("patch_kernel",): Place("visual.conv1.weight", CONVOLUTION),
    ("head", "kernel"): Place("visual.proj"),
    **_torch_norm("norm_pre", "visual.ln_pre"),
    **_torch_norm("norm", "visual.ln_post"),
}
_OPEN_CLIP_TEXT: Places = {
    ("token_table",): Place("token_embedding.weight"),
    ("position_table",): Place("positional_embedding"),
    ("head", "kernel"): Place("text_projection"),
    **_torch_norm("norm", "ln_final"),
}
_OPEN_CLIP_BLOCK: Places = {
    **_torch_norm("norm1", "ln_1"),
    **_torch_norm("norm2", "ln_2"),
    **{
        ("attention", name, kind): Place(f"attn.in_proj_{theirs}", layout, third)
        for third, name in enumerate(("query", "key", "value"))
        for kind, theirs, layout in (("kernel", "weight", TRANSPOSED), ("bias", "bias", AS_IS))
    },
    **_torch_dense(("attention", "out"), "attn.out_proj"),
    **_torch_dense(("mlp", "fc"), "mlp.c_fc"),
    **_torch_dense(("mlp", "proj"), "mlp.c_proj"),
}
_WITH_LEADING_ONE = _reshaped(lambda shape: (1, *shape))
_CLIPA: dict[Path, tuple[str, Layout]] = {
    ("class_token",): ("cls", _reshaped(lambda shape: (1, 1, *shape))),
    ("patch_kernel",): ("embedding/kernel", AS_IS),
    ("token_table",): ("Embed_0/embedding", AS_IS),
    ("position_table",): ("pos_embedding", _WITH_LEADING_ONE),
    ("norm", "scale"): ("encoder_norm/scale", AS_IS),
    ("norm", "bias"): ("encoder_norm/bias", AS_IS),
    ("head", "kernel"): ("head/kernel", AS_IS),
}


def _clipa_block(path: Path, heads: int) -> tuple[str, Layout]:
    part, *rest = path
    if part in ("norm1", "norm2"):
        return f"LayerNorm_{int(part[-1]) - 1}/{rest[0]}", AS_IS
    if part == "mlp":
        return f"MlpBlock_0/{'Dense_0' if rest[0] == 'fc' else 'Dense_1'}/{rest[1]}", AS_IS
    name, kind = rest
    if name == "out":
        shaped = _reshaped(lambda shape: (heads, shape[0] // heads, shape[1])) if kind == "kernel" else AS_IS
    else:
        shaped = _reshaped(lambda shape: (*shape[:-1], heads, shape[-1] // heads))
    return f"MultiHeadDotProductAttention_0/{name}/{kind}", shaped
