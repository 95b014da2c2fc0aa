"""--keep_share: the text of the initial weights, mixed into the new one so that it is not forgotten.

A checkpoint names the dataset of its run, and those that the run has kept itself, so a chain of runs keeps all of
them, each by its size. `open_kept` finds them again; `KeptText.watch` measures at the start and at the end of a run
what became of their val loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from checkpoint import Checkpoint
from common.signature import own_texts
from errors import UserError
from model_folder import TOKENIZER, ModelFolder
from prepare_data import PrepareOptions
from prepare_data.resolve import recorded_dataset
from prepare_data.shards import Dataset
from training.data import JoinedSplits, TokenSource, TrainBatches
from training.evaluation import Evaluation
from training.logger import RunLogger
from training.metrics import log
from training.options import TrainOptions
from training.state import TrainState

KEEP_SHARE = 0.25  # measured: bench/NOTES.md
MAX_TOKENS = 1 << 16  # of each val split that are evaluated
POOR_FIT = 0.75  # of the bytes a token in the old text, below which a tokenizer does not suit a new one


@dataclass(frozen=True)
class KeptText:
    """The datasets that are mixed in, and the share of the windows that come from them: 0 where there are none.
    values, reasons: what a new run records of it, by option."""

    datasets: list[Dataset] = field(default_factory=list)
    share: float = 0.0
    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def train(self) -> TokenSource | None:
        return JoinedSplits([dataset.train for dataset in self.datasets]) if self.datasets else None

    def facts(self) -> dict[str, Any]:
        """For a checkpoint's state.json."""
        return {"kept": [identity(dataset) for dataset in self.datasets]}

    def watch(
        self, state: TrainState, batches: TrainBatches, logger: RunLogger, score: Callable[..., Evaluation | None],
        is_end: bool,
    ) -> bool:  # fmt: skip
        """Evaluates what is kept and records it, before the first step and at the end. Returns whether it did. score:
        evaluate, but for its split; it returns None after a signal, and nothing is recorded then."""
        progress = state.progress
        if not self.datasets or (state.step > 0) != is_end or len(progress.kept) != is_end * len(self.datasets):
            return False
        with logger.clock.pause():
            results = [score(dataset.val, max_tokens=MAX_TOKENS, rows=batches.size) for dataset in self.datasets]
        found = [result for result in results if result is not None]
        if len(found) < len(results):
            return False
        for i, (dataset, result) in enumerate(zip(self.datasets, found, strict=True)):
            logger.kept_text(state.step, dataset.name, result, progress.kept[i] if is_end else None)
        if is_end:
            new, old = batches.windows.epochs(state.step * state.rows)
            log(f"read {new:.2f} times: the new text; {old:.2f} times: the old text")
        else:
            progress.kept = [
                {"val_loss": result.loss, "compared": [asdict(kind) for kind in result.compared]} for result in found
            ]
        return True


def identity(dataset: Dataset) -> dict[str, str]:
    return {"name": dataset.name, "path": str(dataset.folder.resolve()), "fingerprint": dataset.fingerprint}


def open_kept(
    dataset: Dataset, train: TrainOptions, block_size: int, prepare: PrepareOptions, resumed: Checkpoint | None,
    initial: ModelFolder | None, is_forced: bool,
) -> KeptText:  # fmt: skip
    """What a run of `dataset` keeps: as before where it is resumed, else the text of the initial weights. Text that is
    missing is noted in a line. Raises UserError where the user has asked for it (is_forced), or the run had it before.
    """
    if resumed is not None:
        found, problems = find_datasets(own_texts(resumed.state, only_kept=True), prepare, resumed.model)
        if problems:
            raise UserError(f"{'; '.join(problems)}: resuming needs the same text, which the run mixes in; restore it")
        return KeptText(found, train.keep_share or 0.0)
    if initial is None:
        return KeptText()
    entries = texts_of(initial)
    found, problems = find_datasets(entries, prepare, initial)
    log_fit(dataset, found)
    kept = [text for text in found if text.fingerprint != dataset.fingerprint]
    if not entries:
        problems = [f"{initial.path} does not record the text of its weights"]
    if kept and sum(len(text.train) for text in kept) <= block_size:
        kept, problems = [], [*problems, f"it is shorter than a window of {block_size} tokens"]
    if is_forced and train.keep_share:
        refused = problems or ["the weights were trained on this very text"] * (not kept)
        if refused:
            raise UserError(f"--keep_share={train.keep_share}: {'; '.join(refused)}; leave the flag out")
    elif problems and train.keep_share != 0:
        log(f"note: the old text is not mixed in, and may be forgotten: {'; '.join(problems)}")
    share = KEEP_SHARE if train.keep_share is None else train.keep_share
    if not kept or share == 0:
        return KeptText(values={"keep_share": 0.0}, reasons={} if is_forced else {"keep_share": "no old text to keep"})
    names = ", ".join(f"{text.name} ({len(text.train):,} tokens)" for text in kept)
    log(f"old text: {share:.0%} of the windows come from {names}, so that it is not forgotten (--keep_share)")
    reasons = {} if train.keep_share is not None else {"keep_share": "so that the old text is not forgotten"}
    return KeptText(kept, share, {"keep_share": share}, reasons)


def texts_of(initial: ModelFolder) -> list[dict[str, str]]:
    """The datasets that weights were trained on, as in `identity`; none where that is not recorded."""
    state = initial.state()
    return [] if state is None else own_texts(state)


def find_datasets(
    entries: Sequence[Mapping[str, str]], prepare: PrepareOptions, model: ModelFolder
) -> tuple[list[Dataset], list[str]]:
    """The recorded datasets that are still there, and a problem for each of the others."""
    found, problems = [], []
    for entry in entries:
        try:
            dataset = recorded_dataset(entry, model.path / TOKENIZER, prepare.data_dir)
        except UserError as error:
            problems.append(str(error))
            continue
        if dataset is None:
            problems.append(f"{entry.get('path') or Path(prepare.data_dir) / entry['name']} is gone")
        elif dataset.fingerprint != entry.get("fingerprint"):
            problems.append(f"{dataset.folder} holds other tokens than the weights were trained on")
        else:
            found.append(dataset)
    return found, problems


def log_fit(dataset: Dataset, old: Sequence[Dataset]) -> None:
    """Logs how well a tokenizer of byte pairs suits the new text, beside the text that it came with."""
    new = bytes_per_token(dataset)
    before = bytes_per_token(old[0]) if old else None
    if dataset.tokenizer.name in ("bytes", "char") or new is None:
        return
    line = f"tokenizer: {new:.2f} bytes a token in the new text"
    if before is not None:
        line += f", {before:.2f} in the old one"
        if new < POOR_FIT * before:
            line += ": it suits the new text poorly; a new run without --init_from trains a tokenizer for it"
    log(line)


def bytes_per_token(dataset: Dataset) -> float | None:
    """Of the train split; None for the shards of other programs, which do not record it."""
    shards = dataset.meta["shards"]["train"]
    if any(shard.get("bytes") is None for shard in shards):
        return None
    return sum(shard["bytes"] for shard in shards) / max(1, sum(shard["tokens"] for shard in shards))
