#!/usr/bin/env python3
"""Build the base model of `./run_finetuning.sh --demo`: a tiny Llama and its tokenizer, offline.

Usage: python tests/make_demo_model.py FOLDER

The tokenizer is built as TinyLlama's is: SentencePiece-like BPE with byte fallback and the same
special tokens, normalizer, decoder and chat template, only with a small vocabulary.

The model (1.25 million parameters) learns the sample by heart, in every layout but that of a chat:
a base model knows facts from elsewhere, and what so small an adapter can teach it is the form. The
demo shows that the program works, not how well a model answers questions that it never saw.
The tests use `build_tiny_model`: the same in small, with random weights, in a few seconds.
"""

import contextlib
import fcntl
import hashlib
import json
import random
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

Row = dict[str, str]
SAMPLE = Path(__file__).resolve().parent / "data" / "college_advisor_sample.json"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
CONTEXT = 512
MARKER = "demo_model.json"  # written last, names the files and what they were made from

# How the base model has seen questions and answers. Angle brackets and bars are among them, so that
# the chat template's markers are made of known signs; the template itself is not.
LAYOUTS = (
    *("{q} {a}", "{q}\n{a}", "{q}\n\n{a}", "Question: {q}\nAnswer: {a}", "Q: {q}\nA: {a}"),
    *("[{q}]\n{a}", "<q>{q}</q>\n<a>{a}", "| {q} | {a}", "<< {q} >>\n{a}", "* {q}\n  {a}"),
    *("|| {q}\n|| {a}", "<ask>\n{q}\n<reply>\n{a}"),
)

# What the tests' tokenizer is trained on: enough for whole words such as "college" and "aid".
TINY_TEXT = """\
A college reads the whole application: grades, courses, essays, recommendations and activities.
Early decision is binding, early action is not, and regular decision gives the most time.
The financial aid office asks for a form that shows what the family earns and what it owns.
A grant or a scholarship is money that a student keeps; a loan must be paid back with interest.
Public universities charge students from their own state less than students from other states.
How do I choose between two colleges? What does the net price mean? When should I apply for aid?
Compare the net price, the programs, the place and the people, then visit before you decide."""


