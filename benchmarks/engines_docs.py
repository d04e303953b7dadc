"""The figures in docs/engines.md, and the page of all of them, from the records of `engines.py`, `pruned.py` and
`regroup.py` in benchmarks/.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lexical_docs import span
from transformers_badge.evaluation.benchmark import PIPELINE
from transformers_badge.evaluation.benchmark_report import (
    ENGINE_NAMES,
    render_answers,
    render_benchmark,
    render_memory,
    render_ratios,
    title_of,
)
from transformers_badge.evaluation.plots import plot_engines
from transformers_badge.evaluation.timing import with_spread


MAIN = (PIPELINE, "full", "full side by side", "nobody leaves", "ideal")  # the comparisons that docs/engines.md shows


def write_engines(
    root: Path,
    records: dict[str, dict[str, Any]],
    machine: Callable[[dict[str, Any]], str],
) -> None:
    """Put the figures between the page's markers, draw the picture, and write the page of all figures.

    Args:
        root: of the repository.
        records: by name, engines, engines_one_thread, engines_amd, engines_gpu, regroup, regroup_gpu and pruned.
        machine: tells what a record was measured on.
    """
    plot_engines(records["engines"], ENGINE_NAMES, root / "docs" / "images" / "engines.png")
    parts = {
        "figures": _figures(records["engines"], machine),
        "one thread": _elsewhere(records["engines_one_thread"], machine),
        "amd": _elsewhere(records["engines_amd"], machine, MAIN[:2]),
        "gpu": _gpu(records["engines_gpu"], records["regroup_gpu"], machine),
        "pruning": _pruning(records["pruned"], machine),
        "regrouping": _regrouping(records["regroup"], machine),
    }
    path = root / "docs" / "engines.md"
    page = path.read_text()
    for name, text in parts.items():
        block = f"<!-- {name}: make docs -->\n{text}\n<!-- end of {name} -->"
        page = re.sub(rf"<!-- {name}: make docs -->.*<!-- end of {name} -->", lambda _, b=block: b, page, flags=re.S)  # type: ignore[misc]
    path.write_text(page)
    _write_all(root / "docs" / "engine-figures.md", records, machine)


def _write_all(path: Path, records: dict[str, dict[str, Any]], machine: Callable[[dict[str, Any]], str]) -> None:
    """The page of all figures."""
    titles = {
        "engines": "Two cores",
        "engines_one_thread": "One thread",
        "engines_amd": "Another processor",
        "engines_gpu": "A GPU, an earlier version",
    }
    parts = [
        "# Engines: all figures",
        "Made by `make docs` from the records in [records/](records/); `transformers-badge benchmark` makes such tables of your model and rows. [Engines](engines.md) says what was run, and what to read from it.",
    ]
    for name, title in titles.items():
        parts += [f"## {title}", f"records/{name}.json, on {machine(records[name])}.", render_benchmark(records[name])]
    path.write_text("\n\n".join(parts) + "\n")


def _figures(record: dict[str, Any], machine: Callable[[dict[str, Any]], str]) -> str:
    """What every engine is worth."""
    lost = [entry["full_depth"] - entry["early_exit"] for entry in record["engines"].values()]
    sizes = [f"{entry['rows']} rows at batch size {size}" for size, entry in record["batch_sizes"].items()]
    return "\n\n".join(
        [
            "The checkpoint of `make demo DEMO_ARGS=--full` (MiniLM, 6 blocks, exit 0, movie reviews) and its test rows in the order of arrival, padded to the longest of each batch. The threshold is, for each "
            f"engine, the fastest that is expected to lose at most {record['max_lost']:g} points of accuracy, as 2,000 other rows have it; on these {record['rows']:,} it loses {span(lost)}. {_command(record)}, on {machine(record)}, ONNX Runtime "
            f"{record['machine']['onnxruntime']}; {', '.join(sizes)} are timed, in {record['rounds']} rounds in turns: medians, with the least and the greatest.",
            "![milliseconds per row, by engine and batch size](images/engines.png)",
            render_answers(record),
            *render_ratios(record, MAIN),
            _at_the_same_time(record),
            *render_memory(record),
        ]
    )


def _at_the_same_time(record: dict[str, Any]) -> str:
    """What leaving at one exit is worth in the time of early exit: rows are shared between the two exits next to it."""
    ahead: dict[str, dict[str, float]] = {"early exit": {}, "stream": {}}
    for engine, entry in record["engines"].items():
        for size, by_size in record["batch_sizes"].items():
            milliseconds = by_size["milliseconds_per_row"]
            one, deeper = (milliseconds[f"{kind}, {engine}"] for kind in ("truncated", "deeper"))
            for kind, points in ahead.items():
                share = min(max((milliseconds[f"{kind}, {engine}"] - one) / (deeper - one), 0.0), 1.0)
                shared = entry["truncated"] + share * (entry["deeper"] - entry["truncated"])
                points[f"{title_of(f'{kind}, {engine}')} at batch size {size}"] = entry["early_exit"] - shared
    behind = [name for points in ahead.values() for name, lead in points.items() if lead <= 0]
    return (
        "Early exit takes a time between those of two exits, or less. Compared with rows that are shared between these two so that they take the same time, it is by engine and batch size "
        f"{span(ahead['early exit'].values())} points more accurate batch by batch, and {span(ahead['stream'].values())} points streamed."
        + (f" (Not more accurate: {', '.join(behind)}.)" if behind else "")
    )


def _command(record: dict[str, Any]) -> str:
    """What made a record on a processor."""
    threads = " --threads 1" if record["machine"]["threads"] == 1 else ""
    sizes = [f" --batch-size {size}" for size in record["batch_sizes"]] if len(record["batch_sizes"]) == 1 else []
    engines = [f" --engine {engine}" for engine in record["engines"]]
    return f"`python benchmarks/engines.py demo-output/checkpoint --calibration-rows 2000{threads}{''.join(sizes + engines)}`"


def _elsewhere(record: dict[str, Any], machine: Callable[[dict[str, Any]], str], bases: Iterable[str] = MAIN) -> str:
    """What early exit is worth under other conditions."""
    intro = f"{_command(record)}, on {machine(record)}, ONNX Runtime {record['machine']['onnxruntime']}; thresholds and what they lose as above."
    return "\n\n".join([intro, *render_ratios(record, bases)])


def _gpu(record: dict[str, Any], regroup: dict[str, Any], machine: Callable[[dict[str, Any]], str]) -> str:
    """What early exit is worth on a GPU."""
    entries, sizes = record["engines"].values(), record["batch_sizes"]
    speedup = regroup["wall_clock_speedup"]["regrouped over shrinking"]
    full, early = (span([entry[name] for entry in entries], 2) for name in ("full_depth", "early_exit"))
    seconds = {name: contender["median_seconds"] for name, contender in regroup["contenders"].items()}
    return (
        "The checkpoint above in the shape of BERT-base, `python benchmarks/base_shape.py demo-output/checkpoint`: 12 blocks of width 768 and exits after every second of them, which answer as the 6 blocks of MiniLM do. "
        f"`python benchmarks/engines.py bench-output/base-shape --calibration-rows 2000 --max-lost {record['max_lost']:g} --device cuda`, with {' and '.join(f'--batch-size {size}' for size in sizes)}, on {machine(record)}, CUDA {record['machine']['cuda']}: "
        f"{full} % at full depth, {early} % with early exit, {span([entry['layer_speedup'] for entry in entries], 2)}x in layers; {record['rounds']} rounds in turns.\n\n"
        + "\n\n".join([*render_ratios(record, MAIN), *render_memory(record)])
        + f"\n\nRegrouping, `python benchmarks/regroup.py --device cuda`, {regroup['rows']:,} rows in batches of {regroup['batch_size']} in PyTorch there: {seconds['regrouped']:.1f} seconds, against {seconds['shrinking']:.1f} without: {with_spread(speedup)}."
    )


def _pruning(record: dict[str, Any], machine: Callable[[dict[str, Any]], str]) -> str:
    """Whether the gains of early exit, int8 and a narrower encoder multiply."""
    lines = ["| encoder | engine | full depth | early exit | layer speedup |", "| --- | --- | --- | --- | --- |"]
    for name, by_engine in record["models"].items():
        for engine, entry in by_engine.items():
            cells = [f"{entry['full_depth']:.2f} %", f"{entry['early_exit']:.2f} %", f"{entry['layer_speedup']:.2f}x"]
            lines.append(f"| {' | '.join([name, ENGINE_NAMES[engine], *cells])} |")
    lines += ["", "Times as fast as the whole encoder at full depth on the same engine:", ""]
    lines += ["| batch size | engine | early exit | pruned | both | product of the two |", "| --- " * 6 + "|"]
    for size, entry in record["batch_sizes"].items():
        for engine in next(iter(record["models"].values())):
            exits, narrow, both = (
                entry["over_full_whole"][f"{name}, {engine}"]
                for name in ("early exit, whole", "full, pruned", "early exit, pruned")
            )
            cells = [with_spread(speedup) for speedup in (exits, narrow, both)]
            product = f"{exits['median'] * narrow['median']:.2f}x"
            lines.append(f"| {' | '.join([size, ENGINE_NAMES[engine], *cells, product])} |")
    return (
        f"`python benchmarks/pruned.py demo-output/checkpoint`: the demo's encoder, and the same with the {100 * (1 - record['keep']):.0f} % of every feed-forward layer's neurons taken out that have the smallest weights, "
        f"fine-tuned alike (`--full`); the whole one's threshold is expected to lose at most {record['max_lost']:g} points, the pruned one's saves as many layers on the same held-out rows; {record['rounds']} rounds in turns; {machine(record)}.\n\n"
        + "\n".join(lines)
    )


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
    chosen = "".join(f" --contender {name!r}" for name in record["contenders"]) if len(record["contenders"]) < 4 else ""
    return (
        f"`python benchmarks/regroup.py --rows {record['rows']} --rounds {record['rounds']}{chosen}`: a random BERT of 12 blocks of width 768 in PyTorch, {record['rows']} rows of {tokens['mean']:.0f} tokens on average and "
        f"{tokens['most']} at most, which leave evenly over the 12 exits; batch size {record['batch_size']}; {machine(record)}.\n\n"
        + "\n".join(lines)
    )
