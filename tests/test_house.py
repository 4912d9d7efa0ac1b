"""The order of the file: fourteen sections, each using only what stands above it."""

import ast
import functools
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

import unified_finetune as finetune

SOURCE = (ROOT / "unified_finetune.py").read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
MOST_LINES = 5850  # may only fall; 5,200 is the goal
RULE = re.compile(r"# ={20,}")


@functools.cache
def banners() -> "dict[int, str]":
    """Return the line on which each section begins, with its title."""
    return {
        number + 1: LINES[number + 1].removeprefix("# ")
        for number in range(len(LINES) - 2)
        if RULE.fullmatch(LINES[number]) and RULE.fullmatch(LINES[number + 2])
    }


def section_of(line: int) -> int:
    """Return how many banners stand above a line."""
    return sum(start <= line for start in banners())


def defined_names() -> "dict[str, int]":
    """Return the module's own names, with the section in which each is defined first."""
    home: dict[str, int] = {}
    for node in TREE.body:
        names: list[str] = []
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        for name in names:
            home.setdefault(name, section_of(node.lineno))
    return home


def test_the_file_stays_one_that_a_person_can_carry():
    assert len(LINES) <= MOST_LINES


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


@pytest.mark.parametrize("start", banners())
def test_a_paragraph_under_each_banner_says_what_the_section_promises(start: int):
    below = LINES[start + 1 :]
    paragraph = []
    for line in below:
        if not line.startswith("#"):
            break
        paragraph.append(line.lstrip("# "))
    text = " ".join(paragraph)
    assert 100 < len(text) < 1300
    assert not re.search(r"\w+\(", text)  # what it promises, not what its functions are called


def test_only_the_files_section_flushes_and_renames():
    home = {title: number for number, title in enumerate(banners().values(), 1)}
    calls = Counter(
        section_of(node.lineno)
        for node in ast.walk(TREE)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("fsync", "rename")
    )
    assert set(calls) == {home["3. Files"]}


def test_no_function_is_longer_than_a_screen():
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(TREE)
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    }
    assert long == {}


def test_every_setting_is_read_somewhere():
    outside = "\n".join(LINES[section_start(2) :])
    unread = [
        name
        for name in finetune.fields_of(finetune.FineTuningConfig)
        if not re.search(rf"config\.{name}\b|\"{name}\"", outside)
    ]
    assert unread == []


def section_start(number: int) -> int:
    """Return the line on which a section begins."""
    return list(banners())[number - 1]


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
        assert "/work/" not in Path(path).read_text(encoding="utf-8").replace('"/work/"', "")
