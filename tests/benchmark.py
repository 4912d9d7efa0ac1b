"""Time this project's engine against plain TRL SFTTrainer, side by side, at the same settings.

Builds a Llama of TinyLlama's width with random weights at a chosen number of layers, takes real or
sample rows, and runs the variants in turn (A B A B ...), each in a process of its own, so that peak
memory is its own too. Prints medians and ratios and writes them as JSON.

    python tests/benchmark.py                                  fp32, 6 layers, the sample data
    python tests/benchmark.py --data rows.json --precision fp32 bf16 --rounds 3

Settings of both variants: micro-batch 2 x 8 = 16 examples a step, LoRA r 32 on q, k, v, o with
dropout 0.05, AdamW, no packing, no gradient checkpointing. `plain` is SFTTrainer as it comes with
those settings; in bf16 its base model is loaded in bf16 (its fastest set-up).
"""

import argparse
import itertools
import json
import logging
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
VARIANTS = ("plain", "ours")
BATCH = 16
SETTINGS = {
    "lora_dropout": 0.05, "max_seq_length": 1024, "warmup_steps": 2, "num_train_epochs": 1,
    "logging_steps": 1, "eval_steps": 100000, "save_steps": 100000, "max_eval_examples": 1,
    "min_disk_gb": 0, "device": "cpu",
}  # fmt: skip


def build_model(layers: int, tokenizer: Path, cache: Path) -> Path:
    """Write a Llama of TinyLlama's width with `layers` layers and random weights, once."""
    folder = cache / f"wide-llama-{layers}"
    if (folder / "model.safetensors").is_file():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048,
        rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tokenizer / name, folder / name)
    return folder


