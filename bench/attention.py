"""The fused attention kernels against SDPA, pinned to each of its backends, and FlexAttention. Needs a CUDA GPU.

    python bench/attention.py --out=DIR                everything, under 8 minutes: DIR/DATE-attention.json and its .png
    python bench/attention.py --out=DIR --quick        two lengths, one head size, about a minute
    python bench/attention.py --out=DIR --parts=speed --lengths=1024,4096 --contenders=triton,flash,cudnn
    python bench/attention.py --plot=DIR/RESULT.json   draws a result again, on any machine; needs matplotlib
    python bench/attention.py --interpret              tries this script out without a GPU: tiny, written only to --out

Parts: `errors`, `speed`, and `signatures`: three gradients, which autograd concatenates, or one packed.

Timed: causal attention in bfloat16 on normal random numbers, 16k tokens, heads · head size = 2048; the forward pass as
in training, and the backward pass alone, by torch.autograd.grad on a retained graph. Every contender gets q, k, v
(B, T, H, D) in a layout that it takes without a copy: ours views of a packed (B, T, 3H, D) tensor, the others
contiguous tensors. `flex` is FlexAttention's Triton kernel, `flex_flash` its FlashAttention (BACKEND: FLASH), where
that is installed. They take turns (bench/gpu.py); figures are medians. TFLOP/s count 4 · B · H · T² · D / 2 for the
forward pass and 2.5 times that for the backward pass, whatever a contender computes.

`memory_mib` is the peak of a run beyond what was allocated before it: inputs, and before a backward pass all that was
saved for it. Errors are relative to attention in float64 on the same rounded inputs: ‖x − exact‖ / ‖exact‖.

Reading order: Problem, the contenders, measure, errors, signatures, main; then bench/attention_report.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script finds only what lies beside it

import torch  # noqa: E402
import torch._functorch.config as functorch_config  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.attention_report import obstacles, plot, show, show_speed, table, with_ratios  # noqa: E402
from bench.gpu import (  # noqa: E402
    Deadline,
    OutOfTime,
    Run,
    card,
    ceilings,
    choose_device,
    in_turns,
    peak_memory,
    reasons,
    some,
    summary,
    use_launches,
)
from bench.hardware import RESULTS, commit_of, hardware, new_result, save_results  # noqa: E402
from errors import UserError, run_script  # noqa: E402
from model import (  # noqa: E402
    AttentionContext,
    attention,
    dense_mask,
    fused_attention,
    launch_kernel,
    launches_for,
    rotary_table,
    rotate,
)

PARTS = ("errors", "speed", "signatures")
LENGTHS, HEAD_SIZES, TOKENS, CHANNELS = (512, 1024, 2048, 4096, 8192, 16384), (64, 128), 16384, 2048
Attend = Callable[..., Tensor]  # the leaves → (B, T, H, D)


@dataclass(frozen=True)
class Problem:
    """Shapes, and `first`: first_visible (B, T) int32 as in AttentionContext, or None for plain causal attention."""

    name: str
    B: int
    T: int
    H: int
    D: int
    device: torch.device
    first: Tensor | None = None

    def flops(self, direction: str) -> float:
        """By the convention above; with `first`, the pairs that are really seen take the place of T² / 2 a row."""
        pairs = self.B * self.T**2 / 2
        if self.first is not None:
            pairs = float((torch.arange(1, self.T + 1, device=self.device) - self.first.clamp(min=0)).sum())
        return (4 if direction == "forward" else 10) * self.H * self.D * pairs

    def random(self, heads: int) -> Tensor:
        return torch.randn(self.B, self.T, heads, self.D, device=self.device, dtype=torch.bfloat16)


# ---- The contenders: each makes the attention function of a problem --------------------------------------------------


def ours(problem: Problem) -> Attend:
    context = AttentionContext("triton", first_visible=problem.first)
    return lambda q, k, v: attention(q, k, v, context, layer=0)


def sdpa(backend: str, problem: Problem) -> Attend:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mask = dense_mask(problem.first)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)

    return attend


def flex(problem: Problem, backend: str | None = None) -> Attend:
    """Compiled, as it is meant to be used; its table of visible blocks is made here, outside the timed runs."""
    from torch.nn.attention import flex_attention as flex
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    first, T = problem.first, problem.T
    if backend is not None and (problem.device.type != "cuda" or not hasattr(flex, "_Backend")):
        raise NotImplementedError(f"BACKEND: {backend} needs a GPU and a torch that has this option")
    if backend == "FLASH" and not has_cute():
        raise NotImplementedError("BACKEND: FLASH needs the package flash-attn with flash_attn.cute")
    options: Any = None if backend is None else {"BACKEND": backend}

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key if first is None else (query >= key) & (key >= first[b, query])

    mask = create_block_mask(visible, None if first is None else problem.B, None, T, T, device=problem.device.type)
    functorch_config.donated_buffer = False  # the backward pass runs many times on one graph
    kernel = torch.compile(flex_attention, dynamic=False) if problem.device.type == "cuda" else flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return kernel(q, k, v, block_mask=mask, kernel_options=options).transpose(1, 2)

    return attend


def has_cute() -> bool:
    """Asked before, since torch finds out after seconds of compiling, for every problem anew."""
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        return False


CONTENDERS: dict[str, Callable[[Problem], Attend]] = {
    "triton": ours,
    "flash": partial(sdpa, "FLASH_ATTENTION"),
    "cudnn": partial(sdpa, "CUDNN_ATTENTION"),
    "efficient": partial(sdpa, "EFFICIENT_ATTENTION"),
    "flex": flex,
    "flex_flash": partial(flex, backend="FLASH"),
    "math": partial(sdpa, "MATH"),  # last: it may fill the memory
}


def leaves_of(problem: Problem) -> dict[str, list[Tensor]]:
    """The same random q, k, v for every contender: views of a packed projection for ours, else contiguous."""
    views = [x.detach().requires_grad_() for x in problem.random(3 * problem.H).split(problem.H, dim=2)]
    parts = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in views]
    return {name: views if name == "triton" else parts for name in CONTENDERS}


# ---- Speed and memory ------------------------------------------------------------------------------------------------


def measure(problem: Problem, contenders: list[str], seconds: float) -> list[dict[str, Any]]:
    """A row per direction and contender: time, TFLOP/s, memory, or why it did not run. `seconds`: of timed runs."""
    torch.compiler.reset()  # beyond its limit of recompilations torch runs further shapes uncompiled, without an error
    names = [name for name in contenders if name != "math" or problem.first is None]
    inputs, grad = leaves_of(problem), problem.random(problem.H)
    forward: dict[str, Callable[[], Any]] = {}

    def prepare_forward(name: str) -> Callable[[], Any]:
        forward[name] = partial(CONTENDERS[name](problem), *inputs[name])
        return forward[name]

    def prepare_backward(name: str) -> Callable[[], Any]:
        out = forward[name]()
        upstream = torch.empty_like(out).copy_(grad)  # in the layout of out, so that no contender copies it
        return partial(torch.autograd.grad, out, inputs[name], upstream, retain_graph=True)

    rows = []
    for direction, prepare in (("forward", prepare_forward), ("backward", prepare_backward)):
        where = {"problem": problem.name, "T": problem.T, "D": problem.D, "direction": direction}
        runs, memory, refused = warm({name: partial(prepare, name) for name in names}, problem.device)
        for name, times in timed(runs, seconds / 2, problem.device).items():
            tflops = round(problem.flops(direction) / statistics.median(times) / 1e12, 1)
            rows.append({**where, "contender": name, **summary(times), "tflops": tflops, "memory_mib": memory[name]})
        rows += [{**where, "contender": name, "unavailable": reason} for name, reason in refused.items()]
        names = list(runs)
    return with_ratios(rows)


def warm(
    prepare: dict[str, Callable[[], Run]], device: torch.device
) -> tuple[dict[str, Run], dict[str, float], dict[str, str]]:
    """Makes the runs and calls each a few times; the first call compiles → runs, memory in MiB, reasons of failures."""
    runs: dict[str, Run] = {}
    memory: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name in prepare:
        with reasons(refused, name):
            run = prepare[name]()
            for _ in range(3 if device.type == "cuda" else 0):  # there is nothing to warm up in the interpreter
                run()
            memory[name] = round(peak_memory(run, device) / 2**20, 1)
            runs[name] = run
    return runs, memory, refused


def timed(runs: dict[str, Run], seconds: float, device: torch.device) -> dict[str, list[float]]:
    """As many rounds as fit into the seconds, 5 … 50; one in the interpreter."""
    if device.type != "cuda":
        return in_turns(runs, 1, device)
    one = sum(sum(times) for times in in_turns(runs, 1, device).values())
    return in_turns(runs, max(5, min(50, int(seconds / max(one, 1e-9)))), device)


# ---- Errors ----------------------------------------------------------------------------------------------------------


def errors(problem: Problem, contenders: list[str]) -> list[dict[str, Any]]:
    """A row per contender: errors of out, dq, dk, dv relative to float64, and their largest ratio to flash's."""
    inputs, grad = leaves_of(problem), problem.random(problem.H)

    def results(leaves: list[Tensor], attend: Attend) -> list[Tensor]:
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    def by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        future = torch.ones(problem.T, problem.T, dtype=torch.bool, device=problem.device).triu(1)
        return (torch.softmax((q @ k.mT / math.sqrt(problem.D)).masked_fill(future, -math.inf), -1) @ v).transpose(1, 2)

    exact = results([x.detach().double().requires_grad_() for x in inputs["math"]], by_definition)
    rows: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for name in contenders:
        with reasons(refused, name):
            found = results(inputs[name], CONTENDERS[name](problem))
            pairs = zip(("out", "dq", "dk", "dv"), found, exact, strict=True)
            rows[name] = {part: float((mine.double() - true).norm() / true.norm()) for part, mine, true in pairs}
    for row in rows.values():
        if flash := rows.get("flash"):
            row["of_flash"] = round(max(row[part] / flash[part] for part in ("out", "dq", "dk", "dv")), 3)
    rows |= {name: {"unavailable": reason} for name, reason in refused.items()}
    return [{"T": problem.T, "D": problem.D, "contender": name, **row} for name, row in rows.items()]


