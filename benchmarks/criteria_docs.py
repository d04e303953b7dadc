"""docs/criteria.md and its picture, from the records of `criteria.py` and `guarantee.py`; `write_docs.py` calls it."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lexical_docs import of_task, span, spread
from transformers_badge.evaluation.plots import HIGHLIGHTED, line_color
from transformers_badge.evaluation.report import markdown_table


GROUPS = {"exit_0": "fine-tuned, with exit 0", "taught": "fine-tuned, without", "converted": "converted, without"}
WITHOUT_EXIT_0 = [recipe for recipe in GROUPS if recipe != "exit_0"]


def of_group(record: dict[str, Any], recipe: str) -> list[dict[str, Any]]:
    """The models of a recipe, of two classes."""
    return [model for model in record["models"] if model["recipe"] == recipe]


def over_models(
    models: list[dict[str, Any]], name: str, index: int, measure: str = "speedup_at_loss"
) -> np.ndarray[Any, Any]:
    """Layer speedup at one of the losses, or shares of answers that change, of every model."""
    return np.array([model["criteria"][name][measure][index] for model in models])


def mean_lost(record: dict[str, Any], recipe: str, name: str) -> np.ndarray[Any, Any]:
    """What a criterion loses over the speedups of a recipe's axis, (speedups,), mean over its models."""
    return np.mean([model["criteria"][name]["lost"] for model in of_group(record, recipe)], axis=0)


def over_entropy(
    models: list[dict[str, Any]], name: str, index: int, measure: str = "speedup_at_loss"
) -> np.ndarray[Any, Any]:
    """The same over entropy's, of every model."""
    return over_models(models, name, index, measure) / over_models(models, "entropy", index, measure)


def mean_area(models: list[dict[str, Any]], name: str) -> float:
    """The area that a criterion loses, mean over models."""
    return float(np.mean([model["criteria"][name]["area_lost"] for model in models]))


def with_ratio(models: list[dict[str, Any]], name: str, index: int, measure: str = "speedup_at_loss") -> str:
    """Mean layer speedup of a criterion, and its mean ratio to entropy's."""
    speedups, ratios = (of(models, name, index, measure) for of in (over_models, over_entropy))
    return f"{speedups.mean():.2f}x ({ratios.mean():.2f})"


def change_rows(record: dict[str, Any]) -> list[list[str]]:
    """A row per criterion: speedup at which 1 and 2 % of the answers change, of two classes and of five."""
    groups = record["models"], record["several_classes"]
    names = sorted(
        groups[0][0]["criteria"], key=lambda name: -over_models(groups[0], name, 2, "speedup_at_change").mean()
    )
    return [
        [name, *[with_ratio(models, name, index, "speedup_at_change") for models in groups for index in (2, 3)]]
        for name in names
    ]


def best_unfitted(models: list[dict[str, Any]]) -> str:
    """The criterion that loses the smallest area, of those that are not learned."""
    names = [name for name in models[0]["criteria"] if not name.startswith("learned")]
    return min(names, key=lambda name: mean_area(models, name))


def group_rows(record: dict[str, Any]) -> list[list[str]]:
    """A row per recipe: the learned rule's speedup at each loss, with its ratio to entropy's."""
    return [
        [title, *[with_ratio(of_group(record, recipe), "learned", index) for index in range(len(record["losses"]))]]
        for recipe, title in GROUPS.items()
    ]


def speedup_rows(models: list[dict[str, Any]], losses: list[float]) -> list[list[str]]:
    """A row per criterion, the smallest area lost first: speedup at each loss, with its ratio to entropy."""
    rows = []
    for name in sorted(models[0]["criteria"], key=lambda name: mean_area(models, name)):
        cells = [with_ratio(models, name, index) for index in range(len(losses))]
        rows.append([name, *cells, f"{100 * mean_area(models, name):.2f}"])
    return rows


def task_rows(record: dict[str, Any], index: int) -> list[list[str]]:
    """A row per task and recipe: speedup at one of the losses, of the criteria that matter most."""
    rows = []
    for data, recipe in dict.fromkeys((model["data"], model["recipe"]) for model in record["models"]):
        models = of_task(record, data, recipe)
        accuracy = 100 * np.mean([model["exit_accuracy"] for model in models], axis=0)
        speedups = [
            over_models(models, name, index) for name in ("learned", "entropy", "dge", "patience", "fixed_depth")
        ]
        rows.append(
            [
                f"{data}, {GROUPS[recipe]}",
                " ".join(f"{value:.1f}" for value in accuracy),
                *map(spread, speedups),
            ]
        )
    return rows


