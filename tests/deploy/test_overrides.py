"""`--set` and flags: what they change, and that their errors name them."""

from __future__ import annotations

from pathlib import Path

import pytest

from transload.deploy.overrides import flag_override, parse_override
from transload.deploy.resolve import resolve
from transload.deploy.spec import Deployment
from transload.errors import DeploymentError


def with_set(*changes: str, topology: str = "1p1d") -> Deployment:
    return resolve(topology=topology, overrides=[parse_override(change) for change in changes])


def refusal(*changes: str) -> str:
    with pytest.raises(DeploymentError) as error:
        with_set(*changes)
    return str(error.value)


def test_a_list_item_is_found_by_its_name_its_index_or_a_star() -> None:
    deployment = with_set("pools.decode.workers=2", "pools.0.threads=3", "pools[1].threads=4", "pools.*.block_size=32")
    prefill, decode = deployment.pools
    assert (prefill.workers, prefill.threads, prefill.block_size) == (1, 3, 32)
    assert (decode.workers, decode.threads, decode.block_size) == (2, 4, 32)


def test_parts_that_a_file_leaves_out_can_be_set() -> None:
    deployment = with_set("server.port=0", "targets.ttft=200 ms", "model.dtype=float32", "seed=5")
    assert (deployment.server.port, deployment.targets.ttft_seconds) == (0, 0.2)
    assert (deployment.model.dtype, deployment.seed) == ("float32", 5)


def test_lists_and_mappings_can_be_set_whole() -> None:
    deployment = with_set("links=[{between: [prefill, decode], transport: tcp}]", "pools.decode.limits={max_batch: 2}")
    assert deployment.links[0].transport == "tcp"
    assert deployment.pools[1].limits.max_batch == 2


def test_a_later_change_wins() -> None:
    assert with_set("seed=1", "seed=2").seed == 2


def test_a_value_may_hold_an_equals_sign_and_numbers_stay_as_written_where_text_is_wanted() -> None:
    deployment = with_set("server.api_keys=[a=b]", "model.revision=0123")
    assert (deployment.server.api_keys, deployment.model.revision) == (("a=b",), "0123")


def test_setting_null_takes_back_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("model: {max_context: 77}\npools: [{name: a, role: aggregated}]\n")
    assert resolve(file, overrides=[parse_override("model.max_context=null")]).model.max_context is None


def test_changing_an_aliased_part_changes_that_part_only(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "pools:\n- {name: a, role: aggregated, limits: &l {max_batch: 3}}\n- {name: b, role: aggregated, limits: *l}\n"
    )
    deployment = resolve(file, overrides=[parse_override("pools.b.limits.max_batch=4")])
    assert [pool.limits.max_batch for pool in deployment.pools] == [3, 4]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("pools.decod.workers=2", 'no such item "decod"; did you mean "decode"? there are: prefill, decode, 0, 1'),
        ("pools.2.workers=2", 'no such item "2"'),
        ("pools.decode.wokers=2", 'pools[1].wokers: no such key; did you mean "workers"?'),
        ("pools.decode.workers=two", 'pools[1].workers = "two": wanted a whole number from 1 to 1024'),
        ("pools.decode.role=decoder", 'pools[1].role = "decoder": no such role; did you mean "decode"?'),
        ("serve.port=1", 'serve: no such key; did you mean "server"?'),
        ("pools.decode.name.x=1", "pools[1].name: a single value: nothing can be set inside it"),
        ("links.0.transport=tcp", "links = {0: ...}: wanted a list"),
        ("server.api_keys=[a", "not valid YAML"),
        ("model.path=", "model.path: no value; wanted text"),
        ("pools.decode.block_size=32", 'pool "prefill" has 16'),
        ("pools", "wanted PATH=VALUE, such as --set pools.decode.workers=2"),
        ("=3", "wanted PATH=VALUE"),
        ("a b=3", "wanted PATH=VALUE"),
    ],
)
def test_a_wrong_change_is_refused_naming_the_flag(change: str, complaint: str) -> None:
    message = refusal(change)
    assert message.startswith(f"--set {change}: ")
    assert complaint in message


def test_errors_of_the_file_still_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("pools:\n- name: a\n  role: agregated\n")
    with pytest.raises(DeploymentError) as error:
        resolve(file, overrides=[parse_override("seed=1")])
    assert str(error.value).startswith(f"{file}:3: pools[0].role")


def test_a_flag_that_is_no_yaml_is_taken_as_it_is() -> None:
    override = flag_override("model.path", "null", "--model null")
    assert resolve(overrides=[override]).model.path == "null"


def test_a_file_and_a_shorthand_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="give one of the two"):
        resolve(tmp_path / "x.yaml", "1p1d")


def test_a_shorthand_in_the_place_of_a_file_is_refused_with_the_flag_to_use() -> None:
    with pytest.raises(DeploymentError, match="say --topology 2p1d"):
        resolve(Path("2p1d"))
