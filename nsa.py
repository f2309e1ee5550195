"""Which cached entries a query reads: compressed blocks, its best blocks, a window.

NSA (native sparse attention, arXiv 2502.11089): every layer mixes three branches with own keys and values.
ASA (alternating sparse attention, arXiv 2511.00819): even layers are local (MLA in a window, which is
latent_attention.LatentAttention), odd layers are global (compression and selection on one GLA latent for each
group of heads). Its cache is less than a third of NSA's.

    1) compress  a learned phi makes one entry of a block of l tokens, every d tokens; a query attends to all
                 finished blocks
    2) select    the weights of this attention score blocks of l' tokens. Block 0, the query's own block and
                 the one before it are forced, the best others fill the list up to n. The query attends to
                 the tokens of its list
    3) slide     the last W tokens (NSA only; in ASA this is the other kind of layer)
    4) gate      a sigmoid for each head and branch mixes the outputs

One rule serves training, prefill, decoding and verification: a query reads an entry if its position is not
after the query's, and a compressed entry stands at the position of its block's last token.

Top-n passes no gradient: phi and the block scores learn through the output of the compressed branch. These
definitions score every key and mask; on a GPU kernels.py replaces the decorated ones.
Ours, where the papers' bodies are not available or silent: every width; ASA's block 16 and lists shared by 4
queries follow secondary sources; content is pooled un-rotated, and the rotary key is turned to its block's
middle; NSA's phi is the mean plus an MLP; ASA's phi is a learned weighted mean; the 0-based form of NSA's
eq. 9; NSA's gate is one linear layer.
Does NOT include: several texts packed in one row.
Run `python nsa.py` for a map of what one query reads. Read first: latent_attention.py.

Letters as in latent_attention.py, and N compressed blocks, l block length, d stride between block starts, l'
(in code: block) selection block, n blocks in a list. Equation numbers are NSA's.
"""

import sys
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import fast_path
from latent_attention import LatentAttention, SlotCache, attend, cache_bytes, cached_attention, keys_of
from latent_attention import merge_heads, rope, split_heads, visible, window_attention

SHARE = 4  # ASA: so many consecutive queries share one list
ASA_BLOCK = 16  # ASA: l = d = l'


class Blocks(NamedTuple):
    """Sizes of blocks and lists."""

    l: int  # tokens in a compressed block
    d: int  # tokens from the start of one to the start of the next
    block: int  # l', tokens in a selection block
    n: int  # blocks in a list
    share: int = 1  # consecutive queries that have one list


# ------------------------------------------------------------------------------------------------------------
# 1) Compress


