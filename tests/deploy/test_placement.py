"""What goes where: cores, devices, memory, blocks, links; and what does not fit, in which words."""

from __future__ import annotations

import msgspec
import pytest

from transload.arch import Experts, ModelArch
from transload.deploy.machine import Gpu, Machine
from transload.deploy.overrides import parse_override
from transload.deploy.placement import place, plan_placement
from transload.deploy.plan import Placement, WorkerPlan
from transload.deploy.resolve import resolve
from transload.deploy.spec import Deployment
from transload.errors import DeploymentError

MIB = 2**20
GIB = 2**30
SMOLLM2 = ModelArch(
    name="smollm2",
    family="llama",
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position=8192,
    tied_embeddings=True,
)
MIXTURE = msgspec.structs.replace(
    SMOLLM2, family="qwen3_moe", experts=Experts(num_experts=8, per_token=2, intermediate_size=256, dense_layers=(0,))
)
BFLOAT16_TOKEN = 2 * 30 * 3 * 64 * 2
A100 = Gpu(index=0, name="A100", memory_bytes=80 * GIB, free_bytes=79 * GIB, has_bfloat16=True)
T4 = Gpu(index=1, name="T4", memory_bytes=15 * GIB, free_bytes=14 * GIB, has_bfloat16=False)


def machine(
    cores: int = 8,
    memory: int = 24 * GIB,
    free: int | None = None,
    gpus: tuple[Gpu, ...] = (),
    bfloat16: bool = True,
    quota: float | None = None,
    memfd: bool = True,
    kernels: bool = False,
) -> Machine:
    return Machine(
        cores=tuple(range(cores)),
        memory_bytes=memory,
        free_bytes=memory if free is None else free,
        core_quota=quota,
        cpu_flags=frozenset({"avx512_bf16"} if bfloat16 else ()),
        gpus=gpus,
        has_kernels=kernels,
        has_memfd=memfd,
    )


def deployment(topology: str, *changes: str) -> Deployment:
    return resolve(topology=topology, overrides=[parse_override(change) for change in changes])


def placed(topology: str, *changes: str, on: Machine | None = None, arch: ModelArch = SMOLLM2) -> Placement:
    return plan_placement(deployment(topology, *changes), on or machine(), arch)


def problem(topology: str, *changes: str, on: Machine | None = None, arch: ModelArch = SMOLLM2) -> str:
    with pytest.raises(DeploymentError) as error:
        place(deployment(topology, *changes), on or machine(), arch)
    return str(error.value)


def test_every_worker_has_a_plan_that_can_be_sent_to_it() -> None:
    placement = place(deployment("2p1d", "seed=9", "model.deterministic=true"), machine(), SMOLLM2)
    assert [worker.name for worker in placement.workers] == ["prefill-0", "prefill-1", "decode-0"]
    assert [worker.role for worker in placement.workers] == ["prefill", "prefill", "decode"]
    for worker in placement.workers:
        assert (worker.seed, worker.model.deterministic, worker.dtype) == (9, True, "bfloat16")
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(worker), type=WorkerPlan) == worker


# -- cores ------------------------------------------------------------------------------------------------------------


def test_workers_get_cores_of_their_own() -> None:
    placement = placed("2p1d", "pools.prefill.threads=2")
    assert [worker.cores for worker in placement.workers] == [(0, 1), (2, 3), (4,)]
    assert placement.warnings == ()


def test_with_too_few_cores_they_are_shared_in_turn_and_a_warning_says_so() -> None:
    placement = placed("2p1d", on=machine(cores=2))
    assert [worker.cores for worker in placement.workers] == [(0,), (1,), (0,)]
    assert "2 cores are free for 3 threads" in placement.warnings[0]
    assert placement.problems == ()


def test_a_worker_with_more_threads_than_cores_gets_each_core_once() -> None:
    assert placed("1agg", "pools.aggregated.threads=5", on=machine(cores=2)).workers[0].cores == (0, 1)


def test_listed_cores_are_taken_and_left_alone_by_the_other_pools() -> None:
    placement = placed("1p2d", "pools.decode.cores=[0, 5]")
    assert [worker.cores for worker in placement.workers] == [(1,), (0,), (5,)]


def test_too_few_listed_cores_are_shared_and_a_warning_says_so() -> None:
    placement = placed("1p2d", "pools.decode.cores=[3]")
    assert [worker.cores for worker in placement.workers[1:]] == [(3,), (3,)]
    assert placement.warnings == ('pool "decode": 1 core is listed for 2 threads',)


def test_a_core_listed_by_two_pools_is_warned_of() -> None:
    placement = placed("1p1d", "pools.*.cores=[4]")
    assert placement.warnings == ('pools "prefill" and "decode" both list core 4: they share it',)


