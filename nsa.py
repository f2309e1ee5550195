"""Which cached entries a query reads: compressed blocks, its best blocks, a window. NSA does all three in every layer, ASA alternates.

NSA (native sparse attention, arXiv 2502.11089): every layer has three branches with keys and values of their own, mixed by gates.
ASA (alternating sparse attention, arXiv 2511.00819): even layers are local (MLA in a window: latent_attention.LatentAttention), odd
layers global (compression and selection on one GLA latent per group of heads). Half of NSA's cache.

    1) compress   a learned phi makes one entry of a block of l tokens, every d tokens; a query attends to all finished blocks
    2) select     the compressed branch's own weights score blocks of l' tokens; block 0, the current and the previous one are forced,
                  the best others fill the list up to n; the query attends to the tokens of its list
    3) slide      the last W tokens (NSA only; in ASA this is the other kind of layer)
    4) gate       a sigmoid per head and branch mixes the outputs

One rule serves training, prefill, decoding and verification: a query reads an entry if its position is not after the query's, and a
compressed entry stands at the position of its block's last token.

Ours, where the papers' bodies are not available or silent: every width; ASA's block 16 and lists shared by 4 queries follow secondary
sources; where rotation stands to compression (content pools un-rotated, the key turns once, at its block's middle); NSA's phi is the mean
plus an MLP; ASA's phi a learned weighted mean; the 0-based form of NSA's eq. 9; NSA's gate is one linear layer.
Does NOT include: packed texts. The reference scores every key and masks; on a GPU kernels.py is used. Top-n passes no gradient: phi and the
block scores learn through the compressed branch's output.
Run `python nsa.py` for a map of what one query reads. Read first: latent_attention.py.

Letters as in latent_attention.py, and N compressed blocks, l block length, d stride between block starts, l' (code: block) selection
block, n blocks per list. Equation numbers are NSA's.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from latent_attention import LatentAttention, SlotCache, attend, cache_bytes, join, merge_heads, read_slots, rope, split_heads, visible
from latent_attention import window_attention

SHARE = 4  # ASA: consecutive queries that share one block list
ASA_BLOCK = 16  # ASA: l = d = l'


# ---------------------------------------------------------------------------------------------------------------------------------
# 1) compress


def blocks_done(tokens, l, d):
    """How many blocks [i d, i d + l) are complete after `tokens` tokens (a tensor or an int)."""
    return (tokens >= l) * ((tokens - l) // d + 1)


def compressed_entries(compress, parts, k_pos, pos, l, d, cache=None, count=None):
    """One entry per finished block, made from its l tokens: eq. 7. Without a cache of all blocks, with one of those just finished.

    compress: callable on one (B, G, N, l, width) per part and the positions of the blocks' last tokens (B or 1, N) -> one (B, G, N,
    width) per part; parts (B, G, S, width) lie at positions k_pos (B, heads, S). A block is made from its tokens' cache entries alone, so
    there is nothing to carry along or to take back.
    -> (*entries (B, G, N, width), positions (B or 1, heads or 1, N)): the position of a block is that of its last token.
    """
    if cache is None:
        end = torch.arange(blocks_done(pos.shape[1], l, d), device=pos.device)[None] * d + l - 1  # (1, N)
        return [*compress(*(blocks_of(x, l, d) for x in parts), end), end[:, None]]
    if count is None:
        return [*cache.data, cache.pos]
    first = blocks_done(pos[:, 0], l, d)  # (B,) blocks finished before this call
    done = blocks_done(pos[:, 0] + count, l, d) - first  # (B,)
    ids = first[:, None] + torch.arange(-(-pos.shape[1] // d), device=pos.device)  # (B, N): T tokens finish at most ceil(T / d) blocks
    slot = find(k_pos[:, 0], ids[..., None] * d + torch.arange(l, device=pos.device))  # (B, N, l)
    end = ids * d + l - 1  # (B, N)
    return cache.append(*compress(*(pick(x, slot) for x in parts), end), pos=end, count=done)


def blocks_of(x, l, d):
    """The finished blocks of a whole text: (B, G, T, width) -> (B, G, N, l, width)."""
    T = x.shape[2]
    return F.pad(x, (0, 0, 0, max(0, l - T))).unfold(2, l, d)[:, :, : blocks_done(T, l, d)].transpose(-1, -2)


def find(k_pos, want):
    """The slot that holds position want: k_pos (B, S), want (B, ...) -> (B, ...); any slot where there is none."""
    return (k_pos[:, None] == want.flatten(1)[..., None]).byte().argmax(-1).view_as(want)


def pick(x, slot):
    """x (B, G, S, width), slot (B or 1, N, l) -> (B, G, N, l, width)."""
    B, G, _, width = x.shape
    index = slot.flatten(1)[:, None, :, None].expand(B, G, -1, width)  # (B, G, N l, width)
    return x.gather(2, index).view(B, G, *slot.shape[1:], width)


def compressed_attention(q, k, v, see, scale):
    """Attention to compressed entries, and its weights, which score the blocks: eqs 5, 8 (with the 1/sqrt(width) that 8 leaves out).

    q (B, H, T, Dk), k (B, G, N, Dk), v (B, G, N, Dv), see (B or 1, G or 1, T, N) -> o (B, H, T, Dv), p (B, H, T, N) fp32.
    A query before the first finished block gets exactly 0, and finite gradients.
    """
    G = k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        s = q.unflatten(1, (G, -1)).to(wide) @ k[:, :, None].to(wide).transpose(-1, -2) * scale  # (B, G, h, T, N)
        see = see[:, :, None]  # (B, G or 1, 1, T, N)
        p = s.masked_fill(~see, -1e30).softmax(-1) * see  # (B, G, h, T, N); the finite -1e30 keeps empty rows from 0/0
        o = p.to(v.dtype) @ v[:, :, None]  # (B, G, h, T, Dv)
    return o.flatten(1, 2), p.flatten(1, 2)


# ---------------------------------------------------------------------------------------------------------------------------------
# 2) select


def block_importance(p, groups, l, d, block, tokens):
    """Scores of the selection blocks, summed over a group's heads: eqs 9, 10, in the 0-based geometric form.

    p_slc[j] = sum over m < l'/d, n < l/d of p_cmp[(l'/d) j + m - n]: a compressed block counts once per stride that it shares with
    selection block j (weights 1 2 2 2 1 at l 32, d 16, l' 64). Read 0-based as printed, (9) would score mostly earlier blocks.
    p (B, H, T, N) -> (B, groups, T, ceil(tokens / block)).
    """
    i = torch.arange(p.shape[-1], device=p.device)[:, None]  # (N, 1)
    j = torch.arange(-(-tokens // block), device=p.device)  # (blocks,)
    weight = sum((i == block // d * j + m - n) for m in range(block // d) for n in range(l // d))  # (N, blocks)
    return p.unflatten(1, (groups, -1)).sum(2) @ weight.to(p.dtype)


def select_blocks(importance, pos, block, n):
    """The list of every query: block 0, its own and the one before it, then the most important visible ones, n in all: eq. 11.

    importance (B, G, T, blocks), pos (B or 1, T) -> (B, G, T, min(n, blocks)) block numbers, best first; -1 where there are fewer.
    """
    j, own = torch.arange(importance.shape[-1], device=pos.device), (pos // block)[:, None, :, None]  # (blocks,), (B, 1, T, 1)
    forced = (j == 0) | (j == own) | (j == own - 1)  # (B, 1, T, blocks)
    score = importance.masked_fill(forced, torch.inf).masked_fill(j > own, -torch.inf)
    score, chosen = score.topk(min(n, len(j)), dim=-1)  # (B, G, T, n)
    return chosen.masked_fill(score == -torch.inf, -1)


def share_lists(lists, pos, earlier=None, every=SHARE):
    """`every` aligned queries use the list of the first of them, t0 = every * floor(t / every): causal, and `every` times fewer lists.

    lists (B, G, T, n) of each query, pos (B or 1, T); earlier (B, G, 1, n): the list of the first query's t0, when that lies before
    these T queries -> (B, G, T, n).
    """
    source = torch.arange(pos.shape[1], device=pos.device) - pos % every  # (B or 1, T) row of t0, negative before the call
    shared = lists.gather(2, source.clamp(min=0)[:, None, :, None].expand_as(lists))  # (B, G, T, n)
    return shared if earlier is None else torch.where((source < 0)[:, None, :, None], earlier, shared)


def few(q, k, v, cache):
    """Whether the decoding kernels can serve these queries: few of them, and a cache from which nothing was evicted."""
    return kernels.fast(q, k, v) and q.shape[1] // k.shape[1] * q.shape[2] <= 128 and cache["tokens"].in_order


def read_blocks(q, k, v, end, pos, tokens, l, d, block, n, scale, k2=None, every=1, cache=None):
    """1) and 2): attention to the compressed entries [k ; k2], v, which stand at `end`; the lists of every `every`-th query (1 or SHARE).

    tokens: how many can be chosen from; cache: where the tokens lie, None for a whole text, position t at row t
    -> o (B, H, T, Dv), lists (B, G, ceil(T / every), n).
    """
    shared = v is k
    k, v, k2 = (x if x is None else x.to(q.dtype) for x in (k, v, k2))
    v = k if shared else v
    if cache is None and kernels.fast(q, k, v, block):
        o, lse = kernels.compressed_attention(q, k, v, l, d, scale, k2)
        return o, kernels.select(q.detach(), k.detach(), lse, l, d, block, n, scale, k2, every)
    if cache is not None and few(q, k, v, cache):
        return kernels.decode_blocks(q, k, v, pos, cache["blocks"], tokens, l, d, block, n, scale, k2)
    o, p = compressed_attention(q, join(k, k2), v, visible(pos, end), scale)  # (B, H, T, Dv), (B, H, T, N)
    importance = block_importance(p.detach(), k.shape[1], l, d, block, tokens)  # (B, G, T, blocks)
    lists = select_blocks(importance, pos, block, n)  # (B, G, T, n)
    return o, lists if every == 1 else share_lists(lists, pos)[:, :, ::every]


def chosen_tokens(lists, k_pos, block, see):
    """Which tokens a query's blocks hold: lists (B, G, T, n), k_pos (B or 1, heads, S), see (B or 1, heads, T, S) -> (B, G, T, S) bool."""
    B, G, T, _ = lists.shape
    blocks = int(k_pos.shape[-1]) // block + 2
    chosen = torch.zeros(B, G, T, blocks, dtype=torch.bool, device=lists.device)
    chosen.scatter_(-1, lists.masked_fill(lists < 0, blocks - 1).long(), True)  # "none" marks a last block that no token is in
    key_block = (k_pos.clamp(min=0) // block).long()[:, :, None].expand(B, G, T, -1)  # (B, G, T, S)
    return chosen.gather(-1, key_block) & see


def selected_attention(q, k, v, lists, pos, k_pos, block, scale, k2=None, every=1, cache=None):
    """Attention to the tokens of each query's blocks: eq. 12. The reference reads every key [k ; k2] and masks what was not chosen.

    q (B, H, T, Dk), k (B, G, S, Dk), k2 (B, 1, S, P) or None, v (B, G, S, Dv), lists (B, G, ceil(T / every), n) that serve `every`
    queries each, pos (B or 1, T), k_pos (B or 1, heads, S); cache as in read_blocks -> (B, H, T, Dv).
    """
    if cache is None and kernels.fast(q, k, v, block, every):
        return kernels.selected_attention(q, k, v, lists, block, scale, k2, every)
    if cache is not None and few(q, k, v, cache):
        return kernels.decode_attention(q, k, v, pos, k_pos, cache["tokens"].length, scale, k2=k2, lists=lists, block=block)
    lists = lists.repeat_interleave(every, 2)[:, :, : q.shape[2]]  # (B, G, T, n)
    return attend(q, join(k, k2), v, chosen_tokens(lists, k_pos, block, visible(pos, k_pos)), scale)


def mix(gates, *branches):
    """The sum of gate x branch: eq. 5. gates (B, T, N H), N branches (B, H, T, D) -> (B, H, T, D)."""
    if kernels.fast(branches[0]):
        return kernels.mix(gates.to(branches[0].dtype), *branches)
    gates = split_heads(gates, len(branches) * branches[0].shape[1]).to(branches[0].dtype).chunk(len(branches), dim=1)  # (B, H, T, 1) each
    return sum(g * o for g, o in zip(gates, branches))


# ---------------------------------------------------------------------------------------------------------------------------------
# NSA: all three branches in every layer


class Phi(nn.Module):
    """NSA's compressor, l tokens -> 1: an MLP on the block, with a position encoding inside it. Ours: added to the mean, and 0 at first."""

    def __init__(self, l, head_width):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(l, head_width))
        self.up = nn.Linear(l * head_width, head_width, bias=False)
        self.down = nn.Linear(head_width, head_width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x):  # (B, G, N, l, D) -> (B, G, N, D)
        return x.mean(-2) + self.down(F.gelu(self.up((x + self.place.to(x.dtype)).flatten(-2))))


