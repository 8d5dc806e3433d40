"""Walks whose activations stay in shared memory while weights pass by: as right as every other design, whoever goes
first, and cheap behind its products.

Without a GPU the kernel runs on `kernel_machine`, which finds what a GPU would not forgive; mistakes made on purpose
show that it does.
"""

from __future__ import annotations

import json

import pytest
import torch
from conftest import HAS_GPU
from networks import random_field, random_inputs
from test_aot import IDS, TRITONS, ahead_of_time, compiled_with
from test_designs import compare, walked

import fastflow as ff

pytest.importorskip("triton.experimental.gluon")

from fastflow.kernels import aot, launch, plan, ring, roofline

if HAS_GPU:
    if launch.target(0)[0] // 10 != 9:
        pytest.skip("a kernel for Hopper", allow_module_level=True)
else:
    from kernel_machine import AsPython, MachineError, Mistake

pytestmark = pytest.mark.poison

without_gpu = pytest.mark.skipif(HAS_GPU, reason="the kernel itself runs")
CRITIC = dict(norm="layer", state_embedding=ff.HLGauss(-21.0, 1.0), time_embedding=ff.Cosine())
SPECS = {
    "floq": ff.FieldSpec(1, 5, (128,) * 4, 2, **CRITIC),
    "floq-wide": ff.FieldSpec(1, 5, (512,) * 2, None, **CRITIC),
    "padded": ff.FieldSpec(1, 5, (200, 200), 2, norm="layer", activation="silu", output_scale=0.5),
    "one-layer": ff.FieldSpec(1, 0, (128,), 3, norm="layer", state_embedding=ff.Scaled(-3.0, 4.0)),
    "no-norm": ff.FieldSpec(1, 3, (256,) * 3, None, "elu"),
    "actor": ff.FieldSpec(5, 6, (256,) * 3, 2, norm="layer"),
    "one-layer-actor": ff.FieldSpec(3, 2, (128,), None),
    "wide-state": ff.FieldSpec(29, 6, (128,) * 2, None, activation="elu"),
    "endpoint": ff.FieldSpec(2, 7, (128,) * 3, None, norm="layer", prediction="endpoint"),
}


@pytest.fixture
def ringed(monkeypatch):
    """Has walks go by the ring, without a GPU on machines with these options; returns a count of launches."""
    monkeypatch.setattr(launch, "rings", lambda: True)
    monkeypatch.setattr(plan, "groups", lambda *_: None)
    kernel, launches = ring.walk_ring_kernel, []

    def force(**options):
        if not HAS_GPU:
            monkeypatch.setattr(ring, "walk_ring_kernel", AsPython(kernel, **options))
        return launches

    original = ring.integrate_by_ring
    monkeypatch.setattr(ring, "integrate_by_ring", lambda *args: (launches.append(args), original(*args))[1])
    return force


@pytest.mark.parametrize("name", SPECS)
def test_the_ring_walks_as_every_other_design(name, device, ringed):
    launches = ringed()
    compare(SPECS[name], 19, 4, "bf16", device, num_steps=2 if name == "floq-wide" else 3)
    assert len(launches) == 1


@pytest.mark.parametrize(("batch", "samples", "options"), [(1, None, {}), (64, None, {}), (13, 5, {"t_1": 0.7})])
def test_any_number_of_rows_and_steps(batch, samples, options, device, ringed):
    launches = ringed()
    for num_steps in (1, 2, 5):
        compare(SPECS["endpoint"], batch, samples, "bf16", device, num_steps=num_steps, **options)
    assert len(launches) == 3


def walk(name):
    return walked(SPECS[name], 16, 4)


@without_gpu
@pytest.mark.parametrize("name", ["floq", "actor"])
def test_bits_do_not_depend_on_who_comes_first(name, ringed):
    found = []
    for options in ({}, {"seed": 1}, {"seed": 2}, {"first": 0}, {"first": 1}, {"first": 2}):
        ringed(**options)
        found.append(walk(name))
    assert all(torch.equal(found[0], other) for other in found[1:])


@without_gpu
def test_few_places_in_the_ring_are_enough(monkeypatch, ringed):
    ringed()
    expected = walk("floq")
    for places in (2, 3, 5):
        monkeypatch.setattr(plan, "ring", lambda *_, places=places: plan.Ring(plan.Tiles(64, 64, 4, 1), places))
        assert torch.equal(walk("floq"), expected)


# A line of the kernel and what is made of it.
MISTAKES = {
    "no fence": ("        fence_async_shared()\n        meet()\n", "        meet()\n"),
    "no meeting": ("        fence_async_shared()\n        meet()\n", "        fence_async_shared()\n"),
    "features without a fence": ("    fence_async_shared()\n    meet()\n    mb", "    meet()\n    mb"),
    "accumulators in flight": ("num_outstanding=0", "num_outstanding=1"),
    "a place freed too early": ("(first + k + PLACES - 1) % PLACES", "(first + k) % PLACES"),
    "a place freed twice": ("count=1, pred=k > 0)", "count=1)"),
    "chunks not waited for": ("if not FIRST and n == C:\n", "if FIRST and n == C and False:\n"),
    "wrong phase of a place": ("((at // PLACES) & 1) ^ 1", "(at // PLACES) & 1"),
    "wrong phase of a chunk": ("((g - 1) // 2) & 1, pred", "(g // 2) & 1, pred"),
    "one bit for all places": ("phases = phases ^ (1 << place)", "phases = phases ^ -1"),
    "weights of another order": ("n_e + i_e) * HP", "n_e + i_e) * HP + 64 * (l % 2)"),
    "a state not waited for": ("        mbarrier.wait(begun, i & 1)\n", ""),
    "the last layer not waited for": ("mbarrier.wait(ready.index((last % 2)", "mbarrier.wait(ready.index((g % 2)"),
    "a wrong size expected": ("BK * NET.BN * 2", "BK * NET.BN"),
    "both buffers the same": ("before = (g + 1) % 2", "before = g % 2"),
}


