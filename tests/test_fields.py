"""FieldSpec and VelocityField: what they refuse, how weights start, how they behave as modules."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import SPECS, random_field

import fastflow as ff
from fastflow.fields import ACTIVATIONS, PREDICTIONS

D = torch.float64

# One field per architecture, with everything that its parameter list can hold.
ARCHITECTURES = {
    "mlp": ff.FieldSpec(
        2, 3, (8, 6, 4), norm="layer", norm_first=True, time_embedding=ff.PowerFourier(6), prediction="endpoint"
    ),
    "residual": ff.FieldSpec(
        2, 3, (6,) * 5, None, "mish", "layer", time_embedding=ff.Sinusoidal(4, (5, 7)), architecture=ff.ResidualMLP(2)
    ),
    "unet": ff.FieldSpec(
        2, 3, (6, 4), None, "gelu", time_embedding=ff.Sinusoidal(4, (5, 7)), architecture=ff.FiLMUNet((3, 8))
    ),
    "unet-ensemble": ff.FieldSpec(2, 3, (6, 4), 2, "elu", architecture=ff.FiLMUNet((3, 8)), output_scale=0.25),
    "unet-no-cond": ff.FieldSpec(2, 0, (6, 4), None, "tanh", architecture=ff.FiLMUNet((3, 8)), prediction="noise"),
}

widths = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
ends = st.tuples(st.floats(-100, 100), st.floats(0.1, 100)).map(lambda pair: (pair[0], pair[0] + pair[1]))
even = st.integers(1, 6).map(lambda half: 2 * half)
time_embeddings = st.one_of(
    st.just(ff.RawTime()),
    st.just(ff.Cosine()),
    st.builds(ff.CosineFourier, st.integers(1, 9)),
    st.builds(ff.PowerFourier, even),
    st.builds(ff.Sinusoidal, even, st.just(()) | widths, st.floats(1.5, 1e5), st.floats(-1e3, 1e3)),
)


@st.composite
def specs(draw):
    """Any network that `FieldSpec` takes, small."""
    state_dim = draw(st.integers(1, 3))
    states = [st.just(ff.Identity()), ends.map(lambda pair: ff.Scaled(*pair))]
    if state_dim == 1:
        states.append(st.builds(lambda pair, *rest: ff.HLGauss(*pair, *rest), ends, st.integers(2, 9), st.floats(1, 9)))
    architecture = draw(
        st.just(ff.MLP()) | st.builds(ff.ResidualMLP, st.integers(1, 3)) | st.builds(ff.FiLMUNet, widths)
    )
    hidden = draw(widths)
    if isinstance(architecture, ff.ResidualMLP):
        hidden = hidden[:1] * (1 + architecture.depth * draw(st.integers(0, 2)))
    norm = None if isinstance(architecture, ff.FiLMUNet) else draw(st.sampled_from(["layer", None]))
    return ff.FieldSpec(
        state_dim,
        draw(st.integers(0, 3)),
        hidden,
        draw(st.none() | st.integers(1, 3)),
        draw(st.sampled_from(ACTIVATIONS)),
        norm,
        draw(st.one_of(states)),
        draw(time_embeddings),
        draw(st.floats(1e-6, 1e-2)),
        norm is not None and draw(st.booleans()),
        architecture,
        draw(st.floats(0.1, 4) | st.floats(-4, -0.1)),
        draw(st.sampled_from(PREDICTIONS)),
    )


# The spec ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_key_names_the_spec(name):
    spec = SPECS[name]
    assert ff.FieldSpec.from_key(spec.key) == spec
    assert hash(ff.FieldSpec.from_key(spec.key)) == hash(spec)


@given(spec=specs())
def test_key_names_any_spec(spec):
    again = ff.FieldSpec.from_key(spec.key)
    assert again == spec
    assert (hash(again), again.key, repr(again)) == (hash(spec), spec.key, repr(spec))
    for f in dataclasses.fields(spec):
        assert type(getattr(again, f.name)) is type(getattr(spec, f.name)), f.name


def test_equal_specs_have_equal_keys():
    """Whatever numbers were given: ints, floats or numpy's."""
    options = dict(state_dim=1, cond_dim=2, hidden=[4, 4], architecture=ff.ResidualMLP(1))
    state = ff.HLGauss(np.float32(-1), np.float64(2), np.int64(51), 16)
    mixed = ff.FieldSpec(**options, state_embedding=state, time_embedding=ff.Sinusoidal(scale=1000), output_scale=1)
    plain = ff.FieldSpec(**options, state_embedding=ff.HLGauss(-1.0, 2.0), time_embedding=ff.Sinusoidal())
    assert mixed == plain
    assert mixed.key == plain.key
    assert ff.FieldSpec.from_key(mixed.key) == mixed


