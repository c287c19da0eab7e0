"""Tokenizers of Hugging Face folders: every file that says something, and what is saved is read again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizer_samples import CORPUS, NASTY, both, byte_level, byte_level_metadata, folder_of, sentencepiece_metadata
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram

from flashinfer_cli.errors import StorageError, TokenizerError
from flashinfer_cli.tokenizer import Tokenizer, load_tokenizer


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


def test_unigram_with_metaspace(tmp_path: Path) -> None:
    backend = Backend(Unigram([("<unk>", 0.0), ("▁the", -1.0), ("▁", -2.0), ("t", -3.0), ("he", -3.0)], unk_id=0))
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer.from_folder(folder_of(backend, tmp_path))
    ids = tokenizer.encode("the the he")
    assert tokenizer.decode(ids) == "the the he" == backend.decode(ids)
