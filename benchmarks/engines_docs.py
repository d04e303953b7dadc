"""The figures in docs/engines.md, from the record of `benchmarks/engines.py`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers_badge.evaluation.benchmark_report import ENGINE_NAMES, render_benchmark
from transformers_badge.evaluation.plots import plot_engines


def write_engines(root: Path, record: dict[str, Any], machine: Callable[[dict[str, Any]], str]) -> None:
    """Put the figures between the page's markers, and draw the picture."""
    plot_engines(record, ENGINE_NAMES, root / "docs" / "images" / "engines.png")
    text = "\n\n".join(
        [
            "The checkpoint of `make demo` (MiniLM, 6 blocks, exit 0, movie reviews) and its test rows in the order of arrival, padded to the longest of each batch, with thresholds chosen for each engine "
            f"on other rows to lose at most {record['max_lost']:g} points there. `python benchmarks/engines.py demo-output/checkpoint` on {machine(record)}, ONNX Runtime "
            f"{record['machine']['onnxruntime']}; {record['timed_rows']} timed rows, a fourth of them at batch size 1.",
            "![milliseconds per row, by engine and batch size](images/engines.png)",
            render_benchmark(record),
        ]
    )
    path, block = root / "docs" / "engines.md", f"<!-- figures: make docs -->\n{text}\n<!-- end of figures -->"
    pattern = r"<!-- figures: make docs -->.*<!-- end of figures -->"
    path.write_text(re.sub(pattern, lambda _: block, path.read_text(), flags=re.S))
