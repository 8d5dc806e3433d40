"""The model of what launches take: its floors, its order of designs, and what it must never say."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cases import CASES, FLOQ, FPO, FPO_PLUS, FQL_ACTOR, TD_FLOW
from fastflow.fused import network
from fastflow.kernels import plan, roofline
from fastflow.kernels.roofline import DESIGNS, H200, best, predict, why_not

CRITIC, SAMPLER = network(FLOQ, "bf16"), network(FPO, "bf16")
NETWORKS = {"floq": CRITIC, "fpo": SAMPLER, "fpo-plus": network(FPO_PLUS, "bf16"), "td-flow": network(TD_FLOW, "bf16")}


def seconds(design, rows, evaluations=8, net=CRITIC, machine=H200, kernel="integrate_fwd", **options):
    return predict(design, kernel, net, rows, evaluations, machine, **options).seconds


def test_floors():
    # 51.5 GFLOP of 4,096 rows through three products of 512 x 512, eight times; nine of them for a loss and back.
    assert roofline.hidden_flops(CRITIC, 4096, 8) == pytest.approx(51.5e9, rel=2e-3)
    assert roofline.floor(CRITIC, 4096, 8, H200) == pytest.approx(65e-6, rel=0.01)
    assert roofline.floor(CRITIC, 4096, 1, H200, passes=3) == pytest.approx(25e-6, rel=0.03)
    assert roofline.floor(CRITIC, 16384, 8, H200) == pytest.approx(261e-6, rel=0.01)
    wide = NETWORKS["td-flow"]
    # Six layers of 512, the first from the state, two with two inputs.
    assert roofline.hidden_flops(wide, 1, 1) == 2 * (3 * 512 * 512 + 2 * 1024 * 512)


@pytest.mark.parametrize(
    ("rows", "expected"), [(16, "group"), (128, "group"), (512, "group"), (1024, "group"), (8192, "ring")]
)
def test_choice_over_rows(rows, expected):
    assert best(CRITIC, rows, 8, H200, members=2) == expected


def test_choice_of_other_networks():
    for rows in (64, 2048, 16384):
        assert best(SAMPLER, rows, 10, H200) == "narrow"
    assert best(network(FQL_ACTOR, "bf16"), 1, 10, H200) == "group"
    assert best(NETWORKS["td-flow"], 1024, 20, H200, own_times=True) == "rows"


@pytest.mark.parametrize("machine", roofline.MACHINES.values(), ids=lambda machine: machine.name)
@pytest.mark.parametrize("name", ["floq", "fpo", "fpo-plus", "actor", "depth2"])
def test_what_the_plan_runs_takes_little_more_than_the_cheapest_that_there_is(name, machine):
    others = {
        "actor": network(FQL_ACTOR, "bf16"),
        "depth2": network(dataclasses.replace(FLOQ, hidden=(512, 512)), "bf16"),
    }
    net = (NETWORKS | others)[name]
    members = 2 if name in ("floq", "depth2") else 1
    there = ("narrow",) if plan.narrow(net) else ("rows", "group")
    for rows in (2**i for i in range(1, 16)):
        runs = roofline.built(net, rows, machine, members=members)
        cheapest = best(net, rows, 10, machine, designs=there, members=members)
        taken, least = (seconds(d, rows, 10, net, machine, members=members) for d in (runs, cheapest))
        assert taken <= 1.35 * least, (rows, runs, cheapest)


def test_many_rows_go_by_the_ring_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(roofline.launch, "RING", True)
    for rows in (4096, 16384):
        assert roofline.built(CRITIC, rows, H200, members=2) == "ring"
        assert roofline.built(CRITIC, rows, H200, members=2, save=True) == "rows"
    assert roofline.built(CRITIC, 512, H200, members=2) == "group"
    assert roofline.built(CRITIC, 4096, roofline.A100, members=2) == "rows"
    for name in ("floq", "fpo-plus"):
        for rows in (2**i for i in range(9, 17)):
            taken, least = (seconds(d, rows, 10, NETWORKS[name], members=2) for d in ("ring", "rows"))
            assert taken <= 1.05 * least, (name, rows)


def test_the_ring_hides_epilogues():
    cost = predict("ring", "integrate_fwd", CRITIC, 4096, 8, H200, members=2)
    assert cost.seconds < cost.tensor + cost.epilogue
    assert cost.seconds < 0.65 * seconds("rows", 4096, members=2)


def test_only_plain_walks_go_by_groups():
    assert roofline.built(CRITIC, 512, H200, members=2) == "group"
    assert roofline.built(CRITIC, 512, H200, members=2, save=True) == "rows"
    assert roofline.built(CRITIC, 512, H200, "matching_fwd", members=2) == "rows"
    assert roofline.built(SAMPLER, 512, H200, "matching_fwd") == "narrow"
    assert roofline.built(SAMPLER, 512, H200, "backward") == "rows"


def test_many_rows_want_tall_tiles():
    tall = plan.Tiles(128, 32, 8, 3)
    others = [seconds(design, 16384, members=2) for design in ("rows", "group", "layers")]
    assert seconds("rows", 16384, members=2, tiles=tall) < min(others)
    candidates = [tall, *plan.candidates("integrate_fwd", 90, CRITIC)]
    chosen = [
        roofline.best_tiles("integrate_fwd", CRITIC, rows, H200, candidates, members=2).rows
        for rows in (256, 2048, 8192, 16384)
    ]
    assert chosen == [16, 32, 64, 128]


@pytest.mark.parametrize("machine", roofline.MACHINES.values(), ids=lambda machine: machine.name)
@pytest.mark.parametrize("kernel", plan.KERNELS)
@pytest.mark.parametrize("design", DESIGNS)
def test_more_rows_and_steps_never_take_less(design, kernel, machine):
    for net in NETWORKS.values():
        if why_not(design, kernel, net, machine):
            continue
        # The plan changes tiles where that does not always pay.
        all_tiles = plan.candidates(kernel, machine.arch, net) if design == "rows" else (None,)
        for tiles in all_tiles:
            options = {"members": 2, "tiles": tiles}
            over_rows = [seconds(design, 2**i, 4, net, machine, kernel, **options) for i in range(1, 18)]
            assert over_rows == sorted(over_rows)
        over_steps = [seconds(design, 512, k, net, machine, kernel) for k in (1, 2, 4, 8, 16, 32, 64)]
        assert all(b > a for a, b in itertools.pairwise(over_steps))


@pytest.mark.parametrize("kernel", plan.KERNELS)
@pytest.mark.parametrize("design", DESIGNS)
def test_parts_bound_the_whole(design, kernel):
    for net, rows in itertools.product(NETWORKS.values(), (1, 300, 4096, 100_000)):
        if why_not(design, kernel, net, H200):
            continue
        cost = predict(design, kernel, net, rows, 3, H200)
        parts = (cost.tensor, cost.l2, cost.epilogue, cost.wait)
        assert min(parts) >= 0 and cost.wait > 0
        assert max(parts) <= cost.overlapped * (1 + 1e-9)
        assert cost.overlapped <= cost.seconds <= sum(parts) * (1 + 1e-9)
        # Nothing is faster than the machine.
        assert cost.seconds > roofline.floor(net, rows, 3, H200)


def test_time_is_linear_in_steps():
    for design in ("rows", "group", "layers"):
        one, two, three = (seconds(design, 4096, k) for k in (1, 2, 3))
        assert three - two == pytest.approx(two - one)


def test_what_is_known_of_the_machine_counts():
    slow = dataclasses.replace(H200, l2=H200.l2 / 2, port=H200.port / 2)
    assert seconds("rows", 8192, machine=slow) > 1.5 * seconds("rows", 8192)
    patient = dataclasses.replace(H200, barrier=10e-6)
    # Four layers, each with a barrier behind it.
    assert seconds("group", 64, machine=patient) - seconds("group", 64) == pytest.approx(8 * 4 * 9e-6)
    launched = dataclasses.replace(H200, node=H200.node + 1e-6)
    assert seconds("layers", 64, machine=launched) - seconds("layers", 64) == pytest.approx(8 * 4 * 1e-6)
    assert seconds("rows", 64, machine=launched) - seconds("rows", 64) == pytest.approx(1e-6)


def test_rows_have_the_plans_tiles():
    planned = plan.choose("integrate_fwd", 90, 132, CRITIC, 4096)
    assert seconds("rows", 4096) == seconds("rows", 4096, tiles=planned)
    assert seconds("rows", 4096) < seconds("rows", 4096, tiles=plan.Tiles(16, 64, 4, 3))


def test_kept_activations_and_own_times_cost():
    assert seconds("rows", 4096, save=True) > seconds("rows", 4096)
    net = NETWORKS["td-flow"]
    assert seconds("rows", 1024, 20, net, own_times=True) > 1.2 * seconds("rows", 1024, 20, net)
    recurrent = roofline.weight_gradients(CRITIC, 4096, 8, H200)
    assert recurrent > roofline.weight_gradients(CRITIC, 4096, 1, H200)
    assert roofline.weight_gradients(CRITIC, 4096, 1, H200) > roofline.floor(CRITIC, 4096, 1, H200)


def test_groups_hold_the_weights():
    # Three slices of 512 x 64 in bf16 leave room for 16 rows; a smaller shared memory needs larger groups.
    assert roofline.group_size(CRITIC, H200) == 8
    assert roofline.group_size(CRITIC, roofline.A100) == 16
    assert roofline.group_size(network(FLOQ, "fp32"), H200) == 32
    assert roofline.group_size(network(dataclasses.replace(FLOQ, hidden=(1024,) * 16), "bf16"), H200) is None


def test_what_does_not_fit_is_named():
    assert why_not("narrow", "integrate_fwd", CRITIC, H200) == "a layer wider than 64, or with two inputs"
    assert "not folded" in why_not("group", "integrate_fwd", NETWORKS["td-flow"], H200)
    assert "both ways" in why_not("group", "backward", CRITIC, H200)
    wide = network(dataclasses.replace(FLOQ, hidden=(1024,) * 4), "fp32")
    assert "shared memory" in why_not("rows", "integrate_fwd", wide, dataclasses.replace(H200, arch=86))
    with pytest.raises(ValueError, match="narrow does not cover integrate_fwd"):
        predict("narrow", "integrate_fwd", CRITIC, 1, 1, H200)
    with pytest.raises(ValueError, match="design must be one of rows"):
        predict("columns", "integrate_fwd", CRITIC, 1, 1, H200)
    with pytest.raises(ValueError, match="kernel must be one of"):
        predict("rows", "forward", CRITIC, 1, 1, H200)
    with pytest.raises(ValueError, match="none of narrow covers"):
        best(CRITIC, 1, 1, H200, designs=("narrow",))


def test_machines_by_name():
    names = {"NVIDIA H200": "H200", "NVIDIA H100 80GB HBM3": "H100", "NVIDIA A100-SXM4-80GB": "A100"}
    assert {gpu: roofline.machine_of(gpu).name for gpu in names} == names
    assert roofline.machine_of("NVIDIA GH200 480GB") is None


def test_precisions_have_their_rates():
    rates = [H200.rate(precision) for precision in ("bf16", "tf32", "fp32")]
    assert rates == sorted(rates, reverse=True) and rates[2] == pytest.approx(59e12, rel=0.01)
    times = [seconds("rows", 4096, net=network(CASES["walk-2x2048"].spec, p)) for p in ("bf16", "tf32", "fp32")]
    assert times == sorted(times)
