"""Pretraining: one Transformer for --attn gqa | nsa | asa, its data, its loop, its evaluation.

    python train_lm.py --small                    an ASA model of 1 M parameters on a CPU, offline, 2 minutes
    python train_lm.py                            30 M parameters, 4k context, one GPU, a few minutes
    python train_lm.py --preset 340m --data a.txt b.txt
    torchrun --nproc_per_node=2 train_lm.py ...   the same run on 2 GPUs (or CPU processes): same batches, same losses
    python train_lm.py --resume --name NAME       go on with out/NAME

    1) data       texts -> tokens on disk, memory mapped; split by file; some documents get key=value pairs to recall
    2) model      RMSNorm, attention, SwiGLU; with gqa exactly a Llama-type model
    3) training   AdamW, warm-up and cosine, bf16 on a GPU, accumulation, clipping; resumable at every checkpoint
    4) evaluation bits per byte, also by position in the context; recall accuracy by distance; bytes of the cache, counted

The batch of a step is a function of (seed, step, row) alone: that makes runs resumable, and equal on any number of processes.
Does NOT include: dropout, packing with masks between documents, tensor parallelism.
Read first: latent_attention.py, nsa.py. Letters as there; V vocabulary.
"""
import argparse
import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import resource
import signal
import sys
import sysconfig
import time
from dataclasses import dataclass, field

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


class UserError(Exception):
    """Something that the user can mend: printed as one line, exit code 2."""


def option(default, text):
    kind = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": text}, **kind)


@dataclass
class Config:
    preset: str = option("base", "small (CPU, 2 minutes), base, 340m or 1.3b: sets what is not given explicitly")
    attn: str = option("asa", "gqa (dense), nsa (three branches in every layer) or asa (local and global layers alternate)")
    # model
    layers: int = option(10, "Transformer blocks")
    width: int = option(512, "model width C")
    heads: int = option(8, "query heads H; the head width D is C / H")
    groups: int = option(2, "groups of heads G: key-value heads of gqa and nsa, latents of asa's global layers")
    ffn: int = option(0, "SwiGLU width; 0 = 8/3 C, rounded up to a multiple of 32")
    window: int = option(64, "tokens in the window of nsa and of asa's local layers, the query's own included")
    blocks: int = option(64, "blocks of 16 tokens in a list of asa's global layers")
    nsa_blocks: int = option(8, "blocks in a list of nsa: by default the tokens of asa's global layers, spread over all layers")
    nsa_block: int = option(64, "tokens in a selection block of nsa (compression: 32 tokens every 16)")
    vocab: int = option(0, "vocabulary; 0 = the tokenizer's")
    tied: bool = option(False, "the output matrix is the embedding")
    rope_base: float = option(10000.0, "base of the rotary frequencies")
    norm_eps: float = option(1e-6, "epsilon of RMSNorm")
    mtp: int = option(0, "depths K of a multi-token prediction module, trained beside the model (mtp.py); 0 = none")
    # data
    data: list = option([], "text files to train on (default: Python's own help texts for small, its library's sources otherwise)")
    tokenizer: str = option("bytes", "bytes, or an encoding that tiktoken knows by name (it may download it)")
    recall: float = option(0.5, "share of the documents that get key=value pairs to recall")
    keys: int = option(1, "pairs in a section of such a document: 1 to this many in training, this many in evaluation")
    # training
    context: int = option(4096, "tokens per sequence T")
    batch: int = option(8, "sequences per step, over all processes")
    micro: int = option(8, "sequences per forward pass and process: lower it when memory runs out")
    grow: float = option(0.6, "share of the steps in which sequences grow from 256 tokens to the context, as many tokens a step")
    steps: int = option(1000, "optimizer steps")
    lr: float = option(1e-3, "highest learning rate; warm-up over the first 5 %% of the steps, cosine to a tenth")
    seed: int = option(0, "seeds weights, batches and samples")
    device: str = option("auto", "auto, cpu or cuda")
    compile: bool = option(False, "torch.compile the model")
    recompute: bool = option(False, "keep only the blocks' inputs and recompute the rest in the backward pass: less memory, a third slower")
    # run
    out: str = option("out", "folder of all runs")
    name: str = option("", "the run's folder in it (default: PRESET-ATTN, numbered when taken)")
    eval_every: int = option(150, "steps between evaluations")
    save_every: int = option(150, "steps between checkpoints")
    resume: bool = option(False, "continue --name, or the latest run of this preset and attention")
    check: bool = option(False, "exit with 1 if the model did not learn as expected")

    @property
    def head_width(self):
        return self.width // self.heads

    @property
    def rotary(self):
        """P = D / 2, as in MLA."""
        return self.head_width // 2

    @property
    def rank(self):
        """R of a global layer, so that G R + P = 2 G D: as wide as the keys and values that it replaces. Ours (GLA: 2 D)."""
        return 2 * self.head_width - self.rotary // self.groups


