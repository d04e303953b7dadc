"""Pictures, made from records."""

from pathlib import Path
from typing import Any


def plot_tradeoff(record: dict[str, Any], path: Path) -> None:
    """Accuracy against layer speedup, from a demo's report: the curve of thresholds, the exits as fixed depths, the
    choice made.

    Args:
        record: with `curve` (layer_speedup, accuracy), `exit_layers`, `exit_accuracy`, `full_depth` and `early_exit`.
        path: where the PNG goes.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OSError("The picture needs matplotlib: pip install 'transformers-badge[demo]'.") from error

    blocks = record["exit_layers"][-1]
    figure = Figure(figsize=(7.0, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    full = 100 * record["full_depth"]["accuracy"]
    budget = 100 * record["max_accuracy_drop"]
    axes.axhspan(full - budget, full, color="#e8eef7", zorder=0)
    axes.annotate(
        f"within {budget:g} point{'' if budget == 1 else 's'} of full depth",
        (0.985, full - budget / 2),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="center",
        fontsize=8,
        color="#5b6b82",
    )
    speedups = [point["layer_speedup"] for point in record["curve"]]
    axes.plot(speedups, [100 * point["accuracy"] for point in record["curve"]], color="#1f5fa8", lw=1.8,
              label="early exit (DGE), by threshold")  # fmt: skip
    axes.plot(
        [blocks / layer for layer in record["exit_layers"]],
        [100 * accuracy for accuracy in record["exit_accuracy"]],
        "o--", color="#9a9a9a", ms=5, lw=1, label="everyone leaves at the same exit",
    )  # fmt: skip
    for layer, accuracy in zip(record["exit_layers"], record["exit_accuracy"], strict=True):
        axes.annotate(f"exit {layer}", (blocks / layer, 100 * accuracy), xytext=(5, -11), textcoords="offset points",
                      fontsize=7.5, color="#777777")  # fmt: skip
    chosen = record["early_exit"]
    axes.plot(chosen["layer_speedup"], 100 * chosen["accuracy"], "*", ms=15, color="#d1495b",
              label=f"chosen: {chosen['layer_speedup']:.2f}x at {100 * chosen['accuracy']:.1f} %")  # fmt: skip
    axes.set_xlabel("layer speedup (blocks / mean exit layer)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_xlim(0.9, 1.07 * blocks)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=8.5, loc="lower left")
    figure.savefig(path)
