"""Runs that are killed, interrupted, starved and lied to: nothing is lost and nothing is wrong.

Faults break the world (see fault_runner.py): no function of the program is replaced.
"""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
from conftest import FAULTS, ROOT, clean_environment

import unified_finetune as finetune

STEPS = 8
ARGUMENTS = [
    "--device", "cpu", "--max_seq_length", "256", "--num_train_epochs", "1",
    "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3", "--warmup_steps", "2",
    "--eval_steps", "2", "--save_steps", "3", "--logging_steps", "1", "--min_disk_gb", "0",
    "--yes", "--cache_dir", "cache", "--output_dir", "out", "--log_dir", "logs",
]  # fmt: skip
KILL, TERM, HANG_UP = (f"os.kill(os.getpid(), {number})" for number in (9, 15, 1))


@dataclass
class Child:
    """Follow one run of the program."""

    pid: int
    console: Path

    def wait_until(self, what: str, condition: "Callable[[], bool]") -> None:
        """Wait until something is true."""
        for _ in range(60_000):
            if condition():
                return
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"it did not {what}:\n{self.text()}")

    def wait(self) -> int:
        """Return the exit code, negative for the signal that ended it."""
        code = Path(f"{self.console}.code")
        self.wait_until("end", code.exists)
        return int(code.read_text())

    def text(self) -> str:
        """Return what it has printed."""
        return self.console.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Runner:
    """Start runs of the program on the tiny model and a small file."""

    server: "subprocess.Popen[str]"
    files: "list[str]"

    def start(self, folder: Path, *arguments: object, faults: "list[dict] | tuple" = ()) -> Child:
        """Start a run whose output folder is folder/out."""
        folder.mkdir(exist_ok=True, parents=True)
        console = folder.with_name(folder.name + "-console.txt")  # not on the disk under test
        console.write_text("")
        Path(f"{console}.code").unlink(missing_ok=True)
        words = [str(argument) for argument in arguments]
        command = [words.pop(0)] if words and words[0].isalpha() else []
        request = {"arguments": [*command, *ARGUMENTS, *self.files, *words], "faults": faults}
        request |= {"folder": str(folder), "console": str(console)}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return Child(int(self.server.stdout.readline()), console)

    def end(self, folder: Path, *arguments: object, **faults: "list[dict]") -> "tuple[int, str]":
        """Run to the end; return the exit code and what was printed, never a traceback."""
        child = self.start(folder, *arguments, **faults)
        code = child.wait()
        check_words(child.text(), code)
        check_sound(folder / "out")
        return code, child.text()

    def finish(self, folder: Path, *arguments: object, **faults: "list[dict]") -> str:
        """Run to a good end and return the adapter's SHA-256."""
        code, text = self.end(folder, *arguments, **faults)
        assert code == 0, text
        assert not list((folder / "out").glob(".staging*"))
        return finetune.sha256_of(folder / "out" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def runner(tmp_path_factory, tiny_model, sample_data):
    """Start the process whose children the runs are."""
    rows = json.loads(sample_data.read_text(encoding="utf-8"))
    rows = [row for row in rows if len(row["output"]) < 160 and not row["input"]][:35]
    folder = tmp_path_factory.mktemp("data")
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    environment = {**clean_environment(folder), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", ROOT / "tests" / "fault_runner.py", tiny_model]
    with subprocess.Popen(command, env=environment, text=True, **pipes) as server:
        files = ["--model_name", str(tiny_model), "--data_path", str(folder / "rows.json")]
        yield Runner(server, files)
        server.stdin.close()


class Calm(NamedTuple):
    """Hold what an undisturbed run gave."""

    out: Path
    adapter: str


@pytest.fixture(scope="module")
def calm(runner, tmp_path_factory) -> Calm:
    """Run undisturbed."""
    folder = tmp_path_factory.mktemp("calm")
    adapter = runner.finish(folder)
    assert metrics_of(folder)["total_steps"] == STEPS
    return Calm(folder / "out", adapter)


def read(path: Path) -> dict:
    """Return the JSON object in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def metrics_of(folder: Path) -> dict:
    """Return the metrics of the run in a folder."""
    return read(folder / "out" / "training_metrics.json")


def check_words(text: str, code: int) -> None:
    """Check that a run that failed says so in words: what happened, then what to do."""
    assert "Traceback" not in text and "Unexpected" not in text, text
    assert "\n-> " in text or not 0 < code < 128


def check_sound(out: Path) -> None:
    """Check what holds at every moment: what has its final name is whole and finite."""
    for folder in out.glob("checkpoint-*"):
        manifest = read(folder / finetune.MANIFEST)
        assert manifest.keys() | {finetune.MANIFEST} == {path.name for path in folder.iterdir()}
        for name, facts in manifest.items():
            assert (folder / name).stat().st_size == facts["size"]
            assert finetune.sha256_of(folder / name) == facts["sha256"]
    if (out / "training_metrics.json").is_file():
        written = read(out / "training_metrics.json")["adapter_sha256"]
        assert finetune.sha256_of(out / "adapter_model.safetensors") == written
    for path in out.glob("[!.]*/*.safetensors"):
        assert all(value.isfinite().all() for value in safetensors.torch.load_file(path).values())


def fault(event: str, do: str, **when: int) -> dict:
    """Describe a fault as fault_runner.py takes it."""
    return {"event": event, "do": do, **when}


FEW = ("--save_steps", 6, "--save_total_limit", 1)


def sweep(runner, calm, folder: Path, events: str, do: "list[str]", step: int = 0) -> "list[dict]":
    """Let faults strike at every event of a run, each in a fork; return what became of them.

    The command is repeated on each folder that was left: always the undisturbed run's adapter.
    """
    (folder / "keep").mkdir()
    faults = [{"event": events, "do": do, "keep": str(folder / "keep"), "step": step}]
    runner.finish(folder / "run", *FEW, faults=faults)
    lines = (folder / "keep" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        check_words(record["console"], record["code"])
    for left in sorted({state for record in records for state in record["left"]}):
        check_sound(folder / "keep" / left / "out")
        assert runner.finish(folder / "keep" / left, *FEW) == calm.adapter, left
    return records


# --- at every moment of a run


def test_a_run_that_ends_at_any_change_of_its_folder_goes_on(runner, calm, tmp_path):
    changes = "mkdir open fsync rename replace unlink rmdir"
    fail = "world.errno = (28, 5, 30)[world.events % 3]"  # no space, I/O error, read-only
    records = sweep(runner, calm, tmp_path, changes, [KILL, fail])
    killed, failed = [r for r in records if r["do"] == KILL], [r for r in records if r["code"] > 0]
    FAULTS["SIGKILL, and a power cut, at a change of the output folder"] += 2 * len(killed)
    FAULTS["a disk that fails from a moment on"] += len(killed)
    assert {record["code"] for record in killed} == {-signal.SIGKILL}
    assert {record["event"] for record in killed} >= {"fsync", "rename", "replace", "rmdir"}
    assert min(len(killed), len(failed)) > 60
    assert {14, 15} <= {record["code"] for record in failed} <= {11, 13, 14, 15}
    for record in failed:
        end = record["console"].rpartition("-> ")[0].splitlines()[-1]
        told = ("Input/output error", "Read-only", "No space", "is full")
        assert any(words in end for words in told), record


def test_a_run_that_is_stopped_in_any_forward_pass_goes_on(runner, calm, tmp_path):
    stop = "os.kill(os.getpid(), (2, 15, 1)[world.events % 3])"
    records = sweep(runner, calm, tmp_path, "train evaluate", [stop])
    FAULTS["Ctrl-C, SIGTERM or SIGHUP in a forward pass"] += len(records)
    assert {record["code"] for record in records} == {130, 143, 129}
    assert len([record for record in records if record["event"] == "train"]) >= STEPS
    for record in records:
        assert "the same command" in record["console"].lower()
        assert record["console"].splitlines()[-1] != "out"
    last = [r["event"] for r in records if f"Stopped after step {STEPS} " in r["console"]]
    assert last.count("evaluate") >= 2  # the last one of the training, and the final one


def test_a_write_that_the_system_cuts_short_costs_nothing(runner, calm, tmp_path):
    sizes = {path.stat().st_size for path in calm.out.rglob("*") if path.is_file()}
    cut = "f = resource.RLIMIT_FSIZE; resource.setrlimit(f, ({}, resource.getrlimit(f)[1]))"
    do = [cut.format(size - 1) for size in sorted(sizes) if size][::2]
    records = sweep(runner, calm, tmp_path, "mkdir", do, step=STEPS)
    FAULTS["a write cut short by the system"] += len(records)
    assert {14, 15} <= {record["code"] for record in records} <= {0, 14, 15}
    for record in records:
        assert record["code"] == 0 or "cannot be written" in record["console"], record


# --- one fault in a run: signals, disks, numbers that are not finite, memory, clocks

LOCK = """
os.write(2, b"stuck")
libc, held = ctypes.CDLL(None), ctypes.create_string_buffer(128)
while True:
    libc.pthread_mutex_lock(held)
"""
KEEP_THE_GIL = """
os.write(2, b"stuck")
while True:
    ctypes.PyDLL(None).pause()
"""
DESTRUCTOR = """
class Dying:
    def __del__(self):
        os.kill(os.getpid(), 15)
        sum(range(10))
Dying()
"""
NOHUP = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
SMALL = "real = shutil.disk_usage\nshutil.disk_usage = lambda path: real(path)._replace(free=1000)"
WEIGHT = "world.optimizer.param_groups[0]['params'][0].data.view(-1)[5] = float('nan')"
STARVE = """
def step(*_, **__):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: Error code 12")
torch.optim.AdamW.step = step
"""
HASTE = """
wait = threading.Event.wait
threading.Event.wait = lambda self, seconds=None: wait(self, seconds and seconds / 500)
"""
STUCK = "def a_stuck_kernel():\n    time.sleep(3)\na_stuck_kernel()"
CLOCK = """
clock, jumps = time.time, [0]
def now():
    jumps[0] -= 36_000
    return clock() + jumps[0]
time.time = now
"""
MAC = """
import collections, fcntl, psutil
sys.platform, fcntl.F_FULLFSYNC = "darwin", 2**20  # refused, as by a network drive
battery = collections.namedtuple("Battery", "percent power_plugged")(41, False)
psutil.sensors_battery = lambda: battery
with open("caffeinate", "w") as file:
    file.write(f'#!/bin/sh\\necho "$@" >awake-{os.getpid()}\\n')
os.chmod("caffeinate", 0o755)
os.environ["PATH"] = os.getcwd() + ":" + os.environ["PATH"]
"""
CASES = {
    "a closed terminal": (129, "by SIGHUP", [fault("train", HANG_UP, step=4)]),
    "a closed terminal, nohup": (0, "", [fault("start", NOHUP), fault("train", HANG_UP, step=4)]),
    "SIGTERM in a destructor, early": (143, "by SIGTERM", [fault("open", DESTRUCTOR)]),
    "SIGTERM in a destructor": (143, "by SIGTERM", [fault("train", DESTRUCTOR, step=4)]),
    "SIGTERM in a destructor, late": (143, "by SIGTERM", [fault("fsync", DESTRUCTOR, step=8)]),
    "a disk that gets too small": (14, "1.0 kB are free", [fault("step", SMALL, step=5)]),
    "NaN in the first pass": (0, "not finite", [fault("train", "world.nan = 1")]),
    "NaN in a weight, an evaluation is due": (14, "no finite", [fault("step", WEIGHT, step=2)]),
    "NaN in a weight, a checkpoint is due": (14, "not finite", [fault("step", WEIGHT, step=3)]),
    "NaN in a weight, in the end": (14, "no finite", [fault("step", WEIGHT, step=8)]),
    "NaN in an evaluation": (14, "no finite", [fault("evaluate", "world.nan = 1", step=4)]),
    "NaN in every pass": (14, "no finite", [fault("train", "world.nan = 10**9", step=5)]),
    "NaN in every evaluation": (14, "no finite", [fault("evaluate", "world.nan = 10**9", step=8)]),
    "no memory for the optimizer": (14, "--bf16", [fault("start", STARVE)]),
    "a step that hangs": (0, "for 5 min", [fault("start", HASTE), fault("train", STUCK, step=4)]),
    "a Mac, which is kept awake": (0, "on battery (41 %)", [fault("start", MAC)]),
    "a clock that jumps": (0, "", [fault("start", CLOCK)]),
    "a crash in a library": (-11, "", [fault("train", "os.kill(os.getpid(), 11)", step=4)]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_told_and_the_result_is_that_of_an_undisturbed_run(runner, calm, tmp_path, case):
    code, told, faults = CASES[case]
    ended, text = runner.end(tmp_path, faults=faults)
    FAULTS[case.partition(",")[0]] += 1
    assert ended == code, text
    assert told in text
    assert text.count(" finite") <= 3  # twice, and the end
    (log,) = (tmp_path / "logs").glob("*.log")
    if "crash" in case:
        assert re.search("Segmentation fault[^~]*in accumulate", log.read_text(encoding="utf-8"))
    if "hangs" in case:
        assert "in a_stuck_kernel" in log.read_text(encoding="utf-8")
        assert len(re.findall(r"Step \d+ has not ended", text)) == 1
    if "Mac" in case:
        (awake,) = tmp_path.glob("awake-*")
        assert awake.read_text() == f"-is -w {awake.name.removeprefix('awake-')}\n"
    if code:
        assert not (tmp_path / "out/adapter_model.safetensors").exists()
        runner.finish(tmp_path)
    assert metrics_of(tmp_path)["adapter_sha256"] == calm.adapter
    assert 0 < metrics_of(tmp_path)["train_runtime"] < 1000


@pytest.mark.parametrize(("hang", "event"), [(LOCK, "train"), (KEEP_THE_GIL, "evaluate")])
def test_a_hang_in_c_keeps_its_folder_until_a_second_signal(runner, calm, tmp_path, hang, event):
    child = runner.start(tmp_path / "a", faults=[fault(event, hang, step=4)])
    child.wait_until("get stuck", lambda: "stuck" in child.text())
    code, text = runner.end(tmp_path / "b", "--output_dir", tmp_path / "a" / "out")
    assert (code, "another run is writing" in text.lower()) == (11, True), text
    os.kill(child.pid, signal.SIGINT)
    time.sleep(1.5)  # a busy machine may hand the first one on late
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 130
    FAULTS["a forward pass that never ends, and a second run on its folder"] += 2
    assert [path.name for path in tmp_path.glob("a/out/checkpoint-*")] == ["checkpoint-3"]
    assert runner.finish(tmp_path / "a") == calm.adapter


@pytest.mark.parametrize(("module", "number", "then"), [
    ("torch.nn", 15, "raise"), ("datasets", 2, "raise ImportError('initialization failed')"),
])  # fmt: skip
def test_a_signal_during_an_import_ends_the_run_also_where_a_library_swallows_it(
    runner, program, tmp_path, module, number, then
):
    ambush = f"""
import os, runpy, sys
class Ambush:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            try:
                os.kill(os.getpid(), {number})
                os.getpid()
            except BaseException:
                {then}
sys.meta_path.insert(0, Ambush())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", ambush, program, *ARGUMENTS, *runner.files]
    environment = clean_environment(tmp_path)
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    FAULTS["a signal during an import"] += 1
    check_words(done.stderr, done.returncode)
    assert (done.returncode, "Stopped by" in done.stderr) == (128 + number, True), done.stderr


def test_early_stopping_counts_on_after_an_interruption(runner, tmp_path):
    more = ["--learning_rate", 0.5, "--num_train_epochs", 3, "--early_stopping_patience", 3]
    expected = runner.finish(tmp_path / "calm", *more)
    metrics = metrics_of(tmp_path / "calm")
    last = metrics["total_steps"]
    assert last < 3 * STEPS
    stop = fault("train", TERM, step=last - 2)
    assert runner.end(tmp_path / "shaken", *more, faults=[stop])[0] == 143
    assert runner.finish(tmp_path / "shaken", *more) == expected
    again = metrics_of(tmp_path / "shaken")
    assert (again["resumed_from_step"], again["total_steps"]) == (last - 1, last)
    assert again["best_step"] == metrics["best_step"]


# --- folders that are damaged, or attack


def flip(path: Path) -> None:
    """Change one bit near a file's end."""
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def plant_pickle(path: Path, evidence: Path) -> None:
    """Write a pickle that leaves evidence when it is loaded."""

    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(evidence),))

    path.write_bytes(pickle.dumps(Attack(), protocol=2))
    FAULTS["a planted pickle or custom code"] += 1


