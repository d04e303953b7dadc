"""Text classification that leaves early and says at which layer."""

from dataclasses import fields
from typing import Any

from transformers import TextClassificationPipeline

from .policy_badge import ExitPolicy


_POLICY_FIELDS = ("policy", *(field.name for field in fields(ExitPolicy)))


class BadgeTextClassificationPipeline(TextClassificationPipeline):  # type: ignore[misc]
    """`TextClassificationPipeline` over `early_exit_predict`.

    Takes the fields of the exit policy (`threshold=`, `criterion=`, ...) on creation or per call, and adds
    `exit_layer`, the number of blocks that ran for the text, to every label that it returns.
    """

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """As of `TextClassificationPipeline`; and an empty list, at which that fails, has an empty list of answers."""
        if isinstance(inputs, (list, tuple)) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        policy = {name: parameters.pop(name) for name in _POLICY_FIELDS if name in parameters}
        preprocess, forward, postprocess = super()._sanitize_parameters(**parameters)
        return preprocess, {**forward, **policy}, postprocess

    def _forward(self, model_inputs: Any, **policy: Any) -> Any:
        return self.model.early_exit_predict(**model_inputs, **policy)

    def postprocess(self, model_outputs: Any, **parameters: Any) -> Any:
        """Labels and scores, each with the layer that the text left at."""
        answer = super().postprocess(model_outputs, **parameters)
        exit_layer = int(model_outputs["exit_layer"][0])
        for entry in answer if isinstance(answer, list) else [answer]:
            entry["exit_layer"] = exit_layer
        return answer