def tokenize_rows(model: Path, data: Path, count: int) -> "list[dict]":
    """Tokenize `count` shuffled rows as the program does."""
    import unified_finetune as program

    text = data.read_text(encoding="utf-8")
    is_array = text.lstrip().startswith("[")
    rows = json.loads(text) if is_array else list(map(json.loads, text.splitlines()))
    random.Random(42).shuffle(rows)
    tokenizer = program.load_tokenizer(model)
    examples = []
    for number, row in enumerate((rows * (count // len(rows) + 1))[:count]):
        question = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
        prompt = [{"role": "user", "content": question}]
        start = program.render_chat(tokenizer, prompt, answer_next=True)
        texts = [start, start + row["output"] + tokenizer.eos_token]
        prompt_ids, ids = program.tokenize(tokenizer, texts)
        spans = [[len(prompt_ids), len(ids)]]
        examples.append({"row": number, "input_ids": ids, "spans": spans, "length": len(ids)})
    return examples


def second_of(action: Callable[[], object]) -> float:
    """Return the seconds of the second of two runs; the first one warms memory up."""
    action()
    started = time.monotonic()
    action()
    return time.monotonic() - started


def run_ours(model: Path, examples: "list[dict]", evaluation: "list[dict]", half: bool) -> dict:
    """Train with the program's own stage 4 and return its timings."""
    import datasets

    import unified_finetune as program

    marks: list[float] = []
    values = SETTINGS | {"model_name": str(model), "output_dir": tempfile.mkdtemp(), "bf16": half}
    given = [(name, value, "benchmark") for name, value in values.items()]
    config = program.build_record(program.FineTuningConfig, given, [])
    base = program.open_base_model(str(model))
    data = types.SimpleNamespace(  # what the trainer reads of PreparedData
        train=datasets.Dataset.from_list(examples), eval=datasets.Dataset.from_list(evaluation),
        tokenizer=base.tokenizer, base=base, source=types.SimpleNamespace(sha256="benchmark"),
        quality=types.SimpleNamespace(truncated_examples=0, dropped_examples=0),
        max_seq_length=config.max_seq_length,
    )  # fmt: skip

    class Clock(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith("  step ") and "tokens/s" in record.getMessage():
                marks.append(time.monotonic())

    program.log.setLevel("INFO")
    program.log.addHandler(Clock())
    report = program.PreflightReport((), "cpu", "bfloat16" if half else "float32", base)
    result = program.train_lora(data, report, config)
    tuned, tokens = result.model, result.budget
    seconds = second_of(lambda: program.mean_loss(tuned, data.eval, tokens, "cpu"))
    losses = [r["loss"] for r in result.history if "loss" in r]
    return {"marks": marks, "evaluation": seconds, "losses": losses}


def run_plain(model: Path, examples: "list[dict]", evaluation: "list[dict]", half: bool) -> dict:
    """Train with SFTTrainer as it comes and return its timings."""
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    import unified_finetune as program

    def labelled(rows):
        both = [{"input_ids": r["input_ids"], "labels": program.labels_of(r)} for r in rows]
        return datasets.Dataset.from_list(both)

    marks, losses = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            marks.append(time.monotonic())

        def on_log(self, args, state, control, logs=None, **_):
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=2, bf16=half, seed=42,
        gradient_accumulation_steps=8, num_train_epochs=1, learning_rate=2e-5, use_cpu=True,
        weight_decay=0.01, warmup_steps=2, lr_scheduler_type="cosine", logging_steps=1,
        activation_checkpointing=False, save_strategy="no", report_to="none", max_length=None,
        disable_tqdm=True, per_device_eval_batch_size=8,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    lora = LoraConfig(
        r=32, lora_alpha=64, lora_dropout=0.05, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )  # fmt: skip
    dtype = torch.bfloat16 if half else torch.float32
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype), arguments,
        train_dataset=labelled(examples), eval_dataset=labelled(evaluation),
        processing_class=program.load_tokenizer(model), peft_config=lora, callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return {"marks": marks, "evaluation": second_of(trainer.evaluate), "losses": losses}


def work(args: argparse.Namespace) -> None:
    """Run one variant in this process and print its figures as the last line."""
    model = Path(args.model)
    examples = tokenize_rows(model, Path(args.data), BATCH * args.steps + 64)
    evaluation, examples = examples[:64], examples[64:]
    variant, precision = args.worker.split(":")
    run = run_ours if variant == "ours" else run_plain
    result = run(model, examples, evaluation, precision == "bf16")
    result |= {
        "step_seconds": [b - a for a, b in itertools.pairwise(result["marks"])],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "tokens_per_example": statistics.mean(e["length"] for e in examples),
        "eval_examples": len(evaluation),
    }
    print("\n" + json.dumps(result))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--data", default=str(REPO / "tests/data/college_advisor_sample.json"))
    assets = os.environ.get("UNIFIED_FINETUNE_ASSETS", "")
    parser.add_argument("--tokenizer", default=f"{assets}/tokenizers/tinyllama-1.1b-chat")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--steps", type=int, default=8, help="of each run; the first is warm-up")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each variant, in turn")
    parser.add_argument("--only", choices=VARIANTS, help="this variant only")
    parser.add_argument("--json", default="benchmark.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    cache = Path(tempfile.gettempdir()) / "unified-finetune-benchmark"
    model = build_model(args.layers, Path(args.tokenizer), cache)
    report = {precision: compare(args, model, precision) for precision in args.precision}
    Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


def compare(args: argparse.Namespace, model: Path, precision: str) -> dict:
    """Run the variants in turn and print a row for each."""
    runs: dict[str, list[dict]] = {v: [] for v in VARIANTS if args.only in (None, v)}
    for _ in range(args.rounds):
        for variant in runs:
            command = [sys.executable, __file__, "--worker", f"{variant}:{precision}"]
            command += ["--model", str(model), "--data", args.data, "--steps", str(args.steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            runs[variant].append(json.loads(done.stdout.strip().splitlines()[-1]))
    print(f"\n{precision}, {args.layers} layers, {os.cpu_count()} cores")
    print("variant  examples/s  ratio  tokens/s  peak GB  eval ex/s  ratio")
    form = "{:<7}{examples_per_second:>12.2f}{ratio:>7.2f}{tokens_per_second:>10.0f}"
    form += "{peak_gb:>9.2f}{eval_examples_per_second:>11.2f}{eval_ratio:>7.2f}"
    rows = {}
    for variant, results in runs.items():
        step = statistics.median(s for r in results for s in r["step_seconds"])
        evaluation = statistics.median(r["evaluation"] for r in results)
        first = results[0]
        row = {
            "examples_per_second": BATCH / step,
            "tokens_per_second": BATCH * first["tokens_per_example"] / step,
            "peak_gb": statistics.median(r["peak_gb"] for r in results),
            "eval_examples_per_second": first["eval_examples"] / evaluation,
            "losses": first["losses"],
        }
        base = rows.get("plain", row)
        row["ratio"] = row["examples_per_second"] / base["examples_per_second"]
        row["eval_ratio"] = row["eval_examples_per_second"] / base["eval_examples_per_second"]
        rows[variant] = row
        print(form.format(variant, **row))
    return {"layers": args.layers, "cores": os.cpu_count(), "variants": rows}


if __name__ == "__main__":
    main()
