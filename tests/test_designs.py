"""How walks are laid out over a GPU: which network gets which design, and that all come to the same end.

The interpreter runs one program after the other, so groups that meet behind each layer run as a launch per layer.
"""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from conftest import HAS_GPU, assert_as_accurate, products
from networks import SPECS, in_float64, random_field, random_inputs

import fastflow as ff

pytest.importorskip("triton")

from fastflow.kernels import aot, group, integrate, plan

pytestmark = pytest.mark.poison

PRECISIONS = ["bf16", "tf32", "fp32"] if HAS_GPU else ["bf16", "fp32"]
GROUPED = {
    "floq": ff.FieldSpec(
        1, 5, (128,) * 3, 2, norm="layer", state_embedding=ff.HLGauss(-21.0, 1.0), time_embedding=ff.Cosine()
    ),
    "padded": ff.FieldSpec(1, 5, (100, 100), 2, norm="layer", activation="silu", output_scale=0.5),
    "actor": ff.FieldSpec(5, 6, (64,) * 3, None),
    "one-layer": ff.FieldSpec(3, 0, (64,), 2),
    "endpoint": ff.FieldSpec(2, 7, (64,) * 2, None, norm="layer", prediction="endpoint"),
}
TILES = plan.Tiles(16, 32, 4, 1)


@pytest.fixture
def grouped(monkeypatch):
    """Has walks run by groups of these tiles; the list holds a line per walk that did."""
    walks = []
    original = integrate.integrate_by_groups

    def recorded(*args):
        walks.append(args[-2])
        return original(*args)

    def force(groups):
        monkeypatch.setattr(plan, "groups", lambda *_: groups)
        monkeypatch.setattr(integrate, "integrate_by_groups", recorded)
        return walks

    return force


