"""CUDA graphs: all kernels of a stage launched in one go, since with few tokens a GPU mostly waits for launches.

A graph is of fixed shapes, so that there is one for every bucket of rows and tokens, captured when it is first met.
What fills a bucket up is padding, and is cut off again. All graphs share the memory that they read and write, so that a
stage finds there what the stage before has left, unless rows were dropped or others came between.
"""

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from transformers_badge.inference.named_stages import is_per_token


Tensors = dict[str, Tensor]
Stage = Callable[..., Tensors]
Bucket = tuple[int, int]  # rows and tokens
Key = tuple[str, tuple[int, ...], torch.dtype]  # of memory: a name, and the shape and type of what each position has

# Rows x tokens of a bucket: with more an H100 computes about as long as it would wait, and padding costs.
MOST_POSITIONS = {torch.float32: 2048, torch.bfloat16: 8192}

logger = logging.getLogger(__name__)


def most_positions(encoder: Any) -> int:
    """How large the graphs of an encoder may be.

    0, no graphs, where its attention is plain Python: that copies constants from the CPU, which no graph can, and a
    capture that fails leaves torch's generator of random numbers of no use.
    """
    return 0 if encoder.config._attn_implementation == "eager" else MOST_POSITIONS[encoder.dtype]


def bucket_rows(rows: int) -> int:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ...: so many rows, or the next more."""
    power = 1 << (rows - 1).bit_length()
    between = 3 * power // 4
    return between if power >= 4 and rows <= between else power


def bucket_tokens(tokens: int, most: int) -> int:
    """16, 32, 48, 64, 128, 192, ...: so many tokens, or the next more; never more than `most`, which a model takes."""
    step = 16 if tokens <= 64 else 64
    return min(-(-tokens // step) * step, most)


@dataclass(frozen=True)
class Graph:
    """A stage at one shape.

    Args:
        replay: runs it.
        outputs: where they are then.
    """

    replay: Callable[[], None]
    outputs: Tensors


class CudaGraphs:
    """The stages of a model, run as CUDA graphs.

    Args:
        stages: by name. Each takes tensors by name, (rows, ...) or (rows, tokens, ...), attention_mask among them, and
            makes logits and such tensors as a later stage takes by the same names.
        device: a GPU, which has the weights.
        most_tokens: how many tokens a row may have.
        most_positions: rows x tokens of a graph; stages run without one where there are more.
    """

    def __init__(
        self, stages: Mapping[str, Stage], device: torch.device, most_tokens: int, most_positions: int
    ) -> None:
        self._stages, self._device = stages, device
        self._most_tokens, self._most_positions = most_tokens, most_positions
        self._graphs: dict[tuple[str, Bucket], Graph | None] = {}
        self._memory: dict[Key, Tensor] = {}
        self._buffers: dict[tuple[Key, Bucket], Tensor] = {}  # what of the memory a bucket has
        self._holds: dict[Key, Callable[[], Tensor | None]] = {}  # which tensor lies in it, for its bucket
        self._lock = Lock()
        self._pool: Any = None
        self._capturing: torch.cuda.Stream | None = None
        self._last: torch.cuda.Stream | None = None

    def run(self, stage: str, given: Tensors) -> Tensors:
        """What a stage makes of these, which may lie on the CPU, where the logits will be."""
        rows, tokens = given["attention_mask"].shape
        bucket = bucket_rows(rows), bucket_tokens(tokens, self._most_tokens)
        if bucket[0] * bucket[1] <= self._most_positions:
            with self._lock:
                self._wait_for_last()
                if (stage, bucket) not in self._graphs:
                    self._graphs[stage, bucket] = self._capture(stage, given, bucket)
                graph = self._graphs[stage, bucket]
                if graph is not None:
                    return self._replay(graph, given, bucket)
        made = self._stages[stage](**{name: tensor.to(self._device) for name, tensor in given.items()})
        return {**made, "logits": made["logits"].cpu()}

    def _replay(self, graph: Graph, given: Tensors, bucket: Bucket) -> Tensors:
        for name, tensor in given.items():
            self._fill(name, tensor, bucket)
        graph.replay()
        rows, tokens = given["attention_mask"].shape
        made = {}
        for name, buffer in graph.outputs.items():
            if name != "logits":
                made[name] = _corner(name, buffer, rows, tokens).clone()  # the next graph writes to the buffer
                self._holds[_key(name, buffer)] = weakref.ref(made[name])
        made["logits"] = graph.outputs["logits"][:rows].to("cpu", copy=True)  # the wait for the GPU
        return made

    def _fill(self, name: str, tensor: Tensor, bucket: Bucket) -> Tensor:
        """The buffer of an input, with the tensor in its corner and 0 in the rest of it."""
        key = _key(name, tensor)
        buffer = self._buffer(key, tensor, bucket)
        if key in self._holds and self._holds[key]() is tensor:
            return buffer
        if tensor.shape == buffer.shape:
            buffer.copy_(tensor)
        else:
            _corner(name, buffer.zero_(), *tensor.shape[:2]).copy_(tensor)
        self._holds[key] = weakref.ref(tensor)
        return buffer

    def _buffer(self, key: Key, like: Tensor, bucket: Bucket) -> Tensor:
        """Where such a tensor lies in a bucket: in memory for the largest one, made before the first capture."""
        if (key, bucket) not in self._buffers:  # a view takes as long as a kernel's launch
            name, each, dtype = key
            if key not in self._memory:
                self._memory[key] = torch.zeros(self._most_positions, *each, dtype=dtype, device=self._device)
            filled = bucket if is_per_token(name, like) else bucket[:1]
            self._buffers[key, bucket] = self._memory[key][: prod(filled)].view(*filled, *each)
        return self._buffers[key, bucket]

    def _capture(self, stage: str, given: Tensors, bucket: Bucket) -> Graph | None:
        """The graph of a stage; `None`: it does what cannot be in one."""
        filled = {name: self._fill(name, tensor, bucket) for name, tensor in given.items()}

        def call() -> Tensors:
            outputs = self._stages[stage](**filled)
            for name, tensor in outputs.items():
                if name != "logits":
                    outputs[name] = self._buffer(_key(name, tensor), tensor, bucket).copy_(tensor)
            return outputs

        try:
            return self.capture(call)
        except RuntimeError as error:
            logger.warning("%s runs without CUDA graphs, and slower: %s", stage, str(error).splitlines()[0])
            return None
        finally:
            self._holds.clear()  # the stage has run there

    def capture(self, call: Callable[[], Tensors]) -> Graph:
        """The graph of what a call does.

        Raises:
            RuntimeError: it does what cannot be in a graph.
        """
        if self._capturing is None:  # one for all, since every stream keeps what is allocated on it to itself
            self._pool, self._capturing = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
        stream, graph = self._capturing, torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # the libraries choose their kernels, and allocate what they need
                call()
            # Not torch.cuda.graph, which empties caches every time.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = call()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return Graph(graph.replay, outputs)

    def _wait_for_last(self) -> None:
        """A graph must not start before the last has ended, whose memory it shares: those of one stream take turns."""
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream


def _key(name: str, tensor: Tensor) -> Key:
    return name, tuple(tensor.shape[2 if is_per_token(name, tensor) else 1 :]), tensor.dtype


def _corner(name: str, tensor: Tensor, rows: int, tokens: int) -> Tensor:
    """What belongs to the first rows and tokens."""
    return tensor[:rows, :tokens] if is_per_token(name, tensor) else tensor[:rows]
