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
    _check_ffn(deployment, place)
    _check_blocks(deployment, place)
    _check_links(deployment, place)
    _check_hardware(deployment, place)
    if deployment.server.admission == "targets" and deployment.targets.ttft_seconds is None:
        problem = "there is no target to keep; set targets.ttft, or leave it at queue"
        raise refusal(place("server.admission"), "server.admission", problem, value='"targets"')
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


def _check_ffn(deployment: Deployment, place: Place) -> None:
    """Who computes whose feed-forwards, and whether both sides can agree on how."""
    pools = {pool.name: pool for pool in deployment.pools}
    users: dict[str, Pool] = {}
    for index, pool in enumerate(deployment.pools):
        path = f"pools[{index}].ffn"
        if pool.ffn is None:
            continue
        if pool.role not in ("decode", "aggregated"):
            problem = f"a pool of role {pool.role} does not decode; set it on a decode or aggregated pool"
            raise refusal(place(path), path, problem)
        there_are = ", ".join(name for name, other in pools.items() if other.role == "ffn") or "none"
        if pool.ffn.pool not in pools or pools[pool.ffn.pool].role != "ffn":
            what = f"has role {pools[pool.ffn.pool].role}, not ffn" if pool.ffn.pool in pools else "no such pool"
            problem = f"{what}; pools of role ffn: {there_are}"
            raise refusal(place(f"{path}.pool"), f"{path}.pool", problem, value=f'"{pool.ffn.pool}"')
        if pool.ffn.split == "column" and deployment.model.deterministic:
            problem = (
                "the sum of partial results has other bits than the whole, so deterministic mode cannot be kept; "
                "use split: replica, or turn model.deterministic off"
            )
            raise refusal(place(f"{path}.split"), f"{path}.split", problem, value='"column"')
        first = users.setdefault(pool.ffn.pool, pool)
        if first.ffn is not None and first.ffn.split != pool.ffn.split:
            problem = f'pool "{first.name}" uses the same FFN workers with split {first.ffn.split}; they have one'
            raise refusal(place(f"{path}.split"), f"{path}.split", problem, value=f'"{pool.ffn.split}"')
    for index, pool in enumerate(deployment.pools):
        _check_ffn_pool(pool, index, users, place)


def _check_ffn_pool(pool: Pool, index: int, users: dict[str, Pool], place: Place) -> None:
    if pool.role != "ffn":
        return
    if pool.name not in users:
        path = f"pools[{index}].role"
        problem = f"no pool sends its feed-forwards here; set ffn: {{pool: {pool.name}}} on a decode or aggregated pool"
        raise refusal(place(path), path, problem, value='"ffn"')
    if pool.memory_bytes is not None:
        path = f"pools[{index}].memory"
        raise refusal(place(path), path, "FFN workers have no KV cache; leave it out", value=str(pool.memory_bytes))


def _check_blocks(deployment: Deployment, place: Place) -> None:
    first = next((pool for pool in deployment.pools if pool.role != "ffn"), deployment.pools[0])
    for index, pool in enumerate(deployment.pools):
        if pool.role == "ffn":
            continue
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
        source, target = (pools[name] for name in link.between)
        is_hop = any(a.ffn is not None and a.ffn.pool == f.name for a, f in ((source, target), (target, source)))
        if {source.role, target.role} != {"prefill", "decode"} and not is_hop:
            problem = (
                f"nothing crosses between them; a link joins a prefill and a decode pool, or a pool and the one that "
                f"computes its feed-forwards: {_pairs(deployment.pools)}"
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
    pairs += [f"[{pool.name}, {pool.ffn.pool}]" for pool in pools if pool.ffn is not None]
    return ", ".join(pairs) or "there is no such pair here"
