"""The convolution benchmark's cases, and who takes part: fastpool, PyTorch, torch.compile, ONNX Runtime and OpenVINO."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

import fastpool.functional as fp
from fastpool import convolution

from .conv_layers import Layer, Sizes
from .libraries import LAYOUTS, onnx_model, onnxruntime_call, openvino_call

PASSES = ("forward", "grad_input", "grad_weight")

Call = Callable[[], Any]


class Case(NamedTuple):
    """One row of the benchmark, to be measured."""

    layer: Layer
    batch: int
    layout: str
    a_pass: str
    threads: int

    @property
    def key(self) -> tuple[Any, ...]:
        return self.layer.network, self.layer.name, *self[1:]

    @property
    def input_shape(self) -> Sizes:
        return self.batch, *self.layer[1:4]

    @property
    def output_shape(self) -> Sizes:
        return self.batch, self.layer.out_channels, *self.layer.output_size

    @property
    def result_shape(self) -> Sizes:
        """Of what the pass computes."""
        return {"forward": self.output_shape, "grad_input": self.input_shape, "grad_weight": self.layer.weight_shape}[self.a_pass]

    @property
    def flops(self) -> int:
        """The same in every pass: each output multiplies and adds each tap of its channels, those in the padding too."""
        return 2 * math.prod(self.output_shape) * math.prod(self.layer.weight_shape[1:])

    @property
    def bytes(self) -> int:
        """The fewest, the same in every pass: it reads two of input, weight and output (or their gradients) and writes the third."""
        return 4 * (math.prod(self.input_shape) + math.prod(self.layer.weight_shape) + math.prod(self.output_shape))

    def __str__(self) -> str:
        where = f"{self.layer.network} {self.layer.name}, batch {self.batch}, {self.layout}"
        return f"{where}, {self.a_pass.replace('_', ' ')}, {self.threads} thread{'s' if self.threads > 1 else ''}"


class Operands(NamedTuple):
    x: torch.Tensor
    """(N, C, H, W)"""
    weight: torch.Tensor
    """(OC, C / groups, KH, KW), so that outputs are of x's size"""
    bias: torch.Tensor | None
    """(OC,)"""
    gy: torch.Tensor
    """(N, OC, OH, OW): the gradient given at the output"""


@functools.lru_cache(maxsize=len(LAYOUTS))
def operands(layer: Layer, batch: int, layout: str) -> Operands:
    """Seeded normal values; all in one layout, as a model moved to it has them."""
    case = Case(layer, batch, layout, "forward", 1)
    generator = torch.Generator().manual_seed(0)

    def normal(shape: Sizes) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weight = normal(layer.weight_shape) / math.prod(layer.weight_shape[1:]) ** 0.5
    bias = torch.randn(layer.out_channels, generator=generator) if layer.bias else None
    x, weight, gy = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (normal(case.input_shape), weight, normal(case.output_shape)))
    return Operands(x, weight, bias, gy)


def module(kind: type[torch.nn.Conv2d], case: Case) -> torch.nn.Conv2d:
    """A layer with the case's weights, which ask for no gradient."""
    layer, given = case.layer, operands(case.layer, case.batch, case.layout)
    made = kind(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, groups=layer.groups, bias=layer.bias)
    made.weight = torch.nn.Parameter(given.weight, requires_grad=False)
    if given.bias is not None:
        made.bias = torch.nn.Parameter(given.bias, requires_grad=False)
    return made


def module_call(kind: type[torch.nn.Conv2d], case: Case) -> Call:
    """A module's pass as it is timed: forward without a gradient; or one gradient alone, of an output that is there."""
    made, given = module(kind, case), operands(case.layer, case.batch, case.layout)
    if case.a_pass == "forward":
        return _without_gradient(lambda: made(given.x))
    x = given.x.detach().requires_grad_(case.a_pass == "grad_input")
    made.weight.requires_grad_(case.a_pass == "grad_weight")
    wanted = x if case.a_pass == "grad_input" else made.weight
    y = made(x)
    return lambda: torch.autograd.grad(y, wanted, given.gy, retain_graph=True)[0]


def _without_gradient(call: Call) -> Call:
    def forward() -> Any:
        with torch.no_grad():
            return call()

    return forward


def fastpool_call(case: Case) -> Call:
    """fastpool's layer, which packs its weights once."""
    import fastpool.nn

    return module_call(fastpool.nn.Conv2d, case)


def packing_call(case: Case) -> Call:
    """fastpool's function, which packs the weights in each call: forward."""
    layer, (x, weight, bias, _) = case.layer, operands(case.layer, case.batch, case.layout)
    return _without_gradient(lambda: fp.conv2d(x, weight, bias, layer.stride, layer.padding, 1, layer.groups))


def memory(case: Case) -> tuple[int, int]:
    """Bytes of fastpool's packed weights, and of the panels of all threads, forward."""
    layer = case.layer
    square = ((value,) * 2 for value in (layer.stride, layer.padding, 1))
    return convolution.memory(case.input_shape, layer.weight_shape, *square, layer.groups, case.threads)


def im2col_bytes(layer: Layer) -> int:
    """Of the matrix whose columns are one image's windows, as im2col makes it image by image; none where the image is that matrix."""
    if layer.kernel_size == layer.stride == 1 and not layer.padding:
        return 0
    return 4 * layer.in_channels * layer.kernel_size**2 * math.prod(layer.output_size)


def _torch(case: Case) -> dict[str, Call]:
    """In either layout, whatever the case's: the quicker one counts."""
    return {layout: module_call(torch.nn.Conv2d, case._replace(layout=layout)) for layout in LAYOUTS}


def _compiled(case: Case) -> dict[str, Call] | None:
    """Through inductor, for one shape and number of threads, with weights it may reorder ahead (freezing)."""
    if case.a_pass != "forward":
        return None
    torch._dynamo.reset()  # else the eighth case is one recompilation too many, and runs eagerly
    x = operands(case.layer, case.batch, case.layout).x
    layer = torch.compile(module(torch.nn.Conv2d, case).eval(), dynamic=False, options={"freezing": True})
    return {case.layout: _without_gradient(lambda: layer(x))}


def _onnx(case: Case) -> bytes:
    layer, given = case.layer, operands(case.layer, case.batch, "contiguous")
    attributes = {"strides": [layer.stride] * 2, "pads": [layer.padding] * 4, "group": layer.groups}
    constants = {"w": given.weight} | ({} if given.bias is None else {"b": given.bias})
    return onnx_model("Conv", attributes | {"kernel_shape": [layer.kernel_size] * 2}, case.input_shape, case.output_shape, constants)


def _onnxruntime(case: Case) -> dict[str, Call] | None:
    if case.a_pass != "forward":
        return None
    return {"contiguous": onnxruntime_call(_onnx(case), case.threads, operands(case.layer, case.batch, "contiguous").x)}


def _openvino(case: Case) -> dict[str, Call] | None:
    if case.a_pass != "forward":
        return None
    return {"contiguous": openvino_call(_onnx(case), case.threads, operands(case.layer, case.batch, "contiguous").x)}


PEERS: Mapping[str, Callable[[Case], dict[str, Call] | None]] = {
    "torch": _torch,
    "compile": _compiled,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
"""By name: makes a peer's calls of a case, one a layout it is tried in, or None where it has no such pass.  A call may return a NumPy
array.  Weights are constants, so ONNX Runtime and OpenVINO reorder theirs before the first call; PyTorch does that in every call."""
