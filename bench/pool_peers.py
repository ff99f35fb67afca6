"""The pooling benchmark's cases, and who takes part: fastpool, PyTorch, torch.compile, ONNX Runtime and OpenVINO."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import fastpool.functional as fp

from .libraries import onnx_model, onnxruntime_call, openvino_call

Sizes = tuple[int, int, int, int]
Pair = tuple[int, int]
Layer = Callable[[torch.Tensor], torch.Tensor]
"""(N, C, H, W) -> (N, C, OH, OW)"""


class Sliding(NamedTuple):
    """A window that moves by its stride; each of (height, width)."""

    kernel_size: Pair
    stride: Pair
    padding: Pair = (0, 0)

    def output_size(self, height: int, width: int) -> Pair:
        outputs = [(size + 2 * p - k) // s + 1 for size, k, s, p in zip((height, width), *self, strict=True)]
        return outputs[0], outputs[1]

    def taps(self, height: int, width: int) -> int:
        return math.prod(self.kernel_size)

    def fits(self, height: int, width: int) -> bool:
        return all(size + 2 * p >= k for size, k, p in zip((height, width), self.kernel_size, self.padding, strict=True))


class Adaptive(NamedTuple):
    """As many windows as outputs are asked for, whatever the map's size: torch's rule of bins."""

    outputs: Pair

    def output_size(self, height: int, width: int) -> Pair:
        return self.outputs

    def taps(self, height: int, width: int) -> int:
        """Of the largest bin."""
        return math.prod(
            max(-((i + 1) * -size // outputs) - i * size // outputs for i in range(outputs))
            for size, outputs in zip((height, width), self.outputs, strict=True)
        )

    def fits(self, height: int, width: int) -> bool:
        return True


def _square(kernel_size: int, stride: int, padding: int = 0) -> Sliding:
    return Sliding((kernel_size,) * 2, (stride,) * 2, (padding,) * 2)


TINY = "1x8x8x8"
"""Of this map not the kernels are timed but the call: the public function, with and without a gradient asked for."""

SHAPES = (TINY, "8x64x112x112", "8x256x56x56", "32x64x32x32", "8x512x14x14", "64x512x7x7", "1x3x224x224", "1x16x3000x2000")
QUICK_SHAPES = (TINY, "8x64x112x112", "8x512x14x14")

WINDOWS: dict[str, Sliding | Adaptive] = {
    "2x2 s2": _square(2, 2),
    "3x3 s2 p1": _square(3, 2, 1),
    "3x3 s1 p1": _square(3, 1, 1),
    "2x2 s1": _square(2, 1),
    "3x2 s2": Sliding((3, 2), (2, 2)),
    **{f"{k}x{k} s1 p{k // 2}": _square(k, 1, k // 2) for k in (5, 9, 13, 21, 31)},
    "global": Adaptive((1, 1)),
    "to 7x7": Adaptive((7, 7)),
    "to 1x1": Adaptive((1, 1)),
}
COMMON_WINDOWS = ("2x2 s2", "3x3 s2 p1")
QUICK_WINDOWS = (*COMMON_WINDOWS, "global", "to 7x7")

GROWTH_WINDOWS = ("21x21 s1 p10", "31x31 s1 p15")
GROWTH_SHAPE = "8x256x56x56"
GROWTH_KINDS = ("max", "min", "avg", "l2", "stochastic_eval")
"""Windows that ask one question, whether time grows with the window, on one map, of kinds that need not: a draw reads its window."""

PASSES = ("forward", "training")
CALLS = ("call", "call_grad")
"""Passes over TINY: without and with a gradient asked for, forward both."""

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
    "adaptive_max": "max",
    "adaptive_min": "min",
    "adaptive_avg": "avg",
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

    @property
    def key(self) -> tuple[Any, ...]:
        return (shape_name(self.shape), *self[1:])

    @property
    def taps(self) -> int:
        return WINDOWS[self.window].taps(*self.shape[2:])

    @property
    def output_shape(self) -> Sizes:
        return (*self.shape[:2], *WINDOWS[self.window].output_size(*self.shape[2:]))

    def __str__(self) -> str:
        where = f"{self.kind} {'' if self.window == 'global' else f'{self.window} '}on {shape_name(self.shape)}, {self.layout}"
        return f"{where}, {self.a_pass.replace('_', ' with ')}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def shape_name(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def sizes(name: str) -> Sizes:
    """'8x64x112x112' -> (8, 64, 112, 112)"""
    n, channels, height, width = map(int, name.split("x"))
    return n, channels, height, width


def exists(kind: str, name: str, shape: Sizes) -> bool:
    """Whether the kind has this window, and the map a place for it."""
    family = {"global": "global", "to": "adaptive"}.get(name.partition(" ")[0], "")
    of_kind = kind.partition("_")[0]
    return family == (of_kind if of_kind in ("global", "adaptive") else "") and WINDOWS[name].fits(*shape[2:])


def _torch_l2(x: torch.Tensor, w: Sliding) -> torch.Tensor:
    (above, left) = w.padding
    padded = F.pad(x, (left, left, above, above)) if above or left else x
    return F.lp_pool2d(padded, 2, w.kernel_size, w.stride)


def _torch_stochastic(x: torch.Tensor, w: Sliding) -> torch.Tensor:
    """As bench/peers.py has it, for windows that need not be square."""
    n, channels, height, width = x.shape
    weights = F.unfold(x, w.kernel_size, padding=w.padding, stride=w.stride).unflatten(1, (channels, -1))
    weights = weights.clamp(min=0).transpose(2, 3).contiguous()
    below = weights.cumsum(-1)
    total = below[..., -1:]
    chosen = torch.searchsorted(below, torch.rand(total.shape) * total, right=True).clamp(max=weights.shape[-1] - 1)
    return weights.gather(-1, chosen).reshape(n, channels, *w.output_size(height, width))


def _torch_stochastic_eval(x: torch.Tensor, w: Sliding) -> torch.Tensor:
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
    "adaptive_max": lambda x, w: F.adaptive_max_pool2d(x, w.outputs),
    "adaptive_min": lambda x, w: -F.adaptive_max_pool2d(-x, w.outputs),
    "adaptive_avg": lambda x, w: F.adaptive_avg_pool2d(x, w.outputs),
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
    "adaptive_max": lambda x, w: fp.adaptive_max_pool2d(x, w.outputs),
    "adaptive_min": lambda x, w: fp.adaptive_min_pool2d(x, w.outputs),
    "adaptive_avg": lambda x, w: fp.adaptive_avg_pool2d(x, w.outputs),
}

TINY_CALLS: dict[tuple[str, str], dict[str, Callable[[torch.Tensor], Callable[[], torch.Tensor]]]] = {
    ("max", "2x2 s2"): {"torch": lambda x: partial(F.max_pool2d, x, 2, 2), "fastpool": lambda x: partial(fp.max_pool2d, x, 2, 2)},
    ("avg", "2x2 s2"): {"torch": lambda x: partial(F.avg_pool2d, x, 2, 2), "fastpool": lambda x: partial(fp.avg_pool2d, x, 2, 2)},
    ("global_max", "global"): {
        "torch": lambda x: partial(F.adaptive_max_pool2d, x, 1),
        "fastpool": lambda x: partial(fp.global_max_pool2d, x),
    },
    ("global_avg", "global"): {
        "torch": lambda x: partial(F.adaptive_avg_pool2d, x, 1),
        "fastpool": lambda x: partial(fp.global_avg_pool2d, x),
    },
}
"""Of poolings that are one function in torch, too: the bare call, without the frames of ``layer``."""

UNFOLDED = 2**29
"""Bytes: where the windows that PyTorch's stochastic pooling gathers take more, it is left out: its temporaries take six times that."""


