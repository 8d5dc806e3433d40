"""What a launch hands to a kernel: packed weights, inputs prepared outside, workspaces, constexpr arguments."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import plan
from .fold import fold, fold_network_kernel
from .launch import arith

Pairs = Sequence[tuple[Tensor, Tensor]]


class Weights(NamedTuple):
    """One field's share of what kernels multiply with, every tensor with its E axis."""

    layers: Pairs  # hidden layers and head; of the first only the state's rows count
    norms: Pairs
    state: Tensor  # [E, F, H[0]] the first layer's rows of the state features
    time: Tensor | None  # [E, T, H[0]] of the time features, where rows have times of their own
    films: Sequence[Tensor]  # [E, T, 2 H[l]] FiLM's rows of the time features, likewise


class Packed(NamedTuple):
    """The weights of all members as the kernels read them; lives for one call. See `network_fwd`."""

    w_feat: Tensor
    w_time: Tensor
    w_film: Tensor
    w_hidden: Tensor
    b_hidden: Tensor
    scale: Tensor
    shift: Tensor
    w_out: Tensor
    b_out: Tensor


class Prepared(NamedTuple):
    """What does not depend on the state, computed once per call by plain products."""

    cond: Tensor | None  # [E, B, HP[0]] cond's share of the first layer
    time: Tensor  # [E, N, HP[0]] float32: bias and time's share at every evaluation; N = 1: the bias alone
    features: Tensor | None  # [N, E, B S, TP] time features of every row where they come through an MLP
    film: Tensor | None  # [E, B or 1, 2 sum HP] cond's share of FiLM, bias included
    film_time: Tensor | None  # [E, N, 2 sum HP] float32: time's share of FiLM at every evaluation

    def pointers(self, unused: Tensor) -> tuple[Tensor, ...]:
        """In the kernels' order, `unused` for what is not there."""
        return tuple(unused if x is None else x for x in self)

    def rows(self, rows: slice, samples: int) -> Prepared:
        """What belongs to some rows of cond, where the rows have times of their own."""
        some = slice(rows.start * samples, rows.stop * samples)
        return self._replace(
            cond=None if self.cond is None else self.cond[:, rows].contiguous(),
            features=None if self.features is None else self.features[:, :, some].contiguous(),
            film=self.film if self.film is None or self.film.shape[1] == 1 else self.film[:, rows],
        )

    def film_strides(self) -> tuple[int, int]:
        """Elements between members and between rows of `film`."""
        if self.film is None:
            return 0, 0
        return self.film.stride(0), 0 if self.film.shape[1] == 1 else self.film.stride(1)


def product_dtype(net: plan.Network) -> torch.dtype:
    """What the operands of the matrix products are stored as."""
    return torch.bfloat16 if net.precision == "bf16" else torch.float32


