"""What several parts of a deployment must agree on. Single fields have been checked by their types before.

Knows nothing of the machine: whether it fits is decided in `placement.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from transload.deploy.convert import did_you_mean, refusal
from transload.deploy.spec import Deployment, Pool
from transload.errors import DeploymentError
from transload.hardware.catalog import load_chip, load_link
from transload.hardware.parallel import Parallel
from transload.hardware.slots import parse_assumption

Place = Callable[[str], str]
"""Path of a key, such as `pools[1].role`, to where it stands in the file."""


def check(deployment: Deployment, place: Place) -> None:
    """Raise `DeploymentError` for the first thing that cannot work, wherever it is run."""
    _check_names(deployment, place)
    _check_roles(deployment, place)
    _check_blocks(deployment, place)
    _check_links(deployment, place)
    _check_hardware(deployment, place)
    for index, pool in enumerate(deployment.pools):
        if isinstance(pool.cores, tuple) and len(set(pool.cores)) != len(pool.cores):
            path = f"pools[{index}].cores"
            raise refusal(place(path), path, "names a core twice; name each once", value=str(list(pool.cores)))


def _check_names(deployment: Deployment, place: Place) -> None:
    first: dict[str, int] = {}
    for index, pool in enumerate(deployment.pools):
        path = f"pools[{index}].name"
        if pool.name in first:
            problem = f"pools[{first[pool.name]}] has this name already; every pool needs its own"
            raise refusal(place(path), path, problem, value=f'"{pool.name}"')
        first[pool.name] = index


def _check_roles(deployment: Deployment, place: Place) -> None:
    """Prefill workers hand to decode workers and to nobody else, so neither makes sense without the other."""
    roles = {pool.role for pool in deployment.pools}
    for role, other in (("prefill", "decode"), ("decode", "prefill")):
        if role in roles and other not in roles:
            index = next(i for i, pool in enumerate(deployment.pools) if pool.role == role)
            path = f"pools[{index}].role"
            verb = "take over from it" if role == "prefill" else "prefill for it"
            problem = f"no pool has role {other} to {verb}; add one, or give this pool role aggregated"
            raise refusal(place(path), path, problem, value=f'"{role}"')


def _check_blocks(deployment: Deployment, place: Place) -> None:
    first = deployment.pools[0]
    for index, pool in enumerate(deployment.pools):
        path = f"pools[{index}].block_size"
        if pool.block_size & (pool.block_size - 1):
            allowed = "1, 2, 4, 8, 16, 32, 64, 128, 256"
            raise refusal(place(path), path, f"not a power of two; allowed: {allowed}", value=str(pool.block_size))
        if pool.block_size != first.block_size:
            problem = (
                f'pool "{first.name}" has {first.block_size}; prefix keys and handoffs count in blocks, '
                "so all pools need the same"
            )
            raise refusal(place(path), path, problem, value=str(pool.block_size))


def _check_links(deployment: Deployment, place: Place) -> None:
    pools = {pool.name: pool for pool in deployment.pools}
    first: dict[frozenset[str], int] = {}
    for index, link in enumerate(deployment.links):
        path = f"links[{index}].between"
        for end, name in enumerate(link.between):
            if name not in pools:
                guess = did_you_mean(name, list(pools))
                problem = f"no such pool{guess or ';'} there are: {', '.join(pools)}"
                raise refusal(place(path), f"{path}[{end}]", problem, value=f'"{name}"')
        value = f"[{', '.join(link.between)}]"
        if {pools[name].role for name in link.between} != {"prefill", "decode"}:
            problem = (
                f"no KV crosses between them; a link joins a prefill and a decode pool: {_pairs(deployment.pools)}"
            )
            raise refusal(place(path), path, problem, value=value)
        ends = frozenset(link.between)
        if ends in first:
            raise refusal(place(path), path, f"links[{first[ends]}] joins them already; remove one", value=value)
        first[ends] = index


def _check_hardware(deployment: Deployment, place: Place) -> None:
    """What a simulation needs must exist, and what only a simulation needs must not be taken for more."""
    named: list[tuple[str, str | None, Callable[[str], object]]]
    named = [(f"pools[{index}].chip", pool.chip, load_chip) for index, pool in enumerate(deployment.pools)]
    named += [(f"links[{index}].kind", link.kind, load_link) for index, link in enumerate(deployment.links)]
    named += [(f"assume[{index}]", text, parse_assumption) for index, text in enumerate(deployment.assume)]
    for path, text, read in named:
        if text is None:
            continue
        try:
            read(text)
        except DeploymentError as error:
            raise refusal(place(path), path, str(error), value=f'"{text}"') from None
    for index, pool in enumerate(deployment.pools):
        if pool.chip is None and pool.parallel != Parallel():
            path = f"pools[{index}].parallel"
            problem = (
                "each worker on this machine has the whole model; "
                f"name the pool's chip too (pools.{pool.name}.chip) to simulate such a split, or leave this out"
            )
            raise refusal(place(path), path, problem)


def check_can_be_served(deployment: Deployment) -> None:
    """Raise `DeploymentError` for pools that are there to be simulated."""
    for index, pool in enumerate(deployment.pools):
        if pool.chip is not None:
            raise DeploymentError(
                f'pool "{pool.name}": pools[{index}].chip = "{pool.chip}": this pool is one to simulate, and no such '
                "chip is used here; run `transload simulate` on this file, or leave chip and parallel out to serve on "
                "this machine"
            )


def _pairs(pools: tuple[Pool, ...]) -> str:
    pairs = [f"[{p.name}, {d.name}]" for p in pools if p.role == "prefill" for d in pools if d.role == "decode"]
    return ", ".join(pairs) or "there is no such pair here"
