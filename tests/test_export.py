"""Export: the merged folder and the GGUF are, token for token, what was trained."""

import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import CliResult
from hypothesis import given, settings
from hypothesis import strategies as st

import unified_finetune as program
from unified_finetune import ExportOptions, FineTuningConfig, FineTuningError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

SYSTEM = 'You are a counselor.\nSay "net price", not {{ price }}.'


def save_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """Write a strong adapter with seeded random weights, as training would save it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    torch.set_num_threads(1)  # tiny models lose time to more
    values = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **settings}
    values.setdefault("target_modules", ["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**values))
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data = torch.randn(weight.shape) * 0.2
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a strong adapter of the tiny Llama, which has two query heads per key head."""
    folder = save_adapter(tiny_model, tmp_path_factory.mktemp("export") / "counselor")
    program.load_tokenizer(str(tiny_model)).save_pretrained(folder)
    (folder / "training_config.json").write_text(json.dumps({"system_prompt": SYSTEM}))
    return folder


def export(adapter: Path, target: Path, format: str, outtype: str = "f32", **more: Any) -> Path:
    """Export into `target` in this process; return what was written."""
    options = {name: more.pop(name) for name in ("install",) if name in more}
    config = FineTuningConfig(output_dir=str(adapter), device="cpu", **more)
    program.export(
        config, ExportOptions(format=format, outtype=outtype, export_dir=str(target), **options)
    )
    if format == "merged":
        return target
    return target / f"{adapter.name}-{outtype}.gguf"


@pytest.fixture(scope="session")
def exported(
    adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> "Callable[[str, str], Path]":
    """Return a function that exports the adapter once per format and number type."""
    folder, done = tmp_path_factory.mktemp("exported"), {}

    def get(format: str, outtype: str) -> Path:
        if (format, outtype) not in done:
            target = folder / f"{format}-{outtype}"
            done[format, outtype] = export(adapter, target, format, outtype)
        return done[format, outtype]

    return get


def merged_by_peft(adapter: Path) -> "LlamaForCausalLM":
    """Return PEFT's own merge, in fp32."""
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()


def logits(model: Any, ids: "list[int]") -> "torch.Tensor":
    """Return the logits [tokens, vocabulary] of one text."""
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def prompt_ids(folder: Path, text: str = "What does the net price mean?") -> "list[int]":
    """Return the tokens of a question, as in training."""
    tokenizer = program.load_tokenizer(str(folder))
    return program.tokenize_prompt(tokenizer, [{"role": "user", "content": text}])


def read_weights(path: Path) -> "dict[str, torch.Tensor]":
    """Return the tensors of a safetensors file."""
    from safetensors.torch import load_file

    return load_file(path)


# --- The merged folder


def test_merged_weights_are_those_of_peft_to_the_bit(
    adapter: Path, exported: "Callable[[str, str], Path]"
) -> None:
    """In fp32, every tensor is exactly what merge_and_unload gives."""
    import torch

    ours = read_weights(exported("merged", "f32") / "model.safetensors")
    theirs = dict(merged_by_peft(adapter).named_parameters())
    assert list(ours) == list(theirs) or set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_merged_model_gives_the_logits_of_base_and_adapter(
    adapter: Path, exported: "Callable[[str, str], Path]"
) -> None:
    """transformers loads the folder; its logits are those of the adapter on its base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    ids = prompt_ids(adapter)
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    plain = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    without = logits(plain, ids)
    tuned = logits(PeftModel.from_pretrained(plain, str(adapter)), ids)
    merged = AutoModelForCausalLM.from_pretrained(exported("merged", "f32"))
    assert merged.dtype == torch.float32
    difference = (logits(merged, ids) - tuned).abs().max()
    assert difference < 1e-4
    assert (tuned - without).abs().max() > 1000 * difference


@pytest.mark.parametrize("outtype", ["f16", "bf16"])
def test_a_bf16_base_is_merged_in_fp32_and_rounded_once(
    tiny_model: Path, tmp_path: Path, outtype: str
) -> None:
    """However the base is stored, the sum is made in fp32."""
    import torch
    from transformers import LlamaForCausalLM

    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter")
    folder = export(adapter, tmp_path / "merged", "merged", outtype)
    kind = {"f16": torch.float16, "bf16": torch.bfloat16}[outtype]
    for name, weight in merged_by_peft(adapter).named_parameters():
        ours = read_weights(folder / "model.safetensors")[name]
        assert torch.equal(ours, weight.to(kind)), name
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == f"{kind}"[6:]


def test_merged_folder_has_what_other_programs_read(
    adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Template and rope_theta stand in their old places too; tokenizer.model is copied."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (base / "tokenizer.model").write_bytes(b"sentencepiece")
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    edit_json(copy / "adapter_config.json", base_model_name_or_path=str(base))
    folder = export(copy, tmp_path / "merged", "merged", "f16")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["dtype"] == config["torch_dtype"] == "float16"
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == program.load_tokenizer(str(base)).chat_template
    assert (folder / "tokenizer.model").read_bytes() == b"sentencepiece"
    assert (folder / "tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert set(modes.values()) == {0o644}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_auto_tokenizer_of_the_merged_folder_splits_as_in_training(
    exported: "Callable[[str, str], Path]", adapter: Path
) -> None:
    """Servers load it with AutoTokenizer, which splits text after </s> otherwise for Llamas."""
    from transformers import AutoTokenizer

    ours = program.load_tokenizer(str(adapter))
    theirs = AutoTokenizer.from_pretrained(exported("merged", "f32"))
    for chat in program.verification_chats(ours, SYSTEM):
        text = program.render_chat(ours, chat, add_generation_prompt=True)
        assert theirs(text)["input_ids"] == program.tokenize_rendered(ours, text)


def test_chat_answers_the_same_from_the_merged_folder(
    exported: "Callable[[str, str], Path]", adapter: Path
) -> None:
    """The system message comes along, and greedy tokens are equal."""
    answers = []
    for folder in (adapter, exported("merged", "f32")):
        served = program.load_served_model(FineTuningConfig(output_dir=str(folder), device="cpu"))
        assert served.system_prompt == SYSTEM
        messages = [{"role": "user", "content": "How do I choose?"}]
        answers.append(
            program.generate_answer(served.model, served.tokenizer, messages, max_new_tokens=40)
        )
    assert answers[0] == answers[1]


def test_a_base_in_several_files_is_merged(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The tensors are found through the index."""
    import torch
    from transformers import LlamaForCausalLM

    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="100KB")
    assert len(list(base.glob("model-*.safetensors"))) > 1
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    edit_json(copy / "adapter_config.json", base_model_name_or_path=str(base))
    folder = export(copy, tmp_path / "merged", "merged")
    ours = read_weights(folder / "model.safetensors")
    assert all(torch.equal(ours[n], w) for n, w in merged_by_peft(copy).named_parameters())


