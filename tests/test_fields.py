"""FieldSpec and VelocityField: what they refuse, how weights start, how they behave as modules."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from networks import SPECS

import fastflow as ff


@pytest.mark.parametrize("name", SPECS)
def test_key_names_the_spec(name):
    spec = SPECS[name]
    assert ff.FieldSpec.from_key(spec.key) == spec
    assert hash(ff.FieldSpec.from_key(spec.key)) == hash(spec)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"state_dim": 0}, "state_dim must be at least 1, got 0"),
        ({"cond_dim": -1}, "cond_dim must be at least 0"),
        ({"hidden": ()}, "hidden must name at least one"),
        ({"hidden": (8, 0)}, r"hidden\[1\] must be at least 1"),
        ({"ensemble": 0}, "ensemble must be at least 1"),
        ({"activation": "gelu"}, "activation must be one of"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"state_dim": 2, "state_embedding": ff.HLGauss(0.0, 1.0)}, "state_dim must be 1, got 2"),
    ],
)
def test_a_spec_of_no_network_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ff.FieldSpec(1, 3), **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"state_dim": 1.0}, "state_dim must be an int"),
        ({"ensemble": True}, "ensemble must be an int"),
        ({"state_embedding": "hl_gauss"}, "state_embedding must be"),
        ({"time_embedding": ff.Identity()}, "time_embedding must be"),
    ],
)
def test_a_spec_of_wrong_types_is_refused(changes, message):
    with pytest.raises(TypeError, match=message):
        dataclasses.replace(ff.FieldSpec(1, 3), **changes)


@pytest.mark.parametrize("low, high", [(1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (math.nan, 1.0)])
@pytest.mark.parametrize("kind", [ff.HLGauss, ff.Scaled])
def test_a_range_must_be_finite_and_ordered(kind, low, high):
    with pytest.raises(ValueError, match="finite low < high"):
        kind(low, high)


@pytest.mark.parametrize("options, message", [({"bins": 1}, "bins"), ({"sigma": 0.0}, "sigma")])
def test_hl_gauss_options(options, message):
    with pytest.raises(ValueError, match=message):
        ff.HLGauss(0.0, 1.0, **options)


def test_parameter_names_and_shapes():
    names = {k: tuple(v.shape) for k, v in ff.VelocityField(SPECS["floq"]).state_dict().items()}
    assert names == {
        "layers.0.weight": (2, 56, 24),
        "layers.0.bias": (2, 24),
        "layers.1.weight": (2, 24, 24),
        "layers.1.bias": (2, 24),
        "layers.2.weight": (2, 24, 24),
        "layers.2.bias": (2, 24),
        "layers.3.weight": (2, 24, 1),
        "layers.3.bias": (2, 1),
        **{f"norms.{i}.{kind}": (2, 24) for i in range(3) for kind in ("weight", "bias")},
    }
    assert ff.VelocityField(SPECS["actor"]).layers[0].weight.shape == (12, 16)


def test_weights_start_glorot_uniform_per_member_and_biases_zero():
    field = ff.VelocityField(ff.FieldSpec(1, 299, (400,), 2, norm="layer", time_embedding=ff.Cosine()))
    weight = field.layers[0].weight
    bound = math.sqrt(6 / (301 + 400))
    assert weight.abs().max() <= bound
    for member in weight:
        assert member.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not torch.equal(weight[0], weight[1])
    assert not any(layer.bias.any() for layer in field.layers)
    assert (field.norms[0].weight == 1).all()
    assert not field.norms[0].bias.any()


def test_reset_with_a_generator_repeats():
    fields = []
    for _ in range(2):
        field = ff.VelocityField(SPECS["floq"])
        field.reset_parameters(torch.Generator().manual_seed(3))
        fields.append(field.state_dict())
    assert all(torch.equal(fields[0][k], fields[1][k]) for k in fields[0])


def test_module_conventions():
    field = ff.VelocityField(SPECS["floq"])
    clone = copy.deepcopy(field)
    clone.load_state_dict(field.state_dict(), strict=True)
    x, t, cond = torch.randn(4, 1), torch.rand(4), torch.randn(4, 5)
    assert torch.equal(clone(x, t, cond), field(x, t, cond))
    assert clone.double()(x.double(), t.double(), cond.double()).dtype == torch.float64
    assert ff.VelocityField(SPECS["floq"], device="meta").layers[0].weight.is_meta
    assert "HLGauss" in repr(field)


def test_velocity_of_one_call():
    field = ff.VelocityField(SPECS["floq"])
    assert field(torch.randn(4, 1), torch.tensor(0.5), torch.randn(4, 5)).shape == (2, 4, 1)
    single = ff.VelocityField(SPECS["actor"])
    assert single(torch.randn(3, 4, 5), torch.rand(3, 4), torch.randn(3, 4, 6)).shape == (3, 4, 5)
