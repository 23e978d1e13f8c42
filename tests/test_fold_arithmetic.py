"""The arithmetic of folding: weights that take in Affines, and Affines that move along arrays, held to brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm import Affine
from batchnorm.fold import motion
from batchnorm.fold.absorption import absorbed, loss
from batchnorm.graph import Layout
from oracle import assert_near

common = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def dense_of(weight, layout):
    """Return the weight as one ``(O, I, places)`` array, zeros between groups, element by element."""
    w = weight.reshape(layout.shape) if layout.shape is not None else weight
    groups = layout.groups
    moved = np.moveaxis(w, (layout.out_axis, layout.in_axis), (0, 1))
    moved = moved.reshape(*moved.shape[:2], -1)
    outputs, inputs, places = moved.shape
    if layout.grouped == "out":
        per_group, inputs = outputs // groups, inputs * groups
    else:
        per_group, outputs = outputs, outputs * groups
    dense = np.zeros((outputs, inputs, places))
    for o in range(outputs):
        for i in range(inputs):
            group = o // per_group
            if layout.grouped == "out":
                members = inputs // groups
                if i // members == group:
                    dense[o, i] = moved[o, i - group * members]
            else:
                members = inputs // groups
                if i // members == group:
                    dense[o, i] = moved[o - group * per_group, i]
    return dense


def affine(rng, size):
    return Affine(rng.normal(size=size), rng.normal(size=size))


@st.composite
def layouts(draw):
    """Return a shape of weights and its layout: groups, transposed, axes in any order, places, depthwise with two axes."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    places = draw(st.lists(st.integers(1, 3), max_size=3))
    grouped = draw(st.sampled_from(["out", "in"]))
    sizes = {"out": outputs * groups, "in": inputs} if grouped == "out" else {"out": outputs, "in": inputs * groups}
    axes = draw(st.permutations(["out", "in", *range(len(places))]))
    shape = tuple(sizes[a] if isinstance(a, str) else places[a] for a in axes)
    out_axis, in_axis = axes.index("out"), axes.index("in")
    if draw(st.booleans()):
        out_axis, in_axis = out_axis - len(axes), in_axis - len(axes)
    return shape, Layout(out_axis, in_axis, groups, grouped), inputs * groups, outputs * groups


