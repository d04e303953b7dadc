"""The figures in docs/engines.md, from the record of `benchmarks/engines.py`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


CONTENDERS = {
    "pipeline": "transformers' pipeline, full model",
    "full eager": "transformers, full model",
    "full fp32": "ONNX Runtime fp32, full model",
    "full int8": "ONNX Runtime int8, full model",
    "ours eager": "**early exit, eager**",
    "ours fp32": "**early exit, ONNX Runtime fp32**",
    "ours int8": "**early exit, ONNX Runtime int8**",
    "ours eager, nobody leaves": "every exit, nobody leaves, eager",
    "ours fp32, nobody leaves": "every exit, nobody leaves, ONNX Runtime fp32",
    "ours int8, nobody leaves": "every exit, nobody leaves, ONNX Runtime int8",
}
COMPARISONS = {
    "ours fp32 over pipeline": "early exit fp32 over transformers' pipeline",
    "ours int8 over pipeline": "early exit int8 over transformers' pipeline",
    "ours eager over full eager": "early exit eager over transformers",
    "ours fp32 over full fp32": "early exit fp32 over ONNX Runtime fp32",
    "ours int8 over full int8": "early exit int8 over ONNX Runtime int8",
    "ours fp32 over ours fp32, nobody leaves": "early exit fp32 over itself, nobody leaving",
    "ours int8 over ours int8, nobody leaves": "early exit int8 over itself, nobody leaving",
    "nobody leaves, eager, over full": "time of nobody leaving over the full model, eager",
    "nobody leaves, fp32, over full": "the same, ONNX Runtime fp32",
    "nobody leaves, int8, over full": "the same, ONNX Runtime int8",
}


def write_engines(root: Path, record: dict[str, Any], machine: Callable[[dict[str, Any]], str]) -> None:
    """Put the figures between the page's markers."""
    by_size = record["batch_sizes"]
    head = [f"| | {' | '.join(f'batch {size}' for size in by_size)} |", "|---" * (len(by_size) + 1) + "|"]
    milliseconds = [
        f"| {title} | {' | '.join(format(entry['milliseconds_per_row'][name], '.2f') for entry in by_size.values())} |"
        for name, title in CONTENDERS.items()
    ]
    ratios = [
        f"| {title} | {' | '.join(_ratio(entry['speedups'][name]) for entry in by_size.values())} |"
        for name, title in COMPARISONS.items()
    ]
    accuracy = [
        f"| {name} | {entry['full_depth']:.2f} % | {entry['early_exit']:.2f} % | {entry['layer_speedup']:.2f}x |"
        for name, entry in record["accuracy"].items()
    ]
    text = "\n".join(
        [
            "The checkpoint of `make demo` (MiniLM, 6 blocks, exit 0, movie reviews), its test rows in the order of arrival, padded to the longest of each batch. The int8 export has a threshold of its "
            "own, calibrated for the same demand on the same rows.",
            "",
            "| engine | accuracy at full depth | with early exit | layer speedup |",
            "|---|---|---|---|",
            *accuracy,
            "",
            "Milliseconds per row, from texts to logits:",
            "",
            *head,
            *milliseconds,
            "",
            f"Ratios, medians of {record['rounds']} rounds in turns, with the least and the greatest:",
            "",
            *head,
            *ratios,
            "",
            f"`python benchmarks/engines.py demo-output/checkpoint` on {machine(record)}, ONNX Runtime {record['machine']['onnxruntime']}.",
        ]
    )
    path, block = root / "docs" / "engines.md", f"<!-- figures: make docs -->\n{text}\n<!-- end of figures -->"
    pattern = r"<!-- figures: make docs -->.*<!-- end of figures -->"
    path.write_text(re.sub(pattern, lambda _: block, path.read_text(), flags=re.S))


def _ratio(values: dict[str, float]) -> str:
    return f"{values['median']:.2f}x ({values['min']:.2f} to {values['max']:.2f})"
