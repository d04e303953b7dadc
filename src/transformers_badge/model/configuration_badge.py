"""Configuration of a BADGE model: plain, typed data that validates itself."""

import math
from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .encoders_badge import get_adapter
from .policy_badge import ExitPolicy, check_keys


# What a config file may hold besides the fields of BadgeConfig: keys that transformers and its Trainer read or write.
_TRANSFORMERS_KEYS = {
    "_attn_implementation_internal", "_commit_hash", "_experts_implementation_internal", "_name_or_path",
    "_output_attentions", "attn_implementation", "auto_map", "bos_token_id", "custom_pipelines", "eos_token_id",
    "experts_implementation", "model_type", "name_or_path", "num_labels", "output_attentions", "pad_token_id",
    "quantization_config", "tie_word_embeddings", "torch_dtype", "use_cache", "use_return_dict",
}  # fmt: skip

_PIPELINES = {
    "text-classification": {
        "impl": "pipeline_badge.BadgeTextClassificationPipeline",
        "pt": ["AutoModelForSequenceClassification"],
        "type": "text",
    }
}


@strict
class BadgeConfig(PreTrainedConfig):
    """Configuration of `BadgeForSequenceClassification`.

    The bottleneck width, the place where the bypass attaches, the loss weights and the policy are choices of this
    project: the paper's text beyond its abstract was not at hand.

    Args:
        encoder_config: the encoder's own config, as an object or a dict with its `model_type`. Default: BERT base.
        bypass_size: bottleneck width of the bypasses; 0: no bypasses. Default: hidden size / 3, and for bypasses that
            read tokens hidden size / 12.
        bypass_reads: what a bypass reads, besides the bypass state: `"pooled"`, the block's output as its exit pools it
            (one vector per row, and next to no cost); or every token of `"block_output"` or `"block_input"` (about
            1.4 % of a BERT block's FLOPs at the default width).
        exit_layers: depths that have an exit, ascending, from 1 to the number of blocks; the last block must have one.
            Default: every block. With `lexical_exit` 0 comes first, whether it is given or not.
        exit_loss_weights: `"linear"` (an exit weighs its depth), `"uniform"`, or one number per exit. The loss is the
            weighted mean over the exits.
        exit_gradient: 1.0 lets the gradients of the exits into the encoder, 0.0 stops them (encoder and source head are
            frozen), and a number between scales them. `"rescaled"`: at exit k of n, a share 1/(n-k+1) of the exit's
            gradient and the rest of the gradient from behind it go on (gradient equilibrium of Li et al., ICCV 2019, as
            in ElasticBERT). `"separated"`: nothing from behind an exit passes it, so that a block learns from the
            next exit only (SWEET, Rotem et al., ACL 2023).
        pooling: what an exit reads: `"attention"`, a mean of the tokens under weights that each exit learns; the plain
            `"mean"`; or the first token, `"cls"`.
        source_head: the last exit is the classifier that the encoder was fine-tuned with, and reads the encoder alone.
            `BadgeForSequenceClassification.from_classifier` sets it.
        lexical_exit: whether there is an exit before the first block, a linear classifier over hashed n-grams of the
            token ids. Every later exit adds its logits to its own, times a gate; but a source head does not. It
            has to be fitted (`fit_lexical_exit`), best before the model is fine-tuned.
        lexical_filters: how many filters over the vectors of seven tokens in a row the lexical exit has besides, a
            multiple of 4; 0: none. They learn from the last exit (`teach_exits`), which does not add what they say.
        lexical_buckets: how many buckets n-grams are hashed into; the exit has so many weights per label.
        lexical_ngrams: up to how many tokens an n-gram has, from 1 to 4.
        lexical_ignored_ids: token ids that belong to no n-gram and part the texts of a pair. Default: the special
            tokens that the encoder's config knows; fitting sets those of the tokenizer.
        exit_dropout: dropout before every exit's classifier.
        label_smoothing: smoothing of the loss of every exit. Use this, not Trainer's, which trains the last exit only.
        exit_policy: an `ExitPolicy` or a dict of its fields. The default never leaves early.
        id2label, label2id, num_labels, problem_type: as everywhere in transformers.

    Raises:
        ValueError: an unknown key, or a value outside what is written above; the message names the field.
        huggingface_hub.errors.StrictDataclassFieldValidationError: a value of the wrong type.
    """

    model_type = "badge"
    sub_configs = {"encoder_config": AutoConfig}  # noqa: RUF012

    encoder_config: dict[str, Any] | PreTrainedConfig | None = None
    bypass_size: int | None = None
    bypass_reads: Literal["pooled", "block_output", "block_input"] = "pooled"
    exit_layers: list[int] | None = None
    exit_loss_weights: Literal["linear", "uniform"] | list[float | int] = "linear"
    exit_gradient: float | int | Literal["rescaled", "separated"] = 1.0
    pooling: Literal["attention", "mean", "cls"] = "attention"
    source_head: bool = False
    lexical_exit: bool = False
    lexical_buckets: int = 2**18
    lexical_ngrams: int = 2
    lexical_filters: int = 0
    lexical_ignored_ids: list[int] | None = None
    exit_dropout: float | int = 0.1
    label_smoothing: float | int = 0.0
    exit_policy: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_keys("BadgeConfig", set(kwargs) - _TRANSFORMERS_KEYS, {f.name for f in fields(self)} | {"num_labels"})
        encoder = {"model_type": "bert"} if self.encoder_config is None else self.encoder_config
        if isinstance(encoder, dict):
            encoder = dict(encoder)
            model_type = encoder.pop("model_type", None)
            get_adapter(model_type)  # an unsupported family is named here, before transformers tries to build it
            encoder = AutoConfig.for_model(model_type, **encoder)
        self.encoder_config = encoder
        get_adapter(encoder.model_type)
        if self.bypass_size is None:
            self.bypass_size = max(1, encoder.hidden_size // (3 if self.bypass_reads == "pooled" else 12))
        if self.exit_layers is None:
            self.exit_layers = list(range(1, encoder.num_hidden_layers + 1))
        if self.lexical_exit and 0 not in self.exit_layers:
            self.exit_layers = [0, *self.exit_layers]
        # pipeline() reads this from config.json to find the pipeline that ships with the checkpoint.
        kwargs.setdefault("custom_pipelines", {task: dict(entry) for task, entry in _PIPELINES.items()})
        super().__post_init__(**kwargs)
        self.validate_badge()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "exit_policy":
            value = ExitPolicy.of(value)
        super().__setattr__(name, value)

    def validate_badge(self) -> None:
        """Check the values that depend on each other. Called on creation and again by transformers before a save."""
        blocks = self.num_hidden_layers
        layers: list[int] = self.exit_layers  # type: ignore[assignment]
        if self.bypass_size < 0:  # type: ignore[operator]
            raise ValueError(f"bypass_size must be 0 (no bypasses) or a positive width, got {self.bypass_size}.")
        if not self.lexical_exit and 0 in layers:
            raise ValueError(
                f"exit_layers has an exit before the first block, which takes lexical_exit=True: got {layers}."
            )
        if not layers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] != blocks:
            raise ValueError(
                f"exit_layers must be ascending depths from 1 to {blocks} that end with the last block, {blocks}, "
                f"got {layers}."
            )
        weights = self.exit_loss_weights
        if not isinstance(weights, str):
            if len(weights) != len(layers):
                raise ValueError(f"exit_loss_weights lists {len(weights)} numbers for {len(layers)} exits.")
            if not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) == 0:
                raise ValueError(f"exit_loss_weights must be finite, not negative and not all 0, got {weights}.")
        for name, top in (("exit_gradient", 1.0), ("exit_dropout", 1.0), ("label_smoothing", 1.0)):
            value = getattr(self, name)
            if not isinstance(value, str) and not 0 <= value <= top:
                raise ValueError(f"{name} must be between 0 and {top}, got {value}.")
        if self.label_smoothing and self.problem_type == "regression":
            raise ValueError("label_smoothing has no meaning for problem_type='regression': set it to 0.")
        if self.source_head and self.encoder_config.num_labels != self.num_labels:  # type: ignore[union-attr]
            raise ValueError(
                f"With source_head=True the labels are the source's, {self.encoder_config.num_labels} of them, "  # type: ignore[union-attr]
                f"got num_labels={self.num_labels}."
            )
        if not 1 <= self.lexical_ngrams <= 4:
            raise ValueError(f"lexical_ngrams must be from 1 to 4, got {self.lexical_ngrams}.")
        if self.lexical_filters and (self.lexical_filters < 8 or self.lexical_filters % 4):
            raise ValueError(f"lexical_filters must be 0 or a multiple of 4 from 8, got {self.lexical_filters}.")
        if self.lexical_buckets < 2:
            raise ValueError(
                f"lexical_buckets must be at least 2, and is best above 100,000; got {self.lexical_buckets}."
            )
        self.exit_policy.thresholds(len(layers))

    @property
    def frozen(self) -> bool:
        """Whether the encoder, and with it a source head, is not trained."""
        return self.exit_gradient == 0

    @property
    def bypass_layers(self) -> list[int]:
        """Depths with a bypass. The last exit reads the encoder alone, so none stands behind the last but one."""
        inner = [layer for layer in (self.exit_layers or [])[:-1] if layer > 0]
        if not self.bypass_size or not inner:
            return []
        return inner if self.bypass_reads == "pooled" else list(range(1, inner[-1] + 1))

    @property
    def phrase_filters(self) -> int:
        """How many filters there are at exit 0; 0 where there is no such exit."""
        return self.lexical_filters if self.lexical_exit else 0

    @property
    def lexical_columns(self) -> int:
        """The columns of `lexical_logits`: what n-grams say, one per label; with filters behind it what these say."""
        labels: int = self.num_labels
        return labels * (2 if self.phrase_filters else 1)

    @property
    def ignored_ids(self) -> list[int]:
        """The token ids that the lexical exit leaves out."""
        if self.lexical_ignored_ids is not None:
            return self.lexical_ignored_ids
        names = ("pad", "bos", "eos", "cls", "sep")
        known = {getattr(self.get_text_config(), f"{name}_token_id", None) for name in names}
        return sorted(token for token in known if isinstance(token, int))

    def gradient_scales(self, exit_index: int) -> tuple[float, float]:
        """What is left of the gradient of exit `exit_index` (from 0), and of the gradient from behind it."""
        behind = len(self.exit_layers or []) - 1 - exit_index  # exits behind this one
        named = {"rescaled": (1 / (behind + 1), behind / (behind + 1)), "separated": (1.0, 0.0)}
        return named.get(self.exit_gradient, (1.0, 1.0))  # type: ignore[arg-type]

    @property
    def loss_weights(self) -> list[float]:
        """The weight of every exit's loss; they sum to 1."""
        weights = {"linear": self.exit_layers, "uniform": [1.0] * len(self.exit_layers or [])}.get(
            self.exit_loss_weights if isinstance(self.exit_loss_weights, str) else "", self.exit_loss_weights
        )
        return [float(weight) / sum(weights) for weight in weights]  # type: ignore[union-attr,arg-type]

    @property
    def hidden_size(self) -> int:
        """The encoder's hidden size."""
        return int(self.get_text_config().hidden_size)

    @property
    def num_hidden_layers(self) -> int:
        """The encoder's number of blocks."""
        return int(self.get_text_config().num_hidden_layers)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON can hold it."""
        output: dict[str, Any] = super().to_dict()
        output["exit_policy"] = self.exit_policy.to_dict()
        output["encoder_config"].pop("_name_or_path", None)  # where the encoder lay is nobody's business
        return output

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder's config: where transformers looks for, and keeps up to date, the size of the vocabulary."""
        return self.encoder_config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "BadgeConfig":
        """As in transformers; a config of another model is an error that says what to call instead."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This is a checkpoint of model_type {model_type!r}, not of 'badge'. To put exits on an encoder, call "
                "BadgeForSequenceClassification.from_encoder with it."
            )
        return super().from_dict(config_dict, **kwargs)  # type: ignore[no-any-return]
