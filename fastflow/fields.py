"""The one description of a velocity network that every layer shares, and the module that holds its parameters.

A field v(x_t, t, cond) embeds x_t and t, passes them with cond through a trunk of hidden layers (`MLP`, `ResidualMLP`
or `FiLMUNet`) and a Dense head, and reads the velocity from the head's output (`FieldSpec.prediction`). With an
ensemble every parameter carries a leading E axis.
"""

from __future__ import annotations

import ast
import functools
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastflow import from_modules, reference

ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu", "elu", "mish", "tanh")
NORMS = ("layer", None)
PREDICTIONS = ("velocity", "endpoint", "noise")


# Embeddings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """State embedding: x itself, D features."""

    def width(self, state_dim: int) -> int:
        """Number of features of a state of D = `state_dim` dimensions."""
        return state_dim

    def features(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., width]."""
        return x


@dataclass(frozen=True)
class Scaled:
    """State embedding: (x - low) / (high - low), D features (floq with `use_prob_embed=False`)."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_range(self, self.low, self.high)

    def width(self, state_dim: int) -> int:
        """Number of features of a state of D = `state_dim` dimensions."""
        return state_dim

    def features(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., width]."""
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
        _check_int(self, "bins", self.bins)
        if self.bins < 2:
            raise ValueError(f"HLGauss: bins must be at least 2 (edges of at least one interval), got {self.bins}")
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"HLGauss: sigma must be a positive number of edge spacings, got {self.sigma}")

    def width(self, state_dim: int) -> int:
        """Number of features of a state of D = `state_dim` dimensions."""
        if state_dim != 1:
            raise ValueError(f"HLGauss embeds a scalar: state_dim must be 1, got {state_dim}")
        return self.bins - 1

    def features(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., width]."""
        return reference.hl_gauss(x, self.low, self.high, self.bins, self.sigma)


@dataclass(frozen=True)
class RawTime:
    """Time embedding: t, one feature (FQL)."""

    def width(self) -> int:
        """Number of features of a time."""
        return 1

    def features(self, t: Tensor) -> Tensor:
        """[...] -> [..., width]."""
        return t.unsqueeze(-1)


@dataclass(frozen=True)
class Cosine:
    """Time embedding: cos(t), one feature (floq as released)."""

    def width(self) -> int:
        """Number of features of a time."""
        return 1

    def features(self, t: Tensor) -> Tensor:
        """[...] -> [..., width]."""
        return torch.cos(t).unsqueeze(-1)


@dataclass(frozen=True)
class CosineFourier:
    """Time embedding: cos(i pi t) for i = 1..dim (floq as written in the paper)."""

    dim: int = 64

    def __post_init__(self) -> None:
        _check_int(self, "dim", self.dim)
        if self.dim < 1:
            raise ValueError(f"CosineFourier: dim must be at least 1, got {self.dim}")

    def width(self) -> int:
        """Number of features of a time."""
        return self.dim

    def features(self, t: Tensor) -> Tensor:
        """[...] -> [..., width]."""
        return reference.cosine_fourier(t, self.dim)


@dataclass(frozen=True)
class PowerFourier:
    """Time embedding: cos(2^k t) for k = 0..dim/2-1, then sin(2^k t) (FPO)."""

    dim: int = 8

    def __post_init__(self) -> None:
        _check_int(self, "dim", self.dim)
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"PowerFourier: dim must be even and at least 2, got {self.dim}")

    def width(self) -> int:
        """Number of features of a time."""
        return self.dim

    def features(self, t: Tensor) -> Tensor:
        """[...] -> [..., width]."""
        return reference.power_fourier(t, self.dim)


