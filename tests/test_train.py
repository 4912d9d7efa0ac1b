"""Stage 4: the engine learns what SFTTrainer learns, and no interruption changes the adapter."""

import dataclasses
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FAULTS

import unified_finetune as finetune

LONG_STORY = "Think about the programs, the people, the place and the net price. " * 4


def make_config(folder: Path, model: Path, **settings: object) -> finetune.FineTuningConfig:
    """Return settings for a short run on the CPU that writes below `folder`."""
    values = {
        "model_name": str(model),
        "output_dir": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
        "log_dir": str(folder / "logs"),
        "device": "cpu",
        "max_seq_length": 512,
        "yes": True,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
        "eval_steps": 3,
        "save_steps": 2,
        "min_disk_gb": 0,
    } | settings
    return finetune.build_config([finetune.Setting(k, v, "test") for k, v in values.items()])


def write_rows(folder: Path, sample_data: Path, count: int) -> Path:
    """Write `count` rows of the sample, two of them with much longer answers."""
    rows = json.loads(sample_data.read_text(encoding="utf-8"))
    rows = [r for r in rows if len(r["output"]) < 160 and not r["input"]][:count]
    for row in rows[3::40]:
        row["output"] += " " + LONG_STORY
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def prepare(
    tmp_path: Path, tiny_model: Path, sample_data: Path
) -> "Callable[..., tuple[finetune.PreparedData, finetune.FineTuningConfig]]":
    """Return a function that prepares rows of the sample with the given settings."""

    def build(count: int = 80, **settings: object):
        data = write_rows(tmp_path, sample_data, count)
        config = make_config(tmp_path, tiny_model, data_path=str(data), **settings)
        return finetune.prepare_dataset(finetune.fetch_dataset(config), config), config

    return build


def train(data: finetune.PreparedData, config: finetune.FineTuningConfig) -> finetune.TrainResult:
    """Run stage 4 on the CPU."""
    return finetune.train_lora(data, finetune.PreflightReport((), "cpu", "float32"), config)


def step_losses(result: finetune.TrainResult) -> "list[float]":
    """Return the training loss of every step."""
    return [record["loss"] for record in result.history if "loss" in record]


def train_plainly(data, config, folder):
    """Train with SFTTrainer as it comes, and return its losses and its adapter."""
    import datasets
    from peft import LoraConfig, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = [
        {
            "input_ids": e["input_ids"],
            "labels": [-100] * e["prompt_length"] + e["input_ids"][e["prompt_length"] :],
        }
        for e in data.train
    ]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(config.model_name, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=8,
            num_train_epochs=config.num_train_epochs,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            warmup_steps=config.warmup_steps,
            lr_scheduler_type="cosine",
            bf16=False,
            activation_checkpointing=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=config.seed,
            disable_tqdm=True,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=data.tokenizer,
        peft_config=LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=0.0,
            target_modules=list(config.target_modules),
            task_type="CAUSAL_LM",
        ),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, get_peft_model_state_dict(trainer.model)


@pytest.mark.parametrize(
    ("budget", "system_prompt"),
    [(2048, None), (96, None), (2048, "You advise students on college. " * 4)],
    ids=["one pass a step", "examples longer than the budget", "a long shared prefix"],
)
def test_the_engine_learns_what_plain_sfttrainer_learns(
    prepare, tmp_path, monkeypatch, budget, system_prompt
):
    data, config = prepare(
        lora_dropout=0, learning_rate=2e-5, eval_steps=99, system_prompt=system_prompt
    )
    plan = finetune.MemoryPlan(budget, recompute=False, peak=0, reason="the test's")
    monkeypatch.setattr(finetune, "plan_memory", lambda *_: plan)
    result = train(data, config)
    losses, weights = train_plainly(data, config, tmp_path / "plain")
    assert len(losses) == result.metrics["total_steps"] >= 4
    assert step_losses(result) == pytest.approx(losses, abs=1e-5)
    ours = finetune.adapter_weights(result.model)
    assert ours.keys() == weights.keys()
    assert max((ours[n] - weights[n]).abs().max().item() for n in ours) < 1e-5


