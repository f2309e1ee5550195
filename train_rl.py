"""Reinforcement learning: GRPO on tasks with exact rewards, with rollouts from a full or a compressed cache.

    python train_rl.py --small --name small       sums on a CPU, offline, under 3 minutes: compressed, with drafts
    python train_rl.py                            the same at full size on one GPU, in 3 minutes
    python train_rl.py --warm out/rl-sums-twin --correct none     another arm from the same warm start
    python train_rl.py --init smollm2 --task words                a model that others trained, or a folder
    torchrun --nproc_per_node=2 train_rl.py ...   the same run, the same problems, on 2 GPUs or CPU processes
    python train_rl.py --resume --name NAME       go on with out/NAME

    1) task       problems, demonstrations that are often wrong, an exact reward
    2) warm start a small Transformer imitates the demonstrations: right when greedy, rarely when it samples
    3) rollouts   a group of answers to each problem, from the full cache (dense) or a compressed one (sparse)
    4) learner    dense old pass, corrections (sparse_rl.py), a few minibatches of clipped policy gradient
    5) drafter    with --draft a module of mtp.py drafts the rollouts, and learns as the policy moves
    6) evaluation greedy answers to held-out problems, from the full and from the compressed cache

A step depends on weights, optimizer, seed and step alone: runs can be resumed, on any number of processes
that divides the problems of a minibatch, and arms of a seed get the same problems. Does NOT include: a KL
term, chat templates, rollouts that go on while the learner learns. Read
first: sparse_rl.py; mtp.py for the decoding engine and the module that drafts; train_lm.py for options and
runs. Letters as there; N answers in a step, T tokens of the longest prompt with its answer.
"""

import copy
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import random
import re
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import kernels
import mtp
import sparse_rl
import train_lm
from mtp import Decoder
from sparse_rl import CORRECTIONS, SCORES, Compressor, Recorder
from train_lm import ATTENTION, DEVICES, LM, UserError, World, fixed, option

# ------------------------------------------------------------------------------------------------------------
# 1) tasks


