"""Training recipes: which exits learn, from whom, and how far their gradients go; one or two runs of Trainer each."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from transformers_badge.model.inputs_badge import check_labels
from transformers_badge.model.loss_badge import exit_losses, infer_problem_type
from transformers_badge.model.modules_badge import LexicalGate


@dataclass(frozen=True)
class Stage:
    """One run of Trainer.

    Args:
        learning: the exits that learn: `"all"`, `"last"`, `"inner"` (all but the last), or `"alternating"`: the last
            on even steps, all on odd ones.
        exit_gradient: what the exits' gradients do to the encoder, as in `BadgeConfig`. At 0 the last exit is frozen
            too.
        distilled: inner exits learn the last exit's answers, besides the labels if there are any.
        filled: rows go without labels, and where they are few are filled up with made-up ones
            (`teaching.teaching_rows`). The gates of exit 0 stay as they are, but in a converted model.
        share: of the epochs.
    """

    learning: Literal["all", "last", "inner", "alternating"] = "all"
    exit_gradient: float | Literal["rescaled", "separated"] = 1.0
    distilled: bool = False
    filled: bool = False
    share: float = 1.0


# The frozen last exit teaches the others: those of a converted classifier, and those of a model that is fine-tuned.
TEACHING = Stage("inner", exit_gradient=0.0, distilled=True, filled=True)

RECIPES: dict[str, tuple[Stage, ...]] = {
    # All exits at once, and then they are taught by the last, on more texts than there are labels for.
    "taught": (Stage(), TEACHING),
    # All exits at once, weighted.
    "joint": (Stage(),),
    # Encoder and last exit, then the other exits on the frozen encoder (DeeBERT, Xin et al., ACL 2020).
    "two_stage": (Stage("last", share=0.5), Stage("inner", exit_gradient=0.0, share=0.5)),
    # Encoder and last exit, then everything.
    "mixed": (Stage("last", share=0.5), Stage(share=0.5)),
    # The last exit and all exits in turns (BERxiT, Xin et al., EACL 2021).
    "alternating": (Stage("alternating"),),
    # The inner exits also learn from the last (Zhang et al., ICCV 2019; for early exit FastBERT, Liu et al., ACL 2020).
    "self_distilled": (Stage(distilled=True),),
    # Gradients balanced over the exits (ElasticBERT, Liu et al., NAACL 2022; Li et al., ICCV 2019).
    "rescaled": (Stage(exit_gradient="rescaled"),),
    # A block learns from the next exit only (SWEET, Rotem et al., ACL 2023).
    "separated": (Stage(exit_gradient="separated"),),
}


def get_recipe(name: str) -> tuple[Stage, ...]:
    """The stages of a recipe.

    Raises:
        ValueError: there is none of that name; the message lists those that there are.
    """
    if name not in RECIPES:
        raise ValueError(f"There is no recipe {name!r}; there are {', '.join(RECIPES)}.")
    return RECIPES[name]


@contextmanager
def applied(stage: Stage, model: Any) -> Iterator[None]:
    """The model with the parameters and gradients of a stage; afterwards as it was."""
    before, tuned = model.config.exit_gradient, not model.config.frozen
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.config.exit_gradient = stage.exit_gradient
    if model.config.frozen:
        for module in (model.encoder, model.exits[-1]):
            module.requires_grad_(False)
    if stage.filled and tuned:
        # Rows that the encoder was fine-tuned on it knows without the words: gates would close, and new rows lose.
        for module in model.modules():
            if isinstance(module, LexicalGate):
                module.requires_grad_(False)
    try:
        yield
    finally:
        model.config.exit_gradient = before
        for parameter in trainable:
            parameter.requires_grad_(True)


def distillation_losses(exit_logits: Tensor, problem_type: str, temperature: float) -> Tensor:
    """Mean loss of every inner exit against the answers of the last, which gets no gradient.

    Single-label: T^2 times the cross entropy of softmax(z/T) against softmax(z_last/T) (Hinton et al., 2015, eq. 2).
    Multi-label: the same with a sigmoid per label. Regression: the squared difference.

    Args:
        exit_logits: (rows, exits, labels).
        temperature: T > 0; higher says more about the unlikely answers.

    Returns:
        (exits - 1,), float32.
    """
    inner, last = exit_logits[:, :-1].float(), exit_logits[:, -1:].detach().float()
    last = last.expand_as(inner)
    if problem_type == "regression":
        losses = (inner - last).square()
    elif problem_type == "multi_label_classification":
        losses = F.binary_cross_entropy_with_logits(
            inner / temperature, torch.sigmoid(last / temperature), reduction="none"
        )
    else:
        answers = torch.softmax(last / temperature, dim=-1)
        losses = -(answers * torch.log_softmax(inner / temperature, dim=-1)).sum(dim=-1, keepdim=True)
    scale = 1.0 if problem_type == "regression" else temperature**2
    return scale * losses.mean(dim=(0, 2))


class ExitTrainer(Trainer):  # type: ignore[misc]
    """Trainer with the loss of a stage."""

    def __init__(self, *args: Any, stage: Stage, temperature: float = 1.0, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.stage, self.temperature = stage, temperature

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted mean of the losses of the exits that learn; half of each from the last exit where distilled."""
        outputs = model(**inputs)
        config = self.model.config
        exit_logits, labels = outputs["exit_logits"], inputs.get("labels")
        problem_type = infer_problem_type(config.problem_type, config.num_labels, labels)
        exits = exit_logits.shape[1]

        losses = None
        if labels is not None:
            labels = check_labels(labels, len(exit_logits), config.num_labels, problem_type)
            losses = exit_losses(exit_logits, labels, problem_type, config.label_smoothing)
        if self.stage.distilled:
            taught = distillation_losses(exit_logits, problem_type, self.temperature)
            if losses is None:
                losses = torch.cat([taught, taught.new_zeros(1)])
            else:
                losses = torch.cat([(losses[:-1] + taught) / 2, losses[-1:]])
        if losses is None:
            raise ValueError("The rows have no labels: give them, or train with a stage that is distilled.")

        learning = self._learning(exits)
        weights = torch.tensor(config.loss_weights[learning], dtype=losses.dtype, device=losses.device)
        if not weights.any():
            raise ValueError(f"exit_loss_weights gives no weight to the exits that learn: got {config.loss_weights}.")
        loss = torch.dot(losses[learning], weights / weights.sum())
        return (loss, outputs) if return_outputs else loss

    def _learning(self, exits: int) -> slice:
        """The exits that learn in this step."""
        learning = self.stage.learning
        if learning == "alternating":
            learning = "all" if self.state.global_step % 2 else "last"
        return {"all": slice(0, exits), "last": slice(exits - 1, exits), "inner": slice(0, exits - 1)}[learning]
