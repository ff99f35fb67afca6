"""fastpool: pooling and direct convolution for PyTorch at the machine's limit, with PyTorch's exact semantics.

``fastpool.functional`` mirrors torch.nn.functional, ``fastpool.nn`` torch.nn; ``fastpool.convert(model)`` swaps a model's pooling
modules in place, and with ``conv=True`` its convolutions.  ``fastpool.commutes(first, second)`` tells which layers may change places, and
``fastpool.optimize(model, example_input)`` makes a copy of a model in the cheapest exact order.
"""

from pathlib import Path as _Path

# A wheel holds the kernels as fastpool/kernels; a checkout keeps them beside fastpool/.
if not (_here := _Path(__file__).parent).joinpath("kernels").is_dir():
    __path__.append(str(_here.parent))

from . import functional, nn
from .conversion import Conversion, convert
from .laws import Law, commutes
from .rewrite import optimize
from .version import __version__

__all__ = ["Conversion", "Law", "__version__", "commutes", "convert", "functional", "nn", "optimize"]
