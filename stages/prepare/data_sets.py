"""Prompts with references from a data set: chosen by seed, filtered and counted, training kept apart from testing."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from itertools import count, islice
from typing import Any

from pipeline import console
from pipeline.errors import UserError, in_one_line, is_printable, shown
from pipeline.params import DataSet
from pipeline.prompts import Prompt, PromptFormat, encode_response, prompt_id
from pipeline.prompts.records import fill, find_split, texts_at

# Held-out prompts are drawn first, so that training loses what overlaps with them and not the other way round. The
# student's own prompts are drawn last, so that they change no other split.
_ORDER = ("test", "validation", "train", "teach", "student")
_BATCH = 1024  # prompts that are measured together


def normalised(text: str) -> str:
    """What is left of a prompt when case, punctuation and spaces do not count: equal means overlapping."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def draw_records(
    records: Mapping[str, Any], settings: DataSet, sizes: Mapping[str, int], tokenizer, form: PromptFormat, seed: int
) -> tuple[list[Prompt], dict[str, Counter]]:
    """Up to `sizes[split]` prompts of every split, and for each split how many were kept and left out, by reason.

    Which ones depends on the seed and on the prompts' text, not on the order of the files. A prompt that was seen
    before (among the shots, or in a split drawn earlier) is left out as overlapping. Raises UserError where a split or
    a column is missing, or no prompt is left for test, train or student.
    """
    sources = _sources(records, settings)
    pools = {name: _shuffled(records[name], name, settings, seed) for name in set(sources.values())}
    seen: dict[str, str] = {}  # normalised text -> where it was met first
    counts: dict[str, Counter] = {split: Counter() for split in ("shots", *sizes)}

    def take(split: str, source: str, size: int, unfit: Callable[[list[Prompt]], list[str | None]]) -> list[Prompt]:
        taken: list[Prompt] = []
        # As many at once as are still needed: each of them is looked at, however many turn out to be unfit.
        while batch := list(islice(pools[source], min(size - len(taken), _BATCH))):
            reasons: list[str | None] = []
            for prompt in batch:
                text, reason = normalised(prompt.prompt), None
                if not text or not prompt.references:
                    reason = "without prompt or reference"
                elif text in seen:
                    reason = "repeated" if seen[text] == split else f"overlaps with {seen[text]}"
                else:
                    seen[text] = split
                reasons.append(reason)
            new = [place for place, reason in enumerate(reasons) if reason is None]
            for place, reason in zip(new, unfit([batch[place] for place in new]), strict=True):
                reasons[place] = reason
            counts[split].update(reason or "kept" for reason in reasons)
            taken += [prompt for prompt, reason in zip(batch, reasons, strict=True) if reason is None]
        return taken

    shots = take("shots", sources["train"], settings.shots, lambda prompts: [None] * len(prompts))
    said = [settings.shot.replace("{prompt}", s.prompt).replace("{reference}", s.references[0]) for s in shots]
    lead = "".join(said)

    def with_shots(prompt: Prompt, split: str) -> Prompt:
        return Prompt(prompt_id(lead + prompt.prompt), lead + prompt.prompt, prompt.references, split)

    def unfit(prompts: list[Prompt]) -> list[str | None]:
        reasons: list[str | None] = [None] * len(prompts)
        if longest := settings.max_reference_tokens:
            for place, prompt in enumerate(prompts):
                if len(encode_response(tokenizer, prompt.references[0])) > longest:
                    reasons[place] = f"reference longer than {longest} tokens"
        if longest := settings.max_prompt_tokens:
            read = form.encode(tokenizer, [with_shots(prompt, prompt.split) for prompt in prompts])
            for place, ids in enumerate(read):
                if len(ids) > longest:
                    reasons[place] = f"prompt longer than {longest} tokens"
        return reasons

    drawn = {split: take(split, sources[split], sizes[split], unfit) for split in _ORDER if split in sizes}
    for split in ("train", "test", "student"):
        if not drawn.get(split, True):
            hint = ". Lower prepare.train or prepare.teach, which are drawn first" if split == "student" else ""
            raise UserError(f"{settings.path}: nothing is left for {split}: {dict(counts[split]) or 'no rows'}{hint}")
    return [with_shots(prompt, split) for split in sizes for prompt in drawn[split]], counts


def _sources(records: Mapping[str, Any], settings: DataSet) -> dict[str, str]:
    """Our split -> the data set's; held-out prompts come from the training split where it has no other.

    Raises UserError where a split is absent that was asked for by a name of its own.
    """
    train = find_split(records, settings.train_split)
    if train is None:
        raise _no_split(records, settings, "train")
    sources = {"teach": train, "train": train, "student": train}
    for split, name in (("validation", settings.validation_split), ("test", settings.test_split)):
        source = find_split(records, name)
        if source is None and name != split:
            raise _no_split(records, settings, split)
        if source is None:
            console.say(f"{settings.path} has no split '{name}': prompts of '{train}' are held out for it")
        sources[split] = source or train
    return sources


def _no_split(records: Mapping[str, Any], settings: DataSet, split: str) -> UserError:
    name = getattr(settings, f"{split}_split")
    return UserError(f"{settings.path} has no split '{name}' (dataset.{split}_split); found {', '.join(records)}")


def _shuffled(rows, split: str, settings: DataSet, seed: int) -> Iterator[Prompt]:
    """All rows as prompts, in an order that is a function of seed and text."""
    prompts = [
        _prompt(row, f"{settings.path}, split {split}, row {number}", split, settings)
        for number, row in _numbered(rows, f"{settings.path}, split {split}")
    ]
    yield from sorted(prompts, key=lambda prompt: sha256(f"{seed} {prompt.prompt}".encode()).digest())


def _numbered(rows, where: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows with their numbers. Raises UserError for one that is damaged, which shows only now."""
    rest = iter(rows)
    for number in count(1):
        with in_one_line(f"{where}, row {number} cannot be read"):
            row = next(rest, None)
        if row is None:
            return
        yield number, row


def _prompt(row: Mapping[str, Any], where: str, split: str, settings: DataSet) -> Prompt:
    try:
        text, references = fill(settings.prompt, row).strip(), texts_at(row, settings.references)
    except LookupError as error:
        raise UserError(f"{where}: {error}") from None
    for each in (text, *references):
        if not is_printable(each):
            raise UserError(f"{where} has half a surrogate pair, which is not valid Unicode: {shown(each)}")
    if settings.remove:
        references = [re.sub(settings.remove, "", reference) for reference in references]
    return Prompt("", text, tuple(reference.strip() for reference in references if reference.strip()), split)
