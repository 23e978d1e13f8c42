"""Fifty networks on digits, each with one planted cause of a gap between training and evaluation: is it named first?"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from torch.utils.checkpoint import checkpoint

__all__ = ["CAUSES", "Cause", "Planted", "healthy_network", "planted"]

SIDE, CLASSES, BRIGHTEST = 8, 10, 16.0
STEPS, BATCH = 300, 64


@dataclass(frozen=True, eq=False)
class Planted:
    """A trained network with one cause in it.

    Args:
        model: in evaluation.
        data: batches that it is checked on.
        given: what else `check` is given.
    """

    model: nn.Module
    data: list[Tensor]
    given: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cause:
    """A cause, the code of the finding that names it, and words that must be in its message."""

    name: str
    code: str
    words: tuple[str, ...]
    plant: Callable[[int], Planted]


def digits() -> tuple[Tensor, Tensor]:
    """Return images ``(N, 1, 8, 8)`` between 0 and 1, and classes, in an order of chance."""
    held = load_digits()
    order = np.random.default_rng(0).permutation(len(held.target))
    images = (held.data[order] / BRIGHTEST).astype(np.float32).reshape(-1, 1, SIDE, SIDE)
    return torch.from_numpy(images), torch.from_numpy(held.target[order])


def network(seed: int, *, dropout: float = 0.0, checkpointed: bool = False, **layer: Any) -> nn.Module:
    """Return a dense or convolutional network of some depth and width, all by chance."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    depth, width = int(rng.integers(3, 7)), int(rng.choice([16, 24, 32]))
    blocks: list[nn.Module] = []
    if rng.random() < 0.5:
        channels = 1
        for number in range(depth):
            stride = 2 if number in (1, 3) else 1
            drop = [nn.Dropout(dropout)] if dropout and number == depth // 2 else []
            conv = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
            blocks.append(nn.Sequential(conv, *drop, nn.BatchNorm2d(width, **layer), nn.ReLU()))
            channels = width
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
    else:
        features = SIDE * SIDE
        for number in range(depth):
            drop = [nn.Dropout(dropout)] if dropout and number == depth // 2 else []
            dense = nn.Linear(features, 4 * width, bias=False)
            blocks.append(nn.Sequential(*([nn.Flatten()] if number == 0 else []), dense, *drop,
                                        nn.BatchNorm1d(4 * width, **layer), nn.ReLU()))  # fmt: skip
            features = 4 * width
        head = [nn.Linear(features, CLASSES)]
    if checkpointed:
        blocks[depth // 2] = Checkpointed(blocks[depth // 2])
    return nn.Sequential(*blocks, nn.Sequential(*head))


class Checkpointed(nn.Module):
    """A block that is run again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Run it under checkpointing in training."""
        result = checkpoint(self.block, x, use_reentrant=False) if self.training else self.block(x)
        assert isinstance(result, Tensor)  # noqa: S101
        return result


def fit(model: nn.Module, x: Tensor, y: Tensor, seed: int, steps: int = STEPS, rate: float = 0.1) -> nn.Module:
    """Train with momentum SGD and a falling rate, and return the model in evaluation."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x[rows]), y[rows]))
        optimizer.step()
        schedule.step()
    return model.eval()


def batches(x: Tensor) -> list[Tensor]:
    """Cut rows into batches to check on."""
    return list(torch.split(x[:1024], 128))


def healthy_network(seed: int, steps: int = STEPS) -> Planted:
    """Return a network with nothing planted."""
    x, y = digits()
    return Planted(fit(network(seed), x, y, seed, steps), batches(x))


def _few_updates(seed: int) -> Planted:
    """Statistics that were reset, and have seen a handful of batches since."""
    found = healthy_network(seed)
    _norms(found.model, lambda norm: norm.reset_running_stats())
    found.model.train()
    with torch.no_grad():
        for batch in found.data[: 2 + seed % 5]:
            found.model(batch)
    found.model.eval()
    return found


def _weights_moved(seed: int) -> Planted:
    """Statistics that stood still while the weights were trained on."""
    x, y = digits()
    model = fit(network(seed), x, y, seed, 40)
    held = [b.clone() for b in model.buffers()]
    fit(model, x, y, seed + 1, rate=0.2)
    with torch.no_grad():
        for buffer, old in zip(model.buffers(), held, strict=True):
            buffer.copy_(old)
    return Planted(model, batches(x))


def _swapped_momentum(seed: int) -> Planted:
    x, y = digits()
    return Planted(fit(network(seed, momentum=[0.9, 0.99][seed % 2]), x, y, seed), batches(x))


def _small_momentum(seed: int) -> Planted:
    x, y = digits()
    return Planted(fit(network(seed, momentum=[0.001, 0.003][seed % 2]), x, y, seed), batches(x))


def _other_data(seed: int) -> Planted:
    """Data that was not scaled, or is of other contrast, brightness, polarity or noise."""
    found = healthy_network(seed)
    noise = torch.Generator().manual_seed(seed)
    change: Callable[[Tensor], Tensor] = [
        lambda x: BRIGHTEST * x,
        lambda x: 0.4 * x + 0.5,
        lambda x: 1 - x,
        lambda x: x + 0.5 * torch.randn(x.shape, generator=noise),
        lambda x: x + 1.0,
        lambda x: (x - 0.3) / 0.37,
        lambda x: torch.nn.functional.avg_pool2d(x, 3, 1, 1) * 0.6,
    ][seed % 7]
    return Planted(found.model, [change(batch) for batch in found.data])


class Sequences(nn.Module):
    """Rows of an image as steps of a sequence, padded with zeros."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        width = int(np.random.default_rng(seed).choice([16, 24, 32]))
        self.body = nn.Sequential(
            nn.Conv1d(SIDE, width, 3, padding=1, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=1, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of sequences ``(N, 8, steps)``."""
        scores: Tensor = self.head(self.body(x).amax(-1))
        return scores


def _leaked_padding(seed: int) -> Planted:
    """Sequences of different lengths, filled up with zeros, and no mask."""
    x, y = digits()
    rng = np.random.default_rng(seed)
    lengths = torch.from_numpy(rng.integers(4, SIDE + 1, len(x)))
    steps = int(rng.integers(SIDE, 3 * SIDE))
    rows = F.pad(0.05 + x[:, 0].transpose(1, 2), (0, steps - SIDE))
    rows = rows * (torch.arange(steps) < lengths[:, None])[:, None]
    return Planted(fit(Sequences(seed), rows, y, seed), batches(rows))


def _dropout(seed: int) -> Planted:
    x, y = digits()
    return Planted(fit(network(seed, dropout=[0.2, 0.3, 0.5][seed % 3]), x, y, seed), batches(x))


def _counted_twice(seed: int) -> Planted:
    x, y = digits()
    return Planted(fit(network(seed, checkpointed=True), x, y, seed), batches(x))


def _thawed(seed: int) -> Planted:
    """A network that is fine-tuned on other data with frozen parameters, but for its last layer."""
    x, y = digits()
    model: Any = fit(network(seed), x, y, seed)
    for block in list(model)[:-1]:
        block.requires_grad_(False)
    fit(model, 0.5 * x + 0.4, y, seed, 60)
    return Planted(model, batches(x))


def _norms(model: nn.Module, change: Callable[[Any], Any]) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            change(module)


CAUSES = (
    Cause("stale: few updates", "BN103", ("few updates",), _few_updates),
    Cause("stale: weights moved on", "BN103", ("weights",), _weights_moved),
    Cause("wrong momentum: swapped", "BN110", ("momentum",), _swapped_momentum),
    Cause("wrong momentum: too small", "BN103", ("momentum",), _small_momentum),
    Cause("other data", "BN103", ("other data",), _other_data),
    Cause("leaked padding", "BN112", ("padding",), _leaked_padding),
    Cause("dropout before a norm", "BN203", ("dropout",), _dropout),
    Cause("double counting", "BN106", ("twice",), _counted_twice),
    Cause("thawed freeze", "BN104", ("frozen",), _thawed),
)


def planted(number: int) -> tuple[Cause, Planted]:
    """Return one of the networks, by its number."""
    cause = CAUSES[number % len(CAUSES)]
    return cause, cause.plant(number)
