#!/usr/bin/env python3
"""Turn instruction data in a Cloudflare R2 bucket into a tested LoRA adapter for TinyLlama.

Five stages, always in this order:
  1 preflight   check this machine, the settings and the access, and choose the device
  2 download    fetch the newest data set from R2, verified, into the cache
  3 prepare     check, split and tokenize the rows
  4 train       train the LoRA adapter, going on where an earlier run stopped
  5 save        write the adapter, test it, and report on it

Commands:
  python unified_finetune.py          all five stages (the same as: train)
  python unified_finetune.py check    stage 1 alone: everything wrong, each with its remedy
  python unified_finetune.py data     stages 1-3: quality report, what is trained, the plan
  python unified_finetune.py chat     talk to the trained adapter
  python unified_finetune.py export   write it as a merged model folder or as a GGUF file

Exit codes: 0 success, 2 bad flags or config, 11-15 the stage that failed (11 preflight, 12
download, 13 prepare, 14 train, 15 save), 16 chat or export, 130 Ctrl-C, 143 SIGTERM, 1 unexpected.

Contents of this file; a section uses only what stands above it:
   1 Settings             every field and flag; reading and refusing values
   2 Console              errors, secrets, the log, progress, questions, signals, processes
   3 Files                what must be whole or absent: JSON, folders, locks, disk errors
   4 Records              what the stages hand on
   5 Model and tokenizer  the base's folder, tokens as served, loading, answering
   6 Engine               forward passes without padding; the adapter
   7 Stage 1, preflight
   8 Stage 2, download
   9 Stage 3, prepare
  10 Stage 4, train
  11 Stage 5, save
  12 Chat
  13 Export
  14 The run and the command line
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
import ast
import atexit
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import errno
import faulthandler
import fcntl
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import operator
import os
import pickle
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import typing
import unicodedata
import urllib.parse
import urllib.request
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, TypeVar


class Lazy:
    """Stand for a package that is imported where it is first used: --help needs none of them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Any:
        package = importlib.import_module(self.name)
        if not hasattr(package, name):
            importlib.import_module(f"{self.name}.{name}")
        return getattr(package, name)


if TYPE_CHECKING:
    import accelerate.data_loader
    import botocore
    import datasets
    import filelock
    import gguf
    import huggingface_hub.errors
    import jinja2
    import matplotlib.figure
    import numpy as np
    import packaging.requirements
    import peft
    import psutil
    import pyarrow
    import rensa
    import safetensors.torch
    import torch
    import tqdm
    import transformers
    import trl
    import urllib3
    import yaml
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerFast as Tokenizer
else:
    LAZY = "accelerate botocore datasets filelock gguf huggingface_hub jinja2 matplotlib packaging"
    LAZY += " peft psutil pyarrow rensa safetensors torch tqdm transformers trl urllib3 yaml"
    globals().update({name: Lazy(name) for name in LAZY.split()}, np=Lazy("numpy"))

__version__ = "2.0.0"

PROGRAM_FOLDER = Path(__file__).resolve().parent
log = logging.getLogger("unified_finetune")
T = TypeVar("T")


# ======================================================================================
# 1. Settings
# ======================================================================================
#
# In: flags, a JSON or YAML file, environment variables. Out: frozen records whose values have the
# right type and respect their limits. All that is wrong is collected, so that it can be told in one
# message. A default edited here is a supported way to use the program; no secret is ever a field.

Given = tuple[str, object, str]  # a setting's name, its value, and the place that it came from

# Stage 3's checks: what is done with such a row, and what it means.
CHECKS: "dict[str, tuple[str, str]]" = {
    # unusable rows: they lower the quality score of the set
    "not_an_object": ("reject", "the row is no JSON object"),
    "unknown_shape": ("reject", "the row has none of the known keys"),
    "not_text": ("reject", "a number, a list or the like stands where text belongs"),
    "bad_turn": ("reject", "a turn of the conversation has no known role or no text"),
    "no_answer": ("reject", "no turn of the conversation is the assistant's"),
    "preference_pair": ("reject", "chosen and rejected answers: they need another training"),
    "empty_instruction": ("reject", "there is no question"),
    "empty_output": ("reject", "there is no answer"),
    "undecodable": ("reject", "half a character (a lone surrogate), which no tokenizer takes"),
    "special_tokens": ("reject", "tokens of the model itself stand inside the text"),
    "template": ("reject", "the model's chat template or tokenizer refuses or changes the row"),
    # usable rows that are left out; rows whose text is changed
    "masked": ("drop", "the file takes every answer of the row out of the training"),
    "exact_duplicate": ("drop", "the same row stands earlier in the data"),
    "over_length": ("drop", "the row is longer than max_seq_length"),
    "control_characters": ("repair", "control characters became a space or a line break"),
    "appended_end_token": ("repair", "the answer brought its end token: the program adds it"),
    # rows to look at; they are trained as they are, but for those of drop_checks
    "broken_encoding": ("warn", "characters were lost for good (U+FFFD)"),
    "mojibake": ("warn", "looks decoded wrongly, such as Ã© for é; ftfy can mend a file"),
    "eaten_backslash": ("warn", "JSON took the backslash of \\frac, \\beta or such for its own"),
    "foreign_marks": ("warn", "marks of a chat format, which are plain text for this model"),
    "tool_calls": ("warn", "a tool is offered or called, and only the words are trained"),
    "images": ("warn", "pictures or sounds belong to the row, and only the words are trained"),
    "choices": ("warn", "there are choices that the question does not show"),
    "documents": ("warn", "there are documents that the question does not show"),
    "negative_label": ("warn", "label is false: the answer may be meant as a bad one"),
    "unanswered_turn": ("warn", "turns after the last answer are not used"),
    "repeated_key": ("warn", "a key stands twice: the last one counts"),
    "placeholder_answer": ("warn", "a placeholder stands where an answer belongs"),
    "placeholder_input": ("warn", "an input such as N/A stands in the question"),
    "ai_boilerplate": ("warn", "another model may speak about itself in the answer"),
    "answer_repeats_question": ("warn", "the answer only repeats the question or input"),
    "cut_off_answer": ("warn", "the answer ends in the middle of a sentence"),
    "unbalanced_code_fence": ("warn", "a code block (```) is opened and not closed"),
    "implausible_value": ("warn", "a rate of admission or graduation, 100 times too small?"),
    "near_duplicate": ("warn", "nearly the same row stands earlier in the data"),
    "contradiction": ("warn", "the same question has another answer earlier"),
    "length_outlier": ("warn", "many times as long as the other rows"),
    # facts
    "unused_keys": ("note", "keys that are not used"),
    "merged_tokens": ("note", "the answer's first token would join the prompt's last"),
}
WARNING_CHECKS = [name for name, (action, _) in CHECKS.items() if action in ("warn", "repair")]


def option(default: Any, help_text: str, **rules: Any) -> Any:
    """Declare one setting: its default, its help text and the rules for its value.

    Rules: the LIMITS of numbers; `among` (what a list may hold), `path` (~ is the home folder),
    `filled` (never empty), `names` (a list of names, not of texts with their spaces), `verbatim`
    (any text is a value, "none" too), `switch` (of this one call, not of the run: never saved).
    """
    return field(default=default, metadata={"help": help_text, **rules})


# Each record's `problems` are of values that are fine one by one: words, and whether they hold.
# fmt: off
# ruff: disable[E501]
@dataclass(frozen=True, kw_only=True)
class FineTuningConfig:
    """Hold every setting of a run; no secret is ever one of them."""

    # --- the model and its adapter
    model_name: str = option("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "base model: a Hugging Face id or a local folder", path=True, filled=True)
    max_seq_length: int = option(1024, "longest example, in tokens", at_least=8)
    lora_r: int = option(32, "rank of the LoRA matrices", at_least=1)
    lora_alpha: int = option(64, "LoRA scale: updates are multiplied by lora_alpha / lora_r", at_least=1)
    lora_dropout: float = option(0.05, "dropout on the adapter's input", at_least=0, below=1)
    target_modules: tuple[str, ...] = option(("q_proj", "k_proj", "v_proj", "o_proj"), "linear layers that get an adapter", names=True, filled=True)
    init_adapter: "str | None" = option(None, "folder of an earlier adapter to start from, instead of a new one", path=True)
    # --- the training
    num_train_epochs: float = option(3, "passes over the training examples", above=0)
    per_device_train_batch_size: int = option(2, "examples of max_seq_length that one forward pass may hold", at_least=1)
    gradient_accumulation_steps: int = option(8, "times that, examples per optimizer step (2 x 8 = 16, the effective batch)", at_least=1)
    learning_rate: float = option(2e-5, "peak learning rate", at_least=0)
    weight_decay: float = option(0.01, "AdamW weight decay", at_least=0)
    warmup_steps: int = option(50, "optimizer steps until the peak learning rate", at_least=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm (0: never)", at_least=0)
    optim: Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"] = option("adamw_torch", "optimizer")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = option("cosine", "learning-rate schedule")
    fp16: bool = option(False, "hold the frozen base in fp16 (NVIDIA GPUs only)")
    bf16: bool = option(False, "hold the frozen base in bf16 (half the memory; faster where the chip has bf16)")
    float32_matmul_precision: Literal["highest", "high", "medium"] = option("highest", "products of float32: high allows TF32 on NVIDIA GPUs, medium bf16 on processors that have it")
    gradient_checkpointing: Literal["auto", "on", "off"] = option("auto", "recompute activations to save memory: auto uses it only when memory asks for it")
    dataloader_num_workers: int = option(0, "extra processes that load batches", at_least=0)
    logging_steps: int = option(10, "log the loss every so many steps", at_least=1)
    eval_steps: int = option(50, "evaluate every so many steps", at_least=1)
    save_steps: int = option(100, "write a checkpoint every so many steps", at_least=1)
    save_total_limit: int = option(3, "checkpoints kept", at_least=1)
    early_stopping_patience: "int | None" = option(None, "stop after so many evaluations without a better eval loss", at_least=1)
    max_eval_examples: "int | None" = option(None, "examples in the evaluations during training (the final one is complete)", at_least=1)
    seed: int = option(42, "seed of the split, the shuffling, the adapter and the dropout", at_least=0)
    # --- the data
    data_path: "str | tuple[str, ...] | None" = option(None, "local .json, .jsonl, .csv or .parquet files, used instead of R2", path=True)
    dataset_name: "str | tuple[str, ...] | None" = option(None, "keys or file names of the objects to take, instead of the automatic choice")
    r2_bucket_name: str = option("collegeadvisor-finetuning-data", "bucket in Cloudflare R2 (environment: R2_BUCKET_NAME)", filled=True)
    r2_data_prefix: str = option("multi_source/training_datasets/", "only objects whose key starts so are considered")
    train_split: float = option(0.9, "share of the valid rows to train on", above=0, below=1)
    eval_split: float = option(0.1, "share of the valid rows to evaluate on", above=0, below=1)
    assistant_turns: Literal["all", "last"] = option("all", "which answers of a conversation carry loss")
    overlong: Literal["drop", "truncate"] = option("drop", "what happens to rows of more than max_seq_length tokens")
    drop_checks: tuple[str, ...] = option((), "leave out the rows that these checks warn about", names=True, among=WARNING_CHECKS)
    keep_duplicates: bool = option(False, "train on rows that stand in the data more than once as often as they stand there")
    min_data_quality_score: float = option(0.85, "least share of valid rows to go on without asking", at_least=0, at_most=1)
    system_prompt: "str | None" = option(None, "system message put before every example and every chat")
    sample_prompts: tuple[str, ...] = option((), "questions of your own to answer before and after, beside held-out ones")
    # --- where things are and how the program runs
    output_dir: str = option("collegeadvisor_unified_model", "folder for the adapter, its report and its checkpoints", path=True, filled=True)
    cache_dir: str = option("cache/training_data", "folder for verified downloads", path=True, filled=True)
    log_dir: str = option("logs/finetuning", "folder for the log files, one per run", path=True, filled=True)
    device: Literal["auto", "mps", "cuda", "cpu"] = option("auto", "where to train; auto takes CUDA, then MPS, then the CPU")
    resume: str = option("auto", "auto: go on from this run's last checkpoint; never: start anew; or a checkpoint's PATH", path=True, filled=True)
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = option("none", "also send metrics to an experiment tracker")
    min_disk_gb: float = option(10, "least free disk space, in GB, at every place that is written to", at_least=0)
    yes: bool = option(False, "answer yes to every question", switch=True)
    overwrite: bool = option(False, "replace what another run left in output_dir", switch=True)
    verbose: bool = option(False, "show the log's details on the console too", switch=True)

    def problems(self) -> "dict[str, bool]":
        return {
            f"train_split {self.train_split} and eval_split {self.eval_split} add up to more than 1": self.train_split + self.eval_split > 1 + 1e-9,
            "fp16 and bf16 exclude each other": self.fp16 and self.bf16,
            "lr_scheduler_type polynomial ends at 1e-7: learning_rate must be above that": self.lr_scheduler_type == "polynomial" and self.learning_rate <= 1e-7,
            f"fp16 works on NVIDIA GPUs only; leave it off for device {self.device}": self.fp16 and self.device in ("cpu", "mps"),
        }

    @property
    def dtype(self) -> str:
        """Return the dtype that the frozen base is held in."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    @property
    def effective_batch(self) -> int:
        """Return the examples per optimizer step, over all processes together."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    prompt: "str | None" = option(None, "answer this on stdout, then exit", verbatim=True)
    compare: bool = option(False, "show the base model's answer beside the adapter's")
    no_system_prompt: bool = option(False, "leave out the system message that the adapter was trained with")
    max_new_tokens: int = option(512, "longest answer, in tokens", at_least=1)
    temperature: float = option(0, "0: always the likeliest token (greedy); above: sample, seeded by --seed", at_least=0, at_most=100)
    top_p: float = option(1, "sample from the likeliest tokens that make up this share of the probability", above=0, at_most=1)
    top_k: int = option(0, "sample from so many of the likeliest tokens (0: all)", at_least=0)
    repetition_penalty: float = option(1, "above 1: make tokens that occurred before less likely", at_least=0.1, at_most=10)

    def problems(self) -> "dict[str, bool]":
        return {
            "--prompt must not be empty": self.prompt is not None and not self.prompt.strip(),
            "--top_p and --top_k change nothing at temperature 0; add --temperature 0.7": self.temperature == 0 and (self.top_p, self.top_k) != (1, 0),
            f"--temperature must be 0 or at least 0.01, not {self.temperature}": 0 < self.temperature < 0.01,
        }


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    format: "Literal['merged', 'gguf'] | None" = option(None, "merged: a model folder for transformers, vLLM and mlx-lm; gguf: a file for Ollama, llama.cpp and LM Studio")
    outtype: Literal["f32", "f16", "bf16", "q8_0"] = option("f16", "number format of the weights (q8_0: gguf only)")
    export_dir: "str | None" = option(None, "folder to write, instead of merged or gguf in output_dir", path=True)
    install: "str | None" = option(None, "also hand the GGUF to Ollama under this name")
    quantize: "Literal['q4_K_M', 'q4_K_S', 'q8_0'] | None" = option(None, "with --install: Ollama stores it in this smaller format")

    def problems(self) -> "dict[str, bool]":
        merged, named = self.format == "merged", self.install is not None
        return {
            "--format is missing: merged or gguf": self.format is None,
            "--outtype q8_0 exists in GGUF files only; for merged take f32, f16 or bf16": merged and self.outtype == "q8_0",
            "--install needs --format gguf, which is what Ollama reads": merged and named,
            f"--install must be a name like my-model or me/my-model:v1, not {self.install!r}": named and not re.fullmatch(r"[A-Za-z0-9][\w.:/-]*", str(self.install)),
            "--quantize is done by Ollama: add --install NAME": self.quantize is not None and not named,
            "--quantize starts from full weights: take --outtype f16": self.quantize is not None and self.outtype not in ("f32", "f16"),
        }
# ruff: enable[E501]
# fmt: on


def fields_of(record: type) -> "dict[str, dataclasses.Field[Any]]":
    return {f.name: f for f in dataclasses.fields(record)}


def nearest(name: str, names: Iterable[str], mark: str = "") -> str:
    """Return ", did you mean 'X'?" with the name that is spelt most like `name`, or nothing."""
    near = difflib.get_close_matches(name, list(names), 1)
    return f", did you mean {mark + near[0]!r}?" if near else ""


def parse_text(value: object, rules: "Mapping[str, Any]") -> str:
    """Return one text; in a path, ~ becomes the home folder."""
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("must be text")
    if rules.get("path"):
        if any(len(os.fsencode(part)) > 255 for part in Path(value).parts):
            raise ValueError("has a name of more than 255 bytes")
        try:
            return str(Path(value).expanduser()) if value.startswith("~") else value
        except RuntimeError:
            raise ValueError("names a home folder that is not there") from None
    if re.search(r"[\ud800-\udfff]", value) and not rules.get("verbatim"):  # bytes, undecoded
        raise ValueError("must be text in this terminal's encoding (UTF-8)")
    return value


def parse_list(value: object, rules: "Mapping[str, Any]") -> "tuple[str, ...]":
    """Return a list of texts, or (rule `names`) of names, which commas and spaces separate."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(i, str) for i in items):
        raise ValueError(f"must be a list of {'names' if rules.get('names') else 'texts'}")
    if rules.get("names"):
        items = [i for i in re.split(r"[,\s]+", " ".join(items)) if i not in ("", "none", "None")]
    if not all(item.strip() and item in rules.get("among", items) for item in items):
        raise ValueError(f"must be among {', '.join(rules.get('among', ['no empty texts']))}")
    return tuple(parse_text(item, rules) for item in items)


LARGEST = 2**32 - 1  # of all numbers: libraries fail on larger ones in their own words
WORDS = {"true": True, "yes": True, "1": True, "on": True}
WORDS |= {"false": False, "no": False, "0": False, "off": False}
LIMITS = {"at_least": operator.ge, "above": operator.gt}
LIMITS |= {"at_most": operator.le, "below": operator.lt}


def parse_scalar(value: Any, kind: type) -> "bool | int | float":
    """Return a truth value, a finite number, or a whole one (as 7.0 and "1e3" are), not rounded."""
    text, names = str(value).lower(), {bool: "true or false", int: "a whole number"}
    if kind is bool and text in WORDS:
        return WORDS[text]
    with contextlib.suppress(ValueError, OverflowError):
        number = float(text)
        whole = int(number)  # raises for what is not finite
        if kind is float or (kind is int and number == whole):
            return whole if number == whole else number
    raise ValueError(f"must be {names.get(kind, 'a number')}")


def parse_value(value: Any, kind: Any, rules: "Mapping[str, Any]") -> Any:
    """Return a flag's text, or a value from a file, as its setting has it, or raise ValueError."""
    kinds = typing.get_args(kind)
    if type(None) in kinds:
        text = value[0] if isinstance(value, list) and len(value) == 1 else value
        nothing = str(text).lower() in ("none", "null", "", "[]") and not rules.get("verbatim")
        if nothing or value is None:
            return None
        if len(kinds) == 3:  # one text, or several, or none
            texts = parse_list(value, rules)
            return texts[0] if len(texts) == 1 else texts
        kind = kinds[0]
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if isinstance(value, bool):  # YAML reads a bare on/off as a truth value
            value = "on" if value else "off"
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}{nearest(str(value), choices)}")
    elif kind in (bool, int, float):
        value = parse_scalar(value, kind)
        if value > LARGEST:
            raise ValueError(f"must be at most {LARGEST}")
    else:
        value = parse_text(value, rules) if kind is str else parse_list(value, rules)
    for rule, holds in LIMITS.items():
        if rule in rules and not holds(value, rules[rule]):
            raise ValueError(f"must be {rule.replace('_', ' ')} {rules[rule]}")
    if rules.get("filled") and not (value.strip() if isinstance(value, str) else value):
        raise ValueError("must not be empty")
    return value


# Settings of earlier versions, which an old training_config.json may still hold.
RETIRED_SETTINGS = ("plausibility_rules",)


def build_record(record: "type[T]", given: Sequence[Given], problems: "list[str]") -> "T | None":
    """Build a record, later values winning; None where `problems`, which gets all, holds any."""
    fields, hints = fields_of(record), typing.get_type_hints(record)
    # Defaults are checked like what is given, since somebody may have edited them.
    chosen = {name: (f.default, "default") for name, f in fields.items()}
    for name, value, origin in given:
        if name in fields:
            chosen[name] = value, origin
        elif name not in RETIRED_SETTINGS or origin.startswith("--"):
            problems.append(f"{origin}: there is no setting {name!r}{nearest(name, fields)}")
    values = {}
    for name, (value, origin) in chosen.items():
        try:
            values[name] = parse_value(value, hints[name], fields[name].metadata)
        except ValueError as error:
            problems.append(f"{origin}: {name} {error}, not {value!r}")
    if len(values) == len(fields):
        made: Any = record(**values)
        problems += [words for words, hold in made.problems().items() if hold]
    return None if problems else made


def read_config_file(path: Path, problems: "list[str]") -> "list[Given]":
    """Read settings from a JSON or YAML file, such as an earlier training_config.json."""
    parse: Callable[[str], Any] = json.loads
    faults: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError)
    try:
        if path.suffix.lower() in (".yaml", ".yml"):
            parse, faults = yaml.safe_load, (*faults, yaml.YAMLError)
        content = parse(path.expanduser().read_text(encoding="utf-8-sig")) or {}
        if not isinstance(content, dict):
            raise ValueError("it must hold one object of settings")
        # training_config.json carries facts about its run beside the settings.
        return [(str(name), v, str(path)) for name, v in content.items() if name != "provenance"]
    except ImportError:
        problems.append(f"--config {path} is YAML: pip install PyYAML, or write it as JSON")
    except faults as error:
        problems.append(f"--config {path} cannot be read: {error}")
    return []


def saved_settings(config: FineTuningConfig) -> "dict[str, Any]":
    """Return the settings that describe the run (not this one call), as JSON values."""
    fields = fields_of(FineTuningConfig).items()
    values = {n: getattr(config, n) for n, f in fields if not f.metadata.get("switch")}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}


# ======================================================================================
# 2. Console
# ======================================================================================
#
# What the user sees: errors in words, a log without secrets, progress, questions; and what reaches
# the program from outside while it works: signals, and other processes that train with it. stdout
# belongs to results; everything here goes to stderr and to the log file.


class FineTuningError(Exception):
    """Say what happened (`message`) and what to do (`hint`), in words a user can act on.

    The exit code is that of chat and export; a stage sets its own.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = 16) -> None:
        super().__init__(hide_secrets(message))
        self.hint, self.exit_code = hide_secrets(hint), exit_code


known_secrets: "set[str]" = set()


def hide_secrets(text: str) -> str:
    for secret in known_secrets:
        text = text.replace(secret, "***")
    return text


def remember_secrets(*values: "str | None") -> None:
    """Keep values out of every log, error and traceback from now on."""
    known_secrets.update(v.strip() for v in values if v and len(v.strip()) >= 4)


class SafeHandler(logging.StreamHandler["IO[str]"]):
    """Write records, tracebacks included: without secrets, and without tearing a progress bar."""

    def format(self, record: logging.LogRecord) -> str:
        return hide_secrets(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        tqdm: Any = getattr(sys.modules.get("tqdm"), "tqdm", None)
        torn = tqdm and self.stream is sys.stderr  # no bar where tqdm is not imported
        bars = tqdm.external_write_mode(sys.stderr) if torn else contextlib.nullcontext()
        with contextlib.suppress(OSError, ValueError), bars:  # nobody may read stderr any more
            super().emit(record)


def start_logging(folder: Path, *, verbose: bool) -> Path:
    """Send messages to the console and everything, with timestamps, to a new log file."""
    path = folder / f"unified_finetune_{datetime.now():%Y%m%d_%H%M%S}.log"  # as the clock says
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():  # two runs may start in one second
            path = path.with_stem(f"{path.stem}_{os.getpid()}")
        stream = path.open("a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        what = f"The log folder {folder} cannot be written: {error.strerror}"
        raise FineTuningError(what, "Choose another one with --log_dir FOLDER.", 2) from error
    console, to_file = SafeHandler(sys.stderr), SafeHandler(stream)
    to_file.name = "file"
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    if not is_main_process():
        console.setLevel(logging.ERROR)
    elif not verbose:  # what libraries say goes to the file
        console.setLevel(logging.INFO)
        console.addFilter(logging.Filter("unified_finetune"))
    both = [console, to_file]
    logging.basicConfig(level=logging.DEBUG, format="%(message)s", handlers=both, force=True)
    faulthandler.enable(stream)  # a crash in a library says where
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # on a full disk, each record would put a traceback on stderr
    for noisy in ("botocore", "urllib3", "httpx", "httpcore", "filelock", "fsspec", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.INFO)
    log.info("unified_finetune %s, log file %s", __version__, path)
    return path


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shorten(text: str, length: int = 120) -> str:
    """Return foreign text on one line, safe for a terminal, cut to `length` characters."""
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: 2 * length])
    return text if len(text) <= length else text[: length - 1] + "…"


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of PyTorch on CUDA, MPS or the CPU says that memory ran out."""
    words = "out of memory|alloc_failed|invalid buffer size|not enough memory|can(no|')t allocate"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error).lower()))


@contextlib.contextmanager
def memory_in_words(what: str, hint: str) -> Iterator[None]:
    """Turn memory that runs out into an error that says so."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise FineTuningError(f"{what} does not fit into memory.", hint=hint) from error


# What libraries raise for files, settings and answers that they do not expect.
FOREIGN_ERRORS: "tuple[type[Exception], ...]" = (
    OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, ArithmeticError,
    AssertionError, ImportError,
)  # fmt: skip


@contextlib.contextmanager
def library_errors(what: str, hint: str, *others: "type[Exception]") -> Iterator[None]:
    """Put what a library (or our use of it) raises into words, `what` first."""
    try:
        yield
    except (*FOREIGN_ERRORS, *others) as error:
        stop.raise_if_asked()  # an import makes an ImportError of a signal
        if is_out_of_memory(error):
            raise
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise FineTuningError(f"{what}: {shorten(said, 300)}", hint) from error


def adapt_old_packages() -> None:
    """Give the packages of Intel Macs (torch 2.2, transformers 4) what the newer ones have."""
    old: Any = transformers
    if not old.__version__.startswith("4."):
        return

    def rope(config: Any) -> "dict[str, Any]":
        told = {"rope_theta": config.rope_theta, "rope_type": "default"}
        return told | (config.rope_scaling or {})

    def from_dict(cls: Any, told: "dict[str, Any]", **how: Any) -> Any:
        rope = told.get("rope_parameters") or {}  # transformers 5 writes it
        flat = {k: v for k, v in told.items() if k != "rope_parameters"}
        flat |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        flat |= {"rope_scaling": rope} if rope.get("rope_type", "default") != "default" else {}
        return read(cls, flat, **how)

    read, enable = old.PretrainedConfig.from_dict.__func__, "gradient_checkpointing_enable"
    old.PretrainedConfig.from_dict = classmethod(from_dict)
    old.PretrainedConfig.rope_parameters = property(rope)
    old.PreTrainedModel.activation_checkpointing_enable = getattr(old.PreTrainedModel, enable)
    old.trainer.check_torch_load_is_safe = bool  # `train` reads no file of the unsafe kind


def quiet_libraries(*others: Any) -> None:
    """Import the large libraries, and send what transformers says to the log file."""
    hint = "A variable of theirs may be wrong (HF_..., TORCH_...); if not, install them again."
    with library_errors("PyTorch, transformers or datasets cannot be imported", hint):
        log.debug("Versions: %s", [p.__version__ for p in (torch, transformers, *others)])
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    adapt_old_packages()


def write_out(text: str) -> None:
    """Write a result to stdout at once; raise FineTuningError where nobody reads it any more."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Python flushes stdout once more at its end, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise FineTuningError(f"stdout cannot be written: {error.strerror}.") from error


def human_bytes(count: float) -> str:
    """Return a byte count as people write it: 999 B, 1.5 MB, 2.20 GB (powers of ten)."""
    for unit, size, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count:.0f} B"


def human_seconds(seconds: float) -> str:
    """Return a duration as people write it: 0.4 s, 41 s, 3 min 20 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if minutes >= 1:
        return f"{minutes} min {rest:02d} s"
    return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


def program_command() -> str:
    """Return how this program was started, for hints that tell what to type next."""
    if Path(sys.prefix) == PROGRAM_FOLDER / "venv_finetune":
        return shlex.quote(str(PROGRAM_FOLDER / "run_finetuning.sh"))
    return shlex.join([Path(sys.executable).name, str(Path(__file__).resolve())])


def ask(question: str, *, yes: bool) -> bool:
    """Ask a yes/no question on a terminal; without one, only --yes agrees."""
    if yes:
        log.info("%s  yes (--yes)", question)
        return True
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(question + " [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextlib.contextmanager
def progress_bar(
    total: int, unit: str, description: str, initial: int = 0, *, lines: bool = True
) -> "Iterator[Callable[..., None]]":
    """Show a long step's progress: a bar with an ETA in a terminal, else `lines` every 5 seconds.

    `unit` is a plural, or "B". Gives `advance(count=1, note="")`; the note stands beside the bar.
    """
    look: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True, "leave": False}
    terminal = is_main_process() and sys.stderr.isatty()
    if not terminal:
        line = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}, {rate_noinv_fmt}, {remaining}"
        look = {"file": io.StringIO(), "bar_format": line + " left{postfix}"}
        look |= {"mininterval": 5, "miniters": 1}
    look |= {"unit": unit if unit == "B" else " " + unit, "unit_scale": unit == "B"}
    with tqdm.tqdm(total=total, initial=initial, desc="  " + description, **look) as bar:

        def advance(count: int = 1, note: str = "") -> None:
            if note:
                bar.set_postfix_str(note, refresh=False)
            if bar.update(count) and lines and not terminal:
                log.info("%s", bar)

        yield advance


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Raise a signal as KeyboardInterrupt: at once, or while `deferred` in `raise_if_asked`.

    A second one leaves the program at once: whatever is written is whole or absent. A thread sees
    to that, because no handler runs while the main thread waits inside a library (a hung GPU).
    """

    number = 0  # of the signal that arrived; 0: none
    arrived = handled = 0.0
    deferred = False

    def install(self) -> None:
        """Listen to Ctrl-C, SIGTERM and a closed terminal (where nohup does not keep it off)."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self.watch, args=(reader,), name="signals", daemon=True).start()
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.handle)

    def watch(self, reader: int) -> None:
        """Leave at a second signal (not at the echo of the first that some senders give)."""
        while True:
            number = os.read(reader, 1)[0]
            # The handler may have dealt with this one, and chat forgotten it, already.
            if number in STOP_SIGNALS and time.monotonic() - self.arrived >= 0.3:
                if self.number:
                    os._exit(128 + number)
                self.number, self.arrived = number, time.monotonic()

    def handle(self, number: int, _frame: object) -> None:
        """Obey in the main thread, between two steps of Python."""
        if self.handled and time.monotonic() - self.handled >= 0.3:  # where `watch` gets no turn
            os._exit(128 + number)
        self.handled = self.handled or time.monotonic()
        if not self.number:
            self.number, self.arrived = number, time.monotonic()
        if self.deferred:
            log.warning("Stopping after this forward pass (again to leave at once)")
        else:
            self.raise_if_asked()

    def raise_if_asked(self) -> None:
        if self.number:
            raise KeyboardInterrupt

    def forget(self) -> None:
        """Take a request as dealt with, as chat does when Ctrl-C has stopped an answer."""
        self.number, self.handled = 0, 0.0


stop = StopRequest()


def is_main_process() -> bool:
    """Tell whether this process prints, downloads and saves (with several, one does)."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def once_for_all(work: "Callable[[], T]") -> "T":
    """Do something in the main process only, and give its result, or its error, to all of them."""
    if process_count() == 1:
        return work()
    accelerate.PartialState()
    try:
        outcome: list[Any] = [work() if is_main_process() else None]
    except FineTuningError as error:
        outcome = [error]
    accelerate.utils.broadcast_object_list(outcome)
    if isinstance(outcome[0], FineTuningError):
        raise outcome[0]
    return typing.cast("T", outcome[0])


# ======================================================================================
# 3. Files
# ======================================================================================
#
# Everything that must be whole or absent, whatever happens: a file appears under its name complete
# and flushed to the disk, and so does a folder, with a manifest of what is in it. The manifest also
# says what this program wrote: nothing else is ever deleted. Only this section calls fsync and
# rename, and only it puts a disk's errors into words.

MANIFEST = "manifest.json"


def existing_parent(path: Path) -> Path:
    """Return the nearest existing folder at or above `path`."""
    places = (path.absolute(), *path.absolute().parents)
    return next(p for p in places if os.path.exists(p))  # noqa: PTH110 - Path's raises


