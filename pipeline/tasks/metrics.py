"""Metrics as per-prompt statistics, so that the same intervals serve accuracy, BLEU, chrF and ROUGE.

A metric turns each (hypothesis, references) pair into a row of numbers; its score is a function of their mean over
prompts, also where a prompt has several hypotheses. docs/metrics.md defines each and names its reference tool.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import ClassVar

import numpy as np

Hypotheses = Sequence[str]
References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Percentage:
    """A score from 0 to 100 as a function of the mean statistics [D]; its `ends` bound its intervals."""

    of: Callable[[np.ndarray], float]
    ends: ClassVar[tuple[float, float]] = (0.0, 100.0)

    def __call__(self, mean: np.ndarray) -> float:
        return self.of(mean)


@dataclass(frozen=True)
class Metric:
    """A named score in 0..100.

    statistics: (hypotheses [n], references [n][r]) -> float64 [n, D]
    score: float64 [D], the mean of the statistics over prompts -> the score
    signature: references [n][r] -> the settings with which another tool gives the same score
    """

    name: str
    statistics: Callable[[Hypotheses, References], np.ndarray]
    score: Percentage
    signature: Callable[[References], str]
    higher_is_better: bool = True

    def __call__(self, hypotheses: Hypotheses, references: References) -> float:
        return self.score(self.statistics(hypotheses, references).mean(axis=0))

    def pooled(self, samples: Sequence[Hypotheses], references: References) -> np.ndarray:
        """Statistics [n, D] of s samples [n][s] per prompt, whose score is that of all n * s pairs."""
        counts = [len(hypotheses) for hypotheses in samples]
        hypotheses = [hypothesis for row in samples for hypothesis in row]
        repeated = [refs for refs, count in zip(references, counts, strict=True) for _ in range(count)]
        return self.statistics(hypotheses, repeated).reshape(len(counts), max(counts), -1).mean(axis=1)


_share = Percentage(lambda mean: 100.0 * float(mean[0]))


def accuracy(
    answer: Callable[[str], str | None],
    target: Callable[[str], str | None] | None = None,
    name: str = "accuracy",
    rule: str = "exact match",
) -> Metric:
    """Whether a hypothesis has an answer that equals a reference's; `target` extracts that one, by default `answer`."""
    target = target or answer

    def statistics(hypotheses: Hypotheses, references: References) -> np.ndarray:
        right = [
            (said := answer(hypothesis)) is not None and said in {target(reference) for reference in refs}
            for hypothesis, refs in zip(hypotheses, references, strict=True)
        ]
        return np.asarray(right, dtype=np.float64)[:, None]

    return Metric(name, statistics, _share, lambda references: rule)


def rouge(name: str, stemmer: bool = True) -> Metric:
    """F1 of ROUGE `name` (rouge1, rouge2, rougeL; rouge-score's own tokenizer), the best of the references."""

    def statistics(hypotheses: Hypotheses, references: References) -> np.ndarray:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([name], use_stemmer=stemmer)
        best = [
            max(scorer.score(reference, hypothesis)[name].fmeasure for reference in refs)
            for hypothesis, refs in zip(hypotheses, references, strict=True)
        ]
        return np.asarray(best, dtype=np.float64)[:, None]

    def signature(references: References) -> str:
        return f"F1|refs:best|stemmer:{'Porter' if stemmer else 'none'}|rouge-score:{version('rouge-score')}"

    return Metric(name, statistics, _share, signature)


def bleu() -> Metric:
    """Corpus BLEU (sacrebleu, 13a)."""
    return _corpus_metric("bleu")


def chrf() -> Metric:
    """Corpus chrF2 (sacrebleu)."""
    return _corpus_metric("chrf")


@cache
def _sacrebleu(name: str):
    from sacrebleu.metrics import BLEU, CHRF

    return CHRF() if name == "chrf" else BLEU(force=True)  # without its warning about tokenized text


def _corpus_metric(name: str) -> Metric:
    """A sacrebleu metric through its own per-segment counts, whose sums give the corpus score.

    BLEU and chrF depend on ratios of these sums alone, except that BLEU smooths zero counts; so the mean is scaled
    back to the sum over all segments, using their number, which is the last statistic.
    """

    def statistics(hypotheses: Hypotheses, references: References) -> np.ndarray:
        longest = max(len(refs) for refs in references)
        streams = [[refs[min(i, len(refs) - 1)] for refs in references] for i in range(longest)]
        rows = _sacrebleu(name)._extract_corpus_statistics(list(hypotheses), streams)
        return np.asarray([[*row, len(rows)] for row in rows], dtype=np.float64)

    def score(mean: np.ndarray) -> float:
        # Sums over a part of the prompts need not be whole, but zero must be exactly zero.
        sums = np.round(mean[:-1] * mean[-1], 6)
        return float(_sacrebleu(name)._compute_score_from_stats(sums.tolist()).score)

    def signature(references: References) -> str:
        counts = {len(refs) for refs in references}
        tool = type(_sacrebleu(name))()
        tool.num_refs = counts.pop() if len(counts) == 1 else -1  # as a corpus score would set it; -1: they vary
        return str(tool.get_signature())

    return Metric(name, statistics, Percentage(score), signature)
