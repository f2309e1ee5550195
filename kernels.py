"""Attention on a GPU, in Triton: window, compressed and selected attention with their gradients, and what a decoding step does.

The definition is the PyTorch code in latent_attention.py, nsa.py and mtp.py; these kernels never change what is computed, only how often
memory is touched. test_all.py compares them with it, on a CPU in Triton's interpreter (TRITON_INTERPRET=1).

What moves: the h heads of a group read the same keys. One program keeps a tile of BQ queries x h heads on the chip and walks through the
keys that they may read, BN at a time: load keys and values, multiply, add up. A key is loaded once for BQ h rows, and the T x S weights
are never written: to memory go the output and one number per row, lse, from which the backward pass makes the weights again.

    1) rope               angles, rotation and halves in one pass over x; its gradient is the rotation back
    2) walk               attention as above, over tokens, compressed entries or the blocks of a list; forward, dq, dk and dv
    3) select             block scores, made again from the compressed branch's lse and summed over heads by a matrix product; the n best
    4) mix                the gates, and the heads merged
    5) append             keys, values and positions of new tokens to their slots, each row at its own length
    6) decode_attention   a few queries per row against its slots, or those of its list's blocks, split over the slots; and which blocks
    7) draw               softmax and one sample of it
    8) commit             drafts accepted or refused, the token after them, stops and limits (mtp.py)

One walk serves three branches, which differ in the keys that a query reads, and so in the tile:

    window       key i stands at position i, the last W are read            many queries; tiles of keys between two diagonals
    compressed   entry i stands at position i d + l - 1, all before         many queries; tiles of keys up to a stair
    selected     the blocks of a list, the query's own block last           the 1 (NSA) or 4 (ASA) queries of a list; blocks, some a step

    forward   s = scale q k, lse = log sum exp s, o = sum exp(s - lse) v, with a running maximum (FlashAttention, arXiv 2205.14135)
    backward  p = exp(s - lse), delta = do . o, ds = p (do . v - delta); dq = scale ds k walks as the forward pass does; for
              dk = scale ds q and dv = p do a tile of keys walks through the tiles of queries that read it. Which those are follows from
              the positions, or, with lists, from sorting their entries by block.

Sums are taken in a fixed order, never by atomics: two runs give the same bits. A key may be [k ; k2] with k2 shared by all groups (the
rotary key), and the value may be the key's first part (a latent): then one load serves both. What lies behind the end of a shorter row is
never read by what lies before it. A block's tokens are fetched anew by every list that holds it: at 64k and n l' = 1024 that is 137 GB per
layer at 4 groups of width 128, 13 ms at the pace of an H200's L2 cache, which is why lists shared by 4 queries pay.

Limits: widths up to 256, up to 64 heads in a group (32 where 4 queries share a list), blocks of 16 to 128 tokens. Does NOT include: FP8,
paging, packed texts.
`python kernels.py` compares them with dense attention, `--bench` times them. Not to be confused with the package `kernels` on PyPI.

Letters as in latent_attention.py and nsa.py. A tile has BM rows, BQ queries x HP: row m is query m // HP, head m % HP. Sizes must be powers
of 2 here, and the rest is masked: HP is h padded, NP n, and PK, P2, PV are the widths DK, D2, DV of k, k2, v. WK, WV: see `align`.
"""
import os
import sys

import torch
import torch.nn.functional as F

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on the CPU

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton, no fast path
    triton = None


PAIRS = {}


class Refused(ValueError):
    pass


def usable(x):
    return False


def fast_path(definition):
    return definition


def fast(x, k=None, v=None, block=16, share=1):
    """Whether the kernels can take x, or queries x with these keys, values and blocks: on a GPU, with Triton, in 16 or 32 bits."""
    able = triton is not None and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return able and (k is None or complaint(x, k, v, None, block, share) is None)


def complaint(q, k, v=None, k2=None, block=16, share=1):
    """What the attention kernels cannot do, as one clear line, or None."""
    h, given = q.shape[1] // k.shape[1], [x for x in (q, k, k2, v) if x is not None]
    if h > 64 or q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} heads in {k.shape[1]} groups: a group has 1 to 64 heads"
    if h * share > 128:
        return f"{share} queries with one list x {h} heads: at most 128 rows read the same blocks"
    if max(x.shape[3] for x in given[1:]) > 256:
        return f"widths {[x.shape[3] for x in given[1:]]}: at most 256"
    if len({x.dtype for x in given}) > 1:
        return "queries, keys and values must be of one dtype"
    if block not in (16, 32, 64, 128):
        return f"blocks of {block} tokens: 16, 32, 64 or 128"


def refuse(what, *args, **more):
    """Raises the complaint, if there is one."""
    if line := complaint(*args, **more):
        raise ValueError(f"{what}: {line}")


