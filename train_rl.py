"""Reinforcement learning: GRPO on tasks with exact rewards, with rollouts from a full or from a compressed cache.

    python train_rl.py --small --name small       reduces sums on a CPU, offline, under 2 minutes, its warm start included
    python train_rl.py                            the same at full size on one GPU: 2 minutes of warm start, a minute of RL
    python train_rl.py --warm out/rl-sums-both --correct none     another arm from the same warm start: nothing corrected
    python train_rl.py --resume --name NAME       go on with out/NAME

    1) task       problems, demonstrations that are often wrong, an exact reward
    2) warm start a small Transformer imitates the demonstrations: mostly right when greedy, rarely when it samples
    3) rollouts   a group of answers to each problem, from the full cache (dense) or at most budget + buffer slots of it (sparse)
    4) learner    dense old pass, corrections (sparse_rl.py), a few minibatches of clipped policy gradient
    5) evaluation greedy answers to held-out problems, from the full and from the compressed cache; a transcript

A step is a function of (weights, seed, step): that makes runs resumable, and gives all arms of a seed the same problems.
Does NOT include: a KL term, several GPUs, drafts, rollouts that go on while the learner learns.
Read first: sparse_rl.py; mtp.py for the decoding engine. Letters as there: N answers in a step, T tokens of the longest.
"""
import dataclasses
import functools
import math
import pathlib
import random
import re
import signal
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import sparse_rl
import train_lm
from mtp import Decoder
from sparse_rl import CORRECTIONS, SCORES, Compressor, Correction, Recorder
from train_lm import LM, Run, UserError, option


@dataclass
class Config:
    preset: str = option("base", "small (CPU, 2 minutes) or base: sets what is not given explicitly")
    task: str = option("sums", "sums (reduce from left to right), ledger (look up what was told long ago) or words (word problems)")
    size: int = option(6, "operations in a problem")
    largest: int = option(99, "largest number in a sum")
    # model
    attn: str = option("gqa", "gqa, or asa: its own cache is small already, so its rollouts are dense")
    layers: int = option(4, "Transformer blocks")
    width: int = option(256, "model width C")
    heads: int = option(8, "query heads H; the head width D is C / H")
    groups: int = option(8, "key-value heads of gqa, latents of asa's global layers")
    window: int = option(16, "tokens in the window of asa's local layers")
    # warm start
    warm: str = option("", "start from the warm start of this run (a folder) instead of making one; it brings task and model along")
    warm_steps: int = option(6000, "steps of imitation")
    warm_batch: int = option(256, "demonstrations in such a step")
    warm_lr: float = option(1e-3, "its highest learning rate")
    # rollouts
    rollout: str = option("sparse", "dense or sparse")
    compressor: str = option("rkv", "what decides which entries stay: " + ", ".join(SCORES))
    budget: int = option(22, "entries per layer and head that a compression leaves")
    buffer: int = option(4, "tokens between two compressions")
    recent: int = option(18, "newest entries that always stay")
    queries: int = option(4, "newest queries, that score the other entries")
    sinks: int = option(0, "first entries that always stay")
    # learner
    correct: str = option("both", "correction of what compression changes: " + ", ".join(CORRECTIONS))
    problems: int = option(64, "problems in a step")
    group_size: int = option(8, "answers to each")
    minibatches: int = option(2, "updates per step")
    steps: int = option(150, "steps of RL")
    lr: float = option(1.5e-4, "learning rate, after a warm-up of 10 steps")
    clip: float = option(0.2, "PPO's epsilon; gspo wants about 4e-4")
    max_norm: float = option(1.0, "longer gradients are scaled down to this norm; 0: never")
    seed: int = option(0, "seeds weights, problems and samples")
    device: str = option("auto", "auto, cpu or cuda")
    # run
    out: str = option("out", "folder of all runs")
    name: str = option("", "the run's folder in it (default: rl-TASK-CORRECTION, numbered when taken)")
    held_out: int = option(512, "problems of an evaluation")
    eval_every: int = option(15, "steps between evaluations")
    save_every: int = option(50, "steps between checkpoints")
    resume: bool = option(False, "continue --name, or the latest run of this task and correction")
    check: bool = option(False, "exit with 1 if the model did not learn as expected")

    @property
    def compress(self):
        return Compressor(self.compressor, self.budget, self.buffer, self.recent, self.sinks, self.queries)

    @property
    def correction(self) -> Correction:
        return CORRECTIONS[self.correct]


