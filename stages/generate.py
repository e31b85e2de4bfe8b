"""Run the teacher once: ask for what the store does not hold, keep it, and write the selection of this experiment."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipeline import console
from pipeline.errors import UserError
from pipeline.outputs import is_results, require_apart, require_own_file
from pipeline.params import Params
from pipeline.prompts import Prompt, PromptFormat, encode_response, read_prompts, read_responses
from pipeline.provenance import git_commit, versions
from pipeline.shards.files import write_json_atomically
from pipeline.shards.identity import sample_key
from pipeline.shards.replaceable import require_own_selection
from pipeline.shards.selection import write_selection
from pipeline.shards.storage import Storage
from pipeline.shards.store import open_store
from pipeline.tasks import get_task
from pipeline.teachers import Engine
from pipeline.teachers.orders import Order, Wanted
from stages import asking
from stages.asking import Asked, Summary, Teacher


def generate(
    params: Params,
    prompts_path: Path,
    out: Path,
    store: str | Path | None = None,
    retry_skipped: bool = False,
    engine: Engine | None = None,
    results: Path | None = None,
) -> Summary:
    """Answer the train and validation prompts of a file, score held-out references, and write the selection `out`.

    results: file for what the run found, made and took; apart from `out`, whose bytes do not depend on that.
    `engine` replaces the one that the parameters name. Raises UserError on bad input; what was stored stays.
    """
    require_apart({"--results": results}, {"--out": out})
    require_own_selection(out)
    if results is not None:
        require_own_file(results, partial(is_results, stage="generate"), "--results")
    settings, storage = params.generate, open_store(store)
    prompts = prompts_to_ask(params, prompts_path)
    teacher = Teacher.of(settings)
    task = get_task(params.prepare.task)
    asked, overlapping = asking.rendered(prompts, PromptFormat.of(params), teacher.tokenizer)
    orders = orders_of(params, asked, teacher, storage)
    cached, _ = asking.look_up(orders, retry_skipped)
    summary, took = asking.fulfil(orders, teacher, settings, cached, out, engine)
    rejected = sum(order.reject("train", task.accepts) for order in orders if settings.accept == "correct")
    if rejected:
        console.say(f"{rejected:,} training responses are wrong by the task's checker and were not selected")
    parts = {name: part for order in orders for name, part in order.parts().items()}
    if not parts:
        reason = "no training response was accepted" if rejected else "see the warnings above"
        raise UserError(f"nothing could be made of any prompt: {reason}")
    manifest = write_selection(out, parts, teacher.description, teacher.k, summary.skipped, settings.materialize)
    asking.leave_word(orders, out, complete=True)
    cost = asking.cost_of(summary, manifest, orders, took) | {"prompts_overlapping": overlapping}
    if results is not None:
        provenance = {
            "stage": "generate",
            "engine": teacher.engine,
            "teacher": teacher.description,
            "k": teacher.k,
            "versions": versions(),
        }
        write_json_atomically(results, {"cost": cost, "provenance": provenance | {"git_commit": git_commit()}})
    asking.report("teacher cached", summary, parts, orders, out, cost)
    return summary


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


def orders_of(params: Params, asked: Asked, teacher: Teacher, storage: Storage) -> tuple[Order, Order]:
    """What is to be drawn from the teacher, and what is to be scored by it. asked: as `asking.rendered` makes it."""
    settings, tokenizer = params.generate, teacher.tokenizer
    drawn, given = asking.sampling_request(params, teacher), asking.scoring_request(params, teacher)
    counts = {"train": settings.samples, "validation": settings.validation_samples}
    if settings.responses:
        counts = dict.fromkeys(counts, 0)
    to_draw = [
        Wanted(prompt.split, prompt, text, ids, sample, sample_key(drawn, ids, sample))
        for prompt, text, ids in asked
        for sample in range(counts[prompt.split])
    ]
    held_out = [each for each in asked if each[0].split == "validation"]
    to_score: list[Wanted] = []
    if teacher.engine != "text":
        to_score += asking.references("scored", held_out, tokenizer)
        to_score += asking.corrupted("scored", held_out, tokenizer, settings.corrupted, params.seed)
    if settings.responses:
        to_score = [*_given(asked, Path(settings.responses), tokenizer), *to_score]
    return teacher.order(drawn, to_draw, storage), teacher.order(given, to_score, storage)


def _given(asked: Asked, path: Path, tokenizer) -> Iterator[Wanted]:
    """The responses that another tool gave to these prompts."""
    given = read_responses(path)
    unasked = len(given.keys() - {prompt.prompt for prompt, _, _ in asked})
    unanswered = sum(prompt.prompt not in given for prompt, _, _ in asked)
    if unasked or unanswered:
        console.warn(
            f"{path}: {unasked:,} of its prompts are not in the prompt file; {unanswered:,} prompts have no response"
        )
    for prompt, text, ids in asked:
        for number, each in enumerate(given.get(prompt.prompt, ())):
            response = encode_response(tokenizer, each.response, each.ends)
            yield asking.to_score(prompt.split, prompt, text, ids, number, "teacher", response)
