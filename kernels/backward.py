"""The way back through a walk or a loss: one launch per part, then the weight gradients' matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .encode import Rows, dense_bwd, time_rows
from .integrate import stage_time, time_features
from .launch import batched_product, exact_products, target
from .network import network_bwd, network_fwd
from .pack import (
    Packed,
    Parameters,
    Prepared,
    Saved,
    net_shape,
    options,
    partial_sums,
    product_dtype,
    scalars,
    turns,
)
from .tile import cast, embed_state, embed_state_grad, read_velocity_grad
from .unfold import Sums


@triton.jit(
    do_not_specialize=[
        "M", "MP", "samples", "num_steps", "film_stride_e", "film_stride_b", "i_low", "count", "R_P", "R_D"
    ]
)  # fmt: skip
def backward_kernel(
    grad_ptr,  # [E, M, D] gradient of the end of this part; with LOSS [E, M], of each row's loss
    grad_path_ptr,  # [K, E, M, D] gradient of every step's start, with PATH
    path_ptr,  # [K, E, M, D] every step's start, or x_t
    stages_ptr,  # [K, E, M, D] every step's second point
    error_ptr,  # [E, M, D] v - target, with LOSS
    t_0_ptr,  # [E, M] start and end times, or t, without TABLE
    t_1_ptr,
    c_ptr,  # see integrate_fwd_kernel
    time_ptr,
    feat_ptr,
    film_ptr,
    film_time_ptr,
    w_feat_ptr,
    w_time_ptr,
    w_film_ptr,
    w_hidden_ptr,
    b_hidden_ptr,
    scale_ptr,
    shift_ptr,
    w_out_ptr,
    b_out_ptr,
    pre_ptr,  # workspaces of R_P rows: stored by the forward pass, or made again here with RECOMPUTE
    stats_ptr,
    y_ptr,
    part_ptr,
    h_ptr,  # see network_bwd
    dpre_ptr,
    xhat_ptr,  # workspace of R_D rows, result with FOLD and WEIGHTS: normalised activations
    dfilm_ptr,  # workspace of R_D rows of 2 HP[l], result with WEIGHTS: gradient of FiLM's [scale, shift]
    dcond_ptr,  # [E, MP, HP[0]] float32, added to: gradient of cond's share of the first layer
    dcond_film_ptr,  # [E, MP, 2 sum HP] float32, added to: gradient of cond's share of FiLM
    dnorm_ptr,  # [2, blocks, E, sum HP] float32, added to: gradient of scale and shift, per block of rows
    dv_ptr,  # [E, R_D, DP] float32 result with WEIGHTS: gradient of the head's output
    state_ptr,  # [E, R_D, FP] result with WEIGHTS: state features
    dtime_ptr,  # [E, R_D, TP] result with WEIGHTS and without TABLE: time features
    dx_ptr,  # [E, M, D] result: gradient of the start of this part
    dnoise_ptr,  # [K, E, M, D] result with NOISE: gradient of every step's end
    M,
    MP,
    samples,
    num_steps,
    start,
    end,
    film_stride_e,
    film_stride_b,
    low,
    high,
    std,
    eps,
    output_scale,
    i_low,  # evaluations i_low..i_low+count-1
    count,
    R_P,
    R_D,
    NET: tl.constexpr,
    V: tl.constexpr,
    METHOD: tl.constexpr,
    LOSS: tl.constexpr,
    PATH: tl.constexpr,
    NOISE: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    DCOND: tl.constexpr,
):
    """Walks the evaluations back. With g the gradient of x_{k+1}, h the step and J_i the Jacobian of evaluation i:

        euler       g_k = g + J^T h g
        midpoint    m = J_2^T h g,          g_k = g + m + J_1^T (h/2) m
        heun        m = J_2^T (h/2) g,      g_k = g + m + J_1^T ((h/2) g + h m)

    LOSS is one evaluation whose velocity has the gradient 2/D error grad.
    """
    i_b = tl.program_id(0)
    i_e = tl.program_id(1).to(tl.int64)
    n_b = tl.num_programs(0).to(tl.int64)
    n_e = tl.num_programs(1).to(tl.int64)
    DTYPE: tl.constexpr = w_feat_ptr.dtype.element_ty
    BM: tl.constexpr = NET.BM
    D: tl.constexpr = NET.D
    DP: tl.constexpr = NET.DP
    HP: tl.constexpr = NET.HP[0]
    SUM: tl.constexpr = NET.OFF[NET.L - 1] + NET.HP[NET.L - 1]
    o_b = i_b * BM + tl.arange(0, BM)
    m_b = o_b < M
    o_f = tl.arange(0, NET.FP)
    o_d = tl.arange(0, DP)
    o_t = tl.arange(0, NET.TP)
    o_s = tl.minimum(o_b, M - 1)
    o_c = o_s // samples
    r_m = i_e * MP + i_b * BM
    n_v = num_steps * V
    p_c = c_ptr + i_e * (M // samples) * HP
    p_film = film_ptr + i_e * film_stride_e
    weights = (
        w_feat_ptr, w_time_ptr, w_film_ptr, w_hidden_ptr, b_hidden_ptr, scale_ptr, shift_ptr, w_out_ptr, b_out_ptr
    )  # fmt: skip
    results = (xhat_ptr, dfilm_ptr, dcond_ptr, dcond_film_ptr, dnorm_ptr)
    o_x = (i_e * M + o_b)[:, None] * D + o_d[None, :]
    m_x = m_b[:, None] & (o_d < D)[None, :]

    b_start = start
    b_end = end
    if not NET.TABLE:
        b_start = tl.load(t_0_ptr + i_e * M + o_b, mask=m_b, other=0.0).to(tl.float32)[:, None]
        b_end = tl.load(t_1_ptr + i_e * M + o_b, mask=m_b, other=0.0).to(tl.float32)[:, None]
    b_h = (b_end - b_start) / num_steps
    b_mid = tl.zeros([BM, DP], tl.float32)
    if LOSS:
        b_row = tl.load(grad_ptr + i_e * M + o_b, mask=m_b, other=0.0).to(tl.float32)
        b_g = tl.load(error_ptr + o_x, mask=m_x, other=0.0) * (b_row * (2.0 / D))[:, None]
    else:
        b_g = tl.load(grad_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    for j in tl.range(0, 1 if LOSS else count, num_stages=1, disable_licm=True):
        tl.debug_barrier()
        i = i_low + count - 1 - j
        k = i // V
        first = (i % V) == 0
        o_k = k * n_e * M * D
        b_part = stage_time(i, V, METHOD) / num_steps
        b_t = (1.0 - b_part) * b_start + b_part * b_end
        b_p = tl.load(path_ptr + o_k + o_x, mask=m_x & first, other=0.0)
        if V == 2:
            b_p += tl.load(stages_ptr + o_k + o_x, mask=m_x & (i % V == 1), other=0.0)
        b_f = cast(embed_state(b_p, o_f, low, high, std, NET), DTYPE, NET)
        p_t = feat_ptr + (i * n_e * M + i_e * M) * NET.TP
        b_tf = time_features(b_t, p_t, o_s, o_t, DTYPE, NET)
        if WEIGHTS and NET.TIME == "rows":
            # The weights of FiLM are multiplied with them.
            b_tf = tl.load(p_t + o_s[:, None] * NET.TP + o_t[None, :])
        p_time = time_ptr + i_e * HP
        p_film_time = film_time_ptr
        if NET.TABLE:
            p_time = time_ptr + (i_e * n_v + i) * HP
            p_film_time = film_time_ptr + (i_e * n_v + i) * (2 * SUM)
        elif NET.TIME == "rows":
            p_film_time = film_time_ptr + (i_e * n_v + i) * M * (2 * SUM)
        inputs = (
            b_tf,
            p_t,
            p_c,
            p_time,
            p_film,
            p_film_time,
            o_c,
            o_s,
            film_stride_b,
        )
        r_d = r_m
        if WEIGHTS:
            r_d = i_e * R_D + (i - i_low) * MP + i_b * BM
        r_p = r_d
        if not RECOMPUTE:
            r_p = i_e * R_P + i * MP + i_b * BM
        if RECOMPUTE:
            r_y = r_p
            if NET.FOLD:
                r_y = r_m
            network_fwd(
                b_f, inputs, weights, pre_ptr, stats_ptr, y_ptr, part_ptr, i_e, n_e, R_P, MP if NET.FOLD else R_P,
                r_p, r_y, r_m, eps, NET, True,
            )  # fmt: skip
            tl.debug_barrier()
        b_dv = b_g
        if NOISE:
            tl.store(dnoise_ptr + o_k + o_x, b_g, mask=m_x & (i % V == V - 1))
        if V == 2:
            if METHOD == "midpoint":
                b_dv = tl.where(first, (0.5 * b_h) * b_mid, b_h * b_g)
            else:
                b_dv = tl.where(first, (0.5 * b_h) * b_g + b_h * b_mid, (0.5 * b_h) * b_g)
        elif not LOSS:
            b_dv = b_h * b_g
        b_dout, b_direct = read_velocity_grad(b_dv, b_t, output_scale, NET)
        if WEIGHTS:
            o_r = tl.arange(0, BM)[:, None]
            tl.store(dv_ptr + r_d * DP + o_r * DP + o_d[None, :], b_dout)
            tl.store(state_ptr + r_d * NET.FP + o_r * NET.FP + o_f[None, :], b_f)
            if not NET.TABLE:
                tl.store(dtime_ptr + r_d * NET.TP + o_r * NET.TP + o_t[None, :], b_tf)
        b_df = network_bwd(
            b_dout, inputs, weights, pre_ptr, stats_ptr, h_ptr, dpre_ptr, results, i_b, i_e, n_b, n_e, MP, R_P, R_D,
            r_p, r_m, r_d, NET, WEIGHTS, DCOND,
        )  # fmt: skip
        b_dx = embed_state_grad(b_df, b_p, o_f, low, high, std, NET) + b_direct
        if PATH:
            b_dx += tl.load(grad_path_ptr + o_k + o_x, mask=m_x & first, other=0.0).to(tl.float32)
        if LOSS:
            b_g = b_dx
        elif V == 1:
            b_g += b_dx
        else:
            b_g = tl.where(first, b_g + b_mid + b_dx, b_g)
            b_mid = b_dx
    tl.store(dx_ptr + o_x, b_g, mask=m_x)


@dataclass
class Gradients:
    """Results of the way back, float32, every tensor with its E axis; what was not asked for is None."""

    x: Tensor  # [E, B, S, D] of the walk's start, or of x_t
    step_noise: Tensor | None = None  # [K, E, B, S, D]
    cond: Tensor | None = None  # [E, B S, HP[0]] of cond's share of the first layer; joined ones [E, B, HP[0]]
    film: Tensor | None = None  # [E, B, 2 sum HP] of cond's share of FiLM
    features: Tensor | None = None  # [E, N B S, T] of Prepared.features_pre, not float32
    film_time: Tensor | None = None  # [E, N, 2 sum HP] of Prepared.film_time
    sums: Sums | None = None  # what reduces over rows

    def joined(self, other: Gradients) -> Gradients:
        """Those of a loss whose rows came in two parts."""

        def side_by_side(x: Tensor | None, y: Tensor | None, axis: int = 1) -> Tensor | None:
            return None if x is None or y is None else torch.cat([x, y], dim=axis)

        return Gradients(
            torch.cat([self.x, other.x], dim=1),
            cond=side_by_side(self.cond_rows(), other.cond_rows()),
            film=side_by_side(self.film, other.film),
            features=side_by_side(self.features, other.features),
            sums=None if self.sums is None or other.sums is None else self.sums.plus(other.sums),
        )

    def cond_rows(self) -> Tensor | None:
        """`cond` summed over samples, [E, B, HP[0]]."""
        if self.cond is None or self.cond.shape[1] == self.x.shape[1]:
            return self.cond
        return self.cond.unflatten(1, (self.x.shape[1], -1)).sum(2)


def backward(
    grad: Tensor,
    grad_path: Tensor | None,
    path: Tensor,
    stages: Tensor,
    error: Tensor | None,
    times: tuple[Tensor, Tensor] | tuple[float, float],
    inputs: Prepared,
    packed: Packed,
    fields: Sequence[Parameters],
    saved: Saved | None,
    shape: tuple[int, int, int, int],
    num_steps: int,
    method: str,
    needs_cond: bool,
    needs_weights: bool,
    needs_noise: bool,
    net: plan.Network,
) -> Gradients:
    """Gradients of a walk (grad [E, B, S, D] of x_K), or with `error` of a loss (grad [E, B, S] of its rows).

    `saved` holds the activations of every evaluation; None computes them again. With `needs_weights` activations and
    their gradients are written out for the weight gradients' products, in parts of as many evaluations as
    `plan.STORE_BYTES` allows. `fields` are whose `packed` are.
    """
    e, b, s, d = shape
    m, mp = b * s, plan.padded_rows(b * s)
    v, shared = plan.evaluations(method), not isinstance(times[0], Tensor)
    n_v, dtype, total = num_steps * v, product_dtype(net), sum(net.padded)
    fold, film = net.fold, net.norm == "film"
    part = plan.backward_part(net, e, mp, n_v, v, saved is not None) if needs_weights else n_v

    def empty(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return grad.new_empty(sizes, dtype=dtype)

    def zeros(*sizes: int) -> Tensor:
        # Nothing is launched for nothing.
        return (grad.new_zeros if all(sizes) else grad.new_empty)(sizes, dtype=torch.float32)

    rows = (part if needs_weights else 1) * mp  # per member, of what one launch writes
    arch, sms = target(grad.device)
    tiles = plan.choose("backward", arch, sms, net, e * mp)
    blocks = triton.cdiv(mp, tiles.rows)
    work = Saved.empty(grad, e, rows, net) if saved is None else saved
    y = turns(grad, e, mp, net) if fold and saved is None else work.out
    h = empty(e * mp * max(net.padded)) if fold else empty(e * mp * total, dtype=torch.float32)
    dpre = empty(e * rows * total)
    xhat = empty(e * rows * total if fold and needs_weights else 0)
    dfilm = empty(e * rows * 2 * total if film and needs_weights else 0)
    dv = empty(e, rows if needs_weights else 0, net.state_padded, dtype=torch.float32)
    state = empty(e, rows if needs_weights else 0, net.features_padded)
    features = empty(e, rows if needs_weights and not shared else 0, net.time_padded)
    needs_inputs = needs_cond or needs_weights
    dcond = zeros(e, mp, net.padded[0]) if needs_inputs and net.cond_dim and not film else zeros(0)
    dcond_film = zeros(e, mp, 2 * total) if needs_inputs and film else zeros(0)
    affine = not fold and net.norm in ("after", "before")
    dnorm = zeros(2, blocks, e, total) if needs_weights and affine else zeros(0)
    dnoise = empty(num_steps, e, b, s, d, dtype=torch.float32) if needs_noise else zeros(0)
    sums = _WeightSums(net, fields, inputs, shared, (m, mp)) if needs_weights else None
    g = grad.contiguous()
    for i_high in range(n_v, 0, -part):
        i_low = max(0, i_high - part)
        dx = empty(e, b, s, d, dtype=torch.float32)
        backward_kernel[(blocks, e)](
            g,
            g if grad_path is None else grad_path.contiguous(),
            path,
            stages,
            g if error is None else error,
            *((g, g) if shared else (t.contiguous() for t in times)),
            *inputs.pointers(g),
            *packed,
            work.pre,
            work.stats,
            y,
            partial_sums(grad, e, mp, net),
            h,
            dpre,
            xhat,
            dfilm,
            dcond,
            dcond_film,
            dnorm,
            dv,
            state,
            features,
            dx,
            dnoise,
            m,
            mp,
            s,
            num_steps,
            *(times if shared else (0.0, 0.0)),
            *inputs.film_strides(),
            *scalars(net),
            i_low,
            i_high - i_low,
            work.rows,
            rows,
            NET=net_shape(net, shared, tiles),
            V=v,
            METHOD=method,
            LOSS=error is not None,
            PATH=grad_path is not None,
            NOISE=needs_noise,
            RECOMPUTE=saved is None,
            WEIGHTS=needs_weights,
            DCOND=needs_inputs,
            **options(tiles),
        )
        g = dx
        if sums is not None:
            outputs = _Rows(xhat, rows, 0) if fold else _Rows(work.out, work.rows, 0 if saved is None else i_low * mp)
            sums.add(i_low, i_high, outputs, _Rows(dpre, rows, 0), _Rows(dfilm, rows, 0), dv, state, features)
    found = Gradients(g, dnoise if needs_noise else None)
    if needs_inputs and net.cond_dim and not film:
        found.cond = dcond[:, :m]
    if needs_inputs and film:
        per_row = dcond_film[:, :m].unflatten(1, (b, s))
        found.film = per_row.sum(2) if s > 1 else per_row.squeeze(2)
    if sums is not None:
        sums.finish(found, dnorm)
    return found


@dataclass
class _Rows:
    """A workspace of `rows` rows per member, of which those from `first` on count."""

    buffer: Tensor
    rows: int
    first: int

    def layer(self, i: int, e: int, count: int, net: plan.Network, copies: int = 1) -> Tensor:
        """Layer i's share, [E, count, copies * HP[i]]."""
        return self.layers(i, i + 1, e, count, net, copies)

    def layers(self, low: int, high: int, e: int, count: int, net: plan.Network, copies: int = 1) -> Tensor:
        """The shares of layers low..high-1, all of one width, [layers E, count, copies * HP[low]]."""
        width = copies * net.padded[low]
        start, size = e * self.rows * copies * net.offsets[low], (high - low) * e * self.rows * width
        block = self.buffer[start : start + size].view(-1, self.rows, width)
        return block[:, self.first : self.first + count]


