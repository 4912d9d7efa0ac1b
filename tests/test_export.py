"""Export: the merged folder and the GGUF are, token for token, what was trained."""

import errno
import functools
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import unified_finetune as program
from unified_finetune import ExportOptions, FineTuningConfig, FineTuningError

SYSTEM = 'You are a counselor.\nSay "net price", not {{ price }}.'
ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def save_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """Write a strong adapter with seeded random weights, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    torch.set_num_threads(1)  # tiny models lose time to more
    values: Any = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", "target_modules": ATTENTION}
    config = LoraConfig(**values | settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data = torch.randn(weight.shape) * 0.2
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def adapter(tiny_model, tmp_path_factory):
    """Return a strong adapter of the tiny Llama, which has two query heads per key head."""
    folder = save_adapter(tiny_model, tmp_path_factory.mktemp("export") / "counselor")
    (folder / "training_config.json").write_text(json.dumps({"system_prompt": SYSTEM}))
    return folder


@pytest.fixture
def base(tiny_model, tmp_path):
    """Return a copy of the tiny Llama that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


@pytest.fixture
def moved(adapter, base, tmp_path):
    """Return a copy of the adapter that names the changeable base."""
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    edit_json(copy / "adapter_config.json", base_model_name_or_path=str(base))
    return copy


def export(adapter: Path, target: Path, format: str, outtype: str = "f32", **more: Any) -> Path:
    """Export into `target` in this process; return what was written."""
    options = {name: more.pop(name) for name in ("install", "quantize") if name in more}
    config = FineTuningConfig(output_dir=str(adapter), device="cpu", **more)
    options |= {"format": format, "outtype": outtype, "export_dir": str(target)}
    program.export(config, ExportOptions(**options))
    return target if format == "merged" else target / f"{adapter.name}-{outtype}.gguf"


@pytest.fixture(scope="session")
def exported(adapter, tmp_path_factory):
    """Return a function that exports the adapter as GGUF, once per number type."""
    folder = tmp_path_factory.mktemp("exported")
    return functools.cache(lambda outtype: export(adapter, folder / outtype, "gguf", outtype))


def read(path: Path) -> "dict[str, Any]":
    return json.loads(path.read_text())


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**read(path), **changes}))


def change_base(base: Path, name: str, value: Any) -> None:
    """Replace a tensor of a base model, fill it with a number, or (None) remove it."""
    weights = load_file(base / "model.safetensors")
    old = weights.pop(name)
    if value is not None:
        weights[name] = value if torch.is_tensor(value) else torch.full_like(old, value)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def use_template(base: Path, template: Any) -> None:
    """Give a base another chat template, unless it is None."""
    if template is None:
        return
    edit_json(base / "tokenizer_config.json", chat_template=template)
    (base / "chat_template.jinja").unlink(missing_ok=True)


def with_adapter(adapter: Path) -> Any:
    """Return base and adapter as PEFT has them, in fp32."""
    from peft import PeftModel

    base = read(adapter / "adapter_config.json")["base_model_name_or_path"]
    return PeftModel.from_pretrained(load(base), str(adapter)).eval()


def load(folder: Any, **more: Any) -> Any:
    """Load an exported model with transformers (a GGUF, too) in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()


def logits(model: Any) -> torch.Tensor:
    """Return the logits [tokens, vocabulary] of a text that every tiny model can read."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[1, 300, 17, 421, 2, 99, 350, 5]])).logits[0].float()


# --- The merged folder


