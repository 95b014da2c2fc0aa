"""All options of Sprout: which sections exist and which script takes which.

Each section is declared in the package that it configures. loader.py reads presets, flags and saved configs; resume.py
merges options with those of a checkpoint; start.py decides how a run starts. The modules that NOT_PRESETS of loader.py
names are code, the other files are presets. Nothing that this file imports may import config, or torch: --help and the
answer to a wrong option would wait for it.
"""

import ast
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from common.option import option_names, show
from common.options import HardwareOptions, RunOptions
from config.loader import HELP, Loader, Options, dump, is_flag, replace
from errors import UserError, quote, run_script
from generation.options import SampleScriptOptions, SamplingOptions
from prepare_data import ConvertOptions, PrepareOptions, SourceOptions, TextOptions
from server.options import ServerOptions
from training.options import EvalOptions, LoggingOptions, OptimizerOptions, TrainOptions
from training.plan import OPEN_SCHEDULES, first_values

__all__ = [
    "AUTO",
    "HELP",
    "PLANNED",
    "SCRIPTS",
    "SECTIONS",
    "Options",
    "check",
    "check_command_line",
    "dump",
    "fixed_names",
    "load",
    "replace",
    "without_auto",
]

ROOT = Path(__file__).resolve().parent.parent


def class_alone(path: Path, name: str) -> type:
    """A class of a source file, made by running the class and the file's imports of the standard library, nothing else.

    So the options of the model are read and checked without model.py's import of torch, which takes over a second.
    """
    module = ModuleType(f"{path.stem}.{name}")
    module.__file__, sys.modules[module.__name__] = str(path), module
    kept: list[ast.stmt] = []
    for node in ast.parse(path.read_bytes()).body:
        sources = [node.module] if isinstance(node, ast.ImportFrom) else []
        sources += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        is_standard = any(str(source).partition(".")[0] in sys.stdlib_module_names for source in sources)
        if is_standard or (isinstance(node, ast.ClassDef) and node.name == name):
            kept.append(node)
    exec(compile(ast.Module(kept, []), str(path), "exec"), vars(module))
    return vars(module)[name]


ModelOptions = class_alone(ROOT / "model.py", "GPTConfig")

SECTIONS: dict[str, type] = {
    "run": RunOptions,
    "source": SourceOptions,
    "converting": ConvertOptions,
    "what to sample from": SampleScriptOptions,
    "sampling": SamplingOptions,
    "server": ServerOptions,
    "training": TrainOptions,
    "model": ModelOptions,
    "optimizer and schedule": OptimizerOptions,
    "evaluation and saving": EvalOptions,
    "reading text": TextOptions,
    "data preparation": PrepareOptions,
    "hardware": HardwareOptions,
    "logging": LoggingOptions,
}

SCRIPTS: dict[str, tuple[type, ...]] = {
    "train.py": (
        RunOptions,
        TrainOptions,
        ModelOptions,
        OptimizerOptions,
        EvalOptions,
        TextOptions,
        PrepareOptions,
        HardwareOptions,
        LoggingOptions,
    ),
    "sample.py": (RunOptions, SampleScriptOptions, SamplingOptions, ServerOptions, TextOptions, HardwareOptions),
    "prepare_data": (SourceOptions, ConvertOptions, TextOptions, PrepareOptions),
}

NEEDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("tokenizer", "bpe"),
    "split_pattern": ("tokenizer", "bpe"),
    "logprobs": ("output", "jsonl"),
    "novelty_words": ("novelty", True),
    "data": ("novelty", True),
    "host": ("serve", True),
    "port": ("serve", True),
    "api_token": ("serve", True),
    "trackio_project": ("trackio", True),
}
"""Options that have an effect only with a certain value of another one, in the scripts that have that."""

FOR_SCORES = {"score_end", "eval_stride", *option_names(TextOptions)}
"""Options of sample.py that concern --score alone."""
WITH_SCORE = {"run", "checkpoint", "quantize", "output", "score", *FOR_SCORES, *option_names(HardwareOptions)}

AUTO = "--resume=auto"
PLANNED = "finetune"
"""The preset that leaves to a plan what it does not give."""