class Task:
    """Problems whose answers end in a result and a full stop: reward 1 or 0.

    problem(rng) -> a prompt. work(prompt, rng) -> the right answer; with rng a demonstration, each step of
    which goes wrong with probability 0.1. room = (most characters of a prompt, of an answer); most, in tokens.
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
        solved = [self.problem(random.Random(f"shot {i}")) for i in range(shots)]
        self.lead = "".join(f"{prompt}{self.work(prompt).rstrip()}\n" for prompt in solved)
        self.stop = self.encode(self.end)[-1]
        self.most = self.measured() if enc else self.room

    def measured(self):
        """Of 1000 problems the longest prompt and, with a half more, the longest answer, in tokens."""
        rng = random.Random("room")
        asked = [self.problem(rng) for _ in range(1000)]
        longest = max(len(self.encode(self.work(prompt))) for prompt in asked)
        return max(len(self.asked(prompt)) for prompt in asked), longest + longest // 2

    def encode(self, text):
        if not self.enc:
            return [self.symbols.index(c) for c in text]
        # A line's end stays a token: some tokenizers join it to the full stop, and no answer would end there.
        return [t for part in re.split(r"(\n)", text) for t in self.enc.encode_ordinary(part)]

    def asked(self, prompt):
        """-> the tokens that a model is given."""
        return self.encode(self.lead + prompt)

    def decode(self, tokens):
        return train_lm.decoded(self.enc, tokens) if self.enc else "".join(self.symbols[t] for t in tokens)

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
        number = lambda: str(rng.randint(1, self.largest))
        return number() + "".join(rng.choice("+-") + number() for _ in range(self.size)) + "="

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
        self.longest = longest  # answer in tokens, or 0
        self.answers = read_lines(file)
        self.questions = list(self.answers)
        self.others = self.questions[::10]
        del self.questions[::10]
        super().__init__(0, enc=enc, shots=shots)

    def problem(self, rng):
        return rng.choice(self.questions)

    def work(self, prompt, rng=None):
        return self.answers[prompt]

    def measured(self):
        prompt = max(len(self.asked(question)) for question in self.answers)
        answer = max(len(self.encode(answer)) for answer in self.answers.values())
        return prompt, self.longest or answer + answer // 2

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
    """-> {prompt: answer}, each answer in one line. UserError for what is no such file."""
    in_one = lambda text: " ".join(text.split())
    with train_lm.reading(f"--data {file}: no lines with a question and an answer"):
        with open(file, encoding="utf-8") as f:
            said = [json.loads(line) for line in f if line.strip()]
        found = {f"Question: {in_one(x['question'])}\nAnswer: ": in_one(x["answer"]) + "\n" for x in said}
    wrong = [answer for answer in found.values() if Lines.result(answer) is None]
    if wrong:
        raise UserError(f"--data {file}: an answer has no number: {wrong[0][:60]!r}")
    if len(found) < 20:
        raise UserError(f"--data {file}: {len(found)} questions, 20 at least")
    return found


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


# ------------------------------------------------------------------------------------------------------------
# Options

PRESETS = {
    "small": dict(
        **dict(size=4, largest=9, layers=2, width=64, heads=4, groups=4, held_out=256, eval_every=20),
        **dict(warm_steps=2500, warm_batch=32, warm_lr=8e-3, problems=32, steps=40, lr=5e-4),
        **dict(budget=18, buffer=4, recent=4, queries=4, draft="e2e", depths=3, equip_steps=400),
    ),
    "base": dict(),
}


DRAFTS = ("off", "frozen", "ce", "soft", "e2e", "advantage")


@dataclass
class Config:
    preset: str = option("base", "sets what is not given: small takes 3 minutes on a CPU", choices=PRESETS)
    task: str = fixed("sums", "what is to be learned", group="task", choices=TASKS)
    size: int = fixed(6, "operations in a problem", least=1, most=64)
    largest: int = fixed(99, "largest number in a sum", least=1, most=10**9)
    data: str = fixed("", "of --task jsonl: a file of question / answer lines, as GSM8K has")
    answer: int = fixed(
        0, "most tokens of its answers; 0 = half more than the longest there", least=0, most=2**16
    )
    attn: str = fixed("gqa", "all but gqa: dense rollouts", group="model", choices=ATTENTION)
    layers: int = fixed(4, "Transformer blocks", least=1, most=512)
    width: int = fixed(256, "model width C", least=1)
    heads: int = fixed(8, "query heads H; the head width D is C / H", least=1)
    groups: int = fixed(8, "key-value heads of gqa, latents of asa's global layers", least=1)
    window: int = fixed(16, "tokens in the window of asa's local layers", least=1)
    init: str = fixed(
        "",
        "instead of a new model: a run of train_lm.py, a folder in the Hugging Face layout, or smollm2; without "
        "imitation unless --warm-steps is given",
        group="warm start",
    )
    shots: int = fixed(4, "with --init, without imitation: solved problems before each", least=0, most=64)
    warm: str = option("", "a run: its warm start, task and model are used")
    warm_steps: int = fixed(6000, "steps of imitation", least=0)
    warm_batch: int = fixed(256, "demonstrations in such a step", least=1, most=2**16)
    warm_lr: float = fixed(1e-3, "its highest learning rate", least=0)
    rollout: str = fixed(
        "sparse", "from a full or a compressed cache", "rollouts", choices=("dense", "sparse")
    )
    compressor: str = fixed("rkv", "what decides which entries stay", choices=SCORES)
    budget: int = fixed(22, "entries per layer and head that a compression leaves", least=1, most=2**16)
    buffer: int = fixed(4, "tokens between two compressions", least=1, most=2**16)
    recent: int = fixed(18, "newest entries that always stay", least=0)
    queries: int = fixed(4, "newest queries, that score the other entries", least=1)
    sinks: int = fixed(0, "first entries that always stay", least=0)
    correct: str = fixed("twin", "of what compression changes (sparse_rl.py)", choices=CORRECTIONS)
    draft: str = fixed(
        "off",
        "drafts for rollouts: none, from a frozen module, or from one that goes on learning: by the tokens "
        "(ce), by the policy's law (soft), by expected acceptance (e2e), or by that in answers as the next "
        "policies will write them (advantage)",
        group="drafts",
        choices=DRAFTS,
    )
    depths: int = fixed(4, "drafts in a round at most; sparse: also below --buffer", least=1, most=64)
    equip_steps: int = fixed(600, "updates of the module before RL", least=1)
    draft_lr: float = fixed(3e-4, "learning rate of the module during RL", least=0)
    problems: int = option(64, "problems in a step", group="learner", least=1, most=2**16)
    group_size: int = option(8, "answers to each", least=2, most=2**16)
    minibatches: int = option(2, "updates per step", least=1)
    steps: int = option(150, "steps of RL", least=0)
    lr: float = option(1.5e-4, "learning rate, after a warm-up of 10 steps", least=0)
    clip: float = option(0.2, "PPO's epsilon", least=0, most=1)
    max_norm: float = option(1.0, "longer gradients are scaled down to this norm; 0: never", least=0)
    seed: int = fixed(0, "seeds weights, problems and samples", least=0, most=train_lm.SEEDS)
    device: str = option("auto", "auto: an NVIDIA GPU where there is one; mps is untested", choices=DEVICES)
    out: str = option("out", "folder of all runs", group="run")
    name: str = option("", "the run's folder in it (default: rl-TASK-CORRECTION, numbered when taken)")
    held_out: int = option(512, "problems of an evaluation", least=1, most=2**16)
    eval_every: int = option(15, "steps between evaluations", least=1)
    save_every: int = option(50, "steps between checkpoints", least=1)
    resume: bool = option(False, "continue --name, or the latest run of this task and correction")
    check: bool = option(False, "exit with 1 if the model did not learn as expected")

    @property
    def corrects(self):
        """The correction's name. Dense rollouts evict nothing: the default, which replays, is `both` there."""
        replays = "kept" in CORRECTIONS[self.correct].reads
        return "both" if replays and self.rollout == "dense" else self.correct

    @property
    def arm(self):
        return self.corrects if self.rollout == "sparse" else "dense"

    @property
    def correction(self):
        return CORRECTIONS[self.corrects]

    @property
    def compress(self):
        return Compressor(self.compressor, self.budget, self.buffer, self.recent, self.sinks, self.queries)


# What a run with a preset's own settings reaches, by arm and seed, since warm starts differ: the share of
# held-out problems solved with the full cache, greedy; the gain in right rollouts, first to last 10 steps;
# with drafts, the share of rounds that they save.
EXPECTED = {
    ("small", "both", 0): {"greedy": (0.85, 1.0), "gain": (0.2, 0.6), "rounds": (0.5, 0.7)},
    ("small", "twin", 0): {"greedy": (0.85, 1.0), "gain": (0.2, 0.6), "rounds": (0.5, 0.7)},
    ("small", "dense", 0): {"greedy": (0.85, 1.0), "gain": (0.2, 0.6), "rounds": (0.5, 0.75)},
    ("base", "both", 0): {"greedy": (0.65, 1.0), "gain": (0.25, 0.55)},
    ("base", "twin", 0): {"greedy": (0.9, 1.0), "gain": (0.38, 0.58)},
    ("base", "dense", 0): {"greedy": (0.9, 1.0), "gain": (0.38, 0.58)},
}
# What may differ from a preset all the same.
FREE = "preset rollout correct draft seed device out name eval_every save_every resume check".split()
MODEL = "attn layers width heads groups window".split()
MADE = "task size largest data answer init".split() + MODEL  # what a warm start was made for


