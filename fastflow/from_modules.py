"""Networks that users have, stacks of torch's layers or their state_dicts, read as what a field is made of: widths,
activation, norm, weights. And the way back.

Nothing here knows fields: `VelocityField.from_sequential` and `from_state_dict` make one of a `Stack`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]

_PLAIN_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    nn.Mish: "mish",
    nn.Tanh: "tanh",
}
_FITTING = "Linear, LayerNorm, GELU, SiLU, ReLU, ELU, Mish and Tanh fit"


class Stack(NamedTuple):
    """A stack of layers: Linear, activation and perhaps LayerNorm per hidden layer, then the head, a Linear. The MLP of
    a time embedding may have none."""

    hidden: tuple[int, ...]
    activation: str
    norm_first: bool | None  # LayerNorm before the activation or behind it; None for no LayerNorm
    norm_eps: float
    layers: tuple[Pair, ...]  # weight [in, out] and bias [out], head last if there is one; [E, ...] for an ensemble
    norms: tuple[Pair, ...]  # scale and shift, [H] or [E, H]

    @property
    def has_head(self) -> bool:
        """Whether the last layer is a Linear without activation."""
        return len(self.layers) > len(self.hidden)

    @property
    def inputs(self) -> int:
        """Width of what the first layer takes."""
        return self.layers[0][0].shape[-2]

    @property
    def outputs(self) -> int:
        """Width of what the last layer gives."""
        return self.layers[-1][0].shape[-1]

    @property
    def tensors(self) -> list[Tensor]:
        """Weight and bias of every layer, then scale and shift of every LayerNorm."""
        return [tensor for pair in (*self.layers, *self.norms) for tensor in pair]


class _Layer(NamedTuple):
    """One layer of a user's network."""

    name: str
    text: str  # as it is shown in errors
    kind: str  # "linear", "norm" or "activation"
    activation: str = ""
    width: int = 0  # units that a LayerNorm normalises
    eps: float = 0.0
    weight: Any = None  # Tensor or None, as torch's modules have them
    bias: Any = None


def read_network(owner: str, network: object, needs_head: bool = True) -> Stack:
    """The stack that an `nn.Sequential` or an `nn.ModuleList`, nested or not, runs from its first layer to its last.

    Args:
        owner: what stands in front of every error.
        network: the layers.
        needs_head: the last layer must be a Linear; else an activation may stand behind it.

    Raises:
        ValueError: names the layer that does not fit, and why.
        TypeError: `network` is neither.
    """
    if not isinstance(network, (nn.Sequential, nn.ModuleList)):
        hint = "; put its layers into an nn.Sequential" if isinstance(network, nn.Module) else ""
        raise TypeError(f"{owner}: network must be an nn.Sequential or nn.ModuleList, got {_type(network)}{hint}")
    layers = list(_layers(owner, network))
    return _stack(owner, layers, needs_head or not layers or layers[-1].kind == "linear")


