"""Short news reports to headlines, three phrasings each.

What a headline says is spread over two or three sentences of the report. The other sentences are distractors that name
towns, people and numbers too.
"""

from random import Random
from string import Formatter
from typing import NamedTuple

from pipeline.tasks.base import Example

# A template's {town1}, {town2} ... are different towns.
POOLS = {
    "town": ("leeds", "york", "dover", "oxford", "bristol", "chester", "exeter", "luton", "ripon", "truro"),
    "person": ("smith", "jones", "clark", "evans", "lewis", "morgan", "turner", "wilson", "baker", "cooper"),
    "building": ("school", "hotel", "museum", "library", "theatre", "bank", "station", "factory"),
    "number": tuple(str(n) for n in range(2, 13)),
    "day": ("monday", "tuesday", "wednesday", "thursday", "friday"),
    "cause": ("lightning", "fireworks", "candles", "sparks", "petrol"),
    "damage": ("roofs", "cars", "fences", "windows", "bridges", "trees"),
    "loot": ("paintings", "coins", "cameras", "watches", "clocks", "computers"),
    "round": ("final", "semifinal", "opener", "replay"),
    "post": ("mayor", "judge", "sheriff", "governor"),
}
# {more} and {less} are {number1} and {number2} by size: only a comparison of them tells who won. Sentences that name a
# winner and a loser come in both orders, so that the order does not tell.


class Event(NamedTuple):
    sentences: tuple[tuple[str, ...], ...]  # the phrasings of every sentence that matters
    headlines: tuple[str, str, str]  # all with the same slots


EVENTS = {
    "fire": Event(
        (
            (
                "a fire broke out at the {building1} in {town1} on {day1} .",
                "on {day1} the {building1} in {town1} caught fire .",
                "firefighters rushed to the {building1} in {town1} on {day1} .",
            ),
            (
                "doctors treated {number1} people for burns .",
                "{number1} people were hurt by smoke , doctors said .",
                "an ambulance took {number1} people to hospital .",
            ),
            ("police found that {cause1} had started the fire .", "the fire was caused by {cause1} , police said ."),
        ),
        (
            "fire caused by {cause1} hurts {number1} at {town1} {building1}",
            "{number1} hurt in {town1} {building1} fire caused by {cause1}",
            "{cause1} blamed for {town1} {building1} fire that hurts {number1}",
        ),
    ),
    "match": Event(
        (
            (
                "the {round1} between {town1} and {town2} was played on {day1} .",
                "the {round1} between {town2} and {town1} was played on {day1} .",
                "{town1} met {town2} in the {round1} on {day1} .",
                "{town2} met {town1} in the {round1} on {day1} .",
            ),
            (
                "{town1} scored {more} points and {town2} scored {less} .",
                "{town2} scored {less} points and {town1} scored {more} .",
                "there were {more} points for {town1} and {less} for {town2} .",
                "there were {less} points for {town2} and {more} for {town1} .",
            ),
        ),
        (
            "{town1} beat {town2} {more} to {less} in {round1}",
            "{town1} win {round1} against {town2} by {more} to {less}",
            "{town2} lose {round1} {less} to {more} against {town1}",
        ),
    ),
    "storm": Event(
        (
            (
                "a storm hit {town1} on {day1} and damaged {damage1} .",
                "on {day1} a storm broke {damage1} in {town1} .",
                "people in {town1} found broken {damage1} after the storm on {day1} .",
            ),
            (
                "power was cut in {number1} villages nearby .",
                "{number1} villages had no power for the night .",
                "the lights went out in {number1} villages .",
            ),
        ),
        (
            "storm damages {damage1} in {town1} and leaves {number1} villages without power",
            "{number1} villages without power after storm breaks {damage1} in {town1}",
            "{town1} storm damages {damage1} and cuts power to {number1} villages",
        ),
    ),
    "election": Event(
        (
            (
                "voters in {town1} chose a new {post1} on {day1} .",
                "on {day1} {town1} held a vote for {post1} .",
                "the people of {town1} needed a new {post1} and voted on {day1} .",
            ),
            (
                "{person1} got {more} thousand votes and {person2} got {less} .",
                "{person2} got {less} thousand votes and {person1} got {more} .",
                "there were {more} thousand votes for {person1} and {less} for {person2} .",
                "there were {less} thousand votes for {person2} and {more} for {person1} .",
            ),
        ),
        (
            "{person1} beats {person2} and becomes {post1} of {town1}",
            "{town1} chooses {person1} over {person2} as new {post1}",
            "{person2} loses to {person1} in {town1} vote for {post1}",
        ),
    ),
    "robbery": Event(
        (
            (
                "thieves broke into the {building1} in {town1} on {day1} .",
                "on {day1} the {building1} in {town1} was robbed .",
                "a window of the {building1} in {town1} was broken by thieves on {day1} .",
            ),
            (
                "{loot1} worth {number1} thousand pounds were missing .",
                "police looked for {loot1} worth {number1} thousand pounds .",
            ),
        ),
        (
            "thieves steal {loot1} worth {number1} thousand from {town1} {building1}",
            "{loot1} worth {number1} thousand stolen from {building1} in {town1}",
            "{town1} {building1} loses {loot1} worth {number1} thousand to thieves",
        ),
    ),
    "opening": Event(
        (
            (
                "the new {building1} in {town1} opened on {day1} .",
                "on {day1} {town1} got a new {building1} .",
                "people in {town1} saw the new {building1} for the first time on {day1} .",
            ),
            ("builders had worked for {number1} years .", "the work had taken {number1} years ."),
            ("{person1} cut the ribbon and made a speech .", "the doors were opened by {person1} ."),
        ),
        (
            "{person1} opens new {building1} in {town1} after {number1} years",
            "new {town1} {building1} opened by {person1} after {number1} years",
            "after {number1} years of work {person1} opens {town1} {building1}",
        ),
    ),
}
DISTRACTORS = (
    "the weather was cold and wet .",
    "rain is expected in {town3} on {day2} .",
    "traffic stood still for {number3} hours near {town3} .",
    "{person3} from {town3} said the food was good .",
    "we hope for sun next week , said {person3} .",
    "{town4} has {number4} parks and an old {building2} .",
    "{number4} buses run to {town4} every hour .",
    "a train to {town4} was late again on {day2} .",
    "{person4} lived in {town4} for {number3} years .",
    "{town3} had a storm and a fire {number3} years ago .",
    "the {building3} in {town4} was closed on {day2} .",
    "{person4} wants more money for the {building3} in {town4} .",
)


