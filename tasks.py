"""Tasks whose answers can be checked: the rewards of train_rl.py.

    sums     a sum of a few numbers, worked out step by step
    ledger   what was told at the beginning decides the end: a compressed cache must keep it
    words    the same kind of question in plain English, for models that read text
    jsonl    questions and answers of a file, as GSM8K has them

A task makes problems, demonstrations that are often wrong, and an exact reward of 1 or 0 for the number that
ends an answer. Does NOT include: judges, partial rewards.
`python tasks.py` shows a problem of each but jsonl. Read first: nothing.
"""

import copy
import functools
import json
import random
import re
import sys

from pretrained import decoded
from runs import UserError, said_by


class Task:
    """Problems whose answers end in a result and a full stop: reward 1 or 0.

    problem(rng) -> a prompt. work(prompt, rng) -> the right answer; with rng a demonstration, each step of
    which goes wrong with probability 0.1. room = (most characters of a prompt, of an answer); most: in tokens.
    A model of ours reads characters, one token each. One that others trained has a tokenizer `enc`, and reads
    `shots` solved problems, one a line, before each prompt.
    Held-out problems come from a seed of their own. Of 99^7 sums hardly one is met in training too; of
    --small's 256 held-out ones 19 are.
    """

    end = "."  # of an answer

    def __init__(self, size, largest=99, enc=None, shots=0):
        self.size = size
        self.largest = largest
        self.enc = enc
        self.prepare(shots)

    def prepare(self, shots):
        """What follows from the tokenizer."""
        solved = [self.problem(random.Random(f"shot {i}")) for i in range(shots)]
        self.lead = "".join(f"{prompt}{self.work(prompt).rstrip()}\n" for prompt in solved)
        self.stop = self.encode(self.end)[-1]
        self.most = self.measured() if self.enc else self.room

    def measured(self):
        """Of 1000 problems the longest prompt and, with a half more, the longest answer, in tokens."""
        rng = random.Random("room")
        asked = [self.problem(rng) for _ in range(1000)]
        longest = max(len(self.encode(self.work(prompt))) for prompt in asked)
        return max(len(self.asked(prompt)) for prompt in asked), longest + longest // 2

    def encode(self, text):
        return self.enc.encode_ordinary(text) if self.enc else [self.symbols.index(c) for c in text]

    def asked(self, prompt):
        """-> the tokens that a model is given."""
        return self.encode(self.lead + prompt)

    def decode(self, tokens):
        return decoded(self.enc, tokens) if self.enc else "".join(self.symbols[t] for t in tokens)

    def number(self, rng):
        return rng.randint(1, self.largest)

    def slip(self, rng, chance=0.1):
        return rng.choice((-1, 1)) * rng.choice((1, 2, 3, 10)) if rng and rng.random() < chance else 0

    def reward(self, prompt, answer):
        return float(self.result(answer) == self.right(prompt))

    @functools.lru_cache(1024)  # a whole group answers the same prompt
    def right(self, prompt):
        return self.result(self.work(prompt))

    @staticmethod
    def result(answer):
        """The number that ends an answer, behind `=`, a letter or alone, as text; None: there is none."""
        found = re.fullmatch(r"\s*(?:.*[=a-z])?(-?\d+)\.", answer)
        return found and found[1]

    @property
    def held_out(self):
        """The task whose problems are held out: itself, where problems are as many as one likes."""
        return self


class Sums(Task):
    """A sum, reduced from left to right, one operation a step, the rest copied each time.

    By hand: `32-84+9=` -> 32-84 is -52, +9 copied: `-52+9=`; -52+9 is -43: `-43.`. The answer: `-52+9=-43.`,
    its last number the result. In 15 % of its steps a demonstration does two operations at once, with three
    times the errors.
    """

    symbols = "0123456789+-=."

    @property
    def room(self):
        operand = 1 + len(str(self.largest))  # with its sign
        total = 1 + len(str((self.largest + 10) * (self.size + 1)))
        return operand * (self.size + 1), sum(total + operand * left + 1 for left in range(self.size))

    def problem(self, rng):
        first = str(self.number(rng))
        return first + "".join(rng.choice("+-") + str(self.number(rng)) for _ in range(self.size)) + "="

    def work(self, prompt, rng=None):
        left = [int(x) for x in re.findall(r"[+-]?\d+", prompt)]
        steps = []
        while len(left) > 1:
            two = rng is not None and len(left) > 2 and rng.random() < 0.15
            left[: 2 + two] = [sum(left[: 2 + two]) + self.slip(rng, 0.3 if two else 0.1)]
            steps.append(str(left[0]) + "".join(f"{x:+d}" for x in left[1:]))
        return "=".join(steps) + "."


class Ledger(Task):
    """What letters are worth is told first; then letters are added up. Each step looks far back.

    By hand: `a4b7c9:cab=` -> c is 9: `c9`; a is 4, 9+4 is 13: `a13`; b is 7: `b20`. The answer: `c9a13b20.`
    """

    symbols = "0123456789abcdefgh:=-."

    @property
    def room(self):
        return 16 + 1 + 2 * self.size + 1, 4 * 2 * self.size + 1

    def problem(self, rng):
        letters = rng.sample("abcdefgh", 8)
        told = "".join(c + str(rng.randint(1, 9)) for c in letters)
        return told + ":" + "".join(rng.choices(letters, k=2 * self.size)) + "="

    def work(self, prompt, rng=None):
        told, asked = prompt.rstrip("=").split(":")
        worth = dict(zip(told[::2], map(int, told[1::2])))
        total = 0
        steps = []
        for letter in asked:
            total += worth[letter] + self.slip(rng)
            steps.append(f"{letter}{total}")
        return "".join(steps) + "."


