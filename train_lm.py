"""Pretraining of the model in lm.py: its data, its loop, its evaluation.

    python train_lm.py --small                    an ASA model of 1 M parameters on a CPU, offline, 2 minutes
    python train_lm.py                            30 M parameters, 4k context, one GPU, a few minutes
    python train_lm.py --preset 340m --data a.txt b.txt
    torchrun --nproc_per_node=2 train_lm.py ...   the same run, the same batches, on 2 GPUs or CPU processes
    python train_lm.py --resume --name NAME       go on with out/NAME
    python train_lm.py --init FOLDER --data a.txt         go on with a model that others trained
    python train_lm.py --export FOLDER --name NAME        write out/NAME as they do, for other programs
    python mtp.py out/NAME                        a text from it, afterwards

    1) options    what a run can be told, and which options fit together
    2) data       texts become tokens on disk; some documents get key=value pairs to recall
    3) models     of a run, or of others (pretrained.py)
    4) evaluation bits per byte, also by position; recall by distance; bytes of the cache, counted
    5) training   AdamW, warm-up and cosine, bf16 where a GPU has it, accumulation, clipping

The batch of a step depends on (seed, step, row) and the options of the data alone: runs can be resumed, on
any number of processes that divides the batch. Does NOT include: packing with masks between documents,
tensor parallelism. Read first: lm.py (the model), runs.py (folder, log, checkpoint). Letters as in
latent_attention.py.
"""

import codecs
import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import sys
import sysconfig
import time
import zlib
from dataclasses import dataclass
from functools import partial

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import kernels
import mtp
import runs
from lm import ATTENTION, LM, Shape, check_heads
from pretrained import decoded, is_pretrained, load_pretrained, pretrained_tokenizer, save_pretrained
from runs import SEEDS, UserError, option

# ------------------------------------------------------------------------------------------------------------
# 1) options

LARGE = dict(layers=24, heads=16, groups=4, window=512, blocks=128, nsa_blocks=16, context=8192)
PRESETS = {
    "small": dict(
        **dict(layers=4, width=128, heads=4, groups=2, window=16, blocks=8, nsa_blocks=4, nsa_block=32),
        **dict(recall=0.8, context=256, batch=8, micro=8, steps=400, lr=3e-3),
    ),
    "base": dict(),
    "340m": dict(**LARGE, width=1024, batch=32, micro=8, steps=20000, lr=3e-4, recompute=True),
    "1.3b": dict(**LARGE, width=2048, batch=64, micro=4, steps=50000, lr=2e-4, recompute=True),
}


@dataclass
class Config(Shape):
    """A Shape, and what else a run is told."""

    preset: str = option("base", "sets what is not given: small takes 2 minutes on a CPU", choices=PRESETS)
    init: str = option(
        "",
        "go on from a model: a run, a folder in the Hugging Face layout, or smollm2; its shape and tokenizer "
        "are used, and --recall 0 --grow 0 --lr 1e-4 unless given",
        fixed=True,
    )
    data: list = option([], "text files (default: what comes with Python)", group="data", fixed=True)
    recall: float = option(0.5, "share of documents with key=value pairs to recall", least=0, most=1)
    keys: int = option(
        1, "pairs in a section of such a document, at most (evaluation: exactly)", least=1, most=26**2
    )
    batch: int = option(
        8, "sequences of the full context per step, over all processes", group="training", least=1
    )
    micro: int = option(8, "of them per forward pass and process: lower it when memory runs out", least=1)
    grow: float = option(0.6, "share of the steps in which T grows from 256 to the context", least=0, most=1)
    steps: int = option(1000, "optimizer steps", least=0)
    lr: float = option(1e-3, "highest learning rate; warm-up, then cosine to a tenth", least=0)
    seed: int = option(0, "seeds weights, batches and samples", least=0, most=SEEDS)
    device: str = option(
        "auto", "auto: an NVIDIA GPU where there is one; mps is untested", choices=runs.DEVICES
    )
    out: str = option("out", "folder of all runs", group="run")
    name: str = option("", "the run's folder in it (default: PRESET-ATTN, numbered when taken)")
    eval_every: int = option(150, "steps between evaluations", least=1)
    save_every: int = option(150, "steps between checkpoints", least=1)
    resume: bool = option(False, "continue --name, or the latest run of this preset and attention")
    export: str = option("", "do not train: write the run --name, of gqa, to this folder for other programs")
    check: bool = option(False, "exit with 1 if the model did not learn as expected")