PRESETS = {
    "small": dict(layers=4, width=128, heads=4, groups=2, window=16, blocks=8, nsa_blocks=4, nsa_block=32, recall=0.8,
                  context=256, batch=8, micro=8, steps=400, lr=3e-3),
    "base": dict(),
    "340m": dict(layers=24, width=1024, heads=16, groups=4, window=512, blocks=128, nsa_blocks=16,
                 context=8192, batch=32, micro=2, steps=20000, lr=3e-4, recompute=True),
    "1.3b": dict(layers=24, width=2048, heads=16, groups=4, window=512, blocks=128, nsa_blocks=16,
                 context=8192, batch=64, micro=1, steps=50000, lr=2e-4, recompute=True),
}
ANSWER_WEIGHT = 10  # in the loss, of an answer in a recall document: unweighted, 1 token in 50 teaches recall, and slowly
# what a resumed run cannot change
FIXED = "data attn layers width heads groups ffn window blocks nsa_blocks nsa_block vocab tied rope_base norm_eps mtp tokenizer".split()


# ---------------------------------------------------------------------------------------------------------------------------------
# 2) model


class Cache:
    """The caches of all layers, and how many tokens each row has seen (B,): the position of its next token."""

    def __init__(self, layers, batch, max_len, device, evicts=False):
        self.layers, self.max_len, self.seen = layers, max_len, torch.zeros(batch, dtype=torch.long, device=device)
        # Positions of equally shaped parts lie in one tensor, so that taking back drafts is one operation for all layers.
        shapes = {}
        for part in (part for layer in layers for part in layer.values()):
            shapes.setdefault(part.pos.shape, []).append(part)
        self.stacks = []
        for parts in shapes.values():
            pos, length = torch.stack([p.pos for p in parts]), torch.stack([p.length for p in parts])  # (layers, B, heads, S), (layers, B)
            for i, part in enumerate(parts):
                part.pos, part.length = pos[i], length[i]
            self.stacks.append((pos, length))
        self.used = layers[0]["tokens"].length if evicts else self.seen  # (B,) of max_len: slots where tokens are evicted, else tokens

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


def attention(cfg, layer):
    """The attention of one layer: the only place that knows the three kinds."""
    sizes = (cfg.width, cfg.heads)
    if cfg.attn == "gqa":
        return GQA(*sizes, cfg.groups, cfg.head_width, cfg.rope_base)
    if cfg.attn == "nsa":
        return NSA(*sizes, cfg.groups, cfg.head_width, cfg.window, cfg.nsa_blocks, block=cfg.nsa_block, base=cfg.rope_base)
    if layer % 2 == 0:  # ASA: the first layer is local
        return LatentAttention(*sizes, cfg.head_width, 1, 4 * cfg.head_width, cfg.rotary, cfg.window, cfg.rope_base, cfg.norm_eps)
    return ASAGlobal(*sizes, cfg.head_width, cfg.groups, cfg.rank, cfg.rotary, cfg.blocks, cfg.rope_base, cfg.norm_eps)


