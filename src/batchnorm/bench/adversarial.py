"""Small torch models on which folding goes wrong easily: each looks like one of every day, and differs in one point."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from batchnorm.bench.adversarial_parts import (
    Alternating,
    Doubled,
    Halved,
    Own,
    Rectified,
    Renamed,
    Run,
    Standardized,
    bn,
    case,
    chain,
    conv,
    image,
    in_dtype,
    net,
    overflowing,
    set_attributes,
    set_norms,
    tied,
    two_names,
)  # fmt: skip
from batchnorm.bench.zoo import Member

__all__ = ["adversaries"]


def adversaries() -> list[Member]:
    """Return all of them."""
    found: list[Member] = []
    for group in (_kinds, _forward, _between, _shared, _consumers, _numbers, _functions, _changed, _modes):
        found += group()
    return found


def _kinds() -> list[Member]:
    """Every linear layer before a norm, and what they are given."""
    found = []
    for d in (1, 2, 3):
        for kind in ("Conv", "ConvTranspose"):
            for groups in (1, 2, 4):
                cls, norm = getattr(nn, f"{kind}{d}d"), getattr(nn, f"BatchNorm{d}d")
                options = {"stride": 2, "padding": 1, "groups": groups, "bias": groups == 2}
                layers = partial(cls, 4, 8, 3, **options), partial(norm, 8)
                found.append(chain(f"{kind}{d}d, {groups} groups", *layers, x=partial(torch.randn, 2, 4, *[6] * d)))
    dilated = partial(nn.ConvTranspose2d, 4, 6, 3, stride=2, dilation=2, output_padding=1, groups=2)
    square = partial(nn.ConvTranspose2d, 4, 4, 3, groups=2, bias=False)
    sized = net("ConvTranspose2d, output size", lambda m, x: m.b(m.c(x, output_size=[17, 17])), image,
                 c=partial(nn.ConvTranspose2d, 4, 4, 3, stride=2), b=bn)  # fmt: skip
    found += [
        sized,
        chain("ConvTranspose2d, dilated", dilated, partial(bn, 6)),
        chain("ConvTranspose2d, square", square, bn),
    ]
    for mode in ("reflect", "replicate", "circular"):
        found.append(chain(f"{mode} padding, then norm", partial(conv, padding=1, padding_mode=mode), bn))
    rows = partial(torch.randn, 5, 4)
    return [
        *found,
        chain("same padding, then norm", partial(conv, k=4, padding="same"), bn),
        chain("affine=False", conv, partial(bn, affine=False)),
        chain("momentum=None", conv, partial(bn, momentum=None)),
        chain("Linear", partial(nn.Linear, 4, 4), partial(nn.BatchNorm1d, 4), x=rows),
        chain("Linear, affine=False", partial(nn.Linear, 4, 4), partial(nn.BatchNorm1d, 4, affine=False), x=rows),
        chain("Linear, no bias", partial(nn.Linear, 4, 4, bias=False), partial(nn.BatchNorm1d, 4), x=rows),
        chain("Linear on (N, L, C), L = C", partial(nn.Linear, 4, 4), partial(nn.BatchNorm1d, 4),
               x=partial(torch.randn, 2, 4, 4)),
        chain("Linear on (N, L, C), norm of L", partial(nn.Linear, 6, 3), partial(nn.BatchNorm1d, 4),
               x=partial(torch.randn, 2, 4, 6)),
        net("Linear, transposed, norm", lambda m, x: m.b(m.c(x).transpose(1, 2)), partial(torch.randn, 2, 4, 4),
             c=partial(nn.Linear, 4, 4), b=partial(nn.BatchNorm1d, 4)),
        net("Linear, permuted, norm", lambda m, x: m.b(m.c(x).permute(0, 3, 1, 2)), c=partial(nn.Linear, 8, 4), b=bn),
        net("Bilinear", lambda m, x: m.b(m.c(x, x)), rows, c=partial(nn.Bilinear, 4, 4, 4), b=partial(nn.BatchNorm1d, 4)),
        net("Embedding", lambda m, x: m.b(m.c(x.argmax(1))), rows, c=partial(nn.Embedding, 4, 4), b=partial(nn.BatchNorm1d, 4)),
        net("attention", lambda m, x: m.b(m.c(x, x, x)[0]), rows, c=partial(nn.MultiheadAttention, 4, 2),
             b=partial(nn.BatchNorm1d, 4)),
    ]  # fmt: skip


def _forward() -> list[Member]:
    """A norm before a linear layer."""
    ends: dict[str, tuple[Callable[[], nn.Module], ...]] = {
        "Conv2d": (conv,),
        "Conv2d, zero padding": (partial(conv, padding=1),),
        "Conv2d, zero padding, groups": (partial(conv, padding=1, groups=2),),
        "Conv2d, one-sided zeros": (partial(nn.ZeroPad2d, (0, 1, 0, 1)), conv),
        "Conv2d, same padding": (partial(conv, padding="same"),),
        "Conv2d, same padding, even kernel": (partial(conv, k=2, padding="same"),),
        "Conv2d, reflect padding": (partial(conv, padding=1, padding_mode="reflect"),),
        "Conv2d, circular padding": (partial(conv, padding=1, padding_mode="circular"),),
        "ConvTranspose2d": (partial(nn.ConvTranspose2d, 4, 4, 3, stride=2),),
        "ConvTranspose2d, output padding": (partial(nn.ConvTranspose2d, 4, 4, 1, stride=2, output_padding=1),),
        "flatten, Linear": (nn.Flatten, partial(nn.Linear, 256, 3)),
        "ReLU, Conv2d": (nn.ReLU, conv),
        "GELU, Conv2d": (nn.GELU, conv),
        "max pooling, Conv2d": (partial(nn.MaxPool2d, 2), conv),
        "padded max pooling, Conv2d": (partial(nn.MaxPool2d, 3, padding=1), conv),
        "average pooling, Conv2d": (partial(nn.AvgPool2d, 2), conv),
        "counted padding, Conv2d": (partial(nn.AvgPool2d, 3, padding=1), conv),
        "uncounted padding, Conv2d": (partial(nn.AvgPool2d, 3, padding=1, count_include_pad=False), conv),
        "divisor, Conv2d": (partial(nn.AvgPool2d, 2, divisor_override=3), conv),
        "adaptive pooling, flatten, Linear": (partial(nn.AdaptiveAvgPool2d, 1), nn.Flatten, partial(nn.Linear, 4, 3)),
        "Lp pooling, Conv2d": (partial(nn.LPPool2d, 2, 2), conv),
        "dropout, Conv2d": (partial(nn.Dropout, 0.5), conv),
        "shuffled pixels, Conv2d": (partial(nn.PixelShuffle, 2), partial(conv, 1)),
        "shuffled channels, Conv2d": (partial(nn.ChannelShuffle, 2), conv),
        "nearest, Conv2d": (partial(nn.Upsample, scale_factor=2), conv),
        "bilinear, Conv2d": (partial(nn.Upsample, scale_factor=2, mode="bilinear"), conv),
        "constant padding, Conv2d": (partial(nn.ConstantPad2d, 1, 0.5), conv),
    }  # fmt: skip
    return [chain(f"norm, {name}", bn, *layers) for name, layers in ends.items()]


def _between() -> list[Member]:
    """Something between a convolution and its norm."""
    middles: dict[str, Callable[[], nn.Module]] = {
        "ReLU": nn.ReLU,
        "ReLU in place": partial(nn.ReLU, inplace=True),
        "PReLU": partial(nn.PReLU, 4),
        "max pooling": partial(nn.MaxPool2d, 2),
        "average pooling": partial(nn.AvgPool2d, 2),
        "counted padding": partial(nn.AvgPool2d, 3, padding=1),
        "dropout": partial(nn.Dropout, 0.5),
        "constant padding": partial(nn.ConstantPad2d, 1, 1.0),
        "zero padding": partial(nn.ZeroPad2d, 1),
        "reflection": partial(nn.ReflectionPad2d, 1),
        "bilinear": partial(nn.Upsample, scale_factor=2, mode="bilinear"),
        "identity": nn.Identity,
        "instance norm": partial(nn.InstanceNorm2d, 4),
        "shuffled channels": partial(nn.ChannelShuffle, 2),
    }
    found = [chain(f"Conv2d, {name}, norm", conv, middle, bn) for name, middle in middles.items()]
    runs: dict[str, Run] = {
        "transposed": lambda m, x: m.b(m.c(x).transpose(1, 2).reshape(2, 4, 6, 6)[:, [2, 0, 3, 1]]),
        "rolled": lambda m, x: m.b(m.c(x).roll(1, 1)),
        "flipped": lambda m, x: m.b(m.c(x).flip(1)),
        "scaled by a number": lambda m, x: m.b(3 * m.c(x) + 1),
        "scaled by itself": lambda m, x: m.b(m.c(x) * x.mean()),
        "clamped": lambda m, x: m.b(m.c(x).clamp(-1, 1)),
        "halved": lambda m, x: m.b(torch.cat([m.c(x)[:, :2], x[:, 2:, 1:-1, 1:-1]], 1)),
    }
    return found + [net(f"Conv2d, {name}, norm", run) for name, run in runs.items()]


def _shared() -> list[Member]:
    """One layer in two places."""
    two: dict[str, Any] = {"c": conv, "d": conv, "a": bn, "b": bn}
    same: dict[str, Any] = {"c": partial(conv, padding=1), "a": bn, "b": bn}
    rows = partial(torch.randn, 5, 4)
    return [
        net("convolution with and without its norm", lambda m, x: (m.b(m.c(x)), m.c(-x))),
        net("convolution with two norms", lambda m, x: m.a(m.c(x)) + m.b(m.c(-x)), **same),
        net("convolution and norm twice", lambda m, x: m.a(m.c(m.a(m.c(x)))), **same),
        net("convolution twice in a row, then norm", lambda m, x: m.a(m.c(m.c(x))), **same),
        net("norm after two convolutions", lambda m, x: m.b(m.c(x)) + m.b(m.d(x)), **two),
        net("norm after a convolution and alone", lambda m, x: m.b(m.c(x)) + m.b(x)[..., 1:-1, 1:-1]),
        net("norm twice in a row", lambda m, x: m.b(m.b(m.c(x)))),
        net("two norms in a row", lambda m, x: m.b(m.a(m.c(x))), **two),
        net("two convolutions with one weight", lambda m, x: m.a(m.c(x)) + m.d(x), finish=tied, **two),
        net("one weight, two norms", lambda m, x: m.a(m.c(x)) + m.b(m.d(x)), finish=tied, **two),
        net("weight read besides", lambda m, x: (m.b(m.c(x)), m.c.weight.square().sum())),
        net("bias read besides", lambda m, x: m.b(m.c(x)) + m.c.bias.sum()),
        net("γ read besides", lambda m, x: m.b(m.c(x)) + m.b.weight.sum()),
        net("running mean read besides", lambda m, x: m.b(m.c(x)) - m.b.running_mean.sum()),
        case("one module under two names", two_names),
        net("embedding tied to a head", lambda m, x: m.d(m.b(m.c(x.argmax(1)))), rows, finish=tied,
             c=partial(nn.Embedding, 4, 4), d=partial(nn.Linear, 4, 4), b=partial(nn.BatchNorm1d, 4)),
        net("statistics of another norm", lambda m, x: F.batch_norm(m.c(x), m.a.running_mean, m.a.running_var), **two),
        net("bias of two convolutions", lambda m, x: m.a(m.c(x)) + m.d(x),
             finish=lambda m: setattr(m.d, "bias", m.c.bias), **two),
    ]  # fmt: skip


def _inplace_view(m: Any, x: Tensor) -> Any:
    y = m.c(x)
    y[:, :2].mul_(2)
    return m.b(y)


def _inplace_after(m: Any, x: Tensor) -> Any:
    y = m.c(x)
    z = m.b(y)
    y.add_(1)
    return z + y


def _viewed_before(m: Any, x: Tensor) -> Any:
    y = m.c(x)
    view = y[:, 0]
    z = m.b(y)
    return z, view


def _written_norm(m: Any, x: Tensor) -> Any:
    z = m.b(m.c(x))
    z[:, 0] = 1
    return z


def _consumers() -> list[Member]:
    """An output that somebody else reads or writes."""
    two: dict[str, Any] = {"c": conv, "d": conv, "b": bn}
    wide: dict[str, Any] = {"c": conv, "d": conv, "b": partial(bn, 8)}
    runs: dict[str, tuple[Run, dict[str, Any]]] = {
        "output read besides": (lambda m, x: (lambda y: m.b(y) + y)(m.c(x)), {}),
        "output returned besides": (lambda m, x: (lambda y: (m.b(y), y))(m.c(x)), {}),
        "output read by two norms": (lambda m, x: (lambda y: m.a(y) + m.b(y))(m.c(x)), {"c": conv, "a": bn, "b": bn}),
        "a view written in place": (_inplace_view, {}),
        "written in place afterwards": (_inplace_after, {}),
        "a view returned": (_viewed_before, {}),
        "norm written in place": (_written_norm, {}),
        "sum of two": (lambda m, x: m.b(m.c(x) + m.d(x)), two),
        "sum with the input": (lambda m, x: m.b(m.c(x) + x[..., 1:-1, 1:-1]), {}),
        "product of two": (lambda m, x: m.b(m.c(x) * m.d(x)), two),
        "difference of two": (lambda m, x: m.b(m.c(x) - m.d(x)), two),
        "concatenation of two": (lambda m, x: m.b(torch.cat([m.c(x), m.d(x)], 1)), wide),
        "concatenation with the input": (lambda m, x: m.b(torch.cat([m.c(x), x[..., 1:-1, 1:-1]], 1)), wide),
        "concatenation with itself": (lambda m, x: (lambda y: m.b(torch.cat([y, y], 1)))(m.c(x)), wide),
        "concatenation of rows": (lambda m, x: m.b(torch.cat([m.c(x), m.d(x)], 0)), two),
        "concatenation of places": (lambda m, x: m.b(torch.cat([m.c(x), m.d(x)], 2)), two),
        "norm read by two": (lambda m, x: (lambda y: m.c(y) + m.d(y))(m.b(x)), two),
        "norm read by one and returned": (lambda m, x: (lambda y: (m.c(y), y))(m.b(x)), {}),
        "norm concatenated, convolution": (lambda m, x: m.c(torch.cat([m.b(x), x], 1)), {"b": bn, "c": partial(conv, 8)}),
        "one half normalized": (lambda m, x: (lambda y: torch.cat([m.b(y[:, :2]), y[:, 2:]], 1))(m.c(x)),
                                {"c": conv, "b": partial(bn, 2)}),
    }  # fmt: skip
    return [net(name, run, **parts) for name, (run, parts) in runs.items()]


def _numbers() -> list[Member]:
    """Statistics, γ and dtypes at the edge."""
    changes: dict[str, Callable[[Any], None]] = {
        "variance 1e-12, ε 1e-12": lambda m: set_norms(m, variance=1e-12, eps=1e-12),
        "variance 0, ε 1e-30": lambda m: set_norms(m, variance=0.0, eps=1e-30),
        "variance 1e30": lambda m: set_norms(m, variance=1e30),
        "variance inf": lambda m: set_norms(m, variance=float("inf")),
        "variance NaN": lambda m: set_norms(m, variance=float("nan")),
        "variance negative": lambda m: set_norms(m, variance=-1e-7),
        "mean 1e6": lambda m: set_norms(m, mean=1e6),
        "mean 1e4, variance 1e-4": lambda m: set_norms(m, mean=1e4, variance=1e-4),
        "ε 10": lambda m: set_norms(m, eps=10.0),
        "γ 0": lambda m: set_norms(m, gamma=0.0),
        "γ negative": lambda m: set_norms(m, gamma=-1.0),
        "γ 1e-40": lambda m: set_norms(m, gamma=1e-40),
        "γ 1e38": lambda m: set_norms(m, gamma=1e38),
    }
    halves = [
        case(f"{dtype}".removeprefix("torch."), partial(in_dtype, dtype))
        for dtype in (torch.float16, torch.bfloat16, torch.float64)
    ]
    huge = {"mean": 0.0, "variance": 1e-7, "eps": 1e-7, "gamma": 1000.0}
    overflow = case("float16, overflow", overflowing, lambda m: set_norms(m, **huge))
    underflow = case("float16, underflow", partial(in_dtype, torch.float16), lambda m: set_norms(m, gamma=1e-6))
    padded = [
        chain(f"{name}, norm, padded Conv2d", bn, partial(conv, padding=1), finish=changes[name])
        for name in ("γ 0", "γ negative", "γ 1e-40")
    ]
    pooled = chain("γ negative, max pooling, Conv2d", bn, partial(nn.MaxPool2d, 2), conv, finish=changes["γ negative"])
    plain = [chain(f"Conv2d, norm, {name}", conv, bn, finish=change) for name, change in changes.items()]
    return [*plain, *halves, overflow, underflow, *padded, pooled]


def _functions() -> list[Member]:
    """Normalization called as a function."""
    runs: dict[str, Run] = {
        "function": lambda m, x: F.batch_norm(F.conv2d(x, m.weight, m.bias), m.mean, m.var, m.gamma, m.beta),
        "function, no bias": lambda m, x: F.batch_norm(F.conv2d(x, m.weight), m.mean, m.var, m.gamma, m.beta),
        "function, own ε": lambda m, x: F.batch_norm(F.conv2d(x, m.weight, m.bias), m.mean, m.var, eps=0.5),
        "function, twice": lambda m, x: F.batch_norm(F.batch_norm(F.conv2d(x, m.weight), m.mean, m.var), m.beta, m.var),
        "function, of the batch": lambda m, x: F.batch_norm(F.conv2d(x, m.weight), None, None, m.gamma, m.beta, training=True),
        "function, weight doubled": lambda m, x: F.batch_norm(F.conv2d(x, 2 * m.weight), m.mean, m.var, m.gamma, m.beta),
        "function, γ doubled": lambda m, x: F.batch_norm(F.conv2d(x, m.weight), m.mean, m.var, 2 * m.gamma, m.beta),
        "function, weight used twice": lambda m, x: F.batch_norm(F.conv2d(F.conv2d(x, m.weight), m.weight), m.mean, m.var),
        "by hand": lambda m, x: (F.conv2d(x, m.weight) - m.mean[:, None, None]) / (m.var + 1e-5).sqrt()[:, None, None],
        "weight from the input": lambda m, x: F.batch_norm(F.conv2d(x, m.weight * x.mean()), m.mean, m.var),
        "einsum": lambda m, x: F.batch_norm(torch.einsum("nchw,oc->nohw", x, m.weight[..., 0, 0]), m.mean, m.var),
    }  # fmt: skip
    return [case(name, partial(lambda run: (Own(run), image()), run)) for name, run in runs.items()]


def _changed() -> list[Member]:
    """Layers that were changed by a subclass, a parametrization or a hook."""

    def hook(name: str, change: Callable[[Any], Any]) -> Member:
        return net(name, lambda m, x: m.b(m.c(x)), finish=change)

    return [
        chain("convolution that standardizes its weight", partial(Standardized, 4, 4, 3), bn),
        chain("convolution that halves its output", partial(Halved, 4, 4, 3), bn),
        chain("norm with an activation", conv, partial(Rectified, 4)),
        chain("norm of a subclass", conv, partial(Renamed, 4)),
        chain("SyncBatchNorm", conv, partial(nn.SyncBatchNorm, 4)),
        chain("InstanceNorm with statistics", conv, partial(nn.InstanceNorm2d, 4, track_running_stats=True, affine=True)),
        hook("parametrized weight", lambda m: parametrize.register_parametrization(m.c, "weight", Doubled())),
        hook("parametrized bias", lambda m: parametrize.register_parametrization(m.c, "bias", Doubled())),
        hook("weight norm", lambda m: parametrizations.weight_norm(m.c)),
        hook("spectral norm", lambda m: parametrizations.spectral_norm(m.c)),
        hook("parametrized γ", lambda m: parametrize.register_parametrization(m.b, "weight", Doubled())),
        hook("hook doubles the convolution", lambda m: m.c.register_forward_hook(lambda c, x, y: 2 * y)),
        hook("hook doubles the norm", lambda m: m.b.register_forward_hook(lambda c, x, y: 2 * y)),
        hook("hook shifts what the norm is given", lambda m: m.b.register_forward_pre_hook(lambda b, x: (x[0] + 1,))),
        hook("hook doubles the input", lambda m: m.c.register_forward_pre_hook(lambda b, x: (2 * x[0],))),
        hook("forward of the object", lambda m: setattr(m.c, "forward", lambda x: 2 * type(m.c).forward(m.c, x))),
        hook("padding changed later", lambda m: setattr(m.c, "padding", (2, 2))),
        hook("ε changed later", lambda m: setattr(m.b, "eps", 1.0)),
        hook("affine taken away later", lambda m: set_attributes(m.b, weight=None, bias=None)),
    ]  # fmt: skip


def _modes() -> list[Member]:
    """Norms that do not use their statistics, and ways that depend on values."""

    def mode(name: str, change: Callable[[Any], Any], run: Run = lambda m, x: m.b(m.c(x))) -> Member:
        return net(name, run, finish=change)

    wide: dict[str, Any] = {"c": conv, "d": conv, "a": bn, "b": bn}
    return [
        mode("norm in training", lambda m: m.b.train()),
        chain("track_running_stats=False", conv, partial(bn, track_running_stats=False)),
        chain("one norm with, one without statistics", conv, partial(bn, track_running_stats=False), conv, bn),
        mode("frozen parameters", lambda m: m.requires_grad_(False)),
        net("a branch on values", lambda m, x: m.b(m.c(x)) if x.sum() > 0 else m.c(x)),
        net("a branch on values, two norms", lambda m, x: m.a(m.c(x)) if x.sum() > 0 else m.b(m.c(x)), **wide),
        net("a branch on the output", lambda m, x: (lambda y: m.b(y) if y.mean() > 0 else y)(m.c(x))),
        net("a loop over values", lambda m, x: _looped(m, x, int(x.sum().abs()) % 3 + 1),
             c=partial(conv, padding=1), b=bn),
        net("a loop over shapes", lambda m, x: _looped(m, x, len(x)), c=partial(conv, padding=1), b=bn),
        net("a dictionary returned", lambda m, x: {"y": m.b(m.c(x)), "x": [x]}),
        case("every second time", lambda: (Alternating(), image())),
        net("masked by values", lambda m, x: m.b(m.c(x)) * (m.c(x) > 0)),
        net("gradient stopped", lambda m, x: m.b(m.c(x).detach())),
        net("complex", lambda m, x: torch.fft.ifft2(torch.fft.fft2(m.b(m.c(x)))).real),
        net("a norm of one place", lambda m, x: m.b(m.c(x).mean((2, 3), keepdim=True))),
        net("channels last", lambda m, x: m.b(m.c(x.contiguous(memory_format=torch.channels_last)))),
        net("one image without a batch", lambda m, x: m.b(m.c(x[0])[None])),
    ]  # fmt: skip


def _looped(m: Any, x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = m.b(m.c(x))
    return x
