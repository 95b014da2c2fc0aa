"""The prompt of the samples that training shows.

A model learns how documents begin from the beginnings that it sees. Of a text with few documents it has seen few, and
what it writes without a prompt begins in mid-sentence; a few words of the val split are a better start.
"""

from __future__ import annotations

import re

from errors import UserError
from prepare_data.shards import Dataset
from prepare_data.split import MIN_DOCUMENTS
from training.options import EvalOptions

MAX_WORDS, MAX_CHARACTERS = 4, 40


def choose_prompt(dataset: Dataset, evals: EvalOptions) -> str:
    """The prompt of the samples: sample_prompt, or for None that of `example_prompt`, which is printed, or "".

    "" where no samples are drawn. Raises UserError on a character that is not in the vocabulary.
    """
    sample_prompt = evals.sample_prompt
    if evals.eval_only or evals.sample_tokens == 0:
        return ""
    if sample_prompt is None:
        prompt = example_prompt(dataset)
        if prompt:
            print(f"samples start with {prompt!r}, words of the val split, since this text has few document beginnings")
        return prompt or ""
    try:
        dataset.tokenizer.encode(sample_prompt)
    except UserError as error:
        raise UserError(f"--sample_prompt={sample_prompt!r}: {error}") from error
    return sample_prompt


def example_prompt(dataset: Dataset) -> str | None:
    """The first words of a line or sentence of the val split; None where the train split has at least MIN_DOCUMENTS
    documents, or an unknown number, or where there is no such line."""
    documents = [shard.get("documents") for shard in dataset.meta["shards"]["train"]]
    if None in documents or sum(documents) >= MIN_DOCUMENTS:
        return None
    ids = dataset.val.read(0, min(len(dataset.val), 2000))
    text = b"".join(dataset.tokenizer.token_bytes[i] for i in ids).decode("utf-8", errors="ignore")
    starts = re.finditer(r"(?:\n\s*|[.!?。]\s+)(?=\w)", text)  # of a line or a sentence; the first one may be cut off
    for start in starts:
        words = text[start.end() :].partition("\n")[0].split(" ")[:MAX_WORDS]
        prompt = " ".join(words)[:MAX_CHARACTERS].strip()
        if prompt.isprintable() and len(prompt) >= 3:
            return prompt
    return None
