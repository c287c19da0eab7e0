"""Tokenizers: every way in, text that streams without splitting a character, templates that cannot get out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, Unigram, WordLevel

from flashinfer_cli.errors import StorageError, TokenizerError
from flashinfer_cli.tokenizer import Tokenizer, load_tokenizer
from flashinfer_cli.tokenizer_folder import TokenizerParts
from flashinfer_cli.tokenizer_pre import PRE_TOKENIZERS
from flashinfer_cli.tokenizer_stream import byte_alphabet

CORPUS = [
    "the cat sat on the mat, the cat ate the rat; that's 12345 rats in 1999!",
    "naïve café, 你好世界 你好, 😀😃 😀, привет мир\n\n    return x  # done\n",
    "don't we'll THE Cat  sat   on    top of the hill and the rest of the theatre",
]
NASTY = [
    *("", " ", "  ", " leading", "trailing ", "a  b   c    d", "\n", "\n\n\n", "\t\tx", "a\r\nb\r\n", " " * 40 + "x"),
    *(
        "I'm you're HE'LL don'T",
        "1234567890 3.14159 2,000,000",
        "你好，世界！",
        "日本語のテキスト",
        "한국어",
        "ไทย",
        "नमस्ते",
    ),
    *("😀😃👩‍👩‍👧‍👦🇩🇪", "naïve café", "مرحبا بالعالم", "\u200b\u200d\ufeff", "\x00\x01\x7f", "▁▁ ▁a", "<0x0A><0xE4>"),
    *(
        "<|im_start|>user\nhi<|im_end|>",
        "<bos><eos><unk><pad>",
        "<tool_call>x</tool_call>",
        "<end_of_turn>\n<table><td>",
    ),
    *(
        "def f(x):\n    return x**2  # ok\n",
        "https://example.com/a?b=c&d=%20",
        "𝔘𝔫𝔦",
        "a" * 30,
        "!!!???...---",
        "\u00a0x\u3000y",
    ),
]
TEXTS = st.text(max_size=40) | st.lists(st.sampled_from(["the", " cat", "😀", "你好", "  ", "\n", "é", "<0x"])).map(
    "".join
)


# ---- tiny tokenizers, made on the spot


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
    pieces = [
        "▁",
        *"abcdehimnorstuvwxé.,",
        "th",
        "▁t",
        "▁th",
        "the",
        "▁the",
        "at",
        "▁c",
        "▁cat",
        "▁s",
        "▁sat",
        "▁▁",
        "▁▁▁▁",
    ]
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


def with_templates(templates: dict[str, str], **named: str) -> Tokenizer:
    return Tokenizer(TokenizerParts(byte_level(), named_tokens=named, templates=templates))


# ---- streaming


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(text=TEXTS)
def test_streamed_text_is_the_text(text: str) -> None:
    for tokenizer in both():
        ids = tokenizer.encode(text, add_special=False)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == text
        assert len(pieces) == len(ids) + 1


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(ids=st.lists(st.integers(0, 400), max_size=30), skip=st.booleans())
def test_any_ids_stream_as_the_library_decodes_them(ids: list[int], skip: bool) -> None:
    tokenizer = both()[0]
    library = byte_level().decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip) == library


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(ids=st.lists(st.integers(0, 292), max_size=30), skip=st.booleans())
def test_byte_fallback_streams_any_ids(ids: list[int], skip: bool) -> None:
    tokenizer = both()[1]
    whole = tokenizer.decode(ids, skip)
    assert "".join(streamed(tokenizer, ids, skip)) == whole
    if "\ufffd" not in whole:  # the library makes one U+FFFD of each byte of a run, the valid ones of it too
        assert whole == tokenizer._backend.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("character", ["😀", "你", "é", "👩‍👧"])
def test_a_character_comes_with_its_last_byte(character: str) -> None:
    for tokenizer in (both()[0], Tokenizer.from_gguf(sentencepiece_metadata(add_space_prefix=False))):
        ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
        if None in ids:
            spelled = {byte: character for character, byte in byte_alphabet().items()}
            ids = [tokenizer.token_to_id(spelled[byte]) for byte in character.encode()]
        pieces = streamed(tokenizer, ids)  # type: ignore[arg-type]
        assert [piece for piece in pieces if piece] == list(character)
        assert pieces[len(character[0].encode()) - 1] == character[0]


def test_unfinished_bytes_are_flushed_as_a_replacement() -> None:
    tokenizer = both()[1]
    first, second = (tokenizer.token_to_id(token) for token in ("<0xE4>", "<0xBD>"))
    assert streamed(tokenizer, [first, second]) == ["", "", "\ufffd"]  # type: ignore[list-item]
    assert tokenizer.decode([first, tokenizer.token_to_id("the")]) == "\ufffdthe"  # type: ignore[list-item]


def test_only_the_first_prefix_space_is_taken_away() -> None:
    tokenizer = both()[1]
    assert tokenizer.decode(tokenizer.encode("the the")) == "the the"
    assert tokenizer.decode(tokenizer.encode("  the")) == "  the"
    bos, the = 1, tokenizer.token_to_id("▁the")
    assert tokenizer.decode([bos, the, the]) == "the the"  # type: ignore[list-item]
    assert tokenizer.decode([bos, the], skip_special=False) == "<s> the"  # type: ignore[list-item]


def test_special_tokens_hide_and_user_defined_ones_do_not() -> None:
    tokenizer = both()[0]
    ids = tokenizer.encode("<|im_start|>the<tool><|im_end|>")
    assert tokenizer.decode(ids) == "the<tool>"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>the<tool><|im_end|>"
    assert tokenizer.decode([10**6, *ids]) == "the<tool>"


@pytest.mark.parametrize(
    ("decoder", "tokens", "text"),
    [
        (decoders.Metaspace(), ["▁the", "▁cat"], "the cat"),
        (decoders.Metaspace(prepend_scheme="never"), ["▁the", "▁cat"], " the cat"),
        (None, ["the", "cat"], "the cat"),
    ],
)
def test_other_decoders_agree_with_the_library(decoder: Any, tokens: list[str], text: str) -> None:
    backend = Backend(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    if decoder is not None:
        backend.decoder = decoder
    tokenizer = Tokenizer(TokenizerParts(backend))
    assert tokenizer.decode([0, 1]) == text == backend.decode([0, 1])


def test_a_decoder_we_do_not_know_is_named() -> None:
    backend = Backend(WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoders.CTC()
    with pytest.raises(TokenizerError, match="CTC"):
        Tokenizer(TokenizerParts(backend)).decode([0])


# ---- GGUF metadata


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(text=TEXTS)
def test_byte_level_from_gguf_is_the_same_tokenizer(text: str) -> None:
    assert both()[0].encode(text) == byte_level().encode(text).ids


def test_sentencepiece_from_gguf_joins_by_score() -> None:
    tokenizer = both()[1]

    def cut(text: str) -> list[str | None]:
        return [tokenizer.id_to_token(i) for i in tokenizer.encode(text, add_special=False)]

    assert cut("the cat") == ["▁the", "▁cat"]
    assert cut("that") == ["▁th", "at"]
    assert cut("  the") == ["▁▁", "▁the"]
    assert cut("你") == ["▁", "<0xE4>", "<0xBD>", "<0xA0>"]
    assert cut("<0xE4>")[:3] == ["▁", "<0x3C>", "<0x30>"]  # written-out bytes are text
    assert cut("a</s>a") == ["▁", "a", "</s>", "▁", "a"]
    assert tokenizer.encode("the") == [1, tokenizer.token_to_id("▁the")]


def test_sentencepiece_itself_agrees(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(CORPUS * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "m"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    ids = range(oracle.get_piece_size())
    types = [2 if oracle.is_unknown(i) else 3 if oracle.is_control(i) else 6 if oracle.is_byte(i) else 1 for i in ids]
    tokenizer = Tokenizer.from_gguf(
        sentencepiece_metadata(
            tokens=[oracle.id_to_piece(i) for i in ids], scores=[oracle.get_score(i) for i in ids], token_type=types
        )
    )
    for text in [*CORPUS, *(text for text in NASTY if "<" not in text and "\0" not in text)]:
        assert tokenizer.encode(text, add_special=False) == oracle.encode(text), text
        assert tokenizer.decode(oracle.encode(text)) == oracle.decode(oracle.encode(text)), text


@pytest.mark.parametrize(
    ("pre", "text", "cut"),
    [
        ("gpt-2", "don't 12345  x", ["don", "'t", "·12345", "·", "·x"]),
        ("smollm", "in 1999", ["in", "·", "1", "9", "9", "9"]),
        ("llama-bpe", "Don'T 12345\n\n x", ["Don", "'T", "·", "123", "45", "\n\n", "·x"]),
        ("qwen2", "x=12 (y)", ["x", "=", "1", "2", "·(", "y", ")"]),
        ("tekken", "HelloWorld don't 12/\n", ["Hello", "World", "·don", "'t", "·", "1", "2", "/\n"]),
        ("gpt-4o", "HelloWorld don't 1234", ["Hello", "World", "·don't", "·", "123", "4"]),
        ("deepseek-llm", "Hi 42 你好\n", ["Hi", "·", "4", "2", "·", "你好", "\n"]),
        ("deepseek-coder", "a+b 42", ["a", "+", "b", "·", "4", "2"]),
        ("deepseek-v3", "f(x) 1234你好の", ["f", "(x", ")", "·", "123", "4", "你好の"]),
        ("falcon", "a, b 12345", ["a", ",", "·b", "·", "123", "45"]),
        ("viking", "abc, 12", ["abc", ",", "·", "1", "2"]),
    ],
)
def test_pre_tokenizers_cut_as_their_models_do(pre: str, text: str, cut: list[str]) -> None:
    pieces = PRE_TOKENIZERS[pre].build().pre_tokenize_str(text)
    spelled = [text[start:end].replace(" ", "·") for _, (start, end) in pieces]
    assert spelled == cut


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_loses_nothing(pre: str) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(pre=pre))
    assert tokenizer.warnings == []
    for text in [*CORPUS, *NASTY]:
        expected = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[pre].nfc else text
        assert tokenizer.decode(tokenizer.encode(text, add_special=False), skip_special=False) == expected


def test_an_unknown_pre_tokenizer_falls_back_and_says_so() -> None:
    strange = Tokenizer.from_gguf(byte_level_metadata(pre="strange-bpe"))
    assert "strange-bpe" in strange.warnings[0]
    assert strange.encode(CORPUS[0]) == both()[0].encode(CORPUS[0])
    metadata = byte_level_metadata()
    del metadata["tokenizer.ggml.pre"]
    assert len(Tokenizer.from_gguf(metadata).warnings) == 1


def test_bos_and_eos_are_added_as_the_file_says() -> None:
    text = "the cat"
    plain = both()[0].encode(text)
    assert plain[0] != 1  # nothing says that a byte-level tokenizer adds it
    assert Tokenizer.from_gguf(byte_level_metadata(add_bos_token=True)).encode(text) == [1, *plain]
    ends = Tokenizer.from_gguf(byte_level_metadata(add_bos_token=True, add_eos_token=True))
    assert ends.encode(text) == [1, *plain, 2]
    assert ends.encode(text, add_special=False) == plain
    assert Tokenizer.from_gguf(byte_level_metadata(pre="llama-bpe")).encode("the")[0] == 1
    assert Tokenizer.from_gguf(byte_level_metadata(pre="llama-bpe", add_bos_token=False)).encode("the")[0] != 1


def test_llama3_takes_whole_words_before_merges() -> None:
    metadata = byte_level_metadata(pre="llama-bpe", add_bos_token=False)
    metadata["tokenizer.ggml.tokens"].append("zqzq")
    metadata["tokenizer.ggml.token_type"].append(1)
    whole = Tokenizer.from_gguf(metadata)
    assert whole.encode("zqzq") == [whole.vocab_size - 1]
    metadata["tokenizer.ggml.pre"] = "dbrx"
    assert len(Tokenizer.from_gguf(metadata).encode("zqzq")) == 4


def test_ends_of_turn_are_found() -> None:
    tokenizer = both()[0]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2, 0))  # <|endoftext|> too, by its name
    assert Tokenizer.from_gguf(byte_level_metadata(eot_token_id=7)).eos_token_ids == (2, 7, 0)
    plain = Tokenizer.from_gguf(byte_level_metadata(token_type=[1] * byte_level().get_vocab_size()))
    assert plain.eos_token_ids == (2,)  # a token of text is no end, whatever it looks like


def test_gpt_oss_ends_messages_and_answers_apart() -> None:
    metadata = byte_level_metadata()
    first = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["<|end|>", "<|return|>"]
    metadata["tokenizer.ggml.token_type"] += [3, 3]
    assert Tokenizer.from_gguf(metadata).eos_token_ids == (2, 0, first)
    metadata["tokenizer.ggml.tokens"].append("<|call|>")
    metadata["tokenizer.ggml.token_type"].append(3)
    assert Tokenizer.from_gguf(metadata).eos_token_ids == (2, 0, first + 1, first + 2)


def test_gemma_writes_runs_of_spaces_as_they_are_and_ranks_by_id() -> None:
    tokens, _, types = (list(column) for column in sentencepiece_vocabulary())
    tokens = [token.replace("▁▁▁▁", "    ").replace("▁▁", "  ") if set(token) == {"▁"} else token for token in tokens]
    types = [4 if token.strip(" ") == "" else kind for token, kind in zip(tokens, types, strict=True)]  # type: ignore[attr-defined]
    metadata = sentencepiece_metadata(tokens=tokens, token_type=types, scores=[-1000.0] * len(tokens))
    metadata["general.architecture"] = "gemma3"
    gemma = Tokenizer.from_gguf(metadata)

    def cut(text: str) -> list[str | None]:
        return [gemma.id_to_token(i) for i in gemma.encode(text, add_special=False)]

    assert cut("the    the") == ["the", "▁▁", "▁", "▁the"]
    assert cut("    ") == ["▁▁▁▁"]
    assert gemma.decode(gemma.encode("    the")) == "    the"
    assert gemma.fingerprint() == both()[1].fingerprint()


def test_phi3_turns_swallow_the_blanks_after_them() -> None:
    metadata = sentencepiece_metadata()
    metadata["tokenizer.ggml.tokens"] += ["<|end|>"]
    metadata["tokenizer.ggml.scores"] += [0.0]
    metadata["tokenizer.ggml.token_type"] += [3]
    end = len(metadata["tokenizer.ggml.tokens"]) - 1
    plain = Tokenizer.from_gguf(metadata).encode("<|end|>\n<s>", add_special=False)
    metadata["general.architecture"] = "phi3"
    phi3 = Tokenizer.from_gguf(metadata)
    assert phi3.encode("<|end|>\n<s>", add_special=False) == [end, 1]
    assert len(plain) > 2
    assert end in phi3.eos_token_ids


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "no tokenizer"),
        ({"tokenizer.ggml.model": "none"}, "no tokenizer"),
        ({"tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": ["a"]}, "'t5'"),
        (byte_level_metadata(token_type=[1, 1]), "2 token types"),
        (byte_level_metadata(merges=None), "without its merges"),
        (byte_level_metadata(merges=["ab"]), "'ab'"),
        (byte_level_metadata(merges=["never seen"]), "cannot be built"),
        (byte_level_metadata(tokens=["a"] * byte_level().get_vocab_size()), "twice"),
        (sentencepiece_metadata(scores=[0.0]), "1 scores"),
    ],
)
def test_bad_gguf_metadata_is_one_sentence(metadata: dict[str, Any], words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        Tokenizer.from_gguf(metadata)


def test_fingerprints_tell_vocabularies_apart() -> None:
    tokens = byte_level_metadata()["tokenizer.ggml.tokens"]
    types = byte_level_metadata()["tokenizer.ggml.token_type"]
    same = both()[0].fingerprint()
    padded = byte_level_metadata(tokens=[*tokens, f"[PAD{len(tokens)}]"], token_type=[*types, 5])
    assert Tokenizer.from_gguf(padded).fingerprint() == same
    swapped = [*tokens[:40], tokens[41], tokens[40], *tokens[42:]]
    assert Tokenizer.from_gguf(byte_level_metadata(tokens=swapped)).fingerprint() != same
    assert both()[1].fingerprint() != same


# ---- folders


def test_a_folder_reads_as_the_library_does(tmp_path: Path) -> None:
    folder = folder_of(byte_level(), tmp_path, bos_token="<|im_start|>", eos_token={"content": "<|im_end|>"})
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    assert tokenizer.vocab_size == byte_level().get_vocab_size()
    assert tokenizer.token_to_id("<tool>") == tokenizer.vocab_size - 1
    assert tokenizer.id_to_token(1) == "<|im_start|>"
    assert tokenizer.id_to_token(10**6) is tokenizer.id_to_token(-1) is tokenizer.token_to_id("no such") is None
    assert not tokenizer.has_chat_template
    for text in [*CORPUS, *NASTY]:
        assert tokenizer.encode(text) == byte_level().encode(text).ids


def test_tokenizer_config_adds_what_tokenizer_json_lacks(tmp_path: Path) -> None:
    size = byte_level().get_vocab_size()
    added = {str(size): {"content": "<new>", "special": True, "normalized": False, "lstrip": False}}
    folder = folder_of(
        byte_level(), tmp_path, added_tokens_decoder=added, bos_token="<new>", add_bos_token=True, eos_token="<absent>"
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("a<new>")[0] == size == tokenizer.encode("a<new>")[2]
    assert tokenizer.decode([size]) == ""
    assert tokenizer.eos_token_ids == ()
    assert "<absent>" in tokenizer.warnings[0]


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    backend = Backend.from_str(byte_level().to_str())
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.from_folder(folder_of(backend, tmp_path))
    assert tokenizer.encode(CORPUS[0]) == byte_level().encode(CORPUS[0]).ids


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (2,)),
        ({"config.json": 0}, (0, 2)),
        ({"config.json": 0, "generation_config.json": [5, 6]}, (5, 6, 2)),
    ],
)
def test_eos_ids_come_from_all_who_name_them(tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]) -> None:
    folder = folder_of(byte_level(), tmp_path, eos_token="<|im_end|>")
    for name, value in files.items():
        (folder / name).write_text(json.dumps({"eos_token_id": value}))
    assert Tokenizer.from_folder(folder).eos_token_ids == expected


def test_special_tokens_map_is_read_and_yields_to_the_config(tmp_path: Path) -> None:
    folder = folder_of(byte_level(), tmp_path, eos_token="<|im_end|>")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<tool>", "bos_token": "<|im_start|>"}))
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))


def test_vocab_and_merges_alone_are_enough(tmp_path: Path) -> None:
    plain = Backend(BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    plain.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "</s>", "eos_token": "</s>", "add_bos_token": True})
    )
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode(CORPUS[1]) == [0, *plain.encode(CORPUS[1]).ids]
    assert tokenizer.decode(tokenizer.encode(CORPUS[1])) == CORPUS[1]


def test_folders_without_a_usable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="not a folder"):
        Tokenizer.from_folder(tmp_path / "absent")
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "ids" in str(caught.value.hint)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(TokenizerError, match="SentencePiece") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "save_pretrained" in str(caught.value.hint)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(TokenizerError, match="cannot be read") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "git lfs pull" in str(caught.value.hint)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match="tokenizer_config"):
        Tokenizer.from_folder(tmp_path)


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(TokenizerError, match="Unicode"):
        both()[0].encode("a\udc80")


@pytest.mark.parametrize("kind", [0, 1])
def test_saved_and_read_again(tmp_path: Path, kind: int) -> None:
    metadata = (byte_level_metadata, sentencepiece_metadata)[kind](add_bos_token=True, eot_token_id=9)
    metadata["tokenizer.chat_template"] = "{{ bos_token }}{% for m in messages %}\n{{ m.content }}{% endfor %}"
    metadata["tokenizer.chat_templates"] = ["rag"]
    metadata["tokenizer.chat_template.rag"] = "rag {{ messages[0].content }}"
    original = Tokenizer.from_gguf(metadata)
    original.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again._backend.to_str() == original._backend.to_str()
    assert again.eos_token_ids == original.eos_token_ids
    assert again.bos_token_id == original.bos_token_id == 1
    assert again.fingerprint() == original.fingerprint()
    chat = [{"role": "user", "content": "the cat"}]
    assert again.encode_chat(chat) == original.encode_chat(chat)
    assert again.apply_chat_template(chat, chat_template="rag") == "rag the cat"
    assert again.warnings == []


def test_saving_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        both()[0].save(tmp_path / "file")


def test_load_tokenizer_by_kind_of_checkpoint(tmp_path: Path) -> None:
    folder = folder_of(byte_level(), tmp_path)
    (folder / "model.safetensors").write_bytes(b"")

    def load(kind: str, path: Path, **more: Any) -> Tokenizer:
        return load_tokenizer(SimpleNamespace(kind=kind, path=path, **more))  # type: ignore[arg-type]

    ids = both()[0].encode("the cat")
    assert load("safetensors", folder).encode("the cat") == ids
    assert load("safetensors", folder / "model.safetensors").encode("the cat") == ids
    assert load("gguf", folder / "m.gguf", metadata=byte_level_metadata()).encode("the cat") == ids
    with pytest.raises(TokenizerError) as caught:
        load("gguf", folder / "m.gguf", metadata={})
    assert "ids" in str(caught.value.hint)


def test_importing_needs_no_torch() -> None:
    code = "import sys, flashinfer_cli.tokenizer; sys.exit('torch' in sys.modules or 'jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- chat templates

CHAT = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "Yes?"}]


def render(template: str, messages: Any = CHAT, **extra: Any) -> str:
    return with_templates({"default": template}, bos_token="<s>").apply_chat_template(messages, **extra)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m['content'] }}|{% endfor %}",
            "<s>user:Hi <b>|assistant:Yes?|",
        ),
        ("{% if add_generation_prompt %}>{% endif %}", ">"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # trim_blocks and lstrip_blocks
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi <b>"}'),
        ("{{ {'b': 'é', 'a': 1} | tojson(indent=1) }}", '{\n "b": "é",\n "a": 1\n}'),
        ("{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}", "Yes?"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ 'tools' if tools else 'none' }}{{ eos_token }}{{ thinking }}", "none"),
        (
            "{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ messages[0].content.upper() }}",
            "2HI <B>",
        ),
    ],
)
def test_templates_see_what_they_are_written_for(template: str, text: str) -> None:
    assert render(template) == text


def test_variables_reach_the_template() -> None:
    assert render("{{ thinking }}{{ add_generation_prompt }}", add_generation_prompt=False, thinking=3) == "3False"
    named = with_templates({"default": "plain", "tool_use": "{{ tools | length }} tools", "rag": "rag"})
    assert named.apply_chat_template(CHAT) == "plain"
    assert named.apply_chat_template(CHAT, tools=[{"name": "f"}]) == "1 tools"
    assert named.apply_chat_template(CHAT, chat_template="rag") == "rag"
    with pytest.raises(TokenizerError, match=r"'other'.*default, rag, tool_use"):
        named.apply_chat_template(CHAT, chat_template="other")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.append.__self__.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__['__builtins__'].open('/etc/passwd').read() }}",
        "{{ self._TemplateReference__context.environment.globals.clear() }}",
        "{{ ''|attr('__class__')|attr('mro')() }}",
        "{{ '{0.__class__.__mro__}'.format(1)[0].x.y }}",
        "{% set x = messages.append(1) %}",
        "{% set x = messages[0].update({'a': 1}) %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template: str) -> None:
    with pytest.raises(TokenizerError, match="chat template failed"):
        render(template)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "failed"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ nothing.at.all }}", "nothing"),
    ],
)
def test_template_errors_are_ours(template: str, words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        render(template)


def test_only_plain_values_get_in() -> None:
    with pytest.raises(TokenizerError, match="Path"):
        render("{{ folder.unlink() }}", folder=Path("x"))
    with pytest.raises(TokenizerError, match="role"):
        render("", messages=["hi"])
    with pytest.raises(TokenizerError, match="no chat template"):
        both()[0].apply_chat_template(CHAT)
    assert CHAT[0] == {"role": "user", "content": "Hi <b>"}


def test_chat_ids_have_one_bos() -> None:
    metadata = byte_level_metadata(add_bos_token=True)
    metadata["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    ids = Tokenizer.from_gguf(metadata).encode_chat(CHAT)
    assert ids == [1, *byte_level().encode("Hi <b>").ids, 2]


def test_template_files_win_over_the_config(tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "old"}, {"name": "rag", "template": "rag"}]
    folder = folder_of(byte_level(), tmp_path, chat_template=listed)
    assert Tokenizer.from_folder(folder).apply_chat_template(CHAT) == "old"
    (folder / "chat_template.jinja").write_text("new")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.apply_chat_template(CHAT) == "new"
    assert tokenizer.apply_chat_template(CHAT, chat_template="rag") == "rag"
    assert tokenizer.apply_chat_template(CHAT, tools=[{}]) == "tools"
    assert Tokenizer.from_folder(folder_of(byte_level(), tmp_path / "b", chat_template="{{ 1 }}")).has_chat_template


def test_unigram_with_metaspace(tmp_path: Path) -> None:
    backend = Backend(Unigram([("<unk>", 0.0), ("▁the", -1.0), ("▁", -2.0), ("t", -3.0), ("he", -3.0)], unk_id=0))
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer.from_folder(folder_of(backend, tmp_path))
    ids = tokenizer.encode("the the he")
    assert tokenizer.decode(ids) == "the the he" == backend.decode(ids)


# ---- real models

MODELS = os.environ.get("GENAI_RUN_MODELS")
REAL = sorted(Path(MODELS).glob("*.gguf")) if MODELS else []


@pytest.mark.real
@pytest.mark.skipif(not REAL, reason="GENAI_RUN_MODELS names no folder with GGUF files")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_tokenizers_agree_with_transformers(path: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from flashinfer_cli.checkpoint.gguf import GgufCheckpoint

    folder = path.with_name(path.stem + "-hf")
    if not folder.is_dir():
        pytest.skip(f"{folder.name} is not there")
    gguf, ours = load_tokenizer(GgufCheckpoint(path)), Tokenizer.from_folder(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    gguf.save(tmp_path)
    saved, theirs_saved = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert gguf.fingerprint() == ours.fingerprint() == saved.fingerprint()
    smollm = "SmolLM" in path.name
    for text in [*CORPUS, *NASTY, "e\u0301 A\u030a", "x=1;y=22\n\n333"]:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, special) == ids, text
            assert saved.encode(text, special) == gguf.encode(text, special), text
            assert theirs_saved.encode(text, add_special_tokens=special) == gguf.encode(text, special), text
            # transformers gives GGUF's "smollm" GPT-2's pattern, where SmolLM's own tokenizer.json takes digits apart
            if not (smollm and any(character.isnumeric() for character in text)):
                assert gguf.encode(text, special) == ids, text
        for skip in (True, False):
            whole = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert gguf.decode(ids, skip) == ours.decode(ids, skip) == "".join(streamed(gguf, ids, skip)) == whole
    assert gguf.has_chat_template == bool(theirs.chat_template)
    if gguf.has_chat_template:
        chat = [*CHAT, {"role": "user", "content": "And?"}]
        prompt = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert gguf.apply_chat_template(chat) == ours.apply_chat_template(chat) == prompt
        assert gguf.encode_chat(chat) == theirs.encode(prompt, add_special_tokens=False)
