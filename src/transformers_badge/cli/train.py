"""`transformers-badge train`."""

from pathlib import Path
from typing import Annotated

import typer

from transformers_badge.training.fine_tune import FILL_UP_TO


def train(
    encoder: Annotated[str, typer.Argument(help="Pretrained encoder: a folder or a hub name.")],
    data: Annotated[str, typer.Argument(help="CSV, TSV, JSONL or Parquet file, or the name of a data set.")],
    output_dir: Annotated[Path, typer.Option(help="Where the checkpoint goes.")],
    text_column: Annotated[list[str], typer.Option(help="Column with the text; give it twice for pairs.")] = ["text"],  # noqa: B006
    label_column: Annotated[str, typer.Option(help="Column with the class, or with a fraction to predict.")] = "label",
    validation: Annotated[str | None, typer.Option(help="File to evaluate on. Default: a tenth of the data.")] = None,
    max_accuracy_drop: Annotated[
        float | None,
        typer.Option(help="Certify an exit threshold on the validation rows for at most this drop, such as 0.01."),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="How to train the exits: taught, joint, two_stage, mixed, alternating, self_distilled, rescaled, "
            "separated."
        ),
    ] = "taught",
    exit_layers: Annotated[str | None, typer.Option(help="Depths with an exit, such as 2,4,6. Default: all.")] = None,
    lexical_exit: Annotated[
        bool, typer.Option(help="An exit before the first block, which reads the words alone.")
    ] = True,
    lexical_filters: Annotated[
        int, typer.Option(min=0, help="Filters over word vectors at that exit, such as 64; 0: none.")
    ] = 0,
    bypass_size: Annotated[int | None, typer.Option(help="Width of the bypasses; 0: none. Default: hidden/3.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the training rows.")] = 3,
    fill_up_to: Annotated[
        int, typer.Option(min=0, help="Recipe taught: so many rows are reached with made-up texts; 0: none.")
    ] = FILL_UP_TO,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the encoder.")] = 5e-5,
    new_learning_rate: Annotated[float, typer.Option(help="The same, of bypasses and exits.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Fine-tune an encoder with exits after its blocks.

    Example: transformers-badge train google-bert/bert-base-uncased reviews.csv --output-dir badge-reviews
    --max-accuracy-drop 0.01
    """
    from transformers import AutoTokenizer, set_seed

    from transformers_badge import BadgeForSequenceClassification
    from transformers_badge.calibration.calibrate import calibrate
    from transformers_badge.hub.checkpoint import save_checkpoint, write_policy
    from transformers_badge.inference.exit_logits import make_exit_table
    from transformers_badge.inference.predict import token_limit
    from transformers_badge.training.data import labelled_rows, load_table
    from transformers_badge.training.fine_tune import (
        check_above_zero,
        check_output_directory,
        check_share,
        fit,
        tokenize,
    )
    from transformers_badge.training.recipes import get_recipe

    get_recipe(recipe)
    check_above_zero(epochs=epochs, learning_rate=learning_rate, new_learning_rate=new_learning_rate)
    if max_accuracy_drop is not None:
        check_share(max_accuracy_drop=max_accuracy_drop)
    layers = parse_depths(exit_layers)
    table = load_table(data)
    rows = labelled_rows(table, text_column, label_column, data)
    if validation is None:
        if len(table) < 10:
            raise ValueError(f"{data} has {len(table)} rows: give at least 10, or a file of its own for --validation.")
        parts = table.train_test_split(test_size=0.1, seed=seed)
        rows = labelled_rows(parts["train"], text_column, label_column, data, rows.names)
        held_out = labelled_rows(parts["test"], text_column, label_column, data, rows.names)
    else:
        held_out = labelled_rows(load_table(validation), text_column, label_column, validation, rows.names)
    if rows.names is None and max_accuracy_drop is not None:
        raise ValueError("--max-accuracy-drop needs classes: the labels of this file are values to predict.")

    set_seed(seed)
    names = {"num_labels": 1} if rows.names is None else {
        "id2label": dict(enumerate(rows.names)), "label2id": {name: i for i, name in enumerate(rows.names)}
    }  # fmt: skip
    model = BadgeForSequenceClassification.from_encoder(
        encoder,
        exit_layers=layers,
        bypass_size=bypass_size,
        lexical_exit=lexical_exit,
        lexical_filters=lexical_filters,
        problem_type="regression" if rows.names is None else "single_label_classification",
        **names,
    )
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    check_output_directory(output_dir)
    limit = token_limit(model, tokenizer)
    trainer = fit(
        model,
        tokenizer,
        tokenize(tokenizer, rows.columns, rows.labels, limit),
        tokenize(tokenizer, held_out.columns, held_out.labels, limit),
        output_dir,
        recipe=recipe,
        epochs=epochs,
        fill_up_to=fill_up_to,
        learning_rate=learning_rate,
        new_learning_rate=new_learning_rate,
        batch_size=batch_size,
        seed=seed,
    )
    result = trainer.predict(trainer.eval_dataset)
    for name, value in result.metrics.items():
        if "accuracy" in name or "mse" in name:
            typer.echo(f"{name.removeprefix('test_')}: {value:.4f}")
    # Before a threshold is looked for, so that what was trained is not lost, whatever happens there.
    save_checkpoint(output_dir, model, tokenizer, rows.columns)
    typer.echo(f"Saved {output_dir}; predict with: transformers-badge predict {output_dir} FILE --output OUT.jsonl")
    if max_accuracy_drop is not None:
        held_out_table = make_exit_table(model, tokenizer, held_out.columns, held_out.labels)
        policy = calibrate(held_out_table, risk="error_increase", max_risk=max_accuracy_drop)
        assert policy.certificate is not None
        write_policy(output_dir, policy)
        typer.echo(policy.certificate["summary"])


def parse_depths(text: str | None) -> list[int] | None:
    """The value of --exit-layers.

    Raises:
        ValueError: something in it is no whole number.
    """
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--exit-layers takes whole numbers separated by commas, such as 2,4,6, got {text!r}."
        ) from None
