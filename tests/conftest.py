"""What every test shares."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tiny_models import Tiny

    from flashinfer_cli.kernels import Kernels
    from flashinfer_cli.kernels.native import NumbaKernels


# Torch's threads wait for the next of many small operations in a loop: beside anything else that runs on the machine, a
# test takes up to nine times as long. Told to sleep instead, they do not; it is read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Kernels that are not compiled yet are, while the tests are collected."""
    from flashinfer_cli.kernels.warm import ensure_compiled

    if not session.config.option.collectonly:
        threading.Thread(target=ensure_compiled, daemon=True).start()


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


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Small models run on the plain kernels until a machine has the compiled ones: what a test is of would hang on
    which ran before."""
    from flashinfer_cli.kernels.warm import ensure_compiled

    ensure_compiled()


@pytest.fixture(scope="session")
def numba(compiled: None) -> Iterator[NumbaKernels]:
    """The compiled kernels on two threads."""
    from flashinfer_cli.kernels import select
    from flashinfer_cli.kernels.native import NumbaKernels

    chosen, warning = select("cpu", "compiled", threads=2)
    assert isinstance(chosen, NumbaKernels) and warning is None
    yield chosen
    chosen.close()


@pytest.fixture(scope="module", params=["numba", "reference"])
def kernels(request: pytest.FixtureRequest, numba: NumbaKernels) -> Kernels:
    """The kernels and their plain twin."""
    from flashinfer_cli.kernels import select

    return numba if request.param == "numba" else select("cpu", "reference")[0]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """tiny(family, index): the folder and the model of `tiny_models.make`, each made once; only to be read."""
    from tiny_models import make

    root = tmp_path_factory.mktemp("tiny")
    written: dict[Path, int] = {}

    @cache
    def made(family: str, index: int) -> tuple[Path, Any]:
        found = make(family, index, root / f"{family}-{index}")
        written.update((path, path.stat().st_mtime_ns) for path in found[0].iterdir())
        return found

    yield made
    assert written == {path: path.stat().st_mtime_ns for path in root.glob("*/*")}, "a test wrote to what all share"


@pytest.fixture(scope="session")
def sparse_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle whose neurons are predicted; to be copied by who would change it."""
    from sparse_bundle import make

    return make(tmp_path_factory.mktemp("sparse"))
