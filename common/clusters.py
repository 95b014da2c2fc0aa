"""The standard error of a loss, as an estimate for the text from which the scored one was drawn.

Losses of one document, or of neighboring windows, are alike, so that a standard error over windows or tokens is too
small. Errors are therefore taken over clusters, the sums of whole documents or of blocks of the text (figures in
bench/NOTES.md). Knows no model and no text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

DOCUMENT_CLUSTERS = 64  # documents that begin in the same 64th of the text are one cluster
MIN_PARTS, MAX_BLOCKS = 8, 16  # numbers of blocks of the text
ROUGH = 10  # with fewer clusters of equal size an error is itself uncertain by a quarter and more
CONFIDENCE = 0.9975  # of a rise, one-sided: about 5 % false alarms in 20 evaluations


def block_count(n_windows: int) -> int:
    """Number of blocks of a text of so many windows. sqrt(n) is the usual compromise between long and many blocks
    (Flegal and Jones 2010); beyond about 16 little is gained (Schmeiser 1982), and with very few the estimate itself
    is noise."""
    return min(n_windows, MAX_BLOCKS, max(MIN_PARTS, math.isqrt(n_windows)))


@dataclass(frozen=True)
class Clusters:
    """Parts of a text that are taken as independent: sums of nats, and numbers of targets (or of bytes, for the error
    of nats per byte) > 0, (K,) each, K > 1."""

    nats: list[float]
    counts: list[int]

    @property
    def effective(self) -> float:
        """The number of clusters of equal size that tell as much (Kish 1965)."""
        counts = np.array(self.counts, dtype=float)
        return float(counts.sum() ** 2 / np.square(counts).sum())

    def standard_error(self) -> float:
        """Of the mean nats per target, by the delete-one jackknife."""
        nats, counts = np.array(self.nats), np.array(self.counts, dtype=float)
        shares = counts / counts.sum()
        deviations = (nats / counts - nats.sum() / counts.sum()) * shares / (1 - shares)
        return math.sqrt(float(np.square(deviations).sum()) * (len(counts) - 1) / len(counts))

    def change_error(self, before: Clusters) -> float:
        """Standard error of the difference of the losses of two evaluations, by the differences within each cluster,
        which vary far less than the losses."""
        return Clusters(np.subtract(self.nats, before.nats).tolist(), self.counts).standard_error()

    def clear_rise(self, before: Clusters) -> float:
        """The difference of the losses of two evaluations beyond which it is hardly chance."""
        return self.change_error(before) * student_quantile(CONFIDENCE, max(1.0, self.effective - 1))


def student_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t by the expansion in 1/degrees (Abramowitz and Stegun 26.7.5), from about 5 degrees on."""
    z = NormalDist().inv_cdf(probability)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / degrees ** (i + 1) for i, term in enumerate(terms))
