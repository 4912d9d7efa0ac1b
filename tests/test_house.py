"""The order of the file: fourteen sections, each using only what stands above it."""

import ast
import functools
import itertools
import re

from conftest import ROOT

import unified_finetune as finetune

SOURCE = (ROOT / "unified_finetune.py").read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
MOST_LINES = 5543  # may only fall; 5,200 is the goal
RULE = re.compile(r"# ={20,}")


@functools.cache
def banners() -> "dict[int, str]":
    """Return the line on which each section begins, with its title."""
    starts = [
        n for n, _ in enumerate(LINES[:-2]) if RULE.match(LINES[n]) and RULE.match(LINES[n + 2])
    ]
    return {n + 1: LINES[n + 1].removeprefix("# ") for n in starts}


def section_of(line: int) -> int:
    """Return how many banners stand above a line."""
    return sum(start <= line for start in banners())


def defined_names() -> "dict[str, int]":
    """Return the module's own names, with the section in which each is defined first."""
    home: dict[str, int] = {}
    for node in TREE.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = [getattr(node, "name", None), *(getattr(t, "id", None) for t in targets)]
        for name in filter(None, names):
            home.setdefault(name, section_of(node.lineno))
    return home


def test_the_file_stays_one_that_a_person_can_carry():
    assert len(LINES) <= MOST_LINES
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= 60] == []


def test_the_table_of_contents_is_that_of_the_banners():
    contents = re.findall(
        r"^ +(\d+) (.+?)(?:  .*)?$", SOURCE.split("Contents of this file")[1], re.M
    )
    shown = [f"{number}. {title}" for number, title in contents[:14]]
    titles = [re.sub(r"^(\d+)\. Stage (\d): ", r"\1. Stage \2, ", t) for t in banners().values()]
    assert shown == titles
    assert [int(number) for number, _ in contents[:14]] == list(range(1, 15))


def test_a_section_uses_only_what_stands_above_it():
    home = defined_names()
    from_below = {
        f"{inner.id} (section {home[inner.id]}) in section {section_of(node.lineno)}"
        for node in TREE.body
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load)
        if home.get(inner.id, 0) > section_of(node.lineno)
    }
    assert from_below == set()


def test_a_paragraph_under_each_banner_says_what_the_section_promises():
    for start in banners():
        below = itertools.takewhile(lambda line: line.startswith("#"), LINES[start + 1 :])
        text = " ".join(line.lstrip("# ") for line in below)
        assert 100 < len(text) < 1300, text
        assert not re.search(r"\w+\(", text)  # what it promises, not what its functions are called


def test_only_the_files_section_flushes_and_renames():
    callers = {
        section_of(node.lineno)
        for node in ast.walk(TREE)
        if isinstance(node, ast.Attribute) and node.attr in ("fsync", "rename")
    }
    assert callers == {3}


def test_every_setting_is_read_somewhere():
    outside = SOURCE.split("\n# 2. Console\n")[1]
    names = finetune.fields_of(finetune.FineTuningConfig)
    assert [n for n in names if not re.search(rf"config\.{n}\b|\"{n}\"", outside)] == []


def test_there_is_one_broad_except_beside_that_of_main():
    broad = [
        section_of(node.lineno)
        for node in ast.walk(TREE)
        if isinstance(node, ast.ExceptHandler)
        for caught in ast.walk(node.type or ast.Name("Exception"))
        if getattr(caught, "id", "") in ("Exception", "BaseException")
    ]
    assert sorted(broad) in ([14], [5, 14])


def test_nothing_is_taken_from_outside_the_repository():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("tests/*.py")):
        assert "/work/" not in path.read_text(encoding="utf-8").replace('"/work/"', "")
