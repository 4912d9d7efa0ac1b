#!/usr/bin/env python3
"""Turn instruction data in a Cloudflare R2 bucket into a tested LoRA adapter for TinyLlama.

Five stages, always in this order:
  1 preflight   check this machine, the settings and the access, and choose the device
  2 download    fetch the newest data set from R2, verified, into the cache
  3 prepare     validate, score, split and tokenize the rows
  4 train       train the LoRA adapter, resuming where an earlier run stopped
  5 save        write the adapter, its metrics and its report

Commands:
  python unified_finetune.py                     all five stages (the same as: train)
  python unified_finetune.py check               stage 1 alone: everything wrong, each with its remedy
  python unified_finetune.py data                stages 1-3: quality report, token statistics, the plan
  python unified_finetune.py chat                talk to the trained adapter

Exit codes: 0 success, 2 bad flags or config, 11-15 the stage that failed (11 preflight, 12 download,
13 prepare, 14 train, 15 save), 16 chat or export, 130 Ctrl-C, 143 SIGTERM, 1 anything unexpected.
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
import concurrent.futures
import contextlib
import dataclasses
import difflib
import email.utils
import errno
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import random
import re
import secrets
import shutil
import signal
import socket
import ssl
import stat
import threading
import time
import typing
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TextIO, TypeVar

if TYPE_CHECKING:
    import datasets
    import torch
    from botocore.exceptions import ClientError
    from tqdm import tqdm
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__version__ = "1.0.0"

PROGRAM_FOLDER = Path(__file__).resolve().parent
log = logging.getLogger("unified_finetune")


# ======================================================================================
# Configuration: edit a default here, or pass the field as a flag, or use --config FILE
# ======================================================================================


def option(default: Any, help_text: str, **limits: Any) -> Any:
    """Declare one setting: its default, its help text and the limits its value must respect.

    Limits: `at_least`, `at_most`, `above`, `below` (numbers), `choices` (strings),
    `switch=True` (a property of this one call, not of the run: never saved).
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
    dataloader_num_workers: int = option(0, "extra processes that load batches", at_least=0)
    logging_steps: int = option(10, "log the loss every so many steps", at_least=1)
    eval_steps: int = option(50, "evaluate every so many steps", at_least=1)
    save_steps: int = option(100, "write a checkpoint every so many steps", at_least=1)
    save_total_limit: int = option(3, "checkpoints kept", at_least=1)
    seed: int = option(42, "seed of the split, the shuffling, the adapter and the dropout", at_least=0, at_most=2**32 - 1)
    early_stopping_patience: "int | None" = option(None, "stop after so many evaluations without a better eval loss", at_least=1)
    max_eval_examples: "int | None" = option(None, "examples in the evaluations during training (the final one is complete)", at_least=1)
    gradient_checkpointing: Literal["auto", "on", "off"] = option("auto", "recompute activations to save memory: auto uses it only when memory asks for it")
    # --- the data
    train_split: float = option(0.9, "share of the valid rows to train on", above=0, below=1)
    eval_split: float = option(0.1, "share of the valid rows to evaluate on", above=0, below=1)
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


def config_fields() -> "dict[str, dataclasses.Field[Any]]":
    """Return the fields of the configuration by name, in their order."""
    return {f.name: f for f in dataclasses.fields(FineTuningConfig)}


def coerce_value(name: str, value: object) -> object:
    """Return `value` (text from a flag, or a JSON/YAML value) as the field's type.

    Raises:
        ValueError: with what was expected, when the value has another type.
    """
    hint = typing.get_type_hints(FineTuningConfig)[name]
    choices = [a for a in typing.get_args(hint) if a is not type(None)]
    if type(None) in typing.get_args(hint):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        hint = choices[0]
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


def check_limits(name: str, value: object) -> Iterator[str]:
    """Yield what is wrong with a value of the right type, going by the field's declared limits."""
    limits = config_fields()[name].metadata
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
    """A value as it was given, with the place it came from ("--seed", "config.json", "R2_BUCKET_NAME")."""

    name: str
    value: object
    origin: str


