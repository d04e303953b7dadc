"""Seconds, memory and accuracy of early exit on every engine, against what else could be run; all in turns."""

import importlib.metadata
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transformers_badge.calibration.fitting import expected_losses
from transformers_badge.calibration.replay import replay, score_exits
from transformers_badge.evaluation.contenders import (
    COMPILED,
    ENGINES,
    ON_PROCESSORS,
    Contenders,
    Run,
    Texts,
)
from transformers_badge.evaluation.curves import measure, run_thresholds
from transformers_badge.evaluation.timing import describe_machine, peak_of_this_process, time_in_turns
from transformers_badge.exit_table import ExitTable
from transformers_badge.inference.exit_logits import make_exit_table
from transformers_badge.model.early_exit_badge import predict_with_policy
from transformers_badge.model.policy_badge import ExitPolicy


PIPELINE = "pipeline"
_KINDS = ("full", "early exit", "truncated", "deeper", "nobody leaves", "stream")
_PARALLEL_KINDS = ("full side by side", "parts side by side", "stream side by side")
_WITHOUT_LATENCY = ("stream", "full side by side", "stream side by side")  # a batch of which takes no time of its own
# What each is compared with, on the same engine but for the pipeline.
_COMPARED = {
    "full": (PIPELINE, "nobody leaves"),
    "early exit": (PIPELINE, "full", "truncated", "deeper", "ideal"),
    "parts side by side": (PIPELINE, "full", "early exit", "ideal"),
    "stream": (PIPELINE, "full", "early exit", "ideal"),
    "stream side by side": (PIPELINE, "full", "full side by side", "stream"),
}
MEMORY_KINDS = ("full", "early exit", "stream", *_PARALLEL_KINDS)
MEMORY_BATCH = 32
BATCHES = 8  # that are timed at least


def benchmark_checkpoint(
    checkpoint: Path,
    texts: Texts,
    labels: Sequence[int] | None,
    folder: Path,
    *,
    calibration: tuple[Texts, Sequence[int]] | None = None,
    max_lost: float = 1.0,
    batch_sizes: Sequence[int] = (1, 8, 32, 128),
    rows: int = 256,
    rounds: int = 5,
    threads: int = 1,
    engines: Sequence[str] = ENGINES,
    device: str = "cpu",
    on_step: Callable[[str], Any] = lambda title: None,
) -> dict[str, Any]:
    """Time all contenders.

    Args:
        checkpoint: folder of a BADGE checkpoint.
        texts, labels: rows to measure on; without labels, agreement with full depth takes the place of accuracy.
        folder: for the graphs of ONNX Runtime.
        calibration: labelled rows to choose each engine's threshold from: the fastest that is expected to lose at most
            `max_lost` points. Default: the checkpoint's policy for all.
        max_lost: in points of accuracy.
        batch_sizes: to time.
        rows: how many rows are timed, at least; and BATCHES full batches, where there are so many rows.
        rounds: how often each contender runs, besides a warm-up.
        threads: of torch and of ONNX Runtime.
        engines: of `ENGINES`; on a GPU not those of `ON_PROCESSORS`.
        device: where torch runs.
        on_step: told what comes next, for a progress bar.

    Returns:
        `machine`; `engines`, each with accuracy at full depth, with early exit and truncated, and layer_speedup;
        `batch_sizes`, each with milliseconds_per_row (among them the ideal, see `ideal_milliseconds`), latency (p50
        and p99 of a batch, ms), ratios; `memory` in MiB, on a GPU its own; `profile`, the shares of a row's time.
    """
    contenders = Contenders(checkpoint, folder, threads, device)
    on_gpu = contenders.device.type == "cuda"
    more = (
        {"gpu": torch.cuda.get_device_name(contenders.device), "cuda": torch.version.cuda}
        if on_gpu
        else {"onnxruntime": importlib.metadata.version("onnxruntime")}
    )
    record: dict[str, Any] = {
        "machine": {**describe_machine(), "threads": threads, **more},
        "rows": len(texts),
        "rounds": rounds,
        "measure": "agreement" if labels is None else "accuracy",
        "max_lost": None if calibration is None else max_lost,
        "engines": {},
    }
    runs: dict[str, Run] = {PIPELINE: contenders.pipeline()}
    engines = [engine for engine in ENGINES if engine in engines]
    depths: dict[str, Any] = {}
    for engine in engines:
        on_step(f"{engine}: every exit's answers")
        model = contenders.engine(engine)
        policy = contenders.config.exit_policy
        if calibration is not None:
            policy = choose_policy(_table(contenders, model, *calibration), policy, max_lost)
        table = _table(contenders, model, texts, labels)
        contenders.policies[engine] = policy
        record["engines"][engine] = entry = measure_policy(table, policy)
        entry["policy"] = policy.to_dict()
        depths[engine] = np.asarray(table.exit_layers)[replay(table, policy)]
        contenders.truncated_at[engine] = entry["truncated_exit"]
        kinds = [kind for kind in (*_KINDS, *_PARALLEL_KINDS) if _is_there(kind, engine, threads)]
        runs.update({f"{kind}, {engine}": contenders.run(kind, engine) for kind in kinds})
    record["batch_sizes"] = {}
    for size in batch_sizes:
        on_step(f"batch size {size}")
        timed = max(rows, BATCHES * size)
        ideal = {
            engine: partial(ideal_milliseconds, contenders, engine, texts[:timed], size, depths[engine][:timed])
            for engine in engines
        }
        record["batch_sizes"][str(size)] = _time(runs, texts[:timed], size, rounds, ideal)
    on_step("profile")
    record["profile"] = {
        engine: {str(size): profile(contenders, engine, texts[:rows], size) for size in batch_sizes}
        for engine in engines
    }
    on_step("memory")
    record["memory"] = {
        f"{kind}, {engine}": peak_memory(contenders, kind, engine, texts[:rows])
        for engine in engines
        for kind in MEMORY_KINDS
        if _is_there(kind, engine, threads) and (on_gpu or engine not in COMPILED)  # compiling takes more than running
    }
    record["memory_batch_size"] = MEMORY_BATCH
    return record


