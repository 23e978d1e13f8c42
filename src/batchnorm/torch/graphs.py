"""``torch.fx`` graphs: for modules that normalize by a function, in a ``forward`` of their own.

Such a call can't be taken out of a Python function. The module's forward is traced, with its children as they are, and the
call is taken out of the graph; what is left is a ``GraphModule`` with the same attributes.
"""

import contextlib
import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from batchnorm.affine import Affine
from batchnorm.errors import OptionError
from batchnorm.protocol import Border

__all__ = [
    "add_bias",
    "is_batch_norm",
    "own_buffers",
    "replace_norm",
    "structural_copy",
    "takes_bias",
    "trace",
    "watched",
]

_BATCH_NORM = {
    F.batch_norm, torch.batch_norm, torch.ops.aten.batch_norm.default, torch.ops.aten.native_batch_norm.default,
    torch.ops.aten._native_batch_norm_legit.default, torch.ops.aten._native_batch_norm_legit_no_training.default,
    torch.ops.aten._batch_norm_no_update.default, torch.ops.aten.cudnn_batch_norm.default,
}  # fmt: skip
_LINEAR = {
    F.linear, torch.ops.aten.linear.default, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d,
    F.conv_transpose3d, torch.conv1d, torch.conv2d, torch.conv3d, torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default, torch.ops.aten.convolution.default,
    torch.ops.aten.conv_transpose1d.default, torch.ops.aten.conv_transpose2d.input, torch.ops.aten.conv_transpose3d.input,
}  # fmt: skip


class _ChildrenAreLeaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def structural_copy(model: nn.Module, convert: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> nn.Module:
    """Copy the modules of a model around its own parameters and buffers, or around what ``convert`` makes of them.

    Raises:
        OptionError: the model can't be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        new = convert(tensor)
        if isinstance(tensor, nn.Parameter) and new is not tensor:
            new = nn.Parameter(new.detach(), tensor.requires_grad)
        memo[id(tensor)] = new
    for module in model.modules():
        # each module has a dozen dicts of hooks, and to copy those takes most of the time
        memo |= {
            id(value): OrderedDict() for value in vars(module).values() if type(value) is OrderedDict and not value
        }
    with warnings.catch_warnings():
        # exported programs copy pieces of their own that are deprecated
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return copy.deepcopy(model, memo)
        except Exception as error:
            raise OptionError(f"the model must be one that copy.deepcopy can copy, but it failed: {error}") from error


def own_buffers(tensor: Tensor) -> Tensor:
    """Share parameters with a copy, and give it buffers of its own, which a forward may write to."""
    return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


def trace(module: nn.Module) -> fx.GraphModule | None:
    """Return a module's forward as a graph, its children as they are; ``None`` where it can't be traced."""
    if isinstance(module, fx.GraphModule):
        return module
    with contextlib.suppress(Exception):
        graph = _ChildrenAreLeaves().trace(module)
        traced = fx.GraphModule(module, graph, type(module).__name__)
        traced.training = module.training
        return traced
    return None


class _Watched(fx.Interpreter):
    """Run a graph node by node, and tell which one is running."""

    def __init__(self, module: fx.GraphModule, path: str, recorder: Any) -> None:
        super().__init__(module)
        self.path = path
        self.recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        outer, self.recorder.node = self.recorder.node, (self.path, n.name)
        try:
            return super().run_node(n)
        finally:
            self.recorder.node = outer


def watched(module: fx.GraphModule, path: str, recorder: Any) -> Any:
    """Return a forward for a graph module that tells ``recorder`` which node is running."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        codegen = module.graph._codegen
        interpreter = _Watched(module, path, recorder)
        if isinstance(codegen, torch.fx.graph._PyTreeCodeGen):
            if codegen.pytree_info.in_spec is not None and kwargs:
                kwargs = torch.export._tree_utils.reorder_kwargs(kwargs, codegen.pytree_info.in_spec)
            leaves = tree_flatten((args, kwargs))[0]
            return module.graph.process_outputs(interpreter.run(*leaves, enable_io_processing=False))
        names = [node.target for node in module.graph.nodes if node.op == "placeholder"]
        given = dict(zip(names, args, strict=False)) | kwargs
        # arguments that are left out at the end have defaults in the graph
        return interpreter.run(*[given[name] for name in names[: max(map(names.index, given), default=-1) + 1]])

    return forward


def add_bias(model: nn.Module, nodes: Iterable[tuple[str, str]], weight_owner: str, bias: nn.Parameter) -> None:
    """Give the linear calls of a graph a bias, which is stored beside their weight."""
    owner = model.get_submodule(weight_owner)
    name = "bias" if getattr(owner, "bias", None) is None else "folded_bias"
    owner.register_parameter(name, bias)
    for path, node_name in nodes:
        module, node = _find(model, path, node_name)
        local = f"{weight_owner}.{name}".removeprefix(f"{path}." if path else "").strip(".")
        with module.graph.inserting_before(node):
            attribute = module.graph.get_attr(local)
        node.args = (*node.args[:2], attribute, *node.args[3:])
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "bias"}
        module.recompile()


def takes_bias(model: nn.Module, site: tuple[str, str]) -> bool:
    """Whether a call in a graph is one that a bias can be written into."""
    _, node = _find(model, *site)
    return node.op == "call_function" and node.target in _LINEAR and len(node.args) >= 2


def is_batch_norm(model: nn.Module, site: tuple[str, str]) -> bool:
    """Whether a call in a graph is one of batch normalization and nothing else."""
    _, node = _find(model, *site)
    return node.op == "call_function" and node.target in _BATCH_NORM


def replace_norm(
    model: nn.Module, site: tuple[str, str], replacement: Affine | Border | None, stand_in: nn.Module
) -> None:
    """Put a module, or nothing, in the place of a normalization in a graph."""
    module, node = _find(model, *site)
    x = next(value for value in (*node.args, *node.kwargs.values()) if isinstance(value, fx.Node))
    new = x
    if replacement is not None:
        name = f"{node.name}_folded"
        module.add_submodule(name, stand_in)
        with module.graph.inserting_after(node):
            new = module.graph.call_module(name, (x,))
    readers = [user for user in node.users if "getitem" in str(user.target)] if _returns_several(node) else [node]
    for reader in readers:
        reader.replace_all_uses_with(new)
    for reader in (*readers, node):
        if not reader.users:
            module.graph.erase_node(reader) if reader in module.graph.nodes else None
    _drop_unread(module)


def _returns_several(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and len(schema.returns) > 1


def _drop_unread(module: fx.GraphModule) -> None:
    """Remove reads of parameters that nothing uses any more, and the parameters that nothing reads."""
    read = {str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module") and node.users}
    read |= {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
            owner = str(node.target).rpartition(".")[0]
            if str(node.target) not in read and owner not in read:
                _delete(module, str(node.target))
    module.recompile()


def _delete(module: nn.Module, target: str) -> None:
    path, _, name = target.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(getattr(owner, name, None), Tensor):
        delattr(owner, name)


def _find(model: nn.Module, path: str, name: str) -> tuple[fx.GraphModule, fx.Node]:
    module: Any = model.get_submodule(path)
    return module, next(node for node in module.graph.nodes if node.name == name)
