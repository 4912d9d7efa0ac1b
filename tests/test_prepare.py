"""Stage 3: files are read, rows understood, rendered, tokenized, proved and split."""

import gzip
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import unified_finetune as program

DATA = Path(__file__).resolve().parent / "data"
USER = {"role": "user", "content": "Hello?"}
ANSWERED = {"role": "assistant", "content": "Yes."}
Row = dict[str, Any]


def describe_file(path: Path) -> program.DatasetFile:
    """Return what stage 2 would say about a local file."""
    content = path.read_bytes() if path.is_file() else b""
    digest = hashlib.sha256(content).hexdigest()
    return program.DatasetFile(path, len(content), None, digest, str(path))


class Preparer:
    """Prepare data in the folder of a test, with one model."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model

    def config(self, **settings: Any) -> program.FineTuningConfig:
        """Return settings that write into the test's folder only."""
        places = {"cache_dir": "cache", "output_dir": "model", "log_dir": "logs"}
        values: Any = {name: str(self.folder / place) for name, place in places.items()}
        values |= {"model_name": str(self.model), "max_seq_length": 512, "device": "cpu"}
        return program.FineTuningConfig(**values | settings)

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
        return self.content(json.dumps(rows), **settings)


@pytest.fixture
def prepare(tmp_path, tiny_model):
    """Return a preparer with the tiny model."""
    return Preparer(tmp_path, tiny_model)


def variant(prepare: Preparer, **settings: Any) -> Preparer:
    """Return a preparer with a copy of its model with other tokenizer settings (None: without)."""
    model = Path(shutil.copytree(prepare.model, prepare.folder / "variant"))
    path = model / "tokenizer_config.json"
    content = {**json.loads(path.read_text("utf-8")), **settings}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return Preparer(prepare.folder, model)


def found(data: program.PreparedData) -> "set[tuple[int, str]]":
    """Return every finding as row and name of the check."""
    details = data.quality.check_details
    return {(row, name) for name, detail in details.items() for row in detail["rows"]}


def supervised(row: Row) -> "list[list[int]]":
    """Return the tokens that carry loss, for each answer."""
    return [row["input_ids"][start:end] for start, end in row["spans"]]


def all_rows(data: program.PreparedData) -> "list[Row]":
    """Return the examples of both sides in the file's order."""
    return sorted([*data.train, *data.eval], key=lambda row: row["row"])


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
    syllables, text = "bacedifoguhajekilomunepori", ""
    number += 13
    while number:
        number, digit = divmod(number, 13)
        text += syllables[2 * digit : 2 * digit + 2]
    return text


def texts(data: program.PreparedData, row: int) -> str:
    """Return one example as it is trained, supervised spans between marks."""
    example = next(r for r in all_rows(data) if r["row"] == row)
    return program.show_example(data.tokenizer, example)


def one(prepare: Preparer, row: Any, **settings: Any) -> str:
    """Prepare one row among others, and return it as it is trained."""
    return texts(prepare.rows([*filler(20), row], **settings), 20)


def refused(prepare: Preparer, row: Any, **settings: Any) -> "tuple[str, str]":
    """Prepare one row among others, and return why it was left out."""
    data = prepare.rows([*filler(20), row], **settings)
    (entry,) = (*data.quality.rejected, *data.quality.dropped)
    assert entry["row"] == 20
    assert len(all_rows(data)) == 20
    return entry["reason"], entry["detail"]


# --- files


def test_every_form_of_a_file_gives_the_same_examples(prepare):
    """Arrays, JSON Lines in a file named .json, a BOM, a wrapper, CSV and Parquet."""
    import pyarrow
    from pyarrow import csv, parquet

    rows = filler(12)
    rows[4]["output"] = 'Two lines, "quoted",\nand a comma.'
    rows[5]["output"] = "12"
    array, lines = json.dumps(rows), "\n".join(map(json.dumps, rows))
    forms = [lines, lines.replace("\n", "\r\n") + "\n\n", "\ufeff" + lines, "\ufeff" + array]
    forms += [json.dumps({"version": 1, "data": rows}), json.dumps({"train": rows}, indent=1)]
    forms += [json.dumps(rows, indent=2), "\n\n  " + array + "\n\n"]
    expected = all_rows(prepare.content(array))
    assert len(expected) == 12
    for form in forms:
        assert all_rows(prepare.content(form)) == expected, form[:40]
    path = prepare.folder / "data.json"  # the content says what a file is
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, path)
    assert all_rows(prepare.file(path)) == expected
    for mark in ",;\t":
        csv.write_csv(table, path, csv.WriteOptions(delimiter=mark))
        assert all_rows(prepare.file(path)) == expected


