"""A torch module, seen through the `Model` protocol."""

from typing import Any

import torch
from torch import nn

from batchnorm.errors import OptionError
from batchnorm.graph import Layer
from batchnorm.torch.evaluation import untraced

__all__ = ["TorchModel"]


class TorchModel:
    """The `Model` protocol for ``torch.nn.Module``."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def layers(self, example: Any | None) -> list[Layer]:
        """List the leaf modules, and those that hold parameters themselves, in the order of their calls on ``example``."""
        named = {
            module: name or type(module).__name__
            for name, module in self.module.named_modules()
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
            with untraced(self.module):
                self.module(*(example if isinstance(example, tuple) else (example,)))
        except Exception as error:
            last = named[list(shapes)[-1]] if shapes else "none"
            raise OptionError(
                f"the model must run on the example, but it failed after layer {last}: {error}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        return shapes


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
