"""The CPU side of the operators: what `fastflow.fused` is for Triton's kernels, for the native code of
`fastflow.kernels.cpu`.

The native code takes weights, cond and time features as they are: it packs the weights once per call and computes
cond's share of the first layer once per row. What has layers of its own, a time embedding's MLP and FiLM's encoder of
cond, is a network before the network (`fastflow.dense`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow import dense, operators, reference
from fastflow.fields import FieldSpec, Parts, PowerFourier, TimeEmbedding
from fastflow.fused import network
from fastflow.kernels import cpu, plan


def unsupported(dtype: torch.dtype) -> str | None:
    """What keeps the native code from running a call on the CPU, or None. It covers every field."""
    if dtype != torch.float32:
        return f"{dtype} parameters (native code has float32)"
    return cpu.why_unavailable()


# Times and what is prepared -----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _powers(count: int) -> Tensor:
    with torch.inference_mode(False):  # the tensor is kept for every caller
        return 2.0 ** torch.arange(count, dtype=torch.float32)


def _features(embedding: TimeEmbedding, t: Tensor) -> Tensor:
    """The embedding's features of float32 times, with what depends on no time made once."""
    if isinstance(embedding, PowerFourier):
        return reference.power_fourier(t, embedding.dim, _powers(embedding.dim // 2))
    return embedding.features(t)


@functools.lru_cache(maxsize=64)
def _shared_features(embedding: TimeEmbedding, num_steps: int, method: str, start: float, end: float) -> Tensor:
    """Time features [N, T] of every evaluation of a walk between two numbers. They depend on no weight."""
    with torch.inference_mode(False):  # the tensor is kept for every caller
        part = _parts_of_walk(num_steps, method)
        # Rounded once: sinusoids of a thousand times t show every bit.
        return embedding.features(((1 - part) * start + part * end).float()).contiguous()


def _parts_of_walk(num_steps: int, method: str) -> Tensor:
    """Where each evaluation stands between start and end, [N] float64."""
    return reference.evaluation_steps(num_steps, method) / num_steps


def _walk_features(
    spec: FieldSpec, t_0: Tensor | None, t_1: Tensor | None, num_steps: int, method: str, start: float, end: float
) -> tuple[Tensor, bool]:
    """(time features [N, T], or [E, N, M, T] of rows with times of their own; whether all rows share them)."""
    if t_0 is None or t_1 is None:
        return _shared_features(spec.time_embedding, num_steps, method, start, end), True
    part = _parts_of_walk(num_steps, method).float().view(-1, 1)
    times = (1 - part) * t_0.flatten(1).unsqueeze(1) + part * t_1.flatten(1).unsqueeze(1)
    return _features(spec.time_embedding, times), False


class _Layout:
    """What of a call depends on its spec and precision alone."""

    def __init__(self, key: str, precision: str) -> None:
        spec = FieldSpec.from_key(key)
        net = network(spec, "fp32" if precision == "tf32" else precision)
        films = spec.film_sizes
        self.network = cpu.describe_network(net, films[0][0] if films else 0)
        self.time_layers = bool(spec.time_sizes)
        self.prepared = self.time_layers or spec.film
        self.pads = [cpu.padded(width) - width for width in net.hidden]
        # Networks inside the field: time features' MLP, and cond's encoder with what it gives to FiLM. Of times that
        # all rows share there are few: they stay float32.
        into = spec.time_sizes[0][0] if spec.time_sizes else 0
        time = (into, *(width for _, width in spec.time_sizes))
        self.shared_time = dense.Kind(time, False, spec.activation, False, 0.0, "fp32")
        self.rows_time = self.shared_time._replace(precision=precision)
        encoder = (
            spec.cond_dim,
            *(width for _, width in spec.encoder_sizes),
            sum(2 * cpu.padded(width) for width in net.hidden),
        )
        self.encoder = dense.Kind(encoder, True, spec.activation, False, 0.0, precision)
        self.num_parameters, self.time_features = spec.num_parameters, spec.time_features
        self.width = spec.ensemble or 1
        # A field's tensors in the order the native code reads them, as positions in its parameter list.
        parts = spec.parts(cast("Sequence[Tensor]", range(spec.num_parameters)))
        order = [*(i for pair in (*parts.layers, *parts.norms) for i in pair), *(w for w, _ in parts.films)]
        self.order = cast("list[int]", order)

    def ordered(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Parameters of several fields, or their gradients, as the native code reads them."""
        fields = range(0, len(tensors), self.num_parameters)
        return [tensors[first + i] for first in fields for i in self.order]


@functools.lru_cache(maxsize=256)
def _layout(key: str, precision: str) -> _Layout:
    return _Layout(key, precision)


class _Call:
    """One call's tensors on their way to the native code."""

    def __init__(
        self,
        spec: FieldSpec,
        cond: Tensor,
        parameters: Sequence[Tensor],
        precision: str,
        features: Tensor,
        shared: bool,
        rows: tuple[int, int, int, int],
    ) -> None:
        self.spec, self.shared = spec, shared
        self.layout = layout = _layout(spec.key, precision)
        self.e, self.b, self.s, _ = rows
        self.parameters = [p.contiguous() for p in parameters]
        self.width = layout.width
        self.count = len(parameters) // layout.num_parameters  # of fields
        self.cond = cond.contiguous()
        self.features = self.raw_features = features.contiguous()
        self.film: Tensor | None = None
        if layout.time_layers:
            found = [self._time_forward(i) for i in range(self.count)]
            self.features = torch.cat(found) if len(found) > 1 else found[0]
        if spec.film:
            found = [self._film_forward(i) for i in range(self.count)]
            self.film = torch.cat(found) if len(found) > 1 else found[0]

    def of_field(self, i: int) -> Parts:
        """Field i's parameters, with an E axis."""
        n = self.layout.num_parameters
        own = self.parameters[i * n : (i + 1) * n]
        return self.spec.parts([p if self.spec.ensemble is not None else p.unsqueeze(0) for p in own])

    def share(self, x: Tensor, i: int) -> Tensor:
        """Field i's share of a tensor with an E axis, [width or 1, ...]."""
        return x if x.shape[0] == 1 else x.narrow(0, i * self.width, self.width)

    # What is prepared: time features behind their MLP, [E, N, T] or [E, N, M, T], and cond's part of FiLM, [E, B or 1,
    # sum of 2 padded widths].

    def time_kind(self) -> dense.Kind:
        return self.layout.shared_time if self.shared else self.layout.rows_time

    def time_inputs(self, i: int) -> Tensor:
        """[width or 1, rows, T]."""
        raw = self.raw_features
        return raw.unsqueeze(0) if self.shared else self.share(raw, i).flatten(1, 2)

    def _time_forward(self, i: int) -> Tensor:
        weights = [p for pair in self.of_field(i).time for p in pair]
        found = dense.forward(self.time_inputs(i), weights, self.width, self.time_kind(), False)[0]
        return found if self.shared else found.unflatten(1, self.raw_features.shape[1:3])

    def _film_head(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """The rows of encoded cond of all FiLM weights side by side, [E, encoded, sum of 2 padded widths], and bias."""
        t = self.layout.time_features
        weights, biases = [], []
        for (weight, bias), pad in zip(parts.films, self.layout.pads, strict=True):
            for w, b in zip(weight[:, :-t].chunk(2, -1), bias.chunk(2, -1), strict=True):
                weights.append(F.pad(w, (0, pad)) if pad else w)
                biases.append(F.pad(b, (0, pad)) if pad else b)
        return torch.cat(weights, -1), torch.cat(biases, -1)

    def film_parameters(self, i: int) -> list[Tensor]:
        parts = self.of_field(i)
        return [*(p for pair in parts.encoder for p in pair), *self._film_head(parts)]

    def _film_forward(self, i: int) -> Tensor:
        if not self.spec.cond_dim:
            return self._film_head(self.of_field(i))[1].unsqueeze(1)
        parameters, kind = self.film_parameters(i), self.layout.encoder
        return dense.forward(self.share(self.cond, i), parameters, self.width, kind, False)[0]

    def ints(self, evaluations: int) -> list[int]:
        """Sizes and strides that every operator begins with."""
        shape, t = self.features.shape, self.layout.time_features
        if self.shared:
            strides = (t, shape[-2] * t if self.layout.time_layers else 0, 0)
        else:
            strides = (shape[2] * t, shape[1] * shape[2] * t if shape[0] > 1 else 0, t)
        cond_e = self.b * self.spec.cond_dim if self.cond.shape[0] > 1 else 0
        film_e = film_b = 0
        if self.film is not None:
            film_e, film_b = self.film.shape[1] * self.film.shape[2], self.film.shape[2]
            film_b = film_b if self.film.shape[1] > 1 else 0
        sizes = (self.count, self.width, self.b, self.s, evaluations, torch.get_num_threads(), int(self.shared))
        return [*sizes, cond_e, *strides, film_e, film_b]

    def run(
        self,
        name: str,
        evaluations: int,
        ints: Sequence[int],
        reals: Sequence[float],
        tensors: Sequence[Tensor | None],
    ) -> None:
        """Run an operator with what all of them begin with."""
        cpu.call(name, self.layout.network, (*self.ints(evaluations), *ints), reals, (*self.common(), *tensors))

    def common(self) -> tuple[Tensor | None, ...]:
        return (self.cond, self.features, self.film, *self.layout.ordered(self.parameters))


class _Gradients:
    """Where the native code leaves the gradients of one call's cond and parameters."""

    def __init__(self, call: _Call, evaluations: int, needs_cond: bool, needs_weights: bool) -> None:
        self.call, self.needs_cond, self.needs_weights = call, needs_cond, needs_weights
        spec, like = call.spec, call.cond
        m = call.b * call.s

        def empty(*shape: int) -> Tensor:
            return like.new_empty(shape)

        self.cond = empty(call.e, m, spec.cond_dim) if needs_cond and spec.cond_dim and not spec.film else None
        self.film = self.features = None
        if spec.film and (needs_cond or needs_weights):
            assert call.film is not None
            self.film = empty(call.e, m, call.film.shape[-1])
        if needs_weights and call.layout.time_layers:
            t = spec.time_features
            shape = (call.e, evaluations, t) if call.shared else (call.e, evaluations, m, t)
            self.features = empty(*shape)
        self.parameters: list[Tensor] = []
        if needs_weights:
            # The native code does not write what is prepared.
            make = torch.zeros_like if call.layout.prepared else torch.empty_like
            self.parameters = [make(p) for p in call.parameters]

    def tensors(self) -> list[Tensor | None]:
        return [self.cond, self.film, self.features, self.features, *self.call.layout.ordered(self.parameters)]

    def finish(self) -> tuple[Tensor | None, list[Tensor]]:
        """(d_cond or None, gradients of all parameters or [])."""
        call = self.call
        d_cond = None if self.cond is None else self._over_samples(self.cond)
        if self.features is not None:
            for i in range(call.count):
                self._time_backward(i, self.features)
        if self.film is not None:
            film = self._over_samples(self.film)
            found = [self._film_backward(i, call.share(film, i)) for i in range(call.count)]
            d_cond = torch.cat([f for f in found if f is not None]) if found[0] is not None else None
        if not self.needs_cond:
            return None, self.parameters
        if d_cond is None:  # no cond at all
            d_cond = torch.zeros_like(call.cond)
        elif call.cond.shape[0] == 1 < d_cond.shape[0]:
            d_cond = d_cond.sum(0, keepdim=True)
        return d_cond, self.parameters

    def _over_samples(self, x: Tensor) -> Tensor:
        """[E, B S, ...] summed to [E, B, ...]."""
        call = self.call
        return x if call.s == 1 else x.view(call.e, call.b, call.s, -1).sum(2)

    def _of_field(self, i: int) -> Parts:
        n = self.call.layout.num_parameters
        return self.call.spec.parts(self.parameters[i * n : (i + 1) * n])

    def _time_backward(self, i: int, features: Tensor) -> None:
        call, grad = self.call, self.call.share(features, i)
        grad = grad if call.shared else grad.flatten(1, 2)
        inputs, none = call.time_inputs(i), grad.new_empty(0)
        weights = [p for pair in call.of_field(i).time for p in pair]
        found = dense.backward(grad, inputs, weights, none, call.width, call.time_kind(), False, True)[1]
        for mine, more in zip((p for pair in self._of_field(i).time for p in pair), found, strict=True):
            mine.copy_(more.view_as(mine))

    def _film_backward(self, i: int, grad: Tensor) -> Tensor | None:
        """Field i's gradients of FiLM's biases and of what cond's encoder holds; returns cond's, [width or 1, B, C]."""
        call, spec, t = self.call, self.call.spec, self.call.layout.time_features
        d_cond, d_weight, d_bias = None, None, grad.sum(1)
        if spec.cond_dim:
            inputs, weights, none = call.share(call.cond, i), call.film_parameters(i), grad.new_empty(0)
            needs = (self.needs_cond, self.needs_weights)
            d_cond, found = dense.backward(grad, inputs, weights, none, call.width, call.layout.encoder, *needs)
            if self.needs_weights:
                *encoder, d_weight, d_bias = found
                for mine, more in zip((p for pair in self._of_field(i).encoder for p in pair), encoder, strict=True):
                    mine.copy_(more.view_as(mine))
        if not self.needs_weights:
            return d_cond
        at = 0
        for (weight, bias), layer in zip(self._of_field(i).films, spec.trunk, strict=True):
            if spec.ensemble is None:
                weight, bias = weight.unsqueeze(0), bias.unsqueeze(0)
            for half in range(2):
                columns, own = slice(half * layer.width, (half + 1) * layer.width), slice(at, at + layer.width)
                bias[:, columns] = d_bias[..., own]
                if d_weight is not None:
                    weight[:, :-t, columns] = d_weight[..., own]
                at += cpu.padded(layer.width)
        return d_cond


# Walks --------------------------------------------------------------------------------------------------------------


def _scheme(method: str) -> tuple[int, tuple[float, float, float]]:
    """Evaluations per step, and (a, b_1, b_2) of `reference.SCHEMES`."""
    return (1, (0.0, 1.0, 0.0)) if method == "euler" else (2, reference.SCHEMES[method])


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def walk(
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
    keep: bool,
    store: bool,
) -> tuple[Tensor, ...]:
    """(x_K, path, stages, and three empty tensors): the native way back computes activations again."""
    features, shared = _walk_features(spec, t_0, t_1, num_steps, method, start, end)
    call = _Call(spec, cond, parameters, precision, features, shared, (*x_0.shape,))
    x_1, path, stages, *unused = walk_fakes(x_0, spec, num_steps, method, precision, keep, store)
    v, scheme = _scheme(method)
    given = _contiguous(t_0, t_1, x_0, step_noise)
    kept = (path if keep else None, stages if stages.numel() else None)
    call.run("walk", num_steps * v, (num_steps, v), (*scheme, start, end), (*given, x_1, *kept, None))
    return (x_1, path, stages, *unused)


@functools.lru_cache(maxsize=256)
def _plain_arguments(
    key: str,
    precision: str,
    fields: int,
    rows: tuple[int, int, int],
    cond_per_member: bool,
    num_steps: int,
    method: str,
    start: float,
    end: float,
) -> tuple[cpu.Prepared, _Layout, Tensor] | None:
    """What of a walk between two numbers depends on neither the fields' weights nor their states: the native call
    without its pointers, and the time features. None for fields that prepare anything else."""
    layout = _layout(key, precision)
    if layout.prepared:
        return None
    spec, (b, s, threads) = FieldSpec.from_key(key), rows
    features = _shared_features(spec.time_embedding, num_steps, method, start, end)
    v, scheme = _scheme(method)
    sizes = (fields, layout.width, b, s, num_steps * v, threads, 1)
    ints = (*sizes, b * spec.cond_dim if cond_per_member else 0, features.shape[-1], 0, 0, 0, 0, num_steps, v)
    return cpu.Prepared("walk", layout.network, ints, (*scheme, start, end)), layout, features


def plain_walk(
    key: str,
    parameters: Sequence[Tensor],
    x_0: Tensor,
    cond: Tensor,
    rows: tuple[int, int],
    num_steps: int,
    method: str,
    start: float,
    end: float,
    precision: str,
    fields: int = 1,
) -> Tensor | None:
    """x_K shaped as x_0, without gradient and with as little around the native code as can be.

    Args:
        key, parameters: of `fields` of them; contiguous float32, as x_0 (E B S rows of D) and cond ([B, C] or
            [E, B, C]) are.
        rows: (B, S).

    Returns:
        None for a field that this is not made for, one with FiLM or layers behind its time embedding.
    """
    sizes = (fields, (*rows, torch.get_num_threads()), cond.dim() == 3)
    found = _plain_arguments(key, precision, *sizes, num_steps, method, start, end)
    if found is None:
        return None
    prepared, layout, features = found
    x_1 = torch.empty_like(x_0)
    prepared((cond, features, None, *layout.ordered(parameters), None, None, x_0, None, x_1, None, None, None))
    return x_1


class _Arrival(NamedTuple):
    """What of an arrival depends on neither the field's weights nor its rows."""

    prepared: cpu.Prepared
    layout: _Layout
    embedding: TimeEmbedding
    parts: Tensor  # [N, 1], of a row's time at each evaluation
    starts: Tensor  # [B]


@functools.lru_cache(maxsize=256)
def _arrival(key: str, precision: str, rows: int, threads: int, num_steps: int, method: str) -> _Arrival | None:
    layout = _layout(key, precision)
    if layout.prepared:
        return None
    spec = FieldSpec.from_key(key)
    v, scheme = _scheme(method)
    width = layout.time_features
    sizes = (1, layout.width, rows, 1, num_steps * v + 1, threads, 0)
    ints = (*sizes, 0, rows * width, 0, width, 0, 0, num_steps, v)
    with torch.inference_mode(False):  # the tensors are kept for every caller
        parts = torch.cat([_parts_of_walk(num_steps, method), torch.ones(1, dtype=torch.float64)])
        kept = (spec.time_embedding, parts.float().view(-1, 1), torch.zeros(rows))
    return _Arrival(cpu.Prepared("walk", layout.network, ints, (*scheme, 0.0, 0.0)), layout, *kept)


def arrive(
    key: str,
    parameters: Sequence[Tensor],
    x_0: Tensor,
    cond: Tensor,
    t: Tensor,
    num_steps: int,
    method: str,
    precision: str,
) -> tuple[Tensor, Tensor] | None:
    """(x_K, v(x_K, t)) of rows that walk from 0 to times of their own, [B, D] each and without gradient: the velocity
    where a walk ends is one evaluation more.

    Args:
        key, parameters: of one field without members; contiguous float32, as x_0 [B, D], cond [B, C] and t [B] are.

    Returns:
        None for a field that this is not made for, see `plain_walk`.
    """
    found = _arrival(key, precision, len(x_0), torch.get_num_threads(), num_steps, method)
    if found is None:
        return None
    features = _features(found.embedding, found.parts * t)  # [N, B, T]
    x_1, velocity = torch.empty_like(x_0), torch.empty_like(x_0)
    common = (cond, features, None, *found.layout.ordered(parameters))
    found.prepared((*common, found.starts, t, x_0, None, x_1, None, None, velocity))
    return x_1, velocity


def freeze(
    spec: FieldSpec,
    parameters: Sequence[Tensor],
    precision: str,
    num_steps: int,
    method: str,
    start: float,
    end: float,
) -> cpu.PackedWalk:
    """A walk between two numbers with the weights packed once; of fields without FiLM, whose cond has layers of its
    own."""
    features, _ = _walk_features(spec, None, None, num_steps, method, float(start), float(end))
    members = (spec.ensemble or 1) * (len(parameters) // spec.num_parameters)
    cond = parameters[0].new_empty(1, 1, spec.cond_dim)
    call = _Call(spec, cond, [p.detach() for p in parameters], precision, features, True, (members, 1, 1, 1))
    v, scheme = _scheme(method)
    tensors = (*call.common(), None, None, None, None)
    reals = (*scheme, float(start), float(end))
    return cpu.PackedWalk(call.layout.network, (*call.ints(num_steps * v), num_steps, v), reals, tensors)


def walk_fakes(
    x_0: Tensor, spec: FieldSpec, num_steps: int, method: str, precision: str, keep: bool, store: bool
) -> tuple[Tensor, ...]:
    """Empty tensors of `walk`'s shapes."""
    two = keep and plan.evaluations(method) == 2
    states = [x_0.new_empty((num_steps, *x_0.shape) if kept else (0,)) for kept in (keep, two)]
    return (x_0.new_empty(x_0.shape), *states, *(x_0.new_empty(0) for _ in range(3)))


def walk_bwd(
    grad: Tensor | None,
    grad_path: Tensor | None,
    cond: Tensor,
    parameters: Sequence[Tensor],
    t_0: Tensor | None,
    t_1: Tensor | None,
    saved: Sequence[Tensor],
    spec: FieldSpec,
    num_steps: int,
    start: float,
    end: float,
    method: str,
    precision: str,
    store: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """[d_x_0, d_cond, d_step_noise, *d_parameters]; a tensor without elements for what is not needed."""
    needs_x, needs_cond, needs_weights, needs_noise = needs
    path, stages = saved[:2]
    features, shared = _walk_features(spec, t_0, t_1, num_steps, method, start, end)
    call = _Call(spec, cond, parameters, precision, features, shared, (*path.shape[1:],))
    v, scheme = _scheme(method)
    gradients = _Gradients(call, num_steps * v, needs_cond, needs_weights)
    d_x = path.new_empty(path.shape[1:] if needs_x else (0,))
    d_noise = path.new_empty(path.shape if needs_noise else (0,))
    tensors = [
        *_contiguous(t_0, t_1, None, None, grad, grad_path, path, stages if v == 2 else None),
        d_x if needs_x else None,
        d_noise if needs_noise else None,
        *gradients.tensors(),
    ]
    call.run("walk_bwd", num_steps * v, (num_steps, v, int(needs_weights)), (*scheme, start, end), tensors)
    return [d_x, *_finished(gradients, cond, parameters, (d_noise,))]


def _finished(
    gradients: _Gradients, cond: Tensor, parameters: Sequence[Tensor], between: Sequence[Tensor] = ()
) -> list[Tensor]:
    d_cond, d_parameters = gradients.finish()
    d_cond = cond.new_empty(0) if d_cond is None else d_cond
    return [d_cond, *between, *(d_parameters or [p.new_empty(0) for p in parameters])]


# Losses -------------------------------------------------------------------------------------------------------------


def _loss_call(
    spec: FieldSpec, cond: Tensor, parameters: Sequence[Tensor], precision: str, t: Tensor, rows: torch.Size
) -> _Call:
    features = _features(spec.time_embedding, t.flatten(1).unsqueeze(1))  # [E, 1, M, T]
    return _Call(spec, cond, parameters, precision, features, False, (*rows,))


def loss(
    a: Tensor,
    b: Tensor,
    t: Tensor,
    cond: Tensor,
    parameters: Sequence[Tensor],
    seed: Tensor | None,
    ids: Tensor | None,
    spec: FieldSpec,
    precision: str,
    interpolate: bool,
    sigma_min: float,
    save: bool,
    invariant: bool,
) -> tuple[Tensor, ...]:
    """(the loss of each row, its errors, an empty tensor, the products' results, two empty tensors): see `_keeps`. A
    row's bits never depend on its batch."""
    a, t = (x.contiguous() for x in operators.drawn(a, b, t, seed, ids))
    call = _loss_call(spec, cond, parameters, precision, t, b.shape)
    found = loss_fakes(b, spec, precision, save, invariant)
    kept = (found[3], found[1]) if found[3].numel() else (None, None)
    call.run("loss", 1, (int(interpolate),), (sigma_min,), (a, b.contiguous(), t, found[0], *kept))
    return found


def _keeps(spec: FieldSpec, rows: int) -> int:
    """How many floats a loss keeps for its way back."""
    return dense.kept_floats([layer.width for layer in spec.trunk], rows)


def loss_fakes(b: Tensor, spec: FieldSpec, precision: str, save: bool, invariant: bool) -> tuple[Tensor, ...]:
    """Empty tensors of `loss`'s shapes."""
    kept = _keeps(spec, math.prod(b.shape[:-1])) if save else 0
    error = b.new_empty(b.shape if kept else (0,))
    none = [b.new_empty(0) for _ in range(3)]
    return (b.new_empty(b.shape[:-1]), error, none[0], b.new_empty(kept), *none[1:])


def loss_bwd(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    t: Tensor,
    cond: Tensor,
    parameters: Sequence[Tensor],
    seed: Tensor | None,
    ids: Tensor | None,
    saved: Sequence[Tensor],
    spec: FieldSpec,
    precision: str,
    interpolate: bool,
    sigma_min: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """[d_a, d_b, d_cond, *d_parameters]; a tensor without elements for what is not needed."""
    needs_a, needs_b, needs_cond, needs_weights = needs
    a, t = (x.contiguous() for x in operators.drawn(a, b, t, seed, ids))
    call = _loss_call(spec, cond, parameters, precision, t, b.shape)
    gradients = _Gradients(call, 1, needs_cond, needs_weights)
    error, _, pre, *_ = saved
    d_a, d_b = (b.new_empty(b.shape if need else (0,)) for need in (needs_a, needs_b))
    tensors = [
        *(a, b.contiguous(), t, grad.contiguous()),
        *((pre, error) if pre.numel() else (None, None)),
        d_a if needs_a else None,
        d_b if needs_b else None,
        *gradients.tensors(),
    ]
    call.run("loss_bwd", 1, (int(interpolate), int(needs_weights)), (sigma_min,), tensors)
    return [d_a, d_b, *_finished(gradients, cond, parameters)]


def matching(
    x_0: Tensor,
    x_1: Tensor,
    t: Tensor,
    cond: Tensor,
    parameters: Sequence[Tensor],
    spec: FieldSpec,
    precision: str,
    error: int,
    scale: float,
    gradients: Sequence[Tensor],
) -> Tensor:
    """The mean flow-matching loss of rows that all members share, 0-d, and `scale` times its gradients, in one pass.

    Args:
        x_0: [B, S, D]. x_1: [B, S, D], or [B, D] for all samples. t: [B, S]. cond: [B, C].
        parameters, spec: of a field without FiLM and layers for time. precision: a concrete one.
        error: what of, its place in `fastflow.ops.ERRORS`.
        gradients: where those of the parameters go, in their order; contiguous.
    """
    x_0, x_1, t = x_0.contiguous(), x_1.contiguous(), t.contiguous()
    features = _features(spec.time_embedding, t.view(1, 1, -1))  # [1, 1, M, T]
    rows = (spec.ensemble or 1, *x_0.shape)
    call = _Call(spec, cond.unsqueeze(0), parameters, precision, features, False, rows)
    mean = x_0.new_empty(())
    sharing = x_0.shape[1] if x_1.dim() < x_0.dim() else 1
    tensors = (x_0, x_1, t, None, mean, None, None, *call.layout.ordered(gradients))
    call.run("matching", 1, (1, sharing, error), (0.0, scale), tensors)
    return mean


def velocity_matching(
    x_t: Tensor,
    velocity: Tensor,
    t: Tensor,
    cond: Tensor,
    weight: Tensor,
    parameters: Sequence[Tensor],
    spec: FieldSpec,
    precision: str,
    scale: float,
    gradients: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The mean over rows and samples of weight times the error of the velocity at given points, 0-d, the errors
    themselves [B, S], and `scale` times the mean's gradients, in one pass.

    Args:
        x_t, velocity: [B, S, D]. t, weight: [B, S]. cond: [B, C].
        parameters, spec: of a field without members, FiLM and layers for time. precision: a concrete one.
        gradients: where those of the parameters go, in their order; contiguous.
    """
    x_t, velocity, t, weight = (x.contiguous() for x in (x_t, velocity, t, weight))
    features = _features(spec.time_embedding, t.view(1, 1, -1))  # [1, 1, M, T]
    call = _Call(spec, cond.unsqueeze(0), parameters, precision, features, False, (1, *x_t.shape))
    mean, of_rows = t.new_empty(()), torch.empty_like(t)
    tensors = (x_t, velocity, t, weight, mean, of_rows, None, *call.layout.ordered(gradients))
    call.run("matching", 1, (0, 1, 0), (0.0, scale), tensors)
    return mean, of_rows


# Policies -----------------------------------------------------------------------------------------------------------

STATISTICS = 6
"""Of `policy`: the loss, share of clipped ratios, mean loss of a pair; ratios' mean, largest, mean of rho - 1 - log."""


class Objective(NamedTuple):
    """What is made of pairs' losses: see `Objective` in operators.cpp."""

    ints: tuple[int, int, int, int]
    reals: tuple[float, ...]


def policy(
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    spec: FieldSpec,
    precision: str,
    objective: Objective,
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> None:
    """FPO's loss of B actions with N pairs each and the gradients of a field's parameters, in one pass.

    Args:
        inputs: x_0 [B, N, D], t [B, N], action [B, D], cond [B, C], old losses [B, N], advantages [B].
        parameters, spec: of a field without members, FiLM and layers for time. precision: a concrete one.
        outputs: where losses [B, N], logarithms of ratios, ratios [B, N or 1] and the statistics go; contiguous.
        gradients: where those of the parameters go, in their order; contiguous.
    """
    x_0, t, action, cond, old, advantages = (x.contiguous() for x in inputs)
    call = _loss_call(spec, cond.unsqueeze(0), parameters, precision, t.unsqueeze(0), x_0.unsqueeze(0).shape)
    tensors = (x_0, action, t, old, advantages, *outputs, None, *call.layout.ordered(gradients))
    call.run("policy", 1, (1, *objective.ints), (0.0, *objective.reals), tensors)