def plant_state(path: Path) -> None:
    """Let a file of a checkpoint be a pickle that its manifest vouches for."""
    plant_pickle(path, path.parents[2] / "executed")
    manifest = read(path.with_name(finetune.MANIFEST))
    manifest[path.name] = {"size": path.stat().st_size, "sha256": finetune.sha256_of(path)}
    path.with_name(finetune.MANIFEST).write_text(json.dumps(manifest))


LAST = "checkpoint-6/"
PASSED_OVER, REFUSED = (0, "checkpoint-6 is passed over"), (14, "only tensors belong")
FOLDERS = {
    "a bit flipped": (LAST + "adapter_model.safetensors", flip, *PASSED_OVER),
    "cut short": (LAST + "optimizer.pt", lambda path: os.truncate(path, 100), *PASSED_OVER),
    "a file gone": (LAST + "trainer_state.json", Path.unlink, *PASSED_OVER),
    "an empty manifest": (LAST + finetune.MANIFEST, lambda p: p.write_bytes(b""), *PASSED_OVER),
    "no manifest": (LAST + finetune.MANIFEST, Path.unlink, 11, "no run wrote"),
    "a pickled optimizer": (LAST + "optimizer.pt", plant_state, *REFUSED),
    "a pickled schedule": (LAST + "scheduler.pt", plant_state, *REFUSED),
    "pickled random states": (LAST + "rng_state.pth", plant_state, *REFUSED),
    "a finished adapter with a bit flipped": ("adapter_model.safetensors", flip, 0, "damaged"),
    "a finished adapter gone": ("adapter_model.safetensors", Path.unlink, 0, "damaged"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_damaged_folder_is_told_and_never_used(runner, calm, tmp_path, case):
    name, harm, code, told = FOLDERS[case]
    shutil.copytree(calm.out, tmp_path / "out")
    if "finished" not in case:
        shutil.rmtree(tmp_path / "out" / "checkpoint-8")
        for path in filter(Path.is_file, (tmp_path / "out").iterdir()):
            path.unlink()
    harm(tmp_path / "out" / name)
    FAULTS["a damaged file"] += 1
    child = runner.start(tmp_path)
    assert (child.wait(), told in child.text()) == (code, True), child.text()
    assert not (tmp_path / "executed").exists()
    if "manifest" not in case:  # where none tells whose it is, it is left alone
        check_sound(tmp_path / "out")
    if code == 0:
        metrics = metrics_of(tmp_path)
        assert metrics["resumed_from_step"] == (8 if "finished" in case else 3)
        assert metrics["adapter_sha256"] == calm.adapter


def plant_weights(model: Path, evidence: Path) -> None:
    """Let a model's weights be a pickle, which an index names."""
    names = safetensors.torch.load_file(model / "model.safetensors").keys()
    (model / "model.safetensors").unlink()
    plant_pickle(model / "pytorch_model.bin", evidence)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def plant_code(model: Path, evidence: Path, **settings: object) -> None:
    """Give a model folder Python code that leaves evidence when it is imported."""
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(evidence)!r})\nclass Evil: pass\n")
    kinds = ("AutoConfig", "AutoModelForCausalLM")
    classes = [dict.fromkeys(kinds, "evil.Evil"), {"AutoTokenizer": ["evil.Evil", None]}]
    files = [model / "config.json", model / "tokenizer_config.json"]
    for path, auto_map in zip(files, classes, strict=True):
        path.write_text(json.dumps({**read(path), "auto_map": auto_map, **settings}))
        settings = {}
    FAULTS["a planted pickle or custom code"] += 1


