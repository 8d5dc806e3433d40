"""What a walk or a loss needs before its kernel: cond's and time's shares of the first layer or of FiLM, by launches
alone. And their way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from . import plan
from .encode import Chain, Times, dense, dense_bwd, embed_times, time_rows
from .first_layer import first_layer, first_layer_bwd
from .launch import batched_product, exact_products
from .pack import Parameters, Prepared, of_field, product_dtype
from .unfold import Given

if TYPE_CHECKING:
    from .backward import Gradients

Ends = tuple[float, float] | tuple[Tensor, Tensor]
"""Start and end of a walk: numbers that all rows share, or [1 or E, B S] each, every row's own."""


@dataclass
class Encoded:
    """What the way back of one field's preparation needs, where networks prepare it."""

    time: Chain | None = None  # the MLP behind the time embedding
    features: Tensor | None = None  # [1 or E, N, T] float32, of times that all rows share
    cond: Chain | None = None  # FiLM: the MLP that cond goes through
    encoded: Tensor | None = None  # [E, B, K] its result


def prepare(
    fields: Sequence[Parameters],
    cond: Tensor,
    times: Ends,
    num_steps: int,
    method: str,
    embedding: Times | Tensor,
    net: plan.Network,
    keep: bool = False,
    stored: bool = False,
) -> tuple[Prepared, list[Encoded]]:
    """Everything prepared, of several fields, their members one behind the other.

    Args:
        fields: their parameters, every tensor contiguous.
        cond: [1 or E, B, C] of all fields.
        times, num_steps, method: of the walk.
        embedding: the time embedding; or its features, [N, 1, 1, T] or [N, 1 or E, B S, T], where float32 times are not
            exact enough for its frequencies.
        net: the network.
        keep: keeps what the way back needs.
        stored: for a way back that reads stored activations, so has no use of what the first layer was made of.
    """
    shared, film = not isinstance(times[0], Tensor), net.norm == "film"
    encoded = [Encoded() for _ in fields]
    if not film and net.time_embedding != "given" and not (shared and isinstance(embedding, Tensor)):
        if stored:
            return Prepared(None, None, None, None, None), encoded
        ends = cast("tuple[float, float]", times) if shared else None
        c, table = first_layer(fields, cond, ends, num_steps if shared else 1, method if shared else "euler", net)
        return Prepared(c, table, None, None, None), encoded
    n, e = num_steps * plan.evaluations(method), sum(field.layers[0][0].shape[0] for field in fields)
    rows = 1 if shared else cast("Tensor", times[0]).shape[1]
    dtype, total = product_dtype(net), 2 * sum(net.padded)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=cond.device)

    # Of the first layer what has nothing to do with time: cond's share, unless it comes through FiLM, and the bias.
    plain = dataclasses.replace(net, cond_dim=0) if film else net
    c, bias = first_layer(fields, cond, None, n if film and shared else 1, "euler", plain)
    table = empty(e, n, net.padded[0], dtype=torch.float32) if shared and not film else bias
    by_row, films = net.time_embedding == "rows" and not shared, None
    if film:
        films = empty(e, cond.shape[1] if net.cond_dim else 1, total, dtype=torch.float32 if by_row else dtype)
    film_time = empty(e, n, total, dtype=torch.float32) if film and shared else None
    film_rows = empty(e, n, rows, total) if by_row else None
    features: list[Tensor] = []
    pre = empty(e, n * rows, net.time_features) if keep and fields[0].time and not shared else None
    walk = (times, num_steps, method, embedding, cond.device)
    first = 0
    for field, own in zip(fields, encoded, strict=True):
        part = slice(first, first + field.layers[0][0].shape[0])
        first = part.stop
        if films is not None:
            _cond_films(field, cond, films, part, own, keep, net)
        if shared:
            to, inputs = (table, field.layers[:1]) if film_time is None else (film_time, field.films)
            _table(inputs, field.time, walk, to[None, part], part, own, keep, net)
            continue
        x = _rows_times(field, walk, None if pre is None else pre[part], part, own, keep, net)
        if film_rows is not None:
            to, add = film_rows[part].transpose(0, 1), cast("Tensor", films)[part]
            dense(x, field.films, to, net.precision, bias=False, add=add, **time_rows(field.films, net))
        if keep or not by_row:
            # On the way back FiLM's weights are multiplied with them too.
            padded = F.pad(x, (0, net.time_padded - net.time_features)) if net.time_padded > net.time_features else x
            own_rows = padded.unflatten(1, (n, rows)).transpose(0, 1)
            features.append(own_rows.expand(-1, part.stop - part.start, -1, -1))
    if by_row:
        films, film_time = None, film_rows
    joined = torch.cat(features, dim=1) if len(features) > 1 else features[0].contiguous() if features else None
    return Prepared(c, table, joined, films, film_time, pre), encoded


def _cond_films(
    field: Parameters, cond: Tensor, films: Tensor, part: slice, own: Encoded, keep: bool, net: plan.Network
) -> None:
    """cond's share of FiLM, with its bias."""
    x = films  # of which nothing is read without cond
    if net.cond_dim:
        own.cond = Chain(field.encoder, net.activation, net.precision)
        some = of_field(cond, part.start, part.stop - part.start).contiguous()
        x = own.encoded = own.cond.forward(some, keep=keep)
    dense(x, field.films, films[None, part], net.precision, bias=True, **_film_rows(field, net))


def _film_rows(field: Parameters, net: plan.Network) -> dict[str, Any]:
    """FiLM's rows of cond, as `dense` takes them."""
    return {"rows": (0, field.films[0][0].shape[1] - net.time_features), "copies": 2, "padded": net.padded}


