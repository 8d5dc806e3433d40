"""Kernels on calls of any shape."""

from __future__ import annotations

import pytest
import torch
from conftest import HAS_GPU, assert_close_rms
from networks import SPECS, random_field, random_inputs

import fastflow as ff

pytest.importorskip("triton")
pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=16)
@given(
    batch=st.integers(1, 70),
    samples=st.one_of(st.none(), st.integers(1, 5)),
    num_steps=st.integers(1, 4),
    name=st.sampled_from(["actor", "no-cond", "wide-state", "scalar-identity"]),
    cond_of=st.sampled_from(["rows", "members"]),
    start_of=st.sampled_from(["rows", "members"]),
)
def test_walk_and_loss_of_any_shape(batch, samples, num_steps, name, cond_of, start_of):
    device = torch.device("cuda" if HAS_GPU else "cpu")
    spec = SPECS[name]
    field = random_field(spec, device)
    i = random_inputs(spec, batch, samples, device)
    members, rows = spec.ensemble, (batch, samples or 1)
    x_0, cond = i["x_0"].reshape(*rows, -1), i["cond"]
    if members and start_of == "members":
        x_0 = torch.randn(members, *rows, spec.state_dim, device=device)
    elif members:
        x_0 = x_0.expand(members, *x_0.shape)
    if members and spec.cond_dim and cond_of == "members":
        cond = torch.randn(members, batch, spec.cond_dim, device=device)
    results = {}
    for backend in ("fused", "reference"):
        options = dict(backend=backend, precision="fp32")
        x = ff.integrate(field, x_0, cond, num_steps=num_steps, **options)
        loss = ff.flow_matching_loss(field, x_0, x_0 + 1, torch.full(rows, 0.3, device=device), cond, **options)
        results[backend] = [x, *torch.autograd.grad(x.sum() + loss, list(field.parameters()))]
    for found, wanted in zip(results["fused"], results["reference"], strict=True):
        assert_close_rms("result", found, wanted, 2e-5)