class Block(nn.Module):
    """x + Attention(norm x), then x + SwiGLU(norm x)."""

    def __init__(self, cfg, layer):
        super().__init__()
        ffn = cfg.ffn or -(-8 * cfg.width // 3 // 32) * 32
        self.attn_norm, self.attn = RMSNorm(cfg.width, cfg.norm_eps), attention(cfg, layer)
        self.ffn_norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.gate = nn.Linear(cfg.width, ffn, bias=False)
        self.up = nn.Linear(cfg.width, ffn, bias=False)
        self.down = nn.Linear(ffn, cfg.width, bias=False)

    def forward(self, x, pos, cache=None, count=None, source=None):  # x, source (B, T, C), pos (B or 1, T)
        x = x + self.attn(self.attn_norm(x), pos, cache, count, source if source is None else self.attn_norm(source))
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
        nn.init.normal_(self.embed.weight, std=0.5)  # not 0.02: tokens that stand out in the residual stream are recalled much sooner
        for block in self.blocks:  # torch's fan-in initialisation, except that what enters the residual stream starts small
            for out in (block.attn.out, block.down):
                with torch.no_grad():
                    out.weight.mul_((2 * cfg.layers) ** -0.5)
        if cfg.tied:
            self.embed.weight = self.head.weight
        self.mtp = mtp.MTP(Block(cfg, 0), cfg.width, cfg.norm_eps) if cfg.mtp else None  # last: the trunk's start is the same without

    def new_cache(self, batch, max_len, margin=8, dtype=torch.float32, device=None, compress=None):
        """A cache for `batch` rows of up to max_len tokens; at most `margin` tokens can be taken back at once.

        compress: a compressor (sparse_rl.py); then tokens get evicted, and max_len is what a row can hold at a time."""
        device = device or self.embed.weight.device
        layers = [b.attn.new_cache(batch, max_len, margin, dtype=dtype, device=device) for b in self.blocks]
        if compress:
            for layer, block in zip(layers, self.blocks):
                compress.extend(layer, block.attn.heads)
        return Cache(layers, batch, max_len, device, evicts=compress is not None)

    def hidden(self, tokens, cache=None, count=None):
        """tokens (B, T) -> (B, T, C) after the final norm. With a cache, the first count[b] (default: all) of T tokens are appended."""
        pos = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        if cache is not None:
            pos = cache.seen[:, None] + pos  # (B, T)
            count = torch.full_like(cache.seen, tokens.shape[1]) if count is None else count
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
    """What training minimises. tokens x, targets y, weights w (B, T) -> the loss, and [cross entropy, draft loss] to be logged.

    The module of mtp.py learns beside the model, towards the model's own distribution; the model gets no gradient from it.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y, w):
        model = self.model
        h = model.hidden(x)  # (B, T, C)
        logits = model.head(h).float()  # (B, T, V)
        loss = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")  # (B, T)
        total, draft = (loss * w).mean(), logits.new_zeros(())
        if model.mtp is not None:
            states = model.mtp.unroll(h, x, model.embed.weight, model.cfg.mtp)
            draft = mtp.soft_loss(states, model.head.weight, logits.softmax(-1), torch.ones_like(w))
        return total + draft, torch.stack([loss.mean(), draft]).detach()


@torch.no_grad()
def generate(model, prompt, length, temperature=0.8, generator=None):
    """Continue prompt (B, T) by `length` tokens -> (B, T + length), from the cache, one token a step."""
    cache = model.new_cache(prompt.shape[0], prompt.shape[1] + length)
    tokens, new = prompt, prompt
    for _ in range(length):
        logits = model(new, cache)[:, -1].float()  # (B, V)
        p = (logits / max(temperature, 1e-6)).softmax(-1)
        new = torch.multinomial(p, 1, generator=generator) if temperature else p.argmax(-1, keepdim=True)  # (B, 1)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens


# ---------------------------------------------------------------------------------------------------------------------------------
# 1) data


def tokenizer(name):
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:  # unknown name, no network, a torn download: tiktoken raises many kinds
        hint = "tiktoken downloads a named encoding once; offline, leave --tokenizer away"
        raise UserError(f"tokenizer {name!r}: {str(e).splitlines()[0][:120]} ({hint})") from e


def sources(cfg):
    """The texts: a list of (name, a function that opens it as a binary file). The order is the same on every computer."""
    if cfg.data:
        for f in cfg.data:
            if not os.path.isfile(f):
                raise UserError(f"--data {f}: no such file")
            if os.path.getsize(f) == 0:
                raise UserError(f"--data {f}: the file is empty")
        return [(f, lambda f=f: open(f, "rb")) for f in cfg.data]
    if cfg.preset == "small":
        import io
        import pydoc_data.topics as topics

        return [(k, lambda k=k: io.BytesIO(topics.topics[k].encode())) for k in sorted(topics.topics)]
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    return [(f, lambda f=f: open(root / f, "rb")) for f in files]


def prepare(cfg, enc, folder):
    """Tokenize into folder/train.bin and val.bin, a megabyte of text at a time, and describe them in folder/data.json.

    Every tenth text is for validation; of fewer than ten texts, the last tenth of each. The end-of-text token closes each text.
    """
    texts, digest = sources(cfg), hashlib.sha256()
    dtype = np.uint16 if enc.n_vocab <= 65536 else np.uint32
    size = dict.fromkeys(("train", "val", "train_bytes", "val_bytes"), 0)  # tokens and bytes
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for i, (_, opened) in enumerate(tqdm(texts, desc="tokenize", unit="text", disable=None, leave=False)):
            with opened() as f:
                total = f.seek(0, 2)
                f.seek(0)
                val_from = 0 if i % 10 == 9 else total if len(texts) >= 10 else total * 9 // 10  # the byte where validation begins
                while piece := f.read(1 << 20):
                    piece += b"" if piece.endswith(b"\n") else f.readline(1 << 20)  # cut at the end of a line
                    digest.update(piece)
                    cut = min(max(val_from - (f.tell() - len(piece)), 0), len(piece))
                    for part, out, text in (("train", train, piece[:cut]), ("val", val, piece[cut:])):
                        tokens = enc.encode_ordinary(text.decode("utf-8", errors="replace"))
                        tokens += [enc.eot_token] if text and f.tell() == total else []
                        np.array(tokens, dtype=dtype).tofile(out)
                        size[part] += len(tokens)
                        size[part + "_bytes"] += len(text)
    size.update(sha256=digest.hexdigest()[:8], dtype=np.dtype(dtype).name, texts=len(texts), tokenizer=cfg.tokenizer)
    (folder / "data.json").write_text(json.dumps(size))


class Data:
    """Batches from the memory-mapped tokens, and recall documents made of them."""

    def __init__(self, cfg, enc, folder):
        self.cfg, self.enc = cfg, enc
        self.info = json.loads((folder / "data.json").read_text())
        for part in ("train", "val"):
            if self.info[part] < cfg.context + 2:
                raise UserError(f"the {part} part of the data has {self.info[part]} tokens, --context {cfg.context} needs "
                                f"{cfg.context + 2} or more: give more text or a shorter --context")
        self.tokens = {part: np.memmap(folder / f"{part}.bin", self.info["dtype"], "r") for part in ("train", "val")}
        self.bytes_per_token = self.info["val_bytes"] / self.info["val"]

    def crop(self, part, rng, T):
        start = rng.integers(len(self.tokens[part]) - T - 1)
        return self.tokens[part][start : start + T + 1].astype(np.int64)  # (T + 1,)

    def recall(self, part, rng, T, keys=None):
        """A crop with statements like <qz=H> strewn in, told again and again: sections of any length, each with pairs of its own.

        When a key comes back, only a look at where it was told before gives its value; guessing is right 1 time in 26. Worked example,
        2 keys: `...<qz=H>...<ab=C>...<qz=H>...<qz=H>...<ab=C>...`: the 3rd, 4th and 5th can be known.
        keys  pairs in one section as long as the document (evaluation); None: short and long, easy and hard sections (training): a
              long document with many pairs alone teaches nothing for a long time.
        -> tokens (T + 1,), and a list of (tokens back to where it was last told, where the value begins, where it ends).
        """
        text, doc, asked = self.crop(part, rng, T).tolist(), [], []
        between = lambda low, high: float(np.exp(rng.uniform(math.log(low), math.log(high))))  # log-uniform
        letters = lambda first, n: "".join(map(chr, first + rng.integers(26, size=n)))
        while len(doc) <= T:
            length = T + 1 if keys else between(64, T)
            stop = min(len(doc) + length, T + 1)  # the section's end
            pairs = [(letters(ord("a"), 2), letters(ord("A"), 1)) for _ in range(keys or int(between(1, self.cfg.keys + 1)))]
            pairs = {key: [self.enc.encode_ordinary(s) for s in (f"<{key}=", value, ">")] for key, value in pairs}
            gap, told = between(4, length / 4), {}  # tokens of text between statements: dense and sparse sections
            while len(doc) < stop:
                doc += text[len(doc) : len(doc) + int(gap * rng.uniform(0.5, 1.5))]
                key = list(pairs)[rng.integers(len(pairs))]
                lead, value, end = pairs[key]
                begin = len(doc) + len(lead)
                if key in told and begin + len(value) <= T + 1:
                    asked.append((len(doc) - told[key], begin, begin + len(value)))
                told[key] = len(doc)
                doc += lead + value + end
        return np.array(doc[: T + 1]), asked

    def length(self, step):
        """T of a step: 256 tokens or a little more at first, doubled at equal distances until it is the context (after `grow` of the
        steps). What to look back for is learned among few tokens in few steps, and then kept; among 4096 it is not learned."""
        lengths = [self.cfg.context]
        while lengths[0] >= 512 and lengths[0] % 128 == 0:
            lengths.insert(0, lengths[0] // 2)
        growing = self.cfg.grow * self.cfg.steps  # steps
        return lengths[int((len(lengths) - 1) * step / growing)] if step < growing else self.cfg.context

    def batch(self, step, rank=0, world=1):
        """The rows of a step that belong to one of `world` processes: inputs, targets, weights of the targets (N / world, T) each,
        where N T = batch x context at every length T."""
        T, rows, weights = self.length(step), [], []
        for row in range(rank, self.cfg.batch * self.cfg.context // T, world):
            rng, weight = np.random.default_rng([self.cfg.seed, step, row]), np.ones(T, np.float32)
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


# ---------------------------------------------------------------------------------------------------------------------------------
# 4) evaluation


@torch.no_grad()
def evaluate(model, data, device, amp):
    """-> {"bpb", "bpb_by_position": 4 quarters of the context, "recall": {"<= W", "> W", and by distance}} on validation text."""
    cfg = data.cfg
    documents = min(64, max(16, 2**17 // cfg.context))  # of each kind
    model.eval()
    rng = np.random.default_rng([cfg.seed, 2**31])  # the same documents at every evaluation
    plain = np.stack([data.crop("val", rng, cfg.context) for _ in range(documents)])  # (documents, T + 1)
    made = [data.recall("val", rng, cfg.context, cfg.keys) for _ in range(documents)]
    nats, hits = [], []
    for i in range(0, documents, cfg.micro):
        rows = torch.from_numpy(plain[i : i + cfg.micro]).to(device)
        with amp():
            logits = model(rows[:, :-1])  # (b, T, V)
        nats.append(F.cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], reduction="none").cpu())  # (b, T)
        rows = torch.from_numpy(np.stack([doc for doc, _ in made[i : i + cfg.micro]])).to(device)
        with amp():
            right = (model(rows[:, :-1]).argmax(-1) == rows[:, 1:]).cpu()  # (b, T)
        hits += [(d, bool(right[r, a - 1 : b - 1].all())) for r, (_, asked) in enumerate(made[i : i + cfg.micro]) for d, a, b in asked]
    model.train()
    bits = torch.cat(nats).mean(0) / math.log(2) / data.bytes_per_token  # (T,)
    share = lambda known: (sum(known) / len(known), len(known)) if known else None
    by_distance, low = {}, 0
    for high in [2**k for k in range(4, 30) if 2**k < 2 * cfg.context]:
        if found := share([ok for d, ok in hits if low < d <= high]):
            by_distance[str(high)] = found
        low = high
    return {
        "bpb": bits.mean().item(),
        "bpb_by_position": [q.mean().item() for q in bits.chunk(4)],
        "recall_inside": share([ok for d, ok in hits if d <= cfg.window]),
        "recall_beyond": share([ok for d, ok in hits if d > cfg.window]),
        "recall_by_distance": by_distance,
    }


def count_caches(cfg):
    """Bytes per token of the cache of one full context, for the three kinds at the same widths, from allocated bf16 tensors."""
    result = {}
    for attn in ("gqa", "nsa", "asa"):
        with torch.device("meta"):  # weights are not needed
            model = LM(dataclasses.replace(cfg, attn=attn))
        result[attn] = model.new_cache(1, cfg.context, dtype=torch.bfloat16, device="cpu").nbytes / cfg.context
    return result


# What a run with a preset's own settings reaches: bits per byte at most, recall beyond the window at least.
EXPECTED = {
    ("small", "gqa"): (2.75, 0.9),
    ("small", "nsa"): (2.65, 0.9),
    ("small", "asa"): (2.7, 0.9),
    ("base", "gqa"): (0.95, 0.9),
    ("base", "nsa"): (1.05, 0.9),
    ("base", "asa"): (0.92, 0.9),
}


# ---------------------------------------------------------------------------------------------------------------------------------
# 3) training


def save_checkpoint(path, state):
    """Write to a temporary name, flush to the disk, rename: at any moment the path holds a whole checkpoint, old or new."""
    try:
        with open(f"{path}.tmp", "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path}: {str(e).splitlines()[0]}; the checkpoint before is untouched") from e


def load_checkpoint(path, device="cpu"):
    """-> the saved dict; UserError if there is none or it is torn."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no checkpoint")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # a torn file raises many kinds
        raise UserError(f"{path}: not a readable checkpoint ({type(e).__name__})") from e