def layer(forms: Mapping[str, _Form], case: Case) -> Layer:
    form, w = forms[case.kind], WINDOWS[case.window]
    return lambda x: form(x, w)


def _torch_layer(case: Case, _: torch.Tensor) -> Layer | None:
    if case.window in GROWTH_WINDOWS or (case.kind == "stochastic" and 4 * case.taps * math.prod(case.output_shape) > UNFOLDED):
        return None
    return layer(TORCH, case)


COMPILED = {
    "shapes": ("8x64x112x112", "8x512x14x14"),
    "windows": (*COMMON_WINDOWS, "global"),
    "kinds": ("max", "avg", "global_max", "global_avg"),
}
"""Where torch.compile takes part unless it is asked for by name: it compiles for about ten seconds a case."""

INLINED = 25
"""Taps: larger windows are left to PyTorch's own kernels by torch.compile (torch/_inductor/lowering.py), so nothing would be compared."""


def takes_part(peer: str, case: Case, asked: bool) -> bool:
    """Whether a peer is timed in a case: torch.compile in COMPILED, or wherever it is ``asked`` for."""
    chosen = shape_name(case.shape) in COMPILED["shapes"] and case.window in COMPILED["windows"] and case.kind in COMPILED["kinds"]
    return peer != "compile" or asked or chosen


