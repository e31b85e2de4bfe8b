"""How different the samples of one prompt are: distinct-n (higher is more diverse) and Self-BLEU (lower is)."""

from collections.abc import Sequence

import numpy as np


def distinct_n(samples: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams of words over all n-grams among the samples of a prompt (Li et al. 2016), mean over prompts.

    samples: [prompts][samples]. Prompts whose samples have no n-grams count as 0.
    """
    shares = []
    for responses in samples:
        grams = [tuple(words[i : i + n]) for words in map(str.split, responses) for i in range(len(words) - n + 1)]
        shares.append(len(set(grams)) / len(grams) if grams else 0.0)
    return float(np.mean(shares))


def self_bleu(samples: Sequence[Sequence[str]]) -> float:
    """BLEU of each sample against the other samples of its prompt (Zhu et al. 2018), 0..100, mean over all.

    Sentence BLEU of sacrebleu with effective order, since short responses have no long n-grams.
    """
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)
    scores = [
        bleu.sentence_score(response, [*responses[:i], *responses[i + 1 :]]).score
        for responses in samples
        for i, response in enumerate(responses)
    ]
    return float(np.mean(scores))
