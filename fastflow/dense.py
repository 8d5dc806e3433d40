"""Plain networks, Dense -> activation -> optional LayerNorm, then Dense, as one operator: native code on the CPU, the
kernels of the velocity networks on a GPU.

Policies and value networks beside a flow are this; so are the encoders inside a field.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow import fused_dense, operators, reference
from fastflow.kernels import cpu, launch, plan


class Kind(NamedTuple):
    """A network without its weights: widths from input to result, with or without a Dense layer behind the last hidden
    one (`head`)."""

    widths: tuple[int, ...]
    head: bool
    activation: str
    norm: bool
    eps: float
    precision: str

    @property
    def hidden(self) -> tuple[int, ...]:
        """Widths of the hidden layers."""
        return self.widths[1:-1] if self.head else self.widths[1:]


# Layers at least this wide keep their products for the way back; narrower ones are sooner computed again than read.
KEPT_WIDTH = 128


def kept_floats(hidden: Sequence[int], rows: int) -> int:
    """How many floats a pass over `rows` rows keeps for its way back: those of all hidden layers' products, or none."""
    kept = rows * sum(map(cpu.padded, hidden))
    return kept if min(hidden) >= KEPT_WIDTH and 4 * kept <= plan.STORE_BYTES else 0


@functools.lru_cache(maxsize=256)
def _description(kind: Kind) -> cpu.Description:
    outputs = kind.widths[-1] if kind.head else 0
    return cpu.describe_stack(
        kind.widths[0], kind.hidden, outputs, kind.activation, kind.norm, kind.eps, kind.precision
    )


def _ints(x: Tensor, members: int) -> list[int]:
    rows, width = x.shape[1], x.shape[2]
    return [1, members, rows, 1, 1, torch.get_num_threads(), 1, rows * width if x.shape[0] > 1 else 0, *(0,) * 5]


def forward(x: Tensor, parameters: Sequence[Tensor], members: int, kind: Kind, keep: bool) -> tuple[Tensor, Tensor]:
    """(y [E, M, out], what `backward` reads) of x [E or 1, M, in]; parameters [in, out] or [E, in, out]."""
    x = x.contiguous()
    y = x.new_empty(members, x.shape[1], kind.widths[-1])
    kept = x.new_empty(kept_floats(kind.hidden, members * x.shape[1]) if keep else 0)
    if y.numel():
        weights = [p.contiguous() for p in parameters]
        tensors = (x, None, None, *weights, y, kept if kept.numel() else None)
        cpu.call("stack", _description(kind), _ints(x, members), (), tensors)
    return y, kept


