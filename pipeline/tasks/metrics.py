"""Metrics as per-prompt statistics, so that one bootstrap serves accuracy, BLEU, chrF and ROUGE alike.

A metric turns each (hypothesis, references) pair into a row of numbers; its score is a function of their mean over
prompts. Resampling prompts is then a matrix product, and two models are compared on the same resampled prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

Hypotheses = Sequence[str]
References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Metric:
    """A named score in 0..100.

    statistics: (hypotheses [n], references [n][r]) -> float64 [n, D]
    score: float64 [D], the mean of the statistics over prompts -> the score
    """

    name: str
    statistics: Callable[[Hypotheses, References], np.ndarray]
    score: Callable[[np.ndarray], float]
    higher_is_better: bool = True

    def __call__(self, hypotheses: Hypotheses, references: References) -> float:
        return self.score(self.statistics(hypotheses, references).mean(axis=0))


def _percent(mean: np.ndarray) -> float:
    return 100.0 * float(mean[0])


def accuracy(extract: Callable[[str], str | None]) -> Metric:
    """Exact match of the extracted answer with that of any reference."""

    def statistics(hypotheses: Hypotheses, references: References) -> np.ndarray:
        right = [
            (answer := extract(hypothesis)) is not None and answer in {extract(r) for r in refs}
            for hypothesis, refs in zip(hypotheses, references, strict=True)
        ]
        return np.asarray(right, dtype=np.float64)[:, None]

    return Metric("accuracy", statistics, _percent)


def rouge(name: str) -> Metric:
    """F1 of ROUGE `name` (rouge1, rouge2, rougeL; rouge-score's own tokenizer), the best of the references."""

    def statistics(hypotheses: Hypotheses, references: References) -> np.ndarray:
        scorer = _rouge_scorer(name)
        best = [
            max(scorer.score(reference, hypothesis)[name].fmeasure for reference in refs)
            for hypothesis, refs in zip(hypotheses, references, strict=True)
        ]
        return np.asarray(best, dtype=np.float64)[:, None]

    return Metric(name, statistics, _percent)


@cache
def _rouge_scorer(name: str):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([name], use_stemmer=False)


def bleu() -> Metric:
    """Corpus BLEU (sacrebleu, 13a)."""
    return _corpus_metric("bleu", _sacrebleu_bleu)


def chrf() -> Metric:
    """Corpus chrF2 (sacrebleu)."""
    return _corpus_metric("chrf", _sacrebleu_chrf)


@cache
def _sacrebleu_bleu():
    from sacrebleu.metrics import BLEU

    return BLEU(force=True)  # without its warning about tokenized text


@cache
def _sacrebleu_chrf():
    from sacrebleu.metrics import CHRF

    return CHRF()


def _corpus_metric(name: str, scorer: Callable) -> Metric:
    """A sacrebleu metric through its own per-segment statistics, whose sums give the corpus score.

    BLEU and chrF depend on ratios of these sums alone, except that BLEU smooths zero counts; so the mean is scaled
    back to a sum over `scale` prompts, which is kept as the last statistic.
    """

    def statistics(hypotheses: Hypotheses, references: References) -> np.ndarray:
        longest = max(len(refs) for refs in references)
        streams = [[refs[min(i, len(refs) - 1)] for refs in references] for i in range(longest)]
        rows = scorer()._extract_corpus_statistics(list(hypotheses), streams)
        rows = np.asarray(rows, dtype=np.float64)
        return np.hstack([rows, np.full((len(rows), 1), len(rows), dtype=np.float64)])

    def score(mean: np.ndarray) -> float:
        total = np.rint(mean[:-1] * mean[-1])
        return float(scorer()._compute_score_from_stats([int(v) for v in total]).score)

    return Metric(name, statistics, score)
