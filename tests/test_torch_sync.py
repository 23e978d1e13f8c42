"""Synchronized layers on real processes, held to the definition on the whole batch in one."""

from typing import Any

import numpy as np
import pytest
import torch

from processes import on_ranks
from sync_cases import TOLERANCE, Case, assert_within, expected, step

SHARDS = {"8+8": (8, 8), "5+3+0": (5, 3, 0), "3+1+2+2": (3, 1, 2, 2)}
KINDS = {
    "images": {},
    "images far from zero": {"mean": 1e4 / 3, "std": 1.0},
    "channels last": {"layout": "channels last", "places": (5, 6)},
    "channels last far from zero": {"layout": "channels last", "places": (5, 6), "mean": 1e4 / 3, "std": 1.0},
    "strided": {"layout": "strided"},
    "rows": {"places": ()},
    "rows far from zero": {"places": (), "mean": 1e4 / 3, "std": 1.0},
    "sequences": {"places": (5,)},
    "volumes": {"places": (2, 3, 2)},
    "mask": {"given": "mask"},
    "weight": {"given": "weight"},
    "mask and weight": {"given": "mask weight"},
    "no affine": {"options": {"affine": False}},
    "no bias": {"options": {"bias": False}},
    "ghost batches": {"options": {"virtual_batch_size": 2}},
    "ghost batches of three": {"options": {"virtual_batch_size": 3}},
    "ghost batches, mask and weight": {"options": {"virtual_batch_size": 2}, "given": "mask weight"},
    "renorm": {"options": {"renorm": {"start": 0, "dmax_at": 0, "rmax_at": 0}}},
    "renorm and mask": {"options": {"renorm": {"start": 0, "dmax_at": 0, "rmax_at": 0}}, "given": "mask"},
}
STEPS = {
    (shards, kind, dtype): Case(samples, dtype=dtype, **options)
    for shards, samples in SHARDS.items()
    for kind, options in KINDS.items()
    for dtype in TOLERANCE
}
JOBS: dict[int, dict[Any, Any]] = {ranks: {} for ranks in (2, 3, 4)}
for key, case in STEPS.items():
    JOBS[len(case.samples)][key] = (step, case)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Start each number of processes once, and let it do all its jobs."""
    started = {}

    def of(ranks):
        if ranks not in started:
            started[ranks] = on_ranks(tmp_path_factory.mktemp("sync"), ranks, JOBS[ranks])
        return started[ranks]

    return of


@pytest.fixture
def answers(worlds):
    """Return the answers of the ranks to one job; a failure there is one here."""

    def of(ranks, name):
        returned, errors = worlds(ranks)
        failed = [error for (job, _), error in errors.items() if job == name]
        assert not failed, "\n".join(failed)
        return returned[name]

    return of


@pytest.mark.parametrize("key", STEPS, ids=lambda key: "-".join(map(str, key)))
def test_a_step_is_that_of_one_process_on_the_whole_batch(answers, key):
    case = STEPS[key]
    found, (shards, whole) = answers(len(case.samples), key), expected(case)
    tolerance = TOLERANCE[case.dtype]
    for rank, (got, wanted) in enumerate(zip(found, shards, strict=True)):
        assert got["batches"] == 1
        for name in ("y", "dx", "dw"):
            if name in got and case.samples[rank]:
                assert_within(got[name], wanted[name], tolerance, f"{name} of rank {rank}")
        for name in ("running_mean", "running_var"):
            assert np.array_equal(got[name], found[0][name])
            assert_within(got[name], whole[name], tolerance, name)
    if case.mean > 100 and case.dtype is torch.float64:
        # a mean of 1e4 is held with an error of 1e-12, which Σ dy on a rank multiplies
        tolerance *= 5
    for name in {"dweight", "dbias"} & set(found[0]):
        assert_within(sum(got[name].astype(np.float64) for got in found), whole[name], tolerance, name)