class _WeightSums:
    """The products that reduce over rows, summed over the parts of a walk.

    They run over the padding as well: gradients are zero there. There are no atomics: the same inputs give the same
    bits. Layers of one width, each behind the one before, are one batch of matrices.
    """

    def __init__(
        self,
        net: plan.Network,
        fields: Sequence[Parameters],
        inputs: Prepared,
        shared: bool,
        rows: tuple[int, int],
    ) -> None:
        self.net, self.fields, self.inputs, self.shared, self.rows = net, fields, inputs, shared, rows
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.parts: dict[str, list[Tensor]] = {"time": [], "film_time": []}
        pre = inputs.features_pre
        self.features = None if pre is None else pre.new_empty((*pre.shape[:2], net.time_features))
        # Runs of layers that are taken at once.
        own = [range(i, i + 1) for i in range(1, net.layers)]
        self.runs = ([range(1, net.layers)] if net.layers > 1 else []) if net.roll else own

    def _sum(self, name: str, i: int, value: Tensor) -> None:
        self.sums[name, i] = self.sums[name, i] + value if (name, i) in self.sums else value

    def add(
        self,
        i_low: int,
        i_high: int,
        outputs: _Rows,
        dpre: _Rows,
        dfilm: _Rows,
        dv: Tensor,
        state: Tensor,
        features: Tensor,
    ) -> None:
        """One part: evaluations i_low..i_high-1, in rows (evaluation, row)."""
        net, (_, mp) = self.net, self.rows
        e, count = dv.shape[0], (i_high - i_low) * mp
        dv, state, features = dv[:, :count], state[:, :count], features[:, :count]
        if self.features is not None:
            self._features_bwd(i_low, i_high, e, dfilm if net.norm == "film" else dpre)
        with exact_products(net.precision):
            d = dpre.layer(0, e, count, net)
            if net.state_features:
                self._sum("state", 0, batched_product(state.mT, d))
            else:
                self.sums["state", 0] = d.new_empty((e, net.features_padded, d.shape[2]), dtype=torch.float32)
            if self.shared:
                self.parts["time"].insert(0, d.unflatten(1, (-1, mp)).sum(2, dtype=torch.float32))
            elif net.norm != "film":
                self._sum("time", 0, batched_product(features.mT, d))
            if not self.shared and not net.roll:
                self._sum("b", 0, d.sum(1, dtype=torch.float32))
            for run in self.runs:
                d = dpre.layers(run.start, run.stop, e, count, net)
                x = [outputs.layers(j, j + len(run), e, count, net).mT for j in net.inputs[run.start]]
                products = [batched_product(part, d) for part in x]
                self._sum("w", run.start, products[0] if len(products) == 1 else torch.cat(products, dim=1))
                if self.shared or not net.roll:
                    self._sum("b", run.start, d.sum(1, dtype=torch.float32))
            if not self.shared and net.roll:
                self._sum("b", 0, dpre.layers(0, net.layers, e, count, net).sum(1, dtype=torch.float32))
            last = outputs.layer(net.layers - 1, e, count, net)
            self._sum("w", net.layers, batched_product(last.mT, dv.to(last.dtype)))
            self._sum("b", net.layers, dv.sum(1))
            if net.norm == "film":
                per_step = []
                for i in range(net.layers):
                    d = dfilm.layer(i, e, count, net, copies=2)
                    if self.shared:
                        per_step.append(d.unflatten(1, (-1, mp)).sum(2, dtype=torch.float32))
                    else:
                        self._sum("film", i, batched_product(features.mT, d))
                if self.shared:
                    self.parts["film_time"].insert(0, torch.cat(per_step, dim=-1))

    def _features_bwd(self, i_low: int, i_high: int, e: int, d: _Rows) -> None:
        """On to what the last activation in front of the time features took."""
        net, (m, mp), pre = self.net, self.rows, self.inputs.features_pre
        assert self.features is not None and pre is not None
        rows, first = slice(i_low * m, i_high * m), 0
        for field in self.fields:
            part = slice(first, first + field.layers[0][0].shape[0])
            inputs = field.films if net.norm == "film" else field.layers[:1]
            dense_bwd(
                d.buffer,
                inputs,
                self.features[part, rows],
                net.precision,
                net.activation,
                pre=pre[part, rows],
                of=Rows(first, e, m, mp, d.rows),
                **time_rows(inputs, net),
            )
            first = part.stop

    def finish(self, found: Gradients, dnorm: Tensor) -> None:
        """Writes the sums into `found`."""
        net, sums = self.net, self.sums

        def joined(name: str, axis: int) -> Tensor | None:
            parts = self.parts[name]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis) if parts else None

        e = sums["state", 0].shape[0]
        found.film_time, found.features = joined("film_time", 1), self.features
        w = [each for run in self.runs for each in sums["w", run.start].split(e)]
        if self.shared or not net.roll:
            b = [each for run in self.runs for each in sums["b", run.start].split(e)]
        else:
            b = list(sums["b", 0].split(e)[1:])
        table = joined("time", 1) if self.shared else sums["b", 0][:e, None]
        assert table is not None
        found.sums = Sums(
            [*w, sums["w", net.layers]],
            [*b, sums["b", net.layers]],
            sums["state", 0],
            table,
            sums.get(("time", 0)),
            [sums["film", i] for i in range(net.layers)] if ("film", 0) in sums else [],
            dnorm.sum(1) if dnorm.numel() else None,
        )
