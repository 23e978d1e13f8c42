"""How the normalization of a Keras model stands and is trained, held against what Keras does with it."""

import copy
import os
import random

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest
import torch
from keras import layers as L  # noqa: N812

import batchnorm as bn
from batchnorm.errors import OptionError
from batchnorm.graph import Identity
from batchnorm.keras.model import KerasModel
from batchnorm.states import BatchSizes, Mend, Optimization

# NumPy 2 says it whenever Keras makes an array of a torch tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

BN = L.BatchNormalization
ON_TORCH = keras.backend.backend() == "torch"
torch_only = pytest.mark.skipif(not ON_TORCH, reason="a layer of Keras can't be recomputed eagerly on other backends")


def data(*shape, mean=2.0):
    return (np.random.default_rng(0).standard_normal(shape or (8, 6)) + mean).astype(np.float32)


def array(v):
    return np.asarray(keras.ops.convert_to_numpy(v), np.float64)


def inner(name, norm="bn"):
    return keras.Sequential([keras.Input((4,)), L.Dense(4), L.ReLU(), BN(name=norm)], name=name)


def nested(training=None, momentum=0.99):
    """Return a functional model with a norm of its own, in a model inside of it, and in a layer that can't be seen through."""
    keras.utils.set_random_seed(0)
    x = i = keras.Input((6,))
    x = L.Dropout(0.3, name="drop")(L.Dense(4, name="dense")(x))
    x = BN(name="bn", momentum=momentum)(x, training=training)
    x = inner("left")(x) + inner("right")(x)
    x = L.TimeDistributed(keras.Sequential([BN(name="deep")], name="seq"), name="td")(L.Reshape((2, 2))(x))
    return keras.Model(i, L.Dense(2)(L.Flatten()(x)))


class Own(keras.Model):
    """A model that computes in a call of its own, and holds two layers of one name."""

    def __init__(self):
        super().__init__()
        self.first, self.body, self.last = BN(name="bn"), inner("body"), BN(name="bn")

    def call(self, x, training=None):
        return self.last(self.body(self.first(x)))


def own():
    model = Own()
    model(data(8, 4))
    return model


def state(model, name="bn"):
    return next(s for s in KerasModel(model).states() if s.name == name)


def sequential(*layers, shape=(6,)):
    return keras.Sequential([keras.Input(shape), *layers])


# -- names ---------------------------------------------------------------------------------------------------------


def test_a_layer_has_one_name_everywhere():
    view = KerasModel(nested())
    graph = view.graph(data())
    names = [s.name for s in view.states()]
    assert sorted(names) == ["bn", "left.bn", "right.bn", "td.seq.deep"]
    assert names == [s.name for s in view.statistics()]
    assert {n.name for n in graph.norms()} == {"bn", "left.bn", "right.bn"}
    assert [n.name for n in graph.uncalled] == ["td.seq.deep"]
    assert {"bn", "left.bn"} <= {layer.name for layer in view.layers(data())}
    assert {node.name for node in graph.nodes} >= {"dense", "drop", "bn", "left.bn"}


def test_layers_of_a_model_with_its_own_call_have_names_too():
    view = KerasModel(own())
    assert [s.name for s in view.states()] == [s.name for s in view.statistics()] == ["bn", "body.bn", "bn_2"]
    assert {"bn", "body.bn", "bn_2"} <= {layer.name for layer in view.layers(None)}


def test_a_layer_that_is_used_twice_has_the_name_of_the_first_place():
    x, shared = keras.Input((4,)), BN(name="bn")
    twice = keras.Model(x, keras.Sequential([keras.Input((4,)), shared], name="outer")(shared(x)))
    view = KerasModel(twice)
    assert [s.name for s in view.states()] == [n.name for n in view.graph(None).norms()] == ["bn"]


# -- one layer -----------------------------------------------------------------------------------------------------


def test_what_a_layer_stores():
    layer = BN(momentum=0.75, epsilon=1e-4, gamma_initializer="uniform", beta_initializer="uniform")
    model = sequential(layer)
    model(data(), training=True)
    (found,) = KerasModel(model).states()
    for got, want in (
        (found.mean, layer.moving_mean),
        (found.variance, layer.moving_variance),
        (found.gamma, layer.gamma),
        (found.beta, layer.beta),
    ):
        np.testing.assert_array_equal(got, array(want))
        assert got.dtype == np.float64
    assert np.ptp(found.gamma) > 0
    assert (found.kind, found.eps, found.decay, found.updates) == ("BatchNormalization", 1e-4, 0.75, None)
    assert (found.dtype, found.by_batch, found.training, found.moves) == ("float32", False, True, True)
    assert (found.trainable, found.frozen, found.synchronized, found.ghost) == (True, False, False, None)
    assert (found.shared, found.initial_share) == ((), None)


