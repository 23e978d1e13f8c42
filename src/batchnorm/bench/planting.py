"""One fault, planted into a model at a layer of chance: for each rule of `check` a function that plants what it must find."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from batchnorm.bench.grown import Grown, Site, settle
from batchnorm.torch.evaluation import call, kept_generators, silent

__all__ = ["PLANTS", "Plant", "UnfitError", "plant"]


class UnfitError(Exception):
    """This fault can't be planted into this model."""


@dataclass
class Plant:
    """A model with a fault.

    Args:
        kind: what was done, in a word.
        model: with the fault.
        layers: those that must be found, all of them; ``""`` for the model as a whole.
        given: what else `check` is given.
        allowed: other layers that the fault reaches, and that may be found too.
    """

    kind: str
    model: nn.Module
    layers: tuple[str, ...]
    given: dict[str, Any] = field(default_factory=dict)
    allowed: tuple[str, ...] = ()


Planting = Callable[[Grown, np.random.Generator], Plant]
PLANTS: dict[str, Planting] = {}


def plants(code: str) -> Callable[[Planting], Planting]:
    """Enter a function as the one that plants what a rule finds."""

    def enter(make: Planting) -> Planting:
        PLANTS[code] = make
        return make

    return enter


def plant(code: str, grown: Grown, rng: np.random.Generator) -> Plant:
    """Plant a fault in a copy of a model.

    Raises:
        UnfitError: there is no place for it.
    """
    with torch.random.fork_rng(devices=()), silent():
        torch.manual_seed(int(rng.integers(2**31)))
        planted = PLANTS[code](grown.copy(), rng)
        if "example" in planted.given:
            # some models read more of a layer than its output
            with kept_generators(), torch.no_grad():
                call(planted.model, planted.given["example"])
        return planted


# -- places --------------------------------------------------------------------------------------------------------------


def pick(grown: Grown, rng: np.random.Generator, fits: Callable[[Site], bool] = lambda site: True) -> Site:
    """Return a layer of chance."""
    fitting = [site for site in grown.sites if fits(site)]
    if not fitting:
        raise UnfitError("no layer fits")
    return fitting[int(rng.integers(len(fitting)))]


def block(grown: Grown, rng: np.random.Generator) -> tuple[str, list[str]]:
    """Return a part of the model of chance, and the layers in it."""
    names = [site.name for site in grown.sites]
    parts = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
    part = sorted(parts)[int(rng.integers(len(parts)))]
    return part, [name for name in names if f"{name}.".startswith(f"{part}.")]


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Let another module take the place of one."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def both(grown: Grown) -> dict[str, Any]:
    """Return what a thorough user gives: an example, and data."""
    return {"example": grown.example, "data": grown.batches}


def choose(rng: np.random.Generator, *values: Any) -> Any:
    """Return one of some values."""
    return values[int(rng.integers(len(values)))]


def loader(samples: int, size: int) -> DataLoader[Any]:
    """Return a loader of so many samples."""
    return DataLoader(TensorDataset(torch.zeros(samples, 1)), batch_size=size)


# -- statistics ----------------------------------------------------------------------------------------------------------


@plants("BN101")
def never_updated(grown: Grown, rng: np.random.Generator) -> Plant:
    """Statistics as at the start; in half of the models the count of batches is kept."""
    site = pick(grown, rng)
    norm = grown.norm(site)
    counted = norm.num_batches_tracked.clone()
    norm.reset_running_stats()
    if rng.random() < 0.5:
        norm.num_batches_tracked.copy_(counted)
    return Plant("reset", grown.model, (site.name,), both(grown))


@plants("BN102")
def not_finite(grown: Grown, rng: np.random.Generator) -> Plant:
    """One channel that is no number, infinite, or of negative variance."""
    site = pick(grown, rng)
    norm = grown.norm(site)
    kind = choose(rng, "NaN mean", "NaN variance", "infinite variance", "negative variance", "NaN γ")
    values = {"NaN mean": norm.running_mean, "NaN γ": norm.weight}.get(kind, norm.running_var)
    if values is None:
        raise UnfitError("no γ")
    value = {"infinite variance": float("inf"), "negative variance": -1e-3}.get(kind, float("nan"))
    values.data[int(rng.integers(len(values)))] = value
    return Plant(kind, grown.model, (site.name,), both(grown))


