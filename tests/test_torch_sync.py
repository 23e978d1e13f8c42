"""Synchronized layers on real processes, held to the definition on the whole batch in one."""

import numpy as np
import pytest
import torch

from sync_cases import TOLERANCE, assert_within, expected
from sync_jobs import STEPS, answers


@pytest.mark.parametrize("key", STEPS, ids=lambda key: "-".join(map(str, key)))
def test_a_step_is_that_of_one_process_on_the_whole_batch(key):
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