@pytest.mark.parametrize(
    ("outtype", "files", "settings"),
    [("f32", 1, {}), ("f16", 1, {"alpha_pattern": {"o_proj": 3}}),
     ("bf16", 3, {"use_rslora": True, "rank_pattern": {"q_proj": 4}})],
)  # fmt: skip
def test_merged_weights_are_those_of_peft_to_the_bit(base, tmp_path, outtype, files, settings):
    """However many files the base is stored in, and in whatever format."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="5GB" if files == 1 else "50KB")
    assert len(list(base.glob("*.safetensors"))) >= files
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    folder = export(adapter, tmp_path / "merged", "merged", outtype)
    kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[outtype]
    ours = load_file(folder / "model.safetensors")
    theirs = dict(with_adapter(adapter).merge_and_unload().named_parameters())
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name].to(kind)) for name in theirs)
    config = read(folder / "config.json")
    assert config["dtype"] == config["torch_dtype"] == f"{kind}"[6:]


@pytest.mark.parametrize("format", ["merged", "gguf"])
def test_a_head_of_its_own_is_kept_where_the_config_says_tied(base, moved, tmp_path, format):
    edit_json(base / "config.json", tie_word_embeddings=True)
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    path = export(moved, tmp_path / "out", format)
    found = load(path) if format == "merged" else load(path.parent, gguf_file=path.name)
    assert torch.equal(found.lm_head.weight, head)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    change_base(base, "lm_head.weight", embedding.clone())  # now it is the embedding once more
    same = export(moved, tmp_path / "same", format)
    if format == "merged":
        assert read(path / "config.json")["tie_word_embeddings"] is False
        assert "lm_head.weight" not in load_file(same / "model.safetensors")
        assert read(same / "config.json")["tie_word_embeddings"]
    else:
        assert "output.weight" not in tensors_of(same)


def test_merged_folder_has_what_other_programs_read(base, moved, tmp_path):
    """Template and rope_theta stand in their old places too; the base's bans stay behind."""
    (base / "tokenizer.model").write_bytes(b"sentencepiece")
    (base / "generation_config.json").write_text('{"no_repeat_ngram_size": 2, "bos_token_id": 1}')
    edit_json(base / "config.json", rope_parameters=ROPE)
    tokenizer = program.load_tokenizer(base)
    folder = export(moved, tmp_path / "merged", "merged", "f16")
    config = read(folder / "config.json")
    assert (config["rope_theta"], config["rope_parameters"]) == (10000.0, ROPE)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert read(folder / "generation_config.json") == ends
    assert read(folder / "training_config.json")["system_prompt"] == SYSTEM  # for `chat`
    template = read(folder / "tokenizer_config.json")["chat_template"]
    assert template == tokenizer.chat_template
    for name in ("tokenizer.model", "tokenizer.json"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for chat in CHATS:
        text = program.render_chat(tokenizer, chat, answer_next=True)
        assert theirs(text)["input_ids"] == program.tokenize(tokenizer, [text])[0]


# --- GGUF


def tensors_of(path: Path) -> "dict[str, torch.Tensor]":
    """Return the tensors of a GGUF file in fp32."""
    return {
        t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]))
        for t in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize(("outtype", "bound"), [("f32", 0.0), ("f16", 2e-3), ("q8_0", 4e-2)])
def test_gguf_read_back_by_transformers_gives_the_logits_of_peft(exported, adapter, outtype, bound):
    """In f32 to the bit; rounded ones differ by what their format explains, not by zero."""
    merged = with_adapter(adapter).merge_and_unload()
    if outtype == "f32":  # transformers does not read bf16, so its tensors are compared
        found, output = tensors_of(exported("bf16")), "model.layers.1.self_attn.o_proj"
        rounded = merged.get_submodule(output).weight.bfloat16().float()
        assert torch.equal(found["blk.1.attn_output.weight"], rounded)
        assert torch.equal(found["output_norm.weight"], merged.model.norm.weight)
    exact, path = logits(merged), exported(outtype)
    found = logits(load(path.parent, gguf_file=path.name))
    difference = float((found - exact).norm() / exact.norm())
    assert difference <= bound
    assert (difference > 0) == (bound > 0)


