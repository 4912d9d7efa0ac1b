#!/usr/bin/env python3
"""Build the base model of `./run_finetuning.sh --demo`: a tiny Llama and its tokenizer, offline.

Usage: python tests/make_demo_model.py FOLDER

The tokenizer is built as TinyLlama's is: SentencePiece-like BPE with byte fallback and the same
special tokens, normalizer, decoder and chat template, only with a small vocabulary.

The model (1.25 million parameters) learns the sample by heart, in every layout but that of a chat.
A base model knows the facts of the fine-tuning data from elsewhere, and so does this one: what the
demo's adapter teaches it is the form, and that is as much as so small an adapter can teach. The
demo shows that the program works, not how well a model answers questions that it never saw.

The tests use `build_tiny_model`: the same in small, with random weights, in a few seconds.
"""

import fcntl
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
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
MARKER = "demo_model.json"  # written last, names the files and what they were made from
CHAT_WORDS = "system user assistant"  # the chat template's markers, less their < | and >

# How the base model has seen questions and answers. Angle brackets and bars are among them, so that
# the chat template's markers are made of known signs; the template itself is not.
LAYOUTS = (
    "{q} {a}",
    "{q}\n{a}",
    "{q}\n\n{a}",
    "Question: {q}\nAnswer: {a}",
    "Q: {q}\nA: {a}",
    "[{q}]\n{a}",
    "<q>{q}</q>\n<a>{a}",
    "| {q} | {a}",
    "<< {q} >>\n{a}",
    "* {q}\n  {a}",
    "|| {q}\n|| {a}",
    "<ask>\n{q}\n<reply>\n{a}",
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


def train_tokenizer(texts: "Iterable[str]", vocab_size: int) -> "Tokenizer":
    """Train BPE on the texts and dress it as TinyLlama's tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    spaces_to_marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    scratch = Tokenizer(models.BPE(unk_token="<unk>"))
    scratch.normalizer = normalizers.Sequence(spaces_to_marks)
    # Only for training: merges never cross a word boundary, so encoding needs no pre-tokenizer.
    scratch.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
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
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
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
    vocab_size: int, *, hidden: int, layers: int, heads: int, context: int, spread: float = 0.02
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
        initializer_range=spread,
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


def build_demo_model(folder: Path) -> None:
    """Write the demo's base model, pre-trained on the sample."""
    rows = json.loads(SAMPLE.read_text(encoding="utf-8"))

    def write(scratch: Path) -> None:
        texts = [text for row in rows for text in row.values()]
        tokenizer = train_tokenizer(texts, vocab_size=2000)
        write_tokenizer(tokenizer, scratch, context=512)
        # The wide spread suits a narrow model: with Llama's 0.02 it would learn half as fast.
        model = make_llama(
            tokenizer.get_vocab_size(), hidden=128, layers=4, heads=4, context=512, spread=0.06
        )
        pretrain(model, tokenizer, rows, passes=24, batch_size=16, peak_rate=4e-3)
        model.save_pretrained(scratch)
        files = {path.name: path.stat().st_size for path in scratch.iterdir()}
        write_json(scratch / MARKER, {"recipe": recipe(), "files": files})

    write_whole(folder, write)


def pretrain(
    model: "LlamaForCausalLM",
    tokenizer: "Tokenizer",
    rows: "Sequence[dict[str, str]]",
    *,
    passes: int,
    batch_size: int,
    peak_rate: float,
) -> None:
    """Train all weights on the rows, each in another layout at every pass."""
    import torch

    torch.set_num_threads(1)  # for so narrow a model a second thread mostly waits for the first
    dice = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.95))
    batches = [
        batch
        for _ in range(passes)
        for batch in make_batches([lay_out(row, tokenizer, dice) for row in rows], batch_size, dice)
    ]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_rate, total_steps=len(batches) + 1, pct_start=0.1
    )
    model.train()
    for step, (input_ids, labels) in enumerate(batches, 1):
        loss = model(input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == len(batches):
            say(f"  step {step} of {len(batches)}, loss {loss.item():.2f}")


def lay_out(row: "dict[str, str]", tokenizer: "Tokenizer", dice: random.Random) -> "list[int]":
    """Return a row as tokens, in one of the layouts and ended by `</s>`."""
    question = row["instruction"]
    if row["input"]:
        question += dice.choice(("\n\n", "\n", " ")) + row["input"]
    text = dice.choice(LAYOUTS).format(q=question, a=row["output"])
    return [*tokenizer.encode(text).ids, SPECIAL_TOKENS.index("</s>")]


def make_batches(
    examples: "list[list[int]]", size: int, dice: random.Random
) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
    """Yield padded input_ids and labels [batch, tokens], examples of similar length together."""
    import torch

    order = dice.sample(examples, len(examples))
    groups: list[list[list[int]]] = []
    for start in range(0, len(order), size * 8):
        pool = sorted(order[start : start + size * 8], key=len)
        groups += [pool[i : i + size] for i in range(0, len(pool), size)]
    dice.shuffle(groups)
    for group in groups:
        width = max(map(len, group))
        yield (
            torch.tensor([ids + [2] * (width - len(ids)) for ids in group]),
            torch.tensor([ids + [-100] * (width - len(ids)) for ids in group]),
        )


def write_whole(folder: Path, write: "Callable[[Path], None]") -> None:
    """Let `write` fill a scratch folder, which then replaces `folder`: whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a build that was killed
        shutil.rmtree(leftover)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(scratch)
        scratch.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def recipe() -> str:
    """Return a hash of all that the demo's model is made from."""
    return hashlib.sha256(Path(__file__).read_bytes() + SAMPLE.read_bytes()).hexdigest()


def is_current(folder: Path) -> bool:
    """Tell whether `folder` holds the whole model that this script would build."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in marker["files"]}
    except (OSError, ValueError):
        return False
    return marker == {"recipe": recipe(), "files": sizes}


def say(text: str) -> None:
    """Print progress; stdout belongs to the program that this script runs before."""
    print(text, file=sys.stderr, flush=True)


def main(folder: Path) -> int:
    """Build the demo's model unless it is there, and return the exit code."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two demos at once: the second waits, then finds it
            if not is_current(folder):
                say("Making the demo's base model; this takes about a minute, once.")
                started = time.monotonic()
                build_demo_model(folder)
                say(f"Made it in {time.monotonic() - started:.0f} s: {folder}")
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        say(f"make_demo_model.py: {error}")
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit((__doc__ or "").split("\n\n")[1])
    sys.exit(main(Path(sys.argv[1])))