@without_gpu
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake, ringed):
    ringed()
    expected = walk("floq")
    edit, found = Mistake(*MISTAKES[mistake]), 0
    for options in ({}, {"first": 0}, {"first": 1}, {"first": 2}):
        ringed(edit=edit, **options)
        try:
            found += not torch.equal(walk("floq"), expected)
        except (MachineError, TypeError):
            found += 1
    assert edit.made and found


@without_gpu
def test_mistakes_are_told(ringed):
    ringed(edit=Mistake(*MISTAKES["wrong phase of a place"]))
    with pytest.raises(MachineError, match=r"partitions \[0, 1, 2\] wait for each other"):
        walk("floq")
    ringed(edit=Mistake(*MISTAKES["no fence"]))
    with pytest.raises(MachineError, match="a fence and a meeting"):
        walk("floq")


# Where it runs -------------------------------------------------------------------------------------------------------


def test_it_is_asked_for(monkeypatch, device):
    assert not launch.RING
    asked = []
    monkeypatch.setattr(ring, "integrate_by_ring", lambda *args: asked.append(args))
    compare(SPECS["one-layer"], 3, None, "bf16", device, num_steps=1)
    assert not asked


@pytest.mark.parametrize("value", ["yes", ""])
def test_the_switch_is_0_or_1(monkeypatch, value):
    monkeypatch.setenv("FASTFLOW_RING", value)
    with pytest.raises(ValueError, match=f"FASTFLOW_RING must be 0 or 1, got '{value}'"):
        launch._switch("FASTFLOW_RING")
    monkeypatch.setenv("FASTFLOW_RING", "1")
    assert launch._switch("FASTFLOW_RING")


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"method": "midpoint"}),
        ({}, {"precision": "fp32"}),
        ({"hidden": (24, 24)}, {}),
        ({"hidden": (128, 64)}, {}),
        ({"norm_first": True}, {}),
        ({"architecture": ff.ResidualMLP(1)}, {}),
    ],
)
def test_what_it_does_not_cover_goes_by_rows(changes, options, device, ringed):
    launches = ringed()
    spec = ff.FieldSpec(**dict(state_dim=2, cond_dim=3, hidden=(128, 128), norm="layer") | changes)
    compare(spec, 50, None, options.pop("precision", "bf16"), device, num_steps=1, **options)
    assert not launches


def test_gradients_go_by_rows(device, ringed):
    launches = ringed()
    field, inputs = random_field(SPECS["endpoint"], device), random_inputs(SPECS["endpoint"], 5, None, device)
    x_0 = inputs["x_0"].requires_grad_()
    ff.integrate(field, x_0, inputs["cond"], num_steps=1, backend="fused", precision="bf16").sum().backward()
    assert x_0.grad is not None and not launches


def test_plan():
    assert plan.ring(90, aot.FLOQ) == plan.Ring(plan.Tiles(64, 128, 4, 1), 6)
    assert plan.ring(90, aot.FIELDS["fpo++"]) is not None
    for arch in (80, 89, 100, 120, plan.GFX942):
        assert plan.ring(arch, aot.FLOQ) is None
    for name in ("floq-tf32", "floq-1024", "floq-resnet", "fpo", "td-flow", "fpo++-tracking"):
        assert plan.ring(90, aot.FIELDS[name]) is None, name


# What it takes -------------------------------------------------------------------------------------------------------

COUNT = """
import json
from fastflow.kernels import aot
(tiles,) = aot.entries("walk_ring", "floq", 90)
code = aot.disassembled(aot.lower("walk_ring", aot.FLOQ, 90, tiles))
names = [name for _, name, _ in code if name != "NOP"]
runs, last = [], 0
for i, name in enumerate(names):
    if name == "HGMMA":
        runs.append(i - last - 1)
        last = i
print(json.dumps([n / 64 for n in runs if n > 256]))
"""


@ahead_of_time
@pytest.mark.parametrize("triton", TRITONS, ids=IDS)
def test_epilogues_take_few_instructions(triton):
    # Between two products, per element of a tile; the most are those with the state's features besides. First tiles
    # add cond's share.
    found = sorted(json.loads(compiled_with(triton, COUNT)))
    middle = found[len(found) // 2]
    assert 0.8 * roofline.EPILOGUE_RING <= middle <= 1.1 * roofline.EPILOGUE_RING, found
    assert found[-3] <= 16, found


CORNERS = """
import dataclasses, json
from fastflow.kernels import aot, plan
vector = aot._chain(aot.ACTOR, 512, 512, 512, state_dim=17, state_features=17, norm="after")
scalar = aot._chain(aot.FLOQ, 512, 512, 512, activation="mish", norm="none")
found = []
for net in (vector, scalar):
    ring = plan.ring(90, net)
    taken = aot.resources(aot.lower("walk_ring", net, 90, ring.tiles), 90)
    found.append((ring.places, taken.shared, taken.stack))
print(json.dumps(found))
"""


@ahead_of_time
@pytest.mark.parametrize("triton", TRITONS, ids=IDS)
def test_what_fills_memory_and_registers_most_fits(triton):
    for (places, shared, stack), least in zip(json.loads(compiled_with(triton, CORNERS)), (4, 6), strict=True):
        assert places == least and shared <= plan.SHARED_MEMORY[90] and stack <= 64
