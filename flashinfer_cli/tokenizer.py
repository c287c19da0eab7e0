"""Text at the edge: strings to token ids, ids to strings as they come, conversations to prompts.

`load_tokenizer` finds the tokenizer of any checkpoint: a Hugging Face folder's files or a GGUF file's metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat_template import DEFAULT, ChatTemplates
from .device import release_free_memory
from .errors import StorageError, TokenizerError
from .tokenizer_folder import TokenizerParts, read_folder
from .tokenizer_gguf import read_gguf
from .tokenizer_stream import PieceDecoder, TextStream

if TYPE_CHECKING:
    from .checkpoint.base import Checkpoint

__all__ = ["TextStream", "Tokenizer", "load_tokenizer"]


class Tokenizer:
    """A vocabulary and the two ways through it. The vocabulary itself is held once, by the `tokenizers` library."""

    def __init__(self, parts: TokenizerParts) -> None:
        self._backend = parts.backend
        self._named = parts.named_tokens
        self._templates = ChatTemplates(parts.templates)
        self.eos_token_ids: tuple[int, ...] = parts.eos_token_ids
        self.warnings: list[str] = parts.warnings

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder. TokenizerError: none there, or one that cannot be read."""
        return cls(read_folder(Path(path)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer in the key-values of a GGUF file. TokenizerError: none there, or of a kind we do not know."""
        return cls(read_gguf(metadata))

    # ---- text and ids

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """The ids of `text`; `add_special` adds BOS and EOS where the model wants them. Special tokens written out in
        the text become their ids."""
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special).ids)
        except TypeError as error:  # what the library makes of lone surrogates
            raise TokenizerError("The text holds characters that are not valid Unicode.", "Is it UTF-8?") from error

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD, and ids that are no token become nothing."""
        stream = self.stream(skip_special)
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self, skip_special: bool = True) -> TextStream:
        """A decoder for one sequence of ids as they are made; each sequence needs its own."""
        return TextStream(self._decoder, self.id_to_token, self._special_ids if skip_special else frozenset())

    @cached_property
    def _decoder(self) -> PieceDecoder:
        decoder = self._backend.decoder
        return PieceDecoder.from_state(None if decoder is None else json.loads(decoder.__getstate__()))

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    # ---- the vocabulary

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; a model's own `vocab_size` may be larger, padded."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token_id(self) -> int | None:
        bos = self._named.get("bos_token")
        return None if bos is None else self.token_to_id(bos)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, or None."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (`Ġthe`, `▁the`), or None."""
        found: str | None = self._backend.id_to_token(token_id) if token_id >= 0 else None
        return found

    def fingerprint(self) -> str:
        """SHA-256 over ids and tokens: two models with the same one share ids, as a draft and its target must."""
        digest = hashlib.sha256()
        left = size = self.vocab_size
        for token_id in range(2 * size + 1024):  # ids may have gaps
            token = self.id_to_token(token_id) if left else None
            if token is None:
                continue
            left -= 1
            if token != f"[PAD{token_id}]":  # rows of padding that GGUF files name and folders do not
                digest.update(f"{token_id} {token}\0".encode())
        return digest.hexdigest()

    # ---- conversations

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        """The prompt for a conversation, by the model's own template, which sees `extra` (tools, enable_thinking, ...)
        as its variables; `chat_template="name"` chooses among several. TokenizerError: no template, or it refused."""
        name = extra.pop("chat_template", None)
        variables = {"tools": None, "documents": None, **self._named, **extra}
        return self._templates.render(
            messages, add_generation_prompt=add_generation_prompt, variables=variables, name=name
        )

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> list[int]:
        """The ids of `apply_chat_template`. Templates write the BOS token themselves, so none is added."""
        return self.encode(self.apply_chat_template(messages, add_generation_prompt, **extra), add_special=False)

    # ---- files

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat templates: `from_folder` reads this tokenizer again
        from them, and so does transformers. The folder must exist; StorageError where it cannot be written."""
        target = Path(folder)
        config: dict[str, Any] = {**self._named, "eos_token_ids": list(self.eos_token_ids)}
        config |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
        files = {
            "tokenizer.json": self._backend.to_str(),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        }
        for name, source in self._templates.sources.items():
            files["chat_template.jinja" if name == DEFAULT else f"additional_chat_templates/{name}.jinja"] = source
        try:
            for name, content in files.items():
                (target / name).parent.mkdir(exist_ok=True)
                # newline="": a template's line ends are part of it
                (target / name).write_text(content, encoding="utf-8", newline="")
        except OSError as error:
            raise StorageError(f"The tokenizer cannot be written to {target}: {error.strerror or error}.") from error


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of an opened checkpoint. TokenizerError where there is none: ids work without it, text does not."""
    if checkpoint.kind == "gguf":
        tokenizer = Tokenizer.from_gguf(getattr(checkpoint, "metadata", {}))
    else:
        path = Path(checkpoint.path)
        tokenizer = Tokenizer.from_folder(path if path.is_dir() else path.parent)
    release_free_memory()  # building a vocabulary of 260,000 tokens takes a few times the memory of keeping it
    return tokenizer
