"""Fast paths on a GPU, in Triton: rotation, sparse attention with its gradients, and what a decoding step does.

The definitions are the functions under `@fast_path` in latent_attention.py, nsa.py and mtp.py. A function of
the same name here takes the same arguments and gives the same result; it only touches memory less often.
test_all.py compares the two of every pair, on a CPU in Triton's interpreter (TRITON_INTERPRET=1).

What moves: the h heads of a group read the same keys. One program keeps a tile of BQ queries x h heads on the
chip and walks through the keys that they may read, BN at a time: load keys and values, multiply, add up. A key
is loaded once for BQ h rows, and the T x S weights are never written. To memory go the output and one number a
row, lse, from which the backward pass makes the weights again. A block's tokens are fetched anew for every
list that names it: at 64k tokens and n l' = 1024 these are 137 GB a layer at 4 groups of width 128, or 13 ms
at the pace of an H200's L2 cache. This is why lists that 4 queries share pay.

    1) pairs      which function runs: the definition or its fast path
    2) rope       angles, rotation and halves in one pass over x; its gradient is the rotation back
    3) steps      what all attention shares: loading rows, one step of the softmax, one of the gradient
    4) dense      attention to keys in a row: window and compressed; forward, dq, dk and dv
    5) lists      attention to the blocks of a list; forward, dq, and dk and dv from the lists inverted
    6) select     block scores, made again from lse and summed over heads by a matrix product; the n best
    7) mix        the gates, and the heads merged
    8) slots      keys, values and positions of new tokens to their slots, each row at its own length
    9) decoding   a few queries against the slots of a cache, or those of a list's blocks, split over programs

    forward   s = scale q k, lse = log sum exp s, o = sum exp(s - lse) v, with a running maximum
              (FlashAttention, arXiv 2205.14135)
    backward  p = exp(s - lse), delta = do . o, ds = p (do . v - delta). dq = scale ds k walks as the forward
              pass does. For dk = scale ds q and dv = p do a tile of keys walks through the tiles of queries
              that read it: the positions say which these are, or the lists' entries sorted by block.

Sums are taken in a fixed order, never by atomics, so two runs give the same bits. A key may be [k ; k2], where
all groups share k2 (the rotary key). The value may be k itself (a latent); then one load serves both. What
lies behind the end of a shorter row is never read by what lies before it.

Limits: widths up to 256 and up to 64 heads in a group (32 where 4 queries share a list), blocks of 16 to 128
tokens; in a cache, any width and up to 128 heads. Does NOT include: FP8, paging, several texts in one row.
`python kernels.py` compares with dense attention; results/bench_kernels.py takes the times. Do not confuse
this file with the package `kernels` on PyPI. Read first: latent_attention.py and nsa.py.

Letters as there. Inside kernels a tile has BM rows, which are BQ queries x HP heads: row m is head m % HP of
query m // HP. Sizes of tiles are powers of 2 and what is too much is masked: HP is h rounded up, NP is n, and
PK, P2, PV are the widths DK, D2, DV of k, k2, v. WK and WV are the widths of rows in memory, see `align`.
"""

import functools
import os
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: kernels then run on the CPU

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError:  # no Triton, no fast path: the kernels are defined and never called
    triton = None
    constexpr = None

    def jit(kernel):
        return kernel


SMS = 132  # multiprocessors of an H100 or H200
L2 = 2**25  # bytes of queries that find room in its L2 cache of 50 MB, beside all else
TILE = 40 * 2**10  # decoding: bytes of keys and values that a program multiplies at once
LOG2_E = 1.4426950408889634  # softmax in base 2: exp2(x log2(e)) = exp(x)


def power(n, least=1):
    """The next power of 2, which is what Triton's tiles must be."""
    return max(least, triton.next_power_of_2(n))


# ------------------------------------------------------------------------------------------------------------
# 1) Pairs

PAIRS = {}  # name -> (definition, fast function)


class Refused(ValueError):
    """A fast function cannot take these arguments. It is raised before anything is launched or written."""


def usable(x):
    """Whether kernels can take a tensor: on a GPU, with Triton, in bf16, fp16 or fp32."""
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    return triton is not None and x is not None and x.is_cuda and x.dtype in kinds


def first_tensor(args):
    """The first tensor of real numbers among arguments, which may be lists of tensors; None if there is none."""
    for x in args:
        if isinstance(x, (list, tuple)):
            x = first_tensor(x)
        if torch.is_tensor(x) and x.is_floating_point():
            return x
    return None


class Compiled:
    """torch.compile of a definition that has no kernel, made at its first call; on a CPU the definition."""

    def __init__(self, definition):
        self.definition = definition
        self.made = None

    def __call__(self, *args, **more):
        if not torch.cuda.is_available():
            return self.definition(*args, **more)
        if self.made is None:
            self.made = torch.compile(self.definition, dynamic=True)
        return self.made(*args, **more)


def fast_path(definition):
    """Decorator: on a GPU the function of the same name in this file runs, if it can take the arguments.

    A definition without such a function is compiled. `.definition` of the result is the definition itself.
    """
    name = definition.__name__
    PAIRS[name] = (definition, globals().get(name) or Compiled(definition))

    @functools.wraps(definition)
    def either(*args, **more):
        if usable(first_tensor(args)):
            try:
                return PAIRS[name][1](*args, **more)
            except Refused:
                pass
        return definition(*args, **more)

    either.definition = definition
    return either


def check(q, keys, block=16, share=1):
    """Raises Refused for what the attention kernels cannot do, as one clear line."""
    H = q.shape[1]
    G = keys.k.shape[1]
    given = [x for x in (keys.k, keys.k2, keys.v) if x is not None]
    widths = [x.shape[3] for x in given]
    if H % G or H // G > 64:
        raise Refused(f"{H} heads in {G} groups: a group has 1 to 64 heads")
    if H // G * share > 128:
        raise Refused(
            f"{share} queries with one list x {H // G} heads: at most 128 rows read the same blocks"
        )
    if max(widths) > 256:
        raise Refused(f"widths {widths}: at most 256")
    if any(x.dtype != q.dtype for x in given):
        raise Refused("queries, keys and values must be of one dtype")
    if block not in (16, 32, 64, 128) or block % share:
        raise Refused(
            f"blocks of {block} tokens, {share} queries with one list: 16, 32, 64 or 128, a multiple"
        )


# ------------------------------------------------------------------------------------------------------------
# 2) Rope


