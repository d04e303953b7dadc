"""The report of an evaluation: a JSON record, and from it a page with tables and pictures."""

import json
import os
from pathlib import Path
from typing import Any

from transformers_badge.evaluation.curves import LOSSES
from transformers_badge.evaluation.plots import plot_criteria, plot_leaving, plot_reliability, plot_time


def write_report(record: dict[str, Any], folder: Path) -> list[str]:
    """Write `evaluation.json`, `evaluation.md` and the pictures into a folder; returns the names of the files."""
    pictures = [("criteria.png", plot_criteria), ("leaving.png", plot_leaving), ("reliability.png", plot_reliability)]
    if "timing" in record:
        pictures.insert(1, ("time.png", plot_time))
    _write(folder / "evaluation.json", json.dumps(record, indent=1) + "\n")
    for name, plot in pictures:
        plot(record, folder / name)
    _write(folder / "evaluation.md", render(record, [name for name, _ in pictures]))
    return ["evaluation.json", "evaluation.md", *[name for name, _ in pictures]]


def render(record: dict[str, Any], pictures: list[str]) -> str:
    """The page, in Markdown."""
    measure = record["measure"]
    parts = [
        "# Evaluation",
        f"{record['rows']:,} rows, {record['date']}; data `{record['data'] or 'unknown'}`, model `{record['model']}`.",
        "## The policy",
        policy_sentence(record),
        "## The exits",
        exits_table(record),
        "## The criteria",
        f"Layer speedup at which so many points of {measure} are lost, on these rows, and the area under the curve "
        f"(mean {measure} over all speedups). The thresholds are read off the curve, so this "
        "compares criteria; for a threshold to use, run `transformers-badge calibrate`.",
        criteria_table(record),
        *[f"![{name.removesuffix('.png')}]({name})" for name in pictures],
    ]
    if record.get("disagreements"):
        parts += ["## Where the first and the last exit disagree", disagreements_table(record)]
    return "\n\n".join(parts) + "\n"


def policy_sentence(record: dict[str, Any]) -> str:
    """What the checkpoint's policy does to the rows."""
    policy = record["policy"]

    def interval(entry: dict[str, Any]) -> str:
        return f"{entry['share']:.2%} ({entry['low']:.2%} to {entry['high']:.2%})"

    text = (
        f"Criterion `{policy['fields']['criterion']}`: mean exit layer {policy['mean_exit_layer']:.2f} of "
        f"{record['exit_layers'][-1]}, a layer speedup of {policy['layer_speedup']:.2f}x. "
        f"{interval(policy['disagreement'])} of the answers differ from full depth."
    )
    if "accuracy" in policy:
        text += f" Accuracy {interval(policy['accuracy'])}, at full depth {interval(policy['full_depth_accuracy'])}."
    certificate = policy["fields"].get("certificate") or {}
    return text + (f" Its certificate: {certificate['summary']}" if certificate.get("summary") else "")


def exits_table(record: dict[str, Any]) -> str:
    """A row for every exit."""
    labelled = "accuracy" in record["exits"][0]
    head = [
        "exit",
        *(["accuracy"] if labelled else []),
        "answers as the last",
        "temperature",
        "calibration error",
        "after",
    ]
    rows = [
        [
            str(entry["layer"]),
            *([f"{entry['accuracy']:.1%}"] if labelled else []),
            f"{entry['agreement']:.1%}",
            f"{entry['temperature']:.2f}",
            f"{100 * entry['reliability']['error']:.1f}",
            f"{100 * entry['reliability_after_temperature']['error']:.1f}",
        ]
        for entry in record["exits"]
    ]
    return markdown_table(head, rows)


def criteria_table(record: dict[str, Any]) -> str:
    """A row for every criterion, the largest area first."""
    head = ["criterion", *[f"lost <= {100 * loss:g}" for loss in LOSSES], "area"]
    entries = sorted(record["criteria"].items(), key=lambda entry: -entry[1]["area"])
    rows = [
        [name, *[f"{entry['speedup_at_loss'][str(loss)]:.2f}x" for loss in LOSSES], f"{100 * entry['area']:.2f}"]
        for name, entry in entries
    ]
    return markdown_table(head, rows)


def disagreements_table(record: dict[str, Any]) -> str:
    """Examples to read."""

    def cell(text: Any) -> str:
        return " / ".join([text] if isinstance(text, str) else text).replace("|", "\\|").replace("\n", " ")[:200]

    labelled = "label" in record["disagreements"][0]
    rows = [
        [
            cell(entry["text"]),
            f"{entry['first_exit']['label']} ({entry['first_exit']['score']:.2f})",
            f"{entry['last_exit']['label']} ({entry['last_exit']['score']:.2f})",
            *([entry["label"]] if labelled else []),
        ]
        for entry in record["disagreements"]
    ]
    return markdown_table(["text", "first exit", "last exit", *(["label"] if labelled else [])], rows)


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
