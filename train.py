"""Trains a GPT: options → hardware → data → model → optimizer → loop.

    python train.py                                        the quickstart preset on Python's standard library
    python train.py --data=my_novel.txt                    any file or folder of text
    python train.py config/shakespeare_char.py --max_steps=500 --learning_rate=1e-3
    python train.py --resume=runs/quickstart-1             resumes a run, bitwise exact on a CPU
    python train.py --help                                 every option
    torchrun --nproc-per-node=8 -- train.py gpt2_124m      on eight GPUs: README, "Many GPUs, many machines"

`train_model` and `train_on` set a run up, in this order; `loop` trains; `update` is one optimizer step,
`calculate_gradients` its forward and backward pass.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.tracebacklimit = 0  # so that Ctrl-C is one line, until start_script

from errors import run_script, start_script

if __name__ == "__main__":  # before the imports that take seconds
    start_script()

import config

if __name__ == "__main__":  # the same
    config.check_command_line("train.py")

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.hardware import Hardware, choose_hardware, tune_allocator
from common.memory import attempt
from common.options import HardwareOptions, RunOptions
from config.chain import end_run, open_run, train_all
from config.cluster import plan_preset, print_cluster
from config.planning import open_data
from config.restart import begin_or_resume
from config.rollback import go_back
from config.start import RunConfig, Start, read_start
from generation.text import sample_texts
from model import GPTConfig
from parallel.launch import together
from parallel.processes import agree, wait_at_most, world_size
from parallel.sharding import in_turn
from prepare_data.shards import Dataset
from training import setup
from training.budget import Budget, make_budget
from training.compilation import choose_compile
from training.data import MicroBatch, TrainBatches
from training.divergence import Diverged
from training.evaluation import Evaluation, evaluate
from training.interrupt import StopRequest
from training.kept_text import KeptText
from training.logger import RunLogger
from training.micro_batch import fit_micro_batch, until_it_fits
from training.optim import clip_gradients, finish_step, learning_rate
from training.options import EvalOptions, LoggingOptions, OptimizerOptions, TrainOptions
from training.prompt import choose_prompt
from training.reference import Reference, read_curves
from training.saving import CheckpointWriter
from training.state import TrainState
from training.step_graphs import Gradients


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the run is complete, STOPPED when a signal ended it early. Raises UserError, also where memory
    runs out and fewer rows do not help. The other exit codes are in errors.py."""
    argv = sys.argv[1:] if argv is None else argv
    options, train = config.load("train.py", argv).values, partial(train_all, train_model)
    if options["plan"] and not config.needs_plan(argv):
        return plan_preset(argv)
    action = partial(begin_or_resume, train, argv)
    return together(partial(attempt, action), options["device"], options["parallel_timeout"])


def train_model(argv: Sequence[str]) -> tuple[int, list[str]]:
    """One run. Returns its exit code, and the arguments of the run to go on with, if any. Raises UserError."""
    with ExitStack() as stack:
        # ---- options: presets and flags, or those of the run to resume
        start = read_start(argv, stack)
        wait_at_most(start.options.section(TrainOptions).parallel_timeout)
        # ---- hardware, then the data; a run with a text and no preset gets its options here, from its plan
        tune_allocator()
        hardware = choose_hardware(start.hardware_options)
        start, dataset, kept = open_data(start, hardware)
        if start.options.section(TrainOptions).plan:
            return print_cluster(start, dataset.tokenizer.vocab_size), []
        return train_on(start, dataset, kept, hardware, stack)


