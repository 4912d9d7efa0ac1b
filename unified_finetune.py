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
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import tempfile
import threading
import time
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    import datasets
    import torch
    from accelerate.data_loader import SeedableRandomSampler
    from peft import PeftModel
    from peft.tuners import lora
    from tqdm import tqdm
    from transformers import PreTrainedModel, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

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
    """Hold a value as it was given, and the place it came from ("--seed", "R2_BUCKET_NAME")."""

    name: str
    value: object
    origin: str


def build_config(settings: Sequence[Setting], problems: Sequence[str] = ()) -> FineTuningConfig:
    """Build the configuration from settings in rising precedence, or refuse it with all problems."""
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
    """Tell whether this process prints, downloads and saves (with several, one does)."""
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
    return folder


def missing_model_files(folder: Path) -> list[str]:
    """Name what a base model's folder lacks."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        missing.append("tokenizer.json")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with contextlib.suppress(ValueError, AttributeError):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return missing + sorted(s for s in shards if not (folder / s).is_file())
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
    )


RUNTIME_BYTES = 700_000_000  # Python, PyTorch and the data, before the model is loaded
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def estimate_memory(size: ModelSize, dtype: str, tokens: int, *, recompute: bool = False) -> int:
    """Estimate the peak memory, in bytes, of training with passes of `tokens` tokens."""
    width = DTYPE_BYTES[dtype]
    # The adapter: weights, gradients, two Adam moments, and the best weights so far, all fp32.
    fixed = RUNTIME_BYTES + size.parameters * width + size.trainable * 4 * 5
    residual = 2 * size.hidden * 4  # RMSNorm saves its input in fp32, twice a layer
    attention = (3 * size.hidden + 2 * size.key_value) * width + 4 * size.hidden
    scores = size.heads * min(tokens, LONGEST_MATH_ROW) * width
    per_layer = residual + attention + scores + 3 * size.feed_forward * width
    kept = size.hidden * width * size.layers + per_layer if recompute else per_layer * size.layers
    logits = 3 * HEAD_CHUNK * size.vocabulary * 4
    return fixed + tokens * kept + logits


def machine_memory(device: str) -> int:
    """Return the memory in bytes that the device has in all, not what is free at the moment."""
    import psutil
    import torch

    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().total


def choose_budget(config: FineTuningConfig, device: str, dtype: str) -> "tuple[int, str]":
    """Return the tokens of a forward pass, and why.

    The user grants per_device_train_batch_size x max_seq_length. Where that would not fit into
    four fifths of the machine's memory it is halved, down to one example of max_seq_length.
    """
    size = measure_model(config)
    total = machine_memory(device)
    granted = budget = config.per_device_train_batch_size * config.max_seq_length
    recompute = config.gradient_checkpointing == "on"
    while (
        budget // 2 >= config.max_seq_length
        and estimate_memory(size, dtype, budget, recompute=recompute) > 0.8 * total
    ):
        budget //= 2
    need = human_bytes(estimate_memory(size, dtype, budget, recompute=recompute))
    reason = f"{need} of this machine's {human_bytes(total)}"
    if budget < granted:
        reason += f" ({granted} were granted)"
    return budget, reason


def check_memory(config: FineTuningConfig, device: str, dtype: str) -> Check:
    """Compare what the run needs with what the machine has."""
    import psutil

    try:
        size = measure_model(config)
        budget, _ = choose_budget(config, device, dtype)
    except FineTuningError as error:
        return Check("memory", "failed", str(error), error.hint)
    need, total = estimate_memory(size, dtype, budget), machine_memory(device)
    free = psutil.virtual_memory().available
    detail = (
        f"{human_bytes(need)} needed at most, {human_bytes(total)} in all, "
        f"{human_bytes(free)} free now"
    )
    if need > total:
        hint = "Try --bf16 (half the memory), a smaller --max_seq_length, or --device cpu."
        return Check("memory", "warning", detail, hint)
    return Check("memory", "ok", detail)


def self_test(device: str, dtype: str) -> "str | None":
    """Try the device in a child process; return what is wrong with it, or None."""
    return None


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


# --- The checks.


def check_python() -> Check:
    """Report the interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python", "ok", f"{version} ({sys.executable})")


