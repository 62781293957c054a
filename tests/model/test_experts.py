"""Mixtures of experts: files in every form, routers, and a layer that several workers compute, bit for bit."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.model.stepping import arch_of, stepper_of, tensors_of
from tests.model.test_llama import assert_greedy, oracle_of, prompt_of
from tests.model.tiny_models import MIXTURES, saved, tiny_model
from transload.arch import Experts, ModelArch
from transload.control.expert_map import build_expert_map, num_experts_by_layer
from transload.deploy.spec import ModelSpec
from transload.errors import CheckpointError
from transload.hardware.model_card import Provenance
from transload.hardware.model_config import read_config
from transload.hardware.model_facts import count_parameters
from transload.model.build import WeightSource, build_feed_forward
from transload.model.checkpoint import load_tensors
from transload.model.expert_tensors import dequantised
from transload.model.experts import Combine, ExpertLayer, Groups, Router, Routing, weighted_sum
from transload.model.inventory import expected_shapes, expert_of, is_feed_forward
from transload.model.linear import Linear, TileProof
from transload.model.source import ModelFiles, locate

CPU = torch.device("cpu")
PROOF = TileProof()


def at(folder: Path, **spec: Any) -> ModelFiles:
    return locate(ModelSpec(path=str(folder), **spec))


def assert_loads(files: ModelFiles, oracle: Any) -> None:
    loaded, wanted = load_tensors(files, torch.float32), tensors_of(oracle, files.arch)
    assert loaded.keys() == wanted.keys() == expected_shapes(files.arch).keys()
    for name, tensor in wanted.items():
        assert torch.equal(loaded[name], tensor), name


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "60KB"}, {"save_original_format": False}], ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_a_folder_loads_what_transformers_saved(name: str, how: dict[str, Any], tmp_path: Path) -> None:
    oracle = tiny_model(name)
    files = at(saved(oracle, tmp_path, **how))
    assert_loads(files, oracle)
    num_parameters = sum(parameter.numel() for parameter in oracle.parameters())
    assert files.arch.num_parameters() == num_parameters
    assert files.weights_bytes == 4 * num_parameters


@pytest.mark.parametrize("name", MIXTURES)
def test_the_catalog_counts_the_same_parameters(name: str) -> None:
    oracle = tiny_model(name)
    arch = arch_of(oracle)
    provenance = Provenance(source=("test",), kind="measured")
    card = read_config(oracle.config.to_dict(), model_id="m", name="m", provenance=provenance, where="config.json")
    count = count_parameters(card)
    assert (arch.num_parameters(), arch.num_active_parameters()) == (count.total, count.active)
    assert arch.num_active_parameters() < arch.num_parameters() - arch.vocab_size * arch.hidden_size


def packed(matrix_NOI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Some MXFP4 blocks and scales of the matrix's shape."""
    num_experts, outputs, inputs = matrix_NOI.shape
    generator = torch.Generator().manual_seed(outputs)
    blocks = torch.randint(0, 256, (num_experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 126, (num_experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
    return blocks, scales


def save_as_mxfp4(oracle: Any, folder: Path) -> None:
    """As OpenAI publishes gpt-oss: the experts' matrices packed, blocks in one file and scales in another. The oracle
    gets the weights that transformers makes of them."""
    saved(oracle, folder)
    tensors = load_file(folder / "model.safetensors")
    scales_alone = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales = packed(tensors.pop(name).transpose(1, 2))
        tensors[f"{name}_blocks"], scales_alone[f"{name}_scales"] = blocks, scales
        oracle.get_parameter(name).data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    save_file(scales_alone, folder / "scales.safetensors")
    save_file(tensors, folder / "blocks.safetensors")
    weight_map = dict.fromkeys(tensors, "blocks.safetensors") | dict.fromkeys(scales_alone, "scales.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))


def test_mxfp4_experts_are_unpacked_as_transformers_unpacks_them(tmp_path: Path) -> None:
    oracle = tiny_model("gpt_oss")
    save_as_mxfp4(oracle, tmp_path)
    files = at(tmp_path)
    assert_loads(files, oracle)
    assert files.expert_form == "mxfp4"
    half = load_tensors(files, torch.bfloat16)
    matrix = load_tensors(files, torch.float32)["model.layers.1.mlp.experts.2.down_proj.weight"]
    assert torch.equal(half["model.layers.1.mlp.experts.2.down_proj.weight"].float(), matrix)  # nothing was rounded


def test_every_byte_of_mxfp4_means_what_the_standard_says() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    values = dequantised(blocks, torch.full((1, 16), 128, dtype=torch.uint8)).view(256, 2)
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for byte in range(256):
        for half, code in zip(values[byte].tolist(), (byte & 15, byte >> 4), strict=True):
            assert half == 2 * magnitudes[code & 7] * (-1 if code & 8 else 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("model.layers.0.mlp.experts.gate_up_proj_scales"), "gate_up_proj_scales.*missing"),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.down_proj_blocks": torch.zeros(4, 64, 3, 16)}),
            "F32, wanted U8",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.uint8)}),
            "norm.weight.*U8, wanted a flo",
        ),
    ],
)
def test_packed_files_that_are_not_what_they_should_be_are_refused(change: Any, says: str, tmp_path: Path) -> None:
    save_as_mxfp4(tiny_model("gpt_oss"), tmp_path)
    tensors = load_file(tmp_path / "blocks.safetensors") | load_file(tmp_path / "scales.safetensors")
    change(tensors)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "blocks.safetensors").unlink()
    (tmp_path / "scales.safetensors").unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=says):
        at(tmp_path)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"num_experts_per_tok": 9}, "9 experts per token, but only 4"),
    ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0"),
    ("mixtral", {"quantization_config": {"quant_method": "mxfp4"}}, "quantised safetensors"),
    ("gpt_oss", {"quantization_config": {"quant_method": "awq"}}, "quantised safetensors"),
    ("gpt_oss", {"swiglu_limit": -1}, "swiglu_limit is -1"),
    ("qwen3_moe", {"mlp_only_layers": "0"}, "mlp_only_layers"),
    ("qwen3_moe", {"num_local_experts": 7}, r"experts\.6.*missing"),
    ("qwen3_moe", {"num_local_experts": 5}, r"mlp\.gate\.weight.*\[6, 64\], wanted \[5, 64\]"),
    ("qwen3_moe", {"moe_intermediate_size": 32}, r"\[48, 64\], wanted \[32, 64\]"),
    ("qwen3_moe", {"model_type": "qwen2_moe"}, "model_type is 'qwen2_moe'"),
]


