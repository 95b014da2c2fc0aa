"""One training run: the state that a checkpoint holds, and what happens in a step, an evaluation and a save.

Everything random is derived from (seed, sample number), the data order is a pure function of it too, so the whole state is the
weights, the optimizer's moments and the few numbers of `Progress`. Read `train` first, then what it calls, from top to bottom.
"""

from __future__ import annotations

import math
import platform
import shlex
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import config
from checkpoint import Checkpoint, SaveFailed, prune_checkpoints, save_checkpoint
from common.hardware import Hardware
from common.options import RunOptions
from errors import UserError
from files import write_json
from generation.text import sample_texts
from model import GPT, IGNORED_TARGET
from prepare_data.shards import Dataset
from training.budget import Budget
from training.data import TrainWindows, keyed_integer, read_windows
from training.evaluation import Evaluation, evaluate, memorising
from training.interrupt import StopRequest
from training.metrics import RunLog, WandbLog, clock, console_line, process_start, say
from training.micro_batch import divisor, fit_to_memory, measure_peak
from training.optim import (
    OptimizerOptions,
    Plan,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    planned,
)
from training.options import EvalOptions, LoggingOptions, TrainOptions
from training.reference import Reference, read_curves

MOST_SKIPPED = 3  # updates in a row that may be dropped because their gradient is not finite
MEASURED_STEPS, MEASURED_SECONDS = 8, 10.0  # how long the speed is measured for a time budget; two steps at least


def refuse_unfit_data(dataset: Dataset, block_size: int, options: EvalOptions) -> None:
    """Raises UserError for what would only fail in mid-run: too short a split, a sample prompt that the tokenizer cannot encode."""
    TrainWindows(len(dataset.train), block_size, seed=0)  # raises
    if len(dataset.val) < 2:
        raise UserError(
            f"the val split holds {len(dataset.val)} tokens and nothing to score; raise --val_fraction or give more text"
        )
    try:
        dataset.tokenizer.encode(options.sample_prompt)
    except UserError as error:
        raise UserError(f"--sample_prompt={options.sample_prompt!r}: {error}") from error


@dataclass
class Progress:
    """The numbers besides the tensors: what is needed to go on to the same bits."""

    step: int = 0
    evaluated_step: int | None = None
    log_loss: float = 0.0  # sum of the losses since the last logged step …
    log_count: int = 0  # … and how many they are; likewise since the last evaluation
    eval_loss: float = 0.0
    eval_count: int = 0
    skipped: int = 0
    history: list[dict[str, float]] = field(
        default_factory=list
    )  # an entry an evaluation: step, val_loss, standard_error, train_loss
    grad_scaler: dict[str, Any] = field(default_factory=dict)


