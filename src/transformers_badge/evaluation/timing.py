"""Wall-clock comparisons: contenders take turns within one run, so that a machine that drifts drifts for all of
them. And what a measurement is read with: the machine, and memory.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class PairedTimings:
    """Seconds of every contender in every round.

    Args:
        seconds: contender to its seconds, one per round.
    """

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of a contender."""
        return statistics.median(self.seconds[name])

    def speedup(self, name: str, over: str) -> dict[str, float]:
        """How many times faster a contender is than another: median, minimum and maximum of the rounds' own ratios."""
        ratios = [b / a for a, b in zip(self.seconds[name], self.seconds[over], strict=True)]
        return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def with_spread(speedup: Mapping[str, float]) -> str:
    """A speedup in words: its median, then its least and greatest. A figure that has no spread stands alone."""
    if speedup["min"] == speedup["max"]:
        return f"{speedup['median']:.2f}"
    return "{median:.2f}x ({min:.2f} to {max:.2f})".format(**speedup)


def classifying(
    classify: Callable[..., Any], texts: Sequence[Any], batch_size: int, **policy: Any
) -> Callable[[], Any]:
    """A contender for `time_in_turns`: a pipeline given a list of texts or, at batch size 1, one text at a time."""
    calls = [texts] if batch_size > 1 else texts
    return lambda: [classify(call, batch_size=batch_size, **policy) for call in calls]


def time_in_turns(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmups: int = 1,
    on_round: Callable[[], Any] = lambda: None,
) -> PairedTimings:
    """Run every contender once per round, in an order that turns from round to round.

    Args:
        contenders: name to a call without arguments.
        rounds: how many rounds are counted.
        warmups: how many rounds come first and are not.
        on_round: called after every round, for a progress bar.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmups + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            contenders[name]()
            if number >= warmups:
                seconds[name].append(time.perf_counter() - start)
        on_round()
    return PairedTimings(seconds)


def describe_machine() -> dict[str, Any]:
    """What a timing has to be read with: processor, threads, and the versions of what ran."""
    import torch
    import transformers

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def peak_of_this_process() -> float:
    """MiB at most that this process has needed so far."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():  # what `resource` says there includes the process that started this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
