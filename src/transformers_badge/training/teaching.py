"""Exits that are taught by the last one: on which rows, and how it is done after a fine-tuning."""

import copy
import tempfile
from pathlib import Path
from typing import Any

from transformers_badge.model.loss_badge import infer_problem_type
from transformers_badge.training.fine_tune import FILL_UP_TO, check_above_zero, run_stage, special_ids
from transformers_badge.training.lexical import fit_lexical_exit, text_folds
from transformers_badge.training.pieces import fill_up
from transformers_badge.training.recipes import TEACHING


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

    The last exit can answer any text, so the others see more texts than there are labels for. An exit 0 stays as it is
    too: it has learnt from labels (fitted anew, to answers of the last exit, it was no better). What it says enters all
    exits, also if the fine-tuning was without it.

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
    if not any(model.config.loss_weights[:-1]):
        raise ValueError(
            f"There is no exit to teach: exit_layers={model.exit_layers} and exit_loss_weights="
            f"{model.config.exit_loss_weights!r} leave none before the last one that learns."
        )
    if model.config.lexical_exit and not model.exits[0].fitted:
        raise ValueError("Exit 0 has not been fitted: call fit_lexical_exit, best before the model is fine-tuned.")
    rows = teaching_rows(model, tokenizer, rows, fill_up_to, seed)
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


def teaching_rows(model: Any, tokenizer: Any, rows: Any, fill_up_to: int, seed: int = 0) -> Any:
    """The rows that the exits of a model are taught on, with what exit 0 says of each.

    Args:
        model: stays as it is; but an exit 0 that has not been fitted is.
        rows: those of the fine-tuning, a `datasets.Dataset` with `input_ids`.
        fill_up_to: rows, reached with made-up ones where there are fewer.
        seed: of what is made up, and of the folds.

    Returns:
        The rows and, behind them, those made up, without labels: the last exit alone says what is learnt. With
        `lexical_logits` if the model has an exit 0, from one fitted to rows of other folds.
    """
    filled, folds = filled_rows(tokenizer, rows, fill_up_to, seed)
    if model.config.lexical_exit and "lexical_logits" not in filled.column_names:
        targets = rows["labels"] if "labels" in rows.column_names else last_answers(model, rows)
        fitted = copy.deepcopy(model.exits[0].state_dict()) if model.exits[0].fitted else None
        filled = fit_lexical_exit(model, tokenizer, filled, targets, folds=folds, seed=seed)
        if fitted is not None:
            model.exits[0].load_state_dict(fitted)
    return filled.remove_columns("labels") if "labels" in filled.column_names else filled


def filled_rows(tokenizer: Any, rows: Any, fill_up_to: int, seed: int) -> tuple[Any, Any]:
    """Rows and, where there are fewer than so many, made-up ones behind them, tokens and no more; and their folds."""
    if len(rows) >= fill_up_to:
        return rows, None
    tokens = [name for name in tokenizer.model_input_names if name in rows.column_names]
    rows = rows.select_columns(tokens).with_format(None)
    # Pieces of texts that exit 0 is not fitted to in a fold must not come in by another text of the fold.
    return fill_up(rows, text_folds(rows["input_ids"], seed), special_ids(tokenizer), fill_up_to, seed)


def last_answers(model: Any, rows: Any) -> Any:
    """What the last exit says of tokenized rows, (rows, labels): probabilities, or the values of a regression."""
    import torch
    from tqdm.auto import tqdm

    from transformers_badge.model.policy_badge import ExitPolicy

    problem_type = infer_problem_type(model.config.problem_type, model.num_labels, None)
    at_full_depth = model.early_exit_stream(rows, batch_size=64, policy=ExitPolicy())
    stacked = [row.logits for row in tqdm(at_full_depth, "answers of the last exit", len(rows), unit="row")]
    logits = torch.stack(stacked).double()
    if problem_type == "single_label_classification":
        logits = logits.softmax(dim=-1)
    elif problem_type == "multi_label_classification":
        logits = logits.sigmoid()
    return logits.numpy()