def _is_there(kind: str, engine: str, threads: int) -> bool:
    """Whether a contender of this kind runs on this engine: side by side only where a thread leaves the others free."""
    return kind not in _PARALLEL_KINDS or (engine in ON_PROCESSORS and threads > 1)


def choose_policy(table: ExitTable, policy: ExitPolicy, max_lost: float) -> ExitPolicy:
    """The policy with the threshold that saves most and is expected to lose at most so many points.

    Expected, not counted: on 2,000 rows the points counted are off by a point as often as not, and the threshold that
    looks fastest is the one whose count happens to be low.
    """
    losses = expected_losses(table)
    runs, costs, rows = run_thresholds(score_exits(table, policy)), np.asarray(table.costs), np.arange(len(table))
    taken = runs.taken[:-1]  # the last is no threshold of this criterion
    lost = np.array([losses[rows, run].mean() for run in taken])
    spent = costs[taken].mean(axis=1)
    allowed = np.flatnonzero(lost <= max_lost / 100)  # the first, nobody leaves, is among them
    best = int(allowed[spent[allowed].argmin()])
    return ExitPolicy() if best == 0 else replace(policy, threshold=float(runs.thresholds[best]), certificate=None)


def measure_policy(table: ExitTable, policy: ExitPolicy) -> dict[str, Any]:
    """In percent what a policy keeps, what full depth has, and what one exit has: the first of the same mean depth or
    deeper, and the one after it.
    """
    values = measure(table)[1]
    taken, costs, rows = replay(table, policy), np.asarray(table.costs), np.arange(len(table))
    spent = float(costs[taken].mean())
    stop = int(np.flatnonzero(costs >= spent - 1e-9)[0])
    deeper = min(stop + 1, len(costs) - 1)
    return {
        "full_depth": 100 * float(values[:, -1].mean()),
        "early_exit": 100 * float(values[rows, taken].mean()),
        "layer_speedup": float(costs[-1] / spent),
        "truncated": 100 * float(values[:, stop].mean()),
        "truncated_exit": stop,
        "truncated_depth": int(table.exit_layers[stop]),
        "deeper": 100 * float(values[:, deeper].mean()),
        "deeper_depth": int(table.exit_layers[deeper]),
    }


def _table(contenders: Contenders, model: Any, texts: Texts, labels: Sequence[int] | None) -> ExitTable:
    columns: Any = [list(texts)] if isinstance(texts[0], str) else [list(column) for column in zip(*texts, strict=True)]
    return make_exit_table(model, contenders.tokenizer, columns, labels)


def _time(
    runs: dict[str, Run], texts: Texts, size: int, rounds: int, ideal: Mapping[str, Callable[[], float]]
) -> dict[str, Any]:
    """Seconds of contenders in turns.

    Args:
        ideal: by engine, a run that tells what the ideal time is, in milliseconds per row: one in every round.
    """
    batches: dict[str, list[list[float]]] = {name: [] for name in runs}
    least: dict[str, list[float]] = {engine: [] for engine in ideal}

    def call(name: str, run: Run) -> Callable[[], None]:
        return lambda: batches[name].append(run(texts, size))

    def tell(engine: str) -> Callable[[], None]:
        return lambda: least[engine].append(ideal[engine]())

    calls = {name: call(name, run) for name, run in runs.items()}
    timings = time_in_turns({**calls, **{f"ideal, {engine}": tell(engine) for engine in ideal}}, rounds)
    for engine, milliseconds in least.items():  # not the seconds of the run that told it
        timings.seconds[f"ideal, {engine}"] = [each * len(texts) / 1000 for each in milliseconds[-rounds:]]
    ratios, per_row = {}, {name: 1000 * timings.median(name) / len(texts) for name in timings.seconds}
    for ours in runs:
        for base in _COMPARED.get(ours.rpartition(", ")[0], ()):
            ratios[ratio_name(ours, base)] = timings.speedup(ours, opponent(ours, base))
    latency = {}
    for name, by_run in batches.items():
        if name.rsplit(", ", 1)[0] not in _WITHOUT_LATENCY:
            p50, p99 = 1000 * np.quantile(np.concatenate(by_run[-rounds:]), [0.5, 0.99])  # without the warm-up
            latency[name] = {"p50": float(p50), "p99": float(p99)}
    return {
        "rows": len(texts),
        "milliseconds_per_row": per_row,
        "latency": latency,
        "ratios": ratios,
    }


