"""Stage 3: faults in the data are found by name, and related rows stay on one side of the split."""

import json
import logging
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FAULTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepare_helpers import Preparer, all_rows, describe_file, filler, make_config, write_rows

import unified_finetune as program

Row = dict[str, Any]


@pytest.fixture
def prepare(tmp_path: Path, tiny_model: Path) -> Preparer:
    """Return a preparer with the tiny model."""
    return Preparer(tmp_path, tiny_model)


@pytest.fixture(scope="module")
def real_rows(assets: Path) -> "list[Row]":
    """Return 1,200 real Alpaca rows."""
    text = (assets / "data" / "alpaca_clean_sample.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def real_model(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with TinyLlama's tokenizer and as much configuration as stage 3 reads."""
    folder = tmp_path_factory.mktemp("real") / "tinyllama"
    shutil.copytree(assets / "tokenizers" / "tinyllama-1.1b-chat", folder)
    folder.chmod(0o755)
    content = {"model_type": "llama", "max_position_embeddings": 2048, "vocab_size": 32000}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def found(data: program.PreparedData) -> "set[tuple[int, str]]":
    """Return every finding as row and name of the check."""
    details = data.quality.check_details
    return {(row, name) for name, detail in details.items() for row in detail["rows"]}


# --- single checks


@pytest.mark.parametrize(
    ("row", "check"),
    [
        ({"output": "N/A"}, "placeholder_answer"),
        ({"output": "<nooutput>"}, "placeholder_answer"),
        ({"output": "No output."}, "placeholder_answer"),
        ({"output": "TODO"}, "placeholder_answer"),
        ({"output": "..."}, "placeholder_answer"),
        ({"output": "null"}, "placeholder_answer"),
        ({"output": "Lorem ipsum dolor sit amet."}, "placeholder_answer"),
        ({"output": "[insert answer here]"}, "placeholder_answer"),
        ({"output": "Tuition is $nan per year."}, "placeholder_answer"),
        ({"output": "About None% are admitted."}, "placeholder_answer"),
        ({"output": "<noinput> is given."}, "placeholder_answer"),
        ({"output": "As an AI language model, I cannot visit."}, "ai_boilerplate"),
        ({"output": "Sorry. As an AI assistant I have no opinion."}, "ai_boilerplate"),
        (
            {"instruction": "Name the capital.", "output": "name the capital"},
            "answer_repeats_question",
        ),
        (
            {
                "instruction": "Shorten this.",
                "input": "A very long text.",
                "output": "A very long text.",
            },
            "answer_repeats_question",
        ),
        (
            {
                "instruction": "Shorten this.",
                "input": "A b c.",
                "output": "Shorten this.\n\nA b c.",
            },
            "answer_repeats_question",
        ),
        ({"output": "Fine.</s>Ignore all that."}, "special_tokens"),
        ({"output": "Fine.\n<|user|>\nAnd now?"}, "special_tokens"),
        ({"instruction": "Say <|assistant|> please"}, "special_tokens"),
        ({"input": "<s>"}, "special_tokens"),
        ({"output": "lost \ufffd letter"}, "broken_encoding"),
    ],
)
def test_a_row_that_would_teach_nonsense_is_dropped_under_its_name(
    prepare: Preparer, row: Row, check: str
) -> None:
    rows = [*filler(30), {"instruction": "What is it?", "input": "", "output": "A thing.", **row}]
    data = prepare.rows(rows)
    assert found(data) == {(30, check)}
    assert [(r["row"], r["reason"]) for r in data.quality.rejected] == [(30, check)]
    assert data.quality.check_details[check]["action"] == "drop"


@pytest.mark.parametrize(
    "row",
    [
        {"output": "None of them."},
        {"output": "none"},
        {"output": "?"},
        {"output": "Nan is short for Nancy, and null is the number zero in German."},
        {"instruction": "Who are you?", "output": "I am an AI assistant made for applicants."},
        {"instruction": "What did GPT-3 bring?", "output": "A language model that answers."},
        {"output": "Use <div> and [link] in your page."},
        {"instruction": "Fix: he go", "input": "he go home", "output": "He goes home."},
        {"instruction": "Punctuate.", "input": "wait what", "output": "Wait, what?"},
        {"instruction": "Use 3 emoji.", "output": "👩‍👩‍👧 🎓 🏫"},  # joined by zero-width joiners
        {"instruction": "In Persian?", "output": "می‌خواهم"},  # a zero-width non-joiner
        {"instruction": "Dash?", "output": "A naïve café — “quoted” …"},
        {"instruction": "Code?", "output": "```python\nx = 1\n```"},
        {"instruction": "A list?", "output": "1. First thing\n2. Second thing\n3. Third thing"},
        {"instruction": "A headline?", "output": "Colleges Open Their Doors To All New Students"},
        {"instruction": "A quote?", "output": '"To be is to do." - Socrates'},
        {"instruction": "Password?", "output": "B9u(h#-g7WH1y"},
        {
            "instruction": "Say it in French: the house",
            "output": "La maison est dans la rue des "
            "Lilas et nous sommes dans le jardin avec les enfants.",
        },
    ],
)
def test_what_only_looks_odd_raises_no_alarm(prepare: Preparer, row: Row) -> None:
    rows = [*filler(30), {"instruction": "What is it?", "input": "", "output": "A thing.", **row}]
    data = prepare.rows(rows)
    assert found(data) == set()
    assert data.quality.mean_score == 1


@pytest.mark.parametrize(
    ("written", "repaired", "check"),
    [
        ("The cafÃ© is ours.", "The café is ours.", "mojibake"),
        ("Itâ€™s free.", "It’s free.", "mojibake"),
        ("A \x07bell and \x1b[31mred\x1b[0m.", "A bell and red.", "control_characters"),
        ("Zero\u200bwidth \ufeffspace.", "Zerowidth space.", "zero_width_characters"),
        ("An in\u200cvisible joiner.", "An invisible joiner.", "zero_width_characters"),
    ],
)
def test_a_repair_changes_the_text_and_is_counted(
    prepare: Preparer, written: str, repaired: str, check: str
) -> None:
    rows = filler(30)
    rows[4]["output"] = written
    data = prepare.rows(rows)
    assert found(data) == {(4, check)}
    assert all_rows(data)[4]["answer"] == repaired
    assert data.quality.check_details[check]["action"] == "repair"
    assert data.quality.quality_score == 1


def test_a_placeholder_input_is_taken_as_none(prepare: Preparer) -> None:
    rows = filler(30)
    rows[3]["input"], rows[9]["input"] = "N/A", "<noinput>"
    data = prepare.rows(rows)
    assert data.quality.checks["placeholder_input"] == 2
    assert "N/A" not in all_rows(data)[3]["prompt"]
    assert "noinput" not in all_rows(data)[9]["prompt"]


@pytest.mark.parametrize(
    ("output", "check"),
    [
        ("The office reads every letter that the students and their", "cut_off_answer"),
        ("It helps. You will see that over the next years the costs go", "cut_off_answer"),
        ("First, ask the office. Then write down what they said,", "cut_off_answer"),
        ("Run this:\n```python\nprint(1)", "unbalanced_code_fence"),
        ("The acceptance rate at Elm College is 0.04%.", "implausible_value"),
        ("Only 0.7 percent of applicants were admitted.", "implausible_value"),
        ("Its graduation rate was .82% last year.", "implausible_value"),
        ("The admission rate is 0.0039.", "implausible_value"),
    ],
)
def test_a_doubtful_answer_is_kept_with_a_warning_and_a_lower_score(
    prepare: Preparer, output: str, check: str
) -> None:
    rows = filler(30)
    rows[4]["output"] = output
    data = prepare.rows(rows)
    assert found(data) == {(4, check)}
    assert data.quality.check_details[check]["action"] == "warn"
    assert len(all_rows(data)) == 30
    assert data.quality.worst_rows[0]["row"] == 4
    assert data.quality.worst_rows[0]["score"] == 1 - program.CHECKS[check].penalty
    assert sum(data.quality.score_histogram) == 30
    assert data.quality.score_histogram[9] == 29


@pytest.mark.parametrize(
    "output",
    [
        "The acceptance rate at Elm College is 4%.",
        "The graduation rate rose by 0.8 percentage points.",
        "The loan's origination fee is 0.5% of the amount.",
        "The acceptance rate of 0.37 means 37 in 100.",
        "The acceptance rate fell 0.6% in a year.",
    ],
)
def test_plausible_rates_raise_no_alarm(prepare: Preparer, output: str) -> None:
    rows = filler(30)
    rows[4]["output"] = output
    assert found(prepare.rows(rows)) == set()


def test_plausibility_rules_can_be_replaced_by_a_file(prepare: Preparer, tmp_path: Path) -> None:
    rule = {"name": "cheap", "subject": "tuition", "before": r"\$", "below": 500, "meaning": "low"}
    path = tmp_path / "rules.json"
    path.write_text(json.dumps([rule]))
    rows = filler(30)
    rows[4]["output"] = "The tuition is $41 a year."
    rows[5]["output"] = "The tuition is $41,000 a year."
    rows[6]["output"] = "The acceptance rate is 0.04%."
    data = prepare.rows(rows, plausibility_rules=str(path))
    assert found(data) == {(4, "implausible_value")}
    assert "cheap" in data.quality.check_details["implausible_value"]["examples"][0]["detail"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("[", "cannot be read"),
        ("{}", "must be a JSON list"),
        ('["x"]', "rule 1 must be an object"),
        ('[{"name": "a"}]', "needs a name and a subject"),
        ('[{"name": "a", "subject": "b", "below": "1"}]', "'below' is not a known key"),
        ('[{"name": "a", "subject": "b", "most": 1}]', "'most' is not a known key"),
        ('[{"name": "a", "subject": "("}]', "rule 1: not a regular expression"),
    ],
)
def test_a_wrong_rule_is_refused_by_number(
    prepare: Preparer, tmp_path: Path, content: "str | None", message: str
) -> None:
    path = tmp_path / "rules.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(program.FineTuningError, match=message):
        prepare.rows(filler(4), plausibility_rules=str(path))


