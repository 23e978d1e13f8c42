"""What is done with some rows of a strip of columns, each of which has a mean, a scale and sums of its own.

A strip is read eight columns at a time; the last eight may overlap those before and have places of their own, so that nothing
is added twice. Of a strip of fewer than eight columns, each is read into all lanes.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.cgutils import for_range_slice
from numba.extending import intrinsic

from batchnorm.kernels.activations import is_light
from batchnorm.kernels.elements import gradient, output
from batchnorm.kernels.lanes import LONG, WIDTH, Elements, Lanes, computed, elements_from, is_given
from batchnorm.kernels.scalars import apart, cleared

__all__ = ["add_distances", "add_gradients", "flush", "slots", "spread", "write_gradients", "write_outputs"]

# elements that are asked for ahead of time: where a row is short, the processor does not see that the next one follows
AHEAD = 512
# rows that are read together where they do not follow each other
TOGETHER = 4
Body = Callable[..., None]
Read = Callable[[Elements, Any], Lanes]


@njit(error_model="numpy")
def slots(columns: int) -> int:
    """Return how many numbers there are for the columns of a strip."""
    return 8 * columns if columns < 8 else (columns + 7) // 8 * 8


@njit(error_model="numpy")
def spread(channels: Any, first: int, width: int, places: int, found: Any) -> None:
    """Write what belongs to each channel for each of its columns."""
    apart()
    columns = width * places
    for c in range(width):
        value = channels[first + c]
        for k in range(c * places, (c + 1) * places):
            found[k] = value
    if columns < 8:
        for k in range(columns - 1, -1, -1):
            for lane in range(8 * k + 7, 8 * k - 1, -1):
                found[lane] = found[k]
    else:
        end = slots(columns)
        for lane in range(1, 9):
            found[end - lane] = found[columns - lane]


@njit(error_model="numpy")
def flush(sums: Any, width: int, places: int, totals: Any, first: int) -> None:
    """Add the sums of each channel's columns to those in float64, and begin anew."""
    apart()
    columns = width * places
    overlap = slots(columns) - columns
    last = slots(columns) - 8
    if places == 1 and columns >= 8:
        for c in range(last):
            totals[first + c] += sums[c]
        for c in range(last, columns):
            totals[first + c] += sums[c + overlap]
    else:
        for c in range(width):
            found = 0.0
            for k in range(c * places, (c + 1) * places):
                found += sums[8 * k if columns < 8 else k if k < last else k + overlap]
            totals[first + c] += found
    cleared(sums, slots(columns))


class _Rows:
    """Rows of a strip, and how they are gone through.

    Rows that follow each other without a gap are read as they lie, and asked for ahead of time; of others, or where there are
    few columns, some are read together.
    """

    def __init__(self, builder: Any, rows: Any, stride: Any, columns: Any) -> None:
        self.builder, self.rows, self.stride, self.columns = builder, rows, stride, columns

    def each(self, together: int, body: Body) -> None:
        """Call the body for each eight columns: ``body(indices, slot, read)``, with an index for each row."""
        if together == 1:
            self._singly(body)
            return
        builder = self.builder
        few = builder.icmp_signed("<", self.columns, LONG(WIDTH))
        with builder.if_else(builder.or_(few, builder.icmp_signed("==", self.stride, self.columns))) as (whole, strip):
            with whole:
                self._singly(body)
            with strip:
                wide = LONG(together)
                some = builder.mul(builder.udiv(self.rows, wide), wide)
                with for_range_slice(builder, LONG(0), some, wide, LONG) as (row, _):
                    begins = [builder.mul(builder.add(row, LONG(k)), self.stride) for k in range(together)]
                    self._columns(begins, body, _read)
                with for_range_slice(builder, some, self.rows, LONG(1), LONG) as (row, _):
                    self._columns([builder.mul(row, self.stride)], body, _read)

    def _singly(self, body: Body) -> None:
        builder = self.builder
        with builder.if_else(builder.icmp_signed("<", self.columns, LONG(WIDTH))) as (few, many):
            with (
                few,
                self._each_row() as (begin, _),
                for_range_slice(builder, LONG(0), self.columns, LONG(1), LONG) as (column, _),
            ):
                body([builder.add(begin, column)], builder.mul(column, LONG(WIDTH)), _read_one)
            with many, self._each_row() as (begin, _):
                self._columns([begin], body, _read_ahead)

    def _each_row(self) -> Any:
        return for_range_slice(self.builder, LONG(0), self.builder.mul(self.rows, self.stride), self.stride, LONG)

    def _columns(self, begins: list[Any], body: Body, read: Any) -> None:
        builder = self.builder
        last = builder.sub(self.columns, LONG(WIDTH))
        with for_range_slice(builder, LONG(0), self.columns, LONG(WIDTH), LONG) as (slot, _):
            column = builder.select(builder.icmp_signed("<", slot, last), slot, last)
            body([builder.add(begin, column) for begin in begins], slot, read)


def _read(elements: Elements, index: Any) -> Lanes:
    return elements.load(index)


def _read_one(elements: Elements, index: Any) -> Lanes:
    return elements.load_one(index)


def _read_ahead(elements: Elements, index: Any) -> Lanes:
    elements.prefetch(elements.builder.add(index, LONG(AHEAD)))
    return elements.load(index)


def _numbers(builder: Any, stored: Any, addresses: Any) -> list[Elements]:
    return [Elements(builder, computed(stored), address) for address in addresses]


