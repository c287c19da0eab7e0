"""The architecture, checked on the source: who may import whom, who may print, and what --help must not load."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from flashinfer_cli.cli.main import run
from flashinfer_cli.cli.reference import reference

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flashinfer_cli"
COMMANDS = (
    "generate", "chat", "inspect", "plan", "bundle", "calibrate", "profile", "evaluate", "replay", "train",
    "tune", "convert-heads", "zoo",
)  # fmt: skip

# In the order of the data: each imports only what stands in a line above its own, or in its own folder.
LAYERS = (
    ("errors",),
    ("config",),
    ("zoo",),
    ("recorder",),
    ("device", "report", "chat_template", "tokenizer_pre", "tokenizer_stream", "tokenizer_folder", "tokenizer_gguf"),
    ("checkpoint",),
    ("kernels", "tokenizer"),  # both read the format tables and metadata of a checkpoint
    ("bundles",),
    ("store",),
    ("cache",),
    ("plan",),
    ("layers",),
    ("models",),
    ("decoding",),
    ("engine",),
    ("loading",),
    ("training",),
    ("apps",),
    ("cli",),
    ("__main__", "__init__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """The folder of the package a file is in, or the module it is."""
    inner = path.relative_to(PACKAGE)
    return inner.parts[0] if len(inner.parts) > 1 else inner.stem


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute module, is it at the top of the file) of every import; `from . import x` counts as x."""
    tree = parsed(path)
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *((node.module,) if node.module else ())))
            names = [f"{module}.{alias.name}" for alias in node.names] if module == PACKAGE.name else [module]
            yield from ((name, node in top) for name in names)


def test_every_part_has_its_place():
    assert {unit(path) for path in SOURCES} <= RANK.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_data(path):
    mine = unit(path)
    for module, _ in imports(path):
        if not module.startswith(f"{PACKAGE.name}."):
            continue
        theirs = module.split(".")[1]
        if theirs not in RANK or theirs == mine:  # a name such as __version__, or a neighbour
            continue
        same_line = RANK[theirs] == RANK[mine] and mine not in ("cli", "apps")
        assert RANK[theirs] < RANK[mine] or same_line, f"{mine} must not import {theirs}"


@pytest.mark.parametrize("library", ["typer", "click", "rich"])
def test_only_the_command_line_knows_terminals(library):
    users = {path for path in SOURCES for module, _ in imports(path) if module.split(".")[0] == library}
    if library == "rich":
        assert users == {PACKAGE / "cli" / "console.py"}
    else:
        assert all(unit(path) == "cli" for path in users)


def test_nothing_below_the_command_line_prints():
    for path in SOURCES:
        if unit(path) == "cli":
            continue
        for node in ast.walk(parsed(path)):
            assert not (isinstance(node, ast.Name) and node.id == "print"), path
            is_stream = isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr")
            assert not (is_stream and isinstance(node.value, ast.Name) and node.value.id == "sys"), path


def test_torch_only_where_computing_is_done():
    free = {
        "errors",
        "config",
        "device",
        "recorder",
        "report",
        "tokenizer",
        "plan",
        "checkpoint",
        "bundles",
        "store",
        "cli",
        "__init__",
    }
    free |= {name for name in RANK if name.startswith(("tokenizer", "chat_template"))}
    for path in SOURCES:
        if unit(path) in free:
            loaded = {module.split(".")[0] for module, at_top in imports(path) if at_top}
            assert not loaded & {"torch", "numba"}, path


# ------------------------------------------------------------------ what a process really loads

HEAVY = ("torch", "numba", "numpy", "transformers", "tokenizers", "huggingface_hub", "gguf", "safetensors", "jinja2")


def loaded_by(code: str) -> set[str]:
    """The heavy libraries that are loaded once `code` has run in a fresh interpreter."""
    code += f"\nprint(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_import_and_help_load_nothing_heavy():
    assert loaded_by("import sys, flashinfer_cli") == set()
    every = [[], ["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    assert loaded_by(f"import sys\nfrom flashinfer_cli.cli.main import run\nfor argv in {every!r}: run(argv)") == set()


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_is_complete_and_grouped(command, capsys):
    assert run([*command, "--help"]) == 0
    shown, said = capsys.readouterr()
    assert "Usage:" in shown and not said
    assert all(name in shown for name in COMMANDS) if not command else "─ " in shown


@pytest.mark.parametrize("command", [(), ("profile",)])  # the second takes most options; none loads more than these
def test_help_is_quick(command):
    program = [sys.executable, "-m", "flashinfer_cli", *command, "--help"]
    before = os.times()
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    after = os.times()  # of the processor: the machine may be busy with other things
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 1.5, "0.5 s on a machine at rest"
    assert "Usage:" in done.stdout and not done.stderr


def test_reference_is_current():
    written = (ROOT / "docs" / "help.md").read_text(encoding="utf-8")
    assert written == reference(), "python -m flashinfer_cli.cli.reference > docs/help.md"


def test_reference_says_how_to_turn_a_flag_off():
    rows = [row.split(" | ")[0] for row in reference().splitlines() if row.startswith("| `--prefetch-neurons`")]
    assert rows and {*rows} == {"| `--prefetch-neurons`, `--no-prefetch-neurons`"}