def load_run(folder, device="cpu", module=True):
    """A finished or interrupted run -> (model in eval mode, its config, where its data lies); with the module of `mtp.py --equip`, if any."""
    folder = pathlib.Path(folder)
    saved = load_checkpoint(folder / "ckpt.pt", device)
    state, cfg = saved["model"], Config(**saved["config"])
    if module and (folder / "mtp.pt").exists():
        extra = load_checkpoint(folder / "mtp.pt", device)
        if extra["step"] != saved["step"]:
            raise UserError(f"{folder / 'mtp.pt'} was made for step {extra['step']}, the run is at step {saved['step']}: equip it again")
        cfg.mtp = extra["depths"]
        state.update({f"mtp.{k}": v for k, v in extra["module"].items()})
    model = LM(cfg).to(device)
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise UserError(f"{folder}: the checkpoint is of another shape ({str(e).splitlines()[0]})") from e
    return model.eval(), cfg, folder


def half(model):
    """A copy of a model for decoding: bf16 on a GPU, as it is on a CPU."""
    return copy.deepcopy(model).bfloat16() if next(model.parameters()).is_cuda else model


CHOICES = {"preset": list(PRESETS), "attn": ["gqa", "nsa", "asa"], "device": ["auto", "cpu", "cuda"]}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (python {self.prog} --help lists the options)")


