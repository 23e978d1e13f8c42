"""Let tools fold the same models, and judge what they return.

A tool that is given a torch module is judged in the model's own dtype and in float64; one that is given an ONNX file by the
outputs of the file before and after, both run without any optimization. Each call is a process of its own, so that a crash is
a crash of this model and this tool only.
"""

import copy
import multiprocessing
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from batchnorm.bench.peers import FILE_TOOLS, MODULE_TOOLS, PACKAGES, FileTool, Flat, ModuleTool, Refitted, tensors_in
from batchnorm.bench.zoo import Member, norms_of
from batchnorm.errors import BatchNormError, OptionError
from batchnorm.torch.evaluation import call, tensors_of

__all__ = ["distance", "judge", "judge_graph", "normalizations", "outputs"]

WRONG = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""Relative difference that no rounding explains: thousands of roundings of a float32 or float64, dozens of a half.

A float32 network may be ill-conditioned: `FACTOR` times its own distance from float64 is always allowed.
"""
FACTOR = 20
SECONDS = 300.0
LARGE = 300e6
"""Parameters from which on a model is judged in its own dtype alone: three copies in float64 would fill the memory."""
OPSET = 17


@dataclass(frozen=True)
class Expected:
    """What a model computes before a tool has had it.

    Args:
        model: the model.
        examples: what it runs on.
        values: its outputs.
        bound: relative difference from which on another output is wrong.
        norms: normalizations that it executes.
        products: multiplications of channels by constants, which is what a frozen norm does.
    """

    model: nn.Module
    examples: list[Any]
    values: list[list[np.ndarray]]
    bound: float
    norms: int
    products: int


def judge(member: Member, *, files: bool = True, negated: bool = False, seconds: float = SECONDS) -> dict[str, Any]:
    """Let every tool fold one model, and return what became of it.

    Args:
        member: the model.
        files: export it, and try the tools that are given a file.
        negated: compare on the negated example too.
        seconds: after which a tool is stopped.
    """
    name, model, example = member()
    examples = [example, _negative(example)] if negated else [example]
    expected = _expected(model, examples)
    facts: dict[str, Any] = {
        "zoo": member.zoo,
        "name": name,
        "norms": expected.norms,
        "bound": expected.bound,
        "tools": {},
    }
    for tool, fold in MODULE_TOOLS.items():
        facts["tools"][tool] = _apart(partial(_judge_module, fold, expected), seconds)
    if files and expected.norms:
        with tempfile.TemporaryDirectory() as folder:
            facts |= _judge_files(expected, Path(folder), seconds, facts["tools"])
    return facts


def judge_graph(name: str, model: Any, inputs: dict[str, np.ndarray], seconds: float = SECONDS) -> dict[str, Any]:
    """Let every tool for files fold one ONNX model, and return what became of it.

    Args:
        name: of the model.
        model: an ``onnx.ModelProto``.
        inputs: for all its inputs, those with an initializer among them.
        seconds: after which a tool is stopped.
    """
    half = any(array.dtype == np.float16 for array in inputs.values())
    facts: dict[str, Any] = {"name": name, "bound": WRONG[torch.float16 if half else torch.float32], "tools": {}}
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "model.onnx", Path(folder) / "folded.onnx"
        import_module("onnx").save(model, str(file))
        facts["norms"], _ = _normalizations_of_file(file)
        values = _run_file(file, inputs)
        for tool, fold in FILE_TOOLS.items():
            facts["tools"][tool] = _apart(partial(_judge_graph, fold, file, out, inputs, values), seconds)
            found = facts["tools"][tool]
            found |= {} if "crashed" in found else {"wrong": not found["error"] <= facts["bound"]}
    return facts


def _judge_graph(fold: FileTool, file: Path, out: Path, inputs: dict[str, np.ndarray], values: list[np.ndarray]) -> Any:
    out.unlink(missing_ok=True)
    started = time.perf_counter()
    plain = fold(file, out)
    seconds = time.perf_counter() - started
    left = _normalizations_of_file(out)[0] + plain
    return {"seconds": seconds, "plain": plain, "left": left, "error": distance(values, _run_file(out, inputs))}


def _expected(model: nn.Module, examples: list[Any]) -> Expected:
    values = [outputs(model, x) for x in examples]
    norms, products = normalizations(model, examples[0])
    return Expected(model, examples, values, _bound(model, examples, values), norms, products)


def _bound(model: nn.Module, examples: list[Any], values: list[list[np.ndarray]]) -> float:
    """Return the relative difference from which on other outputs are wrong."""
    bound = WRONG.get(_dtype(model), WRONG[torch.float32])
    if _dtype(model) is not torch.float32:
        return bound
    try:
        wide = _widened(model)
        own = max(distance(outputs(wide, _widened_input(x)), y) for x, y in zip(examples, values, strict=True))
    except RuntimeError:
        # it does not compute in float64
        return bound
    # what float64 orders or cuts in another way says nothing about rounding
    return max(bound, FACTOR * own) if np.isfinite(own) else np.inf


def _judge_module(fold: ModuleTool, expected: Expected) -> dict[str, Any]:
    model = copy.deepcopy(expected.model)
    started = time.perf_counter()
    with torch.no_grad():
        folded, plain = fold(model, expected.examples[0])
    facts: dict[str, Any] = {"seconds": time.perf_counter() - started, "plain": plain}
    norms, products = normalizations(folded, expected.examples[0])
    left = norms + max(0, products - expected.products)
    facts["left"] = left + plain
    facts["error"] = _worst(lambda x: outputs(folded, x), expected.examples, expected.values)
    facts["wrong"] = not facts["error"] <= expected.bound
    if _dtype(expected.model) is torch.float32 and _size(expected.model) < LARGE:
        facts["wide"] = _error_in_float64(fold, expected)
        facts["wrong"] |= facts["wide"] is not None and not facts["wide"] <= WRONG[torch.float64]
    return facts


def _error_in_float64(fold: ModuleTool, expected: Expected) -> float | None:
    """Return how wrong a tool is on the model in float64; ``None`` where it can't be said."""
    wide, examples = _widened(expected.model), [_widened_input(x) for x in expected.examples]
    try:
        values = [outputs(wide, x) for x in examples]
        with torch.no_grad():
            folded, _ = fold(copy.deepcopy(wide), examples[0])
        return _worst(lambda x: outputs(folded, x), examples, values)
    except Exception:
        return None


