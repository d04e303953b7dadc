"""Export to ONNX Runtime: the stages of a model, traced one by one."""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn
from transformers.utils.versions import require_version

from transformers_badge.inference.named_stages import LexicalWeights
from transformers_badge.inference.onnx_stages import (
    LEXICAL,
    RENEWED,
    OnnxStages,
    export_files,
    graph_file,
    import_onnxruntime,
)
from transformers_badge.inference.predictor import FORMAT, MANIFEST, digest_file
from transformers_badge.inference.stage_modules import make_stages, unused_sizes
from transformers_badge.model.loss_badge import infer_problem_type


PRECISIONS = ("fp32", "int8")
EXPORT_TOOLS = {"torch": "2.8", "onnx": "1.19", "onnxscript": "0.7"}  # older ones fail at some stage of these models
LARGEST = 2**31 - 1  # bytes of a graph in one file
_TOLERANCE = 1e-4  # between logits of the graphs and of the model, in fp32


def check_export_tools() -> None:
    """See that there is what an export takes.

    Raises:
        ModuleNotFoundError: the extra `onnxruntime` is not installed, or something is older than exports need.
    """
    import_onnxruntime()
    try:
        for name, oldest in EXPORT_TOOLS.items():
            require_version(f"{name}>={oldest}")
    except ImportError as error:
        needs = ", ".join(f"{name} {oldest}" for name, oldest in EXPORT_TOOLS.items())
        raise ModuleNotFoundError(
            f"An export needs {needs} or newer: pip install 'transformers-badge[onnxruntime]'."
        ) from error


