"""A CSV file of one's own: write scikit-learn's wine data to disk and compare two arms on it.

The comparison is small, so that it ends in seconds. Five seeds can't prove anything at 5 %: take more for a real answer.
"""

import csv
import tempfile
from pathlib import Path

from sklearn.datasets import load_wine

import batchnorm as bn


def write_csv(path):
    """Write 178 wines: thirteen measurements and the cultivar, which is the label."""
    wine = load_wine()
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*wine.feature_names, "cultivar"])
        for measurements, label in zip(wine.data, wine.target, strict=True):
            table.writerow([*measurements, wine.target_names[label]])


def main():
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "wine.csv")
        write_csv(data)
        found = bn.compare(
            data,
            target="cultivar",
            arms=["none", "before"],
            learning_rates=[0.03, 0.1, 0.3],
            seeds=5,
            steps=60,
            batch_size=32,
            out=Path(folder, "comparison"),
            jobs=2,
        )
        print(found)
        print()
        for file in sorted(f for f in found.out.rglob("*") if f.is_file()):
            print(f"{file.stat().st_size:>8,} bytes  {file.relative_to(folder)}")


# Workers import this file again: without the guard each of them would start a comparison.
if __name__ == "__main__":
    main()
