"""The one description of a velocity network that every layer shares, and the module that holds its parameters.

A field v(x_t, t, cond) is a plain MLP: [cond, state embedding of x_t, time embedding of t] -> (Dense -> activation ->
optional LayerNorm) per hidden width -> Dense(state_dim). With an ensemble every parameter carries a leading E axis.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from fastflow import reference

ACTIVATIONS = ("gelu_tanh", "silu", "relu")
NORMS = ("layer", None)


@dataclass(frozen=True)
class Identity:
    """State embedding: x itself, D features."""

    def width(self, state_dim: int) -> int:
        return state_dim

    def features(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Scaled:
    """State embedding: (x - low) / (high - low), D features (floq with `use_prob_embed=False`)."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_range(self, self.low, self.high)

    def width(self, state_dim: int) -> int:
        return state_dim

    def features(self, x: Tensor) -> Tensor:
        return (x - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class HLGauss:
    """State embedding of a scalar: the mass that a Gaussian around x puts in each of `bins - 1` intervals (floq,
    section 4).

    `bins` edges e_i lie evenly in [low, high]; the Gaussian's standard deviation is `sigma` edge spacings; the masses
    are normalised to sum 1. x is clamped to three standard deviations outside the range, where the normaliser is still
    well conditioned in float32: further out the published formula is 0/0.
    """

    low: float
    high: float
    bins: int = 51
    sigma: float = 16.0

    def __post_init__(self) -> None:
        _check_range(self, self.low, self.high)
        if self.bins < 2:
            raise ValueError(f"HLGauss: bins must be at least 2 (edges of at least one interval), got {self.bins}")
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"HLGauss: sigma must be a positive number of edge spacings, got {self.sigma}")

    def width(self, state_dim: int) -> int:
        if state_dim != 1:
            raise ValueError(f"HLGauss embeds a scalar: state_dim must be 1, got {state_dim}")
        return self.bins - 1

    def features(self, x: Tensor) -> Tensor:
        return reference.hl_gauss(x, self.low, self.high, self.bins, self.sigma)


@dataclass(frozen=True)
class RawTime:
    """Time embedding: t, one feature (FQL)."""

    def width(self) -> int:
        return 1

    def features(self, t: Tensor) -> Tensor:
        return t.unsqueeze(-1)


@dataclass(frozen=True)
class Cosine:
    """Time embedding: cos(t), one feature (floq as released)."""

    def width(self) -> int:
        return 1

    def features(self, t: Tensor) -> Tensor:
        return torch.cos(t).unsqueeze(-1)


@dataclass(frozen=True)
class CosineFourier:
    """Time embedding: cos(i pi t) for i = 1..dim (floq as written in the paper)."""

    dim: int = 64

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"CosineFourier: dim must be at least 1, got {self.dim}")

    def width(self) -> int:
        return self.dim

    def features(self, t: Tensor) -> Tensor:
        return reference.cosine_fourier(t, self.dim)


StateEmbedding = Identity | Scaled | HLGauss
TimeEmbedding = RawTime | Cosine | CosineFourier


