"""All options of Sprout: which sections exist and which script takes which.

Each section is declared beside the code that it configures. loader.py reads presets, flags and saved configs; resume.py
merges options with those of a checkpoint; start.py decides how a run starts. The other files are presets. Nothing that
this file imports may import config.
"""

from collections.abc import Sequence
from pathlib import Path

from common.options import HardwareOptions, RunOptions
from config.loader import Loader, Options, dump, replace
from generation.options import SampleScriptOptions, SamplingOptions
from model import GPTConfig
from prepare_data import PrepareOptions, SourceOptions
from server.options import ServerOptions
from training.options import EvalOptions, LoggingOptions, OptimizerOptions, TrainOptions

__all__ = ["SCRIPTS", "SECTIONS", "Options", "dump", "fixed_names", "load", "replace"]

SECTIONS: dict[str, type] = {
    "run": RunOptions,
    "source": SourceOptions,
    "what to sample from": SampleScriptOptions,
    "sampling": SamplingOptions,
    "server": ServerOptions,
    "training": TrainOptions,
    "model": GPTConfig,
    "optimizer and schedule": OptimizerOptions,
    "evaluation and saving": EvalOptions,
    "data preparation": PrepareOptions,
    "hardware": HardwareOptions,
    "logging": LoggingOptions,
}

SCRIPTS: dict[str, tuple[type, ...]] = {
    "train.py": (
        RunOptions,
        TrainOptions,
        GPTConfig,
        OptimizerOptions,
        EvalOptions,
        PrepareOptions,
        HardwareOptions,
        LoggingOptions,
    ),
    "sample.py": (RunOptions, SampleScriptOptions, SamplingOptions, ServerOptions, HardwareOptions),
    "prepare_data": (SourceOptions, PrepareOptions),
}

USAGE = {
    "train.py": """
usage: python train.py [PRESET ...] [--option=value ...]

Trains a language model on your text and prints samples. Arguments are read from left to right; the last one wins.

  python train.py                                        train the quickstart preset
  python train.py --data=my_novel.txt                    train on your own text: a file, or a folder of files
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
  python sample.py --interactive                         an interactive session, line by line
  python sample.py --inspect=out.html --prompt="Once"    show attention maps, scores, next-token probabilities
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
""",
}

_loader = Loader(SECTIONS, SCRIPTS, USAGE, Path(__file__).resolve().parent.parent)


def load(script: str, argv: Sequence[str], *, default_preset: str | None = None) -> Options:
    """The options of a script from its command line. Raises one UserError with all problems; --help exits with 0."""
    return _loader.load(script, argv, default_preset=default_preset)


def fixed_names() -> set[str]:
    """Names of the options that a resumed run may not change."""
    return {name for name, option in _loader.options.items() if option.fixed}
