"""What is cached: the keys and values that a decoder keeps for every token it has read.

Grouped-query attention (GQA) keeps D numbers per key and per value of each of G groups. Latent attention
keeps a low-rank latent, from which keys and values are made again: one latent for all heads (MLA) or one
for each group of heads (GLA), and one small rotary key.

    1) project   a layer computes what it stores for a new token      GQA: k, v     MLA, GLA: latent c, k_r
    2) append    the slot cache takes it: preallocated, ragged, with positions; a window is a ring
    3) attend    a query reads every filled slot whose position is not after its own
    4) absorb    with a cache, latents are read as they lie: W_UK moves to the query and W_UV behind the sum,
                 so that no key and no value is made

Does NOT include: speed (kernels.py replaces the decorated functions on a GPU), quantised caches, paging,
several texts packed in one row.
Run `python latent_attention.py` for the cache table, counted from allocated tensors, and one identity.
Read on: MLA is DeepSeek-V2, arXiv 2405.04434, eqs 9-19; GLA is arXiv 2505.21487; GQA is arXiv 2305.13245;
rotary embedding is arXiv 2104.09864. Then nsa.py.

Letters, here and in every file: B batch, T queries, S slots, C model width, H query heads, G key heads (the
groups of GQA, the latents of MLA and GLA), h = H / G heads that share one, D head width, R latent width
(papers: d_c), P rotary width (papers: d_h^R, d_r), W window. Where widths differ, Dk is a key's and Dv a
value's. The layout is (B, H, T, D). RoPE is half-split.
"""

import copy
import math
import sys
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import amp_dtype, fast_path


@fast_path
def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the mean is fp32 or better.

    In the dtype of x, or that of autocast, to which the matrices behind it would cast it, each anew.
    """
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(amp_dtype(x))


class RMSNorm(nn.RMSNorm):
    """torch's, by `rms_norm`; eps is a number, as kernels want it."""

    def __init__(self, width, eps=1e-6):
        super().__init__(width, eps)

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


@fast_path
def add_norm(x, y, norm):
    """A step of the residual stream: x, y (B, T, C), norm an RMSNorm -> x + y, norm(x + y)."""
    x = x + y
    return x, norm(x)


