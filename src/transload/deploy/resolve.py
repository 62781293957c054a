"""One deployment from all that a command line says: a file or a shorthand, then flags, then `--set`, in this order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from transload.deploy.load import build, read, to_plain
from transload.deploy.overrides import Override, apply
from transload.deploy.spec import Deployment
from transload.deploy.topology import DEFAULT_TOPOLOGY, parse_topology
from transload.deploy.tree import plant
from transload.errors import DeploymentError

_SHORTHAND = re.compile(r"([0-9]+[a-z]+)+", re.IGNORECASE)


def resolve(file: Path | None = None, topology: str | None = None, overrides: Sequence[Override] = ()) -> Deployment:
    """Without file and topology: one prefill and one decode worker on CPU. Raises `DeploymentError`."""
    if file is not None and topology is not None:
        raise DeploymentError(f"--topology {topology}: {file} says already what runs where; give one of the two")
    if file is not None:
        if _SHORTHAND.fullmatch(str(file)) and not file.exists():
            raise DeploymentError(f"{file}: no such file; if you mean the shorthand, say --topology {file}")
        tree = read(file)
    else:
        shorthand = topology or DEFAULT_TOPOLOGY
        tree = plant(to_plain(parse_topology(shorthand)), f"--topology {shorthand}")
    for override in overrides:
        tree = apply(tree, override)
    return build(tree)
