"""The fast path on a GPU, in Triton: what a decoding step does once per layer, and once per round.

A step of a small model is bound by the number of kernels, not by their work: one token through one layer in plain PyTorch is about 85
launches. Those below replace about 60 of them; they never change what is computed, only how often memory is touched.

    1) rope               angles, rotation and halves in one pass over x; its gradient is the rotation back
    2) append             keys, values and positions of new tokens to their slots, each row at its own length
    3) decode_attention   a few queries per row against its slots, up to the row's length, masked by position, split over the slots
    4) draw               softmax and one sample of it
    5) commit             drafts accepted or refused, the token after them, stops and limits (mtp.py)

The definition is the PyTorch code in latent_attention.py and mtp.py. test_all.py compares: on a GPU compiled, on a CPU in Triton's
interpreter (TRITON_INTERPRET=1, set before this file is imported).
Does NOT include yet: kernels for training and for NSA's and ASA's branches.
Not to be confused with the package `kernels` on PyPI.

Letters as in latent_attention.py.
"""
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton, no fast path
    triton = None


def fast(x):
    """Whether the kernels can take x: on a GPU, with Triton, in 16 or 32 bits."""
    return triton is not None and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32)


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
        at = x + b * xb + h * xh + t[:, None] * xt + i[None, :]
        u, v = tl.load(at, mask=ok, other=0).to(tl.float32), tl.load(at + P // 2, mask=ok, other=0).to(tl.float32)
        to = out + (bh * T + t[:, None]) * P + i[None, :]
        tl.store(to, (u * cos - v * sin).to(out.dtype.element_ty), mask=ok)
        tl.store(to + P // 2, (v * cos + u * sin).to(out.dtype.element_ty), mask=ok)

    # -----------------------------------------------------------------------------------------------------------------------------
    # 2) append

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
        b, j, head = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        n = tl.load(count + b)
        take = j + tl.maximum(n - S, 0)
        if take < n:
            slot = (tl.load(length + b) + take) % S
            write_row(x, x_buf, b, head, take, slot, xb, xh, xt, x_heads, S, XW, XP)
            write_row(y, y_buf, b, head, take, slot, yb, yh, yt, y_heads, S, YW, YP)
            if head < pos_heads:
                tl.store(pos_buf + (b * pos_heads + head) * S + slot, tl.load(pos + b * pb + take * pt).to(tl.int32))

    # -----------------------------------------------------------------------------------------------------------------------------
    # 3) decode_attention

    @triton.jit
    def decode_kernel(q, k, k2, v, out, stats, q_pos, k_pos, length, scale, window, T, h, S, G, pos_heads, splits,
                      qb, qh, qt, pb, pt, DK: tl.constexpr, PK: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr, DV: tl.constexpr,
                      PV: tl.constexpr, SHARED: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
        """One program: the h T query rows of one group against one share of its slots; an online softmax, base 2.

        A key is [k ; k2] (k2 is shared by the groups; D2 = 0: none). SHARED: v is k. Writes the share's weighted mean and (max, sum); out is
        (B, T, H, DV) dense, as the output matrix will read it.
        """
        bg, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
        b, g = bg // G, bg % G
        m, n = tl.arange(0, BM), tl.arange(0, BN)  # query rows: head m // T, token m % T
        dk, dv = tl.arange(0, PK), tl.arange(0, PV)
        rows = (m < h * T)[:, None]
        at = q + b * qb + (g * h + m // T)[:, None] * qh + (m % T)[:, None] * qt
        queries = tl.load(at + dk[None, :], mask=rows & (dk < DK)[None, :], other=0)  # (BM, PK)
        if D2 > 0:
            d2 = tl.arange(0, P2)
            queries2 = tl.load(at + DK + d2[None, :], mask=rows & (d2 < D2)[None, :], other=0)  # (BM, P2)
        where = tl.load(q_pos + b * pb + (m % T) * pt, mask=m < h * T, other=0)  # (BM,)

        filled = tl.minimum(tl.load(length + b), S).to(tl.int32)
        share = tl.cdiv(tl.cdiv(filled, splits), BN) * BN
        first = split * share
        top = tl.full((BM,), -1e30, tl.float32)
        total = tl.zeros((BM,), tl.float32)
        mean = tl.zeros((BM, PV), tl.float32)
        for start in range(first, tl.minimum(first + share, filled), BN):
            s = start + n
            ok = s < filled
            slot = (bg * S + s).to(tl.int64)  # in k, v and their positions
            keys = tl.load(k + slot[:, None] * DK + dk[None, :], mask=ok[:, None] & (dk < DK)[None, :], other=0)  # (BN, PK)
            score = tl.dot(queries, tl.trans(keys), input_precision="ieee")  # (BM, BN)
            if D2 > 0:
                at2 = k2 + (b * S + s)[:, None] * D2 + d2[None, :]
                keys2 = tl.load(at2, mask=ok[:, None] & (d2 < D2)[None, :], other=0)  # (BN, P2)
                score += tl.dot(queries2, tl.trans(keys2), input_precision="ieee")
            lies = tl.load(k_pos + (b * pos_heads + g % pos_heads) * S + s, mask=ok, other=-1)  # (BN,)
            see = (lies >= 0)[None, :] & (lies[None, :] <= where[:, None]) & (lies[None, :] > where[:, None] - window)
            score = tl.where(see, score * scale, -1e30)  # scale includes log2(e)
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
        if WHOLE:  # one share is all
            to = out + (((b * T + m % T) * G + g) * h + m // T)[:, None] * DV + dv[None, :]
            tl.store(to, mean.to(out.dtype.element_ty), mask=rows & (dv < DV)[None, :])
        else:
            part = (bg * splits + split) * BM + m
            tl.store(out + part[:, None] * PV + dv[None, :], mean)
            tl.store(stats + part * 2, top)
            tl.store(stats + part * 2 + 1, total)

    @triton.jit
    def combine_kernel(part, stats, out, T, h, G, splits, DV: tl.constexpr, PV: tl.constexpr, BM: tl.constexpr, SPLITS: tl.constexpr):
        """One program: one query row; the shares' means, weighted by their sums."""
        bg, m = tl.program_id(0).to(tl.int64), tl.program_id(1)
        i, d = tl.arange(0, SPLITS), tl.arange(0, PV)
        at = (bg * splits + i) * BM + m
        top = tl.load(stats + at * 2, mask=i < splits, other=-1e30)
        total = tl.load(stats + at * 2 + 1, mask=i < splits, other=0)
        weight = total * tl.exp2(top - tl.max(top, 0))  # (SPLITS,)
        means = tl.load(part + at[:, None] * PV + d[None, :], mask=(i < splits)[:, None], other=0)  # (SPLITS, PV)
        norm = tl.sum(weight, 0)
        o = tl.sum(means * weight[:, None], 0) / tl.where(norm > 0, norm, 1.0)
        to = (((bg // G) * T + m % T) * G + bg % G) * h + m // T
        tl.store(out + to * DV + d, o.to(out.dtype.element_ty), mask=d < DV)

    # -----------------------------------------------------------------------------------------------------------------------------
    # 4) draw

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
    # 5) commit

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
    return max(least, triton.next_power_of_2(n))


class Rope(torch.autograd.Function):
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


def append(data, pos_buffer, length, new, pos, count):
    """The writing half of SlotCache.append for one or two quantities: data and new lists of (B, heads, S or T, width)."""
    B, T = pos.shape
    S = pos_buffer.shape[2]
    (x, x_buf), (y, y_buf) = zip((new * 2)[:2], (data * 2)[:2])  # a single quantity is written twice
    x, y = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, y))
    count = count.contiguous()  # it may be one number, expanded
    heads = [x.shape[1], y.shape[1], pos_buffer.shape[1]]
    append_kernel[(B, min(T, S), max(heads))](x, x_buf, y, y_buf, pos, pos_buffer, length, count, S, T, *x.stride()[:3], *y.stride()[:3],
                                              *pos.stride(), *heads, XW=x.shape[3], XP=power(x.shape[3]), YW=y.shape[3],
                                              YP=power(y.shape[3]))  # fmt: skip


def decode_attention(q, k, v, q_pos, k_pos, length, scale, window=None, k2=None):
    """attend(q, [k ; k2], v, visible(q_pos, k_pos, window), scale) for a few queries, reading only the filled slots.

    q (B, H, T, Dk + D2), k (B, G, S, Dk), v (B, G, S, Dv), possibly k itself; k2 (B, 1, S, D2) or None; q_pos (B, T), k_pos (B, 1 or G,
    S), length (B,) -> (B, H, T, Dv). A query that sees nothing gets 0. Raises ValueError for more than 128 heads in a group.
    """
    (B, H, T, _), (_, G, S, DK), DV = q.shape, k.shape, v.shape[3]
    h, D2 = H // G, 0 if k2 is None else k2.shape[3]
    if h > 128:
        raise ValueError(f"decode_attention takes at most 128 heads per group, not {h}")
    if h * T > 128:  # more rows than one tile: as many queries at a time as fit
        parts = zip(q.split(128 // h, dim=2), q_pos.split(128 // h, dim=1))
        return torch.cat([decode_attention(q_i, k, v, pos_i, k_pos, length, scale, window, k2) for q_i, pos_i in parts], dim=2)
    q = q if q.stride(-1) == 1 else q.contiguous()
    BM, BN = power(h * T, 16), 64 if DK <= 128 else 32
    splits = min(64, triton.cdiv(S, 4 * BN), triton.cdiv(132, B * G))  # enough programs to fill a GPU, not more
    out = torch.empty(B, T, H, DV, dtype=q.dtype, device=q.device)
    part, stats = out, out
    if splits > 1:
        part = torch.empty(B * G, splits, BM, power(DV, 16), dtype=torch.float32, device=q.device)
        stats = torch.empty(B * G, splits, BM, 2, dtype=torch.float32, device=q.device)
    log2_e = 1.4426950408889634
    decode_kernel[(B * G, splits)](q, k, k2 if D2 else k, v, part, stats, q_pos, k_pos, length, scale * log2_e, window or 2**31 - 1, T, h,
                                   S, G, k_pos.shape[1], splits, *q.stride()[:3], *q_pos.stride(), DK=DK, PK=power(DK, 16), D2=D2,
                                   P2=power(D2, 16), DV=DV, PV=power(DV, 16), SHARED=v is k, WHOLE=splits == 1, BM=BM, BN=BN,
                                   num_warps=4)  # fmt: skip
    if splits > 1:
        combine_kernel[(B * G, h * T)](part, stats, out, T, h, G, splits, DV=DV, PV=power(DV, 16), BM=BM, SPLITS=power(splits),
                                       num_warps=1)  # fmt: skip
    return out.transpose(1, 2)


def draw(logits, temperature, noise=None):
    """mtp.law(logits, temperature) and, with noise (..., V) ~ Exp(1), a token drawn from it: logits (..., V) -> (..., V) fp32, (...)."""
    V, logits = logits.shape[-1], logits.contiguous()
    p = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    token = torch.empty(logits.shape[:-1], dtype=torch.long, device=logits.device)
    draw_kernel[(token.numel(),)](logits, noise, p, token, V, 1 / temperature if temperature else 1.0, HOT=temperature == 0,
                                  NOISE=noise is not None, BV=min(power(V), 4096))  # fmt: skip
    return p, token


def commit(p, q, drafts, u, noise, text, logp, known, given, limit, active, counts, reads, stop):
    """Steps 3 and 4 of mtp.Decoder.round in one pass over p and q: -> tokens taken (B,). Writes text, logp, known, active, counts, reads."""
    (B, n, V), take, p, q = p.shape, torch.empty_like(known), p.contiguous(), q.contiguous()
    commit_kernel[(B,)](p, q, drafts, u, noise, text, logp, known, given, limit, active, counts, reads, take, text.shape[1], stop, n - 1, V,
                        counts.shape[2], BV=min(power(V), 4096))  # fmt: skip
    return take
