"""The training loss over all exits."""

import torch
from torch import Tensor
from torch.nn import functional as F


def infer_problem_type(problem_type: str | None, num_labels: int, labels: Tensor | None) -> str:
    """The problem type, as transformers infers it where the config does not say."""
    if problem_type is not None:
        return problem_type
    if num_labels == 1:
        return "regression"
    if isinstance(labels, Tensor) and labels.dtype.is_floating_point:
        return "multi_label_classification"
    return "single_label_classification"


def exit_losses(exit_logits: Tensor, labels: Tensor, problem_type: str, label_smoothing: float = 0.0) -> Tensor:
    """Mean loss of every exit over the batch.

    Cross entropy for single-label, binary cross entropy for multi-label, mean squared error for regression. Smoothing
    by e moves e of a label's weight evenly to all classes (multi-label: to both answers).

    Args:
        exit_logits: (rows, exits, labels).
        labels: as `check_labels` returns them.

    Returns:
        (exits,), float32.
    """
    rows, exits, num_labels = exit_logits.shape
    logits = exit_logits.float().transpose(0, 1)
    if problem_type == "single_label_classification":
        repeated = labels.expand(exits, rows).reshape(-1)
        loss = F.cross_entropy(
            logits.reshape(-1, num_labels), repeated, reduction="none", label_smoothing=label_smoothing
        )
    else:
        repeated = labels.expand(exits, rows, num_labels)
        if problem_type == "regression":
            loss = F.mse_loss(logits, repeated, reduction="none")
        else:
            smoothed = repeated * (1 - label_smoothing) + label_smoothing / 2
            loss = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none")
    return loss.reshape(exits, -1).mean(dim=1)


def weighted_loss(losses: Tensor, weights: list[float]) -> Tensor:
    """Weighted mean over the exits: (exits,) to ()."""
    return torch.dot(losses, torch.tensor(weights, dtype=losses.dtype, device=losses.device))
