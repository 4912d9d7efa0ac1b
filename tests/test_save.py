"""Stage 5: an adapter is published only when it does what was trained, and its account is true."""

import json
import math
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import unified_finetune as program

METRICS: "dict[str, Any]" = {
    "train_loss": 1.7, "eval_loss": 1.5, "eval_loss_before": 2.0, "best_step": 4, "total_steps": 6,
    "train_runtime": 0.5, "train_samples_per_second": 1.0, "train_tokens_per_second": 10.0,
    "peak_memory_gb": 0.4, "device": "cpu", "dtype": "float32", "trainable_params": 10,
    "total_params": 1000, "train_examples": 48, "eval_examples": 12, "data_sha256": "d" * 64,
}  # fmt: skip


def course(evals: "list[float]", train: "list[float]", rate: float = 2e-4) -> "list[dict]":
    """Make records of a run: an evaluation every 50 steps, a loss each step."""
    steps = 50 * len(evals) or len(train)
    records: list[dict] = []
    for n in range(steps):
        values = {"loss": train[n * len(train) // steps], "learning_rate": rate * (1 - n / steps)}
        records.append({"step": n + 1, "grad_norm": 1.0, **values})
    return records + [{"step": 50 * n, "eval_loss": loss} for n, loss in enumerate(evals, 1)]


COURSE = course([1.6, 1.5], [2.0, 1.7, 1.5])


def make_run(folder, model, rows, dtype="float32", metrics=None, history=COURSE, **settings):
    """Prepare rows, and make what stage 4 hands on, with an adapter of random numbers."""
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    places = {name: str(folder / name) for name in ("output_dir", "cache_dir", "log_dir")}
    config = program.FineTuningConfig(
        model_name=str(model), yes=True, train_split=0.7, eval_split=0.3, **places, **settings
    )
    file = program.DatasetFile(path, path.stat().st_size, None, "d" * 64, str(path))
    data = program.prepare_dataset(file, config)
    base = program.load_base_model(data.base, "cpu", dtype)
    shape: Any = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    tuned = program.add_adapter(base, data.base, 1, **shape)
    for name, weights in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.2)
    program.install_engine(tuned)
    numbers = METRICS | {"dtype": dtype} | (metrics or {})
    result = program.TrainResult(tuned, data.tokenizer, numbers, tuple(history), 1024, {"seed": 42})
    return result, data, config


@pytest.fixture
def run(tmp_path, tiny_model, sample_data):
    """Return a function that makes a trained run."""
    rows = json.loads(sample_data.read_text(encoding="utf-8"))[:40]
    return lambda **changes: make_run(tmp_path, tiny_model, rows, **changes)


def read(folder: Path, name: str) -> "dict[str, Any]":
    return json.loads((folder / name).read_text(encoding="utf-8"))


def names(folder: "str | Path") -> "list[str]":
    """Name what is in an output folder, but for stage 3's report."""
    return sorted(p.name for p in Path(folder).iterdir() if p.name != "quality_report.json")


# --- the adapter test


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # of the model, whatever was asked for
def test_a_saved_adapter_has_been_read_back_and_its_figures_are_kept(run, dtype):
    result, data, config = run(dtype=dtype, metrics={"dtype": "float32"})
    artifacts = program.save_results(result, data, config)
    metrics = read(artifacts.adapter_dir, "training_metrics.json")
    assert metrics == json.loads(json.dumps(artifacts.metrics))
    assert metrics["reloaded_logit_error"] < 1e-6 and metrics["adapter_logit_effect"] > 1e-3
    assert metrics["adapter_tensors"] == 2 * 2 * result.model.config.num_hidden_layers
    written = artifacts.adapter_dir / "adapter_model.safetensors"
    assert metrics["adapter_sha256"] == program.sha256_of(written)
    assert written.stat().st_mode & 0o777 == 0o644
    assert {p.device.type for p in result.model.parameters()} == {"meta"}  # never two bases


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def double_the_scale(path: Path) -> None:
    settings = read(path.parent, "adapter_config.json")
    settings["lora_alpha"] *= 2
    path.with_name("adapter_config.json").write_text(json.dumps(settings))


FAULTS: "dict[str, Any]" = {  # by words of the error; tests/test_chat.py has more of them
    "1 of its 8 tensors": lambda path: flip(path, -4),  # the lowest bit of a weight
    "damaged": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "its logits differ by": double_the_scale,
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_file_that_is_not_what_was_trained_is_not_saved(run, monkeypatch, words):
    import safetensors.torch

    result, data, config = run()
    (Path(config.output_dir) / "checkpoint-2").mkdir()
    genuine = safetensors.torch.save_file

    def write(weights, path, **options):
        genuine(weights, path, **options)
        FAULTS[words](Path(path))

    monkeypatch.setattr(safetensors.torch, "save_file", write)
    with pytest.raises(program.FineTuningError, match=words) as refused:
        program.save_results(result, data, config)
    assert "THE ADAPTER FAILED ITS TEST. IT IS NOT SAVED" in str(refused.value)
    assert "run the same command again" in refused.value.hint
    assert names(config.output_dir) == ["checkpoint-2"]


def test_a_rate_of_zero_ends_in_big_letters(run):
    result, data, config = run()
    for name, weights in result.model.named_parameters():
        weights.data *= "lora_B" not in name
    told = "IT IS NOT SAVED(.|\n)*every lora_B is zero"
    with pytest.raises(program.FineTuningError, match=told) as error, program.stage(5, "save"):
        program.save_results(result, data, config)
    assert "_rate (2e-5 is the default)" in error.value.hint and error.value.exit_code == 15
    assert names(config.output_dir) == []


# --- what reaches the output folder


def test_settings_come_first_and_metrics_last_also_over_an_earlier_run(run, monkeypatch):
    output = program.save_results(*run()).adapter_dir
    moved: list[str] = []
    genuine = Path.replace

    def replace(self, target):
        moved.append(Path(target).name)
        return genuine(self, target)

    result, data, config = run(metrics={"eval_loss": 1.2})
    monkeypatch.setattr(Path, "replace", replace)
    assert program.save_results(result, data, config).adapter_dir == output
    assert (moved[0], moved[-1]) == ("training_config.json", "training_metrics.json")
    assert sorted(moved) == sorted(p.name for p in output.iterdir())
    assert set(moved) <= set(program.RUN_FILES)
    assert read(output, "training_metrics.json")["eval_loss"] == 1.2
    saved = read(output, "training_config.json")
    provenance = saved.pop("provenance")
    assert saved == program.saved_settings(config)
    assert torch.__version__.startswith(provenance["packages"]["torch"])
    told = (provenance[name] for name in ("identity", "data_sha256", "base_name", "base_digest"))
    assert [*told] == [{"seed": 42}, "d" * 64, data.base.name, data.base.digest]


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json"])
def test_a_file_of_the_user_s_own_is_never_replaced(run, name):
    result, data, config = run()
    mine = Path(config.output_dir) / name
    mine.write_text("mine")
    with pytest.raises(program.FineTuningError, match=name):
        program.save_results(result, data, config)
    assert (names(config.output_dir), mine.read_text()) == ([name], "mine")


def test_a_full_disk_is_told_as_one_and_another_error_as_what_it_is(run, monkeypatch):
    run_of = run()
    full = r"the disk \(or your quota\) is full"
    for place in ("safetensors.torch.save_file", "pathlib.Path.write_text"):
        errors = [OSError(28, "No space left on device"), RuntimeError("shapes do not fit")]
        with monkeypatch.context() as broken:
            broken.setattr(place, Mock(side_effect=errors))
            with pytest.raises(program.FineTuningError, match=full):
                program.save_results(*run_of)
            with pytest.raises(RuntimeError, match="shapes do not fit"):
                program.save_results(*run_of)
        assert names(run_of[2].output_dir) == []


# --- the verdict

# fmt: off
# ruff: disable[E501]
VERDICTS = {  # losses before and after, the history, the verdict, words of the advice
    "a good run": (2, 1.5, course([1.6, 1.52, 1.5, 1.5], [2, 1.7, 1.5]), "learned", "chat"),
    "still falling": (2, 1.5, course([1.8, 1.6, 1.5], [2, 1.5]), "learned", "epochs"),
    "still falling slowly": (2, 1.5, course([1.8, 1.6, 1.5], [2], 2e-5), "learned", "_rate to 0.0002"),
    "hardly a gain": (2, 1.97, course([1.98, 1.97], [2, 1.98], 2e-5), "barely", "_rate to 0.0002"),
    "a tiny rate": (2, 1.9999, course([2, 1.9999], [2], 2e-7), "not learning", "_rate to 2e-06"),
    "a usual rate": (2, 1.97, course([1.98, 1.97, 1.97], [2, 1.98]), "barely", "more rows"),
    "worse": (2, 2.6, course([2.6, 3.0, 3.5], [2, 2.5, 3, 3.4], 4e-3), "not learning", "Lower --learning_rate to 0.001"),
    "by heart": (2, 1.7, course([1.7, 1.75, 1.9, 2.2], [2, 1.6, 1.2, 0.6, 0.3]), "overfitting", "rows"),
    "by heart at once": (2, 2.05, course([2.05, 2.3, 2.6], [2, 1.2, 0.6, 0.3]), "overfitting", "rows"),
    "one bad evaluation": (2, 1.5, course([1.5, 1.9, 1.5], [2, 1.5]), "learned", "chat"),
    "the sample is harder": (2, 1.5, course([2.4, 2.3, 2.3], [2, 1.5]), "learned", "chat"),
    "the sample is easier": (2, 2.0, course([1.0, 1.0, 1.0], [2]), "not learning", "more rows"),
    "warm-up ate it": (2, 1.99, [{"step": n, "loss": 2.0, "learning_rate": n * 4e-7} for n in range(1, 10)], "barely", "--warmup_steps to 1: the learning rate was still on its way up for 9 of 9 steps"),
    "one step, no evaluation": (2, 1.9, course([], [2.0]), "learned", "chat"),
    "no history at all": (2, 1.9, [], "learned", "chat"),
}
# ruff: enable[E501]
# fmt: on


@pytest.mark.parametrize("case", VERDICTS)
def test_the_verdict_is_what_the_losses_say(case):
    before, after, history, kind, advice = VERDICTS[case]
    verdict = program.judge_training(before, after, history, 500)
    assert verdict["verdict"] == kind, verdict
    assert advice in verdict["verdict_advice"], verdict
    since = {"by heart": 50, "by heart at once": 0}.get(case)
    assert verdict["overfitting_since_step"] == since
    assert (f"since step {since}" in verdict["verdict_headline"]) == bool(since)
    if case == "a good run":
        evidence = verdict["verdict_evidence"]
        assert "fell from 2.0000 to 1.5000 (25.0%): the right next token is 1.65 times" in evidence
        weak = program.judge_training(before, after, history, 8)["verdict_evidence"]
        assert weak == evidence + " That is weak evidence: 8 held-out rows."


# --- before and after


def test_own_questions_come_first_and_both_answers_are_those_of_generate(run, caplog):
    own = ("What, in short,  is a grant?", "long " * 3000)
    result, data, config = run(sample_prompts=own, system_prompt="Be brief.")
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": own[0]}]
    prompts = [program.tokenize_prompt(data.tokenizer, asked)]
    with program.engine_off(result.model.eval()):
        (tuned,) = program.generate(result.model, data.tokenizer, prompts, max_new_tokens=64)
        with result.model.disable_adapter():
            (base,) = program.generate(result.model, data.tokenizer, prompts, max_new_tokens=64)
    samples = program.answer_samples(result, data, own, "Be brief.")
    assert list(samples[0].values()) == [own[0], None, base, tuned]
    assert base != tuned and len(samples) == 1 + 8
    assert {s["question"] for s in samples[1:]} <= set(data.eval["question"])
    with caplog.at_level("INFO", "unified_finetune"):
        metrics = program.save_results(result, data, config).metrics
    assert "too long to answer" in caplog.text
    assert "question  What, in short, is a grant?" in caplog.text
    assert metrics["sample_answers"] == 9
    assert metrics["stopped_share"] == round(sum(s["tuned"].stopped for s in samples) / 9, 4)


# --- the model card


def test_the_model_card_is_one_that_the_hub_reads_and_its_snippet_works(run):
    from huggingface_hub import ModelCard

    settings = {"sample_prompts": ("a | b\nc ``` <pre>",), "system_prompt": 'Say "yes"\nor | no.'}
    output = program.save_results(*run(**settings)).adapter_dir
    text = (output / "README.md").read_text(encoding="utf-8")
    facts = ModelCard(text).data.to_dict()
    assert (facts["library_name"], facts["pipeline_tag"]) == ("peft", "text-generation")
    assert "base_model" not in facts  # a folder: the hub knows no such model
    (result,) = facts["model-index"][0]["results"]
    assert result["dataset"]["name"] == "rows.json"
    values = {m["type"]: m["value"] for m in result["metrics"]}
    assert values == {"loss": 1.5, "perplexity": round(math.exp(1.5), 4)}
    assert read(output, "training_metrics.json")["verdict_evidence"] in text
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "](curves.png)" in text
    assert "c ``` &lt;pre&gt;" in text
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert '"system"' in snippet
    snippet = snippet.replace("THIS_FOLDER", str(output)).replace("=200", "=5")
    exec(snippet, {})
