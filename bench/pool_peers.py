"""The pooling benchmark's cases, and who takes part: fastpool, PyTorch, torch.compile, ONNX Runtime and OpenVINO."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import fastpool.functional as fp
from fastpool.window import Window, window

Sizes = tuple[int, int, int, int]
Layer = Callable[[torch.Tensor], torch.Tensor]
"""(N, C, H, W) -> (N, C, OH, OW)"""

SHAPES = ("8x64x112x112", "8x256x56x56", "32x64x32x32", "8x512x14x14", "64x512x7x7", "1x3x224x224", "1x16x3000x2000")
QUICK_SHAPES = ("8x64x112x112", "8x512x14x14")


def _window(kernel_size: int | tuple[int, int], stride: int, padding: int = 0) -> Window:
    return window("bench", kernel_size, stride, padding, 1, False)


WINDOWS: dict[str, Window | None] = {
    "2x2 s2": _window(2, 2),
    "3x3 s2 p1": _window(3, 2, 1),
    "3x3 s1 p1": _window(3, 1, 1),
    "2x2 s1": _window(2, 1),
    "3x2 s2": _window((3, 2), 2),
    **{f"{k}x{k} s1 p{k // 2}": _window(k, 1, k // 2) for k in (5, 9, 13)},
    "global": None,
}
QUICK_WINDOWS = ("2x2 s2", "3x3 s2 p1", "global")

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PASSES = ("forward", "training")

KINDS = {
    "max": "max",
    "min": "min",
    "avg": "avg",
    "l2": "l2",
    "stochastic": "stochastic",
    "stochastic_eval": "stochastic_mean",
    "global_max": "max",
    "global_min": "min",
    "global_avg": "avg",
    "global_l2": "l2",
}
"""Each kind of the benchmark, and the arithmetic (fastpool.kernels.pool.KINDS) that fastpool runs it with."""


class Case(NamedTuple):
    """One row of the benchmark, to be measured."""

    shape: Sizes
    kind: str
    window: str
    layout: str
    a_pass: str
    threads: int

    def __str__(self) -> str:
        where = f"{self.kind} {'' if self.window == 'global' else f'{self.window} '}on {shape_name(self.shape)}, {self.layout}"
        return f"{where}, {self.a_pass}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def shape_name(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def fits(w: Window | None, shape: Sizes) -> bool:
    return w is None or all(size + 2 * p >= k for size, p, k in zip(shape[2:], w.padding, w.kernel_size, strict=True))


def _torch_l2(x: torch.Tensor, w: Window) -> torch.Tensor:
    (above, left) = w.padding
    padded = F.pad(x, (left, left, above, above)) if above or left else x
    return F.lp_pool2d(padded, 2, w.kernel_size, w.stride)


def _torch_stochastic(x: torch.Tensor, w: Window) -> torch.Tensor:
    """As bench/peers.py has it, for windows that need not be square."""
    n, channels, height, width = x.shape
    weights = F.unfold(x, w.kernel_size, padding=w.padding, stride=w.stride).unflatten(1, (channels, -1))
    weights = weights.clamp(min=0).transpose(2, 3).contiguous()
    below = weights.cumsum(-1)
    total = below[..., -1:]
    chosen = torch.searchsorted(below, torch.rand(total.shape) * total, right=True).clamp(max=weights.shape[-1] - 1)
    return weights.gather(-1, chosen).reshape(n, channels, *w.output_size(height, width))


def _torch_stochastic_eval(x: torch.Tensor, w: Window) -> torch.Tensor:
    weights = x.relu()
    means = (F.avg_pool2d(v, w.kernel_size, w.stride, w.padding) for v in (weights * weights, weights))
    return next(means) / next(means).clamp(min=torch.finfo(x.dtype).tiny)


_Form = Callable[[torch.Tensor, Any], torch.Tensor]

TORCH: dict[str, _Form] = {
    "max": lambda x, w: F.max_pool2d(x, w.kernel_size, w.stride, w.padding),
    "min": lambda x, w: -F.max_pool2d(-x, w.kernel_size, w.stride, w.padding),
    "avg": lambda x, w: F.avg_pool2d(x, w.kernel_size, w.stride, w.padding),
    "l2": _torch_l2,
    "stochastic": _torch_stochastic,
    "stochastic_eval": _torch_stochastic_eval,
    "global_max": lambda x, _: F.adaptive_max_pool2d(x, 1),
    "global_min": lambda x, _: -F.adaptive_max_pool2d(-x, 1),
    "global_avg": lambda x, _: F.adaptive_avg_pool2d(x, 1),
    "global_l2": lambda x, _: torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True),
}

FASTPOOL: dict[str, _Form] = {
    "max": lambda x, w: fp.max_pool2d(x, w.kernel_size, w.stride, w.padding),
    "min": lambda x, w: fp.min_pool2d(x, w.kernel_size, w.stride, w.padding),
    "avg": lambda x, w: fp.avg_pool2d(x, w.kernel_size, w.stride, w.padding),
    "l2": lambda x, w: fp.l2_pool2d(x, w.kernel_size, w.stride, w.padding),
    "stochastic": lambda x, w: fp.stochastic_pool2d(x, w.kernel_size, w.stride, w.padding),
    "stochastic_eval": lambda x, w: fp.stochastic_pool2d(x, w.kernel_size, w.stride, w.padding, training=False),
    "global_max": lambda x, _: fp.global_max_pool2d(x),
    "global_min": lambda x, _: fp.global_min_pool2d(x),
    "global_avg": lambda x, _: fp.global_avg_pool2d(x),
    "global_l2": lambda x, _: fp.global_l2_pool2d(x),
}

UNFOLDED = 2**29
"""Bytes: where the windows that PyTorch's stochastic pooling gathers take more, it is left out: its temporaries take six times that."""