def validate(cfg, size=1):
    """UserError for options that do not fit together."""
    train_lm.check_options(cfg)
    if not cfg.init:
        train_lm.check_heads(cfg)
    if cfg.problems % (cfg.minibatches * size):
        by = f"{size} processes x " * (size > 1) + f"--minibatches {cfg.minibatches}"
        raise UserError(f"{by} must divide --problems {cfg.problems}")
    if (cfg.task == "jsonl") != bool(cfg.data):
        raise UserError("--task jsonl reads questions from --data FILE, and only it does")
    if cfg.task == "jsonl" and not cfg.init:
        raise UserError("--task jsonl is for a model that reads text: give --init")
    if not (cfg.init or cfg.warm_steps):
        raise UserError("--warm-steps must be at least 1 without --init")
    if cfg.rollout == "sparse" and not ATTENTION[cfg.attn]["evicts"]:
        raise UserError(f"--attn {cfg.attn}: its cache cannot be compressed, so give --rollout dense")
    if cfg.draft != "off" and cfg.rollout == "sparse" and cfg.buffer == 1:
        raise UserError("--draft: with --buffer 1 every token evicts, so that no draft can be read")
    try:
        cfg.compress
    except ValueError as e:
        raise UserError(str(e)) from e


# ------------------------------------------------------------------------------------------------------------
# 2) warm start


class Demonstrations(Dataset):
    """Batches of imitation by step: tokens (B, T) padded with 0, weights (B, T): 1 on the answer's tokens."""

    def __init__(self, task, cfg):
        self.task = task
        self.cfg = cfg

    def __len__(self):
        return self.cfg.warm_steps

    def __getitem__(self, step):
        rng = random.Random(f"{self.cfg.seed} demonstrations {step}")
        tokens = np.zeros((self.cfg.warm_batch, sum(self.task.most)), np.int64)  # (B, T)
        weights = np.zeros(tokens.shape, np.float32)  # (B, T)
        for row, weight in zip(tokens, weights):
            prompt = self.task.problem(rng)
            given = self.task.asked(prompt)
            text = (given + self.task.encode(self.task.work(prompt, rng)))[: len(row)]
            row[: len(text)] = text
            weight[len(given) : len(text)] = 1
        return torch.from_numpy(tokens), torch.from_numpy(weights)


LOGITS = 2**27  # that are held at a time, at most: fewer rows where the vocabulary is large


