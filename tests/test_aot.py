"""Every kernel compiles for every arch within the plan's bounds, and docs/kernels.json says so of the present kernels.

No GPU is needed.

Compiled by the oldest and the newest supported triton, which `make test` puts beside the environment, else by the one
installed: a part of the record here, all of it by the command that writes it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from conftest import HAS_GPU

pytest.importorskip("triton")

from fastflow.kernels import aot, plan

ROOT = pathlib.Path(__file__).parents[1]
RECORD = ROOT / "docs" / "kernels.json"
TRITONS = sorted(str(p.parent) for p in (ROOT / ".triton").glob("*/.complete")) or [None]
IDS = [pathlib.Path(t).name if t else "installed" for t in TRITONS]

compiles = pytest.mark.skipif(HAS_GPU, reason="on a machine with a GPU the kernels themselves run")


def all_of(*marks):
    return lambda test: functools.reduce(lambda t, mark: mark(t), marks, test)


ahead_of_time = all_of(compiles, pytest.mark.aot, pytest.mark.slow)


def compiled_with(triton: str | None, code: str, given: object = None) -> str:
    """What code prints that compiles with a triton, `given` as JSON on its stdin."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    if triton:
        env["PYTHONPATH"] = triton
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, input=json.dumps(given), capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


# The record ----------------------------------------------------------------------------------------------------------


def test_the_record_is_of_these_kernels_and_tiles():
    found = aot.stale(RECORD)
    assert not found, (
        f"docs/kernels.json is not of these kernels; bring it up to date with\n\n    {aot.COMMAND}\n\n"
        + ("\n".join([*found[:10], f"... {len(found)} in all"]))
    )


def test_the_page_shows_the_record():
    page = (ROOT / "docs" / "kernels.md").read_text("utf-8")
    assert aot.markdown(aot.load(RECORD)).strip() in page, f"docs/kernels.md is older than the record: {aot.COMMAND}"


def test_every_recorded_row_is_within_its_bounds():
    rows = [row for row in aot.load(RECORD) if row.tiles is not None]
    assert {row.field for row in rows} | {"2048-1536-1024"} == set(aot.FIELDS)
    results = [(row, *result) for row in rows for result in row.results.items()]
    for row, version, found in results:
        why = aot.fits(aot.Work(row.field, row.kernel, row.arch, row.tiles), found)
        assert why is None, f"{row.field} {row.kernel} {plan.name_of(row.arch)} {row.tiles} triton {version}: {why}"


def test_a_row_depends_on_code_and_arguments_alone(tmp_path, monkeypatch):
    text = (
        "from .b import helper\n"
        "@triton.jit\n"
        "def kernel(x_ptr, N: tl.constexpr):\n"
        '    """What it does."""\n'
        "    tl.store(x_ptr, helper(N))  # why\n"
    )
    functions, imports = aot.device_functions(text)
    assert imports == {"helper": "b"}
    same = text.replace("What it does.", "Otherwise.").replace("  # why", "").replace("from", "import os\n\nfrom")
    assert aot.device_functions(same)[0] == functions
    assert aot.device_functions(text.replace("helper(N)", "helper(N + 1)"))[0] != functions
    assert aot.device_functions(text.replace("tl.store", "if N:\n        tl.store"))[0] != functions
    work = aot.matrix(fields=["floq"], arches=[90])[0]
    other = work._replace(tiles=dataclasses.replace(work.tiles, num_stages=work.tiles.num_stages + 1))
    assert (
        len({aot.fingerprint(w) for w in (work, other, work._replace(arch=80), work._replace(field="floq-256"))}) == 4
    )


# The plan ------------------------------------------------------------------------------------------------------------


def networks():
    """One of each kind at every width and precision, and with as many features as there may be."""
    for base, width, precision in itertools.product(
        ("floq", "fql-actor", "floq-resnet", "floq-resnet-norm-first", "td-flow"),
        (8, 16, 32, 64, 100, 128, 256, 300, 512, 700, 1024),
        ("bf16", "tf32", "fp32"),
    ):
        net = aot.FIELDS[base]
        net = dataclasses.replace(net, hidden=(width,) * net.layers, precision=precision)
        yield net
        if net.state_dim > 1:
            yield dataclasses.replace(net, state_dim=128, state_features=128, time_features=256)