# --- GGUF


def from_gguf(path: Path) -> "LlamaForCausalLM":
    """Load a GGUF with transformers, which undoes the conversion with code of its own."""
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def test_gguf_f32_read_back_by_transformers_gives_exactly_equal_logits(
    exported: "Callable[[str, str], Path]", adapter: Path
) -> None:
    """Not one bit of a logit differs from PEFT's merged model, with grouped query heads."""
    import torch

    ids = prompt_ids(adapter)
    theirs = logits(from_gguf(exported("gguf", "f32")), ids)
    assert torch.equal(theirs, logits(merged_by_peft(adapter), ids))


@pytest.mark.parametrize(("outtype", "bound"), [("f16", 2e-3), ("q8_0", 4e-2)])
def test_rounded_gguf_stays_within_its_bound(
    exported: "Callable[[str, str], Path]", adapter: Path, outtype: str, bound: float
) -> None:
    """The relative difference of the logits is what the number format explains, and not zero."""
    ids = prompt_ids(adapter)
    exact = logits(merged_by_peft(adapter), ids)
    found = logits(from_gguf(exported("gguf", outtype)), ids)
    assert 0 < float((found - exact).norm() / exact.norm()) < bound


def test_gguf_bf16_holds_the_weights_rounded_once(
    exported: "Callable[[str, str], Path]", adapter: Path
) -> None:
    """To the bit (transformers does not read this format, so the tensors are compared)."""
    import torch

    file = program.read_gguf(exported("gguf", "bf16"))
    weights = dict(merged_by_peft(adapter).named_parameters())
    for theirs, ours in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.1.self_attn.o_proj.weight", "blk.1.attn_output.weight"),
        ("lm_head.weight", "output.weight"),
    ):
        assert torch.equal(file.tensor(ours), weights[theirs].bfloat16().float())
    norm = file.tensor("output_norm.weight")
    assert torch.equal(norm, weights["model.norm.weight"])


