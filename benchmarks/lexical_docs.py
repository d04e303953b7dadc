"""docs/exit-zero.md, from the records of `lexical.py` and of the demo; `write_docs.py` calls it."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from transformers_badge.evaluation.report import markdown_table
from transformers_badge.evaluation.timing import with_spread


def of_task(record: dict[str, Any], data: str, recipe: str) -> list[dict[str, Any]]:
    """The models of a task, one per seed."""
    return [model for model in record["models"] if (model["data"], model["recipe"]) == (data, recipe)]


def named(models: list[dict[str, Any]]) -> str:
    """What a task is called in a table."""
    return f"{models[0]['data']}, {models[0]['recipe']} ({len(models)} seeds)"


def spread(values: Any, unit: str = "x", digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):.{digits}f}{unit} +- {np.std(values, ddof=1):.{digits}f}"


def span(values: Collection[float], digits: int = 1) -> str:
    """The least and the greatest; one number where they print alike."""
    ends = dict.fromkeys(f"{value:.{digits}f}" for value in (min(values), max(values)))
    return " to ".join(ends)


# What kinds of models are called in tables. Those with filters are new: a record need not have them.
CALLED = {"filters": "n-grams and filters", "with": "n-grams", "without": "without exit 0", "plain": "plain"}


def speedups(models: list[dict[str, Any]], name: str, index: int) -> Any:
    """Layer speedup of every model at one of the losses."""
    return np.array([model[name]["speedup_at_loss"][index] for model in models])


def over_without(models: list[dict[str, Any]], kind: str, index: int, of: str = "") -> list[str]:
    """Speedup of a kind, and how many times that is the speedup without exit 0; nothing where it was not measured."""
    if f"{kind}, learned{of}" not in models[0]:
        return ["", ""]
    own, without = (speedups(models, f"{name}, learned{of}", index) for name in (kind, "without"))
    return [spread(own), f"**{np.mean(own / without):.2f}**"]


def measured(record: dict[str, Any]) -> list[str]:
    """The kinds with exit 0 that a record has."""
    return [kind for kind in ("with", "filters") if any(f"{kind}, learned" in model for model in record["models"])]


def gain_rows(record: dict[str, Any], tasks: list[tuple[str, str]], index: int) -> list[list[str]]:
    """A row per task: speedup at one of the losses with and without exit 0, and of the cascade."""
    rows = []
    for data, recipe in tasks:
        models = of_task(record, data, recipe)
        other = spread(speedups(models, "cascade", index)) if recipe == "taught" else ""
        rows.append(
            [named(models), spread(speedups(models, "without, learned", index)),
             *[cell for kind in measured(record) for cell in over_without(models, kind, index)],
             spread(speedups(models, "with, entropy", index)), other]
        )  # fmt: skip
    return rows


def chosen_rows(record: dict[str, Any], tasks: list[tuple[str, str]], index: int) -> list[list[str]]:
    """A row per task: what thresholds that were chosen on other rows really give."""
    rows = []
    for data, recipe in tasks:
        cells = [named(of_task(record, data, recipe))]
        for name in ("without, learned", *[f"{kind}, learned" for kind in measured(record)], "cascade"):
            chosen = [model[name]["chosen"] for model in of_task(record, data, recipe) if name in model]
            if chosen:
                speedup = np.mean([entry["layer_speedup"][index] for entry in chosen])
                cells.append(f"{speedup:.2f}x, {100 * np.mean([entry['lost'][index] for entry in chosen]):.2f}")
            else:
                cells.append("")
        rows.append(cells)
    return rows


def criterion_rows(record: dict[str, Any]) -> list[list[str]]:
    """A row per criterion: points lost at fixed speedups, mean over all models with exit 0."""
    rows = []
    for name in ("learned", "entropy", "fixed_depth"):
        lost = np.mean([model[f"with, {name}"]["lost_at_speedup"] for model in record["models"]], axis=0)
        rows.append([name.replace("_", " "), *[f"{100 * value:+.2f}" for value in lost]])
    return rows


def accuracy_rows(record: dict[str, Any], tasks: list[tuple[str, str]]) -> list[list[str]]:
    """A row per task and kind: accuracy of every exit, mean over the seeds."""
    rows = []
    for data, recipe in tasks:
        models = of_task(record, data, recipe)
        for kind, name in CALLED.items():
            if kind in models[0]["exit_accuracy"]:
                accuracy = 100 * np.mean([model["exit_accuracy"][kind] for model in models], axis=0)
                blanks = [""] * (7 - len(accuracy))
                rows.append([named(models), name, *blanks, *[f"{value:.1f}" for value in accuracy]])
        if recipe == "taught":
            alone = 100 * np.mean([model["cascade"]["accuracy"] for model in models])
            rows.append([named(models), "TF-IDF and logistic regression", f"{alone:.1f}", *[""] * 6])
    return rows


def agreement_rows(record: dict[str, Any]) -> list[list[str]]:
    """Converted classifiers: speedup at so much disagreement, with and without exit 0."""
    models, rows = of_task(record, "movies", "converted"), []
    for index, loss in enumerate(record["losses"]):
        if loss > 0:
            without = spread(speedups(models, "without, learned, agreement", index))
            given = [cell for kind in measured(record) for cell in over_without(models, kind, index, ", agreement")]
            rows.append([f"{100 * (1 - loss):g} %", without, *given])
    return rows


def time_rows(record: dict[str, Any], blocks: int) -> list[list[str]]:
    """A row per batch size: seconds, and what of the layer speedup arrives."""
    rows = []
    for entry in record["batches"]:
        seconds = entry["seconds"]
        layers = blocks / entry["mean_exit_layer"]
        over = entry["speedup_over_full_depth"]
        rows.append(
            [
                str(entry["batch_size"]),
                f"{100 * entry['left_at_exit_0']:.0f} %",
                f"{layers:.2f}x",
                with_spread(over),
                f"{over['median'] / layers:.2f}",
                with_spread(entry["speedup_over_transformers"]),
                f"{100 * seconds['tokenization'] / seconds['early_exit']:.0f} %",
                f"{100 * (seconds['exit_0'] - seconds['tokenization']) / seconds['early_exit']:.0f} %",
            ]
        )
    return rows


def share_of_a_block(cost: dict[str, float]) -> str:
    """What exit 0 costs, with its spread."""
    return f"{100 * cost['median']:.2f} % ({100 * cost['min']:.2f} to {100 * cost['max']:.2f})"


def fit_rows(record: dict[str, Any]) -> list[list[str]]:
    """A row per fit: how long it took, and its process's peak memory."""
    return [
        [fit["name"], f"{fit['rows']:,}", str(fit["classes"]), f"{fit['seconds']:.0f}", f"{fit['peak_mib'] / 1024:.1f}"]
        for fit in record["fits"]
    ]


