"""run_finetuning.sh: finds a Python, keeps venv_finetune, and hands over to the program.

Most tests give it stand-ins for Python, which run scripts and record what is asked of venv and pip.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_demo_model
import pytest
from conftest import ROOT, CliResult
from packaging.requirements import Requirement

# PATH holds these and the stand-ins, nothing else.
TOOLS = "bash cat cmp cp dirname mkdir mv readlink rm sleep tail uname"

STUB = """\
case "$1 $2" in
  "-m venv")
    echo "venv ${*:3}" >>LOG
    rm -rf "${@: -1}"/* && mkdir -p "${@: -1}/bin" && cp -- "$0" "${@: -1}/bin/python"
    ;;
  "-m pip")
    echo "pip ${*:3}" >>LOG
    if [ "$3" = install ]; then PIP; fi
    ;;
  "-c "*) exec "REAL" -c 'import os, sys; PRETEND; exec(sys.argv.pop(1))' "${@:2}" ;;
  *) exec "REAL" "$@" ;;
esac"""

# Stands in for the program: tells what it was given, and ends as it is told.
PROGRAM = """\
import json, os, sys
print(json.dumps({"args": sys.argv[1:], "cwd": os.getcwd(), "pid": os.getpid()}), flush=True)
if sys.argv[1:2] == ["exit"]:
    sys.exit(int(sys.argv[2])) if int(sys.argv[2]) >= 0 else os.kill(os.getpid(), 15)
"""


@dataclass(frozen=True)
class Project:
    """Hold a copy of the launcher, beside a stand-in for the program, and the PATH it sees."""

    root: Path
    bin: Path
    log: Path
    venv = property(lambda self: self.root / "venv_finetune")

    def add_tool(self, name: str, text: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)  # never write through a link to the real one
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def add_python(self, name: str = "python3.12", pip: str = ":", pretend: str = "0") -> None:
        """Put a Python on PATH; `pip` is its `pip install` in bash, `pretend` comes before -c."""
        text = STUB.replace("LOG", f"'{self.log}'").replace("REAL", sys.executable)
        self.add_tool(name, text.replace("PIP", pip).replace("PRETEND", pretend))

    def calls(self, kind: str = "") -> "list[str]":
        """Return what the stand-ins were asked for so far."""
        self.log.touch()
        return [line for line in self.log.read_text().splitlines() if line.startswith(kind)]

    def installs(self) -> "tuple[int, int]":
        """Return how many venvs were made and how often pip installed."""
        return len(self.calls("venv")), len(self.calls("pip install"))

    def popen(self, *args: str, **env: str) -> "subprocess.Popen[str]":
        """Start the launcher, at the project's parent, in a process group of its own."""
        env |= {"PATH": str(self.bin), "HOME": str(self.root)}
        command = [self.root / "run_finetuning.sh", *args]
        ends = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | {"stdin": subprocess.DEVNULL}
        place = {"cwd": self.root.parent, "env": env, "start_new_session": True}
        return subprocess.Popen(command, text=True, **ends, **place)

    def start(self, *args: str, **env: str) -> CliResult:
        process = self.popen(*args, **env)
        stdout, stderr = process.communicate(timeout=900)
        return CliResult(process.returncode, stdout, stderr)


@pytest.fixture
def bare_project(tmp_path: Path) -> Project:
    """Return a project on a machine without any Python."""
    project = Project(tmp_path / "a project's folder", tmp_path / "bin", tmp_path / "calls.log")
    project.root.mkdir()
    project.bin.mkdir()
    shutil.copy(ROOT / "run_finetuning.sh", project.root)
    (project.root / "unified_finetune.py").write_text(PROGRAM)
    (project.root / "requirements-finetuning.txt").write_text("some-package==1.0\n")
    for tool in TOOLS.split():
        (project.bin / tool).symlink_to(str(shutil.which(tool)))
    return project


@pytest.fixture
def project(bare_project: Project) -> Project:
    """Return a project on a machine with python3.12."""
    bare_project.add_python()
    return bare_project


def told(result: CliResult) -> "dict[str, Any]":
    """Return what the stand-in for the program said, having ended well."""
    assert result.code == 0, result.stderr
    return json.loads(result.stdout)


def refused(result: CliResult, *parts: str) -> None:
    """Check that the launcher ended before the program, saying all of this."""
    assert (result.code, result.stdout) == (11, ""), result
    assert [part for part in parts if part not in result.stderr] == [], result.stderr


def test_arguments_reach_the_program_verbatim_and_help_before_any_install(project: Project):
    assert told(project.start("chat", "--help"))["args"] == ["chat", "--help"]
    assert not project.venv.exists()
    args = ["data", "--system_prompt", "two  words", "", "*", "--data_path", 'a\'b "c" $HOME \\ é']
    first = project.start(*args)
    assert told(first)["args"] == args and "Installing" in first.stderr  # not on stdout
    calls = project.calls()
    assert project.calls("venv") == [f"venv --clear {project.venv}"]
    (install,) = project.calls("pip install")
    assert install.endswith(f"--requirement {project.root}/requirements-finetuning.txt")
    second = project.start(*args)  # silent, and neither venv nor pip is called
    assert (told(second)["args"], second.stderr, project.calls()) == (args, "", calls)
    assert told(project.start())["args"] == []


def test_the_program_takes_the_launcher_s_place_where_it_is_called(project, tmp_path):
    link, elsewhere = tmp_path / "link", tmp_path / "else where"
    link.symlink_to(Path("a project's folder") / "run_finetuning.sh")
    elsewhere.mkdir()
    environment = {"PATH": str(project.bin)}
    done = subprocess.run([link], cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert json.loads(done.stdout)["cwd"] == str(elsewhere)
    assert list(elsewhere.iterdir()) == [] and project.venv.is_dir()
    process = project.popen()
    assert json.loads(process.communicate(timeout=60)[0])["pid"] == process.pid
    for code in (0, 11, 130, -signal.SIGTERM):
        assert project.start("exit", str(code)).code == code


# --- the venv


NEW_PIN = "echo some-package==1.1 >../requirements-finetuning.txt"
NO_PIP = f'#!/bin/bash\n[ "$1" = -m ] && exit 1\nexec {sys.executable} "$@"'


@pytest.mark.parametrize(("change", "venvs"), [
    (NEW_PIN, 1),
    (f"{NEW_PIN}; echo '{NO_PIP}' >bin/python", 2),
    ("ln -sf /nowhere/python3.12 bin/python", 2),
    ("echo 'no program at all' >bin/python", 2),
    ("rm -r *", 2),
    ("rm installed.txt", 2),
    ("sed -i.old '1s/^[A-Za-z]* [^,]*/Darwin x86_64/' installed.txt", 2),  # came from an Intel Mac
    ("mv installed.txt old; sed '1s/Python.*/Python 3.4/' old >installed.txt", 2),
])  # fmt: skip
def test_new_requirements_go_into_a_whole_venv_and_another_one_is_made_anew(project, change, venvs):
    project.start()
    subprocess.run(change, shell=True, cwd=project.venv, check=True)
    said = "making it anew" if venvs == 2 else "requirements-finetuning.txt has changed"
    assert said in project.start().stderr
    assert (project.start().stderr, project.installs()) == ("", (venvs, 2))


