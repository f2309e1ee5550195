"""What is cached: the keys and values that a decoder keeps for every token it has read.

Grouped-query attention (GQA) keeps D numbers per key and per value of each of G groups. Latent attention keeps a low-rank latent from
which keys and values are made again: one latent for all heads (MLA) or one per group of heads (GLA), and one small rotary key.

    1) project      what a layer computes for a new token and stores     GQA: k, v      MLA, GLA: latent c, rotary key k_r
    2) append       the slot cache: preallocated, ragged, with positions; a window is a ring
    3) attend       a query reads every filled slot whose position is not after its own
    4) absorb       latents are read as they lie: W_UK moves to the query, W_UV behind the sum, no key or value is ever made

Does NOT include: speed (that is kernels.py, used on a GPU), quantised caches, paging, packing of several texts in one row.
Run `python latent_attention.py` for the cache table, counted from allocated tensors, and one identity.
Read on: MLA is DeepSeek-V2, arXiv 2405.04434, eqs 9-19; GLA is arXiv 2505.21487; GQA is arXiv 2305.13245. Then nsa.py.

Letters (here and in every file): B batch, T queries, S slots, C model width, H query heads, G groups of heads (= number of latents),
D head width, R latent width (papers: d_c), P rotary width (papers: d_h^R, d_r), W window. Layout (B, H, T, D). RoPE is half-split.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; statistics are kept in fp32 or better by torch's own kernel."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rope(x, pos, base=10000.0):
    """Rotary position embedding, half-split: channel i turns together with channel i + P/2, by the angle pos * base^(-2i/P).

    x (B, H, T, P), P even; pos (B, T) or (1, T) in tokens, fractions allowed (nsa.py rotates to the middle of a block) -> like x.
    Angles are computed in fp32 (fp64 for fp64 input). Source: arXiv 2104.09864; the half-split pairing is Llama's.
    """
    if kernels.fast(x):
        return kernels.rope(x, pos, base)
    dtype = torch.promote_types(x.dtype, torch.float32)
    freq = base ** (-torch.arange(0, x.shape[-1], 2, device=x.device, dtype=torch.float64) / x.shape[-1])  # (P/2,)
    angle = pos[:, None, :, None].to(dtype) * freq.to(dtype)  # (B, 1, T, P/2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(dtype).chunk(2, dim=-1)  # (B, H, T, P/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------------------
# 2) the slot cache


class SlotCache:
    """Preallocated slots with positions: dense decoding, windows, rejected drafts and evicted tokens are all this one class.

    data    list of tensors (B, heads, S, width), one per cached quantity
    pos     (B, heads, S) original position of each slot, -1 = empty; one row of it (heads = 1) where the quantities differ in heads
    length  (B,) how many slots have been written, per row: the next one to write (modulo S in a ring)

    widths  ((heads, width), ...) of the cached quantities.
    window  None: S = max_len slots. W: a ring of W - 1 + margin slots (never more than max_len), enough for every key that a query may
            read when up to `margin` tokens arrive at once, or when up to `margin` tokens are taken back.
    Shapes never change and nothing is read back to the host, so a decoding step can be captured in a CUDA graph.
    """

    def __init__(self, batch, max_len, widths, window=None, margin=8, dtype=torch.float32, device="cpu"):
        S = max_len if window is None else min(max_len, window - 1 + margin)
        self.ring, self.margin = S < max_len, margin
        self.in_order = not self.ring  # slot s holds position s, until something is evicted
        same = all(heads == widths[0][0] for heads, _ in widths)
        self.data = [torch.zeros(batch, heads, S, width, dtype=dtype, device=device) for heads, width in widths]
        self.pos = torch.full((batch, widths[0][0] if same else 1, S), -1, dtype=torch.int32, device=device)
        self.length = torch.zeros(batch, dtype=torch.long, device=device)

    @property
    def nbytes(self):
        """Bytes of the cached quantities. The positions (4 bytes a slot and head) are bookkeeping and not counted."""
        return sum(x.nbytes for x in self.data)

    def append(self, *new, pos, count):
        """Write the first count[b] of T new entries behind row b's length; return what the new queries have to read.

        new: one (B, heads, T, width) per quantity; pos (B, T) their positions; count (B,) with 0 <= count <= T, the rest is padding.
        count None: nothing is written, the queries read what lies there (a draft of mtp.py).
        -> (*data, positions (B, heads, S)). These are the buffers themselves, except when more than `margin` tokens enter a ring at
        once: then the first of them still need slots that the last of them overwrite, and old and new entries are returned side by
        side (S + T). Raises RuntimeError when a row is full (in the fast path nothing is raised here: train_lm.LM asserts for all layers).
        """
        if count is None:
            return [*self.data, self.pos]
        T, S = pos.shape[1], self.pos.shape[2]
        pos = pos[:, None].expand(-1, self.pos.shape[1], -1)  # (B, heads, T)
        read = None
        if self.ring and T > self.margin:
            read = [torch.cat([old, x.to(old.dtype)], dim=2) for old, x in zip([*self.data, self.pos], [*new, pos])]  # (B, heads, S+T, ..)
        if kernels.fast(new[0]):
            kernels.append(self.data, self.pos, self.length, new, pos[:, 0], count)
            self.length += count
            return read or [*self.data, self.pos]
        if not self.ring:
            torch._assert_async((self.length + count <= S).all(), "a row of the cache is full")

        take = torch.arange(min(T, S), device=pos.device).expand(len(pos), -1)  # (B, min(T, S)) which new entries are written:
        if T > S:
            take = take + count[:, None] - S  # only the last S real ones find room
        write = (take >= 0) & (take < count[:, None])  # (B, min(T, S))
        slot = (self.length[:, None] + take) % S  # (B, min(T, S)): consecutive, so never the same slot twice
        take = take.clamp(0, T - 1)
        for buffer, x in zip([*self.data, self.pos], [*new, pos]):
            shape = (len(pos), 1, -1) + (1,) * (buffer.dim() - 3)
            size = (len(pos), buffer.shape[1], take.shape[1], *buffer.shape[3:])
            i, s, w = (t.view(shape).expand(size) for t in (take, slot, write))
            buffer.scatter_(2, s, torch.where(w, x.to(buffer.dtype).gather(2, i), buffer.gather(2, s)))
        self.length += count
        return read or [*self.data, self.pos]

    def rollback(self, seen):
        """Forget every entry at position >= seen[b], (B,): a rejected draft. In a ring at most `margin` tokens can be taken back."""
        drop = self.pos >= seen[:, None, None]  # (B, heads, S)
        self.length -= drop[:, 0].sum(-1)
        self.pos.masked_fill_(drop, -1)

    def keep(self, index):
        """Evict: only the slots index (B, heads or 1, n) stay, moved to the front in that order, with their positions.

        Ascending slots, then -1 for "none"; every head of a row keeps equally many. Not for rings.
        """
        n, real, index = index.shape[-1], index >= 0, index.clamp(min=0)
        self.in_order = False
        for buffer in self.data:
            i = index[..., None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
            buffer[:, :, :n] = buffer.gather(2, i)
        self.pos[:, :, :n] = self.pos.gather(2, index.expand(-1, self.pos.shape[1], -1)).masked_fill(~real, -1)
        self.pos[:, :, n:] = -1
        self.length.copy_(real[:, 0].sum(-1))


# ---------------------------------------------------------------------------------------------------------------------------------
# 3) attend


def visible(q_pos, k_pos, window=None):
    """Which slots a query reads: filled, not after it, and among the last `window` positions, itself included.

    q_pos (B, T), k_pos (B, heads or 1, S) with -1 = empty -> (B, heads or 1, T, S) bool.
    """
    q, k = q_pos[:, None, :, None], k_pos[:, :, None, :]
    see = (k >= 0) & (k <= q)
    return see if window is None else see & (k > q - window)


def attend(q, k, v, mask, scale):
    """softmax(scale q k^T + mask) v, the heads of a group sharing keys, values and mask. Every query must see at least one key.

    q (B, H, T, Dk), k (B, G, S, Dk), v (B, G, S, Dv), mask (B or 1, G or 1, T, S) bool -> (B, H, T, Dv).
    """
    B, H, T, _ = q.shape
    G, S = k.shape[1:3]
    h = H // G
    if h * T <= 64:  # decoding: a group's heads are the rows of one small matrix, so that each key is fetched once
        rows = mask[:, :, None].expand(-1, -1, h, -1, -1).flatten(2, 3)  # (B, G, hT, S)
        return F.scaled_dot_product_attention(q.reshape(B, G, h * T, -1), k, v, rows, scale=scale).reshape(B, H, T, -1)
    if mask.shape[0] == mask.shape[1] == 1:  # one mask for all
        k, v = k.repeat_interleave(h, 1), v.repeat_interleave(h, 1)  # (B, H, S, Dk), (B, H, S, Dv)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    mask = mask.expand(B, G, T, S).reshape(B * G, 1, T, S)  # a mask per group: groups become batch, so its heads share one copy
    k, v = (x.reshape(B * G, 1, S, -1).expand(-1, h, -1, -1) for x in (k, v))  # (BG, h, S, Dk), (BG, h, S, Dv)
    return F.scaled_dot_product_attention(q.reshape(B * G, h, T, -1), k, v, mask, scale=scale).reshape(B, H, T, -1)


def join(k, k2):
    """The key [k ; k2] of every group, its second part shared: (B, G, S, R), (B, 1, S, P) or None -> (B, G, S, R + P)."""
    return k if k2 is None else torch.cat([k, k2.expand(-1, k.shape[1], -1, -1)], dim=-1)


def read_slots(q, k, v, q_pos, k_pos, slots, scale, window=None, k2=None):
    """attend to what `slots` holds, keys [k ; k2] and values v as append returned them, with their positions k_pos."""
    rows = q.shape[1] // k.shape[1] * q.shape[2]  # that share a key; a long prompt is better off with torch's own kernel
    if kernels.fast(q) and k_pos is slots.pos and (rows <= 128 or q.shape[2] <= 16):
        return kernels.decode_attention(q, k, v, q_pos, k_pos, slots.length, scale, window, k2)
    return attend(q, join(k, k2), v, visible(q_pos, k_pos, window), scale)


def add_mass(mass, q, k, q_pos, k_pos, count, scale):
    """Add to every slot's mass (B, G, S, 1) the attention it gets from the first count[b] of T queries, all heads of its group together."""
    B, H, T, _ = q.shape
    total, _ = mass.append(q.new_zeros(B, k.shape[1], T, 1), pos=q_pos, count=count)  # (B, G, S, 1): a new entry starts at 0
    s = scale * q.unflatten(1, (k.shape[1], -1)).float() @ k[:, :, None].float().transpose(-1, -2)  # (B, G, h, T, S)
    p = s.masked_fill(~visible(q_pos, k_pos)[:, :, None], -math.inf).softmax(-1)
    real = torch.arange(T, device=q.device) < count[:, None]  # (B, T): the rest is padding
    total += p.where(real[:, None, None, :, None], 0).sum(dim=(2, 3))[..., None]


