"""The stages of a model as modules that take and return tensors by name: what engines trace or compile."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from transformers_badge.inference.named_stages import NamedState, exit_stage
from transformers_badge.model.outputs_badge import BlockState


class StageModule(nn.Module):
    """The blocks up to an exit, and that exit. What blocks need besides, masks for example, every stage makes anew."""

    takes: tuple[str, ...]  # of a state, what there is of it

    def __init__(self, model: Any, exit_index: int) -> None:
        super().__init__()
        self.model, self.exit_index = model, exit_index

    def given(self, state: NamedState) -> NamedState:
        """What this stage takes of a state."""
        return {name: state[name] for name in self.takes if name in state}


class FirstBlocksAndExit(StageModule):
    """The embedding, the blocks up to the first exit that has any before it, and that exit."""

    takes = ("input_ids", "attention_mask", "token_type_ids", "lexical_logits")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        lexical_logits: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """From (rows, tokens), int64."""
        inputs = {"input_ids": input_ids, "inputs_embeds": None, "token_type_ids": token_type_ids}
        state = self.model.embed(BlockState(inputs, attention_mask, None, lexical_logits))
        positions = state.position_ids
        if positions is not None:
            # One row of positions can stand for all: here each has its own, as when rows were dropped and merged; and
            # they are no view, for which a compiled stage would need a graph of its own.
            positions = positions.expand(input_ids.shape).clone(memory_format=torch.contiguous_format)
        outputs = run_to_exit(self.model, self.exit_index, replace(state, position_ids=positions))
        return {**outputs, **present(position_ids=positions)} if "hidden_states" in outputs else outputs


class BlocksAndExit(StageModule):
    """The blocks since one exit, and the next."""

    takes = ("hidden_states", "attention_mask", "position_ids", "bypass_state", "lexical_logits")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        bypass_state: Tensor | None = None,
        lexical_logits: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As in `BlockState`."""
        state = BlockState({}, attention_mask, position_ids, lexical_logits, hidden_states, bypass_state)
        return run_to_exit(self.model, self.exit_index, state)


def make_stages(model: Any) -> dict[str, StageModule]:
    """The stages of a model by name, in their order. What one takes is what those before it have made, or the rows."""
    first, *others = [index for index, layer in enumerate(model.exit_layers) if layer > 0]
    stages: dict[str, StageModule] = {exit_stage(model.exit_layers[first]): FirstBlocksAndExit(model, first)}
    for index in others:
        stages[exit_stage(model.exit_layers[index])] = BlocksAndExit(model, index)
    return stages


def run_to_exit(model: Any, exit_index: int, state: BlockState) -> dict[str, Tensor]:
    """Run the blocks since the exit before, and read the exit: its logits, and what the next blocks go on with."""
    layers = model.exit_layers
    first = layers[exit_index - 1] + 1 if exit_index else 1
    for layer in range(first, layers[exit_index] + 1):
        state = model.run_block(layer, state)
    logits = model.read_exit(exit_index, state)
    if exit_index == len(layers) - 1:
        return {"logits": logits}
    return present(hidden_states=state.hidden_states, bypass_state=state.bypass_state, logits=logits)


def unused_sizes(model: Any) -> tuple[int, int]:
    """How many rows and tokens an example has to have for its axes to be told apart by their sizes.

    Neither is a size of anything in the model, such as its number of labels: what is of one size in an example is taken
    to be so always.
    """
    config = model.config.get_text_config()
    taken = {size for tensor in model.state_dict().values() for size in tensor.shape}
    taken |= {value for value in config.to_dict().values() if isinstance(value, int)}
    taken |= {config.hidden_size // config.num_attention_heads, model.config.lexical_columns}
    rows, tokens = [size for size in range(2, len(taken) + 4) if size not in taken][:2]
    return rows, tokens


def present(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Those that there are."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