class NSA(nn.Module):
    """Compressed, selected and sliding attention, each with its own keys and values of G groups; caches of T/d, T and W tokens.

    l block length, d stride, block = l' selection block, n blocks per list, window W. Methods as in GQA; `trace`, a dict, receives the
    lists and what is visible, for pictures and tests.
    """

    def __init__(self, width, heads, groups, head_width, window, n, l=32, d=16, block=64, base=10000.0):
        super().__init__()
        if l % d or block % d or l > block or n < 3:
            raise ValueError(f"NSA needs d | l, d | l', l <= l', n >= 3 (3 blocks are forced): l {l}, d {d}, l' {block}, n {n}")
        self.heads, self.groups, self.head_width, self.base, self.scale = heads, groups, head_width, base, head_width**-0.5
        self.window, self.n, self.l, self.d, self.block = window, n, l, d, block
        self.q = nn.Linear(width, heads * head_width, bias=False)
        self.kv = nn.Linear(width, 6 * groups * head_width, bias=False)  # k and v of three branches
        self.phi_k, self.phi_v = Phi(l, head_width), Phi(l, head_width)
        self.gate = nn.Linear(width, 3 * heads)  # eq. 5
        self.out = nn.Linear(heads * head_width, width, bias=False)

    def new_cache(self, batch, max_len, margin=8, **kind):
        kv = ((self.groups, self.head_width),) * 2
        return {
            "open": SlotCache(batch, max_len, kv, window=self.l, margin=margin, **kind),  # tokens of unfinished blocks, un-rotated
            "blocks": SlotCache(batch, max(1, blocks_done(max_len, self.l, self.d)), kv, **kind),
            "tokens": SlotCache(batch, max_len, kv, margin=margin, **kind),
            "window": SlotCache(batch, max_len, kv, window=self.window, margin=margin, **kind),
        }

    def compress(self, k, v, end):
        """Blocks of un-rotated k, v (B, G, N, l, D) -> one entry each (B, G, N, D); the key turns once, at the middle of its block."""
        return rope(self.phi_k(k), end - (self.l - 1) / 2, self.base), self.phi_v(v)

    def forward(self, x, pos, cache=None, count=None, source=None, trace=None):
        q = rope(split_heads(self.q(x), self.heads), pos, self.base)  # (B, H, T, D)
        k0, v0, k1, v1, k2, v2 = split_heads(self.kv(x if source is None else source), 6 * self.groups).chunk(6, dim=1)  # (B, G, T, D) each
        k1, k2 = rope(k1, pos, self.base), rope(k2, pos, self.base)
        pos0 = pos1 = pos[:, None]  # (1, 1, T)
        if cache is not None:
            k0, v0, pos0 = cache["open"].append(k0, v0, pos=pos, count=count)
            k1, v1, pos1 = cache["tokens"].append(k1, v1, pos=pos, count=count)
            k2, v2, pos2 = cache["window"].append(k2, v2, pos=pos, count=count)
        blocks = cache and cache["blocks"]

        # 1) compress
        k, v, end = compressed_entries(self.compress, (k0, v0), pos0, pos, self.l, self.d, blocks, count)  # (B, G, N, D) twice, (B, 1, N)

        # 2) attend to them, select, attend to the blocks selected
        sizes = (self.l, self.d, self.block, self.n, self.scale)
        o_cmp, lists = read_blocks(q, k, v, end, pos, pos1.shape[-1], *sizes, cache=cache)  # (B, H, T, D), ..
        o_slc = selected_attention(q.to(k1.dtype), k1, v1, lists, pos, pos1, self.block, self.scale, cache=cache)  # (B, H, T, D)

        # 3) slide
        if cache is None:
            o_win = window_attention(q, k2, v2, self.window, self.scale)  # (B, H, T, D)
        else:
            o_win = read_slots(q.to(k2.dtype), k2, v2, pos, pos2, cache["window"], self.scale, self.window)  # (B, H, T, D)

        # 4) gate
        o = mix(self.gate(x).sigmoid(), o_cmp, o_slc, o_win)  # (B, H, T, D)
        if trace is not None:
            trace.update(lists=lists, blocks=visible(pos, end))
        return self.out(merge_heads(o.to(x.dtype)))