def test_several_files_are_one_set_with_rows_numbered_per_file(prepare):
    rows = filler(12)
    rows[8]["output"] = ""
    paths = [prepare.folder / name for name in ("a.json", "b.jsonl")]
    paths[0].write_text(json.dumps(rows[:6]))
    paths[1].write_text("".join(json.dumps(row) + "\n" for row in rows[6:]))
    file = replace(describe_file(paths[0]), parts=tuple(map(describe_file, paths)))
    data = program.prepare_dataset(file, prepare.config())
    places = {(row["file"], row["row"]) for row in all_rows(data)}
    expected = {("a.json", n) for n in range(6)} | {("b.jsonl", n) for n in (0, 1, 3, 4, 5)}
    assert places == expected
    (entry,) = data.quality.rejected
    assert (entry["file"], entry["row"], entry["line"]) == ("b.jsonl", 2, 3)


GOOD = "good_bom.json good_messages.jsonl good_sharegpt.json good_prompt_completion.jsonl"


@pytest.mark.parametrize("name", [*GOOD.split(), "good_prompt_response.jsonl"])
def test_every_good_file_is_usable_to_the_last_row(prepare, name):
    data = prepare.file(DATA / name)
    assert (data.quality.valid_examples, data.quality.quality_score) == (6, 1.0)
    assert [row["row"] for row in all_rows(data)] == [0, 1, 2, 3, 4, 5]
    assert found(data) == set()


# fmt: off
NO_DATA_SETS = [  # a file or its content, and what is said of it
    (DATA / "broken_empty.json", "is empty"),
    (DATA / "broken_truncated.json", r"line 20, column 15: .*cut off"),
    (DATA / "broken_syntax.jsonl", r"1 of 7 lines .*\n  - line 4, column 91: .*':'"),
    (DATA / "broken_binary.json", "binary file"),
    (DATA / "broken_not_utf8.json", r"byte 0xE9 at offset 342 \(line 8\)"),
    (DATA / "broken_toplevel_object.json", "not an array of rows .*title, version, topics, count"),
    (DATA / "broken_wrong_keys.json", r"None of the 6 rows is usable(.|\n)*heading, notes"),
    (DATA / "broken_empty_outputs.json", r"None of the 8 rows(.|\n)*no output .*output .empty."),
    (DATA / "broken_number_as_text.json", r"Only 5 of 8 rows(.|\n)*row 2: output is a number"),
    (DATA / "broken_mixed.json", r"Only 5 of 12 rows(.|\n)*row 4: the row is null"),
    (DATA / "broken_low_quality.jsonl", r"Only 10 of 20 rows are usable: quality score 0\.500"),
    (DATA, "directory"),
    (DATA / "gone.json", "No such file"),
    ("[]", "holds no rows"),
    ("{}\n" * 13 + '{"a\n' * 7, r"7 of 20 lines(.*\n){5}.*line 18.*\n  - \.\.\."),
    (gzip.compress(b"[]" * 9, mtime=0), "binary file"),
    (b"PAR1rest", "cannot be read as a table"),
    ("[]".encode("utf-16"), "UTF-16"),
    ('[{"instruction": "a"}]'.encode("utf-16-le"), "UTF-16"),
    ('[{"instruction": "a"}]'.encode("utf-32"), "UTF-32"),
    (b"\x01\x02\x03\x04\x05\x06\x07\x08 junk", "binary"),
    ("name,age\nann,5\n", "no table of known columns: it starts 'name,age'"),
    ("instruction,output\na,b\nc,d,e\n", "broken in line 3: it has not 2 columns"),
    ("instruction,output\na,b\xe9\n".encode("latin-1"), r"byte 0xE9 .*\(line 2\)"),
    ('{"a": [1], "b": [2]}', r"not an array of rows .*it has: a, b"),
    ('{"instruction": ["a"], "output": ["b"]}', "not an array of rows"),
    ("instruction,output,output\nq,a,b\n", "has a column twice"),
    ('[{"instruction": "a"}, oops]', "line 1, column 24"),
    ('[\n{"instruction": "a"}\n{"instruction": "b"}]', "line 3, column 1: .*','"),
    ("[" * 100_000, "nested too deeply"),
    ('{\n"a": 1,\n"b" 2}', "line 3, column 5"),
    (b'[{"instruction": "\xff"}]', r"byte 0xFF at offset 18 \(line 1\)"),
    ('[{"instruction": "é'.encode()[:-1], r"ends inside a character \(line 1\): was it cut"),
]
# fmt: on


