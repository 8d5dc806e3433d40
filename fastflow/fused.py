"""The fused side of the operators: what does not depend on the flow state is prepared here, in plain PyTorch where
`kernels.prepare` does not cover it, the rest is the kernels'.

Gradients come back the same way: kernels give those of what was prepared and of the weights they multiply with. Further
to cond and first layers it is a few launches where `kernels.prepare` covers the network, else `torch.func.vjp`, which
goes through encoders and time embeddings too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fastflow import reference
from fastflow.fields import FieldSpec, Parts
from fastflow.kernels import launch, plan  # neither needs triton

if TYPE_CHECKING:
    from fastflow.kernels.backward import Gradients
    from fastflow.kernels.pack import Prepared, Saved, Weights

Dense = Callable[[Tensor, Tensor, Tensor, str], Tensor]

_STATE = {"Identity": "identity", "Scaled": "scaled", "HLGauss": "hl_gauss"}
_TIME = {"RawTime": "raw", "Cosine": "cosine", "CosineFourier": "cosine_fourier", "PowerFourier": "power_fourier"}


def network(spec: FieldSpec, precision: str) -> plan.Network:
    """The spec in the kernels' words."""
    embedding = spec.state_embedding
    return plan.Network(
        state_dim=spec.state_dim,
        cond_dim=spec.cond_dim,
        hidden=tuple(layer.width for layer in spec.trunk),
        inputs=tuple(layer.inputs for layer in spec.trunk),
        add=tuple(-1 if layer.add is None else layer.add for layer in spec.trunk),
        activation=spec.activation,
        norm=spec.norm_position or "none",
        eps=spec.norm_eps,
        state_embedding=_STATE[type(embedding).__name__],
        state_features=spec.state_features,
        low=getattr(embedding, "low", 0.0),
        high=getattr(embedding, "high", 1.0),
        sigma=getattr(embedding, "sigma", 1.0),
        time_embedding="given" if _given(spec) else _TIME[type(spec.time_embedding).__name__],
        time_features=spec.time_features,
        prediction=spec.prediction,
        output_scale=spec.output_scale,
        precision=launch.product_precision() if precision == "default" else precision,
    )


def _given(spec: FieldSpec) -> bool:
    """Whether time features come to the kernels from outside: through an MLP, or read by every layer's FiLM."""
    return type(spec.time_embedding).__name__ not in _TIME or spec.film


def unsupported(spec: FieldSpec, precision: str, device: torch.device) -> str | None:
    """What keeps the kernels from covering a field, or None."""
    # torch.compile does not follow the question for torch's own setting; float32 needs most.
    net = network(spec, "fp32" if precision == "default" else precision)
    index = (device.index or 0) if device.type == "cuda" else None
    return plan.why_unsupported(net, index)


# What is prepared ---------------------------------------------------------------------------------------------------


