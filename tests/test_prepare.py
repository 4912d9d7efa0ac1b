"""Stage 3: files are read, rows understood, rendered, tokenized, proved and split."""

import gzip
import json
import logging
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CliResult
from prepare_helpers import Preparer, all_rows, describe_file, filler, make_config, write_rows

import unified_finetune as program

DATA = Path(__file__).resolve().parent / "data"


@pytest.fixture
def prepare(tmp_path: Path, tiny_model: Path) -> Preparer:
    """Return a preparer with the tiny model."""
    return Preparer(tmp_path, tiny_model)


def questions(data: program.PreparedData) -> "list[str]":
    """Return the first user turn of every example, in the file's order."""
    return [row["prompt"].split("<|user|>\n")[1].split("</s>")[0] for row in all_rows(data)]


# --- files


def test_an_array_json_lines_a_bom_and_a_wrapper_give_the_same_examples(prepare: Preparer) -> None:
    rows = filler(12)
    lines = "\n".join(json.dumps(row) for row in rows)
    forms = [
        json.dumps(rows),
        json.dumps(rows, indent=2),
        lines,  # in a file named .json
        lines.replace("\n", "\r\n") + "\n\n",
        "\ufeff" + lines,
        "\ufeff" + json.dumps(rows),
        json.dumps({"version": 1, "data": rows}),
        json.dumps({"train": rows}, indent=1),
        "\n\n  " + json.dumps(rows) + "\n\n",
    ]
    expected = all_rows(prepare.rows(rows))
    assert len(expected) == 12
    for form in forms:
        assert all_rows(prepare.content(form)) == expected, form[:40]


def test_a_file_named_jsonl_may_hold_an_array(prepare: Preparer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(filler(5)))
    assert len(all_rows(prepare.file(path))) == 5


@pytest.mark.parametrize(
    "name",
    [
        "good_bom.json",
        "good_messages.jsonl",
        "good_sharegpt.json",
        "good_prompt_completion.jsonl",
        "good_prompt_response.jsonl",
    ],
)
def test_every_good_file_is_usable_to_the_last_row(prepare: Preparer, name: str) -> None:
    data = prepare.file(DATA / name)
    assert (data.quality.valid_examples, data.quality.quality_score) == (6, 1.0)
    assert [row["row"] for row in all_rows(data)] == [0, 1, 2, 3, 4, 5]
    assert not [c for c in data.quality.checks.values() if c]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken_empty.json", "is empty"),
        ("broken_truncated.json", r"line 20, column 15: .*cut off"),
        ("broken_syntax.jsonl", r"1 of 7 lines .*\n  - line 4, column 91: .*':'"),
        ("broken_binary.json", "binary file"),
        ("broken_not_utf8.json", r"byte 0xE9 at offset 342 \(line 8\)"),
        ("broken_toplevel_object.json", "without a list of rows .*title, version, topics, count"),
        ("broken_wrong_keys.json", r"None of the 6 rows is usable(.|\n)*heading, notes, body"),
        ("broken_empty_outputs.json", r"None of the 8 rows is usable(.|\n)*output is empty"),
        (
            "broken_number_as_text.json",
            r"Only 5 of 8 rows(.|\n)*row 2 .line 12.: output is a number",
        ),
        ("broken_mixed.json", r"Only 5 of 12 rows(.|\n)*row 4 .line 22.: the row is null"),
        ("broken_low_quality.jsonl", r"Only 10 of 20 rows are usable: quality score 0\.500"),
    ],
)
def test_every_broken_file_stops_with_its_own_message(
    prepare: Preparer, name: str, message: str
) -> None:
    with pytest.raises(program.FineTuningError, match=message) as caught:
        prepare.file(DATA / name)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        ("[]", "holds no rows"),
        ('{"data": []}', "holds no rows"),
        (gzip.compress(b"[]" * 9), "gzip file"),
        (b"PK\x03\x04rest", "ZIP file"),
        (b"PAR1rest", "Parquet file"),
        ("[]".encode("utf-16"), "UTF-16"),
        ('[{"instruction": "a"}]'.encode("utf-16-le"), "UTF-16"),
        (b"\x01\x02\x03\x04\x05\x06\x07\x08 junk", "binary"),
        ("instruction,output\na,b\n", "starts with 'instruction,output a,b'"),
        ('"text"', "instead of"),
        ("42", "instead of"),
        ('{"a": [1], "b": [2]}', r"several lists \(a, b\)"),
        ('{"instruction": ["a"], "output": ["b"]}', "several lists"),
        ('[{"instruction": "a"}, oops]', "line 1, column 24"),
        ('[\n{"instruction": "a"}\n{"instruction": "b"}]', "line 3, column 1: .*','"),
        ('[{"a": 1},]', "line 1, column 11"),
        ("[1, 2] [3]", "line 1, column 8: more text"),
        ("[" * 100_000, "nested too deeply|unterminated|expecting value"),
        ('{"x":' * 100_000, "nested too deeply|expecting value"),
        ('{\n"a": 1,\n"b" 2}', "line 3, column 5"),
        (b'[{"instruction": "\xff"}]', r"byte 0xFF at offset 18 \(line 1\)"),
    ],
)
def test_what_is_no_data_set_is_refused_and_says_why(
    prepare: Preparer, content: "bytes | str", message: str
) -> None:
    with pytest.raises(program.FineTuningError, match=message):
        prepare.content(content)


