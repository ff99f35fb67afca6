"""Run from outside the checkout against an installed wheel: forward, backward and a converted model."""

from pathlib import Path

import fastpool.kernels.pool.max as kernel
import torch
from torch import nn

import fastpool

installed = Path(fastpool.__file__).parent
assert Path(kernel.__file__).is_relative_to(installed), kernel.__file__
assert "site-packages" in installed.parts, installed

x = torch.randn(2, 3, 37, 43, requires_grad=True)  # more than is left to torch
y = fastpool.functional.max_pool2d(x, 3, 2, 1)
y.sum().backward()
assert torch.equal(y, nn.functional.max_pool2d(x, 3, 2, 1))

model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2))
expected = model(x)
print(fastpool.convert(model))
assert torch.allclose(model(x), expected)
print(f"fastpool {fastpool.__version__} from {installed.name} works")