def pad_last(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """x as dtype, its last axis filled with zeros up to `width`."""
    return F.pad(x.to(dtype), (0, width - x.shape[-1])).contiguous()


def pad_layers(parts: Sequence[Tensor], net: plan.Network, copies: int, dtype: torch.dtype) -> Tensor:
    """Per-layer tensors [..., copies * H[l]] side by side, each of the copies padded: [..., copies * sum HP]."""
    out = []
    for part, h, hp in zip(parts, net.hidden, net.padded, strict=True):
        out.append(F.pad(part.to(dtype).unflatten(-1, (copies, h)), (0, hp - h)).flatten(-2))
    return torch.cat(out, dim=-1)


def unpad_layers(x: Tensor, net: plan.Network, copies: int) -> list[Tensor]:
    """The way back of `pad_layers`."""
    parts = x.split([copies * hp for hp in net.padded], dim=-1)
    return [
        part.unflatten(-1, (copies, hp))[..., :h].flatten(-2)
        for part, h, hp in zip(parts, net.hidden, net.padded, strict=True)
    ]


def pack(fields: Sequence[Weights], net: plan.Network) -> Packed:
    """Pack several fields of one network, their members one behind the other."""
    like = fields[0].state
    e = sum(field.state.shape[0] for field in fields)
    dtype, fp, tp, dp = product_dtype(net), net.features_padded, net.time_padded, net.state_padded
    hp, total = net.padded, sum(net.padded)
    per_row = fields[0].time is not None or len(fields[0].films) > 0

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=like.device, dtype=dtype)

    norms = not net.fold and net.norm in ("after", "before")
    packed = Packed(
        w_feat=empty(e, fp, hp[0], dtype=dtype),
        w_time=empty(e, tp, hp[0], dtype=dtype) if fields[0].time is not None else empty(0, dtype=dtype),
        w_film=empty(e * tp * 2 * total, dtype=dtype) if per_row and net.norm == "film" else empty(0, dtype=dtype),
        w_hidden=empty(e * (net.weight_offsets[-1] + net.inputs_padded[-1] * hp[-1]), dtype=dtype),
        b_hidden=empty(e * total),
        scale=empty(e * total if norms else 0),
        shift=empty(e * total if norms else 0),
        w_out=empty(e, hp[-1], dp),
        b_out=empty(e, dp),
    )

    def layer(x: Tensor, offset: int, *shape: int) -> Tensor:
        """Layer's block [E, *shape] of a flat buffer."""
        size = math.prod(shape)
        return x[e * offset : e * (offset + size)].view(e, *shape)

    if net.fold:
        i_e = 0
        for field in fields:
            _fold_network(field, packed, i_e, e, net)
            i_e += field.state.shape[0]
        return packed
    i_e = 0
    for field in fields:
        part = slice(i_e, i_e + field.state.shape[0])
        i_e = part.stop
        fold(field.state, None, packed.w_feat[part], None)
        if field.time is not None:
            fold(field.time, None, packed.w_time[part], None)
        for off, h, h_p, film in zip(net.offsets, net.hidden, hp, field.films, strict=bool(field.films)):
            block = layer(packed.w_film, off * tp * 2, tp, 2 * h_p)[part]
            # Two halves, scale and shift, each with its own padding.
            padded = F.pad(film.unflatten(-1, (2, h)), (0, h_p - h)).flatten(-2)
            fold(padded, None, block, None)
        for i in range(1, net.layers + 1):
            w, b = field.layers[i]
            if i == net.layers:
                fold(w, b, packed.w_out[part], packed.b_out[part])
                continue
            block = layer(packed.w_hidden, net.weight_offsets[i], net.inputs_padded[i], hp[i])[part]
            bias = layer(packed.b_hidden, net.offsets[i], hp[i])[part]
            row = row_p = 0
            for j in net.inputs[i]:
                rows = w[:, row : row + net.hidden[j]]
                out = block[:, row_p : row_p + hp[j]]
                fold(rows, b if row == 0 else None, out, bias if row == 0 else None)
                row, row_p = row + net.hidden[j], row_p + hp[j]
        if norms:
            for (scale, shift), off, h_p in zip(field.norms, net.offsets, hp, strict=True):
                layer(packed.scale, off, h_p)[part] = pad_last(scale, h_p, torch.float32)
                layer(packed.shift, off, h_p)[part] = pad_last(shift, h_p, torch.float32)
    return packed


