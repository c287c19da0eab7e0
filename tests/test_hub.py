"""Where a model is: paths, hub names, and the hub's failures as sentences. Nothing here reaches the network."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

from flashinfer_cli.checkpoint.hub import parse_hub_name, resolve
from flashinfer_cli.errors import CheckpointNotFoundError, StorageError, UsageError


@pytest.fixture(autouse=True)
def bars_on() -> None:
    """As in a fresh process: transformers, imported by other tests, switches the hub's bars off for all."""
    enable_progress_bars()


class Hub:
    """Stands in for the hub: a folder of files, or the exception to raise."""

    def __init__(self, root: Path) -> None:
        self.root, self.error, self.calls, self.bars_disabled = root, None, [], None
        self.error: Exception | None
        self.calls: list[dict[str, Any]]
        self.bars_disabled: bool | None

    def snapshot_download(self, repo: str, **options: Any) -> str:
        self.calls.append({"repo": repo, **options})
        self.bars_disabled = bool(are_progress_bars_disabled())
        if self.error is not None:
            raise self.error
        return str(self.root)

    def list_repo_files(self, repo: str, **_: Any) -> list[str]:
        return [str(path.relative_to(self.root)) for path in sorted(self.root.rglob("*")) if path.is_file()]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    root = tmp_path / "hub"
    root.mkdir()
    made = Hub(root)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", made.list_repo_files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return made


def taken(name: str, call: dict[str, Any]) -> bool:
    from huggingface_hub.utils import filter_repo_objects

    chosen = filter_repo_objects([name], allow_patterns=call["allow_patterns"], ignore_patterns=call["ignore_patterns"])
    return bool(list(chosen))


def http(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} Client Error.")
    error.response = None  # type: ignore[assignment]
    return error


def test_paths_stay_as_they_are(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "org").mkdir()
    (tmp_path / "here" / "org" / "name").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("org/name") == Path("org/name")
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("~/here") == tmp_path / "here"
    assert hub.calls == []


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("Qwen/Qwen2.5-0.5B", ("Qwen/Qwen2.5-0.5B", None)),
        ("a/b:x.Q4_K_M.gguf", ("a/b", "x.Q4_K_M.gguf")),
        ("a/b/x.gguf", ("a/b", "x.gguf")),
        ("a/b/sub/x.gguf", ("a/b", "sub/x.gguf")),
        ("a/b.gguf", None),
        ("a/model.safetensors", None),
        ("./a/b", None),
        ("/a/b", None),
        ("~/a", None),
        ("../b", None),
        ("a/b/../x.gguf", None),
        ("a/b/c", None),
        ("name", None),
        ("a b/c", None),
    ],
)
def test_what_looks_like_a_hub_name(model: str, found: tuple[str, str | None] | None) -> None:
    assert parse_hub_name(model) == found


def test_a_repository_takes_weights_config_and_tokenizer_only(hub: Hub) -> None:
    (hub.root / "model.safetensors").write_text("x")
    assert resolve("org/name", revision="v1") == hub.root
    (call,) = hub.calls
    assert (call["repo"], call["revision"]) == ("org/name", "v1")
    for name in ("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json",
                 "tokenizer.json", "chat_template.jinja", "tokenizer.model", "merges.txt"):  # fmt: skip
        assert taken(name, call), name
    for name in ("pytorch_model.bin", "onnx/config.json", "original/consolidated.safetensors", "README.md", "x.gguf",
                 "consolidated.safetensors", "adapter_model.safetensors"):  # fmt: skip
        assert not taken(name, call), name


def test_one_gguf_file_or_all_parts_of_it(hub: Hub) -> None:
    (hub.root / "x.gguf").write_text("x")
    (hub.root / "big-00002-of-00003.gguf").write_text("x")
    assert resolve("org/name:x.gguf") == hub.root / "x.gguf"
    assert taken("x.gguf", hub.calls[0])
    assert not taken("config.json", hub.calls[0])
    assert resolve("org/name/big-00002-of-00003.gguf") == hub.root / "big-00002-of-00003.gguf"
    assert taken("big-00001-of-00003.gguf", hub.calls[1])
    assert not taken("big-00001-of-00004.gguf", hub.calls[1])


def test_what_is_not_in_the_repository(hub: Hub) -> None:
    (hub.root / "x.gguf").write_text("x")
    with pytest.raises(CheckpointNotFoundError, match=r"no file 'y\.gguf'") as caught:
        resolve("org/name:y.gguf")
    assert "org/name:x.gguf" in (caught.value.hint or "")
    with pytest.raises(CheckpointNotFoundError, match="no safetensors") as caught:
        resolve("org/name")
    assert "org/name:x.gguf" in (caught.value.hint or "")


def test_progress_bars(hub: Hub) -> None:
    (hub.root / "model.safetensors").write_text("x")
    resolve("org/name", quiet=True)
    assert hub.bars_disabled is True
    assert not are_progress_bars_disabled()
    resolve("org/name", quiet=False)
    assert hub.bars_disabled is False


@pytest.mark.parametrize(
    ("error", "says", "hint"),
    [
        (http(errors.GatedRepoError, 403), "is gated", "huggingface.co/org/name"),
        (http(errors.RepositoryNotFoundError, 404), "no model org/name on the hub", "spelling"),
        (http(errors.RevisionNotFoundError, 404), "no revision 'v9'", "--revision"),
        (errors.LocalEntryNotFoundError("Got: ConnectError"), "could not be reached", "network"),
        (ConnectionError("[Errno -2] Name or service not known\nmore"), r"not known\.$", "Try again"),
        (http(errors.HfHubHTTPError, 500), "500 Client Error", "Try again"),
    ],
)
def test_failures_of_the_hub(hub: Hub, error: Exception, says: str, hint: str) -> None:
    hub.error = error
    with pytest.raises(CheckpointNotFoundError, match=says) as caught:
        resolve("org/name", revision="v9")
    assert hint in (caught.value.hint or "")
    assert "\n" not in caught.value.message
    assert not are_progress_bars_disabled()


def test_a_full_disk_is_a_storage_error(hub: Hub) -> None:
    hub.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(StorageError, match="disk is full"):
        resolve("org/name")


def test_offline_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library, told to stay offline, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="HF_HUB_OFFLINE") as caught:
        resolve("org/name")
    assert str(tmp_path) in caught.value.message


def test_missing_paths_name_the_nearest_sibling(hub: Hub) -> None:
    Path("models").mkdir()
    Path("models/SmolLM2-135M.gguf").write_text("x")
    with pytest.raises(CheckpointNotFoundError, match=r"SmolLM-135M\.gguf is not there") as caught:
        resolve("models/SmolLM-135M.gguf")
    assert caught.value.hint == "Did you mean models/SmolLM2-135M.gguf?"
    hub.error = http(errors.RepositoryNotFoundError, 404)
    Path("models/smollm").mkdir()
    with pytest.raises(CheckpointNotFoundError) as caught:  # a mistyped path that looks like a hub name
        resolve("models/smolm")
    assert "Did you mean models/smollm?" in (caught.value.hint or "")
    with pytest.raises(CheckpointNotFoundError, match="is not there") as caught:
        resolve("./nothing/like/it")
    assert "org/name" in (caught.value.hint or "")
    assert len(hub.calls) == 1


def test_names_that_cannot_be(hub: Hub) -> None:
    with pytest.raises(UsageError, match="empty"):
        resolve(" ")
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(CheckpointNotFoundError):
            resolve(name)
    Path("dangling").symlink_to("nowhere")
    with pytest.raises(CheckpointNotFoundError, match="dangling is not there"):
        resolve("dangling")
