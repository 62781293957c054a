"""`transload explain`: what a deployment would run where on this machine. Starts nothing and fetches no weights."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from transload.cli.deployment_flags import add_deployment_flags, resolve_flags, source_of

if TYPE_CHECKING:
    from transload.deploy.explain import ModelFacts
    from transload.deploy.spec import Deployment, ModelSpec


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its flags."""
    parser = subparsers.add_parser(
        "explain",
        help="print what a deployment would run where, and whether it fits",
        description="Print the resolved plan: workers, memory, what crosses which link, what does not fit and why.",
    )
    add_deployment_flags(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print it as JSON")
    output.add_argument("--yaml", action="store_true", help="print the deployment as a file, to start one from")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; 1 if it does not fit this machine, or the chips it names."""
    import msgspec

    from transload.deploy.explain import explain
    from transload.deploy.load import to_yaml
    from transload.deploy.machine import read_machine
    from transload.deploy.placement import plan_placement
    from transload.model.native.library import load

    deployment = resolve_flags(args)
    if args.yaml:
        sys.stdout.write(to_yaml(deployment))
        return 0
    if any(pool.chip is not None for pool in deployment.pools):
        return _explain_simulated(deployment, source_of(args), as_json=args.json)
    facts = find_model(deployment.model)
    machine = read_machine(
        with_gpus=any(pool.device != "cpu" for pool in deployment.pools), has_kernels=load() is not None
    )
    explanation = explain(plan_placement(deployment, machine, facts.arch), facts, source_of(args))
    if args.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(explanation), indent=2).decode() + "\n")
    else:
        from rich.console import Console

        from transload.deploy.show import show

        # Rich takes a pipe for 80 columns wide, which breaks every table line.
        show(explanation, Console(width=None if sys.stdout.isatty() else 130))
    return 0 if explanation.fits else 1


def _explain_simulated(deployment: Deployment, source: str, *, as_json: bool) -> int:
    """Chips of the catalog instead of this machine."""
    import msgspec

    from transload.study.explain_simulated import explain_simulated

    explanation = explain_simulated(deployment, source)
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(explanation), indent=2).decode() + "\n")
    else:
        from rich.console import Console

        from transload.study.show_explained import show_explained

        show_explained(explanation, Console(width=None if sys.stdout.isatty() else 150))
    return 0 if explanation.fits else 1


def find_model(spec: ModelSpec) -> ModelFacts:
    """What can be known of the model without fetching weights. Raises `CheckpointError`."""
    from pathlib import Path

    import msgspec

    from transload.deploy.explain import ModelFacts
    from transload.deploy.spec import DEFAULT_MODEL
    from transload.model.embedded import cached_path
    from transload.model.source import locate

    is_here = cached_path() is not None if spec.path == DEFAULT_MODEL else Path(spec.path).expanduser().exists()
    if is_here and spec.load_format != "dummy":
        files = locate(spec)
        return ModelFacts(
            name=files.name, arch=files.arch, stored_dtype=files.stored_dtype, stored_bytes=files.weights_bytes
        )
    files = locate(msgspec.structs.replace(spec, load_format="dummy"))
    return ModelFacts(name=files.name, arch=files.arch)
