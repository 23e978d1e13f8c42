"""The contests: a wrong contestant is refused, noise is called noise, every value is kept, every part runs."""

import json
import re

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from batchnorm import cli
from batchnorm.bench import contestants as taking_part
from batchnorm.bench import layer, memory, network
from batchnorm.bench.contest import LEAST, LONGEST, Absent, Contestant, hold
from batchnorm.bench.contestants import COMPILED, COPIES, JAX, NEW, OURS, TORCH, contestants
from batchnorm.bench.memory import LESS
from batchnorm.bench.networks import allowed_errors, answers, batch_of, errors_of
from batchnorm.bench.oracle import Case, run_layer, torchs
from batchnorm.bench.plots import dots, lines
from batchnorm.bench.ratios import Ratio, is_unstable, mean_speed_up, noise, speed_up
from batchnorm.bench.saved import asked_bytes, saved_bytes
from batchnorm.bench.scores import busy, in_words, left_out, means, scores
from batchnorm.errors import MissingDependencyError


class Toy:
    """A contestant that counts its steps."""

    def __init__(self, error=0.0):
        self.steps, self.error = 0, error

    def __call__(self):
        def step():
            self.steps += 1

        return Contestant(step, lambda: {"y": (self.error, 0.1)})


def missing():
    raise Absent("it is not installed")


def broken():
    raise ValueError("it\nbroke")


def test_the_wrong_the_broken_and_the_missing_are_not_timed_but_listed():
    wrong, nothing, right = Toy(0.2), Toy(float("nan")), Toy()
    makers = {"torch": Toy(), "wrong": wrong, "nan": nothing, "broken": broken, "missing": missing, "right": right}
    row = hold({"group": "toys", "shape": [2]}, makers, seconds=0)
    assert (wrong.steps, nothing.steps) == (0, 0)
    assert right.steps > LEAST
    assert list(row["seconds"]) == ["torch", "torch again", "right"]
    assert set(row["refused"]) == {"wrong", "nan", "broken"}
    assert row["refused"]["wrong"] == "error of y is 2.0e-01, allowed 1.0e-01"
    assert row["refused"]["broken"] == "ValueError: it"
    told = scores([row])
    assert told.count("refused") == 3
    assert told.count("not measured") == 1
    assert "not measured: missing: it is not installed" in left_out([row])
    assert "refused: wrong, toys, 2: error of y is 2.0e-01, allowed 1.0e-01" in left_out([row])
    assert means([row], "wrong") == "wrong: not timed"


def test_nobody_is_timed_beside_a_first_contestant_that_is_wrong():
    ours = Toy()
    row = hold({"group": "toys", "shape": [2]}, {"torch": Toy(1.0), "ours": ours}, seconds=0)
    assert (ours.steps, row["seconds"]) == (0, {})
    assert "refused" in scores([row])


def test_everyone_takes_turns_and_every_value_is_kept():
    said = []

    def named(name):
        return lambda: Contestant(lambda: said.append(name), dict)

    row = hold({"group": "toys", "shape": [2]}, {"a": named("a"), "b": named("b")}, seconds=0, warm=1)
    assert said[:3] == ["a", "a", "b"]
    # so short a step is taken several times in a row
    turns = [said[i : i + LONGEST] for i in range(3, len(said), LONGEST)]
    assert all(len(set(turn)) == 1 for turn in turns)
    rounds = [[turn[0] for turn in turns[i : i + 3]] for i in range(0, len(turns), 3)]
    assert len(rounds) == LEAST
    assert {tuple(sorted(one)) for one in rounds} == {("a", "a", "b")}
    # nobody always comes after the same one
    assert len({one.index("b") for one in rounds}) > 1
    assert row["in_a_row"] == LONGEST
    for kind, count in (("warm_up", 1), ("seconds", LEAST), ("processor", LEAST)):
        assert {len(values) for values in row[kind].values()} == {count}


