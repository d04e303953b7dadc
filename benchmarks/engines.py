"""Early exit on every engine, on the checkpoint of the demo and its movie reviews: `transformers-badge benchmark`.

Thresholds are chosen, for each engine, from the rows before the demo's test rows: the fastest that is expected to lose
at most 0.8 points (`--max-lost`). What it loses on the test rows is in the record.

Example: python benchmarks/engines.py demo-output/checkpoint --output-dir bench-output
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

from transformers import AutoConfig

from transformers_badge.demo.sources import read_reviews


# Points of accuracy. A threshold that is chosen to lose so many loses a tenth of a point more on other rows
# (docs/criteria.md), and this one is to lose a point at most.
MOST_LOST = 0.8
TEST_ROWS = 1768  # as in the demo: the last of the data set; those before them are for the threshold


def main() -> None:
    """Write the rows as files, and run the command on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output-dir", type=Path, default=Path("bench-output"))
    parser.add_argument("--calibration-rows", type=int, default=2800, help="2000 for a model of demo --full")
    arguments, more = parser.parse_known_args()
    names = AutoConfig.from_pretrained(arguments.checkpoint).id2label
    texts, labels = read_reviews("movies")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, rows in {
        "test": slice(-TEST_ROWS, None),
        "calibration": slice(-TEST_ROWS - arguments.calibration_rows, -TEST_ROWS),
    }.items():
        files[name] = arguments.output_dir / f"movies-{name}.csv"
        with files[name].open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([text, names[int(label)]] for text, label in zip(texts[rows], labels[rows], strict=True))
    command = [sys.executable, "-m", "transformers_badge", "benchmark", str(arguments.checkpoint)]
    given = {
        "--data": files["test"],
        "--calibrate": files["calibration"],
        "--max-lost": MOST_LOST,
        "--output-dir": arguments.output_dir / "engines",
    }
    options = [str(part) for option in given.items() for part in option]
    sys.exit(subprocess.run([*command, *options, *more], check=False).returncode)


if __name__ == "__main__":
    main()
