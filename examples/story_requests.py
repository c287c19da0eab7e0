"""Requests made of stories, for `instruct_rows`: what to tell a story about, and what to say of its sentences.

In half of the texts names and colours are others than in the story, so that reading them pays and knowing stories does
not.
"""
# ruff: noqa: SIM905

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

Made = dict[str, Any]  # a row of the JSONL

STORY = (
    "Tell me a story about {}.", "Write a story about {}.", "Write a short story about {}.", "Tell a story about {}.",
    "Can you tell me a story about {}?", "Please tell me a story about {}.", "I want to hear a story about {}.",
    "Tell me a short story about {}.", "Make up a story about {}.", "A story about {}, please.",
)  # fmt: skip
ANY = ("Tell me a story.", "Can you tell me a story?", "Write a short story.", "Please tell me a story.")
USE = (
    "Write a sentence with the word '{}'.", "Use the word '{}' in a sentence.", "Write a sentence with the word {}.",
    "Make a sentence with the word {}.", "Generate a sentence using the word '{}'.", "Write a sentence about {}.",
)  # fmt: skip
REPEAT = ("Repeat this sentence.", "Say it again.", "Repeat after me.", "Repeat the following sentence.")
COLOUR = ("What colour is the {}?", "What color is the {}?", "Which colour does the {} have?")
SAID = ("What did {} say?", "What does {} say?", "Tell me what {} said.")
HELLO = ("Say hello to {}.", "Hello, my name is {}.", "Hi, I am {}.", "My name is {}.", "I am {}.", "Hello, I'm {}.")
MINE = ("What is my name?", "Do you know my name?", "What am I called?", "Who am I?")
NEXT = ("What happens next?", "Continue the story.", "How does the story go on?", "Finish the story.")
WHO = ("Who is the story about?", "Who is this about?", "Who is in the story?")
NAME = ("What is the name of the {}?", "What is the {}'s name?", "What is the {} called?")
TITLE = ("What is the story about?", "What is this about?")
SHORTEST, LONGEST = 150, 800  # characters of a story
COLOURS = "red blue green yellow pink purple white black brown orange".split()
COLOURED = re.compile(
    rf"\b({'|'.join(COLOURS)}) ([a-z]{{3,}})(?=[.,!?]| (?:was|is|and|to|in|on|with|that|for|at|of)\b)"
)
QUOTED = re.compile(r'\b([A-Z][a-z]{2,}) (?:said|asked|replied|shouted|cried|answered), "([^"]{4,70}[.!?])"')
NAMED = re.compile(
    r"\b(boy|girl|dog|cat|bird|rabbit|bunny|bear|man|woman|fish|mouse|frog|fox|duck|lion|elephant|monkey|princess|"
    r"puppy|kitten|squirrel|horse|turtle|bug|butterfly|pig|cow|king|queen|dragon|owl|snake)\b,? (?:named|called) "
    r"([A-Z][a-z]+)\b"
)
HEAD = re.compile(  # "the dog was", "a big ball.": a word after an article, and before what seldom follows an adjective
    r"\b(?:the|a|an|The|A|An)(?: (?:little|big|small|old|new|red|blue|pretty|nice|happy|sad|tiny|huge))? ([a-z]{3,})"
    r"(?=[.,!?]| (?:was|is|and|to|in|on|with|had|said|that|for|were|would|could|saw|went|who|came|at|of|from|did)\b)"
)
NO_SUBJECT = frozenset(
    "day time one way end thing first next same other rest bit lot while moment top middle side back front out end "
    "best story morning night idea something".split()
)


