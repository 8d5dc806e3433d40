"""The fused side of the operators: their arguments in the kernels' words, a call's launches in turn, and gradients laid
out as the parameters are."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fastflow import reference
from fastflow.fields import FieldSpec, Sinusoidal
from fastflow.kernels import launch, plan  # neither needs triton

if TYPE_CHECKING:
    from fastflow.kernels.backward import Gradients
    from fastflow.kernels.encode import Times
    from fastflow.kernels.pack import Packed, Parameters, Prepared, Saved
    from fastflow.kernels.prepare import Encoded

_STATE = {"Identity": "identity", "Scaled": "scaled", "HLGauss": "hl_gauss"}
_TIME = {"RawTime": "raw", "Cosine": "cosine", "CosineFourier": "cosine_fourier", "PowerFourier": "power_fourier"}
_TIME |= {"Sinusoidal": "sinusoidal"}


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


@functools.lru_cache(maxsize=256)
def _known(key: str, precision: str) -> plan.Network:
    """The same, looked up."""
    return plan.KnownNetwork(**vars(network(FieldSpec.from_key(key), precision)))


def _given(spec: FieldSpec) -> bool:
    """Whether time features come to the kernels from outside: through an MLP, or read by every layer's FiLM."""
    return isinstance(spec.time_embedding, Sinusoidal) or spec.film


def unsupported(spec: FieldSpec, precision: str, device: torch.device) -> str | None:
    """What keeps the kernels from covering a field, or None."""
    # torch.compile does not follow the question for torch's own setting; float32 needs most.
    net = network(spec, "fp32" if precision == "default" else precision)
    index = (device.index or 0) if device.type == "cuda" else None
    return plan.why_unsupported(net, index)


# One call -----------------------------------------------------------------------------------------------------------


def _parts(spec: FieldSpec, parameters: Sequence[Tensor]) -> Parameters:
    """One field's parameters as the kernels take them."""
    from fastflow.kernels.pack import Parameters, with_members

    return Parameters(*spec.parts(with_members(parameters)))


class _Call:
    """One call's fields on their way to the kernels.

    `times` are start and end of all rows, or [1 or E, B, S] each of every row; None where a loss draws its own.
    """

    def __init__(
        self,
        spec: FieldSpec,
        cond: Tensor,
        parameters: Sequence[Tensor],
        precision: str,
        times: tuple[float, float] | tuple[Tensor, Tensor] | None,
        num_steps: int = 1,
        method: str = "euler",
    ) -> None:
        n = spec.num_parameters
        self.spec, self.cond, self.width = spec, cond, spec.ensemble or 1
        self.net = _known(spec.key, launch.product_precision() if precision == "default" else precision)
        self.given = [parameters[i : i + n] for i in range(0, len(parameters), n)]
        self.parts = [_parts(spec, own) for own in self.given]
        if times is None:  # the kernel embeds what it draws: nothing is prepared of it
            times = (cond.new_empty((1, 0)),) * 2
        elif isinstance(times[0], Tensor):
            start, end = times
            times = start.float().flatten(1), end.float().flatten(1)
        self.walk = (times, num_steps, method)
        self.shared = not isinstance(times[0], Tensor)
        if isinstance(times[0], Tensor):
            members, evaluations = self.width * len(self.parts), num_steps * plan.evaluations(method)
            self.net = plan.film_rows(self.net, members, times[0].shape[1], evaluations)
        self.encoded: list[Encoded] = []

    def prepare(self, keep: bool = False, stored: bool = False) -> Prepared:
        """Everything prepared, of all fields; `keep` for `gradients`, `stored` where the way back reads activations."""
        from fastflow.kernels import prepare

        options = (self._embedding(), self.net, keep, stored)
        prepared, self.encoded = prepare.prepare(self.parts, self.cond, *self.walk, *options)
        return prepared

    def _embedding(self) -> Times | Tensor:
        """The time embedding, or its features where the kernels' float32 is not exact enough."""
        from fastflow.kernels.encode import Times

        embedding = self.spec.time_embedding
        scale = (embedding.scale, math.log(embedding.max_period)) if isinstance(embedding, Sinusoidal) else ()
        known = Times(_TIME[type(embedding).__name__], embedding.width(), *scale)
        if known.exact or not (self.shared or _given(self.spec)):
            return known
        (start, end), num_steps, method = self.walk
        steps = reference.evaluation_steps(num_steps, method, self.cond.device)
        if isinstance(start, Tensor):
            part = (steps.float() / num_steps).view(-1, 1, 1)
            return embedding.features((1 - part) * start + part * end)
        part = steps / num_steps
        return embedding.features(((1 - part) * start + part * end).float())[:, None, None]

    def pack(self) -> Packed:
        """The weights of all fields."""
        from fastflow.kernels import pack

        return pack.pack(self.parts, self.shared, self.net)

    def gradients(self, found: Gradients, needs_cond: bool, needs_weights: bool) -> tuple[Tensor | None, list[Tensor]]:
        """(d_cond or None, gradients of all parameters or []) from what the kernels found."""
        from fastflow.kernels.prepare import prepare_bwd
        from fastflow.kernels.unfold import unfold_network

        if not needs_cond and not needs_weights:
            return None, []
        d_cond, given = prepare_bwd(self.parts, self.encoded, found, self.cond, needs_cond, needs_weights, self.net)
        results: list[Tensor] = []
        ends, num_steps, method = self.walk
        times = cast("tuple[float, float]", ends) if self.shared else None
        for i, some in enumerate(given):
            assert found.sums is not None
            own = self.parts[i]
            # Behind layers and norms come the MLPs, whose gradients are there already.
            ready = dict(enumerate((*some.mlp, *some.encoder), 2 * (len(own.layers) + len(own.norms))))
            grads = [
                ready[at].reshape(p.shape).to(p.dtype)
                if at in ready
                else torch.empty(p.shape, dtype=p.dtype, device=p.device)
                for at, p in enumerate(self.given[i])
            ]
            walk = (times, num_steps, method, self.net)
            unfold_network(found.sums, some, own, _parts(self.spec, grads), i * self.width, *walk)
            results += grads
        return d_cond, results


