"""The stages of a model, each compiled by torch.compile: one graph for all shapes, so that nothing compiles later."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformers_badge.inference.exit_logits import digest_model
from transformers_badge.inference.named_stages import ARGUMENTS, NamedStages, NamedState, exit_stage
from transformers_badge.inference.predictor import PredictorConfig
from transformers_badge.inference.stage_modules import (
    Arguments,
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


class CompiledStages(NamedStages):
    """A model that torch.compile has compiled; it runs where the model is, and in its dtype.

    Args:
        model: a `BadgeForSequenceClassification`, in eval mode. Its weights are not copied.
        backend: of torch.compile.
    """

    def __init__(self, model: Any, backend: str = "inductor") -> None:
        super().__init__(model.exit_layers, model.padding_id)
        self._model = model
        mask = torch.ones(2, 3, dtype=torch.long, device=model.device)
        mask[1, 2:] = 0  # or no mask would be made
        with torch.no_grad():
            inputs = {"input_ids": torch.zeros_like(mask), "inputs_embeds": None, "token_type_ids": None}
            embedded = model.embed(BlockState(inputs, mask, None))
            arguments = block_arguments(model, embedded.hidden_states, mask, embedded.position_ids)
        self._arguments = list(name_arguments(arguments))
        first, *others = [index for index, layer in enumerate(model.exit_layers) if layer > 0]
        stages: dict[str, nn.Module] = {exit_stage(model.exit_layers[first]): FirstBlocksAndExit(model, first)}
        takes = ("input_ids", "attention_mask", "token_type_ids", "lexical_logits")
        self._takes: dict[str, tuple[str, ...]] = dict.fromkeys(stages, takes)
        if others:
            stages[ARGUMENTS] = Arguments(model)
            self._takes[ARGUMENTS] = ("hidden_states", "attention_mask", "position_ids")
        for index in others:
            name = exit_stage(model.exit_layers[index])
            stages[name] = BlocksAndExit(model, index, arguments)
            self._takes[name] = ("hidden_states", "attention_mask", "bypass_state", "lexical_logits")
        self._stages = {name: torch.compile(stage, dynamic=True, backend=backend) for name, stage in stages.items()}

    def compile(self) -> "CompiledStages":
        """Compile every stage now, not when it is first met."""
        several, tokens = unused_sizes(self._model)
        # The stages of all models in a process share code, and torch gives up on code that it has compiled eight times.
        with torch._dynamo.config.patch(recompile_limit=_MANY, accumulated_recompile_limit=_MANY):
            for rows in (several, 1):  # single rows have graphs of their own
                ids = np.zeros((rows, tokens), np.int64)
                state = self.embed(self.begin_padded(ids, np.ones_like(ids)))
                for layer in self.exit_layers:
                    if layer > 0:
                        state = self.run_block(layer, state)
                        self.compact(state, None, slice(0, tokens), padded=False)
        return self

    @torch.no_grad()
    def run(self, stage: str, state: NamedState) -> NamedState:
        """The state with what the stage made in it."""
        given = {name: state[name] for name in self._takes[stage] if name in state}
        if "hidden_states" in given and stage != ARGUMENTS:
            given["arguments"] = [state[name] for name in self._arguments]
        return {**state, **self._stages[stage](**given)}

    @torch.no_grad()
    def lexical_logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What exit 0 says: a look-up, with nothing to compile."""
        return self._model.exits[0](input_ids, attention_mask)  # type: ignore[no-any-return]

    def from_host(self, array: Array) -> Tensor:
        """The array where the model is."""
        return torch.from_numpy(array).to(self._model.device)

    def to_host(self, logits: Tensor) -> Array:
        """Logits in numpy: the one wait for the device at each exit."""
        return np.asarray(logits.double().cpu().numpy())

    def keep_rows(self, array: Tensor, rows: Array | None) -> Tensor:
        """These rows of a tensor."""
        if rows is None:
            return array.clone(memory_format=torch.contiguous_format)  # a view would need a graph of its own
        return array.index_select(0, torch.from_numpy(rows).to(array.device))

    def join(self, arrays: list[Tensor], width: int, padding: int) -> Tensor:
        """Tensors below one another."""
        if width:
            arrays = [F.pad(a, (0, 0) * (a.ndim - 2) + (0, width - a.shape[1]), value=padding) for a in arrays]
        return torch.cat(arrays)


def load_compiled(
    name_or_path: str | os.PathLike[str], precision: str
) -> tuple[CompiledStages, PredictorConfig, dict[str, Any], Any]:
    """What a `BadgePredictor` is made of: a checkpoint, compiled.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: an unknown precision.
        RuntimeError: torch.compile cannot compile here.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)} for engine='compiled', got {precision!r}.")
    from transformers import AutoTokenizer

    model = BadgeForSequenceClassification.from_pretrained(name_or_path, dtype=PRECISIONS[precision]).eval()
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