def test_a_layer_without_scale_and_shift():
    model = sequential(BN(scale=False, center=False, name="bn"))
    found = state(model)
    assert (found.gamma, found.beta, found.trainable) == (None, None, None)
    assert state(sequential(BN(scale=False, name="bn"))).trainable is True


def test_a_frozen_layer():
    model = nested()
    model.get_layer("left").trainable = False
    found = state(model, "left.bn")
    assert (found.frozen, found.moves, found.training, found.trainable) == (True, False, False, False)
    found = state(model, "right.bn")
    assert (found.frozen, found.moves, found.training, found.trainable) == (False, True, True, True)


def test_parameters_that_are_frozen_alone():
    model = sequential(BN(name="bn"))
    model.layers[0].gamma.trainable = False
    assert state(model).trainable is True
    model.layers[0].beta.trainable = False
    found = state(model)
    assert (found.trainable, found.frozen, found.moves) == (False, False, True)


@pytest.mark.parametrize(("policy", "expected"), [("float16", "float16"), ("mixed_float16", "float32")])
def test_the_dtype_of_the_statistics(policy, expected):
    assert state(sequential(BN(name="bn", dtype=policy))).dtype == expected


class Ghost(BN):
    """A subclass with ghost batches."""

    virtual_batch_size = 4


def test_subclasses_count():
    found = state(sequential(Ghost(name="bn")))
    assert (found.kind, found.ghost) == ("Ghost", 4)


def test_layers_that_hold_the_same_statistics():
    model = sequential(BN(name="a"), BN(name="b"), BN(name="c"))
    a, b, _ = model.layers
    vars(b)["moving_mean"] = a.moving_mean
    assert [s.shared for s in KerasModel(model).states()] == [("b",), ("a",), ()]


def test_a_layer_that_is_not_built_is_refused():
    with pytest.raises(OptionError, match="'bn' must be built"):
        KerasModel(keras.Sequential([BN(name="bn")])).states()


def test_a_model_without_norms_has_no_states():
    assert KerasModel(sequential(L.Dense(3))).states() == []
    assert KerasModel(nested()).training is None


# -- hard-wired training -------------------------------------------------------------------------------------------


def wired(around, own, trainable=True):
    x = i = keras.Input((4,))
    layer = BN(name="bn", trainable=trainable)
    block = keras.Model(x, layer(x, training=own), name="block")
    return keras.Model(i, block(i, training=around)), layer


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("own", [None, True, False])
@pytest.mark.parametrize("around", [None, True, False])
def test_by_batch_is_what_a_plain_call_does(around, own, trainable):
    model, layer = wired(around, own, trainable)
    found, x = state(model, "block.bn"), data(8, 4)
    before = array(layer.moving_mean)
    model(x)
    assert found.by_batch == (not np.array_equal(before, array(layer.moving_mean)))


@pytest.mark.parametrize("own", [None, True, False])
def test_training_is_what_fit_does_whatever_the_graph_says(own):
    model, layer = wired(own, own)
    model.compile("sgd", "mse")
    before = array(layer.moving_mean)
    model.fit(data(8, 4), data(8, 4), verbose=0)
    moved = not np.array_equal(before, array(layer.moving_mean))
    assert state(model, "block.bn").training == state(model, "block.bn").moves == moved is True


def test_a_norm_inside_of_an_opaque_layer_that_is_called_in_training():
    x = keras.Input((3, 4))
    y = L.TimeDistributed(keras.Sequential([BN(name="bn")], name="seq"), name="td")(x, training=True)
    model = keras.Model(x, y)
    found, layer = state(model, "td.seq.bn"), model.get_layer("td").layer.layers[0]
    before = array(layer.moving_mean)
    model(data(8, 3, 4))
    assert found.by_batch is True
    assert not np.array_equal(before, array(layer.moving_mean))


# -- the picture ---------------------------------------------------------------------------------------------------

DROPPING = {
    "Dropout": (L.Dropout, (6,)),
    "GaussianDropout": (L.GaussianDropout, (6,)),
    "AlphaDropout": (L.AlphaDropout, (6,)),
    "SpatialDropout1D": (L.SpatialDropout1D, (4, 6)),
    "SpatialDropout2D": (L.SpatialDropout2D, (4, 4, 6)),
    "SpatialDropout3D": (L.SpatialDropout3D, (2, 2, 2, 6)),
}