def _judge_files(expected: Expected, folder: Path, seconds: float, tools: dict[str, Any]) -> dict[str, Any]:
    file = folder / "model.onnx"
    made = _apart(partial(_export, expected, file), seconds)
    if "crashed" in made:
        return {"not_exported": made["crashed"]}
    for tool, fold in FILE_TOOLS.items():
        if not all(find_spec(package.partition(".")[0]) for package in PACKAGES.get(tool, ())):
            continue
        tools[tool] = _apart(partial(_judge_file, fold, expected, file, folder / "folded.onnx", made), seconds)
    return {"exported_norms": made["norms"]}


def _export(expected: Expected, file: Path) -> dict[str, Any]:
    """Write a model as ONNX, its norms as they are, and return how many there are."""
    x = expected.examples[0]
    training = import_module("torch.onnx").TrainingMode.PRESERVE
    torch.onnx.export(
        Flat(copy.deepcopy(expected.model), x), tuple(tensors_in(x)), str(file),
        dynamo=False, training=training, do_constant_folding=False, opset_version=OPSET,
    )  # fmt: skip
    norms, products = _normalizations_of_file(file)
    values = [_run_file(file, x) for x in expected.examples]
    if any(_is_random(node) for node in import_module("onnx").load(str(file)).graph.node):
        raise OptionError("the exported model draws random numbers, and others after any rewrite")
    np.savez(file.with_name("inputs.npz"), *[tensor.numpy() for tensor in tensors_in(x)])
    np.savez(file.with_suffix(".npz"), *[v for value in values for v in value])
    return {"norms": norms, "products": products}


def _is_random(node: Any) -> bool:
    return "Random" in node.op_type or (node.op_type == "Dropout" and len(node.input) > 2)


def _judge_file(fold: FileTool, expected: Expected, file: Path, out: Path, made: dict[str, Any]) -> dict[str, Any]:
    out.unlink(missing_ok=True)
    started = time.perf_counter()
    plain = fold(file, out)
    facts: dict[str, Any] = {"seconds": time.perf_counter() - started, "plain": plain}
    norms, products = _normalizations_of_file(out)
    frozen = expected.norms - made["norms"]
    facts["left"] = norms + plain + max(0, min(frozen, frozen - (made["products"] - products)))
    with np.load(file.with_suffix(".npz")) as kept:
        flat = [kept[name] for name in kept.files]
    each = len(flat) // len(expected.examples)
    values = [flat[i * each : (i + 1) * each] for i in range(len(expected.examples))]
    facts["error"] = _worst(lambda x: _run_file(out, x), expected.examples, values)
    facts["wrong"] = not facts["error"] <= expected.bound
    return facts


def _run_file(file: Path, example: Any) -> list[np.ndarray]:
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    if isinstance(example, dict) and all(isinstance(value, np.ndarray) for value in example.values()):
        wanted = {*names, *(i.name for i in session.get_overridable_initializers())}
        given = {name: value for name, value in example.items() if name in wanted}
    else:
        given = dict(zip(names, (t.numpy() for t in tensors_in(example)), strict=False))
    return [np.asarray(value) for value in session.run(None, given)]


