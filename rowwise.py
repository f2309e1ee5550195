"""Kernels for what works on one row at a time: rotation, gates, new slots of a cache, norms, SwiGLU.

Between two matrix products a model reads and writes rows of a few hundred numbers, many times. Here each of
these steps is one pass over memory, with its gradient. The definitions of the same names stand under
`@fast_path` in latent_attention.py and nsa.py; kernels.py, which has the kernels of attention, pairs them.

    1) rows       load and store tiles of rows; a tile is a power of 2 and the rest is masked
    2) rope       angles, rotation and halves in one pass over x; its gradient is the rotation back
    3) mix        the gates, and the heads merged
    4) slots      keys, values and positions of new tokens to their slots, each row at its own length
    5) stream     norms, sums before norms, SwiGLU

Does NOT include: attention (kernels.py). Without Triton this file is imported, and nothing in it is called.
`python rowwise.py` compares three of them with torch. Read first: latent_attention.py. Letters as there; PD,
PW, PC, PF: a width rounded up to a power of 2.
"""

import functools
import math
import os
import sys
from collections import namedtuple

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: kernels run on the CPU

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError:  # no Triton, no fast path: the kernels are defined and never called
    triton = tl = None
    constexpr = None

    def jit(kernel):
        return kernel


SMS = 132  # multiprocessors of an H100 or H200


class Refused(ValueError):
    """A fast function cannot take these arguments; raised before anything is launched or written."""


def amp_dtype(x):
    """The dtype to which a matrix product casts x: under autocast that of autocast."""
    auto = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if auto else x.dtype


# ------------------------------------------------------------------------------------------------------------
# 1) Rows


def power(n, least=1):
    """The next power of 2, which is what Triton's tiles must be."""
    return max(least, triton.next_power_of_2(n))


@jit
def zeros(M, N):
    return tl.zeros((M, N), tl.float32)


@jit
def load_rows(x, row, ok, D, PD, STRIDE, ALL=False):
    """x[row, :D] -> (rows, PD), padded with zeros: rows that are ok, or ALL."""
    d = tl.arange(0, PD)
    at = x + row.to(tl.int64)[:, None] * STRIDE + d[None, :]
    if ALL and D == PD:
        return tl.load(at)
    elif ALL:
        return tl.load(at, mask=(d < D)[None, :], other=0)
    elif D == PD:
        return tl.load(at, mask=ok[:, None], other=0)
    else:
        return tl.load(at, mask=ok[:, None] & (d < D)[None, :], other=0)


@jit
def store_rows(x, row, ok, value, D, PD, STRIDE):
    """value (rows, PD) -> x[row, :D]."""
    d = tl.arange(0, PD)
    at = x + row.to(tl.int64)[:, None] * STRIDE + d[None, :]
    ok = ok[:, None] & (d < D)[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=ok)


# ------------------------------------------------------------------------------------------------------------
# 2) Rope


