"""Text classification that leaves early and says at which layer."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

from transformers import TextClassificationPipeline

from .policy_badge import ExitPolicy
from .stream_badge import READ_AHEAD


_POLICY_FIELDS = ("policy", *(field.name for field in fields(ExitPolicy)))


class BadgeTextClassificationPipeline(TextClassificationPipeline):  # type: ignore[misc]
    """`TextClassificationPipeline` that leaves early. The texts of a list or a data set are all at hand, so that rows
    that stay are regrouped (`early_exit_stream`); those of a generator are answered batch by batch
    (`early_exit_predict`).

    Takes the fields of the exit policy (`threshold=`, `criterion=`, ...) on creation or per call, and adds
    `exit_layer`, the number of blocks that ran for the text, to every label that it returns.
    """

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """As of `TextClassificationPipeline`; but a tuple or a column of a data set is a list of texts too, and an
        empty list has no answers.
        """
        if isinstance(inputs, Sequence) and not isinstance(inputs, str):
            inputs = list(inputs)
            if not inputs:
                return []
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        policy = {name: parameters.pop(name) for name in _POLICY_FIELDS if name in parameters}
        preprocess, forward, postprocess = super()._sanitize_parameters(**parameters)
        return preprocess, {**forward, **policy}, postprocess

    def preprocess(self, inputs: Any, **tokenizer_kwargs: Any) -> Any:
        """Tokens of one text."""
        return super().preprocess(_named(inputs), **tokenizer_kwargs)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Any:
        """Answers of many texts. Those of a generator are not held up by texts that may be long in coming.

        `num_workers` is for generators: the texts of a list are tokenized many at a time, by all cores.
        """
        if not isinstance(inputs, Sized):
            return super().get_iterator(
                inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
            )
        return _StreamedAnswers(self, inputs, batch_size, preprocess_params, forward_params, postprocess_params)

    def _forward(self, model_inputs: Any, **policy: Any) -> Any:
        return self.model.early_exit_predict(**model_inputs, **policy)

    def postprocess(self, model_outputs: Any, **parameters: Any) -> Any:
        """Labels and scores, each with the layer that the text left at."""
        answer = super().postprocess(model_outputs, **parameters)
        exit_layer = int(model_outputs["exit_layer"][0])
        for entry in answer if isinstance(answer, list) else [answer]:
            entry["exit_layer"] = exit_layer
        return answer


@dataclass
class _StreamedAnswers:
    """The answers of texts that are all at hand, in their order; rows are regrouped, so that batches stay full."""

    pipeline: BadgeTextClassificationPipeline
    texts: Any  # Sized, and indexed from 0
    batch_size: int
    preprocess_params: dict[str, Any]
    policy: dict[str, Any]
    postprocess_params: dict[str, Any]

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[Any]:
        for row in self.pipeline.model.early_exit_stream(self._rows(), self.batch_size, **self.policy):
            output = {"logits": row.logits[None], "exit_layer": [row.exit_layer]}
            yield self.pipeline.postprocess(output, **self.postprocess_params)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Tokens of each text."""
        size = READ_AHEAD * self.batch_size
        for start in range(0, len(self.texts), size):
            stop = min(start + size, len(self.texts))
            named = [_named(self.texts[index], f" {index}") for index in range(start, stop)]
            for names, group in groupby(named, key=tuple):  # texts, or pairs
                texts = list(group)
                columns = {name: [text[name] for text in texts] for name in names}
                encoded = self.pipeline.tokenizer(**columns, **self.preprocess_params)
                yield from ({name: encoded[name][row] for name in encoded} for row in range(len(texts)))


def _named(text: Any, number: str = "") -> dict[str, str]:
    """A text or a pair as the tokenizer's arguments; what else is in a mapping is left alone.

    Raises:
        TypeError: it is neither.
    """
    given = text if isinstance(text, Mapping) else {"text": text}
    named = {name: given[name] for name in ("text", "text_pair") if given.get(name) is not None}
    if "text" not in named or not all(isinstance(value, str) for value in named.values()):
        raise TypeError(
            f'Text{number} must be a string or, for a pair, {{"text": "...", "text_pair": "..."}}, got '
            f"{type(text).__name__}."
        )
    return named
