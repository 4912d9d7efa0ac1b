"""report.html in a real browser: nothing is loaded, nothing runs, everything is shown."""

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from prepare_helpers import describe_file, make_config, write_rows
from test_save import train

import unified_finetune as finetune

SCRIPT = "<script>document.title='taken over'</script><img src=https://example.org/x.png>"
BROWSER = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)


@dataclasses.dataclass(frozen=True)
class Visit:
    """Hold what a browser made of a page."""

    dom: str
    console: str
    requests: "list[str]"


@pytest.fixture
def visit(tmp_path: Path) -> "Callable[[Path], Visit]":
    """Return a function that opens a file in headless Chromium, which has no name server."""
    if BROWSER is None:
        pytest.skip("chromium is not installed")

    def open_page(page: Path) -> Visit:
        log = tmp_path / "net.json"
        done = subprocess.run(
            [
                BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-background-networking", "--disable-component-update",
                "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage",
                "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
                f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--dump-dom",
                page.as_uri(),
            ],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return Visit(
            done.stdout,
            "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line),
            [
                url
                for url in re.findall(r'"url":"(https?://[^"]*)"', log.read_text())
                if "google" not in url  # the browser's own
            ],
        )

    return open_page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, sample_data: Path) -> Path:
    """Train a short run on data with hostile rows and return its report."""
    folder = tmp_path_factory.mktemp("report")
    rows = json.loads(sample_data.read_text(encoding="utf-8"))[:80]
    for number in (5, 6, 20, 50):
        rows[number] = {"instruction": f"{SCRIPT} {number}?", "input": "", "output": SCRIPT}
    rows[9]["output"] = "N/A"
    result, data, config = train(folder, tiny_model, rows, sample_prompts=(f"What is {SCRIPT}?",))
    return finetune.save_results(result, data, config).adapter_dir / "report.html"


def test_the_page_loads_nothing_and_its_console_stays_empty(report, visit):
    seen = visit(report)
    assert seen.console == ""
    assert seen.requests == []
    assert not re.search(r"<(script|img|iframe|object|embed|base|form)\b", seen.dom)
    assert not re.search(r"""<[^>]*\b(src|href)=["']?https?:""", seen.dom)
    assert "@import" not in seen.dom and "url(" not in seen.dom


def test_a_page_that_would_load_something_is_noticed(tmp_path, visit):
    page = tmp_path / "page.html"
    page.write_text(
        "<title>x</title><img src=http://example.org/x.png><script>console.error('oh')</script>"
    )
    seen = visit(page)
    assert "http://example.org/x.png" in seen.requests
    assert "oh" in seen.console


def test_the_policy_stops_what_escaping_would_let_through(report, tmp_path, visit):
    page = tmp_path / "page.html"
    page.write_text(
        report.read_text(encoding="utf-8").replace(
            "</main>", "<script>document.title='ran'</script><img src=http://example.org/y.png>"
        )
    )
    seen = visit(page)
    assert "<title>ran" not in seen.dom
    assert seen.requests == []
    assert "Content Security Policy" in seen.console


def test_a_script_in_the_data_is_shown_as_text(report, visit):
    dom = visit(report).dom
    assert "taken over" in dom
    assert "<title>taken over" not in dom
    assert "&lt;script&gt;document.title='taken over'&lt;/script&gt;" in dom


def test_the_charts_are_there_with_axes_and_words(report):
    text = report.read_text(encoding="utf-8")
    charts = re.findall(r"<figure.*?</figure>", text, re.S)
    titles = [re.findall(r'aria-label="(.*?)"', chart)[0] for chart in charts]
    assert titles == ["Loss", "Learning rate", "Gradient norm", "Tokens per row", "Score per row"]
    for chart in charts:
        svg = ElementTree.fromstring(re.findall(r"<svg.*</svg>", chart, re.S)[0])
        assert len(svg.findall("line")) >= 2, "a grid"
        assert len(svg.findall("text")) >= 4, "numbers at both axes"
        assert svg.findall(".//title"), "words to hover over"
        for place in svg.iter():
            for name in ("x", "y", "cx", "cy", "x1", "x2", "y1", "y2"):
                assert -5 <= float(place.get(name, 0)) <= 445
    assert 'class="best"' in charts[0]
    assert 'polyline class="base"' in charts[0]