PRESETS = {
    "small": dict(size=4, largest=9, layers=2, width=64, heads=4, groups=4, warm_steps=2500, warm_batch=32, warm_lr=8e-3,
                  budget=18, buffer=4, recent=4, queries=4, problems=32, steps=60, lr=5e-4, held_out=256, eval_every=20),
    "base": dict(),
}
# What a run with a preset's own settings reaches, by arm and seed (a warm start differs much from seed to seed): the share of held-out
# problems solved with the full cache, greedy, and how much the share of right rollouts (T = 1) gains from the first 10 steps to the last.
EXPECTED = {("small", "both", 0): {"greedy": (0.85, 1.0), "gain": (0.2, 0.6)},
            ("small", "dense", 0): {"greedy": (0.85, 1.0), "gain": (0.3, 0.7)},
            ("base", "both", 0): {"greedy": (0.65, 1.0), "gain": (0.25, 0.55)},
            ("base", "twin", 0): {"greedy": (0.9, 1.0), "gain": (0.38, 0.58)},
            ("base", "dense", 0): {"greedy": (0.9, 1.0), "gain": (0.38, 0.58)}}  # fmt: skip
# what may differ from a preset all the same
FREE = "preset rollout correct seed device out name eval_every save_every resume check".split()
# what a resumed run cannot change
FIXED = ("task size largest attn layers width heads groups window warm_steps warm_batch warm_lr rollout compressor budget buffer recent "
         "queries sinks correct seed").split()  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------------------
# 1) tasks


class Task:
    """Problems in few characters, one token each. Answers end in a full stop; the number before it is right or wrong: reward 1 or 0.

    problem(rng) -> a prompt; work(prompt, rng) -> an answer: the right one without rng, with it a demonstration, each step of which goes
    wrong with probability 0.1. room = (most characters of a prompt, of an answer). Held-out problems differ from those of training by the
    seed alone: among 99^7 sums hardly one is met twice; of --small's 256, 19 are.
    """

    def __init__(self, size, largest=99):
        self.size, self.largest, self.stop = size, largest, self.symbols.index(".")

    def encode(self, text):
        return [self.symbols.index(c) for c in text]

    def decode(self, tokens):
        return "".join(self.symbols[t] for t in tokens)

    def number(self, rng):
        return rng.randint(1, self.largest)

    def slip(self, rng, chance=0.1):
        return rng.choice((-1, 1)) * rng.choice((1, 2, 3, 10)) if rng and rng.random() < chance else 0

    def reward(self, prompt, answer):
        return float(result(answer) == self.right(prompt))

    @functools.lru_cache(1024)  # a whole group answers the same prompt
    def right(self, prompt):
        return result(self.work(prompt))


def result(answer):
    """The number that ends an answer, behind `=` or a letter or alone, as text; None where there is none."""
    found = re.fullmatch(r"(?:.*[=a-z])?(-?\d+)\.", answer)
    return found and found[1]


class Sums(Task):
    """A sum, reduced from left to right, one operation a step, the rest copied each time. What a step needs was written just before.

    By hand: `32-84+9=` -> 32-84 is -52, +9 copied: `-52+9=`; -52+9 is -43: `-43.`. The answer is `-52+9=-43.`, its last number the result.
    In 15 % of the steps a demonstration does two operations at once, with three times the errors.
    """

    symbols = "0123456789+-=."

    @property
    def room(self):
        n, operand = self.size, 1 + len(str(self.largest))  # with its sign
        result = 1 + len(str((self.largest + 10) * (n + 1)))
        return operand * (n + 1), sum(result + operand * left + 1 for left in range(n))

    def problem(self, rng):
        return str(self.number(rng)) + "".join(rng.choice("+-") + str(self.number(rng)) for _ in range(self.size)) + "="

    def work(self, prompt, rng=None):
        left, steps = [int(x) for x in re.findall(r"[+-]?\d+", prompt)], []
        while len(left) > 1:
            two = rng is not None and len(left) > 2 and rng.random() < 0.15
            left[: 2 + two] = [sum(left[: 2 + two]) + self.slip(rng, 0.3 if two else 0.1)]
            steps.append(str(left[0]) + "".join(f"{x:+d}" for x in left[1:]))
        return "=".join(steps) + "."


