"""More faults, planted at a layer of chance: those of training, of padding, and what a model carries for nothing."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from batchnorm.bench.grown import Grown, Site, distance, settle
from batchnorm.bench.planting import Plant, UnfitError, block, both, changed, choose, loader, pick, plants, put
from batchnorm.fold import fold
from batchnorm.torch.evaluation import call
from batchnorm.torch.statistics import statistics_modules

__all__: list[str] = []


@plants("BN107")
def one_value(grown: Grown, rng: np.random.Generator) -> Plant:
    """A last batch of one sample, or batches of one, and layers with one place a sample."""
    layers = [site.name for site in grown.sites if site.places == 1]
    if not layers or rng.random() < 0.3:
        layers = [*layers, _behind_linear(grown, rng)]
    size = int(choose(rng, 1, 8, 16, 32))
    return Plant(f"batches of {size}", grown.model, tuple(layers), both(grown) | {"loader": loader(65, size)})


def _behind_linear(grown: Grown, rng: np.random.Generator) -> str:
    """Put a layer behind a linear one of chance that gives one vector a sample; return its name."""
    seen: dict[str, int] = {}
    hooks = [
        module.register_forward_hook(lambda _, args, result, name=name: seen.update({name: result.ndim}))
        for name, module in grown.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        call(grown.model, grown.example)
    for hook in hooks:
        hook.remove()
    flat = [name for name, ndim in seen.items() if ndim == 2]
    if not flat:
        raise UnfitError("no linear layer with one vector a sample")
    name = flat[int(rng.integers(len(flat)))]
    linear: Any = grown.model.get_submodule(name)
    put(grown.model, name, nn.Sequential(linear, nn.BatchNorm1d(linear.out_features)).eval())
    settle(grown.model, grown.batches)
    return f"{name}.1"


@plants("BN201")
def few_values(grown: Grown, rng: np.random.Generator) -> Plant:
    """Small batches in every layer, or too few values in those with few places."""
    size = int(rng.integers(2, 8))
    layers = [site.name for site in grown.sites if size * site.places > 1]
    return Plant(f"batches of {size}", grown.model, tuple(layers), both(grown) | {"loader": loader(8 * size, size)})


@plants("BN202")
def decayed(grown: Grown, rng: np.random.Generator) -> Plant:
    """Weight decay on a part, γ and β with it."""
    part, layers = block(grown, rng)
    inside = set(grown.model.get_submodule(part).parameters())
    if not any(p.requires_grad for name in layers for p in grown.model.get_submodule(name).parameters()):
        raise UnfitError("no γ and β")
    outside = [p for p in grown.model.parameters() if p not in inside]
    groups = [{"params": list(inside), "weight_decay": float(10 ** rng.uniform(-5, -2))}]
    groups += [{"params": outside, "weight_decay": 0.0}] if outside else []
    kind = choose(rng, torch.optim.SGD, torch.optim.AdamW)
    return Plant(kind.__name__, grown.model, tuple(layers), both(grown) | {"optimizer": kind(groups, lr=0.01)})


@plants("BN203")
def dropout_before(grown: Grown, rng: np.random.Generator) -> Plant:
    """Dropout right before a layer; in half of the models the statistics are already those with dropout."""
    site = pick(grown, rng, lambda site: site.calls == 1)
    rate = float(rng.uniform(0.1, 0.6))
    drop, norm = nn.Dropout(rate), grown.norm(site)
    if site.producer and rng.random() < 0.5:
        put(grown.model, site.producer, nn.Sequential(grown.model.get_submodule(site.producer), drop).eval())
        name = site.name
    else:
        put(grown.model, site.name, nn.Sequential(drop, norm).eval())
        name = f"{site.name}.1"
    measured = bool(rng.random() < 0.5)
    if measured:
        settle(grown.model, grown.batches)
    return Plant(f"{rate:.2f}", grown.model, (name,), both(grown) if measured else {"example": grown.example})


@plants("BN204")
def accumulated(grown: Grown, rng: np.random.Generator) -> Plant:
    """Adam that steps after several batches only."""
    each = int(rng.integers(2, 5))
    optimizer = torch.optim.Adam([p for p in grown.model.parameters() if p.requires_grad], 1e-4)
    for _, norm in statistics_modules(grown.model):
        if isinstance(norm.num_batches_tracked, Tensor):
            norm.num_batches_tracked.zero_()
    _steps(grown.model, grown.batches, optimizer, each, 2 * each)
    return Plant(f"{each} batches a step", grown.model, ("",), both(grown) | {"optimizer": optimizer})


class Skipping(nn.Module):
    """A block with a connection around it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        """Return ``x + block(x)``."""
        return x + self.block(x)


