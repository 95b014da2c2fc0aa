"""Compiles the attention kernels without a GPU: python -m tests.ahead_of_time '[[row], …]' prints a JSON line per row.

A row is [kernel, architecture, dtype, head size, block_q, block_k, warps, stages, masked, group, tail]. It runs in a
process of its own, because Triton either compiles or interprets for the whole life of a process. A line holds shared
memory and stack in bytes, registers per thread, and numbers of machine instructions: spills, tensor-core products,
exponentials.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import model

TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def compile_row(
    kernel: str, architecture: int, dtype: str, head_size: int, block_q: int, block_k: int, warps: int, stages: int,
    masked: bool = False, group: int = 1, tail: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One ahead-of-time compile, with the alignments that the packed projection of a real model has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    jitted = model._jitted(model.KERNELS[kernel])
    element = TYPES[dtype]
    constants = {
        "D": head_size, "BLOCK_D": max(16, 1 << (head_size - 1).bit_length()), "BLOCK_Q": block_q, "BLOCK_K": block_k,
        "GROUP": group, "DOT": getattr(model.tl, dtype), "TAIL": tail,
    }  # fmt: skip
    if not masked:
        constants["first_ptr"] = None
    signature, aligned = {}, {}
    for index, name in enumerate(inspect.signature(model.KERNELS[kernel]).parameters):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            wide = {"first_ptr": "i32", "lse_ptr": "fp32", "delta_ptr": "fp32"}
            signature[name], aligned[index,] = f"*{wide.get(name, element)}", [["tt.divisibility", 16]]
        elif name.startswith("stride"):
            signature[name], aligned[index,] = "i32", [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if name in ("T", "H") else "fp32"
    constants = {name: value for name, value in constants.items() if name in signature}
    source = ASTSource(fn=jitted, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    code, usage = disassemble(compiled.asm["cubin"])
    return {
        "shared": compiled.metadata.shared,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "wgmma": len(re.findall(r"\bHGMMA\b", code)),
        "mma": len(re.findall(r"\bHMMA\b", code)),
        "ex2": len(re.findall(r"\bMUFU\.EX2\b", code)),
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/ +\S", code)),
    }


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The machine code and the resource usage, by the tool that Triton's wheel carries."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = [
            subprocess.run([str(tool), flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-sass", "-res-usage")
        ]
    return run[0].stdout, run[1].stdout + run[1].stderr


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(lambda row: compile_row(*row), json.loads(sys.argv[1])):
            print(json.dumps(result), flush=True)
