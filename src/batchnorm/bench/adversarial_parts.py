"""What the adversarial models are made of: modules that do something else than they look like, and short ways to build them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from batchnorm.bench.zoo import Member, norms_of, randomized

__all__ = [
    "Alternating", "Doubled", "Halved", "Net", "Own", "Rectified", "Renamed", "Run", "Standardized", "bn", "case", "chain",
    "conv", "image", "in_dtype", "net", "overflowing", "set_attributes", "set_norms", "tied", "two_names",
]  # fmt: skip

Build = Callable[[], tuple[nn.Module, Any]]
Run = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """Modules by name, and a forward as a function of them and of the input."""

    def __init__(self, run: Run, **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        """Return what the function returns."""
        return self.run(self, x)


@dataclass(frozen=True)
class Adversary(Member):
    """A member that does more to its model after the norms were randomized, and runs on its negated example too."""

    finish: Callable[[Any], Any] = lambda model: model

    def __call__(self) -> tuple[str, nn.Module, Any]:
        """Return name, model and example, the same on every call."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model, example = self.build()
            model = randomized(model)
            self.finish(model)
            return self.name, model, example


def conv(i: int = 4, o: int = 4, k: int = 3, **options: Any) -> nn.Conv2d:
    """Return a convolution."""
    return nn.Conv2d(i, o, k, **options)


def bn(channels: int = 4, **options: Any) -> nn.BatchNorm2d:
    """Return a norm."""
    return nn.BatchNorm2d(channels, **options)


def image(channels: int = 4, size: int = 8, n: int = 2) -> Tensor:
    """Return random images."""
    return torch.randn(n, channels, size, size)


def case(name: str, build: Build, finish: Callable[[Any], Any] = lambda model: model) -> Member:
    """Return a case."""
    return Adversary("adversarial", name, build, finish)


def chain(name: str, *layers: Callable[[], nn.Module], x: Callable[[], Tensor] = image, **more: Any) -> Member:
    """Return a case of modules in a row."""
    return case(name, lambda: (nn.Sequential(*(layer() for layer in layers)), x()), **more)


def net(name: str, run: Run, x: Callable[[], Tensor] = image, finish: Any = lambda m: m, **parts: Any) -> Member:
    """Return a case with a forward of its own; each part is a function that makes it, ``c`` and ``b`` if none is given."""
    made = parts or {"c": conv, "b": bn}
    return case(name, lambda: (Net(run, **{key: part() for key, part in made.items()}), x()), finish)


def in_dtype(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Return a small network in a dtype."""
    return nn.Sequential(conv(padding=1), bn(), nn.ReLU(), conv(), bn()).to(dtype), image().to(dtype)


def overflowing() -> tuple[nn.Module, Any]:
    """Return a network in float16 whose outputs are small and whose folded weights are beyond float16."""
    return nn.Sequential(conv(bias=False), bn()).half(), 1e-4 * image().half()


def set_norms(model: nn.Module, **values: float) -> None:
    """Give all norms the same mean, variance, gamma or eps."""
    for norm in norms_of(model).values():
        given: Any = norm
        given.eps = values.get("eps", given.eps)
        with torch.no_grad():
            for name, tensor in (
                ("mean", given.running_mean),
                ("variance", given.running_var),
                ("gamma", given.weight),
            ):
                if name in values:
                    tensor.fill_(values[name])


def tied(model: Any) -> None:
    """Give the second convolution the weight of the first."""
    model.d.weight = model.c.weight


def two_names() -> tuple[nn.Module, Any]:
    """Return a network that holds one module twice."""
    one = partial(conv, padding=1)()
    return Net(lambda m, x: m.d(m.b(m.c(x))), c=one, d=one, b=bn()), image()


def set_attributes(module: nn.Module, **values: Any) -> None:
    """Set attributes of a module."""
    for name, value in values.items():
        setattr(module, name, value)


class Own(nn.Module):
    """A norm and a weight that are applied by functions."""

    def __init__(self, forward: Run) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.randn(4))
        self.gamma, self.beta = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        """Return what the function returns."""
        return self.run(self, x)


class Standardized(nn.Conv2d):
    """A convolution that standardizes its weight whenever it runs."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution with the standardized weight."""
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Halved(nn.Conv2d):
    """A convolution whose output is halved, bias and all."""

    def forward(self, x: Tensor) -> Tensor:
        """Return half of the convolution."""
        return super().forward(x) / 2


class Rectified(nn.BatchNorm2d):
    """A norm with an activation in it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified norm."""
        return F.relu(super().forward(x))


class Renamed(nn.BatchNorm2d):
    """A norm like any other."""


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, w: Tensor) -> Tensor:
        """Return twice the weight."""
        return 2 * w


class Alternating(nn.Module):
    """A module that goes another way every second time."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.calls = conv(), bn(), 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of the convolution, or the convolution."""
        self.calls += 1
        return self.b(self.c(x)) if self.calls % 2 else self.c(x)  # type: ignore[no-any-return]