@jit
def rope_kernel(
    x, out, pos, H, T, x_stride, pos_stride, sign, log2_base, P: constexpr, HALF: constexpr, BT: constexpr
):
    """One program: BT tokens of one head. x (B, H, T, P), its last axis dense; out (B, H, T, P) dense."""
    bh = tl.program_id(0).to(tl.int64)
    b = bh // H
    t = tl.program_id(1) * BT + tl.arange(0, BT)  # (BT,)
    i = tl.arange(0, HALF)
    freq = tl.exp2(i.to(tl.float64) * (-2.0 / P) * log2_base).to(tl.float32)  # (HALF,) base^(-2i/P)
    p = tl.load(pos + b * pos_stride[0] + t * pos_stride[1], mask=t < T, other=0).to(tl.float32)  # (BT,)
    angle = sign * p[:, None] * freq[None, :]  # (BT, HALF)
    cos = tl.cos(angle)
    sin = tl.sin(angle)
    ok = (t < T)[:, None] & (i < P // 2)[None, :]
    at = x + b * x_stride[0] + bh % H * x_stride[1] + t[:, None].to(tl.int64) * x_stride[2] + i[None, :]
    u = tl.load(at, mask=ok, other=0).to(tl.float32)  # (BT, HALF)
    v = tl.load(at + P // 2, mask=ok, other=0).to(tl.float32)  # (BT, HALF)
    to = out + (bh * T + t[:, None]) * P + i[None, :]
    tl.store(to, (u * cos - v * sin).to(out.dtype.element_ty), mask=ok)
    tl.store(to + P // 2, (v * cos + u * sin).to(out.dtype.element_ty), mask=ok)


class Rope(torch.autograd.Function):
    """rope, below; sign -1 turns backwards, which is its gradient."""

    @staticmethod
    def forward(ctx, x, pos, base, sign):
        ctx.save_for_backward(pos)
        ctx.base = base
        ctx.sign = sign
        B, H, T, P = x.shape
        x = x if x.stride(-1) == 1 else x.contiguous()
        out = torch.empty(B, H, T, P, dtype=x.dtype, device=x.device)
        pos = pos.expand(B, T)
        log2_base = torch.tensor(float(base), dtype=torch.float64).log2().item()
        BT = min(64, power(T))
        grid = (B * H, triton.cdiv(T, BT))
        strides = (x.stride()[:3], pos.stride())
        rope_kernel[grid](x, out, pos, H, T, *strides, float(sign), log2_base, P, power(P // 2), BT)
        return out

    @staticmethod
    def backward(ctx, grad):
        return Rope.apply(grad, ctx.saved_tensors[0], ctx.base, -ctx.sign), None, None, None


def rope(x, pos, base=10000.0):
    """x (B, H, T, P), pos (B or 1, T) -> (B, H, T, P); angles in fp32."""
    return Rope.apply(x, pos, base, 1)


# ------------------------------------------------------------------------------------------------------------
# 3) Steps that all attention shares


class KV(NamedTuple):
    """Keys [k ; k2] and values of a kernel, or their gradients. What does not exist is k once more."""

    k: torch.Tensor
    k2: torch.Tensor
    v: torch.Tensor


class Widths(NamedTuple):
    """Heads of a group and widths of k, k2, v: in numbers (D), in memory (W), as a power of 2 (P)."""

    h: int
    HP: int
    DK: int
    WK: int
    PK: int
    D2: int  # 0: there is no k2
    P2: int
    DV: int
    WV: int
    PV: int
    SHARED: bool  # the value is k

    def padded(self):
        """The width of a key [k ; k2] on the chip."""
        return self.PK + (self.P2 if self.D2 else 0)


class Rule(NamedTuple):
    """Which keys a query reads: key i stands at position i d + l - 1, and the last `window` positions count."""

    T: int  # queries
    S: int  # keys
    G: int  # groups of k and v
    G2: int  # groups of k2: 1 or G
    window: int
    l: int
    d: int


def widths_of(q, k, k2, v, aligned=True):
    """Widths of these tensors; aligned: rows of k and v were made by `align`."""
    h = q.shape[1] // k.shape[1]
    DK = k.shape[3]
    D2 = 0 if k2 is None else k2.shape[3]
    DV = DK if v is None else v.shape[3]
    WK = DK + -DK % 16 if aligned else DK
    WV = DV + -DV % 16 if aligned else DV
    return Widths(h, power(h), DK, WK, power(DK, 16), D2, power(D2, 16), DV, WV, power(DV, 16), v is None)


@jit
def load_rows(x, row, ok, D, P, STRIDE, ALL=False):
    """x[row, :D] -> (rows, P), padded with zeros: rows that are `ok`, or ALL (a mask would cost time)."""
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


@jit
def store_rows(x, row, ok, value, D, P, STRIDE):
    """value (rows, P) -> x[row, :D]."""
    d = tl.arange(0, P)
    at = x + row.to(tl.int64)[:, None] * STRIDE + d[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :])


@jit
def align_kernel(
    x, out, rows, D: constexpr, W: constexpr, P: constexpr, D2: constexpr, P2: constexpr, BR: constexpr
):
    """One program: BR rows [a ; b] of x, D + D2 wide -> [a ; 0 ; b], W + D2 wide."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    ok = row < rows
    store_rows(out, row, ok, load_rows(x, row, ok, D, P, D + D2), W, P, W + D2)
    if D2 > 0:
        store_rows(out + W, row, ok, load_rows(x + D, row, ok, D2, P2, D + D2), D2, P2, W + D2)


def align(x, D2=0):
    """x (.., D + D2) with zeros behind its first D columns, which make them a multiple of 16; x if they are.

    Memory comes in sectors of 32 bytes: of rows of 120 numbers, which begin anywhere, 40 % more are fetched
    than needed.
    """
    D = x.shape[-1] - D2
    if D % 16 == 0:
        return x
    W = D + -D % 16
    rows = x.shape[:-1].numel()
    out = torch.empty(*x.shape[:-1], W + D2, dtype=x.dtype, device=x.device)
    align_kernel[(triton.cdiv(rows, 32),)](x, out, rows, D, W, power(W), D2, power(D2), 32)
    return out


def aligned_kv(k, k2, v):
    """What kernels read: rows of k and v aligned, and k where there is no k2, or no v."""
    k = align(k)
    return KV(k, k if k2 is None else k2, k if v is None else align(v))


@jit
def load_pair(x, x2, row, ok, D, STRIDE, STRIDE2, w, ALL=False):
    """Rows [x ; x2] -> (rows, PK), (rows, P2). Without a second part the first one comes twice."""
    first = load_rows(x, row, ok, D, w.PK, STRIDE, ALL)
    return first, load_rows(x2, row, ok, w.D2, w.P2, STRIDE2, ALL) if w.D2 > 0 else first


@jit
def load_queries(q, row, ok, D, w):
    """Queries [q ; q2], which lie in one row, the first part D wide."""
    return load_pair(q, q + D, row, ok, D, D + w.D2, D + w.D2, w)


@jit
def load_keys(keys, s, ok, w, ALL=False):
    """Keys [k ; k2] of a group."""
    return load_pair(keys.k, keys.k2, s, ok, w.WK, w.WK, w.D2, w, ALL)


@jit
def load_values(keys, b, s, ok, w, ALL=False):
    """Values (BN, PV) of keys b."""
    return b[0] if w.SHARED else load_rows(keys.v, s, ok, w.WV, w.PV, w.WV, ALL)


@jit
def dot(a, b, w):
    """[a ; a2] [b ; b2]^T, in fp32 without tf32."""
    c = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if w.D2 > 0:
        c = tl.dot(a[1], tl.trans(b[1]), c, input_precision="ieee")
    return c


@jit
def of_group(keys, bg, x, w):
    """Where the keys and values of a group begin; x: numbers S, G, G2."""
    k2 = keys.k2 + (bg // x.G * x.G2 + bg % x.G2) * x.S * w.D2
    return KV(keys.k + bg * x.S * w.WK, k2, keys.v + bg * x.S * w.WV)


@jit
def rows_of_tile(T, w, tile):
    """This program's group and tile; of its rows (BM,) positions t, places in the group, which of them exist."""
    bg = tl.program_id(1).to(tl.int64)
    i = tl.num_programs(0) - 1 - tl.program_id(0)  # long walks first
    m = tl.arange(0, tile.BM)
    t = i * tile.BQ + m // w.HP
    head = m % w.HP
    return bg, i, t, head * T + t, (head < w.h) & (m // w.HP < tile.BQ) & (t < T)


@jit
def zeros(M, N):
    return tl.zeros((M, N), tl.float32)


@jit
def no_keys(BM, PV):
    """What softmax_step has seen before the first key: top, total, mean."""
    return tl.full((BM,), -1e30, tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM, PV), tl.float32)


@jit
def softmax_step(score, see, scale, top, total, mean, keys, b, s, ok, w, ALL):
    """One step of a softmax in base 2, with the scores (BM, BN) of keys b, which lie in rows s.

    top (BM,) is the largest score so far, total (BM,) the sum of exp2(score - top), mean (BM, PV) the sum of
    these times the values. ALL: every query reads all of these keys, and no mask is needed.
    """
    if not ALL:
        score = tl.where(see, score, -1e30)
    new = tl.maximum(top, tl.max(score, 1) * scale)  # scale includes log2(e)
    p = tl.exp2(score * scale - new[:, None])  # (BM, BN)
    if not ALL:
        p = tl.where(see, p, 0.0)
    fade = tl.exp2(top - new)
    values = load_values(keys, b, s, ok, w, ALL)  # (BN, PV)
    mean = tl.dot(p.to(values.dtype), values, mean * fade[:, None], input_precision="ieee")
    return new, total * fade + tl.sum(p, 1), mean


@jit
def store_output(out, lse, row, ok, top, total, mean, w):
    """o = mean / total, lse = top + log2(total); for a query that read nothing 0 and infinity."""
    some = total > 0
    total = tl.where(some, total, 1.0)
    store_rows(out, row, ok, mean / total[:, None], w.DV, w.PV, w.DV)
    tl.store(lse + row, tl.where(some, top + tl.log2(total), float("inf")), mask=ok)  # then all weights are 0


class Rows(NamedTuple):
    """What the backward pass reads and writes for each query."""

    q: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    dout: torch.Tensor
    delta: torch.Tensor
    dq: torch.Tensor


@jit
def slopes(a, b, x, y, norm, inner, see, scale, unit, w, ALL):
    """The gradient of scores: p = exp2(s - lse) and ds = unit p (do . v - delta), by rows a, x and columns b, y.

    a and x are queries and do, b and y keys and values, norm = lse, inner = delta; or the other way round.
    """
    p = tl.exp2(dot(a, b, w) * scale - norm)
    if not ALL:
        p = tl.where(see, p, 0.0)
    return p, p * unit * (tl.dot(x, tl.trans(y), input_precision="ieee") - inner)


@jit
def query_slopes(x, bg, row, ok, T, w):
    """Of query rows: do (BM, PV), lse (BM,), and delta = do . o (BM,), which is kept for the keys' turn."""
    at = bg * w.h * T
    douts = load_rows(x.dout + at * w.DV, row, ok, w.DV, w.PV, w.DV)
    outs = load_rows(x.out + at * w.DV, row, ok, w.DV, w.PV, w.DV)
    inner = tl.sum(douts.to(tl.float32) * outs.to(tl.float32), 1)
    tl.store(x.delta + at + row, inner, mask=ok)
    return douts, tl.load(x.lse + at + row, mask=ok, other=float("inf")), inner


@jit
def query_step(a, douts, norm, inner, see, scale, grad, grad2, keys, s, ok, w, ALL):
    """Adds what the keys in rows s give to dq (BM, PK) and dq2 (BM, P2)."""
    b = load_keys(keys, s, ok, w, ALL)  # (BN, PK), (BN, P2)
    values = load_values(keys, b, s, ok, w, ALL)  # (BN, PV)
    _, ds = slopes(a, b, douts, values, norm[:, None], inner[:, None], see, scale, 1.0, w, ALL)  # (BM, BN)
    ds = ds.to(values.dtype)
    grad = tl.dot(ds, b[0], grad, input_precision="ieee")
    if w.D2 > 0:
        grad2 = tl.dot(ds, b[1], grad2, input_precision="ieee")
    return grad, grad2


@jit
def store_queries(dq, row, ok, grad, grad2, scale, w):
    unit = scale * 0.6931471805599453  # without log2(e)
    store_rows(dq, row, ok, grad * unit, w.DK, w.PK, w.DK + w.D2)
    if w.D2 > 0:
        store_rows(dq + w.DK, row, ok, grad2 * unit, w.D2, w.P2, w.DK + w.D2)


@jit
def rows_of_group(x, bg, T, w):
    """Where a group's queries begin. Rows of q and dout are aligned here."""
    at = bg * w.h * T
    return Rows(x.q + at * (w.WK + w.D2), x.out, x.lse + at, x.dout + at * w.WV, x.delta + at, x.dq)


@jit
def key_step(b, values, see, scale, gk, gk2, gv, x, row, ok, w, ALL):
    """Adds what the queries in these rows give to dk (BN, PK), dk2 (BN, P2) and dv (BN, PV)."""
    a = load_queries(x.q, row, ok, w.WK, w)  # (BM, PK), (BM, P2)
    douts = load_rows(x.dout, row, ok, w.WV, w.PV, w.WV)  # (BM, PV)
    norm = tl.load(x.lse + row, mask=ok, other=float("inf"))[None, :]
    inner = tl.load(x.delta + row, mask=ok, other=0)[None, :]
    unit = scale * 0.6931471805599453  # without log2(e)
    p, ds = slopes(b, a, values, douts, norm, inner, see, scale, unit, w, ALL)  # (BN, BM)
    ds = ds.to(douts.dtype)
    if w.SHARED:
        gk = tl.dot(p.to(douts.dtype), douts, gk, input_precision="ieee")
    else:
        gv = tl.dot(p.to(douts.dtype), douts, gv, input_precision="ieee")
    gk = tl.dot(ds, a[0], gk, input_precision="ieee")
    if w.D2 > 0:
        gk2 = tl.dot(ds, a[1], gk2, input_precision="ieee")
    return gk, gk2, gv


@jit
def store_keys(grads, row, ok, gk, gk2, gv, w):
    store_rows(grads.k, row, ok, gk, w.DK, w.PK, w.DK)
    if w.D2 > 0:
        store_rows(grads.k2, row, ok, gk2, w.D2, w.P2, w.D2)
    if not w.SHARED:
        store_rows(grads.v, row, ok, gv, w.DV, w.PV, w.DV)


@jit
def sum_kernel(pieces, firsts, out, S, blocks, chunks, D: constexpr, P: constexpr, BN: constexpr):
    """One program: one block of keys; its pieces (BN, D) in every chunk of the queries, added in order."""
    owner = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    total = zeros(BN, P)
    for chunk in range(chunks):
        first = firsts + chunk * tl.num_programs(0) + owner
        for piece in range(tl.load(first), tl.load(first + 1)):
            total += load_rows(pieces, piece * BN + n, n, D, P, D, True)
    s = owner % blocks * BN + n
    store_rows(out, owner // blocks * S + s, s < S, total, D, P, D)


class KeyGradients:
    """Room for dk, dk2, dv: (B, G, S, width); or, where blocks are cut, (pieces, BN, width) in fp32, to be added."""

    def __init__(self, k, k2, v, pieces, BN):
        self.given = (k, k2, v)
        self.BN = BN
        self.blocks = triton.cdiv(k.shape[2], BN)  # of a group
        self.cut = pieces > k.shape[0] * k.shape[1] * self.blocks
        self.grads = [None if x is None else self.room(x, k.shape[1], pieces) for x in self.given]

    def room(self, x, G, pieces):
        if self.cut:
            return torch.empty(pieces, self.BN, x.shape[3], dtype=torch.float32, device=x.device)
        return torch.empty(x.shape[0], G, *x.shape[2:], dtype=x.dtype, device=x.device)

    @property
    def kv(self):
        """What the kernel gets."""
        return KV(*(self.grads[0] if grad is None else grad for grad in self.grads))

    def finish(self, firsts, chunks=1):
        """firsts: the first piece of each block in each chunk -> dk, dk2, dv."""
        k, k2, _ = self.given
        B, G, S, _ = k.shape
        for i, x in enumerate(self.given):
            if self.cut and x is not None:
                D = x.shape[3]
                whole = torch.empty(B, G, S, D, dtype=x.dtype, device=x.device)
                grid = (B * G * self.blocks,)
                sum_kernel[grid](self.grads[i], firsts, whole, S, self.blocks, chunks, D, power(D), self.BN)
                self.grads[i] = whole
        if k2 is not None and k2.shape[1] < G:
            self.grads[1] = self.grads[1].sum(1, keepdim=True)  # one rotary key for all groups
        return self.grads


# ------------------------------------------------------------------------------------------------------------
# 4) Dense attention: window and compressed


class Tile(NamedTuple):
    """What a program works on at once: BQ queries, which are BM rows, and BN keys."""

    BQ: int
    BM: int
    BN: int


TILES = {  # kind: {widths up to: (rows of queries, keys, warps, stages)}; tuned on an H200, see results/kernels.md
    "forward": {96: (64, 64, 4, 3), 160: (128, 64, 8, 3), 192: (64, 64, 4, 2), 512: (128, 64, 8, 2)},
    "scores": {192: (128, 64, 4, 3), 512: (64, 128, 8, 2)},
    "dq": {96: (64, 64, 4, 2), 192: (128, 64, 8, 3), 512: (128, 32, 8, 3)},
    "dkv": {96: (64, 64, 4, 2), 160: (64, 128, 8, 3), 192: (32, 128, 8, 3), 512: (32, 128, 8, 2)},
}


def dense_tile(kind, w, dtype):
    """-> Tile, and the warps and stages of a kernel. In fp32 only small tiles fit."""
    width = w.padded()
    rows, BN, warps, stages = next(tile for widest, tile in TILES[kind].items() if width <= widest)
    if kind == "dkv" and width > 160 and w.SHARED:
        rows = 64  # no values have to be kept
    if dtype == torch.float32:
        rows, BN, warps, stages = (32, 32, 4, 1)
    BQ = max(1, rows // w.HP)
    return Tile(BQ, max(rows, BQ * w.HP), BN), {"num_warps": warps, "num_stages": stages}


@jit
def span(t, rule):
    """The query at position t reads the entries [low, high)."""
    high = tl.minimum(tl.maximum(t + 1 - rule.l + rule.d, 0) // rule.d, rule.S)
    low = tl.minimum(tl.maximum(t - rule.window - rule.l + 1 + rule.d, 0) // rule.d, high)
    return low, high


@jit
def query_phases(first, rule, BQ, BN):
    """Bounds of the keys that queries first .. first + BQ - 1 read: begin <= whole <= edge <= end.

    Between whole and edge every query reads every key, and no mask is needed; before and after it is.
    """
    low, high = span(first, rule)
    last_low, end = span(tl.minimum(first + BQ, rule.T) - 1, rule)
    whole = tl.minimum(low + tl.cdiv(tl.maximum(last_low - low, 0), BN) * BN, end)
    return low, whole, whole + tl.maximum(high - whole, 0) // BN * BN, end


@jit
def forward_kernel(q, keys, out, lse, scale, rule, w: constexpr, tile: constexpr):
    """One program: BQ queries x the h heads of a group, against the keys that they read."""
    bg, i, t, row, ok = rows_of_tile(rule.T, w, tile)
    at = bg * w.h * rule.T
    a = load_queries(q + at * (w.DK + w.D2), row, ok, w.DK, w)  # (BM, PK), (BM, P2)
    low, high = span(t, rule)  # (BM,)
    keys = of_group(keys, bg, rule, w)
    top, total, mean = no_keys(tile.BM, w.PV)
    walk = query_phases(i * tile.BQ, rule, tile.BQ, tile.BN)
    for phase in tl.static_range(3):  # masked, all read all, masked
        for start in range(walk[phase], walk[phase + 1], tile.BN):
            s = start + tl.arange(0, tile.BN)
            b = load_keys(keys, s, s < rule.S, w, phase == 1)  # (BN, PK), (BN, P2)
            score = dot(a, b, w)  # (BM, BN)
            see = (s[None, :] >= low[:, None]) & (s[None, :] < high[:, None])
            top, total, mean = softmax_step(
                score, see, scale, top, total, mean, keys, b, s, s < rule.S, w, phase == 1
            )
    store_output(out + at * w.DV, lse + at, row, ok, top, total, mean, w)


@jit
def dq_kernel(x, keys, scale, rule, w: constexpr, tile: constexpr):
    """The same walk again: dq = scale sum_j p_j (do . v_j - delta) k_j."""
    bg, i, t, row, ok = rows_of_tile(rule.T, w, tile)
    at = bg * w.h * rule.T * (w.DK + w.D2)
    a = load_queries(x.q + at, row, ok, w.DK, w)  # (BM, PK), (BM, P2)
    low, high = span(t, rule)  # (BM,)
    douts, norm, inner = query_slopes(x, bg, row, ok, rule.T, w)
    keys = of_group(keys, bg, rule, w)
    grad = zeros(tile.BM, w.PK)
    grad2 = zeros(tile.BM, w.P2)
    walk = query_phases(i * tile.BQ, rule, tile.BQ, tile.BN)
    for phase in tl.static_range(3):  # masked, all read all, masked
        for start in range(walk[phase], walk[phase + 1], tile.BN):
            s = start + tl.arange(0, tile.BN)
            see = (s[None, :] >= low[:, None]) & (s[None, :] < high[:, None])
            grad, grad2 = query_step(
                a, douts, norm, inner, see, scale, grad, grad2, keys, s, s < rule.S, w, phase == 1
            )
    store_queries(x.dq + at, row, ok, grad, grad2, scale, w)


@jit
def key_phases(block, part, parts, rule, BQ, BN):
    """Bounds of the tiles of queries that read a block of keys, or of one of `parts` equal parts of them."""
    window = tl.minimum(rule.window, rule.T)
    first = block * BN * rule.d + rule.l - 1  # positions of the first and the last key
    last = ((block + 1) * BN - 1) * rule.d + rule.l - 1
    begin = first // BQ
    end = tl.cdiv(tl.minimum(last + window, rule.T), BQ)
    share = tl.cdiv(end - begin, parts)
    begin += part * share
    end = tl.minimum(begin + share, end)
    whole = tl.minimum(tl.maximum(tl.cdiv(last, BQ), begin), end)  # from here on all see all keys
    edge = tl.minimum(tl.maximum((first + window) // BQ, whole), end)  # from here on not any more
    return begin, whole, edge, end


@jit
def dkv_kernel(x, keys, grads, scale, rule, parts, w: constexpr, tile: constexpr, CUT: constexpr):
    """One program: BN keys of a group against one of `parts` parts of the queries that read them.

    dv = sum_i p_i do_i, dk = scale sum_i p_i (do_i . v - delta_i) q_i. CUT: sum_kernel adds up the parts.
    """
    piece = tl.program_id(0).to(tl.int64)
    owner = piece // parts
    blocks = tl.cdiv(rule.S, tile.BN)
    bg = owner // blocks
    block = (owner % blocks).to(tl.int32)
    s = block * tile.BN + tl.arange(0, tile.BN)
    live = s < rule.S
    keys = of_group(keys, bg, rule, w)
    b = load_keys(keys, s, live, w)  # (BN, PK), (BN, P2)
    values = load_values(keys, b, s, live, w)  # (BN, PV)
    x = rows_of_group(x, bg, rule.T, w)
    gk = zeros(tile.BN, w.PK)
    gk2 = zeros(tile.BN, w.P2)
    gv = zeros(tile.BN, w.PV)
    m = tl.arange(0, tile.BM)
    head = m % w.HP
    walk = key_phases(block, (piece % parts).to(tl.int32), parts, rule, tile.BQ, tile.BN)
    for phase in tl.static_range(3):  # masked, all see all, masked
        for i in range(walk[phase], walk[phase + 1]):
            t = i * tile.BQ + m // w.HP  # (BM,)
            low, high = span(t, rule)
            see = (s[:, None] >= low[None, :]) & (s[:, None] < high[None, :])  # (BN, BM)
            ok = (head < w.h) & (t < rule.T)
            row = head * rule.T + t
            gk, gk2, gv = key_step(b, values, see, scale, gk, gk2, gv, x, row, ok, w, phase == 1)
    to = piece * tile.BN + tl.arange(0, tile.BN) if CUT else bg * rule.S + s
    store_keys(grads, to, live | CUT, gk, gk2, gv, w)


class Dense(torch.autograd.Function):
    """Attention of q (B, H, T, D + P) to k (B, G, S, D), k2 (B, 1 or G, S, P) or None, v (B, G, S, Dv) or None.

    Key i stands at position i d + l - 1, and the last `window` positions are read
    -> o (B, H, T, Dv), lse in base 2 (B, H, T).
    """

    @staticmethod
    def forward(ctx, q, k, k2, v, scale, window, l, d):
        B, H, T, _ = q.shape
        G, S = k.shape[1:3]
        w = widths_of(q, k, k2, v)
        rule = Rule(T, S, G, 1 if k2 is None else k2.shape[1], window, l, d)
        out = torch.empty(B, H, T, w.DV, dtype=q.dtype, device=q.device)
        lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
        tile, options = dense_tile("forward", w, q.dtype)
        grid = (triton.cdiv(T, tile.BQ), B * G)
        keys = aligned_kv(k, k2, v)
        forward_kernel[grid](q, keys, out, lse, scale * LOG2_E, rule, w, tile, **options)
        ctx.save_for_backward(q, k, k2, v, out, lse)
        ctx.rest = (scale * LOG2_E, rule, w)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        q, k, k2, v, out, lse = ctx.saved_tensors
        scale, rule, w = ctx.rest
        B, G, S, _ = k.shape
        T = rule.T
        dout = dout.contiguous()
        keys = aligned_kv(k, k2, v)
        x = Rows(q, out, lse, dout, torch.empty_like(lse), torch.empty_like(q))
        tile, options = dense_tile("dq", w, q.dtype)
        dq_kernel[triton.cdiv(T, tile.BQ), B * G](x, keys, scale, rule, w, tile, **options)

        tile, options = dense_tile("dkv", w, q.dtype)
        blocks = B * G * triton.cdiv(S, tile.BN)  # none where T < l: there is no entry yet
        parts = 1
        if 0 < blocks < 2 * SMS:  # too few to fill the GPU
            parts = min(triton.cdiv(4 * SMS, blocks), triton.cdiv(T, 16 * tile.BQ))
        grads = KeyGradients(k, k2, v, blocks * parts, tile.BN)
        x = x._replace(q=align(q, w.D2), dout=align(dout))
        dkv_kernel[(blocks * parts,)](x, keys, grads.kv, scale, rule, parts, w, tile, grads.cut, **options)
        firsts = torch.arange(0, blocks * parts + 1, parts, device=q.device)
        return x.dq, *grads.finish(firsts), *[None] * 4


def dense(q, keys, scale, window, l=1, d=1):
    """-> o, lse of Dense. Kernels want everything dense in memory."""
    check(q, keys)
    q, k, k2, v = (x if x is None else x.contiguous() for x in (q, keys.k, keys.k2, keys.v))
    return Dense.apply(q, k, k2, v, scale, window, l, d)


def window_attention(q, keys, window, scale):
    """Causal attention to the last `window` positions of a whole text; here k2 may have G groups too."""
    return dense(q, keys, scale, min(window, q.shape[2]))[0]


# ------------------------------------------------------------------------------------------------------------
# 5) Attention to the blocks of lists


def list_tile(kind, share, block, w, dtype):
    """Like dense_tile: `share` queries read one list."""
    rows = share * w.HP
    wide = w.padded() > 160
    forward = kind == "forward"
    BM = max(rows, 16)
    BN = max(block, 32)
    warps, stages = (4, 1)
    if kind == "dkv":  # a step takes several lists' queries, or a part of one list's
        BM = max(32 if max(rows, block) >= 32 else BM, w.HP)
        BN = block
    if dtype == torch.float32:
        pass
    elif kind == "dkv":
        warps = 4 if block >= 64 else 2
        stages = 3 if w.padded() > 64 and rows < 64 else 2
    elif rows >= 64:
        warps = rows // 16
        stages = 2 if forward else 1
    else:
        BN = max(block, 64 if forward else 32)
        warps = triton.cdiv(rows, 16) * (2 if wide else 1)
        stages = 2
    return Tile(share, BM, BN), {"num_warps": warps, "num_stages": stages}


@jit
def blocks_in(lists, n, NP):
    """How many blocks a list names."""
    i = tl.arange(0, NP)
    return tl.sum((tl.load(lists + i, mask=i < n, other=-1) >= 0).to(tl.int32), 0)


@jit
def list_phases(lists, n, BN, BLOCK, NP):
    """Bounds of the keys of a list's blocks, one behind the other. Only the last block, the own one, needs a mask."""
    count = blocks_in(lists, n, NP)
    return 0, tl.maximum(count - 1, 0) * BLOCK // BN * BN, count * BLOCK


@jit
def rows_of_blocks(lists, start, end, S, BN, BLOCK):
    """Rows of the keys start .. start + BN - 1 of a list's blocks -> (BN,); S behind their end.

    start is a multiple of BN. One number is read for each block: an address for each row would be slow.
    """
    j = tl.arange(0, BN)
    s = start + j
    inside = (j if BN >= BLOCK else s) % BLOCK
    for u in tl.static_range(max(BN // BLOCK, 1)):
        block = tl.load(lists + start // BLOCK + u, mask=start + u * BLOCK < end, other=2**20)
        s = tl.minimum(tl.where(j // BLOCK == u, block * BLOCK + inside, s), S)
    return s


@jit
def lists_forward_kernel(
    q, keys, lists, n, out, lse, scale, rule, w: constexpr, tile: constexpr, BLOCK: constexpr, NP: constexpr
):
    """One program: the queries of a list x the h heads of a group, against the keys of the list's blocks."""
    bg, i, t, row, ok = rows_of_tile(rule.T, w, tile)
    at = bg * w.h * rule.T
    a = load_queries(q + at * (w.DK + w.D2), row, ok, w.DK, w)  # (BM, PK), (BM, P2)
    keys = of_group(keys, bg, rule, w)
    lists += (bg * tl.num_programs(0) + i) * n
    top, total, mean = no_keys(tile.BM, w.PV)
    walk = list_phases(lists, n, tile.BN, BLOCK, NP)
    for phase in tl.static_range(2):  # all read all, masked
        for start in range(walk[phase], walk[phase + 1], tile.BN):
            s = rows_of_blocks(lists, start, walk[2], rule.S, tile.BN, BLOCK)  # (BN,)
            b = load_keys(keys, s, s < rule.S, w, phase == 0)  # (BN, PK), (BN, P2)
            score = dot(a, b, w)  # (BM, BN)
            see = s[None, :] <= t[:, None]
            top, total, mean = softmax_step(
                score, see, scale, top, total, mean, keys, b, s, s < rule.S, w, phase == 0
            )
    store_output(out + at * w.DV, lse + at, row, ok, top, total, mean, w)


@jit
def lists_dq_kernel(
    x, keys, lists, n, scale, rule, w: constexpr, tile: constexpr, BLOCK: constexpr, NP: constexpr
):
    """The same walk again, for dq."""
    bg, i, t, row, ok = rows_of_tile(rule.T, w, tile)
    at = bg * w.h * rule.T * (w.DK + w.D2)
    a = load_queries(x.q + at, row, ok, w.DK, w)  # (BM, PK), (BM, P2)
    douts, norm, inner = query_slopes(x, bg, row, ok, rule.T, w)
    keys = of_group(keys, bg, rule, w)
    lists += (bg * tl.num_programs(0) + i) * n
    grad = zeros(tile.BM, w.PK)
    grad2 = zeros(tile.BM, w.P2)
    walk = list_phases(lists, n, tile.BN, BLOCK, NP)
    for phase in tl.static_range(2):  # all read all, masked
        for start in range(walk[phase], walk[phase + 1], tile.BN):
            s = rows_of_blocks(lists, start, walk[2], rule.S, tile.BN, BLOCK)  # (BN,)
            see = s[None, :] <= t[:, None]
            grad, grad2 = query_step(
                a, douts, norm, inner, see, scale, grad, grad2, keys, s, s < rule.S, w, phase == 0
            )
    store_queries(x.dq + at, row, ok, grad, grad2, scale, w)


class Readers(NamedTuple):
    """Who reads which block, as `invert` sorted the lists; a piece is a program's share of a block's readers."""

    tiles: torch.Tensor  # (entries,) tiles of queries, that is lists, by chunk and block
    owners: torch.Tensor  # (pieces,) the piece's block, counted through all groups
    begins: torch.Tensor  # (pieces,) its readers are tiles[begin:end]
    ends: torch.Tensor  # (pieces,)
    firsts: torch.Tensor  # (chunks x blocks + 1,) the first piece of each block in each chunk


@jit
def lists_dkv_kernel(x, keys, grads, readers, scale, rule, w: constexpr, tile: constexpr, CUT: constexpr):
    """One program: the keys of a block against one piece of its readers. CUT: sum_kernel adds up the pieces.

    A step takes BM rows: the queries of MANY lists at once, or one of STEPS parts of those of one list.
    """
    ROWS: constexpr = tile.BQ * w.HP
    STEPS: constexpr = (ROWS + tile.BM - 1) // tile.BM
    MANY: constexpr = tile.BM * STEPS // ROWS
    piece = tl.program_id(0).to(tl.int64)
    owner = tl.load(readers.owners + piece)
    begin = tl.load(readers.begins + piece)
    end = tl.load(readers.ends + piece)
    blocks = tl.cdiv(rule.S, tile.BN)
    bg = owner // blocks
    s = (owner % blocks).to(tl.int32) * tile.BN + tl.arange(0, tile.BN)
    live = s < rule.S
    keys = of_group(keys, bg, rule, w)
    b = load_keys(keys, s, live, w)  # (BN, PK), (BN, P2)
    values = load_values(keys, b, s, live, w)  # (BN, PV)
    x = rows_of_group(x, bg, rule.T, w)
    gk = zeros(tile.BN, w.PK)
    gk2 = zeros(tile.BN, w.P2)
    gv = zeros(tile.BN, w.PV)
    m = tl.arange(0, tile.BM)
    head = m % w.HP
    for start in range(begin * STEPS, end * STEPS, MANY):
        inside = start % STEPS * (tile.BM // w.HP) + m % ROWS // w.HP  # place among the queries of a list
        t = inside  # (BM,)
        for u in tl.static_range(MANY):
            reader = start // STEPS + u
            first = tl.load(readers.tiles + reader, mask=reader < end, other=0) * tile.BQ
            t = tl.where(m // ROWS == u, first + inside, t)
        see = s[:, None] <= t[None, :]  # (BN, BM)
        ok = (head < w.h) & (t < rule.T) & (start + m // ROWS < end * STEPS)
        gk, gk2, gv = key_step(b, values, see, scale, gk, gk2, gv, x, head * rule.T + t, ok, w, False)
    to = piece * tile.BN + tl.arange(0, tile.BN) if CUT else bg * rule.S + s
    store_keys(grads, to, live | CUT, gk, gk2, gv, w)


def invert(lists, blocks, most, chunks):
    """The entries of the lists (B, G, lists, n) sorted by chunk of the lists, then by block -> Readers.

    The readers of one block in one chunk are cut into pieces of at most `most`, a program each, in this order:
    while the queries of a chunk lie in L2, all blocks read them. Every block has a reader, its own queries.
    Nothing is read back to the host: there are as many pieces as there may be, and the last ones are empty.
    """
    B, G, tiles, n = lists.shape
    total = B * G * blocks

    def count_up(size):
        return torch.arange(size, dtype=torch.int32, device=lists.device)

    chunk = count_up(tiles) // triton.cdiv(tiles, chunks)  # (tiles,)
    owner = (chunk[:, None] * B * G + count_up(B * G).view(B, G, 1, 1)) * blocks + lists  # (B, G, tiles, n)
    owner = owner.masked_fill(lists < 0, chunks * total).flatten()  # (entries,)
    owner, order = owner.sort(stable=True)
    readers = order.to(torch.int32) // n % tiles  # (entries,)
    starts = torch.searchsorted(owner, count_up(chunks * total + 1), out_int32=True)  # (chunks total + 1,)
    pieces = (starts.diff() + most - 1) // most  # (chunks total,) of each block in each chunk
    firsts = F.pad(pieces.cumsum(0), (1, 0))  # (chunks total + 1,)
    piece = torch.arange(chunks * total + lists.numel() // most, device=lists.device)  # (pieces,)
    cut = (
        torch.searchsorted(firsts, piece, right=True) - 1
    )  # (pieces,) the (chunk, owner) that it is cut from
    cut = cut.clamp(max=chunks * total - 1)
    ends = starts[cut + 1]
    begins = torch.minimum(
        starts[cut] + (piece - firsts[cut]) * most, ends
    )  # 64 bits: a surplus one lies far out
    ends = torch.minimum(begins + most, ends)
    return Readers(readers, cut % total, begins.to(torch.int32), ends.to(torch.int32), firsts)


class Listed(torch.autograd.Function):
    """Like Dense, on the tokens of the blocks of lists (B, G, ceil(T / share), n), up to the query itself -> o."""

    @staticmethod
    def forward(ctx, q, k, k2, v, lists, scale, block, share):
        B, H, T, _ = q.shape
        G, S = k.shape[1:3]
        n = lists.shape[3]
        w = widths_of(q, k, k2, v)
        rule = Rule(T, S, G, 1 if k2 is None else k2.shape[1], T, 1, 1)
        out = torch.empty(B, H, T, w.DV, dtype=q.dtype, device=q.device)
        lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
        tile, options = list_tile("forward", share, block, w, q.dtype)
        keys = aligned_kv(k, k2, v)
        lists_forward_kernel[lists.shape[2], B * G](
            q, keys, lists, n, out, lse, scale * LOG2_E, rule, w, tile, block, power(n), **options
        )
        ctx.save_for_backward(q, k, k2, v, lists, out, lse)
        ctx.rest = (scale * LOG2_E, rule, w, block, share)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, k2, v, lists, out, lse = ctx.saved_tensors
        scale, rule, w, block, share = ctx.rest
        B, G, S, _ = k.shape
        n = lists.shape[3]
        dout = dout.contiguous()
        keys = aligned_kv(k, k2, v)
        x = Rows(q, out, lse, dout, torch.empty_like(lse), torch.empty_like(q))
        tile, options = list_tile("dq", share, block, w, q.dtype)
        lists_dq_kernel[lists.shape[2], B * G](
            x, keys, lists, n, scale, rule, w, tile, block, power(n), **options
        )

        tile, options = list_tile("dkv", share, block, w, q.dtype)
        most = max(
            1, 2 * n * block // share
        )  # twice the average number of readers: a popular block is many pieces
        chunks = 1
        if share * w.HP >= 64:  # much to fetch: chunks stay in the GPU's L2 cache while all blocks read them
            chunks = min(16, triton.cdiv(q.nbytes + dout.nbytes, B * G * L2))
        readers = invert(lists, triton.cdiv(S, block), most, chunks)
        pieces = len(readers.owners)
        grads = KeyGradients(k, k2, v, pieces, block)
        x = x._replace(q=align(q, w.D2), dout=align(dout))
        lists_dkv_kernel[(pieces,)](x, keys, grads.kv, readers, scale, rule, w, tile, grads.cut, **options)
        return x.dq, *grads.finish(readers.firsts, chunks), *[None] * 4


def listed(q, keys, lists, scale, block, share):
    """-> o of Listed."""
    check(q, keys, block, share)
    q, k, k2, v = (x if x is None else x.contiguous() for x in (q, keys.k, keys.k2, keys.v))
    return Listed.apply(q, k, k2, v, lists, scale, block, share)


def selected_attention(q, q_pos, keys, lists, sizes, scale):
    """Attention to the tokens of lists (B, G, ceil(T / share), n), ascending, then -1; the last is the own block."""
    lists = lists.to(torch.int32).contiguous()
    if keys.length is not None:
        return cached_lists(q, q_pos, keys, lists, sizes.block, scale)
    return listed(q, keys, lists, scale, sizes.block, sizes.share)


# ------------------------------------------------------------------------------------------------------------
# 6) Select: which blocks a query reads


@jit
def score_kernel(
    q, keys, lse, own, over, scale, rule, row0, rows, blocks, sizes: constexpr, w: constexpr, tile: constexpr
):
    """One program: BQ of the lists row0 + .. Their queries' weights, summed over heads and over blocks.

    The weights are made again from lse. FOLD entries begin in a block of l' tokens. Entry i counts once per
    stride of its l / d, OVERLAP of which may lie in the next block: `own` (B G, rows, blocks) counts those in
    the block where it begins, `over` those in the next one. A matrix product sums over heads: adding across
    threads would cost as much as all the rest. All of it times 2^12, so that fp16 resolves it.
    """
    BN: constexpr = tile.BN
    LISTS: constexpr = max(tile.BQ, 16)
    FOLD: constexpr = sizes.block // sizes.d
    OVERLAP: constexpr = sizes.l // sizes.d - 1
    bg = tl.program_id(1).to(tl.int64)
    i = tl.num_programs(0) - 1 - tl.program_id(0)  # long walks first
    m = tl.arange(0, tile.BM)
    x = tl.arange(0, LISTS)
    j = tl.arange(0, BN // FOLD)
    t = (row0 + i * tile.BQ + m // w.HP) * sizes.share  # (BM,)
    head = m % w.HP
    row = head * rule.T + t
    ok = (head < w.h) & (t < rule.T)
    at = bg * w.h * rule.T
    a = load_queries(q + at * (w.DK + w.D2), row, ok, w.DK, w)  # (BM, PK), (BM, P2)
    norm = tl.load(lse + at + row, mask=ok, other=float("inf")) - 12  # (BM,)
    _, high = span(t, rule)  # (BM,)
    half = tl.float32 if q.dtype.element_ty == tl.float32 else tl.float16
    heads_of = (m[:, None] // w.HP == x[None, :]).to(half)  # (BM, LISTS)
    keys = of_group(keys, bg, rule, w)
    to = (bg * rows + i * tile.BQ + x[None, :]) * blocks + j[:, None]  # (BN / FOLD, LISTS)
    beyond = tl.maximum(tl.arange(0, BN) % FOLD + OVERLAP - (FOLD - 1), 0)  # (BN,) strides in the next block
    beyond = beyond.to(tl.float32)[:, None]
    first = row0 + i * tile.BQ
    _, whole = span(first * sizes.share, rule)
    _, end = span(tl.minimum((first + tile.BQ - 1) * sizes.share, rule.T - 1), rule)
    whole = whole // BN * BN  # so far all queries read all entries
    for phase in tl.static_range(2):
        for start in range(0 if phase == 0 else whole, whole if phase == 0 else end, BN):
            s = start + tl.arange(0, BN)
            b = load_keys(keys, s, s < rule.S, w, phase == 0)  # (BN, PK), (BN, P2)
            p = tl.exp2(dot(b, a, w) * scale - norm[None, :])  # (BN, BM)
            if phase == 1:
                p = tl.where(s[:, None] < high[None, :], p, 0.0)
            p = tl.dot(p.to(half), heads_of, input_precision="ieee")  # (BN, LISTS)
            live = (
                (x < tile.BQ)[None, :]
                & (i * tile.BQ + x < rows)[None, :]
                & (start // FOLD + j < blocks)[:, None]
            )
            mine = tl.sum(tl.reshape(p * (OVERLAP + 1 - beyond), (BN // FOLD, FOLD, LISTS)), 1)
            tl.store(own + to + start // FOLD, mine, mask=live)  # (BN / FOLD, LISTS)
            if OVERLAP > 0:
                rest = tl.sum(tl.reshape(p * beyond, (BN // FOLD, FOLD, LISTS)), 1)
                tl.store(over + to + start // FOLD, rest, mask=live)


@jit
def choose(score, j, mine, to, n, NP):
    """The n best of the blocks j <= mine into a list, ascending, then -1. Forced: 0, mine - 1 and mine, the own one.

    The n-th best score is found by bisection of its bits: floats >= 0 are ordered like their bits.
    """
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where((j == 0) | (j >= mine - 1), 0x7F800000, bits)  # forced: infinity
    bits = tl.where(j > mine, -1, bits)
    low = 0  # at least n reach low, or low is 0
    high = 0x7F800001  # fewer than n reach high
    while high - low > 1:
        middle = low + (high - low) // 2
        reach = tl.sum((bits >= middle).to(tl.int32), 0)
        low = tl.where(reach >= n, middle, low)
        high = tl.where(reach > n, high, tl.where(reach == n, middle + 1, middle))  # exactly n: found
    better = (bits > low).to(tl.int32)
    equal = (bits == low).to(tl.int32)
    room = n - tl.sum(better, 0)
    chosen = better + equal * (tl.cumsum(equal, 0) <= room).to(tl.int32)  # of equals the first
    tl.store(to + tl.cumsum(chosen, 0) - 1, j, mask=chosen > 0)
    i = tl.arange(0, NP)
    tl.store(to + i, -1, mask=(i >= tl.sum(chosen, 0)) & (i < n))


@jit
def select_kernel(
    own, over, lists, n, row0, rows, all_rows, blocks, sizes: constexpr, BJ: constexpr, NP: constexpr
):
    """One program: one list, from what score_kernel added up; `over` is None where entries do not overlap."""
    r = tl.program_id(0)
    bg = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, BJ)
    mine = (row0 + r) * sizes.share // sizes.block
    at = (bg * rows + r) * blocks + j
    score = tl.load(own + at, mask=j < mine - 1, other=0)
    if over is not None:
        score += tl.load(over + at - 1, mask=(j > 0) & (j < mine - 1), other=0)
    choose(score, j, mine, lists + (bg * all_rows + row0 + r) * n, n, NP)


@torch.no_grad()
def select(q, keys, lse, tokens, sizes, scale):
    """The lists of every share-th query of a whole text -> (B, G, ceil(T / share), min(n, blocks)).

    The scores of a few thousand lists at a time lie in memory, never those of all.
    """
    q, k, k2 = (x if x is None else x.contiguous() for x in (q, keys.k, keys.k2))
    B, _, T, _ = q.shape
    G, S = k.shape[1:3]
    w = widths_of(q, k, k2, None, aligned=False)
    rule = Rule(T, S, G, 1 if k2 is None else k2.shape[1], T, sizes.l, sizes.d)
    blocks = triton.cdiv(tokens, sizes.block)
    rows = triton.cdiv(T, sizes.share)
    n = min(sizes.n, blocks)
    tile, options = dense_tile("scores", w, q.dtype)
    tile = tile._replace(BN=max(tile.BN, sizes.block // sizes.d))
    chunk = min(rows, triton.cdiv(2**25 // (B * G * blocks), tile.BQ) * tile.BQ)  # lists at a time
    lists = torch.empty(B, G, rows, n, dtype=torch.int32, device=q.device)
    own = torch.empty(B * G, chunk, blocks, dtype=torch.float32, device=q.device)
    over = torch.empty_like(own) if sizes.l > sizes.d else None
    keys = KV(k, k if k2 is None else k2, k)
    for row0 in range(0, rows, chunk):
        count = min(chunk, rows - row0)
        score_kernel[triton.cdiv(count, tile.BQ), B * G](
            q, keys, lse, own, over, scale * LOG2_E, rule, row0, chunk, blocks, sizes, w, tile, **options
        )
        seen = triton.cdiv(
            min(T, (row0 + chunk) * sizes.share), sizes.block
        )  # blocks that the last query may see
        warps = max(1, min(8, power(seen) // 1024))
        select_kernel[count, B * G](
            own, over, lists, n, row0, chunk, rows, blocks, sizes, power(seen, 16), power(n), num_warps=warps
        )
    return lists


def compressed_attention(q, q_pos, keys, tokens, sizes, scale):
    """Attention to the compressed entries -> o (B, H, T, Dv), and the lists of every share-th query."""
    if triton.cdiv(tokens, sizes.block) > 2**15:
        raise Refused(
            f"{tokens} tokens in blocks of {sizes.block}: at most {2**15} blocks are ranked at once"
        )
    if keys.length is not None:
        return cached_entries(q, q_pos, keys, tokens, sizes, scale)
    check(q, keys, sizes.block)
    o, lse = dense(q, keys, scale, q.shape[2], sizes.l, sizes.d)
    return o, select(q, keys, lse, tokens, sizes, scale)


# ------------------------------------------------------------------------------------------------------------
# 7) Mix


@jit
def load_gate(gate, row, ok):
    return tl.load(gate + row, mask=ok, other=0).to(tl.float32)[:, None]


@jit
def mix_kernel(branches, gates, out, H, T, stride, D: constexpr, P: constexpr, BT: constexpr):
    """One program: BT queries of one head. out (B, T, H, D) = sum of gate x branch.

    branches (B, H, T, D) each; gates (B, T, N H), with the strides of B and T.
    """
    bh = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    ok = t < T
    gate = gates + bh // H * stride[0] + bh % H
    mixed = zeros(BT, P)
    for i in tl.static_range(len(branches)):
        branch = load_rows(branches[i], bh * T + t, ok, D, P, D)  # (BT, P)
        mixed += load_gate(gate + i * H, t * stride[1], ok) * branch
    store_rows(out, (bh // H * T + t) * H + bh % H, ok, mixed, D, P, D)


@jit
def unmix_kernel(
    branches, gates, dout, grads, dgates, H, T, stride, dstride, D: constexpr, P: constexpr, BT: constexpr
):
    """Its gradient: gate x dout to each branch, branch . dout to its gate. dout (B, H, T, D) with strides."""
    bh = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    ok = t < T
    gate = gates + bh // H * stride[0] + bh % H
    dgate = dgates + (bh // H * T + t) * len(branches) * H + bh % H  # (BT,)
    d = tl.arange(0, P)
    at = dout + bh // H * dstride[0] + bh % H * dstride[1] + t[:, None].to(tl.int64) * dstride[2] + d[None, :]
    douts = tl.load(at, mask=ok[:, None] & (d < D)[None, :], other=0).to(tl.float32)  # (BT, P)
    for i in tl.static_range(len(branches)):
        grad = load_gate(gate + i * H, t * stride[1], ok) * douts  # (BT, P)
        store_rows(grads[i], bh * T + t, ok, grad, D, P, D)
        branch = load_rows(branches[i], bh * T + t, ok, D, P, D).to(tl.float32)  # (BT, P)
        tl.store(dgate + i * H, tl.sum(douts * branch, 1).to(dgates.dtype.element_ty), mask=ok)


class Mix(torch.autograd.Function):
    """mix, below, with its gradient."""

    @staticmethod
    def forward(ctx, gates, *branches):
        B, H, T, D = branches[0].shape
        ctx.save_for_backward(gates, *branches)
        out = torch.empty(B, T, H, D, dtype=branches[0].dtype, device=gates.device)
        grid = (B * H, triton.cdiv(T, 16))
        mix_kernel[grid](branches, gates, out, H, T, gates.stride()[:2], D, power(D), 16)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, dout):
        gates, *branches = ctx.saved_tensors
        B, H, T, D = branches[0].shape
        dout = dout if dout.stride(3) == 1 else dout.contiguous()
        grads = [torch.empty_like(x) for x in branches]
        dgates = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
        strides = (gates.stride()[:2], dout.stride()[:3])
        unmix_kernel[B * H, triton.cdiv(T, 16)](
            tuple(branches), gates, dout, tuple(grads), dgates, H, T, *strides, D, power(D), 16
        )
        return dgates, *grads


def mix(gates, *branches):
    """Sum of gate x branch (B, H, T, D), which lies in memory as (B, T, H, D); gates (B, T, N H)."""
    gates = gates.to(branches[0].dtype)
    gates = gates if gates.stride(-1) == 1 else gates.contiguous()
    return Mix.apply(gates, *(x.contiguous() for x in branches))


# ------------------------------------------------------------------------------------------------------------
# 8) Slots of a cache


class Quantity(NamedTuple):
    """What is written: new (B, heads, T, W) with the strides of B, heads and T, to buffer (B, heads, S, W)."""

    new: torch.Tensor
    buffer: torch.Tensor
    heads: int
    stride: tuple


@jit
def write_row(x, b, head, take, slot, S, W, P):
    """new[b, head, take] -> buffer[b, head, slot]."""
    if head < x.heads:
        i = tl.arange(0, P)
        at = x.new + b * x.stride[0] + head * x.stride[1] + take * x.stride[2]
        row = tl.load(at + i, mask=i < W)
        to = x.buffer + ((b * x.heads + head) * S + slot) * W
        tl.store(to + i, row.to(x.buffer.dtype.element_ty), mask=i < W)


@jit
def write_slots_kernel(quantities, length, count, S, widths: constexpr, padded: constexpr):
    """One program: one new token of one row and head. Only the last S tokens find room in a ring."""
    j = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2)
    n = tl.load(count + b)
    take = j + tl.maximum(n - S, 0)
    if take < n:
        slot = (tl.load(length + b) + take) % S
        for i in tl.static_range(len(quantities)):
            write_row(quantities[i], b, head, take, slot, S, widths[i], padded[i])


def write_slots(length, buffers, new, count, ring):
    """In place: buffers (B, heads, S) or (B, heads, S, width), new likewise with T. No row is checked for room."""
    B, _, T = new[0].shape[:3]
    S = buffers[0].shape[2]
    quantities = []
    for buffer, x in zip(buffers, new):
        if x.dim() == 3:  # positions
            x = x[..., None]  # (B, heads, T, 1)
        x = x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
        quantities.append(Quantity(x, buffer, x.shape[1], x.stride()[:3]))
    widths = tuple(x.new.shape[3] for x in quantities)
    padded = tuple(power(width) for width in widths)
    heads = max(x.heads for x in quantities)
    grid = (min(T, S), B, heads)
    count = count.contiguous()  # it may be one number, expanded
    write_slots_kernel[grid](tuple(quantities), length, count, S, widths, padded)


# ------------------------------------------------------------------------------------------------------------
# 9) Decoding: a few queries against the slots of a cache


class Shape(NamedTuple):
    """How a decoding step is cut: T queries, TQ in a program, and the slots of a group in so many `splits`."""

    T: int
    TQ: int
    S: int
    G: int
    G2: int
    pos_heads: int
    splits: int


@jit
def rows_of_program(shape, w, BM):
    """This program's number, its group, and of its rows (BM,) head, query, place in q, which of them exist."""
    which = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(shape.T, shape.TQ)
    bg = which // tiles
    m = tl.arange(0, BM)
    head = m // shape.TQ
    t = (which % tiles * shape.TQ).to(tl.int32) + m % shape.TQ
    return which, bg, head, t, (bg * w.h + head) * shape.T + t, (head < w.h) & (t < shape.T)


@jit
def share_of(keys, splits, BN):
    """The keys begin .. end - 1 of this program, of all that are to be read."""
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(keys, splits), BN) * BN
    return split * share, tl.minimum((split + 1) * share, keys)


@jit
def store_share(out, part, stats, which, bg, head, t, ok, top, total, mean, shape, w, BM):
    """The only share writes out (B, T, H, Dv). One of several leaves its mean and (top, total) to `combine`."""
    mean = mean / tl.where(total > 0, total, 1.0)[:, None]
    at = (which * shape.splits + tl.program_id(1)) * BM + tl.arange(0, BM)
    if part is None:
        to = ((bg // shape.G * shape.T + t) * shape.G + bg % shape.G) * w.h + head
        store_rows(out, to, ok, mean, w.DV, w.PV, w.DV)
    else:
        store_rows(part, at, ok, mean, w.PV, w.PV, w.PV)
    if stats is not None:
        tl.store(stats + at * 2, top)
        tl.store(stats + at * 2 + 1, total)


@jit
def cached_kernel(
    q, q_pos, keys, k_pos, length, out, part, stats, raw, scale, window, shape, w: constexpr, tile: constexpr
):
    """One program: the h heads of a group x TQ queries against one share of its filled slots.

    raw (B, H, T, S): the scores in base 2 as well. Its rows are padded to a multiple of 16 entries, and
    written up to one, so that a thread moves 16 bytes at once.
    """
    which, bg, head, t, row, ok = rows_of_program(shape, w, tile.BM)
    b = bg // shape.G
    a = load_queries(q, row, ok, w.DK, w)  # (BM, PK), (BM, P2)
    stands = tl.load(q_pos + b * shape.T + t, mask=ok, other=0)[:, None]  # (BM, 1)
    keys = of_group(keys, bg, shape, w)
    k_pos += (b * shape.pos_heads + bg % shape.G % shape.pos_heads) * shape.S
    filled = tl.minimum(tl.load(length + b), shape.S).to(tl.int32)
    begin, end = share_of(filled, shape.splits, tile.BN)
    top, total, mean = no_keys(tile.BM, w.PV)
    for start in range(begin, end, tile.BN):
        s = start + tl.arange(0, tile.BN)
        live = s < filled
        c = load_keys(keys, s, live, w)  # (BN, PK), (BN, P2)
        score = dot(a, c, w)  # (BM, BN)
        lies = tl.load(k_pos + s, mask=live, other=-1)[None, :]  # (1, BN)
        see = (lies >= 0) & (lies <= stands) & (lies > stands - window)
        if raw is not None:
            to = raw + row[:, None] * (tl.cdiv(shape.S, 16) * 16) + s[None, :]
            near = ok[:, None] & (s < tl.cdiv(filled, 16) * 16)[None, :]
            tl.store(to, tl.where(see, score * scale, -1e30), mask=near)
        top, total, mean = softmax_step(score, see, scale, top, total, mean, keys, c, s, live, w, False)
    store_share(out, part, stats, which, bg, head, t, ok, top, total, mean, shape, w, tile.BM)


@jit
def combine(out, part, stats, which, m, shape, w, BM, SPLITS):
    """One query row: the shares' means, weighted by their sums."""
    i = tl.arange(0, SPLITS)
    d = tl.arange(0, w.PV)
    at = (which * shape.splits + i) * BM + m
    live = i < shape.splits
    top = tl.load(stats + at * 2, mask=live, other=-1e30)  # (SPLITS,)
    total = tl.load(stats + at * 2 + 1, mask=live, other=0)  # (SPLITS,)
    weight = total * tl.exp2(top - tl.max(top, 0))  # (SPLITS,)
    means = tl.load(part + at[:, None] * w.PV + d[None, :], mask=live[:, None], other=0)  # (SPLITS, PV)
    norm = tl.sum(weight, 0)
    o = tl.sum(means * weight[:, None], 0) / tl.where(norm > 0, norm, 1.0)  # (PV,)
    tiles = tl.cdiv(shape.T, shape.TQ)
    bg = which // tiles
    t = which % tiles * shape.TQ + m % shape.TQ
    to = ((bg // shape.G * shape.T + t) * shape.G + bg % shape.G) * w.h + m // shape.TQ
    tl.store(out + to * w.DV + d, o.to(out.dtype.element_ty), mask=(d < w.DV) & (t < shape.T))


@jit
def combine_kernel(out, part, stats, shape, w: constexpr, BM: constexpr, SPLITS: constexpr):
    """One program: one query row."""
    combine(out, part, stats, tl.program_id(0).to(tl.int64), tl.program_id(1), shape, w, BM, SPLITS)


def check_cached(q, keys, few=False):
    """Raises Refused for what the decoding kernels cannot do -> heads of a group, queries. few: at most 128 rows."""
    H, T = q.shape[1:3]
    h = H // keys.k.shape[1]
    if keys.length is None:
        raise Refused("slots of a ring and new tokens side by side")
    if h > 128 or H % keys.k.shape[1] or few and h * T > 128:
        raise Refused(f"{h} heads in a group, {T} queries: at most 128 heads" + " x queries" * few)
    if any(x is not None and x.dtype != q.dtype for x in (keys.k, keys.k2, keys.v)):
        raise Refused("queries, keys and values must be of one dtype")
    return h, T


class Step:
    """How a decoding step is cut into programs, and room for what they write."""

    def __init__(self, q, q_pos, keys, TQ, slots, raw=False):
        B, H, T, _ = q.shape
        G, S = keys.k.shape[1:3]
        self.w = widths_of(q, keys.k, keys.k2, keys.v, aligned=False)
        self.keys = KV(keys.k, keys.k if keys.k2 is None else keys.k2, keys.k if keys.v is None else keys.v)
        self.q = q.contiguous()
        self.q_pos = q_pos.expand(B, T).contiguous()
        BM = power(self.w.h * TQ, 16)
        width = self.w.padded() + (0 if self.w.SHARED else self.w.PV)
        area = BM * self.w.PV  # numbers of the output
        BN = power(TILE // (width * keys.k.element_size()) + 1) // 2  # the power of 2 below
        BN = max(32, min(128 if area <= 2**12 else 32, BN))
        rows = B * G * triton.cdiv(T, TQ)
        each = (
            2 if area <= 2**14 else 1
        )  # programs that share a multiprocessor: one waits, another multiplies
        tiles = max(1, triton.cdiv(slots, BN))
        splits = max(1, min(64, slots // 128, each * SMS // rows))  # one wave, each with at least 128 keys
        splits = triton.cdiv(tiles, triton.cdiv(tiles, splits))  # none without a tile
        self.tile = Tile(TQ, BM, BN)
        self.shape = Shape(T, TQ, S, G, 1, keys.pos.shape[1], splits)
        self.grid = (rows, splits)
        self.warps = 8 if self.w.DK > 256 and area > 2**13 else 4
        out = torch.empty(B, T, H, self.w.DV, dtype=q.dtype, device=q.device)
        part = None
        stats = None
        if splits > 1:
            part = torch.empty(rows, splits, BM, self.w.PV, dtype=torch.float32, device=q.device)
        if splits > 1 or raw:
            stats = torch.empty(rows, splits, BM, 2, dtype=torch.float32, device=q.device)
        self.outputs = (out, part, stats)

    def read(self, keys, scale, window=None, raw=None):
        """Launches cached_kernel."""
        window = 2**31 - 1 if window is None else window
        cached_kernel[self.grid](
            self.q,
            self.q_pos,
            self.keys,
            keys.pos,
            keys.length,
            *self.outputs,
            raw,
            scale * LOG2_E,
            window,
            self.shape,
            self.w,
            self.tile,
            num_warps=self.warps,
        )

    def combined(self):
        """-> o (B, H, T, Dv)."""
        shape = self.shape
        if shape.splits > 1:
            grid = (self.grid[0], self.w.h * shape.TQ)
            warps = 4 if shape.splits > 16 else 1
            rest = (shape, self.w, self.tile.BM, power(shape.splits))
            combine_kernel[grid](*self.outputs, *rest, num_warps=warps)
        return self.outputs[0].transpose(1, 2)


def cached_attention(q, q_pos, keys, scale, window=None):
    """Attention of a few queries to the filled slots; a query that sees nothing gets 0."""
    h, T = check_cached(q, keys)
    if h * T > 128 and T > 16:
        raise Refused(f"{h} heads x {T} queries: a long prompt is better off with torch's own kernel")
    step = Step(q, q_pos, keys, min(T, 128 // h), keys.k.shape[2])
    step.read(keys, scale, window)
    return step.combined()


@jit
def cached_lists_kernel(
    q,
    q_pos,
    keys,
    lists,
    n,
    length,
    out,
    part,
    stats,
    scale,
    shape,
    w: constexpr,
    tile: constexpr,
    BLOCK: constexpr,
    NP: constexpr,
):
    """One program: the h heads of a group and one query against one share of the slots of its list's blocks.

    Slot s holds position s, so what the query may see ends where it stands.
    """
    which, bg, head, t, row, ok = rows_of_program(shape, w, tile.BM)
    b = bg // shape.G
    a = load_queries(q, row, ok, w.DK, w)  # (BM, PK), (BM, P2)
    keys = of_group(keys, bg, shape, w)
    lists += which * n
    seen = tl.load(q_pos + b * shape.T + which % shape.T).to(tl.int32) + 1
    seen = tl.minimum(tl.minimum(tl.load(length + b), shape.S).to(tl.int32), seen)
    keys_all = blocks_in(lists, n, NP) * BLOCK
    begin, end = share_of(keys_all, shape.splits, tile.BN)
    top, total, mean = no_keys(tile.BM, w.PV)
    for start in range(begin, end, tile.BN):
        s = rows_of_blocks(lists, start, keys_all, seen, tile.BN, BLOCK)  # (BN,)
        live = s < seen
        c = load_keys(keys, s, live, w)  # (BN, PK), (BN, P2)
        score = dot(a, c, w)  # (BM, BN)
        top, total, mean = softmax_step(
            score, live[None, :], scale, top, total, mean, keys, c, s, live, w, False
        )
    store_share(out, part, stats, which, bg, head, t, ok, top, total, mean, shape, w, tile.BM)


def cached_lists(q, q_pos, keys, lists, block, scale):
    """selected_attention of a few queries, each with a list of its own, against a cache."""
    check_cached(q, keys, few=True)
    n = lists.shape[3]
    step = Step(q, q_pos, keys, 1, n * block)
    cached_lists_kernel[step.grid](
        step.q,
        step.q_pos,
        step.keys,
        lists,
        n,
        keys.length,
        *step.outputs,
        scale * LOG2_E,
        step.shape,
        step.w,
        step.tile,
        block,
        power(n),
        num_warps=step.warps,
    )
    return step.combined()


@jit
def importance_kernel(
    raw,
    out,
    part,
    stats,
    importance,
    length,
    row,
    chunks,
    shape,
    w: constexpr,
    BE: constexpr,
    BM: constexpr,
    SPLITS: constexpr,
):
    """What is left when all scores raw (B, H, T, row) are known, for one query and group; two kinds of programs.

    The first `chunks` sum the weights of BE entries over heads, importance (B, G, T, row). Side by side with
    them the others combine the shares, one head each.
    """
    which = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    bg = which // shape.T
    t = which % shape.T
    if chunk >= chunks:
        combine(out, part, stats, bg, ((chunk - chunks) * shape.T + t).to(tl.int32), shape, w, BM, SPLITS)
    else:
        head = tl.arange(0, w.HP)
        i = tl.arange(0, SPLITS)
        e = chunk * BE + tl.arange(0, BE)
        count = tl.minimum(tl.load(length + bg // shape.G), row).to(tl.int32)
        ok = (head < w.h)[:, None] & (e < tl.cdiv(count, 16) * 16)[None, :]
        at = ((bg * w.h + head) * shape.T + t)[:, None] * row + e[None, :]
        score = tl.load(raw + at, mask=ok, other=-1e30)  # (HP, BE)
        at = (bg * shape.splits + i[:, None]) * BM + (head * shape.T + t)[None, :]  # (SPLITS, HP)
        ok = (i < shape.splits)[:, None] & (head < w.h)[None, :]
        tops = tl.load(stats + at * 2, mask=ok, other=-1e30)  # (SPLITS, HP)
        totals = tl.load(stats + at * 2 + 1, mask=ok, other=0)  # (SPLITS, HP)
        top = tl.maximum(tl.max(tops, 0), -1e29)  # (HP,) above what is masked
        total = tl.sum(totals * tl.exp2(tops - top[None, :]), 0)  # (HP,)
        weight = 1 / tl.where(total > 0, total, 1.0)
        p = tl.exp2(score - top[:, None]) * weight[:, None]  # (HP, BE)
        tl.store(importance + which * row + e, tl.sum(p, 0), mask=e < row)


@jit
def cached_select_kernel(
    importance, q_pos, lists, n, row, G, T, sizes: constexpr, BJ: constexpr, NP: constexpr
):
    """One program: the list of one query and group, from importance (B, G, T, row) of entries: NSA's eqs 8 to 11."""
    FOLD: constexpr = sizes.block // sizes.d
    OVERLAP: constexpr = sizes.l // sizes.d - 1
    which = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BJ)
    own = tl.load(q_pos + which // T // G * T + which % T).to(tl.int32) // sizes.block
    score = tl.zeros((BJ,), tl.float32)
    for m in tl.static_range(-OVERLAP, FOLD):
        e = j * FOLD + m  # an entry that touches block j, and how many strides they share
        p = tl.load(importance + which * row + e, mask=(e >= 0) & (e < row), other=0)  # (BJ,)
        score += p * (min(m + OVERLAP, FOLD - 1) - max(m, 0) + 1)
    choose(score, j, own, lists + which * n, n, NP)


def cached_entries(q, q_pos, keys, tokens, sizes, scale):
    """compressed_attention of a few queries against the cache of compressed entries."""
    h, T = check_cached(q, keys, few=True)
    B, G, S = keys.k.shape[:3]
    blocks = triton.cdiv(tokens, sizes.block)
    n = min(sizes.n, blocks)
    row = triton.cdiv(S, 16) * 16
    raw = torch.empty(B, G * h, T, row, dtype=torch.float32, device=q.device)
    importance = torch.empty(B, G, T, row, dtype=torch.float32, device=q.device)
    lists = torch.empty(B, G, T, n, dtype=torch.int32, device=q.device)
    step = Step(q, q_pos, keys, T, S, raw=True)
    step.read(keys, scale, raw=raw)
    many = min(2**13, power(raw.numel() // (8 * SMS)))  # scores of a program: fewer where these fill no GPU
    BE = max(128, many // power(h))
    chunks = triton.cdiv(row, BE)
    combining = h if step.shape.splits > 1 else 0  # programs
    importance_kernel[B * G * T, chunks + combining](
        raw,
        *step.outputs,
        importance,
        keys.length,
        row,
        chunks,
        step.shape,
        step.w,
        BE,
        step.tile.BM,
        power(step.shape.splits),
    )
    warps = max(1, min(8, power(blocks) // 512))
    cached_select_kernel[(B * G * T,)](
        importance, step.q_pos, lists, n, row, G, T, sizes, power(blocks, 16), power(n), num_warps=warps
    )
    return step.outputs[0].transpose(1, 2), lists


# ------------------------------------------------------------------------------------------------------------


def main(argv):
    for word in argv:
        if word in ("-h", "--help"):
            print(__doc__.strip())
            return 0
        print(f"error: unknown option {word!r}: try --help", file=sys.stderr)
        return 2
    if triton is None:
        print("error: Triton is not installed", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = f"compiled for {torch.cuda.get_device_name()}" if device == "cuda" else "interpreted on the CPU"
    print(f"Triton {triton.__version__}, {where}\n")
    T = 64
    q, k, v = (torch.randn(1, heads, T, 16, device=device) for heads in (4, 2, 2))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (1, 4, T, 16)
    keys = KV(k, None, v)
    block = torch.arange(4, device=device)  # (4,)
    late = block * 16 > torch.arange(T, device=device)[:, None]  # (T, 4)
    lists = block.to(torch.int32).expand(1, 2, T, 4).masked_fill(late, -1)  # (1, 2, T, 4)
    scale = 16**-0.5
    outputs = {
        "a window of all tokens": window_attention(q, keys, T, scale),
        "blocks of one token": dense(q, keys, scale, T, l=1, d=1)[0],
        "lists of all blocks of 16": listed(q, keys, lists, scale, 16, 1),
    }
    print(f"{T} queries, 4 heads in 2 groups: largest difference to dense attention\n")
    for what, o in outputs.items():
        print(f"  {what:26} {(o - want).abs().max():.1e} (fp32)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