def test_any_means_not_pinned() -> None:
    placement = placed("1p1d", "pools.decode.cores=any")
    assert [worker.cores for worker in placement.workers] == [(0,), ()]


def test_a_core_that_is_not_ours_is_refused() -> None:
    message = problem("1p1d", "pools.decode.cores=[1, 9]", on=machine(cores=2))
    assert "pools[1].cores names 9, which this process may not use; it may use 0, 1" in message


def test_more_threads_than_the_container_lets_run_are_warned_of() -> None:
    placement = placed("2p1d", on=machine(quota=1.5))
    assert "1.5 cores' worth of time for 3 threads" in placement.warnings[0]


# -- dtype and devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "on", "dtype"),
    [
        ((), machine(), "bfloat16"),
        ((), machine(bfloat16=False), "float32"),
        (("model.dtype=bfloat16",), machine(bfloat16=False), "bfloat16"),
        (("model.dtype=float32",), machine(), "float32"),
        (("model.dtype=quantized",), machine(bfloat16=False), "bfloat16"),
        ((), machine(bfloat16=False, kernels=True), "bfloat16"),
        (("model.deterministic=true",), machine(bfloat16=False, kernels=True), "float32"),
        (("pools.*.device=cuda:0",), machine(bfloat16=False, gpus=(A100, T4)), "bfloat16"),
        (("pools.decode.device=cuda:1",), machine(gpus=(A100, T4)), "float32"),
        (("pools.*.device=cuda",), machine(gpus=(A100, T4)), "float32"),
    ],
)
def test_one_dtype_for_all_that_every_device_computes_in(changes: tuple[str, ...], on: Machine, dtype: str) -> None:
    placement = placed("1p1d", *changes, on=on)
    assert {worker.dtype for worker in placement.workers} == {dtype}


def test_cuda_spreads_workers_over_the_gpus() -> None:
    placement = placed("3agg", "pools.*.device=cuda", on=machine(gpus=(A100, T4)))
    assert [worker.device for worker in placement.workers] == ["cuda:0", "cuda:1", "cuda:0"]


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are() -> None:
    message = problem("1p1d", "pools.decode.device=cuda:3", on=machine(gpus=(A100,)))
    assert 'pools[1].device = "cuda:3": no such GPU here; GPUs: cuda:0' in message
    assert "--set pools.decode.device=cpu" in message


# -- memory -----------------------------------------------------------------------------------------------------------


def test_by_default_a_cache_holds_four_full_contexts() -> None:
    worker = placed("1p1d").workers[1]
    assert worker.num_blocks == 4 * 8192 // 16
    assert worker.kv_bytes == 4 * 8192 * BFLOAT16_TOKEN


def test_by_default_a_cache_takes_at_most_a_fifth_of_the_memory() -> None:
    worker = placed("1agg", on=machine(memory=3 * GIB)).workers[0]
    assert worker.kv_bytes <= 3 * GIB // 5
    assert worker.kv_bytes > 3 * GIB // 5 - 16 * BFLOAT16_TOKEN


def test_many_workers_with_default_caches_fit_together_or_are_refused() -> None:
    placement = placed("30agg", on=machine(memory=64 * GIB, free=30 * GIB))
    assert placement.problems == ()
    assert sum(worker.kv_bytes + worker.weights_bytes for worker in placement.workers) < 30 * GIB
    assert "all pools" in problem("30agg", on=machine(memory=64 * GIB, free=10 * GIB))


def test_memory_in_the_file_is_cut_to_whole_blocks() -> None:
    worker = placed("1agg", "pools.*.memory=200 MiB").workers[0]
    assert worker.num_blocks == 200 * MIB // (16 * BFLOAT16_TOKEN)
    assert worker.kv_bytes == worker.num_blocks * 16 * BFLOAT16_TOKEN


def test_float32_doubles_what_a_token_takes() -> None:
    half, full = (placed("1agg", f"model.dtype={d}", "pools.*.memory=1 GiB") for d in ("bfloat16", "float32"))
    assert half.workers[0].num_blocks == pytest.approx(2 * full.workers[0].num_blocks, abs=1)
    assert full.workers[0].weights_bytes == 2 * half.workers[0].weights_bytes


def test_what_does_not_fit_is_refused_naming_pool_needed_available_and_knob() -> None:
    message = problem("1p1d", "pools.decode.memory=30 GiB")
    assert message.startswith('pool "decode": 1 worker needs 30.')
    assert "24.0 GiB of 24.0 GiB are free on this machine; lower pools.decode.memory" in message
    assert "pools.decode.workers" not in message


