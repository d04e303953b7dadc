"""Int8 in which a row's answer is its own: activations are quantized token by token.

ONNX Runtime's own dynamic quantization has one scale for a whole batch, so that what a text is answered depends on the
texts beside it. Here every token has a scale of its own, and every column of a weight. That is no slower, and the
errors are smaller (`benchmarks/engines.py` measures both). Products of whole numbers are exact, whatever their order.
"""

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


ZERO = 128  # what stands for 0 among activations, which are unsigned; weights are signed
_LIMIT = 127.0
# Weights have 7 bits: processors without VNNI add two products of 8 by 8 bits in 16, which 8 bits would overflow.
_WEIGHT_LIMIT = 63.0
_NARROW = 16  # columns; a product with fewer takes less time than quantizing what goes into it


def quantize_rowwise(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with every product of activations and a constant matrix in int8.

    Args:
        model: its weights inside it. Other products (of attention, in exits) stay as they are.

    Returns:
        A new model, for ONNX Runtime: it has an operator of `com.microsoft`.
    """
    graph = model.graph
    weights = {constant.name: constant for constant in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    constants = [
        numpy_helper.from_array(np.array(value, dtype), f"int8.{name}")
        for name, value, dtype in (
            ("zero", ZERO, np.uint8),
            ("one", 1.0, np.float32),
            ("step", 1 / _LIMIT, np.float32),
            ("tiny", 1e-12, np.float32),
            ("last", [-1], np.int64),
        )
    ]
    quantized: dict[str, str] = {}
    for node in graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or len(weight.dims) != 2 or weight.dims[1] < _NARROW:
            nodes.append(node)
            continue
        matrix, activations, name = numpy_helper.to_array(weight), node.input[0], node.output[0]
        if activations not in quantized:
            quantized[activations] = f"int8.{activations}"
            nodes += _quantize_activations(activations, quantized[activations])
        scales = np.maximum(np.abs(matrix).max(axis=0) / _WEIGHT_LIMIT, 1e-12).astype(np.float32)
        constants.append(numpy_helper.from_array(scales / np.float32(_LIMIT), f"{name}.scales"))
        constants.append(numpy_helper.from_array(np.rint(matrix / scales).astype(np.int8), f"{name}.int8"))
        whole = quantized[activations]
        inputs = [whole, f"{name}.int8", "int8.one", f"{name}.scales", "int8.zero"]
        nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, [f"{name}.unscaled"], domain="com.microsoft"))
        nodes.append(helper.make_node("Mul", [f"{name}.unscaled", f"{whole}.most"], [name]))
    read = {name for node in nodes for name in node.input}
    constants = [constant for constant in [*graph.initializer, *constants] if constant.name in read]
    made = helper.make_graph(nodes, graph.name, list(graph.input), list(graph.output), constants)
    opsets = [*model.opset_import, helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=model.ir_version)


def _quantize_activations(name: str, whole: str) -> list[Any]:
    """Nodes from activations (..., width) to uint8 (..., width), `whole`, and the most of a token, (..., 1)."""

    def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> Any:
        return helper.make_node(operator, inputs, [f"{whole}{output}"], **attributes)

    # Passes that each thread can take a part of: QuantizeLinear itself, given a scale per token, runs in one thread.
    return [
        node("Abs", [name], ".size"),
        node("ReduceMax", [f"{whole}.size", "int8.last"], ".largest", keepdims=1),
        node("Max", [f"{whole}.largest", "int8.tiny"], ".most"),
        node("Div", [name, f"{whole}.most"], ".share"),
        node("QuantizeLinear", [f"{whole}.share", "int8.step", "int8.zero"], ""),
    ]
