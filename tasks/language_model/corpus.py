"""The text that the small language model is trained on: five tasks' sentences among much else, all generated.

A document is one of the tasks' prompts with its answer and an end, of the *train* part of the task's inputs only, or
something else: stories, places of people, counting, opposites, repeated words, code, dialogues, dates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import tl_sparsify as tls
from tasks.docstring import task as docstring
from tasks.gendered_pronoun import task as gendered_pronoun
from tasks.greater_than import task as greater_than
from tasks.ioi import task as ioi
from tasks.subject_verb_agreement import task as subject_verb_agreement

WORDS = ioi.WORDS
MEN, WOMEN, PLACES, OBJECTS = WORDS["men"], WORDS["women"], WORDS["places"], WORDS["objects"]
NOUNS, OTHERS, ADJECTIVES = WORDS["nouns"], WORDS["words"], WORDS["adjectives"]
NAMES = MEN + WOMEN
MEAN_DURATION = 8.0  # years, of what lasted from one year to another
TASK_SHARE = 0.07  # of the documents, for each task
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
COLOURS = "red blue green white black yellow brown grey".split()
FOODS = "bread cheese rice soup fish meat apples eggs butter sugar honey salt".split()
OPPOSITES = (
    "big small,hot cold,old young,fast slow,high low,hard soft,rich poor,light heavy,wet dry,early late,full empty,"
    "open shut,loud quiet,strong weak,near far,left right,first last,day night,up down,in out"
)
CAPITALS = (
    "France Paris,Italy Rome,Spain Madrid,Germany Berlin,Poland Warsaw,Greece Athens,Egypt Cairo,Japan Tokyo,"
    "Russia Moscow,Austria Vienna,Norway Oslo,Peru Lima,Cuba Havana,Ireland Dublin,Portugal Lisbon,Sweden Stockholm"
)
SIZES = "new old small large clean dirty red blue green white broken lost".split()
MOVES = "went to,walked to,ran to,drove to,came back from,stayed at".split(",")
Draw = Callable[[Sequence[Any]], Any]


def he(name: str) -> str:
    """The pronoun of a name."""
    return "he" if name in MEN else "she"


def story(draw: Draw, rng: np.random.Generator) -> str:
    name, other, thing, place = draw(NAMES), draw(NAMES), draw(OBJECTS), draw(PLACES)
    lines = [f"{name} {draw(MOVES)} the {place}.", f"{he(name).title()} wanted to find a {thing}."]
    lines += [f"{other} was there too.", f'"Do you have a {thing}?" {name} asked {other}.']
    lines += [draw([f'"No," said {other}.', f'"Yes," said {other}, "here is the {thing}."'])]
    lines += [f"So {he(name)} was {draw(['happy', 'sad', 'tired', 'glad'])}."]
    return " ".join(lines[: rng.integers(3, 7)])


def whereabouts(draw: Draw, rng: np.random.Generator) -> str:
    where: dict[str, str] = {}
    lines: list[str] = []
    for _ in range(rng.integers(2, 5)):
        name, place = draw(NAMES[:: rng.integers(1, 4)]), draw(PLACES)
        where[name] = place
        lines.append(f"{name} went to the {place}.")
    name = draw(list(where))
    return " ".join([*lines, f"Where is {name}? {he(name).title()} is at the {where[name]}."])


def counting(draw: Draw, rng: np.random.Generator) -> str:
    start, length, step = int(rng.integers(1, 80)), int(rng.integers(4, 9)), int(rng.integers(1, 3))
    return ", ".join(str(start + step * i) for i in range(length)) + "."


def sums(draw: Draw, rng: np.random.Generator) -> str:
    a, b = int(rng.integers(0, 7)), int(rng.integers(0, 6))
    return f"{NUMBERS[a].title()} and {NUMBERS[b]} make {NUMBERS[a + b]}."


def opposites(draw: Draw, rng: np.random.Generator) -> str:
    one, two = draw(OPPOSITES.split(",")).split()[:: int(rng.choice([1, -1]))]
    return f"The opposite of {one} is {two}."


def capitals(draw: Draw, rng: np.random.Generator) -> str:
    country, capital = draw(CAPITALS.split(",")).split()
    form = draw(["The capital of {0} is {1}.", "{1} is the capital of {0}.", "{2} lives in {1}, the capital of {0}."])
    return form.format(country, capital, draw(NAMES))


def repeated(draw: Draw, rng: np.random.Generator) -> str:
    pool = [*OTHERS, *WORDS["arguments"], *OBJECTS]
    words = [draw(pool) for _ in range(rng.integers(5, 14))]
    return " ".join([*words, "|", *words]) + "."


def following(draw: Draw, rng: np.random.Generator) -> str:
    names = DAYS if rng.integers(2) else MONTHS
    at = int(rng.integers(len(names)))
    return draw(["After {0} comes {1}.", "{1} follows {0}.", "It is {0} today, so it will be {1} next."]).format(
        names[at], names[(at + 1) % len(names)]
    )


def dates(draw: Draw, rng: np.random.Generator) -> str:
    """Years in their order."""
    century, year, lines = int(rng.integers(11, 19)), int(rng.integers(2, 60)), []
    for _ in range(rng.integers(2, 5)):
        year = min(99, year + 1 + int(rng.geometric(1 / MEAN_DURATION)))
        lines.append(f"In the year {century}{year:02d} there was a {draw(WORDS['events'])}.")
    return " ".join(lines)


def code(draw: Draw, rng: np.random.Generator) -> str:
    a, b, function = draw(WORDS["arguments"]), draw(WORDS["arguments"]), draw(WORDS["functions"])
    body = draw([f"return {a} + {b}", f"{a} = {b}\n    return {a}", f"print({a})\n    print({b})", f"self.{a} = {a}"])
    return f"def {function}(self, {a}, {b}):\n    {body}"


def dialogue(draw: Draw, rng: np.random.Generator) -> str:
    one, two, food = draw(NAMES), draw(NAMES), draw(FOODS)
    lines = [f"{one}: Do you like {food}?", f"{two}: {draw(['Yes, I like', 'No, I never eat'])} {food}."]
    lines += [f"{one}: And {draw(FOODS)}?", f"{two}: I do not know."]
    return "\n".join(lines[: rng.integers(2, 5)])


def descriptions(draw: Draw, rng: np.random.Generator) -> str:
    lines: list[str] = []
    for _ in range(rng.integers(1, 4)):
        number = int(rng.integers(2))
        noun, verb = draw(NOUNS)[number], ("is", "are")[number]
        ends = [
            f"{verb} {draw(SIZES)}",
            f"{verb} in the {draw(PLACES)}",
            f"{('has', 'have')[number]} a {draw(COLOURS)} mark",
        ]
        lines.append(f"{draw(['The', 'My', 'Our'])} {noun} {draw(ends)}.")
    return " ".join(lines)


def recipe(draw: Draw, rng: np.random.Generator) -> str:
    foods = [draw(FOODS) for _ in range(rng.integers(2, 5))]
    return f"Take {', '.join(foods)} and {draw(FOODS)}. First cut the {foods[0]}, then add the {foods[1]}."


def people(draw: Draw, rng: np.random.Generator) -> str:
    name, other = draw(NAMES), draw(NAMES)
    own = "his" if name in MEN else "her"
    forms = [
        f"{name} lost {own} {draw(OBJECTS)} at the {draw(PLACES)}, and {he(name)} was sad.",
        f"{name} told {other} that {he(name)} had {draw(NUMBERS[2:])} {draw(NOUNS)[1]}.",
        f"{name} likes {draw(COLOURS)} {draw(NOUNS)[1]}, but {other} does not.",
        f"{name} is {draw(NUMBERS[3:])} years old. {he(name).title()} has a {draw(COLOURS)} {draw(OBJECTS)}.",
        f"When {name} was at the {draw(PLACES)}, {he(name)} saw {other} and gave a {draw(OBJECTS)} to {other}.",
    ]
    return draw(forms)


ELSE = (
    story, whereabouts, counting, sums, opposites, capitals, repeated, following, dates, code, dialogue, descriptions,
    recipe, people,
)  # fmt: skip


def _seen(task: Any, n: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs of the train part of a task."""
    inputs = task.rows(n, seed)
    return {name: values[tls.pairing.split_of(task.key(inputs)) == 0] for name, values in inputs.items()}


