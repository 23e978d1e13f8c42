"""What the kernels need of single values and addresses, and Numba does not have: half precision, atomics, fused products.

Elements are typed by how they are stored: ``float32``, ``float64``, ``uint16`` for bfloat16 and ``int16`` for float16. They are
computed with in float32, and in float64 where they are stored in it.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

__all__ = [
    "add_to",
    "add_to_slot",
    "coarse",
    "floor",
    "fused",
    "get",
    "like",
    "of",
    "parameters",
    "pointer",
    "power_of_two",
    "put",
    "real",
    "reals",
    "set_slot",
    "slot",
    "take",
]

# What is read, what is written and what is added up never overlap: told to the compiler, which otherwise asks before each row.
_WRITTEN, _SUMMED = "written", "summed"


def _apart(builder: Any, instruction: Any, scope: str | None, *others: str) -> Any:
    """Mark a load or a store as one of a scope that never overlaps others."""
    module = builder.module

    def scopes(names: tuple[str, ...]) -> Any:
        domain = module.add_metadata(["batchnorm"])
        return module.add_metadata([module.add_metadata([name, domain]) for name in names])

    if scope is not None:
        instruction.set_metadata("alias.scope", scopes((scope,)))
    instruction.set_metadata("noalias", scopes(others))
    return instruction


_WORDS = types.CPointer(types.int64)
_REALS = types.CPointer(types.float64)


def computed(stored: Any) -> Any:
    """Return the type that elements of a stored type are computed with."""
    return types.float64 if stored == types.float64 else types.float32


def _slot_at(builder: Any, block: Any, number: Any) -> Any:
    words = builder.bitcast(block, ir.IntType(64).as_pointer())
    return builder.gep(words, [number])


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
def floor(context: Any, z: Any) -> Any:
    """Return the largest whole number that is not above ``z``, as a float."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.floor", [args[0].type]), args)

    return z(z), build


@intrinsic
def power_of_two(context: Any, n: Any) -> Any:
    """Return ``2^n`` of a whole number in float32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        exponent = builder.add(builder.fptosi(args[0], word), word(127))
        return builder.bitcast(builder.shl(exponent, word(23)), ir.FloatType())

    return types.float32(types.float32), build


@intrinsic
def fused(context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return ``a · b + c``, rounded once where the processor can: the same in every kernel."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        return builder.call(
            builder.module.declare_intrinsic("llvm.fmuladd", [kind], ir.FunctionType(kind, [kind] * 3)), args
        )

    return a(a, a, a), build


@intrinsic
def get(context: Any, p: Any, index: Any) -> Any:
    """Return an element, in the type that is computed with."""
    stored = p.dtype

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _apart(builder, builder.load(builder.gep(args[0], [args[1]])), None, _WRITTEN, _SUMMED)
        if stored == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(value, ir.IntType(32)), ir.IntType(32)(16)), ir.FloatType())
        if stored == types.int16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        return value

    return computed(stored)(p, types.int64), build


@intrinsic
def put(context: Any, p: Any, index: Any, value: Any) -> Any:
    """Store an element, rounded to the nearest."""
    stored = p.dtype

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place, value = builder.gep(args[0], [args[1]]), args[2]
        if stored == types.uint16:
            value = _to_bfloat16(builder, value)
        elif stored == types.int16:
            value = builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        _apart(builder, builder.store(value, place), _WRITTEN, _SUMMED)
        return context.get_dummy_value()

    return types.void(p, types.int64, computed(stored)), build


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(make_array(kind)(context, builder, array).data, [index])


@intrinsic
def of(context: Any, array: Any, index: Any) -> Any:
    """Return an element of a small array that is not written meanwhile."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        load = builder.load(_place(context, builder, array, *args))
        return _apart(builder, load, None, _WRITTEN, _SUMMED)

    return array.dtype(array, types.int64), build


@intrinsic
def add_to(context: Any, array: Any, index: Any, value: Any) -> Any:
    """Add to an element of a small array of sums."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _place(context, builder, array, *args[:2])
        old = _apart(builder, builder.load(place), _SUMMED, _WRITTEN)
        _apart(builder, builder.store(builder.fadd(old, args[2], flags=("reassoc",)), place), _SUMMED, _WRITTEN)
        return context.get_dummy_value()

    return types.void(array, types.int64, array.dtype), build


def _to_bfloat16(builder: Any, value: Any) -> Any:
    word = ir.IntType(32)
    bits = builder.bitcast(value, word)
    even = builder.and_(builder.lshr(bits, word(16)), word(1))
    rounded = builder.add(bits, builder.add(even, word(0x7FFF)))
    # rounding would carry some NaN into infinity
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), word(0x7FC00000), rounded)
    return builder.trunc(builder.lshr(chosen, word(16)), ir.IntType(16))
