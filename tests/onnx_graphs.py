"""Small ONNX graphs for the tests of the wing, and their outputs by an evaluation that shares nothing with it."""

import warnings

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from batchnorm.fold import fold

LATEST = onnx.defs.onnx_opset_version()
TYPES = {
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
}
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


class BatchNormalization(OpRun):
    """In evaluation, as the standard says; the stock one takes opsets 9 to 13 for training, and breaks before 9."""

    def _run(self, x, g, b, m, v, epsilon=1e-5, **_):
        shape = (1, -1, *[1] * (x.ndim - 2))
        g, b, m, v = (a.astype(np.float64).reshape(shape) for a in (g, b, m, v))
        return (((x.astype(np.float64) - m) / np.sqrt(v + epsilon) * g + b).astype(x.dtype),)


class Build:
    """A graph, node by node; names of values are returned and given."""

    def __init__(self, dtype="float32", opset=17, ir=None, form="initializer", seed=0):
        self.dtype, self.opset, self.form = dtype, opset, form
        self.ir = ir or (3 if opset < 9 else 8)
        self.rng = np.random.default_rng(seed)
        self.nodes, self.held, self.inputs, self.count = [], [], [], 0

    def fresh(self, stem):
        self.count += 1
        return f"{stem}{self.count}"

    def input(self, shape, name="x", dtype=None):
        kind = TYPES.get(dtype or self.dtype) or helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def tensor(self, values, name="", dtype=None):
        values, dtype = np.asarray(values), dtype or self.dtype
        if values.dtype.kind != "f":
            return numpy_helper.from_array(values, name)
        if dtype == "bfloat16":
            kept = values.astype(onnx.helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
            return numpy_helper.from_array(kept, name)
        return numpy_helper.from_array(np.asarray(values, dtype), name)

    def const(self, values, name="", form=None, dtype=None):
        name = name or self.fresh("c")
        tensor = self.tensor(values, name, dtype)
        if (form or self.form) == "initializer":
            self.held.append(tensor)
        else:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def random(self, *shape, name="", **kw):
        return self.const(self.rng.standard_normal(shape), name, **kw)

    def node(self, op, *inputs, out=1, name=None, **attributes):
        outputs = [self.fresh(op.lower()) for _ in range(out)]
        name = outputs[0] + "_node" if name is None else name
        self.nodes.append(helper.make_node(op, list(inputs), outputs, name, **attributes))
        return outputs[0] if out == 1 else outputs

    def norm(self, x, channels, name="bn", *, signs=True, shift=True, gamma=None, mean=None, **attributes):
        rng = self.rng
        scale = rng.choice([-1.0, 1.0], channels) * rng.uniform(0.5, 2, channels)
        scale = scale if signs else np.abs(scale)
        if signs and channels > 2:
            scale[1] = 0
        beta, center = rng.standard_normal(channels), rng.standard_normal(channels)
        if not shift:
            beta, center = np.zeros(channels), np.zeros(channels)
        numbers = (
            scale if gamma is None else np.asarray(gamma, float),
            beta,
            center if mean is None else np.asarray(mean, float),
            rng.uniform(0.5, 2, channels),
        )
        constants = [self.const(v, f"{name}_{k}") for k, v in zip(("g", "b", "m", "v"), numbers, strict=True)]
        return self.node("BatchNormalization", x, *constants, name=name, **attributes)

    def model(self, *outputs, types=None, check=True):
        kinds = types or [TYPES[self.dtype]] * len(outputs)
        ends = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(outputs, kinds, strict=True)]
        inputs = list(self.inputs)
        if self.ir < 4:
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in self.held]
        graph = helper.make_graph(self.nodes, "g", inputs, ends, self.held)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=self.ir)
        # the checker wants to be told the sizes of outputs
        inferred = onnx.shape_inference.infer_shapes(model)
        for value, known in zip(model.graph.output, inferred.graph.output, strict=True):
            value.CopyFrom(known)
        for value, array in zip(
            model.graph.output, [] if all(map(sized, model.graph.output)) else run(model, feeds_of(model)), strict=False
        ):
            value.CopyFrom(helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, array.shape))
        if check:
            onnx.checker.check_model(model)
        return model


def sized(value):
    return value.type.tensor_type.HasField("shape")


class ConvTranspose(OpRun):
    """By torch: the stock one breaks for groups."""

    def _run(self, x, w, b=None, **_):
        rank = w.ndim - 2
        op = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[rank - 1]
        given = lambda name, default: list(getattr(self, name, None) or default)  # noqa: E731
        before, after = (given("pads", [0] * 2 * rank)[i : i + rank] for i in (0, rank))
        assert before == after
        x, w, b = (None if v is None else torch.from_numpy(np.array(v, np.float64)) for v in (x, w, b))
        more, ones = given("output_padding", [0] * rank), [1] * rank
        return (op(x, w, b, given("strides", ones), before, more, self.group, given("dilations", ones)).numpy(),)


def ops(model):
    """Return the operators of a model, those of its subgraphs too."""

    def of(graph):
        for node in graph.node:
            yield node.op_type
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    yield from of(attribute.g)

    return list(of(model.graph))


def run(model, feeds):
    """Run by the stock reference evaluator, but for what is broken there."""
    evaluator = ReferenceEvaluator(model, new_ops=[BatchNormalization, ConvTranspose])
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [np.asarray(v, np.float64) for v in evaluator.run(None, feeds)]


def feeds_of(model, seed=3):
    rng, held = np.random.default_rng(seed), {t.name for t in model.graph.initializer}
    made = {}
    for value in model.graph.input:
        if value.name not in held:
            kind = value.type.tensor_type
            shape = [d.dim_value or 2 for d in kind.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            made[value.name] = (rng.standard_normal(shape) if dtype.kind in "fV" else np.ones(shape)).astype(dtype)
    return made


def folded(model, example=None, bound=1e-12, feeds=None):
    """Fold, and hold the result to the stock evaluator; the model itself must stay as it is."""
    before = model.SerializeToString(deterministic=True)
    result = fold(model, example)
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(result.model)
    assert [v.name for v in result.model.graph.output] == [v.name for v in model.graph.output]
    inputs = feeds or feeds_of(model)
    for want, got in zip(run(model, inputs), run(result.model, inputs), strict=True):
        assert want.shape == got.shape
        assert np.abs(got - want).max(initial=0) <= bound * max(np.abs(want).max(initial=0), 1e-30)
    return result


def reasons(result):
    return " | ".join(f"{k.layer}: {k.reason} [{k.became}]" for k in result.kept)
