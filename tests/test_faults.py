"""Runs that are killed, interrupted, starved and lied to: nothing is lost and nothing is wrong.

Faults break the world (see fault_runner.py): no function of the program is replaced.
"""

import contextlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
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

    def wait_until_stuck(self) -> None:
        """Wait until a fault has stopped it in its tracks."""
        self.wait_until("get stuck", lambda: "stuck" in self.text())

    def cpu_seconds(self) -> "float | None":
        """Return how long it has computed, or None when it has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                return sum(process.cpu_times()[:2])
        return None

    def send_after(self, cpu_seconds: float, number: int) -> bool:
        """Send a signal when it has computed for so long; tell whether it still ran."""
        while (spent := self.cpu_seconds()) is not None and spent < cpu_seconds:
            time.sleep(0.002)
        time.sleep(random.random() / 100)  # the clock ticks 100 times a second
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return spent is not None
        return False


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


@dataclass(frozen=True)
class Calm:
    """Hold what an undisturbed run gave, and the processor time it took."""

    out: Path
    adapter: str
    cpu_seconds: float


@pytest.fixture(scope="module")
def calm(runner, tmp_path_factory) -> Calm:
    """Run undisturbed."""
    folder = tmp_path_factory.mktemp("calm")
    child, most = runner.start(folder), 0.0
    while (spent := child.cpu_seconds()) is not None:
        most = spent
        time.sleep(0.01)
    assert child.wait() == 0, child.text()
    assert metrics_of(folder)["total_steps"] == STEPS
    return Calm(folder / "out", metrics_of(folder)["adapter_sha256"], most)


def read(path: Path) -> dict:
    """Return the JSON object in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def metrics_of(folder: Path) -> dict:
    """Return the metrics of the run in a folder."""
    return read(folder / "out" / "training_metrics.json")


def checkpoints(folder: Path) -> "list[str]":
    """Return the names of a run's checkpoints."""
    return sorted(path.name for path in folder.glob("out/checkpoint-*"))


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