def pieces(start, stop, T, vocab):
    """Rows start to stop of T tokens -> slices of them, of each of which the logits fit in LOGITS."""
    rows = max(1, LOGITS // (T * vocab))
    return [slice(i, min(i + rows, stop)) for i in range(start, stop, rows)]


def imitate(model, task, cfg, device):
    """Train on demonstrations, in bf16 where a GPU has it -> the last loss.

    FloatingPointError if a loss or a gradient is not finite: of such a model nothing is kept.
    """
    cuda = device.type == "cuda"
    seen = torch.zeros((), device=device)  # the sum of all losses and norms: one look in many steps
    schedule = train_lm.Config(lr=cfg.warm_lr, steps=cfg.warm_steps)
    optimizer = train_lm.make_optimizer(schedule, model, fused=cuda)
    batches = DataLoader(Demonstrations(task, cfg), batch_size=None, num_workers=8 if cuda else 0)

    def passes(tokens, weight):
        """tokens, weight (B, T) -> gradients, and the loss."""
        weight = weight[:, 1:]  # (B, T - 1)
        counted = weight.sum()
        loss = 0.0
        for piece in pieces(0, *tokens.shape, model.cfg.vocab):
            with torch.autocast("cuda", torch.bfloat16, enabled=kernels.has_bf16(device)):
                logits = model(tokens[piece, :-1])  # (b, T - 1, V)
            part = -(sparse_rl.token_logp(logits, tokens[piece, 1:]) * weight[piece]).sum() / counted
            part.backward()
            loss += part.detach()
        return loss

    captured = mtp.Captured(passes, optimizer.zero_grad)
    for step, batch in enumerate(tqdm(batches, desc="warm start", unit="step", disable=None, leave=False)):
        train_lm.set_rate(optimizer, train_lm.learning_rate(schedule, step))
        loss = captured(*(x.to(device, non_blocking=True) for x in batch))
        seen += loss + nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            train_lm.look(f"by step {step + 1} of the warm start", loss=seen.item())
    captured.forget()
    total = seen.item() + train_lm.norm_of(model)
    train_lm.look("at the end of the warm start", **{"sum of losses, gradients and weights": total})
    return loss.item()


def build(cfg, device):
    """-> (model, task), the model with its first weights."""
    torch.manual_seed(cfg.seed)
    if cfg.init:
        model, enc = train_lm.load_model(cfg.init, device)
        shots = 0 if cfg.warm_steps else cfg.shots
        if cfg.task == "jsonl":
            task = Lines(cfg.data, enc, shots, cfg.answer)
        else:
            task = TASKS[cfg.task](cfg.size, cfg.largest, enc, shots)
        model.mtp = None  # Teacher makes its own
        if cfg.correction.mass and model.cfg.vocab > 4096:
            raise UserError(f"--correct {cfg.correct} keeps whole laws: a vocabulary of at most 4096 tokens")
        train_lm.fits(model.cfg, device)
        longest = sum(task.most)
        if longest > model.cfg.context:
            made = f"--init {cfg.init}: its weights were made for at most {model.cfg.context} tokens"
            raise UserError(f"{made}, a problem with its answer has {longest}: fewer --shots, or --answer")
        return model, task
    task = TASKS[cfg.task](cfg.size, cfg.largest)
    sizes = {name: getattr(cfg, name) for name in MODEL}
    model = train_lm.Config(**sizes, vocab=len(task.symbols), context=sum(task.most))
    train_lm.fits(model, device)
    return LM(model).to(device), task


def read_warm(cfg, given):
    """The warm start that --warm names -> (what was saved or None, cfg with its task and model)."""
    if not cfg.warm:
        return None, cfg
    if cfg.resume:
        raise UserError("--resume goes on from a checkpoint; --warm is for a new run")
    path = pathlib.Path(cfg.warm)
    saved = train_lm.load_checkpoint(path / "warm.pt" if path.is_dir() else path, ("model", "made"))
    if not isinstance(saved["made"], dict) or set(saved["made"]) != set(MADE):
        raise UserError(f"--warm {path}: the warm start of another version of train_rl.py")
    train_lm.agree(given, saved["made"], f"--warm {path} was made with")
    return saved, dataclasses.replace(cfg, **saved["made"])


def read_init(cfg, given):
    """cfg with the shape of the model that --init names; no imitation unless it was asked for."""
    if not cfg.init or cfg.resume or cfg.warm:
        return cfg
    model, _ = train_lm.load_model(cfg.init)
    shape = {name: getattr(model.cfg, name) for name in MODEL}
    train_lm.agree(given, shape, f"--init {cfg.init} has")
    return dataclasses.replace(cfg, **shape, warm_steps=given.get("warm_steps", 0))


# ------------------------------------------------------------------------------------------------------------
# 3) rollouts


@dataclass
class Rollout:
    """N answers. T counts the longest prompt with its answer; column t of (N, T - 1) is about token t + 1."""

    text: torch.Tensor  # (N, T), padded with 0
    sampler: torch.Tensor  # (N, T - 1) log pi_s
    mask: torch.Tensor  # (N, T - 1) 1 on the answer's tokens
    answers: list  # of N strings
    reward: torch.Tensor  # (N,)
    seconds: float
    old: torch.Tensor = None  # (N, T - 1) log pi_o, when the learner has read the answers


def engine(model, task, cfg, rows, temperature, sparse, module=None, share=None):
    """The decoder of `rows` answers at once; the weights that it reads are the model's own.

    With a module it drafts where that is faster; on a CPU always, so that a seed gives the same answers. share:
    of mtp.Decoder, where several processes answer.
    """
    compress = cfg.compress if sparse else None
    how = cfg.correction
    if sparse and temperature and ("kept" in how.reads or how.mass):  # the learner reads what was kept
        compress = Recorder(compress, sum(task.most))
    drafts = None if model.embed.weight.is_cuda or module is None else cfg.depths
    more = dict(mtp=module, K=cfg.depths, drafts=drafts, stop=task.stop, compress=compress, share=share)
    return Decoder(model, rows, sum(task.most), temperature=temperature, **more)


def rollout(decoder, task, prompts):
    """Answer all prompts at once, one row each."""
    start = time.perf_counter()
    asked = [torch.tensor(task.asked(prompt)) for prompt in prompts]  # N of (tokens,)
    text, logp, mask = decoder.answer(asked, task.most[1])  # (N, T) each
    rows = torch.cat([mask.sum(-1, keepdim=True), text], dim=1).tolist()  # one transfer, the host waits here
    seconds = time.perf_counter() - start
    ends = [len(prompt) + length for prompt, (length, *_) in zip(asked, rows)]
    answers = [task.decode(row[1 + len(p) : 1 + end]) for p, row, end in zip(asked, rows, ends)]
    reward = torch.tensor([task.reward(*pair) for pair in zip(prompts, answers)], device=text.device)  # (N,)
    return Rollout(text, logp[:, 1:], mask[:, 1:].float(), answers, reward, seconds)


# ------------------------------------------------------------------------------------------------------------
# 4) learner


def answer_logits(model, r, rows, reads="full", recorder=None):
    """Logits of some answers (n, T - 1, V); the model reads the "full" history or what was "kept"."""
    text = r.text[rows]  # (n, T)
    cache = None
    if reads == "kept":
        kept = recorder.kept.unflatten(1, (-1, len(r.text)))[:, :, rows]  # (E, layers, n, G, budget)
        cache = sparse_rl.Replay(kept, recorder.buffer, text.shape[1] - 1)
    return model(text[:, :-1], cache)


def answer_logp(model, r, rows, reads="full", recorder=None):
    """Log-probabilities of some answers (n, T - 1)."""
    logits = answer_logits(model, r, rows, reads, recorder)  # (n, T - 1, V)
    return sparse_rl.token_logp(logits, r.text[rows, 1:]) * r.mask[rows]


def learn(model, optimizer, r, cfg, recorder=None, world=World()):
    """The updates of one step -> what there is to log. recorder: of what the sampler kept."""
    how = cfg.correction
    size = len(r.text) // cfg.minibatches
    # minibatches: some whole groups each, in pieces
    parts = [pieces(i, i + size, r.text.shape[1], model.cfg.vocab) for i in range(0, len(r.text), size)]
    every = [piece for part in parts for piece in part]

    # 1) the old policy, read by the learner's own code, so that rho is 1 before the first update
    old = {}  # what is read -> log pi_o (N, T - 1); the log is about the full history in any case
    with torch.no_grad():
        for reads in dict.fromkeys(("full", *how.reads)):
            old[reads] = torch.cat([answer_logp(model, r, piece, reads, recorder) for piece in every])
        if how.mass:  # the sampler's whole law
            reads = "kept" if cfg.rollout == "sparse" else "full"
            law = [answer_logits(model, r, piece, reads, recorder).softmax(-1) for piece in every]
            law = torch.cat(law)  # (N, T - 1, V)
    r.old = old["full"]

    # 2) the corrections, once for all updates
    views = {}  # what is read -> what PPO's ratio is taken against, weight, counted, (N, T - 1) each
    for reads in how.reads:
        anchor = old[reads] if how.anchor == "dense" else r.sampler
        views[reads] = (anchor, *how.weigh(old[reads] - r.sampler, r.mask))
    weights = torch.stack([weight for _, weight, _ in views.values()])  # (views, N, T - 1)

    # 3) the advantages
    advantage = sparse_rl.group_advantage(r.reward, cfg.group_size)  # (N,)
    groups = r.reward.view(-1, cfg.group_size)  # (problems, group_size)
    signal = groups.amax(-1) > groups.amin(-1)  # (problems,) right and wrong answers

    # 4) which minibatches have a gradient: those with an answer that has weight, in a group with a signal.
    # Adam's momentum would move the weights without one. The host waits here, once, for all minibatches.
    alive = (weights.amax((0, 2)) > 0) & signal.repeat_interleave(cfg.group_size)  # (N,)
    useful = alive.view(len(parts), -1).any(-1).float()  # (minibatches,)
    world.mean([useful])
    useful = (useful > 0).tolist()

    # 5) the updates
    updates = []  # of (loss, clipped, largest log rho, norm)
    for part in [part for part, some in zip(parts, useful) if some]:
        terms = []  # of (loss, clipped, largest log rho), one a view and piece, the first two by their share
        for (reads, view), piece in itertools.product(views.items(), part):
            anchor, weight, counted = (x[piece] for x in view)  # (n, T - 1) each
            logits = answer_logits(model, r, piece, reads, recorder)  # (n, T - 1, V)
            logp = sparse_rl.token_logp(logits, r.text[piece, 1:]) * r.mask[piece]  # (n, T - 1)
            loss, clipped, log_rho = sparse_rl.objective(
                logp, anchor, advantage[piece], weight, counted, cfg.clip
            )
            drift = 0.0
            if how.mass and reads == "full":
                drift = sparse_rl.center(logits, law[piece], how.mass, advantage[piece], weight, counted)
            share = len(logp) / size / len(views)  # of the minibatch, whose loss is a mean over answers
            (share * (loss + drift)).backward()
            terms.append(torch.stack([share * loss.detach(), share * clipped, log_rho]))
        loss, clipped, log_rho = torch.stack(terms, dim=1)  # (views x pieces,) each
        world.mean([p.grad for p in model.parameters()])
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.max_norm or math.inf)
        loss = loss.sum()
        train_lm.look("in an update", **dict(zip(("loss", "gradient"), torch.stack([loss, norm]).tolist())))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        updates.append(torch.stack([loss, clipped.sum(), log_rho.max(), norm]))

    # 6) what there is to log, of the answers of all processes
    T = world.gather(r.text.new_tensor([r.text.shape[1]])).max().item()
    end = T - r.text.shape[1]
    of_all = lambda x: world.gather(nn.functional.pad(x, (0, end)))  # (n, T - 1) -> (N, T - 1)
    mask, sampler, dense, weight = map(of_all, (r.mask, r.sampler, r.old, weights[0]))  # (N, T - 1) each
    found = sparse_rl.mismatch(dense - sampler, mask, weight)
    found.update(solved=world.gather(r.reward).mean(), no_signal=1 - world.gather(signal.float()).mean())
    found.update(length=mask.sum(-1).mean(), entropy=-sampler.sum() / mask.sum())
    updates = torch.stack(updates) if updates else r.reward.new_zeros(1, 4)  # (updates, 4)
    updates = world.gather(updates)  # (processes x updates, 4)
    loss, clipped, _, norm = updates.mean(0)
    found.update(loss=loss, clipped=clipped, norm=norm, log_rho_max=updates[:, 2].max())
    return {**dict(zip(found, torch.stack(list(found.values())).tolist())), "updates": sum(useful)}


