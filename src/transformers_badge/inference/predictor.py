"""Early exit on a fast engine. One that runs an exported model needs neither torch nor transformers' models."""

import hashlib
import json
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transformers_badge.inference.named_stages import NamedStages
from transformers_badge.inference.onnx_stages import OnnxStages, export_files
from transformers_badge.inference.predict import answer_rows, predict_texts, token_limit
from transformers_badge.model.early_exit_badge import predict_with_policy
from transformers_badge.model.policy_badge import ExitPolicy, check_count
from transformers_badge.model.rows_badge import check_stream, check_values, read_tokens
from transformers_badge.model.stream_badge import READ_AHEAD, StreamedRow, stream_with_policy


Array = np.ndarray[Any, np.dtype[Any]]

MANIFEST = "onnxruntime.json"
FORMAT = 6
ENGINES = ("onnxruntime", "compiled")


@dataclass(frozen=True)
class Prediction:
    """What `BadgePredictor.early_exit_predict` returns, in the order of the input.

    Args:
        logits: (rows, labels), of the exit that each row took.
        exit_layer: (rows,), how many blocks ran for the row; 0 for the lexical exit.
        exit_logits: (rows, exits, labels), NaN where an exit was not reached, if asked for.
    """

    logits: Array
    exit_layer: Array
    exit_logits: Array | None = None


