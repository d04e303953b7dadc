"""The stages of a model, each compiled by torch.compile: one graph for all shapes, so that nothing compiles later."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.utils.import_utils import is_torch_greater_or_equal

from transformers_badge.inference.exit_logits import digest_model
from transformers_badge.inference.graphed_stages import GraphedStages
from transformers_badge.inference.named_stages import NamedState
from transformers_badge.inference.predictor import PredictorConfig
from transformers_badge.inference.stage_modules import unused_sizes
from transformers_badge.inference.torch_stages import TorchStages, check_device
from transformers_badge.model.loss_badge import infer_problem_type
from transformers_badge.model.modeling_badge import BadgeForSequenceClassification


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
OLDEST_TORCH = "2.8"  # 2.6 fails at some stages, and answers wrongly where models share a process
_MANY = 100_000


class CompiledStages(TorchStages):
    """A model that torch.compile has compiled.

    Args:
        model: a `BadgeForSequenceClassification`, in eval mode. Its weights are not copied.
        backend: of torch.compile.
    """

    def __init__(self, model: Any, backend: str = "inductor") -> None:
        super().__init__(model)
        self._stages: dict[str, Callable[..., NamedState]] = {
            name: torch.compile(module, dynamic=True, backend=backend) for name, module in self._modules.items()
        }

    def compile(self) -> "CompiledStages":
        """Compile every stage now, not when it is first met."""
        several, tokens = unused_sizes(self._model)
        # The stages of all models in a process share code, and torch gives up on code that it has compiled eight times.
        with torch._dynamo.config.patch(recompile_limit=_MANY, accumulated_recompile_limit=_MANY):
            for rows in (several, 1):  # single rows have graphs of their own
                ids = np.zeros((rows, tokens), np.int64)
                state = self.embed(self.begin_padded(ids, np.ones_like(ids)))
                for layer in self.exit_layers:
                    if layer > 0:
                        state = self.run_block(layer, state)
        return self

    def run_module(self, stage: str, given: NamedState) -> NamedState:
        """What a stage makes of what it is given."""
        return self._stages[stage](**given)


def load_compiled(
    name_or_path: str | os.PathLike[str], precision: str, device: str | None = None
) -> tuple[TorchStages, PredictorConfig, dict[str, Any], Any]:
    """What a `BadgePredictor` is made of: a checkpoint, compiled; on a GPU in CUDA graphs.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: an unknown precision, or a device that is not here.
        RuntimeError: torch.compile cannot compile here, or is too old to.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)} for engine='compiled', got {precision!r}.")
    place = check_device(device)
    if place.type != "cuda" and not is_torch_greater_or_equal(OLDEST_TORCH):
        raise RuntimeError(
            f"engine='compiled' needs torch {OLDEST_TORCH} or newer on a processor, and this is {torch.__version__}: "
            "upgrade torch, or load the checkpoint with AutoModelForSequenceClassification."
        )
    from transformers import AutoTokenizer

    model = BadgeForSequenceClassification.from_pretrained(name_or_path, dtype=PRECISIONS[precision]).eval().to(place)
    try:
        stages = GraphedStages(model) if place.type == "cuda" else CompiledStages(model).compile()
    except torch._dynamo.exc.TorchDynamoException as error:
        raise RuntimeError(
            f"torch.compile cannot compile here ({str(error).splitlines()[0]}): it needs a C++ compiler, such as g++."
        ) from error
    config = model.config
    problem_type = infer_problem_type(config.problem_type, model.num_labels, None)
    manifest = {
        "num_labels": model.num_labels,
        "precision": precision,
        "max_tokens": model.max_tokens,
        "vocab_size": config.get_text_config().vocab_size,
        "digest": digest_model(model),
    }
    policy = config.exit_policy if precision == "fp32" else replace(config.exit_policy, certificate=None)
    facts = PredictorConfig(
        config.id2label, problem_type, policy, model.num_labels, config.lexical_exit, config.phrase_filters
    )
    return stages, facts, manifest, AutoTokenizer.from_pretrained(name_or_path)