def test_with_several_workers_fewer_of_them_are_a_way_out() -> None:
    assert "lower pools.aggregated.memory or pools.aggregated.workers" in problem("4agg", "pools.*.memory=8 GiB")


def test_a_gpus_memory_is_checked_by_itself() -> None:
    message = problem("1p1d", "pools.decode.device=cuda:1", "pools.decode.memory=20 GiB", on=machine(gpus=(A100, T4)))
    assert "14.0 GiB of 15.0 GiB are free on GPU 1 (T4)" in message


def test_a_cache_of_less_than_a_block_is_refused() -> None:
    message = problem("1p1d", "pools.decode.memory=100 KiB")
    assert "pools[1].memory = 100 KiB holds no KV block; one of 16 tokens takes 360 KiB in bfloat16" in message


def test_all_problems_are_told_at_once() -> None:
    placement = placed("1p1d", "pools.decode.cores=[99]", "pools.prefill.memory=1 TiB", "model.max_context=99999")
    assert len(placement.problems) == 3


# -- context ----------------------------------------------------------------------------------------------------------


def test_the_context_is_the_models_own_if_every_cache_holds_it() -> None:
    assert placed("1p1d").max_context == 8192


def test_a_context_in_the_file_shrinks_the_default_caches() -> None:
    placement = placed("1p1d", "model.max_context=1000")
    assert placement.max_context == 1000
    assert {worker.num_blocks for worker in placement.workers} == {4 * 63}
    assert {worker.max_context for worker in placement.workers} == {1000}


def test_a_small_cache_limits_the_context_and_a_warning_says_so() -> None:
    placement = placed("1p1d", "pools.decode.memory=50 MiB")
    assert placement.max_context == 50 * MIB // (16 * BFLOAT16_TOKEN) * 16
    assert f"requests are limited to {placement.max_context} tokens" in placement.warnings[0]
    assert "set pools.decode.memory to 180 MiB or more" in placement.warnings[0]


def test_a_context_that_was_asked_for_and_cannot_be_held_is_refused() -> None:
    message = problem("1p1d", "pools.decode.memory=50 MiB", "model.max_context=4096")
    assert "model.max_context = 4096 needs a KV cache of 90.0 MiB" in message
    assert "lower model.max_context to 2272" in message


def test_a_cache_too_small_to_be_of_use_is_refused() -> None:
    assert "which holds 32 tokens" in problem("1agg", "pools.*.memory=1 MiB")


def test_a_context_beyond_the_models_own_is_refused() -> None:
    assert "model.max_context = 8193: smollm2 was made for 8192 tokens at most" in problem(
        "1agg", "model.max_context=8193"
    )


# -- links ------------------------------------------------------------------------------------------------------------


def test_every_prefill_pool_is_linked_to_every_decode_pool_over_shared_memory() -> None:
    placement = placed("2p1d")
    (link,) = placement.links
    assert (link.source, link.target, link.transport, link.layers_per_frame) == ("prefill", "decode", "direct", 5)
    assert placement.workers[0].transports == {"decode": "direct"}
    assert placement.workers[2].transports == {"prefill": "direct"}


def test_an_aggregated_worker_has_no_links() -> None:
    worker = placed("1agg").workers[0]
    assert (worker.links, worker.transports, worker.lease_seconds) == ((), {}, 10.0)


def test_a_listed_link_is_taken_in_either_direction() -> None:
    link = "{between: [decode, prefill], transport: tcp, lease: 3 s, window_frames: 4, layers_per_frame: 99}"
    placement = placed("1p1d", f"links=[{link}]")
    worker = placement.workers[0]
    assert worker.transports == {"decode": "tcp"}
    assert (worker.lease_seconds, worker.window_frames, worker.layers_per_frame) == (3.0, 4, 30)


def test_without_memfd_links_use_tcp_and_shared_memory_is_refused() -> None:
    assert placed("1p1d", on=machine(memfd=False)).links[0].transport == "tcp"
    message = problem("1p1d", "links=[{between: [prefill, decode], transport: shm}]", on=machine(memfd=False))
    assert "shm needs Linux; set its transport to tcp" in message


def test_only_cpus_can_work_in_each_others_blocks() -> None:
    link = "links=[{between: [prefill, decode], transport: direct}]"
    assert placed("1p1d", link).links[0].transport == "direct"
    assert "direct needs Linux" in problem("1p1d", link, on=machine(memfd=False))
    assert "direct needs both pools on device cpu" in problem("1p1d", link, "pools.decode.device=cuda")


# -- workers that start elsewhere -------------------------------------------------------------------------------------


