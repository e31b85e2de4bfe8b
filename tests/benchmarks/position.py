"""One position of a real teacher and the tokens that a sampled support keeps of it: docs/support.svg.

    python -m tests.benchmarks.position MODEL TEXT [K] [--plot docs/support.svg]

Runs the model over TEXT and draws K (16) of the tokens that may come next. Prints, as JSON, tau, how many tokens are
certain, the mass of the K likeliest, and the mass of the kept ones.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from pipeline.models import load_lm, load_tokenizer
from pipeline.objectives.supports import systematic, weighted


@torch.no_grad()
def next_token(model: Path, text: str) -> torch.Tensor:
    """Probabilities [V] of what comes next."""
    ids = torch.tensor([load_tokenizer(model)(text)["input_ids"]])
    return torch.softmax(load_lm(model, "float32")(input_ids=ids).logits[0, -1].float(), -1)


def plot(p: torch.Tensor, kept: torch.Tensor, weights: torch.Tensor, tau: float, path: Path) -> None:
    """Probability over rank, with tau, the tokens that are kept, and what each of them stands for."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    ordered = p.sort(descending=True)
    rank = torch.empty_like(ordered.indices)
    rank[ordered.indices] = torch.arange(1, len(p) + 1)
    at, own, k = rank[kept], p[kept], len(kept)
    certain, lowest = own > tau, float(own.min()) / 8
    shown = torch.logspace(0, math.log10(int((p >= lowest).sum())), 400).long().unique() - 1
    with matplotlib.rc_context({"svg.hashsalt": "xkd", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure((7, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.loglog(shown + 1, ordered.values[shown], color="0.6", lw=1, label="all tokens of the teacher")
        axes.axhline(tau, color="tab:red", lw=1, ls="--", label="threshold τ")
        axes.axvspan(0.8, k + 0.5, color="0.93", zorder=0, label=f"what a top {k} keeps")
        axes.vlines(at[~certain], own[~certain], tau, color="tab:blue", lw=0.8)
        axes.plot(at[certain], own[certain], "o", color="tab:green", ms=5, label="kept for certain, weight p")
        axes.plot(at[~certain], own[~certain], "o", mfc="white", mec="tab:blue", ms=4)
        axes.plot(at[~certain], weights[~certain], "o", color="tab:blue", ms=5, label="drawn, weight τ")
        axes.set(xlabel="rank of the token", ylabel="probability", xlim=(0.8, int(shown[-1])), ylim=(lowest, 1))
        axes.legend(fontsize=8, loc="lower left")
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text")
    parser.add_argument("k", type=int, nargs="?", default=16)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    p = next_token(options.model, options.text)
    drawn = systematic(p[None].clone(), options.k, torch.tensor([0.5], dtype=torch.float64))
    kept, tau = drawn.places[0], float(drawn.tau)
    _, weights = weighted(p[kept].log()[None], drawn.tau)
    if options.plot:
        plot(p, kept, weights[0], tau, options.plot)
    print(json.dumps({
        "tau": tau, "certain": int((p[kept] > tau).sum()),
        "mass_of_the_likeliest": float(p.topk(options.k).values.sum()),
        "mass_of_the_kept": float(p[kept].sum()), "weights": float(weights.sum()),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