@contextlib.contextmanager
def disk_errors(place: Path, flag: str) -> Iterator[None]:
    """Put failed writes to `place`, which `flag` chooses, into words."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        said = getattr(error, "strerror", None) or first_line(error)
        if re.search("PytorchStreamWriter|inline_container|iostream", said):  # PyTorch's words
            said = "I/O error, a file was written only in part"
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        with contextlib.suppress(OSError):  # libraries say only that a write came out short
            full = full or shutil.disk_usage(existing_parent(place)).free < 1_000_000
        hint = f"Check the disk and its permissions, or choose another place with {flag}."
        if full:
            said = "the disk (or your quota) is full"
            hint = f"Free some space, or take another disk with {flag}; then run the same command"
            hint += " again. What was finished before is untouched."
        elif not isinstance(error, OSError) and not re.search("os error|I/O error", said):
            raise
        raise FineTuningError(f"{place} cannot be written: {said}.", hint) from error


def check_space(place: Path, need: float, flag: str) -> None:
    """Refuse to begin what the disk cannot hold; `need` is in bytes."""
    free = shutil.disk_usage(existing_parent(place)).free
    if free < need:
        what = f"{place} needs {human_bytes(need)}, and {human_bytes(free)} are free there."
        raise FineTuningError(what, f"Free some space, or take another disk with {flag}.")


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path) -> "dict[str, Any]":
    """Return the object in a JSON file; raise FineTuningError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError("it does not hold a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        hint = "The file is damaged; restore it from a copy, or make it again."
        raise FineTuningError(f"{path} cannot be read: {first_line(error)}", hint) from error
    return content


def write_json(path: Path, content: object) -> None:
    """Write JSON that a person can read; NaN is refused, since most readers refuse it."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    # A lone surrogate, which UTF-8 cannot hold, is written as JSON's own escape.
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def flush(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    if path.is_file():
        path.chmod(0o644)  # safetensors writes 0600
    handle = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":  # fsync stops at the drive's own cache there
            with contextlib.suppress(OSError):
                fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
                return
        os.fsync(handle)
    finally:
        os.close(handle)


def publish_files(staged: Path, folder: Path, names: Sequence[str]) -> None:
    """Give files that were written in `staged` their places in `folder`, in this order."""
    for name in names:
        flush(staged / name)
    for name in names:
        (staged / name).replace(folder / name)
    flush(folder)


@contextlib.contextmanager
def staging_folder(final: Path, flag: str, mark: str = "") -> Iterator[Path]:
    """Give a hidden folder beside `final` to fill; whatever happens, it is gone afterwards."""
    staged = final.with_name(f".staging-{mark}{final.name}")
    with disk_errors(final, flag):
        try:
            shutil.rmtree(staged, ignore_errors=True)  # left by a run that was killed
            staged.mkdir(parents=True)
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def write_whole(path: Path, content: object, flag: str) -> None:
    """Write JSON so that the file is always the old one or the new one, whoever else writes it."""
    with staging_folder(path, flag, f"{os.getpid()}-") as staged:
        write_json(staged / path.name, content)
        publish_files(staged, path.parent, [path.name])


def damage(folder: Path) -> "str | None":
    """Return what is wrong with a published folder, going by its manifest; None if it is whole."""
    if not (folder / MANIFEST).is_file():
        return "it has no manifest: writing it was cut short, or another program wrote it"
    try:
        for name, facts in read_json(folder / MANIFEST).items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256_of(folder / name) != facts["sha256"]:
                return f"{name} does not have the bytes that were written"
    except (FineTuningError, OSError, KeyError, TypeError) as error:
        return f"it cannot be read: {first_line(error)}"
    return None


def refuse_foreign(folder: Path) -> None:
    """Raise FineTuningError where a folder holds what its manifest does not name."""
    ours = {MANIFEST}
    with contextlib.suppress(FineTuningError):
        ours |= read_json(folder / MANIFEST).keys()
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    if foreign:
        what = f"{folder} holds what this program did not write ({', '.join(foreign[:5])})"
        hint = "Move that elsewhere, or choose another folder."
        raise FineTuningError(what + ", so it is not deleted.", hint)


def remove_published(folder: Path) -> None:
    """Delete a published folder: at once, and never with anything foreign."""
    refuse_foreign(folder)
    doomed = folder.with_name(f".staging-removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def publish_folder(staged: Path, final: Path) -> None:
    """Make a folder that was written elsewhere visible as `final`, whole or not at all."""
    files = sorted(staged.iterdir())
    facts = {f.name: {"size": f.stat().st_size, "sha256": sha256_of(f)} for f in files}
    write_json(staged / MANIFEST, facts)
    for path in (*files, staged / MANIFEST, staged):
        flush(path)
    if final.exists():
        remove_published(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    staged.rename(final)
    flush(final.parent)


def lock(path: Path, taken: FineTuningError, *, wait: bool = False) -> "filelock.BaseFileLock":
    """Lock a file until the process ends; raise `taken` if another has it, or say so and wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(path, timeout=0)
    try:
        held.acquire()
    except filelock.Timeout as error:
        if not wait:
            raise taken from error
        log.info("  %s", taken)
        held.acquire(timeout=-1)
    except NotImplementedError:  # some network shares
        log.warning("  %s cannot be locked: start no second run on it", path.parent)
    return held


# ======================================================================================
# 4. Records
# ======================================================================================
#
# What the stages hand on: small frozen records, each made once, with everything in it that a later
# stage needs. Nobody measures the model, counts tokens or opens a file a second time.

METRICS_FILE = "training_metrics.json"  # written last: its presence says that the run is finished
CONFIG_FILE = "training_config.json"  # its "provenance" is this program's own record
QUALITY_FILE = "quality_report.json"
PROGRESS_FILE = "progress.json"  # in a checkpoint: the run's own record
REPORT_FILE = "report.html"
ADAPTER_FILE = "adapter_model.safetensors"
RUN_FILES = (
    "adapter_config.json", ADAPTER_FILE, "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "tokenizer.model", "chat_template.jinja", CONFIG_FILE, METRICS_FILE,
    QUALITY_FILE, "README.md", REPORT_FILE, "curves.png",
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    name: str
    outcome: Literal["ok", "warning", "failed"]
    detail: str
    hint: str = ""


@dataclass(frozen=True)
class BaseModel:
    """Describe a base model whose folder was found whole and whose tokenizer fits it."""

    name: str  # as an adapter names it: the Hugging Face id, or the folder's full path
    folder: Path
    digest: str  # of config.json and every byte of the weights
    config: Any  # config.json as transformers reads it
    tokenizer: "Tokenizer"
    parameters: int
    file_bytes: int
    vocabulary: int  # rows of the embedding
    positions: int  # longest sequence: positions, or the window that attention looks back
    linear: "dict[str, tuple[tuple[int, int], ...]]"  # by last name: (in, out) of each such layer

    def adapter_parameters(self, rank: int, names: Iterable[str]) -> int:
        """Return how many parameters a LoRA of this rank on these layers has."""
        return sum(rank * sum(shape) for name in names for shape in self.linear.get(name, ()))


@dataclass(frozen=True)
class PreflightReport:
    checks: tuple[Check, ...]
    device: str
    dtype: str  # of the frozen base: "float32"
    base: "BaseModel | None" = None  # None where its check failed


@dataclass(frozen=True)
class DatasetFile:
    path: Path  # verified data on disk; of several files, the first one's
    size: int
    etag: "str | None"
    sha256: str  # of several files, the hash of their hashes
    source: str
    parts: "tuple[DatasetFile, ...]" = ()  # several files

    @property
    def files(self) -> "tuple[DatasetFile, ...]":
        return self.parts or (self,)


@dataclass(frozen=True)
class QualityReport:  # what quality_report.json says
    total_examples: int
    valid_examples: int
    quality_score: float
    empty_instructions: int
    empty_outputs: int
    avg_instruction_length: float
    avg_output_length: float
    checks: "dict[str, int]"
    check_details: "dict[str, dict[str, Any]]"  # by check: count, action, meaning, rows, examples
    answers: int  # that carry loss
    masked_answers: int  # that do not: marked so in the file, or by assistant_turns
    supervised_tokens: int
    unsupervised_tokens: int
    lost_answer_tokens: int  # by rows over max_seq_length
    longest_example: int  # tokens, before any is dropped or truncated
    dropped_examples: int
    truncated_examples: int
    rejected: "tuple[dict[str, Any], ...]"  # unusable: row (from 0), line, reason, detail
    dropped: "tuple[dict[str, Any], ...]"  # usable, but left out
    truncated: "tuple[dict[str, Any], ...]"


class Example(TypedDict):
    input_ids: "list[int]"
    spans: "list[list[int]]"  # the tokens of each [start, end) carry loss


@dataclass(frozen=True)
class PreparedData:  # examples: Example's columns, file, row (from 0), and those of prepare_dataset
    train: "datasets.Dataset"
    eval: "datasets.Dataset"
    tokenizer: "Tokenizer"
    base: BaseModel
    quality: QualityReport
    source: DatasetFile
    max_seq_length: int  # the setting, or the model's positions where these are fewer
    shown: "tuple[str, ...]"  # examples as they are trained, supervised spans between ⟦ and ⟧


@dataclass(frozen=True)
class TrainResult:
    model: "PeftModel"  # with the best adapter
    tokenizer: "Tokenizer"
    metrics: "dict[str, Any]"
    history: "tuple[dict[str, float], ...]"  # a record per step and per evaluation
    budget: int  # tokens that a forward pass without gradients may hold
    identity: "dict[str, Any]"  # what makes two runs the same run


class RunArtifacts(NamedTuple):
    adapter_dir: Path
    metrics: "dict[str, Any]"


# ======================================================================================
# 5. Model and tokenizer
# ======================================================================================
#
# In: a model's name or folder. Out: a BaseModel whose files are whole and fit each other, its
# tokenizer, texts as tokens exactly as they will be served, the loaded model, and answers. The hub
# is asked only for what is not in the cache; everything is then read from one folder, which is one
# revision. Weights are safetensors, never pickles, and no code from outside is run.

GET_MODEL_AGAIN = "Its files must belong to one model and be whole; if in doubt, fetch them again."
# Tested from training to export, by model_type. Other families compute attention in ways that the
# engine does not know, or route tokens through experts.
FAMILIES = {
    "llama": "Llama 2 and 3 (TinyLlama, SmolLM2)", "mistral": "Mistral", "qwen2": "Qwen2",
    "qwen3": "Qwen3", "phi3": "Phi-3", "smollm3": "SmolLM3",
}  # fmt: skip


def weight_files(folder: Path) -> "list[str]":
    """Name the files of a base model's weights, as transformers chooses among them."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return ["model.safetensors"]
    weights = read_json(index).get("weight_map")
    return sorted(set(map(str, weights.values()))) if isinstance(weights, dict) else []


def model_problem(folder: Path) -> "str | None":
    """Return what keeps a folder from being a whole base model, going by its files' first bytes."""
    weights = weight_files(folder)
    tokenizers = [n for n in ("tokenizer.json", "tokenizer.model") if (folder / n).is_file()]
    for name in ("config.json", *(tokenizers or ["tokenizer.json"])[:1], *weights):
        # transformers would unpickle whatever an index names under another ending.
        if name in weights and not re.fullmatch(r"[^/\\]+\.safetensors", name):
            return f"names {name} as its weights; only safetensors are ever read, never pickles"
        if not (folder / name).is_file():
            return f"lacks {name}"
        with (folder / name).open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                return f"holds a Git LFS pointer instead of {name}: run git lfs pull there"
    return None if weights else "has a model.safetensors.index.json that names no files"


def find_base_folder(model_name: str) -> Path:
    """Return the folder of a base model, fetched from the hub where no whole one is cached."""
    folder = Path(model_name)
    if folder.is_dir():
        return folder.resolve()
    client = huggingface_hub.errors.HfHubHTTPError.__bases__[0].__module__.split(".")[0]
    http = sys.modules[client]  # requests, httpx(2)
    # No network, a refusal, odd proxies and addresses, pages that only look like an answer.
    trouble = (*FOREIGN_ERRORS, http.HTTPError, getattr(http, "InvalidURL", ValueError))
    name = "models--" + model_name.replace("/", "--")
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE) / name
    latest = [path.read_text().strip() for path in cache.glob("refs/main")]
    whole = [path for path in cache.glob("snapshots/*") if not model_problem(path)]
    whole.sort(key=lambda path: (path.name not in latest, -path.stat().st_mtime))
    # Another program may have fetched less; a chat template is easily missed.
    for path in whole:
        if (path / "tokenizer_config.json").is_file():
            return path
    log.info("  fetching %s from the Hugging Face hub (once)", model_name)
    files: Any = {"allow_patterns": ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]}
    files["ignore_patterns"] = ["*/*", "consolidated*"]  # the same weights in other formats
    try:
        return Path(huggingface_hub.snapshot_download(model_name, **files))
    except trouble as error:
        said = shorten(str(error) or type(error).__name__, 300)
        if whole:
            log.warning("  the hub cannot be asked (%s): using %s", said, whole[0])
            return whole[0]
        what = f"The base model {model_name} is neither a folder here nor in the local cache, and "
        hint = "Check the spelling, the network and its variables (HF_ENDPOINT, HTTPS_PROXY; "
        hint += "HF_TOKEN for gated models), then start again: the fetch goes on. Or name a folder."
        raise FineTuningError(f"{what}the hub does not give it: {said}", hint) from error


def load_model(folder: Path, **options: Any) -> Any:
    """Let transformers load a folder's model: no pickles, no code of its own, nothing fetched."""
    safe = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
    errors = (huggingface_hub.errors.StrictDataclassError, safetensors.SafetensorError)
    with library_errors(f"The base model in {folder} cannot be loaded", GET_MODEL_AGAIN, *errors):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **safe, **options)


def read_empty_model(folder: Path) -> "PreTrainedModel":
    """Return the model without its numbers, after comparing its tensors with those of the files."""
    how: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = load_model(folder, device_map="meta", dtype=torch.float32, **how)
    # Old checkpoints keep what is computed today.
    surplus = [k for k in found["unexpected_keys"] if ".layers." in k and "inv_freq" not in k]
    rounded, whole = list[str](), ("F64", "F32", "F16", "BF16")
    for path in (folder / name for name in weight_files(folder)):
        with safetensors.safe_open(path, framework="pt") as file:
            names = [n for n in file.keys() if n.endswith(".weight")]  # noqa: SIM118
            rounded += [n for n in names if file.get_slice(n).get_dtype() not in whole]
    for names, what in (
        (found["missing_keys"], "its files lack {}, and random numbers would take its place"),
        ([k[0] for k in found["mismatched_keys"]], "{} has another shape than config.json says"),
        (surplus, "its files hold {}, which config.json does not"),
        (rounded, "{} are whole numbers or of 8 bits, which nothing here reads"),
    ):
        if names:
            told = what.format(shorten(", ".join(sorted(names)), 200))
            problem = f"The base model in {folder} is not whole: {told}."
            raise FineTuningError(problem, GET_MODEL_AGAIN)
    return typing.cast("PreTrainedModel", model)


# TinyLlama-Chat's (Zephyr's) format, for tokenizers that bring no template of their own.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def load_tokenizer(folder: Path) -> "Tokenizer":
    """Load a folder's tokenizer as llama.cpp will see it."""
    hint = "Choose a base with a whole tokenizer.json."
    with library_errors(f"The tokenizer in {folder} cannot be used", hint, Exception):
        # transformers 5's AutoTokenizer rebuilds Llama's, and then splits the text after </s> anew.
        if (folder / "tokenizer.json").is_file():
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
            raise ValueError("it exists in Python only, not as a tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise ValueError("it has no eos_token, so no model could learn where an answer ends")
        if isinstance(tokenizer.chat_template, dict):  # several, by name
            if "default" not in tokenizer.chat_template:
                names = ", ".join(tokenizer.chat_template)
                raise ValueError(f"none of its chat templates ({names}) is the default")
            tokenizer.chat_template = tokenizer.chat_template["default"]
    tokenizer.backend_tokenizer.no_truncation()  # some tokenizer.json cut or pad on their own
    tokenizer.backend_tokenizer.no_padding()
    if tokenizer.chat_template is None:
        log.info("  %s has no chat template: TinyLlama's is used", folder)
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@functools.cache
def open_base_model(model_name: str) -> BaseModel:
    """Find a base model, prove its files whole and measure it (once)."""
    with library_errors(f"The base model {model_name} cannot be read", GET_MODEL_AGAIN):
        folder = find_base_folder(model_name)
        problem = model_problem(folder)
        settings = {} if problem else read_json(folder / "config.json")
        family, quantized = settings.get("model_type"), settings.get("quantization_config")
        if not problem and family not in FAMILIES:
            problem = f"holds a {family} model; this program trains {', '.join(FAMILIES.values())}"
        elif quantized:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            problem = f"holds a quantized model ({method}); choose the original it was made from"
        if problem:
            hint = "Mend it, or choose another base model with --model_name."
            raise FineTuningError(f"The base model folder {folder} {problem}.", hint)
        model, tokenizer = read_empty_model(folder), load_tokenizer(folder)
        rows = len(typing.cast("Any", model.get_input_embeddings()).weight)
        ids = max(tokenizer.get_vocab().values()) + 1
        if ids > rows:
            what = f"The tokenizer in {folder} has {ids} tokens, the model only {rows} embeddings."
            raise FineTuningError(what, "Restore the model's own tokenizer files.")
        linear: dict[str, tuple[tuple[int, int], ...]] = defaultdict(tuple)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
                linear[name.rpartition(".")[2]] += ((module.in_features, module.out_features),)
        weights = [folder / name for name in weight_files(folder)]
        # With the weights, all that decides how a text is read and how it is answered.
        names = "config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template"
        read = re.compile(rf"({names})\.(json|model|jinja)")
        whole = hashlib.sha256()
        for path in [*sorted(p for p in folder.iterdir() if read.fullmatch(p.name)), *weights]:
            # A large file of the hub's cache is a link to a blob named after its SHA-256.
            blob = path.resolve().name if path.is_symlink() else ""
            known = blob if re.fullmatch("[0-9a-f]{64}", blob) else sha256_of(path)
            whole.update(f"{path.name} {known}\n".encode())
        # Beyond a sliding window, or beyond the positions that rotary factors change at (Phi-3
        # 128k), an example alone and among others would differ.
        limits = ("max_position_embeddings", "sliding_window", "original_max_position_embeddings")
        return BaseModel(
            name=str(folder) if Path(model_name).is_dir() else model_name, folder=folder,
            digest=whole.hexdigest(), config=model.config, tokenizer=tokenizer, vocabulary=rows,
            parameters=model.num_parameters(), linear=dict(linear),
            file_bytes=sum(path.stat().st_size for path in weights),
            positions=min(getattr(model.config, name, None) or 2**31 for name in limits),
        )  # fmt: skip


Messages = Sequence[Mapping[str, str]]  # {"role": ..., "content": ...}


def render_chat(tokenizer: "Tokenizer", messages: Messages, *, answer_next: bool) -> str:
    """Render messages with the chat template: the text that is served."""
    how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": answer_next}
    hint = "Some templates take no system message, or only alternating turns."
    error = jinja2.exceptions.TemplateError
    with library_errors("The model's chat template refuses these messages", hint, error):
        return str(tokenizer.apply_chat_template([dict(m) for m in messages], **how))


@functools.cache
def writes_bos(tokenizer: "Tokenizer") -> bool:
    """Tell whether a tokenizer puts a BOS in front of every text."""
    return tokenizer.backend_tokenizer.encode("").ids[:1] == [tokenizer.bos_token_id]


def tokenize(tokenizer: "Tokenizer", texts: "Sequence[str]") -> "list[list[int]]":
    """Tokenize rendered texts as llama.cpp does: special tokens are read, and one BOS is enough."""
    bos, bos_id, starts = tokenizer.bos_token, tokenizer.bos_token_id, writes_bos(tokenizer)
    # What else a tokenizer puts around a text stays out: behind a prompt, an end token would end
    # the answer before it begins.
    bare = [text.removeprefix(str(bos or "")) for text in texts]
    found = tokenizer.backend_tokenizer.encode_batch_fast(bare, add_special_tokens=False)
    return [
        [bos_id] * (starts or text != rest) + encoding.ids
        for text, rest, encoding in zip(texts, bare, found, strict=True)
    ]


def tokenize_prompt(tokenizer: "Tokenizer", messages: Messages) -> "list[int]":
    """Return the tokens of a conversation up to where the answer starts, as in training."""
    return tokenize(tokenizer, [render_chat(tokenizer, messages, answer_next=True)])[0]


def decode(tokenizer: "Tokenizer", ids: "Sequence[int]") -> str:
    """Return the text of generated tokens exactly, a leading space included."""
    special = set(tokenizer.all_special_ids)
    # Llama tokenizers strip a space from the start of what they decode, so a token stands before.
    visible = [tokenizer.eos_token_id, *(i for i in ids if i not in special)]
    text = tokenizer.decode(visible, clean_up_tokenization_spaces=False)
    return str(text).removeprefix(str(tokenizer.eos_token))


def render_answer(
    tokenizer: "Tokenizer", messages: Messages, written: str, *, is_last: bool
) -> "tuple[str, str]":
    """Render what stands in front of the last message, an answer, and that with its end token.

    It must begin with what is `written`: a template must write a turn once and for all.
    """
    eos, answer = str(tokenizer.eos_token), messages[-1]["content"]
    front = render_chat(tokenizer, messages[:-1], answer_next=True)
    whole = render_chat(tokenizer, messages, answer_next=False)
    if not whole.startswith(front) or not front.startswith(written):
        hint = " (--assistant_turns last trains the last answer)" * bool(written or not is_last)
        raise FineTuningError("the chat template writes a turn differently once more follow" + hint)
    start = whole.find(answer, len(front))
    if start < 0:
        raise FineTuningError("the chat template changes the answer (it may trim it)")
    end = whole.find(eos, start + len(answer))
    if end >= 0:
        return front, whole[: end + len(eos)]
    if not is_last:
        raise FineTuningError("the chat template ends earlier answers without end token")
    # Behind the last answer, the end token is added where the template has none; white space at
    # the answer's end is the answer's.
    return front, whole[: max(start + len(answer), len(whole.rstrip()))] + eos


def tokenize_answers(
    tokenizer: "Tokenizer", messages: Messages, answers: Sequence[int]
) -> "tuple[Example, str]":
    """Return the tokens of a conversation up to the last of the answers, which carry loss.

    Proved are, or FineTuningError is raised: the tokens in front of an answer are those that chat
    sends; each span ends with the end token and has no other; there is one BOS, at the start, where
    the tokenizer writes one. The text returned is of an answer that would join what precedes it.
    """
    ids, spans, written, before, merged = list[int](), [], "", list[int](), ""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    for place in answers:
        last = place == answers[-1]
        texts = render_answer(tokenizer, messages[: place + 1], written, is_last=last)
        front, whole = tokenize(tokenizer, texts)
        if front[: len(before)] != before:
            raise FineTuningError("the tokenizer joins an answer with the turn that follows")
        answer, written = whole[len(front) :], texts[1]
        if whole[: len(front)] != front:  # the answer's first token would join the front's last
            merged = written.removeprefix(texts[0])
            # A tokenizer that puts a space in front of every text puts none behind a line break.
            ways = (encode(anchor + merged)[len(encode(anchor)) :] for anchor in ("", "\n"))
            told = tokenizer.decode(whole)
            answer = next((way for way in ways if tokenizer.decode(front + way) == told), [])
        ids += front[len(before) :]
        spans.append([len(ids), len(ids) + len(answer)])
        ids += answer
        if not front or answer.count(eos) != 1 or answer[-1] != eos:
            raise FineTuningError("an answer does not end with its one end token")
        before = whole
    if writes_bos(tokenizer) and (ids[0] != bos or bos in ids[1 : len(ids) if bos != eos else 2]):
        raise FineTuningError("the conversation does not begin with its one BOS token")
    return {"input_ids": ids, "spans": spans}, merged


def show_example(tokenizer: "Tokenizer", example: Example) -> str:
    """Return an example as it is trained, read back from its tokens, spans between ⟦ and ⟧."""
    ids, shown, special = example["input_ids"], "", set(tokenizer.added_tokens_decoder)
    cuts = {0: "", len(ids): ""}
    cuts |= {cut: "" for n, i in enumerate(ids) if i in special for cut in (n, n + 1)}
    cuts |= {cut: mark for span in example["spans"] for cut, mark in zip(span, "⟦⟧", strict=True)}
    for start, end in itertools.pairwise(sorted(cuts)):
        part = ids[start:end]
        # Tokenizers that put a space in front of every text do so behind special tokens, too, and
        # take it off again only at the start of what they decode.
        first = not special.isdisjoint(ids[max(0, start - 1) : start + 1]) or not start
        text = str(tokenizer.decode(part)) if first else decode(tokenizer, part)
        shown += cuts[start] + (text if len(text) < 600 else f"{text[:300]} […] {text[-300:]}")
    return shown + cuts[len(ids)]


def load_base_model(base: BaseModel, device: str, dtype: str) -> "PreTrainedModel":
    """Load the frozen base model. Its own generation_config.json has no say in any answer."""
    how = {"dtype": getattr(torch, dtype), "device_map": None if device == "cpu" else {"": device}}
    model = load_model(base.folder, attn_implementation="sdpa", **how)
    model.generation_config = transformers.GenerationConfig()
    return typing.cast("PreTrainedModel", model.eval())


def empty_device_cache(device: str) -> None:
    """Give back what PyTorch keeps of the device's memory for later tensors."""
    if not device.startswith("cpu"):
        getattr(torch, device.partition(":")[0]).empty_cache()


class Answer(NamedTuple):
    """Hold one answer: text, tokens (without the end token), and whether it ended by itself."""

    text: str
    token_ids: tuple[int, ...]
    stopped: bool


@dataclass
class AnswerStream:
    """Hand on an answer's text as its tokens come (TextStreamer eats a space of indented lines)."""

    tokenizer: "Tokenizer"
    tell: "Callable[[str], None]"
    ids: "list[int]" = field(default_factory=list)
    told: str = ""

    def put(self, value: "torch.Tensor") -> None:
        """Take the prompt [1, tokens], then each new token [1]."""
        self.ids += value.tolist() if value.dim() == 1 else []
        if not decode(self.tokenizer, self.ids).endswith("\ufffd"):  # a character of several tokens
            self.end()

    def end(self) -> None:
        before, self.told = self.told, decode(self.tokenizer, self.ids)
        self.tell(self.told[len(before) :])


def generate(
    model: "PreTrainedModel | PeftModel", tokenizer: "Tokenizer",
    prompts: "list[list[int]]", *, max_new_tokens: int,
    on_text: "Callable[[str], None] | None" = None, temperature: float = 0, **sampling: float,
) -> "list[Answer]":  # fmt: skip
    """Answer prompts (tokens that end where the answer starts) in one batch, greedily by default.

    An answer ends at the tokenizer's end token or after `max_new_tokens`. `on_text` gets the text
    of a single prompt's answer as it comes. `sampling`: top_p, top_k and repetition_penalty.
    """
    settings: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
    settings["repetition_penalty"] = float(sampling.pop("repetition_penalty", 1))
    settings |= {"temperature": float(temperature), **sampling} if temperature > 0 else {}
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    settings |= {"eos_token_id": end, "pad_token_id": pad}
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    output = typing.cast("Any", model).generate(
        **padded.to(next(model.parameters()).device),
        generation_config=transformers.GenerationConfig(**settings),
        streamer=AnswerStream(tokenizer, on_text) if on_text else None,
    )
    answers = []
    for ids in output[:, padded["input_ids"].shape[1] :].tolist():
        kept = ids[: ids.index(end)] if end in ids else ids
        answers.append(Answer(decode(tokenizer, kept), tuple(kept), end in ids))
    return answers


# ======================================================================================
# 6. Engine
# ======================================================================================
#
# In: examples, and a base model with an adapter. Out: losses and gradients equal to those of one
# padded batch of the same examples, at about half its price. A pass lays examples end to end in one
# row of tokens; beginnings that several share (the template's, a system prompt) stand there once.
# Only attention gathers the tokens into a padded row per example; only positions whose next token
# carries loss reach the LM head. Dropout depends on the pass's seed and the layer alone, so that
# activations that are computed again draw the same masks. Some of Apple's kernels are silently
# wrong where a slice is written to, on inputs of more than two dimensions, and in long sums: none
# of these occurs here. Metal compiles every operation anew for every shape, so that passes are
# filled up to few shapes; and it may drop work without a word, so that layers are counted there.

ATTENTION = "packed"  # the name under which transformers finds packed_attention
LONGEST_MATH_ROW = 256  # beyond it, attention scores cost more memory than they save time
HEAD_CHUNK = 512  # supervised positions per slice of logits: bounds the head's memory
LONGEST_SUM = 16_384  # terms that MPS adds up in one product; from 32,767 on it may go wrong
# On MPS, sizes of a pass are multiples of these. What fills them up weighs nothing.
BUCKETS = {"width": 64, "tokens": 160, "supervised": 128}
# Relative differences of losses and logits that rounding explains, between kernels for one thing.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}


def tolerance_of(device: str, dtype: str) -> float:
    """Return TOLERANCE, or more where a device rounds products of float32 more coarsely."""
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    noise = ((a.to(device) @ b.to(device)).cpu() - (a.double() @ b.double())).norm() / 256**1.5
    return max(TOLERANCE[dtype], min(10 * noise.item(), TOLERANCE["bfloat16"]))


class Pass(NamedTuple):
    """Hold one forward pass over several examples, each token of theirs once."""

    rows: int  # examples
    width: int  # at least that of the longest
    supervised: int  # tokens that carry loss
    seed: int  # of the dropout
    weights: "Tensor | None"  # [supervised or more] of 1 and 0; None where all carry loss
    input_ids: "Tensor"  # [1, tokens]
    position_ids: "Tensor"  # [1, tokens]
    gather: "Tensor"  # [rows * width]: which token stands in each cell of the padded rows
    scatter: "Tensor"  # [tokens]: the cell in which each token finds its result
    shared: "Tensor"  # cells of tokens that have such a cell in an earlier row
    keep: "Tensor"  # [supervised or more]: the positions whose next token carries loss
    targets: "Tensor"  # likewise: those next tokens
    used: "Tensor"  # the same positions without repeats; empty where sizes are filled up


def plan_passes(lengths: Sequence[int], budget: int) -> "list[list[int]]":
    """Share examples out, longest first, to passes of at most `budget` tokens (or one example)."""
    passes, room = list[list[int]](), list[int]()
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        number = next((n for n, free in enumerate(room) if lengths[index] <= free), len(room))
        if number == len(room):
            passes.append([])
            room.append(budget)
        passes[number].append(index)
        room[number] -= lengths[index]
    return passes


def labels_of(example: Example) -> "list[int]":
    """Return the tokens that carry loss in their places, and -100 in all others."""
    labels = [-100] * len(example["input_ids"])
    for start, end in example["spans"]:
        labels[start:end] = example["input_ids"][start:end]
    return labels


def lay_out(
    examples: Sequence[Example], device: str, seed: int = 0, *, fill: "bool | None" = None
) -> Pass:
    """Lay examples end to end; tokens behind the same beginning stand there once, as in a trie.

    `fill` (as MPS wants it) rounds all sizes up to BUCKETS.
    """
    # Nothing follows the last supervised token, so that it is never an input.
    inputs = [e["input_ids"][: e["spans"][-1][1] - 1] for e in examples]
    fill = device.startswith("mps") if fill is None else fill
    step = BUCKETS if fill else dict.fromkeys(BUCKETS, 1)
    width = max(map(len, inputs)) + fill  # a row that is filled up has a cell behind its tokens
    width += -width % step["width"]
    rows = len(examples) + fill * (-len(examples) % max(1, 512 // width))  # long ones cost too much
    places: dict[tuple[int, int], int] = {}  # (place of the token before, token) -> place
    parts = [list[int]() for _ in range(8)]
    ids, positions, gather, scatter, shared, keep, targets, used = parts
    for row, (example, tokens) in enumerate(zip(examples, inputs, strict=True)):
        place, cells = -1, list[int]()
        for position, token in enumerate(tokens):
            place = places.setdefault((place, token), len(ids))
            if place == len(ids):
                ids.append(token)
                positions.append(position)
                scatter.append(row * width + position)
            else:
                shared.append(row * width + position)
            cells.append(place)
        gather += cells + [0] * (width - len(cells))
        for start, end in example["spans"]:
            keep += cells[start - 1 : end - 1]
            targets += example["input_ids"][start:end]
    used += sorted(set(keep)) if not fill else ()
    supervised, spare = len(keep), width - 1  # nothing flows back from the first row's last cell
    gather += [0] * (rows * width - len(gather))
    for part, size, filling in (
        (ids, "tokens", 0), (positions, "tokens", 0), (scatter, "tokens", spare),
        (shared, "tokens", spare), (keep, "supervised", 0), (targets, "supervised", 0),
    ):  # fmt: skip
        part += [filling] * (-len(part) % step[size])
    joined = torch.tensor(list(itertools.chain(*parts)), device=device)  # one copy to the device
    first, second, *rest = joined.split([len(part) for part in parts])
    weights = torch.arange(len(keep), device=device) < supervised if fill else None
    return Pass(rows, width, supervised, seed, weights, first[None], second[None], *rest)


def product(a: "Tensor", b: "Tensor") -> "Tensor":
    """Return a @ b of two matrices; on MPS, long sums are added up in slices."""
    step = LONGEST_SUM if a.device.type == "mps" else max(a.shape[1], 1)
    total = a[:, :step] @ b[:step]
    for start in range(step, a.shape[1], step):
        total += a[:, start : start + step] @ b[start : start + step]
    return total


@functools.cache
def engine_functions() -> "tuple[Callable[..., Tensor], Callable[..., Tensor]]":
    """Build Select and LoraLinear (torch is imported only where it is needed)."""

    class Select(torch.autograd.Function):
        """source.index_select(0, index): each row first at `back`, and once more at `again`."""

        @staticmethod
        def forward(ctx, source, index, back=None, again=None):
            ctx.shape, ctx.places = source.shape, (index, back, again)
            return source.index_select(0, index)

        @staticmethod
        def backward(ctx, upstream):
            index, back, again = ctx.places
            if back is None:
                gradient = upstream.new_zeros(ctx.shape).index_copy_(0, index, upstream)
            else:
                gradient = upstream.index_select(0, back)
                gradient.index_add_(0, index[again], upstream.index_select(0, again))
            return gradient, None, None, None

    class LoraLinear(torch.autograd.Function):
        """y = x W' + b + scale * (mask * x) A' B', W and b frozen; saves no masked copy of x."""

        @staticmethod
        def forward(ctx, x, weight, bias, lora_a, lora_b, scale, mask):
            a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
            rank = (x if mask is None else x * mask) @ a.t()
            ctx.save_for_backward(x, weight, a, b, rank, mask)
            ctx.scale = scale
            return torch.nn.functional.linear(x, weight, bias).addmm_(rank, b.t(), alpha=scale)

        @staticmethod
        def backward(ctx, upstream):
            x, weight, a, b, rank, mask = ctx.saved_tensors
            through_b = product(upstream, b).mul_(ctx.scale)
            grad_a = product(through_b.t(), x if mask is None else x * mask)
            grad_b = product(upstream.t(), rank).mul_(ctx.scale)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x, through_a = product(upstream, weight), product(through_b, a)
                grad_x += through_a if mask is None else through_a.mul_(mask)
            return grad_x, None, None, grad_a.float(), grad_b.float(), None, None

    return Select.apply, LoraLinear.apply


def packed_attention(
    _module: object, *given: "Tensor", scaling: float, layout: Pass, **_others: object
) -> "tuple[Tensor, None]":
    """Attend causally within each example of a pass (an attention function of transformers).

    `given` are queries [1, heads, tokens, head_dim], keys, values (perhaps of fewer heads) and no
    mask: padding stands behind each row's tokens, where the causal mask hides it.
    """
    select, (rows, width) = engine_functions()[0], (layout.rows, layout.width)

    def to_rows(packed: "Tensor") -> "Tensor":
        """Return [rows, heads, width, head_dim]."""
        flat = packed[0].transpose(0, 1).flatten(1)  # [tokens, heads * head_dim]: rows of memory
        cells = select(flat, layout.gather, layout.scatter, layout.shared)
        return cells.view(rows, width, *packed.shape[1::2]).transpose(1, 2)

    q, k, v = map(to_rows, given[:3])
    heads, size = q.shape[1], q.shape[3]
    groups, on_cpu = heads // k.shape[1], q.device.type == "cpu"
    if on_cpu and width <= LONGEST_MATH_ROW:
        # On CPUs, short rows go faster as plain matrix products than through the fused kernel,
        # whose backward is slow in bf16. One key head serves its whole group of query heads.
        queries = q.reshape(-1, groups * width, size)
        keys, values = (x.reshape(-1, width, size) for x in (k, v))
        causal = torch.full((width, width), float("-inf"), dtype=q.dtype).triu(1).repeat(groups, 1)
        scores = torch.baddbmm(causal[None], queries, keys.transpose(1, 2), alpha=scaling)
        mixed = torch.bmm(scores.softmax(-1), values).view(q.shape)
    else:
        if groups > 1:  # not every kernel takes groups
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        attend = torch.nn.functional.scaled_dot_product_attention
        mixed = attend(q, k, v, is_causal=True, scale=scaling)
    cells = mixed.transpose(1, 2).reshape(rows * width, heads * size)
    return select(cells, layout.scatter).view(1, -1, heads, size), None


def head_loss(
    hidden: "Tensor", head: "torch.nn.Linear", targets: "Tensor", weights: "Tensor | None" = None
) -> "Tensor":
    """Return the sum of cross-entropies of a frozen LM head, a slice of positions at a time.

    The gradient of its input is known as soon as the logits are: probabilities minus targets, times
    the weight. Nothing of vocabulary size outlives a slice.
    """
    slices = math.ceil(len(targets) / HEAD_CHUNK)  # even ones: small ones are slow
    total, gradients = torch.zeros((), device=hidden.device), []
    weighed = [None] * slices if weights is None else weights[:, None].chunk(slices)
    chunks = zip(hidden.chunk(slices), targets[:, None].chunk(slices), weighed, strict=False)
    with torch.no_grad():
        for part, wanted, weight in chunks:
            logits = torch.nn.functional.linear(part, head.weight, head.bias).float()
            normaliser = logits.logsumexp(-1, keepdim=True)
            losses = normaliser - logits.gather(1, wanted)
            total += (losses if weight is None else losses * weight).sum()
            if hidden.requires_grad:
                logits.sub_(normaliser).exp_()  # now the probabilities
                logits.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=logits.dtype))
                logits = logits if weight is None else logits.mul_(weight)
                gradients.append(product(logits.to(head.weight.dtype), head.weight))
    if not gradients:
        return total
    known = (hidden * torch.cat(gradients)).sum(dtype=torch.float32)  # it has just this gradient
    return total + (known - known.detach())


def dropout_mask(shape: "torch.Size", share: float, device: Any, seed: int) -> "Tensor":
    """Draw a mask of ones with a `share` of zeros (on the CPU to 1 part in 65,536) by the seed."""
    source = torch.Generator(device).manual_seed(seed)
    if device.type != "cpu":
        return torch.rand(shape, generator=source, device=device) >= share
    # Each random word of 64 bits serves four elements.
    words = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64)
    halves = words.random_(-(2**63), None, generator=source).view(torch.int16)[: shape.numel()]
    return (halves >= round(share * 65536) - 32768).view(shape)