def test_a_new_place_makes_a_new_venv_and_a_new_spelling_does_not(project: Project, tmp_path: Path):
    project.start()
    # On macOS a path may be typed in any case; here a link is the other name of the same folder.
    (tmp_path / "A PROJECT").symlink_to(project.root)
    stamp = project.venv / "installed.txt"
    stamp.write_text(stamp.read_text().replace(str(project.root), str(tmp_path / "A PROJECT")))
    assert project.start().stderr == ""
    moved = Project(project.root.rename(tmp_path / "moved"), project.bin, project.log)
    assert "making it anew" in moved.start().stderr


def test_an_install_that_was_killed_or_failed_is_never_taken_for_a_finished_one(project: Project):
    project.add_python(pip="kill -9 $PPID; sleep 0.2; exit 1")
    assert project.start().code == -signal.SIGKILL
    waiting = project.root / "waiting"
    project.add_python(pip=f"trap 'exit 1' INT; : >\"{waiting}\"; sleep 60")
    process = project.popen()
    while not waiting.exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Stopped." in stderr and "could not install" not in stderr
    project.add_python(pip="echo 'ERROR: no such package' >&2; exit 1")
    failure = "pip could not install requirements-finetuning.txt"
    refused(project.start(), "making it anew", "no such package", failure, "-> Check the network")
    project.add_python()
    assert "making it anew" in project.start().stderr
    assert project.installs() == (4, 4)


