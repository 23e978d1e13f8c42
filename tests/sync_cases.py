"""What ranks hold, the step that they take, and what one process on the whole batch gives, by the definition."""

from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import distributed

from batchnorm import torch as bn
from batchnorm.functional import Renorm, batch_norm_backward, batch_norm_train, ghost_batches, update_running
from batchnorm.moments import Moments
from batchnorm.torch import across, portions

CHANNELS = 3
LAYERS = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


class Case(NamedTuple):
    """What the ranks hold: samples, places of a sample on rank 0 (a rank's number more on each other), and how it lies."""

    samples: tuple[int, ...]
    places: tuple[int, ...] = (3, 4)
    dtype: torch.dtype = torch.float32
    options: Any = None
    given: str = ""
    mean: float = 3.0
    std: float = 2.0
    layout: str = "contiguous"
    # as on a device: no value is looked at
    blind: bool = False

    def shard(self, rank):
        """Return input, upstream gradient, mask and weights of a rank, always the same."""
        generator = torch.Generator().manual_seed(100 + rank)
        places = tuple(n + rank for n in self.places)
        shape = (self.samples[rank], CHANNELS, *places)
        draw = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
        x = (draw[0] * self.std + self.mean * (1 + torch.arange(3.0).view(3, *[1] * len(places)))).to(self.dtype)
        dy = draw[1].to(self.dtype)
        if self.layout == "channels last":
            x, dy = x.to(memory_format=torch.channels_last), dy.to(memory_format=torch.channels_last)
        if self.layout == "strided":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        mask = torch.rand((shape[0], *places), generator=generator) < 0.7
        weight = torch.rand((shape[0], *places), generator=generator, dtype=torch.float64) * 3
        return x, dy, mask if "mask" in self.given else None, weight.to(self.dtype) if "weight" in self.given else None

    def layer(self):
        """Return the layer, the same on every rank."""
        torch.manual_seed(5)
        layer = LAYERS[2 + len(self.places)](CHANNELS, dtype=self.dtype, **(self.options or {}))
        with torch.no_grad():
            for v in [*layer.parameters(), layer.running_mean, layer.running_var]:
                v.copy_(torch.rand_like(v) + 0.5)
        return layer


class Counted:
    """The collectives of torch.distributed, and how many numbers a rank gives to each."""

    def __enter__(self):
        self.seen = []
        self.originals = {name: getattr(distributed, name) for name in ("all_gather_single", "all_reduce")}
        for name, original in self.originals.items():
            setattr(distributed, name, self.counting(name, original))
        return self.seen

    def counting(self, name, original):
        def wrapped(*tensors, **kwargs):
            self.seen.append((name, tensors[-1 if name == "all_reduce" else 1].numel()))
            return original(*tensors, **kwargs)

        return wrapped

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(distributed, name, original)


@contextmanager
def without_looking(blind):
    """Go the way of other devices, which are waited for where a value is looked at."""
    with ExitStack() as stack:
        for module in (portions, across) if blind else ():
            stack.enter_context(mock.patch.object(module, "is_eager", return_value=False))
        yield


def step(rank, case):
    """Take one step of a case and return all numbers of a rank."""
    with without_looking(case.blind):
        return step_of(rank, case)


def step_of(rank, case):
    layer = bn.sync(case.layer()).train()
    x, dy, mask, weight = case.shard(rank)
    x.requires_grad_()
    if weight is not None:
        weight.requires_grad_()
    y = layer(x, mask, weight)
    (y * dy).sum().backward()
    found = {"y": y.detach(), "dx": x.grad, "running_mean": layer.running_mean, "running_var": layer.running_var}
    found |= {f"d{name}": p.grad for name, p in layer.named_parameters()}
    found |= {} if weight is None else {"dw": weight.grad}
    return {name: v.numpy() for name, v in found.items()} | {"batches": layer.num_batches_tracked.item()}


def rows_of(v):
    """Return ``(N, C, *spatial)`` as float64 rows of channels."""
    return np.moveaxis(v.detach().numpy().astype(np.float64), 1, -1).reshape(-1, v.shape[1])


