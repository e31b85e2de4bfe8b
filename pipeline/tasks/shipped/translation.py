"""English to German from a grammar: gender, case, adjective endings, verb-second and verb-last order.

A sentence is drawn as noun phrases around a verb and spelled out in both languages. Where the German may or may not
begin with its time adverb, both orders are references.
"""

from collections.abc import Sequence
from itertools import product
from random import Random
from typing import NamedTuple

from pipeline.tasks.base import Example


class Noun(NamedTuple):
    kind: str
    english: tuple[str, ...]  # synonyms
    english_plural: tuple[str, ...]  # empty: the noun is used in the singular only
    gender: str
    german: str
    german_plural: str = ""
    german_plural_dative: str = ""


class Verb(NamedTuple):
    english: tuple[str, str, str]  # sees, see, saw
    german: tuple[str, str, str, str]  # sieht, sehen, hat, gesehen
    subjects: tuple[str, ...]  # kinds of noun
    objects: tuple[str, ...]  # kinds of noun; empty: the verb takes an adjunct instead
    adjuncts: tuple[str, ...]  # keys of ADJUNCTS
    case: str = "accusative"  # of the object
    preposition: tuple[str, str] = ("", "")  # of the object, English and German


class Adjunct(NamedTuple):
    prepositions: tuple[tuple[str, str], ...]
    case: str
    kinds: tuple[str, ...]


PERSON = ("adult", "child")
ALIVE = (*PERSON, "animal")
OUTDOORS = ("tree", "building", "landscape")
# No noun occurs twice in a sentence: its two clauses may need four people and four trees and buildings.
NOUNS = (
    Noun("adult", ("man",), ("men",), "m", "Mann", "Männer", "Männern"),
    Noun("adult", ("king",), ("kings",), "m", "König", "Könige", "Königen"),
    Noun("adult", ("woman",), ("women",), "f", "Frau", "Frauen", "Frauen"),
    Noun("adult", ("queen",), ("queens",), "f", "Königin", "Königinnen", "Königinnen"),
    Noun("child", ("child", "kid"), ("children", "kids"), "n", "Kind", "Kinder", "Kindern"),
    Noun("child", ("girl",), ("girls",), "n", "Mädchen", "Mädchen", "Mädchen"),
    Noun("animal", ("dog",), ("dogs",), "m", "Hund", "Hunde", "Hunden"),
    Noun("animal", ("cat",), ("cats",), "f", "Katze", "Katzen", "Katzen"),
    Noun("animal", ("horse",), ("horses",), "n", "Pferd", "Pferde", "Pferden"),
    Noun("paper", ("letter",), (), "m", "Brief"),
    Noun("paper", ("newspaper",), (), "f", "Zeitung"),
    Noun("paper", ("book",), (), "n", "Buch"),
    Noun("food", ("apple",), (), "m", "Apfel"),
    Noun("food", ("pear",), (), "f", "Birne"),
    Noun("food", ("egg",), (), "n", "Ei"),
    Noun("goods", ("coat",), (), "m", "Mantel"),
    Noun("goods", ("bag",), (), "f", "Tasche"),
    Noun("goods", ("bicycle", "bike"), (), "n", "Fahrrad"),
    Noun("tree", ("tree",), (), "m", "Baum"),
    Noun("building", ("church",), (), "f", "Kirche"),
    Noun("building", ("school",), (), "f", "Schule"),
    Noun("building", ("house",), (), "n", "Haus"),
    Noun("landscape", ("forest",), (), "m", "Wald"),
    Noun("landscape", ("city", "town"), (), "f", "Stadt"),
    Noun("landscape", ("village",), (), "n", "Dorf"),
)

