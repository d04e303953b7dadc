"""The stages of a model in ONNX Runtime: one embeds rows, and one per exit runs the blocks up to it.

Needs neither torch nor transformers. `onnx_export` makes the graph, which has all stages in it; see `onnx_join`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transformers_badge.model.rows_badge import pad_rows


Array = np.ndarray[Any, np.dtype[Any]]
# Arrays of the rows that are inside, by the names that the graph gives them: input_ids and token_type_ids until they
# are embedded, attention_mask, position_ids, hidden_states, bypass_state, lexical_logits, logits of the last exit.
OnnxState = dict[str, Array]

_PER_TOKEN = ("input_ids", "token_type_ids", "attention_mask", "position_ids")  # and whatever has three axes
GRAPH = "stages.onnx"
STAGE = "stage"  # the input that says which of the stages runs
SEPARATOR = "/"  # between a stage and its output
EMBEDDING, ARGUMENTS = "embed", "arguments"
RENEWED = "next_"  # before the name of an output that takes the place of an input


def argument(index: int) -> str:
    """What blocks need besides, masks for example; made anew when rows or columns are dropped."""
    return f"argument_{index}"


def exit_stage(layer: int) -> str:
    """The blocks since the exit before, and the exit of this depth; 0 is the lexical exit."""
    return f"exit_{layer}"


class OnnxStages:
    """A model that ONNX Runtime runs; see `early_exit_badge.Stages`.

    Args:
        folder: of an export.
        exit_layers: depths that have an exit.
        padding_id: the token id for padding.
        provider: an execution provider of ONNX Runtime.
        threads: how many threads work on one product. Default: a thread per core.

    Raises:
        ModuleNotFoundError: ONNX Runtime is not installed.
        ValueError: this installation of it lacks the provider, or a graph cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        exit_layers: Sequence[int],
        padding_id: int = 0,
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
            self._session = runtime.InferenceSession(folder / GRAPH, options, providers=[provider])
        except Exception as error:  # its errors have no common class but this
            raise ValueError(f"ONNX Runtime cannot read {folder / GRAPH}: {error}. Export the model again.") from error
        self.exit_layers, self._padding_id = list(exit_layers), padding_id
        self._places = {name: np.array(place) for place, name in enumerate(stage_names(exit_layers))}
        self._outputs: dict[str, list[str]] = {name: [] for name in self._places}
        for value in self._session.get_outputs():
            self._outputs[value.name.split(SEPARATOR)[0]].append(value.name)
        # What a stage does not read has to be given all the same.
        types = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
        self._unread: OnnxState = {
            value.name: np.zeros(
                [size if isinstance(size, int) else 0 for size in value.shape], types.get(value.type, np.float32)
            )
            for value in self._session.get_inputs()
        }

    def begin(self, rows: list[dict[str, list[int]]]) -> tuple[OnnxState, Array]:
        """Unpadded token rows, padded on the right: the state before they are embedded, and the mask (rows, tokens)."""
        inputs, mask = pad_rows(rows, self._padding_id)
        return self.begin_padded(**inputs, attention_mask=mask.astype(np.int64)), mask

    def begin_padded(self, input_ids: Array, attention_mask: Array, token_type_ids: Array | None = None) -> OnnxState:
        """The state of padded rows before they are embedded; each array (rows, tokens), int64."""
        state = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": np.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
        }
        return self._run(exit_stage(0), state) if self.exit_layers[0] == 0 else state

    def embed(self, state: OnnxState) -> OnnxState:
        """The rows as the first block takes them."""
        embedded = self._run(EMBEDDING, state)
        return {name: array for name, array in embedded.items() if name not in ("input_ids", "token_type_ids")}

    def run_block(self, layer: int, state: OnnxState) -> OnnxState:
        """Blocks run in one go up to the next exit."""
        return self._run(exit_stage(layer), state) if layer in self.exit_layers else state

    def read_exit(self, exit_index: int, state: OnnxState) -> Array:
        """Logits (rows, labels), which came with the blocks."""
        return state["logits" if self.exit_layers[exit_index] else "lexical_logits"]

    def compact(self, state: OnnxState, rows: Array | None, columns: slice, padded: bool) -> OnnxState:
        """Keep these rows (`None`: all) and token columns."""
        kept = {
            name: array[:, columns] if _is_per_token(name, array) else array
            for name, array in _without_arguments(state).items()
        }
        return self._renew_arguments(
            {name: np.ascontiguousarray(array if rows is None else array[rows]) for name, array in kept.items()}
        )

    def merge(self, states: list[OnnxState], masks: list[Array]) -> tuple[OnnxState, Array]:
        """One state of several at the same depth, padded on the right, and its mask."""
        width = max(mask.shape[1] for mask in masks)

        def join(arrays: list[Array], padding: int = 0) -> Array:
            missing = [width - array.shape[1] for array in arrays]
            behind = [[(0, 0), (0, columns), *[(0, 0)] * (arrays[0].ndim - 2)] for columns in missing]
            widened = [np.pad(a, pad, constant_values=padding) for a, pad in zip(arrays, behind, strict=True)]
            return np.concatenate(widened)

        merged = {}
        for name, array in _without_arguments(states[0]).items():
            arrays = [state[name] for state in states]
            padding = self._padding_id if name == "input_ids" else 0
            merged[name] = join(arrays, padding) if _is_per_token(name, array) else np.concatenate(arrays)
        return self._renew_arguments(merged), join(masks)

    def to_host(self, logits: Array) -> Array:
        """They are there."""
        return logits.astype(np.float64)

    def _renew_arguments(self, state: OnnxState) -> OnnxState:
        return self._run(ARGUMENTS, state) if "hidden_states" in state else state

    def _run(self, stage: str, state: OnnxState) -> OnnxState:
        feeds = {name: state.get(name, unread) for name, unread in self._unread.items()}
        feeds[STAGE] = self._places[stage]
        names = self._outputs[stage]
        renewed = {name.split(SEPARATOR)[1].removeprefix(RENEWED): name for name in names}
        return {**state, **dict(zip(renewed, self._session.run(names, feeds), strict=True))}


def stage_names(exit_layers: Sequence[int]) -> list[str]:
    """The stages, in the order in which they run."""
    stages = [exit_stage(layer) for layer in exit_layers]
    return [EMBEDDING, ARGUMENTS, *stages] if exit_layers[0] else [stages[0], EMBEDDING, ARGUMENTS, *stages[1:]]


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


def _is_per_token(name: str, array: Array) -> bool:
    return name in _PER_TOKEN or array.ndim == 3


def _without_arguments(state: OnnxState) -> OnnxState:
    return {name: array for name, array in state.items() if not name.startswith("argument_")}
