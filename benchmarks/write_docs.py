"""Make the pages of measurements in docs/, the README's figures and the pictures from docs/records.

Example: python benchmarks/write_docs.py (`make docs`). To renew the records first:
    transformers-badge demo --output-dir demo-output          -> report.json as docs/records/demo.json
    transformers-badge demo --full --output-dir demo-full     -> report.json as docs/records/demo_full.json
    python benchmarks/run.py                                  -> benchmarks.json
    python benchmarks/plain_classifier.py                     -> plain_classifier.json
    python benchmarks/convert.py                              -> convert.json
    python benchmarks/bypass.py --recipe joint                -> bypass_joint.json
    python benchmarks/bypass.py --recipe frozen               -> bypass_frozen.json
    python benchmarks/criteria.py                             -> criteria.json
    python benchmarks/guarantee.py                            -> guarantee.json
    python benchmarks/lexical.py                              -> lexical.json
    python benchmarks/lexical.py --time demo-output/checkpoint -> lexical_time.json
    python benchmarks/lexical.py --cost                       -> lexical_cost.json
    python benchmarks/fit_lexical.py                          -> lexical_fit.json
    python benchmarks/engines.py demo-output/checkpoint       -> engines/benchmark.json as engines.json
        (of demo --full, with --calibration-rows 2000 and every --engine, bf16 too, on a processor with AMX;
        with --threads 1 --batch-size 1 --engine eager --engine fp32 --engine int8 as engines_one_thread.json;
        on a processor without AMX as engines_amd.json)
    python benchmarks/base_shape.py demo-output/checkpoint, and engines.py bench-output/base-shape
        --calibration-rows 2000 --max-lost 0.5 --device cuda --batch-size 1 --batch-size 32 --batch-size 256
        --rounds 3                                            -> engines/benchmark.json as engines_gpu.json
    python benchmarks/pruned.py demo-output/checkpoint        -> pruned.json (of demo --full)
    python benchmarks/regroup.py --rounds 2 --contender regrouped --contender shrinking -> regroup.json
        (with --device cuda besides as regroup_gpu.json)
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from criteria_docs import write_criteria
from engines_docs import write_engines
from lexical_docs import write_exit_zero
from transformers_badge.evaluation.plots import plot_tradeoff
from transformers_badge.evaluation.timing import with_spread


ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "records"


def load(name: str) -> dict[str, Any]:
    """A record by name."""
    record: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text())
    return record


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.1f} %"


def machine(record: dict[str, Any]) -> str:
    """What a record was measured on."""
    what = record["machine"]
    threads = f"{what['threads']} thread{'s' if what['threads'] > 1 else ''}"
    gpu = f"{what['gpu']} with " if "gpu" in what else ""
    return f"{gpu}{what['processor']}, {threads}, torch {what['torch']}, transformers {what['transformers']}"


def how_given(timing: dict[str, Any]) -> str:
    """How a pipeline was given the texts that were timed."""
    size = timing["batch_size"]
    return "one text at a time" if size == 1 else f"a list of {timing['rows']} texts, batches of {size}"


def demo_table(record: dict[str, Any], plain: dict[str, Any] | None) -> list[str]:
    """Accuracy and speed of a demo run."""
    early, full, blocks = record["early_exit"], record["full_depth"], record["exit_layers"][-1]
    lines = ["| | test accuracy | layer speedup |", "|---|---|---|"]
    if plain is not None:
        lines.append(f"| the encoder fine-tuned plainly, one exit | {percent(plain['accuracy'])} | 1.0x |")
    lines.append(f"| multi-exit model at full depth | {percent(full['accuracy'])} | 1.0x |")
    lines.append(f"| **early exit** | **{percent(early['accuracy'])}** | **{early['layer_speedup']:.2f}x** |")
    for layer, accuracy in zip(record["exit_layers"][:-1], record["exit_accuracy"], strict=False):
        where = f"after block {layer}" if layer else "before the first block"
        speedup = f"{blocks / layer:.2f}x" if layer else ""
        lines.append(f"| everyone leaves {where} | {percent(accuracy)} | {speedup} |")
    return lines


def timing_table(record: dict[str, Any]) -> list[str]:
    """Seconds of a demo run."""
    lines = [
        "| batch size | rows | layer speedup of these rows | wall clock, over full depth | over `BertForSequenceClassification` | pipeline over its pipeline | the same, if nobody leaves |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in record["timing"]:
        lines.append(
            f"| {entry['batch_size']} | {entry['rows']} | {entry['layer_speedup']:.2f}x | "
            f"{with_spread(entry['speedup_over_full_depth'])} | {with_spread(entry['speedup_over_transformers'])} | {with_spread(entry['speedup_of_pipeline'])} | {with_spread(entry['speedup_if_nobody_leaves'])} |"
        )
    return lines


def write_readme(demo: dict[str, Any], convert: dict[str, Any]) -> None:
    """Put the figures between the README's markers."""
    rows, converted, lost = demo["rows"], convert["default"], demo["early_exit"]["accuracy_lost"]
    shown = demo["policy"]["certificate"]
    text = "\n".join(
        [
            f"MiniLM (6 blocks) on movie-review polarity, `make demo`: {rows['train']} rows to train, "
            f"{rows['calibration']} to choose the threshold, {rows['test']} to test.",
            "",
            *demo_table(demo, None)[:4],
            "",
            f"Asked was to lose at most {100 * demo['max_accuracy_drop']:g} point, with 95 % confidence. Lost were {100 * shown['observed']['error_increase']:z.2f} points on the {shown['rows']:,} rows that show it, and "
            f"{100 * lost['observed']:z.2f} on the test rows, by which it is between {100 * lost['low']:z.2f} and {100 * lost['high']:z.2f} on rows like them, with the same confidence.",
            f"Mean exit layer {demo['early_exit']['mean_exit_layer']:.2f} of {demo['exit_layers'][-1]}. In seconds, over transformers' own with the same encoder:",
            "",
            "| | pipeline over pipeline | the same, if nobody leaves | `early_exit_predict` over the plain model |",
            "|---|---|---|---|",
            *[
                f"| {how_given(entry)} | **{with_spread(entry['speedup_of_pipeline'])}** | "
                f"{with_spread(entry['speedup_if_nobody_leaves'])} | {with_spread(entry['speedup_over_transformers'])} |"
                for entry in demo["timing"]
            ],
            "",
            "(Our pipeline sorts a list by length and tokenizes many texts at once: that is what it gains if nobody leaves.)",
            "",
            f"A plainly fine-tuned MiniLM, converted in {converted['minutes']} minutes with {convert['rows']['texts']} texts and no labels, leaves {100 * converted['early_exit']['agreement']:.1f} % of its answers on "
            f"{convert['rows']['test']} other texts unchanged: {converted['early_exit']['layer_speedup']:.2f}x in layers, and in seconds, over the pipeline that it had:",
            "",
            "| | pipeline over pipeline | the same, if nobody leaves | exported to ONNX Runtime, fp32 |",
            "|---|---|---|---|",
            *[
                f"| {how_given(entry)} | **{with_spread(entry['pipeline'])}** | {with_spread(entry['if_nobody_leaves'])} | **{with_spread(entry['onnxruntime_fp32'])}** |"
                for entry in converted["over_the_sources_pipeline"]
            ],
            "",
            "(What of the last column is the engine's own doing, [Engines](docs/engines.md#what-it-is-worth) tells for the first model.)",
            "",
            f"Measured on {machine(demo)}; [all figures](docs/benchmarks.md).",
        ]
    )
    path = ROOT / "README.md"
    readme = path.read_text()
    block = f"<!-- figures: make docs -->\n{text}\n<!-- end of figures -->"
    path.write_text(
        re.sub(r"<!-- figures: make docs -->.*<!-- end of figures -->", lambda _: block, readme, flags=re.S)
    )


