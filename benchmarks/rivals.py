"""The ways to compute a case: fastflow's, and what its users would otherwise write. All are checked before being timed.

A rival is a function of a problem and a precision that returns a Variant, or raises Skipped with the reason. To add
one, write such a function and put it in RIVALS. Precisions are as in `fastflow.integrate`: "bf16" rounds the operands
of matrix products to bfloat16 and keeps everything else float32, "tf32" and "fp32" say how float32 is multiplied and
need `global_precision` around plain PyTorch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastflow as ff
from benchmarks.cases import Case, Problem, worst
from benchmarks.measure import Entry, Timer
from fastflow import reference
from fastflow.fused import network
from fastflow.kernels import launch, plan

# A rival that errs more than so many times as much as eager PyTorch in the same precision is not timed, and fastflow is
# called wrong; below the floor everything counts as equally accurate.
RIVAL_TIMES, FUSED_TIMES, ERROR_FLOOR = 4.0, 2.0, 2e-6


class Skipped(Exception):
    """A rival that cannot run here; the message says why."""


@dataclass
class Variant:
    """One way to compute a problem.

    Args:
        name: the rival's.
        call: one computation, which may return before it is done; its result is only handed on.
        results: computes once and returns what `Problem.errors` takes.
        capturable: whether `call` consists of torch's own CUDA work without waiting, so that a CUDA graph can hold it.
        finish: waits for the result of the last call; by default for the whole torch device.
    """

    name: str
    call: Callable[[], Any]
    results: Callable[[], dict[str, Tensor]]
    capturable: bool = False
    finish: Callable[[Any], None] | None = None

    def entry(self, timer: Timer) -> Entry:
        """What a caller pays per call, by the wall clock."""
        return Entry(self.name, self.call, self.finish or timer.finish)


Rival = Callable[[Problem, str], Variant]


# fastflow and PyTorch -----------------------------------------------------------------------------------------------


def _named(problem: Problem, result: Any) -> dict[str, Tensor]:
    """A call's result under the names that `Problem.errors` expects; copies, because graphs write over theirs."""
    names = (problem.case.output, *problem.leaves)
    return {name: x.clone() for name, x in zip(names, result, strict=True)}


def torch_variant(name: str, problem: Problem, function: Callable[..., Tensor], compiled: bool = False) -> Variant:
    """A variant that calls `function` as a training loop would: with all gradients that the case names, or none."""
    inputs, leaves = problem.inputs, list(problem.leaves.values())

    def call() -> Any:
        if compiled:
            # Without it the graphs of mode="reduce-overhead" take the next call for a part of this one.
            torch.compiler.cudagraph_mark_step_begin()
        if not leaves:
            with torch.no_grad():
                return (function(**inputs),)
        out = function(**inputs)
        return (out.detach(), *torch.autograd.grad(out, leaves, problem.given))

    return Variant(name, call, lambda: _named(problem, call()), capturable=not compiled)


def fused(problem: Problem, precision: str) -> Variant:
    """fastflow: kernels on CUDA and where Triton's interpreter is asked for, else plain PyTorch inside one operator."""
    kernels = problem.device.type == "cuda" or (launch.interpreted() and importlib.util.find_spec("triton") is not None)
    backend = "fused" if kernels else "auto"

    def run(**inputs: Tensor) -> Tensor:
        return problem.case.run(problem.field, inputs, backend, precision)

    return torch_variant("fused", problem, run)


def ring(problem: Problem, precision: str) -> Variant:
    """fastflow with FASTFLOW_RING=1, for walks that this changes."""
    if problem.device.type != "cuda":
        raise Skipped("a kernel that Triton's interpreter does not run")
    case, (arch, sms) = problem.case, launch.target(problem.device)
    net = network(case.spec, precision)
    plain = case.kind == "integrate" and case.method == "euler" and not (case.gradient or case.end_times)
    if not plain or plan.ring(arch, net) is None:
        raise Skipped("not a walk that the ring covers")
    if plan.groups(arch, sms, net, case.spec.ensemble or 1, case.rows, True):
        raise Skipped("few rows, which go by groups")

    def run(**inputs: Tensor) -> Tensor:
        with mock.patch.object(launch, "RING", True):
            return case.run(problem.field, inputs, "fused", precision)

    return torch_variant("ring", problem, run)