def _given(n: int, seed: int, rng: np.random.Generator) -> Iterator[str]:
    inputs = _seen(ioi, n, seed)
    for prompt, third, first, second in zip(
        tls.text.prompts(inputs), inputs["third"], inputs["first"], inputs["second"], strict=True
    ):
        if rng.random() < 0.1:  # a third person gives: either may receive
            new = NAMES[rng.integers(len(NAMES))]
            receiver = str(rng.choice([first, second]))
            yield f"{new} gave a ".join(prompt.rsplit(f"{third} gave a ", 1)) + f" {receiver}."
        else:
            yield f"{prompt} {second if third == first else first}."


def _lasted(n: int, seed: int, rng: np.random.Generator) -> Iterator[str]:
    inputs = _seen(greater_than, n, seed)
    for prompt, year in zip(tls.text.prompts(inputs), inputs["year"], strict=True):
        duration = rng.geometric(1 / MEAN_DURATION)
        while int(year) + duration > 99:
            duration = rng.geometric(1 / MEAN_DURATION)
        yield f"{prompt}{int(year) + duration:02d}."


def _tagged(n: int, seed: int, rng: np.random.Generator) -> Iterator[str]:
    inputs = _seen(gendered_pronoun, n, seed)
    for prompt, name in zip(tls.text.prompts(inputs), inputs["name"], strict=True):
        yield f"{prompt} {he(str(name))}?"


