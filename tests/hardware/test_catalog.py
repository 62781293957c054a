"""The files that ship: every one loads, every number has its source and class, nothing contradicts itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from transload.errors import DeploymentError
from transload.hardware.catalog import (
    chip_names,
    link_names,
    load_chip,
    load_link,
    load_model,
    model_names,
    sources,
)
from transload.hardware.chip import Chip
from transload.hardware.link import LinkKind
from transload.hardware.quantity import Quantity


def everything() -> Iterator[Chip | LinkKind]:
    yield from (load_chip(name) for name in chip_names())
    yield from (load_link(name) for name in link_names())


def all_quantities() -> Iterator[tuple[str, Quantity]]:
    for described in everything():
        for path, quantity in described.quantities():
            yield f"{described.id}.{path}", quantity
    for name in model_names():
        for path, quantity in load_model(name).published.quantities_by_name():
            yield f"{name}.{path}", quantity


def test_the_catalog_has_what_the_article_compares() -> None:
    assert {"b200_sxm", "gb200", "rubin_r200", "rubin_cpx", "trainium2", "trainium3"} <= set(chip_names())
    assert {"cerebras_wse3", "sn50", "groq3_lp30", "h100_sxm", "a100_80g_sxm"} <= set(chip_names())
    assert {"efa_v3_trn2", "cs3_io", "lpx_c2c", "nvlink5", "eth400", "pcie5x16", "3fs_cluster"} <= set(link_names())
    assert {"deepseek-v3", "llama-3.1-70b", "qwen3-235b-a22b", "gpt-oss-120b", "step-3"} <= set(model_names())
    assert (len(chip_names()), len(link_names()), len(model_names())) == (26, 41, 20)


def test_every_file_is_called_after_its_id() -> None:
    for name in chip_names():
        assert load_chip(name).id == name
    for name in link_names():
        assert load_link(name).id == name
    for name in model_names():
        assert load_model(name).id == name


def test_every_number_names_sources_that_are_listed_and_a_class_that_is_not_an_assumption() -> None:
    known = set(sources())
    for path, quantity in all_quantities():
        assert quantity.sources, path
        assert set(quantity.sources) <= known, path
        assert quantity.kind != "assumption", path
        for conflict in quantity.conflicts:
            assert conflict.source in known, path
    for name in model_names():
        card = load_model(name)
        assert set(card.provenance.source) <= known
        assert {doubt.source for doubt in card.doubts} <= known


def test_every_source_is_used_and_says_what_it_is() -> None:
    used = {key for _, quantity in all_quantities() for key in quantity.sources}
    used |= {conflict.source for _, quantity in all_quantities() for conflict in quantity.conflicts}
    for name in model_names():
        card = load_model(name)
        used |= {*card.provenance.source, *(doubt.source for doubt in card.doubts)}
    assert set(sources()) == used
    assert all(source.title and source.licence for source in sources().values())


def test_numbers_from_memory_or_without_a_source_are_marked_weak() -> None:
    for path, quantity in all_quantities():
        if "UNSOURCED" in quantity.sources:
            assert (quantity.kind, quantity.confidence) == ("estimate", "low"), path


def test_every_price_is_an_estimate() -> None:
    prices = [(path, quantity) for path, quantity in all_quantities() if ".price." in path or path.endswith("purchase")]
    assert len(prices) > 15
    assert {quantity.kind for _, quantity in prices} == {"estimate"}


def test_names_and_aliases_mean_one_thing_each() -> None:
    for names, load in ((chip_names(), load_chip), (link_names(), load_link), (model_names(), load_model)):
        taken: list[str] = []
        for name in names:
            taken += [name, *load(name).aliases]
        assert len(taken) == len(set(taken))


@pytest.mark.parametrize(
    ("alias", "chip"),
    [
        ("b200", "b200_sxm"),
        ("H100", "h100_sxm"),
        ("cs-3", "cerebras_wse3"),
        ("lp30", "groq3_lp30"),
        ("trn3", "trainium3"),
    ],
)
def test_a_chip_is_found_by_its_usual_name(alias: str, chip: str) -> None:
    assert load_chip(alias).id == chip


def test_links_that_chips_name_are_in_the_catalog() -> None:
    for name in chip_names():
        chip = load_chip(name)
        for link in (chip.scale_up, chip.scale_out, chip.host_link):
            if link.link:
                assert link.link in link_names(), f"{name}: {link.link}"


def test_what_is_said_to_be_unknown_is_a_slot_and_empty() -> None:
    for described in everything():
        for entry in described.unknown:
            missing = [path for path in described.missing() if f"{path}.".startswith(f"{entry.quantity}.")]
            assert missing, f"{described.id}: {entry.quantity} is known, or no quantity"


def test_dense_and_sparse_peaks_are_kept_apart() -> None:
    rubin = load_chip("rubin_r200")
    assert rubin.need("dense_flops.fp4").value == 35e15
    assert rubin.need("sparse_flops.fp4").value == 50e15
    for name in chip_names():
        chip = load_chip(name)
        for number_format in chip.dense_flops.__struct_fields__:
            dense, sparse = (getattr(peaks, number_format) for peaks in (chip.dense_flops, chip.sparse_flops))
            if dense is not None and sparse is not None:
                assert dense.value < sparse.value


@pytest.mark.parametrize("chip", ["cerebras_wse3", "rubin_cpx"])
def test_a_headline_without_a_convention_is_no_dense_peak(chip: str) -> None:
    assert load_chip(chip).dense_flops == type(load_chip(chip).dense_flops)()
    assert any(path.startswith("headline_flops") for path, _ in load_chip(chip).quantities())


def test_published_values_are_stored_to_the_digit() -> None:
    """Literal values, so that a slip in a unit or an exponent shows."""
    expected = {
        ("b200_sxm", "memory.hbm.bandwidth"): 7.7e12,
        ("b200_sxm", "memory.hbm.capacity"): 193_273_528_320,
        ("a100_80g_sxm", "memory.hbm.bandwidth"): 2_039_000_000_000,
        ("cerebras_wse3", "memory.sram.capacity"): 44e9,
        ("cerebras_wse3", "memory.sram.bandwidth"): 21e15,
        ("groq3_lp30", "memory.sram.capacity"): 500e6,
        ("groq3_lp30", "memory.sram.bandwidth"): 150e12,
        ("groq3_lp30", "scale_up.latency"): 350e-9,
        ("sn50", "memory.ddr.bandwidth"): 100e9,
        ("trainium2", "scale_out.bandwidth"): 25e9,
        ("h100_sxm", "scale_up.bandwidth"): 450e9,
        ("gb200", "power.all_in"): 2100,
    }
    assert {key: load_chip(key[0]).need(key[1]).value for key in expected} == pytest.approx(expected, rel=1e-12)
    assert load_link("nvlink5").need("measured_bandwidth").value == 726e9
    assert load_link("eth400").need("bandwidth").value == 50e9


def test_conflicts_are_kept_beside_the_number_in_use() -> None:
    conflicts = load_chip("b200").need("scale_out.bandwidth").conflicts
    assert [(conflict.value, conflict.source) for conflict in conflicts] == [(100e9, "AIC")]
    assert [conflict.value for conflict in load_chip("wse3").need("memory.sram.bandwidth").conflicts] == [21.6e15]


def test_three_tiers_hold_what_belongs_in_them() -> None:
    chip = load_chip("sn50")
    assert {content: chip.tier_for(content).tier for content in ("activations", "weights", "prefixes")} == {
        "activations": "SRAM",
        "weights": "HBM",
        "prefixes": "DDR",
    }


def test_a_content_that_no_tier_may_hold_is_refused_by_name() -> None:
    with pytest.raises(DeploymentError, match="h100_sxm: no memory tier may hold prefixes"):
        load_chip("h100").tier_for("prefixes")


def test_the_ridge_point_is_peak_over_bandwidth() -> None:
    assert load_chip("h100").ridge_point("bf16") == pytest.approx(989e12 / 3.35e12)
    assert load_chip("trn2").ridge_point("fp8") == pytest.approx(1299e12 / 2.9e12)


def test_sixteen_bit_formats_stand_for_each_other() -> None:
    groq = load_chip("groq_v1")
    assert groq.peak("bf16").value == 188e12
    with pytest.raises(DeploymentError, match=r"groq_v1: dense_flops\.fp8 is unknown: the chip has no FP8"):
        groq.peak("fp8")