def _compiled(case: Case, _: torch.Tensor) -> Layer | None:
    """PyTorch's form through inductor, for one shape and number of threads; its generator's stochastic pooling is left to eager."""
    if case.a_pass != "forward" or case.kind == "stochastic" or (isinstance(WINDOWS[case.window], Sliding) and case.taps > INLINED):
        return None
    torch._dynamo.reset()  # else the eighth case is one recompilation too many, and runs eagerly
    return torch.compile(layer(TORCH, case), dynamic=False)


_ONNX: dict[str, tuple[str, dict[str, Any]]] = {
    "max": ("MaxPool", {}),
    "avg": ("AveragePool", {"count_include_pad": 1}),
    "l2": ("LpPool", {"p": 2}),
}


def _onnx_node(case: Case) -> tuple[str, dict[str, Any]] | None:
    """An operator and its attributes, or None where ONNX has no such pooling, or only one whose bins overlap."""
    arithmetic = KINDS[case.kind]
    if arithmetic not in _ONNX:
        return None
    operator, attributes = _ONNX[arithmetic]
    w, spatial = WINDOWS[case.window], case.shape[2:]
    if isinstance(w, Sliding):
        return operator, attributes | {"kernel_shape": w.kernel_size, "strides": w.stride, "pads": [*w.padding, *w.padding]}
    if w.outputs == (1, 1):
        return f"Global{operator}", {name: value for name, value in attributes.items() if name == "p"}
    steps = [size // outputs for size, outputs in zip(spatial, w.outputs, strict=True)]
    if any(size % outputs for size, outputs in zip(spatial, w.outputs, strict=True)):
        return None
    return operator, {"kernel_shape": steps, "strides": steps}


def _onnx(case: Case) -> bytes | None:
    """A model of one node, x -> y, or None where ONNX Runtime and OpenVINO have no such pooling, layout or pass."""
    if case.a_pass != "forward" or case.layout != "contiguous" or (pooling := _onnx_node(case)) is None:
        return None
    return onnx_model(*pooling, case.shape, case.output_shape)


def _onnxruntime(case: Case, x: torch.Tensor) -> Layer | None:
    model = _onnx(case)
    if model is None:
        return None
    call = onnxruntime_call(model, case.threads, x)
    return lambda _: call()


def _openvino_adaptive(case: Case) -> Any:
    """A model by OpenVINO's own operators: it has adaptive pooling, ONNX has none."""
    import openvino
    from openvino import opset8

    x = opset8.parameter(list(case.shape), np.float32)
    sizes = opset8.constant(np.array(case.output_shape[2:], np.int64))
    pooled = opset8.adaptive_avg_pool(x, sizes) if case.kind == "adaptive_avg" else opset8.adaptive_max_pool(x, sizes, "i32")
    return openvino.Model([pooled.output(0)], [x], "pool")


def _openvino(case: Case, x: torch.Tensor) -> Layer | None:
    adaptive = case.kind in ("adaptive_max", "adaptive_avg") and case.a_pass == "forward" and case.layout == "contiguous"
    model = None if adaptive else _onnx(case)
    if not adaptive and (model is None or case.kind == "l2"):  # its reader of ONNX knows no LpPool
        return None
    call = openvino_call(_openvino_adaptive(case) if adaptive else model, case.threads, x)
    return lambda _: call()


PEERS: dict[str, Callable[[Case, torch.Tensor], Layer | None]] = {
    "torch": _torch_layer,
    "compile": _compiled,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
"""By name: makes a peer's layer for a case and its input, or None where it has none.  A layer may return a NumPy array."""