@pytest.mark.parametrize(("file", "message"), NO_DATA_SETS)
def test_what_is_no_data_set_is_refused_and_says_why(prepare, file, message):
    with pytest.raises(program.FineTuningError, match=message) as caught:
        (prepare.file if isinstance(file, Path) else prepare.content)(file)
    assert caught.value.hint


def test_an_array_of_more_than_512_mb_is_refused_unread(prepare):
    path = prepare.folder / "data.json"
    path.write_text("[" + " " * 70_000)
    os.truncate(path, 600_000_000)  # takes no room on the disk
    with pytest.raises(program.FineTuningError, match="does not stream") as caught:
        program.prepare_dataset(replace(describe_file(DATA), path=path), prepare.config())
    assert "JSON Lines" in caught.value.hint


# --- rows


HELLO = [  # each asks "Hello?" and answers "Yes."
    {"instruction": "Hello?", "input": None, "output": "Yes."},
    {"instruction": "", "input": "Hello?", "output": "Yes."},
    {"instruction": None, "output": "", "prompt": "Hello?", "completion": "Yes."},
    {"messages": None, "query": "Hello?", "response": "Yes."},
    {"\ufeffinstruction": "Hello?", "Output ": "Yes."},
    {"prompt": [USER], "completion": [ANSWERED]},
    {"messages": json.dumps([USER, ANSWERED])},
    {"messages": repr([USER, ANSWERED])},
    {"messages": [{"role": "system", "content": ""}, USER, ANSWERED]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}, ANSWERED]},
    {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]},
    {"conversation": [{"role": None, "from": "USER ", "value": "Hello?"}, ANSWERED]},
    {"conversation": [{"input": "Hello?", "output": "Yes."}]},
    {"history": [], "system": "", "instruction": "Hello?", "output": "Yes."},
    {"instruction": "Hello?", "output": "Yes.</s>\n"},
]
PARTS = [  # of a question, and how they are asked
    ({"instruction": "Add.", "input": "2 and 3"}, "Add.\n\n2 and 3"),
    ({"instruction": "Where?", "input": "", "context": "In Arn."}, "Where?\n\nIn Arn."),
    ({"instruction": "Be true.", "question": "Is it so?"}, "Be true.\n\nIs it so?"),
    ({"instruction": "Same.", "prompt": "Same."}, "Same."),
]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [(row, "Hello?") for row in HELLO] + [({**row, "output": "Yes."}, said) for row, said in PARTS],
)
def test_each_known_shape_means_its_question_in_all_parts_and_its_answer(prepare, row, prompt):
    assert one(prepare, row) == f"<s><|user|>\n{prompt}</s>\n<|assistant|>\n⟦Yes.</s>⟧"


def test_history_is_earlier_turns_and_every_answer_carries_loss(prepare):
    row = {"history": [["One?", "First."]], "instruction": "Two?", "output": "Second."}
    shown = one(prepare, row)
    assert shown == (
        "<s><|user|>\nOne?</s>\n<|assistant|>\n⟦First.</s>⟧\n"
        "<|user|>\nTwo?</s>\n<|assistant|>\n⟦Second.</s>⟧"
    )
    last = one(prepare, row, assistant_turns="last")
    assert last == shown.replace("⟦First.</s>⟧", "First.</s>")


def test_a_system_message_is_the_row_s_own_or_the_configured_one(prepare):
    own = {"system": "Be kind.", "instruction": "Hello?", "output": "Yes."}
    for row in (own, {"messages": [{"role": "system", "content": "Be kind."}, USER, ANSWERED]}):
        assert one(prepare, row, system_prompt="Be brief.").count("<|system|>\nBe kind.") == 1
    for system in ("", None):
        shown = one(prepare, {**own, "system": system}, system_prompt="Be brief.")
        assert "<|system|>\nBe brief.</s>" in shown


@pytest.mark.parametrize("mask", [{"weight": 0}, {"train": False}, {"loss": False}])
def test_a_masked_turn_carries_no_loss_and_a_row_of_them_is_left_out(prepare, mask):
    turns = [USER, {**ANSWERED, **mask}, {"role": "user", "content": "Sure?"}, ANSWERED]
    assert one(prepare, {"messages": turns}).count("⟦") == 1
    assert refused(prepare, {"messages": turns[:2]})[0] == "masked"
    assert refused(prepare, {"instruction": "Hello?", "output": "Yes.", **mask})[0] == "masked"
    data = prepare.rows([*filler(20), {"messages": turns}])
    assert (data.quality.answers, data.quality.masked_answers) == (21, 1)