def validate(cfg, world=1):
    """UserError for options that do not fit together, and for texts or a tokenizer that are not there."""
    runs.check_options(cfg)
    check_heads(cfg)
    block = ATTENTION[cfg.attn]["block"](cfg)
    if cfg.attn != "gqa" and (cfg.bias or cfg.qk_norm or cfg.rope_factor != 1):
        raise UserError("--bias, --qk-norm and --rope-factor are of --attn gqa")
    if cfg.nsa_block % 16:
        raise UserError(f"--nsa-block {cfg.nsa_block} must be a multiple of 16")
    if cfg.context % block:
        raise UserError(f"--context {cfg.context} must be a multiple of {block}, the block of {cfg.attn}")
    if cfg.recall and cfg.context < 64:
        raise UserError(f"--context {cfg.context} leaves no room to recall: at least 64, or --recall 0")
    if cfg.mtp + 2 > min(cfg.context, 256):  # the shortest sequences of a run
        raise UserError(f"--mtp {cfg.mtp} looks beyond sequences of {min(cfg.context, 256)} tokens")
    if cfg.batch % world or cfg.batch // world % min(cfg.micro, cfg.batch // world):
        raise UserError(f"--batch {cfg.batch} must be a multiple of {world} processes x --micro {cfg.micro}")
    if cfg.batch * cfg.context > 2**28:
        raise UserError(f"--batch {cfg.batch} x --context {cfg.context} must be at most {2**28} tokens")
    known = tokenizer(cfg.tokenizer).n_vocab
    if 0 < cfg.vocab < known:
        raise UserError(f"--vocab must be 0 or at least {known} with this tokenizer, not {cfg.vocab}")
    if not cfg.resume:  # which has its tokens already
        sources(cfg)


# ------------------------------------------------------------------------------------------------------------
# 2) data

PARTS = ("train", "val")
ANSWER_WEIGHT = 10  # of a recalled value in the loss: with 1, one token in 50 teaches recall, slowly


@functools.cache
def tokenizer(name):
    """-> a tiktoken.Encoding, or of a model that others trained a HubTokenizer; "bytes" is made here.

    UserError where there is none of that name.
    """
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        special = {"<|endoftext|>": 256}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special)
    if is_pretrained(name):
        return pretrained_tokenizer(name)
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:  # unknown name, no network, a torn download: tiktoken raises many kinds
        hint = "tiktoken downloads a named encoding once; offline, leave --tokenizer away"
        raise UserError(f"tokenizer {name!r}: {runs.said_by(e)} ({hint})") from e


def sources(cfg):
    """The texts: a list of (name, a function that opens it), in the same order on every computer."""
    for name in cfg.data:
        if not os.path.isfile(name):
            what = "a directory" if os.path.isdir(name) else "not a regular file"
            raise UserError(f"--data {name}: {what if os.path.exists(name) else 'no such file'}")
        if os.path.getsize(name) == 0:
            raise UserError(f"--data {name}: the file is empty")
    if cfg.data:
        return [(name, partial(open, name, "rb")) for name in cfg.data]
    if cfg.preset == "small":  # Python's own help texts
        from pydoc_data.topics import topics

        return [(name, partial(io.BytesIO, topics[name].encode())) for name in sorted(topics)]
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])  # the sources of Python's library
    skip = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    names = sorted(path.as_posix() for path in paths if not skip & set(path.parts))
    return [(name, partial(open, root / name, "rb")) for name in names]


def split(f, share):
    """-> at which byte of an open text validation begins, after `share` tenths: between two characters."""
    cut = f.seek(0, 2) * share // 10
    f.seek(cut)
    rest = f.read(3)
    return cut + len(rest) - len(rest.lstrip(bytes(range(0x80, 0xC0))))  # behind the bytes of a character