class Subjects:
    """What a story speaks of: its nouns, those first that are many in it and few in others."""

    def __init__(self, documents: Iterable[str]) -> None:
        self.seen: Counter[str] = Counter()
        self.heads: Counter[str] = Counter()
        self.an: Counter[str] = Counter()
        names: Counter[str] = Counter()
        for text in documents:
            names.update(name for _, name in NAMED.findall(text))
            self.seen.update(re.findall(r"\b[a-z]{3,}", text))
            self.heads.update(HEAD.findall(text))
            self.an.update(re.findall(r"\b(?:a|an) ([a-z]{3,})\b", text))
        self.names = sorted(names)  # each as often as any other, so that a name has to be read

    def of(self, text: str) -> list[str]:
        """Nouns with their article, the one most spoken of first; none that the story names only once."""
        inside = Counter(w for w in re.findall(r"\b[a-z]{3,}", text))
        heads = {w for w in HEAD.findall(text) if w not in NO_SUBJECT and inside[w] > 1}
        sure = [w for w in heads if self.heads[w] > 0.25 * self.seen[w] and self.seen[w] > 4]
        sure.sort(key=lambda w: (-inside[w] / (20 + self.seen[w]) ** 0.5, w))
        return [self.article(w) for w in sure]

    def article(self, noun: str) -> str:
        if self.an[noun] < 0.02 * self.seen[noun]:
            return f"the {noun}"
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def of_stories(documents: Iterable[str], subjects: Subjects, rng: random.Random) -> Iterator[Made]:
    """A request a story, and of its sentences what to repeat, to use, to find and to go on with."""
    for text in documents:
        text = text.replace("\n\n", "\n").strip()
        if "\u00e2" in text or "\u20ac" in text:  # read in the wrong encoding by whoever collected it
            continue
        whole = SHORTEST <= len(text) <= LONGEST and text[-1] in '.!?"'
        parts = sentences(text.replace("\n", " "))
        opening = " ".join(parts[:3])
        named = NAMED.search(opening)
        if whole:
            yield made("story", ask_for(text, named, subjects, rng), "", text)
        if named and len(opening) < 300:
            yield from about(opening, named, subjects, rng, follows=whole)
        yield from found_in(parts, subjects, rng)
        if len(parts) > 5 and rng.random() < 0.1:
            at = rng.randrange(1, len(parts) - 3)
            yield made("next", rng.choice(NEXT), " ".join(parts[max(0, at - 2) : at + 1]), parts[at + 1])
        plain = [s for s in parts if 15 <= len(s) <= 90 and '"' not in s and s[-1] == "."]
        for said in rng.sample(plain, min(len(plain), 2)):
            yield made("repeat", rng.choice(REPEAT), said, said)
        for said in plain:
            head = HEAD.search(said[:40])
            if head and head[1] not in NO_SUBJECT and subjects.seen[head[1]] > 4 and rng.random() < 0.25:
                yield made("use", rng.choice(USE).format(head[1]), "", said)
        if subjects.names and rng.random() < 0.35:
            yield greeting(subjects, rng)


def found_in(parts: list[str], subjects: Subjects, rng: random.Random) -> Iterator[Made]:
    """Colours and words spoken that stand in the story, asked for with the sentences around them."""
    for at in range(1, len(parts) - 1):
        around = " ".join(parts[at - 1 : at + 2])
        if len(around) > 300:
            continue
        coloured, quoted = COLOURED.findall(around), QUOTED.search(around)
        if len(coloured) == 1 and around.count(coloured[0][0]) == 1 and coloured[0][1][-1] != "s":
            colour, thing = coloured[0]
            if around.count(f" {thing}") == 1:
                other = rng.choice(COLOURS) if rng.random() < 0.5 else colour
                text = around.replace(f"{colour} {thing}", f"{other} {thing}")
                yield made("colour", rng.choice(COLOUR).format(thing), text, f"The {thing} is {other}.")
        if quoted and quoted[1] not in ("She", "They", "The") and rng.random() < 0.6:
            yield made("said", rng.choice(SAID).format(quoted[1]), around, f'{quoted[1]} said, "{quoted[2]}"')


def greeting(subjects: Subjects, rng: random.Random) -> Made:
    """Someone says a name, to be greeted by it, and may ask for it again."""
    name = rng.choice(subjects.names)
    first = (rng.choice(HELLO).format(name), f"Hello, {name}!")
    if rng.random() < 0.5:
        return made("greeting", first[0], "", first[1])
    return made("greeting", rng.choice(MINE), "", f"Your name is {name}.") | {"history": [list(first)]}


def ask_for(text: str, named: re.Match[str] | None, subjects: Subjects, rng: random.Random) -> str:
    """What to say for this story: what it speaks of from its first sentences on."""
    opening = set(re.findall(r"[a-z]{3,}", " ".join(sentences(text)[:3])))
    nouns = [noun for noun in subjects.of(text) if noun.split()[-1] in opening]
    choices = [n for n in nouns[:2] for _ in range(3)] + [" and ".join(nouns[:2])] * (len(nouns) > 1)
    if named:
        choices += [f"a {named[1]} named {named[2]}"] * 2
    if not choices or rng.random() < 0.04:
        return rng.choice(ANY)
    return rng.choice(STORY).format(rng.choice(choices))


def about(opening: str, named: re.Match[str], subjects: Subjects, rng: random.Random, follows: bool) -> Iterator[Made]:
    """Questions whose answer is a name in the opening, or who the opening is about; `follows`: may follow the story."""
    kind, name = named[1], named[2]
    told = opening
    if subjects.names and rng.random() < 0.5:
        name = rng.choice(subjects.names)
        told = re.sub(rf"\b{named[2]}\b", name, opening)
    if rng.random() < 0.8:
        row = made("name", rng.choice(NAME).format(kind), told, f"The {kind}'s name is {name}.")
        yield row | {"follows": True} if follows and told == opening and rng.random() < 0.4 else row
    if rng.random() < 0.4:
        article = "an" if kind[0] in "aeiou" else "a"
        yield made("who", rng.choice(WHO + TITLE), told, f"It is about {article} {kind} named {name}.")


def made(source: str, instruction: str, given: str, output: str) -> Made:
    return {"instruction": instruction, "input": given, "output": output, "source": source}


def sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+", text) if s]
