"""The tokenizer inside a GGUF file, rebuilt from its metadata (`tokenizer.ggml.*`).

Two kinds are in use for language models: "gpt2", byte-level BPE with its merges and the *name* of a pre-tokenizer, and
"llama", SentencePiece BPE, which has scores instead of merges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, normalizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from .chat_template import DEFAULT
from .errors import TokenizerError
from .tokenizer_folder import NO_TOKENIZER_HINT, TokenizerParts, set_special_ends
from .tokenizer_pre import FALLBACK, PRE_TOKENIZERS

PREFIX = "tokenizer.ggml."
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # token types; 1 is normal, 5 unused
SPACE = "▁"  # U+2581, SentencePiece's space

# Ends of a turn by their well-known spellings: files name one EOS, and chat models end with another as often as not.
END_TOKENS = frozenset(
    (
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<｜end▁of▁sentence｜>",
    )
)
# gpt-oss ends every message of an answer with <|end|>, its thoughts too, and the answer with one of these.
HARMONY_ENDS = frozenset(("<|return|>", "<|call|>"))


def read_gguf(metadata: Mapping[str, Any]) -> TokenizerParts:
    """Build the tokenizer that `metadata`, the key-values of a GGUF file, describes.

    TokenizerError: no tokenizer in the file, a kind that is not supported, or lists that contradict each other.
    """
    kind = metadata.get(PREFIX + "model")
    tokens = metadata.get(PREFIX + "tokens")
    if kind is None or kind in ("none", "no_vocab") or tokens is None:
        raise TokenizerError("The GGUF file holds no tokenizer.", NO_TOKENIZER_HINT)
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(
            f"The GGUF file has a tokenizer of the kind '{kind}', which is not supported.",
            "Supported are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece); token ids work without one.",
        )
    types = metadata.get(PREFIX + "token_type")
    if types is not None and len(types) != len(tokens):
        raise TokenizerError(f"The GGUF file has {len(tokens)} tokens and {len(types)} token types.")
    types = np.asarray(types if types is not None else np.ones(len(tokens)), dtype=np.int32)
    build = _byte_level if kind == "gpt2" else _sentencepiece
    parts, spelled, add_bos = build(metadata, list(tokens), types)
    _add_special_tokens(parts.backend, metadata, spelled, types)
    parts.named_tokens = _named_tokens(metadata, spelled, sentencepiece=kind == "llama")
    set_special_ends(
        parts,
        bos=bool(metadata.get(PREFIX + "add_bos_token", add_bos)),
        eos=bool(metadata.get(PREFIX + "add_eos_token", False)),
    )
    parts.eos_token_ids = _eos_ids(metadata, parts, spelled, types)
    parts.templates = _templates(metadata)
    return parts


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    for index, token in enumerate(tokens):
        if not token:
            tokens[index] = f"[EMPTY_{index}]"
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        index, token = next((i, token) for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise TokenizerError(f"The GGUF file has the token {token!r} twice, as {index} and as {vocabulary[token]}.")
    return vocabulary


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], types: np.ndarray
) -> tuple[TokenizerParts, list[str], bool]:
    merges = metadata.get(PREFIX + "merges")
    if merges is None:
        raise TokenizerError("The GGUF file has a byte-level tokenizer without its merges.")
    warnings = []
    name = metadata.get(PREFIX + "pre")
    row = PRE_TOKENIZERS.get(str(name))
    if row is None:
        row = PRE_TOKENIZERS[FALLBACK]
        said = "names no pre-tokenizer" if name is None else f"names the pre-tokenizer '{name}', which is not known"
        warnings.append(f"The GGUF file {said}; GPT-2's is used, and some text may be cut into other tokens.")
    # A merge is two tokens with a space between; a token may begin with a space of its own, never hold one further on
    pairs = [_split_merge(merge) for merge in merges]
    backend = Backend(_bpe(vocab=_vocabulary(tokens), merges=pairs, ignore_merges=row.ignore_merges))
    if row.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = row.build()
    backend.decoder = decoders.ByteLevel()
    return TokenizerParts(backend, warnings=warnings), tokens, row.add_bos


def _split_merge(merge: str) -> tuple[str, str]:
    place = merge.find(" ", 1)
    if place < 0:
        raise TokenizerError(f"The GGUF file has the merge {merge!r}, which is not two tokens.")
    return merge[:place], merge[place + 1 :]


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: np.ndarray
) -> tuple[TokenizerParts, list[str], bool]:
    present = set(tokens)
    for index, token in enumerate(tokens):
        # Gemma's files write runs of spaces as they are; text reaches the merges with every space as U+2581
        if len(token) > 1 and not token.strip(" ") and SPACE * len(token) not in present:
            tokens[index] = SPACE * len(token)
    vocabulary = _vocabulary(tokens)
    gemma = str(metadata.get("general.architecture", "")).startswith("gemma")
    scores = metadata.get(PREFIX + "scores")
    if gemma or scores is None:
        # Gemma's scores are no order of merges (its runs of spaces all have -1000); its ids are
        scores = -np.arange(len(tokens))
    elif len(scores) != len(tokens):
        raise TokenizerError(f"The GGUF file has {len(tokens)} tokens and {len(scores)} scores.")
    unknown = int(metadata.get(PREFIX + "unknown_token_id", 0))
    model = _bpe(
        vocab=vocabulary,
        merges=merges_from_scores(tokens, vocabulary, np.asarray(scores, dtype=np.float64), types),
        unk_token=tokens[unknown] if 0 <= unknown < len(tokens) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Backend(model)
    prefix = bool(metadata.get(PREFIX + "add_space_prefix", not gemma))
    to_space: list[Any] = [normalizers.Replace(" ", SPACE)]
    from_space: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        to_space.insert(0, normalizers.Prepend(SPACE))
        from_space.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(to_space)
    backend.decoder = decoders.Sequence(from_space)
    return TokenizerParts(backend), tokens, True


def merges_from_scores(
    tokens: Sequence[str], vocabulary: Mapping[str, int], scores: np.ndarray, types: np.ndarray
) -> list[tuple[str, str]]:
    """SentencePiece BPE joins the neighbours whose joint piece scores best. As merges: every split of every piece into
    two others, best score first, and of one piece the split with the longest left half first.

    `scores` and `types` are [V]. Control, unknown and byte tokens are never made of text, nor are they parts of it.
    """
    text_only = ~np.isin(types, (UNKNOWN, CONTROL, BYTE))
    lefts: list[int] = []
    rights: list[int] = []
    for index in np.flatnonzero(text_only).tolist():
        token = tokens[index]
        for place in range(len(token) - 1, 0, -1):
            left = vocabulary.get(token[:place])
            if left is None:
                continue
            right = vocabulary.get(token[place:])
            if right is not None and text_only[left] and text_only[right]:
                lefts.append(left)
                rights.append(right)
    left_ids, right_ids = np.array(lefts, dtype=np.int64), np.array(rights, dtype=np.int64)
    if not lefts:
        return []
    joint = np.array([vocabulary[tokens[left] + tokens[right]] for left, right in zip(lefts, rights, strict=True)])
    lengths = np.array([len(token) for token in tokens])
    order = np.lexsort((-lengths[right_ids], -lengths[left_ids], -scores[joint]))
    return [(tokens[left_ids[place]], tokens[right_ids[place]]) for place in order.tolist()]


def _bpe(**arguments: Any) -> BPE:
    try:
        return BPE(**arguments)
    except Exception as error:  # the library raises a bare Exception
        raise TokenizerError(f"The GGUF file's tokenizer cannot be built: {str(error).rstrip('.')}.") from error


def _add_special_tokens(backend: Backend, metadata: Mapping[str, Any], tokens: list[str], types: np.ndarray) -> None:
    """Tokens that are matched whole in any text: control tokens, which `decode` can hide, and user-defined ones."""
    # Phi-3's turns are written "<|end|>\n" and mean the token alone: its control tokens take the blanks after them
    phi3 = metadata.get("general.architecture") == "phi3" and metadata.get(PREFIX + "model") == "llama"
    keep_blanks = {"<unk>", "<s>", "<|endoftext|>"}
    added = []
    for index in np.flatnonzero(np.isin(types, (UNKNOWN, CONTROL, USER_DEFINED))).tolist():
        token, special = tokens[index], bool(types[index] != USER_DEFINED)
        if not special and not token.strip(SPACE):
            continue  # runs of spaces: the merges make them
        rstrip = phi3 and special and token not in keep_blanks
        added.append(AddedToken(token, normalized=False, special=special, rstrip=rstrip))
    backend.add_tokens(added)


def _named_tokens(metadata: Mapping[str, Any], tokens: list[str], *, sentencepiece: bool) -> dict[str, str]:
    keys = {
        "bos_token": "bos",
        "eos_token": "eos",
        "unk_token": "unknown",
        "pad_token": "padding",
        "sep_token": "seperator",
    }
    defaults = {"bos_token": 1, "eos_token": 2, "unk_token": 0} if sentencepiece else {}
    named = {}
    for name, key in keys.items():
        token_id = metadata.get(f"{PREFIX}{key}_token_id", defaults.get(name))
        if token_id is not None and 0 <= int(token_id) < len(tokens):
            named[name] = tokens[int(token_id)]
    return named


def _eos_ids(
    metadata: Mapping[str, Any], parts: TokenizerParts, tokens: list[str], types: np.ndarray
) -> tuple[int, ...]:
    found = []
    if (eos := parts.named_tokens.get("eos_token")) is not None:
        found.append(parts.backend.token_to_id(eos))
    for key in ("eot", "eom"):
        token_id = metadata.get(f"{PREFIX}{key}_token_id")
        if token_id is not None and 0 <= int(token_id) < len(tokens):
            found.append(int(token_id))
    control = np.flatnonzero(types == CONTROL).tolist()
    harmony = {tokens[index] for index in control} >= HARMONY_ENDS
    ends = (END_TOKENS | HARMONY_ENDS) - {"<|end|>"} if harmony else END_TOKENS
    found += [index for index in control if tokens[index] in ends]
    return tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    templates = {}
    if isinstance(plain := metadata.get("tokenizer.chat_template"), str):
        templates[DEFAULT] = plain
    for name in metadata.get("tokenizer.chat_templates") or ():
        if isinstance(text := metadata.get(f"tokenizer.chat_template.{name}"), str):
            templates[str(name)] = text
    return templates