EVIL = {"model_type": "evil", "architectures": ["Evil"]}
MODELS = {
    "pickled weights": (plant_weights, 11, "never pickles"),
    "an architecture of its own": (partial(plant_code, **EVIL), 11, "holds a evil model"),
    "code that a Llama does not need": (plant_code, 0, "[5/5] save done"),
}


@pytest.mark.parametrize(("plant", "code", "told"), MODELS.values(), ids=MODELS)
def test_a_bad_base_model_is_refused_and_nothing_in_it_is_ever_executed(
    runner, tiny_model, tmp_path, plant, code, told
):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    plant(model, tmp_path / "executed")
    ended, text = runner.end(tmp_path / "run", "--model_name", model)
    assert (ended, told in text) == (code, True), text
    assert (tmp_path / "run/out/adapter_model.safetensors").exists() is (code == 0)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("whole", [True, False], ids=["beside safetensors", "alone"])
def test_an_adapter_in_a_pickle_is_never_loaded(runner, calm, tmp_path, whole):
    shutil.copytree(calm.out, tmp_path / "out")
    for name in ("adapter_model.bin", "training_args.bin"):
        plant_pickle(tmp_path / "out" / name, tmp_path / "executed")
    for name in () if whole else ("adapter_model.safetensors", "training_metrics.json"):
        (tmp_path / "out" / name).unlink()
    chat = ("chat", "--prompt", "Hi", "--max_new_tokens", 1)
    for command in (chat, ("export", "--format", "merged", "--outtype", "f32")):
        code, text = runner.end(tmp_path, *command)
        assert code == (0 if whole else 16), text
        assert whole or "never read from pickles" in text
    assert not (tmp_path / "executed").exists()
    pickle.loads((tmp_path / "out" / "adapter_model.bin").read_bytes())
    assert (tmp_path / "executed").is_dir()  # the planted pickle would work