def build_config(settings: Sequence[Setting], problems: Sequence[str] = ()) -> FineTuningConfig:
    """Build the configuration from settings in rising precedence, or refuse with every problem at once."""
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
    """Read settings from a JSON or YAML file, such as the training_config.json of an earlier run."""
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
    """Say what happened (`message`) and what to do about it (`hint`), in words a user can act on."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(FineTuningError):
    """Refuse flags or a configuration."""

    exit_code = 2


class Terminated(BaseException):
    """Unwind the program on SIGTERM, as KeyboardInterrupt does on Ctrl-C."""


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
    for noisy in ("botocore", "urllib3", "filelock", "fsspec", "matplotlib", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.INFO)
    log.info("unified_finetune %s, log file %s", __version__, path)
    return path


def open_log_file(folder: Path) -> Path:
    """Create unified_finetune_YYYYMMDD_HHMMSS.log in `folder`, numbered where that name is taken."""
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")  # local time: a user reads it
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(1000):
            path = folder / f"unified_finetune_{stamp}{f'_{number}' if number else ''}.log"
            with contextlib.suppress(FileExistsError):
                path.touch(exist_ok=False)
                return path
    except OSError as error:
        raise FineTuningError(
            f"The log folder {folder} cannot be written: {error}",
            hint="Choose another one with --log_dir FOLDER.",
        ) from error
    raise FineTuningError(f"A thousand runs started in one second in {folder}.")


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
    """Tell whether this process prints, downloads and saves (one of several under accelerate launch)."""
    return os.environ.get("RANK", "0") == "0"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
    rejected: "tuple[dict[str, Any], ...]"


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
    truncated_examples: int


@dataclass(frozen=True)
class TrainResult:
    """Hold the trained model (the best adapter loaded), its metrics and its history."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    metrics: "dict[str, Any]"
    history: "tuple[dict[str, float], ...]"


@dataclass(frozen=True)
class RunArtifacts:
    """Name what a run left behind."""

    adapter_dir: Path
    metrics: "dict[str, Any]"


# ======================================================================================
# Stage 1: preflight
# ======================================================================================


def run_preflight(config: FineTuningConfig) -> PreflightReport:
    """Check everything a run needs and choose the device; raise once, with everything that is wrong."""
    raise NotImplementedError


# ======================================================================================
# Stage 2: download
# ======================================================================================

R2_ATTEMPTS = 5  # in a row without a new byte
BACKOFF_SECONDS, BACKOFF_CAP_SECONDS, RETRY_AFTER_CAP_SECONDS = 1.0, 30.0, 120.0
CONNECT_SECONDS = 10.0
STALL_SECONDS = 30.0  # without an answer, or without the next few kB of a body
CHUNK_SIZES = (4 * 1024, 256 * 1024)  # smallest and largest read
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
        yield f"must be the account's 32 hexadecimal digits, not {account!r}"