def write_benchmarks(
    full: dict[str, Any], demo: dict[str, Any], plain: dict[str, Any], bench: dict[str, Any], convert: dict[str, Any]
) -> None:
    """docs/benchmarks.md."""
    overhead, flops = bench["overhead"]["ours_over_transformers"], bench["added_flops_share"]
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
    lines.append(f"| FLOPs of bypasses and exits, over the encoder's | {100 * flops:.2f} % |")
    lines += ["", *convert_section(convert)]
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(lines) + "\n")


def between_blocks(entry: dict[str, Any], name: str) -> float:
    """Mean of something over the exits behind the first block and before the last exit."""
    values = [value for layer, value in zip(entry["exit_layers"], entry[name], strict=True) if layer > 0]
    return float(np.mean(values[:-1]))


def convert_section(record: dict[str, Any]) -> list[str]:
    """A converted classifier, and the same one with bare exits."""
    rows, kept = record["rows"], record["keeping_states"]
    ways = [record[name] for name in ("default", "texts_alone", "bare")]
    lines = [
        "## A converted classifier",
        "",
        f"`python benchmarks/convert.py`: MiniLM fine-tuned plainly on {rows['source']} movie reviews (the source), converted on {rows['texts']} others as plain "
        f"texts, tested on {rows['test']} more; one seed. On {machine(record)}.",
        "",
        "| | default | no texts made up | bare exits: mean pooling, no bypass |",
        "|---|---|---|---|",
    ]
    for title, value in (
        ("minutes", lambda entry: str(entry["minutes"])),
        ("rows that taught, made up", lambda entry: f"{entry['taught_on']['taught']}, {entry['taught_on']['made_up']}"),
        ("last exit equals the source to the bit", lambda entry: "yes" if entry["last_exit_equals_source"] else "no"),
        ("answers that agree with the source", lambda entry: f"{100 * entry['early_exit']['agreement']:.2f} %"),
        ("layer speedup", lambda entry: f"{entry['early_exit']['layer_speedup']:.2f}x"),
        (
            "in seconds over the source, batches of 32, on 256 of the kept texts",
            lambda entry: with_spread(entry["wall_clock_speedup"]),
        ),
        *[
            (
                f"{title}, {how}",
                lambda entry, place=place, name=name: with_spread(entry["over_the_sources_pipeline"][place][name]),
            )
            for place, how in enumerate(map(how_given, record["default"]["over_the_sources_pipeline"]))
            for name, title in (
                ("pipeline", "its pipeline over the source's"),
                ("if_nobody_leaves", "the same, if nobody leaves"),
                ("onnxruntime_fp32", "exported to ONNX Runtime, fp32, over the source's pipeline"),
            )
        ],
        ("accuracy at full depth, as the source", lambda entry: percent(entry["source_accuracy"])),
        ("accuracy of early exit", lambda entry: percent(entry["early_exit"]["accuracy"])),
        ("mean accuracy of the exits between blocks", lambda entry: percent(between_blocks(entry, "exit_accuracy"))),
        ("their mean agreement with the source", lambda entry: percent(between_blocks(entry, "exit_agreement"))),
    ):
        lines.append(f"| {title} | {' | '.join(map(value, ways))} |")
    for layer in ways[0]["exit_layers"][:-1]:
        cells = []
        for entry in ways:
            known = dict(
                zip(
                    entry["exit_layers"], zip(entry["exit_accuracy"], entry["exit_agreement"], strict=True), strict=True
                )
            )
            cells.append(", ".join(map(percent, known.get(layer, ()))))
        lines.append(f"| exit {layer}: accuracy, agreement | {' | '.join(cells)} |")
    faster = kept["through_the_encoder"] / (kept["one_pass"] + kept["on_kept_states"])
    lines += [
        "",
        f"Bare exits read nothing but pooled rows that training does not change, so `convert` trains them on states kept from one pass through the encoder: {kept['one_pass']:.0f} s for "
        f"the pass and {kept['on_kept_states']:.0f} s for {kept['epochs']} epochs, against {kept['through_the_encoder']:.0f} s through the encoder, {faster:.1f} times faster. Attention pooling reads "
        "every token, so that this is not open to the default.",
    ]
    return lines


