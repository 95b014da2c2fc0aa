"""common/hardware.py: choices for devices that this machine does not have."""

from functools import partial

import pytest
import torch

import common.hardware as hardware_module
from common.hardware import Hardware, choose_compile, vendor_flops
from common.weights import flops_per_token
from config import load
from model import GPT, GPTConfig


def hardware(device: str, dtype: torch.dtype = torch.bfloat16) -> Hardware:
    return Hardware(torch.device(device), dtype, threads=1, reasons={})


def test_compile_auto_compares_saved_time_with_compile_time(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(hardware_module.shutil, "which", lambda name: "/usr/bin/cc")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    pytest.importorskip("triton")
    for seconds, pays in ((100.0, False), (200.0, True)):
        choice = choose_compile("auto", hardware("cuda"), lambda seconds=seconds: seconds)
        assert choice.value is pays
        assert f"about {0.4 * seconds:.0f} s saved against 60 s" in choice.reasons["compile"]
    unused = partial(pytest.fail, "the duration is estimated only where it decides")
    assert choose_compile("auto", hardware("cpu"), unused).value is False
    assert choose_compile(True, hardware("cpu"), unused).value is True


def test_peak_flops_are_known_for_listed_devices_only(monkeypatch):
    assert vendor_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert vendor_flops("NVIDIA H100 PCIe") == 756e12
    assert vendor_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert vendor_flops("a device of 2031") is None
    assert hardware("cpu").peak_flops() is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert hardware("cuda").peak_flops() == 989e12
    assert hardware("cuda", torch.float32).peak_flops() is None


def test_flops_of_gpt2_124m():
    """855 MFLOP per token: six per matrix parameter (123.65M), plus attention over 1,024 tokens."""
    with torch.device("meta"):
        assert flops_per_token(GPT(load("train.py", ["gpt2_124m"]).section(GPTConfig), seed=None)) == pytest.approx(
            855e6, rel=2e-3
        )
