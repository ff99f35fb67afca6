"""Each pooling as PyTorch's users write it, and as fastpool has it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import fastpool.functional as fp

from .cases import Window

Pool = Callable[..., torch.Tensor]
"""(x, window, generator): (N, C, H, W) -> (N, C, OH, OW); global poolings ignore the window, all but stochastic pooling the generator.
fastpool's take ``before`` and ``after``, activations by name."""


def unfolded(x: torch.Tensor, window: Window) -> torch.Tensor:
    """Windows of x, (N, C, H, W) -> (N, C, kernel_size ** 2, OH * OW); padding is 0."""
    taps = F.unfold(x, window.kernel_size, padding=window.padding, stride=window.stride)
    return taps.unflatten(1, (x.shape[1], window.kernel_size**2))


def output_shape(x: torch.Tensor, window: Window) -> tuple[int, int, int, int]:
    n, channels, *sizes = x.shape
    height, width = ((size + 2 * window.padding - window.kernel_size) // window.stride + 1 for size in sizes)
    return n, channels, height, width


def _torch_l2(x: torch.Tensor, window: Window, _: torch.Generator | None) -> torch.Tensor:
    padded = F.pad(x, [window.padding] * 4) if window.padding else x
    return F.lp_pool2d(padded, 2, window.kernel_size, window.stride)


def _torch_stochastic(x: torch.Tensor, window: Window, generator: torch.Generator | None) -> torch.Tensor:
    # Taps last and searchsorted: of five ways to write it the quickest in training, and within noise of the quickest forward.
    weights = unfolded(x, window).clamp(min=0).transpose(2, 3).contiguous()
    below = weights.cumsum(-1)
    total = below[..., -1:]
    drawn = torch.rand(total.shape, generator=generator) * total
    # Past the end where the total is 0: any tap will do, for all weigh 0.
    chosen = torch.searchsorted(below, drawn, right=True).clamp(max=weights.shape[-1] - 1)
    return weights.gather(-1, chosen).reshape(output_shape(x, window))


TORCH: dict[str, Pool] = {
    "max": lambda x, window, _: F.max_pool2d(x, *window),
    "avg": lambda x, window, _: F.avg_pool2d(x, *window),
    "min": lambda x, window, _: -F.max_pool2d(-x, *window),
    "l2": _torch_l2,
    "stochastic": _torch_stochastic,
    "global_max": lambda x, *_: F.adaptive_max_pool2d(x, 1),
    "global_avg": lambda x, *_: F.adaptive_avg_pool2d(x, 1),
}

FASTPOOL: dict[str, Pool] = {
    "max": lambda x, window, _, **beside: fp.max_pool2d(x, *window, **beside),
    "avg": lambda x, window, _, **beside: fp.avg_pool2d(x, *window, **beside),
    "min": lambda x, window, _, **beside: fp.min_pool2d(x, *window, **beside),
    "l2": lambda x, window, _, **beside: fp.l2_pool2d(x, *window, **beside),
    "stochastic": lambda x, window, generator, **beside: fp.stochastic_pool2d(x, *window, generator=generator, **beside),
    "global_max": lambda x, *_, **beside: fp.global_max_pool2d(x, **beside),
    "global_avg": lambda x, *_, **beside: fp.global_avg_pool2d(x, **beside),
}
