"""Stage 3: doubtful rows are told by name, and related rows stay on one side of the split."""

import json
import random
import shutil
from typing import Any

import pytest
import test_prepare
from conftest import FAULTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_prepare import NOT_TRAINED, Preparer, Row, all_rows, filler, found

import unified_finetune as program

prepare = test_prepare.prepare  # the fixture


@pytest.fixture
def real_rows(assets):
    """Return 1,200 real Alpaca rows."""
    text = (assets / "data" / "alpaca_clean_sample.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def real(assets, tmp_path):
    """Return a preparer with TinyLlama's tokenizer and a model that is as small as can be."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "tinyllama"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "max_position_embeddings": 2048}
    LlamaForCausalLM(LlamaConfig(vocab_size=32000, **sizes, **heads)).save_pretrained(folder)
    for path in (assets / "tokenizers" / "tinyllama-1.1b-chat").iterdir():
        shutil.copyfile(path, folder / path.name)
    return Preparer(tmp_path, folder)


def test_the_names_that_drop_checks_takes_are_those_of_the_warnings():
    names = {name for name, kind in program.CHECKS.items() if kind[0] in ("warn", "repair")}
    assert set(program.WARNING_CHECKS) == names
    assert len(program.WARNING_CHECKS) == len(names)


def chat(question: str, answer: str, **more: Any) -> Row:
    """Return a row of messages; `more` goes into the answer's turn."""
    turns = [{"role": "user", "content": question}]
    return {"messages": [*turns, {"role": "assistant", "content": answer, **more}]}


ASIDE = "Reply N/A if no plant is named."
WARNED = [  # a row, and what it is warned about; None: it is trained as it is, without a word
    ({"output": r"Use $" + "\frac{1}{2}$ here."}, "eaten_backslash control_characters"),
    ({"output": "Say $" + "\beta$ aloud."}, "eaten_backslash control_characters"),
    ({"output": "It is $2 \times 3$ here."}, "eaten_backslash"),
    ({"output": "Write $\nabla f$ here."}, "eaten_backslash"),
    ({"output": "A table:\n\tan entry\n\ttotal"}, None),
    ({"output": "B", "choices": ["A. oak", "B. trout"]}, "choices unused_keys"),
    ({"output": "B", "documents": ["A text."]}, "documents unused_keys"),
    ({"output": "B.", "images": ["a.jpg"]}, "images unused_keys"),
    ({"instruction": "<image> What is it?", "output": "A heron."}, "images"),
    ({"output": "B.", "label": False}, "negative_label"),
    (chat("Tide?", "Let me look.", tool_calls=[{"id": "a"}]), "tool_calls unused_keys"),
    (chat("add capitals: we left early", "We left early."), None),
    (chat("set it twice as deep as it is tall", "Set it, twice as deep, as it is tall."), None),
    (chat("select a,b from t where c=1", "SELECT a, b\nFROM t\nWHERE c = 1"), None),
    (chat("Name the capital of it.", " Name the capital of it.\n"), "answer_repeats_question"),
    ({"input": "A very long text.", "output": "A very long text."}, "answer_repeats_question"),
    ({"output": "Get-ChildItem > $null"}, None),
    ({"output": "null % 2 gives 0, and NaN % 2 is NaN."}, None),
    ({"output": "Tuition is $nan per year."}, "placeholder_answer"),
    ({"output": "<nooutput>"}, "placeholder_answer"),
    ({"output": "N/A"}, "placeholder_answer"),
    ({"instruction": ASIDE, "input": "A lamp.", "output": "N/A"}, None),
    ({"input": "N/A", "output": "A thing."}, "placeholder_input"),
    ({"output": "As an AI language model, I cannot visit."}, "ai_boilerplate"),
    ({"output": "I am Wick, an AI assistant made here."}, None),
    ({"output": "First\vSecond\fThird"}, "control_characters"),
    ({"output": "Use Î at the start, and NÃO or Â inside."}, None),
    ({"output": "It becomes Ã©, and itâ€™s two."}, "mojibake"),
    ({"output": "A naïve café — „Spaß“, ‘quoted’ … à la carte »"}, None),
    ({"output": "lost \ufffd letter"}, "broken_encoding"),
    ({"output": "Done.<|im_end|>"}, "foreign_marks"),
    ({"instruction": "[INST] What? [/INST]", "output": "That."}, "foreign_marks"),
    ({"output": "Fine.</s>"}, "appended_end_token"),
    ({"output": "    return a + b"}, None),
    ({"output": "\n\nThen the text. \n"}, None),
    ({"output": "👩‍👩‍👧 🎓 and می‌خواهم"}, None),
    ({"output": "The office reads every letter that they and their"}, "cut_off_answer"),
    ({"output": "It helps. You will see that over the next years the costs go"}, "cut_off_answer"),
    ({"output": "Run this:\n```python\nprint(1)"}, "unbalanced_code_fence"),
    ({"output": "The acceptance rate at Elm College is 0.04%."}, "implausible_value"),
    ({"output": "The admission rate is 0.0039."}, "implausible_value"),
    ({"output": "The graduation rate rose by 0.8 percentage points."}, None),
]


@pytest.mark.parametrize(("row", "checks"), WARNED)
def test_a_doubtful_row_is_trained_with_a_warning(prepare, row, checks):
    row = row if "messages" in row else {"instruction": "What is it?", **row}
    names = set((checks or "").split())
    data = prepare.rows([*filler(30), row])
    assert {name for name, count in data.quality.checks.items() if count} == names
    assert found(data) == {(30, name) for name in names - {"unused_keys"}}
    assert data.quality.quality_score == 1
    assert len(all_rows(data)) == 31
    answer = row["messages"][1]["content"] if "messages" in row else row["output"]
    if not names & {"control_characters", "appended_end_token"}:
        assert all_rows(data)[30]["answer"] == answer
    drop = tuple(names & set(program.WARNING_CHECKS))
    if drop:
        assert len(all_rows(prepare.rows([*filler(30), row], drop_checks=drop))) == 30


def test_a_key_that_stands_twice_and_unused_keys_are_told(prepare):
    rows = [json.dumps({**row, "id": n}) for n, row in enumerate(filler(20))]
    rows[7] = '{"output": "Old one.", ' + rows[7][1:]
    for content in ("\n".join(rows), "[" + ",".join(rows) + "]"):
        data = prepare.content(content)
        assert found(data) == {(7, "repeated_key")}
        assert all_rows(data)[7]["answer"] == filler(20)[7]["output"]
        (told,) = data.quality.check_details["unused_keys"]["examples"]
        assert told["detail"] == "id (20 rows)"


# --- rows compared with each other


def test_an_exact_duplicate_is_dropped_unless_it_is_wanted(prepare):
    rows = filler(30)
    rows[20] = dict(rows[3])
    rows[21] = {**rows[3], "system": "Be brief."}  # that is no duplicate
    data = prepare.rows(rows)
    assert (20, "exact_duplicate") in found(data)
    assert data.quality.dropped[0]["row"] == 20
    assert [row["row"] for row in all_rows(data)] == [i for i in range(30) if i != 20]
    for seed in range(6):
        data = prepare.rows(rows, keep_duplicates=True, seed=seed)
        assert len(all_rows(data)) == 30
        assert len({3, 20, 21} & set(data.eval["row"])) in (0, 3)


@pytest.mark.parametrize("check", ["contradiction", "near_duplicate"])
def test_rows_that_are_nearly_the_same_are_told_and_stay_together(prepare, check):
    rows = filler(60)
    text = "Compare the net price, the distance, the programs and the people before you decide."
    rows[3] = {"instruction": "How do I choose between two colleges?", "output": text}
    again = "How do I choose between two good colleges?"
    rows[50] = {"instruction": again, "output": text.replace("people", "city")}
    if check == "contradiction":
        rows[50] = {"instruction": rows[3]["instruction"].upper(), "output": "Never."}
    for seed in range(6):
        data = prepare.rows(rows, seed=seed)
        assert found(data) == {(50, check)}
        assert len(set(data.eval["row"]) & {3, 50}) != 1
    (example,) = data.quality.check_details[check]["examples"]
    assert "row 3" in example["detail"]


def test_a_row_many_times_as_long_as_the_others_is_an_outlier(prepare):
    rows = filler(60)
    rows[7]["output"] = " ".join(f"Go {i}." for i in range(250)) * 3
    data = prepare.rows(rows, yes=True, overlong="truncate")
    assert found(data) == {(7, "length_outlier"), (7, "over_length")}


def test_in_clean_data_only_broken_rows_are_warned_about(real, real_rows, sample_data):
    data = real.file(sample_data)
    assert found(data) == set()
    assert (len(data.train), len(data.eval)) == (303, 34)
    data = real.rows(real_rows, max_seq_length=1024)
    assert found(data) == {(660, "placeholder_answer"), (1154, "placeholder_answer")}


@pytest.mark.parametrize("seed", range(3))
def test_planted_faults_are_found_by_name_and_nothing_else_is(real, real_rows, seed):
    chance = random.Random(seed)
    long = {"output": "And so on it goes, as it went before. " * 400}
    denied = {**real_rows[2], "output": f"It never was: {real_rows[3]['output']}"}
    faults = [(row, check) for row, check, _ in NOT_TRAINED] + [(row, c or "") for row, c in WARNED]
    faults += [(real_rows[1], "exact_duplicate"), (denied, "contradiction"), (long, "over_length")]
    expected = {(660, "placeholder_answer"), (1154, "placeholder_answer")}
    places = chance.sample(range(661, 1154), len(faults))
    for place, (row, checks) in zip(places, faults, strict=True):
        part = row and "output" in row and "instruction" not in row  # of a real row
        part = part and checks != "empty_instruction"
        real_rows[place] = {**real_rows[place], **row} if part else row
        expected |= {(place, name) for name in checks.split() if name != "unused_keys"}
    assert found(real.rows(real_rows, yes=True, max_seq_length=1024)) == expected


# --- the split does not leak

PARAPHRASES = """\
Can I appeal my financial aid offer? | Yes. Write to the aid office, explain what changed, and attach proof such as a layoff notice.
Is it possible to ask for more financial aid than was offered? | Yes, you can appeal: write the aid office a letter that explains the change, with proof of it.
Why should I visit a campus? | A visit shows how students live and study there, which no brochure can.
What is the point of going to see a campus? | You see how students really live and study, which a brochure cannot show.
What is a Pell Grant? | It is a federal grant for undergraduates with high need, and it need not be repaid.
Could you tell me what the Pell Grant is? | The Pell Grant is federal money for undergraduates with high need that need not be paid back.
What does need-blind admission mean? | The college decides without looking at whether you can pay.
Explain need-blind admission to me. | It means that the college does not look at your ability to pay when it decides.
What is the capital of Australia? | The capital of Australia is Canberra.
Which city is Australia's capital? | Canberra is the capital city of Australia.
Convert 10 kilometers to miles. | 10 kilometers is about 6.21 miles.
How many miles are 10 kilometers? | 10 kilometers are roughly 6.21 miles.
Who pays for a campus visit? | Usually you do, but some colleges pay for students of low income.
who pays for a campus visit | You do, as a rule.
"""  # noqa: E501


def test_paraphrases_never_straddle_the_split(real, real_rows):
    lines = PARAPHRASES.splitlines()
    places = random.Random(1).sample(range(1200), len(lines))
    for place, line in zip(places, lines, strict=True):
        real_rows[place] = dict(zip(("instruction", "output"), line.split(" | "), strict=True))
    together = 0
    for seed in range(4):
        data = real.rows(real_rows, seed=seed, yes=True, max_seq_length=1024)
        held_out = set(data.eval["row"])
        assert abs(len(held_out) - 120) <= 1
        for pair in zip(places[::2], places[1::2], strict=True):
            assert len(held_out & set(pair)) != 1, (seed, real_rows[pair[0]])
            together += len(held_out & set(pair)) == 2
    assert together  # pairs do get to the eval side


def test_rows_from_one_sentence_about_many_colleges_are_no_family(prepare):
    starts, ends = "Ash Bur Cal Dun Kent Lan Mar Oak Pem Rock", "ton field ford ham bury wood ville"
    names = [a + b for a in starts.split() for b in f"{ends} land mont side".split()]
    facts = {name: f"{name} asks for ${n * 91:,}." for n, name in enumerate(names, 50)}
    rows = [{"instruction": f"How much is tuition at {n}?", "output": facts[n]} for n in names]
    data = prepare.rows(rows)
    assert (len(data.train), len(data.eval)) == (90, 10)
    assert data.quality.checks["near_duplicate"] <= 5


# --- any file at all

odd = st.sampled_from(["", " ", "N/A", "</s>", "<|user|>", "\ud800", "\x00", "\v", "\r\n", "0.1%"])
texts = st.one_of(st.text(max_size=30), odd, st.tuples(st.text(max_size=9), odd).map("".join))
values = st.one_of(texts, st.none(), st.booleans(), st.floats(), st.lists(texts, max_size=2))
roles = st.one_of(st.sampled_from(["user", "assistant", "system", "human", "gpt"]), values)
turn = st.fixed_dictionaries(
    {}, optional={"role": roles, "content": texts, "from": roles, "value": values, "weight": values}
)
keys = ("instruction", "input", "output", "prompt", "completion", "history", "system", "x")
any_row = st.one_of(
    values,
    st.fixed_dictionaries({}, optional=dict.fromkeys(keys, values)),
    st.fixed_dictionaries({"instruction": texts, "output": texts}),
    st.fixed_dictionaries({"messages": st.lists(st.one_of(turn, values), max_size=5)}),
)
quick = settings(
    max_examples=150, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def as_trained(text: str) -> str:
    """Return a text as the rules have it."""
    text = text.replace("\r\n", "\n").replace("\ufeff", "").replace("\0", "")
    for mark in "\v\f\r":
        text = text.replace(mark, "\n")
    return "".join(
        " " if c != "\t" and c != "\n" and (c < " " or "\x7f" <= c <= "\x9f") else c for c in text
    )


@quick
@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=8))
def test_no_text_is_changed_but_by_the_rules_and_no_row_vanishes(pairs, prepare):
    rows = [*filler(4), *({"instruction": q, "output": a} for q, a in pairs)]
    data = prepare.rows(rows, yes=True, keep_duplicates=True)
    used = all_rows(data)
    left_out = data.quality.rejected + data.quality.dropped
    assert sorted([r["row"] for r in used] + [r["row"] for r in left_out]) == [*range(len(rows))]
    for row in used:
        question, answer = (as_trained(rows[row["row"]][key]) for key in ("instruction", "output"))
        while answer.rstrip().endswith("</s>"):
            answer = answer.rstrip().removesuffix("</s>")
        ((start, end),) = row["spans"]
        assert (row["question"], row["answer"]) == (question, answer)
        assert program.decode(data.tokenizer, row["input_ids"][start:end]) == answer
        asked = [{"role": "user", "content": question}]
        assert row["input_ids"][:start] == program.tokenize_prompt(data.tokenizer, asked)


@quick
@given(
    rows=st.lists(any_row, max_size=6),
    lines=st.booleans(),
    noise=st.one_of(st.just(b""), st.binary(max_size=6)),
    at=st.integers(0, 400),
)
def test_any_file_is_prepared_or_refused(rows, lines, noise, at, prepare):
    FAULTS["data files drawn at random, most of them malformed"] += 1
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    content = text.encode()[:at] + noise + text.encode()[at:]
    try:
        data = prepare.content(content, yes=True)
    except program.FineTuningError as error:
        assert str(error)
        return
    quality = data.quality
    used = len(data.train) + len(data.eval)
    assert quality.total_examples == used + len(quality.rejected) + len(quality.dropped)