USAGE = {
    "train.py": """
usage: python train.py [PRESET ...] [--option=value ...]

Trains a language model on your text and prints samples. Arguments are read from left to right; the last one wins.
With --data and no preset, a plan chooses all options that are not given; it is printed first.

  python train.py                                        train the quickstart preset
  python train.py --data=my_novel.txt                    train on your own text, until the val loss stops falling
  python train.py --data=my_novel.txt --budget_minutes=15     the best model that 15 minutes give
  python train.py --data=my_novel.txt --plan             only print the plan
  python train.py gpt2_124m --plan --gpus=1,8,64         memory, time, failures and money of a run on many GPUs
  python train.py --data=my_novel.txt --budget_minutes=60 --try=4    short runs first, which may find better settings
  python train.py finetune --init_from=models/gpt2 --data=my_novel.txt --budget_minutes=30     a model that exists
  python train.py shakespeare_char --max_steps=500       use a preset and change an option
  python train.py --resume=runs/quickstart-1             resume a run
  python sample.py --prompt="Once"                       sample from the newest run
""",
    "sample.py": """
usage: python sample.py [PRESET ...] [--option=value ...]

Samples text from a trained model. Arguments are read from left to right; the last one wins.

  python sample.py                                       the newest run, its best checkpoint, a new document
  python sample.py --run=runs/notes --prompt="Once"      continue a prompt with one of your runs
  python sample.py --temperature=0.5 --top_k=50          less random
  python sample.py --stop='\\n\\n' --stop=THE             stop before an empty line, or before THE
  python sample.py --prompts=many.jsonl --output=jsonl   many prompts in, JSON lines with log-probabilities out
  python sample.py --novelty                             mark what is copied from the training text
  python sample.py --interactive                         an interactive session, line by line
  python sample.py --inspect=out.html --prompt="Once"    show attention maps, scores, next-token probabilities
  python sample.py --score=letters/                      bits per byte of each file: how well the model predicts it
  python sample.py --serve                               a page to try prompts, and OpenAI's API, on this machine

Filters apply in this order: repetition penalty, presence and frequency penalties, temperature (0: greedy, later
filters have no effect), top-k, top-p, min-p. Log-probabilities are those before all filters.
""",
    "prepare_data": """
usage: python -m prepare_data SOURCE [PRESET ...] [--option=value ...]

Turns text into a dataset of tokens in data/NAME. train.py does this automatically; this command has more options.

  python -m prepare_data text --input=folder/ --name=notes --tokenizer=bpe --vocab_size=8192
  python -m prepare_data text --input=novel.txt --dry_run=true      only count and show a sample
  python train.py --data=notes                                      then train on it

convert turns the token shards of other programs into a dataset, and a dataset into their shards.

  python -m prepare_data convert --input=fineweb10B --name=fineweb --tokenizer=gpt2
  python -m prepare_data convert --input=notes --to=nanogpt --out=nanoGPT/data/notes
""",
}

_loader = Loader(SECTIONS, SCRIPTS, USAGE, ROOT)


def load(script: str, argv: Sequence[str]) -> Options:
    """The options of a script from its command line. Raises one UserError with all problems; --help exits with 0.

    With --resume=auto they are those of a new run, but for `resume`; config/restart.py looks what there is."""
    if script == "train.py" and AUTO in argv:
        options = load(script, without_auto(argv))
        if options.values["run"] is None or options.values["resume"] is not None:
            add = "without another --resume" if options.values["resume"] is not None else "with --run=PATH"
            raise UserError(f"{AUTO} begins the run of --run, or goes on with it: give it {add}")
        return dataclasses.replace(
            options, values=options.values | {"resume": "auto"}, origin=options.origin | {"resume": "flag"}
        )
    resuming = any(arg.startswith("--resume=") for arg in argv)  # a resumed run has its own options
    default_preset = "quickstart" if script == "train.py" and not resuming else None
    if script == "train.py" and needs_plan(argv):
        options = _loader.load(script, argv, complete=first_values)
    else:
        options = _loader.load(script, argv, default_preset=default_preset)
        has_plan = options.values.get("gpus") is not None and not options.values.get("eval_only")
        if options.values.get("plan") and (resuming or not has_plan):
            why = "a resumed run keeps its options" if resuming else "presets and evaluations have none"
            more = "" if resuming else "; with --gpus=8 a preset's costs on 8 GPUs"
            raise UserError(f"--plan shows the plan of a run that has --data=TEXT and no preset; {why}{more}")
    if options.values.get("try") is not None:
        refuse_try(options, argv)
    if not any(options.values.get(name) for name in ("resume", "init_from", "teacher")):  # they have a tokenizer
        refuse_unused(options)
    return options


