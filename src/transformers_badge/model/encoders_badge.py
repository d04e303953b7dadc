"""The encoder families: what the loop over blocks has to know of each, and nothing more.

An adapter holds no state. The encoder is an argument of every method, so that copying, moving or wrapping a model
needs no care here.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask


class BertAdapter:
    """bert: absolute positions, post-norm blocks that need an attention mask."""

    model_types: ClassVar[tuple[str, ...]] = ("bert",)
    # Pre-norm blocks hand on an unnormalised stream: an exit has to normalise what it reads.
    pre_norm: ClassVar[bool] = False

    def encoder_arguments(self) -> dict[str, Any]:
        """Arguments with which `AutoModel` builds the encoder without parts that nothing here trains or reads."""
        return {"add_pooling_layer": False}

    def max_tokens(self, config: Any) -> int:
        """How many tokens a row may have."""
        return int(config.max_position_embeddings)

    def position_ids(
        self, config: Any, columns: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor | None:
        """Positions (rows or 1, tokens), counted from a row's first token, so that padding on the left moves nothing.

        `None` where the encoder's embeddings see to it. Right-padded rows get 0, 1, 2, ..., as in transformers.

        Args:
            columns: (tokens,), 0, 1, 2, ...
        """
        if attention_mask is None:
            return None
        return (columns - attention_mask.long().argmax(dim=1, keepdim=True)).clamp(min=0)

    def embed(self, encoder: Any, inputs: dict[str, Tensor | None]) -> Tensor:
        """h_0, (rows, tokens, hidden), from input_ids or inputs_embeds, token_type_ids and position_ids."""
        hidden_states: Tensor = encoder.embeddings(**inputs)
        return hidden_states

    def blocks(self, encoder: Any) -> nn.ModuleList:
        """The transformer blocks, first to last."""
        blocks: nn.ModuleList = encoder.encoder.layer
        return blocks

    def block_arguments(
        self, encoder: Any, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> dict[str, Any]:
        """What the blocks need besides hidden_states (rows, tokens, hidden). Made anew when rows or columns are
        dropped.
        """
        mask = create_bidirectional_mask(
            config=encoder.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
        )
        return {"attention_mask": mask}

    def run_block(self, encoder: Any, layer: int, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
        """h_layer from h_{layer-1}; layers count from 1."""
        hidden_states = self.blocks(encoder)[layer - 1](hidden_states, **arguments)
        return hidden_states

    def final_norm(self, encoder: Any) -> nn.Module | None:
        """What the encoder does to its stream after the last block; `None`: nothing."""
        return None


class RobertaAdapter(BertAdapter):
    """roberta: as bert, but positions start after the padding index and are read off the token ids."""

    model_types = ("roberta",)

    def max_tokens(self, config: Any) -> int:
        return int(config.max_position_embeddings - config.pad_token_id - 1)

    def position_ids(
        self, config: Any, columns: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor | None:
        if input_ids is not None or attention_mask is None:
            return None
        positions: Any = super().position_ids(config, columns, None, attention_mask)
        return positions + config.pad_token_id + 1  # type: ignore[no-any-return]


class DistilBertAdapter(BertAdapter):
    """distilbert: as bert, under other names and without token types."""

    model_types = ("distilbert",)

    def encoder_arguments(self) -> dict[str, Any]:
        return {}

    def embed(self, encoder: Any, inputs: dict[str, Tensor | None]) -> Tensor:
        return super().embed(encoder, {name: value for name, value in inputs.items() if name != "token_type_ids"})

    def blocks(self, encoder: Any) -> nn.ModuleList:
        blocks: nn.ModuleList = encoder.transformer.layer
        return blocks


class ModernBertAdapter(BertAdapter):
    """modernbert: pre-norm; rotary positions and a mask for each kind of attention, full and sliding window."""

    model_types = ("modernbert",)
    pre_norm = True

    def encoder_arguments(self) -> dict[str, Any]:
        return {}

    def position_ids(
        self, config: Any, columns: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor | None:
        # Rotary positions are relative: where a row starts is of no account, so all rows can share one.
        return columns[None]

    def embed(self, encoder: Any, inputs: dict[str, Tensor | None]) -> Tensor:
        hidden_states: Tensor = encoder.embeddings(input_ids=inputs["input_ids"], inputs_embeds=inputs["inputs_embeds"])
        return hidden_states

    def blocks(self, encoder: Any) -> nn.ModuleList:
        blocks: nn.ModuleList = encoder.layers
        return blocks

    def block_arguments(
        self, encoder: Any, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> dict[str, Any]:
        masks = {
            "full_attention": create_bidirectional_mask,
            "sliding_attention": create_bidirectional_sliding_window_mask,
        }
        return {
            kind: {
                "attention_mask": masks[kind](
                    config=encoder.config,
                    inputs_embeds=hidden_states,
                    attention_mask=attention_mask,
                ),
                "position_embeddings": encoder.rotary_emb(hidden_states, position_ids, kind),
            }
            for kind in sorted(set(encoder.config.layer_types))
        }

    def run_block(self, encoder: Any, layer: int, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
        kind = encoder.config.layer_types[layer - 1]
        return super().run_block(encoder, layer, hidden_states, arguments[kind])

    def final_norm(self, encoder: Any) -> nn.Module | None:
        norm: nn.Module = encoder.final_norm
        return norm


_ADAPTERS = {
    model_type: adapter
    for adapter in (BertAdapter(), RobertaAdapter(), DistilBertAdapter(), ModernBertAdapter())
    for model_type in adapter.model_types
}


def get_adapter(model_type: str | None) -> BertAdapter:
    """The adapter of an encoder family.

    Raises:
        ValueError: the family has none; the message lists those that have.
    """
    if model_type not in _ADAPTERS:
        raise ValueError(
            f"No encoder of model_type {model_type!r} is supported; supported are {', '.join(sorted(_ADAPTERS))}. "
            "docs/encoders.md says how to add one."
        )
    return _ADAPTERS[model_type]
