"""The stages of a model as modules that take and return tensors by name: what engines trace or compile."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from transformers_badge.inference.named_stages import argument
from transformers_badge.model.outputs_badge import BlockState


class FirstBlocksAndExit(nn.Module):
    """The embedding, the blocks up to the first exit that has any before it, and that exit.

    Args:
        with_arguments: also hand on what the next blocks need besides, as `BlocksAndExit` takes it.
    """

    def __init__(self, model: Any, exit_index: int, with_arguments: bool = True) -> None:
        super().__init__()
        self.model, self.exit_index, self.with_arguments = model, exit_index, with_arguments

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
        # One row of positions can stand for all: here each has its own, as when rows were dropped and merged.
        positions = None if state.position_ids is None else state.position_ids.expand(input_ids.shape)
        made = block_arguments(self.model, state.hidden_states, attention_mask, positions)
        outputs = run_to_exit(self.model, self.exit_index, replace(state, position_ids=positions, block_arguments=made))
        if "hidden_states" not in outputs:
            return outputs
        return {**outputs, **present(position_ids=positions), **(name_arguments(made) if self.with_arguments else {})}


class Arguments(nn.Module):
    """What blocks need besides, once rows or columns were dropped."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As in `BlockState`."""
        return name_arguments(block_arguments(self.model, hidden_states, attention_mask, position_ids))


class BlocksAndExit(nn.Module):
    """The blocks since one exit, and the next.

    Args:
        arguments: what the model hands its blocks: these have the same structure, and other tensors.
    """

    def __init__(self, model: Any, exit_index: int, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.exit_index = model, exit_index
        # `...` is where a tensor goes: one kept here would tie a compiled graph to its shape.
        self.structure = _fill(arguments, iter([...] * len(name_arguments(arguments))))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        arguments: list[Tensor],
        bypass_state: Tensor | None = None,
        lexical_logits: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As in `BlockState`; arguments in the order of `name_arguments`."""
        made = _fill(self.structure, iter(arguments))
        state = BlockState({}, attention_mask, None, lexical_logits, hidden_states, bypass_state, None, made)
        return run_to_exit(self.model, self.exit_index, state)


class ArgumentsBlocksAndExit(nn.Module):
    """The blocks since one exit, and the next; what blocks need besides is made here."""

    def __init__(self, model: Any, exit_index: int) -> None:
        super().__init__()
        self.model, self.exit_index = model, exit_index

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        bypass_state: Tensor | None = None,
        lexical_logits: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As in `BlockState`."""
        made = block_arguments(self.model, hidden_states, attention_mask, position_ids)
        state = BlockState({}, attention_mask, None, lexical_logits, hidden_states, bypass_state, None, made)
        return run_to_exit(self.model, self.exit_index, state)


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
    taken.add(config.hidden_size // config.num_attention_heads)
    rows, tokens = [size for size in range(2, len(taken) + 4) if size not in taken][:2]
    return rows, tokens


def block_arguments(model: Any, hidden_states: Any, attention_mask: Tensor, position_ids: Any) -> dict[str, Any]:
    """What the blocks of this family need besides the hidden states."""
    made: dict[str, Any] = model.adapter.block_arguments(model.encoder, hidden_states, attention_mask, position_ids)
    return made


def present(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Those that there are."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def name_arguments(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments of blocks, in a fixed order."""
    return {argument(index): tensor for index, tensor in enumerate(_tensors(arguments))}


# Not torch's pytree: what is compiled with it is compiled anew once any library tells it of one more type.
def _tensors(value: Any) -> list[Tensor]:
    """The tensors in dicts, lists and tuples, however deep."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _fill(value: Any, tensors: Iterator[Any]) -> Any:
    """The same dicts, lists and tuples with the next of `tensors` for each tensor, or `...`, that is in them."""
    if isinstance(value, Tensor) or value is ...:
        return next(tensors)
    if isinstance(value, dict):
        return {name: _fill(part, tensors) for name, part in value.items()}
    return type(value)([_fill(part, tensors) for part in value]) if isinstance(value, (list, tuple)) else value
