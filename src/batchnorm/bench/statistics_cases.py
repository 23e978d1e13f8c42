"""What a recalibration must get right: exact statistics, no side effects, every form of data; each a yes or a no."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import IterableDataset

from batchnorm.moments import Moments

__all__ = ["CASES", "Case", "Tool"]

# where the question is another one, statistics need only be about right
EXACT, ABOUT = 1e-6, 0.2
Tool = Callable[..., None]
"""Recalibrates: ``tool(model, data, **options)``; ``options`` are what only some tools have."""


@dataclass(frozen=True)
class Case:
    """A name, what kind it is of, and the check: how far a tool is off, or whether it passes.

    Args:
        name: what is asked.
        kind: ``"exact"``, ``"side effects"`` or ``"forms"``.
        check: returns the largest relative error, or true and false.
        bound: of the error.
    """

    name: str
    kind: str
    check: Callable[[Tool], float | bool]
    bound: float = EXACT

    def error(self, tool: Tool) -> float:
        """Return the largest relative error; 0 for what is passed, infinity for what is not, or for a tool that raises."""
        torch.manual_seed(0)
        try:
            found = self.check(tool)
        except Exception:
            return inf
        return (0.0 if found else inf) if isinstance(found, bool) else found

    def passes(self, tool: Tool) -> bool:
        """Say whether a tool passes."""
        return self.error(tool) <= self.bound


# -- networks and data -------------------------------------------------------------------------------------------------


class Reused(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the second call's output."""
        self.norm(x)
        return self.norm(2 * x + 5)  # type: ignore[no-any-return]


class Dropping(nn.Module):
    """Dropout in front of the normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm, self.frozen = nn.Dropout(0.9), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the last layer."""
        return self.frozen(self.norm(self.drop(x)))  # type: ignore[no-any-return]


class Keyword(nn.Module):
    """A model that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, *, pixels: Tensor) -> Tensor:
        """Return the normalized pixels."""
        return self.norm(pixels)  # type: ignore[no-any-return]


@dataclass
class Record:
    """A batch as a dataclass."""

    pixels: Tensor
    label: Tensor


class Stream(IterableDataset[Tensor]):
    """Batches without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        """Yield them."""
        yield from images()


def images(sizes: Iterable[int] = (7, 1, 32), mean: float = 2.0, seed: int = 0) -> list[Tensor]:
    """Return batches of noise with this ratio of mean and deviation, which are far from those that a layer starts with."""
    generator = torch.Generator().manual_seed(seed)
    return [3 * (torch.randn(n, 3, 8, 8, generator=generator) + mean) for n in sizes]


def _norm(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, _BatchNorm))


def _error(layer: Any, data: list[Tensor]) -> float:
    """Return how far a layer is from the population; the biased and the unbiased variance count alike."""
    exact = Moments.empty().merge(*(Moments.of(x.double().numpy()) for x in data))
    mean, var = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    off = np.abs(mean - exact.mean) / np.maximum(np.abs(exact.mean), np.sqrt(exact.variance))
    either = [np.abs(var / v - 1).max() for v in (exact.variance, exact.unbiased_variance)]
    error = max(float(off.max()), float(min(either)))
    return error if isfinite(error) else inf


def _is_about_right(layer: Any, data: list[Tensor]) -> bool:
    return _error(layer, data) <= ABOUT


def _first(data: list[Tensor]) -> Callable[[Tool], float]:
    """Check a layer that comes first in the model, so that its inputs are the data."""

    def check(tool: Tool) -> float:
        model = nn.Sequential(
            nn.BatchNorm2d(data[0].shape[1]) if data[0].ndim == 4 else nn.BatchNorm1d(data[0].shape[1])
        )
        tool(model, data)
        return _error(model[0], data)

    return check


# -- exactness ---------------------------------------------------------------------------------------------------------


def _outlier() -> list[Tensor]:
    data = images((8, 8, 8))
    data[1][0] = 1e5
    return data


