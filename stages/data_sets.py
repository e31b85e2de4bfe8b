"""Prompts with references from a data set: chosen by seed, filtered and counted, training kept apart from testing."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import Any

from pipeline.errors import UserError
from pipeline.params import DataSet
from pipeline.prompts import SPLITS, Prompt, PromptFormat, encode_response, prompt_id
from pipeline.records import fill, texts_at

# Held-out prompts are drawn first, so that training loses what overlaps with them and not the other way round.
_ORDER = ("test", "validation", "train", "teach")


def normalised(text: str) -> str:
    """What is left of a prompt when case, punctuation and spaces do not count: equal means overlapping."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def draw_records(
    records: Mapping[str, Any],
    settings: DataSet,
    sizes: Mapping[str, int],
    tokenizer,
    form: PromptFormat,
    seed: int,
) -> tuple[list[Prompt], dict[str, Counter]]:
    """Up to `sizes[split]` prompts of every split, and for each split how many were kept and left out, by reason.

    Which ones depends on the seed and on the prompts' text, not on the order of the files. A prompt that was seen
    before (among the shots, or in a split drawn earlier) is left out as overlapping. Raises UserError where a split or
    a column is missing or the test or training split ends up empty.
    """
    sources = _sources(records, settings)
    pools = {name: _shuffled(records[name], name, settings, seed) for name in set(sources.values())}
    seen: dict[str, str] = {}  # normalised text -> where it was met first
    counts: dict[str, Counter] = {split: Counter() for split in ("shots", *SPLITS)}

    def take(split: str, source: str, size: int, unfit: Callable[[Prompt], str | None]) -> list[Prompt]:
        taken: list[Prompt] = []
        while len(taken) < size and (prompt := next(pools[source], None)) is not None:
            text = normalised(prompt.prompt)
            if not text or not prompt.references:
                reason = "without prompt or reference"
            elif text in seen:
                reason = "repeated" if seen[text] == split else f"overlaps with {seen[text]}"
            else:
                seen[text], reason = split, unfit(prompt)
            counts[split][reason or "kept"] += 1
            if reason is None:
                taken.append(prompt)
        return taken

    shots = take("shots", settings.train_split, settings.shots, lambda prompt: None)
    lead = "".join(
        settings.shot.replace("{prompt}", shot.prompt).replace("{reference}", shot.references[0]) for shot in shots
    )

    def unfit(prompt: Prompt) -> str | None:
        longest = settings.max_prompt_tokens
        if longest and len(form.encode(tokenizer, [lead + prompt.prompt])[0]) > longest:
            return f"prompt longer than {longest} tokens"
        longest = settings.max_reference_tokens
        if longest and len(encode_response(tokenizer, prompt.references[0])) > longest:
            return f"reference longer than {longest} tokens"
        return None

    drawn = {split: take(split, sources[split], sizes[split], unfit) for split in _ORDER}
    for split in ("train", "test"):
        if not drawn[split]:
            raise UserError(f"{settings.path}: nothing is left for {split}: {dict(counts[split]) or 'no rows'}")
    prompts = [
        Prompt(prompt_id(lead + prompt.prompt), lead + prompt.prompt, prompt.references, split)
        for split in SPLITS
        for prompt in drawn[split]
    ]
    return prompts, counts


def _sources(records: Mapping[str, Any], settings: DataSet) -> dict[str, str]:
    """Our split -> the data set's; held-out prompts come from the training split where it has no other."""
    train = settings.train_split
    if train not in records:
        raise UserError(f"{settings.path} has no split '{train}' (dataset.train_split); found {', '.join(records)}")
    held_out = {"validation": settings.validation_split, "test": settings.test_split}
    return {"teach": train, "train": train} | {
        split: name if name in records else train for split, name in held_out.items()
    }


def _shuffled(rows, split: str, settings: DataSet, seed: int) -> Iterator[Prompt]:
    """All rows as prompts, in an order that is a function of seed and text."""
    prompts = [_prompt(row, split, number, settings) for number, row in enumerate(rows, start=1)]
    yield from sorted(prompts, key=lambda prompt: sha256(f"{seed} {prompt.prompt}".encode()).digest())


def _prompt(row: Mapping[str, Any], split: str, number: int, settings: DataSet) -> Prompt:
    try:
        text, references = fill(settings.prompt, row).strip(), texts_at(row, settings.references)
    except KeyError as error:
        raise UserError(f"{settings.path}, split {split}, row {number}: {error.args[0]}") from None
    if settings.remove:
        references = [re.sub(settings.remove, "", reference) for reference in references]
    return Prompt("", text, tuple(reference.strip() for reference in references if reference.strip()), split)
