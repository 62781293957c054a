"""Reads the headers of safetensors files: which tensors lie where. Never reads a whole tensor, never needs torch.

Format: github.com/huggingface/safetensors (8 bytes of length, a JSON header, the tensors). All of it is untrusted.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec

from transload.errors import CheckpointError
from transload.model.json_file import read_json

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "mxfp4"}
"""Bytes are loaded as blocks and scales of MXFP4 only; see `expert_storage.check_types`."""


class StoredTensor(msgspec.Struct, frozen=True, kw_only=True):
    """Where a tensor lies in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file's header, checked against the file's size."""

    path: Path
    size_bytes: int
    header: bytes
    tensors: dict[str, StoredTensor]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those its index names, or the single one there is."""
    index = folder / INDEX
    if index.exists():
        return [folder / name for name in _shards(index)]
    if (single := folder / "model.safetensors").exists():
        return [single]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(f"{folder}: {len(found)} safetensors files but no {INDEX} that says which belong to it")
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    why = f" ({pickled[0]} is not loaded: pickled weights can run code)" if pickled else ""
    raise CheckpointError(f"{folder}: no *.safetensors file here{why}; name a folder with safetensors or a .gguf file")


def read_header(path: Path) -> SafetensorsFile:
    """Read and check one file's header. Raises `CheckpointError` if the file is damaged or not of this format."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: claims a header of {length} bytes in a file of {size}; it is truncated or damaged, "
                    "fetch it again"
                )
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        listed = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not JSON ({error}); it is damaged, fetch it again") from error
    if not isinstance(listed, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object; it is damaged, fetch it again")
    start = 8 + length
    tensors = {
        name: _tensor(path, name, entry, start, size) for name, entry in listed.items() if name != "__metadata__"
    }
    return SafetensorsFile(path=path, size_bytes=size, header=header, tensors=tensors)


def _shards(index: Path) -> list[str]:
    mapped = read_json(index).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise CheckpointError(f"{index}: has no weight_map; it is damaged, fetch it again")
    names = sorted({str(name) for name in mapped.values()})
    for name in names:
        if name in ("", ".", "..") or Path(name).name != name:
            raise CheckpointError(f"{index}: names the file {name!r}, which is not in its own folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: names {name}, which is not there; the download is incomplete")
    return names


def _tensor(path: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = isinstance(dtype, str) and all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path}: the header entry of tensor {name!r} is malformed; the file is damaged")
    if dtype not in ELEMENT_BYTES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has type {dtype}, which is not loaded; wanted one of {', '.join(ELEMENT_BYTES)}"
        )
    if end - begin != math.prod(shape) * ELEMENT_BYTES[dtype] or start + end > size:
        raise CheckpointError(
            f"{path}: tensor {name!r} ({dtype} {list(shape)}) should lie at bytes {start + begin} to {start + end} of "
            f"{size}, which does not fit; the file is truncated or damaged, fetch it again"
        )
    return StoredTensor(name=name, dtype=dtype, shape=shape, offset=start + begin, num_bytes=end - begin)
