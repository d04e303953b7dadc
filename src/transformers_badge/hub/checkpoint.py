"""Writing checkpoints: whole ones, and a new policy into one that is there."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers_badge.hub.card import write_card
from transformers_badge.hub.training_rows import save_training_rows
from transformers_badge.model.policy_badge import ExitPolicy


def save_checkpoint(folder: Path, model: Any, tokenizer: Any, training_columns: Sequence[Sequence[str]]) -> None:
    """Model with its code, tokenizer, model card, and a digest of the rows that it was trained on."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_training_rows(folder, training_columns)
    write_card(folder, model.config)


def check_checkpoint_folder(checkpoint: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint that a policy can be written into.

    Raises:
        OSError: there is no such folder, no config in it, or it cannot be written to.
        ValueError: it holds another kind of model.
    """
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise OSError(
            f"There is no checkpoint folder {checkpoint}: a policy is written into a local one, so download a "
            "checkpoint of the hub first (hf download NAME --local-dir FOLDER)."
        )
    if not os.access(folder, os.W_OK) or not os.access(folder / "config.json", os.W_OK):
        raise OSError(f"The checkpoint {folder} cannot be written to: copy it to where it can.")
    try:
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: copy the checkpoint again.") from error
    if model_type != "badge":
        raise ValueError(f"{folder} is a {model_type!r} checkpoint, not a BADGE one: make one with convert or train.")
    return folder


def write_policy(checkpoint: str | os.PathLike[str], policy: ExitPolicy) -> None:
    """Put a policy into a checkpoint, for early_exit_predict and pipelines to use from then on.

    The policy is one entry of config.json, which is replaced whole or not at all. Code that travels with the
    checkpoint is renewed first, so that it knows the policy's criterion; model card last.

    Raises:
        OSError, ValueError: as `check_checkpoint_folder`; or a policy for another number of exits. Nothing is written.
    """
    from transformers.dynamic_module_utils import custom_object_save

    from transformers_badge.model.configuration_badge import BadgeConfig
    from transformers_badge.model.modeling_badge import BadgeForSequenceClassification

    folder = check_checkpoint_folder(checkpoint)
    config = BadgeConfig.from_pretrained(folder)
    policy.thresholds(len(config.exit_layers or []))
    config.exit_policy = policy
    if (folder / "modeling_badge.py").exists():
        custom_object_save(BadgeForSequenceClassification, folder)
    path = folder / "config.json"
    # Only the policy is replaced: everything else in the file stays as whoever wrote it left it.
    stored = json.loads(path.read_text())
    stored["exit_policy"] = policy.to_dict()
    unfinished = path.with_name("config.json.unfinished")
    try:
        unfinished.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    write_card(folder, config)
