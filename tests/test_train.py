"""Stage 4: the engine learns what SFTTrainer learns, and no interruption changes the adapter."""

import dataclasses
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import save

if __name__ == "__main__":  # as a run of its own, for signals and several processes
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
else:
    from conftest import FAULTS

import unified_finetune as finetune

MAX_LENGTH = 512


def make_config(output: Path, model: Path, **settings: object) -> finetune.FineTuningConfig:
    """Return settings for a short run on the CPU."""
    values: Any = {
        "model_name": str(model), "output_dir": str(output), "device": "cpu", "warmup_steps": 0,
        "max_seq_length": MAX_LENGTH, "learning_rate": 1e-3, "num_train_epochs": 1, "eval_steps": 3,
        "save_steps": 2, "min_disk_gb": 0, "logging_steps": 1,
    } | settings  # fmt: skip
    return finetune.FineTuningConfig(**values)


def make_rows(count: int, seed: int, prefix: int = 4) -> "list[dict[str, Any]]":
    """Return rows of random tokens behind one prefix; two in eighty are longer than 256 tokens."""
    chance, rows = random.Random(seed), []
    start = [1, *(chance.randrange(3, 200) for _ in range(prefix - 1))]
    for number in range(count):
        length = 320 if number % 40 == 3 else chance.randint(5, 40)
        ids = start + [chance.randrange(3, 200) for _ in range(length)]
        span = [chance.randint(prefix, len(ids) - 3), len(ids)]
        row = {"file": 0, "row": number, "question": "?", "answer": "!", "input_ids": ids}
        rows.append(row | {"spans": [span], "length": len(ids)})
    return rows


def make_data(model: Path, count: int = 80, prefix: int = 4, **changes: Any) -> Any:
    """Return prepared data: `count` training rows and ten held-out ones."""
    base = finetune.open_base_model(str(model))
    quality = types.SimpleNamespace(truncated_examples=0, dropped_examples=0)
    source = finetune.DatasetFile(Path("rows"), 1, None, "0" * 64, "test")
    train, held_out = make_rows(count, 0, prefix), make_rows(10, 9, prefix)
    values = {
        "train": datasets.Dataset.from_list(train), "eval": datasets.Dataset.from_list(held_out),
        "tokenizer": base.tokenizer, "base": base, "quality": quality, "source": source,
        "max_seq_length": MAX_LENGTH, "shown": (),
    }  # fmt: skip
    return finetune.PreparedData(**(values | changes))


def train(data: Any, config: finetune.FineTuningConfig) -> finetune.TrainResult:
    """Run stage 4 on the CPU."""
    return finetune.train_lora(data, finetune.PreflightReport((), "cpu", "float32"), config)


def digest(result: finetune.TrainResult) -> str:
    """Return a hash of the adapter's bytes."""
    return hashlib.sha256(save(finetune.adapter_weights(result.model))).hexdigest()


def losses_of(history: Any) -> "list[float]":
    """Return the training loss of every step."""
    return [record["loss"] for record in history if "loss" in record]


def evaluations_of(history: Any) -> "list[tuple[int, int, float]]":
    """Return step, examples and loss of every evaluation during training."""
    names = ("step", "examples", "eval_loss")
    return [tuple(r[n] for n in names) for r in history if "eval_loss" in r]


def refused(words: str, data: Any, config: finetune.FineTuningConfig, **changes: Any) -> str:
    """Check that stage 4 refuses to train in these words; return its hint."""
    with pytest.raises(finetune.FineTuningError, match=words) as error:
        train(data, dataclasses.replace(config, **changes))
    return error.value.hint


def steps_of(output: Path) -> "list[int]":
    """Return the steps of the checkpoints, newest first."""
    return list(finetune.list_checkpoints(output))


@pytest.fixture(scope="session")
def data(tiny_model):
    return make_data(tiny_model)


@pytest.fixture
def config(tmp_path, tiny_model):
    return make_config(tmp_path / "out", tiny_model)


@pytest.fixture(scope="session")
def calm(data, tiny_model, tmp_path_factory):
    """Train once, undisturbed, with the settings of `config`; return the result and its folder."""
    output = tmp_path_factory.mktemp("calm") / "out"
    result = train(data, make_config(output, tiny_model))
    return result, digest(result), output


@pytest.fixture
def resumable(calm, config):
    """Put the checkpoints of the calm run into the test's own output folder; return that."""
    return Path(shutil.copytree(calm[2], config.output_dir))


