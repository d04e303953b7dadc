"""`transformers-badge benchmark`."""

from pathlib import Path
from typing import Annotated, Any

import typer


def benchmark(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a BADGE checkpoint.")],
    data: Annotated[
        str, typer.Option(help="Rows to measure on: CSV, TSV, JSONL, Parquet or text file, or a data set.")
    ],
    output_dir: Annotated[Path, typer.Option(help="Where the record, the tables and the picture go.")],
    calibrate: Annotated[
        str | None,
        typer.Option(help="Other rows with labels, to choose each engine's threshold. Default: the checkpoint's."),
    ] = None,
    max_lost: Annotated[float, typer.Option(min=0, help="With --calibrate: points of accuracy it may lose.")] = 1.0,
    batch_sizes: Annotated[
        list[int] | None, typer.Option("--batch-size", min=1, help="Repeat for several. Default: 1, 8, 32, 128.")
    ] = None,
    engines: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            help="eager, fp32, int8 (both in ONNX Runtime), compiled, bf16 (compiled, for processors that have it); "
            "repeat. Default: all but bf16; on a GPU eager, compiled and bf16.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows that are timed; 8 batches at least.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="How often each contender runs.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as torch has it.")] = None,
    device: Annotated[
        str, typer.Option(help="Where torch runs: 'cuda' is a GPU, for the engines eager, compiled and bf16.")
    ] = "cpu",
    text_column: Annotated[list[str], typer.Option(help="Column with the text; give it twice for pairs.")] = ["text"],  # noqa: B006
    label_column: Annotated[
        str | None, typer.Option(help="Column with the class. Default: 'label', if there is such a column.")
    ] = None,
) -> None:
    """Time early exit on every engine against what else could run: this model, these rows, this machine.

    Example: transformers-badge benchmark badge-reviews --data test.csv --output-dir benchmark
    """
    import tempfile

    import torch
    from rich.console import Console
    from rich.markdown import Markdown

    from transformers_badge.cli.tables import load_model, read_rows
    from transformers_badge.evaluation.benchmark import benchmark_checkpoint
    from transformers_badge.evaluation.benchmark_report import render_benchmark, write_benchmark
    from transformers_badge.evaluation.contenders import ENGINES, ON_PROCESSORS
    from transformers_badge.hub.checkpoint import check_checkpoint_folder
    from transformers_badge.inference.onnx_export import check_export_tools
    from transformers_badge.inference.predictor import BadgePredictor
    from transformers_badge.inference.torch_stages import check_device
    from transformers_badge.training.fine_tune import check_output_directory

    on_gpu = check_device(device).type == "cuda"
    here = [engine for engine in ENGINES if not (on_gpu and engine in ON_PROCESSORS)]
    engines = engines or [engine for engine in here if on_gpu or engine != "bf16"]
    unknown = [engine for engine in engines if engine not in here]
    if unknown:
        where = " on a GPU" if on_gpu else ""
        raise ValueError(f"--engine must be one of {', '.join(here)}{where}, got {unknown[0]!r}.")
    folder = check_checkpoint_folder(str(checkpoint))
    model, _ = load_model(str(folder))
    if isinstance(model, BadgePredictor):
        raise ValueError(f"{checkpoint} is an export: give the checkpoint that it was made of.")
    if set(ON_PROCESSORS) & set(engines):
        check_export_tools()

    def read(name: str) -> tuple[Any, Any]:
        found = read_rows(name, text_column, label_column, model)
        texts = found.columns[0] if len(found.columns) == 1 else list(zip(*found.columns, strict=True))
        return texts, found.labels

    texts, labels = read(data)
    held_out = None if calibrate is None else read(calibrate)
    if held_out is not None and (labels is None or held_out[1] is None):
        raise ValueError("--calibrate needs labels, in both files: name their column with --label-column.")
    check_output_directory(output_dir)
    console = Console()
    with tempfile.TemporaryDirectory() as graphs, console.status("") as status:
        record = benchmark_checkpoint(
            folder,
            texts,
            labels,
            Path(graphs),
            calibration=held_out,
            max_lost=max_lost,
            batch_sizes=batch_sizes or [1, 8, 32, 128],
            rows=rows,
            rounds=rounds,
            threads=threads or torch.get_num_threads(),
            engines=engines,
            device=device,
            on_step=status.update,
        )
    files = write_benchmark(record, output_dir)
    console.print(Markdown(render_benchmark(record)))
    typer.echo(f"Wrote {', '.join(files)} to {output_dir}.")
