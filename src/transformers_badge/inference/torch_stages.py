"""What the engines of torch have in common: tensors, where the model is and in its dtype."""

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transformers_badge.inference.named_stages import LexicalWeights, NamedStages, NamedState
from transformers_badge.inference.stage_modules import make_stages
from transformers_badge.model.stages_badge import join_tensors


Array = np.ndarray[Any, np.dtype[Any]]


class TorchStages(NamedStages):
    """A model that torch runs.

    Args:
        model: a `BadgeForSequenceClassification`, in eval mode. Its weights are not copied.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model.exit_layers, model.padding_id, LexicalWeights.of(model), model.run_cost)
        self._model, self._modules = model, make_stages(model)

    @torch.no_grad()
    def run(self, stage: str, state: NamedState) -> NamedState:
        """The state with what the stage made in it."""
        return {**state, **self.run_module(stage, self._modules[stage].given(state))}

    @abstractmethod
    def run_module(self, stage: str, given: NamedState) -> NamedState:
        """What a stage makes of what it is given."""

    def from_host(self, array: Array) -> Tensor:
        """The array where the model is."""
        return torch.from_numpy(array).to(self._model.device)

    def to_host(self, logits: Tensor | Array) -> Array:
        """Logits in numpy: the one wait for the device at each exit. Those of exit 0 are there already."""
        return np.asarray(torch.as_tensor(logits).double().cpu().numpy())

    def keep_rows(self, arrays: list[Tensor], rows: Array | None) -> list[Tensor]:
        """These rows of tensors."""
        if rows is None:  # a view would need a compiled graph of its own
            return [array.clone(memory_format=torch.contiguous_format) for array in arrays]
        indices: dict[torch.device, Tensor] = {}
        for device in {array.device for array in arrays}:
            indices[device] = torch.from_numpy(rows).to(device)
        return [array.index_select(0, indices[array.device]) for array in arrays]

    def join(self, arrays: list[Tensor], width: int, padding: int) -> Tensor:
        """Tensors below one another; those that are wider are cut."""
        return join_tensors(arrays, width, padding)


def check_device(device: str | None) -> torch.device:
    """A device by name; default: the CPU.

    Raises:
        ValueError: there is none of this name, or it is not here.
    """
    try:
        found = torch.device(device or "cpu")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"There is no device {device!r} here ({str(error).splitlines()[0]}): use 'cpu', or 'cuda' where there is a "
            "GPU and a torch built for it."
        ) from error
    return found
