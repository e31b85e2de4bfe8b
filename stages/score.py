"""Have the teacher score what others said: references, their corruptions, and the student's own samples.

Scored references are what `sft` learns from. Corruptions and student samples on training prompts are negatives for the
reward's fit; student samples on held-out prompts, which the task says are right or wrong, are for its audit.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pipeline import console
from pipeline.engines import Engine
from pipeline.outputs import is_results, require_apart, require_own_file
from pipeline.params import Params
from pipeline.prompts import PromptFormat, read_prompts
from pipeline.provenance import fingerprint
from pipeline.results import write_results
from pipeline.store.ownership import require_own_selection
from pipeline.store.requests import open_store
from pipeline.store.selection_files import write_selection
from pipeline.store.storage import Storage
from pipeline.teacher.items import (
    ReadPrompt,
    corrupted,
    of_split,
    read_as_models_do,
    references,
    to_draw,
)
from pipeline.teacher.orders import Order
from pipeline.teacher.session import Answered, Session
from pipeline.teacher.summary import Summary, cost_of, parts_of, report
from pipeline.teacher.teacher import Teacher, sampling_request, scoring_request


def score(
    params: Params,
    prompts_path: Path,
    student_path: Path,
    out: Path,
    store: str | Path | None = None,
    retry_skipped: bool = False,
    engine: Engine | None = None,
    results: Path | None = None,
    samples: Path | None = None,
) -> Summary:
    """Write the selection `out` with the parts `references`, `negatives` (training prompts) and `samples` (held out).

    The student's samples are kept in the store like a teacher's, under the student's own identity, and drawn once.
    samples: folder of a selection of them, by which `cache gc` knows that they are in use. Where no teacher is run
    (generate.engine: text) only references are kept, as text. `engine` replaces the one that the parameters name.
    Raises UserError on bad input; what was stored stays.
    """
    require_apart({"--results": results}, {"--out": out, "--samples": samples})
    require_own_selection(out)
    if samples is not None:
        require_own_selection(samples, "--samples")
    if results is not None:
        require_own_file(results, partial(is_results, stage="score"))
    settings, storage = params.generate, open_store(store)
    prompts = read_prompts(prompts_path, ("train", "validation", "test"))
    teacher = Teacher.of(settings)
    prompts, overlapping = read_as_models_do(prompts, PromptFormat.of(params), teacher.tokenizer)
    training = of_split(prompts, "train")

    items = list(references("references", training, teacher.tokenizer))
    drawn = None
    if teacher.engine != "text":
        some, held_out = training[: params.score.prompts or None], of_split(prompts, "validation")
        items += corrupted("negatives", some, teacher.tokenizer, params.score.corrupted, params.seed)
        counts = [("negatives", some, params.score.samples), ("samples", held_out, params.score.validation_samples)]
        if any(len(asked) * count for _, asked, count in counts):
            student = teacher.student(student_path, params.score.batch_size)
            drawn = _drawn(student, storage, params, counts, samples, retry_skipped)
            items += [item.answered(row.response_ids) for plan in drawn.plans for item, row in plan.rows()]
    within = [item for item in items if teacher.context.holds(len(item.prompt_ids), len(item.response_ids))]
    if len(within) < len(items):
        console.warn(f"{len(items) - len(within):,} responses exceed the teacher's context and are left out")
    order = Order(scoring_request(params, teacher), within, teacher.k, teacher.support, out)
    with Session(teacher, storage, engine) as session:
        answered = session.answer([order], retry_skipped)
    parts = parts_of(answered.plans)
    spoke = any("student" in origins for part in parts.values() for origins in part.origins.values())
    student_id = fingerprint(student_path) if spoke else None
    of_manifest = (teacher.description, teacher.k, answered.left_out, settings.materialize, student_id)
    manifest = write_selection(out, parts, *of_manifest, support=teacher.support)
    session.record_use([order])
    cost = cost_of(answered, manifest) | {"prompts_overlapping": overlapping}
    more = []
    if drawn is not None:
        cost |= {"samples_found": drawn.found, "samples_drawn": drawn.made}
        more = [("samples of the student", f"{drawn.found:,} found in the store, {drawn.made:,} drawn now")]
    if results is not None:
        write_results(results, "score", {}, cost, parameters=params.score.model_dump(), student=student_id)
    report("scored by the teacher", answered, parts, out, cost, more)
    return Summary.of(answered)


def _drawn(
    student: Teacher,
    storage: Storage,
    params: Params,
    counts: Sequence[tuple[str, Sequence[ReadPrompt], int]],
    out: Path | None,
    retry_skipped: bool,
) -> Answered:
    """The student's samples for each (part, prompts, how many), out of the store or drawn; none of what it cannot read.

    With `out` they are selected there.
    """
    request = sampling_request(params, student, params.score.temperature)
    items = [item for part, prompts, count in counts for item in to_draw(part, prompts, request, count)]
    order = Order(request, items, student.k, student.support, out)
    with Session(student, storage) as session:
        drawn = session.answer([order], retry_skipped)
    if out is not None:
        parts = parts_of(drawn.plans)
        write_selection(out, parts, student.description, student.k, drawn.left_out, True, support=student.support)
        session.record_use([order])
    return drawn