def test_broken_lines_are_counted_to_the_end_and_the_first_five_named(prepare: Preparer) -> None:
    lines = [json.dumps(row) for row in filler(20)]
    for number in (3, 5, 7, 9, 11, 13, 15):
        lines[number] = lines[number][:-1]
    with pytest.raises(program.FineTuningError) as caught:
        prepare.content("\n".join(lines))
    text = str(caught.value)
    assert "7 of 20 lines" in text
    assert [n for n in range(1, 21) if f"line {n}," in text] == [4, 6, 8, 10, 12]


def test_a_first_line_that_is_broken_does_not_hide_that_the_file_is_json_lines(
    prepare: Preparer,
) -> None:
    lines = [json.dumps(row) for row in filler(4)]
    with pytest.raises(program.FineTuningError, match="1 of 4 lines"):
        prepare.content("\n".join([lines[0][:-20], *lines[1:]]))


def test_errors_far_inside_a_large_array_name_their_place(prepare: Preparer) -> None:
    rows = [json.dumps({"instruction": "é" * 700, "output": f"{i}"}) for i in range(5000)]
    text = "[\n" + ",\n".join(rows) + "\n]"
    assert len(text.encode()) > 3 * (1 << 20)
    broken = text.replace('"output": "4000"', '"output" "4000"')
    with pytest.raises(program.FineTuningError, match=r"line 4002, column \d+: .*':'"):
        prepare.content(broken)
    wrong_byte = text.encode().replace(b'"4500"', b'"45\xe900"')
    with pytest.raises(program.FineTuningError) as caught:
        prepare.content(wrong_byte)
    assert f"at offset {wrong_byte.index(0xE9.to_bytes(1, 'big') + b'00')}" in str(caught.value)
    assert "(line 4502)" in str(caught.value)


def test_characters_on_the_border_of_two_pieces_of_a_file_survive(tmp_path: Path) -> None:
    for shift in range(4):
        rows = [{"output": "x" * shift + "日本é🎓" * 100_000, "n": 12345} for _ in range(2)]
        path = write_rows(tmp_path / "data.json", rows)
        assert [row.value for row in program.read_rows(path)] == rows


def test_a_folder_a_missing_file_and_a_locked_file_are_told_apart(
    prepare: Preparer, tmp_path: Path
) -> None:
    file = describe_file(write_rows(tmp_path / "data.json", filler(3)))
    for path, message in ((tmp_path, "directory"), (tmp_path / "gone.json", "No such file")):
        moved = program.DatasetFile(path, 1, None, file.sha256, "test")
        with pytest.raises(program.FineTuningError, match=message):
            program.prepare_dataset(moved, prepare.config())
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    file.path.chmod(0)
    with pytest.raises(program.FineTuningError, match="Permission denied"):
        program.prepare_dataset(file, prepare.config())


def test_a_row_of_a_megabyte_is_dropped_and_the_others_are_used(prepare: Preparer) -> None:
    rows = filler(200)
    rows[5]["output"] = "word " * 220_000
    data = prepare.rows(rows, yes=True)
    assert [(d["row"], d["reason"]) for d in data.quality.dropped] == [(5, "over_length")]
    assert len(data.train) + len(data.eval) == 199


# --- rows


def read(row: Any, system_prompt: "str | None" = None) -> program.Conversation:
    """Return the conversation in one row."""
    return program.read_conversation(program.SourceRow(0, 1, row, 0), system_prompt)


USER = {"role": "user", "content": "Hello?"}
ANSWERED = {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Hello?", "output": "Yes."},
        {"instruction": " Hello? ", "input": "", "output": "\nYes.\n"},
        {"instruction": "Hello?", "input": None, "output": "Yes."},
        {"instruction": "Hello?", "input": "N/A", "output": "Yes."},
        {"instruction": "Hello?", "response": "Yes."},
        {"question": "Hello?", "answer": "Yes."},
        {"prompt": "Hello?", "completion": "Yes."},
        {"prompt": "Hello?", "response": "Yes."},
        {"prompt": [USER], "completion": [ANSWERED]},
        {"messages": [USER, ANSWERED]},
        {"messages": [{"role": "system", "content": ""}, USER, ANSWERED]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}, ANSWERED]},
        {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]},
        {"conversation": [{"from": "User", "value": "Hello?"}, {"from": "model", "value": "Yes."}]},
    ],
)
def test_each_known_shape_means_the_same_question_and_answer(row: Any) -> None:
    conversation = read(row)
    assert conversation.messages == [USER]
    assert conversation.answer == "Yes."