def check_packages() -> Check:
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
    if missing:
        return Check("packages", "failed", f"missing: {', '.join(missing)}", install)
    if other:
        return Check("packages", "warning", f"not the tested versions: {', '.join(other)}", install)
    return Check("packages", "ok", f"all {count} at their tested versions")


def existing_parent(path: Path) -> Path:
    """Return the nearest existing folder at or above `path`."""
    path = path.absolute()
    while not path.exists():
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
            f"only {', '.join(short)}; {config.min_disk_gb:g} GB are asked for",
            "Free some space, choose another place, or lower --min_disk_gb.",
        )
    return Check(
        "disk", "ok", ", ".join(f"{human_bytes(f)} free for {name}" for name, f in free.items())
    )


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
    """Lock the output folder, so that no second run writes to it; the lock ends with the process."""
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
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    claimed_folders.append(handle)


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
            return Check("device", "warning", f"{device} rejected: {problem}", hint), "cpu", dtype
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


def run_preflight(config: FineTuningConfig) -> PreflightReport:
    """Check everything a run needs and choose the device; raise once, with all that is wrong."""
    checks = [check_python(), check_packages()]
    if checks[-1].outcome != "failed":  # the other checks need the packages
        checks += [
            check_folder("output_dir", Path(config.output_dir)),
            check_folder("cache_dir", Path(config.cache_dir)),
            check_disk(config),
            check_r2(config),
            check_model(config),
        ]
        device_check, device, dtype = check_device(config)
        checks += [device_check, check_memory(config, device, dtype)]
    for check in checks:
        mark = {"ok": "ok  ", "warning": "WARN", "failed": "FAIL"}[check.outcome]
        log.info("  %s  %-12s %s", mark, check.name, check.detail)
        if check.outcome == "warning" and check.hint:
            log.info("        %-12s -> %s", "", check.hint)
    failed = [c for c in checks if c.outcome == "failed"]
    if failed:
        raise FineTuningError(
            f"{len(failed)} of {len(checks)} checks failed:\n"
            + "\n".join(f"  {c.name}: {c.detail}\n    -> {c.hint}" for c in failed),
            hint="Put these right and start again; check alone: python unified_finetune.py check",
        )
    return PreflightReport(tuple(checks), device, dtype)


# ======================================================================================
# Stage 2: download
# ======================================================================================


@dataclass(frozen=True)
class R2Access:
    """Hold what is needed to reach the bucket; its text never shows the secrets."""

    endpoint_url: str
    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)


def read_r2_access(config: FineTuningConfig) -> R2Access:
    """Read the R2 variables from the environment; raise FineTuningError naming all that are missing or malformed."""
    raise NotImplementedError


def check_bucket(config: FineTuningConfig) -> Check:
    """Ask the bucket for one listing and return the outcome as a preflight check."""
    raise NotImplementedError


def fetch_dataset(config: FineTuningConfig) -> DatasetFile:
    """Return the data set as a verified local file: `data_path`, or the chosen object of the bucket."""
    raise NotImplementedError


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


# --- The engine: the examples of one optimizer step, cut into padding-free forward passes.
#
# A pass lays its examples end to end in one row of tokens, so that nothing is spent on padding.
# The prompt tokens that all of them start with stand there once; the last token of an example is
# never an input, since nothing follows it. Only attention, which must not look from one example
# into another, gathers the tokens into one padded row per example; and only supervised positions
# reach the LM head. The sum of the passes' losses over the supervised tokens of the whole batch
# gives the gradients that one padded batch of the same examples would give.


class Example(typing.TypedDict):
    """Hold one tokenized example; the tokens from `prompt_length` on carry loss."""

    input_ids: "list[int]"
    prompt_length: int


ATTENTION = "packed"  # the name under which transformers finds packed_attention
LONGEST_MATH_ROW = 256  # beyond it, attention scores cost more memory than they save time
HEAD_CHUNK = 256  # supervised positions per slice of logits: bounds the head's memory


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


def shared_prefix(examples: Sequence[Example]) -> int:
    """Count the prompt tokens that all examples start with, short of each one's last."""
    limit = min(e["prompt_length"] for e in examples) - 1
    first = examples[0]["input_ids"]
    for length in range(limit):
        if any(e["input_ids"][length] != first[length] for e in examples):
            return length
    return max(limit, 0)