def test_two_launchers_at_once_install_once(project: Project):
    project.add_python(pip="sleep 1")
    first, second = project.popen(), project.popen()
    ends = [process.communicate(timeout=60) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert project.installs() == (1, 1)
    assert sum("waiting for it" in stderr for _, stderr in ends) == 1


def test_a_real_venv_is_made_and_used_and_what_is_in_the_way_is_left_alone(bare_project: Project):
    root = bare_project.root
    (bare_project.bin / "python3").symlink_to(sys.executable)
    for name, said in (("cache", "cannot be written"), ("venv_finetune", "is in the way")):
        shutil.rmtree(root / "cache", ignore_errors=True)
        (root / name).write_text("precious")
        refused(bare_project.start(), said)
        assert (root / name).read_text() == "precious"
        (root / name).unlink()
    (root / "requirements-finetuning.txt").write_text("# nothing\n")
    (root / "unified_finetune.py").write_text("import sys; print(sys.prefix)")
    for _ in range(2):
        done = bare_project.start()
        assert (done.code, done.stdout) == (0, f"{bare_project.venv}\n"), done.stderr
    assert done.stderr == ""


# --- finding a Python


def py(version: str, more: str = "0") -> str:
    """Return what makes a stand-in for Python pretend to be another one."""
    return f"sys.version_info = ({version.replace('.', ', ')}); {more}"


ON_INTEL = 'sys.platform = "darwin"; os.uname = lambda: [0, 0, 0, 0, "x86_64"]'  # and on Rosetta
FOR_INTEL = py("3.12.1", f"import bz2, ctypes, ensurepip, lzma, ssl, venv; {ON_INTEL}")
LINUX, APPLE, INTEL = "Linux x86_64", "Darwin arm64", "Darwin x86_64"


@pytest.mark.parametrize(("system", "macos", "pretend", "said"), [
    (LINUX, "", py("3.9.6"), ["is 3.9.6\n", "3.11 to 3.14. ", "sudo apt", "sudo dnf"]),
    (LINUX, "", py("3.10.14"), ["is 3.10.14\n", "python3.13 is not there", "astral.sh/uv"]),
    (LINUX, "", py("3.12.1", 'sys.modules["ensurepip"] = None'), ["apt install python3.12-"]),
    (LINUX, "", py("3.12.1", 'sys.modules["_ssl"] = None'), ["without ssl (install openssl"]),
    (APPLE, "14.0", py("3.14.2"), []),
    (APPLE, "26.1", py("3.11.0"), []),
    (APPLE, "15.2", py("3.15.0"), ["is 3.15.0\n", "3.11 to 3.14. ", "brew install"]),
    (APPLE, "15.2", FOR_INTEL, ["is 3.12.1, built for Intel Macs", "brew install"]),
    (APPLE, "13.6.1", py("3.12.1"), ["has macOS 13.6.1", "for macOS 14 and", "-> Update"]),
    (INTEL, "12.7", FOR_INTEL, []),
    (INTEL, "15.2", py("3.13.0"), ["is 3.13.0\n", "3.11 to 3.12. ", "brew install"]),
    (INTEL, "11.7.10", py("3.12.1"), ["has macOS 11.7.10", "for macOS 12 and", "-> Update"]),
    (INTEL, "Rosetta", py("3.12.1"), ["Rosetta", "-> Start with: arch -arm64 "]),
])  # fmt: skip
def test_what_does_not_fit_is_told_why_and_what_would(bare_project, system, macos, pretend, said):
    bare_project.add_python("python3", pretend=pretend)
    bare_project.add_tool("uname", f"echo {system}")
    bare_project.add_tool("sw_vers", f'[ "$*" = -productVersion ] && echo {macos}')
    bare_project.add_tool("sysctl", f"echo {int(macos == 'Rosetta')}")
    result = bare_project.start()
    if said:
        refused(result, *said)
    assert (result.code, bare_project.installs()) == ((11, (0, 0)) if said else (0, (1, 1)))
    assert ("apt" in result.stderr) is (system == LINUX)
    assert len(result.stderr.splitlines()) <= 24


def test_the_best_fitting_python_is_taken_and_uv_asked_when_none_fits(bare_project: Project):
    bare_project.add_python("python3", pretend=py("3.9.6"))
    bare_project.add_tool("uv", "echo 'error: no network' >&2; exit 2")
    refused(bare_project.start(), "error: no network", "uv could not get one", "-> Get one")
    bare_project.add_python("brought-by-uv")
    answer = f"[ \"$2\" = install ] && echo noise || echo '{bare_project.bin}/brought-by-uv'"
    note = f"echo \"uv $UV_PYTHON_PREFERENCE $*\" >>'{bare_project.log}'"
    bare_project.add_tool("uv", f"{note}\n{answer}")
    told(bare_project.start())
    asked = [f"uv only-managed python {verb} 3.12" for verb in ("install", "find")]
    assert bare_project.calls("uv") == asked
    shutil.rmtree(bare_project.venv)
    for name in ("python3", "python3.11", "python3.14"):
        bare_project.add_python(name, pip=f"echo {name}")
    bare_project.add_tool("python3.13", "echo 'pyenv: not found' >&2; exit 127")
    assert "\npython3.11\n" in bare_project.start().stderr
    assert bare_project.calls("uv") == asked


def test_apple_s_placeholder_is_never_called(bare_project: Project):
    launcher, here = bare_project.root / "run_finetuning.sh", f"{bare_project.bin}/python3"
    launcher.write_text(launcher.read_text().replace("/usr/bin/python3", here))
    bare_project.add_tool("uname", "echo Darwin arm64")
    bare_project.add_python("python3")
    bare_project.add_tool("xcode-select", "exit 2")
    refused(bare_project.start(), "python3) is Apple's placeholder")
    bare_project.add_tool("xcode-select", "exit 0")
    told(bare_project.start())


@pytest.mark.parametrize("reason", ["a GPU", "no answer", "an index was chosen", None])
def test_linux_takes_the_cpu_build_of_torch_unless_there_is(project: Project, reason: "str | None"):
    project.add_tool("uname", "echo Linux x86_64")
    project.add_tool("curl", f"exit {int(reason == 'no answer')}")
    if reason == "a GPU":
        project.add_tool("nvidia-smi", "")
    chosen = {"PIP_EXTRA_INDEX_URL": "https://rocm.example"} if "chosen" in str(reason) else {}
    project.start(**chosen)
    (install,) = project.calls("pip install")
    index = "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert (index in install) is (reason is None and not Path("/dev/nvidiactl").exists())


@pytest.mark.parametrize(("system", "torch", "numpy"), [
    (LINUX, "2.13.0", "2."), (APPLE, "2.14.1", "2."), (INTEL, "2.2.2", "1."),
])  # fmt: skip
def test_each_machine_gets_one_exact_version_of_each_package(system: str, torch: str, numpy: str):
    lines = (ROOT / "requirements-finetuning.txt").read_text().splitlines()
    pins = [Requirement(pin) for line in lines if (pin := line.split("#")[0].strip())]
    machine = dict(zip(("sys_platform", "platform_machine"), system.lower().split(), strict=True))
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(machine)]
    versions = {pin.name: str(pin.specifier) for pin in here}
    assert len(versions) == len(here)
    assert versions.keys() >= {pin.name for pin in pins} - {"pandas", "pyarrow"}
    assert all(re.fullmatch(r"==[\d.]+", version) for version in versions.values())
    assert (versions["torch"], versions["numpy"][:4]) == ("==" + torch, "==" + numpy)