class BadgePredictor:
    """A classifier that an engine runs; answers as `BadgeForSequenceClassification` does.

    Args:
        stages: the model.
        config: `id2label`, `problem_type`, `exit_policy` and the rest of config.json.
        manifest: facts about the model, as an export states them: num_labels, precision, max_tokens, vocab_size,
            digest.
        tokenizer: of its encoder.
        workers: how many batches of a stream, or parts of a batch, run side by side.
    """

    def __init__(
        self,
        stages: NamedStages,
        config: "PredictorConfig",
        manifest: dict[str, Any],
        tokenizer: Any,
        workers: int = 1,
    ) -> None:
        self.stages, self.config, self.tokenizer, self.workers = stages, config, tokenizer, workers
        self.exit_layers: list[int] = list(stages.exit_layers)
        self.num_labels: int = manifest["num_labels"]
        self.precision: str = manifest["precision"]
        self.max_tokens: int = manifest["max_tokens"]
        self.digest: str = manifest["digest"]  # tells whether an exit table is this predictor's own
        self._vocab_size: int = manifest["vocab_size"]
        self._executor = ThreadPoolExecutor(workers) if workers > 1 else None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        engine: str = "onnxruntime",
        precision: str = "fp32",
        *,
        provider: str | None = None,
        threads: int | None = None,
        workers: int = 1,
        device: str | None = None,
    ) -> "BadgePredictor":
        """Load what `transformers-badge export` made, or compile a checkpoint.

        Args:
            name_or_path: an export, or the checkpoint that it lies in; a folder or a name on the hub.
            engine: "onnxruntime"; or "compiled", which needs no export but torch and a C++ compiler, and takes some
                seconds to start.
            precision: which of a checkpoint's exports, "fp32" or "int8"; for the engine compiled "fp32" or "bf16".
            provider: onnxruntime only: an execution provider. Default: "CPUExecutionProvider".
            threads: onnxruntime only: how many threads work on one product. Default: one per core; with several
                workers one each. (The engine compiled has those of `torch.set_num_threads`.)
            workers: onnxruntime only: how many batches of a stream, or of texts in a call, run side by side; in
                `early_exit_predict`, how many parts of a batch, whose rows are alike in length. As many as there are
                cores answer most rows per second; a single row takes longer then.
            device: compiled only: "cuda" for a GPU, where the stages run as CUDA graphs. Default: "cpu".

        Raises:
            ModuleNotFoundError: the engine is not installed.
            OSError: there is no such export, or a file of it is missing.
            ValueError: an unknown engine, a provider or a device that is not here, a file that is not what was
                exported, an export of another version, or one of other weights than the checkpoint's.
        """
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}.")
        if engine == "compiled":
            if provider is not None or threads is not None or workers != 1:
                raise ValueError(
                    "provider, threads and workers are ONNX Runtime's: leave them out with engine='compiled'."
                )
            from transformers_badge.inference.compiled_stages import load_compiled

            return cls(*load_compiled(name_or_path, precision, device))
        if device is not None:
            raise ValueError("device is of the engine compiled: for ONNX Runtime choose a provider instead.")
        check_count("workers", workers)
        if threads is not None:
            check_count("threads", threads)
        folder = find_export(name_or_path, precision)
        manifest = read_manifest(folder)
        from transformers import AutoTokenizer, PreTrainedConfig

        given = {} if provider is None else {"provider": provider}
        stages = OnnxStages(
            folder,
            manifest["exit_layers"],
            manifest["padding_id"],
            hashing=manifest["lexical"],
            threads=threads,
            workers=workers,
            **given,
        )
        # Given any config, it does not ask for that of the model, whose class needs torch.
        tokenizer = AutoTokenizer.from_pretrained(folder, config=PreTrainedConfig())
        return cls(stages, PredictorConfig.load(folder, manifest), manifest, tokenizer, workers)

    def early_exit_predict(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        *,
        policy: ExitPolicy | Mapping[str, Any] | None = None,
        output_exit_logits: bool = False,
        **overrides: Any,
    ) -> Prediction:
        """Answer each row at the first exit that is ready, and run no block for rows that have left.

        Args:
            input_ids, attention_mask, token_type_ids: (rows, tokens), whole numbers, as arrays, lists or tensors.
            policy: an `ExitPolicy` or a dict. Default: the export's.
            output_exit_logits: also return the logits that were seen on the way.
            **overrides: fields of the policy for this call, such as `criterion`, `threshold`, `patience`.

        Raises:
            TypeError, ValueError: bad inputs or a bad policy; the message says which and what to do.

        Example:
            >>> predictor.early_exit_predict(**predictor.tokenizer(texts, padding=True, return_tensors="np"))
        """
        policy = self._policy(policy, overrides)
        ids, mask, types = self._check(input_ids, attention_mask, token_type_ids)
        state = self.stages.begin_padded(ids, mask, types)
        problem_type = self.config.problem_type
        exit_logits, taken = predict_with_policy(
            self.stages, state, mask > 0, self.num_labels, policy, problem_type, self._executor
        )
        logits = exit_logits[np.arange(len(ids)), taken].astype(np.float32)
        seen = exit_logits.astype(np.float32) if output_exit_logits else None
        return Prediction(logits, np.asarray(self.exit_layers)[taken], seen)

    def early_exit_stream(
        self,
        rows: Iterable[Any],
        batch_size: int = 32,
        *,
        tokenizer: Any = None,
        in_order: bool = True,
        policy: ExitPolicy | Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> Generator[StreamedRow, None, None]:
        """Answer a data set or a stream with full batches; as `BadgeForSequenceClassification.early_exit_stream`."""
        policy = self._policy(policy, overrides)
        check_stream(rows, batch_size)
        tokens = read_tokens(rows, tokenizer, READ_AHEAD * batch_size, self._vocab_size, self.max_tokens)
        problem_type = self.config.problem_type
        return stream_with_policy(
            self.stages, tokens, batch_size, self.num_labels, policy, problem_type, in_order, workers=self.workers
        )

    def __call__(
        self, texts: str | Sequence[str] | Sequence[tuple[str, str]], batch_size: int = 32, **overrides: Any
    ) -> list[dict[str, Any]]:
        """Classify texts, or pairs of texts, as a text-classification pipeline does.

        Returns:
            `{"label": ..., "score": ..., "exit_layer": ...}` for each, in order.

        Raises:
            TypeError: something else than texts.
            ValueError: as of `predict_texts`.
        """
        if not isinstance(texts, str):
            return predict_texts(self, self.tokenizer, texts, batch_size, **overrides)
        # A stream of one row takes a tenth longer than that row, and with workers makes threads for it.
        check_stream([texts], batch_size)
        policy = self._policy(overrides.pop("policy", None), overrides)  # all that a list may be given besides
        limit = token_limit(self, self.tokenizer)
        encoded = self.tokenizer([texts], truncation=True, max_length=limit, return_tensors="np")
        prediction = self.early_exit_predict(**encoded, policy=policy)
        return answer_rows(prediction.logits, prediction.exit_layer, self.config)

    def _policy(self, policy: Any, overrides: dict[str, Any]) -> ExitPolicy:
        """The policy of one call."""
        checked = ExitPolicy.of(self.config.exit_policy if policy is None else policy, **overrides)
        checked.thresholds(len(self.exit_layers))
        return checked

    def _check(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> tuple[Array, Array, Array | None]:
        """Arrays of a sound batch, int64."""
        ids = np.asarray(input_ids)
        if ids.ndim != 2:
            raise ValueError(f"input_ids must have the shape (rows, tokens), got {ids.shape}.")
        if ids.shape[0] == 0 or ids.shape[1] == 0:
            raise ValueError("The batch is empty: give at least one row with at least one token.")
        if ids.dtype.kind not in "iu":
            raise TypeError(f"input_ids must be whole numbers, got {ids.dtype}.")
        if ids.shape[1] > self.max_tokens:
            raise ValueError(
                f"The rows have {ids.shape[1]} tokens, but this model takes at most {self.max_tokens}: tokenize with "
                f"truncation=True, max_length={self.max_tokens}."
            )
        mask = np.ones(ids.shape, np.int64) if attention_mask is None else np.asarray(attention_mask)
        for name, value in (("attention_mask", mask), ("token_type_ids", token_type_ids)):
            if value is not None and np.shape(value) != ids.shape:
                raise ValueError(f"{name} must have the shape {ids.shape} of input_ids, got {np.shape(value)}.")
        check_values(ids, mask, self._vocab_size)
        types = None if token_type_ids is None else np.asarray(token_type_ids, np.int64)
        return ids.astype(np.int64, copy=False), mask.astype(np.int64, copy=False), types


@dataclass
class PredictorConfig:
    """What a predictor needs of config.json."""

    id2label: dict[int, str]
    problem_type: str
    exit_policy: ExitPolicy
    num_labels: int
    lexical_exit: bool
    phrase_filters: int

    @classmethod
    def load(cls, folder: Path, manifest: dict[str, Any]) -> "PredictorConfig":
        """Read it from an export.

        Raises:
            ValueError: its config.json is missing or damaged.
        """
        try:
            stored = json.loads((folder / "config.json").read_text())
            # transformers leaves out names that are its own.
            unnamed = {index: f"LABEL_{index}" for index in range(manifest["num_labels"])}
            id2label = {int(index): name for index, name in stored.get("id2label", unnamed).items()}
            policy = ExitPolicy.of(stored["exit_policy"])
            has_exit_0 = manifest["exit_layers"][0] == 0
            filters = int(stored["lexical_filters"]) if has_exit_0 else 0
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder / 'config.json'} is missing or damaged ({error}): export the model again."
            ) from error
        return cls(id2label, manifest["problem_type"], policy, manifest["num_labels"], has_exit_0, filters)


