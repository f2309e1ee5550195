"""Pretraining: one Transformer for --attn gqa | nsa | asa, its data, its loop, its evaluation.

    python train_lm.py --small                    an ASA model of 1 M parameters on a CPU, offline, 2 minutes
    python train_lm.py                            30 M parameters, 4k context, one GPU, a few minutes
    python train_lm.py --preset 340m --data a.txt b.txt
    torchrun --nproc_per_node=2 train_lm.py ...   the same run, the same batches, on 2 GPUs or CPU processes
    python train_lm.py --resume --name NAME       go on with out/NAME

    1) options    what a run can be told, and what each option may be
    2) data       texts become tokens on disk; some documents get key=value pairs to recall
    3) model      RMSNorm, attention, SwiGLU; with gqa exactly a Llama-type model
    4) evaluation bits per byte, also by position; recall by distance; bytes of the cache, counted
    5) run        folder, log, checkpoint, signals: train_rl.py uses them too
    6) training   AdamW, warm-up and cosine, bf16 on a GPU, accumulation, clipping

The batch of a step depends on (seed, step, row) and the options of the data alone: runs can be resumed, on
any number of processes that divides the batch. Does NOT include: dropout, packing with masks between
documents, tensor parallelism. Read first: latent_attention.py, nsa.py. Letters as there; V vocabulary.
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import signal
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import mtp
from latent_attention import GQA, LatentAttention, RMSNorm, cache_bytes
from nsa import ASA_BLOCK, NSA, ASAGlobal

# ------------------------------------------------------------------------------------------------------------
# 1) options


class UserError(Exception):
    """Something that the user can mend: printed as one line, exit code 2."""


def build_gqa(cfg, layer):
    return GQA(cfg.width, cfg.heads, cfg.groups, cfg.head_width, cfg.rope_base)


def build_nsa(cfg, layer):
    sizes = (cfg.width, cfg.heads, cfg.groups, cfg.head_width, cfg.window, cfg.nsa_blocks)
    return NSA(*sizes, block=cfg.nsa_block, base=cfg.rope_base)


def build_asa(cfg, layer):
    """Local and global layers alternate; the first one is local: MLA with one latent."""
    sizes = (cfg.width, cfg.heads, cfg.head_width)
    if layer % 2 == 0:
        rank = 4 * cfg.head_width
        return LatentAttention(*sizes, 1, rank, cfg.rotary, cfg.window, cfg.rope_base, cfg.norm_eps)
    return ASAGlobal(*sizes, cfg.groups, cfg.rank, cfg.rotary, cfg.blocks, cfg.rope_base, cfg.norm_eps)


# How a layer is built; of what the context is a multiple; whether sparse_rl.py can evict from its cache.
ATTENTION = {
    "gqa": dict(build=build_gqa, block=lambda cfg: 1, evicts=True),
    "nsa": dict(build=build_nsa, block=lambda cfg: cfg.nsa_block, evicts=False),
    "asa": dict(build=build_asa, block=lambda cfg: ASA_BLOCK, evicts=False),
}
LARGE = dict(layers=24, heads=16, groups=4, window=512, blocks=128, nsa_blocks=16, context=8192)
PRESETS = {
    "small": dict(
        **dict(layers=4, width=128, heads=4, groups=2, window=16, blocks=8, nsa_blocks=4, nsa_block=32),
        **dict(recall=0.8, context=256, batch=8, micro=8, steps=400, lr=3e-3),
    ),
    "base": dict(),
    "340m": dict(**LARGE, width=1024, batch=32, micro=2, steps=20000, lr=3e-4, recompute=True),
    "1.3b": dict(**LARGE, width=2048, batch=64, micro=1, steps=50000, lr=2e-4, recompute=True),
}
DEVICES = ("auto", "cpu", "cuda")


def option(default, text, group=None, least=-math.inf, most=math.inf, choices=None, fixed=False):
    """A field of a Config. group: it begins a group of --help; fixed: a resumed run cannot change it."""
    allowed = f"at least {least}" if most == math.inf else f"{least} to {most}"
    text += f" ({allowed})" if least > -math.inf else ""
    limits = {"least": least, "most": most, "allowed": allowed}
    facts = {"help": text, "group": group, "choices": choices, "fixed": fixed, **limits}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=facts)
    return field(default=default, metadata=facts)


@dataclass
class Config:
    preset: str = option("base", "sets what is not given: small takes 2 minutes on a CPU", choices=PRESETS)
    attn: str = option(
        "asa",
        "gqa: dense, nsa: three branches, asa: local, global",
        group="model",
        choices=ATTENTION,
        fixed=True,
    )
    layers: int = option(10, "Transformer blocks", least=1, fixed=True)
    width: int = option(512, "model width C", least=1, fixed=True)
    heads: int = option(8, "query heads H; the head width D is C / H", least=1, fixed=True)
    groups: int = option(2, "key-value heads G of gqa and nsa, latents of asa", least=1, fixed=True)
    ffn: int = option(0, "SwiGLU width; 0 = 8/3 C, rounded up to a multiple of 32", least=0, fixed=True)
    window: int = option(64, "tokens in the window of nsa and of asa's local layers", least=1, fixed=True)
    blocks: int = option(64, "blocks of 16 tokens in a list of asa's global layers", least=3, fixed=True)
    nsa_blocks: int = option(
        8, "blocks in a list of nsa; asa's lists are in half its layers", least=3, fixed=True
    )
    nsa_block: int = option(64, "tokens in a block of nsa, a multiple of 16", least=32, fixed=True)
    vocab: int = option(0, "vocabulary; 0 = the tokenizer's", least=0, fixed=True)
    tied: bool = option(False, "the output matrix is the embedding", fixed=True)
    rope_base: float = option(10000.0, "base of the rotary frequencies", least=1, fixed=True)
    norm_eps: float = option(1e-6, "epsilon of RMSNorm", least=0, fixed=True)
    mtp: int = option(0, "depths K of a draft module beside the model (mtp.py)", least=0, fixed=True)
    data: list = option([], "text files (default: what comes with Python)", group="data", fixed=True)
    tokenizer: str = option("bytes", "bytes, or an encoding's name: tiktoken may download it", fixed=True)
    recall: float = option(0.5, "share of documents with key=value pairs to recall", least=0, most=1)
    keys: int = option(1, "pairs in a section of such a document, at most (evaluation: exactly)", least=1)
    context: int = option(4096, "tokens per sequence T", group="training", least=1)
    batch: int = option(8, "sequences of the full context per step, over all processes", least=1)
    micro: int = option(8, "of them per forward pass and process: lower it when memory runs out", least=1)
    grow: float = option(0.6, "share of the steps in which T grows from 256 to the context", least=0, most=1)
    steps: int = option(1000, "optimizer steps", least=0)
    lr: float = option(1e-3, "highest learning rate; warm-up, then cosine to a tenth", least=0)
    seed: int = option(0, "seeds weights, batches and samples", least=0)
    device: str = option("auto", "auto: a GPU where there is one", choices=DEVICES)
    compile: bool = option(False, "torch.compile the model")
    recompute: bool = option(False, "keep less for the backward pass: less memory, a third slower")
    out: str = option("out", "folder of all runs", group="run")
    name: str = option("", "the run's folder in it (default: PRESET-ATTN, numbered when taken)")
    eval_every: int = option(150, "steps between evaluations", least=1)
    save_every: int = option(150, "steps between checkpoints", least=1)
    resume: bool = option(False, "continue --name, or the latest run of this preset and attention")
    check: bool = option(False, "exit with 1 if the model did not learn as expected")

    @property
    def head_width(self):
        return self.width // self.heads

    @property
    def rotary(self):
        return self.head_width // 2  # P, as in MLA

    @property
    def rank(self):
        """R of a global layer: G R + P = 2 G D, as wide as the keys and values that it replaces. Ours."""
        return 2 * self.head_width - self.rotary // self.groups


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (python {self.prog} --help lists the options)")


def flag(name):
    return "--" + name.replace("_", "-")


def listed(values):
    return ", ".join(f"{name} {value}" for name, value in values.items())


def parse(argv, config=Config, presets=PRESETS, script="train_lm.py", doc=__doc__):
    """Command line -> (config, the options that were given). Explicit options win over the preset."""
    lines = [f"  {name:6} {listed(values) or 'the defaults'}" for name, values in presets.items()]
    parser = Parser(
        prog=script,
        usage=f"python {script} [options]",
        description="\n\n".join(doc.split("\n\n")[:2]),  # the title and the commands
        epilog="\n".join(["presets:", *lines]),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    small = {"action": "store_const", "const": "small", "help": "= --preset small"}
    parser.add_argument("--small", dest="preset", **small)
    group = parser
    kinds = {bool: {"action": argparse.BooleanOptionalAction}, list: {"nargs": "+"}}
    for f in dataclasses.fields(config):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        kind = kinds.get(f.type, {"type": f.type, "choices": f.metadata["choices"]})
        default = "" if f.type in kinds else f" [{f.default}]"
        group.add_argument(flag(f.name), **kind, help=f.metadata["help"] + default)
    given = vars(parser.parse_args(argv))
    return config(**{**presets[given.get("preset", "base")], **given}), given


def check_options(cfg):
    """UserError where an option is not what its definition allows, or heads do not fit the model."""
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if f.type in (int, float):
            if not (f.metadata["least"] <= value <= f.metadata["most"] and math.isfinite(value)):
                raise UserError(f"{flag(f.name)} must be {f.metadata['allowed']}, not {value}")
    if cfg.width % cfg.heads or cfg.heads % cfg.groups or cfg.width // cfg.heads % 4:
        parts = f"--heads {cfg.heads} must divide --width {cfg.width} into head widths divisible by 4"
        raise UserError(f"{parts}, and --groups {cfg.groups} the heads")


def validate(cfg, world=1):
    """UserError for options that do not fit together."""
    check_options(cfg)
    block = ATTENTION[cfg.attn]["block"](cfg)
    if cfg.context % block:
        raise UserError(f"--context {cfg.context} must be a multiple of {block}, the block of {cfg.attn}")
    if cfg.nsa_block % 16:
        raise UserError(f"--nsa-block {cfg.nsa_block} must be a multiple of 16")
    if cfg.batch % world or cfg.batch // world % min(cfg.micro, cfg.batch // world):
        raise UserError(f"--batch {cfg.batch} must be a multiple of {world} processes x --micro {cfg.micro}")


# ------------------------------------------------------------------------------------------------------------
# 2) data

ANSWER_WEIGHT = 10  # of a recalled value in the loss: with 1, one token in 50 teaches recall, slowly


def tokenizer(name):
    """-> a tiktoken.Encoding; "bytes" is made here. UserError where tiktoken has no other of that name."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        special = {"<|endoftext|>": 256}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special)
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:  # unknown name, no network, a torn download: tiktoken raises many kinds
        hint = "tiktoken downloads a named encoding once; offline, leave --tokenizer away"
        raise UserError(f"tokenizer {name!r}: {str(e).splitlines()[0][:120]} ({hint})") from e


