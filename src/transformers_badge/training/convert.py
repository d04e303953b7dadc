"""Converting a fine-tuned classifier: frozen, its exits taught by its own answers, its threshold chosen on texts."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np


# Of the texts, these shares are kept from training, up to so many: to certify the threshold, and to report on it.
CHOOSING, REPORTING = (0.2, 10_000), (0.1, 5_000)
RULE_ROWS = 5_000  # of the texts that were trained on, so many at most teach the rule of the learned criterion
TIMED_ROWS, TIMED_BATCH, TIMED_ROUNDS = 256, 32, 5


def convert_classifier(
    source: str | os.PathLike[str],
    texts: Sequence[str] | Sequence[tuple[str, str]],
    output_dir: str | os.PathLike[str],
    *,
    labels: Sequence[int] | None = None,
    max_disagreement: float = 0.01,
    criterion: str = "learned",
    epochs: float = 3,
    learning_rate: float = 1e-3,
    temperature: float = 1.0,
    batch_size: int = 32,
    max_tokens: int | None = None,
    fill_up_to: int | None = None,
    lexical_exit: bool = False,
    seed: int = 0,
    **fields: Any,
) -> dict[str, Any]:
    """Make an early-exit model of a fine-tuned classifier, on plain texts, and save it.

    Encoder and head stay as they are; the other exits learn to answer as the last does (and the labels, if there are
    any). The threshold is then certified on texts that were kept from training (`calibrate`). What is unfinished lies
    beside the output, in a folder named `<output_dir>.unfinished`; called again in the same way, it goes on from there.

    Args:
        source: a `...ForSequenceClassification` of a supported family, with its tokenizer: a folder or a hub name.
        texts: texts of the kind that the classifier will see, or pairs of texts.
        output_dir: where the checkpoint goes, with `conversion.json`, the report. Must not exist yet, or be empty.
        labels: class index of every text. Default: none.
        max_disagreement: how many answers may differ from full depth, as a share; held with 95 % confidence.
        criterion: of the exit policy, by name.
        epochs: passes over the texts.
        learning_rate: peak rate of bypasses and exits.
        temperature: of the answers that the exits learn.
        batch_size: rows per step.
        max_tokens: longer texts are cut. Default: what encoder and tokenizer take.
        fill_up_to: where fewer texts than this are trained on, so many rows are reached with others, put together of
            pieces of theirs (`pieces.fill_up`), which the classifier answers as well. Default: 10,000, and none with
            labels, which such rows have not.
        lexical_exit: whether there is an exit before the first block, which reads the words alone. It pays where
            accuracy counts, and little where next to every answer has to stay what it was (docs/exit-zero.md).
        seed: of everything random.
        **fields: of `BadgeConfig`, such as `exit_layers`, `bypass_size`, `pooling`; or of loading, as in
            `from_classifier`.

    Returns:
        The report: exit_layers, exit_agreement (share of reported rows that an exit answers as the last does),
        disagreement, mean_exit_layer, layer_speedup, wall_clock_speedup (over the source, batches of 32), policy, rows.

    Raises:
        ValueError, TypeError: too few texts, labels that are not the source's, a source that is no classifier, a
            bad setting; nothing is written.
        OSError: the source cannot be read, or the output cannot be written.
    """
    from transformers import AutoTokenizer, default_data_collator, set_seed

    from transformers_badge.calibration.calibrate import calibrate
    from transformers_badge.inference.exit_logits import make_exit_table
    from transformers_badge.inference.predict import token_limit
    from transformers_badge.model.loss_badge import infer_problem_type
    from transformers_badge.model.modeling_badge import BadgeForSequenceClassification
    from transformers_badge.model.sources_badge import LOADING_ARGUMENTS
    from transformers_badge.training.answers import as_answers, last_logits
    from transformers_badge.training.fine_tune import FILL_UP_TO, make_trainer, tokenize
    from transformers_badge.training.kept_states import can_keep, kept_in_place
    from transformers_badge.training.lexical import fit_lexical_exit
    from transformers_badge.training.phrases import fit_phrases
    from transformers_badge.training.recipes import TEACHING, applied
    from transformers_badge.training.teaching import filled_rows

    output = Path(output_dir)
    if fill_up_to is None:
        fill_up_to = FILL_UP_TO if labels is None else 0
    columns = _columns(texts)
    settings: dict[str, Any] = {
        "max_disagreement": max_disagreement, "criterion": criterion, "epochs": epochs, "learning_rate": learning_rate,
        "temperature": temperature, "batch_size": batch_size, "max_tokens": max_tokens,
        "fill_up_to": fill_up_to, "lexical_exit": lexical_exit, "seed": seed,
    }  # fmt: skip
    _check_settings(settings, len(texts), labels)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OSError(f"{output} exists and is not an empty folder: choose another one, or remove it first.")

    set_seed(seed)
    model = BadgeForSequenceClassification.from_classifier(source, lexical_exit=lexical_exit, **fields)
    problem_type = infer_problem_type(model.config.problem_type, model.num_labels, None)
    _check_model(model, problem_type, labels)
    loading = {name: value for name, value in fields.items() if name in LOADING_ARGUMENTS}
    tokenizer = AutoTokenizer.from_pretrained(source, **loading)
    limit = token_limit(model, tokenizer, max_tokens)

    identity = {**settings, "fields": fields, "source": str(source), "texts": _digest(columns, labels)}
    work = _open_work(output, identity)
    rows = tokenize(tokenizer, columns, labels, limit)
    order = np.random.default_rng(seed).permutation(len(rows))
    chosen, reported, taught = np.split(order, np.cumsum(_kept_rows(len(rows))))

    def pick(part: Any) -> list[list[str]]:
        return [[column[row] for row in part] for column in columns]

    def table_of(part: Any, lexical_logits: Any = None) -> Any:
        return make_exit_table(model, tokenizer, pick(part), lexical_logits=lexical_logits, max_tokens=limit)

    filled = filled_rows(model, tokenizer, rows.select(taught), fill_up_to, seed)
    lexical_logits = None
    if model.config.lexical_exit:
        logits = last_logits(model, tokenizer, filled.all)
        answers = as_answers(logits, problem_type)
        if labels is not None:  # half and half, as for the other exits
            answers = (answers + np.eye(model.num_labels)[np.asarray(labels)[taught]]) / 2
        lexed = fit_lexical_exit(model, tokenizer, filled.all, answers, folds=filled.folds, seed=seed)
        lexed = fit_phrases(model, tokenizer, lexed, filled.folds, logits, seed=seed)
        lexical_logits = lexed[: len(taught)]["lexical_logits"]
        filled = replace(filled, all=lexed)
    taught_rows = filled.for_exits
    with applied(TEACHING, model):

        def trainer_of(rows: Any, **more: Any) -> Any:
            return make_trainer(
                model, tokenizer, rows, None, work / "trainer", stage=TEACHING, epochs=epochs,
                new_learning_rate=learning_rate, temperature=temperature, batch_size=batch_size, saves=10, seed=seed,
                **more,
            )  # fmt: skip

        if not any(parameter.requires_grad for parameter in model.parameters()):
            pass  # exit 0 is all there is, and it is fitted
        elif labels is None and can_keep(model):
            with kept_in_place(model, trainer_of(taught_rows), work / "states.npy") as kept:
                _train(trainer_of(kept, collator=default_data_collator), work)
        else:
            _train(trainer_of(taught_rows), work)
    model.eval()

    learn_from = None
    if criterion == "learned":
        learn_from = table_of(taught[:RULE_ROWS], None if lexical_logits is None else lexical_logits[:RULE_ROWS])
    model.config.exit_policy = calibrate(table_of(chosen), criterion, max_risk=max_disagreement, learn_from=learn_from)
    report = {
        "source": Path(source).name,
        "rows": {
            "taught": len(taught),
            "made_up": len(taught_rows) - len(taught),
            "chosen": len(chosen),
            "reported": len(reported),
        },
        **_replayed(table_of(reported), model),
        "wall_clock_speedup": _timed(source, loading, model, tokenizer, rows.select(reported[:TIMED_ROWS])),
        "max_disagreement": max_disagreement,
        "policy": model.config.exit_policy.to_dict(),
    }
    _save(model, tokenizer, pick(taught), report, work, output)
    return report


def _columns(texts: Any) -> list[list[str]]:
    """One list of texts, or two where they are pairs."""
    if isinstance(texts, str):
        raise TypeError("texts must be a list of texts, got a single one.")
    rows = [tuple(text) if isinstance(text, (tuple, list)) else (text,) for text in texts]
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]) or len(row) > 2 or not all(isinstance(text, str) for text in row):
            raise TypeError(f"texts must all be texts, or all pairs of texts, got {texts[number]!r} at {number}.")
    return [list(column) for column in zip(*rows, strict=True)]


def _check_settings(settings: dict[str, Any], count: int, labels: Sequence[int] | None) -> None:
    from transformers_badge.model.policy_badge import ExitPolicy
    from transformers_badge.training.fine_tune import check_above_zero, check_share

    batch_size = settings["batch_size"]
    if settings["criterion"] != "learned":  # which has a rule only once it is fitted
        ExitPolicy.of({"criterion": settings["criterion"]})
    if labels is not None and len(labels) != count:
        raise ValueError(f"There are {len(labels)} labels for {count} texts: give one for each.")
    check_above_zero(**{name: settings[name] for name in ("batch_size", "epochs", "learning_rate", "temperature")})
    check_share(max_disagreement=settings["max_disagreement"])
    fill_up_to = settings["fill_up_to"]
    if isinstance(fill_up_to, bool) or not isinstance(fill_up_to, int) or fill_up_to < 0:
        raise ValueError(f"fill_up_to must be a number of rows, or 0 to make none up, got {fill_up_to!r}.")
    if labels is not None and fill_up_to:
        raise ValueError(f"Rows that are made up have no labels: give none, or leave out fill_up_to={fill_up_to}.")
    taught = count - sum(_kept_rows(count))
    if taught < batch_size:
        raise ValueError(
            f"There are {count} texts, of which {taught} are trained on: fewer than one batch of {batch_size}. "
            "Give more texts, or a smaller batch_size."
        )


def _check_model(model: Any, problem_type: str, labels: Sequence[int] | None) -> None:
    if problem_type == "regression":
        raise ValueError("The source predicts values, not classes: leaving early has no criterion for these.")
    if len(model.exit_layers) < 2:
        raise ValueError(f"exit_layers={model.exit_layers} leaves no exit to train: name an earlier depth as well.")
    if labels is not None and problem_type != "single_label_classification":
        raise ValueError(f"Labels are of use for problem_type='single_label_classification' only, not {problem_type}.")
    if labels is not None and not all(0 <= label < model.num_labels for label in labels):
        raise ValueError(f"labels must be class indices in [0, {model.num_labels}), as the source has them.")


def _kept_rows(count: int) -> list[int]:
    """How many of the texts choose the threshold, and how many report."""
    return [min(round(share * count), most) for share, most in (CHOOSING, REPORTING)]


def texts_needed(max_disagreement: float) -> float:
    """With fewer texts than this, no threshold can be shown to keep to a budget."""
    from transformers_badge.calibration.bounds import binomial_p_value, rows_needed

    rows = rows_needed(lambda rows: binomial_p_value(0, rows, max_disagreement), 0.05)
    return float("inf") if rows is None else rows / CHOOSING[0]


def _digest(columns: list[list[str]], labels: Sequence[int] | None) -> str:
    data = json.dumps([columns, None if labels is None else list(labels)])
    return hashlib.sha256(data.encode()).hexdigest()


def _open_work(output: Path, identity: dict[str, Any]) -> Path:
    """The folder of what is unfinished, new or of an earlier call with the same settings and texts."""
    from transformers_badge.training.fine_tune import check_output_directory

    work = output.with_name(output.name + ".unfinished")
    check_output_directory(work)
    file, text = work / "settings.json", json.dumps(identity, indent=2, sort_keys=True, default=str) + "\n"
    if not file.exists():
        file.write_text(text)
    elif file.read_text() != text:
        raise ValueError(
            f"{work} holds an unfinished conversion with other settings or texts: finish that one by calling it as "
            "before, or remove the folder."
        )
    return work


def _train(trainer: Any, work: Path) -> None:
    trainer.train(resume_from_checkpoint=_last_checkpoint(work / "trainer"))


def _last_checkpoint(folder: Path) -> str | None:
    """Where an interrupted run can go on: the last checkpoint that was written to its end."""
    steps = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*")}
    for _, path in sorted(steps.items(), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())  # Trainer writes it last
        except (OSError, ValueError):
            shutil.rmtree(path)  # cut short; its step will be saved anew
        else:
            return str(path)
    return None


def _replayed(table: Any, model: Any) -> dict[str, Any]:
    """What exits and policy do on rows that neither training nor the choice of the threshold has seen."""
    from transformers_badge.calibration.replay import agreement, at_exits, layer_speedup, replay

    agrees, taken = agreement(table), replay(table, model.config.exit_policy)
    return {
        "exit_layers": list(table.exit_layers),
        "exit_agreement": agrees.mean(axis=0).tolist(),
        "disagreement": float(1 - at_exits(agrees, taken).mean()),
        "mean_exit_layer": float(np.array(table.exit_layers)[taken].mean()),
        "layer_speedup": layer_speedup(table, taken),
    }


def _timed(source: Any, loading: dict[str, Any], model: Any, tokenizer: Any, rows: Any) -> dict[str, float]:
    """How many times faster early exit is than the source: median, min and max over rounds in which they take turns."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from transformers_badge.evaluation.timing import time_in_turns

    options = {"dtype": model.dtype, **loading}
    plain = AutoModelForSequenceClassification.from_pretrained(source, **options).to(model.device).eval()
    inputs = rows.remove_columns("labels") if "labels" in rows.column_names else rows
    starts = range(0, len(inputs), TIMED_BATCH)
    batches = [tokenizer.pad(inputs[i : i + TIMED_BATCH], return_tensors="pt").to(model.device) for i in starts]
    with torch.no_grad():
        timings = time_in_turns(
            {
                "early_exit": lambda: [model.early_exit_predict(**batch).logits.cpu() for batch in batches],
                "source": lambda: [plain(**batch).logits.cpu() for batch in batches],
            },
            TIMED_ROUNDS,
        )
    return timings.speedup("early_exit", "source")


def _save(
    model: Any, tokenizer: Any, columns: list[list[str]], report: dict[str, Any], work: Path, output: Path
) -> None:
    """The checkpoint, whole or not at all; the columns are those of the texts that were trained on."""
    from transformers_badge.hub.checkpoint import save_checkpoint

    finished = work / "checkpoint"
    shutil.rmtree(finished, ignore_errors=True)
    save_checkpoint(finished, model, tokenizer, columns)
    (finished / "conversion.json").write_text(json.dumps(report, indent=2) + "\n")
    if output.exists():
        output.rmdir()  # known to be empty
    os.replace(finished, output)
    shutil.rmtree(work)
