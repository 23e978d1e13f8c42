import pytest
import torch
from torch import nn

from batchnorm.errors import OptionError
from batchnorm.lab.arms import ARMS, Arm
from batchnorm.lab.networks import NETWORKS, Residual, Standardize, build, factory_of, hidden
from batchnorm.torch import BatchNorm1d, BatchNorm2d

X = torch.rand(20, 1, 8, 8)


def built(model="mlp", arm="none", seed=0, x=X):
    arm = arm if isinstance(arm, Arm) else ARMS[arm]
    return build(model, tuple(x.shape[1:]), 10, arm, seed, x)


def linear_weights(network):
    return [m.weight for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_starts_from_the_same_weights(model, arm):
    for ours, theirs in zip(linear_weights(built(model, arm)), linear_weights(built(model)), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(linear_weights(built(model, arm, seed=1))[0], linear_weights(built(model))[0])


def test_building_leaves_the_global_generator_as_it_was():
    before = torch.get_rng_state()
    built("resmlp", "before")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arm", "kinds"),
    [
        ("none", ["Linear", "ReLU"]),
        ("before", ["Linear", "BatchNorm1d", "ReLU"]),
        ("after", ["Linear", "ReLU", "BatchNorm1d"]),
        ("layer", ["Linear", "LayerNorm", "ReLU"]),
        ("group", ["Linear", "GroupNorm", "ReLU"]),
    ],
)
def test_the_order_of_an_arm(arm, kinds):
    layers = hidden(ARMS[arm], nn.Linear(4, 10), 10)
    assert [type(layer).__name__ for layer in layers] == kinds


def test_the_norms_are_ours():
    assert any(isinstance(m, BatchNorm1d) for m in built("mlp", "before").modules())
    assert any(isinstance(m, BatchNorm2d) for m in built("cnn", "before").modules())


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("arm", [*ARMS, Arm("silu", activation="silu"), Arm("g", norm="group", place="after")], ids=str)
def test_every_network_runs_and_gives_a_gradient_to_every_parameter(model, arm):
    network = built(model, arm)
    logits = network(X)
    assert logits.shape == (20, 10)
    logits.backward(torch.randn_like(logits))
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_resmlp_adds():
    block = Residual(nn.Linear(3, 3))
    x = torch.randn(2, 3)
    assert torch.equal(block(x), x + block.branch(x))


def test_standardize_measures_features_and_channels():
    x = torch.randn(50, 4) * 3 + 7
    x[:, 2] = 5.0
    y = Standardize.of(x)(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.std(0, unbiased=False), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    images = torch.randn(6, 2, 3, 3) + 4
    torch.testing.assert_close(Standardize.of(images)(images).mean((0, 2, 3)), torch.zeros(2), atol=1e-6, rtol=0)


@pytest.fixture
def factories(elsewhere):
    (elsewhere / "mine.py").write_text(
        "from torch import nn\n"
        "def good(shape, classes, arm): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
        "def breaks(shape, classes, arm): raise RuntimeError('no such width')\n"
        "def wrong(shape, classes, arm): return 3\n"
        "def zero(): return nn.Identity()\n"
    )


@pytest.mark.usefixtures("factories")
def test_a_factory_of_the_current_folder():
    assert built("mine:good")(X).shape == (20, 10)


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("mine:breaks", "arm='none'.* must return a torch module, but raised RuntimeError: no such width"),
        ("mine:wrong", "mine:wrong must return a torch.nn.Module, it returned a int"),
        ("mine:zero", r"mine:zero must take the arguments \(shape, classes, arm\)"),
        ("mine:absent", "model 'mine:absent' can't be loaded"),
        ("absent:good", "model 'absent:good' can't be loaded: No module named 'absent'"),
        ("vgg", "unknown model 'vgg': choose from mlp, cnn, resmlp, or name your own"),
    ],
)
def test_a_wrong_model_is_named(model, message):
    with pytest.raises(OptionError, match=message):
        built(model)


def test_cnn_needs_images():
    with pytest.raises(OptionError, match=r"images of at least 4×4 pixels, the data has rows of shape \(7,\)"):
        built("cnn", x=torch.rand(20, 7))
    assert factory_of("cnn") is NETWORKS["cnn"]
