"""How each family of byte-level tokenizers cuts text before its merges, by the name a GGUF file gives it.

The patterns are those of the models' own tokenizer.json files: merges work with the pattern they were learned with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

# Pieces that the patterns share: English contractions in any case, letters by case, and what is left at the end
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _cl100k(digits: str) -> str:
    return rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}"


def _o200k(suffix: str, digits: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{start}{_UPPER}*{_LOWER}+{suffix}|{start}{_UPPER}+{_LOWER}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"


_LLAMA3 = _cl100k(r"\p{N}{1,3}")
_QWEN2 = _cl100k(r"\p{N}")
_QWEN35 = rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}"
_SEED = rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}"
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CJK = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
# The letters with case that DeepSeek's file lists: those of early Unicode, without Armenian and Georgian small letters
_DEEPSEEK_LETTER = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10C7}-\x{10FF}\x{1C80}-\x{1C8F}\x{2D00}-\x{2D2D}\x{A790}-\x{A7FF}"
    r"\x{AB30}-\x{AB68}\x{10570}-\x{105BC}\x{10D50}-\x{10D85}\x{16E40}-\x{16EFF}\x{1D400}-\x{1DFFF}]]"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?{_DEEPSEEK_LETTER}+",
    r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
    r"\s+$",
    _CJK,
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}",
)


@dataclass(frozen=True)
class PreTokenizer:
    """A row of the table: what is cut out, in order, and what else goes with the name."""

    splits: tuple[str, ...] = ()
    gpt2: bool = False  # GPT-2's own pattern, after the splits
    digits: bool = False  # every digit by itself
    falcon: bool = False  # punctuation before GPT-2's pattern, digits in threes after it
    nfc: bool = False  # text is brought to Unicode's composed form first
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges say
    add_bos: bool = False  # where the file does not say

    def build(self) -> Any:
        """The tokenizers library's pre-tokenizer; its last step spells bytes as characters."""
        steps: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") for split in self.splits]
        if self.falcon:
            steps.append(pre_tokenizers.Punctuation("contiguous"))
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.gpt2))
        if self.falcon:
            steps += [
                pre_tokenizers.Digits(individual_digits=False),
                pre_tokenizers.Split(Regex("[0-9]{3}"), "isolated"),
            ]
        return pre_tokenizers.Sequence(steps)


_ROWS: dict[PreTokenizer, str] = {
    PreTokenizer(
        gpt2=True
    ): "gpt-2 gpt2 default phi-2 mpt olmo jais exaone4 gigachat mellum modern-bert a.x-4.0 trillion granite-docling",
    PreTokenizer(gpt2=True, digits=True): "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    PreTokenizer(gpt2=True, falcon=True): "falcon",
    PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True): "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral"
    " midm-2.0 lfm2",
    PreTokenizer((_LLAMA3,)): "dbrx smaug-bpe glm4 chatglm-bpe",
    PreTokenizer((_QWEN2,), nfc=True): "qwen2 deepseek-r1-qwen megrez",
    PreTokenizer((_QWEN2,)): "stablelm2 hunyuan grok-2 kormo f2llmv2 solar-open",
    PreTokenizer((_QWEN35,), nfc=True): "qwen35",
    PreTokenizer((_o200k("", r"\p{N}"),), ignore_merges=True, add_bos=True): "tekken",
    PreTokenizer((_o200k(f"{_SUFFIX}?", r"\p{N}{1,3}"),)): "gpt-4o o200k llama4 kanana2 talkie minimax-m2",
    PreTokenizer(_DEEPSEEK_LLM, digits=True): "deepseek-llm",
    PreTokenizer(_DEEPSEEK_CODER, digits=True): "deepseek-coder",
    PreTokenizer(_DEEPSEEK_V3): "deepseek-v3 hunyuan-dense joyai-llm",
    PreTokenizer((_SEED,)): "seed-coder",
    PreTokenizer((_BAILING,)): "bailingmoe bailingmoe2 llada-moe",
    PreTokenizer((_BLOOM,)): "bloom poro-chat gpt3-finnish",
    PreTokenizer((_BLOOM,), digits=True): "viking",
}

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: row for row, names in _ROWS.items() for name in names.split()}
FALLBACK = "gpt-2"
