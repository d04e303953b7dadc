"""`transformers-badge calibrate`."""

from typing import Annotated

import typer


def calibrate(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a BADGE checkpoint; the policy is written into it.")],
    data: Annotated[
        str,
        typer.Argument(
            help="Rows like those to come, that it was not trained on: a file, a data set, or an exit table."
        ),
    ],
    risk: Annotated[
        str,
        typer.Option(
            help="disagreement: the share of answers that differ from full depth; needs no labels. "
            "error_increase: how much the share of wrong answers grows."
        ),
    ] = "disagreement",
    max_risk: Annotated[float, typer.Option(help="The risk is to be at most this share.")] = 0.01,
    confidence: Annotated[float, typer.Option(help="How sure that has to be.")] = 0.95,
    min_class_accuracy: Annotated[
        float | None, typer.Option(help="Besides, the accuracy within every class is to be at least this.")
    ] = None,
    target_speedup: Annotated[
        float | None, typer.Option(help="Instead: as little risk as can be had at this layer speedup.")
    ] = None,
    criterion: Annotated[str, typer.Option(help="When to leave; docs/exit-policies.md lists them.")] = "learned",
    per_exit: Annotated[bool, typer.Option("--per-exit", help="Search a threshold for every exit.")] = False,
    temperature: Annotated[bool, typer.Option("--temperature", help="Fit a temperature for every exit first.")] = False,
    refit: Annotated[
        bool, typer.Option("--refit", help="Learn the rule of the learned criterion anew, from some of the rows.")
    ] = False,
    text_column: Annotated[list[str], typer.Option(help="Column with the text; give it twice for pairs.")] = ["text"],  # noqa: B006
    label_column: Annotated[
        str | None, typer.Option(help="Column with the class. Default: 'label', if there is such a column.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch; no answer depends on it.")] = 64,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
) -> None:
    """Choose the threshold of a checkpoint with a guarantee, and write it into the checkpoint with its certificate.

    Where nothing meets the demand, nothing is written.

    Example: transformers-badge calibrate badge-reviews traffic.txt --max-risk 0.01
    """
    import warnings

    from transformers_badge.calibration.calibrate import calibrate as choose
    from transformers_badge.calibration.calibrate import check_demand
    from transformers_badge.cli.tables import load_model, read_rows, rows_or_table
    from transformers_badge.hub.checkpoint import check_checkpoint_folder, write_policy

    # All that can be wrong with the demand is said before the model runs, which can take long.
    demand = check_demand(criterion, risk, max_risk, confidence, min_class_accuracy, target_speedup)
    folder = check_checkpoint_folder(checkpoint)
    model, tokenizer = load_model(checkpoint)
    rows = None if data.endswith(".safetensors") else read_rows(data, text_column, label_column, model)
    if rows is not None:
        demand.check_labels(rows.labels)
    table = rows_or_table(checkpoint, model, tokenizer, data, rows, batch_size)
    stored = model.config.exit_policy
    start = stored if criterion == "learned" and stored.criterion == "learned" and not refit else criterion
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the summary is printed, whatever it says
        policy = choose(
            table,
            start,
            risk=risk,  # type: ignore[arg-type]
            max_risk=max_risk,
            confidence=confidence,
            min_class_accuracy=min_class_accuracy,
            target_speedup=target_speedup,
            per_exit=per_exit,
            temperature=temperature,
        )
    assert policy.certificate is not None
    typer.echo(policy.certificate["summary"])
    if not policy.certificate["met"]:
        typer.echo(f"Nothing was written: {folder} keeps the policy that it had.")
    elif dry_run:
        typer.echo(f"This would be written into {folder}: {policy.to_dict()}")
    else:
        write_policy(folder, policy)
        typer.echo(f"Written into {folder}: early_exit_predict and pipelines use it from now on.")