@plants("BN206")
def deep_stack(grown: Grown, rng: np.random.Generator) -> Plant:
    """More than thirty norms with activations in a row, behind blocks with skips."""
    depth, skips, width = int(rng.integers(32, 60)), int(rng.integers(0, 4)), int(choose(rng, 4, 8))
    dense = bool(rng.random() < 0.5)
    blocks: list[nn.Module] = [Skipping(_norm_and_relu(width, dense, rng)) for _ in range(skips)]
    # a block with a skip ends the chain before it; what comes behind starts at the sum
    blocks += [_norm_and_relu(width, dense, rng) for _ in range(depth)]
    head = [nn.Linear(width, 3)] if dense else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]
    model = nn.Sequential(*blocks, *head)
    batches = [torch.randn(16, width, *() if dense else (6, 6)) for _ in range(4)]
    settle(model, batches)
    end = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)][-1]
    return Plant(
        f"{depth} {'dense' if dense else 'conv'}", model.train(), (end,), {"example": batches[0], "data": batches}
    )


def _norm_and_relu(width: int, dense: bool, rng: np.random.Generator) -> nn.Module:
    linear = nn.Linear(width, width, bias=False) if dense else nn.Conv2d(width, width, 3, padding=1, bias=False)
    norm = (nn.BatchNorm1d if dense else nn.BatchNorm2d)(width)
    return nn.Sequential(linear, norm, choose(rng, nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU)())


def _synchronized(module: nn.Module) -> nn.Module:
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    return converted


@plants("BN207")
def useless_synchronization(grown: Grown, rng: np.random.Generator) -> Plant:
    """Synchronized layers in one process: one of them, those of a part, or all."""
    kind = choose(rng, "one", "part", "all")
    if kind == "all":
        model = _synchronized(grown.model)
        return Plant(kind, model.train(), tuple(site.name for site in grown.sites))
    _, layers = block(grown, rng)
    layers = layers if kind == "part" else [pick(grown, rng).name]
    for name in layers:
        put(grown.model, name, _synchronized(grown.model.get_submodule(name)))
    return Plant(kind, grown.model.train(), tuple(layers))


# -- waste ---------------------------------------------------------------------------------------------------------------


@plants("BN301")
def redundant_bias(grown: Grown, rng: np.random.Generator) -> Plant:
    """A bias for a linear layer that has none, right before a norm."""
    site = pick(grown, rng, lambda site: site.calls == 1 and _has_no_bias(grown, site))
    linear: Any = grown.model.get_submodule(site.producer)
    norm = grown.norm(site)
    bias = 0.3 * torch.randn(len(norm.running_mean))
    linear.bias = nn.Parameter(bias)
    norm.running_mean.add_(bias)
    return Plant("bias", grown.model, (site.producer,), both(grown))


def _has_no_bias(grown: Grown, site: Site) -> bool:
    linear: Any = grown.model.get_submodule(site.producer) if site.producer else None
    channels = len(grown.norm(site).running_mean)
    return linear is not None and linear.bias is None and linear.weight.shape[0] == channels


