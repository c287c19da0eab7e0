"""Compiled kernels, kept for the next run: compiled once a machine and version, in a process that ends when it is done.

`python -m flashinfer_cli.kernels.warm DIRECTORY` is that process. It imports numpy and numba only, so the memory that
a compiler takes never becomes that of the process that runs the model; and what it leaves behind is plain machine
code, which llvmlite alone can load: 0.1 s and some 40 MB (most of it the library's file), against 1.4 s and 100 MB
for numba with its own cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

SECONDS = 25  # what compiling takes, for the notice
TIMEOUT = 600
_SOURCES = (
    "lanes.py",
    "loops.py",
    "variants.py",
    "codecs.py",
    "dots.py",
    "mixes.py",
    "conversions.py",
    "memory.py",
    "jobs.py",
    "tiles.py",
    "products.py",
    "softmax.py",
    "tokens.py",
    "demands.py",
    "layouts.py",
    "reads.py",
    "crew.py",
    "sparse.py",
    "cpu.py",
    "warm.py",
    "../checkpoint/base.py",
)
_OBJECT = "kernels.o"

Enter = Callable[[int, int], object]

_lock = threading.Lock()
_outcome: Enter | Exception | None = None
_engines: list[Any] = []


@cache
def fingerprint() -> str:
    """What the compiled code depends on: the sources, the compiler's version, Python's, and the processor."""
    import llvmlite
    import llvmlite.binding as llvm

    here = Path(__file__).parent
    versions = (version("numba"), llvmlite.__version__, platform.python_version(), llvm.get_default_triple())
    processor = (llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())
    digest = hashlib.sha256(repr((versions, processor)).encode())
    for name in _SOURCES:
        source = here / name
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _bases() -> Iterator[Path]:
    given, xdg = os.environ.get("NUMBA_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if given:
        yield Path(given) / "genai-run"
    yield (Path(xdg) if xdg else Path.home() / ".cache") / "genai-run" / "kernels"
    yield Path(tempfile.gettempdir()) / f"genai-run-{os.getuid() if hasattr(os, 'getuid') else 'kernels'}"


def _is_ours(folder: Path) -> bool:
    """Compiled code is run without another look: nobody else may be able to put some there."""
    if not hasattr(os, "getuid"):
        return True
    status = folder.stat()
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & stat.S_IWOTH


def cache_dir() -> Path:
    """The folder for this machine's compiled kernels: one that has them, else the first that can be written.

    Raises OSError when there is none.
    """
    key = fingerprint()
    writable: Path | None = None
    for base in _bases():
        folder = base / key
        try:
            if (folder / _OBJECT).exists() and _is_ours(folder):
                return folder
            if writable is None:
                base.mkdir(parents=True, exist_ok=True, mode=0o700)
                folder.mkdir(exist_ok=True, mode=0o700)
                tempfile.TemporaryFile(dir=folder).close()
                writable = folder if _is_ours(folder) else None
        except (OSError, RuntimeError):
            continue
    if writable is None:
        raise OSError("no folder for compiled kernels can be written (set NUMBA_CACHE_DIR)")
    return writable


def _compile(folder: Path) -> None:
    """Write the machine code of `cpu.enter` into the folder, once it has been seen to work; for the child process."""
    import llvmlite.binding as llvm
    import numba
    from numba import types

    if numba.config.DISABLE_JIT:
        raise RuntimeError("NUMBA_DISABLE_JIT is set")
    from . import variants
    from .cpu import enter

    variants.declare()
    arguments = (types.int64, types.int64)
    enter.compile(arguments)
    module = llvm.parse_assembly(enter.inspect_llvm(arguments))
    symbol = enter.overloads[arguments].fndesc.llvm_func_name
    machine = _target_machine()
    module.link_in(_optimised(variants.bodies(), machine))
    data = symbol.encode() + b"\n" + machine.emit_object(module)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(hashlib.sha256(data).digest() + data)
    try:
        _try_out(_load(Path(file.name)))
        os.replace(file.name, folder / _OBJECT)
    finally:
        Path(file.name).unlink(missing_ok=True)


def _optimised(module: Any, machine: Any) -> Any:
    """llvmlite's module as LLVM's, having gone through the passes of -O3."""
    import llvmlite.binding as llvm

    made = llvm.parse_assembly(str(module))
    made.triple, made.data_layout = machine.triple, str(machine.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = True
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(made, passes)
    return made


def _try_out(enter: Enter) -> None:
    """One neuron of ones: silu(1). Code that crashes, or is wrong altogether, ends the child and is not kept."""
    import numpy as np

    from . import jobs
    from .pool import Workspace

    space, ones, out = Workspace(enter), np.ones(3, np.float32), np.zeros(1, np.float32)
    scratch = space.reserve(256)
    space.run(
        jobs.FFN, jobs.CODES["F32"], 1, 1, 1, ones.ctypes.data, 12, ones.ctypes.data, out.ctypes.data, scratch, 2,
        scratch + 64, 0, jobs.ACTS["silu"] + jobs.GATED, 0, 0, 1, 4,
    )  # fmt: skip
    if abs(out[0] - 0.7310586) > 1e-5:
        raise RuntimeError(f"the compiled kernels are wrong: silu(1) is {out[0]}")


def _target_machine() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="default",
        codemodel="jitdefault",
        jit=True,
    )


def _is_whole(stored: bytes) -> bool:
    """A digest of 32 bytes and what it is of."""
    return hashlib.sha256(stored[32:]).digest() == stored[:32]


def _load(file: Path) -> Enter:
    """The machine code in a file as a function; it gives up the interpreter lock while it runs."""
    import llvmlite.binding as llvm

    stored = file.read_bytes()
    if not _is_whole(stored):
        raise RuntimeError(f"{file} is damaged")
    symbol, code = stored[32:].split(b"\n", 1)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)  # the code lives as long as its engine
    # Numba's own calling convention: two pointers, for a result and an exception, come before the arguments
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    function = prototype(engine.get_function_address(symbol.decode()))
    results = (ctypes.c_int64 * 4)()
    result, error = ctypes.addressof(results), ctypes.addressof(results) + 16
    _engines.append(results)
    return lambda pool, worker: function(result, error, pool, worker)


def _compile_in_child(folder: Path) -> None:
    package_parent = str(Path(__file__).parents[2])
    paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        # from the folder that holds this very package: `-m` looks for it where it is run first
        [sys.executable, "-m", "flashinfer_cli.kernels.warm", str(folder.absolute())],
        cwd=package_parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:] or [f"ended with status {run.returncode}"]
        raise RuntimeError(f"compiling failed: {last[0]}")


def compiled(notify: Callable[[str], None] | None = None) -> Enter:
    """The compiled `cpu.enter`, loaded from the cache; compiled first, in a child process, if this machine has not yet.

    `notify` gets one sentence before compiling starts. Raises ImportError without numba, RuntimeError or OSError when
    compiling or storing fails; once that has happened it is not tried again.
    """
    global _outcome
    with _lock:
        if _outcome is None:
            try:
                _outcome = _load(_compiled_file(notify))
            except Exception as error:
                _outcome = error
        if isinstance(_outcome, Exception):
            raise _outcome
        return _outcome


def _compiled_file(notify: Callable[[str], None] | None) -> Path:
    folder = cache_dir()
    file = folder / _OBJECT
    if not file.exists() or not _is_whole(file.read_bytes()):
        if notify is not None:
            notify(f"compiling CPU kernels for this machine (once, about {SECONDS} s)")
        _compile_in_child(folder)
    return file


def is_compiled() -> bool:
    """Are this machine's kernels in the cache already. Compiles nothing."""
    if _outcome is not None:
        return not isinstance(_outcome, Exception)
    try:
        file = cache_dir() / _OBJECT
        return file.exists() and _is_whole(file.read_bytes())
    except OSError:
        return False


def ensure_compiled(notify: Callable[[str], None] | None = None) -> bool:
    """Have the kernels compiled and loaded; False when that cannot be, the reason of which `select` then tells."""
    try:
        compiled(notify)
    except Exception:
        return False
    return True


def main() -> None:
    folder = Path(sys.argv[1])
    if folder.name != fingerprint():
        raise RuntimeError(f"{folder} is for the sources of another version than {Path(__file__).parent}")
    _compile(folder)


if __name__ == "__main__":
    main()
