"""Tiny tokenizers made on the spot, and texts that are hard for them: what the tests of tokenizers share."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from flashinfer_cli.tokenizer import Tokenizer

CORPUS = [
    "the cat sat on the mat, the cat ate the rat; that's 12345 rats in 1999!",
    "naïve café, 你好世界 你好, 😀😃 😀, привет мир\n\n    return x  # done\n",
    "don't we'll THE Cat  sat   on    top of the hill and the rest of the theatre",
]
NASTY = [
    "", " ", "  ", " leading", "trailing ", "a  b   c    d", "\n", "\n\n\n", "\t\tx", "a\r\nb\r\n", " " * 40 + "x",
    "I'm you're HE'LL don'T", "1234567890 3.14159 2,000,000", "你好，世界！", "日本語のテキスト", "한국어", "ไทย",
    "नमस्ते", "😀😃👩‍👩‍👧‍👦🇩🇪", "naïve café", "مرحبا بالعالم", "\u200b\u200d\ufeff", "\x00\x01\x7f", "▁▁ ▁a",
    "<0x0A><0xE4>", "<|im_start|>user\nhi<|im_end|>", "<bos><eos><unk><pad>", "<tool_call>x</tool_call>",
    "<end_of_turn>\n<table><td>", "def f(x):\n    return x**2  # ok\n", "https://example.com/a?b=c&d=%20",
    "𝔘𝔫𝔦", "a" * 30, "!!!???...---", "\u00a0x\u3000y",
]  # fmt: skip
TEXTS = st.text(max_size=40) | st.lists(st.sampled_from(["the", " cat", "😀", "你好", "  ", "\n", "é", "<0x"])).map(
    "".join
)


@cache
def byte_level() -> Backend:
    """Byte-level BPE as GPT-2's, with three special tokens and one user-defined."""
    backend = Backend(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return backend


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    """What a GGUF file would say of `byte_level`."""
    backend = byte_level()
    model = json.loads(backend.to_str())["model"]
    size = backend.get_vocab_size()
    added = backend.get_added_tokens_decoder()
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [backend.id_to_token(i) for i in range(size)],
        "tokenizer.ggml.token_type": [(3 if added[i].special else 4) if i in added else 1 for i in range(size)],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


@cache
def sentencepiece_vocabulary() -> tuple[tuple[str, ...], tuple[float, ...], tuple[int, ...]]:
    """(tokens, scores, types) of a SentencePiece-like vocabulary with byte fallback, scored by rank."""
    words = ("th", "▁t", "▁th", "the", "▁the", "at", "▁c", "▁cat", "▁s", "▁sat", "▁▁", "▁▁▁▁")
    pieces = ["▁", *"abcdehimnorstuvwxé.,", *words]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
    return tuple(tokens), tuple(scores), tuple(types)


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    tokens, scores, types = sentencepiece_vocabulary()
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.scores": list(scores),
        "tokenizer.ggml.token_type": list(types),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


@cache
def both() -> tuple[Tokenizer, ...]:
    return Tokenizer.from_gguf(byte_level_metadata()), Tokenizer.from_gguf(sentencepiece_metadata())


def folder_of(backend: Backend, folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special)
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


CHAT = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "Yes?"}]