def write_exit_zero(
    root: Path,
    record: dict[str, Any],
    times: dict[str, Any],
    cost: dict[str, Any],
    fits: dict[str, Any],
    demo: dict[str, Any],
    machine: Any,
) -> None:
    """Write docs/exit-zero.md."""
    tasks = list(dict.fromkeys((model["data"], model["recipe"]) for model in record["models"]))
    at_one = record["losses"].index(0.01)
    kinds = [CALLED[kind] for kind in measured(record)]
    over = [cell for kind in kinds for cell in (kind, "ratio")]
    learned, entropy = (
        np.array([model[f"with, {name}"]["speedup_at_loss"][at_one] for model in record["models"]])
        for name in ("learned", "entropy")
    )
    examples = [
        [entry["text"], entry["label"], ", ".join(f"{ngram} ({weight:+.1f})" for ngram, weight in entry["words"])]
        for entry in demo["examples"]
        if entry.get("words")
    ]
    text = f"""# Exit 0: leave before the first block

Much text is easy for its words alone. With `lexical_exit=True` a model has an exit of depth 0: a linear classifier over hashed n-grams of the token ids, read before the
embeddings and before any block. Rows that leave there cost next to nothing; every later exit adds its logits, times a gate, to its own. With `lexical_filters=64` small filters over
word vectors speak there as well.

```python
from transformers_badge import BadgeForSequenceClassification, fit_lexical_exit, teach_exits

model = BadgeForSequenceClassification.from_encoder("google-bert/bert-base-uncased", num_labels=2, lexical_exit=True)
fit_lexical_exit(model, tokenizer, rows)  # tokenized rows with labels
Trainer(model=model, train_dataset=rows, processing_class=tokenizer).train()  # without exit 0
teach_exits(model, tokenizer, rows)  # exit 0 joins in
```

`transformers-badge train` and `demo` do this by themselves (`train --no-lexical-exit` leaves it out). `convert --lexical-exit` fits it to the source's answers, without labels.

## How it is made

- **N-grams** of one and two tokens (`lexical_ngrams`) are hashed into 2^18 buckets (`lexical_buckets`). Padding and special tokens are in none of them, and the texts of a pair are told
  apart. The hash is plain integer arithmetic, the same on every platform; a test holds it to a version in plain Python.
- **Fitting** is a convex problem, solved once (`training/lexical_solver.py`; scipy's Newton method with conjugate gradients). Weights are stretched by naive Bayes log ratios (Wang and Manning, ACL 2012), and the encoder's own
  token embeddings stand behind single tokens, so that words that the training texts do not have are known too. Both end up in one table of weights: nothing of it costs anything later.
  N-grams that occur once are solved for as one per row, which changes no weight and saves much time; of more than 20,000 rows, 20,000 choose the penalty.
- **Regularisation**, and how much the embeddings say, are chosen on held-out rows, since overconfidence at exit 0 is what hurts. The weights are then held fixed.
- **Filters** (`lexical_filters`; the default is none) know what up to seven tokens in a row mean, also where they have no n-gram in common with the rows that it was fitted to: a convolution over word vectors
  (Kim, EMNLP 2014), which are a projection of the encoder's own token embeddings (`training/phrases.py`). They learn what the last exit answers, to the rows and to many made-up texts.
  How much they count is chosen on held-out rows; where they know nothing of these, they say nothing. What they say enters the later exits too, but not the last: it taught them, and is
  only made surer by them. `teach_exits` fits them where there are any, and so do `convert_classifier(..., lexical_exit=True, lexical_filters=64)`
  and `--lexical-filters 64` of `train` and `convert`.
- **It joins in after the fine-tuning.** An encoder that learns from rows of which exit 0 speaks already leaves to it what it could find out itself, and all exits are the worse for it.
  So the encoder is fine-tuned as if there were no exit 0. Then its logits are added to the last exit's as they are, for what two say who learnt apart from each other adds up, in
  log-odds (Hinton, ICANN 1999); and the last exit, which now knows more, teaches the others. Their gates stay at 1 too: learnt, they nearly closed, for of the rows that it was fine-tuned on
  the encoder knows more than it will of others. In a converted classifier, whose encoder has seen none of the texts, gates learn. In a regression values do not add up: there the later exits stay without.
- **`lexical_logits`**: on the rows that it was fitted to, exit 0 looks better than it is. `fit_lexical_exit` returns what an exit fitted to the other four fifths says of each row.
  With filters it has two columns for each label (`config.lexical_columns`), what n-grams say and what filters say, which learn later.
  In training `forward` lets exit 0 into the later exits only where it is given these: `teach_exits` does, and for a joint training train on the rows that `fit_lexical_exit` returns.
  `make_exit_table` takes them too.
- It needs `input_ids`. Given `inputs_embeds`, `forward` asks for `lexical_logits` as well.
- Where words say nothing, hardly a row leaves there: `calibrate` sees that the exit knows nothing, as a test shows, and what is left is the cost of hashing.
- It costs {share_of_a_block(cost["exit_0"])} of one block of MiniLM for 32 rows of 64 tokens, and with 64 filters {share_of_a_block(cost["filters"])} (on {machine(cost)}); exit tables count 2 %, and 2.5 % with filters.

How long a fit takes, all of it: counting, choosing the penalty, and what is said of each row by an exit fitted to others (`python benchmarks/fit_lexical.py`, on {machine(fits)}):

{markdown_table(["texts", "rows", "classes", "seconds", "GiB of memory, at most"], fit_rows(fits))}

It is the one exit that explains itself (`explain_lexical_exit` in `transformers_badge.inference.explain`). From the demo:

{markdown_table(["text", "answer", "words that decided it"], examples)}

## What it buys

Made by `make docs` from docs/records/lexical.json (`python benchmarks/lexical.py`), on {machine(record)}. MiniLM (6 blocks), mean and standard deviation over the seeds. Models with and without
exit 0 are trained on the same rows, by the recipe `taught` ([recipes](model.md#training-recipes)); `converted` means a frozen classifier with exits that were
taught without labels.

Layer speedup at which no more than one point of accuracy is lost **against the model without exit 0 at full depth** (mean over {2 * record["splits"]} halvings; exit 0 counts 2 % of a block):

{markdown_table(["model", "without exit 0", *over, "n-grams, entropy instead of the learned rule", "cascade"], gain_rows(record, tasks, at_one))}

The cascade is the simplest thing to do instead: scikit-learn's TF-IDF with logistic regression (cross-validated), and for the rows of which it is not sure the same encoder fine-tuned plainly; its first
stage counts nothing.

{"" if all("filters, learned" in model for model in record["models"]) else "Filters are new: where nothing is said of them, they have not been measured yet. "}With n-grams at exit 0 the learned rule is {np.mean(learned / entropy):.3f} times as fast as entropy (mean over the {len(learned)} models; standard error {np.std(learned / entropy, ddof=1) / np.sqrt(len(learned)):.3f}). Points
lost at the same layer speedup, mean over all models with n-grams at exit 0:

{markdown_table(["criterion", *[f"{speedup:g}x" for speedup in record["speedups"]]], criterion_rows(record))}

What thresholds give that were chosen for this on one half of the rows, measured on the other: layer speedup, and points lost.

{markdown_table(["model", "without exit 0", *kinds, "cascade"], chosen_rows(record, tasks, at_one))}

Converted, no labels: layer speedup at which so many answers stay as they are at full depth.

{markdown_table(["answers that stay", "without exit 0", *over], agreement_rows(record))}

To an exit that has to repeat the very answers of the encoder, its errors among them, words are of less help than to one that has to be right. `convert` leaves exit 0 out unless it
is asked for (`--lexical-exit`).

Accuracy of the exits, %. `plain` is the encoder fine-tuned with one exit on the same rows.

{markdown_table(["model", "", "0", *[str(layer) for layer in range(1, 7)]], accuracy_rows(record, tasks))}

## In seconds

The demo's model (`make demo`) on its test rows, from texts to answers, tokenization included; contenders take turns. On {machine(times)}.

{markdown_table(["batch size", "leave at exit 0", "layer speedup", "in seconds, over full depth", "of which arrives", "over transformers' own BERT", "time in tokenization", "in exit 0"], time_rows(times, demo["exit_layers"][-1]))}

What does not arrive goes into tokenization, which every row pays, into what is paid once per batch and exit, and, in batches, into blocks that run on few rows.
"""
    (root / "docs" / "exit-zero.md").write_text(text)