def sweep(runner, folder: Path, events: str, do: "list[str]", step: int = 0) -> "list[dict]":
    """Let faults strike at every event of a run, each in a fork; return what became of them."""
    (folder / "keep").mkdir()
    faults = [{"event": events, "do": do, "keep": str(folder / "keep"), "step": step}]
    runner.finish(folder / "run", *FEW, faults=faults)
    lines = (folder / "keep" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    for record in map(json.loads, lines):
        check_words(record["console"], record["code"])
    return [json.loads(line) for line in lines]


def check_every_end_goes_on(runner, calm, folder: Path, records: "list[dict]") -> None:
    """Repeat the command on each folder that was left: always the undisturbed run's adapter."""
    for left in sorted({state for record in records for state in record["left"]}):
        check_sound(folder / "keep" / left / "out")
        assert runner.finish(folder / "keep" / left, *FEW) == calm.adapter, left


# --- at every moment of a run


def test_a_run_that_ends_at_any_change_of_its_folder_goes_on(runner, calm, tmp_path):
    changes = "mkdir open fsync rename replace unlink rmdir"
    fail = "world.errno = (28, 5, 30)[world.events % 3]"  # no space, I/O error, read-only
    records = sweep(runner, tmp_path, changes, [KILL, fail])
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
    check_every_end_goes_on(runner, calm, tmp_path, records)


def test_a_run_that_is_stopped_in_any_forward_pass_goes_on(runner, calm, tmp_path):
    stop = "os.kill(os.getpid(), (2, 15, 1)[world.events % 3])"
    records = sweep(runner, tmp_path, "train evaluate", [stop])
    FAULTS["Ctrl-C, SIGTERM or SIGHUP in a forward pass"] += len(records)
    assert {record["code"] for record in records} == {130, 143, 129}
    assert len([record for record in records if record["event"] == "train"]) >= STEPS
    for record in records:
        assert "the same command" in record["console"].lower()
        assert record["console"].splitlines()[-1] != "out"
    last = [r["event"] for r in records if f"Stopped after step {STEPS} " in r["console"]]
    assert last.count("evaluate") >= 2  # the last one of the training, and the final one
    check_every_end_goes_on(runner, calm, tmp_path, records)


@pytest.mark.scale  # kills at every change of the folder and in every pass are tested above
@pytest.mark.parametrize(("number", "times", "code"), [(9, 8, -9), (2, 3, 130), (15, 3, 143)])
def test_a_run_that_is_ended_at_random_moments_goes_on(runner, calm, tmp_path, number, times, code):
    chance, ended, attempt = random.Random(number), 0, 0
    while ended < times:
        folder = tmp_path / str(attempt)
        child = runner.start(folder)
        hit = child.send_after(chance.uniform(0.03, calm.cpu_seconds), number)
        ended_with = child.wait()
        check_words(child.text(), ended_with)
        check_sound(folder / "out")
        if ended_with == 0:  # nothing hit it, or only on its way out
            assert child.text().splitlines()[-1] == "out"
            assert metrics_of(folder)["adapter_sha256"] == calm.adapter
            attempt += 1
        else:
            assert (ended_with, hit) == (code, True), child.text()
            ended += 1
            FAULTS[f"{signal.Signals(number).name} at random moments of a run"] += 1
    assert runner.finish(folder) == calm.adapter


def test_a_write_that_the_system_cuts_short_costs_nothing(runner, calm, tmp_path):
    sizes = {path.stat().st_size for path in calm.out.rglob("*") if path.is_file()}
    cut = "f = resource.RLIMIT_FSIZE; resource.setrlimit(f, ({}, resource.getrlimit(f)[1]))"
    do = [cut.format(size - 1) for size in sorted(sizes) if size][::2]
    records = sweep(runner, tmp_path, "mkdir", do, step=STEPS)
    FAULTS["a write cut short by the system"] += len(records)
    assert {14, 15} <= {record["code"] for record in records} <= {0, 14, 15}
    for record in records:
        assert record["code"] == 0 or "cannot be written" in record["console"], record
    check_every_end_goes_on(runner, calm, tmp_path, records)


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
WAIT = "os.write(2, b'stuck')\nwhile not os.path.exists('go'): time.sleep(0.01)"
DESTRUCTOR = """
class Dying:
    def __del__(self):
        os.kill(os.getpid(), 15)
        sum(range(10))
Dying()
"""
NOHUP = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
SMALL = "real = shutil.disk_usage\nshutil.disk_usage = lambda path: real(path)._replace(free=1000)"
FULL = """
with open("filler", "ab", buffering=0) as file:
    for size in (1 << 20, 1 << 12, 1):
        try:
            while True:
                file.write(b"x" * size)
        except OSError:
            pass
"""
WEIGHT = "world.optimizer.param_groups[0]['params'][0].data.view(-1)[5] = float('nan')"
GRADIENT = """
real = torch.Tensor.backward
def spoiled(tensor, *args, **kwargs):
    torch.Tensor.backward = real
    real(tensor * float("nan"), *args, **kwargs)
torch.Tensor.backward = spoiled
"""
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
CASES = {
    "a closed terminal": (129, "by SIGHUP", [fault("train", HANG_UP, step=4)]),
    "a closed terminal, nohup": (0, "", [fault("start", NOHUP), fault("train", HANG_UP, step=4)]),
    "SIGTERM in a destructor, early": (143, "by SIGTERM", [fault("open", DESTRUCTOR)]),
    "SIGTERM in a destructor": (143, "by SIGTERM", [fault("train", DESTRUCTOR, step=4)]),
    "SIGTERM in a destructor, late": (143, "by SIGTERM", [fault("fsync", DESTRUCTOR, step=8)]),
    "a disk that gets too small": (14, "1.0 kB are free", [fault("step", SMALL, step=5)]),
    "NaN in the first pass": (0, "not finite", [fault("train", "world.nan = 1")]),
    "NaN in a gradient": (0, "not finite", [fault("train", GRADIENT, step=5)]),
    "NaN in a weight, an evaluation is due": (14, "no finite", [fault("step", WEIGHT, step=2)]),
    "NaN in a weight, a checkpoint is due": (14, "not finite", [fault("step", WEIGHT, step=3)]),
    "NaN in a weight, in the end": (14, "no finite", [fault("step", WEIGHT, step=8)]),
    "NaN in an evaluation": (14, "no finite", [fault("evaluate", "world.nan = 1", step=4)]),
    "NaN in every pass": (14, "no finite", [fault("train", "world.nan = 10**9", step=5)]),
    "NaN in every evaluation": (14, "no finite", [fault("evaluate", "world.nan = 10**9", step=8)]),
    "no memory for a row": (14, "--bf16", [fault("train", "world.most_tokens = 3", step=4)]),
    "no memory for the optimizer": (14, "--bf16", [fault("start", STARVE)]),
    "a step that hangs": (0, "for 5 min", [fault("start", HASTE), fault("train", STUCK, step=4)]),
    "a clock that jumps": (0, "", [fault("start", CLOCK)]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_told_and_the_result_is_that_of_an_undisturbed_run(runner, calm, tmp_path, case):
    code, told, faults = CASES[case]
    ended, text = runner.end(tmp_path, faults=faults)
    FAULTS[case.partition(",")[0]] += 1
    assert ended == code, text
    assert told in text
    assert text.count(" finite") <= 3  # twice, and the end
    if "hangs" in case:
        (log,) = (tmp_path / "logs").glob("*.log")
        assert "in a_stuck_kernel" in log.read_text(encoding="utf-8")
        assert len(re.findall(r"Step \d+ has not ended", text)) == 1
    if code:
        assert not (tmp_path / "out/adapter_model.safetensors").exists()
        runner.finish(tmp_path)
    assert metrics_of(tmp_path)["adapter_sha256"] == calm.adapter
    assert 0 < metrics_of(tmp_path)["train_runtime"] < 1000


@pytest.mark.parametrize(("hang", "event"), [(LOCK, "train"), (KEEP_THE_GIL, "evaluate")])
def test_a_second_signal_leaves_at_once_from_a_hang_in_c(runner, calm, tmp_path, hang, event):
    child = runner.start(tmp_path, faults=[fault(event, hang, step=4)])
    child.wait_until_stuck()
    os.kill(child.pid, signal.SIGINT)
    time.sleep(1.5)  # a busy machine may hand the first one on late
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 130
    FAULTS["a forward pass that never ends"] += 1
    assert checkpoints(tmp_path) == ["checkpoint-3"]
    assert runner.finish(tmp_path) == calm.adapter


@pytest.mark.parametrize(("module", "number"), [("torch", 2), ("torch.nn", 15), ("datasets", 1)])
def test_a_signal_during_an_import_ends_the_run(runner, program, tmp_path, module, number):
    ambush = f"""
import os, runpy, sys
class Ambush:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {number})
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


def test_a_second_run_on_the_same_folder_is_refused(runner, calm, tmp_path):
    first = runner.start(tmp_path / "a", faults=[fault("train", WAIT, step=4)])
    first.wait_until_stuck()
    second = runner.start(tmp_path / "b", "--output_dir", tmp_path / "a" / "out")
    assert second.wait() == 11
    FAULTS["a second run on the same folder"] += 1
    assert "another run is writing" in second.text().lower()
    (tmp_path / "a" / "go").touch()
    assert first.wait() == 0
    assert metrics_of(tmp_path / "a")["adapter_sha256"] == calm.adapter


def test_memory_that_runs_out_takes_smaller_passes_and_the_result_is_right(runner, tmp_path):
    losses, adapters = [], []
    for event in ("never", "train", "evaluate"):
        folder, small = tmp_path / event, fault(event, "world.most_tokens = 250", step=3)
        runner.finish(folder, "--lora_dropout", 0, faults=[small])
        losses.append([metrics_of(folder)[name] for name in ("eval_loss", "eval_loss_before")])
        adapters.append(safetensors.torch.load_file(folder / "out" / "adapter_model.safetensors"))
    FAULTS["memory that runs out"] += 2
    for loss, adapter in zip(losses[1:], adapters[1:], strict=True):
        assert loss == pytest.approx(losses[0], abs=1e-5)
        assert all(torch.allclose(adapter[n], adapters[0][n], atol=1e-4) for n in adapters[0])


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


@pytest.mark.parametrize(("code", "event", "when"), [
    (14, "mkdir", {"step": 3}), (15, "evaluate", {"step": STEPS, "number": 4}),
])  # fmt: skip
def test_a_disk_that_is_really_full_loses_nothing(runner, calm, tmp_path, code, event, when):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root on Linux can mount a small disk")
    try:
        ended, text = runner.end(disk, faults=[fault(event, FULL, **when)])
        FAULTS["a disk that is really full"] += 2
        assert ended == code, text
        assert any(words in text for words in ("0 B are free", "quota) is full"))
        before = checkpoints(disk)
        ended, text = runner.end(disk)
        assert (ended, "0 B free" in text) == (11, True), text
        assert checkpoints(disk) == before
        (disk / "filler").unlink()
        assert runner.finish(disk) == calm.adapter
    finally:
        subprocess.run(["umount", disk], check=True)


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
    """Let a model's weights be a pickle."""
    (model / "model.safetensors").unlink()
    plant_pickle(model / "pytorch_model.bin", evidence)


def plant_index(model: Path, evidence: Path) -> None:
    """Let the index of a model's weights name a pickle."""
    names = safetensors.torch.load_file(model / "model.safetensors").keys()
    plant_weights(model, evidence)
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


def plant_architecture(model: Path, evidence: Path) -> None:
    """Let a model need its own Python code."""
    plant_code(model, evidence, model_type="evil", architectures=["Evil"])


def plant_nan(model: Path, _: Path) -> None:
    """Put a NaN into a model's weights."""
    weights = safetensors.torch.load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    safetensors.torch.save_file(weights, model / "model.safetensors", {"format": "pt"})
    FAULTS["NaN in the base model"] += 1


MODELS = [
    (plant_weights, 11, "lacks model.safetensors"),
    (plant_index, 11, "never pickles"),
    (plant_architecture, 11, "holds a evil model"),
    (plant_code, 0, "[5/5] save done"),  # a Llama, for which no code is needed
    (plant_nan, 14, "nan"),
]


@pytest.mark.parametrize(("plant", "code", "told"), MODELS)
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


# --- machines: a device that fails its test, a Mac

PRETEND_MPS = """
import platform
torch.backends.mps.is_available, platform.machine = lambda: True, lambda: "arm64"
torch.mps.recommended_max_memory = lambda: 10**9
class Child(subprocess.Popen):
    def __init__(self, args, **how):
        test = [sys.executable, "-c", SCRIPT]
        super().__init__(test if "self-test" in " ".join(args) else args, **how)
    def communicate(self, input=None, timeout=None):
        return super().communicate(input, timeout and SECONDS)
subprocess.Popen = Child
"""
CHILDREN = {
    "import time; time.sleep(600)": "hung",
    "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)": "hung",
    "import os; os.kill(os.getpid(), 11)": "crashed (exit code -11",
    "raise RuntimeError('MPS backend: no kernel')": "MPS backend: no kernel",
    **dict.fromkeys(("", "print('{]')", "print('null')", "print('{}')"), "gave no answer"),
    'print(\'{"problem": "it gave nan", "seconds": []}\')': "it gave nan",
}


@pytest.mark.parametrize("script", CHILDREN)
def test_a_device_whose_self_test_fails_is_rejected_with_the_reason(runner, tmp_path, script):
    settings = f"SCRIPT, SECONDS = {script!r}, {0.5 if 'sleep' in script else 60}\n"
    pretend = [fault("start", settings + PRETEND_MPS)]
    FAULTS["a self-test child that hangs, crashes or errs"] += 2
    code, text = runner.end(tmp_path, "check", "--device", "auto", faults=pretend)
    assert (code, "mps rejected: " in text, CHILDREN[script] in text) == (0, True, True), text
    code, text = runner.end(tmp_path, "check", "--device", "mps", faults=pretend)
    assert (code, CHILDREN[script] in text) == (11, True), text


MAC = """
import collections, fcntl, psutil
sys.platform, fcntl.F_FULLFSYNC = "darwin", 2**20  # refused, as by a network drive
battery = collections.namedtuple("Battery", "percent power_plugged")(41, False)
psutil.sensors_battery = lambda: battery
os.environ["PATH"] = os.getcwd() + ":" + os.environ["PATH"]
"""


def test_a_mac_is_kept_awake_and_its_battery_told(runner, calm, tmp_path):
    (tmp_path / "caffeinate").write_text('#!/bin/sh\necho "$@" > awake\n')
    (tmp_path / "caffeinate").chmod(0o755)
    child = runner.start(tmp_path, faults=[fault("start", MAC)])
    assert child.wait() == 0, child.text()
    assert (tmp_path / "awake").read_text() == f"-is -w {child.pid}\n"
    assert "on battery (41 %)" in child.text()
    assert metrics_of(tmp_path)["adapter_sha256"] == calm.adapter
