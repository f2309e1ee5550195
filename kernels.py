"""Fast paths on a GPU, in Triton: rotation, sparse attention with its gradients, and what decoding does.

The definitions are the functions under `@fast_path` in latent_attention.py, nsa.py and mtp.py. A function
of the same name here takes the same arguments and gives the same result, but touches memory less often. Where
there is none (`draw` and `commit` of mtp.py) torch.compile makes it. test_all.py compares every pair that is
written here, on a CPU in Triton's interpreter (TRITON_INTERPRET=1).

What moves: the h heads of a group read the same keys. A program keeps a tile of queries x h heads on the
chip and walks through the keys that they may read: load keys and values, multiply, add up. A key is loaded
once for all rows of the tile, and in training the T x S weights are never written. To memory go the output
and one number a row, lse, from which the backward pass makes the weights again. A block's tokens are fetched
anew for every list that names it: at 64k tokens and n l' = 1024 these are 137 GB a layer at 4 groups of width
128, or 13 ms at the pace of an H200's L2 cache. This is why it pays that 4 queries share a list.

    1) pairs      which function runs: the definition or its fast path
    2) rope       angles, rotation and halves in one pass over x; its gradient is the rotation back
    3) steps      rows of a tile; one step of the softmax, one of the gradient of queries, one of keys
    4) dense      a walk through keys in a row: window and compressed; forward, dq, dk and dv
    5) lists      a walk through the blocks of a list; dk and dv from the lists inverted, or by atomics
    6) attention  4) or 5) with their gradients
    7) select     block scores, made again from lse and summed over heads by a matrix product; the n best
    8) decoding   a few queries against the slots of a cache, or of a list's blocks, split over programs
    9) mix        the gates, and the heads merged
    10) slots     keys, values and positions of new tokens to their slots, each row at its own length
    11) stream    what stands between two matrix products of a block

    forward   s = scale q k, lse = log sum exp s, o = sum exp(s - lse) v (FlashAttention, arXiv 2205.14135);
              exp and log are to base 2 in the code, so `scale` there includes log2(e)
    backward  p = exp(s - lse), delta = do . o, ds = p (do . v - delta). dq = scale ds k walks like the
              forward pass. For dk = scale ds q and dv = p do a tile of keys walks through the queries that
              read it: positions say which these are, or the entries of the lists, sorted by block.

Sums are taken in a fixed order, so two runs give the same bits, with one exception: where 64 rows or more
(heads rounded up to a power of 2) read one list, dk and dv are added up by atomics, which is 1.4 times as
fast (results/kernels.md). There torch.use_deterministic_algorithms(True) brings the fixed order back. No
preset has so many heads.
A key may be [k ; k2], where all groups may share k2 (the rotary key). The value may be k itself (a latent):
one load serves both.
What lies behind the end of a shorter row is never read by what lies before it.

Limits: widths up to 256, 64 heads in a group (32 where 4 queries share a list), blocks of 16 to 128 tokens;
in a cache 128 heads. What does not fit into the GPU's shared memory is left to the definition, too, but in a
backward pass ends in Triton's OutOfResources. Tensors lie on the current device. Does NOT include: FP8,
paging, several texts in one row.
`python kernels.py` compares with dense attention; results/bench_kernels.py takes times. This is not the
package `kernels` on PyPI. Read first: latent_attention.py and nsa.py.

Letters as there. A tile has BM rows, BQ queries x HP heads: row m is head m % HP of query m // HP. Tiles
are powers of 2 and the rest is masked: HP is h rounded up, NP is n, and PK, P2, PV are the widths DK, D2,
DV of k, k2, v. ALL: all is read and no mask is needed.
"""

import functools
import math
import os
import sys
from collections import namedtuple

import torch
import torch.nn.functional as F

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: kernels run on the CPU

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


EXACT = constexpr and constexpr("tf32x3")  # fp32 products: three of tf32; they pass fp32's tests at 1e-5
SMS = 132  # multiprocessors of an H100 or H200
L2 = 2**25  # bytes of queries that find room in its L2 cache of 50 MB, beside all else
BYTES = 40 * 2**10  # of keys and values that a decoding program multiplies at once
AREA = 2**13  # numbers of its output that fit well into registers
LOG2_E = 1.4426950408889634  # softmax in base 2: exp2(x log2(e)) = exp(x)
LN_2 = constexpr and constexpr(0.6931471805599453)  # of a gradient in base 2: 1 / log2(e)

# ------------------------------------------------------------------------------------------------------------
# 1) Pairs

PAIRS = {}  # name -> (definition, fast function)


class Refused(ValueError):
    """A fast function cannot take these arguments; raised before anything is launched or written."""


# What leaves the work to the definition: also a tile too large for the GPU's shared memory, which Triton says
# before it launches
CANNOT = (Refused,) if triton is None else (Refused, triton.OutOfResources)


@functools.cache
def has_bf16(device):
    """Whether a device is a GPU that computes in bf16: from compute capability 8.0 (2020) on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def tensor_cores(f):
    """Decorator: f's fp32 products are of TF32 on a GPU, faster, with 10 bits of mantissa.

    For what need not be exact to stay right: a draft is verified, whatever law it was drawn from.
    """

    @functools.wraps(f)
    def inexact(*args):
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return f(*args)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return inexact


def usable(x):
    """Whether kernels can take a tensor: on a GPU that has bf16, with Triton, not in fp64."""
    return triton is not None and x.is_cuda and x.dtype != torch.float64 and has_bf16(x.device)


def amp_dtype(x):
    """The dtype to which a matrix product casts x: under autocast that of autocast, but never from fp64."""
    auto = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if auto else x.dtype


def tensors_of(args):
    """The tensors among arguments, which may be tuples or lists."""
    for x in args:
        if torch.is_tensor(x):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors_of(x)


class Compiled:
    """torch.compile of a definition that has no kernel; on a CPU it is the definition.

    Each shape is compiled anew, because torch 2.11 fails at some variable shapes. Decoders of many sizes
    make many shapes, so the limit after which torch runs the definition itself is set high.
    """

    def __init__(self, definition):
        self.definition = definition

    @functools.cached_property
    def made(self):
        return torch.compile(self.definition, dynamic=False)

    def __call__(self, *args, **more):
        if not torch.cuda.is_available():
            return self.definition(*args, **more)
        with torch._dynamo.config.patch(recompile_limit=256):
            return self.made(*args, **more)


def fast_path(definition):
    """Decorator: on a GPU the function of this name in kernels.py runs, if it can take the arguments.

    Where there is none, the definition is compiled. `.definition` of the result is the definition itself.
    """
    name = definition.__name__
    PAIRS[name] = (definition, globals().get(name) or Compiled(definition))

    @functools.wraps(definition)
    def either(*args, **more):
        tensors = list(tensors_of((*args, *more.values())))
        if tensors and all(usable(x) for x in tensors):
            try:
                return PAIRS[name][1](*args, **more)
            except CANNOT:
                pass
        return definition(*args, **more)

    either.definition = definition
    return either


def check(q, keys, queries=1, most=64, width=256, block=16):
    """Raises Refused for what attention kernels cannot do -> heads of a group.

    queries: so many read the same keys; most: heads in a group; width: the largest; block: tokens in one.
    """
    H = q.shape[1]
    G = keys.k.shape[1]
    given = [x for x in (keys.k, keys.k2, keys.v) if x is not None]
    key_width = keys.k.shape[3] + (0 if keys.k2 is None else keys.k2.shape[3])
    if len(q) != len(keys.k) or q.shape[3] != key_width:
        raise Refused(f"queries {tuple(q.shape)} and keys {tuple(keys.k.shape)} do not fit")
    if len(q) * G > 65535:
        raise Refused(f"{len(q)} rows of {G} groups: the second axis of a grid ends at 65,535")
    if H % G or H // G > most:
        raise Refused(f"{H} heads in {G} groups: a group has 1 to {most} heads")
    if H // G * queries > 128:
        raise Refused(f"{queries} queries x {H // G} heads read the same keys: at most 128 rows")
    if max(x.shape[3] for x in given) > width:
        raise Refused(f"widths {[x.shape[3] for x in given]}: at most {width}")
    if any(x.dtype != q.dtype for x in given):
        raise Refused("queries, keys and values must be of one dtype")
    if block not in (16, 32, 64, 128):
        raise Refused(f"blocks of {block} tokens: 16, 32, 64 or 128")
    return H // G


# ------------------------------------------------------------------------------------------------------------
# 2) Rope


@jit
def rope_kernel(
    x, out, pos, H, turned, T, strides, to_strides, pos_strides, sign, log2_base, more, factor,
    HEADS: constexpr, D: constexpr, PD: constexpr, P: constexpr, HALF: constexpr, BT: constexpr,
):  # fmt: skip
    """One program: BT tokens of HEADS heads, of which only the first `turned` turn.

    x and out (B, H, T, D + P) have strides, but the last is 1.
    """
    parts = tl.cdiv(H, HEADS)
    b = (tl.program_id(0) // parts).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)  # (BT,)
    i = tl.arange(0, HALF)
    # Numbers arrive in fp32. At position 4096 their last bit is an angle of 1e-4, so `more` brings the rest.
    part = i.to(tl.float64) * (-2.0 / P)
    power_of_2 = part * log2_base + part * more
    freq = tl.exp2(power_of_2)  # (HALF,) base^(-2i/P)
    turns = freq * 1303.7972938088067  # in 8192 tokens
    keep = tl.minimum(tl.maximum((turns - 1) / 3, 0.0), 1.0)
    freq = (freq * (keep + (1 - keep) / factor)).to(tl.float32)
    p = tl.load(pos + b * pos_strides[0] + t * pos_strides[1], mask=t < T, other=0).to(tl.float32)  # (BT,)
    angle = sign * p[:, None] * freq[None, :]  # (BT, HALF)
    cos = tl.cos(angle)
    sin = tl.sin(angle)
    ok = (t < T)[:, None] & (i < P // 2)[None, :]
    d = tl.arange(0, PD)[None, :]  # of what is not turned
    still = (t < T)[:, None] & (d < D)
    row = t[:, None].to(tl.int64)
    first = tl.program_id(0) % parts * HEADS
    for h in range(first, tl.minimum(first + HEADS, H)):
        head = tl.cast(h, tl.int64)
        at = x + b * strides[0] + head * strides[1] + row * strides[2]
        to = out + b * to_strides[0] + head * to_strides[1] + row * to_strides[2]
        if D > 0:
            tl.store(to + d, tl.load(at + d, mask=still), mask=still)
        at += D + i[None, :]
        to += D + i[None, :]
        u = tl.load(at, mask=ok, other=0).to(tl.float32)  # (BT, HALF)
        v = tl.load(at + P // 2, mask=ok, other=0).to(tl.float32)  # (BT, HALF)
        if h < turned:
            u, v = u * cos - v * sin, v * cos + u * sin  # (BT, HALF) each
        tl.store(to, u.to(out.dtype.element_ty), mask=ok)
        tl.store(to + P // 2, v.to(out.dtype.element_ty), mask=ok)


@functools.cache
def log2_of(base):
    """log2 of base in fp32, and what that lacks."""
    exact = math.log2(base)
    most = torch.tensor(exact, dtype=torch.float32).item()
    return most, exact - most


class Rope(torch.autograd.Function):
    """rope, below. Its gradient turns backwards. What both give lies as (B, T, H, ..)."""

    @staticmethod
    def forward(ctx, x, pos, base, factor, still, heads):
        ctx.save_for_backward(pos)
        ctx.rest = (base, factor, still, heads)
        return Rope.turn(x, pos, *ctx.rest, 1.0)

    @staticmethod
    def backward(ctx, grad):
        return Rope.turn(grad, *ctx.saved_tensors, *ctx.rest, -1.0), None, None, None, None, None

    @staticmethod
    def turn(x, pos, base, factor, still, heads, sign):
        B, H, T, width = x.shape
        out = x.new_empty(B, T, H, width).transpose(1, 2)
        P = width - still
        x = x if x.stride(3) == 1 else x.contiguous()
        strides = (x.stride()[:3], out.stride()[:3], pos.expand(B, T).stride())
        BT = min(64, power(T))
        HEADS = 1 if T < 64 else 4  # which share their sines
        grid = (B * triton.cdiv(H, HEADS), triton.cdiv(T, BT))
        widths = (HEADS, still, power(still), P, power(P // 2), BT)
        turns = (sign, *log2_of(base), float(factor))
        rope_kernel[grid](x, out, pos, H, H if heads is None else heads, T, *strides, *turns, *widths)
        return out


def rope(x, pos, base=10000.0, factor=1.0, still=0, heads=None):
    """x (B, H, T, still + P), pos (B or 1, T) -> likewise; angles in fp32."""
    return Rope.apply(x, pos, base, factor, still, heads)


# ------------------------------------------------------------------------------------------------------------
# 3) Steps that all attention shares

# keys [k ; k2] and values, or their gradients; in place of a part that does not exist stands k, never read
KV = namedtuple("KV", "k k2 v")
# heads of a group; widths of k, k2 (0: there is none) and v; SHARED: the value is k
# FAN: so many programs share a group's heads; each counts as a group of its own, of h heads
# ROW: G if k and v lie as (B, S, G, ..), as a matrix product makes them, else 1
Widths = namedtuple("Widths", "h HP DK PK D2 P2 DV PV SHARED FAN ROW", defaults=(1, 1))
# what a program works on at once: BQ queries, BM rows, BN keys. BLOCK tokens in a block, NP >= n,
# SPLITS: programs that share the keys of a decoding step
Tile = namedtuple("Tile", "BQ BM BN BLOCK NP SPLITS", defaults=(1,))
# what the backward pass reads and writes of each query
Rows = namedtuple("Rows", "q out lse dout delta dq")


def power(n, least=1):
    """The next power of 2, which is what Triton's tiles must be."""
    return max(least, triton.next_power_of_2(n))


