"""Every launch, with the arguments that the launchers give, through Triton's own specialisation and compiler: no GPU
needed.

The interpreter takes any argument. What a GPU would be handed (types, alignment, constexpr values, launch options) is
only seen by the compiler, which here compiles for a GPU that is not there; nothing is launched. No tensor's value may
go to the host on the way: that is what capture in a CUDA graph asks of a call.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
from conftest import HAS_GPU

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(HAS_GPU, reason="on a machine with a GPU the kernels themselves run"),
]

ROOT = pathlib.Path(__file__).parents[1]
TRITONS = sorted(str(p.parent) for p in (ROOT / ".triton").glob("*/.complete")) or [None]
IDS = [pathlib.Path(t).name if t else "installed" for t in TRITONS]

SCRIPT = """
import collections, json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

class Absent:
    '''A driver that knows what it would compile for.'''
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_active_torch_device(self): return torch.device("cpu")

driver.set_active(Absent())
run, found = jit.JITFunction.run, collections.defaultdict(set)

def compile_only(self, *args, grid, warmup, **options):
    compiled = run(self, *args, grid=grid, warmup=True, **options)
    assert compiled.metadata.shared <= 232_448, (self.fn.__name__, compiled.metadata.shared)
    # Times are rounded as torch rounds them.
    assert compiled.metadata.enable_fp_fusion == (self.fn.__name__ != "features_kernel")
    assert compiled.metadata.launch_cooperative_grid == (self.fn.__name__ == "walk_group_kernel")
    found[self.fn.__name__].add(compiled.hash)

jit.JITFunction.run = compile_only
import fastflow as ff
from fastflow import fused
from fastflow.kernels import backward, integrate, launch, matching, plan

for module in (integrate, matching, backward):
    module.target = lambda device: (90, 132)
def host(*args, **options):
    raise AssertionError("a value of a tensor went to the host: no CUDA graph could be captured")

for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
    setattr(torch.Tensor, name, host)
specs = [
    ff.FieldSpec(1, 5, (64, 64), 2, norm="layer", state_embedding=ff.HLGauss(-21.0, 1.0), time_embedding=ff.Cosine()),
    ff.FieldSpec(4, 6, (32, 32), None, "mish", architecture=ff.FiLMUNet((20, 12)), time_embedding=ff.Sinusoidal(8,
    (12,))), ff.FieldSpec(3, 0, (32, 16), None, "elu", "layer", time_embedding=ff.PowerFourier(4),
    prediction="endpoint"), ff.FieldSpec(2, 4, (32,) * 3, None, "silu", "layer", norm_first=True,
    architecture=ff.ResidualMLP(2)), ff.FieldSpec(1, 5, (256, 256), 2, norm="layer", time_embedding=ff.Cosine()),
]
specs += specs[-1:]
spec, precision = specs[int(sys.argv[1])], sys.argv[2]
if launch.RING:
    plan.groups = lambda *_: None
members, none = spec.ensemble or 1, torch.empty(0)
parameters = ff.VelocityField(spec).parameter_list()
parameters = [p.detach() for p in parameters]
counts = []
for batch in (1, 5, 16, 77):
    x, t = torch.randn(members, batch, 2, spec.state_dim), torch.rand(members, batch, 2)
    cond = torch.randn(1, batch, spec.cond_dim)
    for steps in (1, 2, 16):
        walk = (spec, steps, 0.0, 1.0, "midpoint", precision)
        for times in ((None, None), (t, t)):
            kept = fused.walk(x, cond, parameters, *times, None, *walk, True, False)
            fused.walk_bwd(x, None, cond, parameters, *times, list(kept[1:]), *walk, False, [True, True, True, False])
        fused.walk(x, cond, parameters, None, None, None, spec, steps, 0.0, 1.0, "euler", precision, False, False)
    for start, rows_t, keys in ((x, t, (None, None)), (none, none, (torch.tensor(3), torch.arange(batch)))):
        loss = (cond, parameters, *keys, spec, precision, True, 0.0)
        kept = fused.loss(start, x, rows_t, *loss, True, True)
        fused.loss_bwd(t, start, x, rows_t, cond, parameters, *keys, list(kept[1:]), *loss[4:], [True] * 4)
    counts.append({name: len(hashes) for name, hashes in found.items()})
print(json.dumps({"triton": triton.__version__, "counts": counts}))
"""


@pytest.mark.parametrize("triton", TRITONS, ids=IDS)
@pytest.mark.parametrize(
    ("spec", "precision"),
    [(0, "bf16"), (0, "tf32"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (4, "bf16"), (5, "bf16")],
    ids=["floq", "floq-tf32", "td-flow", "uneven", "residual", "few rows", "ring"],
)
def test_launches_compile_once_for_any_number_of_rows_and_steps(spec, precision, triton):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    if triton:
        env["PYTHONPATH"] = triton
    env["FASTFLOW_RING"] = str(int(spec == 5))
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(spec), precision]
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    first, *later = found["counts"]
    for name in ("integrate_fwd_kernel", "matching_fwd_kernel", "backward_kernel"):
        assert first[name] >= 2, name
        # More rows may choose larger tiles: never more kernels than that.
        assert later[-1][name] <= 3 * first[name], (name, found["counts"])
    assert later[-1].get("walk_group_kernel", 0) == (spec == 4)
    assert later[-1].get("walk_ring_kernel", 0) == (spec == 5)
    # From 1 row on, rows and steps alone compile nothing while the tiles stay: 1 and 5 rows have the same.
    assert later[0] == first
