"""Chat: the user reads what was trained, on a terminal, in a pipe and after every mistake."""

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_export import edit_json
from test_save import flip
from transformers import LlamaForCausalLM

import unified_finetune as tool
from unified_finetune import ChatOptions, FineTuningConfig, FineTuningError

SYSTEM = "Answer as a counselor."
LESSONS = (  # (system message, question, answer): what the adapter knows by heart
    (None, "Who pays?", "The state pays."),
    (None, "Who decides?", " You decide, after a visit 🎓."),  # a space first, bytes at the end
    (None, "Sing", " ".join(["la"] * 40)),
    (SYSTEM, "Who pays?", "The college pays."),
)
ENDLESS = (None, "Hum", " ".join(["mm"] * 30))  # taught without an end token: goes on and on
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def asked(question: str, system: "str | None" = None) -> "list[dict[str, str]]":
    """Return a conversation of one question."""
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": question}]


@pytest.fixture(scope="session")
def base(tiny_model, tmp_path_factory):
    """Return the tiny model with louder logits, and a generation_config.json that is no guide."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("chat") / "base"))
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.model.norm.weight.data *= 12  # random ones are too quiet to learn from
    model.save_pretrained(folder)
    odd = {"no_repeat_ngram_size": 1, "do_sample": True, "temperature": 9, "stop_strings": ["pay"]}
    (folder / "generation_config.json").write_text(json.dumps(odd))
    return folder


@pytest.fixture(scope="session")
def adapter(base):
    """Return the folder of an adapter that plain PEFT taught the lessons."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tiny models lose time to more
    plain = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    shape: Any = {"r": 16, "lora_alpha": 32, "target_modules": LAYERS, "task_type": "CAUSAL_LM"}
    model, tokenizer = get_peft_model(plain, LoraConfig(**shape)), tool.load_tokenizer(base)
    inputs, labels = [], []
    for system, question, answer in (*LESSONS, ENDLESS):
        text = tool.render_chat(tokenizer, asked(question, system), answer_next=True)
        end = "" if question == ENDLESS[1] else "</s>"
        ids, prompt = tool.tokenize(tokenizer, [text + answer + end, text])
        inputs.append(torch.tensor(ids))
        labels.append(torch.tensor([-100] * len(prompt) + ids[len(prompt) :]))
    pad = torch.nn.utils.rnn.pad_sequence
    batch, wanted = pad(inputs, True, 2), pad(labels, True, -100)[:, 1:]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=6e-3)
    for _ in range(150):
        logits = model(input_ids=batch).logits[:, :-1].transpose(1, 2)
        losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        worst = losses.max()
        optimizer.zero_grad()
        (losses.sum(1) / (wanted >= 0).sum(1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if worst < 0.3:
            break
    assert worst < 0.6, "the fixture's adapter has not learnt its lessons"
    model.save_pretrained(str(base.parent / "adapter"))
    return base.parent / "adapter"


@pytest.fixture
def copy(adapter, tmp_path):
    """Return a copy of the adapter's folder that a test may spoil."""
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


@pytest.fixture
def talk(monkeypatch, caplog):
    """Return a function that runs `chat` in this process and returns its stdout."""

    def run(folder: Path, lines: str = "", settings: Any = None, **flags: Any) -> str:
        out = io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        monkeypatch.setattr(sys, "stdout", out)
        more = {"device": "cpu", **(settings or {})}
        with caplog.at_level("INFO", "unified_finetune"):
            tool.chat(FineTuningConfig(output_dir=str(folder), **more), ChatOptions(**flags))
        return out.getvalue()

    return run


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


# --- Answers


def test_answers_are_the_lessons_to_the_letter_and_sampling_flags_reach_the_model(talk, adapter):
    """Greedy answers end by themselves; the base's generation_config.json has no say."""
    for system, question, answer in LESSONS:
        assert talk(adapter, prompt=question, settings={"system_prompt": system}) == answer + "\n"
    # top_k 1 is greedy at any temperature; a penalty breaks a repetition; a seed repeats.
    assert talk(adapter, prompt="Who pays?", temperature=50, top_k=1) == "The state pays.\n"
    assert talk(adapter, prompt="Who pays?", temperature=0.5, top_p=1e-6) == "The state pays.\n"
    penalized = talk(adapter, prompt="Sing", max_new_tokens=20, repetition_penalty=5.0)
    assert penalized.count("la") < 10
    first, second = (talk(adapter, prompt="Hi", temperature=2.0, max_new_tokens=9) for _ in "12")
    assert first == second != talk(adapter, prompt="Hi", max_new_tokens=9)
    both = talk(adapter, "Hi\n/reset\nHi\n", temperature=2.0, max_new_tokens=9).splitlines()
    assert both == [first[:-1]] * 2


def test_an_answer_without_an_end_fills_the_context_and_no_more(talk, adapter, base, caplog):
    prompt = tool.tokenize_prompt(tool.load_tokenizer(base), asked("Hum"))
    talk(adapter, prompt="Hum", max_new_tokens=10_000)
    talk(adapter, prompt="Hum", max_new_tokens=7)
    cuts = [r.getMessage() for r in caplog.records if "cut after" in r.getMessage()]
    assert cuts == [f"(cut after {512 - len(prompt)} tokens)", "(cut after 7 tokens)"]
    talk(adapter, "".join(f"{n} {'word ' * 25}\n" for n in range(6)), max_new_tokens=200)
    assert "context of 512 tokens is full: the oldest turn is forgotten" in caplog.text
    with pytest.raises(FineTuningError, match=r"too long: \d+ tokens, and the model sees 512"):
        talk(adapter, prompt="word " * 600)


def test_fp16_on_a_cpu_is_refused_in_words(talk, adapter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(FineTuningError, match="--fp16 needs an NVIDIA GPU, and this is cpu") as e:
        talk(adapter, prompt="Hi", settings={"fp16": True, "device": "auto"})
    assert "--bf16" in e.value.hint


# --- The system message


def test_the_trained_system_message_is_used(talk, copy, caplog):
    """training_config.json names it; flags and commands, in a pipe too, override it or not."""
    write(copy / "training_metrics.json", [{"loss": 1}])  # another program's do not matter
    write(copy / "training_config.json", {"system_prompt": SYSTEM})
    assert talk(copy, prompt="Who pays?") == "The college pays.\n"
    assert talk(copy, prompt="Who pays?", no_system_prompt=True) == "The state pays.\n"
    lines = "Who pays?\n/reset\n/system\nWho pays?\n/unknown\n\n/system Be brief\n/quit\nSing\n"
    assert talk(copy, lines) == "The college pays.\nThe state pays.\n"
    for told in (f"System message: {SYSTEM} (", "no /unknown.", "(system message: Be brief)"):
        assert told in caplog.text
    write(copy / "training_config.json", {"system_prompt": "Other"})
    own = {"system_prompt": SYSTEM}
    assert talk(copy, prompt="Who pays?", settings=own) == "The college pays.\n"


def test_a_checkpoint_serves_with_its_runs_system_message(talk, copy):
    """Its record names it, before the run is finished; a damaged checkpoint is refused."""
    good, other = copy.parent / "checkpoint-4", copy.parent / "checkpoint-5"
    (copy / "optimizer.pt").write_bytes(b"state")
    for folder, identity in ((good, {}), (other, {"base_digest": "0" * 64})):
        write(copy / "progress.json", {"identity": {"system_prompt": SYSTEM, **identity}})
        tool.publish_folder(Path(shutil.copytree(copy, copy.parent / "staged")), folder)
    with pytest.raises(FineTuningError, match="digest 000000000000…"):
        talk(other, prompt="Who pays?")
    assert talk(good, prompt="Who pays?") == "The college pays.\n"
    (good / "optimizer.pt").unlink()
    with pytest.raises(FineTuningError, match=r"optimizer\.pt is missing"):
        talk(good, prompt="Who pays?")


# --- The base that it was trained on


PARTS = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
         "tokenizer.model", "chat_template.jinja")  # fmt: skip


def test_an_exchanged_base_is_refused_by_both_names(talk, copy, base, tmp_path):
    """Other weights, tokenizer or template under the old path serve nothing; the original does."""
    digest = tool.open_base_model(str(base)).digest
    moved = {"model_name": shutil.copytree(base, str(tmp_path / "moved"))}
    record = {"base_digest": digest, "base_name": "the/original"}
    write(copy / "training_config.json", {"provenance": record})
    refused = [(tmp_path / "gone", "trained on cannot be used")]
    for number, part in enumerate(PARTS):
        other = Path(shutil.copytree(base, tmp_path / f"base {number}"))
        if part == "model.safetensors":
            flip(other / part, -1)
        else:
            with (other / part).open("a") as file:
                file.write("\n")
        said = f"{other} is not the model .*trained on .the/original, digest {digest[:12]}"
        refused.append((other, f"{said}.*tokenizer or its chat template are others"))
    for folder, message in refused:
        edit_config(copy, base_model_name_or_path=str(folder))
        with pytest.raises(FineTuningError, match=message) as error:
            talk(copy, prompt="Who pays?")
        assert "--model_name" in error.value.hint
    assert talk(copy, prompt="Who pays?", settings=moved) == "The state pays.\n"


# --- What can be wrong with an adapter


def edit_config(folder: Path, **changes: object) -> None:
    """Change values in adapter_config.json."""
    edit_json(folder / "adapter_config.json", **changes)


def edit_weights(folder: Path, change: Any) -> None:
    """Change tensors of the adapter, given them and the first one's name."""
    weights = load_file(folder / WEIGHTS)
    change(weights, min(weights))
    save_file(weights, folder / WEIGHTS)


def exchange(folder: Path) -> None:
    """Note the weights' hash as training does, then change them."""
    write(folder / "training_metrics.json", {"adapter_sha256": tool.sha256_of(folder / WEIGHTS)})
    flip(folder / WEIGHTS, -1)


WEIGHTS = "adapter_model.safetensors"
FAULTS: "dict[str, Any]" = {
    "There is no trained adapter in": shutil.rmtree,
    f"{WEIGHTS} alone is not enough": lambda f: (f / "adapter_config.json").unlink(),
    "adapter_config.json cannot be read": lambda f: (f / "adapter_config.json").write_text("{br"),
    "names no base model": lambda f: edit_config(f, base_model_name_or_path=None),
    "it is of type 'IA3', not LORA": lambda f: edit_config(f, peft_type="IA3"),
    "it uses use_dora True": lambda f: edit_config(f, use_dora=True),
    "it uses init_lora_weights pissa": lambda f: edit_config(f, init_lora_weights="pissa"),
    "it uses bias all": lambda f: edit_config(f, bias="all"),
    "it uses modules_to_save": lambda f: edit_config(f, modules_to_save=["lm_head"]),
    "does not fit the model": lambda f: edit_config(f, r=4),
    "tensors have no counterpart": lambda f: edit_config(f, target_modules=["q_proj"]),
    f"{WEIGHTS} is damaged": lambda f: os.truncate(f / WEIGHTS, 2000),
    f"{WEIGHTS} is missing": lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
    "holds NaN": lambda f: edit_weights(f, lambda w, first: w[first].fill_(float("nan"))),
    "have no counterpart (base": lambda f: edit_weights(f, lambda w, first: w.pop(first)),
    "counterpart (extra.weight)": lambda f: edit_weights(f, lambda w, _: w.update(EXTRA)),
    "is not the file that training saved": exchange,
}
EXTRA = {"extra.weight": torch.ones(1)}


@pytest.mark.parametrize("message", FAULTS)
def test_a_damaged_or_special_adapter_is_refused_by_what_is_wrong(talk, copy, message):
    FAULTS[message](copy)
    with pytest.raises(FineTuningError) as error:
        talk(copy, prompt="Hi")
    assert message in str(error.value)
    assert error.value.hint and error.value.exit_code == 16


# --- The command line


def test_prompt_prints_the_answer_and_nothing_else(run_cli, program, cli_environment, adapter):
    """A closed pipe (`| head`) is exit code 16, without a traceback."""
    result = run_cli("chat", "--output_dir", adapter, "--prompt", "Who pays?")
    assert (result.code, result.stdout) == (0, "The state pays.\n"), result.stderr
    assert not re.search("Warning|Loading weights", result.stderr)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(program), "chat", "--output_dir", str(adapter)]
    with open(writer, "wb") as closed:
        done = subprocess.run(
            command, stdout=closed, stderr=subprocess.PIPE, text=True, env=cli_environment,
            cwd=adapter.parent, input="Who pays?\nWho pays?\n",
        )  # fmt: skip
    assert done.returncode == 16 and "stdout cannot be written" in done.stderr
    assert not re.search("Traceback|fault of the program", done.stderr)


def test_compare_shows_the_base_model_beside_the_adapter(talk, adapter, base, tmp_path):
    """The base's answer is what the base alone says; a merged folder has nothing to compare."""
    out = talk(adapter, prompt="Who pays?", compare=True, max_new_tokens=12)
    alone = talk(base, prompt="Who pays?", max_new_tokens=12)
    assert out == f"base> {alone}tuned> The state pays.\n"
    assert "state pays" not in alone
    model: Any = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter))
    model.merge_and_unload().save_pretrained(tmp_path)
    tool.load_tokenizer(base).save_pretrained(tmp_path)
    assert talk(tmp_path, "Who pays?\n") == "The state pays.\n"
    with pytest.raises(FineTuningError, match="--compare needs an adapter"):
        talk(tmp_path, prompt="Hi", compare=True)