def test_tied_embeddings_are_written_once(tiny_model: Path, tmp_path: Path) -> None:
    """A model whose head is its embedding has no output tensor, and equal logits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    shape = {**json.loads((base / "config.json").read_text()), "tie_word_embeddings": True}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter")
    path = export(adapter, tmp_path / "gguf", "gguf")
    assert "output.weight" not in program.read_gguf(path).places
    ids = prompt_ids(base)
    assert torch.equal(logits(from_gguf(path), ids), logits(merged_by_peft(adapter), ids))


def test_added_tokens_and_spare_embeddings_are_converted(
    adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Tokens that were added to the tokenizer split text; embeddings without a token get a name."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    shape = {**json.loads((base / "config.json").read_text()), "vocab_size": 608}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(base)
    tokenizer = program.load_tokenizer(str(base))
    tokenizer.add_tokens(["<|tool|>"], special_tokens=True)
    tokenizer.save_pretrained(base)
    copy = save_adapter(base, tmp_path / "adapter")
    path = export(copy, tmp_path / "gguf", "gguf")
    vocabulary = program.read_gguf(path).vocabulary
    assert vocabulary.pieces[600:602] == ["<|tool|>", "[PAD601]"]
    assert vocabulary.types[600:602] == [3, 5]
    tokens = program.tokenize_like_llama_cpp(vocabulary, "a<|tool|> b")
    assert tokens == program.tokenize_rendered(tokenizer, "a<|tool|> b")
    assert 600 in tokens
    ids = prompt_ids(base)
    assert torch.equal(logits(from_gguf(path), ids), logits(merged_by_peft(copy), ids))


def test_gguf_metadata(exported: "Callable[[str, str], Path]", tiny_model: Path) -> None:
    """Architecture, tokenizer, template and model card are inside, and no path of this machine."""
    import gguf

    reader = gguf.GGUFReader(exported("gguf", "q8_0"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.name": "counselor",
        "general.file_type": 7,
        "general.base_model.0.name": "tiny",
        "llama.context_length": 512,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": program.load_tokenizer(str(tiny_model)).chat_template,
    }
    assert {name: fields.get(name) for name in expected} == expected
    assert fields["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 6]
    assert "rank 8, alpha 16" in fields["general.description"]
    assert str(tiny_model.parent) not in str(fields)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text("aelt .\n<|>/s▁0é", max_size=60))
def test_llama_cpp_rules_give_the_tokens_of_training(text: str) -> None:
    """Any text, special tokens and broken ones included, is split alike."""
    tokenizer, vocabulary = any_tokenizer()
    rendered = program.render_chat(
        tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True
    )
    expected = program.tokenize_rendered(tokenizer, rendered)
    assert program.tokenize_like_llama_cpp(vocabulary, rendered) == expected


tokenizers: "list[Any]" = []  # hypothesis takes no fixtures of function scope


def any_tokenizer() -> Any:
    """Return the tiny model's tokenizer and its GGUF vocabulary."""
    return tokenizers[0]


@pytest.fixture(scope="session", autouse=True)
def fill_tokenizers(exported: "Callable[[str, str], Path]", adapter: Path) -> None:
    """Provide the tokenizer to the generated tests."""
    vocabulary = program.read_gguf(exported("gguf", "f32")).vocabulary
    tokenizers.append((program.load_tokenizer(str(adapter)), vocabulary))


# --- llama.cpp itself

TOPICS = ("net price", "prix réel 学費", "line\nbreak\n\n", "  spaces  ", "🎓 <b>&amp;</b>\t{x}")


def fifty_chats() -> "list[list[dict[str, str]]]":
    """Return fifty conversations: scripts, line breaks, empty system messages, many turns."""
    chats = []
    for number in range(50):
        topic = TOPICS[number % 5]
        turns = [f"Question {number}: {topic}?", f"Answer{topic}.", f"{topic}{number}"]
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate(turns[: 1 + 2 * (number % 2)])
        ]
        if number % 3:
            system = "" if number % 3 == 1 else f"Be brief about {topic}."
            messages.insert(0, {"role": "system", "content": system})
        chats.append(messages)
    return chats


