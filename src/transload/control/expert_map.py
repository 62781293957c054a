"""Which FFN worker has which expert of which layer: a table, how it is made, and what is left of it without a worker.

Pure data. Which of an expert's owners computes a row is the caller's choice and changes no bit of the result; that each
expert has an owner is what this table is for. A layer with one plain feed-forward counts as a layer of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from transload.arch import ModelArch

Loads: TypeAlias = Sequence[Sequence[float]]
"""How often each expert of each layer was chosen; any unit."""


class ExpertMap(msgspec.Struct, frozen=True, kw_only=True):
    """The table. Two maps of one version are equal; a change of owners makes a new version."""

    version: int
    num_workers: int
    owners: tuple[tuple[tuple[int, ...], ...], ...]
    """By layer and expert: the workers that have it, ascending. Empty where the last one is gone."""

    def experts_of(self, worker: int, layer: int) -> tuple[int, ...]:
        """The experts of a layer that a worker has, ascending."""
        return tuple(expert for expert, owners in enumerate(self.owners[layer]) if worker in owners)

    def orphans(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) that nobody has."""
        return tuple(
            (layer, expert)
            for layer, experts in enumerate(self.owners)
            for expert, owners in enumerate(experts)
            if not owners
        )

    def without(self, worker: int) -> ExpertMap:
        """The map after a worker is gone. Its experts are not given to others, who do not have the weights."""
        owners = tuple(
            tuple(tuple(owner for owner in experts if owner != worker) for experts in layer) for layer in self.owners
        )
        return ExpertMap(version=self.version + 1, num_workers=self.num_workers, owners=owners)

    def loads_of(self, loads: Loads) -> tuple[float, ...]:
        """What each worker would compute of these loads, were every expert's load shared evenly by its owners."""
        totals = [0.0] * self.num_workers
        for layer, experts in enumerate(self.owners):
            for expert, owners in enumerate(experts):
                for owner in owners:
                    totals[owner] += loads[layer][expert] / len(owners)
        return tuple(totals)


def num_experts_by_layer(arch: ModelArch) -> tuple[int, ...]:
    """One for a plain feed-forward."""
    experts = arch.experts
    return tuple(
        experts.num_experts if experts is not None and arch.is_sparse(layer) else 1 for layer in range(arch.num_layers)
    )


def build_expert_map(
    num_experts: Sequence[int], num_workers: int, *, loads: Loads | None = None, num_replicas: int = 0
) -> ExpertMap:
    """Place every layer's experts on `num_workers` workers, and `num_replicas` copies of hot ones in each layer.

    `num_experts` of each layer (see `num_experts_by_layer`); `loads` where known, else all are taken as equally hot. A
    worker gets at most ceil(experts / workers) of a layer, because memory is what splits experts at all, and a share of
    the copies. Greedy: the hottest first, each to the worker that has least to do. A layer of one expert is on every
    worker. The same arguments give the same map on every machine.
    """
    assert num_workers >= 1, num_workers
    assert num_replicas >= 0, num_replicas
    layers: list[tuple[tuple[int, ...], ...]] = []
    busy = [0.0] * num_workers  # over all layers so far, so that one worker does not get each layer's hottest
    for layer, count in enumerate(num_experts):
        if count == 1:
            layers.append((tuple(range(num_workers)),))
            continue
        heat = [1.0] * count if loads is None else [float(load) for load in loads[layer]]
        assert len(heat) == count, f"layer {layer} has {count} experts, {len(heat)} loads"
        layers.append(_placed(heat, busy, min(num_replicas, count * (num_workers - 1))))
    return ExpertMap(version=0, num_workers=num_workers, owners=tuple(layers))


def _placed(heat: list[float], busy: list[float], num_replicas: int) -> tuple[tuple[int, ...], ...]:
    """Owners of one layer's experts; adds what the workers get to do to `busy`."""
    num_workers = len(busy)
    room = [-(-len(heat) // num_workers)] * num_workers
    owners: list[list[int]] = [[] for _ in heat]
    for expert in sorted(range(len(heat)), key=lambda expert: (-heat[expert], expert)):
        worker = min((w for w in range(num_workers) if room[w]), key=lambda w: (busy[w], w))
        owners[expert].append(worker)
        busy[worker] += heat[expert]
        room[worker] -= 1
    room = [left + -(-num_replicas // num_workers) for left in room]
    for _ in range(num_replicas):
        _add_replica(heat, busy, room, owners)
    return tuple(tuple(sorted(workers)) for workers in owners)


def _add_replica(heat: list[float], busy: list[float], room: list[int], owners: list[list[int]]) -> None:
    """One more copy of the expert whose owners have most to do with it each, where there is room for it."""
    for expert in sorted(range(len(heat)), key=lambda expert: (-heat[expert] / len(owners[expert]), expert)):
        free = [worker for worker in range(len(busy)) if room[worker] and worker not in owners[expert]]
        if not free:
            continue
        worker = min(free, key=lambda w: (busy[w], w))
        share, new_share = heat[expert] / len(owners[expert]), heat[expert] / (len(owners[expert]) + 1)
        for owner in owners[expert]:
            busy[owner] += new_share - share
        busy[worker] += new_share
        owners[expert].append(worker)
        room[worker] -= 1
        return
