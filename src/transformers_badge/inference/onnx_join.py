"""Many stages in one graph, of which a run does one.

ONNX Runtime gives every session threads and memory of its own, and threads that wait in one session keep those of the
next from working: with two threads, a session per stage took twice as long as the whole model. So the stages are
branches of one graph: `If` runs the one that the input `stage` names, and the others cost nothing.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from transformers_badge.inference.onnx_stages import SEPARATOR, STAGE


LARGEST = 2**31 - 1  # bytes of a graph in one file


def join_stages(stages: Mapping[str, onnx.ModelProto]) -> onnx.ModelProto:
    """One graph of many.

    Args:
        stages: by name. Inputs of the same name are one input; outputs get the name of their stage before their own.

    Returns:
        A graph with one more input, `stage` (): the place of a stage in `stages`. Only that stage's outputs mean
        anything.

    Raises:
        ValueError: the weights do not fit into one file.
    """
    nodes, outputs, constants = [], [], []
    versions: dict[str, int] = {}
    inputs = {STAGE: helper.make_tensor_value_info(STAGE, TensorProto.INT64, [])}
    size = sum(stage.ByteSize() for stage in stages.values())
    if size > LARGEST:
        raise ValueError(f"The weights take {size} bytes, and a graph may have {LARGEST}: export a smaller model.")
    for place, (name, stage) in enumerate(stages.items()):
        for opset in stage.opset_import:
            versions[opset.domain] = max(versions.get(opset.domain, 0), opset.version)
        graph = compose.add_prefix(stage, f"{name}{SEPARATOR}", rename_inputs=False).graph
        for value in graph.input:
            inputs.setdefault(value.name, value)
        # Weights stay outside of the branch, where ONNX Runtime would keep them twice. What it hands on is inside.
        handed_on = {value.name for value in graph.output}
        inside = [constant for constant in graph.initializer if constant.name in handed_on]
        constants += [constant for constant in graph.initializer if constant.name not in handed_on]
        body = helper.make_graph(list(graph.node), name, [], list(graph.output), inside)
        here = [f"place of {name}", f"is {name}"]
        constants.append(numpy_helper.from_array(np.array(place, np.int64), here[0]))
        nodes.append(helper.make_node("Equal", [STAGE, here[0]], [here[1]]))
        names = [value.name for value in graph.output]
        nodes.append(helper.make_node("If", [here[1]], names, then_branch=body, else_branch=_nothing(graph.output)))
        outputs += [_of_any_size(value, value.name) for value in graph.output]
    joined = helper.make_graph(nodes, "stages", list(inputs.values()), outputs, constants)
    opsets = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
    return helper.make_model(joined, opset_imports=opsets, ir_version=next(iter(stages.values())).ir_version)


def _nothing(outputs: Any) -> onnx.GraphProto:
    """What a stage that does not run hands on: arrays of the same types and of no size."""
    nodes, values = [], []
    for value in outputs:
        kind, name = value.type.tensor_type, f"no {value.name}"
        empty = np.zeros([0] * len(kind.shape.dim), helper.tensor_dtype_to_np_dtype(kind.elem_type))
        nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(empty)))
        values.append(_of_any_size(value, name))
    return helper.make_graph(nodes, "nothing", [], values)


def _of_any_size(value: Any, name: str) -> Any:
    kind = value.type.tensor_type
    return helper.make_tensor_value_info(name, kind.elem_type, [None] * len(kind.shape.dim))