def _check_range(embedding: object, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{type(embedding).__name__}: expected finite low < high, got low={low}, high={high}")


@dataclass(frozen=True)
class FieldSpec:
    """Everything that fixes a velocity network except its weights. Hashable; equal specs are the same network.

    Args:
        state_dim: D, width of the flow state x.
        cond_dim: C, width of what the field is conditioned on (observation, action ...); 0 for none.
        hidden: width of each hidden layer.
        ensemble: E, number of networks side by side; None for one network whose tensors have no E axis.
        activation: "gelu_tanh" (the tanh form, flax's default), "silu" or "relu".
        norm: "layer" for LayerNorm after each activation (floq's order), None for none.
        state_embedding: `Identity()`, `Scaled(low, high)` or `HLGauss(low, high, bins, sigma)`.
        time_embedding: `RawTime()`, `Cosine()` or `CosineFourier(dim)`.
        norm_eps: added to the variance of LayerNorm (flax: 1e-6).

    Raises:
        ValueError: a size, name or combination that describes no network.
        TypeError: an embedding or a size of another type.
    """

    state_dim: int
    cond_dim: int
    hidden: tuple[int, ...] = (512, 512, 512, 512)
    ensemble: int | None = None
    activation: str = "gelu_tanh"
    norm: str | None = None
    state_embedding: StateEmbedding = Identity()
    time_embedding: TimeEmbedding = RawTime()
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for name, value, least in (
            ("state_dim", self.state_dim, 1),
            ("cond_dim", self.cond_dim, 0),
            *((f"hidden[{i}]", width, 1) for i, width in enumerate(self.hidden)),
            *((("ensemble", self.ensemble, 1),) if self.ensemble is not None else ()),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"FieldSpec: {name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"FieldSpec: {name} must be at least {least}, got {value}")
        if not self.hidden:
            raise ValueError("FieldSpec: hidden must name at least one layer width, got ()")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"FieldSpec: activation must be one of {ACTIVATIONS}, got {self.activation!r}")
        if self.norm not in NORMS:
            raise ValueError(f"FieldSpec: norm must be one of {NORMS}, got {self.norm!r}")
        if not isinstance(self.state_embedding, (Identity, Scaled, HLGauss)):
            raise TypeError(
                f"FieldSpec: state_embedding must be Identity, Scaled or HLGauss, got {self.state_embedding!r}"
            )
        if not isinstance(self.time_embedding, (RawTime, Cosine, CosineFourier)):
            raise TypeError(
                f"FieldSpec: time_embedding must be RawTime, Cosine or CosineFourier, got {self.time_embedding!r}"
            )
        self.state_embedding.width(self.state_dim)  # refuses what it cannot embed

    @property
    def state_features(self) -> int:
        """Number of features the state embedding gives the first layer."""
        return self.state_embedding.width(self.state_dim)

    @property
    def time_features(self) -> int:
        """Number of features the time embedding gives the first layer."""
        return self.time_embedding.width()

    @property
    def layer_sizes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of every Dense layer, head included. The first layer's rows are ordered cond, state, time."""
        widths = (self.cond_dim + self.state_features + self.time_features, *self.hidden, self.state_dim)
        return tuple(zip(widths[:-1], widths[1:], strict=True))

    @functools.cached_property
    def key(self) -> str:
        """A string that `FieldSpec.from_key` turns back into this spec: so a spec passes through a torch operator."""
        return repr(tuple(_plain(getattr(self, f.name)) for f in fields(self)))

    @staticmethod
    def from_key(key: str) -> FieldSpec:
        """The spec whose `key` this is."""
        return _spec_from_key(key)


def _plain(value: object) -> object:
    """An embedding as (class name, field values ...), anything else as it is."""
    if isinstance(value, (Identity, Scaled, HLGauss, RawTime, Cosine, CosineFourier)):
        return (type(value).__name__, *(getattr(value, f.name) for f in fields(value)))
    return value


@functools.lru_cache(maxsize=256)
def _spec_from_key(key: str) -> FieldSpec:
    embeddings = {c.__name__: c for c in (Identity, Scaled, HLGauss, RawTime, Cosine, CosineFourier)}
    values = dict(zip([f.name for f in fields(FieldSpec)], ast.literal_eval(key), strict=True))
    for name in ("state_embedding", "time_embedding"):
        kind, *arguments = values[name]
        values[name] = embeddings[kind](*arguments)
    return FieldSpec(**values)


class Dense(nn.Module):
    """y = x @ weight + bias, `weight` [in, out] or [E, in, out], `bias` [out] or [E, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ensemble: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        lead = () if ensemble is None else (ensemble,)
        self.weight = nn.Parameter(torch.empty(*lead, in_features, out_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(*lead, out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Glorot-uniform weights per member, zero biases (flax's variance_scaling(1, fan_avg, uniform))."""
        bound = math.sqrt(6.0 / (self.weight.shape[-2] + self.weight.shape[-1]))
        with torch.no_grad():
            self.weight.uniform_(-bound, bound, generator=generator)
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return reference.dense(x, self.weight, self.bias)


class LayerNormAffine(nn.Module):
    """The scale `weight` and shift `bias` of one LayerNorm, [H] or [E, H]."""

    def __init__(
        self,
        width: int,
        ensemble: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        lead = () if ensemble is None else (ensemble,)
        self.weight = nn.Parameter(torch.empty(*lead, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(*lead, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Scale one, shift zero."""
        with torch.no_grad():
            self.weight.fill_(1.0)
            self.bias.zero_()


class DenseStack(nn.Module):
    """The trunk that velocity fields, policies and value networks share: Dense -> activation -> optional LayerNorm,
    then Dense.

    Args:
        sizes: (in, out) of every Dense layer, head last.
        ensemble: E or None.
        norm: "layer" or None.

    Parameters are `layers.{i}.weight`, `layers.{i}.bias` and, with LayerNorm, `norms.{i}.weight`, `norms.{i}.bias`.
    """

    def __init__(
        self,
        sizes: tuple[tuple[int, int], ...],
        ensemble: int | None = None,
        norm: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Dense(i, o, ensemble, device, dtype) for i, o in sizes)
        widths = [o for _, o in sizes[:-1]] if norm == "layer" else []
        self.norms = nn.ModuleList(LayerNormAffine(width, ensemble, device, dtype) for width in widths)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew from `generator` (torch's global one by default)."""
        for module in (*self.layers, *self.norms):
            module.reset_parameters(generator)

    def parameter_list(self) -> list[Tensor]:
        """Weights and biases of every layer, then scales and shifts: the order the operators take them in.

        Read anew at every call, so `functional_call`, `.data` edits and swapped parameters are seen.
        """
        return list(self._ordered())

    def _ordered(self) -> Iterator[Tensor]:
        for module in (*self.layers, *self.norms):
            yield module.weight
            yield module.bias


class VelocityField(DenseStack):
    """The parameters of one velocity network (or of an ensemble of them) that `FieldSpec` describes.

    Args:
        spec: the network.
        device, dtype: as for every torch module. Any floating dtype runs on the reference path, float64 included.

    Calling the module evaluates the velocity once, on the reference path; `fastflow.integrate` and the losses take
    the module.
    """

    def __init__(
        self, spec: FieldSpec, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if not isinstance(spec, FieldSpec):
            raise TypeError(f"VelocityField: spec must be a FieldSpec, got {type(spec).__name__}")
        super().__init__(spec.layer_sizes, spec.ensemble, spec.norm, device, dtype)
        self.spec = spec
        self.key = spec.key

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """v(x_t, t, cond).

        Args:
            x_t: [..., D]; with an ensemble [E, ..., D], or [B, D] shared by all members.
            t: the leading shape of x_t, or anything that broadcasts to it.
            cond: [..., C], broadcasting to the leading shape of x_t; None if `cond_dim` is 0.

        Returns:
            [..., D], with a leading E axis if the field is an ensemble.
        """
        if self.spec.ensemble is not None and x_t.dim() == 2:
            x_t = x_t.expand(self.spec.ensemble, *x_t.shape)
        return reference.velocity(self.spec, self.parameter_list(), x_t, t, cond)

    def extra_repr(self) -> str:
        return str(self.spec)