def test_workers_elsewhere_take_nothing_of_this_machine() -> None:
    placement = placed(
        "1p1d", "pools.decode.start=elsewhere", "pools.decode.memory=100 GiB", "pools.decode.device=cuda", on=machine(2)
    )
    prefill, decode = placement.workers
    assert placement.problems == ()
    assert (prefill.starts_here, prefill.cores, decode.starts_here, decode.cores) == (True, (0,), False, ())
    assert decode.device == "cuda"
    assert 'pool "decode" starts elsewhere' in placement.warnings[0]


def test_a_link_to_workers_elsewhere_is_decided_when_they_meet() -> None:
    assert placed("1p1d", "pools.decode.start=elsewhere").links[0].transport == "auto"


# -- feed-forwards elsewhere ------------------------------------------------------------------------------------------


def test_attention_and_ffn_workers_each_count_their_own_side_of_the_weights() -> None:
    whole = placed("1agg").workers[0]
    attention, ffn = placed("1a1f").workers
    assert attention.weights_bytes + ffn.weights_bytes == whole.weights_bytes
    assert ffn.weights_bytes == 30 * 3 * 576 * 1536 * 2
    assert (ffn.num_blocks, ffn.kv_bytes) == (0, 0)
    assert attention.num_blocks == whole.num_blocks


def test_column_parts_share_the_weights_and_replicas_do_not() -> None:
    column = placed("1a2f", "pools.aggregated.ffn.split=column").workers[1:]
    replica = placed("1a2f").workers[1:]
    assert [2 * worker.weights_bytes for worker in column] == [worker.weights_bytes for worker in replica]
    assert [(worker.share.part, worker.share.num_parts) for worker in column if worker.share] == [(0, 2), (1, 2)]
    assert [(worker.share.part, worker.share.num_parts) for worker in replica if worker.share] == [(0, 1), (0, 1)]


def test_a_worker_is_told_how_to_reach_the_other_side() -> None:
    prefill, attention, ffn = placed("1p1a1f", "pools.decode.ffn.micro_batches=3").workers
    assert prefill.hop is None
    assert prefill.share is None
    assert attention.hop is not None
    assert ffn.share is not None
    assert (attention.hop.target, attention.hop.transport, attention.hop.split.micro_batches) == ("ffn", "shm", 3)
    assert ffn.share.max_rows == 512 + 64
    for worker in (prefill, attention, ffn):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(worker), type=WorkerPlan) == worker


def test_a_split_that_the_model_has_no_parts_for_does_not_fit() -> None:
    assert "smollm2 has no experts" in problem("1a1f", "pools.aggregated.ffn.split=expert")
    assert "5 workers cannot have equal slices of 1536 columns" in problem("1a5f", "pools.aggregated.ffn.split=column")


def test_the_experts_of_a_mixture_are_shared_out_and_plain_layers_and_routers_are_not() -> None:
    expert, layers = 3 * 576 * 256, 29  # and one plain layer
    plain = 3 * 576 * 1536
    replica = placed("1a2f", arch=MIXTURE).workers[1:]
    assert {worker.weights_bytes for worker in replica} == {2 * (layers * 8 * expert + plain)}
    assert [(worker.share.part, worker.share.num_replicas) for worker in replica if worker.share] == [(0, 8), (1, 8)]
    halves = placed("1a2f", "pools.aggregated.ffn.split=expert", arch=MIXTURE).workers[1:]
    assert {worker.weights_bytes for worker in halves} == {2 * (layers * 4 * expert + plain)}
    copied = ("pools.aggregated.ffn.split=expert", "pools.aggregated.ffn.replicas=2")
    assert placed("1a2f", *copied, arch=MIXTURE).workers[1].weights_bytes == 2 * (layers * 5 * expert + plain)
    whole = placed("1agg", arch=MIXTURE).workers[0].weights_bytes
    attention = placed("1a2f", arch=MIXTURE).workers[0].weights_bytes
    assert whole - attention == 2 * MIXTURE.num_ffn_parameters() == replica[0].weights_bytes


def test_splits_that_a_mixture_does_not_have_are_refused() -> None:
    column = problem("1a2f", "pools.aggregated.ffn.split=column", arch=MIXTURE)
    assert "smollm2 is a mixture of experts, whose parts are experts; use expert, or replica" in column
    many = problem("1a9f", "pools.aggregated.ffn.split=expert", arch=MIXTURE)
    assert "9 workers for 8 experts: some would have nothing to do; lower pools.ffn.workers" in many


def test_ffn_workers_do_not_limit_the_context() -> None:
    assert placed("1p1a1f").max_context == placed("1p1d").max_context == 8192
