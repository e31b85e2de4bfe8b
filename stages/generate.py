"""Run the teacher once: ask for what the store does not hold, keep it, and write the selection of this experiment."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from pipeline import console
from pipeline.engines import Engine
from pipeline.errors import UserError
from pipeline.outputs import is_results, require_apart, require_own_file
from pipeline.params import Params
from pipeline.prompts import Prompt, PromptFormat, encode_response, read_prompts, read_responses
from pipeline.prompts.warnings import warn_of_prompts
from pipeline.results import CUT_WARNING, write_results
from pipeline.store.kept_mass import KeptMass, kept_mass_warning, say_kept_mass
from pipeline.store.ownership import require_own_selection
from pipeline.store.requests import open_store
from pipeline.store.selection_files import Part, write_selection
from pipeline.tasks import Task, get_task
from pipeline.teacher.items import (
    Item,
    ReadPrompt,
    corrupted,
    of_split,
    read_as_models_do,
    references,
    to_draw,
    to_score,
)
from pipeline.teacher.orders import Order, Plan
from pipeline.teacher.session import Session
from pipeline.teacher.summary import Summary, cost_of, parts_of, report
from pipeline.teacher.teacher import Teacher, sampling_request, scoring_request

ANSWER_K = 0  # tokens per position of answers to test prompts: they are read as text


def generate(
    params: Params,
    prompts_path: Path,
    out: Path,
    store: str | Path | None = None,
    retry_skipped: bool = False,
    engine: Engine | None = None,
    results: Path | None = None,
    answers: Path | None = None,
) -> Summary:
    """Answer the train and validation prompts of a file, score held-out references, and write the selection `out`.

    results: file for what the run found, made and took; apart from `out`, whose bytes do not depend on that. answers:
    folder of a second selection, with the teacher's answers to the test prompts, so that no evaluation asks it again.
    `engine` replaces the one that the parameters name. Raises UserError on bad input; what was stored stays.
    """
    require_apart({"--results": results}, {"--out": out, "--answers": answers})
    require_own_selection(out)
    if answers is not None:
        require_own_selection(answers, "--answers")
    if results is not None:
        require_own_file(results, partial(is_results, stage="generate"), "--results")
    settings, storage = params.generate, open_store(store)
    prompts = prompts_to_ask(params, prompts_path)
    teacher = Teacher.of(settings)
    task = get_task(params.prepare.task)
    form = PromptFormat.of(params)
    prompts, overlapping = read_as_models_do(prompts, form, teacher.tokenizer)
    warn_of_prompts(form, teacher.tokenizer, [each.prompt for each in prompts], [each.ids for each in prompts])
    orders = orders_of(params, prompts, teacher, out)
    answering = [] if answers is None else answers_of(params, prompts, teacher, answers)
    with Session(teacher, storage, engine) as session:
        answered = session.answer([*orders, *answering], retry_skipped)
    plans, of_answers = answered.plans[: len(orders)], answered.plans[len(orders) :]
    parts = _accepted(plans, task, settings.accept)
    of_manifest = (teacher.description, teacher.k, answered.left_out, settings.materialize)
    manifest = write_selection(out, parts, *of_manifest, support=teacher.support)
    if answers is not None:
        _write_answers(answers, of_answers, teacher)
    session.record_use([*orders, *answering])
    cost = cost_of(answered, manifest) | {"prompts_overlapping": overlapping}
    spoken = [parts[name].counted for name in ("train", "validation") if name in parts]
    kept = sum((counted.kept for counted in spoken), KeptMass()).describe(teacher.k, teacher.support)
    cut = sum(counted.cut for counted in spoken) / max(sum(counted.rows for counted in spoken), 1)
    if results is not None:
        origins = {"engine": teacher.engine, "teacher": teacher.description, "k": teacher.k}
        write_results(results, "generate", {"kept_mass": kept, "cut": cut}, cost, **origins)
    more = [("kept mass", say_kept_mass(kept))] if kept else []
    more += [("cut at max_tokens", f"{cut:.1%} of the responses")]
    more += [("test answers", answers)] if answering else []
    report("teacher cached", answered, parts, out, cost, more)
    if word := kept_mass_warning(kept):
        console.warn(word)
    if cut > CUT_WARNING:
        console.warn(f"{cut:.0%} of the teacher's responses were cut at max_tokens ({params.max_tokens}): raise it")
    return Summary.of(answered)


def _accepted(plans: Sequence[Plan], task: Task, accept: str) -> dict[str, Part]:
    """The parts to select, without the training responses that are wrong where only correct ones are accepted."""
    wrong: set[str] = set()
    if accept == "correct":
        wrong = {key for plan in plans for key in plan.rejected("train", task.accepts)}
    if wrong:
        console.say(f"{len(wrong):,} training responses are wrong by the task's checker and were not selected")
    parts = parts_of(plans, wrong)
    if not parts:
        reason = "no training response was accepted" if wrong else "see the warnings above"
        raise UserError(f"nothing could be made of any prompt: {reason}")
    return parts


def prompts_to_ask(params: Params, path: Path) -> list[Prompt]:
    """The prompts that the teacher is asked, and those of the test split, which are to be kept apart from them.

    Raises UserError where there is none to ask, or the parameters cannot be met.
    """
    prompts = read_prompts(path, ("train", "validation", "test"))
    if all(prompt.split == "test" for prompt in prompts):
        raise UserError(f"{path} has no prompts in the splits train and validation")
    task = get_task(params.prepare.task)
    if params.generate.accept == "correct" and not task.checked:
        raise UserError(f"generate.accept: correct needs a task whose answers are right or wrong; {task.name} has none")
    return prompts


def orders_of(
    params: Params, prompts: Sequence[ReadPrompt], teacher: Teacher, out: Path | None = None
) -> tuple[Order, Order]:
    """What is to be drawn from the teacher, and what is to be scored by it, for the selection `out`."""
    asked = [each for each in prompts if each.prompt.split != "test"]
    settings, tokenizer = params.generate, teacher.tokenizer
    drawn = sampling_request(params, teacher, settings.temperature, settings.top_p)
    counts = {"train": settings.samples, "validation": settings.validation_samples}
    if settings.responses:
        counts = dict.fromkeys(counts, 0)
    draws = [item for each in asked for item in to_draw(each.prompt.split, [each], drawn, counts[each.prompt.split])]
    scores: list[Item] = []
    if settings.responses:
        scores += _made_elsewhere(asked, Path(settings.responses), tokenizer)
    if teacher.engine != "text":
        held_out = of_split(asked, "validation")
        scores += references("scored", held_out, tokenizer)
        scores += corrupted("scored", held_out, tokenizer, settings.corrupted, params.seed)
    return (
        Order(drawn, draws, teacher.k, teacher.support, out),
        Order(scoring_request(params, teacher), scores, teacher.k, teacher.support, out),
    )


def answers_of(params: Params, prompts: Sequence[ReadPrompt], teacher: Teacher, out: Path | None = None) -> list[Order]:
    """The teacher's answers to the test prompts that have references, greedy and sampled as `evaluate` wants them."""
    if teacher.engine == "text":
        return []
    settings = params.evaluate
    tests = [each for each in of_split(prompts, "test") if each.prompt.references]
    orders = []
    for part, temperature, some, count in (
        ("greedy", 0.0, tests, 1),
        ("sampled", settings.temperature, tests[: settings.sampled_prompts], settings.samples),
    ):
        request = sampling_request(params, teacher, temperature)
        orders.append(Order(request, list(to_draw(part, some, request, count)), ANSWER_K, "topk", out))
    return orders


def _write_answers(folder: Path, plans: Sequence[Plan], teacher: Teacher) -> None:
    """The selection of the teacher's answers; without any part where no teacher is run."""
    left_out = sum(len(plan.skipped) for plan in plans)
    support = None if teacher.support is None else "topk"
    write_selection(folder, parts_of(plans), teacher.description, ANSWER_K, left_out, materialize=True, support=support)


def _made_elsewhere(prompts: Sequence[ReadPrompt], path: Path, tokenizer) -> Iterator[Item]:
    """The responses that another tool gave to these prompts."""
    responses = read_responses(path)
    unasked = len(responses.keys() - {each.prompt.prompt for each in prompts})
    unanswered = sum(each.prompt.prompt not in responses for each in prompts)
    if unasked or unanswered:
        console.warn(
            f"{path}: {unasked:,} of its prompts are not in the prompt file; {unanswered:,} prompts have no response"
        )
    for each in prompts:
        for number, response in enumerate(responses.get(each.prompt.prompt, ())):
            ids = encode_response(tokenizer, response.response, response.ends)
            yield to_score(each.prompt.split, each, number, "teacher", ids)
