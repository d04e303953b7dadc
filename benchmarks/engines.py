"""Early exit on every engine against the full model on the same engine: seconds from texts to logits, in turns.

The rows are the demo's test rows, in the order of arrival, batch by batch; tokenization is part of the time. The full
models have the same encoder, without exits:

    pipeline             transformers' text-classification pipeline
    full eager           tokenizer and transformers' own classifier
    full fp32, int8      the same in ONNX Runtime; int8 by its own dynamic quantization
    ours eager, fp32, int8            with the checkpoint's policy; int8 with its own threshold for the same target
    ours ..., nobody leaves            what the exits cost

Example: python benchmarks/engines.py demo-output/checkpoint --output-dir bench-output
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from transformers_badge import BadgeForSequenceClassification, BadgePredictor, ExitPolicy, calibrate, export_onnx
from transformers_badge.calibration.replay import correctness, replay
from transformers_badge.demo.sources import read_reviews
from transformers_badge.evaluation.timing import describe_machine, time_in_turns
from transformers_badge.inference.exit_logits import make_exit_table


TEST_ROWS = 1768  # as in the demo: the last of the data set; those before them are for the threshold


class Inputs(nn.Module):
    """A classifier whose graph has three inputs and one output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Logits (rows, labels) from (rows, tokens)."""
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return outputs.logits  # type: ignore[no-any-return]


def export_full(plain: Any, folder: Path) -> dict[str, Any]:
    """Sessions of the full model, by precision."""
    ids = torch.randint(0, 1000, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    axes = {0: "rows", 1: "tokens"}
    plain.set_attn_implementation("eager")  # faster in ONNX Runtime, as in our export
    torch.onnx.export(
        Inputs(plain),
        (ids, mask, torch.zeros_like(ids)),
        folder / "fp32.onnx",
        dynamo=True,
        dynamic_shapes=(axes, axes, axes),
        input_names=["input_ids", "attention_mask", "token_type_ids"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    plain.set_attn_implementation("sdpa")
    quantize_dynamic(
        folder / "fp32.onnx",
        folder / "int8.onnx",
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul"],
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return {name: onnxruntime.InferenceSession(folder / f"{name}.onnx", options) for name in ("fp32", "int8")}


def contenders(
    model: Any, tokenizer: Any, predictors: dict[str, BadgePredictor], policies: dict[str, ExitPolicy], folder: Path
) -> dict[str, Callable[[list[str], int], Any]]:
    """By name, what answers texts in batches of some size; ours return exit layers."""
    plain = AutoModelForSequenceClassification.from_config(model.config.encoder_config).eval()
    plain.base_model.load_state_dict(model.encoder.state_dict(), strict=False)
    full = export_full(plain, folder)
    classify = pipeline("text-classification", model=plain, tokenizer=tokenizer)

    def batches(texts: list[str], size: int, tensors: str) -> Any:
        for start in range(0, len(texts), size):
            yield tokenizer(texts[start : start + size], padding=True, truncation=True, return_tensors=tensors)

    def run_session(session: Any) -> Callable[[list[str], int], Any]:
        def run(texts: list[str], size: int) -> None:
            for batch in batches(texts, size, "np"):
                session.run(None, {name: value.astype(np.int64) for name, value in batch.items()})

        return run

    def run_ours(engine: Any, policy: ExitPolicy) -> Callable[[list[str], int], Any]:
        tensors = "pt" if engine is model else "np"

        def run(texts: list[str], size: int) -> Any:
            outputs = [engine.early_exit_predict(**batch, policy=policy) for batch in batches(texts, size, tensors)]
            return np.concatenate([np.asarray(output.exit_layer) for output in outputs])

        return run

    @torch.no_grad()
    def run_plain(texts: list[str], size: int) -> None:
        for batch in batches(texts, size, "pt"):
            plain(**batch)

    made: dict[str, Callable[[list[str], int], Any]] = {
        "pipeline": lambda texts, size: list(classify(texts, batch_size=size, truncation=True)),
        "full eager": run_plain,
        **{f"full {precision}": run_session(session) for precision, session in full.items()},
    }
    for name, engine in {"eager": model, **predictors}.items():
        made[f"ours {name}"] = run_ours(engine, policies[name])
        made[f"ours {name}, nobody leaves"] = run_ours(engine, ExitPolicy())
    return made


def main() -> None:
    """Export, calibrate int8, time, print and store the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output-dir", type=Path, default=Path("bench-output"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--calibration-rows", type=int, default=2800, help="2000 for a model of demo --full")
    parser.add_argument("--rows", type=int, default=512, help="timed rows; at batch size 1 a fourth of them")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = BadgeForSequenceClassification.from_pretrained(arguments.checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    texts, labels = read_reviews("movies")
    held_out = slice(-TEST_ROWS - arguments.calibration_rows, -TEST_ROWS)
    console, stored = Console(), model.config.exit_policy

    with tempfile.TemporaryDirectory() as temporary:
        predictors, policies, lost = {}, {"eager": stored}, {}
        for precision in ("fp32", "int8"):
            with console.status(f"exporting {precision}"):
                folder = export_onnx(model, tokenizer, Path(temporary) / f"ours-{precision}", precision)
            predictors[precision] = BadgePredictor.from_pretrained(folder, threads=arguments.threads)
        policies["fp32"] = stored
        demand = stored.certificate or {}
        with tqdm(total=arguments.calibration_rows, desc="int8's exit table", unit="row") as bar:
            table = make_exit_table(
                predictors["int8"], tokenizer, [texts[held_out]], labels[held_out], on_batch=bar.update
            )
        policies["int8"] = calibrate(
            table, stored, risk=demand.get("risk", "disagreement"), max_risk=demand.get("max_risk", 0.01)
        )
        test, truth = texts[-TEST_ROWS:], labels[-TEST_ROWS:]
        for name, engine in {"eager": model, **predictors}.items():
            with tqdm(total=TEST_ROWS, desc=f"accuracy, {name}", unit="row") as bar:
                table = make_exit_table(engine, tokenizer, [test], truth, on_batch=bar.update)
            lost[name] = measure(table, policies[name])
        runs = contenders(model, tokenizer, predictors, policies, Path(temporary))
        timed = {str(size): time_batches(runs, test, size, arguments) for size in arguments.batch_sizes}
    record = {
        "machine": {**describe_machine(), "onnxruntime": onnxruntime.__version__},
        "rounds": arguments.rounds,
        "accuracy": lost,
        "batch_sizes": timed,
    }
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "engines.json").write_text(json.dumps(record, indent=1) + "\n")
    show(console, record)


