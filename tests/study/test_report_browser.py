"""Pages of results in a real browser: every chart is drawn, nothing is complained of, hovering tells values.

Screenshots stay in build/screenshots/ for people to look at.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.study.sample_results import sample_result
from transload.study.report import render_page

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=4000",
    "--enable-logging=stderr",
]
HOVER = """
<script>
setTimeout(() => {
  const svg = document.querySelector('[data-chart="Time to first token"] svg');
  const box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 50 }));
  for (const button of document.querySelectorAll("figure .switch button:last-child")) button.click();
  const root = document.documentElement;
  root.dataset.wide = String(root.scrollWidth > window.innerWidth);
}, 1000);
</script>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        assert not os.environ.get("CI"), "scripts/test installs chromium; without it nobody has looked at the pages"
        pytest.skip("no chromium here: apt-get install chromium, or run scripts/test as root")
    return found


def look(browser: str, page: Path, profile: Path, *flags: str) -> tuple[str, str]:
    """What it prints on stdout, and its log."""
    command = [browser, *QUIET, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def complaints(log: str) -> list[str]:
    return re.findall(r"^.*CONSOLE.*$", log, re.M)


@pytest.mark.slow
def test_one_result_is_drawn_whole_at_every_width(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_page([sample_result()]).replace("</body>", HOVER + "</body>"))
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for name, size in (("desktop", "1200,3300"), ("phone", "390,5200")):
        dom, log = look(browser, page, tmp_path / "profile", f"--window-size={size}", "--dump-dom")
        assert complaints(log) == []
        assert 'data-ready="true"' in dom
        assert 'data-wide="false"' in dom, "the page scrolls sideways"
        assert "[object" not in dom
        assert "NaN" not in dom
        assert "undefined" not in dom.partition("<body>")[2].partition("<script")[0]
        charts = re.findall(r'<figure data-chart="([^"]+)">(.*?)</figure>', dom, re.S)
        assert len(charts) == 9
        for title, drawn in charts:
            assert re.search(r'<path d="M[\d.,-]+[LHV]', drawn), f"{title} has no line"
        assert dom.count('class="bar"') == 7
        image = SCREENSHOTS / f"report-{name}.png"
        look(browser, page, tmp_path / "profile", f"--window-size={size}", f"--screenshot={image}")
        assert image.stat().st_size > 50_000


@pytest.mark.slow
def test_hovering_tells_the_values_of_every_line(browser: str, tmp_path: Path) -> None:
    results = [sample_result("a.yaml"), sample_result("b.yaml", simulated=False, slowness=1.5)]
    page = tmp_path / "page.html"
    hover = re.sub(r"  for \(const button.*\n", "", HOVER)
    page.write_text(render_page(results).replace("</body>", hover + "</body>"))
    dom, log = look(browser, page, tmp_path / "profile", "--window-size=1200,2000", "--dump-dom")
    assert complaints(log) == []
    tip = re.search(
        r'data-chart="Time to first token">.*?<div class="tip"[^>]*visibility: visible[^>]*>(.*?)</figure>', dom, re.S
    )
    assert tip is not None
    text = re.sub(r"<[^>]+>", " ", tip.group(1)).replace("&nbsp;", " ")
    assert re.search(r"\bm?s\b.*\ba\s+[\d.]+ %\s+b\s+[\d.]+ %", text), text


@pytest.mark.slow
def test_a_sweep_beside_a_measured_run_is_drawn(browser: str, tmp_path: Path) -> None:
    results = [sample_result(rate=rate, slowness=1 + (rate / 8) ** 3, seed=rate) for rate in (1, 2, 4, 6, 8)]
    results += [sample_result("aggregated.yaml", rate=rate, slowness=1.4, seed=rate) for rate in (1, 2, 4, 6)]
    results.append(sample_result("1p1d.yaml", simulated=False))
    page = tmp_path / "page.html"
    page.write_text(render_page(results))
    dom, log = look(browser, page, tmp_path / "profile", "--window-size=1200,3300", "--dump-dom")
    assert complaints(log) == []
    for title in ("Goodput", "Attainment", "Output tokens", "TTFT p90", "TPOT p90"):
        assert re.search(rf'<figure data-chart="{title}">.*?<circle', dom, re.S), f"{title} has no points"
    assert dom.count('class="badge simulated"') > 9
    assert 'class="badge measured"' in dom
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    image = SCREENSHOTS / "report-sweep.png"
    look(browser, page, tmp_path / "profile", "--window-size=1200,3300", f"--screenshot={image}")
    assert image.stat().st_size > 50_000