def check_with_llama_cpp(adapter: Path, path: Path) -> None:
    """Compare llama.cpp on a GGUF with base + adapter in transformers: tokens, logits, answers."""
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed: llama.cpp itself is not compared"
    )
    import numpy

    served = program.load_served_model(FineTuningConfig(output_dir=str(adapter), device="cpu"))
    llama = llama_cpp.Llama(
        str(path), n_ctx=512, logits_all=True, verbose=False, n_threads=1,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    for chat in fifty_chats():
        text = program.render_chat(served.tokenizer, chat, add_generation_prompt=True)
        theirs = llama.tokenize(text.encode(), add_bos=True, special=True)
        assert theirs == program.tokenize_prompt(served.tokenizer, chat), text
    worst = 0.0
    for chat in fifty_chats()[:3]:
        ids = program.tokenize_prompt(served.tokenizer, chat)
        llama.reset()
        llama.eval(ids)
        found = numpy.array(llama.scores[: len(ids)])
        worst = max(worst, float(numpy.abs(found - logits(served.model, ids).numpy()).max()))
        answer = program.generate_answer(served.model, served.tokenizer, chat, max_new_tokens=40)
        assert greedy(llama, ids, 40) == list(answer.token_ids)
    assert worst < 1e-3


def greedy(llama: Any, prompt: "list[int]", count: int) -> "list[int]":
    """Return llama.cpp's likeliest tokens after a prompt, up to its end token."""
    llama.reset()
    tokens: list[int] = []
    for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
        if token == llama.token_eos() or len(tokens) == count:
            break
        tokens.append(token)
    return tokens


def test_llama_cpp_serves_the_tiny_adapter_as_trained(
    exported: "Callable[[str, str], Path]", adapter: Path
) -> None:
    """Fifty chats, logits and greedy answers, on the tests' own model."""
    check_with_llama_cpp(adapter, exported("gguf", "f32"))


def test_llama_cpp_serves_a_really_trained_model(
    run_cli: "Callable[..., CliResult]", assets: Path, tmp_path: Path
) -> None:
    """A pretrained Llama, trained by the real command, exported by the real command."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    rows = json.loads((assets / "data" / "short_answers_7888.json").read_text())[:24]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    flags = {
        "--model_name": assets / "models" / "stories260K-llama-hf",
        "--data_path": "data.json",
        "--output_dir": "trained",
        "--num_train_epochs": 4,
        "--learning_rate": 5e-3,
        "--warmup_steps": 0,
        "--max_seq_length": 256,
        "--min_disk_gb": 0,
        "--device": "cpu",
    }
    one = {"OMP_NUM_THREADS": "1"}
    trained = run_cli("train", *(part for flag in flags.items() for part in flag), env=one)
    assert trained.code == 0, trained.stderr
    flags = {"--output_dir": "trained", "--format": "gguf", "--outtype": "f32"}
    done = run_cli("export", *(part for flag in flags.items() for part in flag), env=one)
    assert done.code == 0, done.stderr
    assert done.stdout == "trained/gguf/trained-f32.gguf\n"
    assert "token ids of 20 chats are identical" in done.stderr
    check_with_llama_cpp(tmp_path / "trained", tmp_path / done.stdout.strip())


def test_llama_cpp_splits_text_like_tinyllamas_tokenizer(assets: Path, tmp_path: Path) -> None:
    """The real tokenizer of 32,000 pieces, on a small model of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tmp_path / "base"
    shutil.copytree(assets / "tokenizers" / "tinyllama-1.1b-chat", base)
    base.chmod(0o755)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=32000, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter")
    path = export(adapter, tmp_path / "gguf", "gguf")
    check_with_llama_cpp(adapter, path)


# --- The Modelfile


def go_render(template: str, messages: "list[dict[str, str]]") -> str:
    """Render the part of Go's text/template that Modelfiles here use: range, if eq, else, fields.

    {{- and -}} trim the white space before and after an action, as in Go.
    """
    template = re.sub(r"\s*\{\{- ", "{{ ", template)
    template = re.sub(r" -\}\}\s*", " }}", template)
    tokens = re.split(r"\{\{ *(.*?) *\}\}", template)  # text, action, text, action, ..., text

    def run(position: int, message: "dict[str, str]", out: "list[str] | None") -> int:
        """Render from `position` on, up to the end of the block; return where that is."""
        while position < len(tokens):
            if position % 2 == 0:
                if out is not None:
                    out.append(tokens[position])
                position += 1
                continue
            action = tokens[position].split()
            if action[0] in ("end", "else"):
                return position
            position += 1
            if action == ["range", ".Messages"]:
                assert out is not None
                for each in messages:
                    stop = run(position, each, out)
                position = (stop if messages else run(position, {}, None)) + 1
            elif action[:3] == ["if", "eq", ".Role"]:
                holds = message.get("role") == action[3].strip('"')
                position = run(position, message, out if holds else None)
                if tokens[position].split()[0] == "else":
                    position = run(position + 1, message, None if holds else out)
                position += 1
            else:
                field = {".Role": "role", ".Content": "content"}[action[0]]
                if out is not None:
                    out.append(message[field])
        return position

    pieces: list[str] = []
    assert run(0, {}, pieces) == len(tokens)
    return "".join(pieces)


def modelfile_template(modelfile: Path) -> str:
    """Return the TEMPLATE of a Modelfile."""
    found = re.search(r'^TEMPLATE """(.*?)"""$', modelfile.read_text(), re.S | re.M)
    assert found
    return found.group(1)


def test_the_modelfile_template_renders_what_the_chat_template_renders(
    exported: "Callable[[str, str], Path]", adapter: Path
) -> None:
    """Byte for byte, on conversations that the export itself does not look at."""
    template = modelfile_template(exported("gguf", "f32").parent / "Modelfile")
    assert template == (
        "{{- range .Messages }}<|{{ .Role }}|>\n{{ .Content }}</s>\n{{ end }}<|assistant|>\n"
    )
    tokenizer = program.load_tokenizer(str(adapter))
    for chat in fifty_chats()[:10]:
        expected = program.render_chat(tokenizer, chat, add_generation_prompt=True)
        assert go_render(template, chat) == expected


OTHER_TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "words": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}Rules: {{ m.content }}\n\n"
    "{% elif m.role == 'user' %}Q: {{ m.content }}\n"
    "{% else %}A: {{ m.content }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A: {% endif %}",
}


