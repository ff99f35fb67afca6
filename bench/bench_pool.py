"""Pooling forward beside PyTorch, a group a case: ``pytest bench/bench_pool.py --benchmark-only``.

Results are checked before they are timed; compiling happens in that check.
"""

import pytest
import torch
import torch.nn.functional as T

import fastpool.functional as F

SHAPE = (8, 64, 112, 112)
WINDOWS = {"2x2 s2": (2, 2, 0), "3x3 s2 p1": (3, 2, 1)}
POOLS = {"max": (T.max_pool2d, F.max_pool2d), "avg": (T.avg_pool2d, F.avg_pool2d)}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("provider", ["torch", "fastpool"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward(benchmark, layout, pool, window, threads, provider):
    benchmark.group = f"{pool} {window}, {layout}, threads: {threads}"
    torch.set_num_threads(threads)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(memory_format=LAYOUTS[layout])
    theirs, ours = POOLS[pool]
    torch.testing.assert_close(ours(x, *WINDOWS[window]), theirs(x, *WINDOWS[window]))
    benchmark.pedantic(theirs if provider == "torch" else ours, (x, *WINDOWS[window]), rounds=25, warmup_rounds=2)