# --- rows compared with each other


def test_an_exact_duplicate_is_dropped_and_names_the_first(prepare: Preparer) -> None:
    rows = filler(30)
    rows[20] = {**rows[3], "output": rows[3]["output"] + "\n"}
    data = prepare.rows(rows)
    assert found(data) == {(20, "exact_duplicate")}
    assert data.quality.dropped[0]["detail"] == "the same as row 3"
    assert data.dropped_examples == 1
    assert data.quality.quality_score == 1  # the row is valid, only superfluous
    assert [row["row"] for row in all_rows(data)] == [i for i in range(30) if i != 20]


def test_the_same_question_under_two_system_messages_is_no_duplicate(prepare: Preparer) -> None:
    rows = filler(30)
    rows[20] = {**rows[3], "system": "Be brief."}
    data = prepare.rows(rows)
    assert data.quality.checks["exact_duplicate"] == 0


def test_a_contradiction_is_told_with_both_answers_and_stays_on_one_side(
    prepare: Preparer,
) -> None:
    rows = filler(60)
    rows[50] = {**rows[3], "instruction": rows[3]["instruction"].upper(), "output": "Never."}
    for seed in range(10):
        data = prepare.rows(rows, seed=seed)
        assert found(data) == {(50, "contradiction")}
        held_out = {row["row"] for row in data.eval}
        assert len(held_out & {3, 50}) != 1
    (example,) = data.quality.check_details["contradiction"]["examples"]
    assert "row 3" in example["detail"]
    assert "Never." in example["detail"]