@fast_path
def swiglu(x):
    """silu(gate) * up of x = [gate ; up], (.., 2 F) -> (.., F)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def joins(module, name, parts):
    """`module.name` is one matrix for what reads the same input: one product instead of several.

    Checkpoints from before it was one hold its rows under the names of `parts`; they still load.
    """

    def read(module, state, prefix, *rest):
        for kind in ("weight", "bias"):
            old = [f"{prefix}{part}.{kind}" for part in parts]
            if all(key in state for key in old):
                state[f"{prefix}{name}.{kind}"] = torch.cat([state.pop(key) for key in old])

    module.register_load_state_dict_pre_hook(read)


@fast_path
def rope(x, pos, base=10000.0, factor=1.0, still=0, heads=None):
    """Rotary position embedding, half-split: channels i and i + P/2 turn together by pos * base^(-2i/P).

    x (B, H, T, P), P even; pos (B or 1, T) in tokens, fractions allowed (nsa.py turns to the middle of a
    block) -> like x. Angles are computed in fp32, or in fp64 for fp64 input. Llama pairs channels like this.
    factor is Llama 3's: channels that turn less than once in 8192 tokens turn so many times slower, those
    that turn 4 times or more as ever, and between the two a mixture. The first `still` channels of x stay,
    and with `heads` the heads after the first so many.
    """
    whole = x
    x = x[:, :heads]  # (B, those that turn, T, P)
    P = x.shape[-1] - still
    dtype = torch.promote_types(x.dtype, torch.float32)
    fp64 = "cpu" if x.device.type == "mps" else x.device  # an Apple GPU has none
    freq = base ** (-torch.arange(0, P, 2, device=fp64, dtype=torch.float64) / P)  # (P/2,)
    keep = ((8192 * freq / (2 * math.pi) - 1) / 3).clamp(0, 1)  # (P/2,)
    freq = freq * (keep + (1 - keep) / factor)
    angle = pos[:, None, :, None].to(dtype) * freq.to(dtype).to(x.device)  # (B, 1, T, P/2)
    cos = angle.cos()
    sin = angle.sin()
    fixed, a, b = x.to(dtype).split([still, P // 2, P // 2], dim=-1)  # (B, H, T, still or P/2)
    x = torch.cat([fixed, a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)  # (B, .., T, P)
    return x if heads is None else torch.cat([x, whole[:, heads:]], dim=1)  # (B, H, T, P)


# ------------------------------------------------------------------------------------------------------------
# 2) The slot cache


class Keys(NamedTuple):
    """What queries may read: keys [k ; k2], values v, and where they stand in the text."""

    k: torch.Tensor  # (B, G, S, D), or latents (B, G, S, R); in a whole text token t lies at row t
    v: torch.Tensor  # (B, G, S, Dv); None: the value is the latent k itself
    k2: torch.Tensor  # (B, 1, S, P) second part of the key, the same for all groups; None: there is none
    pos: torch.Tensor  # (B or 1, heads or 1, S) positions, -1 = empty
    length: torch.Tensor = None  # (B,) see SlotCache, for kernels.py; None: a whole text, or see `append`

    def joined(self):
        """The whole key [k ; k2] of every group (B, G, S, D + P), and the value (B, G, S, Dv)."""
        v = self.k if self.v is None else self.v
        if self.k2 is None:
            return self.k, v
        k2 = self.k2.expand(-1, self.k.shape[1], -1, -1)  # (B, G, S, P)
        return torch.cat([self.k, k2], dim=-1), v


@fast_path
def write_slots(length, buffers, new, count, ring):
    """Write the first count[b] of T new entries behind row b's length, in place; a ring counts modulo S.

    length, count (B,); buffers (B, heads, S) or (B, heads, S, width); new likewise with T. A ring takes the
    last S of more than S entries. Raises RuntimeError where a row is full (the kernel then writes nothing:
    for it train_lm.LM asserts for all layers at once).
    """
    B, _, T = new[0].shape[:3]
    S = buffers[0].shape[2]
    if not ring:
        torch._assert_async((length + count <= S).all(), "a row of the cache is full")
    take = torch.arange(min(T, S), device=length.device).expand(B, -1)  # (B, min(T, S)): which entries
    if T > S:
        take = take + count[:, None] - S  # the last S real ones
    write = (take >= 0) & (take < count[:, None])  # (B, min(T, S))
    slot = (length[:, None] + take) % S  # (B, min(T, S)): consecutive, so no slot is named twice
    take = take.clamp(0, T - 1)
    for buffer, x in zip(buffers, new):
        old = buffer.view(B, buffer.shape[1], S, -1)  # positions have width 1
        x = x.to(old.dtype).reshape(B, x.shape[1], T, -1)
        to, at, real = (y[:, None, :, None].expand_as(x[:, :, : y.shape[1]]) for y in (slot, take, write))
        old.scatter_(2, to, torch.where(real, x.gather(2, at), old.gather(2, to)))


class SlotCache:
    """Preallocated slots with positions: dense decoding, windows, rejected drafts and eviction in one class.

    data      {name: (B, heads, S, width)}, one tensor for each cached quantity, named as in Keys
    pos       (B, heads, S) original positions, -1 = empty; heads = 1 where the quantities differ in heads
    length    (B,) how many slots of a row have been written: the next one to write, modulo S in a ring
    watchers  functions (q, pos, count), told of every query whose token is appended: sparse_rl.py learns
              there what is asked

    widths    {name: (heads, width)} of the cached quantities
    window    None: S = max_len slots. W: a ring of W - 1 + margin slots, at most max_len: the keys that a
              query may read stay when up to `margin` tokens arrive at once, or are taken back
    Shapes never change and the host reads nothing, so a CUDA graph can capture a decoding step.
    """

    def __init__(self, batch, max_len, widths, window=None, margin=8, dtype=torch.float32, device="cpu"):
        S = max_len if window is None else min(max_len, window - 1 + margin)
        self.window = window
        self.margin = margin
        self.ring = S < max_len
        self.watchers = []
        heads = {heads for heads, _ in widths.values()}
        rows = heads.pop() if len(heads) == 1 else 1  # rows of positions
        kind = {"dtype": dtype, "device": device}
        self.data = {name: torch.zeros(batch, h, S, width, **kind) for name, (h, width) in widths.items()}
        self.pos = torch.full((batch, rows, S), -1, dtype=torch.int32, device=device)
        self.length = torch.zeros(batch, dtype=torch.long, device=device)

    @property
    def nbytes(self):
        """Bytes of the cached quantities. Positions, 4 bytes a slot and head, are not counted."""
        return sum(x.nbytes for x in self.data.values())

    def append(self, pos, count, **new):
        """Write the first count[b] of T new entries behind row b's length -> Keys that the new queries read.

        new: one (B, heads, T, width) for each quantity; pos (B, T) their positions; count (B,), 0 to T: the
        rest is padding. count None: nothing is written, the queries read what lies there (drafts in mtp.py).
        The Keys are the buffers themselves. But of more than `margin` tokens that enter a ring at once, the
        first still need slots that the last overwrite: then S old and T new entries come side by side.
        """
        data, k_pos, length = self.data, self.pos, self.length
        if count is not None:
            new = {name: x for name, x in new.items() if name in self.data}
            new_pos = pos[:, None].expand(-1, self.pos.shape[1], -1)  # (B, heads, T)
            if self.ring and pos.shape[1] > self.margin:
                both = lambda old, x: torch.cat([old, x.to(old.dtype)], dim=2)  # (B, heads, S + T, width)
                data = {name: both(data[name], x) for name, x in new.items()}
                k_pos = torch.cat([k_pos, new_pos.to(k_pos.dtype)], dim=2)  # (B, heads, S + T)
                length = None
            buffers = [*(self.data[name] for name in new), self.pos]
            write_slots(self.length, buffers, [*new.values(), new_pos], count, self.ring)
            self.length += count
        return Keys(data.get("k"), data.get("v"), data.get("k2"), k_pos, length)

    def attend(self, q, pos, count, scale, **new):
        """Append new entries, then every query (B, H, T, D + P) reads what it may -> (B, H, T, Dv)."""
        keys = self.append(pos, count, **new)
        for watch in self.watchers if count is not None else ():
            watch(q, pos, count)
        return cached_attention(q.to(keys.k.dtype), pos, keys, scale, self.window)

    def rollback(self, seen):
        """Forget entries at positions >= seen[b], (B,): rejected drafts, in a ring up to `margin` tokens."""
        drop = self.pos >= seen[:, None, None]  # (B, heads, S)
        self.length -= drop[:, 0].sum(-1)
        self.pos.masked_fill_(drop, -1)

    def keep(self, index, rows):
        """Evict from `rows` (B,) bool: only the slots index (B, heads or 1, n) stay, moved to the front.

        Their positions move with them. index holds ascending slots, and all heads of a row keep n. Not for
        rings, and not for caches from which nsa.py selects: a list of blocks needs slot s to hold position s.
        """
        n = index.shape[-1]
        here = rows[:, None, None]  # (B, 1, 1)
        index = torch.where(here, index, torch.arange(n, device=index.device))  # (B, heads or 1, n)
        for buffer in self.data.values():
            buffer[:, :, :n] = buffer.take_along_dim(index[..., None], 2)
        self.pos[:, :, :n] = self.pos.take_along_dim(index, 2)
        self.pos[:, :, n:].masked_fill_(here, -1)
        self.length.masked_fill_(rows, n)

    @classmethod
    def stack(cls, parts, device):
        """One SlotCache with the rows of all parts, which become views of it; parts may lie on "meta"."""
        whole = copy.copy(parts[0])
        B = len(parts[0].length)
        new = lambda x, value: x.new_full((B * len(parts), *x.shape[1:]), value, device=device)
        whole.data = {name: new(x, 0) for name, x in whole.data.items()}
        whole.pos = new(whole.pos, -1)
        whole.length = new(whole.length, 0)
        for i, part in enumerate(parts):
            own = slice(i * B, (i + 1) * B)
            part.data = {name: x[own] for name, x in whole.data.items()}
            part.pos = whole.pos[own]
            part.length = whole.length[own]
        return whole


def cache_bytes(layers):
    """Bytes of the caches of a list of layers (each a dict of SlotCaches): counted, not computed."""
    return sum(part.nbytes for layer in layers for part in layer.values())


def keys_of(slots, pos, count, k, v=None, k2=None):
    """What these queries may read: a whole text (slots None), or a SlotCache with the new tokens appended."""
    return Keys(k, v, k2, pos[:, None]) if slots is None else slots.append(pos, count, k=k, v=v, k2=k2)


# ------------------------------------------------------------------------------------------------------------
# 3) Attention


def visible(q_pos, k_pos, window=None):
    """Which slots a query reads: filled, not after it, and among the last `window` positions with its own.

    q_pos (B, T), k_pos (B, heads or 1, S) with -1 = empty -> (B, heads or 1, T, S) bool.
    """
    q = q_pos[:, None, :, None]
    k = k_pos[:, :, None, :]
    see = (k >= 0) & (k <= q)
    return see if window is None else see & (k > q - window)


def attend(q, k, v, mask, scale):
    """softmax(scale q k^T) v where mask allows it. The h heads of a group share keys, values and mask.

    q (B, H, T, Dk), k (B, G, S, Dk), v (B, G, S, Dv), mask (B or 1, G or 1, T, S) bool -> (B, H, T, Dv).
    Every query must see at least one key.
    """
    if mask.shape[1] > 1:
        mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], dim=1)  # (B, H, T, S)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


@fast_path
def cached_attention(q, q_pos, keys, scale, window=None):
    """Attention of a few new queries to what a cache holds, in a window or without.

    q (B, H, T, D + P), q_pos (B, T), keys of SlotCache.append -> (B, H, T, Dv).
    """
    return attend(q, *keys.joined(), visible(q_pos, keys.pos, window), scale)


@fast_path
def window_attention(q, keys, window, scale):
    """Causal attention to the last `window` positions of a whole text, in time and memory linear in T.

    Chunks of W queries meet the 2 W keys of their own chunk and of the one before. Token t lies at row t.
    q (B, H, T, D + P), keys of the text -> (B, H, T, Dv), as attend gives with visible(pos, pos, window).
    """
    k, v = keys.joined()  # (B, G, T, Dk), (B, G, T, Dv)
    B, _, T, _ = q.shape
    W = min(window, T)
    chunks = -(-T // W)
    pad = -T % W  # rows that fill the last chunk
    q = F.pad(q, (0, 0, 0, pad)).unflatten(2, (chunks, W))  # (B, H, chunks, W, Dk)
    q = q.transpose(1, 2).flatten(0, 1)  # (B chunks, H, W, Dk)

    def two_chunks(x):  # (B, G, T, D) -> (B chunks, G, 2 W, D)
        return F.pad(x, (0, 0, W, pad)).unfold(2, 2 * W, W).permute(0, 2, 1, 4, 3).flatten(0, 1)

    pos = torch.arange(chunks * W, device=q.device).view(chunks, W)  # (chunks, W)
    k_pos = torch.cat([pos - W, pos], dim=-1)[:, None]  # (chunks, 1, 2 W); negative before the text: empty
    see = visible(pos, k_pos, W).repeat(B, 1, 1, 1)  # (B chunks, 1, W, 2 W)
    o = attend(q, two_chunks(k), two_chunks(v), see, scale)  # (B chunks, H, W, Dv)
    return o.unflatten(0, (B, chunks)).transpose(1, 2).flatten(2, 3)[:, :, :T]


# ------------------------------------------------------------------------------------------------------------
# The layers


def split_heads(x, heads):
    """(B, T, heads * width) -> (B, heads, T, width)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x):
    """(B, heads, T, width) -> (B, T, heads * width)."""
    return x.transpose(1, 2).flatten(2)


