"""The breadth of the synthetic conversations: how user turns begin.

The target completes each opening to a whole user turn and then answers it. A little over half of
the openings are about code, the others about everything else. Subjects and function names are
drawn independently of the form, so that a few short tables give many thousand different openings.
"""

import random
from collections.abc import Sequence

from eagle3fn.base.errors import UserError
from eagle3fn.data.languages import LANGUAGES

ENGLISH = "en"

CODE_FORMS = (
    "Write a Python function that {task}",
    "Write a Python function to {task}",
    "Complete the following Python function:\n\ndef {name}(",
    "def {name}(",
    "from typing import List\n\n\ndef {name}(",
    "import math\n\n\ndef {name}(",
    'def {name}({argument}):\n    """',
    'def {name}({argument}):\n    """ ',
    "from typing import List, Tuple\n\n\ndef {name}({argument}) -> ",
    'Complete this function.\n\ndef {name}({argument}):\n    """Return',
    "Write a Python program that can {task}",
    "How can I {task} in Python?",
    "Here is a function with a docstring. Please implement it.\n\ndef {name}(",
    "Given {thing}, write a function that",
    "You are given {thing}. Write Python code to",
    "Explain what this Python code does:\n\ndef {name}(",
    "Find the bug in this code:\n\ndef {name}(",
    "Write a class in Python that represents",
    "Write unit tests for a function called {name}",
)
VERBS = (
    "count filter merge split rotate reverse group remove replace sum multiply compare convert "
    "parse encode decode check validate find select sort rank pair flatten compress expand shift "
    "swap search collect partition normalize interleave round average trim join match scale map "
    "index mark update"
).split()
NOUNS = (
    "words letters digits numbers pairs lists rows columns values keys intervals dates times "
    "names lines tokens points vectors matrices fractions prices scores records items edges "
    "nodes paths substrings characters brackets spaces sentences files bits squares cubes "
    "multiples divisors elements"
).split()
ARGUMENTS = (
    "values: List[int]",
    "text: str",
    "items: List[str]",
    "a: int, b: int",
    "n: int",
    "numbers",
    "s: str, k: int",
    "left: List[float], right: List[float]",
    "table: dict",
    "x",
)
THINGS = (
    "a list of integers",
    "a string",
    "two strings",
    "a list of strings",
    "a dictionary",
    "a matrix of numbers",
    "two sorted lists",
    "a positive integer n",
    "a list of floats",
    "a sentence",
    "a list of tuples",
    "a binary tree",
)
GENERAL_FORMS = (
    "What is {subject}",
    "Explain {subject} to a child",
    "How does {subject} work?",
    "Give me some tips about {subject}",
    "Write a short paragraph about {subject}",
    "Write an email about {subject}",
    "List three facts about {subject}",
    "Why is {subject} important",
    "Write a short story about {subject}",
    "Summarize the following text about {subject}:",
    "Compare {subject} with",
    "I have a question about {subject}.",
    "Can you help me with {subject}?",
    "Rewrite this sentence in a formal tone:",
    "Solve this math problem step by step:",
    "Translate this sentence",
    "What are the advantages of {subject}",
    "Create a plan for {subject}",
)
SUBJECTS = (
    "photosynthesis;the solar system;healthy eating;public speaking;the water cycle;"
    "climate change;renewable energy;the Roman Empire;jazz music;learning a new language;"
    "gardening;time management;machine learning;databases;the internet;money and saving;"
    "a job interview;travelling by train;cooking rice;black holes;evolution;the human heart;"
    "vaccines;electric cars;ocean life;mountains;chess;a birthday party;friendship;reading books;"
    "painting;ancient Egypt;democracy;trade;weather;probability;fractions;geometry;prime numbers;"
    "sorting algorithms;operating systems;computer networks;cats and dogs;bees;coffee;sleep;"
    "running;football;a small business;writing a resume;poetry;photography;bicycles;airplanes;"
    "volcanoes;earthquakes;recycling;rivers;the moon;robots"
).split(";")


def check_languages(languages: Sequence[str]) -> None:
    """Refuse languages that there are no openings in, and one that is named twice."""
    known = (ENGLISH, *LANGUAGES)
    for place, name in enumerate(languages):
        if name not in known:
            raise UserError(f"--languages {name}: must be of {', '.join(known)}")
        if name in languages[:place]:
            raise UserError(f"--languages {name}: is named twice; name it once")


def opening(seed: int, index: int, languages: Sequence[str] = (ENGLISH,)) -> str:
    """The beginning of user turn `index`, in one of the languages: a pure function."""
    name = random.Random(f"language/{seed}/{index}").choice(languages)
    if name == ENGLISH:
        return english_opening(seed, index)
    language = LANGUAGES[name]
    draw = random.Random(f"{name}/{seed}/{index}")
    return draw.choice(language.forms).format(subject=draw.choice(language.subjects))


def english_opening(seed: int, index: int, code_share: float = 0.6) -> str:
    """The beginning of user turn `index`: a pure function of its arguments."""
    draw = random.Random(f"{seed}/{index}")
    verb = draw.choice(VERBS)
    noun = draw.choice(NOUNS)
    which = draw.choice(("the", "all", "some"))
    task = f"{verb} {which} {noun} in {draw.choice(THINGS)}"
    about_code = draw.random() < code_share
    form = draw.choice(CODE_FORMS if about_code else GENERAL_FORMS)
    return form.format(
        task=task,
        name=f"{verb}_{noun}",
        argument=draw.choice(ARGUMENTS),
        thing=draw.choice(THINGS),
        subject=draw.choice(SUBJECTS),
    )


def stub(text: str, seed: int, index: int) -> str:
    """Cut three of four code turns after their first docstring.

    What is left is a function whose body the answer has to write. Which turns are cut is a pure
    function of `seed` and `index`; a turn without a function and a closed docstring never is.
    """
    head, _, rest = text.partition('"""')
    doc, closed, _ = rest.partition('"""')
    if not closed or "def " not in head:
        return text
    if random.Random(f"stub/{seed}/{index}").random() < 0.25:
        return text
    return f'{head}"""{doc}"""'
