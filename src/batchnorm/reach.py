"""What reaches the batch normalization layers of a network, read off its picture."""

from batchnorm.graph import (
    Activation,
    Add,
    Concat,
    Graph,
    Identity,
    Linear,
    Node,
    Pad,
    Pool,
    Reshape,
    Transpose,
    Value,
)

__all__ = ["calls", "dropout"]

# they hand on each value as it is
_PLAIN = (Identity, Reshape, Transpose)
# behind them a value still varies more in training than in evaluation, which a normalization would set right
_PASSING = (*_PLAIN, Activation, Add, Concat, Linear, Pad, Pool)


def calls(graph: Graph) -> dict[str, int]:
    """Return how often each batch normalization layer of a picture is called, by its name.

    Example:
        >>> calls(Graph())
        {}
    """
    return {norm.name: len(nodes) for norm, nodes in graph.norms().items()}


def dropout(graph: Graph) -> dict[str, tuple[float, bool]]:
    """Return the largest rate of dropout that reaches each batch normalization layer, and whether it stands directly before it.

    It does if only reshapes and transposes are between the two. It also reaches a layer through linear layers, activations,
    pooling, padding, sums and concatenations, but not through another normalization, or through what is not known.

    Example:
        >>> from batchnorm.graph import Norm, Normalize
        >>> graph, norm = Graph(), Norm("bn", None, None, None, None, 1e-5)
        >>> (x,) = graph.add(Identity(rate=0.5), [Value((2, 3))], [(2, 3)], "drop")
        >>> (x,) = graph.add(Activation(homogeneous=True), [x], [(2, 3)], "relu")
        >>> _ = graph.add(Normalize(norm, 1), [x], [(2, 3)], "bn")
        >>> dropout(graph)
        {'bn': (0.5, False)}
    """
    found = {}
    for norm, nodes in graph.norms().items():
        for direct, passing in ((True, _PLAIN), (False, _PASSING)):
            rate = _largest(nodes, passing)
            if rate:
                found[norm.name] = rate, direct
                break
    return found


def _largest(nodes: list[Node], passing: tuple[type, ...]) -> float:
    """Return the largest rate of dropout from which only ``passing`` operations lead to what ``nodes`` read."""
    waiting, seen, largest = [value for node in nodes for value in node.inputs], set[int](), 0.0
    while waiting:
        value: Value = waiting.pop()
        node = value.producer
        if id(value) in seen or node is None or not isinstance(node.operation, passing):
            continue
        seen.add(id(value))
        rate = node.operation.rate if isinstance(node.operation, Identity) else 0.0
        largest = max(largest, rate)
        waiting += node.inputs
    return largest