def test_instruction_and_input_are_joined_by_a_blank_line() -> None:
    row = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    assert read(row).question == "Add.\n\n2 and 3"


def test_of_a_longer_conversation_the_last_answer_is_trained() -> None:
    more = {"role": "user", "content": "And now?"}
    row = {"messages": [USER, ANSWERED, more, {"role": "assistant", "content": "Still."}]}
    conversation = read(row)
    assert conversation.messages == [USER, ANSWERED, more]
    assert conversation.answer == "Still."


def test_a_row_s_own_system_message_goes_before_the_configured_one() -> None:
    own = {"role": "system", "content": "Be kind."}
    assert read({"messages": [own, USER, ANSWERED]}, "Be brief.").messages == [own, USER]
    assert read(
        {"system": "Be kind.", "instruction": "Hello?", "output": "Yes."}, "Be brief."
    ).messages == [own, USER]
    configured = {"role": "system", "content": "Be brief."}
    assert read({"messages": [USER, ANSWERED]}, "Be brief.").messages == [configured, USER]


def test_line_ends_are_unified_and_code_keeps_its_indentation() -> None:
    row = {"instruction": "a\r\nb\rc", "output": "\n    def f():\n        return 1\n\n"}
    assert read(row).question == "a\nb\nc"
    assert read(row).answer == "    def f():\n        return 1"


@pytest.mark.parametrize(
    ("row", "check"),
    [
        (None, "not_an_object"),
        ([1], "not_an_object"),
        ("text", "not_an_object"),
        ({}, "unknown_shape"),
        ({"text": "all in one"}, "unknown_shape"),
        ({"instruction": "a b"}, "empty_output"),
        ({"output": "a b"}, "empty_instruction"),
        ({"instruction": "", "output": "b"}, "empty_instruction"),
        ({"instruction": " \n\t", "output": "b"}, "empty_instruction"),
        ({"instruction": "\u200b", "output": "b"}, "empty_instruction"),
        ({"instruction": "a", "output": ""}, "empty_output"),
        ({"instruction": "a", "output": None}, "empty_output"),
        ({"instruction": "a", "output": 5}, "not_text"),
        ({"instruction": "a", "output": True}, "not_text"),
        ({"instruction": "a", "output": ["b"]}, "not_text"),
        ({"instruction": {"a": 1}, "output": "b"}, "not_text"),
        ({"instruction": "a", "input": 7, "output": "b"}, "not_text"),
        ({"instruction": "a", "input": float("nan"), "output": "b"}, "not_text"),
        ({"instruction": "a", "output": "half \ud83d"}, "broken_encoding"),
        ({"instruction": "a", "output": "lost \ufffd"}, "broken_encoding"),
        ({"messages": "hi"}, "not_text"),
        ({"messages": []}, "empty_instruction"),
        ({"messages": [USER]}, "no_answer"),
        ({"messages": [USER, ANSWERED, USER]}, "no_answer"),
        ({"messages": [ANSWERED]}, "empty_instruction"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "empty_output"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "not_text"),
        ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWERED]}, "bad_turn"),
        ({"messages": [USER, "hi", ANSWERED]}, "bad_turn"),
        ({"messages": [USER, {"role": 3, "content": "x"}]}, "bad_turn"),
        ({"messages": [USER, {"role": "system", "content": "x"}, ANSWERED]}, "bad_turn"),
        ({"messages": [USER, {"role": "user", "content": ""}, ANSWERED]}, "bad_turn"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWERED]}, "not_text"),
    ],
)
def test_an_unusable_row_is_rejected_under_its_name(row: Any, check: str) -> None:
    with pytest.raises(program.RowRejectedError) as caught:
        read(row)
    assert [name for name, _ in caught.value.problems] == [check]
    assert check in program.CHECKS


def test_a_row_with_two_faults_names_both() -> None:
    with pytest.raises(program.RowRejectedError) as caught:
        read({"instruction": "", "output": 5})
    assert [name for name, _ in caught.value.problems] == ["empty_instruction", "not_text"]


def test_numbers_too_long_for_python_and_infinities_are_no_obstacle(prepare: Preparer) -> None:
    rows = json.dumps(filler(3))[:-1]
    odd = '{"instruction": "a", "output": %s}'
    text = rows + "".join("," + odd % n for n in ("9" * 5000, "1e999", "-Infinity", "NaN")) + "]"
    data = prepare.content(text, yes=True)
    assert [r["reason"] for r in data.quality.rejected] == ["not_text"] * 4
    assert "NaN" in data.quality.rejected[3]["detail"]


