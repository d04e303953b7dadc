"""The timed comparisons of the README and docs: overhead of the exits, and what compaction gets of the layers it saves.

All on one random BERT (12 blocks, hidden 768), contenders in turns within one run. Writes records as JSON and prints
a table.

Example: python benchmarks/run.py --output-dir bench-output
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import BertForSequenceClassification

from transformers_badge import BadgeConfig, BadgeForSequenceClassification, ExitTable
from transformers_badge.calibration.replay import score_exits
from transformers_badge.evaluation.timing import PairedTimings, describe_machine, time_in_turns


ROWS, TOKENS, BLOCKS = 32, 64, 12


def build() -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Our model, transformers' own with the same encoder, and a batch without padding."""
    torch.manual_seed(0)
    model = BadgeForSequenceClassification(BadgeConfig()).eval()
    plain = BertForSequenceClassification(model.config.encoder_config).eval()
    plain.bert.load_state_dict(model.encoder.state_dict(), strict=False)
    ids = torch.randint(1000, 20000, (ROWS, TOKENS))
    return model, plain, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def overhead(model: Any, plain: Any, batch: dict[str, torch.Tensor], rounds: int) -> dict[str, Any]:
    """Full depth with every exit computed, against transformers' own classifier."""
    with tqdm(total=rounds + 1, desc="overhead", unit="round") as bar:
        timings = time_in_turns(
            {"ours": lambda: model(**batch), "transformers": lambda: plain(**batch)}, rounds, on_round=bar.update
        )
    ratio = timings.speedup("transformers", "ours")
    return {"seconds": {name: timings.median(name) for name in timings.seconds}, "ours_over_transformers": ratio}


def leaving_evenly(model: Any, batch: dict[str, torch.Tensor]) -> list[float | None]:
    """Thresholds per exit under which equal shares of the batch leave at each of the exits."""
    exit_logits = model(**batch).exit_logits.numpy()
    table = ExitTable(exit_logits=exit_logits, exit_layers=tuple(model.exit_layers))
    scores = score_exits(table, model.config.exit_policy)
    inside, thresholds = np.arange(ROWS), []
    for index in range(BLOCKS - 1):
        leaving = len(inside) - round(ROWS * (BLOCKS - 1 - index) / BLOCKS)
        order = inside[np.argsort(scores[inside, index])]
        thresholds.append(float(scores[order[leaving - 1 : leaving + 1], index].mean()))
        inside = order[leaving:]
    return [*thresholds, None]


def compaction(model: Any, batch: dict[str, torch.Tensor], rounds: int) -> list[dict[str, Any]]:
    """Rows that leave evenly over the exits, against full depth of the same model, at batch sizes 32 and 1."""
    thresholds = leaving_evenly(model, batch)
    with tqdm(total=rounds + 1, desc="compaction, batch 32", unit="round") as bar:
        timings = time_in_turns(
            {
                "early_exit": lambda: model.early_exit_predict(**batch, threshold=thresholds),
                "full_depth": lambda: model(**batch),
            },
            rounds,
            on_round=bar.update,
        )
    layers = model.early_exit_predict(**batch, threshold=thresholds).exit_layer.double()
    records = [summary(ROWS, timings, BLOCKS / float(layers.mean()))]

    row = {name: value[:1] for name, value in batch.items()}
    scripts = [[None] * i + [float("inf")] + [None] * (BLOCKS - 1 - i) for i in range(BLOCKS)]
    with tqdm(total=rounds + 1, desc="compaction, batch 1", unit="round") as bar:
        timings = time_in_turns(
            {
                "early_exit": lambda: [model.early_exit_predict(**row, threshold=script) for script in scripts],
                "full_depth": lambda: [model(**row) for _ in scripts],
            },
            rounds,
            on_round=bar.update,
        )
    taken = [int(model.early_exit_predict(**row, threshold=script).exit_layer) for script in scripts]
    assert taken == list(range(1, BLOCKS + 1)), taken
    return [*records, summary(1, timings, BLOCKS / float(np.mean(taken)))]


def summary(batch_size: int, timings: PairedTimings, layer_speedup: float) -> dict[str, Any]:
    """A record of one comparison of early exit with full depth."""
    wall_clock = timings.speedup("early_exit", "full_depth")
    return {
        "batch_size": batch_size,
        "layer_speedup": layer_speedup,
        "wall_clock_speedup": wall_clock,
        "share_of_layer_speedup": {name: value / layer_speedup for name, value in wall_clock.items()},
    }


def added_flops(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """FLOPs of bypasses and exits as a share of the encoder's."""
    with FlopCounterMode(display=False) as encoder:
        model.encoder(**batch)
    with FlopCounterMode(display=False) as whole:
        model(**batch)
    return whole.get_total_flops() / encoder.get_total_flops() - 1


@torch.no_grad()
def main() -> None:
    """Run everything, print it and store it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("bench-output"))
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    model, plain, batch = build()
    record = {
        "machine": describe_machine(),
        "rounds": arguments.rounds,
        "overhead": overhead(model, plain, batch, arguments.rounds),
        "compaction": compaction(model, batch, arguments.rounds),
        "added_flops_share": added_flops(model, batch),
    }
    (arguments.output_dir / "benchmarks.json").write_text(json.dumps(record, indent=2) + "\n")

    table = Table("what", "median", "min", "max", "must be")
    rows = [
        (
            "full depth with every exit, over transformers' own (time)",
            record["overhead"]["ours_over_transformers"],
            "<= 1.05",
        )
    ]
    for entry, bound in zip(record["compaction"], (">= 0.90", ">= 0.95"), strict=True):
        size = entry["batch_size"]
        rows.append(
            (
                f"batch {size}: wall-clock speedup (layers: {entry['layer_speedup']:.3f}x)",
                entry["wall_clock_speedup"],
                "",
            )
        )
        rows.append((f"batch {size}: wall-clock over layer speedup", entry["share_of_layer_speedup"], bound))
    for name, values, bound in rows:
        table.add_row(name, *[f"{values[key]:.3f}" for key in ("median", "min", "max")], bound)
    table.add_row(
        "FLOPs of bypasses and exits, over the encoder's", f"{record['added_flops_share']:.4f}", "", "", "<= 0.02"
    )
    console = Console()
    console.print(record["machine"])
    console.print(table)


if __name__ == "__main__":
    main()
