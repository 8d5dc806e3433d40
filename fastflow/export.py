"""Critics and policies for processes that do not train: exported programs, and compiled packages of them.

A program holds the weights as they were and the walk as one operator, `fastflow::integrate`, whatever the number of
steps. The process that runs it needs that operator, `import fastflow.ops`, and nothing else of fastflow; with
`backend="reference"` the walk is plain PyTorch, unrolled, and nothing of fastflow is needed.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from fastflow import ops
from fastflow.atomic import atomic_write
from fastflow.modules import FlowCritic, FlowPolicy, OneStepPolicy, ValueNetwork

__all__ = ["export_package", "export_program"]

_MODULES = (FlowPolicy, FlowCritic, OneStepPolicy, ValueNetwork)


def export_program(
    module: FlowPolicy | FlowCritic | OneStepPolicy | ValueNetwork,
    *,
    num_steps: int | None = None,
    backend: str | None = None,
) -> torch.export.ExportedProgram:
    """What a policy or critic computes, without gradients, as `torch.export` writes it down.

    It takes, in this order and all positional, with any batch size B of at least 1:

        FlowPolicy, OneStepPolicy   obs [B, O], noise [B, A]
        FlowCritic                  obs [B, O], action [B, A] (None if `action_dim` is 0), noise [B, num_samples]
        ValueNetwork                obs [B, O], action [B, A] (None if `action_dim` is 0)

    with the module's dtype, on its device, and returns what the module returns. Noise is always an input: drawn inside,
    it would come from whatever generator a compiled program has.

    Args:
        module: what to export. The program owns its weights: later changes of the module do not reach it. Device,
            precision and what runs the operator are those of the module, as they are now.
        num_steps: K of the walk; that of the module if None.
        backend: see `fastflow.integrate`; that of the module if None. "reference" exports the K steps in plain PyTorch.

    Raises:
        TypeError: another module (a frozen copy too: export what it was made from), or `num_steps` for one that takes
            no steps or that is no int.
        ValueError: a `num_steps` or `backend` that does not fit.
    """
    twin = _twin(module, num_steps, backend)
    # Two rows: torch.export takes sizes of 0 and 1 for constants.
    rows = [None if width is None else _zeros(twin, 2, width) for width in _widths(twin)]
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple(None if x is None else {0: batch} for x in rows)
    # With gradients the operator would also return every step of the walk.
    with torch.no_grad():
        return torch.export.export(twin, tuple(rows), dynamic_shapes=shapes)


def export_package(
    module: FlowPolicy | FlowCritic | OneStepPolicy | ValueNetwork,
    path: str | os.PathLike[str],
    *,
    num_steps: int | None = None,
    backend: str | None = None,
) -> Path:
    """Compile `export_program` ahead of time (AOTInductor) and write it to `path`, whole or not at all.

    `torch._inductor.aoti_load_package(path)` loads it, in a process that has done `import fastflow.ops` unless the
    backend is "reference". It is compiled for the processor or GPU of this machine; that takes half a minute.

    Args:
        module, num_steps, backend: as for `export_program`.
        path: the file to write, which ends in .pt2. Its folder must exist.

    Returns:
        The path.

    Raises:
        TypeError, ValueError: as `export_program`; a path that does not end in .pt2.
        UserError: the path cannot be written.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"export_package: path must end in .pt2, got {str(path)!r}")
    with atomic_write(path) as temporary:
        program = export_program(module, num_steps=num_steps, backend=backend)
        torch._inductor.aoti_compile_and_package(program, package_path=str(temporary))
    return path


def _twin(module: nn.Module, num_steps: int | None, backend: str | None) -> nn.Module:
    """A module of the same weights and options that nobody else changes: programs share their module's weights."""
    if not isinstance(module, _MODULES):
        names = ", ".join(kind.__name__ for kind in _MODULES[:-1])
        kind = type(module).__name__
        frozen = f"; export the {kind.removeprefix('Frozen')} that it was made from" if "Frozen" in kind else ""
        raise TypeError(f"export: module must be a {names} or {_MODULES[-1].__name__}, got {kind}{frozen}")
    if backend is not None and backend not in ops.BACKENDS:
        raise ValueError(f"export: backend must be one of {ops.BACKENDS}, got {backend!r}")
    twin = copy.deepcopy(module).requires_grad_(False)
    twin.backend = module.backend if backend is None else backend
    if num_steps is not None:
        if not isinstance(twin, (FlowPolicy, FlowCritic)):
            raise TypeError(f"export: num_steps must be None for a {type(twin).__name__}, got {num_steps!r}")
        ops.check_walk([twin.field], num_steps)
        twin.num_steps = num_steps
    return twin


def _widths(module: nn.Module) -> list[int | None]:
    """The last axis of each input."""
    if isinstance(module, (FlowPolicy, OneStepPolicy)):
        return [module.obs_dim, module.action_dim]
    assert isinstance(module, (FlowCritic, ValueNetwork))
    samples = [module.num_samples] if isinstance(module, FlowCritic) else []
    return [module.obs_dim, module.action_dim or None, *samples]


def _zeros(module: nn.Module, rows: int, width: int) -> Tensor:
    like = next(module.parameters())
    return like.new_zeros(rows, width)
