"""Device, dtype, threads and memory: what `auto` resolves to, and why.

The caller prints the reasons and stores the choices. Knows neither data nor training, and of the model only its
attention paths.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from common.devices import vendor_flops
from common.options import HardwareOptions
from errors import UserError
from model import MAX_FUSED_HEAD, AttentionPath
from parallel.processes import holders, local_rank, local_world_size, world_size


@dataclass(frozen=True)
class Hardware:
    """The resolved choices. reasons: option name → reason, for each that was `auto`."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    reasons: dict[str, str]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def describe(self) -> str:
        name = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else platform.processor() or platform.machine()
        )
        tf32 = " (TF32 products)" if self.device.type == "cuda" and self.dtype == torch.float32 else ""
        threads = f"{self.threads} thread" + "s" * (self.threads != 1)
        return f"device {self.device} ({name}), {self.dtype_name}{tf32}, {threads}"

    def autocast(self) -> AbstractContextManager[object]:
        """torch.autocast to `dtype`; a null context for float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def peak_flops(self) -> float | None:
        """16-bit FLOP/s of the device from its data sheet; None for float32 and for devices not in the table."""
        if self.device.type != "cuda" or self.dtype == torch.float32:
            return None
        return vendor_flops(torch.cuda.get_device_name(self.device))

    def memory_bytes(self) -> int:
        """Peak memory so far: of a CUDA device, else of the process (0 where the system does not report it)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ImportError:  # Windows
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024


def choose_hardware(options: HardwareOptions, *, generating: bool = False) -> Hardware:
    """Resolves `auto` by probing, checks explicit choices and sets torch's threads. Raises UserError.

    generating: for decoding. A CPU then stays in float32: a decode step reads each weight once, so converting it
    under autocast costs more than it saves.
    """
    reasons = {}
    name = options.device
    if name == "auto":
        if torch.cuda.is_available():
            name, reasons["device"] = "cuda", "CUDA is available"
        elif torch.backends.mps.is_available():
            name, reasons["device"] = "mps", "no CUDA, but MPS is available"
        else:
            name, reasons["device"] = "cpu", "neither CUDA nor MPS is available"
    if world_size() > 1:
        name = _own_device(name)
    device = _check_device(name)
    if options.dtype != "auto":
        dtype = getattr(torch, options.dtype)
    elif device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if native else torch.float16
        reasons["dtype"] = "the GPU has bfloat16" if native else "the GPU has no bfloat16"
    elif device.type == "cpu" and not generating and _cpu_multiplies_bfloat16():
        dtype, reasons["dtype"] = torch.bfloat16, "this CPU multiplies bfloat16 natively"
    else:
        dtype, reasons["dtype"] = torch.float32, f"16-bit products are not faster on {device.type}"
    if dtype == torch.float16 and device.type == "cpu":
        raise UserError("--dtype=float16 needs a GPU; on a CPU use --dtype=float32 or --dtype=bfloat16")
    if options.threads != "auto":
        torch.set_num_threads(options.threads)
    elif world_size() > 1:  # torchrun sets one thread for each process, however many cores there are
        torch.set_num_threads(max(1, usable_cores() // local_world_size()))
        reasons["threads"] = "the cores, divided over the processes of a machine"
    else:
        reasons["threads"] = "torch's default"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    hardware = Hardware(device, dtype, torch.get_num_threads(), reasons)
    _require_alike(hardware)
    return hardware


@dataclass(frozen=True)
class Choice:
    """The resolved value of one option. reasons: option name → reason, if it was `auto`."""

    value: Any
    reasons: dict[str, str]


def choose_attention(
    option: AttentionPath | Literal["auto"], device: torch.device, dtype: torch.dtype, head_size: int
) -> Choice:
    """The attention path of a model that computes in dtype on the device. Raises UserError if "triton" is requested and
    cannot run."""
    if option == "sdpa":
        return Choice("sdpa", {})
    obstacle = triton_obstacle(device, (8, 0))
    if head_size > MAX_FUSED_HEAD:
        obstacle = f"the kernel takes head sizes up to {MAX_FUSED_HEAD}, this model has {head_size}"
    if option == "triton":
        if obstacle is not None:
            raise UserError(f"--attention=triton: {obstacle}; use --attention=auto")
        return Choice("triton", {})
    if obstacle is None and dtype not in (torch.bfloat16, torch.float16):  # it runs, but far slower
        obstacle = f"its {str(dtype).removeprefix('torch.')} products are exact, without tensor cores"
    if obstacle is None and device.type == "cuda":
        return Choice("triton", {"attention": "the fused kernel runs here"})
    return Choice("sdpa", {"attention": f"no fused kernel: {obstacle or 'its interpreter is for tests'}"})


def triton_obstacle(device: torch.device, capability: tuple[int, int]) -> str | None:
    """Why Triton cannot run on the device, or None. capability: the lowest one of an NVIDIA GPU that works."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run as Python on any device, for tests
    if device.type != "cuda" and not interpreted:
        return f"Triton needs a GPU, the device is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted:
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < capability:
        return f"the GPU has compute capability {torch.cuda.get_device_capability(device)}, {capability} is needed"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "there is no C compiler, which Triton needs"
    return None


def _cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has avx512_bf16 or AMX. Without them bfloat16 products are several times slower than float32."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text(errors="replace").split()) if cpuinfo.exists() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def _require_alike(hardware: Hardware) -> None:
    """Raises UserError, in all of several processes, where they would compute on other kinds of devices or in other
    dtypes."""
    kinds = holders((hardware.device.type, hardware.dtype_name))
    if len(kinds) > 1:
        found = ", ".join(f"{where} has {device}, {dtype}" for (device, dtype), where in kinds.items())
        raise UserError(f"the processes would not compute alike ({found}): give --device and --dtype that all have")


def usable_cores() -> int:
    """CPU cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def _own_device(name: str) -> str:
    """The device of this one of several processes, each of which has one. Raises UserError."""
    if name in ("cuda", "cuda:0"):  # the second is stored by a run of one process
        return f"cuda:{local_rank()}"
    if name != "cpu":
        raise UserError(f"--device={name} with {world_size()} processes: use --device=cuda, one GPU each, or cpu")
    return name


def _check_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device={name}: unknown device; expected auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(
            f"--device={name}: this machine has {torch.cuda.device_count()} CUDA devices; try --device=auto"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device=mps: this machine has no MPS; try --device=auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device={name}: Sprout runs on cpu, cuda and mps; try --device=auto")
    return device


def require_determinism() -> None:
    """Makes GPU operations deterministic, or raise where they cannot be. Call it before the first one runs."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    torch.use_deterministic_algorithms(True)


def tune_allocator() -> bool:
    """Makes glibc's malloc keep freed memory, so that large activations are not page-faulted in again. True on success.

    Without it each new 16 MB tensor costs 4,096 page faults (bench/NOTES.md). Call it before the first large tensor. It
    costs some hundred MiB of resident memory. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX of malloc.h
    settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 256 << 20))
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in settings)
