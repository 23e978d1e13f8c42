"""What reaches a batch normalization layer in a picture of a network."""

import numpy as np
import pytest

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
from batchnorm.reach import calls, dropout

SHAPE = (2, 3, 4, 4)
LINEAR = Linear(Weights("w", Layout(0, 1), lambda: (np.ones((3, 3)), None), has_bias=False), 1, 1)


def norm(name):
    return Normalize(Norm(name, np.zeros(3), np.ones(3), None, None, 1e-5), 1)


def chain(*operations):
    """Return a picture of operations, one after the other, of which the last is followed by a norm."""
    graph, x = Graph(), Value(SHAPE)
    for operation in (*operations, norm("bn")):
        (x,) = graph.add(operation, [x], [SHAPE], type(operation).__name__)
    return graph


DROP = Identity(0.3)


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ((), None),
        ((DROP,), (0.3, True)),
        ((Identity(),), None),
        ((DROP, Identity()), (0.3, True)),
        ((DROP, Reshape(), Transpose((0, 1, 2, 3))), (0.3, True)),
        ((DROP, LINEAR), (0.3, False)),
        ((DROP, Activation()), (0.3, False)),
        ((DROP, Pool("max", (2, 3))), (0.3, False)),
        ((DROP, Pad((2, 3), 0.0), LINEAR), (0.3, False)),
        ((DROP, norm("before"), LINEAR), None),
        ((DROP, Other("LayerNormalization")), None),
        # the one that stands directly before is told, whatever else there is
        ((Identity(0.9), LINEAR, Identity(0.1)), (0.1, True)),
        ((Identity(0.2), Identity(0.4)), (0.4, True)),
    ],
)
def test_dropout_on_the_way_to_a_norm(operations, expected):
    found = dropout(chain(*operations))
    assert found.pop("bn", None) == expected
    assert set(found) <= {"before"}


@pytest.mark.parametrize("join", [Add(), Concat(1)])
def test_dropout_in_one_of_two_branches(join):
    graph, x = Graph(), Value(SHAPE)
    (left,) = graph.add(DROP, [x], [SHAPE], "drop")
    (right,) = graph.add(LINEAR, [x], [SHAPE], "conv")
    (y,) = graph.add(join, [right, left], [SHAPE], "join")
    graph.add(norm("bn"), [y], [SHAPE], "bn")
    assert dropout(graph) == {"bn": (0.3, False)}


def test_a_norm_that_is_called_twice():
    graph, x, shared = Graph(), Value(SHAPE), norm("bn")
    (y,) = graph.add(shared, [x], [SHAPE], "bn")
    (y,) = graph.add(DROP, [y], [SHAPE], "drop")
    graph.add(shared, [y], [SHAPE], "bn")
    graph.add(norm("other"), [x], [SHAPE], "other")
    assert calls(graph) == {"bn": 2, "other": 1}
    assert dropout(graph) == {"bn": (0.3, True)}


def test_a_network_of_many_branches_is_read_once():
    # 2 ** 60 paths
    graph, x = Graph(), Value(SHAPE)
    (x,) = graph.add(DROP, [x], [SHAPE], "drop")
    for _ in range(60):
        (x,) = graph.add(Add(), [x, x], [SHAPE], "add")
    graph.add(norm("bn"), [x], [SHAPE], "bn")
    assert dropout(graph) == {"bn": (0.3, False)}
