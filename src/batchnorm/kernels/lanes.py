"""Eight numbers at once, in LLVM's terms: what is written with them becomes vector instructions, and no compiler must find out.

Elements are typed by how they are stored: ``float32``, ``float64``, ``uint16`` for bfloat16 and ``int16`` for float16. They are
computed with in float32, and in float64 where they are stored in it.
"""

from typing import Any, Self

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function

__all__ = ["WIDTH", "Elements", "Lanes", "computed", "elements_from", "is_given", "llvm_of", "splat", "where"]

WIDTH = 8
WORD, LONG = ir.IntType(32), ir.IntType(64)
FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()


def computed(stored: Any) -> Any:
    """Return the type that elements of a stored type are computed with."""
    return types.float64 if stored == types.float64 else types.float32


def llvm_of(stored: Any) -> Any:
    """Return LLVM's name of the type that elements are computed with."""
    return DOUBLE if stored == types.float64 else FLOAT


def _vector(kind: Any) -> Any:
    return ir.VectorType(kind, WIDTH)


class Lanes:
    """Eight numbers of one type, or eight truths; arithmetic appends instructions, number by number, in the order written."""

    __slots__ = ("builder", "value")

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    @property
    def is_double(self) -> bool:
        """Whether these are float64."""
        return bool(self.value.type.element == DOUBLE)

    def like(self, number: Any) -> Any:
        """Return a number in every lane, as LLVM's value; lanes stay what they are."""
        return number.value if isinstance(number, Lanes) else ir.Constant(self.value.type, [number] * WIDTH)

    def _new(self, value: Any) -> Self:
        return type(self)(self.builder, value)

    def __add__(self, other: Any) -> Self:
        return self._new(self.builder.fadd(self.value, self.like(other)))

    def __sub__(self, other: Any) -> Self:
        return self._new(self.builder.fsub(self.value, self.like(other)))

    def __rsub__(self, other: Any) -> Self:
        return self._new(self.builder.fsub(self.like(other), self.value))

    def __mul__(self, other: Any) -> Self:
        return self._new(self.builder.fmul(self.value, self.like(other)))

    def __truediv__(self, other: Any) -> Self:
        return self._new(self.builder.fdiv(self.value, self.like(other)))

    def __rtruediv__(self, other: Any) -> Self:
        return self._new(self.builder.fdiv(self.like(other), self.value))

    __radd__, __rmul__ = __add__, __mul__

    def _is(self, relation: str, other: Any) -> Self:
        return self._new(self.builder.fcmp_ordered(relation, self.value, self.like(other)))

    def __lt__(self, other: Any) -> Self:
        return self._is("<", other)

    def __le__(self, other: Any) -> Self:
        return self._is("<=", other)

    def __gt__(self, other: Any) -> Self:
        return self._is(">", other)

    def __ge__(self, other: Any) -> Self:
        return self._is(">=", other)

    def fused(self, factor: Any, term: Any) -> Self:
        """Return ``self · factor + term``, rounded once where the processor can."""
        return self._intrinsic("llvm.fmuladd", self.like(factor), self.like(term))

    def floor(self) -> Self:
        """Return the largest whole numbers that are not above, as floats."""
        return self._intrinsic("llvm.floor")

    def clip(self, least: float, most: float) -> Self:
        """Return what lies between two numbers; NaN stays NaN."""
        lower = self._or(self < least, least)
        return lower._or(lower > most, most)

    def _or(self, truth: Any, other: float) -> Self:
        return self._new(self.builder.select(truth.value, self.like(other), self.value))

    def power_of_two(self) -> Self:
        """Return ``2^n`` of whole numbers in float32."""
        words = _vector(WORD)
        exponent = self.builder.add(self.builder.fptosi(self.value, words), ir.Constant(words, [127] * WIDTH))
        bits = self.builder.shl(exponent, ir.Constant(words, [23] * WIDTH))
        return self._new(self.builder.bitcast(bits, _vector(FLOAT)))

    def each(self, function: str) -> Self:
        """Return what a function of C's library gives for each of eight float64."""
        found = self.value
        called = get_or_insert_function(self.builder.module, ir.FunctionType(DOUBLE, [DOUBLE]), function)
        for k in range(WIDTH):
            result = self.builder.call(called, [self.builder.extract_element(self.value, WORD(k))])
            found = self.builder.insert_element(found, result, WORD(k))
        return self._new(found)

    def widened(self) -> Self:
        """Return these numbers in float64."""
        return self if self.is_double else self._new(self.builder.fpext(self.value, _vector(DOUBLE)))

    def _intrinsic(self, name: str, *others: Any) -> Self:
        kind, given = self.value.type, [self.value, *others]
        # llvmlite does not know how vectors are called there
        name = f"{name}.v{WIDTH}{'f64' if self.is_double else 'f32'}"
        called = get_or_insert_function(self.builder.module, ir.FunctionType(kind, [kind] * len(given)), name)
        return self._new(self.builder.call(called, given))