def kv_of(k, k2, v):
    return KV(k, k if k2 is None else k2, k if v is None else v)


def widths_of(q, k, k2, v):
    """Widths of these tensors."""
    h = q.shape[1] // k.shape[1]
    DK = k.shape[3]
    D2 = 0 if k2 is None else k2.shape[3]
    DV = DK if v is None else v.shape[3]
    key = (DK, power(DK, 16), D2, power(D2, 16))
    return Widths(h, power(h), *key, DV, power(DV, 16), v is None)


@jit
def zeros(M, N):
    return tl.zeros((M, N), tl.float32)


@jit
def load_rows(x, row, ok, D, P, STRIDE, ALL=False):
    """x[row, :D] -> (rows, P), padded with zeros: rows that are ok, or ALL."""
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
    ok = ok[:, None] & (d < D)[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=ok)


@jit
def load_queries(q, row, ok, w):
    """Rows [a ; b] of q, D and D2 wide -> (BM, PK), (BM, P2)."""
    a = load_rows(q, row, ok, w.DK, w.PK, w.DK + w.D2)
    return a, load_rows(q + w.DK, row, ok, w.D2, w.P2, w.DK + w.D2) if w.D2 > 0 else a


@jit
def load_keys(keys, s, ok, w, ALL=False):
    """Keys [k ; k2] of a group, in rows s -> (BN, PK), (BN, P2)."""
    k = load_rows(keys.k, s, ok, w.DK, w.PK, w.ROW * w.DK, ALL)
    return k, load_rows(keys.k2, s, ok, w.D2, w.P2, w.D2, ALL) if w.D2 > 0 else k


@jit
def load_values(keys, b, s, ok, w, ALL=False):
    """Values (BN, PV) of the keys b."""
    return b[0] if w.SHARED else load_rows(keys.v, s, ok, w.DV, w.PV, w.ROW * w.DV, ALL)


@jit
def dot(a, b, w):
    """[a ; a2] [b ; b2]^T -> rows of a x rows of b."""
    c = tl.dot(a[0], tl.trans(b[0]), input_precision=EXACT)
    if w.D2 > 0:
        c = tl.dot(a[1], tl.trans(b[1]), c, input_precision=EXACT)
    return c


