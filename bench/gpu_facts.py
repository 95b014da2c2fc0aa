"""What GPU this is and how fast it is: name, driver, clocks as found and under load, memory; matmul and copy speed.

    python bench/gpu_facts.py --out=DIR      DIR/DATE-gpu_facts.json, within a few seconds
    python bench/gpu_facts.py --smoke        tries this script out on a CPU; written only to --out

Reads the card's settings with nvidia-smi, where there is one, and changes none.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for imports from the project

import torch  # noqa: E402

from bench.gpu import card, ceilings, choose_device, wake  # noqa: E402
from bench.hardware import RESULTS, commit_of, hardware, write_results  # noqa: E402
from common.devices import vendor_flops  # noqa: E402
from errors import run_script  # noqa: E402

QUERIED = (
    "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw",
    "power.limit", "temperature.gpu", "memory.total", "memory.used",
)  # fmt: skip


def settings() -> dict[str, str]:
    """What nvidia-smi says of the first card, by the names of QUERIED; {} without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"unavailable": str(error)}
    return dict(zip(QUERIED, (value.strip() for value in shown.split(",")), strict=False))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the figures (default: bench/results)")
    parser.add_argument("--smoke", action="store_true", help="try this script out on a CPU")
    arguments = parser.parse_args(argv)
    as_found = settings()
    device = choose_device("bench/gpu_facts.py", "--smoke", arguments.smoke)
    facts: dict[str, Any] = {**hardware(), **card(device)}
    wake(device, 1.0)
    under_load, peaks = settings(), ceilings(device)
    vendor = vendor_flops(facts["gpu"])
    figures = {
        "bench": "gpu_facts",
        "commit": commit_of(ROOT),
        "hardware": facts,
        "as_found": as_found,
        "under_load": under_load,
        "ceilings": peaks,
        "vendor_tflops": None if vendor is None else vendor / 1e12,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        figures["memory_free_gib"] = round(free / 2**30, 1)
        print(f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB are free", end="; ")
    print(
        f"{facts['gpu']}, torch {facts['torch']}, triton {facts.get('triton')}, driver {as_found.get('driver_version')}"
    )
    print(f"clocks as found {as_found.get('clocks.sm')}, under load {under_load.get('clocks.sm')}; {peaks}")
    if device.type == "cpu" and arguments.out is None:
        print("tried out on a CPU: nothing is written")
        return 0
    print(f"written: {write_results('gpu_facts', figures, arguments.out or RESULTS)}")
    return 0


if __name__ == "__main__":
    run_script(main)