def read_state_dict(
    owner: str,
    state_dict: object,
    activation: str,
    norm_first: bool | None,
    norm_eps: float,
    prefix: str = "",
    num_hidden: int | None = None,
) -> Stack:
    """The stack whose Linear and LayerNorm layers have these weights, each kind in the order it is run in.

    Args:
        owner: what stands in front of every error.
        state_dict: "NAME.weight" [out, in] and "NAME.bias" [out] of a Linear, [H] both of a LayerNorm.
        activation, norm_first, norm_eps: what a state_dict does not tell, as in `FieldSpec`.
        prefix: keys that begin with it are the network's.
        num_hidden: so many layers have an activation; by default all but the last.

    Raises:
        ValueError: names the entry that does not fit, and why.
        TypeError: `state_dict` is no mapping of names to tensors.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{owner}: state_dict must map names to tensors, got {_type(state_dict)}")
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        if not key.startswith(prefix):
            continue
        name, _, leaf = key[len(prefix) :].rpartition(".")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{owner}: state_dict[{key!r}] must be a Tensor, got {_type(tensor)}")
        if leaf not in ("weight", "bias"):
            raise ValueError(f"{owner}: {key!r} does not fit: a Linear and a LayerNorm have a weight and a bias alone")
        found.setdefault(name, {})[leaf] = tensor
    linears, norms = [], []
    for name, tensors in found.items():
        text = ", ".join(f"{leaf} {list(tensor.shape)}" for leaf, tensor in tensors.items())
        weight, bias = tensors.get("weight"), tensors.get("bias")
        if weight is not None and weight.dim() == 2 and (bias is None or bias.shape == weight.shape[:1]):
            linears.append(_Layer(name, text, "linear", weight=weight, bias=bias))
        elif weight is not None and weight.dim() == 1 and bias is not None and bias.shape == weight.shape:
            norms.append(_Layer(name, text, "norm", "", weight.shape[0], norm_eps, weight, bias))
        else:
            why = "a Linear has weight [out, in] and bias [out], a LayerNorm both [H]"
            _refuse(owner, name, text, why)
    if not linears:
        known = ", ".join(list(map(str, state_dict))[:4])
        raise ValueError(f"{owner}: no Linear's weight begins with prefix {prefix!r}; state_dict holds {known} ...")
    hidden = linears[: len(linears) - 1 if num_hidden is None else num_hidden]
    if norms and len(norms) != len(hidden):
        raise ValueError(
            f"{owner}: {len(norms)} LayerNorms ({', '.join(layer.name for layer in norms)}) for {len(hidden)} hidden "
            "layers; a field has one in each or none"
        )
    if norms and norm_first is None:
        raise ValueError(f"{owner}: norm_first must say whether the LayerNorms stand before the activation, got None")
    if not norms and norm_first is not None:
        raise ValueError(f"{owner}: norm_first must be None, as there is no LayerNorm, got {norm_first}")
    layers = []
    for i, linear in enumerate(linears):
        layers.append(linear)
        if i < len(hidden):
            between = [_Layer(f"{linear.name} (activation)", activation, "activation", activation), *norms[i : i + 1]]
            layers += reversed(between) if norm_first else between
    return _stack(owner, layers, len(linears) > len(hidden))


def side_by_side(owner: str, members: Sequence[Stack]) -> Stack:
    """An ensemble of stacks that differ in their weights alone, every tensor with a leading E axis."""
    first = members[0]
    for e, member in enumerate(members[1:], 1):
        for name, mine, other in (
            ("widths", _widths(first), _widths(member)),
            ("activation", first.activation, member.activation),
            ("place of LayerNorm (norm_first)", first.norm_first, member.norm_first),
            ("eps of LayerNorm", first.norm_eps, member.norm_eps),
            ("dtype", first.tensors[0].dtype, member.tensors[0].dtype),
            ("device", first.tensors[0].device, member.tensors[0].device),
        ):
            if mine != other:
                raise ValueError(
                    f"{owner}: members must differ in their weights alone; {name}: {mine} and, of member {e}, {other}"
                )

    def pairs(lists: Sequence[tuple[Pair, ...]]) -> tuple[Pair, ...]:
        return tuple((torch.stack([w for w, _ in same]), torch.stack([b for _, b in same])) for same in zip(*lists))

    layers, norms = pairs([m.layers for m in members]), pairs([m.norms for m in members])
    return first._replace(layers=layers, norms=norms)


def write_network(stack: Stack) -> nn.Sequential:
    """The `nn.Sequential` of a stack without E axis, with weights of its own."""
    modules: list[nn.Module] = []
    options: dict[str, Any] = {"device": stack.tensors[0].device, "dtype": stack.tensors[0].dtype}
    with torch.no_grad():
        for i, (weight, bias) in enumerate(stack.layers):
            linear = nn.utils.skip_init(nn.Linear, *weight.shape, **options)
            linear.weight.copy_(weight.mT)
            linear.bias.copy_(bias)
            modules.append(linear)
            if i == len(stack.hidden):
                break
            modules.append(_activation_module(stack.activation))
            if stack.norms:
                norm = nn.LayerNorm(weight.shape[-1], stack.norm_eps, **options)
                norm.weight.copy_(stack.norms[i][0])
                norm.bias.copy_(stack.norms[i][1])
                modules.insert(len(modules) - int(bool(stack.norm_first)), norm)
    return nn.Sequential(*modules)


def behind(first: Pair, head: Pair) -> Pair:
    """The layer that does what `first` and then `head` do, Linear layers without anything between them."""
    # In float64: a product on a GPU may round its operands to TF32.
    (w, b), (v, c) = ([tensor.double() for tensor in pair] for pair in (first, head))
    weight, bias = w @ v, (b.unsqueeze(-2) @ v).squeeze(-2) + c
    return weight.to(head[0].dtype), bias.to(head[1].dtype)


def column_order(widths: Mapping[str, int], given: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where each of the columns that stand in the order `wanted` is among those in the order `given`."""
    starts = dict(zip(given, itertools.accumulate((widths[name] for name in given), initial=0)))
    return [starts[name] + i for name in wanted for i in range(widths[name])]


