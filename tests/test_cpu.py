"""The native code of the CPU against the reference in float64: every field, walk, loss and gradient; and how it is
built, found and called."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from conftest import assert_close_rms, rms
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import (
    LOSS_FACTORS,
    SPECS,
    WALK_FACTORS,
    in_float64,
    name_of,
    pairwise,
    random_field,
    random_inputs,
    spec_of,
)
from passes import compare_loss, compare_walk, drawn, loss_and_gradients, loss_options, walk_and_gradients, walk_options

import fastflow as ff
from fastflow import dense, operators
from fastflow.kernels import cpu

WALKS, LOSSES = pairwise(WALK_FACTORS), pairwise(LOSS_FACTORS)
CPU = torch.device("cpu")
# Native code and eager round in different places, and either may be lucky: errors are compared over some draws.
DRAWS = 6
FLOQ = ff.FieldSpec(
    1, 42, (512,) * 4, 2, norm="layer", state_embedding=ff.HLGauss(-101.0, 1.0), time_embedding=ff.Cosine()
)

needs_native = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=f"no native code: {cpu.why_unavailable()}")


def test_this_machine_has_native_code_or_says_why():
    why = cpu.why_unavailable()
    if why is None:
        assert cpu.build().is_file()
        assert "bits" in cpu.features()
    else:
        assert why in cpu.features()


# Numerics -----------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.poison
@pytest.mark.parametrize("combination", WALKS, ids=map(name_of, WALKS))
def test_every_field_and_walk(combination):
    spec = spec_of(combination)
    inputs = random_inputs(spec, 10 if combination["samples"] else 30, combination["samples"], CPU)
    options = walk_options(combination, inputs, 2)
    compare_walk(random_field(spec, CPU), inputs, combination["precision"], "auto", DRAWS, **options)


@needs_native
@pytest.mark.poison
@pytest.mark.parametrize("combination", LOSSES, ids=map(name_of, LOSSES))
def test_every_field_and_loss(combination):
    spec = spec_of(combination)
    inputs, options = loss_options(combination, spec, CPU)
    compare_loss(random_field(spec, CPU), inputs, combination["precision"], "auto", DRAWS, **options)


@needs_native
@pytest.mark.poison
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 2, 3, 95, 97, 1030])
@pytest.mark.parametrize("name", ["scalar-identity", "floq"])
def test_any_number_of_rows(name, batch, precision):
    """Blocks of 96 rows and chunks of 512, and what is left of them."""
    field, inputs = random_field(SPECS[name], CPU), random_inputs(SPECS[name], batch, None, CPU)
    compare_walk(field, inputs, precision, "auto", DRAWS, num_steps=2)
    compare_loss(field, inputs, precision, "auto", DRAWS)


@needs_native
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    hidden=st.lists(st.integers(1, 80), min_size=1, max_size=4).map(tuple),
    state_dim=st.integers(1, 40),
    cond_dim=st.integers(0, 70),
    batch=st.integers(1, 40),
    samples=st.sampled_from([None, 1, 5]),
    num_steps=st.integers(1, 4),
    norm=st.sampled_from([None, "layer"]),
    ensemble=st.sampled_from([None, 1, 3]),
    activation=st.sampled_from(["gelu_tanh", "gelu", "silu", "elu", "mish", "tanh"]),
    precision=st.sampled_from(["fp32", "bf16"]),
)
def test_any_shape(hidden, state_dim, cond_dim, batch, samples, num_steps, norm, ensemble, activation, precision):
    torch.manual_seed(0)
    spec = ff.FieldSpec(state_dim, cond_dim, hidden, ensemble, activation, norm)
    field, inputs = random_field(spec, CPU), random_inputs(spec, batch, samples, CPU)
    compare_walk(field, inputs, precision, "auto", DRAWS, num_steps=num_steps)
    compare_loss(field, inputs, precision, "auto", DRAWS)


@needs_native
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), batch=st.integers(32, 96), num_steps=st.sampled_from([1, 4, 8, 16]))
def test_bf16_walk_of_published_size_is_within_a_percent(seed, batch, num_steps):
    torch.manual_seed(seed)
    field = random_field(FLOQ, CPU)
    x_0, cond = -10 * torch.rand(batch, 1), torch.randn(batch, 42)
    with torch.no_grad():
        walked = ff.integrate(field, x_0, cond, num_steps=num_steps, precision="bf16")
        options = dict(num_steps=num_steps, backend="reference")
        exact = ff.integrate(in_float64(field), x_0.double(), cond.double(), **options)
    assert rms(walked.double() - exact) <= 0.01 * rms(exact - x_0)


@needs_native
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_published_sizes(precision):
    field, inputs = random_field(FLOQ, CPU), random_inputs(FLOQ, 40, 4, CPU)
    compare_loss(field, inputs, precision, "auto")
    compare_walk(field, random_inputs(FLOQ, 50, None, CPU), precision, "auto", num_steps=2)


@needs_native
def test_states_outside_the_embedding_s_range_and_nan():
    field = random_field(SPECS["floq"], CPU)
    x_0 = torch.tensor([[-1e30], [-600.0], [400.0], [1e30]], requires_grad=True)
    walked = ff.integrate(field, x_0, torch.randn(4, 5), num_steps=4)
    assert torch.isfinite(walked).all()
    walked.sum().backward()
    # Clamped: the velocity does not depend on the state there. Two members share each start.
    assert torch.equal(x_0.grad, torch.full_like(x_0, 2.0))
    for activation in ("gelu_tanh", "gelu", "silu", "relu", "elu", "mish", "tanh"):
        field = random_field(ff.FieldSpec(1, 2, (8, 8), activation=activation), CPU)
        cond = torch.zeros(3, 2)
        cond[1] = float("nan")
        with torch.no_grad():
            walked = ff.integrate(field, torch.zeros(3, 1), cond, num_steps=2)
        assert walked.isnan().flatten().tolist() == [False, True, False], activation


# Same bits ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["floq", "actor", "unet"])
def test_any_number_of_threads_gives_the_same_bits(name, precision, threads):
    unet = ff.FieldSpec(3, 4, (24, 24), 2, architecture=ff.FiLMUNet((12,)), time_embedding=ff.Sinusoidal(8, (12,)))
    spec = SPECS.get(name, unet)
    field, inputs = random_field(spec, CPU), random_inputs(spec, 1300, None, CPU)

    def everything():
        walk = walk_and_gradients(field, inputs, num_steps=8, precision=precision)
        return walk | {f"loss {k}": v for k, v in loss_and_gradients(field, inputs, "auto", precision).items()}

    threads(1)
    one = everything()
    threads(2)
    two, again = everything(), everything()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
        assert torch.equal(two[key], again[key]), key


@needs_native
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["floq", "actor", "no-cond"])
def test_a_pair_s_loss_is_the_same_bits_in_any_pass_and_batch(name, precision):
    """FPO's ratio is exactly 1 before the first update: whether gradients are kept, and whatever rows stand beside."""
    spec = SPECS[name]
    field, i = random_field(spec, CPU), random_inputs(spec, 70, 3, CPU)

    def rows(some):
        parts = [None if x is None else x[some] for x in (i["x_0"], i["x_1"], i["t"], i["cond"])]
        return ff.flow_matching_loss(field, *parts, reduction="none", precision=precision)

    training = rows(slice(None))
    assert training.requires_grad
    with torch.no_grad():
        assert torch.equal(rows(slice(None)), training)
        for some in (slice(0, 1), slice(0, 7), slice(3, 8), slice(0, 65), torch.tensor([60, 2, 31, 69])):
            assert torch.equal(rows(some), training[..., some, :])


