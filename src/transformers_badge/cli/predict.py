"""`transformers-badge predict`."""

from pathlib import Path
from typing import Annotated

import typer


def predict(
    checkpoint: Annotated[str, typer.Argument(help="A BADGE checkpoint: a folder or a hub name.")],
    data: Annotated[str, typer.Argument(help="CSV, TSV, JSONL, Parquet or text file, or the name of a data set.")],
    output: Annotated[
        Path, typer.Option(help="JSONL file to write: a line per row, with label, score and exit_layer.")
    ],
    text_column: Annotated[list[str], typer.Option(help="Column with the text; give it twice for pairs.")] = ["text"],  # noqa: B006
    threshold: Annotated[
        float | None, typer.Option(help="Leave at a score of at most this. Default: the checkpoint's policy.")
    ] = None,
    criterion: Annotated[
        str | None, typer.Option(help="As in docs/exit-policies.md. Default: the checkpoint's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch; no answer depends on it.")] = 32,
    workers: Annotated[
        int, typer.Option(min=1, help="Of an export: how many batches run side by side, each with one thread.")
    ] = 1,
) -> None:
    """Classify the rows of a file, each at the first exit that is ready.

    Example: transformers-badge predict badge-reviews new.csv --output answers.jsonl --threshold 0.3
    """
    import json
    import os

    from tqdm.auto import tqdm

    from transformers_badge.cli.tables import load_model
    from transformers_badge.inference.predict import predict_texts
    from transformers_badge.training.data import load_table, text_columns
    from transformers_badge.training.fine_tune import check_output_directory

    model, tokenizer = load_model(checkpoint, workers)
    columns = text_columns(load_table(data), text_column, data)
    check_output_directory(output.parent)
    given = {"threshold": threshold, "criterion": criterion}
    overrides = {name: value for name, value in given.items() if value is not None}

    texts = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
    unfinished = output.with_name(output.name + ".unfinished")
    layers = 0
    try:
        with tqdm(total=len(texts), unit="row") as bar, unfinished.open("w", encoding="utf-8") as file:
            answers = predict_texts(model, tokenizer, texts, batch_size, bar.update, **overrides)
            for text, answer in zip(texts, answers, strict=True):
                layers += answer["exit_layer"]
                file.write(json.dumps({"text": text, **answer}, ensure_ascii=False) + "\n")
        os.replace(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    mean, blocks = layers / len(texts), model.exit_layers[-1]
    typer.echo(f"Wrote {len(texts)} rows to {output}; mean exit layer {mean:.2f} of {blocks}.")
