"""Make the changes of a rewrite in an ONNX model: new numbers, and nodes that are gone or others."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from batchnorm.affine import Affine
from batchnorm.errors import OptionError
from batchnorm.graph import Norm, Weights
from batchnorm.onnx.frozen import COMPUTES
from batchnorm.onnx.linear import LinearKey
from batchnorm.onnx.picture import NormKey
from batchnorm.onnx.scopes import Index, Scope
from batchnorm.onnx.tensors import rounded, tensor
from batchnorm.protocol import Changes

__all__ = ["rewrite"]


def rewrite(model: Any, changes: Changes, precision: Callable[[Scope, str], int]) -> None:
    """Make all changes in a ``ModelProto``.

    Args:
        model: changed in place.
        changes: made for this model, or for one with the same nodes.
        precision: tells the dtype of a value, as ``TensorProto.FLOAT``.
    """
    writer = _Writer(model, precision)
    for layer, (weight, bias) in changes.weights.items():
        writer.set_weights(layer, np.asarray(weight), None if bias is None else np.asarray(bias))
    for layer in changes.biasless:
        writer.drop_bias(layer)
    for layer, groups in changes.groups.items():
        writer.set_groups(layer, groups)
    for norm in {**changes.means, **changes.variances, **changes.gammas, **changes.channels}:
        writer.set_norm(norm, changes)
    for norm, taken in changes.numbers.items():
        writer.take_numbers(norm, taken)
    for norm, what in changes.norms.items():
        assert what is None or isinstance(what, Affine)  # noqa: S101
        writer.replace_norm(norm, what)
    writer.finish()
    if changes.channels:
        # what the file remembers of sizes is no longer true
        for scope in writer.index.scopes.values():
            del scope.graph.value_info[:]
    _drop_unread(model, writer.abandoned)


class _Writer:
    def __init__(self, model: Any, precision: Callable[[Scope, str], int]) -> None:
        self.model, self.precision = model, precision
        self.index = Index(model)
        self.names = self.index.names()
        self.abandoned: set[str] = set()
        # for each graph: what stands in the place of a node, by its first output; norms that are gone, output to input
        self.instead: dict[Any, dict[str, list[Any]]] = defaultdict(dict)
        self.gone: dict[Any, dict[str, str]] = defaultdict(dict)
        self.written: dict[tuple[str, bytes], str] = {}

    def fresh(self, name: str) -> str:
        """Return a name that nothing has yet, as near to ``name`` as possible."""
        number, tried = 1, name
        while tried in self.names:
            number, tried = number + 1, f"{name}_{number}"
        self.names.add(tried)
        return tried

    # -- linear layers ---------------------------------------------------------------------------------------------

    def set_weights(self, layer: Weights, weight: np.ndarray, bias: np.ndarray | None) -> None:
        key: LinearKey = layer.key
        scope, node = self.index.find(key.site)
        held = self.index.constant(scope, node.input[key.weight])
        assert held is not None  # noqa: S101
        elem_type = held.elem_type
        self._set(scope, node, key.weight, weight, elem_type, "weight")
        for attribute in [a for a in node.attribute if node.op_type == "Gemm" and a.name in ("alpha", "beta")]:
            node.attribute.remove(attribute)
        if bias is None:
            return
        if key.bias is None:
            self._add_bias(scope, node, bias.reshape(key.bias_shape), elem_type)
        else:
            scope, node = self.index.find(key.bias[0])
            self._set(scope, node, key.bias[1], bias.reshape(key.bias_shape), elem_type, "bias")

    def _set(self, scope: Scope, node: Any, place: int, values: np.ndarray, elem_type: int, kind: str) -> None:
        """Let a node read other numbers: under the old name, if it is the only reader, else under a new one."""
        old = node.input[place] if len(node.input) > place else ""
        home = scope.home(old) if old else None
        if home is not None and old in home.initializers and len(home.readers[old]) == 1 and old not in home.outputs:
            home.initializers[old].CopyFrom(tensor(values, old, elem_type))
            _declare(home.graph, old, values.shape)
            return
        if old:
            self.abandoned.add(old)
        while len(node.input) <= place:
            node.input.append("")
        base = old or _bias_name(node.input[1 if kind == "bias" else 0], node.output[0])
        node.input[place] = self.add(values, base, elem_type)

    def add(self, values: np.ndarray, name: str, elem_type: int) -> str:
        """Add an initializer under a new name, or find the same one that was added before; return its name."""
        made = tensor(values, "", elem_type)
        key = name, made.SerializeToString(deterministic=True)
        if key not in self.written:
            made.name = self.written[key] = self.fresh(name)
            self.model.graph.initializer.append(made)
            if self.model.ir_version < 4:
                declared = onnx.helper.make_tensor_value_info(made.name, elem_type, list(values.shape))
                self.model.graph.input.append(declared)
        return self.written[key]

    def _add_bias(self, scope: Scope, node: Any, bias: np.ndarray, elem_type: int) -> None:
        output = node.output[0]
        changed = type(node)()
        changed.CopyFrom(node)
        changed.output[0] = self.fresh(f"{output}_unbiased")
        name = self.fresh(f"{node.name}_bias") if node.name else ""
        constant = self.add(bias, f"{output}_bias", elem_type)
        add = onnx.helper.make_node("Add", [changed.output[0], constant], [output], name)
        self.instead[scope.path][output] = [changed, add]

    def drop_bias(self, layer: Weights) -> None:
        key: LinearKey = layer.key
        assert key.bias is not None  # noqa: S101
        (scope, node), (site, place) = self.index.find(key.bias[0]), key.bias
        self.abandoned.add(node.input[place])
        if site == key.site:
            del node.input[place]
        else:
            self.gone[scope.path][node.output[0]] = node.input[1 - place]

    def set_groups(self, layer: Weights, groups: int) -> None:
        _, node = self.index.find(layer.key.site)
        for attribute in [a for a in node.attribute if a.name == "group"]:
            node.attribute.remove(attribute)
        node.attribute.append(onnx.helper.make_attribute("group", groups))

    # -- norms -----------------------------------------------------------------------------------------------------

    def set_norm(self, norm: Norm, changes: Changes) -> None:
        """Write new numbers of a norm, and leave out channels."""
        scope, node = self.index.find(norm.key.site)
        new = {1: changes.gammas.get(norm), 3: changes.means.get(norm), 4: changes.variances.get(norm)}
        for place in (1, 2, 3, 4):
            held = self.index.constant(scope, node.input[place])
            assert held is not None  # noqa: S101
            values = new.get(place)
            kept = slice(None) if norm not in changes.channels else changes.channels[norm]
            if values is not None or norm in changes.channels:
                self._set(scope, node, place, (held.read() if values is None else values)[kept], held.elem_type, "")

    def take_numbers(self, norm: Norm, taken: Norm) -> None:
        """Write the numbers of another norm, and its eps and decay."""
        scope, node = self.index.find(norm.key.site)
        if norm.key.first is not None:
            raise OptionError(
                f"{norm.name} must be a BatchNormalization to be given statistics, it is a Mul and an Add"
            )
        assert taken.mean is not None  # noqa: S101
        gamma = np.ones_like(taken.mean) if taken.gamma is None else taken.gamma
        beta = np.zeros_like(taken.mean) if taken.beta is None else taken.beta
        for place, values in enumerate((gamma, beta, taken.mean, taken.variance), start=1):
            held = self.index.constant(scope, node.input[place])
            assert held is not None  # noqa: S101
            assert values is not None  # noqa: S101
            self._set(scope, node, place, values, held.elem_type, "")
        attributes = {"epsilon": taken.eps, "momentum": taken.decay}
        for old in [a for a in node.attribute if attributes.get(a.name) is not None]:
            node.attribute.remove(old)
        node.attribute.extend(
            onnx.helper.make_attribute(name, value) for name, value in attributes.items() if value is not None
        )

    def replace_norm(self, norm: Norm, what: Affine | None) -> None:
        key: NormKey = norm.key
        scope, node = self.index.find(key.site)
        source = self._source(scope, node, key)
        affine = Affine(np.float64(1), np.float64(0)) if what is None else what
        if (affine.scale == 1).all() and (affine.shift == 0).all():
            self.gone[scope.path][node.output[0]] = source
        else:
            shape = (-1,) + (1,) * (key.ndim - 2)
            self.instead[scope.path][node.output[0]] = self._affine(
                node,
                source,
                Affine(affine.scale.reshape(shape), affine.shift.reshape(shape)),
                self.precision(scope, source),
            )

    def _source(self, scope: Scope, node: Any, key: NormKey) -> str:
        """Return what a norm reads; its numbers, and the first node of a frozen one, are not needed any more."""
        if key.first is None:
            self.abandoned.update(node.input[1:])
            return str(node.input[0])
        self.instead[scope.path][key.first.output] = []
        self.abandoned.update(key.constants)
        return key.source

    def _affine(self, node: Any, source: str, affine: Affine, elem_type: int) -> list[Any]:
        """Return a Mul and an Add, or what is needed of them; in float32 where 16 bits would lose something."""
        through = elem_type if _holds(affine, elem_type) else TensorProto.FLOAT
        base = node.name or node.output[0]
        steps: list[tuple[str, str, dict[str, int], np.ndarray | None]] = []
        if through != elem_type:
            steps.append(("Cast", "wide", {"to": through}, None))
        if (affine.scale != 1).any():
            steps.append(("Mul", "scale", {}, affine.scale))
        if (affine.shift != 0).any():
            steps.append(("Add", "shift", {}, affine.shift))
        if through != elem_type:
            steps.append(("Cast", "narrow", {"to": elem_type}, None))
        nodes = []
        for place, (op, word, attributes, values) in enumerate(steps):
            output = node.output[0] if place == len(steps) - 1 else self.fresh(f"{node.output[0]}_{word}")
            constants = [] if values is None else [self.add(values, f"{base}.{word}", through)]
            nodes.append(
                onnx.helper.make_node(op, [source, *constants], [output], self.fresh(f"{base}_{word}"), **attributes)
            )
            source = output
        return nodes

    # -- the graphs ------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write the nodes of every graph that has lost some, from the inside out."""
        for path in sorted({*self.instead, *self.gone}, key=len, reverse=True):
            scope = self.index.scopes[path]
            names, copies = self._renamed(scope, self.gone[path])
            nodes: list[Any] = []
            for node in scope.graph.node:
                output = next((name for name in node.output if name), "")
                if output in copies:
                    nodes.append(onnx.helper.make_node("Identity", [copies[output]], [output], node.name))
                elif output not in self.gone[path]:
                    nodes += self.instead[path].get(output, [node])
            # a list of messages can't be written from itself
            new = type(scope.graph)()
            new.node.extend(nodes)
            for node in new.node:
                _rename(node.input, names)
                _rename(node.output, names)
            del scope.graph.node[:]
            scope.graph.node.extend(new.node)
            _forget(scope.graph)

    def _renamed(self, scope: Scope, gone: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
        """Return new names of values that connect what stood around the norms that are gone.

        The output of a norm takes the name of its input, or its input that of an output which has to keep its name. Where both
        have to, a copy is made.
        """
        names: dict[str, str] = {}
        copies: dict[str, str] = {}
        roots: dict[str, list[str]] = defaultdict(list)
        for output in gone:
            root = output
            while root in gone:
                root = gone[root]
            roots[root].append(output)
        for root, outputs in roots.items():
            fixed = [name for name in outputs if name in scope.outputs or scope.captured(name)]
            free = root in scope.producers and not (root in scope.outputs or scope.captured(root))
            name = root
            if free and fixed:
                name = fixed.pop()
                names[root] = name
            names |= {output: name for output in outputs if output not in fixed and output != name}
            copies |= dict.fromkeys(fixed, name)
        return names, copies


def _holds(affine: Affine, elem_type: int) -> bool:
    """Whether a dtype holds a scale and shift so that what cancels between them is not lost."""
    if elem_type in (TensorProto.FLOAT, TensorProto.DOUBLE):
        return True
    eps = 2.0**-8 if elem_type == TensorProto.BFLOAT16 else 2.0**-11
    held = [rounded(v, elem_type) for v in (affine.scale, affine.shift)]
    near = all(
        np.isfinite(n).all() and (np.abs(n - v) <= 2 * eps * np.abs(v)).all()
        for n, v in zip(held, (affine.scale, affine.shift), strict=True)
    )
    return near and bool((np.abs(affine.shift) <= 8).all())


def _bias_name(weight: str, output: str) -> str:
    stem, dot, last = weight.rpartition(".")
    return f"{stem}.bias" if dot and last == "weight" else f"{weight or output}_bias"


def _rename(words: Any, names: dict[str, str]) -> None:
    for place, name in enumerate(words):
        if name in names:
            words[place] = names[name]


def _declare(graph: Any, name: str, shape: tuple[int, ...]) -> None:
    """Correct what a graph says of an initializer's shape."""
    for value in (*graph.input, *graph.value_info):
        if value.name == name:
            dims = value.type.tensor_type.shape.dim
            del dims[:]
            for n in shape:
                dims.add().dim_value = n


def _forget(graph: Any) -> None:
    """Drop what a graph says of values that it no longer has."""
    made = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer}
    kept = [value for value in graph.value_info if value.name in made]
    new = type(graph)()
    new.value_info.extend(kept)
    del graph.value_info[:]
    graph.value_info.extend(new.value_info)