# ---- The form of the inputs ------------------------------------------------------------------------------------------


@torch.library.custom_op("bench::packed_attention", mutates_args=())
def packed_attention(qk: Tensor, v: Tensor | None, n_head: int) -> tuple[Tensor, Tensor]:
    """The kernel on packed inputs: qk (B, T, 3H, D) with the values, or (B, T, 2H, D) and v (B, T, H, D) → out, lse."""
    return fused_attention(*heads(qk, v, n_head), None)


@torch.library.custom_op("bench::packed_attention_backward", mutates_args=())
def packed_backward(do: Tensor, qk: Tensor, v: Tensor | None, out: Tensor, lse: Tensor, n_head: int) -> list[Tensor]:
    """Gradients packed like the inputs: the kernels write into views of them, so autograd concatenates nothing."""
    d_qk, delta, do = (
        torch.empty_like(qk, memory_format=torch.contiguous_format),
        torch.empty_like(lse),
        do.contiguous(),
    )
    d_v = None if v is None else torch.empty_like(d_qk)[:, :, :n_head]  # the kernel takes the strides of dk for dv
    (q, k, values), (dq, dk, dv) = heads(qk, v, n_head), heads(d_qk, d_v, n_head)
    _, by_query, by_key = launches_for(q, k, values)
    launch_kernel("query_gradient", by_query, q, k, values, None, out, lse, do, delta, dq)
    launch_kernel("key_value_gradient", by_key, q, k, values, None, lse, do, delta, dk, dv)
    return [d_qk] if d_v is None else [d_qk, d_v.contiguous()]