# --- the demo


def test_the_demo_s_settings_stand_between_the_command_and_the_user_s_own(project: Project):
    stand_in = project.root / "tests" / "make_demo_model.py"
    stand_in.parent.mkdir()
    stand_in.write_text("raise SystemExit('disk full')")
    refused(project.start("--demo"), "disk full", "could not be built")
    stand_in.write_text("import os, sys; os.makedirs(sys.argv[1], exist_ok=True)")
    model, data = "cache/demo_model", "tests/data/college_advisor_sample.json"
    settings = ["--model_name", f"{project.root}/{model}", "--data_path", f"{project.root}/{data}"]
    for given, command, own in (
        (["--demo"], "train", []),
        (["--seed", "7", "--demo"], "train", ["--seed", "7"]),
        (["--demo", "chat", "--prompt", "a b", ""], "chat", ["--prompt", "a b", ""]),
    ):
        args = told(project.start(*given))["args"]
        assert args[:5] == [command, *settings] and "--demo" not in args
        assert args[len(args) - len(own) :] == own


def test_the_whole_demo_on_the_real_program(project: Project, tmp_path: Path):
    for name in ("unified_finetune.py", "requirements-finetuning.txt"):
        shutil.copy(ROOT / name, project.root)
    shutil.copytree(ROOT / "tests" / "data", project.root / "tests" / "data")
    shutil.copy(ROOT / "tests" / "make_demo_model.py", project.root / "tests")
    result = project.start("--demo")
    assert (result.code, result.stdout) == (0, "demo_model\n"), result.stderr
    metrics = json.loads((tmp_path / "demo_model" / "training_metrics.json").read_text())
    assert metrics["eval_loss"] < 0.5 * metrics["eval_loss_before"]
    assert re.search(r"before +\S.*\n +after +\S", result.stderr)
    again = project.start("--demo")
    assert (again.code, again.stdout) == (0, "demo_model\n")
    assert "This run is finished" in again.stderr
    assert "Making the demo's base model" not in again.stderr