@plants("BN302")
def foldable(grown: Grown, rng: np.random.Generator) -> Plant:
    """A norm behind a convolution, in a model in which all others are folded already."""
    folded: Any = fold(grown.model, grown.example).model
    convs = [name for name, module in folded.named_modules() if isinstance(module, nn.Conv2d)]
    if not convs:
        raise UnfitError("no convolution")
    name = convs[int(rng.integers(len(convs)))]
    conv: Any = folded.get_submodule(name)
    put(folded, name, nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels)))
    settle(folded, grown.batches)
    given = {"example": grown.example, "training": False}
    return Plant("the last one", folded.eval(), (f"{name}.1",), given)


@plants("BN303")
def in_a_row(grown: Grown, rng: np.random.Generator) -> Plant:
    """A second norm right behind one."""
    site = pick(grown, rng, lambda site: site.calls == 1)
    norm = grown.norm(site)
    second = type(norm)(norm.num_features)
    between = choose(rng, [], [], [nn.Identity()], [nn.Dropout(0.0)])
    put(grown.model, site.name, nn.Sequential(norm, *between, second).eval())
    settle(grown.model, grown.batches)
    return Plant(f"{len(between)} between", grown.model, (f"{site.name}.{1 + len(between)}",), both(grown))


# -- padding -------------------------------------------------------------------------------------------------------------


class Masking(nn.Module):
    """Sets everything behind the end of each sequence to zero."""

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Return ``x (N, C, L)`` where ``valid (N, L)``."""
        return x * valid[:, None]


class Sequences(nn.Module):
    """Convolutions over sequences; from one of them on, padding is set to zero again before every layer."""

    def __init__(self, depth: int, width: int, kernel: int, leaks: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(width if i else 5, width, kernel, padding=kernel // 2, bias=False) for i in range(depth)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(depth))
        self.masking, self.leaks = Masking(), leaks

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Return what the last layer has found in ``x (N, 5, L)``."""
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = conv(x)
            x = F.relu(norm(self.masking(x, valid) if number == self.leaks else x))
        return x.amax(-1)


@plants("BN112")
def padding(grown: Grown, rng: np.random.Generator) -> Plant:
    """Images of different sizes, filled up with zeros; or sequences, whose padding is zero before a layer of chance."""
    if grown.kind != "image" or rng.random() < 0.5:
        return _padded_sequences(rng)
    site = pick(grown, rng, lambda site: site.first)
    batches = [changed(batch, lambda x: _padded(x, rng)) for batch in grown.batches]
    settle(grown.model, batches)
    return Plant("images", grown.model, (site.name,), {"example": batches[0], "data": batches})


def _padded(x: Tensor, rng: np.random.Generator) -> Tensor:
    x = x.clone()
    for image in x:
        image[..., int(rng.integers(x.shape[-1] // 3, x.shape[-1] + 1)) :] = 0
    return x


def _padded_sequences(rng: np.random.Generator) -> Plant:
    depth, steps = int(rng.integers(1, 7)), int(rng.integers(16, 40))
    leaks = int(rng.integers(depth))
    model = Sequences(depth, int(choose(rng, 8, 16, 24)), int(choose(rng, 1, 3, 5)), leaks)
    lengths = torch.from_numpy(rng.integers(steps // 3, steps + 1, (4, 16)))
    valid = torch.arange(steps) < lengths[:, :, None]
    batches = [(1 + torch.randn(16, 5, steps), mask.float()) for mask in valid]
    settle(model, batches)
    return Plant(f"layer {leaks} of {depth}", model, (f"norms.{leaks}",), {"example": batches[0], "data": batches})


def _steps(model: nn.Module, batches: list[Any], optimizer: Any, each: int, count: int) -> None:
    """Run so many batches forward and backward, with a step of the optimizer after every few of them."""
    model.train()
    for number in range(count):
        torch.autograd.backward(distance(call(model, batches[number % len(batches)])))
        if number % each == each - 1:
            optimizer.step()
            optimizer.zero_grad()
