"""What a launch hands to a kernel: packed weights, inputs prepared outside, workspaces, constexpr arguments."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import plan
from .fold import fold_network_kernel
from .launch import arith

Pairs = Sequence[tuple[Tensor, Tensor]]


class Parameters(NamedTuple):
    """One field's parameters by what they do, as (weight, bias) or (scale, shift), every tensor with its E axis."""

    layers: Pairs  # hidden layers and head; rows of the first: cond, state, time, or the state alone with FiLM
    norms: Pairs
    time: Pairs  # the MLP behind the time embedding
    encoder: Pairs  # FiLM: the MLP that cond goes through
    films: Pairs  # FiLM: [encoded cond, time features] -> [scale, shift] of every hidden layer


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
    """What does not depend on the state, computed once per call; None where there is no such part, or no use of it."""

    cond: Tensor | None  # [E, B, HP[0]] cond's share of the first layer
    time: Tensor | None  # [E, N, HP[0]] float32: bias and time's share at every evaluation; N = 1: the bias alone
    features: Tensor | None  # [N, E, B S, TP] time features of every row where the kernels do not embed times
    film: Tensor | None  # [E, B or 1, 2 sum HP] cond's share of FiLM, bias included
    # Time's share of FiLM at every evaluation, [E, N, 2 sum HP] float32; or all of FiLM, [E, N, B S, 2 sum HP].
    film_time: Tensor | None
    # [E, N B S, T] what the last activation in front of `features` took, for the way back: no kernel reads it.
    features_pre: Tensor | None = None

    def pointers(self, unused: Tensor) -> tuple[Tensor, ...]:
        """In the kernels' order, `unused` for what is not there."""
        return tuple(unused if x is None else x for x in self[:-1])

    def rows(self, rows: slice, samples: int) -> Prepared:
        """What belongs to some rows of cond, where the rows have times of their own."""
        some = slice(rows.start * samples, rows.stop * samples)
        return self._replace(
            cond=None if self.cond is None else self.cond[:, rows].contiguous(),
            features=None if self.features is None else self.features[:, :, some].contiguous(),
            film=self.film if self.film is None or self.film.shape[1] == 1 else self.film[:, rows],
            film_time=None if self.film_time is None else self.film_time[:, :, some].contiguous(),
            features_pre=None if self.features_pre is None else self.features_pre[:, some],
        )

    def film_strides(self) -> tuple[int, int]:
        """Elements between members and between rows of `film`."""
        if self.film is None:
            return 0, 0
        return self.film.stride(0), 0 if self.film.shape[1] == 1 else self.film.stride(1)


def with_members(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Parameters with an E axis, contiguous: a network without an ensemble is one member."""
    return [(p.unsqueeze(0) if parameters[0].dim() == 2 else p).contiguous() for p in parameters]


def of_field(x: Tensor, first: int, members: int, axis: int = 0) -> Tensor:
    """A field's members of a tensor whose `axis` is E of all fields, or 1."""
    return x if x.shape[axis] == 1 else x.narrow(axis, first, members)


def stored_as(precision: str) -> torch.dtype:
    """What the operands of products at this precision are rounded to."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def product_dtype(net: plan.Network) -> torch.dtype:
    """What the operands of the matrix products are stored as."""
    return stored_as(net.precision)


def pack(fields: Sequence[Parameters], shared: bool, net: plan.Network) -> Packed:
    """Pack several fields of one network, every tensor contiguous, their members one behind the other, in one launch
    each. `shared`: all rows share their times, so nothing is multiplied with time features."""
    like = fields[0].layers[0][0]
    e = sum(field.layers[0][0].shape[0] for field in fields)
    dtype, fp, tp, dp = product_dtype(net), net.features_padded, net.time_padded, net.state_padded
    hp, total, film = net.padded, sum(net.padded), net.norm == "film"
    norms = not net.fold and net.norm in ("after", "before")

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=like.device, dtype=dtype)

    packed = Packed(
        w_feat=empty(e, fp, hp[0], dtype=dtype),
        w_time=empty(0 if shared or film else e, tp, hp[0], dtype=dtype),
        w_film=empty(e * tp * 2 * total if _multiplies_films(shared, net) else 0, dtype=dtype),
        w_hidden=empty(e * (net.weight_offsets[-1] + net.inputs_padded[-1] * hp[-1]), dtype=dtype),
        b_hidden=empty(e * total),
        scale=empty(e * total if norms else 0),
        shift=empty(e * total if norms else 0),
        w_out=empty(e, hp[-1], dp),
        b_out=empty(e, dp),
    )
    i_e = 0
    for field in fields:
        _fold_network(field, packed, i_e, e, shared, net)
        i_e += field.layers[0][0].shape[0]
    return packed


def _multiplies_films(shared: bool, net: plan.Network) -> bool:
    """Whether a kernel multiplies time features with FiLM's weights."""
    return net.norm == "film" and net.time_embedding != "rows" and not shared


def _fold_network(field: Parameters, packed: Packed, first: int, members: int, shared: bool, net: plan.Network) -> None:
    """All layers of a field into its members' places, in one launch."""
    film = net.norm == "film"
    weight = field.layers[0][0]
    behind = 0 if film else net.cond_dim  # the state's rows are behind these
    pairs = field.layers[1:]
    normed = net.norm in ("after", "before")
    norms = field.norms if normed else pairs
    multiplied = _multiplies_films(shared, net)
    films = [w for w, _ in field.films] if multiplied else [weight]
    columns = 32
    blocks = max(-(-width // columns) for width in (*net.padded, net.state_padded))
    fold_network_kernel[(blocks, net.layers + 1, weight.shape[0])](
        weight,
        tuple(w for w, _ in pairs),
        tuple(b for _, b in pairs),
        tuple(scale for scale, _ in norms),
        tuple(shift for _, shift in norms),
        tuple(films),
        *packed,
        weight.stride(0),
        first,
        members,
        C=behind,
        NET=net_shape(net, shared, plan.Tiles(32, 32, 4, 1)),
        **input_rows(net),
        NORM=("fold" if net.fold else "keep") if normed else "none",
        TIME=not shared and not film,
        FILM=films[0].shape[1] if multiplied else 0,
        BI=64,
        BN=columns,
        num_warps=4,
        enable_fp_fusion=True,
    )


@functools.lru_cache(maxsize=1024)
def input_rows(net: plan.Network) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Of every hidden layer and input: rows of its weights before those of the input, as they are and padded."""

    def before(widths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        return tuple((0, *itertools.accumulate(widths[j] for j in into))[:-1] for into in net.inputs)

    return {"ROW": before(net.hidden), "ROW_P": before(net.padded)}


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
