"""Several processes under faults: real launches of torchrun. A part of torture.py.

A trial starts a run of 40 steps in which faulty_train.py injects the fault, waits until all of its processes have
ended, and resumes the run. It survives if the processes end within the time and the exit codes and messages are those
that `FAULTS` names, if the resumed run completes, and if its records and weights are those of an undisturbed run, byte
for byte. A further fault is an entry of `FAULTS`; `world=1` starts train.py without torchrun.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from checkpoint import list_checkpoints  # noqa: E402

STEPS, INTERVAL = 40, 10  # between checkpoints
TIMEOUT = 6  # seconds of --parallel_timeout
SHUTDOWN = 30  # seconds that torchrun gives a process that does not answer SIGTERM
SLACK = 25  # seconds for the rest: messages, and a machine that is busy
TRAIN = (
    "debug", "--threads=1", "--dtype=float32", "--compile=false", f"--max_steps={STEPS}", f"--eval_interval={INTERVAL}",
    "--eval_tokens=2000", "--final_eval=false", "--sample_tokens=5", "--log_interval=1", "--data=text.txt",
    f"--parallel_timeout={TIMEOUT}",
)  # fmt: skip


# ---- Launches --------------------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """A command with all the processes that come from it."""

    process: subprocess.Popen[bytes]
    token: str
    output: Path

    def text(self) -> str:
        return self.output.read_text("utf-8", "replace")

    def alive(self, variable: str = "") -> list[int]:
        """The launcher and its processes, also those that have lost it; without those that have ended (zombies).
        variable: NAME=VALUE of the environment that those which count have."""
        found, marks = [], {f"TORTURE={self.token}", variable} - {""}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and marks <= {*(entry / "environ").read_text("utf-8", "replace").split("\0")}:
                    found.append(int(entry.name))
            except OSError:  # ended meanwhile, or not ours
                continue
        return sorted(found)

    def wait(self, seconds: float, variable: str = "") -> bool:
        """Whether all processes, or those with this variable, ended within so many seconds; those that did not are
        killed."""
        end = time.monotonic() + seconds
        while True:
            code, left = self.process.poll(), self.alive(variable)
            if (code is not None or variable) and not left:
                return True
            if time.monotonic() > end:
                for number in left:
                    os.kill(number, signal.SIGKILL)
                self.process.wait()
                return False
            time.sleep(0.1)

    def wait_for(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.text():
            if time.monotonic() > end or (self.process.poll() is not None and not self.alive()):
                raise TimeoutError(f"{text!r} was not printed:\n{self.text()}")
            time.sleep(0.05)


def torchrun(world: int, *flags: str) -> list[str]:
    if world == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", *flags, "--"]


def launch(folder: Path, command: Sequence[str], fault: str = "none:0:0") -> Launch:
    """Starts it in `folder`. fault: see faulty_train.py."""
    token = uuid.uuid4().hex
    output = folder / f"{token}.out"
    environment = {**os.environ, "TORTURE": token, "FAULT": fault, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    environment["FAULT_MARK"] = str(folder / "mark")
    with output.open("wb") as file:  # through a pipe: what is said of a full disk would not get to a file
        reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file, start_new_session=True)
    process = subprocess.Popen(
        command, cwd=folder, stdout=reader.stdin, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    assert reader.stdin is not None
    reader.stdin.close()
    return Launch(process, token, output)


@contextmanager
def ending(*launches: Launch) -> Iterator[None]:
    """A context that leaves no process behind."""
    try:
        yield
    finally:
        for one in launches:
            one.wait(0)


# ---- Faults ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """spec: KIND:RANK:STEP of faulty_train.py. words: what the output must hold. once: of these, what all processes
    together print a single time. ends: whether the command ends because of the fault; otherwise it completes the run.
    seconds: from the fault to the end of all processes. same: whether the records are those of an undisturbed run.
    act: what is done from outside, once the run has passed its first checkpoints. command: runs train.py, in place of
    torchrun's. judged_by: a variable of the processes that have to end; by default all have to. missing: why the fault
    cannot be tried here, or None."""

    spec: str
    words: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    world: int = 2
    layout: str = "ddp"
    torchrun: tuple[str, ...] = ()
    ends: bool = True
    lost: int | None = None  # steps, exactly; None: up to the last checkpoint
    seconds: float = TIMEOUT + SLACK
    same: bool = True
    act: Callable[[Launch], None] | None = None
    command: Callable[..., list[str]] | None = None
    judged_by: str = ""
    missing: Callable[[], str | None] = lambda: None


def interrupt_all(one: Launch) -> None:
    """Ctrl-C in a terminal: the signal goes to all processes, and torchrun passes it on, too."""
    one.wait_for("step 25/")
    mark(one)
    for number in one.alive():
        os.kill(number, signal.SIGINT)


def write_twice(one: Launch) -> None:
    """Rank 0 is stopped, torchrun is killed, and the run is resumed by somebody else, while rank 0 holds the lock."""
    one.wait_for("step 25/")
    (first,) = one.alive("RANK=0")
    os.kill(first, signal.SIGSTOP)
    one.process.kill()
    second = launch(one.output.parent, [*torchrun(2), str(ROOT / "train.py"), "--resume=run"])
    with ending(second):
        ended = second.wait(60)
    if not ended or second.text().count("run: another process is writing there") != 1:
        raise RuntimeError(f"a second writer was not refused:\n{second.text()}")
    mark(one)
    os.kill(first, signal.SIGCONT)


def cut_link(one: Launch) -> None:
    one.wait_for("step 25/")
    mark(one)
    (one.output.parent / "cut").touch()


# Two network namespaces that a cable joins, in a user namespace, so that it works without privileges. $@: the command
# that runs in both, by torchrun with two nodes of one process each. The file `cut` takes the cable away.
TWO_NODES = """
rm -f cut
unshare --net sleep 300 & other=$!
within() { nsenter --target $other --net "$@"; }
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add here type veth peer name there netns $other
ip address add 10.77.0.1/24 dev here; ip link set here up; ip link set lo up
within ip address add 10.77.0.2/24 dev there; within ip link set there up; within ip link set lo up
options="--nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=10.77.0.1:29411 --rdzv-id=torture"
conf=read_timeout=10,is_host
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 run="-m torch.distributed.run"
GLOO_SOCKET_IFNAME=here $PYTHON $run $options --rdzv-conf=$conf=1 --local-addr=10.77.0.1 -- "$@" & one=$!
GLOO_SOCKET_IFNAME=there within $PYTHON $run $options --rdzv-conf=$conf=0 --local-addr=10.77.0.2 -- "$@" & two=$!
while [ ! -e cut ]; do sleep 0.1; done
ip link set here down
wait $one $two
kill $other
exit 1
"""


def two_nodes(*command: str) -> list[str]:
    return ["unshare", "--user", "--map-root-user", "--net", "bash", "-c", TWO_NODES, "bash", *command]


def without_namespaces() -> str | None:
    """Why two machines cannot be imitated here; None where they can."""
    if missing := [name for name in ("unshare", "nsenter", "ip", "bash") if shutil.which(name) is None]:
        return f"{', '.join(missing)}: not installed (util-linux, iproute2)"
    trial = "ip link add here type veth peer name there"
    tried = subprocess.run(["unshare", "--user", "--map-root-user", "--net", *trial.split()], capture_output=True)
    return None if tried.returncode == 0 else f"no network namespaces: {tried.stderr.decode().strip()}"


def mark(one: Launch) -> None:
    (one.output.parent / "mark").write_text(str(time.time()))


RESUME = "continue with: torchrun --nproc-per-node=2 -- train.py --resume=run"
SAVED = f"the last checkpoint of run is that of step 20; {RESUME}"
SILENT = "rank 1 of 2 on {node} gives no sign of life: killed, stopped, or not to be reached"
STOP = ": all 2 processes save; another signal"
FAULTS = {
    "kill_worker": Fault("kill:1:25", (SAVED,), (SILENT,)),
    "kill_first_worker": Fault("kill:0:25", (SAVED,), (SILENT.replace("rank 1", "rank 0"),)),
    "kill_and_restart": Fault(
        "kill:1:25", once=("torchrun has started again; run is resumed",), torchrun=("--max-restarts=1",), ends=False
    ),
    "kill_sharded": Fault("kill:1:25", (SAVED,), (SILENT,), layout="fsdp"),
    "kill_in_save": Fault("kill_in_save:1:25", (SAVED,), (SILENT,), layout="fsdp"),
    "kill_launcher": Fault(
        "kill_launcher:1:25", once=("torchrun has ended" + STOP, f"is saved; {RESUME}"), lost=0
    ),
    "terminate_worker": Fault(
        "terminate:1:25", once=("SIGTERM (rank 1 of 2 on {node})" + STOP, f"step 26 is saved; {RESUME}"), lost=0
    ),
    "terminate_launcher": Fault("terminate_launcher:1:25", once=("SIGTERM" + STOP, f"is saved; {RESUME}"), lost=0),
    "interrupt_all": Fault("none:0:0", once=("SIGINT" + STOP, f"is saved; {RESUME}"), lost=0, act=interrupt_all),
    "exception": Fault(
        "fail:1:25", (SAVED,), ("rank 1 of 2 on {node} ends with this exception",
                                "rank 1 of 2 on {node} has ended: ZeroDivisionError: injected"),
    ),
    "error_of_one": Fault(
        "refuse:1:25", (SAVED,), ("error: rank 1 of 2 on {node}: the file is gone",
                                  "rank 1 of 2 on {node} has ended: the file is gone"),
    ),
    "stopped_worker": Fault("stop:1:25", (SAVED,), (SILENT,), seconds=TIMEOUT + SHUTDOWN + SLACK),
    "hanging_sharded": Fault("sleep:1:25", (SAVED,), ("rank 1 of 2 on {node} lives, but",), layout="hsdp"),
    "hanging_worker": Fault("sleep:1:25", (SAVED, "in sleep\n"), ("rank 1 of 2 on {node} lives, but",)),
    "nan": Fault("nan:1:25", once=("loss nan (rank 1 of 2 on {node})", "update skipped"), ends=False, same=False),
    "full_disk": Fault("full_disk:0:25", once=("step 30: not saved: ",), ends=False),
    # rank 0 was stopped for less than TIMEOUT, and both save, or for longer
    "second_writer": Fault("none:0:0", (RESUME,), act=write_twice),
    "lost_link": Fault(
        "none:0:0", (SILENT, "nothing is heard of rank 0 on 10.77.0.1"), act=cut_link, command=two_nodes,
        missing=without_namespaces, judged_by="LOCAL_RANK=0",  # torchrun waits for its own timeouts
    ),
    "full_disk_sharded": Fault("full_disk:1:25", once=("step 30: not saved: ", "rank 1"), layout="fsdp", ends=False),
}  # fmt: skip


# ---- A trial ---------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    problems: list[str] = field(default_factory=list)
    lost: int | None = None
    seconds: float | None = None
    output: str = ""


def records(run: Path) -> list[str]:
    """metrics.jsonl without what may differ between repetitions."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [json.dumps({name: value for name, value in entry.items() if name != "timing"}) for entry in entries]