class Words(Task):
    """A short story with numbers; the answer writes one equation for each event, two for bags.

    By hand: `tom has 12 pens. he buys 3 bags of 4. he loses 5. how many=` -> 3*4=12, 12+12=24, 24-5=19. The
    answer is `3*4=12;12+12=24;24-5=19.`
    """

    symbols = "0123456789abcdefghijklmnopqrstuvwxyz+-*=; ."
    names = ("tom", "ann", "max", "eva")
    things = ("pens", "nuts", "eggs", "keys", "caps")

    @property
    def room(self):
        # the longest event is `he buys 9 bags of 9. `, its equations `9*9=81;999+81=999;`
        return len("tom has 99 pens. how many=") + 21 * self.size, 19 * self.size

    def problem(self, rng):
        have = rng.randint(10, 99)
        story = [f"{rng.choice(self.names)} has {have} {rng.choice(self.things)}."]
        for _ in range(self.size):
            a, b = (rng.randint(2, 9) for _ in range(2))
            events = [(f"he buys {a} bags of {b}.", a * b), (f"he finds {10 + a}.", 10 + a)]
            if have > 9:
                events.append((f"he loses {b}.", -b))
            event, more = rng.choice(events)
            story.append(event)
            have += more
        return " ".join(story) + " how many="

    def work(self, prompt, rng=None):
        have = int(re.search(r"has (\d+)", prompt)[1])
        steps = []

        def write(a, sign, b):
            made = {"+": a + b, "-": a - b, "*": a * b}[sign] + self.slip(rng)
            steps.append(f"{a}{sign}{b}={made}")
            return made

        event = r"buys (\d+) bags of (\d+)|finds (\d+)|loses (\d+)"
        for bags, each, found, lost in re.findall(event, prompt):
            if bags:
                have = write(have, "+", write(int(bags), "*", int(each)))
            else:
                have = write(have, "+", int(found)) if found else write(have, "-", int(lost))
        return ";".join(steps) + "."


class Lines(Task):
    """Questions and answers of a file, one a line: {"question": .., "answer": ..}, as GSM8K has them.

    Right is an answer whose last number is that of the file's answer. It ends with its line. Every tenth
    question is held out.
    """

    end = "\n"

    def __init__(self, file, enc, shots=0, longest=0):
        self.enc = enc
        pairs = read_lines(file)
        self.longest = longest  # answer in tokens, or 0
        self.answers = dict(pairs)
        self.questions = [q for i, (q, _) in enumerate(pairs) if i % 10]
        self.others = [q for i, (q, _) in enumerate(pairs) if i % 10 == 0]
        self.prepare(shots)

    def problem(self, rng):
        return rng.choice(self.questions)

    def work(self, prompt, rng=None):
        return self.answers[prompt]

    def measured(self):
        prompt, answer = (max(len(f(q)) for q in self.answers) for f in (self.asked, self.answer_tokens))
        return prompt, self.longest or answer + answer // 2

    def answer_tokens(self, prompt):
        return self.encode(self.answers[prompt])

    @staticmethod
    def result(answer):
        found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", answer)
        return float(found[-1].replace(",", "")) if found else None

    @property
    def held_out(self):
        other = copy.copy(self)
        other.questions = self.others
        return other


def read_lines(file):
    """-> [(prompt, answer)], each answer in one line. UserError for what is no such file."""
    try:
        with open(file, encoding="utf-8") as f:
            said = [json.loads(line) for line in f if line.strip()]
        pairs = [("Question: " + " ".join(x["question"].split()) + "\nAnswer: ", x["answer"]) for x in said]
        pairs = [(prompt, " ".join(answer.split()) + "\n") for prompt, answer in pairs]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"--data {file}: no lines with a question and an answer ({said_by(e)})") from e
    wrong = [answer for _, answer in pairs if Lines.result(answer) is None]
    if wrong or len(pairs) < 20:
        what = (
            f"an answer has no number: {wrong[0][:60]!r}" if wrong else f"{len(pairs)} questions, 20 at least"
        )
        raise UserError(f"--data {file}: {what}")
    return pairs


TASKS = {"sums": Sums, "ledger": Ledger, "words": Words, "jsonl": Lines}


def problems(task, count, *seed):
    """The same problems for the same seed, on every computer; of a text's tokens no more than its room."""
    rng = random.Random(" ".join(map(str, seed)))
    found = []
    while len(found) < count:
        prompt = task.problem(rng)
        if not task.enc or len(task.asked(prompt)) <= task.most[0]:
            found.append(prompt)
    return found


def main():
    """A problem of each task but jsonl, worked right and with a slip."""
    for name, kind in TASKS.items():
        if kind is not Lines:
            task = kind(4)
            [prompt] = problems(task, 1, "shown")
            seeds = (random.Random(i) for i in range(99))
            said = next(x for x in (task.work(prompt, rng) for rng in seeds) if x != task.work(prompt))
            print(f"{name}\n  right   {prompt}{task.work(prompt)}\n  a slip  {prompt}{said}\n")


if __name__ == "__main__":
    if sys.argv[1:]:  # --help
        print(__doc__)
    else:
        main()
