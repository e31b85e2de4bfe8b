"""What holds for the built-in tasks and their metrics."""

import os
import subprocess
import sys
from functools import cache
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from pipeline.errors import UserError
from pipeline.tasks import TASKS, get_task
from pipeline.tasks.shipped import arithmetic, summarisation, translation

BUILT_IN = [name for name, task in TASKS.items() if task.generator]
every_task = pytest.mark.parametrize("name", BUILT_IN)


@cache
def drawn(name: str) -> list:
    rng = Random(0)
    return [TASKS[name].generator.example(rng) for _ in range(3000)]


@cache
def nearest_answers(name: str) -> tuple[list[str], list[tuple[str, ...]]]:
    """(answers, references) of 150 prompts, answered with the first reference of the most similar of 1000 others."""
    known, asked = drawn(name)[:1000], drawn(name)[1000:1150]
    index = {token: i for i, token in enumerate(TASKS[name].generator.lexicon())}

    def counts(examples):
        rows = np.zeros((len(examples), len(index)), dtype=np.int64)
        for row, example in zip(rows, examples, strict=True):
            np.add.at(row, [index[token] for token in example.prompt.split()], 1)
        return rows

    table = counts(known)
    jaccard = [np.minimum(table, row).sum(1) / np.maximum(table, row).sum(1) for row in counts(asked)]
    return [known[row.argmax()].references[0] for row in jaccard], [example.references for example in asked]


# All tasks


def test_an_unknown_task_is_refused_with_the_known_names():
    with pytest.raises(UserError, match=f"one of {', '.join(TASKS)}"):
        get_task("poetry")


@every_task
def test_the_same_seed_gives_the_same_examples(name):
    rng = Random(0)
    assert [TASKS[name].generator.example(rng) for _ in range(200)] == drawn(name)[:200]
    assert TASKS[name].generator.example(Random(1)) != TASKS[name].generator.example(Random(2))


@every_task
def test_the_same_seed_gives_the_same_examples_in_another_process(name):
    code = f"""if True:
        from random import Random
        from pipeline.tasks import TASKS
        rng = Random(0)
        print(ascii([TASKS[{name!r}].generator.example(rng) for _ in range(50)]))"""
    environment = os.environ | {"PYTHONHASHSEED": "17"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ascii(drawn(name)[:50])


@every_task
def test_the_lexicon_holds_the_tokens_of_the_examples_and_nothing_else(name):
    lexicon = TASKS[name].generator.lexicon()
    texts = [text for example in drawn(name) for text in (example.prompt, *example.references)]
    assert {token for text in texts for token in text.split()} == set(lexicon)
    assert lexicon == sorted(set(lexicon))


@every_task
def test_texts_are_tokens_with_single_spaces(name):
    for example in drawn(name):
        for text in (example.prompt, *example.references):
            assert text == " ".join(text.split())


@every_task
def test_prompts_hardly_ever_repeat(name):
    assert len({example.prompt for example in drawn(name)}) >= 0.95 * len(drawn(name))


@every_task
def test_references_are_there_and_differ(name):
    for example in drawn(name):
        assert all(example.references) and example.references
        assert len(set(example.references)) == len(example.references)


@pytest.mark.parametrize(("name", "bound"), [("arithmetic", 12), ("translation", 25), ("summarisation", 50)])
def test_memorising_does_not_help(name, bound):
    assert TASKS[name].metrics[0](*nearest_answers(name)) < bound


@every_task
def test_references_score_100_on_every_metric(name):
    examples = drawn(name)[:100]
    for metric in TASKS[name].metrics:
        for which in (0, -1):
            answers = [example.references[which] for example in examples]
            score = metric(answers, [example.references for example in examples])
            assert score == pytest.approx(100)


@every_task
@pytest.mark.parametrize("garbage", ["", "?", "qqq qqq qqq qqq qqq"])
def test_garbage_scores_nothing_on_any_metric(name, garbage):
    references = [example.references for example in drawn(name)[:100]]
    for metric in TASKS[name].metrics:
        assert metric([garbage] * len(references), references) < 1


# Metrics


@pytest.mark.parametrize(("metric", "scorer"), zip(TASKS["translation"].metrics, (BLEU(), CHRF()), strict=True))
def test_corpus_metrics_equal_those_of_sacrebleu(metric, scorer):
    answers, references = nearest_answers("translation")
    longest = max(len(refs) for refs in references)
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(longest)]
    assert longest == 2
    assert metric(answers, references) == pytest.approx(scorer.corpus_score(answers, streams).score, abs=1e-6)


