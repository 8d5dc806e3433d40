"""The torch operators fastflow::integrate and fastflow::matching_loss: kernels or reference, fakes, autograd, vmap.

One operator per integration and one per loss, whatever the number of steps and layers. They take canonical tensors: x
[E, B, S, D], t [E, B, S], cond [1 or E, B, C], step noise [K, E, B, S, D], parameters as one flat list, the spec as
its key. `runner` says who does the work: "triton" (`fastflow.fused`), "native" (`fastflow.cpu`) or "reference".
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastflow import reference
from fastflow.fields import FieldSpec
from fastflow.kernels import launch  # needs no triton
from fastflow.philox import PhiloxNoise

# The package's name. The Hub loads its copy of these files (`fastflow.hub`) under another, so both have operators.
NAMESPACE = __name__.partition(".")[0]

# Reference implementations on canonical tensors ---------------------------------------------------------------------


def _per_field(spec: FieldSpec, parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Each field's own parameters, out of the flat list an operator takes."""
    n = spec.num_parameters
    return [list(parameters[i : i + n]) for i in range(0, len(parameters), n)]


def _slices(spec: FieldSpec, count: int, *tensors: Tensor | None) -> list[list[Any]]:
    """Each field's share of canonical tensors, without the E axis where the spec has none."""
    width = spec.ensemble or 1
    out = []
    for i in range(count):
        share = [t if t is None or t.shape[0] == 1 < width * count else t[i * width : (i + 1) * width] for t in tensors]
        out.append([t[0] if t is not None and spec.ensemble is None else t for t in share])
    return out


def reference_integrate(
    x_0: Tensor,
    cond: Tensor,
    parameters: Sequence[Tensor],
    t_0: Tensor | None,
    t_1: Tensor | None,
    step_noise: Tensor | None,
    spec: FieldSpec,
    num_steps: int,
    start: float,
    end: float,
    method: str,
    precision: str,
    trajectory: bool = False,
) -> Tensor:
    """x_K [E, B, S, D], or with `trajectory` every x_k [K + 1, ...]; `start` and `end` stand in for t_0 and t_1."""
    fields = _per_field(spec, parameters)
    by_member = None if step_noise is None else step_noise.movedim(1, 0)
    walks = []
    for ps, (x, c, begin, stop, noise) in zip(
        fields, _slices(spec, len(fields), x_0, cond, t_0, t_1, by_member), strict=True
    ):
        if noise is not None and spec.ensemble is not None:
            noise = noise.movedim(0, 1)
        times = (start if begin is None else begin, end if stop is None else stop)
        walks.append(
            reference.integrate(
                spec, ps, x, c.unsqueeze(-2), num_steps, *times, method, precision, noise, trajectory=trajectory
            )
        )
    axis = int(trajectory)
    if spec.ensemble is None:
        return torch.stack(walks, axis)
    return torch.cat(walks, axis) if len(walks) > 1 else walks[0]


def reference_rows(
    a: Tensor,
    b: Tensor,
    t: Tensor,
    cond: Tensor,
    parameters: Sequence[Tensor],
    spec: FieldSpec,
    precision: str,
    interpolate: bool,
    sigma_min: float,
) -> Tensor:
    """The loss of each row, [E, B, S]."""
    fields = _per_field(spec, parameters)
    ((a, b, t, cond),) = _slices(spec, len(fields), a, b, t, cond)
    x_t, target = reference.interpolate(a, b, t, sigma_min) if interpolate else (a, b)
    rows = reference.matching_rows(spec, fields[0], x_t, t, target, cond.unsqueeze(-2), precision)
    return rows.unsqueeze(0) if spec.ensemble is None else rows


