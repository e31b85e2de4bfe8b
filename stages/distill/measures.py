"""How good and how close to its teacher a student is between rounds, by what is cached and what it just said."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from pipeline import console
from pipeline.learning.forward import per_row, score_tokens
from pipeline.objectives.sparse import sparse_divergence
from pipeline.store.schema import Row
from pipeline.tasks import Task, get_task
from pipeline.tasks.diversity import distinct_n
from stages.distill.answering import Answering

# What a round found, made and took.
COSTS = (
    "samples_found", "samples_drawn", "rows_found", "rows_scored", "tokens_scored", "seconds_drawing",
    "seconds_scoring",
)  # fmt: skip


@contextmanager
def evaluating(model: torch.nn.Module):
    """The model without dropout, and as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


def closeness(
    model: torch.nn.Module, teachers: Sequence[Row], own: Sequence[Row], old: Sequence[np.ndarray], batch_size: int
) -> dict[str, float]:
    """KL both ways in nats per token, as far as the rows tell; old: the model's log-probabilities [T] of its own rows.

    `kl` is KL(T‖S) and `reverse_kl` KL(S‖T), both on the teacher's states; with `own_` before, on the model's own.
    `own_reverse_kl`, the mean of log S - log T over the model's own samples at temperature 1, is unbiased. `kl` and
    `own_kl` are too where the kept tokens are sampled, and bounds of a plain top k; `reverse_kl` is a bound.
    """
    measures = {}
    for name, divergence, rows in (("kl", "fkl", teachers), ("reverse_kl", "rkl", teachers), ("own_kl", "fkl", own)):
        if len(rows) and rows[0].k:
            measures[name] = _mean(_divergences(model, rows, divergence, batch_size))
    if len(own):
        measures["own_reverse_kl"] = _mean(s - row.logprobs for s, row in zip(old, own, strict=True))
    return measures


def _divergences(model, rows: Sequence[Row], name: str, batch_size: int):
    divergence = sparse_divergence(name, tail="sampled" if rows[0].tau is not None else "bucket")
    with evaluating(model):
        values = per_row(
            rows, lambda batch: [score_tokens(model, batch, divergence).divergence], model.device, True, batch_size
        )
        yield from (each for (each,) in values)


def _mean(values) -> float:
    flat = np.concatenate([np.asarray(each, np.float64) for each in values])
    return float(flat.mean())


def measured(
    answering: Answering,
    model: torch.nn.Module,
    teachers: Sequence[Row],
    own: Sequence[tuple[Row, np.ndarray]],
    greedy: Mapping[str, str],
) -> dict[str, float]:
    """Closeness and quality on held-out prompts.

    own: the model's scored samples, with its log-probabilities; greedy: its greedy answers, by prompt id.
    """
    if not own:
        return {}
    rows, old = zip(*own, strict=True)
    measures = closeness(model, teachers, rows, old, answering.settings.batch_size)
    references = {each.prompt.id: each.prompt.references for each in answering.held_out}
    both = [row for row in rows if row.prompt_id in greedy]
    texts = [greedy[row.prompt_id] for row in both], [row.response for row in both]
    task = get_task(answering.params.prepare.task)
    return measures | quality(task, *texts, [references[row.prompt_id] for row in both])


def quality(
    task: Task, greedy: Sequence[str], sampled: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """The task's first metric on greedy and on sampled answers [prompts], and distinct-2 of the sampled ones."""
    metric = task.metrics[0]
    return {
        metric.name: metric(greedy, references),
        f"sampled_{metric.name}": metric(sampled, references),
        "distinct_2": distinct_n([sampled], 2),
    }


def say(found: Mapping, measures: Mapping) -> None:
    """One line on what a round took, one on how the student does."""
    console.say(
        f"samples: {found['samples_found']:,} found, {found['samples_drawn']:,} drawn in "
        f"{found['seconds_drawing']:.0f} s; the teacher: {found['rows_found']:,} found, {found['rows_scored']:,} "
        f"scored ({found['tokens_scored']:,} tokens) in {found['seconds_scoring']:.0f} s"
    )
    if measures:
        console.say("held out: " + ", ".join(f"{name} {value:.4g}" for name, value in measures.items()))