def test_no_example_of_a_pass_sees_another(prepare):
    data, config = prepare()
    model = finetune.add_adapter(finetune.load_base_model(config, "cpu", "float32"), config)
    finetune.install_engine(model)
    model.eval()
    examples = [data.train[i] for i in range(12)]
    layout = finetune.lay_out(examples, "cpu")
    inputs = [tuple(e["input_ids"][:-1]) for e in examples]
    beginnings = {ids[: end + 1] for ids in inputs for end in range(len(ids))}
    assert layout.tokens == len(beginnings) < sum(map(len, inputs))
    head = model.get_base_model().get_output_embeddings()
    with torch.inference_mode():
        hidden = (
            model.get_base_model()
            .get_decoder()(
                input_ids=layout.input_ids,
                position_ids=layout.position_ids,
                use_cache=False,
                layout=layout,
            )
            .last_hidden_state
        )
        packed = head(hidden[0])
        model.get_base_model().set_attn_implementation("sdpa")
        single = [
            model(input_ids=torch.tensor([e["input_ids"]])).logits[0, e["prompt_length"] - 1 : -1]
            for e in examples
        ]
    assert torch.equal(
        layout.targets,
        torch.cat([torch.tensor(e["input_ids"][e["prompt_length"] :]) for e in examples]),
    )
    assert (packed - torch.cat(single)).abs().max().item() < 1e-5


@pytest.mark.parametrize(
    "width", [finetune.LONGEST_MATH_ROW, 8], ids=["matrix products", "fused kernel"]
)
def test_both_attention_kernels_agree_with_the_model_s_own(prepare, monkeypatch, width):
    data, config = prepare()
    model = finetune.add_adapter(finetune.load_base_model(config, "cpu", "float32"), config)
    finetune.install_engine(model)
    monkeypatch.setattr(finetune, "LONGEST_MATH_ROW", width)
    finetune.prove_engine(model, data.train, "cpu")


def test_passes_hold_whole_examples_within_the_budget():
    lengths = [random.Random(7).randint(1, 300) for _ in range(64)]
    passes = finetune.plan_passes(lengths, 256)
    assert sorted(i for p in passes for i in p) == list(range(64))
    assert all(sum(lengths[i] for i in p) <= 256 or len(p) == 1 for p in passes)


def test_the_head_s_loss_and_gradient_are_exact_in_slices(monkeypatch):
    monkeypatch.setattr(finetune, "HEAD_CHUNK", 7)
    torch.manual_seed(1)
    hidden = torch.randn(23, 16, requires_grad=True)
    weight, targets = torch.randn(50, 16), torch.randint(0, 50, (23,))
    head_loss, _ = finetune.engine_functions()
    loss = head_loss.apply(hidden, weight, None, targets)
    loss.backward()
    ours, hidden.grad = hidden.grad.clone(), None
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (ours - hidden.grad).abs().max().item() < 1e-5


def test_dropout_drops_its_share_and_keeps_the_expected_value():
    torch.manual_seed(3)
    mask = finetune.dropout_mask((1000, 1001), 0.05, torch.device("cpu"))
    assert mask.shape == (1000, 1001)
    assert mask.float().mean().item() == pytest.approx(0.95, abs=1e-3)


