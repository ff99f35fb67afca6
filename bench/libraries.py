"""What the benchmarks share of their peers: their names, whether they are here, and how ONNX Runtime and OpenVINO run a model."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

TITLES = {"torch": "PyTorch", "compile": "torch.compile", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
SHORT = {"torch": "torch", "compile": "comp.", "onnxruntime": "onnxr.", "openvino": "openv."}
"""In the head of a table's column."""

MODULES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}


def missing(names: Sequence[str]) -> dict[str, str]:
    """Which of these peers cannot take part here, and what would help."""
    found = {}
    for name in names:
        try:
            for module in MODULES.get(name, ()):
                importlib.import_module(module)
        except ImportError as error:
            found[name] = f"{error}: pip install 'fastpool[peers]'"
    if "compile" in names:
        try:
            torch.compile(lambda x: x + 1)(torch.ones(8))
        except Exception as error:  # whatever is wrong with the C++ compiler, inductor has its own word for it
            found["compile"] = f"{type(error).__name__}: it needs a C++ compiler"
    return found


def onnx_model(
    operator: str, attributes: Mapping[str, Any], x: Sequence[int], y: Sequence[int], constants: Mapping[str, torch.Tensor] | None = None
) -> bytes:
    """A model of one float32 node, x -> y of these shapes, with constants as its further inputs."""
    return onnx_chain([(operator, attributes, constants or {})], x, y)


def onnx_chain(nodes: Sequence[tuple[str, Mapping[str, Any], Mapping[str, torch.Tensor]]], x: Sequence[int], y: Sequence[int]) -> bytes:
    """A model of nodes, each (operator, attributes, constants) of what the one before it gives."""
    from onnx import TensorProto, helper, numpy_helper

    names = ["x", *(f"x{i}" for i in range(1, len(nodes))), "y"]
    made = [
        helper.make_node(operator, [names[i], *constants], [names[i + 1]], **attributes)
        for i, (operator, attributes, constants) in enumerate(nodes)
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in (("x", x), ("y", y))]
    held = [numpy_helper.from_array(t.numpy(), name) for _, _, constants in nodes for name, t in constants.items()]
    graph = helper.make_graph(made, "layer", ends[:1], ends[1:], held)
    # Opset 18 and IR 9 are what every release since 2023 reads; onnx alone would write its newest.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return model.SerializeToString()


def onnxruntime_call(model: bytes, threads: int, x: torch.Tensor) -> Callable[[], Any]:
    """A model of ``onnx_model``, run on x."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Its threads would go on spinning for a while after a run, on the cores of whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)[0]


def openvino_call(model: Any, threads: int, x: torch.Tensor) -> Callable[[], Any]:
    """The same by OpenVINO; or a model of its own kind."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    core = _openvino_core()
    network = core.read_model(model=model) if isinstance(model, bytes) else model
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))

    def call() -> Any:
        request.infer()
        return request.get_output_tensor().data

    return call


@functools.cache
def _openvino_core() -> Any:
    import openvino

    return openvino.Core()


def as_tensor(result: Any) -> torch.Tensor:
    return torch.from_numpy(result) if isinstance(result, np.ndarray) else result