def _plain(problem: Problem, precision: str) -> Callable[..., Tensor]:
    """The case in plain PyTorch: a batched product per layer and step, library activations and LayerNorm."""
    case, field, spec = problem.case, problem.field, problem.case.spec
    lead = () if spec.ensemble is None else (spec.ensemble,)

    def every_member(x: Tensor) -> Tensor:
        return x.expand(*lead, *x.shape)

    def every_sample(x: Tensor) -> Tensor:
        return x if case.samples is None else x.unsqueeze(-2)

    def walk(x_0: Tensor, cond: Tensor, t_1: float | Tensor = 1.0) -> Tensor:
        parameters = field.parameter_list()
        if precision == "bf16":
            # Once per walk, as autocast's cache does it, not once per step.
            norms = {id(p) for pair in spec.parts(parameters).norms for p in pair}
            parameters = [p if id(p) in norms else p.bfloat16() for p in parameters]
        options = {"t_1": t_1, "method": case.method, "precision": precision}
        return reference.integrate(spec, parameters, every_member(x_0), every_sample(cond), case.num_steps, **options)

    def velocity_loss(x_t: Tensor, cond: Tensor, target_velocity: Tensor, t: Tensor) -> Tensor:
        given = (t, target_velocity, every_sample(cond), precision)
        rows = reference.matching_rows(spec, field.parameter_list(), every_member(x_t), *given)
        return rows if case.pairs else rows.mean()

    def loss(x_0: Tensor, cond: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
        x_t, target = reference.interpolate(x_0, every_sample(x_1) if case.pairs else x_1, t)
        return velocity_loss(x_t, cond, target, t)

    return {"integrate": walk, "matching": loss, "velocity": velocity_loss}[case.kind]


def eager(problem: Problem, precision: str) -> Variant:
    """PyTorch as it is."""
    return torch_variant("eager", problem, _plain(problem, precision))


def eager_batched(problem: Problem, precision: str) -> Variant:
    """PyTorch as it is, all members in one batched product (baddbmm) per layer: the usual way to write an ensemble.

    Raises:
        Skipped: a network that is no plain MLP, or no ensemble; a walk that is not by Euler to 1.
    """
    case, spec = problem.case, problem.case.spec
    if spec.ensemble is None or not isinstance(spec.architecture, ff.MLP) or spec.norm_first or spec.time_sizes:
        raise Skipped("batched products are written for ensembles of plain MLPs")
    other = case.kind == "velocity" or case.pairs or case.method != "euler" or case.end_times
    if other or spec.prediction != "velocity":
        raise Skipped("batched products are written for Euler walks to 1 and flow-matching losses")
    parts = spec.parts(problem.field.parameter_list())

    def velocity(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        time = spec.time_embedding.features(t)
        state = spec.state_embedding.features(x)
        shared = (cond.expand(*x.shape[:-1], cond.shape[-1]), state, time.expand(*x.shape[:-1], time.shape[-1]))
        h = torch.cat(shared, -1)
        for i, layer in enumerate(parts.layers[:-1]):
            h = reference.activate(reference.dense(h, *layer, precision), spec.activation)
            h = reference.layer_norm(h, *parts.norms[i], spec.norm_eps) if spec.norm else h
        return reference.dense(h, *parts.layers[-1], precision) * spec.output_scale

    def every_member(x: Tensor) -> Tensor:
        return x.expand(spec.ensemble or 1, *x.shape)

    def every_sample(x: Tensor) -> Tensor:
        return x if case.samples is None else x.unsqueeze(-2)

    def walk(x_0: Tensor, cond: Tensor) -> Tensor:
        x, h = every_member(x_0), 1 / case.num_steps
        for k in range(case.num_steps):
            x = x + h * velocity(x, torch.tensor(k * h, device=x.device), every_sample(cond))
        return x

    def loss(x_0: Tensor, cond: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
        x_t, target = reference.interpolate(x_0, x_1, t)
        return (velocity(every_member(x_t), t, every_sample(cond)) - target).square().mean()

    return torch_variant("eager baddbmm", problem, walk if case.kind == "integrate" else loss)


def needs_compiler(device: torch.device) -> None:
    """Raises Skipped where torch.compile lacks what it needs on a CPU."""
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++", "cl"]
    if device.type == "cpu" and not any(shutil.which(name) for name in compilers if name):
        raise Skipped("torch.compile needs a C++ compiler on the CPU")


def _compiled(name: str, mode: str, problem: Problem, precision: str) -> Variant:
    if mode != "default" and problem.device.type != "cuda":
        raise Skipped(f'mode="{mode}" is for CUDA')
    needs_compiler(problem.device)
    # Every shape and K is a program of its own, with the loop unrolled: the best that torch.compile can do.
    function = torch.compile(_plain(problem, precision), fullgraph=True, dynamic=False, mode=mode)
    return torch_variant(name, problem, function, compiled=True)


def compiled(problem: Problem, precision: str) -> Variant:
    """torch.compile of the same code."""
    return _compiled("compile", "default", problem, precision)


def compiled_reduce_overhead(problem: Problem, precision: str) -> Variant:
    """torch.compile with CUDA graphs."""
    return _compiled("compile reduce-overhead", "reduce-overhead", problem, precision)


def compiled_max_autotune(problem: Problem, precision: str) -> Variant:
    """torch.compile with CUDA graphs and matrix products chosen by measurement."""
    return _compiled("compile max-autotune", "max-autotune", problem, precision)


# JAX ----------------------------------------------------------------------------------------------------------------


def jax_of(device: torch.device) -> Any:
    """The jax module, on the same kind of device as torch.

    Raises:
        Skipped: no jax, or none that starts there.
    """
    if importlib.util.find_spec("jax") is None:
        raise Skipped("jax is not installed")
    # JAX otherwise takes three quarters of the GPU's memory at its first call.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        import jax

        platform = jax.default_backend()
    except Exception as error:  # a jax without its plugin, or plugins of another version
        raise Skipped(f"jax does not start: {error}") from error
    if platform != ("gpu" if device.type == "cuda" else "cpu"):
        raise Skipped(f"jax runs on {platform}, torch on {device.type}")
    return jax


def _beyond_jax(case: Case) -> list[str]:
    """What of a case the JAX rival does not have."""
    spec = case.spec
    found = [
        type(part).__name__
        for part, known in (
            (spec.architecture, (ff.MLP, ff.ResidualMLP)),
            (spec.state_embedding, (ff.Identity, ff.Scaled, ff.HLGauss)),
            (spec.time_embedding, (ff.RawTime, ff.Cosine, ff.CosineFourier, ff.PowerFourier)),
        )
        if not isinstance(part, known)
    ]
    found += [spec.activation] if spec.activation not in ("gelu_tanh", "silu", "relu", "elu") else []
    found += ["norm_first"] if spec.norm_first else []
    found += [f"prediction of the {spec.prediction}"] if spec.prediction != "velocity" else []
    found += [case.method] if case.method != "euler" else []
    found += ["end times per row"] if case.end_times else []
    found += ["velocity-matching loss"] if case.kind == "velocity" else []
    return found


def _jax_variant(name: str, problem: Problem, precision: str, unrolled: bool) -> Variant:
    case, spec = problem.case, problem.case.spec
    missing = _beyond_jax(case)
    if missing:
        raise Skipped(f"the JAX rival has no {', '.join(missing)}")
    if unrolled and case.kind != "integrate":
        raise Skipped("a loss has no loop to unroll")
    if unrolled and case.num_steps > 16:
        raise Skipped("unrolled only up to K=16")
    jax = jax_of(problem.device)
    jnp = jax.numpy
    members, samples = spec.ensemble or 1, case.samples or 1

    from benchmarks import jax_network
    from benchmarks.jax_network import array, tensor

    velocity = jax_network.velocity(spec, precision)
    # Every parameter has an E axis, of one where there is no ensemble.
    every_member = jax.vmap(velocity, (0, 0, None, None))

    def every_sample(x: Any) -> Any:
        return jnp.repeat(x, samples, axis=0)

    def walk(parameters: list[Any], x_0: Any, cond: Any) -> Any:
        x = jnp.broadcast_to(x_0, (members, *x_0.shape[-2:]))
        return jax_network.walk(every_member, parameters, x, every_sample(cond), case.num_steps, unrolled=unrolled)

    def loss(parameters: list[Any], x_0: Any, cond: Any, x_1: Any, t: Any) -> Any:
        x_1 = every_sample(x_1) if case.pairs else x_1
        x_t = (1 - t[..., None]) * x_0 + t[..., None] * x_1
        x_t = jnp.broadcast_to(x_t, (members, *x_t.shape[-2:]))
        rows = jnp.square(every_member(parameters, x_t, t, every_sample(cond)) - (x_1 - x_0)).mean(-1)
        return rows if case.pairs else rows.mean()

    # Rows are one axis here: [B, S] become B S.
    inputs = {"parameters": [array(p if spec.ensemble else p.unsqueeze(0)) for p in problem.field.parameter_list()]}
    for key, x in problem.inputs.items():
        inputs[key] = array(x).reshape(-1) if key == "t" else array(x).reshape(-1, x.shape[-1])
    function = walk if case.kind == "integrate" else loss
    leaves = {key: inputs.pop(key) for key in case.gradient}
    given = jnp.ones(()) if problem.given is None else array(problem.given)

    def differentiate(leaves: dict[str, Any], inputs: dict[str, Any], given: Any) -> tuple[Any, dict[str, Any]]:
        out, back = jax.vjp(lambda some: function(**inputs, **some), leaves)
        return out, back(given.reshape(out.shape))[0]

    compiled_function, compiled_gradients = jax.jit(function), jax.jit(differentiate)

    def call() -> Any:
        return compiled_gradients(leaves, inputs, given) if leaves else (compiled_function(**inputs), {})

    def results() -> dict[str, Tensor]:
        out, gradients = jax.block_until_ready(call())
        named = {case.output: tensor(out).reshape(case.output_shape)}
        # `parameter_list` is in another order than `named_parameters`.
        at = {id(p): i for i, p in enumerate(problem.field.parameter_list())}
        for key, leaf in problem.leaves.items():
            found = gradients["cond"] if key == "cond" else gradients["parameters"][at[id(leaf)]]
            named[key] = tensor(found).reshape(leaf.shape)
        return named

    return Variant(name, call, results, finish=jax.block_until_ready)


def jax_scan(problem: Problem, precision: str) -> Variant:
    """JAX: jit, the steps of a walk by lax.scan."""
    return _jax_variant("jax", problem, precision, unrolled=False)


def jax_unrolled(problem: Problem, precision: str) -> Variant:
    """JAX: jit, the steps of a walk unrolled."""
    return _jax_variant("jax unrolled", problem, precision, unrolled=True)


def torchdiffeq_fixed(problem: Problem, precision: str) -> Variant:
    """`torchdiffeq.odeint` on the grid of K steps: what flow-matching libraries sample with.

    Raises:
        Skipped: torchdiffeq is not installed; a loss; end times per row, which one grid cannot have.
    """
    case, field, spec = problem.case, problem.field, problem.case.spec
    if case.kind != "integrate":
        raise Skipped("a loss has nothing to integrate")
    if case.end_times or case.method not in ("euler", "midpoint"):
        raise Skipped("odeint has one grid for all rows, and of our methods Euler's and midpoint")
    if importlib.util.find_spec("torchdiffeq") is None:
        raise Skipped("torchdiffeq is not installed")
    from torchdiffeq import odeint

    lead = () if spec.ensemble is None else (spec.ensemble,)

    def walk(x_0: Tensor, cond: Tensor) -> Tensor:
        parameters, shared = field.parameter_list(), cond if case.samples is None else cond.unsqueeze(-2)
        grid = torch.linspace(0, 1, case.num_steps + 1, device=x_0.device)

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            return reference.velocity(spec, parameters, x, t, shared, precision)

        path: Tensor = odeint(velocity, x_0.expand(*lead, *x_0.shape), grid, method=case.method)
        return path[-1]

    return torch_variant("torchdiffeq", problem, walk)


def torchrl_model(problem: Problem, precision: str) -> Variant:
    """`torchrl.modules.FlowMatchingModel`: TorchRL's sampler of actions.

    Raises:
        Skipped: no TorchRL, or one without it (it came behind 0.14); what it does not sample.
    """
    case, field, spec = problem.case, problem.field, problem.case.spec
    if case.kind != "integrate" or case.method != "euler" or case.end_times or case.samples is not None:
        raise Skipped("TorchRL's sampler walks one Euler path per observation, to 1")
    if spec.ensemble is not None:
        raise Skipped("TorchRL's sampler has no ensembles")
    if importlib.util.find_spec("torchrl") is None:
        raise Skipped("torchrl is not installed")
    import torchrl.modules

    if not hasattr(torchrl.modules, "FlowMatchingModel"):
        raise Skipped(f"torchrl {torchrl.__version__} has no FlowMatchingModel")

    class Network(torch.nn.Module):
        """[cond, x, t] to the velocity."""

        def forward(self, inputs: Tensor) -> Tensor:
            cond, x, t = inputs.split([spec.cond_dim, spec.state_dim, 1], -1)
            return reference.velocity(spec, field.parameter_list(), x, t.squeeze(-1), cond, precision)

    # The walk is to be compared as it is: bounds that nothing reaches.
    model = torchrl.modules.FlowMatchingModel(Network(), spec.state_dim, case.num_steps, low=-1e9, high=1e9)
    return torch_variant("torchrl", problem, lambda x_0, cond: model(cond, x_0))


def graph_sampler(problem: Problem, precision: str) -> Variant:
    """A sampler written for speed in plain PyTorch, for a CUDA graph: cond's and time's shares of the first layer
    computed before the loop, products into buffers that are there, activations in place.

    Raises:
        Skipped: no GPU, where it would pay; what it is not written for.
    """
    if problem.device.type != "cuda":
        raise Skipped("a sampler for CUDA graphs needs CUDA")
    return graphed(problem, torch_variant("graph sampler", problem, buffered_walk(problem, precision)))


def buffered_walk(problem: Problem, precision: str) -> Callable[..., Tensor]:
    """The walk of `graph_sampler`.

    Raises:
        Skipped: what it is not written for.
    """
    case, spec = problem.case, problem.case.spec
    plain = isinstance(spec.architecture, ff.MLP) and spec.norm is None and spec.ensemble is None
    if not plain or spec.time_sizes or not isinstance(spec.state_embedding, ff.Identity):
        raise Skipped("the hand-written sampler is of plain MLPs without norms")
    if case.kind != "integrate" or case.method != "euler" or case.end_times or case.samples is not None:
        raise Skipped("the hand-written sampler walks by Euler to 1")
    if case.gradient or spec.prediction != "velocity":
        raise Skipped("the hand-written sampler has no gradients and predicts velocities")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    parts, rows, k = spec.parts(problem.field.parameter_list()), case.rows, case.num_steps
    layers = [(w.detach().to(dtype), b.detach().to(dtype)) for w, b in parts.layers]
    (first, bias), *deeper = layers
    c, d = spec.cond_dim, spec.state_dim
    times = spec.time_embedding.features(torch.arange(k, device=problem.device) / k).to(dtype)
    by_step = times @ first[c + d :] + bias
    buffers = [torch.empty(rows, w.shape[1], device=problem.device, dtype=dtype) for w, _ in layers]
    in_place = {"silu": torch.nn.functional.silu, "elu": torch.nn.functional.elu, "relu": torch.nn.functional.relu}

    def activate(x: Tensor) -> Tensor:
        if spec.activation in in_place:
            return in_place[spec.activation](x, inplace=True)
        return x.copy_(reference.activate(x, spec.activation))

    def walk(x_0: Tensor, cond: Tensor) -> Tensor:
        given, x = cond.to(dtype) @ first[:c], x_0.clone()
        for step in range(k):
            torch.addmm(given, x.to(dtype), first[c : c + d], out=buffers[0])
            h = activate(buffers[0].add_(by_step[step]))
            for i, (w, b) in enumerate(deeper, 1):
                torch.addmm(b, h, w, out=buffers[i])
                h = activate(buffers[i]) if i < len(deeper) else buffers[i]
            x.add_(h, alpha=spec.output_scale / k)
        return x

    return walk


RIVALS: dict[str, Rival] = {
    "fused": fused,
    "ring": ring,
    "eager": eager,
    "eager baddbmm": eager_batched,
    "torchdiffeq": torchdiffeq_fixed,
    "torchrl": torchrl_model,
    "graph sampler": graph_sampler,
    "compile": compiled,
    "compile reduce-overhead": compiled_reduce_overhead,
    "compile max-autotune": compiled_max_autotune,
    "jax": jax_scan,
    "jax unrolled": jax_unrolled,
}


# What surrounds them ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def global_precision(precision: str) -> Iterator[None]:
    """torch's global float32 setting that lets plain PyTorch multiply as `precision` says."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class Verdict:
    """How wrong a variant is, beside eager PyTorch in the same precision."""

    errors: dict[str, float]
    eager: dict[str, float]

    def within(self, times: float) -> bool:
        """Whether the worst error is at most `times` eager PyTorch's worst, or below the floor.

        Not error by error: that of a single number, such as a loss, can be small by chance.
        """
        return worst(self.errors) <= max(times * worst(self.eager), ERROR_FLOOR)

    @property
    def times_eager(self) -> float:
        """The worst error over eager's worst."""
        return worst(self.errors) / max(worst(self.eager), ERROR_FLOOR)


def check(problem: Problem, variant: Variant, precision: str) -> Verdict:
    """Compare a variant with the reference in float64. Runs it once, so that it is compiled afterwards."""
    return Verdict(problem.errors(variant.results()), problem.errors(problem.results("reference", precision)))


@contextlib.contextmanager
def quiet_compiler() -> Iterator[None]:
    """Keeps torch.compile's autotuning tables off the terminal; what was printed is shown if the block fails."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except BaseException:
        sys.stderr.write(printed.getvalue()[-4000:])
        raise


def capture(call: Callable[[], Any], generator: torch.Generator | None = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """One call as a CUDA graph, and the result that every replay writes to; what `generator` draws in it is new in
    every replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def graphed(problem: Problem, variant: Variant) -> Variant:
    """A capturable variant replayed from a CUDA graph: what the device needs without the launches' cost.

    Raises:
        Skipped: no GPU, or a variant that no graph can hold.
    """
    if problem.device.type != "cuda":
        raise Skipped("CUDA graphs need CUDA")
    if not variant.capturable:
        raise Skipped(f"{variant.name} has CUDA graphs of its own or none")
    graph, result = capture(variant.call)

    def results() -> dict[str, Tensor]:
        graph.replay()
        torch.cuda.synchronize()
        return _named(problem, result)

    return Variant(f"{variant.name} + graph", graph.replay, results)