@jit
def rope_kernel(
    x, out, pos, H, T, strides, to_strides, pos_strides, sign, log2_base, more, factor,
    HEADS: constexpr, D: constexpr, PD: constexpr, P: constexpr, HALF: constexpr, BT: constexpr,
):  # fmt: skip
    """One program: BT tokens of HEADS heads. x and out (B, H, T, D + P) have strides, but the last is 1."""
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
        at = x + b * strides[0] + h * strides[1] + row * strides[2]
        to = out + b * to_strides[0] + h * to_strides[1] + row * to_strides[2]
        if D > 0:
            tl.store(to + d, tl.load(at + d, mask=still), mask=still)
        at += D + i[None, :]
        to += D + i[None, :]
        u = tl.load(at, mask=ok, other=0).to(tl.float32)  # (BT, HALF)
        v = tl.load(at + P // 2, mask=ok, other=0).to(tl.float32)  # (BT, HALF)
        tl.store(to, (u * cos - v * sin).to(out.dtype.element_ty), mask=ok)
        tl.store(to + P // 2, (v * cos + u * sin).to(out.dtype.element_ty), mask=ok)


@functools.cache
def log2_of(base):
    """log2 of base in fp32, and what that lacks."""
    exact = math.log2(base)
    most = torch.tensor(exact, dtype=torch.float32).item()
    return most, exact - most


class Rope(torch.autograd.Function):
    """rope, below. Its gradient turns backwards. What both give lies as (B, T, H, ..)."""

    @staticmethod
    def forward(ctx, x, pos, base, factor, still):
        ctx.save_for_backward(pos)
        ctx.rest = (base, factor, still)
        return Rope.turn(x, pos, *ctx.rest, 1.0)

    @staticmethod
    def backward(ctx, grad):
        return Rope.turn(grad, *ctx.saved_tensors, *ctx.rest, -1.0), None, None, None, None

    @staticmethod
    def turn(x, pos, base, factor, still, sign):
        B, H, T, width = x.shape
        out = x.new_empty(B, T, H, width).transpose(1, 2)
        P = width - still
        x = x if x.stride(3) == 1 else x.contiguous()
        strides = (x.stride()[:3], out.stride()[:3], pos.expand(B, T).stride())
        BT = min(64, power(T))
        HEADS = 1 if T < 64 else 4  # which share their sines
        grid = (B * triton.cdiv(H, HEADS), triton.cdiv(T, BT))
        widths = (HEADS, still, power(still), P, power(P // 2), BT)
        rope_kernel[grid](x, out, pos, H, T, *strides, sign, *log2_of(base), float(factor), *widths)
        return out


def rope(x, pos, base=10000.0, factor=1.0, still=0):
    """x (B, H, T, still + P), pos (B or 1, T) -> likewise; angles in fp32."""
    return Rope.apply(x, pos, base, factor, still)


# ------------------------------------------------------------------------------------------------------------
# 3) Mix


@jit
def mix_kernel(branches, gates, out, rows, H, stride, D: constexpr, PD: constexpr, BM: constexpr):
    """One program: BM rows of out (B, T, H, D) = sum of gate x branch. gates (B T, N H), `stride` apart."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ok = row < rows
    gates += row // H * stride + row % H
    mixed = zeros(BM, PD)
    for i in tl.static_range(len(branches)):
        gate = tl.load(gates + i * H, mask=ok, other=0).to(tl.float32)[:, None]
        mixed += gate * load_rows(branches[i], row, ok, D, PD, D)
    store_rows(out, row, ok, mixed, D, PD, D)


@jit
def unmix_kernel(
    branches, gates, dout, grads, dgates, rows, H, stride, D: constexpr, PD: constexpr, BM: constexpr
):
    """Its gradient: gate x dout to a branch, branch . dout to its gate."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ok = row < rows
    gates += row // H * stride + row % H
    dgates += row // H * len(branches) * H + row % H
    douts = load_rows(dout, row, ok, D, PD, D).to(tl.float32)  # (BM, PD)
    for i in tl.static_range(len(branches)):
        gate = tl.load(gates + i * H, mask=ok, other=0).to(tl.float32)[:, None]
        store_rows(grads[i], row, ok, gate * douts, D, PD, D)
        branch = load_rows(branches[i], row, ok, D, PD, D).to(tl.float32)  # (BM, PD)
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
# 4) Slots

# new (B, heads, T, width) with the strides of B, heads, T goes to buffer (B, heads, S, width)
Part = namedtuple("Part", "new buffer heads strides")


@jit
def write_row(x, b, head, take, slot, S, W, PW):
    """new[b, head, take] -> buffer[b, head, slot]."""
    if head < x.heads:
        i = tl.arange(0, PW)
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
# 5) Stream


@jit
def norm_kernel(x, y, weight, total, normed, rows, eps, C: constexpr, PC: constexpr, BM: constexpr):
    """One program: BM rows of C numbers; y None: nothing is added, and total stays unwritten."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ok = row < rows
    z = load_rows(x, row, ok, C, PC, C).to(tl.float32)  # (BM, PC)
    if y is not None:
        z = (z + load_rows(y, row, ok, C, PC, C)).to(total.dtype.element_ty)
        store_rows(total, row, ok, z, C, PC, C)
        z = z.to(tl.float32)
    i = tl.arange(0, PC)
    z *= tl.rsqrt(tl.sum(z * z, 1) / C + eps)[:, None]
    z *= tl.load(weight + i, mask=i < C, other=0)[None, :]
    store_rows(normed, row, ok, z, C, PC, C)


@jit
def unnorm_kernel(
    x, dnormed, dtotal, weight, dx, dy, parts, rows, eps, C: constexpr, PC: constexpr, BM: constexpr
):
    """One program: some of the tiles of BM rows; what they give to the weight's gradient is one of parts."""
    i = tl.arange(0, PC)
    w = tl.load(weight + i, mask=i < C, other=0).to(tl.float32)[None, :]
    dw = tl.zeros((PC,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BM), tl.num_programs(0)):
        row = tile * BM + tl.arange(0, BM)
        ok = row < rows
        unit = load_rows(x, row, ok, C, PC, C).to(tl.float32)  # (BM, PC)
        inner = tl.where(ok, tl.rsqrt(tl.sum(unit * unit, 1) / C + eps), 0)[:, None]  # eps may be 0
        unit *= inner
        d = load_rows(dnormed, row, ok, C, PC, C).to(tl.float32)
        dw += tl.sum(d * unit, 0)
        d *= w
        d = inner * (d - unit * (tl.sum(d * unit, 1) / C)[:, None])
        if dtotal is not None:
            d += load_rows(dtotal, row, ok, C, PC, C)
        store_rows(dx, row, ok, d, C, PC, C)
        if dy is not None:
            store_rows(dy, row, ok, d, C, PC, C)
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


def rms_norm(x, weight, eps):
    """x (.., C) -> its norm."""
    return AddNorm.apply(x, None, weight, eps)


def add_norm(x, y, norm):
    """x, y (B, T, C), norm an RMSNorm -> x + y, and its norm as rms_norm gives it."""
    if x.shape != y.shape:
        raise Refused(f"{tuple(x.shape)} and {tuple(y.shape)} are added row by row")
    return AddNorm.apply(x, y, norm.weight, norm.eps)


@jit
def swiglu_kernel(x, dout, out, F: constexpr, PF: constexpr):
    """One program: PF numbers of a row of F: out (F), or with dout (F) the gradient (2 F) of x."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * PF + tl.arange(0, PF)
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
        PF = min(1024, power(width))
        swiglu_kernel[x[..., 0].numel(), triton.cdiv(width, PF)](x, dout, out, width, PF)
        return out


def swiglu(x):
    """x = [gate ; up], (.., 2 F) -> silu(gate) * up (.., F)."""
    return SwiGLU.apply(x)


def main(argv):
    if argv:  # --help
        print(__doc__)
        return 0
    if triton is None:
        print("error: Triton is not installed", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(2, 4, 9, 32, device=device)  # (B, H, T, P)
    pos = torch.arange(9, device=device)[None]  # (1, T)
    weight = torch.rand(32, device=device)
    u, v = x.chunk(2, dim=-1)  # (B, H, T, P / 2) each
    angle = pos[0, :, None] * 10000.0 ** (-torch.arange(16, device=device) / 16)  # (T, P / 2)
    turned = torch.view_as_real(torch.complex(u, v) * torch.polar(torch.ones_like(angle), angle))
    results = {
        "rope": (rope(x, pos), turned.transpose(-1, -2).flatten(-2)),
        "rms_norm": (rms_norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (32,), weight, 1e-6)),
        "swiglu": (swiglu(x), torch.nn.functional.silu(u) * v),
    }
    print("largest difference to torch (fp32)\n")
    for name, (got, want) in results.items():
        print(f"  {name:10} {(got - want).abs().max():.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
