"""Kernels that are compiled once a machine and kept: in a child, where nobody else writes, else the reference."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashinfer_cli import kernels as package
from flashinfer_cli.kernels import select


def test_fallback_is_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashinfer_cli.kernels import warm

    def broken(notify: object = None) -> None:
        raise RuntimeError("compiling failed: no such processor")

    monkeypatch.setattr(warm, "compiled", broken)
    assert warm.ensure_compiled() is False
    chosen, warning = select("cpu")
    assert chosen.name == "reference" and warning is not None and "no such processor" in warning and "slower" in warning
    monkeypatch.setitem(sys.modules, "flashinfer_cli.kernels.warm", None)
    chosen, warning = select("cpu")
    assert chosen.name == "reference" and warning is not None and "cannot be imported" in warning
    assert select("cpu", "reference")[1] is None
    assert select("cuda")[0].name == "reference"


@pytest.mark.usefixtures("numba")  # the child finds them compiled
def test_the_running_process_imports_no_compiler() -> None:
    code = """
import sys
import flashinfer_cli.kernels as k
assert not {"torch", "numba", "llvmlite"} & set(sys.modules)
from flashinfer_cli.kernels import warm
assert warm.ensure_compiled()
assert not {"torch", "numba"} & set(sys.modules)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_failing_compiler_gives_the_reference_and_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashinfer_cli.kernels import warm

    monkeypatch.setattr(warm, "_outcome", None)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    monkeypatch.setattr(warm, "_bases", lambda: iter([tmp_path]))
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    said: list[str] = []
    assert warm.ensure_compiled(said.append) is False  # never raises: the program goes on without
    for _ in range(2):
        chosen, warning = select("cpu", notify=said.append)
        assert chosen.name == "reference" and warning is not None and "NUMBA_DISABLE_JIT" in warning
    assert len(said) == 1 and "compiling CPU kernels for this machine" in said[0]  # tried once, said once
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_damaged_code_is_not_run(tmp_path: Path) -> None:
    from flashinfer_cli.kernels import warm

    good = (warm.cache_dir() / warm._OBJECT).read_bytes()
    file = tmp_path / "code"
    for bad in (good[:-1], good[:100], b"", good[:50] + bytes([good[50] ^ 1]) + good[51:]):
        file.write_bytes(bad)
        with pytest.raises(RuntimeError, match="damaged"):
            warm._load(file)


def test_the_compiler_takes_this_package_wherever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashinfer_cli.kernels import warm

    decoy = tmp_path / "flashinfer_cli" / "__init__.py"
    decoy.parent.mkdir()
    decoy.write_text("raise RuntimeError('the package of the working folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    with pytest.raises(RuntimeError, match="NUMBA_DISABLE_JIT"):
        warm._compile_in_child(tmp_path / warm.fingerprint())
    with pytest.raises(RuntimeError, match="another version"):
        warm._compile_in_child(tmp_path / "0123456789abcdef")


def test_code_that_others_could_have_put_there_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashinfer_cli.kernels import warm

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    monkeypatch.setattr(warm, "_bases", lambda: iter([theirs, ours]))
    folder = theirs / warm.fingerprint()
    folder.mkdir(parents=True)
    (folder / warm._OBJECT).write_bytes(b"")
    folder.chmod(0o777)
    assert warm.cache_dir().parent == ours


def test_compiled_code_depends_on_all_its_sources() -> None:
    """What `cpu` imports of the package, and what that imports in turn: a change in one left out would go unnoticed."""
    from flashinfer_cli.kernels import warm

    folder, seen, left = Path(warm.__file__).parent, set(), ["cpu.py"]
    while left:
        name = left.pop()
        seen.add(name)
        for node in ast.walk(ast.parse((folder / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                found = f"{'../' * (node.level - 1)}{(node.module or '').replace('.', '/')}.py"
                left += [found] if found not in seen else []
    assert seen | {"warm.py"} == set(warm._SOURCES)
