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
import contextlib
import dataclasses
import difflib
import json
import logging
import os
import re
import signal
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    import datasets
    import torch
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