def layer(forms: Mapping[str, _Form], case: Case) -> Layer:
    form, w = forms[case.kind], WINDOWS[case.window]
    return lambda x: form(x, w)


def _torch_layer(case: Case, _: torch.Tensor) -> Layer | None:
    n, channels, height, width = case.shape
    w = WINDOWS[case.window]
    if case.kind == "stochastic" and w is not None:
        outputs = n * channels * w.output_size(height, width)[0] * w.output_size(height, width)[1]
        if 4 * w.taps * outputs > UNFOLDED:
            return None
    return layer(TORCH, case)


def _compiled(case: Case, _: torch.Tensor) -> Layer | None:
    """PyTorch's form through inductor, for one shape and number of threads; its generator's stochastic pooling is left to eager."""
    if case.a_pass != "forward" or case.kind == "stochastic":
        return None
    torch._dynamo.reset()  # else the eighth case is one recompilation too many, and runs eagerly
    return torch.compile(layer(TORCH, case), dynamic=False)


_ONNX: dict[str, tuple[str, dict[str, Any]]] = {
    "max": ("MaxPool", {}),
    "avg": ("AveragePool", {"count_include_pad": 1}),
    "l2": ("LpPool", {"p": 2}),
    "global_max": ("GlobalMaxPool", {}),
    "global_avg": ("GlobalAveragePool", {}),
    "global_l2": ("GlobalLpPool", {"p": 2}),
}


def _onnx(case: Case) -> bytes | None:
    """A model of one node, x -> y, or None where ONNX Runtime and OpenVINO have no such pooling, layout or pass."""
    if case.a_pass != "forward" or case.layout != "contiguous" or case.kind not in _ONNX:
        return None
    from onnx import TensorProto, helper

    operator, attributes = _ONNX[case.kind]
    w, out = WINDOWS[case.window], (1, 1)
    if w is not None:
        attributes = {**attributes, "kernel_shape": list(w.kernel_size), "strides": list(w.stride), "pads": [*w.padding, *w.padding]}
        out = w.output_size(*case.shape[2:])
    node = helper.make_node(operator, ["x"], ["y"], **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(case.shape))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [*case.shape[:2], *out])
    graph = helper.make_graph([node], "pool", [x], [y])
    # Opset 18 and IR 9 are what every release since 2023 reads; onnx alone would write its newest.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return model.SerializeToString()


def _onnxruntime(case: Case, x: torch.Tensor) -> Layer | None:
    model = _onnx(case)
    if model is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    # Its threads would go on spinning for a while after a run, on the cores of whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda _: session.run(None, feed)[0]


def _openvino(case: Case, x: torch.Tensor) -> Layer | None:
    model = _onnx(case)
    if model is None or case.kind == "l2":  # its reader of ONNX knows no LpPool
        return None
    import openvino

    settings = {"INFERENCE_NUM_THREADS": case.threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    core = _openvino_core()
    request = core.compile_model(core.read_model(model=model), "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))

    def call(_: torch.Tensor) -> Any:
        request.infer()
        return request.get_output_tensor().data

    return call


@functools.cache
def _openvino_core() -> Any:
    import openvino

    return openvino.Core()


PEERS: dict[str, Callable[[Case, torch.Tensor], Layer | None]] = {
    "torch": _torch_layer,
    "compile": _compiled,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
"""By name: makes a peer's layer for a case and its input, or None where it has none.  A layer may return a NumPy array."""

TITLES = {"torch": "PyTorch", "compile": "torch.compile", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}

_MODULES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}


def missing(names: Sequence[str]) -> dict[str, str]:
    """Which of these peers cannot take part here, and what would help."""
    found = {}
    for name in names:
        try:
            for module in _MODULES.get(name, ()):
                importlib.import_module(module)
        except ImportError as error:
            found[name] = f"{error}: pip install 'fastpool[peers]'"
    if "compile" in names:
        try:
            torch.compile(lambda x: x + 1)(torch.ones(8))
        except Exception as error:  # whatever is wrong with the C++ compiler, inductor has its own word for it
            found["compile"] = f"{type(error).__name__}: it needs a C++ compiler"
    return found


def as_tensor(result: Any) -> torch.Tensor:
    return torch.from_numpy(result) if isinstance(result, np.ndarray) else result
