"""The stages of a model, each compiled by torch.compile: one graph for all shapes, so that nothing compiles later.

On a GPU they are not compiled, which takes minutes, but run as CUDA graphs; see `cuda_graphs`. There rows that have
left are dropped only when that makes a smaller graph: what is left in one costs less than to take it out, and is a
third of its rows at most.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformers_badge.inference.cuda_graphs import CudaGraphs, bucket_rows, bucket_tokens, most_positions
from transformers_badge.inference.exit_logits import digest_model
from transformers_badge.inference.named_stages import (
    ARGUMENTS,
    LexicalWeights,
    NamedStages,
    NamedState,
    exit_stage,
    pad_on_host,
)
from transformers_badge.inference.predictor import PredictorConfig
from transformers_badge.inference.stage_modules import (
    Arguments,
    ArgumentsBlocksAndExit,
    BlocksAndExit,
    FirstBlocksAndExit,
    block_arguments,
    name_arguments,
    unused_sizes,
)
from transformers_badge.model.loss_badge import infer_problem_type
from transformers_badge.model.modeling_badge import BadgeForSequenceClassification
from transformers_badge.model.outputs_badge import BlockState


Array = np.ndarray[Any, np.dtype[Any]]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MANY = 100_000
INSIDE = "inside"  # in a state: which of its rows are still there, in numpy


class CompiledStages(NamedStages):
    """A model that torch.compile has compiled, or in CUDA graphs; it runs where the model is, and in its dtype.

    Args:
        model: a `BadgeForSequenceClassification`, in eval mode. Its weights are not copied.
        backend: of torch.compile.
        graphs: what runs the stages as CUDA graphs. Default: `CudaGraphs` where the model is on a GPU, or else nothing.
    """

    def __init__(self, model: Any, backend: str = "inductor", graphs: Callable[..., CudaGraphs] | None = None) -> None:
        super().__init__(model.exit_layers, model.padding_id, LexicalWeights.of(model))
        self._model = model
        if graphs is None and model.device.type == "cuda":
            graphs = CudaGraphs
        first, *others = [index for index, layer in enumerate(model.exit_layers) if layer > 0]
        takes = ("hidden_states", "attention_mask", "bypass_state", "lexical_logits")
        self._takes: dict[str, tuple[str, ...]] = {exit_stage(model.exit_layers[index]): takes for index in others}
        stages: dict[str, nn.Module] = {}
        self._arguments: list[str] = []
        if graphs is not None:
            # A graph makes what blocks need besides faster than it takes it.
            stages = {exit_stage(model.exit_layers[index]): ArgumentsBlocksAndExit(model, index) for index in others}
            self._takes = dict.fromkeys(self._takes, (*takes, "position_ids"))
        elif others:
            arguments = _example_arguments(model)
            self._arguments = list(name_arguments(arguments))
            stages = {exit_stage(model.exit_layers[index]): BlocksAndExit(model, index, arguments) for index in others}
            stages[ARGUMENTS] = Arguments(model)
            self._takes[ARGUMENTS] = ("hidden_states", "attention_mask", "position_ids")
        name = exit_stage(model.exit_layers[first])
        stages[name] = FirstBlocksAndExit(model, first, with_arguments=bool(self._arguments))
        self._takes[name] = ("input_ids", "attention_mask", "token_type_ids", "lexical_logits")
        self._stages: dict[str, Any] = stages
        self._graphs: CudaGraphs | None
        if graphs is None:
            self._stages = {name: torch.compile(stage, dynamic=True, backend=backend) for name, stage in stages.items()}
            self._graphs = None
        else:
            self._graphs = graphs(stages, model.device, model.max_tokens, most_positions(model.encoder))

    def compile(self) -> "CompiledStages":
        """Compile every stage now, not when it is first met. (CUDA graphs are captured when their shape is met.)"""
        if self._graphs is not None:
            return self
        several, tokens = unused_sizes(self._model)
        # The stages of all models in a process share code, and torch gives up on code that it has compiled eight times.
        with torch._dynamo.config.patch(recompile_limit=_MANY, accumulated_recompile_limit=_MANY):
            for rows in (several, 1):  # single rows have graphs of their own
                ids = np.zeros((rows, tokens), np.int64)
                state = self.embed(self.begin_padded(ids, np.ones_like(ids)))
                for layer in self.exit_layers:
                    if layer > 0:
                        state = self.run_block(layer, state)
                        self.run(ARGUMENTS, self.compact(state, None, slice(0, tokens), padded=False))
        return self

    @torch.no_grad()
    def run(self, stage: str, state: NamedState) -> NamedState:
        """The state with what the stage made in it."""
        if stage not in self._stages:  # stages that make their own arguments
            return state
        given = {name: state[name] for name in self._takes[stage] if name in state}
        if self._arguments and "hidden_states" in given and stage != ARGUMENTS:
            given["arguments"] = [state[name] for name in self._arguments]
        made = self._stages[stage](**given) if self._graphs is None else self._graphs.run(stage, given)
        return {**state, **made}

    def embed(self, state: NamedState) -> NamedState:
        """The rows where the model is; for CUDA graphs, which fetch them, padded at once to the tokens of a bucket."""
        if self._graphs is None:
            return super().embed(state)
        width = bucket_tokens(state["input_ids"].shape[1], self._model.max_tokens)
        paddings = {"input_ids": self._padding_id, "attention_mask": 0, "token_type_ids": 0}
        state = {**state, **{name: pad_on_host(state[name], width, pad) for name, pad in paddings.items()}}
        return {name: torch.from_numpy(array) for name, array in state.items()}

    def read_exit(self, exit_index: int, state: NamedState) -> Any:
        """Logits (rows, labels), of the rows that are still there."""
        logits = super().read_exit(exit_index, state)
        return logits[state[INSIDE]] if INSIDE in state else logits

    def compact(self, state: NamedState, rows: Array | None, columns: slice, padded: bool) -> NamedState:
        """Keep these rows (`None`: all) and token columns; in CUDA graphs only note them, if the graph is the same."""
        if self._graphs is None or "hidden_states" not in state:
            return super().compact(state, rows, columns, padded)
        size, width = state["attention_mask"].shape
        inside = state.get(INSIDE, np.arange(size))
        inside = inside if rows is None else inside[rows]
        most = self._model.max_tokens
        same = bucket_tokens(columns.stop, most) == bucket_tokens(width, most) and columns.start == 0
        if same and bucket_rows(len(inside)) == bucket_rows(size):
            return {**state, INSIDE: inside}
        return super().compact(_without(state, INSIDE), inside, columns, padded)

    def merge(self, states: list[NamedState], masks: list[Array]) -> tuple[NamedState, Array]:
        """One state of several at the same depth, padded on the right, and its mask."""
        dropped = [
            super(CompiledStages, self).compact(_without(state, INSIDE), state[INSIDE], slice(0, mask.shape[1]), True)
            if INSIDE in state
            else state
            for state, mask in zip(states, masks, strict=True)
        ]
        return super().merge(dropped, masks)

    def from_host(self, array: Array) -> Tensor:
        """The array where the model is."""
        return torch.from_numpy(array).to(self._model.device)

    def to_host(self, logits: Tensor) -> Array:
        """Logits in numpy: the one wait for the device at each exit. Those of exit 0, and of graphs, are there."""
        return np.asarray(torch.as_tensor(logits).double().cpu().numpy())

    def keep_rows(self, arrays: list[Tensor], rows: Array | None) -> list[Tensor]:
        """These rows of tensors."""
        if rows is None:  # a view would need a graph of its own
            return [array.clone(memory_format=torch.contiguous_format) for array in arrays]
        index = torch.from_numpy(rows)
        places = {array.device: index.to(array.device) for array in arrays if array.device != index.device}
        return [array.index_select(0, places.get(array.device, index)) for array in arrays]

    def join(self, arrays: list[Tensor], width: int, padding: int) -> Tensor:
        """Tensors below one another."""
        if width:
            # Those that were padded to a bucket can be wider, and are cut.
            arrays = [F.pad(a, (0, 0) * (a.ndim - 2) + (0, width - a.shape[1]), value=padding) for a in arrays]
        return torch.cat(arrays)


def _without(state: NamedState, name: str) -> NamedState:
    return {key: array for key, array in state.items() if key != name}


@torch.no_grad()
def _example_arguments(model: Any) -> dict[str, Any]:
    """What the blocks of a model need besides the hidden states: the structure is always the same."""
    mask = torch.ones(2, 3, dtype=torch.long, device=model.device)
    mask[1, 2:] = 0  # or no mask would be made
    inputs = {"input_ids": torch.zeros_like(mask), "inputs_embeds": None, "token_type_ids": None}
    embedded = model.embed(BlockState(inputs, mask, None))
    return block_arguments(model, embedded.hidden_states, mask, embedded.position_ids)


def check_device(device: str | None) -> torch.device:
    """A device by name; default: the CPU.

    Raises:
        ValueError: there is none of this name, or it is not here.
    """
    try:
        found = torch.device(device or "cpu")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"There is no device {device!r} here ({str(error).splitlines()[0]}): use 'cpu', or 'cuda' where there is a "
            "GPU and a torch built for it."
        ) from error
    return found


def load_compiled(
    name_or_path: str | os.PathLike[str], precision: str, device: str | None = None
) -> tuple[CompiledStages, PredictorConfig, dict[str, Any], Any]:
    """What a `BadgePredictor` is made of: a checkpoint, compiled.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: an unknown precision, or a device that is not here.
        RuntimeError: torch.compile cannot compile here.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)} for engine='compiled', got {precision!r}.")
    from transformers import AutoTokenizer

    model = BadgeForSequenceClassification.from_pretrained(name_or_path, dtype=PRECISIONS[precision]).eval()
    model.to(check_device(device))
    try:
        stages = CompiledStages(model).compile()
    except torch._dynamo.exc.TorchDynamoException as error:
        raise RuntimeError(
            f"torch.compile cannot compile here ({str(error).splitlines()[0]}): it needs a C++ compiler, such as g++."
        ) from error
    config = model.config
    problem_type = infer_problem_type(config.problem_type, model.num_labels, None)
    manifest = {
        "num_labels": model.num_labels,
        "precision": precision,
        "max_tokens": model.max_tokens,
        "vocab_size": config.get_text_config().vocab_size,
        "digest": digest_model(model),
    }
    policy = config.exit_policy if precision == "fp32" else replace(config.exit_policy, certificate=None)
    facts = PredictorConfig(config.id2label, problem_type, policy, model.num_labels, config.lexical_exit)
    return stages, facts, manifest, AutoTokenizer.from_pretrained(name_or_path)