def test_dropout_reaches_the_adapter_and_only_in_training(prepare):
    data, config = prepare(lora_dropout=0.5)
    model = finetune.add_adapter(finetune.load_base_model(config, "cpu", "float32"), config)
    finetune.install_engine(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    layout = finetune.lay_out([data.train[0]], "cpu")
    model.eval()
    assert finetune.pass_loss(model, layout).item() == finetune.pass_loss(model, layout).item()
    model.train()
    assert finetune.pass_loss(model, layout).item() != finetune.pass_loss(model, layout).item()


def test_eval_loss_does_not_depend_on_how_examples_are_cut_into_passes(prepare):
    data, config = prepare()
    model = finetune.add_adapter(finetune.load_base_model(config, "cpu", "float32"), config)
    finetune.install_engine(model)
    losses = [finetune.mean_loss(model, data.train, budget, "cpu") for budget in (64, 512, 8192)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_tinyllama_s_adapter_has_the_share_of_parameters_the_readme_says(tmp_path):
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048,
        "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    size = finetune.measure_model(make_config(tmp_path, tmp_path))
    assert (size.parameters, size.trainable) == (1_100_048_384, 9_011_200)
    assert round(100 * size.trainable / (size.parameters + size.trainable), 2) == 0.81


TINYLLAMA = finetune.ModelSize(
    parameters=1_100_048_384,
    trainable=9_011_200,
    layers=22,
    hidden=2048,
    key_value=256,
    feed_forward=5632,
    heads=32,
    vocabulary=32000,
    context=2048,
    file_bytes=2_200_119_864,
)


@pytest.mark.parametrize(
    ("gigabytes", "dtype", "budget", "recompute"),
    [
        (24, "float32", 2048, False),
        (16, "float32", 2048, False),
        (8, "float32", 256, False),
        (8, "bfloat16", 2048, False),
        (5, "bfloat16", 512, False),
        (4, "bfloat16", 256, True),
    ],
)
def test_the_budget_follows_from_the_memory_the_machine_has(
    tmp_path, monkeypatch, gigabytes, dtype, budget, recompute
):
    monkeypatch.setattr(finetune, "measure_model", lambda _: TINYLLAMA)
    monkeypatch.setattr(finetune, "machine_memory", lambda _: gigabytes * 2**30)
    lengths = [50 + i % 100 for i in range(1600)]  # short answers
    config = make_config(tmp_path, tmp_path, max_seq_length=1024)
    plan = finetune.plan_memory(config, "cpu", dtype, lengths)
    assert (plan.budget, plan.recompute) == (budget, recompute)
    assert (plan.budget < 2048) == ("2048 were granted" in plan.reason)


def test_gradient_checkpointing_off_is_never_turned_on(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "measure_model", lambda _: TINYLLAMA)
    monkeypatch.setattr(finetune, "machine_memory", lambda _: 2**30)
    config = make_config(tmp_path, tmp_path, gradient_checkpointing="off")
    assert finetune.plan_memory(config, "cpu", "float32").recompute is False


@pytest.mark.parametrize("modules", [["q_proj", "q_prj"], ["lm_head"], ["embed_tokens"]])
def test_target_modules_that_are_not_there_are_named(prepare, modules):
    data, config = prepare(target_modules=modules)
    with pytest.raises(finetune.FineTuningError, match=modules[-1]) as error:
        train(data, config)
    assert "q_proj" in error.value.hint


def test_the_best_adapter_is_kept_and_training_stops_when_it_gets_no_better(prepare):
    data, config = prepare(
        learning_rate=0.5,
        num_train_epochs=8,
        early_stopping_patience=2,
        eval_steps=1,
        max_eval_examples=1000,
    )
    result = train(data, config)
    evaluations = [(r["eval_loss"], r["step"]) for r in result.history if "eval_loss" in r]
    assert result.metrics["best_step"] == min(evaluations)[1]
    assert evaluations[-1][1] == min(evaluations)[1] + 2 < result.metrics["total_steps"]
    assert result.metrics["eval_loss"] == pytest.approx(min(evaluations)[0], abs=1e-5)


def test_a_loss_that_is_not_finite_is_computed_again_and_never_reaches_the_weights(
    prepare, monkeypatch, caplog
):
    data, config = prepare()
    expected = train(data, config)
    calls = {"count": 0}
    real = finetune.pass_loss

    def once_nan(model, layout):
        loss = real(model, layout)
        if model.training:
            calls["count"] += 1
            if calls["count"] == 3:
                return loss * float("nan")
        return loss

    monkeypatch.setattr(finetune, "pass_loss", once_nan)
    result = train(data, dataclasses.replace(config, overwrite=True))
    assert "not finite" in caplog.text
    ours, theirs = (finetune.adapter_weights(r.model) for r in (result, expected))
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_loss_that_stays_not_finite_stops_the_run(prepare, monkeypatch, tmp_path):
    data, config = prepare()
    real = finetune.pass_loss
    monkeypatch.setattr(
        finetune, "pass_loss", lambda m, p: real(m, p) * (float("nan") if m.training else 1)
    )
    with pytest.raises(finetune.FineTuningError, match="no finite numbers"):
        train(data, config)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "MPS backend out of memory (MPS allocated: 17.00 GB)",
        "Invalid buffer size: 19.07 GiB",
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes. Error code 12",
    ],
)
def test_out_of_memory_takes_smaller_passes_and_learns_the_same(
    prepare, monkeypatch, caplog, message
):
    data, config = prepare(lora_dropout=0)
    expected = train(data, config)
    real = finetune.lay_out

    def too_much(examples, device):
        layout = real(examples, device)
        if torch.is_grad_enabled() and layout.tokens > 600:
            FAULTS["memory that runs out"] += 1
            raise RuntimeError(message)
        return layout

    monkeypatch.setattr(finetune, "lay_out", too_much)
    result = train(data, dataclasses.replace(config, overwrite=True))
    assert "forward passes of at most" in caplog.text
    assert step_losses(result) == pytest.approx(step_losses(expected), abs=1e-4)


