"""The stages of the loop over blocks in PyTorch, as `early_exit_badge.Stages` asks for them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .inputs_badge import check_inputs, check_lexical
from .modules_badge import scale_gradient
from .outputs_badge import BlockState
from .phrases_badge import with_phrases
from .rows_badge import join_rows, pad_rows


def join_tensors(tensors: list[Tensor], width: int, padding: int) -> Tensor:
    """Tensors below one another, each padded behind, or cut, to so many columns; `width` 0: as wide as they are."""
    if width:
        behind = [(0, 0) * (tensor.ndim - 2) + (0, width - tensor.shape[1]) for tensor in tensors]
        tensors = [F.pad(tensor, pad, value=padding) for tensor, pad in zip(tensors, behind, strict=True)]
    return torch.cat(tensors)


# Positions of tokens that take one thread as long as what a run of a block costs besides, by measurement with MiniLM:
# more threads take less time for positions, and none for the rest. Those of bf16 are of a processor that has it (AMX).
POSITIONS_PER_RUN = {torch.float32: 128, torch.bfloat16: 512}


class BadgeStages:
    """What a model does with the rows that are inside, one step at a time: data in, data out.

    A part of `BadgeForSequenceClassification`, which has the modules that are named here.
    """

    config: Any
    training: bool
    device: torch.device
    dtype: torch.dtype
    num_labels: int
    adapter: Any
    encoder: Any
    exits: nn.ModuleList
    bypasses: nn.ModuleList
    exit_layers: list[int]
    bypass_layers: list[int]

    @property
    def max_tokens(self) -> int:
        """How many tokens a row may have."""
        return int(self.adapter.max_tokens(self.config.encoder_config))

    @property
    def run_cost(self) -> float:
        """What a run costs however many rows there are, in positions: none is worth a run more on an accelerator."""
        if self.device.type != "cpu":
            return float("inf")
        return POSITIONS_PER_RUN.get(self.dtype, POSITIONS_PER_RUN[torch.float32]) * torch.get_num_threads()

    @property
    def padding_id(self) -> int:
        """The token id for padding, from which some families read that a position has no token."""
        padding_id = self.config.get_text_config().pad_token_id
        return 0 if padding_id is None else int(padding_id)

    def begin_padded(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        lexical_logits: Tensor | None = None,
    ) -> BlockState:
        """The state of all rows before they are embedded."""
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids}
        if self.config.lexical_exit:
            lexical: Any = self.exits[0]
            if lexical_logits is not None:
                lexical_logits = lexical_logits.to(lexical.weight.dtype)
            elif self.training:
                tokens: Any = input_ids if input_ids is not None else inputs_embeds
                lexical_logits = lexical.bias.new_zeros(len(tokens), self.config.lexical_columns)
            else:
                lexical_logits = lexical(input_ids, attention_mask)
        return BlockState(inputs, attention_mask, position_ids, lexical_logits)

    def begin(self, rows: list[dict[str, list[int]]]) -> tuple[BlockState, Any]:
        """Rows of tokens, checked and padded on the right, and their mask (rows, tokens), bool."""
        inputs, mask = pad_rows(rows, self.padding_id)
        tensors = {name: torch.from_numpy(value).to(self.device) for name, value in inputs.items()}
        attention_mask = self._attention_mask(mask)
        self._check(tensors["input_ids"], attention_mask, None)
        return self.begin_padded(tensors["input_ids"], attention_mask, tensors.get("token_type_ids"), None, None), mask

    def embed(self, state: BlockState) -> BlockState:
        """The rows before the first block."""
        positions, mask = state.position_ids, state.attention_mask
        if positions is None:
            tokens: Any = next(value for value in state.inputs.values() if value is not None)
            columns = torch.arange(tokens.shape[1], device=tokens.device)
            positions = self.adapter.position_ids(self.encoder.config, columns, state.inputs["input_ids"], mask)
        with self._encoder_gradients():
            hidden_states = self.adapter.embed(self.encoder, {**state.inputs, "position_ids": positions}, mask)
        return replace(state, inputs={}, position_ids=positions, hidden_states=hidden_states)

    def run_block(self, layer: int, state: BlockState) -> BlockState:
        """Block `layer` (from 1), its bypass, and what its exit reads."""
        assert state.hidden_states is not None
        arguments = state.block_arguments
        with self._encoder_gradients():
            if arguments is None:  # these rows and columns have met no block yet
                arguments = self.adapter.block_arguments(
                    self.encoder, state.hidden_states, state.attention_mask, state.position_ids
                )
            hidden_states = self.adapter.run_block(self.encoder, layer, state.hidden_states, arguments)
        bypass_state, pooled, onward = state.bypass_state, None, 1.0
        on_tokens = self.config.bypass_reads != "pooled"
        if on_tokens and layer in self.bypass_layers:
            reading = state.hidden_states if self.config.bypass_reads == "block_input" else hidden_states
            bypass_state = self._bypass(layer, self._read_from_encoder(reading), bypass_state)
        if layer in self.exit_layers[:-1]:
            index = self.exit_layers.index(layer)
            share, onward = self.config.gradient_scales(index)
            tokens = scale_gradient(self._read_from_encoder(hidden_states), share)
            if on_tokens and bypass_state is not None:
                tokens = tokens + bypass_state
            exit_: Any = self.exits[index]
            pooled = exit_.pool(tokens, state.attention_mask)
            if not on_tokens and self.bypass_layers:
                bypass_state = self._bypass(layer, pooled, bypass_state)
                pooled = pooled + bypass_state
        return replace(
            state,
            hidden_states=scale_gradient(hidden_states, onward),
            bypass_state=None if bypass_state is None else scale_gradient(bypass_state, onward),
            pooled=pooled,
            block_arguments=arguments,
        )

    def read_exit(self, exit_index: int, state: BlockState) -> Tensor:
        """Logits (rows, labels) of exit `exit_index` (from 0)."""
        exit_: Any = self.exits[exit_index]
        if state.hidden_states is None:
            return with_phrases(state.lexical_logits, self.num_labels)  # type: ignore[no-any-return]
        if state.pooled is not None:
            return exit_(state.pooled, state.lexical_logits)  # type: ignore[no-any-return]
        # The last exit reads the encoder alone, through its final norm.
        tokens = self._read_from_encoder(state.hidden_states)
        norm = self.adapter.final_norm(self.encoder)
        if norm is not None:
            weights = {name: self._read_from_encoder(weight) for name, weight in norm.named_parameters()}
            tokens = torch.func.functional_call(norm, weights, (tokens,))
        if self.config.source_head:
            with self._encoder_gradients():
                return self.adapter.classify(self.encoder, exit_, tokens, state.attention_mask)  # type: ignore[no-any-return]
        pooled = exit_.pool(tokens, state.attention_mask)
        return exit_(pooled, state.lexical_logits)  # type: ignore[no-any-return]

    def compact(self, state: BlockState, rows: Any, columns: slice, padded: bool) -> BlockState:
        """Keep these rows (`None`: all) and columns of the state."""
        index = None if rows is None else torch.from_numpy(rows).to(self.device)

        def keep(tensor: Tensor | None, shared: bool = False, pooled: bool = False) -> Tensor | None:
            if tensor is None:
                return None
            kept = tensor if pooled else tensor[:, columns]
            return kept if index is None or shared else kept.index_select(0, index)

        hidden_states = keep(state.hidden_states)
        mask = keep(state.attention_mask) if padded else None
        positions = state.position_ids
        positions = keep(positions, shared=positions is not None and len(positions) == 1)
        return BlockState(
            {name: keep(value) for name, value in state.inputs.items()},
            mask,
            positions,
            keep(state.lexical_logits, pooled=True),
            hidden_states,
            keep(state.bypass_state, pooled=self.config.bypass_reads == "pooled"),
        )

    def merge(self, states: list[BlockState], masks: list[Any]) -> tuple[BlockState, Any]:
        """One state of several at the same depth that `begin` began, padded on the right to the widest; its mask."""
        width = max(mask.shape[1] for mask in masks)
        mask = join_rows(masks, width)

        def join(tensors: list[Tensor | None], padding: int = 0, pooled: bool = False) -> Tensor | None:
            like = next((tensor for tensor in tensors if tensor is not None), None)
            if like is None:
                return None
            # Only token types can be missing from some: they are 0 then.
            given = [like.new_zeros(m.shape) if t is None else t for t, m in zip(tensors, masks, strict=True)]
            return join_tensors(given, 0 if pooled else width, padding)

        hidden_states = join([state.hidden_states for state in states])
        attention_mask = self._attention_mask(mask)
        # Positions count from column 0 in every row that `begin` began: those of one of the widest hold for all.
        positions = next(state.position_ids for state, m in zip(states, masks, strict=True) if m.shape[1] == width)
        positions = None if positions is None else positions[:1]
        merged = BlockState(
            {
                name: join([state.inputs[name] for state in states], self.padding_id if name == "input_ids" else 0)
                for name in states[0].inputs
            },
            attention_mask,
            positions,
            join([state.lexical_logits for state in states], pooled=True),
            hidden_states,
            join([state.bypass_state for state in states], pooled=self.config.bypass_reads == "pooled"),
        )
        return merged, mask

    def to_host(self, logits: Tensor) -> Any:
        """Logits in numpy: the one wait for the device at each exit."""
        return logits.double().cpu().numpy()

    def _check(self, input_ids: Any, attention_mask: Any, inputs_embeds: Any, lexical_logits: Any = None) -> Tensor:
        """The tokens of a batch, ids or embeddings, once it is known to be sound."""
        config = self.config.get_text_config()
        check_inputs(input_ids, attention_mask, inputs_embeds, config.vocab_size, self.max_tokens)
        tokens: Tensor = input_ids if inputs_embeds is None else inputs_embeds
        shape = len(tokens), self.config.lexical_columns
        check_lexical(lexical_logits, input_ids, shape, self.config.lexical_exit)
        return tokens

    def _attention_mask(self, mask: Any) -> Tensor | None:
        """(rows, tokens), int64, of a mask in numpy; `None` where nothing is padded."""
        return None if mask.all() else torch.from_numpy(mask).to(self.device, torch.long)

    def _bypass(self, layer: int, reading: Tensor, bypass_state: Tensor | None) -> Tensor:
        """The next bypass state, from what the bypass at this layer reads of the encoder."""
        bypass = self.bypasses[self.bypass_layers.index(layer)]
        return bypass(reading if bypass_state is None else reading + bypass_state, bypass_state)  # type: ignore[no-any-return]

    def _encoder_gradients(self) -> Any:
        """A frozen encoder needs no graph: a step costs less."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen)

    def _read_from_encoder(self, tensor: Tensor) -> Tensor:
        """A tensor of the encoder, with the gradient that goes back into it scaled by `exit_gradient`."""
        scale = self.config.exit_gradient
        return scale_gradient(tensor, 1.0 if isinstance(scale, str) else scale)
