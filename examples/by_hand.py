"""Batch normalization by hand, in ten lines of NumPy, against the definition and against PyTorch."""

import numpy as np
import torch

from batchnorm import functional

EPS, DECAY = 1e-5, 0.9

Arrays = tuple[np.ndarray, ...]


def forward(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> Arrays:
    """Normalize each column of ``x``; return what the backward needs too."""
    mean = x.mean(axis=0)
    variance = ((x - mean) ** 2).mean(axis=0)  # divided by N: the biased variance
    inv = 1 / np.sqrt(variance + EPS)
    x_hat = (x - mean) * inv
    return gamma * x_hat + beta, mean, variance, inv, x_hat


def backward(dy: np.ndarray, gamma: np.ndarray, inv: np.ndarray, x_hat: np.ndarray) -> Arrays:
    """Return the gradients with respect to x, γ and β; mean and variance depend on x too."""
    dx_hat = dy * gamma
    dx = inv * (dx_hat - dx_hat.mean(axis=0) - x_hat * (dx_hat * x_hat).mean(axis=0))
    return dx, (dy * x_hat).sum(axis=0), dy.sum(axis=0)


def by_torch(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
    """Do the same with ``torch.nn.BatchNorm1d`` and autograd."""
    layer = torch.nn.BatchNorm1d(x.shape[1], eps=EPS, momentum=1 - DECAY, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(gamma))
        layer.bias.copy_(torch.from_numpy(beta))
    inputs = torch.from_numpy(x).requires_grad_()
    y = layer(inputs)
    y.backward(torch.from_numpy(dy))
    values = [y.detach(), inputs.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]
    return [v.numpy() for v in values]


def main() -> None:
    rng = np.random.default_rng(0)
    x, dy = rng.normal(3.0, 2.0, (8, 3)), rng.normal(size=(8, 3))
    gamma, beta = rng.normal(size=3), rng.normal(size=3)

    y, mean, variance, inv, x_hat = forward(x, gamma, beta)
    running_mean = DECAY * np.zeros(3) + (1 - DECAY) * mean
    running_var = DECAY * np.ones(3) + (1 - DECAY) * variance * 8 / 7  # torch keeps the unbiased one
    hand = [y, *backward(dy, gamma, inv, x_hat), running_mean, running_var]

    step = functional.batch_norm_train(x, gamma, beta, np.zeros(3), np.ones(3), eps=EPS, decay=DECAY)
    gradients = functional.batch_norm_backward(dy, x, gamma, eps=EPS)
    definition = [step.y, *gradients, step.running_mean, step.running_var]

    names = ["output", "gradient of x", "gradient of γ", "gradient of β", "running mean", "running variance"]
    print(f"{'largest difference to by hand':<30}{'definition':>12}{'torch':>12}")
    for name, mine, defined, torchs in zip(names, hand, definition, by_torch(x, gamma, beta, dy), strict=True):
        differences = [abs(mine - other).max() for other in (defined, torchs)]
        if max(differences) > 1e-12:
            raise SystemExit(f"{name} differs by {max(differences):.1e}")
        print(f"{name:<30}{differences[0]:>12.1e}{differences[1]:>12.1e}")


if __name__ == "__main__":
    main()
