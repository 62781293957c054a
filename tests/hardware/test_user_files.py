"""Files of the user's own, by path: a chip of twenty lines works, and a wrong one is refused with file, line, field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from transload.errors import DeploymentError
from transload.hardware.catalog import load_chip, load_link, load_model

EXAMPLE = Path(__file__).parents[2] / "docs" / "example-chip.yaml"


def test_the_chip_file_of_the_documentation_works() -> None:
    chip = load_chip(str(EXAMPLE))
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 24
    assert chip.need("memory.hbm.bandwidth").value == 2.5e12
    assert chip.need("scale_up.bandwidth").kind == "estimate"
    assert chip.ridge_point("bf16") == pytest.approx(200)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("dense_flops:", "dense_flop:", ':5: dense_flop: no such key; did you mean "dense_flops"?'),
        ("unit: GB,", "unit: GBs,", ':11: memory[0].capacity: no such unit "GBs"; did you mean'),
        ("unit: GB,", "unit: GB/s,", ":9: memory[0]: capacity is in B/s, wanted B"),
        (
            "class: estimate",
            "class: guess",
            ':15: scale_up.bandwidth.class: no such choice "guess"; allowed: assumption, datasheet',
        ),
        ("tier: HBM", "tier: HMB", ':9: memory[0].tier: no such choice "HMB"; did you mean "HBM"?'),
        ("value: 500", "value: many", ":6: dense_flops.bf16.value: Expected `float`, got `str`"),
        ("value: 500", "value: -5", ":6: dense_flops.bf16.value: Expected `float` >= 0"),
        ("value: 500", "value: .inf", ":6: dense_flops.bf16"),
        ('source: "our contract", ', "", "price.per_hour: Object missing required field `source`"),
        ("vendor: me\n", "", "Object missing required field `vendor`"),
        ("vendor: me\n", "vendor: me\nvendor: you\n", ':4: the key "vendor" stands here twice; remove one'),
        ("vendor: me\n", "vendor: !!python/name:os.system me\n", "not valid YAML"),
        ("vendor: me\n", "vendor: &anchor me\nstatus: *anchor\n", ":3: anchors and aliases are not allowed"),
        ("vendor: me\n", "vendor: [\n", "not valid YAML"),
        ("id: my_gpu", "id: My GPU", ":1: id: Expected `str` matching regex"),
    ],
)
def test_a_wrong_chip_file_is_refused_with_file_line_and_field(
    old: str, new: str, complaint: str, tmp_path: Path
) -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert text.count(old) >= 1
    file = tmp_path / "wrong.yaml"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(DeploymentError) as caught:
        load_chip(str(file))
    assert str(caught.value).startswith(str(file))
    assert complaint in str(caught.value)


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    text = EXAMPLE.read_text(encoding="utf-8").replace("value: 500, unit: TFLOP/s", "value: 5e14, unit: FLOP/s")
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    assert load_chip(file).need("dense_flops.bf16").value == 5e14


def test_a_tier_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text(
        "id: a\nname: a\nvendor: a\nkind: gpu\nmemory:\n- {tier: HBM, technology: x}\n- {tier: HBM, technology: y}\n"
    )
    with pytest.raises(DeploymentError, match="memory has the tier HBM twice"):
        load_chip(str(file))


def test_a_link_file_of_ones_own_works(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "id: mine\nname: Mine\nkind: link\nbandwidth: {value: 10, unit: GB/s, source: iperf, class: measured}\n"
    )
    assert load_link(file).need("bandwidth").value == 1e10


@pytest.mark.parametrize("load", [load_chip, load_link, load_model])
def test_a_file_that_is_not_there_or_of_another_kind_is_refused(load: object, tmp_path: Path) -> None:
    assert callable(load)
    with pytest.raises(DeploymentError, match="no such file"):
        load("./nowhere.yaml")
    other = tmp_path / "chip.txt"
    other.write_text("x")
    with pytest.raises(DeploymentError, match=r"ends in \.yaml or \.yml or \.json"):
        load(str(other))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DeploymentError, match="not UTF-8"):
        load(str(binary))
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    with pytest.raises(DeploymentError, match="wanted a mapping"):
        load(str(empty))
    large = tmp_path / "large.yaml"
    large.write_text("#" * 300_000)
    with pytest.raises(DeploymentError, match="larger than 256 KiB"):
        load(str(large))


@pytest.mark.parametrize(
    ("load", "name", "meant"),
    [(load_chip, "h10", "h100"), (load_link, "nvlink55", "nvlink5"), (load_model, "lama-3.1-8b", "llama-3.1-8b")],
)
def test_an_unknown_name_is_refused_with_the_one_that_was_meant(load: object, name: str, meant: str) -> None:
    assert callable(load)
    with pytest.raises(DeploymentError, match=f'no such .*: {name}; did you mean "{meant}"'):
        load(name)


def test_a_hub_id_is_refused_with_the_way_to_go() -> None:
    with pytest.raises(DeploymentError, match=r"a model of the hub is read from its config\.json, by path"):
        load_model("meta-llama/Llama-3.1-8B")


def test_a_config_is_found_by_file_and_by_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    with pytest.raises(DeploymentError, match=r"no config\.json in this folder"):
        load_model(str(folder))
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 100,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for path in (folder, folder / "config.json"):
        card = load_model(str(path))
        assert (card.id, card.hidden_size, card.precision.attention) == ("my-model", 64, "float16")
        assert card.provenance.source == (str(folder / "config.json"),)


def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path) -> None:
    for text in ("[1]", "{", "{'a': 1}"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DeploymentError, match="not a JSON object"):
            load_model(str(tmp_path))
