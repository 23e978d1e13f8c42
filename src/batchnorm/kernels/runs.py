"""What is done with a run of elements that lie side by side and belong to one channel.

A run ends with eight elements that may overlap those before: they are written twice, and not added twice.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value, for_range_slice, unpack_tuple
from numba.extending import intrinsic

from batchnorm.kernels.activations import is_light
from batchnorm.kernels.elements import gradient, output
from batchnorm.kernels.lanes import (
    LONG,
    WIDTH,
    WORD,
    Elements,
    Lanes,
    computed,
    elements_from,
    is_given,
    llvm_of,
    splat,
    where,
)

__all__ = ["CHUNK", "add_distances", "add_gradients", "ask_for", "write_gradients", "write_outputs"]

# values that are added in float32 before their sum is added in float64
CHUNK = 2048
# sums that are kept apart, so that none waits for the one before
APART = 4
# bytes of a line of the cache, and how many of them are read ahead where a run begins
LINE, LINES = 64, 8
Body = Callable[..., None]


def _vectors(builder: Any, start: Any, stop: Any, body: Body, apart: int) -> None:
    """Call the body for each eight elements: an index, which of the sums, and the truths of what is new, if not all is."""
    wide = LONG(WIDTH * apart)
    count = builder.sub(stop, start)
    begin = start
    if apart > 1:
        begin = builder.add(start, builder.mul(builder.udiv(count, wide), wide))
        with for_range_slice(builder, start, begin, wide, LONG) as (index, _):
            for k in range(apart):
                body(builder.add(index, LONG(k * WIDTH)), k, None)
    end = builder.add(start, builder.and_(count, LONG(-WIDTH)))
    with for_range_slice(builder, begin, end, LONG(WIDTH), LONG) as (index, _):
        body(index, 0, None)
    with builder.if_then(builder.icmp_signed("<", end, stop)):
        body(builder.sub(stop, LONG(WIDTH)), 0, _from(builder, builder.sub(LONG(WIDTH), builder.sub(stop, end))))


def _from(builder: Any, first: Any) -> Lanes:
    """Return which of eight lanes are not before one."""
    words = ir.VectorType(WORD, WIDTH)
    number = splat(builder, builder.trunc(first, WORD)).value
    return Lanes(builder, builder.icmp_signed(">=", ir.Constant(words, list(range(WIDTH))), number))


class _Sums:
    """Two sums over runs, kept in several lanes and added to sixteen float64 in the end."""

    def __init__(self, builder: Any, stored: Any, apart: int) -> None:
        zero = ir.Constant(ir.VectorType(llvm_of(stored), WIDTH), [0.0] * WIDTH)
        self.builder = builder
        self.plain, self.squares = ([alloca_once_value(builder, zero) for _ in range(apart)] for _ in range(2))

    def add(self, k: int, value: Lanes, other: Lanes, fresh: Lanes | None) -> None:
        """Add ``value`` to the first sum, and ``value · other`` to the second; only where it is fresh."""
        value = value if fresh is None else where(fresh, value, 0.0)
        other = other if fresh is None else where(fresh, other, 0.0)
        plain, squares = (Lanes(self.builder, self.builder.load(of[k])) for of in (self.plain, self.squares))
        self.builder.store((plain + value).value, self.plain[k])
        self.builder.store(value.fused(other, squares).value, self.squares[k])

    def flush(self, totals: Any) -> None:
        """Add to the totals."""
        wide = Elements(self.builder, types.float64, totals)
        for first, places in ((0, self.plain), (WIDTH, self.squares)):
            sums = [Lanes(self.builder, self.builder.load(place)) for place in places]
            while len(sums) > 1:
                sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
            wide.store(LONG(first), wide.load(LONG(first)) + sums[0].widened())


def _add_up(builder: Any, stored: Any, count: Any, totals: Any, apart: int, body: Body) -> None:
    with for_range_slice(builder, LONG(0), count, LONG(CHUNK), LONG) as (index, _):
        end = builder.add(index, LONG(CHUNK))
        end = builder.select(builder.icmp_signed("<", end, count), end, count)
        sums = _Sums(builder, stored, apart)
        _vectors(builder, index, end, partial(body, sums), apart)
        sums.flush(totals)


@intrinsic
def add_distances(context: Any, x: Any, start: Any, count: Any, mean: Any, totals: Any) -> Any:
    """Add the distances from a mean, and their squares, to sixteen totals: eight lanes of each."""
    stored = x.dtype

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, start, count, mean, totals = args
        (x,) = elements_from(builder, stored, [address], start)
        mean = splat(builder, mean)

        def add(sums: _Sums, index: Any, k: int, fresh: Lanes | None) -> None:
            t = x.load(index) - mean
            sums.add(k, t, t, fresh)

        _add_up(builder, stored, count, totals, APART, add)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.int64, computed(stored), totals), build


@intrinsic
def ask_for(context: Any, x: Any, start: Any) -> Any:
    """Have the processor read the begin of a run ahead of time: where one ends, it does not see where the next one begins."""
    each = LINE * 8 // x.dtype.bitwidth

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (x,) = elements_from(builder, signature.args[0].dtype, args[:1], args[1])
        for k in range(LINES):
            x.prefetch(LONG(k * each))
        return context.get_dummy_value()

    return types.void(x, types.int64), build


def _apart(act: Any) -> int:
    return APART if is_light(act.literal_value) else 1


@intrinsic(prefer_literal=True)
def add_gradients(
    context: Any, act: Any, adds: Any, x: Any, dy: Any, beside: Any, start: Any, count: Any, affine: Any, totals: Any
) -> Any:
    """Add d and d · (x - mean) to sixteen totals, d being the gradient before the activation."""
    stored, code, kind = x.dtype, act.literal_value, adds.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, *addresses, start, count, affine, totals = args
        x, dy, beside = elements_from(builder, stored, addresses, start)
        mean, scale, shift = (splat(builder, v) for v in unpack_tuple(builder, affine))

        def add(sums: _Sums, index: Any, k: int, fresh: Lanes | None) -> None:
            t = x.load(index) - mean
            d = gradient(code, kind, dy.load(index), beside.load(index) if kind and code else None, t, scale, shift)
            sums.add(k, d, t, fresh)

        _add_up(builder, stored, count, totals, _apart(act), add)
        return context.get_dummy_value()

    return types.void(act, adds, x, x, x, types.int64, types.int64, affine, totals), build


def _written(builder: Any, start: Any, count: Any, past_cache: Any, body: Any) -> None:
    """Call the body for each eight elements; past the cache where it is asked for, from an aligned index on."""
    last = builder.sub(count, LONG(WIDTH - 1))
    with builder.if_else(builder.trunc(past_cache, ir.IntType(1))) as (then, otherwise):
        with then:
            body(LONG(0), past_cache=False)
            aligned = builder.and_(builder.neg(start), LONG(WIDTH - 1))
            with for_range_slice(builder, aligned, last, LONG(WIDTH), LONG) as (index, _):
                body(index, past_cache=True)
        with otherwise, for_range_slice(builder, LONG(0), last, LONG(WIDTH), LONG) as (index, _):
            body(index, past_cache=False)
    body(builder.sub(count, LONG(WIDTH)), past_cache=False)


@intrinsic(prefer_literal=True)
def write_outputs(
    context: Any, act: Any, adds: Any, x: Any, y: Any, beside: Any, start: Any, count: Any, affine: Any, past_cache: Any
) -> Any:
    """Write ``activation((x - mean) · scale + shift + residual)``."""
    stored, code, kind = x.dtype, act.literal_value, adds.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, *addresses, start, count, affine, past_cache = args
        x, y, beside = elements_from(builder, stored, addresses, start)
        mean, scale, shift = (splat(builder, v) for v in unpack_tuple(builder, affine))

        def write(index: Any, *, past_cache: bool) -> None:
            z = output(code, x.load(index), beside.load(index) if kind else None, mean, scale, shift)
            y.store(index, z, past_cache=past_cache)

        _written(builder, start, count, past_cache, write)
        return context.get_dummy_value()

    return types.void(act, adds, x, x, x, types.int64, types.int64, affine, types.int64), build


@intrinsic(prefer_literal=True)
def write_gradients(
    context: Any, act: Any, adds: Any, x: Any, dy: Any, beside: Any, dx: Any, dresidual: Any, start: Any,
    count: Any, affine: Any, steps: Any, past_cache: Any,
) -> Any:  # fmt: skip
    """Write ``dx = a · d + b · (x - mean) + c``, and d beside it where the gradient of a residual has an address."""
    stored, code, kind = x.dtype, act.literal_value, adds.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, *addresses, start, count, affine, steps, past_cache = args
        keeps = is_given(builder, addresses[-1])
        x, dy, beside, dx, dresidual = elements_from(builder, stored, addresses, start)
        mean, scale, shift, a, b, c = (
            splat(builder, v) for v in (*unpack_tuple(builder, affine), *unpack_tuple(builder, steps))
        )

        def write(index: Any, *, past_cache: bool) -> None:
            t = x.load(index) - mean
            d = gradient(code, kind, dy.load(index), beside.load(index) if kind and code else None, t, scale, shift)
            if kind and code:
                with builder.if_then(keeps):
                    dresidual.store(index, d, past_cache=past_cache)
            dx.store(index, d.fused(a, t.fused(b, c)), past_cache=past_cache)

        _written(builder, start, count, past_cache, write)
        return context.get_dummy_value()

    return types.void(act, adds, x, x, x, x, x, types.int64, types.int64, affine, steps, types.int64), build