@dataclass(frozen=True)
class Sinusoidal:
    """Time embedding: the Transformer's sinusoids of `scale` t, then an MLP of its own (TD-Flow, DiT).

    cos(w_i scale t) and sin(w_i scale t) for w_i = max_period^(-2 i / dim), i = 0..dim/2-1, then Dense -> activation
    (the field's) per width of `hidden`. `hidden=()` leaves the sinusoids as they are. The papers leave `scale` open;
    1000 is the number of levels that the embedding was made for.
    """

    dim: int = 256
    hidden: tuple[int, ...] = (256, 256)
    max_period: float = 10_000.0
    scale: float = 1000.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        _check_int(self, "dim", self.dim)
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"Sinusoidal: dim must be even and at least 2, got {self.dim}")
        if not all(isinstance(width, int) and width >= 1 for width in self.hidden):
            raise ValueError(f"Sinusoidal: hidden must hold widths of at least 1, got {self.hidden}")
        if not (self.max_period > 1 and math.isfinite(self.max_period) and math.isfinite(self.scale)):
            raise ValueError(f"Sinusoidal: expected max_period > 1 and a finite scale, got {self}")

    def width(self) -> int:
        """Number of features of a time."""
        return self.dim

    def features(self, t: Tensor) -> Tensor:
        """[...] -> [..., width]."""
        return reference.sinusoidal(self.scale * t, self.dim, self.max_period)


StateEmbedding = Identity | Scaled | HLGauss
TimeEmbedding = RawTime | Cosine | CosineFourier | PowerFourier | Sinusoidal


