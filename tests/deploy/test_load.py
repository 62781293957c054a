"""Deployment files: what is read, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transload.deploy.load import load, loads, to_yaml
from transload.deploy.spec import (
    Deployment,
    Limits,
    Link,
    ModelSpec,
    Pool,
    Router,
    Server,
    Targets,
)
from transload.errors import DeploymentError

PAIR = """\
pools:
  - name: prefill
    role: prefill
  - name: decode
    role: decode
"""


def refusal(text: str, name: str = "pd.yaml") -> str:
    with pytest.raises(DeploymentError) as error:
        loads(text, name)
    return str(error.value)


def test_a_file_becomes_the_deployment_it_describes(tmp_path: Path) -> None:
    file = tmp_path / "pd.yaml"
    file.write_text(
        """\
        model: {path: ./m, dtype: float32, deterministic: true, max_context: 2048}
        pools:
          - {name: p, role: prefill, workers: 2, threads: 3, cores: [0, 1], memory: 1 GiB}
          - name: d
            role: decode
            cores: any
            limits: {max_batch: 8, step_tokens: 64}
        links:
          - {between: [p, d], transport: tcp, lease: 500 ms}
        targets: {ttft: 2 s, tpot: 50 ms, attainment: 0.9}
        router: {policy: round_robin}
        server: {port: 0, api_keys: [abc], request_timeout: 1 min, max_body: 512 KiB}
        seed: 7
        """
    )
    assert load(file) == Deployment(
        model=ModelSpec(path="./m", dtype="float32", deterministic=True, max_context=2048),
        pools=(
            Pool(name="p", role="prefill", workers=2, threads=3, cores=(0, 1), memory_bytes=2**30),
            Pool(name="d", role="decode", cores="any", limits=Limits(max_batch=8, step_tokens=64)),
        ),
        links=(Link(between=("p", "d"), transport="tcp", lease_seconds=0.5),),
        targets=Targets(ttft_seconds=2.0, tpot_seconds=0.05, attainment=0.9),
        router=Router(policy="round_robin"),
        server=Server(port=0, api_keys=("abc",), request_timeout_seconds=60.0, max_body_bytes=512 * 1024),
        seed=7,
    )


def test_the_whole_message_names_file_line_path_value_guess_and_choices() -> None:
    text = "pools:\n  - name: decode\n    role: prefil\n"
    assert refusal(text, "deployments/pd.yaml") == (
        'deployments/pd.yaml:3: pools[0].role = "prefil": no such role; did you mean "prefill"? '
        "allowed: aggregated, decode, ffn, prefill"
    )


def test_an_unknown_key_is_refused_on_its_own_line_with_the_keys_there_are() -> None:
    message = refusal(PAIR + "    wokers: 2\n")
    assert message.startswith('pd.yaml:6: pools[1].wokers: no such key; did you mean "workers"? allowed: name, role, ')
    assert "memory_bytes" not in message


def test_internal_field_names_are_no_keys() -> None:
    assert "pools[1].memory_bytes: no such key" in refusal(PAIR + "    memory_bytes: 5\n")


@pytest.mark.parametrize(
    ("addition", "complaint"),
    [
        ("    workers: 0", "pd.yaml:6: pools[1].workers = 0: wanted a whole number from 1 to 1024"),
        ("    workers: two", 'pools[1].workers = "two": wanted a whole number'),
        ("    workers: 1.5", "pools[1].workers = 1.5: wanted a whole number"),
        ("    workers: true", "pools[1].workers = true: wanted a whole number"),
        ("    workers: [1]", "pools[1].workers = [1]: wanted a whole number"),
        ("    workers:", "pools[1].workers: no value; wanted a whole number from 1 to 1024, or leave the key out"),
        ("    threads: 0", "pools[1].threads = 0: wanted a whole number from 1"),
        ("    block_size: 24", "pools[1].block_size = 24: not a power of two; allowed: 1, 2, 4, 8"),
        ("    block_size: 512", "pools[1].block_size = 512: wanted a whole number from 1 to 256"),
        ("    block_size: 32", 'pool "prefill" has 16; prefix keys and handoffs count in blocks'),
        ("    memory: 4G", 'pools[1].memory = "4G": has no unit known here ("G"); say whether you mean 4 GiB or 4 GB'),
        ("    memory: 0", "pools[1].memory = 0: wanted a size such as"),
        ("    device: gpu", 'pools[1].device = "gpu": wanted cpu, cuda or cuda:N'),
        ("    cores: [0, 0]", "pools[1].cores = [0, 0]: names a core twice"),
        ("    cores: [-1]", "pools[1].cores[0] = -1: wanted a whole number from 0"),
        ("    cores: []", "pools[1].cores: an empty list"),
        ("    cores: some", 'pools[1].cores = "some": wanted a list'),
        ("    cores: 1", "pools[1].cores = 1: wanted a list"),
        ("    limits: 5", "pools[1].limits = 5: wanted a mapping with keys of max_batch, step_tokens"),
        ("    limits:", "pools[1].limits: empty; keys that can stand here: max_batch, step_tokens"),
        ("targets: {attainment: 1.5}", "targets.attainment = 1.5: wanted a number above 0 and at most 1"),
        ("targets: {attainment: 0}", "targets.attainment = 0: wanted a number above 0"),
        ("targets: {attainment: .nan}", "targets.attainment = .nan: wanted a number"),
        ("targets: {ttft: 3 weeks}", 'targets.ttft = "3 weeks": has no unit known here ("weeks")'),
        ("targets: {tpot: 0}", "targets.tpot = 0: wanted a duration"),
        ("targets: {ttft: .inf}", "targets.ttft = .inf: wanted a duration"),
        ("server: {port: 65536}", "server.port = 65536: wanted a whole number from 0 to 65535"),
        ("server: {port: -1}", "server.port = -1: wanted"),
        ("server: {api_keys: ['']}", 'server.api_keys[0] = "": empty text'),
        ("server: {api_keys: abc}", 'server.api_keys = "abc": wanted a list, each item text'),
        ("server: {max_waiting: 0}", "server.max_waiting = 0: wanted a whole number from 1"),
        ("model: {deterministic: maybe}", 'model.deterministic = "maybe": wanted true or false'),
        ("model: {path: true}", "model.path = true: wanted text; put it in quotes if it is meant as text"),
        ("model: {dtype: fp16}", 'model.dtype = "fp16": no such dtype'),
        ("model: smollm2", 'model = "smollm2": wanted a mapping'),
        ("router: {policy: Estimate}", 'no such policy; did you mean "estimate"?'),
        ("links: [{between: [prefill, decod]}]", 'links[0].between[1] = "decod": no such pool; did you mean "decode"?'),
        ("links: [{between: [prefill]}]", 'links[0].between = ["prefill"]: wanted a list of 2'),
        ("links: [{transport: tcp}]", 'links[0]: the key "between" is missing: a list of 2'),
        ("links: [{between: [decode, decode]}]", "nothing crosses between them"),
        ("seed: -1", "seed = -1: wanted a whole number from 0"),
        ("serve: {}", 'pd.yaml:6: serve: no such key; did you mean "server"?'),
    ],
)
def test_a_wrong_value_is_refused_by_name(addition: str, complaint: str) -> None:
    message = refusal(PAIR + addition + "\n")
    assert complaint in message
    assert message.startswith("pd.yaml:")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "pd.yaml:1: the file: empty; keys that can stand here: model, pools"),
        ("# nothing\n", "the file: empty"),
        ("just words", 'the file = "just words": wanted a mapping'),
        ("seed: 1", 'the file: the key "pools" is missing: a list'),
        ("pools: []", "pools: an empty list; at least 1 needed"),
        ("pools: [{name: a}]", 'pools[0]: the key "role" is missing: one of aggregated, decode, ffn, prefill'),
        ("pools: [{name: A_b, role: aggregated}]", 'pools[0].name = "A_b": wanted small letters, digits and hyphens'),
        ("pools: [{name: p, role: prefill}]", "no pool has role decode to take over from it"),
        ("pools: [{name: d, role: decode}]", "no pool has role prefill to prefill for it; add one, or give this pool"),
        (
            "pools: [{name: p, role: prefill}, {name: a, role: aggregated}]",
            'pools[0].role = "prefill": no pool has role decode',
        ),
        (
            "pools:\n- {name: a, role: aggregated}\n- {name: a, role: aggregated}\n",
            'pd.yaml:3: pools[1].name = "a": pools[0] has this name already',
        ),
        (
            "pools: [{name: a, role: aggregated, ffn: {pool: f}}]",
            'pools[0].ffn.pool = "f": no such pool; pools of role ffn: none',
        ),
        (
            "pools: [{name: a, role: aggregated, ffn: {pool: b}}, {name: b, role: aggregated}]",
            'pools[0].ffn.pool = "b": has role aggregated, not ffn',
        ),
        (
            "pools: [{name: a, role: aggregated}, {name: f, role: ffn}]",
            'pools[1].role = "ffn": no pool sends its feed-forwards here; set ffn: {pool: f}',
        ),
        (
            "pools: [{name: f, role: ffn, ffn: {pool: f}}]",
            "pools[0].ffn: a pool of role ffn does not decode",
        ),
        (
            "pools: [{name: a, role: aggregated, ffn: {pool: f}}, {name: f, role: ffn, memory: 1 GiB}]",
            "FFN workers have no KV cache",
        ),
        (
            "model: {deterministic: true}\n"
            "pools: [{name: a, role: aggregated, ffn: {pool: f, split: column}}, {name: f, role: ffn}]",
            'pools[0].ffn.split = "column": the sum of partial results has other bits',
        ),
        (
            "pools: [{name: a, role: aggregated, ffn: {pool: f, split: column}}, {name: f, role: ffn},\n"
            " {name: b, role: aggregated, ffn: {pool: f}}]",
            'pool "a" uses the same FFN workers with split column',
        ),
    ],
)
def test_a_deployment_that_cannot_work_is_refused(text: str, complaint: str) -> None:
    assert complaint in refusal(text)


def test_the_same_two_pools_are_not_linked_twice() -> None:
    links = "links: [{between: [prefill, decode]}, {between: [decode, prefill]}]\n"
    assert "links[1].between = [decode, prefill]: links[0] joins them already" in refusal(PAIR + links)


def test_aggregated_and_split_pools_may_stand_side_by_side() -> None:
    deployment = loads(PAIR + "  - {name: both, role: aggregated}\n")
    assert [pool.role for pool in deployment.pools] == ["prefill", "decode", "aggregated"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("pools: [", "pd.yaml:1: not valid YAML"),
        ("pools:\n\t- x", "pd.yaml:2: not valid YAML"),
        ("a: \x00", "pd.yaml: not valid YAML"),
        (PAIR + "seed: 1\nseed: 2\n", 'pd.yaml:7: the key "seed" is given twice, first at pd.yaml:6; remove one'),
        (PAIR + "seed: !!python/object/apply:os.getcwd []\n", "is not allowed"),
        (PAIR + "seed: !secret 3\n", "pd.yaml:6: the tag !secret is not allowed"),
        (PAIR + "---\nseed: 1\n", "a second document (---) begins here"),
        (PAIR + "model: *elsewhere\n", "*elsewhere refers to nothing above it"),
        (PAIR + "model: &m {path: *m}\n", "*m refers to nothing above it"),
        (PAIR + "{a: 1}: 2\n", "a key must be a word"),
        ("pools: " + "[" * 100_000, "nested more than 12 deep"),
        ("seed: " + "1" * 300_000, "larger than 256 KiB"),
        ("pools: [" + "1, " * 30_000 + "]", "more than 20000 values"),
    ],
)
def test_yaml_that_is_broken_or_hostile_is_refused(text: str, complaint: str) -> None:
    assert complaint in refusal(text)


def test_aliases_that_multiply_are_refused_before_they_are_filled_in() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    assert "values once *a" in refusal("\n".join(levels))


def test_an_alias_repeats_what_it_names() -> None:
    deployment = loads("pools:\n- {name: a, role: aggregated, limits: &l {max_batch: 3}}\n"
                       "- {name: b, role: aggregated, limits: *l}\n")  # fmt: skip
    assert [pool.limits.max_batch for pool in deployment.pools] == [3, 3]


def test_words_that_old_yaml_takes_for_truth_values_are_text() -> None:
    deployment = loads("model: {path: yes, revision: 0123}\npools: [{name: on, role: aggregated}]\n")
    assert (deployment.model.path, deployment.model.revision, deployment.pools[0].name) == ("yes", "0123", "on")


def test_a_missing_file_is_refused_with_the_file_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / "2p1d.yaml").write_text(PAIR)
    with pytest.raises(DeploymentError, match=r"2p1.yaml: no such file; did you mean .*2p1d\.yaml\?"):
        load(tmp_path / "2p1.yaml")


def test_a_folder_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "x").write_bytes(b"pools: \xff\xfe")
    with pytest.raises(DeploymentError, match="not UTF-8 text at byte 7"):
        load(tmp_path / "x")


def test_a_byte_order_mark_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbf" + PAIR.encode())
    assert len(load(tmp_path / "x.yaml").pools) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Written files load as what was written. Values are drawn for every field, by the ranges in the types.

UNPINNED: tuple[Literal["auto", "any"], ...] = ("auto", "any")
STARTS: tuple[Literal["here", "elsewhere"], ...] = ("here", "elsewhere")
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
count = st.integers(1, 1024)
seconds = st.floats(0.001, 86_400.0)
num_bytes = st.integers(1, 2**50)
models = st.builds(
    ModelSpec,
    path=text,
    revision=st.none() | text,
    dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
    load_format=st.sampled_from(["auto", "dummy"]),
    deterministic=st.booleans(),
    max_context=st.none() | st.integers(1, 2**31),
    served_name=st.none() | text,
)
limits = st.builds(Limits, max_batch=st.integers(1, 65_536), step_tokens=st.integers(1, 2**20))
targets = st.builds(
    Targets,
    ttft_seconds=st.none() | seconds,
    tpot_seconds=st.none() | seconds,
    attainment=st.floats(0.0, 1.0, exclude_min=True),
)
routers = st.builds(
    Router,
    policy=st.sampled_from(["estimate", "round_robin", "least_loaded"]),
    local_prefill=st.sampled_from(["auto", "fallback", "always"]),
    max_attempts=st.integers(1, 100),
)
servers = st.builds(
    Server,
    host=text,
    port=st.integers(0, 65_535),
    join_host=text,
    join_port=st.integers(0, 65_535),
    api_keys=st.lists(text, max_size=3).map(tuple),
    max_waiting=st.integers(1, 2**20),
    request_timeout_seconds=seconds,
    max_body_bytes=num_bytes,
)


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    names = draw(st.lists(st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True), min_size=2, max_size=4, unique=True))
    block_size = draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 256]))
    pinned = st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True).map(tuple)
    pools = tuple(
        Pool(
            name=name,
            role=("prefill", "decode", "aggregated", "decode")[index],
            workers=draw(count),
            device=draw(st.sampled_from(["cpu", "cuda", "cuda:3"])),
            threads=draw(count),
            cores=draw(pinned) if draw(st.booleans()) else draw(st.sampled_from(UNPINNED)),
            start=draw(st.sampled_from(STARTS)),
            memory_bytes=draw(st.none() | num_bytes),
            block_size=block_size,
            limits=draw(limits),
        )
        for index, name in enumerate(names)
    )
    link = st.builds(
        Link,
        between=st.just((names[0], names[1])),
        transport=st.sampled_from(["auto", "direct", "shm", "tcp"]),
        layers_per_frame=st.none() | st.integers(1, 65_536),
        window_frames=st.integers(1, 65_536),
        lease_seconds=seconds,
    )
    return Deployment(
        model=draw(models),
        pools=pools,
        links=tuple(draw(st.lists(link, max_size=1))),
        targets=draw(targets),
        router=draw(routers),
        server=draw(servers),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


@settings(max_examples=200, deadline=None)
@given(deployments())
def test_what_is_written_to_a_file_loads_as_the_same_deployment(deployment: Deployment) -> None:
    assert loads(to_yaml(deployment)) == deployment


def test_defaults_are_not_written() -> None:
    deployment = Deployment(pools=(Pool(name="both", role="aggregated", memory_bytes=2**30),))
    assert to_yaml(deployment) == "pools:\n- name: both\n  role: aggregated\n  memory: 1 GiB\n"


def test_every_field_of_the_structs_can_be_written_in_a_file() -> None:
    """The reader knows every kind of type that the structs use: a new field needs no change there."""
    deployment = Deployment(pools=(Pool(name="p", role="prefill"), Pool(name="d", role="decode")))
    full = msgspec.to_builtins(deployment) | {"links": [msgspec.to_builtins(Link(between=("p", "d")))]}
    assert loads(msgspec.json.encode(full).decode()) == msgspec.convert(full, Deployment)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("pools:{}[]-&*!'\"\n ,#|>%@`~?name role 019.e"), max_size=60))
def test_any_text_is_read_or_refused_with_the_file_named(noise: str) -> None:
    try:
        loads(noise, "noise.yaml")
    except DeploymentError as error:
        message = str(error)
    else:
        return
    assert message.startswith("noise.yaml")
