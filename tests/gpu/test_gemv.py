"""Products of one row whose weights come through rings of shared memory: against float64, and against registers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from mortice.core.model.operators import Buffer, GatedAct, Norm
from mortice.plugins.executors.cuda.device.device import Device, open_device
from mortice.plugins.executors.cuda.lowering.fusion import LinearGroup
from mortice.plugins.executors.cuda.lowering.gemv import gemv_shape, has_bulk_copies
from tests.gpu.test_matmul import Array, Bench, normed, spread
from tests.plugins.qtypes.blocks import NAMES, TYPES
from tests.support.cuda import needs_gpu

pytestmark = [pytest.mark.gpu, needs_gpu]

INT8 = 0.02
"""Of the norm of a product: what rounding a row of activations to int8 by 32 changes, and more."""

ORDER = 1e-5
"""What the order of a sum changes."""


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    opened = open_device()
    if not has_bulk_copies(opened.properties):
        pytest.skip(f"{opened.properties.name} has no rings")
    yield opened
    opened.close()


def off(found: Array, wanted: Array, size: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(size))


def products(device: Device, qtype: str, columns: int, other: str, *, rings: bool) -> tuple[list[Array], Bench]:
    """Three maps of one normed input; the middle one of another type."""
    on = Bench(device, 1, bulk_copies=rings)
    source = on.input("x", columns)
    normed_row = Buffer(name="n", width=columns)
    norm = Norm(name="norm", src=source, out=normed_row, type="rms", eps=1e-5, weight=on.vector("g", columns))
    rows = ((4104, qtype), (72, other), (2051, qtype))  # more row groups than warps of the card, an odd number of them
    linears = tuple(on.linear(f"w{i}", normed_row, n, name) for i, (n, name) in enumerate(rows))
    shape = gemv_shape([on.planned[o.weight] for o in linears], bulk_copies=rings)
    assert (shape.slots > 0) == rings
    return on.run([LinearGroup(norm=norm, linears=linears, biases=(None, None, None))])[0], on


@pytest.mark.parametrize("columns", [768, 4864, 8960])
@pytest.mark.parametrize("qtype", [name for name in NAMES if name != "F32"])
def test_rings_that_go_round_give_what_registers_give(device: Device, qtype: str, columns: int) -> None:
    other = "Q8_0" if qtype != "Q8_0" else "Q4_0"
    found, on = products(device, qtype, columns, other, rings=True)
    straight, beside = products(device, qtype, columns, other, rings=False)
    source, norm = (next(key for key in on.values if getattr(key, "name", getattr(key, "role", "")) == n) for n in "xg")
    n = normed(on.values[source], on.values[norm], 1e-5)
    weights = [values for key, values in on.values.items() if getattr(key, "role", "").startswith("w")]
    for values, plain, weight in zip(found, straight, weights, strict=True):
        size = spread(n, weight)
        assert off(values, n @ weight.T, size) < INT8
        assert off(values, plain, size) < ORDER
    on.close()
    beside.close()


@pytest.mark.parametrize("qtype", [name for name in NAMES if TYPES[name].qtype.block_elements > 1])
def test_gate_and_up_of_types_with_tiles_of_different_heights(device: Device, qtype: str) -> None:
    on = Bench(device, 1, bulk_copies=True)
    source = on.input("x", 1536)
    on.values[source] /= np.abs(on.values[source]).max()
    gate, up = on.linear("gate", source, 4096, qtype), on.linear("up", source, 4096, "F16")
    act = GatedAct(name="act", gate=gate.out, up=up.out, out=Buffer(name="act.out", width=4096), activation="silu")
    found = on.run([LinearGroup(norm=None, linears=(gate, up), biases=(None, None), gated=act)])[0][0]
    g, u = (on.values[source] @ on.values[linear.weight].T for linear in (gate, up))
    sizes = [spread(on.values[source], on.values[linear.weight]) for linear in (gate, up)]
    assert off(found, g / (1 + np.exp(-np.clip(g, -500, 500))) * u, sizes[0] * sizes[1]) < INT8
    on.close()
