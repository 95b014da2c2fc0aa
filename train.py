"""Trains a GPT: options → data → model → loop → samples.

    python train.py                                        the quickstart preset on Python's standard library
    python train.py --data=my_novel.txt                    any file or folder of text
    python train.py config/shakespeare_char.py --max_steps=500 --learning_rate=1e-3
    python train.py --resume=runs/quickstart-1             goes on exactly where the run stands
    python train.py --help                                 every option

`main` is the order of events and `loop` the training; what an update, an evaluation and a save do is in training/run.py.
"""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

import config
from checkpoint import Checkpoint, ModelFolder, open_latest, open_model_folder, resolve_model_folder
from common.hardware import (
    EAGER_FLOPS,
    Hardware,
    HardwareOptions,
    choose_attention_path,
    choose_compile,
    choose_hardware,
    require_determinism,
    tune_allocator,
)
from common.options import RunOptions
from common.run_directory import RunLock, claim_run, refuse_used_run
from common.tokenizer import PUBLISHED, tokenizer_from_dict
from config.resume import resumed_options, with_model_options
from errors import UserError, run_script
from model import GPT, GPTConfig
from prepare_data import PrepareOptions
from prepare_data.pipeline import describe, resolve_data
from prepare_data.shards import Dataset, open_dataset
from training.evaluation import evaluate
from training.interrupt import STOPPED, StopRequest
from training.metrics import say
from training.micro_batch import choose_micro_batch
from training.options import EvalOptions, TrainOptions
from training.run import Training, refuse_unfit_data


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when the run is complete, STOPPED when a signal ended it early. Raises UserError."""
    argv = sys.argv[1:] if argv is None else argv
    resuming = any(arg.startswith("--resume=") for arg in argv)  # such a run brings its own options
    options = config.load("train.py", argv, default_preset=None if resuming else "quickstart")
    with ExitStack() as stack:
        # ---- options: the command line's, or a run's own with flags laid over them
        options, resumed, initial = read_start(options, stack)
        eval_only, named_run = options.section(EvalOptions).eval_only, options.section(RunOptions).run
        for note in options.notes:
            print(note)

        # ---- hardware: the `auto` choices become part of the options
        tune_allocator()
        hardware = choose_hardware(options.section(HardwareOptions))
        options, auto = choose_the_rest(options, hardware, resumed)

        # ---- data
        dataset = open_data(options, resumed, initial)
        refuse_unfit_data(dataset, options.section(GPTConfig).block_size, options.section(EvalOptions))

        # ---- model
        model = build_model(options, dataset, resumed or initial).to(hardware.device)
        if eval_only:
            rows = int(options.section(TrainOptions).micro_batch_size)
            result = evaluate(model, dataset.val, dataset.tokenizer.token_bytes, autocast=hardware.autocast, rows=rows)
            source = resumed or initial
            assert result is not None
            assert source is not None
            print(f"{source.path}: {result.describe()}")
            return 0

        # ---- loop
        if initial is not None:
            print(f"weights and tokenizer from {initial.path}")
        if resumed is not None:
            run = Path(str(named_run))
        else:
            run = claim_run(named_run, options.presets[-1])
            stack.enter_context(RunLock(run))
        stop = stack.enter_context(StopRequest())
        training = Training(run, options, auto, hardware, dataset, model, resumed, stop)
        complete = loop(training, stop)

        # ---- samples
        go_on = f"python train.py --resume={shlex.quote(str(run))}"
        complete = complete and training.finish()
        training.close()
        if training.saved_step != training.step:
            kept = (
                f"the last checkpoint is that of step {training.saved_step}"
                if training.saved_step is not None
                else "there is no checkpoint"
            )
            raise UserError(
                f"the weights of step {training.step} are not saved ({kept}): make room on the disk, then {go_on}"
            )
        if complete:
            say(f"\nnext: python sample.py --run={shlex.quote(str(run))} --num_samples=3")
            say(f"      python sample.py --run={shlex.quote(str(run))} --serve   (a page to try prompts)")
            say(
                f"      python -m training.report {shlex.quote(str(run))}\n      {go_on} --max_steps={2 * training.step}"
            )
            return 0
        say(f"stopped; everything up to step {training.step} is saved; go on with: {go_on}")
        return STOPPED


def loop(training: Training, stop: StopRequest) -> bool:
    """Trains until max_steps, evaluating and saving on the way; False where a signal ended it, after saving."""
    training.begin()
    complete = False
    while True:
        if training.evaluation_is_due() and not training.evaluate_and_save():
            break
        if training.step >= training.plan.max_steps:
            complete = True
            break
        training.update()
        training.log_if_due()
        if stop():
            break
        if training.out_of_time():
            complete = training.evaluate_and_save()
            break
        if training.save_is_due():
            training.save()
    if training.saved_step != training.step:
        training.save()
    return complete


def read_start(
    options: config.Options, stack: ExitStack
) -> tuple[config.Options, Checkpoint | None, ModelFolder | None]:
    """Where a run starts from → its options, and the checkpoint of --resume (locked from here on) or the weights of --init_from."""
    asked = options.section(TrainOptions)
    if asked.resume is not None and asked.init_from is not None:
        raise UserError("--resume goes on with a run, --init_from starts a new one: give one of them")
    options = one_length(options)
    if asked.resume is not None:
        run = Path(asked.resume)
        if not options.section(EvalOptions).eval_only and run.is_dir():
            stack.enter_context(RunLock(run))
        resumed = open_latest(run)
        merged = resumed_options(options, resumed.state["options"])
        if merged.section(TrainOptions).max_steps < resumed.step:
            raise UserError(
                f"--max_steps={merged.section(TrainOptions).max_steps}: {run} is already at step {resumed.step}; give a larger number"
            )
        return merged, resumed, None
    refuse_used_run(options.section(RunOptions).run)
    if asked.init_from is not None:
        initial = open_model_folder(resolve_model_folder(Path(asked.init_from)))
        return with_model_options(options, initial.config), None, initial
    if options.section(EvalOptions).eval_only:
        raise UserError("--eval_only=true needs weights to evaluate: add --resume=RUN or --init_from=RUN")
    return options, None, None


def one_length(options: config.Options) -> config.Options:
    """--max_steps and --budget_minutes both say how long to train: a flag wins over a preset, two flags are an error."""
    if options.section(TrainOptions).budget_minutes is None or options.origin["max_steps"] != "flag":
        return options
    if options.origin["budget_minutes"] == "flag":
        raise UserError("--max_steps and --budget_minutes both say how long to train: give one of them")
    return config.replace(options, budget_minutes=None)


def choose_the_rest(
    options: config.Options, hardware: Hardware, resumed: Checkpoint | None
) -> tuple[config.Options, dict[str, str]]:
    """The options with every `auto` replaced by what it came to, and the reasons by option; prints them."""
    asked, model_options = options.section(TrainOptions), options.section(GPTConfig)
    if asked.deterministic:
        require_determinism()
    micro_batch = choose_micro_batch(asked.micro_batch_size, asked.tokens_per_step, model_options, hardware)
    compiled = choose_compile(asked.compile, hardware, expected_seconds(options))
    attention = choose_attention_path(options.section(HardwareOptions).attention, hardware, model_options.head_size)
    auto = {**hardware.reasons, **micro_batch.reasons, **attention.reasons, **compiled.reasons}
    if resumed is not None:  # chosen when the run was started, unless a flag says otherwise now
        auto = {name: why for name, why in resumed.state["auto"].items() if options.origin[name] != "flag"} | auto
    print(
        f"{hardware.describe()}, micro-batch {micro_batch.value}, attention: {attention.value},"
        f" {'compiled' if compiled.value else 'not compiled'}"
    )
    for name, reason in auto.items():
        print(f"  {name}: {reason}")
    chosen = {
        "device": str(hardware.device),
        "dtype": hardware.dtype_name,
        "threads": hardware.threads,
        "attention": attention.value,
    }
    return config.replace(options, **chosen, micro_batch_size=micro_batch.value, compile=compiled.value), auto


def expected_seconds(options: config.Options) -> float:
    """How long the run would take on a GPU without torch.compile, roughly."""
    asked, shape = options.section(TrainOptions), options.section(GPTConfig)
    if asked.budget_minutes is not None:
        return 60.0 * asked.budget_minutes
    with torch.device("meta"):
        return GPT(shape, seed=None).flops_per_token() * asked.tokens_per_step * asked.max_steps / EAGER_FLOPS


def open_data(options: config.Options, resumed: Checkpoint | None, initial: ModelFolder | None) -> Dataset:
    """The dataset that --data names, prepared on the way where it is text; a resumed run must find the very same tokens."""
    data = options.section(TrainOptions).data
    if resumed is None:
        tokenizer = tokenizer_from_dict(initial.tokenizer) if initial else None
        dataset = resolve_data(data, options.section(PrepareOptions), tokenizer)
        named = options.section(PrepareOptions).tokenizer
        if (
            options.origin["tokenizer"] == "flag"
            and named in (*PUBLISHED, "bpe", "bytes", "char")
            and named != dataset.tokenizer.name
        ):
            raise UserError(
                f"--tokenizer={named}: {dataset.folder} was prepared with {dataset.tokenizer.name}; leave the flag out"
            )
        return dataset
    known = resumed.state["dataset"]
    if options.origin["data"] != "flag" and (Path(known["path"]) / "dataset.json").exists():
        dataset = open_dataset(Path(known["path"]))
        print(f"data: {dataset.folder} ({describe(dataset)})")
    else:
        dataset = resolve_data(data, options.section(PrepareOptions), tokenizer_from_dict(resumed.tokenizer))
    if dataset.fingerprint != known["fingerprint"]:
        raise UserError(
            f"{dataset.folder} holds other tokens (fingerprint {dataset.fingerprint[:12]}) than this run was trained on"
            f" ({known['fingerprint'][:12]}): resuming needs the same data; for other data start anew with --init_from"
        )
    return dataset


def build_model(options: config.Options, dataset: Dataset, source: Checkpoint | ModelFolder | None) -> GPT:
    """The model for the dataset's vocabulary, with weights of its own or those of `source`."""
    tokenizer = dataset.tokenizer
    model_config = replace(options.section(GPTConfig), vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    seed, attention = (
        options.section(RunOptions).seed if source is None else None,
        options.section(HardwareOptions).attention,
    )
    assert attention != "auto"
    model = GPT(model_config, seed, attention)
    if source is not None:
        try:
            model.import_state(source.model_tensors())
        except ValueError as error:
            raise UserError(f"{source.path}: {error}; its weights and its config do not belong together") from error
    print(
        f"model: {model.n_params():,} parameters, {model_config.n_layer} layers, {model_config.n_embd} channels,"
        f" context {model_config.block_size}"
    )
    return model


if __name__ == "__main__":
    run_script(main)