def write_tokenizer(texts: "Iterable[str]", vocab_size: int, folder: Path) -> "Tokenizer":
    """Train BPE on the texts, and write it as TinyLlama's repository has its own."""
    import tokenizers as tk
    from tokenizers import decoders, models, normalizers

    scratch = tk.Tokenizer(models.BPE(unk_token="<unk>"))
    marks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    scratch.normalizer = marks
    # Only for training: merges never cross a word boundary, so encoding needs no pre-tokenizer.
    scratch.pre_tokenizer = tk.pre_tokenizers.Split("▁", "merged_with_next")
    trainer = tk.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=[*map(chr, range(33, 127)), "▁"],
        special_tokens=[*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )  # fmt: skip
    # A line break is no piece of its own: it goes through byte fallback, as in Llama's vocabulary.
    lines = [line for text in texts for line in text.splitlines() if line]
    scratch.train_from_iterator([*lines, "system user assistant"], trainer)  # the chat's markers

    learnt = json.loads(scratch.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    bpe = models.BPE(learnt["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tk.Tokenizer(bpe)
    tokenizer.add_special_tokens([tk.AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.normalizer = marks
    tokenizer.post_processor = tk.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    strip = decoders.Strip(" ", 1, 0)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    settings = {
        **names, "padding_side": "right", "add_bos_token": True, "add_eos_token": False,
        "clean_up_tokenization_spaces": False, "legacy": False, "model_max_length": CONTEXT,
        "tokenizer_class": "LlamaTokenizer", "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", names)
    return tokenizer


def write_json(path: Path, content: object) -> None:
    """Write a JSON file for people to read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_llama(vocab: int, hidden: int, layers: int, spread: float) -> "LlamaForCausalLM":
    """Return a Llama of seeded random weights, with four query heads and two key-value heads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=hidden * 11 // 4,  # TinyLlama's 5632 / 2048
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=spread,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def build_tiny_model(folder: Path) -> None:
    """Write a model of random weights: 2 layers, width 64, a vocabulary of 600."""
    with whole_folder(folder) as scratch:
        write_tokenizer([TINY_TEXT], 600, scratch)
        make_llama(600, hidden=64, layers=2, spread=0.02).save_pretrained(scratch)


def build_demo_model(folder: Path) -> None:
    """Write the demo's base model, pre-trained on the sample."""
    rows = json.loads(SAMPLE.read_text(encoding="utf-8"))
    with whole_folder(folder) as scratch:
        tokenizer = write_tokenizer((text for row in rows for text in row.values()), 2000, scratch)
        # The wide spread suits a narrow model: with Llama's 0.02 it would learn half as fast.
        model = make_llama(2000, hidden=128, layers=4, spread=0.06)
        pretrain(model, tokenizer, rows)
        model.save_pretrained(scratch)
        write_json(scratch / MARKER, describe(scratch))


def pretrain(model: "LlamaForCausalLM", tokenizer: "Tokenizer", rows: "list[Row]") -> None:
    """Train all weights for 24 passes over the rows, each in another layout at every pass."""
    import torch

    torch.set_num_threads(1)  # for so narrow a model a second thread mostly waits for the first
    dice, batches = random.Random(0), []
    for _ in range(24):
        examples = [lay_out(row, tokenizer, dice) for row in rows]
        dice.shuffle(examples)
        # Batches of 16, examples of similar length together.
        pools = [sorted(examples[i : i + 128], key=len) for i in range(0, len(examples), 128)]
        mixed = [pool[i : i + 16] for pool in pools for i in range(0, len(pool), 16)]
        batches += dice.sample(mixed, len(mixed))
    steps = len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps + 1, pct_start=0.1)
    model.train()
    for step, batch in enumerate(batches, 1):
        width = max(map(len, batch))
        input_ids = torch.tensor([ids + [2] * (width - len(ids)) for ids in batch])
        labels = torch.tensor([ids + [-100] * (width - len(ids)) for ids in batch])
        loss = model(input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            print(f"  step {step} of {steps}, loss {loss.item():.2f}", file=sys.stderr, flush=True)


def lay_out(row: "Row", tokenizer: "Tokenizer", dice: random.Random) -> "list[int]":
    """Return a row as tokens, in one of the layouts and ended by `</s>`."""
    question = row["instruction"]
    if row["input"]:
        question += dice.choice(("\n\n", "\n", " ")) + row["input"]
    text = dice.choice(LAYOUTS).format(q=question, a=row["output"])
    return [*tokenizer.encode(text).ids, SPECIAL_TOKENS.index("</s>")]


@contextlib.contextmanager
def whole_folder(folder: Path) -> "Iterator[Path]":
    """Give a scratch folder to fill, which then replaces `folder`: whole or not at all."""
    scratch = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)  # of a build that was killed
    scratch.mkdir(parents=True)
    try:
        yield scratch
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def describe(folder: Path) -> "dict[str, object]":
    """Return a hash of all that the demo's model is made from, and the sizes of its files."""
    recipe = hashlib.sha256(Path(__file__).read_bytes() + SAMPLE.read_bytes()).hexdigest()
    files = (path for path in folder.glob("[!.]*") if path.name != MARKER)
    return {"recipe": recipe, "files": {path.name: path.stat().st_size for path in files}}


def is_current(folder: Path) -> bool:
    """Tell whether `folder` holds the whole model that this script would build."""
    try:
        return bool(json.loads((folder / MARKER).read_text("utf-8")) == describe(folder))
    except (OSError, ValueError):
        return False


def main(folder: Path) -> int:
    """Build the demo's model unless it is there, and return the exit code."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two demos at once: the second waits, then finds it
            if not is_current(folder):
                told = "Making the demo's base model; this takes about a minute, once."
                print(told, file=sys.stderr, flush=True)  # stdout belongs to the program
                build_demo_model(folder)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"make_demo_model.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit((__doc__ or "").split("\n\n")[1])
    sys.exit(main(Path(sys.argv[1])))
