"""The encoder families: what the loop over blocks has to know of each, and nothing more.

An adapter holds no state. The encoder is an argument of every method, so that copying, moving or wrapping a model
needs no care here.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask


class BertAdapter:
    """bert, ernie: absolute positions, post-norm blocks that need an attention mask."""

    model_types: ClassVar[tuple[str, ...]] = ("bert", "ernie")
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

    def embed(self, encoder: Any, inputs: dict[str, Tensor | None], attention_mask: Tensor | None) -> Tensor:
        """h_0, (rows, tokens, hidden), from input_ids or inputs_embeds, token_type_ids and position_ids."""
        hidden_states: Tensor = encoder.embeddings(**inputs)
        return hidden_states

    def blocks(self, encoder: Any) -> Sequence[nn.Module]:
        """The transformer blocks, first to last."""
        blocks: Sequence[nn.Module] = encoder.encoder.layer
        return blocks

    def block_arguments(
        self, encoder: Any, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> dict[str, Any]:
        """What the blocks need besides hidden_states (rows, tokens, hidden); made anew when any of them are dropped."""
        return {"attention_mask": padding_mask(encoder.config, hidden_states, attention_mask)}

    def run_block(self, encoder: Any, layer: int, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
        """h_layer from h_{layer-1}; layers count from 1."""
        hidden_states = self.blocks(encoder)[layer - 1](hidden_states, **arguments)
        return hidden_states

    def final_norm(self, encoder: Any) -> nn.Module | None:
        """What the encoder does to its stream after the last block; `None`: nothing."""
        return None

    def classify(self, encoder: Any, head: Any, last_hidden_state: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits (rows, labels) of transformers' own classifier of this family.

        Args:
            head: the modules of that classifier besides its encoder, by its names for them.
            last_hidden_state: (rows, tokens, hidden), what the encoder itself returns.
        """
        logits: Tensor = head.classifier(head.dropout(encoder.pooler(first_token(last_hidden_state, attention_mask))))
        return logits