def test_a_near_duplicate_is_kept_with_a_warning_on_the_side_of_the_first(
    prepare: Preparer,
) -> None:
    rows = filler(60)
    text = "Compare the net price, the distance, the programs and the people before you decide."
    rows[3] = {"instruction": "How do I choose between two colleges?", "output": text}
    rows[50] = {
        "instruction": "How do I choose between two good colleges?",
        "output": text.replace("people", "city"),
    }
    for seed in range(10):
        data = prepare.rows(rows, seed=seed)
        assert found(data) == {(50, "near_duplicate")}
        assert len({row["row"] for row in data.eval} & {3, 50}) != 1


def test_an_answer_in_another_language_is_an_outlier(prepare: Preparer, sample_data: Path) -> None:
    rows = json.loads(sample_data.read_text("utf-8"))[:100]
    rows[7]["output"] = (
        "La universidad lee la solicitud entera y mira las notas del estudiante, pero los "
        "ensayos y las cartas también cuentan para la decisión."
    )
    rows[8]["output"] = "大学会阅读整份申请，并查看学生的成绩。"
    rows[9]["instruction"] = "How do you say in German that college is expensive?"
    rows[9]["output"] = "Das Studium ist teuer, und die Gebühren sind nicht für alle zu bezahlen."
    data = prepare.rows(rows, yes=True)
    assert found(data) == {(7, "language_outlier"), (8, "language_outlier")}
    examples = data.quality.check_details["language_outlier"]["examples"]
    assert [e["detail"] for e in examples] == [
        "Spanish, not English",
        "Chinese or Japanese, not English",
    ]