def parse(argv, config=Config, presets=PRESETS, choices=CHOICES, script="train_lm.py", doc=__doc__):
    """Command line -> (config, the options that were given). Explicit options win over the preset. (Also train_rl.py's.)"""
    about = "\n\n".join(doc.split("\n\n")[:2])  # the title and the commands
    lines = [f"  {name:6} {', '.join(f'{k} {v}' for k, v in values.items()) or 'the defaults'}" for name, values in presets.items()]
    parser = Parser(prog=script, usage=f"python {script} [options]", description=about, epilog="presets:\n" + "\n".join(lines),
                    allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", dest="preset", action="store_const", const="small", default=argparse.SUPPRESS, help="= --preset small")
    for f in dataclasses.fields(config):
        text, flag = f.metadata["help"], "--" + f.name.replace("_", "-")
        if f.type in (bool, "bool"):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        elif f.name == "data":
            parser.add_argument(flag, nargs="+", metavar="FILE", default=argparse.SUPPRESS, help=text)
        else:
            kind = {"type": type(f.default), "choices": choices.get(f.name)}
            parser.add_argument(flag, **kind, default=argparse.SUPPRESS, help=f"{text} [{f.default}]")
    given = vars(parser.parse_args(argv))
    return config(**{**presets[given.get("preset", "base")], **given}), given


def validate(cfg, world):
    for name in "layers width heads groups window context batch micro keys".split():
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if cfg.steps < 0 or cfg.save_every < 1 or cfg.eval_every < 1:
        raise UserError("--steps must be at least 0, --save-every and --eval-every at least 1")
    if cfg.width % cfg.heads or cfg.heads % cfg.groups or cfg.head_width % 4:
        raise UserError(f"--heads {cfg.heads} must divide --width {cfg.width} into head widths divisible by 4, and "
                        f"--groups {cfg.groups} the heads")
    block = {"gqa": 1, "nsa": cfg.nsa_block, "asa": ASA_BLOCK}[cfg.attn]
    if cfg.context % block:
        raise UserError(f"--context {cfg.context} must be a multiple of {block}, the selection block of {cfg.attn}")
    if cfg.nsa_block < 32 or cfg.nsa_block % 16 or min(cfg.blocks, cfg.nsa_blocks) < 3:
        raise UserError("--nsa-block must be a multiple of 16, at least 32; --blocks and --nsa-blocks at least 3 (3 are forced)")
    if cfg.batch % world or cfg.batch // world % min(cfg.micro, cfg.batch // world):
        raise UserError(f"--batch {cfg.batch} must be a multiple of {world} processes x --micro {cfg.micro}")
    for name in ("recall", "grow"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise UserError(f"--{name} {getattr(cfg, name)} is a share, 0 to 1")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this computer has no GPU that torch can use; leave the option away for the CPU")


def run_folder(cfg, base):
    """-> the run's folder, created, by default out/`base`; never one that already holds a run, unless resuming."""
    names = [cfg.name] if cfg.name else [base] + [f"{base}-{i}" for i in range(2, 1000)]
    folders = [pathlib.Path(cfg.out, name) for name in names]
    if cfg.resume:
        taken = [f for f in folders if (f / "log.jsonl").exists()]
        if not taken:
            raise UserError(f"--resume: there is no run {folders[0]}")
        return taken[-1]
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "log.jsonl", "x"):
                return folder
        except FileExistsError:
            if not folder.is_dir():
                raise UserError(f"cannot write to {folder}: a file is in the way") from None
        except OSError as e:
            raise UserError(f"cannot write to {folder}: {e.strerror}") from e
    raise UserError(f"{folders[-1]} holds a run already: --resume continues it, another --name starts anew")


def peak_memory(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def learning_rate(cfg, step):
    warm = max(1, cfg.steps // 20)
    if step < warm:
        return cfg.lr * (step + 1) / warm
    return cfg.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, cfg.steps - warm))))