# --- the report and the gates


def test_the_report_has_every_number_and_no_row_vanishes(prepare: Preparer) -> None:
    with pytest.raises(program.FineTuningError):
        prepare.file(DATA / "broken_mixed.json")
    report = prepare.report()
    assert report["total_examples"] == 12
    assert report["valid_examples"] == 5
    assert report["quality_score"] == pytest.approx(5 / 12, abs=1e-6)
    assert (report["empty_instructions"], report["empty_outputs"]) == (1, 2)
    assert [r["row"] for r in report["rejected"]] == [1, 3, 4, 6, 8, 9, 11]
    assert report["rejected"][0]["reason"] == "empty_instruction"
    assert report["rejected"][0]["line"] == 7
    assert report["checks"]["not_text"] == 2
    assert set(report["checks"]) == set(program.CHECKS)
    assert report["check_details"]["not_text"]["rows"] == [8, 11]
    data = prepare.file(DATA / "broken_mixed.json", yes=True)
    assert len(data.train) + len(data.eval) + len(report["rejected"]) == 12
    assert not list((prepare.folder / "model").glob("*.json.*"))


def test_lengths_in_the_report_are_means_over_usable_rows(prepare: Preparer) -> None:
    rows = [
        {"instruction": "12345", "output": "1234567890"},
        {"instruction": "123456789", "output": "12"},
        {"instruction": "", "output": "x" * 100},
    ]
    data = prepare.rows(rows, yes=True)
    assert data.quality.avg_instruction_length == 7
    assert data.quality.avg_output_length == 6


def test_the_report_of_a_finished_run_is_not_overwritten(prepare: Preparer) -> None:
    model = prepare.folder / "model"
    model.mkdir()
    (model / "adapter_model.safetensors").write_bytes(b"finished")
    (model / "quality_report.json").write_text("{}")
    prepare.rows(filler(10))
    assert prepare.report() == {}
    (other,) = (prepare.folder / "logs").glob("quality_report_*.json")
    assert json.loads(other.read_text())["total_examples"] == 10


def test_poor_data_exits_with_13_unless_yes(
    run_cli: "Callable[..., CliResult]", tiny_model: Path, tmp_path: Path
) -> None:
    arguments = ["data", "--data_path", DATA / "broken_low_quality.jsonl"]
    arguments += ["--model_name", tiny_model, "--min_disk_gb", 0, "--max_seq_length", 512]
    arguments += ["--device", "cpu"]
    refused = run_cli(*arguments)
    assert refused.code == 13, refused.stderr
    assert "10 of 20 rows" in refused.stderr
    assert "Traceback" not in refused.stderr
    accepted = run_cli(*arguments, "--yes")
    assert accepted.code == 0, accepted.stderr
    assert (tmp_path / "collegeadvisor_unified_model" / "quality_report.json").is_file()


def test_no_usable_row_is_an_error_even_with_yes(prepare: Preparer) -> None:
    with pytest.raises(program.FineTuningError, match="None of the 8 rows"):
        prepare.file(DATA / "broken_empty_outputs.json", yes=True)
    assert prepare.report()["valid_examples"] == 0


def test_a_person_who_says_yes_goes_on_and_one_who_says_no_does_not(
    prepare: Preparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for answer in (True, False):
        monkeypatch.setattr(program, "ask", lambda q, _c, a=answer: asked.append(q) or a)
        if answer:
            assert prepare.file(DATA / "broken_mixed.json").quality.valid_examples == 5
        else:
            with pytest.raises(program.FineTuningError, match="5 of 12"):
                prepare.file(DATA / "broken_mixed.json")
    assert all(question.endswith("Go on?") for question in asked)


def test_a_lower_threshold_accepts_what_was_refused(prepare: Preparer) -> None:
    data = prepare.file(DATA / "broken_mixed.json", min_data_quality_score=0.4)
    assert data.quality.valid_examples == 5


# --- tokens


def test_examples_are_what_chat_sends_plus_answer_and_end_token(prepare: Preparer) -> None:
    rows = [*filler(30), {"instruction": "Tail?", "output": "Ends in\na new line:\n\n* é 日本 🎓"}]
    data = prepare.rows(rows, system_prompt="Be brief.")
    for row in all_rows(data):
        question = rows[row["row"]]["instruction"]
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": question},
        ]
        prompt = program.render_chat(data.tokenizer, messages, add_generation_prompt=True)
        served = program.tokenize_rendered(data.tokenizer, prompt)
        assert row["prompt"] == prompt
        assert row["input_ids"][: row["prompt_length"]] == served
        assert row["input_ids"].count(data.tokenizer.bos_token_id) == 1
        answer = data.tokenizer.decode(row["input_ids"][row["prompt_length"] :])
        assert answer == rows[row["row"]]["output"] + "</s>"