def test_a_demo_model_is_built_again_when_not_whole_or_outdated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_demo_model, "pretrain", lambda *args: None)  # takes a minute
    folder = tmp_path / "cache" / "demo_model"
    (tmp_path / "cache" / ".demo_model.new").mkdir(parents=True)  # a build that was killed
    assert make_demo_model.main(folder) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    assert (make_demo_model.main(folder), capsys.readouterr()) == (0, ("", ""))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    for lost in ("model.safetensors", make_demo_model.MARKER):
        (folder / lost).write_text("cut short")
        assert make_demo_model.main(folder) == 0 and make_demo_model.is_current(folder)
    assert {path.name for path in folder.parent.iterdir()} == {"demo_model", "demo_model.lock"}
    monkeypatch.setattr(make_demo_model, "SAMPLE", tmp_path / "sample.json")
    make_demo_model.SAMPLE.write_text("[]")
    assert not make_demo_model.is_current(folder)
    capsys.readouterr()
    assert make_demo_model.main(make_demo_model.SAMPLE / "demo_model") == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"make_demo_model\.py: .*(File exists|Not a directory).*\n", said)


def test_the_launcher_needs_no_newer_bash_than_macos_has():
    code = re.sub(r"(?m)^ *#.*", "", (ROOT / "run_finetuning.sh").read_text())
    newer = r"declare -[Ag]|local -n|mapfile|readarray|\$\{\w+(,,?|\^\^?)\}|&>>|\|&|\$\{\w+@"
    assert not re.search(newer, code)
