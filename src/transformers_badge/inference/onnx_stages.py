"""The stages of a model in ONNX Runtime.

Needs neither torch nor transformers. `onnx_export` makes the graphs, one of each stage.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from transformers_badge.inference.named_stages import (
    LexicalWeights,
    NamedStages,
    NamedState,
    keep_host_rows,
    stage_names,
)
from transformers_badge.model.rows_badge import join_rows


Array = np.ndarray[Any, np.dtype[Any]]

LEXICAL = "lexical.safetensors"  # the weights of exit 0
RENEWED = "next_"  # before the name of an output that takes the place of an input
POSITIONS_PER_RUN = 32  # as in `stages_badge`; here a run costs less
POSITIONS_PER_PART = 12  # and here, where several workers run parts of a batch side by side
# Fusions whose operators take longer on a CPU than those that they stand for: fp32 blocks by 6 to 10 %.
_SLOWER = ["SkipLayerNormFusion", "BiasGeluFusion"]


class OnnxStages(NamedStages):
    """A model that ONNX Runtime runs.

    Args:
        folder: of an export.
        exit_layers: depths that have an exit.
        padding_id: the token id for padding.
        hashing: how exit 0 hashes, see `LexicalWeights`; `None`: there is no such exit.
        provider: an execution provider of ONNX Runtime.
        threads: how many threads work on one product. Default: a thread per core; with several workers one.
        workers: how many threads call `run`.

    Raises:
        ModuleNotFoundError: ONNX Runtime is not installed.
        OSError: the weights of exit 0 are missing.
        ValueError: this installation of it lacks the provider, or a graph or the weights cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        exit_layers: Sequence[int],
        padding_id: int = 0,
        hashing: Mapping[str, Any] | None = None,
        provider: str = "CPUExecutionProvider",
        threads: int | None = None,
        workers: int = 1,
    ) -> None:
        runtime = import_onnxruntime()
        if provider not in runtime.get_available_providers():
            raise ValueError(
                f"ONNX Runtime has no provider {provider!r} here: choose one of {runtime.get_available_providers()}, "
                "or install the onnxruntime package that has it."
            )
        if threads is None and workers > 1:
            threads = 1
        options = _session_options(runtime, threads)
        self._sessions = {}
        for stage in stage_names(exit_layers):
            path = folder / graph_file(stage)
            try:
                self._sessions[stage] = runtime.InferenceSession(
                    path, options, providers=[provider], disabled_optimizers=_SLOWER
                )
            except Exception as error:  # its errors have no common class but this
                raise ValueError(f"ONNX Runtime cannot read {path}: {error}. Export the model again.") from error
        lexical = None if hashing is None else _lexical_weights(folder / LEXICAL, dict(hashing))
        positions = POSITIONS_PER_RUN if workers == 1 else POSITIONS_PER_PART
        on_processor = provider == "CPUExecutionProvider"
        run_cost = positions * (threads or os.cpu_count() or 1) if on_processor else float("inf")
        super().__init__(exit_layers, padding_id, lexical, run_cost)
        # Of each stage, by session: asking it takes longer than some of its operators.
        self._inputs = {
            name: [value.name for value in session.get_inputs()] for name, session in self._sessions.items()
        }
        self._outputs = {
            name: {value.name.removeprefix(RENEWED): value.name for value in session.get_outputs()}
            for name, session in self._sessions.items()
        }

    def from_host(self, array: Array) -> Array:
        """It is one."""
        return array

    def to_host(self, logits: Array) -> Array:
        """They are there."""
        return logits.astype(np.float64)

    def keep_rows(self, arrays: list[Array], rows: Array | None) -> list[Array]:
        """These rows of arrays."""
        return keep_host_rows(arrays, rows)

    def join(self, arrays: list[Array], width: int, padding: int) -> Array:
        """Arrays below one another."""
        return join_rows(arrays, width, padding)

    def run(self, stage: str, state: NamedState) -> NamedState:
        """The state with what the stage made in it."""
        outputs = self._outputs[stage]
        feeds = {name: state[name] for name in self._inputs[stage]}
        made = self._sessions[stage].run([*outputs.values()], feeds)
        return {**state, **dict(zip(outputs, made, strict=True))}


def graph_file(stage: str) -> str:
    """The file, in an export, of a stage's graph."""
    return f"{stage}.onnx"


def export_files(exit_layers: Sequence[int], lexical: bool) -> list[str]:
    """The files of an export that decide what it answers; `lexical`: it has an exit 0."""
    return [*map(graph_file, stage_names(exit_layers)), *([LEXICAL] if lexical else [])]


def _session_options(runtime: Any, threads: int | None) -> Any:
    """Options with which the sessions of several stages do not stand in each other's way."""
    options = runtime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    # Threads that spin after their own session's run would keep those of the next session from working: with two
    # threads a single row took two and a half times as long. Even so one run in a hundred waited for a core for 4 ms
    # or more; half as many do where threads spin no longer than this (which older versions do not know).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "200")
    # Each session would keep memory for the largest batch that it has seen: they share what one of them needs.
    _make_shared_memory(runtime)
    options.add_session_config_entry("session.use_env_allocators", "1")
    return options


@cache
def _make_shared_memory(runtime: Any) -> None:
    """Memory of this process for sessions that ask for it; others keep their own."""
    memory = runtime.OrtMemoryInfo("Cpu", runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, runtime.OrtMemType.DEFAULT)
    with suppress(RuntimeError):  # older versions refuse where somebody else has made it
        runtime.create_and_register_allocator(memory, None)


def _lexical_weights(path: Path, hashing: Mapping[str, Any]) -> LexicalWeights:
    """Exit 0."""
    try:
        return LexicalWeights.from_arrays(hashing, load_file(path))
    except FileNotFoundError as error:
        raise OSError(f"{path} is missing: export the model again.") from error
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): export the model again.") from error


def import_onnxruntime() -> Any:
    """ONNX Runtime.

    Raises:
        ModuleNotFoundError: it is not installed; the message names the extra.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ModuleNotFoundError(
            "The engine onnxruntime needs ONNX Runtime: pip install 'transformers-badge[onnxruntime]'."
        ) from error
    return onnxruntime
