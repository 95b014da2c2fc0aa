"""torch.compile on a CPU, made cheap: where it works, where its code is kept, and three shortcuts through its compiler.

Inductor, the compiler behind torch.compile, writes a C++ file for every kernel. Each of them includes PyTorch's vector
headers, which take g++ three seconds, so it first precompiles those, and it compiles five programs to find out which
vector instructions the C++ compiler knows. For a small model that is most of its time. `shorten_inductor` puts all
kernels of a graph into one file, compiles the graphs of forward and backward pass side by side, and asks about the
instructions once. It uses names of Inductor that are not public; where one is missing, Inductor does it its own way,
which takes longer (bench/NOTES.md).

Compiled code is read from the user's cache folder alone, never from a run or a model.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

POINTER, SIZES = ctypes.c_void_p, {"int64_t": ctypes.c_int64, "long": ctypes.c_int64, "float": ctypes.c_float}


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor calls: $CXX, else g++; None where there is none."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


@cache
def compiler_version() -> str:
    """First line of the compiler's --version: the bits of compiled code depend on it."""
    compiler = cpp_compiler()
    if compiler is None:
        return "none"
    shown = subprocess.run([compiler, "--version"], capture_output=True, text=True, errors="replace", check=False)
    return (shown.stdout.splitlines() or [compiler])[0]


def cache_folder(threads: int) -> Path:
    """Where compiled code is kept: in the user's cache folder, by all that it depends on besides its source."""
    import platformdirs  # here, since a GPU needs no cache of ours

    cpuinfo = Path("/proc/cpuinfo")
    flags = (
        re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(errors="replace"), re.M)[:1]
        if cpuinfo.exists()
        else []
    )
    facts = [torch.__version__, sys.version, platform.machine(), compiler_version(), *flags, threads]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return platformdirs.user_cache_path("sprout", appauthor=False) / f"compiled-{torch.__version__}-{key}"


def use_cache(folder: Path) -> None:
    """Lets Inductor keep its code in the folder. Raises OSError where that cannot be written."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(2**20))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def shorten_inductor() -> None:
    """Applies the three shortcuts to this process, once. Imports the compiler, which takes a second."""
    from torch._functorch import config as functorch_config
    from torch._inductor import async_compile, codecache, cpp_builder, cpu_vec_isa
    from torch._inductor import config as inductor_config

    if hasattr(cpu_vec_isa.VecISA, "check_build") and _compiler_knows_this_cpu():
        setattr(cpu_vec_isa.VecISA, "check_build", lambda self, code: True)  # noqa: B010
    if hasattr(functorch_config, "force_non_lazy_backward_lowering"):
        functorch_config.force_non_lazy_backward_lowering = True  # so that both graphs' C++ is compiled at once
    inductor_config.cpp.use_decompose_tanh = True  # by exp: GELU takes half as long, and its tanh is added to 1
    # a damaged entry of the cache is a miss, not a page of warnings
    logging.getLogger("torch._inductor.codecache").setLevel(logging.ERROR)
    needed = [
        (async_compile.AsyncCompile, "cpp_pybinding"), (async_compile, "get_compile_threads"),
        (codecache, "LambdaFuture"), (cpu_vec_isa, "pick_vec_isa"), (cpp_builder, "CppTorchDeviceOptions"),
    ]  # fmt: skip
    if sys.platform != "win32" and all(hasattr(place, name) for place, name in needed):  # MSVC has other flags
        setattr(async_compile.AsyncCompile, "cpp_pybinding", _add_kernel)  # noqa: B010


@cache
def _compiler_knows_this_cpu() -> bool:
    """Whether the C++ compiler takes the flags of the vector instructions that this CPU has."""
    from torch._inductor.cpu_vec_isa import supported_vec_isa_list, x86_isa_checker

    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    mine = x86_isa_checker()
    best = next((isa for isa in supported_vec_isa_list if all(part in mine for part in str(isa).split())), None)
    if best is None:
        return False
    flags = [*best.build_arch_flags().split(), *(["-mavx512bf16"] if "avx512" in str(best) else [])]
    command = [str(cpp_compiler()), *flags, "-march=native", "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class KernelLibrary:
    """The kernels of one graph, in one C++ file, compiled in a thread of its own."""

    def __init__(self) -> None:
        self.sources: list[str] = []
        self.library: Future[ctypes.CDLL] | None = None

    def start(self) -> None:
        """Begins to compile; no kernel may be added after that."""
        if self.library is None:
            thread = ThreadPoolExecutor(1)
            self.library = thread.submit(load_library, join_sources(self.sources))
            thread.shutdown(wait=False)

    def function(self, index: int) -> Any:
        """The kernel, once it is compiled. Raises the compiler's error."""
        assert self.library is not None
        return getattr(self.library.result(), f"kernel_{index}")