def test_turns_after_the_last_answer_and_answers_before_a_question(prepare):
    data = prepare.rows([*filler(20), {"messages": [ANSWERED, USER, ANSWERED, USER]}])
    assert (20, "unanswered_turn") in found(data)
    assert texts(data, 20).count("⟦") == 1
    assert texts(data, 20).endswith("⟦Yes.</s>⟧")


# fmt: off
NOT_TRAINED = [  # a row, the check that leaves it out, and words of the reason
    (None, "not_an_object", "null"),
    ({"text": "all in one"}, "unknown_shape", "it has: text"),
    ({"instruction": "a b"}, "empty_output", r"no output \(it has: instruction\)"),
    ({"output": "a b"}, "empty_instruction", "no instruction"),
    ({"instruction": "\u200b \n", "output": "b"}, "empty_instruction", r"instruction \(empty"),
    ({"instruction": "a", "output": None}, "empty_output", r"output \(empty\)"),
    ({"instruction": "a", "output": "</s>"}, "empty_output", "output is empty"),
    ({"instruction": "a", "output": 5}, "not_text", "output is a number"),
    ({"instruction": "a", "output": ["b"]}, "bad_turn", "turn 1 is text without a role"),
    ({"instruction": {"a": 1}, "output": "b"}, "not_text", "an object"),
    ({"instruction": "a", "input": float("nan"), "output": "b"}, "not_text", "NaN"),
    ({"instruction": "a", "output": "half \ud83d"}, "undecodable", r"U\+D83D"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference_pair", "not trained here"),
    ({"messages": "hi"}, "not_text", "messages is text, not a list of turns"),
    ({"messages": [USER]}, "no_answer", "assistant"),
    ({"messages": [ANSWERED]}, "empty_instruction", "the user says nothing"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "empty_output", "turn 2"),
    ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWERED]}, "bad_turn", "tool use"),
    ({"messages": [USER, "hi", ANSWERED]}, "bad_turn", "turn 2 is text without a role"),
    ({"messages": [{"content": "x"}, ANSWERED]}, "bad_turn", r"no role \(it has: content\)"),
    ({"messages": [USER, {"role": "us\u00e9", "content": "x"}]}, "bad_turn", "'usé'"),
    ({"messages": [USER, {"role": "user", "content": ""}, ANSWERED]}, "bad_turn", "turn 2"),
    ({"messages": [{"role": "user", "content": [{"image": 1}]}, ANSWERED]}, "not_text", "list"),
    ({"instruction": "a", "output": "b</s>c"}, "special_tokens", "'</s>'"),
    ({"instruction": "a <s>", "output": "b"}, "special_tokens", "'<s>'"),
]
# fmt: on


@pytest.mark.parametrize(("row", "check", "detail"), NOT_TRAINED)
def test_a_row_that_cannot_be_trained_is_left_out_under_its_name(prepare, row, check, detail):
    reason, told = refused(prepare, row)
    assert reason == check
    assert re.search(detail, told)


# --- the report and the gates


def test_the_report_has_every_number_and_no_row_vanishes(prepare):
    with pytest.raises(program.FineTuningError):
        prepare.file(DATA / "broken_mixed.json")
    report = json.loads((prepare.folder / "model/quality_report.json").read_text("utf-8"))
    assert (report["total_examples"], report["valid_examples"]) == (12, 5)
    assert report["quality_score"] == pytest.approx(5 / 12, abs=1e-6)
    assert (report["empty_instructions"], report["empty_outputs"]) == (1, 2)
    assert [r["row"] for r in report["rejected"]] == [1, 3, 4, 6, 8, 9, 11]
    assert set(report["checks"]) == set(program.CHECKS)
    data = prepare.file(DATA / "broken_mixed.json", yes=True)
    assert len(all_rows(data)) + len(report["rejected"]) == 12
    accepted = prepare.file(DATA / "broken_mixed.json", min_data_quality_score=0.4)
    assert accepted.quality.valid_examples == 5


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "training_metrics.json"])
def test_a_finished_run_s_report_is_not_overwritten(prepare, name):
    model = prepare.folder / "model"
    model.mkdir()
    (model / name).write_text("{}")
    prepare.rows(filler(10))
    (other,) = (prepare.folder / "logs").glob("quality_report_*.json")
    assert json.loads(other.read_text())["total_examples"] == 10
    assert [path.name for path in model.iterdir()] == [name]


