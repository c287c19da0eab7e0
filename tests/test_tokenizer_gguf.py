"""Tokenizers made of GGUF metadata: the same ids and texts as those of the model they stand for."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from tokenizer_samples import (
    CHAT,
    CORPUS,
    NASTY,
    TEXTS,
    both,
    byte_level,
    byte_level_metadata,
    sentencepiece_metadata,
    sentencepiece_vocabulary,
    streamed,
)

from flashinfer_cli.errors import TokenizerError
from flashinfer_cli.tokenizer import Tokenizer, load_tokenizer
from flashinfer_cli.tokenizer_pre import PRE_TOKENIZERS


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