# (stem, English synonyms, kinds of noun); the stem is that of the inflected forms.
ADJECTIVES = (
    ("groß", ("tall",), PERSON),
    ("groß", ("big", "large"), ("animal", "food", "goods", *OUTDOORS)),
    ("klein", ("small", "little"), (*ALIVE, "paper", "food", "goods", *OUTDOORS)),
    ("alt", ("old",), ("adult", "animal", "paper", "goods", *OUTDOORS)),
    ("jung", ("young",), ALIVE),
    ("klug", ("clever", "smart"), ALIVE),
    ("neu", ("new",), ("paper", "goods", "building")),
    ("schön", ("beautiful",), ("animal", "goods", *OUTDOORS)),
    ("teur", ("expensive",), ("goods",)),
)

SIGHTS = (*ALIVE, "paper", "goods", "tree", "building")
FINDS = (*ALIVE, "paper", "goods", "food")
WARES = ("animal", "goods", "food")
AT, AT_WITH, THROUGH = ("at",), ("at", "with"), ("through",)
WITH = ("with", "mit")
VERBS = (
    Verb(("sees", "see", "saw"), ("sieht", "sehen", "hat", "gesehen"), ALIVE, SIGHTS, AT),
    Verb(("looks for", "look for", "looked for"), ("sucht", "suchen", "hat", "gesucht"), ALIVE, FINDS, AT),
    Verb(("finds", "find", "found"), ("findet", "finden", "hat", "gefunden"), ALIVE, FINDS, AT),
    Verb(("reads", "read", "read"), ("liest", "lesen", "hat", "gelesen"), PERSON, ("paper",), AT_WITH),
    Verb(("buys", "buy", "bought"), ("kauft", "kaufen", "hat", "gekauft"), PERSON, WARES, AT_WITH),
    Verb(("sells", "sell", "sold"), ("verkauft", "verkaufen", "hat", "verkauft"), PERSON, WARES, AT),
    Verb(("eats", "eat", "ate"), ("isst", "essen", "hat", "gegessen"), PERSON, ("food",), AT_WITH),
    Verb(("helps", "help", "helped"), ("hilft", "helfen", "hat", "geholfen"), PERSON, ALIVE, AT, "dative"),
    Verb(("follows", "follow", "followed"), ("folgt", "folgen", "ist", "gefolgt"), ALIVE, ALIVE, THROUGH, "dative"),
    Verb(("plays", "play", "played"), ("spielt", "spielen", "hat", "gespielt"), ALIVE, ALIVE, AT, "dative", WITH),
    Verb(("runs", "run", "ran"), ("rennt", "rennen", "ist", "gerannt"), ALIVE, (), THROUGH),
    Verb(("sleeps", "sleep", "slept"), ("schläft", "schlafen", "hat", "geschlafen"), ALIVE, (), AT),
)
MODALS = (  # English with a singular and a plural subject, then German
    ("can", "can", "kann", "können"),
    ("must", "must", "muss", "müssen"),
    ("wants to", "want to", "will", "wollen"),
)
AUXILIARY_PLURALS = {"hat": "haben", "ist": "sind"}

ADJUNCTS = {
    "through": Adjunct((("through", "durch"),), "accusative", ("landscape",)),
    "at": Adjunct((("behind", "hinter"), ("next to", "neben")), "dative", ("tree", "building")),
    "with": Adjunct((WITH,), "dative", PERSON),
}
TIMES = (
    ("today", "heute", ("present", "past", "modal")),
    ("now", "jetzt", ("present", "modal")),
    ("yesterday", "gestern", ("past",)),
    ("tomorrow", "morgen", ("modal",)),
    ("in the evening", "am Abend", ("present", "past", "modal")),
)
REASON_TENSES = {"present": ("present", "modal"), "past": ("past",), "modal": ("present", "past", "modal")}

# Per case: masculine, feminine, neuter, plural. Indefinite plurals are not used.
ARTICLES = {
    ("definite", "nominative"): ("der", "die", "das", "die"),
    ("definite", "accusative"): ("den", "die", "das", "die"),
    ("definite", "dative"): ("dem", "der", "dem", "den"),
    ("indefinite", "nominative"): ("ein", "eine", "ein"),
    ("indefinite", "accusative"): ("einen", "eine", "ein"),
    ("indefinite", "dative"): ("einem", "einer", "einem"),
}
ENDINGS = {
    ("definite", "nominative"): ("e", "e", "e", "en"),
    ("definite", "accusative"): ("en", "e", "e", "en"),
    ("definite", "dative"): ("en", "en", "en", "en"),
    ("indefinite", "nominative"): ("er", "e", "es"),
    ("indefinite", "accusative"): ("en", "e", "es"),
    ("indefinite", "dative"): ("en", "en", "en"),
}


