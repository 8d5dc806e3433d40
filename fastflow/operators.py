"""The torch operators fastflow::integrate and fastflow::matching_loss: kernels or reference, fakes, autograd, vmap.

One operator per integration and one per loss, whatever the number of steps and layers. They take canonical tensors: x
[E, B, S, D], t [E, B, S], cond [1 or E, B, C], parameters as one flat list, the spec as its key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastflow import reference
from fastflow.fields import FieldSpec
from fastflow.kernels import launch, plan  # neither needs triton

# Reference implementations on canonical tensors ---------------------------------------------------------------------


def _per_field(spec: FieldSpec, parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Each field's own parameters, out of the flat list an operator takes."""
    n = spec.num_parameters
    return [list(parameters[i : i + n]) for i in range(0, len(parameters), n)]


def _slices(spec: FieldSpec, count: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each field's share of canonical tensors, without the E axis where the spec has none."""
    width = spec.ensemble or 1
    out = []
    for i in range(count):
        share = [t if t.shape[0] == 1 < width * count else t[i * width : (i + 1) * width] for t in tensors]
        out.append(tuple(t[0] if spec.ensemble is None else t for t in share))
    return out


def reference_integrate(
    x_0: Tensor, cond: Tensor, parameters: Sequence[Tensor], spec: FieldSpec, num_steps: int, t_1: float, precision: str
) -> Tensor:
    fields = _per_field(spec, parameters)
    walks = [
        reference.integrate(spec, ps, x, c.unsqueeze(-2), num_steps, 0.0, t_1, precision=precision)
        for ps, (x, c) in zip(fields, _slices(spec, len(fields), x_0, cond), strict=True)
    ]
    if spec.ensemble is None:
        return torch.stack(walks)
    return torch.cat(walks) if len(walks) > 1 else walks[0]


def reference_rows(
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
    """Folds a vmapped axis of size V into the ensemble: tensors and parameters [V * E, ...], and its spec."""
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
        times = t_1 * torch.arange(num_steps, device=x_0.device, dtype=torch.float32) / num_steps
        times = spec.time_embedding.features(times)
        with torch.cuda.device_of(x_0):
            return kernel.integrate(x_0, cond, fields, times, t_1 / num_steps, _kernel_options(spec, precision))
    return reference_integrate(x_0, cond, parameters, spec, num_steps, t_1, precision).clone(
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
        return reference_integrate(x_0, cond, parameters, spec, num_steps, t_1, precision)

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
    rows = reference_rows(a, b, t, cond, parameters, spec, precision, interpolate)
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
        return reference_rows(a, b, t, cond, parameters, spec, precision, interpolate)

    def rows_of_all(cond: Tensor, *rest: Tensor) -> Tensor:
        *parameters, a, b, t = rest
        return reference_rows(a, b, t, cond, parameters, spec, precision, interpolate)

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


def _concrete(precision: str) -> str:
    return launch.product_precision() if precision == "default" else precision
