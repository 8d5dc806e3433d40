"""Frozen walks, policies and critics: the same numbers as what they were made from; later changes do not reach them."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from networks import SPECS, random_field, random_inputs

import fastflow as ff

CPU = torch.device("cpu")
UNET = ff.FieldSpec(3, 4, (24, 24), 2, architecture=ff.FiLMUNet((12,)), time_embedding=ff.Sinusoidal(8, (12,)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("name", [*SPECS, "unet"])
def test_a_frozen_walk_is_the_walk(name, samples, precision):
    spec = SPECS.get(name, UNET)
    field, inputs = random_field(spec, CPU), random_inputs(spec, 5, samples, CPU)
    x_0, cond = inputs["x_0"], inputs["cond"]
    if samples and spec.ensemble and not spec.cond_dim:
        x_0 = x_0.expand(spec.ensemble, *x_0.shape)
    options = dict(num_steps=3, method="midpoint", t_0=0.1, t_1=0.8, precision=precision)
    noise = 0.1 * torch.randn(3, *x_0.shape)
    walk = ff.FrozenWalk(field, **options)
    with torch.no_grad():
        wanted = [ff.integrate(field, x_0, cond, step_noise=n, **options) for n in (None, noise)]
    for n, expected in zip((None, noise), wanted, strict=True):
        found = walk(x_0, cond, step_noise=n)
        assert torch.equal(found, expected)
        assert not found.requires_grad
    # What it was made from goes on without it, and so do copies of it.
    twins = [copy.deepcopy(walk), pickle.loads(pickle.dumps(walk))]
    with torch.no_grad():
        for p in field.parameters():
            p.data.add_(1.0)
    del field
    gc.collect()
    for each in (walk, *twins):
        assert torch.equal(each(x_0, cond), wanted[0])


def test_one_row_and_strided_rows():
    field = random_field(SPECS["actor"], CPU)
    walk = ff.FrozenWalk(field, num_steps=4)
    wide, x_wide = torch.randn(9, 12), torch.randn(5, 9)
    with torch.no_grad():
        for rows in (slice(0, 1), slice(None)):
            expected = ff.integrate(field, x_wide.T[rows], wide[rows, ::2], num_steps=4)
            assert torch.equal(walk(x_wide.T[rows], wide[rows, ::2]), expected)
            assert torch.equal(walk(x_wide.T[rows].contiguous(), wide[rows, ::2].contiguous()), expected)


def test_several_fields_and_the_reference():
    fields = [random_field(SPECS["floq"], CPU) for _ in range(2)]
    x_0, cond = torch.randn(4, 7, 1), torch.randn(4, 7, 5)
    for backend in ("auto", "reference"):
        walk = ff.FrozenWalk(fields, num_steps=3, backend=backend)
        with torch.no_grad():
            assert torch.equal(walk(x_0, cond), ff.integrate(fields, x_0, cond, num_steps=3, backend=backend))


def test_inputs_that_do_not_fit_are_named():
    field = random_field(SPECS["actor"], CPU)
    walk = ff.FrozenWalk(field, num_steps=4)
    with pytest.raises(ValueError, match=r"x_0 must be \[\.\.\., 5\], got \[3, 4\]"):
        walk(torch.zeros(3, 4), torch.zeros(3, 6))
    with pytest.raises(ValueError, match="cond must be"):
        walk(torch.zeros(3, 5), torch.zeros(3, 7))
    with pytest.raises(ValueError, match="x_0 must be"):
        walk(torch.zeros(3, 5), torch.zeros(4, 6))
    with pytest.raises(TypeError, match="x_0 must have the field's dtype"):
        walk(torch.zeros(3, 5).double(), torch.zeros(3, 6))
    with pytest.raises(ValueError, match="cond must be"):
        walk(torch.zeros(3, 5))
    for options, error in (
        (dict(num_steps=0), ValueError),
        (dict(num_steps=2, method="rk4"), ValueError),
        (dict(num_steps=2, t_1=torch.ones(3)), TypeError),
    ):
        with pytest.raises(error):
            ff.FrozenWalk(field, **options)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_policy(lead):
    policy = ff.FlowPolicy(7, 2, hidden=(16, 16), num_steps=5)
    frozen = policy.freeze()
    assert isinstance(frozen, ff.FrozenFlowPolicy)
    obs, noise, steps = torch.randn(*lead, 7), torch.randn(*lead, 2), 0.1 * torch.randn(5, *lead, 2)
    with torch.no_grad():
        assert torch.equal(frozen(obs, noise), policy(obs, noise))
        assert torch.equal(frozen(obs, deterministic=True), policy(obs, deterministic=True))
        assert torch.equal(frozen(obs, noise, step_noise=steps), policy(obs, noise, step_noise=steps))
        drawn = [p(obs, generator=torch.Generator().manual_seed(3)) for p in (policy, frozen)]
        assert torch.equal(*drawn)
        assert torch.equal(policy.freeze(num_steps=2)(obs, noise), policy(obs, noise, num_steps=2))
        before = frozen(obs, noise)
        policy.field.layers[0].weight.data.mul_(2)
        assert torch.equal(frozen(obs, noise), before)
    with pytest.raises(ValueError, match=r"FlowPolicy: obs must be \[\.\.\., 7\]"):
        frozen(torch.zeros(3, 6))


@pytest.mark.parametrize("ensemble", [None, 2])
def test_critic(ensemble):
    critic = ff.FlowCritic(
        7, 2, value_range=(-2.0, 1.0), noise_range=(-1.0, 0.0), hidden=(16, 16), ensemble=ensemble, num_samples=4
    )
    frozen = critic.freeze()
    assert isinstance(frozen, ff.FrozenFlowCritic)
    obs, action, noise = torch.randn(5, 7), torch.randn(5, 2), torch.rand(5, 3)
    with torch.no_grad():
        before = critic(obs, action, noise)
        assert torch.equal(frozen(obs, action, noise), before)
        drawn = [c(obs, action, generator=torch.Generator().manual_seed(3)) for c in (critic, frozen)]
        assert torch.equal(*drawn)
        for p in critic.parameters():
            p.mul_(1.5)
        assert torch.equal(frozen(obs, action, noise), before)
    assert not frozen(obs, action.requires_grad_(), noise).requires_grad


def test_in_the_middle_of_training():
    """Parameters with a history, and a gradient graph around the copy."""
    field = random_field(SPECS["actor"], CPU)
    scale = torch.ones((), requires_grad=True)
    swapped = {name: p * scale for name, p in field.named_parameters()}
    x_0, cond = torch.randn(3, 5), torch.randn(3, 6)
    found = []
    field.register_forward_pre_hook(lambda module, args: found.append(ff.FrozenWalk(module, num_steps=2)))
    torch.func.functional_call(field, swapped, (x_0, torch.zeros(3), cond))
    assert torch.equal(found[0](x_0, cond), ff.integrate(field, x_0, cond, num_steps=2).detach())
