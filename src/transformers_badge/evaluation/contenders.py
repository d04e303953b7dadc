"""What a benchmark compares: full models and early exit, on every engine, from texts to logits."""

import copy
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from transformers_badge.inference.cuda_graphs import CudaGraphs, most_positions
from transformers_badge.inference.onnx_export import export_onnx
from transformers_badge.inference.onnx_stages import import_onnxruntime
from transformers_badge.inference.predict import token_limit
from transformers_badge.inference.predictor import BadgePredictor
from transformers_badge.inference.torch_stages import check_device
from transformers_badge.model.configuration_badge import BadgeConfig
from transformers_badge.model.encoders_badge import get_adapter
from transformers_badge.model.modeling_badge import BadgeForSequenceClassification
from transformers_badge.model.policy_badge import ExitPolicy


Texts = Sequence[str] | Sequence[tuple[str, ...]]
Run = Callable[[Texts, int], list[float]]  # texts and batch size to the seconds of every batch

COMPILED = {"compiled": "fp32", "bf16": "bf16"}  # by torch.compile, and the precision
# fp32 and int8 in ONNX Runtime; bf16 is compiled, for processors that have it.
ON_PROCESSORS = ("fp32", "int8")
ENGINES = ("eager", "fp32", "int8", "compiled", "bf16")


class FullModel(nn.Module):
    """A classifier whose graph has the tokenizer's outputs as inputs, and one output."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits (rows, labels) from tensors (rows, tokens)."""
        outputs = self.model(**dict(zip(self.names, inputs, strict=True)))
        return outputs.logits  # type: ignore[no-any-return]


