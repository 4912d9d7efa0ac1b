"""Stage 1: everything that stages 2 to 5 would refuse is told at once, each with its remedy."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import ROOT
from transformers import LlamaConfig

import unified_finetune as finetune

Edit = Callable[[Path], None]
REQUIREMENTS = (ROOT / "requirements-finetuning.txt").read_text(encoding="utf-8")


@pytest.fixture
def settings(tmp_path: Path, tiny_model: Path, sample_data: Path) -> "Callable[..., Any]":
    """Return a function that makes the settings of a run in the test's own folder."""

    def make(**changes: Any) -> finetune.FineTuningConfig:
        places = {name: str(tmp_path / name) for name in ("output_dir", "cache_dir", "log_dir")}
        machine = {"device": "cpu", "min_disk_gb": 0.001, "max_seq_length": 256}
        data = {"model_name": str(tiny_model), "data_path": str(sample_data)}
        return finetune.FineTuningConfig(**{**places, **machine, **data, **changes})

    return make


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> "Callable[..., dict[str, str]]":
    """Return a function that runs stage 1 and gives what it says: name -> outcome and words."""

    def run(config: finetune.FineTuningConfig, program: ModuleType = finetune) -> "dict[str, str]":
        caplog.clear()
        with caplog.at_level("INFO", logger="unified_finetune"):
            try:
                program.run_preflight(config)
            except program.FineTuningError as error:
                assert "checks failed" in str(error)
        said: dict[str, str] = {}
        for line in caplog.messages:
            mark, name, *_ = [*line.split(), "", ""]
            if mark in ("ok", "WARN", "FAIL"):
                said[name] = last = line.strip()
            elif mark == "->":
                said[last.split()[1]] += " " + line.strip()
        return said

    return run


def copied(base: Path, settings: "Callable[..., Any]", **changes: Any) -> Any:
    """Return settings whose base model is a copy of the tiny one."""
    shutil.copytree(settings().model_name, base)
    return settings(model_name=str(base), **changes)


def test_a_machine_that_can_train_passes_and_its_base_is_handed_on(settings, told) -> None:
    report = finetune.run_preflight(settings())
    assert {check.outcome for check in report.checks} == {"ok"}
    assert (report.device, report.dtype) == ("cpu", "float32")
    base = report.base
    assert (base.config.model_type, base.config.num_hidden_layers) == ("llama", 2)
    assert (base.vocabulary, base.positions, base.parameters) == (600, 512, 169_280)
    # rank 32 on q, o (64 -> 64) and k, v (64 -> 32) of two layers
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert base.adapter_parameters(32, targets) == 2 * 32 * (2 * 128 + 2 * 96)


def test_everything_wrong_is_told_at_once_with_its_remedy(settings, told, tmp_path) -> None:
    (tmp_path / "README.md").write_text("my notes")
    (tmp_path / "file").write_text("")
    names = {"cache_dir": "file/cache", "data_path": "absent.json", "resume": "checkpoint-7"}
    places = {name: str(tmp_path / place) for name, place in names.items()}
    places |= {"output_dir": str(tmp_path), "init_adapter": str(tmp_path / "earlier")}
    wrong = {"device": "cuda", "min_disk_gb": 1e6, "target_modules": ("q_proj", "q_prj")}
    config = settings(**places, **wrong)
    said = told(config)
    failed = {name for name, words in said.items() if words.startswith("FAIL") and "->" in words}
    wanted = "adapter cache_dir data device disk init_adapter output_dir resume"
    assert failed == set(wanted.split())
    words = "no linear layers q_prj -> Choose --target_modules among q_proj, k_proj"
    assert words in said["adapter"]
    with pytest.raises(finetune.FineTuningError, match="8 of 10 checks failed: "):
        finetune.run_preflight(config)


# --- packages


def load_program(folder: Path, requirements: "str | None") -> ModuleType:
    """Return the program as a module from a folder of its own, beside these requirements."""
    path = Path(shutil.copy(ROOT / "unified_finetune.py", folder / "alone.py"))
    if requirements is not None:
        (folder / "requirements-finetuning.txt").write_text(requirements)
    spec = importlib.util.spec_from_file_location("alone", path)
    sys.modules["alone"] = module = importlib.util.module_from_spec(spec)  # for its dataclasses
    spec.loader.exec_module(module)
    module.log = finetune.log
    return module