def chosen_rows(record: dict[str, Any]) -> list[list[str]]:
    """A row per criterion: speedup and loss on the other half, at thresholds chosen on one half for each loss."""
    models, rows = record["models"], []
    for name in models[0]["criteria"]:
        chosen = [model["criteria"][name]["chosen"] for model in models]
        speedups = np.mean([entry["layer_speedup"] for entry in chosen], axis=0)
        lost = 100 * np.mean([entry["lost"] for entry in chosen], axis=0)
        cells = [f"{speedup:.2f}x, {points:.2f}" for speedup, points in zip(speedups, lost, strict=True)]
        rows.append((speedups[2], [name, *cells]))
    return [cells for _, cells in sorted(rows, key=lambda row: -row[0])]


def behind_fixed_depth(record: dict[str, Any], recipes: list[str]) -> str:
    """Where, from 1.2x to 3x, the learned criterion loses no less than everyone leaving at the same depth."""
    axis = np.linspace(1.2, 3, 37)
    ahead = np.mean(
        [
            np.interp(
                axis,
                record["speedup_axes"][recipe],
                mean_lost(record, recipe, "fixed_depth") - mean_lost(record, recipe, "learned"),
            )
            for recipe in recipes
        ],
        axis=0,
    )
    behind = axis[ahead <= 0]
    if behind.size == 0:
        return "at every speedup from 1.2x to 3x"
    return (
        f"at speedups from 1.2x to 3x, but for those between {behind.min():.2f}x and {behind.max():.2f}x, where it "
        f"loses up to {100 * -ahead.min():.3f} points more"
    )


def kept_by_certifying(guarantee: dict[str, Any], risk: str) -> str:
    """What a certificate leaves of the speedup without one, from the least to the most of the runs of a risk."""
    runs = [entry for entry in guarantee["runs"] if entry["risk"] == risk]
    kept = [entry["certified"]["layer_speedup"] / entry["uncertified"]["layer_speedup"] for entry in runs]
    return span(kept, 2)


