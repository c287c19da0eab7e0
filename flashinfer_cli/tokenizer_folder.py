"""The tokenizer of a Hugging Face folder: tokenizer.json, what tokenizer_config.json adds, and the chat templates."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from .chat_template import DEFAULT
from .errors import TokenizerError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
NO_TOKENIZER_HINT = "Text needs a tokenizer; without one, give token ids."


@dataclass
class TokenizerParts:
    """What a tokenizer is made of, wherever it was read."""

    backend: Backend
    named_tokens: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token, ... as chat templates see them
    eos_token_ids: tuple[int, ...] = ()
    templates: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read_folder(folder: Path) -> TokenizerParts:
    """Read the tokenizer of `folder`; TokenizerError where there is none, or none that can be read."""
    if not folder.is_dir():
        raise TokenizerError(f"{folder} is not a folder with a tokenizer.", NO_TOKENIZER_HINT)
    config = _json(folder / "tokenizer_config.json")
    named = {**_json(folder / "special_tokens_map.json"), **config}
    parts = TokenizerParts(_backend(folder, config))
    parts.backend.no_truncation()
    parts.backend.no_padding()
    if parts.backend.normalizer is None and str(config.get("tokenizer_class")).startswith("Qwen2Tokenizer"):
        # Qwen composes Unicode, which the tokenizer.json files that transformers makes of GGUF files leave to the class
        parts.backend.normalizer = normalizers.NFC()
    parts.named_tokens = {name: text for name in NAMED_TOKENS if (text := token_text(named.get(name)))}
    _add_tokens(parts, config.get("added_tokens_decoder") or {}, named)
    if any(config.get(flag) is not None for flag in ("add_bos_token", "add_eos_token")):
        set_special_ends(parts, bos=bool(config.get("add_bos_token")), eos=bool(config.get("add_eos_token")))
    parts.eos_token_ids = _eos_ids(folder, config, parts)
    parts.templates = _templates(folder, config)
    return parts


def set_special_ends(parts: TokenizerParts, *, bos: bool, eos: bool) -> None:
    """Make `encode` put the BOS token before, the EOS token after, or neither; an end that has no token is left out."""
    ends: dict[str, dict[str, Any]] = {}
    for name, wanted in (("bos_token", bos), ("eos_token", eos)):
        token = parts.named_tokens.get(name)
        token_id = parts.backend.token_to_id(token) if token else None
        if wanted and token_id is not None:
            # Named by its role: the token itself may hold spaces and colons, which a template reads as its own
            ends[name] = {"id": name, "ids": [token_id], "tokens": [token]}
    before, after = ([name] if name in ends else [] for name in ("bos_token", "eos_token"))
    parts.backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=list(ends.values()),
    )


def token_text(value: Any) -> str | None:
    """A token as the files of a tokenizer write it: a string, or a mapping with a "content"."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) and text else None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} does not hold a JSON object.")
    return content


def _backend(folder: Path, config: Mapping[str, Any]) -> Backend:
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return Backend.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            with path.open("rb") as file:
                pointer = file.read(40).startswith(b"version https://git-lfs")
            hint = "It is a git-lfs pointer: run `git lfs pull` in its folder." if pointer else None
            raise TokenizerError(f"{path} cannot be read: {str(error).rstrip('.')}.", hint) from error
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _byte_level(folder, config)
    if any((folder / name).is_file() for name in ("tokenizer.model", "spiece.model")):
        raise TokenizerError(
            f"{folder} has its tokenizer only as a SentencePiece model, which is not read directly.",
            "Load it once with transformers' AutoTokenizer and save_pretrained; that writes the tokenizer.json to use.",
        )
    raise TokenizerError(f"{folder} has no tokenizer.json.", NO_TOKENIZER_HINT)


def _byte_level(folder: Path, config: Mapping[str, Any]) -> Backend:
    """GPT-2's two files, the only form in which the first OPT models were published."""
    try:
        model = BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:
        raise TokenizerError(f"vocab.json and merges.txt of {folder} cannot be read: {error}.") from error
    backend = Backend(model)
    prefix = bool(config.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(parts: TokenizerParts, decoder: Mapping[str, Any], named: Mapping[str, Any]) -> None:
    """Tokens that tokenizer_config.json has and tokenizer.json lacks or has with other flags; then the special ones."""
    backend = parts.backend
    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    wanted: dict[str, AddedToken] = {}
    for key, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        token = AddedToken(entry["content"], **{flag: bool(entry[flag]) for flag in flags if flag in entry})
        if present.get(token.content) != token:
            backend.add_tokens([token])
        wanted[token.content] = token
        if (found := backend.token_to_id(token.content)) != int(key):
            parts.warnings.append(
                f"tokenizer_config.json gives '{token.content}' the id {key}; the tokenizer has {found}."
            )
    extra = named.get("additional_special_tokens") or named.get("extra_special_tokens") or []
    texts = [*parts.named_tokens.values(), *_texts(extra.values() if isinstance(extra, Mapping) else extra)]
    for text in dict.fromkeys(texts):
        if backend.token_to_id(text) is None:
            parts.warnings.append(f"The special token '{text}' is not in the vocabulary.")
        elif text not in present and text not in wanted:
            backend.add_special_tokens([AddedToken(text, normalized=False, special=True)])
    parts.named_tokens = {
        name: text for name, text in parts.named_tokens.items() if backend.token_to_id(text) is not None
    }


def _texts(values: Iterable[Any]) -> list[str]:
    return [text for value in values if (text := token_text(value))]


def _eos_ids(folder: Path, config: Mapping[str, Any], parts: TokenizerParts) -> tuple[int, ...]:
    """The ids that end an answer: generation_config.json's, else config.json's; and always the tokenizer's own."""
    found: list[int] = []
    own = config.get("eos_token_ids")  # what Tokenizer.save wrote
    for value in (
        own,
        _json(folder / "generation_config.json").get("eos_token_id"),
        _json(folder / "config.json").get("eos_token_id"),
    ):
        if value is not None:
            found = [int(token_id) for token_id in (value if isinstance(value, list) else [value])]
            break
    eos = parts.named_tokens.get("eos_token")
    if eos is not None and (eos_id := parts.backend.token_to_id(eos)) is not None:
        found.append(eos_id)
    return tuple(dict.fromkeys(found))


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Files win over tokenizer_config.json, as they do in transformers."""
    templates: dict[str, str] = {}
    inline = config.get("chat_template")
    if isinstance(inline, str):
        templates[DEFAULT] = inline
    elif isinstance(inline, list):
        templates |= {str(entry["name"]): str(entry["template"]) for entry in inline}
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files[DEFAULT] = folder / "chat_template.jinja"
    for name, path in files.items():
        try:
            templates[name] = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{path} cannot be read: {error}.") from error
    return templates
