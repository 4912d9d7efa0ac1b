"""Run the program again and again in forked children of one process that has its imports done.

    python tests/fault_runner.py MODEL    reads one JSON object a line, answers with a process id

A request names the `arguments` of the real `main`, the `folder` to run in (results go to `out`),
the file of its `console` (the exit code appears beside it) and `faults`: Python code (`do`) that
breaks the world, never a function of the program. It runs at the `number`th of the events named in
`event` since optimizer step `step`. With `keep`, a folder, it strikes at every one of them, each
time in a fork of the run; what the fork says and leaves is kept there. Events: start; mkdir, open
(for writing), fsync, rename, replace, unlink, rmdir in the output folder; train, evaluate, answer
(a forward pass with and without gradients, and of one token only); step (of an optimizer).
"""

import builtins
import gc
import hashlib
import importlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class World:
    """Stand between a run and its disk and PyTorch; count what happens, and let faults strike."""

    errno, nan = 0, 0  # of the disk; passes to spoil

    def __init__(self, out: Path, faults: "list[dict[str, Any]]") -> None:
        from torch.nn import functional
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.out, self.faults, self.steps, self.events = out, faults, 0, 0
        self.flushed: dict[int, int] = {}  # inode: the time of the change that was flushed
        for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, self.watch(name, getattr(os, name)))
        builtins.open = io.open = self.watch("open", io.open)
        self.embed, functional.embedding = functional.embedding, self.forward_pass
        register_optimizer_step_post_hook(self.step_done)

    def watch(self, kind: str, real: "Callable[..., Any]") -> "Callable[..., Any]":
        """Let a call that changes the output folder be an event."""

        def watched(path: Any, *args: Any, **kwargs: Any) -> Any:
            handle = path if isinstance(path, int) else kwargs.get("dir_fd")
            full = os.getcwd() if handle is None else os.readlink(f"/proc/self/fd/{handle}")
            if not isinstance(path, int):
                full = os.path.join(full, os.fsdecode(path))
            reads = kind == "open" and not set([*args, kwargs.get("mode", "r")][0]) & set("wax+")
            reads = reads or (kind == "mkdir" and os.path.isdir(full))
            if reads or not f"{full}/".startswith(f"{self.out}/"):
                return real(path, *args, **kwargs)
            self.event(kind)
            if self.errno:
                raise OSError(self.errno, os.strerror(self.errno))
            result = real(path, *args, **kwargs)
            if kind == "fsync":
                self.flushed[os.fstat(path).st_ino] = os.fstat(path).st_mtime_ns
            return result

        return watched

    def forward_pass(self, ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Look tokens up, with which every forward pass begins."""
        import torch

        one = ids.shape[-1] == 1
        self.event("train" if torch.is_grad_enabled() else "answer" if one else "evaluate")
        self.nan -= 1
        found = self.embed(ids, *args, **kwargs)
        return found if self.nan < 0 else found * float("nan")

    def step_done(self, optimizer: Any, *_: object) -> None:
        """Count an optimizer step."""
        self.steps, self.optimizer = self.steps + 1, optimizer
        self.event("step")

    def event(self, kind: str) -> None:
        """Let a fault strike where its moment has come."""
        self.events += 1
        for fault in list(self.faults):
            if kind in fault["event"].split() and self.steps >= fault.get("step", 0):
                fault["seen"] = fault.get("seen", 0) + 1
                if "keep" in fault:
                    self.branch(fault, kind)
                elif fault["seen"] == fault.get("number", 1):
                    self.strike(fault["do"])

    def strike(self, code: str) -> None:
        """Do what a fault does."""
        names = "ctypes os resource shutil signal subprocess sys threading time torch"
        exec(code, {"world": self} | {n: importlib.import_module(n) for n in names.split()})

    def branch(self, fault: "dict[str, Any]", kind: str) -> None:
        """Let a fault strike in a fork; keep its answer and the folder that it leaves."""
        faults, self.faults, keep = self.faults, [], Path(fault["keep"])
        shutil.rmtree(keep / "before", ignore_errors=True)
        shutil.copytree(self.out, keep / "before") if self.out.exists() else None
        changes = [(path, path.stat().st_mtime_ns) for path in self.out.rglob("*")]
        for action in fault["do"]:
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:  # without the thread that this would wake
                signal.set_wakeup_fd(-1)
                for handle in (1, 2):
                    os.dup2(writer, handle)
                self.strike(action)
                return
            os.close(writer)
            with open(reader, "rb") as stream:
                console = stream.read().decode()
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            left = [self.shelve(keep)] + [self.shelve(keep, power_cut=True)] * (code == -9)
            record = {"event": kind, "do": action, "code": code, "console": console, "left": left}
            with (keep / "records.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            if changes != [(path, path.stat().st_mtime_ns) for path in self.out.rglob("*")]:
                shutil.rmtree(self.out, ignore_errors=True)
                if (keep / "before").exists():
                    shutil.copytree(keep / "before", self.out)
        self.faults = faults

    def shelve(self, keep: Path, *, power_cut: bool = False) -> str:
        """Copy the output folder, as it is or as a power cut leaves it; once for each state.

        What hidden folders hold makes no difference: it is only ever cleared away.
        """
        copy, digest = keep / "copy", hashlib.sha256()
        shutil.rmtree(copy, ignore_errors=True)
        (copy / "out").mkdir(parents=True)
        for path in sorted(self.out.rglob("*")):
            twin, facts = copy / "out" / path.relative_to(self.out), path.stat()
            name = str(path.relative_to(self.out))
            if path.is_dir():
                twin.mkdir()
            elif power_cut and self.flushed.get(facts.st_ino) != facts.st_mtime_ns:
                twin.touch()
            else:
                shutil.copy2(path, twin)
            if not (name.startswith(".") and "/" in name):
                said = twin.read_bytes() if twin.is_file() and name[0] != "." else ""
                digest.update(f"{name} {said!r}".encode())
        if not (keep / digest.hexdigest()).exists():
            copy.rename(keep / digest.hexdigest())
        return digest.hexdigest()


def run_child(request: "dict[str, Any]") -> int:
    """Be the program, with its output in a file."""
    import tqdm

    import unified_finetune as program

    os.chdir(request["folder"])
    with open(os.devnull) as null, open(request["console"], "wb") as output:
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source.fileno(), target)
    sys.stdin = open(0)  # noqa: SIM115 - the server has read from the other one
    tqdm.tqdm.set_lock(threading.RLock())  # tqdm's own is shared: a killed child may hold it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    World(Path(request["folder"]) / "out", request["faults"]).event("start")
    code = program.main(request["arguments"])
    sys.stdout.flush()
    return code


def warm_up(model: str) -> None:
    """Let the libraries do for all children what each of them would do first."""
    os.environ["MPLBACKEND"] = "agg"  # as the program does before it imports matplotlib
    modules = "unified_finetune datasets dotenv psutil tqdm jinja2 peft boto3 matplotlib.figure trl"
    for name in modules.split():
        importlib.import_module(name)
    from matplotlib.figure import Figure
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import SFTTrainer  # noqa: F401

    Figure().add_subplot().figure.savefig(io.BytesIO(), format="svg")
    AutoModelForCausalLM.from_pretrained(model)
    PreTrainedTokenizerFast.from_pretrained(model)
    gc.collect()
    gc.freeze()


def serve() -> None:
    """Answer requests until stdin ends; runs may go on beside each other."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork():
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        request, child = json.loads(line), os.fork()
        if child == 0:
            code = 99
            try:
                code = run_child(request)
            except BaseException:  # noqa: BLE001 - the child must not become a second server
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        Path(request["console"] + ".part").write_text(str(code))
        Path(request["console"] + ".part").rename(request["console"] + ".code")
        os._exit(0)


if __name__ == "__main__":
    warm_up(sys.argv[1])
    serve()
