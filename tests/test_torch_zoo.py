"""Real networks: nothing of a norm is left, nothing else changes. All of torchvision and transformers on request, a few always.

`pytest -m zoo` runs all of them; it takes the better part of an hour, and 16 GB of memory for the largest.
"""

import copy
import hashlib
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import batchnorm as bn
from batchnorm.bench.zoo import norms_of, timm_zoo, torchvision_zoo
from batchnorm.bench.zoo_transformers import transformers_zoo

EXACT = 1e-12
FEW = {
    "torchvision": ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "ssdlite320_mobilenet_v3_large"),
    "transformers": ("ResNetBackbone", "DetrForObjectDetection", "MobileNetV2ForImageClassification", "PatchTSTModel"),
}
ZOOS = {"torchvision": torchvision_zoo, "transformers": transformers_zoo, "timm": timm_zoo}
# keep a table or lengths in float32, whatever their weights are
ONLY_FLOAT32 = ("DabDetrForObjectDetection", "FastSpeech2ConformerModel")
# where a box moves by a rounding, its mask is read from other places: errors of float64 grow by 10⁴
EXACT_WHERE_ILL = {"maskrcnn_resnet50_fpn": 1e-11, "maskrcnn_resnet50_fpn_v2": 1e-11}
LINEAR = ("convolution", "_convolution", "addmm", "mm", "linear")
BATCH_NORM = "batch_norm"


def members(*zoos, few=False):
    """Members of the zoos that are installed; `test_the_zoos_are_there` says which are not."""
    found = [member for zoo in zoos if find_spec(zoo) is not None for member in ZOOS[zoo]()]
    return [pytest.param(m, id=f"{m.zoo}-{m.name}") for m in found if not few or m.name in FEW[m.zoo]]


def call(model, example):
    if isinstance(example, tuple):
        return model(*example)
    return model(**example) if isinstance(example, dict) else model(example)


def tensors(tree):
    """The tensors of an output, from dicts, lists and the dataclasses of transformers."""
    leaves = tree_flatten(dict(tree) if hasattr(tree, "items") else tree)[0]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def outputs(model, example):
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(1)
        return [v.double().numpy() for v in tensors(call(model, example))]


def widened(example):
    return tree_map(
        lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v,
        example,
    )


def distance(expected, actual):
    """Largest difference of an output, relative to its largest value."""
    assert [v.shape for v in actual] == [v.shape for v in expected]
    worst = 0.0
    for e, a in zip(expected, actual, strict=True):
        finite = np.isfinite(e)
        np.testing.assert_array_equal(a[~finite], e[~finite])
        size = np.abs(e[finite]).max(initial=0.0)
        worst = max(worst, np.abs(a[finite] - e[finite]).max(initial=0.0) / (size or 1.0))
    return worst


def digest(model):
    """What a model holds, and which modes and classes its modules have."""
    sha = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        sha.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    sha.update(
        repr([(n, type(m).__name__, m.training, len(m._forward_hooks)) for n, m in model.named_modules()]).encode()
    )
    return sha.hexdigest()


class Operations(TorchDispatchMode):
    """What a model executes; which norm reads which linear layer's output, and who else does."""

    def __init__(self, model):
        super().__init__()
        self.names, self.reads, self.norms, self.linear, self.alive = Counter(), Counter(), {}, {}, []
        self.shared = Counter()
        self.inside = None
        for name, norm in norms_of(model).items():
            norm.register_forward_pre_hook(lambda m, args, name=name: self.enter(name, args[0]))
            norm.register_forward_hook(lambda m, args, y: self.leave())

    def enter(self, name, x):
        self.norms.setdefault(name, []).append(id(x))
        self.inside = id(x)
        self.reads[id(x)] += 1

    def leave(self):
        self.inside = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        given = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, torch.Tensor)]
        self.alive += [*given, *tensors(result)]
        self.names[name] += 1
        for v in {id(v) for v in given} - {self.inside}:
            self.reads[v] += 1
        if name in LINEAR and self.inside is None:
            weight = {"addmm": 2, "mm": 1}.get(name, 1)
            while args[weight]._base is not None:
                args = (*args[:weight], args[weight]._base, *args[weight + 1 :])
            self.linear[id(result)] = id(args[weight])
            self.shared[id(args[weight])] += 1
        return result

    def fed_by_a_linear_layer_alone(self):
        """Names of norms, each of whose inputs is a linear layer's own output that nothing else reads."""
        return {
            name
            for name, inputs in self.norms.items()
            if all(x in self.linear and self.reads[x] == 1 and self.shared[self.linear[x]] == 1 for x in inputs)
        }


def executed(model, example):
    twin = copy.deepcopy(model)
    seen = Operations(twin)
    with seen, torch.no_grad():
        for tensor in tensors(call(twin, example)):
            seen.reads[id(tensor)] += 1
    return seen


def check_folding(member):
    """Everything that is promised of a folded network, measured here and not by `fold` itself."""
    _, model, example = member()
    before = digest(model)
    seen = executed(model, example)
    result = bn.fold(model, example)
    assert digest(model) == before
    assert len(result.folded) + len(result.kept) == len(norms_of(model))
    gone = {f.layer for f in result.folded}
    assert seen.fed_by_a_linear_layer_alone() <= gone
    assert [name for name in executed(result.model, example).names if BATCH_NORM in name] == []
    assert all(m.relative <= m.bound for m in result.error.measured)
    own = distance(outputs(model, example), outputs(result.model, example))
    assert own <= max(m.bound for m in result.error.measured if m.inputs == "example")
    if member.name not in ONLY_FLOAT32:
        check_in_float64(model, example, len(gone), EXACT_WHERE_ILL.get(member.name, EXACT))


def check_in_float64(model, example, gone, allowed):
    wide, x = copy.deepcopy(model).double(), widened(example)
    expected = outputs(wide, x)
    assert any(v.size for v in expected)
    result = bn.fold(wide, x)
    assert len(result.folded) == gone
    assert distance(expected, outputs(result.model, x)) <= allowed


@pytest.mark.parametrize("zoo", ["torchvision", "transformers"])
def test_the_zoos_are_there(zoo):
    assert find_spec(zoo) is not None, (
        f"{zoo} is not installed, so that folding was not tried on its networks: pip install {zoo}"
    )


@pytest.mark.zoo
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("member", members("torchvision", "transformers"))
def test_no_normalization_is_left_in_any_network(member):
    check_folding(member)


@pytest.mark.parametrize("member", members("torchvision", "transformers", few=True))
def test_no_normalization_is_left_in_a_few_networks(member):
    check_folding(member)