def test_every_network_has_tiles_or_a_reason_on_every_arch():
    missing = set()
    for arch in (80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121, plan.GFX942):
        for net in networks():
            why = plan.why_unsupported_on(net, arch)
            entries = [plan.candidates(kernel, arch, net) for kernel in plan.KERNELS]
            assert (why is None) == all(entries)
            if why is not None:
                missing.add((plan.family(arch), net.element_size))
                assert f"{net.precision} products 1024 wide" in why and plan.name_of(arch) in why
            for t in itertools.chain(*entries):
                assert plan.ROW_PAD % t.rows == 0
                for width in net.padded:
                    assert width % min(t.columns, width) == 0
            for some in entries:
                assert [t.rows for t in some] == sorted({t.rows for t in some}, reverse=True)
    # Rows of 4 KB, times 16, twice.
    assert missing == {(86, 4), (120, 4)}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dict(hidden=(2048, 1536, 1024, 512)), "a hidden width of 2048 (at most 1024)"),
        (dict(state_dim=129), "a state of 129 dimensions (at most 128)"),
        (dict(time_features=300), "300 time features (at most 256)"),
        (dict(state_features=257), "257 state features (at most 256)"),
    ],
)
def test_what_fits_nowhere_says_why(change, why):
    net = dataclasses.replace(aot.FIELDS["floq"], **change)
    for arch in (None, *aot.ARCHES):
        assert plan.why_unsupported_on(net, arch) == why
    assert plan.why_unsupported(net, None) == why


def test_depth_has_a_limit():
    for layers, width, why in ((17, 64, "17 hidden layers (at most 16)"), (16, 64, None)):
        net = aot._chain(aot.FLOQ, *(width,) * layers)
        assert plan.why_unsupported_on(net, 90) == why
    net = aot._chain(aot.FLOQ, *(64,) * 8, 32)
    assert plan.why_unsupported_on(net, 90) == "9 hidden layers (at most 8 of unequal width or with two inputs)"


def test_gpus_without_kernels_say_why():
    assert plan.why_unsupported_on(aot.FLOQ, 75) == "compute capability 7.5 (8.0 and up have one)"
    assert "AMD GPU other than gfx942" in plan.why_unsupported_on(aot.FLOQ, 0)
    assert "7.5" in plan.describe(75) and "gfx942" in plan.describe(0) and "reference" in plan.describe(None)


@pytest.mark.parametrize("arch", [*aot.ARCHES, 87, 103, 121], ids=plan.name_of)
def test_the_plan_in_words_has_every_entry_and_what_falls_back(arch):
    text = plan.describe(arch)
    assert text.startswith(plan.name_of(arch))
    assert f"{plan.SHARED_MEMORY[plan.family(arch)]:,} bytes" in text
    for kind in plan.KINDS.values():
        assert kind in text
    assert ("tf32, fp32 products wider than 512" in text) == (plan.family(arch) in (86, 120))
    for wanted in ("falls back everywhere", "1024", "float64", "second derivatives"):
        assert wanted in text


def test_few_rows_get_small_tiles_and_many_rows_large_ones():
    for kernel, (arch, sms) in itertools.product(plan.KERNELS, ((80, 108), (90, 132), (100, 148), (plan.GFX942, 304))):
        few, many, any_number = (plan.choose(kernel, arch, sms, aot.FLOQ, rows) for rows in (64, 2**17, None))
        assert few.rows == 16
        assert many.rows >= 32
        assert many == any_number == plan.candidates(kernel, arch, aot.FLOQ)[0]


def test_hopper_multiplies_no_narrow_columns_by_warpgroup():
    # triton issue 11366: products with 32 columns by warpgroups read beyond shared memory.
    for net in networks():
        for kernel in plan.KERNELS:
            for t in plan.candidates(kernel, 90, net):
                assert t.rows < 64 or min(t.columns, *net.padded) >= 64


# Resources -----------------------------------------------------------------------------------------------------------

# What is compiled here, of the record's rows: every kernel's first entry for the published critic, and each other kind
# of field and precision once.
SUBSET = [
    ("floq", "integrate_fwd"),
    ("floq", "matching_fwd-keep-save"),
    ("floq", "backward-loss-weights"),
    ("floq", "backward-recompute-weights"),
    ("floq-tf32", "integrate_fwd"),
    ("floq-fp32", "matching_fwd-keep-save"),
    ("floq-resnet-norm-first", "backward-loss-weights"),
    ("td-flow", "matching_fwd-keep-save"),
    ("fpo", "matching_fwd-draw-keep-save"),
]


