"""Chat: the user reads what was trained, on a terminal, in a pipe and after every mistake."""

import dataclasses
import fcntl
import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CliResult

import unified_finetune as program
from unified_finetune import ChatOptions, FineTuningConfig, FineTuningError, Sampling, ServedModel

LONG = " ".join(["la"] * 40)
SYSTEM = "Answer as a counselor."
LESSONS = (  # (system message, question, answer): what the adapter knows by heart
    (None, "Who pays?", "The state pays."),
    (None, "Who decides?", "You decide, after a visit."),
    (None, "Sing", LONG),
    (SYSTEM, "Who pays?", "The college pays."),
)
ENDLESS = (None, "Hum", " ".join(["mm"] * 30))  # taught without an end token: goes on and on


def asked(question: str, system: "str | None" = None) -> "list[dict[str, str]]":
    """Return a conversation of one question."""
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": question}]


@pytest.fixture(scope="session")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model with louder logits: random ones are too quiet to learn from."""
    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("chat") / "base"
    shutil.copytree(tiny_model, folder)
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.model.norm.weight.data *= 12
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(base: Path) -> Path:
    """Return the folder of an adapter that plain PEFT taught the lessons."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)  # tiny models lose time to more
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=16, lora_alpha=32, target_modules=layers, task_type="CAUSAL_LM"),
    )
    tokenizer = program.load_tokenizer(str(base))
    examples = []
    for system, question, answer in (*LESSONS, ENDLESS):
        text = program.render_chat(tokenizer, asked(question, system), add_generation_prompt=True)
        end = "" if question == ENDLESS[1] else "</s>"
        ids = program.tokenize_rendered(tokenizer, text + answer + end)
        examples.append((ids, len(program.tokenize_rendered(tokenizer, text))))
    width = max(len(ids) for ids, _ in examples)
    inputs = torch.tensor([ids + [2] * (width - len(ids)) for ids, _ in examples])
    labels = torch.tensor(
        [[-100] * n + ids[n:] + [-100] * (width - len(ids)) for ids, n in examples]
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=6e-3)
    for _ in range(150):
        logits = model(input_ids=inputs).logits[:, :-1].transpose(1, 2)
        losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:], reduction="none")
        worst = losses.max()
        optimizer.zero_grad()
        (losses.sum(1) / (labels >= 0).sum(1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if worst < 0.3:
            break
    assert worst < 0.6, "the fixture's adapter has not learnt its lessons"
    folder = base.parent / "adapter"
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    """Return a copy of the adapter's folder that a test may spoil."""
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def serve(folder: Path, **settings: object) -> ServedModel:
    """Load what a folder holds, as `chat` does."""
    values = {"device": "cpu", **settings, "output_dir": str(folder)}
    return program.load_served_model(FineTuningConfig(**values))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def served(adapter: Path) -> ServedModel:
    """Return the adapter on its base, ready to answer."""
    return serve(adapter)


def answer(served: ServedModel, question: str, **settings: object) -> program.Answer:
    """Answer one question."""
    arguments = {"max_new_tokens": 200, **settings}
    return program.generate_answer(
        served.model,
        served.tokenizer,
        asked(question),
        **arguments,  # type: ignore[arg-type]
    )


# --- Answers


@pytest.mark.parametrize(("question", "expected"), [(q, a) for s, q, a in LESSONS if s is None])
def test_the_answer_is_the_lesson_and_ends_by_itself(
    served: ServedModel, question: str, expected: str
) -> None:
    """Greedy answers are what was trained, to the letter, and stop at the end token."""
    result = answer(served, question)
    assert result.text == expected
    assert result.stopped
    assert served.tokenizer.eos_token_id not in result.token_ids


def test_prompt_tokens_are_those_of_training(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `generate` reads are the first tokens of the trained example, every one attended to."""
    seen: dict[str, Any] = {}
    generate: Any = served.model.generate

    def spy(**arguments: object) -> object:
        seen.update(arguments)
        return generate(**arguments)

    monkeypatch.setattr(served.model, "generate", spy)
    result = answer(served, "Who pays?")
    text = program.render_chat(served.tokenizer, asked("Who pays?"), add_generation_prompt=True)
    example = program.tokenize_rendered(served.tokenizer, text + "The state pays.</s>")
    prompt = seen["input_ids"][0].tolist()
    assert prompt == example[: len(prompt)]
    assert example == [*prompt, *result.token_ids, served.tokenizer.eos_token_id]
    assert prompt.count(served.tokenizer.bos_token_id) == 1
    assert seen["attention_mask"].tolist() == [[1] * len(prompt)]


def test_max_new_tokens_cuts_the_answer(served: ServedModel) -> None:
    """A cut answer has exactly so many tokens and says that it did not end by itself."""
    whole = answer(served, "Sing")
    cut = answer(served, "Sing", max_new_tokens=7)
    assert cut.token_ids == whole.token_ids[:7]
    assert not cut.stopped


def test_an_answer_without_an_end_fills_the_context_and_no_more(served: ServedModel) -> None:
    """Prompt and answer together never outgrow what the model sees."""
    result = answer(served, ENDLESS[1], max_new_tokens=10_000)
    prompt = program.tokenize_prompt(served.tokenizer, asked(ENDLESS[1]))
    assert len(prompt) + len(result.token_ids) == served.context == 512
    assert not result.stopped


def test_streamed_pieces_add_up_to_the_answer(served: ServedModel) -> None:
    """Text is handed on while it comes, and nothing is lost or said twice."""
    pieces: list[str] = []
    result = answer(served, "Sing", on_text=pieces.append)
    assert "".join(pieces) == result.text
    assert len(pieces) > 30


def test_a_character_of_several_byte_tokens_is_streamed_whole(served: ServedModel) -> None:
    """No half of a character is shown; bytes that are none at all become U+FFFD."""
    import torch

    pieces: list[str] = []
    stream = program.AnswerStream(served.tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 5]]))
    for byte in "é→🎓".encode() + b"\xff":
        stream.put(torch.tensor([served.tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>")]))
    stream.end()
    assert pieces == ["é", "→", "🎓", "\ufffd"]
    assert stream.text == "é→🎓\ufffd"


def test_leading_space_and_special_tokens_of_an_answer(served: ServedModel) -> None:
    """A leading space is kept, the next turn needs it; special tokens are no text."""
    tokenizer = served.tokenizer
    space, letter = (tokenizer.get_vocab()[piece] for piece in ("▁", "A"))
    assert program.decode_answer(tokenizer, [space, letter, 1, letter]) == " AA"
    assert program.decode_answer(tokenizer, [letter]) == "A"
    assert program.decode_answer(tokenizer, []) == ""


def test_sampling_is_seeded_and_differs_from_greedy(served: ServedModel) -> None:
    """One seed, one answer; another seed, another one."""
    import torch

    def draw(seed: int) -> "tuple[int, ...]":
        torch.manual_seed(seed)
        return answer(
            served, "Hello", max_new_tokens=20, sampling=Sampling(temperature=2)
        ).token_ids

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_top_k_one_is_greedy_at_any_temperature(served: ServedModel) -> None:
    """The sampling settings reach the model, whatever its own generation_config says."""
    served.model.generation_config.top_k = 7
    served.model.generation_config.temperature = 3.0
    greedy = answer(served, "Who decides?")
    drawn = answer(served, "Who decides?", sampling=Sampling(temperature=50, top_k=1))
    narrow = answer(served, "Who decides?", sampling=Sampling(temperature=0.5, top_p=1e-6))
    assert greedy.text == drawn.text == narrow.text == "You decide, after a visit."


def test_repetition_penalty_breaks_a_repetition(served: ServedModel) -> None:
    """The penalty reaches the model."""
    plain = answer(served, "Sing", max_new_tokens=20)
    penalized = answer(served, "Sing", max_new_tokens=20, sampling=Sampling(repetition_penalty=5))
    assert len(set(plain.token_ids)) < len(set(penalized.token_ids))


def test_a_prompt_that_fills_the_context_is_refused(served: ServedModel) -> None:
    """The message says how long the prompt is and how long it may be."""
    with pytest.raises(FineTuningError, match=r"too long: \d+ tokens, and the model sees 512"):
        answer(served, "word " * 600)


def test_a_training_model_is_left_in_training_mode(served: ServedModel) -> None:
    """Samples during training use no dropout and change nothing."""
    served.model.train()
    try:
        assert answer(served, "Who pays?").text == "The state pays."
        assert served.model.training
    finally:
        served.model.eval()


# --- The system message


def test_the_trained_system_message_is_used(copy: Path) -> None:
    """training_config.json names it; a flag overrides it."""
    (copy / "training_config.json").write_text(json.dumps({"system_prompt": SYSTEM}))
    assert serve(copy).system_prompt == SYSTEM
    assert serve(copy, system_prompt="Other").system_prompt == "Other"
    (copy / "training_config.json").write_text("{}")
    assert serve(copy).system_prompt is None


# --- Turns and the context


def test_oldest_turns_are_forgotten_when_the_context_is_full(
    served: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole turns go, the system message stays, and the user is told."""
    conversation = program.ChatState(SYSTEM)
    for number in range(4):
        conversation.turns += [
            {"role": "user", "content": f"{number} " + "word " * 20},
            {"role": "assistant", "content": "yes"},
        ]
    conversation.turns.append({"role": "user", "content": "last"})
    with caplog.at_level("INFO", "unified_finetune"):
        program.drop_old_turns(conversation, served, max_new_tokens=200)
    length = len(program.tokenize_prompt(served.tokenizer, conversation.messages()))
    assert length + 200 <= 512
    assert conversation.messages()[0] == {"role": "system", "content": SYSTEM}
    assert conversation.turns[0]["role"] == "user"
    assert conversation.turns[-1]["content"] == "last"
    assert len(conversation.turns) in (3, 5, 7)
    assert "forgotten" in caplog.text


# --- The command line


def test_prompt_prints_the_answer_and_nothing_else(
    run_cli: "Callable[..., CliResult]", adapter: Path
) -> None:
    """Stdout is the answer; the library's bars and warnings stay off the console."""
    result = run_cli("chat", "--output_dir", adapter, "--prompt", "Who pays?")
    assert result.code == 0, result.stderr
    assert result.stdout == "The state pays.\n"
    assert "Warning" not in result.stderr
    assert "Loading weights" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " "], "--prompt must not be empty"),
        (["--temperature", "warm"], "--temperature must be a number, not 'warm'"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--temperature", "0.001"], "--temperature must be 0 or at least 0.01"),
        (["--top_k", "5"], "change nothing at temperature 0"),
        (["--temperature", "1", "--top_p", "0"], "--top_p must be more than 0"),
        (["--max_new_tokens", "0"], "--max_new_tokens must be at least 1"),
        (["--max_new_token", "9"], "did you mean --max_new_tokens?"),
    ],
)
def test_wrong_flags_are_refused_with_their_name(arguments: "list[str]", message: str) -> None:
    """Flags of chat are checked like settings."""
    with pytest.raises(program.UsageError) as error:
        program.parse_command_line(["chat", *arguments])
    assert message in str(error.value)
    assert error.value.exit_code == 2