class Training:
    """A run in progress: `model` trained on `dataset` in the directory `run`, which the caller has locked. Raises UserError."""

    def __init__(
        self,
        run: Path,
        options: config.Options,
        auto: dict[str, str],
        hardware: Hardware,
        dataset: Dataset,
        model: GPT,
        resumed: Checkpoint | None,
        stop: StopRequest,
    ) -> None:
        self.run, self.options, self.auto, self.hardware, self.dataset, self.model = (
            run,
            options,
            auto,
            hardware,
            dataset,
            model,
        )
        self.train_options, self.optimizer_options = options.section(TrainOptions), options.section(OptimizerOptions)
        self.eval_options, self.logging = options.section(EvalOptions), options.section(LoggingOptions)
        self.seed = options.section(RunOptions).seed
        self.stop = stop
        self.T = model.config.block_size
        self.rows = self.train_options.tokens_per_step // self.T
        self.windows = TrainWindows(len(dataset.train), self.T, self.seed)
        self.reference = Reference(dataset.fingerprint, options.flat(), read_curves())
        self.compiled = torch.compile(model) if self.train_options.compile else model
        self.optimizer: Any = make_optimizer(
            model, self.optimizer_options, hardware.dtype
        )  # GradScaler's types ask for torch's class
        self.scaler = self._new_scaler()
        self.progress = Progress()
        self.val_loss: float | None = None  # of this very step, for the checkpoint
        self.saved_step: int | None = None
        self.plan = planned(self.train_options.max_steps, self.optimizer_options)
        self.budget: Budget | None = None
        if resumed is not None:
            self._restore(resumed)
        self.wandb = WandbLog(run, self.logging, options.flat())
        self.log = RunLog(run, resumed.state["logs"] if resumed is not None else None)
        self._ahead: tuple[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] | None = None  # see _batches
        self._paused = 0.0  # seconds of evaluations, samples and saves in this process
        self._started = time.perf_counter()
        self._logged_at = (self._train_seconds(), self.step)

    @property
    def step(self) -> int:
        """Updates done so far."""
        return self.progress.step

    # ---- the steps of the loop ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Before the first step: measures the speed where a time budget asks for it, and writes config.json."""
        if self.step >= self.plan.max_steps and self.progress.evaluated_step == self.step:
            say(f"the run is complete at step {self.step}; --max_steps=MORE goes on")
        elif self.plan.max_steps <= self.optimizer_options.warmup_steps:
            say(
                f"note: the learning rate rises over warmup_steps={self.optimizer_options.warmup_steps}, to the end of the run and beyond"
            )
        self.model.train()
        if self.hardware.device.type == "cuda" and "micro_batch_size" in self.auto and self.step == 0:
            self._fit_micro_batch()
        if self.train_options.budget_minutes is not None and self.step == 0:
            self._plan_by_budget()
        self._write_config()
        self._started = time.perf_counter()
        self._logged_at = (self._train_seconds(), self.step)

    def update(self) -> float:
        """One optimizer update on the next tokens_per_step tokens → its loss, before the update."""
        progress = self.progress
        self.learning_rate = learning_rate(self.step, self.plan, self.optimizer_options)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group["scale"]
        try:
            loss, self.grad_norm = self._gradient(first_sample=self.step * self.rows)
        except torch.OutOfMemoryError:
            self._halve_micro_batch()
            return self.update()
        if math.isfinite(loss) and math.isfinite(self.grad_norm):
            self.scaler.step(self.optimizer)
            progress.skipped = 0
            progress.log_loss, progress.log_count = progress.log_loss + loss, progress.log_count + 1
            progress.eval_loss, progress.eval_count = progress.eval_loss + loss, progress.eval_count + 1
        elif not (math.isfinite(loss) and self.scaler.is_enabled() and self.scaler.get_scale() > 1):
            self._skip(loss, self.grad_norm)
        if (
            self.scaler.is_enabled()
        ):  # else float16's scale was too large: it is halved here, and no update is counted as skipped
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        self.val_loss = None
        return loss

    def _gradient(self, first_sample: int) -> tuple[float, float]:
        """Accumulates the gradient of the mean loss over all counted targets of the update → loss, norm before clipping."""
        size, device = int(self.train_options.micro_batch_size), self.hardware.device
        firsts, batches = range(first_sample, first_sample + self.rows, size), self._batches(first_sample, size)
        counted = max(1, sum(int((y != IGNORED_TARGET).sum()) for _, y in batches))
        total = torch.zeros((), device=device)
        for first, (x, y) in zip(firsts, batches, strict=True):
            if self.model.config.dropout:
                torch.manual_seed(keyed_integer(self.seed, "dropout", first, bits=32))
            with self.hardware.autocast():
                x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
                nats = self.compiled(x, y, reduction="sum", label_smoothing=self.train_options.label_smoothing)
            loss = nats / counted
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        if self.optimizer_options.grad_clip is None:
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        else:
            grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optimizer_options.grad_clip)
        if device.type != "cpu":  # it is still at work: time to read what comes next
            self._ahead = (first_sample + self.rows, size), self._batches(first_sample + self.rows, size)
        mean_loss, norm = torch.stack(
            (total, grad_norm.to(total.dtype))
        ).tolist()  # the one wait for the device in a step
        return mean_loss, norm

    def _batches(self, first_sample: int, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The micro-batches of the update that starts with this sample, perhaps read ahead; in pinned memory for a CUDA device."""
        if self._ahead is not None and self._ahead[0] == (first_sample, size):
            return self._ahead[1]
        firsts = range(first_sample, first_sample + self.rows, size)
        batches = [read_windows(self.dataset.train, self.windows.starts(first, size), self.T) for first in firsts]
        return (
            [(x.pin_memory(), y.pin_memory()) for x, y in batches] if self.hardware.device.type == "cuda" else batches
        )

    # ---- the micro-batch ---------------------------------------------------------------------------------------------

    def _fit_micro_batch(self) -> None:
        """Lowers the micro-batch to what a trial shows to fit beside AdamW's two moments, which come with the first step."""
        size = int(self.train_options.micro_batch_size)
        free = torch.cuda.mem_get_info(self.hardware.device)[0] - 8 * self.model.n_params()
        fitting = fit_to_memory(size, lambda rows: measure_peak(self.model, self.hardware, rows), free)
        torch.cuda.empty_cache()
        if fitting < size:
            self._set_micro_batch(fitting)
            say(f"micro-batch {fitting}: what {free / 2**30:.1f} GiB of free device memory hold")

    def _halve_micro_batch(self) -> None:
        """After an out-of-memory: half the rows, or less where half does not divide them. Raises UserError where there is no less."""
        size = int(self.train_options.micro_batch_size)
        self.optimizer.zero_grad(set_to_none=True)
        if self.hardware.device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            raise UserError("one row does not fit into the device's memory; take a smaller model or --block_size")
        smaller = divisor(size, size // 2)
        if "micro_batch_size" not in self.auto:
            raise UserError(
                f"--micro_batch_size={size} does not fit into the device's memory; take --micro_batch_size={smaller}, or auto"
            )
        self._set_micro_batch(smaller)
        say(
            f"step {self.step}: out of memory; micro-batch {size} → {smaller}. Bits may differ from those of a run that began with it"
        )

    def _set_micro_batch(self, size: int) -> None:
        self.options = config.replace(self.options, micro_batch_size=size)
        self.train_options = self.options.section(TrainOptions)
        self._write_config()

    def _skip(self, loss: float, grad_norm: float) -> None:
        """Says that an update was dropped; too many in a row end the run, with the last good weights on disk."""
        self.progress.skipped += 1
        self.log.metrics("skip", self.step + 1, loss=loss, grad_norm=grad_norm)
        say(f"step {self.step}: loss {loss}, gradient norm {grad_norm}: update skipped")
        if self.progress.skipped >= MOST_SKIPPED:
            raise UserError(
                f"{MOST_SKIPPED} updates in a row had no finite gradient at step {self.step}; nothing of them was saved. "
                f"Go on from the last checkpoint with a smaller step: {self._smaller_step()}"
            )

    def log_if_due(self) -> None:
        """A line on the console and in metrics.jsonl; loss is the mean since the last one."""
        if self.step % self.logging.log_interval and self.step != self.plan.max_steps:
            return
        now, progress = self._train_seconds(), self.progress
        before, since = self._logged_at
        seconds = max(1e-9, now - before)
        self._logged_at = (now, self.step)
        if self.budget is not None:
            self.budget.observe_steps(self.step - since, seconds)
        loss = progress.log_loss / progress.log_count if progress.log_count else math.nan  # nan: all were skipped
        progress.log_loss, progress.log_count = 0.0, 0
        tokens_per_second = (self.step - since) * self.train_options.tokens_per_step / seconds
        left = (self.plan.max_steps - self.step) * seconds / (self.step - since)
        memory = self.hardware.memory_bytes()
        lr, grad_norm = self.learning_rate, self.grad_norm
        fields = {
            "loss": loss,
            "learning_rate": lr,
            "grad_norm": grad_norm,
            "tokens": self.step * self.train_options.tokens_per_step,
        }
        timing: dict[str, float | None] = {
            "tokens_per_second": round(tokens_per_second),
            "seconds": round(time.perf_counter() - self._started, 3),
        }
        peak = self.hardware.peak_flops()
        utilisation = None if peak is None else tokens_per_second * self.model.flops_per_token() / peak
        mfu = "" if self.hardware.device.type == "cpu" else "unknown" if utilisation is None else f"{utilisation:.1%}"
        timing |= {"train_seconds": round(now, 3), "memory_bytes": memory, "mfu": utilisation}
        self.log.metrics("step", self.step, timing=timing, **fields)
        self.wandb.log({f"train/{name}": value for name, value in fields.items()} | timing, self.step)
        say(console_line(self.step, self.plan.max_steps, loss, lr, grad_norm, tokens_per_second, left, memory, mfu))
        self._follow_budget()

    # ---- evaluation, samples, saving ---------------------------------------------------------------------------------

    def evaluation_is_due(self) -> bool:
        """At every eval_interval and at the end, once."""
        at = self.step % self.eval_options.eval_interval == 0 or self.step == self.plan.max_steps
        return at and self.progress.evaluated_step != self.step

    def save_is_due(self) -> bool:
        """At save_interval; a step that is evaluated is saved then."""
        interval = self.eval_options.save_interval
        return interval is not None and self.step % interval == 0 and not self.evaluation_is_due()

    def _evaluate(self, max_tokens: int | None = None) -> Evaluation | None:
        """The weights as they are, on the first max_tokens tokens of the val split or all of it; None where a signal broke it off."""
        rows = int(self.train_options.micro_batch_size)
        token_bytes, autocast = self.dataset.tokenizer.token_bytes, self.hardware.autocast
        return evaluate(
            self.model,
            self.dataset.val,
            token_bytes,
            autocast=autocast,
            max_tokens=max_tokens,
            rows=rows,
            stop=self.stop,
        )

    def evaluate_and_save(self) -> bool:
        """The evaluation of this step with its sample and checkpoint; False where a signal broke it off, before anything was written."""
        self._synchronize()
        started, progress = time.perf_counter(), self.progress
        result = self._evaluate(self.eval_options.eval_tokens)
        if result is None:
            return False
        if not math.isfinite(result.loss):
            raise UserError(
                f"the val loss at step {self.step} is {result.loss}; nothing of this step was saved. "
                f"Go on from the last checkpoint with a smaller step: {self._smaller_step()}"
            )
        train_loss = progress.eval_loss / progress.eval_count if progress.eval_count else None
        progress.eval_loss, progress.eval_count = 0.0, 0
        self._record_evaluation("eval", result, train_loss, started)
        is_best = result.loss < min((entry["val_loss"] for entry in progress.history), default=math.inf)
        if train_loss is not None:
            entry = {
                "step": self.step,
                "val_loss": result.loss,
                "standard_error": result.standard_error,
                "train_loss": train_loss,
            }
            progress.history.append(entry)
        if warning := memorising(progress.history):
            say(warning)
        self._write_samples(1, self.eval_options.sample_seed)
        progress.evaluated_step, self.val_loss = self.step, result.loss
        interval = self.eval_options.save_interval
        self._paused += time.perf_counter() - started
        if interval is None or is_best or self.step % interval == 0 or self.step == self.plan.max_steps:
            self.save()
        if self.budget is not None:
            self.budget.pause_seconds = time.perf_counter() - started
        return True

    def _record_evaluation(self, event: str, result: Evaluation, train_loss: float | None, started: float) -> None:
        fields: dict[str, Any] = {
            "val_loss": result.loss,
            "standard_error": result.standard_error,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "targets": result.targets,
            "train_loss": train_loss,
        }
        self.log.metrics(event, self.step, timing={"train_seconds": round(self._train_seconds(started), 3)}, **fields)
        self.wandb.log({f"val/{name}": value for name, value in fields.items() if value is not None}, self.step)
        normal = self.reference.describe(self.step, result.loss, self.plan) if event == "eval" else None
        say(f"step {self.step}: {result.describe()}" + (f"; {normal}" if normal else ""))

    def _write_samples(self, count: int, seed: int) -> None:
        """Samples from the fixed prompt and seed, to samples.txt and the console."""
        if self.eval_options.sample_tokens == 0:
            return
        samples = sample_texts(
            self.model,
            self.dataset.tokenizer,
            self.eval_options.sample_prompt,
            num_samples=count,
            max_new_tokens=self.eval_options.sample_tokens,
            temperature=self.eval_options.sample_temperature,
            seed=seed,
            autocast=self.hardware.autocast,
        )
        for text, reason in samples:
            self.log.sample(self.step, text, reason)
            say(f"---- sample ({reason}) ----\n{text}\n----")

    def save(self) -> None:
        """A checkpoint of this step. A failed save is said and does not stop the training: the one before is still there."""
        started = time.perf_counter()
        self.progress.grad_scaler = self.scaler.state_dict()
        state = {
            "options": self.options.flat(),
            "auto": self.auto,
            "tokens": self.step * self.train_options.tokens_per_step,
            "samples": self.step * self.rows,
            "progress": asdict(self.progress),
            "val_loss": self.val_loss,
            "dataset": {
                "name": self.dataset.name,
                "path": str(self.dataset.folder.resolve()),
                "fingerprint": self.dataset.fingerprint,
            },
            "logs": self.log.lengths(),
            "environment": environment(self.hardware),
        }
        try:
            save_checkpoint(
                self.run,
                self.step,
                model=self.model.export_state(),
                config=self.model.config.to_dict(),
                tokenizer=self.dataset.tokenizer.to_dict(),
                optimizer=optimizer_tensors(self.optimizer, self.model),
                state=state,
            )
            self.saved_step = self.step
            prune_checkpoints(self.run)
        except SaveFailed as error:
            say(f"step {self.step}: not saved: {error}")
        self._paused += time.perf_counter() - started

    def _restore(self, saved: Checkpoint) -> None:
        try:
            load_optimizer_tensors(self.optimizer, self.model, saved.optimizer_tensors())
            self.progress = Progress(**saved.state["progress"])
            self.val_loss, then = saved.state["val_loss"], saved.state["environment"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{saved.path}: its state is not this version's ({error}); resume it with the Sprout that wrote it"
            ) from error
        if self.progress.grad_scaler:
            self.scaler.load_state_dict(self.progress.grad_scaler)
        self.saved_step = self.step
        now = environment(self.hardware)
        if changed := [f"{name} {then.get(name)} → {now[name]}" for name in now if now[name] != then.get(name)]:
            say(f"bits may differ from the uninterrupted run: {', '.join(changed)}")
        say(f"resumed {saved.path} at step {self.step}")

    def finish(self) -> bool:
        """After the last step: the loss on the whole val split where the evaluations were shorter; samples. False where a signal came."""
        started = time.perf_counter()
        is_shorter = (self.eval_options.eval_tokens or len(self.dataset.val)) < len(self.dataset.val)
        if is_shorter and (result := self._evaluate()) is not None:
            self._record_evaluation("final", result, None, started)
        if not self.stop():
            self._write_samples(self.eval_options.final_samples, self.eval_options.sample_seed + 1)
        return not self.stop()

    def close(self) -> None:
        self.log.close()
        self.wandb.finish()

    # ---- the time budget ---------------------------------------------------------------------------------------------

    def _plan_by_budget(self) -> None:
        """Measures the speed on steps and windows that are thrown away, restores the weights, and plans the run."""
        assert self.train_options.budget_minutes is not None
        before = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        seconds: list[float] = []
        while len(seconds) < 2 or (len(seconds) < MEASURED_STEPS and sum(seconds) < MEASURED_SECONDS):
            started = time.perf_counter()
            self._gradient(first_sample=0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self._synchronize()
            seconds.append(time.perf_counter() - started)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(before[name])
        self.optimizer.state.clear()
        self.scaler = self._new_scaler()
        self.budget = Budget(
            seconds=60.0 * self.train_options.budget_minutes,
            start=time.perf_counter(),
            pause_interval=self.eval_options.eval_interval,
            options=self.optimizer_options,
        )
        step_seconds = float(np.median(seconds[1:]))
        n_targets = min(self.eval_options.eval_tokens or len(self.dataset.val), len(self.dataset.val))
        forward_seconds = (
            step_seconds / 3 / self.train_options.tokens_per_step
        )  # a token's; a forward pass is a third of a step
        self.budget.pause_seconds = forward_seconds * n_targets
        self.budget.closing_seconds = forward_seconds * len(self.dataset.val)
        self._adopt(self.budget.first_plan(step_seconds, time.perf_counter()))
        self.log.metrics("plan", self.step, timing=asdict(self.plan))
        say(
            f"budget {clock(self.budget.seconds)}: {step_seconds * 1e3:.1f} ms a step → max_steps={self.plan.max_steps},"
            f" decay_steps={self.plan.decay_steps}"
        )

    def out_of_time(self) -> bool:
        """Whether the time budget is spent beyond its tolerance; says so."""
        if self.budget is None or not self.budget.spent(time.perf_counter()):
            return False
        say(
            f"the time budget is spent at step {self.step} of {self.plan.max_steps}: the machine slowed down in the decay"
        )
        return True

    def _follow_budget(self) -> None:
        """Corrects the plan to the speed of late; only the warm-up–stable–decay schedule allows it, and only before the decay."""
        if self.budget is None:
            return
        plan = self.budget.corrected(self.plan, self.step, time.perf_counter())
        if plan != self.plan:
            say(f"budget: max_steps {self.plan.max_steps} → {plan.max_steps}, decay_steps {plan.decay_steps}")
            self._adopt(plan)
            self.log.metrics("plan", self.step, timing=asdict(plan))
            self._write_config()

    def _adopt(self, plan: Plan) -> None:
        """The plan becomes part of the options, so that config.json repeats the run without measuring anything."""
        self.plan = plan
        decay = plan.decay_steps if self.optimizer_options.schedule == "wsd" else self.optimizer_options.decay_steps
        self.options = config.replace(self.options, max_steps=plan.max_steps, decay_steps=decay, budget_minutes=None)

    # ---- small things ------------------------------------------------------------------------------------------------

    def _smaller_step(self) -> str:
        """The command that goes on with a third of the learning rates."""
        rates = [
            name
            for name in ("learning_rate", "muon_learning_rate")
            if getattr(self.optimizer_options, name) is not None
        ]
        flags = [f"--{name}={getattr(self.optimizer_options, name) / 3:.1e}" for name in rates]
        return " ".join(["python train.py", f"--resume={shlex.quote(str(self.run))}", *flags])

    def _new_scaler(self) -> torch.amp.GradScaler:
        """Keeps float16 gradients away from 0; does nothing in other dtypes."""
        return torch.amp.GradScaler(self.hardware.device.type, enabled=self.hardware.dtype == torch.float16)

    def _train_seconds(self, now: float | None = None) -> float:
        """Seconds from the start of this process to `now`, imports and compilation included, without evaluations, samples and saves."""
        return (time.perf_counter() if now is None else now) - process_start() - self._paused

    def _synchronize(self) -> None:
        if self.hardware.device.type == "cuda":
            torch.cuda.synchronize(self.hardware.device)

    def _write_config(self) -> None:
        write_json(self.run / "config.json", config.dump(self.options, self.auto))


def environment(hardware: Hardware) -> dict[str, Any]:
    """What the bits of a run depend on besides its options."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(hardware.device)
        if hardware.device.type == "cuda"
        else hardware.device.type,
        "cuda": torch.version.cuda,
        "threads": hardware.threads,
        "world_size": 1,
    }