def _normalizations_of_file(file: Path) -> tuple[int, int]:
    """Count the nodes of batch normalization, and products with constants."""
    graph = import_module("onnx").load(str(file)).graph
    constant = {tensor.name for tensor in graph.initializer}
    counted: Counter[str] = Counter()
    for node in graph.node:
        known = [name in constant or not name for name in node.input]
        if all(known):
            constant |= set(node.output)
        elif node.op_type == "Mul" and any(known):
            counted["Mul"] += 1
        counted[node.op_type] += node.op_type == "BatchNormalization"
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
            counted["BatchNormalization"] += sum(n.op_type == "BatchNormalization" for g in inner for n in g.node)
    return counted["BatchNormalization"], counted["Mul"]


def _apart(work: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Work in a process of its own and return what it returns, or ``crashed`` with the reason."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(work, there))
    process.start()
    there.close()
    try:
        if not here.poll(seconds):
            return {"crashed": f"not done after {seconds:.0f} s"}
        return here.recv()  # type: ignore[no-any-return]
    except EOFError:
        process.join()
        return {"crashed": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        here.close()


def _report(work: Callable[[], dict[str, Any]], pipe: Any) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            facts = work()
    except BatchNormError as error:
        facts = {"crashed": f"{type(error).__name__}: {error}", "refused": True}
    except BaseException as error:  # a tool may raise anything
        facts = {"crashed": f"{type(error).__name__}: {str(error)[:500]}"}
    pipe.send(facts)


# -- what a model does ---------------------------------------------------------------------------------------------


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count batch normalizations, and products of a batch with one constant for each channel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.norms = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.norms += "batch_norm" in name
        if name in ("mul", "mul_"):
            shapes = [tuple(v.shape) for v in args if isinstance(v, Tensor)]
            channels = [shape for shape in shapes if _is_of_channels(shape)]
            self.products += len(shapes) == 2 and len(channels) == 1
        return func(*args, **(kwargs or {}))


def normalizations(model: nn.Module, example: Any) -> tuple[int, int]:
    """Return how many normalizations a model executes, and how many products of channels with constants.

    Frozen norms of other libraries, which multiply and add, count as normalizations.
    """
    if isinstance(model, Refitted):
        return _normalizations_of_program(model.program)
    model = copy.deepcopy(model)
    frozen: list[Any] = []
    for norm in norms_of(model).values():
        if "BatchNorm" in type(norm).__name__ and not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.register_forward_hook(lambda module, _, output: frozen.append(module))
    counted = _Counted()
    with counted, torch.no_grad(), torch.random.fork_rng(devices=()):
        call(model, example)
    own = sum(not any(True for _ in module.children()) for module in frozen)
    return counted.norms + own, counted.products - own


def _normalizations_of_program(program: Any) -> tuple[int, int]:
    """Count in the graph of a frozen program, whose modules are all inlined."""
    norms = program.graph.findAllNodes("aten::batch_norm", recurse=True)
    products = [node for kind in ("aten::mul", "aten::mul_") for node in program.graph.findAllNodes(kind, recurse=True)]
    constants = [
        value.toIValue() for node in products for value in node.inputs() if value.node().kind() == "prim::Constant"
    ]
    shapes = [tuple(value.shape) for value in constants if isinstance(value, Tensor)]
    return len(norms), sum(_is_of_channels(shape) for shape in shapes)


def _is_of_channels(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[0] == shape[2] == shape[3] == 1 and shape[1] > 1


def outputs(model: nn.Module, example: Any) -> list[np.ndarray]:
    """Run a copy of a model as it stands, and return the tensors of its output."""
    twin = model if isinstance(model, Refitted) else copy.deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return [_array(v) for v in tensors_of(call(twin, example))]


def distance(expected: list[np.ndarray], actual: list[np.ndarray]) -> float:
    """Return the largest difference relative to the largest output; infinite for other shapes or other non-finite places."""
    if [e.shape for e in expected] != [a.shape for a in actual]:
        return np.inf
    worst = 0.0
    for e, a in zip(expected, actual, strict=True):
        want, got = e.astype(np.float64), a.astype(np.float64)
        finite = np.isfinite(want)
        if not np.array_equal(want[~finite], got[~finite], equal_nan=True):
            return np.inf
        size = np.abs(want[finite]).max(initial=0.0)
        found = np.abs(got[finite] - want[finite]).max(initial=0.0) / (size or 1.0)
        worst = max(worst, np.inf if np.isnan(found) else float(found))
    return worst


def _worst(run: Callable[[Any], list[np.ndarray]], examples: list[Any], values: list[list[np.ndarray]]) -> float:
    return max(distance(y, run(x)) for x, y in zip(examples, values, strict=True))


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return np.asarray(tensor.double() if tensor.dtype is torch.bfloat16 else tensor)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _dtype(model: nn.Module) -> torch.dtype:
    tensors = (*model.parameters(), *model.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def _widened(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def _widened_input(example: Any) -> Any:
    return tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, example)


def _negative(example: Any) -> Any:
    return tree_map(lambda v: -v if isinstance(v, Tensor) and v.is_floating_point() else v, example)
