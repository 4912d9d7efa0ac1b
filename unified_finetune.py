#!/usr/bin/env python3
"""Turn instruction data in a Cloudflare R2 bucket into a tested LoRA adapter for TinyLlama.

Five stages, always in this order:
  1 preflight   check this machine, the settings and the access, and choose the device
  2 download    fetch the newest data set from R2, verified, into the cache
  3 prepare     validate, score, split and tokenize the rows
  4 train       train the LoRA adapter, resuming where an earlier run stopped
  5 save        write the adapter, its metrics and its report

Commands:
  python unified_finetune.py          all five stages (the same as: train)
  python unified_finetune.py check    stage 1 alone: everything wrong, each with its remedy
  python unified_finetune.py data     stages 1-3: quality report, token statistics, the plan
  python unified_finetune.py chat     talk to the trained adapter
  python unified_finetune.py export   write it as a merged model folder or as a GGUF file

Exit codes: 0 success, 2 bad flags or config, 11-15 the stage that failed (11 preflight, 12
download, 13 prepare, 14 train, 15 save), 16 chat or export, 130 Ctrl-C, 143 SIGTERM, 1 unexpected.
"""

import sys

MINIMUM_PYTHON = (3, 11)
if sys.version_info < MINIMUM_PYTHON:
    # The whole file must parse on old Pythons (3.6 and later) for this line to be reached.
    sys.exit(
        "unified_finetune.py needs Python %d.%d or newer, and this is Python %d.%d (%s). "
        "Run ./run_finetuning.sh, which finds a fitting Python or says how to get one."
        % (MINIMUM_PYTHON + sys.version_info[:2] + (sys.executable,))
    )

import argparse
import codecs
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import difflib
import email.utils
import errno
import faulthandler
import functools
import hashlib
import heapq
import html
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import pickle
import platform
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import tempfile
import threading
import time
import typing
import unicodedata
import urllib.parse
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, TextIO, TypeVar

if TYPE_CHECKING:
    import datasets
    import gguf
    import numpy
    import torch
    from accelerate.data_loader import SeedableRandomSampler
    from botocore.exceptions import ClientError
    from datasets.arrow_writer import ArrowWriter
    from numpy.typing import NDArray
    from peft import LoraConfig, PeftModel
    from peft.tuners import lora
    from tqdm import tqdm
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaModel,
        PreTrainedModel,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from transformers.generation.streamers import BaseStreamer
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from trl import SFTConfig, SFTTrainer

    IntArray = NDArray[Any]
    FloatArray = NDArray[Any]

__version__ = "1.0.0"

PROGRAM_FOLDER = Path(__file__).resolve().parent
log = logging.getLogger("unified_finetune")


# ======================================================================================
# Configuration: edit a default here, or pass the field as a flag, or use --config FILE
# ======================================================================================


def option(default: Any, help_text: str, **limits: Any) -> Any:
    """Declare one setting: its default, its help text and the limits its value must respect.

    Limits: `at_least`, `at_most`, `above`, `below` (numbers), `choices` (strings),
    `switch=True` (a property of this one call, not of the run: never saved),
    `verbatim=True` (any text is a value, the empty one and "none" too),
    `sentences=True` (a list of texts, each with its spaces; it may be empty).
    """
    return field(default=default, metadata={"help": help_text, **limits})


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig:
    """Hold every setting of a run; no secret is ever one of them."""

    # fmt: off
    # ruff: disable[E501]
    # --- the model and its adapter
    model_name: str = option("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "base model: a Hugging Face id or a local folder")
    max_seq_length: int = option(1024, "longest example, in tokens", at_least=8)
    lora_r: int = option(32, "rank of the LoRA matrices", at_least=1)
    lora_alpha: int = option(64, "LoRA scale: updates are multiplied by lora_alpha / lora_r", at_least=1)
    lora_dropout: float = option(0.05, "dropout on the adapter's input", at_least=0, below=1)
    target_modules: tuple[str, ...] = option(("q_proj", "k_proj", "v_proj", "o_proj"), "linear layers that get an adapter")
    # --- the training
    num_train_epochs: float = option(3, "passes over the training examples", above=0)
    per_device_train_batch_size: int = option(2, "examples of max_seq_length that one forward pass may hold", at_least=1)
    gradient_accumulation_steps: int = option(8, "times that, examples per optimizer step (2 x 8 = 16, the effective batch)", at_least=1)
    learning_rate: float = option(2e-5, "peak learning rate", at_least=0)
    weight_decay: float = option(0.01, "AdamW weight decay", at_least=0)
    warmup_steps: int = option(50, "optimizer steps until the peak learning rate", at_least=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm (0: never)", at_least=0)
    optim: str = option("adamw_torch", "optimizer", choices=("adamw_torch", "adamw_torch_fused", "adafactor", "sgd"))
    lr_scheduler_type: str = option("cosine", "learning-rate schedule", choices=("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"))
    fp16: bool = option(False, "hold the frozen base in fp16 (NVIDIA GPUs only)")
    bf16: bool = option(False, "hold the frozen base in bf16 (half the memory; faster where the chip has bf16)")
    float32_matmul_precision: Literal["highest", "high", "medium"] = option("highest", "products of float32: high allows TF32 on NVIDIA GPUs, medium bf16 on processors that have it")
    dataloader_num_workers: int = option(0, "extra processes that load batches", at_least=0)
    logging_steps: int = option(10, "log the loss every so many steps", at_least=1)
    eval_steps: int = option(50, "evaluate every so many steps", at_least=1)
    save_steps: int = option(100, "write a checkpoint every so many steps", at_least=1)
    save_total_limit: int = option(3, "checkpoints kept", at_least=1)
    seed: int = option(42, "seed of the split, the shuffling, the adapter and the dropout", at_least=0, at_most=2**32 - 1)
    early_stopping_patience: "int | None" = option(None, "stop after so many evaluations without a better eval loss", at_least=1)
    sample_prompts: tuple[str, ...] = option((), "questions of your own to answer before and after, beside held-out ones", sentences=True)
    max_eval_examples: "int | None" = option(None, "examples in the evaluations during training (the final one is complete)", at_least=1)
    gradient_checkpointing: Literal["auto", "on", "off"] = option("auto", "recompute activations to save memory: auto uses it only when memory asks for it")
    # --- the data
    train_split: float = option(0.9, "share of the valid rows to train on", above=0, below=1)
    eval_split: float = option(0.1, "share of the valid rows to evaluate on", above=0, below=1)
    overlong: Literal["drop", "truncate"] = option("drop", "what happens to rows of more than max_seq_length tokens")
    plausibility_rules: "str | None" = option(None, "JSON file with rules for doubtful numbers, instead of the built-in ones")
    min_data_quality_score: float = option(0.85, "least share of valid rows to go on without asking", at_least=0, at_most=1)
    system_prompt: "str | None" = option(None, "system message put before every example and every chat")
    r2_bucket_name: str = option("collegeadvisor-finetuning-data", "bucket in Cloudflare R2 (environment: R2_BUCKET_NAME)")
    r2_data_prefix: str = option("multi_source/training_datasets/", "only objects whose key starts so are considered")
    dataset_name: "str | None" = option(None, "key or file name of the object to take, instead of the automatic choice")
    data_path: "str | None" = option(None, "a local .json or .jsonl file, used instead of R2")
    # --- where things are and how the program runs
    output_dir: str = option("collegeadvisor_unified_model", "folder for the adapter, its report and its checkpoints")
    cache_dir: str = option("cache/training_data", "folder for verified downloads")
    log_dir: str = option("logs/finetuning", "folder for the log files, one per run")
    device: Literal["auto", "mps", "cuda", "cpu"] = option("auto", "where to train; auto takes CUDA, then MPS, then the CPU")
    resume: str = option("auto", "auto: go on from this run's last checkpoint; never: start anew; or a checkpoint's PATH")
    report_to: str = option("none", "also send metrics to an experiment tracker", choices=("none", "tensorboard", "wandb", "trackio"))
    min_disk_gb: float = option(10, "least free disk space, in GB, at every place that is written to", at_least=0)
    yes: bool = option(False, "answer yes to every question", switch=True)
    overwrite: bool = option(False, "replace what another run left in output_dir", switch=True)
    verbose: bool = option(False, "show the log's details on the console too", switch=True)
    # ruff: enable[E501]
    # fmt: on


def config_fields(record: type = FineTuningConfig) -> "dict[str, dataclasses.Field[Any]]":
    """Return the fields of the configuration, or of a command's options, by name."""
    return {f.name: f for f in dataclasses.fields(record)}


def coerce_value(name: str, value: object, record: type = FineTuningConfig) -> object:
    """Return `value` (text from a flag, or a JSON/YAML value) as the type of the record's field.

    Raises:
        ValueError: with what was expected, when the value has another type.
    """
    hint = typing.get_type_hints(record)[name]
    choices = [a for a in typing.get_args(hint) if a is not type(None)]
    if config_fields(record)[name].metadata.get("verbatim"):
        hint = str
    elif type(None) in typing.get_args(hint):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        hint = choices[0]
    if config_fields(record)[name].metadata.get("sentences"):
        items = [value] if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and all(
            isinstance(i, str) and i.strip() for i in items
        ):
            return tuple(items)
        raise ValueError("must be a list of texts")
    if typing.get_origin(hint) is tuple:
        items = value.replace(",", " ").split() if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and items and all(isinstance(i, str) for i in items):
            return tuple(items)
        raise ValueError("must be a list of names")
    if typing.get_origin(hint) is Literal:
        if isinstance(value, bool):  # YAML reads a bare on/off as a truth value
            value = "on" if value else "off"
        if value in typing.get_args(hint):
            return value
        raise ValueError("must be one of " + ", ".join(typing.get_args(hint)))
    return coerce_scalar(hint, value)


def coerce_scalar(kind: type, value: object) -> object:
    """Return `value` as a bool, int, float or str; raise ValueError where that would change it."""
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "on": True}
        words.update({"false": False, "no": False, "0": False, "off": False})
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise ValueError("must be true or false")
    if kind is str:
        if isinstance(value, str) and "\0" not in value:
            return value
        raise ValueError("must be text")
    if not isinstance(value, bool) and isinstance(value, (int, float, str)):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
            if kind is int and number == int(number):
                return (
                    int(value)
                    if isinstance(value, (int, str)) and "e" not in str(value).lower()
                    else int(number)
                )
            if kind is float and number - number == 0:  # neither infinite nor NaN
                return int(number) if number == int(number) and isinstance(value, int) else number
    raise ValueError("must be a whole number" if kind is int else "must be a number")


def check_limits(name: str, value: object, record: type = FineTuningConfig) -> Iterator[str]:
    """Yield what is wrong with a value of the right type, going by the field's declared limits."""
    limits = config_fields(record)[name].metadata
    if "choices" in limits and value not in limits["choices"]:
        near = difflib.get_close_matches(str(value), limits["choices"], 1)
        yield "must be one of {}{}".format(
            ", ".join(limits["choices"]),
            f" (did you mean {near[0]}?)" if near else "",
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if "at_least" in limits and value < limits["at_least"]:
            yield "must be at least {}".format(limits["at_least"])
        if "above" in limits and value <= limits["above"]:
            yield "must be more than {}".format(limits["above"])
        if "at_most" in limits and value > limits["at_most"]:
            yield "must be at most {}".format(limits["at_most"])
        if "below" in limits and value >= limits["below"]:
            yield "must be less than {}".format(limits["below"])


def check_combinations(values: "dict[str, Any]") -> Iterator[str]:
    """Yield what is wrong with settings that are fine one by one."""
    if values["train_split"] + values["eval_split"] > 1 + 1e-9:
        yield "train_split {} and eval_split {} add up to more than 1".format(
            values["train_split"],
            values["eval_split"],
        )
    if values["fp16"] and values["bf16"]:
        yield "fp16 and bf16 exclude each other"
    if values["fp16"] and values["device"] in ("cpu", "mps"):
        yield "fp16 works on NVIDIA GPUs only; leave it off for device {}".format(values["device"])
    for name in ("model_name", "output_dir", "cache_dir", "log_dir", "r2_bucket_name"):
        if not values[name].strip():
            yield f"{name} must not be empty"


@dataclass(frozen=True)
class Setting:
    """Hold a value as it was given, and the place it came from ("--seed", "R2_BUCKET_NAME")."""

    name: str
    value: object
    origin: str


def build_config(settings: Sequence[Setting], problems: Sequence[str] = ()) -> FineTuningConfig:
    """Build the configuration from settings, later ones winning, or tell every problem."""
    wrong = list(problems)
    values: dict[str, Any] = {name: f.default for name, f in config_fields().items()}
    for setting in settings:
        if setting.name not in values:
            near = difflib.get_close_matches(setting.name, values, 1)
            wrong.append(
                "{}: there is no setting {!r}{}".format(
                    setting.origin, setting.name, f", did you mean {near[0]!r}?" if near else ""
                )
            )
            continue
        try:
            values[setting.name] = coerce_value(setting.name, setting.value)
        except ValueError as error:
            wrong.append(f"{setting.origin}: {setting.name} {error}, not {setting.value!r}")
            continue
    origins = {s.name: s.origin for s in settings}
    for name, value in values.items():
        wrong += [
            "{}: {} {}, not {!r}".format(origins.get(name, "default"), name, what, value)
            for what in check_limits(name, value)
        ]
    wrong += check_combinations(values)
    if wrong:
        raise UsageError(
            f"{len(wrong)} problem{'s' * (len(wrong) > 1)} with the settings:\n"
            + "\n".join("  - " + w for w in wrong),
            hint="python unified_finetune.py --help lists every setting with its meaning.",
        )
    return FineTuningConfig(**values)


def parse_yaml(text: str, path: Path) -> object:
    """Return the content of a YAML text."""
    try:
        import yaml
    except ImportError as error:
        raise UsageError(
            f"--config {path} is YAML, and the package PyYAML is missing.",
            hint="pip install PyYAML, or write the file as JSON.",
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not valid YAML: {error}") from error


def read_config_file(path: Path) -> list[Setting]:
    """Read settings from a JSON or YAML file, such as an earlier training_config.json."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--config {path} cannot be read: {error}", hint="Check the path."
        ) from error
    if path.suffix.lower() in (".yaml", ".yml"):
        content = parse_yaml(text, path)
    else:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--config {path} is not valid JSON: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} must hold one object of settings.")
    # training_config.json carries facts about its run beside the settings.
    return [Setting(str(k), v, str(path)) for k, v in content.items() if k != "provenance"]


def saved_settings(config: FineTuningConfig) -> "dict[str, Any]":
    """Return the settings that describe the run (not this one call), as JSON values."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
        if not config_fields()[name].metadata.get("switch")
    }


# ======================================================================================
# Errors, logging, progress, and questions to the user
# ======================================================================================


class FineTuningError(Exception):
    """Say what happened (`message`) and what to do (`hint`), in words a user can act on."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(FineTuningError):
    """Refuse flags or a configuration."""

    exit_code = 2


class Terminated(BaseException):
    """Unwind the program on SIGTERM, as KeyboardInterrupt does on Ctrl-C."""


stop_signal = 0  # SIGINT or SIGTERM, once it has arrived


def stop_if_asked() -> None:
    """Raise what the signal that arrived stands for."""
    if stop_signal:
        raise KeyboardInterrupt if stop_signal == signal.SIGINT else Terminated


class SecretFilter(logging.Filter):
    """Replace known secrets in every record, in its arguments and in its traceback."""

    secrets: "set[str]" = set()  # noqa: RUF012 - one set for all handlers

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record in place and let it pass."""
        if self.secrets:
            if record.exc_info and not record.exc_text:
                record.exc_text = logging.Formatter().formatException(record.exc_info)
            record.msg, record.args = hide_secrets(record.getMessage()), ()
            record.exc_text = hide_secrets(record.exc_text) if record.exc_text else None
        return True


def hide_secrets(text: str) -> str:
    """Return `text` with every registered secret replaced by ***."""
    for secret in SecretFilter.secrets:
        text = text.replace(secret, "***")
    return text


def start_logging(config: FineTuningConfig) -> Path:
    """Send messages to the console (stderr) and everything, with timestamps, to a new log file."""
    root = logging.getLogger()
    root.setLevel(logging.DEBUG)
    console = ConsoleHandler(sys.stderr)
    console.setLevel(logging.DEBUG if config.verbose else logging.INFO)
    console.setFormatter(logging.Formatter("%(message)s"))
    if not config.verbose:  # what libraries say goes to the file
        console.addFilter(logging.Filter("unified_finetune"))
    if not is_main_process():
        console.setLevel(logging.ERROR)
    path = open_log_file(Path(config.log_dir))
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    for handler in (console, to_file):
        handler.addFilter(SecretFilter())
        root.addHandler(handler)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # on a full disk, each record would put a traceback on stderr
    for noisy in ("botocore", "urllib3", "filelock", "fsspec", "matplotlib", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.INFO)
    log.info("unified_finetune %s, log file %s", __version__, path)
    return path


def open_log_file(folder: Path) -> Path:
    """Create unified_finetune_YYYYMMDD_HHMMSS.log in `folder`, with a number if that is taken."""
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")  # local time: a user reads it
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(1000):
            path = folder / f"unified_finetune_{stamp}{f'_{number}' if number else ''}.log"
            with contextlib.suppress(FileExistsError):
                path.touch(exist_ok=False)
                return path
    except OSError as error:
        raise UsageError(
            f"The log folder {folder} cannot be written: {error}",
            hint="Choose another one with --log_dir FOLDER.",
        ) from error
    raise FineTuningError(f"A thousand runs started in one second in {folder}.")


def quiet_transformers() -> None:
    """Send what transformers says to the log file, and switch its bars off."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()


def quiet_libraries() -> None:
    """Do the same for all libraries of the training."""
    import datasets

    quiet_transformers()
    datasets.disable_progress_bars()


def ask(question: str, config: FineTuningConfig) -> bool:
    """Ask a yes/no question on a terminal; without one, only --yes agrees."""
    if config.yes:
        log.info("%s  yes (--yes)", question)
        return True
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(question + " [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


class ConsoleHandler(logging.StreamHandler[TextIO]):
    """Write records to stderr without tearing a progress bar that stands there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Take the bars away, write the record, and put them back."""
        if "tqdm" not in sys.modules:  # no bar without it, and --help must not import it
            super().emit(record)
            return
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):
            super().emit(record)


PROGRESS_LOG_SECONDS = 5.0


@dataclass
class Progress:
    """Count the work done in a long step and show it; made by `progress_bar`."""

    total: int
    unit: str
    description: str
    done: int
    bar: "tqdm[Any] | None"

    def __post_init__(self) -> None:
        self.begun_at = self.done
        self.begun = self.logged = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units as done; `note` (such as the loss) stands beside the bar."""
        self.move_to(self.done + count, note)

    def move_to(self, done: int, note: str = "") -> None:
        """Set the units done; a step that starts over moves back."""
        now = time.monotonic()
        if done < self.done:
            self.begun_at, self.begun = done, now
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            if done < self.done:
                self.bar.initial = 0  # else the rate is negative for a while
                self.bar.reset()
            self.bar.update(done - self.bar.n)
        self.done = done
        if self.bar is None and is_main_process() and now - self.logged >= PROGRESS_LOG_SECONDS:
            self.logged = now
            log.info("  %s", self.describe(note))

    def describe(self, note: str = "") -> str:
        """Return one line: share, amounts, rate and the time left."""
        rate = (self.done - self.begun_at) / max(time.monotonic() - self.begun, 1e-9)
        if self.unit == "B":
            amounts = (
                f"{human_bytes(self.done)} of {human_bytes(self.total)}, {human_bytes(rate)}/s"
            )
        else:
            amounts = f"{self.done} of {self.total} {self.unit}, {rate:.3g} {self.unit}/s"
        parts = [f"{self.description}: {100 * self.done // max(self.total, 1)} %", amounts]
        if rate > 0 and self.done < self.total:
            parts.append(human_seconds((self.total - self.done) / rate) + " left")
        return ", ".join(parts + [note] * bool(note))


@contextlib.contextmanager
def progress_bar(total: int, unit: str, description: str, initial: int = 0) -> "Iterator[Progress]":
    """Show a long step's progress: a bar with an ETA in a terminal, else a line every few seconds.

    `unit` is a plural ("rows", "steps") or "B" for bytes; `initial` is what was done before.
    """
    bar = None
    if is_main_process() and sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(
            total=total,
            initial=initial,
            unit="B" if unit == "B" else " " + unit,
            unit_scale=unit == "B",
            desc="  " + description,
            file=sys.stderr,
            leave=False,
            dynamic_ncols=True,
        )
    try:
        yield Progress(total, unit, description, initial, bar)
    finally:
        if bar is not None:
            bar.close()


def is_main_process() -> bool:
    """Tell whether this process prints, downloads and saves (with several, one does)."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    """Return how many processes train together (accelerate launch)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def once_for_all(work: "Callable[[], T]") -> "T":
    """Do something in the main process only, and give its result to all of them."""
    if process_count() == 1:
        return work()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState()
    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = work()
        except FineTuningError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return typing.cast("T", outcome[0])


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process through first, so that the others find what it left in the cache."""
    if process_count() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def program_command() -> str:
    """Return how to start the program from the current folder."""
    if Path(sys.prefix) == PROGRAM_FOLDER / "venv_finetune":
        path = os.path.relpath(PROGRAM_FOLDER / "run_finetuning.sh")
        return shlex.quote(path if "/" in path else f"./{path}")
    return shlex.join([Path(sys.executable).name, os.path.relpath(Path(__file__).resolve())])


def human_bytes(count: float) -> str:
    """Return a byte count as people write it: 999 B, 1.5 MB, 2.20 GB (powers of ten)."""
    for unit, size, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count:.0f} B"


def human_seconds(seconds: float) -> str:
    """Return a duration as people write it: 0.4 s, 41 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


# ======================================================================================
# The records that one stage hands to the next
# ======================================================================================


@dataclass(frozen=True)
class Check:
    """Hold the outcome of one preflight check."""

    name: str
    outcome: Literal["ok", "warning", "failed"]
    detail: str
    hint: str = ""


@dataclass(frozen=True)
class PreflightReport:
    """Hold every check and the device and dtype that were chosen ("cpu", "float32")."""

    checks: tuple[Check, ...]
    device: str
    dtype: str


@dataclass(frozen=True)
class DatasetFile:
    """Name the data set on disk: bytes that were verified, and where they came from."""

    path: Path
    size: int
    etag: "str | None"
    sha256: str
    source: str


@dataclass(frozen=True)
class QualityReport:
    """Hold what quality_report.json says about the data set."""

    total_examples: int
    valid_examples: int
    quality_score: float
    empty_instructions: int
    empty_outputs: int
    avg_instruction_length: float
    avg_output_length: float
    checks: "dict[str, int]"
    check_details: "dict[str, dict[str, Any]]"  # by check: count, action, meaning, rows, examples
    mean_score: float
    score_histogram: "tuple[int, ...]"  # rows with a score of 0.0-0.1, ..., 0.9-1.0
    worst_rows: "tuple[dict[str, Any], ...]"
    answer_tokens: int
    lost_answer_tokens: int  # by rows over max_seq_length
    longest_example: int  # tokens, before any is dropped or truncated
    dropped_examples: int
    truncated_examples: int
    rejected: "tuple[dict[str, Any], ...]"  # unusable: row (from 0), line, reason, detail
    dropped: "tuple[dict[str, Any], ...]"  # usable, but left out
    truncated: "tuple[dict[str, Any], ...]"


@dataclass(frozen=True)
class PreparedData:
    """Hold the tokenized examples.

    `train` and `eval` are datasets with the columns `row` (index in the file, from 0), `prompt`
    (rendered text up to where the answer starts), `answer` (text), `input_ids` (prompt, answer and
    end token; exactly one BOS) and `prompt_length` (tokens that carry no loss).
    """

    train: "datasets.Dataset"
    eval: "datasets.Dataset"
    tokenizer: "PreTrainedTokenizerFast"
    quality: QualityReport
    source: DatasetFile
    max_seq_length: int  # config.max_seq_length, or the model's positions where these are fewer
    truncated_examples: int
    dropped_examples: int


@dataclass(frozen=True)
class TrainResult:
    """Hold the trained model (the best adapter loaded), its metrics and its history."""

    model: "PeftModel"
    tokenizer: "PreTrainedTokenizerFast"
    metrics: "dict[str, Any]"
    history: "tuple[dict[str, float], ...]"
    budget: int  # tokens that a forward pass without gradients may hold


@dataclass(frozen=True)
class RunArtifacts:
    """Name what a run left behind."""

    adapter_dir: Path
    metrics: "dict[str, Any]"


# ======================================================================================
# Stage 1: preflight
# ======================================================================================

# Files of a base model that are ever read: weights as safetensors only, never pickles or code.
MODEL_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
TESTED_PACKAGES = "requirements-finetuning.txt"


@functools.cache
def base_model_folder(model_name: str) -> Path:
    """Return the local folder of a base model, downloading it from the hub where it is not cached.

    Everything that follows reads that folder, so that no library asks the hub again.
    """
    folder = Path(model_name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            try:
                folder = Path(
                    snapshot_download(model_name, allow_patterns=MODEL_FILES, local_files_only=True)
                )
                missing = missing_model_files(folder)
            except LocalEntryNotFoundError:
                missing = ["everything"]
            if missing:
                log.info("Fetching %s from the Hugging Face hub (once)", model_name)
                folder = Path(snapshot_download(model_name, allow_patterns=MODEL_FILES))
        except HFValidationError as error:
            raise FineTuningError(
                f"model_name {model_name!r} is neither a folder here nor a Hugging Face id.",
                hint="Give an id like TinyLlama/TinyLlama-1.1B-Chat-v1.0, or an existing folder.",
            ) from error
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
            raise FineTuningError(
                f"The base model {model_name} is not in the local cache and cannot be fetched "
                f"from the hub: {first_line(error)}",
                hint="Check the spelling and the network (HF_TOKEN for gated models), or give a "
                "local folder with --model_name.",
            ) from error
    missing = missing_model_files(folder)
    if missing:
        raise FineTuningError(
            f"The base model folder {folder} lacks {', '.join(missing)}.",
            hint="A base model is config.json, tokenizer.json (or tokenizer.model) and weights as "
            "safetensors; pickled weights (.bin, .pt) are never loaded.",
        )
    refuse_foreign_code(folder)
    return folder


def refuse_foreign_code(folder: Path) -> None:
    """Stop where a base model needs Python code from its own folder: no such code is ever run."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # whoever loads it says what is wrong
    if not isinstance(settings, dict) or "auto_map" not in settings:
        return
    from transformers import CONFIG_MAPPING

    if settings.get("model_type") in CONFIG_MAPPING:
        log.debug("%s brings code of its own; transformers' is used instead", folder)
        return
    raise FineTuningError(
        f"The base model in {folder} works only with Python code of its own (auto_map in "
        "config.json), which is never run.",
        hint="Choose a base model whose architecture transformers itself has, such as TinyLlama.",
    )


def missing_model_files(folder: Path) -> list[str]:
    """Name what a base model's folder lacks."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        missing.append("tokenizer.json")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with contextlib.suppress(ValueError, AttributeError):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            missing += sorted(s for s in shards if not (folder / s).is_file())
            # transformers would unpickle whatever the index names under another ending.
            return missing + [
                f"{s} as safetensors" for s in sorted(shards) if not s.endswith(".safetensors")
            ]
    if not list(folder.glob("*.safetensors")):
        missing.append("model.safetensors")
    return missing


# --- Memory: what a run of this model needs, from its config.json alone.


@dataclass(frozen=True)
class ModelSize:
    """Hold the numbers of a base model that memory and speed depend on."""

    parameters: int
    trainable: int
    layers: int
    hidden: int
    key_value: int
    feed_forward: int
    heads: int
    vocabulary: int
    context: int
    file_bytes: int


def measure_model(config: FineTuningConfig) -> ModelSize:
    """Count a base model's weights without loading them."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = base_model_folder(config.model_name)
    try:
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(shape, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise FineTuningError(
            f"{folder / 'config.json'} does not describe a causal language model: "
            f"{first_line(error)}",
            hint="Choose another base model with --model_name.",
        ) from error
    adapted = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in config.target_modules and isinstance(module, torch.nn.Linear)
    ]
    text = shape.get_text_config()
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(config.lora_r * (m.in_features + m.out_features) for m in adapted),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        key_value=head_size * (getattr(text, "num_key_value_heads", None) or heads),
        feed_forward=text.intermediate_size,
        heads=heads,
        vocabulary=text.vocab_size,
        context=text.max_position_embeddings,
        file_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    )


RUNTIME_BYTES = 550_000_000  # Python and its packages
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def estimate_memory(size: ModelSize, dtype: str, tokens: int, *, recompute: bool = False) -> int:
    """Estimate the bytes that training with passes of `tokens` tokens needs."""
    width = DTYPE_BYTES[dtype]
    # The adapter: weights, gradients, two Adam moments, and the best weights so far, all fp32.
    fixed = RUNTIME_BYTES + size.parameters * width + size.trainable * 4 * 5
    residual = 2 * size.hidden * 4  # RMSNorm saves its input in fp32, twice a layer
    attention = (3 * size.hidden + 2 * size.key_value) * width + 4 * size.hidden
    scores = size.heads * min(tokens, LONGEST_MATH_ROW) * width
    feed_forward = 3 * size.feed_forward * width
    per_layer = residual + attention + scores + feed_forward
    kept = size.hidden * width * size.layers + per_layer if recompute else per_layer * size.layers
    logits = 3 * HEAD_CHUNK * size.vocabulary * 4
    # Gradients on their way through one layer are as large as its feed-forward activations.
    return fixed + tokens * (kept + feed_forward) + logits


def estimate_loading(size: ModelSize, dtype: str) -> int:
    """Estimate the bytes in memory while the base model is read.

    The file's pages stand beside weights of another dtype; they are given up where memory is short.
    """
    weights = size.parameters * DTYPE_BYTES[dtype]
    other_dtype = abs(size.file_bytes - weights) > 0.1 * weights
    return RUNTIME_BYTES + weights + (size.file_bytes if other_dtype else 0)


def machine_memory(device: str) -> int:
    """Return the memory in bytes that the device has in all, not what is free at the moment."""
    import psutil
    import torch

    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().total


SMALLEST_BUDGET = 256  # tokens; smaller passes are slow


@dataclass(frozen=True)
class MemoryPlan:
    """Hold the tokens of a forward pass, whether to recompute activations, and the peak [bytes]."""

    budget: int
    recompute: bool
    peak: int
    reason: str


def plan_memory(
    config: FineTuningConfig, device: str, dtype: str, lengths: Sequence[int] = ()
) -> MemoryPlan:
    """Choose the tokens of a forward pass so that the run fits into the machine's memory.

    The user grants per_device_train_batch_size x max_seq_length tokens. Where that would take more
    than four fifths of the memory the machine has in all, the budget is halved, down to the longest
    example; then activations are recomputed. `lengths` are the training examples' tokens; without
    them passes count as full.
    """
    size, total = measure_model(config), machine_memory(device)
    granted = budget = config.per_device_train_batch_size * config.max_seq_length
    floor = max(SMALLEST_BUDGET, max(lengths, default=config.max_seq_length))
    recompute = config.gradient_checkpointing == "on"
    while True:
        tokens = largest_pass(lengths, effective_batch(config), budget, config.seed)
        need = estimate_memory(size, dtype, tokens, recompute=recompute)
        if need <= 0.8 * total:
            break
        if budget // 2 >= floor:
            budget //= 2
        elif config.gradient_checkpointing == "auto" and not recompute:
            recompute = True
        else:
            break
    peak = need if device == "cuda" else max(need, estimate_loading(size, dtype))
    reason = f"about {human_bytes(peak)} of this machine's {human_bytes(total)}"
    if budget < granted:
        reason += f" ({granted} were granted)"
    return MemoryPlan(budget, recompute, peak, reason)


def largest_pass(lengths: Sequence[int], batch: int, budget: int, seed: int) -> int:
    """Return the most tokens that a pass will have: shuffled batches, cut up as training does."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(lengths).tolist()
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    return max(
        (sum(b[i] for i in indices) for b in batches for indices in plan_passes(b, budget)),
        default=budget,
    )


def check_memory(config: FineTuningConfig, device: str, dtype: str) -> Check:
    """Compare what the run needs with what the machine has."""
    import psutil

    try:
        plan = plan_memory(config, device, dtype)
    except FineTuningError as error:
        return Check("memory", "failed", str(error), error.hint)
    total, free = machine_memory(device), psutil.virtual_memory().available
    detail = (
        f"{human_bytes(plan.peak)} needed at most, {human_bytes(total)} in all, "
        f"{human_bytes(free)} free now"
    )
    if plan.peak > total:
        hint = "Try --bf16 (half the memory), a smaller --max_seq_length, or --device cpu."
        return Check("memory", "warning", detail, hint)
    return Check("memory", "ok", detail)


def checkpoint_bytes(size: ModelSize) -> int:
    """Return what a checkpoint takes on the disk at most.

    The adapter, the best adapter so far and AdamW's two moments are all fp32; the rest is small.
    """
    return size.trainable * 4 * 4 + 1_000_000


def check_room(config: FineTuningConfig) -> Check:
    """Compare what the run will write to the output folder with the space that is free there."""
    output, size = Path(config.output_dir), measure_model(config)
    # One more than are kept: a checkpoint is written before the oldest is deleted.
    need = (config.save_total_limit + 1) * checkpoint_bytes(size) + size.trainable * 4
    there = sum(f.stat().st_size for c in list_checkpoints(output) for f in c.iterdir())
    free = shutil.disk_usage(existing_parent(output)).free
    detail = (
        f"{human_bytes(need)} needed for {config.save_total_limit} checkpoints and the adapter, "
        f"{human_bytes(free)} free"
    )
    if there:
        detail += f" and {human_bytes(there)} in the checkpoints there"
    if need > free + there:
        hint = "Free some space, choose another --output_dir, or keep fewer: --save_total_limit 1."
        return Check("checkpoints", "failed", detail, hint)
    return Check("checkpoints", "ok", detail)


SELF_TEST = "self-test"  # the command that the child process is started with
SELF_TEST_SECONDS = 180
SELF_TEST_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}


def self_test(device: str, dtype: str) -> "str | None":
    """Train a tiny Llama for two steps in a child process; return what is wrong, or None.

    A child, since a faulty device can hang or crash the process that asks it.
    """
    command = [sys.executable, str(Path(__file__).resolve()), SELF_TEST, device, dtype]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=SELF_TEST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"the self-test hung (no answer in {SELF_TEST_SECONDS} s)"
    if child.returncode:
        log.debug("Self-test: %s", child.stderr)
        reason = (child.stderr.strip().splitlines() or ["no message"])[-1]
        return f"the self-test crashed (exit code {child.returncode}: {reason})"
    try:
        losses = json.loads(child.stdout.strip().splitlines()[-1])
        pairs = list(zip(losses["reference"], losses["device"], strict=True))
        for reference, measured in pairs:
            # Written so that a NaN on either side is a difference, too.
            if not abs(measured - reference) <= SELF_TEST_TOLERANCE[dtype] * abs(reference):
                return f"the self-test gave {measured:.4f} where the CPU gives {reference:.4f}"
    except (ValueError, IndexError, KeyError, TypeError):
        pairs = []
    return None if pairs else "the self-test gave no answer"


def run_self_test(device: str, dtype: str) -> None:
    """Print the losses of two training steps on the device and, in float32, on the CPU (child)."""
    losses = {
        "reference": self_test_losses("cpu", "float32"),
        "device": self_test_losses(device, dtype),
    }
    sys.stdout.write(json.dumps(losses) + "\n")


def self_test_losses(device: str, dtype: str) -> "list[float]":
    """Return the losses before and after an AdamW step of a tiny Llama's adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    base = LlamaForCausalLM(shape)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "o_proj"]))
    install_engine(model)
    model.to(device)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    rows = torch.randint(1, 256, (5, 24), generator=torch.Generator().manual_seed(1)).tolist()
    examples: list[Example] = [
        {"input_ids": [1, 2, *row[: 24 - 3 * i]], "prompt_length": 6} for i, row in enumerate(rows)
    ]
    layout = lay_out(examples, device)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = pass_loss(model, layout) / len(layout.targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def cpu_has_bf16() -> bool:
    """Tell whether this processor multiplies bf16 matrices in hardware."""
    import torch

    if platform.machine().lower() in ("arm64", "aarch64"):
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def emulation_warning(device: str, dtype: str) -> "str | None":
    """Say where half precision is emulated, which is slower than fp32."""
    import torch

    if dtype == "bfloat16" and device == "cpu" and not cpu_has_bf16():
        return "this processor computes bf16 in software, several times slower than float32"
    if dtype == "bfloat16" and device == "cuda" and not torch.cuda.is_bf16_supported(False):
        return "this GPU computes bf16 in software"
    return None


def product_rate(device: str, dtype: str, precision: str = "highest") -> float:
    """Measure matrix products of TinyLlama's width, in GFLOP/s: the best of five."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    tokens, width = 256, 2048
    a = torch.ones(tokens, width, device=device, dtype=getattr(torch, dtype))
    b = torch.ones(width, width, device=device, dtype=getattr(torch, dtype))
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        torch.nn.functional.linear(a, b)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    torch.set_float32_matmul_precision(before)
    return 2 * tokens * width * width / best / 1e9


# --- The checks.


def check_python() -> Check:
    """Report the interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python", "ok", f"{version} ({sys.executable})")


def check_packages(config: FineTuningConfig) -> Check:
    """Compare the installed packages with the tested pins."""
    from importlib import metadata

    try:
        lines = (PROGRAM_FOLDER / TESTED_PACKAGES).read_text(encoding="utf-8").splitlines()
    except OSError:
        return Check(
            "packages",
            "warning",
            f"{TESTED_PACKAGES} is missing, so versions were not checked",
            "Keep it beside unified_finetune.py.",
        )
    missing, other, count = [], [], 0
    for line in lines:
        pin = line.split("#")[0].strip()
        if not pin:
            continue
        count += 1
        name, _, wanted = pin.partition("==")
        try:
            installed = metadata.version(name).split("+")[0]  # 2.13.0+cpu is 2.13.0
        except metadata.PackageNotFoundError:
            missing.append(pin)
        else:
            if installed != wanted:
                other.append(f"{name} {installed} (tested: {wanted})")
    install = (
        f"pip install -r {PROGRAM_FOLDER / TESTED_PACKAGES}  (or start with ./run_finetuning.sh)"
    )
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        return Check(
            "packages",
            "failed",
            f"--report_to {config.report_to} needs a package that is missing",
            f"{sys.executable} -m pip install {config.report_to}",
        )
    if missing:
        return Check("packages", "failed", f"missing: {', '.join(missing)}", install)
    if other:
        return Check("packages", "warning", f"not the tested versions: {', '.join(other)}", install)
    return Check("packages", "ok", f"all {count} at their tested versions")


def existing_parent(path: Path) -> Path:
    """Return the nearest existing folder at or above `path`."""
    path = path.absolute()
    while not os.path.exists(path):  # noqa: PTH110 - Path.exists raises in a forbidden folder
        path = path.parent
    return path


def check_folder(name: str, folder: Path) -> Check:
    """Check that a folder, or the parent it will be made in, can be written."""
    parent = existing_parent(folder)
    if not parent.is_dir():
        return Check(name, "failed", f"{parent} is not a folder", f"Set --{name} to another path.")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        return Check(
            name,
            "failed",
            f"{parent} cannot be written: {error.strerror}",
            f"Change its permissions, or set --{name} to another path.",
        )
    return Check(name, "ok", f"{folder} can be written")


def check_disk(config: FineTuningConfig) -> Check:
    """Check the free space at the output, the cache and the model cache."""
    from huggingface_hub import constants

    places = {"output_dir": Path(config.output_dir), "cache_dir": Path(config.cache_dir)}
    if not Path(config.model_name).expanduser().is_dir():
        places["model cache"] = Path(constants.HF_HUB_CACHE)
    free = {name: shutil.disk_usage(existing_parent(path)).free for name, path in places.items()}
    short = [
        f"{human_bytes(free[name])} at {existing_parent(path)} ({name})"
        for name, path in places.items()
        if free[name] < config.min_disk_gb * 1e9
    ]
    if short:
        return Check(
            "disk",
            "failed",
            f"free are only {', '.join(short)}; {config.min_disk_gb:g} GB are asked for",
            "Free some space, choose another place, or lower --min_disk_gb.",
        )
    return Check(
        "disk", "ok", ", ".join(f"{human_bytes(f)} free for {name}" for name, f in free.items())
    )


def check_environment_files() -> list[Check]:
    """Warn about a .env that others on this machine can read: it holds the R2 keys."""
    exposed = [path for path in environment_files() if path.stat().st_mode & 0o077]
    return [
        Check(".env", "warning", f"others can read {path}", f"chmod 600 {shlex.quote(str(path))}")
        for path in exposed
    ]


def check_r2(config: FineTuningConfig) -> Check:
    """Check the R2 variables and the bucket; a local file needs neither."""
    if config.data_path:
        path = Path(config.data_path).expanduser()
        if not path.exists():
            return Check(
                "data", "failed", f"there is no file {path}", "Check --data_path for a typo."
            )
        return Check("data", "ok", f"local file {path}; R2 is not used")
    try:
        return check_bucket(config)
    except FineTuningError as error:
        return Check("data", "failed", str(error), error.hint)


def check_model(config: FineTuningConfig) -> Check:
    """Check that the base model is at hand."""
    try:
        folder = base_model_folder(config.model_name)
    except FineTuningError as error:
        return Check("base model", "failed", str(error), error.hint)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return Check("base model", "ok", f"{config.model_name} in {folder} ({human_bytes(size)})")


claimed_folders: "list[typing.IO[str]]" = []  # the locks this process holds until it ends


def claim_output_folder(config: FineTuningConfig) -> None:
    """Lock the output folder against a second run; the lock ends with the process."""
    import fcntl

    output = Path(config.output_dir)
    if not is_main_process():
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = (output / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise FineTuningError(
            f"The output folder {output} cannot be written: {error.strerror}",
            hint="Change its permissions, or set --output_dir to another path.",
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.seek(0)
        raise FineTuningError(
            f"Another run (process {handle.read().strip() or 'unknown'}) is writing to {output}.",
            hint="Wait for it or stop it, or set --output_dir to another path.",
        ) from error
    except OSError as error:  # a file system without locks, some network shares
        log.warning("  %s cannot be locked (%s): start no second run on it", output, error.strerror)
    claimed_folders.append(handle)
    with contextlib.suppress(OSError):  # on a full disk: the lock counts, the number only informs
        handle.truncate(0)
        os.write(handle.fileno(), str(os.getpid()).encode())
    clear_leftovers(output)


def choose_device(config: FineTuningConfig) -> "tuple[str, str]":
    """Return the device to train on and, in words, why."""
    import torch

    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if config.device != "auto":
        if not available[config.device]:
            raise FineTuningError(
                f"device {config.device} was asked for, and this machine or this build of PyTorch "
                f"({torch.__version__}) has none.",
                hint="Leave --device out to take the best one there is.",
            )
        return config.device, "asked for"
    device = next(name for name, there in available.items() if there)
    absent = [name.upper() for name, there in available.items() if not there]
    return device, f"{' and '.join(absent)} absent" if absent else "the fastest here"


def check_device(config: FineTuningConfig) -> "tuple[Check, str, str]":
    """Choose the device and the dtype of the frozen base; return the check and both."""
    dtype = "bfloat16" if config.bf16 else "float16" if config.fp16 else "float32"
    try:
        device, reason = choose_device(config)
    except FineTuningError as error:
        return Check("device", "failed", str(error), error.hint), "cpu", dtype
    if config.fp16 and device != "cuda":
        return (
            Check(
                "device",
                "failed",
                f"fp16 works on NVIDIA GPUs only, and the device is {device} ({reason})",
                "Leave --fp16 out; --bf16 saves as much memory.",
            ),
            device,
            dtype,
        )
    if device != "cpu" or dtype != "float32":
        problem = self_test(device, dtype)
        if problem and config.device == "auto" and device != "cpu":
            hint = "Training goes on with the CPU; --device %s insists." % device
            half = dtype == "bfloat16" and self_test("cpu", dtype) is None
            return (
                Check("device", "warning", f"{device} rejected: {problem}", hint),
                "cpu",
                dtype if half else "float32",
            )
        if problem:
            hint = "Try --device cpu" if device != "cpu" else "Leave --bf16 out."
            return Check("device", "failed", f"{device} {dtype}: {problem}", hint), device, dtype
        reason += ", self-test passed"
    warning = emulation_warning(device, dtype)
    if warning:
        return (
            Check("device", "warning", f"{device}, {dtype}: {warning}", "Leave --bf16 out."),
            device,
            dtype,
        )
    return Check("device", "ok", f"{device}, base model in {dtype} ({reason})"), device, dtype


def check_precision(config: FineTuningConfig, device: str, dtype: str) -> Check:
    """Measure what another precision would gain on this machine."""
    flags = {"--bf16": ("bfloat16", "highest")}
    if device == "cuda":
        flags["--float32_matmul_precision high"] = ("float32", "high")
    elif device == "cpu" and cpu_has_bf16():
        flags["--float32_matmul_precision medium"] = ("float32", "medium")
    ours = product_rate(device, dtype, config.float32_matmul_precision)
    detail = f"{dtype} multiplies at {ours:,.0f} GFLOP/s"
    faster = []
    for flag, (other, precision) in flags.items():
        if (other, precision) == (dtype, config.float32_matmul_precision):
            continue
        with contextlib.suppress(RuntimeError, TypeError):  # some devices lack a dtype
            rate = product_rate(device, other, precision)
            detail += f", with {flag} at {rate:,.0f}"
            if rate > 1.2 * ours:
                faster.append(f"{flag} {rate / ours:.1f}x as fast")
    if dtype == "float32" and faster:
        return Check("precision", "ok", f"{detail}: {' or '.join(faster)}")
    return Check("precision", "ok", f"{detail}: nothing to gain")


def run_preflight(config: FineTuningConfig) -> PreflightReport:
    """Check everything a run needs and choose the device; raise once, with all that is wrong."""
    checks = [check_python(), check_packages(config)]
    if checks[-1].outcome != "failed":  # the other checks need the packages
        quiet_libraries()
        checks += [
            check_folder("output_dir", Path(config.output_dir)),
            check_folder("cache_dir", Path(config.cache_dir)),
            check_disk(config),
            *check_environment_files(),
            check_r2(config),
            check_model(config),
        ]
        device_check, device, dtype = check_device(config)
        checks.append(device_check)
        if device_check.outcome != "failed":
            checks.append(check_precision(config, device, dtype))
        if not any(c.name == "base model" and c.outcome == "failed" for c in checks):
            memory = check_memory(config, device, dtype)
            checks.append(memory)
            if memory.outcome != "failed":  # the model could be measured
                checks.append(check_room(config))
    for check in checks:
        mark = {"ok": "ok  ", "warning": "WARN", "failed": "FAIL"}[check.outcome]
        log.info("  %s  %-12s %s", mark, check.name, check.detail)
        if check.outcome != "ok" and check.hint:
            log.info("        %-12s -> %s", "", check.hint)
    failed = [c for c in checks if c.outcome == "failed"]
    if failed:
        raise FineTuningError(
            f"{len(failed)} of {len(checks)} checks failed: {', '.join(c.name for c in failed)}.",
            hint=f"Put these right and start again (the checks alone: {program_command()} check).",
        )
    return PreflightReport(tuple(checks), device, dtype)


# ======================================================================================
# Stage 2: download
# ======================================================================================

R2_ATTEMPTS = 5  # in a row without a new byte
BACKOFF_SECONDS, BACKOFF_CAP_SECONDS, RETRY_AFTER_CAP_SECONDS = 1.0, 30.0, 120.0
CONNECT_SECONDS = 10.0
STALL_SECONDS = 30.0  # without an answer, or without the next few kB of a body
CHUNK_SIZES = (4 * 1024, 256 * 1024)  # smallest and largest read
LISTING_PAGE = 1000  # objects per answer; servers give no more
DISK_MARGIN_BYTES = 64_000_000
DATA_SUFFIXES = (".json", ".jsonl")
R2_DOMAIN = ".r2.cloudflarestorage.com"


class BucketError(FineTuningError):
    """Tell that a request to the object store failed, and what that means for the next one."""

    def __init__(
        self,
        message: str,
        hint: str = "",
        *,
        status: int = 0,
        retry: bool = False,
        unavailable: bool = False,
        wait: float = 0.0,
    ) -> None:
        super().__init__(hide_secrets(message), hide_secrets(hint))
        self.status = status  # HTTP status, 0 where there was no answer
        self.retry = retry  # whether the same request may succeed a little later
        self.unavailable = unavailable  # nobody refused us: network down, server failing
        self.wait = wait  # seconds that the server asked for (Retry-After)


@dataclass(frozen=True)
class R2Access:
    """Hold what is needed to reach the bucket; its text never shows the secrets."""

    endpoint_url: str
    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)

    @property
    def host(self) -> str:
        """Return host and port of the endpoint."""
        return urllib.parse.urlsplit(self.endpoint_url).netloc


@dataclass(frozen=True)
class Bucket:
    """Name a bucket, with the client that reaches it."""

    client: Any  # botocore makes its classes at run time; they have no static type
    name: str
    host: str


@dataclass(frozen=True)
class RemoteObject:
    """Describe one version of an object."""

    key: str
    size: int
    etag: str
    modified: datetime
    sha256: "str | None" = None  # from the object's own metadata
    etag_is_md5: bool = True  # not with server-side encryption by KMS


@dataclass(frozen=True)
class CachedCopy:
    """Describe a verified download; this is what the .info file beside the data says."""

    path: Path
    host: str
    bucket: str
    remote: RemoteObject
    sha256: str
    proof: str


# --- the R2 variables


def read_r2_access(config: FineTuningConfig) -> R2Access:
    """Read the R2 variables from the environment.

    Raises:
        FineTuningError: naming all that are missing or malformed, never showing a key.
    """
    values = {
        name: os.environ.get(name, "").strip().strip("'\"").strip()
        for name in (
            "R2_ACCOUNT_ID",
            "R2_ACCESS_KEY_ID",
            "R2_SECRET_ACCESS_KEY",
            "R2_ENDPOINT_URL",
        )
    }
    account, key_id, secret, endpoint = values.values()
    SecretFilter.secrets.update(s for s in (key_id, secret) if len(s) >= 4)
    if endpoint:
        wrong = [f"R2_ENDPOINT_URL {w}" for w in check_endpoint(endpoint, config.r2_bucket_name)]
    else:
        endpoint = f"https://{account}{R2_DOMAIN}"
        wrong = [f"R2_ACCOUNT_ID {w}" for w in check_account_id(account)]
    on_r2 = endpoint.rstrip("/").endswith(R2_DOMAIN)
    wrong += [f"R2_ACCESS_KEY_ID {w}" for w in check_credential(key_id, 32 if on_r2 else None)]
    wrong += [f"R2_SECRET_ACCESS_KEY {w}" for w in check_credential(secret, None)]
    if on_r2 and len(key_id) == 64 and len(secret) == 32:
        wrong = ["R2_ACCESS_KEY_ID and R2_SECRET_ACCESS_KEY look swapped (32 and 64 characters)"]
    if wrong:
        raise FineTuningError(
            "The access to R2 is not set up: {}.".format("; ".join(wrong)),
            hint="Put the values of Cloudflare dashboard > R2 > Manage API tokens into {} "
            "(.env.example explains each), or use a local file with --data_path FILE.".format(
                Path.cwd() / ".env"
            ),
        )
    return R2Access(endpoint.rstrip("/"), key_id, secret)


def check_account_id(account: str) -> Iterator[str]:
    """Yield what is wrong with a Cloudflare account id."""
    if not account:
        yield "is missing"
    elif not re.fullmatch(r"[0-9a-fA-F]{32}", account):
        # Not showing it: what is here by mistake may be a secret.
        yield f"must be the account's 32 hexadecimal digits; its {len(account)} characters are not"


def check_credential(value: str, length: "int | None") -> Iterator[str]:
    """Yield what is wrong with a key, without showing it."""
    placeholder = r"(?i)your[_-].*|.*[_-]here|x+|\.+|<.*>|changeme|change[_-]me|placeholder"
    if not value:
        yield "is missing"
    elif re.fullmatch(placeholder, value):
        yield "still holds a placeholder"
    elif not re.fullmatch(r"[!-~]+", value):
        yield "holds spaces or characters that no key has"
    elif length and len(value) != length:
        yield f"has {len(value)} characters, and R2's have {length}"


def check_endpoint(endpoint: str, bucket: str) -> Iterator[str]:
    """Yield what is wrong with the address of an S3 endpoint."""
    try:
        parts = urllib.parse.urlsplit(endpoint)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        yield f"is not an address ({error})"
        return
    shown = f", not {endpoint!r}" if "." in host else ""  # without a dot it may be a secret
    path = parts.path.strip("/")
    if parts.username or parts.password:
        SecretFilter.secrets.update(s for s in (parts.username, parts.password) if s)
        yield "must not hold a user name or password"
    elif parts.scheme not in ("http", "https") or not is_host(host):
        yield f"must be like https://<account id>{R2_DOMAIN}{shown}"
    elif parts.query or parts.fragment:
        yield f"must end after the host{shown}"
    elif path and (path == bucket or host.endswith(R2_DOMAIN)):
        yield f"must end after the host: /{path} does not belong there (R2_BUCKET_NAME does it)"


def is_host(name: str) -> bool:
    """Tell whether a name can be that of a host."""
    labels = name.rstrip(".").split(".")
    return bool(re.fullmatch(r"[a-z0-9._:-]+", name)) and all(0 < len(i) < 64 for i in labels)


# --- talking to the bucket


def open_bucket(access: R2Access, config: FineTuningConfig) -> Bucket:
    """Make a client that does as R2 needs and leaves every retry to us."""
    import boto3.session
    import botocore.session
    from botocore.config import Config

    if access.endpoint_url.startswith("http:") and not is_loopback(access.host):
        log.warning("R2_ENDPOINT_URL is http: the data travels unencrypted to %s", access.host)
    nothing = (None, None, None, None)
    # The user's own AWS profile and files have no say here, broken or not.
    core = botocore.session.Session(
        session_vars={
            "profile": nothing,
            "config_file": (None, None, os.devnull, None),
            "credentials_file": (None, None, os.devnull, None),
        }
    )
    client = boto3.session.Session(botocore_session=core).client(
        "s3",
        endpoint_url=access.endpoint_url,
        aws_access_key_id=access.access_key_id,
        aws_secret_access_key=access.secret_access_key,
        region_name="auto",
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=CONNECT_SECONDS,
            read_timeout=STALL_SECONDS,
            # R2 does not have the checksums that newer clients ask for by default.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
    # The wildcard puts it before botocore's own handler at before-parse.s3.*, which takes
    # whatever is no XML, such as a login page, for a server error.
    client.meta.events.register_first("before-parse.*.ListObjectsV2", check_listing_body)
    return Bucket(client, config.r2_bucket_name, access.host)


def check_listing_body(response_dict: "dict[str, Any]", **_: object) -> None:
    """Refuse the body of a listing that is cut off, or no listing."""
    from botocore.exceptions import IncompleteReadError
    from botocore.parsers import ResponseParserError

    body, length = response_dict["body"], response_dict["headers"].get("content-length")
    if length is not None and int(length) != len(body):
        raise IncompleteReadError(actual_bytes=len(body), expected_bytes=int(length))
    if response_dict["status_code"] == 200 and b"<ListBucketResult" not in body:
        raise ResponseParserError("not a listing")


def is_loopback(host: str) -> bool:
    """Tell whether a host (with or without a port) is this machine."""
    return re.fullmatch(r"(localhost|127\.[0-9.]+|\[::1\])(:\d+)?", host) is not None


T = TypeVar("T")


def call_with_deadline(function: "Callable[[], T]", seconds: float) -> T:
    """Run a blocking call where Ctrl-C and a deadline can leave it behind.

    A thread, because neither reaches a name lookup or a read that gets a byte now and then.

    Raises:
        TimeoutError: when the call is not done in time.
    """
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    def work() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is read
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return outcome.result(seconds)


def send(bucket: Bucket, operation: "Callable[..., T]", **arguments: Any) -> T:
    """Send one request once; raise BucketError for whatever comes instead of the answer."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    try:
        return call_with_deadline(
            lambda: operation(Bucket=bucket.name, **arguments), CONNECT_SECONDS + 2 * STALL_SECONDS
        )
    except ClientError as error:
        raise explain_refusal(error, bucket) from error
    except (BotoCoreError, ResponseParserError, OSError, ValueError) as error:
        raise explain_silence(error, bucket) from error


def send_patiently(
    bucket: Bucket, operation: "Callable[..., T]", attempts: int = R2_ATTEMPTS, **arguments: Any
) -> T:
    """Send a request until it is answered, so many times at most."""
    failures = 0
    while True:
        try:
            return send(bucket, operation, **arguments)
        except BucketError as error:
            if not error.retry:
                raise
            failures += 1
            back_off(error, failures, attempts)


def back_off(error: BucketError, failures: int, attempts: int = R2_ATTEMPTS) -> None:
    """Wait before the next attempt: exponential, full jitter, Retry-After; raise after the last."""
    if failures >= attempts:
        raise error
    longest = min(BACKOFF_CAP_SECONDS, BACKOFF_SECONDS * 2 ** (failures - 1))
    delay = max(random.uniform(0, longest), min(error.wait, RETRY_AFTER_CAP_SECONDS))  # noqa: S311
    log.info("  %s Attempt %d of %d failed.", error, failures, attempts)
    log.debug("Trying again in %.2f s", delay, exc_info=error)
    time.sleep(delay)


def explain_refusal(error: "ClientError", bucket: Bucket) -> BucketError:
    """Translate the server's own error answer: what it means and which setting to change."""
    answer = error.response
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    code = str(answer.get("Error", {}).get("Code", ""))
    text = printable(str(answer.get("Error", {}).get("Message", "")))
    if (
        status in (408, 429)
        or (status >= 500 and status not in (501, 505))
        or code == "RequestTimeout"
    ):
        return BucketError(
            f"{bucket.host} answered {status} {code}.",
            "The server is busy or broken for now; run the same command again later.",
            status=status,
            retry=True,
            unavailable=True,
            wait=read_retry_after(headers.get("retry-after", "")),
        )
    # A HEAD has no body, and so no code but the status.
    foreign = error.operation_name != "HeadObject" and (not code or code == str(status))
    if foreign or (status < 400 and status not in (0, 304)):
        return wrong_endpoint(bucket, f"status {status} without an S3 error", status)
    known = explain_code(code, status, bucket, headers)
    if known:
        return BucketError(known[0], known[1], status=status)
    return BucketError(
        f"{bucket.host} refused the request: {status} {code} {text}".rstrip() + ".",
        "Check R2_ENDPOINT_URL or R2_ACCOUNT_ID, and the bucket's name.",
        status=status,
    )


def explain_code(
    code: str, status: int, bucket: Bucket, headers: "Mapping[str, str]"
) -> "tuple[str, str] | None":
    """Return message and hint for the S3 error codes that a user can do something about."""
    place = "Cloudflare dashboard > R2 > Manage API tokens"
    # InvalidArgument is R2's answer to an access key ID of the wrong length.
    if code in ("InvalidAccessKeyId", "Unauthorized", "InvalidArgument") or status == 401:
        return (
            f"{bucket.host} does not know the access key ID.",
            f"Check R2_ACCESS_KEY_ID: the token may be deleted or expired ({place}).",
        )
    if code == "SignatureDoesNotMatch":
        return (
            f"The secret access key does not belong to the access key ID, says {bucket.host}.",
            "Check R2_SECRET_ACCESS_KEY, then whether R2_ACCESS_KEY_ID is of the same token. R2 "
            f"shows a secret only once: where it is lost, make a new token ({place}).",
        )
    if code == "RequestTimeTooSkewed":
        return (
            f"{bucket.host} refuses requests because this machine's clock is wrong"
            f"{describe_clock_skew(headers.get('date', ''))}.",
            "Set the clock (switch on automatic date and time), then run the same command again.",
        )
    if code == "NoSuchBucket":
        return (
            f"There is no bucket {bucket.name!r} at {bucket.host}.",
            "Check R2_BUCKET_NAME or --r2_bucket_name, and whether R2_ACCOUNT_ID is its account.",
        )
    if code == "NoSuchKey" or (status == 404 and code == "404"):
        return (
            "The object is no longer in the bucket.",
            "Run the same command again to choose anew.",
        )
    if code == "AccessDenied" or status == 403:
        return (
            f"{bucket.host} denies the access to bucket {bucket.name!r}.",
            "Give the token the permission Object Read for this bucket. For a bucket in a "
            f"jurisdiction, R2_ENDPOINT_URL=https://<account id>.eu{R2_DOMAIN} (or .us, .fedramp).",
        )
    if code == "InvalidBucketName":
        return (f"{bucket.name!r} cannot be a bucket's name.", "Check R2_BUCKET_NAME.")
    return None


def read_retry_after(value: str) -> float:
    """Return the seconds that a Retry-After header asks for (a number, or a date)."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def describe_clock_skew(date: str) -> str:
    """Return how far the clock is from the server's Date header, in words; "" without one."""
    try:
        ahead = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        return ""
    return " ({} {})".format(human_seconds(abs(ahead)), "ahead" if ahead > 0 else "behind")


def wrong_endpoint(bucket: Bucket, what: str, status: int = 0) -> BucketError:
    """Return the error for an answer that no S3 server gives."""
    return BucketError(
        f"{bucket.host} does not answer like an S3 server ({what}).",
        "Check R2_ENDPOINT_URL; R2's own is "
        f"https://<account id>{R2_DOMAIN}. A login page of the network can be the reason, too.",
        status=status,
    )


def explain_silence(error: Exception, bucket: Bucket) -> BucketError:
    """Translate what kept an answer from coming: the network, TLS, or bytes that are no answer."""
    from botocore.exceptions import ParamValidationError, ProxyConnectionError
    from botocore.parsers import ResponseParserError

    causes = list(walk_causes(error))
    if isinstance(error, ParamValidationError):
        return BucketError(
            f"{bucket.name!r} cannot be a bucket's name.",
            "Check R2_BUCKET_NAME or --r2_bucket_name.",
        )
    if isinstance(error, ProxyConnectionError):
        return BucketError(
            f"The proxy on the way to {bucket.host} cannot be used: {printable(str(causes[-1]))}.",
            "Check the variables HTTPS_PROXY and HTTP_PROXY.",
            unavailable=True,
        )
    for cause in causes:
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
            return BucketError(
                f"No secure connection to {bucket.host}: {printable(str(cause))}.",
                "Check R2_ACCOUNT_ID or R2_ENDPOINT_URL; then whether a proxy, a firewall or a "
                "login page stands between (its certificate: AWS_CA_BUNDLE=FILE).",
                unavailable=True,
            )
        if isinstance(cause, socket.gaierror):
            return BucketError(
                f"The name {bucket.host} cannot be found.",
                "Check the internet connection, then R2_ACCOUNT_ID or R2_ENDPOINT_URL.",
                retry=cause.errno == socket.EAI_AGAIN,
                unavailable=True,
            )
        if isinstance(cause, ConnectionRefusedError):
            return BucketError(
                f"{bucket.host} refuses connections.",
                "Check R2_ENDPOINT_URL (host and port) and a proxy in HTTPS_PROXY.",
                unavailable=True,
            )
    if isinstance(error, (ResponseParserError, ValueError)):
        return wrong_endpoint(bucket, "its listing is none")
    return BucketError(
        f"The connection to {bucket.host} failed ({describe_break(error)}).",
        "Check the internet connection, then run the same command again: it goes on from here.",
        retry=True,
        unavailable=True,
    )


def describe_break(error: Exception) -> str:
    """Return in a few words how a connection broke."""
    from botocore.exceptions import ConnectTimeoutError, IncompleteReadError, ReadTimeoutError

    if isinstance(error, (ReadTimeoutError, TimeoutError)):
        return f"nothing came for {STALL_SECONDS:g} s"
    if isinstance(error, ConnectTimeoutError):
        return f"no connection within {CONNECT_SECONDS:g} s"
    if isinstance(error, IncompleteReadError):
        return "it ended early"
    return printable(str(list(walk_causes(error))[-1]))


def walk_causes(error: BaseException) -> "Iterator[BaseException]":
    """Yield an error and what it was raised from, outermost first."""
    seen: set[int] = set()
    step: BaseException | None = error
    while step is not None and id(step) not in seen:
        seen.add(id(step))
        yield step
        step = step.__cause__ or step.__context__


def printable(text: str) -> str:
    """Return foreign text safe for a terminal and a log: control characters escaped, shortened."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= 300 else shown[:300] + "…"


# --- choosing the object


def list_objects(bucket: Bucket, prefix: str) -> "list[RemoteObject]":
    """Return every object under `prefix`, from all pages of the listing."""
    objects: list[RemoteObject] = []
    position: dict[str, Any] = {}
    while True:
        page = send_patiently(
            bucket,
            bucket.client.list_objects_v2,
            Prefix=prefix,
            MaxKeys=LISTING_PAGE,
            **position,
        )
        try:
            objects += [
                RemoteObject(o["Key"], o["Size"], o["ETag"].strip('"'), o["LastModified"])
                for o in page.get("Contents", [])
            ]
        except KeyError as error:
            raise wrong_endpoint(bucket, f"its listing has no {error}") from error
        token = page.get("NextContinuationToken")
        if not page.get("IsTruncated"):
            return objects
        if not token or token == position.get("ContinuationToken"):
            raise wrong_endpoint(bucket, "its listing never ends")
        position = {"ContinuationToken": token}


def choose_object(objects: "Sequence[RemoteObject]", config: FineTuningConfig) -> RemoteObject:
    """Choose the object to train on: the named one; else Alpaca in the name, then the newest.

    Raises:
        FineTuningError: when nothing fits, with what there is.
    """
    if config.dataset_name:
        chosen = find_named(objects, config.dataset_name, config.r2_data_prefix)
    else:
        fitting = [o for o in objects if not reject_object(o)]
        if not fitting:
            raise nothing_fits(objects, config)
        chosen = max(fitting, key=lambda o: rank_object(o, config.r2_data_prefix))
    if chosen.size == 0:
        raise FineTuningError(
            f"The object {chosen.key!r} is empty (0 bytes).",
            hint="Upload it again, or choose another one with --dataset_name NAME.",
        )
    return chosen


def reject_object(candidate: RemoteObject) -> str:
    """Return why an object is never taken by itself; "" when it may be."""
    if candidate.key.endswith("/"):
        return "a folder marker"
    if not candidate.key.lower().endswith(DATA_SUFFIXES):
        return "neither .json nor .jsonl"
    return "" if candidate.size else "empty (0 bytes)"


def rank_object(candidate: RemoteObject, prefix: str) -> "tuple[bool, datetime, str]":
    """Return the sort key of a candidate: the best one is the greatest."""
    name = candidate.key.removeprefix(prefix)
    return "alpaca" in name.lower(), candidate.modified, candidate.key


def nothing_fits(objects: "Sequence[RemoteObject]", config: FineTuningConfig) -> FineTuningError:
    """Return the error for a listing without one usable object."""
    where = f"under {config.r2_data_prefix!r} in bucket {config.r2_bucket_name!r}"
    empty = [o for o in objects if reject_object(o).startswith("empty")]
    if empty:
        names = ", ".join(repr(o.key) for o in empty[:3])
        return FineTuningError(
            f"Every .json or .jsonl object {where} is empty (0 bytes): {names}.",
            hint="Upload the data set again, or use a local file with --data_path FILE.",
        )
    names = ", ".join(repr(o.key) for o in objects[:3]) or "nothing"
    return FineTuningError(
        f"There is no .json or .jsonl object {where}; it holds {names}.",
        hint="Upload a data set there, or set --r2_data_prefix to where it is.",
    )


def find_named(objects: "Sequence[RemoteObject]", name: str, prefix: str) -> RemoteObject:
    """Return the one object that `name` means: a key, a key under the prefix, or a file name."""
    for meaning in (
        lambda key: key == name,
        lambda key: key in (prefix + name, f"{prefix}/{name}"),
        lambda key: key.rpartition("/")[2] == name,
    ):
        found = [o for o in objects if meaning(o.key)]
        if len(found) == 1:
            return found[0]
        if found:
            raise FineTuningError(
                "dataset_name {!r} fits {} objects: {}.".format(
                    name, len(found), ", ".join(repr(o.key) for o in found[:10])
                ),
                hint="Give the whole key of one of them with --dataset_name KEY.",
            )
    near = nearest_names(name, [o.key for o in objects if not o.key.endswith("/")])
    raise FineTuningError(
        f"There is no object {name!r} among the {len(objects)} under {prefix!r}.",
        hint="Did you mean {}?".format(" or ".join(repr(key) for key in near))
        if near
        else "Without --dataset_name the program chooses by itself.",
    )


def nearest_names(name: str, names: "Sequence[str]") -> "list[str]":
    """Return up to three of the names that are spelt like `name`, folders and suffixes aside."""
    stems = {n: PurePosixPath(n).stem.lower() for n in names}
    near = difflib.get_close_matches(PurePosixPath(name).stem.lower(), set(stems.values()), 3)
    return [n for stem in near for n in stems if stems[n] == stem][:3]


def log_choice(
    chosen: RemoteObject, objects: "Sequence[RemoteObject]", config: FineTuningConfig
) -> None:
    """Say which object was taken and what was passed over, each with its reason."""
    alpaca, *_ = rank_object(chosen, config.r2_data_prefix)
    reason = "named by dataset_name" if config.dataset_name else ""
    reason = reason or ("the newest with 'alpaca' in its name" if alpaca else "the newest")
    log.info("Chosen: %s, %s (%s)", printable(chosen.key), describe_object(chosen), reason)
    others = sorted(
        (o for o in objects if o.key != chosen.key), key=lambda o: o.modified, reverse=True
    )
    for other in others[:10]:
        why = reject_object(other) or (
            "not the named one"
            if config.dataset_name
            else "older"
            if rank_object(other, config.r2_data_prefix)[0] == alpaca
            else "no 'alpaca' in its name"
        )
        log.info("  passed over: %s, %s: %s", printable(other.key), describe_object(other), why)
    if len(others) > 10:
        log.info("  passed over: %d more, older than these", len(others) - 10)


def describe_object(remote: RemoteObject) -> str:
    """Return size and age of an object."""
    return f"{human_bytes(remote.size)}, {remote.modified:%Y-%m-%d %H:%M %Z}"


# --- the cache


def cache_path(folder: Path, bucket: Bucket, remote: RemoteObject) -> Path:
    """Return where one version of an object is kept.

    The key comes from outside: its readable part is reduced to harmless characters, and a digest
    of place, key and version tells apart what looks the same then (or on a case-blind disk).
    """
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", remote.key.rpartition("/")[2].rpartition(".")[0])
    suffix = ".jsonl" if remote.key.lower().endswith(".jsonl") else ".json"
    of_key, of_version = (
        hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
        for parts in ([bucket.host, bucket.name, remote.key], [remote.etag, remote.size])
    )
    return folder / f"{name.strip('_-')[:60] or 'data'}-{of_key}-{of_version}{suffix}"


def open_regular(path: Path) -> "io.BufferedReader":
    """Open a file for reading; never through a symlink, never anything but a regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def hash_file(path: Path, algorithm: str) -> str:
    """Return the hex digest of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(
            file, lambda: hashlib.new(algorithm, usedforsecurity=False)
        ).hexdigest()


def info_path(path: Path) -> Path:
    """Return where the description of a cached file is."""
    return path.with_name(path.name + ".info")


def read_copy(path: Path) -> "CachedCopy | None":
    """Return what the .info file says about the cached file `path`; None without a usable one."""
    try:
        with open_regular(info_path(path)) as file:
            info = json.loads(file.read(65536))
        remote = RemoteObject(
            key=str(info["key"]),
            size=int(info["size"]),
            etag=str(info["etag"]),
            modified=datetime.fromisoformat(info["last_modified"]).astimezone(UTC),
        )
        proof = str(info["verified_by"])
        return CachedCopy(path, info["host"], info["bucket"], remote, info["sha256"], proof)
    except FileNotFoundError:
        return None
    except (OSError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        log.warning("  %s cannot be used: %s", info_path(path), error)
        return None


def find_damage(copy: CachedCopy) -> str:
    """Return what is wrong with cached bytes that were verified once; "" when they are the same."""
    try:
        sha256 = hash_file(copy.path, "sha256")
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "" if sha256 == copy.sha256 else "is damaged: its SHA-256 changed"


def find_offline_copy(config: FineTuningConfig, host: "str | None") -> "CachedCopy | None":
    """Return the verified copy that a run without the bucket uses, chosen as from a listing."""
    copies = [
        copy
        for info in user_path(config.cache_dir).glob("*.info")
        for copy in [read_copy(info.with_suffix(""))]
        if copy
        and copy.bucket == config.r2_bucket_name
        and copy.host == (host or copy.host)
        and (config.dataset_name or copy.remote.key.startswith(config.r2_data_prefix))
    ]
    while copies:
        copies.sort(key=lambda copy: copy.remote.modified)
        newest = {copy.remote.key: copy for copy in copies}
        try:
            chosen = newest[choose_object([c.remote for c in newest.values()], config).key]
        except FineTuningError:  # the named object is not among them
            return None
        damage = find_damage(chosen)
        if not damage:
            return chosen
        log.warning("  The cached copy %s %s", chosen.path, damage)
        copies.remove(chosen)
    return None


def use_copy(copy: CachedCopy, source: str) -> DatasetFile:
    """Return a verified copy as the data set."""
    return DatasetFile(copy.path, copy.remote.size, copy.remote.etag, copy.sha256, source)


@contextlib.contextmanager
def entry_lock(path: Path) -> Iterator[None]:
    """Let one process at a time download an entry; wait for another one, in reach of Ctrl-C.

    Where the file system has no locks this does nothing, and nothing depends on it: a partial
    file is never shared, and only verified bytes are published.
    """
    import fcntl

    lock = path.with_name(path.name + ".lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        for waited in itertools.count():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waited == 0:
                    log.info("  Another run is downloading this object; waiting for it")
                time.sleep(0.2)
            except OSError as error:
                log.debug("No locks in %s: %s", path.parent, error)
                break
        yield
    finally:
        os.close(descriptor)


# --- downloading


def head_object(bucket: Bucket, key: str, known_etag: str = "") -> "RemoteObject | None":
    """Return the object as it is now; None when it still has the ETag that is known."""
    condition: dict[str, Any] = {"IfNoneMatch": f'"{known_etag}"'} if known_etag else {}
    try:
        head = send_patiently(bucket, bucket.client.head_object, Key=key, **condition)
    except BucketError as error:
        if error.status == 304:
            return None
        raise
    absent = [name for name in ("ETag", "ContentLength", "LastModified") if name not in head]
    if absent:
        raise wrong_endpoint(bucket, f"no {absent[0]} of an object")
    stored = head.get("Metadata", {}).get("sha256", "").lower()
    encrypted = head.get("ServerSideEncryption", "").startswith("aws:kms")
    return RemoteObject(
        key,
        head["ContentLength"],
        head["ETag"].strip('"'),
        head["LastModified"],
        sha256=stored if re.fullmatch("[0-9a-f]{64}", stored) else None,
        etag_is_md5=not encrypted and "SSECustomerAlgorithm" not in head,
    )


def receive(bucket: Bucket, remote: RemoteObject, file: "IO[bytes]", bar: Progress) -> None:
    """Ask for what `file` lacks of the object and append it as it comes.

    Raises:
        BucketError: with status 412 when the object was replaced meanwhile.
    """
    offset = file.seek(0, os.SEEK_END)
    if offset == remote.size:
        return
    wanted: dict[str, Any] = {"Range": f"bytes={offset}-"} if offset else {}
    response = send(
        bucket, bucket.client.get_object, Key=remote.key, IfMatch=f'"{remote.etag}"', **wanted
    )
    body = response["Body"]
    try:
        start = check_answer(response, remote, offset)
        file.truncate(start)
        file.seek(start)
        bar.move_to(start)
        copy_body(bucket, body, remote.size, file, bar)
    except BaseException:
        # Not here: closing waits for a read that an abandoned thread may still be in.
        threading.Thread(target=body.close, daemon=True).start()
        raise


def check_answer(response: "dict[str, Any]", remote: RemoteObject, offset: int) -> int:
    """Return where the body of an answer to GET begins: at `offset`, or at 0 for a whole object.

    Raises:
        BucketError: when the answer is no part of this version of the object.
    """
    status, start = response["ResponseMetadata"]["HTTPStatusCode"], 0
    if response.get("ETag", "").strip('"') != remote.etag:
        raise BucketError("The object was replaced during the download.", status=412)
    if status == 206:
        start = offset
        wanted = f"bytes {offset}-{remote.size - 1}/{remote.size}"
        if response.get("ContentRange") != wanted:
            got = printable(response.get("ContentRange", ""))
            raise BucketError(
                f"{wanted!r} was asked for, and {got!r} came.", status=416, retry=True
            )
    if response.get("ContentLength") != remote.size - start:
        raise BucketError(
            "The server offers {} bytes where the object has {}.".format(
                response.get("ContentLength"), remote.size - start
            ),
            "Something between here and the bucket changes the data; try another network.",
            retry=True,
        )
    if start != offset:
        log.info("  The server cannot continue a download; starting from the beginning")
    return start


def copy_body(bucket: Bucket, body: Any, size: int, file: "IO[bytes]", bar: Progress) -> None:
    """Write a body to `file` until it has `size` bytes.

    The reads grow while they are quick: a slow connection is seen to move, and little of what it
    brought is lost when it breaks inside a read.
    """
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    smallest, largest = CHUNK_SIZES
    count, position = smallest, file.tell()
    while position < size:
        begun = time.monotonic()
        try:
            data = call_with_deadline(functools.partial(body.read, count), 1.5 * STALL_SECONDS)
        except (BotoCoreError, HTTPError, OSError) as error:
            raise explain_silence(error, bucket) from error
        if not data:
            raise BucketError(
                f"{bucket.host} ended the answer early.", retry=True, unavailable=True
            )
        position += write_data(file, data, size - position)
        bar.move_to(position)
        quick = time.monotonic() - begun < 0.25
        count = min(2 * count, largest) if quick else max(count // 2, smallest)


def write_data(file: "IO[bytes]", data: bytes, missing: int) -> int:
    """Write all of `data` and return its length; `missing` is what the object still needs."""
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise disk_error(error, missing) from error
    return len(data)


def disk_error(error: OSError, missing: int = 0) -> FineTuningError:
    """Translate a failed write into the cache."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FineTuningError(
            "The disk of the cache folder (or your quota) is full.",
            hint=f"Free {human_bytes(missing + DISK_MARGIN_BYTES)} and run the same command again: "
            "the download goes on where it stopped. Or take another disk with --cache_dir FOLDER.",
        )
    return FineTuningError(
        f"The cache folder cannot be written: {error}",
        hint="Check its permissions, or choose another one with --cache_dir FOLDER.",
    )


def fill_partial(bucket: Bucket, remote: RemoteObject, file: "IO[bytes]") -> bool:
    """Download what `file` lacks; return False when the object was replaced meanwhile.

    An attempt counts only when it brought nothing beyond what was there before.
    """
    furthest = file.seek(0, os.SEEK_END)
    failures = 0
    with progress_bar(remote.size, "B", "download", furthest) as bar:
        while True:
            try:
                receive(bucket, remote, file, bar)
                return True
            except BucketError as error:
                if error.status == 412:
                    return False
                if error.status == 416:  # the server knows no such part: all of it, then
                    file.truncate(0)
                elif not (error.retry or error.unavailable):
                    raise
                position = file.seek(0, os.SEEK_END)
                if position > furthest:
                    furthest, failures = position, 0
                failures += 1
                back_off(error, failures)


def prove_content(path: Path, remote: RemoteObject) -> "tuple[str, str]":
    """Return whether the file is the object ("right", "wrong", "unknown") and how that is known."""
    single = re.fullmatch(r"[0-9a-fA-F]{32}", remote.etag)
    multipart = re.fullmatch(r"[0-9a-fA-F]{32}-([1-9][0-9]{0,4})", remote.etag)
    if single and remote.etag_is_md5:
        right = hash_file(path, "md5") == remote.etag.lower()
        return "right" if right else "wrong", "the MD5 in its ETag"
    if multipart and remote.etag_is_md5:
        for part_size in guess_part_sizes(remote.size, int(multipart[1])):
            if multipart_etag(path, part_size) == remote.etag.lower():
                return "right", f"its multipart ETag ({part_size} bytes per part)"
    if remote.sha256:
        right = hash_file(path, "sha256") == remote.sha256
        return "right" if right else "wrong", "the SHA-256 in its metadata"
    return "unknown", "its size and two equal downloads"


def guess_part_sizes(size: int, parts: int) -> "list[int]":
    """Return the part sizes that give `size` bytes in `parts` parts, the usual ones first."""
    if parts == 1:
        return [size]
    least, most = -(-size // parts), (size - 1) // (parts - 1)
    usual = [n * 2**20 for n in (8, 5, 16, 10, 15, 25, 32, 50, 64, 100, 128, 256, 512, 1024)]
    guesses = [n for n in usual if least <= n <= most]
    count = min(64, max(4, 2**36 // size))  # each guess reads the whole file
    for unit in (2**20, 10**6):
        guesses += range(-(-least // unit) * unit, most + 1, unit)[:count]
    return list(dict.fromkeys([*guesses, least, most]))


def multipart_etag(path: Path, part_size: int) -> str:
    """Return the ETag of a multipart upload in such parts: MD5 of the parts' MD5s, and a count."""
    digests: list[bytes] = []
    with open_regular(path) as file:
        while True:
            digest, left = hashlib.md5(usedforsecurity=False), part_size
            while left:
                data = file.read(min(left, 1 << 20))
                if not data:
                    break
                digest.update(data)
                left -= len(data)
            if left == part_size and digests:
                break
            digests.append(digest.digest())
            if left:
                break
    whole = hashlib.md5(b"".join(digests), usedforsecurity=False).hexdigest()
    return f"{whole}-{len(digests)}"


def find_partials(path: Path, own: Path) -> "list[tuple[int, Path]]":
    """Return size and path of what interrupted runs left of this download, `own` aside."""
    found = []
    for partial in path.parent.glob(path.name + ".*.partial"):
        owner = re.fullmatch(r"\.(\d+)-[0-9a-f]+\.partial", partial.name[len(path.name) :])
        # Where locks do nothing, the owner may be at work in this very moment.
        if owner and partial != own and not is_running(int(owner[1])):
            with contextlib.suppress(FileNotFoundError):
                status = partial.lstat()
                found.append((status.st_size * stat.S_ISREG(status.st_mode), partial))
    return found


def is_running(pid: int) -> bool:
    """Tell whether another process of this machine, with this number, is alive."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def take_over_partials(path: Path, own: Path, file: "IO[bytes]", size: int) -> None:
    """Copy what interrupted runs left of this download into `file`, and remove it.

    A copy, so that no two processes ever write to one file, whatever the locks are worth.
    """
    found = find_partials(path, own)
    length, best = max((f for f in found if f[0] <= size), default=(0, path))
    if length:
        try:
            with open_regular(best) as source:
                shutil.copyfileobj(source, file, 1 << 20)
            log.info("  Going on with an interrupted download: %s are here", human_bytes(length))
        except OSError as error:
            log.warning("  %s cannot be used, starting over: %s", best, error)
            file.truncate(0)
    for _, partial in found:
        partial.unlink(missing_ok=True)


def check_free_space(folder: Path, missing: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if free < missing + DISK_MARGIN_BYTES:
        raise FineTuningError(
            f"The download needs {human_bytes(missing)}; {folder} has {human_bytes(free)} free.",
            hint=f"Free {human_bytes(missing + DISK_MARGIN_BYTES - free)}, or choose another disk "
            "with --cache_dir FOLDER.",
        )


def publish(partial: Path, copy: CachedCopy) -> None:
    """Give verified bytes their final name, then their description; both outlast a crash."""
    info = {
        "key": copy.remote.key,
        "bucket": copy.bucket,
        "host": copy.host,
        "etag": copy.remote.etag,
        "size": copy.remote.size,
        "last_modified": copy.remote.modified.isoformat(),
        "sha256": copy.sha256,
        "verified_by": copy.proof,
        "downloaded": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    draft = partial.with_suffix(".draft")
    with draft.open("x", encoding="utf-8") as file:
        json.dump(info, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(copy.path)
    draft.replace(info_path(copy.path))
    flush_to_disk(copy.path.parent)


def download_object(bucket: Bucket, remote: RemoteObject, folder: Path) -> "CachedCopy | None":
    """Return a verified copy of the object, downloading what is missing; None when replaced."""
    path, begun = cache_path(folder, bucket, remote), time.monotonic()
    with entry_lock(path):
        copy = read_copy(path)
        if copy and not find_damage(copy):
            log.info("Another run has just fetched it: %s", path)
            return copy
        partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        with partial.open("x+b", buffering=0) as file:
            try:
                take_over_partials(path, partial, file, remote.size)
                check_free_space(folder, remote.size - file.seek(0, os.SEEK_END))
                verified = fill_and_verify(bucket, remote, partial, file)
                if verified is None:
                    file.truncate(0)
                    return None
                copy = CachedCopy(path, bucket.host, bucket.name, remote, *verified)
                publish(partial, copy)
                log.info(
                    "Downloaded in %s, verified by %s: %s",
                    human_seconds(time.monotonic() - begun),
                    copy.proof,
                    path,
                )
                return copy
            finally:
                if os.fstat(file.fileno()).st_size == 0:
                    partial.unlink(missing_ok=True)


def fill_and_verify(
    bucket: Bucket, remote: RemoteObject, partial: Path, file: "IO[bytes]"
) -> "tuple[str, str] | None":
    """Download until the bytes are proven; return SHA-256 and proof, None when replaced."""
    seen: set[str] = set()
    for _ in range(R2_ATTEMPTS):
        if not fill_partial(bucket, remote, file):
            return None
        os.fsync(file.fileno())
        verdict, proof = prove_content(partial, remote)
        sha256 = hash_file(partial, "sha256")
        if verdict == "right":
            return sha256, proof
        if sha256 in seen and verdict == "unknown":
            log.warning(
                "  The ETag %s cannot be checked against the content; two downloads were equal.",
                printable(remote.etag),
            )
            return sha256, proof
        file.truncate(0)
        if sha256 in seen:
            break
        seen.add(sha256)
        if verdict == "wrong":
            log.warning("  What arrived is not the object (%s differs); downloading anew", proof)
        else:
            log.info("  The ETag proves nothing here (unusual upload?); downloading to compare")
    raise BucketError(
        f"What {bucket.host} delivers for {remote.key!r} does not match its hash.",
        "Something between here and the bucket changes the data, or the object is damaged: try "
        "another network, or upload it again.",
    )


def fetch_object(bucket: Bucket, chosen: RemoteObject, config: FineTuningConfig) -> DatasetFile:
    """Return the chosen object as a verified file: the cached copy if current, else a new one."""
    folder = user_path(config.cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    source = f"{bucket.host}/{bucket.name}/{printable(chosen.key)}"
    for _ in range(R2_ATTEMPTS):
        copy = read_copy(cache_path(folder, bucket, chosen))
        damage = find_damage(copy) if copy else ""
        if copy and damage:
            log.warning("  The cached copy %s %s; downloading it again", copy.path, damage)
            copy = None
        try:
            current = head_object(bucket, chosen.key, copy.remote.etag if copy else "")
        except BucketError as error:
            if not (copy and error.unavailable):
                raise
            log.warning("%s The cached copy is what the listing just named.", error)
            current = None
        if copy and current is None:
            log.info("Not modified: the cached copy is current and intact (%s)", copy.path)
            return use_copy(copy, source)
        assert current  # without a copy, the request had no condition
        if current.etag == chosen.etag and current.size != chosen.size:
            raise wrong_endpoint(bucket, f"{chosen.size} bytes listed, {current.size} offered")
        copy = download_object(bucket, current, folder)
        if copy:
            log_older_versions(copy.path)
            return use_copy(copy, source)
        log.info("  The object was replaced during the download; taking the new one")
    raise BucketError(
        f"{chosen.key!r} was replaced at every attempt to download it.",
        "Wait until its upload is over, then run the same command again.",
    )


def log_older_versions(path: Path) -> None:
    """Say what earlier versions of this object occupy; a run to be resumed may need them."""
    *_, of_key, _ = path.name.rsplit("-", 2)
    size = 0
    for other in path.parent.glob(f"*-{of_key}-*"):
        if not other.name.startswith(path.name):
            with contextlib.suppress(FileNotFoundError):  # another run may tidy up
                size += other.lstat().st_size
    if size:
        log.info(
            "  Older versions of this object take %s in %s; delete them when no run needs them.",
            human_bytes(size),
            path.parent,
        )


# --- what the stage offers


def user_path(text: str) -> Path:
    """Return a path as the user means it: ~ is the home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~somebody who is unknown here
        return Path(text)


def read_local_file(path: Path) -> DatasetFile:
    """Return a local file as the data set, after checking that it can be one."""
    shown, hint = printable(str(path)), "Check --data_path."
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise FineTuningError(f"{shown} is a folder, not a file.", suggest_files(path, hint))
        if not stat.S_ISREG(mode):
            raise FineTuningError(f"{shown} is not a regular file.", hint)
        size, sha256 = path.stat().st_size, hash_file(path.resolve(), "sha256")
    except FileNotFoundError as error:
        raise FineTuningError(
            f"There is no file {shown}.", suggest_files(path.parent, hint, path.name)
        ) from error
    except OSError as error:
        raise FineTuningError(f"{shown} cannot be read: {error.strerror}.", hint) from error
    if size == 0:
        raise FineTuningError(f"{shown} is empty (0 bytes).", hint)
    log.info("Local file: %s, %s", shown, human_bytes(size))
    return DatasetFile(path, size, None, sha256, f"local file {shown}")


def suggest_files(folder: Path, hint: str, name: str = "") -> str:
    """Return a hint that names the data files in a folder, those like `name` first."""
    try:
        names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in DATA_SUFFIXES)
    except OSError:
        return hint
    near = nearest_names(name, names) if name else names[:3]
    if not near:
        return hint
    return "Did you mean {}?".format(" or ".join(printable(str(folder / n)) for n in near))


def list_candidates(bucket: Bucket, config: FineTuningConfig) -> "list[RemoteObject]":
    """Return the objects under the prefix, and the one that dataset_name names by its whole key."""
    name, prefix = config.dataset_name, config.r2_data_prefix
    objects = list_objects(bucket, prefix)
    if name and "/" in name and not name.startswith(prefix):
        objects += [o for o in list_objects(bucket, name) if o.key == name]
    if not objects:
        page = send_patiently(bucket, bucket.client.list_objects_v2, MaxKeys=5)
        there = ", ".join(repr(o["Key"]) for o in page.get("Contents", []))
        raise FineTuningError(
            f"Bucket {bucket.name!r} has no object under the prefix {prefix!r}.",
            hint=f"It holds {there}, …: set --r2_data_prefix."
            if there
            else "The bucket is empty: upload a data set, or check R2_BUCKET_NAME.",
        )
    return objects


def fetch_dataset(config: FineTuningConfig) -> DatasetFile:
    """Return the data set as a verified local file: `data_path`, or the bucket's chosen object."""
    if config.data_path:
        return read_local_file(user_path(config.data_path))
    host = None
    try:
        access = read_r2_access(config)
        host = access.host
        bucket = open_bucket(access, config)
        objects = list_candidates(bucket, config)
    except FineTuningError as error:
        # Without a host it is the access that is missing.
        if host and not (isinstance(error, BucketError) and error.unavailable):
            raise
        copy = find_offline_copy(config, host)
        if copy is None:
            raise
        log.warning("%s\n-> %s", error, error.hint)
        log.warning("Going on with the verified copy %s of %s", copy.path, describe_copy(copy))
        return use_copy(copy, f"cached copy, bucket not asked: {describe_copy(copy)}")
    chosen = choose_object(objects, config)
    log_choice(chosen, objects, config)
    try:
        return fetch_object(bucket, chosen, config)
    except OSError as error:  # what the network does is translated where it happens
        raise disk_error(error) from error


def describe_copy(copy: CachedCopy) -> str:
    """Return which object a cached file is a copy of."""
    return (
        f"{copy.host}/{copy.bucket}/{printable(copy.remote.key)} ({describe_object(copy.remote)})"
    )


def check_bucket(config: FineTuningConfig) -> Check:
    """Ask the bucket for one listing and return the outcome as a preflight check."""
    name, host = "R2 bucket", None
    try:
        access = read_r2_access(config)
        host = access.host
        bucket = open_bucket(access, config)
        page = send_patiently(
            bucket,
            bucket.client.list_objects_v2,
            attempts=2,
            Prefix=config.r2_data_prefix,
            MaxKeys=1,
        )
    except FineTuningError as error:
        refused = host and not (isinstance(error, BucketError) and error.unavailable)
        copy = None if refused else find_offline_copy(config, host)
        if copy is None:
            return Check(name, "failed", str(error), error.hint)
        detail = f"{error} A verified copy is in the cache and will be used: {describe_copy(copy)}."
        return Check(name, "warning", detail, error.hint)
    if not page.get("Contents") and not config.dataset_name:
        return Check(
            name,
            "failed",
            f"Bucket {bucket.name!r} has no object under the prefix {config.r2_data_prefix!r}.",
            "Set --r2_data_prefix to where the data sets are, or check R2_BUCKET_NAME.",
        )
    return Check(name, "ok", f"bucket {bucket.name!r} at {bucket.host} can be listed")


# ======================================================================================
# Stage 3: prepare
# ======================================================================================


# --- reading the file, row by row, so that its size does not matter

JSON_SPACE = b" \t\r\n"
MAX_ROW_BYTES = 64 * 1024 * 1024  # a longer row means that something is wrong with the file
MAX_DOCUMENT_BYTES = 512 * 1024 * 1024  # an object around the rows has to be read as a whole
BROKEN_LINES_SHOWN = 5
WRAPPER_KEYS = ("data", "rows", "examples", "train", "instances", "samples", "records", "items")
CONTAINER_FORMATS = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "ZIP",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
}


class SourceRow(NamedTuple):
    """Hold one value of the data file: its index (from 0) and the line it starts on (from 1)."""

    row: int
    line: "int | None"
    value: object
    bytes_read: int  # of the file, so far


def check_is_text(path: Path, head: bytes) -> None:
    """Raise FineTuningError when the first bytes of a file show that it is not UTF-8 text."""
    hint = "The data must be a JSON array or JSON Lines in UTF-8."
    if not head.removeprefix(b"\xef\xbb\xbf").strip(JSON_SPACE):
        raise FineTuningError(f"{path} is empty: it holds no rows.", hint=hint)
    for magic, name in CONTAINER_FORMATS.items():
        if head.startswith(magic):
            raise FineTuningError(
                f"{path} is a {name} file, not JSON text.", hint="Unpack or convert it. " + hint
            )
    sample = head[:2000]
    zeros = sample.count(0)  # in UTF-16, every second byte of English text
    one_sided = min(sample[0::2].count(0), sample[1::2].count(0)) * 10 < zeros
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (one_sided and zeros * 3 > len(sample)):
        raise FineTuningError(
            f"{path} is UTF-16 text, not UTF-8.",
            hint="Convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW",
        )
    if b"\0" in sample:
        raise FineTuningError(f"{path} is a binary file, not JSON text.", hint=hint)


def utf8_error(path: Path, error: UnicodeDecodeError, offset: int, line: int) -> FineTuningError:
    """Describe a byte that is not UTF-8, in a piece of the file that starts at `offset`, `line`."""
    return FineTuningError(
        "{} is not UTF-8: byte 0x{:02X} at offset {} (line {}) cannot be read.".format(
            path,
            error.object[error.start],
            offset + error.start,
            line + error.object.count(b"\n", 0, error.start),
        ),
        hint="Save the file as UTF-8, for example: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW",
    )


def syntax_error(path: Path, what: str, line: int, column: int) -> FineTuningError:
    """Describe a JSON syntax error with its place."""
    return FineTuningError(
        f"{path}, line {line}, column {column}: {what}.",
        hint="Correct the file, or export it again: all rows as one JSON array, or one row per "
        "line without commas between them.",
    )


UNCLOSED = "not valid JSON: the text that begins here is not closed"


def describe_json_error(error: "ValueError | RecursionError") -> "tuple[str, int]":
    """Return what is wrong with a JSON text and at which position."""
    if isinstance(error, json.JSONDecodeError):
        if error.msg.startswith("Unterminated string"):
            return UNCLOSED, error.pos
        return "not valid JSON: " + error.msg.lower(), error.pos
    if isinstance(error, RecursionError):
        return "nested too deeply", 0
    return "not valid JSON: " + first_line(error), 0


def make_json_decoder() -> json.JSONDecoder:
    """Build the decoder of rows; whole numbers become floats: Python refuses very long ones."""
    return json.JSONDecoder(parse_int=float)


def read_lines(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; refuse one of a length that no data set could mean."""
    for number in itertools.count(1):
        line = stream.readline(MAX_ROW_BYTES)
        if not line:
            return
        if len(line) == MAX_ROW_BYTES:
            raise FineTuningError(
                f"{path}, line {number}: over {human_bytes(MAX_ROW_BYTES)} without a line break.",
                hint="Write one row per line (JSON Lines), or all rows as one JSON array.",
            )
        yield line


def read_json_lines(stream: BinaryIO, path: Path) -> Iterator[SourceRow]:
    """Yield the rows of JSON Lines; broken lines are counted to the end, then reported together."""
    decode = make_json_decoder().decode
    broken: list[str] = []
    count = index = 0
    offset = stream.tell()
    for number, raw in enumerate(read_lines(stream, path), 1):
        try:
            text = raw.decode("utf-8").lstrip("\ufeff")
        except UnicodeDecodeError as error:
            raise utf8_error(path, error, offset, number) from error
        offset += len(raw)
        if not text.strip():
            continue
        try:
            value = decode(text)
        except (ValueError, RecursionError) as error:
            what, position = describe_json_error(error)
            count += 1
            if count <= BROKEN_LINES_SHOWN:
                broken.append(f"line {number}, column {position + 1}: {what}")
            continue
        if not count:  # after a broken line, the rest is only counted
            yield SourceRow(index, number, value, offset)
        index += 1
    if count:
        raise FineTuningError(
            f"{path}: {count} of {index + count} lines cannot be read as JSON:\n"
            + "\n".join("  - " + b for b in broken + ["..."] * (count > len(broken))),
            hint="Correct or remove these lines, or export the file again.",
        )


class JsonWindow:
    """Hold the piece of a JSON file that is being read, and know where in the file it lies."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream, self.path = stream, path
        self.decode_value = make_json_decoder().raw_decode
        self.decode_utf8 = codecs.getincrementaldecoder("utf-8")("strict").decode
        self.text, self.position = "", 0
        self.mark, self.line, self.column = 0, 1, 1  # line and column of text[mark]
        self.offset, self.newlines = stream.tell(), 0  # of the bytes read so far
        self.at_end = False

    def place(self, position: int) -> "tuple[int, int]":
        """Return the line and column, both from 1, of a position at or behind the mark."""
        newlines = self.text.count("\n", self.mark, position)
        if not newlines:
            return self.line, self.column + position - self.mark
        return self.line + newlines, position - self.text.rindex("\n", self.mark, position)

    def move_mark(self) -> None:
        """Move the mark to the position, so that no line break is counted twice."""
        self.line, self.column = self.place(self.position)
        self.mark = self.position

    def fill(self) -> None:
        """Drop what was used and read on, at least as much as is left, so that retries stay few."""
        self.move_mark()
        self.text, self.position, self.mark = self.text[self.position :], 0, 0
        piece = self.stream.read(max(1 << 20, len(self.text)))
        self.at_end = not piece
        try:
            self.text += self.decode_utf8(piece, final=self.at_end)
        except UnicodeDecodeError as error:
            # The decoder puts the few bytes it held back in front of the piece.
            start = self.offset - (len(error.object) - len(piece))
            raise utf8_error(self.path, error, start, self.newlines + 1) from error
        self.offset += len(piece)
        self.newlines += piece.count(b"\n")

    def next_char(self) -> str:
        """Move to the next character that is not white space and return it ("" at the end)."""
        while True:
            match = re.compile(r"[ \t\r\n]*").match(self.text, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self.text):
                return self.text[self.position]
            if self.at_end:
                return ""
            self.fill()

    def next_value(self) -> object:
        """Read the JSON value at the position and move behind it."""
        while True:
            try:
                value, end = self.decode_value(self.text, self.position)
            except (ValueError, RecursionError) as error:
                what, position = describe_json_error(error)
                if self.at_end or not self.may_go_on(what, position):
                    raise self.error(what, max(position, self.position)) from error
            else:
                if self.at_end or end < len(self.text):
                    self.position = end
                    return value
            if len(self.text) - self.position > MAX_ROW_BYTES:
                raise self.error(f"a row longer than {human_bytes(MAX_ROW_BYTES)}", self.position)
            self.fill()

    def may_go_on(self, what: str, position: int) -> bool:
        """Tell whether an error can come from the piece being cut off rather than from the file."""
        return what == UNCLOSED or position >= len(self.text) - 16

    def error(self, what: str, position: int) -> FineTuningError:
        """Describe a syntax error at a position; say so where the file simply ends too early."""
        if self.at_end and (what == UNCLOSED or not self.text[position:].strip()):
            what += " (the file ends too early: was it cut off?)"
        return syntax_error(self.path, what, *self.place(position))


def read_json_array(stream: BinaryIO, path: Path) -> Iterator[SourceRow]:
    """Yield the elements of a JSON array without holding more than a piece of it."""
    window = JsonWindow(stream, path)
    window.next_char()
    window.position += 1  # behind the bracket
    index = 0
    if window.next_char() != "]":
        while True:
            window.next_char()
            window.move_mark()
            yield SourceRow(index, window.line, window.next_value(), window.offset)
            index += 1
            char = window.next_char()
            if char == "]":
                break
            if char != ",":
                raise window.error("not valid JSON: expecting ',' or ']'", window.position)
            window.position += 1
    window.position += 1
    if window.next_char():
        raise window.error("more text after the end of the array", window.position)


def read_json_document(stream: BinaryIO, path: Path) -> Iterator[SourceRow]:
    """Yield the rows of a JSON object that holds them in a list, or that is the only row."""
    raw = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise FineTuningError(
            f"{path} is one JSON object of more than {human_bytes(MAX_DOCUMENT_BYTES)}.",
            hint="Write so many rows as JSON Lines: one row per line.",
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise utf8_error(path, error, stream.tell() - len(raw), 1) from error
    try:
        content = make_json_decoder().decode(text)
    except (ValueError, RecursionError) as error:
        what, position = describe_json_error(error)
        if position >= len(text.rstrip()) or what == UNCLOSED:
            what += " (the file ends too early: was it cut off?)"
        line = text.count("\n", 0, position) + 1
        column = position - text.rfind("\n", 0, position)
        raise syntax_error(path, what, line, column) from error
    for index, value in enumerate(rows_of_document(content, path)):
        yield SourceRow(index, None, value, len(raw))


def rows_of_document(content: "dict[str, object]", path: Path) -> "list[object]":
    """Return the rows inside a top-level object."""
    turns = next((content[key] for key in TURN_KEYS if key in content), None)
    if any(isinstance(content.get(key), str) for key in ANSWER_KEYS) or (
        isinstance(turns, list)
        and any(isinstance(t, dict) and ("role" in t or "from" in t) for t in turns)
    ):
        return [content]
    lists = {key: value for key, value in content.items() if isinstance(value, list)}
    named = [key for key in lists if key in WRAPPER_KEYS]
    if len(lists) == 1 and (named or any(isinstance(v, dict) for v in next(iter(lists.values())))):
        return next(iter(lists.values()))
    hint = "The file must be an array of rows, JSON Lines, or an object with the rows in one list."
    if len(lists) > 1:
        raise FineTuningError(
            "{} is an object with several lists ({}), so which one holds the rows is open.".format(
                path, shorten(", ".join(lists))
            ),
            hint=hint,
        )
    raise FineTuningError(
        "{} is one JSON object without a list of rows (its keys: {}).".format(
            path, shorten(", ".join(content)) or "none"
        ),
        hint=hint,
    )


def shorten(text: str, length: int = 120) -> str:
    """Return `text` on one line, cut to `length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def shorten_middle(text: str, length: int = 600) -> str:
    """Return `text` with its middle left out where it is longer than `length` characters."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]} […] {text[-half:]}"


def looks_like_json_lines(stream: BinaryIO, path: Path) -> bool:
    """Tell from its first lines whether a file that starts with a brace has one row per line."""
    decode = make_json_decoder().decode
    lines: list[str] = []
    parsed: list[bool] = []
    for raw in read_lines(stream, path):
        text = raw.decode("utf-8", errors="replace").strip()
        if text:
            lines.append(text)
            try:
                parsed.append(isinstance(decode(text), dict))
            except (ValueError, RecursionError):
                parsed.append(False)
        if len(lines) == BROKEN_LINES_SHOWN:
            break
    if parsed[0]:
        return len(lines) > 1
    # A broken first row: an object over several lines opens with a line that is left unfinished.
    return not lines[0].endswith(("{", "[", ",")) and (lines[0].endswith("}") or any(parsed))


def read_rows(path: Path) -> Iterator[SourceRow]:
    """Yield the rows of a data file: a JSON array, JSON Lines or an object around a list.

    What the file is follows from its content, not from its name.
    Raises FineTuningError with line and column where it is none of these.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(1 << 16)
            check_is_text(path, head)
            start = 3 if head.startswith(b"\xef\xbb\xbf") else 0
            text = head[start:].lstrip(JSON_SPACE)
            stream.seek(start)
            if text.startswith(b"["):
                yield from read_json_array(stream, path)
                return
            if not text.startswith(b"{"):
                raise not_json_error(path, text)
            lines = looks_like_json_lines(stream, path)
            stream.seek(start)
            yield from (read_json_lines if lines else read_json_document)(stream, path)
    except OSError as error:
        raise FineTuningError(
            f"{path} cannot be read: {error.strerror or error}.",
            hint="Check the path and its permissions.",
        ) from error


def not_json_error(path: Path, text: bytes) -> FineTuningError:
    """Describe a text that starts with neither a bracket nor a brace."""
    try:
        start = text[:40].decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < 36:  # else only the cut fell into a character
            return utf8_error(path, error, 0, 1)
        start = text[: error.start].decode("utf-8")
    if sum(unicodedata.category(c) == "Cc" and not c.isspace() for c in start) > 2:
        return FineTuningError(
            f"{path} is a binary file, not JSON text.",
            hint="The data must be a JSON array or JSON Lines in UTF-8.",
        )
    return FineTuningError(
        f"{path} is not JSON: it starts with {shorten(start, 30)!r} instead of [ or {{.",
        hint="The data must be a JSON array or JSON Lines (convert CSV and plain text first).",
    )


# --- the checks by name


class CheckKind(NamedTuple):
    """Say what is done about the rows that a check finds, what it costs their score, and why."""

    action: Literal["drop", "repair", "warn"]
    penalty: float
    meaning: str


CHECKS = {
    # unusable rows: they lower the quality score of the set
    "not_an_object": CheckKind("drop", 1, "the row is no JSON object"),
    "unknown_shape": CheckKind("drop", 1, "the row has none of the known keys"),
    "not_text": CheckKind("drop", 1, "a number, a list or the like stands where text belongs"),
    "bad_turn": CheckKind("drop", 1, "a turn of the conversation has no known role or no text"),
    "no_answer": CheckKind("drop", 1, "the conversation does not end with the assistant"),
    "empty_instruction": CheckKind("drop", 1, "there is no question"),
    "empty_output": CheckKind("drop", 1, "there is no answer"),
    "placeholder_answer": CheckKind("drop", 1, "a placeholder stands where an answer belongs"),
    "ai_boilerplate": CheckKind("drop", 1, "another model speaks about itself in the answer"),
    "answer_repeats_question": CheckKind(
        "drop", 1, "the answer only repeats the question or input"
    ),
    "broken_encoding": CheckKind("drop", 1, "characters were lost for good (U+FFFD, surrogates)"),
    "special_tokens": CheckKind("drop", 1, "tokens of the chat format stand inside the text"),
    # usable rows that are left out
    "exact_duplicate": CheckKind("drop", 0.5, "the same row stands earlier in the file"),
    "over_length": CheckKind("drop", 0.5, "the row is longer than max_seq_length"),
    # rows that are trained on after a repair
    "placeholder_input": CheckKind("repair", 0.1, "an input such as N/A is taken as no input"),
    "mojibake": CheckKind("repair", 0.1, "text that was decoded wrongly, such as Ã© for é"),
    "control_characters": CheckKind("repair", 0.1, "control or escape characters are removed"),
    "zero_width_characters": CheckKind("repair", 0.1, "invisible characters are removed"),
    # rows to look at; they are trained on as they are
    "garbled_text": CheckKind("warn", 0.3, "looks decoded wrongly, but cannot be repaired"),
    "cut_off_answer": CheckKind("warn", 0.5, "the answer ends in the middle of a sentence"),
    "unbalanced_code_fence": CheckKind("warn", 0.3, "a code block (```) is opened and not closed"),
    "near_duplicate": CheckKind("warn", 0.3, "nearly the same row stands earlier in the file"),
    "contradiction": CheckKind("warn", 0.5, "the same question has another answer earlier"),
    "language_outlier": CheckKind("warn", 0.5, "not in the language of the other rows"),
    "length_outlier": CheckKind("warn", 0.2, "many times as long as the other rows"),
    "implausible_value": CheckKind("warn", 0.5, "a number that a plausibility rule doubts"),
    "merged_tokens": CheckKind("warn", 0, "the answer's first token joins the prompt's last"),
}
CHECK_BITS = {name: 1 << number for number, name in enumerate(CHECKS)}
Notes = list[tuple[str, str]]  # checks that a row has met, each with what was found


# --- from the shapes that people have to one question and one answer

TURN_KEYS = ("messages", "conversations", "conversation")
QUESTION_KEYS = ("instruction", "prompt", "question")
INPUT_KEYS = ("input", "context")
ANSWER_KEYS = ("output", "completion", "response", "answer")
SYSTEM_KEYS = ("system", "system_prompt")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}


class RowRejectedError(Exception):
    """Say why a row cannot be used: names of checks, each with what was found."""

    def __init__(self, *problems: "tuple[str, str]") -> None:
        super().__init__("; ".join(detail for _, detail in problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Conversation:
    """Hold one usable row: the messages up to the answer, and the answer that is trained."""

    row: int
    line: "int | None"
    messages: "list[dict[str, str]]"
    question: str  # all turns that the answer answers, without the system message
    answer: str
    notes: Notes


def name_type(value: object) -> str:
    """Name the JSON type of a value that is not text."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, float):
        return "NaN" if value != value else "a number"
    return {dict: "an object", list: "a list", type(None): "null"}.get(type(value), "no text")


# Escape sequences and control characters (not tab and newline), and characters that only hide:
# zero-width space, word joiner, byte order mark and soft hyphen; zero-width (non-)joiners only
# between Latin letters, since other scripts and emoji need them.
CONTROL_CHARACTERS = re.compile("\x1b\\[[0-9;]*[A-Za-z]|[\0-\x08\x0b-\x1f\x7f-\x84\x86-\x9f]")
ZERO_WIDTH = re.compile("[\u200b\u2060\ufeff\u00ad]|(?<=[A-Za-z])[\u200c\u200d](?=[A-Za-z])")
INVISIBLE = "\u200b\u2060\ufeff"
UNUSUAL = re.compile("[^\0-\x7f‘’“”–—…•]")  # such as wrong decoding leaves behind
LOST_CHARACTERS = re.compile("[\ud800-\udfff\ufffd]")
LINE_ENDS = re.compile("\r\n?|[\u0085\u2028\u2029]")


def repair_text(text: str, name: str, notes: Notes) -> str:
    """Return text without wrong decoding and characters that nobody sees; note what was done."""
    for check, pattern in (
        ("control_characters", CONTROL_CHARACTERS),
        ("zero_width_characters", ZERO_WIDTH),
    ):
        found = pattern.search(text)
        if found:
            text, count = pattern.subn("", text)
            code = ", ".join(f"U+{ord(c):04X}" for c in found.group())
            notes.append((check, f"{name}: {count} removed ({code})"))
    if text.isascii() or not UNUSUAL.search(text):
        return text
    from ftfy import fix_encoding
    from ftfy.badness import is_bad

    if is_bad(text):
        repaired = fix_encoding(text)
        if repaired == text:
            notes.append(("garbled_text", f"{name}: {shorten(text, 60)}"))
        else:
            notes.append(("mojibake", f"{name}: {shorten(text, 40)} -> {shorten(repaired, 40)}"))
        return repaired
    return text


def take_text(value: object, name: str, notes: Notes) -> str:
    """Return a field as text, repaired and with nothing around it; reject anything else."""
    if not isinstance(value, str):
        raise RowRejectedError(("not_text", f"{name} is {name_type(value)}, not text"))
    if not value.isascii() or CONTROL_CHARACTERS.search(value):
        lost = LOST_CHARACTERS.search(value)
        if lost:
            raise RowRejectedError(
                ("broken_encoding", f"{name} holds U+{ord(lost.group()):04X} for a lost character")
            )
        # At the ends of a text, invisible characters are as harmless as white space.
        value = repair_text(
            LINE_ENDS.sub("\n", value).lstrip(INVISIBLE).rstrip(INVISIBLE + " \n\t"), name, notes
        )
    text = value.strip()
    if "\n" in text and value.lstrip("\n").startswith(("  ", "\t")):  # code may start indented
        return value.lstrip("\n").rstrip()
    return text


def read_turn(turn: object, number: int, notes: Notes) -> "dict[str, str]":
    """Return one turn ({"role", "content"} or {"from", "value"}) as a message."""
    if not isinstance(turn, dict):
        raise RowRejectedError(("bad_turn", f"turn {number} is {name_type(turn)}"))
    said = turn.get("role", turn.get("from"))
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        shown = shorten(said, 30) if isinstance(said, str) else name_type(said)
        raise RowRejectedError(("bad_turn", f"turn {number} has the role {shown!r}"))
    content = turn.get("content", turn.get("value", turn.get("text")))
    if isinstance(content, list):  # OpenAI's parts: texts can be joined, pictures cannot
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(part, str) for part in parts):
            content = "".join(str(part) for part in parts)
    return {"role": role, "content": take_text(content, f"turn {number}", notes)}


def read_turns(turns: object, name: str, notes: Notes) -> "list[dict[str, str]]":
    """Return a list of turns as messages."""
    if not isinstance(turns, list):
        raise RowRejectedError(("not_text", f"{name} is {name_type(turns)}, not a list of turns"))
    return [read_turn(turn, number, notes) for number, turn in enumerate(turns, 1)]


def split_turns(messages: "list[dict[str, str]]") -> "tuple[list[dict[str, str]], str]":
    """Return the messages before the last answer, and that answer."""
    if not messages:
        raise RowRejectedError(("empty_instruction", "there are no turns"))
    if messages[-1]["role"] != "assistant":
        raise RowRejectedError(
            ("no_answer", "the last turn is the {}'s".format(messages[-1]["role"]))
        )
    if any(m["role"] == "system" for m in messages[1:]):
        raise RowRejectedError(("bad_turn", "a system message stands after the first turn"))
    if messages[0] == {"role": "system", "content": ""}:
        messages = messages[1:]
    problems = []
    if not any(m["role"] == "user" and m["content"] for m in messages):
        problems.append(("empty_instruction", "the user says nothing"))
    elif not all(m["content"] for m in messages[:-1]):
        problems.append(("bad_turn", "a turn before the answer is empty"))
    if not messages[-1]["content"]:
        problems.append(("empty_output", "the last answer is empty"))
    if problems:
        raise RowRejectedError(*problems)
    return messages[:-1], messages[-1]["content"]


PLACEHOLDER_INPUT = re.compile(
    r"\W*(?:no\s?input|none|n\s?/\s?a|null|nan|nil|not applicable)\W*", re.IGNORECASE
)


def read_fields(row: "dict[str, object]", notes: Notes) -> "tuple[list[dict[str, str]], str]":
    """Return question and answer of a row with named fields, such as Alpaca's."""
    question_key = next((k for k in QUESTION_KEYS if k in row), None)
    answer_key = next((k for k in ANSWER_KEYS if k in row), None)
    input_key = next((k for k in INPUT_KEYS if row.get(k) is not None), None)
    problems: Notes = []
    texts = {"instruction": "", "input": "", "output": ""}
    for part, key in (("instruction", question_key), ("input", input_key), ("output", answer_key)):
        if key is not None and row[key] is not None:
            try:
                texts[part] = take_text(row[key], key, notes)
            except RowRejectedError as error:
                problems += error.problems
                continue
        if not texts[part] and part != "input":
            what = "null" if key is not None and row[key] is None else "empty"
            problems.append((f"empty_{part}", f"{key} is {what}" if key else f"no {part}"))
    if problems:
        raise RowRejectedError(*problems)
    if PLACEHOLDER_INPUT.fullmatch(texts["input"]):
        notes.append(("placeholder_input", f"{input_key}: {shorten(texts['input'], 40)}"))
        texts["input"] = ""
    question = "\n\n".join(t for t in (texts["instruction"], texts["input"]) if t)
    return [{"role": "user", "content": question}], texts["output"]


def read_prompt_turns(row: "dict[str, object]", notes: Notes) -> "list[dict[str, str]] | None":
    """Return the turns of a prompt/completion row whose fields are lists of messages, else None."""
    prompt = row.get("prompt")
    if not isinstance(prompt, list):
        return None
    key = next((k for k in ANSWER_KEYS if k in row), "completion")
    answer = row.get(key)
    messages = read_turns(prompt, "prompt", notes)
    if isinstance(answer, list):
        return messages + read_turns(answer, key, notes)
    return [*messages, {"role": "assistant", "content": take_text(answer, key, notes)}]


def read_conversation(source: SourceRow, system_prompt: "str | None") -> Conversation:
    """Return the conversation in a row of any known shape; raise RowRejectedError otherwise."""
    row = source.value
    notes: Notes = []
    if not isinstance(row, dict):
        raise RowRejectedError(("not_an_object", f"the row is {name_type(row)}, not an object"))
    turn_key = next((k for k in TURN_KEYS if k in row), None)
    if turn_key:
        turns: list[dict[str, str]] | None = read_turns(row[turn_key], turn_key, notes)
    else:
        turns = read_prompt_turns(row, notes)
    if turns is not None:
        messages, answer = split_turns(turns)
    elif any(k in row for k in QUESTION_KEYS + ANSWER_KEYS):
        messages, answer = read_fields(row, notes)
    else:
        keys = shorten(", ".join(map(str, row))) or "none"
        raise RowRejectedError(("unknown_shape", f"none of the known keys (it has: {keys})"))
    own = next((row[k] for k in SYSTEM_KEYS if row.get(k) is not None), system_prompt)
    if own is not None and messages[0]["role"] != "system":
        text = take_text(own, "system", notes)
        if text:
            messages = [{"role": "system", "content": text}, *messages]
    question = "\n\n".join(m["content"] for m in messages if m["role"] != "system")
    return Conversation(source.row, source.line, messages, question, answer, notes)


# --- what is wrong inside the texts

PLACEHOLDER_ANSWER = re.compile(
    r"\W*(?:<?no\s?(?:output|answer|response)>?|n\s?/\s?a|null|nan|tb[dc]|(?-i:TODO)|placeholder"
    r"|\[.{0,20}(?:answer|response|output).{0,20}\]|lorem ipsum\b.*)\W*|[.…_-]{3,}|…",
    re.IGNORECASE | re.DOTALL,
)
# Left over where a value was missing ("tuition is $nan"), or a field of a data set was not filled.
PLACEHOLDER_INSIDE = re.compile(
    r"<\s?no\s?(?:input|output)\s?>|[$€£]\s?(?:nan|NaN|None|null)\b|\b(?:nan|NaN|None|null)\s?(?:%|percent\b)"
)
AI_BOILERPLATE = re.compile(
    r"\b(?:as|being) an? (?:(?:ai|artificial intelligence)(?: language)? (?:model|assistant"
    r"|chatbot)|(?:large )?language model)\b|\bas an ai,",
    re.IGNORECASE,
)


def special_marks(tokenizer: "PreTrainedTokenizerFast") -> "re.Pattern[str]":
    """Return a pattern of the tokens and tags that the chat format itself is made of."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    marks = set(tokenizer.all_special_tokens)
    for messages in (turns, [{"role": "system", "content": "c"}, *turns]):
        with contextlib.suppress(FineTuningError):  # some templates take no system message
            text = render_chat(tokenizer, messages, add_generation_prompt=True)
            marks.update(re.findall(r"<<[^<>\s]+>>|<[^<>\s]+>|\[/?[A-Z_]+\]", text))
    return re.compile("|".join(map(re.escape, sorted(filter(None, marks), key=len, reverse=True))))


def plain_words(text: str) -> str:
    """Return the words of a text without case and punctuation, a space between them."""
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return re.sub(r"\W+", " ", text.casefold()).strip() or text


def same_words(text: str, other: str) -> bool:
    """Tell whether two texts of at least two words differ in nothing but case and punctuation."""
    if not 0.8 < len(text) / max(1, len(other)) < 1.25:
        return False
    words = plain_words(text)
    return text == other or (" " in words and words == plain_words(other))


def check_texts(conversation: Conversation, marks: "re.Pattern[str]") -> None:
    """Raise RowRejectedError where a text cannot be trained on, whatever the other rows are."""
    answer = conversation.answer
    for number, message in enumerate([*conversation.messages, {"content": answer}], 1):
        found = marks.search(message["content"])
        if found:
            where = "the answer" if number > len(conversation.messages) else f"turn {number}"
            raise RowRejectedError(("special_tokens", f"{where} holds {found.group()!r}"))
    if PLACEHOLDER_ANSWER.fullmatch(answer):
        raise RowRejectedError(("placeholder_answer", f"the answer is {shorten(answer, 40)!r}"))
    for text in (answer, conversation.question):
        # Plain searches first: every row passes here, and regular expressions are slow.
        nothing = any(map(text.__contains__, ("put", "nan", "NaN", "None", "null")))
        inside = PLACEHOLDER_INSIDE.search(text) if nothing else None
        if inside:
            raise RowRejectedError(("placeholder_answer", f"the row holds {inside.group()!r}"))
    about = "odel" in answer or "AI" in answer or " ai" in answer
    boilerplate = AI_BOILERPLATE.search(answer, 0, 300) if about else None
    if boilerplate:
        raise RowRejectedError(("ai_boilerplate", f"the answer says {boilerplate.group()!r}"))
    question = conversation.messages[-1]["content"]
    asked, _, given = question.partition("\n\n")
    # Editing tasks may return their input with other punctuation: those are answers.
    if answer == given or same_words(answer, question) or same_words(answer, asked):
        raise RowRejectedError(("answer_repeats_question", f"{shorten(answer, 60)!r}"))


# What no sentence ends with.
OPEN_END = re.compile(
    r"[,(\[]$|\s(?:the|an?|of|and|or|to|with|in|is|are|was|were|for|that|by|as|at|from|which|but"
    r"|because|its|their|this|be|has|have|your|his|her|can|will|would|should|into|than|if|when"
    r"|while|such)$"
)
CODE = re.compile(r"[=<>{}|\\]|\bdef\b|\breturn\b|\(\)")
# Lists, titles, quotations with their author, links and hashtags end without a full stop, too.
NOT_PROSE = re.compile(r"[#/@_]|(?:^|\s)[-–—]|www\.|\d\. ")
LIST_ITEM = re.compile(r"(?:[-*•–>|#]|\(?\w{1,3}[.):]\s|[A-Z][\w ]{0,30}:)")
SENTENCE_END = re.compile(r"(?<=[a-z)\"'’”][.!?])[\"')\]”’]?\s+")


def breaks_off(answer: str) -> bool:
    """Tell whether an answer ends in the middle of a sentence."""
    if not answer[-1].isalnum() and answer[-1] not in ",([":
        return False
    lines = [line.strip() for line in answer.split("\n") if line.strip()]
    last = lines[-1]
    if len(answer.split()) < 5 or "```" in answer or CODE.search(last):
        return False
    if OPEN_END.search(last) and sum(word.isalpha() for word in last.split()) > 2:
        return True
    sentence = SENTENCE_END.split(last)[-1]
    words = sentence.split()
    if not answer[-1].isalnum() or not words or NOT_PROSE.search(sentence):
        return False
    if len(words) > 2 and sum(w[0].islower() for w in words) * 2 < len(words):  # a title, names
        return False
    if sentence != last:  # finished sentences stand before it
        return not LIST_ITEM.match(last)
    if len(lines) > 2 and all(line[-1] in ".!?" for line in lines[:-1]):
        return True
    return len(lines) == 1 and len(words) >= 12 and not LIST_ITEM.match(last)


class PlausibilityRule(NamedTuple):
    """Doubt numbers in sentences about a subject: those above `above` and below `below`."""

    name: str
    subject: "re.Pattern[str]"
    unless: "re.Pattern[str] | None"
    number: "re.Pattern[str]"
    above: float
    below: float
    meaning: str


# What --plausibility_rules FILE replaces; the file holds a list of such objects.
PLAUSIBILITY_RULES: "list[dict[str, object]]" = [
    {
        "name": "rate_below_one_percent",
        "subject": r"\b(?:admissions?|admit|acceptance|graduation)[\w\s-]{0,20}"
        r"(?:rates?|share|percentage)\b|\b(?:rate|share|percentage|percent|%|proportion) of "
        r"[^.]{0,40}\b(?:admi|accept|applica|graduat)"
        r"|\b(?:admit|accept|graduate)(?:s|ted|ed|d)?\b[^.]{0,40}(?:%|percent) of\b",
        "unless": r"\b(?:rose|fell|grew|increas|decreas|declin|drop|chang|differ|fee|interest|loan)"
        r"|points?\b",
        "after": r"\s?(?:%|percent\b|per cent\b)",
        "above": 0,
        "below": 1,
        "meaning": "probably 100 times too small",
    },
    {
        "name": "rate_below_one_percent_as_fraction",
        "subject": r"\b(?:admissions?|admit|acceptance|graduation)\s(?:rate|share|percentage)\b",
        "after": r"(?![\d.,]*\s?(?:%|percent|per cent|points?))",
        "above": 0,
        "below": 0.01,
        "meaning": "probably 100 times too small",
    },
]


def load_plausibility_rules(path: "str | None") -> "list[PlausibilityRule]":
    """Compile the built-in rules, or those of a JSON file; refuse a wrong one."""
    entries: object = PLAUSIBILITY_RULES
    if path:
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise FineTuningError(
                f"The plausibility rules {path} cannot be read: {first_line(error)}",
                hint="The file must hold a JSON list of rules; the README shows one.",
            ) from error
    if not isinstance(entries, list):
        raise FineTuningError(f"The plausibility rules {path} must be a JSON list.")
    return [compile_rule(entry, f"{path}, rule {i}") for i, entry in enumerate(entries, 1)]


def compile_rule(entry: object, where: str) -> PlausibilityRule:
    """Compile one rule; raise FineTuningError naming what is wrong with it."""
    texts = {"name": "", "subject": "", "unless": "", "before": "", "after": "", "meaning": ""}
    bounds = {"above": -math.inf, "below": math.inf}
    if not isinstance(entry, dict):
        raise FineTuningError(f"{where} must be an object.")
    for key, value in entry.items():
        if key in texts and isinstance(value, str):
            texts[key] = value
        elif key in bounds and isinstance(value, (int, float)) and not isinstance(value, bool):
            bounds[key] = value
        else:
            raise FineTuningError(
                f"{where}: {key!r} is not a known key with a fitting value.",
                hint="Texts: {}. Numbers: {}.".format(", ".join(texts), ", ".join(bounds)),
            )
    if not texts["name"] or not texts["subject"]:
        raise FineTuningError(f"{where}: it needs a name and a subject.")
    number = r"(?<![\d.,])(\d[\d,]*(?:\.\d+)?|\.\d+)"
    try:
        return PlausibilityRule(
            texts["name"],
            re.compile(texts["subject"], re.IGNORECASE),
            re.compile(texts["unless"], re.IGNORECASE) if texts["unless"] else None,
            re.compile(texts["before"] + number + texts["after"], re.IGNORECASE),
            bounds["above"],
            bounds["below"],
            texts["meaning"] or "implausible",
        )
    except re.error as error:
        raise FineTuningError(f"{where}: not a regular expression: {error}") from error


def find_implausible(text: str, rules: "Sequence[PlausibilityRule]") -> "str | None":
    """Return the first doubtful number of a text with its rule and sentence, or None."""
    if not re.search(r"\d", text):
        return None
    for rule in rules:
        if not rule.subject.search(text) or not rule.number.search(text):
            continue
        for sentence in re.split(r"(?<=[.!?])\s+|\n", text):
            if not rule.subject.search(sentence) or (rule.unless and rule.unless.search(sentence)):
                continue
            for match in rule.number.finditer(sentence):
                if rule.above < float(match.group(1).replace(",", "")) < rule.below:
                    return f"{rule.name}: {shorten(sentence, 90)} ({rule.meaning})"
    return None


# Words (of at most six letters) that are in nearly every sentence of a language, seldom in another.
LANGUAGES = {
    "English": "the of and to is that it with for are was this be as you have from they which",
    "Spanish": "el los las una del que por con para es está como más pero sus muy también y",
    "French": "les des une est dans pour que qui sur avec pas sont ce cette aux du et nous vous",
    "German": "der die das und ist nicht ein eine den dem mit für auf von zu sich auch wird sind",
    "Italian": "il lo gli della che per una sono con di è nel anche più come questo alla dei",
    "Portuguese": "os uma do da em para com não que mais como dos são ao pela seu sua você e",
    "Dutch": "het een van en niet dat zijn voor met ook maar wordt deze aan bij naar door",
}
LANGUAGE_WORDS = [frozenset(words.split()) for words in LANGUAGES.values()]
ALL_LANGUAGE_WORDS = frozenset[str]().union(*LANGUAGE_WORDS)
SCRIPTS = {
    "Chinese or Japanese": "\u3040-\u30ff\u3400-\u9fff",
    "Korean": "\uac00-\ud7af",
    "Cyrillic": "\u0400-\u04ff",
    "Arabic": "\u0600-\u06ff",
    "Hebrew": "\u0590-\u05ff",
    "Greek": "\u0370-\u03ff",
    "Indic": "\u0900-\u0dff",
    "Thai": "\u0e00-\u0e7f",
}
SCRIPT_LETTERS = {name: re.compile(f"[{letters}]") for name, letters in SCRIPTS.items()}
LANGUAGE_NAMES = ["unknown", *LANGUAGES, *SCRIPTS]
# A question that itself speaks of languages may well be answered in another one.
ABOUT_LANGUAGE = frozenset(  # as word stems
    re.findall(
        r"\w+",
        "transl langua biling foreig spanis french german italia portug dutch latin chines mandar "
        "japane korean russia ukrain arabic hebrew greek hindi thai turkis polish swedis danish "
        "norweg finnis czech hungar romani vietna indone malay tagalo catala irish welsh croati "
        "serbia bulgar slovak slovan lithua latvia eston iceland persia farsi urdu bengal tamil "
        "punjab swahil zulu somali amhari sanskr yiddis hawaii armeni georgi mongol nepali",
    )
)


def detect_language(text: str, stems: "set[str]") -> int:
    """Return the place in LANGUAGE_NAMES of a text's language, 0 where it is not clear."""
    if not text.isascii():
        for name, letters in SCRIPT_LETTERS.items():
            if len(letters.findall(text)) * 3 > len(text):
                return LANGUAGE_NAMES.index(name)
    frequent = stems & ALL_LANGUAGE_WORDS
    if len(stems) < 6 or len(frequent) < 3:
        return 0
    hits = [len(frequent & words) for words in LANGUAGE_WORDS]
    best = max(hits)
    clear = best >= 3 and best * 8 >= len(stems) and sorted(hits)[-2] * 2 <= best
    return hits.index(best) + 1 if clear else 0


# --- tokens: rendered and tokenized exactly as they will be served

# TinyLlama-Chat's (Zephyr's) format, for tokenizers that bring no template of their own.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def load_tokenizer(model_name: str) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of `model_name` (a hub id or a local folder) as llama.cpp will see it.

    AutoTokenizer of transformers 5 rebuilds Llama tokenizers and then splits the text after `</s>`
    differently from tokenizer.json and llama.cpp, so tokenizer.json is read as it is.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(model_name)
        except (
            OSError,
            ValueError,
            TypeError,
        ):  # no tokenizer.json: converted from tokenizer.model
            tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=False)
            log.info("%s has no tokenizer.json; its tokenizer was converted", model_name)
    except (OSError, ValueError, ImportError) as error:
        raise FineTuningError(
            f"The tokenizer of {model_name} cannot be loaded: {first_line(error)}",
            hint="Check model_name: a Hugging Face id, or a folder with config.json, "
            "model.safetensors and tokenizer.json.",
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise FineTuningError(
            f"The tokenizer of {model_name} exists in Python only, not as a tokenizer.json.",
            hint="Choose a base model with a tokenizer.json, as nearly all have.",
        )
    tokenizer.backend_tokenizer.no_truncation()  # some tokenizer.json cut or pad on their own
    tokenizer.backend_tokenizer.no_padding()
    if tokenizer.eos_token_id is None:
        raise FineTuningError(
            f"The tokenizer of {model_name} has no end-of-sequence token, so no model could learn "
            "where an answer ends.",
            hint="Choose a base model whose tokenizer has an eos_token.",
        )
    if tokenizer.chat_template is None:
        log.info("%s has no chat template: TinyLlama's is used", model_name)
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def render_chats(
    tokenizer: "PreTrainedTokenizerFast",
    conversations: "Sequence[Sequence[dict[str, str]]]",
    *,
    add_generation_prompt: bool,
) -> "list[str]":
    """Render conversations (lists of {"role", "content"}) with the chat template."""
    from jinja2.exceptions import TemplateError

    try:
        texts = tokenizer.apply_chat_template(
            [list(messages) for messages in conversations],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except TemplateError as error:
        raise FineTuningError(
            f"The model's chat template refuses these messages: {first_line(error)}",
            hint="Some templates take no system message, or only alternating turns.",
        ) from error
    assert isinstance(texts, list)
    return [str(text) for text in texts]


def render_chat(
    tokenizer: "PreTrainedTokenizerFast",
    messages: "Sequence[dict[str, str]]",
    *,
    add_generation_prompt: bool,
) -> str:
    """Render messages ({"role", "content"}) with the chat template: the text that is served."""
    return render_chats(tokenizer, [messages], add_generation_prompt=add_generation_prompt)[0]


def finish_ids(
    tokenizer: "PreTrainedTokenizerFast", ids: "list[int]", text: str, bos_written: bool
) -> "list[int]":
    """Return the ids of `text` with the BOS that it wrote, without an end token that it did not."""
    if bos_written and ids[:1] != [tokenizer.bos_token_id]:
        ids = [*tokenizer(str(tokenizer.bos_token), add_special_tokens=False)["input_ids"], *ids]
    # Some tokenizers put an end token behind every text: behind a prompt it would end the answer.
    eos = tokenizer.eos_token_id
    ends = 1 if text.endswith(str(tokenizer.eos_token)) else 0
    while len(ids) > ends and ids[-1 - ends :] == [eos] * (ends + 1):
        ids = ids[:-1]
    return ids


def tokenize_rendered(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Tokenize rendered text as llama.cpp does, with special tokens and never two BOS."""
    return tokenize_all(tokenizer, [text])[0]


def tokenize_all(tokenizer: "PreTrainedTokenizerFast", texts: "list[str]") -> "list[list[int]]":
    """Tokenize many rendered texts, each as `tokenize_rendered` does."""
    bos = str(tokenizer.bos_token or "")
    written = [bool(bos) and text.startswith(bos) for text in texts]
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(
        [t.removeprefix(bos) if w else t for t, w in zip(texts, written, strict=True)]
    )
    return [
        finish_ids(tokenizer, encoding.ids, text, w)
        for encoding, text, w in zip(encodings, texts, written, strict=True)
    ]


ANSWER_MARK = "\u2063answer\u2063"  # stands in for an answer; no template or data contains it


def cut_completion(
    tokenizer: "PreTrainedTokenizerFast", conversation: Conversation, prompt: str, full: str
) -> str:
    """Return what the model has to write after `prompt`: the answer and the end token behind it.

    Templates end a turn in different ways: an end token and a newline (cut off: it is never
    generated), a marker without the end token (it is added), or nothing.
    """
    if not full.startswith(prompt):
        # The template renders earlier text differently once an answer follows, so a stand-in tells
        # where the answer lies.
        marked = render_chat(
            tokenizer,
            [*conversation.messages, {"role": "assistant", "content": ANSWER_MARK}],
            add_generation_prompt=False,
        )
        prompt = marked.partition(ANSWER_MARK)[0]
    rest = full[len(prompt) :]
    start = rest.find(conversation.answer)
    if start < 0 or not full.startswith(prompt):
        raise FineTuningError(
            f"The model's chat template changes the answer of row {conversation.row}, "
            "so what would be trained is not what the row says.",
            hint="Choose a base model with a template that keeps text as it is.",
        )
    end = start + len(conversation.answer)
    eos = str(tokenizer.eos_token)
    at = rest.find(eos, end)
    return rest[: at + len(eos)] if at >= 0 else rest[:end] + rest[end:].rstrip() + eos


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Hold one row in tokens: the prompt (`prompt_length` of them), the answer, the end token."""

    conversation: Conversation
    prompt: str
    completion: str
    ids: "list[int]"
    prompt_length: int
    merged: bool


def encode_batch(
    tokenizer: "PreTrainedTokenizerFast", batch: "Sequence[Conversation]"
) -> "list[EncodedRow]":
    """Render and tokenize conversations; the prompt's tokens are those that chat will send."""
    prompts = render_chats(tokenizer, [c.messages for c in batch], add_generation_prompt=True)
    turns = [[*c.messages, {"role": "assistant", "content": c.answer}] for c in batch]
    whole = render_chats(tokenizer, turns, add_generation_prompt=False)
    completions = [
        cut_completion(tokenizer, conversation, prompt, full)
        for conversation, prompt, full in zip(batch, prompts, whole, strict=True)
    ]
    texts = [p + c for p, c in zip(prompts, completions, strict=True)]
    rows = []
    for conversation, prompt, completion, prompt_ids, ids in zip(
        batch,
        prompts,
        completions,
        tokenize_all(tokenizer, prompts),
        tokenize_all(tokenizer, texts),
        strict=True,
    ):
        merged = ids[: len(prompt_ids)] != prompt_ids
        if merged:
            ids = prompt_ids + tokenize_after(tokenizer, prompt_ids, completion, ids)
        rows.append(EncodedRow(conversation, prompt, completion, ids, len(prompt_ids), merged))
    return rows


def tokenize_after(
    tokenizer: "PreTrainedTokenizerFast",
    prompt_ids: "list[int]",
    completion: str,
    whole_ids: "list[int]",
) -> "list[int]":
    """Tokenize a completion by itself, where its first token would merge with the prompt's last.

    A tokenizer may put a space in front of a text; behind an anchor it does not.
    """

    def decode(ids: "list[int]") -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    wanted = decode(whole_ids)
    for anchor in ("", "\n", "."):
        anchor_ids = tokenizer(anchor, add_special_tokens=False)["input_ids"] if anchor else []
        ids = tokenizer(anchor + completion, add_special_tokens=False)["input_ids"]
        if ids[: len(anchor_ids)] == anchor_ids:
            ids = ids[len(anchor_ids) :]
            if decode(prompt_ids + ids) == wanted:
                return ids
    raise FineTuningError(
        "The model's tokenizer cannot continue its own prompt: "
        f"{shorten(completion, 60)!r} reads differently after it.",
        hint="Choose a base model with an ordinary BPE or SentencePiece tokenizer.",
    )


# --- the stream: every row is read, checked, tokenized and stored once

EXAMPLES_FILE, PLAN_FILE, REPORT_FILE = "examples.arrow", "plan.npz", "report.json"
MANIFEST_FILE = "manifest.json"
STEMS_FILE, BANDS_FILE = "stems.bin", "bands.bin"
PREPARING_PACKAGES = ("datasets", "tokenizers", "transformers", "rensa", "ftfy", "numpy")
BATCH_ROWS = 1000
BATCH_CHARACTERS = 4_000_000  # so that long rows do not pile up in memory
ENCODERS = 2  # threads that tokenize while the next rows are read
EXAMPLE_COLUMNS = ("row", "prompt", "answer", "input_ids", "prompt_length")
MAX_LISTED_ROWS = 100_000  # per list of quality_report.json; the counts are always complete
ROWS_SHOWN, EXAMPLES_SHOWN = 1000, 3  # per check
# A row of more characters cannot fit in a token limit: no token of a text is as long on average.
MAX_CHARACTERS_PER_TOKEN = 50
# Words of little meaning: what questions are about is in the others.
STEM = re.compile(r"\b\w{1,6}")
STOP_STEMS = frozenset(
    STEM.findall(
        "a an the of in on at to for from by with and or but if is are was were be been being do "
        "does did have has had can could will would should shall may might must i you he she it "
        "we they me my your his her its our their this that these those what which who whom whose "
        "when where why how as not no yes so than then there here about into over under up down "
        "out off please tell explain describe give",
    )
)


@dataclass
class Finding:
    """Collect what one check has found."""

    count: int = 0
    rows: "list[int]" = field(default_factory=list)  # the first ones
    examples: "list[dict[str, Any]]" = field(default_factory=list)


@dataclass
class Tally:
    """Collect what the rows turn out to be while they stream by."""

    total: int = 0
    valid: int = 0
    question_chars: int = 0
    answer_chars: int = 0
    answer_tokens: int = 0
    lost_tokens: int = 0
    longest: int = 0
    dropped_examples: int = 0
    truncated_examples: int = 0
    findings: "dict[str, Finding]" = field(default_factory=dict)
    rejected: "list[dict[str, Any]]" = field(default_factory=list)
    dropped: "list[dict[str, Any]]" = field(default_factory=list)
    truncated: "list[dict[str, Any]]" = field(default_factory=list)
    overlong_rows: "array[int]" = field(default_factory=lambda: array("q"))
    overlong_characters: "array[int]" = field(default_factory=lambda: array("q"))

    def note(self, check: str, row: int, detail: str) -> None:
        """Count a row under a check."""
        finding = self.findings.setdefault(check, Finding())
        finding.count += 1
        if len(finding.rows) < ROWS_SHOWN:
            finding.rows.append(row)
        if len(finding.examples) < EXAMPLES_SHOWN:
            finding.examples.append({"row": row, "detail": detail})

    def drop(self, check: str, row: int, line: "int | None", detail: str) -> None:
        """Count a usable row that is left out."""
        self.dropped_examples += 1
        self.note(check, row, detail)
        list_row(self.dropped, row, line, check, detail)


def list_row(
    rows: "list[dict[str, Any]]", row: int, line: "int | None", reason: str, detail: str
) -> None:
    """Append a row to a list of the report, as long as that keeps a sane size."""
    if len(rows) < MAX_LISTED_ROWS:
        place = {} if line is None else {"line": line}
        rows.append({"row": row, **place, "reason": reason, "detail": detail})


@dataclass
class Columns:
    """Hold what is known about each stored example, in arrays: millions of rows have to fit.

    Keys are hashes of eight bytes; `stems` (in a file) are hashes of the row's word stems, each
    once, `stem_counts` says how many of them belong to a row.
    """

    row: "array[int]" = field(default_factory=lambda: array("q"))
    line: "array[int]" = field(default_factory=lambda: array("q"))  # 0: unknown
    characters: "array[int]" = field(default_factory=lambda: array("q"))
    checks: "array[int]" = field(default_factory=lambda: array("Q"))  # CHECK_BITS
    language: "array[int]" = field(default_factory=lambda: array("b"))  # in LANGUAGE_NAMES
    about_language: "array[int]" = field(default_factory=lambda: array("b"))
    row_key: "array[int]" = field(default_factory=lambda: array("Q"))
    question_key: "array[int]" = field(default_factory=lambda: array("Q"))
    answer_key: "array[int]" = field(default_factory=lambda: array("Q"))
    stem_counts: "array[int]" = field(default_factory=lambda: array("i"))
    length: "array[int]" = field(default_factory=lambda: array("i"))  # tokens
    prompt_length: "array[int]" = field(default_factory=lambda: array("i"))


@dataclass(frozen=True)
class Preparation:
    """Hold what every step of the stream needs."""

    config: FineTuningConfig
    tokenizer: "PreTrainedTokenizerFast"
    limit: int  # tokens
    marks: "re.Pattern[str]"
    rules: "list[PlausibilityRule]"
    tally: Tally
    columns: Columns


def digest(*texts: str) -> int:
    """Return eight bytes, as a number, that stand for some texts."""
    return int.from_bytes(
        hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest(), "little"
    )


def note_warnings(conversation: Conversation, rules: "Sequence[PlausibilityRule]") -> None:
    """Add to a row's notes what a person should look at."""
    answer, notes = conversation.answer, conversation.notes
    if breaks_off(answer):
        notes.append(("cut_off_answer", f"ends with {answer[-60:]!r}"))
    if "```" in answer and len(re.findall(r"^\s*```", answer, re.MULTILINE)) % 2:
        notes.append(("unbalanced_code_fence", f"ends with {answer[-60:]!r}"))
    found = find_implausible(answer, rules) or find_implausible(conversation.question, rules)
    if found:
        notes.append(("implausible_value", found))


def usable_rows(path: Path, prep: Preparation, progress: Progress) -> Iterator[Conversation]:
    """Yield the conversations of a file; rows that hold none are noted with their reasons."""
    tally = prep.tally
    for source in read_rows(path):
        tally.total += 1
        try:
            conversation = read_conversation(source, prep.config.system_prompt)
            check_texts(conversation, prep.marks)
        except RowRejectedError as error:
            for check, detail in error.problems:
                tally.note(check, source.row, detail)
            list_row(tally.rejected, source.row, source.line, error.problems[0][0], str(error))
            continue
        tally.valid += 1
        tally.question_chars += len(conversation.question)
        tally.answer_chars += len(conversation.answer)
        note_warnings(conversation, prep.rules)
        if not tally.valid % 100:
            progress.move_to(source.bytes_read)
        yield conversation


def batches_of_rows(rows: Iterator[Conversation]) -> "Iterator[list[Conversation]]":
    """Yield rows in lists of bounded length and text."""
    batch: list[Conversation] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.answer) + len(row.question)
        if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode_ahead(
    prep: Preparation, batches: "Iterator[list[Conversation]]"
) -> "Iterator[list[EncodedRow]]":
    """Yield batches in tokens, in order; threads tokenize while the next rows are read."""
    too_long = prep.limit * MAX_CHARACTERS_PER_TOKEN
    waiting: deque[concurrent.futures.Future[list[EncodedRow]]] = deque()
    with concurrent.futures.ThreadPoolExecutor(ENCODERS, "tokenize") as pool:
        for batch in batches:
            fitting = []
            for row in batch:
                if len(row.answer) + len(row.question) > too_long:
                    drop_unread(row, prep)
                else:
                    fitting.append(row)
            waiting.append(pool.submit(encode_batch, prep.tokenizer, fitting))
            if len(waiting) > ENCODERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def drop_overlong(row: Conversation, what: str, tally: Tally) -> None:
    """Leave out a row that is longer than max_seq_length."""
    tally.overlong_rows.append(row.row)
    tally.overlong_characters.append(len(row.question) + len(row.answer))
    tally.drop("over_length", row.row, row.line, what)


def drop_unread(row: Conversation, prep: Preparation) -> None:
    """Leave out a row that is too long to be worth tokenizing; its loss is estimated."""
    tokens = len(row.answer) // 4
    prep.tally.answer_tokens += tokens
    prep.tally.lost_tokens += tokens
    characters = len(row.question) + len(row.answer)
    drop_overlong(row, f"{characters} characters, far more than {prep.limit} tokens", prep.tally)


def fit_length(row: EncodedRow, prep: Preparation) -> "list[int] | None":
    """Return the row's tokens within the limit, or None where it is left out; count what is lost.

    A truncated row has no end token: it must not teach to stop in the middle of a sentence.
    """
    tally, where = prep.tally, row.conversation
    answer_tokens = len(row.ids) - row.prompt_length
    tally.answer_tokens += answer_tokens
    tally.longest = max(tally.longest, len(row.ids))
    if len(row.ids) <= prep.limit:
        return row.ids
    if prep.config.overlong == "truncate" and row.prompt_length < prep.limit:
        lost = len(row.ids) - prep.limit
        tally.lost_tokens += lost
        tally.truncated_examples += 1
        detail = f"{len(row.ids)} tokens: the last {lost} of its answer are cut off"
        where.notes.append(("over_length", detail))
        list_row(tally.truncated, where.row, where.line, "over_length", detail)
        return row.ids[: prep.limit]
    tally.lost_tokens += answer_tokens
    drop_overlong(where, f"{len(row.ids)} tokens, more than {prep.limit}", tally)
    return None


def describe_rows(rows: "Sequence[EncodedRow]", columns: Columns, stems_file: BinaryIO) -> None:
    """Add what later steps compare to the columns: keys, word stems, language, checks."""
    import numpy as np
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

    stems = []
    for encoded in rows:
        conversation = encoded.conversation
        question, answer = conversation.question, conversation.answer
        asked, answered = plain_words(question), plain_words(answer)
        # What makes rows comparable: the first letters of their words.
        asked_stems, answer_stems = set(STEM.findall(asked)), set(STEM.findall(answered))
        columns.row.append(conversation.row)
        columns.line.append(conversation.line or 0)
        columns.characters.append(len(question) + len(answer))
        columns.checks.append(sum({CHECK_BITS[name] for name, _ in conversation.notes}))
        columns.language.append(detect_language(answer, answer_stems))
        columns.about_language.append(not ABOUT_LANGUAGE.isdisjoint(asked_stems))
        columns.row_key.append(digest(encoded.prompt, answer))
        columns.question_key.append(digest(asked))
        columns.answer_key.append(digest(answered))
        stems.append((asked_stems | answer_stems) - STOP_STEMS)
    hashes = RMinHash.hash_token_sets(stems)
    columns.stem_counts.extend(map(len, hashes))
    flat = np.fromiter(itertools.chain.from_iterable(hashes), np.uint64)
    (flat >> np.uint64(32)).astype(np.uint32).tofile(stems_file)


def find_wrong_tokens(
    ids: "IntArray",
    lengths: "IntArray",
    prompts: "IntArray",
    truncated: "IntArray",
    tokenizer: "PreTrainedTokenizerFast",
) -> "dict[str, IntArray]":
    """Return what can be wrong with examples, and a mask of those that it is wrong with.

    `ids` are the tokens of all examples, one after the other.
    """
    import numpy as np

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    probe = render_chat(tokenizer, [{"role": "user", "content": "a"}], add_generation_prompt=True)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    eos_before = np.concatenate(([0], np.cumsum(ids == eos)))
    stops = eos_before[ends] - eos_before[starts + prompts]  # within the supervised part
    wrong = {
        "nothing is supervised, or the prompt is": (prompts < 1) | (prompts >= lengths),
        "no end token, or one inside the answer": np.where(
            truncated, stops != 0, (ids[ends - 1] != eos) | (stops != 1)
        ),
    }
    if bos is not None and tokenize_rendered(tokenizer, probe)[:1] == [bos]:
        bos_before = np.concatenate(([0], np.cumsum(ids == bos)))
        wrong["no BOS"] = ids[starts] != bos
        wrong["two BOS"] = (
            bos_before[ends] - bos_before[starts] != 1
            if bos != eos
            else ids[np.minimum(starts + 1, ends - 1)] == bos
        )
    return wrong


def prove_stop_tokens(
    rows: "Sequence[EncodedRow]", all_ids: "Sequence[list[int]]", prep: Preparation
) -> None:
    """Check examples, every one, before they are stored.

    Proved are: exactly one BOS, at the front, if the tokenizer puts one before a text; the last
    supervised token is the end token and the only one of its kind (truncated rows have none); the
    prompt carries no loss and the answer some. Raises FineTuningError where one would teach
    something wrong.
    """
    import numpy as np

    ids = np.fromiter(itertools.chain.from_iterable(all_ids), np.int64)
    lengths = np.array([len(row_ids) for row_ids in all_ids], np.int64)
    prompts = np.array([row.prompt_length for row in rows], np.int64)
    truncated = np.array([len(row.ids) for row in rows], np.int64) > lengths
    wrong = find_wrong_tokens(ids, lengths, prompts, truncated, prep.tokenizer)
    for what, places in wrong.items():
        if places.any():
            raise FineTuningError(
                f"Row {rows[int(places.argmax())].conversation.row}: {what}.",
                hint="The tokenizer or its chat template does not fit this kind of training.",
            )


def example_features() -> "datasets.Features":
    """Return the types of the stored columns."""
    import datasets

    kinds = ("int64", "string", "string", datasets.List(datasets.Value("int32")), "int32")
    return datasets.Features(
        {
            name: datasets.Value(kind) if isinstance(kind, str) else kind
            for name, kind in zip(EXAMPLE_COLUMNS, kinds, strict=True)
        }
    )


def store_batch(
    batch: "Sequence[EncodedRow]", prep: Preparation, writer: "ArrowWriter", stems_file: BinaryIO
) -> None:
    """Store those rows of a batch that fit, and note what was found in all of them."""
    stored: list[EncodedRow] = []
    ids: list[list[int]] = []
    for row in batch:
        if row.merged:
            row.conversation.notes.append(("merged_tokens", shorten(row.completion, 40)))
        fitting = fit_length(row, prep)
        if fitting is not None:
            stored.append(row)
            ids.append(fitting)
        for check, detail in row.conversation.notes:
            prep.tally.note(check, row.conversation.row, detail)
    if not stored:
        return
    prove_stop_tokens(stored, ids, prep)
    describe_rows(stored, prep.columns, stems_file)
    prep.columns.length.extend(map(len, ids))
    prep.columns.prompt_length.extend(row.prompt_length for row in stored)
    writer.write_batch(
        {
            "row": [row.conversation.row for row in stored],
            "prompt": [row.prompt for row in stored],
            "answer": [row.conversation.answer for row in stored],
            "input_ids": ids,
            "prompt_length": [row.prompt_length for row in stored],
        }
    )


def store_examples(file: DatasetFile, prep: Preparation, folder: Path) -> None:
    """Stream the file into `folder`: examples.arrow and stems.bin; the rest goes into `prep`."""
    from datasets.arrow_writer import ArrowWriter

    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(progress_bar(file.size, "B", "preparing"))
        writer = stack.enter_context(
            ArrowWriter(path=str(folder / EXAMPLES_FILE), features=example_features())
        )
        stems_file = stack.enter_context((folder / STEMS_FILE).open("wb"))
        rows = usable_rows(file.path, prep, progress)
        for batch in encode_ahead(prep, batches_of_rows(rows)):
            store_batch(batch, prep, writer, stems_file)
        writer.finalize()
        progress.move_to(file.size)


# --- what rows have to do with each other: duplicates, contradictions, outliers

# Similarity is the weighted share of common word stems, question and answer together. A stem weighs
# the more the fewer rows have it, so that a paraphrase, which keeps the rare words, is nearer than
# the same sentence about another college. Measured on 1,537 unlike rows (Alpaca, the sample) with
# 12 paraphrased pairs among them: all 12 are above 0.25, and 22 others, all closely related. Near
# duplicates also share words when all weigh the same: no false one there, and 99, 97 and 93 % found
# of rows with one, two and three words exchanged.
NEAR_DUPLICATE, NEAR_DUPLICATE_UNWEIGHTED = 0.6, 0.65
SAME_FAMILY = 0.25
LARGEST_FAMILY = 20  # rows that only similarity joins: chains of it would join everything
BANDS, BAND_ROWS = 48, 2  # of the MinHash
STEMS_AT_ONCE = 1 << 22
# What makes two rows candidates: up to FEW_ROWS one common band, up to MANY_ROWS two of them, and
# beyond two in succession, which random pairs practically never have (at 0.5, 95 % of pairs have).
FEW_ROWS, MANY_ROWS = 5_000, 100_000
MOST_CANDIDATES = 5_000_000  # that wait to be counted, and in the end
LONG_OUTLIER = 3.5  # robust standard deviations of the logarithm of the length


class RowPairs(NamedTuple):
    """Hold pairs of stored examples, by their places, and how alike they are: three arrays."""

    first: "IntArray"
    second: "IntArray"
    similarity: "FloatArray"


class StemSets:
    """Hold the word stems of the examples, on disk, and the weight of each stem."""

    def __init__(self, path: Path, counts: "IntArray") -> None:
        import numpy as np

        self.path, self.counts = path, counts
        self.starts = np.cumsum(counts) - counts
        size = int(counts.sum())
        # Frequencies are counted by the first bits of a stem's hash: enough to keep stems apart.
        bits = min(22, max(10, size.bit_length() + 2))
        self.shift = 32 - bits
        self.frequency = np.zeros(1 << bits, np.int64)
        for start in range(0, size, STEMS_AT_ONCE):
            stems = np.fromfile(path, np.uint32, STEMS_AT_ONCE, offset=4 * start)
            self.frequency += np.bincount(stems >> self.shift, minlength=1 << bits)
        self.weight = np.log1p(len(counts) / np.maximum(self.frequency, 1)) ** 2

    def gather(self, rows: "IntArray") -> "tuple[IntArray, IntArray]":
        """Return the stems of some rows, one after the other, and the row's place for each."""
        import numpy as np

        counts = self.counts[rows]
        place = np.repeat(np.arange(len(rows)), counts)
        if not len(place):
            return np.empty(0, np.uint32), place
        within = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
        # Mapped anew each time: what was read would count as this process's memory otherwise.
        stems = np.memmap(self.path, np.uint32, "r")
        return np.array(stems[self.starts[rows][place] + within]), place

    def compare(
        self, first: "IntArray", second: "IntArray", *, weighted: bool = True
    ) -> "FloatArray":
        """Return how alike pairs of rows are, from 0 to 1."""
        import numpy as np

        shares = [np.empty(0)]
        for piece in range(0, len(first), 50_000):
            pairs = slice(piece, piece + 50_000)
            count = len(first[pairs])
            (left, left_pair), (right, right_pair) = map(self.gather, (first[pairs], second[pairs]))
            keys = np.concatenate((left_pair, right_pair)) << 32
            keys |= np.concatenate((left, right)).astype(np.int64)
            keys.sort()
            weights = self.weight[(keys & 0xFFFFFFFF) >> self.shift] if weighted else None
            total = np.bincount(keys >> 32, weights, count)
            twice = np.flatnonzero(keys[1:] == keys[:-1])
            weights = None if weights is None else weights[twice]
            common = np.bincount(keys[twice] >> 32, weights, count)
            shares.append(common / np.maximum(total - common, 1e-9))
        return np.concatenate(shares)


def hash_bands(sets: StemSets, rows: "IntArray", path: Path) -> "IntArray":
    """Write the MinHash bands ([bands, rows], hashes of four bytes); tell which rows have any.

    Frequent stems are left out, so that a sentence that many rows share does not make them alike.
    """
    import numpy as np
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

    most = max(50, len(sets.counts) // 50)
    filled = np.zeros(len(rows), bool)
    factors = np.array([0x9E3779B1, 0x85EBCA77], np.uint32)  # BAND_ROWS odd numbers
    path.write_bytes(b"")
    os.truncate(path, 4 * BANDS * len(rows))
    for start in range(0, len(rows), 20_000):
        part = slice(start, start + 20_000)
        stems, place = sets.gather(rows[part])
        rare = sets.frequency[stems >> sets.shift] <= most
        counts = np.bincount(place[rare], minlength=len(rows[part]))
        signature = RMinHash.digest_matrix_from_flat_token_hashes(
            stems[rare].astype(np.uint64),
            np.concatenate(([0], np.cumsum(counts))).astype(np.uint64),
            BANDS * BAND_ROWS,
            42,
        )
        matrix = np.array(signature.to_rows(), np.uint32).reshape(-1, BANDS, BAND_ROWS)
        bands = np.memmap(path, np.uint32, "r+", shape=(BANDS, len(rows)))
        bands[:, part] = (matrix * factors).sum(axis=2, dtype=np.uint32).T
        filled[part] = counts > 0
    return filled


def find_candidates(path: Path, rows: "IntArray", filled: "IntArray", size: int) -> "IntArray":
    """Return pairs of rows (earlier * size + later) that share MinHash bands, worth comparing."""
    import numpy as np

    def read_band(number: int) -> "IntArray":
        offset = 4 * len(rows) * (number % BANDS)
        return np.fromfile(path, np.uint32, len(rows), offset=offset)[filled]

    few, many = len(rows) <= FEW_ROWS, len(rows) > MANY_ROWS
    candidates = rows[filled]
    pieces = [np.empty(0, np.int64)]
    for number in range(BANDS):
        # Within a band, the next one decides the order, so that rows alike are neighbours.
        band = (read_band(number).astype(np.uint64) << np.uint64(32)) | read_band(number + 1)
        order = np.argsort(band, kind="stable")
        band = band[order] if many else band[order] >> np.uint64(32)
        for distance in range(1, 9 if few else 5):
            same = np.flatnonzero(band[distance:] == band[:-distance])
            one, other = candidates[order[same]], candidates[order[same + distance]]
            pieces.append(np.minimum(one, other) * size + np.maximum(one, other))
        if sum(map(len, pieces)) > MOST_CANDIDATES:
            pairs, counts = np.unique(np.concatenate(pieces), return_counts=True)
            pieces = [pairs, pairs[counts > 1]]
            if len(pairs) > MOST_CANDIDATES:
                log.debug("Only %d of %d MinHash bands are compared", number + 1, BANDS)
                break
    pairs, counts = np.unique(np.concatenate(pieces), return_counts=True)
    return pairs if few or many else pairs[counts > 1]


def find_similar(sets: StemSets, rows: "IntArray", path: Path) -> RowPairs:
    """Return the pairs of rows that are alike enough to be of one family; `path` is scratch."""
    import numpy as np

    size = len(sets.counts)
    filled = hash_bands(sets, rows, path)
    first, second = np.divmod(find_candidates(path, rows, filled, size), size)
    similarity = sets.compare(first, second)
    alike = similarity >= SAME_FAMILY
    return RowPairs(first[alike], second[alike], similarity[alike])


def same_keys(keys: "IntArray", rows: "IntArray") -> "tuple[IntArray, IntArray]":
    """Return for each row whose key an earlier one has: the first such row, and the row itself."""
    import numpy as np

    _, first, inverse = np.unique(keys[rows], return_index=True, return_inverse=True)
    earlier = rows[first[inverse]]
    return earlier[earlier < rows], rows[earlier < rows]


def zip_lists(first: "IntArray", second: "IntArray") -> "Iterator[tuple[int, int]]":
    """Yield the pairs of two arrays as plain numbers, which take five times the memory."""
    for start in range(0, len(first), 100_000):
        part = slice(start, start + 100_000)
        yield from zip(first[part].tolist(), second[part].tolist(), strict=True)


def join_families(
    size: int, always: "Iterable[tuple[int, int]]", small: "Iterable[tuple[int, int]]"
) -> "IntArray":
    """Return for each of `size` rows the earliest row of its family.

    Pairs of `always` belong together in any case, those of `small` while the family stays small.
    """
    import numpy as np

    parent = array("q", range(size))
    members: dict[int, int] = {}

    def find(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    for pairs, largest in ((always, size), (small, LARGEST_FAMILY)):
        for one, other in pairs:
            first, second = sorted((find(one), find(other)))
            together = members.get(first, 1) + members.get(second, 1)
            if first != second and together <= largest:
                parent[second] = first
                members[first] = together
    return np.fromiter(map(find, range(size)), np.int64, size)


def flag_rows(
    check: str,
    places: "IntArray",
    describe: "Callable[[int], str]",
    columns: Columns,
    tally: Tally,
) -> None:
    """Note a finding about stored examples, given by their places; describe only those shown."""
    import numpy as np

    np.frombuffer(columns.checks, np.uint64)[places] |= np.uint64(CHECK_BITS[check])
    for number, place in enumerate(places.tolist()):
        shown = number < EXAMPLES_SHOWN
        tally.note(check, columns.row[place], describe(place) if shown else "")


def find_outliers(columns: Columns, places: "IntArray", tally: Tally) -> None:
    """Note rows that are far longer than the others, or in another language."""
    import numpy as np

    length = np.log(np.maximum(1, np.array(columns.characters)[places]))
    middle = np.median(length)
    # What is usual differs: the bounds keep sets of even rows, and of very mixed ones, sensible.
    spread = np.clip(1.4826 * np.median(np.abs(length - middle)), 0.6, 0.9)

    longest, usual = math.exp(middle + LONG_OUTLIER * spread), math.exp(middle)

    def describe_length(characters: int) -> str:
        return f"{characters} characters; half of the rows have under {usual:.0f}"

    flag_rows(
        "length_outlier",
        places[length > np.log(longest)],
        lambda place: describe_length(columns.characters[place]),
        columns,
        tally,
    )
    for row, characters in zip(tally.overlong_rows, tally.overlong_characters, strict=True):
        if characters > longest:
            tally.note("length_outlier", row, describe_length(characters))
    language = np.array(columns.language)[places]
    known = language > 0
    common = int(np.bincount(language[known], minlength=1).argmax())
    if known.sum() < 20 or (language == common).sum() < 0.8 * known.sum():
        return  # too few to tell, or a set of several languages

    def describe_language(place: int) -> str:
        return f"{LANGUAGE_NAMES[columns.language[place]]}, not {LANGUAGE_NAMES[common]}"

    about = np.array(columns.about_language)[places] == 1
    foreign = places[known & (language != common) & ~about]
    flag_rows("language_outlier", foreign, describe_language, columns, tally)


def drop_duplicates(columns: Columns, tally: Tally) -> "IntArray":
    """Note rows that stand earlier in the file already; return the places of all others."""
    import numpy as np

    keys = np.frombuffer(columns.row_key, np.uint64)
    keep = np.ones(len(keys), bool)
    for earlier, later in zip(*same_keys(keys, np.arange(len(keys))), strict=True):
        detail = f"the same as row {columns.row[earlier]}"
        line = columns.line[later] or None
        tally.drop("exact_duplicate", columns.row[later], line, detail)
        columns.checks[later] |= CHECK_BITS["exact_duplicate"]
        keep[later] = False
    return np.flatnonzero(keep)


def relate_rows(
    columns: Columns, tally: Tally, folder: Path, texts: "datasets.Dataset"
) -> "tuple[IntArray, IntArray]":
    """Compare the stored examples; return the places of those to keep, and the family of each.

    A family are rows that must not stand on both sides of the split: near duplicates, paraphrases,
    and rows with the same question. It is named by the question key of its first row.
    """
    import numpy as np

    kept = drop_duplicates(columns, tally)
    find_outliers(columns, kept, tally)
    questions = np.frombuffer(columns.question_key, np.uint64)
    answers = np.frombuffer(columns.answer_key, np.uint64)
    same, again = same_keys(questions, kept)
    other = answers[same] != answers[again]
    earlier_of = dict(zip_lists(again[other], same[other]))

    def compare(place: int, how: str) -> str:
        first = earlier_of[place]
        one, two = (shorten(texts[i]["answer"], 50) for i in (first, place))
        return f"{how} row {columns.row[first]}: {two!r}, there {one!r}"

    flag_rows("contradiction", again[other], lambda i: compare(i, "asks as"), columns, tally)
    sets = StemSets(folder / STEMS_FILE, np.array(columns.stem_counts, np.int64))
    alike = find_similar(sets, kept, folder / BANDS_FILE)
    near = alike.similarity >= NEAR_DUPLICATE
    first, second = alike.first[near], alike.second[near]
    near = sets.compare(first, second, weighted=False) >= NEAR_DUPLICATE_UNWEIGHTED
    first, second = first[near], second[near]
    new = ~np.isin(second, again[other])  # contradictions are told as such
    places, chosen = np.unique(second[new], return_index=True)
    earlier_of = dict(zip_lists(places, first[new][chosen]))
    flag_rows("near_duplicate", places, lambda i: compare(i, "nearly"), columns, tally)
    order = np.argsort(-alike.similarity, kind="stable")
    roots = join_families(
        len(questions),
        itertools.chain(zip_lists(first, second), zip_lists(same, again)),
        zip_lists(alike.first[order], alike.second[order]),
    )
    return kept, questions[roots[kept]]


# --- the split


TRAIN, EVAL, UNUSED = 0, 1, 2


def choose_sides(families: "IntArray", lengths: "IntArray", config: FineTuningConfig) -> "IntArray":
    """Return for each example, in file order, its side: TRAIN, EVAL or UNUSED.

    A seeded hash of a family's first question decides, so that rows of one family stay together
    and neither later rows nor the order matter. In small sets the shares would stray by chance:
    there the hash is overruled where the rows so far, as a whole or of similar length, are off by
    more than a tenth (and more than one row). Only earlier rows count: appended ones move none, but
    where they join two families into one.
    """
    import numpy as np

    shares = (config.train_split, config.eval_split, 1 - config.train_split - config.eval_split)
    _, number, sizes = np.unique(families, return_inverse=True, return_counts=True)
    draws = hash_to_unit(families, config.seed).tolist()
    too_large = max(10, config.eval_split * len(families) / 2)
    side_of: dict[int, int] = {}
    sides = np.empty(len(families), np.int8)
    seen: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
    for place, family in enumerate(number.tolist()):
        classes = (seen[-1], seen[int(lengths[place]).bit_length()])  # all rows, those as long
        side = side_of.get(family)
        if side is None:
            draw = draws[place]
            side = EVAL if draw < shares[EVAL] else UNUSED if draw >= 1 - shares[UNUSED] else TRAIN
            for counts in reversed(classes):
                side = overrule(side, counts, shares)
            side_of[family] = side = TRAIN if sizes[family] > too_large else side
        sides[place] = side
        for counts in classes:
            counts[side] += 1
    return fill_sides(number, sizes, draws, sides)


def hash_to_unit(keys: "IntArray", seed: int) -> "FloatArray":
    """Return a number from 0 to 1 for each key, scattered by key and seed (splitmix64's finish)."""
    import numpy as np

    mixed = keys ^ np.uint64(digest(str(seed)))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))) / 2.0**64


def overrule(side: int, counts: "list[int]", shares: "tuple[float, ...]") -> int:
    """Return the side the hash chose, or the one that lags behind where the shares have strayed."""
    total = sum(counts) + 1
    behind = [share * total - count for share, count in zip(shares, counts, strict=True)]
    slack = max(1.0, 0.1 * min(shares[TRAIN], shares[EVAL]) * total)
    neediest = max(range(3), key=behind.__getitem__)
    return neediest if behind[neediest] > slack or behind[side] - 1 < -slack else side


def fill_sides(
    number: "IntArray", sizes: "IntArray", draws: "list[float]", sides: "IntArray"
) -> "IntArray":
    """Give a side that got nothing, as happens in tiny sets, one family; refuse a single family."""
    import numpy as np

    if len(sizes) < 2:
        raise FineTuningError(
            "All usable rows are versions of one question: none can be held out for evaluation."
            if len(sizes)
            else "No row is left to train on.",
            hint="At least two different rows are needed, and some hundreds are useful.",
        )
    for side, sign in ((EVAL, 1), (TRAIN, -1)):  # the smallest family to eval, the largest to train
        if not (sides == side).any():
            order = np.lexsort((sign * np.array(draws), sign * sizes[number]))
            sides[number == number[order[0]]] = side
    return sides


def usable_length(config: FineTuningConfig) -> int:
    """Return max_seq_length, limited to the positions that the model has."""
    from transformers import AutoConfig

    try:
        model = AutoConfig.from_pretrained(config.model_name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FineTuningError(
            f"The configuration of {config.model_name} cannot be read: {first_line(error)}",
            hint="Check model_name: a Hugging Face id, or a folder with config.json.",
        ) from error
    positions = model.to_dict().get("max_position_embeddings")
    if isinstance(positions, int) and positions < config.max_seq_length:
        log.warning(
            "max_seq_length %d is more than the model's %d positions: %d is used",
            config.max_seq_length,
            positions,
            positions,
        )
        return positions
    return config.max_seq_length


@dataclass(frozen=True)
class PreparedFiles:
    """Hold the outcome of the preparation, as it lies in the cache.

    `kept` are the examples that are not dropped; the other arrays are about these, in file order.
    """

    examples: "datasets.Dataset"
    report: QualityReport
    kept: "IntArray"
    families: "IntArray"
    lengths: "IntArray"
    prompt_lengths: "IntArray"


def score_rows(columns: Columns) -> "FloatArray":
    """Return a score from 0 to 1 for each stored example: what its checks leave of 1."""
    import numpy as np

    checks = np.frombuffer(columns.checks, np.uint64)
    scores = np.ones(len(checks))
    for name, kind in CHECKS.items():
        scores[(checks & np.uint64(CHECK_BITS[name])) != 0] *= 1 - kind.penalty
    return np.round(scores, 4)


def worst_rows(
    columns: Columns, scores: "FloatArray", tally: Tally, texts: "datasets.Dataset"
) -> "list[dict[str, Any]]":
    """Return the rows with the lowest scores: rejected ones first, then the worst of the others."""
    import numpy as np

    worst = [
        {"row": r["row"], "score": 0.0, "checks": [r["reason"]], "text": r["detail"]}
        for r in tally.rejected[:WORST_ROWS]
    ]
    for place in np.argsort(scores, kind="stable")[: WORST_ROWS - len(worst)].tolist():
        if scores[place] < 1:
            found = [name for name in CHECKS if columns.checks[place] & CHECK_BITS[name]]
            worst.append(
                {
                    "row": columns.row[place],
                    "score": float(scores[place]),
                    "checks": found,
                    "text": shorten(texts[place]["prompt"] + texts[place]["answer"], 200),
                }
            )
    return worst


def build_quality_report(prep: Preparation, texts: "datasets.Dataset") -> QualityReport:
    """Sum up what the checks have found."""
    import numpy as np

    tally, columns = prep.tally, prep.columns
    scores = score_rows(columns)
    lost = tally.valid - len(scores)  # over-length rows are not stored
    everything = np.concatenate((np.zeros(tally.total - tally.valid), np.full(lost, 0.5), scores))
    histogram = np.bincount(np.minimum(9, (everything * 10 + 1e-6).astype(int)), minlength=10)
    counts = {name: tally.findings.get(name, Finding()).count for name in CHECKS}
    return QualityReport(
        total_examples=tally.total,
        valid_examples=tally.valid,
        quality_score=round(tally.valid / max(1, tally.total), 6),
        empty_instructions=counts["empty_instruction"],
        empty_outputs=counts["empty_output"],
        avg_instruction_length=round(tally.question_chars / max(1, tally.valid), 2),
        avg_output_length=round(tally.answer_chars / max(1, tally.valid), 2),
        checks=counts,
        check_details={
            name: {
                "count": finding.count,
                "action": CHECKS[name].action,
                "meaning": CHECKS[name].meaning,
                "rows": finding.rows,
                "examples": finding.examples,
            }
            for name, finding in sorted(tally.findings.items(), key=lambda f: -f[1].count)
        },
        mean_score=round(float(everything.mean()), 4) if len(everything) else 0.0,
        score_histogram=tuple(histogram.tolist()),
        worst_rows=tuple(worst_rows(columns, scores, tally, texts)),
        answer_tokens=tally.answer_tokens,
        lost_answer_tokens=tally.lost_tokens,
        longest_example=tally.longest,
        dropped_examples=tally.dropped_examples,
        truncated_examples=tally.truncated_examples,
        rejected=tuple(tally.rejected),
        dropped=tuple(tally.dropped),
        truncated=tuple(tally.truncated),
    )


def quality_report_path(config: FineTuningConfig) -> Path:
    """Return where this run's quality report goes: not over the one of a finished run."""
    folder = Path(config.output_dir)
    if not (folder / "adapter_model.safetensors").exists():
        return folder / "quality_report.json"
    logs = [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]
    stamp = (
        Path(logs[0].baseFilename).stem.removeprefix("unified_finetune_")
        if logs
        else datetime.now().strftime("%Y%m%d_%H%M%S")
    )
    return Path(config.log_dir) / f"quality_report_{stamp}.json"


def write_quality_report(report: QualityReport, config: FineTuningConfig) -> Path:
    """Write the report as JSON, whole or not at all, and return its path."""
    path = quality_report_path(config)
    if not is_main_process():
        return path
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    text = json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise FineTuningError(
            f"The quality report cannot be written: {error}",
            hint="Choose another folder with --output_dir FOLDER.",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def demand(question: str, hint: str, config: FineTuningConfig) -> None:
    """Ask whether to go on in spite of what `question` says, and stop where the answer is no."""
    if is_main_process() and not ask(question + " Go on?", config):
        raise FineTuningError(question, hint=hint + " Or go on anyway with --yes.")


def check_quality(report: QualityReport, path: Path, config: FineTuningConfig) -> None:
    """Stop where nothing is usable; ask where too little is."""
    if not report.total_examples:
        raise FineTuningError(
            "The data set holds no rows.", hint="It must be an array of rows, or one row per line."
        )
    first = [
        "row {}{}: {}".format(
            entry["row"],
            " (line {})".format(entry.get("line")) * ("line" in entry),
            entry["detail"],
        )
        for entry in report.rejected[:BROKEN_LINES_SHOWN]
    ]
    examples = "".join("\n  - " + shorten(line, 200) for line in first)
    if not report.valid_examples:
        raise FineTuningError(
            f"None of the {report.total_examples} rows is usable:{examples}",
            hint=f"Every row with its reason: {path}",
        )
    if report.quality_score < config.min_data_quality_score:
        demand(
            f"Only {report.valid_examples} of {report.total_examples} rows are usable: "
            f"quality score {report.quality_score:.3f}, below min_data_quality_score "
            f"{config.min_data_quality_score:g}.{examples}\n",
            f"Correct the rows that {path} lists.",
            config,
        )


def check_lost_tokens(report: QualityReport, limit: int, config: FineTuningConfig) -> None:
    """Ask where the length limit costs more than one in a hundred answer tokens."""
    share = report.lost_answer_tokens / max(1, report.answer_tokens)
    if share > MAX_LOST_ANSWER_SHARE:
        demand(
            "{} rows are longer than {} tokens: {:.1%} of all answer tokens would be lost.".format(
                report.checks["over_length"], limit, share
            ),
            f"Raise --max_seq_length (the longest row has {report.longest_example} tokens) "
            "or shorten the rows.",
            config,
        )


def log_quality(report: QualityReport) -> None:
    """Log what the checks have found, and the worst rows."""
    log.info(
        "%d rows: %d usable (quality score %.3f), %d rejected, %d dropped, %d truncated",
        report.total_examples,
        report.valid_examples,
        report.quality_score,
        report.total_examples - report.valid_examples,
        report.dropped_examples,
        report.truncated_examples,
    )
    for name, details in report.check_details.items():
        log.info(
            "  %-24s %6d  %-6s  %s", name, *(details[k] for k in ("count", "action", "meaning"))
        )
        for example in details["examples"]:
            log.debug("      row %d: %s", example["row"], example["detail"])
    bins = ", ".join(
        f"{number / 10:.1f}-{number / 10 + 0.1:.1f}: {count}"
        for number, count in enumerate(report.score_histogram)
        if count
    )
    log.info("Row scores: mean %.3f (%s)", report.mean_score, bins)
    for worst in report.worst_rows:
        log.info(
            "  row %d scores %.2f (%s): %s",
            worst["row"],
            worst["score"],
            ", ".join(worst["checks"]),
            shorten(worst["text"], 100),
        )


def log_examples(prepared: PreparedFiles, data: PreparedData) -> None:
    """Log the split, token lengths and one example as it is trained."""
    import numpy as np

    unused = len(prepared.lengths) - len(data.train) - len(data.eval)
    log.info(
        "Split: %d to train, %d to evaluate%s",
        len(data.train),
        len(data.eval),
        f", {unused} unused (train_split + eval_split < 1)" if unused else "",
    )
    lengths = prepared.lengths
    log.info(
        "Tokens per example: mean %.0f, median %.0f, 95 %% up to %.0f, longest %d; "
        "%d supervised of %d",
        lengths.mean(),
        *np.percentile(lengths, [50, 95]),
        lengths.max(),
        lengths.sum() - prepared.prompt_lengths.sum(),
        lengths.sum(),
    )
    example = data.train[0]
    log.info(
        "Row %d as it is trained (what carries loss stands between >>> and <<<):\n%s>>>%s<<<",
        example["row"],
        shorten_middle(example["prompt"]),
        shorten_middle(
            str(data.tokenizer.decode(example["input_ids"][example["prompt_length"] :]))
        ),
    )


# --- the result is kept, so that the same data and settings are prepared only once

PREPARED_SETS_KEPT = 5
DAMAGE = (OSError, ValueError, KeyError, TypeError)  # what reading damaged files may raise
WORST_ROWS = 10
MAX_LOST_ANSWER_SHARE = 0.01


def preparation_key(file: DatasetFile, prep: Preparation) -> str:
    """Return a name for the result that changes with anything that could change it."""
    from importlib import metadata

    config, tokenizer = prep.config, prep.tokenizer
    parts = [
        file.sha256,
        hash_file(Path(__file__), "sha256"),
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.chat_template),
        json.dumps([str(t) for t in tokenizer.all_special_tokens]),
        json.dumps([prep.limit, config.overlong, config.system_prompt]),
        "\n".join(map(repr, prep.rules)),
    ]
    parts += [package + metadata.version(package) for package in PREPARING_PACKAGES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def build_prepared(file: DatasetFile, prep: Preparation, folder: Path) -> None:
    """Prepare the data into `folder`."""
    import datasets
    import numpy as np

    store_examples(file, prep, folder)
    examples = datasets.Dataset.from_file(str(folder / EXAMPLES_FILE))
    kept, families = np.empty(0, np.int64), np.empty(0, np.uint64)
    if len(examples):
        kept, families = relate_rows(prep.columns, prep.tally, folder, examples)
    report = build_quality_report(prep, examples)
    np.savez(
        folder / PLAN_FILE,
        kept=kept,
        families=families,
        lengths=np.array(prep.columns.length)[kept],
        prompt_lengths=np.array(prep.columns.prompt_length)[kept],
    )
    text = json.dumps(dataclasses.asdict(report), ensure_ascii=True)
    (folder / REPORT_FILE).write_text(text, encoding="utf-8")
    for scratch in (STEMS_FILE, BANDS_FILE):
        (folder / scratch).unlink(missing_ok=True)
    hashes = {
        name: hash_file(folder / name, "sha256") for name in (EXAMPLES_FILE, PLAN_FILE, REPORT_FILE)
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(hashes), encoding="utf-8")


def load_prepared(folder: Path) -> PreparedFiles:
    """Read a preparation; raise OSError, ValueError or KeyError where it is damaged."""
    import datasets
    import numpy as np

    hashes = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    for name in (EXAMPLES_FILE, PLAN_FILE, REPORT_FILE):
        if hashes[name] != hash_file(folder / name, "sha256"):
            raise ValueError(f"{name} does not have the bytes that were written")
    values: dict[str, Any] = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    values.update((name, tuple(v)) for name, v in values.items() if isinstance(v, list))
    report = QualityReport(**values)
    with np.load(folder / PLAN_FILE) as plan:
        return PreparedFiles(
            datasets.Dataset.from_file(str(folder / EXAMPLES_FILE)), report, **dict(plan)
        )


def publish_prepared(building: Path, folder: Path) -> PreparedFiles:
    """Give a finished preparation its name and read it, or take that of a faster process."""
    try:
        building.rename(folder)
    except OSError:  # there is one: a damaged one, or that of a process that was faster
        try:
            return load_prepared(folder)
        except DAMAGE:
            shutil.rmtree(folder)
            building.rename(folder)
    return load_prepared(folder)


def prepare_files(file: DatasetFile, prep: Preparation) -> PreparedFiles:
    """Take the preparation from the cache, or make it; a damaged one is made anew."""
    cache = Path(prep.config.cache_dir) / "prepared"
    folder = cache / preparation_key(file, prep)
    if folder.exists():
        try:
            prepared = load_prepared(folder)
        except DAMAGE as error:
            log.warning("The prepared examples in %s are damaged (%s): made anew", folder, error)
        else:
            os.utime(folder)
            log.info("Prepared before from the same data, settings and tokenizer: %s", folder)
            return prepared
    try:
        cache.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
        try:
            build_prepared(file, prep, building)
            prepared = publish_prepared(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        prune_prepared(cache)
        return prepared
    except OSError as error:
        raise FineTuningError(
            f"The prepared examples cannot be written to {cache}: {first_line(error)}",
            hint="Free some disk space, or choose another folder with --cache_dir.",
        ) from error


def prune_prepared(cache: Path) -> None:
    """Remove all but the preparations used last, and what killed runs left behind."""
    ages: list[tuple[float, Path]] = []
    for folder in cache.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process renames and removes, too
            ages.append((time.time() - folder.stat().st_mtime, folder))
    finished = sorted(entry for entry in ages if not entry[1].name.startswith("building-"))
    left_behind = [entry for entry in ages if entry not in finished and entry[0] > 86_400]
    for _, folder in finished[PREPARED_SETS_KEPT:] + left_behind:
        shutil.rmtree(folder, ignore_errors=True)


def prepare_dataset(file: DatasetFile, config: FineTuningConfig) -> PreparedData:
    """Validate, score, split and tokenize the rows of `file`."""
    tokenizer = load_tokenizer(config.model_name)
    prep = Preparation(
        config=config,
        tokenizer=tokenizer,
        limit=usable_length(config),
        marks=special_marks(tokenizer),
        rules=load_plausibility_rules(config.plausibility_rules),
        tally=Tally(),
        columns=Columns(),
    )
    prepared = prepare_files(file, prep)
    report = prepared.report
    path = write_quality_report(report, config)
    if report.total_examples:
        log_quality(report)
    check_quality(report, path, config)
    check_lost_tokens(report, prep.limit, config)
    sides = choose_sides(prepared.families, prepared.lengths, config)
    data = PreparedData(
        train=prepared.examples.select(prepared.kept[sides == TRAIN]),
        eval=prepared.examples.select(prepared.kept[sides == EVAL]),
        tokenizer=tokenizer,
        quality=report,
        source=file,
        max_seq_length=prep.limit,
        truncated_examples=report.truncated_examples,
        dropped_examples=report.dropped_examples,
    )
    log_examples(prepared, data)
    log.info("Quality report: %s", path)
    return data


# ======================================================================================
# Stage 4: train
# ======================================================================================


# --- The engine: the examples of one optimizer step, cut into padding-free forward passes.
#
# A pass lays its examples end to end in one row of tokens, so that nothing is spent on padding.
# Beginnings that several of them share (the template's first tokens, a system prompt, the same
# question) stand there once; the last token of an example is never an input, since nothing follows
# it. Only attention, which must not look from one example into another, gathers the tokens into
# one padded row per example; and behind the last attention only supervised positions go on, into
# the last MLP and the LM head. The sum of the passes' losses over the supervised tokens of the
# whole batch gives the gradients that one padded batch of the same examples would give.


class Example(typing.TypedDict):
    """Hold one tokenized example; the tokens from `prompt_length` on carry loss."""

    input_ids: "list[int]"
    prompt_length: int


ATTENTION = "packed"  # the name under which transformers finds packed_attention
LONGEST_MATH_ROW = 256  # beyond it, attention scores cost more memory than they save time
HEAD_CHUNK = 512  # supervised positions per slice of logits: bounds the head's memory


@dataclass(frozen=True)
class Pass:
    """Hold one forward pass over `rows` examples, `width` the longest, `tokens` in all.

    `gather` [rows * width] says which token stands in each cell of the padded rows; `scatter`
    [tokens] says in which cell each token finds its result; `keep` [supervised] are the positions
    whose next token, in `targets` [supervised], carries loss.
    """

    input_ids: "torch.Tensor"
    position_ids: "torch.Tensor"
    gather: "torch.Tensor"
    scatter: "torch.Tensor"
    keep: "torch.Tensor"
    targets: "torch.Tensor"
    rows: int
    width: int

    @property
    def tokens(self) -> int:
        """Count the tokens that are computed."""
        return self.input_ids.shape[1]


def plan_passes(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Share examples out to as few passes of at most `budget` tokens as first-fit finds.

    Longest first, so that rows of like length meet and attention pads little. An example that is
    longer than the budget gets a pass of its own.
    """
    passes: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for number, free in enumerate(room):
            if lengths[index] <= free:
                passes[number].append(index)
                room[number] -= lengths[index]
                break
        else:
            passes.append([index])
            room.append(budget - lengths[index])
    return passes


def lay_out(examples: Sequence[Example], device: str) -> Pass:
    """Lay examples end to end; tokens behind the same beginning stand there once, as in a trie."""
    import torch

    width = max(len(e["input_ids"]) for e in examples) - 1
    places: dict[tuple[int, int], int] = {}  # (place of the token before, token) -> place
    ids: list[int] = []
    positions: list[int] = []
    gather: list[int] = []
    scatter: list[int] = []
    keep: list[int] = []
    targets: list[int] = []
    for row, example in enumerate(examples):
        cells: list[int] = []
        place = -1
        for position, token in enumerate(example["input_ids"][:-1]):
            place = places.setdefault((place, token), len(ids))
            if place == len(ids):
                ids.append(token)
                positions.append(position)
                scatter.append(row * width + position)
            cells.append(place)
        gather += cells + [0] * (width - len(cells))
        keep += cells[example["prompt_length"] - 1 :]
        targets += example["input_ids"][example["prompt_length"] :]

    def tensor(values: "list[int] | list[list[int]]") -> "torch.Tensor":
        return torch.tensor(values, device=device)

    return Pass(
        tensor([ids]),
        tensor([positions]),
        tensor(gather),
        tensor(scatter),
        tensor(keep),
        tensor(targets),
        len(examples),
        width,
    )


def packed_attention(
    module: "torch.nn.Module",  # noqa: ARG001 - the interface of transformers
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: None,  # noqa: ARG001 - likewise; there is no mask
    *,
    scaling: float,
    layout: Pass,
    sliding_window: "int | None" = None,
    **_: object,
) -> "tuple[torch.Tensor, None]":
    """Attend causally within each example of a pass (an attention function of transformers).

    `query` is [1, heads, tokens, head_dim]; `key` and `value` have fewer heads under grouped-query
    attention. Padding stands behind each row's tokens, so that the causal mask alone hides it.
    """
    import torch

    def to_rows(packed: "torch.Tensor") -> "torch.Tensor":
        """Return [rows, heads, width, head_dim]."""
        flat = packed[0].transpose(0, 1).flatten(1)  # [tokens, heads * head_dim]: rows of memory
        cells = flat.index_select(0, layout.gather)
        return cells.view(layout.rows, layout.width, *packed.shape[1::2]).transpose(1, 2)

    if sliding_window is not None and layout.width > sliding_window:
        raise FineTuningError(
            f"The base model looks back {sliding_window} tokens, and an example has more.",
            hint=f"Set --max_seq_length {sliding_window}.",
        )
    q, k, v = to_rows(query), to_rows(key), to_rows(value)
    rows, heads, width, size = q.shape
    groups = heads // k.shape[1]
    on_cpu = query.device.type == "cpu"
    if on_cpu and width <= LONGEST_MATH_ROW:
        # On CPUs, short rows go faster as plain matrix products than through the fused kernel,
        # whose backward is slow in bf16. One key head serves its whole group of query heads.
        causal = torch.full((width, width), float("-inf"), dtype=q.dtype).triu(1)
        scores = torch.baddbmm(
            causal.repeat(groups, 1)[None],
            q.reshape(-1, groups * width, size),
            k.reshape(-1, width, size).transpose(1, 2),
            alpha=scaling,
        )
        mixed = torch.bmm(scores.softmax(-1), v.reshape(-1, width, size)).view(q.shape)
    else:
        if not on_cpu and groups > 1:  # not every kernel of a GPU takes groups
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=on_cpu
        )
    cells = mixed.transpose(1, 2).reshape(rows * width, heads, size)
    return cells.index_select(0, layout.scatter)[None], None


@functools.cache
def engine_functions() -> "tuple[type[torch.autograd.Function], type[torch.autograd.Function]]":
    """Build the two autograd functions (torch is imported only when training needs it)."""
    import torch

    class HeadLoss(torch.autograd.Function):
        """Sum of cross-entropies of a frozen LM head, a slice of positions at a time.

        The head gets no gradient, so that of its input is known as soon as the logits are:
        probabilities minus targets, times the weight. Nothing of vocabulary size outlives a slice.
        """

        @staticmethod
        def forward(ctx, hidden, weight, bias, targets):
            gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            slices = math.ceil(len(targets) / HEAD_CHUNK)
            rows = math.ceil(len(targets) / max(slices, 1))  # even slices: small ones are slow
            for start in range(0, len(targets), rows):
                part = slice(start, start + rows)
                logits = torch.nn.functional.linear(hidden[part], weight, bias).float()
                wanted = targets[part, None]
                normaliser = logits.logsumexp(-1, keepdim=True)
                total += (normaliser - logits.gather(1, wanted)).sum()
                if gradient is None:
                    continue
                logits.sub_(normaliser).exp_()  # now the probabilities
                logits.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=logits.dtype))
                torch.matmul(logits.to(weight.dtype), weight, out=gradient[part])
            ctx.save_for_backward(gradient)
            return total

        @staticmethod
        def backward(ctx, upstream):
            (gradient,) = ctx.saved_tensors
            return gradient * upstream.to(gradient.dtype), None, None, None

    class LoraLinear(torch.autograd.Function):
        """y = x W' + b + scale * (mask * x) A' B', with W and b frozen.

        Saves x, the mask (a byte each) and the rank-r product; PEFT's modules save a masked copy
        of x for each layer, and cast it to the adapter's dtype first.
        """

        @staticmethod
        def forward(ctx, x, weight, bias, lora_a, lora_b, scale, mask):
            a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
            rank = torch.nn.functional.linear(x if mask is None else x * mask, a)
            y = torch.nn.functional.linear(x, weight, bias)
            y.addmm_(rank, b.t(), alpha=scale)
            ctx.save_for_backward(x, weight, a, b, rank, mask)
            ctx.scale = scale
            return y

        @staticmethod
        def backward(ctx, upstream):
            x, weight, a, b, rank, mask = ctx.saved_tensors
            through_b = torch.matmul(upstream, b).mul_(ctx.scale)
            grad_a = torch.matmul(through_b.t(), x if mask is None else x * mask)
            grad_b = torch.matmul(upstream.t(), rank).mul_(ctx.scale)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = torch.matmul(upstream, weight)
                if mask is None:
                    grad_x.addmm_(through_b, a)
                else:
                    grad_x += torch.matmul(through_b, a).mul_(mask)
            return grad_x, None, None, grad_a.float(), grad_b.float(), None, None

    return HeadLoss, LoraLinear


def dropout_mask(shape: "Sequence[int]", share: float, device: "torch.device") -> "torch.Tensor":
    """Draw a mask of ones with a `share` of zeros (to 1 part in 65,536).

    On the CPU a quarter of the random words that dropout would draw: each 64-bit word gives four.
    """
    import torch

    if device.type != "cpu":
        return torch.rand(tuple(shape), device=device) >= share
    count = math.prod(shape)
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return (words.view(torch.int16)[:count] >= round(share * 65536) - 32768).view(*shape)


def fast_lora_forward(
    module: "lora.Linear", x: "torch.Tensor", *args: object, **kwargs: object
) -> "torch.Tensor":
    """Run one adapted layer through LoraLinear; disabled or merged adapters go PEFT's own way."""
    if module.disable_adapters or module.merged:
        return type(module).forward(module, x, *args, **kwargs)
    _, lora_linear = engine_functions()
    (name,) = module.active_adapters
    base = module.get_base_layer()
    scale = module.scaling[name]
    share = getattr(module.lora_dropout[name], "p", 0.0)  # PEFT puts an Identity where it is 0
    flat = x.flatten(0, -2)
    mask = None
    if module.training and share > 0:
        mask = dropout_mask(flat.shape, share, x.device)
        scale /= 1 - share
    y = lora_linear.apply(
        flat,
        base.weight,
        base.bias,
        module.lora_A[name].weight,
        module.lora_B[name].weight,
        scale,
        mask,
    )
    return y.view(*x.shape[:-1], -1)


def load_base_model(config: FineTuningConfig, device: str, dtype: str) -> "PreTrainedModel":
    """Load the frozen base model: safetensors only, no code from outside."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    folder = base_model_folder(config.model_name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise FineTuningError(
            f"The base model in {folder} cannot be loaded: {first_line(error)}",
            hint="Its config.json and safetensors must belong to a causal language model and be "
            "whole; delete the folder and fetch it again if in doubt.",
        ) from error
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its types
    return model


def keep_freed_memory() -> None:
    """Let glibc hand freed memory to the next tensor instead of giving it back to the kernel.

    Otherwise each large tensor faults in its pages anew: 5 to 10 % of a step on the CPU.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
        ctypes.CDLL(None).mallopt(mmap_max, 0)


def base_of(model: "PeftModel") -> "PreTrainedModel":
    """Return the base model that carries the adapter."""
    return typing.cast("PreTrainedModel", model.get_base_model())


def check_target_modules(model: "PreTrainedModel", names: Sequence[str]) -> None:
    """Refuse names that match no linear layer; PEFT passes over them silently when one matches."""
    import torch

    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    unknown = [name for name in names if name not in linear]
    if unknown:
        raise FineTuningError(
            f"target_modules {', '.join(unknown)}: the base model has no such linear layer in its "
            "decoder.",
            hint=f"Choose among {', '.join(sorted(linear))}.",
        )


def add_adapter(model: "PreTrainedModel", config: FineTuningConfig) -> "PeftModel":
    """Freeze the model and give it a fresh adapter in fp32, drawn from the seed."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    check_target_modules(model, config.target_modules)
    set_seed(config.seed)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=list(config.target_modules),
            task_type="CAUSAL_LM",
        ),
    )
    # Whoever loads the adapter must find the base: a hub id anywhere, a folder by its full path.
    name = config.model_name
    if Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser().resolve())
    adapted.peft_config["default"].base_model_name_or_path = name
    return adapted


LLAMA_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


def last_layer_forward(
    layer: "LlamaDecoderLayer", hidden: "torch.Tensor", **kwargs: typing.Any
) -> "torch.Tensor":
    """Run the last decoder layer and return the supervised positions alone, [1, supervised, size].

    Behind its attention no position looks at another one, so that the others can be left out.
    """
    layout = kwargs.get("layout")
    if layout is None:
        return type(layer).forward(layer, hidden, **kwargs)
    if {name for name, _ in layer.named_children()} != LLAMA_LAYER:
        return type(layer).forward(layer, hidden, **kwargs).index_select(1, layout.keep)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)
    hidden = (hidden + attended).index_select(1, layout.keep)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def install_engine(model: "PeftModel") -> None:
    """Let attention, the last layer and the adapters run as above (outside of passes, as ever)."""
    from peft.tuners import lora
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    base_of(model).set_attn_implementation(ATTENTION)
    # An attribute of the instance wins over the method of its class.
    last = base_of(model).get_decoder().layers[-1]
    vars(last)["forward"] = functools.partial(last_layer_forward, last)
    for module in model.modules():
        if isinstance(module, lora.Linear):
            vars(module)["forward"] = functools.partial(fast_lora_forward, module)


def recompute_activations(model: "PeftModel") -> None:
    """Turn gradient checkpointing on; the inputs need no gradient, so it must not be reentrant."""
    base_of(model).activation_checkpointing_enable({"use_reentrant": False})


def log_parameters(model: "PeftModel") -> None:
    """Print how much of the model is trained."""
    trainable, total = model.get_nb_trainable_parameters()
    log.info(
        "  trainable parameters: %s of %s (%.2f %%)",
        f"{trainable:,}",
        f"{total:,}",
        100 * trainable / total,
    )


def load_trainable_model(
    config: FineTuningConfig, device: str, dtype: str, *, recompute: bool
) -> "PeftModel":
    """Load the base model and put a fresh adapter and the engine on it."""
    import torch

    torch.set_float32_matmul_precision(config.float32_matmul_precision)
    model = add_adapter(load_base_model(config, device, dtype), config)
    log_parameters(model)
    if device == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    if recompute:
        recompute_activations(model)
    install_engine(model)
    return model


def pass_loss(model: "PeftModel", layout: Pass) -> "torch.Tensor":
    """Return the sum of the cross-entropies of a pass's supervised tokens (a scalar, fp32)."""
    base = base_of(model)
    hidden = base.get_decoder()(
        input_ids=layout.input_ids,
        position_ids=layout.position_ids,
        use_cache=False,
        layout=layout,
    ).last_hidden_state
    head = base.get_output_embeddings()
    head_loss, _ = engine_functions()
    return head_loss.apply(
        hidden[0],
        head.weight,
        getattr(head, "bias", None),
        layout.targets,
    )


def evaluation_budget(budget: int, device: str) -> int:
    """Return the tokens of a pass without gradients, which needs a fraction of the memory.

    CPUs gain nothing beyond two thousand tokens: what the layers hand on leaves the caches.
    """
    return min(4 * budget, 2048) if device == "cpu" else 4 * budget


def prove_engine(model: "PeftModel", examples: "datasets.Dataset", device: str) -> None:
    """Compare the engine's loss of two examples with that of the model's own forward pass.

    Architectures differ in ways that a padding-free pass cannot know of (capped logits, scaled
    heads); one that differs is refused before hours go into it.
    """
    import torch

    chosen = sorted(
        examples.select(range(min(64, len(examples)))), key=lambda e: len(e["input_ids"])
    )[:2]
    base = base_of(model)
    model.eval()
    with torch.inference_mode():
        layout = lay_out(chosen, device)
        packed = pass_loss(model, layout).item() / len(layout.targets)
        base.set_attn_implementation("sdpa")
        plain = 0.0
        for example in chosen:
            ids = torch.tensor([example["input_ids"]], device=device)
            logits = base(input_ids=ids, use_cache=False).logits[
                0, example["prompt_length"] - 1 : -1
            ]
            wanted = ids[0, example["prompt_length"] :]
            plain += torch.nn.functional.cross_entropy(
                logits.float(), wanted, reduction="sum"
            ).item()
        base.set_attn_implementation(ATTENTION)
    plain /= len(layout.targets)
    tolerance = SELF_TEST_TOLERANCE[str(base.dtype).removeprefix("torch.")] * max(plain, 0.1)
    log.info("  engine proof: loss %.5f packed, %.5f plain", packed, plain)
    if not abs(packed - plain) <= tolerance:
        raise FineTuningError(
            f"The engine does not compute this model ({base.config.model_type}) as transformers "
            f"does: loss {packed:.5f} against {plain:.5f} for the same examples.",
            hint="Choose a base model of the Llama family, such as TinyLlama.",
        )


def token_counts(examples: "datasets.Dataset") -> list[int]:
    """Return the number of tokens of each example."""
    return [len(ids) for ids in examples["input_ids"]]


def summed_loss(
    model: "PeftModel", examples: Sequence[Example], device: str
) -> "tuple[float, int]":
    """Return the summed loss and the supervised tokens; in halves where memory runs out."""
    try:
        layout = lay_out(examples, device)
        return pass_loss(model, layout).item(), len(layout.targets)
    except (RuntimeError, MemoryError) as error:
        if len(examples) == 1 or not is_out_of_memory(error):
            raise
    log.debug("Out of memory: an evaluation pass of %d examples is halved", len(examples))
    empty_device_cache(device)
    half = len(examples) // 2
    parts = [summed_loss(model, part, device) for part in (examples[:half], examples[half:])]
    return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]


def mean_loss(model: "PeftModel", examples: "datasets.Dataset", budget: int, device: str) -> float:
    """Return the mean cross-entropy over all supervised tokens of `examples`, without gradients."""
    import torch

    model.eval()
    lengths = token_counts(examples)
    total, count = 0.0, 0
    with torch.inference_mode(), progress_bar(len(lengths), "examples", "evaluating") as bar:
        for indices in plan_passes(lengths, budget):
            loss, supervised = summed_loss(model, [examples[i] for i in indices], device)
            total += loss
            count += supervised
            bar.advance(len(indices))
            stop_if_asked()
    return total / count


# --- Checkpoints: staged, flushed to the disk, listed in a manifest of SHA-256, then renamed.

MANIFEST = "manifest.json"
PROGRESS_FILE = "progress.json"
RESULT_STAGING = ".staging-result"  # where stage 5 prepares its files
BEST_ADAPTER = "best_adapter.safetensors"
# What makes two runs the same run; anything else may change between an interruption and its resume.
RUN_SETTINGS = (
    "model_name", "max_seq_length", "lora_r", "lora_alpha", "lora_dropout", "target_modules",
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "optim",
    "lr_scheduler_type", "fp16", "bf16", "float32_matmul_precision", "seed", "train_split",
    "eval_split", "overlong", "system_prompt",
)  # fmt: skip


def run_identity(config: FineTuningConfig, data_sha256: str) -> "dict[str, Any]":
    """Return what must agree for a checkpoint or a result to belong to this run."""
    settings = saved_settings(config)
    return {name: settings[name] for name in RUN_SETTINGS} | {"data_sha256": data_sha256}


def differences(theirs: "dict[str, Any]", ours: "dict[str, Any]") -> list[str]:
    """Spell out in what two runs differ."""
    return [
        f"{name} was {theirs.get(name)!r} and is now {value!r}"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: object) -> None:
    """Write JSON that a person can read; NaN is refused, since most readers refuse it."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    # A lone surrogate, which UTF-8 cannot hold, is written as JSON's own escape.
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def remove_folder(folder: Path) -> None:
    """Delete a folder that others may look for: it vanishes at once, not file by file."""
    doomed = folder.with_name(f".staging-removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def clear_leftovers(output: Path) -> None:
    """Delete what a killed run was writing or removing; the caller holds the folder's lock."""
    for pattern in (".staging-checkpoint-*", ".staging-removed-*", RESULT_STAGING):
        for folder in output.glob(pattern):
            log.debug("Clearing away %s, left by a run that was killed", folder)
            shutil.rmtree(folder, ignore_errors=True)


def publish_folder(staged: Path, final: Path) -> None:
    """Make a staged folder visible under its final name, whole or not at all."""
    manifest = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(staged.iterdir())
    }
    write_json(staged / MANIFEST, manifest)
    for path in staged.iterdir():
        flush_to_disk(path)
    flush_to_disk(staged)
    if final.exists():  # the same step once more, after a damaged checkpoint was passed over
        remove_folder(final)
    staged.rename(final)
    flush_to_disk(final.parent)


def checkpoint_problem(folder: Path) -> "str | None":
    """Return what is wrong with a checkpoint, going by its manifest; None where it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, facts in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {facts['size']}"
            if sha256_of(path) != facts["sha256"]:
                return f"{name} does not have the bytes that were written"
        if PROGRESS_FILE not in manifest:
            return f"{PROGRESS_FILE} is not in its manifest"
    except FileNotFoundError:
        return "it has no manifest: writing it was cut short, or another program wrote it"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read: {first_line(error)}"
    return None


def checkpoint_step(folder: Path) -> int:
    """Return the step in a checkpoint folder's name, or -1 where it has none."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def list_checkpoints(output: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    found = [p for p in output.glob("checkpoint-*") if checkpoint_step(p) >= 0 and p.is_dir()]
    return sorted(found, key=checkpoint_step, reverse=True)


def newest_whole_checkpoint(output: Path) -> "Path | None":
    """Return the newest checkpoint that is whole, naming those passed over."""
    for folder in list_checkpoints(output):
        problem = checkpoint_problem(folder)
        if problem is None:
            return folder
        log.warning("  %s is passed over: %s", folder.name, problem)
    return None


def read_progress(checkpoint: Path) -> "dict[str, Any]":
    """Return a verified checkpoint's own record of the run."""
    return json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))


def adapter_weights(model: "PeftModel") -> "dict[str, torch.Tensor]":
    """Return a copy of the adapter's weights on the CPU, under PEFT's file names."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def load_adapter_weights(model: "PeftModel", path: Path) -> None:
    """Put an adapter file's weights into the model."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(path))


def prune_checkpoints(written: Path, limit: int, best_step: "int | None") -> None:
    """Delete the oldest checkpoints beyond `limit`, keeping `written` and, above 1, the best.

    Those of later steps are the first to go: the run passed them over, for they are damaged.
    """
    step = checkpoint_step(written)
    folders = sorted(list_checkpoints(written.parent), key=lambda f: checkpoint_step(f) > step)
    keep = [written]
    keep += [f for f in folders if checkpoint_step(f) == best_step != step][: max(0, limit - 1)]
    keep += [f for f in folders if f not in keep][: max(0, limit - len(keep))]
    for folder in folders:
        if folder not in keep:
            log.debug("Pruning %s (save_total_limit %d)", folder, limit)
            try:
                remove_folder(folder)
            except OSError as error:  # the new one is written: that counts
                log.warning("  %s cannot be deleted: %s", folder, error.strerror)


# --- One run: what it remembers, and the trainer that carries it out.


class DeviceGaveUp(Exception):
    """Ask for the run to go on from its last checkpoint on the CPU."""


@dataclass
class RunState:
    """Remember what a run has done; written into each checkpoint as progress.json."""

    identity: "dict[str, Any]"
    budget: int
    recompute: bool = False
    history: "list[dict[str, float]]" = field(default_factory=list)
    best_step: "int | None" = None
    best_eval_loss: "float | None" = None
    evaluations_without_gain: int = 0
    last_evaluated_step: int = -1
    loss_sum: float = 0.0
    input_tokens: int = 0
    supervised_tokens: int = 0
    examples: int = 0
    seconds: float = 0.0
    usual_loss: float = 0.0  # mean over the steps that were not far above it
    usual_steps: int = 0
    steps_far_above: int = 0  # in a row, until now
    steps_at_zero: int = 0  # likewise, with a loss of exactly 0.0
    loss_warnings: "list[str]" = field(default_factory=list)


if TYPE_CHECKING:

    class LoraTrainer(SFTTrainer):
        """Describe what `trainer_class` builds."""

        model: PeftModel
        run: RunState
        config: FineTuningConfig
        periodic: datasets.Dataset  # what evaluations during training look at
        best: dict[str, torch.Tensor]  # the adapter at run.best_step
        bar: "Progress"
        sampler: SeedableRandomSampler
        record: dict[str, float]  # of the step in hand
        optimizer: torch.optim.Optimizer
        lr_scheduler: torch.optim.lr_scheduler.LambdaLR
        evaluating: bool
        plan: "Plan"
        measured: int  # steps that this process has taken


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end training between two passes; a second one ends it at once."""

    def on_signal(number: int, _frame: object) -> None:
        global stop_signal
        if stop_signal:
            os._exit(128 + number)  # checkpoints are published whole, so the last one is valid
        stop_signal = number
        log.warning("Stopping after this forward pass (again to leave at once)")

    global stop_signal
    stop_signal = 0
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def empty_device_cache(device: str) -> None:
    """Give back what PyTorch keeps of the device's memory for later tensors."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    elif device.startswith("mps"):
        torch.mps.empty_cache()


OUT_OF_MEMORY = (
    "out of memory", "alloc_failed", "invalid buffer size", "can't allocate memory",
    "not enough memory",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of PyTorch on CUDA, MPS or the CPU says that memory ran out."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(words in text for words in OUT_OF_MEMORY)


def step_seed(seed: int, step: int) -> int:
    """Return the dropout seed of a step, so that a step's masks depend on nothing before it."""
    return (seed * 1_000_003 + step) % 2**63


def accumulate_gradients(
    trainer: "LoraTrainer", run: RunState, examples: Sequence[Example]
) -> float:
    """Add up the gradients of one effective batch and return its mean loss.

    Several processes share the passes; their gradients are summed, not averaged, since each pass
    is already weighted by the supervised tokens of the whole batch.
    """
    import torch

    model, args = trainer.model, trainer.args
    torch.manual_seed(step_seed(args.seed, trainer.state.global_step))
    supervised = sum(len(e["input_ids"]) - e["prompt_length"] for e in examples)
    passes = plan_passes([len(e["input_ids"]) for e in examples], run.budget)
    total = torch.zeros((), device=args.device)
    for indices in passes[args.process_index :: args.world_size]:
        stop_if_asked()
        layout = lay_out([examples[i] for i in indices], str(args.device))
        loss = pass_loss(model, layout) / supervised
        trainer.accelerator.backward(loss)
        total += loss.detach()
    if args.world_size > 1:
        sum_over_processes(model, total)
    return total.item()


def sum_over_processes(model: "PeftModel", loss: "torch.Tensor") -> None:
    """Add up gradients and loss over all processes, in one message."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in grads] + [loss.flatten()])
    torch.distributed.all_reduce(flat)
    pieces = flat.split([p.numel() for p in parameters] + [1])
    for parameter, piece in zip(parameters, pieces[:-1], strict=True):
        parameter.grad = piece.view_as(parameter)
    loss.copy_(pieces[-1][0])


def gradient_norm(model: "PeftModel") -> float:
    """Return the norm of all gradients; not finite where any of them is not."""
    import torch

    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads).item()


def train_step(trainer: "LoraTrainer", run: RunState, examples: Sequence[Example]) -> float:
    """Compute one step's gradients; numbers that are not finite never reach the optimizer.

    Out of memory: smaller passes, then recomputed activations, then the CPU. Not finite: once
    more, then in fp32, then the CPU from the last checkpoint.
    """
    import torch

    model, device = trainer.model, trainer.args.device
    failures = 0
    while True:
        model.train()
        model.zero_grad()
        try:
            loss = accumulate_gradients(trainer, run, examples)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            model.zero_grad()
            relieve_memory(trainer, run, examples)
            continue
        scaled = trainer.accelerator.scaler is not None  # fp16: the scaler skips overflowing steps
        if math.isfinite(loss) and (scaled or math.isfinite(gradient_norm(model))):
            return loss
        failures += 1
        step = trainer.state.global_step + 1
        log.warning("Step %d: the loss or a gradient is not finite (loss %s)", step, loss)
        half = next(base_of(model).parameters()).dtype != torch.float32
        if failures == 1:
            log.warning("  computing the step once more")
        elif failures == 2 and half:
            log.warning("  going on with the base model in float32")
            for parameter in base_of(model).parameters():
                parameter.data = parameter.data.float()
        else:
            raise DeviceGaveUp(f"step {step} gives no finite numbers on {device.type}")


def relieve_memory(trainer: "LoraTrainer", run: RunState, examples: Sequence[Example]) -> None:
    """Take the next rung down: half the budget, then recomputed activations, then the CPU."""
    device = trainer.args.device.type
    empty_device_cache(device)
    longest = max(len(e["input_ids"]) for e in examples)
    if run.budget > longest:
        run.budget = max(run.budget // 2, longest)
        log.warning("Out of memory: forward passes of at most %d tokens from here", run.budget)
    elif not run.recompute and trainer.config.gradient_checkpointing != "off":
        run.recompute = True
        recompute_activations(trainer.model)
        log.warning("Out of memory: activations are recomputed from here (slower)")
    elif device != "cpu":
        raise DeviceGaveUp(f"out of memory on {device} with the smallest passes")
    else:
        raise not_enough_memory(f"one example of {longest} tokens does not fit")


def not_enough_memory(what: str) -> FineTuningError:
    """Return the error of a run that even the CPU cannot hold."""
    return FineTuningError(
        f"Not enough memory: {what}.",
        hint="Close other programs, lower --max_seq_length or --lora_r, or hold the base model "
        "in half the memory with --bf16. The same command goes on from the last checkpoint.",
    )


@functools.cache
def trainer_class() -> "type[LoraTrainer]":
    """Build the trainer: TRL's, with the engine's steps, evaluations and checkpoints."""
    import torch
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import DataLoader
    from trl import SFTTrainer

    class EngineTrainer(SFTTrainer):
        """Run `train_step` on whole effective batches, and keep the run's own record."""

        def get_train_dataloader(self):
            """Yield whole effective batches, in SFTTrainer's order, to every process alike."""
            workers = self.config.dataloader_num_workers
            self.sampler = SeedableRandomSampler(self.train_dataset, data_seed=self.args.seed)
            return DataLoader(
                self.train_dataset,
                batch_size=self.args.per_device_train_batch_size,
                sampler=self.sampler,
                collate_fn=list,
                num_workers=workers,
                # A forked child of a process that has used MPS hangs.
                multiprocessing_context="spawn" if workers else None,
            )

        def training_step(self, model, inputs, num_items_in_batch=None):  # noqa: ARG002
            """Compute the gradients of one effective batch."""
            started = time.monotonic()
            loss = train_step(self, self.run, inputs)
            self.run.examples += len(inputs)
            tokens = [(len(e["input_ids"]), e["prompt_length"]) for e in inputs]
            supervised = sum(length - prompt for length, prompt in tokens)
            self.run.input_tokens += sum(length for length, _ in tokens)
            self.run.supervised_tokens += supervised
            self.run.loss_sum += loss * supervised
            self.record = {
                "loss": loss,
                "seconds": time.monotonic() - started,
                "tokens": sum(length for length, _ in tokens),
            }
            return torch.tensor(loss, device=self.args.device)

        def floating_point_ops(self, inputs):  # noqa: ARG002
            """Count nothing: the engine's batches are not the tensors that transformers counts."""
            return 0

        def _get_grad_norm(self, model, grad_norm=None):
            norm = super()._get_grad_norm(model, grad_norm=grad_norm)
            self.record["grad_norm"] = float(norm)
            self.record["learning_rate"] = self.optimizer.param_groups[0]["lr"]
            return norm

        def evaluate(self, *_args, **_kwargs):
            """Evaluate on the periodic examples and remember the best adapter."""
            return evaluate_run(self)

        def _save_checkpoint(self, model, trial):  # noqa: ARG002
            write_checkpoint(self)

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None):  # noqa: ARG002
            folder = Path(resume_from_checkpoint)
            load_adapter_weights(self.model, folder / "adapter_model.safetensors")

    return typing.cast("type[LoraTrainer]", EngineTrainer)


@functools.cache
def callback_class() -> "Callable[[LoraTrainer], TrainerCallback]":
    """Build the callback that keeps sampler, record and console in step with the trainer."""
    from transformers import TrainerCallback

    class RunCallback(TrainerCallback):
        """Follow one trainer."""

        def __init__(self, trainer: "LoraTrainer") -> None:
            self.trainer = trainer

        def on_train_begin(self, args, state, control, **_) -> None:  # noqa: ARG002
            """Let today's intervals win over those of the checkpoint; evaluate where one is due."""
            state.logging_steps, state.eval_steps, state.save_steps = (
                args.logging_steps,
                args.eval_steps,
                args.save_steps,
            )
            due = state.global_step and state.global_step % args.eval_steps == 0
            if due and self.trainer.run.last_evaluated_step != state.global_step:
                self.trainer.evaluate()

        def on_epoch_begin(self, args, state, control, **_) -> None:  # noqa: ARG002
            """Shuffle by seed and epoch, in a resumed epoch too."""
            self.trainer.sampler.set_epoch(int(state.epoch + 1e-6))

        def on_step_end(self, args, state, control, **_) -> None:  # noqa: ARG002
            """Note the step."""
            note_step(self.trainer)

    return RunCallback


def evaluate_run(trainer: "LoraTrainer") -> "dict[str, float]":
    """Evaluate during training: note the loss, and the adapter where it is the best so far."""
    run, step = trainer.run, trainer.state.global_step
    device = str(trainer.args.device)
    budget = evaluation_budget(run.budget, trainer.args.device.type)
    trainer.evaluating = True
    loss = mean_loss(trainer.model, trainer.periodic, budget, device)
    trainer.evaluating = False
    trainer.model.train()
    if not math.isfinite(loss):
        raise DeviceGaveUp(f"the evaluation at step {step} gives no finite loss")
    run.last_evaluated_step = step
    if run.best_eval_loss is None or loss < run.best_eval_loss:
        run.best_eval_loss, run.best_step, run.evaluations_without_gain = loss, step, 0
        trainer.best = adapter_weights(trainer.model)
        log.info("  step %d: eval loss %.4f, the best so far", step, loss)
    else:
        run.evaluations_without_gain += 1
        best = f"best {run.best_eval_loss:.4f} at step {run.best_step}"
        log.info("  step %d: eval loss %.4f (%s)", step, loss, best)
    run.history.append({"step": step, "eval_loss": loss})
    metrics = {"eval_loss": loss}
    trainer.log(dict(metrics))
    trainer.control = trainer.callback_handler.on_evaluate(
        trainer.args, trainer.state, trainer.control, metrics
    )
    patience = trainer.config.early_stopping_patience
    if patience and run.evaluations_without_gain >= patience:
        log.info("  early stopping: %d evaluations without a better eval loss", patience)
        trainer.control.should_training_stop = True
    return metrics


def writing_problem(error: Exception, staged: Path) -> str:
    """Clear away what could not be written, and return why.

    PyTorch and safetensors say of a full disk only that a write came out short.
    """
    full = shutil.disk_usage(existing_parent(staged)).free < 1_000_000
    shutil.rmtree(staged, ignore_errors=True)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "the disk is full" if full else first_line(error)


def checkpoint_folder(trainer: "LoraTrainer") -> Path:
    """Return where the checkpoint of the step just finished belongs."""
    return Path(trainer.config.output_dir) / f"checkpoint-{trainer.state.global_step}"


def check_room_for_checkpoint(
    trainer: "LoraTrainer", weights: "dict[str, torch.Tensor]", staged: Path
) -> None:
    """Raise OSError where the disk cannot hold the checkpoint, before anything is written."""
    import torch

    held = [*weights.values(), *trainer.best.values()]
    held += [
        value
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    need = sum(value.nbytes for value in held)
    free = shutil.disk_usage(staged).free
    if free < need:
        raise OSError(
            errno.ENOSPC, f"{human_bytes(need)} are needed and {human_bytes(free)} are free"
        )


def write_checkpoint(trainer: "LoraTrainer") -> None:
    """Publish checkpoint-STEP in the output folder: adapter, optimizer, schedule, record."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if not is_main_process():
        return
    weights = adapter_weights(trainer.model)
    if not all(value.isfinite().all() for value in weights.values()):
        raise DeviceGaveUp("the adapter's weights are not finite")
    output, final = Path(trainer.config.output_dir), checkpoint_folder(trainer)
    step, staged = trainer.state.global_step, output / f".staging-{final.name}"
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        check_room_for_checkpoint(trainer, weights, staged)
        trainer.model.peft_config["default"].save_pretrained(str(staged))
        save_file(weights, staged / "adapter_model.safetensors")
        if trainer.best:
            save_file(trainer.best, staged / BEST_ADAPTER)
        torch.save(trainer.optimizer.state_dict(), staged / "optimizer.pt")
        torch.save(trainer.lr_scheduler.state_dict(), staged / "scheduler.pt")
        if trainer.accelerator.scaler is not None:
            torch.save(trainer.accelerator.scaler.state_dict(), staged / "scaler.pt")
        trainer._save_rng_state(str(staged))
        trainer.state.save_to_json(str(staged / "trainer_state.json"))
        write_json(staged / PROGRESS_FILE, dataclasses.asdict(trainer.run))
        publish_folder(staged, final)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise FineTuningError(
            f"Checkpoint {step} cannot be written to {output}: {writing_problem(error, staged)}",
            hint="Make room there (earlier checkpoints are untouched), then run the same command "
            "again: it goes on from the last checkpoint.",
        ) from error
    prune_checkpoints(final, trainer.config.save_total_limit, trainer.run.best_step)
    log.debug("Wrote %s", final)


FAR_ABOVE = 10  # times the mean of the steps before
COLLAPSE_STEPS = 20


def note_collapse(run: RunState, step: int, loss: float) -> None:
    """Warn, once for each episode, of losses that no healthy training has."""
    warning = ""
    run.steps_at_zero = run.steps_at_zero + 1 if loss == 0.0 else 0
    if loss == 0.0:
        if run.steps_at_zero == 1:
            warning = f"the loss of step {step} is exactly 0.0"
    elif run.usual_steps and loss > FAR_ABOVE * run.usual_loss:
        run.steps_far_above += 1
        if run.steps_far_above == COLLAPSE_STEPS:
            warning = (
                f"the loss has been more than {FAR_ABOVE} times its mean before "
                f"({run.usual_loss:.4f}) for {COLLAPSE_STEPS} steps, up to step {step}"
            )
    else:
        run.steps_far_above = 0
        run.usual_steps += 1
        run.usual_loss += (loss - run.usual_loss) / run.usual_steps
    if warning:
        run.loss_warnings.append(warning)
        log.warning("  The training may have collapsed: %s. Lower --learning_rate?", warning)


def progress_note(trainer: "LoraTrainer") -> str:
    """Return what stands beside the bar: the losses, the speed and the memory."""
    run = trainer.run
    evals = (f"eval {r['eval_loss']:.3f}" for r in reversed(run.history) if "eval_loss" in r)
    return ", ".join(
        [
            f"loss {trainer.record['loss']:.3f}",
            *itertools.islice(evals, 1),
            f"{run.input_tokens / max(run.seconds, 1e-9):.0f} tokens/s",
            human_bytes(peak_memory(trainer.args.device.type)),
        ]
    )


def note_step(trainer: "LoraTrainer") -> None:
    """Record a finished step, and show it every logging_steps."""
    run, state, record = trainer.run, trainer.state, trainer.record
    run.seconds += record["seconds"]
    entry = {
        "step": state.global_step,
        "loss": record["loss"],
        "learning_rate": record["learning_rate"],
    }
    if math.isfinite(record["grad_norm"]):  # fp16: not where the scaler skips an overflowing step
        entry["grad_norm"] = record["grad_norm"]
    run.history.append(entry)
    note_collapse(run, state.global_step, record["loss"])
    trainer.bar.move_to(state.global_step, progress_note(trainer))
    trainer.measured += 1
    if trainer.measured == 2:  # the first step warms up
        done = state.global_step / state.max_steps
        left = trainer.plan.seconds(record["seconds"] / record["tokens"], done)
        log.info(
            "  a step takes %s: about %s left",
            human_seconds(record["seconds"]),
            human_seconds(left),
        )
    every = trainer.config.logging_steps
    if state.global_step % every == 0 or state.global_step == state.max_steps:
        losses = [r["loss"] for r in run.history[-2 * every :] if "loss" in r][-every:]
        speed = run.input_tokens / max(run.seconds, 1e-9)
        left = (state.max_steps - state.global_step) * run.seconds / state.global_step
        log.info(
            "  step %d/%d  loss %.4f  grad norm %.3f  lr %.2e  %.0f tokens/s  %s left",
            state.global_step,
            state.max_steps,
            sum(losses) / len(losses),
            record["grad_norm"],
            record["learning_rate"],
            speed,
            human_seconds(left),
        )


@dataclass(frozen=True)
class Plan:
    """Hold what a run will be: optimizer steps, tokens to compute, evaluations on the way."""

    steps: int
    train_tokens: int
    evaluation_tokens: int

    def seconds(self, seconds_per_token: float, done: float = 0) -> float:
        """Estimate the time that is left after a share `done`, from the price of a trained token.

        A token costs half as much to evaluate: there is no backward pass.
        """
        tokens = (1 - done) * (self.train_tokens + self.evaluation_tokens / 2)
        return tokens * seconds_per_token


def make_plan(data: PreparedData, config: FineTuningConfig) -> Plan:
    """Count what the run will compute."""
    steps = total_steps(config, len(data.train))
    train = sum(len(ids) for ids in data.train["input_ids"])
    held_out = sum(len(ids) for ids in data.eval["input_ids"])
    share = min(1, periodic_examples(config) / len(data.eval))
    periodic = steps // config.eval_steps + 1  # after the last step, too
    return Plan(
        steps,
        round(train * steps * effective_batch(config) / len(data.train)),
        # In the end all of them: without the adapter, with it, and with the one that was saved.
        round(held_out * (share * periodic + 3)),
    )


def log_plan(data: PreparedData, config: FineTuningConfig) -> None:
    """Say what the run will be before it starts."""
    plan = make_plan(data, config)
    log.info(
        "  plan: %d steps of %d examples, %s tokens to train on, %s to evaluate",
        plan.steps,
        effective_batch(config),
        f"{plan.train_tokens:,}",
        f"{plan.evaluation_tokens:,}",
    )
    if config.warmup_steps >= plan.steps and config.lr_scheduler_type != "constant":
        log.warning(
            "  warmup_steps %d: the run has only %d steps, so the learning rate never reaches %g",
            config.warmup_steps,
            plan.steps,
            config.learning_rate,
        )


def estimate_run(data: PreparedData, report: PreflightReport, config: FineTuningConfig) -> None:
    """Compute the gradients of two steps, time the second, and print what the run would take."""
    memory = plan_memory(config, report.device, report.dtype, token_counts(data.train))
    log_memory(memory)
    log_plan(data, config)
    model = load_trainable_model(config, report.device, report.dtype, recompute=memory.recompute)
    model.train()
    size = effective_batch(config)
    seconds = tokens = 0.0
    for step in range(2):
        first = step * size % len(data.train)
        examples = list(data.train.select(range(first, min(first + size, len(data.train)))))
        lengths = [len(e["input_ids"]) for e in examples]
        started = time.monotonic()
        for indices in plan_passes(lengths, memory.budget):
            layout = lay_out([examples[i] for i in indices], report.device)
            pass_loss(model, layout).backward()
        seconds, tokens = time.monotonic() - started, sum(lengths)
    left = make_plan(data, config).seconds(seconds / tokens)
    log.info(
        "  a measured step took %s, so the run takes about %s",
        human_seconds(seconds),
        human_seconds(left),
    )


def trainer_arguments(config: FineTuningConfig, device: str) -> "SFTConfig":
    """Return TRL's arguments: one "batch" is the whole effective batch; the engine cuts it up."""
    from trl import SFTConfig

    args = SFTConfig(
        output_dir=config.output_dir,
        per_device_train_batch_size=effective_batch(config),
        gradient_accumulation_steps=1,
        num_train_epochs=config.num_train_epochs,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        lr_scheduler_type=config.lr_scheduler_type,
        # Every precision and memory default of SFTConfig is set: the engine decides these.
        bf16=False,
        fp16=config.fp16 and device == "cuda",
        activation_checkpointing=False,
        use_cpu=device == "cpu",
        logging_strategy="steps",
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=config.save_steps,
        seed=config.seed,
        data_seed=config.seed,
        report_to=config.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs need accelerate launch, not DataParallel
    return args


def effective_batch(config: FineTuningConfig) -> int:
    """Return the examples per optimizer step, over all processes together."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


def build_trainer(
    data: PreparedData, config: FineTuningConfig, model: "PeftModel", run: RunState, device: str
) -> "LoraTrainer":
    """Put the model, the data and the run's record into a trainer."""
    from transformers.trainer_callback import PrinterCallback

    trainer = trainer_class()(
        model=model,
        args=trainer_arguments(config, device),
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=data.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback_class()(trainer))
    trainer.run, trainer.config, trainer.best, trainer.evaluating = run, config, {}, False
    trainer.plan, trainer.measured = make_plan(data, config), 0
    trainer.periodic = data.eval.select(range(min(len(data.eval), periodic_examples(config))))
    return trainer


def periodic_examples(config: FineTuningConfig) -> int:
    """Return how many examples an evaluation during training looks at.

    An example costs half as much to evaluate as to train on (no backward pass), so a fifth of the
    examples trained on between two evaluations keeps evaluation at a tenth of the time.
    """
    if config.max_eval_examples is not None:
        return config.max_eval_examples
    return max(1, config.eval_steps * effective_batch(config) // 5)


def total_steps(config: FineTuningConfig, examples: int) -> int:
    """Return the optimizer steps of the whole run."""
    per_epoch = math.ceil(examples / effective_batch(config))
    return math.ceil(config.num_train_epochs * per_epoch)


def train_on(
    data: PreparedData,
    config: FineTuningConfig,
    device: str,
    dtype: str,
    checkpoint: "Path | None",
) -> TrainResult:
    """Train on one device from a checkpoint, or from the start, to the end."""
    run = start_run(data, config, device, dtype, checkpoint)
    log_plan(data, config)
    model = load_trainable_model(config, device, dtype, recompute=run.recompute)
    prove_engine(model, data.train, device)
    trainer = build_trainer(data, config, model, run, device)
    steps = total_steps(config, len(data.train))
    if checkpoint:
        load_adapter_weights(model, checkpoint / "adapter_model.safetensors")
        if (checkpoint / BEST_ADAPTER).is_file():
            from safetensors.torch import load_file

            trainer.best = load_file(checkpoint / BEST_ADAPTER)
    done = checkpoint_step(checkpoint) if checkpoint else 0
    patience = config.early_stopping_patience
    if done < steps and not (patience and run.evaluations_without_gain >= patience):
        train_to_the_end(trainer, steps, done, checkpoint)
    elif run.last_evaluated_step < done:  # the run was stopped in its last evaluation
        trainer.state.global_step = done
        trainer.evaluate()
    return finish_training(trainer, data, config, device, dtype, done)


WATCHDOG_SECONDS = 300  # the least patience; beyond it, ten times the usual step


@contextlib.contextmanager
def watchdog(trainer: "LoraTrainer") -> Iterator[None]:
    """Speak up when no step ends for ten times the usual time, with every thread's stack logged.

    It counts its own seconds of watching, so that a laptop that slept, a stopped process or a
    clock that was set raise no alarm.
    """
    done = threading.Event()

    def watch() -> None:
        step, waited, told = -1, 0, False
        while not done.wait(1):
            waited += 1
            if trainer.state.global_step != step or trainer.evaluating:
                step, waited, told = trainer.state.global_step, 0, False
                continue
            usual = trainer.run.seconds / max(step, 1)
            patience = max(WATCHDOG_SECONDS, 10 * usual)
            if waited > patience and not told:
                told = True
                report_hang(step + 1, patience, trainer.args.device.type)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def report_hang(step: int, seconds: float, device: str) -> None:
    """Write every thread's stack to the log file and tell the user what to try."""
    with tempfile.TemporaryFile("w+") as stream:
        faulthandler.dump_traceback(stream)
        stream.seek(0)
        log.debug("Stacks of all threads:\n%s", stream.read())
    log.warning(
        "Step %d has not ended for %s. Wait, or stop with Ctrl-C (the run goes on from the last "
        "finished step)%s. The log file shows where every thread stands.",
        step,
        human_seconds(seconds),
        "" if device == "cpu" else f" and try --device cpu instead of {device}",
    )


def keep_awake() -> None:
    """Keep a Mac from falling asleep until this process ends; say when it runs on its battery."""
    import psutil

    if sys.platform != "darwin" or not is_main_process():
        return
    with contextlib.suppress(OSError):
        subprocess.Popen(["caffeinate", "-is", "-w", str(os.getpid())])
        log.info("  the machine is kept awake until the run ends (a closed lid still sleeps)")
    battery = psutil.sensors_battery()
    if battery and not battery.power_plugged:
        log.warning("  on battery (%d %%): plug the power supply in", battery.percent)


def train_to_the_end(
    trainer: "LoraTrainer", steps: int, done: int, checkpoint: "Path | None"
) -> None:
    """Run the trainer; on Ctrl-C or SIGTERM write a checkpoint of the last finished step."""
    keep_awake()
    bar = progress_bar(steps, "steps", "training", initial=done)
    with deferred_signals(), watchdog(trainer), bar as trainer.bar:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (KeyboardInterrupt, Terminated):
            step = trainer.state.global_step
            # Writing it again would leave a moment without it, in which a kill costs steps.
            if step > done and checkpoint_problem(checkpoint_folder(trainer)) is not None:
                write_checkpoint(trainer)
            log.warning(
                "Stopped after step %d of %d; the same command goes on from there", step, steps
            )
            raise
        except pickle.UnpicklingError as error:
            raise FineTuningError(
                f"{checkpoint} holds Python objects where only tensors belong; none was loaded.",
                hint="This program did not write that. Delete the folder and start again.",
            ) from error


def log_memory(memory: MemoryPlan) -> None:
    """Say how the batches are cut, and why."""
    log.info("  forward passes of at most %d tokens: %s", memory.budget, memory.reason)
    if memory.recompute:
        log.info("  activations are recomputed (--gradient_checkpointing)")


def start_run(
    data: PreparedData,
    config: FineTuningConfig,
    device: str,
    dtype: str,
    checkpoint: "Path | None",
) -> RunState:
    """Return the record of a resumed run, or that of a new one with its memory budget."""
    if checkpoint:
        run = RunState(**read_progress(checkpoint))
        log.info("  resuming from %s", checkpoint)
        return run
    memory = plan_memory(config, device, dtype, token_counts(data.train))
    log_memory(memory)
    return RunState(
        run_identity(config, data.source.sha256), memory.budget, recompute=memory.recompute
    )


def finish_training(
    trainer: "LoraTrainer",
    data: PreparedData,
    config: FineTuningConfig,
    device: str,
    dtype: str,
    resumed_from: int,
) -> TrainResult:
    """Load the best adapter, evaluate it and the base completely, and gather the metrics."""
    from peft import set_peft_model_state_dict

    model, run = trainer.model, trainer.run
    if trainer.best:
        set_peft_model_state_dict(model, trainer.best)
    best_step = run.best_step if trainer.best else trainer.state.global_step
    budget = evaluation_budget(run.budget, device)
    eval_loss = mean_loss(model, data.eval, budget, device)
    with model.disable_adapter():
        eval_loss_before = mean_loss(model, data.eval, budget, device)
    if not math.isfinite(eval_loss) or not math.isfinite(eval_loss_before):
        raise DeviceGaveUp("the last evaluation gives no finite loss")
    base_of(model).set_attn_implementation("sdpa")
    trainable, total = model.get_nb_trainable_parameters()
    for warning in run.loss_warnings:
        log.warning("  look at the result with care: %s", warning)
    log.info(
        "  eval loss %.4f before, %.4f after (the adapter of step %d)",
        eval_loss_before,
        eval_loss,
        best_step,
    )
    metrics = {
        "train_loss": run.loss_sum / max(run.supervised_tokens, 1),
        "eval_loss": eval_loss,
        "eval_loss_before": eval_loss_before,
        "best_step": best_step,
        "total_steps": total_steps(config, len(data.train)),
        "train_runtime": round(run.seconds, 3),
        "train_samples_per_second": round(run.examples / max(run.seconds, 1e-9), 3),
        "train_tokens_per_second": round(run.input_tokens / max(run.seconds, 1e-9), 1),
        "input_tokens": run.input_tokens,
        "supervised_tokens": run.supervised_tokens,
        "peak_memory_gb": round(peak_memory(device) / 1e9, 3),
        "device": device,
        "dtype": dtype,
        "trainable_params": trainable,
        "total_params": total,
        "trainable_percent": round(100 * trainable / total, 4),
        "train_examples": len(data.train),
        "eval_examples": len(data.eval),
        "truncated_examples": data.truncated_examples,
        "dropped_examples": len(data.quality.rejected) + data.dropped_examples,
        "resumed_from_step": resumed_from or None,
        "data_sha256": data.source.sha256,
        "loss_warnings": run.loss_warnings,
    }
    return TrainResult(model, data.tokenizer, metrics, tuple(run.history), budget)


def peak_memory(device: str) -> int:
    """Return the most memory that was in use, in bytes: the GPU's own count, else the process's."""
    import resource

    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kB


def train_lora(
    data: PreparedData, report: PreflightReport, config: FineTuningConfig
) -> TrainResult:
    """Train the adapter, resuming from this run's last checkpoint; the best weights are loaded.

    Raises:
        FineTuningError: when the output folder holds another run, when memory or disk run out, or
            when no device gives finite numbers.
    """
    device, dtype = report.device, report.dtype
    checkpoint = once_for_all(lambda: choose_checkpoint(config, data))
    for _ in range(3):
        try:
            return train_on(data, config, device, dtype, checkpoint)
        except DeviceGaveUp as error:
            reason = str(error)
        except (RuntimeError, MemoryError) as error:  # outside of a step, which has its own rungs
            if not is_out_of_memory(error):
                raise
            if device == "cpu":
                raise not_enough_memory(first_line(error).rstrip(".")) from error
            reason = f"out of memory on {device}"
        log.warning("%s; going on from the last checkpoint on the CPU in float32", reason)
        device, dtype = "cpu", "float32"
        checkpoint = newest_whole_checkpoint(Path(config.output_dir)) or checkpoint
    raise FineTuningError(
        "The training gives no finite numbers, on the CPU neither.",
        hint="Lower --learning_rate (2e-5 is the default) and check the data for broken rows: "
        "python unified_finetune.py data",
    )


def choose_checkpoint(config: FineTuningConfig, data: PreparedData) -> "Path | None":
    """Return the checkpoint to go on from; refuse to mix with another run's output."""
    output = Path(config.output_dir)
    identity = run_identity(config, data.source.sha256)
    if config.resume not in ("auto", "never"):
        checkpoint = Path(config.resume).expanduser()
        problem = checkpoint_problem(checkpoint)
        if problem:
            raise FineTuningError(
                f"--resume {checkpoint} cannot be used: {problem}.",
                hint="--resume auto takes the newest whole checkpoint of output_dir.",
            )
        refuse_differences(differences(read_progress(checkpoint)["identity"], identity), checkpoint)
        return checkpoint
    newest = newest_whole_checkpoint(output)
    theirs = read_progress(newest)["identity"] if newest else finished_identity(output)
    if theirs is None:
        return None
    different = differences(theirs, identity)
    if different and not config.overwrite:
        refuse_differences(different, output)
    if different or config.overwrite or config.resume == "never":
        remove_run(output)
        return None
    return newest


def refuse_differences(different: Sequence[str], place: Path) -> None:
    """Stop where a checkpoint or a result belongs to another run."""
    if different:
        raise FineTuningError(
            f"{place} holds another run:\n" + "\n".join("  - " + d for d in different),
            hint="Set the same values again, choose another --output_dir, or replace that run with "
            "--overwrite.",
        )


# ======================================================================================
# Stage 5: save
# ======================================================================================


METRICS_FILE = "training_metrics.json"  # written last: its presence says that the run is finished
CONFIG_FILE = "training_config.json"
QUALITY_FILE = "quality_report.json"
REPORT_PAGE = "report.html"
CURVES_FILE = "curves.png"


def finished_identity(output: Path) -> "dict[str, Any] | None":
    """Return the identity of the finished run in a folder, or None where there is none."""
    try:
        json.loads((output / METRICS_FILE).read_text(encoding="utf-8"))
        saved = json.loads((output / CONFIG_FILE).read_text(encoding="utf-8"))
        return saved["provenance"]["identity"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FineTuningError(
            f"{output} holds a run whose files cannot be read: {first_line(error)}",
            hint="Choose another --output_dir, or replace that run with --overwrite.",
        ) from error


def package_versions() -> "dict[str, str]":
    """Return the versions of Python and of the packages that the result depends on."""
    from importlib import metadata

    names = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "tokenizers")
    return {"python": ".".join(map(str, sys.version_info[:3]))} | {
        name: metadata.version(name) for name in names
    }


def find_finished_run(config: FineTuningConfig, data: PreparedData) -> "RunArtifacts | None":
    """Return this very run's result where the output folder already holds it, whole."""
    output = Path(config.output_dir)
    if config.overwrite or config.resume != "auto":
        return None
    theirs = finished_identity(output)
    if theirs is None or differences(theirs, run_identity(config, data.source.sha256)):
        return None  # stage 4 says what differs
    metrics = json.loads((output / METRICS_FILE).read_text(encoding="utf-8"))
    adapter = output / "adapter_model.safetensors"
    if not adapter.is_file() or sha256_of(adapter) != metrics["adapter_sha256"]:
        log.warning("The adapter in %s is damaged; it is written again", output)
        return None
    log.info("")
    log.info("This run is finished and its adapter is whole: %s", output)
    log.info(
        "  eval loss %.4f before, %.4f after (%s); --overwrite trains it anew",
        metrics["eval_loss_before"],
        metrics["eval_loss"],
        metrics.get("verdict", "no verdict"),
    )
    return RunArtifacts(output, metrics)


RUN_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "tokenizer.model", "chat_template.jinja", CONFIG_FILE, METRICS_FILE,
    QUALITY_FILE, "README.md", REPORT_PAGE, CURVES_FILE,
)  # fmt: skip


def remove_run(output: Path) -> None:
    """Delete what an earlier run left in its folder: the files the program writes, nothing else."""
    log.info("  replacing the earlier run in %s", output)
    (output / METRICS_FILE).unlink(missing_ok=True)  # from here on it is not a finished run
    for name in RUN_FILES:
        (output / name).unlink(missing_ok=True)
    for folder in list_checkpoints(output):
        remove_folder(folder)
    stale = [folder.name for folder in (output / "merged", output / "gguf") if folder.is_dir()]
    if stale:
        log.warning("  %s in %s is the earlier run's: export again", " and ".join(stale), output)


# --- Before and after: the same questions without and with the adapter.


@dataclass(frozen=True)
class Sample:
    """Hold a question with both answers; the reference is None for the user's own questions."""

    question: str
    reference: "str | None"
    base: "Answer"
    tuned: "Answer"


SAMPLE_ANSWERS = 8
SAMPLE_TOKENS = 64  # of an answer; enough to see whether it is one


def sample_questions(
    data: PreparedData, config: FineTuningConfig, room: int
) -> "list[tuple[str, str | None, list[int]]]":
    """Return the user's questions, then held-out ones spread over the lengths.

    Each with its reference and its prompt's tokens, `room` of them at most.
    """
    tokenizer = data.tokenizer
    chosen: list[tuple[str, str | None, list[int]]] = []
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    for text in config.sample_prompts:
        prompt = tokenize_prompt(tokenizer, [*system, {"role": "user", "content": text}])
        if len(prompt) > room:
            log.warning("  too long to answer, left out (sample_prompts): %s", shorten(text))
            continue
        chosen.append((text, None, prompt))
    lengths = token_counts(data.eval)
    fitting = [i for i, prompt in enumerate(data.eval["prompt_length"]) if prompt <= room]
    fitting.sort(key=lambda i: (lengths[i], i))
    count = min(SAMPLE_ANSWERS, len(fitting))
    for k in range(count):
        example = data.eval[fitting[(2 * k + 1) * len(fitting) // (2 * count)]]
        prompt = example["input_ids"][: example["prompt_length"]]
        # Role markers such as <|user|> are ordinary text to Llama's tokenizer.
        text = str(tokenizer.decode(prompt, skip_special_tokens=True))
        chosen.append((re.sub(r"<\|\w+\|>", "", text).strip(), example["answer"], prompt))
    return chosen


def answer_together(
    model: "PeftModel", tokenizer: "PreTrainedTokenizerFast", prompts: "Sequence[Sequence[int]]"
) -> "list[Answer]":
    """Answer prompts greedily in one batch: the weights are read once a token, not once each."""
    import torch

    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    padded = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    device = next(model.parameters()).device
    output = typing.cast("Any", model).generate(
        input_ids=torch.tensor(padded, device=device),
        attention_mask=torch.tensor(mask, device=device),
        generation_config=generation_settings(tokenizer, SAMPLE_TOKENS, GREEDY),
    )
    answers = []
    for tokens in output[:, width:].tolist():
        stopped = tokenizer.eos_token_id in tokens
        kept = tokens[: tokens.index(tokenizer.eos_token_id)] if stopped else tokens
        answers.append(Answer(decode_answer(tokenizer, kept), tuple(kept), stopped))
    return answers


def answer_samples(
    result: TrainResult, data: PreparedData, config: FineTuningConfig
) -> "list[Sample]":
    """Answer the sample questions without and with the adapter."""
    model, tokenizer = result.model.eval(), result.tokenizer
    questions = sample_questions(data, config, context_length(model) - SAMPLE_TOKENS)
    prompts = [prompt for _, _, prompt in questions]
    longest = max(map(len, prompts), default=0) + SAMPLE_TOKENS
    answers: dict[int, tuple[Answer, Answer]] = {}
    with progress_bar(len(prompts), "prompts", "answering") as bar:
        for batch in plan_passes([longest] * len(prompts), result.budget):
            chosen = [prompts[i] for i in batch]
            try:
                with model.disable_adapter():
                    base = answer_together(model, tokenizer, chosen)
                tuned = answer_together(model, tokenizer, chosen)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise FineTuningError(
                    "The answers to the sample questions do not fit into memory.",
                    hint="Close other programs and run the same command again: the training "
                    "itself is kept in the last checkpoint.",
                ) from error
            answers.update(zip(batch, zip(base, tuned, strict=True), strict=True))
            bar.advance(len(batch))
    return [
        Sample(question, reference, *answers[i])
        for i, (question, reference, _) in enumerate(questions)
    ]


def stopped_shares(samples: "Sequence[Sample]") -> "dict[str, float]":
    """Return which share of the answers ended by itself, without and with the adapter."""
    count = max(1, len(samples))
    return {
        "stopped_share_before": round(sum(s.base.stopped for s in samples) / count, 4),
        "stopped_share": round(sum(s.tuned.stopped for s in samples) / count, 4),
        "sample_answers": len(samples),
        "empty_answers": sum(not s.tuned.text.strip() for s in samples),
    }


def describe_stops(samples: "Sequence[Sample]") -> str:
    """Return the same in words."""
    before, after = sum(s.base.stopped for s in samples), sum(s.tuned.stopped for s in samples)
    empty = sum(not s.tuned.text.strip() for s in samples)
    return (
        f"{after} of {len(samples)} answers end by themselves within {SAMPLE_TOKENS} tokens "
        f"(base: {before})" + f"; {empty} SAY NOTHING AT ALL" * bool(empty)
    )


def show_samples(samples: "Sequence[Sample]") -> None:
    """Show a few answers on the console, before and after."""
    own = [s for s in samples if s.reference is None]
    for sample in own or samples[:2]:
        log.info("  question  %s", shorten(sample.question))
        log.info("    before  %s", shorten(sample.base.text))
        log.info("    after   %s", shorten(sample.tuned.text))


# --- The adapter test: what was written, read back into a fresh base, does what was trained.

PROOF_EXAMPLES = 4
PROOF_POSITIONS = 32  # of each example: its last ones
# Relative. PEFT's own layers round in another order than the engine's, and bf16 rounds to 1 in 256.
LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}
# Relative. Same weights, same passes, same kernels: CPUs repeat the loss to the last bit, GPUs may
# choose other kernels for the same product.
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3, "float16": 1e-3}


@dataclass(frozen=True)
class AdapterProof:
    """Hold what an adapter is and does after it was read back from its file."""

    tensors: int
    changed_tensors: int  # not bit for bit those in memory
    updates: int  # lora_B matrices
    zero_updates: int  # of them, those that are zero throughout
    logit_error: float  # ||read back - in memory|| / ||in memory||
    logit_effect: float  # ||read back - base|| / ||base||
    eval_loss: float  # over the complete eval split


def probe_logits(model: "PeftModel", examples: "datasets.Dataset") -> "torch.Tensor":
    """Return the logits of each example's last positions [positions, vocabulary], on the CPU."""
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        parts = [
            model(input_ids=torch.tensor([example["input_ids"]], device=device), use_cache=False)
            .logits[0, -PROOF_POSITIONS:]
            .float()
            .cpu()
            for example in examples
        ]
    return torch.cat(parts)


def read_back(
    result: TrainResult, data: PreparedData, config: FineTuningConfig, folder: Path
) -> AdapterProof:
    """Measure the adapter in `folder` on a fresh base against the one in memory.

    Empties `result.model`: memory holds one base at a time, whoever still refers to the first.
    """
    model = result.model.eval()
    examples = data.eval.select(range(min(PROOF_EXAMPLES, len(data.eval))))
    weights, tuned = adapter_weights(model), probe_logits(model, examples)
    with model.disable_adapter():
        base = probe_logits(model, examples)
    device = str(next(model.parameters()).device)
    dtype = str(base_of(model).dtype).removeprefix("torch.")
    model.to("meta")
    fresh_base = load_base_model(config, device, dtype)
    fresh = attach_adapter(fresh_base, read_adapter_folder(folder), device).eval()
    found = adapter_weights(fresh)
    updates = [value for name, value in found.items() if "lora_B" in name]
    logits = probe_logits(fresh, examples)
    install_engine(fresh)
    return AdapterProof(
        tensors=len(found),
        changed_tensors=sum(
            name not in found or not found[name].equal(value) for name, value in weights.items()
        ),
        updates=len(updates),
        zero_updates=sum(not value.any() for value in updates),
        logit_error=float((logits - tuned).norm() / tuned.norm()),
        logit_effect=float((logits - base).norm() / base.norm()),
        eval_loss=mean_loss(fresh, data.eval, result.budget, device),
    )


def proof_problems(proof: AdapterProof, eval_loss: float, dtype: str) -> "list[str]":
    """Return everything that is wrong with an adapter that was read back."""
    wrong = []
    if proof.changed_tensors:
        wrong.append(
            f"{proof.changed_tensors} of its {proof.tensors} tensors are not those that were "
            "trained"
        )
    if proof.zero_updates == proof.updates:
        wrong.append("every lora_B is zero: it adds nothing to the base model")
    elif not proof.logit_effect > 0:
        wrong.append("the base model gives exactly the same logits with it as without it")
    if not proof.logit_error <= LOGIT_TOLERANCE[dtype]:
        wrong.append(
            f"its logits differ by {proof.logit_error:.2%} from those of the trained model "
            f"(rounding explains {LOGIT_TOLERANCE[dtype]:.2%})"
        )
    if not abs(proof.eval_loss - eval_loss) <= LOSS_TOLERANCE[dtype] * max(eval_loss, 0.1):
        wrong.append(f"its eval loss is {proof.eval_loss:.6f}, and {eval_loss:.6f} was measured")
    return wrong


def prove_adapter(
    result: TrainResult, data: PreparedData, config: FineTuningConfig, folder: Path
) -> "dict[str, Any]":
    """Return the figures of the adapter test for the metrics; an adapter that fails is refused."""
    dtype = str(base_of(result.model).dtype).removeprefix("torch.")
    try:
        proof = read_back(result, data, config, folder)
    except (RuntimeError, MemoryError, FineTuningError) as error:
        if not isinstance(error, FineTuningError) and not is_out_of_memory(error):
            raise
        refuse_adapter([first_line(error)], changed=True)
    wrong = proof_problems(proof, result.metrics["eval_loss"], dtype)
    if wrong:
        useless = proof.zero_updates == proof.updates or not proof.logit_effect > 0
        refuse_adapter(wrong, changed=not useless)
    log.info(
        "  adapter test passed: read back from disk it is bit for bit the trained one, has its "
        "eval loss (%.4f), and moves the base's logits by %.2g %%",
        proof.eval_loss,
        100 * proof.logit_effect,
    )
    return {
        "reloaded_eval_loss": proof.eval_loss,
        "reloaded_logit_error": proof.logit_error,
        "adapter_logit_effect": proof.logit_effect,
        "adapter_tensors": proof.tensors,
        "adapter_zero_updates": proof.zero_updates,
    }


def refuse_adapter(wrong: "Sequence[str]", *, changed: bool) -> typing.NoReturn:
    """Stop where the adapter test failed: the file was changed, or the training did nothing."""
    line = "=" * 80
    raise FineTuningError(
        f"\n{line}\nTHE ADAPTER FAILED ITS TEST. IT IS NOT SAVED, AND THIS RUN IS NOT FINISHED.\n"
        f"{line}\nRead back from disk:\n" + "\n".join("  - " + text for text in wrong),
        hint="The checkpoints are untouched: run the same command again, and the adapter is written"
        " anew from the last one. If it fails again, test this machine's disk and memory."
        if changed
        else "The learning rate was zero, or too small to move anything: set --learning_rate (2e-5 "
        "is the default), keep --warmup_steps well below the run's steps, and start anew with "
        "--overwrite. Only the checkpoints are left in the output folder.",
    )


# --- The verdict: what the losses say, in plain words.

NOTHING_GAINED = 0.002  # of the base's loss: the noise of rounding and of small eval splits
BARELY_GAINED = 0.03
LOSS_RISE = 0.01  # above the best eval loss, in the last two evaluations
FEW_EVAL_ROWS = 30


@dataclass(frozen=True)
class Verdict:
    """Say how a training went, why that is to be believed, and the one next thing to try."""

    kind: Literal["learned", "barely", "overfitting", "not learning"]
    headline: str
    evidence: str
    advice: str
    since_step: "int | None" = None  # of overfitting


@dataclass(frozen=True)
class LossCurves:
    """Hold (step, loss) of the evaluations and of the training, and the peak learning rate."""

    evals: "tuple[tuple[int, float], ...]"
    train: "tuple[tuple[int, float], ...]"
    peak_rate: float


def loss_curves(history: "Sequence[Mapping[str, float]]") -> LossCurves:
    """Pick the curves out of a run's records."""
    return LossCurves(
        tuple((int(r["step"]), r["eval_loss"]) for r in history if "eval_loss" in r),
        tuple((int(r["step"]), r["loss"]) for r in history if "loss" in r),
        max((r["learning_rate"] for r in history if "learning_rate" in r), default=0.0),
    )


def rise_since(curves: LossCurves) -> "int | None":
    """Return the step from which on eval loss has risen, to the end; None where it has not."""
    if not curves.evals:
        return None
    step, best = min(curves.evals, key=lambda point: point[1])
    later = [loss for at, loss in curves.evals if at > step]
    return step if len(later) >= 2 and min(later[-2:]) > best * (1 + LOSS_RISE) else None


def train_loss_fell_after(step: int, curves: LossCurves) -> bool:
    """Tell whether the training loss went on falling while eval loss rose."""
    window = max(1, min(20, len(curves.train) // 4))
    after = [loss for at, loss in curves.train if at > step][-window:]
    if not after:
        return False
    until = [loss for at, loss in curves.train if at <= step][-window:] or [curves.train[0][1]]
    return sum(after) / len(after) < sum(until) / len(until)


def advise(gain: float, curves: LossCurves, risen: "int | None") -> str:
    """Return the one next thing to try, in this order of likelihood."""
    rate = curves.peak_rate
    evals = [loss for _, loss in curves.evals]
    if gain < -NOTHING_GAINED or risen is not None:
        return f"Lower --learning_rate to {rate / 4:.1g}: the loss rose on its way."
    if len(evals) >= 3 and evals[-1] < evals[-2] * (1 - NOTHING_GAINED) and gain > NOTHING_GAINED:
        return "Double --num_train_epochs: the loss was still falling at the end."
    if gain >= BARELY_GAINED:
        return "Ask it what matters to you: chat --compare shows both answers side by side."
    if rate < 1e-4:
        return f"Raise --learning_rate to {min(10 * rate, 2e-4):.1g}, or train for more epochs."
    return "Give it more rows that are alike in form, or more epochs."


def judge_training(
    before: float, after: float, history: "Sequence[Mapping[str, float]]", eval_examples: int
) -> Verdict:
    """Judge by the loss on held-out rows without and with the adapter, and by the curves.

    The evaluations of the history may look at fewer rows than the two complete ones.
    """
    curves = loss_curves(history)
    gain = (before - after) / before if before > 0 else 0.0
    if gain < 0:  # no adapter beat the base, which is then the best point of the curve
        curves = dataclasses.replace(curves, evals=((0, before), *curves.evals))
    few = " That is weak evidence: {} held-out row{}.".format(
        eval_examples, "s" * (eval_examples > 1)
    ) * (eval_examples < FEW_EVAL_ROWS)
    if abs(gain) < NOTHING_GAINED:
        evidence = f"Loss on held-out rows {before:.4f} before, {after:.4f} after: no difference."
    else:
        evidence = (
            f"Loss on held-out rows {'fell' if gain > 0 else 'rose'} from {before:.4f} to "
            f"{after:.4f} ({abs(gain):.1%}): the right next token is {math.exp(before - after):.2f}"
            " times as likely as before."
        )
    evidence += few
    risen = rise_since(curves)
    if risen is not None and train_loss_fell_after(risen, curves):
        saved = (
            f"the saved adapter is that of step {risen}" if risen else "none beat the base model"
        )
        return Verdict(
            "overfitting",
            f"Overfitting since step {risen}." if risen else "Overfitting from the start.",
            f"{evidence} From step {risen} on the loss rose on held-out rows while it fell on the "
            f"training rows: it learned them by heart ({saved}).",
            "Add more varied rows, or train for fewer epochs.",
            risen,
        )
    advice = advise(gain, curves, risen)
    if gain < NOTHING_GAINED:
        return Verdict("not learning", "It is not learning.", evidence, advice)
    if gain < BARELY_GAINED:
        return Verdict("barely", "It barely learned.", evidence, advice)
    return Verdict("learned", "It learned.", evidence, advice)


def verdict_metrics(verdict: Verdict) -> "dict[str, str | int | None]":
    """Return what training_metrics.json says about it."""
    return {
        "verdict": verdict.kind,
        "verdict_evidence": verdict.evidence,
        "verdict_advice": verdict.advice,
        "overfitting_since_step": verdict.since_step,
    }


SPARKS = "▁▂▃▄▅▆▇█"


def sparkline(values: "Sequence[float]", width: int = 40) -> str:
    """Draw values as a line of text, neighbours averaged where there are more than `width`."""
    finite = [value for value in values if math.isfinite(value)]
    points = [value for _, value in thin_out(list(enumerate(finite)), width)]
    if not points:
        return ""
    low, span = min(points), max(points) - min(points)
    return "".join(SPARKS[int((value - low) / span * 7.999) if span else 0] for value in points)


def thin_out(points: "Sequence[tuple[float, float]]", most: int) -> "list[tuple[float, float]]":
    """Average neighbouring points until at most `most` are left."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], sum(value for _, value in g) / len(g)) for g in groups]


def show_outcome(result: TrainResult, samples: "Sequence[Sample]", verdict: Verdict) -> None:
    """Show the summary on the console: curves, answers, verdict."""
    curves = loss_curves(result.history)
    for name, points in (("loss", curves.train), ("eval loss", curves.evals)):
        losses = [loss for _, loss in points]
        if losses:
            log.info("  %-9s  %.3f %s %.3f", name, losses[0], sparkline(losses), losses[-1])
    show_samples(samples)
    if samples:
        log.info("  %s", describe_stops(samples))
    log.info("")
    log.info("  %s %s", verdict.headline.upper(), verdict.evidence)
    log.info("  Next: %s", verdict.advice)
    log.info("")


# --- report.html: one page for a person, without scripts and without anything from elsewhere.

REPORT_STYLE = """
:root{--paper:#fbfaf7;--card:#fff;--ink:#1b1d20;--soft:#62676e;--line:#e4e1da;--accent:#0b6e5f;
--train:#9aa3b5;--good:#0b6e5f;--fair:#96610a;--bad:#b3382c;--tint:#f2f0ea}
@media screen and (prefers-color-scheme:dark){:root{--paper:#131518;--card:#1b1e22;--ink:#e9e7e2;
--soft:#9ba0a8;--line:#2d3137;--accent:#4cc5ad;--train:#737d92;--good:#4cc5ad;--fair:#e0aa4e;
--bad:#f08377;--tint:#22262b}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.6 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:56px 28px 72px}
h1{font-size:clamp(2.3rem,7vw,4rem);line-height:1.06;letter-spacing:-.03em;font-weight:700;
margin:.3em 0 .35em}
h2{font-size:1.45rem;letter-spacing:-.015em;line-height:1.25;margin:72px 0 4px;padding-top:20px;
border-top:1px solid var(--line)}
h3{font-size:1rem;margin:0 0 8px}
p{margin:.4em 0 1em;max-width:68ch}
.eyebrow{font-size:.8rem;letter-spacing:.06em;color:var(--soft);margin:0;max-width:none}
.lead{font-size:1.18rem;line-height:1.55}
.note{color:var(--soft);font-size:.92rem}
.next{background:var(--tint);border-radius:12px;padding:14px 18px;max-width:68ch}
.next b{color:var(--verdict);margin-right:.5em}
.learned{--verdict:var(--good)}.barely,.overfitting{--verdict:var(--fair)}
.not-learning{--verdict:var(--bad)}
header h1{color:var(--verdict)}
.figures{display:grid;grid-template-columns:repeat(3,1fr);gap:1px;background:var(--line);
border:1px solid var(--line);border-radius:14px;overflow:hidden;margin:36px 0 0}
.figures div{background:var(--card);padding:18px 20px}
dt{font-size:.85rem;color:var(--soft)}
dd{margin:0}
.figures dd{font-size:1.6rem;line-height:1.3;font-weight:650;letter-spacing:-.02em}
.figures dd i{font-style:normal;font-weight:400;color:var(--soft)}
.figures small{display:block;font-size:.85rem;font-weight:400;letter-spacing:0;color:var(--soft)}
.charts{display:grid;grid-template-columns:1.55fr 1fr;gap:24px 32px;margin-top:24px}
.charts.even{grid-template-columns:1fr 1fr}
.charts .tall{grid-row:span 2}
figure{margin:0;min-width:0}
figcaption{font-weight:600;font-size:.95rem;margin-bottom:6px;display:flex;flex-wrap:wrap;
gap:2px 16px;align-items:baseline}
.key{font-weight:400;font-size:.85rem;color:var(--soft);white-space:nowrap}
.key::before{content:"";display:inline-block;width:16px;height:0;margin-right:6px;
vertical-align:middle;border-top:3px solid var(--c)}
.key.base::before{border-top-style:dashed;border-top-width:2px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:12.5px;fill:var(--soft)}
.grid{stroke:var(--line);stroke-width:1}
.train{--c:var(--train)}.eval,.rate,.norm,.bar{--c:var(--accent)}.base{--c:var(--soft)}
polyline{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
polyline.train{stroke-width:1.5}
polyline.base{stroke-width:1.5;stroke-dasharray:5 5}
circle{fill:var(--c)}circle.hit{fill:transparent}circle:hover{fill:var(--ink)}
circle.best{fill:var(--paper);stroke:var(--accent);stroke-width:2.5}
svg text.best{fill:var(--ink);font-weight:600;paint-order:stroke;stroke:var(--paper);
stroke-width:4px}
rect{fill:var(--c)}rect:hover{fill:var(--ink)}
.charts+details{margin-top:22px}
details{border-bottom:1px solid var(--line);padding:10px 0}
summary{cursor:pointer;display:flex;flex-wrap:wrap;gap:2px 12px;align-items:baseline;
list-style:none}
summary::-webkit-details-marker{display:none}
summary::before{content:"+";color:var(--soft);width:.9em;font-weight:600}
details[open]>summary::before{content:"\\2013"}
summary .count{margin-left:auto;font-weight:600}
.tag{font-size:.78rem;line-height:1.5;border-radius:99px;padding:1px 9px;background:var(--tint);
color:var(--soft);white-space:nowrap}
.tag.drop,.tag.bad{color:var(--bad)}.tag.repair,.tag.good{color:var(--good)}
.tag.warn{color:var(--fair)}
ul.rows{list-style:none;margin:8px 0 4px;padding:0 0 0 1.65em}
ul.rows li{margin:0 0 6px;font-size:.92rem}
ul.rows b{font-weight:600;margin-right:.6em}
article{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:20px 22px;
margin:16px 0}
.text{white-space:pre-wrap;margin:0}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:12px 28px;margin-top:14px}
.pair h4{margin:0 0 4px;font-size:.85rem;color:var(--soft);font-weight:500;display:flex;gap:8px;
flex-wrap:wrap;align-items:baseline}
.pair .tuned{border-left:3px solid var(--accent);padding-left:16px}
article h3{max-height:14em;overflow:auto}
article details{border:0;padding:12px 0 0;color:var(--soft);font-size:.92rem}
table{border-collapse:collapse;width:100%;font-size:.88rem;margin:6px 0}
td{padding:5px 0;border-bottom:1px solid var(--line);vertical-align:top}
td:first-child{color:var(--soft);padding-right:20px;width:40%}
.proof{list-style:none;padding:0;margin:14px 0}
.proof li{padding-left:1.8em;margin:6px 0;position:relative}
.proof li::before{content:"\\2713";position:absolute;left:0;color:var(--good);font-weight:700}
@media(min-width:900px){.tall svg text{font-size:9.5px}}
@media(max-width:720px){main{padding:32px 18px 48px}h2{margin-top:52px}
.figures{grid-template-columns:1fr 1fr}.figures div{padding:14px}.figures dd{font-size:1.25rem}
.charts,.charts.even,.pair{grid-template-columns:1fr}article{padding:16px}
summary .meaning{order:3;width:100%;padding-left:1.65em}}
@media print{body{background:#fff;font-size:10.5pt}main{padding:0;max-width:none}
h2{margin-top:28px}figure,article,.figures{break-inside:avoid}h2,h3{break-after:avoid}
article h3{max-height:none}
details::details-content{content-visibility:visible;height:auto;display:block}
summary::before{content:none}article,.figures,.figures div{background:none}}
"""


@dataclass(frozen=True)
class Curve:
    """Hold one line of a chart; `style` is its class in REPORT_STYLE."""

    label: str
    style: str
    points: "Sequence[tuple[float, float]]"


@dataclass(frozen=True)
class Axis:
    """Map values from the first tick to the last onto places from `start` to `end`."""

    ticks: "tuple[float, ...]"
    start: float
    end: float

    def place(self, value: float) -> float:
        """Return where a value stands."""
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return round(self.start + share * (self.end - self.start), 1)


def round_ticks(low: float, high: float, most: int = 5) -> "tuple[float, ...]":
    """Return round numbers, evenly spaced, from at most `low` to at least `high`."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    power = 10 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = factor * power
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    return tuple(float(f"{number * step:.6g}") for number in range(first, last + 1))


def draw_axes(across: Axis, up: Axis, labels: "Mapping[float, str]") -> str:
    """Return the grid with its numbers; `labels` are those of the horizontal axis."""
    parts = []
    for tick in up.ticks:
        y = up.place(tick)
        parts.append(
            f'<line class="grid" x1="{across.start}" x2="{across.end}" y1="{y}" y2="{y}"/>'
            f'<text x="{across.start - 7}" y="{y + 4}" text-anchor="end">{tick:,g}</text>'
        )
    for place, label in labels.items():
        x = across.place(place)
        parts.append(f'<text x="{x}" y="{up.start + 19}" text-anchor="middle">{label}</text>')
    return "".join(parts)


MOST_POINTS = 160  # of a curve: more would only be ink


def draw_curve(curve: Curve, across: Axis, up: Axis) -> str:
    """Return one line, with a place to hover over for every point."""
    points = thin_out(curve.points, MOST_POINTS)
    places = [(across.place(x), up.place(y)) for x, y in points]
    path = " ".join(f"{x},{y}" for x, y in places)
    few = len(points) <= 40 and curve.style != "base"
    shown = f'class="{curve.style}" r="2.5"' if few else 'class="hit" r="5"'
    return f'<polyline class="{curve.style}" points="{path}"/>' + "".join(
        f'<circle {shown} cx="{x}" cy="{y}"><title>step {step:g}: {curve.label} {value:.4g}</title>'
        "</circle>"
        for (x, y), (step, value) in zip(places, points, strict=True)
    )


def line_chart(
    title: str,
    curves: "Sequence[Curve]",
    height: int,
    best: "tuple[float, float] | None" = None,
    kind: str = "",
) -> str:
    """Return a figure of curves over the steps; `best` is a point to mark."""
    curves = [
        dataclasses.replace(c, points=[p for p in c.points if math.isfinite(p[1])]) for c in curves
    ]
    curves = [c for c in curves if c.points]
    if not curves:
        return ""
    values = [y for c in curves for _, y in thin_out(c.points, MOST_POINTS)]
    if best:
        values.append(best[1])
    last = max(1, *(x for c in curves for x, _ in c.points))
    ticks = round_ticks(0, last)
    across = Axis((*ticks[:-1], last), 46, 430)  # it ends where the run ends
    up = Axis(round_ticks(min(values), max(values), 5 if height > 200 else 3), height - 26, 10)
    labels = {tick: f"{tick:,g}" for tick in ticks if tick <= last and tick % 1 == 0}
    body = draw_axes(across, up, labels) + "".join(draw_curve(c, across, up) for c in curves)
    if best:
        x, y = across.place(best[0]), up.place(best[1])
        anchor = "end" if x > 330 else "start"
        body += (
            f'<circle class="best" cx="{x}" cy="{y}" r="4.5"><title>best step {best[0]:g}: '
            f'{best[1]:.4g}</title></circle><text class="best" x="{x}" y="{y - 11}" '
            f'text-anchor="{anchor}">best, step {best[0]:g}</text>'
        )
    keys = "".join(f'<span class="key {c.style}">{c.label}</span>' for c in curves)
    return (
        f'<figure class="{kind}"><figcaption>{title}{keys if len(curves) > 1 else ""}</figcaption>'
        f'<svg viewBox="0 0 440 {height}" role="img" aria-label="{title}">{body}</svg></figure>'
    )


def bar_chart(
    title: str, edges: "Sequence[float]", counts: "Sequence[int]", unit: str, number: str = "{:g}"
) -> str:
    """Return a histogram: `counts` of rows between neighbouring `edges`."""
    across, up = Axis(tuple(edges), 46, 430), Axis(round_ticks(0, max(5, *counts)), 194, 14)
    every = math.ceil(len(counts) / 7)
    labels = {edge: number.format(edge) for edge in edges[::every]}
    bars = []
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        x, top = across.place(low) + 1, up.place(count)
        width = max(1, across.place(high) - x - 1)
        if count:
            tall = max(1.5, 194 - top)  # the smallest bar is still seen
            bars.append(
                f'<rect class="bar" x="{x:.1f}" y="{194 - tall:.1f}" width="{width:.1f}" '
                f'height="{tall:.1f}" rx="1.5"><title>{number.format(low)} to '
                f"{number.format(high)} {unit}: {count:,} rows</title></rect>"
            )
            if len(counts) <= 10:
                place = f'x="{x + width / 2:.1f}" y="{188 - tall:.1f}"'
                bars.append(f'<text {place} text-anchor="middle">{count:,}</text>')
    return (
        f"<figure><figcaption>{title}</figcaption>"
        f'<svg viewBox="0 0 440 220" role="img" aria-label="{title}">'
        f"{draw_axes(across, up, labels)}{''.join(bars)}</svg></figure>"
    )


def length_chart(data: PreparedData) -> str:
    """Return the histogram of the examples' lengths."""
    lengths = token_counts(data.train) + token_counts(data.eval)
    edges = round_ticks(0, max(lengths), 20)
    counts = [0] * (len(edges) - 1)
    for length in lengths:
        counts[min(int(length / edges[1]), len(counts) - 1)] += 1
    return bar_chart("Tokens per row", edges, counts, "tokens", "{:,.0f}")


def report_charts(result: TrainResult) -> str:
    """Return the charts of the training."""
    curves, metrics = loss_curves(result.history), result.metrics
    before, last = metrics["eval_loss_before"], max([*curves.train, *curves.evals, (1, 0)])[0]
    saved = [point for point in curves.evals if point[0] == metrics["best_step"]]
    saved = saved or [(metrics["best_step"], metrics["eval_loss"])]
    base = Curve("held-out rows, base model", "base", [(0, before), (last, before)])
    norms, rates = (
        [(r["step"], r[name]) for r in result.history if name in r]
        for name in ("grad_norm", "learning_rate")
    )
    losses = [
        Curve("training rows", "train", curves.train),
        Curve("held-out rows", "eval", curves.evals),
        base,
    ]
    return (
        line_chart("Loss", losses, 300, saved[0], "tall")
        + line_chart("Learning rate", [Curve("learning rate", "rate", rates)], 176)
        + line_chart("Gradient norm", [Curve("gradient norm", "norm", norms)], 176)
    )


def figure_tiles(result: TrainResult, data: PreparedData, samples: "Sequence[Sample]") -> str:
    """Return the numbers that matter most."""
    m, quality = result.metrics, data.quality
    before, after = m["eval_loss_before"], m["eval_loss"]
    change = f"{(after - before) / before:+.1%}".replace("-", "−") if before else "no change"
    stops = [sum(s.base.stopped for s in samples), sum(s.tuned.stopped for s in samples)]
    usable = f"{math.floor(1000 * quality.quality_score) / 10:g} %"  # 100 % only where all are
    return f"""<div><dt>Loss on held-out rows</dt><dd><i>{before:.3f} →</i> {after:.3f}
<small>{change} against the base model</small></dd></div>
<div><dt>Answers that end by themselves</dt><dd><i>{stops[0]} →</i> {stops[1]} of {len(samples)}
<small>within {SAMPLE_TOKENS} tokens</small></dd></div>
<div><dt>Rows</dt><dd>{m["train_examples"]:,}<small>to train, {m["eval_examples"]:,} held out,
{m["dropped_examples"]:,} dropped</small></dd></div>
<div><dt>Data quality</dt><dd>{usable}<small>{quality.valid_examples:,} of
{quality.total_examples:,} rows usable, mean score {quality.mean_score:.2f}</small></dd></div>
<div><dt>Training time</dt><dd>{human_seconds(m["train_runtime"])}
<small>{m["train_tokens_per_second"]:,.0f} tokens/s on {m["device"]}, {m["dtype"]}</small></dd>
</div><div><dt>Memory at its peak</dt><dd>{m["peak_memory_gb"]:.1f} GB
<small>{m["trainable_params"]:,} of {m["total_params"]:,} parameters trained</small></dd></div>"""


def check_list(quality: QualityReport) -> str:
    """Return every check that found something, with example rows, and the worst rows."""
    blocks: list[str] = []
    found = [(name, d) for name, d in quality.check_details.items() if d["count"]]
    for name, details in found:
        rows = "".join(
            f"<li><b>row {e['row']}</b>{html.escape(str(e['detail']))}</li>"
            for e in details["examples"]
        )
        blocks.append(
            f"<details{' open' * (len(blocks) < 3)}><summary><b>"
            f'{html.escape(name.replace("_", " "))}</b><span class="tag {details["action"]}">'
            f'{details["action"]}</span><span class="note meaning">'
            f'{html.escape(details["meaning"])}</span><span class="count">{details["count"]:,}'
            f'</span></summary><ul class="rows">{rows}</ul></details>'
        )
    worst = "".join(
        f"<li><b>row {w['row']}, score {w['score']:.2f}</b>{html.escape(w['text'])} "
        f'<span class="tag">{html.escape(", ".join(w["checks"]).replace("_", " "))}</span></li>'
        for w in quality.worst_rows
    )
    if worst:
        blocks.append(
            "<details><summary><b>The rows with the lowest scores</b><span class='count'>"
            f"{len(quality.worst_rows)}</span></summary><ul class='rows'>{worst}</ul></details>"
        )
    return "".join(blocks) or "<p>No check found anything.</p>"


def sample_articles(samples: "Sequence[Sample]") -> str:
    """Return the answers side by side."""

    def column(name: str, style: str, answer: "Answer") -> str:
        end = ("good", "ended by itself") if answer.stopped else ("", "cut off")
        return (
            f'<div class="{style}"><h4>{name}<span class="tag {end[0]}">{end[1]}</span></h4>'
            f'<p class="text">{html.escape(answer.text.strip())}</p></div>'
        )

    return "".join(
        f'<article><h3 class="text">{html.escape(s.question)}</h3><div class="pair">'
        f"{column('Base model', 'base', s.base)}{column('With the adapter', 'tuned', s.tuned)}"
        "</div>"
        + (
            "<details><summary>The answer in the data</summary>"
            f'<p class="text">{html.escape(s.reference)}</p></details>'
            if s.reference is not None
            else ""
        )
        + "</article>"
        for s in samples
    )


def fact_table(title: str, facts: "Mapping[str, object]") -> str:
    """Return names and values, folded."""
    rows = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<details><summary><b>{title}</b></summary><table>{rows}</table></details>"


def report_sections(
    result: TrainResult,
    data: PreparedData,
    config: FineTuningConfig,
    samples: "Sequence[Sample]",
) -> "Iterator[tuple[str, str, str]]":
    """Yield each section's title, what there is to know first, and its body."""
    metrics, held_out = result.metrics, len(data.eval)
    partial = periodic_examples(config)
    warnings = "".join(f" Look at it with care: {text}." for text in metrics["loss_warnings"])
    subset = (
        f" The curve looks at {partial:,} of the {held_out:,} held-out rows; the dashed line and "
        "the numbers above at all of them."
    ) * (partial < held_out)
    yield (
        "Training",
        f"Steps: {metrics['total_steps']:,}. Loss is the surprise per answer token: lower is "
        "better, and what counts is that on held-out rows, which were never trained on."
        + subset
        + warnings,
        f'<div class="charts">{report_charts(result)}</div>',
    )
    tenths = [n / 10 for n in range(11)]
    scores = bar_chart("Score per row", tenths, data.quality.score_histogram, "points", "{:.1f}")
    yield (
        "Data",
        "Rows count from 0, as in quality_report.json, which names every row that was left out.",
        f'<div class="charts even">{length_chart(data)}{scores}</div>{check_list(data.quality)}',
    )
    yield (
        "Answers before and after",
        describe_stops(samples) + ". Your own questions first, then held-out ones.",
        sample_articles(samples),
    )
    yield (
        "Is the saved adapter the trained one?",
        "Its file was read back into a fresh copy of the base model.",
        f"""<ul class="proof"><li>All {metrics["adapter_tensors"]} tensors are finite, and bit for
bit those that were trained.</li><li>Its loss on the held-out rows is
{metrics["reloaded_eval_loss"]:.6f} again.</li><li>It gives the trained model's logits (difference
{metrics["reloaded_logit_error"]:.2g}), and moves the base model's by
{metrics["adapter_logit_effect"]:.2%}.</li></ul>""",
    )
    origin = {
        "data": data.source.source,
        "data sha256": metrics["data_sha256"],
        "adapter sha256": metrics["adapter_sha256"],
        "unified_finetune": __version__,
        "operating system": platform.platform(),
    }
    tables = fact_table("Settings", saved_settings(config)) + fact_table("Numbers", metrics)
    tables += fact_table("Versions and hashes", origin | package_versions())
    yield "Details", "Everything that is needed to repeat this run.", tables


def report_page(
    result: TrainResult,
    data: PreparedData,
    config: FineTuningConfig,
    samples: "Sequence[Sample]",
    verdict: Verdict,
) -> str:
    """Return the page; `result.metrics` are the final ones."""
    sections = "".join(
        f'<h2>{title}</h2><p class="note">{html.escape(note)}</p>{body}'
        for title, note, body in report_sections(result, data, config, samples)
    )
    headline, evidence, advice, model, name, source = map(
        html.escape,
        (
            verdict.headline,
            verdict.evidence,
            verdict.advice,
            config.model_name,
            Path(config.output_dir).name,
            data.source.path.name,
        ),
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<title>{headline} {name}</title><style>{REPORT_STYLE}</style></head><body><main>
<header class="{verdict.kind.replace(" ", "-")}">
<p class="eyebrow">{model} · {source} · {datetime.now():%Y-%m-%d %H:%M}</p>
<h1>{headline}</h1><p class="lead">{evidence}</p>
<p class="next"><b>Next</b>{advice}</p></header>
<dl class="figures">{figure_tiles(result, data, samples)}</dl>
{sections}
</main></body></html>
"""


# --- The model card.


def draw_curves(result: TrainResult, path: Path) -> None:
    """Draw the loss curves as a PNG for the model card, which shows no SVG."""
    from matplotlib.figure import Figure

    curves, metrics = loss_curves(result.history), result.metrics
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curves.train, strict=True), color="#9aa3b5", lw=1.2, label="training rows")
    if curves.evals:
        axes.plot(
            *zip(*curves.evals, strict=True), color="#0b6e5f", marker="o", ms=3, label="held-out"
        )
    axes.axhline(
        metrics["eval_loss_before"], color="#62676e", ls="--", lw=1, label="held-out, base model"
    )
    axes.plot(
        metrics["best_step"],
        metrics["eval_loss"],
        "o",
        color="#0b6e5f",
        mfc="white",
        ms=8,
        label=f"the saved adapter, step {metrics['best_step']}",
    )
    axes.set(xlabel="step", ylabel="loss per answer token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e1da")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def card_header(config: FineTuningConfig, data: PreparedData, metrics: "dict[str, Any]") -> str:
    """Return the YAML that the Hugging Face hub reads.

    A base model in a local folder and data in a bucket have no names there: `base_model` and
    `datasets` hold hub ids only, so the data set is named in the results alone.
    """
    from huggingface_hub import EvalResult, ModelCardData

    local = Path(config.model_name).expanduser().is_dir()
    name = Path(config.output_dir).resolve().name
    loss = metrics["eval_loss"]
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type="instruction-rows",
            dataset_name=data.source.path.name,
            dataset_split="held-out",
            metric_type=kind,
            metric_name=f"{kind} per answer token",
            metric_value=round(value, 4),
        )
        for kind, value in (("loss", loss), ("perplexity", math.exp(min(loss, 700))))
    ]
    return ModelCardData(
        base_model=None if local else config.model_name,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "sft", "unified-finetune"],
        metrics=["loss", "perplexity"],
        model_name=name,
        eval_results=results,
    ).to_yaml()


def table_rows(facts: "Mapping[str, object]") -> str:
    """Return the rows of a Markdown table, a line each whatever the values hold."""
    return "\n".join(
        "| {} | {} |".format(name, " ".join(str(value).split()).replace("|", "\\|"))
        for name, value in facts.items()
    )


def model_card(
    config: FineTuningConfig,
    data: PreparedData,
    metrics: "dict[str, Any]",
    samples: "Sequence[Sample]",
    verdict: Verdict,
) -> str:
    """Return the model card: a header that the Hugging Face hub reads, then text for people."""
    answers = "\n\n".join(
        f"**Question**\n\n{quoted(s.question)}\n\n**Base**\n\n{quoted(s.base.text)}\n\n"
        f"**Adapter**\n\n{quoted(s.tuned.text)}"
        for s in samples
    )
    asked: dict[str, str] = {"role": "user", "content": "Your question"}
    messages = [{"role": "system", "content": config.system_prompt}] * bool(config.system_prompt)
    return f"""---
{card_header(config, data, metrics)}
---
# LoRA adapter for {config.model_name}

**{verdict.headline}** {verdict.evidence} {verdict.advice}

Trained by unified_finetune {__version__} on {metrics["train_examples"]} instruction rows
(`{data.source.path.name}`, sha256 `{data.source.sha256}`), evaluated on
{metrics["eval_examples"]} held-out rows.

![Loss over the steps]({CURVES_FILE})

## Use

```python
from peft import AutoPeftModelForCausalLM
from transformers import PreTrainedTokenizerFast

model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = PreTrainedTokenizerFast.from_pretrained("THIS_FOLDER")
messages = {[*messages, asked]!r}
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
answer = model.generate(**inputs, max_new_tokens=200, eos_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

## Samples

Greedy answers to questions that were not trained on, of the base model and with the adapter.
{describe_stops(samples)}.

{answers}

## Numbers

| name | value |
| --- | --- |
{table_rows(metrics)}

## Settings

| name | value |
| --- | --- |
{table_rows(saved_settings(config))}
"""


def quoted(text: str) -> str:
    """Return text as a Markdown code block that its content cannot leave."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
    return f"{fence}\n{text}\n{fence}"


# --- The stage.


def write_tokenizer(
    tokenizer: "PreTrainedTokenizerFast", places: Sequence[Path], folder: Path
) -> None:
    """Write the tokenizer so that every reader splits text as in training.

    Its files come as they are from the first of `places` that has them: save_pretrained of
    transformers 5 moves the chat template to a file that Ollama does not read, and leaves
    tokenizer.model out.
    """
    tokenizer.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer.model", "special_tokens_map.json"):
        for place in places:
            if (place / name).is_file():
                shutil.copyfile(place / name, folder / name)
                break
    settings = read_json_object(folder / "tokenizer_config.json")
    settings["chat_template"] = tokenizer.chat_template
    # Under a Llama class, transformers 5 rebuilds the tokenizer and splits text after </s> in
    # another way; this one takes tokenizer.json as it is, in every version.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for unportable in ("backend", "is_local", "local_files_only"):
        settings.pop(unportable, None)
    write_json(folder / "tokenizer_config.json", settings)
    if not (folder / "special_tokens_map.json").is_file():
        write_json(folder / "special_tokens_map.json", tokenizer.special_tokens_map)


def move_into_place(staged: Path, output: Path) -> None:
    """Flush staged files to the disk and move them into the output folder, the metrics last."""
    names = sorted(p.name for p in staged.iterdir())
    names.remove(METRICS_FILE)
    for name in [*names, METRICS_FILE]:
        flush_to_disk(staged / name)
        (staged / name).chmod(0o644)  # safetensors writes 0600
    (output / METRICS_FILE).unlink(missing_ok=True)
    for name in [*names, METRICS_FILE]:
        (staged / name).replace(output / name)
    staged.rmdir()
    flush_to_disk(output)


def write_accounts(
    folder: Path,
    result: TrainResult,
    data: PreparedData,
    config: FineTuningConfig,
    samples: "Sequence[Sample]",
    verdict: Verdict,
) -> None:
    """Write everything that tells of the run: settings, numbers, report, model card."""
    identity = run_identity(config, data.source.sha256)
    provenance = {
        "program": f"unified_finetune {__version__}",
        "packages": package_versions(),
        "data_sha256": data.source.sha256,
        "identity": identity,
    }
    write_json(folder / CONFIG_FILE, saved_settings(config) | {"provenance": provenance})
    write_json(folder / QUALITY_FILE, dataclasses.asdict(data.quality))
    write_json(folder / METRICS_FILE, result.metrics)
    draw_curves(result, folder / CURVES_FILE)
    pages = {
        "README.md": model_card(config, data, result.metrics, samples, verdict),
        REPORT_PAGE: report_page(result, data, config, samples, verdict),
    }
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")


def save_results(result: TrainResult, data: PreparedData, config: FineTuningConfig) -> RunArtifacts:
    """Write the adapter, test it, and write its metrics, its report and its model card.

    Nothing reaches the output folder before the adapter has passed its test, and the metrics,
    which mark a finished run, reach it last. `result.model` is empty afterwards.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    output = Path(config.output_dir)
    staged = output / RESULT_STAGING
    samples = answer_samples(result, data, config)
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        result.model.peft_config["default"].save_pretrained(str(staged))
        weights = adapter_weights(result.model)
        save_file(weights, staged / "adapter_model.safetensors", metadata={"format": "pt"})
        write_tokenizer(result.tokenizer, (base_model_folder(config.model_name),), staged)
        digest = sha256_of(staged / "adapter_model.safetensors")
        proof = prove_adapter(result, data, config, staged)
        verdict = judge_training(
            result.metrics["eval_loss_before"],
            result.metrics["eval_loss"],
            result.history,
            len(data.eval),
        )
        metrics = result.metrics | stopped_shares(samples) | proof
        metrics |= verdict_metrics(verdict) | {"adapter_sha256": digest}
        final = dataclasses.replace(result, metrics=metrics)
        write_accounts(staged, final, data, config, samples, verdict)
        move_into_place(staged, output)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise FineTuningError(
            f"The results cannot be written to {output}: {writing_problem(error, staged)}",
            hint="Make room there, then run the same command again: the training itself is kept in "
            "the last checkpoint.",
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    show_outcome(result, samples, verdict)
    log.info("  adapter in %s, and %s for you to read", output, REPORT_PAGE)
    log.info("  talk to it: %s chat --output_dir %s", program_command(), shlex.quote(str(output)))
    return RunArtifacts(output, metrics)


# ======================================================================================
# Chat
# ======================================================================================


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Hold the flags of `chat`."""

    # fmt: off
    # ruff: disable[E501]
    prompt: "str | None" = option(None, "answer this on stdout, then exit", verbatim=True)
    compare: bool = option(False, "show the base model's answer beside the adapter's")
    no_system_prompt: bool = option(False, "leave out the system message that the adapter was trained with")
    max_new_tokens: int = option(512, "longest answer, in tokens", at_least=1)
    temperature: float = option(0, "0: always the likeliest token (greedy); above: sample, seeded by --seed", at_least=0, at_most=100)
    top_p: float = option(1, "sample from the likeliest tokens that make up this share of the probability", above=0, at_most=1)
    top_k: int = option(0, "sample from so many of the likeliest tokens (0: all)", at_least=0)
    repetition_penalty: float = option(1, "above 1: make tokens that occurred before less likely", at_least=0.1, at_most=10)
    # ruff: enable[E501]
    # fmt: on

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with options that are fine one by one."""
        if self.prompt is not None and not self.prompt.strip():
            yield "--prompt must not be empty"
        if self.temperature == 0 and (self.top_p != 1 or self.top_k != 0):
            yield "--top_p and --top_k change nothing at temperature 0; add --temperature 0.7"
        if 0 < self.temperature < 0.01:
            yield f"--temperature must be 0 or at least 0.01, not {self.temperature}"

    def sampling(self) -> "Sampling":
        """Return how tokens are chosen."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.repetition_penalty)


@dataclass(frozen=True)
class Sampling:
    """Say how the next token is chosen; the defaults are greedy."""

    temperature: float = 0
    top_p: float = 1
    top_k: int = 0
    repetition_penalty: float = 1


GREEDY = Sampling()


@dataclass(frozen=True)
class Answer:
    """Hold one answer: text, tokens (without the end token), and whether it ended by itself."""

    text: str
    token_ids: "tuple[int, ...]"
    stopped: bool


@dataclass(frozen=True)
class AdapterFolder:
    """Describe a trained adapter on disk whose files were found whole."""

    path: Path
    base_model: str

    @property
    def weights(self) -> Path:
        """Return the file of its tensors."""
        return self.path / "adapter_model.safetensors"

    def base_folder(self) -> Path:
        """Return the local folder of its base model, fetched where that is not cached."""
        try:
            return base_model_folder(self.base_model)
        except FineTuningError as error:
            raise FineTuningError(
                f"The adapter's base model is not there. {error}",
                hint=f"{self.path / 'adapter_config.json'} names it (base_model_name_or_path): "
                "write its Hugging Face id or its folder there.",
            ) from error

    def tokenizer_folder(self) -> Path:
        """Return where its tokenizer is: with the adapter, or else with the base model."""
        return self.path if (self.path / "tokenizer.json").is_file() else self.base_folder()


@dataclass(frozen=True)
class ServedModel:
    """Hold a model that is ready to answer."""

    model: "PreTrainedModel | PeftModel"
    tokenizer: "PreTrainedTokenizerFast"
    system_prompt: "str | None"
    description: str

    @property
    def context(self) -> int:
        """Return how many tokens prompt and answer may have together."""
        return context_length(self.model)


def read_json_object(path: Path) -> "dict[str, Any]":
    """Return the object in a JSON file; raise FineTuningError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FineTuningError(
            f"{path} cannot be read: {first_line(error)}",
            hint="The file is damaged; restore it from a copy, or train again.",
        ) from error
    if not isinstance(content, dict):
        raise FineTuningError(
            f"{path} does not hold a JSON object.",
            hint="The file is damaged; restore it from a copy, or train again.",
        )
    return content


def read_trained_system_prompt(folder: Path) -> "str | None":
    """Return the system message that training_config.json names, or None."""
    path = folder / CONFIG_FILE
    prompt = read_json_object(path).get("system_prompt") if path.is_file() else None
    if prompt is not None and not isinstance(prompt, str):
        raise FineTuningError(f"system_prompt in {path} is no text: {prompt!r}")
    return prompt


def read_adapter_folder(folder: Path) -> AdapterFolder:
    """Find a LoRA adapter's files in `folder`, whole; weights in pickles are never read."""
    if not (folder / "adapter_config.json").is_file():
        found = sorted(p.name for p in folder.glob("adapter_model.*"))
        raise FineTuningError(
            f"{folder} holds {found[0]} but no adapter_config.json; the adapter is incomplete."
            if found
            else f"There is no trained adapter in {folder} (no adapter_config.json).",
            hint="Train one (python unified_finetune.py), or name its folder with --output_dir.",
        )
    settings = read_json_object(folder / "adapter_config.json")
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise FineTuningError(
            f"{folder / 'adapter_config.json'} names no base model (base_model_name_or_path).",
            hint="Write there the Hugging Face id or the folder of the model it was trained on.",
        )
    if settings.get("peft_type") != "LORA":
        raise FineTuningError(
            f"The adapter in {folder} is of type {settings.get('peft_type')!r}, not LORA.",
            hint="This program serves the LoRA adapters that it trains.",
        )
    adapter = AdapterFolder(folder, base)
    if not adapter.weights.is_file():
        raise FineTuningError(
            f"{adapter.weights} is missing.",
            hint="Weights are read from safetensors only, never from pickles (.bin, .pt).",
        )
    check_adapter_weights(adapter)
    return adapter


def check_adapter_weights(adapter: AdapterFolder) -> None:
    """Raise FineTuningError unless the tensors are readable, finite and as they were saved."""
    from safetensors import SafetensorError, safe_open

    metrics = adapter.path / METRICS_FILE
    saved_as = read_json_object(metrics).get("adapter_sha256") if metrics.is_file() else None
    again = "Restore it from a copy or a checkpoint (--output_dir {}/checkpoint-N), or train again."
    hint = again.format(adapter.path)
    try:
        digest = sha256_of(adapter.weights)
        with safe_open(adapter.weights, framework="pt") as file:
            broken = [n for n in file.keys() if not file.get_tensor(n).isfinite().all()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FineTuningError(
            f"{adapter.weights} is damaged: {first_line(error)}", hint=hint
        ) from error
    if saved_as and digest != saved_as:
        raise FineTuningError(
            f"{adapter.weights} is not the file that training saved: its SHA-256 is "
            f"{digest[:12]}…, {METRICS_FILE} says {str(saved_as)[:12]}….",
            hint=hint,
        )
    if broken:
        raise FineTuningError(
            f"{adapter.weights} holds NaN or infinite numbers ({broken[0]}).", hint=hint
        )


def choose_serving_device(config: FineTuningConfig) -> "tuple[str, str]":
    """Return the device and the dtype to answer with."""
    device, _ = choose_device(config)
    if config.fp16 and device != "cuda":
        raise FineTuningError(
            f"fp16 works on NVIDIA GPUs only, and the device is {device}.",
            hint="Leave --fp16 out; --bf16 saves as much memory.",
        )
    return device, "bfloat16" if config.bf16 else "float16" if config.fp16 else "float32"


def attach_adapter(model: "PreTrainedModel", adapter: AdapterFolder, device: str) -> "PeftModel":
    """Put the adapter on its base model; raise FineTuningError where the two do not fit."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        tuned = PeftModel.from_pretrained(model, str(adapter.path), torch_device=device)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        detail = str(error).strip().splitlines()[-1].strip()  # the first line names only the class
        raise FineTuningError(
            f"The adapter in {adapter.path} does not fit the model {adapter.base_model}: {detail}",
            hint="base_model_name_or_path in adapter_config.json must name the model that it was "
            "trained on.",
        ) from error
    with safe_open(adapter.weights, framework="pt") as file:
        different = set(file.keys()) ^ set(get_peft_model_state_dict(tuned))
    if different:
        raise FineTuningError(
            f"The adapter in {adapter.path} does not fit the model {adapter.base_model}: "
            f"{len(different)} tensors have no counterpart ({min(different)}).",
            hint="adapter_config.json and adapter_model.safetensors must be of the same training.",
        )
    return tuned


def load_served_model(config: FineTuningConfig) -> ServedModel:
    """Load what `output_dir` holds, an adapter with its base or a merged model, ready to answer."""
    folder = Path(config.output_dir)
    is_merged = (folder / "config.json").is_file() and not (
        folder / "adapter_config.json"
    ).is_file()
    adapter = None if is_merged else read_adapter_folder(folder)
    device, dtype = choose_serving_device(config)
    quiet_transformers()
    source = folder if adapter is None else adapter.base_folder()
    tokenizer = load_tokenizer(str(folder if adapter is None else adapter.tokenizer_folder()))
    model: PreTrainedModel | PeftModel
    try:
        settings = dataclasses.replace(config, model_name=str(source))
        model = load_base_model(settings, device, dtype)
        if adapter is not None:
            model = attach_adapter(model, adapter, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise FineTuningError(
            f"The model does not fit into the memory of {device}.",
            hint="Try --device cpu, or --bf16, which halves it.",
        ) from error
    rows = typing.cast("torch.nn.Embedding", model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise FineTuningError(
            f"The tokenizer has {len(tokenizer)} tokens and the model only {rows} embeddings.",
            hint="The tokenizer belongs to another model.",
        )
    what = f"the merged model in {folder}"
    if adapter is not None:
        what = f"{adapter.base_model} with the adapter in {folder}"
    trained = read_trained_system_prompt(folder)
    return ServedModel(
        model.eval(),
        tokenizer,
        trained if config.system_prompt is None else config.system_prompt,
        f"{what}, on {device} in {dtype}",
    )


def context_length(model: "PreTrainedModel | PeftModel") -> int:
    """Return how many tokens the model can see."""
    return int(model.config.max_position_embeddings)


LONGEST_CHARACTER = 4  # bytes, in UTF-8


def decode_answer(tokenizer: "PreTrainedTokenizerFast", token_ids: Sequence[int]) -> str:
    """Return the text of generated tokens exactly, a leading space included.

    Llama tokenizers strip a space from the start of what they decode, so a token stands before.
    """
    special = set(tokenizer.all_special_ids)
    visible = [tokenizer.eos_token_id, *(i for i in token_ids if i not in special)]
    text = tokenizer.decode(visible, clean_up_tokenization_spaces=False)
    return str(text).removeprefix(str(tokenizer.eos_token))


class AnswerStream:
    """Collect the tokens that `generate` puts out and hand on their text once it is certain."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast", on_text: "Callable[[str], None] | None"
    ) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.prompt_seen = False
        self.pending: list[int] = []
        self.text = ""

    def put(self, value: "torch.Tensor") -> None:
        """Take the prompt [1, tokens], then each new token [1]."""
        if self.prompt_seen:
            self.pending += value.flatten().tolist()
            # A character of several byte tokens reads as U+FFFD until its last one is there.
            is_whole = not decode_answer(self.tokenizer, self.pending).endswith("\ufffd")
            if is_whole or len(self.pending) >= LONGEST_CHARACTER:
                self.end()
        self.prompt_seen = True

    def end(self) -> None:
        """Hand on what is held back."""
        text = decode_answer(self.tokenizer, self.pending)
        self.pending = []
        self.text += text
        if self.on_text and text:
            self.on_text(text)


def tokenize_prompt(
    tokenizer: "PreTrainedTokenizerFast", messages: "Sequence[dict[str, str]]"
) -> list[int]:
    """Return the tokens of a conversation up to where the answer starts, as in training."""
    rendered = render_chat(tokenizer, messages, add_generation_prompt=True)
    return tokenize_rendered(tokenizer, rendered)


def generate_answer(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerFast",
    messages: "Sequence[dict[str, str]]",
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    on_text: "Callable[[str], None] | None" = None,
) -> Answer:
    """Answer a conversation ({"role", "content"}), handing text to `on_text` as it comes.

    The answer ends at the tokenizer's end token, after `max_new_tokens`, or where the model's
    context ends. Raises FineTuningError when the conversation itself fills the context.
    """
    prompt = tokenize_prompt(tokenizer, messages)
    return complete_prompt(
        model, tokenizer, prompt, max_new_tokens=max_new_tokens, sampling=sampling, on_text=on_text
    )


def complete_prompt(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerFast",
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    on_text: "Callable[[str], None] | None" = None,
) -> Answer:
    """Generate the answer to tokens that end where it starts (see `generate_answer`)."""
    import torch

    room = context_length(model) - len(prompt)
    if room < 1:
        raise FineTuningError(
            f"The message is too long: {len(prompt)} tokens, and the model sees "
            f"{context_length(model)}, its answer included.",
            hint="Shorten it.",
        )
    input_ids = torch.tensor([prompt], device=next(model.parameters()).device)
    stream = AnswerStream(tokenizer, on_text)
    was_training = model.training
    model.eval()
    try:
        output = typing.cast("Any", model).generate(
            input_ids=input_ids,
            # Without it, a pad token that equals the end token hides every </s> of the prompt.
            attention_mask=torch.ones_like(input_ids),
            generation_config=generation_settings(tokenizer, min(max_new_tokens, room), sampling),
            streamer=typing.cast("BaseStreamer", stream),
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise FineTuningError(
            f"An answer to {len(prompt)} tokens does not fit into memory.",
            hint="Use --device cpu, --bf16, or a shorter conversation.",
        ) from error
    finally:
        model.train(was_training)
    token_ids = typing.cast("torch.Tensor", output)[0, len(prompt) :].tolist()
    stopped = token_ids[-1:] == [tokenizer.eos_token_id]
    token_ids = token_ids[: len(token_ids) - stopped]
    return Answer(stream.text, tuple(token_ids), stopped)


def generation_settings(
    tokenizer: "PreTrainedTokenizerFast", max_new_tokens: int, sampling: Sampling
) -> "GenerationConfig":
    """Return settings that leave nothing to the base model's own generation_config.json."""
    from transformers import GenerationConfig

    drawn = sampling.temperature > 0
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=drawn,
        num_beams=1,
        temperature=float(sampling.temperature) if drawn else 1.0,
        top_p=float(sampling.top_p),
        top_k=sampling.top_k if drawn else 50,  # 50 is the library's default: greedy ignores it
        repetition_penalty=float(sampling.repetition_penalty),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )


@dataclass
class ChatState:
    """Hold the state of a chat: system message, turns so far, and the number of answers."""

    system: "str | None"
    turns: "list[dict[str, str]]" = field(default_factory=list)
    answers: int = 0

    def messages(self) -> "list[dict[str, str]]":
        """Return everything that the model reads."""
        if not self.system:
            return self.turns
        return [{"role": "system", "content": self.system}, *self.turns]


def drop_old_turns(conversation: ChatState, served: ServedModel, max_new_tokens: int) -> None:
    """Forget the oldest turns until the rest leaves room for an answer, and say so."""
    room = min(max_new_tokens, served.context // 2)
    dropped = 0
    while len(conversation.turns) > 2 and (
        len(tokenize_prompt(served.tokenizer, conversation.messages())) + room > served.context
    ):
        del conversation.turns[:2]  # a question and its answer
        dropped += 1
    if dropped:
        log.info(
            "(the oldest %s no longer fit%s into the model's %d tokens: forgotten)",
            "turn" if dropped == 1 else f"{dropped} turns",
            "s" * (dropped == 1),
            served.context,
        )


def write_out(text: str) -> None:
    """Write to stdout at once."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError as error:
        # Python flushes stdout once more at its end, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise FineTuningError("Nobody reads the answer any more: stdout was closed.") from error


def at_terminal() -> bool:
    """Tell whether somebody sits at stdin."""
    return sys.stdin is not None and sys.stdin.isatty()


def stream_answer(
    served: ServedModel,
    conversation: ChatState,
    options: ChatOptions,
    seed: int,
    on_text: "Callable[[str], None]",
) -> None:
    """Generate one answer onto stdout, ended by a newline, and say on stderr when it was cut."""
    import torch

    # The same draw for the base and the adapter, another one for the next question.
    torch.manual_seed(seed + conversation.answers)
    answer = generate_answer(
        served.model,
        served.tokenizer,
        conversation.messages(),
        max_new_tokens=options.max_new_tokens,
        sampling=options.sampling(),
        on_text=on_text,
    )
    write_out("\n")
    if not answer.stopped:
        log.info("(cut after %d tokens)", len(answer.token_ids))


def answer_turn(
    served: ServedModel, conversation: ChatState, text: str, options: ChatOptions, seed: int
) -> None:
    """Answer a message on stdout and remember both; on a terminal, Ctrl-C stops the answer."""
    conversation.turns.append({"role": "user", "content": text})
    said: list[str] = []

    def show(piece: str) -> None:
        said.append(piece)
        write_out(piece)

    labelled = options.compare or (options.prompt is None and at_terminal())
    try:
        drop_old_turns(conversation, served, options.max_new_tokens)
        if options.compare:
            write_out("base> ")
            with typing.cast("PeftModel", served.model).disable_adapter():
                stream_answer(served, conversation, options, seed, write_out)
        write_out("tuned> " * labelled)
        stream_answer(served, conversation, options, seed, show)
    except KeyboardInterrupt:
        if options.prompt is not None or not at_terminal():
            raise
        write_out("\n")
        log.info("(stopped)")
    except FineTuningError:
        conversation.turns.pop()
        raise
    conversation.answers += 1
    if said:
        conversation.turns.append({"role": "assistant", "content": "".join(said)})
    else:
        conversation.turns.pop()


CHAT_HELP = """\
/reset         forget the conversation
/system TEXT   set the system message (without TEXT: none)
/help          this list
/quit          end the chat; so does Ctrl-D
Ctrl-C stops an answer."""


def obey_command(line: str, conversation: ChatState) -> None:
    """Carry out a line that starts with a slash."""
    command, _, text = line.partition(" ")
    if command == "/reset":
        conversation.turns.clear()
        log.info("(forgotten)")
    elif command == "/system":
        conversation.system = text.strip() or None
        log.info("(system message: %s)", conversation.system or "none")
    else:
        if command != "/help":
            log.info("There is no command %s.", command)
        log.info("%s", CHAT_HELP)


def read_line() -> "str | None":
    """Return the next line from the user, editable on a terminal; None at the end of input."""
    if sys.stdin is None:  # closed by whoever started the program
        return None
    if at_terminal() and sys.stdout.isatty():
        try:
            return input("you> ")
        except EOFError:
            write_out("\n")
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def converse(served: ServedModel, conversation: ChatState, options: ChatOptions, seed: int) -> None:
    """Answer line after line until /quit or the end of input."""
    with contextlib.suppress(ImportError):  # absent on Windows
        import readline  # noqa: F401 - gives input() its editing and its history
    log.info("Chat with %s.", served.description)
    log.info("System message: %s. /help lists the commands.", conversation.system or "none")
    while True:
        try:
            line = read_line()
        except KeyboardInterrupt:
            if not at_terminal():
                raise
            write_out("\n")
            log.info("(/quit or Ctrl-D ends the chat)")
            continue
        if line is None or line.strip() == "/quit":
            return
        if line.startswith("/"):
            obey_command(line.strip(), conversation)
        elif line.strip():
            try:
                answer_turn(served, conversation, clean_text(line), options, seed)
            except FineTuningError as error:
                if not at_terminal():
                    raise
                log.error("%s %s", error, error.hint)


def clean_text(text: str) -> str:
    """Replace what is not valid Unicode: bytes that a terminal in another encoding sent."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def chat(config: FineTuningConfig, options: ChatOptions) -> None:
    """Answer with the trained adapter, rendered and tokenized as in training."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an answer may hold what the terminal cannot show
    served = load_served_model(config)
    if options.compare and not is_peft(served):
        raise FineTuningError(
            f"--compare needs an adapter, and {config.output_dir} holds a merged model.",
            hint="Name the adapter's folder with --output_dir.",
        )
    conversation = ChatState(None if options.no_system_prompt else served.system_prompt)
    if options.prompt is not None:
        answer_turn(served, conversation, clean_text(options.prompt), options, config.seed)
    else:
        converse(served, conversation, options, config.seed)


def is_peft(served: ServedModel) -> bool:
    """Tell whether the model carries an adapter that can be switched off."""
    from peft import PeftModel

    return isinstance(served.model, PeftModel)


# ======================================================================================
# Export
# ======================================================================================


# A merged weight is base + B·A·scale, in fp32, whatever the base is stored in. Tensors are read,
# merged and written one at a time, so that memory holds a few of them and never a model; the check
# afterwards reads the written file back in the same way, layer by layer.


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Hold the flags of `export`."""

    # fmt: off
    # ruff: disable[E501]
    format: "str | None" = option(None, "merged: a model folder for transformers, vLLM and mlx-lm; gguf: a file for Ollama, llama.cpp and LM Studio", choices=("merged", "gguf"))
    outtype: str = option("f16", "number format of the weights (q8_0: gguf only)", choices=("f32", "f16", "bf16", "q8_0"))
    export_dir: "str | None" = option(None, "folder to write, instead of merged or gguf in output_dir")
    install: "str | None" = option(None, "also hand the GGUF to Ollama under this name")
    # ruff: enable[E501]
    # fmt: on

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with options that are fine one by one."""
        if self.format is None:
            yield "--format is missing: merged or gguf"
        if self.format == "merged" and self.outtype == "q8_0":
            yield "--outtype q8_0 exists in GGUF files only; for merged take f32, f16 or bf16"
        if self.format == "merged" and self.install is not None:
            yield "--install needs --format gguf, which is what Ollama reads"
        if self.install is not None and not re.fullmatch(r"[A-Za-z0-9][\w.:/-]*", self.install):
            yield f"--install must be a name like my-model or me/my-model:v1, not {self.install!r}"


@dataclass(frozen=True)
class ExportSource:
    """Hold what is exported: the base's tensors by name, the adapter's, and their tokenizer."""

    adapter: AdapterFolder
    base: Path
    model_config: "LlamaConfig"
    lora: "LoraConfig"
    tokenizer: "PreTrainedTokenizerFast"
    shapes: "dict[str, tuple[int, ...]]"  # every tensor of the merged model, in its order
    files: "dict[str, Path]"  # where the base keeps each
    system_prompt: "str | None"

    @property
    def layers(self) -> int:
        """Return the number of decoder layers."""
        return int(self.model_config.num_hidden_layers)

    @property
    def rope_theta(self) -> float:
        """Return the base of the rotary position angles."""
        return float(rope_settings(self.model_config)["rope_theta"])

    @property
    def parameters(self) -> int:
        """Return the number of weights."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def base_tensor(self, name: str) -> "torch.Tensor":
        """Read one tensor of the base model, in fp32."""
        return read_tensor(self.files[name], name).float()

    def update(self, name: str) -> "tuple[torch.Tensor, torch.Tensor] | None":
        """Read A [r, in] and B [out, r] of one weight, in fp32; None where it has no adapter."""
        stem = "base_model.model." + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" not in self.adapter_names:
            return None
        a, b = (read_tensor(self.adapter.weights, f"{stem}.lora_{x}.weight") for x in "AB")
        return a.float(), b.float()

    @functools.cached_property
    def adapter_names(self) -> "frozenset[str]":
        """Return the names of the adapter's tensors."""
        return frozenset(tensor_names(self.adapter.weights))

    def merged_tensor(self, name: str) -> "torch.Tensor":
        """Return one weight of the merged model, in fp32, summed in the order of PEFT's merge."""
        weight = self.base_tensor(name)
        update = self.update(name)
        if update is not None:
            a, b = update
            weight = weight + (b @ a) * self.scale
        return weight

    @property
    def scale(self) -> float:
        """Return the factor of the adapter's product."""
        rank = self.lora.r
        return self.lora.lora_alpha / (math.sqrt(rank) if self.lora.use_rslora else rank)


def rope_settings(model_config: "LlamaConfig") -> "dict[str, Any]":
    """Return how positions are rotated: rope_theta and rope_type, wherever config.json had them."""
    return dict(model_config.rope_parameters or {})


def damaged_file(path: Path, error: Exception) -> FineTuningError:
    """Return the error that says that a file of tensors cannot be read."""
    return FineTuningError(
        f"{path} is damaged: {first_line(error)}",
        hint="It is incomplete or was changed; get it again.",
    )


def tensor_names(path: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise damaged_file(path, error) from error


def read_tensor(path: Path, name: str) -> "torch.Tensor":
    """Read one tensor of a safetensors file; opened anew each time, so that no mapping stays."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise damaged_file(path, error) from error


def open_export_source(config: FineTuningConfig) -> ExportSource:
    """Find the adapter and its base, and refuse what cannot be merged tensor by tensor."""
    from peft import LoraConfig
    from transformers import AutoConfig, LlamaConfig

    adapter = read_adapter_folder(Path(config.output_dir))
    quiet_transformers()
    base = adapter.base_folder()
    try:
        model_config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        lora = typing.cast("LoraConfig", LoraConfig.from_pretrained(str(adapter.path)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FineTuningError(
            f"The settings of {base} or of {adapter.path} cannot be read: {first_line(error)}",
            hint="config.json and adapter_config.json must be as they were saved.",
        ) from error
    if not isinstance(model_config, LlamaConfig) or model_config.model_type != "llama":
        raise FineTuningError(
            f"{adapter.base_model} is of type {model_config.model_type!r}; only Llama models (such "
            "as TinyLlama) can be exported.",
            hint="For other models use PEFT's merge_and_unload and llama.cpp's own converter.",
        )
    trained_prompt = read_trained_system_prompt(adapter.path)
    source = ExportSource(
        adapter,
        base,
        model_config,
        lora,
        load_tokenizer(str(adapter.tokenizer_folder())),
        expected_tensors(model_config),
        base_tensor_files(base),
        trained_prompt if config.system_prompt is None else config.system_prompt,
    )
    check_base_tensors(source)
    check_adapter_tensors(source)
    return source


def expected_tensors(model_config: "LlamaConfig") -> "dict[str, tuple[int, ...]]":
    """Return the name and the shape of every weight that such a model has."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(model_config)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def base_tensor_files(base: Path) -> "dict[str, Path]":
    """Return in which file of the base model each tensor is."""
    index = base / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise damaged_file(index, ValueError("it has no weight_map"))
        return {name: base / str(file) for name, file in weight_map.items()}
    single = base / "model.safetensors"
    return {name: single for name in tensor_names(single)}


def check_base_tensors(source: ExportSource) -> None:
    """Refuse a base with missing, additional, quantized or wrongly shaped tensors."""
    from safetensors import SafetensorError, safe_open

    tied = {"lm_head.weight"} if source.model_config.tie_word_embeddings else set()
    surplus = [
        name
        for name in source.files.keys() - source.shapes.keys() - tied
        if not name.endswith("rotary_emb.inv_freq")  # old checkpoints keep what is computed
    ]
    missing = source.shapes.keys() - source.files.keys()
    if missing or surplus:
        name = min(missing or surplus)
        raise FineTuningError(
            f"The base model in {source.base} {'lacks' if missing else 'also has'} the tensor "
            f"{name}, unlike a plain Llama.",
            hint="Quantized models and models with additions cannot be merged; export from the "
            "original one.",
        )
    plain = ("F32", "F16", "BF16", "F64")
    for name, shape in source.shapes.items():
        try:
            with safe_open(source.files[name], framework="pt") as file:
                found = file.get_slice(name)
                kind, found_shape = found.get_dtype(), tuple(found.get_shape())
        except (OSError, SafetensorError) as error:
            raise damaged_file(source.files[name], error) from error
        if kind not in plain or found_shape != shape:
            raise FineTuningError(
                f"{name} of the base model is {kind} {list(found_shape)}; expected were "
                f"floating-point numbers {list(shape)}.",
                hint="Quantized models cannot be merged; export from the original one.",
            )


# What a LoRA may differ in from PEFT's defaults and still be W + B·A·scale in every layer.
PLAIN_LORA_SETTINGS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout",
    "use_rslora", "megatron_core", "runtime_config",
}  # fmt: skip


def check_adapter_tensors(source: ExportSource) -> None:
    """Refuse an adapter that is more than a product of two matrices per weight."""
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    special = [
        f"{name} {value!r}"
        for name, value in source.lora.to_dict().items()
        if name not in PLAIN_LORA_SETTINGS and value != defaults.get(name)
    ]
    if special:
        raise FineTuningError(
            f"The adapter uses {', '.join(special)}; only plain LoRA can be exported.",
            hint="Merge it with PEFT's merge_and_unload instead.",
        )
    expected = {}
    for name, shape in source.shapes.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        expected[f"{stem}.lora_A.weight"] = (source.lora.r, shape[-1])
        expected[f"{stem}.lora_B.weight"] = (shape[0], source.lora.r)
    for name in sorted(source.adapter_names):
        shape = tuple(read_tensor(source.adapter.weights, name).shape)
        partner = name.replace(".lora_A.", ".lora_?.").replace(".lora_B.", ".lora_A.")
        partner = partner.replace(".lora_?.", ".lora_B.")
        if expected.get(name) != shape or partner not in source.adapter_names:
            raise FineTuningError(
                f"The adapter's tensor {name} {list(shape)} does not fit the model "
                f"{source.adapter.base_model}.",
                hint="base_model_name_or_path in adapter_config.json must name the model that it "
                "was trained on.",
            )
    layers = [
        {n.partition(f".layers.{i}.")[2] for n in source.adapter_names if f".layers.{i}." in n}
        for i in range(source.layers)
    ]
    if any(layer != layers[0] for layer in layers) or not layers[0]:
        raise FineTuningError(
            "The adapter does not change the same weights in every layer.",
            hint="Its file is incomplete, or it was trained with layers_to_transform.",
        )


# --- Where an export goes, and how it gets there: staged beside, checked, then renamed.

BYTES_PER_WEIGHT = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}


def model_name(config: FineTuningConfig) -> str:
    """Return a name for the exported model: that of its folder, in characters safe everywhere."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.output_dir).resolve().name).strip("-.")
    return name or "model"


def export_folder(config: FineTuningConfig, options: ExportOptions) -> Path:
    """Return the folder to write."""
    return Path(options.export_dir or Path(config.output_dir) / str(options.format))


def check_export_space(folder: Path, source: ExportSource, outtype: str) -> None:
    """Refuse before the work what would fill the disk in the middle of it."""
    needed = source.parameters * BYTES_PER_WEIGHT[outtype] + 100e6
    free = shutil.disk_usage(existing_parent(folder)).free
    if free < needed:
        raise FineTuningError(
            f"The export needs {human_bytes(needed)} at {folder}; {human_bytes(free)} are free.",
            hint="Free some space, name another disk with --export_dir, or take a smaller "
            "--outtype.",
        )


@contextlib.contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """Give a hidden folder beside `folder` to write into; whatever happens, it is removed."""
    staged = folder.parent / f".staging-{folder.name}"
    try:
        shutil.rmtree(staged, ignore_errors=True)  # left by a killed export
        staged.mkdir(parents=True)
        yield staged
    except OSError as error:
        raise FineTuningError(
            f"The export cannot be written to {folder}: {error.strerror or error}",
            hint="Make room there, change its permissions, or choose --export_dir.",
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def publish_files(staged: Path, folder: Path, names: Sequence[str]) -> None:
    """Move staged files to their final names, flushed to the disk, in this order."""
    for name in names:
        (staged / name).chmod(0o644)
        flush_to_disk(staged / name)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (staged / name).replace(folder / name)
    flush_to_disk(folder)
    flush_to_disk(folder.parent)


def publish_model_folder(staged: Path, folder: Path) -> None:
    """Give a staged folder its final name; one that stands there moves aside until that is done."""
    for path in staged.iterdir():
        path.chmod(0o644)
        flush_to_disk(path)
    staged.chmod(0o755)
    flush_to_disk(staged)
    aside = folder.parent / f".replaced-{folder.name}"
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    staged.rename(folder)
    flush_to_disk(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


LARGEST_WEIGHT = {"f32": 3.4e38, "f16": 65504.0, "bf16": 3.38e38, "q8_0": 65504.0 * 127}


def check_range(name: str, weight: "torch.Tensor", outtype: str) -> None:
    """Refuse a weight that is no number, or that the number format cannot hold."""
    low, high = (float(value) for value in weight.aminmax())  # NaN if there is one
    largest = max(-low, high)
    if not math.isfinite(largest):
        raise FineTuningError(
            f"{name} holds NaN or infinite numbers after merging.",
            hint="The base model's files are damaged, or the training diverged.",
        )
    if largest > LARGEST_WEIGHT[outtype]:
        raise FineTuningError(
            f"{name} has values up to {largest:.0f}, too large for {outtype}.",
            hint="Take --outtype bf16 or f32.",
        )


def encode_tensor(name: str, weight: "torch.Tensor", outtype: str) -> "torch.Tensor":
    """Return a weight in the export's floating-point format; refuse what does not fit into it."""
    import torch

    check_range(name, weight, outtype)
    kinds = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    return weight.to(kinds[outtype]).contiguous()


# --- Format 1: a merged model folder.

SAFETENSORS_NAMES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def write_merged_weights(source: ExportSource, outtype: str, path: Path) -> None:
    """Write the merged weights as one safetensors file, a tensor at a time.

    The format is a length (u64), a JSON header with every tensor's place, and the bytes; the
    library's own writer wants all tensors in memory at once.
    """
    import torch

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in source.shapes.items():
        begin, end = end, end + round(math.prod(shape) * BYTES_PER_WEIGHT[outtype])
        header[name] = {
            "dtype": SAFETENSORS_NAMES[outtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        with progress_bar(len(source.shapes), "tensors", "merging") as progress:
            for name in source.shapes:
                tensor = encode_tensor(name, source.merged_tensor(name), outtype)
                tensor.view(torch.uint8).numpy().tofile(file)
                progress.advance()


def write_merged_folder(source: ExportSource, outtype: str, folder: Path) -> None:
    """Write a model folder that transformers, vLLM, mlx-lm and llama.cpp's converter load."""
    write_merged_weights(source, outtype, folder / "model.safetensors")
    settings = read_json_object(source.base / "config.json")
    # Readers differ in where they look: each value stands in its old place and in its new one.
    settings.update(
        architectures=["LlamaForCausalLM"],
        dtype=TORCH_NAMES[outtype],
        torch_dtype=TORCH_NAMES[outtype],
        rope_theta=source.rope_theta,
        rope_parameters=rope_settings(source.model_config),
    )
    write_json(folder / "config.json", settings)
    if (source.base / "generation_config.json").is_file():
        shutil.copyfile(source.base / "generation_config.json", folder / "generation_config.json")
    write_tokenizer(source.tokenizer, (source.adapter.path, source.base), folder)
    if (source.adapter.path / CONFIG_FILE).is_file():  # chat reads the system message there
        shutil.copyfile(source.adapter.path / CONFIG_FILE, folder / CONFIG_FILE)


# --- Format 2: GGUF.


def check_gguf_support(source: ExportSource) -> None:
    """Refuse what a GGUF file of a Llama, or this program, cannot express."""
    config = source.model_config
    rope = str(rope_settings(config).get("rope_type", "default"))
    reasons = {
        f"rope scaling ({rope})": rope != "default",
        "biases in its layers": config.attention_bias or config.mlp_bias,
        f"the activation {config.hidden_act}": config.hidden_act != "silu",
        f"{len(source.tokenizer)} tokens for {config.vocab_size} embeddings": (
            len(source.tokenizer) > config.vocab_size
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise FineTuningError(
                f"{source.adapter.base_model} has {reason}; that cannot be converted to GGUF here.",
                hint="Export with --format merged and use llama.cpp's convert_hf_to_gguf.py.",
            )
    tokenizer = json.loads(source.tokenizer.backend_tokenizer.to_str())
    model, normalizer = tokenizer["model"], json.dumps(tokenizer["normalizer"] or {})
    is_sentencepiece = (
        model["type"] == "BPE"
        and model.get("byte_fallback")
        and "<0x0A>" in model["vocab"]
        and '"Replace"' in normalizer
        and not tokenizer["pre_tokenizer"]
    )
    if not is_sentencepiece:
        raise FineTuningError(
            f"The tokenizer of {source.adapter.base_model} is not of the SentencePiece-BPE kind "
            "that Llama 1 and 2 and TinyLlama have, so it cannot be converted to GGUF here.",
            hint="Export with --format merged and use llama.cpp's convert_hf_to_gguf.py.",
        )


def permute_rotary(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Reorder the rows of q or k [heads * head_dim, in] from half-split to interleaved pairs.

    transformers rotates row i with row i + head_dim / 2, llama.cpp rotates neighbours.
    """
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return rows.transpose(1, 2).reshape(weight.shape)


def unpermute_rotary(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Undo `permute_rotary`."""
    rows = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return rows.transpose(1, 2).reshape(weight.shape)


def rotary_heads(source: ExportSource, name: str) -> "int | None":
    """Return the number of heads in a weight whose rows are rotated; None for all others."""
    if name.endswith("self_attn.q_proj.weight"):
        return int(source.model_config.num_attention_heads)
    if name.endswith("self_attn.k_proj.weight"):
        return key_heads(source)
    return None


def key_heads(source: ExportSource) -> int:
    """Return the number of key and value heads, fewer than query heads under grouped attention."""
    config = source.model_config
    return int(config.num_key_value_heads or config.num_attention_heads)


def gguf_tensor_names(source: ExportSource) -> "dict[str, str]":
    """Return each weight's name in a GGUF file."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, source.layers)
    found = {name: names.get_name(name, try_suffixes=(".weight",)) for name in source.shapes}
    assert all(found.values())
    return {name: str(value) for name, value in found.items()}


def gguf_type(shape: "tuple[int, ...]", outtype: str) -> "gguf.GGMLQuantizationType":
    """Return the number format of one tensor: vectors stay in fp32, as in llama.cpp's converter."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return kinds.F32
    if outtype == "q8_0" and shape[-1] % 32:  # rows are quantized in blocks of 32
        return kinds.F16
    return {"f32": kinds.F32, "f16": kinds.F16, "bf16": kinds.BF16, "q8_0": kinds.Q8_0}[outtype]


def gguf_bytes(
    name: str, weight: "torch.Tensor", kind: "gguf.GGMLQuantizationType"
) -> "numpy.ndarray":
    """Return a weight in its GGUF number format."""
    import gguf
    import torch

    if kind == gguf.GGMLQuantizationType.Q8_0:
        check_range(name, weight, "q8_0")
        return gguf.quantize(weight.contiguous().numpy(), kind)
    encoded = encode_tensor(name, weight, kind.name.lower())
    return encoded.view(torch.uint8).numpy()


def write_gguf(source: ExportSource, config: FineTuningConfig, outtype: str, path: Path) -> None:
    """Write the merged model, its tokenizer and its card as one GGUF file, a tensor at a time."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    try:
        add_model_card(writer, source, config)
        add_architecture(writer, source, outtype)
        add_vocabulary(writer, source)
        names = gguf_tensor_names(source)
        for name, shape in source.shapes.items():
            kind = gguf_type(shape, outtype)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            length = math.prod(shape) // block * size
            writer.add_tensor_info(names[name], shape, numpy_float32(), length, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress_bar(len(source.shapes), "tensors", "converting") as progress:
            for name, shape in source.shapes.items():
                weight = source.merged_tensor(name)
                heads = rotary_heads(source, name)
                if heads is not None:
                    weight = permute_rotary(weight, heads)
                writer.write_tensor_data(gguf_bytes(name, weight, gguf_type(shape, outtype)))
                progress.advance()
    finally:
        writer.close()


def numpy_float32() -> "numpy.dtype":
    """Return NumPy's fp32: GGUF's own formats are named beside it."""
    import numpy

    return numpy.dtype(numpy.float32)


def add_model_card(
    writer: "gguf.GGUFWriter", source: ExportSource, config: FineTuningConfig
) -> None:
    """Write what the model is: its name, its base and how it was trained."""
    import gguf

    base = source.adapter.base_model
    folder = Path(base)
    is_hub_id = not folder.is_absolute() and base.count("/") == 1 and not folder.is_dir()
    label = base.rpartition("/")[2]
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model_name(config))
    writer.add_basename(label)
    writer.add_finetune(model_name(config))
    writer.add_size_label(gguf.size_label(source.parameters, 0, 0, 0))
    writer.add_description(
        f"{label} fine-tuned with LoRA (rank {source.lora.r}, alpha {source.lora.lora_alpha}) by "
        f"unified_finetune {__version__}; the adapter is merged in. SHA-256 of the adapter: "
        f"{sha256_of(source.adapter.weights)}"
    )
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, label)
    if is_hub_id:
        writer.add_base_model_organization(0, base.partition("/")[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    writer.add_tags(["text-generation", "lora"])


def add_architecture(writer: "gguf.GGUFWriter", source: ExportSource, outtype: str) -> None:
    """Write the shape of the network."""
    import gguf

    config = source.model_config
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(source.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(key_heads(source))
    writer.add_key_length(head_size(source))
    writer.add_value_length(head_size(source))
    writer.add_rope_dimension_count(head_size(source))
    writer.add_rope_freq_base(source.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    kinds = gguf.LlamaFileType
    file_types = {
        "f32": kinds.ALL_F32,
        "f16": kinds.MOSTLY_F16,
        "bf16": kinds.MOSTLY_BF16,
        "q8_0": kinds.MOSTLY_Q8_0,
    }
    writer.add_file_type(file_types[outtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def head_size(source: ExportSource) -> int:
    """Return the width of one attention head."""
    config = source.model_config
    return int(config.head_dim or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class Vocabulary:
    """Hold a tokenizer as GGUF has it: a piece, a score and a type per token."""

    pieces: "list[str]"
    scores: "list[float]"
    types: "list[int]"
    bos: int
    adds_space: bool


def build_vocabulary(source: ExportSource) -> Vocabulary:
    """Return the tokenizer's pieces with scores that make llama.cpp merge in the same order."""
    import gguf

    kinds = gguf.TokenType
    description = json.loads(source.tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    size = source.model_config.vocab_size
    pieces = [f"[PAD{i}]" for i in range(size)]  # embeddings without a token, as llama.cpp has them
    types = [int(kinds.UNUSED)] * size
    scores = [-1e6] * size
    for piece, i in model["vocab"].items():
        pieces[i] = piece
        is_byte = re.fullmatch("<0x[0-9A-F]{2}>", piece)
        types[i] = int(kinds.BYTE if is_byte else kinds.NORMAL)
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        i = model["vocab"][left + right]
        scores[i] = max(scores[i], -float(rank + 1))
    for token in description["added_tokens"]:
        i = token["id"]
        pieces[i] = token["content"]
        types[i] = int(kinds.CONTROL if token["special"] else kinds.USER_DEFINED)
        if token["content"] == model.get("unk_token"):
            types[i] = int(kinds.UNKNOWN)
    for i, kind in enumerate(types):
        if kind != kinds.NORMAL:
            scores[i] = 0.0
    adds_space = '"Prepend"' in json.dumps(description["normalizer"] or {})
    return Vocabulary(pieces, scores, types, bos_token_id(source), adds_space)


def bos_token_id(source: ExportSource) -> int:
    """Return the token before every prompt; -1 where the tokenizer puts none."""
    first = tokenize_rendered(source.tokenizer, "a")[:1]
    bos = special_id(source.tokenizer, "bos")
    return bos if first == [bos] else -1


def special_id(tokenizer: "PreTrainedTokenizerFast", role: str) -> int:
    """Return the id of the bos, eos, unk or pad token; -1 where there is none."""
    token = tokenizer.special_tokens_map.get(role + "_token")
    return -1 if token is None else int(tokenizer.get_vocab()[str(token)])


def add_vocabulary(writer: "gguf.GGUFWriter", source: ExportSource) -> None:
    """Write the tokenizer and the chat template."""
    vocabulary, tokenizer = build_vocabulary(source), source.tokenizer
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.pieces)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    special = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for role, add in special.items():
        if special_id(tokenizer, role) >= 0:
            add(special_id(tokenizer, role))
    writer.add_add_bos_token(vocabulary.bos >= 0)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.adds_space)
    writer.add_chat_template(str(tokenizer.chat_template))


@dataclass(frozen=True)
class GgufFile:
    """Hold a GGUF file that was read back: its vocabulary, its template, and where tensors are."""

    path: Path
    vocabulary: Vocabulary
    chat_template: str
    places: "dict[str, tuple[int, int, gguf.GGMLQuantizationType, tuple[int, ...]]]"

    def tensor(self, name: str) -> "torch.Tensor":
        """Read one tensor, in fp32; read and not mapped, so that memory does not fill up."""
        import gguf
        import numpy
        import torch

        offset, length, kind, shape = self.places[name]
        data = numpy.fromfile(self.path, numpy.uint8, length, offset=offset)
        if kind == gguf.GGMLQuantizationType.F16:  # torch converts faster than NumPy
            return torch.from_numpy(data.view(numpy.float16)).float().reshape(shape)
        rows = data.reshape(*shape[:-1], -1)
        return torch.from_numpy(gguf.dequantize(rows, kind)).reshape(shape)


def read_gguf(path: Path) -> GgufFile:
    """Read a GGUF file back."""
    import gguf

    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        entry = reader.get_field(key)
        return None if entry is None else entry.contents()

    adds_bos = value("tokenizer.ggml.add_bos_token")
    vocabulary = Vocabulary(
        value("tokenizer.ggml.tokens"),
        value("tokenizer.ggml.scores"),
        value("tokenizer.ggml.token_type"),
        value("tokenizer.ggml.bos_token_id") if adds_bos else -1,
        value("tokenizer.ggml.add_space_prefix"),
    )
    places = {
        t.name: (
            int(t.data_offset),
            int(t.n_bytes),
            t.tensor_type,
            tuple(int(n) for n in reversed(t.shape)),
        )
        for t in reader.tensors
    }
    return GgufFile(path, vocabulary, value("tokenizer.chat_template"), places)


def tokenize_like_llama_cpp(vocabulary: Vocabulary, text: str) -> list[int]:
    """Tokenize text with a GGUF vocabulary by llama.cpp's rules, special tokens recognized.

    Source: llama-vocab.cpp. Special tokens split the text, longest first; in each rest the pair of
    neighbours whose union has the highest score is merged, the leftmost first, until none is left;
    characters that are no piece become bytes.
    """
    import gguf

    ids = {piece: i for i, piece in reversed(list(enumerate(vocabulary.pieces)))}
    kinds = gguf.TokenType
    special = (kinds.CONTROL, kinds.USER_DEFINED, kinds.UNKNOWN)
    markers = [p for p, k in zip(vocabulary.pieces, vocabulary.types, strict=True) if k in special]
    fragments: list[str | int] = [text]
    for marker in sorted(markers, key=len, reverse=True):
        fragments = [
            part
            for fragment in fragments
            for part in (
                [fragment] if isinstance(fragment, int) else split_at(fragment, marker, ids[marker])
            )
        ]
    tokens = [vocabulary.bos] if vocabulary.bos >= 0 else []
    after_special = True
    for fragment in fragments:
        if isinstance(fragment, int):
            tokens.append(fragment)
        else:
            prefix = " " if vocabulary.adds_space and after_special else ""
            tokens += merge_pieces((prefix + fragment).replace(" ", "▁"), vocabulary, ids)
        after_special = isinstance(fragment, int)
    return tokens


def split_at(text: str, marker: str, token: int) -> "list[str | int]":
    """Split text at every occurrence of a special token, which becomes its id."""
    parts: list[str | int] = []
    for piece in text.split(marker):
        parts += [piece, token] if piece else [token]
    return parts[:-1]


def merge_pieces(text: str, vocabulary: Vocabulary, ids: "dict[str, int]") -> list[int]:
    """Merge the characters of a text into pieces by score, and return their ids."""
    symbols = list(text)
    following = [*range(1, len(symbols)), -1]
    before = list(range(-1, len(symbols) - 1))
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        """Queue a pair of neighbours that makes a piece."""
        if left >= 0 and right >= 0 and symbols[left] + symbols[right] in ids:
            union = symbols[left] + symbols[right]
            heapq.heappush(queue, (-vocabulary.scores[ids[union]], left, right, union))

    for right in range(1, len(symbols)):
        offer(right - 1, right)
    while queue:
        _, left, right, union = heapq.heappop(queue)
        if following[left] != right or symbols[left] + symbols[right] != union:
            continue  # one of the two was merged since
        symbols[left], symbols[right] = union, ""
        following[left] = following[right]
        if following[right] >= 0:
            before[following[right]] = left
        following[right] = -2
        offer(before[left], left)
        offer(left, following[left])
    tokens = []
    for symbol in symbols:
        if symbol in ids:
            tokens.append(ids[symbol])
        else:
            tokens += [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return tokens


# --- Ollama's Modelfile: Ollama neither reads Jinja templates nor recognizes this one.


@dataclass(frozen=True)
class TurnMarkers:
    """Hold what a chat template writes before and after each role's text, and before an answer."""

    before: "dict[str, str]"
    after: "dict[str, str]"
    answer: str

    def render(self, messages: "Sequence[dict[str, str]]") -> str:
        """Render a conversation up to its answer, as the Modelfile's template does."""
        turns = [self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in messages]
        return "".join(turns) + self.answer

    def go_template(self) -> str:
        """Return the template in the language of Go's text/template."""
        generic = {
            (self.before[role].replace(role, "{{ .Role }}"), self.after[role])
            for role in self.before
        }
        if len(generic) == 1:
            ((before, after),) = generic
            turn = before + "{{ .Content }}" + after
        else:
            cases = [
                f'{{{{ if eq .Role "{role}" }}}}{self.before[role]}{{{{ .Content }}}}'
                f"{self.after[role]}"
                for role in self.before
            ]
            turn = "{{ else }}".join(cases) + "{{ end }}" * len(cases)
        return "{{- range .Messages }}" + turn + "{{ end }}" + self.answer

    def stops(self, eos: str) -> list[str]:
        """Return the texts at which a server must stop: the end token and every turn's start."""
        return list(dict.fromkeys([eos, *(text.strip() for text in self.before.values())]))


def find_turn_markers(tokenizer: "PreTrainedTokenizerFast") -> "TurnMarkers | None":
    """Read a chat template's markers off what it renders; None where it is not made of markers."""
    marks = [f"\u2063{number}\u2063" for number in range(4)]
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
    bos = str(tokenizer.bos_token or "")

    def render(part: "Sequence[dict[str, str]]", answer: bool) -> str:
        return render_chat(tokenizer, part, add_generation_prompt=answer).removeprefix(bos)

    try:
        user, _, user_end = render(messages[1:2], False).partition(marks[1])
        texts = re.split("|".join(marks), render(messages, True))
    except FineTuningError:  # a template that takes no system message
        return None
    if len(texts) != 5 or not (texts[1].endswith(user) and texts[3].endswith(user)):
        return None
    markers = TurnMarkers(
        {"system": texts[0], "user": user, "assistant": texts[2].removeprefix(user_end)},
        {
            "system": texts[1].removesuffix(user),
            "user": user_end,
            "assistant": texts[3].removesuffix(user),
        },
        texts[4].removeprefix(user_end),
    )
    written = [*markers.before.values(), *markers.after.values(), markers.answer]
    if any(brackets in text for text in written for brackets in ("{{", "}}")):
        return None
    chats = verification_chats(tokenizer, None)
    same = all(markers.render(chat) == render(chat, True) for chat in chats)
    return markers if same else None


def modelfile_obstacle(source: ExportSource, markers: "TurnMarkers | None") -> "str | None":
    """Say why Ollama could not serve the model as it was trained; None where it can.

    Source: Ollama's parser.go, which ends a text at three quotation marks and drops characters that
    do not print.
    """
    if markers is None:
        return "its chat template is more than markers around each turn"
    stops = markers.stops(str(source.tokenizer.eos_token))
    texts = [markers.go_template(), source.system_prompt or "", *stops]
    if any('"""' in text for text in texts) or any('"' in stop for stop in stops):
        return 'a Modelfile cannot hold the """ or " in its system prompt or template'
    for character in "".join(texts):
        if not character.isprintable() and character not in "\n\r\t":
            return f"a Modelfile loses the character U+{ord(character):04X} of its system prompt"
    return None


def modelfile_text(source: ExportSource, markers: TurnMarkers, gguf_name: str) -> str:
    """Return the Modelfile that makes Ollama serve the model as it was trained."""
    lines = [
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{markers.go_template()}"""',
        *([f'SYSTEM """{source.system_prompt}"""'] if source.system_prompt else []),
        *(f'PARAMETER stop "{stop}"' for stop in markers.stops(str(source.tokenizer.eos_token))),
        f"PARAMETER num_ctx {source.model_config.max_position_embeddings}",
        "# The likeliest answer every time, as in `chat`; raise the temperature for variety.",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
    ]
    return "\n".join(lines) + "\n"


# --- The check: what was written is read back and compared with the base and its adapter.

VERIFIED_CHATS = 20
VERIFIED_PROMPTS = 3
# Largest accepted ||difference|| / ||logits||; a wrong permutation or a lost adapter is near 1.
LOGIT_BOUNDS = {"f32": 1e-4, "f16": 1e-2, "bf16": 5e-2, "q8_0": 1e-1}

SAMPLE_TEXTS = (
    "What does the net price of a college mean?",
    "Hi",
    "First line\nsecond line\n\n  indented, with    four spaces\tand a tab\n",
    "Überprüfe 日本語, العربية, हिन्दी and emoji 🎓👩🏽‍🎓",
    " leading and trailing spaces ",
    "https://example.org/a?b=c&d=%20#top <b>bold</b> <0x0A> {{ .Content }}",
    "3.14159 + 2,718 = 5,859.14159; 1000000000000",
    "aaaaaaaaaaaaaaaaaaaa ........ ======== \\n\\t ''''",
    "DON'T shout: I'LL write CamelCase and snake_case_names.",
    "\u00a0\u200b\ufeff \u0000 zero-width, no-break and control characters \u001b[0m",
)


def verification_chats(
    tokenizer: "PreTrainedTokenizerFast", system_prompt: "str | None"
) -> "list[list[dict[str, str]]]":
    """Return conversations that tell tokenizers apart: scripts, spaces, line breaks, many turns."""

    def chat(*texts: str, system: "str | None" = None) -> "list[dict[str, str]]":
        turns = [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
        ]
        return turns if system is None else [{"role": "system", "content": system}, *turns]

    system = system_prompt or "You are a college counselor.\nBe brief."
    specials = " ".join(f"x{token}y" for token in sorted(tokenizer.get_added_vocab())[:50])
    chats = [chat(text) for text in SAMPLE_TEXTS]
    chats += [chat(text, system=system) for text in SAMPLE_TEXTS[:4]]
    chats += [chat(*SAMPLE_TEXTS[i : i + 3]) for i in range(0, 6, 2)]
    chats += [chat(specials), chat(*SAMPLE_TEXTS[:5], system=system), chat("Hi", system="")]
    assert len(chats) == VERIFIED_CHATS
    kept = []
    for messages in chats:
        with contextlib.suppress(FineTuningError):  # what the template refuses cannot be served
            render_chat(tokenizer, messages, add_generation_prompt=True)
            kept.append(messages)
    return kept


@dataclass(frozen=True)
class Deviation:
    """Compare logits: largest difference, difference relative to the logits and to the adapter."""

    largest: float
    relative: float
    of_adapter: float


def verify_tokens(source: ExportSource, what: str, tokenize: "Callable[[str], list[int]]") -> int:
    """Compare the exported tokenizer with the training's on rendered chats; return their number."""
    chats = verification_chats(source.tokenizer, source.system_prompt)
    for messages in chats:
        text = render_chat(source.tokenizer, messages, add_generation_prompt=True)
        expected, found = tokenize_rendered(source.tokenizer, text), tokenize(text)
        if found != expected:
            raise FineTuningError(
                f"{what} splits a chat into other tokens than the training did: {text!r} became "
                f"{found} instead of {expected}. Nothing was exported.",
                hint="This base model's tokenizer does not survive the conversion; use another "
                "--format, or another base model.",
            )
    return len(chats)


def verify_logits(
    source: ExportSource, exported: "Callable[[str], torch.Tensor]", outtype: str
) -> Deviation:
    """Compare logits on prompts: the exported weights against the base with PEFT's adapter.

    All three models (base, base with adapter, export) run one layer at a time, so that memory
    holds one layer of each. `exported` reads a weight of the export, in fp32.
    """
    import torch

    chats = verification_chats(source.tokenizer, source.system_prompt)[:VERIFIED_PROMPTS]
    prompts = [torch.tensor(tokenize_prompt(source.tokenizer, chat)) for chat in chats]
    # Padding stands behind a prompt, where causal attention never looks.
    batch = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    real = torch.nn.utils.rnn.pad_sequence([p >= 0 for p in prompts], batch_first=True)
    tuned, plain = one_layer_models(source)
    inputs = source.base_tensor("model.embed_tokens.weight")[batch]
    states = {"base": inputs, "tuned": inputs}
    states["export"] = exported("model.embed_tokens.weight")[batch]
    with torch.inference_mode(), progress_bar(source.layers, "layers", "verifying") as progress:
        for layer in range(source.layers):
            load_tuned_layer(source, tuned, layer)
            with tuned.disable_adapter():
                states["base"] = run_layer(tuned, states["base"])
            states["tuned"] = run_layer(tuned, states["tuned"])
            load_layer(plain, layer, exported)
            states["export"] = run_layer(plain, states["export"])
            progress.advance()
        logits = {
            name: final_logits(
                source, exported if name == "export" else source.base_tensor, state[real]
            )
            for name, state in states.items()
        }
    difference = logits["export"] - logits["tuned"]
    effect = (logits["tuned"] - logits["base"]).norm()
    deviation = Deviation(
        float(difference.abs().max()),
        float(difference.norm() / logits["tuned"].norm()),
        float(difference.norm() / effect.clamp(min=1e-30)),
    )
    if not deviation.relative <= LOGIT_BOUNDS[outtype]:  # NaN is refused too
        raise FineTuningError(
            "The exported model's logits differ from those of base + adapter by "
            f"{deviation.relative:.2%} ({outtype} may differ by {LOGIT_BOUNDS[outtype]:.2%}). "
            "Nothing was exported.",
            hint="Try --outtype f32. If that differs too, it is a fault of the program.",
        )
    return deviation


def one_layer_models(source: ExportSource) -> "tuple[PeftModel, LlamaModel]":
    """Return a decoder of one layer with PEFT's adapter on it, and one without."""
    import copy

    import torch
    from peft import get_peft_model
    from transformers import LlamaModel

    config = copy.deepcopy(source.model_config)
    config.num_hidden_layers, config.vocab_size = 1, 1  # embeddings stay outside
    config.pad_token_id = None
    config.dtype = torch.float32
    models = []
    for _ in range(2):
        model = LlamaModel(config).float().eval()
        model.register_module("norm", torch.nn.Identity())  # the real one follows the last layer
        models.append(model)
    lora = copy.deepcopy(source.lora)
    lora.task_type = None
    tuned = get_peft_model(models[0], lora)
    return tuned.eval(), models[1]


def run_layer(model: "PeftModel | LlamaModel", hidden: "torch.Tensor") -> "torch.Tensor":
    """Run one decoder layer on hidden states [prompts, tokens, width]."""
    return model(inputs_embeds=hidden, use_cache=False).last_hidden_state


def load_layer(model: "LlamaModel", layer: int, read: "Callable[[str], torch.Tensor]") -> None:
    """Put one layer's weights into a one-layer model."""
    decoder = model.layers[0]
    state = {name: read(f"model.layers.{layer}.{name}") for name in decoder.state_dict()}
    decoder.load_state_dict(state, assign=True)


def load_tuned_layer(source: ExportSource, model: "PeftModel", layer: int) -> None:
    """Put one layer's base weights and adapter matrices into a one-layer PEFT model."""
    decoder = typing.cast("LlamaModel", model.get_base_model()).layers[0]
    state = {}
    for name in decoder.state_dict():
        whole = f"model.layers.{layer}.{name}"
        if ".lora_" in name:
            file_name = "base_model.model." + whole.replace(".default.", ".")
            state[name] = read_tensor(source.adapter.weights, file_name).float()
        else:
            state[name] = source.base_tensor(whole.replace(".base_layer.", "."))
    decoder.load_state_dict(state, assign=True)


def final_logits(
    source: ExportSource, read: "Callable[[str], torch.Tensor]", states: "torch.Tensor"
) -> "torch.Tensor":
    """Return the logits [positions, vocabulary] of the last layer's states [positions, width]."""
    import torch

    tied = source.model_config.tie_word_embeddings
    head = read("model.embed_tokens.weight" if tied else "lm_head.weight")
    norm = read("model.norm.weight")
    epsilon = source.model_config.rms_norm_eps
    return torch.nn.functional.rms_norm(states, norm.shape, norm, epsilon) @ head.T


def verify_merged(source: ExportSource, folder: Path, outtype: str) -> None:
    """Read a merged folder back, as this program and as others do, and compare it."""
    from transformers import AutoTokenizer

    ours = load_tokenizer(str(folder))
    theirs = typing.cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(folder))
    chats = verify_tokens(source, "The merged folder", lambda t: tokenize_rendered(ours, t))
    verify_tokens(
        source, "The merged folder (AutoTokenizer)", lambda t: tokenize_rendered(theirs, t)
    )
    weights = folder / "model.safetensors"
    deviation = verify_logits(source, lambda name: read_tensor(weights, name).float(), outtype)
    report_verification(deviation, chats)


def verify_gguf(source: ExportSource, path: Path, outtype: str) -> None:
    """Read a GGUF file back and compare it."""
    file, names = read_gguf(path), gguf_tensor_names(source)
    assert file.chat_template == source.tokenizer.chat_template

    def read(name: str) -> "torch.Tensor":
        weight, heads = file.tensor(names[name]), rotary_heads(source, name)
        return weight if heads is None else unpermute_rotary(weight, heads)

    chats = verify_tokens(
        source, "The GGUF file", lambda text: tokenize_like_llama_cpp(file.vocabulary, text)
    )
    deviation = verify_logits(source, read, outtype)
    report_verification(deviation, chats)


def report_verification(deviation: Deviation, chats: int) -> None:
    """Tell what the check found."""
    log.info(
        "  verified against base + adapter: logits of %d prompts differ by %.2g at most (%.2g %% "
        "of the logits, %.2g %% of what the adapter changes); token ids of %d chats are identical",
        VERIFIED_PROMPTS,
        deviation.largest,
        100 * deviation.relative,
        100 * deviation.of_adapter,
        chats,
    )
    if deviation.of_adapter > 0.5:
        log.warning(
            "  rounding hides much of what the adapter has learnt; take --outtype f32, or train it "
            "further"
        )


# --- The command.


def refuse_existing(path: Path, config: FineTuningConfig) -> None:
    """Refuse to replace an earlier export unless told to."""
    if path.exists() and not config.overwrite:
        raise FineTuningError(
            f"{path} exists already.",
            hint="Add --overwrite to replace it, or choose another folder with --export_dir.",
        )


def export_merged(config: FineTuningConfig, options: ExportOptions, source: ExportSource) -> Path:
    """Write, check and publish a merged model folder."""
    folder = export_folder(config, options)
    refuse_existing(folder, config)
    if folder.exists() and not (folder / "config.json").is_file():
        raise FineTuningError(
            f"{folder} is no model folder, so --overwrite does not delete it.",
            hint="Choose another folder with --export_dir.",
        )
    check_export_space(folder, source, options.outtype)
    with staging_folder(folder) as staged:
        write_merged_folder(source, options.outtype, staged)
        verify_merged(source, staged, options.outtype)
        publish_model_folder(staged, folder)
    shown = shlex.quote(str(folder))
    log.info("  chat here:  python unified_finetune.py chat --output_dir %s", shown)
    log.info("  vLLM:       vllm serve %s", shown)
    log.info("  mlx-lm:     mlx_lm.chat --model %s", shown)
    return folder


def export_gguf(config: FineTuningConfig, options: ExportOptions, source: ExportSource) -> Path:
    """Write, check and publish a GGUF file with its Modelfile."""
    check_gguf_support(source)
    folder = export_folder(config, options)
    path = folder / f"{model_name(config)}-{options.outtype}.gguf"
    refuse_existing(path, config)
    check_export_space(folder, source, options.outtype)
    markers = find_turn_markers(source.tokenizer)
    obstacle = modelfile_obstacle(source, markers)
    if obstacle and options.install:
        raise FineTuningError(
            f"Ollama cannot serve this model as it was trained: {obstacle}.",
            hint="Leave --install out; llama.cpp and LM Studio can.",
        )
    modelfile = modelfile_path(path)
    with staging_folder(folder) as staged:
        write_gguf(source, config, options.outtype, staged / path.name)
        verify_gguf(source, staged / path.name, options.outtype)
        names = [path.name]
        if markers is not None and not obstacle:
            text = modelfile_text(source, markers, path.name)
            (staged / modelfile.name).write_text(text, encoding="utf-8")
            names.insert(0, modelfile.name)
        publish_files(staged, folder, names)
    if obstacle:
        log.warning("  no Modelfile for Ollama: %s", obstacle)
    if options.install:
        install_in_ollama(options.install, modelfile)
    tell_how_to_serve(config, options, source, path, None if obstacle else modelfile)
    return path


def modelfile_path(path: Path) -> Path:
    """Return where a GGUF's Modelfile goes: `Modelfile`, unless that is another GGUF's."""
    modelfile = path.parent / "Modelfile"
    if modelfile.is_file():
        first = modelfile.read_text(encoding="utf-8", errors="replace").splitlines()[:1]
        if first != [f"FROM ./{path.name}"]:
            return path.parent / f"Modelfile-{path.stem}"
    return modelfile


def install_in_ollama(name: str, modelfile: Path) -> None:
    """Hand a GGUF to Ollama under a name."""
    log.info("  ollama create %s", name)
    try:
        done = subprocess.run(
            ["ollama", "create", name, "-f", modelfile.name],
            cwd=modelfile.parent,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise FineTuningError(
            f"Ollama cannot be started: {error}", hint="Get it from https://ollama.com/download."
        ) from error
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise FineTuningError(
            f"ollama create {name} failed: {said}",
            hint="The export is complete. Is `ollama serve` running? Then: "
            f"ollama create {name} -f {shlex.quote(str(modelfile))}",
        )


def tell_how_to_serve(
    config: FineTuningConfig,
    options: ExportOptions,
    source: ExportSource,
    path: Path,
    modelfile: "Path | None",
) -> None:
    """Say in three lines how the GGUF is run."""
    shown = shlex.quote(str(path))
    name = options.install or model_name(config).lower()
    if modelfile is not None:
        create = f"ollama create {name} -f {shlex.quote(str(modelfile))} && "
        log.info("  Ollama:     %sollama run %s", "" if options.install else create, name)
    system = f" -sys {shlex.quote(source.system_prompt)}" if source.system_prompt else ""
    log.info("  llama.cpp:  llama-cli -m %s --jinja --temp 0%s", shown, system)
    log.info("  LM Studio:  lms import %s", shown)


def export(config: FineTuningConfig, options: ExportOptions) -> None:
    """Write the merged model in the format that is asked for; its path goes to stdout."""
    if options.format == "gguf":
        check_gguf_package()
    if options.install and shutil.which("ollama") is None:
        raise FineTuningError(
            "--install needs Ollama, and there is no `ollama` command here.",
            hint="Get it from https://ollama.com/download, or leave --install out.",
        )
    source = open_export_source(config)
    if options.export_dir is None:
        claim_output_folder(config)  # no training may replace the adapter meanwhile
    log.info("Exporting %s as %s, %s", config.output_dir, options.format, options.outtype)
    write = export_gguf if options.format == "gguf" else export_merged
    path = write(config, options, source)
    sys.stdout.write(f"{path}\n")


def check_gguf_package() -> None:
    """Raise FineTuningError where the package gguf is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise FineTuningError(
            "The package gguf is missing.", hint="pip install gguf==0.19.0"
        ) from error


# ======================================================================================
# The run
# ======================================================================================


@contextlib.contextmanager
def stage(number: int, name: str) -> Iterator[None]:
    """Announce a stage, time it, and give its errors the stage's exit code."""
    log.info("")
    log.info("[%d/5] %s", number, name)
    started = time.monotonic()
    try:
        yield
    except FineTuningError as error:
        error.exit_code = 10 + number
        raise
    stop_if_asked()  # a signal's exception is lost where it hits a destructor
    log.info("[%d/5] %s done in %s", number, name, human_seconds(time.monotonic() - started))


def run(config: FineTuningConfig) -> RunArtifacts:
    """Run the five stages."""
    with stage(1, "preflight"):
        report = run_preflight(config)
        claim_output_folder(config)
    with stage(2, "download"):
        file = once_for_all(lambda: fetch_dataset(config))
    with stage(3, "prepare"), main_process_first():
        data = prepare_dataset(file, config)
    finished = find_finished_run(config, data)
    if finished:
        return finished
    with stage(4, "train"):
        result = train_lora(data, report, config)
    with stage(5, "save"):
        return once_for_all(lambda: save_results(result, data, config))


def run_check(config: FineTuningConfig) -> None:
    """Run stage 1 alone."""
    with stage(1, "preflight"):
        run_preflight(config)


def run_data(config: FineTuningConfig) -> None:
    """Run stages 1 to 3 and print what a training would be."""
    with stage(1, "preflight"):
        report = run_preflight(config)
    with stage(2, "download"):
        file = fetch_dataset(config)
    with stage(3, "prepare"):
        data = prepare_dataset(file, config)
        estimate_run(data, report, config)


# ======================================================================================
# The command line
# ======================================================================================

COMMANDS = {
    "train": "all five stages (the default)",
    "check": "stage 1 alone: everything that is wrong, each with its remedy",
    "data": "stages 1-3: quality report, token statistics, the plan and its estimates",
    "chat": "talk to the trained adapter",
    "export": "write it as a merged model folder or a GGUF file, checked",
}
# The options of single commands, declared as the settings are.
COMMAND_OPTIONS: "dict[str, type]" = {"chat": ChatOptions, "export": ExportOptions}


def build_parser(command: str) -> argparse.ArgumentParser:
    """Build the parser of one command; values stay text, to tell all problems at once."""
    parser = argparse.ArgumentParser(
        prog="unified_finetune.py",
        usage="%(prog)s [train | check | data | chat | export] [--FLAG VALUE ...]",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=(__doc__ or "").split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--config", metavar="FILE", help="settings from a JSON or YAML file")
    if command in COMMAND_OPTIONS:
        add_flags(parser.add_argument_group(command), COMMAND_OPTIONS[command], "option_")
    group = parser.add_argument_group("settings (each also a line of FineTuningConfig)")
    add_flags(group, FineTuningConfig, "setting_")
    return parser


def add_flags(group: "argparse._ArgumentGroup", record: type, prefix: str) -> None:
    """Add a flag for every field of a record; its value lands in `prefix` + the field's name."""
    for name, f in config_fields(record).items():
        names = dict.fromkeys(["--" + name, "--" + name.replace("_", "-")])
        shown = " ".join(f.default) if isinstance(f.default, tuple) else f.default
        kind = typing.get_type_hints(record)[name]
        group.add_argument(
            *names,
            dest=prefix + name,
            default=None,
            help="{} [{}]".format(f.metadata["help"].replace("%", "%%"), shown),
            metavar=name.rpartition("_")[2].upper(),
            nargs="?" if kind is bool else "+" if typing.get_origin(kind) is tuple else None,
            const="true" if kind is bool else None,
        )


def read_command_options(
    command: str, parsed: argparse.Namespace
) -> "tuple[ChatOptions | ExportOptions | None, list[str]]":
    """Return the command's own options, and everything that is wrong with them."""
    record = COMMAND_OPTIONS.get(command)
    if record is None:
        return None, []
    wrong = []
    values = {name: f.default for name, f in config_fields(record).items()}
    for name in values:
        text = getattr(parsed, "option_" + name)
        if text is None:
            continue
        try:
            values[name] = coerce_value(name, text, record)
        except ValueError as error:
            wrong.append(f"--{name} {error}, not {text!r}")
            continue
        wrong += [
            f"--{name} {what}, not {text!r}" for what in check_limits(name, values[name], record)
        ]
    options = record(**values)
    return options, wrong or list(options.problems())


def joined(value: "str | list[str]") -> str:
    """Return a flag's values as one text."""
    return " ".join(value) if isinstance(value, list) else value


def parse_command_line(
    argv: Sequence[str],
) -> "tuple[str, FineTuningConfig, ChatOptions | ExportOptions | None]":
    """Return the command, the configuration and the command's own options.

    Precedence: defaults < --config < environment < flags.
    """
    command, rest = "train", list(argv)
    if rest and not rest[0].startswith("-"):
        command = rest.pop(0)
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, 1)
            raise UsageError(
                "There is no command {!r}{}".format(
                    command, f", did you mean {near[0]!r}?" if near else "."
                ),
                hint="Commands: " + ", ".join(COMMANDS) + ".",
            )
    try:
        parsed, unknown = build_parser(command).parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise UsageError(str(error), hint="python unified_finetune.py --help") from error
    settings = read_config_file(Path(parsed.config)) if parsed.config else []
    settings += read_environment()
    settings += [
        Setting(name, value if f.metadata.get("sentences") else joined(value), "--" + name)
        for name, f in config_fields().items()
        for value in [getattr(parsed, "setting_" + name)]
        if value is not None
    ]
    options, problems = read_command_options(command, parsed)
    problems = [describe_unknown(u, command) for u in unknown] + problems
    return command, build_config(settings, problems), options


def describe_unknown(argument: str, command: str) -> str:
    """Say that a command-line argument is not known, with the nearest flag that is."""
    flags = list(config_fields())
    if command in COMMAND_OPTIONS:
        flags += config_fields(COMMAND_OPTIONS[command])
    name = argument.split("=")[0].lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(name, flags, 1)
    return f"unknown argument {argument!r}" + (f", did you mean --{near[0]}?" if near else "")


def environment_files() -> list[Path]:
    """Return the .env files that count: the current folder's, then the program's."""
    places = dict.fromkeys((Path.cwd(), PROGRAM_FOLDER))
    return [folder / ".env" for folder in places if (folder / ".env").is_file()]


def read_environment() -> list[Setting]:
    """Load .env and return the settings in it.

    The current folder's comes first, then the program's; the shell wins over both.
    """
    try:
        import dotenv
    except ImportError:  # preflight reports the missing package
        pass
    else:
        for path in environment_files():
            dotenv.load_dotenv(path)
    SecretFilter.secrets.update(
        value
        for name in ("R2_ACCESS_KEY_ID", "R2_SECRET_ACCESS_KEY", "HF_TOKEN")
        for value in [os.environ.get(name, "").strip()]
        if len(value) >= 4
    )
    bucket = os.environ.get("R2_BUCKET_NAME", "").strip()
    return [Setting("r2_bucket_name", bucket, "R2_BUCKET_NAME")] if bucket else []


def set_environment() -> None:
    """Set what libraries read when they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait for work sleep: spinning ones slow everything where other programs run too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    # Set for every run: libraries must not load code or pickles on our behalf.
    os.environ["HF_DATASETS_TRUST_REMOTE_CODE"] = "0"


def execute(
    command: str, config: FineTuningConfig, options: "ChatOptions | ExportOptions | None"
) -> None:
    """Run one command; results go to stdout."""
    if command == "train":
        artifacts = run(config)
        if is_main_process():
            print(artifacts.adapter_dir)  # noqa: T201
    elif command == "check":
        run_check(config)
    elif command == "data":
        run_data(config)
    else:
        try:
            if isinstance(options, ChatOptions):
                chat(config, options)
            elif isinstance(options, ExportOptions):
                export(config, options)
        except FineTuningError as error:
            error.exit_code = 16
            raise


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run the program and return its exit code."""

    def on_signal(number: int, _frame: object) -> None:
        global stop_signal
        stop_signal = number
        stop_if_asked()

    def on_ignored(ignored: "sys.UnraisableHookArgs") -> None:
        log.debug("Ignored in %r: %r", ignored.object, ignored.exc_value)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    sys.unraisablehook = on_ignored
    set_environment()
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == [SELF_TEST]:
        run_self_test(*arguments[1:3])
        return 0
    log_file = None
    try:
        command, config, options = parse_command_line(arguments)
        log_file = start_logging(config)
        execute(command, config, options)
    except FineTuningError as error:
        report_error(str(error), error.hint, log_file)
        log.debug("Details", exc_info=True)
        return error.exit_code
    except KeyboardInterrupt:
        return report_stop(signal.SIGINT, log_file)
    except Terminated:
        return report_stop(signal.SIGTERM, log_file)
    except Exception as error:  # the one place where the unexpected ends
        log.debug("Unexpected", exc_info=True)
        if stop_signal:  # a library that was being imported makes an ImportError of it
            return report_stop(stop_signal, log_file)
        report_error(
            f"Unexpected {type(error).__name__}: {error}",
            "This is a fault of the program; the log has the traceback.",
            log_file,
        )
        return 1
    return 0


def report_stop(number: int, log_file: "Path | None") -> int:
    """Say that a signal ended the program, and return the exit code for it."""
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    report_error(f"Stopped by {name}.", "Run the same command again to go on.", log_file)
    return 128 + number


def report_error(message: str, hint: str, log_file: "Path | None") -> None:
    """Show an error on stderr: what happened, what to do, where the details are."""
    lines = [message] + ["-> " + hint] * bool(hint)
    if log_file:
        lines.append(f"   (details: {log_file})")
        for line in lines:
            log.error("%s", line)
    else:
        sys.stderr.write(hide_secrets("\n".join(lines)) + "\n")


if __name__ == "__main__":
    sys.exit(main())