class Ledger(Task):
    """What letters are worth is told first; then a list of letters, to be added up one by one. Each step needs an entry from far back.

    By hand: `a4b7c9:cab=` -> c is 9: `c9`; a is 4, and 9+4 is 13: `a13`; b is 7: `b20`. The answer is `c9a13b20.`
    """

    symbols = "0123456789abcdefgh:=-."

    @property
    def room(self):
        return 16 + 1 + 2 * self.size + 1, 4 * 2 * self.size + 1

    def problem(self, rng):
        letters = rng.sample("abcdefgh", 8)
        return "".join(c + str(rng.randint(1, 9)) for c in letters) + ":" + "".join(rng.choices(letters, k=2 * self.size)) + "="

    def work(self, prompt, rng=None):
        told, asked = prompt.rstrip("=").split(":")
        worth, total, steps = dict(zip(told[::2], map(int, told[1::2]))), 0, []
        for letter in asked:
            total += worth[letter] + self.slip(rng)
            steps.append(f"{letter}{total}")
        return "".join(steps) + "."


class Words(Task):
    """A short story with numbers; the answer writes one equation for each event.

    By hand: `tom has 12 pens. he buys 3 bags of 4. he loses 5. how many=` -> a bag event takes two equations, 3*4=12 and 12+12=24, the
    loss one, 24-5=19. The answer is `3*4=12;12+12=24;24-5=19.`
    """

    symbols = "0123456789abcdefghijklmnopqrstuvwxyz+-*=; ."
    names, things = ("tom", "ann", "max", "eva"), ("pens", "nuts", "eggs", "keys", "caps")

    @property
    def room(self):
        n = self.size  # the longest event is `he buys 9 bags of 9. `, its equations `9*9=81;999+81=999;`
        return len("tom has 99 pens. how many=") + 21 * n, 19 * n

    def problem(self, rng):
        have = rng.randint(10, 99)
        story = [f"{rng.choice(self.names)} has {have} {rng.choice(self.things)}."]
        for _ in range(self.size):
            a, b = rng.randint(2, 9), rng.randint(2, 9)
            events = [(f"he buys {a} bags of {b}.", a * b), (f"he finds {10 + a}.", 10 + a)]
            event, more = rng.choice(events + [(f"he loses {b}.", -b)] * (have > 9))
            story.append(event)
            have += more
        return " ".join(story) + " how many="

    def work(self, prompt, rng=None):
        have, steps = int(re.search(r"has (\d+)", prompt)[1]), []

        def write(a, sign, b):
            result = {"+": a + b, "-": a - b, "*": a * b}[sign] + self.slip(rng)
            steps.append(f"{a}{sign}{b}={result}")
            return result

        for bags, each, found, lost in re.findall(r"buys (\d+) bags of (\d+)|finds (\d+)|loses (\d+)", prompt):
            if bags:
                have = write(have, "+", write(int(bags), "*", int(each)))
            else:
                have = write(have, "+", int(found)) if found else write(have, "-", int(lost))
        return ";".join(steps) + "."


TASKS = {"sums": Sums, "ledger": Ledger, "words": Words}