def opponent(contender: str, base: str) -> str:
    """The contender of some kind that another is compared with: on the same engine, but for the pipeline."""
    return base if base == PIPELINE else f"{base}, {contender.rpartition(', ')[2]}"


def ratio_name(contender: str, base: str) -> str:
    """The name in a record of how many times as fast a contender is."""
    return f"{contender} over {opponent(contender, base)}"


class ProfiledStages:
    """Stages that add up the seconds of each of their parts: by name, and by the block or exit, if it is of one.

    Args:
        stages: of an engine.
        run_cost: see `Stages`; infinite: batches stay together.
    """

    def __init__(self, stages: Any, run_cost: float) -> None:
        self._stages, self.run_cost, self.seconds = stages, run_cost, {}  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._stages, name)
        if not callable(value):
            return value

        def timed(*arguments: Any, **given: Any) -> Any:
            begin = time.perf_counter()
            result = value(*arguments, **given)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.add((name, arguments[0]) if name in ("run_block", "read_exit") else (name,), begin)
            return result

        return timed

    def add(self, part: tuple[Any, ...], begin: float) -> None:
        """The seconds since `begin`."""
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin


PARTS = {
    "tokenization": ("tokenization",),
    "exit 0": ("begin",),
    "embedding": ("embed",),
    "blocks": ("run_block",),
    "exits": ("read_exit", "to_host"),
    "compaction": ("compact",),
}


def profile(contenders: Contenders, engine: str, texts: Texts, size: int) -> dict[str, float]:
    """Milliseconds per row of each part, where `criterion and loop` is what is left."""
    _profile(contenders, engine, texts, size, contenders.policies[engine])  # a warm-up
    seconds, total = _profile(contenders, engine, texts, size, contenders.policies[engine])
    parts = {title: sum(spent for part, spent in seconds.items() if part[0] in names) for title, names in PARTS.items()}
    parts["criterion and loop"] = total - sum(parts.values())
    return {title: 1000 * spent / len(texts) for title, spent in parts.items()}


def ideal_milliseconds(contenders: Contenders, engine: str, texts: Texts, size: int, depths: Any) -> float:
    """Milliseconds per row, were every row to pay for the stages it needs alone, at their cost in whole batches.

    Args:
        depths: (texts,), how many blocks run for each.
    """
    seconds, _ = _profile(contenders, engine, texts, size, ExitPolicy(), whole=True)
    # The depth from which on a row needs a part. What is not here, such as the loop, no row needs.
    needed_from: dict[tuple[Any, ...], int] = {("tokenization",): 0, ("begin",): 0, ("embed",): 1}
    for layer in range(1, contenders.config.exit_layers[-1] + 1):
        needed_from["run_block", layer] = layer
    for index, layer in enumerate(contenders.config.exit_layers):
        needed_from["read_exit", index] = layer
    needed = sum(seconds.get(part, 0.0) * float((depths >= least).mean()) for part, least in needed_from.items())
    return 1000 * needed / len(texts)


def _profile(
    contenders: Contenders, engine: str, texts: Texts, size: int, policy: ExitPolicy, whole: bool = False
) -> tuple[dict[tuple[Any, ...], float], float]:
    """Seconds of every part, see `ProfiledStages`, and of all; `whole`: with batches that stay together."""
    model = contenders.engine(engine)
    profiled = model if engine == "eager" else model.stages
    stages = ProfiledStages(profiled, float("inf") if whole else profiled.run_cost)
    problem = contenders.config.problem_type or "single_label_classification"
    begin = time.perf_counter()
    for start in range(0, len(texts), size):
        at = time.perf_counter()
        encoded = contenders.encode(texts[start : start + size], None)
        count = len(encoded["input_ids"])
        rows = [{key: encoded[key][row] for key in encoded} for row in range(count)]
        stages.add(("tokenization",), at)
        with torch.no_grad():
            state, mask = stages.begin(rows)
            predict_with_policy(stages, state, mask, contenders.config.num_labels, policy, problem)
    return stages.seconds, time.perf_counter() - begin


def peak_memory(contenders: Contenders, kind: str, engine: str, texts: Texts) -> float:
    """MiB at most that a process of its own needs, which does nothing else: of the GPU, if it runs there."""
    made = (contenders.checkpoint, contenders.folder, contenders.threads, str(contenders.device))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run_alone, made, contenders.policies, kind, engine, list(texts)).result()


def _run_alone(
    made: tuple[Path, Path, int, str], policies: dict[str, ExitPolicy], kind: str, engine: str, texts: Any
) -> float:
    contenders = Contenders(*made)
    contenders.policies = policies
    contenders.run(kind, engine)(texts, MEMORY_BATCH)
    if contenders.device.type == "cuda":
        return torch.cuda.max_memory_reserved(contenders.device) / 2**20
    return peak_of_this_process()
