"""Finds a model's files and says what they hold: architecture, identity, size. Reads headers only, never torch.

Front end and workers each call `locate` with the same spec; equal files give an equal `identity` on every machine.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec
from rich.progress import Progress

from transload.arch import ModelArch, Rope
from transload.deploy.spec import DEFAULT_MODEL, ModelSpec
from transload.errors import CheckpointError
from transload.model import embedded, hub
from transload.model.expert_storage import Form, check_types, form_of, loaded_name, stored_shapes
from transload.model.gguf_arch import read_gguf_arch, renamed
from transload.model.gguf_file import GgufFile
from transload.model.hf_config import read_arch
from transload.model.inventory import check_inventory, is_ignored
from transload.model.json_file import read_json
from transload.model.safetensors_file import DTYPE_NAMES, SafetensorsFile, StoredTensor, read_header, weight_files

SAMPLE_BYTES = 1024
GGUF_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
DEFAULT_ARCH = ModelArch(
    name=DEFAULT_MODEL,
    family="llama",
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position=8192,
    norm_eps=1e-5,
    rope=Rope(theta=100_000.0),
    tied_embeddings=True,
)
"""The shape of the default model, so that random weights of it need no download."""


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """A model that was found, and checked as far as its headers tell."""

    kind: Literal["safetensors", "gguf", "dummy"]
    name: str
    """For people and for the API; two names may have one identity."""
    paths: tuple[Path, ...]
    """The weight files. Empty for random weights."""
    folder: Path | None
    """Where tokenizer.json and the like lie, if the model is a folder."""
    tokenizer_gguf: Path | None
    """The GGUF file whose metadata hold the tokenizer, if there is one."""
    arch: ModelArch
    identity: str
    """Digest that names the weights and how they are used: of headers, sizes and samples, never of the path."""
    weights_bytes: int
    """What the weights take as stored."""
    stored_dtype: str
    """The type most of the weights are stored in: float32, bfloat16, float16, mxfp4, or a GGUF type such as q4_1."""
    expert_form: Form = "each"
    """How the files hold the experts of a mixture."""


def locate(spec: ModelSpec, *, progress: Progress | None = None) -> ModelFiles:
    """Find the model that a spec names, fetching it if it has to be.

    In this order `spec.path` is: the default model's name, a .gguf file, a folder, a hub id. Raises `CheckpointError`
    if there is no such model, if its files are damaged, or if they hold something that is not implemented.
    """
    dummy = spec.load_format == "dummy"
    if spec.path == DEFAULT_MODEL:
        if dummy:
            return _dummy(DEFAULT_ARCH, folder=None, tokenizer_gguf=embedded.cached_path())
        return _from_gguf(embedded.fetch(progress=progress), name=DEFAULT_MODEL)
    path = Path(spec.path).expanduser()
    name = path.name or spec.path
    if not path.exists():
        if not hub.is_hub_id(spec.path):
            raise CheckpointError(
                f"model {spec.path!r}: no such file or folder here, and not a hub id (owner/name) either; "
                f"the default model is called {DEFAULT_MODEL!r}"
            )
        path = hub.fetch_from_hub(spec.path, spec.revision, weights=not dummy)
        name = spec.path
    if path.suffix == ".safetensors" and path.is_file():
        raise CheckpointError(f"{path}: one file of a model; name its folder, which has config.json too")
    if path.is_file():
        files = _from_gguf(path, name=name.removesuffix(".gguf"))
        return _dummy(files.arch, folder=None, tokenizer_gguf=path) if dummy else files
    return _from_folder(path.resolve(), name=name, dummy=dummy)


def _from_gguf(path: Path, *, name: str) -> ModelFiles:
    file = GgufFile(path)
    arch = read_gguf_arch(file, name=name)
    tensors = {found: tensor for found, tensor in renamed(file).items() if not is_ignored(found, arch)}
    check_inventory(arch, {found: tensor.shape for found, tensor in tensors.items()}, str(path))
    samples = (file.bytes_at(*_sample(tensor.offset, tensor.num_bytes)) for tensor in tensors.values())
    sizes = _sizes((tensor.kind.lower(), tensor.num_bytes) for tensor in tensors.values())
    return ModelFiles(
        kind="gguf",
        name=name,
        paths=(path,),
        folder=None,
        tokenizer_gguf=path,
        arch=arch,
        identity=_digest("gguf", arch, [(file.size_bytes, file.bytes_at(0, file.header_bytes), samples)]),
        weights_bytes=sizes.total(),
        stored_dtype=GGUF_DTYPES.get(commonest := sizes.most_common(1)[0][0], commonest),
    )


def _from_folder(folder: Path, *, name: str, dummy: bool) -> ModelFiles:
    config = folder / "config.json"
    if not config.exists():
        raise CheckpointError(f"{folder}: no config.json here; name a model folder, a .gguf file or a hub id")
    arch = read_arch(read_json(config), name=name, path=config)
    if dummy:
        return _dummy(arch, folder=folder, tokenizer_gguf=None)
    headers = [read_header(path) for path in weight_files(folder)]
    tensors: dict[str, StoredTensor] = {}
    for header in headers:
        for tensor in header.tensors.values():
            if (loaded := loaded_name(tensor.name, arch)) in tensors:
                raise CheckpointError(f"{header.path}: tensor {tensor.name!r} lies in another file of this model too")
            tensors[loaded] = tensor
    shapes = {loaded: tensor.shape for loaded, tensor in tensors.items()}
    form = form_of(arch, shapes)
    check_inventory(arch, shapes, str(folder), stored_shapes(arch, form))
    used = {loaded: tensor for loaded, tensor in tensors.items() if not is_ignored(loaded, arch)}
    check_types(arch, {loaded: tensor.dtype for loaded, tensor in used.items()}, str(folder))
    sizes = _sizes((tensor.dtype, tensor.num_bytes) for tensor in used.values())
    return ModelFiles(
        kind="safetensors",
        name=name,
        paths=tuple(header.path for header in headers),
        folder=folder,
        tokenizer_gguf=None,
        arch=arch,
        identity=_digest("safetensors", arch, [(h.size_bytes, h.header, _samples(h)) for h in headers]),
        weights_bytes=sizes.total(),
        stored_dtype=DTYPE_NAMES[sizes.most_common(1)[0][0]],
        expert_form=form,
    )


def _dummy(arch: ModelArch, *, folder: Path | None, tokenizer_gguf: Path | None) -> ModelFiles:
    return ModelFiles(
        kind="dummy",
        name=arch.name,
        paths=(),
        folder=folder,
        tokenizer_gguf=tokenizer_gguf,
        arch=arch,
        identity=_digest("dummy", arch, []),
        weights_bytes=4 * arch.num_parameters(),
        stored_dtype="float32",
    )


def _sizes(tensors: Iterable[tuple[str, int]]) -> Counter[str]:
    """Bytes by stored type."""
    sizes = Counter[str]()
    for kind, num_bytes in tensors:
        sizes[kind] += num_bytes
    return sizes


def _digest(kind: str, arch: ModelArch, files: Iterable[tuple[int, bytes, Iterable[bytes]]]) -> str:
    """Name weights by architecture, file sizes, headers and a sample of each tensor.

    Headers alone would not do: two fine-tunes of one model have the same. Reading everything would, but takes minutes
    for a large model, at each start of each worker.
    """
    digest = hashlib.blake2b(f"transload-weights-1 {kind}".encode(), digest_size=16)
    digest.update(msgspec.json.encode(msgspec.structs.replace(arch, name="")))
    for size_bytes, header, samples in files:
        digest.update(f"|{size_bytes}|{len(header)}|".encode())
        digest.update(header)
        for sample in samples:
            digest.update(sample)
    return digest.hexdigest()


def _sample(offset: int, num_bytes: int) -> tuple[int, int]:
    """Offset and length of the middle of a tensor."""
    length = min(SAMPLE_BYTES, num_bytes)
    return offset + (num_bytes - length) // 2, length


def _samples(header: SafetensorsFile) -> Iterable[bytes]:
    with header.path.open("rb") as file:
        for tensor in header.tensors.values():
            offset, length = _sample(tensor.offset, tensor.num_bytes)
            file.seek(offset)
            yield file.read(length)
