"""Fine-tuning a multi-exit model with transformers' Trainer."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


FILL_UP_TO = 10_000  # rows to teach exits on: more of them, real or made up, changed little


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


def check_above_zero(**settings: float) -> None:
    """See that settings are above 0.

    Raises:
        ValueError: one is not; the message names it.
    """
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}.")


def check_share(**settings: float) -> None:
    """See that settings are shares of rows that can be certified.

    Raises:
        ValueError: one is not; the message names it.
    """
    for name, value in settings.items():
        if not 0 < value < 1:
            raise ValueError(
                f"{name} must be a share above 0 (which no number of rows can show) and below 1, such as 0.01, got "
                f"{value}."
            )


def tokenize(tokenizer: Any, columns: Sequence[Sequence[str]], labels: Sequence[Any] | None, max_tokens: int) -> Any:
    """A `datasets.Dataset` of token ids, unpadded; pairs where there are two columns."""
    import datasets

    encoded = tokenizer(*[list(column) for column in columns], truncation=True, max_length=max_tokens)
    return datasets.Dataset.from_dict({**encoded, **({} if labels is None else {"labels": list(labels)})})


def special_ids(tokenizer: Any) -> list[int]:
    """Ids of the special tokens, ascending; without that of the unknown token, which stands for a word."""
    return sorted({token for token in tokenizer.all_special_ids if token != tokenizer.unk_token_id})


def parameter_groups(
    model: Any, learning_rate: float = 5e-5, new_learning_rate: float = 1e-3, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameters of a model in groups: what is pretrained (the encoder, and the head of a converted classifier); the
    fresh bypasses and exits, which learn faster; and the gates of exit 0, ten times as fast as these.

    Fresh parts at the encoder's rate are the commonest way to poor early exits: they never get far from where they
    started. A gate is one number, and starts at 1: where exit 0 has nothing to add, all of that way is to be gone.

    Returns:
        Groups as torch optimizers take them.

    Example:
        >>> groups = parameter_groups(model)
        >>> Trainer(..., optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups}))
    """
    prefixes = _pretrained_prefixes(model)
    pretrained: list[Any] = []
    fresh: list[Any] = []
    gates: list[Any] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.startswith(prefixes):
            pretrained.append(parameter)
        elif parameter.requires_grad:
            (gates if "lexical_gate" in name else fresh).append(parameter)
    groups = [(pretrained, learning_rate), (fresh, new_learning_rate), (gates, 10 * new_learning_rate)]
    return [{"params": params, "lr": rate, "weight_decay": weight_decay} for params, rate in groups if params]


def fresh_modules(model: Any) -> list[str]:
    """Names of the modules that an encoder does not bring: what peft has to train and save beside its own.

    Without them LoRA would train the exits' classifiers alone, or nothing of the exits.

    Example:
        >>> config = LoraConfig(target_modules=["query", "value"], modules_to_save=fresh_modules(model))
        >>> Trainer(get_peft_model(model, config), ...)
    """
    prefixes, names = _pretrained_prefixes(model), list[str]()
    for name, module in model.named_modules():
        weights = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        inside = tuple(f"{outer}." for outer in names)  # of one that is named
        if weights and not f"{name}.".startswith(prefixes + inside):
            names.append(name)
    return names


def _pretrained_prefixes(model: Any) -> tuple[str, ...]:
    """What names of pretrained parts begin with."""
    return ("encoder.", f"exits.{len(model.exit_layers) - 1}.") if model.config.source_head else ("encoder.",)


