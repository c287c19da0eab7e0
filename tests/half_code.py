"""A few instructions of `kernels.lanes` as a function of two addresses, with or without the processor's own halves."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from flashinfer_cli.kernels import lanes, warm

_engines: list[Any] = []  # the code lives as long as these


def halves_by(
    native: bool, monkeypatch: pytest.MonkeyPatch, write: Callable[[lanes.Pointer, lanes.Pointer], None]
) -> Callable[[int, int], None]:
    """What `write(source, target)` writes, compiled."""
    if native and not lanes.converts_half():
        pytest.skip("this processor has no conversion of its own")
    monkeypatch.setattr(lanes, "converts_half", lambda: native)
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [lanes.I64, lanes.I64]), "convert")
    builder = ir.IRBuilder(function.append_basic_block())
    write(*(lanes.Pointer(builder, address) for address in function.args))
    builder.ret_void()
    machine = warm._target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    _engines.append(engine)
    return ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(engine.get_function_address("convert"))