def row_of(ours, again=(1.0,), rounds=40, **facts):
    """A row whose first contestant takes 1 in every round; the others take what is given, over and over."""
    times = {"torch": (1.0,), "torch again": again, "ours": ours}
    seconds = {name: [one[i % len(one)] for i in range(rounds)] for name, one in times.items()}
    base = {"group": "toys", "shape": [2], "first": "torch", "errors": {}, "refused": {}, "absent": {}}
    return {**base, "seconds": seconds, **facts}


@pytest.mark.parametrize(
    ("ours", "again", "rounds", "said"),
    [
        ((0.5,), (1.0,), 40, "2.00× [2.00, 2.00]"),
        ((2.0,), (1.0,), 40, "0.50× [0.50, 0.50]"),
        # both ways
        ((0.8, 1.3), (1.0,), 40, "no difference [0.77, 1.25]"),
        ((0.8, 0.8, 1.3), (1.0,), 8, "no difference [0.77, 1.25]"),
        # as large as that of torch beside itself, in either direction
        ((0.95,), (0.94,), 40, "no difference [1.05, 1.05]"),
        ((0.95,), (1.07,), 40, "no difference [1.05, 1.05]"),
        ((1.06,), (0.94, 1.0), 40, "no difference [0.94, 0.94]"),
        # less than memory that lies elsewhere does
        ((0.995,), (1.0,), 40, "no difference [1.01, 1.01]"),
        # too few rounds for an interval
        ((0.5,), (1.0,), 5, "no difference [2.00, 2.00]"),
    ],
)
def test_noise_is_no_speed_up(ours, again, rounds, said):
    row = row_of(ours, again, rounds)
    assert in_words(row, "ours") == said
    assert mean_speed_up([row, row], "ours")[0].is_noise(noise(row)) == ("no difference" in said)


def test_what_differs_from_itself_is_unstable():
    assert is_unstable(row_of((0.5,), (1.06,)))
    assert not is_unstable(row_of((0.5,), (1.04,)))
    assert scores([row_of((0.5,), (1.06,))]).count("unstable") == 1
    assert "unstable" not in scores([row_of((0.5,), (1.04,))])


def test_a_busy_machine_is_told():
    assert busy({"load": (0.3, 0, 0), "cores": 2}) == busy({"load": None, "cores": 2}) == []
    assert "a load of 1.5 on 2 cores" in busy({"load": (1.5, 0, 0), "cores": 2})[0]


def test_a_mean_says_what_is_missing():
    rows = [row_of((0.5,)), row_of((0.125,)), row_of((0.5,), refused={"ours": "wrong"})]
    del rows[2]["seconds"]["ours"]
    assert means(rows, "ours") == ("ours: geometric mean 4.00× [4.00, 4.00], smallest 2.00 at 2; 1 of 3 not timed")


def test_ratios_are_of_the_same_round():
    found = Ratio.of([2.0, 40.0, 3.0, 8.0], [1.0, 10.0, 3.0, 1.0])
    assert found.value == 3.0
    assert found.quartiles == (1.75, 5.0)
    assert found.interval == (1.0, 8.0)
    row = row_of((0.5, 0.25))
    assert speed_up(row, "ours").interval == (2.0, 4.0)


def test_pictures_are_drawn_of_what_was_timed(tmp_path):
    rows = [row_of((0.5,), elements=2), row_of((0.25,), shape=[8, 3], elements=24)]
    del rows[1]["seconds"]["ours"]
    said = dots(rows, ("ours",), "torch", "times torch's", tmp_path / "new" / "dots.svg").read_text()
    assert all(word in said for word in ("8×3", "toys", "ours", "times torch"))
    assert "elements" in lines(rows, ("torch", "ours"), tmp_path / "lines.svg").read_text()
    dots([], ("ours",), "torch", "nobody was timed", tmp_path / "none.svg")


# -- one layer -----------------------------------------------------------------------------------------------------------


class Slightly(nn.Module):
    """Torch's layer, with something else in the place of one thing."""

    def __init__(self, case, wrong):
        super().__init__()
        self.inner, self.wrong = torchs(case), wrong

    def forward(self, x):
        norm = self.inner[0]
        if self.wrong == "dx":
            return Bent.apply(self.inner(x))
        if self.wrong == "running variance":
            norm.momentum = 0.1001
        else:
            norm.eps = 1e-4
        return self.inner(x)


