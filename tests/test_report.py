"""report.html in a real browser: nothing is loaded, nothing runs, everything is shown."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_save import course, make_run

import unified_finetune as program

SCRIPT = "<script>document.title='taken over'</script><img src=https://example.org/x.png>"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def visit(tmp_path):
    """Return a function that opens a file in a browser: its DOM, its console, what it asks for."""
    if BROWSER is None:
        pytest.skip("chromium is not installed")

    def open_page(page: Path) -> "tuple[str, str, list[str]]":
        log = tmp_path / "net.json"
        command = [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-dev-shm-usage", "--dump-dom",
            "--disable-component-update", "--disable-sync", "--disable-extensions",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
        asked = re.findall(r'"url":"(https?://[^"]*)"', log.read_text())
        return done.stdout, console, [url for url in asked if "example" in url]

    return open_page


@pytest.fixture(scope="module")
def make_report(tmp_path_factory, tiny_model, sample_data):
    """Return a function that saves a run on data with hostile rows and names its report."""
    rows = json.loads(sample_data.read_text(encoding="utf-8"))[:40]
    for number in (5, 6, 20, 30):
        rows[number] = {"instruction": f"{SCRIPT} {number}?", "input": "", "output": SCRIPT}
    rows[9]["output"] = "N/A"
    rows[11]["output"] = "half a character \ud83d"

    def make(**changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("report")
        run = make_run(folder, tiny_model, rows, **changes)
        return program.save_results(*run).adapter_dir / "report.html"

    return make


@pytest.fixture(scope="module")
def report(make_report):
    """Return the report of an ordinary run."""
    asked = (f"What is {SCRIPT}?",)
    return make_report(sample_prompts=asked, metrics={"periodic_eval_examples": 5})


def test_the_page_loads_and_runs_nothing_even_if_something_is_not_escaped(report, tmp_path, visit):
    dom, console, requests = visit(report)
    assert (console, requests) == ("", [])
    assert not re.search(r"<(script|img|iframe|object|embed|base|form)\b|@import", dom)
    assert not re.search(r"""<[^>]*\b(src|href)=["']?https?:""", dom)
    assert dom.count("&lt;script&gt;document.title='taken over'&lt;/script&gt;") >= 3
    assert set(re.findall(r"url\((.)", dom)) <= {"#"}  # clip paths of the charts
    loose = "<script>document.title='ran';console.error('oh')</script>"
    loose += "<img src=http://example.org/y>"
    page = tmp_path / "page.html"
    page.write_text(f"<title>x</title>{loose}")
    dom, console, requests = visit(page)  # without a policy: this test can see what goes wrong
    assert "<title>ran" in dom and "oh" in console and "http://example.org/y" in requests
    page.write_text(report.read_text(encoding="utf-8").replace("</main>", loose))
    dom, console, requests = visit(page)
    assert "<title>ran" not in dom and requests == []
    assert "Content Security Policy" in console


def test_everything_is_on_the_page_and_the_charts_take_their_colours_from_it(report):
    text = report.read_text(encoding="utf-8")
    charts = dict(re.findall(r"<figcaption>(.*?)</figcaption>(<svg.*?</svg>)", text, re.S))
    names = "Loss, Learning rate, Gradient norm, Tokens per row, Answer tokens per row"
    assert list(charts) == names.split(", ")
    for chart in charts.values():
        words = [e.text for e in ElementTree.fromstring(chart).iter() if e.tag.endswith("text")]
        assert len(words) >= 4, "numbers at both axes"
        assert "var(--soft)" in chart
        assert not re.search("#[0-9a-f]{6}", chart.replace("#000000", "")), "a colour of its own"
    for word in ("training", "held-out, best at 4", "base model"):
        assert word in charts["Loss"]
    assert "prefers-color-scheme:dark" in text and "@media print" in text
    metrics = json.loads((report.parent / "training_metrics.json").read_text())
    quality = json.loads((report.parent / "quality_report.json").read_text())
    supervised, masked = quality["supervised_tokens"], quality["unsupervised_tokens"]
    for fact in (
        metrics["verdict_advice"], metrics["data_sha256"], metrics["adapter_sha256"], "1.500",
        "placeholder answer", "learning_rate", "transformers", "by themselves", "row 9",
        f"{supervised:,} of {supervised + masked:,}", f"{quality['answers']} answers",
        "looks at 5 of them", "&lt;img src=https://example.org/x.png&gt;",
    ):  # fmt: skip
        assert fact in text, fact
    shown = re.findall(r'<article class="text">(.*?)</article>', text, re.S)
    assert len(shown) == 3
    assert all(re.search(r"<mark>[^<]*&lt;/s&gt;</mark>", example) for example in shown)


LOSSES = [2 / (1 + step / 500) for step in range(3000)]
HISTORIES = {
    "none": [],
    "one step": course([], [2.0]),
    "3,000 steps": course([loss + 0.1 for loss in LOSSES[::50]], LOSSES),
}


@pytest.mark.parametrize("length", HISTORIES)
def test_a_run_of_any_length_has_a_small_page(make_report, length):
    pages = [make_report(history=HISTORIES[length]) for _ in range(1 + (length == "one step"))]
    charts = [re.findall("<svg.*?</svg>", page.read_text("utf-8"), re.S) for page in pages]
    assert len(charts[0]) == 5 and charts[0] == charts[-1]
    assert pages[0].stat().st_size < 200_000
