"""What the compiled code is made of."""

import re

import pytest
from processes import run

# Arithmetic on doubles, and conversions from and to them; moves and shuffles (vmovapd, vpermpd, vunpcklpd) are only 64 bits.
DOUBLE = r"\tv?(?:add|sub|mul|div|sqrt|min|max|cmp\w*|fn?m(?:add|sub)\d+|ucomi|comi|round|rndscale|cvt\w*2|hadd)[sp]d\b|\tv?cvt\w*[sp]d2\w+"


def test_the_pattern_finds_doubles():
    for line in (
        "\tvaddpd\t%ymm0",
        "\tvcvtps2pd\t%xmm0",
        "\tcvtsd2ss\t%xmm0",
        "\tvfmadd213pd\t",
        "\tdivsd\t",
        "\tvcvtpd2ps\t",
        "\tvcmpltpd\t",
    ):
        assert re.search(DOUBLE, line), line
    for line in ("\tvpermpd\t$216", "\tvmovapd\t", "\tvaddps\t", "\tvunpcklpd\t", "\tvblendpd\t", "\tvmovddup\t"):
        assert not re.search(DOUBLE, line), line


PROGRAM = """
import torch
import fastpool.functional as F
from fastpool.kernels import compile

workers, kept = [], compile.Worker
compile.Worker = lambda *parts: workers.append(kept(*parts)) or workers[-1]

# avg goes through every nest, the others where each way to call their arithmetic is.
kind = {kind!r}
every = kind == "avg"
windows = ((2,), (3, 2, 1), (5, 1, 2), (9, 9)) if every else ((3, 2, 1), (5, 1, 2))
shapes = [((1, 9, 20, 40), (False, True)), ((1, 2, 10, 2000), (False, True)), ((2, 20, 9, 9), (False,))]

def poolings(x):
    if kind == "stochastic":
        calls = [lambda x, *a: F.stochastic_pool2d(x, *a), lambda x, *a: F.stochastic_pool2d(x, *a, training=False)]
    else:
        calls = [getattr(F, kind + "_pool2d")]
    for call in calls:
        for a in windows:
            yield call(x, *a)
    if kind != "stochastic":
        yield getattr(F, f"global_{{kind}}_pool2d")(x)

for shape, layouts in shapes if every else shapes[:1]:
    for last in layouts:
        x = torch.rand(shape)
        x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
        for y in poolings(x):
            y.sum().backward()

with open({listing!r}, "w") as file:
    for worker in workers:
        print("WORKER", worker.name, file=file)
        print(worker.library.get_asm_str(), file=file)
print("done")
"""


@pytest.mark.parametrize("kind", ["max", "avg", "l2", "stochastic"])
def test_float32_kernels_hold_no_float64(kind, tmp_path):
    """A constant or a conversion that slips in costs half the lanes; looked for in a process that compiles all of it anew."""
    listing = tmp_path / "listing"
    run(PROGRAM.format(kind=kind, listing=str(listing)), FASTPOOL_CACHE_DIR=str(tmp_path / "cache"))
    listings = listing.read_text().split("WORKER ")[1:]
    assert len(listings) > 8
    for listing in listings:
        name, _, code = listing.partition("\n")
        assert "vaddps" in code or "ps\t" in code or "scatter" in name, f"{name}: no code on floats was found"
        found = re.findall(f".*(?:{DOUBLE}).*", code)
        assert not found, f"{name}: {found[:3]}"
