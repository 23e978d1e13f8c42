"""Answers are tested from rows that were made up, so that what is true is known."""

import math

import numpy as np
import pytest

from batchnorm.lab import words
from batchnorm.lab.arms import ARMS, Arm
from batchnorm.lab.statistics import SignFlip
from batchnorm.lab.verdicts import Estimate, Margins, _longest_run, analyse


def row(arm, rate, seed, loss=0.2, accuracy=0.9, reached=10, status="trained"):
    known = status == "trained"
    curve = [[step, 0.1, 0.2, 0.95 if step >= reached else 0.2] for step in (10, 20, 30, 40)]
    return {
        "arm": arm, "learning_rate": rate, "seed": seed, "status": status, "steps": 40, "curve": curve if known else [],
        "val_log_loss": loss if known else None, "test_log_loss": loss if known else None,
        "val_accuracy": accuracy if known else None, "test_accuracy": accuracy if known else None,
    }  # fmt: skip


def rows_of(
    loss, accuracy=lambda *_: 0.9, reached=lambda *_: 10, status=lambda *_: "trained", seeds=10, rates=(0.1, 1.0)
):
    return [
        row(
            arm,
            rate,
            seed,
            loss(arm, rate, seed),
            accuracy(arm, rate, seed),
            reached(arm, seed),
            status(arm, rate, seed),
        )
        for arm in ("none", "before")
        for rate in rates
        for seed in range(seeds)
    ]


def answers(rows, rates=(0.1, 1.0), **options):
    found = analyse(rows, [ARMS["none"], ARMS["before"]], rates, chance=0.1, **options)
    return found, {verdict.question: verdict for verdict in found.verdicts}


NOISE = np.random.default_rng(0).normal(0, 0.01, (2, 10))


def noisy(gap):
    def loss(arm, rate, seed):
        return 0.3 - gap * (arm == "before") + 0.2 * (rate == 1.0) + NOISE[int(arm == "before"), seed]

    return loss


def test_the_best_rate_is_chosen_on_validation_rows():
    rows = rows_of(noisy(0.1))
    for r in rows:
        r["val_log_loss"] = 0.1 if (r["arm"] == "none") == (r["learning_rate"] == 1.0) else 0.9
    found, _ = answers(rows)
    assert [result.learning_rate for result in found.results] == [1.0, 0.1]
    assert all(result.at_edge for result in found.results)
    assert "at the edge of the grid" in found.notes[0]


def test_a_difference_is_proved_and_said():
    found, verdict = answers(rows_of(noisy(0.1)))
    assert verdict["log_loss"].outcome == "second"
    differences = [NOISE[0, s] + 0.1 - NOISE[1, s] for s in range(10)]
    assert verdict["log_loss"].difference == pytest.approx(np.mean(differences))
    assert verdict["log_loss"].p == verdict["log_loss"].p_holm == 2 / 1024
    assert (verdict["log_loss"].low, verdict["log_loss"].high) == pytest.approx(SignFlip(differences).interval())
    assert verdict["log_loss"].text.startswith(
        "“before” has a lower test log-loss than “none”, by 0.11 nats, 95 % interval"
    )
    assert found.best.arm.name == "before"


def test_the_headline_answers_the_question():
    found, _ = answers(rows_of(noisy(0.1), accuracy=lambda arm, _, seed: 0.9 if seed % 2 == (arm == "none") else 0.8))
    assert found.headline == (
        "Batch normalization (“before”) helps here: compared with “none” it predicts better. "
        "Open: whether it is right more often, whether it learns sooner and whether it works at more learning rates."
    )
    assert "hurts here" in answers(rows_of(noisy(-0.1)))[0].headline
    assert analyse(rows_of(noisy(0.1)), [ARMS["none"]], (0.1, 1.0), chance=0.1).headline == ""


def test_no_difference_is_proved_and_said():
    _, verdict = answers(rows_of(noisy(0.0)), margins=Margins(log_loss=0.05))
    assert verdict["log_loss"].outcome == "equivalent"
    assert verdict["log_loss"].text == "“none” and “before”: no difference in test log-loss larger than 0.05 nats."