def test_memory_that_never_suffices_ends_with_what_to_do(prepare, monkeypatch, caplog):
    data, config = prepare()

    def always(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(finetune, "accumulate_gradients", always)
    with pytest.raises(finetune.FineTuningError, match="Not enough memory") as error:
        train(data, config)
    assert "activations are recomputed" in caplog.text
    assert "--max_seq_length" in error.value.hint


def test_recomputing_activations_changes_nothing(prepare):
    data, config = prepare(lora_dropout=0.05)
    plain = train(data, config)
    recomputed = train(
        data, dataclasses.replace(config, gradient_checkpointing="on", overwrite=True)
    )
    assert step_losses(recomputed) == pytest.approx(step_losses(plain), abs=1e-6)


def test_other_settings_and_other_data_are_refused_by_name(prepare, sample_data, tmp_path):
    data, config = prepare()
    train(data, config)
    with pytest.raises(finetune.FineTuningError) as error:
        train(data, dataclasses.replace(config, lora_r=8, seed=7))
    assert "lora_r was 32 and is now 8" in str(error.value)
    assert "seed was 42 and is now 7" in str(error.value)
    assert "--overwrite" in error.value.hint
    other = dataclasses.replace(data, source=dataclasses.replace(data.source, sha256="0" * 64))
    with pytest.raises(finetune.FineTuningError, match="data_sha256 was"):
        train(other, config)


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "missing", "empty folder", "no manifest"]
)
def test_a_damaged_checkpoint_is_passed_over(prepare, tmp_path, caplog, damage):
    data, config = prepare(num_train_epochs=2)
    expected = finetune.adapter_weights(train(data, config).model)
    newest, *older = finetune.list_checkpoints(tmp_path / "out")
    assert older
    victim = newest / "adapter_model.safetensors"
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-10])
    elif damage == "flipped":
        content = bytearray(victim.read_bytes())
        content[-5] ^= 1
        victim.write_bytes(content)
    elif damage == "missing":
        (newest / "optimizer.pt").unlink()
    elif damage == "no manifest":
        (newest / finetune.MANIFEST).unlink()
    else:
        for file in newest.iterdir():
            file.unlink()
    result = train(data, config)
    FAULTS["a damaged file"] += 1
    assert f"{newest.name} is passed over" in caplog.text
    assert result.metrics["resumed_from_step"] == finetune.checkpoint_step(older[0])
    ours = finetune.adapter_weights(result.model)
    assert all(torch.equal(ours[n], expected[n]) for n in ours)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(5, "Input/output error"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 812992 vs 812880"),
    ],
    ids=["full disk", "failing disk", "full disk in PyTorch's words"],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(
    prepare, tmp_path, monkeypatch, error
):
    data, config = prepare(num_train_epochs=2)
    expected = finetune.adapter_weights(train(data, config).model)
    config = dataclasses.replace(config, output_dir=str(tmp_path / "second"))
    real, calls = torch.save, []

    def fail_later(*args, **kwargs):
        calls.append(1)
        if len(calls) > 7:  # the second checkpoint
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", fail_later)
    with pytest.raises(finetune.FineTuningError, match="cannot be written") as stopped:
        train(data, config)
    assert "goes on from the last checkpoint" in stopped.value.hint
    left = finetune.list_checkpoints(tmp_path / "second")
    assert left
    assert all(finetune.checkpoint_problem(folder) is None for folder in left)
    assert not list((tmp_path / "second").glob(".staging*"))
    monkeypatch.setattr(torch, "save", real)
    result = train(data, config)
    assert result.metrics["resumed_from_step"] == finetune.checkpoint_step(left[0])
    ours = finetune.adapter_weights(result.model)
    assert all(torch.equal(ours[n], expected[n]) for n in ours)


def test_old_checkpoints_are_pruned_and_the_newest_stays(prepare, tmp_path):
    data, config = prepare(num_train_epochs=2, save_steps=1, save_total_limit=2)
    result = train(data, config)
    steps = [finetune.checkpoint_step(c) for c in finetune.list_checkpoints(tmp_path / "out")]
    assert steps[0] == result.metrics["total_steps"]
    assert len(steps) == 2


# --- The real program, interrupted.