@ahead_of_time
@pytest.mark.parametrize("triton", TRITONS, ids=IDS)
@pytest.mark.parametrize("arch", aot.ARCHES, ids=plan.name_of)
def test_resources_on_every_arch(arch, triton):
    # Everything on one arch of each maker's and size of shared memory, the published critic on their likes.
    subset = SUBSET if arch in (80, 90, plan.GFX942) else SUBSET[:4]
    work = [aot.Work(field, kernel, arch, aot.entries(kernel, field, arch)[0]) for field, kernel in subset]
    found = list(aot.compile_all(work, triton, jobs=1))
    assert len(found) == len(work)
    for row, version, taken, _ in found:
        where = f"{row.field} {row.kernel} {plan.name_of(arch)} {row.tiles}"
        assert not isinstance(taken, str), f"{where}: {taken}"
        assert triton is None or version == pathlib.Path(triton).name
        assert aot.fits(row, taken) is None, f"{where}: {aot.fits(row, taken)}"
        if arch == 90 and row.tiles.rows == 64 and not row.field.endswith("fp32"):
            assert "HGMMA" in taken.opcodes, f"{where}: warpgroups multiply 64 rows on Hopper"


# Compilers' traps ----------------------------------------------------------------------------------------------------

LOWER = """
import json, sys
from fastflow.kernels import aot, plan
for kernel, sizes, arch, tiles in json.load(sys.stdin):
    net = plan.Network(**{name: aot._tuples(value) for name, value in sizes.items()})
    compiled = aot.lower(kernel, net, arch, plan.Tiles(*tiles))
    found = {name: compiled.asm[name] for name in ("ttir", "ttgir")} | {"shared": compiled.metadata.shared}
    print(json.dumps(found | aot.dataclasses.asdict(aot.resources(compiled, arch))))
"""
NARROW_UNET = dataclasses.replace(aot.UNET, hidden=(64,) * 6)