def backward(
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    kept: Tensor,
    members: int,
    kind: Kind,
    needs_x: bool,
    needs_weights: bool,
    gradients: Sequence[Tensor] | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """(d_x, shaped as x, or None; gradients of all parameters or []): in `gradients`, where that is given."""
    x = x.contiguous()
    d_x = x.new_empty(members, *x.shape[1:]) if needs_x else None
    weights = [p.contiguous() for p in parameters]
    grads = [torch.empty_like(p) for p in weights] if needs_weights and gradients is None else [*(gradients or ())]
    if not grad.numel():
        return None if d_x is None else torch.zeros_like(x), [g.zero_() for g in grads]
    tensors = (x, None, None, *weights, grad.contiguous(), kept if kept.numel() else None, d_x, None, *grads)
    cpu.call("stack_bwd", _description(kind), (*_ints(x, members), int(needs_weights)), (), tensors)
    if d_x is not None and x.shape[0] < members:
        d_x = d_x.sum(0, keepdim=True)
    return d_x, grads


# The operator -------------------------------------------------------------------------------------------------------


def _kind(x: Tensor, parameters: Sequence[Tensor], activation: str, norm: bool, eps: float, precision: str) -> Kind:
    n = len(parameters) // 2
    layers = (n + 1) // 2 if norm else n
    widths = (x.shape[-1], *(b.shape[-1] for b in parameters[1 : 2 * layers : 2]))
    return Kind(widths, True, activation, norm, eps, precision)


def _members(parameters: Sequence[Tensor]) -> int:
    return parameters[0].shape[0] if parameters[0].dim() == 3 else 1


@torch.library.custom_op(
    f"{operators.NAMESPACE}::dense_stack",
    mutates_args=(),
    schema="(Tensor x, Tensor[] parameters, str activation, bool norm, float eps, str precision, str runner, bool keep)"
    " -> (Tensor y, Tensor kept)",
)
def _dense_stack(
    x: Tensor,
    parameters: list[Tensor],
    activation: str,
    norm: bool,
    eps: float,
    precision: str,
    runner: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    kind = _kind(x, parameters, activation, norm, eps, precision)
    if runner == "triton":
        return fused_dense.forward(x, parameters, kind, keep)
    return forward(x, parameters, _members(parameters), kind, keep)


@_dense_stack.register_fake
def _(
    x: Tensor,
    parameters: list[Tensor],
    activation: str,
    norm: bool,
    eps: float,
    precision: str,
    runner: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    kind, members = _kind(x, parameters, activation, norm, eps, precision), _members(parameters)
    y, kept = x.new_empty(members, x.shape[1], kind.widths[-1]), 0
    if keep:
        rows = x.shape[1]
        if runner == "triton":
            kept = sum(fused_dense.sizes(members, rows, fused_dense.network(kind)))
        else:
            kept = kept_floats(kind.hidden, members * rows)
    return y, x.new_empty(kept)


@torch.library.custom_op(
    f"{operators.NAMESPACE}::dense_stack_bwd",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor[] parameters, Tensor kept, str activation, bool norm, float eps, "
    "str precision, str runner, bool[] needs) -> Tensor[]",
)
def _dense_stack_bwd(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    kept: Tensor,
    activation: str,
    norm: bool,
    eps: float,
    precision: str,
    runner: str,
    needs: list[bool],
) -> list[Tensor]:
    """[d_x, *d_parameters]; a tensor without elements for what `needs` (x, parameters) does not ask for."""
    kind = _kind(x, parameters, activation, norm, eps, precision)
    needs_x, needs_weights = needs
    if runner == "triton":
        d_x, grads = fused_dense.backward(grad, x, parameters, kept, kind, needs_x, needs_weights)
    else:
        d_x, grads = backward(grad, x, parameters, kept, _members(parameters), kind, needs_x, needs_weights)
    return [x.new_empty(0) if d_x is None else d_x, *(grads or [p.new_empty(0) for p in parameters])]


@_dense_stack_bwd.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    kept: Tensor,
    activation: str,
    norm: bool,
    eps: float,
    precision: str,
    runner: str,
    needs: list[bool],
) -> list[Tensor]:
    wanted = (needs[0], *[needs[1]] * len(parameters))
    return [t.new_empty(t.shape if need else (0,)) for t, need in zip((x, *parameters), wanted, strict=True)]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, parameters, *ctx.options, _keep = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], *parameters)


def _gradient(ctx: Any, grad: Tensor | None, unused: Tensor | None) -> tuple[Any, ...]:
    x, kept, *parameters = ctx.saved_tensors
    rest = [None] * 6
    needs_x, needs_parameters, *_ = operators.needs_of(ctx)
    if grad is None:
        return (None, [None] * len(parameters), *rest)
    if torch.is_grad_enabled():
        # Somebody differentiates this gradient: plain PyTorch can be.
        activation, norm, eps, precision, _ = ctx.options
        leaves = [x, *parameters]
        rows = x.expand(_members(parameters), -1, -1) if parameters[0].dim() == 3 else x
        y = reference.dense_stack(rows, parameters, activation, "layer" if norm else None, eps, precision)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
        grads = [next(found) if leaf.requires_grad else None for leaf in leaves]
        return (grads[0], grads[1:], *rest)
    needs = [needs_x, any(needs_parameters)]
    d_x, *d_parameters = _backward(grad, x, parameters, kept, *ctx.options, needs)
    return (d_x if needs_x else None, d_parameters if needs[1] else [None] * len(parameters), *rest)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("fastflow: a gradient of a gradient needs create_graph=True when the first is computed")


_operator = operators.Operator(_dense_stack, _setup, _gradient)
_backward = operators.Operator(_dense_stack_bwd, operators.save_nothing, _refuse)