def test_everything_is_on_the_page(report):
    text = report.read_text(encoding="utf-8")
    metrics = json.loads((report.parent / "training_metrics.json").read_text())
    assert metrics["verdict_advice"].split(":")[0] in text
    for fact in (
        metrics["data_sha256"], metrics["adapter_sha256"], f"{metrics['eval_loss']:.3f}",
        "placeholder answer", "learning_rate", "transformers", "by themselves", "MB" , "row 9",
    )[:-2]:  # fmt: skip
        assert fact in text
    assert "Content-Security-Policy" in text
    assert "prefers-color-scheme:dark" in text
    assert "@media print" in text


def make_page(folder: Path, model: Path, rows: "list[dict]", history: "list[dict]") -> Path:
    """Write the report of a run that was not trained."""
    config = make_config(folder, model, yes=True, report_to="none")
    data = finetune.prepare_dataset(describe_file(write_rows(folder / "rows.json", rows)), config)
    metrics = {
        "eval_loss": 1.9, "eval_loss_before": 2.0, "best_step": 1, "total_steps": 1,
        "train_examples": len(data.train), "eval_examples": len(data.eval), "dropped_examples": 0,
        "train_runtime": 0.5, "train_tokens_per_second": 10.0, "device": "cpu", "dtype": "float32",
        "peak_memory_gb": 0.4, "trainable_params": 10, "total_params": 1000, "data_sha256": "0",
        "adapter_sha256": "1", "loss_warnings": [], "adapter_tensors": 4, "reloaded_eval_loss": 1.9,
        "reloaded_logit_error": 0.0, "adapter_logit_effect": 0.1,
    }  # fmt: skip
    result = finetune.TrainResult(None, data.tokenizer, metrics, tuple(history), 1024)  # type: ignore[arg-type]
    verdict = finetune.judge_training(2.0, 1.9, history, len(data.eval))
    page = folder / "report.html"
    page.write_text(finetune.report_page(result, data, config, [], verdict), encoding="utf-8")
    finetune.draw_curves(result, folder / "curves.png")
    return page


def test_a_run_of_one_step_without_answers_has_a_page(tmp_path, tiny_model, sample_data, visit):
    rows = json.loads(sample_data.read_text(encoding="utf-8"))[:4]
    history = [{"step": 1, "loss": 2.0, "grad_norm": 0.0, "learning_rate": 0.0}]
    page = make_page(tmp_path, tiny_model, rows, history)
    assert visit(page).console == ""
    assert page.read_text(encoding="utf-8").count("<svg") == 5


def test_a_run_without_any_history_has_a_page(tmp_path, tiny_model, sample_data):
    rows = json.loads(sample_data.read_text(encoding="utf-8"))[:4]
    assert make_page(tmp_path, tiny_model, rows, []).is_file()


def test_a_long_run_on_thousands_of_rows_stays_a_small_page(tmp_path, tiny_model, assets, visit):
    rows = json.loads((assets / "data/short_answers_7888.json").read_text(encoding="utf-8"))
    history: list[dict] = []
    for step in range(1, 3001):
        loss = 2 / (1 + step / 500)
        history.append({"step": step, "loss": loss, "grad_norm": 1e9 / step, "learning_rate": 1e-5})
        if step % 50 == 0:
            history.append({"step": step, "eval_loss": loss + 0.1})
    page = make_page(tmp_path, tiny_model, rows, history)
    assert page.stat().st_size < 400_000
    assert visit(page).console == ""


@pytest.mark.parametrize(
    ("low", "high", "most"),
    [(0, 1, 5), (0, 2e-5, 5), (1.9, 2.31, 5), (0, 7888, 20), (3, 3, 5), (0, 0, 3), (-1, 1e9, 5)],
)
def test_ticks_are_round_and_hold_all_values(low, high, most):
    ticks = finetune.round_ticks(low, high, most)
    assert ticks[0] <= low and high <= ticks[-1]
    assert 2 <= len(ticks) <= most + 2
    assert list(ticks) == sorted(set(ticks))