class RobertaAdapter(BertAdapter):
    """roberta and its kin: as bert, but positions start after the padding index and are read off the token ids."""

    model_types: ClassVar[tuple[str, ...]] = ("roberta", "xlm-roberta", "camembert")

    def padding_index(self, config: Any) -> int:
        """The position that stands for padding; that of the first token is one more."""
        return int(config.pad_token_id)

    def max_tokens(self, config: Any) -> int:
        return int(config.max_position_embeddings - self.padding_index(config) - 1)

    def position_ids(
        self, config: Any, columns: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor | None:
        if input_ids is not None or attention_mask is None:
            return None
        positions: Any = super().position_ids(config, columns, None, attention_mask)
        return positions + self.padding_index(config) + 1  # type: ignore[no-any-return]

    def classify(self, encoder: Any, head: Any, last_hidden_state: Tensor, attention_mask: Tensor | None) -> Tensor:
        logits: Tensor = head.classifier(first_token(last_hidden_state, attention_mask))
        return logits


class MPNetAdapter(RobertaAdapter):
    """mpnet: positions as in roberta, no token types, and a bias for relative positions that all blocks share."""

    model_types = ("mpnet",)

    def padding_index(self, config: Any) -> int:
        return 1

    def embed(self, encoder: Any, inputs: dict[str, Tensor | None], attention_mask: Tensor | None) -> Tensor:
        return super().embed(encoder, _without_token_types(inputs), attention_mask)

    def block_arguments(
        self, encoder: Any, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> dict[str, Any]:
        arguments = super().block_arguments(encoder, hidden_states, attention_mask, position_ids)
        return {**arguments, "position_bias": encoder.encoder.compute_position_bias(hidden_states)}

    def run_block(self, encoder: Any, layer: int, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
        return super().run_block(encoder, layer, hidden_states, arguments)[0]


class DistilBertAdapter(BertAdapter):
    """distilbert: as bert, under other names and without token types."""

    model_types = ("distilbert",)

    def encoder_arguments(self) -> dict[str, Any]:
        return {}

    def embed(self, encoder: Any, inputs: dict[str, Tensor | None], attention_mask: Tensor | None) -> Tensor:
        return super().embed(encoder, _without_token_types(inputs), attention_mask)

    def blocks(self, encoder: Any) -> Sequence[nn.Module]:
        blocks: Sequence[nn.Module] = encoder.transformer.layer
        return blocks

    def classify(self, encoder: Any, head: Any, last_hidden_state: Tensor, attention_mask: Tensor | None) -> Tensor:
        pooled = head.pre_classifier(first_token(last_hidden_state, attention_mask)[:, 0])
        logits: Tensor = head.classifier(head.dropout(torch.relu(pooled)))
        return logits


class ElectraAdapter(BertAdapter):
    """electra: as bert, with embeddings that may be narrower than the blocks."""

    model_types = ("electra",)

    def encoder_arguments(self) -> dict[str, Any]:
        return {}

    def embed(self, encoder: Any, inputs: dict[str, Tensor | None], attention_mask: Tensor | None) -> Tensor:
        hidden_states = super().embed(encoder, inputs, attention_mask)
        return encoder.embeddings_project(hidden_states) if hasattr(encoder, "embeddings_project") else hidden_states

    def classify(self, encoder: Any, head: Any, last_hidden_state: Tensor, attention_mask: Tensor | None) -> Tensor:
        logits: Tensor = head.classifier(first_token(last_hidden_state, attention_mask))
        return logits


class AlbertAdapter(BertAdapter):
    """albert: as bert, with narrow embeddings, and groups of blocks that share their weights."""

    model_types = ("albert",)

    def embed(self, encoder: Any, inputs: dict[str, Tensor | None], attention_mask: Tensor | None) -> Tensor:
        hidden_states: Tensor = encoder.encoder.embedding_hidden_mapping_in(
            super().embed(encoder, inputs, attention_mask)
        )
        return hidden_states

    def blocks(self, encoder: Any) -> Sequence[nn.Module]:
        groups, number = encoder.encoder.albert_layer_groups, encoder.config.num_hidden_layers
        return [groups[layer * len(groups) // number] for layer in range(number)]

    def classify(self, encoder: Any, head: Any, last_hidden_state: Tensor, attention_mask: Tensor | None) -> Tensor:
        pooled = encoder.pooler(first_token(last_hidden_state, attention_mask)[:, 0])
        logits: Tensor = head.classifier(head.dropout(encoder.pooler_activation(pooled)))
        return logits


class MegatronBertAdapter(BertAdapter):
    """megatron-bert: as bert, but pre-norm, with a norm after the last block."""

    model_types = ("megatron-bert",)
    pre_norm = True

    def run_block(self, encoder: Any, layer: int, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
        return super().run_block(encoder, layer, hidden_states, arguments)[0]

    def final_norm(self, encoder: Any) -> nn.Module | None:
        norm: nn.Module = encoder.encoder.ln
        return norm


class DebertaAdapter(BertAdapter):
    """deberta, deberta-v2: relative positions, a mask of their own, and in v2 a convolution beside the first block."""

    model_types = ("deberta", "deberta-v2")

    def encoder_arguments(self) -> dict[str, Any]:
        return {}

    def embed(self, encoder: Any, inputs: dict[str, Tensor | None], attention_mask: Tensor | None) -> Tensor:
        # Sets padding to zero: the convolution of v2 looks across the edge of a text.
        return super().embed(encoder, {**inputs, "mask": attention_mask}, attention_mask)

    def block_arguments(
        self, encoder: Any, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> dict[str, Any]:
        if attention_mask is None:
            attention_mask = torch.ones(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
        blocks = encoder.encoder
        return {
            "convolution": attention_mask,
            "block": {
                "attention_mask": blocks.get_attention_mask(attention_mask),
                "relative_pos": blocks.get_rel_pos(hidden_states),
                "rel_embeddings": blocks.get_rel_embedding(),
            },
        }

    def run_block(self, encoder: Any, layer: int, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
        output = super().run_block(encoder, layer, hidden_states, arguments["block"])[0]
        convolution = getattr(encoder.encoder, "conv", None) if layer == 1 else None
        return output if convolution is None else convolution(hidden_states, output, arguments["convolution"])

    def classify(self, encoder: Any, head: Any, last_hidden_state: Tensor, attention_mask: Tensor | None) -> Tensor:
        pooled = head.pooler(first_token(last_hidden_state, attention_mask))
        logits: Tensor = head.classifier(head.dropout(pooled))
        return logits


class EuroBertAdapter(BertAdapter):
    """eurobert: pre-norm, with rotary positions."""

    model_types = ("eurobert",)
    pre_norm = True

    def encoder_arguments(self) -> dict[str, Any]:
        return {}

    def position_ids(
        self, config: Any, columns: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor | None:
        # Rotary positions are relative: where a row starts is of no account, so all rows can share one.
        return columns[None]

    def embed(self, encoder: Any, inputs: dict[str, Tensor | None], attention_mask: Tensor | None) -> Tensor:
        embeddings = inputs["inputs_embeds"]
        return encoder.embed_tokens(inputs["input_ids"]) if embeddings is None else embeddings

    def blocks(self, encoder: Any) -> Sequence[nn.Module]:
        blocks: Sequence[nn.Module] = encoder.layers
        return blocks

    def block_arguments(
        self, encoder: Any, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> dict[str, Any]:
        arguments = super().block_arguments(encoder, hidden_states, attention_mask, position_ids)
        return {**arguments, "position_embeddings": encoder.rotary_emb(hidden_states, position_ids)}

    def final_norm(self, encoder: Any) -> nn.Module | None:
        norm: nn.Module = encoder.norm
        return norm

    def classify(self, encoder: Any, head: Any, last_hidden_state: Tensor, attention_mask: Tensor | None) -> Tensor:
        pooling = encoder.config.classifier_pooling
        tokens = last_hidden_state
        if pooling == "bos":
            tokens = first_token(tokens, attention_mask)[:, 0]
        elif pooling == "mean":
            tokens = _mean(tokens, attention_mask)
        logits: Tensor = head.classifier(head.activation(head.dense(tokens)))
        return _mean(logits, attention_mask) if pooling == "late" else logits


class NomicBertAdapter(EuroBertAdapter):
    """nomic_bert: rotary positions, but post-norm, with token types."""

    model_types = ("nomic_bert",)
    pre_norm = False

    def embed(self, encoder: Any, inputs: dict[str, Tensor | None], attention_mask: Tensor | None) -> Tensor:
        return BertAdapter.embed(self, encoder, inputs, attention_mask)

    def final_norm(self, encoder: Any) -> nn.Module | None:
        return None

    def classify(self, encoder: Any, head: Any, last_hidden_state: Tensor, attention_mask: Tensor | None) -> Tensor:
        return BertAdapter.classify(self, encoder, head, last_hidden_state, attention_mask)


class ModernBertAdapter(EuroBertAdapter):
    """modernbert: pre-norm; rotary positions and a mask for each kind of attention, full and sliding window."""

    model_types = ("modernbert",)

    def embed(self, encoder: Any, inputs: dict[str, Tensor | None], attention_mask: Tensor | None) -> Tensor:
        hidden_states: Tensor = encoder.embeddings(input_ids=inputs["input_ids"], inputs_embeds=inputs["inputs_embeds"])
        return hidden_states

    def block_arguments(
        self, encoder: Any, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> dict[str, Any]:
        masks = {"full_attention": padding_mask, "sliding_attention": create_bidirectional_sliding_window_mask}
        return {
            kind: {
                "attention_mask": masks[kind](encoder.config, hidden_states, attention_mask),
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

    def classify(self, encoder: Any, head: Any, last_hidden_state: Tensor, attention_mask: Tensor | None) -> Tensor:
        if encoder.config.classifier_pooling == "cls":
            pooled = first_token(last_hidden_state, attention_mask)[:, 0]
        else:
            ones = torch.ones(last_hidden_state.shape[:2], dtype=torch.bool, device=last_hidden_state.device)
            pooled = _mean(last_hidden_state, ones if attention_mask is None else attention_mask)
        logits: Tensor = head.classifier(head.drop(head.head(pooled)))
        return logits


def padding_mask(config: Any, hidden_states: Tensor, attention_mask: Tensor | None) -> Any:
    """What attention takes to pass padding over, in the form that its implementation wants."""
    if attention_mask is None or config._attn_implementation not in ("eager", "sdpa"):
        return create_bidirectional_mask(config, hidden_states, attention_mask)
    # (rows, 1, 1, tokens), added to scores. Theirs is the same for each token that attends; it takes 5 to 13 times as
    # long to make on a CPU, and 18 operators of every exported stage.
    padding = 1.0 - attention_mask[:, None, None, :].to(hidden_states.dtype)
    return padding * torch.finfo(hidden_states.dtype).min


def first_token(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The first token of every row, (rows, 1, hidden), which padding on the left can move from column 0."""
    if attention_mask is None:
        return tokens[:, :1]
    first = attention_mask.long().argmax(dim=1)
    return tokens[torch.arange(len(tokens), device=tokens.device), first][:, None]


def _mean(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean over a row's tokens, (rows, tokens, n) to (rows, n), summed in the order in which transformers does."""
    if attention_mask is None:
        return tokens.mean(dim=1)
    return (tokens * attention_mask[..., None]).sum(dim=1) / attention_mask.sum(dim=1, keepdim=True)


def _without_token_types(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: value for name, value in inputs.items() if name != "token_type_ids"}


_ADAPTERS = {
    model_type: adapter
    for adapter in (
        AlbertAdapter(),
        BertAdapter(),
        DebertaAdapter(),
        DistilBertAdapter(),
        ElectraAdapter(),
        EuroBertAdapter(),
        MPNetAdapter(),
        MegatronBertAdapter(),
        ModernBertAdapter(),
        NomicBertAdapter(),
        RobertaAdapter(),
    )
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