def dense_stack(
    x: Tensor,
    parameters: Sequence[Tensor],
    activation: str,
    norm: str | None,
    eps: float = 1e-6,
    precision: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """`reference.dense_stack`, by one operator where that covers the call and `backend` allows it.

    Args:
        x: [..., in], or [E, ..., in] with ensemble parameters.
        parameters, activation, norm, eps, precision: as there. Under autocast native products take bfloat16.
        backend: "reference" for plain PyTorch; else native code on the CPU, and on a GPU the kernels with products in
            bf16 or TF32 (in float32, whose products they do without matrix instructions, with "fused" alone).

    Returns:
        [..., out], or [E, ..., out].
    """
    runner = _runner(x, parameters, activation, norm, eps, precision, backend)
    if runner is None:
        return reference.dense_stack(x, parameters, activation, norm, eps, precision)
    ensemble = parameters[0].dim() == 3
    rows = x if ensemble else x.unsqueeze(0)
    if ensemble and rows.stride(0) == 0:
        rows = rows[:1]  # one input for all members
    lead = rows.shape[1:-1]
    rows = rows.reshape(rows.shape[0], math.prod(lead), rows.shape[-1])
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
    if precision is None:
        autocast = runner == "native" and torch.is_autocast_enabled("cpu")
        # A kernel asks for torch's setting when it runs.
        precision = "bf16" if autocast else "fp32" if runner == "native" else "default"
    y, _ = _operator(rows, list(parameters), activation, norm is not None, eps, precision, runner, keep)
    return y.reshape(y.shape[0], *lead, y.shape[-1]) if ensemble else y.reshape(*lead, y.shape[-1])


def _runner(
    x: Tensor,
    parameters: Sequence[Tensor],
    activation: str,
    norm: str | None,
    eps: float,
    precision: str | None,
    backend: str,
) -> str | None:
    """What runs a network: "native", "triton", or None for plain PyTorch."""
    if backend == "reference":
        return None
    interpreted = backend == "fused" and launch.interpreted()
    if not (x.is_cuda or interpreted):
        return "native" if _covered(x, parameters) else None
    if len(parameters) < 4 or not x.numel() or any(t.dtype != torch.float32 for t in (x, *parameters)):
        return None
    if operators.inside_transform() or torch.is_autocast_enabled(x.device.type) or not launch.HAS_TRITON:
        return None
    precision = _default_precision() if precision is None else precision
    if precision == "fp32" and backend != "fused":
        return None
    kind = _kind(x, parameters, activation, norm is not None, eps, precision)
    return "triton" if fused_dense.unsupported(kind, x.device) is None else None


@torch.compiler.assume_constant_result
def _default_precision() -> str:
    """torch's setting, which torch.compile does not follow: it takes what holds when it compiles."""
    return launch.product_precision()


def _covered(x: Tensor, parameters: Sequence[Tensor]) -> bool:
    if x.device.type != "cpu" or len(parameters) < 4 or any(t.dtype != torch.float32 for t in (x, *parameters)):
        return False
    return not operators.inside_transform() and cpu.why_unavailable() is None


# Gradients without autograd -------------------------------------------------------------------------------------------


class Stack(NamedTuple):
    """A network with its weights; arguments of `dense_stack`."""

    parameters: Sequence[Tensor]
    activation: str
    norm: str | None
    precision: str | None
    eps: float = 1e-6

    def kind(self, x: Tensor) -> Kind:
        """Without its weights, on inputs as x."""
        precision = self.precision or "fp32"
        return _kind(x, self.parameters, self.activation, self.norm is not None, self.eps, precision)


class Regression(NamedTuple):
    """What `regression` returns: the mean squared error, 0-d, and the results [M, out], or [E, M, out] of members."""

    loss: Tensor
    y: Tensor


def regression(
    x: Tensor, network: Stack, target: Tensor, scale: float, gradients: Sequence[Tensor]
) -> Regression | None:
    """The mean squared error of a network, over all members, and `scale` times its gradients in one pass, which holds a
    block's activations for its way back; None, and nothing done, where native code does not cover the call.

    Args:
        x, target: [M, in] and [M, out], neither with a gradient of its own.
        network: with members or not, which share x and target.
        gradients: where those of the parameters go, in their order; contiguous.
    """
    parameters = network.parameters
    if not _covered_directly((x, target), parameters) or len(x) != len(target):
        return None
    kind, members = network.kind(x), _members(parameters)
    if target.shape[1] != kind.widths[-1]:
        return None
    y, mean = target.new_empty(members, *target.shape), target.new_empty(())
    inputs = (x.contiguous(), None, None, *(p.contiguous() for p in parameters), target.contiguous())
    ints = _ints(x.unsqueeze(0), members)
    cpu.call("regression", _description(kind), ints, (scale,), (*inputs, y, mean, None, *gradients))
    return Regression(mean, y if parameters[0].dim() == 3 else y[0])


def climb(
    x: Tensor, policy: Stack, critic: Stack, toward: Tensor, alpha: float, gradients: Sequence[Tensor]
) -> tuple[Tensor, Tensor] | None:
    """E|y - toward|^2 and E[Q], both 0-d, and the gradients of alpha times the first less the second by the policy's
    parameters, in one pass: y are its results on x = [obs, noise], Q a critic's on [obs, y clipped to [-1, 1]], over
    all members. None, and nothing done, where native code does not cover the call.

    Args:
        x: [M, O + noise]. policy: without members. critic: of O + out inputs and one output, with members or not.
        toward: [M, out].
        gradients: where those of the policy's parameters go, in their order; contiguous.
    """
    given = (*policy.parameters, *critic.parameters)
    if not _covered_directly((x, toward), given) or len(x) != len(toward) or policy.parameters[0].dim() != 2:
        return None
    inputs = toward.new_empty(0, critic.parameters[0].shape[-2])
    kinds, members = (policy.kind(x), critic.kind(inputs)), _members(critic.parameters)
    out = kinds[0].widths[-1]
    if toward.shape[1] != out or kinds[1].widths[-1] != 1 or not out <= inputs.shape[1] <= out + x.shape[1]:
        return None
    if kinds[0].precision != kinds[1].precision:
        return None
    rows, told = x.unsqueeze(0), x.new_empty(2)
    weights = [[p.contiguous() for p in stack.parameters] for stack in (policy, critic)]
    networks = cpu.before(_description(kinds[0]), _ints(rows, 1), _description(kinds[1]))
    tensors = (x.contiguous(), None, None, *weights[0], None, None, None, *weights[1], toward.contiguous(), told)
    cpu.call("climb", networks, _ints(rows, members), (alpha,), (*tensors, None, *gradients))
    distance, value = told.unbind()
    return distance, value


class Pass(NamedTuple):
    """What `forward_pass` returns.

    Attributes:
        y: the results, [M, out].
        x, parameters, kept, kind: what the way back reads.
    """

    y: Tensor
    x: Tensor
    parameters: Sequence[Tensor]
    kept: Tensor
    kind: Kind

    def back(self, grad: Tensor, gradients: Sequence[Tensor]) -> None:
        """Leaves the parameters' gradients in `gradients`, contiguous and in their order, for that of y [M, out]."""
        backward(grad, self.x, self.parameters, self.kept, 1, self.kind, False, True, gradients)


def forward_pass(x: Tensor, network: Stack) -> Pass | None:
    """A network without members on x [M, in], whose way back is a call of its own and not autograd's. None, and nothing
    done, where native code does not cover the call."""
    parameters = network.parameters
    if not _covered_directly((x,), parameters) or parameters[0].dim() != 2:
        return None
    kind, rows = network.kind(x), x.unsqueeze(0)
    y, kept = forward(rows, parameters, 1, kind, True)
    return Pass(y[0], rows, parameters, kept, kind)


def _covered_directly(inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> bool:
    """Whether native code may compute gradients of a network's parameters on inputs [M, ...], M > 0, that want none
    themselves: nobody looks at operators, and all tensors are ordinary ones."""
    if not (operators.unobserved() and torch.is_grad_enabled()) or torch.is_autocast_enabled("cpu"):
        return False
    if not _covered(inputs[0], parameters):
        return False
    if any(
        type(t) not in operators.ORDINARY or t.dtype != torch.float32 or not t.is_cpu for t in (*inputs, *parameters)
    ):
        return False
    return all(x.dim() == 2 and len(x) > 0 and not x.requires_grad for x in inputs)
