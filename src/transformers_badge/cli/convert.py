"""`transformers-badge convert`."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    model: Annotated[str, typer.Argument(help="A fine-tuned sequence classifier: a folder or a hub name.")],
    texts: Annotated[str, typer.Option(help="Text file, a text a line; or CSV, TSV, JSONL, Parquet, or a data set.")],
    output_dir: Annotated[Path, typer.Option(help="Where the checkpoint goes; must not exist yet.")],
    text_column: Annotated[list[str], typer.Option(help="Column with the text; give it twice for pairs.")] = ["text"],  # noqa: B006
    label_column: Annotated[
        str | None, typer.Option(help="Column with the class, if there is one. Default: none, no labels are needed.")
    ] = None,
    max_disagreement: Annotated[
        float, typer.Option(help="Share of answers that may differ from the model's own at full depth.")
    ] = 0.01,
    criterion: Annotated[str, typer.Option(help="When to leave; docs/exit-policies.md lists them.")] = "learned",
    exit_layers: Annotated[str | None, typer.Option(help="Depths with an exit, such as 2,4,6. Default: all.")] = None,
    lexical_exit: Annotated[
        bool, typer.Option(help="An exit before the first block, which reads the words alone; docs/exit-zero.md.")
    ] = False,
    lexical_filters: Annotated[
        int, typer.Option(min=0, help="Filters over word vectors at that exit, such as 64; 0: none.")
    ] = 0,
    bypass_size: Annotated[int | None, typer.Option(help="Width of the bypasses; 0: none. Default: hidden/3.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the texts.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of bypasses and exits.")] = 1e-3,
    temperature: Annotated[float, typer.Option(help="Temperature of the answers that the exits learn.")] = 1.0,
    max_tokens: Annotated[int | None, typer.Option(help="Cut texts at this many tokens. Default: the model's.")] = None,
    fill_up_to: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Rows to train on, filled up with made-up ones where texts are few. Default: 10000; 0 with labels.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Make an early-exit model of a fine-tuned classifier, without labels; at full depth it answers as before.

    Interrupted, the same command goes on where it was.

    Example: transformers-badge convert my-classifier --texts traffic.txt --output-dir my-classifier-badge
    """
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoConfig

    from transformers_badge.cli.train import parse_depths
    from transformers_badge.evaluation.timing import with_spread
    from transformers_badge.training.convert import convert_classifier, texts_needed
    from transformers_badge.training.data import class_indices, load_table, text_columns

    depths = parse_depths(exit_layers)
    table = load_table(texts, skip_blank_lines=True)
    columns = text_columns(table, text_column, texts)
    if len(columns[0]) < texts_needed(max_disagreement):
        typer.echo(
            f"Note: {len(columns[0])} texts cannot show a disagreement of at most {max_disagreement:.2%}, for which "
            f"{texts_needed(max_disagreement):,.0f} are needed: the model will run at full depth.",
            err=True,
        )
    labels = None
    if label_column is not None:
        id2label = AutoConfig.from_pretrained(model).id2label
        labels = class_indices(table, label_column, [id2label[i] for i in range(len(id2label))], texts)
    report = convert_classifier(
        model,
        columns[0] if len(columns) == 1 else list(zip(*columns, strict=True)),
        output_dir,
        labels=labels,
        max_disagreement=max_disagreement,
        criterion=criterion,
        epochs=epochs,
        learning_rate=learning_rate,
        temperature=temperature,
        max_tokens=max_tokens,
        fill_up_to=fill_up_to,
        batch_size=batch_size,
        seed=seed,
        exit_layers=depths,
        bypass_size=bypass_size,
        lexical_exit=lexical_exit,
        lexical_filters=lexical_filters,
    )
    console, rows = Console(), report["rows"]
    exits = Table("exit", *[str(layer) for layer in report["exit_layers"]])
    exits.add_row("answers as the last exit does", *[f"{100 * share:.1f} %" for share in report["exit_agreement"]])
    console.print(exits)
    console.print(report["policy"]["certificate"]["summary"])
    if report["policy"]["threshold"] is not None:
        console.print(
            f"On {rows['reported']} other texts, neither trained on nor used for the threshold: "
            f"{report['disagreement']:.2%} of the answers differ from full depth; mean exit layer "
            f"{report['mean_exit_layer']:.2f} of {report['exit_layers'][-1]}, a layer speedup of "
            f"{report['layer_speedup']:.2f}x; in seconds {with_spread(report['wall_clock_speedup'])} "
            "over the source, in batches of 32."
        )
    console.print(f"Saved {output_dir}; predict with: transformers-badge predict {output_dir} FILE --output OUT.jsonl")