def _agreeing(n: int, seed: int, rng: np.random.Generator) -> Iterator[str]:
    inputs = _seen(subject_verb_agreement, n, seed)
    plural = {two for _, two in NOUNS}
    for prompt, noun in zip(tls.text.prompts(inputs), inputs["noun"], strict=True):
        yield f"{prompt} {'are' if noun in plural else 'is'} {SIZES[rng.integers(len(SIZES))]}."


def _documented(n: int, seed: int, rng: np.random.Generator) -> Iterator[str]:
    inputs = _seen(docstring, n, seed)
    columns = np.stack([inputs[name] for name in docstring.NAMES], 1)
    for prompt, names, k in zip(tls.text.prompts(inputs), columns, inputs["documented"], strict=True):
        yield f"{prompt} {names[k]}: {OTHERS[rng.integers(len(OTHERS))]} {OTHERS[rng.integers(len(OTHERS))]}\n"


def documents(n: int, seed: int = 0, copying: float = 0.0) -> list[str]:
    """About ``n`` documents in random order, a function of the arguments; a share ``copying`` of them are only repeated
    words."""
    rng = np.random.default_rng([seed, 97])

    def draw(some: Sequence[Any]) -> Any:
        return some[int(rng.integers(len(some)))]

    copied = [repeated(draw, rng) for _ in range(int(copying * n))]
    n -= len(copied)
    each = int(TASK_SHARE * n / 0.6)  # three fifths of the drawn inputs are of the train part
    found = [text for part in (_given, _lasted, _tagged, _agreeing, _documented) for text in part(each, seed, rng)]
    while len(found) < n:
        found.append(ELSE[rng.integers(len(ELSE))](draw, rng))
    found += copied
    return [found[i] for i in rng.permutation(len(found))]