def window_attention(q, k, v, window, scale, k2=None):
    """Causal attention to the last `window` positions of one text, itself included, in time and memory linear in T.

    W queries at a time meet the 2 W keys of their own chunk and the one before; position t lies in row t.
    q (B, H, T, Dk), k (B, G, T, Dk) or, with k2 (B, 1, T, P), all but the last P of them, v (B, G, T, Dv) -> (B, H, T, Dv); equal to
    attend(..., visible(pos, pos, window), scale).
    """
    if kernels.fast(q, k, v):
        return kernels.window_attention(q, k, v, window, scale, k2)
    k = join(k, k2)  # (B, G, T, Dk)
    B, H, T, _ = q.shape
    W = min(window, T)
    n, pad = -(-T // W), -T % W  # chunks, rows to fill the last one
    q = F.pad(q, (0, 0, 0, pad)).unflatten(2, (n, W)).transpose(1, 2).flatten(0, 1)  # (B n, H, W, Dk)
    k, v = (F.pad(x, (0, 0, W, pad)).unfold(2, 2 * W, W).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v))  # (B n, G, 2W, D)
    pos = torch.arange(n * W, device=q.device).view(n, W)  # (n, W)
    see = visible(pos, torch.cat([pos - W, pos], dim=-1)[:, None], W)  # (n, 1, W, 2W); before the text positions are negative: empty
    o = attend(q, k, v, see.repeat(B, 1, 1, 1), scale)  # (B n, H, W, Dv)
    return o.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)[:, :, :T]