def heads(qk: Tensor, v: Tensor | None, n_head: int) -> list[Tensor]:
    return [*qk.split(n_head, dim=2), *([] if v is None else [v])]


@packed_attention.register_fake
def _(qk: Tensor, v: Tensor | None, n_head: int) -> tuple[Tensor, Tensor]:
    B, T, _, D = qk.shape
    return qk.new_empty((B, T, n_head, D)), qk.new_empty((B, n_head, T), dtype=torch.float32)


@packed_backward.register_fake
def _(do: Tensor, qk: Tensor, v: Tensor | None, *saved: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (qk, v) if x is not None]


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qk, v, ctx.n_head = inputs
    ctx.save_for_backward(qk, v, *output)
    ctx.mark_non_differentiable(output[1])


def differentiate(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
    d_qk, *d_v = packed_backward(do, *ctx.saved_tensors, ctx.n_head)
    return d_qk, d_v[0] if d_v else None, None


packed_attention.register_autograd(differentiate, setup_context=save_for_backward)


def signatures(problem: Problem) -> list[dict[str, Any]]:
    """Forward and backward pass together, from the packed projection to its gradient: the operator of model.py, whose
    three gradients autograd concatenates, beside one with packed gradients.

    Learned positions: q, k, v are views of the projection. Rotary: only the values are; the rotation writes queries and
    keys.
    """
    H, device = problem.H, problem.device
    context = AttentionContext("triton")
    table = rotary_table(problem.T, problem.D, 10_000.0).to(device)

    def three_rotated(x: Tensor) -> Tensor:
        qk, v = x.split((2 * H, H), dim=2)
        return attention(*rotate(qk, table).split(H, dim=2), v, context, layer=0)

    def packed_rotated(x: Tensor) -> Tensor:
        qk, v = x.split((2 * H, H), dim=2)
        return packed_attention(rotate(qk, table), v, H)[0]

    forms: dict[str, Attend] = {
        "learned, three gradients": lambda x: attention(*x.split(H, dim=2), context, layer=0),
        "learned, packed gradient": lambda x: packed_attention(x, None, H)[0],
        "rotary, three gradients": three_rotated,
        "rotary, packed gradients": packed_rotated,
    }
    torch.compiler.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    forms |= {
        f"{name}, compiled": torch.compile(form, fullgraph=True, dynamic=False, backend=backend)
        for name, form in forms.items()
    }
    x, grad = problem.random(3 * H).requires_grad_(), problem.random(H)

    def step(form: Attend) -> object:
        return torch.autograd.grad(form(x), x, grad)

    steps = {name: partial(partial, step, form) for name, form in forms.items()}  # name → function that makes the run
    runs, memory, refused = warm(steps, device)
    rows: list[dict[str, Any]] = [
        {"form": name, **summary(times), "memory_mib": memory[name]} for name, times in timed(runs, 2.0, device).items()
    ]
    shape = {"B": problem.B, "T": problem.T, "H": H, "D": problem.D}
    return [
        {**shape, **row} for row in rows + [{"form": name, "unavailable": reason} for name, reason in refused.items()]
    ]


# ---- The whole run ---------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    if arguments.plot is not None:
        print(f"written: {plot(arguments.plot)}")
        return 0
    device = choose_device("bench/attention.py", "--interpret", arguments.interpret)
    rows = use_launches(arguments.launches, device)
    torch.manual_seed(1337)
    deadline = Deadline(arguments.minutes)
    figures: dict[str, Any] = {
        "bench": "attention",
        "commit": commit_of(ROOT),
        "hardware": {**hardware(), **card(device)},
        "launches": rows,
        "dtype": "bfloat16",
        "ceilings": ceilings(device),
        "errors": [],
        "speed": [],
        "signatures": [],
        "failed": {},
    }
    print({**figures["hardware"], **figures["ceilings"]})
    path = None if device.type == "cpu" and arguments.out is None else new_result("attention", arguments.out or RESULTS)
    try:
        for part, function, problems in plan(arguments, device):
            for problem in problems:
                deadline.check()
                with reasons(figures["failed"], f"{part} of {problem.name}, T={problem.T}, D={problem.D}"):
                    figures[part] += (rows := function(problem))
                    (show_speed if part == "speed" else show)(rows)
                if path is not None:
                    save_results(path, figures)
    except OutOfTime:
        figures["stopped"] = "out of time; what is missing was not measured"
        print(figures["stopped"])
    finish(figures, path)
    return 0


def finish(figures: dict[str, Any], path: Path | None) -> None:
    """Prints what did not run and the tables; writes the figures and their plot."""
    print(*obstacles(figures["speed"]), *(f"{what}: {reason}" for what, reason in figures["failed"].items()), sep="\n")
    for direction in ("forward", "backward"):
        for D in HEAD_SIZES:
            print(table(figures["speed"], direction, D), end="")
    if path is None:
        print("interpreted on the CPU: the script works; the timings mean nothing and nothing is written")
        return
    save_results(path, figures)
    print(f"written: {path}")
    try:
        print(f"written: {plot(path)}")
    except UserError as error:
        print(error)


def plan(
    arguments: argparse.Namespace, device: torch.device
) -> list[tuple[str, Callable[[Problem], list[dict[str, Any]]], list[Problem]]]:
    """What to measure: part, its function, its problems."""
    measure_these = partial(measure, contenders=arguments.contenders, seconds=0.5 if arguments.quick else 2.0)
    lengths, sizes = arguments.lengths, arguments.head_sizes
    work = {
        "errors": (partial(errors, contenders=arguments.contenders), error_problems(device, sizes)),
        "speed": (measure_these, speed_problems(device, lengths, sizes)),
        "signatures": (signatures, signature_problems(device)),
    }
    return [(part, *work[part]) for part in arguments.parts]


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the figures (default: bench/results)")
    parser.add_argument("--quick", action="store_true", help="errors and speed of two lengths and one head size")
    parser.add_argument("--parts", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--lengths", help="values of T; documents and windows are measured where it holds 8192")
    parser.add_argument("--head_sizes", help="some of 64,128")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="default: all of them")
    parser.add_argument("--launches", type=Path, help="use the launches of this result of bench/tune_attention.py")
    parser.add_argument(
        "--minutes",
        type=float,
        help="after this long (7, quick 1) nothing new is begun, and what there is gets written",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="RESULT", help="draw a result's JSON beside it, and measure nothing"
    )
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="try the script out on a CPU, in tiny sizes; also with TRITON_INTERPRET=1",
    )
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    arguments.minutes = arguments.minutes or (1.0 if quick else 7.0)
    arguments.parts = some(arguments.parts, PARTS[: 2 if quick else 3], PARTS, "parts")
    arguments.contenders = some(arguments.contenders, (), tuple(CONTENDERS), "contenders")
    sizes = some(arguments.head_sizes, ("64",) if quick else ("64", "128"), ("64", "128"), "head_sizes")
    arguments.head_sizes = [int(size) for size in sizes]
    lengths = [str(2**power) for power in range(6, 18)]
    found = some(arguments.lengths, ("1024", "4096") if quick else tuple(map(str, LENGTHS)), lengths, "lengths")
    arguments.lengths = [int(length) for length in found]
    return arguments