# --- A terminal


class Terminal:
    """Drive the program through a pseudo-terminal of its own, so that Ctrl-C sends the signal."""

    def __init__(self, command: "list[str]", environment: "dict[str, str]") -> None:
        self.handle, theirs = pty.openpty()
        self.screen = ""
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**environment, "TERM": "dumb"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)

    def type(self, text: str, until: str) -> str:
        """Press keys and read until `until` is on the screen; return what came up to its end."""
        os.write(self.handle, text.encode())
        while until not in self.screen:
            ready, _, _ = select.select([self.handle], [], [], 120)
            assert ready, f"{until!r} never came; the screen has {self.screen!r}"
            self.screen += os.read(self.handle, 65536).decode("utf-8", "replace")
        before, _, self.screen = self.screen.partition(until)
        return before + until


def test_a_chat_on_a_terminal(program, cli_environment, adapter, tmp_path):
    """Ctrl-C stops an answer, as often as it is pressed; errors later keep their own words."""
    flags = ["chat", "--output_dir", str(adapter), "--log_dir", str(tmp_path)]
    chat = Terminal([sys.executable, str(program), *flags], cli_environment)
    try:
        chat.type("", "you> ")
        assert "tuned> The state pays.\r\n" in chat.type("Who pays?\n", "you> ")
        for _ in range(2):
            assert "(forgotten)" in chat.type("/reset\n", "you> ")
            chat.type("Hum\n", "mm mm mm")
            stopped = chat.type("\x03", "you> ")
            assert "(stopped" in stopped and "(cut after" not in stopped
            time.sleep(0.4)  # a sooner one would count as the echo of the first
        chat.type("/reset\n", "you> ")
        assert "The message is too long" in chat.type("word " * 600 + "\n", "Shorten it")
        chat.type("", "you> ")
        answer = chat.type("Who decides?\n", "you> ")
        assert "tuned>  You decide, after a visit 🎓.\r\n" in answer
        os.write(chat.handle, b"\x04")
        assert chat.process.wait(timeout=60) == 0
        assert "Traceback" not in chat.screen
    finally:
        chat.process.kill()
        chat.process.wait()
        os.close(chat.handle)
