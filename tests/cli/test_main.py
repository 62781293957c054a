"""The command as a whole: flags, exit codes, what it imports, what it says when it refuses."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

import transload
from transload.cli import COMMANDS, bench, build_parser, explain, main
from transload.errors import DeploymentError

DEPLOYMENT = "--deterministic --dtype --host --load-format --model --port --set --topology FILE"
FROZEN = {
    "serve": f"--ask --event-log --once {DEPLOYMENT}",
    "chat": "--api-key --ask --max-tokens --model --system --temperature URL",
    "split": "--api-key TOPOLOGY URL",
    "bench": (
        "--api-key --arrivals --attainment --body --concurrency --csv --cv --duration --end --endpoint "
        "--event-log --html --ids --input --input-cv --json --model --no-ignore-eos --output --output-cv --prompt "
        "--ramp-to --rate --records --requests --seed --shared-prefix --shrink --speedup --start --temperature "
        "--think --timeout --tpot --trace --trace-format --ttft --turns --warmup URL"
    ),
    "explain": f"--json --yaml {DEPLOYMENT}",
    "doctor": "--host --json --port",
    "worker": "--join --name",
    "chips": "--assume --json NAME",
    "models": "--batch --context --json --kv --skew --weights NAME",
    "links": "--assume --json NAME",
    "afd": (
        "--assume --attention --bandwidth --best-by --context --engine --ffn --json --kv --latency --link "
        "--micro-batches --top --tpot --weights MODEL"
    ),
    "claims": "--json --list IDS",
    "compare": (
        "--arrivals --assume --attainment --concurrency --csv --cv --duration --end --input --input-cv --json --output "
        "--output-cv --ramp-to --rate --requests --saturate --seed --shared-prefix --shrink --speedup --start --think "
        "--tpot --trace --trace-format --ttft --turns FILES"
    ),
    "calibrate": f"--api-key --output --quick --url {DEPLOYMENT}",
    "simulate": (
        "FILE --arrivals --assume --attainment --concurrency --csv --cv --duration --end --fault --html --input "
        "--input-cv --json --output --output-cv --perfetto --processes --ramp-to --rate --rates --records --requests "
        "--seed --set --shared-prefix --shrink --speedup --start --sweep --think --tpot --trace --trace-format --ttft "
        "--turns"
    ),
    "validate": (
        "CASES --again --as-calibrated --chip --cv --html --input --json --load --model --output --rate --repeats "
        "--requests --seconds --seed --shrink --speedup --trace"
    ),
    "report": "--csv --event-log --html --perfetto --title RESULTS",
}
"""Every subcommand and flag. Scripts out there use them: taking one away or renaming it breaks somebody."""
LIGHT = {"torch", "numpy", "yaml", "rich", "starlette", "uvicorn", "httpx", "tokenizers", "asyncio", "msgspec"}


def flags_of(parser: argparse.ArgumentParser) -> str:
    names: list[str] = []
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            names.append(max(action.option_strings, key=len, default=action.dest.upper()))
    return " ".join(sorted(names))


def parsers() -> dict[str, argparse.ArgumentParser]:
    (subparsers,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(subparsers.choices)


def python(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, input=stdin)


@pytest.mark.parametrize("address", ["here", "here:", ":1", "here:port", "here:0", "here:65536"])
def test_an_address_to_join_that_is_none_is_refused(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["worker", "--join", address, "--name", "decode-0"])
    assert f"got {address!r}; want HOST:PORT" in capsys.readouterr().err


def test_subcommands_and_flags_are_frozen() -> None:
    assert {name: flags_of(parser) for name, parser in parsers().items()} == {
        name: " ".join(sorted(flags.split())) for name, flags in FROZEN.items()
    }


def test_every_file_of_the_package_that_is_a_subcommand_is_one() -> None:
    folder = Path(explain.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {
        "__init__",
        "catalog_listing",
        "deployment_flags",
        "workload_flags",
    }
    assert files == set(parsers()) == {command.__name__.rpartition(".")[2] for command in COMMANDS}


def test_every_flag_and_subcommand_is_explained() -> None:
    for name, parser in parsers().items():
        assert parser.description, name
        for action in parser._actions:
            assert action.help, f"{name} {action.dest}"


def test_help_imports_nothing_that_takes_time() -> None:
    code = (
        "import sys\nfrom transload.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print('HEAVY', sorted({LIGHT!r} & set(sys.modules)))"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize("command", ["explain", "serve"])
def test_a_deployment_is_resolved_without_torch(command: str) -> None:
    code = (
        "import sys\nfrom transload.cli import main\n"
        f"assert main(['{command}', '--topology', '2p']) == 2\nassert 'torch' not in sys.modules"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert "p workers need d workers" in result.stderr


def test_the_module_is_the_same_command() -> None:
    result = python("-m", "transload", "--version")
    assert (result.returncode, result.stdout) == (0, f"transload {transload.__version__}\n")


def test_no_subcommand_is_refused() -> None:
    result = python("-m", "transload")
    assert result.returncode == 2
    assert "the following arguments are required: COMMAND" in result.stderr


def test_a_misspelt_subcommand_is_refused_with_the_one_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["explian"])
    assert end.value.code == 2
    assert "did you mean explain?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["bench", "--reqests=3"],
            "transload bench: error: unrecognized arguments: --reqests=3; did you mean --requests?",
        ),
        (["serve", "--topolgy=1agg"], "unrecognized arguments: --topolgy=1agg; did you mean --topology?"),
        (["explain", "a.yaml", "b.yaml"], "transload explain: error: unrecognized arguments: b.yaml\n"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_one_that_was_meant(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert said in capsys.readouterr().err


def test_flags_are_not_guessed_from_their_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve", "--top", "1p1d"])
    assert end.value.code == 2
    assert "unrecognized arguments: --top" in capsys.readouterr().err


def test_an_error_meant_for_people_is_one_message_and_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--set", "pools.decode.wokers=2"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(
        "transload explain: error: --set pools.decode.wokers=2: pools[1].wokers: no such key"
    )
    assert captured.err.count("\n") == 1


def test_an_interrupted_command_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(explain, "run", interrupted)
    assert main(["explain"]) == 130


def test_a_bug_is_not_dressed_up_as_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_args: argparse.Namespace) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(explain, "run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["explain"])


def test_a_reader_that_leaves_early_is_no_error_worth_a_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "transload", "explain", "--topology", "900agg", "--load-format", "dummy", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 1
    process.stderr.close()


def test_a_flag_that_means_nothing_is_refused_by_its_own_subcommand() -> None:
    args = build_parser().parse_args(["bench", "--cv", "3"])
    with pytest.raises(DeploymentError, match="--cv means nothing"):
        bench.run(args)


# ---------------------------------------------------------------------------------------------------------------------
# explain and serve


def test_explain_prints_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        ["explain", "--topology", "2p1d", "--load-format", "dummy", "--set", "pools.*.memory=100 MiB", "--json"]
    )
    plan = json.loads(capsys.readouterr().out)
    assert code == 0
    assert [worker["name"] for worker in plan["workers"]] == ["prefill-0", "prefill-1", "decode-0"]
    assert plan["links"][0]["bytes_per_token"] == plan["model"]["kv_bytes_per_token"]
    assert plan["source"] == "topology 2p1d --set pools.*.memory=100 MiB"


def test_explain_exits_with_one_if_it_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--load-format", "dummy", "--set", "pools.decode.memory=900 TiB"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_explain_writes_a_file_to_start_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert (
        main(["explain", "--model", "org/name", "--topology", "1p2d", "--port", "0", "--deterministic", "--yaml"]) == 0
    )
    file = tmp_path / "mine.yaml"
    file.write_text(capsys.readouterr().out)
    assert main(["explain", str(file), "--yaml"]) == 0
    assert capsys.readouterr().out == file.read_text()
    assert file.read_text() == (
        "model:\n  path: org/name\n  deterministic: true\n"
        "pools:\n- name: prefill\n  role: prefill\n- name: decode\n  role: decode\n  workers: 2\nserver:\n  port: 0\n"
    )


def test_a_model_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", "./no-such-folder"]) == 2
    assert "./no-such-folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--dtype", "bf16"], '--dtype bf16: model.dtype = "bf16": no such dtype; did you mean "bfloat16"?'),
        (["--port", "http"], '--port http: server.port = "http": wanted a whole number from 0 to 65535'),
        (["--load-format", "random"], "--load-format random: model.load_format"),
        (["x.yaml", "--topology", "1agg"], "--topology 1agg: x.yaml says already what runs where"),
        (["x.yaml"], "x.yaml: no such file"),
        (["--set", "seed"], "--set seed: wanted PATH=VALUE"),
    ],
)
def test_serve_refuses_wrong_flags_before_it_starts_anything(
    flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *flags]) == 2
    assert complaint in capsys.readouterr().err