# ------------------------------------------------------------------------------------------------------------
# 5) drafter


def weights_of(advantage, moved, ahead=1.0, least=0.5):
    """How much each answer counts for a module that will draft for the next policies -> (n,), and eta.

    What a module is worth is what the next rollouts accept, E_{y ~ p'} [accepted(y)], but the answers at hand
    were written by p. So an answer counts p'(y) / p(y). Of one answer that ratio is noisy. What updates do on
    purpose is to raise answers by their advantage: the policy that is best for E[A] - KL / eta is
    p' ~ p exp(eta A). eta is read off the updates since then, by least squares over the answers:
    log p'(y) / p(y) = eta A(y). An answer counts exp(ahead eta A); `ahead` 1 is the policy as it now is, more
    is one that goes on in the same direction.

    Where all A are 0 the weights are 1, and the loss is the plain one. Weights are never negative, so that no
    answer is unlearned without end; they stay within `least` and 1 / least, and their mean is 1. The target
    of a place is not weighted: it is the policy's law, whatever the reward. (Ours: MTP-RL's body is not
    available to us.)
    advantage (n,) A; moved (n,) log p'(y) / p(y).
    """
    eta = (advantage * moved).sum() / advantage.square().sum().clamp(min=1e-9)
    weight = (ahead * eta * advantage).exp().clamp(least, 1 / least)  # (n,)
    return weight / weight.mean(), eta


