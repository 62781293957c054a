"""Fetches a model from the Hugging Face hub into the hub's own cache. Never fetches pickled weights or code.

`huggingface_hub` decides where the cache is (HF_HUB_CACHE), whether the network may be used (HF_HUB_OFFLINE) and which
token to show; files that are there already are not fetched again.
"""

from __future__ import annotations

import re
from pathlib import Path

from transload.errors import CheckpointError

SIDE_FILES = ("config.json", "generation_config.json", "tokenizer*.json", "chat_template.*", "special_tokens_map.json")
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
HUB_FILE = re.compile(rf"({HUB_ID.pattern})/([\w.\-/]+\.gguf)")


def is_hub_id(path: str) -> bool:
    """Whether a model's path has the form `owner/name` or `owner/name/FILE.gguf`."""
    return bool(HUB_ID.fullmatch(path) or HUB_FILE.fullmatch(path)) and ".." not in path


def fetch_from_hub(path: str, revision: str | None, *, weights: bool = True) -> Path:
    """The folder of a hub model, or the file if `path` names a .gguf file in one. Shows the hub's own progress bars.

    Raises `CheckpointError` with the reason if it cannot be had: no such model, no access, no network, offline.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if (match := HUB_FILE.fullmatch(path)) is not None:
            return Path(huggingface_hub.hf_hub_download(match[1], match[2], revision=revision))
        wanted = [*SIDE_FILES, *(WEIGHT_FILES if weights else ())]
        return Path(huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=wanted))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"model {path!r}{_at(revision)}: not in the local cache, and the hub cannot be reached "
            f"(or HF_HUB_OFFLINE is set); fetch it with `hf download {path}` where there is a network, "
            "or name a local folder or .gguf file"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(
            f"model {path!r}{_at(revision)}: the hub refused it: {str(error).strip()[:500]}\n"
            "Check the name and revision; a gated model needs its licence accepted and a token (`hf auth login`)"
        ) from error


def _at(revision: str | None) -> str:
    return f" at revision {revision!r}" if revision is not None else ""