if triton is not None:
    # -----------------------------------------------------------------------------------------------------------------------------
    # 1) rope

    @triton.jit
    def rope_kernel(x, out, pos, H, T, xb, xh, xt, pb, pt, sign, log2_base, P: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr):
        """One program: BT tokens of one head. x (B, H, T, P) with strides, its last axis dense; out (B, H, T, P) dense."""
        bh, t = tl.program_id(0).to(tl.int64), tl.program_id(1) * BT + tl.arange(0, BT)  # (BT,)
        b, h = bh // H, bh % H
        i = tl.arange(0, HALF)
        freq = tl.exp2(i.to(tl.float64) * (-2.0 / P) * log2_base).to(tl.float32)  # (HALF,) base^(-2i/P)
        p = tl.load(pos + b * pb + t * pt, mask=t < T, other=0).to(tl.float32)  # (BT,)
        angle = sign * p[:, None] * freq[None, :]  # (BT, HALF)
        cos, sin = tl.cos(angle), tl.sin(angle)
        ok = (t < T)[:, None] & (i < P // 2)[None, :]
        at = x + b * xb + h * xh + t[:, None].to(tl.int64) * xt + i[None, :]
        u, v = tl.load(at, mask=ok, other=0).to(tl.float32), tl.load(at + P // 2, mask=ok, other=0).to(tl.float32)
        to = out + (bh * T + t[:, None]) * P + i[None, :]
        tl.store(to, (u * cos - v * sin).to(out.dtype.element_ty), mask=ok)
        tl.store(to + P // 2, (v * cos + u * sin).to(out.dtype.element_ty), mask=ok)

    # -----------------------------------------------------------------------------------------------------------------------------
    # 2) attention as a walk

    @triton.jit
    def load_rows(x, row, ok, D: tl.constexpr, P: tl.constexpr, STRIDE: tl.constexpr, ALL: tl.constexpr = False):
        """Rows of a matrix, padded with zeros to P columns: x[row, :D] -> (rows, P); only rows that are `ok`, or ALL."""
        d = tl.arange(0, P)
        at = x + row.to(tl.int64)[:, None] * STRIDE + d[None, :]
        if ALL and D == P:
            return tl.load(at)
        elif ALL:
            return tl.load(at, mask=(d < D)[None, :], other=0)
        elif D == P:
            return tl.load(at, mask=ok[:, None], other=0)
        else:
            return tl.load(at, mask=ok[:, None] & (d < D)[None, :], other=0)

    @triton.jit
    def store_rows(x, row, ok, value, D: tl.constexpr, P: tl.constexpr, STRIDE: tl.constexpr):
        """value (rows, P) -> x[row, :D]."""
        d = tl.arange(0, P)
        tl.store(x + row.to(tl.int64)[:, None] * STRIDE + d[None, :], value.to(x.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :])

    @triton.jit
    def align_kernel(x, out, rows, D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr,
                     BR: tl.constexpr):  # fmt: skip
        """One program: BR rows [a ; b] of x, D + D2 wide -> [a ; 0 ; b], W + D2 wide."""
        row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
        store_rows(out, row, row < rows, load_rows(x, row, row < rows, D, P, D + D2), W, P, W + D2)
        if D2 > 0:
            store_rows(out + W, row, row < rows, load_rows(x + D, row, row < rows, D2, P2, D + D2), D2, P2, W + D2)

    @triton.jit
    def dot(a, b, a2, b2, TWO: tl.constexpr):
        """a b^T, and with TWO [a ; a2] [b ; b2]^T; in fp32 without tf32."""
        c = tl.dot(a, tl.trans(b), input_precision="ieee")
        if TWO:
            c = tl.dot(a2, tl.trans(b2), c, input_precision="ieee")
        return c

    @triton.jit
    def span(t, S, l, d, window):
        """The query at position t reads the entries [low, high) of S: entry i, at i d + l - 1, is among its last `window` positions."""
        high = tl.minimum(tl.maximum(t + 1 - l + d, 0) // d, S)
        low = tl.minimum(tl.maximum(t - window - l + 1 + d, 0) // d, high)
        return low, high

    @triton.jit
    def limits(lists, first, T, S, l, d, window, n, BQ: tl.constexpr, BN: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr):
        """Of the walk of queries first .. first + BQ - 1: the four bounds of its three phases, begin <= whole <= edge <= end.

        Between whole and edge every query reads every key, and no mask is needed; before and after it is. Bounds count keys, or, with a
        list, the keys of its blocks one behind the other: only the last block, the queries' own, needs the mask.
        """
        if BLOCK > 0:
            i = tl.arange(0, NP)
            count = tl.sum((tl.load(lists + i, mask=i < n, other=-1) >= 0).to(tl.int32), 0)
            return 0, 0, tl.maximum(count - 1, 0) * BLOCK // BN * BN, count * BLOCK
        else:
            low, high = span(first, S, l, d, window)
            last_low, end = span(tl.minimum(first + BQ, T) - 1, S, l, d, window)
            whole = tl.minimum(low + tl.cdiv(tl.maximum(last_low - low, 0), BN) * BN, end)
            return low, whole, whole + tl.maximum(high - whole, 0) // BN * BN, end

    @triton.jit
    def where_keys_lie(lists, i, end, S, BN: tl.constexpr, BLOCK: tl.constexpr):
        """Rows of the keys i .. i + BN - 1 of a walk -> (BN,): the same numbers, or looked up in the list's blocks, S behind their end."""
        j = tl.arange(0, BN)
        s = i + j  # i is a multiple of BN
        for u in tl.static_range(max(BN // BLOCK, 1) if BLOCK > 0 else 0):  # one number per block: an address per row would be slow
            block = tl.load(lists + i // BLOCK + u, mask=i + u * BLOCK < end, other=2**20)
            s = tl.minimum(tl.where(j // BLOCK == u, block * BLOCK + (j if BN >= BLOCK else i + j) % BLOCK, s), S)
        return s

    @triton.jit
    def tile_of_queries(q, T, h: tl.constexpr, HP: tl.constexpr, DK: tl.constexpr, PK: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr,
                        BQ: tl.constexpr, BM: tl.constexpr):  # fmt: skip
        """This program's group, tile, and its BM rows: positions t, which are ok, where they lie in the group, queries [q ; q2]."""
        bg, tile = tl.program_id(1).to(tl.int64), tl.num_programs(0) - 1 - tl.program_id(0)  # long walks first
        m = tl.arange(0, BM)
        t, head = tile * BQ + m // HP, m % HP  # (BM,)
        ok, row = (head < h) & (m // HP < BQ) & (t < T), head * T + t  # (BM,)
        q += bg * h * T * (DK + D2)
        queries = load_rows(q, row, ok, DK, PK, DK + D2)  # (BM, PK)
        queries2 = load_rows(q + DK, row, ok, D2, P2, DK + D2) if D2 > 0 else queries  # (BM, P2)
        return bg, tile, t, ok, row, queries, queries2

    @triton.jit
    def forward_kernel(q, k, k2, v, lists, out, lse, scale, T, S, G, G2, l, d, window, n, h: tl.constexpr, HP: tl.constexpr,
                       DK: tl.constexpr, WK: tl.constexpr, PK: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr, DV: tl.constexpr,
                       WV: tl.constexpr, PV: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, NP: tl.constexpr,
                       BQ: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
        """One program: BQ queries x the h heads of a group, against the keys of their walk: online softmax, base 2."""
        bg, tile, t, ok, row, queries, queries2 = tile_of_queries(q, T, h, HP, DK, PK, D2, P2, BQ, BM)
        low, high = span(t, S, l, d, window)  # (BM,)
        out, lse = out + bg * h * T * DV, lse + bg * h * T
        k, v, k2 = k + bg * S * WK, v + bg * S * WV, k2 + (bg // G * G2 + bg % G2) * S * D2
        if BLOCK > 0:
            lists += (bg * tl.num_programs(0) + tile) * n

        top = tl.full((BM,), -1e30, tl.float32)
        total = tl.zeros((BM,), tl.float32)
        mean = tl.zeros((BM, PV), tl.float32)
        walk = limits(lists, tile * BQ, T, S, l, d, window, n, BQ, BN, NP, BLOCK)
        for phase in tl.static_range(1 if BLOCK > 0 else 0, 3):  # masked, all read all, masked; the first is empty for lists
            for i in range(walk[phase], walk[phase + 1], BN):
                s = where_keys_lie(lists, i, walk[3], S, BN, BLOCK)  # (BN,)
                keys = load_rows(k, s, s < S, WK, PK, WK, phase == 1)  # (BN, PK)
                keys2 = load_rows(k2, s, s < S, D2, P2, D2, phase == 1) if D2 > 0 else keys  # (BN, P2)
                score = dot(queries, keys, queries2, keys2, D2 > 0)  # (BM, BN)
                if phase != 1:
                    see = (s[None, :] >= low[:, None]) & (s[None, :] < high[:, None])
                    score = tl.where(see, score, -1e30)
                new = tl.maximum(top, tl.max(score, 1) * scale)  # scale includes log2(e)
                p = tl.exp2(score * scale - new[:, None])  # (BM, BN)
                if phase != 1:
                    p = tl.where(see, p, 0.0)
                fade = tl.exp2(top - new)
                total, top = total * fade + tl.sum(p, 1), new
                values = keys if SHARED else load_rows(v, s, s < S, WV, PV, WV, phase == 1)  # (BN, PV)
                mean = tl.dot(p.to(values.dtype), values, mean * fade[:, None], input_precision="ieee")
        some = total > 0
        store_rows(out, row, ok, mean / tl.where(some, total, 1.0)[:, None], DV, PV, DV)
        tl.store(lse + row, tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("inf")), mask=ok)  # empty: all weights are 0

    @triton.jit
    def dq_kernel(q, k, k2, v, lists, out, lse, dout, delta, dq, scale, T, S, G, G2, l, d, window, n, h: tl.constexpr, HP: tl.constexpr,
                  DK: tl.constexpr, WK: tl.constexpr, PK: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr, DV: tl.constexpr,
                  WV: tl.constexpr, PV: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, NP: tl.constexpr, BQ: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
        """The same walk again: dq = scale sum_j p_j (do . v_j - delta) k_j with delta = do . o, which is kept for the keys' turn."""
        bg, tile, t, ok, row, queries, queries2 = tile_of_queries(q, T, h, HP, DK, PK, D2, P2, BQ, BM)
        low, high = span(t, S, l, d, window)  # (BM,)
        group = bg * h * T
        out, lse, dout, delta, dq = out + group * DV, lse + group, dout + group * DV, delta + group, dq + group * (DK + D2)
        douts = load_rows(dout, row, ok, DV, PV, DV)  # (BM, PV)
        inner = tl.sum(douts.to(tl.float32) * load_rows(out, row, ok, DV, PV, DV).to(tl.float32), 1)  # (BM,)
        tl.store(delta + row, inner, mask=ok)
        norm = tl.load(lse + row, mask=ok, other=float("inf"))  # (BM,)
        k, v, k2 = k + bg * S * WK, v + bg * S * WV, k2 + (bg // G * G2 + bg % G2) * S * D2
        if BLOCK > 0:
            lists += (bg * tl.num_programs(0) + tile) * n

        grad = tl.zeros((BM, PK), tl.float32)
        grad2 = tl.zeros((BM, P2), tl.float32)
        walk = limits(lists, tile * BQ, T, S, l, d, window, n, BQ, BN, NP, BLOCK)
        for phase in tl.static_range(1 if BLOCK > 0 else 0, 3):
            for i in range(walk[phase], walk[phase + 1], BN):
                s = where_keys_lie(lists, i, walk[3], S, BN, BLOCK)  # (BN,)
                keys = load_rows(k, s, s < S, WK, PK, WK, phase == 1)  # (BN, PK)
                keys2 = load_rows(k2, s, s < S, D2, P2, D2, phase == 1) if D2 > 0 else keys  # (BN, P2)
                values = keys if SHARED else load_rows(v, s, s < S, WV, PV, WV, phase == 1)  # (BN, PV)
                p = tl.exp2(dot(queries, keys, queries2, keys2, D2 > 0) * scale - norm[:, None])  # (BM, BN)
                if phase != 1:
                    see = (s[None, :] >= low[:, None]) & (s[None, :] < high[:, None])
                    p = tl.where(see, p, 0.0)
                ds = (p * (dot(douts, values, douts, values, False) - inner[:, None])).to(keys.dtype)  # (BM, BN)
                grad = tl.dot(ds, keys, grad, input_precision="ieee")
                if D2 > 0:
                    grad2 = tl.dot(ds, keys2, grad2, input_precision="ieee")
        unit = scale * 0.6931471805599453  # without log2(e)
        store_rows(dq, row, ok, grad * unit, DK, PK, DK + D2)
        if D2 > 0:
            store_rows(dq + DK, row, ok, grad2 * unit, D2, P2, DK + D2)

    @triton.jit
    def dkv_kernel(q, k, k2, v, lse, dout, delta, dk, dk2, dv, readers, owners, begins, ends, scale, T, S, G, G2, l, d, window, blocks,
                   parts, h: tl.constexpr, HP: tl.constexpr, DK: tl.constexpr, WK: tl.constexpr, PK: tl.constexpr, D2: tl.constexpr,
                   P2: tl.constexpr, DV: tl.constexpr, WV: tl.constexpr, PV: tl.constexpr, SHARED: tl.constexpr, LISTED: tl.constexpr,
                   BQ: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip
        """One program: BN keys of a group (one block of the lists) against one piece of the query tiles that read them.

        dv = sum_i p_i do_i, dk = scale sum_i p_i (do_i . v - delta_i) q_i. A piece is one of `parts` equal parts of the tiles of queries
        that see the keys; with lists it is some of the block's readers, from begin to end, as `invert` sorted them.
        With PIECES, dk, dk2 and dv are (pieces, BN, width) and sum_kernel adds them up, in order; without, a block is one piece.
        """
        piece = tl.program_id(0).to(tl.int64)
        R: tl.constexpr = BQ * HP  # rows of a tile of queries; with lists, BM may be less: a tile takes STEPS; or more: BM // R in a step
        STEPS: tl.constexpr = (R + BM - 1) // BM
        if LISTED:
            owner, begin, end = tl.load(owners + piece), tl.load(begins + piece), tl.load(ends + piece)
        else:
            owner = piece // parts
        bg, block = owner // blocks, (owner % blocks).to(tl.int32)
        s = block * BN + tl.arange(0, BN)
        live = s < S
        if not LISTED:
            first, last = block * BN * d + l - 1, ((block + 1) * BN - 1) * d + l - 1 + tl.minimum(window, T)
            begin, end = first // BQ, tl.cdiv(tl.minimum(last, T), BQ)
            share = tl.cdiv(end - begin, parts)
            begin += (piece % parts).to(tl.int32) * share
            end = tl.minimum(begin + share, end)
            whole = tl.minimum(tl.maximum(tl.cdiv(((block + 1) * BN - 1) * d + l - 1, BQ), begin), end)  # from here on all see all keys
            edge = tl.minimum(tl.maximum((first + tl.minimum(window, T)) // BQ, whole), end)  # from here on not any more
            walk = begin, whole, edge, end
        else:
            walk = begin * STEPS, end * STEPS
        keys = load_rows(k + bg * S * WK, s, live, WK, PK, WK)  # (BN, PK)
        keys2 = load_rows(k2 + (bg // G * G2 + bg % G2) * S * D2, s, live, D2, P2, D2) if D2 > 0 else keys  # (BN, P2)
        values = keys if SHARED else load_rows(v + bg * S * WV, s, live, WV, PV, WV)  # (BN, PV)
        gk = tl.zeros((BN, PK), tl.float32)
        gk2 = tl.zeros((BN, P2), tl.float32)
        gv = tl.zeros((BN, PV), tl.float32)
        m = tl.arange(0, BM)
        inside, head, group = m % R // HP, m % HP, bg * h * T
        q, dout, lse, delta = q + group * (WK + D2), dout + group * WV, lse + group, delta + group
        unit = scale * 0.6931471805599453
        for phase in tl.static_range(1 if LISTED else 3):  # masked, all see all, masked
            for start in range(walk[phase], walk[phase + 1], BM * STEPS // R):
                i = start + m // R
                t = i * BQ + inside
                for u in tl.static_range(BM * STEPS // R if LISTED else 0):
                    reader = tl.load(readers + start // STEPS + u, mask=start // STEPS + u < end, other=0)
                    t = tl.where(m // R == u, reader * BQ + start % STEPS * (BM // HP) + inside, t)
                ok, row = (head < h) & (t < T) & (i < walk[phase + 1]), head * T + t
                queries = load_rows(q, row, ok, WK, PK, WK + D2)  # (BM, PK)
                queries2 = load_rows(q + WK, row, ok, D2, P2, WK + D2) if D2 > 0 else queries  # (BM, P2)
                douts = load_rows(dout, row, ok, WV, PV, WV)  # (BM, PV)
                norm, inner = tl.load(lse + row, mask=ok, other=float("inf")), tl.load(delta + row, mask=ok, other=0)  # (BM,)
                p = tl.exp2(dot(keys, queries, keys2, queries2, D2 > 0) * scale - norm[None, :])  # (BN, BM)
                if phase != 1:
                    low, high = span(t, S, l, d, window)  # (BM,)
                    see = (s[:, None] >= low[None, :]) & (s[:, None] < high[None, :])
                    p = tl.where(see, p, 0.0)
                ds = (p * unit * (dot(values, douts, values, douts, False) - inner[None, :])).to(queries.dtype)  # (BN, BM)
                if SHARED:
                    gk = tl.dot(p.to(douts.dtype), douts, gk, input_precision="ieee")
                else:
                    gv = tl.dot(p.to(douts.dtype), douts, gv, input_precision="ieee")
                gk = tl.dot(ds, queries, gk, input_precision="ieee")
                if D2 > 0:
                    gk2 = tl.dot(ds, queries2, gk2, input_precision="ieee")
        to = piece * BN + tl.arange(0, BN) if PIECES else bg * S + s
        live = live | PIECES
        store_rows(dk, to, live, gk, DK, PK, DK)
        if D2 > 0:
            store_rows(dk2, to, live, gk2, D2, P2, D2)
        if not SHARED:
            store_rows(dv, to, live, gv, DV, PV, DV)

    @triton.jit
    def sum_kernel(pieces, firsts, out, S, blocks, chunks, D: tl.constexpr, P: tl.constexpr, BN: tl.constexpr):
        """One program: one block of keys; its pieces (BN, D) in every chunk of the queries, added in order."""
        owner, n = tl.program_id(0).to(tl.int64), tl.arange(0, BN)
        total = tl.zeros((BN, P), tl.float32)
        for chunk in range(chunks):
            first = firsts + chunk * tl.num_programs(0) + owner
            for piece in range(tl.load(first), tl.load(first + 1)):
                total += load_rows(pieces, piece * BN + n, n, D, P, D, True)
        s = owner % blocks * BN + n
        store_rows(out, owner // blocks * S + s, s < S, total, D, P, D)

    # -----------------------------------------------------------------------------------------------------------------------------
    # 3) which blocks

    @triton.jit
    def score_kernel(q, k, k2, lse, own, over, scale, T, S, G, G2, l, d, every, row0, rows, J, h: tl.constexpr, HP: tl.constexpr,
                     DK: tl.constexpr, PK: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr, FOLD: tl.constexpr, OVERLAP: tl.constexpr,
                     BM: tl.constexpr, BN: tl.constexpr, LISTS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
        """One program: the lists row0 + .. of BM / HP queries. Their weights, made again from lse, summed over heads and over blocks.

        FOLD = l' / d entries begin in a selection block; entry i counts once per stride of its l / d, OVERLAP = l / d - 1 of which may
        lie in the next block: `own` (B G, rows, J) counts those in the block where it begins, `over` those in the next one. A matrix
        product sums over heads: adding across threads would cost as much as all the rest. All of it times 2^12, so that fp16 resolves it.
        """
        BQ: tl.constexpr = BM // HP
        bg, tile = tl.program_id(1).to(tl.int64), tl.num_programs(0) - 1 - tl.program_id(0)
        m, x = tl.arange(0, BM), tl.arange(0, LISTS)
        t, head = (row0 + tile * BQ + m // HP) * every, m % HP
        ok, row = (head < h) & (t < T), head * T + t
        q, lse = q + bg * h * T * (DK + D2), lse + bg * h * T
        _, high = span(t, S, l, d, T)  # (BM,)
        queries = load_rows(q, row, ok, DK, PK, DK + D2)  # (BM, PK)
        queries2 = load_rows(q + DK, row, ok, D2, P2, DK + D2) if D2 > 0 else queries  # (BM, P2)
        norm = tl.load(lse + row, mask=ok, other=float("inf")) - 12  # (BM,)
        heads_of = (m[:, None] // HP == x[None, :]).to(tl.float16 if HALF else tl.float32)  # (BM, LISTS)
        k, k2 = k + bg * S * DK, k2 + (bg // G * G2 + bg % G2) * S * D2
        j = tl.arange(0, BN // FOLD)
        to = (bg * rows + tile * BQ + x[None, :]) * J + j[:, None]  # (BN / FOLD, LISTS)
        beyond = tl.maximum(tl.arange(0, BN) % FOLD + OVERLAP - (FOLD - 1), 0).to(tl.float32)[:, None]  # (BN, 1) strides in the next block
        _, whole = span((row0 + tile * BQ) * every, S, l, d, T)
        _, end = span(tl.minimum((row0 + tile * BQ + BQ - 1) * every, T - 1), S, l, d, T)
        whole = whole // BN * BN  # so far all queries read all entries
        for phase in tl.static_range(2):
            for start in range(0 if phase == 0 else whole, whole if phase == 0 else end, BN):
                s = start + tl.arange(0, BN)
                keys = load_rows(k, s, s < S, DK, PK, DK, phase == 0)  # (BN, PK)
                keys2 = load_rows(k2, s, s < S, D2, P2, D2, phase == 0) if D2 > 0 else keys  # (BN, P2)
                p = tl.exp2(dot(keys, queries, keys2, queries2, D2 > 0) * scale - norm[None, :])  # (BN, BM)
                if phase == 1:
                    p = tl.where(s[:, None] < high[None, :], p, 0.0)
                p = tl.dot(p.to(heads_of.dtype), heads_of, input_precision="ieee")  # (BN, LISTS)
                live = (x < BQ)[None, :] & (tile * BQ + x < rows)[None, :] & (start // FOLD + j < J)[:, None]
                mine = tl.sum(tl.reshape(p * (OVERLAP + 1 - beyond), (BN // FOLD, FOLD, LISTS)), 1)  # (BN / FOLD, LISTS)
                tl.store(own + to + start // FOLD, mine, mask=live)
                if OVERLAP > 0:
                    tl.store(over + to + start // FOLD, tl.sum(tl.reshape(p * beyond, (BN // FOLD, FOLD, LISTS)), 1), mask=live)

    @triton.jit
    def choose(score, j, mine, to, n, NP: tl.constexpr):
        """The n best of the blocks j <= mine into a list, ascending, then -1. Forced: 0, mine - 1 and mine, which is the query's own.

        The n-th best score is found by bisection of its bits: floats >= 0 are ordered like their bits.
        """
        bits = score.to(tl.int32, bitcast=True)
        bits = tl.where((j == 0) | (j >= mine - 1), 0x7F800000, bits)  # forced: infinity
        bits = tl.where(j > mine, -1, bits)
        low, high = 0, 0x7F800001  # at least n reach low (or low is 0), fewer than n reach high
        while high - low > 1:
            middle = low + (high - low) // 2
            reach = tl.sum((bits >= middle).to(tl.int32), 0)
            low = tl.where(reach >= n, middle, low)
            high = tl.where(reach > n, high, tl.where(reach == n, middle + 1, middle))  # exactly n: found
        better, equal = (bits > low).to(tl.int32), (bits == low).to(tl.int32)
        room = n - tl.sum(better, 0)
        chosen = better + equal * (tl.cumsum(equal, 0) <= room).to(tl.int32)  # of equals the first
        tl.store(to + tl.cumsum(chosen, 0) - 1, j, mask=chosen > 0)
        i = tl.arange(0, NP)
        tl.store(to + i, -1, mask=(i >= tl.sum(chosen, 0)) & (i < n))

    @triton.jit
    def select_kernel(own, over, lists, every, row0, rows, all_rows, J, n, BLOCK: tl.constexpr, OVERLAP: tl.constexpr, BJ: tl.constexpr,
                      NP: tl.constexpr):  # fmt: skip
        """One program: one list, from what score_kernel added up."""
        r, bg, j = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, BJ)
        mine = (row0 + r) * every // BLOCK
        at = (bg * rows + r) * J + j
        score = tl.load(own + at, mask=j < mine - 1, other=0)
        if OVERLAP > 0:
            score += tl.load(over + at - 1, mask=(j > 0) & (j < mine - 1), other=0)
        choose(score, j, mine, lists + (bg * all_rows + row0 + r) * n, n, NP)

    # -----------------------------------------------------------------------------------------------------------------------------
    # 4) mix

    @triton.jit
    def gated(branch, gate, row, ok, D: tl.constexpr, P: tl.constexpr):
        """gate x branch (rows, P)."""
        return tl.load(gate, mask=ok, other=0).to(tl.float32)[:, None] * load_rows(branch, row, ok, D, P, D)

    @triton.jit
    def mix_kernel(x, y, z, g, out, H, T, gb, gt, N: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BT: tl.constexpr):
        """One program: BT queries of one head. out (B, T, H, D) = sum of gate x branch; branches (B, H, T, D), g (B, T, N H)."""
        bh, t = tl.program_id(0).to(tl.int64), tl.program_id(1) * BT + tl.arange(0, BT)
        ok, row, gate = t < T, bh * T + t, g + bh // H * gb + t * gt + bh % H
        mixed = gated(x, gate, row, ok, D, P) + gated(y, gate + H, row, ok, D, P)  # (BT, P)
        if N == 3:
            mixed += gated(z, gate + 2 * H, row, ok, D, P)
        store_rows(out, (bh // H * T + t) * H + bh % H, ok, mixed, D, P, D)

    @triton.jit
    def ungate(branch, dbranch, gate, dgate, douts, row, ok, D: tl.constexpr, P: tl.constexpr):
        """Writes one branch's gradient, gate x dout, and its gate's, branch . dout."""
        store_rows(dbranch, row, ok, tl.load(gate, mask=ok, other=0).to(tl.float32)[:, None] * douts, D, P, D)
        tl.store(dgate, tl.sum(douts * load_rows(branch, row, ok, D, P, D).to(tl.float32), 1).to(dgate.dtype.element_ty), mask=ok)

    @triton.jit
    def unmix_kernel(x, y, z, g, dout, dx, dy, dz, dg, H, T, gb, gt, ob, oh, ot, N: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
                     BT: tl.constexpr):  # fmt: skip
        """Its gradient. dout (B, H, T, D) with strides, dg (B, T, N H) dense."""
        bh, t = tl.program_id(0).to(tl.int64), tl.program_id(1) * BT + tl.arange(0, BT)
        ok, row, gate = t < T, bh * T + t, g + bh // H * gb + t * gt + bh % H
        dgate = dg + (bh // H * T + t) * N * H + bh % H
        d = tl.arange(0, P)
        at = dout + bh // H * ob + bh % H * oh + t[:, None].to(tl.int64) * ot + d[None, :]
        douts = tl.load(at, mask=ok[:, None] & (d < D)[None, :], other=0).to(tl.float32)  # (BT, P)
        ungate(x, dx, gate, dgate, douts, row, ok, D, P)
        ungate(y, dy, gate + H, dgate + H, douts, row, ok, D, P)
        if N == 3:
            ungate(z, dz, gate + 2 * H, dgate + 2 * H, douts, row, ok, D, P)

    # -----------------------------------------------------------------------------------------------------------------------------
    # 5) append

    @triton.jit
    def write_row(new, buffer, b, head, take, slot, nb, nh, nt, heads, S, WIDTH: tl.constexpr, PADDED: tl.constexpr):
        """new[b, head, take] -> buffer[b, head, slot]."""
        if head < heads:
            i = tl.arange(0, PADDED)
            row = tl.load(new + b * nb + head * nh + take * nt + i, mask=i < WIDTH)
            tl.store(buffer + ((b * heads + head) * S + slot) * WIDTH + i, row.to(buffer.dtype.element_ty), mask=i < WIDTH)

    @triton.jit
    def append_kernel(x, x_buf, y, y_buf, pos, pos_buf, length, count, S, T, xb, xh, xt, yb, yh, yt, pb, pt, x_heads, y_heads, pos_heads,
                      XW: tl.constexpr, XP: tl.constexpr, YW: tl.constexpr, YP: tl.constexpr):  # fmt: skip
        """One program: one new token of one row and head; two quantities and the position. Only the last S tokens find room in a ring."""
        j, b, head = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
        n = tl.load(count + b)
        take = j + tl.maximum(n - S, 0)
        if take < n:
            slot = (tl.load(length + b) + take) % S
            write_row(x, x_buf, b, head, take, slot, xb, xh, xt, x_heads, S, XW, XP)
            write_row(y, y_buf, b, head, take, slot, yb, yh, yt, y_heads, S, YW, YP)
            if head < pos_heads:
                tl.store(pos_buf + (b * pos_heads + head) * S + slot, tl.load(pos + b * pb + take * pt).to(tl.int32))

    # -----------------------------------------------------------------------------------------------------------------------------
    # 6) decode_attention

    @triton.jit
    def decode_kernel(q, k, k2, v, out, stats, raw, lists, q_pos, k_pos, length, scale, window, T, TQ, h, S, G, fan, pos_heads, splits,
                      n_list, qb, qh, qt, pb, pt, DK: tl.constexpr, PK: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr,
                      DV: tl.constexpr, PV: tl.constexpr, SHARED: tl.constexpr, WHOLE: tl.constexpr, RAW: tl.constexpr, BLOCK: tl.constexpr,
                      NP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
        """One program: the h heads of one group x TQ queries against one share of its slots; an online softmax, base 2.

        A group of many heads comes as `fan` of the G groups here, which read the same slots.
        A key is [k ; k2] (k2 is shared by the groups; D2 = 0: none). SHARED: v is k. WHOLE: one share is all, and out (B, T, H, DV) is as
        the output matrix will read it; otherwise the share's weighted mean and (max, sum) go to combine_kernel.
        BLOCK > 0: one query (TQ = 1) against the slots of its list's blocks. RAW: the scores as well, raw (B, H, T, S), and (max, sum):
        its rows are padded to a multiple of 16 entries, and written up to one, so that a thread moves 16 bytes at once.
        """
        which, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
        bg, first = which // (T // TQ), (which % (T // TQ) * TQ).to(tl.int32)
        b, g = bg // G, bg % G
        m = tl.arange(0, BM)
        head, t = m // TQ, first + m % TQ  # of the query rows
        dk, dv = tl.arange(0, PK), tl.arange(0, PV)
        rows = (m < h * TQ)[:, None]
        row = (bg * h + head) * T + t
        at = q + b * qb + (g * h + head)[:, None] * qh + t[:, None] * qt
        queries = tl.load(at + dk[None, :], mask=rows & (dk < DK)[None, :], other=0)  # (BM, PK)
        if D2 > 0:
            d2 = tl.arange(0, P2)
            queries2 = tl.load(at + DK + d2[None, :], mask=rows & (d2 < D2)[None, :], other=0)  # (BM, P2)
        where = tl.load(q_pos + b * pb + t * pt, mask=m < h * TQ, other=0)  # (BM,)

        filled = tl.minimum(tl.load(length + b), S).to(tl.int32)
        keys_all = filled
        if BLOCK > 0:  # slot s holds position s: what the query may see ends where it stands
            i = tl.arange(0, NP)
            lists += (bg // fan * T + first) * n_list
            keys_all = tl.sum((tl.load(lists + i, mask=i < n_list, other=-1) >= 0).to(tl.int32), 0) * BLOCK
            filled = tl.minimum(filled, tl.load(q_pos + b * pb + first * pt).to(tl.int32) + 1)
        share = tl.cdiv(tl.cdiv(keys_all, splits), BN) * BN
        top = tl.full((BM,), -1e30, tl.float32)
        total = tl.zeros((BM,), tl.float32)
        mean = tl.zeros((BM, PV), tl.float32)
        for start in range(split * share, tl.minimum((split + 1) * share, keys_all), BN):
            s = where_keys_lie(lists, start, keys_all, filled, BN, BLOCK)  # (BN,)
            ok = s < filled
            slot = bg // fan * S + s  # (BN,) in k and v
            keys = tl.load(k + slot[:, None] * DK + dk[None, :], mask=ok[:, None] & (dk < DK)[None, :], other=0)  # (BN, PK)
            score = tl.dot(queries, tl.trans(keys), input_precision="ieee")  # (BM, BN)
            if D2 > 0:
                at2 = k2 + (b * S + s)[:, None] * D2 + d2[None, :]
                keys2 = tl.load(at2, mask=ok[:, None] & (d2 < D2)[None, :], other=0)  # (BN, P2)
                score += tl.dot(queries2, tl.trans(keys2), input_precision="ieee")
            if BLOCK > 0:
                see = ok[None, :]
            else:
                lies = tl.load(k_pos + (b * pos_heads + g // fan % pos_heads) * S + s, mask=ok, other=-1)  # (BN,)
                see = (lies >= 0)[None, :] & (lies[None, :] <= where[:, None]) & (lies[None, :] > where[:, None] - window)
            score = tl.where(see, score * scale, -1e30)  # scale includes log2(e)
            if RAW:
                near = s < tl.cdiv(filled, 16) * 16
                tl.store(raw + row[:, None] * (tl.cdiv(S, 16) * 16) + s[None, :], score, mask=rows & near[None, :])
            high = tl.maximum(top, tl.max(score, 1))
            p = tl.where(see, tl.exp2(score - high[:, None]), 0.0)  # (BM, BN)
            fade = tl.exp2(top - high)
            total, top = total * fade + tl.sum(p, 1), high
            if SHARED:
                values = keys
            else:
                values = tl.load(v + slot[:, None] * DV + dv[None, :], mask=ok[:, None] & (dv < DV)[None, :], other=0)  # (BN, PV)
            mean = mean * fade[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        mean = mean / tl.where(total > 0, total, 1.0)[:, None]
        part = (which * splits + split) * BM + m
        if WHOLE:
            to = out + (((b * T + t) * G + g) * h + head)[:, None] * DV + dv[None, :]
            tl.store(to, mean.to(out.dtype.element_ty), mask=rows & (dv < DV)[None, :])
        else:
            tl.store(out + part[:, None] * PV + dv[None, :], mean)
        if RAW or not WHOLE:
            tl.store(stats + part * 2, top)
            tl.store(stats + part * 2 + 1, total)

    @triton.jit
    def combine(part, stats, out, which, m, T, TQ, h, G, splits, DV: tl.constexpr, PV: tl.constexpr, BM: tl.constexpr,
                SPLITS: tl.constexpr):  # fmt: skip
        """One query row: the shares' means, weighted by their sums."""
        i, d = tl.arange(0, SPLITS), tl.arange(0, PV)
        at = (which * splits + i) * BM + m
        top = tl.load(stats + at * 2, mask=i < splits, other=-1e30)  # (SPLITS,)
        total = tl.load(stats + at * 2 + 1, mask=i < splits, other=0)  # (SPLITS,)
        weight = total * tl.exp2(top - tl.max(top, 0))  # (SPLITS,)
        means = tl.load(part + at[:, None] * PV + d[None, :], mask=(i < splits)[:, None], other=0)  # (SPLITS, PV)
        norm = tl.sum(weight, 0)
        o = tl.sum(means * weight[:, None], 0) / tl.where(norm > 0, norm, 1.0)  # (PV,)
        bg, query = which // (T // TQ), which % (T // TQ) * TQ + m % TQ
        to = (((bg // G) * T + query) * G + bg % G) * h + m // TQ
        tl.store(out + to * DV + d, o.to(out.dtype.element_ty), mask=d < DV)

    @triton.jit
    def combine_kernel(part, stats, out, T, TQ, h, G, splits, DV: tl.constexpr, PV: tl.constexpr, BM: tl.constexpr, SPLITS: tl.constexpr):
        """One program: one query row."""
        combine(part, stats, out, tl.program_id(0).to(tl.int64), tl.program_id(1), T, TQ, h, G, splits, DV, PV, BM, SPLITS)

    @triton.jit
    def importance_kernel(raw, part, stats, out, importance, length, T, h, row, G, splits, chunks, BE: tl.constexpr, HP: tl.constexpr,
                          DV: tl.constexpr, PV: tl.constexpr, BM: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
        """What is left when all scores raw (B, H, T, row) are known, for one query and group; two kinds of programs, side by side.

        The first `chunks` sum the weights of BE entries over heads, importance (B, G, T, row). The others combine, one a head.
        """
        which, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
        bg, t = which // T, which % T
        if chunk >= chunks:
            combine(part, stats, out, bg, ((chunk - chunks) * T + t).to(tl.int32), T, T, h, G, splits, DV, PV, BM, SPLITS)
        else:
            head, i, e = tl.arange(0, HP), tl.arange(0, SPLITS), chunk * BE + tl.arange(0, BE)
            count = tl.minimum(tl.load(length + bg // G), row).to(tl.int32)
            ok = (head < h)[:, None] & (e < tl.cdiv(count, 16) * 16)[None, :]
            score = tl.load(raw + ((bg * h + head) * T + t)[:, None] * row + e[None, :], mask=ok, other=-1e30)  # (HP, BE)
            at = (bg * splits + i[:, None]) * BM + (head * T + t)[None, :]  # (SPLITS, HP)
            ok = (i < splits)[:, None] & (head < h)[None, :]
            tops = tl.load(stats + at * 2, mask=ok, other=-1e30)  # (SPLITS, HP)
            top = tl.maximum(tl.max(tops, 0), -1e29)  # (HP,) above what is masked
            total = tl.sum(tl.load(stats + at * 2 + 1, mask=ok, other=0) * tl.exp2(tops - top[None, :]), 0)  # (HP,)
            weight = 1 / tl.where(total > 0, total, 1.0)
            p = tl.exp2(score - top[:, None]) * weight[:, None]  # (HP, BE)
            tl.store(importance + which * row + e, tl.sum(p, 0), mask=e < row)

    @triton.jit
    def decode_select_kernel(importance, pos, lists, G, T, row, n, pb, pt, FOLD: tl.constexpr, OVERLAP: tl.constexpr,
                             BLOCK: tl.constexpr, BJ: tl.constexpr, NP: tl.constexpr):  # fmt: skip
        """One program: the list of one query and group, from importance (B, G, T, row) of entries: NSA's eqs 8 to 11."""
        which, j = tl.program_id(0).to(tl.int64), tl.arange(0, BJ)
        own = tl.load(pos + which // T // G * pb + which % T * pt).to(tl.int32) // BLOCK
        score = tl.zeros((BJ,), tl.float32)
        for m in tl.static_range(-OVERLAP, FOLD):
            e = j * FOLD + m  # an entry that touches block j, and how many strides they share
            p = tl.load(importance + which * row + e, mask=(e >= 0) & (e < row), other=0)  # (BJ,)
            score += p * (min(m + OVERLAP, FOLD - 1) - max(m, 0) + 1)
        choose(score, j, own, lists + which * n, n, NP)

    # -----------------------------------------------------------------------------------------------------------------------------
    # 7) draw

    @triton.jit
    def draw_kernel(logits, noise, p, token, V, scale, HOT: tl.constexpr, NOISE: tl.constexpr, BV: tl.constexpr):
        """One program: one row. p = softmax(logits * scale), token = argmax(p / noise); HOT: p is one-hot at the largest logit."""
        row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BV)
        top, total, best, at = -float("inf"), 0.0, -1.0, 0
        for start in range(0, V, BV):
            z = tl.load(logits + row * V + start + i, mask=start + i < V, other=-float("inf")).to(tl.float32) * scale
            high = tl.maximum(top, tl.max(z, 0))
            if HOT:
                if high > top:
                    at = start + tl.argmax(z, 0)
            total, top = total * tl.exp(top - high) + tl.sum(tl.exp(z - high), 0), high
        for start in range(0, V, BV):
            ok = start + i < V
            if HOT:
                x = tl.where(start + i == at, 1.0, 0.0)
            else:
                z = tl.load(logits + row * V + start + i, mask=ok, other=-float("inf")).to(tl.float32) * scale
                x = tl.exp(z - top) / total
            tl.store(p + row * V + start + i, x, mask=ok)
            if NOISE and not HOT:
                race = tl.where(ok, x / tl.load(noise + row * V + start + i, mask=ok, other=1), -1.0)
                if tl.max(race, 0) > best:
                    best, at = tl.max(race, 0), start + tl.argmax(race, 0)
        tl.store(token + row, at)

    # -----------------------------------------------------------------------------------------------------------------------------
    # 8) commit

    @triton.jit
    def commit_kernel(p, q, drafts, u, noise, text, logp, known, given, limit, active, counts, reads, take_out, width, stop, g, V, K,
                      BV: tl.constexpr):  # fmt: skip
        """One program: one row of mtp.accept and of what follows it in mtp.Decoder.round."""
        b, i = tl.program_id(0).to(tl.int64), tl.arange(0, BV)
        live = tl.load(active + b).to(tl.int32)
        p, q, drafts = p + b * (g + 1) * V, q + b * g * V, drafts + b * g
        have, prompt = tl.load(known + b), tl.load(given + b)
        n, alive, real = 0, live, live * (have >= prompt).to(tl.int32)  # rounds that still read a prompt do not count
        for k in range(g):
            d, forced = tl.load(drafts + k), (have + k < prompt).to(tl.int32)
            counted = alive * real
            chance = 0.0
            for start in range(0, V, BV):
                ok = start + i < V
                chance += tl.sum(tl.minimum(tl.load(p + k * V + start + i, mask=ok, other=0),
                                            tl.load(q + k * V + start + i, mask=ok, other=0)), 0)  # fmt: skip
            at = counts + b * 3 * K + k  # reached, accepted and expected, added up per row
            tl.store(at, tl.load(at) + counted)
            tl.store(at + 2 * K, tl.load(at + 2 * K) + counted * chance)
            ok = (tl.load(u + b * g + k) * tl.load(q + k * V + d) < tl.load(p + k * V + d)).to(tl.int32)
            tl.store(at + K, tl.load(at + K) + counted * ok)
            alive = alive * tl.maximum(ok, forced)
            n += alive

        # the residual (p - q)+ at the refused draft; behind the last draft, p itself
        total, width_q = 0.0, tl.where(n < g, V, 0)
        for start in range(0, V, BV):
            rest = tl.load(p + n * V + start + i, mask=start + i < V, other=0)
            rest -= tl.load(q + n * V + start + i, mask=start + i < width_q, other=0)
            total += tl.sum(tl.maximum(rest, 0), 0)
        width_q = tl.where(total > 0, width_q, 0)
        best, last = -1.0, 0
        for start in range(0, V, BV):
            ok = start + i < V
            rest = tl.load(p + n * V + start + i, mask=ok, other=0)
            rest -= tl.load(q + n * V + start + i, mask=start + i < width_q, other=0)
            race = tl.where(ok, tl.maximum(rest, 0) / tl.load(noise + b * V + start + i, mask=ok, other=1), -1.0)
            if tl.max(race, 0) > best:
                best, last = tl.max(race, 0), start + tl.argmax(race, 0)

        room = tl.load(limit + b) - have
        take, go = 0, live
        for j in range(n + 1):
            if (go > 0) & (j < room):
                y, forced = last.to(tl.int64), (have + j < prompt).to(tl.int32)
                if j < n:
                    y = tl.load(drafts + j)
                elif forced > 0:
                    y = tl.load(text + b * width + have + j)
                tl.store(text + b * width + have + j, y)
                tl.store(logp + b * width + have + j, tl.log(tl.load(p + j * V + y)))
                take += 1
                go = tl.maximum((y != stop).to(tl.int32), forced)
        tl.store(known + b, have + take)
        tl.store(reads + 2 * b, tl.load(reads + 2 * b) + real)
        tl.store(reads + 2 * b + 1, tl.load(reads + 2 * b + 1) + real * take)
        tl.store(active + b, (go > 0) & (take < room))
        tl.store(take_out + b, take)


def power(n, least=1):
    """The next power of 2, which is what Triton's tiles must be."""
    return max(least, triton.next_power_of_2(n))


class Rope(torch.autograd.Function):
    """rope, below; sign -1 turns backwards, which is its gradient."""

    @staticmethod
    def forward(ctx, x, pos, base, sign):
        ctx.save_for_backward(pos)
        ctx.base, ctx.sign = base, sign
        B, H, T, P = x.shape
        x = x if x.stride(-1) == 1 else x.contiguous()
        out = torch.empty(B, H, T, P, dtype=x.dtype, device=x.device)
        BT = min(64, power(T))
        pb = pos.stride(0) if pos.shape[0] > 1 else 0
        log2_base = torch.tensor(float(base), dtype=torch.float64).log2().item()
        rope_kernel[(B * H, triton.cdiv(T, BT))](x, out, pos, H, T, *x.stride()[:3], pb, pos.stride(1), float(sign), log2_base,
                                                 P=P, HALF=power(P // 2), BT=BT)  # fmt: skip
        return out

    @staticmethod
    def backward(ctx, grad):
        return Rope.apply(grad, ctx.saved_tensors[0], ctx.base, -ctx.sign), None, None, None


def rope(x, pos, base=10000.0):
    """latent_attention.rope: x (B, H, T, P), pos (B or 1, T) -> (B, H, T, P); angles in fp32."""
    return Rope.apply(x, pos, base, 1)


SMS, L2 = 132, 2**25  # of an H100 or H200: multiprocessors; bytes of queries that find room in its cache of 50 MB, beside all else
LOG2_E = 1.4426950408889634  # softmax in base 2: exp2(x log2(e)) = exp(x)
TILE, AREA = 40 * 2**10, 2**13  # decoding: bytes of keys and values that a program multiplies at once; numbers of its output


def tile(kind, rows, width, dtype, block=0, shared=False):
    """(rows of queries at once, keys at once, warps, stages) of the attention kernels: the only numbers that were tuned, on an H200.

    rows: query rows that read one list (0: no lists, any number can be joined); width: of a key; shared: it is the value too. In fp32
    only small tiles fit. The timings are in results/kernels-versions.md.
    """
    BM = 32 if kind == "dkv" and max(rows, block) >= 32 else max(rows, 16)  # with lists
    if dtype == torch.float32:
        return BM if rows else 32, block if kind == "dkv" and rows else max(block, 32), 4, 1
    if rows and kind == "dkv":
        return BM, block, 4 if block >= 64 else 2, 3 if width > 64 and rows < 64 else 2
    if rows >= 64:
        return BM, max(block, 32), rows // 16, 2 if kind == "forward" else 1
    if rows:
        return BM, max(block, 64 if kind == "forward" else 32), triton.cdiv(rows, 16) * (1 if width <= 160 else 2), 2
    fits = 64 if shared else 32
    shapes = {"forward": {96: (64, 64, 4, 3), 160: (128, 64, 8, 3), 192: (64, 64, 4, 2), 512: (128, 64, 8, 2)},  # {widths up to: shape}
              "scores": {192: (128, 64, 4, 3), 512: (64, 128, 8, 2)},
              "dq": {96: (64, 64, 4, 2), 192: (128, 64, 8, 3), 512: (128, 32, 8, 3)},
              "dkv": {96: (64, 64, 4, 2), 160: (64, 128, 8, 3), 192: (fits, 128, 8, 3), 512: (fits, 128, 8, 2)}}  # fmt: skip
    return next(shape for widest, shape in shapes[kind].items() if width <= widest)


def sizes(q, k, k2, v):
    """Widths of keys [k ; k2] and values as the kernels want them: D of the tensor, W of aligned rows, P a power of 2."""
    h, DK, D2, DV = q.shape[1] // k.shape[1], k.shape[3], 0 if k2 is None else k2.shape[3], (k if v is None else v).shape[3]
    return dict(h=h, HP=power(h), DK=DK, WK=DK + -DK % 16, PK=power(DK, 16), D2=D2, P2=power(D2, 16), DV=DV, WV=DV + -DV % 16,
                PV=power(DV, 16), SHARED=v is None)  # fmt: skip


def align(x, D2=0):
    """x (.., D + D2), dense, copied with zeros behind its first D columns that make them a multiple of 16; x itself if they are one.

    Memory comes in sectors of 32 bytes: of rows of 120 numbers, which begin anywhere, 40 % more are fetched than needed.
    """
    D = x.shape[-1] - D2
    if D % 16 == 0:
        return x
    W, rows = D + -D % 16, x.shape[:-1].numel()
    out = torch.empty(*x.shape[:-1], W + D2, dtype=x.dtype, device=x.device)
    align_kernel[(triton.cdiv(rows, 32),)](x, out, rows, D=D, W=W, P=power(W), D2=D2, P2=power(D2), BR=32)
    return out


class Walk(torch.autograd.Function):
    """Attention of q (B, H, T, DK + D2) to keys [k ; k2] (B, G, S, DK), (B, 1 or G, S, D2) and values v (B, G, S, DV), None: k itself.

    lists None: key i stands at position i d + l - 1, and a query reads those among its last `window` positions. With lists (B, G,
    ceil(T / share), n), `share` queries read the blocks of theirs, up to their own position. -> o (B, H, T, DV), lse (B, H, T).
    """

    @staticmethod
    def forward(ctx, q, k, k2, v, lists, scale, l, d, window, block, share):
        (B, H, T, _), (_, G, S, _) = q.shape, k.shape
        w, n = sizes(q, k, k2, v), 0 if lists is None else lists.shape[3]
        rows = share * w["HP"] if n else 0
        BM, BN, warps, stages = tile("forward", rows, w["DK"] + w["D2"], q.dtype, block)
        BQ = share if n else max(1, BM // w["HP"])
        w.update(BLOCK=block, NP=power(n), BQ=BQ, BM=max(BM, BQ * w["HP"]), BN=BN)
        out = torch.empty(B, H, T, w["DV"], dtype=q.dtype, device=q.device)
        lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
        plain = (scale * LOG2_E, T, S, G, 1 if k2 is None else k2.shape[1], l, d, window)
        k_ = align(k)
        forward_kernel[(triton.cdiv(T, BQ), B * G)](q, k_, k if k2 is None else k2, k_ if v is None else align(v), lists, out, lse, *plain,
                                                    n, **w, num_warps=warps, num_stages=stages)  # fmt: skip
        ctx.save_for_backward(q, k, k2, v, lists, out, lse)
        ctx.plain, ctx.sizes, ctx.rows, ctx.block = plain, w, rows, block
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        q, k, k2, v, lists, out, lse = ctx.saved_tensors
        (B, H, T, _), (_, G, S, _), w, rows, dout = q.shape, k.shape, dict(ctx.sizes), ctx.rows, dout.contiguous()
        width, k_, k2_ = w["DK"] + w["D2"], align(k), k if k2 is None else k2
        v_ = k_ if v is None else align(v)
        dq, delta = torch.empty_like(q), torch.empty_like(lse)
        BM, BN, warps, stages = tile("dq", rows, width, q.dtype, ctx.block)
        BQ = w["BQ"] if rows else max(1, BM // w["HP"])
        w.update(BQ=BQ, BM=max(BM, BQ * w["HP"]), BN=BN)
        dq_kernel[(triton.cdiv(T, BQ), B * G)](q, k_, k2_, v_, lists, out, lse, dout, delta, dq, *ctx.plain, lists.shape[3] if rows else 0,
                                               **w, num_warps=warps, num_stages=stages)  # fmt: skip

        BM, BN, warps, stages = tile("dkv", rows, width, q.dtype, ctx.block, v is None)
        BQ, blocks = w["BQ"] if rows else max(1, BM // w["HP"]), triton.cdiv(S, BN)
        total, parts, chunks = B * G * blocks, 1, 1  # total 0 where T < l: there is no entry yet
        readers = owners = begins = ends = None
        if rows:  # pieces of at most twice the average number of readers: a popular block is many pieces
            if rows >= 64:  # much to fetch: the queries in chunks that stay in the GPU's L2 cache while all blocks read them
                chunks = min(16, triton.cdiv(q.nbytes + dout.nbytes, B * G * L2))
            readers, owners, begins, ends, firsts = invert(lists, blocks, max(1, 2 * lists.shape[3] * BN // BQ), chunks)
            pieces = len(owners)
        else:
            parts = min(triton.cdiv(4 * SMS, total), triton.cdiv(T, 16 * BQ)) if 0 < total < 2 * SMS else 1
            pieces, firsts = total * parts, torch.arange(0, total * parts + 1, parts, device=q.device)
        split = pieces > total
        new = lambda x: torch.empty((pieces, BN, x.shape[3]) if split else (B, G, S, x.shape[3]),
                                    dtype=torch.float32 if split else x.dtype, device=x.device)  # fmt: skip
        grads = [None if x is None else new(x) for x in (k, k2, v)]
        gk, gk2, gv = (grads[0] if g is None else g for g in grads)
        w.update(LISTED=rows > 0, BQ=BQ, BM=max(BM, w["HP"] if rows else BQ * w["HP"]), BN=BN, PIECES=split)
        del w["NP"], w["BLOCK"]
        dkv_kernel[(pieces,)](align(q, w["D2"]), k_, k2_, v_, lse, align(dout), delta, gk, gk2, gv, readers, owners, begins, ends,
                              *ctx.plain, blocks, parts, **w, num_warps=warps, num_stages=stages)  # fmt: skip
        for i, x in enumerate((k, k2, v)):
            if split and x is not None:
                pieced, grads[i] = grads[i], torch.empty(B, G, S, x.shape[3], dtype=x.dtype, device=x.device)
                sum_kernel[(total,)](pieced, firsts, grads[i], S, blocks, chunks, D=x.shape[3], P=power(x.shape[3]), BN=BN)
        if k2 is not None and k2.shape[1] < G:
            grads[1] = grads[1].sum(1, keepdim=True)  # one rotary key for all groups
        return dq, *grads, *[None] * 7


def invert(lists, blocks, most, chunks):
    """Who reads a block: the entries of the lists (B, G, tiles, n) sorted by chunk of the tiles, then by block.

    The readers of one block in one chunk are cut into pieces of at most `most`, a program each, in this order: while the queries of a
    chunk lie in L2, all blocks read them. Every block has a reader, its own queries. -> readers (entries,) tiles of queries; of each piece
    (pieces,) its owner, a block (bg, block), and its readers begin .. end - 1; firsts (chunks B G blocks + 1,) the first piece of each
    block in each chunk. Nothing is read back to the host: there are as many pieces as there may be, the last ones empty.
    """
    B, G, tiles, n = lists.shape
    total, place = B * G * blocks, lambda size: torch.arange(size, dtype=torch.int32, device=lists.device)
    chunk = place(tiles) // triton.cdiv(tiles, chunks)  # (tiles,)
    owner = (chunk[:, None] * B * G + place(B * G).view(B, G, 1, 1)) * blocks + lists  # (B, G, tiles, n)
    owner, order = owner.masked_fill(lists < 0, chunks * total).flatten().sort(stable=True)  # (entries,)
    readers = order.to(torch.int32) // n % tiles  # (entries,)
    starts = torch.searchsorted(owner, place(chunks * total + 1), out_int32=True)  # (chunks total + 1,)
    firsts = F.pad(((starts.diff() + most - 1) // most).cumsum(0), (1, 0))  # (chunks total + 1,)
    pieces = torch.arange(chunks * total + lists.numel() // most, device=lists.device)
    cut = (torch.searchsorted(firsts, pieces, right=True) - 1).clamp(max=chunks * total - 1)  # (pieces,) the (chunk, owner) cut into it
    begins = torch.minimum(starts[cut] + (pieces - firsts[cut]) * most, starts[cut + 1])  # in 64 bits: a surplus piece lies far out
    return readers, cut % total, begins.to(torch.int32), torch.minimum(begins + most, starts[cut + 1]).to(torch.int32), firsts


def split_key(k, k2, shared):
    """A key whose width is no power of 2 as two of them, such as 192 = 128 + 64: padding would waste up to half of the work."""
    low = power(k.shape[3] + 1) // 2
    if k2 is None and not shared and low < k.shape[3]:
        return k[..., :low], k[..., low:]
    return k, k2


def attend(what, q, k, v, lists, scale, k2, l=1, d=1, window=None, block=0, share=1):
    """The door to Walk for all three branches: complains, splits odd widths, makes everything dense -> o, lse."""
    refuse(what, q, k, v, k2, block or 16, share)
    shared = v is k
    k, k2 = split_key(k, k2, shared)
    q, k, k2, v = (x if x is None else x.contiguous() for x in (q, k, k2, None if shared else v))
    return Walk.apply(q, k, k2, v, lists, scale, l, d, window or q.shape[2], block, share)


def window_attention(q, k, v, window, scale, k2=None):
    """latent_attention.window_attention on keys [k ; k2]; k2 (B, 1 or G, T, P) or None."""
    return attend("window_attention", q, k, v, None, scale, k2, window=min(window, q.shape[2]))[0]


def compressed_attention(q, k, v, l, d, scale, k2=None):
    """nsa.compressed_attention where entry i stands at position i d + l - 1 -> o (B, H, T, Dv), lse in base 2 (B, H, T) for `select`."""
    return attend("compressed_attention", q, k, v, None, scale, k2, l, d)


@torch.no_grad()
def select(q, k, lse, l, d, block, n, scale, k2=None, every=1):
    """nsa.block_importance and select_blocks for every `every`-th query -> lists (B, G, ceil(T / every), min(n, blocks)), ascending.

    The scores of a few thousand lists at a time lie in memory, never those of all.
    """
    refuse("select", q, k, k, k2, block)
    k, k2 = split_key(k, k2, False)
    q, k, k2 = (x if x is None else x.contiguous() for x in (q, k, k2))
    (B, H, T, _), (_, G, S, _) = q.shape, k.shape
    w = sizes(q, k, k2, k)
    blocks, rows = triton.cdiv(T, block), triton.cdiv(T, every)
    if blocks > 2**15:
        raise ValueError(f"select: {blocks} blocks; at most {2**15} are ranked at once")
    n, overlap = min(n, blocks), l // d - 1
    BM, BN, warps, stages = tile("scores", 0, w["DK"] + w["D2"], q.dtype)
    BQ = max(1, BM // w["HP"])
    chunk = min(rows, triton.cdiv(2**25 // (B * G * blocks), BQ) * BQ)
    lists = torch.empty(B, G, rows, n, dtype=torch.int32, device=q.device)
    own = torch.empty(B * G, chunk, blocks, dtype=torch.float32, device=q.device)
    over = torch.empty_like(own) if overlap else own
    w = {name: w[name] for name in ("h", "HP", "DK", "PK", "D2", "P2")}
    for row0 in range(0, rows, chunk):
        score_kernel[(triton.cdiv(min(chunk, rows - row0), BQ), B * G)](
            q, k, k if k2 is None else k2, lse, own, over, scale * LOG2_E, T, S, G, 1 if k2 is None else k2.shape[1], l, d, every, row0,
            chunk, blocks, **w, FOLD=block // d, OVERLAP=overlap, BM=max(BM, w["HP"]), BN=max(BN, block // d), LISTS=power(BQ, 16),
            HALF=q.dtype != torch.float32, num_warps=warps, num_stages=stages)  # fmt: skip
        seen = triton.cdiv(min(T, (row0 + chunk) * every), block)  # blocks that the last of these queries may see
        select_kernel[(min(chunk, rows - row0), B * G)](own, over, lists, every, row0, chunk, rows, blocks, n, BLOCK=block,
                                                        OVERLAP=overlap, BJ=power(seen, 16), NP=power(n),
                                                        num_warps=max(1, min(8, power(seen) // 1024)))  # fmt: skip
    return lists


def selected_attention(q, k, v, lists, block, scale, k2=None, share=1):
    """nsa.selected_attention where lists (B, G, ceil(T / share), n) serve `share` queries each: ascending, their own block last, -1."""
    if block % share:
        raise ValueError(f"selected_attention: {share} queries with one list must lie in one block of {block}")
    return attend("selected_attention", q, k, v, lists.to(torch.int32).contiguous(), scale, k2, block=block, share=share)[0]


class Mix(torch.autograd.Function):
    """mix, below, with its gradient. With two branches the kernels get the first one as the third too, and leave it alone."""

    @staticmethod
    def forward(ctx, gates, *branches):
        B, H, T, D = branches[0].shape
        ctx.save_for_backward(gates, *branches)
        out = torch.empty(B, T, H, D, dtype=branches[0].dtype, device=gates.device)
        x, y, z = (branches + branches[:1])[:3]
        mix_kernel[(B * H, triton.cdiv(T, 16))](x, y, z, gates, out, H, T, gates.stride(0), gates.stride(1), N=len(branches), D=D,
                                                P=power(D), BT=16)  # fmt: skip
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, dout):
        gates, *branches = ctx.saved_tensors
        B, H, T, D = branches[0].shape
        dout = dout if dout.stride(3) == 1 else dout.contiguous()
        grads, dgates = [torch.empty_like(x) for x in branches], torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
        x, y, z = (branches + branches[:1])[:3]
        dx, dy, dz = (grads + grads[:1])[:3]
        unmix_kernel[(B * H, triton.cdiv(T, 16))](x, y, z, gates, dout, dx, dy, dz, dgates, H, T, gates.stride(0), gates.stride(1),
                                                  *dout.stride()[:3], N=len(branches), D=D, P=power(D), BT=16)  # fmt: skip
        return dgates, *grads


def mix(gates, *branches):
    """Sum of gate x branch: gates (B, T, N H), N = 2 or 3 branches (B, H, T, D) -> (B, H, T, D), lying in memory as (B, T, H, D)."""
    return Mix.apply(gates if gates.stride(-1) == 1 else gates.contiguous(), *(x.contiguous() for x in branches))


def append(data, pos_buffer, length, new, pos, count):
    """The writing half of SlotCache.append for one or two quantities: data and new lists of (B, heads, S or T, width)."""
    B, T = pos.shape
    S = pos_buffer.shape[2]
    (x, x_buf), (y, y_buf) = zip((new * 2)[:2], (data * 2)[:2])  # a single quantity is written twice
    x, y = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, y))
    count = count.contiguous()  # it may be one number, expanded
    heads = [x.shape[1], y.shape[1], pos_buffer.shape[1]]
    append_kernel[(min(T, S), B, max(heads))](x, x_buf, y, y_buf, pos, pos_buffer, length, count, S, T, *x.stride()[:3], *y.stride()[:3],
                                              *pos.stride(), *heads, XW=x.shape[3], XP=power(x.shape[3]), YW=y.shape[3],
                                              YP=power(y.shape[3]))  # fmt: skip


def read_shares(q, k, v, q_pos, k_pos, length, scale, window=None, k2=None, lists=None, block=1, raw=None, fan=1):
    """decode_attention up to the point where the shares of the slots are put together.

    raw (B, H, T, S, padded to a multiple of 16): receives the scores in base 2; fan: see decode_kernel. -> out (B, T, H, Dv), which is done
    if there is one share; part and stats of each share; how many and how wide they are.
    """
    (B, H, T, _), (_, G, S, DK), DV = q.shape, k.shape, v.shape[3]
    G *= fan  # parts of groups
    h, D2, TQ = H // G, 0 if k2 is None else k2.shape[3], T if lists is None else 1
    q = q if q.stride(-1) == 1 else q.contiguous()
    rows, n = B * G * (T // TQ), 0 if lists is None else lists.shape[3]
    BM, widths = power(h * TQ, 16), dict(DK=DK, PK=power(DK, 16), D2=D2, P2=power(D2, 16), DV=DV, PV=power(DV, 16))
    BN = TILE // ((widths["PK"] + widths["P2"] * (D2 > 0) + (0 if v is k else widths["PV"])) * k.element_size())
    area, keys = BM * widths["PV"], n * block if n else S
    BN = max(32, min(128 if area <= 2**12 else 32, power(BN + 1) // 2))  # the power of 2 below: queries are fetched anew for each tile
    each = 2 if area <= 2**14 else 1  # programs that share a multiprocessor: one waits while another multiplies
    tiles = max(1, triton.cdiv(keys, BN))
    splits = max(1, min(64, keys // 128, each * SMS // rows))  # at most one wave of programs, each with at least 128 keys
    splits = triton.cdiv(tiles, triton.cdiv(tiles, splits))  # none without a tile
    out = torch.empty(B, T, H, DV, dtype=q.dtype, device=q.device)
    part, stats = out, out
    if splits > 1:
        part = torch.empty(rows, splits, BM, widths["PV"], dtype=torch.float32, device=q.device)
    if splits > 1 or raw is not None:
        stats = torch.empty(rows, splits, BM, 2, dtype=torch.float32, device=q.device)
    decode_kernel[(rows, splits)](q, k, k2 if D2 else k, v, part, stats, raw, lists, q_pos, k_pos, length, scale * LOG2_E,
                                  window or 2**31 - 1, T, TQ, h, S, G, fan, k_pos.shape[1], splits, n, *q.stride()[:3], *q_pos.stride(),
                                  **widths, SHARED=v is k, WHOLE=splits == 1, RAW=raw is not None, BLOCK=block if n else 0, NP=power(n),
                                  BM=BM, BN=BN, num_warps=8 if DK > 256 and area > 2**13 else 4)  # fmt: skip
    return out, part, stats, dict(splits=splits, DV=DV, PV=widths["PV"], BM=BM, SPLITS=power(splits))


def decode_attention(q, k, v, q_pos, k_pos, length, scale, window=None, k2=None, lists=None, block=1):
    """attend(q, [k ; k2], v, visible(q_pos, k_pos, window), scale) for a few queries, reading only the filled slots.

    q (B, H, T, Dk + D2), k (B, G, S, Dk), v (B, G, S, Dv), possibly k itself; k2 (B, 1, S, D2) or None; q_pos (B, T), k_pos (B, 1 or G,
    S), length (B,) -> (B, H, T, Dv). A query that sees nothing gets 0. Raises ValueError for more than 128 heads in a group.
    lists (B, G, T, n): only the slots of these blocks, in any order, then -1; slot s holds position s, and k_pos, window do not matter.
    """
    (B, H, T, _), G = q.shape, k.shape[1]
    h, TQ = H // G, T if lists is None else 1
    if h > 128:
        raise ValueError(f"decode_attention takes at most 128 heads per group, not {h}")
    if h * TQ > 128:  # more rows than one tile: as many queries at a time as fit
        parts = zip(q.split(128 // h, dim=2), q_pos.split(128 // h, dim=1))
        return torch.cat([decode_attention(q_i, k, v, pos_i, k_pos, length, scale, window, k2) for q_i, pos_i in parts], dim=2)
    fan = 1  # programs that share a group's heads: one with them all is short of registers. Where few run only: each reads all the keys
    while h * TQ * v.shape[3] > AREA * fan and h % (2 * fan) == 0 and h * TQ >= 32 * fan and 4 * fan * B * G <= SMS:
        fan *= 2
    h, G = h // fan, G * fan
    out, part, stats, shares = read_shares(q, k, v, q_pos, k_pos, length, scale, window, k2, lists, block, fan=fan)
    if shares["splits"] > 1:
        combine_kernel[(B * G * T // TQ, h * TQ)](part, stats, out, T, TQ, h, G, **shares, num_warps=4 if shares["splits"] > 16 else 1)
    return out.transpose(1, 2)


def decode_blocks(q, k, v, q_pos, cache, tokens, l, d, block, n, scale, k2=None):
    """nsa.read_blocks for a few queries against the cache of compressed entries -> o (B, H, T, Dv), lists (B, G, T, min(n, blocks)).

    Raises ValueError for more than 128 rows, heads of a group times queries.
    """
    (B, H, T, _), (_, G, S, _), blocks = q.shape, k.shape, triton.cdiv(tokens, block)
    h, row = H // G, triton.cdiv(S, 16) * 16
    if h * T > 128 or blocks > 2**15:
        raise ValueError(f"decode_blocks: {h} heads x {T} queries, {blocks} blocks; at most 128, and {2**15} are ranked at once")
    raw, importance = (torch.empty(*shape, dtype=torch.float32, device=q.device) for shape in ((B, H, T, row), (B, G, T, row)))
    lists = torch.empty(B, G, T, min(n, blocks), dtype=torch.int32, device=q.device)
    out, part, stats, shares = read_shares(q, k, v, q_pos, cache.pos, cache.length, scale, k2=k2, raw=raw)
    many = min(2**13, power(B * H * T * row // (8 * SMS)))  # scores of one program: fewer where they would not fill the GPU
    BE = max(128, many // power(h))
    chunks = triton.cdiv(row, BE)
    combining = h if shares["splits"] > 1 else 0  # programs
    importance_kernel[(B * G * T, chunks + combining)](raw, part, stats, out, importance, cache.length, T, h, row, G, chunks=chunks, BE=BE,
                                                       HP=power(h), **shares)  # fmt: skip
    decode_select_kernel[(B * G * T,)](importance, q_pos, lists, G, T, row, lists.shape[3], *q_pos.stride(), FOLD=block // d,
                                       OVERLAP=l // d - 1, BLOCK=block, BJ=power(blocks, 16), NP=power(lists.shape[3]),
                                       num_warps=max(1, min(8, power(blocks) // 512)))  # fmt: skip
    return out.transpose(1, 2), lists


def draw(logits, temperature, noise=None):
    """mtp.law(logits, temperature) and, with noise (..., V) ~ Exp(1), a token drawn from it: logits (..., V) -> (..., V) fp32, (...)."""
    V, logits = logits.shape[-1], logits.contiguous()
    p = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    token = torch.empty(logits.shape[:-1], dtype=torch.long, device=logits.device)
    draw_kernel[(token.numel(),)](logits, noise, p, token, V, 1 / temperature if temperature else 1.0, HOT=temperature == 0,
                                  NOISE=noise is not None, BV=min(power(V), 4096))  # fmt: skip
    return p, token


def commit(p, q, drafts, u, noise, text, logp, known, given, limit, active, counts, reads, stop):
    """Steps 3 and 4 of mtp.Decoder.round, reading p and q once -> tokens taken (B,). Writes text, logp, known, active, counts, reads."""
    (B, n, V), take, p, q = p.shape, torch.empty_like(known), p.contiguous(), q.contiguous()
    commit_kernel[(B,)](p, q, drafts, u, noise, text, logp, known, given, limit, active, counts, reads, take, text.shape[1], stop, n - 1, V,
                        counts.shape[2], BV=min(power(V), 4096))  # fmt: skip
    return take


# ---------------------------------------------------------------------------------------------------------------------------------
# what it is worth

RATE, BANDWIDTH = 790e12, 4.3e12  # bf16 products and bytes per second, measured on an H200: the two floors


class Timed:
    """Milliseconds of f() and, with leaves, of its backward pass; what is possible at best; the peak of both in bytes.

    A floor is the time that a perfect program needs: for the products (`flop` of the forward pass), or to move every tensor once.
    """

    def __init__(self, f, leaves=(), flop=0.0):
        with torch.no_grad():
            o = f()
            self.ms = [triton.testing.do_bench(f, warmup=20, rep=100, return_mode="median")]
        moved = sum(x.nbytes for x in (*leaves, o))
        self.floors = [(flop / RATE, moved / BANDWIDTH), (2.5 * flop / RATE, 2 * moved / BANDWIDTH)]  # backward: 5 products, not 2
        if leaves:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            o, grad = f(), torch.randn_like(o)
            backward = lambda: torch.autograd.grad(o, leaves, grad, retain_graph=True)
            backward()
            self.peak = torch.cuda.max_memory_allocated() - before
            self.ms.append(triton.testing.do_bench(backward, warmup=20, rep=100, return_mode="median"))

    def __str__(self):
        """Milliseconds, and how much of them the floors would take: 1.00 / 3.00 ms (products 60% / 50%, bytes 5% / 4%)."""
        shares = (" / ".join(f"{floor[i] * 1e3 / ms:.0%}" for ms, floor in zip(self.ms, self.floors)) for i in range(2))
        return " / ".join(f"{ms:.2f}" for ms in self.ms) + " ms (products {}, bytes {})".format(*shares)


def bench_layer(kind, T, H, G, D, only=None):
    """Every kernel of a layer, and "layer": all of it but the matrices around it; on random data, with lists of its own: {name: Timed}.

    only: the name of one of them, to time no other.
    """
    import nsa  # not at import: nsa imports this file
    from latent_attention import LatentAttention

    new = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    P, W, t, pos = D // 2, 512, torch.arange(T), torch.arange(T, device="cuda")[None]
    products = lambda reads, width: 2.0 * H * width * reads.clamp(min=0).double().sum().item()  # reads (T,): keys per query
    windowed = (t + 1).clamp(max=W)
    timed = lambda what: {name: Timed(*args) for name, args in what.items() if only in (None, name)}
    if kind == "asa local":
        layer = LatentAttention(H * D, H, D, 1, 4 * D, P, window=W).cuda().bfloat16()
        layer.out = torch.nn.Identity()
        parts = q_c, q_r, c, k_r = new(1, H, T, D), new(1, H, T, P), new(1, 1, T, 4 * D), new(1, 1, T, P)
        q, k, v = new(1, H, T, D + P), new(1, H, T, D), new(1, H, T, D)
        return timed({"window": (lambda: window_attention(q, k, v, W, layer.scale, k_r), (q, k, v, k_r), products(windowed, 2 * D + P)),
                      "layer": (lambda: layer.materialised(*parts), parts)})  # fmt: skip

    # to compress: `parts`; to select from: `tokens` (k, v, k2); `width` of a key and a value together
    if kind == "nsa":
        layer = nsa.NSA(H * D, H, G, D, W, n=16).cuda().bfloat16()
        l, d, block, every, width, branches = layer.l, layer.d, layer.block, 1, 2 * D, 3
        q, k0, v0, k1, v1, k_w, v_w = leaves = new(1, H, T, D), *(new(1, G, T, D) for _ in range(6))
        parts, tokens = (k0, v0), (k1, v1, None)
    else:
        R = 2 * D - P // G  # as wide as the keys and values of G groups
        layer = nsa.ASAGlobal(H * D, H, D, G, R, P, n=128).cuda().bfloat16()
        l = d = block = nsa.ASA_BLOCK
        every, width, branches = nsa.SHARE, 2 * R + P, 2
        q, c, k_r = leaves = new(1, H, T, R + P), new(1, G, T, R), new(1, 1, T, P)
        parts, tokens = (c, k_r), (c, c, k_r)
    n, scale, gates = layer.n, layer.scale, new(1, T, branches * H)

    def compress():
        a, b, end = nsa.compressed_entries(layer.compress, parts, pos[:, None], pos, l, d)
        a, b = a.to(q.dtype), b.to(q.dtype)
        return (a, b, None) if kind == "nsa" else (a, a, b)

    def whole():
        k, v, k2 = compress()
        o, lists = nsa.read_blocks(q, k, v, None, pos, T, l, d, block, n, scale, k2, every)
        o = [o, nsa.selected_attention(q, *tokens[:2], lists, pos, None, block, scale, tokens[2], every)]
        o += [window_attention(q, k_w, v_w, W, scale)] if kind == "nsa" else []
        return nsa.mix(gates, *o)

    entries = [x if x is None else x.detach().requires_grad_() for x in compress()]
    k, v, k2 = entries if kind == "nsa" else (entries[0], entries[0], entries[2])
    lse = compressed_attention(q, k, v, l, d, scale, k2)[1]
    choose = lambda: select(q, k, lse, l, d, block, n, scale, k2, every)
    lists, done = choose(), (t + 1 - l + d) // d  # done (T,): entries that a query reads
    given = lambda k, v, k2: [x for x in (q, k, None if v is k else v, k2) if x is not None]
    selected = lambda: selected_attention(q, *tokens[:2], lists, block, scale, tokens[2], every)
    what = {"compressed": (lambda: compressed_attention(q, k, v, l, d, scale, k2)[0], given(k, v, k2), products(done, width)),
            "top-n": (choose, (), products(done[::every], q.shape[3])),
            "selected": (selected, given(*tokens), products((t + 1).clamp(max=n * block), width))}  # fmt: skip
    if kind == "nsa":
        what["window"] = (lambda: window_attention(q, k_w, v_w, W, scale), (q, k_w, v_w), products(windowed, width))
    o = [new(1, H, T, tokens[1].shape[3]) for _ in range(branches)]
    what |= {"gates": (lambda: mix(gates, *o), (gates, *o)), "layer": (whole, (*leaves, gates))}
    return timed(what)


def bench(lengths=(4096, 8192, 16384, 32768, 65536)):
    """Our kernels beside torch's dense attention, in one process."""
    print(f"Attention in training, on {torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}\n\n"
          "One text in bf16, random data. Times are forward / backward, of the attention of one layer without the matrices around it,\n"
          "then of its kernels one by one. In brackets, how much of a time two limits of the GPU explain; 100% cannot be beaten:\n"
          f"products at {RATE / 1e12:.0f} TFLOP/s, or every tensor read or written once at {BANDWIDTH / 1e12} TB/s.\n"
          "dense: torch's scaled_dot_product_attention. \"2.0x / 1.5x\": so many times as fast as dense.")  # fmt: skip
    for H, G, D in ((64, 4, 128), (16, 4, 64)):
        for T in lengths:
            q, k, v = (torch.randn(1, h, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (H, G, G))
            dense = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            dense = Timed(dense, (q, k, v), 2.0 * H * T * (T + 1) * D)
            print(f"\n{T} tokens, {H} heads in {G} groups, width {D}\n  {'dense':10} {dense}")

            line = lambda f, b: f"{f:.2f} / {b:.2f} ms, {dense.ms[0] / f:.2f}x / {dense.ms[1] / b:.2f}x"
            layers = {}
            for kind in ("nsa", "asa local", "asa global"):
                found = bench_layer(kind, T, H, G, D)
                layers[kind] = found.pop("layer").ms
                print(f"  {kind:10} {line(*layers[kind])}")
                print("\n".join(f"    {name:10} {timed}" for name, timed in found.items()), flush=True)
            print(f"  {'asa, mean':10} {line(*((a + b) / 2 for a, b in zip(layers['asa local'], layers['asa global'])))}")


def bench_memory(lengths=(16384, 32768, 65536, 131072, 262144), H=16, G=4, D=64):
    """What a layer needs beside its inputs, forward and backward: linear in T."""
    print(f"\nPeak memory of the attention of one layer in training, {H} heads in {G} groups, width {D}, bf16:\n"
          f"MiB per 1024 tokens, at {', '.join(map(str, lengths))} tokens\n")  # fmt: skip
    for kind in ("nsa", "asa local", "asa global"):
        peaks = [bench_layer(kind, T, H, G, D, "layer")["layer"].peak / 2**20 / (T / 1024) for T in lengths]
        print(f"  {kind:10} " + ", ".join(f"{peak:.2f}" for peak in peaks), flush=True)


def in_graph(f, repeats=10):
    """Milliseconds of f() inside a CUDA graph: without the time that launching takes."""
    f()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            f()
    return triton.testing.do_bench(graph.replay, warmup=10, rep=50, return_mode="median") / repeats


@torch.no_grad()
def bench_decoding(S=65536, batches=(1, 4, 16, 64)):
    """The attention of one step, S tokens cached in every row: dense (the faster of SDPA and decode_attention) beside NSA and ASA."""
    from latent_attention import SlotCache

    print(f"\nAttention of one decoding step, one new token per row, {S} tokens cached: microseconds per layer, bf16, in a CUDA graph\n"
          f"dense: the faster of torch's and ours, beside the time to read its cache once at {BANDWIDTH / 1e12} TB/s. "
          "\"2.0x\": so many times as fast as dense.\n")  # fmt: skip
    new = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    def filled(B, heads, slots, first=0, stride=1):
        """A cache that only knows where its slots lie: at first, first + stride, ..."""
        cache = SlotCache(B, slots, ((heads, 1), (1, 1)), device="cuda")
        cache.pos += torch.arange(slots, device="cuda", dtype=torch.int32) * stride + first + 1  # they were -1
        cache.length += slots
        return cache

    for H, G, D in ((64, 4, 128), (16, 4, 64)):
        for B in batches:
            P, W, R, N = D // 2, 512, 2 * D - D // 2 // G, (S - 32) // 16 + 1  # N entries of NSA, S / 16 of ASA
            pos, tokens = torch.full((B, 1), S - 1, device="cuda"), filled(B, G, S)

            def global_step(q, k, v, k2, entries, l, d, block, n):
                """Milliseconds of reading compressed entries (k, v, k2), choosing n blocks and reading those."""
                blocks = filled(B, G, entries[0].shape[2], l - 1, d)
                def run():
                    o, lists = decode_blocks(q, *entries[:2], pos, blocks, S, l, d, block, n, 1.0, entries[2])
                    decode_attention(q, k, v, pos, tokens.pos, tokens.length, 1.0, k2=k2, lists=lists, block=block)
                return in_graph(run)

            def local_step(q, k, v, k2=None):
                ring = filled(B, k.shape[1], W, S - W)
                return in_graph(lambda: decode_attention(q, k, v, pos, ring.pos, ring.length, 1.0, W, k2))

            q, k, v = new(B, H, 1, D), new(B, G, S, D), new(B, G, S, D)
            dense = min(in_graph(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)),
                        in_graph(lambda: decode_attention(q, k, v, pos, tokens.pos, tokens.length, 1.0)))  # fmt: skip
            floor = (k.nbytes + v.nbytes) / BANDWIDTH * 1e3
            nsa = global_step(q, k, v, None, (new(B, G, N, D), new(B, G, N, D), None), 32, 16, 64, 16)
            nsa += local_step(q, new(B, G, W, D), new(B, G, W, D))
            del k, v
            c, k_r, c_b, r_b = new(B, G, S, R), new(B, 1, S, P), new(B, G, S // 16, R), new(B, 1, S // 16, P)
            asa_global = global_step(new(B, H, 1, R + P), c, c, k_r, (c_b, c_b, r_b), 16, 16, 16, 128)
            local = new(B, 1, W, 4 * D)
            asa_local = local_step(new(B, H, 1, 4 * D + P), local, local, new(B, 1, W, P))
            asa = (asa_local + asa_global) / 2
            print(f"  {H} heads in {G} groups, width {D:3}, batch {B:2}:  dense {dense * 1e3:.1f} ({floor / dense:.0%} bytes), "
                  f"nsa {nsa * 1e3:.1f} ({dense / nsa:.1f}x), asa {asa * 1e3:.1f} ({dense / asa:.1f}x: local {asa_local * 1e3:.1f}, "
                  f"global {asa_global * 1e3:.1f})", flush=True)  # fmt: skip


def main(argv):
    error = next((f"unknown option {word!r}: try --bench or --help" for word in argv if word not in ("--bench", "--help", "-h")), None)
    if not error and ("--help" in argv or "-h" in argv):
        print(__doc__.strip())
        return 0
    if triton is None:
        error = error or "Triton is not installed"
    if "--bench" in argv and not torch.cuda.is_available():
        error = error or "--bench needs a GPU"
    if error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if "--bench" in argv:
        bench()
        bench_decoding()
        bench_memory()
        return 0
    torch.manual_seed(0)
    device, T, D = "cuda" if torch.cuda.is_available() else "cpu", 64, 16
    where = f"compiled for {torch.cuda.get_device_name()}" if device == "cuda" else "interpreted on the CPU"
    print(f"Triton {triton.__version__}, {where}\n")
    q, k, v = (torch.randn(1, heads, T, D, device=device) for heads in (4, 2, 2))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    t = torch.arange(T, device=device)
    lists = torch.arange(4, device=device).expand(1, 2, T, 4).masked_fill(torch.arange(4, device=device) * 16 > t[:, None], -1)
    print(f"{T} queries, 4 heads in 2 groups: largest difference to dense attention\n")
    for what, o in {"a window of all tokens": window_attention(q, k, v, T, D**-0.5),
                    "blocks of one token": compressed_attention(q, k, v, 1, 1, D**-0.5)[0],
                    "lists of all blocks of 16": selected_attention(q, k, v, lists, 16, D**-0.5)}.items():  # fmt: skip
        print(f"  {what:26} {(o - want).abs().max():.1e} (fp32)")
    print("\nOn a GPU, `python kernels.py --bench` times them beside torch's dense attention")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
