"""What CUDA kernels are compiled to, for every generation of GPUs: PTX and, by ptxas and by link-time optimisation, machine code."""

import bisect
import collections
import functools
import importlib.util
import itertools
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import emulated
import pytest
import torch
from cases import LAYOUTS, window
from fastpool.kernels.compile import HERE
from fastpool.kernels.pool import KINDS
from test_pooling import op

import fastpool.functional as F
from fastpool import activations, backend
from fastpool.functional import _pooled, _with_indices

pytestmark = emulated.needs_toolchain

CAPABILITIES = (7, 5), (8, 0), (9, 0), (10, 0)

# What the kernels are launched by: calls of small maps, whose shapes leave no rest of a tile, a warp or a sector.

LAST = "channels_last"
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
THREE, SLID, TWO, NINE = window((3, 3), (2, 2), (1, 1)), window((3, 3), (1, 1), (1, 1)), window((2, 2)), window((9, 9), (1, 1), (4, 4))


def leaf(shape, layout="contiguous", dtype="f32"):
    return LAYOUTS[layout](torch.rand(shape)).to(DTYPES[dtype]).requires_grad_()


def through(y):
    y.backward(torch.ones_like(y))


def pooling(kind, shape, layout="contiguous", windows=THREE, dtype="f32"):
    """``windows`` None: whole maps."""
    return lambda: through(_pooled(leaf(shape, layout, dtype), op(kind, windows, 2), 7))


def called(pool, shape, **more):
    return lambda: through(pool(leaf(shape), **more))


def chosen(shape):
    return lambda: _with_indices(torch.rand(shape), op("max", THREE))


def unpooled(shape, layout="contiguous", dtype="f32"):
    """Of windows whose first element is the largest."""

    def call():
        x = torch.rand(shape)
        x[..., ::2, ::2] += 1
        y, at = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
        through(F.max_unpool2d(LAYOUTS[layout](y).to(DTYPES[dtype]).requires_grad_(), LAYOUTS[layout](at), 2))

    return call


def activated(name, count, dtype="f32"):
    def call():
        f, x, gy = activations.named("test", name), *(torch.rand(count).to(DTYPES[dtype]) for _ in range(2))
        backend.activated(x, f)
        backend.activation_gradient(gy, x, f, False)

    return call


