#!/usr/bin/env python3
"""Build the base model of `./run_finetuning.sh --demo`: a tiny Llama and its tokenizer, offline.

Usage:
  python tests/make_demo_model.py FOLDER          the demo's base, pre-trained for half a minute
  python tests/make_demo_model.py --tiny FOLDER   random weights in seconds, for tests

The tokenizer is built as TinyLlama's is: SentencePiece-like BPE with byte fallback and the same
special tokens, normalizer, decoder and chat template, only with a small vocabulary.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

SAMPLE = Path(__file__).resolve().parent / "data" / "college_advisor_sample.json"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))  # ids 3 to 258
CHAT_TEMPLATE = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
CHAT_WORDS = "system user assistant"  # the chat template's markers, less their < | and >

# What the tests' tokenizer is trained on: enough for whole words such as "college" and "aid".
TINY_TEXT = """\
A college reads the whole application: grades, courses, essays, recommendations and activities.
Early decision is binding, early action is not, and regular decision gives the most time.
The financial aid office asks for a form that shows what the family earns and what it owns.
A grant or a scholarship is money that a student keeps; a loan must be paid back with interest.
Public universities charge students from their own state less than students from other states.
How do I choose between two colleges? What does the net price mean? When should I apply for aid?
Compare the net price, the programs, the place and the people, then visit before you decide."""


def train_tokenizer(texts: "Iterable[str]", vocab_size: int) -> "Tokenizer":
    """Train BPE on the texts and dress it as TinyLlama's tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    spaces_to_marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    scratch = Tokenizer(models.BPE(unk_token="<unk>"))
    scratch.normalizer = normalizers.Sequence(spaces_to_marks)  # type: ignore[assignment]
    # Only for training: merges never cross a word boundary, so encoding needs no pre-tokenizer.
    scratch.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *BYTE_TOKENS],
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["▁"],
        show_progress=False,
    )
    # A line break is no piece of its own: it goes through byte fallback, as in Llama's vocabulary.
    lines = [line for text in texts for line in text.splitlines() if line]
    scratch.train_from_iterator([*lines, CHAT_WORDS], trainer)
    return dress_tokenizer(json.loads(scratch.to_str())["model"])


def dress_tokenizer(model: "dict[str, object]") -> "Tokenizer":
    """Give a BPE vocabulary the byte fallback, normalizer, decoder and `<s>` of TinyLlama's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    tokenizer = Tokenizer(
        models.BPE(
            vocab=model["vocab"],  # type: ignore[arg-type]
            merges=[tuple(pair) for pair in model["merges"]],  # type: ignore[attr-defined]
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def write_tokenizer(tokenizer: "Tokenizer", folder: Path, context: int) -> None:
    """Write the tokenizer's files as TinyLlama's repository has them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    settings = {
        **names,
        "pad_token": "</s>",
        "padding_side": "right",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": context,
        "tokenizer_class": "LlamaTokenizer",
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", {**names, "pad_token": "</s>"})


def write_json(path: Path, content: object) -> None:
    """Write a JSON file for people to read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_llama(
    vocab_size: int, *, hidden: int, layers: int, heads: int, context: int
) -> "LlamaForCausalLM":
    """Return a Llama with seeded random weights and half as many key-value heads as query heads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,  # TinyLlama's 5632 / 2048
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def build_tiny_model(folder: Path) -> None:
    """Write a model of random weights: 2 layers, width 64, a vocabulary of 600."""

    def write(scratch: Path) -> None:
        tokenizer = train_tokenizer([TINY_TEXT], vocab_size=600)
        write_tokenizer(tokenizer, scratch, context=512)
        model = make_llama(tokenizer.get_vocab_size(), hidden=64, layers=2, heads=4, context=512)
        model.save_pretrained(scratch)

    write_whole(folder, write)


def write_whole(folder: Path, write: "Callable[[Path], None]") -> None:
    """Let `write` fill a scratch folder, which then replaces `folder`: whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        write(scratch)
        scratch.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