def _drop_unread(model: Any, abandoned: set[str]) -> None:
    """Drop constants that nothing reads any more, though something did."""
    abandoned = {name for name in abandoned if name}
    while abandoned:
        index, following = Index(model), set[str]()
        for scope in index.scopes.values():
            dead = {n for n in abandoned if not scope.readers.get(n) and n not in scope.outputs}
            following |= _drop(index, scope, dead)
        abandoned = following


def _drop(index: Index, scope: Scope, dead: set[str]) -> set[str]:
    """Drop initializers, and the nodes that make constants; return what those have read."""
    graph, following = scope.graph, set[str]()
    inputs = dead if scope.outer is None and index.model.ir_version < 4 else set()
    # a name in both lists is an input of the model, which stays
    initializers = {name for name in dead if not index.overridable(scope, name)}
    for place in reversed(range(len(graph.initializer))):
        if graph.initializer[place].name in initializers:
            if graph.initializer[place].name in inputs:
                _delete(graph.input, graph.initializer[place].name)
            _delete(graph.value_info, graph.initializer[place].name)
            del graph.initializer[place]
    for place in reversed(range(len(graph.node))):
        node = graph.node[place]
        computes = node.op_type in COMPUTES and node.domain in ("", "ai.onnx")
        if any(name in dead for name in node.output) and (computes or index.is_constant(scope, node)):
            following |= {name for name in node.input if name}
            _delete(graph.value_info, node.output[0])
            del graph.node[place]
    return following


def _delete(values: Any, name: str) -> None:
    for place in reversed(range(len(values))):
        if values[place].name == name:
            del values[place]