@jit
def rows_of_tile(rule, w, tile):
    """This program's group and tile; of its rows (BM,) position t, row in the group, which of them exist."""
    bg = tl.program_id(1).to(tl.int64)
    i = tl.num_programs(0) - 1 - tl.program_id(0)  # long walks first
    m = tl.arange(0, tile.BM)  # (BM,)
    t = i * tile.BQ + m // w.HP  # (BM,)
    head = m % w.HP  # (BM,)
    ok = (head < w.h) & (m // w.HP < tile.BQ) & (t < rule.T)  # (BM,)
    return bg, i, t, row_of(t, head, rule, w), ok


@jit
def row_of(t, head, rule, w):
    """Queries and outputs lie as (B, T, H, ..): so many rows after `first_row` is a head of query t."""
    return t * (rule.G * w.h) + head


@jit
def first_row(bg, rule, w):
    """The row of a group's first head at the first query of its text, in (B, T, H)."""
    return (bg // rule.G * rule.T * rule.G + bg % rule.G) * w.h


@jit
def rows_of_group(x, bg, rule, w):
    """Where what belongs to a group's queries begins."""
    n = first_row(bg, rule, w)
    q = n * (w.DK + w.D2)
    o = n * w.DV
    return Rows(x.q + q, x.out + o, x.lse + n, x.dout + o, x.delta + n, x.dq + q)


@jit
def of_group(keys, bg, rule, w):
    """Where the keys and values of a group begin."""
    own = bg // w.FAN
    k2 = keys.k2 + (bg // rule.G * rule.G2 + own % rule.G2) * rule.S * w.D2
    row = first_key(own, rule, w)
    return KV(keys.k + row * w.DK, k2, keys.v + row * w.DV)


@jit
def first_key(bg, rule, w):
    """The row of k and v where a group's keys begin: every ROW-th row from there on is one of them."""
    return bg // w.ROW * rule.S * w.ROW + bg % w.ROW


@jit
def nothing(M, N):
    """The softmax of no keys: the largest score (M,), the sum of weights (M,), of weights x values (M, N)."""
    top = tl.full((M,), -1e30, tl.float32)
    return top, tl.zeros((M,), tl.float32), zeros(M, N)


@jit
def softmax_step(a, keys, s, ok, see, scale, o, w, ALL):
    """One step of an online softmax in base 2, over the keys in rows s -> the new o, the scores (BM, BN)."""
    top, total, mean = o
    b = load_keys(keys, s, ok, w, ALL)
    score = dot(a, b, w)  # (BM, BN)
    if not ALL:
        score = tl.where(see, score, -1e30)
    new = tl.maximum(top, tl.max(score, 1) * scale)  # scale includes log2(e)
    p = tl.exp2(score * scale - new[:, None])  # (BM, BN)
    if not ALL:
        p = tl.where(see, p, 0.0)
    fade = tl.exp2(top - new)  # (BM,)
    values = load_values(keys, b, s, ok, w, ALL)  # (BN, PV)
    mean = tl.dot(p.to(values.dtype), values, mean * fade[:, None], input_precision=EXACT)
    return (new, total * fade + tl.sum(p, 1), mean), score


@jit
def store_output(out, lse, row, ok, o, w):
    """o = mean / total, lse = top + log2(total); for a query that read nothing 0 and infinity."""
    top, total, mean = o
    some = total > 0
    total = tl.where(some, total, 1.0)
    store_rows(out, row, ok, mean / total[:, None], w.DV, w.PV, w.DV)
    tl.store(lse + row, tl.where(some, top + tl.log2(total), float("inf")), mask=ok)  # all weights are 0


@jit
def slopes(a, b, x, y, norm, inner, key, low, high, scale, unit, w, ALL):
    """p = exp2(s - lse) and ds = unit p (do . v - delta), of rows a, x and columns b, y.

    a, x are queries and do, b, y keys and values, norm and inner lse and delta; or the other way round. A
    query reads the keys from low to high - 1; this mask is made late, because registers are short before.
    unit is scale where dk is added up beside dv, for both may be one sum; dq takes it at the end.
    """
    p = tl.exp2(dot(a, b, w) * scale - norm)  # rows of a x rows of b
    if not ALL:
        p = tl.where((key >= low) & (key < high), p, 0.0)
    return p, p * unit * (tl.dot(x, tl.trans(y), input_precision=EXACT) - inner)


@jit
def query_slopes(x, row, ok, w):
    """Of query rows: do (BM, PV), lse (BM, 1), and delta = do . o (BM, 1), kept for the keys' turn."""
    douts = load_rows(x.dout, row, ok, w.DV, w.PV, w.DV)  # (BM, PV)
    outs = load_rows(x.out, row, ok, w.DV, w.PV, w.DV)  # (BM, PV)
    inner = tl.sum(douts.to(tl.float32) * outs.to(tl.float32), 1)  # (BM,)
    tl.store(x.delta + row, inner, mask=ok)
    norm = tl.load(x.lse + row, mask=ok, other=float("inf"))  # (BM,)
    return douts, norm[:, None], inner[:, None]


@jit
def query_step(a, r, keys, s, ok, low, high, scale, grads, w, ALL):
    """Adds what the keys in rows s give to dq (BM, PK) and dq2 (BM, P2) -> the two sums, p and ds (BM, BN).

    r: what query_slopes gave.
    """
    gq, gq2 = grads
    b = load_keys(keys, s, ok, w, ALL)
    values = load_values(keys, b, s, ok, w, ALL)  # (BN, PV)
    key = s[None, :]
    p, ds = slopes(a, b, r[0], values, r[1], r[2], key, low, high, scale, 1.0, w, ALL)  # (BM, BN)
    ds = ds.to(values.dtype)
    gq = tl.dot(ds, b[0], gq, input_precision=EXACT)
    if w.D2 > 0:
        gq2 = tl.dot(ds, b[1], gq2, input_precision=EXACT)
    return (gq, gq2), p, ds


@jit
def store_queries(dq, row, ok, grads, scale, w):
    unit = scale * LN_2  # without log2(e)
    STRIDE: constexpr = w.DK + w.D2
    store_rows(dq, row, ok, grads[0] * unit, w.DK, w.PK, STRIDE)
    if w.D2 > 0:
        store_rows(dq + w.DK, row, ok, grads[1] * unit, w.D2, w.P2, STRIDE)


@jit
def no_gradients(BN, w):
    return zeros(BN, w.PK), zeros(BN, w.P2), zeros(BN, w.PV)


@jit
def key_step(b, values, x, row, ok, key, low, high, scale, grads, w, ALL):
    """Adds what the queries in these rows give to dk (BN, PK), dk2 (BN, P2) and dv (BN, PV)."""
    gk, gk2, gv = grads
    a = load_queries(x.q, row, ok, w)  # (BM, PK), (BM, P2)
    douts = load_rows(x.dout, row, ok, w.DV, w.PV, w.DV)  # (BM, PV)
    norm = tl.load(x.lse + row, mask=ok, other=float("inf"))[None, :]  # (1, BM)
    inner = tl.load(x.delta + row, mask=ok, other=0)[None, :]  # (1, BM)
    unit = scale * LN_2  # without log2(e)
    p, ds = slopes(b, a, values, douts, norm, inner, key, low, high, scale, unit, w, ALL)  # (BN, BM)
    ds = ds.to(douts.dtype)
    if w.SHARED:
        gk = tl.dot(p.to(douts.dtype), douts, gk, input_precision=EXACT)
    else:
        gv = tl.dot(p.to(douts.dtype), douts, gv, input_precision=EXACT)
    gk = tl.dot(ds, a[0], gk, input_precision=EXACT)
    if w.D2 > 0:
        gk2 = tl.dot(ds, a[1], gk2, input_precision=EXACT)
    return gk, gk2, gv


@jit
def store_keys(grads, piece, bg, rule, s, g, w, BN, CUT):
    """dk, dk2 and dv to the rows s of a group, or with CUT to a piece's own BN rows."""
    row = piece * BN + tl.arange(0, BN) if CUT else bg * rule.S + s
    ok = (s < rule.S) | CUT
    if w.D2 > 0:
        store_rows(grads.k2, row, ok, g[1], w.D2, w.P2, w.D2)
    row = row if CUT else first_key(bg, rule, w) + s * w.ROW
    store_rows(grads.k, row, ok, g[0], w.DK, w.PK, w.DK)
    if not w.SHARED:
        store_rows(grads.v, row, ok, g[2], w.DV, w.PV, w.DV)


# ------------------------------------------------------------------------------------------------------------
# 4) Dense attention

# T queries, S keys, groups of k and v, of k2. Key i stands at position i d + l - 1; the last `window` count.
# parts: programs for the same keys, in the backward pass
Dense = namedtuple("Dense", "T S G G2 window l d parts")


@jit
def span(t, rule):
    """The query at position t reads the entries [low, high)."""
    high = tl.minimum(tl.maximum(t + 1 - rule.l + rule.d, 0) // rule.d, rule.S)
    low = tl.minimum(tl.maximum(t - rule.window - rule.l + 1 + rule.d, 0) // rule.d, high)
    return low, high


@jit
def key_bounds(first, rule, tile):
    """Of the keys that queries from `first` on read: begin <= whole <= edge <= end.

    Between whole and edge every query reads every key, and no mask is needed; before and after it is.
    """
    BN: constexpr = tile.BN
    low, high = span(first, rule)
    last_low, end = span(tl.minimum(first + tile.BQ, rule.T) - 1, rule)
    whole = tl.minimum(low + tl.cdiv(tl.maximum(last_low - low, 0), BN) * BN, end)
    return low, whole, whole + tl.maximum(high - whole, 0) // BN * BN, end


@jit
def forward_kernel(q, keys, out, lse, scale, rule, w: constexpr, tile: constexpr):
    """One program: BQ queries x the h heads of a group, against the keys that they read."""
    bg, i, t, row, ok = rows_of_tile(rule, w, tile)
    n = first_row(bg, rule, w)
    a = load_queries(q + n * (w.DK + w.D2), row, ok, w)
    low, high = span(t[:, None], rule)  # (BM, 1)
    keys = of_group(keys, bg, rule, w)
    o = nothing(tile.BM, w.PV)
    walk = key_bounds(i * tile.BQ, rule, tile)
    for phase in tl.static_range(3):  # masked, all read all, masked
        for start in range(walk[phase], walk[phase + 1], tile.BN):
            s = start + tl.arange(0, tile.BN)
            see = (s[None, :] >= low) & (s[None, :] < high)  # (BM, BN)
            o, _ = softmax_step(a, keys, s, s < rule.S, see, scale, o, w, phase == 1)
    store_output(out + n * w.DV, lse + n, row, ok, o, w)


@jit
def dq_kernel(x, keys, scale, rule, w: constexpr, tile: constexpr):
    """The same walk again: dq = scale sum_j p_j (do . v_j - delta) k_j."""
    bg, i, t, row, ok = rows_of_tile(rule, w, tile)
    x = rows_of_group(x, bg, rule, w)
    a = load_queries(x.q, row, ok, w)
    low, high = span(t[:, None], rule)  # (BM, 1)
    r = query_slopes(x, row, ok, w)
    keys = of_group(keys, bg, rule, w)
    grads = zeros(tile.BM, w.PK), zeros(tile.BM, w.P2)
    walk = key_bounds(i * tile.BQ, rule, tile)
    for phase in tl.static_range(3):  # masked, all read all, masked
        for start in range(walk[phase], walk[phase + 1], tile.BN):
            s = start + tl.arange(0, tile.BN)
            grads, p, ds = query_step(a, r, keys, s, s < rule.S, low, high, scale, grads, w, phase == 1)
    store_queries(x.dq, row, ok, grads, scale, w)


@jit
def query_bounds(block, part, rule, tile):
    """Of the tiles of queries that read a block of keys, or of one of `parts` equal parts of these tiles."""
    window = tl.minimum(rule.window, rule.T)
    first = block * tile.BN * rule.d + rule.l - 1  # positions of the first and the last key
    last = ((block + 1) * tile.BN - 1) * rule.d + rule.l - 1
    begin = first // tile.BQ
    end = tl.cdiv(tl.minimum(last + window, rule.T), tile.BQ)
    share = tl.cdiv(end - begin, rule.parts)
    begin += part * share
    end = tl.minimum(begin + share, end)
    whole = tl.minimum(tl.maximum(tl.cdiv(last, tile.BQ), begin), end)  # from here on all see all keys
    return begin, whole, tl.minimum(tl.maximum((first + window) // tile.BQ, whole), end), end


@jit
def dkv_kernel(x, keys, to, scale, rule, w: constexpr, tile: constexpr, CUT: constexpr):
    """One program: BN keys of a group, against one of `parts` parts of the queries that read them.

    dv = sum_i p_i do_i, dk = scale sum_i p_i (do_i . v - delta_i) q_i. CUT: sum_kernel adds up the parts.
    """
    piece = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(rule.S, tile.BN)
    bg = piece // rule.parts // blocks
    block = (piece // rule.parts % blocks).to(tl.int32)
    s = block * tile.BN + tl.arange(0, tile.BN)
    keys = of_group(keys, bg, rule, w)
    b = load_keys(keys, s, s < rule.S, w)  # (BN, PK), (BN, P2)
    values = load_values(keys, b, s, s < rule.S, w)  # (BN, PV)
    x = rows_of_group(x, bg, rule, w)
    grads = no_gradients(tile.BN, w)
    m = tl.arange(0, tile.BM)
    head = m % w.HP
    walk = query_bounds(block, (piece % rule.parts).to(tl.int32), rule, tile)
    for phase in tl.static_range(3):  # masked, all see all, masked
        for i in range(walk[phase], walk[phase + 1]):
            t = i * tile.BQ + m // w.HP  # (BM,)
            ok = (head < w.h) & (t < rule.T)
            low, high = span(t[None, :], rule)  # (1, BM)
            row = row_of(t, head, rule, w)
            grads = key_step(b, values, x, row, ok, s[:, None], low, high, scale, grads, w, phase == 1)
    store_keys(to, piece, bg, rule, s, grads, w, tile.BN, CUT)


# ------------------------------------------------------------------------------------------------------------
# 5) Attention to the blocks of lists

# lists (B, G, tiles of BQ queries, n); with a list a query reads the tokens of its blocks up to itself
Lists = namedtuple("Lists", "T S G G2 lists n")
# the lists inverted, see `invert`
Readers = namedtuple("Readers", "T S G G2 tiles owners begins ends")


@jit
def blocks_in(lists, n, NP):
    """How many blocks a list names."""
    i = tl.arange(0, NP)
    block = tl.load(lists + i, mask=i < n, other=-1)
    return tl.sum((block >= 0).to(tl.int32), 0)


@jit
def list_bounds(lists, n, tile):
    """-> 0, edge, end of the keys of a list's blocks, one behind the other.

    Behind edge lies the last block, the own one: only there a mask is needed.
    """
    BN: constexpr = tile.BN
    count = blocks_in(lists, n, tile.NP)
    return 0, tl.maximum(count - 1, 0) * tile.BLOCK // BN * BN, count * tile.BLOCK


@jit
def rows_of_blocks(lists, start, end, S, BN, BLOCK):
    """Rows of the keys start .. start + BN - 1 of a list's blocks -> (BN,), at most S.

    start is a multiple of BN. A number is read for each block: an address for each row would be slow.
    """
    j = tl.arange(0, BN)
    s = start + j
    inside = (j if BN >= BLOCK else s) % BLOCK
    for u in tl.static_range(max(BN // BLOCK, 1)):
        block = tl.load(lists + start // BLOCK + u, mask=start + u * BLOCK < end, other=2**20)
        s = tl.minimum(tl.where(j // BLOCK == u, block * BLOCK + inside, s), S)
    return s


@jit
def lists_forward_kernel(q, keys, out, lse, scale, rule, w: constexpr, tile: constexpr):
    """One program: the queries of a list x the h heads of a group, against the keys of its blocks."""
    bg, i, t, row, ok = rows_of_tile(rule, w, tile)
    n = first_row(bg, rule, w)
    a = load_queries(q + n * (w.DK + w.D2), row, ok, w)
    keys = of_group(keys, bg, rule, w)
    lists = rule.lists + (bg * tl.num_programs(0) + i) * rule.n
    o = nothing(tile.BM, w.PV)
    walk = list_bounds(lists, rule.n, tile)
    for phase in tl.static_range(2):  # all read all, masked
        for start in range(walk[phase], walk[phase + 1], tile.BN):
            s = rows_of_blocks(lists, start, walk[2], rule.S, tile.BN, tile.BLOCK)  # (BN,)
            see = s[None, :] <= t[:, None]  # (BM, BN)
            o, _ = softmax_step(a, keys, s, s < rule.S, see, scale, o, w, phase == 0)
    store_output(out + n * w.DV, lse + n, row, ok, o, w)


@jit
def add_rows(x, row, ok, value, D, P):
    """x[row, :D] += value (rows, P), whoever else adds to it, in no fixed order."""
    d = tl.arange(0, P)
    at = x + row.to(tl.int64)[:, None] * D + d[None, :]
    tl.atomic_add(at, value, mask=ok[:, None] & (d < D)[None, :], sem="relaxed")


@jit
def add_keys(to, bg, rule, s, p, ds, a, douts, scale, w):
    """What the queries a give to dk, dk2 and dv in rows s of a group; p and ds (BM, BN) as in query_step."""
    row = bg * rule.S + s
    ok = s < rule.S
    unit = scale * LN_2  # without log2(e)
    ds = tl.trans(ds)  # (BN, BM)
    gk = tl.dot(ds, a[0], input_precision=EXACT) * unit  # (BN, PK)
    gv = tl.dot(tl.trans(p.to(douts.dtype)), douts, input_precision=EXACT)  # (BN, PV)
    if w.SHARED:
        add_rows(to.k, row, ok, gk + gv, w.DK, w.PK)
    else:
        add_rows(to.k, row, ok, gk, w.DK, w.PK)
        add_rows(to.v, row, ok, gv, w.DV, w.PV)
    if w.D2 > 0:
        add_rows(to.k2, row, ok, tl.dot(ds, a[1], input_precision=EXACT) * unit, w.D2, w.P2)


@jit
def lists_dq_kernel(x, keys, to, scale, rule, w: constexpr, tile: constexpr):
    """The same walk again, for dq; where `to` is given also for dk and dv, which come by atomics."""
    bg, i, t, row, ok = rows_of_tile(rule, w, tile)
    x = rows_of_group(x, bg, rule, w)
    a = load_queries(x.q, row, ok, w)
    r = query_slopes(x, row, ok, w)
    keys = of_group(keys, bg, rule, w)
    lists = rule.lists + (bg * tl.num_programs(0) + i) * rule.n
    grads = zeros(tile.BM, w.PK), zeros(tile.BM, w.P2)
    walk = list_bounds(lists, rule.n, tile)
    for phase in tl.static_range(2):  # all read all, masked
        for start in range(walk[phase], walk[phase + 1], tile.BN):
            s = rows_of_blocks(lists, start, walk[2], rule.S, tile.BN, tile.BLOCK)  # (BN,)
            late = t[:, None] + 1
            grads, p, ds = query_step(a, r, keys, s, s < rule.S, 0, late, scale, grads, w, phase == 0)
            if to is not None:
                add_keys(to, bg, rule, s, p, ds, a, r[0], scale, w)
    store_queries(x.dq, row, ok, grads, scale, w)


@jit
def lists_dkv_kernel(x, keys, to, scale, rule, w: constexpr, tile: constexpr, CUT: constexpr):
    """One program: the keys of a block against one piece of its readers. CUT: sum_kernel adds up the pieces.

    A step takes BM rows: the queries of MANY lists at once, or one of STEPS parts of those of one list.
    """
    ROWS: constexpr = tile.BQ * w.HP
    STEPS: constexpr = (ROWS + tile.BM - 1) // tile.BM
    MANY: constexpr = tile.BM * STEPS // ROWS
    piece = tl.program_id(0).to(tl.int64)
    owner = tl.load(rule.owners + piece)
    begin = tl.load(rule.begins + piece)
    end = tl.load(rule.ends + piece)
    blocks = tl.cdiv(rule.S, tile.BN)
    bg = owner // blocks
    s = (owner % blocks).to(tl.int32) * tile.BN + tl.arange(0, tile.BN)
    keys = of_group(keys, bg, rule, w)
    b = load_keys(keys, s, s < rule.S, w)  # (BN, PK), (BN, P2)
    values = load_values(keys, b, s, s < rule.S, w)  # (BN, PV)
    x = rows_of_group(x, bg, rule, w)
    grads = no_gradients(tile.BN, w)
    m = tl.arange(0, tile.BM)
    head = m % w.HP
    for start in range(begin * STEPS, end * STEPS, MANY):
        # which of a list's queries (BM,); as m % ROWS // HP, Triton 3.6 would take odd rows for even ones
        inside = start % STEPS * (tile.BM // w.HP) + m // w.HP % tile.BQ
        t = inside  # (BM,)
        for u in tl.static_range(MANY):
            i = start // STEPS + u
            reader = tl.load(rule.tiles + i, mask=i < end, other=0)
            t = tl.where(m // ROWS == u, reader * tile.BQ + inside, t)
        ok = (head < w.h) & (t < rule.T) & (start + m // ROWS < end * STEPS)
        row = row_of(t, head, rule, w)
        grads = key_step(b, values, x, row, ok, s[:, None], 0, t[None, :] + 1, scale, grads, w, False)
    store_keys(to, piece, bg, rule, s, grads, w, tile.BN, CUT)


def invert(lists, blocks, most, chunks):
    """The entries of the lists (B, G, tiles, n), sorted by chunk of the tiles and then by block.

    The readers of a block in a chunk are cut into pieces of at most `most`, a program each, in this order:
    while the queries of a chunk lie in L2, all blocks read them. Every block has a reader, its own queries.
    -> readers (entries,): tiles; of each piece (pieces,) its owner, a block of a group, and its readers,
    begin .. end - 1; firsts (chunks B G blocks + 1,): the first piece of each block in each chunk. Nothing
    is read back to the host: there are as many pieces as there may be, and the last ones are empty.
    """
    B, G, tiles, n = lists.shape
    total = B * G * blocks
    kind = {"dtype": torch.int32, "device": lists.device}
    chunk = torch.arange(tiles, **kind) // triton.cdiv(tiles, chunks)  # (tiles,)
    group = torch.arange(B * G, **kind).view(B, G, 1, 1)
    owner = (chunk[:, None] * B * G + group) * blocks + lists  # (B, G, tiles, n)
    owner, order = owner.masked_fill(lists < 0, chunks * total).flatten().sort(stable=True)  # (entries,)
    readers = order.to(torch.int32) // n % tiles  # (entries,)
    bounds = torch.arange(chunks * total + 1, **kind)
    starts = torch.searchsorted(owner, bounds, out_int32=True)  # (chunks total + 1,)
    firsts = F.pad(((starts.diff() + most - 1) // most).cumsum(0), (1, 0))  # (chunks total + 1,)
    piece = torch.arange(chunks * total + lists.numel() // most, device=lists.device)  # (pieces,)
    cut = torch.searchsorted(firsts, piece, right=True) - 1  # (pieces,) what it is cut from
    cut = cut.clamp(max=chunks * total - 1)
    ends = starts[cut + 1]  # (pieces,)
    begins = torch.minimum(starts[cut] + (piece - firsts[cut]) * most, ends)  # 64 bits: some lie far out
    ends = torch.minimum(begins + most, ends)  # (pieces,)
    return readers, cut % total, begins.to(torch.int32), ends.to(torch.int32), firsts


# ------------------------------------------------------------------------------------------------------------
# 6) Attention of a whole text


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


# {widths up to: (rows of queries, keys, warps, stages)} without lists, tuned on an H200: results/kernels.md
TILES = {
    "forward": {96: (64, 64, 4, 3), 160: (128, 64, 8, 3), 192: (64, 64, 4, 2), 512: (128, 64, 8, 2)},
    "scores": {192: (128, 64, 4, 3), 512: (64, 128, 8, 2)},
    "dq": {96: (64, 64, 4, 2), 192: (128, 64, 8, 3), 512: (128, 32, 8, 3)},
    "dkv": {96: (64, 64, 4, 2), 160: (64, 128, 8, 3), 192: (32, 64, 4, 2), 512: (32, 128, 8, 2)},
}


def tile_of(kind, w, dtype, block=0, share=1, n=1):
    """-> Tile, and the warps and stages of a kernel; block 0: no lists. In fp32 only small tiles fit.

    kind: a row of TILES, or "dq and dkv": the program that adds dk and dv by atomics.
    """
    width = w.PK + (w.P2 if w.D2 else 0)
    rows = share * w.HP  # that read one list
    if block == 0:
        BM, BN, warps, stages = next(tile for widest, tile in TILES[kind].items() if width <= widest)
        BM = 64 if kind == "dkv" and width > 160 and w.SHARED else BM
    elif kind == "dkv":  # several lists in a step, or a part of one
        BM = 64 if rows >= 64 and width <= 256 else 32
        BN = block
        warps = 4 if block >= 64 else 2
        stages = 3 if width > 64 and rows < 64 else 2
    else:
        BM = max(rows, 16)
        BN = max(block, 64 if rows < 64 else 32)
        warps = BM // 16 * (2 if width > 160 and rows < 64 else 1)
        stages = 1 if kind == "dq" and rows >= 64 else 2
    if dtype == torch.float32:
        BM = BM if block else 32
        BN = min(BN, max(block, 32))
        warps = 4
        stages = 1
    BQ = share if block else max(1, BM // w.HP)
    BM = max(BM, w.HP if block and kind == "dkv" else BQ * w.HP)
    return Tile(BQ, BM, BN, block, power(n)), {"num_warps": warps, "num_stages": stages}


def add_pieces(pieces, x, G, firsts, chunks):
    """-> the gradient of x. firsts: the first piece of each block in each chunk."""
    if x is None:
        return None
    B, _, S, D = x.shape
    BN = pieces.shape[1]
    out = x.new_empty(B, G, S, D)
    blocks = triton.cdiv(S, BN)
    sum_kernel[(B * G * blocks,)](pieces, firsts, out, S, blocks, chunks, D, power(D), BN)
    return out


def key_gradients(x, k, k2, v, scale, rule, w, lists):
    """dk, dk2 (B, G, S, P) and dv, in a fixed order of the sums.

    x: Rows, whose delta is known; lists: (block, share, n).
    """
    block, share, n = lists
    B, G, S, _ = k.shape
    q = x.q
    tile, options = tile_of("dkv", w, q.dtype, *lists)
    blocks = B * G * triton.cdiv(S, tile.BN)  # none where T < l: there is no entry yet
    chunks = 1
    if block:  # a piece has at most twice the average number of readers: a popular block is many pieces
        if share * w.HP >= 64:  # much to fetch: chunks of it that stay in L2 while all blocks read them
            chunks = min(16, triton.cdiv(q.nbytes + x.dout.nbytes, B * G * L2))
        most = max(1, 2 * n * block // share)
        *readers, firsts = invert(rule.lists, triton.cdiv(S, block), most, chunks)
        rule = Readers(*rule[:4], *readers)
        pieces = len(rule.owners)
    else:
        parts = 1
        if 0 < blocks < 2 * SMS:  # too few to fill the GPU
            parts = min(triton.cdiv(4 * SMS, blocks), triton.cdiv(rule.T, 16 * tile.BQ))
        pieces = blocks * parts
        firsts = torch.arange(0, pieces + 1, parts, device=q.device)
        rule = rule._replace(parts=parts)
    cut = pieces > blocks
    if cut:
        room = lambda y: y if y is None else y.new_empty(pieces, tile.BN, y.shape[3], dtype=torch.float32)
        grads = [room(y) for y in (k, k2, v)]
    else:
        grads = [y if y is None else torch.empty_like(y) for y in (k, k2, v)]
        if k2 is not None:
            grads[1] = k2.new_empty(B, G, S, k2.shape[3])
    kernel = lists_dkv_kernel if block else dkv_kernel
    kernel[(pieces,)](x, kv_of(k, k2, v), kv_of(*grads), scale, rule, w, tile, cut, **options)
    return [add_pieces(grad, y, G, firsts, chunks) for grad, y in zip(grads, (k, k2, v))] if cut else grads


class Attention(torch.autograd.Function):
    """q (B, T, H, D + P) to k (B, G, S, D), k2 (B, 1 or G, S, P) or None, v (B, G, S, Dv) or None.

    By `rule`, Dense or Lists; blocks of lists have `block` tokens (0: no lists) and `share` queries have one
    list -> o (B, T, H, Dv), lse (B, T, H) in base 2.
    """

    @staticmethod
    def forward(ctx, q, k, k2, v, scale, rule, block, share):
        B, T, H, _ = q.shape
        w = widths_of(q.transpose(1, 2), k, k2, v)._replace(ROW=k.shape[1] if lies_by_token(k) else 1)
        out = q.new_empty(B, T, H, w.DV)
        lse = q.new_empty(B, T, H, dtype=torch.float32)
        lists = (block, share, rule.n if block else 1)
        tile, options = tile_of("forward", w, q.dtype, *lists)
        kernel = lists_forward_kernel if block else forward_kernel
        grid = (triton.cdiv(T, tile.BQ), B * k.shape[1])
        keys = kv_of(k, k2, v)
        kernel[grid](q, keys, out, lse, scale, rule, w, tile, **options)
        # The lists, too, so that --recompute keeps none of them.
        ctx.save_for_backward(q, k, k2, v, out, lse, rule.lists if block else None)
        ctx.rest = (scale, rule._replace(lists=None) if block else rule, w, lists)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        q, k, k2, v, out, lse, chosen = ctx.saved_tensors
        scale, rule, w, lists = ctx.rest
        block, share, _ = lists
        rule = rule._replace(lists=chosen) if block else rule
        G = k.shape[1]
        x = Rows(q, out, lse, dout.contiguous(), torch.empty_like(lse), torch.empty_like(q))
        atomics = block and share * w.HP >= 64 and not torch.are_deterministic_algorithms_enabled()
        keys = kv_of(k, k2, v)
        tile, options = tile_of("dq and dkv" if atomics else "dq", w, q.dtype, *lists)
        grid = (triton.cdiv(rule.T, tile.BQ), k.shape[0] * G)
        if atomics:
            zeros_of = lambda y: y if y is None else y.new_zeros(len(y), G, *y.shape[2:], dtype=torch.float32)
            sums = [zeros_of(y) for y in (k, k2, v)]
            lists_dq_kernel[grid](x, keys, kv_of(*sums), scale, rule, w, tile, **options)
            grads = [y if y is None else y.to(q.dtype) for y in sums]
        else:
            to = (None,) if block else ()
            kernel = lists_dq_kernel if block else dq_kernel
            kernel[grid](x, keys, *to, scale, rule, w, tile, **options)
            grads = key_gradients(x, k, k2, v, scale, rule, w, lists)
        if k2 is not None and k2.shape[1] < G:
            grads[1] = grads[1].sum(1, keepdim=True)  # one rotary key for all groups
        return x.dq, *grads, None, None, None, None


def numbers_of(q, keys):
    """The first numbers of every rule: T, S, G, G2."""
    G, S = keys.k.shape[1:3]
    return q.shape[2], S, G, 1 if keys.k2 is None else keys.k2.shape[1]


def lies_by_token(x):
    """Whether x (B, G, S, D) lies in memory as (B, S, G, D)."""
    return not x.is_contiguous() and x.transpose(1, 2).is_contiguous()


def in_rows(q, keys):
    """q (B, T, H, D + P), k, k2, v, dense in memory; k and v (B, G, S, ..) may both lie as (B, S, G, ..)."""
    k, k2, v = keys.k, keys.k2, keys.v
    if v is None or not (lies_by_token(k) and lies_by_token(v)):
        k = k.contiguous()
        v = v if v is None else v.contiguous()
    return q.transpose(1, 2).contiguous(), k, k2 if k2 is None else k2.contiguous(), v


def attend(q, keys, scale, window=0, l=1, d=1, lists=None, block=0, share=1):
    """The door to Attention: Dense, or with lists Lists -> o (B, H, T, Dv), lse (B, T, H)."""
    check(q, keys, share, block=block or 16)
    if block % share:
        raise Refused(f"{share} queries with one list must lie in one block of {block}")
    rule = Dense(*numbers_of(q, keys), window, l, d, 1)
    if lists is not None:
        rule = Lists(*rule[:4], lists, lists.shape[3])
    o, lse = Attention.apply(*in_rows(q, keys), scale * LOG2_E, rule, block, share)
    return o.transpose(1, 2), lse


def one_list_each(sizes):
    """Raises Refused where queries share a list: against a cache each has its own."""
    if sizes.share > 1:
        raise Refused(f"against a cache each query has a list of its own, not {sizes.share} one")


def window_attention(q, keys, window, scale):
    """Causal attention to the last `window` positions of a whole text; here k2 may have G groups too."""
    return attend(q, keys, scale, min(window, q.shape[2]))[0]


def selected_attention(q, q_pos, keys, lists, sizes, scale):
    """Attention to the tokens of lists (B, G, ceil(T / share), n), ascending, the own block last, then -1."""
    lists = lists.to(torch.int32).contiguous()
    if keys.length is not None:
        one_list_each(sizes)
        return cached_lists(q, q_pos, keys, lists, sizes.block, scale)
    return attend(q, keys, scale, lists=lists, block=sizes.block, share=sizes.share)[0]


def compressed_attention(q, q_pos, keys, tokens, sizes, scale):
    """Attention to the compressed entries -> o (B, H, T, Dv), and the lists of every share-th query."""
    if triton.cdiv(tokens, sizes.block) > 2**15:
        raise Refused(f"{tokens} tokens in blocks of {sizes.block}: at most {2**15} blocks are ranked")
    if sizes.l > sizes.block + sizes.d:
        raise Refused(
            f"an entry of {sizes.l} tokens in blocks of {sizes.block}: it may reach into the next one only"
        )
    if keys.length is not None:
        one_list_each(sizes)
        return cached_entries(q, q_pos, keys, tokens, sizes, scale)
    check(q, keys, block=sizes.block)
    o, lse = attend(q, keys, scale, q.shape[2], sizes.l, sizes.d)
    return o, select(q, q_pos, keys, lse, tokens, sizes, scale)


# ------------------------------------------------------------------------------------------------------------
# 7) Select: which blocks a query reads

# the lists row0 .. row0 + rows - 1 of all, of n out of so many blocks, for T queries in G groups
Chunk = namedtuple("Chunk", "row0 rows all_rows blocks n T G")


@jit
def store_scores(own, over, at, live, p, N, X, sizes):
    """Weights p (N, X) of entries -> block scores (N / FOLD, X), for FOLD entries begin in a block.

    Entry i counts once for each stride of its l / d, OVERLAP of which may lie in the next block: `own` gets
    those in the block where it begins, `over` those in the next one (None if there are none).
    """
    FOLD: constexpr = sizes.block // sizes.d
    OVERLAP: constexpr = sizes.l // sizes.d - 1
    beyond = tl.maximum(tl.arange(0, N) % FOLD + OVERLAP - (FOLD - 1), 0)
    beyond = beyond.to(tl.float32)[:, None]  # (N, 1) strides in the next block
    mine = tl.reshape(p * (OVERLAP + 1 - beyond), (N // FOLD, FOLD, X))
    tl.store(own + at, tl.sum(mine, 1), mask=live)
    if OVERLAP > 0:
        rest = tl.reshape(p * beyond, (N // FOLD, FOLD, X))
        tl.store(over + at, tl.sum(rest, 1), mask=live)


@jit
def score_kernel(q, keys, lse, own, over, scale, rule, x, w: constexpr, tile: constexpr, sizes: constexpr):
    """One program: the block scores of BQ lists, from row0 on.

    It makes the weights of their queries again from lse, and adds them up over the heads by a matrix product:
    adding across threads would cost as much as all the rest. own, over (B G, rows, blocks): 2^12 times the
    scores, so that fp16 resolves them.
    """
    BN: constexpr = tile.BN
    LISTS: constexpr = max(tile.BQ, 16)
    FOLD: constexpr = sizes.block // sizes.d
    bg = tl.program_id(1).to(tl.int64)
    i = (tl.num_programs(0) - 1 - tl.program_id(0)) * tile.BQ  # long walks first
    m = tl.arange(0, tile.BM)
    r = tl.arange(0, LISTS)
    j = tl.arange(0, BN // FOLD)
    first = x.row0 + i
    t = (first + m // w.HP) * sizes.share  # (BM,)
    n = first_row(bg, rule, w)
    row = row_of(t, m % w.HP, rule, w)
    ok = (m % w.HP < w.h) & (t < rule.T)
    a = load_queries(q + n * (w.DK + w.D2), row, ok, w)
    norm = tl.load(lse + n + row, mask=ok, other=float("inf")) - 12  # (BM,)
    half = tl.float32 if q.dtype.element_ty == tl.float32 else tl.float16
    heads_of = (m[:, None] // w.HP == r[None, :]).to(half)  # (BM, LISTS)
    keys = of_group(keys, bg, rule, w)
    ok_r = (r < tile.BQ) & (i + r < x.rows)
    to = (bg * x.rows + i + r[None, :]) * x.blocks + j[:, None]  # (BN / FOLD, LISTS)
    _, high = span(t[None, :], rule)  # (1, BM)
    _, whole = span(first * sizes.share, rule)
    last = (first + tile.BQ - 1) * sizes.share
    _, end = span(tl.minimum(last, rule.T - 1), rule)
    whole = whole // BN * BN  # so far all queries read all entries
    for phase in tl.static_range(2):
        for start in range(0 if phase == 0 else whole, whole if phase == 0 else end, BN):
            s = start + tl.arange(0, BN)
            b = load_keys(keys, s, s < rule.S, w, phase == 0)
            p = tl.exp2(dot(b, a, w) * scale - norm[None, :])  # (BN, BM)
            if phase == 1:
                p = tl.where(s[:, None] < high, p, 0.0)
            p = tl.dot(p.to(half), heads_of, input_precision=EXACT)  # (BN, LISTS)
            live = ok_r[None, :] & (start // FOLD + j < x.blocks)[:, None]
            store_scores(own, over, to + start // FOLD, live, p, BN, LISTS, sizes)


@jit
def choose_kernel(own, over, q_pos, lists, x, sizes: constexpr, BJ: constexpr, NP: constexpr):
    """One program: the list of one query and group, ascending, then -1: the n best blocks up to its own.

    Forced are block 0, the own one and the one before it. The n-th best score is found by bisection of its
    bits: floats >= 0 are ordered like their bits.
    """
    r = tl.program_id(0)
    bg = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, BJ)
    t = (x.row0 + r) * sizes.share
    stands = tl.load(q_pos + bg // x.G * x.T + t).to(tl.int32)
    mine = stands // sizes.block
    at = (bg * x.rows + r) * x.blocks + j  # (BJ,)
    score = tl.load(own + at, mask=j < mine - 1, other=0)  # (BJ,)
    if over is not None:
        before = (j > 0) & (j < mine - 1)
        score += tl.load(over + at - 1, mask=before, other=0)
    bits = tl.minimum(score.to(tl.int32, bitcast=True), 0x7F7FFFFF)  # (BJ,) a nan as the largest number
    bits = tl.where((j == 0) | (j >= mine - 1), 0x7F800000, bits)  # forced: infinity
    bits = tl.where((j > mine) | (j >= x.blocks), -1, bits)
    low = 0  # at least n reach low, or low is 0
    high = 0x7F800001  # fewer than n reach high
    while high - low > 1:
        middle = low + (high - low) // 2
        reach = tl.sum((bits >= middle).to(tl.int32), 0)
        low = tl.where(reach >= x.n, middle, low)
        less = tl.where(reach == x.n, middle + 1, middle)  # exactly n: found
        high = tl.where(reach > x.n, high, less)
    better = (bits > low).to(tl.int32)
    equal = (bits == low).to(tl.int32)
    room = x.n - tl.sum(better, 0)
    chosen = better + equal * (tl.cumsum(equal, 0) <= room).to(tl.int32)  # of equals the first
    to = lists + (bg * x.all_rows + x.row0 + r) * x.n
    tl.store(to + tl.cumsum(chosen, 0) - 1, j, mask=chosen > 0)
    i = tl.arange(0, NP)
    rest = (i >= tl.sum(chosen, 0)) & (i < x.n)
    tl.store(to + i, -1, mask=rest)


@torch.no_grad()
def select(q, q_pos, keys, lse, tokens, sizes, scale):
    """The lists of every share-th query of a whole text -> (B, G, ceil(T / share), min(n, blocks)).

    At most about 2^25 scores lie in memory at a time: 128 MB, twice that if l > d.
    """
    B, _, T, _ = q.shape
    G = keys.k.shape[1]
    rule = Dense(*numbers_of(q, keys), T, sizes.l, sizes.d, 1)
    q, k, k2, _ = in_rows(q, keys._replace(v=None))
    w = widths_of(q.transpose(1, 2), k, k2, None)
    keys = kv_of(k, k2, None)
    scale = scale * LOG2_E
    q_pos = q_pos.expand(B, T).contiguous()
    blocks = triton.cdiv(tokens, sizes.block)
    rows = triton.cdiv(T, sizes.share)
    n = min(sizes.n, blocks)
    tile, options = tile_of("scores", w, q.dtype)
    tile = tile._replace(BN=max(tile.BN, sizes.block // sizes.d))
    room = 2**25 // (B * G * blocks)  # lists whose scores are kept at a time
    chunk = min(rows, triton.cdiv(room, tile.BQ) * tile.BQ)
    lists = q.new_empty(B, G, rows, n, dtype=torch.int32)
    own = q.new_empty(B * G, chunk, blocks, dtype=torch.float32)
    over = torch.empty_like(own) if sizes.l > sizes.d else None
    for row0 in range(0, rows, chunk):
        count = min(chunk, rows - row0)
        x = Chunk(row0, chunk, rows, blocks, n, T, G)
        grid = (triton.cdiv(count, tile.BQ), B * G)
        score_kernel[grid](q, keys, lse, own, over, scale, rule, x, w, tile, sizes, **options)
        seen = triton.cdiv(min(T, (row0 + chunk) * sizes.share), sizes.block)  # by the last query
        warps = max(1, min(8, power(seen) // 1024))
        rest = (sizes, power(seen, 16), power(n))
        choose_kernel[count, B * G](own, over, q_pos, lists, x, *rest, num_warps=warps)
    return lists


# ------------------------------------------------------------------------------------------------------------
# 8) Decoding: a few queries against the slots of a cache

# T queries at q_pos (B, T); S slots of G groups, length (B,) of them filled, positions k_pos (B, heads, S);
# the last `window` positions count; so many programs split the slots of a group. In q texts
# lie Q numbers apart, and tokens N heads
Slots = namedtuple("Slots", "T S G G2 splits length q_pos Q N k_pos heads window")
# the same for the n blocks of lists (B, G, T, n)
SlotLists = namedtuple("SlotLists", "T S G G2 splits length q_pos Q N lists n")
# what programs write: out (B, T, H, Dv); if the slots are split part, the mean of each share, and stats, its
# (top, total); raw (B, H, T, S): scores in base 2, whose rows are padded to a multiple of 16 so that a thread
# moves 16 bytes at once
Shares = namedtuple("Shares", "out part stats raw")


@jit
def split_of(keys, splits, BN):
    """Which of so many keys this program reads: begin, end."""
    share = tl.cdiv(tl.cdiv(keys, splits), BN) * BN
    begin = tl.program_id(2) * share
    return begin, tl.minimum(begin + share, keys)


@jit
def queries_of_row(q, bg, t, ok, rule, w, tile):
    """load_queries, where texts lie rule.Q numbers apart, and tokens rule.N heads."""
    group = bg // rule.G * rule.Q + bg % rule.G * w.h * (w.DK + w.D2)
    row = t * rule.N + tl.arange(0, tile.BM) % w.HP
    return load_queries(q + group, row, ok, w)


@jit
def output_row(bg, t, m, rule, w):
    """Where row m of a tile, a head of query t, lies in (B, T, H)."""
    return first_row(bg, rule, w) + row_of(t, m % w.HP, rule, w)


@jit
def store_share(to, bg, i, t, ok, o, rule, w, tile):
    """The output, if this program's share of the slots is all; else its mean, for `combine`."""
    top, total, mean = o
    mean = mean / tl.where(total > 0, total, 1.0)[:, None]
    m = tl.arange(0, tile.BM)
    at = ((bg * tl.num_programs(0) + i) * rule.splits + tl.program_id(2)) * tile.BM + m
    if to.part is None:
        row = output_row(bg, t, m, rule, w)
        store_rows(to.out, row, ok, mean, w.DV, w.PV, w.DV)
    else:
        store_rows(to.part, at, ok, mean, w.PV, w.PV, w.PV)
    if to.stats is not None:
        tl.store(to.stats + at * 2, top)
        tl.store(to.stats + at * 2 + 1, total)


@jit
def cached_kernel(q, keys, to, scale, rule, w: constexpr, tile: constexpr):
    """One program: BQ queries x the h heads of a group against one share of its filled slots."""
    bg, i, t, row, ok = rows_of_tile(rule, w, tile)
    b = bg // rule.G
    a = queries_of_row(q, bg, t, ok, rule, w, tile)
    q_pos = rule.q_pos + b * rule.T + t
    stands = tl.load(q_pos, mask=ok, other=0)[:, None]  # (BM, 1)
    keys = of_group(keys, bg, rule, w)
    k_pos = rule.k_pos + (b * rule.heads + bg % rule.G // w.FAN % rule.heads) * rule.S
    filled = tl.minimum(tl.load(rule.length + b), rule.S).to(tl.int32)
    begin, end = split_of(filled, rule.splits, tile.BN)
    o = nothing(tile.BM, w.PV)
    for start in range(begin, end, tile.BN):
        s = start + tl.arange(0, tile.BN)
        lies = tl.load(k_pos + s, mask=s < filled, other=-1)[None, :]  # (1, BN)
        see = (lies >= 0) & (lies <= stands) & (lies > stands - rule.window)  # (BM, BN)
        o, score = softmax_step(a, keys, s, s < filled, see, scale, o, w, False)
        if to.raw is not None:
            head = bg * w.h + tl.arange(0, tile.BM) % w.HP
            at = (head * rule.T + t)[:, None] * (tl.cdiv(rule.S, 16) * 16) + s[None, :]
            near = ok[:, None] & (s < tl.cdiv(filled, 16) * 16)[None, :]
            tl.store(to.raw + at, tl.where(see, score * scale, -1e30), mask=near)
    store_share(to, bg, i, t, ok, o, rule, w, tile)


@jit
def cached_lists_kernel(q, keys, to, scale, rule, w: constexpr, tile: constexpr):
    """One program: a query's h heads of a group against one share of the slots of its list's blocks.

    Slot s holds position s: what the query may see ends where it stands.
    """
    bg, i, t, row, ok = rows_of_tile(rule, w, tile)
    b = bg // rule.G
    a = queries_of_row(q, bg, t, ok, rule, w, tile)
    keys = of_group(keys, bg, rule, w)
    lists = rule.lists + (bg // w.FAN * rule.T + i) * rule.n
    filled = tl.minimum(tl.load(rule.length + b), rule.S).to(tl.int32)
    filled = tl.minimum(filled, tl.load(rule.q_pos + b * rule.T + i).to(tl.int32) + 1)
    count = blocks_in(lists, rule.n, tile.NP) * tile.BLOCK
    begin, end = split_of(count, rule.splits, tile.BN)
    o = nothing(tile.BM, w.PV)
    for start in range(begin, end, tile.BN):
        s = rows_of_blocks(lists, start, count, filled, tile.BN, tile.BLOCK)  # (BN,)
        ok_s = s < filled
        o, _ = softmax_step(a, keys, s, ok_s, ok_s[None, :], scale, o, w, False)
    store_share(to, bg, i, t, ok, o, rule, w, tile)


@jit
def combine(to, bg, i, tiles, m, rule, w, tile):
    """Row m of a tile: the shares' means, weighted by their sums."""
    split = tl.arange(0, tile.SPLITS)
    d = tl.arange(0, w.PV)
    at = ((bg * tiles + i) * rule.splits + split) * tile.BM + m
    live = split < rule.splits
    top = tl.load(to.stats + at * 2, mask=live, other=-1e30)  # (SPLITS,)
    total = tl.load(to.stats + at * 2 + 1, mask=live, other=0)  # (SPLITS,)
    weight = total * tl.exp2(top - tl.max(top, 0))  # (SPLITS,)
    at = at[:, None] * w.PV + d[None, :]
    means = tl.load(to.part + at, mask=live[:, None], other=0)  # (SPLITS, PV)
    norm = tl.sum(weight, 0)
    o = tl.sum(means * weight[:, None], 0) / tl.where(norm > 0, norm, 1.0)  # (PV,)
    t = i * tile.BQ + m // w.HP
    row = output_row(bg, t, m, rule, w)
    if (t < rule.T) & (m % w.HP < w.h):
        tl.store(to.out + row * w.DV + d, o.to(to.out.dtype.element_ty), mask=d < w.DV)


@jit
def combine_kernel(to, rule, w: constexpr, tile: constexpr):
    """One program: one row of a tile."""
    bg = tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0)
    combine(to, bg, tl.program_id(0), tiles, tl.program_id(2), rule, w, tile)


def shares_of(q, keys, BQ, slots, block=0, n=1, raw=None):
    """How a decoding step of BQ queries a program, each reading so many slots, is cut into programs.

    -> grid (tiles of queries, groups, splits), room for what they write, Widths, Tile, warps.
    """
    B, H, T, _ = q.shape
    G = keys.k.shape[1]
    w = widths_of(q, keys.k, keys.k2, keys.v)
    fan = 1  # many heads in a program make it short of registers; where few run, several share a group's
    while raw is None and BQ * w.h * w.DV > AREA * fan and w.h % (2 * fan) == 0 and 4 * fan * B * G <= SMS:
        fan *= 2
    G *= fan
    w = w._replace(h=w.h // fan, HP=power(w.h // fan), FAN=fan)
    BM = power(BQ * w.HP, 16)
    area = BM * w.PV  # numbers of the output
    width = w.PK + (w.P2 if w.D2 else 0) + (0 if w.SHARED else w.PV)
    BN = power(BYTES // (width * q.element_size()) + 1) // 2  # the power of 2 below
    BN = max(32, min(128 if area <= 2**12 else 32, BN))  # queries are fetched anew for each tile
    tiles = triton.cdiv(T, BQ)
    each = 2 if area <= 2**14 else 1  # programs on a multiprocessor: one waits while another multiplies
    splits = max(1, min(64, slots // 128, each * SMS // (B * G * tiles)))  # one wave, 128 keys each
    steps = max(1, triton.cdiv(slots, BN))
    splits = triton.cdiv(steps, triton.cdiv(steps, splits))  # none without a step
    warps = 8 if w.DK > 256 and area > 2**13 else 4
    if q.dtype == torch.float32 and BM == 16 and splits == 1:  # a short cache: measured
        BN = 32
        warps = 2
    out = q.new_empty(B, T, H, w.DV)
    rows = (B * G, tiles, splits, BM)
    part = q.new_empty(*rows, w.PV, dtype=torch.float32) if splits > 1 else None
    stats = q.new_empty(*rows, 2, dtype=torch.float32) if splits > 1 or raw is not None else None
    tile = Tile(BQ, BM, BN, block, power(n), power(splits))
    return (tiles, B * G, splits), Shares(out, part, stats, raw), w, tile, warps


def read_slots(kernel, q, keys, scale, rule, cut):
    """Launches a kernel, and combines what its programs leave -> o (B, H, T, Dv)."""
    grid, to, w, tile, warps = cut
    slots = kv_of(*(x if x is None else x.contiguous() for x in (keys.k, keys.k2, keys.v)))
    kernel[grid](q, slots, to, scale * LOG2_E, rule, w, tile, num_warps=warps)
    if grid[2] > 1 and to.raw is None:
        rows = (*grid[:2], tile.BQ * w.HP)
        combine_kernel[rows](to, rule, w, tile, num_warps=4 if grid[2] > 16 else 1)
    return to.out.transpose(1, 2)


def slots_rule(kind, q, q_pos, keys, cut, *rest):
    """-> what kernels know of queries and slots, and the queries (B, T, H, D + P), each token dense."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, *keys[:3])):
        raise Refused("decoding kernels have no gradient")
    T, S, _, G2 = numbers_of(q, keys)
    _, groups, splits = cut[0]  # with a FAN there are more groups than the keys have
    q_pos = q_pos.expand(len(q), T).contiguous()
    q = q.transpose(1, 2)  # (B, T, H, D + P)
    width = q.shape[3]
    q = q if q.stride()[2:] == (width, 1) and q.stride(1) % width == 0 else q.contiguous()
    place = (q.stride(0), q.stride(1) // width)
    return kind(T, S, groups // len(q), G2, splits, keys.length, q_pos, *place, *rest), q


def cached_attention(q, q_pos, keys, scale, window=None):
    """Attention of a few queries to the filled slots of a cache; a query that sees nothing gets 0."""
    T = q.shape[2]
    if keys.length is None:
        raise Refused("slots of a ring and new tokens side by side")
    h = check(q, keys, T if T > 16 else 1, most=128, width=2**16)  # torch's own kernel is better for prompts
    rows = min(128, 2**15 // power(keys.k.shape[3]))  # that fit on the chip
    cut = shares_of(q, keys, min(T, max(1, rows // power(h))), keys.k.shape[2])
    rest = (keys.pos, keys.pos.shape[1], window or 2**31 - 1)
    rule, q = slots_rule(Slots, q, q_pos, keys, cut, *rest)
    return read_slots(cached_kernel, q, keys, scale, rule, cut)


def cached_lists(q, q_pos, keys, lists, block, scale):
    """selected_attention of a few queries, each with a list of its own, against a cache."""
    check(q, keys, q.shape[2], most=128, width=2**16, block=block)
    n = lists.shape[3]
    cut = shares_of(q, keys, 1, n * block, block, n)
    rule, q = slots_rule(SlotLists, q, q_pos, keys, cut, lists, n)
    return read_slots(cached_lists_kernel, q, keys, scale, rule, cut)


@jit
def importance_kernel(
    to, scores, rule, blocks, w: constexpr, tile: constexpr, sizes: constexpr, BE: constexpr
):
    """What is left when all scores are known, for one query and group; two kinds of programs, side by side.

    The first `chunks` make weights of BE scores and sum them over heads and blocks: own, over (B G, T,
    blocks). The others combine the shares, one a head.
    """
    t = tl.program_id(0)
    bg = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(2)
    head = tl.arange(0, w.HP)
    FOLD: constexpr = sizes.block // sizes.d
    chunks = tl.cdiv(tl.maximum(rule.S, blocks * FOLD), BE)
    if chunk >= chunks:
        if to.part is not None:
            combine(to, bg, 0, 1, t * w.HP + chunk - chunks, rule, w, tile)
    else:
        e = chunk * BE + tl.arange(0, BE)
        j = chunk * (BE // FOLD) + tl.arange(0, BE // FOLD)
        length = tl.load(rule.length + bg // rule.G)
        count = tl.minimum(length, rule.S).to(tl.int32)
        ok = (head < w.h)[:, None] & (e < tl.cdiv(count, 16) * 16)[None, :]
        row = (bg * w.h + head) * rule.T + t  # (HP,)
        at = row[:, None] * (tl.cdiv(rule.S, 16) * 16) + e[None, :]
        score = tl.load(to.raw + at, mask=ok, other=-1e30)  # (HP, BE)
        split = tl.arange(0, tile.SPLITS)[:, None]
        at = (bg * rule.splits + split) * tile.BM + (t * w.HP + head)[None, :]  # (SPLITS, HP)
        ok = (split < rule.splits) & (head < w.h)[None, :]
        tops = tl.load(to.stats + at * 2, mask=ok, other=-1e30)  # (SPLITS, HP)
        totals = tl.load(to.stats + at * 2 + 1, mask=ok, other=0)  # (SPLITS, HP)
        top = tl.maximum(tl.max(tops, 0), -1e29)  # (HP,) above what is masked
        total = tl.sum(totals * tl.exp2(tops - top[None, :]), 0)  # (HP,)
        weight = 1 / tl.where(total > 0, total, 1.0)
        p = tl.exp2(score - top[:, None]) * weight[:, None]  # (HP, BE)
        p = tl.sum(p, 0)[:, None]  # (BE, 1)
        at = (bg * rule.T + t) * blocks + j
        store_scores(scores[0], scores[1], at[:, None], (j < blocks)[:, None], p, BE, 1, sizes)


def cached_entries(q, q_pos, keys, tokens, sizes, scale):
    """compressed_attention of a few queries against the cache of compressed entries."""
    B, H, T, _ = q.shape
    G, S = keys.k.shape[1:3]
    h = check(q, keys, T, most=128, width=2**16, block=sizes.block)
    blocks = triton.cdiv(tokens, sizes.block)
    n = min(sizes.n, blocks)
    raw = q.new_empty(B, H, T, triton.cdiv(S, 16) * 16, dtype=torch.float32)
    own = q.new_empty(B * G, T, blocks, dtype=torch.float32)
    over = torch.empty_like(own) if sizes.l > sizes.d else None
    lists = q.new_empty(B, G, T, n, dtype=torch.int32)
    cut = shares_of(q, keys, T, S, raw=raw)
    rest = (keys.pos, keys.pos.shape[1], 2**31 - 1)
    rule, q = slots_rule(Slots, q, q_pos, keys, cut, *rest)
    o = read_slots(cached_kernel, q, keys, scale, rule, cut)
    (_, _, splits), to, w, tile, _ = cut
    many = min(2**13, power(raw.numel() // (8 * SMS)))  # scores of a program: fewer where these fill no GPU
    BE = max(128, many // w.HP)
    chunks = triton.cdiv(max(S, blocks * sizes.block // sizes.d), BE)
    grid = (T, B * G, chunks + (h if splits > 1 else 0))
    importance_kernel[grid](to, (own, over), rule, blocks, w, tile, sizes, BE)
    warps = max(1, min(8, power(blocks) // 512))
    rest = (Chunk(0, T, T, blocks, n, T, G), sizes, power(blocks, 16), power(n))
    choose_kernel[T, B * G](own, over, rule.q_pos, lists, *rest, num_warps=warps)
    return o, lists


# ------------------------------------------------------------------------------------------------------------
# 9) Mix


@jit
def mix_kernel(branches, gates, out, rows, H, stride, D: constexpr, P: constexpr, BM: constexpr):
    """One program: BM rows of out (B, T, H, D) = sum of gate x branch. gates (B T, N H), `stride` apart."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ok = row < rows
    gates += row // H * stride + row % H
    mixed = zeros(BM, P)
    for i in tl.static_range(len(branches)):
        gate = tl.load(gates + i * H, mask=ok, other=0).to(tl.float32)[:, None]
        mixed += gate * load_rows(branches[i], row, ok, D, P, D)
    store_rows(out, row, ok, mixed, D, P, D)


@jit
def unmix_kernel(
    branches, gates, dout, grads, dgates, rows, H, stride, D: constexpr, P: constexpr, BM: constexpr
):
    """Its gradient: gate x dout to a branch, branch . dout to its gate."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ok = row < rows
    gates += row // H * stride + row % H
    dgates += row // H * len(branches) * H + row % H
    douts = load_rows(dout, row, ok, D, P, D).to(tl.float32)  # (BM, P)
    for i in tl.static_range(len(branches)):
        gate = tl.load(gates + i * H, mask=ok, other=0).to(tl.float32)[:, None]
        store_rows(grads[i], row, ok, gate * douts, D, P, D)
        branch = load_rows(branches[i], row, ok, D, P, D).to(tl.float32)  # (BM, P)
        tl.store(dgates + i * H, tl.sum(douts * branch, 1).to(dgates.dtype.element_ty), mask=ok)


class Mix(torch.autograd.Function):
    """gates (B T, N H) and branches (B, T, H, D) -> (B, T, H, D), with the gradient."""

    @staticmethod
    def forward(ctx, gates, *branches):
        ctx.save_for_backward(gates, *branches)
        out = torch.empty_like(branches[0])
        Mix.run(mix_kernel, branches, gates, out)
        return out

    @staticmethod
    def backward(ctx, dout):
        gates, *branches = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in branches)
        dgates = gates.new_empty(gates.shape)
        Mix.run(unmix_kernel, branches, gates, dout.contiguous(), grads, dgates)
        return dgates, *grads

    @staticmethod
    def run(kernel, branches, gates, *more):
        *_, H, D = branches[0].shape
        rows = branches[0].numel() // D
        kernel[(triton.cdiv(rows, 16),)](
            tuple(branches), gates, *more, rows, H, gates.stride(0), D, power(D), 16
        )


def mix(gates, *branches):
    """Sum of gate x branch (B, H, T, D), which all lie in memory as (B, T, H, D); gates (B, T, N H)."""
    gates = gates.to(branches[0].dtype).flatten(0, 1)
    gates = gates if gates.stride(-1) == 1 else gates.contiguous()
    return Mix.apply(gates, *(x.transpose(1, 2).contiguous() for x in branches)).transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------
# 10) Slots

# new (B, heads, T, width) with the strides of B, heads, T goes to buffer (B, heads, S, width)
Part = namedtuple("Part", "new buffer heads strides")


@jit
def write_row(x, b, head, take, slot, S, W, P):
    """new[b, head, take] -> buffer[b, head, slot]."""
    if head < x.heads:
        i = tl.arange(0, P)
        at = x.new + b * x.strides[0] + head * x.strides[1]
        at += take * x.strides[2]
        row = tl.load(at + i, mask=i < W).to(x.buffer.dtype.element_ty)
        to = x.buffer + ((b * x.heads + head) * S + slot) * W
        tl.store(to + i, row, mask=i < W)


@jit
def write_slots_kernel(parts, length, count, S, widths: constexpr, padded: constexpr, RING: constexpr):
    """One program: one new token of one row and head. A ring takes the last S; a row that is full, none."""
    b = tl.program_id(1).to(tl.int64)
    n = tl.load(count + b)
    begin = tl.load(length + b)
    take = tl.program_id(0) + tl.maximum(n - S, 0)
    if (take < n) & ((begin + n <= S) | RING):
        slot = (begin + take) % S
        for i in tl.static_range(len(parts)):
            write_row(parts[i], b, tl.program_id(2), take, slot, S, widths[i], padded[i])


def write_slots(length, buffers, new, count, ring):
    """In place: buffers (B, heads, S) or (B, heads, S, width), new likewise with T."""
    B, _, T = new[0].shape[:3]
    S = buffers[0].shape[2]
    new = [x[..., None] if x.dim() == 3 else x for x in new]  # positions have width 1
    new = [x if 1 in (x.stride(3), x.shape[3]) else x.contiguous() for x in new]
    parts = [Part(x, y, x.shape[1], x.stride()[:3]) for x, y in zip(new, buffers)]
    widths = tuple(x.shape[3] for x in new)
    grid = (min(T, S), B, max(x.shape[1] for x in new))
    count = count.contiguous()  # it may be one number, expanded
    padded = tuple(power(width) for width in widths)
    write_slots_kernel[grid](tuple(parts), length, count, S, widths, padded, ring)


# ------------------------------------------------------------------------------------------------------------
# 11) Stream


@jit
def norm_kernel(x, y, weight, total, normed, rows, eps, C: constexpr, P: constexpr, BM: constexpr):
    """One program: BM rows of C numbers; y None: nothing is added, and total stays unwritten."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ok = row < rows
    z = load_rows(x, row, ok, C, P, C).to(tl.float32)  # (BM, P)
    if y is not None:
        z = (z + load_rows(y, row, ok, C, P, C)).to(total.dtype.element_ty)
        store_rows(total, row, ok, z, C, P, C)
        z = z.to(tl.float32)
    i = tl.arange(0, P)
    z *= tl.rsqrt(tl.sum(z * z, 1) / C + eps)[:, None]
    z *= tl.load(weight + i, mask=i < C, other=0)[None, :]
    store_rows(normed, row, ok, z, C, P, C)


@jit
def unnorm_kernel(
    x, dnormed, dtotal, weight, dx, dy, parts, rows, eps, C: constexpr, P: constexpr, BM: constexpr
):
    """One program: some of the tiles of BM rows; what they give to the weight's gradient is one of parts."""
    i = tl.arange(0, P)
    w = tl.load(weight + i, mask=i < C, other=0).to(tl.float32)[None, :]
    dw = tl.zeros((P,), tl.float32)  # (P,)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BM), tl.num_programs(0)):
        row = tile * BM + tl.arange(0, BM)
        ok = row < rows
        unit = load_rows(x, row, ok, C, P, C).to(tl.float32)  # (BM, P)
        inner = tl.where(ok, tl.rsqrt(tl.sum(unit * unit, 1) / C + eps), 0)[:, None]  # eps may be 0
        unit *= inner
        d = load_rows(dnormed, row, ok, C, P, C).to(tl.float32)  # (BM, P)
        dw += tl.sum(d * unit, 0)
        d *= w
        d = inner * (d - unit * (tl.sum(d * unit, 1) / C)[:, None])
        if dtotal is not None:
            d += load_rows(dtotal, row, ok, C, P, C)
        store_rows(dx, row, ok, d, C, P, C)
        if dy is not None:
            store_rows(dy, row, ok, d, C, P, C)
    tl.store(parts + tl.program_id(0) * C + i, dw, mask=i < C)


class AddNorm(torch.autograd.Function):
    """add_norm, below, with its gradient."""

    @staticmethod
    def forward(ctx, x, y, weight, eps):
        x = x.contiguous()
        C = x.shape[-1]
        rows = x.numel() // C
        widths = (C, power(C), max(1, 2**11 // power(C)))
        dtype = x.dtype if y is None else torch.promote_types(x.dtype, y.dtype)
        total = x if y is None else torch.empty_like(x, dtype=dtype)
        normed = torch.empty_like(x, dtype=amp_dtype(total))
        y = y if y is None else y.contiguous()
        norm_kernel[(triton.cdiv(rows, widths[2]),)](x, y, weight, total, normed, rows, eps, *widths)
        ctx.save_for_backward(total, weight)
        ctx.rest = (rows, eps, widths, x.dtype, y if y is None else y.dtype)
        ctx.set_materialize_grads(False)
        return normed if y is None else (total, normed)

    @staticmethod
    def backward(ctx, *grads):
        total, weight = ctx.saved_tensors
        rows, eps, widths, *kinds = ctx.rest
        dtotal = grads[0].contiguous() if len(grads) > 1 and grads[0] is not None else None
        dnormed = torch.zeros_like(total) if grads[-1] is None else grads[-1].contiguous()
        dx, dy = (kind and torch.empty_like(total, dtype=kind) for kind in kinds)
        tiles = triton.cdiv(rows, widths[2])
        parts = torch.empty(min(tiles, 4 * SMS), widths[0], dtype=torch.float32, device=total.device)
        unnorm_kernel[(len(parts),)](total, dnormed, dtotal, weight, dx, dy, parts, rows, eps, *widths)
        return dx, dy, parts.sum(0).to(weight.dtype), None


def normed(x, y, weight, eps):
    """AddNorm of what its kernel can take: x, y or None (.., C), weight (C,)."""
    if y is not None and x.shape != y.shape:
        raise Refused(f"{tuple(x.shape)} and {tuple(y.shape)} are added row by row")
    if weight.shape != x.shape[-1:] or not weight.is_contiguous():
        raise Refused(f"a weight for each of {x.shape[-1]} numbers, dense in memory")
    return AddNorm.apply(x, y, weight, eps)


def rms_norm(x, weight, eps):
    """x (.., C) -> its norm."""
    return normed(x, None, weight, eps)


def add_norm(x, y, norm):
    """x, y (B, T, C), norm an RMSNorm -> x + y, and its norm as rms_norm gives it."""
    return normed(x, y, norm.weight, norm.eps)


@jit
def swiglu_kernel(x, dout, out, F: constexpr, P: constexpr):
    """One program: P numbers of a row of F: out (F), or with dout (F) the gradient (2 F) of x."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * P + tl.arange(0, P)
    ok = i < F
    gate = tl.load(x + row * 2 * F + i, mask=ok, other=0).to(tl.float32)
    up = tl.load(x + row * 2 * F + F + i, mask=ok, other=0).to(tl.float32)
    part = tl.sigmoid(gate)
    silu = gate * part
    if dout is None:
        tl.store(out + row * F + i, silu.to(out.dtype.element_ty) * up, mask=ok)
    else:
        d = tl.load(dout + row * F + i, mask=ok, other=0).to(tl.float32)
        tl.store(out + row * 2 * F + i, d * up * part * (1 + gate - silu), mask=ok)
        tl.store(out + row * 2 * F + F + i, d * silu, mask=ok)


class SwiGLU(torch.autograd.Function):
    """swiglu, below, with its gradient."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        ctx.save_for_backward(x)
        return SwiGLU.run(x, None, x.new_empty(*x.shape[:-1], x.shape[-1] // 2))

    @staticmethod
    def backward(ctx, dout):
        (x,) = ctx.saved_tensors
        return SwiGLU.run(x, dout.contiguous(), torch.empty_like(x))

    @staticmethod
    def run(x, dout, out):
        width = x.shape[-1] // 2
        P = min(1024, power(width))
        swiglu_kernel[x[..., 0].numel(), triton.cdiv(width, P)](x, dout, out, width, P)
        return out


def swiglu(x):
    """x = [gate ; up], (.., 2 F) -> silu(gate) * up (.., F)."""
    if x.shape[-1] % 2:
        raise Refused(f"{x.shape[-1]} numbers are not two halves")
    return SwiGLU.apply(x)


# ------------------------------------------------------------------------------------------------------------


def main(argv):
    if "-h" in argv or "--help" in argv:
        print(__doc__.strip())
        return 0
    error = f"unknown option {argv[0]!r}: try --help" if argv else "Triton is not installed"
    if argv or triton is None:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = f"compiled for {torch.cuda.get_device_name()}" if device == "cuda" else "interpreted on the CPU"
    print(f"Triton {triton.__version__}, {where}\n")
    T = 64
    scale = 16**-0.5
    q, k, v = (torch.randn(1, heads, T, 16, device=device) for heads in (4, 2, 2))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (1, 4, T, 16)
    keys = KV(k, None, v)
    block = torch.arange(4, device=device, dtype=torch.int32)
    late = block * 16 > torch.arange(T, device=device)[:, None]  # (T, 4)
    lists = block.expand(1, 2, T, 4).masked_fill(late, -1)
    outputs = {
        "a window of all tokens": window_attention(q, keys, T, scale),
        "lists of all blocks of 16": attend(q, keys, scale, lists=lists, block=16)[0],
    }
    print(f"{T} queries, 4 heads in 2 groups: largest difference to dense attention\n")
    for what, o in outputs.items():
        print(f"  {what:26} {(o - want).abs().max():.1e} (fp32)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
