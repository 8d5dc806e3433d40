"""The CPU side of the operators: what `fastflow.fused` is for Triton's kernels, for the native code of
`fastflow.kernels.cpu`.

The native code takes weights, cond and time features as they are: it packs the weights once per call and computes
cond's share of the first layer once per row. Only what has layers of its own, a time embedding's MLP and FiLM's
encoder of cond, is computed here in plain PyTorch, and `torch.func.vjp` takes its gradients further.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow import reference
from fastflow.fields import FieldSpec, Parts, TimeEmbedding
from fastflow.fused import network
from fastflow.kernels import cpu, plan
from fastflow.philox import PhiloxNoise


def unsupported(dtype: torch.dtype) -> str | None:
    """What keeps the native code from running a call on the CPU, or None. It covers every field."""
    if dtype != torch.float32:
        return f"{dtype} parameters (native code has float32)"
    return cpu.why_unavailable()


# Times and what is prepared -----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _shared_features(embedding: TimeEmbedding, num_steps: int, method: str, start: float, end: float) -> Tensor:
    """Time features [N, T] of every evaluation of a walk between two numbers. They depend on no weight."""
    part = _parts_of_walk(num_steps, method)
    # Rounded once: sinusoids of a thousand times t show every bit.
    return embedding.features(((1 - part) * start + part * end).float()).contiguous()


def _parts_of_walk(num_steps: int, method: str) -> Tensor:
    """Where each evaluation stands between start and end, [N] float64."""
    stages = [0.0] if method == "euler" else [0.0, reference.SCHEMES[method][0]]
    steps = torch.arange(num_steps, dtype=torch.float64).unsqueeze(1) + torch.tensor(stages, dtype=torch.float64)
    return (steps / num_steps).flatten()


def _walk_features(
    spec: FieldSpec, t_0: Tensor | None, t_1: Tensor | None, num_steps: int, method: str, start: float, end: float
) -> tuple[Tensor, bool]:
    """(time features [N, T], or [N, E, M, T] of rows with times of their own; whether all rows share them)."""
    if t_0 is None or t_1 is None:
        with torch.inference_mode(False):  # the cached tensor is for every caller
            return _shared_features(spec.time_embedding, num_steps, method, start, end), True
    part = _parts_of_walk(num_steps, method).float().view(-1, 1, 1, 1)
    times = (1 - part) * t_0.float() + part * t_1.float()
    return spec.time_embedding.features(times.flatten(2)), False


def _dense(x: Tensor, weight: Tensor, bias: Tensor, precision: str | None) -> Tensor:
    """`reference.dense` member by member: the CPU's batched product runs at a fraction of the plain one's rate."""
    return torch.stack([reference.dense(*each, precision) for each in zip(x, weight, bias, strict=True)])


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
        self.spec, self.shared, self.precision = spec, shared, precision
        self.net = network(spec, "fp32" if precision == "tf32" else precision)
        self.e, self.b, self.s, self.d = rows
        n = spec.num_parameters
        self.fields = [list(parameters[i : i + n]) for i in range(0, len(parameters), n)]
        self.parameters = [p.contiguous() for p in parameters]
        self.width = spec.ensemble or 1
        self.cond, self.raw_features = cond.contiguous(), features
        self.time_layers = bool(spec.time_sizes)
        self.prepared = self.time_layers or spec.film
        self.pads = [cpu.padded(width) - width for width in self.net.hidden]
        self.film: Tensor | None = None
        self.features = features.contiguous()
        if self.prepared:
            found = [self._prepare(i)(self._cond_of(i), *ps) for i, ps in enumerate(self.fields)]
            if self.time_layers:
                self.features = torch.cat([f["features"] for f in found], 0 if shared else 1).contiguous()
            if spec.film:
                self.film = torch.cat([f["film"] for f in found]).contiguous()

    def _cond_of(self, i: int) -> Tensor:
        """Field i's share of cond, [width or 1, B, C]."""
        return self.cond if self.cond.shape[0] == 1 else self.cond.narrow(0, i * self.width, self.width)

    def _prepare(self, i: int) -> Callable[..., dict[str, Tensor]]:
        """A function of (cond, *parameters) of field i: time features behind their MLP, [E, N, T] or [N, E, M, T], and
        cond's part of FiLM, [E, B or 1, sum of 2 padded widths]."""
        spec, width, shared = self.spec, self.width, self.shared
        raw = self.raw_features
        if not shared and raw.shape[1] > width:
            raw = raw.narrow(1, i * width, width)

        def prepare(cond: Tensor, *parameters: Tensor) -> dict[str, Tensor]:
            parts = spec.parts([p if spec.ensemble is not None else p.unsqueeze(0) for p in parameters])
            out: dict[str, Tensor] = {}

            def encode(x: Tensor, layers: list[tuple[Tensor, Tensor]], precision: str | None) -> Tensor:
                for w, b in layers:
                    x = reference.activate(_dense(x, w, b, precision), spec.activation)
                return x

            if parts.time:
                if shared:  # few numbers: they stay float32
                    out["features"] = encode(raw.expand(width, *raw.shape), parts.time, None)
                else:
                    out["features"] = encode(raw.transpose(0, 1), parts.time, self.precision).transpose(0, 1)
            if spec.film:
                t = spec.time_features
                if spec.cond_dim:
                    encoded = encode(cond.expand(width, -1, -1), parts.encoder, self.precision)
                    films = [_dense(encoded, w[:, :-t], b, self.precision) for w, b in parts.films]
                else:
                    films = [b.unsqueeze(1) for _, b in parts.films]
                halves = [half for f in films for half in f.chunk(2, dim=-1)]
                pads = [pad for pad in self.pads for _ in range(2)]
                out["film"] = torch.cat([F.pad(h, (0, pad)) for h, pad in zip(halves, pads, strict=True)], dim=-1)
            return out

        return prepare

    def _pointers(self, parts: Parts) -> Iterable[Tensor]:
        """A field's tensors in the order the native code reads them."""
        for weight, bias in (*parts.layers, *parts.norms):
            yield weight
            yield bias
        for weight, _ in parts.films:
            yield weight

    def ints(self, evaluations: int) -> list[int]:
        """Sizes and strides that every operator begins with."""
        shape, t = self.features.shape, self.spec.time_features
        if self.shared:
            strides = (t, shape[-2] * t if self.time_layers else 0, 0)
        else:
            strides = (shape[1] * shape[2] * t, shape[2] * t if shape[1] > 1 else 0, t)
        cond_e = self.b * self.spec.cond_dim if self.cond.shape[0] > 1 else 0
        film_e = film_b = 0
        if self.film is not None:
            film_e, film_b = self.film.shape[1] * self.film.shape[2], self.film.shape[2]
            film_b = film_b if self.film.shape[1] > 1 else 0
        sizes = (len(self.fields), self.width, self.b, self.s, evaluations, torch.get_num_threads(), int(self.shared))
        return [*sizes, cond_e, *strides, film_e, film_b]

    def tensors(self) -> list[Tensor | None]:
        """Tensors that every operator begins with."""
        n = self.spec.num_parameters
        out: list[Tensor | None] = [self.cond, self.features, self.film]
        for i in range(0, len(self.parameters), n):
            out += self._pointers(self.spec.parts(self.parameters[i : i + n]))
        return out

    def run(
        self,
        name: str,
        evaluations: int,
        ints: Iterable[int],
        reals: Iterable[float],
        tensors: Iterable[Tensor | None],
    ) -> None:
        films = self.spec.film_sizes
        film_inputs = films[0][0] if films else 0
        cpu.call(name, self.net, film_inputs, (*self.ints(evaluations), *ints), reals, (*self.tensors(), *tensors))


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
        if needs_weights and call.time_layers:
            t = spec.time_features
            shape = (call.e, evaluations, t) if call.shared else (evaluations, call.e, m, t)
            self.features = empty(*shape)
        self.parameters: list[Tensor] = []
        if needs_weights:
            # The native code does not write what is prepared.
            make = torch.zeros_like if call.prepared else torch.empty_like
            self.parameters = [make(p) for p in call.parameters]

    def tensors(self) -> list[Tensor | None]:
        n = self.call.spec.num_parameters
        out: list[Tensor | None] = [self.cond, self.film, self.features, self.features]
        for i in range(0, len(self.parameters), n):
            out += self.call._pointers(self.call.spec.parts(self.parameters[i : i + n]))
        return out

    def finish(self) -> tuple[Tensor | None, list[Tensor]]:
        """(d_cond or None, gradients of all parameters or [])."""
        call = self.call
        d_cond = None
        if self.cond is not None:
            d_cond = self._over_samples(self.cond)
        parts_of_cond: list[Tensor] = []
        for i in range(len(call.fields) if call.prepared and (self.needs_weights or call.spec.film) else 0):
            parts_of_cond.append(self._upstream(i))
        if call.spec.film and self.needs_cond:
            d_cond = torch.cat(parts_of_cond)
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

    def _upstream(self, i: int) -> Tensor:
        """Adds field i's gradients through what was prepared; returns cond's, [width or 1, B, C]."""
        call, spec = self.call, self.call.spec
        low, n = i * call.width, spec.num_parameters
        prepare, given = call._prepare(i), call._cond_of(i)
        own: Sequence[Tensor] = call.fields[i]
        if self.needs_weights:
            primal, pull = torch.func.vjp(prepare, given, *own)[:2]
        else:
            primal, pull = torch.func.vjp(lambda cond: prepare(cond, *own), given)[:2]
        cotangents = {name: torch.zeros_like(value) for name, value in primal.items()}
        if self.film is not None:
            film = self._over_samples(self.film).narrow(0, low, call.width)
            cotangents["film"] = film if primal["film"].shape[1] > 1 or call.b == 1 else film.sum(1, keepdim=True)
        if self.features is not None:
            cotangents["features"] = self.features.narrow(0 if call.shared else 1, low, call.width)
        grads = pull(cotangents)
        for mine, more in zip(self.parameters[i * n : (i + 1) * n], grads[1:], strict=False):
            mine += more
        return grads[0]


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
    call = _Call(spec, cond, parameters, precision, features, shared, (*x_0.shape,))  # type: ignore[arg-type]
    x_1, path, stages, *unused = walk_fakes(x_0, spec, num_steps, method, precision, keep, store)
    v, scheme = _scheme(method)
    given = _contiguous(t_0, t_1, x_0, step_noise)
    kept = (path if keep else None, stages if stages.numel() else None)
    call.run("walk", num_steps * v, (num_steps, v), (*scheme, start, end), (*given, x_1, *kept))
    return (x_1, path, stages, *unused)


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
    call = _Call(spec, cond, parameters, precision, features, shared, (*path.shape[1:],))  # type: ignore[arg-type]
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