@pytest.mark.parametrize("metric", TASKS["summarisation"].metrics, ids=lambda metric: metric.name)
def test_rouge_is_the_best_of_the_references(metric):
    answers, references = nearest_answers("summarisation")
    scorer = RougeScorer([metric.name])
    best = [
        max(scorer.score(reference, answer)[metric.name].fmeasure for reference in refs)
        for answer, refs in zip(answers, references, strict=True)
    ]
    assert metric(answers, references) == pytest.approx(100 * np.mean(best), abs=1e-6)


# Arithmetic


def test_steps_are_valid_equations_and_lead_to_the_answer():
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for example in drawn("arithmetic"):
        (reference,) = example.references
        steps, answer = reference.split(" # ")
        value = int(example.prompt.split()[2])  # tom has 7 ...
        for step in steps.removesuffix(" .").split(" . "):
            left, symbol, right, equals, result = step.split()
            assert int(left) == value and equals == "="
            value = operations[symbol](value, int(right))
            assert int(result) == value and 0 <= value <= arithmetic.LIMIT
        assert int(answer) == value
        assert arithmetic.extract(reference) == answer


@pytest.mark.parametrize("response", ["", "7 + 5 = 12 .", "7 + 5 = 12 . #", "7 + 5 = 12 . # 1 2", "# 12 #"])
def test_a_malformed_response_has_no_answer_and_is_wrong(response):
    assert arithmetic.extract(response) is None
    assert TASKS["arithmetic"].metrics[0]([response], [("7 + 5 = 12 . # 12",)]) == 0


def test_the_answer_follows_the_last_mark():
    assert arithmetic.extract("7 + 5 = 12 . # 11 # 12") == "12"


# Translation


@pytest.mark.parametrize(
    ("noun", "case", "definite", "plural", "stem", "expected"),
    [
        ("Hund", "nominative", True, False, "groß", "der große Hund"),
        ("Hund", "nominative", False, False, "groß", "ein großer Hund"),
        ("Hund", "accusative", True, False, "groß", "den großen Hund"),
        ("Hund", "accusative", False, False, "groß", "einen großen Hund"),
        ("Hund", "dative", True, False, "groß", "dem großen Hund"),
        ("Hund", "dative", False, False, "groß", "einem großen Hund"),
        ("Hund", "nominative", True, True, "klug", "die klugen Hunde"),
        ("Hund", "dative", True, True, "klug", "den klugen Hunden"),
        ("Katze", "nominative", True, False, "klein", "die kleine Katze"),
        ("Katze", "nominative", False, False, "klein", "eine kleine Katze"),
        ("Katze", "accusative", True, False, "klein", "die kleine Katze"),
        ("Katze", "accusative", False, False, "klein", "eine kleine Katze"),
        ("Katze", "dative", True, False, "klein", "der kleinen Katze"),
        ("Katze", "dative", False, False, "klein", "einer kleinen Katze"),
        ("Katze", "dative", True, True, "", "den Katzen"),
        ("Kind", "nominative", True, False, "klein", "das kleine Kind"),
        ("Kind", "nominative", False, False, "klein", "ein kleines Kind"),
        ("Kind", "accusative", True, False, "klein", "das kleine Kind"),
        ("Kind", "accusative", False, False, "klein", "ein kleines Kind"),
        ("Kind", "dative", True, False, "klein", "dem kleinen Kind"),
        ("Kind", "dative", False, False, "klein", "einem kleinen Kind"),
        ("Kind", "accusative", True, True, "klein", "die kleinen Kinder"),
        ("Kind", "dative", True, True, "klein", "den kleinen Kindern"),
        ("Mantel", "accusative", False, False, "teur", "einen teuren Mantel"),
        ("Fahrrad", "accusative", False, False, "teur", "ein teures Fahrrad"),
        ("Königin", "nominative", True, True, "", "die Königinnen"),
    ],
)
def test_noun_phrases_are_declined(noun, case, definite, plural, stem, expected):
    (entry,) = [entry for entry in translation.NOUNS if entry.german == noun]
    assert translation.german_phrase(entry, case, definite, plural, stem) == expected


