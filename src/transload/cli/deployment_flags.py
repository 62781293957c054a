"""The flags by which `serve` and `explain` are told a deployment, and the deployment they make together."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transload.deploy.overrides import Override
    from transload.deploy.spec import Deployment

FLAG_PATHS = {
    "model": "model.path",
    "dtype": "model.dtype",
    "load_format": "model.load_format",
    "deterministic": "model.deterministic",
    "host": "server.host",
    "port": "server.port",
}
"""Where in a deployment each flag goes."""


def add_deployment_flags(parser: argparse.ArgumentParser) -> None:
    """Add them. Values are checked with the deployment, so that a wrong one is answered as in a file."""
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a deployment file (YAML)")
    group = parser.add_argument_group("deployment")
    group.add_argument(
        "--topology", metavar="1p1d", help="instead of a file: 1p1d (default), 1agg, 2p1d, 1a1f, 1p1a1f and so on"
    )
    group.add_argument("--model", metavar="PATH", help="a model folder, a .gguf file or a hub id (owner/name)")
    group.add_argument("--dtype", metavar="TYPE", help="auto, float32, bfloat16 or quantized")
    group.add_argument("--deterministic", action="store_true", help="equal results whatever the batch and the split")
    group.add_argument("--load-format", metavar="FORMAT", help="auto, or dummy for random weights")
    group.add_argument("--host", help="address to serve on (default 127.0.0.1)")
    group.add_argument("--port", help="port to serve on (default 8000); 0 for any free one")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        dest="changes",
        help="change anything in the deployment, such as pools.decode.workers=2; can be repeated",
    )


def resolve_flags(args: argparse.Namespace) -> Deployment:
    """File or shorthand, then flags, then `--set`. Raises `DeploymentError`."""
    from transload.deploy.overrides import parse_override
    from transload.deploy.resolve import resolve

    overrides = [*_flag_overrides(args), *(parse_override(change) for change in args.changes)]
    return resolve(args.file, args.topology, overrides)


def source_of(args: argparse.Namespace) -> str:
    """Where the deployment comes from, in words."""
    from transload.deploy.topology import DEFAULT_TOPOLOGY

    changed = [f"--set {change}" for change in args.changes]
    base = str(args.file) if args.file is not None else f"topology {args.topology or DEFAULT_TOPOLOGY}"
    return " ".join([base, *changed])


def _flag_overrides(args: argparse.Namespace) -> list[Override]:
    from transload.deploy.overrides import flag_override, parse_override

    overrides: list[Override] = []
    for name, path in FLAG_PATHS.items():
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        if value is None or value is False:
            continue
        if name == "port":  # a number, so it is read as one
            overrides.append(parse_override(f"{path}={value}", where=f"{flag} {value}"))
        else:
            overrides.append(flag_override(path, value, flag if value is True else f"{flag} {value}"))
    return overrides