def lora_forward(
    module: "peft.tuners.lora.Linear", number: int, base: Any, x: "Tensor"
) -> "Tensor":
    """Run one adapted layer through LoraLinear; disabled or merged adapters go PEFT's own way."""
    if module.disable_adapters or module.merged:
        return type(module).forward(module, x)
    (name,) = module.active_adapters
    layer, flat, mask = module.get_base_layer(), x.flatten(0, -2), None
    share = getattr(module.lora_dropout[name], "p", 0.0) if module.training else 0.0
    if share:
        seed = (base.layout.seed * 1_000_003 + number) % 2**63
        mask = dropout_mask(flat.shape, share, x.device, seed)
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    scale = module.scaling[name] / (1 - share)
    y = engine_functions()[1](flat, layer.weight, layer.bias, a, b, scale, mask)
    return y.view(*x.shape[:-1], -1)


def flat_forward(module: "torch.nn.Linear", x: "Tensor") -> "Tensor":
    return type(module).forward(module, x.flatten(0, -2)).view(*x.shape[:-1], -1)


def last_mlp_forward(module: "torch.nn.Module", base: Any, x: "Tensor") -> "Tensor":
    """Run the last layer's MLP only where its result reaches the LM head."""
    used = base.layout.used
    if not len(used):
        return type(module).forward(module, x)
    y = type(module).forward(module, engine_functions()[0](x[0], used)[None])
    return x.new_zeros(x.shape).index_copy(1, used, y)


def base_of(model: "PeftModel") -> "PreTrainedModel":
    return typing.cast("PreTrainedModel", model.get_base_model())


def install_engine(model: "PeftModel") -> None:
    """Let attention, adapters and frozen layers run as above (outside of passes, as ever)."""
    transformers.AttentionInterface.register(ATTENTION, packed_attention)
    base: Any = base_of(model)
    base.set_attn_implementation(ATTENTION)
    base.layers_run = torch.zeros((), dtype=torch.int64, device=base.device)
    for layer in base.get_decoder().layers:
        layer.register_forward_pre_hook(lambda *_: (base.layers_run.add_(1), None)[1])
    for number, module in enumerate(model.modules()):
        # An attribute of the instance wins over the method of its class.
        if isinstance(module, peft.tuners.lora.Linear):
            vars(module)["forward"] = functools.partial(lora_forward, module, number, base)
        elif isinstance(module, torch.nn.Linear):
            vars(module)["forward"] = functools.partial(flat_forward, module)
    last = base.get_decoder().layers[-1].mlp
    vars(last)["forward"] = functools.partial(last_mlp_forward, last, base)


@contextlib.contextmanager
def engine_off(model: "PeftModel") -> Iterator[None]:
    """Let transformers and PEFT compute in their own way inside the block."""
    base_of(model).set_attn_implementation("sdpa")
    ours = [(m, vars(m).pop("forward")) for m in model.modules() if "forward" in vars(m)]
    try:
        yield
    finally:
        for module, forward in ours:
            vars(module)["forward"] = forward
        base_of(model).set_attn_implementation(ATTENTION)


def recompute_activations(model: "PeftModel") -> None:
    """Turn gradient checkpointing on; the inputs need no gradient, so it must not be reentrant."""
    base_of(model).activation_checkpointing_enable({"use_reentrant": False})


def add_adapter(model: "PreTrainedModel", base: BaseModel, seed: int, **shape: Any) -> "PeftModel":
    """Freeze the model and give it a fresh adapter in fp32 (`shape` as LoraConfig takes it)."""
    transformers.set_seed(seed)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **shape))
    adapted.peft_config["default"].base_model_name_or_path = base.name
    return adapted


def adapter_weights(model: "PeftModel") -> "dict[str, Tensor]":
    """Return a copy of the adapter's weights on the CPU, under PEFT's file names."""
    # Whether to save embedding layers, "auto" would ask the hub.
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def load_adapter_weights(model: "PeftModel", weights: "Mapping[str, Tensor] | Path") -> None:
    """Put an adapter's weights, or those of its file, into the model; they must fit it."""
    given = safetensors.torch.load_file(weights) if isinstance(weights, Path) else dict(weights)
    theirs, ours = ({n: v.shape for n, v in w.items()} for w in (given, adapter_weights(model)))
    if theirs != ours:
        hint = "Rank, target modules and base model must be those it was trained with."
        raise FineTuningError("The adapter's weights do not fit the model's names or shapes.", hint)
    peft.set_peft_model_state_dict(model, given)


def pass_loss(model: "PeftModel", layout: Pass) -> "Tensor":
    """Return the sum of the cross-entropies of a pass's supervised tokens (a scalar, fp32)."""
    base: Any = base_of(model)
    base.layout = layout
    ids, positions = layout.input_ids, layout.position_ids
    done = base.get_decoder()(input_ids=ids, position_ids=positions, layout=layout, use_cache=False)
    hidden = done.last_hidden_state[0].index_select(0, layout.keep)
    return head_loss(hidden, base.get_output_embeddings(), layout.targets, layout.weights)


def evaluation_budget(budget: int, device: str) -> int:
    """Return the tokens of a pass without gradients (CPUs gain nothing beyond two thousand)."""
    return min(4 * budget, 2048) if device == "cpu" else 4 * budget


