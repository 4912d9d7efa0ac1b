"""README.md says what the program does."""

import re
from pathlib import Path

import unified_finetune as finetune

README = Path(__file__).resolve().parent.parent / "README.md"
START = "<!-- settings: made from FineTuningConfig, compared with it by tests/test_readme.py -->\n"
END = "<!-- end of settings -->"


def settings_table() -> str:
    """Return the table of settings as README.md must have it."""
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for name, field in finetune.fields_of(finetune.FineTuningConfig).items():
        value = field.default
        shown = " ".join(value) or "none" if isinstance(value, tuple) else str(value)
        lines.append(f"| `{name}` | `{shown}` | {field.metadata['help']} |")
    return "\n".join(lines) + "\n"


def update_readme() -> None:
    """Write the table into README.md (python tests/test_readme.py)."""
    text = README.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    README.write_text(before + START + settings_table() + END + after, encoding="utf-8")


def test_the_table_of_settings_is_the_dataclass():
    text = README.read_text(encoding="utf-8")
    assert text.split(START)[1].split(END)[0] == settings_table()


def test_every_command_and_exit_code_is_explained():
    text = README.read_text(encoding="utf-8")
    for command in finetune.COMMANDS.keys() - {"train"}:
        assert f"run_finetuning.sh {command}" in text
    for code in (0, 1, 2, 11, 12, 13, 14, 15, 16, 130, 143):
        assert re.search(rf"^\|[^|]*\b{code}\b", text, re.M), code


def test_the_quoted_messages_are_the_program_s_own():
    source = Path(finetune.__file__).read_text(encoding="utf-8")
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    table = README.read_text("utf-8").split("| message | meaning |")[1].split("\n\n")[0]
    for message in re.findall(r"^\| (?:`.+?`(?:, )?)+ \|", table, re.M):
        for quoted in re.findall(r"`(.+?)`", message):
            assert max(re.split(r"…|\bN\b|mps", quoted), key=len).strip(" :()") in joined, quoted


if __name__ == "__main__":
    update_readme()