def _members(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Parameters with an E axis: a network without an ensemble is one member."""
    return [p.unsqueeze(0) if parameters[0].dim() == 2 else p for p in parameters]


def _split(spec: FieldSpec, parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Each field's own parameters, with an E axis."""
    n = spec.num_parameters
    return [_members(parameters[i : i + n]) for i in range(0, len(parameters), n)]


def _prepare(
    spec: FieldSpec,
    parameters: Sequence[Tensor],
    cond: Tensor,
    times: Tensor,
    shared: bool,
    precision: str,
    dense: Dense = reference.dense,
) -> dict[str, Tensor]:
    """What `kernels.pack.Prepared` holds, of one field, without padding.

    `dense` multiplies what has rows: cond and time features of every row. cond [E, B, C]; times [N] of every evaluation
    with `shared`, else [N, E, M], each row's own.
    """
    parts = spec.parts(parameters)

    def encode(x: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
        for w, b in layers:
            x = reference.activate(dense(x, w, b, precision), spec.activation)
        return x

    first, bias = parts.layers[0]
    e, c, f = first.shape[0], spec.cond_dim, spec.state_features
    out: dict[str, Tensor] = {}
    encoded, time = cond, None
    if shared or _given(spec):
        features = spec.time_embedding.features(times)  # [N, T] or [N, E, M, T]
        if shared:
            # Tables are few numbers and stay float32.
            layers = [(w.float(), b.float()) for w, b in parts.time]
            time = reference.mlp(features.expand(e, *features.shape), layers, spec.activation)
        else:
            time = encode(features.transpose(0, 1).to(first.dtype), parts.time)
    if spec.film:
        width = spec.time_features
        out["time"] = bias.unsqueeze(1).expand(-1, times.shape[0] if shared else 1, -1)
        if c:
            encoded = encode(cond, parts.encoder)
            films = [dense(encoded, w[:, :-width], b, precision) for w, b in parts.films]
        else:
            films = [b.unsqueeze(1) for _, b in parts.films]
        out["film"] = torch.cat(films, dim=-1)
        if shared and time is not None:
            out["film_time"] = torch.cat([time @ w[:, -width:].float() for w, _ in parts.films], dim=-1)
    else:
        if c:
            out["cond"] = dense(cond, first[:, :c], torch.zeros_like(bias), precision)
        out["time"] = bias.unsqueeze(1)
        if shared and time is not None:
            out["time"] = time @ first[:, c + f :].float() + out["time"]
    if not shared and time is not None:
        out["features"] = time.transpose(0, 1)
    return out


def _weights(spec: FieldSpec, parameters: Sequence[Tensor], shared: bool) -> Weights:
    """What the kernels multiply with, of one field."""
    from fastflow.kernels.pack import Weights

    parts = spec.parts(parameters)
    first = parts.layers[0][0]
    c, f, t = (0 if spec.film else spec.cond_dim), spec.state_features, spec.time_features
    return Weights(
        layers=parts.layers,
        norms=parts.norms,
        state=first[:, c : c + f],
        time=None if shared or spec.film else first[:, c + f :],
        films=[] if shared else [w[:, -t:] for w, _ in parts.films],
    )


class _Call:
    """One call's fields on their way to the kernels."""

    def __init__(
        self,
        spec: FieldSpec,
        cond: Tensor,
        parameters: Sequence[Tensor],
        precision: str,
        times: Callable[[], Tensor],
        shared: bool,
        walk: tuple[tuple[float, float], int, str] = ((0.0, 1.0), 1, "euler"),
    ) -> None:
        self.spec, self.shared, self.walk = spec, shared, walk
        self._times = times
        self.net = network(spec, precision)
        self.fields = _split(spec, parameters)
        self.given = [parameters[i : i + spec.num_parameters] for i in range(0, len(parameters), spec.num_parameters)]
        self.cond = cond
        self.width = spec.ensemble or 1

    @functools.cached_property
    def times(self) -> Tensor:
        """Of every evaluation, where they are not told to the kernels as numbers."""
        return self._times()

    def _share(self, i: int, x: Tensor, axis: int = 0) -> Tensor:
        """Field i's members of a tensor whose `axis` is E of all fields, or 1."""
        return x if x.shape[axis] == 1 else x.narrow(axis, i * self.width, self.width)

    def _preparation(self, i: int, dense: Dense = reference.dense) -> Callable[..., dict[str, Tensor]]:
        times = self.times if self.shared else self._share(i, self.times, 1)

        def prepare(cond: Tensor, *parameters: Tensor) -> dict[str, Tensor]:
            cond = cond.expand(self.width, -1, -1)
            return _prepare(self.spec, parameters, cond, times, self.shared, self.net.precision, dense)

        return prepare

    def prepare(self, invariant: bool = False) -> Prepared:
        """Everything prepared, of all fields, padded and cast; `invariant`: the same bits in any batch."""
        from fastflow.kernels import prepare
        from fastflow.kernels.dense import dense
        from fastflow.kernels.pack import Prepared, pad_last, pad_layers, product_dtype

        net, dtype = self.net, product_dtype(self.net)
        if prepare.covers(net):
            ends, num_steps, method = self.walk
            conds = [self._share(i, self.cond) for i in range(len(self.fields))]
            firsts = [self.spec.parts(ps).layers[0] for ps in self.fields]
            return prepare.prepare(conds, firsts, ends if self.shared else None, num_steps, method, net)
        with launch.exact_products(net.precision):
            found = [
                self._preparation(i, dense if invariant else reference.dense)(self._share(i, self.cond), *ps)
                for i, ps in enumerate(self.fields)
            ]

        def joined(name: str, axis: int = 0) -> Tensor | None:
            return torch.cat([f[name] for f in found], dim=axis) if name in found[0] else None

        cond, time, features, film, film_time = (
            joined(name, int(name == "features")) for name in ("cond", "time", "features", "film", "film_time")
        )
        assert time is not None

        def layers(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if x is None else pad_layers(x.split([2 * h for h in net.hidden], -1), net, 2, dtype)

        return Prepared(
            cond=None if cond is None else pad_last(cond, net.padded[0], dtype),
            time=pad_last(time, net.padded[0], torch.float32),
            features=None if features is None else pad_last(features, net.time_padded, dtype),
            film=layers(film, dtype),
            film_time=layers(film_time, torch.float32),
        )

    def weights(self) -> list[Weights]:
        return [_weights(self.spec, ps, self.shared) for ps in self.fields]

    @functools.cached_property
    def direct(self) -> bool:
        """Whether gradients come back by launches of their own all the way."""
        from fastflow.kernels import prepare

        return self.net.fold and prepare.covers(self.net)

    def joined_weights(self) -> Weights:
        """Those of all fields, their members one behind the other."""
        if len(self.fields) == 1:
            return self.weights()[0]
        together = [torch.cat(ps) for ps in zip(*self.fields, strict=True)]
        return _weights(self.spec, together, self.shared)

    def given_weights(self) -> Weights | None:
        """Those that the way back multiplies outside the kernel: of time features from outside."""
        return self.joined_weights() if _given(self.spec) and not self.shared else None

    def gradients(self, found: Gradients, needs_cond: bool, needs_weights: bool) -> tuple[Tensor | None, list[Tensor]]:
        """(d_cond or None, gradients of all parameters or []) from what the kernels found."""
        if not needs_cond and not needs_weights:
            return None, []
        return (self._launched if self.direct else self._pulled)(found, needs_cond, needs_weights)

    def _launched(self, found: Gradients, needs_cond: bool, needs_weights: bool) -> tuple[Tensor | None, list[Tensor]]:
        from fastflow.kernels.prepare import prepare_bwd
        from fastflow.kernels.unfold import unfold_network

        parts = [self.spec.parts(ps) for ps in self.fields]
        d_cond = by_cond = None
        if found.cond is not None:
            firsts = [part.layers[0][0] for part in parts]
            d_cond, by_cond = prepare_bwd(found.cond, self.cond, firsts, needs_cond, needs_weights, self.net)
        elif needs_cond:
            d_cond = torch.zeros_like(self.cond)
        results: list[Tensor] = []
        ends, num_steps, method = self.walk
        for i, part in enumerate(parts if needs_weights else []):
            assert found.sums is not None
            grads = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in self.given[i]]
            into = self.spec.parts(_members(grads))
            times = ends if self.shared else None
            own = (part.layers, part.norms, (into.layers, into.norms), i * self.width, times, num_steps, method)
            unfold_network(found.sums, by_cond, *own, self.net)
            results += grads
        return d_cond, results

    def _pulled(self, found: Gradients, needs_cond: bool, needs_weights: bool) -> tuple[Tensor | None, list[Tensor]]:
        from fastflow.kernels.backward import weight_gradients

        d_cond: list[Tensor] = []
        d_parameters: list[Tensor] = []
        by_cond, first, weights = found.cond_rows(), self.net.hidden[0], None
        upstream = {"cond": None if by_cond is None else by_cond[..., :first], "film": found.film}
        if needs_weights:
            assert found.sums is not None
            weights = weight_gradients(found.sums, self.joined_weights(), self.net)
            upstream |= {"time": found.sums.table[..., :first], "features": found.features}
            upstream |= {"film_time": found.film_time}
        for i, ps in enumerate(self.fields):
            prepare, given = self._preparation(i), self._share(i, self.cond)
            some = self._prepared_from if needs_weights else []
            with launch.exact_products(self.net.precision):
                primal, pull = torch.func.vjp(_of_some(prepare, ps, some), given, *(ps[at] for at in some))[:2]
                cotangents = {}
                for name, value in primal.items():
                    grad = upstream.get(name)
                    if grad is None:
                        cotangents[name] = torch.zeros_like(value)
                        continue
                    grad = self._share(i, grad, int(name == "features"))
                    if grad.shape[1] != value.shape[1]:  # FiLM without cond is the same for all rows
                        grad = grad.sum(1, keepdim=True)
                    cotangents[name] = grad.to(value.dtype)
                grads = pull(cotangents)
            d_cond.append(grads[0])
            if weights is not None:
                own = self._add(dict(zip(some, grads[1:], strict=True)), weights, i)
                d_parameters += [g.reshape(p.shape).to(p.dtype) for g, p in zip(own, self.given[i], strict=True)]
        if not needs_cond:
            return None, d_parameters
        if self.cond.shape[0] == 1:
            return torch.stack(d_cond).sum(0), d_parameters
        return torch.cat(d_cond), d_parameters

    @functools.cached_property
    def _prepared_from(self) -> list[int]:
        """Positions of the parameters that `_prepare` reads."""
        parts = _positions(self.spec)
        first = parts.layers[0][1:] if self.spec.film else parts.layers[0]
        pairs = (first, *parts.time, *parts.encoder, *parts.films)
        return [cast("int", at) for pair in pairs for at in pair]

    def _add(self, grads: dict[int, Tensor], found: Weights, i: int) -> list[Tensor]:
        """Field i's gradients: what came through `_prepare`, by position, and those of the weights the kernels multiply
        with."""
        spec, parts = self.spec, _positions(self.spec)
        c, f = (0 if spec.film else spec.cond_dim), spec.state_features

        def add(position: Tensor, value: Tensor, start: int = 0) -> None:
            at, value = cast("int", position), self._share(i, value)
            if at not in grads:  # the kernels' alone
                grads[at] = value
                return
            # vjp's results may share memory or be expanded.
            grads[at] = grads[at].clone(memory_format=torch.contiguous_format)
            grads[at][:, start : start + value.shape[1]] += value.to(grads[at].dtype)

        add(parts.layers[0][0], found.state, c)
        if found.time is not None:
            add(parts.layers[0][0], found.time, c + f)
        for pairs, values in ((parts.layers[1:], found.layers[1:]), (parts.norms, found.norms)):
            for (at_w, at_b), (w, b) in zip(pairs, values, strict=True):
                add(at_w, w)
                add(at_b, b)
        for (at, _), w in zip(parts.films, found.films, strict=bool(found.films)):
            add(at, w, grads[cast("int", at)].shape[1] - spec.time_features)
        return [grads[at] for at in range(spec.num_parameters)]


def _positions(spec: FieldSpec) -> Parts:
    """Each parameter's place in the list in the place of the parameter."""
    return spec.parts(cast("Sequence[Tensor]", range(spec.num_parameters)))


def _of_some(
    prepare: Callable[..., dict[str, Tensor]], ps: Sequence[Tensor], some: Sequence[int]
) -> Callable[..., dict[str, Tensor]]:
    """`prepare` of cond and the parameters at some positions."""

    def prepared(cond: Tensor, *own: Tensor) -> dict[str, Tensor]:
        given = dict(zip(some, own, strict=True))
        return prepare(cond, *(given.get(at, p) for at, p in enumerate(ps)))

    return prepared


# Walks --------------------------------------------------------------------------------------------------------------


def _walk_call(
    spec: FieldSpec,
    cond: Tensor,
    parameters: Sequence[Tensor],
    precision: str,
    t_0: Tensor | None,
    t_1: Tensor | None,
    ends: tuple[float, float],
    num_steps: int,
    method: str,
    device: torch.device,
) -> tuple[_Call, tuple[Tensor, Tensor] | tuple[float, float]]:
    """(the call, start and end as the kernels take them)."""
    walk = (ends, num_steps, method)
    if t_0 is None or t_1 is None:

        def shared() -> Tensor:
            # Rounded once: sinusoids of a thousand times t show every bit.
            part = reference.evaluation_steps(num_steps, method, device) / num_steps
            return ((1 - part) * ends[0] + part * ends[1]).float()

        return _Call(spec, cond, parameters, precision, shared, True, walk), ends
    start, end = t_0.float(), t_1.float()

    def own() -> Tensor:
        steps = reference.evaluation_steps(num_steps, method, device).float()
        if not _given(spec):
            return steps.view(-1, 1, 1)  # the kernels embed each row's times themselves
        part = (steps / num_steps).view(-1, 1, 1, 1)
        return ((1 - part) * start + part * end).flatten(2)

    return _Call(spec, cond, parameters, precision, own, False, walk), (start, end)


def stores(
    spec: FieldSpec, members: int, rows: int, num_steps: int, method: str, precision: str, activations: str
) -> bool:
    """Whether the activations of all steps are stored for the backward pass (see `plan.stores`)."""
    if activations != "auto":
        return activations == "store"
    net = network(spec, "fp32" if precision == "default" else precision)
    return plan.stores(net, members, rows, num_steps * plan.evaluations(method))


def _saved(
    like: Tensor, e: int, rows: int, evaluations: int, net: plan.Network, tensors: Sequence[Tensor] = ()
) -> Saved:
    from fastflow.kernels.pack import Saved

    total = plan.padded_rows(rows) * evaluations
    return Saved(*tensors, rows=total) if tensors else Saved.empty(like, e, total, net)


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
    """(x_K, path, stages, pre, out, stats): see `kernels.integrate` and `kernels.pack.Saved`; empty what is not
    kept."""
    from fastflow.kernels import integrate, pack

    e, b, s, _ = x_0.shape
    call, ends = _walk_call(spec, cond, parameters, precision, t_0, t_1, (start, end), num_steps, method, x_0.device)
    saved = _saved(x_0, e, b * s, num_steps * plan.evaluations(method), call.net) if store else None
    with torch.cuda.device_of(x_0):
        out, path, stages = integrate.integrate(
            x_0,
            call.prepare(),
            pack.pack(call.weights(), call.net),
            ends,
            step_noise,
            num_steps,
            method,
            keep,
            saved,
            call.net,
        )
    kept = (saved.pre, saved.out, saved.stats) if saved else tuple(x_0.new_empty(0) for _ in range(3))
    return (out, path, stages, *kept)


def walk_fakes(
    x_0: Tensor, spec: FieldSpec, num_steps: int, method: str, precision: str, keep: bool, store: bool
) -> tuple[Tensor, ...]:
    """Empty tensors of `walk`'s shapes."""
    e, b, s, _ = x_0.shape
    net = network(spec, precision)
    v = plan.evaluations(method)
    states = [
        x_0.new_empty((num_steps, *x_0.shape) if kept else (0,), dtype=torch.float32)
        for kept in (keep, keep and v == 2)
    ]
    return (x_0.new_empty(x_0.shape), *states, *_saved_fakes(x_0, e, b * s, num_steps * v, net, store))


def _saved_fakes(
    like: Tensor, e: int, rows: int, evaluations: int, net: plan.Network, store: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not store:
        return like.new_empty(0), like.new_empty(0), like.new_empty(0)
    total = plan.padded_rows(rows) * evaluations * e
    dtype = torch.bfloat16 if net.precision == "bf16" else torch.float32
    width = sum(net.padded)
    return (
        like.new_empty(total * width, dtype=dtype),
        like.new_empty(0 if net.fold else total * width, dtype=dtype),
        like.new_empty(0 if net.norm == "none" else 2 * net.layers * total, dtype=torch.float32),
    )


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
    from fastflow.kernels import backward, pack

    needs_x, needs_cond, needs_weights, needs_noise = needs
    path, stages, *activations = saved
    like = path
    e, b, s, d = path.shape[1:]
    call, ends = _walk_call(spec, cond, parameters, precision, t_0, t_1, (start, end), num_steps, method, path.device)
    net = call.net
    grad = like.new_zeros((e, b, s, d)) if grad is None else grad.float()
    evaluations = num_steps * plan.evaluations(method)
    with torch.cuda.device_of(path):
        found = backward.backward(
            grad,
            grad_path,
            path,
            stages,
            None,
            ends,
            call.prepare(),
            pack.pack(call.weights(), net),
            call.given_weights(),
            _saved(path, e, b * s, evaluations, net, activations) if store else None,
            (e, b, s, d),
            num_steps,
            method,
            needs_cond,
            needs_weights,
            needs_noise,
            net,
        )
        d_cond, d_parameters = call.gradients(found, needs_cond, needs_weights)
    dtype = parameters[0].dtype

    def none() -> Tensor:
        return like.new_empty(0, dtype=dtype)

    return [
        found.x.to(dtype) if needs_x else none(),
        d_cond.to(cond.dtype) if d_cond is not None else none(),
        found.step_noise.to(dtype) if found.step_noise is not None else none(),
        *(d_parameters if needs_weights else [none() for _ in parameters]),
    ]


# Losses -------------------------------------------------------------------------------------------------------------


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
    """(rows, error, x_t, pre, out, stats): see `kernels.matching` and `kernels.pack.Saved`; empty what is not kept."""
    from fastflow.kernels import matching, pack

    e, batch, s, _ = b.shape
    call = _Call(spec, cond, parameters, precision, lambda: _loss_times(t, seed, ids, s, spec), shared=False)
    net = call.net
    saved = _saved(b, e, batch * s, 1, net) if save and plan.stores(net, e, batch * s, 1) else None
    with torch.cuda.device_of(b):
        rows, error, point = matching.matching(
            a,
            b,
            t,
            seed,
            ids,
            call.prepare(invariant),
            pack.pack(call.weights(), net),
            interpolate,
            sigma_min,
            save,
            saved,
            invariant,
            net,
        )
    kept = (saved.pre, saved.out, saved.stats) if saved else tuple(b.new_empty(0) for _ in range(3))
    return (rows, error, point, *kept)


def _loss_times(t: Tensor, seed: Tensor | None, ids: Tensor | None, samples: int, spec: FieldSpec) -> Tensor:
    """[1, E, M] float32."""
    if t.numel() == 0 and seed is not None and ids is not None:
        if not _given(spec):
            return t.new_zeros((1, 1, 1), dtype=torch.float32)  # drawn and embedded by the kernel
        from fastflow.kernels.draw import draw_times

        t = draw_times(seed, ids, samples).unsqueeze(0).expand(spec.ensemble or 1, -1, -1)
    return t.float().flatten(1).unsqueeze(0)


def loss_fakes(b: Tensor, spec: FieldSpec, precision: str, save: bool, invariant: bool) -> tuple[Tensor, ...]:
    """Empty tensors of `loss`'s shapes."""
    e, batch, s, _ = b.shape
    net = network(spec, precision)
    store = save and plan.stores(net, e, batch * s, 1)
    state = b.shape if save else (0,)
    return (
        b.new_empty(b.shape[:-1]),
        b.new_empty(state, dtype=torch.float32),
        b.new_empty(state, dtype=torch.float32),
        *_saved_fakes(b, e, batch * s, 1, net, store),
    )


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
    from fastflow.kernels import backward, pack

    needs_a, needs_b, needs_cond, needs_weights = needs
    error, point, *activations = saved
    e, batch, s, d = error.shape
    if t.numel() == 0 and seed is not None and ids is not None:
        from fastflow.kernels.draw import draw_times

        with torch.cuda.device_of(error):
            t = draw_times(seed, ids, s).unsqueeze(0).expand(e, -1, -1)
    t = t.float()
    call = _Call(spec, cond, parameters, precision, lambda: t.flatten(1).unsqueeze(0), shared=False)
    net = call.net
    prepared, packed, weights = call.prepare(), pack.pack(call.weights(), net), call.given_weights()
    stored = activations[0].numel() > 0
    found = None
    with torch.cuda.device_of(error):
        # Rows whose activations take too much memory come in parts that fit.
        part = batch if stored else plan.loss_part(net, e, batch, s)
        for low in range(0, batch, part):
            rows = slice(low, min(low + part, batch))
            size, times = rows.stop - rows.start, t[:, rows].contiguous()
            some = backward.backward(
                grad[:, rows],
                None,
                point[:, rows].contiguous(),
                point,
                error[:, rows].contiguous(),
                (times, times),
                prepared.rows(rows, s),
                packed,
                weights,
                _saved(error, e, batch * s, 1, net, activations) if stored else None,
                (e, size, s, d),
                1,
                "euler",
                needs_cond,
                needs_weights,
                False,
                net,
            )
            found = some if found is None else found.joined(some)
    assert found is not None
    d_cond, d_parameters = call.gradients(found, needs_cond, needs_weights)
    dtype = parameters[0].dtype

    def none() -> Tensor:
        return error.new_empty(0, dtype=dtype)

    d_a = d_b = None
    if needs_a or needs_b:
        keep, at = 1 - sigma_min, t.unsqueeze(-1)
        # The target is b - keep a, or b itself.
        d_error = error * (grad.float() * (2 / d)).unsqueeze(-1) if interpolate or needs_b else error
        if needs_a:
            d_a = (1 - keep * at) * found.x + keep * d_error if interpolate else found.x
        if needs_b:
            d_b = at * found.x - d_error if interpolate else -d_error
    return [
        d_a.to(dtype) if d_a is not None else none(),
        d_b.to(dtype) if d_b is not None else none(),
        d_cond.to(cond.dtype) if d_cond is not None else none(),
        *(d_parameters if needs_weights else [none() for _ in parameters]),
    ]