def split_heads(x, heads):
    """(B, T, heads * width) -> (B, heads, T, width)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x):
    """(B, heads, T, width) -> (B, T, heads * width)."""
    return x.transpose(1, 2).flatten(2)


class GQA(nn.Module):
    """Dense grouped-query attention, exactly a Llama layer's; MHA with G = H, MQA with G = 1. Caches 2 G D numbers per token.

    forward(x (B, T, C), pos (B or 1, T), cache, count (B,)) -> (B, T, C). Without a cache: the whole text at once, position t at row t.
    With one: T new tokens per row, of which count[b] are real, are appended, and read all that lies before them; with count None they
    only read. source (B, T, C): keys and values come from it instead of x; row t of x reads rows up to t of it (both for mtp.py).
    Every attention layer of this project has these two methods.
    """

    def __init__(self, width, heads, groups, head_width, base=10000.0):
        super().__init__()
        self.heads, self.groups, self.head_width, self.base = heads, groups, head_width, base
        self.q = nn.Linear(width, heads * head_width, bias=False)
        self.k = nn.Linear(width, groups * head_width, bias=False)
        self.v = nn.Linear(width, groups * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)

    def new_cache(self, batch, max_len, margin=8, queries=0, mass=False, **kind):
        """queries, mass: for sparse_rl.py: so many of the last queries, a ring; the attention that each slot has received."""
        cache = {"tokens": SlotCache(batch, max_len, ((self.groups, self.head_width),) * 2, margin=margin, **kind)}
        if queries:
            cache["queries"] = SlotCache(batch, max_len, ((self.heads, self.head_width),), window=queries, margin=margin, **kind)
        if mass:
            cache["mass"] = SlotCache(batch, max_len, ((self.groups, 1),), margin=margin, **{**kind, "dtype": torch.float32})
        return cache

    def forward(self, x, pos, cache=None, count=None, source=None):
        q, k, v = rope(split_heads(self.q(x), self.heads), pos, self.base), None, None  # (B, H, T, D)
        if cache is None or count is not None:
            source = x if source is None else source
            k = rope(split_heads(self.k(source), self.groups), pos, self.base)  # (B, G, T, D)
            v = split_heads(self.v(source), self.groups)  # (B, G, T, D)
        if cache is None:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups < self.heads)  # (B, H, T, D)
        elif "see" in cache:  # a whole text, each query reading what a mask (B, G, T, T) says (sparse_rl.Replay)
            o = attend(q, k, v, cache["see"], self.head_width**-0.5)  # (B, H, T, D)
        else:
            k, v, k_pos = cache["tokens"].append(k, v, pos=pos, count=count)  # (B, G, S, D) twice, (B, G, S)
            if "queries" in cache:
                cache["queries"].append(q, pos=pos, count=count)
            if "mass" in cache:
                add_mass(cache["mass"], q, k, pos, k_pos, count, self.head_width**-0.5)
            o = read_slots(q.to(k.dtype), k, v, pos, k_pos, cache["tokens"], self.head_width**-0.5)  # (B, H, T, D)
        return self.out(merge_heads(o).to(x.dtype))


class LatentAttention(nn.Module):
    """MLA (latents = 1) and GLA (latents = G): group j of the heads makes its keys and values from latent j.

    Caches latents * R + P numbers per token; with a window only the last W tokens. It trains on keys and values made per head
    (320 FLOP per query, key and head instead of 576 at D 64, R 128, P 32) and decodes absorbed, from the latents as they lie.
    Equation numbers are DeepSeek-V2's. Query rank C / 2 is ours.
    """

    def __init__(self, width, heads, head_width, latents, rank, rotary, window=None, base=10000.0, eps=1e-6):
        super().__init__()
        self.heads, self.latents, self.rank, self.rotary, self.window, self.base = heads, latents, rank, rotary, window, base
        self.scale = (head_width + rotary) ** -0.5  # of the key's width before absorption, in both forms
        self.q_down = nn.Linear(width, width // 2, bias=False)  # eq. 12
        self.q_norm = RMSNorm(width // 2, eps)
        self.q_up = nn.Linear(width // 2, heads * (head_width + rotary), bias=False)  # eqs 13, 14: W_UQ and W_QR in one
        self.kv_down = nn.Linear(width, latents * rank + rotary, bias=False)  # eqs 9, 15: W_DKV and W_KR in one
        self.kv_norm = RMSNorm(rank, eps)
        self.k_up = nn.Parameter(torch.empty(heads, head_width, rank))  # W_UK, eq. 10
        self.v_up = nn.Parameter(torch.empty(heads, head_width, rank))  # W_UV, eq. 11
        self.out = nn.Linear(heads * head_width, width, bias=False)  # eq. 19
        for w in (self.k_up, self.v_up):
            nn.init.normal_(w, std=rank**-0.5)

    def new_cache(self, batch, max_len, margin=8, **kind):
        widths = ((self.latents, self.rank), (1, self.rotary))
        return {"tokens": SlotCache(batch, max_len, widths, window=self.window, margin=margin, **kind)}

    def project(self, x, pos, source=None):
        """x (B, T, C) -> q_c (B, H, T, D), q_r (B, H, T, P), and what is cached: c (B, G, T, R), k_r (B, 1, T, P)."""
        source = x if source is None else source
        q = split_heads(self.q_up(self.q_norm(self.q_down(x))), self.heads)  # (B, H, T, D + P)
        q_c, q_r = q.split([q.shape[-1] - self.rotary, self.rotary], dim=-1)
        c, k_r = self.kv_down(source).split([self.latents * self.rank, self.rotary], dim=-1)  # (B, T, GR), (B, T, P)
        c = self.kv_norm(split_heads(c, self.latents))  # (B, G, T, R)
        return q_c, rope(q_r, pos, self.base), c, rope(k_r[:, None], pos, self.base)

    def absorb(self, q_c, q_r):
        """Score q_c . (W_UK c) = (W_UK^T q_c) . c: the query that reads [c ; k_r] -> (B, H, T, R + P)."""
        return torch.cat([torch.einsum("bhtd,hdr->bhtr", q_c, self.k_up.to(q_c.dtype)), q_r], dim=-1)

    def finish(self, o):
        """Weighted latents of every head -> values -> output: (B, H, T, R) -> (B, T, C)."""
        return self.out(merge_heads(torch.einsum("bhtr,hdr->bhtd", o, self.v_up.to(o.dtype))))

    def materialised(self, q_c, q_r, c, k_r):
        """Attention of a whole text on keys and values made for each head, eqs 10, 11, 16-18 -> (B, T, C)."""
        k_up, v_up = (w.to(c.dtype).unflatten(0, (self.latents, -1)) for w in (self.k_up, self.v_up))  # (G, H / G, D, R)
        k = torch.einsum("bgsr,ghdr->bghsd", c, k_up).flatten(1, 2)  # (B, H, T, D)
        v = torch.einsum("bgsr,ghdr->bghsd", c, v_up).flatten(1, 2)  # (B, H, T, D)
        q = torch.cat([q_c, q_r], dim=-1)  # (B, H, T, D + P)
        if self.window is None:
            o = F.scaled_dot_product_attention(q, join(k, k_r), v, is_causal=True, scale=self.scale)  # (B, H, T, D)
        else:
            o = window_attention(q, k, v, self.window, self.scale, k_r)  # (B, H, T, D)
        return self.out(merge_heads(o))

    def absorbed(self, q_c, q_r, c, k_r, mask):
        """The same sum on the latents themselves -> (B, T, C)."""
        return self.finish(attend(self.absorb(q_c, q_r).to(c.dtype), join(c, k_r), c, mask, self.scale))

    def forward(self, x, pos, cache=None, count=None, source=None):
        q_c, q_r, c, k_r = self.project(x, pos, source)
        if cache is None:
            return self.materialised(q_c, q_r, c, k_r)
        c, k_r, k_pos = cache["tokens"].append(c, k_r, pos=pos, count=count)  # (B, G, S, R), (B, 1, S, P), (B, heads, S)
        q = self.absorb(q_c, q_r).to(c.dtype)  # (B, H, T, R + P)
        return self.finish(read_slots(q, c, c, pos, k_pos, cache["tokens"], self.scale, self.window, k_r)).to(x.dtype)


def cache_bytes(layers):
    """Bytes of the caches of a list of layers (each a dict of SlotCaches): counted, not computed."""
    return sum(part.nbytes for layer in layers for part in layer.values())


def main():
    torch.manual_seed(0)
    H, G, D, T = 16, 4, 64, 1024  # heads, groups, head width, cached tokens
    C, P = H * D, D // 2
    rows = [
        ("MHA", GQA(C, H, H, D), f"2 H D = {2 * H * D}"),
        ("GQA", GQA(C, H, G, D), f"2 G D = {2 * G * D}"),
        ("MQA", GQA(C, H, 1, D), f"2 D = {2 * D}"),
        ("MLA", LatentAttention(C, H, D, 1, 4 * D, P), f"R + P = {4 * D + P}"),
        ("GLA", LatentAttention(C, H, D, G, 2 * D, P), f"G R + P = {G * 2 * D + P}"),
        ("GLA-2", LatentAttention(C, H, D, 2, 2 * D, P), f"2 R + P = {2 * 2 * D + P}"),
    ]
    print(f"One layer's cache for {T} tokens in bf16, {H} heads of width {D}, {G} groups, rotary width {P}: counted from the tensors\n")
    print(f"{'':6} {'bytes/token':>11} {'of MHA':>7}  {'numbers/token, formula':24} stored per token")
    full = None
    for name, layer, formula in rows:
        cache = layer.new_cache(1, T, dtype=torch.bfloat16)
        per_token = cache_bytes([cache]) / T
        full = full or per_token
        stored = " + ".join(f"{x.shape[1]} x {x.shape[3]}" for x in cache["tokens"].data)
        bar = "#" * round(40 * per_token / full)
        print(f"{name:6} {per_token:11.0f} {per_token / full:7.1%}  {formula:24} {stored:16} {bar}")

    layer = rows[4][1].double()
    x, pos = torch.randn(2, 37, C, dtype=torch.float64), torch.arange(37)[None]
    parts = layer.project(x, pos)
    a, b = layer.materialised(*parts), layer.absorbed(*parts, visible(pos, pos[:, None]))
    print(f"\nGLA, keys made per head = latents read as they lie: max difference {(a - b).abs().max():.1e} (fp64)")


if __name__ == "__main__":
    main()