def where(truth: Lanes, one: Any, other: Any) -> Lanes:
    """Return one lane or the other."""
    known = one if isinstance(one, Lanes) else other
    return Lanes(truth.builder, truth.builder.select(truth.value, known.like(one), known.like(other)))


def splat(builder: Any, value: Any) -> Lanes:
    """Return a number in every lane."""
    kind = _vector(value.type)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, WORD(0))
    return Lanes(
        builder, builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(_vector(WORD), [0] * WIDTH))
    )


class Elements:
    """Elements in memory: read and written eight at a time, or one in all lanes."""

    __slots__ = ("builder", "pointer", "stored")

    def __init__(self, builder: Any, stored: Any, pointer: Any) -> None:
        self.builder, self.stored, self.pointer = builder, stored, pointer

    def _bytes(self) -> int:
        return int(self.stored.bitwidth) // 8

    def _at(self, index: Any) -> Any:
        return self.builder.gep(self.pointer, [index])

    def load(self, index: Any) -> Lanes:
        """Read eight elements that begin at an index."""
        place = self._at(index)
        kind = _vector(place.type.pointee)
        found = self.builder.load(self.builder.bitcast(place, kind.as_pointer()))
        found.align = self._bytes()
        return Lanes(self.builder, _unpacked(self.builder, self.stored, found))

    def load_one(self, index: Any) -> Lanes:
        """Read one element into all lanes."""
        return Lanes(
            self.builder,
            _unpacked(self.builder, self.stored, splat(self.builder, self.builder.load(self._at(index))).value),
        )

    def prefetch(self, index: Any) -> None:
        """Ask for what stands at an index, which may lie outside of what there is."""
        builder, byte = self.builder, ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, WORD, WORD, WORD])
        called = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # to read, into all caches, of data
        builder.call(called, [builder.bitcast(self._at(index), byte), WORD(0), WORD(3), WORD(1)])

    def store(self, index: Any, lanes: Lanes, *, past_cache: bool = False) -> None:
        """Write eight elements, rounded to the nearest; past the cache only where eight elements' bytes are aligned."""
        packed = _packed(self.builder, self.stored, lanes.value)
        done = self.builder.store(packed, self.builder.bitcast(self._at(index), packed.type.as_pointer()))
        done.align = self._bytes() * (WIDTH if past_cache else 1)
        if past_cache:
            done.set_metadata("nontemporal", self.builder.module.add_metadata([WORD(1)]))

    def store_one(self, index: Any, lanes: Lanes) -> None:
        """Write the element of the first lane."""
        packed = _packed(self.builder, self.stored, lanes.value)
        self.builder.store(self.builder.extract_element(packed, WORD(0)), self._at(index))


def elements_from(builder: Any, stored: Any, addresses: Any, start: Any) -> list[Elements]:
    """Return the elements that begin at an index, for each address."""
    return [Elements(builder, stored, builder.gep(address, [start])) for address in addresses]


def is_given(builder: Any, address: Any) -> Any:
    """Return whether there is something at an address, which is 0 where there is not."""
    return builder.icmp_unsigned("!=", builder.ptrtoint(address, LONG), LONG(0))


def _unpacked(builder: Any, stored: Any, value: Any) -> Any:
    if stored == types.uint16:
        words = _vector(WORD)
        wide = builder.shl(builder.zext(value, words), ir.Constant(words, [16] * WIDTH))
        return builder.bitcast(wide, _vector(FLOAT))
    if stored == types.int16:
        return builder.fpext(builder.bitcast(value, _vector(ir.HalfType())), _vector(FLOAT))
    return value


def _packed(builder: Any, stored: Any, value: Any) -> Any:
    if stored == types.uint16:
        return _to_bfloat16(builder, value)
    if stored == types.int16:
        return builder.bitcast(builder.fptrunc(value, _vector(ir.HalfType())), _vector(ir.IntType(16)))
    return value


def _to_bfloat16(builder: Any, value: Any) -> Any:
    words = _vector(WORD)

    def every(number: int) -> Any:
        return ir.Constant(words, [number] * WIDTH)

    bits = builder.bitcast(value, words)
    even = builder.and_(builder.lshr(bits, every(16)), every(1))
    rounded = builder.add(bits, builder.add(even, every(0x7FFF)))
    # rounding would carry some NaN into infinity
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), every(0x7FC00000), rounded)
    return builder.trunc(builder.lshr(chosen, every(16)), _vector(ir.IntType(16)))