def german_phrase(noun: Noun, case: str, definite: bool = True, plural: bool = False, stem: str = "") -> str:
    """Article, adjective and noun, declined; `stem` is that of the adjective."""
    cell = "definite" if definite else "indefinite", case
    column = 3 if plural else "mfn".index(noun.gender)
    name = noun.german
    if plural:
        name = noun.german_plural_dative if case == "dative" else noun.german_plural
    return _join(ARTICLES[cell][column], stem and stem + ENDINGS[cell][column], name)


def _join(*parts: str) -> str:
    """Empty parts leave no gap."""
    return " ".join(part for part in parts if part)


class Phrase(NamedTuple):
    """A noun with its article, perhaps an adjective and a preposition."""

    kind: str
    definite: bool
    plural: bool
    english: str
    german: str


class Clause(NamedTuple):
    """A clause in English, and in German in the pieces that the word order moves."""

    english: str
    subject: str
    finite: str
    middle: str  # objects and adverbials
    closing: str  # participle, infinitive or ""


def example(rng: Random) -> Example:
    """Draw a main clause, with or without a time adverb and a reason, either of which may come first."""
    unused = list(NOUNS)
    tense = rng.choice(("present", "past", "past", "modal"))
    main = _clause(rng, tense, unused, adjuncts=0.45)
    reason, english_time, german_time = None, "", ""
    if rng.random() < 0.35:
        reason = _clause(rng, rng.choice(REASON_TENSES[tense]), unused, adjuncts=0.1)
    if rng.random() < 0.65:
        english_time, german_time, _ = rng.choice([time for time in TIMES if tense in time[2]])
    fronts = {"": True, "time": english_time, "reason": reason}
    front = rng.choice([part for part, is_there in fronts.items() if is_there])
    references = [_german(main, german_time, reason, front)]
    if english_time and front != "reason":
        references.append(_german(main, german_time, reason, "" if front else "time"))
    return Example(_english(main, english_time, reason, front), tuple(references))


def _english(main: Clause, time: str, reason: Clause | None, front: str) -> str:
    because = f"because {reason.english}" if reason else ""
    if front == "reason":
        return _join(because, ",", main.english, time, ".")
    if front == "time":
        return _join(time, main.english, because, ".")
    return _join(main.english, time, because, ".")


def _german(main: Clause, time: str, reason: Clause | None, front: str) -> str:
    """The finite verb comes second in the main clause, whatever stands first, and last in the reason."""
    because = reason and _join("weil", reason.subject, reason.middle, reason.closing, reason.finite)
    if front == "reason":
        return _join(because, ",", main.finite, main.subject, time, main.middle, main.closing, ".")
    start = (time, main.finite, main.subject) if front == "time" else (main.subject, main.finite, time)
    return _join(*start, main.middle, main.closing, *((",", because) if because else ()), ".")


