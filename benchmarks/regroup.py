"""What regrouping is worth: rows that stay are put together across batches, against batches that only shrink.

One random BERT (12 blocks, hidden 768), rows that leave evenly over the exits whatever their length, lengths like those
of reviews. Contenders take turns on the same rows, which are tokenized already:

    regrouped           early_exit_stream, rows in the order of arrival, answers in that order
    regrouped, sorted   early_exit_stream, all rows sorted by length first, as predict_texts does
    shrinking           batches in the order of arrival that only shrink (plain compaction)
    shrinking, sorted   the same with all rows sorted by length
    split               early_exit_predict on batches in the order of arrival: it parts rows unlike in length

Example: python benchmarks/regroup.py --output-dir bench-output --rows 1000 --rounds 2
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from transformers_badge import BadgeConfig, BadgeForSequenceClassification
from transformers_badge.evaluation.timing import describe_machine, time_in_turns
from transformers_badge.model.outputs_badge import BlockState
from transformers_badge.model.rows_badge import pad_rows


FIRST_DEPTH_ID = 1000  # the first token of a row says after which block it leaves: this id and `depth` more
MEDIAN_TOKENS, SPREAD, MOST_TOKENS = 25, 0.6, 128
POLICY = {"criterion": "entropy", "threshold": 0.1}

Row = dict[str, list[int]]


class Scripted(BadgeForSequenceClassification):
    """A model whose exits do all their work, and then are sure of a row from the depth on that its first token says.

    The depth travels with a row in the place of the lexical exit's logits, which no exit reads here.
    """

    parts_by_length = False  # as a model does by itself; or batches stay together
    cells = 0  # rows x columns that blocks have run on, padding included
    block_runs = 0

    @property
    def run_cost(self) -> float:
        """What decides whether batches are parted."""
        return super().run_cost if self.parts_by_length else float("inf")

    def begin_padded(self, input_ids: Any, *arguments: Any, **fields: Any) -> BlockState:
        """The rows, with their depths."""
        depth = (input_ids[:, :1] - FIRST_DEPTH_ID).to(self.dtype)
        return replace(super().begin_padded(input_ids, *arguments, **fields), lexical_logits=depth)

    def run_block(self, layer: int, state: BlockState) -> BlockState:
        """A block, counted."""
        self.cells += int(np.prod(state.hidden_states.shape[:2]))  # type: ignore[union-attr]
        self.block_runs += 1
        return super().run_block(layer, state)

    def read_exit(self, exit_index: int, state: BlockState) -> Tensor:
        """Logits that are far apart once the row is to leave, and next to each other before."""
        logits = super().read_exit(exit_index, state)
        sure = state.lexical_logits <= self.exit_layers[exit_index]  # type: ignore[operator]
        return torch.where(sure, 10.0, 0.1) * torch.tensor([1.0, -1.0], dtype=logits.dtype, device=logits.device)


def make_rows(count: int, blocks: int, vocabulary: int) -> tuple[list[Row], np.ndarray]:
    """Rows of tokens, and the depth at which each leaves."""
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(np.log(MEDIAN_TOKENS), SPREAD, count)).round().clip(2, MOST_TOKENS).astype(int)
    depths = generator.permutation(np.arange(count) % blocks) + 1
    bodies = [generator.integers(FIRST_DEPTH_ID, vocabulary, length - 1).tolist() for length in lengths]
    rows = [{"input_ids": [FIRST_DEPTH_ID + int(d), *body]} for d, body in zip(depths, bodies, strict=True)]
    return rows, depths


def by_length(rows: list[Row]) -> list[int]:
    """The order of the rows from short to long."""
    return sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))


def shrinking(model: Scripted, rows: list[Row], order: list[int], batch_size: int, parted: bool = False) -> np.ndarray:
    """Exit layers of the rows, batch by batch in this order; `parted`: by length, where that pays."""
    model.parts_by_length = parted
    layers = np.zeros(len(rows), dtype=int)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs, mask = pad_rows([rows[row] for row in chosen], padding_id=0)
        output = model.early_exit_predict(
            torch.from_numpy(inputs["input_ids"]).to(model.device), torch.from_numpy(mask).long().to(model.device)
        )
        layers[chosen] = output.exit_layer.cpu().numpy()
    return layers


def regrouped(model: Scripted, rows: list[Row], order: list[int], batch_size: int, in_order: bool) -> np.ndarray:
    """Exit layers of the rows, streamed in this order."""
    layers = np.zeros(len(rows), dtype=int)
    for answer in model.early_exit_stream((rows[row] for row in order), batch_size, in_order=in_order):
        layers[order[answer.index]] = answer.exit_layer
    return layers


def main() -> None:
    """Time all contenders, print and store the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("bench-output"))
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    names = ("regrouped", "regrouped, sorted", "shrinking", "shrinking, sorted", "split")
    parser.add_argument("--contender", choices=names, action="append", help="Repeat for several. Default: all.")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model = Scripted(BadgeConfig(exit_policy=POLICY)).eval().to(arguments.device)
    blocks, size = model.config.num_hidden_layers, arguments.batch_size
    rows, depths = make_rows(arguments.rows, blocks, model.config.encoder_config.vocab_size)
    arrival = list(range(len(rows)))
    every: dict[str, Callable[[], np.ndarray]] = {
        "regrouped": lambda: regrouped(model, rows, arrival, size, in_order=True),
        "regrouped, sorted": lambda: regrouped(model, rows, by_length(rows), size, in_order=False),
        "shrinking": lambda: shrinking(model, rows, arrival, size),
        "shrinking, sorted": lambda: shrinking(model, rows, by_length(rows), size),
        "split": lambda: shrinking(model, rows, arrival, size, parted=True),
    }
    calls = {name: call for name, call in every.items() if name in (arguments.contender or names)}
    work: dict[str, dict[str, float]] = {}

    def contender(name: str) -> Callable[[], None]:
        def call() -> None:
            model.cells = model.block_runs = 0
            layers = calls[name]()
            assert np.array_equal(layers, depths), f"{name}: a row left at another exit than it was told to"
            work[name] = {"cells": model.cells, "block_runs": model.block_runs}

        return call

    shrinking(model, rows, arrival[: 4 * size], size)  # warm-up
    with tqdm(total=arguments.rounds, unit="round") as bar:
        timings = time_in_turns(
            {name: contender(name) for name in calls}, arguments.rounds, warmups=0, on_round=bar.update
        )
    needed = sum(len(row["input_ids"]) * int(depth) for row, depth in zip(rows, depths, strict=True))
    record = {
        "machine": describe_machine(),
        "device": arguments.device,
        "rows": len(rows),
        "batch_size": size,
        "rounds": arguments.rounds,
        "tokens_per_row": {"mean": float(np.mean([len(row["input_ids"]) for row in rows])), "most": MOST_TOKENS},
        "layer_speedup": blocks / float(depths.mean()),
        "contenders": {
            name: {
                "seconds": timings.seconds[name],
                "median_seconds": timings.median(name),
                "block_runs": work[name]["block_runs"],
                "cells_over_needed": work[name]["cells"] / needed,
            }
            for name in calls
        },
        "wall_clock_speedup": {
            f"{one} over {other}": timings.speedup(one, other)
            for one in names[:2]
            for other in names[2:]
            if one in calls and other in calls
        },
    }
    (arguments.output_dir / "regroup.json").write_text(json.dumps(record, indent=2) + "\n")

    console = Console()
    console.print(record["machine"])
    table = Table("contender", "seconds", "block runs", "cells over those needed")
    for name, entry in record["contenders"].items():
        seconds, cells = f"{entry['median_seconds']:.2f}", f"{entry['cells_over_needed']:.2f}"
        table.add_row(name, seconds, str(entry["block_runs"]), cells)
    console.print(table)
    table = Table("wall-clock speedup", "median", "min", "max")
    for name, values in record["wall_clock_speedup"].items():
        table.add_row(name, *[f"{values[key]:.3f}" for key in ("median", "min", "max")])
    console.print(table)


if __name__ == "__main__":
    main()