class Story(NamedTuple):
    sentences: list[str]  # the report, in order
    distractors: list[str]  # those of the sentences that do not matter
    facts: set[str]  # the words that every headline takes from the report
    headlines: list[str]


def example(rng: Random) -> Example:
    drawn = story(rng)
    return Example(" ".join(drawn.sentences), tuple(drawn.headlines))


def story(rng: Random) -> Story:
    """Draw a report of three to five sentences; the first one always matters."""
    event = EVENTS[rng.choice(list(EVENTS))]
    values = _values(rng)
    sentences = [rng.choice(phrasings).format(**values) for phrasings in event.sentences]
    rng.shuffle(sentences)
    length = rng.choice((4, 4, 4, 5, 5)) if len(sentences) == 2 else rng.choice((3, 4, 4, 5, 5))
    distractors = [text.format(**values) for text in rng.sample(DISTRACTORS, length - len(sentences))]
    for distractor in distractors:
        sentences.insert(rng.randint(1, len(sentences)), distractor)
    facts = {values[slot] for _, slot, _, _ in Formatter().parse(event.headlines[0]) if slot}
    # Shuffled, so that no phrasing is the right one: whoever learns from the first reference meets all three.
    headlines = [text.format(**values) for text in rng.sample(event.headlines, len(event.headlines))]
    return Story(sentences, distractors, facts, headlines)


def _values(rng: Random) -> dict[str, str]:
    """A value for every slot of every template."""
    values = {
        f"{pool}{i}": word for pool, words in POOLS.items() for i, word in enumerate(rng.sample(words, 4), start=1)
    }
    less, more = sorted((values["number1"], values["number2"]), key=int)
    return values | {"more": more, "less": less}


def lexicon() -> list[str]:
    """All tokens of all templates and pools."""
    templates = [*DISTRACTORS, *(text for event in EVENTS.values() for text in event.headlines)]
    templates += [text for event in EVENTS.values() for phrasings in event.sentences for text in phrasings]
    words = {word for text in templates for word in text.split() if not word.startswith("{")}
    return sorted(words | {word for pool in POOLS.values() for word in pool})