class Run:
    """A run's folder: log.jsonl, ckpt.pt, the tokenized data. Only rank 0 writes and prints."""

    def __init__(self, folder, rank):
        self.folder, self.rank, self.log = folder, rank, None

    def say(self, *lines):
        if self.rank == 0:
            tqdm.write("\n".join(lines))

    def open_log(self, step):
        """Continue the log behind `step`: what a killed run wrote after its last checkpoint, it will write again."""
        if self.rank == 0:
            path, kept = self.folder / "log.jsonl", []
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last line may be torn
                    kept += [line + "\n"] if json.loads(line)["step"] <= step else []
            (self.folder / "log.jsonl.tmp").write_text("".join(kept))
            os.replace(self.folder / "log.jsonl.tmp", path)
            self.log = open(path, "a")

    def record(self, **entry):
        if self.rank == 0:
            self.log.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in entry.items()}) + "\n")
            self.log.flush()


def open_run(cfg, given, rank, world):
    """Find or create the run's folder and its tokens -> (cfg, run, data, the checkpoint to resume from or None)."""
    folder = [run_folder(cfg, f"{cfg.preset}-{cfg.attn}") if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(folder)
    folder, saved = folder[0], None
    if cfg.resume:
        saved = load_checkpoint(folder / "ckpt.pt")
        for name in FIXED:
            if name in given and given[name] != saved["config"][name]:
                raise UserError(f"{folder}: the checkpoint has --{name.replace('_', '-')} {saved['config'][name]}, not {given[name]}")
        cfg = Config(**{**saved["config"], **given})
        validate(cfg, world)
    enc = tokenizer(cfg.tokenizer)
    cfg.vocab = cfg.vocab or enc.n_vocab
    if rank == 0 and not (saved and (folder / "data.json").exists()):
        prepare(cfg, enc, folder)
    if world > 1:
        dist.barrier()
    data = Data(cfg, enc, folder)
    if saved and saved["data"] != data.info["sha256"]:
        raise UserError(f"{folder}: the run was trained on data {saved['data']}, this is {data.info['sha256']}")
    return cfg, Run(folder, rank), data, saved


def make_optimizer(cfg, model, fused):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=fused)


