"""The command line and the configuration: what is accepted, what is refused, and how it is told."""

import ast
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, CliResult
from hypothesis import given
from hypothesis import strategies as st

import unified_finetune as finetune

PROGRAM = ROOT / "unified_finetune.py"
OLD_VERSIONS = ("3.6", "3.7", "3.8", "3.9", "3.10")

DEFAULTS = {
    "model_name": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "max_seq_length": 1024,
    "lora_r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.05,
    "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "num_train_epochs": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "learning_rate": 2e-5,
    "weight_decay": 0.01,
    "warmup_steps": 50,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch",
    "lr_scheduler_type": "cosine",
    "fp16": False,
    "bf16": False,
    "dataloader_num_workers": 0,
    "logging_steps": 10,
    "eval_steps": 50,
    "save_steps": 100,
    "save_total_limit": 3,
    "seed": 42,
    "train_split": 0.9,
    "eval_split": 0.1,
    "min_data_quality_score": 0.85,
    "r2_bucket_name": "collegeadvisor-finetuning-data",
    "r2_data_prefix": "multi_source/training_datasets/",
    "cache_dir": "cache/training_data",
    "output_dir": "collegeadvisor_unified_model",
    "device": "auto",
    "data_path": None,
    "dataset_name": None,
    "resume": "auto",
    "gradient_checkpointing": "auto",
    "max_eval_examples": None,
    "early_stopping_patience": None,
    "system_prompt": None,
    "report_to": "none",
    "min_disk_gb": 10,
    "log_dir": "logs/finetuning",
}


