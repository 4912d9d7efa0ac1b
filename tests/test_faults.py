"""Runs that are killed, interrupted, starved and lied to: nothing is lost and nothing is wrong."""

import builtins
import contextlib
import dataclasses
import errno
import io
import itertools
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch
from conftest import FAULTS, ROOT, clean_environment

import unified_finetune as finetune

STEPS = 16
SETTINGS = {
    "device": "cpu",
    "max_seq_length": 256,
    "num_train_epochs": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "eval_steps": 3,
    "early_stopping_patience": 50,
    "min_disk_gb": 0,
    "yes": True,
}


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory, sample_data: Path) -> Path:
    """Return a data file that gives two epochs of eight steps."""
    rows = json.loads(sample_data.read_text(encoding="utf-8"))
    rows = [row for row in rows if len(row["output"]) < 160 and not row["input"]][:35]
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


# --- The real command line, in children that can be killed at any moment.


@dataclass
class Child:
    """Follow one run of the program."""

    pid: int
    output: Path
    server: "subprocess.Popen[str]"
    code: "int | None" = None

    def wait(self) -> int:
        """Return the exit code, negative for the signal that ended it."""
        if self.code is None:
            assert self.server.stdout
            self.code = int(self.server.stdout.readline())
        return self.code

    def text(self) -> str:
        """Return what it has printed."""
        return self.output.read_text(encoding="utf-8")

    def wait_for(self, words: str) -> None:
        """Wait until it prints these words."""
        for _ in range(6000):
            if words in self.text():
                return
            time.sleep(0.01)
        raise AssertionError(f"{words!r} is not in\n{self.text()}")

    def send_after(self, cpu_seconds: float, number: int) -> bool:
        """Send a signal when the run has computed for so long; tell whether it still ran.

        Processor time, so that the moments are spread over the run on a busy machine, too.
        """
        process = psutil.Process(self.pid)
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            while process.status() != psutil.STATUS_ZOMBIE:
                times = process.cpu_times()
                if times.user + times.system >= cpu_seconds:
                    time.sleep(random.random() / 100)  # the clock ticks 100 times a second
                    os.kill(self.pid, number)
                    return True
                time.sleep(0.002)
        return False