@pytest.mark.parametrize(
    ("requirements", "outcome", "words"),
    [
        (REQUIREMENTS, "ok", "tested versions"),
        ('numpy==99.0; sys_platform == "win32"\npsutil>=1\n\n# none\n', "ok", "all 1 at"),
        ('torch==0.1; sys_platform != "win32"  # older', "WARN", "torch 2."),
        ("no-such-package==1.0", "FAIL", "no-such-package==1.0"),
        ("numpy=!2", "WARN", "requirements-finetuning.txt cannot be read"),
        (None, "WARN", "requirements-finetuning.txt cannot be read"),
    ],
)
def test_installed_packages_are_compared_with_the_pins_of_this_machine(
    settings, told, tmp_path, requirements, outcome, words
) -> None:
    said = told(settings(), load_program(tmp_path, requirements))
    assert said["packages"].startswith(outcome) and words in said["packages"]
    assert ("memory" in said) == (outcome != "FAIL")  # the other checks need the packages
    assert "-m pip install trackio" in told(settings(report_to="trackio"))["packages"]


# --- folders


@pytest.mark.parametrize(
    ("files", "told_of"),
    [
        ({"README.md": "my notes", "thesis.txt": ""}, "README.md"),
        ({"quality_report.json": '{"mine": 1}'}, "quality_report.json"),
        ({"training_config.json": '{"lora_r": 8}'}, "training_config.json"),
        ({"checkpoint-100/model.safetensors": ""}, "checkpoint-100"),
        ({"thesis.txt": "", "quality_report.json": '{"quality_score": 1}'}, None),
        ({"training_config.json": '{"provenance": {}}', "README.md": "", "report.html": ""}, None),
        ({"checkpoint-100/manifest.json": "{}"}, None),
    ],
)
def test_what_is_the_user_s_own_is_never_to_be_replaced(
    settings, told, tmp_path, files, told_of
) -> None:
    for name, text in files.items():
        path = tmp_path / "output_dir" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    said = told(settings())["output_dir"]
    assert said.startswith("FAIL" if told_of else "ok")
    assert not told_of or f"would replace: {told_of} ->" in said


def test_the_base_model_s_own_folder_is_no_output_folder(settings, told, tmp_path) -> None:
    itself = copied(tmp_path / "base", settings, output_dir=f"{tmp_path}/./base")
    assert "would replace: the base model itself" in told(itself)["output_dir"]