def test_different_specs_have_different_keys():
    base = ARCHITECTURES["residual"]
    changes = [
        dict(state_dim=3),
        dict(cond_dim=4),
        dict(hidden=(6,) * 3),
        dict(ensemble=1),
        dict(activation="gelu"),
        dict(norm=None),
        dict(state_embedding=ff.Scaled(0.0, 1.0)),
        dict(time_embedding=ff.Sinusoidal(4, (5, 7), scale=1.0)),
        dict(norm_eps=1e-5),
        dict(norm_first=True),
        dict(architecture=ff.ResidualMLP(1)),
        dict(output_scale=0.25),
        dict(prediction="noise"),
    ]
    assert [*map(list, changes)] == [[f.name] for f in dataclasses.fields(base) if f.init]  # every option once
    others = [dataclasses.replace(base, **change) for change in changes]
    assert len({base, *others}) == len({base.key, *(other.key for other in others)}) == 1 + len(changes)


def test_sequences_of_widths_become_tuples():
    spec = ff.FieldSpec(2, 3, [6, 4], time_embedding=ff.Sinusoidal(4, [5]), architecture=ff.FiLMUNet([3]))
    assert (spec.hidden, spec.time_embedding.hidden, spec.architecture.cond_hidden) == ((6, 4), (5,), (3,))
    assert ff.FieldSpec.from_key(spec.key) == spec


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"state_dim": 0}, "state_dim must be at least 1, got 0"),
        ({"cond_dim": -1}, "cond_dim must be at least 0"),
        ({"hidden": ()}, "hidden must name at least one"),
        ({"hidden": (8, 0)}, r"hidden\[1\] must be at least 1"),
        ({"ensemble": 0}, "ensemble must be at least 1"),
        ({"activation": "gelu_new"}, "activation must be one of"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"state_dim": 2, "state_embedding": ff.HLGauss(0.0, 1.0)}, "state_dim must be 1, got 2"),
        ({"prediction": "score"}, r"prediction must be one of \('velocity', 'endpoint', 'noise'\), got 'score'"),
        ({"output_scale": 0.0}, "output_scale must be finite and not 0, got 0.0"),
        ({"output_scale": math.inf}, "output_scale must be finite and not 0, got inf"),
        ({"output_scale": math.nan}, "output_scale must be finite and not 0, got nan"),
        ({"norm_first": True}, "norm_first .* norm must be 'layer', got None"),
        ({"norm": "layer", "architecture": ff.FiLMUNet((4,))}, "FiLMUNet .* norm must be None, got 'layer'"),
        (
            {"hidden": (8, 8), "architecture": ff.ResidualMLP(2)},
            r"hidden must be 1 \+ n \* 2 equal widths, got \(8, 8\) \(2 layers\)",
        ),
        (
            {"hidden": (8, 8, 4), "architecture": ff.ResidualMLP(2)},
            r"hidden must be 1 \+ n \* 2 equal widths, got \(8, 8, 4\) \(3 layers\)",
        ),
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
        (
            {"time_embedding": ff.Identity()},
            "time_embedding must be RawTime, Cosine, CosineFourier, PowerFourier or Sinusoidal, got Identity",
        ),
        ({"time_embedding": ff.RawTime}, "time_embedding must be .*, got <class"),
        ({"architecture": "mlp"}, "architecture must be MLP, ResidualMLP or FiLMUNet, got 'mlp'"),
        ({"hidden": (8, 4.0)}, r"hidden\[1\] must be an int, got 4.0"),
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


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (ff.CosineFourier, {"dim": 0}, "CosineFourier: dim must be at least 1, got 0"),
        (ff.PowerFourier, {"dim": 0}, "PowerFourier: dim must be even and at least 2, got 0"),
        (ff.PowerFourier, {"dim": 7}, "PowerFourier: dim must be even and at least 2, got 7"),
        (ff.Sinusoidal, {"dim": 0}, "Sinusoidal: dim must be even and at least 2, got 0"),
        (ff.Sinusoidal, {"dim": 9}, "Sinusoidal: dim must be even and at least 2, got 9"),
        (ff.Sinusoidal, {"hidden": (4, 0)}, r"Sinusoidal: hidden must hold widths of at least 1, got \(4, 0\)"),
        (ff.Sinusoidal, {"hidden": (4.0,)}, r"Sinusoidal: hidden must hold widths of at least 1, got \(4.0,\)"),
        (ff.Sinusoidal, {"max_period": 1.0}, "expected max_period > 1 .*, got .*max_period=1.0"),
        (ff.Sinusoidal, {"max_period": math.inf}, "expected max_period > 1 .*, got .*max_period=inf"),
        (ff.Sinusoidal, {"max_period": math.nan}, "expected max_period > 1 .*, got .*max_period=nan"),
        (ff.Sinusoidal, {"scale": math.inf}, "finite scale, got .*scale=inf"),
        (ff.ResidualMLP, {"depth": 0}, "ResidualMLP: depth must be at least 1 layer per block, got 0"),
        (ff.FiLMUNet, {"cond_hidden": ()}, r"FiLMUNet: cond_hidden must hold widths of at least 1, got \(\)"),
        (ff.FiLMUNet, {"cond_hidden": (4, 0)}, r"FiLMUNet: cond_hidden must hold .*, got \(4, 0\)"),
        (ff.FiLMUNet, {"cond_hidden": (4.0,)}, r"FiLMUNet: cond_hidden must hold .*, got \(4.0,\)"),
    ],
)
def test_an_embedding_or_architecture_of_no_network_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


