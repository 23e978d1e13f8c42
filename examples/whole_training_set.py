"""Running statistics against the statistics of the whole training set, merged from batches of uneven size."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import batchnorm as bn
from batchnorm.torch import BatchNorm1d

BATCH = 16


def train(x: torch.Tensor, y: torch.Tensor) -> nn.Sequential:
    """Train a small network with one batch norm layer for three epochs."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 50, bias=False), BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(3):
        for rows in torch.randperm(len(y)).split(BATCH):
            if len(rows) < BATCH:
                continue
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    return network.eval()


def score(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Return log-loss and accuracy in evaluation mode."""
    with torch.no_grad():
        logits = network(x)
    return nn.functional.cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()


def main() -> None:
    torch.set_num_threads(1)  # faster than several for a network this small
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x / 16, y, test_size=0.4, random_state=0, stratify=y)
    x_train, x_test = (torch.from_numpy(v.astype(np.float32)) for v in (x_train, x_test))
    y_train, y_test = torch.from_numpy(y_train), torch.from_numpy(y_test)
    network = train(x_train, y_train)
    linear, norm = network[0], network[1]

    # The input of the layer, measured in batches of 1 to 300 rows: each batch becomes Moments, and Moments are merged.
    cuts = [1, 8, 40, 100, 101, 400, 700, 1000]
    with torch.no_grad():
        values = linear(x_train)
    parts = [bn.Moments.of(part) for part in torch.tensor_split(values, cuts)]
    at_once = bn.Moments.of(values)
    whole = bn.Moments.empty().merge(*parts)
    print(f"{len(parts)} uneven batches of {', '.join(str(part.count) for part in parts)} rows, {whole.count} in all")
    off = ((whole.variance - at_once.variance).abs() / at_once.variance).max().item()
    print(f"merged against measured at once, variance:   {off:.0e} apart, relative")
    average = torch.stack([part.variance for part in parts]).mean(0)
    lost = (1 - average / at_once.variance).mean().item()
    print(f"the average of the batches' variances:       {100 * lost:.0f} % too small")
    drift = ((norm.running_mean - whole.mean).abs() / whole.variance.sqrt()).mean().item()
    print(f"running mean against the training set's:     {drift:.2f} standard deviations apart, mean of the units")

    before = score(network, x_test, y_test)
    norm.running_mean.copy_(whole.mean)
    norm.running_var.copy_(whole.unbiased_variance)
    after = score(network, x_test, y_test)
    print(f"running statistics:       test log-loss {before[0]:.4f}, accuracy {100 * before[1]:.2f} %")
    print(f"the whole training set's: test log-loss {after[0]:.4f}, accuracy {100 * after[1]:.2f} %")


if __name__ == "__main__":
    main()