def _reused(tool: Tool) -> float:
    model, data = Reused(), images()
    tool(model, data)
    return _error(model.norm, [*data, *(2 * x + 5 for x in data)])


def _behind_dropout(tool: Tool) -> float:
    model, data = Dropping(), images()
    tool(model, data)
    return _error(model.norm, data)


def _half(tool: Tool) -> float:
    model = nn.Sequential(nn.BatchNorm2d(3))
    data = [x.bfloat16() for x in images(mean=3.0)]
    tool(model, data)
    return _error(model[0], [x.float() for x in data])


def _second(tool: Tool) -> float:
    """A layer behind another one, which normalizes by batch meanwhile."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), images((8, 8, 16))
    with torch.no_grad():
        inputs = [model[1](F.batch_norm(x, None, None, training=True)) for x in data]
    tool(model, data)
    return _error(model[2], inputs)


def _as_evaluation_sees(tool: Tool) -> float:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), images((8, 3, 16))
    tool(model, data, method="sequential")
    model.eval()
    with torch.no_grad():
        return _error(model[2], [model[1](model[0](x)) for x in data])


def _sorted() -> list[Tensor]:
    return [x + 5 * i for i, x in enumerate(images((16, 16, 16, 16)))]


def _rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 5, generator=generator) for n in (7, 1, 32)]


# -- side effects ------------------------------------------------------------------------------------------------------


def _modes(tool: Tool) -> bool:
    model = Dropping().train()
    model.drop.eval()
    before = [module.training for module in model.modules()]
    tool(model, images())
    return before == [module.training for module in model.modules()]


def _frozen(tool: Tool) -> bool:
    model = Dropping().train()
    model.frozen.eval()
    tool(model, images())
    return model.frozen.running_mean.abs().max().item() == 0  # type: ignore[union-attr]


def _generators(tool: Tool) -> bool:
    model = Dropping().train()
    before = _drawn()
    tool(model, images())
    return before == _drawn()


def _drawn() -> list[Any]:
    """Return the states of the process's random number generators."""
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index]


def _in_evaluation(tool: Tool) -> bool:
    model, data = Dropping().eval(), images()
    tool(model, data)
    return not model.training and _is_about_right(model.norm, data)


def _broken() -> Iterator[Tensor]:
    yield from images()[:2]
    raise OSError("the disk is gone")


def _nan() -> list[Tensor]:
    data = images()
    data[1][0, 0, 0, 0] = torch.nan
    return data


def _other_size() -> list[Tensor]:
    return [*images(), torch.zeros(2, 5, 8, 8)]


def _after_failure(data: Callable[[], Any], look: Callable[[Any], bool]) -> Callable[[Tool], bool]:
    """Check what is left of a model whose data has failed."""

    def check(tool: Tool) -> bool:
        model = Dropping().train()
        tool(model, images(seed=1))
        model.norm.momentum = 0.3
        state = {name: v.clone() for name, v in model.state_dict().items()}
        model.before = state  # type: ignore[assignment]
        try:
            tool(model, data())
        except Exception:
            return look(model)
        return False

    return check


def _same_tensors(model: Any) -> bool:
    return all(torch.equal(v, model.before[name]) for name, v in model.state_dict().items())


def _same_layers(model: Any) -> bool:
    modules = list(model.modules())
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    return not hooks and model.norm.momentum == 0.3 and all(module.training for module in modules)


def _aliases(tool: Tool) -> bool:
    (model, layer), data = _first_norm(), images()
    view = layer.running_var
    tool(model, data)
    return view is layer.running_var and _is_about_right(layer, data)


def _count_goes_on(tool: Tool) -> bool:
    model, layer = _first_norm()
    layer.num_batches_tracked.fill_(1000)
    tool(model, images())
    return bool(layer.num_batches_tracked.item() >= 1000)