class Teacher:
    """A module that drafts for the policy, and what teaches it while the policy moves (--draft).

    After each update of the policy the module learns from some of the step's answers. The target is the policy
    as it now is, read with the full cache: what the next rollout will verify with. With `advantage` it learns
    from the last rollouts once more, each answer weighted by what the updates since have made of its like
    (weights_of). The policy gets no gradient.
    """

    ROLLOUTS = 4  # that --draft advantage learns from in a step
    MOST = 128  # answers of each

    def __init__(self, model, task, cfg, world=World()):
        weight = model.embed.weight
        self.model = model
        self.cfg = cfg
        self.world = world
        self.room = sum(task.most)
        if cfg.depths > self.room - 2:
            raise UserError(f"--depths {cfg.depths}: a problem with its answer has only {self.room} tokens")
        self.answers = max(8, min(self.MOST, LOGITS // (self.room * len(weight))))
        self.module = mtp.MTP(train_lm.Block(model.cfg, 0), model.cfg.width, model.cfg.norm_eps).to(weight)
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), cfg.draft_lr, (0.9, 0.95), weight_decay=0.0, capturable=weight.is_cuda
        )
        self.recent = []  # what `update` takes, of the last rollouts, newest first
        self.update = mtp.Captured(self.one_update)

    def equip(self, decoder, task, say, rollouts=4):
        """Train the module on the warm policy's own answers, before RL."""
        start = time.time()
        cfg = self.cfg
        parts = []  # of (text, mask)
        for i in range(rollouts):
            torch.manual_seed(cfg.seed + i)  # all processes draw alike, however many rounds each has played
            asked = problems(task, decoder.batch * self.world.size, cfg.seed, "equip", i)
            r = rollout(decoder, task, [asked[i] for i in self.world.own(len(asked))])
            parts.append(self.padded(r.text, r.mask))
        # (rollouts N, room) each, of all processes
        text, mask = (self.world.gather(torch.cat(x), rollouts) for x in zip(*parts))
        rows = min(32, self.answers, decoder.batch * self.world.size)
        settings = {"K": cfg.depths, "steps": cfg.equip_steps, "rows": rows, "say": lambda line: None}
        rate = mtp.equip(self.model, self.module, text, mask, **settings)  # (K,)
        took = f"{cfg.equip_steps} updates in {time.time() - start:.0f} s"
        say(f"equip    {took}: {1 + rate.sum():.2f} tokens per read expected")

    def padded(self, text, *about):
        """text (n, T); the others (n, T - 1), column t about token t + 1 -> (n, room) each, t about token t."""
        end = self.room - text.shape[1]  # room is the same in every step, T is not
        pad = nn.functional.pad
        return [pad(text, (0, end)), *(pad(x, (1, end)) for x in about)]

    def teach(self, r, step):
        """After the policy's update, from its answers -> what there is to log.

        All processes learn the same, from answers of all.
        """
        advantage = sparse_rl.group_advantage(r.reward, self.cfg.group_size)  # (n,)
        columns = [*self.padded(r.text, r.mask, r.old), advantage]
        columns = [self.world.gather(x, self.cfg.minibatches) for x in columns]  # of all N answers
        every = max(1, len(columns[0]) // self.answers)
        lesson = tuple(x[step % every :: every][: self.answers] for x in columns)
        most = self.ROLLOUTS if self.cfg.draft == "advantage" else 1
        # After --resume with another --problems the checkpoint's lessons have another number of rows.
        alike = [x for x in self.recent if x[0].shape == lesson[0].shape]
        self.recent = [lesson, *alike][:most]
        found = torch.stack([self.update(*lesson) for lesson in self.recent])  # (updates, 3)
        loss, norm, eta = found.mean(0).tolist()
        train_lm.look("in an update of the module", **{"draft loss": loss, "gradient": norm})
        return {"draft_loss": loss, "draft_norm": norm, "draft_eta": found[0, 2].item()}

    def one_update(self, text, mask, old, advantage):
        """text, mask, old (n, room), advantage (n,) -> loss, gradient's norm, eta of weights_of: (3,).

        mask and old, the log-probabilities of the policy that wrote the text, are about the tokens themselves.
        """
        cfg = self.cfg
        head = self.model.head.weight
        with torch.no_grad():
            h = self.model.hidden(text)  # (n, room, C)
            z = self.model.head(h)  # (n, room, V)
        moved = (sparse_rl.token_logp(z[:, :-1], text[:, 1:]) - old[:, 1:]) * mask[:, 1:]  # (n, room - 1)
        weight, eta = weights_of(advantage, moved.sum(-1))  # (n,)
        p = mtp.law(z, 1.0)  # (n, room, V)
        if cfg.draft == "ce":  # the law of place s becomes the token x_{s+1} itself
            p = nn.functional.one_hot(text.roll(-1, 1), p.shape[-1]).to(p.dtype)
        amp = kernels.has_bf16(text.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=amp, cache_enabled=False):
            states = self.module.unroll(h, text, self.model.embed.weight, cfg.depths)
            if cfg.draft in ("ce", "soft"):
                loss = mtp.soft_loss(states, head, p, mask)
            else:
                weight = weight[:, None].expand_as(mask) if cfg.draft == "advantage" else None
                loss = mtp.e2e_loss(states, head, p, mask, weight=weight)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach(), norm, eta])

    def state(self):
        """What a checkpoint keeps."""
        own = {"module": self.module.state_dict(), "pupil": self.optimizer.state_dict()}
        return {**own, "recent": self.recent}

    def load(self, folder, saved):
        train_lm.load_state(folder, self.module, saved.get("module"))
        train_lm.load_state(folder, self.optimizer, saved.get("pupil"))
        device = self.model.embed.weight.device  # a checkpoint is read on the CPU
        self.recent = [tuple(x.to(device) for x in lesson) for lesson in saved.get("recent", ())]


# ------------------------------------------------------------------------------------------------------------
# 6) evaluation, and the loop


def evaluate(decoder, task, count):
    """Greedy answers to held-out problems -> the share solved, and the first answer in words."""
    asked = problems(task.held_out, count, "held out")
    r = rollout(decoder, task, asked)
    return r.reward.mean().item(), f"{asked[0]}|{r.answers[0]} {'right' if r.reward[0] else 'wrong'}"