def train_on(
    start: Start, dataset: Dataset, kept: KeptText, hardware: Hardware, stack: ExitStack
) -> tuple[int, list[str]]:
    """train_model, from the data on."""
    # ---- every `auto` is resolved
    model_config, attention = start.options.section(GPTConfig), start.options.section(HardwareOptions).attention
    train, evals = start.options.section(TrainOptions), start.options.section(EvalOptions)
    values, reasons = setup.choose_auto(train, model_config, attention, hardware, start.reasons)
    options = config.replace(start.options, **values)
    train, optim = options.section(TrainOptions), options.section(OptimizerOptions)
    seed, logging = options.section(RunOptions).seed, options.section(LoggingOptions)
    batches = setup.make_batches(dataset, kept, train, model_config, seed, hardware)
    draw = partial(sample_texts, tokenizer=dataset.tokenizer, prompt=choose_prompt(dataset, evals))
    # ---- model
    tokenizer = dataset.tokenizer
    model_config = replace(model_config, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    layout = setup.choose_layout(train, start.argv, model_config, optim, hardware)
    model = setup.build_model(model_config, values["attention"], seed, start.source, train, layout.value, hardware)
    compiles = agree(choose_compile(train, evals, model, batches(0), hardware))
    values, reasons = values | {"compile": compiles.value}, reasons | compiles.reasons | layout.reasons
    setup.announce(model, layout.value, hardware, values, reasons, logging.verbose)
    score_text = partial(evaluate, model, token_bytes=dataset.tokenizer.token_bytes, autocast=hardware.autocast)
    score = partial(score_text, dataset.val)
    if evals.eval_only:
        return setup.print_evaluation(start.source, score(rows=batches.size)), []
    # ---- optimizer, and the rest of what a checkpoint holds
    stop = stack.enter_context(StopRequest(begun=False))
    start, run, told = open_run(start, dataset, stack)
    weights = run, start.resumed, start.initial, layout.value
    state = setup.make_state(model, optim, batches.rows, *weights, compiles.value, hardware, options.flat())
    # ---- records of the run: config.json, logs, checkpoints, samples
    recorded = stack.enter_context(start.record(run, options, reasons, kept))
    reference = Reference(dataset.fingerprint, options.flat(), read_curves())
    logger = RunLogger(run, logging, options.flat(), hardware, state, reference, start.log_lengths)
    stack.enter_context(logger)
    save = CheckpointWriter(run, state, dataset, hardware, evals, lambda: logger.facts() | recorded.facts(), told)
    sample = setup.make_sampler(draw, model, evals, hardware)
    # ---- length: a number of steps, or a time
    is_forced, started = "micro_batch_size" not in reasons, time.perf_counter()
    batches.size = fit_micro_batch(batches.size, model, hardware, is_forced or state.step > 0)
    fits = partial(until_it_fits, batches, state, is_forced)
    forward = fits(lambda: setup.make_forward(state, batches(state.data_step)[0], start.teachers, train, hardware))
    gradients = partial(calculate_gradients, forward, state, hardware, train.label_smoothing, optim.grad_clip)
    steps = setup.make_step(gradients, state, train, hardware)
    step = partial(fits, lambda: update(*steps, state, batches(state.data_step)))
    budget = make_budget(train, evals, optim, len(dataset.val), state, step, hardware, started, start.stored)
    logger.plan(state.step, budget)
    recorded.change(micro_batch_size=batches.size, compile=state.compiler != "none", **budget.as_options())
    # ---- training
    stop.begin()
    watch = partial(kept.watch, state, batches, logger, partial(score_text, stop=stop))
    score_all = partial(score, rows=batches.size, stop=stop) if evals.leaves_out(len(dataset.val)) else None
    try:
        with save:
            watch(is_end=False)
            loop(state, batches, budget, recorded, logger, evals, step, partial(score, stop=stop), sample, save, stop)
            finish(state, budget, logger, evals, score_all, watch, sample, save, stop)
    except Diverged as error:
        return go_back(error, run, state, batches, recorded, hardware, partial(told.stopped, stop))
    return told.ended(end_run(start, run, dataset, state, budget))


def loop(
    state: TrainState, batches: TrainBatches, budget: Budget, recorded: RunConfig, logger: RunLogger,
    evals: EvalOptions, step: Callable[[], tuple[float, float]],
    score: Callable[..., Evaluation | None], sample: Callable[[int, int], list[tuple[str, str]]],
    save: CheckpointWriter, stop: Callable[[], bool],
) -> None:  # fmt: skip
    """Trains until the last step, the end of the time budget, the end of patience, or a stop signal; the last step is
    saved, and evaluated unless a signal ended the run. Raises Diverged."""
    logger.start(state.step)
    while True:
        # ---- evaluate, sample, save
        done = budget.is_over(state, time.perf_counter())
        due = (done or state.step % evals.eval_interval == 0) and state.progress.evaluated_step != state.step
        if due or done or stop() or save.is_due():
            with logger.clock.pause(), state.averaged():
                result = score(max_tokens=evals.eval_tokens, rows=batches.size) if due else None  # None after a signal
                if result is not None:
                    logger.evaluation(state, budget.plan, result, state.record_evaluation(result))
                    if state.trouble() is None and (verdict := budget.judge(state, result)) is not None:
                        logger.patience(state.step, budget.plan, verdict)
                        recorded.change(**budget.as_options())
                        done = budget.is_over(state, time.perf_counter())
                    logger.samples(state, sample(1 if state.is_trained else 0, evals.sample_seed))
                ends, is_new = done or stop(), result is not None or state.begun_step != state.step
                if not stop():
                    state.raise_if_diverged(ends)
                if is_new and (ends or save.is_due()):
                    save()
            if due:
                budget.pause_seconds = logger.clock.last_pause
            if ends or (stop() and state.begun_step == state.step):  # the signal may have come during the save
                return

        # ---- one step: learning rate, then forward, backward, clipping and update of the weights
        rate = learning_rate(state.step, budget.plan, budget.options)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        size = batches.size
        save.poll()
        loss, grad_norm = step()
        if batches.size != size:  # it did not fit into memory
            recorded.change(micro_batch_size=batches.size)

        # ---- log
        if not state.advance(loss, grad_norm):
            logger.skip(state.step, loss, grad_norm, state.blamed)
        state.raise_if_diverged()
        if logger.is_due(state.step, budget.plan):
            steps, seconds = logger.step(state, budget.plan, rate, grad_norm)
            if budget.observe(state.step, steps, seconds, time.perf_counter()):
                logger.plan(state.step, budget)
                recorded.change(**budget.as_options())


def finish(
    state: TrainState, budget: Budget, logger: RunLogger, evals: EvalOptions,
    score: Callable[[], Evaluation | None] | None, watch: Callable[..., bool],
    sample: Callable[[int, int], list[tuple[str, str]]], save: CheckpointWriter, stop: Callable[[], bool],
) -> None:  # fmt: skip
    """After the last step: the evaluation of the whole val split (score; None where each one was that), that of the
    text that is mixed in (watch) and the final samples, unless a signal came. The last step is saved
    again with them, so that a resumed run keeps its records."""
    save.try_again()
    if stop() or state.is_finished:
        return
    with state.averaged():
        if score is not None:
            result = score()
            if result is None:  # after a signal
                return
            logger.evaluation(state, budget.plan, result, None, event="final")
        is_watched = watch(is_end=True)
        if stop():
            return
        samples = sample(evals.final_samples, evals.sample_seed + 1)
        logger.samples(state, samples)
        state.progress.finished_step = state.step
        if samples or score is not None or is_watched:
            save()


def update(
    gradients: Gradients, optimizer_step: Callable[[], object], state: TrainState, batches: Sequence[MicroBatch]
) -> tuple[float, float]:
    """One optimizer step on the mean loss over all targets of the micro-batches. Returns that loss (nats) and the
    gradient norm before clipping; where one of them is not finite, the weights are unchanged."""
    n_targets = sum(batch.n_targets for batch in batches)
    n_targets = n_targets if world_size() > 1 else max(1, n_targets)  # those of all processes: `summed`
    mean_loss, norm = gradients(batches, n_targets).tolist()  # waits for the device, once per step
    if math.isfinite(mean_loss) and math.isfinite(norm):
        finish_step(optimizer_step)
    if state.scaler.is_enabled():
        state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return mean_loss, norm


def calculate_gradients(
    forward: Callable[..., Tensor], state: TrainState, hardware: Hardware, label_smoothing: float,
    grad_clip: float | None, batches: Sequence[MicroBatch], n_targets: int | Tensor,
) -> Tensor:  # fmt: skip
    """Forward and backward pass of the micro-batches, and clipping. forward: the model, or its compiled form. Returns
    the loss divided by n_targets (nats), and the gradient norm before clipping: (2,) float32, on the device."""
    optimizer: Any = state.optimizer  # as torch's: it has the interface
    total = torch.zeros((), device=hardware.device)
    for x, y, dropout_seed in in_turn(batches, state.module):
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)
        x, y = x.to(hardware.device, non_blocking=True), y.to(hardware.device, non_blocking=True)
        with hardware.autocast():
            loss = forward(x, y, reduction="sum", label_smoothing=label_smoothing) / n_targets
        state.scaler.scale(loss).backward()
        total += loss.detach()
    state.scaler.unscale_(optimizer)
    grad_norm = clip_gradients(state.model.parameters(), grad_clip)
    return torch.stack((total, grad_norm.to(total.dtype)))


if __name__ == "__main__":
    run_script(main)
