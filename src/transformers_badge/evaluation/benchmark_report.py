"""Tables and a picture of a benchmark, from its record."""

import json
import os
from pathlib import Path
from typing import Any

from transformers_badge.evaluation.benchmark import MEMORY_KINDS, PIPELINE
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
    names = engine_names(record)
    sizes, engines = list(record["batch_sizes"]), list(record["engines"])
    by_size = record["batch_sizes"].values()
    there = next(iter(by_size))  # the same at every batch size
    named = [f"{kind}, {engine}" for kind in _KINDS for engine in engines]
    contenders = [PIPELINE, *[name for name in named if name in there["milliseconds_per_row"]]]
    return "\n\n".join(
        [
            _table(
                [
                    "engine",
                    f"{record['measure']} at full depth",
                    "with early exit",
                    "layer speedup",
                    "at one exit",
                    "at the next",
                ],
                [
                    [
                        names[engine],
                        f"{entry['full_depth']:.2f} %",
                        f"{entry['early_exit']:.2f} %",
                        f"{entry['layer_speedup']:.2f}x",
                        f"{entry['truncated']:.2f} % (block {entry['truncated_depth']})",
                        f"{entry['deeper']:.2f} % (block {entry['deeper_depth']})",
                    ]
                    for engine, entry in record["engines"].items()
                ],
            ),
            "Milliseconds per row, from texts to logits:",
            _by_size(
                sizes,
                {
                    title_of(name, names): [f"{entry['milliseconds_per_row'][name]:.2f}" for entry in by_size]
                    for name in contenders
                },
            ),
            f"Ratios, medians of {record['rounds']} rounds in turns, with the least and the greatest. In the ideal "
            "time every row pays for the stages that it needs alone, at their cost per row in whole batches as they "
            "arrive:",
            _by_size(
                sizes,
                {title: [with_spread(entry["ratios"][name]) for entry in by_size] for name, title in ratios(record)},
            ),
            "Milliseconds of a batch, median and 99th percentile:",
            _by_size(
                sizes,
                {
                    title_of(name, names): [
                        "{p50:.1f} / {p99:.1f}".format(**entry["latency"][name]) for entry in by_size
                    ]
                    for name in contenders
                    if name in there["latency"]
                },
            ),
            "Where a row's time goes with early exit, milliseconds per row:",
            *[_profile(names[engine], record["profile"][engine]) for engine in engines],
            *render_memory(record),
        ]
    )


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


def ratios(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Names of ratios in a record, and what they are in words."""
    found = []
    for engine in record["engines"]:
        name, ours = engine_names(record)[engine], f"early exit, {engine}"
        parts, parallel = f"parts side by side, {engine}", f"stream side by side, {engine}"
        found += [
            (f"{ours} over {PIPELINE}", f"early exit {name} over transformers' pipeline"),
            (f"{ours} over full, {engine}", f"early exit {name} over the full model there"),
            (f"{ours} over truncated, {engine}", f"early exit {name} over stopping at one exit there"),
            (f"{ours} over deeper, {engine}", f"early exit {name} over stopping at the next exit there"),
            (f"{parts} over {PIPELINE}", f"parts side by side {name} over transformers' pipeline"),
            (f"{parts} over full, {engine}", f"parts side by side {name} over the full model there"),
            (f"{parts} over {ours}", f"parts side by side over one after the other, {name}"),
            (f"stream, {engine} over {PIPELINE}", f"streamed {name} over transformers' pipeline"),
            (f"stream, {engine} over full, {engine}", f"streamed {name} over the full model there"),
            (f"stream, {engine} over {ours}", f"streamed over batch by batch, {name}"),
            (f"{parallel} over {PIPELINE}", f"side by side {name} over transformers' pipeline"),
            (f"{parallel} over full, {engine}", f"side by side {name} over the full model there"),
            (f"{parallel} over full side by side, {engine}", f"side by side {name} over the full model side by side"),
            (f"{parallel} over stream, {engine}", f"side by side over streamed by itself, {name}"),
            (f"cost of exits, {engine}", f"time of nobody leaving over the full model, {name}"),
            (f"arrives, {ours}", f"ideal time over time, {name}"),
            (f"arrives, {parts}", f"ideal time over time, parts side by side, {name}"),
            (f"arrives, stream, {engine}", f"ideal time over time, streamed, {name}"),
        ]
    there = next(iter(record["batch_sizes"].values()))["ratios"]
    return [(name, title) for name, title in found if name in there]  # older records have fewer


def _profile(name: str, by_size: dict[str, Any]) -> str:
    rows = {
        part: [f"{entry[part]:.3f}" for entry in by_size.values()]
        for part in next(iter(by_size.values()))
        if max(entry[part] for entry in by_size.values()) > 0.002  # exported stages embed together with block 1
    }
    return _by_size(list(by_size), rows, name)


def _by_size(sizes: list[str], rows: dict[str, list[str]], title: str = "") -> str:
    return _table([title, *[f"batch {size}" for size in sizes]], [[name, *cells] for name, cells in rows.items()])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
