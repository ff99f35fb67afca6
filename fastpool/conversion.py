"""Swapping a model's torch.nn pooling and convolution modules for fastpool's, in place."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from . import nn as fast

Swaps = dict[type[nn.Module], type[nn.Module]]

_SWAPS: Swaps = {
    theirs: ours
    for name in fast.__all__
    if (theirs := getattr(nn, name, None)) is not None and issubclass(ours := getattr(fast, name), theirs)
}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLINGS: Swaps = {theirs: ours for theirs, ours in _SWAPS.items() if theirs not in _CONVOLUTIONS}

_NORMS = (nn.LPPool1d, nn.LPPool2d, nn.LPPool3d)


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` did; ``print`` it."""

    swapped: dict[str, str] = field(default_factory=dict)
    """Name of a module in the model ("" is the model itself) -> its repr."""
    kept: dict[str, str] = field(default_factory=dict)
    """Name of a pooling module that stays torch's -> why."""

    def __str__(self) -> str:
        rows = [f"swapped {name or '(the model)'}: {text}" for name, text in self.swapped.items()]
        rows += [f"kept    {name or '(the model)'}: {why}" for name, why in self.kept.items()]
        return "\n".join(rows or ["nothing to swap found"])


def _why_kept(module: nn.Module, swaps: Swaps) -> str | None:
    """Why a module of torch's (or made from one) stays; None: it is swapped, or there is nothing to swap it for."""
    name = type(module).__name__
    if isinstance(module, _NORMS) and type(module) in swaps and module.norm_type % 2:
        return f"{name} of norm_type {module.norm_type}: torch raises x itself to a power that is not even, fastpool |x|"
    if type(module) in swaps or type(module).__module__.startswith("fastpool"):
        return None
    base = next((b.__name__ for b in swaps if isinstance(module, b)), None)
    if base:
        return f"{name} is derived from {base}, and may have changed it"
    return f"{name} has no counterpart in fastpool" if "Pool" in name and type(module).__module__.startswith("torch.nn.") else None


def convert(model: nn.Module, *, conv: bool = False) -> Conversion:
    """Swap the torch.nn pooling modules of ``model`` for fastpool.nn's of the same name, in place, and say which; with ``conv`` its
    Conv1d, Conv2d and Conv3d too.

    A module keeps its identity, its attributes, hooks and mode, and its place in the state_dict: only its class changes.  Shared
    modules are swapped once, for everybody who holds them.

    Kept as they are, and reported: modules of classes derived from torch.nn's (what they changed is not known here), LPPools
    where torch's result is another (norm_type not even), and what fastpool does not have.
    """
    done, swaps = Conversion(), _SWAPS if conv else _POOLINGS
    for name, module in model.named_modules():
        why = _why_kept(module, swaps)
        if why:
            done.kept[name] = why
        elif type(module) in swaps:
            module.__class__ = swaps[type(module)]
            done.swapped[name] = repr(module)
    return done