def test_real_tokens_equal_those_of_llama_cpp(assets: Path, tmp_path: Path) -> None:
    # What llama.cpp makes of this text: after </s> it puts token 29871, which AutoTokenizer drops.
    tokenizer = program.load_tokenizer(str(assets / "tokenizers" / "tinyllama-1.1b-chat"))
    prompt = program.render_chat(
        tokenizer, [{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )
    assert prompt == "<|user|>\nHi</s>\n<|assistant|>\n"
    assert program.tokenize_rendered(tokenizer, prompt) == [
        *(1, 529, 29989, 1792, 29989, 29958, 13, 18567, 2),
        *(29871, 13, 29966, 29989, 465, 22137, 29989, 29958, 13),
    ]


def copy_model(source: Path, target: Path, **settings: Any) -> Path:
    """Copy a model's configuration and tokenizer, with other tokenizer settings (None: without)."""
    target.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (target / name).write_bytes((source / name).read_bytes())
    content = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
    content = {k: v for k, v in {**content, **settings}.items() if v is not None}
    (target / "tokenizer_config.json").write_text(json.dumps(content))
    return target


def variant(prepare: Preparer, **settings: Any) -> Preparer:
    """Return a preparer with a copy of its model that has other tokenizer settings."""
    model = copy_model(prepare.model, prepare.folder / "variant", **settings)
    return Preparer(prepare.folder, model)


def supervised(row: "dict[str, Any]") -> "list[int]":
    """Return the tokens of an example that carry loss."""
    return row["input_ids"][row["prompt_length"] :]


def test_pad_equal_to_eos_keeps_the_end_token_supervised(prepare: Preparer) -> None:
    data = variant(prepare, pad_token="</s>").rows(filler(10))
    assert data.tokenizer.pad_token_id == data.tokenizer.eos_token_id
    assert all(supervised(row)[-1] == data.tokenizer.eos_token_id for row in all_rows(data))


def test_a_tokenizer_without_pad_token_gets_one(prepare: Preparer) -> None:
    data = variant(prepare, pad_token=None).rows(filler(10))
    assert data.tokenizer.pad_token == "</s>"


def test_a_template_that_writes_bos_itself_gives_one_bos(prepare: Preparer) -> None:
    plain = all_rows(prepare.rows(filler(10)))
    template = "{{ bos_token }}" + program.DEFAULT_CHAT_TEMPLATE
    data = variant(prepare, chat_template=template).rows(filler(10))
    assert [row["input_ids"] for row in all_rows(data)] == [row["input_ids"] for row in plain]
    assert all(row["prompt"].startswith("<s><|user|>") for row in all_rows(data))


def test_a_tokenizer_without_template_gets_tinyllama_s(prepare: Preparer) -> None:
    plain = all_rows(prepare.rows(filler(10)))
    assert all_rows(variant(prepare, chat_template=None).rows(filler(10))) == plain


def test_a_template_without_end_token_gets_it_after_the_answer(prepare: Preparer) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    data = variant(prepare, chat_template=template).rows(filler(10))
    for row in all_rows(data):
        text = data.tokenizer.decode(supervised(row))
        assert text == filler(10)[row["row"]]["output"] + "</s>"


def test_a_template_with_its_own_end_mark_trains_mark_and_end_token(prepare: Preparer) -> None:
    template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    data = variant(prepare, chat_template=template).rows(filler(4))
    row = all_rows(data)[0]
    assert data.tokenizer.decode(supervised(row)) == filler(1)[0]["output"] + "<end></s>"


def test_a_template_that_rewrites_history_still_trains_what_is_served(prepare: Preparer) -> None:
    # As templates for thinking models do: the generation prompt differs from the rendered answer.
    template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant><think></think>' }}{% endif %}"
    )
    data = variant(prepare, chat_template=template).rows(filler(6))
    for row in all_rows(data):
        assert row["prompt"].endswith("<assistant><think></think>")
        text = data.tokenizer.decode(supervised(row))
        assert text == filler(6)[row["row"]]["output"] + "</s>"


def test_a_template_that_changes_the_answer_stops(prepare: Preparer) -> None:
    template = program.DEFAULT_CHAT_TEMPLATE.replace(
        "message['content']", "(message['content'] | upper)"
    )
    with pytest.raises(program.FineTuningError, match="changes the answer of row 0"):
        variant(prepare, chat_template=template).rows(filler(6))


def test_a_template_that_refuses_messages_says_so(prepare: Preparer) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system please') }}"
        "{% endif %}" + program.DEFAULT_CHAT_TEMPLATE
    )
    refusing = variant(prepare, chat_template=template)
    with pytest.raises(program.FineTuningError, match="no system please"):
        refusing.rows(filler(6), system_prompt="Be brief.")
    assert len(all_rows(refusing.rows(filler(6)))) == 6


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(prepare: Preparer) -> None:
    expected = [row["input_ids"] for row in all_rows(prepare.rows(filler(8)))]
    ending = variant(prepare)
    path = ending.model / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    steps = content["post_processor"]
    steps["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    steps["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    path.write_text(json.dumps(content))
    assert [row["input_ids"] for row in all_rows(ending.rows(filler(8)))] == expected


def byte_level_model(prepare: Preparer) -> Preparer:
    """Return a preparer with a GPT-like tokenizer in which a space joins the word after it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["so: " + r["output"] for r in filler(50)], trainer)
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    settings = {"bos_token": None, "unk_token": None, "pad_token": None}
    model = copy_model(
        prepare.model,
        prepare.folder / "bytes",
        eos_token="<end>",
        chat_template=template,
        tokenizer_class="PreTrainedTokenizerFast",
        **settings,
    )
    tokenizer.save(str(model / "tokenizer.json"))
    return Preparer(prepare.folder, model)


def test_tokens_that_merge_across_the_border_are_counted_and_served_prompts_kept(
    prepare: Preparer,
) -> None:
    data = byte_level_model(prepare).rows(filler(12))
    assert data.quality.checks["merged_tokens"] == 12  # "assistant: It" holds the token " It"
    for row in all_rows(data):
        prompt_ids = program.tokenize_rendered(data.tokenizer, row["prompt"])
        assert row["input_ids"][: row["prompt_length"]] == prompt_ids
        whole = data.tokenizer.decode(row["input_ids"])
        assert whole == row["prompt"] + filler(12)[row["row"]]["output"] + "<end>"


def test_a_tokenizer_without_end_token_is_refused(prepare: Preparer) -> None:
    with pytest.raises(program.FineTuningError, match="no end-of-sequence token"):
        variant(prepare, eos_token=None).rows(filler(6))


def test_a_model_folder_without_tokenizer_is_refused(prepare: Preparer, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(program.FineTuningError, match="cannot be loaded"):
        Preparer(tmp_path, empty).rows(filler(6))


@pytest.mark.parametrize(
    ("ids", "prompt_length", "wrong"),
    [
        ([1, 9, 9, 8, 8, 2], 3, []),
        ([1, 9, 2, 9, 8, 8, 2], 4, []),  # an end token inside the prompt ends the user's turn
        ([9, 9, 9, 8, 8, 2], 3, ["no BOS", "two BOS"]),
        ([1, 1, 9, 8, 8, 2], 3, ["two BOS"]),
        ([1, 9, 9, 8, 8, 8], 3, ["no end token, or one inside the answer"]),
        ([1, 9, 9, 2, 8, 2], 3, ["no end token, or one inside the answer"]),
        ([1, 9, 9, 8, 2, 13], 3, ["no end token, or one inside the answer"]),
        ([1, 9, 9, 8, 8, 2], 0, ["nothing is supervised, or the prompt is"]),
        ([1, 9, 2], 3, ["nothing is supervised, or the prompt is"]),
    ],
)
def test_the_stop_token_proof_finds_each_violation(
    prepare: Preparer, ids: "list[int]", prompt_length: int, wrong: "list[str]"
) -> None:
    good = [1, 7, 8, 2]
    found = program.find_wrong_tokens(
        np.array([*good, *ids, *good]),
        np.array([4, len(ids), 4]),
        np.array([2, prompt_length, 2]),
        np.array([False, False, False]),
        program.load_tokenizer(str(prepare.model)),
    )
    assert [what for what, places in found.items() if places.any()][: len(wrong)] == wrong
    assert all(places.tolist() in ([False] * 3, [False, True, False]) for places in found.values())


def test_only_a_truncated_row_may_lack_the_end_token(prepare: Preparer) -> None:
    arguments = np.array([1, 7, 8, 8]), np.array([4]), np.array([2])
    tokenizer = program.load_tokenizer(str(prepare.model))
    for truncated in (True, False):
        found = program.find_wrong_tokens(*arguments, np.array([truncated]), tokenizer)
        assert found["no end token, or one inside the answer"].tolist() == [not truncated]


def test_an_example_that_would_not_teach_to_stop_stops_the_run(
    prepare: Preparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = program.encode_batch

    def forget_the_end(*arguments: Any) -> Any:
        rows = encode(*arguments)
        rows[2].ids.pop()
        return rows

    monkeypatch.setattr(program, "encode_batch", forget_the_end)
    with pytest.raises(program.FineTuningError, match="Row 2: no end token"):
        prepare.rows(filler(8))


# --- length


def long_rows() -> "list[dict[str, Any]]":
    """Return 400 short rows and one long one, row 7."""
    rows = filler(400)
    rows[7]["output"] = "a b c d e f g h i j " * 12
    return rows


def test_long_rows_are_dropped_by_default_and_listed(prepare: Preparer) -> None:
    data = prepare.rows(long_rows(), max_seq_length=128, yes=True)
    assert data.dropped_examples == 1
    assert data.truncated_examples == 0
    assert data.quality.dropped[0]["row"] == 7
    assert data.quality.checks["over_length"] == 1
    assert 7 not in [row["row"] for row in all_rows(data)]
    assert len(all_rows(data)) == 399
    assert data.quality.lost_answer_tokens > 100


def test_a_truncated_row_has_no_end_token_and_is_counted(prepare: Preparer) -> None:
    data = prepare.rows(long_rows(), max_seq_length=128, overlong="truncate", yes=True)
    assert (data.dropped_examples, data.truncated_examples) == (0, 1)
    row = all_rows(data)[7]
    assert len(row["input_ids"]) == 128
    assert data.tokenizer.eos_token_id not in supervised(row)
    assert data.quality.truncated[0]["row"] == 7
    others = [r for r in all_rows(data) if r["row"] != 7]
    assert all(supervised(r)[-1] == data.tokenizer.eos_token_id for r in others)


def test_a_prompt_over_the_limit_is_dropped_even_when_truncating(prepare: Preparer) -> None:
    rows = filler(400)
    rows[3]["instruction"] = "a b c d e f g h i j " * 30
    data = prepare.rows(rows, max_seq_length=128, overlong="truncate", yes=True)
    assert (data.dropped_examples, data.truncated_examples) == (1, 0)


def test_losing_more_than_a_hundredth_of_the_answer_tokens_stops(prepare: Preparer) -> None:
    rows = long_rows()[:40]
    with pytest.raises(program.FineTuningError, match=r"1 rows .*% of all answer tokens") as caught:
        prepare.rows(rows, max_seq_length=128)
    assert "--max_seq_length" in caught.value.hint
    assert len(all_rows(prepare.rows(rows, max_seq_length=128, yes=True))) == 39


def test_the_length_is_limited_to_the_model_s_positions(
    prepare: Preparer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        data = prepare.rows(filler(10), max_seq_length=4096)
    assert data.max_seq_length == 512
    assert "more than the model's 512 positions" in caplog.text


# --- split


def split(count: int, tmp_path: Path, **settings: Any) -> "np.ndarray[Any, Any]":
    """Return the sides of so many unrelated rows of mixed lengths."""
    random.seed(5)
    lengths = np.array([random.choice((20, 40, 70, 130, 300)) for _ in range(5000)])[:count]
    keys = np.array([program.digest(str(i)) for i in range(count)], np.uint64)
    config = make_config(tmp_path, tmp_path, **settings)
    return program.choose_sides(keys, lengths, config)


@pytest.mark.parametrize(
    ("count", "least", "most"),
    [(2, 1, 1), (3, 1, 1), (10, 1, 2), (20, 1, 3), (60, 4, 8), (337, 30, 38), (4000, 360, 440)],
)
def test_the_eval_share_is_close_for_every_size(
    tmp_path: Path, count: int, least: int, most: int
) -> None:
    for seed in range(20):
        sides = split(count, tmp_path, seed=seed)
        assert least <= (sides == program.EVAL).sum() <= most
        assert (sides == program.UNUSED).sum() == 0


def test_two_rows_are_one_to_train_and_one_to_evaluate_whatever_the_shares(tmp_path: Path) -> None:
    for seed in range(50):
        sides = split(2, tmp_path, seed=seed, train_split=0.1, eval_split=0.1)
        assert sorted(sides) == [program.TRAIN, program.EVAL]


def test_seeds_give_different_splits_and_the_same_seed_the_same(tmp_path: Path) -> None:
    first, again, other = (split(400, tmp_path, seed=seed) for seed in (1, 1, 2))
    assert (first == again).all()
    both = ((first == program.EVAL) & (other == program.EVAL)).sum()
    assert both < 15  # of 40; 4 would be chance


def test_appending_rows_moves_no_earlier_row(tmp_path: Path) -> None:
    for count in (50, 337, 1200):
        assert (split(count, tmp_path) == split(count + 300, tmp_path)[:count]).all()


def test_short_and_long_rows_are_on_both_sides_in_proportion(tmp_path: Path) -> None:
    lengths = np.array([30] * 400 + [200] * 100)
    keys = np.array([program.digest(str(i)) for i in range(500)], np.uint64)
    for seed in range(10):
        sides = program.choose_sides(keys, lengths, make_config(tmp_path, tmp_path, seed=seed))
        held_out = lengths[sides == program.EVAL]
        assert 35 <= (held_out == 30).sum() <= 45
        assert 7 <= (held_out == 200).sum() <= 13


def test_a_family_is_never_torn_and_a_large_one_is_trained_on(tmp_path: Path) -> None:
    families = np.array([0] * 200 + list(range(1, 301)) + [7] * 3, np.uint64)
    lengths = np.full(len(families), 50)
    for seed in range(50):
        sides = program.choose_sides(families, lengths, make_config(tmp_path, tmp_path, seed=seed))
        assert len(set(sides[families == 7])) == 1
        assert set(sides[families == 0]) == {program.TRAIN}
        assert 40 <= (sides == program.EVAL).sum() <= 60


def test_shares_below_one_leave_rows_unused_and_say_so(
    prepare: Preparer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        data = prepare.rows(filler(200), train_split=0.5, eval_split=0.2)
    assert abs(len(data.train) - 100) <= 6
    assert abs(len(data.eval) - 40) <= 5
    unused = 200 - len(data.train) - len(data.eval)
    assert f"{unused} unused" in caplog.text


def test_one_question_alone_cannot_be_split(prepare: Preparer) -> None:
    row = {"instruction": "Why?", "output": "Because."}
    with pytest.raises(program.FineTuningError, match="versions of one question"):
        prepare.rows([row, row, {**row, "output": "For a reason."}])
    with pytest.raises(program.FineTuningError, match="versions of one question"):
        prepare.rows([row])


# --- the cache


def count_builds(monkeypatch: pytest.MonkeyPatch) -> "list[str]":
    """Return a list that grows with every preparation that is really made."""
    built: list[str] = []
    build = program.build_prepared

    def counting(*arguments: Any) -> None:
        built.append("built")
        build(*arguments)

    monkeypatch.setattr(program, "build_prepared", counting)
    return built


def test_the_same_data_and_settings_are_prepared_once(
    prepare: Preparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = count_builds(monkeypatch)
    first = prepare.rows(filler(20))
    second = prepare.rows(filler(20), seed=7, train_split=0.8, eval_split=0.2)
    assert len(built) == 1
    assert all_rows(first) == all_rows(second)
    assert first.quality == second.quality
    prepare.rows(filler(20), system_prompt="Be brief.")
    prepare.rows(filler(20), max_seq_length=300)
    prepare.rows(filler(21))
    variant(prepare, chat_template="{{ bos_token }}" + program.DEFAULT_CHAT_TEMPLATE).rows(
        filler(20)
    )
    assert len(built) == 5
    names = {path.name for path in (prepare.folder / "cache" / "prepared").rglob("*")}
    assert "stems.bin" not in names
    assert not [name for name in names if name.startswith("building-")]


@pytest.mark.parametrize("name", ["examples.arrow", "plan.npz", "report.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_cache_is_made_anew(
    prepare: Preparer, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    expected = all_rows(prepare.rows(filler(20)))
    (path,) = (prepare.folder / "cache" / "prepared").glob(f"*/{name}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x11
    damaged = {"flip": content, "cut": content[: len(content) // 2], "empty": b""}
    path.unlink()
    if damage != "gone":
        path.write_bytes(damaged[damage])
    built = count_builds(monkeypatch)
    assert all_rows(prepare.rows(filler(20))) == expected
    assert len(built) == 1


def test_a_process_that_was_faster_is_not_disturbed(
    prepare: Preparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = all_rows(prepare.rows(filler(20)))
    (folder,) = (prepare.folder / "cache" / "prepared").iterdir()
    faster = prepare.folder / "faster"
    folder.rename(faster)
    build = program.build_prepared

    def build_while_another_finishes(*arguments: Any) -> None:
        build(*arguments)
        faster.rename(folder)

    monkeypatch.setattr(program, "build_prepared", build_while_another_finishes)
    inode = (faster / "examples.arrow").stat().st_ino
    assert all_rows(prepare.rows(filler(20))) == expected
    assert (folder / "examples.arrow").stat().st_ino == inode
    assert list(folder.parent.iterdir()) == [folder]


def test_what_a_killed_run_left_behind_is_removed_after_a_day(prepare: Preparer) -> None:
    cache = prepare.folder / "cache" / "prepared"
    for name, age in (("building-old", 100_000), ("building-new", 100)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    prepare.rows(filler(5))
    assert {path.name for path in cache.iterdir() if "-" in path.name} == {"building-new"}


def test_only_the_last_preparations_are_kept(prepare: Preparer) -> None:
    for count in range(2, 12):
        prepare.rows(filler(count))
    assert len(list((prepare.folder / "cache" / "prepared").iterdir())) == 5


def test_a_full_or_forbidden_cache_folder_is_an_error_with_a_way_out(prepare: Preparer) -> None:
    (prepare.folder / "cache").write_text("a file stands in the way")
    with pytest.raises(program.FineTuningError, match="cannot be written") as caught:
        prepare.rows(filler(5))
    assert "--cache_dir" in caught.value.hint