@plants("BN103")
def far_from_data(grown: Grown, rng: np.random.Generator) -> Plant:
    """Statistics scaled, shifted or permuted, or weights before them scaled, so far that outputs move."""
    kind = choose(rng, "scaled", "shifted", "permuted", "weights", "other data")
    if kind == "other data":
        return _other_data(grown, rng)
    site = pick(grown, rng, lambda site: site.calls == 1 and (kind != "weights" or bool(site.producer)))
    norm, factor = grown.norm(site), float(np.exp(rng.uniform(np.log(4), np.log(30)) * choose(rng, -1, 1)))
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    if kind == "scaled":
        norm.running_var.mul_(factor)
    elif kind == "shifted":
        norm.running_mean.add_(choose(rng, -1, 1) * (variance + norm.eps).sqrt() * rng.uniform(0.5, 3))
    elif kind == "permuted":
        order = torch.randperm(len(mean))
        norm.running_mean.copy_(mean[order])
        norm.running_var.copy_(variance[order])
    else:
        linear: Any = grown.model.get_submodule(site.producer)
        linear.weight.data.mul_(factor**0.5)
        if linear.bias is not None:
            linear.bias.data.mul_(factor**0.5)
        mean, variance = mean * factor**0.5, variance * factor
    if _moved((mean, variance), (norm.running_mean, norm.running_var), norm.eps) < 0.1:
        raise UnfitError("outputs hardly move")
    return Plant(kind, grown.model, (site.name,), both(grown))


def _moved(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], eps: float) -> float:
    """Return the mean square by which normalized values move."""
    (mean, variance), (stored_mean, stored) = old, new
    scale = (variance / (stored + eps)).sqrt() - (variance / (variance + eps)).sqrt()
    return float(((mean - stored_mean) ** 2 / (stored + eps) + scale**2).mean())


def _other_data(grown: Grown, rng: np.random.Generator) -> Plant:
    """Images that were not prepared as in training."""
    site = pick(grown, rng, lambda site: site.first)
    change = choose(rng, lambda x: 4 * x, lambda x: 0.2 * x, lambda x: x + 1.5, lambda x: 127 + 64 * x)
    batches = [changed(batch, change) for batch in grown.batches]
    return Plant("other data", grown.model, (site.name,), {"example": batches[0], "data": batches})


