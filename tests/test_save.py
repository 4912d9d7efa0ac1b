"""Stage 5: an adapter is saved only when it does what was trained, and its account is true."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prepare_helpers import describe_file, make_config

import unified_finetune as finetune

Trained = tuple[finetune.TrainResult, finetune.PreparedData, finetune.FineTuningConfig]
CPU = finetune.PreflightReport((), "cpu", "float32")


def train(folder: Path, model: Path, rows: "list[dict]", **settings: object) -> Trained:
    """Prepare rows and train on them for a few steps."""
    short: dict[str, object] = {
        "device": "cpu", "yes": True, "warmup_steps": 0, "learning_rate": 1e-3, "eval_steps": 2,
        "num_train_epochs": 1, "save_steps": 2, "min_disk_gb": 0, "train_split": 0.8,
        "eval_split": 0.2, "gradient_accumulation_steps": 4,
    }  # fmt: skip
    config = make_config(folder, model, **{**short, **settings})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    data = finetune.prepare_dataset(describe_file(path), config)
    return finetune.train_lora(data, CPU, config), data, config


@pytest.fixture
def trained(tmp_path: Path, tiny_model: Path, sample_data: Path) -> "Callable[..., Trained]":
    """Return a function that trains on rows of the sample."""
    rows = json.loads(sample_data.read_text(encoding="utf-8"))[:60]

    def build(**settings: object) -> Trained:
        return train(tmp_path, tiny_model, rows, **settings)

    return build


# --- the adapter test


def test_a_saved_adapter_has_been_read_back_and_its_figures_are_kept(trained):
    result, data, config = trained()
    artifacts = finetune.save_results(result, data, config)
    metrics = json.loads((artifacts.adapter_dir / "training_metrics.json").read_text())
    assert metrics["reloaded_eval_loss"] == metrics["eval_loss"]  # the CPU repeats every bit
    assert metrics["reloaded_logit_error"] < 1e-5
    assert metrics["adapter_logit_effect"] > 1e-3
    assert metrics["adapter_tensors"] == 2 * 4 * result.model.config.num_hidden_layers
    assert metrics["adapter_zero_updates"] == 0


def test_memory_never_holds_two_bases(trained):
    result, data, config = trained()
    finetune.save_results(result, data, config)
    assert {p.device.type for p in result.model.parameters()} == {"meta"}


def swap_for_an_older_one(folder: Path) -> None:
    older = min(finetune.list_checkpoints(folder.parent), key=finetune.checkpoint_step)
    (folder / "adapter_model.safetensors").write_bytes(
        (older / "adapter_model.safetensors").read_bytes()
    )


def flip_the_lowest_bit_of_a_weight(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


def flip_a_byte_of_the_header(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)


def write_nan(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = math.nan
    save_file(weights, folder / "adapter_model.safetensors")


def cut_short(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def double_the_scale(folder: Path) -> None:
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"lora_alpha": 2 * settings["lora_alpha"]}))


FAULTS = {
    swap_for_an_older_one: "are not those that were trained",
    flip_the_lowest_bit_of_a_weight: "1 of its 16 tensors are not those that were trained",
    flip_a_byte_of_the_header: "",
    write_nan: "NaN or infinite",
    cut_short: "damaged",
    double_the_scale: "its logits differ by",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_file_that_is_not_what_was_trained_is_not_saved(trained, monkeypatch, fault):
    result, data, config = trained()
    output = Path(config.output_dir)
    checkpoints = finetune.list_checkpoints(output)
    genuine = finetune.read_back

    def tampered(result, data, config, folder):
        fault(folder)
        return genuine(result, data, config, folder)

    monkeypatch.setattr(finetune, "read_back", tampered)
    with pytest.raises(finetune.FineTuningError) as refused:
        finetune.save_results(result, data, config)
    assert "THE ADAPTER FAILED ITS TEST" in str(refused.value)
    assert FAULTS[fault] in str(refused.value)
    assert "run the same command again" in refused.value.hint
    left = {p.name for p in output.iterdir()} - {"quality_report.json"}
    assert left == {p.name for p in checkpoints}
    monkeypatch.undo()
    again = finetune.train_lora(data, CPU, config)
    metrics = finetune.save_results(again, data, config).metrics
    assert metrics["resumed_from_step"] == metrics["total_steps"]


def test_a_learning_rate_of_zero_ends_with_exit_15_in_big_letters(
    run_cli, tiny_model, sample_data, tmp_path
):
    arguments = (
        "--device", "cpu", "--model_name", tiny_model, "--data_path", sample_data, "--yes",
        "--max_seq_length", 512, "--num_train_epochs", 0.05, "--output_dir", "out",
        "--min_disk_gb", 0, "--learning_rate", 0,
    )  # fmt: skip
    for _ in range(2):  # the second start does not take it for finished
        result = run_cli(*arguments)
        assert result.code == 15, result.stderr
        assert "THE ADAPTER FAILED ITS TEST. IT IS NOT SAVED" in result.stderr
        assert "every lora_B is zero" in result.stderr
        assert "--learning_rate (2e-5 is the default)" in result.stderr
        assert result.stdout == ""
        assert not (tmp_path / "out/training_metrics.json").exists()
        assert not (tmp_path / "out/adapter_model.safetensors").exists()
    assert "Traceback" not in result.stderr


PROOF = finetune.AdapterProof(
    tensors=8, changed_tensors=0, updates=4, zero_updates=0, logit_error=0.0, logit_effect=0.1,
    eval_loss=2.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"changed_tensors": 1}, "1 of its 8 tensors"),
        ({"zero_updates": 4}, "every lora_B is zero"),
        ({"zero_updates": 3}, None),
        ({"logit_effect": 0.0}, "exactly the same logits"),
        ({"logit_effect": math.nan}, "exactly the same logits"),
        ({"logit_error": 2e-4}, "its logits differ by 0.02%"),
        ({"logit_error": math.nan}, "its logits differ"),
        ({"eval_loss": 2.00003}, "its eval loss is 2.000030, and 2.000000 was measured"),
        ({"eval_loss": 2.00001}, None),
        ({"eval_loss": math.nan}, "its eval loss"),
    ],
)
def test_each_figure_of_the_adapter_test_can_fail_it(changes, words):
    wrong = finetune.proof_problems(dataclasses.replace(PROOF, **changes), 2.0, "float32")
    assert wrong == [] if words is None else words in wrong[0]


# --- the verdict


def history(
    evals: "list[float]", train: "list[float]", rate: float = 2e-5, every: int = 50
) -> "list[dict[str, float]]":
    """Make records of a run: an evaluation every so many steps, a loss each step."""
    records = [{"step": every * i, "eval_loss": loss} for i, loss in enumerate(evals, start=1)]
    steps = every * len(evals)
    for step in range(1, steps + 1):
        loss = train[min(len(train) - 1, (step - 1) * len(train) // steps)]
        records.append({"step": step, "loss": loss, "grad_norm": 1.0, "learning_rate": rate})
    return records


VERDICTS = {
    "a good run": (2.0, 1.5, history([1.6, 1.52, 1.5, 1.5], [2, 1.7, 1.5]), "learned", "chat"),
    "still falling": (2.0, 1.5, history([1.8, 1.6, 1.5], [2, 1.5]), "learned", "epochs"),
    "hardly any gain": (
        2.0, 1.97, history([1.98, 1.971, 1.97], [2, 1.98]), "barely",
        "--learning_rate to 0.0002",
    ),
    "nothing at a tiny rate": (
        2.0, 1.9999, history([2.0, 1.9999], [2, 2], 2e-7), "not learning",
        "Raise --learning_rate to 2e-06",
    ),
    "worse and worse": (
        2.0, 2.6, history([2.6, 3.0, 3.5], [2.0, 2.5, 3.0, 3.4], 4e-3), "not learning",
        "Lower --learning_rate to 0.001",
    ),
    "by heart": (
        2.0, 1.7, history([1.7, 1.75, 1.9, 2.2], [2, 1.6, 1.2, 0.6, 0.3]), "overfitting",
        "rows",
    ),
    "by heart at once": (
        2.0, 2.05, history([2.05, 2.3, 2.6], [2, 1.2, 0.6, 0.3]), "overfitting", "rows",
    ),
    "one bad evaluation": (2.0, 1.5, history([1.5, 1.9, 1.5], [2, 1.5]), "learned", ""),
    "one step, no evaluation": (
        2.0, 1.9, [{"step": 1, "loss": 2.0, "grad_norm": 1, "learning_rate": 1e-3}], "learned",
        "chat",
    ),
    "no history at all": (2.0, 1.9, [], "learned", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", VERDICTS)
def test_the_verdict_is_what_the_losses_say(case):
    before, after, records, kind, advice = VERDICTS[case]
    verdict = finetune.judge_training(before, after, records, 500)
    assert verdict.kind == kind, verdict
    assert advice in verdict.advice, verdict


def test_the_verdict_names_the_step_from_which_on_it_overfits():
    before, after, records, *_ = VERDICTS["by heart"]
    verdict = finetune.judge_training(before, after, records, 500)
    assert verdict.headline == "Overfitting since step 50."
    assert finetune.verdict_metrics(verdict)["overfitting_since_step"] == 50


def test_the_verdict_gives_its_evidence_and_says_when_it_is_weak():
    verdict = finetune.judge_training(2.0, 1.5, [], 500)
    assert "fell from 2.0000 to 1.5000 (25.0%)" in verdict.evidence
    assert "1.65 times as likely" in verdict.evidence
    assert "weak evidence" not in verdict.evidence
    assert "weak evidence: 8 held-out rows" in finetune.judge_training(2.0, 1.5, [], 8).evidence


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([1.0], "▁"),
        ([2.0, 2.0], "▁▁"),
        ([8, 7, 6, 5, 4, 3, 2, 1], "█▇▆▅▄▃▂▁"),
        ([math.nan, 1, math.inf, 2], "▁█"),
    ],
)
def test_a_sparkline_shows_the_course_of_numbers(values, line):
    assert finetune.sparkline(values) == line


def test_a_long_sparkline_fits_on_the_line():
    assert len(finetune.sparkline(list(range(3000)))) <= 40


# --- before and after


def test_own_questions_come_first_and_keep_their_commas_and_spaces(trained, caplog):
    own = ("What, in short,  is a grant?", "Why?", "long " * 3000)
    result, data, config = trained(sample_prompts=own, system_prompt="Be brief.")
    with caplog.at_level("WARNING", "unified_finetune"):
        samples = finetune.answer_samples(result, data, config)
    assert [s.question for s in samples[:2]] == list(own[:2])
    assert [s.reference for s in samples[:2]] == [None, None]
    assert len(samples) == 2 + finetune.SAMPLE_ANSWERS
    assert "too long to answer" in caplog.text
    assert all(s.reference for s in samples[2:])


def test_answers_of_a_batch_are_those_given_one_by_one(trained):
    result, data, config = trained()
    model, tokenizer = result.model, result.tokenizer
    questions = finetune.sample_questions(data, config, 512)
    samples = finetune.answer_samples(result, data, config)
    assert len(samples) == finetune.SAMPLE_ANSWERS
    for (_, _, prompt), sample in zip(questions, samples, strict=True):
        tuned = finetune.complete_prompt(model, tokenizer, prompt, max_new_tokens=64)
        assert (sample.tuned.token_ids, sample.tuned.stopped) == (tuned.token_ids, tuned.stopped)
        with model.disable_adapter():
            base = finetune.complete_prompt(model, tokenizer, prompt, max_new_tokens=64)
        assert (sample.base.token_ids, sample.base.stopped) == (base.token_ids, base.stopped)


def test_sample_prompts_are_read_from_flags_and_files(tmp_path):
    def parse(*arguments: str) -> "tuple[str, ...]":
        return finetune.parse_command_line(["train", *arguments])[1].sample_prompts

    assert parse() == ()
    assert parse("--sample_prompts", "What is a, b and c?", "Why?") == (
        "What is a, b and c?",
        "Why?",
    )
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"sample_prompts": ["What is it, then?"]}))
    assert parse("--config", str(path)) == ("What is it, then?",)
    path.write_text(json.dumps({"sample_prompts": []}))
    assert parse("--config", str(path)) == ()
    with pytest.raises(finetune.UsageError, match="must be a list of texts"):
        parse("--sample_prompts", " ")


def test_the_share_of_answers_that_end_is_counted():
    def sample(base: bool, tuned: bool) -> finetune.Sample:
        base_answer, tuned_answer = (finetune.Answer("x", (1,), s) for s in (base, tuned))
        return finetune.Sample("q", None, base_answer, tuned_answer)

    samples = [sample(False, True), sample(False, True), sample(True, True), sample(False, False)]
    shares = finetune.stopped_shares(samples)
    assert (shares["stopped_share_before"], shares["stopped_share"]) == (0.25, 0.75)
    assert "3 of 4 answers end by themselves within 64 tokens (base: 1)" in (
        finetune.describe_stops(samples)
    )


def test_answers_that_say_nothing_are_counted_and_told():
    said, nothing = (finetune.Answer(text, (1,), True) for text in ("Yes.", " \n"))
    samples = [finetune.Sample("q", "a", nothing, answer) for answer in (said, nothing, nothing)]
    assert finetune.stopped_shares(samples)["empty_answers"] == 2
    assert "2 SAY NOTHING AT ALL" in finetune.describe_stops(samples)
    assert "NOTHING" not in finetune.describe_stops(samples[:1])


# --- the model card


@pytest.fixture
def saved(trained) -> Path:
    """Save a run with a system prompt and an awkward question."""
    result, data, config = trained(
        system_prompt='Say "yes"\nor | no.', sample_prompts=("a | b\nc ``` d",)
    )
    return finetune.save_results(result, data, config).adapter_dir


def test_the_model_card_is_one_that_the_hub_reads(saved):
    from huggingface_hub import ModelCard

    text = (saved / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    metrics = json.loads((saved / "training_metrics.json").read_text())
    facts = card.data.to_dict()
    assert facts["library_name"] == "peft"
    assert facts["pipeline_tag"] == "text-generation"
    assert "base_model" not in facts  # a folder: the hub knows no such model
    (result,) = facts["model-index"][0]["results"]
    assert result["dataset"]["name"] == "rows.json"
    values = {m["type"]: m["value"] for m in result["metrics"]}
    assert values["loss"] == pytest.approx(metrics["eval_loss"], abs=1e-4)
    assert values["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]), abs=1e-3)
    numbers = text.split("## Numbers")[1]
    assert {line.count(" | ") for line in numbers.splitlines() if line.startswith("| ")} == {1}
    assert (saved / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "](curves.png)" in text
    assert f"**{metrics['verdict_evidence']}" not in text
    assert metrics["verdict_evidence"] in text


def test_a_base_model_of_the_hub_is_named_in_the_card(saved, trained):
    result, data, config = trained(overwrite=True)
    config = dataclasses.replace(config, model_name="TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    header = finetune.card_header(config, data, result.metrics)
    assert "base_model: TinyLlama/TinyLlama-1.1B-Chat-v1.0" in header


def test_the_card_s_snippet_answers_a_question(saved, cli_environment):
    text = (saved / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert "'system'" in snippet
    snippet = snippet.replace("THIS_FOLDER", str(saved)).replace("=200", "=5")
    done = subprocess.run(
        [sys.executable, "-c", snippet + "\nprint(messages, answer.shape)"],
        env=cli_environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Your question" in done.stdout


def test_a_lone_surrogate_in_the_data_spoils_no_file(trained, tmp_path, tiny_model, sample_data):
    rows = json.loads(sample_data.read_text(encoding="utf-8"))[:40]
    rows[3]["output"] = "half a character \ud83d"
    rows[4]["instruction"] = "\udc00 what?"
    result, data, config = train(tmp_path, tiny_model, rows)
    output = finetune.save_results(result, data, config).adapter_dir
    report = json.loads((output / "quality_report.json").read_text(encoding="utf-8"))
    assert report["checks"]["broken_encoding"] == 2
    assert (output / "report.html").read_text(encoding="utf-8").endswith("</html>\n")


# --- trackers


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_with_its_pip_command(
    monkeypatch, tmp_path, name, tiny_model
):
    find = finetune.importlib.util.find_spec
    monkeypatch.setattr(
        finetune.importlib.util, "find_spec", lambda n, *a: None if n == name else find(n, *a)
    )
    check = finetune.check_packages(make_config(tmp_path, tiny_model, report_to=name))
    assert check.outcome == "failed"
    assert check.hint.endswith(f"-m pip install {name}")


def test_training_metrics_reach_the_tracker(trained, monkeypatch):
    from transformers import Trainer

    seen = []
    log = Trainer.log
    monkeypatch.setattr(
        Trainer,
        "log",
        lambda self, logs, *a, **k: seen.append(dict(logs)) or log(self, logs, *a, **k),
    )
    result, _, config = trained(logging_steps=1)
    assert finetune.trainer_arguments(config, "cpu").report_to == []
    assert [r["eval_loss"] for r in seen if "eval_loss" in r] == [
        r["eval_loss"] for r in result.history if "eval_loss" in r
    ]
    assert len([r for r in seen if "loss" in r]) == result.metrics["total_steps"]


def test_logits_are_those_of_the_last_positions(trained):
    result, data, _ = trained()
    logits = finetune.probe_logits(result.model, data.eval.select([0]))
    length = len(data.eval[0]["input_ids"])
    assert logits.shape == (min(length, finetune.PROOF_POSITIONS), result.model.config.vocab_size)
    assert logits.dtype == torch.float32