def build_model(model: Path, dropout: float = 0.0) -> Any:
    """Return a model with the engine and an adapter that does something."""
    base = finetune.open_base_model(str(model))
    loaded = finetune.load_base_model(base, "cpu", "float32")
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    shape = {"r": 8, "lora_alpha": 16, "lora_dropout": dropout, "target_modules": list(targets)}
    tuned = finetune.add_adapter(loaded, base, 1, **shape)
    finetune.install_engine(tuned)
    torch.manual_seed(3)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return tuned


REAL_TOKENIZER = "tokenizers/tinyllama-1.1b-chat"


def gradient(model: Any, *losses: Any) -> torch.Tensor:
    """Return the adapter's gradient of summed losses, or of those of passes."""
    model.zero_grad()
    for loss in losses:
        loss = finetune.pass_loss(model, loss) if isinstance(loss, finetune.Pass) else loss
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


# --- the engine


def test_passes_hold_whole_examples_within_the_budget():
    lengths = [random.Random(7).randint(1, 300) for _ in range(64)]
    passes = finetune.plan_passes(lengths, 256)
    assert sorted(i for p in passes for i in p) == list(range(64))
    assert all(sum(lengths[i] for i in p) <= 256 or len(p) == 1 for p in passes)


@pytest.mark.parametrize("fill", [False, True], ids=["as they are", "filled up"])
@pytest.mark.parametrize("width", [finetune.LONGEST_MATH_ROW, 8], ids=["products", "fused kernel"])
def test_no_example_of_a_pass_sees_another_and_gradients_are_the_model_s_own(
    data, tiny_model, monkeypatch, width, fill
):
    monkeypatch.setattr(finetune, "LONGEST_MATH_ROW", width)
    model = build_model(tiny_model).eval()
    examples = [data.train[i] for i in range(12)]
    layout = finetune.lay_out(examples, "cpu", fill=fill)
    inputs = [tuple(e["input_ids"][:-1]) for e in examples]
    beginnings = {ids[: end + 1] for ids in inputs for end in range(len(ids))}
    assert len(beginnings) < sum(map(len, inputs))
    assert len(layout.scatter) == len(beginnings) + fill * (-len(beginnings) % 128)
    ours, loss = gradient(model, layout), finetune.pass_loss(model, layout).item()
    assert loss == pytest.approx(
        finetune.pass_loss(model, finetune.lay_out(examples, "cpu")).item(), rel=1e-6
    )
    losses = []
    with finetune.engine_off(model):
        for example in examples:
            ids = torch.tensor([example["input_ids"]])
            logits = model(input_ids=ids, use_cache=False).logits[0]
            ((start, end),) = example["spans"]
            said, right = logits[start - 1 : end - 1], ids[0, start:end]
            losses.append(torch.nn.functional.cross_entropy(said, right, reduction="sum"))
        theirs = gradient(model, *losses)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
    """Note every operation together with the shapes that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[object, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.is_view:  # nothing is computed
            return function(*args, **kwargs or {})
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        shapes = [tuple(a.shape) for a in leaves if isinstance(a, torch.Tensor)]
        self.seen.add((function, *shapes))
        return function(*args, **kwargs or {})


def test_filled_passes_of_real_rows_repeat_a_few_shapes(assets, tiny_model):
    model, tokenizer = build_model(tiny_model), finetune.load_tokenizer(assets / REAL_TOKENIZER)
    rows, examples = json.loads((assets / "data/short_answers_7888.json").read_text()), []
    for row in random.Random(3).sample(rows, 3200):
        asked = [{"role": "user", "content": row["instruction"]}]
        front = finetune.render_chat(tokenizer, asked, answer_next=True)
        texts = [front, front + row["output"] + tokenizer.eos_token]
        prompt, ids = finetune.tokenize(tokenizer, texts)
        small = [3 + i % 200 for i in ids]  # the tiny model's tokens; equal beginnings stay equal
        examples.append({"input_ids": small, "spans": [[len(prompt), len(ids)]]})
    shapes, computed, real, layouts = Shapes(), 0, 0, set()
    for step in range(200):
        batch = examples[16 * step : 16 * step + 16]
        real += len(finetune.lay_out(batch, "cpu").scatter)
        layout = finetune.lay_out(batch, "cpu", step, fill=True)
        computed += len(layout.scatter)
        sizes = tuple(getattr(part, "shape", None) for part in layout)
        if (layout.rows, layout.width, sizes) not in layouts:  # the others repeat what one did
            layouts.add((layout.rows, layout.width, sizes))
            with shapes:
                layout = finetune.lay_out(batch, "cpu", step, fill=True)
                finetune.pass_loss(model, layout).backward()
    assert len(shapes.seen) <= 300
    assert 1 - real / computed <= 0.12


def test_a_conversation_trained_on_all_turns_equals_its_prefixes_at_a_fraction_of_the_tokens(
    tiny_model,
):
    model, chance = build_model(tiny_model).eval(), random.Random(5)
    ids = [1, *(chance.randrange(3, 200) for _ in range(300))]
    spans = [[start + 30, start + 48] for start in range(1, 300, 50)]
    whole = finetune.lay_out([{"input_ids": ids, "spans": spans}], "cpu")
    prefixes = [
        finetune.lay_out([{"input_ids": ids[:end], "spans": [[start, end]]}], "cpu")
        for start, end in spans
    ]
    assert len(spans) == 6
    assert len(whole.scatter) <= 0.4 * sum(len(p.scatter) for p in prefixes)
    ours, theirs = gradient(model, whole), gradient(model, *prefixes)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_the_head_s_loss_and_gradient_are_exact_in_slices(monkeypatch):
    monkeypatch.setattr(finetune, "HEAD_CHUNK", 7)
    torch.manual_seed(1)
    hidden, targets = torch.randn(23, 16, requires_grad=True), torch.randint(0, 50, (23,))
    head = torch.nn.Linear(16, 50).requires_grad_(False)
    loss = finetune.head_loss(hidden, head, targets)
    loss.backward()
    ours, hidden.grad = hidden.grad.clone(), None
    expected = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (ours - hidden.grad).abs().max().item() < 1e-5


def test_dropout_is_a_function_of_the_seed_also_where_activations_are_recomputed(data, tiny_model):
    mask = finetune.dropout_mask(torch.Size((1000, 1001)), 0.05, torch.device("cpu"), 7)
    assert mask.float().mean().item() == pytest.approx(0.95, abs=1e-3)
    model = build_model(tiny_model, dropout=0.3).train()
    examples = [data.train[i] for i in range(12)]
    first, second = (finetune.lay_out(examples, "cpu", seed) for seed in (5, 6))
    plain = gradient(model, first, second)
    assert not torch.equal(gradient(model, first), gradient(model, second))
    assert torch.equal(gradient(model, first), gradient(model, first))
    finetune.recompute_activations(model)
    torch.manual_seed(99)
    assert torch.equal(gradient(model, first, second), plain)
    losses = [finetune.pass_loss(model.eval(), layout).item() for layout in (first, second)]
    assert losses[0] == losses[1]


def test_eval_loss_does_not_depend_on_the_passes(data, tiny_model):
    model = build_model(tiny_model)
    losses = [finetune.mean_loss(model, data.train, budget, "cpu") for budget in (64, 512, 8192)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


@pytest.mark.parametrize("part", ["lm_head", "lora_B"])
def test_a_model_that_computes_otherwise_is_refused(data, tiny_model, part):
    model = build_model(tiny_model)
    before = finetune.adapter_weights(model)
    finetune.prove_engine(model, data.train, "cpu")
    assert all(torch.equal(before[n], v) for n, v in finetune.adapter_weights(model).items())
    for name, module in model.named_modules():
        if name.endswith(part) or part + ".default" in name:
            module.register_forward_hook(lambda _m, _i, y: 1.5 * y)
    with pytest.raises(finetune.FineTuningError, match="does not compute this model"):
        finetune.prove_engine(model, data.train, "cpu")


# --- training


def train_plainly(data, config, folder):
    """Train with SFTTrainer as it comes, and return its losses and its adapter."""
    from peft import LoraConfig, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = []
    for e in data.train:
        start = e["spans"][0][0]
        labels = [-100] * start + e["input_ids"][start:]
        rows.append({"input_ids": e["input_ids"], "labels": labels})
    off = {"activation_checkpointing": False}
    if not hasattr(SFTConfig, "activation_checkpointing"):  # transformers 4
        off = {"gradient_checkpointing": False}
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(config.model_name, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=8,
            num_train_epochs=config.num_train_epochs, learning_rate=config.learning_rate,
            weight_decay=config.weight_decay, warmup_steps=0, lr_scheduler_type="cosine",
            bf16=False, use_cpu=True, logging_steps=1, **off,
            save_strategy="no", report_to="none", seed=config.seed, disable_tqdm=True,
            max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=data.tokenizer,
        peft_config=LoraConfig(
            r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=0.0,
            target_modules=list(config.target_modules), task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, get_peft_model_state_dict(trainer.model)


@pytest.mark.parametrize(
    ("granted", "prefix"), [(MAX_LENGTH, 4), (24, 4), (MAX_LENGTH, 40)],
    ids=["one pass a step", "examples longer than the budget", "a long shared prefix"],
)  # fmt: skip
def test_the_engine_learns_what_plain_sfttrainer_learns(tiny_model, tmp_path, granted, prefix):
    data = make_data(tiny_model, prefix=prefix, max_seq_length=granted)
    config = make_config(tmp_path / "out", tiny_model, lora_dropout=0, learning_rate=2e-5)
    result = train(data, config)
    losses, weights = train_plainly(data, config, tmp_path / "plain")
    assert len(losses) == result.metrics["total_steps"] == 5
    old = torch.__version__.startswith("2.2")  # its Trainer rounds, and draws other A matrices
    assert losses_of(result.history) == pytest.approx(losses, abs=6e-5 if old else 1e-5)
    ours = finetune.adapter_weights(result.model) if not old else {}
    weights = weights if not old else {}
    assert ours.keys() == weights.keys()
    assert all((ours[n] - weights[n]).abs().max() < 1e-5 for n in ours)


def test_early_stopping_keeps_the_best_adapter_and_the_metrics_say_what_was_done(data, config):
    config = dataclasses.replace(
        config, learning_rate=0.5, num_train_epochs=8, early_stopping_patience=2, eval_steps=1,
        max_eval_examples=1000, save_steps=100,
    )  # fmt: skip
    started = time.monotonic()
    result = train(data, config)
    wall, metrics = time.monotonic() - started, result.metrics
    evaluations = evaluations_of(result.history)
    best = min(evaluations, key=lambda e: e[2])
    assert metrics["best_step"] == best[0]
    assert evaluations[-1][0] == metrics["total_steps"] == best[0] + 2
    assert metrics["planned_steps"] == 40
    assert metrics["eval_loss"] == pytest.approx(best[2], abs=1e-5)
    assert 0 < metrics["train_runtime"] < wall
    rows = metrics["total_steps"] * 16
    speed = pytest.approx(rows / metrics["train_runtime"], rel=0.01)
    assert metrics["train_samples_per_second"] == speed
    assert steps_of(Path(config.output_dir)) == [metrics["total_steps"]]
    again = train(data, config)  # a stop after the last step trains no further
    assert (again.metrics["total_steps"], digest(again)) == (metrics["total_steps"], digest(result))


def test_the_periodic_evaluation_looks_at_a_seeded_sample_and_says_so(data, config):
    results = [
        train(data, dataclasses.replace(config, max_eval_examples=3, seed=seed, overwrite=True))
        for seed in (1, 2)
    ]
    records = [evaluations_of(result.history) for result in results]
    assert [record[:2] for record in records[0]] == [(3, 3), (5, 3)]
    assert abs(records[0][0][2] - records[1][0][2]) > 1e-3
    assert abs(records[0][-1][2] - results[0].metrics["eval_loss"]) > 1e-4


OUT_OF_MEMORY = (
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "MPS backend out of memory (MPS allocated: 17.00 GB)",
    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried",
)


def test_out_of_memory_takes_smaller_passes_then_recomputes_and_learns_the_same(
    data, config, monkeypatch, caplog
):
    config = dataclasses.replace(config, lora_dropout=0)
    expected, real, failures = train(data, config), torch.Tensor.backward, list(OUT_OF_MEMORY)

    def scarce(self, *args, **kwargs):
        if failures:
            FAULTS["memory that runs out"] += 1
            raise RuntimeError(failures.pop())
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", scarce)
    result = train(data, dataclasses.replace(config, overwrite=True))
    assert caplog.text.count("Out of memory: forward passes of at most") == 3
    assert losses_of(result.history) == pytest.approx(losses_of(expected.history), abs=1e-4)
    failures[:] = OUT_OF_MEMORY * 9
    assert "--max_seq_length" in refused("Out of memory on cpu", data, config, overwrite=True)
    assert "Out of memory: activations are recomputed" in caplog.text


OTHER_DEVICE = pytest.mark.skipif(
    torch.__version__.startswith("2.2"), reason="safetensors takes cpu:0 from torch 2.5 on"
)


@OTHER_DEVICE
def test_a_device_that_gives_up_hands_over_to_the_cpu_and_frees_its_model(
    data, config, calm, monkeypatch, caplog
):
    from transformers import AutoModelForCausalLM

    real, load = torch.linalg.vector_norm, AutoModelForCausalLM.from_pretrained
    calls, alive, models = [], [], []

    def broken(numbers, *args, **kwargs):
        calls.extend([1] * (numbers.shape == (16,)))  # norms: the program's, then the clipping's
        wrong = len(calls) in (7, 8) and numbers.shape == (16,)
        return torch.tensor(float("nan")) if wrong else real(numbers, *args, **kwargs)

    def loading(*args, **kwargs):
        alive.append(sum(reference() is not None for reference in models))
        model = load(*args, **kwargs)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(torch.linalg, "vector_norm", broken)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loading)
    report = finetune.PreflightReport((), "cpu:0", "float32")  # to the program, not the CPU
    result = finetune.train_lora(data, report, config)
    assert "Step 4 gives no finite numbers on cpu:0, twice over; going on" in caplog.text
    assert alive == [0, 0]
    assert (result.metrics["device"], result.metrics["resumed_from_step"]) == ("cpu", 2)
    assert digest(result) == calm[1]


def test_a_step_whose_work_a_device_dropped_is_computed_again(
    data, config, calm, monkeypatch, caplog
):
    real, counted = torch.Tensor.add_, []

    def forgetful(self, *args, **kwargs):
        counted.extend([1] * (self.dtype == torch.int64 and self.dim() == 0))
        return self if len(counted) == 12 and self.dim() == 0 else real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "add_", forgetful)
    result = train(data, config)
    assert caplog.text.count("is not finite (loss nan)") == 1
    assert digest(result) == calm[1]


HANGING = """
import ctypes, sys
import unified_finetune as finetune
from torch import is_grad_enabled
from torch.nn import functional
passes, embed = [], functional.embedding

