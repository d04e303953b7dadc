"""BADGE: a pretrained encoder with a light bypass beside every block and a classifier, an exit, after it.

    h_0 = embeddings(x)                 b_0 = 0
    h_m = block_m(h_{m-1})              the encoder's stream, untouched by bypasses and exits
    b_m = b_{m-1} + up_m(gelu(down_m(norm(h_{m-1} + b_{m-1}))))
    z_m = head_m(pool(h_m + b_m))       exit m's logits

Block-wise bypasses and divergence-based exiting are from Zhu et al., ACL 2023 Industry Track, doi
10.18653/v1/2023.acl-industry.48. Where the bypass attaches, its width and the loss weights are choices of this project.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_badge import BadgeConfig, ExitPolicy
from .early_exit_badge import predict_with_policy, run_blocks
from .encoders_badge import get_adapter
from .inputs_badge import check_inputs, check_labels
from .loss_badge import exit_losses, infer_problem_type, weighted_loss
from .modules_badge import BadgeBypass, BadgeExit, ZeroInitLinear


if TYPE_CHECKING:
    # Not needed here, but a file that is named here travels with the checkpoint.
    from .pipeline_badge import BadgeTextClassificationPipeline  # noqa: F401

# Arguments of `from_encoder` that say how to load the encoder; every other one is a field of the config.
_LOADING_ARGUMENTS = {
    "attn_implementation", "cache_dir", "dtype", "force_download", "local_files_only", "revision", "subfolder", "token",
}  # fmt: skip


@dataclass
class BadgeClassifierOutput(ModelOutput):
    """What `forward` returns.

    Args:
        loss: (), the weighted mean of the exits' losses, if labels were given.
        logits: (rows, labels), of the last exit.
        exit_logits: (rows, exits, labels), of every exit.
        hidden_states: h_0 to h_L, each (rows, tokens, hidden), as the encoder itself returns them, if asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class EarlyExitOutput(ModelOutput):
    """What `early_exit_predict` returns, in the order of the input.

    Args:
        logits: (rows, labels), of the exit that each row took.
        exit_layer: (rows,), int64: how many blocks ran for the row.
        exit_logits: (rows, exits, labels), NaN where an exit was not reached, if asked for.
    """

    logits: Tensor | None = None
    exit_layer: Tensor | None = None
    exit_logits: Tensor | None = None


@dataclass
class BlockState:
    """The rows that are inside, after some block."""

    hidden_states: Tensor  # (rows, tokens, hidden), h: the encoder's stream
    bypass_state: Tensor | None  # b, of the same shape; None stands for zeros
    reading: Tensor  # h + b: what the exit here and the next bypass read
    attention_mask: Tensor | None  # (rows, tokens); None: no padding
    position_ids: Tensor | None  # (rows or 1, tokens)
    block_arguments: dict[str, Any]  # what the blocks need besides, made by the adapter for these rows and columns


class BadgePreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = BadgeConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ZeroInitLinear):  # a fresh bypass changes nothing
            init.zeros_(module.weight)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; damaged weights are reported in a sentence."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"The weights in {pretrained_model_name_or_path} are cut short or damaged ({error}): "
                "copy or download the checkpoint again."
            ) from error

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers; a directory that cannot be written is an error before anything is."""
        if os.path.exists(save_directory) and not (
            os.path.isdir(save_directory) and os.access(save_directory, os.W_OK)
        ):
            raise OSError(f"{save_directory} is not a directory that can be written to: choose another one.")
        super().save_pretrained(save_directory, *args, **kwargs)


class BadgeForSequenceClassification(BadgePreTrainedModel):
    """A text classifier that can answer after any block that has an exit.

    `forward` runs every block and returns every exit's logits; `early_exit_predict` stops where the exit policy says.
    """

    # forward takes no loss arguments, so Trainer has to divide by the number of accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: BadgeConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.exit_layers: list[int] = list(config.exit_layers or [])
        self.adapter = get_adapter(config.encoder_config.model_type)  # type: ignore[union-attr]
        if encoder is None:
            encoder = AutoModel.from_config(config.encoder_config, **self.adapter.encoder_arguments())
        self.encoder: Any = encoder
        width, blocks = config.bypass_size or 0, range(config.num_hidden_layers if config.bypass_size else 0)
        self.bypasses = nn.ModuleList(BadgeBypass(config.hidden_size, width) for _ in blocks)
        last = self.exit_layers[-1]
        self.exits = nn.ModuleList(
            BadgeExit(config, with_norm=self.adapter.pre_norm and layer != last) for layer in self.exit_layers
        )
        self.post_init()

    @classmethod
    def from_encoder(cls, name_or_path: str | os.PathLike[str], **arguments: Any) -> "BadgeForSequenceClassification":
        """Put fresh bypasses and exits on a pretrained encoder.

        Args:
            name_or_path: a checkpoint of a supported encoder, as `AutoModel.from_pretrained` takes it.
            **arguments: fields of `BadgeConfig` (`num_labels`, `exit_layers`, ...), and of loading: `cache_dir`,
                `attn_implementation`, `dtype`, `force_download`, `local_files_only`, `revision`, `subfolder`, `token`.

        Raises:
            ValueError: the encoder's family is not supported, or a field is unknown or has a bad value.
            OSError: the checkpoint cannot be found or read.
        """
        loading = {name: arguments.pop(name) for name in list(arguments) if name in _LOADING_ARGUMENTS}
        if "encoder_config" in arguments:
            raise ValueError("from_encoder takes the encoder's config from its checkpoint: leave encoder_config out.")
        where = {name: value for name, value in loading.items() if name not in ("attn_implementation", "dtype")}
        try:
            encoder_config = AutoConfig.from_pretrained(name_or_path, **where)
            if encoder_config.model_type == cls.config_class.model_type:
                raise ValueError(f"{name_or_path} is a BADGE checkpoint already: load it with from_pretrained.")
            adapter = get_adapter(encoder_config.model_type)
            config = cls.config_class(encoder_config=encoder_config, **arguments)
            options = {**adapter.encoder_arguments(), **loading}
            encoder = AutoModel.from_pretrained(name_or_path, config=encoder_config, **options)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"No encoder could be loaded from {name_or_path}, as a folder or as a name on the hub: {error}"
            ) from error
        return cls(config, encoder=encoder).to(encoder.dtype).eval()  # type: ignore[no-any-return]

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's token embeddings."""
        return self.encoder.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the encoder's token embeddings."""
        self.encoder.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BadgeClassifierOutput | tuple[Any, ...]:
        """Run every block and every exit; never leaves early.

        Args:
            input_ids: (rows, tokens), int64.
            attention_mask: (rows, tokens), 1 for a token, 0 for padding. Default: no padding.
            token_type_ids: (rows, tokens), for a pair of texts; families without token types pay no attention to it.
            position_ids: (rows, tokens). Default: counted from each row's first token.
            inputs_embeds: (rows, tokens, hidden), instead of input_ids.
            labels: (rows,) int64, or (rows, labels) float for multi-label and regression.
            output_hidden_states: also return h_0 to h_L. Default: what the config says.
            return_dict: `False` gives a tuple. Default: what the config says.

        Returns:
            `BadgeClassifierOutput`: loss (), logits (rows, labels), exit_logits (rows, exits, labels), hidden_states.

        Raises:
            TypeError, ValueError: bad inputs or labels; the message says which and what to do.
        """
        config = self.config
        problem_type = infer_problem_type(config.problem_type, self.num_labels, labels)
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        tokens = self._check(input_ids, attention_mask, inputs_embeds)
        if labels is not None:
            labels = check_labels(labels, len(tokens), self.num_labels, problem_type)
            config.problem_type = problem_type  # as in transformers: the labels settle what the config left open
        state = self._embed(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)

        exit_logits: list[Tensor] = []
        hidden_states = [state.hidden_states]

        def on_exit(index: int, state: BlockState) -> BlockState:
            exit_logits.append(self.read_exit(index, state))
            return state

        def on_block(layer: int, state: BlockState) -> None:
            hidden_states.append(state.hidden_states)

        run_blocks(self, state, on_exit, *([on_block] if output_hidden_states else []))
        final_norm = self.adapter.final_norm(self.encoder)
        if output_hidden_states and final_norm is not None:
            hidden_states[-1] = final_norm(hidden_states[-1])

        stacked = torch.stack(exit_logits, dim=1)
        loss = None
        if labels is not None:
            losses = exit_losses(stacked, labels, problem_type, config.label_smoothing)
            loss = weighted_loss(losses, config.loss_weights)
        output = BadgeClassifierOutput(
            loss=loss,
            logits=exit_logits[-1],
            exit_logits=stacked,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @torch.no_grad()
    def early_exit_predict(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        policy: ExitPolicy | Mapping[str, Any] | None = None,
        output_exit_logits: bool = False,
        **overrides: Any,
    ) -> EarlyExitOutput:
        """Answer each row at the first exit that is ready, and run no block for rows that have left.

        Runs without dropout whatever mode the model is in. What a row is answered depends on that row alone.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds: as in `forward`.
            policy: an `ExitPolicy` or a dict. Default: the checkpoint's, `config.exit_policy`.
            output_exit_logits: also return the logits that were seen on the way.
            **overrides: fields of the policy for this call: `criterion`, `threshold`, `window`, `confidence_weight`,
                `divergence`, `patience`.

        Returns:
            `EarlyExitOutput`: logits (rows, labels), exit_layer (rows,), and exit_logits (rows, exits, labels) if
            asked for.

        Raises:
            TypeError, ValueError: bad inputs or a bad policy; the message says which and what to do.

        Example:
            >>> model.early_exit_predict(**tokenizer(texts, padding=True, return_tensors="pt"), threshold=0.2)
        """
        policy = ExitPolicy.of(self.config.exit_policy if policy is None else policy, **overrides)
        policy.thresholds(len(self.exit_layers))  # a list of the wrong length is an error before any work is done
        problem_type = infer_problem_type(self.config.problem_type, self.num_labels, None)
        tokens = self._check(input_ids, attention_mask, inputs_embeds)
        mask = np.ones(tokens.shape[:2], dtype=bool) if attention_mask is None else attention_mask.cpu().numpy() > 0
        with self._without_dropout():
            state = self._embed(
                input_ids, None if mask.all() else attention_mask, token_type_ids, position_ids, inputs_embeds
            )
            exit_logits, exit_taken = predict_with_policy(self, state, mask, self.num_labels, policy, problem_type)
        device, dtype = state.hidden_states.device, state.hidden_states.dtype
        logits = torch.from_numpy(exit_logits).to(device, dtype)
        return EarlyExitOutput(
            logits=logits[torch.arange(len(mask), device=device), torch.from_numpy(exit_taken).to(device)],
            exit_layer=torch.tensor(self.exit_layers)[torch.from_numpy(exit_taken)].to(device),
            exit_logits=logits if output_exit_logits else None,
        )

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        training = [module for module in self.modules() if module.training] if self.training else []
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True

    def _check(self, input_ids: Any, attention_mask: Any, inputs_embeds: Any) -> Tensor:
        """The tokens of a batch, ids or embeddings, once it is known to be sound."""
        config = self.config.get_text_config()
        check_inputs(input_ids, attention_mask, inputs_embeds, config.vocab_size, self.adapter.max_tokens(config))
        return input_ids if inputs_embeds is None else inputs_embeds  # type: ignore[no-any-return]

    # The stages of the loop over blocks (see early_exit_badge.Stages).

    def _embed(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> BlockState:
        """The state of all rows before the first block."""
        tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            columns = torch.arange(tokens.shape[1], device=tokens.device)
            position_ids = self.adapter.position_ids(self.encoder.config, columns, input_ids, attention_mask)
        inputs = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        with self._encoder_gradients():
            hidden_states = self.adapter.embed(self.encoder, inputs, attention_mask)
            arguments = self.adapter.block_arguments(self.encoder, hidden_states, attention_mask, position_ids)
        return self._state(hidden_states, None, attention_mask, position_ids, arguments)

    def run_block(self, layer: int, state: BlockState) -> BlockState:
        """Block `layer` (from 1) and its bypass."""
        bypass_state = self.bypasses[layer - 1](state.reading, state.bypass_state) if self.bypasses else None
        with self._encoder_gradients():
            hidden_states = self.adapter.run_block(self.encoder, layer, state.hidden_states, state.block_arguments)
        return self._state(hidden_states, bypass_state, state.attention_mask, state.position_ids, state.block_arguments)

    def read_exit(self, exit_index: int, state: BlockState) -> Tensor:
        """Logits (rows, labels) of exit `exit_index` (from 0)."""
        reading = state.reading
        norm = self.adapter.final_norm(self.encoder) if exit_index == len(self.exits) - 1 else None
        if norm is not None:
            weights = {name: self._read_from_encoder(weight) for name, weight in norm.named_parameters()}
            reading = torch.func.functional_call(norm, weights, (reading,))
        return self.exits[exit_index](reading, state.attention_mask)  # type: ignore[no-any-return]

    def compact(self, state: BlockState, rows: Any, columns: slice, padded: bool) -> BlockState:
        """Keep these rows (`None`: all) and columns of the state."""
        index = None if rows is None else torch.from_numpy(rows).to(state.hidden_states.device)

        def keep(tensor: Tensor | None, shared: bool = False) -> Tensor | None:
            if tensor is None:
                return None
            kept = tensor[:, columns]
            return kept if index is None or shared else kept.index_select(0, index)

        hidden_states = keep(state.hidden_states)
        assert hidden_states is not None
        mask = keep(state.attention_mask) if padded else None
        positions = state.position_ids
        positions = keep(positions, shared=positions is not None and len(positions) == 1)
        arguments = self.adapter.block_arguments(self.encoder, hidden_states, mask, positions)
        return self._state(hidden_states, keep(state.bypass_state), mask, positions, arguments)

    def to_host(self, logits: Tensor) -> Any:
        """Logits in numpy: the one wait for the device at each exit."""
        return logits.double().cpu().numpy()

    def _encoder_gradients(self) -> Any:
        """With every gradient stopped the encoder needs no graph: it is not trained, and a step costs less."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and self.config.exit_gradient > 0)

    def _state(self, hidden_states: Tensor, bypass_state: Tensor | None, *others: Any) -> BlockState:
        reading = self._read_from_encoder(hidden_states)
        return BlockState(
            hidden_states, bypass_state, reading if bypass_state is None else reading + bypass_state, *others
        )

    def _read_from_encoder(self, tensor: Tensor) -> Tensor:
        """A tensor of the encoder, with the gradient that goes back into it scaled by `exit_gradient`."""
        scale = self.config.exit_gradient
        if scale == 1 or not tensor.requires_grad:
            return tensor
        if scale == 0:
            return tensor.detach()
        tensor = tensor.view_as(tensor)  # the hook must not see the gradient that the next block sends
        tensor.register_hook(lambda gradient: gradient * scale)
        return tensor