class Bent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * (1 + 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "hardswish", None])
def test_all_who_are_right_are_admitted_in_every_layout(dtype, activation):
    case = Case.drawn((8, 5, 6, 6), dtype, activation)
    for one in (case, case.laid_out("channels-last")):
        row = hold({"group": "toys", "shape": [2]}, contestants(one), seconds=0, warm=0)
        assert row["refused"] == row["absent"] == {}
        assert list(row["seconds"]) == [TORCH, f"{TORCH} again", OURS, COPIES, NEW]
        assert set(row["errors"][OURS]) == {"y", "dx", "dγ", "dβ", "running mean", "running variance"}


@pytest.mark.parametrize("wrong", ["eps", "dx", "running variance"])
def test_a_layer_that_is_slightly_wrong_is_refused(wrong):
    case = Case.drawn((8, 5, 6, 6), torch.float32, "relu")
    found = case.errors(run_layer(case, Slightly(case, wrong)))
    over = {what for what, (error, allowed) in found.items() if error > allowed}
    assert {"eps": "y"}.get(wrong, wrong) in over
    assert not {
        what for what, (error, allowed) in case.errors(run_layer(case, torchs(case))).items() if error > allowed
    }


def test_evaluation_is_judged_by_its_output():
    case = Case.drawn((8, 5), torch.float32, training=False)
    row = hold({"group": "toys", "shape": [2]}, contestants(case), seconds=0)
    assert set(row["errors"][OURS]) == {"y"}
    assert not row["refused"]


def test_where_the_slope_jumps_no_gradient_comes_in():
    case = Case.drawn((64, 4, 32, 32), torch.float32, "relu")
    near = case.expected["y"].abs() < 1e-3
    assert 0 < int((case.dy == 0).sum()) < 0.01 * case.dy.numel()
    assert not case.dy[near & (case.expected["y"] > 0)].any()


def test_who_needs_what_is_not_there_says_so(monkeypatch):
    case = Case.drawn((8, 5, 6, 6), torch.float32, "relu")
    monkeypatch.setattr(taking_part.shutil, "which", lambda name: None)
    monkeypatch.setattr(taking_part, "find_spec", lambda name: None)
    row = hold({"group": "toys", "shape": [2]}, contestants(case, slow=True), seconds=0)
    assert row["absent"][JAX] == "jax is not installed"
    assert "there is no" in row["absent"][COMPILED]


# -- the parts -----------------------------------------------------------------------------------------------------------


def kept(folder, name):
    return json.loads((folder / name).read_text())


def test_op_measures_and_keeps_every_value(tmp_path, capsys):
    assert cli.main(["bench", "op", "--quick", "--out", str(tmp_path)]) == 0
    facts, said = kept(tmp_path, "op.json"), capsys.readouterr().out
    assert facts["threads"] == torch.get_num_threads()
    assert facts["machine"]["packages"]["numba"]
    assert len(facts["rows"]) == 2 * 3
    for row in facts["rows"]:
        assert row["refused"] == {}
        assert {len(values) for values in row["seconds"].values()} >= {len(row["processor"][OURS])}
        assert len(row["seconds"][OURS]) >= LEAST
    assert JAX in facts["rows"][0]["seconds"]
    assert re.search(r"ours: geometric mean .* smallest [\d.]+ at 32×", said)
    assert "raw values and picture" in said
    assert "BN + ReLU, float32, channels-last" in (tmp_path / "op.svg").read_text()


def test_layer_measures_every_group_and_the_errors(tmp_path):
    said = str(layer.run(tmp_path, quick=True))
    facts = kept(tmp_path, "layer.json")
    found = {row["group"] for row in facts["rows"]}
    assert found == {what[0] for what in layer._cases()}
    assert all(row["refused"] == {} for row in facts["rows"])
    assert not any(row["wrong"] for row in facts["exactness"])
    assert all(group in said for group in found)
    assert "largest time per element to smallest: torch 1.00" in said
    assert (tmp_path / "layer_sizes.svg").stat().st_size > 1000


