"""common/hardware.py: choices for devices that this machine does not have."""

import pytest
import torch

from common.devices import vendor_flops
from common.hardware import Hardware
from common.weights import flops_per_token
from config import load
from model import GPT, GPTConfig


def hardware(device: str, dtype: torch.dtype = torch.bfloat16) -> Hardware:
    return Hardware(torch.device(device), dtype, threads=1, reasons={})


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        *(("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989)),
        *(("NVIDIA GH200 480GB", 989), ("NVIDIA H800", 989), ("NVIDIA H20", 148), ("NVIDIA B200", 2250)),
        *(("NVIDIA GB200", 2500), ("NVIDIA B100", 1750), ("NVIDIA A100-SXM4-40GB", 312)),
        *(("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", 70)),
        *(("NVIDIA A30", 165), ("NVIDIA A40", 149.7), ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362)),
        *(("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-32GB", 112), ("Tesla V100S-PCIE-32GB", 130)),
        *(("Tesla T4", 65), ("NVIDIA RTX A6000", 154.8), ("NVIDIA RTX 6000 Ada Generation", 364.2)),
        *(("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 3090 Ti", 80), ("NVIDIA GeForce RTX 4090", 165.2)),
        *(("NVIDIA GeForce RTX 5090", 209.5), ("AMD Instinct MI300X", 1307), ("AMD Instinct MI325X OAM", 1307)),
        ("AMD Instinct MI250X", 191.5),  # of one die
        # Not in the table, or a part of a device; several names begin like one that is.
        *((name, None) for name in ("NVIDIA T400", "NVIDIA T400 4GB", "NVIDIA T4G", "NVIDIA A2", "NVIDIA A100X")),
        *((name, None) for name in ("NVIDIA A1000", "NVIDIA RTX A1000", "NVIDIA L400", "NVIDIA H100 80GB HBM2e")),
        *((name, None) for name in ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "GRID A100-10C", "NVIDIA A10-24Q")),
        *((name, None) for name in ("NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU")),
        *((name, None) for name in ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "Quadro RTX 6000", "NVIDIA")),
        *((name, None) for name in ("AMD Instinct MI250X / MI250", "AMD Radeon RX 7900 XTX", "a device of 2031", "")),
    ],
)
def test_peak_flops_are_those_of_exactly_this_device(name, tflops):
    assert vendor_flops(name) == (None if tflops is None else pytest.approx(1e12 * tflops))


def test_peak_flops_are_those_of_16_bit_products_on_a_gpu(monkeypatch):
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
