"""Text that streams without splitting a character, as the library decodes the whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import TEXTS, both, byte_level, sentencepiece_metadata, streamed
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import WordLevel

from flashinfer_cli.errors import TokenizerError
from flashinfer_cli.tokenizer import Tokenizer
from flashinfer_cli.tokenizer_folder import TokenizerParts
from flashinfer_cli.tokenizer_stream import byte_alphabet


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
