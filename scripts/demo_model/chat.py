"""Dialogue in the chat format, made from dictionaries, small skills and passages of the stories."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter

import phrases
from dictionaries import Sense

END = "<|endoftext|>"
Turn = tuple[str, str]

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]


def render(turns: list[Turn], system: str = "") -> str:
    """Turns in the chat format that the model's template also produces."""
    text = f"<|system|>\n{system}{END}\n" if system else ""
    for question, answer in turns:
        text += f"<|user|>\n{question}{END}\n<|assistant|>\n{answer}{END}\n"
    return text


def dialogues(
    first: dict[tuple[str, str], Sense],
    foldoc: list[tuple[str, list[str]]],
    stories: list[str],
    code: list[str],
    word_counts: Counter[str],
    rng: random.Random,
) -> list[str]:
    """All dialogues, shuffled, a third of them with several turns and some with a system line."""
    turns: list[Turn] = []
    for (word, kind), sense in first.items():
        # Words that the running texts use often are asked about more often, in other phrasings.
        count = word_counts[word]
        if (count == 0 and " " in word and not sense.proper) or len(word) < 3 or not word.isascii():
            continue
        if re.match(r"(genus|family|order|class|phylum|subfamily|suborder) ", word):
            continue
        repeats = 1 + (count > 5) + (count > 40) + (count > 200)
        if count == 0 and rng.random() < 0.7:
            continue
        for _ in range(repeats):
            turn = _about_word(word, kind, sense, rng)
            if turn:
                turns.append(turn)
    turns += [turn for entry in foldoc if (turn := _about_term(*entry, rng))]
    turns += _stories(stories, word_counts, rng)
    turns += _functions(code, rng)
    turns += _hand_written(rng, skills=6000, phrases_each=60, functions_each=30)
    return _gathered(turns, rng)


def basics(first: dict[tuple[str, str], Sense], word_counts: Counter[str], rng: random.Random) -> list[str]:
    """A small set that training can pass through several times: common words, asked about in several ways."""
    turns: list[Turn] = []
    for (word, kind), sense in first.items():
        if word_counts[word] >= 40 and len(word) >= 3 and kind != "r" and not sense.proper:
            turns += [turn for _ in range(3) if (turn := _about_word(word, kind, sense, rng))]
    turns += _hand_written(rng, skills=1500, phrases_each=50, functions_each=35)
    return _gathered(turns, rng)


def _hand_written(rng: random.Random, skills: int, phrases_each: int, functions_each: int) -> list[Turn]:
    """Exercises, fixed phrases and simple functions, each as often as asked."""
    turns = [_skill(rng) for _ in range(skills)]
    turns += [
        (rng.choice(asked), rng.choice(said)) for asked, said in phrases.FIXED for _ in range(phrases_each)
    ]
    turns += [
        (rng.choice(phrases.ASK_FUNCTION).format(task), f"```python\n{source}\n```")
        for task, source in phrases.FUNCTIONS
        for _ in range(functions_each)
    ]
    return turns


def _gathered(turns: list[Turn], rng: random.Random) -> list[str]:
    """Turns, shuffled, as dialogues of one to three turns."""
    rng.shuffle(turns)
    texts = []
    while turns:
        size = rng.choices((1, 2, 3), (0.65, 0.25, 0.1))[0]
        system = rng.choice(phrases.SYSTEM) if rng.random() < 0.12 else ""
        texts.append(render(turns[-size:], system))
        del turns[-size:]
    return texts


def article(text: str) -> str:
    """The indefinite article for a phrase."""
    vowel = text[:1].lower() in "aeiou" and not re.match(r"(?i)(uni|eu|one\b|us[aeiu]|ut)", text)
    return "an" if vowel else "a"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].rstrip(".;") + "."


def _about_word(word: str, kind: str, sense: Sense, rng: random.Random) -> Turn | None:
    """A question and answer about one word."""
    gloss = re.sub(r"^\([^)]*\)\s*", "", sense.gloss)
    if len(gloss) < 8 or not gloss.isascii():
        return None
    example = next((text for text in sense.examples if word in text.lower()), "")
    roll = rng.random()
    if example and roll < 0.12:
        ask = rng.choice(['Use the word "{}" in a sentence.', 'Give me a sentence with the word "{}".'])
        return ask.format(word), _sentence(example)
    if sense.antonyms.get(word) and roll < 0.4:
        ask = rng.choice(
            ['What is the opposite of "{}"?', "What is the opposite of {}?", "Give me an antonym of {}."]
        )
        return ask.format(word), f'The opposite of "{word}" is "{sense.antonyms[word]}".'
    others = [other for other in sense.words if other.lower() != word]
    if others and not sense.proper and roll < 0.2:
        ask = rng.choice(['What is another word for "{}"?', "Give me a synonym of {}."])
        return ask.format(word), f'Another word for "{word}" is "{others[0]}".'
    if sense.proper:
        return _about_name(word, gloss, sense, rng)
    tail = f" For example: {_sentence(example)}" if example and rng.random() < 0.5 else ""
    if kind == "n":
        return _about_noun(word, gloss, sense, rng, tail)
    ask = rng.choice(
        ['What does "{}" mean?', "What does {} mean?", "Define {}.", 'What is the meaning of "{}"?']
    )
    if kind == "v":
        return ask.format(word), f"To {word} means to {gloss}.{tail}"
    return ask.format(word), f'"{word.capitalize()}" means {gloss}.{tail}'


