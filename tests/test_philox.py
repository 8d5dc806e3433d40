"""The counter-based noise: published Philox vectors, the distributions, and equal bits from PyTorch and the kernels."""

from __future__ import annotations

import collections
import json
import math
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from conftest import HAS_GPU

from fastflow.philox import MASK, PhiloxNoise, normal, philox, uniform

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # the tests of PyTorch alone do without
    pass
else:
    from fastflow.kernels.noise import philox_normal, philox_uniform

    @triton.jit
    def noise_kernel(seed_ptr, ids_ptr, x_0_ptr, t_ptr, M, samples, D, BM: tl.constexpr, DP: tl.constexpr):
        o_b = tl.program_id(0) * BM + tl.arange(0, BM)
        o_d = tl.arange(0, DP)
        m_b = o_b < M
        seed = tl.load(seed_ptr)
        b_id = tl.load(ids_ptr + o_b // samples, mask=m_b, other=0)
        b_s = o_b % samples
        b_x = philox_normal(seed, b_id[:, None], b_s[:, None], o_d[None, :])
        tl.store(x_0_ptr + o_b[:, None] * D + o_d[None, :], b_x, mask=m_b[:, None] & (o_d < D)[None, :])
        tl.store(t_ptr + o_b, philox_uniform(seed, b_id, b_s), mask=m_b)

    @triton.jit
    def roots_kernel(x_ptr, BM: tl.constexpr):
        p_x = x_ptr + tl.arange(0, BM)
        tl.store(p_x, tl.sqrt_rn(tl.load(p_x)))


ROOT = pathlib.Path(__file__).parents[1]
TRITONS = sorted(str(p.parent) for p in (ROOT / ".triton").glob("*/.complete")) or [None]
SEEDS = [0, -1, 20110928, 2**63 - 1, -(2**63), 1 - 2**40]


def noise(seed=3, batch=40, samples=3, device="cpu"):
    """Row ids of every size, negative ones and neighbours on both sides of 2**32 among them."""
    edges = torch.tensor([0, 1, -1, MASK, MASK + 1, MASK + 2, 2**63 - 1, -(2**63)])
    wide = torch.randint(-(2**63), 2**63 - 1, (max(0, batch - len(edges)),))
    ids = torch.cat([edges, wide])[:batch]
    return PhiloxNoise(torch.tensor(seed, device=device), ids.to(device), samples)


def random_bits(count):
    return torch.randint(0, MASK + 1, (count,))


@pytest.mark.parametrize(
    "key, counter, words",
    [
        ("00000000 00000000", "00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff", "ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("a4093822 299f31d0", "243f6a88 85a308d3 13198a2e 03707344", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(key, counter, words):
    low, high = (int(word, 16) for word in key.split())
    signed = high - 2**32 if high >= 2**31 else high
    found = philox(torch.tensor(signed * 2**32 + low), *(torch.tensor(int(word, 16)) for word in counter.split()))
    assert " ".join(f"{word:08x}" for word in found) == words


def test_counters_broadcast():
    c0, c1, c2, c3 = torch.randint(0, MASK + 1, (4, 5))
    seed = torch.tensor(-7)
    words = philox(seed, c0.view(5, 1, 1), c1.view(5, 1, 1), c2.view(5, 1), c3)
    for i, j, k in ((0, 0, 0), (4, 1, 3), (2, 4, 0)):
        alone = philox(seed, c0[i], c1[i], c2[j], c3[k])
        assert [w[i, j, k].item() for w in words] == [w.item() for w in alone]


def test_uniform_is_the_high_24_bits():
    bits = torch.tensor([0, 255, 256, 1 << 31, MASK])
    u = uniform(bits)
    assert u.dtype == torch.float32
    assert u.tolist() == [0.0, 0.0, 2.0**-24, 0.5, 1 - 2.0**-24]


def test_normal_is_box_muller_to_one_part_in_a_million():
    edges = torch.tensor([0, 1, 255, 256, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 3 * 2**30, MASK - 256, MASK - 255, MASK])
    bits_a, bits_b = (torch.cat([edges.repeat(12), random_bits(1 << 18)]) for _ in range(2))
    bits_a[:144] = edges.repeat_interleave(12)
    u, v = ((bits_a >> 8).double() + 1) * 2.0**-24, (bits_b.double() + 0.5) * 2.0**-32
    exact = (-2 * u.log()).sqrt() * (2 * math.pi * v).cos()
    z = normal(bits_a, bits_b)
    assert z.dtype == torch.float32
    assert (z - exact).abs().max() < 1e-6
    assert (z - exact).square().mean().sqrt() < 2e-7


def test_the_bits_do_not_change():
    """What a seed and an id have meant they mean for ever: results in print depend on it."""
    pinned = PhiloxNoise(torch.tensor(-1), torch.tensor([0, 2**40 + 7]), 2)
    assert pinned.x_0(2).view(torch.int32).tolist() == [
        [[1066180296, 1056621995], [-1083438456, -1089743251]],
        [[1065525778, -1074550523], [1069027197, 1059178833]],
    ]
    assert pinned.t().view(torch.int32).tolist() == [[1059727502, 1061170263], [1039749736, 1061569248]]


def test_shapes_and_types():
    n = noise(batch=5, samples=3)
    assert n.x_0(4).shape == (5, 3, 4)
    assert n.t().shape == (5, 3)
    assert n.x_0(4).dtype == n.t().dtype == torch.float32
    empty = PhiloxNoise(n.seed, n.ids[:0], 2)
    assert empty.x_0(1).shape == (0, 2, 1)
    assert empty.t().shape == (0, 2)


def test_a_row_s_noise_does_not_depend_on_its_batch():
    n = noise()
    x_0, t = n.x_0(5), n.t()
    order = torch.randperm(len(n.ids))
    shuffled = PhiloxNoise(n.seed, n.ids[order], 3)
    assert torch.equal(shuffled.x_0(5), x_0[order])
    assert torch.equal(shuffled.t(), t[order])
    for i in range(len(n.ids)):  # alone, with fewer samples and dimensions
        alone = PhiloxNoise(n.seed, n.ids[i : i + 1], 1)
        assert torch.equal(alone.x_0(1)[0], x_0[i, :1, :1])
        assert torch.equal(alone.t()[0], t[i, :1])


def test_every_part_of_the_counter_and_of_the_key_counts():
    n = noise(batch=8, samples=4)
    everything = [n.x_0(4).flatten(), n.t().flatten()]
    for seed in (n.seed + 1, n.seed + 2**32, -n.seed):
        everything.append(PhiloxNoise(seed, n.ids, 4).x_0(4).flatten())
    values = torch.cat(everything)
    assert len(values.unique()) > len(values) - 3  # two of 400 may meet by chance


def assert_distributed(values, cumulative):
    """Kolmogorov and Smirnov's distance within what the Dvoretzky-Kiefer-Wolfowitz inequality allows at 1e-6."""
    ordered = cumulative(values.flatten().double().sort().values)
    count = len(ordered)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    assert distance < math.sqrt(math.log(2 / 1e-6) / (2 * count))


@pytest.mark.parametrize("seed", [0, -1])
def test_distributions_over_consecutive_ids(seed):
    n = PhiloxNoise(torch.tensor(seed), torch.arange(10_000), 4)
    x_0, t = n.x_0(5), n.t()
    assert_distributed(x_0, torch.special.ndtr)
    assert_distributed(t, lambda u: u)
    assert t.min() >= 0
    assert t.max() < 1
    z = x_0.double().flatten()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean() - moment) < 5 * math.sqrt(variance / len(z)), f"moment {power}"


def test_neighbours_in_every_direction_are_uncorrelated():
    n = PhiloxNoise(torch.tensor(5), torch.arange(20_000), 3)
    x_0, t = n.x_0(3).double(), (n.t().double() - 0.5) * math.sqrt(12)
    other = PhiloxNoise(n.seed + 1, n.ids, 3).x_0(3).double()
    pairs = {
        "ids": (x_0[1:], x_0[:-1]),
        "samples": (x_0[:, 1:], x_0[:, :-1]),
        "dimensions": (x_0[..., 1:], x_0[..., :-1]),
        "seeds": (x_0, other),
        "x_0 and t": (x_0[..., 0], t),
        "squares of x_0 and t": ((x_0[..., 0].square() - 1) / math.sqrt(2), t),
        "t of ids": (t[1:], t[:-1]),
    }
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean()) < 5 / math.sqrt(a.numel()), name


SEED, IDS = torch.tensor(0), torch.arange(4)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((0, IDS, 1), TypeError, "seed must be an int64 tensor, got int"),
        ((SEED, [0], 1), TypeError, "ids must be an int64 tensor, got list"),
        ((SEED.int(), IDS, 1), TypeError, r"seed must be an int64 tensor, got torch\.int32"),
        ((SEED, IDS.float(), 1), TypeError, r"ids must be an int64 tensor, got torch\.float32"),
        ((IDS, IDS, 1), ValueError, r"seed must be 0-d, got shape \(4,\)"),
        ((SEED, IDS.view(2, 2), 1), ValueError, r"ids must be 1-d \[B\], got shape \(2, 2\)"),
        ((SEED, IDS.to("meta"), 1), ValueError, "ids must be on the device of seed, cpu, got meta"),
        ((SEED, IDS, 1.0), TypeError, "samples must be an int, got float"),
        ((SEED, IDS, True), TypeError, "samples must be an int, got bool"),
        ((SEED, IDS, 0), ValueError, "samples must be at least 1, got 0"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=f"^PhiloxNoise: {message}$"):
        PhiloxNoise(*arguments)


def test_errors_name_the_dimension():
    with pytest.raises(ValueError, match=r"^PhiloxNoise: dim must be at least 1, got 0$"):
        noise().x_0(0)
    with pytest.raises(TypeError, match=r"^PhiloxNoise: dim must be an int, got float$"):
        noise().x_0(1.5)


def draw(seed, ids):
    n = PhiloxNoise(seed, ids, 3)
    return n.x_0(5), n.t()


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_with_the_same_bits(backend):
    torch._dynamo.reset()
    compiled = torch.compile(draw, fullgraph=True, dynamic=True, backend=backend)
    for batch in (40, 33, 7):
        n = noise(-9, batch)
        for actual, expected in zip(compiled(n.seed, n.ids), draw(n.seed, n.ids)):
            assert torch.equal(actual, expected)


def test_function_transforms():
    n = noise()
    seeds = torch.tensor(SEEDS)
    for actual, *expected in zip(
        torch.vmap(draw, in_dims=(0, None))(seeds, n.ids), *(draw(seed, n.ids) for seed in seeds)
    ):
        assert torch.equal(actual, torch.stack(expected))
    gradient = torch.func.grad(lambda w: (n.x_0(5) @ w).sum())(torch.ones(5))
    torch.testing.assert_close(gradient, n.x_0(5).sum((0, 1)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("batch, samples, dim", [(40, 3, 5), (70, 1, 1), (9, 8, 16)])
def test_the_kernels_give_the_same_bits(seed, batch, samples, dim, device):
    pytest.importorskip("triton")
    n = noise(seed, batch, samples)
    x_0, t = (
        torch.full((batch, samples, dim), math.nan, device=device),
        torch.full((batch, samples), math.nan).to(device),
    )
    rows = batch * samples
    noise_kernel[(triton.cdiv(rows, 32),)](
        n.seed.to(device), n.ids.to(device), x_0, t, rows, samples, dim, BM=32, DP=triton.next_power_of_2(dim)
    )
    assert torch.equal(x_0.cpu(), n.x_0(dim))
    assert torch.equal(t.cpu(), n.t())


@pytest.mark.poison
@pytest.mark.parametrize("seed", SEEDS)
def test_times_drawn_again_have_the_same_bits(seed, device):
    pytest.importorskip("triton")
    from fastflow.kernels.draw import draw_times

    for batch, samples in ((300, 3), (1, 1)):
        n = noise(seed, batch, samples)
        found = draw_times(n.seed.to(device), n.ids.to(device), samples)
        assert torch.equal(found.cpu(), n.t())


def print_contractible():
    """Count what may be, or come of, a contracted product and sum in the assembly of both kernels, for each target."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"seed_ptr": "*i64", "ids_ptr": "*i64", "x_0_ptr": "*fp32", "t_ptr": "*fp32", "x_ptr": "*fp32"}
    for target, stages in (
        (GPUTarget("cuda", 90, 32), ("ptx", "sass")),
        (GPUTarget("hip", "gfx942", 64), ("amdgcn",)),
    ):
        # As many roots as normals, for a root is made of such operations.
        for kernel, constants in ((noise_kernel, {"BM": 64, "DP": 8}), (roots_kernel, {"BM": 512})):
            signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            compiled = triton.compile(source, target=target, options={"num_warps": 4, "enable_fp_fusion": True})
            for stage in stages:
                found = re.findall(
                    r"\b(?:(?:fma|add|sub)(?=[.\w]*\.f32)|F(?:FMA|ADD)\b|v_(?:fma|fmac|mad|mac|add|sub)_f32)",
                    compiled.asm[stage],
                )
                print(json.dumps([triton.__version__, stage, kernel.__name__, collections.Counter(found)]))


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="on a machine with a GPU the kernels themselves run")
@pytest.mark.parametrize("version", TRITONS, ids=lambda t: pathlib.Path(t).name if t else "installed")
def test_no_compiler_can_contract_the_arithmetic(version, plain_environment):
    """All sums are of integers: beyond the square roots' own, there is no fused or plain float32 sum."""
    pytest.importorskip("triton")
    # Set, for importing conftest would set it otherwise.
    environment = plain_environment | {"TRITON_INTERPRET": "0", "PYTHONPATH": version or ""}
    code = "import sys; sys.path.insert(0, 'tests'); import test_philox; test_philox.print_contractible()"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    found = {(stage, kernel): count for _, stage, kernel, count in map(json.loads, run.stdout.splitlines())}
    assert len(found) == 6
    assert found["ptx", "noise_kernel"] == {}
    assert found["sass", "roots_kernel"]["FFMA"] > 0
    for stage in ("sass", "amdgcn"):
        assert found[stage, "noise_kernel"] == found[stage, "roots_kernel"], stage


@pytest.mark.gpu
@pytest.mark.slow
def test_cuda_gives_the_bits_of_the_cpu(device):
    n = noise(-4, batch=5000)
    expected = draw(n.seed, n.ids)
    for function in (draw, torch.compile(draw, fullgraph=True)):
        for actual, cpu in zip(function(n.seed.to(device), n.ids.to(device)), expected):
            assert torch.equal(actual.cpu(), cpu)