@pytest.fixture
def parse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> "Callable[..., finetune.FineTuningConfig]":
    """Return a function from arguments to the configuration, with no .env and no R2 variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "PROGRAM_FOLDER", tmp_path)
    monkeypatch.delenv("R2_BUCKET_NAME", raising=False)

    def from_arguments(*args: object) -> finetune.FineTuningConfig:
        return finetune.parse_command_line([str(arg) for arg in args])[1]

    return from_arguments


def refusal(parse: "Callable[..., finetune.FineTuningConfig]", *args: object) -> str:
    """Return the message with which the arguments are refused."""
    with pytest.raises(finetune.UsageError) as refused:
        parse(*args)
    assert refused.value.exit_code == 2
    return str(refused.value)


# --- before any package is needed


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["check", "--help"], ["chat", "--help"]])
def test_help_needs_no_package(arguments: "list[str]"):
    isolated = [sys.executable, "-I", "-S", str(PROGRAM), *arguments]
    done = subprocess.run(isolated, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for name in finetune.config_fields():
        assert f"--{name}" in done.stdout
    assert "Exit codes: 0 success, 2 bad flags" in done.stdout


def test_version_is_printed_on_stdout(run_cli: "Callable[..., CliResult]"):
    assert run_cli("--version") == CliResult(0, finetune.__version__ + "\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--seed", "x"]])
def test_nothing_is_left_behind_by_calls_that_start_no_run(
    run_cli: "Callable[..., CliResult]", tmp_path: Path, arguments: "list[str]"
):
    run_cli(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_valid_syntax_for_old_pythons():
    ast.parse(PROGRAM.read_text(encoding="utf-8"), feature_version=(3, 6))


def one_line_about(version: str) -> "re.Pattern[str]":
    """Return the pattern of the whole output of a Python that is too old."""
    return re.compile(
        rf"unified_finetune\.py needs Python 3\.11 or newer, and this is Python "
        rf"{re.escape(version)} \(.*\)\. Run \./run_finetuning\.sh, [^\n]+\n"
    )


@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_an_old_python_is_told_in_one_line(version: str):
    pretend = (
        f"import sys; sys.version_info = ({version.replace('.', ', ')}, 0, 'final', 0)\n"
        "exec(compile(open(sys.argv[1]).read(), sys.argv[1], 'exec'))"
    )
    command = [sys.executable, "-c", pretend, str(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert one_line_about(version).fullmatch(done.stderr)


def find_python(version: str) -> "str | None":
    """Return a real interpreter of this version, on PATH or from pyenv, if this machine has one."""
    candidates = [shutil.which(f"python{version}")]
    pyenv = Path.home() / ".pyenv" / "versions"
    candidates += [str(path) for path in pyenv.glob(f"{version}.*/bin/python")]
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "-c", "print(1)"], capture_output=True)
        if done.returncode == 0:
            return candidate
    return None


@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_a_real_old_python_is_told_in_one_line(version: str):
    python = find_python(version)
    if python is None:
        pytest.skip(f"this machine has no Python {version}")
    done = subprocess.run([python, str(PROGRAM), "check"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert one_line_about(version).fullmatch(done.stderr)


# --- the settings


def test_the_defaults_are_those_users_know():
    config = dataclasses.asdict(finetune.FineTuningConfig())
    assert {name: config[name] for name in DEFAULTS} == DEFAULTS
    assert config["yes"] is config["overwrite"] is config["verbose"] is False


def test_no_setting_is_a_secret():
    names = " ".join(finetune.config_fields())
    assert not re.search("secret|password|access_key|account_id|hf_token", names)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        finetune.FineTuningConfig().seed = 7  # type: ignore[misc]


@pytest.mark.parametrize("name", finetune.config_fields())
def test_every_setting_has_a_help_text_and_a_flag_with_either_dash(name: str):
    assert finetune.config_fields()[name].metadata["help"]
    shown = finetune.build_parser("train").format_help()
    assert f"--{name}" in shown
    assert f"--{name.replace('_', '-')}" in shown


@pytest.mark.parametrize("flag", ["--learning_rate", "--learning-rate"])
@pytest.mark.parametrize("form", ["apart", "joined"])
def test_dashes_and_underscores_mean_the_same_flag(parse, flag: str, form: str):
    given_as = [flag, "1e-4"] if form == "apart" else [f"{flag}=1e-4"]
    assert parse(*given_as).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("arguments", "bf16"),
    [
        (["--bf16"], True),
        (["--bf16", "--seed", "1"], True),
        (["--bf16", "false"], False),
        (["--bf16=no"], False),
        (["--bf16", "On"], True),
        ([], False),
    ],
)
def test_a_switch_is_on_when_named_and_takes_a_word(parse, arguments: "list[str]", bf16: bool):
    assert parse(*arguments).bf16 is bf16


@pytest.mark.parametrize("given_as", [["q_proj", "v_proj"], ["q_proj,v_proj"], ["q_proj, v_proj"]])
def test_lists_are_separated_by_spaces_or_commas(parse, given_as: "list[str]"):
    assert parse("--target_modules", *given_as, "--seed", 1).target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize("word", ["none", "None", "null", ""])
def test_an_optional_setting_can_be_set_back_to_nothing(parse, tmp_path: Path, word: str):
    (tmp_path / "c.json").write_text('{"max_eval_examples": 5}')
    assert parse("--config", "c.json").max_eval_examples == 5
    assert parse("--config", "c.json", "--max_eval_examples", word).max_eval_examples is None


def test_train_is_the_command_that_is_meant_by_none():
    assert finetune.parse_command_line([])[0] == "train"
    assert finetune.parse_command_line(["train"])[0] == "train"


# --- precedence: defaults < --config < environment < flags


def test_flags_win_over_the_config_file_and_that_over_the_defaults(parse, tmp_path: Path):
    (tmp_path / "c.json").write_text('{"lora_r": 8, "seed": 1}')
    config = parse("--seed", 2, "--config", "c.json")
    assert (config.lora_r, config.seed, config.lora_alpha) == (8, 2, 64)


def test_the_environment_stands_between_config_file_and_flags(
    parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "c.json").write_text('{"r2_bucket_name": "from-config"}')
    assert parse("--config", "c.json").r2_bucket_name == "from-config"
    monkeypatch.setenv("R2_BUCKET_NAME", "from-environment")
    assert parse("--config", "c.json").r2_bucket_name == "from-environment"
    flagged = parse("--config", "c.json", "--r2_bucket_name", "from-flag")
    assert flagged.r2_bucket_name == "from-flag"


def test_the_last_of_two_equal_flags_wins(parse):
    assert parse("--seed", 1, "--seed", 2).seed == 2


@pytest.mark.parametrize("shell", [None, "from shell!"])
def test_dotenv_is_read_and_the_shell_wins_over_it(
    run_cli: "Callable[..., CliResult]", tmp_path: Path, shell: "str | None"
):
    (tmp_path / ".env").write_text("R2_BUCKET_NAME='from dotenv!'\n")
    env = {"R2_BUCKET_NAME": shell} if shell else {}
    result = run_cli("check", "--min_disk_gb", 0, env={**env, **unreachable_bucket()})
    expected = shell or "from dotenv!"
    assert result.code == 11
    assert expected in result.stderr


# --- --config


CONFIG = {
    "learning_rate": 1e-4,
    "lora_r": 8,
    "bf16": True,
    "target_modules": ["q_proj"],
    "gradient_checkpointing": "off",
    "max_eval_examples": None,
    "system_prompt": "Ä counselor: yes",
}
YAML = """\
learning_rate: 1e-4   # YAML reads this as text
lora_r: 8
bf16: yes
target_modules:
  - q_proj
