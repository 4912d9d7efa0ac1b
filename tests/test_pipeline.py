"""All five stages through the real command line, on a real S3 server and on real data."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import unified_finetune as finetune

RUN = (
    "--device", "cpu", "--max_seq_length", "512", "--learning_rate", "1e-3", "--warmup_steps", "2",
    "--min_disk_gb", "0", "--num_train_epochs", "1", "--logging_steps", "5", "--yes",
)  # fmt: skip
FILES = {
    "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "training_config.json", "training_metrics.json",
    "quality_report.json", "README.md", "report.html", "curves.png",
}  # fmt: skip
METRICS = {
    "train_loss", "eval_loss", "eval_loss_before", "best_step", "total_steps", "train_runtime",
    "train_samples_per_second", "train_tokens_per_second", "input_tokens", "supervised_tokens",
    "peak_memory_gb", "device", "dtype", "trainable_params", "total_params", "trainable_percent",
    "train_examples", "eval_examples", "truncated_examples", "dropped_examples",
    "resumed_from_step", "data_sha256", "adapter_sha256", "verdict",
}  # fmt: skip


def check_result(output: Path) -> dict:
    """Check what every finished run leaves, and return its metrics."""
    present = {p.name for p in output.iterdir()}
    assert present >= FILES
    assert not [name for name in present if "staging" in name]
    metrics = json.loads((output / "training_metrics.json").read_text())
    assert metrics.keys() >= METRICS
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    assert metrics["adapter_sha256"] == finetune.sha256_of(output / "adapter_model.safetensors")
    assert (output / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    quality = json.loads((output / "quality_report.json").read_text())
    used = metrics["train_examples"] + metrics["eval_examples"] + metrics["dropped_examples"]
    assert used == quality["total_examples"]
    share = quality["valid_examples"] / quality["total_examples"]
    assert share == pytest.approx(quality["quality_score"])
    tokenizer = json.loads((output / "tokenizer_config.json").read_text())
    assert "<|assistant|>" in tokenizer["chat_template"]
    check_adapter(output)
    return metrics


def check_adapter(output: Path) -> None:
    """Load the adapter as any user of peft would: it changes the logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base_name = json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_name), output)
    ids = torch.tensor([[1, 300, 301, 302, 5, 9]])
    with torch.inference_mode():
        after = model.eval()(input_ids=ids).logits
        with model.disable_adapter():
            assert (model(input_ids=ids).logits - after).abs().max() > 0.01


def test_from_the_bucket_to_an_adapter_and_the_second_run_has_nothing_to_do(
    run_cli, bucket, tiny_model, sample_data, tmp_path
):
    environment = bucket.environment()
    bucket.put("multi_source/training_datasets/college_alpaca.json", sample_data.read_bytes())
    arguments = (*RUN, "--model_name", tiny_model, "--output_dir", "out")
    first = run_cli(*arguments, env=environment)
    assert (first.code, first.stdout) == (0, "out\n"), first.stderr
    for number, name in enumerate(("preflight", "download", "prepare", "train", "save"), 1):
        assert f"[{number}/5] {name}" in first.stderr
    check_result(tmp_path / "out")
    for text in (first.stderr, *(p.read_text() for p in (tmp_path / "logs").rglob("*.log"))):
        assert environment["R2_SECRET_ACCESS_KEY"] not in text
        assert "Traceback" not in text
    second = run_cli(*arguments, env=environment)
    assert (second.code, second.stdout) == (0, "out\n")
    assert "cached copy is current" in second.stderr
    assert "This run is finished" in second.stderr


def test_training_config_repeats_the_run_byte_for_byte(run_cli, tiny_model, sample_data, tmp_path):
    rows = json.loads(sample_data.read_text())[:60]
    rows[7]["output"] = "word " * 200_000  # a megabyte: left out and named
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    files = ("--model_name", tiny_model, "--data_path", "rows.json")
    first = run_cli(*RUN, *files, "--output_dir", "a")
    assert first.code == 0, first.stderr
    shutil.copy(tmp_path / "a/training_config.json", tmp_path / "again.json")
    second = run_cli("--config", "again.json", "--output_dir", "b", "--yes")
    assert second.code == 0, second.stderr
    one, two = (finetune.sha256_of(tmp_path / d / "adapter_model.safetensors") for d in "ab")
    assert one == two
    report = json.loads((tmp_path / "a/quality_report.json").read_text())
    assert 7 in [entry["row"] for entry in report["dropped"]]


ALPACA = pytest.param("alpaca_clean_sample.jsonl", marks=pytest.mark.scale)


@pytest.mark.parametrize("name", [ALPACA, "short_answers_7888.json"])
def test_real_data_lowers_the_loss_of_a_real_model(run_cli, assets, tmp_path, name):
    model = assets / "models/stories260K-llama-hf"
    epochs = "0.35" if name.endswith("jsonl") else "0.1"
    result = run_cli(
        *RUN, "--model_name", model, "--data_path", assets / "data" / name, "--output_dir", "out",
        "--num_train_epochs", epochs,
    )  # fmt: skip
    assert result.code == 0, result.stderr
    metrics = check_result(tmp_path / "out")
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.3


def write_rows(path: Path, instruction: object, output: object) -> None:
    path.write_text(json.dumps([{"instruction": instruction, "output": output}] * 20))


BAD_INPUT = {  # what stands in the file is tests/test_prepare.py's
    "empty file": (lambda p: p.write_text(""), "empty"),
    "truncated JSON": (lambda p: p.write_text('[{"instruction": "a", "outp'), "line 1"),
    "only empty outputs": (lambda p: write_rows(p, "q", ""), "None of the 20 rows is usable"),
    "numbers for text": (lambda p: write_rows(p, 1, 1), "None of the 20 rows is usable"),
    "a folder": (lambda p: p.mkdir(), "rows.json"),
    "no such file": (lambda p: None, "No such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_with_its_own_message(run_cli, tiny_model, tmp_path, case):
    make, words = BAD_INPUT[case]
    make(tmp_path / "rows.json")
    flags = [flag for flag in RUN if flag != "--yes"]
    result = run_cli(*flags, "--model_name", tiny_model, "--data_path", "rows.json")
    assert result.code in (11, 12, 13), result.stderr
    assert words in result.stderr and "->" in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
