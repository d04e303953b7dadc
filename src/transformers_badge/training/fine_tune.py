"""Fine-tuning a multi-exit model with transformers' Trainer."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def check_output_directory(directory: Path) -> None:
    """Make the directory and see that it can be written to, before hours of work depend on it.

    Raises:
        OSError: it cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(
            f"The output directory {directory} cannot be written to ({error.strerror or error}): choose another one."
        ) from error


def tokenize(tokenizer: Any, columns: Sequence[Sequence[str]], labels: Sequence[Any] | None, max_tokens: int) -> Any:
    """A `datasets.Dataset` of token ids, unpadded; pairs where there are two columns."""
    import datasets

    encoded = tokenizer(*[list(column) for column in columns], truncation=True, max_length=max_tokens)
    return datasets.Dataset.from_dict({**encoded, **({} if labels is None else {"labels": list(labels)})})


def parameter_groups(
    model: Any, learning_rate: float = 5e-5, new_learning_rate: float = 1e-3, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameters of a model in two groups: the pretrained encoder, and the fresh bypasses and exits, which learn
    faster.

    Fresh parts at the encoder's rate are the commonest way to poor early exits: they never get far from where they
    started.

    Returns:
        Groups as torch optimizers take them.

    Example:
        >>> groups = parameter_groups(model)
        >>> Trainer(..., optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups}))
    """
    encoder: list[Any] = []
    fresh: list[Any] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (encoder if name.startswith("encoder.") else fresh).append(parameter)
    groups = [{"params": encoder, "lr": learning_rate}, {"params": fresh, "lr": new_learning_rate}]
    return [{**group, "weight_decay": weight_decay} for group in groups if group["params"]]


def make_trainer(
    model: Any,
    tokenizer: Any,
    train_rows: Any | None,
    validation_rows: Any | None,
    output_dir: Path,
    *,
    epochs: float = 3,
    learning_rate: float = 5e-5,
    new_learning_rate: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
) -> Any:
    """A `Trainer` with the settings that the command line and the demo share.

    Args:
        train_rows, validation_rows: as `tokenize` makes them, with labels.
        output_dir: where Trainer may write.
        learning_rate: peak rate of the encoder.
        new_learning_rate: peak rate of bypasses and exits.
    """
    import torch
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from transformers_badge.training.metrics import compute_exit_metrics

    arguments = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        warmup_steps=0.1,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=64,
        train_sampling_strategy="group_by_length",
        eval_strategy="no",
        save_strategy="no",
        logging_steps=20,
        report_to=[],
        seed=seed,
        dataloader_pin_memory=model.device.type == "cuda",
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda prediction: compute_exit_metrics(prediction, model.exit_layers),
        optimizer_cls_and_kwargs=(
            torch.optim.AdamW,
            {"params": parameter_groups(model, learning_rate, new_learning_rate)},
        ),
    )