def export_onnx(
    model: Any,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    precision: str = "fp32",
    source: str | None = None,
    also: Sequence[Path] = (),
) -> Path:
    """Write a model for ONNX Runtime: its graph, its tokenizer, and the policy that it has.

    In fp32 its logits are compared with the model's before anything is put in place.

    Args:
        model: a `BadgeForSequenceClassification`.
        tokenizer: the tokenizer of its encoder.
        folder: where to; an earlier export there is replaced, whole.
        precision: "fp32", or "int8" for the blocks' weights and activations. For int8 calibrate the export: its exits
            are not quite those of the model, and what was shown of its policy was not shown of them.
        source: the checkpoint's `digest_weights`, to tell later whether the export is still of it.
        also: files that go with it.

    Returns:
        The folder.

    Raises:
        ModuleNotFoundError: the extra `onnxruntime` is not installed, or torch is older than exports need.
        ValueError: an unknown precision, or an encoder of which ONNX Runtime does not give the same answers.
        OSError: the folder holds something else, or cannot be written.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    check_export_tools()
    from transformers_badge.inference.rowwise_int8 import quantize_rowwise

    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise OSError(f"{folder} holds something that is not an export: choose another folder.")
    # Of its own, in fp32, and with attention as ONNX Runtime likes it best.
    ours = copy.deepcopy(model).float().cpu().eval()
    ours.encoder.set_attn_implementation("eager")
    lexical = LexicalWeights.of(ours)
    hashing = None if lexical is None else dict(lexical.hashing)

    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        if lexical is not None:
            save_file(lexical.arrays(), unfinished / LEXICAL)
        graphs = _trace_stages(ours)
        _save_graphs(graphs, unfinished)
        _compare(ours, unfinished, hashing)
        if precision == "int8":
            _save_graphs({stage: quantize_rowwise(graph) for stage, graph in graphs.items()}, unfinished)
        tokenizer.save_pretrained(unfinished)
        for path in also:
            shutil.copy(path, unfinished)
        config = copy.deepcopy(model.config)
        if precision != "fp32":
            config.exit_policy = replace(config.exit_policy, certificate=None)
        # Without the code of a checkpoint, which an export does not have.
        stored = {key: v for key, v in config.to_diff_dict().items() if key not in ("auto_map", "custom_pipelines")}
        (unfinished / "config.json").write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
        files = {name: digest_file(unfinished / name) for name in export_files(ours.exit_layers, lexical is not None)}
        manifest = {
            "format": FORMAT,
            "precision": precision,
            "exit_layers": list(ours.exit_layers),
            "num_labels": ours.num_labels,
            "problem_type": infer_problem_type(ours.config.problem_type, ours.num_labels, None),
            "max_tokens": ours.max_tokens,
            "vocab_size": ours.config.get_text_config().vocab_size,
            "padding_id": ours.padding_id,
            "source": source,
            "lexical": hashing,
            "files": files,
            "digest": hashlib.sha256(" ".join(files.values()).encode()).hexdigest()[:16],
        }
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(unfinished, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


@torch.no_grad()
def _trace_stages(model: Any) -> dict[str, Any]:
    """A graph for every stage, by name.

    What the stage of an exit hands on is what the next is traced with.
    """
    generator, (rows, tokens) = torch.Generator().manual_seed(0), unused_sizes(model)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 1:] = 0
    state: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    if model.config.lexical_exit:
        state["lexical_logits"] = model.exits[0](ids, mask)
    traced = {}
    for name, stage in make_stages(model).items():
        traced[name], outputs = _trace(stage, stage.given(state), {rows: "rows", tokens: "tokens"})
        state.update(outputs)
    return traced


def _trace(stage: nn.Module, inputs: dict[str, Tensor], open_axes: dict[int, str]) -> tuple[Any, dict[str, Tensor]]:
    """The graph of a stage, and what the stage makes of these inputs.

    Args:
        open_axes: the names, by their sizes here, of the axes that are of any size in the graph.
    """

    def name_axes(tensor: Tensor) -> dict[int, str]:
        return {axis: open_axes[size] for axis, size in enumerate(tensor.shape) if size in open_axes}

    outputs: dict[str, Tensor] = stage(**inputs)
    with _quiet():
        program = torch.onnx.export(
            stage,
            kwargs=inputs,
            input_names=list(inputs),
            output_names=[RENEWED + name if name in inputs else name for name in outputs],  # no name twice
            dynamic_shapes={name: name_axes(value) for name, value in inputs.items()},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto, outputs


def _save_graphs(graphs: dict[str, Any], folder: Path) -> None:
    """Write the graph of every stage, by name.

    Raises:
        ValueError: the weights of a stage do not fit into one file.
    """
    import onnx

    for stage, graph in graphs.items():
        size = graph.ByteSize()
        if size > LARGEST:
            raise ValueError(
                f"The weights up to {stage} take {size} bytes, and a graph may have {LARGEST}: export a model with "
                "more exits, or a smaller one."
            )
        onnx.save(graph, folder / graph_file(stage))


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks of its own affairs."""
    import logging
    import warnings

    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@torch.no_grad()
def _compare(model: Any, folder: Path, hashing: dict[str, Any] | None) -> None:
    """See that the graphs answer as the model does, also for other shapes than they were traced with.

    Raises:
        ValueError: they do not.
    """
    stages = OnnxStages(folder, model.exit_layers, model.padding_id, hashing)
    generator = torch.Generator().manual_seed(1)
    for rows, tokens in ((1, 1), (1, 5), (5, 12)):
        ids = torch.randint(0, model.config.get_text_config().vocab_size, (rows, tokens), generator=generator)
        mask = (torch.arange(tokens) < torch.arange(rows)[:, None] + max(tokens - rows, 1)).long()
        expected = model(input_ids=ids, attention_mask=mask).exit_logits.numpy()
        state = stages.embed(stages.begin_padded(ids.numpy(), mask.numpy()))
        for index, layer in enumerate(model.exit_layers):
            state = stages.run_block(layer, state) if layer else state
            difference = float(np.abs(stages.read_exit(index, state) - expected[:, index]).max())
            if not difference <= _TOLERANCE * max(1.0, float(np.abs(expected[:, index]).max())):
                raise ValueError(
                    f"ONNX Runtime answers otherwise than the model: exit {layer} is off by {difference:.2g}. Encoders "
                    f"of type {model.config.encoder_config.model_type!r} cannot be exported with these versions."
                )