@pytest.mark.parametrize("kind", DROPPING)
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_the_picture_tells_the_rate_of_dropout(kind, rate):
    make, shape = DROPPING[kind]
    nodes = KerasModel(sequential(make(rate, name="drop"), BN(), shape=shape)).graph(None).nodes
    assert [(n.name, n.operation) for n in nodes[:1]] == [("drop", Identity(rate))]


def test_noise_that_sets_nothing_to_zero_has_no_rate():
    (node, _) = KerasModel(sequential(L.GaussianNoise(0.3), BN())).graph(None).nodes
    assert node.operation == Identity()


# -- one step of training ------------------------------------------------------------------------------------------


def test_dropout_and_calls_of_a_rehearsal():
    found = KerasModel(nested()).rehearse(data())
    assert found.dropout == {"bn": (0.3, True)}
    # one call for each of the two steps of time
    assert found.calls == {"bn": 1, "left.bn": 1, "right.bn": 1, "td.seq.deep": 2}
    assert found.twice == ()


def test_a_layer_that_is_called_three_times():
    x, shared = keras.Input((4,)), BN(name="bn")
    y = shared(L.Dropout(0.5)(L.Dense(4)(shared(L.Dense(4)(x)))))
    found = KerasModel(keras.Model(x, shared(y))).rehearse(data(8, 4))
    assert (found.calls, found.dropout) == ({"bn": 3}, {"bn": (0.5, True)})


def recomputed(mode="full", **options):
    with keras.RematScope(mode, **options):
        first, second = BN(name="first", momentum=0.5), BN(name="second", momentum=0.5)
    x = keras.Input((6,))
    return keras.Model(x, L.Dense(2)(BN(name="third")(second(L.Dense(4)(first(x))))))


@torch_only
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["first", "second"]),
        ({"mode": "list_of_layers", "layer_names": ["second"]}, ["second"]),
        ({"mode": None}, []),
    ],
)
def test_layers_that_are_recomputed_move_twice(options, expected):
    model = recomputed(**options)
    view, x = KerasModel(model), data()
    assert list(view.rehearse(x).twice) == expected
    # and so they do in the model itself
    model(x, training=True).sum().backward()
    for layer in model.layers:
        if isinstance(layer, BN) and layer.momentum == 0.5:
            weights = 0.75 if layer.name in expected else 0.5
            seen = keras.Model(model.input, layer.input)(x, training=True)
            np.testing.assert_allclose(array(layer.moving_mean), weights * array(seen).mean(0), rtol=1e-3, atol=1e-6)


@torch_only
def test_a_rehearsal_takes_gradients_wherever_it_is_made():
    for context in (torch.no_grad, torch.inference_mode):
        view = KerasModel(recomputed())
        with context():
            assert view.rehearse(data()).twice == ("first", "second")


@torch_only
def test_a_frozen_layer_does_not_move_twice():
    model = recomputed()
    model.get_layer("first").trainable = False
    assert KerasModel(model).rehearse(data()).twice == ("second",)
    model.trainable = False
    assert KerasModel(model).rehearse(data()).twice == ()


@torch_only
def test_a_copy_is_recomputed_where_the_model_is():
    copied = KerasModel(recomputed()).changed(bn.protocol.Changes()).model
    assert KerasModel(copied).rehearse(data()).twice == ("first", "second")


def everything(model):
    return {
        "weights": [array(v) for v in model.weights],
        "state": [array(v) for v in model.non_trainable_variables],
        "layers": [sorted(vars(layer)) for layer in model._flatten_layers()],
        "losses": len(model.losses),
        "random": [random.random(), np.random.rand(), float(torch.rand(()))],
        "names": L.Dense(1).name.split("_")[0],
    }


def test_a_rehearsal_leaves_no_trace():
    found = []
    for rehearsed in (False, True):
        model = nested()
        keras.utils.set_random_seed(3)
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        if rehearsed:
            KerasModel(model).rehearse(data())
            draw = array(keras.random.normal((2,)))
        else:
            draw = array(keras.random.normal((2,)))
        found.append((everything(model), draw, [v.value.grad is None for v in model.weights] if ON_TORCH else None))
    (before, draw, grads), (after, other, more) = found
    for key in ("weights", "state"):
        for want, got in zip(before[key], after[key], strict=True):
            np.testing.assert_array_equal(got, want)
    assert [before[k] for k in ("layers", "losses", "random")] == [after[k] for k in ("layers", "losses", "random")]
    np.testing.assert_array_equal(draw, other)
    assert grads == more
    assert grads is None or all(grads)


