"""The ways of strangers: odd hubs, other families, odd surroundings. None ends in a traceback."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_export import UP, change_base, edit_json, load, logits, with_adapter

import unified_finetune as finetune

REVISION = "a" * 40
LOGIN_PAGE = b"<html><title>Sign in to the hotel's network</title></html>"
GATED = "Access to model meta/tiny is restricted. You must have access to it and be logged in."


class Hub(ThreadingHTTPServer):
    """A Hugging Face hub on loopback that serves one folder as meta/tiny, or misbehaves."""

    daemon_threads = True

    def __init__(self, folder: Path, manner: str) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder, self.manner = folder, manner
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(BaseHTTPRequestHandler):
    """Answer as the hub's API does, as far as a download asks."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def answer(self, code: int, body: bytes, **headers: str) -> None:
        """Send an answer; with HEAD, without its body; broken off in the manner "cut"."""
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            broken = self.server.manner == "cut" and self.path.endswith(".safetensors")
            self.wfile.write(body[: len(body) // 2] if broken else body)
            self.close_connection = broken

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        files = {p.name: p.read_bytes() for p in self.server.folder.iterdir()}
        name = self.path.rpartition("/")[2]
        if self.server.manner == "login page":
            self.answer(200, LOGIN_PAGE, Content_Type="text/html")
        elif self.server.manner == "gated":
            self.answer(401, b"{}", X_Error_Code="GatedRepo", X_Error_Message=GATED)
        elif self.server.manner == "hang up":
            self.close_connection = True
        elif "/resolve/" in self.path and name in files:
            start = int((re.findall(r"bytes=(\d+)", self.headers.get("Range", "")) or ["0"])[0])
            facts = {"ETag": f'"{name}-1"', "X_Repo_Commit": REVISION, "Accept_Ranges": "bytes"}
            if start:
                facts["Content_Range"] = f"bytes {start}-{len(files[name]) - 1}/{len(files[name])}"
            self.answer(206 if start else 200, files[name][start:], **facts)
        elif "/tree/" in self.path:
            tree = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in files.items()]
            self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        else:
            info = {"id": "meta/tiny", "modelId": "meta/tiny", "sha": REVISION}
            info["siblings"] = [{"rfilename": n} for n in files]
            self.answer(200, json.dumps(info).encode())

    do_HEAD = do_GET


@contextlib.contextmanager
def running_hub(folder: Path, manner: str = "well") -> Iterator[Hub]:
    with Hub(folder, manner) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


def fill_cache(home: Path, base: Path) -> Path:
    """Put a base model where another program's downloads lie; return its snapshot."""
    cache = home / "hub" / "models--meta--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(REVISION)
    return Path(shutil.copytree(base, cache / "snapshots" / REVISION))


@pytest.fixture
def rows(tmp_path: Path, sample_data: Path) -> Path:
    """Return a file with 40 rows."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(json.loads(sample_data.read_text())[:40]))
    return path


def flags(folder: Path, rows: Path) -> "list[str]":
    """Return the flags of a short run in a folder."""
    places = [f"--{name}={folder / name}" for name in ("output_dir", "cache_dir", "log_dir")]
    quick = "--num_train_epochs=1 --warmup_steps=0 --lora_r=4 --max_seq_length=256 --yes"
    quick += " --device=cpu --min_disk_gb=0.001 --model_name=meta/tiny"
    return [*places, *quick.split(), f"--data_path={rows}"]


# --- the hub


def test_a_cached_base_needs_no_hub_in_odd_surroundings(run_cli, tmp_path, tiny_model, rows):
    """What another launcher, a cluster and a careless hand left in the shell changes nothing."""
    fill_cache(tmp_path / "hf", tiny_model)
    home = tmp_path / "home"
    home.mkdir()
    settings = {"output_dir": "~/out", "cache_dir": "~/cache", "log_dir": "~/logs"}
    (tmp_path / "c.json").write_text(json.dumps(settings))
    left = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "", "OMPI_COMM_WORLD_RANK": "3"}
    left |= {"ACCELERATE_MIXED_PRECISION": "bf16", "HTTPS_PROXY": "socks5://127.0.0.1:9"}
    with running_hub(tiny_model, "hang up") as hub:
        found = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        env = {**found, **left, "HOME": str(home)}
        done = run_cli("--config", "c.json", *flags(tmp_path, rows)[3:], env=env)
        assert (done.code, hub.requests) == (0, []), done.stderr
    assert done.stdout.strip() == str(home / "out")
    metrics = json.loads((home / "out" / "training_metrics.json").read_text())
    assert (metrics["dtype"], metrics["device"]) == ("float32", "cpu")
    assert "left over from another launcher" in done.stderr and "WORLD_SIZE" in done.stderr
    assert {p.name for p in home.iterdir()} >= {"out", "logs"} and not (tmp_path / "~").exists()


OPEN = """
import unified_finetune as finetune
try:
    finetune.open_base_model("meta/tiny")
except finetune.FineTuningError as error:
    print(error, "->", error.hint)
"""


@pytest.mark.parametrize(
    ("manner", "variables", "words"),
    [
        ("hang up", {}, "start again: the fetch goes on"),
        ("login page", {}, "the hub does not give it"),
        ("gated", {}, GATED),
        ("well", {"HF_TOKEN": "“hf_abc”"}, "HF_TOKEN"),
        ("well", {"HF_ENDPOINT": "127.0.0.1:9"}, "HF_ENDPOINT"),
        ("well", {"HTTP_PROXY": "socks5://127.0.0.1:9", "ALL_PROXY": "socks5://x"}, "PROXY"),
        ("well", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE=0"),
    ],
)
def test_a_first_fetch_that_fails_is_told_with_the_hub_s_reason(
    cli_environment, tmp_path, tiny_model, manner, variables, words
) -> None:
    with running_hub(tiny_model, manner) as hub:
        found = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        env = {**cli_environment, **found, **variables, "PYTHONPATH": str(ROOT)}
        call = [sys.executable, "-c", OPEN]
        done = subprocess.run(call, env=env, capture_output=True, text=True)
    assert (done.returncode, "hf_abc" in done.stderr) == (0, False), done.stderr
    assert words in done.stdout and "The base model meta/tiny is neither" in done.stdout


def test_a_fetch_that_was_cut_goes_on_at_the_next_start(run_cli, tmp_path, tiny_model, rows):
    with running_hub(tiny_model) as hub:
        found = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        for hub.manner, code, said in (
            ("cut", 11, "the fetch goes on"),
            ("well", 0, "fetching meta"),
        ):
            done = run_cli("check", *flags(tmp_path, rows), env=found)
            assert done.code == code and said in done.stderr, done.stderr


@pytest.mark.parametrize("left", ["no refs", "half a newer one", "no template"])
def test_a_whole_older_copy_serves_where_no_hub_does(tmp_path, tiny_model, monkeypatch, left):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = fill_cache(tmp_path, tiny_model)
    if left == "no refs":
        shutil.rmtree(tmp_path / "hub" / "models--meta--tiny" / "refs")
    elif left == "half a newer one":
        (snapshot.parent.parent / "refs" / "main").write_text("b" * 40)
        (snapshot.with_name("b" * 40)).mkdir()
    else:
        (snapshot / "tokenizer_config.json").unlink()
    assert finetune.find_base_folder("meta/tiny") == snapshot


# --- families


def build_family(name: str, folder: Path, tiny_model: Path) -> None:
    """Write a tiny model of a family, with the tiny Llama's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    own = {"mistral": {"sliding_window": 300}}
    own["qwen3"] = {"head_dim": 32, "tie_word_embeddings": True}
    config = AutoConfig.for_model(
        name, vocab_size=600, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, **own.get(name, {}),
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in [*tiny_model.glob("tok*"), tiny_model / "special_tokens_map.json"]:
        shutil.copy(path, folder)


@pytest.mark.parametrize("family", finetune.FAMILIES)
def test_every_family_that_is_named_trains_and_is_merged(family, tmp_path, tiny_model, rows):
    """transformers loads what was merged, and its logits are those of base and adapter."""
    build_family(family, tmp_path / "base", tiny_model)
    targets = "qkv_proj,o_proj,gate_up_proj" if family == "phi3" else "q_proj,v_proj,down_proj"
    given = [*flags(tmp_path, rows), f"--model_name={tmp_path / 'base'}", "--learning_rate=0.005"]
    config = finetune.parse_command_line([*given, f"--target_modules={targets}"])[1]
    metrics = finetune.run(config).metrics
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    finetune.export(config, finetune.ExportOptions(format="merged", outtype="f32"))
    merged = logits(load(tmp_path / "output_dir" / "merged"))
    tuned = with_adapter(tmp_path / "output_dir")
    difference = (merged - logits(tuned)).norm()
    with tuned.disable_adapter():
        assert (merged - logits(tuned)).norm() > 1000 * difference
    assert difference < 1e-5 * merged.norm()


# --- surroundings


def test_a_current_folder_that_was_deleted_is_said(cli_environment, program, tmp_path) -> None:
    gone = tmp_path / "gone"
    script = f'mkdir "{gone}" && cd "{gone}" && rmdir "{gone}" && exec "$@"'
    call = ["sh", "-c", script, "sh", sys.executable, str(program), "check"]
    done = subprocess.run(call, env=cli_environment, capture_output=True, text=True)
    assert done.returncode == 2 and "current folder was deleted" in done.stderr


ODD_ARGUMENTS = [
    (["check", "--sample_prompts", b"Qu\xe9?"], "encoding (UTF-8)"),
    (["self-test", "cpu", "float32"], "no command 'self-test'"),
    (["check", "--output_dir", "~nobody-here/x"], "home folder that is not there"),
    (["check", "--config", "~nobody-here/x"], "--config ~nobody-here/x cannot be read"),
    (["check", "--output_dir", "x" * 256], "a name of more than 255 bytes"),
]


@pytest.mark.parametrize(("arguments", "words"), ODD_ARGUMENTS)
def test_odd_arguments_are_refused_before_anything_starts(run_cli, arguments, words) -> None:
    done = run_cli(*(os.fsdecode(a) for a in arguments))
    assert done.code == 2 and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "odd",
    ["HF_ENDPOINT=http://127.0.0.1:port", "HF_HUB_ETAG_TIMEOUT=", "TORCH_LOGS=bogus",
     "HF_DATASETS_IN_MEMORY_MAX_SIZE=a"],
)  # fmt: skip
def test_variables_that_a_library_refuses_are_told_as_that(run_cli, odd) -> None:
    done = run_cli("check", env=dict([odd.split("=")]))
    assert done.code == 11 and "cannot be imported" in done.stderr and "HF_" in done.stderr


ODD_BASES = [
    ("cannot be loaded", lambda b: edit_json(b / "config.json", num_attention_heads=0)),
    ("cannot be loaded", lambda b: edit_json(b / "config.json", pad_token_id=99999)),
    (f"{UP} are whole numbers", lambda b: change_base(b, UP, torch.ones(176, 64).to(torch.int8))),
]


@pytest.mark.parametrize(("words", "spoil"), ODD_BASES)
def test_a_base_with_impossible_numbers_is_refused_in_words(tiny_model, tmp_path, words, spoil):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    spoil(base)
    with pytest.raises(finetune.FineTuningError, match=words):
        finetune.open_base_model(str(base))


@pytest.mark.parametrize("code", ["{% for i in range(10**9) %}{% endfor %}", "{{ 1 / 0 }}"])
def test_a_template_that_fails_in_any_way_refuses_the_messages(tiny_model, code):
    tokenizer = finetune.load_tokenizer(Path(tiny_model))
    tokenizer.chat_template = code
    with pytest.raises(finetune.FineTuningError, match="template refuses"):
        finetune.render_chat(tokenizer, [{"role": "user", "content": "Hi"}], answer_next=True)