def pieces(f, start, stop, errors):
    """Bytes start to stop of a file -> (bytes, text) of 1 to 2 MiB, to the end of a line if one is near."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)  # keeps a character that is not yet whole
    f.seek(start)
    while piece := f.read(min(2**20, stop - f.tell())):
        if not piece.endswith(b"\n"):
            piece += f.readline(min(2**20, stop - f.tell()))
        yield piece, decoder.decode(piece, final=f.tell() == stop)


def prepare(cfg, enc, folder):
    """Tokenize into folder/train.bin and val.bin, and describe them in folder/data.json.

    Every tenth text is for validation; of fewer than ten texts, the last tenth of each. The end-of-text token
    closes each text, in both parts if it is divided. What is not UTF-8 becomes U+FFFD, and is counted.
    """
    texts = sources(cfg)
    digest = hashlib.sha256()
    dtype = np.dtype(np.uint16 if enc.n_vocab <= 65536 else np.uint32)
    names = [part + kind for part in PARTS for kind in ("", "_bytes", "_crc")]  # "": tokens
    info = collections.Counter(dict.fromkeys(["replaced", *names], 0))  # replaced: places that are not UTF-8
    codecs.register_error("count", lambda e: (info.update(replaced=1) or "\ufffd", e.end))
    with runs.whole_file(folder / "train.bin") as train, runs.whole_file(folder / "val.bin") as val:
        for i, (_, opened) in enumerate(tqdm(texts, desc="tokenize", unit="text", disable=None, leave=False)):
            with opened() as f:
                total = f.seek(0, 2)  # bytes
                cut = split(f, 9 if len(texts) < 10 else 10 * (i % 10 < 9))
                for part, out, start, stop in (("train", train, 0, cut), ("val", val, cut, total)):
                    for piece, text in pieces(f, start, stop, "count"):
                        digest.update(piece)
                        tokens = enc.encode_ordinary(text) + [enc.eot_token] * (f.tell() == stop)
                        data = np.array(tokens, dtype=dtype).tobytes()
                        out.write(data)
                        info.update({part: len(tokens), f"{part}_bytes": len(piece)})
                        info[f"{part}_crc"] = zlib.crc32(data, info[f"{part}_crc"])
    about = dict(sha256=digest.hexdigest()[:8], dtype=dtype.name, texts=len(texts), tokenizer=cfg.tokenizer)
    with runs.whole_file(folder / "data.json") as f:
        f.write(json.dumps({**info, **about}).encode())


def mapped(folder):
    """-> data.json, {part: its tokens on disk}; None if the files are not (or no longer) as written."""
    try:
        info = json.loads((folder / "data.json").read_text())
        tokens = {}
        for part in PARTS:
            path = folder / f"{part}.bin"
            some = os.path.getsize(path) > 0
            tokens[part] = np.memmap(path, info["dtype"], "r") if some else np.empty(0, info["dtype"])
            if (len(tokens[part]), zlib.crc32(tokens[part])) != (info[part], info[f"{part}_crc"]):
                return None
        return info, tokens
    except (OSError, ValueError, KeyError, TypeError):  # TypeError: a dtype that is none
        return None


class Data:
    """Batches from the memory-mapped tokens, and recall documents made of them."""

    def __init__(self, cfg, enc, folder):
        self.cfg = cfg
        self.enc = enc
        found = mapped(folder)
        if found is None:
            raise UserError(f"{folder}: its tokens are not what was written; --resume writes them again")
        self.info, self.tokens = found
        for part in PARTS:
            if self.info[part] < cfg.context + 2:
                few = f"the {part} part of the data has {self.info[part]} tokens, --context {cfg.context}"
                raise UserError(f"{few} needs two more than that: give more text or a shorter --context")
        self.bytes_per_token = self.info["val_bytes"] / self.info["val"]

    def crop(self, part, rng, T):
        start = rng.integers(len(self.tokens[part]) - T - 1)
        return self.tokens[part][start : start + T + 1].astype(np.int64)  # (T + 1,)

    def recall(self, part, rng, T, keys=None):
        """A crop with statements like <qz=H> strewn in, told again and again, in sections with own pairs.

        When a key comes back, only a look at where it was told gives its value; 1 guess in 26 is right.
        By hand, 2 keys: `..<qz=H>..<ab=C>..<qz=H>..<qz=H>..<ab=C>..`: the 3rd to the 5th can be known.
        keys  pairs in the one section of the document (evaluation). None: sections short and long, easy and
              hard (training); a long document with many pairs alone teaches nothing for a long time.
        -> tokens (T + 1,), and a list of (tokens back to where it was told, its value's begin and end).
        """
        between = lambda low, high: float(np.exp(rng.uniform(math.log(low), math.log(high))))  # log-uniform
        letters = lambda first, n: "".join(chr(ord(first) + i) for i in rng.integers(26, size=n))
        text = self.crop(part, rng, T).tolist()
        doc = []
        asked = []
        while len(doc) <= T:
            length = T + 1 if keys else between(64, T)  # of a section
            stop = min(len(doc) + length, T + 1)
            count = keys or int(between(1, self.cfg.keys + 1))
            pairs = dict((letters("a", 2), letters("A", 1)) for _ in range(count))
            gap = between(4, length / 4)  # tokens of text between statements: dense and sparse sections
            told = {}  # key -> where it was last told
            while len(doc) < stop:
                doc += text[len(doc) : len(doc) + int(gap * rng.uniform(0.5, 1.5))]
                key = list(pairs)[rng.integers(len(pairs))]
                lead, value, end = (self.enc.encode_ordinary(s) for s in (f"<{key}=", pairs[key], ">"))
                begin = len(doc) + len(lead)
                if key in told and begin + len(value) <= T + 1:
                    asked.append((len(doc) - told[key], begin, begin + len(value)))
                told[key] = len(doc)
                doc += lead + value + end
        return np.array(doc[: T + 1]), asked

    def length(self, step):
        """T of a step: about 256 tokens at first, doubled at equal distances, the context after `grow` steps.

        What to look back for is learned among few tokens in few steps, and then kept; among 4096 it is not.
        """
        lengths = [self.cfg.context]
        while lengths[0] >= 512 and lengths[0] % 128 == 0:
            lengths.insert(0, lengths[0] // 2)
        growing = self.cfg.grow * self.cfg.steps  # steps
        return lengths[int((len(lengths) - 1) * step / growing)] if step < growing else self.cfg.context

    def batch(self, step, rank=0, world=1):
        """One process's rows of a step -> inputs, targets, weights (N / world, T); N T = batch x context."""
        T = self.length(step)
        rows = []
        weights = []
        for row in range(rank, self.cfg.batch * self.cfg.context // T, world):
            rng = np.random.default_rng([self.cfg.seed, step, row])
            weight = np.ones(T, np.float32)
            if rng.random() < self.cfg.recall:
                doc, asked = self.recall("train", rng, T)
                for _, begin, end in asked:
                    weight[begin - 1 : end - 1] = ANSWER_WEIGHT
            else:
                doc = self.crop("train", rng, T)
            rows.append(doc)
            weights.append(weight)
        rows = torch.from_numpy(np.stack(rows))  # (N / world, T + 1)
        return rows[:, :-1], rows[:, 1:], torch.from_numpy(np.stack(weights))


# ------------------------------------------------------------------------------------------------------------
# 3) models


def load_run(folder, device="cpu", module=True):
    """A run's model in eval mode; model.cfg is its config. module: with that of mtp.pt, if there is one."""
    folder = pathlib.Path(folder)
    path = folder / "ckpt.pt"
    saved = runs.load_checkpoint(path, ("model", "step", "config"), device)
    cfg = runs.config_of(saved, Config, path)
    if module and (folder / "mtp.pt").exists():
        extra = runs.load_checkpoint(folder / "mtp.pt", ("module", "depths", "step"), device)
        if extra["step"] != saved["step"]:
            made = f"{folder / 'mtp.pt'} was made for step {extra['step']}"
            raise UserError(f"{made}, the run is at step {saved['step']}: equip it again")
        cfg.mtp = extra["depths"]
        saved["model"].update({f"mtp.{name}": value for name, value in extra["module"].items()})
    runs.check_options(cfg)
    model = LM(cfg).to(device)
    runs.load_state(folder, model, saved["model"])
    return model.eval()


def load_model(name, device="cpu"):
    """A run of ours, its module with it, or a model that others trained -> (LM in eval mode, tokenizer)."""
    if is_pretrained(name):
        return load_pretrained(name, device)
    model = load_run(name, device)
    return model, tokenizer(model.cfg.tokenizer)


def from_init(cfg, given):
    """--init -> (its model, the config of a run that goes on from it). UserError where they do not fit."""
    model, _ = load_model(cfg.init)
    own = {f.name: getattr(model.cfg, f.name) for f in dataclasses.fields(Shape) if f.metadata["fixed"]}
    for name, value in own.items():
        if name != "mtp" and given.get(name, value) != value:
            raise UserError(f"--init {cfg.init} has {runs.flag(name)} {value}, not {given[name]}")
    most = model.cfg.context
    if given.get("context", 0) > most:
        made = f"--init {cfg.init}: its weights were made for at most {most} tokens"
        raise UserError(f"{made}, not for --context {given['context']}")
    usual = {"context": min(cfg.context, most), "recall": 0.0, "grow": 0.0, "lr": 1e-4}
    return model, dataclasses.replace(cfg, **{**usual, **own, **given})


def fits(cfg, device):
    """-> the parameters of a model; UserError if they, their gradients and AdamW's moments find no room."""
    with torch.device("meta"):  # counted without their memory
        size = sum(p.numel() for p in LM(cfg).parameters())
    need = 16 * size / 2**30
    room = runs.memory(device) / 2**30
    if need > room:
        what = f"{size / 1e9:.1f} billion parameters, their gradients and moments need {need:.0f} GiB"
        raise UserError(
            f"{what}, this {device.type} has {room:.0f}: a smaller --preset or --width needs less"
        )
    return size


# ------------------------------------------------------------------------------------------------------------
# 4) evaluation

# What a run with a preset's own settings reaches: bits per byte at most, recall beyond the window at least.
EXPECTED = {
    "small": {"gqa": (2.75, 0.9), "nsa": (2.65, 0.9), "asa": (2.7, 0.9)},
    "base": {"gqa": (0.95, 0.9), "nsa": (1.05, 0.9), "asa": (0.92, 0.9)},
}
# What may differ from a preset all the same.
FREE = "preset attn mtp micro device recompute out name eval_every save_every resume check".split()


@torch.no_grad()
def evaluate(model, data, amp):
    """Bits per byte of validation text, also by quarter of the context; share of recalled values."""
    cfg = data.cfg
    documents = min(64, max(16, 2**17 // cfg.context))  # of each kind
    rng = np.random.default_rng([cfg.seed, 2**31])  # the same documents at every evaluation
    docs = [data.crop("val", rng, cfg.context) for _ in range(documents)]  # of (T + 1,)
    made = [data.recall("val", rng, cfg.context, cfg.keys) for _ in range(documents)]
    docs += [doc for doc, _ in made]
    model.eval()
    nats = []  # of (b, T)
    right = []  # of (b, T)
    for i in range(0, len(docs), cfg.micro):
        rows = torch.from_numpy(np.stack(docs[i : i + cfg.micro])).to(model.embed.weight.device)  # (b, T + 1)
        with amp():
            logits = model(rows[:, :-1])  # (b, T, V)
        nats.append(F.cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], reduction="none").cpu())
        right.append((logits.argmax(-1) == rows[:, 1:]).cpu())
    model.train()
    hits = []  # of (distance, recalled or not)
    for row, (_, asked) in zip(torch.cat(right)[documents:], made):
        hits += [(distance, bool(row[a - 1 : b - 1].all())) for distance, a, b in asked]

    def share(low, high):
        """Of values told low < distance <= high tokens before -> (share recalled, their number)."""
        known = [ok for distance, ok in hits if low < distance <= high]
        return (sum(known) / len(known), len(known)) if known else None

    bits = torch.cat(nats)[:documents].mean(0) / math.log(2) / data.bytes_per_token  # (T,)
    edges = [0] + [2**k for k in range(4, 30) if 2**k < 2 * cfg.context]
    by_distance = {str(high): share(low, high) for low, high in zip(edges, edges[1:])}
    return {
        "bpb": bits.mean().item(),
        "bpb_by_position": [quarter.mean().item() for quarter in bits.chunk(4)],
        "recall_inside": share(0, cfg.window),
        "recall_beyond": share(cfg.window, math.inf),
        "recall_by_distance": {high: found for high, found in by_distance.items() if found},
    }


def percent(pair):
    return f"{pair[0]:.0%} of {pair[1]}" if pair else "none asked"


def count_caches(cfg):
    """Bytes per token of the cache of a full context, for each attention, of allocated bf16 tensors."""
    result = {}
    for attn in ATTENTION:
        with torch.device("meta"):  # weights are not needed
            model = LM(dataclasses.replace(cfg, attn=attn))
        cache = model.new_cache(1, cfg.context, dtype=torch.bfloat16, device="cpu")
        result[attn] = cache.nbytes / cfg.context
    return result


# ------------------------------------------------------------------------------------------------------------
# 5) training


class Objective(nn.Module):
    """What training minimises. Tokens x, targets y, weights w (B, T) -> loss, [cross entropy, draft loss].

    The module of mtp.py learns the model's own distribution beside it; the model gets no gradient from that.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y, w):
        model = self.model
        h = model.hidden(x)  # (B, T, C)
        logits = model.head(h).float()  # (B, T, V)
        loss = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")  # (B, T)
        draft = logits.new_zeros(())
        if model.mtp is not None:
            states = model.mtp.unroll(h, x, model.embed.weight, model.cfg.mtp)  # K of (B, T - k, C)
            p = logits.softmax(-1)  # (B, T, V)
            draft = mtp.soft_loss(states, model.head.weight, p, torch.ones_like(w))
        return (loss * w).mean() + draft, torch.stack([loss.mean(), draft]).detach()


def make_optimizer(cfg, model, fused):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=fused)


def learning_rate(cfg, step):
    """Linear warm-up over the first 5 % of the steps, then a cosine down to a tenth."""
    warm = max(1, cfg.steps // 20)
    if step < warm:
        return cfg.lr * (step + 1) / warm
    return cfg.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, cfg.steps - warm))))


def set_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def export(cfg):
    """Write a finished run for other programs -> the exit code."""
    model = load_run(pathlib.Path(cfg.out, cfg.name), module=False)
    save_pretrained(model, tokenizer(model.cfg.tokenizer), cfg.export)
    runs.say(f"written  {cfg.export}")
    return 0


def train(cfg, given):
    """One run, from its folder to its last line. Returns the exit code."""
    if cfg.export:
        return export(cfg)
    base, cfg = from_init(cfg, given) if cfg.init and not cfg.resume else (None, cfg)
    device = runs.pick_device(cfg)
    cuda = device.type == "cuda"
    half_precision = kernels.has_bf16(device)
    hardware = f"CPU, {torch.get_num_threads()} threads"
    if cuda:
        hardware = torch.cuda.get_device_name()
        torch.set_float32_matmul_precision("high")
    elif device.type == "mps":
        hardware = "Apple GPU, untested"
    hardware += ", bf16 autocast" if half_precision else ", fp32"
    rank, world = runs.processes(device)

    # 1) folder, data
    check = lambda cfg: validate(cfg, world)
    run, saved = runs.open_run(cfg, given, f"{cfg.preset}-{cfg.attn}", check, rank, world)
    cfg = run.cfg
    enc = tokenizer(cfg.tokenizer)
    cfg.vocab = cfg.vocab or enc.n_vocab
    size = fits(cfg, device)
    if not (saved and runs.shared(lambda: mapped(run.folder) is not None, rank, world)):
        runs.shared(lambda: prepare(cfg, enc, run.folder), rank, world)
    data = Data(cfg, enc, run.folder)
    info = data.info
    if saved and saved.get("data") != info["sha256"]:
        raise UserError(f"{run.folder}: trained on the data {saved.get('data')}, these are {info['sha256']}")

    # 2) model and optimizer, new or as they were
    torch.manual_seed(cfg.seed)
    model = LM(cfg).to(device)
    if base:
        model.load_state_dict(base.state_dict(), strict=False)  # a new module keeps its own first weights
    optimizer = make_optimizer(cfg, model, fused=cuda)
    if saved:
        runs.load_state(run.folder, model, saved["model"])
        runs.load_state(run.folder, optimizer, saved["optimizer"])
    amp = partial(torch.autocast, "cuda", torch.bfloat16, enabled=half_precision)
    runner = Objective(model)
    if world > 1:
        runner = nn.parallel.DistributedDataParallel(runner, device_ids=[device.index] if cuda else None)
    run.header(
        hardware,
        f"model    {cfg.attn}, {size / 1e6:.2f} M parameters, {cfg.layers} layers of width {cfg.width}",
        f"data     {info['texts']} texts, {info['train']} + {info['val']} tokens, sha256 {info['sha256']}",
        f"batch    {cfg.batch * cfg.context} tokens a step, in {world} process{'es' * (world > 1)}",
        **{"parameters": size, "data": info, "processes": world},
    )
    if info["replaced"]:
        run.say(f"note     in {info['replaced']} places the texts are not UTF-8: U+FFFD stands there now")
    if not cuda and cfg.preset != "small":
        run.say("note     without a GPU this preset takes very long; --small is made for a CPU")
    save = partial(run.save, model, optimizer, data=info["sha256"])
    if not saved:
        save()

    def test():
        found = evaluate(model, data, amp)
        run.check_finite(**{"loss of the evaluation": found["bpb"]})
        run.record(**found)
        inside, beyond = (percent(found[name]) for name in ("recall_inside", "recall_beyond"))
        recall = f"inside the window {inside}, beyond {beyond}"
        run.say(f"eval     step {run.step} | {found['bpb']:.3f} bits/byte | recall {recall}")
        return found

    # 3) training: a checkpoint is the last thing that a step does, so that a killed run loses nothing
    found = None
    trunk = [p for name, p in model.named_parameters() if not name.startswith("mtp.")]
    own = cfg.batch // world  # sequences of this process at the full context
    accumulate = own // min(cfg.micro, own)
    rows = data.batch(run.step, rank, world)
    run.catch_signals()
    while run.step < cfg.steps:
        start = time.perf_counter()
        lr = learning_rate(cfg, run.step)
        set_rate(optimizer, lr)
        sums = torch.zeros(2, device=device)  # cross entropy, draft loss
        for i, part in enumerate(zip(*(t.chunk(accumulate) for t in rows))):
            x, y, w = (t.to(device, non_blocking=True) for t in part)  # (b, T) each
            last = world == 1 or i == accumulate - 1  # processes exchange their gradients once
            with contextlib.nullcontext() if last else runner.no_sync(), amp():
                loss, parts = runner(x, y, w)
                (loss / accumulate).backward()
            sums += parts / accumulate
        norm = nn.utils.clip_grad_norm_(trunk, 1.0)
        draft_norm = norm.new_zeros(())
        if model.mtp is not None:  # clipped apart: the trunk's steps are the same with and without the module
            draft_norm = nn.utils.clip_grad_norm_(model.mtp.parameters(), 1.0)
        rows = data.batch(run.step + 1, rank, world)  # made while the GPU works
        seen = torch.stack([*sums, norm, draft_norm, norm.new_tensor(len(run.signals))])
        if world > 1:
            dist.all_reduce(seen)  # so that all processes stop at the same step
        loss, draft, norm, draft_norm, stopping = (seen / world).tolist()
        run.check_finite(
            loss=loss, gradient=norm, **{"draft loss": draft, "draft module's gradient": draft_norm}
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.advance(time.perf_counter() - start)

        log = {"loss": loss, "lr": lr, "norm": norm, "ms": 1e3 * run.timed[-1]}
        if cfg.mtp:
            log["draft_loss"] = draft
        run.record(**log, peak_gib=runs.peak_memory(device) / 2**30)
        if run.due(10) or len(run.timed) == 1:
            run.progress(f"loss {loss:.3f} | lr {lr:.1e} | norm {norm:.2f}", cfg.batch * cfg.context)
        found = test() if run.due(cfg.eval_every) and rank == 0 else None
        if stopping or run.due(cfg.save_every):
            save()
        if stopping:
            return run.stopped()

    # 4) evaluation
    return report(run, data, model, found or evaluate(model, data, amp)) if rank == 0 else 0


def verdict(cfg, enc, found):
    """What was expected of the run, and whether it came -> (a line, True or False; None if nothing was)."""
    limits = EXPECTED.get(cfg.preset, {}).get(cfg.attn)
    if limits is None or not runs.usual(cfg, PRESETS, FREE, vocab=enc.n_vocab):
        return "expected nothing in particular: no run with these options has been measured", None
    most, least = limits
    bits = found["bpb"]
    share = found["recall_beyond"][0] if found["recall_beyond"] else 0.0
    ok = bits <= most and share >= least
    return (
        f"expected at most {most:.2f} bits/byte and at least {least:.0%} recall beyond the window, "
        f"got {bits:.2f} and {share:.0%}: {'OK' if ok else 'NOT'}"
    ), ok


def report(run, data, model, found):
    """A sample, the figures that the run claims, counted and measured, what was expected -> exit code."""
    cfg = run.cfg
    prompt = torch.from_numpy(data.tokens["val"][:64].astype(np.int64))  # (64,)
    torch.manual_seed(cfg.seed)
    [(tokens, _)] = mtp.Decoder(model, 1, 256, temperature=0.8).generate([prompt], 192)
    drafts = []
    if cfg.mtp:
        decoder = mtp.Decoder(model, 8, 256, model.mtp, cfg.mtp, drafts=cfg.mtp)
        decoder.generate([prompt] * 8, 128)
        drafts = [f"  drafts            at temperature 1, 8 x 128 tokens: {decoder.summary()}"]
    caches = count_caches(cfg)
    shares = [f"{caches[cfg.attn] / size:.1%} of {name}" for name, size in caches.items() if name != cfg.attn]
    speed = cfg.batch * cfg.context / run.pace if run.pace else None
    rate = f"{speed:,.0f} tokens/s" if speed else "too few steps to tell"
    peak = runs.peak_memory(model.embed.weight.device)
    inside, beyond = (found[name] for name in ("recall_inside", "recall_beyond"))
    distances = ", ".join(f"{d}: {share:.0%}" for d, (share, _) in found["recall_by_distance"].items())
    line, ok = verdict(cfg, data.enc, found)
    return run.finished(
        f"\nsample   (the text before the bar was given)\n"
        f"{decoded(data.enc, prompt.tolist())}|{decoded(data.enc, tokens.tolist())}\n",
        f"result   {cfg.attn}, {cfg.steps} steps, {run.seconds:.0f} s of training",
        f"  bits per byte     {found['bpb']:.3f}; by quarter of the context "
        + " ".join(f"{quarter:.3f}" for quarter in found["bpb_by_position"]),
        f"  recall            inside the window {percent(inside)}, beyond it {percent(beyond)}",
        f"  by distance up to {distances}",
        f"  KV cache          bytes per token at {cfg.context} tokens, bf16, counted: "
        + ", ".join(f"{name} {size:.0f}" for name, size in caches.items()),
        f"                    {cfg.attn} is {', '.join(shares)}",
        f"  speed, memory     {rate}, {peak / 2**30:.2f} GiB at the peak",
        *drafts,
        line,
        **{"ok": ok, "tokens_per_second": speed, "peak_bytes": peak, "cache_bytes_per_token": caches},
        **found,
    )


# what runs.parse is told of this script
ABOUT = dict(config=Config, presets=PRESETS, script="train_lm.py", doc=__doc__)


def main(argv=None, work=train, **how):
    """Of these options, or of others -> exit code: runs.main."""
    return runs.main(argv, work, **{**ABOUT, **how})


if __name__ == "__main__":
    sys.exit(main())
