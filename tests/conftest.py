"""Fixtures for all tests: the program in a clean environment, a tiny model, a real S3 server."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before any test imports torch, transformers or boto3: no network, no telemetry, no cloud metadata.
# The models are tiny: threads would only wait for each other.
names = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "OMP_NUM_THREADS")
os.environ.update(dict.fromkeys(names, "1"), TOKENIZERS_PARALLELISM="false")
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
sys.path.insert(0, str(ROOT))  # so that tests can import the program

FAULTS: "Counter[str]" = Counter()  # what tests inject, counted for the summary at the end


@pytest.fixture(scope="session", autouse=True)
def old_packages() -> None:
    """Let tests that begin in the middle of the program find the packages of Intel Macs adapted."""
    if sys.prefix.endswith(".venv-intel"):
        import unified_finetune

        unified_finetune.adapt_old_packages()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the counts of one of several test processes to the first one."""
    output = getattr(session.config, "workeroutput", None)  # only those of pytest-xdist have it
    if output is not None:
        output["faults"] = dict(FAULTS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add up what a test process hands over."""
    FAULTS.update(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many faults of each kind the program was put through."""
    if FAULTS:
        terminalreporter.write_sep("-", "faults injected")
        for kind, count in sorted(FAULTS.items(), key=lambda item: -item[1]):
            terminalreporter.write_line(f"{count:6d}  {kind}")
        failed = terminalreporter.stats.get("failed")
        outcome = "a test failed, see above" if failed else "all recovered or clearly refused"
        terminalreporter.write_line(f"{sum(FAULTS.values()):6d}  in all: {outcome}")


# Whatever begins so in the developer's shell must not reach the program under test.
FOREIGN_VARIABLES = (
    "R2_", "AWS_", "HF_", "HUGGING", "TRANSFORMERS_", "MKL_", "WANDB", "UNIFIED_FINETUNE_",
)  # fmt: skip
FOREIGN_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTHONPATH")


@dataclass(frozen=True)
class CliResult:
    """Hold what one call of the program did."""

    code: int
    stdout: str
    stderr: str


def clean_environment(home: Path) -> "dict[str, str]":
    """Return this environment without what would change the program's behaviour."""
    names = [name for name in os.environ if not name.startswith(FOREIGN_VARIABLES)]
    return {name: os.environ[name] for name in names if name not in FOREIGN_NAMES} | {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "huggingface"), "MPLBACKEND": "a notebook",
        "AWS_EC2_METADATA_DISABLED": "true", "COLUMNS": "100",
    }  # fmt: skip


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the program to a folder of its own, where no developer's .env lies beside it."""
    return Path(shutil.copy(ROOT / "unified_finetune.py", tmp_path_factory.mktemp("program")))


@pytest.fixture
def cli_environment(tmp_path_factory: pytest.TempPathFactory) -> "dict[str, str]":
    """Return the environment of `run_cli`, for tests that start processes themselves."""
    return clean_environment(tmp_path_factory.getbasetemp())