# Parameters ----------------------------------------------------------------------------------------------------------


@given(spec=specs())
def test_the_parameter_list_is_what_the_spec_says(spec):
    field = ff.VelocityField(spec, device="meta")
    parameters = field.parameter_list()
    assert len(parameters) == spec.num_parameters == len(field.state_dict())
    assert {id(p) for p in parameters} == {id(p) for p in field.parameters()}
    parts = spec.parts(parameters)
    flat = [p for part in parts for pair in part for p in pair]
    assert len(flat) == len(parameters)
    assert all(a is b for a, b in zip(flat, parameters))
    lead = () if spec.ensemble is None else (spec.ensemble,)
    for name, sizes in (
        ("layers", spec.layer_sizes),
        ("time", spec.time_sizes),
        ("encoder", spec.encoder_sizes),
        ("films", spec.film_sizes),
    ):
        shapes = [((*lead, i, o), (*lead, o)) for i, o in sizes]
        assert [(w.shape, b.shape) for w, b in getattr(parts, name)] == shapes, name
    norms = [((*lead, o), (*lead, o)) for _, o in spec.layer_sizes[:-1]] if spec.norm else []
    assert [(w.shape, b.shape) for w, b in parts.norms] == norms


@pytest.mark.parametrize(
    "changes, sizes",
    [
        (dict(), [(6, 8), (8, 6), (6, 4), (4, 2)]),
        (dict(cond_dim=0, time_embedding=ff.PowerFourier(6)), [(8, 8), (8, 6), (6, 4), (4, 2)]),
        (dict(time_embedding=ff.Sinusoidal(4, (5, 9))), [(14, 8), (8, 6), (6, 4), (4, 2)]),
        (dict(time_embedding=ff.Sinusoidal(4, ())), [(9, 8), (8, 6), (6, 4), (4, 2)]),
        (dict(state_dim=1, state_embedding=ff.HLGauss(0.0, 1.0, 11)), [(14, 8), (8, 6), (6, 4), (4, 1)]),
        (dict(hidden=(8,), architecture=ff.ResidualMLP(3)), [(6, 8), (8, 2)]),
        (dict(hidden=(8,) * 4, architecture=ff.ResidualMLP(3)), [(6, 8), (8, 8), (8, 8), (8, 8), (8, 2)]),
        (dict(hidden=(8,), architecture=ff.FiLMUNet((3,))), [(2, 8), (8, 8), (8, 2)]),
        (
            dict(architecture=ff.FiLMUNet((3,))),
            [(2, 8), (8, 6), (6, 4), (4, 4), (4 + 6, 6), (6 + 8, 8), (8, 2)],
        ),
    ],
)
def test_layer_sizes(changes, sizes):
    spec = dataclasses.replace(ff.FieldSpec(2, 3, (8, 6, 4)), **changes)
    assert spec.layer_sizes == tuple(sizes)


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