def changed(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch with other tensors."""
    return {key: change(value) for key, value in batch.items()} if isinstance(batch, dict) else change(batch)


@plants("BN109")
def half_precision(grown: Grown, rng: np.random.Generator) -> Plant:
    """A layer, a part or all of a model in half precision."""
    part, layers = choose(rng, _layer, block, _whole)(grown, rng)
    dtype = choose(rng, torch.float16, torch.bfloat16)
    grown.model.get_submodule(part).to(dtype)
    return Plant(f"{dtype}".removeprefix("torch."), grown.model, tuple(layers))


def _layer(grown: Grown, rng: np.random.Generator) -> tuple[str, list[str]]:
    site = pick(grown, rng)
    return site.name, [site.name]


def _whole(grown: Grown, rng: np.random.Generator) -> tuple[str, list[str]]:
    return "", [site.name for site in grown.sites]


@plants("BN111")
def odd_eps(grown: Grown, rng: np.random.Generator) -> Plant:
    """Another framework's ε, or none."""
    site = pick(grown, rng)
    norm = grown.norm(site)
    norm.eps = choose(rng, 0.0, 1e-3 if norm.eps < 5e-4 else 1e-5, 100 * norm.eps)
    return Plant(f"{norm.eps:g}", grown.model, (site.name,), both(grown))


@plants("BN205")
def dead_channels(grown: Grown, rng: np.random.Generator) -> Plant:
    """Filters of zeros before a layer, in training."""
    site = pick(grown, rng, lambda site: bool(site.producer) and site.calls == 1)
    linear: Any = grown.model.get_submodule(site.producer)
    norm = grown.norm(site)
    channels = torch.randperm(len(norm.running_var))[: int(rng.integers(1, max(2, len(norm.running_var) // 2)))]
    if linear.weight.shape[0] != len(norm.running_var):
        raise UnfitError("channels are on another axis")
    with torch.no_grad():
        linear.weight[channels] = 0
    settle(grown.model, grown.batches)
    return Plant(f"{len(channels)} channels", grown.model, (site.name,), both(grown))


@plants("BN304")
def switched_off(grown: Grown, rng: np.random.Generator) -> Plant:
    """γ of some channels at zero, or next to it."""
    site = pick(grown, rng, lambda site: grown.norm(site).weight is not None)
    gamma = grown.norm(site).weight
    channels = torch.randperm(len(gamma))[: int(rng.integers(1, max(2, len(gamma) // 2)))]
    with torch.no_grad():
        gamma[channels] = choose(rng, 0.0, 1e-6, -1e-5)
    return Plant(f"{len(channels)} channels", grown.model, (site.name,), both(grown))


# -- modes ---------------------------------------------------------------------------------------------------------------


@plants("BN104")
def thawed(grown: Grown, rng: np.random.Generator) -> Plant:
    """A part whose parameters are frozen for fine-tuning."""
    part, layers = block(grown, rng)
    if not any(p.requires_grad for name in layers for p in grown.model.get_submodule(name).parameters()):
        raise UnfitError("no γ and β")
    grown.model.get_submodule(part).requires_grad_(False)
    return Plant("requires_grad", grown.model.train(), tuple(layers), both(grown))


class Twice(nn.Module):
    """A model that looks at two streams, one after the other."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return both results."""
        other = [self.scale * x + 1 for x in args], {key: self.scale * x + 1 for key, x in kwargs.items()}
        return self.model(*args, **kwargs), self.model(*other[0], **other[1])


@plants("BN105")
def several_streams(grown: Grown, rng: np.random.Generator) -> Plant:
    """A layer in two places, two layers with the same statistics, or a model that is called twice."""
    kind = choose(rng, "one layer in two places", "shared statistics", "siamese")
    if kind == "siamese":
        if grown.kind != "image":
            raise UnfitError("not images alone")
        # where the streams meet in one layer, first of all; behind it they are normalized, but not alike
        first = pick(grown, rng, lambda site: site.first)
        model = Twice(grown.model, float(rng.uniform(2, 4))).eval()
        settle(model, grown.batches)
        others = tuple(f"model.{site.name}" for site in grown.sites)
        return Plant(kind, model, (f"model.{first.name}",), both(grown), others)
    one = pick(grown, rng, lambda site: site.calls == 1)
    size = len(grown.norm(one).running_var)
    other = pick(grown, rng, lambda site: site.calls == 1 and site != one and len(grown.norm(site).running_var) == size)
    a, b = grown.norm(one), grown.norm(other)
    if type(a) is not type(b) or _moved((a.running_mean, a.running_var), (b.running_mean, b.running_var), a.eps) < 0.5:
        raise UnfitError("the two see much the same")
    if kind == "shared statistics":
        b.running_mean, b.running_var = a.running_mean, a.running_var
        layers: tuple[str, ...] = (one.name, other.name)
    else:
        put(grown.model, other.name, a)
        # the name under which it is met first
        layers = (next(name for name, module in grown.model.named_modules() if module is a),)
    settle(grown.model, grown.batches)
    return Plant(kind, grown.model, layers, both(grown))


def recomputing(module: nn.Module, reentrant: bool) -> None:
    """Let a module run under activation checkpointing, by a class of its own, so that copies do too."""
    cls = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return cls.forward(self, *args, **kwargs)
        # lists of their own: DenseNet's grow behind the call
        args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))
        return checkpoint(partial(cls.forward, self), *args, use_reentrant=reentrant, **kwargs)

    module.__class__ = type(f"Recomputed{cls.__name__}", (cls,), {"forward": forward})


@plants("BN106")
def counted_twice(grown: Grown, rng: np.random.Generator) -> Plant:
    """A part of chance, under activation checkpointing."""
    part, layers = block(grown, rng)
    module, called = grown.model.get_submodule(part), list[Any]()
    hook = module.register_forward_hook(lambda *args: called.append(None))
    call(grown.model, grown.example)
    hook.remove()
    if part in layers or not called:
        raise UnfitError("a layer alone, or a list of parts")
    recomputing(module, reentrant=False)
    return Plant("checkpointed", grown.model, tuple(layers), both(grown))


@plants("BN108")
def mixed_modes(grown: Grown, rng: np.random.Generator) -> Plant:
    """A layer or part in the other mode."""
    part, layers = choose(rng, _layer, block)(grown, rng)
    sick = bool(rng.random() < 0.5)
    grown.model.train(not sick)
    grown.model.get_submodule(part).train(sick)
    if len(layers) == len(grown.sites):
        raise UnfitError("all layers are in that mode")
    return Plant("in training" if sick else "in evaluation", grown.model, tuple(layers), both(grown))


@plants("BN110")
def swapped_momentum(grown: Grown, rng: np.random.Generator) -> Plant:
    """Momentum as in Keras, in a layer, a part or everywhere."""
    _, layers = choose(rng, _layer, block, _whole)(grown, rng)
    momentum = choose(rng, 0.9, 0.99, 0.997, 0.999)
    for name in layers:
        grown.model.get_submodule(name).momentum = momentum
    return Plant(f"{momentum}", grown.model, tuple(layers), both(grown))
