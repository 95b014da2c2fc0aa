"""The start and the end of a process that torchrun has started.

`together` joins the processes, runs train.py's main and leaves. Rank 0 prints; the standard output of the others is
dropped. An error that all have is printed once; one that a single process has names its rank and machine. Where others
end or do not answer, the message says which, and what of the run is saved (`naming_saved`).
"""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import NoReturn

import torch
import torch.distributed as dist

from errors import LOST, UserError
from parallel.processes import has_group, is_first, launcher, rank, this_rank, world_size
from parallel.watch import PATIENCE, Watch, find_lost, get, within

# What gloo's errors begin with; those of NCCL and of the store have classes of their own.
GLOO = re.compile(r"\[[^\]]*\bgloo/")
GIVEN_UP = "given up"  # key of a store


class LostContact(UserError):
    """Another process has ended or does not answer."""

    exit_code, may_retry = LOST, True


class EndedBefore(UserError):
    """torchrun has started this process again, after an error that would come again."""


def has_launcher() -> bool:
    """Whether torchrun, or a program with its environment variables, has started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def together(action: Callable[[], int], device: str, timeout: float) -> int:
    """The exit code of `action`, run in all processes that torchrun has started, or in this one alone. device: the
    option; timeout: seconds for which an operation waits for the others. Raises UserError."""
    if not has_launcher():
        if launcher() is not None:
            Watch(None).start()
        return action()
    watch = Watch(join(device, timeout))
    watch.start()
    sys.excepthook = partial(end_with_traceback, watch)
    try:
        with naming_saved(lambda: ""):
            code = action()
    except UserError as error:
        fail(error, watch)
    dist.destroy_process_group()
    if not watch.end():
        sys.stdout.flush()
        os._exit(code)
    return code


def join(device: str, timeout: float) -> dist.Store:
    """Joins the process group: gloo for tensors on the CPU, and NCCL for those on GPUs. Returns the store through which
    the processes have found each other. Raises UserError."""
    launcher()
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    try:
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, number, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        refuse_repetition(store)
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # torchrun may keep the store for the processes that it starts again; on many machines it counts restarts
            # differently on each, and README's command makes it take a new store
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes could not be joined: {reason}; start them with torchrun, no more than the machine has GPUs"
        ) from error
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    return store


def refuse_repetition(store: dist.Store) -> None:
    """Raises EndedBefore where the processes that torchrun starts again with this store had an error of the user: with
    --max-restarts it starts them after any."""
    store = shared(store)
    if store.check([GIVEN_UP]):
        code, _, text = store.get(GIVEN_UP).decode().partition(" ")
        error = EndedBefore(f"torchrun has started again, but this would fail as before: {text}")
        error.exit_code = int(code)
        raise error


def give_up(store: dist.Store, error: UserError) -> None:
    """Leaves an error for the processes that torchrun starts again."""
    shared(store).set(GIVEN_UP, f"{error.exit_code} {str(error).partition(chr(10))[0]}")


def shared(store: dist.Store) -> dist.Store:
    """The store of all attempts, without the prefix of this one."""
    while (below := getattr(store, "underlying_store", None)) is not None:
        store = below
    return store


@contextmanager
def naming_saved(saved: Callable[[], str]) -> Iterator[None]:
    """A context that raises LostContact where an operation of torch.distributed fails because another process has ended
    or does not answer, with what `saved()` tells of the run."""
    try:
        yield
    except RuntimeError as error:
        if not (has_group() and is_lost_contact(error)):
            raise
        if re.search("time(d )?out", str(error), re.IGNORECASE):
            traceback.print_tb(error.__traceback__)  # where this process has waited
        found = re.sub(r"^.*\[[^\]]*\bgloo/[^\]]*\] |\. This is typically .*|\n.*", "", str(error), flags=re.DOTALL)[
            :300
        ]
        reason = f"lost contact with another process ({found.strip()})"
        raise LostContact("; ".join(filter(None, [reason, saved()]))) from None


def is_lost_contact(error: RuntimeError) -> bool:
    """Whether an operation of torch.distributed failed because another process has ended or does not answer."""
    return isinstance(error, dist.DistError) or bool(GLOO.search(str(error)))


def fail(error: UserError, watch: Watch) -> NoReturn:
    """Prints the error, once where all processes have the same, and ends this process without waiting for others. What
    they have to tell is asked for within a few seconds."""
    watch.is_leaving = True
    store, text = watch.store, str(error)
    if isinstance(error, LostContact):
        nothing = f"nothing is heard of rank 0 on {os.environ['MASTER_ADDR']}, or of its torchrun", False
        lost, is_told = (store and within(2 * PATIENCE, lambda: find_lost(store))) or nothing
        if lost:
            text = f"{lost}\n{text}"
        if not is_told:
            say(text)
        os._exit(LOST)
    is_alike = bool(store and within(PATIENCE, lambda: tell(store, text)))
    if store is not None and not error.may_retry:
        within(PATIENCE, lambda: give_up(store, error))
    if is_first() or not is_alike:
        say(text if is_alike else f"{this_rank()}: {text}")
    time.sleep(1)  # others read it in a store that may be kept by this process
    os._exit(error.exit_code)


def tell(store: dist.Store, text: str) -> bool:
    """Leaves the error of this process for the others. Returns whether they have the same: the last rank for rank 0,
    and that for the others."""
    store.set(f"error/{rank()}", text)
    store.compare_set("ended", "", f"{this_rank()} has ended: {text}")
    return get(store, f"error/{world_size() - 1 if is_first() else 0}", PATIENCE / 2) == text


def say(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


def end_with_traceback(
    watch: Watch, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> NoReturn:
    """In place of Python's way to end with an unexpected exception, in which libraries may wait for other processes."""
    watch.is_leaving = True
    text = "".join(traceback.format_exception(kind, error, trace))
    last, store = text.splitlines()[-1], watch.store
    print(f"{text}{this_rank()} ends with this exception", file=sys.stderr, flush=True)
    if store is not None:
        within(PATIENCE, lambda: tell(store, last))
    os._exit(1)