def _about_noun(word: str, gloss: str, sense: Sense, rng: random.Random, tail: str) -> Turn:
    ask = rng.choice(
        [f"What is {article(word)} {word}?"] * 3
        + [
            f"What is {word}?",
            f"Define {word}.",
            f'What does "{word}" mean?',
            f"Tell me about {word}.",
            f"Explain what {article(word)} {word} is.",
            f"what is {article(word)} {word}",
        ]
    )
    uncountable = re.search(r"(ness|ity|ism|ence|ance|ship|hood|ing|ics|logy|s)$", word)
    subject = word.capitalize() if uncountable else f"{article(word).capitalize()} {word}"
    if uncountable:
        ask = ask.replace(f"{article(word)} {word}", word)
    if re.match(r"(a|an|the|any|one)\b", gloss):
        return ask, f"{subject} is {gloss}.{tail}"
    if sense.hypernym and sense.hypernym.lower() not in word:
        return ask, f"{subject} is a kind of {sense.hypernym}: {gloss}.{tail}"
    return ask, f"{word.capitalize()} is {gloss}.{tail}"


def _about_name(word: str, gloss: str, sense: Sense, rng: random.Random) -> Turn | None:
    name = next((other for other in sense.words if other.lower() == word), sense.words[0])
    person = sense.topic == 18
    body = gloss if re.match(r"(a|an|the|any|one)\b", gloss) else f"{article(gloss)} {gloss}"
    if person:
        ask = rng.choice(["Who was {}?", "Who is {}?", "Tell me about {}."])
        return ask.format(name), f"{name} was {body}."
    ask = rng.choice(
        ["Where is {}?", "What is {}?", "Tell me about {}."]
        if sense.topic == 15
        else ["What is {}?", "Tell me about {}."]
    )
    if body is not gloss and not sense.hypernym[:1].islower():
        return None
    return ask.format(
        name
    ), f"{name} is {gloss}." if body is gloss else f"{name} is a kind of {sense.hypernym}: {gloss}."


def _about_term(term: str, paragraphs: list[str], rng: random.Random) -> Turn | None:
    """A question about a computing term; the answer is the entry's opening."""
    text = paragraphs[0]
    if len(text) > 420:
        text = text[:420].rsplit(". ", 1)[0] + "."
    if len(text) < 50 or len(text) > 421 or text[-1] != ".":
        return None
    ask = rng.choice(["What is {}?", "Explain {}.", "What does {} mean?", "Tell me about {}."])
    return ask.format(term), _sentence(text)


def _stories(stories: list[str], word_counts: Counter[str], rng: random.Random) -> list[Turn]:
    """Passages of the stories as answers to a wish for a story about something they mention."""
    turns = []
    for story in stories:
        paragraphs = [text for text in story.split("\n\n") if len(text) > 80]
        for at in range(0, len(paragraphs), 4):
            passage = "\n\n".join(paragraphs[at : at + 3])[:900].rsplit(".", 1)[0] + "."
            words = [word for word in re.findall(r"[a-z]{4,}", passage) if 20 < word_counts[word] < 900]
            if len(passage) < 200 or not re.search(r'" | you | he | she | they | my | we ', passage):
                continue
            asks = ["Tell me a story.", "Tell me a short story.", "Write a story."]
            if words:
                asks += [
                    "Tell me a story about {}.",
                    "Write a story about {}.",
                    "Tell me something about {}.",
                ] * 2
            turns.append((rng.choice(asks).format(rng.choice(words) if words else ""), passage))
    return turns


def _functions(code: list[str], rng: random.Random) -> list[Turn]:
    """Short documented functions as answers to a wish for them."""
    turns = []
    for piece in code:
        try:
            body = ast.parse(piece).body
        except SyntaxError:
            continue
        for node in body:
            doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            source = ast.unparse(node) if doc and not node.name.startswith("__") else ""
            task = doc.split("\n\n")[0].replace("\n", " ").rstrip(".") if doc else ""
            if source and source.count("\n") < 20 and 12 < len(task) < 120 and task.isascii():
                ask = rng.choice(
                    ["Write a Python function: {}.", "Write Python code: {}.", "Write {1}(): {0}."]
                )
                turns.append((ask.format(task, node.name), f"```python\n{source}\n```"))
    return turns


def _skill(rng: random.Random) -> Turn:
    """A tiny exercise with an exact answer."""
    kind = rng.randrange(6)
    a, b = rng.randrange(0, 21), rng.randrange(0, 21)
    if kind == 0:
        return rng.choice([f"What is {a} plus {b}?", f"What is {a} + {b}?"]), f"{a} + {b} = {a + b}"
    if kind == 1:
        a, b = max(a, b), min(a, b)
        return rng.choice([f"What is {a} minus {b}?", f"What is {a} - {b}?"]), f"{a} - {b} = {a - b}"
    if kind == 2:
        a, b = a % 11, b % 11
        return rng.choice([f"What is {a} times {b}?", f"What is {a} * {b}?"]), f"{a} * {b} = {a * b}"
    if kind == 3:
        names = rng.choice([DAYS, MONTHS])
        at = rng.randrange(len(names))
        step = rng.choice([-1, 1])
        word = "after" if step == 1 else "before"
        return (
            f"What comes {word} {names[at]}?",
            f"{names[(at + step) % len(names)]} comes {word} {names[at]}.",
        )
    if kind == 4:
        a = a % 15 + 2
        return f"Count from 1 to {a}.", ", ".join(str(i) for i in range(1, a + 1))
    a, b = sorted((a, b + 25))
    return f"Which is larger, {a} or {b}?", f"{b} is larger than {a}."