def test_all_wrong_flags_are_told_at_once() -> None:
    """Problems of settings and of the command's own flags stand in one message."""
    with pytest.raises(program.UsageError) as error:
        program.parse_command_line(["chat", "--seed", "x", "--top-p", "2", "--temperature", "y"])
    assert "3 problems" in str(error.value)


def test_prompt_takes_any_text_literally() -> None:
    """A question may be the word that means "no value" for settings."""
    _, _, options = program.parse_command_line(["chat", "--prompt", "none", "--compare"])
    assert options == ChatOptions(prompt="none", compare=True)


def test_other_commands_have_no_chat_flags() -> None:
    """A flag that would change nothing is refused."""
    with pytest.raises(program.UsageError, match="unknown argument '--prompt'"):
        program.parse_command_line(["train", "--prompt", "Hello"])


def run_chat(
    monkeypatch: pytest.MonkeyPatch, folder: Path, lines: str = "", **flags: object
) -> str:
    """Run `chat` in this process and return its stdout."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr(sys, "stdout", out)
    config = FineTuningConfig(output_dir=str(folder), device="cpu")
    program.chat(config, ChatOptions(**flags))  # type: ignore[arg-type]
    return out.getvalue()


def test_piped_lines_are_turns_of_one_conversation(
    monkeypatch: pytest.MonkeyPatch, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Commands work in a pipe, and the end of input ends the chat."""
    (copy / "training_config.json").write_text(json.dumps({"system_prompt": SYSTEM}))
    lines = "Who pays?\n/reset\n/system\nWho pays?\n/unknown\n\n/system Be brief\n"
    with caplog.at_level("INFO", "unified_finetune"):
        out = run_chat(monkeypatch, copy, lines)
    assert out == "The college pays.\nThe state pays.\n"
    assert f"System message: {SYSTEM}" in caplog.text
    assert "There is no command /unknown." in caplog.text
    assert "(system message: Be brief)" in caplog.text