def lay_out(examples: Sequence[Example], device: str) -> Pass:
    """Lay examples end to end behind the prefix they share."""
    import torch

    shared = shared_prefix(examples)
    width = max(len(e["input_ids"]) for e in examples) - 1
    ids, positions = list(examples[0]["input_ids"][:shared]), list(range(shared))
    gather, scatter = [], list(range(shared))
    keep: list[int] = []
    targets: list[int] = []
    for row, example in enumerate(examples):
        tokens, prompt = example["input_ids"], example["prompt_length"]
        start, own = len(ids), len(tokens) - 1 - shared
        ids += tokens[shared:-1]
        positions += range(shared, shared + own)
        cells = [*range(shared), *range(start, start + own)]
        gather += cells + [0] * (width - len(cells))
        scatter += range(row * width + shared, row * width + shared + own)
        keep += range(start + prompt - 1 - shared, start + own)
        targets += tokens[prompt:]

    def tensor(values: list[int]) -> "torch.Tensor":
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
    module: "torch.nn.Module",
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: "torch.Tensor | None",  # noqa: ARG001 - the interface passes it; always None
    *,
    scaling: float,
    layout: Pass,
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

    q, k, v = to_rows(query), to_rows(key), to_rows(value)
    rows, heads, width, size = q.shape
    groups = heads // k.shape[1]
    if query.device.type == "cpu" and width <= LONGEST_MATH_ROW:
        # On CPUs, short rows go faster as plain matrix products than through the fused kernel,
        # whose backward is slow in bf16. One key head serves its whole group of query heads.
        grouped = q.reshape(rows, k.shape[1], groups * width, size)
        scores = torch.matmul(grouped, k.transpose(2, 3)).view(rows, heads, width, width)
        hidden = torch.ones(width, width, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.mul(scaling).masked_fill(hidden, float("-inf")).softmax(-1)
        mixed = torch.matmul(weights.view(rows, k.shape[1], groups * width, width), v)
        mixed = mixed.view(rows, heads, width, size)
    else:
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q,
            k.repeat_interleave(groups, 1),
            v.repeat_interleave(groups, 1),
            is_causal=True,
            scale=scaling,
        )
    cells = mixed.transpose(1, 2).reshape(rows * width, heads, size)
    return cells.index_select(0, layout.scatter)[None], None


@functools.cache
def engine_functions() -> "tuple[type, type]":
    """Build the two autograd functions (torch is imported only when training needs it)."""
    import torch

    class HeadLoss(torch.autograd.Function):
        """Sum of cross-entropies of a frozen LM head, a slice of positions at a time.

        The head gets no gradient, so that of its input is known as soon as the logits are:
        probabilities minus targets, times the weight. Nothing of vocabulary size outlives a slice.
        """

        @staticmethod
        def forward(ctx, hidden, weight, bias, targets):  # type: ignore[override]
            gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            for start in range(0, len(targets), HEAD_CHUNK):
                part = slice(start, start + HEAD_CHUNK)
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
        def backward(ctx, upstream):  # type: ignore[override]
            (gradient,) = ctx.saved_tensors
            return gradient * upstream.to(gradient.dtype), None, None, None

    class LoraLinear(torch.autograd.Function):
        """y = x W' + b + scale * (mask * x) A' B', with W and b frozen.

        Saves x, the mask (a byte each) and the rank-r product; PEFT's modules save a masked copy
        of x for each layer, and cast it to the adapter's dtype first.
        """

        @staticmethod
        def forward(ctx, x, weight, bias, lora_a, lora_b, scale, mask):  # type: ignore[override]
            a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
            rank = torch.nn.functional.linear(x if mask is None else x * mask, a)
            y = torch.nn.functional.linear(x, weight, bias)
            y.addmm_(rank, b.t(), alpha=scale)
            ctx.save_for_backward(x, weight, a, b, rank, mask)
            ctx.scale = scale
            return y

        @staticmethod
        def backward(ctx, upstream):  # type: ignore[override]
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
    return model.to(device)


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
    from peft.tuners import lora
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
    for module in adapted.modules():
        if isinstance(module, lora.Linear):
            module.forward = functools.partial(fast_lora_forward, module)
    return adapted