def check_credential(value: str, length: "int | None") -> Iterator[str]:
    """Yield what is wrong with a key, without showing it."""
    placeholder = r"(?i)(your|my)[_-].*|.*[_-]here|x+|\.+|<.*>|changeme|change[_-]me|placeholder"
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
    if parts.username or parts.password:
        SecretFilter.secrets.update(s for s in (parts.username, parts.password) if s)
        yield "must not hold a user name or password"
    elif parts.scheme not in ("http", "https") or not re.fullmatch(
        r"[a-z0-9]([a-z0-9-]{0,62}\.?)*|[0-9a-f:.]+", host
    ):
        yield f"must be like https://<account id>{R2_DOMAIN}, not {endpoint!r}"
    elif parts.query or parts.fragment:
        yield f"must end after the host, not {endpoint!r}"
    elif parts.path.strip("/") == bucket or (parts.path.strip("/") and host.endswith(R2_DOMAIN)):
        yield (
            f"must end after the host: without {parts.path!r} "
            "(the bucket's name belongs in R2_BUCKET_NAME)"
        )


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
    return Bucket(client, config.r2_bucket_name, access.host)


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
    for failures in itertools.count(1):
        try:
            return send(bucket, operation, **arguments)
        except BucketError as error:
            if not error.retry:
                raise
            back_off(error, failures, attempts)
    raise AssertionError("unreachable")


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
    known = explain_code(code, status, bucket, headers)
    if known:
        return BucketError(known[0], known[1], status=status)
    html = error.operation_name != "HeadObject" and (not code or code == str(status))
    if html or status < 400:
        return wrong_endpoint(bucket, f"status {status} without an S3 error", status)
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
            "Check R2_BUCKET_NAME or --r2_bucket_name; R2_ACCOUNT_ID, for each has its own.",
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
            f"{printable(bucket.name)!r} cannot be a bucket's name.",
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
        if "<ListBucketResult" not in str(error):
            return wrong_endpoint(bucket, "no S3 XML in the answer")
        return BucketError(
            f"The answer of {bucket.host} was cut off.", retry=True, unavailable=True
        )
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
        page = send_patiently(bucket, bucket.client.list_objects_v2, Prefix=prefix, **position)
        if "Name" not in page and "KeyCount" not in page:
            raise wrong_endpoint(bucket, "its listing names no bucket")
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
            f"The object {printable(chosen.key)!r} is empty (0 bytes).",
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
        names = ", ".join(repr(printable(o.key)) for o in empty[:3])
        return FineTuningError(
            f"Every .json or .jsonl object {where} is empty (0 bytes): {names}.",
            hint="Upload the data set again, or use a local file with --data_path FILE.",
        )
    names = ", ".join(repr(printable(o.key)) for o in objects[:3]) or "nothing"
    return FineTuningError(
        f"There is no .json or .jsonl object {where}; it holds {names}.",
        hint="Upload a data set there, or set --r2_data_prefix to where it is.",
    )


def find_named(objects: "Sequence[RemoteObject]", name: str, prefix: str) -> RemoteObject:
    """Return the one object that `name` means: a key, a key under the prefix, or a file name."""
    for meaning in (
        lambda key: key == name,
        lambda key: key == prefix + name,
        lambda key: key.rpartition("/")[2] == name,
    ):
        found = [o for o in objects if meaning(o.key)]
        if len(found) == 1:
            return found[0]
        if found:
            raise FineTuningError(
                "dataset_name {!r} fits {} objects: {}.".format(
                    name, len(found), ", ".join(repr(printable(o.key)) for o in found[:10])
                ),
                hint="Give the whole key of one of them with --dataset_name KEY.",
            )
    names = {o.key.rpartition("/")[2]: o.key for o in objects if not o.key.endswith("/")}
    near = difflib.get_close_matches(name.rpartition("/")[2], names, 3, cutoff=0.5)
    raise FineTuningError(
        f"There is no object {name!r} among the {len(objects)} under {prefix!r}.",
        hint="Did you mean {}?".format(" or ".join(repr(printable(names[n])) for n in near))
        if near
        else "Without --dataset_name the program chooses by itself.",
    )


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
        log.info("  passed over: %d more, older still", len(others) - 10)


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
    return folder / f"{name.strip('_')[:60] or 'data'}-{of_key}-{of_version}{suffix}"


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
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        log.warning("  %s cannot be used: %s", info_path(path), error)
        return None


