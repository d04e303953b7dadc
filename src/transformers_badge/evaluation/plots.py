"""Pictures, made from records."""

from pathlib import Path
from typing import Any

import numpy as np


# Criteria that are drawn with their band; the others are thin lines.
HIGHLIGHTED = {"learned": "#d1495b", "entropy": "#1f5fa8", "dge": "#2a9d6f", "fixed_depth": "#555555"}
_OTHERS = ["#b8a1d9", "#e3a857", "#7fb7d4", "#c9c35f", "#d59bb4", "#8fbf9f", "#a38f7d", "#8d99ae", "#cf8f6b", "#5e548e"]


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OSError("The picture needs matplotlib: pip install 'transformers-badge[demo]'.") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    for one in np.ravel(axes):
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", alpha=0.25)
    return figure, axes


def line_color(name: str, names: list[str]) -> str:
    """The color of a criterion among others."""
    others = [other for other in names if other not in HIGHLIGHTED]
    return HIGHLIGHTED.get(name) or _OTHERS[others.index(name) % len(_OTHERS)]


def plot_criteria(record: dict[str, Any], path: Path, title: str = "") -> None:
    """Accuracy (or agreement) against layer speedup, a line for every criterion, some with their bootstrap band.

    Args:
        record: with `speedup_axis`, `measure`, and `criteria`, each with mean, low and high, as `evaluate_table` makes.
        path: where the PNG goes.
    """
    figure, axes = _figure(8.2, 4.8)
    speedups, names = np.array(record["speedup_axis"]), list(record["criteria"])
    for name in sorted(names, key=lambda name: name in HIGHLIGHTED):
        entry, color = record["criteria"][name], line_color(name, names)
        mean, low, high = (100 * np.array(entry[key], dtype=float) for key in ("mean", "low", "high"))
        bold = name in HIGHLIGHTED
        axes.plot(speedups, mean, color=color, lw=2 if bold else 1, ls="--" if name == "fixed_depth" else "-",
                  label=f"{name.replace('_', ' ')} ({100 * entry['area']:.1f})", zorder=3 if bold else 2)  # fmt: skip
        if bold:
            axes.fill_between(speedups, low, high, color=color, alpha=0.12, lw=0, zorder=1)
    axes.set_xscale("log")  # with exit 0 the axis goes far, and what people want lies at its beginning
    ticks = [tick for tick in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if tick <= speedups[-1]]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("layer speedup (cost of full depth / mean cost)")
    axes.set_ylabel(f"{record['measure']} (%)")
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5),
                title="area under the curve", title_fontsize=7.5)  # fmt: skip
    figure.savefig(path)


def plot_time(record: dict[str, Any], path: Path) -> None:
    """Accuracy (or agreement) against measured speedup: every criterion at a few thresholds, with the spread."""
    figure, axes = _figure(8.2, 4.4)
    timing, measure = record["timing"], record["measure"]
    names = list(timing["criteria"])
    for name, points in timing["criteria"].items():
        speedups = np.array([[point["speedup"][key] for key in ("median", "min", "max")] for point in points])
        values = [100 * point[measure] for point in points]
        spread = np.abs(speedups[:, 1:] - speedups[:, :1]).T
        axes.errorbar(speedups[:, 0], values, xerr=spread, fmt="o-", ms=4, lw=1.6 if name in HIGHLIGHTED else 0.8,
                      elinewidth=0.8, color=line_color(name, names), label=name.replace("_", " "))  # fmt: skip
    axes.axvline(1, color="#999999", lw=0.8, ls=":")
    axes.set_xlabel(f"speedup in seconds over full depth, batches of {timing['batch_size']}, {timing['rows']} rows")
    axes.set_ylabel(f"{measure} (%)")
    axes.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)


def plot_leaving(record: dict[str, Any], path: Path) -> None:
    """Which share of the rows leaves at every exit: of all, by class, by length."""
    leaving = record["leaving"]
    groups = {"all rows": leaving["all"]}
    groups |= {f"class {name}": entry for name, entry in leaving.get("by_class", {}).items()}
    groups |= {"{} to {} tokens".format(*entry["tokens"]): entry for entry in leaving.get("by_length", [])}
    figure, axes = _figure(7.2, 1.2 + 0.34 * len(groups))
    names, layers = list(groups)[::-1], record["exit_layers"]
    left = np.zeros(len(names))
    for index, layer in enumerate(layers):
        shares = np.array([100 * groups[name]["shares"][index] for name in names])
        shade = 0.25 + 0.65 * index / max(1, len(layers) - 1)
        axes.barh(names, shares, left=left, color=(1 - shade, 1 - 0.75 * shade, 1 - 0.4 * shade), label=f"exit {layer}")
        left += shares
    axes.set_xlabel("rows that leave there (%)")
    axes.set_xlim(0, 100)
    axes.grid(visible=False)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)


