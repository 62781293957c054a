"""Loads a located model's weights as torch tensors: canonical Hugging Face names, shapes and row order.

Must never guess: what the headers promised is checked again as it is read. Tensors of safetensors files that need no
conversion are views of the mapped file, so that the workers of a machine share their memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import safetensors
import torch

from transload.arch import ModelArch
from transload.errors import CheckpointError
from transload.model.expert_storage import loaded_name
from transload.model.expert_tensors import ExpertUnpacker
from transload.model.gguf_arch import renamed
from transload.model.gguf_file import GgufFile, GgufTensor
from transload.model.grouped import BLOCK_BYTES, GROUP_INPUTS
from transload.model.inventory import Shape, expected_shapes, is_ignored
from transload.model.native.packed import read_stored
from transload.model.source import ModelFiles

INIT_STD = 0.02
"""Standard deviation of random weights; the `initializer_range` of every family here."""


Wanted = Callable[[str], bool]
"""Whether a worker needs the tensor of this name."""


def load_tensors(
    files: ModelFiles, dtype: torch.dtype, wanted: Wanted | None = None, *, keep_groups: bool = False
) -> dict[str, torch.Tensor]:
    """The wanted weights of a model (None: all) in `dtype`, on the CPU. Tied embeddings have no `lm_head.weight`.

    `keep_groups`: matrices that a GGUF file stores in groups that our kernels read stay as they are stored, uint8
    [rows, bytes of a row]; see `grouped.grouped`.

    Do not write to the tensors: some are views of a mapped file. Raises `CheckpointError` if a file is not what it was
    when it was located.
    """
    needed = {name: shape for name, shape in expected_shapes(files.arch).items() if wanted is None or wanted(name)}
    match files.kind:
        case "dummy":
            tensors = _random(needed, dtype)
        case "safetensors":
            tensors = _from_safetensors(files, dtype, needed)
        case "gguf":
            tensors = _from_gguf(files, dtype, needed, keep_groups=keep_groups)
    for name, shape in needed.items():
        if name not in tensors or not _is_shaped(tensors[name], shape):
            got = list(tensors[name].shape) if name in tensors else "nothing"
            raise CheckpointError(
                f"{files.name}: tensor {name!r} is {got}, wanted {list(shape)}: the files changed after they were "
                "located; start again"
            )
    return tensors


def _from_safetensors(files: ModelFiles, dtype: torch.dtype, needed: Mapping[str, Shape]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    unpacker = ExpertUnpacker(files.expert_form, dtype, needed.__contains__)
    for path in files.paths:
        try:
            with safetensors.safe_open(path, framework="pt", device="cpu") as opened:
                for stored in opened.keys():  # noqa: SIM118 (not a mapping)
                    if not is_ignored(name := loaded_name(stored, files.arch), files.arch):
                        tensors.update(unpacker.unpack(name, opened.get_tensor(stored)))
        except (safetensors.SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); it is damaged, fetch it again") from error
    return tensors


def _is_shaped(tensor: torch.Tensor, shape: Shape) -> bool:
    if tensor.dtype == torch.uint8:
        return len(shape) == 2 and len(tensor) == shape[0]
    return tuple(tensor.shape) == shape


def _from_gguf(
    files: ModelFiles, dtype: torch.dtype, needed: Mapping[str, Shape], *, keep_groups: bool
) -> dict[str, torch.Tensor]:
    (path,) = files.paths
    file = GgufFile(path)
    tensors: dict[str, torch.Tensor] = {}
    for name, stored in renamed(file).items():
        if name in needed:
            kept = keep_groups and stored.kind in BLOCK_BYTES and len(needed[name]) == 2
            loaded = _as_stored(file, stored) if kept else _dequantised(file, stored, dtype)
            tensors[name] = _rows_in_halves(loaded, name, files.arch)
    return tensors


def _as_stored(file: GgufFile, stored: GgufTensor) -> torch.Tensor:
    """The bytes of a matrix, a row of blocks for each of its rows."""
    num_rows, num_inputs = stored.shape
    if num_inputs % GROUP_INPUTS:
        raise CheckpointError(f"{file.path}: {stored.name!r} has rows of {num_inputs} numbers, not whole blocks")
    return torch.from_numpy(file.array(stored).copy()).view(num_rows, -1)


def _dequantised(file: GgufFile, stored: GgufTensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor's elements in `dtype`, by way of float32 in pieces, so that little memory is used on the way."""
    loaded = torch.empty(stored.shape, dtype=dtype)
    if stored.kind == "F32":
        return loaded.copy_(torch.from_numpy(file.array(stored).copy()).view(torch.float32).view(stored.shape))
    if read_stored(file.array(stored), stored.kind, loaded):
        return loaded
    from transload.model.gguf_quants import dequantised  # brings the gguf package

    flat = loaded.view(-1)
    position = 0
    for piece in dequantised(file.array(stored), stored.kind):
        # An unquantised piece is a view of the read-only file, which torch will not wrap: hence the copy.
        part = torch.from_numpy(piece if piece.flags.writeable else piece.copy())
        flat[position : position + part.numel()].copy_(part)
        position += part.numel()
    return loaded


def _rows_in_halves(tensor: torch.Tensor, name: str, arch: ModelArch) -> torch.Tensor:
    """Undo llama.cpp's reordering of query and key rows in llama models.

    Its rotary embedding turns neighbours (0, 1), (2, 3), ...; Hugging Face's turns halves (0, d/2), (1, d/2 + 1), ...
    The converter therefore interleaves the two halves of each head (LlamaModel.permute in convert_hf_to_gguf.py).
    """
    if arch.family != "llama":
        return tensor
    module = name.rsplit(".", 2)[-2]
    heads = {"q_proj": arch.num_heads, "k_proj": arch.num_kv_heads}.get(module)
    if heads is None:
        return tensor
    halves = tensor.view(heads, arch.head_dim // 2, 2, *tensor.shape[1:]).transpose(1, 2)
    return halves.reshape(tensor.shape)


def _random(needed: Mapping[str, Shape], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Seeded weights as a fresh model has them: normal matrices, norms of one, biases of zero. Equal in every process.

    Each tensor has its own seed, made from its name, so that a part of the model can be made alone.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in needed.items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(shape, dtype=dtype)
        elif name.endswith(".bias"):
            tensors[name] = torch.zeros(shape, dtype=dtype)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            tensors[name] = torch.empty(shape, dtype=dtype).normal_(0.0, INIT_STD, generator=generator)
    return tensors
