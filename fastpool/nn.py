"""Pooling modules: torch.nn's own classes with fastpool's forward where torch has one, so that isinstance, repr, state_dict and
constructors are torch's; and the ones torch lacks.

Shapes, dtypes, layouts and errors: see ``fastpool.functional``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import functional as F

__all__ = [
    "AvgPool2d",
    "GlobalAvgPool2d",
    "GlobalL2Pool2d",
    "GlobalMaxPool2d",
    "GlobalMinPool2d",
    "L2Pool2d",
    "LPPool2d",
    "MaxPool2d",
    "MinPool2d",
    "StochasticPool2d",
]


class MaxPool2d(nn.MaxPool2d):
    """torch.nn.MaxPool2d by ``fastpool.functional.max_pool2d``."""

    def forward(self, input: torch.Tensor) -> Any:
        return F.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class MinPool2d(nn.MaxPool2d):
    """torch.nn.MaxPool2d's arguments, ``fastpool.functional.min_pool2d``."""

    def forward(self, input: torch.Tensor) -> Any:
        return F.min_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class AvgPool2d(nn.AvgPool2d):
    """torch.nn.AvgPool2d by ``fastpool.functional.avg_pool2d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad, self.divisor_override
        )


class LPPool2d(nn.LPPool2d):
    """torch.nn.LPPool2d by ``fastpool.functional.lp_pool2d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.lp_pool2d(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


class _WindowPool2d(nn.Module):
    """kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False."""

    def __init__(self, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride if stride is not None else kernel_size
        self.padding = padding
        self.dilation = dilation
        self.ceil_mode = ceil_mode

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
            f", dilation={self.dilation}, ceil_mode={self.ceil_mode}"
        )


class L2Pool2d(_WindowPool2d):
    """The Euclidean norm of each window: ``fastpool.functional.l2_pool2d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.l2_pool2d(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)


class StochasticPool2d(_WindowPool2d):
    """A random element of each window while training, its expectation in evaluation: ``fastpool.functional.stochastic_pool2d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.stochastic_pool2d(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.training)


class _GlobalPool2d(nn.Module):
    """keepdim=True: (N, C, 1, 1); False: (N, C)."""

    def __init__(self, keepdim: bool = True) -> None:
        super().__init__()
        self.keepdim = keepdim

    def extra_repr(self) -> str:
        return f"keepdim={self.keepdim}"


class GlobalMaxPool2d(_GlobalPool2d):
    """``fastpool.functional.global_max_pool2d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.global_max_pool2d(input, self.keepdim)


class GlobalAvgPool2d(_GlobalPool2d):
    """``fastpool.functional.global_avg_pool2d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.global_avg_pool2d(input, self.keepdim)


class GlobalMinPool2d(_GlobalPool2d):
    """``fastpool.functional.global_min_pool2d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.global_min_pool2d(input, self.keepdim)


class GlobalL2Pool2d(_GlobalPool2d):
    """``fastpool.functional.global_l2_pool2d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.global_l2_pool2d(input, self.keepdim)
