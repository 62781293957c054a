"""Reads a GGUF file: its metadata, and where each tensor lies. Maps the file; never copies or converts a tensor.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. Everything in the file is untrusted: each length is compared
with the bytes that are left before anything is read or allocated. (The `gguf` package's reader takes 2 s for a
vocabulary of 49,000 and trusts the lengths.)
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from transload.errors import CheckpointError

GgufValue = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16
DEFAULT_ALIGNMENT = 32
SUPPORTED_VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LENGTH = struct.Struct("<Q")
ARRAY_TYPES = {code: np.dtype(f"<{letter}") for code, letter in SCALARS.items()}

BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
"""Tensor types that are loaded: number -> (name, elements in a block, bytes in a block)."""
SUPPORTED_TYPES = ", ".join(sorted(name for name, _, _ in BLOCKS.values()))


class StoredStrings(NamedTuple):
    """A list of strings that lies in the file, read when it is asked for: vocabularies are long, and few want them."""

    position: int
    num_strings: int


class GgufTensor(msgspec.Struct, frozen=True, kw_only=True):
    """Where a tensor lies. `shape` has the outermost dimension first, as in torch (the file has it last)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class GgufFile:
    """A mapped GGUF file. Raises `CheckpointError` if the file is damaged or of a kind that is not loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _map_file(path)
        self._reader = reader = _Reader(path, self._map)
        num_tensors, num_entries = reader.preamble()
        self.metadata: dict[str, GgufValue | StoredStrings] = {}
        for _ in range(num_entries):
            key, value = reader.entry()
            if key in self.metadata:
                raise CheckpointError(f"{path}: metadata key {key!r} comes twice; the file is damaged")
            self.metadata[key] = value
        if (num_parts := self.integer("split.count", 1)) > 1:
            raise CheckpointError(
                f"{path}: one of {num_parts} parts of a split GGUF; join them with `llama-gguf-split --merge`"
            )
        listed = [reader.tensor() for _ in range(num_tensors)]
        start = _aligned(reader.position, self._alignment())
        self.header_bytes = start
        self.tensors: dict[str, GgufTensor] = {}
        for tensor in listed:
            self._place(tensor, start)

    @property
    def architecture(self) -> str:
        return self.text("general.architecture", "")

    @property
    def size_bytes(self) -> int:
        return len(self._map)

    def bytes_at(self, offset: int, num_bytes: int) -> bytes:
        return self._map[offset : offset + num_bytes]

    def array(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """The stored bytes of a tensor: a read-only view of the mapped file, flat."""
        return np.frombuffer(self._map, dtype=np.uint8, count=tensor.num_bytes, offset=tensor.offset)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of the metadata; without a default the key must be there."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._mistyped(key, value, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._mistyped(key, value, "a finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._mistyped(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._mistyped(key, value, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._value(key, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._mistyped(key, value, "a list of strings")
        return [item for item in value if isinstance(item, str)]

    def numbers(self, key: str) -> list[float]:
        value = self._value(key, None)
        if not isinstance(value, list) or any(isinstance(item, str) for item in value):
            raise self._mistyped(key, value, "a list of numbers")
        return [float(item) for item in value]

    def _value(self, key: str, default: GgufValue | None) -> GgufValue:
        value = self.metadata.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: metadata key {key!r} is missing; convert the model to GGUF anew")
        return self._reader.strings(value) if isinstance(value, StoredStrings) else value

    def _mistyped(self, key: str, value: GgufValue, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: metadata key {key!r} is {str(value)[:80]!r}, wanted {wanted}")

    def _alignment(self) -> int:
        alignment = self.integer("general.alignment", DEFAULT_ALIGNMENT)
        if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path}: alignment {alignment} is not a power of two up to {MAX_ALIGNMENT}")
        return alignment

    def _place(self, listed: tuple[str, tuple[int, ...], int, int], start: int) -> None:
        """Check a tensor's entry against the file and keep it."""
        name, shape, code, relative = listed
        if name in self.tensors:
            raise CheckpointError(f"{self.path}: tensor {name!r} is listed twice; the file is damaged")
        if code not in BLOCKS:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has type {_type_name(code)}, which is not loaded; "
                f"take a file with these only: {SUPPORTED_TYPES}"
            )
        kind, block_elements, block_bytes = BLOCKS[code]
        if shape[-1] % block_elements:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has rows of {shape[-1]} elements, wanted a multiple of "
                f"{block_elements} for {kind}; the file is damaged"
            )
        num_bytes = math.prod(shape) // block_elements * block_bytes
        offset = start + relative
        if offset + num_bytes > self.size_bytes:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} should end at byte {offset + num_bytes}, but the file has "
                f"{self.size_bytes} bytes; it is truncated or damaged, fetch it again"
            )
        self.tensors[name] = GgufTensor(name=name, kind=kind, shape=shape, offset=offset, num_bytes=num_bytes)


