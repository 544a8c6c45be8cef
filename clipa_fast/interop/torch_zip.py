"""torch.save's files without torch, and without executing anything they say.

Such a file is a zip: data.pkl, a pickle of the structure, and data/KEY, the bytes of each storage. The pickle is read
by an unpickler that knows tensors and dictionaries; whatever else it names is refused before it is looked up.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from clipa_fast.errors import UserError

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# What a local header of a zip holds before the name: 26 bytes, then the lengths of name and extra field.
_LOCAL_HEADER = struct.Struct("<26xHH")


def read_torch_zip(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a state dict, or of the one under "state_dict"; other entries beside them are left out.

    Arrays are views of the mapped file: their bytes are read when used.

    Raises:
      UserError: not a zip that torch wrote, or a pickle that names anything but tensors.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"weights: {path} is not in torch's zip format (older than torch 1.6, or no torch file), which alone is"
            " read; convert it with torch.save, or use safetensors"
        )
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(names) != 1:
            raise UserError(f"weights: {path} is no file of torch.save: it holds {len(names)} data.pkl")
        root = names[0].removesuffix("data.pkl")
        if any(name.startswith(f"{root}code/") for name in archive.namelist()):
            raise UserError(f"weights: {path} is a TorchScript program, not weights; save its state_dict")
        byteorder = f"{root}byteorder"
        if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
            raise UserError(f"weights: {path}: big-endian tensors are not read")
        storages = {
            info.filename.removeprefix(f"{root}data/"): (_data_offset(path, info), info.file_size)
            for info in archive.infolist()
            if info.filename.startswith(f"{root}data/") and info.compress_type == zipfile.ZIP_STORED
        }
        try:
            content = _TensorUnpickler(archive.read(names[0]), path, storages).load()
        except UserError:
            raise
        except Exception as error:  # A broken pickle can raise any of a dozen kinds.
            raise UserError(
                f"weights: {path}: its pickle is damaged or asks for more than tensors ({error})"
            ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    entries = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in entries if isinstance(value, np.ndarray)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise UserError(f"weights: {path} holds no state dict")
    return tensors


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    # The central directory's extra field differs from the local one, so the local header has the say.
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return info.header_offset + _LOCAL_HEADER.size + name_length + extra_length


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, content: bytes, path: Path, storages: dict[str, tuple[int, int]]):
        super().__init__(io.BytesIO(content))
        self._path, self._storages = path, storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        # A pickle may set attributes of what it is handed, so it gets functions and texts of its own.
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: _rebuild_tensor(*arguments)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module == "torch" and name in _DTYPES:
            return name
        raise UserError(f"weights: {self._path}: its pickle names {module}.{name}, and only tensors are accepted")

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, name, key, _, count = pid
        if kind != "storage" or key not in self._storages:
            raise pickle.UnpicklingError(f"no such storage: {key}")
        offset, size = self._storages[key]
        dtype = np.dtype(_DTYPES[name])
        if count * dtype.itemsize > size:
            raise pickle.UnpicklingError(f"storage {key} ends early")
        if not count:
            return np.zeros(0, dtype)
        return np.memmap(self._path, dtype, "r", offset, (count,))


def _rebuild_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    if len(size) != len(stride) or offset < 0 or any(n < 0 for n in (*size, *stride)):
        raise pickle.UnpicklingError("a tensor of impossible shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= len(storage):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    if 0 in size:
        return np.zeros(size, storage.dtype)
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)