def blocks_done(tokens, l, d):
    """How many blocks [i d, i d + l) are complete after `tokens` tokens (a tensor or an int)."""
    return (tokens >= l) * ((tokens - l) // d + 1)


def compressed_keys(compress, tokens, pos, sizes, cache=None, count=None):
    """The compressed entries that these queries may read, one for each finished block: eq. 7 -> Keys.

    compress  makes {field of Keys: (B, G, N, width)} of the blocks' tokens, (B, G, N, l, width) for each
    field
              of `tokens`, and of the positions (B or 1, N) of the blocks' last tokens
    tokens    Keys of what blocks are made of; pos (B or 1, T) of these queries
    cache     of finished blocks, to which those are appended that count[b] of the T tokens finish. A block is
              made of its tokens' cache entries alone: nothing is carried along, nothing has to be taken back.
              None: `tokens` is a whole text, token t at row t. count None: nothing is finished.
    """
    if cache is not None and count is None:
        return cache.append(pos, None)
    T = pos.shape[1]
    parts = [x for x in (tokens.k, tokens.v, tokens.k2) if x is not None]  # (B, G, S, width) each
    if cache is None:
        ids = torch.arange(blocks_done(T, sizes.l, sizes.d), device=pos.device)[None]  # (1, N)
        blocks = [blocks_of(x, sizes) for x in parts]  # (B, G, N, l, width) each
    else:
        first = blocks_done(pos[:, :1], sizes.l, sizes.d)  # (B, 1) blocks that were finished before
        ids = first + torch.arange(-(-T // sizes.d), device=pos.device)  # (B, N): T tokens finish no more
        wanted = ids[..., None] * sizes.d + torch.arange(sizes.l, device=pos.device)  # (B, N, l) positions
        blocks = [pick(x, find(tokens.pos[:, 0], wanted)) for x in parts]  # (B, G, N, l, width) each
    end = ids * sizes.d + sizes.l - 1  # (B or 1, N)
    entries = {name: x.to(tokens.k.dtype) for name, x in compress(*blocks, end).items()}  # (B, G, N, width)
    if cache is not None:
        done = blocks_done(pos[:, 0] + count, sizes.l, sizes.d)  # (B,)
        count = done - first[:, 0]
    return keys_of(cache, end, count, **entries)


def blocks_of(x, sizes):
    """The finished blocks of a whole text: (B, G, T, width) -> (B, G, N, l, width)."""
    T = x.shape[2]
    x = F.pad(x, (0, 0, 0, max(0, sizes.l - T)))  # unfold needs one whole block, even if it is cut off again
    return x.unfold(2, sizes.l, sizes.d)[:, :, : blocks_done(T, sizes.l, sizes.d)].transpose(-1, -2)


def find(k_pos, wanted):
    """The slot that holds a position, or any slot: k_pos (B, S), wanted (B, ...) -> (B, ...)."""
    return (k_pos[:, None] == wanted.flatten(1)[..., None]).byte().argmax(-1).view_as(wanted)


def pick(x, slot):
    """What lies in these slots: x (B, G, S, width), slot (B, ...) -> (B, G, ..., width)."""
    B, G, _, width = x.shape
    index = slot.view(B, 1, -1, 1).expand(-1, G, -1, width)
    return x.gather(2, index).view(B, G, *slot.shape[1:], width)


# ------------------------------------------------------------------------------------------------------------
# 2) Select


def attend_with_weights(q, k, v, see, scale):
    """Attention and its weights, which score the blocks: eqs 5, 8 (with the 1/sqrt(width) that 8 leaves out).

    q (B, H, T, Dk), k (B, G, N, Dk), v (B, G, N, Dv), see (B or 1, G or 1, T, N)
    -> o (B, H, T, Dv), p (B, H, T, N) in fp32 or better. A query that sees nothing gets exactly 0.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q = q.unflatten(1, (k.shape[1], -1)).to(wide)  # (B, G, h, T, Dk)
        s = q @ k[:, :, None].to(wide).transpose(-1, -2) * scale  # (B, G, h, T, N)
        see = see[:, :, None]  # (B, G or 1, 1, T, N)
        p = s.masked_fill(~see, -1e30).softmax(-1) * see  # (B, G, h, T, N); -inf would give 0/0 in empty rows
        o = p.to(v.dtype) @ v[:, :, None]  # (B, G, h, T, Dv)
    return o.flatten(1, 2), p.flatten(1, 2)


def block_importance(p, groups, sizes, tokens):
    """Scores of the selection blocks, summed over a group's heads: eqs 9, 10, in the 0-based geometric form.

    p_slc[j] = sum over m < l'/d, n < l/d of p_cmp[(l'/d) j + m - n]: a compressed block counts once for each
    stride that it shares with selection block j (1 2 2 2 1 times at l 32, d 16, l' 64). Read 0-based as
    printed, eq. 9 would score mostly earlier blocks. p (B, H, T, N) -> (B, groups, T, ceil(tokens / l')).
    """
    fold = sizes.block // sizes.d  # compressed blocks that begin in a selection block
    i = torch.arange(p.shape[-1], device=p.device)[:, None]  # (N, 1)
    j = torch.arange(-(-tokens // sizes.block), device=p.device)  # (blocks,)
    strides = range(sizes.l // sizes.d)
    weight = sum((i == fold * j + m - n) for m in range(fold) for n in strides)  # (N, blocks)
    return p.unflatten(1, (groups, -1)).sum(2) @ weight.to(p.dtype)


def select_blocks(importance, pos, sizes):
    """The list of every query: block 0, its own, the one before it, and the most important others: eq. 11.

    importance (B, G, T, blocks), pos (B or 1, T) -> (B, G, T, min(n, blocks)) block numbers, which ascend and
    end with -1 where there are fewer.
    """
    blocks = importance.shape[-1]
    j = torch.arange(blocks, device=pos.device)
    own = (pos // sizes.block)[:, None, :, None]  # (B or 1, 1, T, 1)
    forced = (j == 0) | (j == own) | (j == own - 1)  # (B or 1, 1, T, blocks)
    score = importance.masked_fill(forced, torch.inf).masked_fill(j > own, -torch.inf)
    score, chosen = score.topk(min(sizes.n, blocks), dim=-1)  # (B, G, T, n)
    chosen = chosen.masked_fill(score == -torch.inf, blocks).sort(-1).values
    return chosen.masked_fill(chosen == blocks, -1)


@fast_path
def compressed_attention(q, q_pos, keys, tokens, sizes, scale):
    """Attention to the compressed entries, and the lists of blocks that its weights choose.

    q (B, H, T, Dk), q_pos (B or 1, T), keys of the N entries, tokens: how many can be chosen from
    -> o (B, H, T, Dv), lists (B, G, ceil(T / share), n): of every share-th query.
    """
    k, v = keys.joined()
    o, p = attend_with_weights(q, k, v, visible(q_pos, keys.pos), scale)  # (B, H, T, Dv), (B, H, T, N)
    importance = block_importance(p.detach()[:, :, :: sizes.share], k.shape[1], sizes, tokens)
    return o, select_blocks(importance, q_pos[:, :: sizes.share], sizes)


def chosen_tokens(lists, k_pos, block, see):
    """Which tokens the blocks of a query hold, of those that it may see.

    lists (B, G, T, n), k_pos (B or 1, heads, S), see (B or 1, heads, T, S) -> (B, G, T, S) bool.
    """
    B, G, T, _ = lists.shape
    blocks = k_pos.shape[-1] // block + 2
    chosen = torch.zeros(B, G, T, blocks, dtype=torch.bool, device=lists.device)
    index = lists.masked_fill(lists < 0, blocks - 1).long()  # (B, G, T, n); no token is in the last block
    chosen.scatter_(-1, index, True)
    key_block = (k_pos.clamp(min=0) // block).long()[:, :, None].expand(B, G, T, -1)  # (B, G, T, S)
    return chosen.gather(-1, key_block) & see


@fast_path
def selected_attention(q, q_pos, keys, lists, sizes, scale):
    """Attention to the tokens of the lists' blocks: eq. 12. All keys are scored here, then masked.

    q (B, H, T, Dk), q_pos (B or 1, T), keys of the tokens, lists (B, G, ceil(T / share), n) -> (B, H, T, Dv).
    Kernels count on lists as compressed_attention gives them: ascending, the own block last, then -1.
    """
    lists = lists.repeat_interleave(sizes.share, 2)[:, :, : q.shape[2]]  # (B, G, T, n)
    see = chosen_tokens(lists, keys.pos, sizes.block, visible(q_pos, keys.pos))  # (B, G, T, S)
    return attend(q, *keys.joined(), see, scale)


@fast_path
def mix(gates, *branches):
    """The sum of gate x branch: eq. 5. Two or three branches (B, H, T, D), gates (B, T, branches H)."""
    columns = len(branches) * branches[0].shape[1]
    gates = split_heads(gates, columns).to(branches[0].dtype).chunk(len(branches), dim=1)  # (B, H, T, 1) each
    return sum(gate * branch for gate, branch in zip(gates, branches))


# ------------------------------------------------------------------------------------------------------------
# NSA: all three branches in every layer


class Phi(nn.Module):
    """NSA's compressor of l tokens: the block's mean (ours) plus an MLP on block and places, 0 at first."""

    def __init__(self, l, head_width):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(l, head_width))
        self.up = nn.Linear(l * head_width, head_width, bias=False)
        self.down = nn.Linear(head_width, head_width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x):  # (B, G, N, l, D) -> (B, G, N, D)
        placed = (x + self.place.to(x.dtype)).flatten(-2)  # (B, G, N, l D)
        return x.mean(-2) + self.down(F.gelu(self.up(placed)))


class NSA(nn.Module):
    """Compressed, selected and sliding attention, each with its own keys and values of G groups.

    l block length, d stride, block = l' selection block, n blocks in a list, window W. It caches T/d, T and W
    tokens. Methods as in GQA; a dict `trace` receives the lists and what is visible, for pictures and tests.
    """

    def __init__(self, width, heads, groups, head_width, window, n, l=32, d=16, block=64, base=10000.0):
        super().__init__()
        if l % d or block % d or l > block or n < 3:
            raise ValueError(f"NSA needs d | l, d | l', l <= l', n >= 3: l {l}, d {d}, l' {block}, n {n}")
        self.heads = heads
        self.groups = groups
        self.head_width = head_width
        self.window = window
        self.sizes = Blocks(l, d, block, n)
        self.base = base
        self.scale = head_width**-0.5
        self.q = nn.Linear(width, heads * head_width, bias=False)
        self.kv = nn.Linear(width, 6 * groups * head_width, bias=False)  # k and v of three branches
        self.phi_k = Phi(l, head_width)
        self.phi_v = Phi(l, head_width)
        self.gate = nn.Linear(width, 3 * heads)  # eq. 5
        self.out = nn.Linear(heads * head_width, width, bias=False)

    def new_cache(self, batch, max_len, margin=8, **kind):
        widths = dict.fromkeys(("k", "v"), (self.groups, self.head_width))
        blocks = max(1, blocks_done(max_len, self.sizes.l, self.sizes.d))
        return {
            "open": SlotCache(batch, max_len, widths, self.sizes.l, margin, **kind),  # not yet compressed
            "blocks": SlotCache(batch, blocks, widths, **kind),
            "tokens": SlotCache(batch, max_len, widths, margin=margin, **kind),
            "window": SlotCache(batch, max_len, widths, self.window, margin, **kind),
        }

    def compress(self, k, v, end):
        """Un-rotated k, v (B, G, N, l, D) of blocks -> (B, G, N, D); the key turns to its block's middle."""
        middle = end - (self.sizes.l - 1) / 2  # (B or 1, N)
        return {"k": rope(self.phi_k(k), middle, self.base), "v": self.phi_v(v)}

    def forward(self, x, pos, cache=None, count=None, source=None, trace=None):
        q = rope(split_heads(self.q(x), self.heads), pos, self.base)  # (B, H, T, D)
        kv = split_heads(self.kv(x if source is None else source), 6 * self.groups)  # (B, 6 G, T, D)
        k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = kv.chunk(6, dim=1)  # (B, G, T, D) each
        slots = cache or dict.fromkeys(("open", "blocks", "tokens", "window"))
        open_tokens = keys_of(slots["open"], pos, count, k_cmp, v_cmp)
        tokens = keys_of(slots["tokens"], pos, count, rope(k_slc, pos, self.base), v_slc)
        nearby = keys_of(slots["window"], pos, count, rope(k_win, pos, self.base), v_win)
        q = q.to(tokens.k.dtype)

        # 1) compress
        blocks = compressed_keys(self.compress, open_tokens, pos, self.sizes, slots["blocks"], count)

        # 2) attend to the blocks, choose the best, attend to their tokens
        S = tokens.k.shape[2]  # tokens that can be chosen from
        o_cmp, lists = compressed_attention(q, pos, blocks, S, self.sizes, self.scale)  # (B, H, T, D), ..
        o_slc = selected_attention(q, pos, tokens, lists, self.sizes, self.scale)  # (B, H, T, D)

        # 3) slide
        if cache is None:
            o_win = window_attention(q, nearby, self.window, self.scale)  # (B, H, T, D)
        else:
            o_win = cached_attention(q, pos, nearby, self.scale, self.window)  # (B, H, T, D)

        # 4) gate
        if trace is not None:
            trace.update(lists=lists, blocks=visible(pos, blocks.pos))
        o = mix(self.gate(x).sigmoid(), o_cmp, o_slc, o_win)  # (B, H, T, D)
        return self.out(merge_heads(o.to(x.dtype)))


# ------------------------------------------------------------------------------------------------------------
# ASA: local layers are LatentAttention(latents=1, window=W); this is the global one


class ASAGlobal(LatentAttention):
    """Compression and selection on shared latents: group j of the heads owns latent j and its lists.

    l = d = l' = 16, so eq. 9 is the identity; 4 queries share a list. It trains and decodes absorbed: all
    heads of a group then read the same key [c ; k_r] and value c, as a kernel that works on blocks needs it.
    It caches G R + P numbers for each token and each block.
    """

    def __init__(self, width, heads, head_width, latents, rank, rotary, n, base=10000.0, eps=1e-6):
        super().__init__(width, heads, head_width, latents, rank, rotary, base=base, eps=eps)
        if n < 3:
            raise ValueError(f"a list needs n >= 3 blocks, of which 3 are forced; got {n}")
        self.sizes = Blocks(ASA_BLOCK, ASA_BLOCK, ASA_BLOCK, n, SHARE)
        self.groups = latents
        self.pool = nn.Parameter(torch.zeros(latents, ASA_BLOCK))  # phi: logits of the places; 0 is the mean
        self.gate = nn.Linear(width, 2 * heads)

    def new_cache(self, batch, max_len, margin=8, dtype=torch.float32, device="cpu"):
        widths = {"k": (self.latents, self.rank), "k2": (1, self.rotary)}
        kind = {"dtype": dtype, "device": device}
        blocks = max_len // ASA_BLOCK
        # A query may still need the list of its own four and, after a rejected draft, earlier ones.
        lists = {"k": (self.latents, min(self.sizes.n, blocks + (max_len % ASA_BLOCK > 0)))}
        return {
            "tokens": SlotCache(batch, max_len, widths, margin=margin, **kind),
            "blocks": SlotCache(batch, max(1, blocks), widths, **kind),
            "lists": SlotCache(batch, max_len, lists, 2, margin // SHARE + 1, torch.int32, device),
        }

    def compress(self, c, k_r, end):
        """Latents c (B, G, N, 16, R) -> weighted means; rotary keys k_r (B, 1, N, 16, P) -> turned means.

        Turning the rotated key of place i by 7.5 - i undoes the rotation within the block, so fast
        frequencies do not average out: R(16 b + 7.5) mean_i r_i = mean_i R(7.5 - i) R(16 b + i) r_i.
        """
        weight = self.pool.softmax(-1)[:, None, :, None]  # (G, 1, 16, 1)
        turn = (ASA_BLOCK - 1) / 2 - torch.arange(ASA_BLOCK, device=k_r.device)  # (16,)
        turned = rope(k_r.flatten(1, 2), turn[None], self.base).view_as(k_r)  # (B, 1, N, 16, P)
        return {"k": (c * weight.to(c.dtype)).sum(-2), "k2": turned.mean(-2)}

    def folded(self):
        """W_UK within W_UQ (H (R + P), C / 2), W_UV within W_O (C, H R): `absorb` and `finish` in advance.

        With R = D a query and an output then cost what they cost without latents. It pays from 3/4 C tokens.
        """
        up_c, up_r = self.q_up.weight.unflatten(0, (self.heads, -1)).tensor_split([-self.rotary], dim=1)
        up_c = torch.einsum("hdc,hdr->hrc", up_c, self.k_up)  # (H, R, C / 2)
        up = torch.cat([up_c, up_r.to(up_c.dtype)], dim=1)  # (H, R + P, C / 2)
        out = self.out.weight.unflatten(1, (self.heads, -1))  # (C, H, D)
        return up.flatten(0, 1), torch.einsum("chd,hdr->chr", out, self.v_up).flatten(1)

    def forward(self, x, pos, cache=None, count=None, source=None, trace=None):
        if cache is None:
            up, out = self.folded()
            q, c, k_r = self.project(x, pos, source, up)  # (B, H, T, R + P), ..
        else:  # of a few tokens
            q, c, k_r = self.project(x, pos, source)
            q = self.absorb(q)
        slots = cache or dict.fromkeys(("tokens", "blocks"))
        tokens = keys_of(slots["tokens"], pos, count, c.to(q.dtype), k2=k_r.to(q.dtype))
        q = q.to(tokens.k.dtype)
        # With a cache every query makes a list, and shared_lists then picks those that count.
        sizes = self.sizes if cache is None else self.sizes._replace(share=1)

        # 1) compress
        blocks = compressed_keys(self.compress, tokens, pos, sizes, slots["blocks"], count)

        # 2) attend to the blocks, choose one list for 4 queries, attend to its tokens
        S = tokens.k.shape[2]  # tokens that can be chosen from
        o_cmp, lists = compressed_attention(q, pos, blocks, S, sizes, self.scale)  # (B, H, T, R), ..
        if cache is not None:
            lists = self.shared_lists(lists, pos, count, cache["lists"])  # (B, G, T, n)
        o_slc = selected_attention(q, pos, tokens, lists, sizes, self.scale)  # (B, H, T, R)

        # 4) gate, still on latents: W_UV is linear and comes last, in W_O (3, slide, is the local layer)
        if trace is not None:
            trace.update(lists=lists, blocks=visible(pos, blocks.pos))
        o = mix(self.gate(x).sigmoid(), o_cmp, o_slc)  # (B, H, T, R)
        return F.linear(merge_heads(o), out) if cache is None else self.finish(o)

    def shared_lists(self, lists, pos, count, cache):
        """Every query's list is that of t0 = 4 floor(t / 4), which may have been made in an earlier call.

        lists (B, G, T, n) of these queries, of which those at a t0 are cached -> (B, G, T, n).
        """
        T = pos.shape[1]
        first = pos[:, :1]  # (B, 1)
        fours = torch.arange(0, T + SHARE - 1, SHARE, device=pos.device)  # (fours,)
        row = -first % SHARE + fours  # (B, fours): the rows whose positions are a t0, some of them beyond T
        fresh = pick(lists, row.clamp(max=T - 1))  # (B, G, fours, n)
        real = (row < count[:, None]).sum(-1)  # (B,)
        held = cache.append(first + row, real, k=fresh)
        slot = find(held.pos[:, 0], pos - pos % SHARE)  # (B, T)
        return pick(held.k, slot)


# ------------------------------------------------------------------------------------------------------------


def tokens_read(layer, x):
    """Masks of what the last query of x (1, T, C) reads: blocks (N,), chosen tokens (T,), a window (T,)."""
    T = x.shape[1]
    pos = torch.arange(T)[None]  # (1, T)
    trace = {}
    blocks = torch.zeros(0, dtype=torch.bool)
    chosen = torch.zeros(T, dtype=torch.bool)
    slide = torch.zeros(T, dtype=torch.bool)
    if isinstance(layer, (NSA, ASAGlobal)):
        layer(x, pos, trace=trace)
        before = visible(pos[:, -1:], pos[:, None])  # (1, 1, 1, T)
        lists = trace["lists"][:, :1, -1:]  # (1, 1, 1, n)
        chosen = chosen_tokens(lists, pos[:, None], layer.sizes.block, before).flatten()
        blocks = trace["blocks"][0, 0, -1]
    if layer.window is not None:
        slide = visible(pos[:, -1:], pos[:, None], layer.window).flatten()
    return blocks, chosen, slide


@torch.no_grad()
def main():
    torch.manual_seed(0)
    C, H, G, D, W = 64, 4, 2, 16, 128
    T = 1024
    layers = {
        "NSA": NSA(C, H, G, D, W, n=4, block=32),
        "ASA local": LatentAttention(C, H, D, 1, 4 * D, D // 2, window=W),
        "ASA global": ASAGlobal(C, H, D, G, D, D // 2, n=16),
    }
    text = torch.randn(1, 2048, C)
    print(f"What the query at {T - 1} reads, untrained weights; one mark is 16 tokens")
    print("o compressed   # selected   - window   . nothing\n")
    for name, layer in layers.items():
        blocks, chosen, slide = tokens_read(layer, text[:, :T])
        parts = zip(chosen.split(16), slide.split(16))
        marks = ["#" if chosen.any() else "-" if slide.any() else "." for chosen, slide in parts]
        print(f"{name:10} compressed {'o' * int(blocks.sum()) or '(none)'}")
        print(f"{'':10} tokens     {''.join(marks)}")
    print("\nEntries that one query reads (blocks + chosen tokens + window), as a share of all keys\n")
    lengths = (256, 512, 1024, 2048)
    print(f"{'T':10}" + "".join(f"{t:>16}" for t in lengths))
    for name, layer in layers.items():
        counts = [sum(int(mask.sum()) for mask in tokens_read(layer, text[:, :t])) for t in lengths]
        print(f"{name:10}" + "".join(f"{n:>8} {n / t:7.1%}" for n, t in zip(counts, lengths)))

    x = text[:, :100].double()
    pos = torch.arange(100)[None]
    layer = layers["ASA global"].double()
    cache = layer.new_cache(1, 100, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.long)
    steps = [layer(x[:, t : t + 1], pos[:, t : t + 1], cache, one) for t in range(100)]
    difference = (torch.cat(steps, dim=1) - layer(x, pos)).abs().max()
    print(f"\nASA global, 100 tokens one by one from a cache of {cache_bytes([cache])} bytes = all at once:")
    print(f"max difference {difference:.1e} (fp64)")


if __name__ == "__main__":
    if sys.argv[1:]:  # --help
        print(__doc__)
    else:
        main()