class Failing(L.Layer):
    """A layer that works in evaluation only."""

    def call(self, x, training=None):
        if training:
            raise RuntimeError("no training here")
        return x


def shares_its_layers():
    x = i = keras.Input((6,))
    return keras.Model(i, keras.Function(x, BN()(x))(i))


@pytest.mark.parametrize(
    ("make", "x", "words"),
    [
        (own, (8, 4), "must be Sequential or functional"),
        (lambda: keras.Sequential([BN()]), (8, 4), "must be built"),
        (lambda: sequential(BN()), (8, 5), "must have the shape"),
        (lambda: sequential(Failing(), BN()), (8, 6), "must train on the example.*no training here"),
        (shares_its_layers, (8, 6), "must be copied to be trained"),
    ],
    ids=["own call", "not built", "shape", "fails", "shared"],
)
def test_what_can_not_be_rehearsed(make, x, words):
    with pytest.raises(OptionError, match=words):
        KerasModel(make()).rehearse(data(*x))


def test_what_a_batch_calls_the_model_with():
    x, view = data(), KerasModel(nested())
    for batch in (x, (x, x), (x, x, x), [x, x], (x,)):
        assert view.example_of(batch) is x
    a, b = keras.Input((4,)), keras.Input((4,))
    two = KerasModel(keras.Model([a, b], L.add([a, b])))
    assert two.example_of([x, x]) == [x, x]
    assert two.example_of(((x, x), x)) == (x, x)
    assert two.example_of(({"a": x, "b": x}, x)).keys() == {"a", "b"}


# -- loaders -------------------------------------------------------------------------------------------------------


class Set(keras.utils.PyDataset):
    """A data set that keeps account of what is read."""

    def __init__(self, sizes, endless=False):
        super().__init__()
        self.sizes, self.endless, self.read = sizes, endless, []

    def __len__(self):
        return len(self.sizes)

    @property
    def num_batches(self):
        return None if self.endless else len(self.sizes)

    def __getitem__(self, index):
        self.read.append(index)
        return data(self.sizes[index], 6), np.zeros(self.sizes[index])


def loader(samples=10, size=4, **options):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(samples, 6)), size, **options)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(3, 6))


class Again:
    def __iter__(self):
        return iter([data(5, 6), data(2, 6)])


LOADERS = {
    "samples and size": (lambda: (10, 4), BatchSizes(4, 2, 10)),
    "samples and size, even": (lambda: (12, 4), BatchSizes(4, 4, 12)),
    "fewer samples than a batch": (lambda: (3, 4), BatchSizes(3, 3, 3)),
    "PyDataset": (lambda: Set([4, 4, 2]), BatchSizes(4, 2, 10)),
    "PyDataset of one batch": (lambda: Set([3]), BatchSizes(3, 3, 3)),
    "PyDataset without an end": (lambda: Set([4], endless=True), BatchSizes(4)),
    "list": (lambda: [data(4, 6), data(4, 6), data(1, 6)], BatchSizes(4, 1, 9)),
    "list of pairs": (lambda: [(data(4, 6), np.zeros(4)), (data(1, 6), np.zeros(1))], BatchSizes(4, 1, 5)),
    "list of dicts": (lambda: [{"x": data(4, 6)}], BatchSizes(4, 4, 4)),
    "iterable": (Again, BatchSizes(5)),
    "DataLoader": (loader, BatchSizes(4, 2, 10)),
    "DataLoader that drops": (lambda: loader(drop_last=True), BatchSizes(4, 4, 8)),
    "DataLoader of a sampler": (
        lambda: loader(sampler=torch.utils.data.SubsetRandomSampler(range(5))),
        BatchSizes(4, 1, 5),
    ),
    "DataLoader of a stream": (lambda: torch.utils.data.DataLoader(Stream(), 3), BatchSizes(3)),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_sizes_of_batches(name):
    make, expected = LOADERS[name]
    assert KerasModel(nested()).batch_sizes(make()) == expected


def test_only_the_first_and_the_last_batch_are_read():
    made = Set([4] * 50)
    KerasModel(nested()).batch_sizes(made)
    assert made.read == [0, 49]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (data, "must tell the sizes"),
        (lambda: iter([data()]), "must tell the sizes"),
        (lambda: "train", "must tell the sizes"),
        (lambda: 4, "must tell the sizes"),
        (list, "at least one batch"),
        (lambda: Set([]), "at least one batch"),
        (lambda: (0, 4), "at least one batch"),
        (lambda: (4, 0), "at least one batch"),
        (lambda: loader(3, drop_last=True), "at least one batch"),
        (lambda: loader(size=None), "must tell its batch_size"),
        (lambda: ["words"], "batches of arrays"),
        (lambda: Set([None]), "it failed"),
    ],
)
def test_loaders_that_do_not_tell(make, words):
    with pytest.raises(OptionError, match=words):
        KerasModel(nested()).batch_sizes(make())