def test_compare_shows_the_base_model_beside_the_adapter(
    monkeypatch: pytest.MonkeyPatch, adapter: Path, base: Path
) -> None:
    """The base's answer is what the base alone says; the adapter is back for its own."""
    out = run_chat(monkeypatch, adapter, prompt="Who pays?", compare=True, max_new_tokens=12)
    alone = answer(serve(base), "Who pays?", max_new_tokens=12).text
    assert out == f"base> {alone}\ntuned> The state pays.\n"
    assert "state pays" not in alone


def test_no_system_prompt_leaves_it_out(monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    """The flag answers without the system message that was trained with."""
    (copy / "training_config.json").write_text(json.dumps({"system_prompt": SYSTEM}))
    assert run_chat(monkeypatch, copy, prompt="Who pays?") == "The college pays.\n"
    assert (
        run_chat(monkeypatch, copy, prompt="Who pays?", no_system_prompt=True)
        == "The state pays.\n"
    )


def test_a_merged_folder_answers_the_same(
    monkeypatch: pytest.MonkeyPatch, served: ServedModel, adapter: Path, tmp_path: Path
) -> None:
    """A folder with config.json and no adapter is a model; there is nothing to compare it with."""
    from peft import PeftModel

    merged = serve(adapter).model
    assert isinstance(merged, PeftModel)
    merged.merge_and_unload().save_pretrained(tmp_path)
    served.tokenizer.save_pretrained(tmp_path)
    assert run_chat(monkeypatch, tmp_path, "Who decides?\n") == "You decide, after a visit.\n"
    with pytest.raises(FineTuningError, match="--compare needs an adapter"):
        run_chat(monkeypatch, tmp_path, prompt="Hi", compare=True)


# --- What can be wrong with an adapter


def spoil_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil_no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def spoil_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{broken")


def spoil_base_name(folder: Path) -> None:
    edit_config(folder, base_model_name_or_path=None)


def spoil_base(folder: Path) -> None:
    edit_config(folder, base_model_name_or_path=str(folder / "nowhere"))


def spoil_kind(folder: Path) -> None:
    edit_config(folder, peft_type="IA3")


def spoil_rank(folder: Path) -> None:
    edit_config(folder, r=4)


def spoil_targets(folder: Path) -> None:
    edit_config(folder, target_modules=["q_proj"])


def spoil_weights_cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_weights_pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def spoil_weights_nan(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    weights[min(weights)][0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors")


def spoil_weights_bit(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    sha256 = program.sha256_of(path)
    (folder / "training_metrics.json").write_text(json.dumps({"adapter_sha256": sha256}))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_config(folder: Path, **changes: object) -> None:
    """Change values in adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_nothing_there, "There is no trained adapter in"),
        (spoil_no_config, "holds adapter_model.safetensors but no adapter_config.json"),
        (spoil_config, "adapter_config.json cannot be read"),
        (spoil_base_name, "names no base model"),
        (spoil_base, "The adapter's base model is not there"),
        (spoil_kind, "is of type 'IA3', not LORA"),
        (spoil_rank, "does not fit the model"),
        (spoil_targets, "does not fit the model"),
        (spoil_weights_cut, "adapter_model.safetensors is damaged"),
        (spoil_weights_pickled, "adapter_model.safetensors is missing"),
        (spoil_weights_nan, "NaN or infinite"),
        (spoil_weights_bit, "is not the file that training saved"),
    ],
)
def test_a_damaged_adapter_is_refused_by_what_is_wrong(
    copy: Path, spoil: "Callable[[Path], None]", message: str
) -> None:
    """Each fault has its own message, and every message a hint."""
    spoil(copy)
    with pytest.raises(FineTuningError) as error:
        serve(copy)
    assert message in str(error.value)
    assert error.value.hint


def test_an_adapter_of_another_base_is_refused(copy: Path, base: Path, tmp_path: Path) -> None:
    """Tensors that do not fit are told by their names and sizes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    other = Path(shutil.copytree(base, tmp_path / "other"))
    settings = {**json.loads((base / "config.json").read_text()), "hidden_size": 32}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**settings, "head_dim": 8})).save_pretrained(other)
    edit_config(copy, base_model_name_or_path=str(other))
    with pytest.raises(FineTuningError, match=r"does not fit the model .*other.*size mismatch"):
        serve(copy)


def test_a_missing_adapter_ends_with_exit_code_16(run_cli: "Callable[..., CliResult]") -> None:
    """The console has the message and the remedy, and no traceback."""
    result = run_cli("chat", "--output_dir", "nowhere", "--prompt", "Hi")
    assert result.code == 16
    assert result.stdout == ""
    assert "There is no trained adapter in nowhere" in result.stderr
    assert "-> Train one" in result.stderr
    assert "Traceback" not in result.stderr


# --- A terminal


@dataclasses.dataclass
class Terminal:
    """Drive a program through a pseudo-terminal."""

    process: "subprocess.Popen[bytes]"
    handle: int
    screen: str = ""

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self.handle, text.encode())

    def press_until(self, key: str, text: str) -> None:
        """Press a key until `text` appears: Python misses a signal just before readline waits."""
        for _ in range(30):
            self.type(key)
            ready, _, _ = select.select([self.handle], [], [], 2)
            if ready:
                break
        self.wait_for(text)

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """Read until `text` is on the screen; return what came up to its end."""
        deadline = time.monotonic() + seconds
        while text not in self.screen:
            ready, _, _ = select.select([self.handle], [], [], deadline - time.monotonic())
            assert ready, f"{text!r} never came; the screen has {self.screen!r}"
            try:
                piece = os.read(self.handle, 65536)
            except OSError:  # the program has ended
                piece = b""
            assert piece, f"the program ended before {text!r}; the screen has {self.screen!r}"
            self.screen += piece.decode("utf-8", "replace")
        before, _, self.screen = self.screen.partition(text)
        return before + text


@pytest.fixture
def terminal(
    program_path: Path, cli_environment: "dict[str, str]", tmp_path: Path
) -> "Iterator[Callable[..., Terminal]]":
    """Return a function that starts the program on a terminal of its own."""
    started = []

    def start(*arguments: object) -> Terminal:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, str(program_path), *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=tmp_path,
            env={**cli_environment, "TERM": "dumb"},
            start_new_session=True,
            # The terminal must be the program's own, so that its Ctrl-C key sends the signal.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        started.append(Terminal(process, ours))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()
        os.close(each.handle)


@pytest.fixture
def program_path(request: pytest.FixtureRequest) -> Path:
    """Return the copy of the program that `run_cli` runs."""
    return Path(request.getfixturevalue("program"))


def test_a_chat_on_a_terminal(terminal: "Callable[..., Terminal]", adapter: Path) -> None:
    """Two turns, an answer that Ctrl-C stops, /reset, Ctrl-C at the prompt, the end of input."""
    chat = terminal("chat", "--output_dir", adapter)
    chat.wait_for("you> ")
    chat.type("Who pays?\n")
    assert "tuned> The state pays.\r\n" in chat.wait_for("you> ")
    chat.type("/reset\n")
    assert "(forgotten)" in chat.wait_for("you> ")
    chat.type("Hum\n")
    chat.wait_for("mm mm mm")
    chat.type("\x03")
    stopped = chat.wait_for("you> ")
    assert "(stopped)" in stopped
    assert "(cut after" not in stopped
    chat.type("/reset\n")
    chat.wait_for("you> ")
    chat.type("Who decides?\n")
    assert "tuned> You decide, after a visit.\r\n" in chat.wait_for("you> ")
    chat.type("half a quest")
    chat.wait_for("half a quest")
    chat.press_until("\x03", "Ctrl-D ends the chat")
    chat.wait_for("you> ")
    chat.type("\x04")
    assert chat.process.wait(timeout=60) == 0
    assert "Traceback" not in chat.screen


@pytest.mark.parametrize("flags", [{"prompt": "Sing"}, {}])
def test_ctrl_c_without_a_terminal_ends_the_program(
    monkeypatch: pytest.MonkeyPatch, adapter: Path, flags: "dict[str, str]"
) -> None:
    """With --prompt or in a pipe there is no conversation to go back to."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "generate_answer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_chat(monkeypatch, adapter, "Sing\n", **flags)