def _never_reached(tool: Tool) -> bool:
    used: Any = nn.BatchNorm2d(3)
    unused: Any = nn.BatchNorm2d(3)
    unused.running_mean.fill_(7.0)
    model = nn.ModuleDict({"used": used, "unused": unused})
    model.forward = used.forward
    tool(model, images())
    return _is_about_right(used, images()) and unused.running_mean[0].item() == 7


# -- forms of data -----------------------------------------------------------------------------------------------------


def _form(model: Callable[[], nn.Module], data: Callable[[], Any], **options: Any) -> Callable[[Tool], bool]:
    def check(tool: Tool) -> bool:
        made = model()
        tool(made, data(), **options)
        return _is_about_right(_norm(made), images()[: options.get("batches")])

    return check


def _first_norm() -> tuple[nn.Module, Any]:
    """Return a model and the layer in it."""
    layer = nn.BatchNorm2d(3)
    return nn.Sequential(layer), layer


def _one_norm() -> nn.Module:
    return _first_norm()[0]


def _prior(tool: Tool) -> bool:
    (model, layer), data = _first_norm(), images()
    tool(model, data, prior=40)
    mean = torch.cat(data).double().mean((0, 2, 3)) / 2
    return torch.allclose(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-7)


CASES = [
    Case("batches of one size", "exact", _first(images((16, 16)))),
    Case("batches of 7, 1 and 32", "exact", _first(images())),
    Case("mean/std 100", "exact", _first(images(mean=100.0))),
    Case("mean/std 10⁴", "exact", _first(images(mean=1e4))),
    Case("sorted by class", "exact", _first(_sorted())),
    Case("an outlier", "exact", _first(_outlier())),
    Case("tiny variance", "exact", _first([1 + 1e-4 * x for x in images()])),
    Case("channels last", "exact", _first([x.to(memory_format=torch.channels_last) + 100 for x in images()])),
    Case("rows, one alone", "exact", _first(_rows())),
    Case("bfloat16 inputs", "exact", _half),
    Case("a layer called twice", "exact", _reused),
    Case("behind dropout", "exact", _behind_dropout),
    Case("behind another layer", "exact", _second),
    Case("as evaluation sees it (1e-5)", "exact", _as_evaluation_sees, 1e-5),
    Case("modes of modules", "side effects", _modes),
    Case("a frozen layer", "side effects", _frozen),
    Case("random generators", "side effects", _generators),
    Case("a model in evaluation", "side effects", _in_evaluation),
    Case("buffers stay the same objects", "side effects", _aliases),
    Case("the count of batches goes on", "side effects", _count_goes_on),
    Case("a layer that is never reached", "side effects", _never_reached),
    Case("failing data: statistics", "side effects", _after_failure(_broken, _same_tensors)),
    Case("failing data: hooks, momenta, modes", "side effects", _after_failure(_broken, _same_layers)),
    Case("empty data", "side effects", _after_failure(list, _same_tensors)),
    Case("NaN in the data", "side effects", _after_failure(_nan, _same_tensors)),
    Case("another size in the data", "side effects", _after_failure(_other_size, _same_tensors)),
    Case("(x, y)", "forms", _form(_one_norm, lambda: [(x, torch.zeros(len(x))) for x in images()])),
    Case("dict", "forms", _form(Keyword, lambda: [{"pixels": x} for x in images()])),
    Case("dataclass", "forms", _form(Keyword, lambda: [Record(x, x) for x in images()])),
    Case("NumPy arrays", "forms", _form(_one_norm, lambda: [x.double().numpy() for x in images()])),
    Case("generator", "forms", _form(_one_norm, lambda: (x for x in images()))),
    Case("iterable data set", "forms", _form(_one_norm, Stream)),
    Case("part of an epoch", "forms", _form(_one_norm, images, batches=2)),
    Case("a call of one's own", "forms", _form(Keyword, images, forward=lambda model, x: model(pixels=x))),
    Case("a prior", "forms", _prior),
]  # fmt: skip