def dense_shapes(name: str, *sizes: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of a list of Dense layers as they stand in a state_dict."""
    weights = {f"{name}.{i}.weight": size for i, size in enumerate(sizes)}
    return {**weights, **{f"{name}.{i}.bias": size[1:] for i, size in enumerate(sizes)}}


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "mlp",
            dense_shapes("layers", (11, 8), (8, 6), (6, 4), (4, 2))
            | {f"norms.{i}.{kind}": (w,) for i, w in enumerate((8, 6, 4)) for kind in ("weight", "bias")},
        ),
        (
            "residual",
            dense_shapes("layers", (12, 6), *[(6, 6)] * 4, (6, 2))
            | {f"norms.{i}.{kind}": (6,) for i in range(5) for kind in ("weight", "bias")}
            | dense_shapes("time_layers", (4, 5), (5, 7)),
        ),
        (
            "unet",
            dense_shapes("layers", (2, 6), (6, 4), (4, 4), (10, 6), (6, 2))
            | dense_shapes("time_layers", (4, 5), (5, 7))
            | dense_shapes("encoder", (3, 3), (3, 8))
            | dense_shapes("films", (15, 12), (15, 8), (15, 8), (15, 12)),
        ),
        (
            "unet-no-cond",
            dense_shapes("layers", (2, 6), (6, 4), (4, 4), (10, 6), (6, 2))
            | dense_shapes("films", (1, 12), (1, 8), (1, 8), (1, 12)),
        ),
    ],
)
def test_parameter_names_and_shapes_of_each_architecture(name, expected):
    shapes = {k: tuple(v.shape) for k, v in ff.VelocityField(ARCHITECTURES[name], device="meta").state_dict().items()}
    assert shapes == expected
    members = ff.VelocityField(dataclasses.replace(ARCHITECTURES[name], ensemble=3), device="meta").state_dict()
    assert {k: tuple(v.shape) for k, v in members.items()} == {k: (3, *shape) for k, shape in expected.items()}


def test_td_flow_s_network_has_7_million_parameters():
    """The sizes and the count of the paper's U-Net for a state of 4 and an action of 2."""
    state, cond, h, time = 4, 6, 512, 256
    spec = ff.FieldSpec(
        state, cond, (h,) * 3, activation="mish", time_embedding=ff.Sinusoidal(time), architecture=ff.FiLMUNet()
    )

    def dense(i: int, o: int) -> int:
        return i * o + o

    trunk = dense(state, h) + 3 * dense(h, h) + 2 * dense(2 * h, h) + dense(h, state)
    films = 6 * dense(h + time, 2 * h)
    expected = trunk + films + dense(cond, h) + 2 * dense(h, h) + 2 * dense(time, time)
    got = sum(p.numel() for p in ff.VelocityField(spec, device="meta").parameters())
    assert got == expected
    assert round(got / 1e6, 2) == 7.23


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


@pytest.mark.poison
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_part_starts_glorot_uniform(name):
    field = ff.VelocityField(dataclasses.replace(ARCHITECTURES[name], ensemble=40))
    parts = field.spec.parts(field.parameter_list())
    for kind, pairs in parts._asdict().items():
        for weight, bias in pairs:
            assert not bias.any(), kind
            if kind == "norms":
                assert (weight == 1).all()
                continue
            bound = math.sqrt(6 / sum(weight.shape[-2:]))
            assert 0.9 * bound < weight.abs().max() <= bound, kind
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15), kind
            assert len({member.sum().item() for member in weight}) == 40, kind


@pytest.mark.parametrize("name", ["floq", *ARCHITECTURES])
def test_reset_with_a_generator_repeats(name):
    spec = (SPECS | ARCHITECTURES)[name]
    fields = []
    for _ in range(2):
        field = random_field(spec, torch.device("cpu"))  # nothing at its initial value
        field.reset_parameters(torch.Generator().manual_seed(3))
        fields.append(field.state_dict())
    assert all(torch.equal(fields[0][k], fields[1][k]) for k in fields[0])
    field.reset_parameters(torch.Generator().manual_seed(4))
    weights = [k for k in fields[0] if k.endswith("weight") and not k.startswith("norms")]
    assert all(not torch.equal(fields[0][k], field.state_dict()[k]) for k in weights)