@cache
def finite_forms() -> set[str]:
    verbs = {form for verb in translation.VERBS for form in verb.german[:3]}
    modals = {form for modal in translation.MODALS for form in modal[2:]}
    return verbs | modals | set(translation.AUXILIARY_PLURALS.values())


def references_of(name: str) -> list[str]:
    return [reference for example in drawn(name) for reference in example.references]


def test_the_finite_verb_follows_a_fronted_time_adverb():
    times = [time[1] for time in translation.TIMES]
    fronted = [(text, time) for text in references_of("translation") for time in times if text.startswith(f"{time} ")]
    assert len(fronted) > 500
    for text, time in fronted:
        assert text.removeprefix(time).split()[0] in finite_forms(), text


def test_the_finite_verb_follows_a_fronted_reason():
    fronted = [text for text in references_of("translation") if text.startswith("weil ")]
    assert len(fronted) > 100
    for text in fronted:
        assert text.split(" , ")[1].split()[0] in finite_forms(), text


def test_the_finite_verb_is_last_in_a_reason():
    reasons = [text.split("weil ")[1] for text in references_of("translation") if "weil " in text]
    assert len(reasons) > 500
    for reason in reasons:
        assert reason.split(" , ")[0].removesuffix(" .").split()[-1] in finite_forms(), reason


def test_participles_of_verbs_of_motion_go_with_sein():
    for text in references_of("translation"):
        for participle in ("gerannt", "gefolgt"):
            for clause in text.split(","):
                assert participle not in clause.split() or {"ist", "sind"} & set(clause.split()), text


def test_two_references_differ_in_word_order_alone():
    pairs = [example.references for example in drawn("translation") if len(example.references) == 2]
    assert len(pairs) > 1000
    for first, second in pairs:
        assert sorted(first.split()) == sorted(second.split())


def test_an_stands_before_vowels_alone():
    for example in drawn("translation"):
        words = example.prompt.split()
        for article, word in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou"), example.prompt


# Summarisation

LITTLE_WORDS = {"a", "after", "and", "at", "by", "for", "from", "in", "of", "on", "the", "to", "with"}


@cache
def stories() -> list[summarisation.Story]:
    rng = Random(3)
    return [summarisation.story(rng) for _ in range(1000)]


def telling(story: summarisation.Story) -> list[set[str]]:
    """The words of every sentence that matters."""
    return [set(text.split()) for text in story.sentences if text not in story.distractors]


def test_an_example_is_a_story():
    drawn_story, example = summarisation.story(Random(5)), summarisation.example(Random(5))
    assert example.prompt == " ".join(drawn_story.sentences)
    assert list(example.references) == drawn_story.headlines


def test_a_report_has_three_to_five_sentences_and_three_headlines():
    for story in stories():
        assert 3 <= len(story.sentences) <= 5
        assert len(story.headlines) == 3


def test_all_headlines_tell_the_same_facts():
    for event in summarisation.EVENTS.values():
        slots = [{word for word in text.split() if word.startswith("{")} for text in event.headlines]
        assert len(slots[0]) >= 3
        assert slots[0] == slots[1] == slots[2]
    for story in stories():
        assert all(story.facts <= set(headline.split()) for headline in story.headlines)


def test_the_facts_of_a_headline_come_from_at_least_two_sentences():
    for story in stories():
        sentences = telling(story)
        assert story.facts <= set.union(*sentences)
        assert not any(story.facts <= words for words in sentences)


def test_every_sentence_that_matters_adds_a_fact():
    for story in stories():
        sentences = telling(story)
        for i, words in enumerate(sentences):
            assert story.facts & words - set().union(*sentences[:i], *sentences[i + 1 :])


def test_no_headline_has_a_word_that_only_distractors_have():
    for story in stories():
        idle = {word for text in story.distractors for word in text.split()}
        idle -= set.union(*telling(story)) | LITTLE_WORDS
        assert not any(idle & set(headline.split()) for headline in story.headlines), story
