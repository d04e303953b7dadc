"""Checks of what a user hands to the model: each failure is one sentence that says what was wrong and what to do."""

from typing import Any

import torch
from torch import Tensor

from .rows_badge import check_values


def check_inputs(input_ids: Any, attention_mask: Any, inputs_embeds: Any, vocab_size: int, max_tokens: int) -> None:
    """Check shapes, types and ranges of a batch.

    Args:
        input_ids: (rows, tokens), whole numbers in [0, vocab_size); or else
        inputs_embeds: (rows, tokens, hidden).
        attention_mask: (rows, tokens) of 0 and 1, at least one 1 in every row; or `None`.

    Raises:
        TypeError: not tensors of the right type.
        ValueError: an empty batch, no tokens, too many tokens, ids or mask outside their range.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give either input_ids or inputs_embeds, and not both.")
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    name, axes = ("input_ids", 2) if inputs_embeds is None else ("inputs_embeds", 3)
    for what, value in ((name, tokens), ("attention_mask", attention_mask)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{what} must be a tensor, got {type(value).__name__}; tokenize with return_tensors='pt'.")
    if tokens.ndim != axes:
        shape = "(rows, tokens)" if axes == 2 else "(rows, tokens, hidden)"
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(tokens.shape)}.")
    if tokens.shape[0] == 0:
        raise ValueError("The batch is empty: give at least one row.")
    if tokens.shape[1] == 0:
        raise ValueError("The rows have no tokens: a text needs at least one, its special tokens included.")
    if tokens.shape[1] > max_tokens:
        raise ValueError(
            f"The rows have {tokens.shape[1]} tokens, but this encoder takes at most {max_tokens}: "
            f"tokenize with truncation=True, max_length={max_tokens}."
        )
    if input_ids is not None and (input_ids.dtype.is_floating_point or input_ids.dtype == torch.bool):
        raise TypeError(f"input_ids must be whole numbers, got {input_ids.dtype}.")
    if attention_mask is not None and attention_mask.dtype == torch.bfloat16:  # numpy has no such type
        raise TypeError("attention_mask must be whole numbers or booleans, got torch.bfloat16.")
    if attention_mask is not None and attention_mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"attention_mask must have the shape {tuple(tokens.shape[:2])} of {name}, "
            f"got {tuple(attention_mask.shape)}."
        )
    if torch.compiler.is_compiling():  # what follows looks at values, which a traced graph does not have
        return
    # An id out of range would otherwise end a CUDA process with an assertion.
    ids, mask = (None if value is None else value.cpu().numpy() for value in (input_ids, attention_mask))
    check_values(ids, mask, vocab_size)


def check_lexical(lexical_logits: Any, input_ids: Any, shape: tuple[int, int], lexical_exit: bool) -> None:
    """Check what the lexical exit needs.

    Args:
        shape: (rows, `lexical_columns`).

    Raises:
        TypeError: lexical_logits is not a tensor.
        ValueError: it has another shape, or values that are not finite, or the model has no lexical exit; or there is
            nothing for the lexical exit to read.
    """
    if lexical_logits is None:
        if lexical_exit and input_ids is None:
            raise ValueError(
                "The lexical exit reads input_ids: give these instead of inputs_embeds, or give lexical_logits as well."
            )
        return
    if not lexical_exit:
        raise ValueError("lexical_logits are of use to a model with lexical_exit=True only: leave them out.")
    if not isinstance(lexical_logits, Tensor):
        raise TypeError(f"lexical_logits must be a tensor, got {type(lexical_logits).__name__}.")
    if tuple(lexical_logits.shape) != shape:
        raise ValueError(f"lexical_logits must have the shape {shape}, got {tuple(lexical_logits.shape)}.")
    if not torch.compiler.is_compiling() and not bool(lexical_logits.isfinite().all()):
        raise ValueError("lexical_logits must be finite, got NaN or infinity.")


def check_labels(labels: Any, rows: int, num_labels: int, problem_type: str) -> Tensor:
    """Labels in the type and shape that the loss takes.

    Returns:
        (rows,) int64 for single-label; (rows, num_labels) float32, for multi-label in [0, 1].

    Raises:
        TypeError: labels of a type that the problem does not have.
        ValueError: labels of another shape, or outside the range.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}.")
    whole = not labels.dtype.is_floating_point
    if problem_type == "single_label_classification":
        if not whole or labels.dtype == torch.bool:
            raise TypeError(f"labels of problem_type={problem_type!r} must be whole numbers, got {labels.dtype}.")
        if labels.numel() != rows:
            raise ValueError(f"labels must have the shape ({rows},), one class per row, got {tuple(labels.shape)}.")
        labels = labels.reshape(rows).long()
        if not torch.compiler.is_compiling():
            low, high = torch.stack(labels.aminmax()).tolist()
            if low < 0 or high >= num_labels:
                raise ValueError(f"labels must be in [0, {num_labels}), got {low if low < 0 else high}.")
        return labels  # type: ignore[no-any-return]
    shape = (rows, num_labels)
    if tuple(labels.shape) != shape and not (num_labels == 1 and tuple(labels.shape) == (rows,)):
        raise ValueError(
            f"labels of problem_type={problem_type!r} must have the shape {shape}, got {tuple(labels.shape)}."
        )
    if whole and problem_type == "multi_label_classification" and labels.dtype != torch.bool:
        raise TypeError("labels of problem_type='multi_label_classification' must be floats (0. or 1.) or booleans, "
                        f"got {labels.dtype}.")  # fmt: skip
    labels = labels.reshape(shape).float()
    if not torch.compiler.is_compiling():
        if not bool(labels.isfinite().all()):
            raise ValueError("labels must be finite, got NaN or infinity.")
        if problem_type == "multi_label_classification" and not bool(((labels >= 0) & (labels <= 1)).all()):
            raise ValueError("labels of problem_type='multi_label_classification' must be in [0, 1].")
    return labels  # type: ignore[no-any-return]