def _together(act: Any) -> int:
    return TOGETHER if is_light(act.literal_value) else 1


@intrinsic
def add_distances(
    context: Any, x: Any, start: Any, rows: Any, stride: Any, columns: Any, mean: Any, s: Any, q: Any
) -> Any:
    """Add the distances of some rows from a mean, and their squares, to s and q."""
    stored = x.dtype

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, start, rows, stride, columns, *addresses = args
        (x,) = elements_from(builder, stored, [address], start)
        mean, s, q = _numbers(builder, stored, addresses)

        def add(indices: list[Any], slot: Any, read: Read) -> None:
            centre, plain, squares = mean.load(slot), s.load(slot), q.load(slot)
            for index in indices:
                t = read(x, index) - centre
                plain, squares = plain + t, t.fused(t, squares)
            s.store(slot, plain)
            q.store(slot, squares)

        _Rows(builder, rows, stride, columns).each(TOGETHER, add)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(x, whole, whole, whole, whole, mean, s, q), build


@intrinsic(prefer_literal=True)
def write_outputs(
    context: Any, act: Any, adds: Any, x: Any, y: Any, beside: Any, start: Any, rows: Any, stride: Any, columns: Any,
    mean: Any, scale: Any, shift: Any, past_cache: Any,
) -> Any:  # fmt: skip
    """Write ``activation((x - mean) · scale + shift + residual)`` of some rows."""
    stored, code, kind = x.dtype, act.literal_value, adds.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, x, y, beside, start, rows, stride, columns, *addresses, past_cache = args
        x, y, beside = elements_from(builder, stored, (x, y, beside), start)
        affine = _numbers(builder, stored, addresses)

        def write(indices: list[Any], slot: Any, read: Read) -> None:
            numbers = [v.load(slot) for v in affine]
            for index in indices:
                z = output(code, read(x, index), read(beside, index) if kind else None, *numbers)
                _put(y, index, z, past_cache, read)

        _Rows(builder, rows, stride, columns).each(_together(act), write)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(act, adds, x, x, x, whole, whole, whole, whole, mean, mean, mean, whole), build


def _put(elements: Elements, index: Any, value: Lanes, past_cache: Any, read: Read) -> None:
    builder = elements.builder
    if read is _read_one:
        elements.store_one(index, value)
        return
    with builder.if_else(builder.trunc(past_cache, ir.IntType(1))) as (past, kept):
        with past:
            elements.store(index, value, past_cache=True)
        with kept:
            elements.store(index, value)


@intrinsic(prefer_literal=True)
def add_gradients(
    context: Any, act: Any, adds: Any, x: Any, dy: Any, beside: Any, start: Any, rows: Any, stride: Any, columns: Any,
    mean: Any, scale: Any, shift: Any, s: Any, q: Any,
) -> Any:  # fmt: skip
    """Add d and d · (x - mean) of some rows to s and q, d being the gradient before the activation."""
    stored, code, kind = x.dtype, act.literal_value, adds.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, x, dy, beside, start, rows, stride, columns, *addresses = args
        x, dy, beside = elements_from(builder, stored, (x, dy, beside), start)
        *affine, s, q = _numbers(builder, stored, addresses)

        def add(indices: list[Any], slot: Any, read: Read) -> None:
            mean, scale, shift, plain, distant = (v.load(slot) for v in (*affine, s, q))
            for index in indices:
                t = read(x, index) - mean
                added = read(beside, index) if kind and code else None
                d = gradient(code, kind, read(dy, index), added, t, scale, shift)
                plain, distant = plain + d, d.fused(t, distant)
            s.store(slot, plain)
            q.store(slot, distant)

        _Rows(builder, rows, stride, columns).each(_together(act), add)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(act, adds, x, x, x, whole, whole, whole, whole, mean, mean, mean, s, q), build


@intrinsic(prefer_literal=True)
def write_gradients(
    context: Any, act: Any, adds: Any, x: Any, dy: Any, beside: Any, dx: Any, dresidual: Any, start: Any, rows: Any,
    stride: Any, columns: Any, mean: Any, scale: Any, shift: Any, a: Any, b: Any, c: Any, past_cache: Any,
) -> Any:  # fmt: skip
    """Write ``dx = a · d + b · (x - mean) + c`` of some rows, and d where the gradient of a residual has an address."""
    stored, code, kind = x.dtype, act.literal_value, adds.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, *given, start, rows, stride, columns, mean, scale, shift, a, b, c, past_cache = args
        keeps = is_given(builder, given[-1])
        x, dy, beside, dx, dresidual = elements_from(builder, stored, given, start)
        numbers = _numbers(builder, stored, (mean, scale, shift, a, b, c))

        def write(indices: list[Any], slot: Any, read: Read) -> None:
            mean, scale, shift, a, b, c = (v.load(slot) for v in numbers)
            for index in indices:
                t = read(x, index) - mean
                added = read(beside, index) if kind and code else None
                d = gradient(code, kind, read(dy, index), added, t, scale, shift)
                if kind and code:
                    with builder.if_then(keeps):
                        _put(dresidual, index, d, past_cache, read)
                _put(dx, index, d.fused(a, t.fused(b, c)), past_cache, read)

        _Rows(builder, rows, stride, columns).each(_together(act), write)
        return context.get_dummy_value()

    whole = types.int64
    signature = types.void(
        act, adds, x, x, x, x, x, whole, whole, whole, whole, mean, mean, mean, mean, mean, mean, whole
    )
    return signature, build
