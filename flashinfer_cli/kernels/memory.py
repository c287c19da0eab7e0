"""Single words of memory for compiled code: loads, stores, atomic operations, and the system calls that sleep and
wake."""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .lanes import F32, I8, I32, I64, Lanes, Pointer

read: Any = types.ExternalFunction("read", types.int64(types.int32, types.int64, types.int64))
memcpy: Any = types.ExternalFunction("memcpy", types.int64(types.int64, types.int64, types.int64))
write: Any = types.ExternalFunction("write", types.int64(types.int32, types.int64, types.int64))
sched_yield: Any = types.ExternalFunction("sched_yield", types.int32())


def _word(b: ir.IRBuilder, address: Any, kind: Any = I64) -> Any:
    return b.inttoptr(address, kind.as_pointer())


@intrinsic
def load_int(typingctx: Any, address: Any) -> Any:
    return types.int64(types.int64), lambda context, b, sig, args: b.load(_word(b, args[0]))


@intrinsic
def store_int(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        b.store(args[1], _word(b, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def load_byte(typingctx: Any, address: Any) -> Any:
    """As int64, without a sign."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return b.zext(b.load(_word(b, args[0], I8)), I64)

    return types.int64(types.int64), codegen


@intrinsic
def store_byte(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        b.store(b.trunc(args[1], I8), _word(b, args[0], I8))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def load_double(typingctx: Any, address: Any) -> Any:
    return types.float64(types.int64), lambda context, b, sig, args: b.load(_word(b, args[0], ir.DoubleType()))


@intrinsic
def store_double(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        b.store(args[1], _word(b, args[0], ir.DoubleType()))
        return context.get_dummy_value()

    return types.void(types.int64, types.float64), codegen


@intrinsic
def load_float(typingctx: Any, address: Any) -> Any:
    return types.float32(types.int64), lambda context, b, sig, args: b.load(_word(b, args[0], F32))


@intrinsic
def store_float(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        b.store(args[1], _word(b, args[0], F32))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def load_half(typingctx: Any, address: Any) -> Any:
    """A float16, as float32."""
    return types.float32(types.int64), lambda context, b, sig, args: Pointer(b, args[0]).half(0).value


@intrinsic
def store_half(typingctx: Any, address: Any, value: Any) -> Any:
    """A float32, as float16."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        Pointer(b, args[0]).store_half(0, Lanes(b, args[1]))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def atomic_load(typingctx: Any, address: Any) -> Any:
    return types.int64(types.int64), lambda context, b, sig, args: b.load_atomic(_word(b, args[0]), "seq_cst", 8)


@intrinsic
def atomic_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Adds, and returns what was there before."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return b.atomic_rmw("add", _word(b, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_swap(typingctx: Any, address: Any, value: Any) -> Any:
    """Stores, and returns what was there before."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return b.atomic_rmw("xchg", _word(b, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tells the processor that this is a waiting loop; costs some 40 to 140 cycles."""
    triple = llvm.get_default_triple()
    x86, arm = triple.startswith(("x86", "i686", "amd64")), triple.startswith(("aarch64", "arm64"))

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        if x86 or arm:
            name, hint = ("llvm.x86.sse2.pause", []) if x86 else ("llvm.aarch64.hint", [ir.Constant(I32, 1)])
            function = b.module.globals.get(name)
            if function is None:
                function = ir.Function(b.module, ir.FunctionType(ir.VoidType(), [h.type for h in hint]), name)
            b.call(function, hint)
        return context.get_dummy_value()

    return types.void(), codegen
