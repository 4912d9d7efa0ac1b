"""The command line and the configuration: what is accepted, what is refused, and how it is told."""

import ast
import dataclasses
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, CliResult
from hypothesis import given, reject
from hypothesis import strategies as st

import unified_finetune as finetune
from unified_finetune import FineTuningConfig

PROGRAM = ROOT / "unified_finetune.py"
SETTINGS = finetune.fields_of(FineTuningConfig)
SWITCHES = ("yes", "overwrite", "verbose")


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Return a function from arguments to the configuration, with no .env and no R2 variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "PROGRAM_FOLDER", tmp_path)
    monkeypatch.setenv("R2_BUCKET_NAME", "")  # so that it is put back
    monkeypatch.delenv("R2_BUCKET_NAME")
    return lambda *arguments: finetune.parse_command_line([str(a) for a in arguments])[1]


def refusal(parse: Any, *arguments: object) -> str:
    """Return the message with which the arguments are refused."""
    with pytest.raises(finetune.FineTuningError) as refused:
        parse(*arguments)
    assert refused.value.exit_code == 2
    return str(refused.value)


# --- before any package is needed


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["check", "--help"], ["chat", "--help"]])
def test_help_needs_no_package_and_shows_every_flag_with_either_dash(arguments):
    isolated = [sys.executable, "-I", "-S", str(PROGRAM), *arguments]
    done = subprocess.run(isolated, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for name, field in SETTINGS.items():
        assert f"--{name}" in done.stdout and f"--{name.replace('_', '-')}" in done.stdout
        assert field.metadata["help"]
    assert "Exit codes: 0 success, 2 bad flags" in done.stdout


@pytest.mark.parametrize("version", ["3.6", "3.7", "3.8", "3.9", "3.10"])
def test_an_old_python_is_told_in_one_line(version):
    """A real one on PATH or from pyenv, where the machine has it; otherwise this one pretends."""
    ast.parse(PROGRAM.read_text(encoding="utf-8"), feature_version=(3, 6))
    pretend = f"import sys; sys.version_info = ({version.replace('.', ', ')}, 0, 'final', 0)\n"
    pretend += "exec(compile(open(sys.argv[1]).read(), sys.argv[1], 'exec'))"
    commands = [[sys.executable, "-c", pretend, str(PROGRAM)]]
    pyenv = (Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python")
    for python in filter(None, [shutil.which(f"python{version}"), *map(str, pyenv)]):
        if subprocess.run([python, "-c", "print(1)"], capture_output=True).returncode == 0:
            commands.append([python, str(PROGRAM), "check"])
    told = r"unified_finetune\.py needs Python 3\.11 or newer, and this is Python "
    told += re.escape(version) + r" \(.*\)\. Run \./run_finetuning\.sh, [^\n]+\n"
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(told, done.stderr)


# --- the settings


def test_no_setting_is_a_secret_and_none_can_be_changed():
    """Their defaults are those in README.md, which tests/test_readme.py compares."""
    assert not re.search("secret|password|access_key|account_id|hf_token", " ".join(SETTINGS))
    with pytest.raises(dataclasses.FrozenInstanceError):
        FineTuningConfig().seed = 7  # type: ignore[misc]


SPELLINGS = [  # words of the command line between bars, a setting, its value
    *((f"--learning{sign}1e-4", "learning_rate", 1e-4) for sign in ("_rate|", "-rate|", "_rate=")),
    ("--learning-rate=1e-4", "learning_rate", 1e-4),
    ("--bf16|--seed|1", "bf16", True), ("--bf16|On", "bf16", True), ("--bf16=no", "bf16", False),
    *((f"--target_modules|{names}|--seed|1", "target_modules", ("q_proj", "v_proj"))
      for names in ("q_proj|v_proj", "q_proj,v_proj", "q_proj, v_proj")),
    ("--max_eval_examples|6", "max_eval_examples", 6),
    *((f"--max_eval_examples|{word}", "max_eval_examples", None)
      for word in ("none", "None", "null", "")),
    *((f"--{name}|~/x", name, "/home/me/x")
      for name in ("output_dir", "cache_dir", "log_dir", "model_name", "data_path")),
]  # fmt: skip


def test_flags_and_values_may_be_spelt_in_several_ways(parse, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "c.json").write_text('{"max_eval_examples": 5}')
    for words, name, value in SPELLINGS:
        assert getattr(parse("--config", "c.json", *words.split("|")), name) == value, words
    assert [finetune.parse_command_line(call)[0] for call in ([], ["train"])] == ["train"] * 2


# --- precedence: defaults < --config < environment < flags


def test_flags_win_over_environment_over_config_file_over_defaults(parse, tmp_path, monkeypatch):
    (tmp_path / "c.json").write_text('{"lora_r": 8, "seed": 1, "r2_bucket_name": "from-config"}')
    config = parse("--seed", 2, "--config", "c.json", "--seed", 3)
    assert (config.lora_r, config.seed, config.lora_alpha) == (8, 3, 64)
    assert config.r2_bucket_name == "from-config"
    monkeypatch.setenv("R2_BUCKET_NAME", "from-environment")
    assert parse("--config", "c.json").r2_bucket_name == "from-environment"
    flagged = parse("--config", "c.json", "--r2_bucket_name", "from-flag")
    assert flagged.r2_bucket_name == "from-flag"


def test_dotenv_of_any_editor_is_read_and_the_shell_wins_over_it(parse, tmp_path, monkeypatch):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"):
        text = "# Schlüssel\nR2_BUCKET_NAME='from-dötenv'\n"
        (tmp_path / ".env").write_bytes(text.encode(encoding))
        assert parse().r2_bucket_name == "from-dötenv", encoding
        monkeypatch.delenv("R2_BUCKET_NAME")
    monkeypatch.setenv("R2_BUCKET_NAME", "from-shell")
    assert parse().r2_bucket_name == "from-shell"


# --- --config

CONFIG = {
    "learning_rate": 1e-4, "lora_r": 8, "bf16": True, "target_modules": ["q_proj"],
    "gradient_checkpointing": "off", "max_eval_examples": None, "system_prompt": "Ä counselor: yes",
}  # fmt: skip
YAML = """\
learning_rate: 1e-4   # YAML reads this as text
lora_r: 8
bf16: yes
target_modules: [q_proj]
gradient_checkpointing: off
max_eval_examples: null
system_prompt: "Ä counselor: yes"
"""


def test_json_and_yaml_say_the_same(parse, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(CONFIG), encoding="utf-8-sig")
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    config = parse("--config", "c.json")
    for name in ("c.yaml", "C.YML"):
        (tmp_path / name).write_text(YAML, encoding="utf-8-sig")  # a byte order mark does no harm
        assert config == parse("--config", name)
    assert (config.bf16, config.gradient_checkpointing) == (True, "off")
    assert config.system_prompt == "Ä counselor: yes"
    assert parse("--config", "empty.yaml") == FineTuningConfig()
    (tmp_path / "more.json").write_text('{"bf16": false}')
    both = parse("--config", "c.json", "--config", "more.json")
    assert (both.bf16, both.gradient_checkpointing) == (False, "off")


NO_NUMBER = "c.json: seed must be a whole number, not "
REFUSED = [
    ("c.json", b"", "cannot be read"),
    ("missing.json", None, "cannot be read"),
    ("c.json", b"[" * 200_000, "cannot be read"),
    ("c.json", b'{"seed": "\xff"}', "cannot be read"),
    ("c.json", b'["seed"]', "must hold one object of settings"),
    ("c.yaml", b"seed: [1", "cannot be read"),
    ("c.yaml", b"- seed", "must hold one object of settings"),
    ("c.yaml", b"seed: !!python/object/apply:os.getpid []", "cannot be read"),
    *(("c.json", b'{"seed": %s}' % v, NO_NUMBER) for v in (b"1.5", b"true", b"null", b"[1]")),
    ("c.json", b'{"learning_rate": "fast"}', "c.json: learning_rate must be a number, not 'fast'"),
    ("c.json", b'{"learning_rate": NaN}', "learning_rate must be a number, not nan"),
    ("c.json", b'{"bf16": "maybe"}', "bf16 must be true or false, not 'maybe'"),
    ("c.json", b'{"model_name": 7}', "model_name must be text, not 7"),
    ("c.json", b'{"model_name": "a\\u0000b"}', "model_name must be text"),
    ("c.json", b'{"target_modules": 3}', "target_modules must be a list of names, not 3"),
    ("c.json", b'{"target_modules": []}', "target_modules must not be empty, not []"),
    ("c.json", b'{"device": "tpu"}', "must be one of auto, mps, cuda, cpu, did you mean 'cpu'?, "),
    ("c.json", b'{"data_path": {"a": 1}}', "data_path must be a list of texts, not {'a': 1}"),
    ("c.json", b'{"drop_checks": ["x"]}', "drop_checks must be among control_characters, "),
    ("c.json", b'{"sede": 1}', "c.json: there is no setting 'sede', did you mean 'seed'?"),
    ("c.json", b'{"R2_SECRET_ACCESS_KEY": "x"}', "there is no setting 'R2_SECRET_ACCESS_KEY'"),
]


@pytest.mark.parametrize(("name", "content", "told"), REFUSED)
def test_a_wrong_file_or_value_is_named_and_what_fits(parse, tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = refusal(parse, "--config", name)
    assert told in message and name in message
    assert message.startswith("1 problem with the settings:")


@pytest.mark.parametrize(("arguments", "told"), [
    ("--lora_dropout 1", "lora_dropout must be below 1"),
    ("--train_split 0", "train_split must be above 0"),
    ("--seed -1", "seed must be at least 0"),
    ("--seed 4294967296", "seed must be at most 4294967295"),
    ("--min_data_quality_score 85", "min_data_quality_score must be at most 1"),
    ("--gradient_accumulation_steps 1e30", "steps must be at most 4294967295"),
    ("--learning_rate 1e300", "must be at most 4294967295"),
    ("--optim adamw_torc", "did you mean 'adamw_torch'?"),
    ("--output_dir=", "output_dir must not be empty"),
    ("--train_split 0.95", "train_split 0.95 and eval_split 0.1 add up to more than 1"),
    ("--fp16 --bf16", "fp16 and bf16 exclude each other"),
    ("--lr_scheduler_type polynomial --learning_rate 1e-8", "polynomial ends at 1e-7"),
    ("--fp16 --device cpu", "fp16 works on NVIDIA GPUs only"),
    ("--seed", "--seed: expected one argument"),
    ("--output", "unknown argument '--output', did you mean '--output_dir'?"),  # no abbreviations
    ("--plausibility_rules x", "unknown argument '--plausibility_rules'"),
    ("chekc", "no command 'chekc', did you mean 'check'? (commands: train, check"),
    ("zzz", "there is no command 'zzz' (commands: train, check, data, chat, export)"),
    ("--zzz", "1 problem with the settings:\n  - unknown argument '--zzz'"),  # nothing is near
])  # fmt: skip
def test_what_is_impossible_or_typed_wrongly_is_refused(parse, arguments, told):
    assert told in refusal(parse, *arguments.split())


def test_everything_wrong_is_told_in_one_message_and_no_file_is_left(run_cli, tmp_path):
    assert run_cli("--version") == CliResult(0, finetune.__version__ + "\n", "")
    (tmp_path / "c.json").write_text('{"lora_rank": 4, "warmup_steps": "many"}')
    wrong = ["--learning_rat", "1", "--seed", "x", "--lora-r", "0", "--optim", "adam"]
    result = run_cli("check", "--config", "c.json", *wrong)
    assert (result.code, result.stdout) == (2, "")
    assert "7 problems with the settings" in result.stderr
    for told in (
        "c.json: there is no setting 'lora_rank'", "c.json: warmup_steps must be a whole number",
        "unknown argument '--learning_rat', did you mean '--learning_rate'?",
        "--lora_r: lora_r must be at least 1, not '0'",
    ):  # fmt: skip
        assert told in result.stderr
    assert result.stderr.splitlines()[-1].startswith("-> python unified_finetune.py --help lists")
    result = run_cli("check", "--log_dir", "c.json/logs")
    assert (result.code, result.stdout) == (2, "")
    assert "The log folder c.json/logs cannot be written" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


# --- saved settings

VALUES = {bool: st.booleans(), int: st.integers(8, 2**31 - 1), float: st.floats(0.01, 0.5)}


def build(given: "list[finetune.Given]") -> FineTuningConfig:
    """Build a configuration, or raise ValueError with everything that is wrong."""
    problems: list[str] = []
    config = finetune.build_record(FineTuningConfig, given, problems)
    if config is None:
        raise ValueError("; ".join(problems))
    assert problems == []
    return config


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=5)
OTHERS = {
    "train_split": st.floats(0.01, 0.5), "eval_split": st.floats(0.01, 0.5), "fp16": st.just(False),
    "system_prompt": st.none() | TEXTS, "sample_prompts": st.lists(TEXTS.filter(str.strip)),
    "data_path": st.sampled_from([None, "a.json", ["a.json", "b c.json"]]),
    "target_modules": st.lists(st.sampled_from("abcd"), min_size=1),
}  # fmt: skip
DRAWN = {n: VALUES[type(f.default)] for n, f in SETTINGS.items() if type(f.default) in VALUES}


@given(st.fixed_dictionaries({}, optional={**DRAWN, **OTHERS}))
def test_saved_settings_give_the_same_configuration_again(tmp_path_factory, drawn):
    try:
        config = build([(name, value, "drawn") for name, value in drawn.items()])
    except ValueError:  # two splits of more than all
        reject()
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    saved = finetune.saved_settings(config)
    assert saved.keys() == SETTINGS.keys() - {*SWITCHES}  # those are of one call
    path.write_text(json.dumps({**saved, "provenance": {"python": "3.11"}}))
    again = build(finetune.read_config_file(path, []))
    assert finetune.saved_settings(again) == saved
    assert dataclasses.replace(again, **{n: getattr(config, n) for n in SWITCHES}) == config


ANYTHING = st.text() | st.integers() | st.floats() | st.lists(st.text())


@given(st.sampled_from(sorted(SETTINGS)), ANYTHING)
def test_any_value_is_either_taken_or_refused_in_words(name, value):
    try:
        build([(name, value, "here")])
    except ValueError as refused:
        assert "here: " + name in str(refused) or "split" in name


# --- secrets and the log

SECRETS = {
    "R2_ACCESS_KEY_ID": "0123456789abcdef" * 2, "R2_SECRET_ACCESS_KEY": "fedcba98" * 8,
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz",
}  # fmt: skip


def test_every_run_has_a_log_file_and_no_secret_is_there_or_on_the_console(run_cli, tmp_path):
    (tmp_path / "c.json").write_text('{"plausibility_rules": null, "seed": 7}')  # an earlier one's
    server = {"R2_ENDPOINT_URL": "http://127.0.0.1:9", "R2_BUCKET_NAME": "mine"}  # nobody listens
    shell, written = {**SECRETS, **server}, ""
    for env in (shell, {}):
        result = run_cli("check", "--verbose", "--min_disk_gb", 0, "--config", "c.json", env=env)
        assert result.code == 11 and "127.0.0.1:9" in result.stderr
        assert "setting r2_bucket_name = 'mine' (R2_BUCKET_NAME)" in result.stderr
        assert "plausibility_rules in c.json is no longer used" in result.stderr
        written += result.stdout + result.stderr
        text = "".join(f"{name}={value}\n" for name, value in shell.items())
        (tmp_path / ".env").write_text(text)  # for the second run
    files = list((tmp_path / "logs" / "finetuning").iterdir())
    assert len(files) == 2
    for path in files:
        assert re.fullmatch(r"unified_finetune_\d{8}_\d{6}(_\d+)?\.log", path.name)
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO ", path.read_text())
        written += path.read_text()
    assert [name for name, secret in SECRETS.items() if secret in written] == []
    result = run_cli("check", "--seed", SECRETS["R2_SECRET_ACCESS_KEY"])
    assert result.code == 2
    assert "must be a whole number, not '***'" in result.stderr


def test_a_secret_that_a_library_logs_is_hidden_in_its_traceback_too(tmp_path, capsys, monkeypatch):
    root, secret = logging.getLogger(), "a-secret-of-this-test-4711"
    monkeypatch.setattr(finetune, "known_secrets", set())
    before, level = root.handlers, root.level
    try:
        finetune.remember_secrets(secret)
        path = finetune.start_logging(tmp_path, verbose=True)
        try:
            raise ValueError(f"bad key {secret}")
        except ValueError:
            logging.getLogger("some.library").warning("with %s", secret, exc_info=True)
    finally:
        root.handlers, root.level = before, level
    written = path.read_text() + capsys.readouterr().err
    assert written.count("bad key ***") == written.count("with ***") == 2
    assert secret not in written