def join_sources(sources: list[str]) -> str:
    """C++ files that define a function `kernel` → one file that defines kernel_0, kernel_1, …"""
    includes: dict[str, None] = {}
    bodies = []
    for index, source in enumerate(sources):
        lines = source.splitlines()
        includes |= dict.fromkeys(line for line in lines if line.startswith("#include"))
        body = "\n".join(line for line in lines if not line.startswith("#include"))
        bodies.append(re.sub(r'(extern "C"\s+void\s+kernel)\(', rf"\1_{index}(", body))
    return "\n".join([*includes, *bodies])


def load_library(source: str) -> ctypes.CDLL:
    """The shared library of a C++ file, from the cache, or compiled and put there. A file's name has the digest of its
    content, since loading a damaged library can kill the process. Raises OSError, and RuntimeError from the compiler.
    """
    command = compile_command()
    key = hashlib.sha256(f"{command}\n{source}".encode()).hexdigest()[:32]
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    for path in folder.glob(f"{key}-*.so"):
        if path.stem == f"{key}-{file_digest(path)}":
            return ctypes.CDLL(str(path))
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        Path(scratch, "kernels.cpp").write_text(source, "utf-8")
        done = subprocess.run(  # in a session of its own: Ctrl-C stops the run after this, not the compiler
            command, cwd=scratch, capture_output=True, text=True, errors="replace", check=False, start_new_session=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"{command[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
        built = Path(scratch, "kernels.so")
        path = folder / f"{key}-{file_digest(built)}.so"
        os.replace(built, path)
    return ctypes.CDLL(str(path))


def compile_command() -> list[str]:
    """Inductor's command for kernels.cpp → kernels.so. Its own command line breaks at spaces in paths."""
    from torch._inductor.cpp_builder import CppTorchDeviceOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    options = CppTorchDeviceOptions(vec_isa=pick_vec_isa(), device_type="cpu", include_pytorch=False, shared=True)
    command = [options.get_compiler(), "kernels.cpp", "-o", "kernels.so"]
    for prefix, values in (
        ("-D", options.get_definitions()), ("-", options.get_cflags()), ("-I", options.get_include_dirs()),
        ("-", options.get_ldflags()), ("-l", options.get_libraries()), ("-L", options.get_libraries_dirs()),
    ):  # fmt: skip
        command += [
            f"{prefix}{part}" for value in values for part in ([value] if prefix in ("-I", "-L") else value.split())
        ]
    command += [part for value in options.get_passthrough_args() for part in value.split()]
    return [part for part in command if part != "-g1"]  # line numbers for debuggers


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _add_kernel(compilation: Any, argtypes: list[str], source: str) -> Any:
    """In place of AsyncCompile.cpp_pybinding: adds a kernel to its graph's library. Inductor waits for the returned
    future when it has all kernels of the graph; that starts the compiler, and the first call waits for it."""
    from torch._inductor.async_compile import get_compile_threads
    from torch._inductor.codecache import LambdaFuture

    library = compilation.__dict__.setdefault("sprout_library", KernelLibrary())
    index = len(library.sources)
    library.sources.append(source)
    names = [argtype.replace("const ", "") for argtype in argtypes]
    types = [POINTER if "*" in name else SIZES[name] for name in names]

    function: Any = None

    def call(*arguments: Any) -> None:
        nonlocal function
        if function is None:
            library.start()
            function = library.function(index)
            function.argtypes, function.restype = types, None
        function(*[x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments])

    def start_early() -> Callable[..., None]:
        library.start()
        return call

    # with one thread for compiling, as on one core, Inductor waits for no futures
    return LambdaFuture(start_early) if get_compile_threads() > 1 else call