def problems(task, count, *seed):
    """The same problems for the same seed, on every computer."""
    rng = random.Random(" ".join(map(str, seed)))
    return [task.problem(rng) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------------------------------
# 2) warm start


class Demonstrations(Dataset):
    """Batches of imitation by step: tokens (B, T) padded with 0, weights (B, T): 1 on the answer's tokens."""

    def __init__(self, task, cfg):
        self.task, self.cfg = task, cfg

    def __len__(self):
        return self.cfg.warm_steps

    def __getitem__(self, step):
        task, rng = self.task, random.Random(f"{self.cfg.seed} demonstrations {step}")
        tokens = np.zeros((self.cfg.warm_batch, sum(task.room)), np.int64)
        weights = np.zeros(tokens.shape, np.float32)
        for row, weight in zip(tokens, weights):
            prompt = task.problem(rng)
            text = prompt + task.work(prompt, rng)
            row[: len(text)] = task.encode(text)
            weight[len(prompt) : len(text)] = 1
        return torch.from_numpy(tokens), torch.from_numpy(weights)


def imitate(model, task, cfg, device):
    """Train on demonstrations, in bf16 on a GPU."""
    schedule = train_lm.Config(lr=cfg.warm_lr, steps=cfg.warm_steps)
    optimizer = train_lm.make_optimizer(schedule, model, fused=device.type == "cuda")
    batches = DataLoader(Demonstrations(task, cfg), batch_size=None, num_workers=8 if device.type == "cuda" else 0)
    for step, (tokens, weight) in enumerate(tqdm(batches, desc="warm start", unit="step", disable=None, leave=False)):
        for group in optimizer.param_groups:
            group["lr"] = train_lm.learning_rate(schedule, step)
        tokens, weight = tokens.to(device, non_blocking=True), weight[:, 1:].to(device, non_blocking=True)  # (B, T), (B, T - 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(tokens[:, :-1])  # (B, T - 1, V)
        loss = -(sparse_rl.token_logp(logits, tokens[:, 1:]) * weight).sum() / weight.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def build(cfg, device):
    """-> (model, task), the model with its first weights."""
    torch.manual_seed(cfg.seed)
    task = TASKS[cfg.task](cfg.size, cfg.largest)
    sizes = {name: getattr(cfg, name) for name in "attn layers width heads groups window".split()}
    return LM(train_lm.Config(**sizes, vocab=len(task.symbols), context=sum(task.room))).to(device), task


def read_warm(cfg, given):
    """The warm start that --warm names -> (what was saved, or None; cfg with the task and the model that it was made for)."""
    if not cfg.warm:
        return None, cfg
    path = pathlib.Path(cfg.warm)
    saved = train_lm.load_checkpoint(path / "warm.pt" if path.is_dir() else path)
    if "made" not in saved:
        raise UserError(f"--warm {path}: not a warm start of train_rl.py")
    for name, value in saved["made"].items():
        if given.get(name, value) != value:
            raise UserError(f"--warm {path}: it was made with --{name} {value}, not {given[name]}")
    return saved, dataclasses.replace(cfg, **saved["made"])


# ---------------------------------------------------------------------------------------------------------------------------------
# 3) rollouts


@dataclass
class Rollout:
    """N finished answers. T counts tokens up to the end of the longest text; column t of the (N, T - 1) tensors is about token t + 1."""

    text: torch.Tensor  # (N, T)
    sampler: torch.Tensor  # (N, T - 1) log pi_s
    mask: torch.Tensor  # (N, T - 1) 1 on the answer's tokens
    answers: list  # of N strings
    given: torch.Tensor  # (N,) tokens of the prompts
    reward: torch.Tensor  # (N,)
    seconds: float


@torch.no_grad()
def rollout(decoder, task, prompts):
    """Answer all prompts at once, one row each."""
    start = time.perf_counter()
    asked = [torch.tensor(task.encode(p)) for p in prompts]
    answers = decoder.generate(asked, task.room[1])
    given = torch.tensor([len(p) for p in asked])[:, None]  # (N, 1)
    known = given + torch.tensor([[len(tokens)] for tokens, _ in answers])  # (N, 1)
    seconds = time.perf_counter() - start
    at = torch.arange(known.max())  # (T,)
    inside = ((at >= given) & (at < known)).to(decoder.device)  # (N, T)
    text = nn.utils.rnn.pad_sequence([*asked, at], batch_first=True)[:-1].to(decoder.device)  # (N, T)
    text.masked_scatter_(inside, torch.cat([tokens for tokens, _ in answers]))
    sampler = torch.zeros(inside.shape, dtype=answers[0][1].dtype, device=decoder.device)  # (N, T)
    sampler.masked_scatter_(inside, torch.cat([logp for _, logp in answers]))
    said = [task.decode(row[g:n]) for row, g, n in zip(text.tolist(), given[:, 0].tolist(), known[:, 0].tolist())]
    reward = torch.tensor([task.reward(p, a) for p, a in zip(prompts, said)])  # (N,)
    return Rollout(text, sampler[:, 1:].contiguous(), inside[:, 1:].float(), said, given[:, 0].to(decoder.device), reward, seconds)


# ---------------------------------------------------------------------------------------------------------------------------------
# 4) learner


def answer_logp(model, r, rows, reads="full", recorder=None):
    """Teacher-forced log-probabilities of some answers' tokens -> (n, T - 1): from the "full" history, or from what the sampler "kept"."""
    text, cache = r.text[rows], None  # (n, T)
    if reads == "kept":
        cache = sparse_rl.Replay(recorder.kept[:, :, rows], r.given[rows], recorder.buffer, text.shape[1] - 1)
    return sparse_rl.token_logp(model(text[:, :-1], cache), text[:, 1:]) * r.mask[rows]


class View(NamedTuple):
    """The answers as the learner reads them: twin has two views, the other corrections one."""

    reads: str  # see sparse_rl.Correction
    anchor: torch.Tensor  # (N, T - 1) what PPO's ratio is taken against
    weight: torch.Tensor  # (N, T - 1)
    counted: torch.Tensor  # (N, T - 1)


def views_of(model, r, how, parts, recorder):
    """-> the views of a correction, once per rollout, for all its updates; and log xi (N, T - 1) of the full history, for the log."""
    old, views = {}, []
    for reads in dict.fromkeys(("full", *how.reads)):  # replay learns nothing from the full history, but its statistics do
        with torch.no_grad():  # by the learner's own code, so that rho is 1 before the first update
            old[reads] = torch.cat([answer_logp(model, r, i, reads, recorder) for i in parts])  # (N, T - 1)
    for reads in how.reads:
        anchor = old[reads] if how.anchor == "dense" else r.sampler
        views.append(View(reads, anchor, *how.weigh(old[reads] - r.sampler, r.mask)))
    return views, old["full"] - r.sampler


def learn(model, optimizer, r, cfg, recorder=None):
    """The updates of one step -> what there is to log. recorder: of what the sampler kept, for the corrections that read it."""
    how, reward, size = cfg.correction, r.reward.to(r.text.device), len(r.text) // cfg.minibatches
    parts = [slice(i, i + size) for i in range(0, len(r.text), size)]  # minibatches: some whole groups each
    views, log_xi = views_of(model, r, how, parts, recorder)
    advantage = sparse_rl.group_advantage(reward, cfg.group_size)  # (N,)
    groups = r.reward.view(-1, cfg.group_size)
    signal = groups.amax(-1) > groups.amin(-1)  # right and wrong answers
    found = {**sparse_rl.mismatch(log_xi, r.mask, views[0].weight), "solved": reward.mean(), "length": r.mask.sum(-1).mean(),
             "entropy": -r.sampler.sum() / r.mask.sum(), "no_signal": 1 - signal.float().mean()}  # fmt: skip
    # A minibatch without any answer that has weight, in a group with a signal, has no gradient, and Adam's momentum would still move the
    # weights: it is left out. The host waits here, once, for all minibatches.
    weighs = torch.stack([v.weight.amax(-1) for v in views]).amax(0) > 0  # (N,)
    useful = (weighs & signal.repeat_interleave(cfg.group_size).to(weighs.device)).view(len(parts), -1).any(-1).tolist()
    updates = []
    for i in [i for i, some in zip(parts, useful) if some]:
        losses = []
        for v in views:
            logp = answer_logp(model, r, i, v.reads, recorder)  # (n, T - 1)
            losses.append(sparse_rl.objective(logp, v.anchor[i], advantage[i], v.weight[i], v.counted[i], cfg.clip, how.level))
            (losses[-1][0] / len(views)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.max_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss, clipped, log_rho = (torch.stack(x).detach().double() for x in zip(*losses))  # (views,)
        updates.append(torch.stack([loss.mean(), clipped.mean(), norm.double(), log_rho.max()]))
    updates = torch.stack(updates) if updates else reward.new_zeros(1, 4)  # (updates, 4)
    found.update(zip(("loss", "clipped", "norm"), updates.mean(0)), log_rho_max=updates[:, 3].max(), updates=torch.tensor(sum(useful)))
    return dict(zip(found, torch.stack([x.double().to(reward.device) for x in found.values()]).tolist()))


# ---------------------------------------------------------------------------------------------------------------------------------
# 5) evaluation, and the loop


class Engines:
    """The decoding engines of a run, made when first used; the weights they read are the model's own."""

    def __init__(self, model, task, cfg):
        self.model, self.task, self.cfg, self.made = model, task, cfg, {}

    def __call__(self, rows, compressed, temperature):
        key = (rows, compressed, temperature)
        if key not in self.made:
            compress = self.cfg.compress if compressed else None
            if compressed and temperature and "kept" in self.cfg.correction.reads:
                compress = Recorder(compress, self.task.room[1] // compress.buffer + 4)
            self.made[key] = Decoder(self.model, rows, sum(self.task.room), temperature=temperature, stop=self.task.stop, compress=compress)
        return self.made[key]


def evaluate(engines, cfg, compressed):
    """Greedy answers to held-out problems -> the share solved, and the first answer in words."""
    asked = problems(engines.task, cfg.held_out, "held out")
    r = rollout(engines(len(asked), compressed, 0.0), engines.task, asked)
    return r.reward.mean().item(), f"{asked[0]}|{r.answers[0]} {'right' if r.reward[0] else 'wrong'}"


def validate(cfg):
    counts = "size largest layers width heads groups window warm_steps warm_batch problems minibatches held_out eval_every save_every"
    for name in counts.split():
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if cfg.group_size < 2 or not 0 < cfg.clip < 1:
        raise UserError("--group-size must be at least 2, --clip between 0 and 1")
    for name in "steps lr warm_lr max_norm".split():
        if getattr(cfg, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative")
    if cfg.width % cfg.heads or cfg.heads % cfg.groups or cfg.width // cfg.heads % 4:
        raise UserError(f"--heads {cfg.heads} must divide --width {cfg.width} into head widths divisible by 4, and "
                        f"--groups {cfg.groups} the heads")
    if cfg.problems % cfg.minibatches:
        raise UserError(f"--minibatches {cfg.minibatches} must divide --problems {cfg.problems}")
    if cfg.attn == "asa" and cfg.rollout == "sparse":
        raise UserError("--attn asa: only keys and values of gqa can be compressed; its own cache is small: --rollout dense")
    if "kept" in cfg.correction.reads and (cfg.rollout == "dense" or TASKS[cfg.task](cfg.size, cfg.largest).room[0] > cfg.budget):
        raise UserError(f"--correct {cfg.correct} replays evictions: only with --rollout sparse and prompts no longer than the --budget")
    try:
        cfg.compress
    except ValueError as e:
        raise UserError(str(e)) from e
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this computer has no GPU that torch can use; leave the option away for the CPU")


def train(cfg, given):
    """One run, from its folder to its last line. Returns the exit code."""
    if cfg.resume and cfg.warm:
        raise UserError("--resume goes on from a checkpoint; --warm is for a new run")
    warm, cfg = read_warm(cfg, given)
    if not cfg.resume:
        validate(cfg)
    device = torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # threads of so small a model mostly wait for each other: on a busy computer 10 times longer
    folder, saved = train_lm.run_folder(cfg, f"rl-{cfg.task}-{cfg.correct if cfg.rollout == 'sparse' else 'dense'}"), None
    if cfg.resume:
        saved = train_lm.load_checkpoint(folder / "ckpt.pt")
        for name in FIXED:
            if name in given and given[name] != saved["config"][name]:
                raise UserError(f"{folder}: the checkpoint has --{name.replace('_', '-')} {saved['config'][name]}, not {given[name]}")
        cfg = Config(**{**saved["config"], **given})
        validate(cfg)
        if cfg.steps < saved["step"]:
            raise UserError(f"{folder}: the checkpoint is at step {saved['step']} already, beyond --steps {cfg.steps}")
    step, seconds = (saved["step"], saved["seconds"]) if saved else (0, 0.0)
    run = Run(folder, 0)
    changed = {k: v for k, v in dataclasses.asdict(cfg).items() if v != getattr(Config(), k)}
    hardware = f"{torch.cuda.get_device_name()}, fp32" if device.type == "cuda" else "CPU, fp32"
    run.say(f"run      {folder}{f', resumed at step {step}' if step else ''}",
            f"options  {', '.join(f'{k} {v}' for k, v in changed.items()) or 'all defaults'}",
            f"on       {hardware}, torch {torch.__version__}")  # fmt: skip

    # 1) task, 2) warm start
    model, task = build(cfg, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0, fused=device.type == "cuda")
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    elif warm:
        model.load_state_dict(warm["model"])
    else:
        start = time.time()
        loss = imitate(model, task, cfg, device)
        run.say(f"warm     {cfg.warm_steps} steps of {cfg.warm_batch} demonstrations in {time.time() - start:.0f} s, loss {loss:.3f}")
        made = {name: getattr(cfg, name) for name in "task size largest attn layers width heads groups window".split()}
        train_lm.save_checkpoint(folder / "warm.pt", {"model": model.state_dict(), "made": made})
    engines, sparse = Engines(model, task, cfg), cfg.rollout == "sparse"
    sampler = engines(cfg.problems * cfg.group_size, sparse, 1.0)
    full = model.new_cache(1, sum(task.room) + 1, margin=1).nbytes * cfg.problems * cfg.group_size  # bytes of the dense rollouts' cache
    held, parameters = sampler.cache.nbytes, sum(p.numel() for p in model.parameters())
    run.say(f"model    {cfg.attn}, {parameters / 1e6:.2f} M parameters; {cfg.task} of {cfg.size}, {sum(task.room)} tokens at most",
            f"cache    {cfg.rollout} rollouts: {held / 2**20:.1f} MiB allocated for {cfg.problems * cfg.group_size} answers, "
            f"{1 - held / full:.0%} less than dense")  # fmt: skip
    run.open_log(step)
    run.record(step=step, options=changed, hardware=hardware, torch=torch.__version__, cache_bytes=held, dense_bytes=full)

    def save():
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds, "solved": solved}
        train_lm.save_checkpoint(folder / "ckpt.pt", {**state, "config": dataclasses.asdict(cfg)})

    def test():
        torch.manual_seed(cfg.seed)
        dense, said = evaluate(engines, cfg, False)
        found = {"dense_greedy": dense}
        if cfg.attn == "gqa":
            found["sparse_greedy"], said = evaluate(engines, cfg, True)
        run.record(step=step, transcript=said, **found)
        run.say(f"eval     step {step} | greedy, held out: " + ", ".join(f"{k.split('_')[0]} cache {v:.1%}" for k, v in found.items()),
                f"         {said}")
        return found

    # 3) rollouts, 4) learner, 5) evaluation
    stop, timed, solved = [], [], saved["solved"] if saved else []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    if step == 0:
        save()
        found = test()
    bar = tqdm(total=cfg.steps, initial=step, disable=None, unit="step", leave=False)
    while step < cfg.steps:
        start = time.perf_counter()
        torch.manual_seed(cfg.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, (step + 1) / 10)
        asked = [p for p in problems(task, cfg.problems, cfg.seed, "train", step) for _ in range(cfg.group_size)]
        r = rollout(sampler, task, asked)
        log = learn(model, optimizer, r, cfg, sampler.compress)
        if not math.isfinite(log["loss"]):
            run.say(f"stopped  the loss is {log['loss']} at step {step}: nothing saved since the last checkpoint in {folder}; "
                    "try a lower --lr")
            return 1
        step += 1
        timed.append(time.perf_counter() - start)
        seconds += timed[-1]
        solved.append(log["solved"])
        log.update(finished=sum(a.endswith(".") for a in r.answers) / len(r.answers), rollout_s=r.seconds, seconds=timed[-1],
                   tokens_per_second=sum(map(len, r.answers)) / r.seconds)  # fmt: skip
        run.record(step=step, **log)
        bar.update()
        if step % 5 == 0 or step == cfg.steps:
            # The loss says nothing: before the first update rho is 1, and the advantages of a group add up to 0. Watch solved.
            line = ("solved {solved:.2f} | no-signal groups {no_signal:.2f} | len {length:.0f} | done {finished:.2f} | ent {entropy:.2f} | "
                    "xi {xi_mean:.3f} log min {log_xi_min:.1f} | k3 {k3:.1e} | vetoed {vetoed:.2f} | clip {clipped:.3f} | loss {loss:+.3f} | "
                    "norm {norm:.2f} | rollout {rollout_s:.2f} of {seconds:.2f} s").format(**log)  # fmt: skip
            run.say(f"step {step:4d}/{cfg.steps} | {line} | eta {np.mean(timed[-20:]) * (cfg.steps - step) / 60:.1f} min")
        if stop or step % cfg.save_every == 0 or step == cfg.steps:
            save()
        if step % cfg.eval_every == 0 and step < cfg.steps:
            test()
        if stop:
            run.say(f"stopped  by a signal at step {step}, saved; --resume --name {folder.name} continues")
            return 128 + stop[0]
    bar.close()
    return report(cfg, run, test() if cfg.steps else found, solved, sampler, full, seconds)


def verdict(cfg, greedy, solved):
    """What was expected of the run, and whether it came -> (a line, OK or NOT at its end; True or False, None without an expectation)."""
    expected = EXPECTED.get((cfg.preset, cfg.correct if cfg.rollout == "sparse" else "dense", cfg.seed))
    usual = {**dataclasses.asdict(Config()), **PRESETS[cfg.preset]}
    if not expected or any(getattr(cfg, name) != value for name, value in usual.items() if name not in FREE):
        return "expected nothing in particular: no run with these options has been measured", None
    got = {"greedy": greedy, "gain": np.mean(solved[-10:] or [0]) - np.mean(solved[:10] or [0])}
    ok = all(low <= got[name] <= high for name, (low, high) in expected.items())
    words = {"greedy": "solved when greedy with the full cache", "gain": "gained when sampling"}
    line = "; ".join(f"{low:.0%} to {high:.0%} {words[name]}, got {got[name]:.1%}" for name, (low, high) in expected.items())
    return f"expected {line}: {'OK' if ok else 'NOT'}", bool(ok)


def report(cfg, run, found, solved, sampler, full, seconds):
    """The figures that the run claims, counted and measured; what was expected, OK or NOT. Returns the exit code."""
    held = sampler.cache.nbytes
    line, ok = verdict(cfg, found["dense_greedy"], solved)
    greedy = ", ".join(f"{share:.1%} with the {name.split('_')[0]} cache" for name, share in found.items())
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() and sampler.cuda else 0
    run.say(
        f"\nresult   {cfg.task}, {cfg.rollout} rollouts, correction {cfg.correct}: "
        f"{cfg.steps} steps of RL in {seconds:.0f} s",
        f"  solved when sampling   {np.mean(solved[-10:] or [0]):.0%} in the last 10 steps, {np.mean(solved[:10] or [0]):.0%} in the first",
        f"  solved when greedy     {greedy}",
        f"  cache of the rollouts  {held / 2**20:.1f} MiB, counted; dense {full / 2**20:.1f} MiB: {1 - held / full:.0%} saved"
        + (f"; the allocator's peak, learner and all: {peak / 2**20:.0f} MiB" if peak else ""),
        line,
    )
    run.record(step=cfg.steps, final=True, seconds=seconds, ok=ok, cache_bytes=held, dense_bytes=full, peak_bytes=peak, **found)
    return 1 if cfg.check and ok is False else 0


def main(argv=None):
    choices = {"preset": list(PRESETS), "task": list(TASKS), "attn": ["gqa", "asa"], "rollout": ["dense", "sparse"],
               "compressor": list(SCORES), "correct": list(CORRECTIONS), "device": ["auto", "cpu", "cuda"]}  # fmt: skip
    try:
        return train(*train_lm.parse(sys.argv[1:] if argv is None else argv, Config, PRESETS, choices, "train_rl.py", __doc__))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first step; later a signal saves first
        print("stopped  before the first step", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
