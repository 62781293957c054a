"""Pages of results: everything is in the file, nothing of a result can break out of it, runs can be told apart."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.study.sample_results import sample_result
from transload.errors import DeploymentError
from transload.study.report import render_page, result_labels, write_page
from transload.study.result import Result, decode_result, encode_result


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', page, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found.group(1))
    return data


def test_a_page_refers_to_nothing_outside_itself() -> None:
    page = render_page([sample_result()])
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)""", page)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", page)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page


def test_a_page_stays_small() -> None:
    assert len(render_page([sample_result()])) < 200_000


def test_names_in_a_result_cannot_become_markup() -> None:
    evil = "</script><script>alert(1)</script><img src=x>"
    result = msgspec.structs.replace(sample_result(), name=evil, workload=evil, model=evil, notes=(evil,))
    page = render_page([result])
    assert page.count("<script") == render_page([sample_result()]).count("<script")
    assert "<img" not in page
    assert data_of(page)["results"][0]["notes"] == [evil]


def test_the_page_holds_what_the_result_says() -> None:
    result = sample_result()
    data = data_of(render_page([result]))
    shown = data["results"][0]
    assert shown["simulated"] is True
    assert shown["summary"]["num_requests"] == result.summary.num_requests
    assert shown["summary"]["ttft_seconds"]["p90"] == pytest.approx(result.summary.ttft_seconds.p90, rel=1e-5)  # type: ignore[union-attr]
    assert [pool["name"] for pool in shown["pools"]] == ["prefill", "decode"]
    assert len(shown["pools"][0]["series"]) == len(result.pools[0].series)
    assert shown["classes"] == result.classes
    assert shown["ttft_interval"]["basis"] == "leave-one-chip-out, dense"


def test_curves_rise_from_the_least_to_the_greatest_latency() -> None:
    result = sample_result()
    curves = data_of(render_page([result]))["results"][0]["curves"]
    assert set(curves) == {"ttft", "tpot", "itl", "end_to_end"}
    for points in curves.values():
        shares, seconds = zip(*points, strict=True)
        assert (shares[0], shares[-1]) == (0.0, 1.0)
        assert list(seconds) == sorted(seconds)
    assert result.summary.ttft_seconds is not None
    assert curves["ttft"][-1][1] == pytest.approx(result.summary.ttft_seconds.max, rel=1e-5)
    assert curves["ttft"][100][1] == pytest.approx(result.summary.ttft_seconds.p50, rel=1e-5)


def test_requests_make_the_curves_of_a_result_that_brings_none() -> None:
    with_requests = msgspec.structs.replace(sample_result(with_requests=True), curves={})
    curves = data_of(render_page([with_requests]))["results"][0]["curves"]
    assert curves == data_of(render_page([sample_result()]))["results"][0]["curves"]


def test_a_result_with_neither_is_drawn_through_its_percentiles() -> None:
    bare = msgspec.structs.replace(sample_result(), curves={})
    curves = data_of(render_page([bare]))["results"][0]["curves"]
    assert [share for share, _ in curves["ttft"]] == [0.5, 0.9, 0.95, 0.99, 1.0]


def test_runs_of_one_deployment_at_three_rates_make_a_sweep_in_order_of_rate() -> None:
    results = [sample_result(rate=rate, seed=index) for index, rate in enumerate((8, 2, 4))]
    (sweep,) = data_of(render_page(results))["sweeps"]
    offered = [point["offered"] for point in sweep["points"]]
    assert offered == sorted(offered)
    assert len(offered) == 3
    assert all(point["goodput"] <= point["offered"] * 1.2 for point in sweep["points"])


def test_a_sweep_is_called_what_its_runs_have_in_common() -> None:
    results = [
        msgspec.structs.replace(sample_result(rate=rate, seed=rate), name=f"deployments/pd.yaml, rate {rate}")
        for rate in (1, 2, 14)
    ]
    assert [sweep["name"] for sweep in data_of(render_page(results))["sweeps"]] == ["pd"]
    assert result_labels(results) == ["pd, rate 1", "pd, rate 2", "pd, rate 14"]


def test_two_deployments_at_one_rate_make_no_sweep() -> None:
    assert data_of(render_page([sample_result("a.yaml"), sample_result("b.yaml")]))["sweeps"] == []


def label_cases() -> list[tuple[list[Result], list[str]]]:
    fast, slow = sample_result("x/pd.yaml", rate=8, seed=1), sample_result("x/pd.yaml", rate=1, seed=2)
    real = sample_result("x/pd.yaml", simulated=False)
    rate = [f"{result.summary.offered_requests_per_second:.3g}" for result in (fast, slow)]
    return [
        ([fast], ["pd"]),
        ([fast, sample_result("agg.yaml")], ["pd", "agg"]),
        ([fast, real], ["pd", "pd, real"]),
        ([fast, slow], [f"pd @ {rate[0]}/s", f"pd @ {rate[1]}/s"]),
        ([fast, fast], [f"pd @ {rate[0]}/s #1", f"pd @ {rate[0]}/s #2"]),
    ]


@pytest.mark.parametrize(("results", "labels"), label_cases())
def test_labels_tell_results_apart(results: list[Result], labels: list[str]) -> None:
    assert result_labels(results) == labels


def test_a_result_read_back_makes_the_same_page() -> None:
    result = sample_result(with_requests=True)
    assert render_page([decode_result(encode_result(result))]) == render_page([result])


def test_a_page_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="cannot write the page"):
        write_page([sample_result()], tmp_path / "nowhere" / "page.html")