def test_a_margin_inside_the_noise_leaves_it_undecided():
    _, verdict = answers(rows_of(noisy(0.0)), margins=Margins(log_loss=0.001))
    assert verdict["log_loss"].outcome == "undecided"
    assert "undecided in test log-loss (first minus second, before correction: −0.0" in verdict["log_loss"].text


def test_few_seeds_prove_nothing_and_say_so():
    found, verdict = answers(rows_of(lambda arm, *_: 0.1 if arm == "before" else 5.0, seeds=4))
    assert verdict["log_loss"].outcome == "undecided"
    assert "(any difference is possible)" in verdict["log_loss"].text
    assert found.notes[0] == "4 seeds can't prove a difference between 2 arms at 5 %: take at least 6."


def test_steps_with_seeds_that_never_arrive():
    found, verdict = answers(rows_of(noisy(0.0), reached=lambda arm, _: 20 if arm == "before" else 99))
    assert [result.steps for result in found.results] == [math.inf, 20]
    assert verdict["steps"].outcome == "second"
    assert "after 20 steps against more than all, medians (p = 0.002)" in verdict["steps"].text


def test_diverged_runs_count_as_the_worst_loss_and_as_guessing():
    def status(arm, rate, seed):
        return "diverged" if arm == "none" and (rate == 1.0 or seed < 5) else "trained"

    found, _ = answers(rows_of(lambda *_: 3.0, status=status))
    none = found.results[0]
    assert none.scores["log_loss"] == (3.0,) * 10
    assert none.scores["accuracy"] == (0.1,) * 5 + (0.9,) * 5
    assert none.rates[1].diverged == 10
    assert none.scores["steps"][:5] == (math.inf,) * 5


def test_an_arm_that_never_trains_is_still_compared():
    found, verdict = answers(rows_of(noisy(0.0), status=lambda arm, *_: "diverged" if arm == "none" else "trained"))
    assert found.best.arm.name == "before"
    assert verdict["accuracy"].outcome == "second"
    assert "none" in found.results[0].arm.name
    assert found.results[0].usable == ()


def test_usable_rates_are_side_by_side():
    def accuracy(arm, rate, seed):
        return 0.9 if arm == "before" or rate in (0.1, 10.0) else 0.1

    rates = (0.1, 1.0, 10.0)
    found, verdict = answers(rows_of(noisy(0.0), accuracy=accuracy, rates=rates), rates)
    assert found.results[0].usable == (0.1,)
    assert found.results[1].usable == rates
    assert verdict["usable"].text == (
        "“before” works at more learning rates than “none”: 0.1 to 10 against 0.1 only (p = 0.002)."
    )


@pytest.mark.parametrize(
    ("flags", "run"), [([], []), ([0, 0], []), ([1, 0, 1, 1], [2, 3]), ([1, 1, 0, 1], [0, 1]), ([1, 1], [0, 1])]
)
def test_longest_run(flags, run):
    assert list(_longest_run(flags)) == run


def test_holm_runs_over_the_pairs_of_arms():
    arms = [ARMS["none"], ARMS["before"], Arm("copy")]
    rows = rows_of(noisy(0.1)) + [r | {"arm": "copy"} for r in rows_of(noisy(0.1)) if r["arm"] == "none"]
    found = analyse(rows, arms, (0.1, 1.0), chance=0.1)
    losses = [v for v in found.verdicts if v.question == "log_loss"]
    assert [v.p for v in losses] == [2 / 1024, 1.0, 2 / 1024]
    assert [v.p_holm for v in losses] == pytest.approx([6 / 1024, 1.0, 6 / 1024])


def test_an_interval_stays_among_the_possible_values():
    assert Estimate.of([0.98, 1.0, 1.0], most=1.0).high == 1.0
    assert Estimate.of([0.001, 0.0, 0.01]).low == 0.0
    assert Estimate.of([0.5]) == Estimate(0.5, -math.inf, math.inf)


def test_rounding_of_an_intervals_end_is_not_printed():
    assert words._number(4.3e-9) == "0"
    assert words._number(-0.125) == "−0.12"


def test_the_threshold_is_nine_tenths_of_the_way():
    found, _ = answers(rows_of(noisy(0.0)))
    assert found.threshold == pytest.approx(0.1 + 0.9 * 0.8)
    assert answers(rows_of(noisy(0.0)), threshold=0.5)[0].threshold == 0.5
