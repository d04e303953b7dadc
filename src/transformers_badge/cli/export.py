"""`transformers-badge export`."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[str, typer.Argument(help="A BADGE checkpoint: a folder or a hub name.")],
    engine: Annotated[str, typer.Option(help="What will run it: onnxruntime.")] = "onnxruntime",
    precision: Annotated[
        str, typer.Option(help="fp32: the same answers. int8: faster, and nearly the same; calibrate the export.")
    ] = "fp32",
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Where it goes. Default: CHECKPOINT/ENGINE-PRECISION; an export there is replaced."),
    ] = None,
) -> None:
    """Write a checkpoint for a fast engine; predict, calibrate and evaluate take the export as they take a checkpoint.

    Example: transformers-badge export badge-reviews --precision int8
    """
    from rich.console import Console

    from transformers_badge.cli.tables import load_model
    from transformers_badge.hub.training_rows import FILE
    from transformers_badge.inference.onnx_export import export_onnx
    from transformers_badge.inference.predictor import BadgePredictor, digest_weights, export_name

    if engine != "onnxruntime":
        raise ValueError(f"engine must be onnxruntime, the one that needs an export, got {engine!r}.")
    model, tokenizer = load_model(checkpoint)
    if isinstance(model, BadgePredictor):
        raise ValueError(f"{checkpoint} is an export already: give the checkpoint that it was made of.")
    source = Path(checkpoint) if Path(checkpoint).is_dir() else None
    if output_dir is None:
        if source is None:
            raise ValueError(f"{checkpoint} is on the hub: say with --output-dir where the export goes.")
        output_dir = source / export_name(precision)
    with Console().status(f"exporting {len(model.exit_layers)} exits, and comparing their answers with the model's"):
        export_onnx(
            model,
            tokenizer,
            output_dir,
            precision,
            source=None if source is None else digest_weights(source),
            also=[source / FILE] if source is not None and (source / FILE).exists() else [],
        )
    size = sum(path.stat().st_size for path in output_dir.iterdir()) / 2**20
    typer.echo(f"Wrote {output_dir} ({size:,.0f} MiB); load it with BadgePredictor.from_pretrained.")
    if precision == "int8" and model.config.exit_policy.threshold is not None:
        typer.echo(
            f"Its exits are not quite the checkpoint's: choose its threshold anew with transformers-badge calibrate "
            f"{output_dir} TEXTS."
        )