def _drawn(a: Tensor, b: Tensor, t: Tensor, seed: Tensor | None, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """a [E, B, S, D] and t [E, B, S], contiguous; drawn where a generator stands in their place."""
    if seed is not None and ids is not None:
        noise = PhiloxNoise(seed, ids, b.shape[2])
        a = noise.x_0(b.shape[-1]).to(b.dtype).expand(b.shape)
        t = noise.t().to(b.dtype).expand(b.shape[:-1]) if t.numel() == 0 else t
    return a.contiguous(), t.contiguous()


def _loss_call(
    spec: FieldSpec, cond: Tensor, parameters: Sequence[Tensor], precision: str, t: Tensor, rows: torch.Size
) -> _Call:
    features = spec.time_embedding.features(t.flatten(1)).unsqueeze(0)  # [1, E, M, T]
    return _Call(spec, cond, parameters, precision, features, False, (*rows,))  # type: ignore[arg-type]


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
    a, t = _drawn(a, b, t, seed, ids)
    call = _loss_call(spec, cond, parameters, precision, t, b.shape)
    found = loss_fakes(b, spec, precision, save, invariant)
    kept = (found[3], found[1]) if found[3].numel() else (None, None)
    call.run("loss", 1, (int(interpolate),), (sigma_min,), (a, b.contiguous(), t, found[0], *kept))
    return found


def _keeps(spec: FieldSpec, rows: int) -> int:
    """How many floats a loss keeps for its way back: those of all layers' products, or none where they are sooner
    computed again than read (narrow layers) or take too much room."""
    widths = [layer.width for layer in spec.trunk]
    kept = rows * sum(map(cpu.padded, widths))
    return kept if min(widths) >= 128 and 4 * kept <= plan.STORE_BYTES else 0


def loss_fakes(b: Tensor, spec: FieldSpec, precision: str, save: bool, invariant: bool) -> tuple[Tensor, ...]:
    """Empty tensors of `loss`'s shapes."""
    kept = _keeps(spec, b.shape[:-1].numel()) if save else 0
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
    a, t = _drawn(a, b, t, seed, ids)
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
