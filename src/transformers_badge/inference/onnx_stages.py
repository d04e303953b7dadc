"""The stages of a model in ONNX Runtime.

Needs neither torch nor transformers. `onnx_export` makes the graph, which has all stages in it; see `onnx_join`.
"""

import os
from collections.abc import Mapping, Sequence
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

GRAPH = "stages.onnx"
LEXICAL = "lexical.safetensors"  # the weights of exit 0
STAGE = "stage"  # the input that says which of the stages runs
SEPARATOR = "/"  # between a stage and its output
RENEWED = "next_"  # before the name of an output that takes the place of an input
POSITIONS_PER_RUN = 32  # as in `stages_badge`; here a run costs less
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
        threads: how many threads work on one product. Default: a thread per core.

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
    ) -> None:
        runtime = import_onnxruntime()
        if provider not in runtime.get_available_providers():
            raise ValueError(
                f"ONNX Runtime has no provider {provider!r} here: choose one of {runtime.get_available_providers()}, "
                "or install the onnxruntime package that has it."
            )
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # it warns of branches that return nothing
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = runtime.InferenceSession(
                folder / GRAPH, options, providers=[provider], disabled_optimizers=_SLOWER
            )
        except Exception as error:  # its errors have no common class but this
            raise ValueError(f"ONNX Runtime cannot read {folder / GRAPH}: {error}. Export the model again.") from error
        lexical = None if hashing is None else LexicalWeights(dict(hashing), *_lexical_weights(folder / LEXICAL))
        on_processor = provider == "CPUExecutionProvider"
        run_cost = POSITIONS_PER_RUN * (threads or os.cpu_count() or 1) if on_processor else float("inf")
        super().__init__(exit_layers, padding_id, lexical, run_cost)
        self._places = {name: np.array(place) for place, name in enumerate(stage_names(exit_layers))}
        # The outputs of each stage, by their names in the state.
        self._outputs: dict[str, dict[str, str]] = {name: {} for name in self._places}
        for value in self._session.get_outputs():
            stage, name = value.name.split(SEPARATOR)
            self._outputs[stage][name.removeprefix(RENEWED)] = value.name
        # What a stage does not read has to be given all the same.
        types = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
        self._unread: NamedState = {
            value.name: np.zeros(
                [size if isinstance(size, int) else 0 for size in value.shape], types.get(value.type, np.float32)
            )
            for value in self._session.get_inputs()
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
        feeds = {name: state.get(name, unread) for name, unread in self._unread.items()}
        feeds[STAGE] = self._places[stage]
        outputs = self._outputs[stage]
        made = self._session.run([*outputs.values()], feeds)
        return {**state, **dict(zip(outputs, made, strict=True))}


def _lexical_weights(path: Path) -> tuple[Array, Array]:
    """The weights of exit 0, (buckets, labels), and its constant, (labels,)."""
    try:
        stored = load_file(path)
        return stored["weight"], stored["bias"]
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