def contents(run: Path) -> dict[str, bytes]:
    """The tensors of the last checkpoint, by file."""
    last = list_checkpoints(run)[-1]
    return {str(path.relative_to(last)): path.read_bytes() for path in sorted(last.rglob("*.safetensors"))}


def undisturbed(folder: Path, world: int, layout: str) -> Path:
    """The run with which others are compared, made where it is missing."""
    run = folder / f"undisturbed-{world}-{layout}"
    if not run.exists():
        one = launch(
            folder, [*torchrun(world), str(ROOT / "train.py"), *TRAIN, *parallel(world, layout), f"--run={run.name}"]
        )
        with ending(one):
            if not one.wait(120) or one.process.returncode != 0:
                raise RuntimeError(f"the undisturbed run failed:\n{one.text()}")
    return run


def parallel(world: int, layout: str) -> list[str]:
    return [f"--parallel={layout}"] if world > 1 else []


def attempt(name: str, folder: Path, resume: bool = True) -> Result:
    """One trial of a fault in `folder`, which holds text.txt. resume: also resumes the run and compares it."""
    fault, result, run = FAULTS[name], Result(), folder / "run"
    base = undisturbed(folder, fault.world, fault.layout) if resume and fault.same else None
    script = [str(ROOT / "tests" / "faulty_train.py"), *TRAIN, *parallel(fault.world, fault.layout), "--run=run"]
    command = [*torchrun(fault.world, *fault.torchrun), *script] if fault.command is None else fault.command(*script)
    one = launch(folder, command, fault.spec)
    with ending(one):
        if fault.act is not None:
            fault.act(one)
        if not one.wait(60 + (fault.seconds if fault.ends else 30), fault.judged_by):
            result.problems.append("did not end")
        ended, result.output = time.time(), one.text()
    if fault.ends:
        result.seconds = ended - float((folder / "mark").read_text())
        check_end(fault, one, result, run)
    elif one.process.returncode != 0:
        result.problems.append(f"exit code {one.process.returncode}")
    check_words(fault, result)
    if fault.ends and resume and not result.problems:
        again = launch(folder, [*torchrun(fault.world), str(ROOT / "train.py"), "--resume=run"])
        with ending(again):
            if not again.wait(90) or again.process.returncode != 0:
                result.problems.append("not resumed")
            result.output = again.text() if result.problems else result.output
    if base is not None and not result.problems:
        if records(run) != records(base):
            result.problems.append("other records than those of an undisturbed run")
        if contents(run) != contents(base):
            result.problems.append("other weights than those of an undisturbed run")
    return result


