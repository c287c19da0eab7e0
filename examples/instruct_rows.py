"""The rows that zoo:stories-moe-instruct was tuned on, made of instruct.jsonl and of stories.

    python examples/instruct_rows.py OUT --instruct instruct.jsonl --stories tinystories_cased.txt ...

Writes OUT/rows.jsonl to learn and OUT/held_out.jsonl to judge by. Requests are made from the stories: what a story
speaks of from its beginning becomes "Tell me a story about ...", and the story is the answer; so are sentences to write
with a word, sentences to repeat, names, colours and words spoken to find in a text, and what comes next. Of
instruct.jsonl there is what a small model can learn: questions on a passage whose answer stands in it, small talk,
opposites and the like; facts are left out. In half of the texts names and colours are others than in the story, so
that reading them pays and knowing stories does not. Stories are split as `train` splits them, other rows as `tune`
does, so that zoo:stories-moe never learnt what is held out either. Everything random is seeded.
"""
# ruff: noqa: SIM905

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flashinfer_cli.training.data import read_documents, split
from flashinfer_cli.training.dialogue import Row, split_rows

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
SENSITIVE = re.compile(  # what a teller of children's stories had better have no canned opinion on
    r"\b(sex\w*|kill\w*|die|dead|hate|drug\w*|hitler|nazi\w*|suicide|porn\w*|f[u*]ck\w*|shit|damn|hell|stupid|idiot|"
    r"gun|marijuana|rape\w*|hooker|lesbian|gay|god|jew\w*|muslim\w*|terror\w*)\b",
    re.I,
)
ASKING = "what who how why when where do does did are is can could will would which am".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--instruct", type=Path, required=True)
    parser.add_argument("--stories", type=Path, nargs="+", required=True)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    train, held = split(read_documents(given.stories))
    subjects = Subjects(train)
    others = list(instructions(given.instruct))
    rows = [Row(f"{r['instruction']}\n{r['input']}" if r["input"] else r["instruction"], r["output"]) for r in others]
    learnt = {row.question for row in split_rows(rows)[0]}
    parts: dict[bool, list[Made]] = {True: [], False: []}
    for row, made in zip(rows, others, strict=True):
        parts[row.question in learnt].append(made)
    given.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(given.seed)
    learn = [row for row in parts[True] for _ in range(COPIES[row["source"]])]
    for number in range(PASSES):
        made_rows = of_stories(train, subjects, rng)
        learn += [r for r in made_rows if number == 0 or r["source"] != "story" or rng.random() < AGAIN]
    write(given.out / "rows.jsonl", conversations([varied(row, rng) for row in learn], rng))
    few = list(of_stories(held, subjects, rng)) + parts[False]
    rng.shuffle(few)
    write(given.out / "held_out.jsonl", [row for row in few if not row.pop("follows", None)])


COPIES = {"chatterbot-corpus": 10, "rasbt-instruction-data": 10, "fairytaleqa": 1}  # how often a row is learnt
PASSES = 3  # over the stories, each with other requests and other sentences
AGAIN = 0.6  # of the stories are told again in a later pass


# ---- what is in instruct.jsonl
TALK = re.compile(
    r"\b(hello|hi|hey|good (morning|night|evening)|how are you|thank|thanks|bye|goodbye|your name|who are you|"
    r"nice to meet|are you|do you|joke|what's up)\b",
    re.I,
)
WORDS = re.compile(r"\b(opposite|antonym|synonym|plural|past tense|rhym\w*|another word|uppercase|lowercase)\b", re.I)


def learnable(row: Made) -> bool:
    """Whether it asks for small talk, for words about words, or for what stands in its passage."""
    if row["source"] == "chatterbot-corpus":
        return bool(TALK.search(row["instruction"])) and len(row["output"]) < 90
    if row["source"] == "rasbt-instruction-data":
        asked = f"{row['instruction']} {row['input']}"
        return bool(WORDS.search(asked)) and len(asked) + len(row["output"]) < 200
    return row["source"] == "fairytaleqa" and len(row["output"]) < 50 and row["output"].lower() in row["input"].lower()


