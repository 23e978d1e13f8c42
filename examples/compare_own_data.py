"""A CSV file of one's own: write scikit-learn's wine data to disk and compare two arms on it.

The comparison is small, so that it ends in seconds: six seeds are the fewest that can prove a difference between two arms at
5 %. Take more steps, more seeds and a wider grid for an answer that counts.
"""

import csv
import tempfile
from pathlib import Path

from sklearn.datasets import load_wine

import batchnorm as bn


def write_csv(path: Path) -> None:
    """Write 178 wines: thirteen measurements and the cultivar, which is the label."""
    wine = load_wine()
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*wine.feature_names, "cultivar"])
        for measurements, label in zip(wine.data, wine.target, strict=True):
            table.writerow([*measurements, wine.target_names[label]])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "wine.csv")
        write_csv(data)
        found = bn.compare(
            data,
            target="cultivar",
            arms=["none", "before"],
            learning_rates=[0.1, 0.3, 1.0],
            seeds=6,
            steps=40,
            batch_size=32,
            out=Path(folder, "comparison"),
            jobs=1,
        )
        print(found)
        print()
        for file in sorted(f for f in found.out.rglob("*") if f.is_file()):
            print(f"{file.stat().st_size:>8,} bytes  {file.relative_to(folder)}")


if __name__ == "__main__":
    main()