def header(cfg, run, data, model, hardware, world, step):
    """What somebody needs to judge or repeat the run, on the screen and in the log."""
    default, info = Config(), data.info
    changed = {k: v for k, v in dataclasses.asdict(cfg).items() if v != getattr(default, k)}
    parameters = sum(p.numel() for p in model.parameters())
    run.say(
        f"run      {run.folder}{f', resumed at step {step}' if step else ''}",
        f"model    {cfg.attn}, {parameters / 1e6:.2f} M parameters, {cfg.layers} layers of width {cfg.width}",
        f"data     {info['texts']} texts, {info['train_bytes'] + info['val_bytes']} bytes, sha256 {info['sha256']}, "
        f"{info['train']} + {info['val']} tokens ({cfg.tokenizer})",
        f"options  {', '.join(f'{k} {v}' for k, v in changed.items()) or 'all defaults'}",
        f"on       {hardware}, {world} process{'es' * (world > 1)}, torch {torch.__version__}, "
        f"{cfg.batch * cfg.context} tokens a step",
    )
    if "CPU" in hardware and cfg.preset != "small":
        run.say("note     without a GPU this preset takes very long; --small is made for a CPU")
    run.record(step=step, parameters=parameters, data=info, hardware=hardware, processes=world, torch=torch.__version__, options=changed)


