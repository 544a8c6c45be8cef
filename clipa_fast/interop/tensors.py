"""Files of named tensors, read one tensor at a time, so that a model never lies in memory twice."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from clipa_fast.errors import UserError
from clipa_fast.interop.torch_zip import read_torch_zip


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file; nothing is read before `read` is called."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """The values as stored."""


Tensors = Mapping[str, Tensor]


def open_tensors(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a file: .safetensors, torch's .bin/.pt/.pth, or .npz.

    Raises:
      UserError: no such file, another kind of file, a damaged one, or a pickle that asks for more than tensors.
    """
    if not path.is_file():
        raise UserError(f"weights: no such file: {path}")
    readers = {".safetensors": _safetensors, ".npz": _npz, **dict.fromkeys((".bin", ".pt", ".pth"), _torch)}
    reader = readers.get(path.suffix)
    if reader is None:
        raise UserError(f"weights: {path}: unknown kind of file; accepted: {', '.join(readers)}")
    try:
        return reader(path)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"weights: {path} is damaged or of another kind ({' '.join(str(error).split())})") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    # The library maps the file and copies out the one tensor asked for.
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return {
        name: Tensor(tuple(file.get_slice(name).get_shape()), lambda name=name: file.get_tensor(name))
        for name in file.keys()  # noqa: SIM118 - no iterable of its own
    }


def _torch(path: Path) -> dict[str, Tensor]:
    arrays = read_torch_zip(path)
    return {name: Tensor(array.shape, lambda array=array: array) for name, array in arrays.items()}


def _npz(path: Path) -> dict[str, Tensor]:
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("a single array")
    return {name: Tensor(shape, lambda name=name: _as_number(archive[name])) for name, shape in _npz_shapes(path)}


def _npz_shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each array, from the headers alone."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
            if dtype.hasobject:
                raise UserError(f"weights: {path}: {name} holds pickled objects, which are not read")
            yield name.removesuffix(".npy"), shape


def _as_number(array: np.ndarray) -> np.ndarray:
    # NumPy does not know bfloat16 and stores it as two bytes of no type.
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