def without_auto(argv: Sequence[str]) -> list[str]:
    """The arguments without --resume=auto."""
    return [arg for arg in argv if arg != AUTO]


def needs_plan(argv: Sequence[str]) -> bool:
    """Whether a command of train.py names a text and no preset but PLANNED, so that a plan chooses the other
    options."""
    names = {arg.partition("=")[0] for arg in argv if arg.lower() not in ("--eval_only=false", "--resume=none", AUTO)}
    others = {"--resume", "--eval_only", *HELP}
    return "--data" in names and names.isdisjoint(others) and not _loader.has_preset(argv, besides=PLANNED)


def refuse_try(options: Options, argv: Sequence[str]) -> None:
    """Raises UserError where --try=N has no plan whose settings it could try, with the command of `argv` changed so
    that it works."""
    number, minutes, schedule = (options.values[name] for name in ("try", "budget_minutes", "schedule"))
    is_planned = needs_plan(argv) and not options.values["init_from"] and not options.values["teachers"]
    if is_planned and minutes is not None and schedule in OPEN_SCHEDULES:
        return
    others = ("--resume", "--init_from", "--keep_share", "--eval_only", "--max_steps", "--schedule", "--teachers")
    kept = [arg for arg in argv if is_flag(arg) and arg.partition("=")[0] not in others]
    kept = [arg for arg in kept if minutes is not None or not arg.startswith("--budget_minutes")]
    for example in ("--data=python_stdlib", "--budget_minutes=15"):
        kept += [example] * (example.partition("=")[0] not in {arg.partition("=")[0] for arg in kept})
    raise UserError(
        f"--try={number} tries settings of a plan, in a part of --budget_minutes: it needs both --data=TEXT and"
        f" --budget_minutes=N, and no preset, --resume, --init_from, --teachers, nor a --schedule other than"
        f" {', '.join(OPEN_SCHEDULES)}; for example: {' '.join(['python train.py', *map(quote, kept)])}"
    )


def refuse_unused(options: Options) -> None:
    """Raises UserError on flags that have no effect because of the value of another option."""
    if options.script == "sample.py" and (problem := unused_with_score(options)):
        raise UserError(problem)
    values, found = options.values, []
    for name, (other, needed) in NEEDS.items():
        is_flag = options.origin.get(name) == "flag" and values[name] is not None
        if is_flag and other in values and values[other] != needed:
            flag, without = f"--{name}={show(values[name])}", f"{other}={show(values[other])}"
            found.append(f"{flag} has no effect with {without}: add --{other}={show(needed)}, or leave --{name} out")
    if found:
        raise UserError("\n".join(found))


def unused_with_score(options: Options) -> str | None:
    """The problem of flags that have no effect with --score, or without it."""
    scores = bool(options.values["score"])
    flags = [name for name, origin in options.origin.items() if origin == "flag"]
    unused = [f"--{name}" for name in flags if (name not in WITH_SCORE if scores else name in FOR_SCORES)]
    if not unused:
        return None
    names = " and ".join([", ".join(unused[:-1]), unused[-1]] if len(unused) > 1 else unused)
    if scores:
        return f"--score scores texts and draws no samples: remove {names}, or remove --score"
    return f"{names} {'concern' if len(unused) > 1 else 'concerns'} --score alone: add --score=FILE, or remove {names}"


def check_command_line(script: str) -> None:
    """Exits where the script ends with --help or with wrong options, before the imports that take seconds."""
    try:
        load(script, sys.argv[1:])
    except (UserError, BrokenPipeError, SystemExit) as ended:
        reason = ended

        def end() -> None:
            raise reason

        run_script(end)


def check(name: str, value: object) -> Any:
    """A stored value in the type of the option `name`. Raises UserError if it does not fit."""
    return _loader.check(name, value)


def fixed_names() -> set[str]:
    """Names of the options that a resumed run may not change."""
    return {name for name, option in _loader.options.items() if option.fixed}