def draw(noise: PhiloxNoise, like: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
    """x_0 [E, B, S, D] and t [E, B, S] (that given, if it is) from a generator, shaped and typed as `like`."""
    x_0 = noise.x_0(like.shape[-1]).to(like.dtype).expand(like.shape)
    t = noise.t().to(like.dtype).expand(like.shape[:-1]) if t is None else t
    return x_0, t


def drawn(a: Tensor, b: Tensor, t: Tensor, seed: Tensor | None, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """a and t of the loss operator, drawn if it was given a generator in their place."""
    if seed is None or ids is None:
        return a, t
    return draw(PhiloxNoise(seed, ids, b.shape[2]), b, t if t.dim() == b.dim() - 1 else None)


# What the operators share -------------------------------------------------------------------------------------------


def refuse_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "fastflow: second derivatives do not go through the fused operators; "
        "call with backend='reference', which is plain PyTorch"
    )


def _refuse_time_gradient(needed: Iterable[bool], names: str) -> None:
    """The public functions see to it where a tensor says that it requires a gradient; one inside vmap does not."""
    if any(needed):
        raise NotImplementedError(
            f"fastflow: a gradient of {names} does not go through the operators; use backend='reference'"
        )


def _both_times(
    t_0: Tensor | None, t_1: Tensor | None, start: float, end: float, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Kernels take the times of both ends as tensors or neither."""
    if t_0 is None and t_1 is None:
        return None, None
    shape = like.shape[:-1]
    t_0 = like.new_full((), start, dtype=torch.float32).expand(shape) if t_0 is None else t_0
    return t_0, like.new_full((), end, dtype=torch.float32).expand(shape) if t_1 is None else t_1


def save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Kernels are launched on the current device."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def _kernels(runner: str) -> ModuleType:
    """What runs an operator. Both modules hold the same functions."""
    return importlib.import_module(f"{NAMESPACE}.{'fused' if runner == 'triton' else 'cpu'}")


def _concrete(precision: str) -> str:
    return launch.product_precision() if precision == "default" else precision


def _vjp(
    function: Callable[..., Tensor], grad: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """Vector-Jacobian product by recomputation, with no elements for the inputs that need none.

    An operator's body runs below autograd; torch.func brings its own.
    """
    wanted = [i for i, need in enumerate(needs) if need]
    outputs = [grad.new_empty(0) for _ in inputs]
    if not wanted:
        return outputs

    def of_wanted(*values: Tensor) -> Tensor:
        every = list(inputs)
        for i, value in zip(wanted, values, strict=True):
            every[i] = value
        return function(*every)

    pull = torch.func.vjp(of_wanted, *(inputs[i] for i in wanted))[1]
    for i, value in zip(wanted, pull(grad), strict=True):
        outputs[i] = value
    return _owned(outputs, grad, *inputs)


def _owned(outputs: Sequence[Tensor], *inputs: Tensor | None) -> list[Tensor]:
    """Contiguous outputs that share no memory with the inputs or one another, as operators must return them."""
    seen = {x.untyped_storage().data_ptr() for x in inputs if x is not None}
    owned = []
    for x in outputs:
        # What has no elements has no memory to share.
        if x.numel() and (not x.is_contiguous() or x.untyped_storage().data_ptr() in seen):
            x = x.clone(memory_format=torch.contiguous_format)
        seen.add(x.untyped_storage().data_ptr())
        owned.append(x)
    return owned


def _grads_like(inputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Uninitialised gradients, contiguous, with no elements for the inputs that need none."""
    return [x.new_empty(x.shape) if need else x.new_empty(0) for x, need in zip(inputs, needs, strict=True)]


def _where(needs: Sequence[bool], grads: Sequence[Tensor]) -> list[Tensor | None]:
    return [grad if need else None for need, grad in zip(needs, grads, strict=True)]


class _Fold:
    """A vmapped axis of size V inside the ensemble: member v E + e of the folded call is member e of call v."""

    def __init__(self, v: int, key: str, parameters: Sequence[Tensor]) -> None:
        self.spec = FieldSpec.from_key(key)
        if len(_per_field(self.spec, parameters)) != 1:
            raise NotImplementedError(
                "fastflow: vmap over several fields in one call; vmap one field, or use backend='reference'"
            )
        self.v, self.members = v, self.spec.ensemble or 1
        self.key = dataclasses.replace(self.spec, ensemble=v * self.members).key

    def tensor(self, x: Any, dim: int | None, axis: int = 0) -> Any:
        """A canonical tensor whose E axis is `axis`, with V * E members; None and placeholders pass."""
        if x is None:
            return x
        if x.dim() - (dim is not None) == 1:
            return x if dim is None else x.select(dim, 0)
        x = x.expand(self.v, *x.shape) if dim is None else x.movedim(dim, 0)
        x = x.movedim(0, axis)
        sizes = [*x.shape]
        sizes[axis + 1] = self.members  # cond may be [1, B, C], shared over E
        return x.expand(sizes).flatten(axis, axis + 1)

    def parameters(self, parameters: Sequence[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
        if self.spec.ensemble is not None:
            return [self.tensor(p, dim) for p, dim in zip(parameters, dims, strict=True)]
        return [
            p.expand(self.v, *p.shape) if dim is None else p.movedim(dim, 0)
            for p, dim in zip(parameters, dims, strict=True)
        ]

    def undo(self, x: Tensor, axis: int = 0) -> Tensor:
        """Of a result whose V * E members are on `axis`: [V, E] there."""
        return x.unflatten(axis, (self.v, self.members))

    def undo_grads(
        self,
        grads: Sequence[Tensor],
        needs: Sequence[bool],
        axes: Sequence[int],
        cond_at: int,
        cond: Tensor,
        cond_dim: int | None,
    ) -> tuple[list[Tensor], list[int | None]]:
        """Gradients of canonical tensors (their E axes in `axes`), then of parameters, and the place of V in each."""
        shared = cond.shape[1 if cond_dim == 0 else 0] == 1
        out: list[Tensor] = []
        dims: list[int | None] = []
        for i, (grad, need) in enumerate(zip(grads, needs, strict=True)):
            axis = axes[i] if i < len(axes) else 0
            if need and (i < len(axes) or self.spec.ensemble is not None):
                grad = self.undo(grad, axis)
                if i == cond_at and shared:
                    grad = grad.sum(1, keepdim=True)
            out.append(grad)
            dims.append(axis if need else None)
        return out, dims


def _batched(dims: Any) -> bool:
    """Whether any of the (lists of) vmapped dimensions is one."""
    if isinstance(dims, (list, tuple)):
        return any(_batched(dim) for dim in dims)
    return dims is not None


def _one_by_one(
    operator: Callable[..., Sequence[Tensor]], v: int, grads: Sequence[Tensor | None], dims: Sequence[Any], *rest: Any
) -> tuple[list[Tensor], list[int]]:
    """A backward operator under vmap over the incoming gradients alone, whose forward pass was one for all of them."""
    results = []
    for i in range(v):
        own = [g if g is None or dim is None else g.select(dim, i) for g, dim in zip(grads, dims, strict=True)]
        results.append(operator(*own, *rest))
    stacked = [torch.stack(of_all) for of_all in zip(*results, strict=True)]
    return stacked, [0] * len(stacked)


# Inside torch.func --------------------------------------------------------------------------------------------------


def inside_transform() -> bool:
    """Whether vmap, grad or another transform of torch.func runs this call (a compiled one cannot tell)."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


class _Nesting:
    """How an operator's arguments, some of which are lists of tensors, lie side by side in one tuple."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        self.lengths = [
            len(a) if isinstance(a, (list, tuple)) and all(isinstance(x, Tensor) for x in a) else None
            for a in arguments
        ]

    def flat(self, arguments: Sequence[Any]) -> list[Any]:
        out: list[Any] = []
        for argument, length in zip(arguments, self.lengths, strict=True):
            out.extend([argument] if length is None else argument)
        return out

    def nested(self, flat: Sequence[Any]) -> list[Any]:
        out: list[Any] = []
        i = 0
        for length in self.lengths:
            out.append(flat[i] if length is None else list(flat[i : i + length]))
            i += 1 if length is None else length
        return out


class Operator:
    """A custom operator with its gradient and its vmap rule, and the ways it is called.

    Compiled code and modes that look at operators see the operator. Transforms of torch.func do not: the autograd that
    torch.library gives an operator raises there (pytorch/pytorch#168393), and an autograd.Function of the same parts
    stands in for it. Nor does plain eager code: what torch.library does around a call costs more than a small walk. An
    autograd.Function sees no tensors in lists, so lists of tensors become arguments of their own.

    Args:
        setup_context, backward: as for `torch.library.register_autograd`.
        vmap: as for `torch.library.register_vmap`, with the operator to call before its arguments; None for an operator
            that its caller keeps out of transforms.
    """

    def __init__(
        self,
        op: torch.library.CustomOpDef,
        setup_context: Callable[..., None],
        backward: Callable[..., Any],
        vmap: Callable[..., tuple[Any, Any]] | None = None,
    ) -> None:
        self.op: Any = getattr(getattr(torch.ops, NAMESPACE), op._name)
        self.body: Any = op._init_fn
        op.register_autograd(backward, setup_context=setup_context)
        if vmap is not None:
            op.register_vmap(functools.partial(vmap, self.op))
        call, body = self, self.body

        class Eager(torch.autograd.Function):
            # With a setup_context of its own torch would look at forward's signature at every call.
            @staticmethod
            def forward(ctx: Any, nesting: _Nesting, *flat: Any) -> tuple[Tensor, ...]:
                ctx.nesting, inputs = nesting, nesting.nested(flat)
                outputs = tuple(body(*inputs))
                setup_context(ctx, inputs, outputs)
                return outputs

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return (None, *ctx.nesting.flat(backward(ctx, *grads)))

        class Transformed(torch.autograd.Function):
            @staticmethod
            def forward(nesting: _Nesting, *flat: Any) -> tuple[Tensor, ...]:
                return tuple(call.op(*nesting.nested(flat)))

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                ctx.nesting, *flat = inputs
                setup_context(ctx, ctx.nesting.nested(flat), output)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return (None, *ctx.nesting.flat(backward(ctx, *grads)))

            @staticmethod
            def vmap(info: Any, in_dims: Any, nesting: _Nesting, *flat: Any) -> Any:
                assert vmap is not None
                outputs, dims = vmap(call, info, nesting.nested(in_dims[1:]), *nesting.nested(flat))
                return tuple(outputs), tuple(dims)

        self.eager, self.transformed = Eager, Transformed

    def __call__(self, *arguments: Any) -> Sequence[Tensor]:
        if torch.compiler.is_compiling():
            return self.op(*arguments)
        if inside_transform():
            nesting = _Nesting(arguments)
            return self.transformed.apply(nesting, *nesting.flat(arguments))
        plain, differentiated = _look(arguments)
        if not plain:
            return self.op(*arguments)
        if differentiated and torch.is_grad_enabled():
            nesting = _Nesting(arguments)
            return self.eager.apply(nesting, *nesting.flat(arguments))
        return self.body(*arguments)


def unwatched() -> bool:
    """Whether nobody looks at operators: no dispatch mode, tracer or forward derivative."""
    watched = torch._C._len_torch_dispatch_stack() or torch._C._is_tracing()
    return not watched and torch.autograd.forward_ad._current_level < 0


def unobserved() -> bool:
    """Whether native code may be called with no operator around it: nothing compiles, transforms or watches that."""
    return not torch.compiler.is_compiling() and unwatched() and not inside_transform()


def _look(arguments: Sequence[Any]) -> tuple[bool, bool]:
    """(whether nobody watches operators and all tensors are ordinary ones, whether one requires a gradient)."""
    plain = unwatched()
    differentiated = False
    for argument in arguments:
        for x in argument if isinstance(argument, list) else (argument,):
            if isinstance(x, Tensor):
                plain = plain and type(x) in ORDINARY
                differentiated = differentiated or x.requires_grad
    return plain, differentiated


ORDINARY = (Tensor, torch.nn.Parameter)


def needs_of(ctx: Any) -> Any:
    """Which inputs need a gradient, nested as the operator's arguments."""
    return ctx.nesting.nested(ctx.needs_input_grad[1:]) if hasattr(ctx, "nesting") else ctx.needs_input_grad


# fastflow::integrate ------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    f"{NAMESPACE}::integrate",
    mutates_args=(),
    schema="(Tensor x_0, Tensor cond, Tensor[] parameters, Tensor? t_0, Tensor? t_1, Tensor? step_noise, str key, "
    "SymInt num_steps, float start, float end, str method, str precision, str runner, bool keep, bool store) -> "
    "(Tensor x_1, Tensor path, Tensor stages, Tensor pre, Tensor out, Tensor stats)",
)
def _integrate(
    x_0: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    t_0: Tensor | None,
    t_1: Tensor | None,
    step_noise: Tensor | None,
    key: str,
    num_steps: int,
    start: float,
    end: float,
    method: str,
    precision: str,
    runner: str,
    keep: bool,
    store: bool,
) -> tuple[Tensor, ...]:
    """x_K, every x_k before its step (none unless `keep`), and what the kernels' backward pass reads."""
    spec = FieldSpec.from_key(key)
    if runner != "reference":
        kernels = _kernels(runner)

        precision = _concrete(precision)
        if not x_0.numel():
            return kernels.walk_fakes(x_0, spec, num_steps, method, precision, keep, store)
        t_0, t_1 = _both_times(t_0, t_1, start, end, x_0)
        with _on_device(x_0):
            return kernels.walk(
                x_0, cond, parameters, t_0, t_1, step_noise, spec, num_steps, start, end, method, precision, keep, store
            )
    options = (spec, num_steps, start, end, method, precision)
    walked = reference_integrate(x_0, cond, parameters, t_0, t_1, step_noise, *options, trajectory=keep)
    x_1, path = (walked[-1], walked[:-1]) if keep else (walked, x_0.new_empty(0))
    return (*_owned((path, x_1), x_0)[::-1], *(x_0.new_empty(0) for _ in range(4)))


@_integrate.register_fake
def _(
    x_0: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    t_0: Tensor | None,
    t_1: Tensor | None,
    step_noise: Tensor | None,
    key: str,
    num_steps: int,
    start: float,
    end: float,
    method: str,
    precision: str,
    runner: str,
    keep: bool,
    store: bool,
) -> Any:
    if runner != "reference":
        kernels = _kernels(runner)

        spec = FieldSpec.from_key(key)
        return kernels.walk_fakes(x_0, spec, num_steps, method, _concrete(precision), keep, store)
    path = x_0.new_empty((num_steps, *x_0.shape)) if keep else x_0.new_empty(0)
    return (x_0.new_empty(x_0.shape), path, *(x_0.new_empty(0) for _ in range(4)))


@torch.library.custom_op(
    f"{NAMESPACE}::integrate_bwd",
    mutates_args=(),
    schema="(Tensor? grad, Tensor? grad_path, Tensor x_0, Tensor cond, Tensor[] parameters, Tensor? t_0, Tensor? t_1, "
    "Tensor? step_noise, Tensor[] saved, str key, SymInt num_steps, float start, float end, str method, "
    "str precision, str runner, bool store, bool[] needs) -> Tensor[]",
)
def _integrate_bwd(
    grad: Tensor | None,
    grad_path: Tensor | None,
    x_0: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    t_0: Tensor | None,
    t_1: Tensor | None,
    step_noise: Tensor | None,
    saved: list[Tensor],
    key: str,
    num_steps: int,
    start: float,
    end: float,
    method: str,
    precision: str,
    runner: str,
    store: bool,
    needs: list[bool],
) -> list[Tensor]:
    """[d_x_0, d_cond, d_step_noise, *d_parameters] where `needs` (x_0, cond, parameters, step_noise) asks for them."""
    spec = FieldSpec.from_key(key)
    options = (spec, num_steps, start, end, method, precision)
    if not x_0.numel():
        return [g.zero_() for g in _integrate_grads(x_0, cond, parameters, num_steps, needs)]
    if runner != "reference":
        kernels = _kernels(runner)

        t_0, t_1 = _both_times(t_0, t_1, start, end, x_0)
        with _on_device(x_0):
            grads = kernels.walk_bwd(grad, grad_path, cond, parameters, t_0, t_1, saved, *options, store, needs)
        return _owned(grads, grad, grad_path, x_0, cond, *parameters, *saved)

    def walk(x_0: Tensor, cond: Tensor, step_noise: Tensor | None, *parameters: Tensor) -> Tensor:
        return reference_integrate(
            x_0, cond, parameters, t_0, t_1, step_noise, *options, trajectory=grad_path is not None
        )

    if grad_path is not None:
        grad = torch.cat([grad_path, (torch.zeros_like(x_0) if grad is None else grad).unsqueeze(0)])
    assert grad is not None
    return _vjp(walk, grad, (x_0, cond, step_noise, *parameters), _integrate_needs(needs, len(parameters)))


def _integrate_needs(needs: Sequence[bool], count: int) -> list[bool]:
    """`needs` for each of the backward operator's results."""
    return [needs[0], needs[1], needs[3], *[needs[2]] * count]


def _integrate_grads(
    x_0: Tensor, cond: Tensor, parameters: Sequence[Tensor], num_steps: int, needs: Sequence[bool]
) -> list[Tensor]:
    noise = x_0.unsqueeze(0).expand(num_steps, *x_0.shape)
    return _grads_like((x_0, cond, noise, *parameters), _integrate_needs(needs, len(parameters)))


@_integrate_bwd.register_fake
def _(
    grad: Tensor | None,
    grad_path: Tensor | None,
    x_0: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    t_0: Tensor | None,
    t_1: Tensor | None,
    step_noise: Tensor | None,
    saved: list[Tensor],
    key: str,
    num_steps: int,
    start: float,
    end: float,
    method: str,
    precision: str,
    runner: str,
    store: bool,
    needs: list[bool],
) -> Any:
    return _integrate_grads(x_0, cond, parameters, num_steps, needs)


def _integrate_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x_0, cond, parameters, t_0, t_1, step_noise, *options, precision, runner, keep, store = inputs
    ctx.set_materialize_grads(False)
    ctx.kept = runner != "reference" and keep  # what the kernels' backward pass reads in place of the step noise
    saved = (None, *output[1:]) if ctx.kept else (step_noise,)
    ctx.save_for_backward(x_0, cond, t_0, t_1, *parameters, *saved)
    # Backward multiplies in what forward multiplied in, whatever torch's settings are by then.
    ctx.options = (*options, _concrete(precision), runner)
    ctx.keep, ctx.store, ctx.count = keep, store, len(parameters)


def _integrate_grad(ctx: Any, grad: Tensor | None, grad_path: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    n, needed = ctx.count, needs_of(ctx)
    rest = [None] * 9
    grad_path = grad_path if ctx.keep else None  # else it is that of a tensor without elements
    if grad is None and grad_path is None:
        return (None, None, [None] * n, None, None, None, *rest)
    _refuse_time_gradient(needed[3:5], "t_0 or t_1")
    x_0, cond, t_0, t_1, *saved = ctx.saved_tensors
    parameters, step_noise, saved = saved[:n], saved[n], saved[n + 1 :]
    inputs = (x_0, cond, parameters, t_0, t_1, step_noise)
    if ctx.options[-1] != "reference" and not ctx.kept:
        # Nobody saw at the call that a gradient would be asked for: a tensor inside vmap does not say.
        saved = integrate(*inputs, *ctx.options, True, ctx.store)[1:]
    needs = [needed[0], needed[1], any(needed[2]), needed[5]]
    grads = _integrate_backward(grad, grad_path, *inputs, list(saved), *ctx.options, ctx.store, needs)
    d_x_0, d_cond, d_noise, *d_parameters = _where(_integrate_needs(needs, n), grads)
    return (d_x_0, d_cond, d_parameters, None, None, d_noise, *rest)


def _integrate_vmap(
    operator: Callable[..., Sequence[Tensor]],
    info: Any,
    in_dims: Any,
    x_0: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    t_0: Tensor | None,
    t_1: Tensor | None,
    step_noise: Tensor | None,
    key: str,
    *options: Any,
) -> Any:
    fold = _Fold(info.batch_size, key, parameters)
    x_1, path, *saved = operator(
        fold.tensor(x_0, in_dims[0]),
        fold.tensor(cond, in_dims[1]),
        fold.parameters(parameters, in_dims[2]),
        fold.tensor(t_0, in_dims[3]),
        fold.tensor(t_1, in_dims[4]),
        fold.tensor(step_noise, in_dims[5], 1),
        fold.key,
        *options,
    )
    keep = options[-2]
    path = fold.undo(path, 1) if keep else path
    # What the kernels' backward pass reads stays with the folded call; nobody looks at it from outside.
    return (fold.undo(x_1), path, *saved), (0, 1 if keep else None, None, None, None, None)


def _integrate_bwd_vmap(
    operator: Callable[..., Sequence[Tensor]],
    info: Any,
    in_dims: Any,
    grad: Tensor | None,
    grad_path: Tensor | None,
    x_0: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    t_0: Tensor | None,
    t_1: Tensor | None,
    step_noise: Tensor | None,
    saved: list[Tensor],
    key: str,
    *options: Any,
) -> Any:
    if not _batched(in_dims[2:9]):
        rest = (x_0, cond, parameters, t_0, t_1, step_noise, saved, key, *options)
        return _one_by_one(operator, info.batch_size, (grad, grad_path), in_dims[:2], *rest)
    fold = _Fold(info.batch_size, key, parameters)
    path = [fold.tensor(saved[0], in_dims[8][0], 1)] if saved else []
    grads = operator(
        fold.tensor(grad, in_dims[0]),
        fold.tensor(grad_path, in_dims[1], 1),
        fold.tensor(x_0, in_dims[2]),
        fold.tensor(cond, in_dims[3]),
        fold.parameters(parameters, in_dims[4]),
        fold.tensor(t_0, in_dims[5]),
        fold.tensor(t_1, in_dims[6]),
        fold.tensor(step_noise, in_dims[7], 1),
        [*path, *saved[1:]],
        fold.key,
        *options,
    )
    return fold.undo_grads(grads, _integrate_needs(options[-1], len(parameters)), (0, 0, 1), 1, cond, in_dims[3])


integrate = Operator(_integrate, _integrate_setup, _integrate_grad, _integrate_vmap)
_integrate_backward = Operator(_integrate_bwd, save_nothing, refuse_double_backward, _integrate_bwd_vmap)


# fastflow::matching_loss --------------------------------------------------------------------------------------------


@torch.library.custom_op(
    f"{NAMESPACE}::matching_loss",
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor t, Tensor cond, Tensor[] parameters, Tensor? seed, Tensor? ids, str key, "
    "str precision, bool interpolate, float sigma_min, str runner, bool save, bool invariant) -> "
    "(Tensor rows, Tensor error, Tensor x_t, Tensor pre, Tensor out, Tensor stats)",
)
def _matching_loss_op(
    a: Tensor,
    b: Tensor,
    t: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    seed: Tensor | None,
    ids: Tensor | None,
    key: str,
    precision: str,
    interpolate: bool,
    sigma_min: float,
    runner: str,
    save: bool,
    invariant: bool,
) -> tuple[Tensor, ...]:
    """The loss of each row and what the kernels' backward pass reads. With a seed and ids, `a` has no elements: it is
    drawn, and so is a `t` without."""
    spec = FieldSpec.from_key(key)
    if runner != "reference":
        kernels = _kernels(runner)

        precision = _concrete(precision)
        if not b.numel():
            return kernels.loss_fakes(b, spec, precision, save, invariant)
        path = (interpolate, sigma_min)
        with _on_device(b):
            return kernels.loss(a, b, t, cond, parameters, seed, ids, spec, precision, *path, save, invariant)
    a, t = drawn(a, b, t, seed, ids)
    rows = reference_rows(a, b, t, cond, parameters, spec, precision, interpolate, sigma_min)
    return (rows.clone(memory_format=torch.contiguous_format), *(b.new_empty(0) for _ in range(5)))


@_matching_loss_op.register_fake
def _(
    a: Tensor,
    b: Tensor,
    t: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    seed: Tensor | None,
    ids: Tensor | None,
    key: str,
    precision: str,
    interpolate: bool,
    sigma_min: float,
    runner: str,
    save: bool,
    invariant: bool,
) -> Any:
    if runner != "reference":
        kernels = _kernels(runner)

        return kernels.loss_fakes(b, FieldSpec.from_key(key), _concrete(precision), save, invariant)
    return (b.new_empty(b.shape[:-1]), *(b.new_empty(0) for _ in range(5)))


@torch.library.custom_op(
    f"{NAMESPACE}::matching_loss_bwd",
    mutates_args=(),
    schema="(Tensor grad, Tensor a, Tensor b, Tensor t, Tensor cond, Tensor[] parameters, Tensor? seed, Tensor? ids, "
    "Tensor[] saved, str key, str precision, bool interpolate, float sigma_min, str runner, bool[] needs) -> Tensor[]",
)
def _matching_loss_bwd(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    t: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    seed: Tensor | None,
    ids: Tensor | None,
    saved: list[Tensor],
    key: str,
    precision: str,
    interpolate: bool,
    sigma_min: float,
    runner: str,
    needs: list[bool],
) -> list[Tensor]:
    """[d_a, d_b, d_cond, *d_parameters] where `needs` (a, b, cond, parameters) asks for them."""
    spec = FieldSpec.from_key(key)
    if not b.numel():
        return [g.zero_() for g in _matching_grads(a, b, cond, parameters, needs)]
    options = (spec, precision, interpolate, sigma_min)
    if runner != "reference":
        kernels = _kernels(runner)

        with _on_device(b):
            grads = kernels.loss_bwd(grad, a, b, t, cond, parameters, seed, ids, saved, *options, needs)
        return _owned(grads, grad, a, b, t, cond, *parameters, *saved)

    start, times = drawn(a, b, t, seed, ids)

    def rows(a: Tensor, b: Tensor, cond: Tensor, *parameters: Tensor) -> Tensor:
        return reference_rows(a, b, times, cond, parameters, *options)

    return _vjp(rows, grad, (start, b, cond, *parameters), _matching_needs(needs, len(parameters)))


def _matching_needs(needs: Sequence[bool], count: int) -> list[bool]:
    """`needs` for each of the backward operator's results."""
    return [*needs[:3], *[needs[3]] * count]


def _matching_grads(
    a: Tensor, b: Tensor, cond: Tensor, parameters: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    return _grads_like((a, b, cond, *parameters), _matching_needs(needs, len(parameters)))


@_matching_loss_bwd.register_fake
def _(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    t: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    seed: Tensor | None,
    ids: Tensor | None,
    saved: list[Tensor],
    key: str,
    precision: str,
    interpolate: bool,
    sigma_min: float,
    runner: str,
    needs: list[bool],
) -> Any:
    return _matching_grads(a, b, cond, parameters, needs)


def _matching_setup(ctx: Any, inputs: Any, output: Any) -> None:
    a, b, t, cond, parameters, seed, ids, key, precision, *path, runner, save, invariant = inputs
    ctx.set_materialize_grads(False)
    ctx.saved, ctx.invariant, ctx.count = runner != "reference" and save, invariant, len(parameters)
    ctx.save_for_backward(a, b, t, cond, seed, ids, *parameters, *(output[1:] if ctx.saved else ()))
    # Backward multiplies in what forward multiplied in, whatever torch's settings are by then.
    ctx.options = (key, _concrete(precision), *path, runner)


def _matching_grad(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    n, needed = ctx.count, needs_of(ctx)
    rest = [None] * 9
    if grad is None:
        return (None, None, None, None, [None] * n, *rest)
    _refuse_time_gradient(needed[2:3], "t")
    a, b, t, cond, seed, ids, *saved = ctx.saved_tensors
    parameters, saved = saved[:n], saved[n:]
    inputs = (a, b, t, cond, parameters, seed, ids)
    if ctx.options[-1] != "reference" and not ctx.saved:
        # Nobody saw at the call that a gradient would be asked for: a tensor inside vmap does not say.
        saved = matching_loss(*inputs, *ctx.options, True, ctx.invariant)[1:]
    needs = [needed[0], needed[1], needed[3], any(needed[4])]
    grads = _matching_backward(grad, *inputs, list(saved), *ctx.options, needs)
    d_a, d_b, d_cond, *d_parameters = _where(_matching_needs(needs, n), grads)
    return (d_a, d_b, None, d_cond, d_parameters, *rest)


def _refuse_batched_noise(dims: Sequence[int | None]) -> None:
    if _batched(dims):
        raise NotImplementedError("fastflow: vmap over a PhiloxNoise's seed or ids; use backend='reference'")


def _matching_vmap(
    operator: Callable[..., Sequence[Tensor]],
    info: Any,
    in_dims: Any,
    a: Tensor,
    b: Tensor,
    t: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    seed: Tensor | None,
    ids: Tensor | None,
    key: str,
    *options: Any,
) -> Any:
    _refuse_batched_noise(in_dims[5:7])
    fold = _Fold(info.batch_size, key, parameters)
    tensors = [fold.tensor(x, dim) for x, dim in zip((a, b, t, cond), in_dims, strict=False)]
    rows, *saved = operator(*tensors, fold.parameters(parameters, in_dims[4]), seed, ids, fold.key, *options)
    # What the kernels' backward pass reads stays with the folded call; nobody looks at it from outside.
    return (fold.undo(rows), *saved), (0, None, None, None, None, None)


def _matching_bwd_vmap(
    operator: Callable[..., Sequence[Tensor]],
    info: Any,
    in_dims: Any,
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    t: Tensor,
    cond: Tensor,
    parameters: list[Tensor],
    seed: Tensor | None,
    ids: Tensor | None,
    saved: list[Tensor],
    key: str,
    *options: Any,
) -> Any:
    _refuse_batched_noise(in_dims[6:8])
    if not _batched(in_dims[1:6]):
        rest = (a, b, t, cond, parameters, seed, ids, saved, key, *options)
        return _one_by_one(operator, info.batch_size, (grad,), in_dims[:1], *rest)
    fold = _Fold(info.batch_size, key, parameters)
    tensors = [fold.tensor(x, dim) for x, dim in zip((grad, a, b, t, cond), in_dims, strict=False)]
    grads = operator(*tensors, fold.parameters(parameters, in_dims[5]), seed, ids, saved, fold.key, *options)
    return fold.undo_grads(grads, _matching_needs(options[-1], len(parameters)), (0, 0, 0), 2, cond, in_dims[4])


matching_loss = Operator(_matching_loss_op, _matching_setup, _matching_grad, _matching_vmap)
_matching_backward = Operator(_matching_loss_bwd, save_nothing, refuse_double_backward, _matching_bwd_vmap)