def check_end(fault: Fault, one: Launch, result: Result, run: Path) -> None:
    """What is lost, and how long it took."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    trained = max(entry["step"] for entry in steps if entry["event"] == "step")
    result.lost = trained - int(list_checkpoints(run)[-1].name.removeprefix("step-"))
    if one.process.returncode == 0 and not fault.judged_by:
        result.problems.append("exit code 0")
    if fault.lost is not None and result.lost != fault.lost:
        result.problems.append(f"{result.lost} steps lost, expected {fault.lost}")
    assert result.seconds is not None
    if result.seconds > fault.seconds:
        result.problems.append(f"took {result.seconds:.1f} s to end")


def check_words(fault: Fault, result: Result) -> None:
    for word in [*fault.words, *fault.once]:
        expected = word.format(node=os.uname().nodename)
        count = result.output.count(expected)
        if count == 0 or (word in fault.once and count > 1):
            result.problems.append(f"printed {count} times: {expected}")


# ---- The folder ------------------------------------------------------------------------------------------------------


def prepare(home: Path) -> Path:
    """The folder of the trials, without the run of the one before. What is undisturbed stays."""
    shutil.rmtree(home / "run", ignore_errors=True)
    for name in ("mark", "cut"):
        (home / name).unlink(missing_ok=True)
    text = home / "text.txt"
    if not text.exists():
        words = ("the", "moon", "draws", "two", "trees", "and", "water", "sees", "a", "cat")
        text.write_text(" ".join(words[i * i % 10] + str(i % 7) for i in range(20_000)))
    return home
