"""Have the teacher score what others said: references, their corruptions, and the student's own samples.

Scored references are what `sft` learns from. Corruptions and student samples on training prompts are negatives for the
reward's fit; student samples on held-out prompts, which the task says are right or wrong, are for its audit.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pipeline import console
from pipeline.engines import Ask, Engine
from pipeline.engines.base import needed
from pipeline.engines.hf import HfEngine
from pipeline.errors import UserError
from pipeline.files import digest
from pipeline.models import best_device, load_lm, load_tokenizer, require_same_tokenizer
from pipeline.outputs import is_results, require_own_file
from pipeline.params import Params
from pipeline.prompts import PromptFormat, read_prompts
from pipeline.provenance import fingerprint
from pipeline.results import write_results
from pipeline.store.identity import Sampling, sample_seed
from pipeline.store.replaceable import require_own_selection
from pipeline.store.requests import open_store
from pipeline.teacher import session as asking
from pipeline.teacher.orders import Wanted
from pipeline.teacher.session import Asked, Summary, Teacher


def score(
    params: Params,
    prompts_path: Path,
    student_path: Path,
    out: Path,
    store: str | Path | None = None,
    retry_skipped: bool = False,
    engine: Engine | None = None,
    results: Path | None = None,
) -> Summary:
    """Write the selection `out` with the parts `references`, `negatives` (training prompts) and `samples` (held out).

    Where no teacher is run (generate.engine: text) only references are kept, as text. `engine` replaces the one that
    the parameters name. Raises UserError on bad input; what was stored stays.
    """
    require_own_selection(out)
    if results is not None:
        require_own_file(results, partial(is_results, stage="score"))
    settings, storage = params.generate, open_store(store)
    prompts = read_prompts(prompts_path, ("train", "validation", "test"))
    teacher = Teacher.of(settings)
    asked, overlapping = asking.rendered(prompts, PromptFormat.of(params), teacher.tokenizer)
    training = [each for each in asked if each[0].split == "train"]
    held_out = [each for each in asked if each[0].split == "validation"]

    wanted = list(asking.references("references", training, teacher.tokenizer))
    if teacher.engine != "text":
        some = training[: params.score.prompts or None]
        wanted += asking.corrupted("negatives", some, teacher.tokenizer, params.score.corrupted, params.seed)
        drawn = [("negatives", some, params.score.samples), ("samples", held_out, params.score.validation_samples)]
        wanted += _student_samples(drawn, params, student_path, teacher)
    fitting = [each for each in wanted if teacher.reads(each)]
    if len(fitting) < len(wanted):
        console.warn(f"{len(wanted) - len(fitting):,} responses exceed the teacher's context and are left out")
    orders = [teacher.order(asking.scoring_request(params, teacher), fitting, storage)]
    cached, _ = asking.look_up(orders, retry_skipped)
    summary, took = asking.fulfil({out: orders}, teacher, settings, cached, engine)
    parts = orders[0].parts()
    spoke = any("student" in origins for part in parts.values() for origins in part.origins.values())
    student = fingerprint(student_path) if spoke else None
    manifest = teacher.select(out, parts, summary.skipped, settings.materialize, student)
    asking.leave_word(orders, out, complete=True)
    cost = asking.cost_of(summary, manifest, orders, took) | {"prompts_overlapping": overlapping}
    if results is not None:
        write_results(results, "score", {}, cost, parameters=params.score.model_dump(), student=student)
    asking.report("scored by the teacher", summary, parts, orders, out, cost)
    return summary


def _student_samples(
    drawn: Sequence[tuple[str, Asked, int]], params: Params, student_path: Path, teacher: Teacher
) -> Iterator[Wanted]:
    """Samples of the student for each (part, prompts, how many); none of prompts that it cannot read."""
    places = {
        f"{part}/{each[0].id}/{number}": (part, each, number)
        for part, asked, count in drawn
        for each in asked
        for number in range(count)
    }
    if not places:
        return
    require_same_tokenizer(teacher.description["tokenizer"], load_tokenizer(student_path), student_path)
    engine = HfEngine(load_lm(student_path).to(best_device()), params.score.batch_size)
    asks = [
        Ask(key, ids, sample_seed(digest([params.seed, part, prompt.id, number])))
        for key, (part, (prompt, _, ids), number) in places.items()
    ]
    reasons = {ask.key: reason for ask in asks if (reason := engine.unreadable(ask, params.max_tokens))}
    if reasons:
        prompts = {places[key][1][0].id: reason for key, reason in reasons.items()}
        first, reason = next(iter(prompts.items()))
        what = f"the student {student_path} cannot read {len(prompts):,} prompts; the first, '{first}': {reason}"
        if len(reasons) == len(asks):
            raise UserError(f"{what}. There are no others")
        console.warn(f"{what}. It gives no samples of them")
    asks = [ask for ask in asks if ask.key not in reasons]
    sampling = Sampling(params.score.temperature, 1.0, params.max_tokens, teacher.stops)
    answers: dict[str, np.ndarray] = {}
    with console.progress("samples of the student", len(asks)) as advance:
        for answer in needed(engine.sample(asks, sampling, k=1), f"the student {student_path}"):
            answers[answer.key] = answer.response_ids
            advance()
    for key, (part, (prompt, text, ids), number) in places.items():
        if key in answers:
            yield asking.to_score(part, prompt, text, ids, number, "student", answers[key])
