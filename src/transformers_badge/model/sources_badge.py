"""Checkpoints to build on: a pretrained encoder, or a fine-tuned classifier as its encoder and its head."""

from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


# Arguments that say how to load a checkpoint; every other one is a field of the config.
LOADING_ARGUMENTS = {
    "attn_implementation", "cache_dir", "dtype", "force_download", "local_files_only", "revision", "subfolder", "token",
}  # fmt: skip


class SourceHead(nn.Module):
    """The modules of a classifier besides its encoder, by its own names for them; its adapter runs them."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def source_config(name_or_path: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config of a checkpoint to build on, and the arguments of loading, which are taken out of the others.

    Raises:
        ValueError: a BADGE checkpoint, or `encoder_config` among the arguments.
        OSError: it cannot be found or read.
    """
    loading = {name: arguments.pop(name) for name in list(arguments) if name in LOADING_ARGUMENTS}
    if "encoder_config" in arguments:
        raise ValueError("The encoder's config is taken from its checkpoint: leave encoder_config out.")
    where = {name: value for name, value in loading.items() if name not in ("attn_implementation", "dtype")}
    try:
        config = AutoConfig.from_pretrained(name_or_path, **where)
    except OSError as error:
        raise _unreadable(name_or_path, error) from error
    if config.model_type == "badge":
        raise ValueError(f"{name_or_path} is a BADGE checkpoint already: load it with from_pretrained.")
    return config, loading


def load_encoder(name_or_path: Any, config: Any, loading: dict[str, Any]) -> PreTrainedModel:
    """A pretrained encoder.

    Raises:
        OSError, ValueError: as `load_classifier`.
    """
    return _load(AutoModel, name_or_path, config, loading)[0]


def load_classifier(name_or_path: Any, config: Any, loading: dict[str, Any]) -> tuple[PreTrainedModel, SourceHead]:
    """A fine-tuned classifier as its encoder and its head.

    Raises:
        OSError: it cannot be found or read.
        ValueError: it is not a sequence classifier, or not one with transformers' own head.
    """
    expected = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[config.model_type]
    written = config.architectures or [expected]
    if expected not in written:
        raise ValueError(
            f"{name_or_path} holds a {written[0]}, where a {expected} is needed, whose head is known: give a "
            "fine-tuned sequence classifier, or put fresh exits on the encoder with from_encoder."
        )
    classifier, report = _load(AutoModelForSequenceClassification, name_or_path, config, loading)
    missing = sorted(report["missing_keys"])
    # Encoders are often saved with a pooler that their classifier does not have; a head must fit exactly.
    unknown = sorted(key for key in report["unexpected_keys"] if not key.startswith(f"{classifier.base_model_prefix}."))
    if missing or unknown:
        lacks = f"it lacks {missing[0]}" if missing else ""
        has = f"it has {unknown[0]}, which is unknown" if unknown else ""
        raise ValueError(
            f"{name_or_path} does not hold the weights of a {expected}: {' and '.join(filter(None, (lacks, has)))}. "
            "Give a fine-tuned sequence classifier with transformers' own head."
        )
    return _take_apart(classifier)


def new_classifier(config: Any) -> tuple[PreTrainedModel, SourceHead]:
    """The encoder and the head of a classifier with fresh weights, for a checkpoint to fill."""
    return _take_apart(AutoModelForSequenceClassification.from_config(config))


def _take_apart(classifier: Any) -> tuple[PreTrainedModel, SourceHead]:
    encoder = classifier.base_model
    return encoder, SourceHead({name: child for name, child in classifier.named_children() if child is not encoder})


def _load(auto: Any, name_or_path: Any, config: Any, loading: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    try:
        model, report = auto.from_pretrained(name_or_path, config=config, output_loading_info=True, **loading)
    except (OSError, SafetensorError) as error:
        raise _unreadable(name_or_path, error) from error
    except RuntimeError as error:  # shapes of the weights that are not those of the config
        raise ValueError(f"The weights in {name_or_path} do not fit its config: {error}") from error
    return model, report


def _unreadable(name_or_path: Any, error: Exception) -> OSError:
    return OSError(f"{name_or_path} could not be loaded, as a folder or as a name on the hub: {error}")