def test_poor_data_exits_with_13(prepare):
    path = str(DATA / "broken_low_quality.jsonl")
    with pytest.raises(program.FineTuningError, match="10 of 20 rows") as error:
        program.run(prepare.config(data_path=path, min_disk_gb=0), last=3)
    assert error.value.exit_code == 13


# --- tokens


def test_the_tokens_before_each_answer_are_those_that_chat_sends(prepare):
    said = ["One?", "First.", "Two?", "Ends in\na line:\n\n* é 日本 🎓", "Three?", " indented\n"]
    turns = [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(said)]
    data = prepare.rows([*filler(20), {"messages": turns}], system_prompt="Be brief.")
    row = all_rows(data)[20]
    system = {"role": "system", "content": "Be brief."}
    assert len(row["spans"]) == 3
    assert row["input_ids"].count(data.tokenizer.bos_token_id) == 1
    for number, (start, end) in enumerate(row["spans"]):
        before = [system, *turns[: 2 * number + 1]]
        assert row["input_ids"][:start] == program.tokenize_prompt(data.tokenizer, before)
        answer = program.decode(data.tokenizer, row["input_ids"][start:end])
        assert answer == said[2 * number + 1]
        assert row["input_ids"][end - 1] == data.tokenizer.eos_token_id
    assert row["question"] == "\n\n".join(said[:5])
    assert row["answer"] == said[5]


ROLES = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + END }}{% endfor %}"
NEXT = "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"


@pytest.mark.parametrize(
    ("end", "trained"), [("'\n'", "</s>"), ("'<end>\n'", "<end></s>"), ("eos_token", "</s>")]
)
def test_one_bos_and_the_end_token_are_trained_whatever_a_template_writes(prepare, end, trained):
    template = "{{ bos_token }}" + ROLES.replace("END", end) + NEXT
    data = variant(prepare, chat_template=template, pad_token=None).rows(filler(4))
    for row in all_rows(data):
        (answer,) = supervised(row)
        assert row["input_ids"].count(data.tokenizer.bos_token_id) == 1
        assert data.tokenizer.decode(answer) == filler(4)[row["row"]]["output"] + trained


TALK = [USER, ANSWERED, {"role": "user", "content": "And now?"}, ANSWERED]
LATER = "{{ m['content'] | upper if m['role'] == 'assistant' and not loop.last else m['content'] }}"


ODD_TEMPLATES = [  # a template, a row, and why it is left out
    (ROLES.replace("m['content']", "(m['content'] | trim)"),
     [USER, {**ANSWERED, "content": " x"}], "changes the answer"),
    ("{% for m in messages %}<{{ m['role'] }}>" + LATER + "{{ END }}{% endfor %}",
     TALK, "differently once more follow.*--assistant_turns last"),
    ("{% if messages|length > 3 %}{{ raise_exception('too many') }}{% endif %}" + ROLES,
     TALK, "too many"),
    (ROLES.replace("END", "('' if loop.index < 4 else eos_token)"), TALK, "without end token"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "row", "reason"), ODD_TEMPLATES)
def test_a_template_that_refuses_or_changes_one_row_concerns_it(prepare, template, row, reason):
    template = template.replace("END", "eos_token") + NEXT
    check, detail = refused(variant(prepare, chat_template=template), {"messages": row})
    assert check == "template"
    assert re.search(reason, detail)


def test_tokens_that_merge_across_the_border_are_counted_and_served_prompts_kept(prepare):
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    answers = ["so: " + row["output"] for row in filler(50)]
    special = ["<end>"]
    tokenizer.train_from_iterator(answers, 300, special_tokens=special, show_progress=False)
    settings = {"bos_token": None, "unk_token": None, "pad_token": None, "eos_token": "<end>"}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    model = variant(prepare, chat_template=template, **settings)
    tokenizer.save(str(model.model / "tokenizer.json"))
    (model.model / "special_tokens_map.json").unlink(missing_ok=True)
    rows = filler(12)
    data = model.rows(rows)
    assert data.quality.checks["merged_tokens"] == 12  # "assistant: It" holds the token " It"
    for row in all_rows(data):
        asked = [{"role": "user", "content": row["question"]}]
        ((start, end),) = row["spans"]
        assert row["input_ids"][:start] == program.tokenize_prompt(data.tokenizer, asked)
        assert end == len(row["input_ids"])
        answer = data.tokenizer.decode(row["input_ids"][start:])
        assert answer == rows[row["row"]]["output"] + "<end>"


