"""Make docs/benchmarks.md, the README's figures and the picture from the records in docs/records.

Example: python benchmarks/write_docs.py (`make docs`). To renew the records first:
    transformers-badge demo --output-dir demo-output          -> report.json as docs/records/demo.json
    transformers-badge demo --full --output-dir demo-full     -> report.json as docs/records/demo_full.json
    python benchmarks/run.py                                  -> benchmarks.json
    python benchmarks/plain_classifier.py                     -> plain_classifier.json
"""

import json
import re
from pathlib import Path
from typing import Any

from transformers_badge.evaluation.plots import plot_tradeoff


ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "records"


def load(name: str) -> dict[str, Any]:
    """A record by name."""
    record: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text())
    return record


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.1f} %"


def ratio(values: dict[str, float]) -> str:
    """A median with its spread."""
    return f"{values['median']:.2f}x ({values['min']:.2f} to {values['max']:.2f})"


def machine(record: dict[str, Any]) -> str:
    """What a record was measured on."""
    what = record["machine"]
    return f"{what['processor']}, {what['threads']} threads, torch {what['torch']}, transformers {what['transformers']}"


def demo_table(record: dict[str, Any], plain: dict[str, Any] | None) -> list[str]:
    """Accuracy and speed of a demo run."""
    early, full, blocks = record["early_exit"], record["full_depth"], record["exit_layers"][-1]
    lines = ["| | test accuracy | layer speedup |", "|---|---|---|"]
    if plain is not None:
        lines.append(f"| the encoder fine-tuned plainly, one exit | {percent(plain['accuracy'])} | 1.0x |")
    lines.append(f"| multi-exit model at full depth | {percent(full['accuracy'])} | 1.0x |")
    lines.append(f"| **early exit** | **{percent(early['accuracy'])}** | **{early['layer_speedup']:.2f}x** |")
    for layer, accuracy in zip(record["exit_layers"][:-1], record["exit_accuracy"], strict=False):
        lines.append(f"| everyone leaves after block {layer} | {percent(accuracy)} | {blocks / layer:.2f}x |")
    return lines


def timing_table(record: dict[str, Any]) -> list[str]:
    """Seconds of a demo run."""
    lines = [
        "| batch size | rows | layer speedup of these rows | wall clock, over full depth | over `BertForSequenceClassification` |",
        "|---|---|---|---|---|",
    ]
    for entry in record["timing"]:
        lines.append(
            f"| {entry['batch_size']} | {entry['rows']} | {entry['layer_speedup']:.2f}x | "
            f"{ratio(entry['speedup_over_full_depth'])} | {ratio(entry['speedup_over_transformers'])} |"
        )
    return lines


def write_readme(full: dict[str, Any], plain: dict[str, Any]) -> None:
    """Put the figures between the README's markers."""
    rows = full["rows"]
    text = "\n".join(
        [
            f"MiniLM (6 blocks) on movie-review polarity, `make demo DEMO_ARGS=--full`: {rows['train']} rows to train, "
            f"{rows['calibration']} to choose the threshold, {rows['test']} to test.",
            "",
            *demo_table(full, plain)[:5],
            "",
            "In seconds: "
            + "; ".join(
                f"at batch size {entry['batch_size']} {ratio(entry['speedup_over_full_depth'])} over full depth of the same model, "
                f"{ratio(entry['speedup_over_transformers'])} over transformers' own `BertForSequenceClassification`"
                for entry in full["timing"]
            )
            + f". Mean exit layer {full['early_exit']['mean_exit_layer']:.2f} of {full['exit_layers'][-1]}.",
            f"Measured on {machine(full)}; [all figures](docs/benchmarks.md).",
        ]
    )
    path = ROOT / "README.md"
    readme = path.read_text()
    block = f"<!-- figures: make docs -->\n{text}\n<!-- end of figures -->"
    path.write_text(
        re.sub(r"<!-- figures: make docs -->.*<!-- end of figures -->", lambda _: block, readme, flags=re.S)
    )


def write_benchmarks(full: dict[str, Any], demo: dict[str, Any], plain: dict[str, Any], bench: dict[str, Any]) -> None:
    """docs/benchmarks.md."""
    overhead, flops = bench["overhead"]["ours_over_transformers"], bench["bypass_flops_share"]
    lines = [
        "# Benchmarks",
        "",
        "Made by `make docs` from the records in [records/](records/); `benchmarks/write_docs.py` says how to renew those.",
        "Contenders take turns within one run; ratios are medians over the rounds, with the smallest and the largest.",
        "",
        "## The demo in full",
        "",
        f"`transformers-badge demo --full`: MiniLM, 6 blocks, movie-review polarity, {full['rows']['train']} training rows, "
        f"{full['rows']['test']} test rows, 3 epochs, one seed. On {machine(full)}; {full['minutes']} minutes.",
        "",
        *demo_table(full, plain),
        "",
        *timing_table(full),
        "",
        "The plainly fine-tuned classifier had the same rows, epochs, batch size and learning rate (`benchmarks/plain_classifier.py`).",
        "",
        "## The demo by default",
        "",
        f"`transformers-badge demo`: {demo['rows']['train']} training rows, 1 epoch. On {machine(demo)}; {demo['minutes']} minutes.",
        "",
        *demo_table(demo, None),
        "",
        *timing_table(demo),
        "",
        "## What the exits cost, and what compaction gets of the layers it saves",
        "",
        f"`make bench`: a random BERT, 12 blocks, hidden 768, 32 rows of 64 tokens, {bench['rounds']} rounds. On {machine(bench)}.",
        "",
        "| what | figure |",
        "|---|---|",
        f"| full depth with every exit computed, over `BertForSequenceClassification`, time | {overhead['median']:.3f} "
        f"({overhead['min']:.3f} to {overhead['max']:.3f}) |",
    ]
    for entry in bench["compaction"]:
        share = entry["share_of_layer_speedup"]
        lines.append(
            f"| rows leaving evenly over 12 exits, batch {entry['batch_size']}: wall-clock over layer speedup "
            f"({entry['layer_speedup']:.2f}x) | {share['median']:.3f} ({share['min']:.3f} to {share['max']:.3f}) |"
        )
    lines.append(f"| FLOPs of the bypasses, over the encoder's | {100 * flops:.2f} % |")
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Write everything."""
    full, demo, plain, bench = map(load, ("demo_full", "demo", "plain_classifier", "benchmarks"))
    write_readme(full, plain)
    write_benchmarks(full, demo, plain, bench)
    plot_tradeoff(full, ROOT / "docs" / "images" / "tradeoff.png")


if __name__ == "__main__":
    main()
