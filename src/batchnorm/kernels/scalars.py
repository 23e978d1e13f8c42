"""What the kernels need of single values and addresses, and Numba does not have: the argument block, atomics, scratch."""

import sys
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from batchnorm.kernels.lanes import computed, llvm_of

__all__ = [
    "add_to_slot",
    "after",
    "apart",
    "cleared",
    "coarse",
    "count_up",
    "like",
    "parameters",
    "pointer",
    "real",
    "reals",
    "scratch",
    "scratch_reals",
    "set_slot",
    "settle",
    "slot",
    "small",
    "take",
    "wait_for",
    "zero_of",
]

_REALS = types.CPointer(types.float64)


def _slot_at(builder: Any, block: Any, number: Any) -> Any:
    words = builder.bitcast(block, ir.IntType(64).as_pointer())
    return builder.gep(words, [number])


def _attributed(*attributes: str) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for attribute in attributes:
            builder.function.attributes.add(attribute)
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def apart(context: Any) -> Any:
    """Have the function that is compiled stay a function, which is compiled once for all kernels."""
    return _attributed("noinline")


@intrinsic
def small(context: Any) -> Any:
    """Have the function that is compiled stay a function, of few instructions."""
    return _attributed("noinline", "optsize")


@intrinsic
def slot(context: Any, p: Any, number: Any) -> Any:
    """Return an integer of the argument block."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_slot_at(builder, *args))

    return types.int64(p, types.int64), build


@intrinsic
def real(context: Any, p: Any, number: Any) -> Any:
    """Return a float64 of the argument block."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.load(_slot_at(builder, *args)), ir.DoubleType())

    return types.float64(p, types.int64), build


@intrinsic
def pointer(context: Any, p: Any, number: Any) -> Any:
    """Return an address of the argument block, of elements of the kernel's type."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(builder.load(_slot_at(builder, *args)), context.get_value_type(p))

    return p(p, types.int64), build


@intrinsic
def parameters(context: Any, p: Any, number: Any) -> Any:
    """Return an address of the argument block, of numbers in the type that is computed with."""
    kind = types.CPointer(computed(p.dtype))

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(builder.load(_slot_at(builder, *args)), context.get_value_type(kind))

    return kind(p, types.int64), build


@intrinsic
def set_slot(context: Any, p: Any, number: Any, value: Any) -> Any:
    """Write an integer into the argument block."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _slot_at(builder, args[0], args[1]))
        return context.get_dummy_value()

    return types.void(p, types.int64, types.int64), build


@intrinsic
def count_up(context: Any, p: Any, number: Any) -> Any:
    """Add 1 to the integer at an address of the argument block."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(builder.load(_slot_at(builder, *args)), ir.IntType(64).as_pointer())
        builder.store(builder.add(builder.load(place), ir.IntType(64)(1)), place)
        return context.get_dummy_value()

    return types.void(p, types.int64), build


@intrinsic
def reals(context: Any, p: Any, number: Any) -> Any:
    """Return an address of the argument block, of float64."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(builder.load(_slot_at(builder, *args)), ir.DoubleType().as_pointer())

    return _REALS(p, types.int64), build


@intrinsic
def take(context: Any, p: Any, number: Any) -> Any:
    """Return an integer of the argument block and count it up, which threads may do at the same time."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _slot_at(builder, *args), ir.IntType(64)(1), "monotonic")

    return types.int64(p, types.int64), build


@intrinsic
def add_to_slot(context: Any, p: Any, number: Any, value: Any) -> Any:
    """Add to an integer of the argument block and return the sum; what was written before is seen by who adds after."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        block, number, value = args
        return builder.add(builder.atomic_rmw("add", _slot_at(builder, block, number), value, "acq_rel"), value)

    return types.int64(p, types.int64, types.int64), build


@intrinsic
def wait_for(context: Any, p: Any, number: Any, least: Any) -> Any:
    """Wait until an integer of the argument block has been counted up to a number; others have their turn meanwhile."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        block, number, least = args
        look, rest, over = (builder.append_basic_block(name) for name in ("look", "rest", "over"))
        builder.branch(look)
        builder.position_at_end(look)
        found = builder.load_atomic(_slot_at(builder, block, number), "acquire", 8)
        builder.cbranch(builder.icmp_signed("<", found, least), rest, over)
        builder.position_at_end(rest)
        _yield(builder)
        builder.branch(look)
        builder.position_at_end(over)
        return context.get_dummy_value()

    return types.void(p, types.int64, types.int64), build


def _yield(builder: Any) -> None:
    if sys.platform == "win32":
        return
    kind = ir.FunctionType(ir.IntType(32), [])
    builder.call(get_or_insert_function(builder.module, kind, "sched_yield"), [])


@intrinsic
def settle(context: Any) -> Any:
    """Have what was written past the cache be where others see it."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def coarse(context: Any, p: Any, value: Any) -> Any:
    """Return a float32 with the few digits that elements of half precision have: its distance from them is exact."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if p.dtype not in (types.uint16, types.int16):
            return args[1]
        word = ir.IntType(32)
        return builder.bitcast(builder.and_(builder.bitcast(args[1], word), word(0xFFFF0000)), ir.FloatType())

    return value(p, value), build


@intrinsic
def like(context: Any, z: Any, value: Any) -> Any:
    """Return a number in the type of ``z``."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[1], signature.args[1], z)

    return z(z, value), build


@intrinsic
def zero_of(context: Any, p: Any) -> Any:
    """Return 0 in the type that elements are computed with."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return llvm_of(p.dtype)(0.0)

    return computed(p.dtype)(p), build


@intrinsic
def after(context: Any, p: Any, offset: Any) -> Any:
    """Return the address of an element."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return p(p, types.int64), build


@intrinsic(prefer_literal=True)
def scratch(context: Any, p: Any, count: Any) -> Any:
    """Return memory of this call for some numbers in the type that is computed with."""
    return types.CPointer(computed(p.dtype))(p, count), _reserve(llvm_of(p.dtype), count)


@intrinsic(prefer_literal=True)
def scratch_reals(context: Any, count: Any) -> Any:
    """Return memory of this call for some float64."""
    return _REALS(count), _reserve(ir.DoubleType(), count)


def _reserve(kind: Any, count: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # Numba's own would fill it with zeros, in one store that takes the compiler a second
        with builder.goto_entry_block():
            place = builder.alloca(ir.ArrayType(kind, count.literal_value))
        place.align = 64
        return builder.bitcast(place, kind.as_pointer())

    return build


@njit(error_model="numpy")
def cleared(numbers: Any, count: int) -> None:
    """Write zeros."""
    for i in range(count):
        numbers[i] = 0.0