def test_gguf_metadata(exported, tiny_model):
    """Architecture, tokenizer, template and model card are inside, and no path of this machine."""
    reader = gguf.GGUFReader(exported("q8_0"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama", "general.name": "counselor", "general.file_type": 7,
        "llama.context_length": 512, "llama.block_count": 2, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0, "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": program.load_tokenizer(tiny_model).chat_template,
    }  # fmt: skip
    assert {name: fields.get(name) for name in expected} == expected
    assert fields["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 6]
    assert "tiny with a LoRA adapter, SHA-256" in fields["general.description"]
    assert str(tiny_model.parent) not in str(fields)


# --- llama.cpp itself

TOPICS = ("net price", "prix réel 学費", "line\nbreak\n\n", "  spaces  ", "🎓 <b>&amp;</b>\t{x}")


def make_chat(number: int) -> "list[dict[str, str]]":
    """Return one of many conversations: scripts, line breaks, empty system messages, turns."""
    topic = TOPICS[number % 5]
    turns = [f"Question {number}: {topic}?", f"Answer{topic}.", f"{topic}{number}"]
    said = list(zip(("user", "assistant", "user"), turns, strict=True))[: 1 + 2 * (number % 2)]
    system = ["", f"Be brief about {topic}."][number % 3 - 1 :][:1] if number % 3 else []
    told = [("system", text) for text in system]
    return [{"role": role, "content": text} for role, text in [*told, *said]]


CHATS = [make_chat(number) for number in range(50)]


def check_with_llama_cpp(adapter: Path, path: Path) -> None:
    """Compare llama.cpp on a GGUF with base + adapter in transformers: tokens, logits, answers."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    base = read(adapter / "adapter_config.json")["base_model_name_or_path"]
    model, tokenizer = with_adapter(adapter), program.load_tokenizer(Path(base))
    exact_cache = dict.fromkeys(("type_k", "type_v"), llama_cpp.GGML_TYPE_F32)
    options = {"n_ctx": 512, "logits_all": True, "verbose": False, "n_threads": 1}
    llama = llama_cpp.Llama(str(path), **options, **exact_cache)
    for chat in CHATS:
        # llama.cpp removes the BOS of a template that writes one, since it adds its own.
        text = program.render_chat(tokenizer, chat, answer_next=True).removeprefix("<s>")
        theirs = llama.tokenize(text.encode(), add_bos=True, special=True)
        assert theirs == program.tokenize_prompt(tokenizer, chat), text
    for chat in CHATS[:3]:
        ids = program.tokenize_prompt(tokenizer, chat)
        llama.reset()
        llama.eval(ids)
        with torch.inference_mode():
            exact = model(input_ids=torch.tensor([ids])).logits[0]
        assert (torch.tensor(llama.scores[: len(ids)]) - exact).abs().max() < 1e-3
        (answer,) = program.generate(model, tokenizer, [ids], max_new_tokens=40)
        llama.reset()
        endless = llama.generate(ids, temp=0.0, repeat_penalty=1.0)
        tokens = itertools.takewhile(lambda token: token != llama.token_eos(), endless)
        assert list(itertools.islice(tokens, 40)) == list(answer.token_ids)


def test_llama_cpp_serves_the_tiny_adapter_as_trained(exported, adapter):
    check_with_llama_cpp(adapter, exported("f32"))


def save_llama(base: Path, **changes: Any) -> None:
    """Give a base's folder other weights, of a Llama that is the tiny one but for these changes."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**read(base / "config.json") | changes)).save_pretrained(base)


def test_llama_cpp_serves_odd_tokenizers_and_templates(base, tmp_path):
    """Named templates, a BOS in the template, an added token, embeddings without a token."""
    save_llama(base, vocab_size=608)
    tokenizer = program.load_tokenizer(base)
    tokenizer.add_tokens(["net"], special_tokens=True)  # in every fifth chat
    tokenizer.save_pretrained(base)
    template = "{{ bos_token }}" + str(tokenizer.chat_template)
    use_template(base, [{"name": n, "template": template} for n in ("default", "tool_use")])
    adapter = save_adapter(base, tmp_path / "adapter")
    path = export(adapter, tmp_path / "gguf", "gguf")
    assert (path.parent / "Modelfile").is_file()
    check_with_llama_cpp(adapter, path)


def test_llama_cpp_splits_text_like_tinyllamas_tokenizer(assets, base, tmp_path):
    """The real tokenizer of 32,000 pieces, on a small model of random weights."""
    for path in (assets / "tokenizers/tinyllama-1.1b-chat").iterdir():
        shutil.copyfile(path, base / path.name)
    save_llama(base, vocab_size=32000)
    adapter = save_adapter(base, tmp_path / "adapter")
    check_with_llama_cpp(adapter, export(adapter, tmp_path / "gguf", "gguf"))


# --- The Modelfile and Ollama


def go_render(template: str, messages: "list[dict[str, str]]") -> str:
    """Render what Modelfiles here use of Go's text/template: one range, .Role and .Content."""
    found = re.fullmatch(r"\{\{- range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.S)
    turn = found[1].replace("{{ .Role }}", "{role}").replace("{{ .Content }}", "{content}")
    return "".join(turn.format(**message) for message in messages) + found[2]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(("template", "start"), [(None, "<|{}|>"), (CHATML, "<|im_start|>{}")])
def test_the_modelfile_renders_what_the_chat_template_renders(base, tmp_path, template, start):
    """Byte for byte; beside it the system message, the stops and the context."""
    use_template(base, template)
    adapter, tokenizer = save_adapter(base, tmp_path / "counselor"), program.load_tokenizer(base)
    path = export(adapter, tmp_path / "out", "gguf", "q8_0", system_prompt=SYSTEM)
    text = (path.parent / "Modelfile").read_text()
    (shown,) = re.findall(r'^TEMPLATE """(.*?)"""$', text, re.S | re.M)
    for chat in CHATS:
        assert go_render(shown, chat) == program.render_chat(tokenizer, chat, answer_next=True)
    assert text.startswith("FROM ./counselor-q8_0.gguf\n")
    assert f'\nSYSTEM """{SYSTEM}"""\n' in text
    assert "\nPARAMETER num_ctx 512\n" in text
    starts = [start.format(role) for role in ("system", "user", "assistant")]
    assert re.findall('^PARAMETER stop "(.*)"$', text, re.M) == ["</s>", *starts]


@pytest.mark.parametrize(("template", "system", "reason"), [
    ("{% for m in messages %}{{ loop.index }}. {{ m.content }}\n{% endfor %}", None, "more"),
    ("{% for m in messages %}[{{ m.role }}] {{ m.content|trim }}\n{% endfor %}", None, "more"),
    (None, 'Say """hello""".', 'cannot hold """'),
    (None, "Family: \U0001f469\u200d\U0001f393", "invisible characters"),
])  # fmt: skip
def test_what_ollama_would_serve_otherwise_gets_no_modelfile(
    base, moved, tmp_path, caplog, template, system, reason, fake_ollama
):
    """The GGUF itself is fine; --install is refused before the work."""
    use_template(base, template)
    with caplog.at_level("WARNING", "unified_finetune"):
        path = export(moved, tmp_path / "out", "gguf", "q8_0", system_prompt=system)
    assert re.search(f"no Modelfile for Ollama: .*{re.escape(reason)}", caplog.text)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(FineTuningError, match="Ollama cannot serve this model as it was trained"):
        export(moved, tmp_path / "no", "gguf", install="me", system_prompt=system)
    assert not (tmp_path / "no").exists()


@pytest.fixture
def fake_ollama(tmp_path, monkeypatch):
    """Put an `ollama` into the PATH that notes how it was called; it fails where `fail` exists."""
    folder = tmp_path / "bin"
    folder.mkdir()
    fail = f"if [ -e {folder}/fail ]; then echo could not connect >&2; exit 1; fi"
    (folder / "ollama").write_text(f'#!/bin/sh\necho "$*" >> {folder}/calls\n{fail}\n')
    (folder / "ollama").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_install_hands_the_file_to_ollama(adapter, tmp_path, fake_ollama, capsys, monkeypatch):
    """With its Modelfile and --quantize; a failure leaves the export and says how to try again."""
    out = tmp_path / "out"
    path = export(adapter, out, "gguf", install="me/c:v1", quantize="q4_K_M")
    assert capsys.readouterr().out == f"{path}\n"
    call = f"create me/c:v1 -f {out / 'Modelfile'} -q q4_K_M\n"
    assert (fake_ollama / "calls").read_text() == call
    (fake_ollama / "fail").touch()
    with pytest.raises(FineTuningError, match="could not connect") as error:
        export(adapter, out, "gguf", "q8_0", install="counselor")
    assert "ollama create counselor -f" in error.value.hint
    names = {"Modelfile", "counselor-f32.gguf", "counselor-q8_0.gguf", "Modelfile-counselor-q8_0"}
    assert {p.name for p in out.iterdir()} == names
    path.unlink()
    with pytest.raises(FineTuningError, match="Modelfile exists already"):  # edited, perhaps
        export(adapter, out, "gguf")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FineTuningError, match="no `ollama` command"):
        export(adapter, tmp_path / "no", "gguf", install="counselor")


# --- What cannot be exported


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
PIECES, NORM, UP = "tokenizer.json", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
LARGE = "(largest value {}) cannot be written as f16"
OBSTACLES: "dict[str, tuple[str, Any]]" = {
    "scaling (linear)": ("gguf", lambda b: edit_json(b / "config.json", rope_parameters=ROPE)),
    "the activation gelu": ("gguf", lambda b: edit_json(b / "config.json", hidden_act="gelu")),
    "is of type 'mistral', not": ("gguf", lambda b: edit_json(b / "config.json", **MISTRAL)),
    "of another kind than Sentence": ("gguf", lambda b: edit_json(b / PIECES, pre_tokenizer=BYTES)),
    f"its files lack {NORM}": ("merged", lambda b: change_base(b, NORM, None)),
    LARGE.format("nan"): ("gguf", lambda b: change_base(b, NORM, float("nan"))),
    LARGE.format("inf"): ("merged", lambda b: change_base(b, UP, float("inf"))),
    LARGE.format("7e+04"): ("gguf", lambda b: change_base(b, UP, 70000.0)),
    "file not fully covered": ("merged", lambda b: os.truncate(b / "model.safetensors", 5000)),
}


@pytest.mark.parametrize("message", OBSTACLES)
def test_what_cannot_be_exported_is_refused_by_name(base, moved, tmp_path, message):
    format, spoil = OBSTACLES[message]
    spoil(base)
    with pytest.raises(FineTuningError, match=re.escape(message)) as error:
        export(moved, tmp_path / "out", format, "f16")
    assert error.value.hint
    assert not list(tmp_path.glob("*out*"))


# --- Places, disks and interruptions


@pytest.mark.parametrize("format", ["merged", "gguf"])
def test_an_export_is_replaced_with_overwrite_and_whole(adapter, tmp_path, monkeypatch, format):
    """Not begun where the disk cannot hold it; spared by a full disk or Ctrl-C in the middle."""
    with monkeypatch.context() as broken:
        usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
        broken.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(FineTuningError, match=r"needs 100\.\d MB, and 50\.0 kB are free"):
            export(adapter, tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []
    path = export(adapter, tmp_path / "out", format)
    marked = path / "config.json" if format == "merged" else path
    good = marked.read_bytes()
    marked.write_bytes(good + b"\n")
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(FineTuningError, match="exists already; --overwrite"):
        export(adapter, tmp_path / "out", format)
    for failure in (OSError(errno.ENOSPC, "full"), KeyboardInterrupt()):
        with monkeypatch.context() as broken:  # while files are made safe
            broken.setattr(os, "fsync", Mock(side_effect=failure))
            with pytest.raises((KeyboardInterrupt, FineTuningError)) as raised:
                export(adapter, tmp_path / "out", format, overwrite=True)
        assert isinstance(raised.value, KeyboardInterrupt) is isinstance(failure, KeyboardInterrupt)
        assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
    export(adapter, tmp_path / "out", format, overwrite=True)
    assert marked.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_deletes_what_this_program_did_not_write(base, moved, tmp_path):
    """A folder with a config.json, the adapter, its base, a checkpoint, a file in an export."""
    app, checkpoint = tmp_path / "app", tmp_path / "checkpoint-4"
    app.mkdir()
    (app / "config.json").write_text('{"port": 1}')
    program.publish_folder(Path(shutil.copytree(moved, tmp_path / "staged")), checkpoint)
    merged = export(moved, tmp_path / "merged", "merged")
    (merged / "notes.txt").write_text("mine")
    places = (app, moved, base, checkpoint, merged)
    before = [sorted(path.name for path in place.iterdir()) for place in places]
    for place, format in [(place, "merged") for place in places] + [(base, "gguf")]:
        with pytest.raises(FineTuningError, match=r"did not write|is the place of"):
            export(moved, place, format, overwrite=True)
    assert [sorted(path.name for path in place.iterdir()) for place in places] == before
    assert export(checkpoint, tmp_path / "of it", "gguf").is_file()


def test_export_trains_nothing_and_says_how_to_serve_the_file(run_cli, adapter, tmp_path):
    """Stdout is the path; the how-to is on stderr; without an adapter it is exit code 16."""
    shutil.copytree(adapter, tmp_path / "my model")
    result = run_cli("export", "--output_dir", "my model", "--format", "gguf")
    assert (result.code, result.stdout) == (0, "my model/gguf/my-model-f16.gguf\n"), result.stderr
    assert (tmp_path / "my model" / "gguf" / "my-model-f16.gguf").is_file()
    for told in ("ollama create my-model -f", "llama-cli -m 'my model/gguf", "lms import 'my mod"):
        assert told in result.stderr
    assert "Warning" not in result.stderr
    assert not re.search("no-op", next((tmp_path / "logs/finetuning").iterdir()).read_text())
    with pytest.raises(FineTuningError, match=r"no trained adapter in .*nowhere") as error:
        export(tmp_path / "nowhere", tmp_path / "out", "merged")
    assert error.value.exit_code == 16
    assert not list(tmp_path.glob("*nowhere*")) and not (tmp_path / "out").exists()
