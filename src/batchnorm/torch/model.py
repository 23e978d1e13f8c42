"""A torch module, seen through the `Model` protocol."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from batchnorm.errors import OptionError
from batchnorm.graph import Graph
from batchnorm.protocol import Changes, Layer, Measure, Pair, Statistics
from batchnorm.states import BatchSizes, Mend, NormState, Optimization, Rate, Rehearsal
from batchnorm.torch import states
from batchnorm.torch.batches import batches_of, inputs_of
from batchnorm.torch.evaluation import Inputs, call, copied, tensors_of, untraced
from batchnorm.torch.events import Recording
from batchnorm.torch.graphs import own_buffers, structural_copy
from batchnorm.torch.measuring import measuring
from batchnorm.torch.picture import draw
from batchnorm.torch.preparing import Prepared, prepare, replace_module
from batchnorm.torch.rates import rates
from batchnorm.torch.rehearsing import rehearse
from batchnorm.torch.rewriting import rewrite
from batchnorm.torch.statistics import stored, unwrapped, write

__all__ = ["TorchModel"]


class TorchModel:
    """The `Model` protocol for ``torch.nn.Module``."""

    def __init__(self, module: nn.Module, biases: tuple[str, ...] = (), *, private: bool = False) -> None:
        self.model = module
        self._private = private
        self._ready = Prepared(module, Recording(), biases=biases)
        self._runner: nn.Module | None = module if private else None
        self._last: tuple[Any, list[np.ndarray]] | None = None

    def graph(self, example: Any | None) -> Graph:
        """Return the picture of the module as it stands on ``example``."""
        _refuse_script(self.model)
        if example is None:
            raise OptionError(
                "a torch module must be given an example input, it does not know the shape of its own: "
                "fold(model, torch.randn(2, 3, 224, 224)), or --input 2,3,224,224"
            )
        tensors = (*self.model.parameters(), *self.model.buffers(), *tensors_of(example))
        if any(is_lazy(tensor) for tensor in tensors):
            raise OptionError("a lazy module must know its sizes: run it once on an example first")
        if any(tensor.is_meta for tensor in tensors):
            raise OptionError(
                "the model and its example must hold values, some of their tensors are on the meta device"
            )
        self._ready = prepare(self.model, self._cast(example))
        if self._ready.outputs is not None and not any(module.training for module in self.model.modules()):
            arrays = [_array(tensor) for tensor in self._ready.outputs]
            self._last = (example, arrays) if _are_finite(arrays) else None
        return draw(self._ready.model, self._ready.recording)

    def changed(self, changes: Changes) -> "TorchModel":
        """Return a copy with all changes made."""
        ready = self._ready
        sites = {f"{weights.key.module}.{weights.key.attribute}".lstrip(".") for weights in changes.weights}
        replaced = {id(tensor) for name, tensor in ready.model.named_parameters() if name in sites}
        # weights that are about to be replaced need not be copied
        twin = structural_copy(ready.model, lambda t: t.detach() if id(t) in replaced else t.clone())
        return TorchModel(rewrite(twin, changes, ready.biases))

    def change(self, changes: Changes) -> None:
        """Make all changes in the module itself.

        Raises:
            OptionError: the module itself would have to become another object.
        """
        ready, self._last = self._ready, None
        if self._private:
            self.model = self._runner = rewrite(self.model, changes, ready.biases)
            return
        if "" in ready.traced or any(norm.key.module == "" and not norm.key.nodes for norm in changes.norms):
            raise OptionError(
                "the model itself normalizes, so that another object must take its place: use the model of the result"
            )
        for path, graph in ready.traced.items():
            replace_module(self.model, path, graph)
        rewrite(self.model, changes, ready.biases)

    def example(self, shapes: list[tuple[str, tuple[int, ...]]]) -> Any | None:
        """Return random inputs of these names (empty: by position) and shapes; ``None`` for none."""
        if not shapes:
            return None
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, self.precision)
        tensors = [(name, torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes]
        args = tuple(tensor for name, tensor in tensors if not name)
        return Inputs(args, {name: tensor for name, tensor in tensors if name})

    def inputs(self, example: Any, seed: int | None) -> Any:
        """Return the example, or random inputs like it."""
        if seed is None:
            return example
        generator = torch.Generator().manual_seed(seed)
        return tree_map(lambda leaf: _random_like(leaf, generator) if isinstance(leaf, Tensor) else leaf, example)

    def outputs(self, inputs: Any) -> list[np.ndarray]:
        """Run in evaluation and return all tensors of the output; floating inputs are cast to the module's dtype."""
        if self._last is not None and self._last[0] is inputs:
            return self._last[1]
        if self._runner is None:
            # whatever a forward writes to is not the user's
            self._runner = structural_copy(self.model, own_buffers)
        with untraced(self._runner):
            try:
                arrays = self._arrays(self._runner, copied(self._cast(inputs)))
            except Exception as error:
                raise OptionError(
                    f"the model must run on the example in {self.precision}, but it failed: {type(error).__name__}: {error}"
                ) from error
        self._last = (inputs, arrays)
        return arrays

    def _arrays(self, model: nn.Module, inputs: Any) -> list[np.ndarray]:
        arrays = [_array(tensor) for tensor in tensors_of(call(model, inputs))]
        if _are_finite(arrays):
            return arrays
        # a detector that finds nothing: what its parts say
        parts: list[np.ndarray] = []
        hooks = [
            part.register_forward_hook(lambda _, args, result: parts.extend(map(_array, tensors_of(result))))
            for part in model.children()
            if any(part.children())
        ]
        try:
            call(model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return arrays + parts

    def _cast(self, inputs: Any) -> Any:
        if self.precision != "float64":
            return inputs
        return tree_map(lambda leaf: leaf.double() if _is_real(leaf) else leaf, inputs)

    def cast(self, precision: str) -> "TorchModel | None":
        """Return a copy in another dtype."""
        ready = self._ready
        dtype = getattr(torch, precision)
        twin = structural_copy(ready.model, lambda t: t.to(dtype, copy=True) if t.is_floating_point() else t.clone())
        for module in twin.modules():
            # tensors that are no buffers
            for name, value in vars(module).items():
                if _is_real(value):
                    setattr(module, name, value.to(dtype))
        return TorchModel(twin, ready.biases, private=True)

    @property
    def precision(self) -> str:
        """The dtype of the first floating parameter."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
        return str(dtype).removeprefix("torch.")

    def statistics(self) -> list[Statistics]:
        """List the running statistics of all layers, those inside of wrappers too."""
        _refuse_script(self.model)
        return stored(unwrapped(self.model))

    def batches(self, data: Any) -> Any:
        """Return a loader for a ``Dataset``, which yields single samples; anything else as it is."""
        return batches_of(data)

    def measuring(
        self, statistics: list[Statistics], forward: Any | None, device: Any, *, watch: bool = False
    ) -> AbstractContextManager[Measure]:
        """Run the module in evaluation and measure the inputs of layers."""
        return measuring(unwrapped(self.model), statistics, forward, device, every=watch)

    def write(self, statistics: Mapping[Statistics, Pair], batches: int) -> None:
        """Copy new statistics into the buffers, all or none."""
        write(statistics, batches)

    @property
    def training(self) -> bool | None:
        """Whether the module is in training mode."""
        return bool(unwrapped(self.model).training)

    @property
    def learns(self) -> bool:
        """Whether any parameter gets a gradient."""
        return any(p.requires_grad for p in self.model.parameters())

    def states(self) -> list[NormState]:
        """List the batch normalization layers, and what else keeps a running mean and variance."""
        _refuse_script(self.model)
        return states.states(unwrapped(self.model))

    def example_of(self, batch: Any) -> Inputs:
        """Return the arguments that a batch calls the module with."""
        return inputs_of(self.model, batch)

    def rehearse(self, example: Any) -> Rehearsal:
        """Make one step of training in a copy."""
        return rehearse(unwrapped(self.model), example)

    def batch_sizes(self, loader: Any) -> BatchSizes:
        """Return the sizes of the batches of a loader."""
        return states.batch_sizes(loader)

    def optimization(self, optimizer: Any) -> Optimization:
        """Return what an optimizer does to γ and β."""
        return states.optimization(self.model, optimizer)

    def mend(self, mends: Mapping[str, Mend]) -> None:
        """Set layers right, in place, all or none."""
        states.mend(unwrapped(self.model), mends)

    def spare(self, optimizer: Any) -> int:
        """Take the weight decay off γ and β."""
        return states.spare(self.model, optimizer)

    def rates(self, optimizer: Any, layers: Sequence[str]) -> list[Rate]:
        """Return how fast an optimizer turns the weights of linear layers."""
        return rates(unwrapped(self.model), optimizer, layers)

    def layers(self, example: Any | None) -> list[Layer]:
        """List the leaf modules, and those that hold parameters themselves, in the order of their calls on ``example``."""
        named = {
            module: name or type(module).__name__
            for name, module in self.model.named_modules()
            if not any(module.children()) or any(True for _ in module.parameters(recurse=False))
        }
        shapes = {} if example is None else self._output_shapes(named, example)
        order = [*shapes, *(module for module in named if module not in shapes)]
        counted: set[torch.Tensor] = set()
        return [_layer(named[module], module, shapes.get(module), counted) for module in order]

    def _output_shapes(
        self, named: dict[nn.Module, str], example: Any
    ) -> dict[nn.Module, tuple[int | None, ...] | None]:
        shapes: dict[nn.Module, tuple[int | None, ...] | None] = {}

        def note(module: nn.Module, _: Any, output: Any) -> None:
            shapes[module] = (None, *output.shape[1:]) if isinstance(output, torch.Tensor) else None

        hooks = [module.register_forward_hook(note) for module in named]
        try:
            with untraced(self.model):
                call(self.model, example)
        except Exception as error:
            last = named[list(shapes)[-1]] if shapes else "none"
            raise OptionError(
                f"the model must run on the example, but it failed after layer {last}: {error}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        return shapes


def _refuse_script(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise OptionError(
            "a model must be a Python module to be seen through, got a ScriptModule: give it before scripting"
        )


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return noise in the range of a tensor, or its own values in another order if they are no reals."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        return tensor.detach().reshape(-1)[order].reshape(tensor.shape)
    low, high = (float(v) for v in tensor.detach().double().aminmax())
    if low == high:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    else:
        noise = low + (high - low) * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    return noise.to(dtype=tensor.dtype, device=tensor.device)


def _are_finite(arrays: list[np.ndarray]) -> bool:
    """Whether anything is there to be compared."""
    return any(np.isfinite(array).any() for array in arrays)


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    tensor = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return np.asarray(tensor.double() if tensor.dtype is torch.bfloat16 else tensor)


def _layer(name: str, module: nn.Module, shape: tuple[int | None, ...] | None, counted: set[torch.Tensor]) -> Layer:
    """Count the numbers of a layer, but for those that an earlier layer shares with it."""
    own = [p for p in module.parameters(recurse=False) if p not in counted]
    counted.update(own)
    statistics, constants = 0, 0
    for buffer_name, buffer in module.named_buffers(recurse=False):
        if buffer_name.startswith("running_"):
            statistics += buffer.numel()
        elif buffer.is_floating_point():
            constants += buffer.numel()
    return Layer(
        name,
        type(module).__name__,
        shape,
        trainable=sum(p.numel() for p in own if p.requires_grad),
        frozen=sum(p.numel() for p in own if not p.requires_grad) + constants,
        statistics=statistics,
    )
