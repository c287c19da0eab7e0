"""Token ids to text, one id at a time, never in the middle of a character.

A tokenizer's decoder is a list of small steps. Those that language models use all work token by token: each token
stands for some bytes, and text is those bytes read as UTF-8. So the whole text is never decoded again to learn what one
more token adds, and `decode` of a list is by construction the concatenation of what a stream gives for it.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .errors import TokenizerError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """The 256 characters that spell bytes in GPT-2's vocabularies: visible Latin-1 as it is, the rest from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


@dataclass(frozen=True)
class PieceDecoder:
    """What one token adds to the text, in bytes; read from the decoder of a tokenizer.json by `from_state`."""

    replacements: tuple[Callable[[str], str], ...] = ()
    alphabet: dict[str, int] | None = None  # byte-level: characters that stand for bytes
    byte_fallback: bool = False  # <0xE4> stands for that byte
    metaspace: str | None = None  # the character that stands for a space
    drop_first_metaspace: bool = False
    separator: str = ""  # between tokens, where a tokenizer names no decoder at all
    strip: str = ""  # this character goes, up to strip_count times, from the start of the text
    strip_count: int = 0

    @classmethod
    def from_state(cls, state: dict[str, Any] | None) -> PieceDecoder:
        """`state` is the "decoder" of a tokenizer.json; TokenizerError names a step that we do not know."""
        if state is None:
            return cls(separator=" ")
        fields: dict[str, Any] = {}
        replacements: list[Callable[[str], str]] = []
        fused = False
        for step in _steps(state):
            kind = step.get("type")
            if kind == "ByteLevel":
                fields["alphabet"] = byte_alphabet()
            elif kind == "ByteFallback":
                fields["byte_fallback"] = True
            elif kind == "Fuse":
                fused = True
            elif kind == "Replace":
                replacements.append(_replacement(step))
            elif kind == "Metaspace":
                fields["metaspace"] = step["replacement"]
                fields["drop_first_metaspace"] = step.get("prepend_scheme", "always") != "never"
            elif kind == "Strip" and fused and not step.get("stop"):
                fields |= {"strip": step["content"], "strip_count": int(step["start"])}
            else:
                raise TokenizerError(
                    f"The tokenizer decodes with '{kind}', which is not supported.",
                    "Token ids still work where text is not needed.",
                )
        return cls(replacements=tuple(replacements), **fields)

    def piece(self, token: str, first: bool) -> bytes:
        """The bytes of `token`; `first` where no token stands before it."""
        for replace in self.replacements:
            token = replace(token)
        if self.metaspace is not None:
            token = token.replace(self.metaspace, "" if first and self.drop_first_metaspace else " ")
        if self.alphabet is not None:
            try:
                return bytes([self.alphabet[character] for character in token])
            except KeyError:  # an added token, spelled as it reads
                return token.encode()
        if self.byte_fallback and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return (token if first else self.separator + token).encode()


def _steps(state: dict[str, Any]) -> Iterable[dict[str, Any]]:
    if state.get("type") != "Sequence":
        return [state]
    return [inner for step in state["decoders"] for inner in _steps(step)]


def _replacement(step: dict[str, Any]) -> Callable[[str], str]:
    content = str(step["content"])
    pattern = step["pattern"]
    if "String" in pattern:
        literal = str(pattern["String"])
        return lambda text: text.replace(literal, content)
    try:
        compiled = re.compile(pattern["Regex"])
    except re.error as error:
        raise TokenizerError(f"The tokenizer's decoder has the pattern {pattern['Regex']!r}: {error}.") from error
    return lambda text: compiled.sub(lambda _: content, text)


class TextStream:
    """Text of one growing sequence. The pieces `push` returns, and `flush` at the end, join to what `decode` gives.

    A character whose bytes are spread over tokens appears with the last of them. Bytes that are no UTF-8 become U+FFFD.
    """

    def __init__(
        self, decoder: PieceDecoder, token_of: Callable[[int], str | None], hidden: frozenset[int] = frozenset()
    ) -> None:
        self._decoder = decoder
        self._token_of = token_of
        self._hidden = hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._first = True
        self._to_strip = decoder.strip_count

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; often empty inside of a character, and for ids that are no token."""
        token = None if token_id in self._hidden else self._token_of(token_id)
        if token is None:
            return ""
        piece = self._decoder.piece(token, self._first)
        self._first = False
        return self._stripped(self._utf8.decode(piece))

    def flush(self) -> str:
        """What is left of an unfinished character, as U+FFFD; the stream may not be used again."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while text and self._to_strip:
            if text[0] != self._decoder.strip:
                self._to_strip = 0
            else:
                text, self._to_strip = text[1:], self._to_strip - 1
        return text