def instructions(path: Path) -> Iterator[Made]:
    """Its learnable rows once each, without code and sensitive ones; passages cut to where the answer stands."""
    seen = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        row = {key: json.loads(line).get(key, "") for key in ("instruction", "input", "output", "source")}
        row["output"] = row["output"].strip().removesuffix(".") if row["source"] == "fairytaleqa" else row["output"]
        key = (row["instruction"], row["input"], row["output"])
        text = " ".join(key)
        if key in seen or "```" in text or not learnable(row):
            continue
        if row["source"] == "chatterbot-corpus" and SENSITIVE.search(text):
            continue
        seen.add(key)
        if row["source"] == "fairytaleqa":
            row["input"] = passage(row["input"], f"{row['output']} {row['instruction']}")
            if row["output"].lower() not in row["input"].lower():
                continue
            row["output"] = sentence_case(row["output"])
        yield row


def passage(text: str, wanted: str, most: int = 240) -> str:
    """The sentences around the one that shares most words with `wanted`, up to `most` characters."""
    parts = re.split(r"(?<=[.!?])\s+", text)
    words = set(re.findall(r"[a-z]{4,}", wanted.lower()))
    best = max(range(len(parts)), key=lambda i: len(words & set(re.findall(r"[a-z]{4,}", parts[i].lower()))))
    first = last = best
    while True:
        grown = False
        for a, b in ((first - 1, last), (first, last + 1)):
            if a >= 0 and b < len(parts) and len(" ".join(parts[a : b + 1])) <= most:
                first, last, grown = a, b, True
        if not grown:
            return " ".join(parts[first : last + 1])


def sentence_case(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text[-1:] in ".!?\"'" else ".")


def varied(row: Made, rng: random.Random) -> Made:
    """Half of the small talk with a capital and a mark at its end, as people type it."""
    if row.get("source") not in ("chatterbot-corpus", "rasbt-instruction-data") or rng.random() < 0.4:
        return row
    asked = row["instruction"].strip()
    asked = asked.capitalize() if asked.isupper() else asked[:1].upper() + asked[1:]
    if asked[-1:].isalnum():
        first = asked.split()[0].lower()
        question = first in ASKING
        asked += "?" if question else "."
    elif asked[-1:] in ".?!" and rng.random() < 0.3:
        asked = asked[:-1]
    return row | {"instruction": asked, "output": row["output"][:1].upper() + row["output"][1:]}


# ---- rows made of stories
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


# ---- conversations
def conversations(rows: list[Made], rng: random.Random) -> list[Made]:
    """Rows shuffled; four in ten short ones are put behind others, as later turns of a conversation.

    A question about a story that was just told loses its text and follows the story.
    """
    following, single = [], []
    story: Made | None = None
    for row in rows:
        if row["source"] == "story":
            story = row
        if (
            row.pop("follows", None)
            and story is not None
            and row["input"][:80] == story["output"][:80].replace("\n", " ")
        ):
            following.append({**row, "input": "", "history": [[story["instruction"], story["output"]]]})
        elif row.get("history"):
            following.append(row)
        else:
            single.append(row)
    rng.shuffle(single)
    short = [r for r in single if len(r["instruction"]) + len(r["input"]) + len(r["output"]) < 250]
    done = following + [r for r in single if len(r["instruction"]) + len(r["input"]) + len(r["output"]) >= 250]
    while short:
        turns = [short.pop() for _ in range(min(len(short), rng.choice((1, 1, 1, 2, 3, 4))))]
        if rng.random() < 0.25 and done and "history" not in done[-1]:
            turns.append(done.pop())  # a longer one comes last
        history = [
            [f"{t['instruction']}\n{t['input']}" if t["input"] else t["instruction"], t["output"]] for t in turns
        ]
        done.append(turns[-1] | ({"history": history[:-1]} if len(turns) > 1 else {}))
        if rng.random() < 0.05:
            rng.shuffle(done)
    rng.shuffle(done)
    return done


def write(path: Path, rows: Iterable[Made]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