@pytest.fixture
def run_cli(
    program: Path, cli_environment: "dict[str, str]", tmp_path: Path
) -> "Callable[..., CliResult]":
    """Return a function that runs the real program: `run_cli("check", "--seed", 1, env={...})`.

    `env` adds variables, `cwd` is the test's own `tmp_path` by default, `input` is text for stdin
    (otherwise stdin is empty), `timeout` is in seconds.
    """

    def call(
        *args: object,
        env: "Mapping[str, str] | None" = None,
        cwd: "Path | None" = None,
        input: "str | None" = None,
        timeout: float = 600,
    ) -> CliResult:
        done = subprocess.run(
            [sys.executable, str(program), *map(str, args)], env={**cli_environment, **(env or {})},
            cwd=cwd or tmp_path, input=input or "", timeout=timeout,
            capture_output=True, text=True, encoding="utf-8",
        )  # fmt: skip
        return CliResult(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def assets() -> Path:
    """Return the folder of real models, tokenizers and data; without it the test is skipped."""
    folder = os.environ.get("UNIFIED_FINETUNE_ASSETS")
    if not folder:
        pytest.skip("UNIFIED_FINETUNE_ASSETS names no folder with real models and data")
    if not Path(folder).is_dir():
        pytest.fail(f"UNIFIED_FINETUNE_ASSETS={folder} is not a folder")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """Return the sample data set that comes with the program."""
    return ROOT / "tests" / "data" / "college_advisor_sample.json"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny Llama of random weights and a tokenizer like TinyLlama's."""
    from make_demo_model import build_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_model(folder)
    return folder


@dataclass(frozen=True)
class S3Server:
    """Name a running S3 server and the one user it knows."""

    endpoint: str
    access_key: str
    secret_key: str

    def client(self, **changes: Any) -> Any:
        """Return a boto3 client for it; `changes` overrides arguments of `boto3.client`."""
        import boto3
        from botocore.config import Config

        checksums = ("request_checksum_calculation", "response_checksum_validation")
        plain: dict[str, Any] = dict.fromkeys(checksums, "when_required")
        arguments = {
            "endpoint_url": self.endpoint, "region_name": "auto",
            "aws_access_key_id": self.access_key, "aws_secret_access_key": self.secret_key,
            "config": Config(s3={"addressing_style": "path"}, **plain),
        }  # fmt: skip
        return boto3.client("s3", **{**arguments, **changes})

    def environment(self) -> "dict[str, str]":
        """Return the R2 variables that make the program use this server."""
        keys = {"R2_ACCESS_KEY_ID": self.access_key, "R2_SECRET_ACCESS_KEY": self.secret_key}
        return {"R2_ENDPOINT_URL": self.endpoint, **keys}


@dataclass(frozen=True)
class Bucket:
    """Name a bucket on the server, empty when the test starts."""

    name: str
    server: S3Server
    client: Any

    def put(self, key: str, body: bytes) -> str:
        """Store an object and return its ETag, without the quotes."""
        return self.client.put_object(Bucket=self.name, Key=key, Body=body)["ETag"].strip('"')

    def environment(self) -> "dict[str, str]":
        """Return the R2 variables that make the program use this bucket."""
        return {**self.server.environment(), "R2_BUCKET_NAME": self.name}


@contextlib.contextmanager
def folder_for_swift() -> Iterator[Path]:
    """Make a temporary folder on a file system that Swift can use, or skip the test."""
    if sys.platform != "linux":
        pytest.skip("Swift runs on Linux only")
    (ROOT / "cache").mkdir(exist_ok=True)
    for place in (tempfile.gettempdir(), "/var/tmp", str(ROOT / "cache")):
        with tempfile.TemporaryDirectory(prefix="swift-", dir=place) as name:
            try:
                os.setxattr(name, "user.swift", b"x" * 200)  # Swift keeps metadata there
            except OSError:
                continue
            yield Path(name)
            return
    pytest.skip("Swift needs a file system with extended attributes; no temporary folder has them")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Start OpenStack Swift, a real S3-compatible server, on free ports of the loopback interface.

    UNIFIED_FINETUNE_SWIFT_PYTHON names the Python that has the package `swift` (tests/run.sh sets
    it). The access key has the form account:user, for that is how Swift's tempauth names users.
    """
    python = os.environ.get("UNIFIED_FINETUNE_SWIFT_PYTHON")
    if not python:
        pytest.skip("UNIFIED_FINETUNE_SWIFT_PYTHON names no Python with Swift; see tests/run.sh")
    access, secret = "test:tester", "a-secret-of-the-tests-4f1c9b"
    with folder_for_swift() as folder:
        command = [python, "-W", "ignore", str(ROOT / "tests" / "s3_server.py")]
        command += [str(folder), access, secret]
        pipes: Any = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        with (folder / "stderr.txt").open("w") as stderr:
            process = subprocess.Popen(command, **pipes, stderr=stderr, text=True)
        assert process.stdin and process.stdout
        try:
            timer = threading.Timer(60, process.kill)
            timer.start()
            port = process.stdout.readline().strip()
            timer.cancel()
            if not port:
                pytest.fail("Swift did not start:\n" + (folder / "stderr.txt").read_text()[-2000:])
            yield S3Server(f"http://127.0.0.1:{port}", access, secret)
        finally:
            process.stdin.close()
            process.wait(timeout=30)


@pytest.fixture
def bucket(s3_server: S3Server) -> Bucket:
    """Return a new, empty bucket on the S3 server."""
    client = s3_server.client()
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    return Bucket(name, s3_server, client)