def convolved(shape, weight, layout="contiguous", filled=1, dtype="f32", grad=True, **more):
    """``filled``: blocks that keep a device busy, by which tiles are chosen; 1: the largest of a layer, whose steps no blocks share."""

    def call():
        from fastpool.kernels.cuda import convolution

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(convolution, "on", functools.partial(convolution.Device, filled=filled))
            x, w = leaf(shape, layout, dtype).requires_grad_(grad), torch.rand(weight).to(DTYPES[dtype]).requires_grad_(grad)
            y = F.conv2d(x, w, torch.rand(weight[0]).to(DTYPES[dtype]), padding=weight[2] // 2, **more)
            if grad:
                through(y)

    return call


def conv_pooled(shape, weight, layout="contiguous"):
    def call():
        x = LAYOUTS[layout](torch.rand(shape))
        F.conv_pool2d(x, torch.rand(weight), padding=1, activation="relu", pool="max", kernel_size=2)

    return call


CALLS = {
    **{f"{kind} 3x3 s2, by one": pooling(kind, (2, 4, 16, 34)) for kind in ("max", "avg", "l2", "stochastic")},
    **{f"{kind} 3x3 s2": pooling(kind, (2, 3, 16, 64)) for kind in ("max", "avg", "l2", "stochastic")},
    **{f"{kind} 3x3 s2, channels_last": pooling(kind, (2, 32, 8, 16), LAST) for kind in ("max", "avg", "l2", "stochastic")},
    "max 3x3 s2, by one, channels_last": pooling("max", (2, 30, 8, 16), LAST),
    "max 2x2 s2": pooling("max", (2, 3, 16, 64), windows=TWO),
    "max 2x2 s2, channels_last": pooling("max", (2, 32, 8, 16), LAST, TWO),
    "max 3x3 s1": pooling("max", (2, 3, 8, 64), windows=SLID),
    "max 3x3 s1, channels_last": pooling("max", (2, 32, 8, 8), LAST, SLID),
    "avg 9x9 s1": pooling("avg", (1, 2, 16, 32), windows=NINE),
    "max over bins": called(F.adaptive_max_pool2d, (2, 4, 20, 28), output_size=(8, 16)),
    "avg over bins": called(F.adaptive_avg_pool2d, (2, 4, 20, 28), output_size=(8, 16)),
    "max 3x3 s2 of silu": called(F.max_pool2d, (2, 3, 16, 64), kernel_size=3, stride=2, padding=1, before="silu"),
    "avg 3x3 s2 of relu": called(F.avg_pool2d, (2, 3, 16, 64), kernel_size=3, stride=2, padding=1, before="relu"),
    "positions of max 3x3 s2": chosen((2, 4, 16, 64)),
    **{f"{kind} of maps": pooling(kind, (2, 16, 36, 32), windows=None) for kind in ("max", "avg")},
    **{f"{kind} of small maps": pooling(kind, (2, 16, 8, 8), windows=None) for kind in ("max", "avg", "l2")},
    "avg of 7x7": pooling("avg", (2, 16, 7, 7), windows=None),
    "avg of maps, cropped": pooling("avg", (1, 4, 36, 32), "cropped", None),
    **{f"{kind} of maps, channels_last": pooling(kind, (2, 64, 7, 7), LAST, None) for kind in ("max", "avg")},
    "unpool": unpooled((2, 4, 16, 32)),
    "unpool, channels_last": unpooled((2, 32, 8, 16), LAST),
    **{name: activated(name, 2048) for name in ("relu", "gelu")},
    "relu, by one": activated("relu", 2049),
    **{
        f"conv {name}, {layout}": convolved(*shapes, layout, filled, grad=name != "narrow")
        for layout in ("contiguous", LAST)
        for name, (*shapes, filled) in {
            "wide": ((1, 16, 16, 16), (128, 16, 3, 3), 1),
            "square": ((1, 64, 8, 16), (64, 64, 1, 1), 1),
            "narrow": ((1, 32, 8, 16), (32, 32, 1, 1), 1),
            "small": ((1, 32, 8, 16), (32, 32, 1, 1), 128),
            "divided": ((1, 64, 8, 16), (32, 64, 3, 3), 128),
        }.items()
    },
    **{f"depthwise, {layout}": convolved((2, 32, 8, 16), (32, 1, 3, 3), layout, groups=32) for layout in ("contiguous", LAST)},
    **{f"conv of few, {layout}": convolved((1, 3, 16, 16), (64, 3, 3, 3), layout, grad=False) for layout in ("contiguous", LAST)},
    "conv of few to few": convolved((1, 3, 16, 16), (32, 3, 3, 3), filled=1, grad=False),
    **{f"conv and max, {layout}": conv_pooled((1, 8, 16, 16), (32, 8, 3, 3), layout) for layout in ("contiguous", LAST)},
    # 16 bits: what of each kernel reads and writes them.
    "bf16 max 3x3 s2, by one": pooling("max", (2, 4, 16, 34), dtype="bf16"),
    "f16 avg 3x3 s2": pooling("avg", (2, 4, 16, 64), dtype="f16"),
    "bf16 max 3x3 s2, channels_last": pooling("max", (2, 32, 8, 16), LAST, dtype="bf16"),
    "bf16 avg of maps": pooling("avg", (1, 4, 36, 32), windows=None, dtype="bf16"),
    "f16 max of small maps": pooling("max", (2, 16, 8, 8), windows=None, dtype="f16"),
    "bf16 unpool": unpooled((2, 4, 16, 32), dtype="bf16"),
    "bf16 gelu": activated("gelu", 2048, "bf16"),
    "bf16 conv": convolved((1, 64, 8, 16), (128, 64, 1, 1), dtype="bf16"),
    "f16 conv, channels_last": convolved((1, 64, 8, 16), (64, 64, 1, 1), LAST, dtype="f16"),
    "bf16 conv, divided": convolved((1, 64, 8, 16), (32, 64, 3, 3), filled=128, dtype="bf16", grad=False),
    "bf16 depthwise": convolved((2, 32, 8, 16), (32, 1, 3, 3), groups=32, dtype="bf16"),
}


class Recorder(emulated.Emulator):
    """Launches nothing."""

    def launch(self, kernel, *launched):
        self.launches.append((kernel, launched))


@functools.cache
def kernels(call):
    """Name -> the first kernel of that name which a call launches."""
    with emulated.device(emulator=Recorder((8, 0))) as recorder:
        CALLS[call]()
    return {kernel.name: kernel for kernel, _ in reversed(recorder.launches)}


# Machine code


class Code(NamedTuple):
    """What a kernel came to when it was last looked at, for each of CAPABILITIES."""

    registers: tuple[int, ...]
    """Of a thread, in eights, as a multiprocessor shares them out."""
    instructions: tuple[int, ...]
    loads: str | tuple[str, str]
    """From global memory, "how many x bits" each: one a tap, or 128 bits of a row or of channels.  Of two, the second is of sm_100, for
    which NVVM repeats other loops."""
    stores: str


LONGER, SHORTER = 1.06, 0.85
"""Of its instructions in CODE a kernel may have so many; of fewer than these what it has won would not be held."""
CODE = {
    "windows.forward": {
        "max 3x3 s2, by one": Code((40, 32, 32, 32), (247, 249, 335, 185), "9x32", "1x32 1x8"),
        "avg 3x3 s2, by one": Code((32, 32, 32, 32), (183, 183, 206, 169), "9x32", "1x32"),
        "l2 3x3 s2, by one": Code((32, 32, 32, 32), (202, 199, 228, 197), "9x32", "1x32"),
        "stochastic 3x3 s2, by one": Code((48, 32, 32, 32), (306, 286, 315, 300), "18x32", "1x32 1x8"),
        "max 3x3 s2, by one, channels_last": Code((32, 32, 32, 32), (205, 208, 261, 185), "9x32", "1x32 1x8"),
        "avg 9x9 s1": Code((64, 40, 32, 40), (335, 330, 338, 303), ("35x32", "15x32"), "1x32"),
        "max over bins": Code((48, 40, 40, 40), (316, 314, 331, 447), ("7x32", "15x32"), "1x32 1x8"),
        "avg over bins": Code((48, 48, 40, 64), (437, 433, 474, 649), ("7x32", "31x32"), "1x32"),
        "bf16 max 3x3 s2, by one": Code((40, 32, 24, 32), (262, 263, 361, 200), "9x16", "1x16 1x8"),
    },
    "windows.backward": {
        "max 3x3 s2, by one": Code((24, 32, 32, 24), (102, 110, 125, 104), ("4x32 4x8", "1x32 1x8"), "1x32"),
        "avg 3x3 s2, by one": Code((40, 40, 40, 40), (213, 206, 211, 131), ("4x32", "1x32"), "1x32"),
        "l2 3x3 s2, by one": Code((40, 40, 40, 48), (330, 319, 339, 177), ("9x32", "3x32"), "1x32"),
        "max 3x3 s2, by one, channels_last": Code((24, 32, 32, 24), (113, 122, 143, 111), ("4x32 4x8", "1x32 1x8"), "1x32"),
        "avg 9x9 s1": Code((56, 56, 48, 56), (378, 363, 377, 668), ("7x32", "15x32"), "1x32"),
        "max over bins": Code((48, 40, 40, 32), (694, 695, 720, 1652), ("7x32 7x8", "21x32 21x8"), "1x32"),
        "avg over bins": Code((64, 64, 56, 56), (726, 721, 739, 1379), ("3x32", "6x32"), "1x32"),
        "bf16 max 3x3 s2, by one": Code((24, 24, 32, 24), (112, 120, 134, 111), ("4x16 4x8", "1x16 1x8"), "1x16"),
    },
    "windows.flat_positions": {
        "positions of max 3x3 s2": Code((16, 16, 16, 24), (63, 64, 75, 73), "1x8", "1x64"),
    },
    "wide.forward": {
        "max 3x3 s2": Code((32, 32, 32, 32), (183, 185, 213, 220), "3x128 3x32", "1x64 1x16"),
        "avg 3x3 s2": Code((32, 32, 32, 32), (184, 184, 209, 185), "3x128 3x32", "1x64"),
        "l2 3x3 s2": Code((32, 32, 32, 32), (229, 225, 245, 242), "3x128 3x32", "1x64"),
        "stochastic 3x3 s2": Code((56, 32, 40, 32), (423, 398, 415, 362), "6x128 6x32", "1x64 1x16"),
        "max 3x3 s2, channels_last": Code((56, 40, 40, 40), (294, 296, 318, 327), "9x128", "1x128 1x32"),
        "avg 3x3 s2, channels_last": Code((56, 32, 40, 32), (238, 235, 257, 261), "9x128", "1x128"),
        "stochastic 3x3 s2, channels_last": Code((64, 40, 40, 64), (667, 622, 643, 735), ("12x128", "18x128"), "1x128 1x32"),
        "max 2x2 s2": Code((24, 24, 24, 24), (120, 122, 141, 142), "2x128", "1x64 1x16"),
        "max 3x3 s1": Code((40, 32, 32, 32), (270, 272, 296, 321), "3x128 6x32", "1x128 1x32"),
        "max 3x3 s2 of silu": Code((32, 32, 32, 40), (536, 526, 547, 610), "3x128 3x32", "1x64 1x16"),
        "f16 avg 3x3 s2": Code((32, 24, 32, 32), (207, 203, 241, 205), "3x64 3x16", "1x32"),
        "bf16 max 3x3 s2, channels_last": Code((32, 32, 32, 40), (209, 211, 226, 442), ("3x64", "9x64"), "1x64 1x32"),
    },
    "wide.backward": {
        "max 3x3 s2": Code((32, 32, 32, 32), (153, 158, 172, 178), "2x64 2x32 2x16 2x8", "1x128"),
        "avg 3x3 s2": Code((40, 40, 40, 48), (402, 383, 382, 257), ("2x64 2x32", "1x64 1x32"), "1x128"),
        "l2 3x3 s2": Code((48, 48, 48, 56), (724, 696, 700, 420), ("1x128 4x64 4x32", "1x128 2x64 2x32"), "1x128"),
        "max 3x3 s2, channels_last": Code((32, 32, 32, 32), (187, 188, 205, 129), ("4x128 4x32", "1x128 1x32"), "1x128"),
        "avg 3x3 s2, channels_last": Code((48, 48, 40, 48), (444, 425, 435, 193), ("4x128", "1x128"), "1x128"),
        "max 2x2 s2": Code((16, 16, 16, 16), (77, 78, 90, 92), "1x64 1x16", "1x128"),
        "max 3x3 s1": Code((40, 40, 40, 32), (150, 155, 169, 332), ("1x128 3x32 2x8", "3x128 9x32 6x8"), "1x128"),
        "avg 3x3 s2 of relu": Code((48, 48, 48, 56), (434, 413, 416, 286), ("1x128 2x64 2x32", "1x128 1x64 1x32"), "1x128"),
        "f16 avg 3x3 s2": Code((48, 40, 40, 48), (415, 391, 394, 268), ("2x32 2x16", "1x32 1x16"), "1x64"),
        "bf16 max 3x3 s2, channels_last": Code((24, 24, 32, 32), (227, 230, 246, 160), ("4x64 4x32", "1x64 1x32"), "1x64"),
    },
    "whole_map.forward": {
        "max of maps": Code((24, 24, 32, 32), (301, 290, 303, 320), "8x32", "1x32 1x16"),
        "avg of maps": Code((24, 24, 32, 24), (164, 160, 172, 179), "8x32", "1x32"),
        "max of small maps": Code((24, 24, 32, 32), (201, 199, 210, 222), "8x32", "1x32 1x8"),
        "avg of small maps": Code((24, 24, 32, 24), (134, 130, 137, 144), "8x32", "1x32"),
        "l2 of small maps": Code((24, 24, 32, 24), (148, 144, 153, 158), "8x32", "1x32"),
        "avg of maps, cropped": Code((32, 32, 32, 32), (305, 299, 328, 320), "8x32", "1x32"),
        "max of maps, channels_last": Code((32, 32, 32, 32), (208, 203, 217, 234), "8x32", "1x32 1x8"),
        "avg of maps, channels_last": Code((24, 24, 32, 24), (142, 138, 150, 157), "8x32", "1x32"),
        "bf16 avg of maps": Code((32, 32, 32, 32), (178, 174, 186, 193), "8x16", "1x16"),
        "f16 max of small maps": Code((24, 24, 32, 32), (210, 208, 219, 231), "8x16", "1x16 1x8"),
    },
    "whole_map.backward": {
        "max of maps": Code((16, 16, 16, 16), (45, 48, 57, 56), "1x32 1x16", "1x32"),
        "avg of maps": Code((24, 24, 24, 24), (49, 50, 59, 58), "1x32", "1x32"),
        "l2 of small maps": Code((32, 32, 32, 24), (93, 94, 109, 104), "3x32", "1x32"),
        "max of maps, channels_last": Code((16, 16, 16, 16), (43, 45, 57, 54), "1x32 1x8", "1x32"),
        "bf16 avg of maps": Code((24, 24, 24, 24), (56, 57, 66, 65), "1x16", "1x16"),
    },
    "elementwise.value": {
        "relu": Code((16, 16, 16, 16), (22, 23, 26, 26), "1x128", "1x128"),
        "gelu": Code((40, 32, 32, 32), (209, 210, 213, 213), "1x128", "1x128"),
        "relu, by one": Code((16, 16, 16, 16), (15, 16, 19, 19), "1x32", "1x32"),
        "bf16 gelu": Code((64, 32, 32, 32), (457, 458, 461, 466), "1x128", "1x128"),
    },
    "elementwise.gradient": {
        "relu": Code((24, 24, 24, 24), (24, 25, 29, 29), "2x128", "1x128"),
        "gelu": Code((48, 32, 32, 32), (261, 262, 266, 266), "2x128", "1x128"),
        "relu, by one": Code((16, 16, 16, 16), (17, 18, 22, 22), "2x32", "1x32"),
        "bf16 gelu": Code((64, 40, 40, 32), (565, 566, 580, 583), "2x128", "1x128"),
    },
    "unpool.scatter": {
        "unpool": Code((16, 16, 16, 16), (30, 31, 36, 35), "1x64 1x32", "1x64 1x32"),
        "unpool, channels_last": Code((16, 16, 16, 16), (37, 38, 46, 45), "1x64 1x32", "1x64 1x32"),
        "bf16 unpool": Code((16, 16, 16, 16), (30, 31, 36, 35), "1x64 1x16", "1x64 1x16"),
    },
    "unpool.gather": {
        "unpool": Code((16, 16, 16, 16), (21, 22, 27, 27), "2x32", "1x32"),
        "unpool, channels_last": Code((16, 16, 16, 16), (29, 30, 37, 37), "2x32", "1x32"),
        "bf16 unpool": Code((16, 16, 16, 16), (21, 22, 27, 27), "1x32 1x16", "1x16"),
    },
    "correlate.pack": {
        "conv wide, contiguous": Code((16, 16, 16, 16), (72, 72, 90, 87), "2x32", "1x32"),
        "bf16 conv": Code((16, 16, 16, 16), (74, 74, 92, 89), "2x16", "1x32"),
    },
    "correlate.forward": {
        "conv wide, contiguous": Code((128, 128, 128, 128), (984, 977, 1115, 1077), "1x128 2x64 8x32", "8x128"),
        "conv wide, channels_last": Code((128, 128, 128, 120), (933, 928, 1044, 1035), "3x128 2x64", "8x128"),
        "conv narrow, contiguous": Code((64, 64, 64, 72), (663, 660, 725, 697), "1x128 10x32", "4x128"),
        "conv narrow, channels_last": Code((72, 72, 64, 72), (592, 591, 662, 653), "3x128 2x32", "4x128"),
        "conv small, contiguous": Code((72, 72, 72, 72), (671, 668, 736, 693), "1x128 2x64 8x32", "4x128"),
        "conv small, channels_last": Code((72, 72, 72, 72), (594, 593, 662, 654), "3x128 2x64", "4x128"),
        "conv divided, contiguous": Code((96, 96, 72, 72), (723, 720, 822, 778), "2x64 8x32", "4x128"),
        "conv of few, contiguous": Code((128, 128, 120, 120), (817, 810, 949, 909), "1x128 6x32", "8x128"),
        "conv of few to few": Code((128, 128, 128, 120), (844, 837, 963, 933), "1x128 10x32", "8x128"),
        "conv and max, contiguous": Code((72, 72, 72, 72), (662, 663, 709, 671), "1x128 2x64 8x32", "4x32"),
        "bf16 conv": Code((128, 128, 128, 128), (1192, 1185, 1292, 1276), "1x128 2x64 8x16", "8x64"),
        "f16 conv, channels_last": Code((128, 128, 128, 120), (1001, 964, 1073, 1099), "1x128 4x64", "8x64"),
    },
    "correlate.summed": {
        "conv divided, contiguous": Code((24, 16, 16, 16), (70, 71, 87, 82), "2x32", "1x32"),
        "conv divided, channels_last": Code((16, 16, 16, 16), (69, 70, 87, 82), "2x32", "1x32"),
        "bf16 conv, divided": Code((16, 16, 16, 16), (77, 78, 93, 88), "2x32", "1x16"),
    },
    "weight_gradient.partial": {
        "conv wide, contiguous": Code((128, 128, 128, 128), (982, 976, 1066, 1018), "12x32", "32x32"),
        "conv wide, channels_last": Code((128, 128, 128, 128), (984, 979, 1067, 1019), "12x32", "32x32"),
        "conv square, contiguous": Code((128, 128, 128, 128), (1120, 1115, 1179, 1152), "16x32", "32x32"),
        "conv small, contiguous": Code((80, 80, 72, 80), (690, 691, 742, 718), "12x32", "16x32"),
        "conv small, channels_last": Code((80, 80, 72, 80), (691, 692, 744, 715), "12x32", "16x32"),
        "bf16 conv": Code((128, 128, 128, 128), (991, 993, 1074, 1033), "12x16", "32x32"),
    },
    "weight_gradient.ordered": {
        "conv wide, contiguous": Code((16, 16, 16, 16), (56, 57, 70, 67), "1x32", "1x32"),
        "bf16 conv": Code((16, 16, 16, 16), (62, 63, 76, 73), "1x32", "1x16"),
    },
    "depthwise.forward": {
        "depthwise, contiguous": Code((48, 32, 32, 40), (166, 169, 228, 187), "19x32", "1x32"),
        "depthwise, channels_last": Code((48, 32, 32, 32), (153, 155, 215, 187), "19x32", "1x32"),
        "bf16 depthwise": Code((40, 32, 32, 32), (183, 185, 243, 202), "10x32 9x16", "1x16"),
    },
    "depthwise.weights": {
        "depthwise, contiguous": Code((48, 32, 32, 32), (658, 662, 712, 697), "10x32", "9x32"),
        "depthwise, channels_last": Code((48, 32, 32, 32), (382, 387, 437, 423), "10x32", "9x32"),
        "bf16 depthwise": Code((40, 32, 32, 40), (669, 669, 723, 706), "10x16", "9x32"),
    },
}


def tool(name):
    """ptxas or nvdisasm of the wheels that compiled the PTX: another's may not know its version."""
    spec = importlib.util.find_spec("nvidia")
    for base in spec.submodule_search_locations if spec else ():
        for found in Path(base).glob(f"*/bin/{name}"):
            return str(found)
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not here: pip install 'fastpool[cuda]'")
    return found


def sections(binary):
    """Name -> bytes of a cubin's functions, which is an ELF file: the kernel, and what ptxas made a function of by itself."""
    (table,), (size, count, names) = struct.unpack_from("<Q", binary, 40), struct.unpack_from("<HHH", binary, 58)
    headers = [struct.unpack_from("<II16xQQ", binary, table + i * size) for i in range(count)]
    named = [(headers[names][2] + name, begin, length) for name, _, begin, length in headers]
    named = [(binary[at : binary.index(b"\0", at)].decode(), begin, length) for at, begin, length in named]
    return {name[6:]: binary[begin : begin + length] for name, begin, length in named if name.startswith(".text.")}


class Assembled(NamedTuple):
    said: str
    """By ptxas."""
    code: bytes
    others: list[str]
    """Functions beside the kernel."""


def assembled(source, cc, **options):
    """An ``ObjectCode`` of PTX, or of what is optimised when it is linked, as launch.py has it done: by the ptxas inside nvJitLink."""
    from cuda.core import Linker, LinkerOptions

    linker = Linker(source, options=LinkerOptions(arch=f"sm_{cc[0]}{cc[1]}", ptxas_options=["-v"], **options))
    found = sections(linker.link("cubin").code)
    (kernel,) = (name for name in found if "fastpool" in name and not name.startswith("$"))
    return Assembled(linker.get_info_log(), found.pop(kernel), list(found))


def by_ptxas(text, cc, **options):
    from cuda.core import ObjectCode

    return assembled(ObjectCode.from_ptx(text.encode()), cc, **options)


def by_linking(kernel, cc):
    """The other way from Python to machine code, which numba-cuda takes by default."""
    from cuda.core import ObjectCode
    from fastpool.kernels.cuda.compile import compiling, library

    with compiling():
        return assembled(ObjectCode.from_ltoir(library(kernel).get_ltoir(cc)), cc, link_time_optimization=True)


def disassembled(codes, cc, folder):
    """The names of the instructions of each: nvdisasm takes 0.12 s to begin, and no more for many than for one."""
    (folder / "code").write_bytes(b"".join(codes))
    command = [tool("nvdisasm"), "--no-dataflow", "--binary", f"SM{cc[0]}{cc[1]}", str(folder / "code")]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ends, found = list(itertools.accumulate(map(len, codes))), [[] for _ in codes]
    for at, name in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing, re.MULTILINE):
        if name != "NOP":
            found[bisect.bisect(ends, int(at, 16))].append(name)
    return found


