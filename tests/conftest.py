"""What every test shares."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest


def pytest_collection_finish() -> None:
    """What importing the libraries has made stays: a model that is loaded under a budget collects garbage first, and
    need not look through several hundred thousand of their objects each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A checkpoint of two dense layers, made by hand."""
    from bundle_sources import save_dense

    save_dense(tmp_path / "source")
    return tmp_path / "source"
