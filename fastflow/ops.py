"""The fused operations as torch operators: shape checks, dispatch to kernels or reference, fake tensors, autograd,
vmap.

One operator per integration (`fastflow::integrate`) and one per loss (`fastflow::matching_loss`), whatever the number
of steps and layers. Public functions check and bring tensors to the canonical form [E, B, S, D], which operators take.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastflow import reference
from fastflow.fields import FieldSpec, VelocityField
from fastflow.kernels import launch, plan  # neither needs triton

BACKENDS = ("auto", "fused", "reference")
PRECISIONS = ("bf16", "tf32", "fp32")

# Read once: an environment variable consulted per call would be a graph break and a hidden switch.
DEFAULT_BACKEND = os.environ.get("FASTFLOW_BACKEND", "auto")
if DEFAULT_BACKEND not in BACKENDS:
    raise ValueError(f"FASTFLOW_BACKEND must be one of {BACKENDS}, got {DEFAULT_BACKEND!r}")

Fields = VelocityField | Sequence[VelocityField]


# Public functions ---------------------------------------------------------------------------------------------------


def integrate(
    field: Fields,
    x_0: Tensor,
    cond: Tensor | None = None,
    *,
    num_steps: int,
    method: str = "euler",
    t_1: float = 1.0,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Walk x_0 through `num_steps` steps of the velocity field: x_{k+1} = x_k + (t_1/K) v(x_k, t_1 k/K, cond), as one
    operation.

    Args:
        field: a VelocityField, or several of one spec, whose ensembles then stand one behind the other on the E axis
            and are walked in the same launch (a critic and its target, say).
        x_0: where the walk starts: [B, D], [B, S, D] or, with an ensemble, [E, B, D], [E, B, S, D]. Without an E axis
            it is shared by all members. Dtype and device of the field.
        cond: [B, C], shared over E and S, or [E, B, C]; None where `cond_dim` is 0.
        num_steps: K, at least 1. Any value at run time: no kernel is compiled per K.
        method: "euler".
        t_1: end time; the walk starts at 0.
        backend: "auto" (kernels where they cover the case, else the reference), "fused" (kernels or an error) or
            "reference" (plain, traceable PyTorch: any order of derivative). Default: the environment variable
            FASTFLOW_BACKEND, else "auto".
        precision: of the matrix products: "bf16", "tf32" or "fp32"; the flow state, sums and statistics stay float32.
            Default: autocast if it is on, else torch's setting for float32 products on CUDA, "fp32" on the CPU. The
            reference rounds for "bf16" alone; its float32 products follow torch's setting.

    Returns:
        x_K with x_0's dtype, shaped as x_0, with a leading E axis if the field is an ensemble.

    Raises:
        ValueError: a shape, `num_steps`, `method`, `backend` or `precision` that does not fit.
        TypeError: a tensor of another dtype than the field's.
        NotImplementedError: `backend="fused"` where no kernel covers the case; it names what is missing.
    """
    call = _Call.open("integrate", field, backend, precision)
    _check_steps(num_steps, method, t_1)
    x, cond = call.canonical(x_0, cond, "x_0")
    if call.plain:
        out = _reference_integrate(x, cond, call.parameters, call.spec, num_steps, float(t_1), call.precision)
    else:
        fused = call.fused()
        out = torch.ops.fastflow.integrate(
            x, cond, call.parameters, call.key, num_steps, float(t_1), call.precision, fused
        )
    return call.restore(out.to(x_0.dtype))