def train(cfg, given):
    """One run, from its folder to its last line. Returns the exit code."""
    if "correct" in given and cfg.corrects != cfg.correct:
        raise UserError(f"--correct {cfg.correct} replays evictions: only with --rollout sparse")
    warm, cfg = read_warm(cfg, given)
    cfg = read_init(cfg, given)
    device = train_lm.pick_device(cfg)
    world = train_lm.processes(device)
    cuda = device.type == "cuda"
    if not cuda:
        torch.set_num_threads(min(2, torch.get_num_threads()))  # more would mostly wait for each other
    name = f"rl-{cfg.task}-{cfg.arm}"
    run, saved = train_lm.open_run(cfg, given, name, validate, world)
    cfg = run.cfg

    # 1) model, optimizer, engines
    model, task = build(cfg, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0, fused=cuda)
    N = cfg.problems * cfg.group_size // world.size  # answers of this process in a step
    sparse = cfg.rollout == "sparse"
    teacher = None if cfg.draft == "off" else Teacher(model, task, cfg, world)
    module = teacher and teacher.module
    share = (world.own(N * world.size, cfg.minibatches), N * world.size)
    sampler = engine(model, task, cfg, N, 1.0, sparse, module, share)
    greedy = {"dense": engine(model, task, cfg, cfg.held_out, 0.0, False)}
    if ATTENTION[cfg.attn]["evicts"]:
        greedy["sparse"] = engine(model, task, cfg, cfg.held_out, 0.0, True)
    size = sum(p.numel() for p in model.parameters())
    longest = sum(task.most)  # tokens
    held = sampler.nbytes
    full = model.new_cache(1, longest, margin=1).nbytes * N  # of dense rollouts
    what = cfg.data or f"{cfg.task} of {cfg.size}"
    together = f", in each of {world.size} processes" if world.size > 1 else ""
    run.header(
        f"{torch.cuda.get_device_name()}, fp32" if cuda else "CPU, fp32",
        f"model    {cfg.attn}, {size / 1e6:.2f} M parameters; {what}, {longest} tokens",
        f"cache    {cfg.rollout} rollouts: {held / 2**20:.1f} MiB allocated for {N} answers, "
        f"{abs(1 - held / full):.0%} {'less' if held <= full else 'more'} than dense{together}",
        cache_bytes=held,
        dense_bytes=full,
    )

    def test(log=True):
        torch.manual_seed(cfg.seed)
        found = {}
        for cache, decoder in greedy.items():
            found[f"{cache}_greedy"], said = evaluate(decoder, task, cfg.held_out)
        if log:
            run.record(transcript=said, **found)
        shares = ", ".join(f"{name.split('_')[0]} cache {share:.1%}" for name, share in found.items())
        run.say(f"eval     step {run.step} | greedy, held out: {shares}", f"         {said}")
        return found

    # 2) warm start
    solved = []
    if saved:
        train_lm.load_state(run.folder, model, saved["model"])
        train_lm.load_state(run.folder, optimizer, saved["optimizer"])
        solved = list(saved.get("solved", ()))
        if teacher:
            teacher.load(run.folder, saved)
    elif warm:
        train_lm.load_state(cfg.warm, model, warm["model"])
    else:
        if cfg.warm_steps and world.rank == 0:
            start = time.time()
            loss = imitate(model, task, cfg, device)
            took = f"{time.time() - start:.0f} s, loss {loss:.3f}"
            run.say(f"warm     {cfg.warm_steps} steps of {cfg.warm_batch} demonstrations in {took}")
            made = {name: getattr(cfg, name) for name in MADE}
            train_lm.save_checkpoint(run.folder / "warm.pt", {"model": model.state_dict(), "made": made})
        world.copy_first(model)

    if teacher and not saved:
        share = (world.own(N * world.size), N * world.size)
        teacher.equip(engine(model, task, cfg, N, 1.0, sparse, share=share), task, run.say)
        world.copy_first(module)

    def save():
        run.look(**{"norm of the module": train_lm.norm_of(module) if module else 0.0})
        run.save(model, optimizer, solved=solved, **(teacher.state() if teacher else {}))

    # 3) rollouts, 4) learner, 5) drafter, 6) evaluation; a checkpoint is the last thing that a step does, so
    # that a killed run loses nothing
    found = None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    run.catch_signals()
    if not saved:
        found = test() if world.rank == 0 else None
        save()
    while run.step < cfg.steps:
        start = time.perf_counter()
        torch.manual_seed((cfg.seed * 1_000_003 + run.step) % 2**63)
        train_lm.set_rate(optimizer, cfg.lr * min(1, (run.step + 1) / 10))
        asked = problems(task, cfg.problems, cfg.seed, "train", run.step)
        asked = [asked[i] for i in world.own(cfg.problems, cfg.minibatches)]
        r = rollout(sampler, task, [prompt for prompt in asked for _ in range(cfg.group_size)])
        log = learn(model, optimizer, r, cfg, sampler.compress, world)
        if teacher and cfg.draft != "frozen":
            log.update(teacher.teach(r, run.step))
        run.advance(time.perf_counter() - start)

        solved.append(log["solved"])
        ended = r.reward.new_tensor([answer.endswith(task.end) for answer in r.answers])  # (N,)
        log["finished"] = world.gather(ended).mean().item()
        log["tokens_per_second"] = N * world.size * log["length"] / r.seconds
        log.update(rollout_s=r.seconds, seconds=run.timed[-1])
        rounds, tokens = world.gather(sampler.state.reads).sum(0).tolist()
        log["tokens_per_read"] = tokens / max(rounds, 1)
        sampler.forget_counts()
        run.record(**log)
        if run.due(5):
            # Watch `solved`. The loss says nothing: the advantages of a group sum to 0, and rho begins at 1.
            line = (
                "solved {solved:.2f} | no-signal groups {no_signal:.2f} | len {length:.0f} "
                "| done {finished:.2f} | ent {entropy:.2f} | xi {xi_mean:.3f} p5 {p5:.2f} log min {log_xi_min:.1f} "
                "| k3 {k3:.1e} | vetoed {vetoed:.2f} | clip {clipped:.3f} | loss {loss:+.3f} "
                "| norm {norm:.2f} | {tokens_per_read:.2f} tokens per read "
                "| rollout {rollout_s:.2f} of {seconds:.2f} s"
            )
            run.progress(line.format(**log))
        found = test() if run.due(cfg.eval_every) and world.rank == 0 else None
        stopping = world.gather(torch.tensor([len(run.signals)], device=device)).any().item()
        if stopping or run.due(cfg.save_every):
            save()
        if stopping:
            return run.stopped()
    run.release_signals()
    if world.rank:
        return 0
    report = savings(model, task, cfg, sampler)
    return finish(run, found or test(log=False), solved, report, device)