class GQA(nn.Module):
    """Dense grouped-query attention, exactly a Llama layer's: MHA with G = H, MQA with G = 1.

    factor: see rope; bias: q, k and v have one (Qwen2); eps: queries and keys are normed (Qwen3), None: not.

    It caches 2 G D numbers a token. Every attention layer of this project has these two methods:
    new_cache(batch, max_len, ..) -> a dict of SlotCaches
    forward(x (B, T, C), pos (B or 1, T), cache, count (B,)) -> (B, T, C). Without a cache x is a whole text,
    position t at row t. With one, at pos (B, T), T new tokens a row, of which count[b] are real, are appended
    and read all that lies before them; with count None they only read (not so in ASA's global layer).
    source (B, T, C), for mtp.py: keys and values are made of it instead of x, and row t of x reads rows up
    to t of it.
    """

    def __init__(self, width, heads, groups, head_width, base=10000.0, factor=1.0, bias=False, eps=None):
        super().__init__()
        self.heads = heads
        self.groups = groups
        self.head_width = head_width
        self.base = base
        self.factor = factor
        self.qkv = nn.Linear(width, (heads + 2 * groups) * head_width, bias=bias)
        self.out = nn.Linear(heads * head_width, width, bias=False)
        self.q_norm = None if eps is None else RMSNorm(head_width, eps)
        self.k_norm = None if eps is None else RMSNorm(head_width, eps)
        joins(self, "qkv", "qkv")

    def new_cache(self, batch, max_len, margin=8, **kind):
        widths = {"k": (self.groups, self.head_width), "v": (self.groups, self.head_width)}
        return {"tokens": SlotCache(batch, max_len, widths, margin=margin, **kind)}

    def project(self, x, source):
        """-> queries, keys and values side by side, (B, H + 2 G, T, D)."""
        if source is None:
            return split_heads(self.qkv(x), self.heads + 2 * self.groups)
        rows = [self.heads * self.head_width, 2 * self.groups * self.head_width]
        q, kv = zip(*[p.split(rows) for p in self.qkv.parameters()])  # (weight, bias if there is one) each
        qkv = torch.cat([F.linear(x, *q), F.linear(source, *kv)], dim=-1)  # (B, T, (H + 2 G) D)
        return split_heads(qkv, self.heads + 2 * self.groups)

    def forward(self, x, pos, cache=None, count=None, source=None):
        each = [self.heads, self.groups, self.groups]
        qkv = self.project(x, source)  # (B, H + 2 G, T, D)
        if self.q_norm is not None:
            q, k, v = qkv.split(each, dim=1)  # (B, H or G, T, D)
            qkv = torch.cat([self.q_norm(q), self.k_norm(k), v], dim=1)  # (B, H + 2 G, T, D)
        # Values go along, so that backward joins the gradients once.
        qkv = rope(qkv, pos, self.base, self.factor, heads=self.heads + self.groups)
        q, k, v = qkv.split(each, dim=1)  # (B, H or G, T, D)
        if cache is None:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (B, H, T, D)
        else:
            o = cache["tokens"].attend(q, pos, count, self.head_width**-0.5, k=k, v=v)  # (B, H, T, D)
        return self.out(merge_heads(o).to(x.dtype))