@pytest.fixture
def command(program_arguments, cli_environment, tmp_path):
    """Return the command line of a run with several checkpoints, and its environment."""
    return [sys.executable, *program_arguments], cli_environment


@pytest.fixture
def program_arguments(program: Path, tmp_path, tiny_model, sample_data) -> "list[str]":
    data = write_rows(tmp_path, sample_data, 120)
    return [
        str(program), "--data_path", str(data), "--model_name", str(tiny_model),
        "--device", "cpu", "--max_seq_length", "512", "--yes", "--num_train_epochs", "2",
        "--save_steps", "3", "--eval_steps", "4", "--logging_steps", "1", "--learning_rate", "1e-3",
        "--warmup_steps", "2", "--min_disk_gb", "0", "--early_stopping_patience", "50",
    ]  # fmt: skip


def adapter_sha(folder: Path) -> str:
    """Return the adapter's SHA-256."""
    return program_sha(folder / "adapter_model.safetensors")


def program_sha(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def run_until(command, environment, cwd: Path, pattern: str, then: int) -> "tuple[int, str]":
    """Start the program, send a signal when its output matches, and return exit code and output."""
    process = subprocess.Popen(
        command, env=environment, cwd=cwd, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if re.search(pattern, line):
            time.sleep(random.random() / 5)
            process.send_signal(then)
            break
    lines.append(process.stderr.read())
    return process.wait(120), "".join(lines)


def test_an_interrupted_run_ends_with_the_adapter_of_an_undisturbed_one(command, tmp_path):
    arguments, environment = command
    quiet = subprocess.run(
        [*arguments, "--output_dir", "quiet"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert quiet.returncode == 0, quiet.stderr
    shaken = [*arguments, "--output_dir", "shaken"]
    code, text = run_until(shaken, environment, tmp_path, r"step 2/", signal.SIGINT)
    assert (code, "Traceback" in text) == (130, False), text
    assert "the same command goes on from there" in text
    code, text = run_until(shaken, environment, tmp_path, r"step 6/", signal.SIGTERM)
    assert code == 143, text
    assert "resuming from" in text
    code, _ = run_until(shaken, environment, tmp_path, r"step 9/", signal.SIGKILL)
    assert code == -signal.SIGKILL
    final = subprocess.run(
        shaken, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert final.returncode == 0, final.stderr
    assert final.stdout.strip() == "shaken"
    assert adapter_sha(tmp_path / "shaken") == adapter_sha(tmp_path / "quiet")
    metrics = json.loads((tmp_path / "shaken/training_metrics.json").read_text())
    calm = json.loads((tmp_path / "quiet/training_metrics.json").read_text())
    assert metrics["resumed_from_step"] >= 6
    for name in (
        "train_loss",
        "eval_loss",
        "eval_loss_before",
        "best_step",
        "input_tokens",
        "supervised_tokens",
    ):
        assert metrics[name] == calm[name], name
    again = subprocess.run(
        shaken, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (again.returncode, again.stdout.strip()) == (0, "shaken")
    assert "This run is finished" in again.stderr
    assert "[4/5]" not in again.stderr


def test_a_second_run_on_one_output_folder_is_refused_while_the_first_lives(command, tmp_path):
    arguments, environment = command
    first = subprocess.Popen(
        [*arguments, "--output_dir", "out", "--num_train_epochs", "500"],
        env=environment,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in first.stderr:
            if "[2/5]" in line:
                break
        second = subprocess.run(
            [*arguments, "--output_dir", "out"],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 11
        assert f"process {first.pid}" in second.stderr
    finally:
        first.kill()
        first.wait()


def test_two_processes_train_the_model_that_one_trains(command, tmp_path):
    arguments, environment = command
    arguments = [*arguments[1:], "--lora_dropout", "0", "--num_train_epochs", "1"]
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no",
    ]  # fmt: skip
    histories = []
    for start, output in (([sys.executable], "one"), (launch, "two")):
        done = subprocess.run(
            [*start, *arguments, "--output_dir", output],
            env={**environment, "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == output + "\n"
        checkpoints = (tmp_path / output).glob("checkpoint-*")
        checkpoint = max(checkpoints, key=lambda folder: int(folder.name.split("-")[1]))
        progress = json.loads((checkpoint / "progress.json").read_text())
        histories.append([r["loss"] for r in progress["history"] if "loss" in r])
    assert len(histories[0]) >= 4
    assert histories[1] == pytest.approx(histories[0], abs=1e-5)
