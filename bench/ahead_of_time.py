"""Compiles the attention kernels without a GPU and reads their machine code, to compare launches before a GPU does.

    python bench/ahead_of_time.py                     a table of LAUNCHES in model.py, and of the tuner's candidates
    python bench/ahead_of_time.py --kernel=forward --head_size=64 --variants   one kernel
    python bench/ahead_of_time.py --jobs='[…]'        jobs as JSON → one line of JSON each (for tests)

A table's columns: registers a thread; programs that fit on one multiprocessor at once; bytes of shared memory; spills
(instructions that move registers to memory); waits for matrix products in the loop, which are asynchronous on Hopper
unless the assembler is short of registers: then it waits after each instruction (`serial`), and they take far longer
than the model says; then, of the loop's blocks without a mask, instructions per score and the
cycles of a block that a multiprocessor needs to issue them (four a cycle), for its matrix products (2,048 multiply-adds
a cycle in 16 bits), for its exponentials (16 a cycle) and to load it from the L2 cache. `cycles` is the model's cost of
8,192 scores: the largest of these four, and of what one program needs by itself divided by the programs. A program
alone waits for its products before it computes exponentials, so only other programs fill the waits. The model knows
Hopper's rates but no latencies: it ranks launches until bench/tune_attention.py has timed them.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script finds only what lies beside it

import model  # noqa: E402
from model import KERNELS, Launch, padded_head  # noqa: E402

TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes that a program may use
SM_SHARED, SM_REGISTERS, SM_WARPS, PROGRAM_SHARED = 228 * 1024, 65_536, 64, 1024  # of a multiprocessor of Hopper
PRODUCTS = {"forward": 2, "query_gradient": 3, "key_value_gradient": 4}  # of a block of scores with a block of numbers
L2_BYTES = 28  # a cycle and multiprocessor, assumed: 6.5 TB/s for all 132
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")


@dataclass(frozen=True)
class Job:
    """What is compiled: masked with documents or a window; `group` query heads a key/value head; whole: T is divisible
    by the blocks, and by 16."""

    kernel: str
    architecture: int
    dtype: str
    head_size: int
    launch: Launch
    masked: bool = False
    group: int = 1
    whole: bool = True


def compile_job(job: Job) -> dict[str, Any]:
    """One ahead-of-time compile, with the alignments that the packed projection of a real model has → shared memory and
    stack in bytes, registers per thread, numbers of machine instructions in all, and of the loop."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    jitted, launch = model._jitted(KERNELS[job.kernel]), job.launch
    element, padded = TYPES[job.dtype], padded_head(job.head_size)
    constants = {
        "D": job.head_size, "BLOCK_D": padded, "BLOCK_Q": launch.block_q, "BLOCK_K": launch.block_k,
        "GROUP": job.group, "DOT": getattr(model.tl, job.dtype), "WHOLE": job.whole, "TMA": launch.tma,
    }  # fmt: skip
    if not job.masked:
        constants["first_ptr"] = None
    described = model.DESCRIBED[job.kernel] if launch.tma else ()
    box = f"tensordesc<{element}[{launch.block_q if job.kernel == 'key_value_gradient' else launch.block_k}, {padded}]>"
    signature, aligned = {}, {}
    for index, name in enumerate(inspect.signature(KERNELS[job.kernel]).parameters):
        if name in constants:
            signature[name] = "constexpr"
        elif name in described:
            signature[name] = box
        elif name.endswith("_ptr"):
            wide = {"first_ptr": "i32", "lse_ptr": "fp32", "delta_ptr": "fp32"}
            signature[name], aligned[index,] = f"*{wide.get(name, element)}", [["tt.divisibility", 16]]
        elif name.startswith("stride") or (name == "T" and job.whole):
            signature[name], aligned[index,] = "i32", [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if name in ("T", "H") else "fp32"
    constants = {name: value for name, value in constants.items() if name in signature}
    source = ASTSource(fn=jitted, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", job.architecture, 32)
    compiled = triton.compile(source, target=target, options=launch.options())
    code, usage = disassemble(compiled.asm["cubin"])
    return {
        "shared": compiled.metadata.shared,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        **count([text for _, text in INSTRUCTION.findall(code)]),
        "loop": count(loop_without_mask(code)),
    }


def count(instructions: list[str]) -> dict[str, int]:
    """Numbers of instructions: in all, spills, tensor-core products of both generations, waits for them, ex2."""
    names = [re.sub(r"^@!?U?P\w+ ", "", text).split()[0].split(".")[0:2] for text in instructions]
    return {
        "instructions": len(names),
        "spills": sum(name[0] in ("STL", "LDL") for name in names),
        "wgmma": sum(name[0] == "HGMMA" for name in names),
        "mma": sum(name[0] == "HMMA" for name in names),
        "waits": sum(name == ["WARPGROUP", "DEPBAR"] for name in names),
        "ex2": sum(name == ["MUFU", "EX2"] for name in names),
    }


def loop_without_mask(code: str) -> list[str]:
    """The instructions of the loop over blocks, without those that it jumps over where a block needs no mask: the first
    loop with matrix products and no such loop in it, and the longest jump ahead before its exponentials."""
    found = [(int(address, 16), text.strip()) for address, text in INSTRUCTION.findall(code)]
    index = {address: number for number, (address, _) in enumerate(found)}
    jumps = {
        number: index[int(match[1], 16)]
        for number, (_, text) in enumerate(found)
        if (match := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)) and int(match[1], 16) in index
    }
    for end, start in jumps.items():
        body = [text for _, text in found[start : end + 1]]
        if start >= end or not any("HGMMA" in text or "HMMA" in text for text in body):
            continue
        ahead = [(a, b) for a, b in jumps.items() if start <= a < b <= end and found[a][1].startswith("@")]
        masks = [(a, b) for a, b in ahead if any("FSEL" in text for _, text in found[a:b])]
        masks = [(a, b) for a, b in masks if not any("MMA" in text for _, text in found[a:b])]
        skipped = {number for a, b in masks for number in range(a + 1, b)}
        return [text for number, (_, text) in enumerate(found[start : end + 1], start) if number not in skipped]
    return []


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


# ---- The model -------------------------------------------------------------------------------------------------------


def cost(job: Job, found: dict[str, Any]) -> dict[str, float]:
    """The columns of the table, for an architecture with Hopper's rates."""
    launch, loop = job.launch, found["loop"]
    scores, padded = launch.block_q * launch.block_k, padded_head(job.head_size)
    registers = -(-found["registers"] // 8) * 8 * 32 * launch.num_warps
    programs = min(
        SM_REGISTERS // registers, SM_SHARED // (found["shared"] + PROGRAM_SHARED), SM_WARPS // launch.num_warps
    )
    issue, products = loop["instructions"] * launch.num_warps / 4, PRODUCTS[job.kernel] * scores * padded / 2048
    if job.kernel == "key_value_gradient" and launch.block_q == 32:
        products *= (
            1.25  # two of the four take (64, 16) numbers from shared memory for 64 × 32 sums, which needs longer
        )
    exponentials = loop["ex2"] * 32 * launch.num_warps / 16
    loaded = 2 * launch.loaded(job.kernel) * padded * 2 / L2_BYTES
    alone = products + max(issue, exponentials)
    cycles = max(issue, products, exponentials, loaded, alone / max(1, programs))
    return {
        "programs": programs,
        "per_score": round(loop["instructions"] * 32 * launch.num_warps / scores, 1),
        "issue": round(issue), "products": round(products), "exponentials": round(exponentials),
        "loaded": round(loaded), "cycles": round(cycles * 8192 / scores),
    }  # fmt: skip


def row(job: Job) -> dict[str, Any]:
    """A job's row of the table, ready for JSON; `error` where it does not compile."""
    from bench.gpu import reasons

    named = {**asdict(job), "launch": list(job.launch)}
    refused: dict[str, str] = {}
    with reasons(refused, "error"):
        found = compile_job(job)
        return {**named, **found, **(cost(job, found) if job.architecture == 90 else {})}
    return {**named, **refused}


def show(found: dict[str, Any]) -> str:
    q, k, warps, stages, tma, maxnreg = found["launch"]
    name = f"{found['kernel']:18} {found['dtype']:8} D={found['head_size']:<3} {q:3}×{k:<3} w{warps} s{stages}"
    name += f" {'tma' if tma else 'ptr'}{'' if maxnreg is None else f' ≤{maxnreg}'}"
    name += (
        " masked" * found["masked"] + " tail" * (not found["whole"]) + f" group {found['group']}" * (found["group"] > 1)
    )
    if "error" in found:
        return f"{name:60}  {found['error']}"
    columns = (
        "registers",
        "programs",
        "shared",
        "spills",
        "per_score",
        "issue",
        "products",
        "exponentials",
        "loaded",
        "cycles",
    )
    serial = "  serial" * (found["loop"]["waits"] > PRODUCTS[found["kernel"]])
    return f"{name:60}{serial}  " + "  ".join(f"{column} {found[column]}" for column in columns if column in found)


def main() -> None:
    from bench.tune_attention import candidates

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", help="jobs as a JSON list; prints a line of JSON for each")
    parser.add_argument("--kernel", choices=list(KERNELS), help="of the table: this kernel alone")
    parser.add_argument("--head_size", type=int, choices=(64, 128), help="of the table: this head size alone")
    parser.add_argument("--variants", action="store_true", help="also masked, grouped, and with a tail")
    arguments = parser.parse_args()
    if arguments.jobs is not None:
        jobs = [Job(**{**job, "launch": Launch(*job["launch"])}) for job in json.loads(arguments.jobs)]
    else:
        jobs = [
            Job(kernel, 90, "bfloat16", D, launch, *variant)
            for kernel in KERNELS
            for D in (64, 128)
            for launch in candidates(kernel, "bfloat16", D)
            for variant in ((False, 1, True), (True, 1, True), (False, 4, True), (True, 4, False))[
                : 4 if arguments.variants else 1
            ]
            if arguments.kernel in (None, kernel) and arguments.head_size in (None, D)
            if not (launch.tma and not variant[2])
        ]
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(row, jobs):
            print(json.dumps(found) if arguments.jobs is not None else show(found), flush=True)


if __name__ == "__main__":
    main()
