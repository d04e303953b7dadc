"""`transformers-badge demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output_dir: Annotated[Path, typer.Option(help="Where checkpoint, report and picture go.")] = Path("demo"),
    full: Annotated[bool, typer.Option("--full", help="All rows and 3 epochs: about 20 minutes on 2 cores.")] = False,
    max_accuracy_drop: Annotated[float, typer.Option(help="How much accuracy early exit may cost.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Run the main job on a real encoder and real reviews: train, choose a threshold, measure, save, load anew.

    Example: transformers-badge demo --output-dir demo
    """
    from transformers_badge.demo.job import run_demo

    run_demo(output_dir, full=full, max_accuracy_drop=max_accuracy_drop, seed=seed)
