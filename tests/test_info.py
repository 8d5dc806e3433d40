"""What `fastflow info` says, and the choice of a device by name."""

from __future__ import annotations

import platform
import sys
import types

import numpy as np
import pytest
import torch

import fastflow
import fastflow.info
from fastflow.errors import UserError
from fastflow.info import describe, resolve_device, versions
from fastflow.kernels import launch


def test_versions_of_what_is_installed():
    found = versions()
    assert found["fastflow"] == fastflow.__version__
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["numpy"] == np.__version__


def test_describe_names_what_a_bug_report_needs():
    text = describe()
    for wanted in (
        fastflow.__version__,
        torch.__version__.split("+")[0],
        platform.python_version(),
        "threads",
        "native code",
        "gpu",
    ):
        assert wanted in text, wanted
    if torch.cuda.is_available():
        for wanted in (torch.cuda.get_device_name(), "shared memory", "driver", "compute capability"):
            assert wanted in text, wanted


def test_describe_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "kernels      not available here" in describe()


def test_describe_has_a_plan():
    pytest.importorskip("triton")
    assert "not available" not in describe()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0), (7, 5)])
def test_the_plan_of_a_gpu_says_what_falls_back_there(capability, monkeypatch):
    pytest.importorskip("triton")
    gpu = types.SimpleNamespace(
        **dict(name="GPU", major=capability[0], minor=capability[1], total_memory=2**34, multi_processor_count=100),
        shared_memory_per_block_optin=101376,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(fastflow.info, "_driver_version", lambda: "1.0")
    launch._targets.pop(0, None)
    try:
        text = describe()
    finally:
        launch._targets.pop(0, None)
    if capability < (8, 0):
        assert "no fused kernel for compute capability 7.5" in text
        return
    for wanted in (f"sm_{capability[0]}{capability[1]}", "U-Net with FiLM", "falls back everywhere", "float64"):
        assert wanted in text
    assert ("products wider than 512: no tile fits" in text) == (capability in ((8, 6), (12, 0)))


def test_device_names():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:x", "cpu:0:1", ""):
        with pytest.raises(UserError, match="expected auto, cpu, cuda"):
            resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_cuda_absent():
    with pytest.raises(UserError, match="device cuda asked for"):
        resolve_device("cuda")


@pytest.mark.gpu
def test_gpu_that_is_not_there():
    with pytest.raises(UserError, match="counted from 0"):
        resolve_device("cuda:99")