def hang(*args, **kwargs):
    passes.extend([1] * is_grad_enabled())
    if len(passes) == 14:
        ctypes.CDLL(None).sleep(600)  # in C, where no handler of Python runs
    return embed(*args, **kwargs)

functional.embedding = hang
finetune.HANG_SECONDS = 2.0
finetune.choose_device = lambda wanted: ("cpu:0", "to the program, not the CPU")
sys.exit(finetune.main())
"""


@OTHER_DEVICE
def test_a_hang_ends_in_a_run_on_the_cpu_with_the_same_adapter(tmp_path, tiny_model, sample_data):
    given = f"--model_name={tiny_model} --data_path={sample_data} --log_dir={tmp_path / 'logs'}"
    given += " --save_steps=1 --min_disk_gb=0 --num_train_epochs=0.5 --yes --output_dir"
    calm = [*given.split(), str(tmp_path / "calm"), "--device=cpu"]
    expected = finetune.run(finetune.parse_command_line(calm)[1]).metrics["adapter_sha256"]
    path = str(Path(finetune.__file__).parent)
    command = [sys.executable, "-c", HANGING, "train", *given.split(), "out"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, timeout=500,
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "hangs: beginning again from the last checkpoint on the CPU" in done.stderr
    metrics = json.loads((tmp_path / "out" / "training_metrics.json").read_text())
    assert (metrics["adapter_sha256"], metrics["device"]) == (expected, "cpu")


def test_the_plan_names_a_warm_up_and_a_rate_that_teach_little(data, config, caplog, monkeypatch):
    caplog.set_level("INFO")
    real = datasets.Dataset.__iter__

    def narrow(table):  # lengths are gone through, whole rows are not: there may be millions
        assert "input_ids" not in table.column_names
        return real(table)

    monkeypatch.setattr(datasets.Dataset, "__iter__", narrow)
    slow = {"warmup_steps": 50, "learning_rate": 2e-5, "gradient_checkpointing": "on"}
    report = finetune.PreflightReport((), "cpu", "float32")
    finetune.estimate_run(data, report, dataclasses.replace(config, **slow))
    for told in (
        "plan: 5 steps of 16 examples", "gets to 2e-06 of the 2e-05", "Set --warmup_steps 0",
        "2e-05 is far below what LoRA usually takes (1e-4 to 2e-4)", "a measured step took",
    ):  # fmt: skip
        assert told in caplog.text
    assert not Path(config.output_dir).exists()


def test_init_adapter_starts_from_an_earlier_adapter_of_the_same_shape(data, config, calm):
    start = str(calm[2] / "checkpoint-5")
    second = dataclasses.replace(config, init_adapter=start, lora_dropout=0)
    result = train(data, second)
    assert result.metrics["eval_loss"] < calm[0].metrics["eval_loss"]
    assert losses_of(result.history)[0] < losses_of(calm[0].history)[0]
    hint = refused("lora_r 32, and this run has 8", data, second, lora_r=8, overwrite=True)
    assert "--lora_r 32" in hint
    other = {"target_modules": ("q_proj",), "overwrite": True}
    refused("has target_modules k_proj o_proj", data, second, **other)


# --- checkpoints and other runs


def test_other_settings_data_and_bases_are_refused_by_name(data, config, calm, resumable, tmp_path):
    told = r"lora_r was 32 and is now 8(.|\n)*seed was 42 and is now 7"
    assert "--overwrite" in refused(told, data, config, lora_r=8, seed=7)
    source = dataclasses.replace(data.source, sha256="1" * 64)
    refused("the data are others", dataclasses.replace(data, source=source), config)
    base = dataclasses.replace(data.base, digest="1" * 64)
    refused("the base model is another one", dataclasses.replace(data, base=base), config)
    moved = tmp_path / "moved"  # the same base elsewhere is the same run
    shutil.copytree(config.model_name, moved)
    copy = dataclasses.replace(data, base=finetune.open_base_model(str(moved)))
    again = train(copy, dataclasses.replace(config, model_name=f"{moved}/"))
    assert (again.metrics["resumed_from_step"], digest(again)) == (5, calm[1])
    train(data, dataclasses.replace(config, seed=7, overwrite=True, save_steps=3))
    assert steps_of(resumable) == [5, 3]


def test_resume_from_a_path_obeys_the_output_folder_and_the_checkpoint(
    data, config, calm, resumable, tmp_path
):
    start = calm[2] / "checkpoint-2"
    elsewhere = dataclasses.replace(config, output_dir=str(tmp_path / "b"), resume=str(start))
    result = train(data, elsewhere)
    assert (result.metrics["resumed_from_step"], digest(result)) == (2, calm[1])
    other = dataclasses.replace(elsewhere, seed=1, resume="auto", overwrite=True)
    train(data, other)
    refused("seed was 1 and is now 42", data, elsewhere)
    refused("seed was 42 and is now 1", data, other, resume=str(start))
    inside = tmp_path / "b" / "checkpoint-2"  # of this run, below newer ones of another
    shutil.rmtree(inside)
    shutil.copytree(start, inside)
    result = train(data, dataclasses.replace(elsewhere, resume=str(inside), overwrite=True))
    assert (result.metrics["resumed_from_step"], digest(result)) == (2, calm[1])
    assert steps_of(tmp_path / "b") == [5, 4, 2]
    refused("--resume .* cannot be used", data, config, resume=str(tmp_path))


def finish(config: finetune.FineTuningConfig, data: Any, result: finetune.TrainResult) -> None:
    """Write what stage 5 leaves of a finished run, as far as stage 4 reads it."""
    output = Path(config.output_dir)
    newest = next(iter(finetune.list_checkpoints(output).values())) / finetune.ADAPTER_FILE
    shutil.copy(newest, output)
    metrics = result.metrics | {"adapter_sha256": finetune.sha256_of(newest)}
    provenance = {"provenance": {"identity": result.identity}}
    settings = finetune.saved_settings(config) | provenance
    finetune.write_json(output / finetune.CONFIG_FILE, settings)
    finetune.write_json(output / finetune.METRICS_FILE, metrics)


def test_a_finished_run_is_known_and_names_settings_that_change_nothing(
    data, config, calm, resumable, caplog
):
    caplog.set_level("INFO")
    assert finetune.find_finished_run(config, data) is None
    finish(config, data, calm[0])
    found = finetune.find_finished_run(config, data)
    assert found and found.metrics["total_steps"] == 5
    assert "change nothing" not in caplog.text
    changed = dataclasses.replace(config, save_steps=7, sample_prompts=("other",))
    assert finetune.find_finished_run(changed, data)
    names = "save_steps, sample_prompts"
    assert f"these settings change nothing in a finished run: {names}" in caplog.text
    assert finetune.find_finished_run(dataclasses.replace(config, seed=1), data) is None
    (resumable / finetune.ADAPTER_FILE).write_bytes(b"damaged")
    shutil.rmtree(resumable / "checkpoint-5")
    assert finetune.find_finished_run(config, data) is None
    assert "is damaged; it is written again" in caplog.text
    assert train(data, config).metrics["resumed_from_step"] == 4
    for folder in finetune.list_checkpoints(resumable).values():
        shutil.rmtree(folder)
    (resumable / finetune.CONFIG_FILE).write_text("{")  # a stranger's, or a damaged one
    for overwrite in (False, True):
        assert "Move" in refused("no whole record", data, config, overwrite=overwrite)


def test_two_epochs_train_on_the_same_examples_reordered_and_keep_the_best_and_the_newest(
    data, config
):
    config = dataclasses.replace(config, save_steps=1, eval_steps=1, save_total_limit=2)
    result = train(data, dataclasses.replace(config, learning_rate=1.0, num_train_epochs=2))
    tokens = [record["tokens"] for record in result.history if "tokens" in record]
    assert len(tokens) == 10 and sum(tokens[:5]) == sum(tokens[5:]) and tokens[:5] != tokens[5:]
    assert result.metrics["best_step"] < 10
    assert steps_of(Path(config.output_dir)) == [10, result.metrics["best_step"]]


# --- interruptions


def test_a_signal_loses_no_finished_step_and_changes_no_byte(
    data, config, calm, caplog, monkeypatch
):
    caplog.set_level("INFO")

    class Sender(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith(line):
                FAULTS["a signal"] += 1
                finetune.stop.number = signal.SIGINT

    sender = Sender()
    finetune.log.addHandler(sender)
    for line, step in (("  step 1/5 ", 1), ("  step 3: eval", 3), ("  step 5/5 ", 5)):  # noqa: B007
        with pytest.raises(KeyboardInterrupt):
            train(data, config)
        finetune.stop.forget()
        assert f"Stopped after step {step} of 5; the same command goes on" in caplog.text
        assert steps_of(Path(config.output_dir))[0] == step
    finetune.log.removeHandler(sender)
    result = train(data, config)
    assert (result.metrics["resumed_from_step"], digest(result)) == (5, calm[1])
    same = ("train_loss", "eval_loss", "eval_loss_before", "best_step", "total_steps",
            "input_tokens", "supervised_tokens")  # fmt: skip
    assert {n: result.metrics[n] for n in same} == {n: calm[0].metrics[n] for n in same}
    assert evaluations_of(result.history) == evaluations_of(calm[0].history)


def test_a_resumed_run_obeys_what_may_change(data, config, calm, resumable, caplog):
    caplog.set_level("INFO")
    for step in (4, 5):
        shutil.rmtree(resumable / f"checkpoint-{step}")
    changed = dataclasses.replace(
        config, gradient_checkpointing="on", eval_steps=4, save_steps=1, max_eval_examples=2,
        early_stopping_patience=1,
    )  # fmt: skip
    result = train(data, changed)
    assert "activations are recomputed (--gradient_checkpointing)" in caplog.text
    assert [record[:2] for record in evaluations_of(result.history)] == [(4, 2), (5, 2)]
    assert steps_of(resumable) == [5, 4, 3]
    assert losses_of(result.history) == losses_of(calm[0].history)


def test_two_processes_train_the_model_that_one_trains(data, config, tmp_path, tiny_model):
    one = train(data, dataclasses.replace(config, lora_dropout=0))
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", __file__]
    launch += [str(tmp_path / "two"), str(tiny_model)]
    child = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    progress = json.loads((tmp_path / "two" / "checkpoint-5" / "progress.json").read_text())
    assert losses_of(progress["steps"]) == pytest.approx(losses_of(one.history), abs=1e-5)
    assert [p.name for p in (tmp_path / "two").glob(".staging*")] == []


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    finetune.stop.install()
    place, model = map(Path, sys.argv[1:])
    train(make_data(model), make_config(place, model, lora_dropout=0))