def use_packed_attention(model: "PeftModel") -> None:
    """Let the model attend through `packed_attention` until `use_plain_attention`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    model.get_base_model().set_attn_implementation(ATTENTION)


def pass_loss(model: "PeftModel", layout: Pass) -> "torch.Tensor":
    """Return the sum of the cross-entropies of a pass's supervised tokens (a scalar, fp32)."""
    base = model.get_base_model()
    hidden = base.get_decoder()(
        input_ids=layout.input_ids,
        position_ids=layout.position_ids,
        use_cache=False,
        layout=layout,
    ).last_hidden_state
    head = base.get_output_embeddings()
    head_loss, _ = engine_functions()
    return head_loss.apply(
        hidden[0].index_select(0, layout.keep),
        head.weight,
        getattr(head, "bias", None),
        layout.targets,
    )


def mean_loss(model: "PeftModel", examples: "datasets.Dataset", budget: int, device: str) -> float:
    """Return the mean cross-entropy over all supervised tokens of `examples`, without gradients."""
    import torch

    model.eval()
    lengths = [len(ids) for ids in examples["input_ids"]]
    total, count = 0.0, 0
    with torch.inference_mode(), progress_bar(len(lengths), "examples", "evaluating") as bar:
        for indices in plan_passes(lengths, budget):
            layout = lay_out([examples[i] for i in indices], device)
            total += pass_loss(model, layout).item()
            count += len(layout.targets)
            bar.advance(len(indices))
            stop_if_asked()
    return total / count


# --- Checkpoints: staged, flushed to the disk, listed in a manifest of SHA-256, then renamed.

MANIFEST = "manifest.json"
PROGRESS_FILE = "progress.json"
BEST_ADAPTER = "best_adapter.safetensors"
# What makes two runs the same run; anything else may change between an interruption and its resume.
RUN_SETTINGS = (
    "model_name", "max_seq_length", "lora_r", "lora_alpha", "lora_dropout", "target_modules",
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "optim",
    "lr_scheduler_type", "fp16", "bf16", "seed", "train_split", "eval_split", "system_prompt",
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
    path.write_text(text + "\n", encoding="utf-8")


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
        shutil.rmtree(final)
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


def prune_checkpoints(output: Path, limit: int, best_step: "int | None") -> None:
    """Delete the oldest checkpoints beyond `limit`, keeping the newest and, above 1, the best."""
    folders = list_checkpoints(output)
    keep = folders[:1]
    keep += [f for f in folders[1:] if checkpoint_step(f) == best_step][: max(0, limit - 1)]
    keep += [f for f in folders if f not in keep][: max(0, limit - len(keep))]
    for folder in folders:
        if folder not in keep:
            log.debug("Pruning %s (save_total_limit %d)", folder, limit)
            shutil.rmtree(folder)


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


if TYPE_CHECKING:

    class LoraTrainer(SFTTrainer):
        """Describe what `trainer_classes` builds."""

        model: PeftModel
        run: RunState
        config: FineTuningConfig
        periodic: datasets.Dataset  # what evaluations during training look at
        best: dict[str, torch.Tensor]  # the adapter at run.best_step
        bar: "Progress"
        sampler: SeedableRandomSampler
        record: dict[str, float]  # of the step in hand


stop_signal = 0  # the first signal that arrived while training; read between forward passes


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


def stop_if_asked() -> None:
    """Raise what the deferred signal stands for."""
    if stop_signal:
        raise KeyboardInterrupt if stop_signal == signal.SIGINT else Terminated


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of PyTorch on CUDA, MPS or the CPU says that memory ran out."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(w in text for w in ("out of memory", "can't allocate memory", "not enough memory"))


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
        half = next(model.get_base_model().parameters()).dtype != torch.float32
        if failures == 1:
            log.warning("  computing the step once more")
        elif failures == 2 and half:
            log.warning("  going on with the base model in float32")
            for parameter in model.get_base_model().parameters():
                parameter.data = parameter.data.float()
        else:
            raise DeviceGaveUp(f"step {step} gives no finite numbers on {device.type}")


def relieve_memory(trainer: "LoraTrainer", run: RunState, examples: Sequence[Example]) -> None:
    """Take the next rung down: half the budget, then recomputed activations, then the CPU."""
    import torch

    device = trainer.args.device.type
    if device == "cuda":
        torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()
    longest = max(len(e["input_ids"]) for e in examples)
    if run.budget > longest:
        run.budget = max(run.budget // 2, longest)
        log.warning("Out of memory: forward passes of at most %d tokens from here", run.budget)
    elif not run.recompute:
        run.recompute = True
        recompute_activations(trainer.model)
        log.warning("Out of memory: activations are recomputed from here (slower)")
    elif device != "cpu":
        raise DeviceGaveUp(f"out of memory on {device} with the smallest passes")
    else:
        raise FineTuningError(
            f"Not enough memory: one example of {longest} tokens does not fit.",
            hint="Close other programs, lower --max_seq_length or --lora_r, or hold the base model "
            "in half the memory with --bf16. The same command goes on from the last checkpoint.",
        )


def recompute_activations(model: "PeftModel") -> None:
    """Turn gradient checkpointing on; the inputs need no gradient, so it must not be reentrant."""
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})