def test_a_row_many_times_as_long_as_the_others_is_an_outlier(prepare: Preparer) -> None:
    rows = filler(60)
    rows[7]["output"] = " ".join(f"Then {i} comes." for i in range(400))
    data = prepare.rows(rows, yes=True)
    assert found(data) == {(7, "length_outlier"), (7, "over_length")}


def test_the_sample_and_its_neighbours_raise_no_alarm(
    prepare: Preparer, sample_data: Path, tiny_model: Path
) -> None:
    data = prepare.file(sample_data, yes=True)
    assert found(data) <= {(row, "over_length") for row in range(337)}
    assert data.quality.valid_examples == 337


def test_the_sample_raises_no_alarm_with_real_tokens(
    real_model: Path, sample_data: Path, tmp_path: Path
) -> None:
    data = Preparer(tmp_path, real_model).file(sample_data)
    assert found(data) == set()
    assert (len(data.train), len(data.eval)) == (303, 34)


# --- planted faults


def plant(rows: "list[Row]", seed: int) -> "set[tuple[int, str]]":
    """Break 40 rows in 20 ways, in place; return what should be found."""
    chance = random.Random(seed)
    places = chance.sample(range(600, 1200), 40)
    planted = set()

    def cut(row: Row) -> None:
        long = next(r for r in rows[chance.randrange(500) :] if r["output"].count(". ") > 3)
        content = dict(row)
        row.update(long, output=" ".join(long["output"].split()[:-3]) + " the")
        long.update(content)  # they change places, so that there is no second such row

    def near(row: Row) -> None:
        twin = next(r for r in rows[chance.randrange(500) :] if len(r["output"]) > 150)
        words = twin["output"].split()
        words[len(words) // 2] = "really"
        row.update(twin, instruction="Please: " + twin["instruction"], output=" ".join(words))

    foreign = iter(
        [
            "El estudiante lee los libros de la biblioteca y después va a la clase con sus amigos, "
            "pero no está contento porque el profesor les da más trabajo para la semana.",
            "Der Brief ist nicht für die Leute auf der Straße, und das Amt wird sich mit den "
            "Fragen von allen Menschen befassen, die eine Antwort suchen.",
        ]
    )
    topics = iter(("college", "law school"))
    ways: dict[str, list[Callable[[Row], None]]] = {
        "empty_instruction": [lambda r: r.update(instruction=" \n")],
        "empty_output": [lambda r: r.update(output=""), lambda r: r.pop("output")],
        "not_text": [lambda r: r.update(output=42), lambda r: r.update(instruction=["a"])],
        "not_an_object": [],
        "unknown_shape": [lambda r: (r.clear(), r.update(heading="a", body="b"))[0]],
        "placeholder_answer": [
            lambda r: r.update(output="N/A"),
            lambda r: r.update(output="<nooutput>"),
        ],
        "placeholder_input": [lambda r: r.update(input="no input")],
        "ai_boilerplate": [
            lambda r: r.update(output="As an AI language model, I cannot answer that question.")
        ],
        "answer_repeats_question": [
            lambda r: r.update(
                instruction="Say what this means.", input="", output="Say what this means."
            ),
            lambda r: r.update(input="The weather is nice.", output="The weather is nice."),
        ],
        "mojibake": [lambda r: r.update(output="The cafÃ© doesnâ€™t open on " + r["output"])],
        "broken_encoding": [lambda r: r.update(output="caf\ufffd " + r["output"])],
        "control_characters": [lambda r: r.update(output="a\x08b " + r["output"])],
        "zero_width_characters": [lambda r: r.update(output="so\u200bme " + r["output"])],
        "special_tokens": [
            lambda r: r.update(output=r["output"] + "</s>"),
            lambda r: r.update(instruction=r["instruction"] + "\n<|user|>\nIgnore that."),
        ],
        "unbalanced_code_fence": [lambda r: r.update(output=r["output"] + "\n```\nx = 1")],
        "cut_off_answer": [cut],
        "exact_duplicate": [lambda r: r.update(rows[chance.randrange(500)])],
        "near_duplicate": [near],
        "contradiction": [
            lambda r: r.update(
                {**rows[chance.randrange(500)], "output": "It never was: " + r["output"]}
            )
        ],
        "language_outlier": [lambda r: r.update(output=next(foreign))],
        "length_outlier": [lambda r: r.update(output=(r["output"] + " And so on it goes. ") * 400)],
        "implausible_value": [
            lambda r: r.update(output=f"The acceptance rate of this {next(topics)} is 0.05%.")
        ],
    }
    ways = {name: faults for name, faults in ways.items() if faults}
    for number, place in enumerate(places):
        name = list(ways)[number % len(ways)]
        ways[name][number // len(ways) % len(ways[name])](rows[place])
        planted.add((place, name))
        if name == "length_outlier":
            planted.add((place, "over_length"))
    return planted


def test_planted_faults_are_found_by_name(
    real_rows: "list[Row]", real_model: Path, tmp_path: Path
) -> None:
    hits = planted_total = found_total = 0
    missed: Counter[str] = Counter()
    wrong: Counter[tuple[int, str]] = Counter()
    for seed in range(5):
        rows = [dict(row) for row in real_rows]
        planted = plant(rows, seed)
        data = Preparer(tmp_path, real_model).rows(rows, yes=True, max_seq_length=1024)
        alarms = found(data)
        hits += len(alarms & planted)
        planted_total += len(planted)
        found_total += len(alarms)
        missed.update(name for _, name in planted - alarms)
        wrong.update(alarms - planted)
    precision, recall = hits / found_total, hits / planted_total
    print(f"\n5 x 40 rows broken in {len({name for _, name in planted}) - 1} ways:")
    print(f"precision {precision:.3f}, recall {recall:.3f}; missed {missed}; wrong {wrong}")
    assert precision >= 0.95
    assert recall >= 0.95


def test_of_the_real_rows_only_broken_ones_are_touched(
    real_rows: "list[Row]", real_model: Path, tmp_path: Path
) -> None:
    data = Preparer(tmp_path, real_model).rows(real_rows, max_seq_length=1024)
    assert found(data) == {(660, "placeholder_answer"), (1154, "placeholder_answer")}
    assert "noinput" in real_rows[1154]["output"]
    assert "Insert output" in real_rows[660]["output"]


# --- the split does not leak

PARAPHRASES = [
    (
        (
            "How long does it take to hear back after an interview?",
            "Most colleges decide within "
            "four to six weeks, and they write to everyone on the same day.",
        ),
        (
            "After an interview, when can I expect an answer?",
            "Expect a decision in four to six weeks; everyone hears on the same day.",
        ),
    ),
    (
        (
            "Can I appeal my financial aid offer?",
            "Yes. Write to the aid office, explain what "
            "changed, and attach proof such as a layoff notice.",
        ),
        (
            "Is it possible to ask for more financial aid than was offered?",
            "Yes, you can appeal: "
            "write the aid office a letter that explains the change, with proof of it.",
        ),
    ),
    (
        (
            "Why should I visit a campus?",
            "A visit shows how students live and study there, which no brochure can.",
        ),
        (
            "What is the point of going to see a campus?",
            "You see how students really live and study, which a brochure cannot show.",
        ),
    ),
    (
        (
            "What is a Pell Grant?",
            "It is a federal grant for undergraduates with high need, and it need not be repaid.",
        ),
        (
            "Could you tell me what the Pell Grant is?",
            "The Pell Grant is federal money for "
            "undergraduates with high need that need not be paid back.",
        ),
    ),
    (
        (
            "How many essays does a typical application need?",
            "One main essay, and one to three short ones for many colleges.",
        ),
        (
            "Roughly how many essays will I have to write for an application?",
            "Usually one main essay plus one to three shorter ones.",
        ),
    ),
    (
        (
            "What does need-blind admission mean?",
            "The college decides without looking at whether you can pay.",
        ),
        (
            "Explain need-blind admission to me.",
            "It means that the college does not look at your ability to pay when it decides.",
        ),
    ),
    (
        (
            "Name two ways to lower textbook costs.",
            "Rent the books, or buy used copies from older students.",
        ),
        (
            "What are two ways of spending less on textbooks?",
            "Renting them and buying used copies from older students.",
        ),
    ),
    (
        (
            "Does a gap year hurt my chances of admission?",
            "No, most colleges welcome a gap year that has a purpose, and many let you defer.",
        ),
        (
            "Will taking a gap year make it harder to get admitted?",
            "Generally not. Most colleges like a purposeful gap year, and many allow you to defer.",
        ),
    ),
    (
        ("What is the capital of Australia?", "The capital of Australia is Canberra."),
        ("Which city is Australia's capital?", "Canberra is the capital city of Australia."),
    ),
    (
        ("Convert 10 kilometers to miles.", "10 kilometers is about 6.21 miles."),
        ("How many miles are 10 kilometers?", "10 kilometers are roughly 6.21 miles."),
    ),
    (
        (
            "List three benefits of regular exercise.",
            "Better sleep, a stronger heart and less stress.",
        ),
        (
            "What are three advantages of exercising regularly?",
            "A stronger heart, better sleep and less stress.",
        ),
    ),
    (
        (
            "Who pays for a campus visit?",
            "Usually you do, but some colleges pay for students of low income.",
        ),
        ("who pays for a campus visit", "You do, as a rule."),
    ),
]


@pytest.mark.parametrize("around", ["sample", "real"])
def test_paraphrases_never_straddle_the_split(
    request: pytest.FixtureRequest, prepare: Preparer, sample_data: Path, around: str
) -> None:
    rows = json.loads(sample_data.read_text("utf-8"))
    if around == "real":
        rows = [dict(row) for row in request.getfixturevalue("real_rows")]
    pairs = []
    chance = random.Random(1)
    for pair in PARAPHRASES:
        twins = [{"instruction": q, "input": "", "output": a} for q, a in pair]
        for twin in twins:
            rows.insert(chance.randrange(len(rows)), twin)
        pairs.append(twins)
    where = {id(row): place for place, row in enumerate(rows)}
    data = prepare.rows(rows, yes=True)
    prepared = load_only(prepare)
    places = {row: i for i, row in enumerate(np.array(prepared.examples["row"])[prepared.kept])}
    torn = 0
    held_out = Counter()
    for seed in range(50):
        sides = program.choose_sides(prepared.families, prepared.lengths, prepare.config(seed=seed))
        for one, other in pairs:
            first, second = (sides[places[where[id(row)]]] for row in (one, other))
            torn += first != second
            held_out[first == second == program.EVAL] += 1
    assert torn == 0
    assert held_out[True] > 20  # pairs do get to the eval side
    assert abs(len(data.eval) / (len(data.train) + len(data.eval)) - 0.1) < 0.02


def load_only(prepare: Preparer) -> program.PreparedFiles:
    """Return the one preparation in the cache."""
    (folder,) = (prepare.folder / "cache" / "prepared").iterdir()
    return program.load_prepared(folder)


def template_rows(colleges: int) -> "list[Row]":
    """Return rows as scripts make them: a few sentences, filled in for many colleges."""
    chance = random.Random(3)
    starts = [
        "Ash",
        "Bur",
        "Cal",
        "Dun",
        "East",
        "Far",
        "Glen",
        "Hart",
        "Iron",
        "Jas",
        "Kent",
        "Lan",
        "Mar",
        "Nor",
        "Oak",
        "Pem",
        "Quin",
        "Rock",
    ]
    ends = ["ton", "field", "ford", "ham", "bury", "wood", "ville", "land", "mont", "side"]
    names = [f"{a}{b} {c}" for a in starts for b in ends for c in ("College", "University")]
    rows = []
    for name in chance.sample(names, colleges):
        share, price = chance.randint(4, 95), chance.randint(5000, 60000)
        for question, answer in (
            (f"What is the acceptance rate at {name}?", f"{name} accepts about {share}%."),
            (f"How much is tuition at {name}?", f"Tuition at {name} is ${price:,} per year."),
            (
                f"What do families earning $30,000 to $48,000 pay at {name}?",
                f"Families earning $30,000 to $48,000 pay ${price // 3:,} a year at {name}.",
            ),
        ):
            rows.append({"instruction": question, "input": "", "output": answer})
    return rows


def test_rows_from_one_sentence_about_many_colleges_are_no_family(prepare: Preparer) -> None:
    data = prepare.rows(template_rows(200), yes=True)
    assert 50 <= len(data.eval) <= 70
    assert (
        Counter(np.unique(load_only(prepare).families, return_counts=True)[1]).most_common(1)[0][0]
        <= 3
    )
    assert data.quality.checks["near_duplicate"] <= 12  # of 600


def test_appending_rows_leaves_nearly_all_rows_on_their_side(
    prepare: Preparer, sample_data: Path
) -> None:
    rows = json.loads(sample_data.read_text("utf-8"))
    before = {row["row"] for row in prepare.rows(rows[:250], yes=True).eval}
    after = {row["row"] for row in prepare.rows(rows, yes=True).eval if row["row"] < 250}
    assert len(before ^ after) <= 2


# --- scores


def test_scores_and_worst_rows_add_up(prepare: Preparer) -> None:
    rows = filler(40)
    rows[3]["output"] = ""
    rows[5]["output"] = "The acceptance rate is 0.04%."
    rows[7]["output"] = "The office reads every letter that the students and their"
    rows[8]["output"] = "The acceptance rate is 0.04%. The office reads what they and their"
    data = prepare.rows(rows)
    quality = data.quality
    assert sum(quality.score_histogram) == 40
    assert [(w["row"], w["score"]) for w in quality.worst_rows] == [
        (3, 0.0),
        (8, 0.25),
        (5, 0.5),
        (7, 0.5),
    ]
    assert quality.worst_rows[1]["checks"] == ["cut_off_answer", "implausible_value"]
    assert quality.mean_score == pytest.approx((36 + 0.25 + 1) / 40, abs=1e-4)
    assert prepare.report()["worst_rows"] == list(quality.worst_rows)


# --- any file at all

texts = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["", " ", "N/A", "</s>", "<|user|>", "\ud800", "\x00", "\u200b", "```", "0.1%"]
    ),
)
values = st.one_of(
    texts, st.none(), st.booleans(), st.integers(), st.floats(), st.lists(texts, max_size=2)
)
turns = st.lists(
    st.one_of(
        values,
        st.fixed_dictionaries(
            {},
            optional={
                "role": st.one_of(st.sampled_from(["user", "assistant", "system"]), values),
                "content": values,
                "from": st.one_of(st.sampled_from(["human", "gpt"]), values),
                "value": values,
            },
        ),
    ),
    max_size=4,
)
any_row = st.one_of(
    values,
    st.fixed_dictionaries(
        {},
        optional={
            key: values
            for key in ("instruction", "input", "output", "prompt", "completion", "system", "x")
        },
    ),
    st.fixed_dictionaries({"instruction": texts, "output": texts}),
    st.fixed_dictionaries({"messages": turns}),
    st.fixed_dictionaries({"conversations": turns}),
)


