"""What GPUs can do by their data sheets. Without torch, for the plan of a run on machines that are elsewhere."""

from __future__ import annotations

import re
from typing import NamedTuple

# Dense 16-bit TFLOP/s with float32 sums, from the vendors' data sheets, by the device's name without what vendor_flops
# leaves out. PyTorch sees each of an MI250X's two dies as a device.
VENDOR_TFLOPS = {
    "H100": 989, "H100 PCIE": 756, "H100 NVL": 835, "H800": 989, "H800 PCIE": 756, "H200": 989, "H200 NVL": 835,
    "GH200": 989, "H20": 148, "B100": 1750, "B200": 2250, "GB200": 2500, "A100": 312, "A100 PCIE": 312,
    "A800": 312, "A800 PCIE": 312, "A10": 125, "A10G": 70, "A30": 165, "A40": 149.7, "L4": 121, "L40": 181, "L40S": 362,
    "V100": 125, "V100 PCIE": 112, "V100S PCIE": 130, "T4": 65, "RTX A6000": 154.8, "RTX 6000 ADA": 364.2,
    "RTX 3090": 71, "RTX 3090 TI": 80, "RTX 4090": 165.2, "RTX 5090": 209.5,
    "MI250X": 191.5, "MI300X": 1307, "MI325X": 1307,
}  # fmt: skip


def vendor_flops(name: str) -> float | None:
    """Dense 16-bit FLOP/s of a device by its name; None if it is not in the table, like a laptop's or a part (MIG)."""
    left_out = r"\b(NVIDIA|TESLA|GEFORCE|AMD|INSTINCT|SXM\d?|OAM|GENERATION|HBM3E?|\d+GB?)\b|-"
    tflops = VENDOR_TFLOPS.get(" ".join(re.sub(left_out, " ", name.upper()).split()))
    return None if tflops is None else 1e12 * tflops


class Gpu(NamedTuple):
    """One kind of GPU in a data center.

    sheet: its name in VENDOR_TFLOPS. memory: GiB that PyTorch sees. sustained: share of the data sheet's FLOP/s that
    long series of large products reach, within the power limit. bandwidth: GB/s of its memory. link: GB/s to the other
    GPUs of its node, one way. network: the same to other nodes. price: US dollars an hour, low and high."""

    sheet: str
    memory: float
    sustained: float
    bandwidth: float
    link: float
    network: float
    price: tuple[float, float]

    @property
    def flops(self) -> float:
        """Dense 16-bit FLOP/s by the data sheet."""
        return 1e12 * VENDOR_TFLOPS[self.sheet]

    @property
    def memory_bytes(self) -> int:
        return int(self.memory * 2**30)


# Bandwidths are the data sheets' (NVLink 3, 4, 5, Infinity Fabric; PCIe 4 where there is nothing else), the network is
# the usual one: an adapter of 400 Gb/s for each GPU, 200 for the A100, 100 for the L40S, 25 for a node of RTX 4090.
# sustained: the A100's and the MI300X's are the largest measured products in S. Bekman's ml-engineering (271 and 668
# TFLOP/s). The H100's lies between the 0.80 of that table, which are short, and 0.61: MosaicML's runs of 2023 reached
# 0.71 of their A100 utilization on it. The H200 had 0.80 in short products, too
# (bench/results/2026-11-27-gpu_session.json). Guesses: the B200's (as the H100's), the L40S's, the RTX 4090's.
# Prices: rented by the hour, as seen by 2026 from the cheapest hosts to the large clouds, rounded. Check your own.
GPUS = {
    "a100": Gpu("A100", 79.3, 0.86, 2039, 300, 25, (1.0, 2.5)),
    "a100-40gb": Gpu("A100", 39.4, 0.86, 1555, 300, 25, (0.8, 2.0)),
    "h100": Gpu("H100", 79.1, 0.70, 3350, 450, 50, (1.8, 4.0)),
    "h200": Gpu("H200", 139.8, 0.74, 4800, 450, 50, (2.2, 5.0)),
    "b200": Gpu("B200", 178.4, 0.70, 8000, 900, 50, (3.5, 7.0)),
    "l40s": Gpu("L40S", 44.4, 0.50, 864, 25, 12.5, (0.7, 1.9)),
    "rtx4090": Gpu("RTX 4090", 23.5, 0.90, 1008, 12, 0.4, (0.3, 0.7)),
    "mi300x": Gpu("MI300X", 191.7, 0.50, 5300, 448, 50, (1.7, 4.0)),
}


def find_gpu(name: str) -> str | None:
    """The key in GPUS of a name such as "H100", "NVIDIA A100-SXM4-40GB" or "4090"; None for others."""
    words = re.sub(r"nvidia|amd|instinct|geforce|tesla|sxm\d?|hbm3e?|[^a-z0-9]", "", name.lower())
    aliases = {"a10080gb": "a100", "a10040gb": "a100-40gb", "a10040": "a100-40gb", "a10080": "a100", "4090": "rtx4090"}
    aliases |= {"h10080gb": "h100", "h200141gb": "h200", "mi300": "mi300x"}
    words = aliases.get(words, words)
    return words if words in GPUS else None