def is_intact(copy: CachedCopy) -> bool:
    """Tell whether the cached bytes are still the verified ones; say so when they are not."""
    try:
        sha256 = hash_file(copy.path, "sha256")
    except OSError as error:
        log.warning("  The cached copy %s cannot be read: %s", copy.path, error)
        return False
    if sha256 != copy.sha256:
        log.warning("  The cached copy %s is damaged (its SHA-256 changed)", copy.path)
    return sha256 == copy.sha256


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
        if is_intact(chosen):
            return chosen
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
    encrypted = head.get("ServerSideEncryption", "").startswith("aws:kms")
    return RemoteObject(
        key,
        head["ContentLength"],
        head["ETag"].strip('"'),
        head["LastModified"],
        sha256=head.get("Metadata", {}).get("sha256", "").lower() or None,
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
            "The disk (or your quota) is full.",
            hint=f"Free {human_bytes(missing + DISK_MARGIN_BYTES)} or choose another place with "
            "--cache_dir FOLDER, then run the same command again: the download goes on from there.",
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
    mib = 1024 * 1024
    usual = [n * mib for n in (8, 5, 16, 10, 15, 25, 32, 50, 64, 100, 128, 256, 512, 1024)]
    usual += [n * 1_000_000 for n in (5, 8, 10, 16, 20, 25, 50, 100)]
    multiples = range(-(-least // mib) * mib, most + 1, mib)
    fitting = [n for n in usual if least <= n <= most]
    return list(dict.fromkeys([*fitting, least, most, *multiples[:64]]))


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


def find_partials(path: Path) -> "list[tuple[int, Path]]":
    """Return size and path of what interrupted runs left of this download."""
    found = []
    for partial in path.parent.glob(path.name + ".*.partial"):
        owner = re.fullmatch(r"\.(\d+)-[0-9a-f]+\.partial", partial.name[len(path.name) :])
        # Where locks do nothing, the owner may be at work in this very moment.
        if owner and not is_running(int(owner[1])):
            with contextlib.suppress(FileNotFoundError):
                status = partial.lstat()
                found.append((status.st_size * stat.S_ISREG(status.st_mode), partial))
    return found


def is_running(pid: int) -> bool:
    """Tell whether a process of this machine is alive."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def take_over_partials(path: Path, file: "IO[bytes]", size: int) -> None:
    """Copy what interrupted runs left of this download into `file`, and remove it.

    A copy, so that no two processes ever write to one file, whatever the locks are worth.
    """
    found = find_partials(path)
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
    folder = os.open(copy.path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def download_object(bucket: Bucket, remote: RemoteObject, folder: Path) -> "CachedCopy | None":
    """Return a verified copy of the object, downloading what is missing; None when replaced."""
    path, begun = cache_path(folder, bucket, remote), time.monotonic()
    with entry_lock(path):
        copy = read_copy(path)
        if copy and is_intact(copy):
            log.info("Another run has just fetched it: %s", path)
            return copy
        partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        with partial.open("x+b", buffering=0) as file:
            try:
                take_over_partials(path, file, remote.size)
                check_free_space(folder, remote.size - file.tell())
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
            log.info("  The ETag is no hash of the content; downloading again to compare")
    raise BucketError(
        f"What {bucket.host} delivers for {printable(remote.key)!r} does not match its hash.",
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
        copy = copy if copy and is_intact(copy) else None
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
        f"{printable(chosen.key)!r} was replaced at every attempt to download it.",
        "Wait until its upload is over, then run the same command again.",
    )


def log_older_versions(path: Path) -> None:
    """Say what earlier versions of this object occupy; a run to be resumed may need them."""
    *_, of_key, _ = path.name.rsplit("-", 2)
    others = [
        other.lstat().st_size
        for other in path.parent.glob(f"*-{of_key}-*")
        if not other.name.startswith(path.name)
    ]
    if sum(others):
        log.info(
            "  Older versions of this object take %s in %s; delete them when no run needs them.",
            human_bytes(sum(others)),
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
    near = difflib.get_close_matches(name, names, 3) if name else names[:3]
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
        there = ", ".join(repr(printable(o["Key"])) for o in page.get("Contents", []))
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
    if "Name" not in page and "KeyCount" not in page:
        stranger = wrong_endpoint(bucket, "its listing names no bucket")
        return Check(name, "failed", str(stranger), stranger.hint)
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


def render_chat(
    tokenizer: "PreTrainedTokenizerFast",
    messages: "Sequence[dict[str, str]]",
    *,
    add_generation_prompt: bool,
) -> str:
    """Render messages ({"role", "content"}) with the chat template: the text that is served."""
    from jinja2.exceptions import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise FineTuningError(
            f"The model's chat template refuses these messages: {first_line(error)}",
            hint="Some templates take no system message, or only alternating turns.",
        ) from error
    assert isinstance(text, str)
    return text


def tokenize_rendered(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Tokenize rendered text as llama.cpp does, with special tokens and never two BOS."""
    bos = tokenizer.bos_token
    if bos and text.startswith(bos):  # the template wrote it
        ids = tokenizer(text.removeprefix(bos))["input_ids"]
        return ids if ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *ids]
    return tokenizer(text)["input_ids"]


def prepare_dataset(file: DatasetFile, config: FineTuningConfig) -> PreparedData:
    """Validate, score, split and tokenize the rows of `file`."""
    raise NotImplementedError


# ======================================================================================
# Stage 4: train
# ======================================================================================


def train_lora(
    data: PreparedData, report: PreflightReport, config: FineTuningConfig
) -> TrainResult:
    """Train the adapter, resuming from this run's last checkpoint, and return it with the best weights loaded."""
    raise NotImplementedError


# ======================================================================================
# Stage 5: save
# ======================================================================================


def save_results(result: TrainResult, data: PreparedData, config: FineTuningConfig) -> RunArtifacts:
    """Write the adapter, its tokenizer, settings, metrics, quality report and model card; whole or not at all."""
    raise NotImplementedError


# ======================================================================================
# Chat
# ======================================================================================


def chat(config: FineTuningConfig, options: argparse.Namespace) -> None:
    """Answer with the trained adapter, rendered and tokenized as in training."""
    raise NotImplementedError


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
    log.info("[%d/5] %s done in %s", number, name, human_seconds(time.monotonic() - started))


def run(config: FineTuningConfig) -> RunArtifacts:
    """Run the five stages."""
    with stage(1, "preflight"):
        report = run_preflight(config)
    with stage(2, "download"):
        file = fetch_dataset(config)
    with stage(3, "prepare"):
        data = prepare_dataset(file, config)
    with stage(4, "train"):
        result = train_lora(data, report, config)
    with stage(5, "save"):
        return save_results(result, data, config)


def run_check(config: FineTuningConfig) -> None:
    """Run stage 1 alone."""
    with stage(1, "preflight"):
        run_preflight(config)


def run_data(config: FineTuningConfig) -> None:
    """Run stages 1 to 3 and print what a training would be."""
    with stage(1, "preflight"):
        run_preflight(config)
    with stage(2, "download"):
        file = fetch_dataset(config)
    with stage(3, "prepare"):
        prepare_dataset(file, config)


# ======================================================================================
# The command line
# ======================================================================================

COMMANDS = {
    "train": "all five stages (the default)",
    "check": "stage 1 alone: everything that is wrong, each with its remedy",
    "data": "stages 1-3: quality report, token statistics, the plan and its estimates",
    "chat": "talk to the trained adapter",
}


def build_parser(command: str) -> argparse.ArgumentParser:
    """Build the parser of one command; values stay text, so that all problems can be told at once."""
    parser = argparse.ArgumentParser(
        prog="unified_finetune.py",
        usage="%(prog)s [train | check | data | chat] [--FLAG VALUE ...]",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=(__doc__ or "").split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--config", metavar="FILE", help="settings from a JSON or YAML file")
    if command == "chat":
        group = parser.add_argument_group("chat")
        group.add_argument("--prompt", metavar="TEXT", help="one answer on stdout, then exit")
        group.add_argument(
            "--compare", action="store_true", help="show the base model's answer beside it"
        )
    group = parser.add_argument_group("settings (each also a line of FineTuningConfig)")
    for name, f in config_fields().items():
        names = dict.fromkeys(["--" + name, "--" + name.replace("_", "-")])
        shown = " ".join(f.default) if isinstance(f.default, tuple) else f.default
        kind = typing.get_type_hints(FineTuningConfig)[name]
        group.add_argument(
            *names,
            dest="setting_" + name,
            default=None,
            help="{} [{}]".format(f.metadata["help"].replace("%", "%%"), shown),
            metavar=name.rpartition("_")[2].upper(),
            nargs="?" if kind is bool else "+" if typing.get_origin(kind) is tuple else None,
            const="true" if kind is bool else None,
        )
    return parser


def parse_command_line(argv: Sequence[str]) -> "tuple[str, FineTuningConfig, argparse.Namespace]":
    """Return the command, the configuration (defaults < --config < environment < flags) and its own options."""
    command, rest = "train", list(argv)
    if rest and not rest[0].startswith("-"):
        command = rest.pop(0)
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, 1)
            raise UsageError(
                "There is no command {!r}{}.".format(
                    command, f", did you mean {near[0]!r}?" if near else ""
                ),
                hint="Commands: " + ", ".join(COMMANDS) + ".",
            )
    try:
        options, unknown = build_parser(command).parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise UsageError(str(error), hint="python unified_finetune.py --help") from error
    settings = read_config_file(Path(options.config)) if options.config else []
    settings += read_environment()
    settings += [
        Setting(name, " ".join(value) if isinstance(value, list) else value, "--" + name)
        for name in config_fields()
        for value in [getattr(options, "setting_" + name)]
        if value is not None
    ]
    return command, build_config(settings, [describe_unknown(u) for u in unknown]), options


def describe_unknown(argument: str) -> str:
    """Say that a command-line argument is not known, with the nearest flag that is."""
    flags = ["--" + name for name in config_fields()]
    near = difflib.get_close_matches(
        argument.split("=")[0].replace("-", "_"), [f.replace("-", "_") for f in flags], 1
    )
    return "unknown argument {!r}{}".format(
        argument,
        ", did you mean --{}?".format(near[0].lstrip("_")) if near else "",
    )


def read_environment() -> list[Setting]:
    """Load .env (current folder first, then the program's; the shell wins) and return settings from it."""
    try:
        import dotenv
    except ImportError:  # preflight reports the missing package
        pass
    else:
        for folder in dict.fromkeys((Path.cwd(), PROGRAM_FOLDER)):
            if (folder / ".env").is_file():
                dotenv.load_dotenv(folder / ".env")
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
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    # Set for every run: libraries must not load code or pickles on our behalf.
    os.environ["HF_DATASETS_TRUST_REMOTE_CODE"] = "0"


def execute(command: str, config: FineTuningConfig, options: argparse.Namespace) -> None:
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
            chat(config, options)
        except FineTuningError as error:
            error.exit_code = 16
            raise


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run the program and return its exit code."""

    def on_sigterm(_signal: int, _frame: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, on_sigterm)
    set_environment()
    log_file = None
    try:
        command, config, options = parse_command_line(sys.argv[1:] if argv is None else argv)
        log_file = start_logging(config)
        execute(command, config, options)
    except FineTuningError as error:
        report_error(str(error), error.hint, log_file)
        log.debug("Details", exc_info=True)
        return error.exit_code
    except KeyboardInterrupt:
        report_error("Stopped by Ctrl-C.", "Run the same command again to go on.", log_file)
        return 130
    except Terminated:
        report_error("Stopped by SIGTERM.", "Run the same command again to go on.", log_file)
        return 143
    except Exception as error:  # the one place where the unexpected ends
        log.debug("Unexpected", exc_info=True)
        report_error(
            f"Unexpected {type(error).__name__}: {error}",
            "This is a fault of the program; the log has the traceback.",
            log_file,
        )
        return 1
    return 0


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
