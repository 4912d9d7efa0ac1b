"""Helpers of the tests for stage 3: settings, data files and prepared sets of one test."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import unified_finetune as program

Row = dict[str, Any]


def make_config(folder: Path, model: Path, **settings: Any) -> program.FineTuningConfig:
    """Return settings that write into `folder` only."""
    places = {"cache_dir": "cache", "output_dir": "model", "log_dir": "logs"}
    defaults = {name: str(folder / place) for name, place in places.items()}
    return program.FineTuningConfig(
        **{"model_name": str(model), "max_seq_length": 512, **defaults, **settings}
    )


def describe_file(path: Path) -> program.DatasetFile:
    """Return what stage 2 would say about a local file."""
    content = path.read_bytes() if path.is_file() else b""
    digest = hashlib.sha256(content).hexdigest()
    return program.DatasetFile(path, len(content), None, digest, str(path))


def write_rows(path: Path, rows: "Sequence[Any]") -> Path:
    """Write rows as a JSON array, or as JSON Lines where the name ends so."""
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


class Preparer:
    """Prepare data in the folder of a test, with one model."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model

    def config(self, **settings: Any) -> program.FineTuningConfig:
        """Return the settings that the other methods use."""
        return make_config(self.folder, self.model, **settings)

    def file(self, path: Path, **settings: Any) -> program.PreparedData:
        """Prepare a file."""
        return program.prepare_dataset(describe_file(path), self.config(**settings))

    def content(self, content: "bytes | str", **settings: Any) -> program.PreparedData:
        """Prepare a file with this content."""
        path = self.folder / "data.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return self.file(path, **settings)

    def rows(self, rows: "Sequence[Any]", **settings: Any) -> program.PreparedData:
        """Prepare rows."""
        return self.file(write_rows(self.folder / "data.json", rows), **settings)

    def report(self) -> "dict[str, Any]":
        """Return the quality report that was written."""
        return json.loads((self.folder / "model" / "quality_report.json").read_text("utf-8"))


def copy_model(source: Path, target: Path, **settings: Any) -> Path:
    """Copy a model with other tokenizer settings (None: without)."""
    shutil.copytree(source, target)
    path = target / "tokenizer_config.json"
    content = {**json.loads(path.read_text("utf-8")), **settings}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return target


def found(data: program.PreparedData) -> "set[tuple[int, str]]":
    """Return every finding as row and name of the check."""
    details = data.quality.check_details
    return {(row, name) for name, detail in details.items() for row in detail["rows"]}


def supervised(row: "dict[str, Any]") -> "list[list[int]]":
    """Return the tokens that carry loss, for each answer."""
    return [row["input_ids"][start:end] for start, end in row["spans"]]


def all_rows(data: program.PreparedData) -> "list[dict[str, Any]]":
    """Return the examples of both sides in the file's order."""
    rows: Iterable[Any] = [*data.train, *data.eval]
    return sorted(rows, key=lambda row: row["row"])


def filler(count: int) -> "list[Row]":
    """Return so many clean rows that have nothing to do with each other."""
    return [
        {
            "instruction": f"What is {word(3 * i)} {word(3 * i + 1)} in case {i}?",
            "input": "",
            "output": f"It is {word(7 * i + 2)} together with {word(5 * i)} {word(3 * i + 2)}.",
        }
        for i in range(count)
    ]


def word(number: int) -> str:
    """Return a word of its own for a number."""
    syllables = ("ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "ne", "po", "ri")
    digits = []
    number += 13
    while number:
        number, digit = divmod(number, len(syllables))
        digits.append(syllables[digit])
    return "".join(digits)
