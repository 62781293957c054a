"""Placing experts: everybody has an owner, memory is shared, hot experts are copied, and losses are seen."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from transload.arch import Experts, ModelArch
from transload.control.expert_map import ExpertMap, build_expert_map, num_experts_by_layer


@settings(max_examples=150, deadline=None)
@given(
    num_experts=st.lists(st.sampled_from((1, 2, 7, 8, 32)), min_size=1, max_size=4),
    num_workers=st.integers(1, 6),
    num_replicas=st.integers(0, 40),
    seed=st.randoms(use_true_random=False),
)
def test_every_expert_has_an_owner_and_no_worker_more_than_its_share(
    num_experts: list[int], num_workers: int, num_replicas: int, seed: object
) -> None:
    loads = [[seed.random() ** 4 for _ in range(count)] for count in num_experts]  # type: ignore[attr-defined]
    built = build_expert_map(num_experts, num_workers, loads=loads, num_replicas=num_replicas)
    assert built.orphans() == ()
    for layer, count in enumerate(num_experts):
        assert all(len(set(owners)) == len(owners) for owners in built.owners[layer])
        if count == 1:
            assert built.owners[layer] == (tuple(range(num_workers)),)
            continue
        copies = min(num_replicas, count * (num_workers - 1))
        assert sum(map(len, built.owners[layer])) == count + copies
        most = -(-count // num_workers) + -(-copies // num_workers)  # of experts, and of copies
        assert max(len(built.experts_of(worker, layer)) for worker in range(num_workers)) <= most
    assert built == build_expert_map(num_experts, num_workers, loads=loads, num_replicas=num_replicas)
    assert msgspec.json.decode(msgspec.json.encode(built), type=ExpertMap) == built


def test_known_loads_balance_what_the_workers_compute() -> None:
    loads = [[90, 5, 4, 3, 2, 1, 1, 1], [1, 90, 5, 4, 3, 2, 1, 1], [60, 50, 40, 30, 20, 10, 5, 5]]
    blind = build_expert_map([8, 8, 8], 2).loads_of(loads)
    seeing = build_expert_map([8, 8, 8], 2, loads=loads).loads_of(loads)
    assert max(seeing) < max(blind)
    assert max(seeing) - min(seeing) <= 10


def test_the_hottest_expert_is_the_one_that_is_copied() -> None:
    built = build_expert_map([4], 2, loads=[[1, 2, 100, 3]], num_replicas=1)
    assert [len(owners) for owners in built.owners[0]] == [1, 1, 2, 1]
    assert max(built.loads_of([[1, 2, 100, 3]])) < 60


def test_without_a_worker_its_copies_remain_elsewhere_and_the_rest_has_no_owner() -> None:
    built = build_expert_map([4, 1], 2, num_replicas=2)
    left = built.without(0)
    assert left.version == built.version + 1
    assert left.experts_of(0, 0) == ()
    lost = {(0, expert) for expert, owners in enumerate(built.owners[0]) if owners == (0,)}
    assert set(left.orphans()) == lost
    assert len(lost) == 1  # of two experts each, one was copied to the other worker
    assert left.owners[1] == ((1,),)


def test_plain_layers_count_as_one_expert() -> None:
    arch = ModelArch(
        name="m",
        family="qwen3_moe",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_layers=3,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        max_position=8,
        experts=Experts(num_experts=6, per_token=2, intermediate_size=4, dense_layers=(1,)),
    )
    assert num_experts_by_layer(arch) == (6, 1, 6)
    assert num_experts_by_layer(msgspec.structs.replace(arch, experts=None)) == (1, 1, 1)