@dataclass(frozen=True)
class Runner:
    """Start runs of the program on the tiny model and `data_file`."""

    server: "subprocess.Popen[str]"
    arguments: "tuple[str, ...]"

    def start(self, folder: Path, *more: object, faults: "tuple[Any, ...]" = ()) -> Child:
        """Start a run whose output folder is folder/out."""
        folder.mkdir(exist_ok=True)
        console = folder.with_name(folder.name + "-console.txt")  # not on the disk under test
        console.write_text("")
        request = {
            "arguments": [*self.arguments, *map(str, more)],
            "folder": str(folder),
            "output": str(console),
            "faults": faults,
        }
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return Child(int(self.server.stdout.readline()), console, self.server)

    def finish(self, folder: Path, *more: object) -> str:
        """Run to the end and return the adapter's SHA-256."""
        child = self.start(folder, *more)
        assert child.wait() == 0, child.text()
        check_no_leftovers(folder / "out")
        return finetune.sha256_of(folder / "out" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def runner(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data_file: Path
) -> Iterator[Runner]:
    """Start the process whose children the runs are."""
    cache = tmp_path_factory.mktemp("cache")
    arguments = ["--model_name", str(tiny_model), "--data_path", str(data_file)]
    arguments += ["--cache_dir", str(cache), "--output_dir", "out", "--log_dir", "logs"]
    arguments += ["--save_steps", "4", "--logging_steps", "1"]
    for name, value in SETTINGS.items():
        arguments += [f"--{name}", str(value)]
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", str(ROOT / "tests" / "fault_runner.py")],
        env={**clean_environment(cache), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        yield Runner(server, tuple(arguments))
        assert server.stdin
        server.stdin.close()


@dataclass(frozen=True)
class Calm:
    """Hold what an undisturbed run gave, and the processor time it took."""

    folder: Path
    adapter: str
    cpu_seconds: float


@pytest.fixture(scope="module")
def calm(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    """Run undisturbed twice, the second time to measure, data preparation included."""
    warm, folder = (tmp_path_factory.mktemp("calm") for _ in range(2))
    runner.finish(warm)
    child = runner.start(folder, "--cache_dir", "cache")
    spent = 0.0
    process = psutil.Process(child.pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            spent = sum(process.cpu_times()[:2])
            time.sleep(0.01)
    assert child.wait() == 0, child.text()
    shas = {finetune.sha256_of(f / "out" / "adapter_model.safetensors") for f in (warm, folder)}
    assert len(shas) == 1
    metrics = json.loads((folder / "out" / "training_metrics.json").read_text())
    assert metrics["total_steps"] == STEPS
    return Calm(folder / "out", shas.pop(), spent)


def check_folder_is_sound(output: Path) -> None:
    """Check what holds at every moment: what has its final name is whole."""
    for checkpoint in finetune.list_checkpoints(output):
        assert finetune.checkpoint_problem(checkpoint) is None
    metrics = output / "training_metrics.json"
    if metrics.is_file():
        adapter = json.loads(metrics.read_text())["adapter_sha256"]
        assert finetune.sha256_of(output / "adapter_model.safetensors") == adapter


def check_no_leftovers(output: Path) -> None:
    """Check that nothing half-written lies about."""
    check_folder_is_sound(output)
    assert not list(output.glob(".staging*"))


@pytest.mark.parametrize(
    ("number", "times", "code"),
    [(signal.SIGKILL, 20, -9), (signal.SIGINT, 10, 130), (signal.SIGTERM, 10, 143)],
    ids=["SIGKILL", "SIGINT", "SIGTERM"],
)
def test_a_run_that_is_ended_at_random_moments_gives_the_adapter_of_an_undisturbed_one(
    runner: Runner, calm: Calm, tmp_path: Path, number: int, times: int, code: int
) -> None:
    chance = random.Random(int(number))
    ended = 0
    for attempt in itertools.count():
        folder = tmp_path / str(attempt)
        while ended < times:
            child = runner.start(folder, "--cache_dir", "cache")
            hit = child.send_after(chance.uniform(0.03, calm.cpu_seconds), number)
            ended_with = child.wait()
            assert "Traceback" not in child.text()
            if ended_with == 0:  # nothing hit it, or only on its way out
                assert child.text().splitlines()[-1] == "out"  # the result: all was done
                hit = False
            else:
                assert (ended_with, hit) == (code, True), child.text()
            check_folder_is_sound(folder / "out")
            if not hit:
                break
            ended += 1
            FAULTS[f"{signal.Signals(number).name} at random moments of a run"] += 1
        assert runner.finish(folder, "--cache_dir", "cache") == calm.adapter
        if ended == times:
            return


@pytest.mark.parametrize(("fault", "least"), [("kill_in_publish", 15), ("kill_in_save", 20)])
def test_a_run_that_is_killed_at_any_fsync_or_rename_ends_with_the_same_adapter(
    runner: Runner, calm: Calm, tmp_path: Path, fault: str, least: int
) -> None:
    folder = tmp_path / "run"
    for number in itertools.count(1):
        child = runner.start(folder, "--save_total_limit", 1, faults=([fault, number],))
        code = child.wait()
        check_folder_is_sound(folder / "out")
        if code == 0:
            break
        assert code == -signal.SIGKILL, child.text()
        FAULTS["SIGKILL at an fsync, rename or rmdir"] += 1
    assert number > least
    check_no_leftovers(folder / "out")
    assert finetune.sha256_of(folder / "out" / "adapter_model.safetensors") == calm.adapter


def test_a_second_ctrl_c_leaves_a_hanging_pass_at_once(
    runner: Runner, calm: Calm, tmp_path: Path
) -> None:
    child = runner.start(tmp_path, faults=(["hang_in_pass", 14],))
    child.wait_for("stuck")
    os.kill(child.pid, signal.SIGINT)
    child.wait_for("again to leave at once")
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 130
    FAULTS["a forward pass that never ends"] += 1
    assert finetune.list_checkpoints(tmp_path / "out")
    check_folder_is_sound(tmp_path / "out")
    assert runner.finish(tmp_path) == calm.adapter


@pytest.mark.parametrize(("function", "code"), [("publish_folder", 14), ("move_into_place", 15)])
def test_a_full_disk_stops_the_command_and_the_next_one_goes_on(
    runner: Runner, calm: Calm, tmp_path: Path, function: str, code: int
) -> None:
    child = runner.start(tmp_path, faults=(["full_disk", function],))
    assert child.wait() == code
    FAULTS["a full disk that ends the command"] += 1
    text = child.text()
    assert "No space left on device" in text
    assert "run the same command again" in text
    assert "Traceback" not in text
    assert "Unexpected" not in text
    check_no_leftovers(tmp_path / "out")
    assert runner.finish(tmp_path) == calm.adapter


@pytest.fixture
def small_disk(tmp_path: Path) -> "Iterator[Path]":
    """Return a folder on a real file system of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root on Linux can mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(("function", "code"), [("write_checkpoint", 14), ("save_results", 15)])
def test_a_disk_that_is_really_full_loses_nothing(
    runner: Runner, calm: Calm, small_disk: Path, function: str, code: int
) -> None:
    child = runner.start(small_disk, faults=(["fill_disk", function],))
    assert child.wait() == code
    FAULTS["a full disk that ends the command"] += 1
    told = "are needed and 0 B are free" if code == 14 else "No space left on device"
    assert told in child.text()
    assert "Traceback" not in child.text()
    check_no_leftovers(small_disk / "out")
    checkpoints = finetune.list_checkpoints(small_disk / "out")
    child = runner.start(small_disk)
    assert child.wait() == 11, child.text()
    assert "needed for 3 checkpoints and the adapter, 0 B free" in child.text()
    assert "Traceback" not in child.text()
    assert finetune.list_checkpoints(small_disk / "out") == checkpoints
    (small_disk / "filler").unlink()
    assert runner.finish(small_disk) == calm.adapter


def test_a_damaged_adapter_of_a_finished_run_is_written_again(
    runner: Runner, calm: Calm, tmp_path: Path
) -> None:
    shutil.copytree(calm.folder, tmp_path / "out")
    adapter = tmp_path / "out" / "adapter_model.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-9] ^= 1
    adapter.write_bytes(content)
    FAULTS["a damaged file"] += 1
    assert runner.finish(tmp_path) == calm.adapter


def test_a_planted_pickle_in_a_checkpoint_is_never_unpickled(
    runner: Runner, calm: Calm, tmp_path: Path
) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        folder = tmp_path / name
        checkpoint = folder / "out" / "checkpoint-8"
        shutil.copytree(calm.folder / "checkpoint-8", checkpoint)
        plant_pickle(checkpoint / name, folder / "executed")
        manifest = json.loads((checkpoint / finetune.MANIFEST).read_text())
        manifest[name] = {
            "size": (checkpoint / name).stat().st_size,
            "sha256": finetune.sha256_of(checkpoint / name),
        }
        (checkpoint / finetune.MANIFEST).write_text(json.dumps(manifest))
        child = runner.start(folder)
        assert child.wait() == 14, child.text()
        FAULTS["a planted pickle or custom code"] += 1
        assert "only tensors belong" in child.text()
        assert not (folder / "executed").exists()


# --- Disks that fail.


@pytest.fixture
def prepare(
    tmp_path: Path, tiny_model: Path, data_file: Path
) -> "Callable[..., tuple[finetune.PreparedData, finetune.FineTuningConfig]]":
    """Return a function that prepares the data with the given settings."""

    def build(**settings: object):
        values: dict[str, Any] = {
            **SETTINGS,
            "model_name": str(tiny_model),
            "data_path": str(data_file),
            "save_steps": 4,
            **{f"{n}_dir": str(tmp_path / n) for n in ("output", "cache", "log")},
            **settings,
        }
        config = finetune.build_config([finetune.Setting(k, v, "test") for k, v in values.items()])
        return finetune.prepare_dataset(finetune.fetch_dataset(config), config), config

    return build


def train(data: finetune.PreparedData, config: finetune.FineTuningConfig) -> finetune.TrainResult:
    """Run stage 4 on the CPU."""
    dtype = "bfloat16" if config.bf16 else "float32"
    return finetune.train_lora(data, finetune.PreflightReport((), "cpu", dtype), config)


def adapter_of(result: finetune.TrainResult) -> "dict[str, torch.Tensor]":
    """Return a result's adapter."""
    return finetune.adapter_weights(result.model)


def same(ours: "dict[str, torch.Tensor]", theirs: "dict[str, torch.Tensor]") -> bool:
    """Tell whether two adapters are equal to the bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@contextlib.contextmanager
def failing_disk(number: int, code: int) -> "Iterator[list[str]]":
    """Let every writing operation from the given one on fail; the first may leave half a file."""
    begun: list[str] = []

    def fail_or(name: str, real: "Callable[..., Any]") -> "Callable[..., Any]":
        def operate(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and "r" in str([*args, kwargs.get("mode", "r")][1]):
                return real(*args, **kwargs)
            begun.append(name)
            if len(begun) < number:
                return real(*args, **kwargs)
            if len(begun) == number and name in ("save", "save_file"):
                real(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            raise OSError(code, os.strerror(code))

        return operate

    places = [(os, "mkdir"), (os, "fsync"), (os, "rename"), (os, "replace"), (torch, "save")]
    places += [(safetensors.torch, "save_file"), (io, "open"), (builtins, "open")]
    with pytest.MonkeyPatch.context() as patch:
        for module, name in places:
            patch.setattr(module, name, fail_or(name, getattr(module, name)))
        yield begun


@contextlib.contextmanager
def small_files_only(size: int) -> "Iterator[None]":
    """Let the system refuse, in the middle of a write, files of more than `size` bytes."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def every_disk_failure(
    work: "Callable[[], object]", sizes: "list[int]"
) -> "Iterator[tuple[str, finetune.FineTuningError | None]]":
    """Do the work under every failure; yield what was said of it and what was raised."""
    for code in (errno.ENOSPC, errno.EIO, errno.EROFS):
        for number in itertools.count(1):
            with failing_disk(number, code) as begun:
                error = outcome(work)
            if len(begun) < number:  # all went well
                assert error is None
                yield "", None
                break
            FAULTS[f"{errno.errorcode[code]} at a write, fsync or rename"] += 1
            yield os.strerror(code), error
    for size in sizes:
        with small_files_only(size):
            error = outcome(work)
        FAULTS["a write cut short by the system"] += 1
        yield "", error
        assert error


def outcome(work: "Callable[[], object]") -> "finetune.FineTuningError | None":
    """Return the error that the work ends with; any other exception is a fault of the program."""
    try:
        work()
    except finetune.FineTuningError as error:
        return error
    return None


def test_a_disk_that_fails_anywhere_in_a_checkpoint_costs_nothing(
    prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data, config = prepare(save_total_limit=2)
    expected = adapter_of(train(data, config))
    config = dataclasses.replace(config, output_dir=str(tmp_path / "faulty"))
    real, failed = finetune.write_checkpoint, []

    def attack(trainer: Any) -> None:
        if trainer.state.global_step == 12:
            before = {f.name for f in finetune.list_checkpoints(tmp_path / "faulty")}
            assert before == {"checkpoint-4", "checkpoint-8"}
            sizes = {f.stat().st_size for f in (tmp_path / "faulty/checkpoint-8").iterdir()}
            for words, error in every_disk_failure(
                lambda: real(trainer), [0, *sorted(s - 1 for s in sizes)]
            ):
                check_no_staging_but_removed(tmp_path / "faulty")
                names = {f.name for f in finetune.list_checkpoints(tmp_path / "faulty")}
                if error:
                    failed.append(error)
                    assert "Checkpoint 12 cannot be written" in str(error)
                    assert words in str(error)
                    assert "earlier checkpoints are untouched" in error.hint
                    assert names >= before
                else:  # at most, an old one could not be deleted
                    assert "checkpoint-12" in names
                shutil.rmtree(tmp_path / "faulty")
                shutil.copytree(tmp_path / "kept", tmp_path / "faulty")
        real(trainer)
        if trainer.state.global_step == 8:
            shutil.copytree(tmp_path / "faulty", tmp_path / "kept")

    monkeypatch.setattr(finetune, "write_checkpoint", attack)
    result = train(data, config)
    assert len(failed) > 60
    assert "checkpoint-4 cannot be deleted: Input/output error" in caplog.text
    assert same(adapter_of(result), expected)
    check_no_leftovers(tmp_path / "faulty")


def check_no_staging_but_removed(output: Path) -> None:
    """Check the folder after a failure; what could not be deleted may be left, hidden."""
    check_folder_is_sound(output)
    assert not list(output.glob(".staging-checkpoint*"))


def test_a_disk_that_fails_anywhere_in_the_final_save_costs_nothing(
    prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, config = prepare(output_dir=str(tmp_path / "faulty"), save_steps=100)
    result = train(data, config)
    samples = finetune.answer_samples(result, data, config)
    monkeypatch.setattr(finetune, "answer_samples", lambda *_: samples)
    shutil.copytree(tmp_path / "faulty", tmp_path / "kept")

    # Saving empties the model in memory; here it is saved many times.
    monkeypatch.setattr(type(result.model), "to", lambda model, _: model)

    def save() -> None:
        finetune.save_results(result, data, config)

    save()
    files = {f.name: f.stat().st_size for f in (tmp_path / "faulty").iterdir() if f.is_file()}
    expected = finetune.sha256_of(tmp_path / "faulty" / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "faulty")
    shutil.copytree(tmp_path / "kept", tmp_path / "faulty")
    sizes = sorted(size - 1 for size in files.values() if size > 1)
    failed = 0
    for words, error in every_disk_failure(save, [0, *sizes]):
        check_no_leftovers(tmp_path / "faulty")
        if error is None:
            continue
        failed += 1
        assert "The results cannot be written" in str(error)
        assert words in str(error)
        assert "the training itself is kept" in error.hint
        assert finetune.list_checkpoints(tmp_path / "faulty")
    assert failed > 60
    save()
    check_no_leftovers(tmp_path / "faulty")
    assert finetune.sha256_of(tmp_path / "faulty" / "adapter_model.safetensors") == expected


def test_a_disk_that_gets_too_small_stops_before_a_checkpoint_is_begun(
    prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, config = prepare()
    expected = adapter_of(train(data, config))
    config = dataclasses.replace(config, output_dir=str(tmp_path / "small"))
    real = shutil.disk_usage

    def usage(path: Path) -> Any:
        full = (tmp_path / "small" / "checkpoint-4").exists()
        return real(path)._replace(free=1000) if full else real(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(finetune.FineTuningError, match=r"are needed and 1\.0 kB are free"):
        train(data, config)
    FAULTS["a full disk that ends the command"] += 1
    check_no_leftovers(tmp_path / "small")
    assert [f.name for f in finetune.list_checkpoints(tmp_path / "small")] == ["checkpoint-4"]
    monkeypatch.setattr(shutil, "disk_usage", real)
    result = train(data, config)
    assert result.metrics["resumed_from_step"] == 4
    assert same(adapter_of(result), expected)


def test_the_room_a_run_needs_is_computed_and_asked_for(
    prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, config = prepare(save_total_limit=3)
    size = finetune.measure_model(config)
    train(data, config)
    written = [
        sum(file.stat().st_size for file in folder.iterdir())
        for folder in finetune.list_checkpoints(tmp_path / "output")
    ]
    assert max(written) <= finetune.checkpoint_bytes(size)
    assert min(written) > size.trainable * 16
    assert finetune.check_room(config).outcome == "ok"
    real = shutil.disk_usage
    need = 4 * finetune.checkpoint_bytes(size) + 4 * size.trainable
    for free, outcome_ in ((need - sum(written), "ok"), (need - sum(written) - 1, "failed")):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path, free=free: real(path)._replace(free=free)
        )
        check = finetune.check_room(config)
        assert check.outcome == outcome_
    assert "--save_total_limit" in check.hint


def test_a_folder_that_may_not_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with not_root():  # pytest's folders may be root's: then not even their names can be seen
        check = finetune.check_folder("output_dir", tmp_path / "locked" / "out")
    assert check.outcome == "failed"
    assert "cannot be written: Permission denied" in check.detail
    assert "--output_dir" in check.hint


@contextlib.contextmanager
def not_root() -> "Iterator[None]":
    """Be a user without privileges for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("publish", ["checkpoint", "result"])
def test_everything_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publish: str
) -> None:
    staged, output = tmp_path / "out" / ".staging-x", tmp_path / "out"
    staged.mkdir(parents=True)
    names = ["adapter_model.safetensors", finetune.PROGRESS_FILE, finetune.METRICS_FILE]
    for name in names:
        (staged / name).write_text(name)
    on_disk: set[int] = set()  # inodes; what is not there may be empty after a power cut
    named: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def fsync(handle: int) -> None:
        real["fsync"](handle)
        on_disk.add(os.fstat(handle).st_ino)

    def move(name: str, source: Path, target: Path) -> None:
        inside = source.iterdir() if source.is_dir() else ()
        assert all(path.stat().st_ino in on_disk for path in (source, *inside))
        real[name](source, target)
        named.append(target.name)
        on_disk.discard(output.stat().st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", lambda *paths: move("rename", *paths))
    monkeypatch.setattr(os, "replace", lambda *paths: move("replace", *paths))
    if publish == "checkpoint":
        finetune.publish_folder(staged, output / "checkpoint-4")
        assert named == ["checkpoint-4"]
        assert finetune.checkpoint_problem(output / "checkpoint-4") is None
    else:
        finetune.move_into_place(staged, output)
        assert sorted(named) == sorted(names)
        assert named[-1] == finetune.METRICS_FILE
    assert output.stat().st_ino in on_disk


def test_a_damaged_later_checkpoint_never_pushes_out_a_whole_one(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    finetune.prune_checkpoints(tmp_path / "checkpoint-8", 1, best_step=None)
    assert [f.name for f in finetune.list_checkpoints(tmp_path)] == ["checkpoint-8"]


# --- What a checkpoint holds, and what resuming needs.


def test_a_checkpoint_holds_all_that_resuming_needs(prepare, tmp_path: Path) -> None:
    data, config = prepare()
    train(data, config)
    newest = finetune.list_checkpoints(tmp_path / "output")[0]
    manifest = json.loads((newest / finetune.MANIFEST).read_text())
    assert manifest.keys() | {finetune.MANIFEST} == {f.name for f in newest.iterdir()}
    random_states = torch.load(newest / "rng_state.pth", weights_only=False)
    assert random_states.keys() >= {"python", "numpy", "cpu"}
    optimizer = torch.load(newest / "optimizer.pt", weights_only=True)
    assert {int(s["step"]) for s in optimizer["state"].values()} == {STEPS}
    assert torch.load(newest / "scheduler.pt", weights_only=True)["last_epoch"] == STEPS
    assert json.loads((newest / "trainer_state.json").read_text())["global_step"] == STEPS
    progress = json.loads((newest / finetune.PROGRESS_FILE).read_text())
    assert progress["identity"]["data_sha256"] == data.source.sha256
    assert progress["identity"].keys() >= set(finetune.RUN_SETTINGS)
    assert progress["best_step"] in range(1, STEPS + 1)
    assert (newest / finetune.BEST_ADAPTER).is_file()
    assert progress["evaluations_without_gain"] >= 0


def test_early_stopping_counts_on_after_an_interruption(
    prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, config = prepare(
        learning_rate=0.5, num_train_epochs=4, eval_steps=2, save_steps=3, early_stopping_patience=4
    )
    expected = train(data, config)
    evaluations = [r["step"] for r in expected.history if "eval_loss" in r]
    stop = evaluations[-1]
    assert stop < expected.metrics["total_steps"]
    config = dataclasses.replace(config, output_dir=str(tmp_path / "shaken"))
    real = finetune.note_step

    def interrupt(trainer: Any) -> None:
        real(trainer)
        if trainer.state.global_step == stop - 1:
            finetune.stop_signal = signal.SIGINT

    monkeypatch.setattr(finetune, "note_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(data, config)
    monkeypatch.setattr(finetune, "note_step", real)
    result = train(data, config)
    assert result.metrics["resumed_from_step"] == stop - 1
    assert [r["step"] for r in result.history if "eval_loss" in r] == evaluations
    assert result.metrics["best_step"] == expected.metrics["best_step"]
    assert same(adapter_of(result), adapter_of(expected))


@pytest.mark.parametrize(
    ("name", "value"),
    [("overlong", "truncate"), ("max_seq_length", 128), ("system_prompt", "Be kind.")],
)
def test_settings_that_change_the_examples_are_told_apart(
    prepare, name: str, value: object
) -> None:
    data, config = prepare(num_train_epochs=0.5)
    train(data, config)
    with pytest.raises(finetune.FineTuningError, match=f"{name} was .* and is now {value!r}"):
        train(data, dataclasses.replace(config, **{name: value}))


# --- Numbers that are not finite, and trainings that collapse.


def nan_in_a_gradient(patch: pytest.MonkeyPatch, step: int) -> None:
    """Put a NaN into one gradient, once."""
    real, calls = finetune.accumulate_gradients, itertools.count(1)

    def spoil(trainer: Any, *args: Any) -> float:
        loss = real(trainer, *args)
        if next(calls) == step:
            spoiled = next(p for p in trainer.model.parameters() if p.grad is not None)
            spoiled.grad.view(-1)[5] = float("nan")
        return loss

    patch.setattr(finetune, "accumulate_gradients", spoil)


def nan_in_a_weight(patch: pytest.MonkeyPatch, step: int) -> None:
    """Put a NaN into one weight of the adapter, once, when a step has ended."""
    real, left = finetune.note_step, [1]

    def spoil(trainer: Any) -> None:
        real(trainer)
        if trainer.state.global_step == step and left:
            left.pop()
            weight = next(p for p in trainer.model.parameters() if p.requires_grad)
            weight.data.view(-1)[5] = float("nan")

    patch.setattr(finetune, "note_step", spoil)


def nan_in_an_evaluation(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let the loss of one evaluation be NaN, once."""
    real, left = finetune.mean_loss, [step]

    def spoil(*args: Any) -> float:
        left[0] -= 1
        return float("nan") if left[0] == 0 else real(*args)

    patch.setattr(finetune, "mean_loss", spoil)


@pytest.mark.parametrize("evaluation", range(1, 9))  # of steps 3, 6, ... 15, 16; two at the end
def test_a_run_stopped_in_an_evaluation_ends_with_the_same_adapter(
    prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: int
) -> None:
    data, config = prepare()
    expected = train(data, config)
    config = dataclasses.replace(config, output_dir=str(tmp_path / "stopped"))
    real, left = finetune.mean_loss, [evaluation]

    def stop(*args: Any) -> float:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(finetune, "mean_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        train(data, config)
    result = train(data, config)
    assert same(adapter_of(result), adapter_of(expected))
    assert result.metrics["best_step"] == expected.metrics["best_step"] == STEPS


@pytest.mark.parametrize(
    ("inject", "step", "told"),
    [
        (nan_in_a_gradient, 1, "computing the step once more"),
        (nan_in_a_gradient, 6, "computing the step once more"),
        (nan_in_a_weight, 1, "from the last checkpoint on the CPU"),  # before any checkpoint
        (nan_in_a_weight, 3, "the evaluation at step 3 gives no finite loss"),
        (nan_in_a_weight, 4, "the adapter's weights are not finite"),  # a checkpoint is due
        (nan_in_a_weight, 5, "step 6 gives no finite numbers"),
        (nan_in_a_weight, STEPS, f"the evaluation at step {STEPS} gives no finite loss"),
        (nan_in_an_evaluation, 1, "the evaluation at step 3 gives no finite loss"),
        (nan_in_an_evaluation, 2, "the evaluation at step 6 gives no finite loss"),
        (nan_in_an_evaluation, 7, "the last evaluation gives no finite loss"),
    ],
)
def test_a_nan_reaches_neither_adapter_nor_checkpoint(
    prepare, tmp_path: Path, caplog: pytest.LogCaptureFixture, inject: Any, step: int, told: str
) -> None:
    data, config = prepare()
    expected = adapter_of(train(data, config))
    config = dataclasses.replace(config, output_dir=str(tmp_path / "spoiled"))
    with pytest.MonkeyPatch.context() as patch:
        inject(patch, step)
        result = train(data, config)
    FAULTS["NaN in a gradient, a weight or an evaluation"] += 1
    assert told in caplog.text
    assert same(adapter_of(result), expected)
    for checkpoint in finetune.list_checkpoints(tmp_path / "spoiled"):
        for file in checkpoint.glob("*.safetensors"):
            assert all(v.isfinite().all() for v in safetensors.torch.load_file(file).values())


def test_an_evaluation_without_memory_takes_smaller_passes(
    prepare, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, config = prepare(max_eval_examples=100)
    expected = train(data, config)
    real, refused = finetune.lay_out, []

    def too_much(examples: Any, device: str) -> Any:
        if len(examples) > 2 and not torch.is_grad_enabled():
            refused.append(len(examples))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(examples, device)

    monkeypatch.setattr(finetune, "lay_out", too_much)
    result = train(data, dataclasses.replace(config, output_dir=str(tmp_path / "starved")))
    FAULTS["memory that runs out"] += len(refused)
    assert refused
    losses = [
        [r["eval_loss"] for r in one.history if "eval_loss" in r] for one in (expected, result)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert result.metrics["eval_loss"] == pytest.approx(expected.metrics["eval_loss"], abs=1e-5)


def test_a_gpu_without_memory_hands_the_run_to_the_cpu(
    prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data, config = prepare()
    expected = adapter_of(train(data, config))
    config = dataclasses.replace(config, output_dir=str(tmp_path / "starved"))
    real_train, real_step = finetune.train_on, torch.optim.AdamW.step
    places: list[tuple[str, str]] = []

    def on_a_pretended_gpu(data: Any, config: Any, device: str, dtype: str, checkpoint: Any) -> Any:
        places.append((device, dtype))
        return real_train(data, config, "cpu", "float32", checkpoint)

    def starve(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if places[-1][0] == "mps" and (tmp_path / "starved" / "checkpoint-4").exists():
            raise RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)")
        return real_step(optimizer, *args, **kwargs)

    monkeypatch.setattr(finetune, "train_on", on_a_pretended_gpu)
    monkeypatch.setattr(torch.optim.AdamW, "step", starve)
    result = finetune.train_lora(data, finetune.PreflightReport((), "mps", "bfloat16"), config)
    FAULTS["memory that runs out"] += 1
    assert places == [("mps", "bfloat16"), ("cpu", "float32")]
    assert "out of memory on mps; going on from the last checkpoint on the CPU" in caplog.text
    assert result.metrics["resumed_from_step"] == 4
    assert same(adapter_of(result), expected)


def test_a_cpu_without_memory_ends_with_what_to_do(
    prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, config = prepare()

    def starve(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: Error code 12")

    monkeypatch.setattr(torch.optim.AdamW, "step", starve)
    with pytest.raises(finetune.FineTuningError, match="Not enough memory") as error:
        train(data, config)
    FAULTS["memory that runs out"] += 1
    assert "--bf16" in error.value.hint


def test_half_precision_that_fails_twice_goes_on_in_float32(
    prepare, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data, config = prepare(bf16=True)
    real = finetune.accumulate_gradients

    def too_coarse(trainer: Any, *args: Any) -> float:
        loss = real(trainer, *args)
        half = next(trainer.model.get_base_model().parameters()).dtype == torch.bfloat16
        return float("inf") if half and trainer.state.global_step == 5 else loss

    monkeypatch.setattr(finetune, "accumulate_gradients", too_coarse)
    result = train(data, config)
    FAULTS["NaN in a gradient, a weight or an evaluation"] += 1
    assert "going on with the base model in float32" in caplog.text
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]


def test_an_overflow_that_fp16_skips_breaks_no_checkpoint() -> None:
    run = finetune.RunState({}, 512)
    trainer = SimpleNamespace(
        run=run,
        state=SimpleNamespace(global_step=1, max_steps=9),
        record={
            "loss": 2.0,
            "grad_norm": float("inf"),
            "learning_rate": 1e-3,
            "seconds": 0.1,
            "tokens": 9,
        },
        bar=SimpleNamespace(move_to=lambda *_: None),
        measured=5,
        args=SimpleNamespace(device=torch.device("cpu")),
        config=SimpleNamespace(logging_steps=10),
    )
    finetune.note_step(trainer)
    assert json.dumps(dataclasses.asdict(run), allow_nan=False)


def test_a_loss_of_exactly_zero_is_reported_and_stands_in_the_metrics(
    prepare, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data, config = prepare(num_train_epochs=1)
    real = finetune.pass_loss
    monkeypatch.setattr(finetune, "pass_loss", lambda m, p: real(m, p) * (0 if m.training else 1))
    result = train(data, config)
    assert result.metrics["loss_warnings"] == ["the loss of step 1 is exactly 0.0"]
    assert "look at the result with care" in caplog.text


def test_a_loss_far_above_its_mean_is_reported_after_twenty_steps() -> None:
    def warnings_after(losses: "list[float]") -> "list[str]":
        run = finetune.RunState({}, 512)
        for step, loss in enumerate(losses, 1):
            finetune.note_collapse(run, step, loss)
        return run.loss_warnings

    assert warnings_after([2.0] * 30 + [21.0] * 19 + [2.0] * 30) == []
    assert warnings_after([2.0] * 30 + [19.0] * 60) == []
    warned = warnings_after([2.0] * 30 + [21.0] * 60)
    assert len(warned) == 1
    assert "more than 10 times its mean before (2.0000) for 20 steps, up to step 50" in warned[0]
    assert len(warnings_after([2.0] * 5 + [0.0] * 9 + [1.0] + [0.0])) == 2


# --- The device: its self-test, the watchdog, the laptop around it.


@pytest.fixture
def answer_self_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Callable[[str], None]":
    """Return a function that puts a script in the place of the self-test's child."""

    def replace(script: str) -> None:
        (tmp_path / "child.py").write_text(script)
        monkeypatch.setattr(finetune, "__file__", str(tmp_path / "child.py"))
        FAULTS["a self-test child that hangs, crashes or errs"] += 1

    return replace


CHILDREN = {
    "hangs": ("import time; time.sleep(600)", "hung"),
    "hangs and ignores SIGTERM": (
        "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)",
        "hung",
    ),
    "crashes": ("import os; os.kill(os.getpid(), 11)", "crashed (exit code -11"),
    "raises": ("raise RuntimeError('MPS backend: no kernel')", "MPS backend: no kernel"),
    "says nothing": ("", "gave no answer"),
    "says nonsense": ("print('{]')", "gave no answer"),
    "compares nothing": ('print(\'{"reference": [], "device": []}\')', "gave no answer"),
    "says too little": ('print(\'{"reference": [5.0, 4.0], "device": [5.0]}\')', "no answer"),
    "gives text": ('print(\'{"reference": [5.0], "device": ["5.0"]}\')', "gave no answer"),
    "gives NaN": ('print(\'{"reference": [5.0], "device": [NaN]}\')', "gave nan"),
    "has a CPU that gives NaN": ('print(\'{"reference": [NaN], "device": [5.0]}\')', "gives nan"),
    "errs": ('print(\'{"reference": [5.0], "device": [5.01]}\')', "gave 5.0100 where"),
}


@pytest.mark.parametrize("case", CHILDREN)
def test_a_device_whose_self_test_fails_is_rejected_with_the_reason(
    answer_self_test, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    script, told = CHILDREN[case]
    answer_self_test(script)
    monkeypatch.setattr(finetune, "SELF_TEST_SECONDS", 1 if "hangs" in case else 60)
    monkeypatch.setattr(finetune, "choose_device", lambda _: ("mps", "CUDA absent"))
    check, device, dtype = finetune.check_device(finetune.FineTuningConfig())
    assert (check.outcome, device, dtype) == ("warning", "cpu", "float32")
    assert check.detail.startswith("mps rejected: ")
    assert told in check.detail
    check, device, _ = finetune.check_device(finetune.FineTuningConfig(device="mps"))
    assert (check.outcome, device) == ("failed", "mps")


def test_a_gpu_in_half_precision_that_is_rejected_hands_on_what_the_cpu_can_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(finetune, "choose_device", lambda _: ("cuda", "asked for"))
    monkeypatch.setattr(finetune, "self_test", lambda device, _: "bad" if device != "cpu" else None)
    chosen = [
        finetune.check_device(finetune.FineTuningConfig(**{name: True}))[1:]
        for name in ("fp16", "bf16")
    ]
    assert chosen == [("cpu", "float32"), ("cpu", "bfloat16")]


@pytest.mark.parametrize("fault", ["no gradient", "wrong gradient", "wrong attention"])
def test_the_self_test_sees_devices_that_compute_wrongly(
    answer_self_test, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    right = finetune.self_test_losses("cpu", "float32")
    real = finetune.pass_loss
    if fault == "no gradient":
        monkeypatch.setattr(
            finetune, "pass_loss", lambda m, p: real(m, p) * 0 + real(m, p).detach()
        )
    elif fault == "wrong gradient":
        monkeypatch.setattr(
            finetune, "pass_loss", lambda m, p: 2 * real(m, p).detach() - real(m, p)
        )
    else:
        attend = finetune.packed_attention
        monkeypatch.setattr(
            finetune, "packed_attention", lambda *a, **k: (attend(*a, **k)[0] * 0.5, None)
        )
    wrong = finetune.self_test_losses("cpu", "float32")
    for measured, verdict in ((right, None), (wrong, "where the CPU gives")):
        answer = json.dumps({"reference": right, "device": measured})
        answer_self_test(f"print({answer!r})")
        problem = finetune.self_test("mps", "float32")
        assert problem is None if verdict is None else verdict in problem


def test_the_real_self_test_passes_on_the_cpu() -> None:
    assert finetune.self_test("cpu", "float32") is None


@pytest.fixture
def watched() -> Any:
    """Return what the watchdog looks at: a run in its third step, on MPS."""
    return SimpleNamespace(
        state=SimpleNamespace(global_step=2),
        evaluating=False,
        run=SimpleNamespace(seconds=0.1),
        args=SimpleNamespace(device=SimpleNamespace(type="mps")),
    )


def test_the_watchdog_tells_of_a_step_that_does_not_end(
    watched: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(finetune, "WATCHDOG_SECONDS", 1)
    with finetune.watchdog(watched):
        time.sleep(4.5)
    assert caplog.text.count("Step 3 has not ended") == 1
    assert "try --device cpu instead of mps" in caplog.text
    assert "Stacks of all threads" in caplog.text
    assert "test_the_watchdog_tells_of_a_step_that_does_not_end" in caplog.text


def test_a_laptop_that_slept_and_a_clock_that_jumped_raise_no_alarm(
    watched: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jumps = itertools.count(0, 36_000)
    for clock in ("time", "monotonic"):
        monkeypatch.setattr(finetune.time, clock, lambda: float(next(jumps)))
    with finetune.watchdog(watched):
        time.sleep(2.5)
    assert next(jumps) >= 0
    assert "has not ended" not in caplog.text


@pytest.mark.parametrize(("platform", "started"), [("darwin", True), ("linux", False)])
def test_only_a_mac_is_kept_awake_and_its_battery_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, platform: str, started: bool
) -> None:
    caplog.set_level(logging.INFO)
    commands: list[list[str]] = []
    battery = SimpleNamespace(percent=41, power_plugged=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(finetune, "subprocess", SimpleNamespace(Popen=commands.append))
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    finetune.keep_awake()
    expected = [["caffeinate", "-is", "-w", str(os.getpid())]] if started else []
    assert commands == expected
    assert ("on battery (41 %)" in caplog.text) is started


# --- Folders that attack.


def plant_pickle(path: Path, evidence: Path) -> None:
    """Write a pickle that leaves evidence when it is loaded."""

    class Attack:
        def __reduce__(self) -> "tuple[Any, ...]":
            return (os.mkdir, (str(evidence),))

    path.write_bytes(pickle.dumps(Attack(), protocol=2))


def test_the_planted_pickle_would_work(tmp_path: Path) -> None:
    plant_pickle(tmp_path / "x.bin", tmp_path / "executed")
    pickle.loads((tmp_path / "x.bin").read_bytes())
    assert (tmp_path / "executed").is_dir()


@pytest.mark.parametrize("index", [None, "pytorch_model.bin.index.json"])
def test_a_base_model_in_pickles_is_refused_and_never_loaded(
    tmp_path: Path, tiny_model: Path, index: "str | None"
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "model.safetensors").unlink()
    plant_pickle(model / "pytorch_model.bin", tmp_path / "executed")
    if index:
        (model / index).write_text(json.dumps({"weight_map": {"x": "pytorch_model.bin"}}))
    FAULTS["a planted pickle or custom code"] += 1
    check = finetune.check_model(finetune.FineTuningConfig(model_name=str(model)))
    assert check.outcome == "failed"
    assert "lacks model.safetensors" in check.detail
    assert "pickled weights (.bin, .pt) are never loaded" in check.hint
    with pytest.raises(finetune.FineTuningError, match=r"lacks model\.safetensors"):
        load(model)
    assert not (tmp_path / "executed").exists()


def load(model: Path) -> Any:
    """Load a base model as training and chat do."""
    return finetune.load_base_model(
        finetune.FineTuningConfig(model_name=str(model)), "cpu", "float32"
    )


def test_an_index_that_names_a_pickle_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    names = safetensors.torch.load_file(model / "model.safetensors").keys()
    (model / "model.safetensors").unlink()
    plant_pickle(model / "evil.bin", tmp_path / "executed")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "evil.bin")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    FAULTS["a planted pickle or custom code"] += 1
    with pytest.raises(finetune.FineTuningError, match=r"lacks evil\.bin as safetensors"):
        load(model)
    assert not (tmp_path / "executed").exists()


def plant_code(model: Path, evidence: Path, **settings: object) -> None:
    """Give a model folder Python code that leaves evidence when it is imported."""
    code = f"import os\nos.mkdir({str(evidence)!r})\nclass Evil: pass\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (model / name).write_text(code)
    added = {
        "config.json": {
            "AutoConfig": "configuration_evil.Evil",
            "AutoModelForCausalLM": "modeling_evil.Evil",
        },
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_evil.Evil", None]},
    }
    for name, auto_map in added.items():
        content = json.loads((model / name).read_text())
        if name == "config.json":
            content.update(settings)
        (model / name).write_text(json.dumps({**content, "auto_map": auto_map}))


def test_a_base_model_that_needs_its_own_code_is_refused_and_the_code_never_run(
    tmp_path: Path, tiny_model: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    plant_code(model, tmp_path / "executed", model_type="evil", architectures=["Evil"])
    FAULTS["a planted pickle or custom code"] += 1
    check = finetune.check_model(finetune.FineTuningConfig(model_name=str(model)))
    assert check.outcome == "failed"
    assert "Python code of its own (auto_map in config.json), which is never run" in check.detail
    with pytest.raises(finetune.FineTuningError, match="never run"):
        load(model)
    assert not (tmp_path / "executed").exists()


def test_code_beside_a_model_that_transformers_knows_is_not_run(
    tmp_path: Path, tiny_model: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    plant_code(model, tmp_path / "executed")
    FAULTS["a planted pickle or custom code"] += 1
    assert type(load(model)).__name__ == "LlamaForCausalLM"
    assert finetune.load_tokenizer(str(model)).eos_token == "</s>"
    assert finetune.measure_model(finetune.FineTuningConfig(model_name=str(model))).layers > 0
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("whole", [True, False], ids=["beside safetensors", "alone"])
def test_an_adapter_in_a_pickle_is_never_loaded(calm: Calm, tmp_path: Path, whole: bool) -> None:
    adapter = Path(shutil.copytree(calm.folder, tmp_path / "adapter"))
    plant_pickle(adapter / "adapter_model.bin", tmp_path / "executed")
    plant_pickle(adapter / "training_args.bin", tmp_path / "executed")
    config = finetune.FineTuningConfig(output_dir=str(adapter), device="cpu")
    FAULTS["a planted pickle or custom code"] += 1
    if whole:
        finetune.load_served_model(config)
        finetune.open_export_source(config)
    else:
        (adapter / "adapter_model.safetensors").unlink()
        for use in (finetune.load_served_model, finetune.open_export_source):
            with pytest.raises(finetune.FineTuningError, match="is missing") as refused:
                use(config)
            assert "never from pickles" in refused.value.hint
    assert not (tmp_path / "executed").exists()