# -- optimizers ----------------------------------------------------------------------------------------------------


def dense(**options):
    return sequential(L.Dense(4, name="dense"), BN(name="bn", **options), L.Dense(2, name="end"))


def excluding(optimizer, **options):
    optimizer.exclude_from_weight_decay(**options)
    return optimizer


def decayed(model, optimizer):
    return KerasModel(model).optimization(optimizer).decayed


O = keras.optimizers  # noqa: E741


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (O.SGD, {}),
        (O.Adam, {}),
        (O.AdamW, {"bn": 0.004}),
        (lambda: O.SGD(weight_decay=0.1), {"bn": 0.1}),
        (lambda: O.SGD(weight_decay=0.0), {}),
        (lambda: excluding(O.AdamW(), var_names=["gamma", "beta"]), {}),
        (lambda: excluding(O.AdamW(), var_names=["gamma"]), {"bn": 0.004}),
        (lambda: excluding(O.AdamW(), var_names=["bias"]), {"bn": 0.004}),
        (lambda: O.LossScaleOptimizer(O.AdamW(weight_decay=0.2)), {"bn": 0.2}),
    ],
)
def test_the_weight_decay_of_gamma_and_beta(make, expected):
    assert decayed(dense(), make()) == expected


def test_variables_that_are_excluded_one_by_one():
    model = dense()
    layer = model.get_layer("bn")
    assert decayed(model, excluding(O.AdamW(), var_list=[layer.gamma])) == {"bn": 0.004}
    assert decayed(model, excluding(O.AdamW(), var_list=[layer.gamma, layer.beta])) == {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gamma_regularizer": keras.regularizers.L2(0.03)}, 0.06),
        ({"beta_regularizer": keras.regularizers.L1L2(0.1, 0.01)}, 0.02),
        ({"gamma_regularizer": keras.regularizers.L1(0.5)}, None),
    ],
)
def test_a_penalty_pulls_as_weight_decay_does(options, expected):
    model = dense(gamma_initializer="ones", beta_initializer="ones", **options)
    found = decayed(model, O.SGD())
    assert found == ({} if expected is None else {"bn": pytest.approx(expected)})
    if expected is None or not ON_TORCH:
        return
    model.losses[0].backward()
    layer = model.get_layer("bn")
    variable = layer.gamma if "gamma_regularizer" in options else layer.beta
    # L1 pulls too, by a force that is always the same
    l1 = 0.1 if "beta_regularizer" in options else 0.0
    np.testing.assert_allclose(array(variable.value.grad), l1 + expected, rtol=1e-5)


def test_frozen_layers_are_not_decayed():
    model = dense()
    model.get_layer("bn").trainable = False
    assert decayed(model, O.AdamW()) == {}


def test_steps_and_accumulation():
    model, optimizer = dense(), O.SGD(gradient_accumulation_steps=2)
    assert KerasModel(model).optimization(optimizer) == Optimization({}, 0, 2)
    model.compile(optimizer, "mse")
    model.fit(data(24, 6), data(24, 2), batch_size=4, verbose=0)
    assert KerasModel(model).optimization(optimizer) == Optimization({}, 3, 2)
    assert KerasModel(model).optimization(O.SGD()).accumulation is None


def test_optimizers_of_others_are_refused():
    model, other = dense(), dense()
    optimizer = O.AdamW()
    optimizer.build(other.trainable_variables)
    for method in ("optimization", "spare"):
        with pytest.raises(OptionError, match="variables that are not the model's"):
            getattr(KerasModel(model), method)(optimizer)
        with pytest.raises(OptionError, match=r"must be a keras.optimizers.Optimizer, got a SGD"):
            getattr(KerasModel(model), method)(torch.optim.SGD([torch.zeros(1, requires_grad=True)]))