@common
@given(layouts(), st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_absorbed_weights_compute_the_composition(case, seed, has_bias, before, after, on_torch):
    shape, layout, inputs, outputs = case
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=shape)
    bias = rng.normal(size=outputs) if has_bias else None
    a, b = affine(rng, inputs) if before else None, affine(rng, outputs) if after else None
    dense, x = dense_of(weight, layout), rng.normal(size=(inputs, int(np.prod(shape)) // 1))
    x = x[:, : dense.shape[2]]
    inner = x if a is None else a.scale[:, None] * x + a.shift[:, None]
    y = np.einsum("oip,ip->o", dense, inner) + (0 if bias is None else bias)
    expected = y if b is None else b.scale * y + b.shift
    wrap = torch.from_numpy if on_torch else np.asarray
    w, bias2 = absorbed(wrap(weight), None if bias is None else wrap(bias), layout, a, b)
    assert w.shape == shape
    got = np.einsum("oip,ip->o", dense_of(np.asarray(w), layout), x) + np.asarray(bias2)
    np.testing.assert_allclose(
        got, expected, rtol=0, atol=1e-12 * max(1.0, np.abs(expected).max(), np.abs(x).max() * 9)
    )


@common
@given(layouts(), st.integers(0, 2**32 - 1), st.booleans())
def test_each_channel_of_an_affine_reaches_its_own_weights_only(case, seed, side):
    shape, layout, inputs, outputs = case
    rng = np.random.default_rng(seed)
    weight, size = rng.normal(size=shape), inputs if side else outputs
    chosen = rng.integers(size)
    scale = np.ones(size)
    scale[chosen] = 3.0
    one = Affine(scale, np.zeros(size))
    w, _ = absorbed(weight, None, layout, one if side else None, None if side else one)
    ratio = dense_of(np.asarray(w), layout)
    dense = dense_of(weight, layout)
    expected = dense * (scale[None, :, None] if side else scale[:, None, None])
    np.testing.assert_array_equal(ratio, expected)


def test_a_depthwise_kernel_with_two_channel_axes_is_reshaped_first(rng):
    kernel = rng.normal(size=(3, 3, 4, 2))
    layout = Layout(3, 2, groups=4, shape=(3, 3, 1, 8))
    after = affine(rng, 8)
    w, b = absorbed(kernel, None, layout, None, after)
    assert w.shape == kernel.shape
    for channel in range(4):
        for multiple in range(2):
            expected = kernel[..., channel, multiple] * after.scale[2 * channel + multiple]
            np.testing.assert_array_equal(w[..., channel, multiple], expected)
    np.testing.assert_array_equal(b, after.shift)


def test_a_depthwise_kernel_with_two_channel_axes_takes_in_what_comes_before(rng):
    kernel, before = rng.normal(size=(3, 4, 2)), affine(rng, 4)
    w, b = absorbed(kernel, None, Layout(2, 1, groups=4, shape=(3, 1, 8)), before, None)
    np.testing.assert_array_equal(w, kernel * before.scale[None, :, None])
    expected = (kernel * before.shift[None, :, None]).sum(0).reshape(-1)
    assert_near(b, expected, ulps=16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_arithmetic_is_in_float64_whatever_the_weights_are(dtype, rng):
    weight = torch.from_numpy(rng.normal(size=(3, 2))).to(dtype)
    after = affine(rng, 3)
    w, b = absorbed(weight, None, Layout(0, 1), None, after)
    assert w.dtype == b.dtype == torch.float64
    assert_near(w, weight.double().numpy() * after.scale[:, None], ulps=1)


def test_the_arguments_of_absorbed_stay_as_they_are(rng):
    weight, bias, a, b = rng.normal(size=(3, 2)), rng.normal(size=3), affine(rng, 2), affine(rng, 3)
    arrays = (weight, bias, a.scale, a.shift, b.scale, b.shift)
    copies = [v.copy() for v in arrays]
    absorbed(weight, bias, Layout(0, 1), a, b)
    for v, old in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(v, old)


def test_loss_is_infinite_beyond_the_range_and_small_within_it():
    assert loss(np.array([[65536.0, 1.0]]), np.float16, Layout(0, 1)) == np.inf
    assert loss(np.array([[np.nan, 1.0]]), np.float16, Layout(0, 1)) == np.inf
    assert loss(np.array([[65504.0, 1.0]]), np.float16, Layout(0, 1)) < np.finfo(np.float16).eps
    assert loss(np.array([[1e-9, 1e-9]]), np.float16, Layout(0, 1)) > 1
    assert loss(np.array([[1.0], [1e-9]]), np.float16, Layout(0, 1)) > 1
    assert loss(np.array([[1.0], [0.0]]), np.float16, Layout(0, 1)) < np.finfo(np.float16).eps


def test_loss_looks_at_each_output_channel_of_each_group_of_a_transposed_convolution():
    wide = np.ones((4, 2, 1))
    wide[:2] = 1e-9
    assert loss(wide, np.float16, Layout(1, 0, groups=2, grouped="in")) > 1


# --- motion -------------------------------------------------------------------------------------------------------


def applied(moved, x):
    return moved.scale * x + moved.shift


def assert_spread(moved, shape):
    for v in (moved.scale, moved.shift):
        assert v.ndim == len(shape)
        assert all(n in (1, size) for n, size in zip(v.shape, shape, strict=True))
    assert moved.scale.shape == moved.shift.shape


@st.composite
def spread_affines(draw):
    """Return a shape, a generator, and an Affine that varies along some of its axes, with repeated values at times."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    varies = tuple(n if draw(st.booleans()) else 1 for n in shape)
    few = draw(st.booleans())
    numbers = rng.integers(1, 3, size=(2, *varies)).astype(float) if few else rng.normal(size=(2, *varies))
    return shape, rng, Affine(*numbers)


@st.composite
def reshapes(draw):
    """Return a case with another shape that holds equally many values, with axes of size 1 put in and taken out."""
    shape, rng, moved = draw(spread_affines())
    left, after = int(np.prod(shape)), []
    while left > 1:
        factor = draw(st.sampled_from([d for d in range(2, left + 1) if left % d == 0]))
        after.append(factor)
        left //= factor
    for _ in range(draw(st.integers(0, 2))):
        after.insert(draw(st.integers(0, len(after))), 1)
    return shape, tuple(after), rng, moved


@common
@given(reshapes())
def test_an_affine_passes_a_reshape(case):
    before, after, rng, start = case
    x = rng.normal(size=before)
    moved = motion.reshaped(start, before, after)
    assert_spread(moved, after)
    np.testing.assert_array_equal(applied(moved, x.reshape(after)), applied(start, x).reshape(after))


@common
@given(reshapes())
def test_a_reshape_there_and_back_changes_nothing(case):
    before, after, rng, start = case
    back = motion.reshaped(motion.reshaped(start, before, after), after, before)
    x = rng.normal(size=before)
    np.testing.assert_array_equal(applied(back, x), applied(start, x))


def test_a_reshape_that_keeps_the_channels_keeps_them_along_one_axis(rng):
    start = motion.spread(affine(rng, 3), 1, 4)
    moved = motion.reshaped(start, (2, 3, 4, 5), (2, 3, 20))
    np.testing.assert_array_equal(motion.along(moved, 1, 3).scale, start.scale.reshape(-1))
    flat = motion.along(motion.reshaped(start, (2, 3, 4, 5), (2, 60)), 1, 60)
    np.testing.assert_array_equal(flat.shift, np.repeat(start.shift.reshape(-1), 20))


def test_a_reshape_of_nothing_is_refused(rng):
    assert motion.reshaped(motion.spread(affine(rng, 3), 1, 2), (0, 3), (3, 0)) is None


@common
@given(spread_affines(), st.data())
def test_an_affine_passes_a_transpose(case, data):
    shape, rng, start = case
    order = tuple(data.draw(st.permutations(range(len(shape)))))
    x = rng.normal(size=shape)
    np.testing.assert_array_equal(
        applied(motion.transposed(start, order), x.transpose(order)), applied(start, x).transpose(order)
    )


@common
@given(spread_affines(), st.data())
def test_an_affine_is_split_where_pieces_are_joined(case, data):
    shape, rng, start = case
    axis = data.draw(st.integers(0, len(shape) - 1))
    cut = data.draw(st.integers(0, shape[axis]))
    x = rng.normal(size=shape)
    pieces = np.split(x, [cut], axis=axis)
    ends = ((0, cut), (cut, shape[axis]))
    moved = [applied(motion.part(start, axis, *end), piece) for piece, end in zip(pieces, ends, strict=True)]
    np.testing.assert_array_equal(np.concatenate(moved, axis=axis), applied(start, x))


@common
@given(spread_affines(), st.data())
def test_an_affine_of_one_piece_leaves_the_others_alone(case, data):
    shape, rng, start = case
    axis, position = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(0, 2))
    sizes = [data.draw(st.integers(1, 3)) for _ in range(3)]
    sizes[position] = shape[axis]
    pieces = [rng.normal(size=(*shape[:axis], n, *shape[axis + 1 :])) for n in sizes]
    moved = motion.placed(start, axis, sizes, position)
    got = applied(moved, np.concatenate(pieces, axis=axis))
    pieces[position] = applied(start, pieces[position])
    np.testing.assert_array_equal(got, np.concatenate(pieces, axis=axis))


@common
@given(spread_affines(), st.data())
def test_along_one_axis_is_the_same_affine_or_none(case, data):
    shape, rng, start = case
    axis = data.draw(st.integers(0, len(shape) - 1))
    found = motion.along(start, axis, shape[axis])
    elsewhere = any(n > 1 for i, n in enumerate(start.scale.shape) if i != axis)
    assert (found is None) == elsewhere
    if found is not None:
        assert found.scale.shape == found.shift.shape == (shape[axis],)
        x = rng.normal(size=shape)
        np.testing.assert_array_equal(applied(motion.spread(found, axis, len(shape)), x), applied(start, x))