class _Reader:
    """Walks the header. Knows the format's syntax only."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self.position = 0
        self._map = mapped
        self._size = len(mapped)

    def preamble(self) -> tuple[int, int]:
        """Check magic and version; returns the numbers of tensors and of metadata entries."""
        if self._take(4) != b"GGUF":
            raise CheckpointError(f"{self.path}: does not start with 'GGUF'; not a GGUF file")
        version = self._scalar("I")
        if version not in SUPPORTED_VERSIONS:
            raise CheckpointError(
                f"{self.path}: GGUF version {version}, wanted one of {SUPPORTED_VERSIONS} in little-endian order"
            )
        num_tensors, num_entries = int(self._scalar("Q")), int(self._scalar("Q"))
        # The shortest entry has a key of 1 byte and a value of 1, the shortest tensor a name of 1 and one dimension.
        self._room(num_entries, 14, "metadata entries")
        self._room(num_tensors, 33, "tensors")
        return num_tensors, num_entries

    def entry(self) -> tuple[str, GgufValue | StoredStrings]:
        key = self._string()
        code = int(self._scalar("I"))
        if code == STRING:
            return key, self._string()
        if code == ARRAY:
            return key, self._array(key)
        if code not in SCALARS:
            raise CheckpointError(f"{self.path}: metadata key {key!r} has unknown type {code}; the file is damaged")
        value = self._scalar(SCALARS[code])
        # The file has 1e-5 as the nearest float32; as a Python float that would be 9.999999747378752e-06.
        return key, float(str(np.float32(value))) if SCALARS[code] == "f" else value

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape (outermost first), type code, offset from the start of the tensors."""
        name = self._string()
        num_dimensions = int(self._scalar("I"))
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise CheckpointError(f"{self.path}: tensor {name!r} has {num_dimensions} dimensions, wanted 1 to 4")
        shape = tuple(reversed([int(self._scalar("Q")) for _ in range(num_dimensions)]))
        if 0 in shape:
            raise CheckpointError(f"{self.path}: tensor {name!r} has shape {shape}; an empty tensor is never right")
        return name, shape, int(self._scalar("I")), int(self._scalar("Q"))

    def _array(self, key: str) -> GgufValue | StoredStrings:
        code = int(self._scalar("I"))
        count = int(self._scalar("Q"))
        if code == STRING:
            self._room(count, 8, f"strings under {key!r}")
            return self._skip_strings(count)
        if code not in SCALARS:
            raise CheckpointError(f"{self.path}: metadata key {key!r} is a list of type {code}, which is not read")
        item = ARRAY_TYPES[code]
        self._room(count, item.itemsize, f"numbers under {key!r}")
        values: list[float] = np.frombuffer(self._take(count * item.itemsize), dtype=item).tolist()
        return values

    def _skip_strings(self, count: int) -> StoredStrings:
        """Find the end of a list; the loop is flat because vocabularies have hundreds of thousands of strings."""
        mapped, position, size, length_of = self._map, self.position, self._size, _LENGTH.unpack_from
        found = StoredStrings(position, count)
        for _ in range(count):
            if position + 8 > size:
                raise self._truncated(8)
            length = length_of(mapped, position)[0]
            position += 8
            if length > size - position:
                self.position = position
                raise self._truncated(length)
            position += length
        self.position = position
        return found

    def strings(self, stored: StoredStrings) -> list[str]:
        """The strings of a list whose end was found."""
        found: list[str] = []
        mapped, position, length_of = self._map, stored.position, _LENGTH.unpack_from
        try:
            for _ in range(stored.num_strings):
                start = position + 8
                position = start + length_of(mapped, position)[0]
                found.append(mapped[start:position].decode())
        except UnicodeDecodeError as error:
            raise self._garbled(error) from error
        return found

    def _string(self) -> str:
        return self._decoded(self._take(int(self._scalar("Q"))))

    def _decoded(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self._garbled(error) from error

    def _garbled(self, error: UnicodeDecodeError) -> CheckpointError:
        return CheckpointError(f"{self.path}: a string in the header is not UTF-8 ({error})")

    def _scalar(self, letter: str) -> int | float:
        layout = f"<{letter}"
        value: int | float = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return value

    def _take(self, num_bytes: int) -> bytes:
        if num_bytes > self._size - self.position:
            raise self._truncated(num_bytes)
        taken = self._map[self.position : self.position + num_bytes]
        self.position += num_bytes
        return taken

    def _room(self, count: int, least_bytes: int, what: str) -> None:
        """Refuse a count that the rest of the file cannot hold, before anything of that size is made."""
        if count * least_bytes > self._size - self.position:
            raise CheckpointError(
                f"{self.path}: claims {count} {what}, more than its {self._size} bytes can hold; "
                "it is truncated or damaged, fetch it again"
            )

    def _truncated(self, num_bytes: int) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: ends inside its header ({num_bytes} bytes wanted at {self.position}, the file has "
            f"{self._size}); it is truncated or damaged, fetch it again"
        )


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # an empty file cannot be mapped
        raise CheckpointError(f"{path}: is empty; fetch it again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _type_name(code: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return str(GGMLQuantizationType(code).name)
    except ValueError:
        return f"number {code}"