def widths(instructions, name):
    """How many of those that move numbers have how many bits: "3x128 3x32"."""
    bits = [int((re.search(r"\.[US]?(8|16|64|128)\b", i) or ("", 32))[1]) for i in instructions if i.startswith(name)]
    return " ".join(f"{count}x{of}" for of, count in sorted(collections.Counter(bits).items(), reverse=True))


def judged(found, instructions, cc, row):
    """(what is wrong with it, its registers in eights) by its row of CODE."""
    at = CAPABILITIES.index(cc)
    (registers,) = map(int, re.findall(r"Used (\d+) registers", found.said))
    wrong, registers = [], -(-registers // 8) * 8
    if re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", found.said) != [("0",) * 3]:
        wrong.append("stack")
    if any(re.match(r"(LDL|STL|LD|ST)\b", i) for i in instructions):
        wrong.append("local memory")
    if any(re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b", i) or ".F64" in i for i in instructions):
        wrong.append("float64")
    # ptxas's own, of what is rare in a division or a root, and of older GPUs' shuffles: PTX has no call.
    if not all(re.search(r"__cuda_sm\w+_(div_rn|sqrt_rn|rcp_rn|shflsync)_\w+$", other) for other in found.others):
        wrong.append("calls")
    loads = row.loads if isinstance(row.loads, str) else row.loads[cc == CAPABILITIES[-1]]
    wrong += [] if registers <= row.registers[at] else ["registers"]
    wrong += [] if SHORTER * row.instructions[at] <= len(instructions) <= LONGER * row.instructions[at] else ["instructions"]
    wrong += [] if widths(instructions, "LDG") == loads else ["loads"]
    wrong += [] if widths(instructions, "STG") == row.stores else ["stores"]
    return wrong, registers


FACTORIES = [
    f"{path.stem}.{name}"
    for path in (HERE / "cuda").glob("*.py")
    for name in re.findall(r"^@specialised\ndef (\w+)", path.read_text(), re.M)
]


def test_every_kernel_is_looked_at():
    """All factories of kernels/cuda, and those that read or write numbers of 16 bits with these too."""
    assert set(CODE) == set(FACTORIES)
    assert {name for call in CALLS for name in kernels(call)} == set(FACTORIES)
    narrow = {name for name, rows in CODE.items() for call in rows if call.startswith(("bf16", "f16"))}
    assert set(CODE) - narrow == {"windows.flat_positions"}  # of bytes, to indices


@pytest.mark.parametrize("module", sorted({name.partition(".")[0] for name in CODE}))
def test_machine_code(module, tmp_path):
    """No float64, no local memory, no spills, no calls; as many loads and stores as the arithmetic asks for; registers and instructions
    within what they were.  By link-time optimisation too, the first of each factory: the same code, but for a few instructions."""
    found, wrong = collections.defaultdict(dict), []
    for name in (name for name in CODE if name.startswith(f"{module}.")):
        for call in CODE[name]:
            kernel = kernels(call)[name]
            linked = call == next(iter(CODE[name]))
            for cc in CAPABILITIES:
                assert not emulated.costly(kernel, cc), (name, call, cc)
                found[cc][name, call, "ptxas"] = by_ptxas(kernel.ptx(cc), cc)
                if linked:
                    found[cc][name, call, "linked"] = by_linking(kernel, cc)
    for cc, of_cc in found.items():
        for (name, call, route), instructions in zip(of_cc, disassembled([a.code for a in of_cc.values()], cc, tmp_path), strict=True):
            complaints, registers = judged(of_cc[name, call, route], instructions, cc, CODE[name][call])
            if products := tile_of(kernels(call)[name]):
                complaints += multiplied(instructions, products)
            if complaints:
                now = registers, len(instructions), widths(instructions, "LDG"), widths(instructions, "STG")
                wrong.append((name, call, route, cc, complaints, now))
    assert not wrong, "\n".join(map(str, wrong))


def tile_of(kernel):
    from fastpool.kernels.cuda.correlate import Tile

    return next((constant for constant in kernel.constants if isinstance(constant, Tile)), None)


def multiplied(instructions, tile):
    """What is wrong with a tile's step: it is its products and, for each of its rows, loads of 128 bits."""
    loads = [i.replace(".U.", ".") for i in instructions if i.startswith("LDS")]
    wrong = [] if sum(i.startswith("FFMA") for i in instructions) == tile.rows * tile.columns * tile.depth else ["products"]
    return wrong if loads == ["LDS.128"] * (tile.depth * (tile.rows // 4 + 1)) else [*wrong, "loads of shared memory"]


def test_by_the_program_ptxas_too(tmp_path):
    """The tests above have the one inside nvJitLink, as launch.py has; a user may have the other, whose code differs in an instruction."""
    kernel, source, binary = kernels("max 3x3 s2")["wide.forward"], tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    for cc in CAPABILITIES:
        source.write_text(kernel.ptx(cc))
        command = [tool("ptxas"), "-v", "-O3", f"-arch=sm_{cc[0]}{cc[1]}", str(source), "-o", str(binary)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        (code,) = sections(binary.read_bytes()).values()
        complaints, _ = judged(Assembled(said, code, []), *disassembled([code], cc, tmp_path), cc, CODE["wide.forward"]["max 3x3 s2"])
        assert not complaints, cc


def scalars(found):
    """A load of four as four loads."""
    targets, address = found[1].split(", "), found[2]
    return "\n".join(f"ld.global.f32 {target}, [{address}+{4 * k}];" for k, target in enumerate(targets))


STORE = r"(?=st\.global\.v4\.f32\s+\[[^]]*\], *\{(%\w+))"
DOUBLED = "{.reg .f64 d; cvt.f64.f32 d, \\1; mul.f64 d, d, d; cvt.rn.f32.f64 \\1, d;} "
CALLED = "{.param .f32 a; .param .f32 b; st.param.f32 [a], \\1; call (b), other, (a); ld.param.f32 \\1, [b];} "
OTHER = """.func (.param .f32 b) other(.param .f32 a)
{
    .reg .f32 x, y;
    .reg .pred p;
    ld.param.f32 x, [a];
    sin.approx.f32 y, x;
    setp.gt.f32 p, y, 0f00000000;
    @p bra $OUT;
    {.param .f32 c; .param .f32 d; st.param.f32 [c], y; call (d), other, (c); ld.param.f32 y, [d];}
$OUT:
    st.param.f32 [b], y;
    ret;
}
"""
WORSE = {  # what is wrong -> (a change of the PTX, what ptxas is told)
    "": (lambda text: text, {}),
    "loads": (lambda text: re.sub(r"ld\.global\.v4\.f32\s+\{([^}]*)\}, \[([^]+]*)\];", scalars, text), {}),
    "stores": (lambda text: re.sub(STORE, "bar.warp.sync -1; st.global.u32 [%rd1], %r1; ", text, count=1), {}),
    "float64": (lambda text: re.sub(STORE, DOUBLED, text), {}),
    "stack, local memory": (lambda text: text, {"max_register_count": 24}),
    "registers, instructions": (lambda text: text, {"optimization_level": 0}),
    "calls": (lambda text: re.sub(STORE, CALLED, re.sub(r"(?=\.visible)", OTHER, text)), {}),
}


@pytest.mark.parametrize("what", WORSE)
def test_a_kernel_that_got_worse_is_told(what, tmp_path):
    change, options = WORSE[what]
    kernel, cc = kernels("l2 3x3 s2")["wide.backward"], (8, 0)
    found = by_ptxas(change(kernel.ptx(cc)), cc, **options)
    complaints, _ = judged(found, *disassembled([found.code], cc, tmp_path), cc, CODE["wide.backward"]["l2 3x3 s2"])
    assert set(complaints) >= set(filter(None, what.split(", ")))
    assert bool(complaints) == bool(what)


def test_one_front_end_serves_every_capability(monkeypatch):
    from fastpool.kernels.cuda import compile

    monkeypatch.setattr(compile, "directory", lambda: None)
    kernel, before = kernels("max 3x3 s2, by one")["windows.backward"], compile.library.cache_info().misses
    kernel = compile.Kernel(kernel._factory, kernel.constants)  # another may have been asked before
    assert len({re.search(r"\.target (sm_\d+)", kernel.ptx(cc))[1] for cc in CAPABILITIES}) == len(CAPABILITIES)
    assert compile.library.cache_info().misses == before + 1


@pytest.mark.parametrize("cc", [(7, 5), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=lambda cc: f"sm_{cc[0]}{cc[1]}")
def test_the_drivers_side_assembles_for_the_device_it_finds(cc):
    from fastpool.kernels.cuda.compile import capability
    from fastpool.kernels.cuda.launch import entry, machine_code

    text = kernels("max 3x3 s2, by one")["windows.forward"].ptx(capability(cc))
    assert entry(text).encode() in machine_code(text, cc).code


@pytest.mark.parametrize("name", KINDS)
def test_no_double_precision_no_local_memory_no_call(name):
    """In PTX, libdevice's powers and exponentials included: what is a kind's own, in kernels that other tests launch and compile.  Every
    launch of theirs asks too (emulated.py)."""
    kind, recorder = KINDS[name], Recorder((8, 0))
    with emulated.device(emulator=recorder):
        pooling(name, (2, 4, 16, 34))()
        pooling(name, (1, 4, 4, 16), windows=window((2, 5), (2, 1), (1, 2)))()
        pooling(name, (2, 4, 16, 34), dtype="bf16")()
        if kind.combine:
            pooling(name, (2, 16, 8, 8), windows=None)()
    assert len(recorder.launches) == (8 if kind.combine else 6)
    for kernel, _ in recorder.launches:
        assert ".target sm_80" in kernel.ptx((8, 0))
        assert not emulated.costly(kernel, (8, 0)), kernel.name


def test_no_kernel_of_floats_holds_double_precision_calls_or_divisions_of_64_bits():
    """Every launch on the emulator looks for them, in the PTX of whatever a test launches: here in kernels that have one each."""
    from fastpool.kernels.cuda.compile import specialised
    from numba import cuda, types

    bodies = {
        "nothing": lambda x, at: x[at] * types.float32(0.1),
        ".f64": lambda x, at: x[at] * 0.1,
        "div.s64": lambda x, at: x[at // types.int64(x[0])],
    }

    @specialised
    def doubled(dtype, what):
        body = cuda.jit(device=True)(bodies[what])

        def kernel(x):
            at = cuda.grid(1)
            x[at] = body(x, at)

        return kernel, (types.CPointer(getattr(types, dtype)),)

    assert {what: emulated.costly(doubled("float32", what), (8, 0)) for what in bodies} == {
        "nothing": set(), ".f64": {".f64"}, "div.s64": {"div.s64"}
    }  # fmt: skip
    assert emulated.costly(doubled("float64", ".f64"), (8, 0)) == set()
    with emulated.device() as emulator, pytest.raises(AssertionError, match="doubled"):
        emulator.launch(doubled("float32", ".f64"), 1, 32, [0], 0)


def test_parts_of_a_batch(monkeypatch):
    """More elements than one launch counts: several, whose images are numbered on."""
    from fastpool.kernels.cuda import elementwise, pooling

    x = torch.randn(5, 3, 12, 14)
    whole = [_pooled(x, op(kind, THREE), 7) for kind in ("max", "stochastic")]
    monkeypatch.setattr(pooling, "MOST", 2 * 3 * 12 * 14)
    monkeypatch.setattr(elementwise, "MOST", 100)
    pooling.on.cache_clear()
    elementwise.on.cache_clear()
    for kind, expected in zip(("max", "stochastic"), whole, strict=True):
        a = x.clone().requires_grad_()
        with emulated.device() as emulator:
            y = _pooled(a, op(kind, THREE), 7)
            y.sum().backward()
        assert torch.equal(y, expected)
        assert len(emulator.launches) == 6
    with emulated.device() as emulator:
        assert torch.equal(backend.activated(x, activations.named("test", "relu")), x.relu())
    assert len(emulator.launches) == -(-x.numel() // 100)
    pooling.on.cache_clear()
    elementwise.on.cache_clear()


def test_an_import_of_fastpool_touches_no_cuda():
    """torch imports NVIDIA's bindings by itself."""
    asked = "m.startswith(('numba.cuda', 'numba_cuda', 'fastpool.kernels.cuda'))"
    code = f"import sys, fastpool.functional; print([m for m in sys.modules if {asked}])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_operators_have_kernels_for_it():
    """``torch.compile``'s, which take those of the tensors' device."""
    from fastpool import library

    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastpool::")]
    assert len(names) >= 8
    for name, key in itertools.product(names, ("CPU", "CUDA")):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)
    assert library.DEVICES == ("cpu", "cuda")


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastpool.kernels.cuda.pooling", None)
    with pytest.raises(ImportError, match=r"max_pool2d: CUDA kernels need numba-cuda: pip install 'fastpool\[cuda\]'"):
        backend.kernels_for(torch.device("cuda:0"), torch.float32, "max_pool2d", ("float32",))


def test_a_device_that_is_too_old_is_refused():
    from fastpool.kernels.cuda.compile import capability

    assert [capability(cc) for cc in ((7, 5), (8, 9), (9, 0), (12, 0))] == [(7, 5), (8, 0), (9, 0), (10, 0)]
    with pytest.raises(RuntimeError, match=r"need compute capability \(7, 5\) or later, the device has \(7, 0\)"):
        capability((7, 0))
