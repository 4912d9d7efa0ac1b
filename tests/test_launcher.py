"""run_finetuning.sh: finds a Python, keeps venv_finetune, and hands over to the program.

Most tests give it stand-ins for Python, which are the real one for scripts and only record what is
asked of venv and pip; one makes a real venv.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import make_demo_model
import pytest
from conftest import ROOT, CliResult

# All that the launcher may call beside Python; PATH holds these and the stand-ins, nothing else.
TOOLS = ("bash", "cat", "cmp", "dirname", "head", "mkdir", "mv", "readlink", "rm", "uname")
TOOLS_OF_STUBS = ("cp", "sleep")

STUB = """\
#!/bin/bash
case "$1 $2" in
  "-m venv")
    echo "venv ${*:3}" >>LOG
    rm -rf "${@: -1}"/* && mkdir -p "${@: -1}/bin" && cp -- "$0" "${@: -1}/bin/python"
    ;;
  "-m pip")
    echo "pip ${*:3}" >>LOG
    if [ "$3" = install ]; then PIP; fi
    ;;
  *) exec "REAL" "$@" ;;
esac
"""

# Stands in for the program: tells what it was given, and ends as it is told.
PROGRAM = """\
import json, os, signal, sys
print(json.dumps({"args": sys.argv[1:], "cwd": os.getcwd(), "pid": os.getpid()}))
sys.stdout.flush()
if "die" in sys.argv:
    os.kill(os.getpid(), signal.SIGTERM)
sys.exit(int(sys.argv[2]) if sys.argv[1:2] == ["exit"] else 0)
"""


@dataclass(frozen=True)
class Project:
    """Hold a copy of the launcher, beside a stand-in for the program, and the PATH it sees."""

    root: Path
    bin: Path
    log: Path

    @property
    def venv(self) -> Path:
        """Return the folder of the launcher's venv."""
        return self.root / "venv_finetune"

    def add_python(self, name: str, pip: str = ":", real: "str | None" = None) -> None:
        """Put a stand-in for Python on PATH; `pip` is the bash that its `pip install` runs."""
        text = STUB.replace("LOG", f"'{self.log}'").replace("PIP", pip)
        self.add_tool(name, text.replace("REAL", real or sys.executable))

    def add_tool(self, name: str, text: str) -> None:
        """Put an executable script on PATH."""
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def calls(self, kind: str = "") -> "list[str]":
        """Return what the stand-ins were asked for so far."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if line.startswith(kind)]

    def popen(self, *args: str, cwd: "Path | None" = None, **env: str) -> "subprocess.Popen[str]":
        """Start the launcher in a process group of its own."""
        return subprocess.Popen(
            [str(self.root / "run_finetuning.sh"), *args],
            cwd=cwd or self.root,
            env={"PATH": str(self.bin), "HOME": str(self.root), **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, *args: str, cwd: "Path | None" = None, **env: str) -> CliResult:
        """Run the launcher to its end."""
        process = self.popen(*args, cwd=cwd, **env)
        stdout, stderr = process.communicate(timeout=900)
        return CliResult(process.returncode, stdout, stderr)


@pytest.fixture
def bare_project(tmp_path: Path) -> Project:
    """Return a project on a machine without any Python."""
    root = tmp_path / "a project's folder"
    root.mkdir()
    shutil.copy(ROOT / "run_finetuning.sh", root)
    (root / "requirements-finetuning.txt").write_text("some-package==1.0\n")
    (root / "unified_finetune.py").write_text(PROGRAM)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in TOOLS + TOOLS_OF_STUBS:
        found = shutil.which(tool)
        assert found, tool
        (tools / tool).symlink_to(found)
    return Project(root, tools, tmp_path / "calls.log")


@pytest.fixture
def project(bare_project: Project) -> Project:
    """Return a project on a machine with python3.12."""
    bare_project.add_python("python3.12")
    return bare_project


def told(result: CliResult) -> "dict[str, object]":
    """Return what the stand-in for the program said, having ended well."""
    assert result.code == 0, result.stderr
    return json.loads(result.stdout)


# --- handing over


def test_arguments_reach_the_program_verbatim(project: Project):
    args = ["data", "--system_prompt", "two  words", "", "*", "--data_path", 'a\'b "c" $HOME \\ é']
    assert told(project.start(*args))["args"] == args
    assert told(project.start(*args))["args"] == args  # with the venv in place too
    assert told(project.start())["args"] == []


def test_relative_paths_stay_the_caller_s(project: Project, tmp_path: Path):
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    assert told(project.start(cwd=elsewhere))["cwd"] == str(elsewhere)
    assert project.venv.is_dir()
    assert list(elsewhere.iterdir()) == []


def test_a_symbolic_link_to_the_launcher_uses_the_venv_beside_the_launcher(
    project: Project, tmp_path: Path
):
    link = tmp_path / "link"
    link.symlink_to(Path("a project's folder") / "run_finetuning.sh")
    done = subprocess.run([link, "x"], env={"PATH": str(project.bin)}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert project.venv.is_dir()


def test_the_program_takes_the_launcher_s_place(project: Project):
    told(project.start())
    process = project.popen()
    stdout, _ = process.communicate(timeout=60)
    assert json.loads(stdout)["pid"] == process.pid


@pytest.mark.parametrize("code", [0, 2, 11, 130])
def test_exit_codes_are_the_program_s(project: Project, code: int):
    assert project.start("exit", str(code)).code == code


def test_a_signal_that_ends_the_program_is_seen_by_the_caller(project: Project):
    assert project.start("die").code == -signal.SIGTERM


def test_stdout_carries_nothing_but_the_program_s_output(project: Project):
    first = project.start()
    assert len(first.stdout.splitlines()) == 1
    assert "Installing" in first.stderr


# --- the venv


def test_the_first_start_makes_the_venv_and_installs_the_requirements(project: Project):
    project.start()
    assert project.calls("venv") == [f"venv --clear {project.venv}"]
    (install,) = project.calls("pip install")
    assert install.endswith(f"--requirement {project.root}/requirements-finetuning.txt")


def test_the_second_start_is_silent_and_calls_neither_venv_nor_pip(project: Project):
    project.start()
    before = project.calls()
    second = project.start()
    assert (second.code, second.stderr) == (0, "")
    assert project.calls() == before


def test_changed_requirements_are_installed_into_the_same_venv(project: Project):
    project.start()
    (project.root / "requirements-finetuning.txt").write_text("some-package==1.1\n")
    result = project.start()
    assert "requirements-finetuning.txt has changed" in result.stderr
    assert (len(project.calls("venv")), len(project.calls("pip install"))) == (1, 2)
    assert project.start().stderr == ""


def test_a_venv_without_pip_is_made_anew_when_the_requirements_change(project: Project):
    project.start()
    (project.root / "requirements-finetuning.txt").write_text("some-package==1.1\n")
    python = project.venv / "bin" / "python"
    python.write_text(f'#!/bin/bash\n[ "$1" = -m ] && exit 1\nexec {sys.executable} "$@"\n')
    assert project.start().code == 0
    assert len(project.calls("venv")) == 2


@pytest.mark.parametrize("damage", ["no python", "dangling python", "empty", "no stamp", "not run"])
def test_a_half_made_venv_is_made_anew(project: Project, damage: str):
    project.start()
    python = project.venv / "bin" / "python"
    if damage == "empty":
        shutil.rmtree(project.venv)
        project.venv.mkdir()
    elif damage == "no stamp":
        (project.venv / "installed.txt").unlink()
    elif damage == "not run":
        python.write_text("no program at all")
    else:
        python.unlink()
        if damage == "dangling python":
            python.symlink_to("/nowhere/python3.12")
    result = project.start()
    assert result.code == 0
    assert "making it anew" in result.stderr
    assert (len(project.calls("venv")), len(project.calls("pip install"))) == (2, 2)
    assert project.start().stderr == ""


def test_a_moved_project_gets_a_new_venv(project: Project, tmp_path: Path):
    project.start()
    moved = Project(project.root.rename(tmp_path / "moved"), project.bin, project.log)
    assert "making it anew" in moved.start().stderr
    assert moved.start().stderr == ""


def test_a_killed_install_is_never_taken_for_a_finished_one(project: Project):
    project.add_python("python3.12", pip="kill -9 $PPID; sleep 0.2; exit 1")
    assert project.start().code == -signal.SIGKILL
    project.add_python("python3.12")
    assert "making it anew" in project.start().stderr
    assert len(project.calls("pip install")) == 2


def test_a_failed_install_says_what_to_do_and_is_tried_again(project: Project):
    project.add_python("python3.12", pip="echo 'ERROR: no such package' >&2; exit 1")
    failed = project.start()
    assert failed.code == 11
    assert failed.stdout == ""
    assert "ERROR: no such package" in failed.stderr
    assert "pip could not install requirements-finetuning.txt" in failed.stderr
    assert "-> Check the network" in failed.stderr
    project.add_python("python3.12")
    assert project.start().code == 0


def test_ctrl_c_during_the_install_is_no_failed_install(project: Project):
    waiting = project.root / "waiting"
    wait = (
        "import pathlib, sys, time\\n"
        "try:\\n  pathlib.Path(sys.argv[1]).touch(); time.sleep(60)\\n"
        "except KeyboardInterrupt:\\n  sys.exit(1)"
    )
    project.add_python("python3.12", pip=f"exec '{sys.executable}' -c $'{wait}' \"{waiting}\"")
    process = project.popen()
    while not waiting.exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Stopped." in stderr
    assert "could not install" not in stderr


def test_two_launchers_at_once_install_once(project: Project):
    project.add_python("python3.12", pip="sleep 1")
    first, second = project.popen(), project.popen()
    ends = [process.communicate(timeout=60) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(project.calls("pip install")) == 1
    assert sum("waiting for it" in stderr for _, stderr in ends) == 1


def test_something_else_in_the_venv_s_place_is_left_alone(project: Project):
    project.venv.write_text("precious")
    result = project.start()
    assert result.code == 11
    assert "is in the way" in result.stderr
    assert project.venv.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_project_folder_is_said_so(project: Project):
    project.root.chmod(0o555)
    result = project.start()
    project.root.chmod(0o755)
    assert result.code == 11
    assert "cannot be written" in result.stderr


def test_a_real_venv_is_made_and_used(bare_project: Project):
    (bare_project.bin / "python3").symlink_to(sys.executable)
    (bare_project.root / "requirements-finetuning.txt").write_text("# nothing\n")
    (bare_project.root / "unified_finetune.py").write_text("import sys; print(sys.prefix)")
    first = bare_project.start()
    assert (first.code, first.stdout) == (0, f"{bare_project.venv}\n"), first.stderr
    second = bare_project.start()
    assert (second.code, second.stdout, second.stderr) == (0, first.stdout, "")


# --- finding a Python


def make_old(version: str) -> str:
    """Return a stand-in for a Python that says it has another version."""
    pretend = f"import sys; sys.version_info = ({version.replace('.', ', ')}); exec(sys.argv[1])"
    return f'#!/bin/bash\nexec "{sys.executable}" -c "{pretend}" "$2"\n'


def test_the_newest_fitting_python_is_taken(bare_project: Project):
    for name in ("python3", "python3.11", "python3.13"):
        bare_project.add_python(name)
    bare_project.add_tool("python3.13", "#!/bin/bash\necho 'pyenv: not found' >&2; exit 127\n")
    bare_project.start()
    made_with = (bare_project.venv / "bin" / "python").read_text()
    assert made_with == (bare_project.bin / "python3.11").read_text()
    assert len(bare_project.calls("venv")) == 1


@pytest.mark.parametrize("version", ["3.9.6", "3.10.14", "3.14.0"])
def test_an_unfit_python_is_named_with_ways_to_get_another(bare_project: Project, version: str):
    bare_project.add_tool("python3", make_old(version))
    result = bare_project.start()
    assert result.code == 11
    assert f"python3 ({bare_project.bin}/python3) is {version}" in result.stderr
    assert "python3.13 is not there" in result.stderr
    for way in ("sudo apt install", "sudo dnf install", "astral.sh/uv"):
        assert way in result.stderr
    assert len(result.stderr.splitlines()) <= 24
    assert not bare_project.venv.exists()


def test_a_python_without_venv_is_named_with_the_package_it_lacks(bare_project: Project):
    block = "import sys; sys.modules['ensurepip'] = None; exec(sys.argv[1])"
    bare_project.add_tool("python3", f'#!/bin/bash\nexec "{sys.executable}" -c "{block}" "$2"\n')
    result = bare_project.start()
    assert result.code == 11
    package = f"python3.{sys.version_info.minor}-venv"
    assert f"without venv (Debian, Ubuntu: sudo apt install {package})" in result.stderr


def test_uv_is_asked_when_no_python_fits(bare_project: Project, tmp_path: Path):
    bare_project.add_tool("python3", make_old("3.9.6"))
    bare_project.add_python("brought-by-uv")
    bare_project.add_tool(
        "uv",
        f"#!/bin/bash\necho \"uv $UV_PYTHON_PREFERENCE $*\" >>'{bare_project.log}'\n"
        f"[ \"$2\" = install ] && echo noise || echo '{bare_project.bin}/brought-by-uv'\n",
    )
    told(bare_project.start())
    assert bare_project.calls("uv") == [
        "uv only-managed python install 3.12",
        "uv only-managed python find 3.12",
    ]
    assert len(bare_project.calls("venv")) == 1


def test_a_uv_that_gets_no_python_ends_in_the_same_advice(bare_project: Project):
    bare_project.add_tool("uv", "#!/bin/bash\necho 'error: no network' >&2; exit 2\n")
    result = bare_project.start()
    assert result.code == 11
    assert "error: no network" in result.stderr
    assert "uv could not get one" in result.stderr


def test_help_needs_no_install(project: Project):
    assert told(project.start("chat", "--help"))["args"] == ["chat", "--help"]
    assert not project.venv.exists()


def mac(project: Project, translated: bool) -> None:
    """Make the machine look like a Mac whose programs are Intel ones."""
    project.add_tool(
        "uname",
        '#!/bin/bash\n[ "$1" = -s ] && echo Darwin || echo Darwin x86_64\n',
    )
    project.add_tool("sysctl", f"#!/bin/bash\necho {int(translated)}\n")


def test_an_intel_mac_is_refused_before_pip_is_tried(bare_project: Project):
    (bare_project.bin / "uname").unlink()
    bare_project.add_python("python3.12")
    mac(bare_project, translated=False)
    result = bare_project.start()
    assert result.code == 11
    assert "Intel processor" in result.stderr
    assert bare_project.calls() == []


def test_rosetta_is_told_apart_from_an_intel_mac(bare_project: Project):
    (bare_project.bin / "uname").unlink()
    mac(bare_project, translated=True)
    result = bare_project.start()
    assert result.code == 11
    assert f"arch -arm64 {bare_project.root}/run_finetuning.sh" in result.stderr


def test_on_a_mac_the_advice_is_for_macs(bare_project: Project):
    (bare_project.bin / "uname").unlink()
    bare_project.add_tool("uname", "#!/bin/bash\necho Darwin\n")
    result = bare_project.start()
    assert "brew install python@3.12" in result.stderr
    assert "apt" not in result.stderr


# --- which torch


def test_linux_without_a_gpu_takes_the_cpu_build_where_its_index_answers(project: Project):
    project.add_tool("curl", "#!/bin/bash\nexit 0\n")
    project.start()
    (install,) = project.calls("pip install")
    expected = "--extra-index-url https://download.pytorch.org/whl/cpu"
    has_gpu = Path("/dev/nvidiactl").exists()
    assert install.endswith(expected) is not has_gpu


@pytest.mark.parametrize("reason", ["a GPU", "no answer", "an index was chosen"])
def test_pip_keeps_its_own_index_when_there_is(project: Project, reason: str):
    project.add_tool("curl", f"#!/bin/bash\nexit {int(reason == 'no answer')}\n")
    if reason == "a GPU":
        project.add_tool("nvidia-smi", "#!/bin/bash\n")
    chosen = {"PIP_EXTRA_INDEX_URL": "https://rocm.example"} if "chosen" in reason else {}
    project.start(**chosen)
    (install,) = project.calls("pip install")
    assert "--extra-index-url" not in install


# --- the demo


@pytest.fixture
def demo_project(project: Project) -> Project:
    """Return a project whose demo model is a stand-in too."""
    (project.root / "tests").mkdir()
    (project.root / "tests" / "make_demo_model.py").write_text(
        "import pathlib, sys; pathlib.Path(sys.argv[1]).mkdir(parents=True)\n"
    )
    return project


@pytest.mark.parametrize(
    ("given", "command", "own"),
    [
        (["--demo"], "train", []),
        (["--demo", "--seed", "7"], "train", ["--seed", "7"]),
        (["--seed", "7", "--demo"], "train", ["--seed", "7"]),
        (["data", "--demo"], "data", []),
        (["--demo", "chat", "--prompt", "a b", ""], "chat", ["--prompt", "a b", ""]),
    ],
)
def test_the_demo_s_settings_stand_between_the_command_and_the_user_s_own(
    demo_project: Project, given: "list[str]", command: str, own: "list[str]"
):
    args = told(demo_project.start(*given))["args"]
    assert isinstance(args, list)
    assert args[0] == command
    assert args[1:5] == [
        "--model_name",
        f"{demo_project.root}/cache/demo_model",
        "--data_path",
        f"{demo_project.root}/tests/data/college_advisor_sample.json",
    ]
    assert "--demo" not in args
    assert args[len(args) - len(own) :] == own
    assert (demo_project.root / "cache" / "demo_model").is_dir()


def test_a_demo_model_that_cannot_be_built_ends_the_demo(demo_project: Project):
    (demo_project.root / "tests" / "make_demo_model.py").write_text("raise SystemExit('disk full')")
    result = demo_project.start("--demo")
    assert (result.code, result.stdout) == (11, "")
    assert "disk full" in result.stderr
    assert "could not be built" in result.stderr


def test_the_whole_demo_on_the_real_program(bare_project: Project, tmp_path: Path):
    for name in ("unified_finetune.py", "requirements-finetuning.txt"):
        shutil.copy(ROOT / name, bare_project.root)
    shutil.copytree(ROOT / "tests" / "data", bare_project.root / "tests" / "data")
    shutil.copy(ROOT / "tests" / "make_demo_model.py", bare_project.root / "tests")
    bare_project.add_python("python3.12")
    result = bare_project.start("--demo", cwd=tmp_path)
    assert (result.code, result.stdout) == (0, "demo_model\n"), result.stderr
    metrics = json.loads((tmp_path / "demo_model" / "training_metrics.json").read_text())
    assert metrics["eval_loss"] < 0.5 * metrics["eval_loss_before"]
    assert re.search(r"before +\S.*\n +after +\S", result.stderr)
    losses = [float(loss) for loss in re.findall(r"step \d+/\d+  loss (\S+)", result.stderr)]
    assert losses[-1] < 0.5 * losses[0]
    again = bare_project.start("--demo", cwd=tmp_path)
    assert (again.code, again.stdout) == (0, "demo_model\n")
    assert "This run is finished" in again.stderr
    assert "Making the demo's base model" not in again.stderr


# --- the demo's model


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the minute of pre-training."""
    monkeypatch.setattr(make_demo_model, "pretrain", lambda *args, **kwargs: None)


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json", make_demo_model.MARKER])
def test_an_incomplete_demo_model_is_built_again(untrained: None, tmp_path: Path, lost: str):
    folder = tmp_path / "cache" / "demo_model"
    assert make_demo_model.main(folder) == 0
    assert make_demo_model.is_current(folder)
    (folder / lost).write_text("cut short")
    assert not make_demo_model.is_current(folder)
    (tmp_path / "cache" / ".demo_model.killed").mkdir()
    assert make_demo_model.main(folder) == 0
    assert make_demo_model.is_current(folder)
    assert {path.name for path in folder.parent.iterdir()} == {"demo_model", "demo_model.lock"}


def test_a_whole_demo_model_is_left_alone(untrained: None, tmp_path: Path, capsys):
    folder = tmp_path / "demo_model"
    make_demo_model.main(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    assert make_demo_model.main(folder) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert capsys.readouterr() == ("", "")


def test_another_sample_makes_another_demo_model(
    untrained: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "demo_model"
    make_demo_model.main(folder)
    sample = tmp_path / "sample.json"
    sample.write_text('[{"instruction": "Why?", "input": "", "output": "Because."}]')
    monkeypatch.setattr(make_demo_model, "SAMPLE", sample)
    assert not make_demo_model.is_current(folder)


def test_a_demo_model_that_cannot_be_written_is_told_in_one_line(tmp_path: Path, capsys):
    (tmp_path / "file").touch()
    assert make_demo_model.main(tmp_path / "file" / "demo_model") == 1
    assert re.fullmatch(r"make_demo_model\.py: .*File exists.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "build", [make_demo_model.build_tiny_model, make_demo_model.build_demo_model]
)
def test_the_tokenizer_is_built_like_tinyllama_s(
    untrained: None, tmp_path: Path, assets: Path, build: "Callable[[Path], None]"
):
    folder = tmp_path / "model"
    build(folder)
    real = assets / "tokenizers" / "tinyllama-1.1b-chat"
    ours, theirs = (json.loads((path / "tokenizer.json").read_text()) for path in (folder, real))
    our_model, their_model = ours.pop("model"), theirs.pop("model")
    assert ours == theirs
    for model in (our_model, their_model):
        model["first_ids"] = {token: i for token, i in model.pop("vocab").items() if i < 259}
        del model["merges"]
    assert our_model == their_model
    settings, template = (
        json.loads((path / "tokenizer_config.json").read_text()) for path in (folder, real)
    )
    assert settings["chat_template"] == template["chat_template"]
    assert settings["pad_token"] == template["pad_token"] == "</s>"


def test_no_piece_of_the_tokenizer_crosses_a_line_or_a_word(untrained: None, tmp_path: Path):
    make_demo_model.build_demo_model(tmp_path / "demo")
    vocab = json.loads((tmp_path / "demo" / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocab) == 2000
    assert [piece for piece in vocab if "\n" in piece or "▁" in piece[1:]] == []


# --- the script itself


@pytest.mark.parametrize("script", ["run_finetuning.sh", "tests/run.sh", ".ci/run"])
def test_shellcheck_finds_nothing(script: str):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, ROOT / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_launcher_needs_no_newer_bash_than_macos_has():
    lines = (ROOT / "run_finetuning.sh").read_text().splitlines()
    code = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    newer = (
        r"declare -[Ag]|local -n|mapfile|readarray|\$\{\w+(,,?|\^\^?)\}|&>>|\|&|wait -n|\$\{\w+@"
    )
    assert not re.search(newer, code)