@functools.cache
def trainer_classes() -> "tuple[type, type]":
    """Build the trainer (TRL's, with the engine's steps and checkpoints) and its callback."""
    import torch
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import DataLoader
    from transformers import TrainerCallback
    from trl import SFTTrainer

    class LoraTrainer(SFTTrainer):
        """Run `train_step` on whole effective batches, and keep the run's own record."""

        def get_train_dataloader(self) -> DataLoader:
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
            self.record = {"loss": loss, "seconds": time.monotonic() - started}
            return torch.tensor(loss, device=self.args.device)

        def floating_point_ops(self, inputs) -> int:  # noqa: ARG002
            """Count nothing: the engine's batches are not the tensors that transformers counts."""
            return 0

        def _get_grad_norm(self, model, grad_norm=None):
            norm = super()._get_grad_norm(model, grad_norm=grad_norm)
            self.record["grad_norm"] = float(norm)
            self.record["learning_rate"] = self.optimizer.param_groups[0]["lr"]
            return norm

        def evaluate(self, *_args, **_kwargs) -> "dict[str, float]":
            """Evaluate on the periodic examples and remember the best adapter."""
            return evaluate_run(self)

        def _save_checkpoint(self, model, trial) -> None:  # noqa: ARG002
            write_checkpoint(self)

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:  # noqa: ARG002
            folder = Path(resume_from_checkpoint)
            load_adapter_weights(self.model, folder / "adapter_model.safetensors")

    class RunCallback(TrainerCallback):
        """Keep the sampler, the record and the console in step with the trainer."""

        def __init__(self, trainer: LoraTrainer) -> None:
            self.trainer = trainer

        def on_train_begin(self, args, state, control, **_) -> None:
            """Let today's intervals win over those of the checkpoint; evaluate where one is due."""
            state.logging_steps, state.eval_steps, state.save_steps = (
                args.logging_steps,
                args.eval_steps,
                args.save_steps,
            )
            due = state.global_step % args.eval_steps == 0
            if due and self.trainer.run.last_evaluated_step != state.global_step:
                self.trainer.evaluate()

        def on_epoch_begin(self, args, state, control, **_) -> None:  # noqa: ARG002
            """Shuffle by seed and epoch, in a resumed epoch too."""
            self.trainer.sampler.set_epoch(int(state.epoch + 1e-6))

        def on_step_end(self, args, state, control, **_) -> None:  # noqa: ARG002
            """Note the step."""
            note_step(self.trainer)

    return LoraTrainer, RunCallback


def evaluate_run(trainer: "LoraTrainer") -> "dict[str, float]":
    """Evaluate during training: note the loss, and the adapter where it is the best so far."""
    run, step = trainer.run, trainer.state.global_step
    loss = mean_loss(trainer.model, trainer.periodic, 4 * run.budget, str(trainer.args.device))
    trainer.model.train()
    run.last_evaluated_step = step
    if step == 0:
        log.info("  eval loss %.4f before training", loss)
    elif run.best_eval_loss is None or loss < run.best_eval_loss:
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


