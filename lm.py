"""The language model: a Transformer whose attention is one of three.

    1) shape      how a layer of gqa, nsa or asa is built, and all sizes. With gqa it is a Llama-type model
    2) cache      the caches of all layers, and how far each row is
    3) model      RMSNorm, attention, SwiGLU; optionally the module of mtp.py that drafts

One forward pass serves training, prefill, decoding and verification: with a cache each row stands at its own
position. Does NOT include: dropout, masks between packed texts, tensor parallelism.
`python lm.py` compares the three. Read first: latent_attention.py, nsa.py. Letters as there; V vocabulary.
"""

import copy
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import kernels
import mtp
from latent_attention import GQA, LatentAttention, RMSNorm, SlotCache, add_norm, cache_bytes, joins, swiglu
from nsa import ASA_BLOCK, NSA, ASAGlobal
from runs import UserError, option

# ------------------------------------------------------------------------------------------------------------
# 1) shape


def build_gqa(cfg, layer):
    eps = cfg.norm_eps if cfg.qk_norm else None
    sizes = (cfg.width, cfg.heads, cfg.groups, cfg.head_width)
    return GQA(*sizes, cfg.rope_base, cfg.rope_factor, cfg.bias, eps)


def build_nsa(cfg, layer):
    sizes = (cfg.width, cfg.heads, cfg.groups, cfg.head_width, cfg.window, cfg.nsa_blocks)
    return NSA(*sizes, block=cfg.nsa_block, base=cfg.rope_base)


def build_asa(cfg, layer):
    """Local and global layers alternate; the first one is local: MLA with one latent."""
    sizes = (cfg.width, cfg.heads, cfg.head_width)
    if layer % 2 == 0:
        rank = 4 * cfg.head_width
        return LatentAttention(*sizes, 1, rank, cfg.rotary, cfg.window, cfg.rope_base, cfg.norm_eps)
    return ASAGlobal(
        *sizes, cfg.groups, cfg.latent_width, cfg.rotary, cfg.blocks, cfg.rope_base, cfg.norm_eps
    )


# How a layer is built; of what the context is a multiple; whether sparse_rl.py can evict from its cache.
ATTENTION = {
    "gqa": dict(build=build_gqa, block=lambda cfg: 1, evicts=True),
    "nsa": dict(build=build_nsa, block=lambda cfg: cfg.nsa_block, evicts=False),
    "asa": dict(build=build_asa, block=lambda cfg: ASA_BLOCK, evicts=False),
}


@dataclass
class Shape:
    """What a model is: sizes, the tokenizer it reads with, the longest text it is made for."""

    attn: str = option(
        "asa",
        "gqa: dense, nsa: three branches, asa: local, global",
        group="model",
        choices=ATTENTION,
        fixed=True,
    )
    layers: int = option(10, "Transformer blocks", least=1, most=512, fixed=True)
    width: int = option(512, "model width C", least=1, fixed=True)
    heads: int = option(8, "query heads H; the head width D is C / H", least=1, fixed=True)
    groups: int = option(2, "key-value heads G of gqa and nsa, latents of asa", least=1, fixed=True)
    rank: int = option(
        0, "width R of a latent of asa's global layers; 0 = the head width", least=0, fixed=True
    )
    ffn: int = option(0, "SwiGLU width; 0 = 8/3 C, rounded up to a multiple of 32", least=0, fixed=True)
    window: int = option(64, "tokens in the window of nsa and of asa's local layers", least=1, fixed=True)
    blocks: int = option(64, "blocks of 16 tokens in a list of asa's global layers", least=3, fixed=True)
    nsa_blocks: int = option(
        8, "blocks in a list of nsa; asa's lists are in half its layers", least=3, fixed=True
    )
    nsa_block: int = option(64, "tokens in a block of nsa, a multiple of 16", least=32, most=4096, fixed=True)
    vocab: int = option(0, "vocabulary; 0 = the tokenizer's", least=0, fixed=True)
    tied: bool = option(False, "the output matrix is the embedding", fixed=True)
    rope_base: float = option(10000.0, "base of the rotary frequencies", least=1, most=1e12, fixed=True)
    norm_eps: float = option(1e-6, "epsilon of RMSNorm", least=0, most=1, fixed=True)
    head: int = option(0, "head width D; 0 = C / H", least=0, fixed=True)
    rope_factor: float = option(
        1.0, "gqa: slow rotary frequencies, so much slower (Llama 3)", least=1, most=1000, fixed=True
    )
    bias: bool = option(False, "gqa: q, k and v have a bias (Qwen2)", fixed=True)
    qk_norm: bool = option(False, "gqa: queries and keys are normed (Qwen3)", fixed=True)
    mtp: int = option(0, "depths K of a draft module beside the model (mtp.py)", least=0, most=64, fixed=True)
    tokenizer: str = option(
        "bytes", "bytes, an encoding's name (tiktoken may download it), or a model's folder", fixed=True
    )
    context: int = option(4096, "tokens per sequence T", least=16, most=2**24)
    recompute: bool = option(False, "keep less for the backward pass: less memory, a third slower")

    @property
    def head_width(self):
        return self.head or self.width // self.heads

    @property
    def rotary(self):
        return self.head_width // 2  # P, as in MLA

    @property
    def latent_width(self):
        return self.rank or self.head_width  # R of a global layer. Ours: results/attention.md compares widths

    def upgrade(self, found):
        """Give what a checkpoint of an earlier version lacks its old meaning. found: {option: value}."""
        if "rank" not in found:  # before it could be chosen latents were wider
            self.rank = 2 * self.head_width - self.rotary // self.groups


def check_heads(cfg):
    head = getattr(cfg, "head", 0) or cfg.width / cfg.heads
    if cfg.heads % cfg.groups or head % 4:
        parts = f"--heads {cfg.heads} must divide --width {cfg.width} into head widths divisible by 4"
        raise UserError(f"{parts}, and --groups {cfg.groups} the heads")


# ------------------------------------------------------------------------------------------------------------
# 2) cache


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


# ------------------------------------------------------------------------------------------------------------
# 3) model


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


def half(model):
    """A model for decoding: a copy in bf16 where a GPU has it, else itself."""
    return copy.deepcopy(model).bfloat16() if kernels.has_bf16(model.embed.weight.device) else model


@torch.no_grad()
def main():
    """Three small models: their weights, their caches, and that a text read in pieces is the text."""
    torch.manual_seed(0)
    sizes = dict(layers=2, width=128, vocab=257, context=1024, window=64, blocks=8, nsa_blocks=4)
    x = torch.randint(257, (2, 40))  # (B, T)
    print("attention  parameters  KV bytes per token at 1024, bf16   whole text - 7 tokens at a time (fp64)")
    for attn in ATTENTION:
        model = LM(Shape(attn=attn, **sizes)).double()
        size = sum(p.numel() for p in model.parameters())
        kept = model.new_cache(1, 1024, dtype=torch.bfloat16).nbytes / 1024
        cache = model.new_cache(2, 40)
        pieces = [model(part, cache) for part in x.split(7, dim=1)]  # of (B, 7, V)
        difference = (torch.cat(pieces, dim=1) - model(x)).abs().max()
        print(f"{attn:10} {size:10,} {kept:34.0f} {difference:41.1e}")


if __name__ == "__main__":
    if sys.argv[1:]:  # --help
        print(__doc__)
    else:
        main()