# Walks --------------------------------------------------------------------------------------------------------------


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
    from fastflow.kernels import integrate

    e, b, s, _ = x_0.shape
    ends = (start, end) if t_0 is None or t_1 is None else (t_0.float(), t_1.float())
    call = _Call(spec, cond, parameters, precision, ends, num_steps, method)
    saved = _saved(x_0, e, b * s, num_steps * plan.evaluations(method), call.net) if store else None
    with torch.cuda.device_of(x_0):
        out, path, stages = integrate.integrate(
            x_0,
            call.prepare(),
            call.pack(),
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
    from fastflow.kernels import backward

    needs_x, needs_cond, needs_weights, needs_noise = needs
    path, stages, *activations = saved
    like = path
    e, b, s, d = path.shape[1:]
    ends = (start, end) if t_0 is None or t_1 is None else (t_0.float(), t_1.float())
    call = _Call(spec, cond, parameters, precision, ends, num_steps, method)
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
            call.prepare(keep=True, stored=store),
            call.pack(),
            call.parts,
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
    from fastflow.kernels import matching

    e, batch, s, _ = b.shape
    call = _Call(spec, cond, parameters, precision, _loss_times(t, seed, ids, s, spec))
    net = call.net
    saved = _saved(b, e, batch * s, 1, net) if save and plan.stores(net, e, batch * s, 1) else None
    with torch.cuda.device_of(b):
        rows, error, point = matching.matching(
            a,
            b,
            t,
            seed,
            ids,
            call.prepare(),
            call.pack(),
            interpolate,
            sigma_min,
            save,
            saved,
            invariant,
            net,
        )
    kept = (saved.pre, saved.out, saved.stats) if saved else tuple(b.new_empty(0) for _ in range(3))
    return (rows, error, point, *kept)


def _loss_times(
    t: Tensor, seed: Tensor | None, ids: Tensor | None, samples: int, spec: FieldSpec
) -> tuple[Tensor, Tensor] | None:
    if t.numel() == 0 and seed is not None and ids is not None:
        if not _given(spec):
            return None
        from fastflow.kernels.draw import draw_times

        t = draw_times(seed, ids, samples).unsqueeze(0)
    return t, t


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
    from fastflow.kernels import backward

    needs_a, needs_b, needs_cond, needs_weights = needs
    error, point, *activations = saved
    e, batch, s, d = error.shape
    if t.numel() == 0 and seed is not None and ids is not None:
        from fastflow.kernels.draw import draw_times

        with torch.cuda.device_of(error):
            t = draw_times(seed, ids, s).unsqueeze(0).expand(e, -1, -1)
    t = t.float()
    call = _Call(spec, cond, parameters, precision, (t, t))
    net = call.net
    stored = activations[0].numel() > 0
    prepared, packed = call.prepare(keep=True, stored=stored), call.pack()
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
                call.parts,
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
