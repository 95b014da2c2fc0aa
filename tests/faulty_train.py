"""train.py with a fault, for tests: FAULT=KIND:RANK:STEP happens once in that rank, before that step; KIND is a name
of `FAULTS`, nan, full_disk or kill_in_save (at or after that step). FAULT_MARK: a file that gets the time of it.

    FAULT=kill:1:30 torchrun --nproc-per-node=2 -- tests/faulty_train.py debug --data=text.txt
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

FAULT = os.environ.get("FAULT", "none:0:0")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_launcher() -> None:
    os.kill(os.getppid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_launcher() -> None:
    os.kill(os.getppid(), signal.SIGTERM)


def stop() -> None:
    """Until somebody sends SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep() -> None:
    time.sleep(1e6)


def fail() -> None:
    """As a mistake of our own would."""
    raise ZeroDivisionError("injected")


def refuse() -> None:
    """As a file that only this machine lacks."""
    from errors import UserError

    raise UserError("the file is gone: injected")


FAULTS = {
    action.__name__: action
    for action in (kill, kill_launcher, terminate, terminate_launcher, stop, sleep, fail, refuse)
}


def mark() -> None:
    """Tells when the fault happened."""
    if path := os.environ.get("FAULT_MARK"):
        Path(path).write_text(str(time.time()))


def with_fault(kind: str, step: int) -> None:
    """Patches what train.py calls, in this process."""
    from training import data
    from training.saving import CheckpointWriter

    if kind == "full_disk":
        save = CheckpointWriter.__call__

        def save_on_full_disk(writer: CheckpointWriter) -> None:
            import resource

            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            if is_first := not marks and writer.state.step >= step:
                marks.append(writer.state.step)
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            save(writer)
            if is_first:
                writer.join()
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        CheckpointWriter.__call__ = save_on_full_disk  # type: ignore[method-assign]
        return
    if kind == "nan":
        patch_loss(step)
        return
    if kind == "kill_in_save":
        patch_shards(step)
        return
    batches: Callable[..., Any] = data.TrainBatches.__call__

    def batches_with_fault(self: data.TrainBatches, number: int) -> Any:
        if number == step and not marks:
            marks.append(step)
            mark()
            FAULTS[kind]()
        return batches(self, number)

    data.TrainBatches.__call__ = batches_with_fault  # type: ignore[method-assign]


marks: list[int] = []  # the step of the fault, once it has happened


def patch_shards(step: int) -> None:
    """Killed while the ranks write a checkpoint together: after this rank has made its file."""
    import sharded_checkpoint

    write = sharded_checkpoint._write_shard

    def write_and_die(temporary: Path, *args: Any) -> Any:
        written = write(temporary, *args)
        if int(temporary.name.split("-")[1].partition(".")[0]) >= step:
            mark()
            kill()
        return written

    sharded_checkpoint._write_shard = write_and_die


def patch_loss(step: int) -> None:
    """The loss of one step is not a number."""
    from training import setup

    make_forward = setup.make_forward

    def make(state: Any, *args: Any) -> Callable[..., Any]:
        forward = make_forward(state, *args)
        return lambda *given, **named: forward(*given, **named) * (float("nan") if state.step == step else 1.0)

    setup.make_forward = make


def check_weights() -> None:
    """Ends a run whose ranks have different weights at a save."""
    import zlib

    from parallel.processes import gather
    from training.saving import CheckpointWriter

    save = CheckpointWriter.__call__

    def check_and_save(writer: CheckpointWriter) -> None:
        state = writer.state
        if state.layout == "ddp":
            sums = gather([zlib.crc32(weights.detach().numpy().tobytes()) for weights in state.model.parameters()])
            if any(other != sums[0] for other in sums):
                raise ArithmeticError(f"step {state.step}: the ranks have different weights")
        save(writer)

    CheckpointWriter.__call__ = check_and_save  # type: ignore[method-assign]


if __name__ == "__main__":
    check_weights()
    kind, rank, step = FAULT.split(":")
    is_first_attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0
    if kind != "none" and os.environ.get("RANK", "0") == rank and is_first_attempt:
        with_fault(kind, int(step))
    script = Path(__file__).resolve().parents[1] / "train.py"
    runpy.run_path(str(script), run_name="__main__")
