"""Prompts with references in disjoint splits, drawn from a built-in task or a data set, and their tokenizer."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random

from pipeline import console
from pipeline.errors import UserError
from pipeline.files import write_json_atomically
from pipeline.layout import counts_of
from pipeline.models import load_tokenizer, word_tokenizer
from pipeline.outputs import is_results, replacing, require_apart, require_own_file, require_own_folder
from pipeline.params import Params, Prepare
from pipeline.prompts import SPLITS, Prompt, PromptFormat, is_prompt_file, prompt_id, write_prompts
from pipeline.prompts.records import load_records
from pipeline.prompts.warnings import warn_of_prompts
from pipeline.results import write_results
from pipeline.tasks import Task, get_task
from stages.prepare.data_sets import draw_records

# A prompt's split is a function of its text, so no prompt can be in two splits, whatever the sizes and seeds. Only
# `student` has no share of its own: `draw` gives it prompts of the share of `train`.
_SHARES = {"teach": 0.8, "train": 0.1, "validation": 0.03, "test": 0.07}
_TOKENIZER = "a tokenizer"
_PATIENCE = 20_000  # draws without a prompt that is needed before a task counts as exhausted


def split_of(prompt: str) -> str:
    """The split that a prompt belongs to; one of `train` may be drawn for `student`."""
    place = int.from_bytes(hashlib.sha256(b"split" + prompt.encode()).digest()[:8], "little") / 2**64
    for split, share in _SHARES.items():
        if place < share:
            return split
        place -= share
    return "test"


def draw(task: Task, sizes: dict[str, int], seed: int) -> Iterator[Prompt]:
    """Distinct prompts until every split has its size, split by split.

    `student` gets prompts of the share of `train`: those that are drawn after `train` has its size. So it changes no
    other split. It has no prompt of `train` within an experiment, and none of teach, validation or test of any.
    Raises UserError where the task has not enough distinct prompts.
    """
    rng = Random(f"{task.name} {task.generator.version} {seed}")
    drawn: dict[str, dict[str, Prompt]] = {split: {} for split in SPLITS}
    idle = 0
    while any(len(drawn[split]) < size for split, size in sizes.items()):
        example = task.generator.example(rng)
        split = split_of(example.prompt)
        if split == "train" and len(drawn[split]) >= sizes.get(split, 0) and example.prompt not in drawn[split]:
            split = "student"
        new = len(drawn[split]) < sizes.get(split, 0) and example.prompt not in drawn[split]
        idle = 0 if new else idle + 1
        if idle > _PATIENCE:
            raise UserError(f"task {task.name} has too few distinct prompts for sizes {sizes}: ask for fewer")
        if new:
            drawn[split][example.prompt] = Prompt(prompt_id(example.prompt), example.prompt, example.references, split)
    for split in sizes:
        yield from drawn[split].values()


def check_disjoint(prompts: list[Prompt]) -> None:
    """Raises UserError where the same prompt is in two splits."""
    seen: dict[str, str] = {}
    for prompt in prompts:
        if seen.setdefault(prompt.prompt, prompt.split) != prompt.split:
            raise UserError(f"prompt '{prompt.id}' is in {seen[prompt.prompt]} and in {prompt.split}")


def prepare(params: Params, prompts_path: Path, tokenizer_path: Path, results: Path | None = None) -> None:
    """Write the prompt file, its counts beside it (kept and left out, by reason), and the tokenizer folder.

    results: file for what the prompts are of and what it took.
    """
    require_apart({"--out": prompts_path, "--tokenizer": tokenizer_path})
    require_own_file(prompts_path, is_prompt_file)
    require_own_file(counts_path := counts_of(prompts_path), _are_counts)
    require_own_folder(tokenizer_path, _TOKENIZER, "--tokenizer")
    if results is not None:
        require_own_file(results, partial(is_results, stage="prepare"))
    settings: Prepare = params.prepare
    task = get_task(settings.task)
    sizes = {split: getattr(settings, split) for split in SPLITS}
    if not settings.student:
        del sizes["student"]  # the counts do not name it then
    tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else _word_tokenizer(task, params.template)
    form = PromptFormat.of(params)
    if settings.dataset.path:
        records = load_records(settings.dataset.path, settings.dataset.config)
        prompts, counts = draw_records(records, settings.dataset, sizes, tokenizer, form, params.seed)
    else:
        prompts = list(draw(task, sizes, params.seed))
        counts = {split: Counter(kept=size) for split, size in sizes.items()}
    check_disjoint(prompts)
    if tokenizer.chat_template or not form.chat:  # else it is another tokenizer that will render them
        warn_of_prompts(form, tokenizer, prompts)
    write_prompts(prompts_path, prompts)
    write_json_atomically(counts_path, counts)
    with replacing(tokenizer_path, _TOKENIZER, "--tokenizer") as made:
        tokenizer.save_pretrained(made)
    if results is not None:
        data = {"path": settings.dataset.path or "built-in", "config": settings.dataset.config, "task": task.name}
        read = {"template": params.template, "chat": params.chat, "system": params.system}
        write_results(results, "prepare", {"data": data, "prompt_format": read, "counts": counts})
    facts = [(split, _say_counts(count)) for split, count in counts.items() if count]
    console.facts(f"task {task.name}", [*facts, ("prompts", prompts_path), ("tokenizer", tokenizer_path)])


def _are_counts(path: Path) -> bool:
    """Whether a file holds a count for each reason in each split."""
    with suppress(ValueError, AttributeError):
        counts = json.loads(path.read_text(encoding="utf-8"))
        numbers = [number for reasons in counts.values() for number in reasons.values()]
        splits = set(counts) - {"shots", "student"}
        return splits == set(SPLITS) - {"student"} and all(isinstance(number, int) for number in numbers)
    return False


def _word_tokenizer(task: Task, template: str):
    template_words = template.replace("{prompt}", " ").split()
    return word_tokenizer(sorted({*task.generator.lexicon(), *template_words}))


def _say_counts(count: Counter) -> str:
    left_out = [f"{number:,} {reason}" for reason, number in sorted(count.items()) if reason != "kept"]
    return f"{count['kept']:,} prompts" + (f" (left out: {', '.join(left_out)})" if left_out else "")