def train(cfg, given):
    """One run, from its folder to its last line. Returns the exit code."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    validate(cfg, world)
    cuda = cfg.device != "cpu" and torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")

    # 1) data
    cfg, run, data, saved = open_run(cfg, given, rank, world)

    # 2) model and optimizer, as they were or new
    torch.manual_seed(cfg.seed)
    model = LM(cfg).to(device)
    optimizer = make_optimizer(cfg, model, fused=cuda)
    step, seconds = 0, 0.0
    if saved:
        try:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError) as e:
            raise UserError(f"{run.folder / 'ckpt.pt'}: the checkpoint is of another shape ({str(e).splitlines()[0]})") from e
        step, seconds = saved["step"], saved["seconds"]
        torch.set_rng_state(saved["rng"])
    amp = (lambda: torch.autocast("cuda", torch.bfloat16)) if cuda else contextlib.nullcontext
    runner = Objective(model)
    runner = torch.compile(runner) if cfg.compile else runner
    if world > 1:
        runner = nn.parallel.DistributedDataParallel(runner, device_ids=[device.index] if cuda else None)

    def save():
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
            state.update(rng=torch.get_rng_state(), config=dataclasses.asdict(cfg), data=data.info["sha256"])
            save_checkpoint(run.folder / "ckpt.pt", state)

    def test():
        found = evaluate(model, data, device, amp)
        run.record(step=step, **found)
        run.say(f"eval     step {step} | {found['bpb']:.3f} bits/byte | recall inside the window "
                f"{percent(found['recall_inside'])}, beyond {percent(found['recall_beyond'])}")
        return found

    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    run.open_log(step)
    hardware = f"{torch.cuda.get_device_name()}, bf16 autocast" if cuda else f"CPU, {torch.get_num_threads()} threads, fp32"
    header(cfg, run, data, model, hardware, world, step)

    # 3) training
    trunk = [p for name, p in model.named_parameters() if not name.startswith("mtp.")]
    accumulate = cfg.batch // world // min(cfg.micro, cfg.batch // world)
    first, timed = step, []
    rows = data.batch(step, rank, world)
    bar = tqdm(total=cfg.steps, initial=step, disable=None if rank == 0 else True, unit="step", leave=False)
    while step < cfg.steps:
        start = time.time()
        lr = learning_rate(cfg, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros(2, device=device)  # cross entropy (unweighted), draft loss
        for i, part in enumerate(zip(*(t.chunk(accumulate) for t in rows))):
            x, y, w = (t.to(device, non_blocking=True) for t in part)  # (b, T) each
            with contextlib.nullcontext() if i == accumulate - 1 or world == 1 else runner.no_sync(), amp():
                loss, parts = runner(x, y, w)
                (loss / accumulate).backward()
            total += parts / accumulate
        norm = nn.utils.clip_grad_norm_(trunk, 1.0)
        if model.mtp is not None:  # clipped apart: the trunk's steps are the same with and without the module
            nn.utils.clip_grad_norm_(model.mtp.parameters(), 1.0)
        rows = data.batch(step + 1, rank, world)  # made while the GPU works
        state = torch.cat([total / world, torch.tensor([float(len(stop))], device=device)])
        if world > 1:
            dist.all_reduce(state)  # so that all processes stop at the same step
        total, draft, stopping = state.tolist()
        if not math.isfinite(total):
            run.say(f"stopped  the loss is {total} at step {step}: nothing saved since the last checkpoint in {run.folder}; "
                    "try a lower --lr")
            return 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        timed.append(time.time() - start)
        seconds += timed[-1]
        typical = float(np.mean(timed[3:][-50:] or timed))  # without the warm-up
        memory = peak_memory(device) / 2**30
        run.record(step=step, loss=total, **({"draft_loss": draft} if cfg.mtp else {}), lr=lr, norm=norm.item(), ms=1e3 * timed[-1], peak_gib=memory)
        bar.update()
        if step % 10 == 0 or step == cfg.steps or step == first + 1:
            run.say(f"step {step:5d}/{cfg.steps} | loss {total:.3f} | lr {lr:.1e} | norm {norm:.2f} | {1e3 * typical:.0f} ms | "
                    f"{cfg.batch * cfg.context / typical / 1e3:.1f}k tok/s | eta {typical * (cfg.steps - step) / 60:.1f} min")
        if stopping or step % cfg.save_every == 0 or step == cfg.steps:
            save()
        if stopping:
            run.say(f"stopped  by a signal at step {step}, saved; --resume --name {run.folder.name} continues")
            return 128 + (stop[0] if stop else signal.SIGTERM)
        if step % cfg.eval_every == 0 and step < cfg.steps and rank == 0:
            test()
    bar.close()

    # 4) evaluation
    if rank > 0:
        return 0
    speed = cfg.batch * cfg.context / float(np.median(timed[3:] or timed or [math.inf]))
    return report(cfg, run, data, model, test(), device, speed, seconds)


def percent(pair):
    return f"{pair[0]:.0%} of {pair[1]}" if pair else "none asked"


def report(cfg, run, data, model, found, device, speed, seconds):
    """A sample, then the figures that the run claims, counted and measured; what was expected, OK or NOT. Returns the exit code."""
    prompt = torch.from_numpy(data.tokens["val"][:64].astype(np.int64))[None].to(device)  # (1, 64)
    tokens = generate(model, prompt, 192, generator=torch.Generator(device).manual_seed(cfg.seed))[0].tolist()
    caches, memory = count_caches(cfg), peak_memory(device)
    if cfg.mtp:
        decoder = mtp.Decoder(model, 8, 256, model.mtp, cfg.mtp, drafts=cfg.mtp)
        decoder.generate(list(prompt.expand(8, -1)), 128)
        run.say(f"drafts   at temperature 1, 8 x 128 tokens: {decoder.summary()}")
    bpb, recall = (3.0, 0.0) if cfg.data else EXPECTED.get((cfg.preset, cfg.attn), (3.0, 0.0))  # other text, other bits
    beyond = (found["recall_beyond"] or [0.0])[0]
    ok = found["bpb"] <= bpb and beyond >= recall
    run.say(
        f"\nsample   (the text before the bar was given)\n{data.enc.decode(tokens[:64])}|{data.enc.decode(tokens[64:])}\n",
        f"result   {cfg.attn}, {cfg.steps} steps, {seconds:.0f} s of training",
        f"  bits per byte     {found['bpb']:.3f}; by quarter of the context {' '.join(f'{b:.3f}' for b in found['bpb_by_position'])}",
        f"  recall            inside the window of {cfg.window} tokens {percent(found['recall_inside'])}, "
        f"beyond it {percent(found['recall_beyond'])}",
        "  by distance up to " + ", ".join(f"{d}: {share:.0%}" for d, (share, _) in found["recall_by_distance"].items()),
        f"  KV cache          bytes per token at {cfg.context} tokens, bf16, counted: "
        + ", ".join(f"{name} {size:.0f}" for name, size in caches.items())
        + f"; asa is {caches['asa'] / caches['nsa']:.1%} of nsa, {caches['asa'] / caches['gqa']:.1%} of gqa",
        f"  speed, memory     {speed:,.0f} tokens/s, {memory / 2**30:.2f} GiB at the peak",
        f"expected at most {bpb:.2f} bits/byte and at least {recall:.0%} recall beyond the window, "
        f"got {found['bpb']:.2f} and {beyond:.0%}: {'OK' if ok else 'NOT'}",
    )
    run.record(step=cfg.steps, final=True, tokens_per_second=speed, seconds=seconds, peak_bytes=memory,
               cache_bytes_per_token=caches, ok=ok, **found)
    return 1 if cfg.check and not ok else 0


def main(argv=None):
    try:
        return train(*parse(sys.argv[1:] if argv is None else argv))
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
