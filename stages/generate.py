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
from pipeline.results import write_results
from pipeline.store.identity import sample_key
from pipeline.store.kept_mass import KeptMass, kept_mass_warning, say_kept_mass
from pipeline.store.replaceable import require_own_selection
from pipeline.store.requests import open_store
from pipeline.store.selection import write_selection
from pipeline.store.storage import Storage
from pipeline.tasks import get_task
from pipeline.teacher import session as asking
from pipeline.teacher.orders import Order, Wanted
from pipeline.teacher.session import Asked, Summary, Teacher

ANSWER_K = 0  # tokens a position of answers to test prompts: they are read as text
CUT_WARNING = 0.05  # share of responses that may be cut at max_tokens without a word


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
    asked, overlapping = asking.rendered(prompts, form, teacher.tokenizer)
    warn_of_prompts(form, teacher.tokenizer, [prompt for prompt, _, _ in asked], [ids for _, _, ids in asked])
    orders = orders_of(params, asked, teacher, storage)
    answering = [] if answers is None else answers_of(params, asked, teacher, storage)
    cached, _ = asking.look_up([*orders, *answering], retry_skipped)
    selections = {out: orders} | ({answers: answering} if answering else {})
    summary, took = asking.fulfil(selections, teacher, settings, cached, engine)
    rejected = sum(order.reject("train", task.accepts) for order in orders if settings.accept == "correct")
    if rejected:
        console.say(f"{rejected:,} training responses are wrong by the task's checker and were not selected")
    parts = {name: part for order in orders for name, part in order.parts().items()}
    if not parts:
        reason = "no training response was accepted" if rejected else "see the warnings above"
        raise UserError(f"nothing could be made of any prompt: {reason}")
    manifest = teacher.select(out, parts, summary.skipped, settings.materialize)
    if answers is not None:
        _write_answers(answers, answering, teacher)
    for folder, each in selections.items():
        asking.leave_word(each, folder, complete=True)
    cost = asking.cost_of(summary, manifest, [*orders, *answering], took) | {"prompts_overlapping": overlapping}
    spoken = [parts[name].counted for name in ("train", "validation") if name in parts]
    kept = sum((counted.kept for counted in spoken), KeptMass()).describe(teacher.k, teacher.support)
    cut = sum(counted.cut for counted in spoken) / max(sum(counted.rows for counted in spoken), 1)
    if results is not None:
        found = {"kept_mass": kept, "cut": cut}
        origins = {"engine": teacher.engine, "teacher": teacher.description, "k": teacher.k}
        write_results(results, "generate", found, cost, **origins)
    more = [("kept mass", say_kept_mass(kept))] if kept else []
    more += [("cut at max_tokens", f"{cut:.1%} of the responses")]
    more += [("test answers", answers)] if answering else []
    asking.report("teacher cached", summary, parts, orders, out, cost, more)
    if word := kept_mass_warning(kept):
        console.warn(word)
    if cut > CUT_WARNING:
        console.warn(f"{cut:.0%} of the teacher's responses were cut at max_tokens ({params.max_tokens}): raise it")
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
    asked = [each for each in asked if each[0].split != "test"]
    settings, tokenizer = params.generate, teacher.tokenizer
    drawn = asking.sampling_request(params, teacher, settings.temperature, settings.top_p)
    given = asking.scoring_request(params, teacher)
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


def answers_of(params: Params, asked: Asked, teacher: Teacher, storage: Storage) -> list[Order]:
    """The teacher's answers to the test prompts that have references, greedy and sampled as `evaluate` wants them."""
    if teacher.engine == "text":
        return []
    settings = params.evaluate
    tests = [each for each in asked if each[0].split == "test" and each[0].references]
    orders = []
    for part, temperature, prompts, count in (
        ("greedy", 0.0, tests, 1),
        ("sampled", settings.temperature, tests[: settings.sampled_prompts], settings.samples),
    ):
        request = asking.sampling_request(params, teacher, temperature, top_p=1.0)
        wanted = [
            Wanted(part, prompt, text, ids, sample, sample_key(request, ids, sample))
            for prompt, text, ids in prompts
            for sample in range(count)
        ]
        orders.append(teacher.order(request, wanted, storage, ANSWER_K, "topk"))
    return orders


def _write_answers(folder: Path, orders: Sequence[Order], teacher: Teacher) -> None:
    """The selection of the teacher's answers; without any part where no teacher is run."""
    parts = {name: part for order in orders for name, part in order.parts().items()}
    lost = sum(len(order.skipped) for order in orders)
    support = None if teacher.support is None else "topk"
    write_selection(folder, parts, teacher.description, ANSWER_K, lost, materialize=True, support=support)


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