def flow_matching_loss(
    field: VelocityField,
    x_0: Tensor,
    x_1: Tensor,
    t: Tensor,
    cond: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Flow-matching loss on the straight path: mean over D of (v(x_t, t, cond) - (x_1 - x_0))^2, x_t = (1 - t) x_0 +
    t x_1.

    Args:
        field: the VelocityField.
        x_0: noise, [B, D], [B, S, D], [E, B, D] or [E, B, S, D].
        x_1: data, shaped as x_0, or without its E axis, its S axis or both (then shared).
        t: times in [0, 1]: x_0's shape without D, or without its E axis, its S axis or both.
        cond: [B, C] or [E, B, C].
        weight: per-row weights, shaped like t; each row's loss is multiplied by it. It may require a gradient.
        reduction: "none" gives one loss per row, "sum" adds them, "mean" divides the sum by the number of rows.
        backend, precision: see `integrate`. Kernels give the gradients of the parameters, cond and weight; if x_0,
            x_1 or t requires a gradient the reference is used.

    Returns:
        A 0-d tensor, or with `reduction="none"` the losses [B], [B, S], [E, B] or [E, B, S].

    Raises:
        as `integrate`.
    """
    return _matching_loss("flow_matching_loss", field, x_0, x_1, t, cond, weight, reduction, backend, precision, True)


def velocity_matching_loss(
    field: VelocityField,
    x_t: Tensor,
    t: Tensor,
    target_velocity: Tensor,
    cond: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Regression of the velocity on a given target: mean over D of (v(x_t, t, cond) - target_velocity)^2.

    Arguments and result as in `flow_matching_loss`, with the point x_t and its target in place of the path's two ends.
    """
    return _matching_loss(
        "velocity_matching_loss", field, x_t, target_velocity, t, cond, weight, reduction, backend, precision, False
    )


def _matching_loss(
    name: str,
    field: VelocityField,
    a: Tensor,
    b: Tensor,
    t: Tensor,
    cond: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    backend: str | None,
    precision: str | None,
    interpolate: bool,
) -> Tensor:
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"{name}: reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
    if not isinstance(field, VelocityField):
        raise TypeError(f"{name}: field must be one VelocityField, got {type(field).__name__}")
    call = _Call.open(name, field, backend, precision)
    a_name, b_name = ("x_0", "x_1") if interpolate else ("x_t", "target_velocity")
    x, cond = call.canonical(a, cond, a_name)
    y = call.like_rows(b, b_name, trailing=True)
    t = call.like_rows(t, "t", trailing=False)
    if weight is not None:
        weight = call.like_rows(weight, "weight", trailing=False)
    grad = torch.is_grad_enabled()
    needs_inputs = grad and (x.requires_grad or y.requires_grad or t.requires_grad)
    fused = not call.plain and call.fused(
        "a gradient of the path's ends, its point, target or t" if needs_inputs else None
    )
    if fused or (torch.compiler.is_compiling() and not call.plain):
        needs = grad and (cond.requires_grad or any(p.requires_grad for p in call.parameters))
        rows = torch.ops.fastflow.matching_loss(
            x, y, t, cond, call.parameters, call.key, call.precision, interpolate, fused, fused and needs
        )[0]
    else:
        # Without kernels the operator's backward would repeat the forward pass, which autograd need not.
        rows = _reference_rows(x, y, t, cond, call.parameters, call.spec, call.precision, interpolate)
    if weight is not None:
        rows = rows * weight
    if reduction == "mean":
        return rows.mean()
    if reduction == "sum":
        return rows.sum()
    return call.restore(rows, trailing=False)


# Checks and the canonical form --------------------------------------------------------------------------------------


def _check_steps(num_steps: int, method: str, t_1: float) -> None:
    if isinstance(num_steps, (bool, float, Tensor)):
        raise TypeError(f"integrate: num_steps must be an int, got {type(num_steps).__name__}")
    if num_steps < 1:
        raise ValueError(f"integrate: num_steps must be at least 1, got {num_steps}")
    if method != "euler":
        raise ValueError(f"integrate: method must be 'euler', got {method!r}")
    if isinstance(t_1, Tensor):
        raise TypeError("integrate: t_1 must be a number; an end time per row is not supported")


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

    def check(self, tensor: Tensor, name: str, width: int | None) -> Tensor:
        """The tensor if its type, device and last axis fit (cast to the field's dtype under autocast), else an
        error."""
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

    def canonical(self, x: Tensor, cond: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
        """x as [E, B, S, D] and cond as [E or 1, B, C]; remembers which axes the caller gave."""
        x = self.check(x, name, self.spec.state_dim)
        members, has = self.members, self.has_members
        if cond is None:
            if self.spec.cond_dim:
                raise ValueError(f"{self.name}: cond must be [B, {self.spec.cond_dim}], got None")
        else:
            cond = self.check(cond, "cond", self.spec.cond_dim)
            if cond.dim() == 3 and has and cond.shape[0] == members:
                pass
            elif cond.dim() == 2:
                cond = cond.unsqueeze(0)
            else:
                raise self._shape_error("cond", cond, "C")
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

    def like_rows(self, tensor: Tensor, name: str, trailing: bool) -> Tensor:
        """A tensor that follows x's rows, as [E, B, S] or [E, B, S, D]: E, S or both may be missing (shared)."""
        tensor = self.check(tensor, name, self.spec.state_dim if trailing else None)
        lead = tuple(tensor.shape[:-1] if trailing else tensor.shape)
        b, s, e = self.batch, self.samples, self.members
        # (leading shape, has E axis, has S axis). Compared, never hashed: hashing a symbolic size would fix it when
        # compiled.
        forms: list[tuple[tuple[int, ...], bool, bool]] = [((b,), False, False)]
        if self.has_members and not self.has_samples:
            forms.append(((e, b), True, False))
        if self.has_samples:
            forms.append(((b, s), False, True))
        if self.has_members and self.has_samples:
            forms.append(((e, b, s), True, True))
        for form, *given in forms:
            if len(lead) == len(form) and lead == form:
                return self._expand(tensor, trailing, *given)
        tail = [self.spec.state_dim] if trailing else []
        expected = " or ".join(str([*form, *tail]) for form, *_ in forms)
        raise ValueError(f"{self.name}: {name} must be {expected}, got {list(tensor.shape)}")

    def _expand(self, tensor: Tensor, trailing: bool, given_members: bool, given_samples: bool) -> Tensor:
        if not given_members:
            tensor = tensor.unsqueeze(0)
        if not given_samples:
            tensor = tensor.unsqueeze(2)
        return tensor.expand(self.members, self.batch, self.samples, *([self.spec.state_dim] if trailing else []))

    def restore(self, out: Tensor, trailing: bool = True) -> Tensor:
        """The canonical result with the axes that the caller's tensors had."""
        if not self.has_samples:
            out = out.squeeze(2)
        return out if self.has_members else out.squeeze(0)

    def _shape_error(self, name: str, tensor: Tensor, letter: str, cond: Tensor | None = None) -> ValueError:
        width = self.spec.cond_dim if letter == "C" else self.spec.state_dim
        forms = ["B"] if letter == "C" else ["B", "B, S"]
        if self.has_members:
            forms += [f"{self.members}, {form}" for form in forms]
        expected = " or ".join(f"[{form}, {width}]" for form in forms)
        given = f" with cond {list(cond.shape[int(cond.shape[0] == 1) :])}" if cond is not None else ""
        return ValueError(f"{self.name}: {name} must be {expected}, got {list(tensor.shape)}{given}")

    def fused(self, unsupported: str | None = None) -> bool:
        """Whether kernels run this call; raises for `backend="fused"` where they cannot, warns once for "auto" on
        CUDA."""
        why = unsupported or _why_not_fused(self.spec, self.device, self.dtype, self.precision, self.backend)
        if why is None:
            return True
        if self.backend == "fused":
            raise NotImplementedError(f"{self.name}: no fused kernel for {why}; use backend='auto' or 'reference'")
        if self.device.type == "cuda":
            _warn_reference(self.name, why)
        return False


def _resolve_precision(precision: str | None, dtype: torch.dtype, device: torch.device) -> str:
    if precision is not None:
        return precision
    if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) != torch.float32:
        return "bf16"
    if dtype in (torch.bfloat16, torch.float16):
        return "bf16"
    # torch.compile does not follow a question for torch's settings: the operator asks when it runs.
    return "default" if device.type == "cuda" else "fp32"


def _concrete(precision: str) -> str:
    return launch.product_precision() if precision == "default" else precision


def _why_not_fused(
    spec: FieldSpec, device: torch.device, dtype: torch.dtype, precision: str, backend: str
) -> str | None:
    """What keeps kernels from running a call, or None."""
    if device.type != "cuda" and not (device.type == "cpu" and backend == "fused" and _INTERPRETED):
        return f"{device.type} tensors"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{dtype} parameters (float32 and bfloat16 have one)"
    if not _HAS_TRITON:
        return "an installation without triton"
    widths = (spec.hidden, spec.state_dim, spec.state_features, spec.time_features)
    return plan.why_unsupported(*widths, precision, device.index or 0 if device.type == "cuda" else None)


# What the kernels need is looked at once: neither changes while a process runs.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_warned: set[tuple[str, str]] = set()


def _warn_reference(name: str, why: str) -> None:
    if not torch.compiler.is_compiling() and (name, why) not in _warned:
        _warned.add((name, why))
        warnings.warn(f"fastflow.{name} runs on the PyTorch reference: no fused kernel for {why}", stacklevel=4)


# Reference implementations on canonical tensors ---------------------------------------------------------------------


def _per_field(spec: FieldSpec, parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Each field's own parameters, out of the flat list an operator takes."""
    n = 2 * len(spec.layer_sizes) + (2 * len(spec.hidden) if spec.norm else 0)
    return [list(parameters[i : i + n]) for i in range(0, len(parameters), n)]


def _slices(spec: FieldSpec, count: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each field's share of canonical tensors, without the E axis where the spec has none."""
    width = spec.ensemble or 1
    out = []
    for i in range(count):
        share = [t if t.shape[0] == 1 < width * count else t[i * width : (i + 1) * width] for t in tensors]
        out.append(tuple(t[0] if spec.ensemble is None else t for t in share))
    return out


def _reference_integrate(
    x_0: Tensor, cond: Tensor, parameters: Sequence[Tensor], spec: FieldSpec, num_steps: int, t_1: float, precision: str
) -> Tensor:
    fields = _per_field(spec, parameters)
    walks = [
        reference.euler(spec, ps, x, c.unsqueeze(-2), num_steps, t_1, precision)
        for ps, (x, c) in zip(fields, _slices(spec, len(fields), x_0, cond), strict=True)
    ]
    if spec.ensemble is None:
        return torch.stack(walks)
    return torch.cat(walks) if len(walks) > 1 else walks[0]


def _reference_rows(
    a: Tensor,
    b: Tensor,
    t: Tensor,
    cond: Tensor,
    parameters: Sequence[Tensor],
    spec: FieldSpec,
    precision: str,
    interpolate: bool,
) -> Tensor:
    fields = _per_field(spec, parameters)
    ((a, b, t, cond),) = _slices(spec, len(fields), a, b, t, cond)
    x_t, target = reference.interpolate(a, b, t) if interpolate else (a, b)
    rows = reference.matching_rows(spec, fields[0], x_t, t, target, cond.unsqueeze(-2), precision)
    return rows.unsqueeze(0) if spec.ensemble is None else rows


def _fold_vmap(
    v: int, key: str, tensors: Sequence[Tensor], dims: Sequence[Any], parameters: Sequence[Tensor], p_dims: Any
) -> tuple[list[Tensor], list[Tensor], str]:
    """Folds a vmapped axis of size V into the ensemble: tensors and parameters [V * E, ...], and the spec of that
    ensemble."""
    spec = FieldSpec.from_key(key)
    if len(_per_field(spec, parameters)) != 1:
        raise NotImplementedError(
            "fastflow: vmap over several fields in one call; vmap one field, or use backend='reference'"
        )
    members = spec.ensemble or 1

    def fold(x: Tensor, dim: int | None, has_members: bool = True) -> Tensor:
        x = x.expand(v, *x.shape) if dim is None else x.movedim(dim, 0)
        if not has_members:
            return x
        return x.expand(v, members, *x.shape[2:]).flatten(0, 1)  # cond may be [1, B, C], shared over E

    folded = [fold(x, dim) for x, dim in zip(tensors, dims, strict=True)]
    p_dims = p_dims if p_dims is not None else [None] * len(parameters)
    folded_parameters = [fold(p, dim, spec.ensemble is not None) for p, dim in zip(parameters, p_dims, strict=True)]
    return folded, folded_parameters, dataclasses.replace(spec, ensemble=v * members).key


def _refuse_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "fastflow: second derivatives do not go through the fused operators; "
        "call with backend='reference', which is plain PyTorch"
    )


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


# fastflow::integrate ------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "fastflow::integrate",
    mutates_args=(),
    schema="(Tensor x_0, Tensor cond, Tensor[] parameters, str key, SymInt num_steps, float t_1, str precision, "
    "bool fused) -> Tensor",
)
def _integrate(
    x_0: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    key: str,
    num_steps: int,
    t_1: float,
    precision: str,
    fused: bool,
) -> Tensor:
    spec = FieldSpec.from_key(key)
    if fused and x_0.numel():
        from fastflow.kernels import integrate as kernel

        fields = _per_field(spec, parameters)
        steps = torch.arange(num_steps, device=x_0.device, dtype=torch.float32) * (t_1 / num_steps)
        times = spec.time_embedding.features(steps)
        with torch.cuda.device_of(x_0):
            return kernel.integrate(x_0, cond, fields, times, t_1 / num_steps, _kernel_options(spec, precision))
    return _reference_integrate(x_0, cond, parameters, spec, num_steps, t_1, precision).clone(
        memory_format=torch.contiguous_format
    )


@_integrate.register_fake
def _(
    x_0: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    key: str,
    num_steps: int,
    t_1: float,
    precision: str,
    fused: bool,
) -> Any:
    return x_0.new_empty(x_0.shape)


@torch.library.custom_op(
    "fastflow::integrate_bwd",
    mutates_args=(),
    schema="(Tensor grad, Tensor x_0, Tensor cond, Tensor[] parameters, str key, SymInt num_steps, float t_1, "
    "str precision) -> Tensor[]",
)
def _integrate_bwd(
    grad: Tensor,
    x_0: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    key: str,
    num_steps: int,
    t_1: float,
    precision: str,
) -> list[Tensor]:
    spec = FieldSpec.from_key(key)

    def walk(x_0: Tensor, cond: Tensor, *parameters: Tensor) -> Tensor:
        return _reference_integrate(x_0, cond, parameters, spec, num_steps, t_1, precision)

    return _vjp(walk, grad, x_0, cond, *parameters)


@_integrate_bwd.register_fake
def _(
    grad: Tensor,
    x_0: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    key: str,
    num_steps: int,
    t_1: float,
    precision: str,
) -> Any:
    return [p.new_empty(p.shape) for p in (x_0, cond, *parameters)]


def _integrate_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x_0, cond, parameters, *ctx.options, _ = inputs
    ctx.save_for_backward(x_0, cond, *parameters)


def _integrate_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x_0, cond, *parameters = ctx.saved_tensors
    grads = torch.ops.fastflow.integrate_bwd(grad, x_0, cond, parameters, *ctx.options)
    return (grads[0], grads[1], list(grads[2:]), None, None, None, None, None)


_integrate.register_autograd(_integrate_backward, setup_context=_integrate_setup)
_integrate_bwd.register_autograd(_refuse_double_backward, setup_context=_save_nothing)


@_integrate.register_vmap
def _(info: Any, in_dims: Any, x_0: Tensor, cond: Tensor, parameters: list[Tensor], key: str, *options: Any) -> Any:
    v = info.batch_size
    (x_0, cond), parameters, key = _fold_vmap(v, key, (x_0, cond), in_dims[:2], parameters, in_dims[2])
    return torch.ops.fastflow.integrate(x_0, cond, parameters, key, *options).unflatten(0, (v, -1)), 0


def _vjp(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Vector-Jacobian product by recomputation. An operator's body runs below autograd; torch.func brings its own."""
    pull = torch.func.vjp(function, *inputs)[1]
    return _owned(pull(grad), grad, *inputs)


def _owned(outputs: Sequence[Tensor], *inputs: Tensor) -> list[Tensor]:
    """Contiguous outputs that share no memory with the inputs or one another, as operators must return them."""
    seen = {x.untyped_storage().data_ptr() for x in inputs}
    owned = []
    for x in outputs:
        if not x.is_contiguous() or x.untyped_storage().data_ptr() in seen:
            x = x.clone(memory_format=torch.contiguous_format)
        seen.add(x.untyped_storage().data_ptr())
        owned.append(x)
    return owned


# fastflow::matching_loss --------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "fastflow::matching_loss",
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor t, Tensor cond, Tensor[] parameters, str key, str precision, "
    "bool interpolate, bool fused, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _matching_loss_op(
    a: Tensor,
    b: Tensor,
    t: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    key: str,
    precision: str,
    interpolate: bool,
    fused: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    spec = FieldSpec.from_key(key)
    if fused and a.numel():
        from fastflow.kernels import matching as kernel

        fields = _per_field(spec, parameters)
        with torch.cuda.device_of(a):
            return kernel.matching(a, b, t, cond, fields[0], interpolate, save, _kernel_options(spec, precision))
    rows = _reference_rows(a, b, t, cond, parameters, spec, precision, interpolate)
    return (rows.clone(memory_format=torch.contiguous_format), *(a.new_empty(0) for _ in range(4)))


@_matching_loss_op.register_fake
def _(
    a: Tensor,
    b: Tensor,
    t: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    key: str,
    precision: str,
    interpolate: bool,
    fused: bool,
    save: bool,
) -> Any:
    rows = a.new_empty(t.shape)
    if not (fused and save):
        return (rows, *(a.new_empty(0) for _ in range(4)))
    from fastflow.kernels import matching as kernel

    spec = FieldSpec.from_key(key)
    return (rows, *kernel.saved_tensors(a, _kernel_options(spec, precision)))


@torch.library.custom_op(
    "fastflow::matching_loss_bwd",
    mutates_args=(),
    schema="(Tensor grad, Tensor a, Tensor b, Tensor t, Tensor cond, Tensor[] parameters, Tensor[] saved, str key, "
    "str precision, bool interpolate, bool fused, bool needs_inputs) -> Tensor[]",
)
def _matching_loss_bwd(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    t: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    saved: list[Tensor],
    key: str,
    precision: str,
    interpolate: bool,
    fused: bool,
    needs_inputs: bool,
) -> list[Tensor]:
    spec = FieldSpec.from_key(key)
    if fused and a.numel():
        from fastflow.kernels import matching as kernel

        fields = _per_field(spec, parameters)
        with torch.cuda.device_of(a):
            grads = kernel.matching_bwd(grad, cond, fields[0], saved, _kernel_options(spec, precision))
        return _owned(grads, grad)

    def rows(cond: Tensor, *parameters: Tensor) -> Tensor:
        return _reference_rows(a, b, t, cond, parameters, spec, precision, interpolate)

    def rows_of_all(cond: Tensor, *rest: Tensor) -> Tensor:
        *parameters, a, b, t = rest
        return _reference_rows(a, b, t, cond, parameters, spec, precision, interpolate)

    if needs_inputs:
        return _vjp(rows_of_all, grad, cond, *parameters, a, b, t)
    return _vjp(rows, grad, cond, *parameters)


@_matching_loss_bwd.register_fake
def _(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    t: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    saved: list[Tensor],
    key: str,
    precision: str,
    interpolate: bool,
    fused: bool,
    needs_inputs: bool,
) -> Any:
    inputs = (a, b, t) if needs_inputs else ()
    return [p.new_empty(p.shape) for p in (cond, *parameters, *inputs)]


def _matching_setup(ctx: Any, inputs: Any, output: Any) -> None:
    a, b, t, cond, parameters, key, precision, interpolate, fused, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, b, t, cond, *parameters, *output[1:])
    # Backward multiplies in what forward multiplied in, whatever torch's settings are by then.
    ctx.options = (key, _concrete(precision), interpolate, fused)
    ctx.count = len(parameters)


def _matching_backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None, None, None, None, [None] * ctx.count, None, None, None, None, None)
    a, b, t, cond, *rest = ctx.saved_tensors
    parameters, saved = rest[: ctx.count], rest[ctx.count :]
    needs_inputs = any(ctx.needs_input_grad[:3])
    grads = torch.ops.fastflow.matching_loss_bwd(grad, a, b, t, cond, parameters, saved, *ctx.options, needs_inputs)
    of_inputs = grads[1 + ctx.count :] if needs_inputs else (None, None, None)
    return (*of_inputs, grads[0], list(grads[1 : 1 + ctx.count]), None, None, None, None, None)


