"""Feature maps of a real photograph, so that ties, flat regions and the share of negative values are those of images, not of noise."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .cases import Site

FILTER = 5
"""Height and width of the first convolution's filters, pixels."""


class MissingPhotographError(RuntimeError):
    """The packages that bring the photograph are not installed."""


@functools.cache
def photograph() -> torch.Tensor:
    """scikit-learn's china.jpg: (3, 427, 640), float32 in 0..1."""
    try:
        from sklearn.datasets import load_sample_image  # a second to import, and an optional dependency

        image = load_sample_image("china.jpg")
    except ImportError as error:
        raise MissingPhotographError(
            f"the benchmark's photograph comes with scikit-learn and pillow ({error}): pip install 'fastpool[bench]'"
        ) from error
    return torch.tensor(image).permute(2, 0, 1).float() / 255


@functools.lru_cache(maxsize=1)
def feature_maps(site: Site, batch: int) -> torch.Tensor:
    """(batch, site.channels, site.height, site.width), float32: the photograph through one convolution of seeded filters.

    Image i is a square crop; the crops of a batch move from the left edge to the right.  Filters have zero mean, and each map is
    divided by its standard deviation, so that about half of the values are negative and activations meet their curved part.
    """
    image = photograph()
    _, height, width = image.shape
    room = width - height
    lefts = [room // 2] if batch == 1 else [i * room // (batch - 1) for i in range(batch)]
    crops = torch.stack([image[:, :, left : left + height] for left in lefts])
    size = (site.height + FILTER - 1, site.width + FILTER - 1)
    small = F.interpolate(crops, size, mode="bilinear", antialias=True)
    filters = torch.randn(site.channels, 3, FILTER, FILTER, generator=torch.Generator().manual_seed(0))
    filters -= filters.mean((1, 2, 3), keepdim=True)
    maps = F.conv2d(small, filters)
    return maps / maps.std((0, 2, 3), keepdim=True)
