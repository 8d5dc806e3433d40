"""The public functions: they check, bring tensors to the canonical form [E, B, S, D] and choose what runs the call.

What runs is one torch operator per integration and one per loss (`fastflow.operators`), or plain PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow import operators
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
        out = operators.reference_integrate(x, cond, call.parameters, call.spec, num_steps, float(t_1), call.precision)
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
        rows = operators.reference_rows(x, y, t, cond, call.parameters, call.spec, call.precision, interpolate)
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
_INTERPRETED = launch.interpreted()

_warned: set[tuple[str, str]] = set()


def _warn_reference(name: str, why: str) -> None:
    if not torch.compiler.is_compiling() and (name, why) not in _warned:
        _warned.add((name, why))
        warnings.warn(f"fastflow.{name} runs on the PyTorch reference: no fused kernel for {why}", stacklevel=4)
