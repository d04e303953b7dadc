"""The figures in docs/engines.md, from the records of `benchmarks/engines.py` and `benchmarks/regroup.py`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers_badge.evaluation.benchmark_report import ENGINE_NAMES, render_benchmark
from transformers_badge.evaluation.plots import plot_engines


def write_engines(
    root: Path,
    record: dict[str, Any],
    regroup: dict[str, Any],
    machine: Callable[[dict[str, Any]], str],
) -> None:
    """Put the figures between the page's markers, and draw the picture."""
    plot_engines(record, ENGINE_NAMES, root / "docs" / "images" / "engines.png")
    figures = "\n\n".join(
        [
            "The checkpoint of `make demo DEMO_ARGS=--full` (MiniLM, 6 blocks, exit 0, movie reviews) and its test rows in the order of arrival, padded to the longest of each batch. The threshold is, for each "
            f"engine, the fastest that is expected to lose at most {record['max_lost']:g} points of accuracy, as 2,000 other rows have it. `python benchmarks/engines.py demo-output/checkpoint --calibration-rows 2000` on {machine(record)}, ONNX Runtime "
            f"{record['machine']['onnxruntime']}; "
            + ", ".join(
                f"{entry['rows']} rows" + f" at batch size {size}" for size, entry in record["batch_sizes"].items()
            )
            + " are timed.",
            "![milliseconds per row, by engine and batch size](images/engines.png)",
            render_benchmark(record),
        ]
    )
    path = root / "docs" / "engines.md"
    page = path.read_text()
    for name, text in (("figures", figures), ("regrouping", _regrouping(regroup, machine))):
        block = f"<!-- {name}: make docs -->\n{text}\n<!-- end of {name} -->"
        page = re.sub(rf"<!-- {name}: make docs -->.*<!-- end of {name} -->", lambda _, b=block: b, page, flags=re.S)  # type: ignore[misc]
    path.write_text(page)


def _regrouping(record: dict[str, Any], machine: Callable[[dict[str, Any]], str]) -> str:
    """What regrouping is worth by itself."""
    tokens, lines = record["tokens_per_row"], ["| | seconds | block runs | positions computed over those needed |"]
    lines.append("| --- | --- | --- | --- |")
    for name, entry in record["contenders"].items():
        lines.append(
            f"| {name} | {entry['median_seconds']:.1f} | {entry['block_runs']} | {entry['cells_over_needed']:.2f} |"
        )
    lines += ["", "| rows per second | median | least | greatest |", "| --- | --- | --- | --- |"]
    for name, speedup in record["wall_clock_speedup"].items():
        lines.append(f"| {name} | {speedup['median']:.2f}x | {speedup['min']:.2f}x | {speedup['max']:.2f}x |")
    return (
        f"`python benchmarks/regroup.py --rows {record['rows']} --rounds {record['rounds']}`: a random BERT of 12 blocks of width 768 in PyTorch, {record['rows']} rows of {tokens['mean']:.0f} tokens on average and "
        f"{tokens['most']} at most, which leave evenly over the 12 exits; batch size {record['batch_size']}; {machine(record)}.\n\n"
        + "\n".join(lines)
    )