def test_a_full_disk_is_told_before_the_training(settings, told, monkeypatch) -> None:
    rank = {"lora_r": 4096, "target_modules": ("q_proj",)}  # 8 x 4096 x 128 numbers in checkpoints
    free = shutil.disk_usage("/")._replace(free=60_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    said = told(settings(**rank))["disk"]
    assert said.startswith("FAIL") and "adapter need 75.3 MB" in said
    assert told(settings(**rank, save_total_limit=1))["disk"].startswith("ok")
    assert "10 GB are asked for" in told(settings(min_disk_gb=10))["disk"]


def test_a_readable_env_file_is_warned_about(settings, told, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("R2_ACCESS_KEY_ID=x")
    (tmp_path / ".env").chmod(0o644)
    assert f"-> chmod 600 {tmp_path}/.env" in told(settings())[".env"]
    (tmp_path / ".env").chmod(0o600)
    assert ".env" not in told(settings())


HOLD = """import filelock, sys
held = filelock.FileLock(sys.argv[1])
held.acquire()
print(flush=True)
input()"""


def test_a_folder_that_another_run_writes_to_is_refused_and_leftovers_go(tmp_path) -> None:
    output = tmp_path / "out"
    (output / ".staging-checkpoint-5").mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, str(output / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(finetune.FineTuningError, match="Another run is writing to"):
            finetune.claim_output_folder(output)
        assert (output / ".staging-checkpoint-5").is_dir()  # the living run's
        other.kill()
    finetune.claim_output_folder(output)
    assert not list(output.glob(".staging-*"))


# --- the base model


def edit_json(name: str, **changes: Any) -> Edit:
    """Return an edit that changes values of JSON files."""

    def edit(folder: Path) -> None:
        for path in folder.glob(name):
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def lose(name: str) -> Edit:
    """Return an edit that takes a tensor away."""

    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def with_index(shard: str) -> Edit:
    """Return an edit that puts an index over the weights, which names this file."""

    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        index = json.dumps({"weight_map": {"lm_head.weight": shard}})
        (folder / "model.safetensors.index.json").write_text(index)

    return edit


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n"
DOWN = "model.layers.1.mlp.down_proj.weight"
GPTQ = {"quant_method": "gptq", "bits": 4}
DAMAGES: "dict[str, tuple[Edit, str]]" = {
    "no config": (lambda f: (f / "config.json").unlink(), "lacks config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "lacks tokenizer.json"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be used"),
    "no end token": (edit_json("*token*_*.json", eos_token=None), "has no eos_token"),
    "pickles": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "index of pickles": (with_index("pytorch_model.bin"), "names pytorch_model.bin as its weights"),
    "shard": (with_index("model-2.safetensors"), "lacks model-2.safetensors"),
    "pointer": (lambda f: (f / "model.safetensors").write_text(POINTER), "run git lfs pull"),
    "lost": (lose(DOWN), f"files lack {DOWN}"),
    "fewer layers": (edit_json("config.json", num_hidden_layers=1), "files hold model.layers.1."),
    "vocabulary": (edit_json("config.json", vocab_size=700), "has another shape"),
    "cut off": (lambda f: os.truncate(f / "model.safetensors", 200_000), "cannot be loaded"),
    "odd shape": (edit_json("config.json", num_attention_heads=3), "cannot be loaded"),
    "quantized": (edit_json("config.json", quantization_config=GPTQ), "quantized model (gptq)"),
    "own code": (edit_json("config.json", model_type="x", auto_map={}), "trains Llama 2 and 3"),
    "tokens": (edit_json("*token*_*.json", pad_token="[PAD]"), "only 600 embeddings"),
    "no default": (
        edit_json("tokenizer_config.json", chat_template=[{"name": "rag", "template": "x"}]),
        "none of its chat templates (rag) is the default",
    ),
}

for family in ("gpt2", "mixtral", "gemma3_text", "gpt_oss", "bert", None):
    words = f"holds a {family} model; this program trains Llama 2 and 3"
    DAMAGES[str(family)] = (edit_json("config.json", model_type=family), words)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_base_model_that_is_not_whole_is_refused_by_name(settings, told, tmp_path, name) -> None:
    edit, words = DAMAGES[name]
    config = copied(tmp_path / "base", settings)
    edit(tmp_path / "base")
    said = told(config)["base"]
    assert said.startswith("FAIL") and words in said


@pytest.mark.parametrize(
    ("changes", "positions"),
    [({}, 512), ({"model_type": "mistral", "sliding_window": 100}, 100)],
)
def test_a_length_beyond_the_model_s_positions_or_window_is_warned_about(
    settings, told, tmp_path, changes, positions
) -> None:
    config = copied(tmp_path / "base", settings, max_seq_length=1000)
    edit_json("config.json", **changes)(tmp_path / "base")
    assert f"is 1000, and the model sees {positions} tokens" in told(config)["length"]


def test_the_digest_is_of_every_byte_and_the_same_in_the_hub_s_cache(tmp_path, tiny_model) -> None:
    folder, cached, other = (shutil.copytree(tiny_model, tmp_path / name) for name in "abc")
    content = (folder / "model.safetensors").read_bytes()
    blob = tmp_path / hashlib.sha256(content).hexdigest()
    (cached / "model.safetensors").rename(blob)
    (cached / "model.safetensors").symlink_to(blob)
    (other / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    digests = [finetune.open_base_model(str(f)).digest for f in (folder, cached, other)]
    assert digests[0] == digests[1] != digests[2]


# --- device and memory


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('print(\'{"problem": "loss 3 instead of 5", "seconds": []}\')', "loss 3 instead of 5"),
        ("import os; os.abort()", "crashed"),
        ("raise SystemExit('no Metal')", "no Metal"),
        ("print('nan')", "gave no answer"),
        ("import time; time.sleep(60)", "hung"),
        ('print(\'{"problem": null, "seconds": [1, 1, 0.5]}\')', "is slower here"),
        ('print(\'{"problem": null, "seconds": [1, 0.5, 0.4]}\')', "is slower here"),
        ('print(\'{"problem": null, "seconds": [1, 0.5, 2]}\')', None),
    ],
)
def test_a_device_that_fails_its_self_test_is_not_trained_on(
    settings, told, tmp_path, monkeypatch, script, words
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(finetune, "SELF_TEST_SECONDS", 2)
    monkeypatch.setattr(finetune, "PROGRAM_FOLDER", tmp_path)  # where nothing is remembered
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 1e10)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    report = finetune.run_preflight(settings(device="auto"))
    assert report.device == ("cpu" if words else "mps")
    detail = next(check.detail for check in report.checks if check.name == "device")
    assert (words or "takes 1.00 s, 0.50 s in bf16, 2.00 s on the CPU") in detail
    assert report.dtype == ("float32" if words else "bfloat16")
    if words:
        insisting = told(settings(device="mps"))["device"]
        assert insisting.startswith("ok" if "slower" in words else "FAIL")
    else:  # who names the device decides on the dtype, too
        assert "base model in float32" in told(settings(device="mps"))["device"]
        monkeypatch.setattr("platform.machine", lambda: "x86_64")  # an Intel Mac's GPU
        assert finetune.choose_device("auto")[0] == "cpu"


def test_an_emulated_bf16_passes_the_real_self_test_with_a_warning(
    settings, told, monkeypatch
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert "computed in software" in told(settings(bf16=True))["device"]
    assert told(settings(fp16=True, device="auto"))["device"].startswith("FAIL")


TINYLLAMA = finetune.BaseModel(
    **{"name": "llama", "digest": "llama", "folder": Path(), "tokenizer": None},
    **{"positions": 2048, "vocabulary": 32000, "parameters": 1_100_048_384},
    file_bytes=2_200_119_864,
    config=LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                       num_attention_heads=32, num_key_value_heads=4),
    linear={**dict.fromkeys(("q_proj", "o_proj"), ((2048, 2048),) * 22),
            **dict.fromkeys(("k_proj", "v_proj"), ((2048, 256),) * 22)},
)  # fmt: skip
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SHORT = [50 + i % 100 for i in range(1600)]


def plan(monkeypatch: pytest.MonkeyPatch, gigabytes: float, dtype: str, **changes: Any) -> Any:
    """Plan TinyLlama's training on a machine with so much memory."""
    memory = SimpleNamespace(total=int(gigabytes * 2**30))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    usual = {"lengths": changes.pop("lengths", SHORT), "device": changes.pop("device", "cpu")}
    config = finetune.FineTuningConfig(**changes)
    return finetune.plan_memory(TINYLLAMA, config, dtype=dtype, **usual)


@pytest.mark.parametrize(
    ("gigabytes", "dtype", "budget", "recompute"),
    [(16, "float32", 2048, False), (8, "float32", 256, False), (9, "bfloat16", 2048, False),
     (8, "bfloat16", 1024, False), (4, "bfloat16", 256, True)],
)  # fmt: skip
def test_the_budget_follows_from_the_memory_the_machine_has(
    monkeypatch, gigabytes, dtype, budget, recompute
) -> None:
    found = plan(monkeypatch, gigabytes, dtype)
    assert (found.budget, found.recompute) == (budget, recompute)
    assert ("2048 were granted" in found.reason) == (budget < 2048)
    never = plan(monkeypatch, gigabytes, dtype, gradient_checkpointing="off")
    assert never.recompute is False and never.budget == budget


def test_the_estimate_is_what_was_measured_within_15_percent(monkeypatch) -> None:
    """Peaks of TinyLlama's 22 layers on a CPU, 16 short answers (a thousand tokens) in a pass."""
    for dtype, measured in (("float32", 9.10e9), ("bfloat16", 5.16e9)):
        peak = plan(monkeypatch, 64, dtype, lengths=[62] * 160).peak
        assert peak == pytest.approx(measured, rel=0.15)
        assert peak < plan(monkeypatch, 64, dtype, lengths=[100] * 160).peak  # longer batches


def test_on_a_mac_metal_s_limit_counts_and_attention_at_its_real_width(monkeypatch) -> None:
    mps = {"device": "mps", "lengths": [1024] * 16}
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 100 * 2**30)
    roomy = plan(monkeypatch, 64, "float32", **mps)
    on_cpu = plan(monkeypatch, 64, "float32", lengths=[1024] * 16)
    assert roomy.peak == pytest.approx(18.6e9, rel=0.15) and on_cpu.peak < 0.75 * roomy.peak
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: int(12.7e9))  # of 16 GB
    assert plan(monkeypatch, 16, "float32", **mps).budget == 1024