def write_checkpoint(trainer: "LoraTrainer") -> None:
    """Publish checkpoint-STEP in the output folder: adapter, optimizer, schedule, record."""
    import torch
    from safetensors.torch import save_file

    if not is_main_process():
        return
    weights = adapter_weights(trainer.model)
    if not all(value.isfinite().all() for value in weights.values()):
        raise DeviceGaveUp("the adapter's weights are not finite")
    output = Path(trainer.config.output_dir)
    step = trainer.state.global_step
    staged, final = output / f".staging-checkpoint-{step}", output / f"checkpoint-{step}"
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        trainer.model.peft_config["default"].save_pretrained(staged)
        save_file(weights, staged / "adapter_model.safetensors")
        if trainer.best:
            save_file(trainer.best, staged / BEST_ADAPTER)
        torch.save(trainer.optimizer.state_dict(), staged / "optimizer.pt")
        torch.save(trainer.lr_scheduler.state_dict(), staged / "scheduler.pt")
        trainer._save_rng_state(str(staged))
        trainer.state.save_to_json(str(staged / "trainer_state.json"))
        write_json(staged / PROGRESS_FILE, dataclasses.asdict(trainer.run))
        publish_folder(staged, final)
    except OSError as error:
        raise FineTuningError(
            f"Checkpoint {step} cannot be written to {output}: {error.strerror or error}",
            hint="Make room there (earlier checkpoints are untouched), then run the same command "
            "again: it goes on from the last checkpoint.",
        ) from error
    prune_checkpoints(output, trainer.config.save_total_limit, trainer.run.best_step)
    log.debug("Wrote %s", final)


def note_step(trainer: "LoraTrainer") -> None:
    """Record a finished step, and show it every logging_steps."""
    run, state, record = trainer.run, trainer.state, trainer.record
    run.seconds += record["seconds"]
    run.history.append(
        {
            "step": state.global_step,
            "loss": record["loss"],
            "grad_norm": record["grad_norm"],
            "learning_rate": record["learning_rate"],
        }
    )
    trainer.bar.move_to(state.global_step, f"loss {record['loss']:.3f}")
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

    trainer_type, callback_type = trainer_classes()
    trainer = trainer_type(
        model=model,
        args=trainer_arguments(config, device),
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=list,
        processing_class=data.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback_type(trainer))
    trainer.run, trainer.config, trainer.best = run, config, {}
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
    model = add_adapter(load_base_model(config, device, dtype), config)
    log_parameters(model)
    run = start_run(data, config, device, dtype, checkpoint)
    if run.recompute:
        recompute_activations(model)
    use_packed_attention(model)
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
    return finish_training(trainer, data, config, device, dtype, done)


def train_to_the_end(
    trainer: "LoraTrainer", steps: int, done: int, checkpoint: "Path | None"
) -> None:
    """Run the trainer; on Ctrl-C or SIGTERM write a checkpoint of the last finished step."""
    with deferred_signals(), progress_bar(steps, "steps", "training", initial=done) as bar:
        trainer.bar = bar
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (KeyboardInterrupt, Terminated):
            step = trainer.state.global_step
            if step > done:
                write_checkpoint(trainer)
            log.warning(
                "Stopped after step %d of %d; the same command goes on from there", step, steps
            )
            raise


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
    budget, reason = choose_budget(config, device, dtype)
    log.info("  forward passes of at most %d tokens: %s", budget, reason)
    recompute = config.gradient_checkpointing == "on"
    return RunState(run_identity(config, data.source.sha256), budget, recompute)


def log_parameters(model: "PeftModel") -> None:
    """Print how much of the model is trained."""
    trainable, total = model.get_nb_trainable_parameters()
    log.info(
        "  trainable parameters: %s of %s (%.2f %%)",
        f"{trainable:,}",
        f"{total:,}",
        100 * trainable / total,
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
    budget = 4 * run.budget
    eval_loss = mean_loss(model, data.eval, budget, device)
    with model.disable_adapter():
        eval_loss_before = mean_loss(model, data.eval, budget, device)
    model.get_base_model().set_attn_implementation("sdpa")
    trainable, total = model.get_nb_trainable_parameters()
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
        "dropped_examples": len(data.quality.rejected),
        "resumed_from_step": resumed_from or None,
        "data_sha256": data.source.sha256,
    }
    return TrainResult(model, data.tokenizer, metrics, tuple(run.history))


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
    checkpoint = choose_checkpoint(config, data)
    for _ in range(3):
        try:
            return train_on(data, config, device, dtype, checkpoint)
        except DeviceGaveUp as reason:
            log.warning("%s; going on from the last checkpoint on the CPU in float32", reason)
            device, dtype = "cpu", "float32"
            checkpoint = newest_whole_checkpoint(Path(config.output_dir))
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
    checkpoint = newest_whole_checkpoint(output)
    theirs = finished_identity(output)
    if checkpoint:
        theirs = read_progress(checkpoint)["identity"]
    if theirs is None:
        return None
    different = differences(theirs, identity)
    if different and not config.overwrite:
        refuse_differences(different, output)
    if different or config.overwrite or config.resume == "never":
        remove_run(output)
        return None
    return checkpoint


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
        "  eval loss %.4f before, %.4f after; --overwrite trains it anew",
        metrics["eval_loss_before"],
        metrics["eval_loss"],
    )
    return RunArtifacts(output, metrics)