class Contenders:
    """Makes contenders of one checkpoint by name; each part is made when it is first needed.

    The full models have the same encoder and no exits. A truncated one stops at one exit, whatever it says; "deeper"
    stops at the next one.

    Args:
        checkpoint: a BADGE checkpoint.
        folder: where graphs of ONNX Runtime go, or lie.
        threads: of torch and of ONNX Runtime; so many batches run side by side, where they do.
        device: where torch runs. On a GPU the full models run as CUDA graphs where ours do.
    """

    def __init__(self, checkpoint: Path, folder: Path, threads: int, device: str = "cpu") -> None:
        self.checkpoint, self.folder, self.threads, self.device = checkpoint, folder, threads, check_device(device)
        self.policies: dict[str, ExitPolicy] = {}  # by engine
        self.truncated_at: dict[str, int] = {}  # by engine: the index of the exit
        self._engines: dict[tuple[str, int], Any] = {}
        torch.set_num_threads(threads)

    @cached_property
    def config(self) -> Any:
        """Of the checkpoint, which takes no loading of it."""
        return BadgeConfig.from_pretrained(self.checkpoint)

    @property
    def max_tokens(self) -> int:
        """How many tokens a row may have."""
        encoder = self.config.encoder_config
        return int(get_adapter(encoder.model_type).max_tokens(encoder))

    @cached_property
    def model(self) -> Any:
        """The checkpoint in PyTorch."""
        return BadgeForSequenceClassification.from_pretrained(self.checkpoint).eval().to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        """Of the encoder."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.checkpoint)

    @cached_property
    def plain(self) -> Any:
        """The encoder under a head of transformers' own, without exits; what it answers is of no account.

        It has a folder of its own: once that is there, a process that runs the full model has no other in its memory.
        """
        from transformers import AutoModelForSequenceClassification

        folder = self.folder / "full"
        if not folder.exists():
            plain = AutoModelForSequenceClassification.from_config(self.config.encoder_config)
            plain.base_model.load_state_dict(self.model.encoder.state_dict(), strict=False)
            plain.save_pretrained(folder)
        return AutoModelForSequenceClassification.from_pretrained(folder).eval().to(self.device)

    def engine(self, name: str, workers: int = 1) -> Any:
        """A model or predictor; several workers have a thread each."""
        key = name, workers
        if key not in self._engines:
            if name == "eager":
                self._engines[key] = self.model
            elif name in COMPILED:
                self._engines[key] = BadgePredictor.from_pretrained(
                    self.checkpoint, engine="compiled", precision=COMPILED[name], device=str(self.device)
                )
            else:
                export = self.folder / f"ours-{name}"
                if not export.exists():
                    export_onnx(self.model, self.tokenizer, export, name)
                threads = self.threads if workers == 1 else 1
                self._engines[key] = BadgePredictor.from_pretrained(export, threads=threads, workers=workers)
        return self._engines[key]

    def encode(self, rows: Any, tensors: str | None) -> Any:
        """Tokens of some rows."""
        columns = [list(rows)] if isinstance(rows[0], str) else [list(column) for column in zip(*rows, strict=True)]
        limit = token_limit(self, self.tokenizer)
        return self.tokenizer(
            *columns, padding=tensors is not None, truncation=True, max_length=limit, return_tensors=tensors
        )

    def run(self, kind: str, engine: str) -> Run:
        """A contender."""
        if kind == "full":
            return self._batches(*self._full(engine, self.threads))
        if kind == "full side by side":
            return self._side_by_side(*self._full(engine, 1))
        if kind == "stream":
            return self._stream(engine, 1)
        if kind == "stream side by side":
            return self._stream(engine, self.threads)
        model = self.engine(engine, self.threads if kind == "parts side by side" else 1)
        tensors = "pt" if engine == "eager" else "np"
        policy = {
            "early exit": lambda: self.policies[engine],
            "parts side by side": lambda: self.policies[engine],
            "truncated": lambda: self._stop_at(self.truncated_at[engine]),
            "deeper": lambda: self._stop_at(min(self.truncated_at[engine] + 1, len(self.config.exit_layers) - 1)),
            "nobody leaves": ExitPolicy,
        }[kind]()
        place = (lambda batch: batch.to(self.device)) if engine == "eager" else (lambda batch: batch)
        return self._batches(lambda batch: model.early_exit_predict(**place(batch), policy=policy), tensors)

    def pipeline(self) -> Run:
        """transformers' own pipeline of the full model."""
        from transformers import pipeline

        classify = pipeline("text-classification", model=self.plain, tokenizer=self.tokenizer, device=self.device)

        def run(texts: Texts, size: int) -> list[float]:
            rows = [t if isinstance(t, str) else {"text": t[0], "text_pair": t[1]} for t in texts]
            seconds = []
            for start in range(0, len(rows), size):
                begin = time.perf_counter()
                classify(rows[start : start + size], batch_size=size, truncation=True)
                seconds.append(time.perf_counter() - begin)
            return seconds

        return run

    def _full(self, engine: str, threads: int) -> tuple[Callable[[Any], Any], str]:
        """What runs a batch, and the kind of tensors that it takes; `threads` are of ONNX Runtime."""
        if engine in ON_PROCESSORS:
            session = self._session(engine, threads)
            return lambda batch: session.run(None, {key: v.astype(np.int64) for key, v in batch.items()}), "np"
        plain = copy.deepcopy(self.plain).bfloat16() if engine == "bf16" else self.plain
        if engine in COMPILED and self.device.type == "cuda":
            return self._in_graphs(plain), "pt"
        if engine in COMPILED:
            plain = torch.compile(plain, dynamic=True)

        def predict(batch: Any) -> Any:
            with torch.no_grad():
                return plain(**batch.to(self.device)).logits.cpu()

        return predict, "pt"

    def _in_graphs(self, plain: Any) -> Callable[[Any], Any]:
        def answer(**batch: Any) -> dict[str, Tensor]:
            return {"logits": plain(**batch).logits}

        graphs = CudaGraphs({"full": answer}, self.device, self.max_tokens, most_positions(plain))

        def predict(batch: Any) -> Any:
            with torch.no_grad():
                return graphs.run("full", dict(batch))["logits"]

        return predict

    def _session(self, precision: str, threads: int) -> Any:
        """The full model in ONNX Runtime; int8 by its own dynamic quantization."""
        runtime = import_onnxruntime()
        path = self.folder / f"full-{precision}.onnx"
        if not path.exists():
            self._export_full(self.folder / "full-fp32.onnx", self.folder / "full-int8.onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def _export_full(self, fp32: Path, int8: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        names = list(self.encode(["a few words", "some more words than that"], "pt"))
        ids = torch.randint(0, 1000, (3, 7))
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        examples = {"input_ids": ids, "attention_mask": mask}
        axes = {0: "rows", 1: "tokens"}
        self.plain.set_attn_implementation("eager")  # faster in ONNX Runtime, as in our export
        torch.onnx.export(
            FullModel(self.plain, names),
            tuple(examples.get(name, torch.zeros_like(ids)) for name in names),
            fp32,
            dynamo=True,
            dynamic_shapes=(tuple(axes for _ in names),),
            input_names=names,
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
        self.plain.set_attn_implementation("sdpa")
        quantize_dynamic(fp32, int8, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul"])

    def _stop_at(self, stop: int) -> ExitPolicy:
        """Everybody leaves at one exit, and none before."""
        thresholds = [None] * stop + [1.0] * (len(self.config.exit_layers) - stop)
        return ExitPolicy(criterion="fixed_depth", threshold=tuple(thresholds))

    def _batches(self, predict: Callable[[Any], Any], tensors: str) -> Run:
        def run(texts: Texts, size: int) -> list[float]:
            seconds = []
            for start in range(0, len(texts), size):
                begin = time.perf_counter()
                predict(self.encode(texts[start : start + size], tensors))
                seconds.append(time.perf_counter() - begin)
            return seconds

        return run

    def _side_by_side(self, predict: Callable[[Any], Any], tensors: str) -> Run:
        """A batch per thread, and the seconds of all."""

        def work(rows: Texts) -> None:
            predict(self.encode(rows, tensors))

        def run(texts: Texts, size: int) -> list[float]:
            begin = time.perf_counter()
            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(work, [texts[start : start + size] for start in range(0, len(texts), size)]))
            return [time.perf_counter() - begin]

        return run

    def _stream(self, engine: str, workers: int) -> Run:
        model, policy = self.engine(engine, workers), self.policies[engine]

        def run(texts: Texts, size: int) -> list[float]:
            begin = time.perf_counter()
            for _ in model.early_exit_stream(texts, size, tokenizer=self.tokenizer, policy=policy):
                pass
            return [time.perf_counter() - begin]

        return run