def shrunk(model, optimizer):
    """Return which variables a step without gradients makes smaller."""
    for v in model.trainable_variables:
        v.assign(np.ones(v.shape))
    optimizer.apply([keras.ops.zeros(v.shape) for v in model.trainable_variables], model.trainable_variables)
    return {v.path.split("/", 1)[-1] for v in model.trainable_variables if (array(v) < 1).all()}


@pytest.mark.parametrize("built", [False, True] if ON_TORCH else [False])
def test_sparing_takes_the_decay_off_gamma_and_beta_alone(built):
    model, optimizer = dense(), excluding(O.SGD(0.1, weight_decay=0.1), var_names=["bias"])
    rest = {"dense/kernel", "end/kernel"}
    if built:
        assert shrunk(model, optimizer) == {*rest, "bn/gamma", "bn/beta"}
    assert KerasModel(model).spare(optimizer) == 2
    assert shrunk(model, optimizer) == rest
    assert decayed(model, optimizer) == {}
    assert KerasModel(model).spare(optimizer) == 0


def test_sparing_keeps_variables_that_were_excluded():
    model, optimizer = dense(), O.SGD(0.1, weight_decay=0.1)
    layer = model.get_layer("bn")
    optimizer.exclude_from_weight_decay(var_list=[layer.beta, model.get_layer("end").kernel])
    assert KerasModel(model).spare(optimizer) == 1
    assert shrunk(model, optimizer) == {"dense/kernel", "dense/bias", "end/bias"}


@pytest.mark.skipif(not hasattr(O, "MultiOptimizer"), reason="this Keras has no MultiOptimizer")
def test_optimizers_that_hold_others():
    model = dense()
    several = O.MultiOptimizer(lambda v: O.AdamW(weight_decay=0.3))
    assert decayed(model, several) == {"bn": 0.3}
    with pytest.raises(OptionError, match="made by a function as they are needed"):
        KerasModel(model).spare(several)
    one, other = O.AdamW(weight_decay=0.3), O.SGD()
    several = O.MultiOptimizer(lambda v: one if "bn" in v.path else other)
    several.build(model.trainable_variables)
    assert decayed(model, several) == {"bn": 0.3}
    if ON_TORCH:
        assert KerasModel(model).spare(several) == 2
        assert decayed(model, several) == {}


# -- mending -------------------------------------------------------------------------------------------------------


def test_mending_in_place():
    model = nested()
    found = KerasModel(model).mend(
        {"bn": Mend(decay=0.9, eps=0.5), "left.bn": Mend(freeze=True), "td.seq.deep": Mend(eps=1e-5)}
    )
    assert found is None
    assert (model.get_layer("bn").momentum, model.get_layer("bn").epsilon) == (0.9, 0.5)
    assert (state(model, "left.bn").frozen, state(model, "right.bn").frozen) == (True, False)
    assert state(model, "td.seq.deep").eps == 1e-5


@pytest.mark.parametrize(
    ("mends", "words"),
    [
        ({"bn": Mend(decay=0.5), "nothing": Mend()}, "must be one of 'bn', .*got 'nothing'"),
        ({"bn": Mend(decay=0.5), "left.bn": Mend(training=False)}, "'left.bn' .*Keras has no modes"),
        ({"bn": Mend(decay=0.5, count_once=True)}, "RematScope"),
        ({"bn": Mend(decay=1.5)}, "between 0 and 1"),
        ({"bn": Mend(decay=0.5, eps=float("nan"))}, "finite"),
    ],
)
def test_all_is_mended_or_nothing(mends, words):
    model = nested()
    with pytest.raises(OptionError, match=words):
        KerasModel(model).mend(mends)
    assert model.get_layer("bn").momentum == 0.99


def test_what_has_to_be_built_again_is_told():
    with pytest.raises(OptionError, match="calls it with training=True: build the model again"):
        KerasModel(nested(training=True)).mend({"bn": Mend(training=False)})
    half = sequential(BN(name="bn", dtype="float16"))
    with pytest.raises(OptionError, match=r"dtype='mixed_float16'.*set_weights"):
        KerasModel(half).mend({"bn": Mend(wide=True)})
    # as the advice says
    whole = sequential(BN(name="bn", dtype="mixed_float16"))
    whole.set_weights(half.get_weights())
    KerasModel(whole).mend({"bn": Mend(wide=True)})
    assert state(whole).dtype == "float32"


def test_a_copy_of_a_model_keeps_its_states():
    model = copy.deepcopy(dense())
    assert state(model).decay == 0.99