def mean_loss(model: "PeftModel", examples: "datasets.Dataset", budget: int, device: str) -> float:
    """Return the mean cross-entropy over all supervised tokens; halve passes if memory runs out."""
    model.eval()
    total, count, passes = 0.0, 0, plan_passes(list(examples["length"]), budget)
    try:
        with torch.inference_mode(), progress_bar(len(examples), "examples", "evaluating") as told:
            for indices in passes:
                stop.raise_if_asked()
                layout = lay_out([examples[i] for i in indices], device)
                total += pass_loss(model, layout).item()
                count += layout.supervised
                told(len(indices))
        return total / count
    except (RuntimeError, MemoryError) as error:
        if len(passes) == len(examples) or not is_out_of_memory(error):
            raise
    empty_device_cache(device)
    return mean_loss(model, examples, budget // 2, device)


def plain_loss(model: Any, examples: Sequence[Example]) -> "Tensor":
    """Return the mean loss of examples as transformers computes it, in one padded batch."""
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids = pad([torch.tensor(e["input_ids"]) for e in examples]).to(model.device)
    labels = pad([torch.tensor(labels_of(e)) for e in examples], padding_value=-100).to(ids.device)
    return typing.cast("Tensor", model(input_ids=ids, labels=labels, use_cache=False).loss)


def prove_engine(model: "PeftModel", examples: "datasets.Dataset", device: str) -> None:
    """Compare the engine's losses with those of the model's and PEFT's own forward pass.

    Proven on two short rows and a long one; with random numbers, as a fresh adapter is idle.
    """
    lengths = list(examples["length"])
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    long = [i for i in order if lengths[i] > LONGEST_MATH_ROW + 1]
    base, before, noise = base_of(model), adapter_weights(model), torch.Generator().manual_seed(0)
    tolerance = tolerance_of(device, str(base.dtype).removeprefix("torch."))
    random = {n: torch.randn(v.shape, generator=noise) / 20 for n, v in before.items()}
    load_adapter_weights(model.eval(), random)
    what = "The engine does not compute this model as transformers does"
    with library_errors(what, "Choose a base model of the Llama family, such as TinyLlama."):
        for rows in ([examples[i] for i in group] for group in (order[:2], long[:1]) if group):
            layout = lay_out(rows, device)
            with torch.inference_mode():
                packed = pass_loss(model, layout).item() / layout.supervised
                with engine_off(model):
                    plain = plain_loss(model, rows).item()
            log.info("  engine proof: loss %.5f packed, %.5f plain", packed, plain)
            if not abs(packed - plain) <= tolerance * max(plain, 0.1):
                raise ValueError(f"loss {packed:.5f} against {plain:.5f} for the same examples")
    load_adapter_weights(model, before)


# --- an adapter on disk

# What an adapter may say of itself and still be plain LoRA: W becomes W + B·A·scale, no more.
PLAIN_LORA = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern",
    "alpha_pattern", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "megatron_core", "qalora_group_size", "eva_config", "runtime_config",
    "bias none", "init_lora_weights True", "init_lora_weights gaussian",
    "init_lora_weights orthogonal", "init_lora_weights eva",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterFolder:
    """Describe a plain LoRA adapter on disk whose files were found whole."""

    path: Path
    base_name: str
    settings: "dict[str, Any]"  # adapter_config.json
    provenance: "dict[str, Any]"  # this program's own record; {} where PEFT wrote the adapter
    system_prompt: "str | None"  # as trained
    weights: Path  # the file of its tensors


def weights_problem(path: Path) -> "str | None":
    """Return what keeps a file from being the adapter that was saved, all of it finite numbers."""
    written = None
    if not path.is_file():
        return f"{path.name} is missing (weights are never read from pickles)"
    with contextlib.suppress(FineTuningError):  # another program's, perhaps
        written = read_json(path.with_name(METRICS_FILE)).get("adapter_sha256")
    try:
        if written and sha256_of(path) != written:
            return f"{path.name} is not the file that training saved (SHA-256 in {METRICS_FILE})"
        for name, tensor in safetensors.torch.load_file(path).items():
            if not tensor.isfinite().all():
                return f"{path.name} holds NaN or infinite numbers ({name})"
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        return f"{path.name} is damaged: {first_line(error)}"
    return None


def open_adapter(folder: Path) -> AdapterFolder:
    """Find a plain LoRA adapter's files, whole; raise FineTuningError where they are not."""
    path, weights = folder / "adapter_config.json", folder / ADAPTER_FILE
    if not path.is_file():
        lost = f"; {weights.name} alone is not enough" * weights.is_file()
        what = f"There is no trained adapter in {folder} (no {path.name}{lost})."
        raise FineTuningError(what, "Train one, or name its folder or a checkpoint's.")
    settings, is_checkpoint = read_json(path), (folder / MANIFEST).is_file()
    base, kind = settings.get("base_model_name_or_path"), settings.get("peft_type")
    special = [f"{n} {v}" for n, v in settings.items() if v and not {n, f"{n} {v}"} & PLAIN_LORA]
    if kind != "LORA":
        problem: str | None = f"it is of type {kind!r}, not LORA"
    elif special:
        problem = f"it uses {shorten(', '.join(special))}; this program serves plain LoRA only"
    elif not isinstance(base, str) or not base:
        problem = f"{path.name} names no base model (base_model_name_or_path)"
    else:
        problem = (is_checkpoint and damage(folder)) or weights_problem(weights)
    if problem:
        hint = "Restore it from a copy, or merge one of another kind with PEFT (merge_and_unload)."
        raise FineTuningError(f"The adapter in {folder} cannot be used: {problem}.", hint)
    record = folder / (PROGRESS_FILE if is_checkpoint else CONFIG_FILE)
    own = read_json(record) if record.is_file() else {}
    own = own.get("identity", {}) if is_checkpoint else own
    facts, prompt = own if is_checkpoint else own.get("provenance") or {}, own.get("system_prompt")
    return AdapterFolder(folder, str(base), settings, facts, prompt and str(prompt), weights)


def attach_adapter(model: "PreTrainedModel", adapter: AdapterFolder, device: str) -> "PeftModel":
    """Put the adapter on its base model; raise FineTuningError where the two do not fit."""
    # Elsewhere low_cpu_mem_usage would round the weights to the base's dtype (PEFT 0.21).
    how: Any = {"torch_device": device, "low_cpu_mem_usage": model.device.type == "meta"}
    what = f"The adapter in {adapter.path} does not fit the model {adapter.base_name}"
    with library_errors(what, "Take the adapter_config.json of its own training."):
        tuned = peft.PeftModel.from_pretrained(model, str(adapter.path), **how)
        with safetensors.safe_open(adapter.weights, framework="pt") as file:
            known = peft.get_peft_model_state_dict(tuned, save_embedding_layers=False)
            different = set(file.keys()) ^ set(known)
        if different:
            raise ValueError(f"{len(different)} tensors have no counterpart ({min(different)})")
    return tuned


# ======================================================================================
# 7. Stage 1: preflight
# ======================================================================================
#
# In: the settings. Out: the outcome of every check, the device and the dtype. What stages 2 to 5
# would refuse and this stage can know is told here, all at once, each with its remedy. It begins
# with the access to the data, which stage 2 shares: one way to ask the bucket, errors that name the
# setting to change, and the copies that earlier runs verified. No key is ever shown.

ATTEMPTS = 5  # in a row without a new byte
CONNECT_SECONDS, STALL_SECONDS = 10, 30  # for a connection; without one byte
R2_DOMAIN = ".r2.cloudflarestorage.com"
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


class BucketError(FineTuningError):
    """Tell what came in place of an answer; `kind` says what may help.

    "again": a later try, or a copy; "away": a copy; "replaced": another choice; "refused": nothing.
    """

    def __init__(self, message: str, hint: str, kind: str) -> None:
        super().__init__(message, hint)
        self.kind = kind


class StoredObject(NamedTuple):
    host: str
    bucket: str
    key: str
    size: int
    etag: str
    last_modified: str  # ISO 8601, UTC
    sha256: str = ""  # of a verified copy

    def __str__(self) -> str:
        return f"{shorten(self.key)}, {human_bytes(self.size)}, {self.last_modified[:16]}"


Objects = list[StoredObject]
Texts = Sequence[str]

# --- asking the bucket

GO_ON = "Check the internet connection, then run the same command again: it goes on from here."
REPLACED = "The object, or the rest of it, is no longer there: it was replaced meanwhile."
UPLOADING = "Wait until its upload is over, then run the same command again."
PLACE = "Check R2_ENDPOINT_URL or R2_ACCOUNT_ID"
TOKENS = "Cloudflare dashboard > R2 > Manage API tokens"
# fmt: off
# ruff: disable[E501]
# S3 codes, statuses or exceptions -> message, hint, kind. The first row that fits counts.
ANSWERS = (
    ("SignatureDoesNotMatch", "{host} says that the secret access key does not belong to the access key ID.", f"Check R2_SECRET_ACCESS_KEY, then whether R2_ACCESS_KEY_ID is of the same token; a lost secret needs a new token ({TOKENS}).", "refused"),
    ("InvalidAccessKeyId Unauthorized", "{host} does not know the access key ID.", f"Check R2_ACCESS_KEY_ID: the token may be deleted or expired ({TOKENS}).", "refused"),
    ("RequestTimeTooSkewed", "{host} refuses requests because this machine's clock is wrong.", "Set the clock (automatic date and time), then run the same command again.", "refused"),
    ("NoSuchBucket", "There is no bucket {bucket!r} at {host}.", "Check R2_BUCKET_NAME or --r2_bucket_name, and whether R2_ACCOUNT_ID is its account.", "refused"),
    ("NoSuchKey InvalidRange 412 416", REPLACED, UPLOADING, "replaced"),
    ("AccessDenied", "{host} denies the access to bucket {bucket!r}.", f"Give the token the permission Object Read for this bucket. A bucket in a jurisdiction needs R2_ENDPOINT_URL=https://<account id>.eu{R2_DOMAIN} (or .us, .fedramp).", "refused"),
    ("408 429 500 502 503 504 520 521 522 523 524 RequestTimeout", "{host} answered {said}.", "The server is busy or broken for now, or a login page stands in its place; run the same command again later.", "again"),
    ("ProxyConnectionError LocationValueError", "The proxy on the way to {host} cannot be used, or that is no address.", "Check HTTPS_PROXY and HTTP_PROXY (like http://host:port, not SOCKS), and the port in R2_ENDPOINT_URL.", "away"),
    ("SSLEOFError", "The connection to {host} broke: {said}.", GO_ON, "again"),
    ("SSLError", "No secure connection to {host}: {said}.", PLACE + "; then whether a proxy, a firewall or a login page stands between (its certificate: AWS_CA_BUNDLE=FILE).", "away"),
    ("gaierror", "The name {host} cannot be found.", "Check the internet connection, then R2_ACCOUNT_ID or R2_ENDPOINT_URL.", "again"),
    ("ConnectionRefusedError", "{host} refuses connections.", PLACE + " (host and port), and a proxy in HTTPS_PROXY.", "away"),
    ("ConnectTimeoutError TimeoutError", f"{{host}} is silent: no connection within {CONNECT_SECONDS} s, or nothing came for {STALL_SECONDS} s.", GO_ON, "again"),
    ("OSError HTTPError HTTPClientError ConnectionError IncompleteReadError", "The connection to {host} broke: {said}.", GO_ON, "again"),
    ("", "{host} does not answer like an S3 server: {said}.", PLACE + " and R2_BUCKET_NAME. A login page of the network can be the reason, too.", "away"),
)
# ruff: enable[E501]
# fmt: on


@contextlib.contextmanager
def bucket_errors(client: Any, bucket: str) -> Iterator[None]:
    """Say in words what came in place of an answer, and which setting to change."""
    theirs = botocore.exceptions
    foreign = (theirs.BotoCoreError, theirs.ClientError, botocore.parsers.ResponseParserError)
    try:
        yield
    except (*foreign, urllib3.exceptions.HTTPError, LookupError, ValueError, OSError) as error:
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ or causes[-1].__context__:
            causes.append(causes[-1].__cause__ or causes[-1].__context__ or error)
        names = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
        said = first_line(causes[-1])
        if isinstance(error, theirs.ClientError):
            status = str(error.response["ResponseMetadata"]["HTTPStatusCode"])
            told = {"Code": "", "Message": "", **error.response.get("Error", {})}
            names, said = {told["Code"], status}, f"{status} {told['Code']} {told['Message']}"
        row = next(row for row in ANSWERS if not row[0] or names & set(row[0].split()))
        host = urllib.parse.urlsplit(client.meta.endpoint_url).netloc
        message = row[1].format(host=host, bucket=bucket, said=shorten(said, 200).rstrip("."))
        raise BucketError(message, row[2], row[3]) from error


def keep_trying(request: "Callable[[], T]", kind: str, progress: "Callable[[], int]" = int) -> "T":
    """Repeat a request until it succeeds or has failed ATTEMPTS times in a row without progress."""
    best, failures = progress(), 0
    while True:
        try:
            return request()
        except BucketError as error:
            failures = 1 if progress() > best else failures + 1
            best = max(best, progress())
            if error.kind != kind or failures >= ATTEMPTS:
                raise
            log.info("  %s Attempt %d of %d failed.", error, failures, ATTEMPTS)
            log.debug("What failed", exc_info=error)
            time.sleep(random.uniform(0, 2 ** (failures - 1)))  # noqa: S311


def r2_variables(bucket: str) -> "tuple[str, str, str, str]":
    """Return account, endpoint, key and secret, without what copying leaves around them."""
    names = ("R2_ACCOUNT_ID", "R2_ENDPOINT_URL", "R2_ACCESS_KEY_ID", "R2_SECRET_ACCESS_KEY")
    account, given, key, secret = (os.environ.get(n, "").strip(" \t\r\n'\"") for n in names)
    endpoint = given.rstrip("/").removesuffix(f"/{bucket}")  # Cloudflare shows the two together
    return account, endpoint or f"https://{account}{R2_DOMAIN}", key, secret


def open_client(bucket: str) -> Any:
    """Make a client (it has no static type); raise once for all wrong variables, values unseen."""
    account, endpoint, key, secret = r2_variables(bucket)
    remember_secrets(key, secret, *(p for p in urllib.request.getproxies().values() if "@" in p))
    label, wrong = r"(?!-)[a-z\d-]{1,63}(?<!-)", []
    server = rf"(?i:https?://(\[[\da-f:]+\]|{label}(\.{label})*\.?)(:\d{{1,5}})?(/[^?#]*)?)"
    place = ("ENDPOINT_URL", endpoint, server, f"like https://<account id>{R2_DOMAIN}")
    if endpoint == f"https://{account}{R2_DOMAIN}":
        place = ("ACCOUNT_ID", account, r"[\da-fA-F]{32}", "the account's 32 hexadecimal digits")
    for name, value, pattern, words in (
        place, ("ACCESS_KEY_ID", key, "[!-~]+", "one word"),
        ("SECRET_ACCESS_KEY", secret, "[!-~]+", "one word"),
        ("BUCKET_NAME", bucket, "[A-Za-z0-9._-]+", "a bucket's name"),
    ):  # fmt: skip
        if not re.fullmatch(pattern, value):
            what = f"must be {words}; its {len(value)} characters are not"
            wrong.append(f"R2_{name} {what if value else 'is missing'}")
    if wrong:
        message = f"The access to R2 is not set up: {'; '.join(wrong)}."
        hint = f"Put the values of {TOKENS} into .env (see .env.example), or use --data_path FILE."
        raise BucketError(message, hint, "away")
    config = botocore.config.Config(
        signature_version="s3v4", s3={"addressing_style": "path"},
        connect_timeout=CONNECT_SECONDS, read_timeout=STALL_SECONDS,
        retries={"total_max_attempts": 1, "mode": "standard"},  # all retries are ours
        # R2 does not have the checksums that newer clients ask for by default.
        request_checksum_calculation="when_required", response_checksum_validation="when_required",
    )  # fmt: skip
    # The user's own AWS profile and files have no say here, broken or not.
    nowhere, none = (None, None, os.devnull, None), (None, None, None, None)
    own = {"config_file": nowhere, "credentials_file": nowhere, "profile": none}
    return botocore.session.Session(session_vars=own).create_client(
        "s3", "auto", endpoint_url=endpoint, config=config,
        aws_access_key_id=key, aws_secret_access_key=secret,
    )  # fmt: skip


def list_objects(client: Any, bucket: str, prefixes: Texts) -> Objects:
    """Return the objects whose key starts with one of the prefixes."""
    found, host = {}, urllib.parse.urlsplit(client.meta.endpoint_url).netloc
    pages = client.get_paginator("list_objects_v2").paginate
    with bucket_errors(client, bucket):
        for page in (page for p in prefixes for page in pages(Bucket=bucket, Prefix=p)):
            if "IsTruncated" not in page:
                raise OSError("what came is no whole listing")
            for o in page.get("Contents", []):
                version = o["Size"], o["ETag"].strip('"'), o["LastModified"].isoformat()
                found[o["Key"]] = StoredObject(host, bucket, o["Key"], *version)
    return list(found.values())


def choose_objects(objects: Objects, names: Texts, prefix: str) -> Objects:
    """Choose by names (a key or its end); else the newest called Alpaca, else the newest."""
    there, chosen = [o for o in objects if o.size], []
    for name in names:
        fitting = [o for o in there if f"/{o.key}".endswith(f"/{name}")]
        fitting = [o for o in fitting if o.key == name] or fitting
        if len(fitting) != 1:
            near = difflib.get_close_matches(name, [o.key for o in fitting or there], 3, 0)
            what = f"{name!r} fits {len(fitting)} of the {len(there)} objects with content"
            hint = f"Choose {' or '.join(map(repr, near)) or 'another prefix'}."
            raise FineTuningError(f"dataset_name {what} under {prefix!r}.", hint)
        chosen += fitting
    usable = [o for o in there if o.key.lower().endswith(DATA_SUFFIXES)]
    if not names and not usable:
        held = "; ".join(map(str, objects[:3])) or "nothing"
        what = f"No data set ({', '.join(DATA_SUFFIXES)}) is under {prefix!r}, which holds {held}."
        hint = "Check --r2_data_prefix and R2_BUCKET_NAME, or use --data_path."
        raise FineTuningError(what, hint)
    alpaca = [o for o in usable if "alpaca" in o.key[len(prefix) :].lower()]
    return chosen or [max(alpaca or usable, key=lambda o: (o.last_modified, o.key))]


def copy_path(folder: Path, stored: StoredObject) -> Path:
    """Return where one version of an object is kept: a harmless name, told apart by digests."""
    name, _, suffix = stored.key.rpartition("/")[2].rpartition(".")
    suffix = suffix.lower() if f".{suffix.lower()}" in DATA_SUFFIXES else "json"
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-")[:60] or "data"
    for part in ([stored.host, stored.bucket, stored.key], [stored.etag, stored.size]):
        name += "-" + hashlib.sha256(json.dumps(part).encode()).hexdigest()[:12]
    return folder / f"{name}.{suffix}"


def read_copy(info: Path) -> "StoredObject | None":
    """Return what a copy's record (NAME.info) says, its bytes proven again; else None."""
    path = info.with_suffix("")
    with contextlib.suppress(FineTuningError, OSError, AttributeError):
        copy = StoredObject._make(map(read_json(info).get, StoredObject._fields))
        # The file's name holds digests of what the record says.
        if copy_path(info.parent, copy) == path and sha256_of(path) == copy.sha256:
            return copy._replace(last_modified=str(copy.last_modified))
    if info.exists():
        log.warning("  The cached copy %s is damaged: it is not used", path)
    return None


def find_objects(bucket: str, prefix: str, names: Texts, cache: Path) -> "tuple[Any, Objects, str]":
    """Return a client, the chosen objects and why; without the bucket, None and verified copies."""
    prefixes = (prefix, *(name for name in names if "/" in name))  # whole keys may lie elsewhere
    try:
        client = open_client(bucket)
        objects = keep_trying(lambda: list_objects(client, bucket, prefixes), "again")
        chosen = choose_objects(objects, names, prefix)
        why = "by name" if names else "the newest, if possible with 'alpaca' in its name"
        told = f"{'; '.join(map(str, chosen))} ({why}, of {len(objects)} objects)"
        return client, chosen, f"Chosen in {bucket}: {told}"
    except BucketError as error:
        if error.kind == "refused":
            raise
        # Without an account id, R2's own domain stands alone: any account's copy is the one.
        host = r2_variables(bucket)[1].partition("//")[2].partition("/")[0]
        known = [c for c in map(read_copy, cache.glob("*.info")) if c and c.bucket == bucket]
        known = [c for c in known if c.key.startswith(prefixes) and host in (c.host, R2_DOMAIN)]
        newest = {c.key: c for c in sorted(known, key=lambda c: c.last_modified)}
        with contextlib.suppress(FineTuningError):
            chosen = choose_objects([*newest.values()], names, prefix)
            told = f"Verified copies are used: {'; '.join(map(str, chosen))}"
            return None, chosen, f"{error} {error.hint} {told}"
        raise


def each_of(value: "str | tuple[str, ...] | None") -> "tuple[str, ...]":
    """Return a setting that is one text or several as several."""
    return (value,) if isinstance(value, str) else value or ()


def check_files(paths: Texts) -> "list[int]":
    """Return the sizes of local data files; refuse what cannot be one, all at once."""
    sizes, problems = [], []
    for path in map(Path, paths):
        try:
            sizes.append(path.stat().st_size)
            if not path.is_file() or not sizes[-1]:
                raise ValueError("it is empty (0 bytes)" if path.is_file() else "it is not a file")
            path.open("rb").close()
        except (OSError, ValueError) as error:
            beside = path.parent.glob("*") if isinstance(error, FileNotFoundError) else ()
            said = getattr(error, "strerror", error), nearest(str(path), map(str, beside))
            problems.append("{} cannot be read: {}{}".format(shorten(str(path), 300), *said))
    if problems:
        raise FineTuningError("; ".join(problems), "Check --data_path.")
    return sizes


def check_data(paths: Texts, names: Texts, bucket: str, prefix: str, cache: Path) -> Check:
    """Check that stage 2 will find the data: local files, the bucket's objects, or their copies."""
    if paths:
        total = human_bytes(sum(check_files(paths)))
        return Check("data", "ok", f"{total} in local files; R2 is not used")
    client, _, why = find_objects(bucket, prefix, names, cache)
    return Check("R2 bucket", "ok" if client else "warning", why)


# --- memory: what a run needs, from the base model's numbers alone

RUNTIME_BYTES = 550_000_000  # Python and its packages
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class MemoryPlan(NamedTuple):
    budget: int  # tokens of a forward pass
    recompute: bool  # activations
    peak: int  # bytes
    fits: bool  # into what a run may take, or on a CPU into all of the memory
    reason: str


def activation_bytes(
    base: BaseModel, device: str, dtype: str, tokens: int, longest: int, *, recompute: bool
) -> int:
    """Return the bytes that a pass of so many tokens keeps for its backward, and needs on the way.

    `longest` are the tokens of its longest row.
    """
    width, row, c = DTYPE_BYTES[dtype], min(tokens, LONGEST_MATH_ROW), base.config
    hidden, heads, layers = c.hidden_size, c.num_attention_heads, c.num_hidden_layers
    key_value = c.num_key_value_heads * (getattr(c, "head_dim", None) or hidden // heads)
    qkv, score = (3 * hidden + 2 * key_value) * width, heads * width
    if device == "mps":  # it keeps the scores of whole rows, and q, k, v once more, in fp32
        row, score, qkv = min(tokens, longest), heads * 4, qkv + 12 * hidden
        tokens += BUCKETS["tokens"]
    feed_forward = 3 * c.intermediate_size * width
    layer = 12 * hidden + qkv + score * row + feed_forward  # RMSNorm saves its input in fp32
    kept = hidden * width * layers + layer if recompute else layer * layers
    # Gradients on their way through one layer are as large as its feed-forward activations.
    return tokens * (kept + feed_forward)


def plan_memory(
    base: BaseModel, config: FineTuningConfig, device: str, dtype: str, lengths: Sequence[int] = ()
) -> MemoryPlan:
    """Choose the tokens of a forward pass so that the run fits into the machine's memory.

    Where the granted tokens would take too much, the budget is halved, down to the longest of the
    training examples (`lengths`, where they are known); then activations are recomputed.
    """
    weights, recompute = base.parameters * DTYPE_BYTES[dtype], config.gradient_checkpointing
    trainable = base.adapter_parameters(config.lora_r, config.target_modules)
    length = min(config.max_seq_length, base.positions)
    longest, granted = max(lengths, default=length), config.per_device_train_batch_size * length
    most = sum(sorted(lengths)[-config.effective_batch :]) or granted
    # The adapter: weights, gradients, two Adam moments, and the best weights so far, all fp32.
    fixed = RUNTIME_BYTES + weights + trainable * 20 + 3 * HEAD_CHUNK * base.vocabulary * 4

    def estimate(budget: int, again: bool) -> int:
        tokens = min(budget, most)
        return fixed + activation_bytes(base, device, dtype, tokens, longest, recompute=again)

    cuda = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None
    total = cuda or psutil.virtual_memory().total
    limit = 0.8 * total  # what a run may take
    if device == "mps":
        # Beyond Metal's limit, small Macs swap for hours instead of refusing; its buffers do not
        # fit seamlessly into its heaps.
        limit = min(limit, torch.mps.recommended_max_memory() - 1_500_000_000)
    budget, again, floor = granted, recompute == "on", max(256, longest)  # smaller passes are slow
    while estimate(budget, again) > limit and budget // 2 >= floor:
        budget //= 2
    again = again or (recompute == "auto" and estimate(budget, again) > limit)
    peak = estimate(budget, again)
    if device == "cpu" and abs(base.file_bytes - weights) > 0.1 * weights:
        # While it loads, the file's pages stand beside weights of another dtype.
        peak = max(peak, RUNTIME_BYTES + weights + base.file_bytes)
    fits = peak <= (total if device == "cpu" else limit)
    reason = f"about {human_bytes(peak)} of this machine's {human_bytes(total)}"
    reason += f" ({granted} were granted)" * (budget < granted)
    return MemoryPlan(budget, again, peak, fits, reason)


# --- the device

SELF_TEST = "_self-test"  # the command word of the child process
SELF_TEST_SECONDS = 180


def self_test_models(device: str, dtype: str, seed: int, vocabulary: int) -> "list[Any]":
    """Return a small Llama with a random adapter twice: plain on the CPU, with the engine there."""
    sizes: Any = {"vocab_size": vocabulary, "hidden_size": 128, "intermediate_size": 256}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    models: list[Any] = []
    lora: Any = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "init_lora_weights": False}
    lora["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    for place, width in (("cpu", "float32"), (device, dtype)):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**sizes, initializer_range=0.05)
        base: Any = transformers.LlamaForCausalLM(config).to(getattr(torch, width))
        base.get_input_embeddings().weight.data *= 4
        model = peft.get_peft_model(base, peft.LoraConfig(**lora))
        base.get_input_embeddings().weight.requires_grad_(True)  # its gradient is that of the input
        models.append(model.to(place).eval())
    load_adapter_weights(models[1], adapter_weights(models[0]))  # not rounded to the base's dtype
    install_engine(models[1])
    return models


def step_of_adamw(model: Any, other: Any, device: str) -> "list[Tensor]":
    """Return the adapter after a step along the clipped gradients of another model."""
    moved, others = ([p for n, p in m.named_parameters() if "lora" in n] for m in (model, other))
    for parameter, its in zip(moved, others, strict=True):
        parameter.grad = its.grad.to(parameter.device)
    torch.nn.utils.clip_grad_norm_(moved, 0.01)
    torch.optim.AdamW(moved, lr=0.01, fused=device == "mps" or None).step()
    return [parameter.detach().cpu() for parameter in moved]


def answers_within(limit: float, plain: Any, tested: Any, device: str, world: Any) -> bool:
    """Tell whether only rounding parts a device's answers to two prompts, one of them padded.

    The CPU may find a likelier token than the chosen one by `limit` of its largest logit.
    """
    prompts = torch.tensor([[7, 1, 5, 9, 11, 8], [0, 0, 1, 5, 9, 12]])
    how: Any = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    mask = torch.nn.functional.pad((prompts > 0).long(), (0, 4), value=1)  # of the answers, too
    with torch.inference_mode():
        with world(), engine_off(tested):
            given = {"input_ids": prompts.to(device), "attention_mask": mask[:, :6].to(device)}
            said = tested.eval().generate(**given, **how).cpu()
        logits = plain.eval()(input_ids=said, attention_mask=mask).logits[:, 5:-1]
    chosen = logits.gather(2, said[:, 6:, None])[..., 0]
    return bool((logits.amax(2) - chosen <= limit * logits.abs().amax(2)).all())


def find_fault(
    device: str, dtype: str, seed: int = 0, size: int = 32_000, world: Any = contextlib.nullcontext
) -> str:
    """Return what a device gets wrong of training and answering, in words; "" for nothing.

    Losses and gradients are compared with those of transformers and PEFT on the CPU, for both kinds
    of attention and more targets than a slice of the head. `world()` stands around the device.
    """
    chance, tolerance = random.Random(seed), tolerance_of(device, dtype)  # noqa: S311
    plain, tested = self_test_models(device, dtype, seed, size)
    trained = [p for p in tested.parameters() if p.requires_grad]

    def make(lengths: Iterable[int]) -> "list[Example]":
        rows = ([1, 5, 9, *(chance.randrange(3, size) for _ in range(n))] for n in lengths)
        return [Example(input_ids=row, spans=[[4, 9], [len(row) // 2, len(row)]]) for row in rows]

    def gradients(batch: "list[Example]", dropout: int = 0) -> "list[Any]":
        with world():
            tested.zero_grad()
            layout = lay_out(batch, device, dropout)
            loss = pass_loss(tested.train(dropout > 0), layout) / layout.supervised
            loss.backward()
            return [loss.detach().float().cpu()] + [p.grad.float().cpu() for p in trained]

    def differ(found: "Sequence[Any]", wanted: "Sequence[Any]", limit: float) -> bool:
        pairs = zip(found, wanted, strict=True)
        return not all((f - w).norm() <= limit * w.norm() for f, w in pairs)  # NaN differs, too

    short, long = make(range(20, 60, 5)), make([LONGEST_MATH_ROW + 45] * 4)
    for batch, what in ((short, "short rows"), (long, "long rows"), (short, "a shape once more")):
        plain.zero_grad()
        loss = plain_loss(plain, batch)
        loss.backward()
        wanted = [loss.detach(), *(p.grad for p in plain.parameters() if p.requires_grad)]
        found = gradients(batch)
        if differ(found[:1], wanted[:1], tolerance):
            return f"the loss of {what} is {found[0]:.4f} where the CPU has {wanted[0]:.4f}"
        if differ(found, wanted, 3 * tolerance):
            return f"a gradient of {what} is not the CPU's"
        with torch.inference_mode(), world():
            layout = lay_out(batch, device)
            loss = (pass_loss(tested.eval(), layout) / layout.supervised).float().cpu()
        if differ([loss], wanted[:1], tolerance):
            return f"the loss of {what} without gradients is {loss:.4f} instead of {wanted[0]:.4f}"
    first, other = gradients(short, 5), gradients(short, 6)
    if not differ(other[1:], first[1:], tolerance) or differ(gradients(short, 5), first, tolerance):
        return "dropout does not follow its seed"
    recompute_activations(tested)
    if differ(gradients(short, 5), first, tolerance):
        return "gradients with recomputed activations are others"
    with world():
        gradient = step_of_adamw(tested, plain, device)
    if differ(gradient, step_of_adamw(plain, plain, "cpu"), 1e-4):
        return "a step of AdamW is not the CPU's"
    answers_rightly = answers_within(3 * tolerance, plain, tested, device, world)
    return "" if answers_rightly else "an answer is not the CPU's"


def time_products(device: str, dtype: str) -> float:
    """Return the seconds that five products of TinyLlama's MLP for 512 tokens take."""
    how: Any = {"device": device, "dtype": getattr(torch, dtype)}
    a, b, seconds = torch.ones(512, 2048, **how), torch.ones(2048, 5632, **how), 0.0
    for _ in range(2):  # the first ones warm up
        started = time.monotonic()
        sum((a @ b for _ in range(5)), torch.zeros((), **how)).sum().item()  # waits
        seconds = time.monotonic() - started
    return seconds


def run_self_test(device: str, dtype: str) -> None:
    """Print what a device gets wrong, and on a Mac how fast it is, as JSON (in a child process)."""
    quiet_libraries()
    size = 2_000 if device == "cpu" else 32_000  # GPUs were seen to lose the ends of long sums
    kinds = ((device, dtype), (device, "bfloat16"), ("cpu", "float32")) if device == "mps" else ()
    problem = find_fault(device, dtype, 0, size)
    seconds = [] if problem else [time_products(*kind) for kind in kinds]
    sys.stdout.write(json.dumps({"problem": problem or None, "seconds": seconds}) + "\n")


def self_test(device: str, dtype: str) -> "tuple[str | None, list[float]]":
    """Let a child, which may hang or crash, test a device (a GPU once).

    Return what is wrong, and on a Mac the seconds of `time_products`: there, in bf16, on the CPU.
    """
    record, known = PROGRAM_FOLDER / "cache" / "self_test.json", dict[str, Any]()
    program, machine = sha256_of(Path(__file__)), (platform.node(), platform.platform())
    key = " ".join([device, dtype, *machine, torch.__version__, program])
    with contextlib.suppress(FineTuningError):
        known = read_json(record) if device != "cpu" else {}
    if key in known:
        return None, known[key]
    command = [sys.executable, str(Path(__file__).resolve()), SELF_TEST, device, dtype]
    options: Any = {"capture_output": True, "text": True, "timeout": SELF_TEST_SECONDS}
    try:
        child = subprocess.run(command, check=False, **options)
        child.check_returncode()
        found = json.loads(child.stdout.splitlines()[-1])
        problem, seconds = found["problem"], found["seconds"]
    except subprocess.TimeoutExpired:
        return f"the self-test hung (no answer in {SELF_TEST_SECONDS} s)", []
    except (subprocess.CalledProcessError, ValueError, LookupError, TypeError):
        log.debug("Self-test: %s", child.stderr)
        reason = (child.stderr.strip().splitlines() or ["it gave no answer"])[-1]
        return f"the self-test crashed (exit code {child.returncode}: {reason})", []
    if problem is None and device != "cpu":
        with contextlib.suppress(FineTuningError, OSError):  # a folder that cannot be written
            write_whole(record, known | {key: seconds}, "")
    return problem and f"the self-test failed: {problem}", seconds


def emulates_bf16(device: str) -> bool:
    """Tell whether products of bf16 matrices are computed in software there."""
    if device != "cpu":
        return device == "cuda" and not torch.cuda.is_bf16_supported(False)
    if platform.machine().lower() in ("arm64", "aarch64"):
        mkldnn = torch.backends.mkldnn.is_available()
        return not (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # absent in old versions
    return not any(getattr(torch.cpu, name, bool)() for name in names)


def choose_device(wanted: str) -> "tuple[str, str]":
    """Return the device to train on and, in words, why; raise where the wanted one is absent."""
    # On Intel Macs, MPS means a GPU that PyTorch no longer supports; several processes cannot add
    # up their gradients there.
    mps = torch.backends.mps.is_available() and platform.machine() == "arm64"
    mps = mps and process_count() == 1
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if wanted == "auto":
        absent = " and ".join(name.upper() for name in there if not there[name])
        return max(there, key=lambda n: there[n]), f"{absent} absent" if absent else "the fastest"
    if not there[wanted]:
        what = f"This machine, or this build of PyTorch ({torch.__version__}), has no {wanted}."
        raise FineTuningError(what, "Leave --device out to take the best one there is.")
    return wanted, "asked for"


def check_device(wanted: str, dtype: str) -> "tuple[Check, str, str]":
    """Choose the device; return the check, the device, and the dtype that works there."""
    device, reason = choose_device(wanted)
    if dtype == "float16" and device != "cuda":
        what = f"fp16 works on NVIDIA GPUs only, and this is {device}."
        raise FineTuningError(what, "Take --bf16: it saves as much memory.")
    is_measure = (device, dtype) == ("cpu", "float32")  # which all others are compared with
    problem, seconds = (None, []) if is_measure else self_test(device, dtype)
    if seconds:
        there, half, cpu = seconds
        times = f"a sample takes {there:.2f} s, {half:.2f} s in bf16, {cpu:.2f} s on the CPU"
        reason += f"; {times}"
        is_faster = dtype == "float32" and there >= 1.15 * half and cpu >= half
        if wanted == "auto" and is_faster and self_test(device, "bfloat16")[0] is None:
            dtype, there = "bfloat16", half
        problem = f"it is slower here: {times}" if wanted == "auto" and cpu < there else None
    if problem and wanted == "auto" and device != "cpu":
        check, _, dtype = check_device("cpu", dtype)
        hint = f"Training goes on with {check.detail}; --device {device} insists."
        return Check("device", "warning", f"{device} rejected: {problem}", hint), "cpu", dtype
    if problem:
        hint = "Leave --bf16 and --fp16 out, or take another --device."
        raise FineTuningError(f"{device} with a base model in {dtype}: {problem}.", hint)
    if dtype == "bfloat16" and emulates_bf16(device):
        detail = f"{device}: bf16 is computed in software here, several times slower than float32"
        return Check("device", "warning", detail, "Leave --bf16 out."), device, dtype
    return Check("device", "ok", f"{device}, base model in {dtype} ({reason})"), device, dtype


def check_memory(
    plan: "Callable[[str], MemoryPlan]", device: str, dtype: str
) -> "tuple[Check, str]":
    """Check that the plan for a dtype fits; where Metal has no room for float32, take bf16."""
    chosen, why = plan(dtype), ""
    if device == "mps" and dtype == "float32" and not chosen.fits:
        half = plan("bfloat16")
        if half.fits and self_test(device, "bfloat16")[0] is None:
            why = f"; bf16 is taken, since float32 needs {human_bytes(chosen.peak)}"
            chosen, dtype = half, "bfloat16"
    hint = "Try --bf16 (half the memory), or a smaller --max_seq_length."
    outcome: Any = "ok" if chosen.fits else "warning"
    return Check("memory", outcome, f"{chosen.reason} at most{why}", hint), dtype


# --- the surroundings


def check_packages(report_to: str) -> Check:
    """Compare the installed packages with the tested pins that apply to this machine."""
    path = PROGRAM_FOLDER / "requirements-finetuning.txt"
    whole = f"{sys.executable} -m pip install -r {path}"
    try:
        lines = [*path.read_text("utf-8").splitlines(), report_to.replace("none", "")]
        bare = filter(None, (line.partition("#")[0].strip() for line in lines))
        known = map(packaging.requirements.Requirement, bare)
        pins = [pin for pin in known if not pin.marker or pin.marker.evaluate()]
    except (OSError, ValueError, ImportError) as error:
        outcome: Any = "failed" if isinstance(error, ImportError) else "warning"
        return Check("packages", outcome, f"{path.name} cannot be read: {error}", whole)
    find = importlib.metadata.distributions
    there = {pin: next((d.version for d in find(name=pin.name)), "") for pin in pins}
    lacking = [f"{pin.name}{pin.specifier}" for pin in pins if not there[pin]]
    other = [pin for pin in pins if not pin.specifier.contains(there[pin] or "0", True)]
    if lacking:
        hint = f"{sys.executable} -m pip install {shlex.join(lacking)}"
        return Check("packages", "failed", f"missing: {', '.join(lacking)}", hint)
    told = ", ".join(f"{pin.name} {there[pin]} (tested: {pin.specifier})" for pin in other)
    if told:
        return Check("packages", "warning", f"not as tested: {told}", whole)
    return Check("packages", "ok", f"all {len(pins)} at their tested versions")


def environment_files() -> "list[Path]":
    """Return the .env files that count: the current folder's, then the program's."""
    places = dict.fromkeys((Path.cwd(), PROGRAM_FOLDER))
    return [folder / ".env" for folder in places if (folder / ".env").is_file()]


def check_folders(output: Path, cache: Path, model_name: str) -> Iterator[Check]:
    """Check that both can be written, and that nothing would be replaced but a run's own files."""
    foreign = list[str]()
    with contextlib.suppress(PermissionError):  # told below
        ours = [c.name for c in output.glob("checkpoint-*") if (c / MANIFEST).is_file()]
        with contextlib.suppress(FineTuningError):
            ours += [QUALITY_FILE] if "quality_score" in read_json(output / QUALITY_FILE) else []
        with contextlib.suppress(FineTuningError):
            ours += RUN_FILES if "provenance" in read_json(output / CONFIG_FILE) else []
        named = sorted([*output.glob("checkpoint-*"), *(output / name for name in RUN_FILES)])
        foreign = [path.name for path in named if path.exists() and path.name not in ours]
        if output.resolve() == Path(model_name).resolve():
            foreign = ["the base model itself"]
    for name, folder in (("output_dir", output), ("cache_dir", cache)):
        parent, problem = existing_parent(folder), ""
        try:
            tempfile.TemporaryFile(dir=parent).close()
        except OSError as error:
            problem = f"{parent} cannot be written: {error.strerror}"
        if foreign and folder == output:
            problem = f"{output} holds what no run wrote and this one would replace: "
            problem += ", ".join(foreign[:5])
        outcome: Any = "failed" if problem else "ok"
        told = problem or f"{folder} can be written"
        yield Check(name, outcome, told, f"Give another folder with --{name}.")
    for path in environment_files():
        if path.stat().st_mode & 0o077:
            hint = f"chmod 600 {shlex.quote(str(path))}"
            yield Check(".env", "warning", f"others can read {path}", hint)


def check_disk(config: FineTuningConfig, base: "BaseModel | None") -> Check:
    """Check the free space, which the checkpoints must fit into, too."""
    output, kept, least_gb = Path(config.output_dir), config.save_total_limit, config.min_disk_gb
    adapter = base.adapter_parameters(config.lora_r, config.target_modules) if base else 0
    # Not where the hub's models lie: the base is whole by now, and no more is written there.
    places = map(existing_parent, (output, Path(config.cache_dir)))
    free, spare = (shutil.disk_usage(place).free for place in places)
    # Weights, the best ones so far and AdamW's two moments in fp32; one more than are kept, since
    # a checkpoint is written before the oldest is deleted; and the adapter itself.
    need = (kept + 1) * (adapter * 16 + 1_000_000) + adapter * 4
    there = sum(file.stat().st_size for file in output.glob("checkpoint-*/*"))
    short = need > free + there or min(free, spare) < least_gb * 1e9
    told = f"{human_bytes(free)} free for output_dir, {human_bytes(spare)} for cache_dir; {kept} "
    told += f"checkpoints and the adapter need {human_bytes(need)}, {least_gb:g} GB are asked for"
    hint = "Free some space, or choose other folders, --save_total_limit 1 or --min_disk_gb 1."
    return Check("disk", "failed" if short else "ok", told, hint)


def check_training(config: FineTuningConfig, base: BaseModel) -> Iterator[Check]:
    """Check what the settings ask of the base model, and what the run is to start from."""
    unknown = ", ".join(name for name in config.target_modules if name not in base.linear)
    if unknown:
        hint = f"Choose --target_modules among {', '.join(base.linear)}."
        yield Check("adapter", "failed", f"the base model has no linear layers {unknown}", hint)
    length, resume = config.max_seq_length, config.resume
    if length > base.positions:
        detail = f"max_seq_length is {length}, and the model sees {base.positions} tokens"
        yield Check("length", "warning", detail, "Longer rows will count as too long.")
    problem = None if resume in ("auto", "never") else damage(Path(resume))
    if problem:
        hint = "Name another one, or leave --resume out."
        yield Check("resume", "failed", f"{resume} is no checkpoint: {problem}", hint)
    if config.init_adapter:
        open_adapter(Path(config.init_adapter))


def run_preflight(config: FineTuningConfig) -> PreflightReport:
    """Check everything a run needs and choose the device; raise once, with all that is wrong."""
    cache, paths, names = Path(config.cache_dir), each_of(config.data_path), config.dataset_name
    base, device, dtype = None, "", config.dtype
    checks = [check_packages(config.report_to)]

    @contextlib.contextmanager
    def attempt(name: str) -> Iterator[None]:
        try:
            yield
        except (FineTuningError, OSError) as error:
            hint = getattr(error, "hint", "Check the permissions and the disk.")
            checks.append(Check(name, "failed", str(error), hint))

    if checks[0].outcome != "failed":  # the other checks need the packages
        quiet_libraries(datasets)
        checks += check_folders(Path(config.output_dir), cache, config.model_name)
        with attempt("data" if paths else "R2 bucket"):
            bucket, prefix = config.r2_bucket_name, config.r2_data_prefix
            checks.append(check_data(paths, each_of(names), bucket, prefix, cache))
        with attempt("base model"):
            base = open_base_model(config.model_name)
            where = f"{config.model_name} in {base.folder} ({human_bytes(base.file_bytes)})"
            checks.append(Check("base model", "ok", where))
        with attempt("disk"):
            checks.append(check_disk(config, base))
        with attempt("device"):
            check, device, dtype = check_device(config.device, dtype)
            checks.append(check)
        with attempt("init_adapter"):
            checks += check_training(config, base) if base else []
    if base and device:
        plan = functools.partial(plan_memory, base, config, device)
        check, dtype = check_memory(plan, device, dtype)
        checks.append(check)
    for check in checks:
        mark = {"ok": "ok  ", "warning": "WARN", "failed": "FAIL"}[check.outcome]
        log.info("  %s  %-12s %s", mark, check.name, check.detail)
        if check.outcome != "ok":
            log.info("        %-12s -> %s", "", check.hint)
    failed = [check.name for check in checks if check.outcome == "failed"]
    if failed:
        what = f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}."
        again = f"Put these right and start again (the checks alone: {program_command()} check)."
        raise FineTuningError(what, again)
    return PreflightReport(tuple(checks), device, dtype, base)


@functools.cache  # it keeps the lock until the process ends
def claim_output_folder(output_dir: Path) -> "filelock.BaseFileLock | None":
    """Lock the output folder against a second run, and clear away what a killed one left."""
    if not is_main_process():
        return None
    hint = "Wait for it or stop it, or choose another --output_dir."
    taken = FineTuningError(f"Another run is writing to {output_dir}.", hint)
    with disk_errors(output_dir, "--output_dir"):
        held = lock(output_dir.resolve() / ".lock", taken)
        for left in output_dir.glob(".staging-*"):
            shutil.rmtree(left, ignore_errors=True)
    return held


# ======================================================================================
# 8. Stage 2: download
# ======================================================================================
#
# In: the names of local files, or of a bucket's objects. Out: the data as verified files. Whatever
# the network, the server and the disk do, the bytes are right or there is an error: a download goes
# on where it was cut, in a later run too, and gets its name in the cache only once the object's
# ETag proves the bytes, or two downloads were equal. Local files are taken as they are.

CHUNK_BYTES = 64 * 1024
SPARE_BYTES = 64_000_000
CACHE_FLAG = "--cache_dir FOLDER"
# Of uploads by AWS CLI and boto3, rclone, MinIO, Cyberduck, s5cmd.
PART_BYTES = (8 * 2**20, 5 * 2**20, 16 * 2**20, 10 * 2**20, 50 * 2**20)
ALTERED = "Something between here and the bucket changes the data, or the object is damaged: try "
ALTERED += "another network, or upload it again."


def receive_rest(client: Any, wanted: StoredObject, file: "IO[bytes]", advance: Any) -> None:
    """Append what `file` lacks of the object."""
    offset, place = file.seek(0, os.SEEK_END), {"Bucket": wanted.bucket, "Key": wanted.key}
    part = {"Range": f"bytes={offset}-"} if offset else {}
    with bucket_errors(client, wanted.bucket):
        answer = client.get_object(**place, **part, IfMatch=f'"{wanted.etag}"')
    with contextlib.closing(answer["Body"]) as body:
        rest = f"bytes {offset}-{wanted.size - 1}/{wanted.size}"
        same = answer.get("ETag", "").strip('"') == wanted.etag
        if not same or (offset and answer.get("ContentRange") != rest):
            raise BucketError(REPLACED, UPLOADING, "replaced")
        if answer.get("ContentLength") != wanted.size - offset:
            what = f"The server offers {answer.get('ContentLength')} bytes where the object has "
            raise BucketError(f"{what}{wanted.size - offset}.", ALTERED, "again")
        data = b"-"
        while data:
            with bucket_errors(client, wanted.bucket):
                data = body.read(CHUNK_BYTES)
            file.write(data)
            file.flush()
            advance(len(data))


def prove_content(path: Path, etag: str) -> "tuple[bool | None, str]":
    """Return whether the file is the object by its ETag (None: that tells nothing), and how.

    It is the file's MD5, or that of its parts' MD5s, with their number (a multipart upload).
    """
    md5 = functools.partial(hashlib.md5, usedforsecurity=False)
    with path.open("rb") as file:
        if re.fullmatch(r"[0-9a-f]{32}", etag):
            return hashlib.file_digest(file, md5).hexdigest() == etag, "the MD5 in its ETag"
        for size in PART_BYTES:
            if etag.endswith(f"-{-(-path.stat().st_size // size)}"):
                file.seek(0)
                parts = iter(functools.partial(file.read, size), b"")
                digests = b"".join(md5(part).digest() for part in parts)
                if etag.startswith(md5(digests).hexdigest()):
                    return True, f"its multipart ETag ({size} bytes per part)"
    return None, "two equal downloads"


def fill_and_prove(client: Any, wanted: StoredObject, path: Path) -> "tuple[str, str]":
    """Download what the file lacks until its bytes are proven; return SHA-256 and proof."""
    sha256, seen = "", set[str]()
    while sha256 not in seen and len(seen) < ATTEMPTS:
        seen.add(sha256)  # of the bytes that came before
        with path.open("a+b") as file:
            size = functools.partial(file.seek, 0, os.SEEK_END)
            check_space(path, wanted.size - size() + SPARE_BYTES, CACHE_FLAG)
            with progress_bar(wanted.size, "B", "download", size()) as advance:
                receive = functools.partial(receive_rest, client, wanted, file, advance)
                if size() < wanted.size:
                    keep_trying(receive, "again", size)
        right, proof = prove_content(path, wanted.etag.lower())
        sha256 = sha256_of(path)
        if right or (right is None and sha256 in seen):
            return sha256, proof
        path.unlink()
        what = "are not the object's" if right is False else "cannot be proven by the ETag alone"
        log.warning("  The bytes that came %s: compared with another download", what)
    what = f"What {wanted.host} delivers for {wanted.key!r} does not match its ETag."
    raise BucketError(what, ALTERED, "refused")


def download_object(client: Any, wanted: StoredObject, folder: Path) -> StoredObject:
    """Return the verified copy of one version of an object, downloading what is missing."""
    path = copy_path(folder, wanted)
    info, staged = path.name + ".info", Path(f"{path}.partial")
    partial = staged / path.name
    taken = FineTuningError("Another run is downloading this object; waiting for it")
    held = lock(Path(f"{path}.lock"), taken, wait=True)
    try:
        copy = read_copy(folder / info)
        if copy:
            log.info("The cached copy is current and intact: %s", path)
            return copy
        staged.mkdir(exist_ok=True)
        sha256, proof = fill_and_prove(client, wanted, partial)
        copy = wanted._replace(sha256=sha256)
        write_json(staged / info, copy._asdict())
        publish_files(staged, folder, [path.name, info])
        log.info("Downloaded, verified by %s: %s", proof, path)
        return copy
    except BucketError as error:
        if error.kind == "replaced":
            partial.unlink()
        raise
    finally:
        if not (partial.exists() and partial.stat().st_size):
            shutil.rmtree(staged, ignore_errors=True)
        held.release()


def fetch_dataset(config: FineTuningConfig) -> DatasetFile:
    """Return the data as verified local files: `data_path`, or the bucket's chosen objects."""
    paths, folder, files = each_of(config.data_path), Path(config.cache_dir), list[DatasetFile]()
    for path, size in zip(map(Path, paths), check_files(paths), strict=True):
        source = f"local file {shorten(str(path), 300)}"
        log.info("Taken: %s, %s", source, human_bytes(size))
        files.append(DatasetFile(path, size, None, sha256_of(path), source))

    def fetch() -> "list[DatasetFile]":
        chosen = (config.r2_bucket_name, config.r2_data_prefix, each_of(config.dataset_name))
        client, copies, why = find_objects(*chosen, folder)
        log.log(logging.INFO if client else logging.WARNING, "%s", why)
        copies = [download_object(client, one, folder) if client else one for one in copies]
        source = "" if client else "cached copy, bucket not asked: "
        places = [f"{source}{c.host}/{c.bucket}/{shorten(c.key)}" for c in copies]
        facts = [(copy_path(folder, c), c.size, c.etag, c.sha256) for c in copies]
        return [DatasetFile(*f, place) for f, place in zip(facts, places, strict=True)]

    if not paths:
        with disk_errors(folder, CACHE_FLAG):  # an object that is replaced is chosen anew
            files = keep_trying(fetch, "replaced")
    if len(files) == 1:
        return files[0]
    digests, sources = "".join(f.sha256 for f in files), "; ".join(f.source for f in files)
    whole, size = hashlib.sha256(digests.encode()).hexdigest(), sum(f.size for f in files)
    return DatasetFile(files[0].path, size, None, whole, sources, tuple(files))


# ======================================================================================
# 9. Stage 3: prepare
# ======================================================================================
#
# In: verified files. Out: tokenized examples in two sets that share no question, and a report on
# every row. What is trained is what the file says: texts stay as they are, every answer carries
# loss with its own end token, and every key is used or named. A row is left out only when it cannot
# be trained as it stands; what else the checks find is a warning. Rows stream from the file to the
# disk, whatever their number.

# fmt: off
# ruff: disable[E501]
# What keys are used as. They are compared without case, spaces and hidden characters; null and
# blank are absent. All parts of a question are used, in this order; of the others, the first.
TURNS = ("messages", "conversations", "conversation")
QUESTION, INPUT = ("instruction", "prompt", "question", "query"), ("input", "context")
ANSWER = ("output", "response", "completion", "answer")
SYSTEM, MASK = ("system", "system_prompt"), ("weight", "train", "loss")
ROLE, CONTENT = ("role", "from"), ("content", "value", "text")
TELLING_KEYS = {  # not used, although they change what the row means
    "choices": ("choices", "options"),
    "documents": ("documents", "document", "passages", "contexts"),
    "images": ("image", "images", "picture", "pictures", "video", "videos", "audio", "audios"),
    "tool_calls": ("tool_calls", "function_call", "tools", "functions"),
}
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "input"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai", "output", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}

# Checks of single texts: the name, whose texts (None: everyone's), the pattern.
CONTINUED = "[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"  # a byte of UTF-8 after the first, read as CP1252
TEXT_RULES: "tuple[tuple[str, str | None, re.Pattern[str]], ...]" = (
    ("broken_encoding", None, re.compile("\ufffd")),
    ("images", None, re.compile("<image>")),
    ("mojibake", None, re.compile(f"[ÂÃ]{CONTINUED}|â[€‚„†ˆ‰]{CONTINUED}|ï»¿|ï¿½|ðŸ{CONTINUED}|(?:[Ä-Ñã-é]{CONTINUED}){{3}}")),
    ("foreign_marks", None, re.compile(r"<\|\w{2,40}\|>|\[/?INST\]|<</?SYS>>|</s>|<bos>|<eos>|<(?:start|end)_of_turn>|^### (?:Instruction|Response|Input|Human|Assistant):", re.M)),
    # left over where a value was missing ("tuition is $nan"), or a field of a data set was not filled
    ("placeholder_answer", None, re.compile(r"<\s?no\s?(?:input|output)\s?>|[$€£]\s?(?:nan|NaN|None)\b|\b(?:nan|NaN|None|null)(?:%|\spercent\b)")),
    ("placeholder_answer", "assistant", re.compile(r"\A(?:\W*(?:no\s?(?:output|answer|response)|n\s?/\s?a|null|nan|tb[dc]|(?-i:TODO)|placeholder|\[.{0,20}(?:answer|response|output).{0,20}\]|lorem ipsum\b.*)\W*|[.…_-]{3,}|…)\Z", re.I | re.S)),
    ("placeholder_input", "user", re.compile(r"(?:\A|\n\n)\W*(?:no\s?input|none|n\s?/\s?a|null|nan|nil|not applicable)\W*\Z", re.I)),
    # an admission or graduation rate that is probably 100 times too small, but no change of one
    ("implausible_value", None, re.compile(r"\b(?:admissions?|admit|acceptance|graduation|accept|graduate|admi\w+)\b(?=[^.\n]{0,40}(?:rate|share|percentage|%|percent))(?:(?!ris|ros|fell|grew|increas|decreas|declin|drop|chang|differ|fee|interest|loan)(?:[^.\n]|\.\d)){0,80}?(?<![\d.,])(?:0?\.\d+\s?(?:%|per\s?cent\b)(?!\s?points)|0?\.00\d*(?![\d.,]*\s?(?:%|per\s?cent)))", re.I)),
    ("ai_boilerplate", "assistant", re.compile(r"\A.{0,300}?\b(?:(?:as|being) an? (?:(?:ai|artificial intelligence)(?: language)? (?:model|assistant|chatbot)|(?:large )?language model)\b|as an ai,)", re.I | re.S)),
    # no sentence ends with such a word; nor, behind a finished one, with a small letter, but for code, quotations and titles
    ("cut_off_answer", "assistant", re.compile(r"\A(?!.*```)(?=\S+(?:\s+\S+){4}).*(?:[,(\[]|\s(?:the|an?|of|and|or|to|with|in|is|are|was|were|for|that|by|as|at|from|which|but|because|its|their|this|be|has|have|your|his|her|can|will|would|should|into|than|if|when|while|such)|[a-z][.!?][\"'’”]? +[A-Z](?:(?![.!?]\s)[^\n#/@_={}|\\<>\-–—()])*\s[a-z][a-z']*)\Z", re.S)),
)
# What no tokenizer should see; and what is left of LaTeX where JSON takes \f, \b, \a, \v for its own,
# or \t, \n, \r for white space, which only mathematics beside it betrays.
NEVER_TRAINED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")
EATEN = re.compile("\f(?:rac|orall|lat|box)|\b(?:eta|egin|ar|inom|oldsymbol|ig|mod|ullet|ot)|\a(?:lpha|pprox|ngle)|\v(?:ec|ert|dots|arphi)")
EATEN_WHITE = re.compile(r"\t(?:imes|heta|ext\b|au\b|an\b|ilde|riangle|o\b|frac)|\n(?:abla|eq\b|u\b|eg\b|otin)|\r(?:ho\b|ight|angle|m\b)")
MATHEMATICS = re.compile(r"\$|\\[a-zA-Z]+|[\^_]\{|\d\s*=|=\s*\d")
VISIBLE = re.compile(r"[^\s\0-\x1f\x7f-\x9f\u200b-\u200f\u2060\ufeff]")
# Words of little meaning: what a row is about is in the others.
STEM = re.compile(r"\b\w{1,6}")
STOP_STEMS = frozenset(STEM.findall("a an the of in on at to for from by with and or but if is are was were be been being do does did have has had can could will would shall should may might must i you he she it we they me my your his her its our their this that these those what which who whom whose when where why how as not no yes so than then there here about into over under up down out off please tell explain describe give"))
# ruff: enable[E501]
# fmt: on
TWICE = "\0twice"  # in an object with a key that stands twice: that key
FLAGS = {"0": False, "false": False, "1": True, "true": True}  # as tables have them, too
MAX_LINE_BYTES = 64 * 1024 * 1024  # a longer row means that something is wrong with the file
MAX_ARRAY_BYTES = 512 * 1024 * 1024  # what does not stream is read as a whole
LISTED, NOTED, SHOWN = 100_000, 1000, 3  # rows in a list; rows and examples of a check
MAX_LOST_ANSWER_SHARE = 0.01
CHARACTERS_PER_TOKEN = 50  # a row with more of them cannot fit: it is not worth tokenizing
TWO_NEEDED = "At least two different rows are needed, and some hundreds are useful."
SourceRow = tuple["int | None", object]  # line (from 1; None: unknown), value
Place = dict[str, Any]  # file, row and, where known, line


class RowError(Exception):
    """Say why a row is left out: the name of a check, and what was found."""


@functools.lru_cache(10_000)
def clean_name(name: str) -> str:
    return re.sub(r"[^\w-]", "", name).casefold()


def is_filled(value: object) -> bool:
    """Tell whether a value says anything: null, empty lists and blank texts are absent."""
    return bool(VISIBLE.search(value)) if isinstance(value, str) else value not in (None, [], {})


def list_keys(row: "Mapping[Any, object]") -> str:
    told = [str(key) + " (empty)" * (not is_filled(value)) for key, value in row.items()]
    return f"(it has: {shorten(', '.join(told)) or 'nothing'})"


def name_type(value: object) -> str:
    names = {dict: "an object", list: "a list", type(None): "null", bool: "true or false"}
    names.update({str: "text", float: "a number", int: "a number"})
    return "NaN" if value != value else names.get(type(value), f"a {type(value).__name__}")


def hash_of(*texts: str) -> int:
    """Return eight bytes, as a number, that stand for some texts."""
    whole = hashlib.blake2b("\0".join(texts).encode(), digest_size=8)
    return int.from_bytes(whole.digest(), "little")


# --- from files to rows


DATA_KINDS = "The data must be a JSON array, JSON Lines, CSV or Parquet; text in UTF-8."


def file_error(path: Path, what: str, hint: str = DATA_KINDS) -> FineTuningError:
    return FineTuningError(f"{path} {what}", hint)


def read_lines(
    path: Path, advance: "Callable[[int], None]", longest: int = MAX_LINE_BYTES
) -> "Iterator[tuple[int, str]]":
    """Yield the lines of a text file with their numbers; `advance` is told their bytes."""
    offset = 0
    with path.open("rb") as stream:
        for line, raw in enumerate(iter(lambda: stream.readline(longest), b""), 1):
            if len(raw) == MAX_LINE_BYTES:
                what = f"has over {human_bytes(MAX_LINE_BYTES)} in line {line}."
                raise file_error(path, what, "Write one row per line (JSON Lines).")
            try:
                yield line, raw.decode().removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                what = f"ends inside a character (line {line}): was it cut off?"
                hint = "Fetch or export the file again."
                if error.reason != "unexpected end of data":
                    byte, place = raw[error.start], offset + error.start
                    what = f"is not UTF-8: byte 0x{byte:02X} at offset {place} (line {line})."
                    hint = "Save it as UTF-8, such as: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
                raise file_error(path, what, hint) from error
            offset += len(raw)
            advance(len(raw))


def make_object(pairs: "list[tuple[str, object]]") -> "dict[str, object]":
    """Build an object of JSON; mark it where a key stands in it twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        made[TWICE] = Counter(key for key, _ in pairs).most_common(1)[0][0]
    return made


# Whole numbers become floats: Python refuses very long ones.
ROW_DECODER = json.JSONDecoder(parse_int=float, object_pairs_hook=make_object)


def parse_json(text: str, line: int = 1) -> Any:
    """Read a JSON text that begins in this line; raise ValueError with what is wrong."""
    text = text.rstrip()
    try:
        return ROW_DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        cut = error.msg.startswith("Unterminated") or not text[error.pos :]
        ends = " (it ends too early: was it cut off?)" * cut
        raise ValueError(f"{place}: not valid JSON: {error.msg.lower()}{ends}") from error
    except RecursionError as error:
        raise ValueError(f"line {line}: nested too deeply") from error


def read_json_lines(path: Path, advance: "Callable[[int], None]") -> "Iterator[SourceRow]":
    """Yield the rows of JSON Lines; broken lines are counted to the end and told together."""
    broken, rows = [], 0
    for line, text in read_lines(path, advance):
        if not text.strip():
            continue
        try:
            value = parse_json(text, line)
        except ValueError as error:
            broken.append(str(error))
        if not broken:  # after a broken line, the rest is only counted
            yield line, value
        rows += 1
    if broken:
        shown = "\n  - ".join(["", *broken[:5], *["..."] * (len(broken) > 5)])
        what = f"cannot be read: {len(broken)} of {rows} lines are not JSON:{shown}"
        raise file_error(path, what, "Correct or remove these lines, or export the file again.")


def read_document(path: Path, advance: "Callable[[int], None]") -> "Iterable[SourceRow]":
    """Return the rows of a JSON array, or of an object that holds them in a list."""
    if path.stat().st_size > MAX_ARRAY_BYTES:
        what = f"is one JSON text of over {human_bytes(MAX_ARRAY_BYTES)}: that does not stream."
        raise file_error(path, what, "Write it as JSON Lines: one row per line.")
    try:
        rows = parse_json("".join(text for _, text in read_lines(path, advance, -1)))
    except ValueError as error:
        raise file_error(path, f"is broken in {error}.", "Correct or export it again.") from error
    if isinstance(rows, dict):
        lists = [v for v in rows.values() if isinstance(v, list) and dict in map(type, v)]
        if len(lists) != 1 or any(clean_name(key) in (*TURNS, *ANSWER) for key in rows):
            what = f"is one JSON object, not an array of rows {list_keys(rows)}."
            raise file_error(path, what, TWO_NEEDED)
        (rows,) = lists
    return ((None, row) for row in rows)


def read_csv(path: Path, head: str, advance: "Callable[[int], None]") -> "Iterator[SourceRow]":
    """Yield the rows of a table whose first line, `head`, names the columns."""
    columns = {*TURNS, *QUESTION, *INPUT, *ANSWER}
    known, mark = max((len(columns & set(map(clean_name, head.split(m)))), m) for m in ",;\t")
    if known < 2:
        start = repr(shorten(head, 40))
        raise file_error(path, f"is no JSON, and no table of known columns: it starts {start}.")
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = (text for _, text in read_lines(path, advance))
    rows = csv.DictReader(itertools.dropwhile(str.isspace, lines), delimiter=mark, strict=True)
    try:
        if len(set(rows.fieldnames or ())) < len(rows.fieldnames or ()):
            raise file_error(path, "has a column twice.")
        for row in rows:
            if None in row or None in row.values():
                raise csv.Error(f"it has not {len(rows.fieldnames or ())} columns")
            yield None, row
    except csv.Error as error:
        raise file_error(path, f"is broken in line {rows.line_num}: {error}.") from error


def read_parquet(path: Path) -> "Iterator[SourceRow]":
    with library_errors(f"{path} cannot be read as a table", DATA_KINDS, pyarrow.ArrowException):
        table = pyarrow.parquet.ParquetFile(path)
        if len(set(table.schema_arrow.names)) < len(table.schema_arrow.names):
            raise file_error(path, "has a column twice.")
        for batch in table.iter_batches(1000):
            yield from ((None, row) for row in batch.to_pylist())


def read_rows(path: Path, advance: "Callable[[int], None]") -> "Iterator[SourceRow]":
    """Yield the rows of a file, whose kind follows from its content, not from its name."""
    with library_errors(f"{path} cannot be read", "Check the path and its permissions."):
        with path.open("rb") as stream:
            head = stream.peek(2000)[:2000]
            raw = iter(lambda: stream.readline(MAX_LINE_BYTES), b"")
            lines = (line.removeprefix(b"\xef\xbb\xbf").strip() for line in raw)
            first, second = (*itertools.islice(filter(None, lines), 2), b"", b"")[:2]
        encoding = json.detect_encoding(head)
        text = head.decode(encoding, "ignore")
        if head.startswith(b"PAR1"):
            yield from read_parquet(path)
        elif not first:
            raise file_error(path, "is empty: it holds no rows.")
        elif len(re.findall(r"[\0-\x08\x0e-\x1f]", text)) > 2 or len(text) * 8 < len(head):
            hint = "Unpack it where it is packed, or export the data again."
            raise file_error(path, "is a binary file, not text.", hint)
        elif not encoding.startswith("utf-8"):
            wide = encoding[:6].upper()
            hint = f"Convert it: iconv -f {wide} -t UTF-8 OLD > NEW"
            raise file_error(path, f"is {wide}, not text in UTF-8.", hint)
        # An object over several lines opens with a line that is left unfinished.
        elif first[:1] == b"{" and second and first.endswith(b"}"):
            yield from read_json_lines(path, advance)
        elif first[:1] in (b"[", b"{"):
            yield from read_document(path, advance)
        else:
            yield from read_csv(path, first.decode("utf-8", "replace").replace('"', ""), advance)


# --- from a row of any known shape to a conversation


def take(fields: "dict[str, Any]", keys: "Iterable[str]") -> "tuple[str, Any] | None":
    """Take the first of these keys that is there out of the fields, with its value."""
    return next(((key, fields.pop(key)) for key in keys if key in fields), None)


@dataclass
class Row:
    """Hold one row: its messages, which of them are answers with loss, and what was found."""

    end_token: str
    messages: "list[dict[str, str]]" = field(default_factory=list)
    answers: "list[int]" = field(default_factory=list)  # places of the answers that carry loss
    notes: "dict[str, str]" = field(default_factory=dict)  # by check: what was found
    unused: "set[str]" = field(default_factory=set)  # keys

    def read(self, row: object, system: "str | None", turns: str) -> None:
        """Read a row; `turns` is assistant_turns. Raise RowError where it cannot be trained."""
        if not isinstance(row, dict):
            raise RowError("not_an_object", f"the row is {name_type(row)}, not an object")
        if {"chosen", *TURNS, *QUESTION, *ANSWER}.isdisjoint(clean_name(str(k)) for k in row):
            raise RowError("unknown_shape", f"none of the known keys {list_keys(row)}")
        self.read_object(row)
        roles = [m["role"] for m in self.messages]
        if "user" not in roles:
            raise RowError("empty_instruction", "the user says nothing")
        if "assistant" not in roles:
            raise RowError("no_answer", "no turn is the assistant's")
        end = len(roles) - roles[::-1].index("assistant")
        if end < len(roles):
            self.notes["unanswered_turn"] = f"{len(roles) - end} not used"
            del self.messages[end:]
        if turns == "last":
            self.answers = [place for place in self.answers if place == end - 1]
        if not self.answers:
            raise RowError("masked", "weight, train or loss takes out what could be trained")
        if system and roles[0] != "system":
            self.messages.insert(0, {"role": "system", "content": system})
            self.answers = [place + 1 for place in self.answers]

    def read_fields(self, row: "dict[Any, object]") -> "tuple[dict[str, Any], bool]":
        """Return what an object says, by clean key, and whether its answer is to carry no loss."""
        if TWICE in row:
            self.notes["repeated_key"] = f"{row.pop(TWICE)!r} stands twice"
        fields: dict[str, Any] = {clean_name(str(k)): v for k, v in row.items() if is_filled(v)}
        texts = {key: str(fields.get(key)).lower().removesuffix(".0") for key in (*MASK, "label")}
        flags = {key: FLAGS[text] for key, text in texts.items() if text in FLAGS}
        for key in flags:  # others are keys that are not used
            del fields[key]
        if flags.pop("label", True) is False:
            self.notes["negative_label"] = "label is false"
        return fields, False in flags.values()

    def note_unused(self, fields: "dict[str, Any]", prefix: str = "") -> None:
        """Note the fields that nothing has taken."""
        self.unused.update(prefix + key for key in fields)
        for check, keys in TELLING_KEYS.items():
            found = [prefix + key for key in keys if key in fields]
            self.notes.update({check: f"{found[-1]} is not used"} if found else {})

    def read_object(self, row: "dict[Any, object]") -> None:
        """Add the messages of a row, or of a turn that is a pair of question and answer."""
        fields, masked = self.read_fields(row)
        system, turns = take(fields, SYSTEM), take(fields, (*TURNS, "history"))
        if system:
            self.add("system", *system)
        if turns:
            self.read_turns(*turns, masked)
        if not turns or turns[0] == "history":
            self.read_question(row, fields)
            answer = take(fields, ANSWER)
            if answer is None and "chosen" in fields:
                what = "chosen and rejected are not trained here; give the good one as output"
                raise RowError("preference_pair", what)
            if answer is None:
                raise RowError("empty_output", f"no output {list_keys(row)}")
            if isinstance(answer[1], list):
                self.read_turns(*answer, masked)
            else:
                self.add("assistant", *answer, masked)
        self.note_unused(fields)

    def read_question(self, row: "dict[Any, object]", fields: "dict[str, Any]") -> None:
        """Add what the user says in the fields of a row: all that is there."""
        texts: list[str] = []
        for key in (*QUESTION, *INPUT):
            value = fields.pop(key, None)
            if isinstance(value, list) and key in QUESTION:
                self.read_turns(key, value, False)
            elif value is not None and (key in INPUT or value not in texts):
                texts.append(self.text(key, value))
        if texts:
            self.add("user", "the question", "\n\n".join(texts))
        elif not any(m["role"] == "user" for m in self.messages):
            raise RowError("empty_instruction", f"no instruction {list_keys(row)}")

    def read_turns(self, name: str, turns: Any, masked: bool) -> None:
        """Add the messages of a list of turns, which may be written as text."""
        written = turns
        for parse in (json.loads, ast.literal_eval) if isinstance(written, str) else ():
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                turns = parse(written)
                break
        if not isinstance(turns, list):
            raise RowError("not_text", f"{name} is {name_type(written)}, not a list of turns")
        for number, turn in enumerate(turns, 1):
            if name == "history" and isinstance(turn, (list, tuple)) and len(turn) == 2:
                self.read_object({"input": turn[0], "output": turn[1], "train": not masked})
            elif isinstance(turn, dict):
                self.read_turn(name, f"turn {number}", turn, masked)
            else:
                what = name_type(turn) + " without a role" * isinstance(turn, str)
                raise RowError("bad_turn", f"turn {number} is {what}")

    def read_turn(self, name: str, where: str, turn: "dict[Any, object]", masked: bool) -> None:
        """Add the message of one turn, or those of a pair of question and answer."""
        fields, own = self.read_fields(turn)
        said = take(fields, ROLE)
        if said is None and any(key in fields for key in ANSWER):
            self.read_object(turn)
            return
        role = ROLES.get(clean_name(str(said[1]))) if said else None
        if role not in ("system", "user", "assistant"):
            tool = ": tool use is not trained here" * (role == "tool")
            shown = f"the role {shorten(repr(said[1]), 40)}{tool}" if said else "no role"
            raise RowError("bad_turn", f"{where} has {shown} {list_keys(turn)}")
        found = take(fields, CONTENT)
        content = found[1] if found else ""
        if isinstance(content, list):  # OpenAI's parts: texts can be joined, pictures cannot
            with contextlib.suppress(TypeError, KeyError):
                content = "".join(p["text"] if isinstance(p, dict) else p for p in content)
        self.note_unused(fields, f"{name}[].")
        if found or role != "system":
            call = " (a tool call)" * bool(take(fields, TELLING_KEYS["tool_calls"]))
            self.add(role, where + call, content, masked or own)

    def add(self, role: str, name: str, value: object, masked: bool = False) -> None:
        """Add a message; an answer carries loss unless it is masked or nothing was asked yet."""
        text = self.text(name, value)
        while role == "assistant" and text.rstrip().endswith(self.end_token):
            text = text.rstrip().removesuffix(self.end_token)
            self.notes["appended_end_token"] = f"{name} ends with {self.end_token}"
        if not VISIBLE.search(text):
            check = "empty_output" if role == "assistant" else "bad_turn"
            raise RowError(check, f"{name} is empty")
        if role == "assistant" and not masked and any(m["role"] == "user" for m in self.messages):
            self.answers.append(len(self.messages))
        message = {"role": role, "content": text}
        if role != "system" or message not in self.messages:  # as a key and as a turn
            self.messages.append(message)

    def text(self, name: str, value: object) -> str:
        """Return a value as the text that is trained; raise RowError where it is none.

        Nothing is changed but what no tokenizer should see: a byte order mark and NUL vanish; CR
        LF, VT, FF and a lone CR become LF, and other control characters a space.
        """
        if not isinstance(value, str):
            raise RowError("not_text", f"{name} is {name_type(value)}, not text")
        eaten = EATEN.search(value) or (MATHEMATICS.search(value) and EATEN_WHITE.search(value))
        if eaten:
            self.notes["eaten_backslash"] = f"{name} holds {eaten[0]!a}"
        value = value.replace("\r\n", "\n")
        went = sorted(set(NEVER_TRAINED.findall(value)))
        if not went:
            return value
        codes = ", ".join(f"U+{ord(c):04X}" for c in went)
        if any("\ud800" <= c <= "\udfff" for c in went):
            raise RowError("undecodable", f"{name} holds half a character ({codes})")
        self.notes["control_characters"] = f"{name} held {codes}"
        value = re.sub("[\0\ufeff]", "", value)
        return NEVER_TRAINED.sub(lambda m: "\n" if m[0] in "\v\f\r" else " ", value)

    def check_texts(self, special: "re.Pattern[str]") -> None:
        """Note what a person should look at; raise RowError where the model's own tokens stand."""
        asked = ""
        for place, message in enumerate(self.messages):
            role, text = message["role"], message["content"].strip()
            found = special.search(message["content"])
            if found:
                raise RowError("special_tokens", f"a text of the {role}'s holds {found[0]!r}")
            for check, whose, pattern in TEXT_RULES:
                found = pattern.search(text) if whose in (None, role) else None
                if found and not (whose and text.casefold() in asked.casefold()):
                    times = len(pattern.findall(text))
                    self.notes[check] = f"{role}: {shorten(found[0][-60:])!r}, {times} times"
            if place in self.answers:
                if text in (asked, *asked.partition("\n\n")):
                    self.notes["answer_repeats_question"] = repr(text[:60])
                if len(re.findall(r"^\s*```", text, re.MULTILINE)) % 2:
                    self.notes["unbalanced_code_fence"] = f"… {text[-60:]!r}"
            asked = text


# --- the stream: every row is read, checked, tokenized and stored once


@dataclass
class Tally:
    sums: "Counter[str]" = field(default_factory=Counter)  # by check and list; of tokens
    found: "dict[str, list[Place]]" = field(default_factory=lambda: defaultdict(list))
    unused: "Counter[str]" = field(default_factory=Counter)  # keys

    def note(self, place: Place, check: str, detail: str, *names: str) -> None:
        """Count a row under names: of the check, of one of the report's lists, or both."""
        for name in names or (check,):
            self.sums[name] += 1
            if len(self.found[name]) < LISTED:
                known = {name: value for name, value in place.items() if value is not None}
                self.found[name].append({**known, "reason": check, "detail": detail})


def encode_row(
    row: Row, tokenizer: "Tokenizer", limit: int, cut: bool, sums: "Counter[str]"
) -> "dict[str, Any]":
    """Return the columns of a row that fits into `limit` tokens, if need be `cut` at its end.

    Rows are compared by hashes: of the whole, of what stands before each answer, of words.
    """
    characters = [len(m["content"]) for m in row.messages]
    if sum(characters) > limit * CHARACTERS_PER_TOKEN:
        lost = sum(characters[place] for place in row.answers) // 4  # estimated
        sums.update(answer_tokens=lost, lost_tokens=lost)
        raise RowError("over_length", f"{sum(characters)} characters, far over {limit} tokens")
    try:
        example, merged = tokenize_answers(tokenizer, row.messages, row.answers)
    except FineTuningError as error:
        raise RowError("template", str(error)) from error
    row.notes.update({"merged_tokens": shorten(merged, 40)} if merged else {})
    ids, spans = example["input_ids"], example["spans"]
    answered = sum(end - start for start, end in spans)
    spans = [[start, min(end, limit)] for start, end in spans if start < limit]
    kept = sum(end - start for start, end in spans) if cut or len(ids) <= limit else 0
    sums.update(answer_tokens=answered, lost_tokens=answered - kept)
    sums["longest"] = max(sums["longest"], len(ids))
    if len(ids) > limit:
        row.notes["over_length"] = f"{len(ids)} tokens, more than {limit}"
        if not kept:
            raise RowError("over_length", row.notes["over_length"])
        row.notes["over_length"] += f": {answered - kept} of its answers are cut off"
    masked = sum(m["role"] == "assistant" for m in row.messages) - len(row.answers)
    said, asked, replies = list[str](), list[int](), list[int]()
    for place, message in enumerate(row.messages):
        plain = message["content"]
        plain = (plain if plain.isascii() else unicodedata.normalize("NFKC", plain)).casefold()
        words = re.sub(r"\W+", " ", plain).strip() or plain
        if place in row.answers:
            asked.append(hash_of(*said))
            replies.append(hash_of(words))
        said += [words] * (message["role"] != "system")
    stems = sorted(set(STEM.findall(" ".join(said))) - STOP_STEMS)
    *before, last = row.messages[: row.answers[-1] + 1]
    question = "\n\n".join(m["content"] for m in before if m["role"] != "system")
    sums.update(question=len(question), answer=len(last["content"]))
    return {
        "question": question, "answer": last["content"], "input_ids": ids[:limit], "spans": spans,
        "length": min(len(ids), limit), "answers": len(row.answers), "masked": masked,
        "supervised": kept, "characters": sum(map(len, said)), "asked": asked, "answered": replies,
        "key": hash_of(repr(row.messages), repr(row.answers)),
        "stems": rensa.RMinHash.hash_token_sets([stems])[0],
    }  # fmt: skip


def encode_rows(
    file: DatasetFile, config: FineTuningConfig, base: BaseModel, limit: int, tally: Tally
) -> "Iterator[dict[str, Any]]":
    """Yield the columns of every row that can be trained; the others are tallied with reasons."""
    tokenizer, cut = base.tokenizer, config.overlong == "truncate"
    added = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
    marks = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, marks)))
    names = Counter(part.path.name for part in file.files)
    with progress_bar(file.size, "B", "preparing") as advance:
        for part in file.files:
            name = part.path.name if names[part.path.name] == 1 else str(part.path)
            for number, (line, value) in enumerate(read_rows(part.path, advance)):
                place = {"file": name, "row": number, "line": line}
                row = Row(str(tokenizer.eos_token))
                tally.sums["total"] += 1
                try:
                    row.read(value, config.system_prompt, config.assistant_turns)
                    row.check_texts(special)
                    columns = encode_row(row, tokenizer, limit, cut, tally.sums)
                except RowError as error:
                    check, detail = error.args
                    kind = "rejected" if CHECKS[check][0] == "reject" else "dropped"
                    tally.note(place, check, detail, check, kind)
                    continue
                for check, detail in row.notes.items():
                    also = ["truncated"] * (check == "over_length")
                    tally.note(place, check, detail, check, *also)
                tally.unused.update(row.unused)
                left_out = next((c for c in config.drop_checks if c in row.notes), None)
                yield {**place, **columns, "left_out": left_out}


def store_rows(rows: "Iterator[dict[str, Any]]", cache: Path) -> "datasets.Dataset":
    """Write rows to a file in the cache folder, which lives as long as the process."""
    text, number, bits = (datasets.Value(kind) for kind in ("string", "int64", "uint64"))
    tokens, hashes = datasets.List(datasets.Value("int32")), datasets.List(bits)
    columns = {
        "file": text, "row": number, "line": number, "question": text, "answer": text,
        "input_ids": tokens, "spans": datasets.List(tokens), "length": number, "answers": number,
        "masked": number, "supervised": number, "characters": number, "left_out": text, "key": bits,
        "asked": hashes, "answered": hashes, "stems": hashes,
    }  # fmt: skip
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob("prepared-*"):  # by runs that were killed
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.TemporaryDirectory(prefix="prepared-", dir=cache)
    atexit.register(folder.cleanup)
    path, schema = f"{folder.name}/rows.arrow", datasets.Features(columns).arrow_schema
    with pyarrow.OSFile(path, "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for batch in iter(lambda: list(itertools.islice(rows, 200)), []):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
    return datasets.Dataset.from_file(path)


# --- what rows have to do with each other

# Similarity is the weighted share of common word stems, question and answer together. A stem weighs
# the more the fewer rows have it, so that a paraphrase, which keeps the rare words, is nearer than
# the same sentence about another college. Measured on 1,537 unlike rows with 12 paraphrased pairs
# among them: all 12 are above 0.25, and 22 others, all closely related. Near duplicates also share
# words when all weigh the same: 99, 97, 93 % found of rows with one, two, three words changed.
NEAR_DUPLICATE, NEAR_DUPLICATE_UNWEIGHTED, SAME_FAMILY = 0.6, 0.65, 0.25
LARGEST_FAMILY = 20  # rows that only similarity joins: chains of it would join everything
BANDS = 48  # of two MinHash values each; a common one makes rows candidates
STEMS_AT_ONCE = 4_000_000  # rows further apart than that are compared by their questions only
OUTLIER = 20  # times as many characters as half of the rows have
MOST_CANDIDATES = 8  # earlier rows that a row is compared with


def find_candidates(bags: "list[list[int]]") -> "Iterable[tuple[int, int]]":
    """Return pairs (earlier, later) of rows that share MinHash bands: at most 8 for a row.

    rensa's own LSH returns every pair of a set of variants; neighbours in a band are enough.
    """
    rows, few, found = len(bags), len(bags) <= 5000, []
    signature = np.empty((rows, 2 * BANDS), np.uint64)
    for start in range(0, rows, 5000):
        part = bags[start : start + 5000]
        matrix = rensa.RMinHash.digest_matrix_from_token_hash_sets(part, 2 * BANDS, 42)
        signature[start : start + 5000] = matrix.to_rows()
    for band in range(BANDS):
        key = signature[:, 2 * band] << np.uint64(32) | signature[:, 2 * band + 1]
        order = np.argsort(key, kind="stable")
        for distance in range(1, 9 if few else 5):
            same = np.flatnonzero(key[order[distance:]] == key[order[:-distance]])
            found.append(order[same + distance] * rows + order[same])
    pairs, common = np.unique(np.concatenate(found), return_counts=True)
    pairs, common = pairs[common > 1 - few], common[common > 1 - few]  # of many, one is chance
    pairs = pairs[np.lexsort((-common, pairs // rows))]
    number = np.arange(len(pairs)) - np.searchsorted(pairs // rows, pairs // rows)
    later, earlier = np.divmod(pairs[number < MOST_CANDIDATES], rows)
    return zip(earlier.tolist(), later.tolist(), strict=True)


def similar_pairs(stems: "list[list[int]]") -> "list[tuple[int, int, bool]]":
    """Return pairs of similar rows (earlier, later, near duplicate), most similar first."""
    bags, frequency = [set(row) for row in stems], Counter(itertools.chain.from_iterable(stems))
    rows = len(bags)
    # Whole numbers, whose sum does not depend on the order.
    weight = {stem: round(1000 * math.log1p(rows / n) ** 2) for stem, n in frequency.items()}
    whole = [sum(weight[stem] for stem in bag) for bag in bags]
    # Without frequent stems, a sentence that many rows share does not make them alike.
    most = max(50, rows // 50)
    alike: list[tuple[float, int, int, bool]] = []
    for one, two in find_candidates([[s for s in bag if frequency[s] <= most] for bag in bags]):
        both = bags[one] & bags[two]
        shared = sum(weight[stem] for stem in both)
        similarity = shared / max(1, whole[one] + whole[two] - shared)
        if similarity >= SAME_FAMILY:
            plain = len(both) / len(bags[one] | bags[two])
            near = similarity >= NEAR_DUPLICATE and plain >= NEAR_DUPLICATE_UNWEIGHTED
            alike.append((-similarity, one, two, near))
    return [(one, two, near) for _, one, two, near in sorted(alike)]


def join_families(
    size: int, always: "Iterable[Sequence[int]]", alike: "Iterable[Sequence[int]]"
) -> "list[int]":
    """Return for each row the first of its family; pairs of `alike` join while that stays small."""
    family, members = list(range(size)), [[row] for row in range(size)]
    for pairs, largest in ((always, size), (alike, LARGEST_FAMILY)):
        for one, other in pairs:
            first, second = sorted((family[one], family[other]))
            if first != second and len(members[first]) + len(members[second]) <= largest:
                for row in members[second]:
                    family[row] = first
                members[first] += members[second]
    return family


def relate_rows(
    table: "datasets.Dataset", tally: Tally, keep_duplicates: bool
) -> "tuple[dict[str, list[int]], list[int]]":
    """Note what rows have to do with each other; return the rows by check, and their families.

    A family are rows that must not stand on both sides of the split: near duplicates, paraphrases,
    and rows that ask the same. It is named by the key of its first row.
    """
    column = table.data.column
    keys, sizes = column("key").to_pylist(), column("characters").to_numpy()
    said = zip(column("asked").to_pylist(), column("answered").to_pylist(), strict=True)
    # For a key, a question or a row: the earlier row that is the same, asks the same, or is near.
    first, same, other, near = (dict[int, int]() for _ in range(4))
    questions: dict[int, tuple[int, int]] = {}
    together, alike = list[Sequence[int]](), list[Sequence[int]]()
    for row, pairs in enumerate(said):
        if first.setdefault(keys[row], row) < row and not keep_duplicates:
            same[row] = first[keys[row]]
            continue
        for question, answer in zip(*pairs, strict=True):
            origin, told = questions.setdefault(question, (row, answer))
            together.append((origin, row))
            if told != answer:
                other[row] = origin
    kept = [row for row in range(len(table)) if row not in same]
    stems = column("stems").combine_chunks()
    step = max(1000, STEMS_AT_ONCE * len(table) // max(1, len(stems.flatten())))
    if step < len(kept):
        log.info("  near duplicates are looked for among %d rows at a time", step)
    for start in range(0, len(kept), step):
        block = kept[start : start + step]
        for one, two, is_near in similar_pairs(stems.take(block).to_pylist()):
            pair = block[one], block[two]
            (together if is_near else alike).append(pair)
            if is_near and pair[1] not in other and keys[pair[0]] != keys[pair[1]]:
                near.setdefault(pair[1], pair[0])
    usual = float(np.median(sizes[kept])) if kept else 0.0
    long = {row: row for row in kept if sizes[row] > OUTLIER * usual}
    related, places = dict[str, list[int]](), table.select_columns(["file", "row", "line"])
    for check, how, earlier in (
        ("exact_duplicate", "the same as row {}: {!r}, there {!r}", same),
        ("contradiction", "asks as row {}: {!r}, there {!r}", other),
        ("near_duplicate", "nearly row {}: {!r}, there {!r}", near),
        ("length_outlier", f"many times the usual {usual:.0f} characters", long),
    ):
        related[check] = sorted(earlier)
        for row, before in sorted(earlier.items()):
            here, there = (shorten(column("answer")[n].as_py(), 50) for n in (row, before))
            detail = how.format(places[before]["row"], here, there)
            tally.note(places[row], check, detail)
    return related, [keys[row] for row in join_families(len(table), together, alike)]


# --- the split, the report, and what it takes to go on


def choose_sides(families: "list[int]", config: FineTuningConfig) -> "tuple[list[int], list[int]]":
    """Return the places to train on and those to hold out; a family is never torn.

    Families come in the order of a seeded hash. The largest one is trained on, and so is one that
    would take too much of the smaller side.
    """
    members, rows = defaultdict(list), len(families)
    for place, family in enumerate(families):
        members[family].append(place)
    if len(members) < 2:
        what = "All usable rows are versions of one question: none can be held out for evaluation."
        raise FineTuningError(what, TWO_NEEDED)
    order = sorted(members, key=lambda family: hash_of(str(config.seed), str(family)))
    trained = members.pop(max(order, key=lambda family: len(members[family])))
    held_out, most = list[int](), max(1, round(config.eval_split * rows))
    whole = config.train_split + config.eval_split > 1 - 1e-9
    rest = rows if whole else round(config.train_split * rows)
    for side, size, largest in (held_out, most, max(10, most / 2)), (trained, rest, rows):
        for family in order:
            if family in members and len(members[family]) <= min(largest, size - len(side)):
                side += members.pop(family)
        if not held_out:
            held_out += members.pop(min(members, key=lambda family: len(members[family])))
    return sorted(trained), sorted(held_out)


def build_report(tally: Tally, table: "datasets.Dataset", kept: "np.ndarray") -> QualityReport:
    sums, lists, column = tally.sums, tally.found, table.data.column
    total, valid = sums["total"], sums["total"] - sums["rejected"]
    sums["unused_keys"] = max(tally.unused.values(), default=0)
    details = {
        name: {
            "count": sums[name], "action": action, "meaning": meaning,
            "rows": [f["row"] for f in lists[name][:NOTED]], "examples": lists[name][:SHOWN],
        }
        for name, (action, meaning) in sorted(CHECKS.items(), key=lambda item: -sums[item[0]])
        if sums[name]
    }  # fmt: skip
    if tally.unused:
        shown = [f"{key} ({count} rows)" for key, count in tally.unused.most_common()]
        details["unused_keys"]["examples"] = [{"detail": text} for text in shown]
    names = "answers", "masked", "supervised", "length"
    answers, masked, supervised, length = (int(column(n).to_numpy()[kept].sum()) for n in names)
    asked, answered = (round(sums[n] / max(1, len(table)), 2) for n in ("question", "answer"))
    return QualityReport(
        total_examples=total, valid_examples=valid, quality_score=round(valid / max(1, total), 6),
        empty_instructions=sums["empty_instruction"], empty_outputs=sums["empty_output"],
        avg_instruction_length=asked, avg_output_length=answered,
        checks={name: sums[name] for name in CHECKS}, check_details=details,
        answers=answers, masked_answers=masked, supervised_tokens=supervised,
        unsupervised_tokens=length - supervised, lost_answer_tokens=sums["lost_tokens"],
        longest_example=sums["longest"], dropped_examples=sums["dropped"],
        truncated_examples=sums["truncated"],
        **{name: tuple(lists[name]) for name in ("rejected", "dropped", "truncated")},
    )  # fmt: skip


def publish_report(report: QualityReport, output_dir: Path, log_dir: Path) -> Path:
    """Log what the checks have found, and write it, not over a finished run's; return where."""
    left_out = report.total_examples - report.valid_examples + report.dropped_examples
    usable = f"{report.valid_examples} usable (quality score {report.quality_score:.3f})"
    what = "  %d rows: %s; %d left out, %d truncated"
    log.info(what, report.total_examples, usable, left_out, report.truncated_examples)
    for name, found in report.check_details.items():
        log.info("  %-24s %6d  %-6s  %s", name, found["count"], found["action"], found["meaning"])
        for example in found["examples"]:
            place = f"row {example['row']}: " if "row" in example else ""
            log.info("      %s%s", place, shorten(example["detail"], 110))
    path = output_dir / QUALITY_FILE
    if any((output_dir / name).exists() for name in (METRICS_FILE, ADAPTER_FILE)):
        path = log_dir / f"quality_report_{datetime.now():%Y%m%d_%H%M%S}.json"
    if is_main_process():
        write_whole(path, dataclasses.asdict(report), "--output_dir")
    return path


def pass_gates(
    report: QualityReport, least: float, limit: int, lost: float, path: Path, yes: bool
) -> None:
    """Stop where nothing is usable; ask where too little is, or where too much would be lost."""
    total, valid, score = report.total_examples, report.valid_examples, report.quality_score
    if not total:
        raise FineTuningError("The data set holds no rows.", TWO_NEEDED)
    shown = ""
    for entry in report.rejected[:5]:
        line = f" (line {entry['line']})" if "line" in entry else ""
        shown += f"\n  - row {entry['row']}{line}: {shorten(entry['detail'], 160)}"
    if not valid:
        what = f"None of the {total} rows is usable:{shown}"
        raise FineTuningError(what, f"Every row with its reason: {path}")
    gates = []
    if score < least:
        what = f"quality score {score:.3f}, below min_data_quality_score {least:g}"
        what = f"Only {valid} of {total} rows are usable: {what}.{shown}\n"
        gates.append((what, f"Correct the rows that {path} lists."))
    if lost > MAX_LOST_ANSWER_SHARE:
        what = f"{report.checks['over_length']} rows are longer than {limit} tokens: {lost:.1%} of"
        longest = f"(the longest row has {report.longest_example} tokens) or shorten the rows."
        gates.append((f"{what} all answer tokens are lost.", f"Raise --max_seq_length {longest}"))
    for what, hint in gates:
        if not once_for_all(functools.partial(ask, what + " Go on?", yes=yes)):
            raise FineTuningError(what, hint + " Or go on anyway with --yes.")


def prepare_dataset(file: DatasetFile, config: FineTuningConfig) -> PreparedData:
    base, cache, tally = open_base_model(config.model_name), Path(config.cache_dir), Tally()
    tokenizer, limit = base.tokenizer, min(config.max_seq_length, base.positions)
    with disk_errors(cache, "--cache_dir"):
        table = store_rows(encode_rows(file, config, base, limit, tally), cache)
    related, families = relate_rows(table, tally, config.keep_duplicates)
    own = table.data.column("left_out").to_pylist()
    left_out = {row: check for row, check in enumerate(own) if check}
    for check in (*config.drop_checks, "exact_duplicate"):
        left_out |= dict.fromkeys(related.get(check, ()), check)
    places = table.select_columns(["file", "row", "line"])
    for row, check in sorted(left_out.items()):
        tally.note(places[row], check, CHECKS[check][1], "dropped")
    kept = np.array([row for row in range(len(table)) if row not in left_out], int)
    report = build_report(tally, table, kept)
    path = publish_report(report, Path(config.output_dir), Path(config.log_dir))
    lost = report.lost_answer_tokens / max(1, tally.sums["answer_tokens"])
    pass_gates(report, config.min_data_quality_score, limit, lost, path, config.yes)
    if not len(kept):
        reasons = Counter(row["reason"] for row in report.dropped).most_common()
        told = ", ".join(f"{count} {reason}" for reason, count in reasons)
        raise FineTuningError(f"No row is left to train on ({told}).", f"All reasons: {path}")
    sides = choose_sides([families[row] for row in kept], config)
    train, held_out = (table.select(kept[side]) for side in sides)
    unused = len(kept) - len(train) - len(held_out)
    why = f", {unused} unused (train_split + eval_split < 1)" * bool(unused)
    log.info("  split: %d to train, %d to evaluate%s", len(train), len(held_out), why)
    lengths = table.data.column("length").to_numpy()[kept]
    told = f"mean {lengths.mean():.0f}, median {np.median(lengths):.0f}, longest {lengths.max()}"
    log.info("  tokens per example: %s", told)
    told = f"with loss: {report.answers} answers, {report.supervised_tokens} tokens; without: "
    log.info("  %s%d answers, %d tokens", told, report.masked_answers, report.unsupervised_tokens)
    turns = np.array(train["answers"]) + np.array(train["masked"])
    chosen = list(dict.fromkeys([int(turns.argmax()), *range(len(train))][:4]))[:3]
    shown = tuple(show_example(tokenizer, typing.cast("Example", train[n])) for n in chosen)
    for number, text in list(zip(chosen, shown, strict=True))[:2]:
        what = "  row %d as it is trained (what carries loss stands between ⟦ and ⟧):\n%s"
        log.info(what, train[number]["row"], text)
    log.info("  quality report: %s", path)
    columns = ["file", "row", "question", "answer", "input_ids", "spans", "length", "supervised"]
    train, held_out = train.select_columns(columns), held_out.select_columns(columns)
    return PreparedData(train, held_out, tokenizer, base, report, file, limit, shown)


# ======================================================================================
# 10. Stage 4: train
# ======================================================================================
#
# In: prepared examples, the device that preflight chose, the settings. Out: the model with its best
# adapter, the metrics, and the history of the losses; in output_dir, checkpoints that are whole.
# TRL's SFTTrainer runs the optimizer, the schedule, the order of the examples and the trackers. Its
# "batch" is the whole effective batch, which the engine cuts into passes. Evaluation and
# checkpoints (in Trainer's format, with this run's record) are our own. A step's dropout depends on
# its number alone, so that any interruption leads to the same adapter (on the CPU to the last bit).
# Numbers that are not finite never reach the weights; a device that gives no others, or has no
# memory left, hands over to the CPU. Another run's output is never replaced without --overwrite.

BEST_ADAPTER = "best_adapter.safetensors"
HANG_SECONDS = 300.0  # of a step or an evaluation, or ten times the usual
MORE_MEMORY = "Close other programs, lower --max_seq_length or --lora_r, or add --bf16."
# What makes two runs the same run, beside the bytes of the data, of the base model and of
# init_adapter. Anything else may change between an interruption and its resume.
RUN_SETTINGS = (
    "max_seq_length", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay",
    "warmup_steps", "max_grad_norm", "optim", "lr_scheduler_type", "fp16", "bf16",
    "float32_matmul_precision", "seed", "train_split", "eval_split", "assistant_turns", "overlong",
    "drop_checks", "keep_duplicates", "system_prompt",
)  # fmt: skip
DIGESTS = {
    "data_sha256": "the data are others (data_sha256)",
    "base_digest": "the base model is another one: its files have changed (base_digest)",
    "init_adapter_sha256": "init_adapter is another one (init_adapter_sha256)",
}


# --- which run it is, and what an earlier one left


def run_identity(config: FineTuningConfig, data: PreparedData) -> "dict[str, Any]":
    """Return what must agree for a checkpoint or a result to belong to this run."""
    settings, start = saved_settings(config), config.init_adapter
    return {name: settings[name] for name in RUN_SETTINGS} | {
        "data_sha256": data.source.sha256,
        "base_digest": data.base.digest,
        "init_adapter_sha256": sha256_of(open_adapter(Path(start)).weights) if start else None,
    }


def differences(theirs: "dict[str, Any]", ours: "dict[str, Any]") -> "list[str]":
    return [
        DIGESTS.get(name) or f"{name} was {theirs.get(name)!r} and is now {value!r}"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]


def list_checkpoints(output: Path) -> "dict[int, Path]":
    """Return the checkpoint folders by step, newest first."""
    found = {folder.name[11:]: folder for folder in output.glob("checkpoint-*")}
    steps = sorted((int(name) for name in found if name.isdecimal()), reverse=True)
    return {step: found[str(step)] for step in steps if str(step) in found}


def newest_whole_checkpoint(output: Path) -> "Path | None":
    """Return the newest checkpoint that is whole, naming those passed over."""
    for folder in list_checkpoints(output).values():
        problem = damage(folder)
        if problem is None:
            return folder
        log.warning("  %s is passed over: %s", folder.name, problem)
    return None


def finished_settings(output: Path) -> "dict[str, Any] | None":
    """Return the settings of the finished run in a folder with its provenance; None without one."""
    if not (output / METRICS_FILE).is_file():
        return None
    with contextlib.suppress(FineTuningError, KeyError, TypeError):
        saved = read_json(output / CONFIG_FILE)
        if isinstance(saved["provenance"]["identity"], dict):
            return saved
    what = f"{output} holds {METRICS_FILE}, but no whole record of its run ({CONFIG_FILE})."
    raise FineTuningError(what, f"Move {METRICS_FILE} elsewhere, or choose another --output_dir.")


def find_finished_run(config: FineTuningConfig, data: PreparedData) -> "RunArtifacts | None":
    """Return this very run's result where the output folder already holds it, whole."""
    output, ours = Path(config.output_dir), saved_settings(config)
    theirs = None if config.overwrite or config.resume != "auto" else finished_settings(output)
    if theirs is None or differences(theirs["provenance"]["identity"], run_identity(config, data)):
        return None  # train_lora says what differs
    try:
        metrics = read_json(output / METRICS_FILE)
        before, after = (f"{metrics[n]:.4f}" for n in ("eval_loss_before", "eval_loss"))
        whole = sha256_of(output / ADAPTER_FILE) == metrics["adapter_sha256"]
    except (FineTuningError, OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        log.warning("The result in %s is damaged; it is written again", output)
        return None
    log.info("\nThis run is finished and its adapter is whole: %s", output)
    log.info("  eval loss %s before, %s after (%s)", before, after, metrics.get("verdict"))
    idle = [name for name in ours if name in theirs and theirs[name] != ours[name]]
    if idle:
        log.info("  these settings change nothing in a finished run: %s", ", ".join(idle))
    log.info("  --overwrite trains it anew")
    return RunArtifacts(output, metrics)


def remove_checkpoints(folders: "Iterable[Path]") -> None:
    """Delete checkpoints that this program wrote; what cannot be deleted is named and stays."""
    for folder in folders:
        try:
            remove_published(folder)
        except (OSError, FineTuningError) as error:
            log.warning("  %s cannot be deleted: %s", folder, first_line(error))


def choose_checkpoint(
    output: Path, resume: str, identity: "dict[str, Any]", *, overwrite: bool
) -> "Path | None":
    """Return the checkpoint to go on from; another run's output is refused, or replaced."""
    given = None if resume in ("auto", "never") else Path(resume)
    problem = damage(given) if given else None
    if problem:
        hint = "--resume auto takes the newest whole checkpoint of output_dir."
        raise FineTuningError(f"--resume {given} cannot be used: {problem}.", hint)
    newest, finished = newest_whole_checkpoint(output), finished_settings(output)
    there = read_json(newest / PROGRESS_FILE) if newest else (finished or {}).get("provenance")
    found = {output: differences(there["identity"], identity) if there else []}
    if given:
        found[given] = differences(read_json(given / PROGRESS_FILE)["identity"], identity)
    for place, different in found.items():
        if different and not (overwrite and place is output):
            hint = "Set the same values again, or choose another --output_dir"
            hint += ", or replace that run with --overwrite." if place is output else "."
            raise FineTuningError("\n  - ".join([f"{place} holds another run:", *different]), hint)
    starts_anew = given is None and (overwrite or resume == "never")
    if found[output] or (there and starts_anew):
        log.info("  replacing the earlier run in %s", output)
        for name in (METRICS_FILE, *RUN_FILES) if finished else ():  # without the first it is none
            (output / name).unlink(missing_ok=True)
        folders = list_checkpoints(output).values()
        remove_checkpoints(f for f in folders if not (given and f.samefile(given)))
    return given or (None if starts_anew else newest)


# --- one training


@dataclass
class RunState:
    """Remember what a run has done; written into each checkpoint as progress.json."""

    identity: "dict[str, Any]"
    budget: int  # tokens of a forward pass
    recompute: bool
    seconds: float = 0.0
    steps: "list[dict[str, float]]" = field(default_factory=list)
    evaluations: "list[dict[str, float]]" = field(default_factory=list)

    @property
    def best(self) -> "dict[str, float] | None":
        """Return the evaluation with the least loss, the first of them."""
        return min(self.evaluations, key=lambda e: e["eval_loss"], default=None)

    def is_out_of_patience(self, patience: "int | None") -> bool:
        since_best = self.evaluations[::-1].index(self.best) if self.best else 0
        return since_best >= (patience or math.inf)


@contextlib.contextmanager
def watched(what: str, device: str, resume: str, usual: float = 0) -> Iterator[None]:
    """Say so when the block seems to hang; when a GPU hangs on, begin again on the CPU.

    `resume` is the setting, `usual` the seconds that such a block takes.
    """
    patience, ended = max(HANG_SECONDS, 10 * usual), threading.Event()

    def bark() -> None:
        if ended.wait(patience):
            return
        words = "  %s has not ended for %s: wait, or stop with Ctrl-C and go on with --device "
        words += "cpu. The log file shows where every thread stands"
        log.warning(words, what, human_seconds(patience))
        for handler in logging.getLogger().handlers:  # `dump_traceback_later` was seen to crash
            if isinstance(handler, SafeHandler) and handler.name == "file":
                faulthandler.dump_traceback(handler.stream)
        if device != "cpu" and process_count() == 1 and not ended.wait(2 * patience):
            log.warning("  %s hangs: beginning again from the last checkpoint on the CPU", what)
            again = ["--device", "cpu", "--overwrite", "false"]
            again += ["--resume", "auto" if resume == "never" else resume]
            script = str(Path(__file__).resolve())
            os.execv(sys.executable, [sys.executable, script, *sys.argv[1:], *again])  # noqa: S606

    dog = threading.Thread(target=bark, name="watchdog", daemon=True)
    dog.start()
    try:
        yield
    finally:
        ended.set()
        dog.join()  # it holds the model


@dataclass
class Training:
    model: "PeftModel"
    run: RunState
    config: FineTuningConfig
    device: str  # "cuda", "mps", "cpu"
    periodic: "datasets.Dataset"  # what evaluations during training look at
    steps: int  # planned
    done: int  # when this process began
    saved: int  # the step of the last checkpoint
    started: float  # when the run began, less the time between its processes
    best: "dict[str, Tensor]" = field(default_factory=dict)  # the best adapter so far
    trainer: Any = None  # TRL's SFTTrainer
    advance: "Callable[..., None]" = print  # of the progress bar

    def watch(self, what: str) -> "contextlib.AbstractContextManager[None]":
        """Watch over a step, or over an evaluation."""
        usual = (time.monotonic() - self.started) / max(1, len(self.run.steps))
        return watched(what, self.device, self.config.resume, usual)

    def accumulate(self, examples: "Sequence[Example]", supervised: int) -> "tuple[float, float]":
        """Add up the gradients of one effective batch; return its mean loss and their norm."""
        args, step, mps = self.trainer.args, self.trainer.state.global_step, torch.mps
        held = mps.driver_allocated_memory() if self.device == "mps" else 0
        if held and held > 0.8 * mps.recommended_max_memory():  # every size is kept apart
            mps.empty_cache()
        parameters = [p for p in self.model.train().parameters() if p.requires_grad]
        grads = [torch.zeros_like(p) for p in parameters]
        for parameter, gradient in zip(parameters, grads, strict=True):
            parameter.grad = gradient
        passes = plan_passes([len(e["input_ids"]) for e in examples], self.run.budget)
        total, base = torch.zeros(1, device=args.device), typing.cast("Any", base_of(self.model))
        counted = torch.zeros_like(base.layers_run)
        mine = range(args.process_index, len(passes), args.world_size)
        for number in mine:
            stop.raise_if_asked()
            seed = (args.seed * 1_000_003 + step) * 10_007 + number  # depends on nothing before it
            layout = lay_out([examples[i] for i in passes[number]], str(args.device), seed)
            base.layers_run.zero_()
            part = pass_loss(self.model, layout) / supervised
            counted += base.layers_run
            self.trainer.accelerator.backward(part)
            total += part.detach()
        if args.world_size > 1:  # summed, not averaged: a pass is weighted by the whole batch
            for part in (*grads, total):
                torch.distributed.all_reduce(part)
        scaler = self.trainer.accelerator.scaler
        norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in grads])
        figures = [total[0], torch.linalg.vector_norm(norms), counted.float()]
        loss, norm, layers = torch.stack(figures).tolist()  # waits for the device, once
        due = len(base.get_decoder().layers) * len(mine)
        if layers != due:  # the device dropped work, which leaves old numbers in its place
            loss = math.nan
        return loss, norm / (scaler.get_scale() if scaler else 1)

    def step(self, examples: "Sequence[Example]", supervised: int) -> float:
        """Compute one step's gradients; numbers that are not finite never reach the optimizer."""
        trainer, step, failures = self.trainer, self.trainer.state.global_step + 1, 0
        lengths = [len(e["input_ids"]) for e in examples]
        while failures < 2:
            try:
                loss, norm = self.accumulate(examples, supervised)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or process_count() > 1:
                    raise
            else:
                # fp16: its scaler skips steps that overflow.
                if math.isfinite(loss) and (math.isfinite(norm) or trainer.accelerator.scaler):
                    break
                failures += 1
                log.warning("Step %d: the loss or a gradient is not finite (loss %s)", step, loss)
                continue
            self.relieve(max(lengths))  # here the failed pass is freed
        else:
            told = f"Step {step} gives no finite numbers on {self.device}, twice over"
            raise FloatingPointError(told)
        rate = trainer.lr_scheduler.get_last_lr()[0]
        counts = {"examples": len(examples), "tokens": sum(lengths), "supervised": supervised}
        record = {"step": step, "loss": loss, "learning_rate": rate} | counts
        self.run.steps.append(record | ({"grad_norm": norm} if math.isfinite(norm) else {}))
        return loss

    def relieve(self, longest: int) -> None:
        """Take the next rung down: half the budget, then recomputed activations, then the CPU."""
        self.model.zero_grad()
        empty_device_cache(self.device)
        if self.run.budget > longest:
            self.run.budget = max(self.run.budget // 2, longest)
            log.warning("Out of memory: forward passes of at most %d tokens", self.run.budget)
        elif not self.run.recompute and self.config.gradient_checkpointing != "off":
            self.run.recompute = True
            recompute_activations(self.model)
            log.warning("Out of memory: activations are recomputed from here (slower)")
        else:
            raise MemoryError(f"one example of {longest} tokens is too much")

    def step_done(self) -> None:
        """Show a finished step; evaluate, stop and save where that is due."""
        config, state, records = self.config, self.trainer.state, self.run.steps
        now, seconds = state.global_step, time.monotonic() - self.started
        speed = f"{sum(r['tokens'] for r in records) / seconds:.0f} tokens/s"
        memory = human_bytes(peak_memory(self.device))
        self.advance(1, f"loss {records[-1]['loss']:.3f}, {speed}, {memory}")
        if now in (2, self.steps) or now % config.logging_steps == 0:
            recent = [r["loss"] for r in records[-config.logging_steps :]]
            left = human_seconds((self.steps - now) * seconds / len(records))
            norm, rate = records[-1].get("grad_norm", math.nan), records[-1]["learning_rate"]
            words = f"loss {sum(recent) / len(recent):.4f}  grad norm {norm:.3f}  lr {rate:.2e}"
            log.info("  step %d/%d  %s  %s  %s left", now, self.steps, words, speed, left)
        self.evaluate_if_due()
        if self.run.is_out_of_patience(config.early_stopping_patience):
            words = "  early stopping: %d evaluations without a better eval loss"
            log.info(words, config.early_stopping_patience)
            self.trainer.control.should_training_stop = True
        if self.trainer.control.should_training_stop or now % config.save_steps == 0:
            self.save()

    def evaluate_if_due(self) -> None:
        """Evaluate on the periodic examples, once a step, and remember the best adapter."""
        trainer, step, best = self.trainer, self.trainer.state.global_step, self.run.best
        is_due = step and (step % self.config.eval_steps == 0 or step == self.steps)
        if not is_due or any(record["step"] == step for record in self.run.evaluations):
            return
        budget = evaluation_budget(self.run.budget, self.device)
        with self.watch(f"The evaluation after step {step}"):
            loss = mean_loss(self.model, self.periodic, budget, str(trainer.args.device))
        if not math.isfinite(loss):
            raise FloatingPointError(f"The evaluation after step {step} gives no finite loss")
        record = {"step": step, "eval_loss": loss, "examples": len(self.periodic)}
        self.run.evaluations.append(record)
        words = f"best {best['eval_loss']:.4f} at step {best['step']}" if best else ""
        if best is None or loss < best["eval_loss"]:
            self.best, words = adapter_weights(self.model), "the best so far"
        log.info("  step %d: eval loss %.4f (%s)", step, loss, words)
        trainer.log({"eval_loss": loss})

    def save(self) -> int:
        """Publish the last finished step for Trainer to resume from; return its number."""
        trainer, config, best = self.trainer, self.config, self.run.best
        now, output = int(trainer.state.global_step), Path(config.output_dir)
        if now == self.saved or not is_main_process():
            return now
        self.run.seconds, self.saved = time.monotonic() - self.started, now
        weights = adapter_weights(self.model)
        if not all(value.isfinite().all() for value in weights.values()):
            raise FloatingPointError("The adapter's weights are not finite")
        check_space(output, 4 * sum(v.nbytes for v in weights.values()), "--output_dir")
        with staging_folder(output / f"checkpoint-{now}", "--output_dir") as staged:
            self.model.peft_config["default"].save_pretrained(str(staged))
            safetensors.torch.save_file(weights, staged / ADAPTER_FILE)
            if self.best:
                safetensors.torch.save_file(self.best, staged / BEST_ADAPTER)
            trainer.state.save_to_json(str(staged / "trainer_state.json"))
            parts = {"optimizer": trainer.optimizer, "scheduler": trainer.lr_scheduler}
            for name, part in (parts | {"scaler": trainer.accelerator.scaler}).items():
                if part:
                    torch.save(part.state_dict(), staged / f"{name}.pt")
            write_json(staged / PROGRESS_FILE, dataclasses.asdict(self.run))
            try:
                publish_folder(staged, output / f"checkpoint-{now}")
            except FineTuningError as error:  # something else has that name; the next one will do
                log.warning("  %s", error)
                return now
        # The best and the newest stay; those of later steps, which were passed over, go first.
        best_step = best["step"] if best else now
        folders = list_checkpoints(output)
        steps = sorted(folders, key=lambda n: (n != now, n != best_step, n > now, -n))
        remove_checkpoints(folders[n] for n in steps[config.save_total_limit :])
        return now

    def train(self, checkpoint: "Path | None") -> None:
        """Run the trainer from a checkpoint, or from the start; nothing where all is done."""
        if checkpoint:
            load_adapter_weights(self.model, checkpoint / ADAPTER_FILE)
            self.trainer.state.global_step = self.done
            best = checkpoint / BEST_ADAPTER
            self.best = safetensors.torch.load_file(best) if best.is_file() else {}
            self.evaluate_if_due()  # the run may have been stopped in that evaluation
        patience = self.config.early_stopping_patience
        if self.done >= self.steps or self.run.is_out_of_patience(patience):
            return
        try:
            # Old PyTorch runs code out of its old format, and of states that are not ours.
            for path in checkpoint.glob("*.pt*") if checkpoint else ():
                if path.suffix != ".pt" or not zipfile.is_zipfile(path):
                    raise pickle.UnpicklingError
            self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except pickle.UnpicklingError as error:
            what = f"{checkpoint} holds Python objects where only tensors belong; none was loaded."
            raise FineTuningError(what, "Delete the folder and start again.") from error
        self.run.seconds = time.monotonic() - self.started


def collate(examples: "list[Example]") -> "dict[str, Any]":
    """Return a whole effective batch: its examples, and labels for Trainer to count."""
    labels = itertools.chain.from_iterable(map(labels_of, examples))
    return {"examples": examples, "labels": torch.tensor(list(labels))}


def build_trainer(training: Training, data: PreparedData) -> "trl.SFTTrainer":
    """Build TRL's trainer; its "batch" is a whole effective batch, which the engine cuts up."""
    config, batch = training.config, training.config.effective_batch
    sampler = accelerate.data_loader.SeedableRandomSampler(data.train, data_seed=config.seed)
    workers = min(config.dataloader_num_workers, os.cpu_count() or 1)
    how: Any = {"sampler": sampler, "num_workers": workers}
    if config.dataloader_num_workers:  # a forked child of a process that has used MPS hangs
        how["multiprocessing_context"] = "spawn"
    loader = torch.utils.data.DataLoader(data.train, batch, collate_fn=collate, **how)

    class EngineTrainer(trl.SFTTrainer):
        def get_train_dataloader(self):
            """Yield whole effective batches, in SFTTrainer's order, to every process alike."""
            return loader

        def training_step(self, model, inputs, num_items_in_batch=None):  # noqa: ARG002
            with training.watch(f"Step {self.state.global_step + 1}"):
                loss = training.step(inputs["examples"], int(num_items_in_batch))
            return torch.tensor(loss, device=self.args.device)

    class Follower(transformers.TrainerCallback):
        def on_epoch_begin(self, args, state, control, **_):  # noqa: ARG002
            """Shuffle by seed and epoch, in a resumed epoch too."""
            sampler.set_epoch(int((state.epoch or 0) + 1e-6))

        def on_step_end(self, args, state, control, **_):  # noqa: ARG002
            training.step_done()

    same = (
        "output_dir", "num_train_epochs", "learning_rate", "weight_decay", "warmup_steps", "seed",
        "max_grad_norm", "optim", "lr_scheduler_type", "logging_steps", "report_to",
    )  # fmt: skip
    # Every precision and memory default of SFTConfig is set: the engine decides these.
    settings = {name: getattr(config, name) for name in same}
    if training.device == "mps" and config.optim == "adamw_torch":
        settings["optim"] = "adamw_torch_fused"  # one kernel a step instead of one a tensor
    recompute = "activation_checkpointing"
    settings[recompute if hasattr(trl.SFTConfig, recompute) else "gradient_checkpointing"] = False
    args = trl.SFTConfig(
        **settings,
        per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        bf16=False, fp16=config.fp16 and training.device == "cuda",
        use_cpu=training.device == "cpu", average_tokens_across_devices=False, max_length=None,
        logging_nan_inf_filter=False, save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    others: Any = {"processing_class": data.tokenizer, "callbacks": [Follower()]}
    trainer = EngineTrainer(training.model, args, collate, train_dataset=data.train, **others)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def keep_awake() -> None:
    """Keep a Mac from falling asleep until this process ends; say when it runs on its battery."""
    if sys.platform == "darwin" and is_main_process():
        with contextlib.suppress(OSError):
            subprocess.Popen(["caffeinate", "-is", "-w", str(os.getpid())])
        battery = psutil.sensors_battery()
        if battery and not battery.power_plugged:
            log.warning("  on battery (%d %%): plug the power supply in", battery.percent)


def peak_memory(device: str) -> int:
    """Return the most memory that was in use, in bytes: the driver's count, else the process's."""
    counts = {"cuda": torch.cuda.max_memory_allocated, "mps": torch.mps.driver_allocated_memory}
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return counts[device]() if device in counts else peak


def periodic_examples(data: PreparedData, config: FineTuningConfig) -> "datasets.Dataset":
    """Pick the examples to evaluate during training: about a tenth of the time's worth."""
    count = config.max_eval_examples or max(1, config.eval_steps * config.effective_batch // 5)
    order = data.eval.shuffle(seed=config.seed, keep_in_memory=True)
    return order.select(range(min(len(order), count)))


def load_trainable(
    data: PreparedData, report: PreflightReport, config: FineTuningConfig, *, recompute: bool
) -> "PeftModel":
    """Load the base model, and put a fresh or an earlier adapter and the engine on it."""
    torch.set_float32_matmul_precision(config.float32_matmul_precision)
    shape = {name: getattr(config, name) for name in ("lora_alpha", "lora_dropout")}
    shape |= {"r": config.lora_r, "target_modules": list(config.target_modules)}
    base = load_base_model(data.base, report.device, report.dtype)
    model = add_adapter(base, data.base, config.seed, **shape)
    if config.init_adapter:
        start = open_adapter(Path(config.init_adapter))
        for name, flag in (("r", "lora_r"), ("lora_alpha",) * 2, ("target_modules",) * 2):
            pair = start.settings.get(name), shape[name]
            theirs, ours = (" ".join(sorted(v)) if isinstance(v, list) else v for v in pair)
            if theirs != ours:
                what = f"init_adapter {start.path} has {flag} {theirs}, and this run has {ours}."
                raise FineTuningError(what, f"Set --{flag} {theirs}.")
        load_adapter_weights(model, start.weights)
        log.info("  starting from the adapter in %s", start.path)
    trainable, total = model.get_nb_trainable_parameters()
    share = 100 * trainable / total
    log.info("  trainable parameters: %s of %s (%.2f %%)", f"{trainable:,}", f"{total:,}", share)
    if report.device == "cpu" and sys.platform == "linux":  # 5 to 10 % of a step
        with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
            ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # keep freed memory: M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
    if recompute:
        recompute_activations(model)
        log.info("  activations are recomputed (--gradient_checkpointing)")
    install_engine(model)
    return model


def make_plan(
    data: PreparedData, report: PreflightReport, config: FineTuningConfig
) -> "tuple[MemoryPlan, int, float]":
    """Say what the run will be; return its memory, its steps and its price in trained tokens."""
    lengths, batch, rate = list(data.train["length"]), config.effective_batch, config.learning_rate
    memory = plan_memory(data.base, config, report.device, report.dtype, lengths)
    steps = math.ceil(config.num_train_epochs * math.ceil(len(lengths) / batch))
    tokens = round(sum(lengths) * steps * batch / len(lengths))
    often = sum(periodic_examples(data, config)["length"]) * (steps // config.eval_steps + 1)
    # In the end all of them: without the adapter, with it, and with the one that was saved.
    evaluated = often + 3 * sum(data.eval["length"])
    words = f"{tokens:,} tokens to train on, {evaluated:,} to evaluate"
    log.info("  plan: %d steps of %d examples, %s", steps, batch, words)
    log.info("  forward passes of at most %d tokens; memory: %s", memory.budget, memory.reason)
    warm = 0 if config.lr_scheduler_type == "constant" else config.warmup_steps
    if warm > steps / 2:
        words = "  warmup_steps %d of %d steps: the learning rate gets to %.2g of the %.2g that "
        words += "were asked for. Set --warmup_steps %d"
        log.warning(words, warm, steps, rate * min(1, steps / warm), rate, steps // 10)
    if rate < 5e-5 and config.optim.startswith("adamw"):
        words = "  learning_rate %g is far below what LoRA usually takes (1e-4 to 2e-4): where the "
        log.info(words + "loss hardly falls, set --learning_rate 2e-4", rate)
    return memory, steps, tokens + evaluated / 2  # there is no backward pass in an evaluation


def estimate_run(data: PreparedData, report: PreflightReport, config: FineTuningConfig) -> None:
    """Compute the gradients of two steps, time the second, and print what the run would take."""
    with memory_in_words("A training step", MORE_MEMORY):
        memory, _, price = make_plan(data, report, config)
        model = load_trainable(data, report, config, recompute=memory.recompute).train()
        rows = data.train.shuffle(seed=config.seed, keep_in_memory=True)  # these are their places
        size = min(config.effective_batch, len(rows))
        for places in (range(size), range(len(rows) - size, len(rows))):
            batch = [rows[place] for place in places]
            lengths = [len(e["input_ids"]) for e in batch]
            started = time.monotonic()
            for indices in plan_passes(lengths, memory.budget):
                pass_loss(model, lay_out([batch[i] for i in indices], report.device)).backward()
            next(p.grad for p in model.parameters() if p.grad is not None).sum().item()  # waits
            seconds = time.monotonic() - started
    total = human_seconds(price * seconds / sum(lengths))
    log.info("  a measured step took %s, so the run takes about %s", human_seconds(seconds), total)


def finish_training(training: Training, data: PreparedData, dtype: str) -> TrainResult:
    """Load the best adapter, evaluate it and the base completely, and gather the metrics."""
    model, state, device = training.model, training.run, training.device
    steps = best_step = training.trainer.state.global_step
    if training.best and state.best:
        load_adapter_weights(model, training.best)
        best_step = int(state.best["step"])
    budget = evaluation_budget(state.budget, device)
    with watched("The last evaluation", device, training.config.resume):
        eval_loss = mean_loss(model, data.eval, budget, device)
        with model.disable_adapter():
            before = mean_loss(model, data.eval, budget, device)
    if not math.isfinite(eval_loss + before):
        raise FloatingPointError("The last evaluation gives no finite loss")
    told = f"eval loss {before:.4f} before, {eval_loss:.4f} after (the adapter of step {best_step})"
    log.info("  %s", told)
    trainable, total = model.get_nb_trainable_parameters()
    counted = ("examples", "tokens", "supervised")
    examples, tokens, supervised = (sum(r[name] for r in state.steps) for name in counted)
    summed, seconds = sum(r["loss"] * r["supervised"] for r in state.steps), state.seconds or 1e-9
    metrics = {
        "train_loss": summed / (supervised or 1), "eval_loss": eval_loss,
        "eval_loss_before": before, "best_step": best_step, "total_steps": steps,
        "planned_steps": training.steps, "train_runtime": round(seconds, 3),
        "train_samples_per_second": round(examples / seconds, 3),
        "train_tokens_per_second": round(tokens / seconds, 1),
        "input_tokens": tokens, "supervised_tokens": supervised,
        "peak_memory_gb": round(peak_memory(device) / 1e9, 3), "device": device, "dtype": dtype,
        "trainable_params": trainable, "total_params": total,
        "trainable_percent": round(100 * trainable / total, 4),
        "train_examples": len(data.train), "eval_examples": len(data.eval),
        "periodic_eval_examples": len(training.periodic),
        "truncated_examples": data.quality.truncated_examples,
        "dropped_examples": data.quality.dropped_examples,
        "resumed_from_step": training.done or None, "data_sha256": data.source.sha256,
    }  # fmt: skip
    history = sorted([*state.steps, *state.evaluations], key=lambda record: record["step"])
    return TrainResult(model, data.tokenizer, metrics, tuple(history), budget, state.identity)


def train_on(
    data: PreparedData, config: FineTuningConfig, report: PreflightReport, checkpoint: "Path | None"
) -> TrainResult:
    """Train on one device from a checkpoint, or from the start, to the end."""
    memory, steps, _ = make_plan(data, report, config)
    state = RunState(run_identity(config, data), memory.budget, memory.recompute)
    if checkpoint:
        log.info("  resuming from %s", checkpoint)
        state = RunState(**read_json(checkpoint / PROGRESS_FILE))
        wanted = {"on": True, "off": False}
        state.recompute = wanted.get(config.gradient_checkpointing, state.recompute)
    model = load_trainable(data, report, config, recompute=state.recompute)
    prove_engine(model, data.train, report.device)
    periodic, done = periodic_examples(data, config), len(state.steps)
    began = time.monotonic() - state.seconds
    training = Training(model, state, config, report.device, periodic, steps, done, done, began)
    training.trainer = build_trainer(training, data)
    bar = progress_bar(steps, "steps", "training", initial=done, lines=False)
    stop.deferred = True
    try:
        with bar as training.advance:
            training.train(checkpoint)
        return finish_training(training, data, report.dtype)
    except KeyboardInterrupt:
        step, how = training.save(), "the same command goes on from there"
        if config.overwrite or config.resume != "auto":
            how = "with --resume auto and without --overwrite, it goes on from there"
        log.warning("Stopped after step %d of %d; %s", step, steps, how)
        raise
    finally:
        stop.deferred = False


def train_lora(
    data: PreparedData, report: PreflightReport, config: FineTuningConfig
) -> TrainResult:
    """Train the adapter, resuming from this run's last checkpoint; the best weights are loaded."""
    output, how = Path(config.output_dir), (config.resume, run_identity(config, data))
    checkpoint = once_for_all(lambda: choose_checkpoint(output, *how, overwrite=config.overwrite))
    keep_awake()
    while True:
        hint = "Lower --learning_rate, and look for broken rows: python unified_finetune.py data"
        try:
            return train_on(data, config, report, checkpoint)
        except FloatingPointError as error:
            reason = str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = f"Out of memory on {report.device}: {first_line(error)}"
            hint = f"{MORE_MEMORY} What was finished is kept in checkpoints."
        if report.device == "cpu" or process_count() > 1:
            raise FineTuningError(f"{reason}.", hint)
        gc.collect()  # the first model goes before the second one comes
        empty_device_cache(report.device)
        log.warning("%s; going on from the last checkpoint on the CPU in float32", reason)
        report = dataclasses.replace(report, device="cpu", dtype="float32")
        checkpoint = newest_whole_checkpoint(output) or checkpoint


# ======================================================================================
# 11. Stage 5: save
# ======================================================================================
#
# In: the trained model. Out: the output folder with the adapter and its account: numbers, report,
# model card. What is published was read back from the disk into a fresh base model and does there
# what the trained one does. The settings, whose provenance claims the other files, come first, the
# metrics, which mark a finished run, last. What the user put there is never replaced.

RUN_AGAIN = "The checkpoints are untouched: run the same command again, and this is done anew."

# --- before and after: the same questions without and with the adapter

SAMPLE_ANSWERS = 8
SAMPLE_TOKENS = 64  # of an answer; enough to see whether it is one


def answer_samples(
    result: TrainResult, data: PreparedData, own: Sequence[str], system_prompt: "str | None"
) -> "list[dict[str, Any]]":
    """Answer the user's questions, then held-out ones spread over the lengths, both ways.

    Return question, reference (None for the user's own), and the Answer of base and of tuned.
    """
    model, tokenizer = result.model.eval(), result.tokenizer
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    chats = [[*system, {"role": "user", "content": text}] for text in own]
    asked: list[Any] = [(c[-1]["content"], None, tokenize_prompt(tokenizer, c)) for c in chats]
    lengths = list(data.eval["length"])
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    count = min(SAMPLE_ANSWERS, len(order))
    for place in [order[(2 * k + 1) * len(order) // (2 * count)] for k in range(count)]:
        row = data.eval[place]
        asked.append((row["question"], row["answer"], row["input_ids"][: row["spans"][-1][0]]))
    for asking in [a for a in asked if len(a[2]) > data.base.positions - SAMPLE_TOKENS]:
        log.warning("  too long to answer, left out: %s", shorten(asking[0]))
        asked.remove(asking)
    longest = max((len(prompt) for _, _, prompt in asked), default=0) + SAMPLE_TOKENS
    size, samples = max(1, result.budget // longest), list[dict[str, Any]]()
    told = memory_in_words("Answering the sample questions", "Close programs. " + RUN_AGAIN)
    with told, engine_off(model), progress_bar(len(asked), "questions", "answering") as advance:
        for batch in (asked[i : i + size] for i in range(0, len(asked), size)):
            prompts = [prompt for _, _, prompt in batch]
            with model.disable_adapter():
                base = generate(model, tokenizer, prompts, max_new_tokens=SAMPLE_TOKENS)
            tuned = generate(model, tokenizer, prompts, max_new_tokens=SAMPLE_TOKENS)
            names = ("question", "reference", "base", "tuned")
            for asking, *both in zip(batch, base, tuned, strict=True):
                samples.append(dict(zip(names, (*asking[:2], *both), strict=True)))
            advance(len(batch))
    return samples


# --- the adapter test: what was written, read back into a fresh base, does what was trained

FAILED_TEST = f"\n{'=' * 80}\nTHE ADAPTER FAILED ITS TEST. IT IS NOT SAVED. Read back:\n  - "
NOTHING_MOVED = "The learning rate moved nothing: set --learning_rate (2e-5 is the default), keep "
NOTHING_MOVED += "--warmup_steps well below the run's steps, and start anew with --overwrite."


def probe_logits(model: "PeftModel", examples: "datasets.Dataset") -> "torch.Tensor":
    """Return the logits of each example's last 32 positions [positions, vocabulary], on the CPU."""
    rows = [torch.tensor([ids], device=base_of(model).device) for ids in examples["input_ids"]]
    with torch.inference_mode():
        parts = [model(input_ids=row, use_cache=False).logits[0, -32:] for row in rows]
        return torch.cat([part.float().cpu() for part in parts])


def prove_adapter(model: "PeftModel", data: PreparedData, folder: Path) -> "dict[str, Any]":
    """Compare the adapter in `folder`, on a fresh base, with `model`; refuse one that differs."""
    device, dtype = str(base_of(model).device), str(base_of(model).dtype).removeprefix("torch.")
    examples = data.eval.select(range(min(4, len(data.eval))))
    again = RUN_AGAIN + " If it fails again, test this machine's disk and memory."
    with memory_in_words("A fresh copy of the base model", "Close programs. " + RUN_AGAIN):
        with engine_off(model):
            trained, tuned = adapter_weights(model), probe_logits(model, examples)
            with model.disable_adapter():
                base = probe_logits(model, examples)
        model.to("meta")  # whoever still refers to it: memory holds one base at a time
        gc.collect()
        empty_device_cache(device)
        plain = load_base_model(data.base, device, dtype)
        try:
            fresh = attach_adapter(plain, open_adapter(folder), device).eval()
        except FineTuningError as error:
            raise FineTuningError(FAILED_TEST + str(error), again) from error
        found, logits = adapter_weights(fresh), probe_logits(fresh, examples)
    changed = [n for n in trained if n not in found or not found[n].equal(trained[n])]
    difference, effect = (float((logits - x).norm() / x.norm()) for x in (tuned, base))
    wrong = [f"{len(changed)} of its {len(trained)} tensors are not those trained"] * bool(changed)
    if not difference <= tolerance_of(device, dtype):
        wrong.append(f"its logits differ by {difference:.2%} from those of the trained model")
    if effect == 0:
        wrong.append("it adds nothing to the base model: every lora_B is zero or too small")
    if wrong:
        hint = NOTHING_MOVED if effect == 0 and not changed else again
        raise FineTuningError(FAILED_TEST + "\n  - ".join(wrong), hint)
    log.info("  adapter test passed: read back it is the trained one, bit for bit")
    facts = {"reloaded_logit_error": difference, "adapter_logit_effect": effect}
    return facts | {"adapter_tensors": len(found)}


# --- the verdict: what the losses say, in plain words

NOTHING_GAINED = 0.002  # of the base's loss: the noise of rounding and of small eval splits
BARELY_GAINED = 0.03
LOSS_RISE = 0.01  # above the best eval loss, in the last two evaluations


def curve(history: "Sequence[Mapping[str, float]]", name: str) -> "list[tuple[float, float]]":
    """Pick (step, value) of one figure out of a run's records."""
    return [(r["step"], r[name]) for r in history if math.isfinite(r.get(name, math.nan))]


def judge_training(
    before: float, after: float, history: "Sequence[Mapping[str, float]]", rows: int
) -> "dict[str, Any]":
    """Say how a training went, why that is to be believed, and the one next thing to try."""
    # Unlike `before` and `after`, evals may be of a sample: they are compared with each other only.
    evals, losses = curve(history, "eval_loss"), curve(history, "loss")
    rates = [rate for _, rate in curve(history, "learning_rate")] or [0.0]
    rate, steps, climb = max(rates), len(rates), rates.index(max(rates)) + 1
    gain = (before - after) / before if before > 0 else 0.0
    best_step, best = min(evals, key=lambda point: point[1], default=(0, 0.0))
    later = [loss for step, loss in evals if step > best_step][-2:]
    rose = len(later) == 2 and min(later) > best * (1 + LOSS_RISE)
    until = [loss for step, loss in losses if step <= best_step][-20:] or [0.0]
    since = [loss for step, loss in losses if step > best_step][-20:] or [0.0]
    by_heart = rose and sum(since) / len(since) < sum(until) / len(until)
    so_far = min([loss for _, loss in evals[:-1]], default=0.0) * (1 - NOTHING_GAINED)
    falling = gain > 0 and len(evals) > 2 and evals[-1][1] < so_far
    start = int(best_step) if gain > 0 else 0
    # fmt: off
    # ruff: disable[E501]
    kinds = (  # of this table and the next, the first row that holds
        (by_heart, "overfitting", f"Overfitting {f'since step {start}' if start else 'from the start'}."),
        (gain < NOTHING_GAINED, "not learning", "It is not learning."),
        (gain < BARELY_GAINED, "barely", "It barely learned."),
        (True, "learned", "It learned."),
    )
    advice = (
        (by_heart, "Add more varied rows, or train for fewer epochs."),
        (rose or gain < -NOTHING_GAINED, f"Lower --learning_rate to {rate / 4:.1g}: the loss rose on its way."),
        (climb > max(2, steps / 2), f"Set --warmup_steps to {max(1, steps // 10)}: the learning rate was still on its way up for {climb} of {steps} steps."),
        (0 < rate < 1e-4 and (falling or gain < BARELY_GAINED), f"Raise --learning_rate to {min(10 * rate, 2e-4):.1g}: LoRA usually takes 1e-4 to 2e-4."),
        (falling, "Double --num_train_epochs: the loss was still falling at the end."),
        (gain < BARELY_GAINED, "Give it more rows that are alike in form, or more epochs."),
        (True, "Ask it what matters to you: chat --compare shows both answers side by side."),
    )
    evidence = (  # of this one, every row that holds
        (abs(gain) < NOTHING_GAINED, f"Loss on held-out rows {before:.4f} before, {after:.4f} after: no difference."),
        (abs(gain) >= NOTHING_GAINED, f"Loss on held-out rows {'fell' if gain > 0 else 'rose'} from {before:.4f} to {after:.4f} ({abs(gain):.1%}): the right next token is {math.exp(before - after):.2f} times as likely as before."),
        (rows < 30, f"That is weak evidence: {rows} held-out row{'s' * (rows > 1)}."),
        (by_heart, f"From step {best_step:g} on the loss rose on held-out rows while it fell on the training rows: it learned them by heart."),
    )
    # ruff: enable[E501]
    # fmt: on
    _, kind, headline = next(row for row in kinds if row[0])
    told = " ".join(words for holds, words in evidence if holds)
    verdict = {"verdict": kind, "verdict_headline": headline, "verdict_evidence": told}
    verdict["verdict_advice"] = next(words for holds, words in advice if holds)
    return verdict | {"overfitting_since_step": start if by_heart else None}


# --- report.html, a page without scripts or anything from elsewhere, and the model card

# The colours of charts: on the page its own take their place, by day and by night.
INK = {"accent": "#0b6e5f", "train": "#9aa3b5", "soft": "#62676e", "line": "#e4e1da"}


def draw(height: int, fill: "Callable[[Any], object]", png: "Path | None" = None) -> str:
    """Return what `fill` draws, 440 points wide, as SVG in the page's colours (and write PNG)."""
    page, soft = io.StringIO(), INK["soft"]
    style: Any = {"font.size": 12.5, "axes.autolimit_mode": "round_numbers", "text.color": soft}
    style |= {"svg.fonttype": "none", "svg.hashsalt": "", "axes.axisbelow": True}
    with matplotlib.rc_context(style):
        figure = matplotlib.figure.Figure(figsize=(440 / 72, height / 72), layout="constrained")
        axes = figure.subplots()
        axes.margins(0, tight=False)
        axes.grid(axis="y", color=INK["line"])
        axes.tick_params(length=0, labelcolor=soft, pad=7)
        axes.spines[:].set_visible(False)
        fill(axes)
        axes.locator_params(axis="x", nbins=6, integer=axes.get_xlim()[1] > 2)
        axes.locator_params(axis="y", nbins=5 if height > 200 else 3)
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set(xlim=(0, None), ylim=(0, None))
        if png:
            figure.savefig(png, dpi=150)
        unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(page, format="svg", transparent=True, metadata=unsaid)
    svg = page.getvalue()
    for name, colour in INK.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg[svg.find("<svg") :]


def draw_curve(axes: Any, result: TrainResult, name: str, **style: Any) -> None:
    """Draw a figure over the steps; of more than 160 points neighbours are averaged."""
    points = curve(result.history, name)
    size = max(1, math.ceil(len(points) / 160))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [sum(value for _, value in group) / len(group) for group in groups]
    axes.plot([group[-1][0] for group in groups], means, **{"color": INK["accent"], **style})


def draw_losses(axes: Any, result: TrainResult) -> None:
    m, step = result.metrics, result.metrics["best_step"]
    best = dict(curve(result.history, "eval_loss")).get(step, m["eval_loss"])
    draw_curve(axes, result, "loss", color=INK["train"], label="training")
    held = {"marker": "o", "ms": 4, "lw": 2, "label": f"held-out, best at {step:,}"}
    draw_curve(axes, result, "eval_loss", **held)
    axes.axhline(m["eval_loss_before"], color=INK["soft"], ls="--", label="base model")
    axes.plot(step, best, "o", ms=9, mfc="none", mew=2, color=INK["accent"], clip_on=False)
    axes.figure.legend(loc="outside upper left", ncols=3, frameon=False, handlelength=1.2)


# ruff: disable[E501]
REPORT_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">
<title>{{ m.verdict_headline }} {{ name }}</title><style>
:root{--paper:#fbfaf7;--card:#fff;--ink:#1b1d20;--soft:#62676e;--line:#e4e1da;--accent:#0b6e5f;--train:#9aa3b5;--fair:#96610a;--bad:#b3382c;--tint:#f2f0ea}
@media screen and (prefers-color-scheme:dark){:root{--paper:#131518;--card:#1b1e22;--ink:#e9e7e2;--soft:#9ba0a8;--line:#2d3137;--accent:#4cc5ad;--train:#737d92;--fair:#e0aa4e;--bad:#f08377;--tint:#22262b}}
html{--hue:var(--accent)}.barely,.overfitting,.warn{--hue:var(--fair)}.not,.drop{--hue:var(--bad)}.cut{--hue:var(--soft)}
*{box-sizing:border-box}main{max-width:1080px;margin:0 auto;padding:56px 28px 72px}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.6 system-ui,"Segoe UI",Roboto,Arial,sans-serif;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
h1{font-size:clamp(2.3rem,7vw,4rem);line-height:1.06;letter-spacing:-.03em;margin:.3em 0 .35em}h1,.next b{color:var(--hue);margin-right:.5em}
h2{font-size:1.45rem;margin:64px 0 4px;padding-top:18px;border-top:1px solid var(--line)}h3{font-size:1rem;margin:0 0 8px;max-height:14em;overflow:auto}
p{margin:.4em 0 1em;max-width:68ch}.lead{font-size:1.18rem}.next{background:var(--tint);border-radius:12px;padding:14px 18px}
.note,dt,small,h4{color:var(--soft);font-size:.9rem;font-weight:400;letter-spacing:0;margin:0}.text{white-space:pre-wrap;max-width:none}
dl,article{border:1px solid var(--line);border-radius:14px;margin:16px 0;overflow:hidden}dl div,article{background:var(--card);padding:18px 20px}
dl{display:grid;grid-template-columns:repeat(3,1fr);gap:1px;background:var(--line);margin-top:36px}small{display:block}
dd{margin:0;font-size:1.6rem;line-height:1.3;font-weight:650;letter-spacing:-.02em}dd i{font-style:normal;font-weight:400;color:var(--soft)}
.charts,.pair{display:grid;grid-template-columns:1fr 1fr;gap:24px 32px;margin:24px 0}.charts:has(.tall){grid-template-columns:1.55fr 1fr}.tall{grid-row:span 2}
figure{margin:0;min-width:0}figcaption{font-weight:600}svg{display:block;width:100%;height:auto;overflow:visible}svg text{font-family:inherit!important}
.pair{gap:12px 28px;margin:0}.pair p{margin:4px 0 0}.pair div+div{border-left:3px solid var(--accent);padding-left:16px}
details{border-bottom:1px solid var(--line);padding:10px 0}article details{border:0;padding:12px 0 0;color:var(--soft);font-size:.92rem}
summary{cursor:pointer;display:flex;flex-wrap:wrap;gap:2px 12px;list-style:none}summary::before{content:"+";color:var(--soft);width:.9em}[open]>summary::before{content:"–"}
.note+b{margin-left:auto}.tag{font-size:.78rem;border-radius:99px;padding:1px 9px;background:var(--tint);color:var(--hue)}
ul{list-style:none;margin:8px 0;padding-left:1.65em;font-size:.92rem}li{margin:0 0 6px}.proof li::before{content:"✓";margin:0 .8em 0 -1.65em;color:var(--accent)}
table{border-collapse:collapse;width:100%;font-size:.88rem}td{padding:5px 20px 5px 0;border-bottom:1px solid var(--line);vertical-align:top;min-width:9em}
mark{background:var(--tint);color:inherit;border-bottom:2px solid var(--accent)}
@media(min-width:900px){.tall svg text{font-size:9.5px!important}}
@media(max-width:720px){main{padding:32px 18px 48px}dl{grid-template-columns:1fr 1fr}dl div,article{padding:14px}dd{font-size:1.25rem}.charts,.charts:has(.tall),.pair{grid-template-columns:1fr}summary .note{order:1;width:100%}}
@media print{:root{--paper:#fff}body{font-size:10.5pt}main{padding:0;max-width:none}h2{margin-top:28px;break-after:avoid}figure,article,dl{break-inside:avoid}h3{max-height:none}details::details-content{content-visibility:visible;height:auto;display:block}}
</style></head><body><main>
<header class="{{ m.verdict }}"><p class="note">{{ base }} · {{ source }} · {{ made }}</p>
<h1>{{ m.verdict_headline }}</h1><p class="lead">{{ m.verdict_evidence }}</p><p class="next"><b>Next</b>{{ m.verdict_advice }}</p></header>
<dl><div><dt>Loss on held-out rows</dt><dd><i>{{ "%.3f" % m.eval_loss_before }} →</i> {{ "%.3f" % m.eval_loss }}<small>per answer token, before and after</small></dd></div>
<div><dt>Answers that end by themselves</dt><dd><i>{{ samples|selectattr("base.stopped")|list|length }} →</i> {{ samples|selectattr("tuned.stopped")|list|length }} of {{ samples|length }}<small>within {{ longest }} tokens</small></dd></div>
<div><dt>Rows</dt><dd>{{ m.train_examples|n }}<small>to train, {{ m.eval_examples|n }} held out, {{ q.dropped_examples|n }} left out</small></dd></div>
<div><dt>Data quality</dt><dd>{{ "%g" % ((1000 * q.quality_score)|int / 10) }} %<small>{{ q.valid_examples|n }} of {{ q.total_examples|n }} rows usable</small></dd></div>
<div><dt>Training time</dt><dd>{{ time }}<small>{{ m.train_tokens_per_second|int|n }} tokens/s on {{ m.device }}, {{ m.dtype }}</small></dd></div>
<div><dt>Memory at its peak</dt><dd>{{ "%.1f" % m.peak_memory_gb }} GB<small>{{ m.trainable_params|n }} of {{ m.total_params|n }} parameters trained</small></dd></div></dl>
<h2>Training</h2><p class="note">{{ m.total_steps|n }} steps. Loss is the surprise per answer token: lower is better, and what counts is that on held-out rows, which were never trained on.
{% if (m.periodic_eval_examples or m.eval_examples) < m.eval_examples %}The curve looks at {{ m.periodic_eval_examples|n }} of them, the dashed line and the numbers above at all {{ m.eval_examples|n }}.{% endif %}</p>
<div class="charts">{% for name, svg in charts[:3] %}<figure{{ ' class="tall"'|safe if loop.first }}><figcaption>{{ name }}</figcaption>{{ svg|safe }}</figure>{% endfor %}</div>
<h2>Data</h2><p class="note">Rows count from 0, as in quality_report.json, which names every row that was left out.</p>
<div class="charts">{% for name, svg in charts[3:] %}<figure><figcaption>{{ name }}</figcaption>{{ svg|safe }}</figure>{% endfor %}</div>
{% for name, check in q.check_details.items() if check.count %}
<details{{ " open" if loop.index < 4 }}><summary><b>{{ name|replace("_", " ") }}</b><span class="tag {{ check.action }}">{{ check.action }}</span>
<span class="note">{{ check.meaning }}</span><b>{{ check.count|n }}</b></summary>
<ul>{% for row in check.examples %}<li>{% if row.row is not none %}<b>row {{ row.row }}</b> {% endif %}{{ row.detail }}</li>{% endfor %}</ul></details>
{% else %}<p>No check found anything.</p>{% endfor %}
<h2>What it was trained to say</h2><p class="note">Marked tokens carry loss: {{ q.supervised_tokens|n }} of {{ (q.supervised_tokens + q.unsupervised_tokens)|n }}, in {{ q.answers|n }} answers. {{ q.masked_answers|n }} answers carry none.</p>
{% for text in shown %}<article class="text">{{ text|trim|replace("⟦", "<mark>"|safe)|replace("⟧", "</mark>"|safe) }}</article>{% endfor %}
<h2>Answers before and after</h2><p class="note">{{ stops }}. Your own questions first, then held-out ones.</p>
{% for s in samples %}<article><h3 class="text">{{ s.question }}</h3><div class="pair">
{% for who, said in [("Base model", s.base), ("With the adapter", s.tuned)] %}
<div><h4>{{ who }} <span class="tag{{ "" if said.stopped else " cut" }}">{{ "ended by itself" if said.stopped else "cut off" }}</span></h4><p class="text">{{ said.text|trim }}</p></div>
{% endfor %}</div>{% if s.reference is not none %}<details><summary>The answer in the data</summary><p class="text">{{ s.reference }}</p></details>{% endif %}</article>{% endfor %}
<h2>Is the saved adapter the trained one?</h2><p class="note">Its file was read back into a fresh copy of the base model.</p>
<ul class="proof"><li>All {{ m.adapter_tensors }} tensors are finite, and bit for bit those that were trained.</li>
<li>It gives the trained model's logits (difference {{ "%.2g" % m.reloaded_logit_error }}), and moves the base model's by {{ "%.2f" % (100 * m.adapter_logit_effect) }} %.</li></ul>
<h2>Details</h2><p class="note">Everything that is needed to repeat this run.</p>
{% for title, facts in details.items() %}<details><summary><b>{{ title }}</b></summary><table>
{% for name, value in facts.items() if value is not mapping %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table></details>{% endfor %}
</main></body></html>
"""
# The header is the Hugging Face hub's. It knows no base in a local folder, and no data in a bucket.
MODEL_CARD = """\
---
{{ "" if local else "base_model: %s\n" % base }}library_name: peft
pipeline_tag: text-generation
tags: [lora, sft, unified-finetune]
metrics: [loss, perplexity]
model-index:
- name: {{ name|tojson }}
  results:
  - task: {type: text-generation}
    dataset: {name: {{ source|tojson }}, type: instruction-rows, split: held-out}
    metrics: [{type: loss, value: {{ m.eval_loss|round(4) }}}, {type: perplexity, value: {{ perplexity|round(4) }}}]
---
# LoRA adapter for {{ base }}

**{{ m.verdict_headline }}** {{ m.verdict_evidence }} {{ m.verdict_advice }}

Trained by unified_finetune on {{ m.train_examples }} instruction rows (`{{ source }}`, sha256 `{{ m.data_sha256 }}`), evaluated on {{ m.eval_examples }} held-out rows.

![Loss over the steps](curves.png)

## Use
```python
from peft import AutoPeftModelForCausalLM
from transformers import PreTrainedTokenizerFast

model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = PreTrainedTokenizerFast.from_pretrained("THIS_FOLDER")
messages = [{% if system %}{"role": "system", "content": {{ system|tojson }}}, {% endif %}{"role": "user", "content": "Your question"}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
answer = model.generate(**inputs, max_new_tokens=200, eos_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

## Samples
Greedy answers, of the base model and with the adapter. {{ stops }}.
{% for s in samples %}

**{{ s.question|e }}**
{% for text in s.base.text, s.tuned.text %}<pre>{{ text|e }}</pre>
{% endfor %}{% endfor %}

All numbers are in training_metrics.json, all settings in training_config.json, both here.
"""
# ruff: enable[E501]


def write_pages(folder: Path, result: TrainResult, data: PreparedData, **facts: Any) -> None:
    """Write report and model card with their charts; `facts` is what else they speak of."""
    m, ink = result.metrics, INK["accent"]
    lengths = [*data.train["length"], *data.eval["length"]]
    answers = [*data.train["supervised"], *data.eval["supervised"]]
    charts: Any = (
        ("Loss", 310, lambda axes: draw_losses(axes, result), folder / "curves.png"),
        ("Learning rate", 176, lambda axes: draw_curve(axes, result, "learning_rate")),
        ("Gradient norm", 176, lambda axes: draw_curve(axes, result, "grad_norm")),
        ("Tokens per row", 220, lambda axes: axes.hist(lengths, 20, rwidth=0.92, color=ink)),
        ("Answer tokens per row", 220, lambda axes: axes.hist(answers, 20, rwidth=0.92, color=ink)),
    )
    facts = facts | {
        "m": m, "q": data.quality, "shown": data.shown, "longest": SAMPLE_TOKENS,
        "charts": [(title, draw(*how)) for title, *how in charts],
        "base": data.base.name, "local": data.base.name == str(data.base.folder),
        "source": data.source.path.name, "perplexity": math.exp(min(m["eval_loss"], 700)),
        "made": f"{datetime.now():%Y-%m-%d %H:%M}", "time": human_seconds(m["train_runtime"]),
    }  # fmt: skip
    for name, page in ((REPORT_FILE, REPORT_PAGE), ("README.md", MODEL_CARD)):
        pages = jinja2.Environment(autoescape=page is REPORT_PAGE, trim_blocks=True)  # noqa: S701
        pages.filters["n"] = "{:,}".format
        text = pages.from_string(page).render(facts) + "\n"
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")


def write_tokenizer(tokenizer: "Tokenizer", places: Sequence[Path], folder: Path) -> None:
    """Write the tokenizer, files of `places` as they are, so that all readers split text alike."""
    tokenizer.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer.model", "special_tokens_map.json"):
        for place in [place for place in places if (place / name).is_file()][:1]:
            shutil.copyfile(place / name, folder / name)
    settings = read_json(folder / "tokenizer_config.json")
    settings["chat_template"] = tokenizer.chat_template  # Ollama reads it nowhere else
    # A Llama class would rebuild it and split text after </s> otherwise (see load_tokenizer).
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for unportable in ("backend", "is_local", "local_files_only"):
        settings.pop(unportable, None)
    write_json(folder / "tokenizer_config.json", settings)


def save_results(result: TrainResult, data: PreparedData, config: FineTuningConfig) -> RunArtifacts:
    """Write the adapter, test it (`result.model` is empty then), and publish it with its report."""
    output, settings, prompt = Path(config.output_dir), saved_settings(config), config.system_prompt
    samples = answer_samples(result, data, config.sample_prompts, prompt)
    count, empty = len(samples), sum(not s["tuned"].text.strip() for s in samples)
    before, after = (sum(s[who].stopped for s in samples) for who in ("base", "tuned"))
    stops = f"{after} of {count} answers end by themselves within {SAMPLE_TOKENS} tokens (base: "
    stops += f"{before})" + f"; {empty} SAY NOTHING AT ALL" * bool(empty)
    with staging_folder(output / ADAPTER_FILE, "--output_dir") as staged:
        result.model.peft_config["default"].save_pretrained(str(staged))
        weights, made = adapter_weights(result.model), {"format": "pt"}
        safetensors.torch.save_file(weights, staged / ADAPTER_FILE, metadata=made)
        write_tokenizer(result.tokenizer, (data.base.folder,), staged)
        m = result.metrics | prove_adapter(result.model, data, staged)
        m |= judge_training(m["eval_loss_before"], m["eval_loss"], result.history, len(data.eval))
        m |= {
            "stopped_share_before": round(before / max(1, count), 4), "sample_answers": count,
            "stopped_share": round(after / max(1, count), 4), "empty_answers": empty,
            "adapter_sha256": sha256_of(staged / ADAPTER_FILE),
        }  # fmt: skip
        names = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "tokenizers")
        packages = {"python": platform.python_version()}
        packages |= {name: importlib.metadata.version(name) for name in names}
        provenance = {
            "program": f"unified_finetune {__version__}", "system": platform.platform(),
            "packages": packages, "data": data.source.source, "data_sha256": data.source.sha256,
            "base_name": data.base.name, "base_digest": data.base.digest,
            "identity": result.identity,
        }  # fmt: skip
        write_json(staged / CONFIG_FILE, settings | {"provenance": provenance})
        write_json(staged / QUALITY_FILE, dataclasses.asdict(data.quality))
        write_json(staged / METRICS_FILE, m)
        details = {"Settings": settings, "Numbers": m, "Versions and hashes": packages | provenance}
        result = dataclasses.replace(result, metrics=m)
        about = {"name": output.resolve().name, "system": prompt, "samples": samples}
        write_pages(staged, result, data, stops=stops, details=details, **about)
        claim = next(iter(check_folders(output, output, str(data.base.folder))))
        if claim.outcome == "failed":  # a file of the user's has come to lie there
            raise FineTuningError(claim.detail, "Move that elsewhere. " + RUN_AGAIN)
        (output / METRICS_FILE).unlink(missing_ok=True)  # from here on it is no finished run
        others = {path.name for path in staged.iterdir()} - {CONFIG_FILE, METRICS_FILE}
        publish_files(staged, output, [CONFIG_FILE, *sorted(others)])
        publish_files(staged, output, [METRICS_FILE])
    for s in [s for s in samples if s["reference"] is None] or samples[:2]:
        texts = map(shorten, (s["question"], s["base"].text, s["tuned"].text))
        log.info("  question  %s\n    before  %s\n    after   %s", *texts)
    log.info("  %s\n", stops)
    log.info("  %s %s", m["verdict_headline"].upper(), m["verdict_evidence"])
    log.info("  Next: %s\n", m["verdict_advice"])
    log.info("  adapter in %s, and %s for you to read", output, REPORT_FILE)
    log.info("  talk to it: %s chat --output_dir %s", program_command(), shlex.quote(str(output)))
    return RunArtifacts(output, m)


# ======================================================================================
# 12. Chat
# ======================================================================================
#
# In: a folder (an adapter, a checkpoint, a merged model) and questions from a flag, a pipe or a
# terminal. Out: on stdout the answers and nothing else, as they come. The model reads the tokens
# that it was trained on, system message included; an adapter on another base is refused.


def open_adapter_base(adapter: AdapterFolder, model_name: str) -> BaseModel:
    """Open the model that an adapter was trained on (no other): `model_name`, if it was given."""
    name = adapter.base_name if model_name == FineTuningConfig.model_name else model_name
    try:
        base = open_base_model(name)
    except FineTuningError as error:
        what = f"The model that {adapter.path} was trained on cannot be used. {error}"
        hint = f"{error.hint} If it has moved: --model_name says where it is now."
        raise FineTuningError(what, hint) from error
    record = {"base_name": name, "base_digest": base.digest} | adapter.provenance
    if record["base_digest"] != base.digest:
        what = f"{name} is not the model that the adapter in {adapter.path} was trained on "
        what += f"({record['base_name']}, digest {record['base_digest'][:12]}…): its weights, its "
        what += "tokenizer or its chat template are others."
        raise FineTuningError(what, "Give that one with --model_name, or train again on this one.")
    if (adapter.path / "tokenizer.json").is_file():
        return dataclasses.replace(base, tokenizer=load_tokenizer(adapter.path))
    return base


CHAT_HELP = "/reset forgets, /system TEXT sets the system message, /quit ends; Ctrl-C stops answers"


def at_terminal() -> bool:
    """Tell whether somebody sits there and reads along."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


@dataclass
class Conversation:
    """Hold a model that is ready to answer, the system message, and the turns so far."""

    model: "PreTrainedModel | PeftModel"
    base: BaseModel
    options: ChatOptions
    seed: int
    system: "str | None"
    turns: "list[dict[str, str]]" = field(default_factory=list)

    def prompt(self) -> "list[int]":
        """Return the tokens up to the answer; without room, the oldest turns are forgotten."""
        context = self.base.positions
        room = min(self.options.max_new_tokens, context // 2)
        system = [{"role": "system", "content": self.system}] if self.system else []
        tokens = tokenize_prompt(self.base.tokenizer, [*system, *self.turns])
        while len(tokens) + room > context and len(self.turns) > 2:
            log.info("(the context of %d tokens is full: the oldest turn is forgotten)", context)
            del self.turns[:2]  # a question and its answer
            tokens = tokenize_prompt(self.base.tokenizer, [*system, *self.turns])
        if len(tokens) >= context:
            what = f"The message is too long: {len(tokens)} tokens, and the model sees {context}."
            raise FineTuningError(what, "Shorten it: the answer needs room, too.")
        return tokens

    def say(self, label: str, prompt: "list[int]", said: "list[str]") -> None:
        """Write one answer to stdout while it comes, keep its pieces, and say when it was cut."""
        # The same draw for the base and the adapter, another one for the next question.
        torch.manual_seed(self.seed + len(self.turns))
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        settings: Any = {name: getattr(self.options, name) for name in names}
        room = self.base.positions - len(prompt)

        def show(piece: str) -> None:
            said.append(piece)
            write_out(piece)

        settings |= {"max_new_tokens": min(self.options.max_new_tokens, room), "on_text": show}
        write_out(label)
        with memory_in_words("An answer to so many tokens", "Use --bf16, or a shorter message."):
            (answer,) = generate(self.model, self.base.tokenizer, [prompt], **settings)
        write_out("\n")
        if not answer.stopped:
            log.info("(cut after %d tokens)", len(answer.token_ids))

    def answer(self, text: str) -> None:
        """Answer a message on stdout, and remember both, even where the answer is stopped."""
        clean = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        self.turns.append({"role": "user", "content": clean})
        labelled = self.options.compare or (self.options.prompt is None and at_terminal())
        said: list[str] = []
        try:
            prompt = self.prompt()
            if self.options.compare:
                with typing.cast("PeftModel", self.model).disable_adapter():
                    self.say("base> ", prompt, [])
            self.say("tuned> " * labelled, prompt, said)
        finally:
            if said:
                self.turns.append({"role": "assistant", "content": "".join(said)})
            else:
                self.turns.pop()


def converse(conversation: Conversation) -> None:
    """Answer line after line, editable on a terminal, until /quit or the end of input."""
    with contextlib.suppress(ImportError):  # absent on Windows
        import readline  # noqa: F401 - gives input() its editing and its history
    lines = sys.stdin or io.StringIO()  # None where it was closed
    while True:
        try:
            line = input("you> ") + "\n" if at_terminal() else lines.readline()
            command, _, text = line.strip().partition(" ")
            if not line or command == "/quit":
                return
            if command == "/reset":
                conversation.turns.clear()
                log.info("(forgotten)")
            elif command == "/system":
                conversation.system = text.strip() or None
                log.info("(system message: %s)", conversation.system or "none")
            elif command.startswith("/"):
                log.info("%s%s", f"There is no {command}. " * (command != "/help"), CHAT_HELP)
            elif command:
                conversation.answer(line.rstrip("\n"))
        except EOFError:
            write_out("\n")
            return
        except KeyboardInterrupt:
            if not at_terminal() or stop.number != signal.SIGINT:
                raise
            stop.forget()
            write_out("\n")
            log.info("(stopped; /quit or Ctrl-D ends the chat)")
        except FineTuningError as error:
            if not at_terminal():
                raise
            log.error("%s %s", error, error.hint)


def chat(config: FineTuningConfig, options: ChatOptions) -> None:
    """Answer with the trained adapter, rendered and tokenized as in training."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an answer may hold what the terminal cannot show
    folder = Path(config.output_dir)
    is_model = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
    if is_model and options.compare:
        raise FineTuningError(f"--compare needs an adapter, and {folder} holds a merged model.")
    quiet_libraries()
    device, dtype = choose_device(config.device)[0], config.dtype
    if device == "mps":  # what training would reject gives no answers either
        check, device, dtype = check_device(config.device, dtype)
        log.info("  %s", check.detail)
    if dtype == "float16" and device != "cuda":
        raise FineTuningError(f"--fp16 needs an NVIDIA GPU, and this is {device}.", "Take --bf16.")
    with memory_in_words(f"The model on {device}", "Try --device cpu, or --bf16, which halves it."):
        if is_model:
            base, settings = open_base_model(str(folder)), folder / CONFIG_FILE
            system = read_json(settings).get("system_prompt") if settings.is_file() else None
            model: Any = load_base_model(base, device, dtype)
        else:
            adapter = open_adapter(folder)
            base, system = open_adapter_base(adapter, config.model_name), adapter.system_prompt
            model = attach_adapter(load_base_model(base, device, dtype), adapter, device).eval()
    system = system if config.system_prompt is None else config.system_prompt
    system = None if options.no_system_prompt else system
    conversation = Conversation(model, base, options, config.seed, system)
    if options.prompt is not None:
        return conversation.answer(options.prompt)
    log.info("Chat with %s from %s, on %s in %s.", base.name, folder, device, dtype)
    log.info("System message: %s (/help lists the commands)", system or "none")
    return converse(conversation)


# ======================================================================================
# 13. Export
# ======================================================================================
#
# In: an adapter and its base. Out: both as one model, a folder for transformers, vLLM and mlx-lm or
# a GGUF file for Ollama, llama.cpp and LM Studio; its path on stdout. A merged weight is
# W + B·A·scale in fp32, rounded once, written, read back and compared before the export is there.

BYTES_PER_WEIGHT = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
ROUNDING = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 1 / 200}  # of the largest weight
TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class MergedModel(NamedTuple):
    adapter: AdapterFolder
    base: BaseModel
    shapes: "dict[str, tuple[int, ...]]"
    tensor: "Callable[[str], torch.Tensor]"  # one of its tensors in fp32, by name


def open_merged_model(adapter: AdapterFolder, base: BaseModel) -> MergedModel:
    """Find every tensor of the base and of the adapter, and prove that they fit."""
    tuned = attach_adapter(read_empty_model(base.folder), adapter, "cpu")
    scales = {
        name.removeprefix("base_model.model.") + ".weight": module.scaling["default"]
        for name, module in tuned.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    files, shapes = {}, {}
    for path in (base.folder / name for name in weight_files(base.folder)):
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dictionary
                if not name.endswith("rotary_emb.inv_freq"):  # computed today
                    files[name], shapes[name] = path, tuple(file.get_slice(name).get_shape())
    for name in scales.keys() - files.keys():
        what = f"The adapter changes {name}, which the files of {base.folder} do not hold."
        raise FineTuningError(what, "Merge it with PEFT's merge_and_unload instead.")

    def tensor(name: str) -> "torch.Tensor":
        with safetensors.safe_open(files[name], framework="pt") as file:  # anew: no mapping stays
            weight = file.get_tensor(name).float()
        if name not in scales:
            return weight
        stem = "base_model.model." + name.removesuffix("weight")
        with safetensors.safe_open(adapter.weights, framework="pt") as file:
            a, b = (file.get_tensor(f"{stem}lora_{x}.weight").float() for x in "AB")
        return weight + (b @ a) * scales[name]  # in the order of PEFT's merge

    # A head in the file counts, whatever config.json says, unless it is the embedding once more.
    tied = base.config.tie_word_embeddings and {HEAD, EMBEDDING} <= shapes.keys()
    if tied and torch.equal(tensor(HEAD), tensor(EMBEDDING)):
        del shapes[HEAD]
    return MergedModel(adapter, base, shapes, tensor)


def check_written(name: str, weight: "torch.Tensor", found: "torch.Tensor", outtype: str) -> None:
    """Raise FineTuningError unless what was read back is the weight, but for its rounding."""
    largest = float(weight.abs().max())
    if not float((found.float() - weight).abs().max()) <= ROUNDING[outtype] * largest + 1e-7:
        what = f"{name} (largest value {largest:.4g}) cannot be written as {outtype}: it reads back"
        hint = "Over 65504: take --outtype bf16 or f32. NaN: the base or the adapter is damaged."
        raise FineTuningError(f"{what} as another. Nothing was exported.", hint)


# --- a merged model folder


def write_merged(model: MergedModel, outtype: str, system: "str | None", folder: Path) -> None:
    """Write a model folder that transformers, vLLM, mlx-lm and llama.cpp's converter load."""
    kind = getattr(torch, TORCH_NAMES[outtype])
    empty = {n: torch.empty(s, dtype=kind, device="meta") for n, s in model.shapes.items()}
    shards = huggingface_hub.split_torch_state_dict_into_shards(empty, max_shard_size="1GB")
    with progress_bar(len(empty), "tensors", "merging") as advance:
        for place, names in shards.filename_to_tensors.items():
            tensors = {name: model.tensor(name).to(kind).contiguous() for name in names}
            safetensors.torch.save_file(tensors, folder / place, metadata={"format": "pt"})
            with safetensors.safe_open(folder / place, framework="pt") as file:
                for name, weight in tensors.items():
                    check_written(name, weight.float(), file.get_tensor(name), outtype)
            advance(len(names))
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    settings = read_json(model.base.folder / "config.json")
    # Readers differ in where they look: each value stands in its old place and in its new one.
    settings |= dict.fromkeys(("dtype", "torch_dtype"), TORCH_NAMES[outtype])
    rope = getattr(model.base.config, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        settings |= {"rope_theta": rope["rope_theta"], "rope_parameters": rope}
    if HEAD in model.shapes:
        settings["tie_word_embeddings"] = False
    write_json(folder / "config.json", settings)
    tokenizer = model.base.tokenizer
    write_tokenizer(tokenizer, (model.adapter.path, model.base.folder), folder)
    # The base's own may hold bans and stops that the adapter was not trained with.
    ends = {f"{r}_token_id": getattr(tokenizer, f"{r}_token_id") for r in ("bos", "eos", "pad")}
    write_json(folder / "generation_config.json", ends)
    write_json(folder / CONFIG_FILE, {"system_prompt": system})  # `chat` reads it there


# --- a GGUF file


def check_gguf(model: MergedModel) -> None:
    """Refuse what a GGUF file of a Llama, or this program, cannot express."""
    config, told = model.base.config, json.loads(model.base.tokenizer.backend_tokenizer.to_str())
    pieces, rope = told["model"], config.rope_parameters.get("rope_type", "default")
    is_bpe = pieces["type"] == "BPE" and pieces.get("byte_fallback") and "<0x0A>" in pieces["vocab"]
    has_spaces = '"Replace"' in json.dumps(told["normalizer"]) and not told["pre_tokenizer"]
    problem = ""
    if config.model_type != "llama":
        problem = f"is of type {config.model_type!r}, not llama"
    elif rope != "default":
        problem = f"has rope scaling ({rope})"
    elif config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
        problem = f"has biases in its layers, or the activation {config.hidden_act}"
    elif not (is_bpe and has_spaces):
        problem = "has a tokenizer of another kind than SentencePiece-BPE"
    if problem:
        hint = "Export with --format merged and use llama.cpp's convert_hf_to_gguf.py."
        raise FineTuningError(f"{model.base.name} {problem}: not converted to GGUF here.", hint)


def gguf_tensor(model: MergedModel, name: str) -> "torch.Tensor":
    """Return a merged tensor in fp32, with the rows of q and k as llama.cpp has them."""
    c, weight = model.base.config, model.tensor(name)
    rotated = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    heads = rotated.get(name.removesuffix(".weight").rpartition(".")[2])
    if not heads:
        return weight
    # transformers rotates row i of a head with row i + size / 2, llama.cpp rotates neighbours.
    rows = weight.reshape(heads, 2, -1, weight.shape[1])
    return rows.transpose(1, 2).reshape(weight.shape).contiguous()


def add_facts(writer: "gguf.GGUFWriter", model: MergedModel, title: str, outtype: str) -> None:
    """Write what the model is, the network's shape, and the tokenizer with its template."""
    c, tokenizer, rows = model.base.config, model.base.tokenizer, model.base.vocabulary
    told, kinds = json.loads(tokenizer.backend_tokenizer.to_str()), gguf.TokenType
    # Embeddings without a token, as llama.cpp has them; then the order of its merging.
    tokens, ranks = [(f"[PAD{i}]", 0.0, kinds.UNUSED) for i in range(rows)], dict[str, float]()
    for rank, merge in enumerate(told["model"]["merges"], 1):
        piece = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        ranks.setdefault(piece, -float(rank))
    for piece, i in told["model"]["vocab"].items():
        is_byte = re.fullmatch("<0x[0-9A-F]{2}>", piece)
        score, kind = (0.0, kinds.BYTE) if is_byte else (ranks.get(piece, -1e6), kinds.NORMAL)
        tokens[i] = piece, score, kind
    for token in told["added_tokens"]:
        kind = kinds.CONTROL if token["special"] else kinds.USER_DEFINED
        kind = kinds.UNKNOWN if token["content"] == told["model"].get("unk_token") else kind
        tokens[token["id"]] = token["content"], 0.0, kind
    pieces, scores, types = (list(column) for column in zip(*tokens, strict=True))
    about = f"{Path(model.base.name).name} with a LoRA adapter, SHA-256 "
    size = c.head_dim or c.hidden_size // c.num_attention_heads
    file_type = "ALL_F32" if outtype == "f32" else "MOSTLY_" + outtype.upper()
    facts = {
        "type": "model", "name": title, "description": about + sha256_of(model.adapter.weights),
        "file_type": gguf.LlamaFileType[file_type], "block_count": c.num_hidden_layers,
        "quantization_version": gguf.GGML_QUANT_VERSION, "vocab_size": c.vocab_size,
        "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size, "head_count": c.num_attention_heads,
        "head_count_kv": c.num_key_value_heads, "key_length": size, "value_length": size,
        "rope_dimension_count": size, "rope_freq_base": float(c.rope_parameters["rope_theta"]),
        "layer_norm_rms_eps": c.rms_norm_eps, "tokenizer_model": "llama",
        "tokenizer_pre": "default", "token_list": pieces, "token_scores": scores,
        "token_types": types, "chat_template": str(tokenizer.chat_template),
        "add_bos_token": writes_bos(tokenizer), "add_eos_token": False,
        "add_space_prefix": '"Prepend"' in json.dumps(told["normalizer"]),
    }  # fmt: skip
    for role in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        facts[role] = getattr(tokenizer, role)
    for name, value in facts.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)


def write_gguf(model: MergedModel, outtype: str, path: Path) -> None:
    """Write model and tokenizer as one GGUF file, a tensor at a time, and read it back."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.base.config.num_hidden_layers)
    writer, kinds = gguf.GGUFWriter(path, "llama"), {}
    add_facts(writer, model, path.stem.rpartition("-")[0], outtype)
    for name, shape in model.shapes.items():  # number formats as in llama.cpp's converter
        place = table.get_name(name, try_suffixes=(".weight",))
        if place is None:  # a tensor that no Llama has
            continue
        small = "f16" if outtype == "q8_0" and shape[-1] % 32 else outtype
        kind = gguf.GGMLQuantizationType[("f32" if len(shape) == 1 else small).upper()]
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
        kinds[name] = kind
        writer.add_tensor_info(place, shape, np.dtype(np.float32), size, kind)
    with progress_bar(2 * len(kinds), "tensors", "converting") as advance:
        with contextlib.closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, kind in kinds.items():
                writer.write_tensor_data(gguf.quantize(gguf_tensor(model, name).numpy(), kind))
                advance()
        for name, written in zip(kinds, gguf.GGUFReader(path).tensors, strict=True):
            weight = gguf_tensor(model, name)
            back = torch.tensor(gguf.dequantize(written.data, written.tensor_type))
            check_written(name, weight, back.reshape(weight.shape), outtype)
            advance()


def modelfile(model: MergedModel, system: str, gguf_name: str) -> "tuple[str, str]":
    """Return the Modelfile that makes Ollama serve the model as trained, or why there is none."""
    tokenizer, bos = model.base.tokenizer, str(model.base.tokenizer.bos_token or "")

    def render(roles: str, text: str, *, answer: bool = True) -> str:
        messages = [{"role": role, "content": text} for role in roles.split()]
        return render_chat(tokenizer, messages, answer_next=answer).removeprefix(bos)

    # Ollama reads no Jinja: what the template writes around a turn is read off what it renders.
    before, _, after = render("user", "\u2063", answer=False).partition("\u2063")
    rest = render("user", "Hi").removeprefix(render("user", "Hi", answer=False))
    starts = {role: before.replace("user", role) for role in ("system", "user", "assistant")}
    chats = ("user", "system user", "user assistant user", "system user assistant user")
    try:
        for roles, text in itertools.product(chats, ("Hi", " two  words ", "\n")):
            turns = "".join(starts[role] + text + after for role in roles.split())
            if turns + rest != render(roles, text):
                return "", "its chat template is more than a marker around each turn"
    except FineTuningError as error:
        return "", str(error)
    # Ollama's parser.go ends a text at three quotation marks and drops what does not print.
    around, kept = before + after + rest, re.sub("[\n\r\t]", "", before + after + rest + system)
    if '"""' in system or re.search('"|{{', around) or not kept.isprintable():
        return "", 'a Modelfile cannot hold """, ", {{ or invisible characters, and its prompt does'
    turn = before.replace("user", "{{ .Role }}") + "{{ .Content }}" + after
    stops = dict.fromkeys([str(tokenizer.eos_token), *map(str.strip, starts.values())])
    lines = [
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{{{{- range .Messages }}}}{turn}{{{{ end }}}}{rest}"""',
        *[f'SYSTEM """{system}"""'] * bool(system),
        *[f'PARAMETER stop "{stop}"' for stop in stops if stop],
        f"PARAMETER num_ctx {model.base.config.max_position_embeddings}",
        "# The likeliest answer every time, as in `chat`; raise the temperature for variety.",
        "PARAMETER temperature 0\nPARAMETER repeat_penalty 1\n",
    ]
    return "\n".join(lines), ""


def export_gguf(
    model: MergedModel, path: Path, system: str, options: ExportOptions, *, overwrite: bool
) -> None:
    """Write, check and publish a GGUF file with its Modelfile, and hand both to Ollama."""
    check_gguf(model)
    text, obstacle = modelfile(model, system, path.name)
    if obstacle and options.install:
        what = f"Ollama cannot serve this model as it was trained: {obstacle}."
        raise FineTuningError(what, "Leave --install out; llama.cpp and LM Studio can.")
    place = path.with_name("Modelfile")
    if place.exists() and f"FROM ./{path.name}\n" not in place.read_text(errors="replace"):
        place = path.with_name(f"Modelfile-{path.stem}")  # the other one is another GGUF's
    if text and place.exists() and not overwrite:
        raise FineTuningError(f"{place} exists already.", "Add --overwrite to replace it.")
    with staging_folder(path.parent, "--export_dir") as staged:
        write_gguf(model, options.outtype, staged / path.name)
        if text:
            (staged / place.name).write_text(text, encoding="utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_files(staged, path.parent, [place.name] * bool(text) + [path.name])
    name = options.install or path.stem.rpartition("-")[0].lower()
    create = ["ollama", "create", name, "-f", str(place.absolute())]
    create += ["-q", str(options.quantize)] * bool(options.quantize)
    if obstacle:
        log.warning("  no Modelfile for Ollama: %s", obstacle)
    else:
        log.info("  Ollama:     %s && ollama run %s", shlex.join(create), name)
    shown, spoken = shlex.quote(str(path)), f" -sys {shlex.quote(system)}" * bool(system)
    log.info("  llama.cpp:  llama-cli -m %s --jinja --temp 0%s", shown, spoken)
    log.info("  LM Studio:  lms import %s", shown)
    if options.install:
        done = subprocess.run(create, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            hint = f"The export is complete. Is `ollama serve` running? Then: {shlex.join(create)}"
            raise FineTuningError(f"ollama create {name} failed: {shorten(done.stderr)}", hint)


def export(config: FineTuningConfig, options: ExportOptions) -> None:
    """Write the merged model in the format that is asked for; its path goes to stdout."""
    form, source = str(options.format), Path(config.output_dir)
    if form == "gguf" and importlib.util.find_spec("gguf") is None:
        raise FineTuningError("The package gguf is missing.", "pip install gguf==0.19.0")
    if options.install and shutil.which("ollama") is None:
        what = "--install needs Ollama, and there is no `ollama` command here."
        raise FineTuningError(what, "Get it from https://ollama.com/download, or leave it out.")
    quiet_libraries()
    adapter = open_adapter(source)
    model = open_merged_model(adapter, open_adapter_base(adapter, config.model_name))
    system = adapter.system_prompt if config.system_prompt is None else config.system_prompt
    is_checkpoint = (source / MANIFEST).is_file()  # nothing is put into it: it is whole as it is
    if not (is_checkpoint or options.export_dir):
        claim_output_folder(source)  # no training may replace the adapter meanwhile
    own = source.parent / f"{source.name}-{form}" if is_checkpoint else source / form
    path = folder = Path(options.export_dir or own)
    if form == "gguf":
        title = re.sub(r"[^A-Za-z0-9._-]+", "-", source.resolve().name).strip("-.") or "model"
        path = folder / f"{title}-{options.outtype}.gguf"
    homes, elsewhere = (source, model.base.folder), "Choose another folder with --export_dir."
    if path.is_dir():
        refuse_foreign(path)
    if (path / "adapter_config.json").is_file() or folder.resolve() in [h.resolve() for h in homes]:
        raise FineTuningError(f"{path} is the place of an adapter or of its base.", elsewhere)
    if (path.is_file() or (path / MANIFEST).is_file()) and not config.overwrite:
        raise FineTuningError(f"{path} exists already; --overwrite would replace it.", elsewhere)
    weights = sum(math.prod(shape) for shape in model.shapes.values())
    check_space(path, weights * BYTES_PER_WEIGHT[options.outtype] + 100e6, "--export_dir")
    log.info("Exporting %s as %s, %s, read back and compared", source, form, options.outtype)
    if form == "gguf":
        export_gguf(model, path, system or "", options, overwrite=config.overwrite)
    else:
        with staging_folder(path, "--export_dir") as staged:
            write_merged(model, options.outtype, system, staged)
            publish_folder(staged, path)
        for use in (program_command() + " chat --output_dir", "vllm serve", "mlx_lm.chat --model"):
            log.info("  %s %s", use, shlex.quote(str(path)))
    write_out(f"{path}\n")


# ======================================================================================
# 14. The run and the command line
# ======================================================================================
#
# `run` is the table of contents of a training: five lines under five banners. Around it: from the
# words of a command line, a file and the environment to one frozen configuration, and from whatever
# ends the program to an exit code and a sentence. The one broad `except` is here.

COMMANDS: "dict[str, tuple[int, type | None]]" = {  # the last stage, or the command's own options
    "train": (5, None), "check": (1, None), "data": (3, None),
    "chat": (0, ChatOptions), "export": (0, ExportOptions),
}  # fmt: skip
# What other launchers leave behind; each would make a library believe in processes not there.
CLUSTER_VARIABLES = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(OMPI_COMM_WORLD|PMI|MV2_COMM_WORLD)"
    r"_\w+|MPI_LOCAL\w+|(ACCELERATE|FSDP|MEGATRON_LM)_\w+"
)
LAUNCHER_CHOICES = re.compile(r"(ACCELERATE|FSDP)_(?!.*CPU)\w+")  # which are the settings' here


@contextlib.contextmanager
def stage(number: int, name: str) -> Iterator[None]:
    """Announce a stage, time it, and give its errors the stage's exit code."""
    log.info("\n[%d/5] %s", number, name)
    started = time.monotonic()
    try:
        yield
    except FineTuningError as error:
        error.exit_code = 10 + number
        raise
    stop.raise_if_asked()  # a signal's exception is lost where it hits a destructor
    log.info("[%d/5] %s done in %s", number, name, human_seconds(time.monotonic() - started))


def run(config: FineTuningConfig, last: int = 5) -> "RunArtifacts | None":
    """Run the five stages, or those up to the last one that a command wants."""
    with stage(1, "preflight"):
        report = run_preflight(config)
        if last == 5:
            claim_output_folder(Path(config.output_dir))
    if last == 1:
        return None
    with stage(2, "download"):
        file = once_for_all(lambda: fetch_dataset(config))
    with stage(3, "prepare"):
        data = prepare_dataset(file, config)
        if last == 3:
            estimate_run(data, report, config)
            return None
    with stage(4, "train"):
        finished = find_finished_run(config, data)
        if finished:
            return finished
        result = train_lora(data, report, config)
    with stage(5, "save"), watched("Stage 5", report.device, config.resume):
        return once_for_all(lambda: save_results(result, data, config))


def build_parser(own: "type | None") -> argparse.ArgumentParser:
    """Build a command's parser; values stay text, to tell all problems at once."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [train | check | data | chat | export] [--FLAG VALUE ...]",
        description=(__doc__ or "").partition("Contents of this file")[0], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, exit_on_error=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=__version__)
    files = "settings from a JSON or YAML file; of several, the later ones win"
    parser.add_argument("--config", metavar="FILE", help=files, action="append", default=[])
    for record in filter(None, (own, FineTuningConfig)):
        group = parser.add_argument_group(record.__name__)
        for name, f in fields_of(record).items():
            shown = " ".join(f.default) if isinstance(f.default, tuple) else f.default
            group.add_argument(
                *dict.fromkeys(["--" + name, "--" + name.replace("_", "-")]),
                help="{} [{}]".format(f.metadata["help"].replace("%", "%%"), shown),
                metavar=name.rpartition("_")[2].upper(),
                nargs="+" if "tuple" in str(f.type) else "?" if f.type is bool else None,
                const="true" if f.type is bool else None,
            )
    return parser


def read_environment(problems: "list[str]") -> "list[Given]":
    """Load .env (the shell wins over it) and return the settings in the environment."""
    for path in environment_files():
        try:
            raw = path.read_bytes()
            import dotenv
        except ImportError:  # preflight reports the missing package
            break
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror}")
            continue
        try:
            text = raw.decode(json.detect_encoding(raw))  # UTF-16 too, without its mark as well
        except UnicodeDecodeError:
            text = raw.decode("cp1252", errors="replace")  # Latin-1, as old editors write it
        dotenv.load_dotenv(stream=io.StringIO(text.replace("\0", "")))
    remember_secrets(*map(os.environ.get, ("R2_ACCESS_KEY_ID", "R2_SECRET_ACCESS_KEY", "HF_TOKEN")))
    bucket = os.environ.get("R2_BUCKET_NAME", "").strip()
    return [("r2_bucket_name", bucket, "R2_BUCKET_NAME")] if bucket else []


def parse_command_line(argv: Sequence[str]) -> "tuple[str, FineTuningConfig, Any, list[Given]]":
    """Return command, settings (flags over environment over file), options and what was given."""
    command, rest = "train", list(argv)
    if rest and not rest[0].startswith("-"):
        command = rest.pop(0)
    _, record = COMMANDS.get(command, (0, None))
    settings, own = fields_of(FineTuningConfig), fields_of(record) if record else {}
    problems: list[str] = []
    given: list[Given] = []
    options = config = None
    try:
        if command not in COMMANDS:
            what = f"there is no command {command!r}{nearest(command, COMMANDS)}"
            raise argparse.ArgumentError(None, f"{what} (commands: {', '.join(COMMANDS)})")
        parsed, unknown = build_parser(record).parse_known_args(rest)
    except argparse.ArgumentError as error:
        problems.append(str(error))
    else:
        for argument in unknown:
            name = argument.split("=")[0].lstrip("-").replace("-", "_")
            near = nearest(name, [*settings, *own], "--")
            problems.append(f"unknown argument {argument!r}{near}")
        for file in parsed.config:
            given += read_config_file(Path(file), problems)
        given += read_environment(problems)
        typed = [(name, v, "--" + name) for name, v in vars(parsed).items() if v is not None]
        given += [flag for flag in typed if flag[0] in settings]
        if record:
            options = build_record(record, [flag for flag in typed if flag[0] in own], problems)
        config = build_record(FineTuningConfig, given, problems)
    if config is None:
        what = f"{len(problems)} problem{'s' * (len(problems) > 1)} with the settings:"
        hint = "python unified_finetune.py --help lists every command and setting with its meaning."
        raise FineTuningError("\n  - ".join([what, *problems]), hint, 2)
    return command, config, options, given


def prepare_process() -> "list[str]":
    """Set up streams, signals and what libraries read; return the variables that were removed."""
    for name in ("stdout", "stderr"):  # closed by whoever started the program
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - until the end
    stop.install()
    warnings.simplefilter("default")  # PYTHONWARNINGS=error would end a run at a library's warning
    sys.unraisablehook = lambda i: log.debug("Ignored in %r: %r", i.object, i.exc_value)
    real = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")  # of accelerate launch, torchrun
    numbers = [os.environ.get(name, "") for name in real]
    launched = all(n.isdecimal() for n in numbers) and int(numbers[2]) > max(1, int(numbers[0]))
    foreign = LAUNCHER_CHOICES if launched else CLUSTER_VARIABLES
    removed = [name for name in sorted(os.environ) if foreign.fullmatch(name)]
    for name in removed:
        del os.environ[name]
    # Threads that wait for work sleep: spinning ones slow everything else on the machine.
    wanted = {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
    wanted |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    wanted |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTORCH_ENABLE_MPS_FALLBACK": "1"}
    # PyTorch is to refuse what would make a small Mac swap for hours, and to tidy up before.
    wanted |= {"PYTORCH_MPS_HIGH_WATERMARK_RATIO": "1.0", "PYTORCH_MPS_LOW_WATERMARK_RATIO": "0.8"}
    if not launched:
        wanted["CUDA_VISIBLE_DEVICES"] = "0"  # TRL would share a batch out
    os.environ.update({**wanted, **os.environ, "MPLBACKEND": "agg"})  # notebooks leave theirs
    return removed


def execute(command: str, config: FineTuningConfig, options: Any) -> None:
    if command == "chat":
        chat(config, options)
    elif command == "export":
        export(config, options)
    else:
        artifacts = run(config, COMMANDS[command][0])
        if artifacts and is_main_process():
            with contextlib.suppress(FineTuningError):  # the run counts, read or not
                write_out(f"{artifacts.adapter_dir}\n")


def main(argv: "Sequence[str] | None" = None) -> int:
    arguments, log_file = sys.argv[1:] if argv is None else list(argv), None
    removed = prepare_process()
    try:
        if arguments[:1] == [SELF_TEST] and len(arguments) == 3:
            run_self_test(*arguments[1:])
            return 0
        try:
            Path.cwd()
        except OSError:
            raise FineTuningError("The current folder was deleted.", "cd to another.", 2) from None
        command, config, options, given = parse_command_line(arguments)
        log_file = start_logging(Path(config.log_dir), verbose=config.verbose)
        if removed:
            log.info("Not used, left over from another launcher: %s", ", ".join(removed))
        for name, origin in {name: origin for name, _, origin in given}.items():
            if name in RETIRED_SETTINGS:
                log.warning("%s in %s is no longer used", name, origin)
            else:
                log.debug("setting %s = %r (%s)", name, getattr(config, name), origin)
        execute(command, config, options)
        return 0
    except FineTuningError as error:
        log.debug("Details", exc_info=True)
        code, what, hint = error.exit_code, str(error), error.hint
    except (Exception, KeyboardInterrupt) as error:  # the one place where the unexpected ends
        # A library that was being imported makes an ImportError of a signal.
        if stop.number or isinstance(error, KeyboardInterrupt):
            number = signal.Signals(stop.number or signal.SIGINT)
            code, hint = 128 + number, "Run the same command again to go on."
            what = f"Stopped by {'Ctrl-C' if number == signal.SIGINT else number.name}."
        else:
            log.debug("Unexpected", exc_info=True)
            code, what = 1, f"Unexpected {type(error).__name__}: {error}"
            hint = "This is a fault of the program; the log has the traceback."
    lines = [what] + ["-> " + hint] * bool(hint)
    if log_file:
        for line in [*lines, f"   (details: {log_file})"]:
            log.error("%s", line)
    else:
        sys.stderr.write(hide_secrets("\n".join(lines)) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