def _embedded(walk: tuple[Any, ...], dtype: torch.dtype, part: slice) -> Tensor:
    """[1 or E, N M, T] of one field's members; M is 1 where all rows share their times."""
    times, num_steps, method, embedding, device = walk
    members = part.stop - part.start
    if isinstance(embedding, Tensor):
        some = of_field(embedding, part.start, members, axis=1)
        return some.transpose(0, 1).flatten(1, 2).to(dtype).contiguous()
    n, e, rows = num_steps * plan.evaluations(method), 1, 1
    if isinstance(times[0], Tensor):
        times = tuple(of_field(t, part.start, members) for t in times)
        e, rows = max(t.shape[0] for t in times), times[0].shape[1]
    out = torch.empty((e, n * rows, embedding.T), dtype=dtype, device=device)
    embed_times(times, num_steps, method, embedding, out.view(e, n, rows, embedding.T).transpose(0, 1))
    return out


def _rows_times(
    field: Parameters,
    walk: tuple[Any, ...],
    pre: Tensor | None,
    part: slice,
    own: Encoded,
    keep: bool,
    net: plan.Network,
) -> Tensor:
    """Every row's time features, [1 or E, N M, T]."""
    x = _embedded(walk, product_dtype(net), part)
    if not field.time:
        return x
    own.time = Chain(field.time, net.activation, net.precision)
    return own.time.forward(x, pre=pre, keep=keep)


def _table(
    inputs: Sequence[tuple[Tensor, Tensor]],
    mlp: Sequence[tuple[Tensor, Tensor]],
    walk: tuple[Any, ...],
    to: Tensor,
    part: slice,
    own: Encoded,
    keep: bool,
    net: plan.Network,
) -> None:
    """The share of times that all rows share, with the first layer's bias but without FiLM's. Few numbers, hence in
    float32 at any precision."""
    x = _embedded(walk, torch.float32, part)
    if mlp:
        own.time = Chain(mlp, net.activation, "fp32")
        x = own.time.forward(x, keep=keep)
    own.features = x
    dense(x, inputs, to, "fp32", bias=net.norm != "film", **time_rows(inputs, net))


# The way back -------------------------------------------------------------------------------------------------------


def prepare_bwd(
    fields: Sequence[Parameters],
    encoded: Sequence[Encoded],
    found: Gradients,
    cond: Tensor,
    needs_cond: bool,
    needs_weights: bool,
    net: plan.Network,
) -> tuple[Tensor | None, list[Given]]:
    """(d_cond [1 or E, B, C] float32 or None, what `unfold_network` is given of every field or, without
    `needs_weights`, nothing)."""
    d_cond = by_cond = None
    if found.cond is not None:
        d_cond, by_cond = first_layer_bwd(found.cond, cond, fields, needs_cond, needs_weights, net)
    given, d_conds, first = [], [], 0
    for field, own in zip(fields, encoded, strict=True):
        part = slice(first, first + field.layers[0][0].shape[0])
        first = part.stop
        some = Given(cond=None if by_cond is None else by_cond[part])
        if found.film is not None:
            d_conds.append(_film_bwd(field, own, found.film[part], some, needs_cond, needs_weights, net))
        if needs_weights:
            _time_bwd(field, own, found, part, some, net)
            given.append(some)
    if d_conds and d_conds[0] is not None:
        d_cond = torch.cat(cast("list[Tensor]", d_conds))
        d_cond = d_cond.sum(0, keepdim=True) if cond.shape[0] == 1 and d_cond.shape[0] > 1 else d_cond
    if needs_cond and d_cond is None:
        d_cond = torch.zeros_like(cond, dtype=torch.float32)
    return d_cond, given


def _film_bwd(
    field: Parameters,
    own: Encoded,
    d: Tensor,
    given: Given,
    needs_cond: bool,
    needs_weights: bool,
    net: plan.Network,
) -> Tensor | None:
    """d_cond [E, B, C] from d [E, B, 2 sum HP] of cond's share of FiLM."""
    if needs_weights:
        given.film_bias = d.sum(1)
    if own.cond is None or own.encoded is None:
        return None
    d = d.to(product_dtype(net))
    if needs_weights:
        with exact_products(net.precision):
            given.film_cond = batched_product(own.encoded.mT, d)
    d_pre = torch.empty_like(own.encoded)
    dense_bwd(d, field.films, d_pre, net.precision, net.activation, pre=own.cond.pres[-1], **_film_rows(field, net))
    given.encoder, d_cond = own.cond.backward(d_pre, needs_weights, needs_cond)
    return d_cond


def _time_bwd(field: Parameters, own: Encoded, found: Gradients, part: slice, given: Given, net: plan.Network) -> None:
    """What the weights of time and its MLP get."""
    assert found.sums is not None
    film, d_pre = net.norm == "film", None
    if own.features is not None:
        inputs = field.films if film else field.layers[:1]
        d = cast("Tensor", found.film_time if film else found.sums.table)[part]
        with exact_products("fp32"):
            product = batched_product(own.features.mT.expand(d.shape[0], -1, -1), d)
        if film:
            ends = [2 * (off + hp) for off, hp in zip(net.offsets, net.padded, strict=True)]
            given.film_time = [product[..., end - 2 * hp : end] for end, hp in zip(ends, net.padded, strict=True)]
        else:
            given.time = product
        if own.time is not None:
            d_pre, pre = torch.empty_like(own.features), own.time.pres[-1]
            dense_bwd(d, inputs, d_pre, "fp32", net.activation, pre=pre, **time_rows(inputs, net))
    else:
        given.film_time = [film[part] for film in found.sums.films]
        given.time = None if found.sums.time is None else found.sums.time[part]
        d_pre = None if found.features is None else found.features[part]
    if own.time is not None and d_pre is not None:
        given.mlp = own.time.backward(d_pre, True, False)[0]