def fit(
    model: Any,
    tokenizer: Any,
    train_rows: Any,
    validation_rows: Any | None,
    output_dir: Path,
    *,
    recipe: str = "taught",
    epochs: float = 3,
    fill_up_to: int = FILL_UP_TO,
    seed: int = 0,
    **settings: Any,
) -> Any:
    """Train a model by a recipe.

    Args:
        train_rows, validation_rows: as `tokenize` makes them, with labels. A lexical exit is fitted to the first,
            unless it has been and they have `lexical_logits`, which `fit_lexical_exit` adds. What it says enters the
            other exits where they are taught, or in a recipe without such a stage from the first.
        output_dir: where Trainer may write.
        recipe: a name of `recipes.RECIPES`, which says how many of the epochs each of its stages gets.
        epochs: passes over the rows.
        fill_up_to: rows of a stage that is `filled`.
        seed: of everything random.
        **settings: of `make_trainer`.

    Returns:
        The `Trainer` of the last stage, to predict and evaluate with. Its `train_dataset` begins with the training
        rows, and has `lexical_logits` if the model has a lexical exit.

    Raises:
        ValueError: there is no such recipe.
    """
    from transformers_badge.training.lexical import fit_lexical_exit
    from transformers_badge.training.recipes import get_recipe
    from transformers_badge.training.teaching import fit_phrases_first, teaching_rows

    may_learn = any(model.config.loss_weights[:-1])  # or there is no inner exit, or none that is to learn
    may_be_taught = may_learn or model.config.phrase_filters
    stages = [stage for stage in get_recipe(recipe) if may_be_taught or not stage.filled]
    rows, taught, trainer = train_rows, None, None
    if any(stage.filled for stage in stages):
        # Before the fine-tuning, since exit 0 uses the encoder's embeddings: they are not to know the labels yet.
        taught = teaching_rows(model, tokenizer, rows, fill_up_to, seed)
        rows = rows.remove_columns("lexical_logits") if "lexical_logits" in rows.column_names else rows
    elif model.config.lexical_exit and "lexical_logits" not in rows.column_names:
        rows = fit_lexical_exit(model, tokenizer, rows, seed=seed)
    for stage in stages:
        if taught is not None and stage.filled:
            rows = fit_phrases_first(model, tokenizer, taught, seed)
            if not may_learn:
                continue
        trainer = run_stage(
            stage,
            model,
            tokenizer,
            rows,
            validation_rows,
            output_dir,
            epochs=epochs * stage.share,
            seed=seed,
            **settings,
        )
    return trainer


def run_stage(stage: Any, model: Any, *rows_and_folder: Any, **settings: Any) -> Any:
    """One run of Trainer; the arguments are those of `make_trainer`, which makes what is returned."""
    from transformers_badge.training.recipes import applied

    with applied(stage, model):
        trainer = make_trainer(model, *rows_and_folder, stage=stage, **settings)
        trainer.train()
    return trainer


def make_trainer(
    model: Any,
    tokenizer: Any,
    train_rows: Any | None,
    validation_rows: Any | None,
    output_dir: Path,
    *,
    stage: Any = None,
    epochs: float = 3,
    learning_rate: float = 5e-5,
    new_learning_rate: float = 1e-3,
    batch_size: int = 32,
    temperature: float = 1.0,
    saves: int = 0,
    collator: Any = None,
    seed: int = 0,
) -> Any:
    """A `Trainer` with the settings that all training here shares, for one stage of a recipe.

    Args:
        train_rows, validation_rows: as `tokenize` makes them; with labels, where the stage is not distilled.
        output_dir: where Trainer may write.
        stage: a `recipes.Stage`, which has been applied to the model. Default: all exits learn from labels.
        learning_rate: peak rate of the encoder.
        new_learning_rate: peak rate of bypasses and exits.
        temperature: of the answers that inner exits learn, where distilled.
        saves: how often on the way the run is saved, to be resumed if it is interrupted.
        collator: makes batches of rows that are not token ids. Default: pads token ids.
    """
    import torch
    from transformers import DataCollatorWithPadding, TrainingArguments

    from transformers_badge.training.metrics import compute_exit_metrics
    from transformers_badge.training.recipes import ExitTrainer, Stage

    arguments = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        warmup_steps=0.1,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=64,
        train_sampling_strategy="group_by_length" if collator is None else "random",
        eval_strategy="no",
        save_strategy="steps" if saves else "no",
        save_steps=1 / (saves + 1) if saves else 500,
        save_total_limit=1,
        logging_steps=20,
        report_to=[],
        seed=seed,
        dataloader_pin_memory=model.device.type == "cuda",
    )
    return ExitTrainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer) if collator is None else collator,
        compute_metrics=lambda prediction: compute_exit_metrics(prediction, model.exit_layers),
        optimizer_cls_and_kwargs=(
            torch.optim.AdamW,
            {"params": parameter_groups(model, learning_rate, new_learning_rate)},
        ),
        stage=Stage() if stage is None else stage,
        temperature=temperature,
    )
