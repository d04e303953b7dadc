"""Tables and a picture of a benchmark, from its record."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers_badge.evaluation.benchmark import MEMORY_KINDS, PIPELINE, ratio_name
from transformers_badge.evaluation.plots import plot_engines
from transformers_badge.evaluation.timing import with_spread


ENGINE_NAMES = {
    "eager": "PyTorch",
    "compiled": "torch.compile",
    "fp32": "ONNX Runtime fp32",
    "int8": "ONNX Runtime int8",
    "bf16": "torch.compile bf16",
}
ON_GPU = {"compiled": "CUDA graphs", "bf16": "CUDA graphs bf16"}
_KINDS = {
    "full": "full model",
    "truncated": "stopping at one exit",
    "deeper": "stopping at the next exit",
    "early exit": "**early exit**",
    "parts side by side": "**early exit, parts side by side**",
    "stream": "**early exit, streamed**",
    "stream side by side": "**early exit, streamed side by side**",
    "full side by side": "full model, batches side by side",
    "nobody leaves": "every exit, nobody leaves",
}
# What contenders are compared with, and what the table says.
_BASES = {
    PIPELINE: "Times as fast as transformers' pipeline, which runs the full model in PyTorch",
    "full": "Times as fast as the full model on the same engine",
    "full side by side": "Times as fast as the full model on the same engine, its batches side by side",
    "truncated": "Times as fast as stopping everybody at one exit, the first that takes as many blocks as early exit "
    "does on average, or more",
    "deeper": "Times as fast as stopping everybody at the exit after that",
    "early exit": "Times as fast as early exit batch by batch, one part of a batch after the other",
    "stream": "Times as fast as streamed, one batch after the other",
    "ideal": "Times as fast as the ideal, where every row pays for the stages that it needs alone, at their cost per "
    "row in whole batches as they arrive",
    "nobody leaves": "Times as fast as the same engine with every exit, if nobody leaves",
}


def write_benchmark(record: dict[str, Any], folder: Path) -> list[str]:
    """Write `benchmark.json`, `benchmark.md` and `benchmark.png`; returns the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    plot_engines(record, engine_names(record), folder / "benchmark.png")
    files = {
        "benchmark.json": json.dumps(record, indent=1) + "\n",
        "benchmark.md": f"# Benchmark\n\n{render_benchmark(record)}\n\n![benchmark](benchmark.png)\n",
    }
    for name, text in files.items():
        unfinished = folder / f"{name}.unfinished"
        unfinished.write_text(text)
        os.replace(unfinished, folder / name)
    return [*files, "benchmark.png"]


def engine_names(record: dict[str, Any]) -> dict[str, str]:
    """Engines in words."""
    return ENGINE_NAMES | ON_GPU if "gpu" in record["machine"] else ENGINE_NAMES


def render_benchmark(record: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    names, by_size = engine_names(record), record["batch_sizes"]
    times, latency = {}, {}
    for name in _contenders(record):
        title, entries = title_of(name, names), by_size.values()
        times[title] = [f"{entry['milliseconds_per_row'][name]:.2f}" for entry in entries]
        if all(name in entry["latency"] for entry in entries):
            latency[title] = ["{p50:.1f} / {p99:.1f}".format(**entry["latency"][name]) for entry in entries]
    return "\n\n".join(
        [
            render_answers(record),
            f"Ratios are medians of {record['rounds']} rounds in turns, with the least and the greatest.",
            *render_ratios(record),
            "Milliseconds per row, from texts to logits:",
            _by_size(by_size, times),
            "Milliseconds of a batch, median and 99th percentile:",
            _by_size(by_size, latency),
            "Where a row's time goes with early exit, milliseconds per row:",
            *[_profile(names[engine], record["profile"][engine]) for engine in record["engines"]],
            *render_memory(record),
        ]
    )


def render_answers(record: dict[str, Any]) -> str:
    """A table of how many answers are right, by engine, and of the blocks that are saved."""
    return _table(
        ["engine", f"{record['measure']} at full depth", "early exit", "layer speedup", "one exit", "the next"],
        [
            [
                engine_names(record)[engine],
                f"{entry['full_depth']:.2f} %",
                f"{entry['early_exit']:.2f} %",
                f"{entry['layer_speedup']:.2f}x",
                f"{entry['truncated']:.2f} % (block {entry['truncated_depth']})",
                f"{entry['deeper']:.2f} % (block {entry['deeper_depth']})",
            ]
            for engine, entry in record["engines"].items()
        ],
    )


def render_ratios(record: dict[str, Any], bases: Iterable[str] = _BASES) -> list[str]:
    """Captions and tables of how many times as fast contenders are, a table for each of what they are compared with."""
    names, by_size, parts = engine_names(record), record["batch_sizes"], []
    there = next(iter(by_size.values()))["ratios"]  # the same at every batch size
    for base in bases:
        rows = {}
        for contender in _contenders(record):
            ratio = ratio_name(contender, base)
            if ratio in there:
                rows[title_of(contender, names)] = [with_spread(entry["ratios"][ratio]) for entry in by_size.values()]
        if rows:
            parts += [f"{_BASES[base]}:", _by_size(by_size, rows)]
    return parts


def render_memory(record: dict[str, Any]) -> list[str]:
    """A caption and a table of what processes need, of the engines for which it was measured."""
    memory, names = record["memory"], engine_names(record)
    engines = [engine for engine in record["engines"] if f"full, {engine}" in memory]
    if not engines:
        return []
    rows = [
        [_KINDS[kind], *[f"{memory[name]:,.0f}" if (name := f"{kind}, {e}") in memory else "" for e in engines]]
        for kind in MEMORY_KINDS
        if any(f"{kind}, {e}" in memory for e in engines)
    ]
    return [
        f"Peak memory{' of the GPU' if 'gpu' in record['machine'] else ''} of a process that does nothing else, "
        f"batch size {record['memory_batch_size']}, MiB:",
        _table(["", *[names[engine] for engine in engines]], rows),
    ]


def title_of(contender: str, names: dict[str, str] = ENGINE_NAMES) -> str:
    """A contender in words."""
    if contender == PIPELINE:
        return "transformers' pipeline, full model"
    kind, engine = contender.rsplit(", ", 1)
    return f"{_KINDS[kind]}, {names[engine]}"


def _contenders(record: dict[str, Any]) -> list[str]:
    """The names of contenders that were timed, in the order of tables."""
    there = next(iter(record["batch_sizes"].values()))["milliseconds_per_row"]  # the same at every batch size
    named = [f"{kind}, {engine}" for kind in _KINDS for engine in record["engines"]]
    return [PIPELINE, *[name for name in named if name in there]]


def _profile(name: str, by_size: dict[str, Any]) -> str:
    rows = {
        part: [f"{entry[part]:.3f}" for entry in by_size.values()]
        for part in next(iter(by_size.values()))
        if max(entry[part] for entry in by_size.values()) > 0.002  # exported stages embed together with block 1
    }
    return _by_size(by_size, rows, name)


def _by_size(sizes: Iterable[str], rows: dict[str, list[str]], title: str = "") -> str:
    return _table([title, *[f"batch {size}" for size in sizes]], [[name, *cells] for name, cells in rows.items()])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