def find_export(name_or_path: str | os.PathLike[str], precision: str) -> Path:
    """The folder of an export: the one given, or the one of this precision in the checkpoint given.

    Raises:
        OSError: there is none.
        ValueError: it is of other weights than the checkpoint's.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        try:
            folder = Path(snapshot_download(str(name_or_path)))
        except (OSError, HFValidationError) as error:
            raise OSError(
                f"{name_or_path} is neither a folder nor a checkpoint that can be downloaded: {error}"
            ) from error
    if (folder / MANIFEST).is_file():
        return folder
    export = folder / export_name(precision)
    if not (export / MANIFEST).is_file():
        raise OSError(
            f"There is no export in {folder}: make one with transformers-badge export {name_or_path} "
            f"--precision {precision}."
        )
    source = json.loads((export / MANIFEST).read_text()).get("source")
    if source is not None and source != digest_weights(folder):
        raise ValueError(
            f"The weights in {folder} have changed since {export.name} was made: run transformers-badge export again."
        )
    return export


def export_name(precision: str) -> str:
    """The folder, in a checkpoint, of its export."""
    return f"onnxruntime-{precision}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an export says of itself, once its files are known to be those that were written.

    Raises:
        OSError: a file is missing.
        ValueError: the manifest is damaged or of a newer version, or a file is not what was exported.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version = int(manifest["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: export the model again.") from error
    if version != FORMAT:
        raise ValueError(
            f"{folder} was exported by another version (format {version}; this one reads {FORMAT}): export the model "
            "again, or use that version."
        )
    try:
        needed = export_files(manifest["exit_layers"], manifest["lexical"] is not None)
        files = {name: str(manifest["files"][name]) for name in needed}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: export the model again.") from error
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise OSError(f"{folder / name} is missing: export the model again.")
        if digest_file(folder / name) != digest:
            raise ValueError(f"{folder / name} is not what was exported: export the model again.")
    return dict(manifest)


def digest_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_weights(checkpoint: Path) -> str:
    """Of the weights in a checkpoint's folder."""
    digests = [digest_file(path) for path in sorted(checkpoint.glob("*.safetensors"))]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()
