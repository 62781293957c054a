"""Which cores each worker is pinned to. Workers of one machine never share a core while there are enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice

from transload.deploy.spec import Pool

Cores = tuple[int, ...]


def assign_cores(pools: Sequence[Pool], usable: Sequence[int]) -> tuple[list[list[Cores]], list[str], list[str]]:
    """Cores for each worker of each pool (none: not pinned), warnings and problems.

    Pools that name their cores come first. The others take distinct ones of what is left, `threads` a worker, in the
    order of `usable`; when those run out, they begin anew. Workers that start elsewhere have cores that nobody here
    knows: they get what is listed for them, or none.
    """
    warnings: list[str] = []
    problems: list[str] = []
    here = [pool for pool in pools if pool.start == "here"]
    named = {core for pool in here if isinstance(pool.cores, tuple) for core in pool.cores}
    spare = [core for core in usable if core not in named]
    auto = [pool for pool in here if pool.cores == "auto"]
    wanted = sum(pool.workers * pool.threads for pool in auto)
    if auto and wanted > len(spare):
        names = ", ".join(f'"{pool.name}"' for pool in auto)
        warnings.append(
            f"{_are(len(spare), 'core')} free for {wanted} threads of pool{'s' if len(auto) > 1 else ''} {names}: "
            "workers share cores and slow each other; fewer workers or threads would not"
        )
    from_spare = cycle(spare or usable)
    assigned: list[list[Cores]] = []
    for index, pool in enumerate(pools):
        match pool.cores:
            case "any":
                assigned.append([()] * pool.workers)
            case "auto" if pool.start == "elsewhere":
                assigned.append([()] * pool.workers)
            case "auto":
                assigned.append([_distinct(from_spare, pool.threads) for _ in range(pool.workers)])
            case listed:
                problems += _unusable(pool, index, usable) if pool.start == "here" else []
                if pool.workers * pool.threads > len(listed):
                    threads = pool.workers * pool.threads
                    warnings.append(f'pool "{pool.name}": {_are(len(listed), "core")} listed for {threads} threads')
                from_listed = cycle(listed)
                assigned.append([_distinct(from_listed, pool.threads) for _ in range(pool.workers)])
    return assigned, warnings + _named_twice(here), problems


def _distinct(cores: Iterator[int], threads: int) -> Cores:
    """The next cores for one worker; when they repeat, fewer."""
    return tuple(dict.fromkeys(islice(cores, threads)))


def _unusable(pool: Pool, index: int, usable: Sequence[int]) -> list[str]:
    missing = [core for core in pool.cores if core not in usable]
    if not missing:
        return []
    listed = ", ".join(str(core) for core in missing)
    allowed = ", ".join(str(core) for core in sorted(usable)[:32])
    return [
        f'pool "{pool.name}": pools[{index}].cores names {listed}, which this process may not use; '
        f"it may use {allowed}; change pools.{pool.name}.cores"
    ]


def _named_twice(pools: Sequence[Pool]) -> list[str]:
    owner: dict[int, str] = {}
    warnings: list[str] = []
    for pool in pools:
        shared = [core for core in pool.cores if core in owner] if isinstance(pool.cores, tuple) else []
        if shared and isinstance(pool.cores, tuple):
            cores = ", ".join(str(core) for core in shared if isinstance(core, int))
            warnings.append(f'pools "{owner[int(shared[0])]}" and "{pool.name}" both list core {cores}: they share it')
        owner |= {core: pool.name for core in pool.cores if isinstance(core, int)}
    return warnings


def _are(number: int, noun: str) -> str:
    return f"1 {noun} is" if number == 1 else f"{number} {noun}s are"
