"""The public functions: they check, bring tensors to the canonical form [E, B, S, D] and choose what runs the call.

What runs is one torch operator per integration and one per loss (`fastflow.operators`), or plain PyTorch.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow import cpu, operators, reference
from fastflow.fields import FieldSpec, VelocityField
from fastflow.kernels import launch  # needs no triton
from fastflow.philox import PhiloxNoise

BACKENDS = ("auto", "fused", "reference")
PRECISIONS = ("bf16", "tf32", "fp32")
METHODS = ("euler", *reference.SCHEMES)
ACTIVATIONS = ("auto", "store", "recompute")
REDUCTIONS = ("none", "sum", "mean")
DIM_REDUCTIONS = ("mean", "sum", "sqrt")
ERRORS = ("velocity", "noise", "endpoint")

# Read once: an environment variable consulted per call would be a graph break and a hidden switch.
DEFAULT_BACKEND = os.environ.get("FASTFLOW_BACKEND", "auto")
if DEFAULT_BACKEND not in BACKENDS:
    raise ValueError(f"FASTFLOW_BACKEND must be one of {BACKENDS}, got {DEFAULT_BACKEND!r}")

Fields = VelocityField | Sequence[VelocityField]


# Public functions ---------------------------------------------------------------------------------------------------


def integrate(
    field: Fields,
    x_0: Tensor | None,
    cond: Tensor | None = None,
    *,
    num_steps: int,
    method: str = "euler",
    t_0: float | Tensor = 0.0,
    t_1: float | Tensor = 1.0,
    step_noise: Tensor | None = None,
    trajectory: bool = False,
    activations: str = "auto",
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Walk x_0 through `num_steps` steps of the velocity field from t_0 to t_1, as one operation.

    With h = (t_1 - t_0) / K and t_k = t_0 + k h, one of

        "euler":     x_{k+1} = x_k + h v(x_k, t_k, cond)
        "midpoint":  x_{k+1} = x_k + h v(x_k + h/2 v(x_k, t_k), t_k + h/2)
        "heun":      x_{k+1} = x_k + h/2 (v_1 + v_2), v_1 = v(x_k, t_k), v_2 = v(x_k + h v_1, t_{k+1})

    Args:
        field: a VelocityField, or several of one spec, whose ensembles then stand one behind the other on the E axis
            and are walked in the same launch (a critic and its target, say).
        x_0: where the walk starts: [B, D], [B, S, D] or, with an ensemble, [E, B, D], [E, B, S, D]. Without an E axis
            it is shared by all members. Dtype and device of the field. None starts at zero, [B, D] with the batch of
            `cond` (FPO++'s actions without sampling).
        cond: [B, C], shared over E and S, or [E, B, C]; None where `cond_dim` is 0.
        num_steps: K, at least 1. Any value at run time: no kernel is compiled per K.
        method: "euler", "midpoint" or "heun"; the last two evaluate the field twice per step.
        t_0, t_1: start and end time, in either order: numbers, or tensors with one time per row, shaped as x_0 without
            D, or without its E axis, its S axis or both too (then shared). So TD-Flow (arXiv:2503.09817) integrates
            each row to a time of its own. Where a tensor requires a gradient the reference is used.
        step_noise: added to x behind each step: [K, *x_0's shape], or without its E axis. Already scaled; it may
            require a gradient (FPO's exploration, arXiv:2507.21053).
        trajectory: return every x_k instead of x_K alone.
        activations: what the backward pass of the kernels does for the activations of all steps: "store" reads what
            the forward pass stored, "recompute" computes them again step by step, "auto" chooses by the memory they
            take. Results are equal; the reference ignores it.
        backend: "auto" (kernels where they cover the case, else the reference), "fused" (kernels or an error) or
            "reference" (plain, traceable PyTorch: any order of derivative). Default: the environment variable
            FASTFLOW_BACKEND, else "auto".
        precision: of the matrix products: "bf16", "tf32" or "fp32"; the flow state, sums and statistics stay float32.
            Default: autocast if it is on, else torch's setting for float32 products on CUDA, "fp32" on the CPU. The
            reference rounds for "bf16" alone; its float32 products follow torch's setting.

    Returns:
        x_K with x_0's dtype, shaped as x_0, with a leading E axis if the field is an ensemble. With `trajectory`
        [K + 1, ...]: x_0 to x_K, each with its gradient.

    Raises:
        ValueError: a shape, `num_steps`, `method`, `activations`, `backend` or `precision` that does not fit, or
            neither x_0 nor cond.
        TypeError: a tensor of another dtype than the field's, a time that is neither number nor tensor, a `num_steps`
            that is no int, a `trajectory` that is no bool.
        NotImplementedError: `backend="fused"` where no kernel covers the case; it names what is missing.
    """
    _check_steps(num_steps, trajectory)
    _check_name("integrate", "method", method, METHODS)
    _check_name("integrate", "activations", activations, ACTIVATIONS)
    if step_noise is None and not trajectory:
        walked = _plain_walk(field, x_0, cond, num_steps, method, t_0, t_1, backend, precision)
        if walked is not None:
            return walked
    call = _Call.open("integrate", field, backend, precision)
    x_0 = call.zero_start(cond) if x_0 is None else x_0
    x, cond = call.canonical(x_0, cond, "x_0")
    begin, start = call.time(t_0, "t_0")
    stop, end = call.time(t_1, "t_1")
    noise = None if step_noise is None else call.like_steps(step_noise, num_steps)
    needs_times = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (begin, stop))
    runner = call.runner("a gradient of t_0 or t_1" if needs_times else None)
    fused = runner != "reference"
    if call.plain or needs_times:
        steps = (call.spec, num_steps, start, end, method, call.precision)
        out = operators.reference_integrate(x, cond, call.parameters, begin, stop, noise, *steps, trajectory)
    else:
        needs = fused and _needs_gradient(x, cond, noise, *call.parameters)
        store = needs and runner == "triton" and call.stores(num_steps, method, activations)
        times = (begin, stop, noise, call.key, num_steps, start, end)
        options = (method, call.precision, runner, trajectory or needs, store)
        x_1, path, *_ = operators.integrate(x, cond, call.parameters, *times, *options)
        out = torch.cat([path, x_1.unsqueeze(0)]) if trajectory else x_1
    return call.restore(out.to(x_0.dtype), int(trajectory))


