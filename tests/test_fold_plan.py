"""The plan of folding, on graphs that are made by hand and by chance, and run with NumPy."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.fold.absorption import absorbed
from batchnorm.fold.plan import GONE, PLAIN, UNTOUCHED, plan_folding
from batchnorm.graph import (
    Activation,
    Add,
    Concat,
    Graph,
    Identity,
    Layout,
    Linear,
    Norm,
    Normalize,
    Other,
    Pad,
    Pool,
    Reshape,
    Transpose,
    Value,
    Weights,
)
from batchnorm.protocol import Border

# --- a network that runs ------------------------------------------------------------------------------------------


@dataclass
class Net:
    """A graph, and how each of its nodes is computed; weights and norms are looked up when it runs."""

    seed: int = 0
    borders: bool = True
    arrays: dict = field(default_factory=dict)

    def __post_init__(self):
        self.rng = np.random.default_rng(self.seed)
        self.graph = Graph(borders=self.borders)
        self.functions, self.inputs, self.number = {}, [], 0

    def name(self, kind):
        self.number += 1
        return f"{kind}{self.number}"

    def input(self, *shape):
        value = Value(shape)
        self.inputs.append((value, self.rng.normal(size=shape)))
        return value

    def add(self, operation, inputs, shape, function, name):
        (value,) = self.graph.add(operation, inputs, [shape], name)
        self.functions[value.producer] = function
        return value

    def weights(self, outputs, inputs, *places, bias=True, grouped="out", **options):
        weight = self.rng.normal(size=(outputs, inputs, *places) if grouped == "out" else (inputs, outputs, *places))
        pair = weight, self.rng.normal(size=outputs) if bias else None
        layout = Layout(0, 1) if grouped == "out" else Layout(1, 0, 1, "in")
        made = Weights(self.name("lin"), layout, lambda: pair, bias, **options)
        self.arrays[made] = pair
        return made

    def norm(self, size, *, positive=False, shift=True, zero=False, **options):
        gamma = self.rng.normal(size=size)
        gamma = np.abs(gamma) + 0.1 if positive else gamma
        if zero:
            gamma[0] = 0.0
        mean, beta = (self.rng.normal(size=size), self.rng.normal(size=size)) if shift else (np.zeros(size),) * 2
        return Norm(self.name("norm"), mean, self.rng.uniform(0.5, 2, size=size), gamma, beta, 1e-3, **options)

    # -- operations

    def dense(self, x, weights, axis=-1):
        axis %= len(x.shape)
        shape = tuple(self.arrays[weights][0].shape[0] if i == axis else n for i, n in enumerate(x.shape))

        def run(state, v):
            w, b = state.weights.get(weights, self.arrays[weights])
            y = np.moveaxis(np.tensordot(v, w, axes=(axis, 1)), -1, axis)
            return y if b is None else y + b.reshape([-1 if i == axis else 1 for i in range(v.ndim)])

        return self.add(Linear(weights, axis, axis), [x], shape, run, weights.name)

    def conv(self, x, weights, padding=0):
        """A convolution of ``(N, C, L)``."""
        w = self.arrays[weights][0]
        shape = (x.shape[0], w.shape[0], x.shape[2] + 2 * padding - w.shape[2] + 1)

        def run(state, v):
            w, b = state.weights.get(weights, self.arrays[weights])
            p = 0 if weights in state.unpadded else padding
            v = np.pad(v, ((0, 0), (0, 0), (p, p)))
            y = np.einsum("oik,nilk->nol", w, np.lib.stride_tricks.sliding_window_view(v, w.shape[2], axis=2))
            return y if b is None else y + b[:, None]

        pads = ((2, padding, padding),) if padding else ()
        return self.add(Linear(weights, 1, 1, pads), [x], shape, run, weights.name)

    def transposed_conv(self, x, weights):
        w = self.arrays[weights][0]
        shape = (x.shape[0], w.shape[1], x.shape[2] + w.shape[2] - 1)

        def run(state, v):
            w, b = state.weights.get(weights, self.arrays[weights])
            y = np.zeros(shape)
            for k in range(w.shape[2]):
                y[:, :, k : k + v.shape[2]] += np.einsum("io,nil->nol", w[:, :, k], v)
            return y if b is None else y + b[:, None]

        return self.add(Linear(weights, 1, 1, every_tap=False), [x], shape, run, weights.name)

    def normalize(self, x, norm, axis=1):
        def run(state, v):
            affine = norm.affine
            if norm in state.norms:
                affine = state.norms[norm]
            if affine is None:
                return v
            shape = [-1 if i == axis else 1 for i in range(v.ndim)]
            if isinstance(affine, Border):
                ((_, before, after),) = affine.padding
                padded = np.empty((*v.shape[:2], v.shape[2] + before + after))
                padded[:] = affine.value.reshape(shape)
                padded[..., before : before + v.shape[2]] = v
                return padded
            return v * affine.scale.reshape(shape) + affine.shift.reshape(shape)

        return self.add(Normalize(norm, axis), [x], x.shape, run, norm.name)

    def simple(self, operation, x, function, shape=None):
        shape = x.shape if shape is None else shape
        return self.add(operation, [x], shape, lambda _, v: function(v), self.name(type(operation).__name__.lower()))

    def relu(self, x):
        return self.simple(Activation(homogeneous=True, monotone=True), x, lambda v: np.maximum(v, 0))

    def sigmoid(self, x):
        return self.simple(Activation(monotone=True), x, lambda v: 1 / (1 + np.exp(-v)))

    def identity(self, x):
        return self.simple(Identity(), x, lambda v: v)

    def other(self, x):
        return self.simple(Other("cumsum"), x, lambda v: np.cumsum(v, axis=0))

    def reshape(self, x, *shape):
        return self.simple(Reshape(), x, lambda v: v.reshape(shape), shape)

    def transpose(self, x, *order):
        return self.simple(Transpose(order), x, lambda v: v.transpose(order), tuple(x.shape[i] for i in order))

    def pool(self, x, kind, *axes):
        reduce = np.mean if kind == "average" else np.max
        shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
        return self.simple(Pool(kind, axes), x, lambda v: reduce(v, axis=axes, keepdims=True), shape)

    def counting_pool(self, x, axis):
        """Average two neighbours, zeros outside counted."""
        pads = [(1, 1) if i == axis else (0, 0) for i in range(len(x.shape))]
        shape = tuple(n + 1 if i == axis else n for i, n in enumerate(x.shape))

        def run(v):
            v = np.pad(v, pads)
            return (v.take(range(shape[axis]), axis) + v.take(range(1, shape[axis] + 1), axis)) / 2

        return self.simple(Pool("average", (axis,), counted_padding=True), x, run, shape)

    def pad(self, x, axis, value=0.0):
        pads = [(1, 2) if i == axis else (0, 0) for i in range(len(x.shape))]
        shape = tuple(n + 3 if i == axis else n for i, n in enumerate(x.shape))
        mode = {"mode": "edge"} if value is None else {"constant_values": value}
        return self.simple(Pad((axis,), value), x, lambda v: np.pad(v, pads, **mode), shape)

    def join(self, values, axis=1):
        shape = tuple(sum(v.shape[i] for v in values) if i == axis else n for i, n in enumerate(values[0].shape))
        run = lambda _, *vs: np.concatenate(vs, axis=axis)  # noqa: E731
        return self.add(Concat(axis), values, shape, run, self.name("concat"))

    def sum(self, *values):
        return self.add(Add(), list(values), values[0].shape, lambda _, *vs: sum(vs), self.name("add"))

    # -- what is done with it

    def run(self, state):
        known = dict(self.inputs)
        for node in self.graph.nodes:
            known[node.outputs[0]] = self.functions[node](state, *(known[v] for v in node.inputs))
            assert (
                isinstance(node.operation, Normalize | Linear) or known[node.outputs[0]].shape == node.outputs[0].shape
            )
        return [known[node.outputs[0]] for node in self.graph.nodes if node.outputs[0].pinned]

    def end(self):
        for node in self.graph.nodes:
            if not node.outputs[0].consumers:
                node.outputs[0].pin("it is an output of the model")

    def folded(self, closed=None):
        """Plan, hold the folded network against the network, and return the plan with names for its fates."""
        self.end()
        plan = plan_folding(self.graph, closed)
        after = State(unpadded=plan.unpadded)
        for weights in plan.absorbers():
            w, b = self.arrays[weights]
            after.weights[weights] = absorbed(w, b, weights.layout, plan.before.get(weights), plan.after.get(weights))
        for norm, fate in plan.norms.items():
            if fate.state == GONE:
                after.norms[norm] = fate.border
            elif fate.state == PLAIN:
                after.norms[norm] = fate.affine
        for got, expected in zip(self.run(after), self.run(State()), strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9 * max(1.0, np.abs(expected).max()))
        return plan


@dataclass
class State:
    weights: dict = field(default_factory=dict)
    norms: dict = field(default_factory=dict)
    unpadded: set = field(default_factory=set)


@pytest.fixture
def net():
    return Net()


def assert_gone(plan, norm, direction, *into):
    fate = plan.norms[norm]
    assert fate.state == GONE, fate.how
    assert fate.how.startswith(direction)
    assert set(fate.into) == {layer.name for layer in into}


def assert_plain(plan, norm, *reasons):
    fate = plan.norms[norm]
    assert fate.state == PLAIN, fate.into
    assert fate.into == ()
    for reason in reasons:
        assert reason in fate.how


# --- what is absorbed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_goes_back_into_the_linear_layer_before_it(net, bias):
    w, norm = net.weights(3, 2, bias=bias), net.norm(3, zero=True)
    net.normalize(net.dense(net.input(4, 2), w), norm)
    assert_gone(net.folded(), norm, "backward", w)


def test_a_norm_goes_forward_into_all_that_read_it(net):
    w1, w2, norm = net.weights(3, 2, 3), net.weights(4, 2, 1), net.norm(2)
    h = net.normalize(net.sigmoid(net.input(4, 2, 6)), norm)
    net.conv(h, w1)
    net.conv(h, w2)
    assert_gone(net.folded(), norm, "forward", w1, w2)


def test_two_norms_around_one_layer_both_go_into_it(net):
    w, first, second = net.weights(3, 2), net.norm(2), net.norm(3)
    net.normalize(net.dense(net.normalize(net.input(4, 2), first), w), second)
    plan = net.folded()
    assert_gone(plan, first, "forward", w)
    assert_gone(plan, second, "backward", w)


def test_norms_one_after_the_other_compose(net):
    w, norms = net.weights(3, 2), [net.norm(3) for _ in range(3)]
    h = net.dense(net.input(4, 2), w)
    for norm in norms:
        h = net.normalize(h, norm)
    plan = net.folded()
    assert all(plan.norms[norm].state == GONE for norm in norms)


def test_the_first_of_two_norms_joins_the_second_where_no_linear_layer_is(net):
    first, second = net.norm(2), net.norm(2)
    net.normalize(net.normalize(net.sigmoid(net.input(4, 2)), first), second)
    plan = net.folded()
    assert_gone(plan, first, "forward", second)
    assert_plain(plan, second)


def test_a_norm_goes_back_through_what_it_commutes_with(net):
    w, norm = net.weights(3, 2, 1), net.norm(3)
    h = net.identity(net.pool(net.conv(net.input(2, 2, 8), w), "average", 2))
    net.normalize(net.transpose(net.reshape(h, 2, 1, 3), 0, 2, 1), norm)
    assert_gone(net.folded(), norm, "backward", w)


def test_a_transpose_that_is_not_its_own_inverse_is_undone_on_the_way_back_and_made_on_the_way_forward(net):
    w, norm = net.weights(3, 2), net.norm(3)
    net.normalize(net.transpose(net.dense(net.input(2, 4, 5, 2), w), 0, 3, 1, 2), norm)
    assert_gone(net.folded(), norm, "backward", w)
    other = Net()
    w, norm = other.weights(3, 2), other.norm(2)
    other.dense(other.transpose(other.normalize(other.sigmoid(other.input(2, 2, 4, 5)), norm), 0, 2, 3, 1), w)
    assert_gone(other.folded(), norm, "forward", w)


def test_a_shuffle_of_channels_is_undone_on_the_way_back(net):
    w, norm = net.weights(6, 2, 1), net.norm(6)
    h = net.reshape(net.conv(net.input(2, 2, 4), w), 2, 2, 3, 4)
    net.normalize(net.reshape(net.transpose(h, 0, 2, 1, 3), 2, 6, 4), norm)
    plan = net.folded()
    assert_gone(plan, norm, "backward", w)
    np.testing.assert_array_equal(plan.after[w].scale, norm.affine.scale.reshape(3, 2).T.reshape(-1))


def test_a_norm_is_split_over_the_pieces_of_a_concatenation(net):
    w1, w2, norm = net.weights(1, 2), net.weights(3, 2), net.norm(4)
    x = net.input(4, 2)
    net.normalize(net.join([net.dense(x, w1), net.dense(x, w2)]), norm)
    assert_gone(net.folded(), norm, "backward", w1, w2)


def test_a_norm_goes_back_into_both_sides_of_a_sum(net):
    w1, w2, norm = net.weights(3, 2), net.weights(3, 2), net.norm(3)
    x = net.input(4, 2)
    net.normalize(net.sum(net.dense(x, w1), net.dense(x, w2)), norm)
    assert_gone(net.folded(), norm, "backward", w1, w2)


def test_flattened_channels_reach_a_dense_layer(net):
    w, norm = net.weights(5, 12), net.norm(3)
    net.dense(net.reshape(net.normalize(net.relu(net.input(2, 3, 4)), norm), 2, 12), w)
    assert_gone(net.folded(), norm, "forward", w)


def test_positive_scales_pass_relu_and_max_pooling(net):
    w, norm = net.weights(3, 2, 1), net.norm(3, positive=True, shift=False)
    net.normalize(net.pool(net.relu(net.conv(net.input(2, 2, 4), w)), "max", 2), norm)
    assert_gone(net.folded(), norm, "backward", w)


def test_shifts_pass_max_pooling(net):
    w, norm = net.weights(3, 2, 1), net.norm(3, positive=True)
    net.normalize(net.pool(net.conv(net.input(2, 2, 4), w), "max", 2), norm)
    assert_gone(net.folded(), norm, "backward", w)


def test_a_pure_scale_passes_zero_padding_forward_and_back(net):
    w1, w2, norm = net.weights(3, 2, 3), net.weights(2, 3, 3), net.norm(2, shift=False)
    net.conv(net.pad(net.normalize(net.sigmoid(net.input(2, 2, 6)), norm), 2), w1)
    assert_gone(net.folded(), norm, "forward", w1)
    other = Net()
    w2, norm = other.weights(2, 3, 3), other.norm(2, shift=False)
    other.normalize(other.pad(other.conv(other.input(2, 3, 6), w2), 2), norm)
    assert_gone(other.folded(), norm, "backward", w2)


def test_copies_at_the_edge_are_padding_that_everything_passes(net):
    w, norm = net.weights(3, 2, 3), net.norm(2)
    net.conv(net.pad(net.normalize(net.sigmoid(net.input(2, 2, 6)), norm), 2, None), w)
    assert_gone(net.folded(), norm, "forward", w)


def test_a_layer_and_a_norm_that_are_both_called_twice_fit_each_other(net):
    w, norm = net.weights(2, 2), net.norm(2)
    x = net.input(4, 2)
    for _ in range(2):
        x = net.normalize(net.dense(x, w), norm)
    assert_gone(net.folded(), norm, "backward", w)


def test_a_shared_norm_goes_into_each_of_its_layers(net):
    w1, w2, norm = net.weights(3, 2), net.weights(3, 2), net.norm(3)
    x = net.input(4, 2)
    net.normalize(net.dense(x, w1), norm)
    net.normalize(net.dense(x, w2), norm)
    assert_gone(net.folded(), norm, "backward", w1, w2)


def test_a_padded_convolution_is_padded_with_what_becomes_zero(net):
    w, norm = net.weights(3, 2, 3), net.norm(2)
    net.conv(net.normalize(net.sigmoid(net.input(2, 2, 6)), norm), w, padding=1)
    plan = net.folded()
    assert_gone(plan, norm, "forward", w)
    assert plan.unpadded == {w}
    np.testing.assert_allclose(norm.affine.scale * plan.norms[norm].border.value + norm.affine.shift, 0, atol=1e-12)


def test_two_padded_convolutions_share_one_border(net):
    w1, w2, norm = net.weights(3, 2, 3), net.weights(1, 2, 2), net.norm(2)
    h = net.normalize(net.sigmoid(net.input(2, 2, 6)), norm)
    net.conv(h, w1, padding=1)
    net.conv(h, w2, padding=1)
    plan = net.folded()
    assert plan.unpadded == {w1, w2}


# --- what is declined ---------------------------------------------------------------------------------------------


def test_a_value_that_something_else_reads_is_left_alone(net):
    w, norm = net.weights(3, 2), net.norm(3)
    h = net.dense(net.input(4, 2), w)
    net.normalize(h, norm)
    net.sigmoid(h)
    assert_plain(net.folded(), norm, f"the output of {w.name} before it is used by activation", "it is an output")


def test_a_value_that_is_read_twice_by_one_node_is_left_alone(net):
    w, norm = net.weights(3, 2), net.norm(3)
    h = net.dense(net.input(4, 2), w)
    net.normalize(net.sum(h, h), norm)
    assert_plain(net.folded(), norm, "is used twice by add")


def test_a_pinned_value_is_left_alone_in_both_directions(net):
    w, w2, norm = net.weights(3, 2), net.weights(3, 3), net.norm(3)
    h = net.dense(net.input(4, 2), w)
    h.pin("a hook sees it")
    y = net.normalize(h, norm)
    y.pin("it is kept")
    net.dense(y, w2)
    assert_plain(net.folded(), norm, "before it may not change: a hook sees it", "after it may not change: it is kept")


def test_a_layer_that_is_used_without_the_norm_too_is_left_alone(net):
    w, norm = net.weights(2, 2), net.norm(2)
    x = net.input(4, 2)
    net.normalize(net.dense(x, w), norm)
    net.sigmoid(net.dense(x, w))
    assert_plain(net.folded(), norm, f"{w.name} is used in another place too")


def test_a_layer_with_two_norms_is_left_alone_even_where_they_are_equal(net):
    w, norm = net.weights(2, 2), net.norm(2)
    twin = Norm("twin", norm.mean, norm.variance, norm.gamma, norm.beta, norm.eps)
    x = net.input(4, 2)
    net.normalize(net.dense(x, w), norm)
    net.normalize(net.dense(x, w), twin)
    plan = net.folded()
    assert_plain(plan, norm, "is used in another place too")
    assert_plain(plan, twin, "is used in another place too")


def test_a_layer_whose_calls_need_different_weights_is_left_alone(net):
    w, norm = net.weights(2, 2), net.norm(4)
    x, y = net.input(4, 2), net.input(4, 2)
    net.normalize(net.join([net.dense(x, w), net.dense(y, w)]), norm)
    assert_plain(net.folded(), norm, f"{w.name} is called several times and would need other weights each time")


def test_a_norm_with_one_call_that_can_not_be_absorbed_keeps_all_of_them(net):
    w, norm = net.weights(2, 2), net.norm(2)
    x = net.input(4, 2)
    net.normalize(net.dense(x, w), norm)
    net.normalize(net.sigmoid(x), norm)
    assert_plain(net.folded(), norm, "neither linear nor commutes")


def test_another_axis_than_that_of_the_layer_is_declined(net):
    w, norm = net.weights(3, 2), net.norm(3)
    net.normalize(net.dense(net.input(4, 3, 2), w), norm)
    assert_plain(net.folded(), norm, "it normalizes another axis than the one that", "writes its channels to")
    other = Net()
    w, norm = other.weights(5, 3), other.norm(3)
    other.dense(other.normalize(other.sigmoid(other.input(4, 3, 3)), norm), w)
    assert_plain(other.folded(), norm, "reads its channels to")


@pytest.mark.parametrize("kind", [{"shift": True, "positive": True}, {"shift": False}])
def test_relu_passes_nothing_but_a_positive_scale(net, kind):
    w, norm = net.weights(3, 2), net.norm(3, **kind)
    net.normalize(net.relu(net.dense(net.input(4, 2), w)), norm)
    assert_plain(net.folded(), norm, "passes nothing but a positive scale")


def test_relu_does_not_pass_a_scale_of_zero(net):
    w, norm = net.weights(3, 2), net.norm(3, positive=True, shift=False, zero=True)
    net.normalize(net.relu(net.dense(net.input(4, 2), w)), norm)
    assert_plain(net.folded(), norm, "passes nothing but a positive scale")


@pytest.mark.parametrize("kind", [{}, {"positive": True, "zero": True, "shift": False}])
def test_max_pooling_passes_positive_scales_only(net, kind):
    w, norm = net.weights(3, 2, 1), net.norm(3, **kind)
    net.normalize(net.pool(net.conv(net.input(2, 2, 4), w), "max", 2), norm)
    assert_plain(net.folded(), norm, "passes positive scales only")


def test_counted_padding_does_not_pass_a_shift(net):
    w, norm = net.weights(3, 2, 1), net.norm(3)
    net.normalize(net.counting_pool(net.conv(net.input(2, 2, 4), w), 2), norm)
    assert_plain(net.folded(), norm, "averages zeros from outside")
    other = Net()
    w, norm = other.weights(3, 2, 1), other.norm(3, shift=False)
    other.normalize(other.counting_pool(other.conv(other.input(2, 2, 4), w), 2), norm)
    assert_gone(other.folded(), norm, "backward", w)


@pytest.mark.parametrize(("value", "shift"), [(0.0, True), (2.0, True), (2.0, False)])
def test_padding_with_a_constant_is_declined(net, value, shift):
    w, norm = net.weights(3, 2, 3), net.norm(2, shift=shift)
    net.conv(net.pad(net.normalize(net.sigmoid(net.input(2, 2, 6)), norm), 2, value), w)
    assert_plain(net.folded(), norm, "pads with a constant")


def test_places_along_the_normalized_axis_are_declined(net):
    norm = net.norm(3)
    net.dense(net.pool(net.normalize(net.input(4, 3), norm), "average", 1), net.weights(2, 1))
    assert_plain(net.folded(), norm, "works along the axis that is normalized")


def test_a_sum_with_something_unscaled_is_declined(net):
    w, norm = net.weights(3, 2), net.norm(2)
    x = net.input(4, 2)
    net.dense(net.sum(net.normalize(net.sigmoid(x), norm), x), w)
    assert_plain(net.folded(), norm, "adds something that is not scaled")


def test_a_pure_shift_passes_a_sum_as_often_as_it_is_added(net):
    w = net.weights(3, 2)
    norm = Norm("shift", np.zeros(2), np.ones(2) - 1e-3, None, np.array([1.0, -2.0]), 1e-3)
    assert (norm.affine.scale == 1).all()
    h = net.normalize(net.sigmoid(net.input(4, 2)), norm)
    net.dense(net.sum(h, h), w)
    assert_gone(net.folded(), norm, "forward", w)


def test_a_transposed_convolution_takes_no_shift_before_it(net):
    w, norm = net.weights(3, 2, 3, grouped="in"), net.norm(2)
    net.transposed_conv(net.normalize(net.sigmoid(net.input(2, 2, 4)), norm), w)
    assert_plain(net.folded(), norm, "is a transposed convolution")
    other = Net()
    w, norm, last = other.weights(3, 2, 3, grouped="in"), other.norm(2, shift=False), other.norm(3)
    other.normalize(other.transposed_conv(other.normalize(other.sigmoid(other.input(2, 2, 4)), norm), w), last)
    plan = other.folded()
    assert_gone(plan, norm, "forward", w)
    assert_gone(plan, last, "backward", w)


@pytest.mark.parametrize("option", ["locked", "closed"])
def test_weights_that_may_not_change_are_left_alone(net, option):
    w, norm = net.weights(3, 2, locked="they are tied" if option == "locked" else ""), net.norm(3)
    net.normalize(net.dense(net.input(4, 2), w), norm)
    plan = net.folded({w: "they are tied"} if option == "closed" else None)
    assert_plain(plan, norm, f"the weights of {w.name} may not change: they are tied")
    assert plan.absorbers() == []


def test_a_layer_that_can_not_have_a_bias_takes_scales_only(net):
    w, norm = net.weights(3, 2, bias=False, no_bias="it has a forward of its own"), net.norm(3)
    net.normalize(net.dense(net.input(4, 2), w), norm)
    assert_plain(net.folded(), norm, f"{w.name} can't be given a bias: it has a forward of its own")
    other = Net()
    w, norm = other.weights(3, 2, bias=False, no_bias="it has a forward of its own"), other.norm(3, shift=False)
    other.normalize(other.dense(other.input(4, 2), w), norm)
    assert_gone(other.folded(), norm, "backward", w)


def test_an_output_that_nothing_reads_goes_nowhere(net):
    norm = net.norm(2)
    net.normalize(net.sigmoid(net.input(4, 2)), norm)
    assert_plain(net.folded(), norm, "neither linear", "it is an output of the model")


def test_an_operation_in_place_after_a_norm_stops_it(net):
    w, norm = net.weights(3, 2), net.norm(2, positive=True, shift=False)
    h = net.relu(net.normalize(net.sigmoid(net.input(4, 2)), norm))
    h.producer.in_place = True
    net.dense(h, w)
    assert_plain(net.folded(), norm, "writes in place")


@pytest.mark.parametrize(
    "why",
    ["two readers", "other padding", "γ = 0", "pinned", "no borders", "fixed padding", "called twice", "twice padded"],
)
def test_a_padded_convolution_is_declined(why):
    net = Net(borders=why != "no borders")
    w = net.weights(2, 2, 3, fixed="its padding is its own" if why == "fixed padding" else "")
    norm = net.norm(2, zero=why == "γ = 0")
    h = net.normalize(net.sigmoid(net.input(2, 2, 6)), norm)
    y = net.conv(h, w, padding=1)
    if why == "two readers":
        net.sigmoid(h)
    elif why == "other padding":
        net.conv(h, net.weights(2, 2, 3), padding=2)
    elif why == "pinned":
        h.pin("it is kept")
    elif why == "called twice":
        net.conv(net.sigmoid(y), w, padding=1)
    elif why == "twice padded":
        net.conv(net.normalize(net.sigmoid(y), norm), w, padding=1)
    plan = net.folded()
    assert_plain(plan, norm)
    assert plan.unpadded == set()
    if why == "γ = 0":
        assert "γ = 0" in plan.norms[norm].how


def test_a_norm_before_one_that_pads_joins_it(net):
    w, first, second = net.weights(2, 2, 3), net.norm(2), net.norm(2)
    net.conv(net.normalize(net.normalize(net.sigmoid(net.input(2, 2, 6)), first), second), w, padding=1)
    plan = net.folded()
    assert_gone(plan, first, "forward", second)
    assert_gone(plan, second, "forward", w)


def test_a_convolution_that_is_padded_with_values_still_takes_the_norm_after_it(net):
    w, first, late = net.weights(2, 2, 3), net.norm(2), net.norm(2)
    h = net.normalize(net.sigmoid(net.input(2, 2, 6)), first)
    net.normalize(net.conv(h, w, padding=1), late)
    plan = net.folded()
    assert_gone(plan, first, "forward", w)
    assert_gone(plan, late, "backward", w)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"by_batch": True}, "by the statistics of the batch"),
        ({"mean": None}, "no running statistics"),
        ({"variance": None}, "no running statistics"),
        ({"mean": np.array([0.0, np.nan])}, "not finite"),
        ({"variance": np.array([1.0, np.inf])}, "not finite"),
        ({"gamma": np.array([1.0, np.nan])}, "not finite"),
        ({"beta": np.array([1.0, -np.inf])}, "not finite"),
        ({"variance": np.array([1.0, -0.25])}, "negative (-0.25)"),
        ({"variance": np.array([1.0, 0.0]), "eps": 0.0}, "variance + eps is zero"),
        ({"variance": np.array([1.0, 0.0]), "eps": -0.5}, "variance + eps is zero"),
        ({"locked": "it has a hook"}, "it has a hook"),
    ],
)
def test_a_norm_that_is_no_fixed_map_is_left_untouched(net, change, reason):
    w = net.weights(2, 2)
    made = {"mean": np.zeros(2), "variance": np.ones(2), "gamma": None, "beta": None, "eps": 0.1, **change}
    norm = Norm("n", **made)
    value = net.add(Normalize(norm, 1), [net.dense(net.input(4, 2), w)], (4, 2), lambda _, v: v, "n")
    after = net.norm(2)
    net.normalize(value, after)
    net.end()
    plan = plan_folding(net.graph)
    assert plan.norms[norm].state == UNTOUCHED
    assert reason in plan.norms[norm].how
    assert plan.norms[norm].affine is None
    assert_plain(plan, after, "n beside it can't take it in")
    assert plan.absorbers() == []


# --- networks by chance -------------------------------------------------------------------------------------------


class Builder:
    """Grow a network by drawing operations; layers and norms are used again at times."""

    def __init__(self, draw, seed):
        self.draw, self.net = draw, Net(seed)
        self.values = [self.net.input(2, 2, 4), self.net.input(2, 2, 4)]
        self.known = {"dense": [], "conv": [], "norm": []}

    def pick(self, things):
        return things[self.draw(st.integers(0, len(things) - 1))]

    def reused(self, kind, fits, make):
        old = [thing for thing in self.known[kind] if fits(thing)]
        if old and self.draw(st.integers(0, 3)) == 0:
            return self.pick(old)
        self.known[kind].append(make())
        return self.known[kind][-1]

    def norm(self, x):
        if len(x.shape) < 2:
            return None
        size = x.shape[1]
        kinds = [{}, {"positive": True}, {"shift": False}, {"positive": True, "shift": False}, {"zero": True}]
        norm = self.reused("norm", lambda n: len(n.mean) == size, lambda: self.net.norm(size, **self.pick(kinds)))
        return self.net.normalize(x, norm)

    def dense(self, x):
        axis = self.draw(st.integers(1, len(x.shape) - 1))
        size, arrays = x.shape[axis], self.net.arrays
        made = self.reused(
            "dense",
            lambda w: arrays[w][0].shape[1] == size,
            lambda: self.net.weights(self.draw(st.sampled_from([2, 4])), size, bias=self.draw(st.booleans())),
        )
        return self.net.dense(x, made, axis)

    def conv(self, x):
        if len(x.shape) != 3:
            return None
        size, arrays, padding = x.shape[1], self.net.arrays, self.draw(st.integers(0, 1))
        made = self.reused(
            "conv",
            lambda w: arrays[w][0].shape[1] == size,
            lambda: self.net.weights(2, size, 3, bias=self.draw(st.booleans())),
        )
        return self.net.conv(x, made, padding) if x.shape[2] + 2 * padding >= 3 else None

    def transposed(self, x):
        if len(x.shape) != 3:
            return None
        return self.net.transposed_conv(x, self.net.weights(2, x.shape[1], 2, grouped="in"))

    def reshape(self, x):
        shapes = [(2, int(np.prod(x.shape[1:]))), (2, -1, 2), (2, 2, -1), (2, 2, 2, -1), (-1, x.shape[-1])]
        shape = self.pick(shapes)
        fixed = int(np.prod([n for n in shape if n > 0]))
        total = int(np.prod(x.shape))
        if total % fixed or (min(shape) > 0 and total != fixed):
            return None
        return self.net.reshape(x, *(int(np.prod(x.shape)) // fixed if n < 0 else n for n in shape))

    def transpose(self, x):
        return self.net.transpose(x, 0, *self.draw(st.permutations(range(1, len(x.shape)))))

    def pool(self, x):
        axis = self.draw(st.integers(1, len(x.shape) - 1))
        kind = self.pick(["average", "max", "counted"])
        return self.net.counting_pool(x, axis) if kind == "counted" else self.net.pool(x, kind, axis)

    def pad(self, x):
        if max(x.shape) > 8:
            return None
        return self.net.pad(x, self.draw(st.integers(1, len(x.shape) - 1)), self.pick([0.0, None, 1.5]))

    def join(self, x):
        y = self.pick(self.values)
        axis = self.draw(st.integers(1, len(x.shape) - 1))
        alike = len(x.shape) == len(y.shape) and all(
            a == b or i == axis for i, (a, b) in enumerate(zip(x.shape, y.shape, strict=True))
        )
        return self.net.join([x, y], axis) if alike and sum((x.shape[axis], y.shape[axis])) < 16 else None

    def sum(self, x):
        y = self.pick([v for v in self.values if v.shape == x.shape])
        return self.net.sum(x, y)

    def grow(self):
        net = self.net
        steps = [
            self.norm, self.norm, self.norm, self.dense, self.dense, self.conv, self.conv, self.transposed, self.reshape,
            self.transpose, self.pool, self.pad, self.join, self.sum, net.relu, net.sigmoid, net.identity, net.other,
        ]  # fmt: skip
        for _ in range(self.draw(st.integers(3, 14))):
            # the newest values more often: chains are where something is folded
            x = self.values[-1] if self.draw(st.integers(0, 3)) else self.pick(self.values)
            value = self.pick(steps)(x)
            if value is not None:
                self.values.append(value)
        for value in self.values:
            if self.draw(st.integers(0, 15)) == 0:
                value.pin("it is kept")
        return net


@settings(max_examples=800, deadline=None, derandomize=True, database=None)
@given(st.data(), st.integers(0, 2**16))
def test_networks_by_chance_compute_the_same_after_folding(data, seed):
    plan = Builder(data.draw, seed).grow().folded()
    assert all(fate.state in (GONE, PLAIN) for fate in plan.norms.values())
    assert all(fate.how for fate in plan.norms.values())