def plot_reliability(record: dict[str, Any], path: Path) -> None:
    """How often first, middle and last exit are right when they are so sure, before and after temperature."""
    exits = record["exits"]
    chosen = [exits[index] for index in sorted({0, len(exits) // 2, len(exits) - 1})]
    figure, axes = _figure(2.9 * len(chosen) + 0.6, 3.2, 1, len(chosen), sharey=True, squeeze=False)
    for axis, entry in zip(axes[0], chosen, strict=True):
        axis.plot([0, 100], [0, 100], color="#999999", lw=0.8, ls=":")
        for key, name, color in (
            ("reliability", "as it is", HIGHLIGHTED["entropy"]),
            ("reliability_after_temperature", f"temperature {entry['temperature']:.2f}", HIGHLIGHTED["learned"]),
        ):
            bins = entry[key]["bins"]
            axis.plot([100 * b["confidence"] for b in bins], [100 * b["right"] for b in bins], "o-", ms=3.5, lw=1.3,
                      color=color, label=f"{name}: error {100 * entry[key]['error']:.1f}")  # fmt: skip
        axis.set_title(f"exit {entry['layer']}", fontsize=9)
        axis.set_xlabel("largest probability (%)", fontsize=8)
        axis.set_xlim(100 / max(2, len(record["label_names"])) - 3, 102)
        axis.legend(frameon=False, fontsize=7, loc="lower right")
    axes[0, 0].set_ylabel("right (%)" if record["measure"] == "accuracy" else "as at full depth (%)", fontsize=8)
    figure.savefig(path)


def plot_tradeoff(record: dict[str, Any], path: Path) -> None:
    """Accuracy against layer speedup, from a demo's report: the curve of thresholds, the exits as fixed depths, the
    choice made.

    Args:
        record: with `curve` (layer_speedup, accuracy), `exit_layers`, `exit_accuracy`, `full_depth` and `early_exit`.
        path: where the PNG goes.
    """
    blocks = record["exit_layers"][-1]
    figure, axes = _figure(7.0, 4.4)
    full = 100 * record["full_depth"]["accuracy"]
    budget = 100 * record["max_accuracy_drop"]
    axes.axhspan(full - budget, full, color="#e8eef7", zorder=0)
    axes.annotate(
        f"within {budget:g} point{'' if budget == 1 else 's'} of full depth",
        (0.015, full - budget),  # bottom left: curves start at the top, and cross the band further right
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        va="bottom",
        fontsize=8,
        color="#5b6b82",
    )
    speedups = [point["layer_speedup"] for point in record["curve"]]
    axes.plot(speedups, [100 * point["accuracy"] for point in record["curve"]], color="#1f5fa8", lw=1.8,
              label=f"early exit ({record['policy']['criterion']}), by threshold")  # fmt: skip
    exits = dict(zip(record["exit_layers"], (100 * a for a in record["exit_accuracy"]), strict=True))
    if 0 in exits:  # as far to the right as one likes
        lexical = exits.pop(0)
        axes.axhline(lexical, color="#bbbbbb", lw=0.8, ls=":")
        axes.annotate("exit 0", (0.985, lexical), xycoords=("axes fraction", "data"), ha="right",
                      xytext=(0, 2), textcoords="offset points", fontsize=7.5, color="#777777")  # fmt: skip
    axes.plot([blocks / layer for layer in exits], list(exits.values()), "o--", color="#8a8a8a", ms=9, lw=1,
              label="everyone leaves at exit 1, 2, ...")  # fmt: skip
    for layer, accuracy in exits.items():
        axes.annotate(str(layer), (blocks / layer, accuracy), ha="center", va="center_baseline", fontsize=6.5,
                      color="white", weight="bold")  # fmt: skip
    chosen = record["early_exit"]
    axes.plot(chosen["layer_speedup"], 100 * chosen["accuracy"], "*", ms=15, color="#d1495b",
              label=f"chosen: {chosen['layer_speedup']:.2f}x at {100 * chosen['accuracy']:.1f} %")  # fmt: skip
    axes.set_xlabel("layer speedup (blocks / mean exit layer)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_xlim(0.9, 1.07 * max(blocks, min(2 * chosen["layer_speedup"], 4 * blocks)))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path)


def plot_engines(record: dict[str, Any], names: dict[str, str], path: Path) -> None:
    """Milliseconds per row of the full model and of early exit, streamed too and side by side where that was timed, a
    panel for every batch size.

    Args:
        record: as `benchmark_checkpoint` makes.
        names: of the engines, in words.
        path: where the PNG goes.
    """
    engines, by_size = list(record["engines"]), record["batch_sizes"]
    width = max(2.6, 0.75 * len(engines))  # of a panel: what the engines' names need
    figure, axes = _figure(width * max(len(by_size), 2), 3.4, 1, len(by_size), squeeze=False)
    places = np.arange(len(engines))
    for axis, (size, entry) in zip(axes[0], by_size.items(), strict=True):
        spent = entry["milliseconds_per_row"]
        axis.axhline(spent["pipeline"], color="#555555", lw=1, ls="--", label="transformers' pipeline")
        for shift, kind, label, color in (
            (-0.33, "full", "full model", "#8d99ae"),
            (-0.11, "early exit", "early exit", "#d1495b"),
            (0.11, "stream", "early exit, streamed", "#edae49"),
            (0.33, "stream side by side", "the same, side by side", "#66a182"),
        ):
            timed = [place for place, engine in enumerate(engines) if f"{kind}, {engine}" in spent]
            if not timed:
                continue
            values = [spent[f"{kind}, {engines[place]}"] for place in timed]
            bars = axis.bar(places[timed] + shift, values, 0.21, color=color, label=label)
            # White behind the numbers, which may lie on the line.
            plate = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
            axis.bar_label(bars, fmt="%.1f", fontsize=5, padding=1.5, bbox=plate)
        axis.set_xticks(places, [names[engine].replace(" ", "\n") for engine in engines], fontsize=6)
        axis.set_title(f"batch {size}", fontsize=9, loc="left")
    axes[0][0].set_ylabel("milliseconds per row")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False,
                  fontsize=7.5)  # fmt: skip
    figure.savefig(path)