RUN_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "tokenizer.model", "chat_template.jinja", CONFIG_FILE, METRICS_FILE,
    QUALITY_FILE, "README.md", "report.html",
)  # fmt: skip


def remove_run(output: Path) -> None:
    """Delete what an earlier run left in its folder: the files the program writes, nothing else."""
    log.info("  replacing the earlier run in %s", output)
    (output / METRICS_FILE).unlink(missing_ok=True)  # from here on it is not a finished run
    for name in RUN_FILES:
        (output / name).unlink(missing_ok=True)
    for folder in [*list_checkpoints(output), *output.glob(".staging-*")]:
        shutil.rmtree(folder)


def save_results(result: TrainResult, data: PreparedData, config: FineTuningConfig) -> RunArtifacts:
    """Write the adapter, its tokenizer, settings, metrics, quality report and model card."""
    from safetensors.torch import save_file

    output = Path(config.output_dir)
    staged = output / ".staging-result"
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        result.model.peft_config["default"].save_pretrained(staged)
        weights = adapter_weights(result.model)
        save_file(weights, staged / "adapter_model.safetensors", metadata={"format": "pt"})
        write_tokenizer(result.tokenizer, config, staged)
        metrics = result.metrics | {
            "adapter_sha256": sha256_of(staged / "adapter_model.safetensors")
        }
        provenance = {
            "program": f"unified_finetune {__version__}",
            "packages": package_versions(),
            "data_sha256": data.source.sha256,
            "identity": run_identity(config, data.source.sha256),
        }
        write_json(staged / CONFIG_FILE, saved_settings(config) | {"provenance": provenance})
        write_json(staged / QUALITY_FILE, dataclasses.asdict(data.quality))
        write_json(staged / METRICS_FILE, metrics)
        (staged / "README.md").write_text(model_card(config, data, metrics), encoding="utf-8")
        move_into_place(staged, output)
    except OSError as error:
        raise FineTuningError(
            f"The results cannot be written to {output}: {error.strerror or error}",
            hint="Make room there, then run the same command again: the training itself is kept in "
            "the last checkpoint.",
        ) from error
    log.info("  adapter in %s", output)
    return RunArtifacts(output, metrics)


def write_tokenizer(
    tokenizer: "PreTrainedTokenizerFast", config: FineTuningConfig, folder: Path
) -> None:
    """Write the base's tokenizer files as they are, with the chat template where servers look.

    save_pretrained of transformers 5 moves the template to a file that Ollama does not read, and
    leaves tokenizer.model out.
    """
    tokenizer.save_pretrained(folder)
    base = base_model_folder(config.model_name)
    for name in ("tokenizer.json", "tokenizer.model", "special_tokens_map.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    source = base if (base / "tokenizer_config.json").is_file() else folder
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = tokenizer.chat_template
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


def model_card(config: FineTuningConfig, data: PreparedData, metrics: "dict[str, Any]") -> str:
    """Return the model card."""
    return "# adapter\n"


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
        claim_output_folder(config)
    with stage(2, "download"):
        file = fetch_dataset(config)
    with stage(3, "prepare"):
        data = prepare_dataset(file, config)
    finished = find_finished_run(config, data)
    if finished:
        return finished
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
    """Build the parser of one command; values stay text, to tell all problems at once."""
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
    """Return the command, the configuration and the command's own options.

    Precedence: defaults < --config < environment < flags.
    """
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
    """Load .env and return the settings in it.

    The current folder's comes first, then the program's; the shell wins over both.
    """
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
