"""Start the program again and again in forked children of one process that has its imports done.

    python tests/fault_runner.py      reads one JSON object a line from stdin, answers in lines

A request names the child's `arguments`, `folder` (where it runs and where its `output` goes) and
`faults`, a list of [name, argument] out of FAULTS below. The answer is the child's process id and,
when it has ended, its exit code (negative: the signal that killed it).

Importing PyTorch and TRL takes longer than the tests' trainings; a fork takes milliseconds. What
runs in the child is the real `main` with real command-line arguments.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import unified_finetune as program


def import_everything() -> None:
    """Import what a training imports; no tensor is computed, so that forking stays safe."""
    import datasets  # noqa: F401
    import dotenv  # noqa: F401
    import psutil  # noqa: F401
    import tqdm  # noqa: F401
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    program.trainer_class()
    program.callback_class()


# --- faults that the child brings upon itself


def around_calls(stage: "tuple[str, ...]", event: "Callable[[], None]") -> None:
    """Call `event` before every fsync and rename (and folder removal) inside these functions."""
    inside = []

    def watch(function: "Callable[..., Any]") -> "Callable[..., Any]":
        def watched(*args: Any, **kwargs: Any) -> Any:
            inside.append(1)
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()
                if not inside:
                    event()  # all done, and nothing has been done after it

        return watched

    def precede(function: "Callable[..., Any]") -> "Callable[..., Any]":
        def preceded(*args: Any, **kwargs: Any) -> Any:
            if inside:
                event()
            return function(*args, **kwargs)

        return preceded

    for name in stage:
        setattr(program, name, watch(getattr(program, name)))
    for name in ("fsync", "rename", "replace", "rmdir"):
        setattr(os, name, precede(getattr(os, name)))


def kill_at_call(stage: "tuple[str, ...]", number: int) -> None:
    """Die at the given event, counted from 1."""
    left = [number]

    def event() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    around_calls(stage, event)


def kill_in_publish(number: int) -> None:
    """Die at an fsync or rename of a checkpoint's publication or removal."""
    kill_at_call(("publish_folder", "prune_checkpoints"), number)


def kill_in_save(number: int) -> None:
    """Die at an fsync or rename of the final save."""
    kill_at_call(("move_into_place",), number)


def full_disk(function: str) -> None:
    """Let the disk be full once this function of the program is reached."""
    real = getattr(program, function)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def filled(*args: Any, **kwargs: Any) -> Any:
        os.fsync = refuse
        return real(*args, **kwargs)

    setattr(program, function, filled)


def fill_disk(function: str) -> None:
    """Fill the folder's disk to the last byte when this function of the program is reached."""
    real = getattr(program, function)

    def filled(*args: Any, **kwargs: Any) -> Any:
        with open("filler", "ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * size)
        return real(*args, **kwargs)

    setattr(program, function, filled)


def hang_in_pass(number: int) -> None:
    """Let a forward pass never come back, as a stuck device does."""
    real, left = program.pass_loss, [number]

    def stuck(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            sys.stderr.write("stuck\n")
            sys.stderr.flush()
        while left[0] <= 0:
            time.sleep(0.05)
        return real(*args)

    program.pass_loss = stuck


FAULTS: "dict[str, Callable[[Any], None]]" = {
    f.__name__: f for f in (kill_in_publish, kill_in_save, full_disk, fill_disk, hang_in_pass)
}


def run_child(request: "dict[str, Any]") -> int:
    """Be the program, with its output in a file."""
    os.chdir(request["folder"])
    with open(os.devnull) as null, open(request["output"], "wb") as output:
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source.fileno(), target)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, argument in request["faults"]:
        FAULTS[name](argument)
    code = program.main(request["arguments"])
    sys.stdout.flush()
    return code


def serve() -> None:
    """Answer requests until stdin ends."""
    import_everything()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                code = run_child(json.loads(line))
            except BaseException:  # noqa: BLE001 - the child must not become a second server
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