@needs_native
def test_several_fields_are_the_fields_alone():
    spec = SPECS["floq"]
    fields = [random_field(spec, CPU) for _ in range(2)]
    cond, x_0 = torch.randn(4, 7, spec.cond_dim), torch.randn(4, 7, 1)
    together = ff.integrate(fields, x_0, cond, num_steps=3)
    parts = (slice(0, 2), slice(2, 4))
    alone = [ff.integrate(f, x_0[p], cond[p], num_steps=3) for f, p in zip(fields, parts, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    parameters = [p for field in fields for p in field.parameters()]
    found = torch.autograd.grad(together.square().sum(), parameters)
    wanted = torch.autograd.grad(torch.cat(alone).square().sum(), parameters)
    for a, b in zip(found, wanted, strict=True):
        assert_close_rms("gradient", a, b, 1e-6)


@needs_native
def test_drawn_noise_is_the_noise_of_the_generator():
    spec = SPECS["actor"]
    field, noise = random_field(spec, CPU), drawn(6, 4, CPU)
    x_1, cond = torch.randn(6, spec.state_dim), torch.randn(6, spec.cond_dim)
    with torch.no_grad():
        drawn_inside = ff.flow_matching_loss(field, noise, x_1, None, cond, reduction="none")
        outside = ff.flow_matching_loss(field, noise.x_0(spec.state_dim), x_1, noise.t(), cond, reduction="none")
    assert torch.equal(drawn_inside, outside)


@needs_native
def test_strided_inputs_parameters_and_the_field_read_anew():
    spec = SPECS["actor"]
    field, other = random_field(spec, CPU), random_field(spec, CPU)
    wide, x_wide = torch.randn(9, 2 * spec.cond_dim), torch.randn(spec.state_dim, 9)
    before = wide.clone(), x_wide.clone()
    dense = (x_wide.T.contiguous(), wide[:, ::2].contiguous())

    def walk(field, *inputs):
        with torch.no_grad():
            return ff.integrate(field, *inputs, num_steps=2)

    first = walk(field, *dense)
    assert torch.equal(walk(field, x_wide.T, wide[:, ::2]), first)
    assert torch.equal(wide, before[0])
    assert torch.equal(x_wide, before[1])
    twin, wanted = copy.deepcopy(field), walk(other, *dense)
    for mine, theirs in zip(field.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs.data)  # which no version counter sees
    assert torch.equal(walk(field, *dense), wanted)
    for p in twin.parameters():
        p.data = p.data.mT.contiguous().mT if p.dim() == 2 else p.data
    assert torch.equal(walk(twin, *dense), first)


# Tiles --------------------------------------------------------------------------------------------------------------

needs_tiles = pytest.mark.skipif(not cpu.has_tiles(), reason="no AMX: compiler, processor or system lacks it")
TILE_ROWS = (1, 2, 3, 15, 16, 17, 31, 33, 127, 129)
ODD_WIDTHS = (1, 3, 17, 33, 100)

# Networks whose widths and rows fill no tile: results and all gradients, by name, in bfloat16.
ODD_NETWORKS = """
import torch
import fastflow as ff
from fastflow import dense


def outcomes(rows_of=(1, 2, 3, 15, 16, 17, 31, 33, 127, 129), widths=(1, 3, 17, 33, 100)):
    found = {}
    for i, width in enumerate(widths):
        torch.manual_seed(i)
        sizes = (width, 100 - width % 50, width, widths[-1 - i])
        shapes = list(zip(sizes[:-1], sizes[1:]))
        stack = [t for n, m in shapes for t in (torch.randn(n, m) * n**-0.5, 0.1 * torch.randn(m))]
        for norm in (None, "layer") if width > 1 else (None,):
            more = [t for m in sizes[1:-1] for t in (1 + 0.1 * torch.randn(m), 0.1 * torch.randn(m))] if norm else []
            leaves = [t.requires_grad_() for t in (*stack, *more)]
            for rows in rows_of:
                x = torch.randn(rows, width, requires_grad=True)
                y = dense.dense_stack(x, leaves, "silu", norm, precision="bf16")
                grads = torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), [x, *leaves])
                found |= {f"{width} {norm} {rows} {n}": t.detach() for n, t in enumerate((y, *grads))}
        field = ff.VelocityField(ff.FieldSpec(width, 17, (33, width), norm="layer"))
        x_0, cond = torch.randn(33, width), torch.randn(33, 17, requires_grad=True)
        x_1 = ff.integrate(field, x_0, cond, num_steps=2, precision="bf16")
        grads = torch.autograd.grad(x_1.square().sum(), [cond, *field.parameters()])
        found |= {f"walk {width} {n}": t.detach() for n, t in enumerate((x_1, *grads))}
    return found
"""


def in_a_process(code, tmp_path, environment):
    """What `code` put into `found`, in a process of its own."""
    path = tmp_path / "found.pt"
    report(environment | {"XDG_CACHE_HOME": str(tmp_path)}, f"{code}\ntorch.save(found, {str(path)!r})")
    return torch.load(path)


@pytest.fixture(scope="module")
def with_tiles():
    names: dict = {}
    exec(ODD_NETWORKS, names)
    return names["outcomes"]


@needs_tiles
def test_tiles_equal_vectors_but_for_the_order_of_sums(with_tiles, plain_environment, tmp_path):
    compiler = " ".join([*cpu.find_compiler(), "-mno-amx-tile"])
    code = ODD_NETWORKS + "from fastflow.kernels import cpu\nassert cpu.has_bf16() and not cpu.has_tiles()\n"
    vectors = in_a_process(code + "found = outcomes()", tmp_path, plain_environment | {"CXX": compiler})
    tiles = with_tiles()
    assert tiles.keys() == vectors.keys()
    for name, value in tiles.items():
        # Both round operands to the same bfloat16, unless a sum's last bit decides.
        assert rms(value - vectors[name]) <= 1e-3 * rms(vectors[name]) + 1e-6, name
    assert any(not torch.equal(value, vectors[name]) for name, value in tiles.items())


@needs_tiles
def test_where_the_system_refuses_tiles_vectors_multiply(with_tiles, plain_environment, tmp_path):
    """Linux refuses them to a process with a stack for signals that their state does not fit."""
    code = (
        ODD_NETWORKS
        + """
import ctypes
from fastflow.kernels import cpu

class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

room = ctypes.create_string_buffer(4096)
small = Stack(ctypes.addressof(room), 0, 4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(small), None) == 0
assert cpu.has_bf16() and not cpu.has_tiles() and "AMX" not in cpu.features()
found = outcomes((33,), (17, 100))
"""
    )
    vectors = in_a_process(code, tmp_path, plain_environment)
    for name, value in with_tiles((33,), (17, 100)).items():
        assert rms(value - vectors[name]) <= 1e-3 * rms(vectors[name]) + 1e-6, name


@needs_tiles
@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("width", ODD_WIDTHS)
def test_rows_have_the_same_bits_wherever_they_stand(width, norm):
    torch.manual_seed(0)
    sizes = (width, 33, width, 7)
    shapes = list(zip(sizes[:-1], sizes[1:], strict=True))
    parameters = [t for n, m in shapes for t in (torch.randn(n, m), torch.randn(m))]
    if norm:
        parameters += [t for m in sizes[1:-1] for t in (torch.randn(m), torch.randn(m))]
    x, weights = torch.randn(200, width, requires_grad=True), torch.randn(200, 7)

    def passed(some):
        y = dense.dense_stack(x[some], parameters, "silu", norm, precision="bf16")
        (d_x,) = torch.autograd.grad((y * weights[some]).sum(), x)
        return y.detach(), d_x[some]

    y, d_x = passed(slice(None))
    for rows in TILE_ROWS:
        for first in (0, 5, 64):
            some = slice(first, first + rows)
            found = passed(some)
            assert torch.equal(found[0], y[some]), (rows, first)
            assert torch.equal(found[1], d_x[some]), (rows, first)


@needs_tiles
def test_walks_of_some_rows_have_the_bits_of_all():
    field = random_field(SPECS["actor"], CPU)
    x_0, cond = torch.randn(200, 5), torch.randn(200, 6)
    frozen = ff.FrozenWalk(field, num_steps=4, precision="bf16")
    with torch.no_grad():
        whole = ff.integrate(field, x_0, cond, num_steps=4, precision="bf16")
    for rows in TILE_ROWS:
        some = slice(3, 3 + rows)
        assert torch.equal(frozen(x_0[some], cond[some]), whole[some]), rows


@needs_tiles
def test_tiles_on_any_number_of_threads(with_tiles, threads):
    threads(1)
    one = with_tiles((1, 1300), (33, 100))
    threads(2)
    two = with_tiles((1, 1300), (33, 100))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@needs_tiles
def test_torch_s_products_and_ours_take_turns(with_tiles):
    """Both configure the tiles of one thread."""
    a, b = torch.randn(37, 65).bfloat16(), torch.randn(65, 50).bfloat16()
    product, found = a @ b, with_tiles((33,))
    for _ in range(3):
        assert torch.equal(a @ b, product)
        assert all(torch.equal(value, found[name]) for name, value in with_tiles((33,)).items())


@needs_tiles
def test_tiles_after_a_fork(plain_environment):
    code = (
        ODD_NETWORKS
        + """
import os
torch.set_num_threads(1)
found = outcomes((17,), (33,))
child = os.fork()
if child == 0:
    again = outcomes((17,), (33,))
    os._exit(0 if all(torch.equal(value, again[name]) for name, value in found.items()) else 3)
print(os.waitpid(child, 0)[1])
"""
    )
    assert report(plain_environment, code) == "0"


# How it is called ---------------------------------------------------------------------------------------------------


@needs_native
def test_what_runs_a_call(monkeypatch):
    field = random_field(SPECS["actor"], CPU)
    x_0, cond = torch.randn(3, 5), torch.randn(3, 6)
    calls = []
    real = operators._kernels
    monkeypatch.setattr(operators, "_kernels", lambda runner: calls.append(runner) or real(runner))
    ff.integrate(field, x_0, cond, num_steps=2)
    assert calls == ["native"]
    ff.integrate(field, x_0, cond, num_steps=2, backend="reference")
    ff.integrate(field.double(), x_0.double(), cond.double(), num_steps=2)
    assert calls == ["native"]


@needs_native
def test_empty_batches_and_no_gradient():
    field = random_field(SPECS["actor"], CPU)
    x_0, cond = torch.zeros(0, 5), torch.zeros(0, 6)
    walked = ff.integrate(field, x_0, cond, num_steps=2)
    assert walked.shape == (0, 5)
    grads = torch.autograd.grad(walked.sum(), list(field.parameters()))
    assert all(not g.any() for g in grads)


@needs_native
def test_only_some_gradients():
    spec = SPECS["floq"]
    field, inputs = random_field(spec, CPU), random_inputs(spec, 6, 2, CPU)

    def gradient(*leaves):
        wanted = {id(leaf) for leaf in leaves}
        for p in field.parameters():
            p.requires_grad_(id(p) in wanted)
        cond = inputs["cond"].requires_grad_(id(inputs["cond"]) in wanted)
        x = ff.integrate(field, inputs["x_0"], cond, num_steps=2)
        return torch.autograd.grad(x.square().sum(), leaves)

    weight = field.layers[1].weight
    both = gradient(inputs["cond"], weight)
    assert torch.equal(gradient(inputs["cond"])[0], both[0])
    assert torch.equal(gradient(weight)[0], both[1])


# Building -----------------------------------------------------------------------------------------------------------

REPORT = """
import torch
import fastflow as ff
from fastflow.kernels import cpu
field = ff.VelocityField(ff.FieldSpec(2, 3, (8,)))
x, c = torch.zeros(4, 2), torch.zeros(4, 3)
ff.integrate(field, x, c, num_steps=2)
print(cpu.why_unavailable())
"""


def report(environment, code=REPORT):
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_without_a_compiler_the_reference_runs(plain_environment, tmp_path):
    found = report(plain_environment | {"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)})
    assert found == "no C++ compiler (no-such-compiler not found)"
    code = REPORT.replace("num_steps=2)", "num_steps=2, backend='fused')")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=plain_environment | {"CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "NotImplementedError: integrate: no fused kernel for no C++ compiler" in done.stderr


def test_a_compiler_that_fails_is_told(plain_environment, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such flag" >&2\nexit 1\n')
    compiler.chmod(0o755)
    found = report(plain_environment | {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert "failed: no such flag" in found
    assert list((tmp_path / "cache" / "fastflow").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told(plain_environment, tmp_path):
    if cpu.why_unavailable() is not None:
        pytest.skip("no compiler")
    (tmp_path / "fastflow").write_text("a file where the folder should be")
    found = report(plain_environment | {"XDG_CACHE_HOME": str(tmp_path)})
    assert "cannot be written" in found


@needs_native
def test_compiled_once_and_kept(plain_environment, tmp_path):
    environment = plain_environment | {"XDG_CACHE_HOME": str(tmp_path)}
    assert report(environment) == "None"
    (library,) = (tmp_path / "fastflow").iterdir()
    written = library.stat().st_mtime_ns
    assert report(environment) == "None"
    assert [library] == list((tmp_path / "fastflow").iterdir())
    assert library.stat().st_mtime_ns == written


def test_import_compiles_nothing(plain_environment, tmp_path):
    code = "import fastflow as ff; ff.integrate, ff.VelocityField, ff.FlowCritic; print('fine')"
    assert report(plain_environment | {"XDG_CACHE_HOME": str(tmp_path)}, code) == "fine"
    assert not (tmp_path / "fastflow").exists()


@needs_native
def test_not_another_processor_s_code(monkeypatch):
    here = cpu.build()
    monkeypatch.setattr(cpu, "processor", lambda: "another")
    monkeypatch.setattr(cpu, "_run", lambda command: (_ for _ in ()).throw(cpu.Unavailable("asked to compile")))
    with pytest.raises(cpu.Unavailable, match="asked to compile"):
        cpu.build()
    assert os.access(here, os.R_OK)
