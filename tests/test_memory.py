"""What a walk and a loss hold in memory at most: the rule of `plan.STORE_BYTES`, counted in bytes."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from networks import random_field

import fastflow as ff

pytest.importorskip("triton")

from fastflow import fused
from fastflow.kernels import plan

pytestmark = pytest.mark.interpreter  # a GPU is given the same


FEW, MANY = 1, 4  # steps
MORE = MANY - FEW
FIELDS = {
    "folded": ff.FieldSpec(1, 3, (32,) * 3, norm="layer"),
    "second-pass": ff.FieldSpec(2, 3, (64, 64), norm="layer", norm_first=True),
}


class _Peak:
    """Bytes that live at the same time, at most, of all that is allocated empty or zero: workspaces and results."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage.nbytes())
        return tensor

    def _free(self, size: int) -> None:
        self.live -= size


@contextlib.contextmanager
def counted() -> Iterator[_Peak]:
    peak = _Peak()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_zeros"),
            (torch.Tensor, "contiguous"),
        ):
            original = getattr(owner, name)
            patch.setattr(owner, name, lambda *a, original=original, **k: peak.count(original(*a, **k)))
        # The interpreter keeps a launch's arguments in cycles; when those are collected is chance.
        gc.collect()
        gc.disable()
        try:
            yield peak
        finally:
            gc.enable()


def walk_peak(spec, num_steps: int, batch: int = 64, parameters: bool = True, **options) -> int:
    """Peak bytes of a walk and its gradients."""
    device = torch.device("cpu")
    field = random_field(spec, device)
    for p in field.parameters():
        p.requires_grad_(parameters)
    x_0 = torch.randn(batch, spec.state_dim, requires_grad=True)
    cond = torch.randn(batch, spec.cond_dim, requires_grad=True)
    with counted() as peak:
        x = ff.integrate(field, x_0, cond, num_steps=num_steps, backend="fused", precision="fp32", **options)
        x.sum().backward()
    return peak.peak


def activations(spec, batch: int) -> int:
    """Bytes of one evaluation's pre-activations (and outputs, where the norm is a second pass)."""
    net = fused.network(spec, "fp32")
    return (spec.ensemble or 1) * plan.padded_rows(batch) * sum(net.padded) * 4 * (1 if net.fold else 2)


def states(spec, batch: int, method: str = "euler") -> int:
    """Bytes of one step's points."""
    return (spec.ensemble or 1) * batch * spec.state_dim * 4 * plan.evaluations(method)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_recomputing_holds_the_states_of_every_step_and_nothing_else(name, method, monkeypatch):
    spec = FIELDS[name]
    net = fused.network(spec, "fp32")
    evaluations = plan.evaluations(method)
    # One step at a time is written out for the weight gradients.
    monkeypatch.setattr(plan, "STORE_BYTES", 1)
    few, many = (walk_peak(spec, k, method=method, activations="recompute") for k in (FEW, MANY))
    table = (spec.ensemble or 1) * net.padded[0] * 4 * evaluations  # time's share of the first layer
    assert many - few <= MORE * (states(spec, 64, method) + 6 * table)
    assert 4 * states(spec, 64, method) < activations(spec, 64)


def test_gradients_of_actions_alone_hold_no_activations_per_step():
    spec = FIELDS["folded"]
    few, many = (walk_peak(spec, k, parameters=False, activations="recompute") for k in (FEW, MANY))
    assert many - few < activations(spec, 64)


@pytest.mark.parametrize("name", FIELDS)
def test_storing_holds_the_activations_of_every_step(name):
    spec = FIELDS[name]
    few, many = (walk_peak(spec, k, parameters=False, activations="store") for k in (FEW, MANY))
    assert MORE * activations(spec, 64) <= many - few <= 1.3 * MORE * activations(spec, 64)


def test_the_rule_stores_what_fits_and_can_be_overridden(monkeypatch):
    spec = FIELDS["folded"]
    one = activations(spec, 64)
    arguments = (spec, 1, 64, 4, "euler", "fp32")
    monkeypatch.setattr(plan, "STORE_BYTES", 4 * one)
    assert fused.stores(*arguments, "auto")
    assert not fused.stores(*arguments[:3], 5, *arguments[4:], "auto")
    assert fused.stores(*arguments[:3], 5, *arguments[4:], "store")
    assert not fused.stores(*arguments, "recompute")
    assert walk_peak(spec, 4, parameters=False) > walk_peak(spec, 5, parameters=False)


def test_a_loss_s_noise_is_not_stored_where_it_is_drawn():
    spec = ff.FieldSpec(100, 2, (16, 16))
    field = random_field(spec, torch.device("cpu"))
    for p in field.parameters():
        p.requires_grad_(False)
    batch, samples = 64, 16
    x_1, cond = torch.randn(batch, 100), torch.randn(batch, 2)
    noise = ff.PhiloxNoise(torch.tensor(1), torch.arange(batch), samples)

    with counted() as peak, torch.no_grad():
        rows = ff.flow_matching_loss(field, noise, x_1, None, cond, reduction="none", backend="fused", precision="fp32")
    assert rows.shape == (batch, samples)
    # Neither the noise nor one copy of x_1 or cond per sample.
    assert peak.peak < batch * samples * 100 * 4 / 2