def sources(cfg):
    """The texts: a list of (name, a function that opens it), in the same order on every computer."""
    for name in cfg.data:
        if not os.path.isfile(name):
            raise UserError(f"--data {name}: no such file")
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


def prepare(cfg, enc, folder):
    """Tokenize into folder/train.bin and val.bin, and describe them in folder/data.json.

    Every tenth text is for validation; of fewer than ten texts, the last tenth of each. The end-of-text token
    closes each text.
    """
    texts = sources(cfg)
    digest = hashlib.sha256()
    dtype = np.uint16 if enc.n_vocab <= 65536 else np.uint32
    size = dict.fromkeys(("train", "val", "train_bytes", "val_bytes"), 0)  # tokens and bytes
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for i, (_, opened) in enumerate(tqdm(texts, desc="tokenize", unit="text", disable=None, leave=False)):
            tenths = 9 if len(texts) < 10 else 10 * (i % 10 < 9)  # of the text, for training
            with opened() as f:
                total = f.seek(0, 2)  # bytes
                f.seek(0)
                while piece := f.read(1 << 20):
                    piece += b"" if piece.endswith(b"\n") else f.readline(1 << 20)  # cut at the end of a line
                    digest.update(piece)
                    cut = min(max(total * tenths // 10 - (f.tell() - len(piece)), 0), len(piece))
                    for part, out, text in (("train", train, piece[:cut]), ("val", val, piece[cut:])):
                        tokens = enc.encode_ordinary(text.decode("utf-8", errors="replace"))
                        tokens += [enc.eot_token] if text and f.tell() == total else []
                        np.array(tokens, dtype=dtype).tofile(out)
                        size[part] += len(tokens)
                        size[part + "_bytes"] += len(text)
    about = dict(sha256=digest.hexdigest()[:8], dtype=np.dtype(dtype).name, texts=len(texts))
    (folder / "data.json").write_text(json.dumps({**size, **about, "tokenizer": cfg.tokenizer}))


class Data:
    """Batches from the memory-mapped tokens, and recall documents made of them."""

    def __init__(self, cfg, enc, folder):
        self.cfg = cfg
        self.enc = enc
        self.info = json.loads((folder / "data.json").read_text())
        self.bytes_per_token = self.info["val_bytes"] / self.info["val"]
        self.tokens = {}
        for part in ("train", "val"):
            if self.info[part] < cfg.context + 2:
                few = f"the {part} part of the data has {self.info[part]} tokens, --context {cfg.context}"
                raise UserError(f"{few} needs two more than that: give more text or a shorter --context")
            self.tokens[part] = np.memmap(folder / f"{part}.bin", self.info["dtype"], "r")

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
# 3) model


class Cache:
    """The caches of all layers, and how many tokens each row has seen, (B,): its next token's position."""

    def __init__(self, layers, batch, max_len, device, evicts=False):
        self.layers = layers
        self.max_len = max_len
        self.seen = torch.zeros(batch, dtype=torch.long, device=device)  # (B,)
        # Positions of equally shaped parts lie in one tensor: one operation takes back drafts in all layers.
        shapes = {}
        for part in (part for layer in layers for part in layer.values()):
            shapes.setdefault(part.pos.shape, []).append(part)
        self.stacks = []
        for parts in shapes.values():
            pos = torch.stack([part.pos for part in parts])  # (layers, B, heads, S)
            length = torch.stack([part.length for part in parts])  # (layers, B)
            self.stacks.append((pos, length))
            for i, part in enumerate(parts):
                part.pos = pos[i]
                part.length = length[i]
        # (B,) of max_len: filled slots where tokens are evicted, else tokens
        self.used = layers[0]["tokens"].length if evicts else self.seen

    def rollback(self, seen):
        """SlotCache.rollback of every layer: set every row back to its first seen[b] tokens, (B,)."""
        for pos, length in self.stacks:
            drop = pos >= seen[:, None, None]  # (layers, B, heads, S)
            length -= drop[:, :, 0].sum(-1)
            pos.masked_fill_(drop, -1)
        self.seen.clamp_(max=seen)  # not copy_: in a CUDA graph a copy costs more than a kernel

    @property
    def nbytes(self):
        return cache_bytes(self.layers)


class Block(nn.Module):
    """x + Attention(norm x), then x + SwiGLU(norm x)."""

    def __init__(self, cfg, layer):
        super().__init__()
        ffn = cfg.ffn or -(-8 * cfg.width // 3 // 32) * 32
        self.attn_norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.attn = ATTENTION[cfg.attn]["build"](cfg, layer)
        self.ffn_norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.gate = nn.Linear(cfg.width, ffn, bias=False)
        self.up = nn.Linear(cfg.width, ffn, bias=False)
        self.down = nn.Linear(ffn, cfg.width, bias=False)

    def forward(self, x, pos, cache=None, count=None, source=None):  # x, source (B, T, C), pos (B or 1, T)
        source = source if source is None else self.attn_norm(source)  # (B, T, C)
        x = x + self.attn(self.attn_norm(x), pos, cache, count, source)  # (B, T, C)
        y = self.ffn_norm(x)  # (B, T, C)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LM(nn.Module):
    """The language model. tokens (B, T) -> logits (B, T, V); `hidden` stops before the output matrix."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab, cfg.width)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.layers))
        self.norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.head = nn.Linear(cfg.width, cfg.vocab, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.normal_(self.embed.weight, std=0.5)  # tokens that stand out are recalled much sooner
        for block in self.blocks:  # torch's initialisation, but what enters the residual stream starts small
            for out in (block.attn.out, block.down):
                out.weight.data.mul_((2 * cfg.layers) ** -0.5)
        if cfg.tied:
            self.embed.weight = self.head.weight
        # The module comes last: with it the trunk starts from the same weights.
        self.mtp = mtp.MTP(Block(cfg, 0), cfg.width, cfg.norm_eps) if cfg.mtp else None

    def new_cache(self, batch, max_len, margin=8, dtype=None, device=None, compress=None):
        """A cache for `batch` rows of up to max_len tokens, of which `margin` can be taken back at once.

        dtype, device: the model's by default. compress (sparse_rl.py) evicts, so that a row holds max_len.
        """
        dtype = dtype or self.embed.weight.dtype
        device = device or self.embed.weight.device
        layers = []
        for block in self.blocks:
            layers.append(block.attn.new_cache(batch, max_len, margin, dtype=dtype, device=device))
            if compress:
                compress.extend(layers[-1], block.attn.heads)
        return Cache(layers, batch, max_len, device, evicts=compress is not None)

    def hidden(self, tokens, cache=None, count=None):
        """tokens (B, T) -> (B, T, C) after the final norm. A cache takes count[b] of T tokens, or all."""
        pos = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        if cache is not None:
            pos = cache.seen[:, None] + pos  # (B, T)
            count = torch.full_like(cache.seen, tokens.shape[1]) if count is None else count  # (B,)
            torch._assert_async((cache.used + count <= cache.max_len).all(), "a row of the cache is full")
        x = self.embed(tokens)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            if self.cfg.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, pos, use_reentrant=False)
            else:
                x = block(x, pos, cache and cache.layers[i], count)
        if cache is not None:
            cache.seen += count
        return self.norm(x)

    def forward(self, tokens, cache=None, count=None):
        return self.head(self.hidden(tokens, cache, count))


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


def half(model):
    """A copy of a model for decoding: bf16 on a GPU, as it is on a CPU."""
    return copy.deepcopy(model).bfloat16() if next(model.parameters()).is_cuda else model


# ------------------------------------------------------------------------------------------------------------
# 4) evaluation

# What a run with a preset's own settings reaches: bits per byte at most, recall beyond the window at least.
EXPECTED = {
    "small": {"gqa": (2.75, 0.9), "nsa": (2.65, 0.9), "asa": (2.7, 0.9)},
    "base": {"gqa": (0.95, 0.9), "nsa": (1.05, 0.9), "asa": (0.92, 0.9)},
}


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


def peak_memory(device):
    """Bytes that torch had allocated on a GPU; on a CPU those that the process had (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":  # has no module `resource`
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------------------
# 5) run


def save_checkpoint(path, state):
    """Write another file, then rename it: the path always holds a whole checkpoint, old or new."""
    try:
        with open(f"{path}.tmp", "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        reason = str(e).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}; the checkpoint before is untouched") from e


def load_checkpoint(path, device="cpu"):
    """-> the saved dict; UserError if there is none or it is torn."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no checkpoint")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # a torn file raises many kinds
        raise UserError(f"{path}: not a readable checkpoint ({type(e).__name__})") from e


def load_state(folder, target, state):
    """target.load_state_dict(state); UserError if the run in `folder` has another shape."""
    try:
        target.load_state_dict(state)
    except (RuntimeError, ValueError) as e:
        raise UserError(f"{folder}: the checkpoint is of another shape ({str(e).splitlines()[0]})") from e


def load_run(folder, device="cpu", module=True):
    """A run -> (model in eval mode, config, where its data lies); module: with that of mtp.pt, if any."""
    folder = pathlib.Path(folder)
    saved = load_checkpoint(folder / "ckpt.pt", device)
    cfg = Config(**saved["config"])
    if module and (folder / "mtp.pt").exists():
        extra = load_checkpoint(folder / "mtp.pt", device)
        if extra["step"] != saved["step"]:
            made = f"{folder / 'mtp.pt'} was made for step {extra['step']}"
            raise UserError(f"{made}, the run is at step {saved['step']}: equip it again")
        cfg.mtp = extra["depths"]
        saved["model"].update({f"mtp.{name}": value for name, value in extra["module"].items()})
    model = LM(cfg).to(device)
    load_state(folder, model, saved["model"])
    return model.eval(), cfg, folder


def pick_device(cfg):
    """-> the torch.device of --device; under torchrun each process has a GPU of its own."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this computer has no GPU that torch can use; leave the option away")
    if cfg.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def run_folder(cfg, base):
    """-> out/NAME (default: `base`, numbered): a new folder, or with --resume the latest that holds a run."""
    names = [cfg.name] if cfg.name else [base, *(f"{base}-{i}" for i in range(2, 1000))]
    folders = [pathlib.Path(cfg.out, name) for name in names]
    taken = [folder for folder in folders if (folder / "log.jsonl").exists()]
    if cfg.resume:
        if not taken:
            raise UserError(f"--resume: there is no run {folders[0]}")
        return taken[-1]
    if taken == folders:
        raise UserError(f"{folders[-1]} holds a run already: --resume continues, another --name starts anew")
    folder = next(folder for folder in folders if folder not in taken)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").touch(exist_ok=False)
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror}") from e
    return folder


def open_run(cfg, given, base, validate, rank=0, world=1):
    """Begin a run, or go on with one -> (Run, its checkpoint or None); UserError if that cannot be.

    A resumed run keeps its options, except for those given now. `validate` comes before anything is written.
    """
    if not cfg.resume:
        validate(cfg)
        folder = [run_folder(cfg, base) if rank == 0 else None]
        if world > 1:
            dist.broadcast_object_list(folder)
        return Run(cfg, folder[0], rank), None
    folder = run_folder(cfg, base)
    saved = load_checkpoint(folder / "ckpt.pt")
    old = saved["config"]
    for f in dataclasses.fields(cfg):
        if f.metadata["fixed"] and given.get(f.name, old[f.name]) != old[f.name]:
            raise UserError(f"{folder}: the checkpoint has {flag(f.name)} {old[f.name]}, not {given[f.name]}")
    cfg = type(cfg)(**{**old, **given})
    validate(cfg)
    if cfg.steps < saved["step"]:
        raise UserError(f"{folder}: the checkpoint is at step {saved['step']}, beyond --steps {cfg.steps}")
    return Run(cfg, folder, rank, saved["step"], saved["seconds"]), saved


class Run:
    """A run's folder, how far it is, and whether a signal asks it to stop. Only rank 0 writes and prints."""

    def __init__(self, cfg, folder, rank=0, step=0, seconds=0.0):
        self.cfg = cfg
        self.folder = folder
        self.rank = rank
        self.step = step  # finished steps
        self.seconds = seconds  # of all of them
        self.timed = []  # seconds of each step of this process
        self.signals = []  # that ask it to stop

    def say(self, *lines):
        if self.rank == 0:
            tqdm.write("\n".join(lines))

    def record(self, **entry):
        """Write a line of the log."""
        if self.rank == 0:
            short = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in entry.items()}
            self.log.write(json.dumps({"step": self.step, **short}) + "\n")
            self.log.flush()

    def header(self, hardware, *lines, **facts):
        """What somebody needs to judge or repeat the run, on the screen and in the log.

        What a killed run logged after its last checkpoint comes again: it is cut off, with a torn last line.
        """
        if self.rank == 0:
            path = self.folder / "log.jsonl"
            old = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            new = self.folder / "log.jsonl.tmp"
            new.write_text("".join(line for line in old if json.loads(line)["step"] <= self.step))
            os.replace(new, path)
            self.log = open(path, "a")
        default = type(self.cfg)()
        options = {k: v for k, v in dataclasses.asdict(self.cfg).items() if v != getattr(default, k)}
        self.say(
            f"run      {self.folder}" + (f", resumed at step {self.step}" if self.step else ""),
            *lines,
            f"options  {listed(options) or 'all defaults'}",
            f"on       {hardware}, torch {torch.__version__}",
        )
        self.record(**facts, hardware=hardware, torch=torch.__version__, options=options)

    def catch_signals(self):
        """From here on a signal lets the step finish."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: self.signals.append(number))

    def advance(self, seconds):
        """A step is finished; it took so long."""
        self.step += 1
        self.seconds += seconds
        self.timed.append(seconds)

    def due(self, every):
        return self.step % every == 0 or self.step == self.cfg.steps

    @property
    def pace(self):
        """Seconds of a step, without the warm-up."""
        return float(np.mean(self.timed[3:][-50:] or self.timed))

    def progress(self, line):
        minutes = self.pace * (self.cfg.steps - self.step) / 60
        self.say(f"step {self.step:5d}/{self.cfg.steps} | {line} | eta {minutes:.1f} min")

    def save(self, **state):
        if self.rank == 0:
            own = {"step": self.step, "seconds": self.seconds, "config": dataclasses.asdict(self.cfg)}
            save_checkpoint(self.folder / "ckpt.pt", {**state, **own})

    # The last words of a run -> its exit code

    def diverged(self, loss):
        where = f"at step {self.step}: nothing saved since the last checkpoint in {self.folder}"
        self.say(f"stopped  the loss is {loss} {where}; try a lower --lr")
        return 1

    def stopped(self):
        name = self.folder.name
        self.say(f"stopped  by a signal at step {self.step}, saved; --resume --name {name} continues")
        return 128 + (self.signals or [signal.SIGTERM])[0]  # or another process got one

    def finished(self, *lines, ok, **facts):
        """ok: whether the result is what was expected; None: nothing was."""
        self.say(*lines)
        self.record(final=True, seconds=self.seconds, ok=ok, **facts)
        return 1 if self.cfg.check and ok is False else 0


# ------------------------------------------------------------------------------------------------------------
# 6) training


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


def train(cfg, given):
    """One run, from its folder to its last line. Returns the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = pick_device(cfg)
    cuda = device.type == "cuda"
    hardware = f"CPU, {torch.get_num_threads()} threads, fp32"
    if cuda:
        hardware = f"{torch.cuda.get_device_name()}, bf16 autocast"
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")

    # 1) folder, data
    base = f"{cfg.preset}-{cfg.attn}"
    run, saved = open_run(cfg, given, base, lambda cfg: validate(cfg, world), rank, world)
    cfg = run.cfg
    enc = tokenizer(cfg.tokenizer)
    cfg.vocab = cfg.vocab or enc.n_vocab
    if rank == 0 and not (saved and (run.folder / "data.json").exists()):
        prepare(cfg, enc, run.folder)
    if world > 1:
        dist.barrier()
    data = Data(cfg, enc, run.folder)
    info = data.info
    if saved and saved["data"] != info["sha256"]:
        raise UserError(f"{run.folder}: it was trained on data {saved['data']}, this is {info['sha256']}")

    # 2) model and optimizer, new or as they were
    torch.manual_seed(cfg.seed)
    model = LM(cfg).to(device)
    optimizer = make_optimizer(cfg, model, fused=cuda)
    if saved:
        load_state(run.folder, model, saved["model"])
        load_state(run.folder, optimizer, saved["optimizer"])
        torch.set_rng_state(saved["rng"])
    amp = partial(torch.autocast, "cuda", torch.bfloat16, enabled=cuda)
    runner = torch.compile(Objective(model)) if cfg.compile else Objective(model)
    if world > 1:
        runner = nn.parallel.DistributedDataParallel(runner, device_ids=[device.index] if cuda else None)
    size = sum(p.numel() for p in model.parameters())
    run.header(
        hardware,
        f"model    {cfg.attn}, {size / 1e6:.2f} M parameters, {cfg.layers} layers of width {cfg.width}",
        f"data     {info['texts']} texts, {info['train']} + {info['val']} tokens, sha256 {info['sha256']}",
        f"batch    {cfg.batch * cfg.context} tokens a step, in {world} process{'es' * (world > 1)}",
        **{"parameters": size, "data": info, "processes": world},
    )
    if not cuda and cfg.preset != "small":
        run.say("note     without a GPU this preset takes very long; --small is made for a CPU")

    def test():
        found = evaluate(model, data, amp)
        run.record(**found)
        inside, beyond = (percent(found[name]) for name in ("recall_inside", "recall_beyond"))
        recall = f"inside the window {inside}, beyond {beyond}"
        run.say(f"eval     step {run.step} | {found['bpb']:.3f} bits/byte | recall {recall}")
        return found

    # 3) training
    trunk = [p for name, p in model.named_parameters() if not name.startswith("mtp.")]
    own = cfg.batch // world  # sequences of this process at the full context
    accumulate = own // min(cfg.micro, own)
    rows = data.batch(run.step, rank, world)
    run.catch_signals()
    while run.step < cfg.steps:
        start = time.perf_counter()
        lr = learning_rate(cfg, run.step)
        set_rate(optimizer, lr)
        sums = torch.zeros(3, device=device)  # cross entropy, draft loss, signals to stop
        for i, part in enumerate(zip(*(t.chunk(accumulate) for t in rows))):
            x, y, w = (t.to(device, non_blocking=True) for t in part)  # (b, T) each
            last = world == 1 or i == accumulate - 1  # processes exchange their gradients once
            with contextlib.nullcontext() if last else runner.no_sync(), amp():
                loss, parts = runner(x, y, w)
                (loss / accumulate).backward()
            sums[:2] += parts / (accumulate * world)
        norm = nn.utils.clip_grad_norm_(trunk, 1.0)
        if model.mtp is not None:  # clipped apart: the trunk's steps are the same with and without the module
            nn.utils.clip_grad_norm_(model.mtp.parameters(), 1.0)
        rows = data.batch(run.step + 1, rank, world)  # made while the GPU works
        sums[2] = len(run.signals)
        if world > 1:
            dist.all_reduce(sums)  # so that all processes stop at the same step
        loss, draft, stopping = sums.tolist()
        if not math.isfinite(loss):
            return run.diverged(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.advance(time.perf_counter() - start)

        log = {"loss": loss, "lr": lr, "norm": norm.item(), "ms": 1e3 * run.timed[-1]}
        if cfg.mtp:
            log["draft_loss"] = draft
        run.record(**log, peak_gib=peak_memory(device) / 2**30)
        if run.due(10) or len(run.timed) == 1:
            speed = f"{1e3 * run.pace:.0f} ms | {cfg.batch * cfg.context / run.pace / 1e3:.1f}k tok/s"
            run.progress(f"loss {loss:.3f} | lr {lr:.1e} | norm {norm:.2f} | {speed}")
        if stopping or run.due(cfg.save_every):
            weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            run.save(**weights, rng=torch.get_rng_state(), data=info["sha256"])
        if stopping:
            return run.stopped()
        if run.step % cfg.eval_every == 0 and run.step < cfg.steps and rank == 0:
            test()

    # 4) evaluation
    return report(run, data, model, test()) if rank == 0 else 0


def report(run, data, model, found):
    """A sample, the figures that the run claims, counted and measured, what was expected -> exit code."""
    cfg = run.cfg
    prompt = torch.from_numpy(data.tokens["val"][:64].astype(np.int64))  # (64,)
    torch.manual_seed(cfg.seed)
    [(tokens, _)] = mtp.Decoder(model, 1, 256, temperature=0.8).generate([prompt], 192)
    if cfg.mtp:
        decoder = mtp.Decoder(model, 8, 256, model.mtp, cfg.mtp, drafts=cfg.mtp)
        decoder.generate([prompt] * 8, 128)
        run.say(f"drafts   at temperature 1, 8 x 128 tokens: {decoder.summary()}")
    caches = count_caches(cfg)
    shares = [f"{caches[cfg.attn] / size:.1%} of {name}" for name, size in caches.items() if name != cfg.attn]
    speed = cfg.batch * cfg.context / float(np.median(run.timed[3:] or run.timed or [math.inf]))
    memory = peak_memory(model.embed.weight.device)
    bits, inside, beyond = (found[name] for name in ("bpb", "recall_inside", "recall_beyond"))
    distances = ", ".join(f"{d}: {share:.0%}" for d, (share, _) in found["recall_by_distance"].items())
    limits = {} if cfg.data else EXPECTED.get(cfg.preset, {})
    most, least = limits.get(cfg.attn, (3.0, 0.0))  # other texts have other bits
    share = beyond[0] if beyond else 0.0
    ok = bits <= most and share >= least
    return run.finished(
        f"\nsample   (the text before the bar was given)\n"
        f"{data.enc.decode(prompt.tolist())}|{data.enc.decode(tokens.tolist())}\n",
        f"result   {cfg.attn}, {cfg.steps} steps, {run.seconds:.0f} s of training",
        f"  bits per byte     {bits:.3f}; by quarter of the context "
        + " ".join(f"{quarter:.3f}" for quarter in found["bpb_by_position"]),
        f"  recall            inside the window {percent(inside)}, beyond it {percent(beyond)}",
        f"  by distance up to {distances}",
        f"  KV cache          bytes per token at {cfg.context} tokens, bf16, counted: "
        + ", ".join(f"{name} {size:.0f}" for name, size in caches.items()),
        f"                    {cfg.attn} is {', '.join(shares)}",
        f"  speed, memory     {speed:,.0f} tokens/s, {memory / 2**30:.2f} GiB at the peak",
        f"expected at most {most:.2f} bits/byte and at least {least:.0%} recall beyond the window, "
        f"got {bits:.2f} and {share:.0%}: {'OK' if ok else 'NOT'}",
        **{"ok": ok, "tokens_per_second": speed, "peak_bytes": memory, "cache_bytes_per_token": caches},
        **found,
    )


def main(argv=None, work=train, **how):
    """Parse the command line (how: see parse), work -> exit code. train_rl.py begins here too."""
    try:
        return work(*parse(sys.argv[1:] if argv is None else argv, **how))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first step; later a signal saves first
        print("stopped  before the first step", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