def _check_int(owner: object, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{type(owner).__name__}: {name} must be an int, got {value!r}")


# Architectures ------------------------------------------------------------------------------------------------------


class Hidden(NamedTuple):
    """One hidden layer of a trunk."""

    width: int
    inputs: tuple[int, ...]  # hidden layers whose outputs it takes side by side; () takes the field's inputs
    add: int | None  # hidden layer whose output is added to its own


@dataclass(frozen=True)
class MLP:
    """Architecture: hidden layers one behind the other, fed with [cond, state features, time features]."""

    def trunk(self, hidden: tuple[int, ...]) -> tuple[Hidden, ...]:
        """The hidden layers of these widths, each with what it takes and adds."""
        return tuple(Hidden(width, (i - 1,) if i else (), None) for i, width in enumerate(hidden))


@dataclass(frozen=True)
class ResidualMLP:
    """Architecture: one hidden layer, then blocks of `depth` hidden layers whose output is added to their input (floq's
    ResNet). `hidden` names every layer: 1 + n depth equal widths for n blocks.
    """

    depth: int = 2

    def __post_init__(self) -> None:
        _check_int(self, "depth", self.depth)
        if self.depth < 1:
            raise ValueError(f"ResidualMLP: depth must be at least 1 layer per block, got {self.depth}")

    def trunk(self, hidden: tuple[int, ...]) -> tuple[Hidden, ...]:
        """The hidden layers of these widths, each with what it takes and adds."""
        if len(set(hidden)) > 1 or (len(hidden) - 1) % self.depth:
            raise ValueError(
                f"ResidualMLP: hidden must be 1 + n * {self.depth} equal widths, got {hidden} ({len(hidden)} layers)"
            )
        return tuple(
            Hidden(width, (i - 1,) if i else (), i - self.depth if i and i % self.depth == 0 else None)
            for i, width in enumerate(hidden)
        )


@dataclass(frozen=True)
class FiLMUNet:
    """Architecture: TD-Flow's U-Net of Dense layers. cond and time enter through FiLM alone.

    `hidden` = (w_1, ..., w_n) are the widths on the way down; the way up has the same in reverse. Every layer is Dense
    -> LayerNorm -> FiLM -> activation, where FiLM (y = xhat (1 + scale) + shift) stands for LayerNorm's affine. cond
    passes once through an encoder, Dense -> activation per width of `cond_hidden`; scale and shift of each layer are
    one Dense of [encoded cond, time features].

    The paper gives these sizes and leaves the wiring open. Here: the way down takes the state features, then each layer
    the one above. The first layer of the way up (the bottom) takes the last of the way down, which is its own skip;
    every further one takes [the layer below it, the layer of the way down at its level].
    """

    cond_hidden: tuple[int, ...] = (512, 512, 512)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cond_hidden", tuple(self.cond_hidden))
        if not self.cond_hidden or not all(isinstance(w, int) and w >= 1 for w in self.cond_hidden):
            raise ValueError(f"FiLMUNet: cond_hidden must hold widths of at least 1, got {self.cond_hidden}")

    def trunk(self, hidden: tuple[int, ...]) -> tuple[Hidden, ...]:
        """The hidden layers of these widths, each with what it takes and adds."""
        n = len(hidden)
        down = [Hidden(width, (i - 1,) if i else (), None) for i, width in enumerate(hidden)]
        up = [Hidden(hidden[i], (2 * n - 2 - i,) + ((i,) if i < n - 1 else ()), None) for i in range(n - 1, -1, -1)]
        return (*down, *up)


Architecture = MLP | ResidualMLP | FiLMUNet


def _check_range(embedding: object, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{type(embedding).__name__}: expected finite low < high, got low={low}, high={high}")


# The spec ------------------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """The parameters of one field by what they do, each as (weight, bias) or (scale, shift) pairs."""

    layers: list[tuple[Tensor, Tensor]]  # the trunk's Dense layers, then the head
    norms: list[tuple[Tensor, Tensor]]
    time: list[tuple[Tensor, Tensor]]  # the time embedding's own MLP
    encoder: list[tuple[Tensor, Tensor]]  # FiLM: cond's encoder
    films: list[tuple[Tensor, Tensor]]  # FiLM: [encoded cond, time features] -> [scale, shift] of each hidden layer


@dataclass(frozen=True)
class FieldSpec:
    """Everything that fixes a velocity network except its weights. Hashable; equal specs are the same network.

    Args:
        state_dim: D, width of the flow state x.
        cond_dim: C, width of what the field is conditioned on (observation, action ...); 0 for none.
        hidden: width of each hidden layer, as `architecture` reads them.
        ensemble: E, number of networks side by side; None for one network whose tensors have no E axis.
        activation: "gelu_tanh" (the tanh form, flax's default), "gelu" (with erf, torch's default), "silu", "relu",
            "elu", "mish" or "tanh".
        norm: "layer" for a LayerNorm in each hidden layer, None for none.
        state_embedding: `Identity()`, `Scaled(low, high)` or `HLGauss(low, high, bins, sigma)`.
        time_embedding: `RawTime()`, `Cosine()`, `CosineFourier(dim)`, `PowerFourier(dim)` or `Sinusoidal(dim, hidden)`.
        norm_eps: added to the variance of LayerNorm (flax: 1e-6).
        norm_first: the LayerNorm stands before the activation; by default behind it (floq's order).
        architecture: `MLP()`, `ResidualMLP(depth)` or `FiLMUNet(cond_hidden)`, which brings its own norm.
        output_scale: the head's output is multiplied by it (FPO: 0.25).
        prediction: what the head predicts: "velocity"; "endpoint", the data x_1, from which v = (x_1 - x_t) / (1 - t);
            or "noise", x_0, from which v = (x_t - x_0) / t. Denominators are at least `reference.TIME_MARGIN`. Both are
            those of the path without `sigma_min`.

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
    norm_first: bool = False
    architecture: Architecture = MLP()
    output_scale: float = 1.0
    prediction: str = "velocity"
    # The hidden layers and how they are wired; how many pairs of tensors each of `Parts` holds. Asked for at every
    # evaluation of the reference, hence computed once.
    trunk: tuple[Hidden, ...] = field(init=False, repr=False, compare=False)
    _counts: tuple[int, ...] = field(init=False, repr=False, compare=False)

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
        if not isinstance(self.time_embedding, _TIME_EMBEDDINGS):
            raise TypeError(
                "FieldSpec: time_embedding must be RawTime, Cosine, CosineFourier, PowerFourier or Sinusoidal, "
                f"got {self.time_embedding!r}"
            )
        if not isinstance(self.architecture, _ARCHITECTURES):
            raise TypeError(f"FieldSpec: architecture must be MLP, ResidualMLP or FiLMUNet, got {self.architecture!r}")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"FieldSpec: prediction must be one of {PREDICTIONS}, got {self.prediction!r}")
        if not (math.isfinite(self.norm_eps) and self.norm_eps >= 0):
            raise ValueError(f"FieldSpec: norm_eps must be finite and not negative, got {self.norm_eps}")
        if not (math.isfinite(self.output_scale) and self.output_scale != 0):
            raise ValueError(f"FieldSpec: output_scale must be finite and not 0, got {self.output_scale}")
        if self.norm_first and self.norm is None:
            raise ValueError("FieldSpec: norm_first says where the norm stands; norm must be 'layer', got None")
        if self.film and self.norm is not None:
            raise ValueError(f"FieldSpec: FiLMUNet brings its own LayerNorm; norm must be None, got {self.norm!r}")
        object.__setattr__(self, "trunk", self.architecture.trunk(self.hidden))  # refuses widths that make no network
        self.state_embedding.width(self.state_dim)  # refuses what it cannot embed
        norms = len(self.trunk) if self.norm else 0
        sizes = (self.layer_sizes, range(norms), self.time_sizes, self.encoder_sizes, self.film_sizes)
        object.__setattr__(self, "_counts", tuple(map(len, sizes)))

    @property
    def film(self) -> bool:
        """Whether cond and time enter through FiLM instead of the first layer."""
        return isinstance(self.architecture, FiLMUNet)

    @property
    def norm_position(self) -> str | None:
        """Where each hidden layer normalises: "after" its activation, "before" it, by "film" (before it), or None."""
        if self.film:
            return "film"
        return None if self.norm is None else "before" if self.norm_first else "after"

    @property
    def state_features(self) -> int:
        """Number of features the state embedding gives the first layer."""
        return self.state_embedding.width(self.state_dim)

    @property
    def time_features(self) -> int:
        """Number of features of time, behind its own MLP if it has one."""
        return self.time_sizes[-1][1] if self.time_sizes else self.time_embedding.width()

    @property
    def layer_sizes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the trunk's Dense layers and the head. The first layer's rows are ordered cond, state, time."""
        first = self.state_features + (0 if self.film else self.cond_dim + self.time_features)
        into = [sum(self.trunk[i].width for i in layer.inputs) or first for layer in self.trunk]
        return (*zip(into, (layer.width for layer in self.trunk)), (self.trunk[-1].width, self.state_dim))

    @property
    def time_sizes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the time embedding's own Dense layers."""
        widths = (self.time_embedding.width(), *getattr(self.time_embedding, "hidden", ()))
        return tuple(zip(widths[:-1], widths[1:], strict=True))

    @property
    def encoder_sizes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the Dense layers that encode cond for FiLM."""
        if not isinstance(self.architecture, FiLMUNet) or not self.cond_dim:
            return ()
        widths = (self.cond_dim, *self.architecture.cond_hidden)
        return tuple(zip(widths[:-1], widths[1:], strict=True))

    @property
    def film_sizes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each hidden layer's FiLM: [encoded cond, time features] -> [scale, shift]."""
        if not self.film:
            return ()
        into = (self.encoder_sizes[-1][1] if self.encoder_sizes else 0) + self.time_features
        return tuple((into, 2 * layer.width) for layer in self.trunk)

    @property
    def num_parameters(self) -> int:
        """Number of tensors that `VelocityField.parameter_list` gives."""
        return 2 * sum(self._counts)

    def parts(self, parameters: Sequence[Tensor]) -> Parts:
        """A field's parameter list by what each tensor does."""
        pairs = list(zip(parameters[::2], parameters[1::2], strict=True))
        out = []
        for count in self._counts:
            out.append(pairs[:count])
            pairs = pairs[count:]
        return Parts(*out)

    @functools.cached_property
    def key(self) -> str:
        """A string that `FieldSpec.from_key` turns back into this spec: so a spec passes through a torch operator."""
        return repr(_plain(self)[1:])

    @staticmethod
    def from_key(key: str) -> FieldSpec:
        """The spec whose `key` this is."""
        return _spec_from_key(key)


def _plain(described: Any) -> tuple[Any, ...]:
    """A spec, embedding or architecture as (class name, field values ...).

    Numbers become what their field is annotated with: equal specs have equal keys, whether 1000, 1000.0 or numpy's
    1000.0 was given.
    """
    values = []
    for f in fields(described):
        if not f.init:
            continue
        value = getattr(described, f.name)
        if f.type in _NUMBERS:
            value = _NUMBERS[f.type](value)
        elif type(value).__name__ in _CLASSES:
            value = _plain(value)
        values.append(value)
    return (type(described).__name__, *values)


@functools.lru_cache(maxsize=256)
def _spec_from_key(key: str) -> FieldSpec:
    values = dict(zip([f.name for f in fields(FieldSpec) if f.init], ast.literal_eval(key), strict=True))
    for name in ("state_embedding", "time_embedding", "architecture"):
        kind, *arguments = values[name]
        values[name] = _CLASSES[kind](*arguments)
    return FieldSpec(**values)


_NUMBERS: dict[Any, type] = {"int": int, "float": float, "bool": bool}
_TIME_EMBEDDINGS = (RawTime, Cosine, CosineFourier, PowerFourier, Sinusoidal)
_ARCHITECTURES = (MLP, ResidualMLP, FiLMUNet)
_CLASSES = {c.__name__: c for c in (Identity, Scaled, HLGauss, *_TIME_EMBEDDINGS, *_ARCHITECTURES)}


# Modules ------------------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """y = x @ weight + bias, `weight` [in, out] or [E, in, out], `bias` [out] or [E, out]."""

    weight: nn.Parameter
    bias: nn.Parameter

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

    weight: nn.Parameter
    bias: nn.Parameter

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

    layers: nn.ModuleList
    norms: nn.ModuleList

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
        for module in self._modules_in_order():
            module.reset_parameters(generator)

    def parameter_list(self) -> list[Tensor]:
        """Weights and biases of every layer, then scales and shifts, then what else the network has: the order the
        operators take them in.

        Read anew at every call, so `functional_call`, `.data` edits and swapped parameters are seen.
        """
        if torch.compiler.is_compiling():
            return [p for module in self._modules_in_order() for p in (module.weight, module.bias)]
        # nn.Module's attribute look-up is slow, and every call asks. Parametrised weights are properties.
        out: list[Tensor] = []
        for modules in self._modules.values():
            for module in cast("nn.ModuleList", modules)._modules.values():
                for name in ("weight", "bias"):
                    p = module._parameters.get(name)
                    out.append(cast("Tensor", getattr(module, name) if p is None else p))
        return out

    def _modules_in_order(self) -> Iterator[Dense | LayerNormAffine]:
        for modules in self.children():
            yield from cast("nn.ModuleList", modules)  # type: ignore[misc]


class VelocityField(DenseStack):
    """The parameters of one velocity network (or of an ensemble of them) that `FieldSpec` describes.

    Args:
        spec: the network.
        device, dtype: as for every torch module. Any floating dtype runs on the reference path, float64 included.

    Parameters are `layers.{i}.weight`, `layers.{i}.bias` (the head is the last), with LayerNorm `norms.{i}.weight` and
    `norms.{i}.bias`, with an MLP for time `time_layers.{i}`, with FiLM `encoder.{i}` and `films.{i}`.

    Calling the module evaluates the velocity once, on the reference path; `fastflow.integrate` and the losses take
    the module.
    """

    spec: FieldSpec
    key: str

    def __init__(
        self, spec: FieldSpec, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if not isinstance(spec, FieldSpec):
            raise TypeError(f"VelocityField: spec must be a FieldSpec, got {type(spec).__name__}")
        super().__init__(spec.layer_sizes, spec.ensemble, spec.norm, device, dtype)
        self.spec = spec
        self.key = spec.key
        for name, sizes in (
            ("time_layers", spec.time_sizes),
            ("encoder", spec.encoder_sizes),
            ("films", spec.film_sizes),
        ):
            if sizes:
                setattr(self, name, nn.ModuleList(Dense(i, o, spec.ensemble, device, dtype) for i, o in sizes))

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

    @classmethod
    def from_sequential(
        cls,
        network: nn.Sequential | nn.ModuleList | Sequence[nn.Sequential | nn.ModuleList],
        *,
        state_dim: int,
        cond_dim: int,
        inputs: Sequence[str],
        state_embedding: StateEmbedding = Identity(),
        time_embedding: TimeEmbedding = RawTime(),
        time_network: nn.Sequential | nn.ModuleList | Sequence[nn.Sequential | nn.ModuleList] | None = None,
        output_scale: float = 1.0,
        prediction: str = "velocity",
    ) -> VelocityField:
        """The field that a network made of torch's layers is, with a copy of its weights, in its dtype, on its device.

        What fits: `Linear`, one activation (GELU with tanh or erf, SiLU, ReLU, ELU, Mish, Tanh) and in all hidden
        layers or none a `LayerNorm`, before the activation or behind it; then a last `Linear`. Identity and dropout in
        eval mode are left out. A Linear without bias gets a zero one, a LayerNorm without scale and shift one and zero;
        as all parameters of a field they can be trained.

        Args:
            network: the layers, nested or not, from the features side by side to the velocity. A list or tuple of
                networks that differ in their weights alone is an ensemble.
            state_dim, cond_dim: D and C.
            inputs: in which order the network takes its features side by side: "state", "time" and "cond" (left out
                where `cond_dim` is 0), as in `("cond", "state", "time")`.
            state_embedding, time_embedding: how x_t and t become the features that the network takes.
            time_network: the layers of a `Sinusoidal` embedding's own MLP; a list with an ensemble. A last Linear
                without activation is multiplied into the first layer of the field, which gives the same function.
            output_scale, prediction: as in `FieldSpec`.

        Raises:
            ValueError: a layer that does not fit, by its name in the network, and why; or sizes that do not.
            TypeError: a network that is no Sequential, ModuleList or list of them.
        """
        name = "VelocityField.from_sequential"
        networks = list(network) if isinstance(network, (list, tuple)) else [network]
        timers = list(time_network) if isinstance(time_network, (list, tuple)) else [time_network]
        timers = [timer for timer in timers if timer is not None]
        return cls._from_stacks(
            name,
            [from_modules.read_network(name, n) for n in networks],
            [from_modules.read_network(f"{name}: time_network", n, needs_head=False) for n in timers],
            isinstance(network, (list, tuple)),
            inputs,
            state_dim=state_dim,
            cond_dim=cond_dim,
            state_embedding=state_embedding,
            time_embedding=time_embedding,
            output_scale=output_scale,
            prediction=prediction,
        )

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
        *,
        state_dim: int,
        cond_dim: int,
        inputs: Sequence[str],
        activation: str,
        norm_first: bool | None = None,
        norm_eps: float = 1e-5,
        prefix: str = "",
        time_prefix: str | None = None,
        state_embedding: StateEmbedding = Identity(),
        time_embedding: TimeEmbedding = RawTime(),
        output_scale: float = 1.0,
        prediction: str = "velocity",
    ) -> VelocityField:
        """As `from_sequential`, from the weights of a network's `Linear` and `LayerNorm` layers, whatever its class.

        Layers of each kind are taken in the order of their keys. What has no weights leaves no trace in a state_dict:
        that the network has no LayerNorm without scale, no further activation and no skip is for the caller to know.

        Args:
            state_dict: "NAME.weight" [out, in] and "NAME.bias" [out] of every Linear, [H] both of every LayerNorm. A
                list or tuple of state_dicts is an ensemble.
            state_dim, cond_dim, inputs, state_embedding, time_embedding, output_scale, prediction: see
                `from_sequential`.
            activation: as in `FieldSpec`.
            norm_first: whether the LayerNorms stand before the activation; None where there are none.
            norm_eps: of the LayerNorms (torch's default).
            prefix: the network's keys are those that begin with it, as in "actor.net."; others are not looked at.
            time_prefix: likewise the keys of a `Sinusoidal` embedding's own MLP, the `time_network` of
                `from_sequential`: with one layer more than the embedding has, the last is one without activation.

        Raises:
            ValueError: an entry that does not fit, by name, and why; or sizes that do not.
            TypeError: a state_dict that does not map names to tensors.
        """
        name = "VelocityField.from_state_dict"
        dicts = list(state_dict) if isinstance(state_dict, (list, tuple)) else [state_dict]
        norm = (norm_first, norm_eps)
        stacks = [from_modules.read_state_dict(name, d, activation, *norm, prefix) for d in dicts]
        timers = []
        if time_prefix is not None:
            num_hidden = len(getattr(time_embedding, "hidden", ()))
            timers = [
                from_modules.read_state_dict(
                    f"{name}: time_prefix", d, activation, None, norm_eps, time_prefix, num_hidden
                )
                for d in dicts
            ]
        return cls._from_stacks(
            name,
            stacks,
            timers,
            isinstance(state_dict, (list, tuple)),
            inputs,
            state_dim=state_dim,
            cond_dim=cond_dim,
            state_embedding=state_embedding,
            time_embedding=time_embedding,
            output_scale=output_scale,
            prediction=prediction,
        )

    @classmethod
    def _from_stacks(
        cls,
        name: str,
        stacks: Sequence[from_modules.Stack],
        timers: Sequence[from_modules.Stack],
        ensemble: bool,
        inputs: Sequence[str],
        **described: Any,
    ) -> VelocityField:
        """The field of stacks of layers; `described` is what `FieldSpec` is told besides."""
        if not stacks:
            raise ValueError(f"{name}: an ensemble must have at least one network, got none")
        stack = from_modules.side_by_side(name, stacks) if ensemble else stacks[0]
        spec = FieldSpec(
            hidden=stack.hidden,
            ensemble=len(stacks) if ensemble else None,
            activation=stack.activation,
            norm="layer" if stack.norms else None,
            norm_first=bool(stack.norm_first),
            norm_eps=stack.norm_eps if stack.norms else FieldSpec.norm_eps,
            **described,
        )
        timer = _time_stack(name, spec, stack, timers)
        order = _input_order(name, spec, inputs)
        widths = _input_widths(spec)
        if timer is not None and timer.has_head:
            widths["time"] = timer.outputs
        if stack.inputs != sum(widths.values()):
            parts = " + ".join(f"{part} {widths[part]}" for part in order)
            raise ValueError(
                f"{name}: the first Linear must take {parts} = {sum(widths.values())} features, got {stack.inputs}"
            )
        if stack.outputs != spec.state_dim:
            raise ValueError(
                f"{name}: the last Linear must give state_dim = {spec.state_dim} outputs, got {stack.outputs}"
            )
        (weight, bias), *rest = stack.layers
        weight = weight[..., from_modules.column_order(widths, order, INPUTS), :]
        time = () if timer is None else timer.layers[: len(timer.hidden)]
        if timer is not None and timer.has_head:
            others, own = weight.split([stack.inputs - timer.outputs, timer.outputs], dim=-2)
            own, bias = from_modules.behind(timer.layers[-1], (own, bias))
            weight = torch.cat([others, own], dim=-2)
        layers = ((weight, bias), *rest)
        field = cls(spec, "meta", weight.dtype).to_empty(device=weight.device)
        with torch.no_grad():
            given = [tensor for pair in (*layers, *stack.norms, *time) for tensor in pair]
            for mine, theirs in zip(field.parameter_list(), given, strict=True):
                mine.copy_(theirs)
        return field

    def to_sequential(
        self, inputs: Sequence[str] = ("cond", "state", "time"), *, member: int | None = None
    ) -> nn.Sequential:
        """The network as torch's layers with a copy of the weights: the way back of `from_sequential`.

        Args:
            inputs: in which order it takes the features of state, time and cond side by side.
            member: which network of an ensemble; None without one.

        Returns:
            The layers from features to the head's output times `output_scale`.

        Raises:
            ValueError: an architecture other than `MLP`, a time embedding with an MLP of its own, no such member.
        """
        name = "VelocityField.to_sequential"
        spec = self.spec
        if not isinstance(spec.architecture, MLP):
            raise ValueError(
                f"{name}: architecture must be MLP(), which is one stack of layers, got {spec.architecture}"
            )
        if spec.time_sizes:
            raise ValueError(
                f"{name}: the MLP that {spec.time_embedding} has of its own is no part of one stack of layers"
            )
        if member not in ((None,) if spec.ensemble is None else range(spec.ensemble)):
            expected = "None" if spec.ensemble is None else f"in [0, {spec.ensemble}), the ensemble"
            raise ValueError(f"{name}: member must be {expected}, got {member}")
        columns = from_modules.column_order(_input_widths(spec), INPUTS, _input_order(name, spec, inputs))
        own = [p.detach() if member is None else p.detach()[member] for p in self.parameter_list()]
        parts = spec.parts(own)
        layers = [*parts.layers]
        layers[0] = (layers[0][0][columns], layers[0][1])
        if spec.output_scale != 1:
            layers[-1] = (layers[-1][0] * spec.output_scale, layers[-1][1] * spec.output_scale)
        norm_first = None if spec.norm is None else spec.norm_first
        norms = tuple(parts.norms)
        return from_modules.write_network(
            from_modules.Stack(spec.hidden, spec.activation, norm_first, spec.norm_eps, tuple(layers), norms)
        )

    def extra_repr(self) -> str:
        return str(self.spec)


INPUTS = ("cond", "state", "time")
"""The order in which a field's first layer takes its features."""


def _input_widths(spec: FieldSpec) -> dict[str, int]:
    return {"cond": spec.cond_dim, "state": spec.state_features, "time": spec.time_features}


def _input_order(name: str, spec: FieldSpec, inputs: Sequence[str]) -> list[str]:
    """The three kinds of features in the order given."""
    order = [inputs] if isinstance(inputs, str) else list(inputs)
    if not spec.cond_dim and "cond" not in order:
        order.append("cond")
    if sorted(order) != sorted(INPUTS):
        raise ValueError(f"{name}: inputs must name 'state', 'time' and 'cond' in the network's order, got {inputs!r}")
    return order


def _time_stack(
    name: str, spec: FieldSpec, stack: from_modules.Stack, timers: Sequence[from_modules.Stack]
) -> from_modules.Stack | None:
    """The network of time's own, of all members."""
    if not spec.time_sizes:
        if timers:
            raise ValueError(f"{name}: a network of time's own fits Sinusoidal with hidden, got {spec.time_embedding}")
        return None
    members = spec.ensemble or 1
    if len(timers) != members:
        raise ValueError(
            f"{name}: {spec.time_embedding} has an MLP of its own, {members} with this network; got {len(timers)} "
            "(time_network, or time_prefix)"
        )
    time = from_modules.side_by_side(name, timers) if spec.ensemble is not None else timers[0]
    sizes = tuple((weight.shape[-2], weight.shape[-1]) for weight, _ in time.layers[: len(time.hidden)])
    if sizes != spec.time_sizes:
        raise ValueError(
            f"{name}: the network of time must have (in, out) {list(spec.time_sizes)} in layers with an activation, "
            f"got {list(sizes)}"
        )
    if time.norms or time.activation != stack.activation:
        found = time.activation + (" and LayerNorm" if time.norms else "")
        raise ValueError(
            f"{name}: the network of time must have the field's activation {stack.activation}, got {found}"
        )
    return time