# Modules -------------------------------------------------------------------------------------------------------------


def inputs_of(spec: ff.FieldSpec, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """x_t [4, D], t [4] and cond [4, C]."""
    return (
        torch.randn(4, spec.state_dim, dtype=dtype),
        torch.rand(4, dtype=dtype),
        torch.randn(4, spec.cond_dim).to(dtype),
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_module_conventions_of_each_architecture(name):
    spec = ARCHITECTURES[name]
    field = random_field(spec, torch.device("cpu"))
    args = inputs_of(spec)
    v = field(*args)

    clone = copy.deepcopy(field)
    assert torch.equal(clone(*args), v)
    assert clone.spec == spec
    assert not {p.data_ptr() for p in clone.parameters()} & {p.data_ptr() for p in field.parameters()}

    fresh = ff.VelocityField(spec, device="meta")
    assert all(p.is_meta for p in fresh.parameters())
    assert fresh(*(x.to("meta") for x in args)).shape == v.shape
    fresh.to_empty(device="cpu").load_state_dict(field.state_dict(), strict=True)
    assert torch.equal(fresh(*args), v)

    other = random_field(spec, torch.device("cpu"))
    assert not torch.equal(other(*args), v)
    assert torch.equal(torch.func.functional_call(other, dict(field.named_parameters()), args), v)

    v.sum().backward()
    unused = {name for name, p in field.named_parameters() if p.grad is None or not p.grad.any()}
    assert not unused


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


def test_a_field_takes_a_spec():
    with pytest.raises(TypeError, match="spec must be a FieldSpec, got dict"):
        ff.VelocityField({"state_dim": 1})


@pytest.mark.parametrize("name", ["residual", "unet", "unet-ensemble"])
def test_gradients_of_the_velocity_are_exact(name):
    spec = dataclasses.replace(ARCHITECTURES[name], prediction="endpoint", output_scale=0.5)
    if spec.time_features > 1:  # scale 1000 is too steep for finite differences
        spec = dataclasses.replace(spec, time_embedding=ff.Sinusoidal(4, (5, 7), scale=3.0))
    field = random_field(spec, torch.device("cpu"), D)
    names = [name for name, _ in field.named_parameters()]

    def velocity(x, t, cond, *parameters):
        return torch.func.functional_call(field, dict(zip(names, parameters)), (x, t, cond))

    inputs = [x[:2].requires_grad_() for x in inputs_of(spec, D)]
    assert torch.autograd.gradcheck(velocity, (*inputs, *field.parameters()))


@pytest.mark.parametrize("name", ["mlp", "unet", "unet-ensemble"])
def test_a_missing_cond_is_refused(name):
    x, t, cond = inputs_of(ARCHITECTURES[name])
    field = ff.VelocityField(ARCHITECTURES[name])
    for none in (None, cond[:, :0]):
        with pytest.raises(ValueError, match=r"velocity: cond must be \[\.\.\., 3\], got None"):
            field(x, t, none)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("name", ["floq", "unet-ensemble"])
def test_states_of_another_ensemble_are_refused(name, members):
    """One member's walk for two networks, or three for two."""
    spec = (SPECS | ARCHITECTURES)[name]
    x, t, cond = inputs_of(spec)
    with pytest.raises(ValueError, match=rf"velocity: x_t must be \[2, \.\.\., D\], got \[{members}, 4, "):
        ff.VelocityField(spec)(x.expand(members, *x.shape), t, cond)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-6])
def test_norm_eps_is_a_number_to_divide_by(bad):
    with pytest.raises(ValueError, match="norm_eps must be finite and not negative"):
        ff.FieldSpec(1, 1, norm_eps=bad)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ff.HLGauss(0.0, 1.0, bins=51.0), "bins"),
        (lambda: ff.CosineFourier(8.0), "dim"),
        (lambda: ff.PowerFourier(8.0), "dim"),
        (lambda: ff.Sinusoidal(8.0), "dim"),
        (lambda: ff.ResidualMLP(2.0), "depth"),
    ],
)
def test_sizes_are_ints(make, name):
    with pytest.raises(TypeError, match=f"{name} must be an int"):
        make()
