"""`transformers-badge evaluate`."""

from pathlib import Path
from typing import Annotated, Any

import typer


TIMED_ROWS, TIMED_BATCH = 128, 32


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A BADGE checkpoint: a folder or a hub name.")],
    data: Annotated[
        str, typer.Argument(help="CSV, TSV, JSONL, Parquet or text file, the name of a data set, or an exit table.")
    ],
    output_dir: Annotated[Path, typer.Option(help="Where the exit table, the record, the page and the pictures go.")],
    text_column: Annotated[list[str], typer.Option(help="Column with the text; give it twice for pairs.")] = ["text"],  # noqa: B006
    label_column: Annotated[
        str | None, typer.Option(help="Column with the class. Default: 'label', if there is such a column.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch; no answer depends on it.")] = 64,
    timing: Annotated[bool, typer.Option(help="Time every criterion at some thresholds, too.")] = True,
) -> None:
    """Draw what every criterion would save and cost on some rows; the labels may be missing.

    Example: transformers-badge evaluate badge-reviews test.csv --output-dir evaluation
    """
    from rich.console import Console
    from rich.table import Column, Table

    from transformers_badge.cli.tables import load_model, read_rows, rows_or_table
    from transformers_badge.evaluation.curves import LOSSES
    from transformers_badge.evaluation.record import evaluate_table
    from transformers_badge.evaluation.report import policy_sentence, write_report
    from transformers_badge.evaluation.timing import describe_machine
    from transformers_badge.training.fine_tune import check_output_directory

    model, tokenizer = load_model(checkpoint)
    rows = None if data.endswith(".safetensors") else read_rows(data, text_column, label_column, model)
    check_output_directory(output_dir)
    table = rows_or_table(checkpoint, model, tokenizer, data, rows, batch_size)
    if rows is not None:
        table.save(output_dir / "exit_table.safetensors")
    console = Console()
    with console.status("replaying every criterion"):
        texts = None if rows is None else [r[0] if len(r) == 1 else r for r in zip(*rows.columns, strict=True)]
        record = evaluate_table(table, model.config.exit_policy, texts)
    record["checkpoint"] = Path(checkpoint).name
    if timing and rows is not None:
        record["machine"] = describe_machine()
        record["timing"] = _time(model, tokenizer, rows, table)
    files = write_report(record, output_dir)
    shown = Table(Column("criterion", no_wrap=True), *[f"lost <= {100 * loss:g}" for loss in LOSSES], "area")
    for name, entry in sorted(record["criteria"].items(), key=lambda entry: -entry[1]["area"]):
        speedups = [f"{entry['speedup_at_loss'][str(loss)]:.2f}x" for loss in LOSSES]
        shown.add_row(name, *speedups, f"{100 * entry['area']:.2f}")
    console.print(f"Layer speedup at which so many points of {record['measure']} are lost, on {len(table):,} rows:")
    console.print(shown)
    console.print(policy_sentence(record))
    console.print(f"Wrote {', '.join(files)} to {output_dir}.")


def _time(model: Any, tokenizer: Any, rows: Any, table: Any) -> dict[str, Any]:
    from tqdm.auto import tqdm

    from transformers_badge.calibration.fitting import fit_rule
    from transformers_badge.evaluation.curves import compared_policies, goal_of
    from transformers_badge.evaluation.timed import ROUNDS, time_policies
    from transformers_badge.inference.predict import token_limit
    from transformers_badge.model.policy_badge import ExitPolicy

    policies = compared_policies(len(model.exit_layers))
    stored = model.config.exit_policy
    if stored.criterion != "learned":
        stored = ExitPolicy(criterion="learned", rule=fit_rule(table, goal=goal_of(table)))
    policies["learned"] = stored
    columns = [column[:TIMED_ROWS] for column in rows.columns]
    limit, device = token_limit(model, tokenizer), getattr(model, "device", "cpu")
    batches = [
        tokenizer(
            *[column[start : start + TIMED_BATCH] for column in columns],
            padding=True, truncation=True, max_length=limit, return_tensors="pt",
        ).to(device)
        for start in range(0, len(columns[0]), TIMED_BATCH)
    ]  # fmt: skip
    with tqdm(total=ROUNDS + 1, desc="timing", unit="round") as bar:
        timed = time_policies(model, batches, table, policies, on_round=bar.update)
    return {"rows": len(columns[0]), "batch_size": TIMED_BATCH, "rounds": ROUNDS, **timed}