def flow_matching_loss(
    field: VelocityField,
    x_0: Tensor | PhiloxNoise,
    x_1: Tensor,
    t: Tensor | None,
    cond: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    dim_reduction: str = "mean",
    error: str = "velocity",
    sigma_min: float = 0.0,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Flow-matching loss on the straight path x_t = (1 - (1 - sigma_min) t) x_0 + t x_1: for each row the squared error
    of v(x_t, t, cond) against the path's velocity x_1 - (1 - sigma_min) x_0, reduced over D.

    Args:
        field: the VelocityField.
        x_0: noise, [B, D], [B, S, D], [E, B, D] or [E, B, S, D]; or a `fastflow.PhiloxNoise` for B rows of S samples,
            from which x_0 [B, S, D] is drawn (in the kernel, where kernels run: nothing of its size is stored).
        x_1: data, shaped as x_0, or without its E axis, its S axis or both (then shared).
        t: times in [0, 1]: x_0's shape without D, or without its E axis, its S axis or both. With a PhiloxNoise None
            draws them from it, [B, S].
        cond: [B, C] or [E, B, C].
        weight: per-row weights, shaped like t; each row's loss is multiplied by it. It may require a gradient.
        reduction: "none" gives one loss per row, "sum" adds them, "mean" divides the sum by the number of rows. For
            "none" the kernels compute a row alike in every batch, to the last bit: FPO's ratio, the exponential of a
            difference of two of them, is exactly 1 where nothing changed.
        dim_reduction: over D: "mean", "sum", or "sqrt", the sum divided by sqrt(D) (FPO++).
        error: of what: "velocity" (FPO's u-loss); "noise" for that of the x_0 which the velocity implies, t^2 times
            the velocity's (FPO's epsilon-loss, arXiv:2507.21053); "endpoint" for that of the x_1 it implies, (1 - (1 -
            sigma_min) t)^2 times.
        sigma_min: standard deviation that the path ends with (arXiv:2210.02747), in [0, 1).
        backend, precision: see `integrate`. Kernels give the gradients of the parameters, cond, x_0, x_1 and weight;
            if t requires a gradient the reference is used.

    Returns:
        A 0-d tensor, or with `reduction="none"` the losses [B], [B, S], [E, B] or [E, B, S]; with a PhiloxNoise [B, S]
        or [E, B, S].

    Raises:
        ValueError: a shape, name or `sigma_min` that does not fit.
        TypeError: a tensor of another dtype than the field's, several fields, no t where x_0 is no PhiloxNoise.
        NotImplementedError: as `integrate`.
    """
    name = "flow_matching_loss"
    _check_name(name, "error", error, ERRORS)
    if isinstance(sigma_min, bool) or not isinstance(sigma_min, (int, float)):
        raise TypeError(f"{name}: sigma_min must be a number, got {type(sigma_min).__name__}")
    if not 0 <= sigma_min < 1:
        raise ValueError(f"{name}: sigma_min must be in [0, 1), got {sigma_min}")
    options = (weight, reduction, dim_reduction, backend, precision)
    return _matching_loss(name, field, x_0, x_1, t, cond, *options, True, error, float(sigma_min))


def velocity_matching_loss(
    field: VelocityField,
    x_t: Tensor,
    t: Tensor,
    target_velocity: Tensor,
    cond: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    dim_reduction: str = "mean",
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Regression of the velocity on a given target: for each row the squared error of v(x_t, t, cond) against
    target_velocity, reduced over D.

    Arguments, result and errors as in `flow_matching_loss`, with the point x_t and its target, both tensors, in place
    of the path's two ends.
    """
    options = (weight, reduction, dim_reduction, backend, precision)
    return _matching_loss("velocity_matching_loss", field, x_t, target_velocity, t, cond, *options, False)


def _matching_loss(
    name: str,
    field: VelocityField,
    a: Tensor | PhiloxNoise,
    b: Tensor,
    t: Tensor | None,
    cond: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    dim_reduction: str,
    backend: str | None,
    precision: str | None,
    interpolate: bool,
    error: str = "velocity",
    sigma_min: float = 0.0,
) -> Tensor:
    _check_name(name, "reduction", reduction, REDUCTIONS)
    _check_name(name, "dim_reduction", dim_reduction, DIM_REDUCTIONS)
    if not isinstance(field, VelocityField):
        raise TypeError(f"{name}: field must be one VelocityField, got {type(field).__name__}")
    call = _Call.open(name, field, backend, precision)
    a_name, b_name = ("x_0", "x_1") if interpolate else ("x_t", "target_velocity")
    noise = a if interpolate and isinstance(a, PhiloxNoise) else None
    if noise is not None:
        cond = call.noise_rows(noise, cond, a_name)
        x = cond.new_empty(0)
    else:
        x, cond = call.canonical(a, cond, a_name)
    y = call.like_rows(b, b_name, trailing=True)
    drawn = noise is not None and t is None
    t = y.new_empty(0) if drawn else call.like_rows(t, "t", trailing=False)
    if weight is not None:
        weight = call.like_rows(weight, "weight", trailing=False)
    needs_t = torch.is_grad_enabled() and t.requires_grad
    runner = call.runner("a gradient of t" if needs_t else None)
    fused = runner != "reference"
    seed = ids = None
    if noise is not None and fused:
        seed, ids = noise.seed, noise.ids
    elif noise is not None:
        x, t = operators.draw(noise, y, None if drawn else t)
    path = (interpolate, sigma_min)
    if fused or (torch.compiler.is_compiling() and not (call.plain or needs_t)):
        save = fused and _needs_gradient(x, y, cond, *call.parameters)
        options = (call.key, call.precision, *path, runner, save, reduction == "none")
        rows = operators.matching_loss(x, y, t, cond, call.parameters, seed, ids, *options)[0]
    else:
        # Without kernels the operator's backward would repeat the forward pass, which autograd need not.
        rows = operators.reference_rows(x, y, t, cond, call.parameters, call.spec, call.precision, *path)
    dim = call.spec.state_dim
    if dim_reduction != "mean" and dim > 1:
        rows = rows * (dim if dim_reduction == "sum" else math.sqrt(dim))
    if error != "velocity":
        if noise is not None and drawn and fused:
            t = noise.t().to(y.dtype)
        rows = rows * reference.error_scale(t, error, sigma_min)
    if weight is not None:
        rows = rows * weight
    if reduction == "mean":
        return rows.mean()
    if reduction == "sum":
        return rows.sum()
    return call.restore(rows)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of the tensors may be asked for. Inside vmap they do not say."""
    if not torch.is_grad_enabled():
        return False
    return operators.inside_transform() or any(t is not None and t.requires_grad for t in tensors)


def _plain_walk(
    field: Fields,
    x_0: Tensor | None,
    cond: Tensor | None,
    num_steps: int,
    method: str,
    t_0: float | Tensor,
    t_1: float | Tensor,
    backend: str | None,
    precision: str | None,
) -> Tensor | None:
    """`integrate` on the CPU where no gradient is asked for and nothing needs another form: acting, row by row, or
    small targets, where all that is done around a walk costs more than the walk. None wherever anything is not so."""
    if not type(t_0) is type(t_1) is float:
        return None
    fields = field if isinstance(field, (list, tuple)) else (field,)
    found = _plain_rows_and_weights(fields, x_0, cond, backend, precision)
    if found is None or not math.isfinite(t_0 + t_1):
        return None
    assert x_0 is not None and cond is not None
    (rows, parameters), options = found, (num_steps, method, t_0, t_1, precision or "fp32", len(fields))
    return cpu.plain_walk(fields[0].key, parameters, x_0, cond, rows, *options)


def plain_arrival(
    field: VelocityField,
    x_0: Tensor,
    cond: Tensor,
    t: Tensor,
    num_steps: int,
    method: str,
    backend: str | None,
    precision: str | None,
) -> tuple[Tensor, Tensor] | None:
    """Where rows come that walk from 0 to times of their own and the velocity there, [B, D] each, under the conditions
    of `_plain_walk` for a field without members. None wherever anything is not so.

    Args:
        x_0: [B, D]. cond: [B, C]. t: [B].
    """
    _check_steps(num_steps, False)
    _check_name("integrate", "method", method, METHODS)
    found = _plain_rows_and_weights((field,), x_0, cond, backend, precision)
    if found is None or x_0.dim() != 2 or type(t) is not Tensor or t.shape != x_0.shape[:1]:
        return None
    if not (t.is_cpu and t.dtype is torch.float32 and t.is_contiguous()) or _needs_gradient(t):
        return None
    return cpu.arrive(field.key, found[1], x_0, cond, t, num_steps, method, precision or "fp32")


def _plain_rows_and_weights(
    fields: Sequence[VelocityField],
    x_0: Tensor | None,
    cond: Tensor | None,
    backend: str | None,
    precision: str | None,
) -> tuple[tuple[int, int], list[Tensor]] | None:
    """((B, S), all fields' parameters) of a walk that native code runs as it is; else None."""
    if not operators.unobserved():
        return None
    if not fields or any(not isinstance(f, VelocityField) or f.key != fields[0].key for f in fields):
        return None
    rows = plain_rows(fields[0].spec, x_0, cond, len(fields))
    if rows is None:
        return None
    backend = DEFAULT_BACKEND if backend is None else backend
    if not runs_native(backend) or torch.is_autocast_enabled("cpu"):
        return None
    if precision not in _PLAIN_PRECISIONS or cpu.unsupported(torch.float32):
        return None
    assert x_0 is not None and cond is not None
    parameters = [p for f in fields for p in f.parameter_list()]
    if torch.is_grad_enabled() and any(p.requires_grad for p in (x_0, cond, *parameters)):
        return None
    for p in parameters:
        if type(p) not in operators.ORDINARY or not (p.is_cpu and p.dtype is torch.float32 and p.is_contiguous()):
            return None
    return rows, parameters


_PLAIN_PRECISIONS = (None, *PRECISIONS)


def runner(backend: str, device: torch.device) -> str | None:
    """What a backend runs on a device: "native" code, the kernels of "triton", or None for PyTorch alone."""
    if backend == "reference":
        return None
    if device.type == "cpu":
        return "native" if runs_native(backend) else "triton"
    return "triton" if device.type == "cuda" and _HAS_TRITON else None


def runs_native(backend: str) -> bool:
    """Whether native code is what a backend runs on the CPU."""
    return backend == "auto" or (backend == "fused" and not _INTERPRETED)


def plain_rows(spec: FieldSpec, x_0: object, cond: object, fields: int = 1) -> tuple[int, int] | None:
    """(B, S) where x_0 is [B, D], or [E, B, S, D] of a field or `fields` with an E axis, and cond [B, C] or then
    [E, B, C], as native code reads them; else None."""
    if type(x_0) is not Tensor or type(cond) is not Tensor:
        return None
    if not (x_0.is_cpu and cond.is_cpu and x_0.dtype is cond.dtype is torch.float32):
        return None
    if not (x_0.is_contiguous() and cond.is_contiguous()):
        return None
    given, shape = cond.shape, x_0.shape
    if len(given) not in (2, 3) or given[-1] != spec.cond_dim or shape[-1:] != (spec.state_dim,):
        return None
    rows, members = given[-2], (spec.ensemble or 1) * fields
    if spec.ensemble is None and fields == 1:
        fits = len(shape) == len(given) == 2 and shape[0] == rows > 0
        return (rows, 1) if fits else None
    fits = len(shape) == 4 and shape[0] == members and shape[1] == rows > 0 < shape[2]
    return (rows, shape[2]) if fits and given[:-2] in ((), (members,)) else None


def check_walk(
    field: Fields,
    num_steps: int,
    method: str = "euler",
    t_0: float = 0.0,
    t_1: float = 1.0,
    backend: str | None = None,
    precision: str | None = None,
) -> _Call:
    """The call that `integrate` would open with these options, times being numbers; it raises what that would."""
    _check_steps(num_steps, False)
    _check_name("integrate", "method", method, METHODS)
    call = _Call.open("integrate", field, backend, precision)
    for name, t in (("t_0", t_0), ("t_1", t_1)):
        if isinstance(t, Tensor):
            raise TypeError(f"FrozenWalk: {name} must be a number, got a Tensor")
        call.time(t, name)
    return call


# Checks and the canonical form --------------------------------------------------------------------------------------


def _check_steps(num_steps: int, trajectory: bool) -> None:
    if isinstance(num_steps, (bool, float, Tensor)):
        raise TypeError(f"integrate: num_steps must be an int, got {type(num_steps).__name__}")
    if num_steps < 1:
        raise ValueError(f"integrate: num_steps must be at least 1, got {num_steps}")
    if not isinstance(trajectory, bool):
        raise TypeError(f"integrate: trajectory must be a bool, got {type(trajectory).__name__}")


def _check_name(function: str, argument: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        expected = ", ".join(map(repr, names[:-1]))
        raise ValueError(f"{function}: {argument} must be {expected} or {names[-1]!r}, got {value!r}")


class _Call:
    """One public call on its way to the operator: what is checked once and the axes to put back at the end."""

    name: str
    backend: str
    precision: str
    plain: bool  # plain PyTorch instead of the operator
    spec: FieldSpec
    key: str
    parameters: list[Tensor]
    dtype: torch.dtype
    device: torch.device
    has_members: bool
    members: int  # E, of all fields together
    has_samples: bool
    batch: int
    samples: int

    @classmethod
    def open(cls, name: str, field: Fields, backend: str | None, precision: str | None) -> _Call:
        fields = tuple(field) if isinstance(field, (list, tuple)) else (field,)
        if not fields or not all(isinstance(f, VelocityField) for f in fields):
            kinds = [type(f).__name__ for f in fields]
            raise TypeError(f"{name}: field must be a VelocityField or several, got {kinds}")
        for other in fields[1:]:
            if other.key != fields[0].key:
                raise ValueError(f"{name}: several fields must share one spec, got {fields[0].spec} and {other.spec}")
        backend = DEFAULT_BACKEND if backend is None else backend
        if backend not in BACKENDS:
            raise ValueError(f"{name}: backend must be one of {BACKENDS}, got {backend!r}")
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"{name}: precision must be one of {PRECISIONS}, got {precision!r}")
        call = cls()
        call.name, call.backend = name, backend
        call.spec, call.key = fields[0].spec, fields[0].key
        call.parameters = [p for f in fields for p in f.parameter_list()]
        call.dtype, call.device = call.parameters[0].dtype, call.parameters[0].device
        call.has_members = call.spec.ensemble is not None or len(fields) > 1
        call.members = (call.spec.ensemble or 1) * len(fields)
        call.precision = _resolve_precision(precision, call.dtype, call.device)
        call.plain = backend == "reference"
        return call

    def check(self, tensor: object, name: str, width: int | None) -> Tensor:
        """The tensor if its type, device and last axis fit (cast to its dtype under autocast), else an error."""
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{self.name}: {name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.device != self.device:
            raise ValueError(f"{self.name}: {name} must be on the field's device {self.device}, got {tensor.device}")
        if tensor.dtype != self.dtype:
            if not (tensor.is_floating_point() and torch.is_autocast_enabled(self.device.type)):
                raise TypeError(f"{self.name}: {name} must have the field's dtype {self.dtype}, got {tensor.dtype}")
            tensor = tensor.to(self.dtype)
        if width is not None and (tensor.dim() == 0 or tensor.shape[-1] != width):
            raise ValueError(f"{self.name}: {name} must be [..., {width}], got {list(tensor.shape)}")
        return tensor

    def zero_start(self, cond: Tensor | None) -> Tensor:
        """Zeros [B, D] for the batch of cond."""
        if cond is None:
            raise ValueError(f"{self.name}: x_0 must be a Tensor where cond is None; a zero start has cond's batch")
        cond = self.condition(cond)
        return cond.new_zeros(cond.shape[1], self.spec.state_dim)

    def condition(self, cond: Tensor) -> Tensor:
        """cond as [E or 1, B, C]."""
        cond = self.check(cond, "cond", self.spec.cond_dim)
        if cond.dim() == 3 and self.has_members and cond.shape[0] == self.members:
            return cond
        if cond.dim() == 2:
            return cond.unsqueeze(0)
        raise self._shape_error("cond", cond, "C")

    def optional_condition(self, cond: Tensor | None) -> Tensor | None:
        """As `condition`; None where the field takes none."""
        if cond is None and self.spec.cond_dim:
            raise ValueError(f"{self.name}: cond must be [B, {self.spec.cond_dim}], got None")
        return None if cond is None else self.condition(cond)

    def canonical(self, x: object, cond: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
        """x as [E, B, S, D] and cond as [E or 1, B, C]; remembers which axes the caller gave."""
        x = self.check(x, name, self.spec.state_dim)
        members, has = self.members, self.has_members
        cond = self.optional_condition(cond)
        dims = x.dim()
        if dims not in ((2, 3, 4) if has else (2, 3)):
            raise self._shape_error(name, x, "D")
        given = has and dims == 4
        if dims == 3 and has:
            given = self._leads_with_members(x, cond, name)
        self.has_samples = dims - given == 3
        batch = x.shape[int(given)]
        if (given and x.shape[0] != members) or (cond is not None and cond.shape[1] != batch):
            raise self._shape_error(name, x, "D", cond)
        self.batch = batch
        self.samples = x.shape[int(given) + 1] if self.has_samples else 1
        if cond is None:
            cond = x.new_zeros(1, batch, 0)
        return self._expand(x, trailing=True, given_members=given, given_samples=self.has_samples), cond

    def noise_rows(self, noise: PhiloxNoise, cond: Tensor | None, name: str) -> Tensor:
        """cond as [E or 1, B, C]; the rows are those of a generator, [B, S]."""
        cond = self.optional_condition(cond)
        if noise.ids.device != self.device:
            raise ValueError(
                f"{self.name}: {name} must be on the field's device {self.device}, got ids on {noise.ids.device}"
            )
        self.has_samples = True
        self.batch, self.samples = noise.ids.shape[0], noise.samples
        if cond is None:
            return torch.zeros(1, self.batch, 0, dtype=self.dtype, device=self.device)
        if cond.shape[1] != self.batch:
            raise ValueError(
                f"{self.name}: {name} must have as many ids as cond has rows, {cond.shape[1]}, got {self.batch}"
            )
        return cond

    def time(self, t: float | Tensor, name: str) -> tuple[Tensor | None, float]:
        """Times of each row [E, B, S], or None and the number."""
        if isinstance(t, Tensor):
            return self.like_rows(t, name, trailing=False), 0.0
        if isinstance(t, bool) or not isinstance(t, (int, float)):
            raise TypeError(
                f"{self.name}: {name} must be a number or a Tensor with one time per row, got {type(t).__name__}"
            )
        t = float(t)
        if not -math.inf < t < math.inf:
            raise ValueError(f"{self.name}: {name} must be finite, got {t}")
        return None, t

    def _leads_with_members(self, x: Tensor, cond: Tensor | None, name: str) -> bool:
        """Whether a 3-d x is [E, B, D] (else [B, S, D]). With B = E = S nothing tells the two apart: refused."""
        if cond is None:
            return x.shape[0] == self.members
        as_members = x.shape[0] == self.members and x.shape[1] == cond.shape[1]
        as_samples = x.shape[0] == cond.shape[1]
        if as_members and as_samples:
            raise ValueError(
                f"{self.name}: {name} {list(x.shape)} could be [E, B, D] or [B, S, D] with E={self.members}; "
                "pass it as [E, B, S, D]"
            )
        return as_members

    def like_rows(self, tensor: Tensor | None, name: str, trailing: bool) -> Tensor:
        """A tensor that follows x's rows, as [E, B, S] or [E, B, S, D]: E, S or both may be missing (shared)."""
        tensor = self.check(tensor, name, self.spec.state_dim if trailing else None)
        lead = tuple(tensor.shape[:-1] if trailing else tensor.shape)
        forms = self._row_forms()
        if self.has_samples:
            forms.insert(0, ((self.batch,), False, False))
        # Compared, never hashed: hashing a symbolic size would fix it when compiled.
        for form, *given in forms:
            if len(lead) == len(form) and lead == form:
                return self._expand(tensor, trailing, *given)
        tail = [self.spec.state_dim] if trailing else []
        expected = " or ".join(str([*form, *tail]) for form, *_ in forms)
        raise ValueError(f"{self.name}: {name} must be {expected}, got {list(tensor.shape)}")

    def like_steps(self, noise: Tensor, num_steps: int) -> Tensor:
        """Noise of every step as [K, E, B, S, D]; E may be missing (shared)."""
        noise = self.check(noise, "step_noise", self.spec.state_dim)
        lead = tuple(noise.shape[:-1])
        forms = self._row_forms()
        for form, has_members, has_samples in forms:
            if len(lead) == 1 + len(form) and lead == (num_steps, *form):
                noise = noise if has_members else noise.unsqueeze(1)
                noise = noise if has_samples else noise.unsqueeze(3)
                return noise.expand(num_steps, self.members, self.batch, self.samples, self.spec.state_dim)
        expected = " or ".join(str([num_steps, *form, self.spec.state_dim]) for form, *_ in forms)
        raise ValueError(f"{self.name}: step_noise must be {expected}, got {list(noise.shape)}")

    def _row_forms(self) -> list[tuple[tuple[int, ...], bool, bool]]:
        """What x's rows may look like, as (leading shape, has E axis, has S axis)."""
        rows = (self.batch, self.samples) if self.has_samples else (self.batch,)
        forms: list[tuple[tuple[int, ...], bool, bool]] = [(rows, False, self.has_samples)]
        if self.has_members:
            forms.append(((self.members, *rows), True, self.has_samples))
        return forms

    def _expand(self, tensor: Tensor, trailing: bool, given_members: bool, given_samples: bool) -> Tensor:
        if not given_members:
            tensor = tensor.unsqueeze(0)
        if not given_samples:
            tensor = tensor.unsqueeze(2)
        return tensor.expand(self.members, self.batch, self.samples, *([self.spec.state_dim] if trailing else []))

    def restore(self, out: Tensor, axis: int = 0) -> Tensor:
        """The canonical result, whose E axis is `axis`, with the axes that the caller's tensors had."""
        if not self.has_samples:
            out = out.squeeze(axis + 2)
        return out if self.has_members else out.squeeze(axis)

    def stores(self, num_steps: int, method: str, activations: str) -> bool:
        """Whether the kernels store the activations of all steps for the backward pass."""
        from fastflow import fused

        rows = self.batch * self.samples
        return fused.stores(self.spec, self.members, rows, num_steps, method, self.precision, activations)

    def _shape_error(self, name: str, tensor: Tensor, letter: str, cond: Tensor | None = None) -> ValueError:
        width = self.spec.cond_dim if letter == "C" else self.spec.state_dim
        forms = ["B"] if letter == "C" else ["B", "B, S"]
        if self.has_members:
            forms += [f"{self.members}, {form}" for form in forms]
        expected = " or ".join(f"[{form}, {width}]" for form in forms)
        given = f" with cond {list(cond.shape[int(cond.shape[0] == 1) :])}" if cond is not None else ""
        return ValueError(f"{self.name}: {name} must be {expected}, got {list(tensor.shape)}{given}")

    def runner(self, unsupported: str | None = None) -> str:
        """Who runs this call: "triton", "native" or "reference"; raises for `backend="fused"` where no kernel covers
        it, warns once for "auto" on CUDA."""
        if self.plain:
            return "reference"
        native = self.device.type == "cpu" and not (self.backend == "fused" and _INTERPRETED)
        why = unsupported
        if why is None and native:
            why = cpu.unsupported(self.dtype)
        elif why is None:
            why = _why_no_kernel(self.spec, self.device, self.dtype, self.precision)
        if why is None:
            return "native" if native else "triton"
        if self.backend == "fused":
            raise NotImplementedError(f"{self.name}: no fused kernel for {why}; use backend='auto' or 'reference'")
        if self.device.type == "cuda":
            _warn_reference(self.name, why)
        return "reference"


def _resolve_precision(precision: str | None, dtype: torch.dtype, device: torch.device) -> str:
    if precision is not None:
        return precision
    if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) != torch.float32:
        return "bf16"
    if dtype in (torch.bfloat16, torch.float16):
        return "bf16"
    # torch.compile does not follow a question for torch's settings: the operator asks when it runs.
    return "default" if device.type == "cuda" else "fp32"


def _why_no_kernel(spec: FieldSpec, device: torch.device, dtype: torch.dtype, precision: str) -> str | None:
    """What keeps Triton's kernels from running a call, or None."""
    if device.type not in ("cuda", "cpu"):
        return f"{device.type} tensors"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{dtype} parameters (float32 and bfloat16 have one)"
    if not _HAS_TRITON:
        return "an installation without triton"
    from fastflow import fused

    return fused.unsupported(spec, precision, device)


# What the kernels need is looked at once: neither changes while a process runs.
_HAS_TRITON = launch.HAS_TRITON
_INTERPRETED = launch.interpreted()

_warned: set[tuple[str, str]] = set()


def _warn_reference(name: str, why: str) -> None:
    if not torch.compiler.is_compiling() and (name, why) not in _warned:
        _warned.add((name, why))
        warnings.warn(f"fastflow.{name} runs on the PyTorch reference: no fused kernel for {why}", stacklevel=4)