def _fold_network(field: Weights, packed: Packed, first: int, members: int, net: plan.Network) -> None:
    """All layers of a field into its members' places, in one launch."""
    state, time = (
        x if x.stride()[1:] == (net.hidden[0], 1) else x.contiguous()
        for x in (field.state, field.state if field.time is None else field.time)
    )
    pairs = [(w.contiguous(), b.contiguous()) for w, b in field.layers[1:]]
    norms = [(s.contiguous(), t.contiguous()) for s, t in field.norms] if net.norm == "after" else pairs
    columns = 32
    blocks = max(-(-width // columns) for width in (*net.padded, net.state_padded))
    fold_network_kernel[(blocks, net.layers + 1, state.shape[0])](
        state,
        time,
        tuple(w for w, _ in pairs),
        tuple(b for _, b in pairs),
        tuple(scale for scale, _ in norms),
        tuple(shift for _, shift in norms),
        packed.w_feat,
        packed.w_time,
        packed.w_hidden,
        packed.b_hidden,
        packed.w_out,
        packed.b_out,
        state.stride(0),
        time.stride(0),
        first,
        members,
        NET=net_shape(net, field.time is None, plan.Tiles(32, 32, 4, 1)),
        NORM=net.norm == "after",
        TIME=field.time is not None,
        BI=64,
        BN=columns,
        num_warps=4,
    )


@dataclass
class Saved:
    """Workspaces of R rows per member: pre-activations, outputs, statistics; see kernels/network.py."""

    pre: Tensor
    out: Tensor
    stats: Tensor
    rows: int

    @staticmethod
    def sizes(e: int, rows: int, net: plan.Network) -> tuple[int, int, int]:
        """Elements of the three. With FOLD outputs are not kept: they follow from the pre-activations."""
        total = e * rows * sum(net.padded)
        return total, 0 if net.fold else total, 0 if net.norm == "none" else 2 * net.layers * e * rows

    @classmethod
    def empty(cls, like: Tensor, e: int, rows: int, net: plan.Network) -> Saved:
        pre, out, stats = cls.sizes(e, rows, net)
        dtype = product_dtype(net)
        return cls(
            like.new_empty(pre, dtype=dtype),
            like.new_empty(out, dtype=dtype),
            like.new_empty(stats, dtype=torch.float32),
            rows,
        )


def turns(like: Tensor, e: int, mp: int, net: plan.Network) -> Tensor:
    """Workspace for outputs that nobody keeps: with FOLD two layers take turns."""
    width = 2 * max(net.padded) if net.fold else sum(net.padded)
    return like.new_empty(e * mp * width, dtype=product_dtype(net))


def partial_sums(like: Tensor, e: int, mp: int, net: plan.Network) -> Tensor:
    """Workspace for layers with two inputs."""
    two = any(len(into) > 1 for into in net.inputs)
    return like.new_empty(e * mp * max(net.padded) if two else 0, dtype=torch.float32)


def scalars(net: plan.Network) -> tuple[float, ...]:
    """low, high, std, eps, output_scale: the run-time numbers that every kernel takes from the network."""
    return net.low, net.high, net.std, net.eps, net.output_scale


class Shape(NamedTuple):
    """All of a network, a launch's tiles and arithmetic that is fixed when a kernel is compiled."""

    D: int
    DP: int
    F: int
    FP: int
    T: int
    TP: int
    H: tuple[int, ...]  # width of each hidden layer
    HP: tuple[int, ...]
    KP: tuple[int, ...]  # padded rows of its weights
    OFF: tuple[int, ...]  # padded widths before it
    OFF_Y: tuple[int, ...]  # the same in the workspace of outputs that nobody keeps
    OFF_W: tuple[int, ...]  # padded weights before its own
    IN: tuple[tuple[int, ...], ...]  # layers whose outputs it takes
    FRESH: tuple[tuple[bool, ...], ...]  # walking back: whether an input has no gradient from another layer yet
    RES: int  # layers per residual block
    L: int
    COND: bool
    TABLE: bool  # all rows share their times: time's share comes from a table
    TIME: str
    EMBED: str
    PREDICTION: str
    ACT: str
    NORM: str
    FOLD: bool
    ROLL: bool
    PRECISION: str
    ARITH: str
    BM: int  # rows of a program
    BN: int  # columns of a product
    STAGES: int  # of the weights' pipeline


# Every launch asks: computed anew it would take longer than a small kernel.
@functools.lru_cache(maxsize=1024)
def net_shape(net: plan.Network, shared_times: bool, tiles: plan.Tiles) -> Shape:
    """The constexpr argument NET of every kernel."""
    width = max(net.padded)
    return Shape(
        D=net.state_dim,
        DP=net.state_padded,
        F=net.state_features,
        FP=net.features_padded,
        T=net.time_features,
        TP=net.time_padded,
        H=net.hidden,
        HP=net.padded,
        KP=net.inputs_padded,
        OFF=net.offsets,
        OFF_Y=tuple(width * (i % 2) for i in range(net.layers)) if net.fold else net.offsets,
        OFF_W=net.weight_offsets,
        IN=net.inputs,
        FRESH=net.fresh,
        RES=net.residual,
        L=net.layers,
        COND=net.cond_dim > 0,
        TABLE=shared_times,
        TIME=net.time_embedding,
        EMBED="hl_gauss_smooth" if net.smooth else net.state_embedding,
        PREDICTION=net.prediction,
        ACT=net.activation,
        NORM=net.norm,
        FOLD=net.fold,
        ROLL=net.roll,
        PRECISION="tf32" if net.precision == "tf32" else "ieee",
        ARITH=arith(product_dtype(net)),
        BM=tiles.rows,
        BN=tiles.columns,
        STAGES=tiles.num_stages,
    )


def options(tiles: plan.Tiles) -> dict[str, Any]:
    """The compiler's options of every launch."""
    # Triton changes its default for the contraction of a * b + c from 3.10 on.
    return dict(num_warps=tiles.num_warps, enable_fp_fusion=True)