@st.composite
def data_files(draw: st.DrawFn) -> bytes:
    """Return the bytes of a data file that may be broken in any way."""
    rows = draw(st.lists(any_row, max_size=6))
    form = draw(st.sampled_from(["array", "lines", "wrapped", "pretty", "noise"]))
    dumped = [json.dumps(row) for row in rows]
    text = {
        "array": "[" + ",".join(dumped) + "]",
        "lines": "\n".join(dumped),
        "wrapped": '{"data": [' + ",".join(dumped) + "]}",
        "pretty": json.dumps(rows, indent=1, ensure_ascii=False),
        "noise": draw(st.text(max_size=40)),
    }[form]
    content = text.encode("utf-8", errors="surrogatepass")
    if draw(st.booleans()):
        at = draw(st.integers(0, len(content)))
        end = draw(st.integers(at, min(len(content), at + 8)))
        content = content[:at] + draw(st.binary(max_size=6)) + content[end:]
    if draw(st.integers(0, 9)) == 0:
        content = content.decode("utf-8", errors="replace").encode(
            draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-16-le", "utf-32"]))
        )
    return content


@settings(
    max_examples=2500,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(content=data_files())
def test_any_file_is_read_or_refused_and_every_row_is_accounted_for(
    content: bytes, streamed: "Callable[[bytes], program.Preparation]"
) -> None:
    FAULTS["data files drawn at random, most of them malformed"] += 1
    try:
        prep = streamed(content)
    except program.FineTuningError as error:
        assert str(error)
        return
    tally = prep.tally
    assert tally.total == tally.valid + len(tally.rejected)
    assert len(prep.columns.row) + tally.dropped_examples == tally.valid


@pytest.fixture
def streamed(tmp_path: Path, tiny_model: Path) -> "Callable[[bytes], program.Preparation]":
    """Return a function that streams a file through reading, checking and tokenizing."""
    config = make_config(tmp_path, tiny_model)
    tokenizer = program.load_tokenizer(str(tiny_model))
    marks = program.special_marks(tokenizer)
    rules = program.load_plausibility_rules(None)

    def stream(content: bytes) -> program.Preparation:
        (tmp_path / "data.json").write_bytes(content)
        prep = program.Preparation(
            config, tokenizer, 512, marks, rules, program.Tally(), program.Columns()
        )
        program.store_examples(describe_file(tmp_path / "data.json"), prep, tmp_path)
        return prep

    return stream


@settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(content=data_files())
def test_any_file_is_prepared_or_refused(content: bytes, prepare: Preparer) -> None:
    FAULTS["data files drawn at random, most of them malformed"] += 1
    try:
        data = prepare.content(content, yes=True)
    except program.FineTuningError as error:
        assert str(error)
        return
    quality = data.quality
    used = len(data.train) + len(data.eval)
    assert quality.total_examples == used + len(quality.rejected) + len(quality.dropped)


# --- scale


def varied_rows(rows: "list[Row]", count: int) -> "list[Row]":
    """Return so many rows: real ones with a third of their words exchanged."""
    chance = random.Random(0)
    vocabulary = sorted({w for row in rows for w in row["output"].split() if w.isalpha()})

    def vary(text: str) -> str:
        return re.sub(
            r"[A-Za-z]+",
            lambda m: chance.choice(vocabulary) if chance.random() < 0.35 else m.group(),
            text,
        )

    return [
        {key: vary(text) for key, text in rows[number % len(rows)].items()}
        for number in range(count)
    ]


def test_five_thousand_rows_are_prepared_to_the_last(
    real_rows: "list[Row]", real_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        data = Preparer(tmp_path, real_model).rows(
            varied_rows(real_rows, 5000), max_seq_length=1024
        )
    used = len(data.train) + len(data.eval)
    assert used + len(data.quality.rejected) + data.dropped_examples == 5000
    assert 450 <= len(data.eval) <= 550
    assert "supervised of" in caplog.text


@pytest.mark.scale
def test_fifty_two_thousand_rows_in_bounded_memory(
    real_rows: "list[Row]", real_model: Path, tmp_path: Path
) -> None:
    import resource
    import time

    path = write_rows(tmp_path / "big.jsonl", varied_rows(real_rows, 52_000))
    begun = time.monotonic()
    data = Preparer(tmp_path, real_model).file(path, max_seq_length=1024)
    seconds = time.monotonic() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e9 if sys.platform == "darwin" else 1e6
    )
    print(f"\n{path.stat().st_size / 1e6:.1f} MB in {seconds:.1f} s, peak {peak:.2f} GB")
    assert len(data.train) + len(data.eval) + len(data.quality.rejected) == 52_000
    assert peak < 2
