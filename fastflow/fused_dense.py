"""Plain networks on a GPU, by the kernels of the velocity networks: Dense -> activation -> optional LayerNorm, then
Dense is one Euler step from 0 along a velocity that depends on cond alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow.kernels import launch, plan

if TYPE_CHECKING:
    from fastflow.dense import Kind
    from fastflow.kernels.pack import Parameters, Saved

_WALK = ((0.0, 1.0), 1, "euler")


def network(kind: Kind) -> plan.Network:
    """The network in the kernels' words: neither state nor time is looked at."""
    hidden = kind.hidden
    return plan.Network(
        state_dim=kind.widths[-1],
        cond_dim=kind.widths[0],
        hidden=hidden,
        inputs=tuple((i - 1,) if i else () for i in range(len(hidden))),
        add=(-1,) * len(hidden),
        activation=kind.activation,
        norm="after" if kind.norm else "none",
        eps=kind.eps,
        state_embedding="identity",
        state_features=0,
        low=0.0,
        high=1.0,
        sigma=1.0,
        time_embedding="raw",
        time_features=0,
        prediction="velocity",
        output_scale=1.0,
        precision=launch.product_precision() if kind.precision == "default" else kind.precision,
    )


@functools.lru_cache(maxsize=256)
def _looked_up(kind: Kind) -> plan.Network:
    return plan.KnownNetwork(**vars(network(kind)))


def _known(kind: Kind) -> plan.Network:
    """The same, looked up."""
    if kind.precision == "default":
        kind = kind._replace(precision=launch.product_precision())
    return _looked_up(kind)


def unsupported(kind: Kind, device: torch.device) -> str | None:
    """What keeps the kernels from covering a network, or None."""
    index = (device.index or 0) if device.type == "cuda" else None
    return plan.why_unsupported(network(kind), index)


def _parts(parameters: Sequence[Tensor], norm: bool) -> Parameters:
    from fastflow.kernels.pack import Parameters, with_members

    tensors = with_members(parameters)
    pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
    layers = (len(pairs) + 1) // 2 if norm else len(pairs)
    return Parameters(pairs[:layers], pairs[layers:], (), (), ())


def sizes(members: int, rows: int, net: plan.Network) -> tuple[int, int]:
    """float32 numbers that `forward` keeps: for pre-activations, which may be bfloat16, and for statistics."""
    from fastflow.kernels.pack import Saved, product_dtype

    pre, _, stats = Saved.sizes(members, plan.padded_rows(rows), net)
    return pre * product_dtype(net).itemsize // 4, stats


def _saved(kept: Tensor, members: int, rows: int, net: plan.Network) -> Saved:
    """Pre-activations and statistics in their places."""
    from fastflow.kernels.pack import Saved, product_dtype

    pre, stats = kept.split(sizes(members, rows, net))
    pre = pre.view(product_dtype(net))
    return Saved(pre, pre.new_empty(0), stats, plan.padded_rows(rows))


def forward(x: Tensor, parameters: Sequence[Tensor], kind: Kind, keep: bool) -> tuple[Tensor, Tensor]:
    """(y [E, M, out], what `backward` reads, empty without `keep`) of x [E or 1, M, in]."""
    from fastflow.kernels import encode, integrate, pack, prepare

    net, parts = _known(kind), _parts(parameters, kind.norm)
    members, rows = parts.layers[0][0].shape[0], x.shape[1]
    ends, num_steps, method = _WALK
    with torch.cuda.device_of(x):
        start = x.new_zeros((members, rows, 1, net.state_dim))
        kept = x.new_empty(sum(sizes(members, rows, net)) if keep else 0)
        saved = _saved(kept, members, rows, net) if keep else None
        prepared, _ = prepare.prepare([parts], x, *_WALK, encode.Times("raw", 0), net)
        packed = pack.pack([parts], True, net)
        y, _, _ = integrate.integrate(start, prepared, packed, ends, None, num_steps, method, False, saved, net)
    return y.squeeze(2), kept


def backward(
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    kept: Tensor,
    kind: Kind,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """(d_x, shaped as x, or None; gradients of all parameters or []) from grad [E, M, out]."""
    from fastflow.kernels import backward, encode, pack, prepare, unfold

    net, parts = _known(kind), _parts(parameters, kind.norm)
    (members, rows, d), (ends, num_steps, method) = grad.shape, _WALK
    saved = _saved(kept, members, rows, net)
    with torch.cuda.device_of(x):
        start = grad.new_empty((1, members, rows, 1, d))  # of which nothing is read
        prepared, encoded = prepare.prepare([parts], x, *_WALK, encode.Times("raw", 0), net, stored=True)
        found = backward.backward(
            grad.unsqueeze(2),
            None,
            start,
            start,
            None,
            ends,
            prepared,
            pack.pack([parts], True, net),
            [parts],
            saved,
            (members, rows, 1, d),
            num_steps,
            method,
            needs_x,
            needs_weights,
            False,
            net,
        )
        d_x, given = prepare.prepare_bwd([parts], encoded, found, x, needs_x, needs_weights, net)
        grads = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters if needs_weights]
        for some in given:
            assert found.sums is not None
            into = _parts(grads, kind.norm)
            unfold.unfold_network(found.sums, some, parts, into, 0, ends, num_steps, method, net)
    return d_x, grads