def write_criteria(root: Path, record: dict[str, Any], guarantee: dict[str, Any], machine: str) -> None:
    """Write docs/criteria.md and docs/images/criteria.png."""
    losses, models, several = record["losses"], record["models"], record["several_classes"]
    gain, unlabelled = (over_entropy(models, name, 2) for name in ("learned", "learned_without_labels"))
    without = [model for model in models if model["recipe"] in WITHOUT_EXIT_0]
    heads = [f"<= {100 * loss:g} points" for loss in losses]
    replay = guarantee["replay"]
    guarantee_rows = [
        [
            f"{entry['data']}, {GROUPS[entry['recipe']]}",
            entry["risk"],
            entry["criterion"],
            f"{100 * entry['certified']['violations']:.1f} %",
            f"{entry['certified']['layer_speedup']:.2f}x",
            f"{100 * entry['uncertified']['violations']:.1f} %",
            f"{entry['uncertified']['layer_speedup']:.2f}x",
        ]
        for entry in guarantee["runs"]
    ]
    lines = f"""# Which criterion, and does the guarantee hold

Made by `make docs` from docs/records/criteria.json (`python benchmarks/criteria.py`) and docs/records/guarantee.json
(`python benchmarks/guarantee.py`), on {machine}.

## The criteria compared

MiniLM (6 blocks) on movie reviews, product reviews and tweets, three seeds each: fine-tuned with an exit 0, as `train` makes a model, fine-tuned without, and converted without, as `convert` does: {len(models)} models. Every model
leaves an exit table of rows that it has not seen; the table is halved at random {record["splits"]} times, what is learned is learned on one half, and each half is measured
once. Losses are against full depth of the same model. Criteria and their dials are described in [Exit policies](exit-policies.md).

![Accuracy lost against layer speedup, every criterion](images/criteria.png)

Layer speedup at which no more than so much accuracy is lost, mean over the models; in brackets the mean ratio to entropy's. The area is the mean of the points lost over all
speedups from 1x to 6x.

{markdown_table(["criterion", *heads, "area, points"], speedup_rows(models, losses))}

**The learned rule wins**: {np.mean(gain):.3f} times entropy's speedup at one point lost (standard error over the models {gain.std(ddof=1) / np.sqrt(len(gain)):.3f}; {np.mean(over_entropy(without, "learned", 2)):.3f} on the {len(without)} without exit 0), more where less may be lost, less where more may.
So it is what `calibrate`, `convert`, `train` and the demo use. A few hundred rows are enough for it. It is taught by their labels where `calibrate` is asked about errors and has rows that were not trained on; or
else by the last exit, without labels ({np.mean(unlabelled):.3f} times, taught for a bound on disagreement). With two classes entropy, maximum probability and margin order rows alike.
It loses less, on average, than everyone leaving at the same depth: on the models without exit 0 {behind_fixed_depth(record, WITHOUT_EXIT_0)}; on all models {behind_fixed_depth(record, list(GROUPS))}.
(On some of them an exit before the last is a little better than the last. Where labels show it, the rule lets nobody go past it; often some hundred rows do not. How sure they have to be was chosen on these same tables.)

The learned rule's speedup, and its ratio to entropy's, by the kind of model:

{markdown_table(["models", *heads], group_rows(record))}

By task, at no more than one point lost (mean and standard deviation over the seeds):

{markdown_table(["model", "exits' accuracy, %", "learned", "entropy", "dge", "patience", "fixed depth"], task_rows(record, 2))}

What a user gets who chooses the threshold on one half, for at most so much loss on those rows and without a guarantee, measured on the other half: layer speedup, and points really
lost.

{markdown_table(["criterion", *heads], chosen_rows(record))}

The loss comes out a little above what was allowed: the best of many thresholds on a few hundred rows is partly the luckiest. That is what the guarantee is for.

### Five classes

The movie reviews in five classes, by how people rated them: {len(several)} models, fine-tuned likewise, {100 * np.mean([m["exit_accuracy"][-1] for m in several]):.1f} % right at full depth.
At one point lost the learned rule has {over_entropy(several, "learned", 2).mean():.2f} times entropy's speedup, for it sees by how much an answer leads. Of those that need no fitting `{best_unfitted(several)}` does best.

{markdown_table(["criterion", *heads, "area, points"], speedup_rows(several, losses))}

### As few other answers as can be

Where there are no labels, what can be held down is the share of answers that change. Layer speedup at which so many of them differ from full depth, mean over the models; in brackets
the mean ratio to entropy's. `learned_without_labels` is what `calibrate` learns for it.

{markdown_table(["criterion", "1 %, two classes", "2 %, two classes", "1 %, five classes", "2 %, five classes"], change_rows(record))}

## The guarantee

An exit table of real rows is the population; {guarantee["rows"]:,} rows are drawn from it with replacement to calibrate on, {guarantee["simulations"]:,} times. A violation is a policy whose
risk in the population is above the {100 * guarantee["max_risk"]:g} % asked for; at {100 * guarantee["confidence"]:g} % confidence {100 * (1 - guarantee["confidence"]):.0f} % of the calibrations may be one. Beside it the fastest threshold whose risk on the
same rows is as asked for, without a guarantee.

{markdown_table(["model", "risk", "criterion", "violations", "layer speedup", "violations, uncertified", "layer speedup, uncertified"], guarantee_rows)}

A certificate for disagreement leaves {kept_by_certifying(guarantee, "disagreement")} of the speedup without one, for the increase in errors {kept_by_certifying(guarantee, "error_increase")}. Least of it with exit 0: accuracy falls slowly there while more and
more answers change, for the better and for the worse, and where many change, some hundred rows cannot tell an increase of 1 % from none. More rows can.

## Replaying

{replay["thresholds"]} thresholds of {replay["criteria"]} criteria on {replay["rows"]:,} rows, {replay["exits"]} exits and {replay["labels"]} labels: {replay["seconds"]:.2f} seconds (median of 5; slowest {replay["slowest"]:.2f}).
"""
    (root / "docs" / "criteria.md").write_text(lines)
    plot_lost(record, root / "docs" / "images" / "criteria.png")


def plot_lost(record: dict[str, Any], path: Path) -> None:
    """Points lost against layer speedup, a line per criterion and a panel per kind of model."""
    figure = Figure(figsize=(12, 4.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(GROUPS), sharey=True)
    names = list(record["models"][0]["criteria"])
    for axes, (recipe, title) in zip(panels, GROUPS.items(), strict=True):
        axis = record["speedup_axes"][recipe]
        axes.axhspan(-1, 0, color="#e8eef7", zorder=0)
        for name in sorted(names, key=lambda name: name in HIGHLIGHTED):
            bold = name in HIGHLIGHTED
            axes.plot(axis, -100 * mean_lost(record, recipe, name), color=line_color(name, names), lw=2 if bold else 1,
                      ls="--" if name == "fixed_depth" else "-", label=name.replace("_", " "))  # fmt: skip
        axes.set_title(f"{title}: mean of {len(of_group(record, recipe))} models", fontsize=10)
        axes.set_xlabel("layer speedup")
        axes.set_xlim(1, min(axis[-1], 12))
        axes.set_ylim(-6, 0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    panels[0].set_ylabel("accuracy against full depth (points)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=7.5)
    figure.savefig(path)