# What Metal grants on Macs of these sizes, as their users report it.
MACS = ((8, 5.7), (16, 12.7), (32, 22.9))


def mac_table(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the plans for Macs as README.md must have them."""
    monkeypatch.setattr(finetune, "self_test", lambda device, dtype: (None, []))
    lines = [
        "| memory | Metal grants | rows of | base in | tokens a pass | recomputed | estimate |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for memory, metal in MACS:
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda metal=metal: metal * 1e9)
        for length in (50, 300, 1024):

            def planned(dtype, memory=memory, length=length):
                rows = {"device": "mps", "lengths": [length] * 160}
                return plan(monkeypatch, memory, dtype, **rows)

            check, dtype = finetune.check_memory(planned, "mps", "float32")
            chosen = planned(dtype)
            assert chosen.peak <= metal * 1e9 - 1.5e9 or check.outcome == "warning"
            cells = f"{memory} GB", f"{metal} GB", f"{length} tokens", dtype, f"{chosen.budget:,}"
            again = "yes" if chosen.recompute else "no"
            lines.append(f"| {' | '.join(cells)} | {again} | {finetune.human_bytes(chosen.peak)} |")
    return "\n".join(lines) + "\n"


def test_a_mac_s_plan_fits_into_what_metal_grants_and_stands_in_readme(monkeypatch) -> None:
    table = mac_table(monkeypatch)
    print(table)
    assert table in (Path(__file__).resolve().parent.parent / "README.md").read_text("utf-8")


def test_without_a_bf16_that_works_a_small_mac_is_warned(monkeypatch) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 5.7e9)
    long = {"device": "mps", "lengths": [1024] * 16}
    for problem, outcome, dtype in ((None, "ok", "bfloat16"), ("no", "warning", "float32")):
        monkeypatch.setattr(finetune, "self_test", lambda *_, told=problem: (told, []))
        found = finetune.check_memory(lambda d: plan(monkeypatch, 8, d, **long), "mps", "float32")
        assert (found[0].outcome, found[1]) == (outcome, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [50, 300, 1024])
def test_what_a_pass_keeps_on_a_mac_is_at_most_the_estimate(monkeypatch, width, dtype) -> None:
    """The path that MPS takes: attention as plain products of whole rows, sizes filled up."""
    from peft import LoraConfig, get_peft_model
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import LlamaForCausalLM

    shape = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 704}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1}
    base = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=2048))
    lora = LoraConfig(r=32, lora_dropout=0.05, target_modules=list(ATTENTION))
    model = get_peft_model(base.to(getattr(torch, dtype)), lora, autocast_adapter_dtype=True)
    finetune.install_engine(model)
    monkeypatch.setattr(finetune, "LONGEST_MATH_ROW", 0)
    numbers = dataclasses.replace(TINYLLAMA, config=base.config, vocabulary=300)
    ids = [[7 * n % 299 + 1, *(k * (n + 3) % 299 + 1 for k in range(width - 1))] for n in range(8)]
    examples = [{"input_ids": row, "spans": [[width // 2, width]]} for row in ids]
    layout = finetune.lay_out(examples, "cpu", 1, fill=True)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, sdpa_kernel(SDPBackend.MATH):
        loss = finetune.pass_loss(model.train(), layout)
    tokens = sum(map(len, ids))
    estimate = finetune.activation_bytes(numbers, "mps", dtype, tokens, width, recompute=False)
    assert loss.isfinite() and 0.4 * estimate < sum(kept.values()) <= estimate