_matching_loss_op.register_autograd(_matching_backward, setup_context=_matching_setup)
_matching_loss_bwd.register_autograd(_refuse_double_backward, setup_context=_save_nothing)


@_matching_loss_op.register_vmap
def _(
    info: Any,
    in_dims: Any,
    a: Tensor,
    b: Tensor,
    t: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    key: str,
    *options: Any,
) -> Any:
    v = info.batch_size
    (a, b, t, cond), parameters, key = _fold_vmap(v, key, (a, b, t, cond), in_dims[:4], parameters, in_dims[4])
    rows, *saved = torch.ops.fastflow.matching_loss(a, b, t, cond, parameters, key, *options)
    # Saved tensors stay with the folded call, whose backward reads them; nobody looks at them from outside.
    return (rows.unflatten(0, (v, -1)), *saved), (0, None, None, None, None)


def _kernel_options(spec: FieldSpec, precision: str) -> plan.Network:
    """What a kernel launcher needs to know of the spec, in the kernels' own words (they import nothing of fastflow)."""
    embedding = spec.state_embedding
    state = {"Identity": "identity", "Scaled": "scaled", "HLGauss": "hl_gauss"}[type(embedding).__name__]
    time = {"RawTime": "raw", "Cosine": "cosine", "CosineFourier": "cosine_fourier"}[type(spec.time_embedding).__name__]
    return plan.Network(
        state_dim=spec.state_dim,
        cond_dim=spec.cond_dim,
        hidden=spec.hidden,
        activation=spec.activation,
        norm=spec.norm == "layer",
        eps=spec.norm_eps,
        state_embedding=state,
        state_features=spec.state_features,
        low=getattr(embedding, "low", 0.0),
        high=getattr(embedding, "high", 1.0),
        sigma=getattr(embedding, "sigma", 1.0),
        time_embedding=time,
        time_features=spec.time_features,
        precision=_concrete(precision),
    )