READINGS = {
    "block_input": "tokens of the block's input",
    "block_output": "tokens of the block's output",
    "pooled": "the exit's pooled row",
}


def bypass_runs(recipe: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The record of a recipe, and one entry per variant and data set with the values of its seeds."""
    record = load(f"bypass_{recipe}")
    found: dict[str, dict[str, Any]] = {}
    for run in record["runs"]:
        key = json.dumps([run["variant"], run["data"]])
        entry = found.setdefault(
            key,
            {
                **run["variant"],
                "data": run["data"],
                "inner": [],
                "last": [],
                "agreement": [],
                "speedup": [],
                "changed": [],
            },
        )
        entry["inner"].append(100 * float(np.mean(run["exit_accuracy"][:-1])))
        entry["last"].append(100 * run["exit_accuracy"][-1])
        if "exit_agreement" in run:
            entry["agreement"].append(100 * float(np.mean(run["exit_agreement"][:-1])))
            entry["speedup"].append(run["layer_speedup"])
            entry["changed"].append(100 * run["disagreement"])
    return record, list(found.values())


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def bypass_table(
    entries: list[dict[str, Any]], names: list[str], columns: dict[str, Callable[[dict[str, Any]], str]]
) -> list[str]:
    """A row per variant, and for every data set these columns."""
    lines = [
        "| pooling | the bypass reads | width | "
        + " | ".join(f"{data}: {' | '.join(columns)}" for data in names)
        + " |",
        "|---|---|---|" + "---|" * len(columns) * len(names),
    ]
    by_variant: dict[tuple[str, str, int], dict[str, Any]] = {}
    for entry in entries:
        by_variant.setdefault((entry["pooling"], entry["bypass_reads"], entry["bypass_size"]), {})[entry["data"]] = (
            entry
        )
    for (pooling, reads, size), sets in by_variant.items():
        values = " | ".join(value(sets[data]) for data in names for value in columns.values())
        lines.append(f"| {pooling} | {READINGS[reads] if size else 'none'} | {size} | {values} |")
    return lines


def write_bypass() -> None:
    """docs/bypass.md and its picture."""
    joint, frozen = bypass_runs("joint"), bypass_runs("frozen")
    rows = joint[0]["rows"]
    lines = [
        "# Whether the bypass earns its place",
        "",
        "Made by `make docs` from records/bypass_joint.json and records/bypass_frozen.json; `benchmarks/bypass.py` makes those. MiniLM, 6 blocks; "
        "mean and standard deviation over the seeds; the inner exits are 1 to 5. Subsets, to fit two cores: "
        + "; ".join(
            f"{data}: joint on {n['joint']} labelled rows for one epoch, frozen with a source fine-tuned on {n['source']} rows and {n['texts']} texts without labels, "
            f"{n['test']} test rows"
            for data, n in rows.items()
        )
        + ".",
        "",
        "![Accuracy of the inner exits by bypass](images/bypass.png)",
        "",
        f"## A converted classifier, frozen ({machine(frozen[0])})",
        "",
        "The threshold (entropy, at most 1 % of answers changed) is chosen on one half of the test rows and used on the other; in this record by the forerunner of `calibrate`, which held the upper end of a Wilson interval to the budget. "
        f"{' and '.join(str(n['test'] // 2) for n in rows.values())} rows are few for that: among 350 not one answer may change, so that a single answer that an exit is sure of and "
        "the last is not decides.",
        "",
        *bypass_table(
            frozen[1],
            list(rows),
            {
                "inner exits, % right": lambda entry: spread(entry["inner"]),
                "% as the last exit": lambda entry: spread(entry["agreement"]),
                "layer speedup": lambda entry: f"{spread(entry['speedup'], 2)}x",
                "% changed": lambda entry: spread(entry["changed"]),
            },
        ),
        "",
        f"## Joint training ({machine(joint[0])})",
        "",
        *bypass_table(
            joint[1],
            list(rows),
            {
                "inner exits, % right": lambda entry: spread(entry["inner"]),
                "last exit": lambda entry: spread(entry["last"]),
            },
        ),
        "",
        "What follows from it, and what became the default: [How the model works](model.md#why-the-bypass-is-what-it-is).",
    ]
    (ROOT / "docs" / "bypass.md").write_text("\n".join(lines) + "\n")
    plot_bypass(joint[1], frozen[1], list(rows), ROOT / "docs" / "images" / "bypass.png")


def plot_bypass(joint: list[dict[str, Any]], frozen: list[dict[str, Any]], names: list[str], path: Path) -> None:
    """Accuracy of the inner exits against the width of the bypass, one panel per recipe and data set."""
    figure = Figure(figsize=(9.0, 6.2), dpi=150, layout="constrained")
    panels = figure.subplots(2, len(names), sharex=True)
    colors = {"block_input": "#9a9a9a", "block_output": "#1f5fa8", "pooled": "#d1495b"}
    for row, (recipe, entries) in zip(panels, (("frozen", frozen), ("joint", joint)), strict=True):
        for axes, data in zip(row, names, strict=True):
            for pooling, style in (("attention", "o-"), ("mean", "s--")):
                chosen = [e for e in entries if e["data"] == data and e["pooling"] == pooling]
                for shift, (reads, color) in enumerate(colors.items()):
                    line = [e for e in chosen if e["bypass_reads"] == reads or e["bypass_size"] == 0]
                    line = sorted(line, key=lambda entry: entry["bypass_size"])
                    if line:
                        axes.errorbar(
                            [(0, 32, 64, 128).index(e["bypass_size"]) + 0.06 * (shift - 1) for e in line],
                            [np.mean(e["inner"]) for e in line],
                            [np.std(e["inner"], ddof=1) for e in line],
                            fmt=style, color=color, ms=4, lw=1.4, capsize=2,
                            label=f"{READINGS[reads]}, {pooling} pooling",
                        )  # fmt: skip
            axes.set_title(f"{recipe}: {data}", fontsize=10)
            axes.set_xticks(range(4), ["none", "32", "64", "128"])
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.25)
    for axes in panels[1]:
        axes.set_xlabel("width of the bypass")
    for row in panels:
        row[0].set_ylabel("inner exits, % right")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Write everything."""
    names = ("demo_full", "demo", "plain_classifier", "benchmarks", "convert")
    full, demo, plain, bench, convert = map(load, names)
    write_readme(demo, convert)
    write_benchmarks(full, demo, plain, bench, convert)
    write_bypass()
    criteria = load("criteria")
    write_criteria(ROOT, criteria, load("guarantee"), machine(criteria))
    write_exit_zero(
        ROOT, load("lexical"), load("lexical_time"), load("lexical_cost"), load("lexical_fit"), demo, machine
    )
    runs = ("engines", "engines_one_thread", "engines_amd", "engines_gpu", "regroup", "regroup_gpu", "pruned")
    write_engines(ROOT, {name: load(name) for name in runs}, machine)
    plot_tradeoff(demo, ROOT / "docs" / "images" / "tradeoff.png")


if __name__ == "__main__":
    main()
