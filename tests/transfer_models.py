"""Models of one architecture in torch and in Keras, with random numbers in every place."""

import keras
import numpy as np
import torch
from keras import layers as kl
from torch import nn


def randomized(model, seed=0):
    """Give a torch model or a Keras model random weights, biases, γ, β and statistics, so that none is as it starts."""
    rng = np.random.default_rng(seed)
    if isinstance(model, keras.Model):
        for variable in model.weights:
            name, shape = variable.path.rsplit("/", 1)[-1], tuple(variable.shape)
            variable.assign(_random(rng, shape, "variance" in name, "mean" in name or len(shape) == 1))
        return model
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                values = _random(rng, tuple(tensor.shape), name.endswith("var"), tensor.ndim == 1)
                tensor.copy_(torch.from_numpy(values))
    return model.eval()


def _random(rng, shape, positive, vector):
    if positive:
        return rng.uniform(0.5, 2, shape).astype(np.float32)
    fan = 1 if vector else max(1, int(np.prod(shape)) // max(shape[0], shape[-1]))
    scale = 0.5 if vector else fan**-0.5
    return (scale * rng.standard_normal(shape) + 0.7 * vector).astype(np.float32)


class Flattened(nn.Module):
    """Convolutions of every kind, then Flatten, batch normalization of what is flat, and dense layers."""

    def __init__(self, eps=1e-5, norm=nn.BatchNorm2d):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False), norm(6, eps=eps), nn.ReLU(),
            nn.Conv2d(6, 12, 3, groups=6), norm(12, eps=eps), nn.ReLU(),
            nn.ConvTranspose2d(12, 4, 2, stride=2), norm(4, eps=eps), nn.MaxPool2d(2),
        )  # fmt: skip
        self.flat = nn.BatchNorm1d(4 * 6 * 4, eps=eps)
        self.head = nn.Sequential(nn.Linear(4 * 6 * 4, 10), nn.BatchNorm1d(10, eps=eps), nn.ReLU(), nn.Linear(10, 5))

    def forward(self, x):
        return self.head(torch.relu(self.flat(self.body(x).flatten(1))))


def flattened_keras(norm=kl.BatchNormalization, epsilon=1e-3, momentum=0.9):
    """The same for channels last, 8×6 places."""
    about = {"epsilon": epsilon, "momentum": momentum}
    return keras.Sequential(
        [
            keras.Input((8, 6, 3)),
            kl.Conv2D(6, 3, padding="same", use_bias=False), norm(**about), kl.ReLU(),
            kl.DepthwiseConv2D(3, depth_multiplier=2), norm(**about), kl.ReLU(),
            kl.Conv2DTranspose(4, 2, strides=2), norm(**about), kl.MaxPooling2D(2),
            kl.Flatten(), norm(**about), kl.ReLU(),
            kl.Dense(10), norm(**about), kl.ReLU(), kl.Dense(5),
        ]
    )  # fmt: skip


def resnet18_keras(size=64, classes=10, norm=kl.BatchNormalization):
    """ResNet-18 as torchvision computes it, with the padding of torch."""

    def conv(x, filters, kernel, stride=1):
        if kernel > 1:
            x = kl.ZeroPadding2D(kernel // 2)(x)
        return kl.Conv2D(filters, kernel, strides=stride, use_bias=False)(x)

    def block(x, filters, stride):
        y = kl.ReLU()(norm(epsilon=1e-5)(conv(x, filters, 3, stride)))
        y = norm(epsilon=1e-5)(conv(y, filters, 3))
        if stride > 1:
            x = norm(epsilon=1e-5)(conv(x, filters, 1, stride))
        return kl.ReLU()(kl.Add()([x, y]))

    inputs = keras.Input((size, size, 3))
    x = kl.ReLU()(norm(epsilon=1e-5)(conv(inputs, 64, 7, 2)))
    # a zero is never the largest behind a ReLU, or equals it
    x = kl.MaxPooling2D(3, strides=2)(kl.ZeroPadding2D(1)(x))
    for filters, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        x = block(x, filters, stride)
    return keras.Model(inputs, kl.Dense(classes)(kl.GlobalAveragePooling2D()(x)))