@pytest.mark.parametrize("name", OTHER_TEMPLATES)
def test_other_chat_templates_are_translated_too(adapter: Path, name: str) -> None:
    """Markers are read off what a template renders, whatever they are."""
    tokenizer = program.load_tokenizer(str(adapter))
    tokenizer.chat_template = OTHER_TEMPLATES[name]
    markers = program.find_turn_markers(tokenizer)
    assert markers
    for chat in fifty_chats()[:10]:
        expected = program.render_chat(tokenizer, chat, add_generation_prompt=True)
        assert go_render(markers.go_template(), chat) == expected.removeprefix("<s>")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }} {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}",
        "{{ raise_exception('no system messages') }}",
    ],
)
def test_a_template_that_is_more_than_markers_gets_no_modelfile(
    adapter: Path, template: str
) -> None:
    """A wrong TEMPLATE would serve other prompts than were trained, without a word."""
    tokenizer = program.load_tokenizer(str(adapter))
    tokenizer.chat_template = template
    assert program.find_turn_markers(tokenizer) is None


def test_the_modelfile_has_the_settings_that_were_trained_with(
    exported: "Callable[[str, str], Path]",
) -> None:
    """The file, the system message, where to stop, and the context."""
    text = (exported("gguf", "q8_0").parent / "Modelfile").read_text()
    lines = text.splitlines()
    assert lines[0] == "FROM ./counselor-q8_0.gguf"
    assert f'\nSYSTEM """{SYSTEM}"""\n' in text
    stops = [line for line in lines if line.startswith("PARAMETER stop")]
    assert [line.split(" ", 2)[2] for line in stops] == [
        '"</s>"', '"<|system|>"', '"<|user|>"', '"<|assistant|>"',
    ]  # fmt: skip
    assert "PARAMETER num_ctx 512" in lines


@pytest.mark.parametrize(
    ("system", "reason"),
    [
        ('Say """hello""".', 'cannot hold the """'),
        ("Family: \U0001f469\u200d\U0001f393", "loses the character U+200D"),
        ("no\u00a0break", "loses the character U+00A0"),
    ],
)
def test_a_system_prompt_that_a_modelfile_would_change_gets_none(
    adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, system: str, reason: str
) -> None:
    """Ollama drops such characters without a word; the GGUF itself is fine."""
    with caplog.at_level("WARNING", "unified_finetune"):
        path = export(adapter, tmp_path / "out", "gguf", "q8_0", system_prompt=system)
    assert f"no Modelfile for Ollama: a Modelfile {reason}" in caplog.text
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_two_number_formats_keep_their_modelfiles_apart(adapter: Path, tmp_path: Path) -> None:
    """The second one takes another name; neither is lost."""
    export(adapter, tmp_path / "gguf", "gguf", "f16")
    export(adapter, tmp_path / "gguf", "gguf", "q8_0")
    names = {path.name for path in (tmp_path / "gguf").iterdir()}
    assert names == {
        "counselor-f16.gguf", "Modelfile", "counselor-q8_0.gguf", "Modelfile-counselor-q8_0",
    }  # fmt: skip
    second = (tmp_path / "gguf" / "Modelfile-counselor-q8_0").read_text()
    assert second.startswith("FROM ./counselor-q8_0.gguf\n")