def compare(spec, batch, samples, precision, device, **options):
    field, inputs = random_field(spec, device), random_inputs(spec, batch, samples, device)
    x_0, cond = inputs["x_0"], inputs["cond"]
    with torch.no_grad():
        found = ff.integrate(field, x_0, cond, backend="fused", precision=precision, **options)
        with products(precision):
            eager = ff.integrate(field, x_0, cond, backend="reference", precision=precision, **options)
        options = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        exact = ff.integrate(
            in_float64(field), x_0.double(), None if cond is None else cond.double(), backend="reference", **options
        )
    assert_as_accurate("walk", found, eager, exact, ratio_floor=2e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", GROUPED)
def test_groups_walk_as_every_other_design(name, precision, device, grouped):
    walks = grouped(plan.Groups(TILES, 2))
    compare(GROUPED[name], 19, 3, precision, device, num_steps=3)
    assert len(walks) == 1


@pytest.mark.parametrize("batch", [1, 16, 33])
@pytest.mark.parametrize("count", [1, 3])
def test_groups_of_any_number_of_rows(batch, count, device, grouped):
    walks = grouped(plan.Groups(TILES, count))
    compare(GROUPED["endpoint"], batch, None, "fp32", device, num_steps=2, t_1=0.7)
    assert len(walks) == 1


# Programs that meet ---------------------------------------------------------------------------------------------------


@pytest.fixture
def meeting(monkeypatch, grouped):
    """Has groups of two meet within one launch, without a GPU: all programs on one machine with these options."""
    from kernel_machine import AsPython
    from meeting_machine import Together

    kernel, made = group.walk_group_kernel, []

    def force(**options):
        grouped(plan.Groups(TILES, 2))
        monkeypatch.setattr(group, "launch", types.SimpleNamespace(interpreted=lambda: False))
        made.append(AsPython(kernel, Together, **options))
        monkeypatch.setattr(group, "walk_group_kernel", made[-1])
        return made[-1]

    return force


def walked(spec, batch, samples):
    """Two bfloat16 steps of the kernels, the same at every call."""
    torch.manual_seed(0)
    field, inputs = random_field(spec, "cpu"), random_inputs(spec, batch, samples, "cpu")
    with torch.no_grad():
        return ff.integrate(field, inputs["x_0"], inputs["cond"], num_steps=2, backend="fused", precision="bf16")


@pytest.mark.skipif(HAS_GPU, reason="the kernel itself meets")
@pytest.mark.parametrize("name", ["floq", "endpoint"])
def test_programs_that_meet_come_to_the_same_end_in_any_order(name, meeting, device):
    compare(GROUPED[name], 19, 3, "bf16", device, num_steps=2)
    found = []
    for seed in range(2):
        machine = meeting(seed=seed)
        found.append(walked(GROUPED[name], 19, 3))
        assert machine.launches == 1
    assert torch.equal(*found)


MISTAKES = {
    "no meeting": ("                    meet(p_count, met)\n", ""),
    "too few arrivals": ("                    met += G\n", "                    met += G - 1\n"),
    "one buffer": ("p_in = y_ptr + ((1 - turn)", "p_in = y_ptr + (turn"),
    "the last layer's buffer": ("turn_out = (num_steps * L) % 2", "turn_out = 1"),
    "nothing released": ('sem="release"', 'sem="relaxed"'),
    "nothing acquired": ('sem="acquire"', 'sem="relaxed"'),
    "one multiprocessor's cache": ('return tl.load(p, cache_modifier=".cg")', "return tl.load(p)"),
}


@pytest.mark.skipif(HAS_GPU, reason="the kernel itself meets")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_programs_that_meet_are_found(mistake, meeting):
    from kernel_machine import MachineError, Mistake

    meeting()
    expected = walked(GROUPED["endpoint"], 19, 3)
    edit = Mistake(*MISTAKES[mistake])
    meeting(edit=edit)
    try:
        found = not torch.equal(walked(GROUPED["endpoint"], 19, 3), expected)
    except MachineError:
        found = True
    assert edit.made and found


@pytest.mark.parametrize(
    "options",
    [
        dict(method="midpoint"),
        dict(trajectory=True),
        dict(t_1=torch.full((19, 3), 0.5)),
        dict(step_noise=torch.zeros(2, 19, 3, 5)),
    ],
    ids=["midpoint", "trajectory", "own times", "noise"],
)
def test_what_groups_do_not_cover_goes_by_rows(options, device, grouped):
    walks = grouped(plan.Groups(TILES, 2))
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    compare(GROUPED["actor"], 19, 3, "fp32", device, num_steps=2, **options)
    assert not walks


def test_walks_with_gradients_go_by_rows(device, grouped):
    walks = grouped(plan.Groups(TILES, 2))
    field, inputs = random_field(GROUPED["actor"], device), random_inputs(GROUPED["actor"], 5, None, device)
    walked = ff.integrate(field, inputs["x_0"], inputs["cond"], num_steps=2, backend="fused", precision="fp32")
    assert walked.requires_grad
    assert not walks


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize("batch", [1, 200])
def test_programs_that_meet_find_what_launches_per_layer_do(batch, device, grouped):
    spec = GROUPED["floq"]
    field, inputs = random_field(spec, device), random_inputs(spec, batch, None, device)
    found = []
    for meets in (True, False):
        grouped(plan.Groups(TILES, 2, meets))
        with torch.no_grad():
            walk = [ff.integrate(field, inputs["x_0"], inputs["cond"], num_steps=8, backend="fused") for _ in range(20)]
        assert all(torch.equal(walk[0], other) for other in walk[1:])
        found.append(walk[0])
    assert torch.equal(*found)


# What the plan chooses ----------------------------------------------------------------------------------------------


def test_narrow_networks_are_those_that_fit_a_program():
    names = {
        name for name, net in aot.FIELDS.items() if not name.startswith(("fold", "norm", "film")) and plan.narrow(net)
    }
    assert names == {"fpo", "floq-64-tf32"}
    wide = dataclasses.replace(aot.FPO, state_dim=100, state_features=100)
    assert plan.narrow(wide)
    assert not plan.narrow(aot._chain(aot.FPO, *(64,) * 8, precision="tf32")), "112 KB of weights"
    assert plan.candidates("integrate_fwd", 90, aot.FPO) != plan.candidates("backward", 90, aot.FPO)


@pytest.mark.parametrize("name", SPECS)
def test_narrow_networks_allocate_no_workspace(name):
    from fastflow import fused

    net = fused.network(SPECS[name], "fp32")
    assert plan.narrow(net) == net.fold


def test_groups_fit_the_multiprocessors_and_their_memory():
    found = 0
    for name, net in aot.FIELDS.items():
        for arch, sms in ((80, 108), (90, 132), (100, 148)):
            for members, rows in ((1, 1), (1, 300), (2, 256), (2, 1024)):
                groups = plan.groups(arch, sms, net, members, rows)
                if groups is None:
                    continue
                found += 1
                programs = members * groups.count * (net.padded[0] // groups.tiles.columns)
                assert programs <= sms, (name, arch, rows)
                assert plan.group_bytes(net, groups.tiles) <= plan.SHARED_MEMORY[arch]
                assert groups.count * max(plan.GROUP_ROWS[arch].values()) >= rows
    assert found > 30


def test_few_rows_of_wide_networks_go_by_groups_and_many_by_rows():
    assert plan.groups(90, 132, aot.FLOQ, 2, 256) == plan.Groups(plan.Tiles(16, 64, 4, 1), 8)
    assert plan.groups(90, 132, aot.FLOQ, 2, 8192) is None
    assert plan.groups(90, 132, dataclasses.replace(aot.FLOQ, precision="tf32"), 2, 256) is None
    assert plan.groups(86, 84, aot.FLOQ, 2, 256) is None
    assert plan.groups(plan.GFX942, 304, aot.FLOQ, 2, 256) is None
    assert plan.groups(90, 132, aot.UNET, 1, 256) is None


def test_one_multiprocessor_as_the_interpreter_has_holds_no_group():
    assert plan.groups(90, 1, aot.FLOQ, 2, 256) is None