# ---------------------------------------------------------------------------------------------------------------------------------
# ASA: local layers are LatentAttention(latents=1, window=W); this is the global one


class ASAGlobal(LatentAttention):
    """Compression and selection on shared latents: group j of the heads owns latent j, which is also its selection group.

    l = d = l' = 16, so eq. 9 is the identity; the lists of 4 queries are one. Trains and decodes absorbed: a group's heads then read the
    same key [c ; k_r] and value c, which is what a kernel needs to work on blocks. Caches G R + P numbers for each token and each block.
    """

    def __init__(self, width, heads, head_width, latents, rank, rotary, n, base=10000.0, eps=1e-6):
        super().__init__(width, heads, head_width, latents, rank, rotary, base=base, eps=eps)
        if n < 3:
            raise ValueError(f"a list needs n >= 3 blocks, of which 3 are forced; got {n}")
        self.n, self.groups = n, latents
        self.pool = nn.Parameter(torch.zeros(latents, ASA_BLOCK))  # phi: a logit per place in the block; zero = the mean
        self.gate = nn.Linear(width, 2 * heads)

    def new_cache(self, batch, max_len, margin=8, dtype=torch.float32, device="cpu"):
        widths = ((self.latents, self.rank), (1, self.rotary))
        kind, lists = {"dtype": dtype, "device": device}, ((self.latents, min(self.n, -(-max_len // ASA_BLOCK))),)
        return {
            "tokens": SlotCache(batch, max_len, widths, margin=margin, **kind),
            "blocks": SlotCache(batch, max(1, max_len // ASA_BLOCK), widths, **kind),
            # the lists that a query may still need: its own quartet's, or an earlier one's after a rejected draft; T-independent
            "lists": SlotCache(batch, max_len, lists, window=2, margin=margin // SHARE + 1, dtype=torch.int32, device=device),
        }

    def compress(self, c, k_r, end=None):
        """Latents (B, G, N, 16, R) -> weighted means (B, G, N, R); rotary keys (B, 1, N, 16, P) -> their mean, turned to the middle.

        Turning the rotated key of place i by 7.5 - i undoes the rotation within the block, so fast frequencies do not average out:
        R(16 b + 7.5) mean_i r_i = mean_i R(7.5 - i) R(16 b + i) r_i.
        """
        weight = self.pool.softmax(-1)[:, None, :, None]  # (G, 1, 16, 1)
        c = (c * weight.to(c.dtype)).sum(-2)  # (B, G, N, R)
        turn = (ASA_BLOCK - 1) / 2 - torch.arange(ASA_BLOCK, device=k_r.device)  # (16,)
        k_r = rope(k_r.flatten(1, 2), turn[None], self.base).unflatten(1, k_r.shape[1:3])  # (B, 1, N, 16, P)
        return c, k_r.mean(-2)

    def forward(self, x, pos, cache=None, count=None, source=None, trace=None):
        q_c, q_r, c, k_r = self.project(x, pos, source)
        q = self.absorb(q_c, q_r)  # (B, H, T, R + P)
        k_pos = pos[:, None]  # (1, 1, T)
        if cache is None:
            c, k_r = c.to(q.dtype), k_r.to(q.dtype)
        else:
            c, k_r, k_pos = cache["tokens"].append(c, k_r, pos=pos, count=count)  # (B, G, S, R), (B, 1, S, P), (B, 1, S)
            q = q.to(c.dtype)
        blocks = cache and cache["blocks"]
        every = SHARE if cache is None else 1

        # 1) compress
        c_b, r_b, end = compressed_entries(self.compress, (c, k_r), k_pos, pos, ASA_BLOCK, ASA_BLOCK, blocks, count)  # (B, G, N, R), ..

        # 2) attend to them, select one list for 4 queries, attend to the blocks selected
        sizes = (ASA_BLOCK, ASA_BLOCK, ASA_BLOCK, self.n, self.scale)
        o_cmp, lists = read_blocks(q, c_b, c_b, end, pos, c.shape[2], *sizes, r_b, every, cache)  # (B, H, T, R), (B, G, T / every, n)
        if cache is not None:
            lists = self.cached_lists(lists, pos, count, cache["lists"])
        o_slc = selected_attention(q, c, c, lists, pos, k_pos, ASA_BLOCK, self.scale, k_r, every, cache)  # (B, H, T, R)

        # 4) gate, still on latents: W_UV is linear and comes last
        if trace is not None:
            trace.update(lists=lists, blocks=visible(pos, end))
        return self.finish(mix(self.gate(x).sigmoid(), o_cmp, o_slc)).to(x.dtype)

    def cached_lists(self, lists, pos, count, cache):
        """share_lists when the first queries' list was made in an earlier call: read it from the cache, then store this call's."""
        first, T = pos[:, :1], pos.shape[1]
        slot = find(cache.pos[:, 0], first - first % SHARE)  # (B, 1)
        earlier = cache.data[0].gather(2, slot[:, None, :, None].expand(-1, lists.shape[1], -1, lists.shape[3])).long()  # (B, G, 1, n)
        shared = share_lists(lists, pos, earlier)
        row = -first % SHARE + torch.arange(0, T + SHARE - 1, SHARE, device=pos.device)  # (B, ceil) rows whose position is a t0
        fresh = lists.gather(2, row.clamp(max=T - 1)[:, None, :, None].expand(-1, lists.shape[1], -1, lists.shape[3]))
        cache.append(fresh, pos=first + row, count=(row < count[:, None]).sum(-1))
        return shared


# ---------------------------------------------------------------------------------------------------------------------------------


def tokens_read(layer, x):
    """What the last query of x (1, T, C) reads in a layer: (compressed blocks, chosen tokens or window, both masks (blocks,), (T,))."""
    T, trace = x.shape[1], {}
    pos = torch.arange(T)[None]
    if isinstance(layer, (NSA, ASAGlobal)):
        layer(x, pos, trace=trace)
        block = getattr(layer, "block", ASA_BLOCK)
        chosen = chosen_tokens(trace["lists"][:, :1, -1:], pos[:, None], block, visible(pos[:, -1:], pos[:, None]))[0, 0, 0]  # (T,)
    else:
        chosen = torch.zeros(T, dtype=torch.bool)
    window = getattr(layer, "window", None)
    slide = visible(pos[:, -1:], pos[:, None], window)[0, 0, 0] if window else torch.zeros(T, dtype=torch.bool)  # (T,)
    return trace["blocks"][0, 0, -1] if trace else torch.zeros(0, dtype=torch.bool), chosen, slide


@torch.no_grad()
def main():
    torch.manual_seed(0)
    C, H, G, D, W = 64, 4, 2, 16, 64
    layers = {
        "NSA": NSA(C, H, G, D, W, n=4, block=32),
        "ASA local": LatentAttention(C, H, D, 1, 4 * D, D // 2, window=W),
        "ASA global": ASAGlobal(C, H, D, G, 2 * D, D // 2, n=16),
    }
    T = 1024
    text = torch.randn(1, 2048, C)
    print(f"What the query at {T - 1} reads; one mark = 16 tokens, untrained weights.  o compressed  # selected  - window  . nothing\n")
    for name, layer in layers.items():
        blocks, chosen, slide = tokens_read(layer, text[:, :T])
        any16 = lambda mask: mask.view(-1, 16).any(-1).tolist()
        print(f"{name:10} compressed {'o' * int(blocks.sum()) or '(none)'}")
        print(f"{'':10} tokens     {''.join('#' if c else '-' if s else '.' for c, s in zip(any16(chosen), any16(slide)))}")
    print("\nEntries that one query reads, as a share of all keys (counted: finished blocks + chosen tokens + window)\n")
    lengths = (256, 512, 1024, 2048)
    print(f"{'T':10}" + "".join(f"{t:>16}" for t in lengths))
    for name, layer in layers.items():
        counts = [sum(int(mask.sum()) for mask in tokens_read(layer, text[:, :t])) for t in lengths]
        print(f"{name:10}" + "".join(f"{n:>8} {n / t:7.1%}" for n, t in zip(counts, lengths)))
    x, pos = text[:, :100].double(), torch.arange(100)[None]
    layer = layers["ASA global"].double()
    whole, cache = layer(x, pos), layer.new_cache(1, 100, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.long)
    steps = torch.cat([layer(x[:, t : t + 1], pos[:, t : t + 1], cache, one) for t in range(100)], dim=1)
    print(f"\nASA global, 100 tokens one by one from a cache of {cache_bytes([cache])} bytes = all at once: "
          f"max difference {(steps - whole).abs().max():.1e} (fp64)")


if __name__ == "__main__":
    main()