def expected(case):
    """Return the numbers of one process on the whole batch, by the definition in float64, shard by shard."""
    layer, shards = case.layer(), [case.shard(rank) for rank in range(len(case.samples))]
    # float64 itself holds the mean of a batch far from zero with an error; a shift that is exact takes it out
    shift = case.mean * np.arange(1, 1 + CHANNELS) // 1 if case.mean > 100 else np.zeros(CHANNELS)
    gamma, beta = (None if p is None else p.detach().double().numpy() for p in (layer.weight, layer.bias))
    old = [v.double().numpy() for v in (layer.running_mean, layer.running_var)]
    renorm = Renorm(3.0, 5.0) if (case.options or {}).get("renorm") else None
    given = [] if renorm is None else old
    cuts = [ghost_batches(n, (case.options or {}).get("virtual_batch_size")) for n in case.samples]
    out = [{"y": np.zeros(0), "dx": np.zeros(0), "dw": np.zeros(0)} for _ in shards]
    dgamma, dbeta, moments = 0.0, 0.0, Moments.empty()
    for i in range(max(map(len, cuts))):
        parts = [
            tuple(None if v is None else v[c[i]] for v in s) if i < len(c) else None
            for s, c in zip(shards, cuts, strict=True)
        ]
        here = [(rank, part) for rank, part in enumerate(parts) if part is not None]
        x, dy = (np.concatenate([rows_of(part[k]) for _, part in here]) for k in (0, 1))
        x = x - shift
        mask, weight = (
            None if here[0][1][k] is None else np.concatenate([part[k].numpy().astype(t).ravel() for _, part in here])
            for k, t in ((2, bool), (3, np.float64))
        )
        kept = {"eps": layer.eps, "mask": mask, "sample_weight": weight, "renorm": renorm}
        result = batch_norm_train(x, gamma, beta, *given, **kept)
        g = batch_norm_backward(dy, x, gamma, *given, **kept)
        dw = numeric_dw(x, dy, gamma, kept) if weight is not None else np.zeros(len(x))
        dgamma, dbeta, moments = dgamma + g.dgamma, dbeta + g.dbeta, moments.merge(result.moments)
        ends = np.cumsum([0, *(len(rows_of(part[0])) for _, part in here)])
        for (rank, part), a, b in zip(here, ends, ends[1:], strict=False):
            shape = (part[0].shape[0], *part[0].shape[2:], CHANNELS)
            here_now = {name: np.moveaxis(v[a:b].reshape(shape), -1, 1) for name, v in (("y", result.y), ("dx", g.dx))}
            for name, v in {**here_now, "dw": dw[a:b].reshape(shape[:-1])}.items():
                out[rank][name] = np.concatenate([out[rank][name], v]) if out[rank][name].size else v
    moments = Moments(moments.count, moments.mean + shift, moments.m2)
    mean, var = update_running(*old, moments, decay=1 - layer.momentum)
    return out, {"dweight": dgamma, "dbias": dbeta, "running_mean": mean, "running_var": var}


def numeric_dw(x, dy, gamma, kept):
    """Return the gradient of the sample weights, by autograd through the definition."""
    w = torch.from_numpy(kept["sample_weight"]).requires_grad_()
    mask = None if kept["mask"] is None else torch.from_numpy(kept["mask"])
    gamma = None if gamma is None else torch.from_numpy(gamma)
    y = batch_norm_train(torch.from_numpy(x), gamma, eps=kept["eps"], mask=mask, sample_weight=w).y
    (y * torch.from_numpy(dy)).sum().backward()
    return w.grad.numpy()


def assert_within(got, wanted, tolerance, what):
    """Hold an error to a share of the largest value."""
    assert got.shape == np.shape(wanted), f"{what}: {got.shape}, expected {np.shape(wanted)}"
    if got.size:
        error = np.abs(got - wanted).max()
        assert error <= tolerance * np.abs(wanted).max(), f"{what}: {error / np.abs(wanted).max():.2e}"
