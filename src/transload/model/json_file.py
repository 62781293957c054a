"""Reads the JSON files that lie beside a model's weights. Never trusts their size or their shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transload.errors import CheckpointError

MAX_BYTES = 64 << 20


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises `CheckpointError` if it is missing, too large or not a JSON object."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(f"{path}: {size} bytes is too large for a JSON file here (at most {max_bytes})")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); the file is damaged, fetch it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(found).__name__}, wanted an object")
    return found


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`; an empty object if there is no such file."""
    return read_json(path) if path.exists() else {}