def test_layer_measures_what_it_says():
    shapes = [what[1] for what in layer._cases()]
    assert {(128, 300), (128, 784), (256, 1024), (512, 512), (1024, 1024), (2048, 2048), (4096, 4096)} <= set(shapes)
    sizes = [torch.Size(what[1]).numel() for what in layer._cases() if what[0] == layer.SIZE]
    assert [round(size, -len(str(size)) + 2) for size in sizes] == [10**5, 10**6, 10**7, 10**8]


def small():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(6, 1000))


@pytest.fixture
def _small_networks(monkeypatch):
    for module in (network, memory):
        monkeypatch.setattr(module, "built", lambda name: small())


@pytest.mark.usefixtures("_small_networks")
def test_network_holds_the_answers_in_both_dtypes(tmp_path):
    said = str(network.run(tmp_path, quick=True))
    (row,) = kept(tmp_path, "network.json")["rows"]
    assert row["refused"] == {}
    of = ("loss", "gradients", "statistics")
    assert set(row["errors"][OURS]) == {*of, *(f"{what}, float64" for what in of)}
    assert len(row["seconds"]["torch again"]) == LEAST
    assert "resnet18" in said


@pytest.mark.usefixtures("_small_networks")
def test_a_network_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    def other(model, x):
        model = network.copy.deepcopy(model)
        model[1].eps = 1.1e-5
        return model

    monkeypatch.setattr(network, "fused", other)
    said = str(network.run(tmp_path, quick=True))
    assert "refused: ours, training step, resnet18" in said
    assert "ours: not timed" in said


def test_answers_agree_with_themselves_and_dropout_is_the_same():
    model, batch = small(), batch_of(4, 12)
    right = answers(model, batch)
    allowed = allowed_errors(model, batch, right)
    assert all(error == 0 for error, _ in errors_of(answers(model, batch), right, allowed).values())
    assert all(0 < bound < 1e-4 for bound in allowed.values())


def test_networks_need_torchvision(monkeypatch):
    def gone():
        raise ImportError("no")

    monkeypatch.setattr("batchnorm.bench.networks.open_torchvision", gone)
    with pytest.raises(MissingDependencyError, match="torchvision, which is not installed"):
        network.run(None, quick=True)


class Halved(saved_tensors_hooks):
    """Keeps images as half as many bytes, exactly or not."""

    exact = True

    def __init__(self):
        super().__init__(self.pack, self.unpack)

    def pack(self, tensor):
        if tensor.ndim != 4 or (tensor.requires_grad and tensor.is_leaf):
            return tensor
        kept = tensor.half()
        return (kept, tensor if self.exact else None)

    def unpack(self, packed):
        if isinstance(packed, torch.Tensor):
            return packed
        return packed[0].float() if packed[1] is None else packed[1]


def test_bytes_are_counted_whoever_holds_them():
    model, batch = small(), batch_of(4, 12)
    plain = saved_bytes(model, batch)
    # what autograd is asked to save is what is alive
    assert plain == asked_bytes(model, batch)

    class Lossy(Halved):
        exact = False

    assert saved_bytes(model, batch, Halved) > plain
    assert 0.4 * plain < saved_bytes(model, batch, Lossy) < 0.8 * plain


@pytest.mark.usefixtures("_small_networks")
@pytest.mark.parametrize("exact", [True, False, None])
def test_memory_asks_for_the_same_bits(tmp_path, monkeypatch, exact):
    class Context(Halved):
        pass

    Context.exact = exact
    found = None if exact is None else Context
    monkeypatch.setattr("batchnorm.torch.recompute", found, raising=False)
    said = str(memory.run(tmp_path, quick=True))
    (row,) = kept(tmp_path, "memory.json")["rows"]
    assert (LESS in row["seconds"]) == (exact is True)
    assert (LESS in row["refused"]) == (exact is False)
    assert (LESS in row["absent"]) == (exact is None)
    assert row["saved"][TORCH] == row["asked"][TORCH] > 0
    assert row["peak"][TORCH] >= row["saved"][TORCH]
    assert "Kept, MiB" in said
    if exact is False:
        assert "error of gradients" in row["refused"][LESS]
