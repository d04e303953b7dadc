"""Exits that are taught by the last one: on which rows, and how it is done after a fine-tuning."""

import copy
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from transformers_badge.model.loss_badge import infer_problem_type
from transformers_badge.training.answers import as_answers, last_logits
from transformers_badge.training.fine_tune import FILL_UP_TO, check_above_zero, run_stage, special_ids
from transformers_badge.training.lexical import fit_lexical_exit, text_folds
from transformers_badge.training.phrases import fit_phrases
from transformers_badge.training.pieces import fill_up
from transformers_badge.training.recipes import TEACHING


PHRASE_ROWS = 3  # times as many rows as the exits learn from, for the phrases: they start from nothing


def teach_exits(
    model: Any,
    tokenizer: Any,
    rows: Any,
    *,
    epochs: float = 3,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    fill_up_to: int = FILL_UP_TO,
    seed: int = 0,
) -> Any:
    """Let a fine-tuned model's last exit teach the others; its encoder and the last exit stay as they are.

    The last exit can answer any text, so the others see more texts than there are labels for. Of an exit 0 the filters
    are taught; the n-grams stay as they are, for they have learnt from labels (fitted anew, to answers of the last
    exit, they were no better). What these say enters all exits, also if the fine-tuning was without them.

    Args:
        model: a `BadgeForSequenceClassification` that has been fine-tuned.
        tokenizer: of its encoder.
        rows: the rows that it was fine-tuned on, a `datasets.Dataset` with `input_ids`, not padded.
        epochs: passes over the rows.
        learning_rate: peak rate of bypasses and exits.
        batch_size: rows per step.
        fill_up_to: rows, reached with made-up ones where there are fewer (`pieces.fill_up`).
        seed: of everything random.

    Returns:
        The rows that they were taught on: those given and, behind them, those made up. With `lexical_logits`, as from
        `fit_lexical_exit`, if the model has an exit 0.

    Raises:
        ValueError: the model has no inner exit, or none with a weight in the loss; a setting is not above 0; an exit 0
            has not been fitted, or there are too few rows for it.

    Example:
        >>> trainer.train()
        >>> teach_exits(model, tokenizer, train)
    """
    check_above_zero(epochs=epochs, learning_rate=learning_rate, batch_size=batch_size)
    learning = any(model.config.loss_weights[:-1])
    if not (learning or model.config.phrase_filters):
        raise ValueError(
            f"There is no exit to teach: exit_layers={model.exit_layers} and exit_loss_weights="
            f"{model.config.exit_loss_weights!r} leave none before the last one that learns."
        )
    if model.config.lexical_exit and not model.exits[0].fitted:
        raise ValueError("Exit 0 has not been fitted: call fit_lexical_exit, best before the model is fine-tuned.")
    taught = teaching_rows(model, tokenizer, rows, fill_up_to, seed)
    rows = fit_phrases_first(model, tokenizer, taught, seed)
    if learning:
        with tempfile.TemporaryDirectory() as folder:
            run_stage(
                TEACHING,
                model,
                tokenizer,
                rows,
                None,
                Path(folder),
                epochs=epochs,
                new_learning_rate=learning_rate,
                batch_size=batch_size,
                seed=seed,
            )
    model.eval()
    return rows


@dataclass(frozen=True)
class TeachingRows:
    """Rows that the exits of a model are taught on, tokenized, each a `datasets.Dataset`.

    Args:
        all: those given and, behind them, those made up. The phrases learn from all.
        folds: of all; pieces of texts come together in rows of one fold alone. `None`: there is nothing made up.
        exits: how many of them, from the first, the other exits learn from.
    """

    all: Any
    folds: Any
    exits: int

    @property
    def for_exits(self) -> Any:
        """Those that exits learn from."""
        return self.all.select(range(self.exits))


def teaching_rows(model: Any, tokenizer: Any, rows: Any, fill_up_to: int, seed: int = 0) -> TeachingRows:
    """The rows that the exits of a model are taught on, with what exit 0 says of each.

    Args:
        model: stays as it is; but an exit 0 that has not been fitted is.
        rows: those of the fine-tuning, a `datasets.Dataset` with `input_ids`.
        fill_up_to: rows, reached with made-up ones where there are fewer.
        seed: of what is made up, and of the folds.

    Returns:
        Rows without labels: the last exit alone says what is learnt. With `lexical_logits` if the model has an exit 0,
        from one fitted to rows of other folds.
    """
    filled = filled_rows(model, tokenizer, rows, fill_up_to, seed)
    taught = filled.all
    if model.config.lexical_exit and "lexical_logits" not in taught.column_names:
        problem_type = infer_problem_type(model.config.problem_type, model.num_labels, None)
        labelled = "labels" in rows.column_names
        targets = rows["labels"] if labelled else as_answers(last_logits(model, tokenizer, rows), problem_type)
        fitted = copy.deepcopy(model.exits[0].state_dict()) if model.exits[0].fitted else None
        taught = fit_lexical_exit(model, tokenizer, taught, targets, folds=filled.folds, seed=seed)
        if fitted is not None:
            model.exits[0].load_state_dict(fitted)
    return replace(filled, all=taught.remove_columns("labels") if "labels" in taught.column_names else taught)


def fit_phrases_first(model: Any, tokenizer: Any, taught: TeachingRows, seed: int) -> Any:
    """The rows that the other exits learn from, with what phrases say of them, once these are fitted to all rows."""
    return replace(taught, all=fit_phrases(model, tokenizer, taught.all, taught.folds, seed=seed)).for_exits


def filled_rows(model: Any, tokenizer: Any, rows: Any, fill_up_to: int, seed: int) -> TeachingRows:
    """Rows and, where there are fewer than so many, made-up ones behind them, tokens and no more."""
    from datasets import concatenate_datasets

    most = fill_up_to * (PHRASE_ROWS if model.config.phrase_filters else 1)
    if len(rows) >= most:
        return TeachingRows(rows, None, len(rows))
    tokens = [name for name in tokenizer.model_input_names if name in rows.column_names]
    rows, special = rows.select_columns(tokens).with_format(None), special_ids(tokenizer)
    # Pieces of texts that exit 0 is not fitted to in a fold must not come in by another text of the fold.
    folds = text_folds(rows["input_ids"], seed)
    filled, filled_folds = fill_up(rows, folds, special, fill_up_to, seed)
    given, exits = len(rows), len(filled)
    if exits == most:
        return TeachingRows(filled, filled_folds, exits)
    # Those for the phrases alone are drawn apart: the exits see the same rows with phrases and without.
    more, more_folds = fill_up(rows, folds, special, given + most - exits, seed + 1)
    return TeachingRows(
        concatenate_datasets([filled, more.select(range(given, len(more)))]),
        np.concatenate([filled_folds, more_folds[given:]]),
        exits,
    )