def error_problems(device: torch.device, sizes: list[int]) -> list[Problem]:
    if device.type == "cpu":
        return [Problem("errors", 1, 32, 2, 16, device)]
    return [Problem("errors", 1, 1024, CHANNELS // D, D, device) for D in sizes]


def signature_problems(device: torch.device) -> list[Problem]:
    """The attention of the 124M presets, and a long context."""
    if device.type == "cpu":
        return [Problem("signatures", 1, 32, 2, 16, device)]
    return [Problem("signatures", B, T, 12, 64, device) for B, T in ((32, 1024), (4, 8192))]


def speed_problems(device: torch.device, lengths: list[int], sizes: list[int]) -> list[Problem]:
    """Plain causal attention, long contexts of the head size 64 first; then documents and a window at T = 8192."""
    if device.type == "cpu":
        return [
            Problem("causal", 1, 32, 2, 16, device),
            Problem("documents", 1, 32, 2, 16, device, documents(1, 32, 10, device)),
        ]
    found = [Problem("causal", max(1, TOKENS // T), T, CHANNELS // D, D, device) for D in sizes for T in lengths]
    B, T = TOKENS // 8192, 8192
    masks = {"documents of about 1000": documents(B, T, 1000, device), "window of 1024": window(B, T, 1024, device)}
    return found + [
        Problem(name, B, T, CHANNELS // D, D, device, first)
        for D in sizes
        for name, first in masks.items()
        if T in lengths
    ]


def documents(B: int, T: int, mean: int, device: torch.device) -> Tensor:
    """(B, T) int32: documents of mean / 2 … 3 · mean / 2 tokens, each seen from its start on."""
    generator = torch.Generator().manual_seed(mean)
    first = torch.zeros(B, T, dtype=torch.int32)
    for row in first:
        start = 0
        while (start := start + int(torch.randint(mean // 2, 3 * mean // 2 + 1, (), generator=generator))) < T:
            row[start:] = start
    return first.to(device)


def window(B: int, T: int, size: int, device: torch.device) -> Tensor:
    """(B, T) int32: each token sees itself and those before it, `size` in all."""
    return (torch.arange(T, device=device, dtype=torch.int32) - (size - 1)).clamp(min=0).expand(B, T).contiguous()


if __name__ == "__main__":
    run_script(main)
