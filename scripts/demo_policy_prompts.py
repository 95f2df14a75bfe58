"""Prompts for recording the demo model's routing: `python scripts/demo_policy_prompts.py > prompts.jsonl`.

Chat questions, exercises, stories, Python tasks and openings to continue, of the kinds that the demo model was trained
on; the same every time. docs/policies.md has the commands that turn them into the demo model's eviction policy.
"""

from __future__ import annotations

import json
import random

THINGS = [
    "dog",
    "cat",
    "horse",
    "lantern",
    "river",
    "mountain",
    "ship",
    "castle",
    "forest",
    "garden",
    "bridge",
    "clock",
    "candle",
    "window",
    "ladder",
    "hammer",
    "violin",
    "compass",
    "island",
    "harbour",
    "storm",
    "winter",
    "bread",
    "honey",
    "apple",
    "engine",
    "wheel",
    "sail",
    "rope",
    "letter",
    "book",
    "map",
    "crown",
    "sword",
]
PEOPLE = [
    "king",
    "queen",
    "sailor",
    "farmer",
    "doctor",
    "teacher",
    "soldier",
    "child",
    "thief",
    "merchant",
    "hunter",
    "baker",
    "captain",
    "stranger",
]
ADJECTIVES = [
    "hot",
    "big",
    "fast",
    "old",
    "dark",
    "happy",
    "strong",
    "early",
    "heavy",
    "quiet",
    "rich",
    "empty",
    "high",
    "near",
    "open",
    "wet",
    "brave",
    "bitter",
]
TASKS = (
    "checks whether a number is prime", "reverses a string", "computes the factorial of n", "counts words in a text",
    "returns the largest number of a list", "merges two sorted lists", "removes duplicates from a list",
    "reads a file line by line", "computes the greatest common divisor", "sorts a list of pairs by the second item",
)  # fmt: skip
OPENINGS = (
    "It was late in the evening when the {a} {p} came to the {t}, and",
    "The {p} looked at the {t} and said:",
    "Once upon a time there was a {a} {p} who lived near a {t}.",
    "def {t}(items):\n    ",
    "import os\n\n\nclass {T}:\n    def __init__(self, name):\n",
    "{T}: a",
    "In the morning we left the {t} behind us; the {p}",
)
QUESTIONS = (
    "What is a {t}?", "What is the opposite of {a}?", "Tell me a story about a {p}.", "What is {n} plus {m}?",
    "Write a Python function that {task}.", "Use the word {t} in a sentence.", "Who are you?", "Hello!",
    "Tell me a story about a {a} {t}.", "What does {a} mean?", "Is a {t} a kind of {u}?", "What is {n} times {m}?",
    "Say something about the {p} and the {t}.", "What is a mixture of experts?", "How do you spell {t}?",
)  # fmt: skip


def prompts(count: int = 480, seed: int = 7) -> list[dict[str, object]]:
    """`count` prompts, three questions for each opening."""
    rng = random.Random(seed)
    rows: list[dict[str, object]] = []
    for i in range(count):
        thing = rng.choice(THINGS)
        words = {
            "t": thing, "T": thing.capitalize(), "u": rng.choice(THINGS), "p": rng.choice(PEOPLE),
            "a": rng.choice(ADJECTIVES), "n": rng.randrange(2, 60), "m": rng.randrange(2, 20),
            "task": rng.choice(TASKS),
        }  # fmt: skip
        if i % 4 == 3:
            rows.append({"prompt": rng.choice(OPENINGS).format(**words)})
        else:
            rows.append({"messages": [{"role": "user", "content": rng.choice(QUESTIONS).format(**words)}]})
    return rows


if __name__ == "__main__":
    for row in prompts():
        print(json.dumps(row))
