"""What the commands that work on rows share: a checkpoint, rows with or without labels, their exit table."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Rows:
    """Texts, one list per column, and class indices, if there are any."""

    columns: list[list[str]]
    labels: list[int] | None


def load_model(checkpoint: str, workers: int = 1) -> tuple[Any, Any]:
    """A BADGE model, in eval mode, or an export of one; and its tokenizer.

    Args:
        checkpoint: a folder or a hub name.
        workers: of an export, see `BadgePredictor.from_pretrained`.

    Raises:
        OSError: nothing could be loaded.
        ValueError: it is another kind of model, or no export and there are to be several workers.
    """
    from transformers_badge.inference.predictor import MANIFEST, BadgePredictor

    if (Path(checkpoint) / MANIFEST).is_file():
        predictor = BadgePredictor.from_pretrained(checkpoint, workers=workers)
        return predictor, predictor.tokenizer
    if workers > 1:
        raise ValueError(f"--workers is for exports, which {checkpoint} is not: make one with export.")
    from transformers import AutoConfig, AutoTokenizer

    from transformers_badge import BadgeForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except OSError as error:
        raise OSError(f"No checkpoint could be loaded from {checkpoint}: {error}") from error
    if config.model_type != "badge":
        raise ValueError(f"{checkpoint} is a {config.model_type!r} checkpoint, not a BADGE one: make one with train.")
    model = BadgeForSequenceClassification.from_pretrained(checkpoint).eval()
    return model, AutoTokenizer.from_pretrained(checkpoint)


def read_rows(data: str, text_column: list[str], label_column: str | None, model: Any) -> Rows:
    """Rows of a file or a data set, with labels where there is a column of them.

    Raises:
        OSError, ValueError: rows that cannot be read, or a model that predicts no classes.
    """
    from transformers_badge.model.loss_badge import infer_problem_type
    from transformers_badge.training.data import class_indices, load_table, text_columns

    problem_type = infer_problem_type(model.config.problem_type, model.num_labels, None)
    several = problem_type == "multi_label_classification"
    if problem_type == "regression":
        raise ValueError(
            "This model predicts a number, for which it always runs at full depth: there is nothing to choose or to "
            "compare. transformers-badge predict takes it."
        )
    if several and label_column is not None:
        raise ValueError(
            "The labels of a model that gives a row several are not read from a file: leave --label-column out, or "
            "make an exit table with labels in Python (make_exit_table), save it, and give that."
        )
    table = load_table(data, skip_blank_lines=True)
    columns = text_columns(table, text_column, data)
    if label_column is None and "label" in table.column_names and not several:
        label_column = "label"
    if label_column is None:
        return Rows(columns, None)
    names = [model.config.id2label[index] for index in range(model.num_labels)]
    return Rows(columns, class_indices(table, label_column, names, data))


def rows_or_table(checkpoint: str, model: Any, tokenizer: Any, data: str, rows: Rows | None, batch_size: int) -> Any:
    """The exit table of rows, by running the model; or the one in a file, once it is known to be this model's."""
    from tqdm.auto import tqdm

    from transformers_badge.exit_table import ExitTable
    from transformers_badge.hub.training_rows import share_trained_on
    from transformers_badge.inference.exit_logits import check_table_of_model, make_exit_table

    if rows is None:
        table = ExitTable.load(data)
        check_table_of_model(table, model)
    else:
        with tqdm(total=len(rows.columns[0]), desc="every exit's answers", unit="row") as bar:
            table = make_exit_table(
                model, tokenizer, rows.columns, rows.labels, batch_size=batch_size, on_batch=bar.update
            )
    share = share_trained_on(Path(checkpoint), table)
    if share:
        warnings.warn(
            f"About {share:.0%} of the rows were trained on: exits look better on those than they are, and a guarantee "
            "does not hold. Give other rows.",
            stacklevel=2,
        )
    return table
