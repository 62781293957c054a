"""Finds chips, links and models: by name in the catalog that ships with the package, or by path in a file of the user.

Reads, validates, names what is meant. Fetches nothing from anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from transload.errors import DeploymentError
from transload.hardware.chip import Chip
from transload.hardware.link import LinkKind
from transload.hardware.model_card import ModelCard, ModelFile, Provenance
from transload.hardware.model_config import read_config
from transload.hardware.nearest import did_you_mean
from transload.hardware.read import read_struct, read_text

FOLDER = Path(__file__).parent
SUFFIXES = (".yaml", ".yml", ".json")
Shelf = Literal["chips", "links", "models"]
Entry = TypeVar("Entry", Chip, LinkKind, ModelFile)


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a source key of the catalog stands for."""

    key: str
    title: str
    licence: str
    url: str = ""
    note: str = ""


class _Sources(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    sources: tuple[Source, ...]


def load_chip(name_or_path: str | Path) -> Chip:
    """A chip of the catalog by id or alias, or a chip file by path. Raises `DeploymentError`."""
    path = _find("chips", name_or_path)
    return read_struct(read_text(path), str(path), Chip)


def load_link(name_or_path: str | Path) -> LinkKind:
    """A kind of link by id or alias, or a link file by path. Raises `DeploymentError`."""
    path = _find("links", name_or_path)
    return read_struct(read_text(path), str(path), LinkKind)


def load_model(name_or_path: str | Path) -> ModelCard:
    """A model by id or alias, or by path: a card, a Hugging Face `config.json`, or a folder that has one.

    Raises `DeploymentError`.
    """
    path = _find("models", name_or_path)
    text = read_text(path)
    if path.suffix == ".json":
        config = _json_object(text, path)
        if not ("config" in config and "source" in config):
            provenance = Provenance(source=(str(path),), kind="datasheet", confidence="medium")
            name = str(config.get("_name_or_path") or path.absolute().parent.name or path.stem)
            return read_config(config, model_id=name, name=name, provenance=provenance, where=str(path))
    return _card(read_struct(text, str(path), ModelFile), path)


def _card(file: ModelFile, path: Path) -> ModelCard:
    source = (file.source,) if isinstance(file.source, str) else file.source
    provenance = Provenance(source=source, kind=file.kind, confidence=file.confidence)
    card = read_config(file.config, model_id=file.id, name=file.name, provenance=provenance, where=f"{path}: config")
    return msgspec.structs.replace(
        card,
        aliases=file.aliases,
        published=file.published,
        doubts=file.doubts,
        remarks=(*file.notes, *card.remarks),
    )


def chip_names() -> list[str]:
    """Ids of all chips of the catalog."""
    return _names("chips")


def link_names() -> list[str]:
    """Ids of all kinds of link of the catalog."""
    return _names("links")


def model_names() -> list[str]:
    """Ids of all models of the catalog."""
    return _names("models")


@cache
def sources() -> dict[str, Source]:
    """The sources of the catalog by key."""
    path = FOLDER / "sources.yaml"
    return {source.key: source for source in read_struct(read_text(path), str(path), _Sources).sources}


def describe_source(key: str) -> str:
    """Title and address of a source of the catalog; the words themselves for any other."""
    source = sources().get(key)
    if source is None:
        return key
    return f"{source.title}, {source.url}" if source.url else source.title


def _names(shelf: Shelf) -> list[str]:
    return sorted(path.stem for path in (FOLDER / shelf).glob("*.yaml"))


@cache
def _aliases(shelf: Shelf) -> dict[str, str]:
    """Every other name of what stands on a shelf."""
    kinds: dict[Shelf, type[Chip] | type[LinkKind] | type[ModelFile]] = {
        "chips": Chip,
        "links": LinkKind,
        "models": ModelFile,
    }
    found: dict[str, str] = {}
    for name in _names(shelf):
        path = FOLDER / shelf / f"{name}.yaml"
        for alias in read_struct(read_text(path), str(path), kinds[shelf]).aliases:
            found[alias] = name
    return found


def _find(shelf: Shelf, name_or_path: str | Path) -> Path:
    """The file that a name or path means. A name of the catalog wins over a file that is called the same."""
    text = str(name_or_path)
    name = text.lower()
    names = _names(shelf)
    if isinstance(name_or_path, str):
        if name in names:
            return FOLDER / shelf / f"{name}.yaml"
        if "/" not in text and not text.endswith(SUFFIXES) and (meant := _aliases(shelf).get(name)):
            return FOLDER / shelf / f"{meant}.yaml"
    path = Path(text).expanduser()
    if shelf == "models" and path.is_dir():
        path = path / "config.json"
    if path.is_file() and path.suffix in SUFFIXES:
        return path
    raise _not_found(shelf, text, path, [*names, *_aliases(shelf)])


def _not_found(shelf: Shelf, text: str, path: Path, known: Iterable[str]) -> DeploymentError:
    noun = shelf.removesuffix("s")
    if path.is_file():
        return DeploymentError(f"{path}: a {noun} file ends in {' or '.join(SUFFIXES)}")
    if path.name == "config.json" and path.parent.is_dir():
        return DeploymentError(f"{path.parent}: no config.json in this folder")
    if text.endswith(SUFFIXES) or text.startswith((".", "/", "~")):
        return DeploymentError(f"{text}: no such file")
    hub = "; a model of the hub is read from its config.json, by path" if shelf == "models" and "/" in text else ""
    return DeploymentError(
        f"no such {noun}: {text}{did_you_mean(text.rpartition('/')[2], known)}{hub}; "
        f"`transload {shelf}` lists them, and a file of your own works by path"
    )


def _json_object(text: str, path: Path) -> dict[str, object]:
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except msgspec.DecodeError as error:
        raise DeploymentError(f"{path}: not a JSON object: {error}") from error