class LatentAttention(nn.Module):
    """MLA (latents = 1) and GLA (latents = G): group j of the heads makes its keys and values from latent j.

    It caches G R + P numbers a token, with a window those of a ring. It trains on keys and
    values made for each head (320 FLOP per query, key and head instead of 576 at D 64, R 128, P 32) and
    decodes absorbed, from the latents as they lie. Equation numbers are DeepSeek-V2's. The query rank C / 2
    is ours.
    """

    def __init__(self, width, heads, head_width, latents, rank, rotary, window=None, base=10000.0, eps=1e-6):
        super().__init__()
        self.heads = heads
        self.latents = latents
        self.rank = rank
        self.rotary = rotary
        self.window = window
        self.base = base
        self.scale = (head_width + rotary) ** -0.5  # of the key's width before absorption, in both forms
        self.q_down = nn.Linear(width, width // 2, bias=False)  # eq. 12
        self.q_norm = RMSNorm(width // 2, eps)
        self.q_up = nn.Linear(width // 2, heads * (head_width + rotary), bias=False)  # eqs 13, 14: W_UQ, W_QR
        self.kv_down = nn.Linear(width, latents * rank + rotary, bias=False)  # eqs 9, 15: W_DKV, W_KR
        self.kv_norm = RMSNorm(rank, eps)
        self.k_up = nn.Parameter(torch.empty(heads, head_width, rank))  # W_UK, eq. 10
        self.v_up = nn.Parameter(torch.empty(heads, head_width, rank))  # W_UV, eq. 11
        self.out = nn.Linear(heads * head_width, width, bias=False)  # eq. 19
        for w in (self.k_up, self.v_up):
            nn.init.normal_(w, std=rank**-0.5)

    def new_cache(self, batch, max_len, margin=8, **kind):
        widths = {"k": (self.latents, self.rank), "k2": (1, self.rotary)}  # the latents c, the rotary key k_r
        return {"tokens": SlotCache(batch, max_len, widths, self.window, margin, **kind)}

    def project(self, x, pos, source=None, up=None):
        """x (B, T, C) -> q = [q_c ; q_r] (B, H, T, D + P), to cache: c (B, G, T, R), k_r (B, 1, T, P).

        up: another matrix than W_UQ, W_QR, with as many columns.
        """
        up = self.q_up.weight if up is None else up
        q = split_heads(F.linear(self.q_norm(self.q_down(x)), up), self.heads)  # (B, H, T, D + P)
        q = rope(q, pos, self.base, still=q.shape[-1] - self.rotary)
        c, k_r = self.kv_down(x if source is None else source).tensor_split([-self.rotary], dim=-1)
        c = self.kv_norm(split_heads(c, self.latents))  # (B, G, T, R)
        return q, c, rope(k_r[:, None], pos, self.base)

    def absorb(self, q):
        """The query that reads [c ; k_r], (B, H, T, R + P): q_c . (W_UK c) = (W_UK^T q_c) . c."""
        q_c, q_r = q.tensor_split([-self.rotary], dim=-1)
        q = torch.einsum("bhtd,hdr->bhtr", q_c, self.k_up.to(q_c.dtype))  # (B, H, T, R)
        return torch.cat([q, q_r], dim=-1)

    def finish(self, o):
        """Weighted latents of every head -> values -> output: (B, H, T, R) -> (B, T, C)."""
        o = torch.einsum("bhtr,hdr->bhtd", o.to(self.v_up.dtype), self.v_up)  # (B, H, T, D)
        return self.out(merge_heads(o))

    def materialised(self, q, c, k_r, pos):
        """Attention of a whole text to keys and values made for each head, eqs 10, 11, 16-18 -> (B, T, C)."""
        k_up = self.k_up.to(c.dtype).unflatten(0, (self.latents, -1))  # (G, h, D, R)
        v_up = self.v_up.to(c.dtype).unflatten(0, (self.latents, -1))  # (G, h, D, R)
        k = torch.einsum("bgsr,ghdr->bghsd", c, k_up).flatten(1, 2)  # (B, H, T, D)
        v = torch.einsum("bgsr,ghdr->bghsd", c, v_up).flatten(1, 2)  # (B, H, T, D)
        keys = keys_of(None, pos, None, k, v, k_r)
        if self.window is None:
            k, v = keys.joined()
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)  # (B, H, T, D)
        else:
            o = window_attention(q, keys, self.window, self.scale)  # (B, H, T, D)
        return self.out(merge_heads(o))

    def forward(self, x, pos, cache=None, count=None, source=None):
        q, c, k_r = self.project(x, pos, source)
        if cache is None:
            return self.materialised(q, c, k_r, pos)
        o = cache["tokens"].attend(self.absorb(q), pos, count, self.scale, k=c, k2=k_r)  # (B, H, T, R)
        return self.finish(o)


@torch.no_grad()
def main():
    torch.manual_seed(0)
    H, G, D, T = 16, 4, 64, 1024  # heads, groups, head width, cached tokens
    C = H * D
    P = D // 2
    layers = {
        "MHA: 2 H D": GQA(C, H, H, D),
        "GQA: 2 G D": GQA(C, H, G, D),
        "MQA: 2 D": GQA(C, H, 1, D),
        "MLA: R + P, R = 4 D": LatentAttention(C, H, D, 1, 4 * D, P),
        "GLA: G R + P, R = 2 D": LatentAttention(C, H, D, G, 2 * D, P),
        "GLA, two latents": LatentAttention(C, H, D, 2, 2 * D, P),
    }
    print(f"The cache of one layer in bf16, {H} heads of width {D}, {G} groups, rotary width {P}:")
    print("bytes a token, counted, and as a share of MHA's\n")
    for name, layer in layers.items():
        per_token = cache_bytes([layer.new_cache(1, T, dtype=torch.bfloat16)]) / T
        share = per_token / (2 * 2 * H * D)
        print(f"{name:22} {per_token:6.0f} {share:7.1%}  {'#' * round(60 * share)}")

    layer = layers["GLA: G R + P, R = 2 D"].double()
    x = torch.randn(2, 37, C, dtype=torch.float64)  # (B, T, C)
    pos = torch.arange(37)[None].expand(2, -1)  # (B, T)
    cache = layer.new_cache(2, 37, dtype=torch.float64)
    difference = (layer(x, pos) - layer(x, pos, cache, torch.tensor([37, 37]))).abs().max()
    print(f"\nGLA, keys made per head = latents read as they lie: max difference {difference:.1e} (fp64)")


if __name__ == "__main__":
    if sys.argv[1:]:  # --help
        print(__doc__)
    else:
        main()