# --- Ollama


@pytest.fixture
def fake_ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put an `ollama` into the PATH that notes how it was called; it fails where `fail` exists."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "ollama"
    script.write_text(
        f'#!/bin/sh\necho "$PWD $*" >> {folder}/calls\n'
        f"if [ -e {folder}/fail ]; then echo could not connect >&2; exit 1; fi\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_install_hands_the_file_to_ollama(
    adapter: Path, tmp_path: Path, fake_ollama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ollama create` runs beside the Modelfile."""
    path = export(adapter, tmp_path / "out", "gguf", "q8_0", install="me/counselor:v1")
    assert capsys.readouterr().out == f"{path}\n"
    calls = (fake_ollama / "calls").read_text()
    assert calls == f"{tmp_path / 'out'} create me/counselor:v1 -f Modelfile\n"


def test_a_failing_ollama_leaves_the_export(
    adapter: Path, tmp_path: Path, fake_ollama: Path
) -> None:
    """The error says what Ollama said and how to try again."""
    (fake_ollama / "fail").touch()
    with pytest.raises(FineTuningError, match="could not connect") as error:
        export(adapter, tmp_path / "out", "gguf", "q8_0", install="counselor")
    assert "ollama create counselor -f" in error.value.hint
    assert (tmp_path / "out" / "counselor-q8_0.gguf").is_file()


def test_install_without_ollama_is_refused_before_the_work(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FineTuningError, match="no `ollama` command"):
        export(adapter, tmp_path / "out", "gguf", install="counselor")
    assert not (tmp_path / "out").exists()


# --- The check finds what would be served wrongly


def assert_nothing_was_left(folder: Path) -> None:
    """Check that neither a final name nor a staging folder is there."""
    assert [path.name for path in folder.iterdir() if "out" in path.name] == []


def break_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "permute_rotary", lambda weight, heads: weight)


def break_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program.ExportSource, "update", lambda self, name: None)


def break_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program.ExportSource, "scale", property(lambda self: 1.0))


def break_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = program.build_vocabulary

    def build(source: Any) -> Any:
        vocabulary = whole(source)
        vocabulary.scores.reverse()
        return vocabulary

    monkeypatch.setattr(program, "build_vocabulary", build)


@pytest.mark.parametrize(
    ("spoil", "format", "message"),
    [
        (break_permutation, "gguf", "logits differ"),
        (break_adapter, "gguf", "logits differ"),
        (break_adapter, "merged", "logits differ"),
        (break_scale, "merged", "logits differ"),
        (break_scores, "gguf", "splits a chat into other tokens"),
    ],
)
def test_a_wrong_conversion_fails_and_leaves_nothing(
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: "Callable[[pytest.MonkeyPatch], None]",
    format: str,
    message: str,
) -> None:
    """The faults that the usual routes make are found before a file gets its name."""
    spoil(monkeypatch)
    with pytest.raises(FineTuningError, match=message):
        export(adapter, tmp_path / "out", format)
    assert_nothing_was_left(tmp_path)


def test_rounding_that_hides_the_adapter_is_told(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter that changes less than the number format rounds away is worth a warning."""
    from safetensors.torch import load_file, save_file

    adapter = save_adapter(tiny_model, tmp_path / "weak")
    weights = load_file(adapter / "adapter_model.safetensors")
    weak = {name: value * 3e-3 for name, value in weights.items()}
    save_file(weak, adapter / "adapter_model.safetensors")
    with caplog.at_level("WARNING", "unified_finetune"):
        export(adapter, tmp_path / "exact", "merged", "f32")
        assert "rounding hides" not in caplog.text
        export(adapter, tmp_path / "rounded", "merged", "bf16")
    assert "rounding hides much of what the adapter has learnt" in caplog.text


# --- What cannot be exported


def edit_json(path: Path, **changes: object) -> None:
    """Change values in a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def spoil_rope(base: Path, adapter: Path) -> None:
    edit_json(
        base / "config.json",
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    )


def spoil_architecture(base: Path, adapter: Path) -> None:
    edit_json(base / "config.json", model_type="mistral", architectures=["MistralForCausalLM"])


def spoil_activation(base: Path, adapter: Path) -> None:
    edit_json(base / "config.json", hidden_act="gelu")


def spoil_tokenizer(base: Path, adapter: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "Ġ": 3, "a": 4, "Ġa": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "a")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(adapter / "tokenizer.json"))


def spoil_missing_tensor(base: Path, adapter: Path) -> None:
    change_base(base, lambda weights: weights.pop("model.norm.weight"))


def spoil_extra_tensor(base: Path, adapter: Path) -> None:
    import torch

    change_base(base, lambda weights: weights.update(extra=torch.zeros(1)))


def spoil_quantized(base: Path, adapter: Path) -> None:
    import torch

    name = "model.layers.0.mlp.up_proj.weight"
    change_base(base, lambda weights: weights.update({name: weights[name].to(torch.int8)}))


def spoil_nan(base: Path, adapter: Path) -> None:
    change_base(base, lambda weights: weights["model.norm.weight"].fill_(float("nan")))


def spoil_huge(base: Path, adapter: Path) -> None:
    change_base(base, lambda w: w["model.layers.1.mlp.up_proj.weight"].fill_(70000.0))


def spoil_cut_base(base: Path, adapter: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def spoil_dora(base: Path, adapter: Path) -> None:
    save_adapter(base, adapter, use_dora=True)


def spoil_embedding_adapter(base: Path, adapter: Path) -> None:
    save_adapter(base, adapter, target_modules=["q_proj", "embed_tokens"])


def spoil_some_layers(base: Path, adapter: Path) -> None:
    save_adapter(base, adapter, layers_to_transform=[0])


def spoil_rank(base: Path, adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", r=16)


def spoil_adapter(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"nothing")


def change_base(base: Path, change: "Callable[[dict[str, torch.Tensor]], object]") -> None:
    """Change the tensors of a base model."""
    from safetensors.torch import save_file

    weights = read_weights(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "format", "message"),
    [
        (spoil_rope, "gguf", "rope scaling (linear)"),
        (spoil_architecture, "merged", "of type 'mistral'; only Llama models"),
        (spoil_activation, "gguf", "the activation gelu"),
        (spoil_tokenizer, "gguf", "not of the SentencePiece-BPE kind"),
        (spoil_missing_tensor, "merged", "lacks the tensor model.norm.weight"),
        (spoil_extra_tensor, "merged", "also has the tensor extra"),
        (spoil_quantized, "gguf", "up_proj.weight of the base model is I8"),
        (spoil_nan, "gguf", "model.norm.weight holds NaN or infinite numbers"),
        (spoil_huge, "gguf", "has values up to 70000, too large for f16"),
        (spoil_cut_base, "merged", "model.safetensors is damaged"),
        (spoil_dora, "merged", "use_dora True"),
        (spoil_embedding_adapter, "merged", "embed_tokens"),
        (spoil_some_layers, "merged", "layers_to_transform [0]"),
        (spoil_rank, "merged", "does not fit the model"),
        (spoil_adapter, "gguf", "adapter_model.safetensors is damaged"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(
    tiny_model: Path,
    adapter: Path,
    tmp_path: Path,
    spoil: "Callable[[Path, Path], None]",
    format: str,
    message: str,
) -> None:
    """Each obstacle has its message and a remedy, and nothing is written."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    edit_json(copy / "adapter_config.json", base_model_name_or_path=str(base))
    spoil(base, copy)
    with pytest.raises(FineTuningError) as error:
        export(copy, tmp_path / "out", format, "f16")
    assert message in str(error.value)
    assert error.value.hint
    assert_nothing_was_left(tmp_path)


def test_rope_scaling_survives_a_merged_export(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    """What GGUF refuses, the merged folder keeps."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    edit_json(copy / "adapter_config.json", base_model_name_or_path=str(base))
    spoil_rope(base, copy)
    folder = export(copy, tmp_path / "out", "merged")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "linear"
    assert config["rope_parameters"]["factor"] == 2.0


# --- Names, disks and interruptions


@pytest.mark.parametrize("format", ["merged", "gguf"])
def test_an_export_is_replaced_only_with_overwrite(
    adapter: Path, tmp_path: Path, format: str
) -> None:
    """Without the flag nothing changes; with it the new one takes the place."""
    path = export(adapter, tmp_path / "out", format)
    marked = path / "config.json" if format == "merged" else path
    marked.write_bytes(marked.read_bytes() + b"\n")
    before = marked.read_bytes()
    with pytest.raises(FineTuningError, match="exists already") as error:
        export(adapter, tmp_path / "out", format)
    assert "--overwrite" in error.value.hint
    assert marked.read_bytes() == before
    export(adapter, tmp_path / "out", format, overwrite=True)
    assert marked.read_bytes() == before[:-1]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_overwrite_never_deletes_a_folder_that_is_no_model(adapter: Path, tmp_path: Path) -> None:
    """A mistyped --export_dir must not cost anyone their documents."""
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("years of work")
    with pytest.raises(FineTuningError, match="is no model folder"):
        export(adapter, tmp_path / "documents", "merged", overwrite=True)
    assert (tmp_path / "documents" / "thesis.txt").read_text() == "years of work"


def test_too_little_disk_is_told_before_the_work(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has both numbers."""
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FineTuningError, match=r"needs 100\.\d MB at .*out; 50\.0 MB are free"):
        export(adapter, tmp_path / "out", "merged")
    assert_nothing_was_left(tmp_path)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("format", ["merged", "gguf"])
def test_a_failure_in_the_middle_leaves_nothing_and_spares_the_old_export(
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    format: str,
) -> None:
    """A full disk or Ctrl-C while tensors are written: the earlier export stays whole."""
    path = export(adapter, tmp_path / "out", format)
    files = [path] if path.is_file() else sorted(path.iterdir())
    before = [file.read_bytes() for file in files]
    whole, calls = program.ExportSource.merged_tensor, []

    def fail(self: Any, name: str) -> Any:
        calls.append(name)
        if len(calls) == 5:
            raise failure
        return whole(self, name)

    monkeypatch.setattr(program.ExportSource, "merged_tensor", fail)
    expected = FineTuningError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space" if isinstance(failure, OSError) else None):
        export(adapter, tmp_path / "out", format, overwrite=True)
    assert [file.read_bytes() for file in files] == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_is_cleared_away_by_the_next(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL lets nothing clean up: the half-written file has no final name."""
    with monkeypatch.context() as patch:
        patch.setattr(program, "verify_gguf", lambda *_: sys.exit("killed"))
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            export(adapter, tmp_path / "out", "gguf")
    assert [p.name for p in tmp_path.iterdir()] == [".staging-out"]
    assert export(adapter, tmp_path / "out", "gguf", "f16").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "counselor-f32.gguf").exists()


# --- The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--format is missing: merged or gguf"),
        (["--format", "onnx"], "--format must be one of merged, gguf, not 'onnx'"),
        (["--format", "gguf", "--outtype", "f61"], "did you mean f16?"),
        (["--format", "merged", "--outtype", "q8_0"], "q8_0 exists in GGUF files only"),
        (["--format", "merged", "--install", "me"], "--install needs --format gguf"),
        (["--format", "gguf", "--install", "-f /etc"], "--install must be a name like"),
        (["--format", "gguf", "--prompt", "Hi"], "unknown argument '--prompt'"),
    ],
)
def test_wrong_flags_are_refused(arguments: "list[str]", message: str) -> None:
    """Each with what would be right."""
    with pytest.raises(program.UsageError) as error:
        program.parse_command_line(["export", *arguments])
    assert message in str(error.value)


def test_export_without_an_adapter_ends_with_exit_code_16(tmp_path: Path) -> None:
    """The message names the folder and the remedy; nothing is made."""
    config = FineTuningConfig(output_dir=str(tmp_path / "nowhere"))
    with pytest.raises(FineTuningError, match=r"There is no trained adapter in .*nowhere") as error:
        program.execute("export", config, ExportOptions(format="merged"))
    assert error.value.exit_code == 16
    assert "--output_dir" in error.value.hint
    assert not (tmp_path / "nowhere").exists()


def test_export_says_what_it_checked_and_how_to_serve_the_file(
    run_cli: "Callable[..., CliResult]", adapter: Path, tmp_path: Path
) -> None:
    """Stdout is the path; the how-to is three lines on stderr."""
    shutil.copytree(adapter, tmp_path / "my model")
    result = run_cli("export", "--output_dir", "my model", "--format", "gguf")
    assert result.code == 0, result.stderr
    assert result.stdout == "my model/gguf/my-model-f16.gguf\n"
    assert (tmp_path / "my model" / "gguf" / "my-model-f16.gguf").is_file()
    assert "token ids of 20 chats are identical" in result.stderr
    assert "ollama create my-model -f 'my model/gguf/Modelfile' && ollama run my-model" in (
        result.stderr
    )
    assert "llama-cli -m 'my model/gguf/my-model-f16.gguf'" in result.stderr
    assert "lms import 'my model/gguf/my-model-f16.gguf'" in result.stderr
    assert "Warning" not in result.stderr