def _leaves(owner: str, module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers of nested containers in the order they run in, with their names as in the state_dict."""
    if not isinstance(module, (nn.Sequential, nn.ModuleList)):
        yield name, module
        return
    if module._forward_hooks or module._forward_pre_hooks:
        _refuse(owner, name, _type(module), "its hooks are not copied; remove them")
    if isinstance(module, nn.Sequential) and type(module).forward is not nn.Sequential.forward:
        _refuse(owner, name, _type(module), "its forward is not that of nn.Sequential")
    # named_children would leave out a module that stands in two places.
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _leaves(owner, child, f"{name}.{child_name}" if name else child_name)


def _layers(owner: str, network: nn.Module) -> Iterator[_Layer]:
    """The layers that compute something; one that cannot be part of a field is refused."""
    seen: dict[nn.Module, str] = {}
    for name, module in _leaves(owner, network, ""):
        kind = type(module)
        text = repr(module) if next(module.children(), None) is None else kind.__name__
        if module in seen and next(module.parameters(), None) is not None:
            _refuse(owner, name, text, f"it is layer {seen[module]!r} again; the layers of a field share no weights")
        seen[module] = name
        if nn.utils.parametrize.is_parametrized(module):
            why = "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
            _refuse(owner, name, text, why)
        if module._forward_hooks or module._forward_pre_hooks:
            _refuse(owner, name, text, "its hooks are not copied; remove them")
        if kind is nn.Identity:
            continue
        if isinstance(module, nn.Dropout):
            if module.p and module.training:
                _refuse(owner, name, text, "a field has no dropout; call eval() on the network to leave it out")
        elif kind is nn.Linear:
            yield _Layer(name, text, "linear", weight=module.weight, bias=module.bias)
        elif isinstance(module, nn.LayerNorm) and kind is nn.LayerNorm:
            shape = module.normalized_shape
            if len(shape) != 1:
                _refuse(owner, name, text, f"it normalises over {len(shape)} axes, a field over the last")
            yield _Layer(name, text, "norm", "", shape[0], module.eps, module.weight, module.bias)
        elif isinstance(module, nn.GELU) and kind is nn.GELU:
            which = {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate]
            yield _Layer(name, text, "activation", which)
        elif isinstance(module, nn.ELU) and kind is nn.ELU:
            if module.alpha != 1:
                _refuse(owner, name, text, "alpha must be 1")
            yield _Layer(name, text, "activation", "elu")
        elif kind in _PLAIN_ACTIVATIONS:
            yield _Layer(name, text, "activation", _PLAIN_ACTIVATIONS[kind])
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            _refuse(owner, name, text, "a field has no BatchNorm: its result would depend on the other rows")
        else:
            _refuse(owner, name, text, f"{_FITTING}; a subclass may compute something else")


def _stack(owner: str, layers: Sequence[_Layer], head: bool) -> Stack:
    """The layers grouped behind their Linear, if they make a stack."""
    groups: list[list[_Layer]] = []
    for layer in layers:
        if layer.kind == "linear":
            groups.append([layer])
        elif not groups:
            _refuse(owner, layer.name, layer.text, "it stands before the first Linear")
        else:
            groups[-1].append(layer)
    if not groups:
        raise ValueError(f"{owner}: the network has no Linear")
    if head and len(groups) == 1:
        only = groups[0][0]
        _refuse(owner, only.name, only.text, "it is the only Linear; there must be a hidden layer before it")
    hidden = groups[:-1] if head else groups
    for extra in groups[-1][1:] if head else ():
        _refuse(owner, extra.name, extra.text, "it stands behind the last Linear, which gives the output")
    for group, following in zip(hidden, [*groups[1:], None]):
        _check_hidden(owner, group, following)
    first = hidden[0]
    for group in hidden[1:]:
        _check_alike(owner, first, group)
    _check_chain(owner, groups)
    activation = next(layer.activation for layer in first if layer.kind == "activation")
    norm = next((layer for layer in first if layer.kind == "norm"), None)
    return Stack(
        hidden=tuple(_out(group[0]) for group in hidden),
        activation=activation,
        norm_first=None if norm is None else first[1] is norm,
        norm_eps=0.0 if norm is None else norm.eps,
        layers=tuple(_linear_pair(group[0]) for group in groups),
        norms=tuple(_norm_pair(layer, group[0]) for group in hidden for layer in group if layer.kind == "norm"),
    )


def _check_hidden(owner: str, group: list[_Layer], following: list[_Layer] | None) -> None:
    """One activation behind the Linear, and at most one LayerNorm on either side of it."""
    for kind, called in (("activation", "activation"), ("norm", "LayerNorm")):
        for extra in [layer for layer in group if layer.kind == kind][1:]:
            why = f"it is the second {called} behind layer {group[0].name!r}; a hidden layer has one"
            _refuse(owner, extra.name, extra.text, why)
    if all(layer.kind != "activation" for layer in group):
        if following is None:
            _refuse(owner, group[0].name, group[0].text, "no activation stands behind it")
        why = f"no activation stands between it and the Linear before it, layer {group[0].name!r}"
        _refuse(owner, following[0].name, following[0].text, why)


def _check_alike(owner: str, first: list[_Layer], group: list[_Layer]) -> None:
    """Activation, LayerNorm and their order are those of the first hidden layer."""
    kinds, expected = [layer.kind for layer in group], [layer.kind for layer in first]
    for layer in group[1:]:
        if layer.kind == "norm" and "norm" not in expected:
            why = "the first hidden layer has no LayerNorm; a field has one in each or none"
            _refuse(owner, layer.name, layer.text, why)
    if "norm" in expected and "norm" not in kinds:
        _refuse(owner, group[0].name, group[0].text, "no LayerNorm follows it, but one follows the first Linear")
    if kinds != expected:
        order = "before" if expected[1] == "norm" else "behind"
        norm = next(layer for layer in group if layer.kind == "norm")
        _refuse(owner, norm.name, norm.text, f"the first hidden layer's LayerNorm stands {order} the activation")
    for layer, other in zip(group[1:], first[1:]):
        if layer.activation != other.activation:
            why = f"the first hidden layer's activation is {other.text}; a field has one activation"
            _refuse(owner, layer.name, layer.text, why)
        if layer.eps != other.eps:
            _refuse(owner, layer.name, layer.text, f"its eps is {layer.eps}, the first LayerNorm's {other.eps}")


def _check_chain(owner: str, groups: list[list[_Layer]]) -> None:
    """Widths, dtype and device go through."""
    like = groups[0][0].weight
    width = like.shape[1]
    for linear, *others in groups:
        if linear.weight.shape[1] != width:
            why = f"it takes {linear.weight.shape[1]} inputs and the layer before it gives {width}"
            _refuse(owner, linear.name, linear.text, why)
        width = linear.weight.shape[0]
        for layer in (linear, *others):
            if layer.kind == "norm" and layer.width != width:
                why = f"it normalises {layer.width} units and the layer before it gives {width}"
                _refuse(owner, layer.name, layer.text, why)
            for tensor in (layer.weight, layer.bias):
                if tensor is not None and (tensor.dtype, tensor.device) != (like.dtype, like.device):
                    why = f"it is {tensor.dtype} on {tensor.device}, the first layer {like.dtype} on {like.device}"
                    _refuse(owner, layer.name, layer.text, why)
    if not like.is_floating_point():
        _refuse(owner, groups[0][0].name, groups[0][0].text, f"its dtype is {like.dtype}, which is no floating one")


def _linear_pair(layer: _Layer) -> Pair:
    weight = layer.weight.detach().mT
    return weight, weight.new_zeros(weight.shape[1]) if layer.bias is None else layer.bias.detach()


def _norm_pair(layer: _Layer, linear: _Layer) -> Pair:
    like = linear.weight.detach()
    weight = like.new_ones(like.shape[0]) if layer.weight is None else layer.weight.detach()
    return weight, like.new_zeros(like.shape[0]) if layer.bias is None else layer.bias.detach()


def _activation_module(activation: str) -> nn.Module:
    if activation in ("gelu", "gelu_tanh"):
        return nn.GELU("tanh" if activation == "gelu_tanh" else "none")
    if activation == "elu":
        return nn.ELU()
    return next(kind for kind, name in _PLAIN_ACTIVATIONS.items() if name == activation)()


def _widths(stack: Stack) -> tuple[int, ...]:
    return (stack.inputs, *stack.hidden, stack.outputs)


def _out(linear: _Layer) -> int:
    return linear.weight.shape[0]


def _type(value: object) -> str:
    return type(value).__name__


def _refuse(owner: str, name: str, text: str, why: str) -> NoReturn:
    raise ValueError(f"{owner}: layer {name!r} ({text}) does not fit: {why}")