def test_two_examples_are_logged_and_three_kept_for_the_report(prepare, caplog):
    rows = [*filler(20), {"messages": TALK * 2}]
    with caplog.at_level(logging.INFO):
        for seed in range(9):
            data = prepare.rows(rows, seed=seed)
            if 20 in data.train["row"]:
                break
    assert len(data.shown) == 3
    assert data.shown[0].count("⟦Yes.</s>⟧") == 4
    assert data.shown[0] in caplog.text
    assert data.shown[1] in caplog.text
    supervised_tokens = sum(len(s) for row in all_rows(data) for s in supervised(row))
    assert data.quality.supervised_tokens == supervised_tokens
    assert f"with loss: 24 answers, {supervised_tokens} tokens" in caplog.text


# --- length


def test_long_rows_are_dropped_by_default_and_truncated_on_demand(prepare):
    rows = filler(400)
    rows[7]["output"] = "a b c d e f g h i j " * 12
    with pytest.raises(program.FineTuningError, match=r"1 rows .*% of all answer tokens") as caught:
        prepare.rows(rows[:40], max_seq_length=128)
    assert "--max_seq_length" in caught.value.hint
    with pytest.raises(program.FineTuningError, match=r"No row is left .*6 over_length"):
        prepare.rows(filler(6), max_seq_length=8, yes=True)
    data = prepare.rows(rows, max_seq_length=128, yes=True)
    assert [(d["row"], d["reason"]) for d in data.quality.dropped] == [(7, "over_length")]
    assert len(all_rows(data)) == 399
    assert data.quality.lost_answer_tokens > 100
    data = prepare.rows(rows, max_seq_length=128, overlong="truncate", yes=True)
    assert (data.quality.dropped_examples, data.quality.truncated_examples) == (0, 1)
    row = all_rows(data)[7]
    assert (row["length"], len(row["input_ids"]), row["spans"][-1][1]) == (128, 128, 128)
    assert data.tokenizer.eos_token_id not in supervised(row)[-1]
    others = [r for r in all_rows(data) if r["row"] != 7]
    assert all(supervised(r)[-1][-1] == data.tokenizer.eos_token_id for r in others)


def test_the_length_is_limited_to_the_model_s_positions(prepare):
    assert prepare.rows(filler(10), max_seq_length=4096).max_seq_length == 512


# --- split


@pytest.mark.parametrize(
    ("count", "trained", "held_out", "shares"),
    [(2, 1, 1, {}), (3, 2, 1, {}), (10, 9, 1, {}), (60, 54, 6, {}), (337, 303, 34, {}),
     (100, 50, 20, {"train_split": 0.5, "eval_split": 0.2})],
)  # fmt: skip
def test_the_shares_hold_for_every_size_and_seed(prepare, count, trained, held_out, shares):
    sides = set()
    for seed in (1, 2, 3):
        data = prepare.rows(filler(count), seed=seed, **shares)
        assert (len(data.train), len(data.eval)) == (trained, held_out)
        sides.add(tuple(data.eval["row"]))
    assert len(sides) > 1 or count < 60


def test_a_large_family_is_trained_on_and_never_torn(prepare):
    rows = filler(60)
    rows += [{"instruction": "Why so?", "output": f"Because of {r['output']}"} for r in filler(30)]
    for seed in range(3):
        data = prepare.rows(rows, seed=seed)
        assert not {row for row in data.eval["row"] if row >= 60}
        assert len(data.eval) == 9


def test_one_question_alone_cannot_be_split(prepare):
    row = {"instruction": "Why?", "output": "Because."}
    with pytest.raises(program.FineTuningError, match="versions of one question"):
        prepare.rows([row, row, {**row, "output": "For a reason."}])


def test_a_conversation_and_its_beginning_stand_on_one_side(prepare):
    rows = filler(40)
    first = [{"role": "user", "content": rows[3]["instruction"]}, ANSWERED]
    rows[3] = {"messages": [*first, *TALK]}
    rows[30] = {"messages": [first[0], {**ANSWERED, "content": "No, never in all the years."}]}
    for seed in range(12):
        assert len({3, 30} & set(prepare.rows(rows, seed=seed).eval["row"])) != 1
