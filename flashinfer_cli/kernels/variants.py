"""Inner loops in many variants, each a function of its own, of which one is chosen at run time.

Who uses an intrinsic only declares its variants; `bodies` has each once, and `warm` links it in at the end. Numba links
into a function what it calls and optimises the whole anew, caller by caller: with the loops in there, compiling took
five times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types

from .lanes import I64

Emit = Callable[..., None]  # (builder, *arguments): writes a variant's instructions

_variants: dict[str, tuple[int, Emit]] = {}  # by symbol: the number of arguments, and what writes it


def choice(name: str, arity: int, variants: dict[int, Emit]) -> Any:
    """An intrinsic op(which, *arguments): the code that variants[which] emits, chosen at run time."""
    signature = types.void(*[types.int64] * (arity + 1))
    symbols = {which: f"genai_run_{name}_{which}" for which in variants}
    for which, emit in variants.items():
        _variants[symbols[which]] = arity, emit

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        end = b.append_basic_block("chosen")
        chooser = b.switch(args[0], end)
        for which, symbol in symbols.items():
            block = b.append_basic_block(f"variant.{which}")
            chooser.add_case(ir.Constant(I64, which), block)
            b.position_at_end(block)
            b.call(_declared(b.module, symbol), args[1:])
            b.branch(end)
        b.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


def _declared(module: ir.Module, symbol: str) -> Any:
    if symbol in module.globals:
        return module.globals[symbol]
    arity, _ = _variants[symbol]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * arity), symbol)
    function.attributes.add("nounwind")
    return function


def declare() -> None:
    """Give every variant an address that nobody calls: Numba loads each function as it is compiled, and wants one."""
    for symbol in _variants:
        llvm.add_symbol(symbol, 1)


def bodies() -> ir.Module:
    """All variants that the modules imported so far have."""
    module = ir.Module("variants")
    for symbol, (_, emit) in _variants.items():
        function = _declared(module, symbol)
        b = ir.IRBuilder(function.append_basic_block("entry"))
        emit(b, *function.args)
        b.ret_void()
    return module