gradient_checkpointing: off
max_eval_examples: null
system_prompt: "Ä counselor: yes"
"""


@pytest.mark.parametrize("name", ["c.yaml", "c.yml", "C.YAML"])
def test_json_and_yaml_say_the_same(parse, tmp_path: Path, name: str):
    (tmp_path / "c.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_text(YAML, encoding="utf-8")
    config = parse("--config", "c.json")
    assert config == parse("--config", name)
    assert (config.bf16, config.gradient_checkpointing) == (True, "off")
    assert config.system_prompt == "Ä counselor: yes"


@pytest.mark.parametrize("name", ["c.json", "c.yaml"])
def test_a_byte_order_mark_in_the_config_file_does_no_harm(parse, tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b'\xef\xbb\xbf{"seed": 5}')
    assert parse("--config", name).seed == 5


def test_an_empty_yaml_file_changes_nothing(parse, tmp_path: Path):
    (tmp_path / "c.yaml").write_text("# nothing yet\n")
    assert parse("--config", "c.yaml") == finetune.FineTuningConfig()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("c.json", b"", "is not valid JSON"),
        ("c.json", b'{"seed": 1,}', "is not valid JSON"),
        ("c.json", b"[" * 200_000, "is not valid JSON"),
        ("c.json", b'{"seed": "\xff"}', "cannot be read"),
        ("c.json", b'["seed"]', "must hold one object of settings"),
        ("c.json", b"null and void", "is not valid JSON"),
        ("c.yaml", b"seed: [1", "is not valid YAML"),
        ("c.yaml", b"- seed", "must hold one object of settings"),
        ("c.yaml", b"seed: !!python/object/apply:os.getpid []", "is not valid YAML"),
    ],
)
def test_an_unreadable_config_file_is_refused(
    parse, tmp_path: Path, name: str, content: bytes, told: str
):
    (tmp_path / name).write_bytes(content)
    message = refusal(parse, "--config", name)
    assert told in message
    assert name in message


def test_a_missing_config_file_is_refused(parse, tmp_path: Path):
    assert "cannot be read" in refusal(parse, "--config", "missing.json")
    assert "cannot be read" in refusal(parse, "--config", tmp_path)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"seed": "seven"}, "seed must be a whole number, not 'seven'"),
        ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"seed": True}, "seed must be a whole number, not True"),
        ({"seed": None}, "seed must be a whole number, not None"),
        ({"seed": [1]}, "seed must be a whole number, not [1]"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, not 'fast'"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number, not nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be a number, not inf"),
        ({"bf16": 1}, "bf16 must be true or false, not 1"),
        ({"bf16": "maybe"}, "bf16 must be true or false, not 'maybe'"),
        ({"model_name": 7}, "model_name must be text, not 7"),
        ({"model_name": "a\0b"}, "model_name must be text"),
        ({"target_modules": 3}, "target_modules must be a list of names, not 3"),
        ({"target_modules": []}, "target_modules must be a list of names, not []"),
        ({"device": "tpu"}, "device must be one of auto, mps, cuda, cpu, not 'tpu'"),
        ({"data_path": {"a": 1}}, "data_path must be text, not {'a': 1}"),
        ({"leraning_rate": 1}, "there is no setting 'leraning_rate', did you mean 'learning_rate'"),
        ({"R2_SECRET_ACCESS_KEY": "x"}, "there is no setting 'R2_SECRET_ACCESS_KEY'"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected_and_where_it_stood(
    parse, tmp_path: Path, setting: "dict[str, object]", told: str
):
    (tmp_path / "c.json").write_text(json.dumps(setting))
    message = refusal(parse, "--config", "c.json")
    assert "c.json: " + told in message
    assert message.startswith("1 problem with the settings:")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--lora_r", "0"], "--lora_r: lora_r must be at least 1, not 0"),
        (["--lora_dropout", "1"], "lora_dropout must be less than 1"),
        (["--train_split", "0"], "train_split must be more than 0"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--seed", "4294967296"], "seed must be at most 4294967295"),
        (["--min_data_quality_score", "85"], "min_data_quality_score must be at most 1"),
        (["--optim", "adamw_torc"], "did you mean adamw_torch?"),
        (["--output_dir", " "], "output_dir must not be empty"),
        (["--train_split", "0.95"], "train_split 0.95 and eval_split 0.1 add up to more than 1"),
        (["--fp16", "--bf16"], "fp16 and bf16 exclude each other"),
        (["--fp16", "--device", "cpu"], "fp16 works on NVIDIA GPUs only"),
    ],
)
def test_an_impossible_value_is_refused(parse, arguments: "list[str]", told: str):
    assert told in refusal(parse, *arguments)


def test_everything_wrong_is_told_in_one_message(
    run_cli: "Callable[..., CliResult]", tmp_path: Path
):
    (tmp_path / "c.json").write_text('{"lora_rank": 4, "warmup_steps": "many"}')
    wrong = ["--learning_rat", "1", "--seed", "x", "--lora-r", "0", "--optim", "adam"]
    result = run_cli("check", "--config", "c.json", *wrong)
    assert (result.code, result.stdout) == (2, "")
    assert "7 problems with the settings" in result.stderr
    for told in (
        "c.json: there is no setting 'lora_rank'",
        "c.json: warmup_steps must be a whole number, not 'many'",
        "unknown argument '--learning_rat', did you mean --learning_rate?",
        "unknown argument '1'",
        "--seed: seed must be a whole number, not 'x'",
        "--lora_r: lora_r must be at least 1, not 0",
        "--optim: optim must be one of",
    ):
        assert told in result.stderr
    assert "Traceback" not in result.stderr


# --- what is typed wrongly


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("--learning-rat", "--learning_rate"),
        ("--epochs", None),
        ("--output", "--output_dir"),
        ("--datapath=x", "--data_path"),
        ("--zzz", None),
        ("--nothing", None),
    ],
)
def test_an_unknown_flag_gets_the_nearest_known_one(parse, argument: str, meant: "str | None"):
    message = refusal(parse, argument)
    assert f"unknown argument {argument!r}" in message
    assert f"did you mean {meant}?" in message if meant else "did you mean" not in message


def test_flags_are_never_abbreviated(parse):
    assert "unknown argument '--see'" in refusal(parse, "--see", 1)


def test_a_flag_without_its_value_is_refused(parse):
    assert "--seed: expected one argument" in refusal(parse, "--seed")


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("chekc", "There is no command 'chekc', did you mean 'check'?"),
        ("zzz", "There is no command 'zzz'."),
    ],
)
def test_an_unknown_command_gets_the_nearest_known_one(parse, word: str, told: str):
    assert refusal(parse, word) == told


def test_a_usage_error_goes_to_stderr_with_what_to_do(run_cli: "Callable[..., CliResult]"):
    result = run_cli("chekc")
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[1] == "-> Commands: " + ", ".join(finetune.COMMANDS) + "."


def test_a_log_folder_that_cannot_be_made_is_a_fault_of_the_settings(
    run_cli: "Callable[..., CliResult]", tmp_path: Path
):
    (tmp_path / "file").touch()
    result = run_cli("check", "--log_dir", "file/logs")
    assert (result.code, result.stdout) == (2, "")
    assert "The log folder file/logs cannot be written" in result.stderr
    assert "-> Choose another one with --log_dir FOLDER." in result.stderr


# --- saved settings


VALUES = {
    bool: st.booleans(),
    int: st.integers(8, 2**32 - 1),
    float: st.floats(0.01, 0.5),
}


@st.composite
def configurations(draw: st.DrawFn) -> finetune.FineTuningConfig:
    """Draw a configuration in which every number, switch and free text may differ."""
    values: dict[str, object] = {}
    for name, field in finetune.config_fields().items():
        if name == "fp16":
            continue  # excludes bf16
        kind = type(field.default)
        if kind in VALUES:
            values[name] = draw(st.one_of(st.just(field.default), VALUES[kind]))
    values["eval_split"] = draw(st.floats(0.01, 0.5))
    values["train_split"] = draw(st.floats(0.01, 0.5))
    values["system_prompt"] = draw(st.none() | st.text(min_size=5).filter(lambda t: "\0" not in t))
    values["target_modules"] = tuple(draw(st.lists(st.sampled_from("abcd"), min_size=1)))
    settings = [finetune.Setting(name, value, "drawn") for name, value in values.items()]
    return finetune.build_config(settings)


@given(configurations())
def test_saved_settings_give_the_same_configuration_again(
    tmp_path_factory: pytest.TempPathFactory, config: finetune.FineTuningConfig
):
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    saved = finetune.saved_settings(config)
    path.write_text(json.dumps({**saved, "provenance": {"python": "3.11"}}))
    again = finetune.build_config(finetune.read_config_file(path))
    assert finetune.saved_settings(again) == saved
    switches = {"yes": config.yes, "overwrite": config.overwrite, "verbose": config.verbose}
    assert dataclasses.replace(again, **switches) == config


def test_a_switch_of_one_call_is_never_saved(parse):
    saved = finetune.saved_settings(parse("--yes", "--overwrite", "--verbose"))
    assert saved.keys() == finetune.config_fields().keys() - {"yes", "overwrite", "verbose"}


@given(st.sampled_from(sorted(finetune.config_fields())), st.text() | st.integers() | st.floats())
def test_any_value_is_either_taken_or_refused_in_words(name: str, value: object):
    try:
        finetune.build_config([finetune.Setting(name, value, "here")])
    except finetune.UsageError as refused:
        assert name in str(refused)


@given(st.integers())
def test_whole_numbers_are_never_rounded(number: int):
    assert finetune.coerce_value("seed", number) == number
    assert finetune.coerce_value("seed", str(number)) == number


# --- secrets


SECRETS = {
    "R2_ACCESS_KEY_ID": "0123456789abcdef0123456789abcdef",
    "R2_SECRET_ACCESS_KEY": "fedcba98" * 8,
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz",
}


def unreachable_bucket() -> "dict[str, str]":
    """Return R2 variables of a server that is not there: port 9 of this machine is unused."""
    return {**SECRETS, "R2_ENDPOINT_URL": "http://127.0.0.1:9"}


@pytest.mark.parametrize("source", ["shell", ".env"])
def test_no_secret_reaches_the_console_or_a_file(
    run_cli: "Callable[..., CliResult]", tmp_path: Path, source: str
):
    variables = unreachable_bucket()
    if source == ".env":
        text = "".join(f"{name}={value}\n" for name, value in variables.items())
        (tmp_path / ".env").write_text(text)
        variables = {}
    result = run_cli("check", "--verbose", "--min_disk_gb", 0, env=variables)
    (log_file,) = (tmp_path / "logs" / "finetuning").iterdir()
    written = result.stdout + result.stderr + log_file.read_text()
    assert result.code == 11
    assert "127.0.0.1:9" in written
    assert [name for name, secret in SECRETS.items() if secret in written] == []


def test_a_secret_in_a_wrong_place_is_not_repeated(run_cli: "Callable[..., CliResult]"):
    secret = SECRETS["R2_SECRET_ACCESS_KEY"]
    result = run_cli("check", "--seed", secret, env=SECRETS)
    assert result.code == 2
    assert "must be a whole number, not '***'" in result.stderr


# --- the log


def test_every_run_has_its_own_log_file_with_times_and_details(
    run_cli: "Callable[..., CliResult]", tmp_path: Path
):
    for _ in range(2):
        run_cli("check", "--data_path", "missing.json", "--min_disk_gb", 0)
    names = sorted(path.name for path in (tmp_path / "logs" / "finetuning").iterdir())
    assert len(names) == 2
    for name in names:
        assert re.fullmatch(r"unified_finetune_\d{8}_\d{6}(_\d+)?\.log", name)
        text = (tmp_path / "logs" / "finetuning" / name).read_text()
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO ", text)
        assert "[1/5] preflight" in text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_a_library_turns_into_an_error_still_is_that_signal(
    monkeypatch, tmp_path, capsys, number, code
):
    def import_something(*_):
        try:
            signal.raise_signal(number)
        except BaseException as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr(finetune, "stop_signal", 0)  # and put back after the test
    monkeypatch.setattr(finetune, "execute", import_something)
    assert finetune.main(["check", "--log_dir", str(tmp_path)]) == code
    assert "Stopped by" in capsys.readouterr().err


def test_a_signal_that_is_lost_in_a_destructor_ends_the_stage(monkeypatch, tmp_path, capsys):
    class Fragile:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def execute(*_):
        with finetune.stage(3, "prepare"):
            Fragile()

    monkeypatch.setattr(finetune, "stop_signal", 0)  # and put back after the test
    monkeypatch.setattr(finetune, "execute", execute)
    assert finetune.main(["check", "--log_dir", str(tmp_path)]) == 143
    shown = capsys.readouterr().err
    assert "Stopped by SIGTERM" in shown
    assert "Traceback" not in shown