def savings(model, task, cfg, sampler):
    """What the cache and the drafts save in a rollout -> {figure: number}. Bytes are counted, seconds measured.

    bytes of the policy's and the module's caches, of the full cache of gqa, of the cache of asa in its place;
    tokens per read and seconds of a rollout, with the sampler and without its drafts, by the last policy.
    """
    N = sampler.batch
    found = {"policy": sampler.cache.nbytes, "module": sampler.nbytes - sampler.cache.nbytes}
    for attn in ("gqa",) if cfg.init else ("gqa", "asa"):
        with torch.device("meta"):  # nothing is allocated
            other = LM(dataclasses.replace(model.cfg, attn=attn))
            found[attn] = N * other.new_cache(1, sum(task.most), 1, torch.float32, "meta").nbytes
    asked = problems(task, N // cfg.group_size, cfg.seed, "savings")
    asked = [prompt for prompt in asked for _ in range(cfg.group_size)]
    plain = engine(model, task, cfg, N, 1.0, cfg.rollout == "sparse")
    for name, decoder in {"drafts": sampler, "plain": plain}.items():
        for _ in range(4 if decoder.cuda else 1):  # compiled, then captured as a graph
            decoder.forget_counts()
            found[f"{name}_seconds"] = rollout(decoder, task, asked).seconds
        rounds, tokens = decoder.state.reads.sum(0).tolist()
        found[f"{name}_reads"] = tokens / max(rounds, 1)
    return found


def verdict(cfg, greedy, solved, reads):
    """What was expected of the run, and whether it came -> (a line, True or False; None if nothing was)."""
    expected = EXPECTED.get((cfg.preset, cfg.arm, cfg.seed))
    if not expected or not train_lm.usual(cfg, PRESETS, FREE):
        return "expected nothing in particular: no run with these options has been measured", None
    expected = {k: v for k, v in expected.items() if k != "rounds" or cfg.draft != "off"}
    gain = np.mean(solved[-10:] or [0]) - np.mean(solved[:10] or [0])
    got = {"greedy": greedy, "gain": gain, "rounds": 1 - 1 / reads}
    words = {"greedy": "solved when greedy", "gain": "gained when sampling", "rounds": "of the rounds saved"}
    ok = bool(all(low <= got[name] <= high for name, (low, high) in expected.items()))
    parts = [f"{low:.0%} to {high:.0%} {words[k]}, got {got[k]:.1%}" for k, (low, high) in expected.items()]
    return f"expected {'; '.join(parts)}: {'OK' if ok else 'NOT'}", ok


def finish(run, found, solved, saved, device):
    """The figures that the run claims, counted and measured, and what was expected -> exit code."""
    cfg = run.cfg
    greedy = ", ".join(f"{share:.1%} with the {name.split('_')[0]} cache" for name, share in found.items())
    first, last = (np.mean(part or [0]) for part in (solved[:10], solved[-10:]))
    MiB = {name: f"{saved.get(name, 0) / 2**20:.1f} MiB" for name in ("policy", "module", "gqa", "asa")}
    share = 1 - saved["policy"] / saved["gqa"]
    lines = [f"bytes    {share:.0%} of the full cache's {MiB['gqa']}: {MiB['policy']}"]
    if cfg.attn == "gqa" and not cfg.init:
        lines[0] += f"; asa in its place: {MiB['asa']}"
    reads, seconds, plain = (saved[name] for name in ("drafts_reads", "drafts_seconds", "plain_seconds"))
    if cfg.draft != "off":
        lines[0] += f"; the module that drafts has {MiB['module']}"
        pays = "" if seconds < plain else "; on this machine drafts do not pay"
        lines += [
            f"rounds   {1 - 1 / reads:.0%}: {reads:.2f} tokens per read",
            f"seconds  {1 - seconds / plain:.0%}: a rollout in {seconds:.2f}, without drafts {plain:.2f}{pays}",
        ]
    peak = train_lm.peak_memory(device) if device.type == "cuda" else 0
    if peak:
        lines.append(f"(the allocator's peak, learner and all: {peak / 2**20:.0f} MiB)")
    line, ok = verdict(cfg, found["dense_greedy"], solved, reads)
    return run.finished(
        f"\nresult   {cfg.task}, {cfg.rollout} rollouts, correction {cfg.corrects}: "
        f"{cfg.steps} steps of RL in {run.seconds:.0f} s",
        f"  solved when sampling   {last:.0%} in the last 10 steps, {first:.0%} in the first",
        f"  solved when greedy     {greedy}",
        *[f"  {'' if i else 'saved':5}  {text}" for i, text in enumerate(lines)],
        line,
        ok=ok,
        saved=saved,
        peak_bytes=peak,
        **found,
    )


def main(argv=None):
    return train_lm.main(argv, train, config=Config, presets=PRESETS, script="train_rl.py", doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
