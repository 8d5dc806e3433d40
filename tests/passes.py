"""One pass of a walk or a loss, forward and backward, with every gradient there is: what the kernels' and the native
code's tests compare with the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from conftest import HAS_GPU, assert_pass_as_accurate, products
from networks import in_float64, random_field, random_inputs, to_float64

import fastflow as ff


def walk_and_gradients(field, inputs, **options) -> dict[str, torch.Tensor]:
    """The displacement (what the walk computed), and the gradient of a sum over every x_k with uneven weights."""
    x_0 = inputs["x_0"].clone().requires_grad_()
    cond = None if inputs["cond"] is None else inputs["cond"].clone().requires_grad_()
    noise = options.pop("step_noise", None)
    noise = None if noise is None else noise.clone().requires_grad_()
    x = ff.integrate(field, x_0, cond, step_noise=noise, **options)
    moved = x - x_0
    found = {"displacement": (moved[1:] if options.get("trajectory") else moved).detach()}
    leaves = {"x_0": x_0, "cond": cond, "step_noise": noise} | dict(field.named_parameters())
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    weights = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).to(x).view_as(x)
    grads = torch.autograd.grad((x * weights).sum(), list(leaves.values()), materialize_grads=True)
    return found | dict(zip(leaves, grads, strict=True))


@contextlib.contextmanager
def as_on_a_gpu(precision: str) -> Iterator[None]:
    """Without a GPU bfloat16 products as one computes them, by `kernel_machine`; else what runs without it."""
    with contextlib.ExitStack() as entered:
        if precision == "bf16" and not HAS_GPU:
            from kernel_machine import kernels_as_python

            entered.enter_context(kernels_as_python())
        yield


def compare_walk(field, inputs, precision, backend="fused", draws=1, **options) -> None:
    """Assert that a pass is as accurate as eager PyTorch's; with more than one draw of weights, over all of them."""
    exact_options = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    exact_options.pop("activations", None)
    plain = {name: x for name, x in options.items() if name != "activations"}
    passes = []
    for each in _drawn_fields(field, draws):
        found = walk_and_gradients(each, inputs, backend=backend, precision=precision, **options)
        with products(precision):
            eager = walk_and_gradients(each, inputs, backend="reference", precision=precision, **plain)
        exact = walk_and_gradients(in_float64(each), to_float64(inputs), backend="reference", **exact_options)
        passes.append((found, eager, exact))
    assert_pass_as_accurate(*_together(passes), precision)


def _drawn_fields(field: ff.VelocityField, draws: int) -> list[ff.VelocityField]:
    device = field.parameter_list()[0].device
    return [field, *(random_field(field.spec, device) for _ in range(draws - 1))]


def _together(passes: list[tuple[dict[str, torch.Tensor], ...]]) -> list[dict[str, torch.Tensor]]:
    """(found, eager, exact) with the tensors of all passes in one: chance favours neither over many."""
    return [
        {name: torch.stack([p[name] for p in of_all]) for name in of_all[0]} for of_all in zip(*passes, strict=True)
    ]


def walk_options(combination: dict[str, Any], inputs, num_steps: int) -> dict[str, Any]:
    options: dict[str, Any] = {name: combination[name] for name in ("method", "activations", "trajectory")}
    # The two predictions divide by 1 - t and t: away from there, or clamped, as the walk goes.
    first, last = {"velocity": (0.0, 1.0), "endpoint": (0.0, 0.9), "noise": (0.1, 1.0)}[combination["prediction"]]
    rows = inputs["t"]
    options |= {
        "whole": dict(t_0=first, t_1=last),
        "part": dict(t_0=0.2, t_1=0.7),
        "backwards": dict(t_0=last, t_1=first),
        "per-row": dict(t_0=first, t_1=first + (last - first) * rows),
    }[combination["times"]]
    if combination["step_noise"]:
        options["step_noise"] = 0.1 * torch.randn(num_steps, *inputs["x_0"].shape, device=rows.device)
    return options | dict(num_steps=num_steps)


def loss_and_gradients(
    field, inputs, backend, precision, point=False, weighted=True, **options: Any
) -> dict[str, torch.Tensor]:
    """The loss and the gradients of the start (or point), x_1 (or target), cond, weight and every parameter; with
    reduction "none", of an uneven sum of the rows."""
    leaves = {
        name: inputs[name].clone().requires_grad_()
        for name in ("x_0", "x_1", "cond", "weight")
        if isinstance(inputs[name], torch.Tensor) and (name != "weight" or weighted)
    }
    x_0, x_1, cond = (leaves.get(name, inputs[name]) for name in ("x_0", "x_1", "cond"))
    options |= dict(weight=leaves.get("weight"), backend=backend, precision=precision)
    if point:
        loss = ff.velocity_matching_loss(field, x_0, inputs["t"], x_1, cond, **options)
    else:
        loss = ff.flow_matching_loss(field, x_0, x_1, inputs["t"], cond, **options)
    scalar = (loss * torch.linspace(-1, 2, loss.numel(), dtype=torch.float64).to(loss).view_as(loss)).sum()
    leaves |= dict(field.named_parameters())
    grads = torch.autograd.grad(scalar if loss.dim() else loss, list(leaves.values()))
    return {"loss": loss.detach()} | dict(zip(leaves, grads, strict=True))


def compare_loss(field, inputs, precision, backend="fused", draws=1, **options) -> None:
    """As `compare_walk`."""
    passes = []
    for each in _drawn_fields(field, draws):
        found = loss_and_gradients(each, inputs, backend, precision, **options)
        with products(precision):
            eager = loss_and_gradients(each, inputs, "reference", precision, **options)
        exact = loss_and_gradients(in_float64(each), to_float64(inputs), "reference", None, **options)
        passes.append((found, eager, exact))
    assert_pass_as_accurate(*_together(passes), precision)


def drawn(batch: int, samples: int, device) -> ff.PhiloxNoise:
    ids = torch.arange(batch, device=device) * 977 + 2**33
    return ff.PhiloxNoise(torch.tensor(-5, device=device), ids, samples)


def loss_options(combination: dict[str, Any], spec: ff.FieldSpec, device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and options of a combination of `networks.LOSS_FACTORS`."""
    start, samples = combination["start"], combination["samples"]
    if start == "drawn":
        samples = samples or 1
    batch = 10 if samples == 3 else 30
    inputs: dict[str, Any] = dict(random_inputs(spec, batch, samples, device))
    names = ["dim_reduction", "weighted", "reduction"]
    if start != "point":
        names += ["sigma_min", "error"]
    if start == "drawn":
        inputs["x_0"] = drawn(batch, samples, device)
        inputs["t"] = None if combination["prediction"] == "velocity" else inputs["x_0"].t()
    # The two other predictions divide by 1 - t and t: away from there.
    if combination["prediction"] != "velocity":
        inputs["t"] = 0.1 + 0.8 * inputs["t"]
    return inputs, {name: combination[name] for name in names} | dict(point=start == "point")