def measure(table: Any, policy: ExitPolicy) -> dict[str, float]:
    """Accuracy in percent and layer speedup of a policy on a table with labels."""
    right, taken, rows = correctness(table), replay(table, policy), np.arange(len(table))
    return {
        "full_depth": 100 * float(right[:, -1].mean()),
        "early_exit": 100 * float(right[rows, taken].mean()),
        "layer_speedup": float(table.costs[-1] / table.costs[taken].mean()),
    }


def time_batches(runs: dict[str, Any], texts: list[str], size: int, arguments: Any) -> dict[str, Any]:
    """Seconds of every contender, and the ratios that matter."""
    chosen = texts[: max(arguments.rows // 4, 1) if size == 1 else arguments.rows]
    layers = {name: run(chosen, size) for name, run in runs.items() if name.startswith("ours")}
    with tqdm(total=arguments.rounds + 1, desc=f"batch size {size}", unit="round") as bar:
        timings = time_in_turns(
            {name: lambda run=run: run(chosen, size) for name, run in runs.items()},
            arguments.rounds,
            on_round=bar.update,
        )
    blocks = max(int(values.max()) for values in layers.values())
    ratios = {
        f"ours {engine} over {base}": timings.speedup(f"ours {engine}", base)
        for engine in ("eager", "fp32", "int8")
        for base in ("pipeline", "full eager", "full fp32", "full int8", f"ours {engine}, nobody leaves")
    }
    for engine in ("eager", "fp32", "int8"):
        ratios[f"nobody leaves, {engine}, over full"] = timings.speedup(
            f"full {engine}", f"ours {engine}, nobody leaves"
        )
    return {
        "rows": len(chosen),
        "blocks_saved": {name: blocks / max(float(values.mean()), 0.02) for name, values in layers.items()},
        "milliseconds_per_row": {name: 1000 * timings.median(name) / len(chosen) for name in timings.seconds},
        "speedups": ratios,
    }


def show(console: Console, record: dict[str, Any]) -> None:
    """Print milliseconds per row, by contender and batch size."""
    sizes = list(record["batch_sizes"])
    table = Table("ms per row", *[f"batch {size}" for size in sizes])
    for name in record["batch_sizes"][sizes[0]]["milliseconds_per_row"]:
        values = [record["batch_sizes"][size]["milliseconds_per_row"][name] for size in sizes]
        table.add_row(name, *[f"{value:.2f}" for value in values])
    console.print(table)
    for name in record["batch_sizes"][sizes[0]]["speedups"]:
        values = [record["batch_sizes"][size]["speedups"][name] for size in sizes]
        console.print(name, *[f"{v['median']:.2f}x ({v['min']:.2f} to {v['max']:.2f})" for v in values], sep="  ")
    console.print(record["accuracy"])


if __name__ == "__main__":
    main()
