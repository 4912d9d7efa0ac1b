"""All five stages through the real command line, on a real S3 server and on real data."""

import json
from pathlib import Path

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
    tokenizer = json.loads((output / "tokenizer_config.json").read_text())
    assert "<|assistant|>" in tokenizer["chat_template"]
    return metrics


def test_from_the_bucket_to_an_adapter_that_its_settings_give_again_byte_for_byte(
    run_cli, bucket, tiny_model, sample_data, tmp_path
):
    environment = bucket.environment()
    rows = json.loads(sample_data.read_text())
    rows[7]["output"] = "word " * 200_000  # a megabyte: left out and named
    bucket.put("multi_source/training_datasets/alpaca.json", json.dumps(rows).encode())
    arguments = (*RUN, "--model_name", tiny_model, "--output_dir", "out")
    first = run_cli(*arguments, env=environment)
    assert (first.code, first.stdout) == (0, "out\n"), first.stderr
    for number, name in enumerate(("preflight", "download", "prepare", "train", "save"), 1):
        assert f"[{number}/5] {name}" in first.stderr
    metrics = check_result(tmp_path / "out")
    report = json.loads((tmp_path / "out/quality_report.json").read_text())
    assert 7 in [entry["row"] for entry in report["dropped"]]
    second = run_cli(*arguments, env=environment)
    assert (second.code, second.stdout) == (0, "out\n")
    assert "cached copy is current" in second.stderr
    assert "This run is finished" in second.stderr
    again = ("--config", "out/training_config.json", "--output_dir", "again", "--yes")
    third = run_cli(*again, env=environment)
    assert (third.code, third.stdout) == (0, "again\n"), third.stderr
    assert check_result(tmp_path / "again")["adapter_sha256"] == metrics["adapter_sha256"]
    logs = [path.read_text() for path in (tmp_path / "logs").rglob("*.log")]
    assert len(logs) == 3
    for text in (first.stderr, second.stderr, third.stderr, *logs):
        assert environment["R2_SECRET_ACCESS_KEY"] not in text
        assert "Traceback" not in text


def test_real_data_lowers_the_loss_of_a_real_model(run_cli, assets, tmp_path):
    model, data = assets / "models/stories260K-llama-hf", assets / "data/short_answers_7888.json"
    files = ("--model_name", model, "--data_path", data, "--output_dir", "out")
    result = run_cli(*RUN, *files, "--num_train_epochs", "0.1")
    assert result.code == 0, result.stderr
    metrics = check_result(tmp_path / "out")
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.3


def test_bad_data_end_with_their_own_message_and_exit_code(run_cli, tiny_model, tmp_path):
    """Each other reason is in tests/test_prepare.py and tests/test_download.py."""
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "outp')
    flags = [flag for flag in RUN if flag != "--yes"]
    result = run_cli(*flags, "--model_name", tiny_model, "--data_path", "rows.json")
    assert (result.code, result.stdout) == (13, ""), result.stderr
    assert "line 1" in result.stderr and "->" in result.stderr
    assert "Traceback" not in result.stderr