def _clause(rng: Random, tense: str, unused: list[Noun], adjuncts: float) -> Clause:
    """`adjuncts` is the chance of an adjunct that the verb does not need. Takes its nouns out of `unused`."""
    verb = rng.choice(VERBS)
    # "the men read" is present or past; "the man reads" and "the man read" say which.
    ambiguous = tense != "modal" and verb.english[1] == verb.english[2]
    subject = _phrase(rng, verb.subjects, unused, "nominative", plurals=0.0 if ambiguous else 0.25)
    english_verb, finite, closing = _conjugate(rng, verb, tense, subject.plural)
    english, parts = [subject.english, english_verb], []
    if verb.objects:
        # Objects of animals are alive: no cat looks for a newspaper.
        kinds = verb.objects if subject.kind in PERSON else ALIVE
        parts.append(_phrase(rng, kinds, unused, verb.case, verb.preposition))
    if not verb.objects or rng.random() < adjuncts:
        adjunct = ADJUNCTS[rng.choice(verb.adjuncts)]
        parts.append(_phrase(rng, adjunct.kinds, unused, adjunct.case, rng.choice(adjunct.prepositions)))
    english += [part.english for part in parts]
    # In German an indefinite object comes after an adverbial, unless that is a direction.
    if len(parts) == 2 and not parts[0].definite and adjunct.case == "dative":
        parts.reverse()
    return Clause(_join(*english), subject.german, finite, _join(*[part.german for part in parts]), closing)


def _conjugate(rng: Random, verb: Verb, tense: str, plural: bool) -> tuple[str, str, str]:
    """The English verb, the German finite verb, and the participle or infinitive."""
    singular, infinitive, auxiliary, participle = verb.german
    if tense == "present":
        return verb.english[plural], infinitive if plural else singular, ""
    if tense == "past":
        return verb.english[2], AUXILIARY_PLURALS[auxiliary] if plural else auxiliary, participle
    modal = rng.choice(MODALS)
    return f"{modal[plural]} {verb.english[1]}", modal[2 + plural], infinitive


def _phrase(
    rng: Random,
    kinds: Sequence[str],
    unused: list[Noun],
    case: str,
    preposition: tuple[str, str] = ("", ""),
    plurals: float = 0.2,
) -> Phrase:
    kind = rng.choice([kind for kind in kinds if any(noun.kind == kind for noun in unused)])
    noun = rng.choice([noun for noun in unused if noun.kind == kind])
    unused.remove(noun)
    plural = bool(noun.german_plural) and rng.random() < plurals
    definite = plural or rng.random() < 0.6
    stem, adjectives = rng.choice(_adjectives(noun)) if rng.random() < 0.55 else ("", [""])
    words = _join(rng.choice(adjectives), rng.choice(noun.english_plural if plural else noun.english))
    article = "the" if definite else "an" if words[0] in "aeiou" else "a"
    english = _join(preposition[0], article, words)
    german = _join(preposition[1], german_phrase(noun, case, definite, plural, stem))
    return Phrase(noun.kind, definite, plural, english, german)


def _adjectives(noun: Noun) -> list[tuple[str, Sequence[str]]]:
    return [(stem, english) for stem, english, kinds in ADJECTIVES if noun.kind in kinds]


def lexicon() -> list[str]:
    """All tokens of all noun phrases, verb forms and little words."""
    texts = ["the a an because weil . ,", *AUXILIARY_PLURALS, *AUXILIARY_PLURALS.values()]
    for noun in NOUNS:
        texts += [*noun.english, *noun.english_plural]
        texts += [word for _, english in _adjectives(noun) for word in english]
        # Only the endings that occur: only subjects are nominative.
        for case, (definite, plural) in product(_cases(noun), ((True, False), (False, False), (True, True))):
            if noun.german_plural or not plural:
                stems = ["", *[stem for stem, _ in _adjectives(noun)]]
                texts += [german_phrase(noun, case, definite, plural, stem) for stem in stems]
    for verb in VERBS:
        singular, infinitive, _, participle = verb.german
        texts += [*verb.english, singular, infinitive, participle, *verb.preposition]
    texts += [form for modal in MODALS for form in modal]
    texts += [word for adjunct in ADJUNCTS.values() for pair in adjunct.prepositions for word in pair]
    texts += [word for time in TIMES for word in time[:2]]
    return sorted({token for text in texts for token in text.split()})


def _cases(noun: Noun) -> list[str]:
    cases = ["nominative" for verb in VERBS if noun.kind in verb.subjects]
    cases += [verb.case for verb in VERBS if noun.kind in verb.objects]
    return cases + [adjunct.case for adjunct in ADJUNCTS.values() if noun.kind in adjunct.kinds]