@pytest.mark.parametrize(("name", "keys", "says"), REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(name: str, keys: dict[str, Any], says: str, tmp_path: Path) -> None:
    saved(tiny_model(name), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises(CheckpointError, match=says):
        at(tmp_path)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_worker_can_load_its_own_experts_alone(name: str, tmp_path: Path) -> None:
    oracle = tiny_model(name)
    files = at(saved(oracle, tmp_path))
    everything = tensors_of(oracle, files.arch)

    def is_mine(name: str) -> bool:
        return is_feed_forward(name) and expert_of(name) in (None, 1)

    loaded = load_tensors(files, torch.float32, is_mine)
    assert loaded.keys() == {name for name in everything if is_mine(name)}
    assert all(torch.equal(tensor, everything[name]) for name, tensor in loaded.items())
    assert not any("router" in name or "gate.weight" in name for name in loaded)
    dummy = at(tmp_path, load_format="dummy")
    whole, part = load_tensors(dummy, torch.float32), load_tensors(dummy, torch.float32, is_mine)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())


# ---------------------------------------------------------------------------------------------------------------------
# Routing and sums


def routed(**how: Any) -> tuple[Routing, torch.Tensor]:
    """A routing of random rows, and the logits it was made from."""
    generator = torch.Generator().manual_seed(0)
    gate, hidden = torch.randn(8, 16, generator=generator), torch.randn(50, 16, generator=generator)
    experts = Experts(num_experts=8, per_token=3, intermediate_size=4, **how)
    return Router(Linear(gate, None, None), experts)(hidden), hidden @ gate.t()


@pytest.mark.parametrize("how", [{}, {"normalised": False}, {"scores": "chosen"}])
def test_each_row_goes_through_its_likeliest_experts(how: dict[str, Any]) -> None:
    routing, logits = routed(**how)
    for row in range(50):
        order = logits[row].argsort(descending=True)[:3]
        assert routing.ids[row].tolist() == order.tolist()
        share = logits[row].softmax(-1)[order]
        want = share if how == {"normalised": False} else share / share.sum()
        torch.testing.assert_close(routing.weights[row], want)


def test_a_router_counts_what_it_chooses() -> None:
    generator = torch.Generator().manual_seed(0)
    router = Router(
        Linear(torch.randn(8, 16, generator=generator), None, None),
        Experts(num_experts=8, per_token=3, intermediate_size=4),
    )
    chosen = torch.cat([router(torch.randn(rows, 16, generator=generator)).ids.reshape(-1) for rows in (1, 50)])
    assert router.num_chosen is not None
    assert router.num_chosen.tolist() == torch.bincount(chosen, minlength=8).tolist()


def test_slots_are_grouped_by_expert_in_the_order_of_rows() -> None:
    groups = Groups(torch.tensor([[3, 0], [0, 5], [3, 5]]))
    assert groups.pieces == ((0, 2), (3, 2), (5, 2))
    assert groups.places.tolist() == [1, 2, 0, 4, 3, 5]
    assert groups.rows.tolist() == [0, 1, 0, 2, 1, 2]
    assert groups.slices() == {0: slice(0, 2), 3: slice(2, 4), 5: slice(4, 6)}
    assert Groups(torch.empty(0, 2, dtype=torch.int64)).pieces == ()


def test_a_sum_of_slots_does_not_depend_on_the_other_rows() -> None:
    slots, weights = torch.randn(100 * 5, 37), torch.rand(100, 5)
    together = weighted_sum(slots, weights)
    alone = [weighted_sum(slots[5 * row : 5 * row + 5], weights[row : row + 1]) for row in range(100)]
    assert torch.equal(together, torch.cat(alone))
    torch.testing.assert_close(together, (slots.view(100, 5, 37) * weights[..., None]).sum(1))


def test_only_the_chosen_experts_are_computed() -> None:
    asked: list[tuple[int, int]] = []

    def expert(number: int) -> Any:
        def compute(rows: torch.Tensor) -> torch.Tensor:
            asked.append((number, len(rows)))
            return rows * number

        return compute

    layer = ExpertLayer({number: expert(number) for number in range(64)})
    routing = Routing(torch.tensor([[60, 2, 7, 33]]), torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    got = layer(torch.ones(1, 8), routing)
    assert asked == [(2, 1), (7, 1), (33, 1), (60, 1)]
    torch.testing.assert_close(got, torch.full((1, 8), 60 * 0.4 + 2 * 0.3 + 7 * 0.2 + 33 * 0.1))


# ---------------------------------------------------------------------------------------------------------------------
# A layer that several workers compute


def built(arch: ModelArch, tensors: dict[str, torch.Tensor], dtype: torch.dtype, experts: Sequence[int]) -> Any:
    """Layer 1 with these experts alone, from their tensors alone."""
    mine = {name: tensor for name, tensor in tensors.items() if ".layers.1.mlp." in name and expert_of(name) in experts}
    layer = build_feed_forward(WeightSource(arch, mine, dtype, CPU, PROOF), 1, experts)
    assert not mine
    return layer


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_layer_split_over_workers_has_the_bits_of_the_whole(name: str, dtype: torch.dtype) -> None:
    oracle = oracle_of(name, dtype)
    arch = arch_of(oracle)
    model = stepper_of(oracle, dtype=dtype, deterministic=True).executor._model
    experts, rng = arch.experts, random.Random(0)
    assert experts is not None
    for num_workers, num_replicas in ((1, 0), (2, 0), (2, 3), (3, 0)):
        placed = build_expert_map(num_experts_by_layer(arch), num_workers, num_replicas=num_replicas)
        workers = [
            built(arch, tensors_of(oracle, arch), dtype, placed.experts_of(worker, 1)) for worker in range(num_workers)
        ]
        for num_rows in (1, 2, 7, 40):
            hidden = torch.randn(num_rows, arch.hidden_size, dtype=dtype)
            router = model.attention.layers[1]._router
            assert router is not None
            routing = router(hidden)
            whole = model.feed_forwards[1](hidden, routing)
            groups, combine = Groups(routing.ids), Combine(routing, hidden)
            pieces = list(groups.pieces)
            rng.shuffle(pieces)  # answers come in any order, from any owner
            for expert, count in pieces:
                owner = rng.choice(placed.owners[1][expert])
                part = groups.slices()[expert]
                assert not combine.is_complete
                combine.put(groups.places[part], workers[owner].compute(((expert, count),), hidden[groups.rows[part]]))
            assert torch.equal(combine.result(), whole)


def test_batches_of_a_mixture_are_decoded_in_any_company() -> None:
    """Requests come and go between steps; each goes on as if alone."""
    oracle = oracle_of("qwen3_moe")
    stepper = stepper_of(oracle)
    running = [stepper.add(prompt_of(length), max_tokens=20) for length in (3, 40, 90)]
    stepper.prefill(running[0])
    stepper.prefill(running[1], 16)
    stepper.step((running[0], 1), (running[2], 64), (running[1], 1))
    stepper.step((running[2], None), (running[0], 1))
    for _ in range(5):
        stepper.step(*((one, 1) for one in running))
    for one in running:
        assert_greedy(oracle, one)
