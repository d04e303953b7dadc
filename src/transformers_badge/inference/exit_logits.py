"""Making an exit table: a model is run once, at full depth, over a data set."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from transformers_badge.exit_table import ExitTable, digest_rows
from transformers_badge.inference.predict import token_limit
from transformers_badge.inference.predictor import BadgePredictor
from transformers_badge.model.loss_badge import infer_problem_type
from transformers_badge.model.modeling_badge import weights_digest
from transformers_badge.model.policy_badge import ExitPolicy


# What the lexical exit costs, in blocks, and what its filters cost besides: it runs for every row.
# `benchmarks/lexical.py --cost` measures it.
LEXICAL_COST, FILTERS_COST = 0.02, 0.005


def make_exit_table(
    model: Any,
    tokenizer: Any,
    columns: Sequence[Sequence[str]],
    labels: Any | None = None,
    *,
    lexical_logits: Any | None = None,
    max_tokens: int | None = None,
    batch_size: int = 64,
    on_batch: Callable[[int], Any] = lambda rows: None,
) -> ExitTable:
    """Run every block and every exit over texts.

    Args:
        model: a `BadgeForSequenceClassification`, or the `BadgePredictor` that will run.
        tokenizer: the tokenizer of its encoder.
        columns: one list of texts, or two for pairs.
        labels: (rows,) class indices, or (rows, labels) of 0 and 1. Default: none.
        lexical_logits: (rows, `config.lexical_columns`), to stand for what the lexical exit says; of rows that it was
            fitted to, what `fit_lexical_exit` or `teach_exits` returns.
        max_tokens: longer texts are cut. Default: what encoder and tokenizer take.
        batch_size: rows per batch; texts of similar length share one.
        on_batch: called with the number of rows that were run, after each batch.

    Returns:
        The table, in the order of the texts; costs are depths, and `lexical_cost` more.

    Raises:
        ValueError: no rows, a regression model, or labels that do not fit.
    """
    if len(columns[0]) == 0:
        raise ValueError("There are no texts: give at least one.")
    problem_type = infer_problem_type(model.config.problem_type, model.num_labels, None)
    limit = token_limit(model, tokenizer, max_tokens)
    encoded = tokenizer(*[list(column) for column in columns], truncation=True, max_length=limit)
    return ExitTable(
        exit_logits=run_every_exit(model, tokenizer, encoded, lexical_logits, batch_size, on_batch),
        exit_layers=tuple(model.exit_layers),
        costs=np.array(model.exit_layers) + lexical_cost(model.config),
        problem_type=problem_type,
        labels=None if labels is None else np.asarray(labels, dtype=np.int64),
        lengths=np.array([len(ids) for ids in encoded["input_ids"]], dtype=np.int32),
        row_digests=digest_rows(columns),
        label_names=tuple(model.config.id2label[index] for index in range(model.num_labels)),
        model=digest_model(model),
    )


def lexical_cost(config: Any) -> float:
    """What the lexical exit of a model costs every row, in blocks; 0 where there is none."""
    return LEXICAL_COST * bool(config.lexical_exit) + FILTERS_COST * bool(config.phrase_filters)


@torch.no_grad()
def run_every_exit(
    model: Any,
    tokenizer: Any,
    encoded: Mapping[str, Any],
    lexical_logits: Any | None = None,
    batch_size: int = 64,
    on_batch: Callable[[int], Any] = lambda rows: None,
) -> Any:
    """Logits (rows, exits, labels), in numpy, of token rows by column; the arguments are those of `make_exit_table`."""
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    rows, exits, order = len(lengths), len(model.exit_layers), np.argsort(lengths, kind="stable")
    is_double = not isinstance(model, BadgePredictor) and model.dtype == torch.float64
    dtype = np.float64 if is_double else np.float32  # half precision fits float32 exactly
    exit_logits = np.empty((rows, exits, model.num_labels), dtype=dtype)
    with _evaluating(model):
        for start in range(0, rows, batch_size):
            chosen = order[start : start + batch_size]
            batch = {name: [values[row] for row in chosen] for name, values in encoded.items()}
            given = None if lexical_logits is None else np.asarray(lexical_logits)[chosen]
            exit_logits[chosen] = _every_exit(model, tokenizer.pad(batch, return_tensors="pt"), given)
            on_batch(len(chosen))
    return exit_logits


def _every_exit(model: Any, inputs: Any, lexical_logits: Any) -> Any:
    """Logits (rows, exits, labels) of a padded batch, in numpy."""
    if isinstance(model, BadgePredictor):
        if lexical_logits is not None:
            raise ValueError("lexical_logits can be given to a BadgeForSequenceClassification alone.")
        return model.early_exit_predict(**inputs, policy=ExitPolicy(), output_exit_logits=True).exit_logits
    inputs = inputs.to(model.device)
    if lexical_logits is not None:
        inputs["lexical_logits"] = torch.as_tensor(lexical_logits, device=model.device)
    return model.to_host(model(**inputs).exit_logits)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout, which an exported model has not."""
    was_training = not isinstance(model, BadgePredictor) and model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def digest_model(model: Any) -> str:
    """A digest of a model's weights, to tell whether an exit table is its own; the exit policy has no part in it."""
    if isinstance(model, BadgePredictor):
        return model.digest
    return weights_digest(model.state_dict())


def check_table_of_model(table: ExitTable, model: Any) -> None:
    """See that a table was made with this model.

    Raises:
        ValueError: other weights, exits or labels; the message says which.
    """
    names = tuple(model.config.id2label[index] for index in range(model.num_labels))
    mine = {"exit layers": tuple(model.exit_layers), "labels": names, "weights": digest_model(model)}
    theirs = {"exit layers": table.exit_layers, "labels": table.label_names, "weights": table.model or mine["weights"]}
    for what, value in mine.items():
        if theirs[what] != value:
            raise ValueError(
                f"The exit table is of another model: its {what} are {theirs[what]}, this one's {value}. Make it anew "
                "with transformers-badge evaluate."
            )
