"""Synchronized layers on gloo processes of this machine: how far from one process on the whole batch, and what they cost."""

import datetime
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from batchnorm.bench.machine import describe, keep
from batchnorm.errors import WorkerError
from batchnorm.functional import batch_norm_backward, batch_norm_train
from batchnorm.tables import table
from batchnorm.torch import BatchNorm2d, sync

__all__ = ["SyncBench", "run"]

CHANNELS, PLACES = 5, (3, 4)
PIECES = ((8, 8), (5, 3, 0), (3, 1, 2, 2))
SHAPES = ((16, 64, 28, 28), (16, 64, 7, 7))
ROUNDS, SECONDS = 50, 120


@dataclass(frozen=True)
class SyncBench:
    """Raw values of the measurement; prints as tables."""

    facts: dict[str, Any]
    file: Path

    def __str__(self) -> str:
        head = ("Samples on each rank", "dtype", *self.facts["exactness"][0]["errors"])
        errors = [
            (one["pieces"], one["dtype"], *(f"{e:.0e}" for e in one["errors"].values()))
            for one in self.facts["exactness"]
        ]
        first = self.facts["speed"][0]["seconds"]
        rows = [
            (
                one["shape"],
                *(f"{1000 * median(times):.2f} ms" for times in one["seconds"].values()),
                f"{_ratio(one):.2f}",
            )
            for one in self.facts["speed"]
        ]
        speed = table(("Batch of each of 2 ranks", *first, "Synced to torch"), rows)
        return f"{table(head, errors)}\n\n{speed}\n\nraw values: {self.file}"


def run(out: Path, *, quick: bool = False) -> SyncBench:
    """Measure, and keep every raw value as JSON in ``out``.

    Raises:
        WorkerError: a process has failed.
    """
    facts: dict[str, Any] = {"machine": describe(), "date": datetime.datetime.now(datetime.UTC).isoformat()}
    facts["exactness"] = [
        _exactness(pieces, dtype) for pieces in PIECES[: 1 if quick else 3] for dtype in ("float32", "float64")
    ]
    rounds = 3 if quick else ROUNDS
    facts["speed"] = [
        {"shape": str(shape), "seconds": _on_ranks(2, _timed, shape, rounds)[0]}
        for shape in SHAPES[: 1 if quick else 2]
    ]
    return SyncBench(facts, keep(facts, out, "sync.json"))


def _ratio(one: dict[str, Any]) -> float:
    seconds = one["seconds"]
    return float(median(a / b for a, b in zip(seconds["synced"], seconds["torch.nn, alone"], strict=True)))


# -- one process for each rank -----------------------------------------------------------------------------------------


def _on_ranks(ranks: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Do a job on every rank, each with one thread, and return what it gives, in order."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        processes = [
            context.Process(target=_enter, args=(rank, ranks, meeting, answers, job, arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            found = dict(answers.get(timeout=SECONDS) for _ in processes)
        except Exception as error:
            raise WorkerError(
                f"all {ranks} processes of the measurement must end well, one did not: {error!r}"
            ) from error
        finally:
            for process in processes:
                process.join(5)
                process.kill()
    return [found[rank] for rank in range(ranks)]


def _enter(rank: int, ranks: int, meeting: str, answers: Any, job: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=SECONDS)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=limit)
    answers.put((rank, job(rank, *arguments)))
    distributed.barrier()
    distributed.destroy_process_group()


# -- exactness ---------------------------------------------------------------------------------------------------------


def _batch(samples: int) -> tuple[Tensor, ...]:
    """Return x, dy, γ and β, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((samples, CHANNELS, *PLACES), (samples, CHANNELS, *PLACES), (CHANNELS,), (CHANNELS,))
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)


def _step(rank: int, pieces: tuple[int, ...], dtype: str) -> dict[str, Any]:
    x, dy, gamma, beta = (v.to(getattr(torch, dtype)) for v in _batch(sum(pieces)))
    layer: Any = sync(BatchNorm2d(CHANNELS, dtype=x.dtype))
    for parameter, v in ((layer.weight, gamma), (layer.bias, beta)):
        parameter.data.copy_(v)
    mine = torch.split(x, list(pieces))[rank].clone().requires_grad_()
    y = layer(mine)
    y.backward(torch.split(dy, list(pieces))[rank])
    found = {"y": y, "dx": mine.grad, "dγ": layer.weight.grad, "dβ": layer.bias.grad}
    found |= {"running mean": layer.running_mean, "running variance": layer.running_var}
    return {name: v.detach().double().numpy() for name, v in found.items()}


def _exactness(pieces: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """Return the largest error of each result, relative to the largest value, against the definition in float64."""
    x, dy, gamma, beta = (v.to(getattr(torch, dtype)).double().numpy() for v in _batch(sum(pieces)))
    parts = _on_ranks(len(pieces), _step, pieces, dtype)
    step = batch_norm_train(x, gamma, beta, np.zeros(CHANNELS), np.ones(CHANNELS))
    dx, dgamma, dbeta = batch_norm_backward(dy, x, gamma)
    got = {name: np.concatenate([part[name] for part in parts]) for name in ("y", "dx")}
    got |= {name: sum(part[name] for part in parts) for name in ("dγ", "dβ")}
    got |= {name: np.stack([part[name] for part in parts]) for name in ("running mean", "running variance")}
    expected = (step.y, dx, dgamma, dbeta, step.running_mean, step.running_var)
    errors = {
        name: float(np.abs(v - e).max() / np.abs(e).max()) for (name, v), e in zip(got.items(), expected, strict=True)
    }
    return {"pieces": ", ".join(map(str, pieces)), "dtype": dtype, "errors": errors}


# -- cost --------------------------------------------------------------------------------------------------------------


def _timed(rank: int, shape: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    """Time forward and backward, in turns with torch's layer, which talks to nobody, and with the two collectives alone."""
    torch.manual_seed(rank)
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    channels = shape[1]
    layers = {"torch.nn, alone": nn.BatchNorm2d(channels), "synced": sync(BatchNorm2d(channels))}
    ways: dict[str, Callable[[], object]] = {
        name: lambda layer=layer: layer(x).backward(dy)  # type: ignore[misc]
        for name, layer in layers.items()
    }
    ways["two collectives alone"] = lambda: _talk(2 * channels + 1)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 3):
        for name, way in ways.items():
            distributed.barrier()
            start = time.perf_counter()
            way()
            if number >= 3:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _talk(size: int) -> None:
    v = torch.zeros(size, dtype=torch.float64)
    distributed.all_gather_single(v.new_empty(2 * size), v)
    distributed.all_reduce(v)
