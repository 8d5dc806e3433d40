"""Fixtures and rules of the test run; `pytest` alone runs everything that this machine can run.

Without a GPU, kernels run in Triton's interpreter. It has to be asked for before the first kernel module is imported,
hence the assignment at import below. Ahead-of-time compilation needs the opposite, so those tests compile in
subprocesses whose environment is the fixture `plain_environment`.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
from collections.abc import Callable, Iterator

# The tests are small, and two processes that share two cores gain nothing from more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
NO_GPU = "needs a CUDA GPU"
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

# A shell ignores Ctrl-C for what it starts in the background, and every process inherits that. Tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

try:
    import hypothesis
except ModuleNotFoundError:  # the kernel tests of `make gpu` do without
    hypothesis = None
else:

    class _TorchRandom:
        """torch's CPU generator in the form hypothesis wants, so that a failing example repeats."""

        seed = staticmethod(torch.manual_seed)
        getstate = staticmethod(torch.get_rng_state)
        setstate = staticmethod(torch.set_rng_state)

    _torch_random = _TorchRandom()  # hypothesis keeps a weak reference only
    hypothesis.register_random(_torch_random)
    hypothesis.settings.register_profile("local", deadline=None)
    hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

# Hides packages from every finder, as if they were not installed: importing them raises, find_spec returns None.
HIDE = """
import sys

class Hide:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Hide, sys.meta_path)
"""


def rms(tensor: torch.Tensor) -> float:
    """Root mean square of all elements, in float64; 0 for no elements."""
    return math.sqrt(tensor.detach().double().cpu().square().mean().item()) if tensor.numel() else 0.0


def assert_close_rms(
    name: str, actual: torch.Tensor, expected: torch.Tensor, ratio: float, floor: float = 1e-7
) -> None:
    """Assert rms(actual - expected) <= ratio * rms(expected) + floor, and equal shapes.

    One ratio serves every scale. NaN and infinity anywhere in `actual` fail.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error, scale = rms(actual.detach().double().cpu() - expected.detach().double().cpu()), rms(expected)
    # Written so that a NaN error fails.
    assert error <= ratio * scale + floor, (
        f"{name}: rms error {error:.3e} is {error / scale if scale else math.inf:.3e} of the expected rms {scale:.3e}, "
        f"allowed {ratio:.1e} (+ {floor:.0e})"
    )


def assert_as_accurate(
    name: str,
    actual: torch.Tensor,
    eager: torch.Tensor,
    exact: torch.Tensor,
    times: float = 2.0,
    ratio_floor: float | None = None,
) -> None:
    """Assert that the rms error of `actual` is at most `times` that of `eager`, both against the float64 `exact`.

    `eager` is plain PyTorch in the dtype and precision of `actual`. Where it happens to be nearly exact, an error of
    `ratio_floor` relative to the rms of `exact` is allowed: by default twice the epsilon of the dtype of `actual`.
    """
    assert exact.dtype == torch.float64, f"{name}: exact is {exact.dtype}, expected torch.float64"
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    floor = 2 * torch.finfo(actual.dtype).eps if ratio_floor is None else ratio_floor
    exact = exact.detach().cpu()
    error = rms(actual.detach().double().cpu() - exact)
    eager_error = rms(eager.detach().double().cpu() - exact)
    assert error <= max(times * eager_error, floor * rms(exact)), (
        f"{name}: rms error {error:.3e} is {error / eager_error if eager_error else math.inf:.2f} times that of eager "
        f"PyTorch, {eager_error:.3e}; allowed {times} (rms of the exact result: {rms(exact):.3e})"
    )


@contextlib.contextmanager
def products(precision: str | None) -> Iterator[None]:
    """torch's own float32 products in TF32 within the block for "tf32": what eager PyTorch is then compared in."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def relative_rms(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """rms(actual - exact) / rms(exact), 0 where exact is 0."""
    scale = rms(exact)
    return rms(actual.detach().double().cpu() - exact.detach().double().cpu()) / scale if scale else 0.0


def assert_pass_as_accurate(
    fused: dict[str, torch.Tensor],
    eager: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    precision: str,
) -> None:
    """`assert_as_accurate` for all results of one pass, forward and backward.

    How near eager comes by luck depends on the machine's libraries, so what it errs by elsewhere in the pass is allowed
    too; four times that where there are few numbers (a loss, a bias of the head), twice in bfloat16, where one
    activation that falls on the other side of a kink moves a whole gradient.
    """
    assert fused.keys() == eager.keys() == exact.keys()
    typical = max(relative_rms(eager[name], exact[name]) for name in exact)
    for name in exact:
        times = 4 if exact[name].numel() < 16 else 2 if precision == "bf16" else 1
        floor = max(times * typical, 2e-6)
        assert_as_accurate(name, fused[name], eager[name], exact[name], ratio_floor=floor)


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    # OGBench draws from the global generator.
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its relatives return with NaN in tests marked `poison`."""
    if request.node.get_closest_marker("poison") is None:
        return

    def poisoned(function):
        def empty(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if tensor.dtype.is_floating_point:
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return empty

    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def lay_out(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has the kernels lay small networks out by "rows", which is for wide ones, or as "narrow" ones, as they are."""
    from fastflow.kernels import plan

    def choose(design: str) -> None:
        if design == "rows":
            monkeypatch.setattr(plan, "NARROW_WIDTH", 0)

    return choose


@pytest.fixture
def plain_environment() -> dict[str, str]:
    """Environment variables for a subprocess: those of this process without the interpreter and without PYTHONPATH."""
    return {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONPATH")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        if item.get_closest_marker("interpreter") and os.environ.get("TRITON_INTERPRET") != "1":
            item.add_marker(pytest.mark.skip(reason="the interpreter is for machines without a GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # A skipped module arrives as one report without keywords, hence the reason is looked at as well.
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum("gpu" in getattr(report, "keywords", ()) or NO_GPU in str(report.longrepr) for report in skipped)
    terminalreporter.write_line(f"skipped for want of a GPU: {count}")