@functools.cache
def lowered(triton: str | None, *work: tuple) -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    if triton:
        env["PYTHONPATH"] = triton
    asked = [
        (
            kernel,
            dataclasses.asdict(net),
            arch,
            dataclasses.astuple(plan.candidates(kernel.partition("-")[0], arch, net)[0]),
        )
        for kernel, net, arch in work
    ]
    run = subprocess.run(
        [sys.executable, "-c", LOWER], env=env, input=json.dumps(asked), capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def dots(ttir: str) -> list[tuple[str, str, str, str]]:
    """(definition of A, of B, of the accumulator, the rest of the line) of every product."""
    defined, found = {}, []
    for line in ttir.splitlines():
        match = re.match(r"\s*(%\w+)(?::\d+)? = (.*)", line)
        if match is None:
            continue
        name, what = match.groups()
        product = re.match(r"tt\.dot (%[\w#]+), (%[\w#]+), (%[\w#]+)(.*)", what)
        if product is not None:
            found.append((*(defined.get(x, "an argument of a loop") for x in product.groups()[:3]), product[4]))
        defined[name] = what
    return found


@ahead_of_time
@pytest.mark.parametrize("triton", TRITONS, ids=IDS)
def test_products_are_one_at_a_time_and_in_the_stored_type(triton):
    fields = [
        aot.FLOQ,
        dataclasses.replace(aot.FLOQ, precision="tf32"),
        dataclasses.replace(aot.FLOQ, precision="fp32"),
    ]
    work = [("backward-recompute-weights-midpoint-rows", NARROW_UNET, 100)]
    work += [("backward-loss-recompute-weights", net, arch) for net, arch in zip(fields, (100, 90, 80), strict=True)]
    for (_, net, _), found in zip(work, lowered(triton, *work), strict=True):
        products = dots(found["ttir"])
        assert len(products) >= 5
        for a, b, accumulator, rest in products:
            # triton issue 10821: of two products that follow each other in one accumulator, one is lost.
            assert not accumulator.startswith("tt.dot"), rest
            # Operands upcast in registers would go through shared memory at twice the size, or not by matrix units.
            stored = "bf16" if net.precision == "bf16" else "f32"
            assert len(re.findall(rf"x{stored}>", rest.partition("->")[0])) == 2, rest
            assert not a.startswith("arith.extf") and not b.startswith("arith.extf"), rest
            assert ("inputPrecision = tf32" in rest) == (net.precision == "tf32"), rest
        # A pointer of a whole block becomes a descriptor, and hundreds of bytes of stack in some versions.
        assert "tt.make_tensor" not in found["ttir"]


@ahead_of_time
@pytest.mark.parametrize("triton", TRITONS, ids=IDS)
def test_memory_does_not_grow_with_layers_and_weights_are_loaded_ahead(triton):
    deep = aot._chain(aot.FLOQ, *(512,) * 8)
    work = [("integrate_fwd", net, arch) for arch in (80, 90) for net in (aot.FIELDS["floq-2-layers"], deep)]
    found = lowered(triton, *work)
    for two, eight in (found[:2], found[2:]):
        assert two["shared"] == eight["shared"]
        assert len(re.findall(r"tt\.dot|warp_group_dot ", two["ttgir"])) == len(
            re.findall(r"tt\.dot|warp_group_dot ", eight["ttgir"])
        )
    # Where the pipeline has three stages a tile of weights is under way during the product with the one before: the
    # wait leaves copies unfinished. Two stages wait for all of them.
    assert re.search(r"async_wait .*num = [1-9]", found[0]["ttgir"])


@ahead_of_time
@pytest.mark.parametrize("triton", TRITONS, ids=IDS)
def test_the_embedding_is_computed_once_per_row_and_feature(triton):
    # A scalar head that sums whole rows gives its layout to the state: every feature was computed sixteen times over.
    norm_first = dataclasses.replace(aot.FLOQ, norm="before")
    folded, unfolded = lowered(triton, ("integrate_fwd", aot.FLOQ, 90), ("integrate_fwd", norm_first, 90))
    assert unfolded["opcodes"]["FFMA"] < 2 * folded["opcodes"]["FFMA"]


COUNT = """
import dataclasses, json, sys
sys.path.insert(0, "tests")
import epilogue_kernels as kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastflow.kernels import aot, pack, plan
for name, changes in json.load(sys.stdin):
    net, kernel = dataclasses.replace(aot.FLOQ, **changes), getattr(kernels, name)
    arithmetic = "fast" if net.precision == "bf16" else "exact"
    shape = pack.net_shape(net, True, plan.Tiles(64, 64, 4, 1))._replace(ARITH=arithmetic)
    signature = {n: "*fp32" if n.endswith("_ptr") else "fp32" for n in kernel.arg_names} | {"NET": "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1)}
    source = ASTSource(fn=kernel, signature=signature, constexprs={"NET": shape}, attrs=aligned)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(sum(instruction != "NOP" for _, instruction, _ in aot.disassembled(compiled)) / 32)
"""
# Per element, with its load and store; "bf16" is what counts, as its products leave least time.
EPILOGUES = {
    ("activate_kernel", "gelu_tanh", "bf16"): 7,
    ("activate_kernel", "silu", "bf16"): 5,
    ("activate_kernel", "elu", "bf16"): 10,
    ("activate_kernel", "relu", "bf16"): 3,
    ("activate_kernel", "gelu_tanh", "tf32"): 18,
    ("activate_grad_kernel", "gelu_tanh", "bf16"): 14,
    ("activate_grad_kernel", "silu", "bf16"): 9,
    ("embed_kernel", "gelu_tanh", "bf16"): 32,
}


@ahead_of_time
@pytest.mark.parametrize("triton", TRITONS, ids=IDS)
def test_epilogues_take_few_instructions(triton):
    asked = [(kernel, {"activation": act, "precision": precision}) for kernel, act, precision in EPILOGUES]
    found = dict(zip(EPILOGUES, map(float, compiled_with(triton, COUNT, asked).split()), strict=True))
    assert all(n <= EPILOGUES[which] for which, n in found.items()), found


INNER = """
import json, sys
from fastflow.kernels import aot
for kernel in json.load(sys.stdin):
    tiles = aot.entries(kernel, "floq", 90)[0]
    code = aot.disassembled(aot.lower(kernel, aot.FLOQ, 90, tiles))
    bodies = [[name for at, name, _ in code if a <= at <= b] for a, b in aot.innermost(aot.loops_of(code))]
    body = max(bodies, key=lambda names: names.count("HGMMA"))
    elements = tiles.rows * tiles.columns / (32 * tiles.num_warps)
    print(body.count("HGMMA"), len(body) / elements, body.count("BAR"))
"""


@ahead_of_time
@pytest.mark.parametrize("triton", TRITONS, ids=IDS)
def test_inner_loops_take_few_instructions_and_barriers(triton):
    # A tile of 64 x 64 of a layer of 512 on Hopper: products, weights on their way, epilogue. triton 3.9 takes more.
    most = {"integrate_fwd": 23, "matching_fwd-keep-save": 25, "backward-loss-weights": 24}
    if triton and pathlib.Path(triton).name == "3.9.0":
        most = {"integrate_fwd": 29, "matching_fwd-keep-save": 31, "backward-loss-weights": 29}
    printed = compiled_with(triton, INNER, list(most))
    for (kernel, bound), line in zip(most.items(), printed.splitlines(), strict=True):
        products, instructions, barriers = map(float, line.split())
        assert products == 32 and instructions <= bound and barriers <= 5, (kernel, line)


def test_no_block_pointers_or_descriptors():
    for path in (ROOT / "kernels").glob("*.py"):
        assert not re.search(r"make_block_ptr|make_tensor_descriptor|tl\.advance", path.read_text("utf-8")), path.name


@ahead_of_time
def test_no_kernel_is_compiled_per_number_of_steps_or_rows(plain_environment):
    code = (
        "from fastflow.kernels import aot\n"
        "for kernel in ('integrate_fwd', 'matching_fwd', 'backward', 'walk_group'):\n"
        "    function, types, constants = aot.arguments(kernel, aot.FLOQ, 90, aot.plan.Tiles(64, 64, 8, 2))\n"
        "    integers = [p for p in function.params if types.get(p.name) == 'i32' and p.name not in constants]\n"
        "    assert {'M', 'MP', 'samples'} <= {p.name for p in integers}, integers\n"
        "    for p in integers:\n"
        "        assert p.do_not_specialize and not p.is_constexpr, (kernel, p.name)\n"
        "print('run-time arguments')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], env=plain_environment, capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "run-time arguments\n", run.stderr[-2000:]


# Launches of a loss, a walk and their way back, recorded and not run; then all but the large kernels compiled.
AROUND = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import fastflow as ff
from fastflow import ops

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", int: "i32", float: "fp32"}
launched = {}

def kind(x):
    if type(x) is tuple:
        return tuple(map(kind, x))
    return TYPES.get(x.dtype if isinstance(x, torch.Tensor) else type(x), str(x))

def record(kernel, *args, grid, warmup, **options):
    given = dict(zip(kernel.arg_names, args)) | options
    launched[kernel.__name__, str([kind(given[name]) for name in kernel.arg_names])] = kernel, given

triton.JITFunction.run = record
ops._INTERPRETED = True
critic = dict(norm="layer", state_embedding=ff.HLGauss(-101.0, 1.0), time_embedding=ff.Cosine())
for spec, dtype, precision in (
    (ff.FieldSpec(1, 42, (512,) * 4, 2, **critic), torch.float32, "bf16"),
    (ff.FieldSpec(5, 37, (256, 128), None), torch.bfloat16, "bf16"),
    (ff.FieldSpec(3, 0, (64,), None, time_embedding=ff.PowerFourier(8)), torch.float32, "tf32"),
    (ff.FieldSpec(5, 37, (512,) * 3, norm="layer", architecture=ff.ResidualMLP(1)), torch.float32, "bf16"),
    (ff.FieldSpec(30, 38, (512,), activation="mish", architecture=ff.FiLMUNet((512, 512)),
    time_embedding=ff.Sinusoidal()), torch.float32, "bf16"),
):
    field, x = ff.VelocityField(spec).to(dtype), torch.zeros(8, spec.state_dim, dtype=dtype)
    cond = torch.zeros(8, spec.cond_dim, dtype=dtype, requires_grad=True) if spec.cond_dim else None
    options = dict(backend="fused", precision=precision)
    noise = ff.PhiloxNoise(torch.tensor(1), torch.arange(8), 2)
    ff.flow_matching_loss(field, noise, x, None, cond, **options).backward()
    ff.integrate(field, x, cond, num_steps=3, **options).sum().backward()
from fastflow.agents.backup import Backup
for q_agg, rule in (("min", "distributional"), ("mean", "expected")):
    z, row = torch.zeros(2, 8, 4), torch.zeros(8)
    told = Backup(q_agg, rule, "policy", 0.99, 0.5, (-2.0, 1.0), (-1.0, 0.0))
    told(z, z, {"rewards": row, "masks": row}, row, "triton")
for (name, _), (kernel, given) in launched.items():
    if name in ("integrate_fwd_kernel", "matching_fwd_kernel", "backward_kernel"):
        continue
    constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
    types = {name: "constexpr" if name in constants else kind(given[name]) for name in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attrs = {(i,): aligned for i, x in enumerate(types.values()) if x[0] == "*"}
    attrs |= {(i, j): aligned for i, x in enumerate(types.values()) if type(x) is tuple for j in range(len(x))}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attrs)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=given["num_warps"]))
    print(name)
"""


@ahead_of_time
@pytest.mark.parametrize("triton", TRITONS, ids=IDS)
def test_what_surrounds_the_kernels_compiles(triton, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)} | ({"PYTHONPATH": triton} if triton else {})
    run = subprocess.run([sys.executable, "-c", AROUND], env=env, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    names = ("fold_network", "first_layer", "cond_operands", "unfold_network", "draw_times")
    names += ("features", "dense", "dense_bwd", "backup")
    assert set(run.stdout.split()) == {f"{name}_kernel" for name in names}
