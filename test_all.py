"""Every claim of the code as a test.

    python test_all.py              all tests; the last line counts them
    python test_all.py -k NAME      those whose name contains NAME
    python -m pytest -q test_all.py the same tests

Identities are checked in fp64 at small sizes, and messages carry the largest and the mean difference. Where a test is subtle, it is also
run on a deliberately wrong implementation (a mutant), which it has to catch.
"""
import ast
import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unittest

import numpy as np
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on the CPU
import kernels
import latent_attention as la
import mtp
import nsa
import train_lm
from latent_attention import GQA, LatentAttention, SlotCache, attend, rope, visible
from nsa import ASA_BLOCK, NSA, SHARE, ASAGlobal
from train_lm import LM, Config

HERE = pathlib.Path(__file__).resolve().parent
KINDS = ("gqa", "nsa", "asa")


def setup_function(fn=None):  # before each test, by pytest and by main
    torch.manual_seed(0)
    torch.set_num_threads(2)


def close(a, b, tol, what):
    diff = (a.double() - b.double()).abs()
    assert a.shape == b.shape and a.numel(), f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    assert diff.max() <= tol, f"{what}: max difference {diff.max():.2e}, mean {diff.mean():.2e}, allowed {tol:.0e}"  # NaN fails


def fails(test, *args):
    """A mutant has to make a test fail."""
    try:
        test(*args)
    except AssertionError:
        return
    raise AssertionError(f"{test.__name__} did not notice a wrong implementation")


@contextlib.contextmanager
def swapped(module, name, wrong):
    """Replace a function of a module by a mutant for a while."""
    right = getattr(module, name)
    setattr(module, name, wrong)
    try:
        yield
    finally:
        setattr(module, name, right)


def tiny(attn, **changes):
    """A config whose block and window edges all lie within 160 tokens."""
    sizes = dict(layers=4, width=32, heads=4, groups=2, window=20, blocks=4, nsa_blocks=4, nsa_block=32, vocab=61, context=160)
    return Config(**{**sizes, "attn": attn, **changes})


def lm(attn, **changes):
    """A tiny model in fp64 whose gates, pools and phis are not at their neutral start."""
    model = LM(tiny(attn, **changes)).double()
    for name, p in model.named_parameters():
        if any(part in name for part in ("pool", "gate.bias", "phi", "place")):
            torch.nn.init.normal_(p, std=0.3)
    return model


def text_of(model, rows, length):
    return torch.randint(model.cfg.vocab, (rows, length))


# ---------------------------------------------------------------------------------------------------------------------------------
# latent_attention.py


def test_rope_is_relative_and_half_split():
    x, y = torch.randn(2, 3, 5, 8).double(), torch.randn(2, 3, 5, 8).double()
    pos = torch.randint(100, (2, 5))
    score = lambda shift: (rope(x, pos + shift) * rope(y, pos * 2 + shift)).sum(-1)
    close(score(0), score(37), 1e-12, "a common shift of the positions")
    pairs = torch.complex(x[..., :4], x[..., 4:])  # channel i with channel i + P/2
    turn = torch.polar(torch.ones(4).double(), torch.ones(4).double() * 7 * 10000.0 ** (-torch.arange(4).double() / 4))
    turned = pairs * turn
    close(rope(x, torch.full((2, 5), 7)), torch.cat([turned.real, turned.imag], -1), 1e-12, "rotation in complex numbers")


class ListCache:
    """SlotCache as plain Python lists, for one head: what the tensors have to agree with."""

    def __init__(self, rows):
        self.rows = [[] for _ in range(rows)]  # (position, value)

    def append(self, values, pos, count):
        for b, row in enumerate(self.rows):
            row += [(int(pos[b, i]), float(values[b, i])) for i in range(int(count[b]))]

    def rollback(self, seen):
        self.rows = [[e for e in row if e[0] < int(s)] for row, s in zip(self.rows, seen)]


def slots_match_lists(window, max_len=64, margin=4):
    draw = random.Random(0)
    cache, lists = SlotCache(3, max_len, ((2, 1), (1, 3)), window=window, margin=margin), ListCache(3)
    seen = torch.zeros(3, dtype=torch.long)
    for _ in range(60):
        T = draw.choice([1, 1, 2, margin, 11, 25])
        count = torch.tensor([draw.randint(0, T) for _ in range(3)]).minimum(max_len - seen)
        pos, value = seen[:, None] + torch.arange(T), torch.randn(3, T)
        shaped = value[:, None, :, None]
        read = cache.append(shaped.expand(-1, 2, -1, 1), shaped.expand(-1, 1, -1, 3), pos=pos, count=count)
        lists.append(value, pos, count)
        for b in range(3):
            for i in range(int(count[b])):  # what every new query sees
                see = visible(pos[b : b + 1, i : i + 1], read[2][b : b + 1], window)[0, 0, 0]
                got = sorted(zip(read[2][b, 0][see].tolist(), read[0][b, 1, :, 0][see].tolist()))
                want = sorted(e for e in lists.rows[b] if e[0] <= pos[b, i] and (window is None or e[0] > pos[b, i] - window))
                assert [p for p, _ in got] == [p for p, _ in want], f"window {window}: row {b} sees {got}, expected {want}"
                assert all(abs(x - y) < 1e-6 for (_, x), (_, y) in zip(got, want)), f"window {window}: values of row {b}"
        seen = seen + count
        back = torch.tensor([draw.randint(0, margin) for _ in range(3)]).minimum(seen) * (draw.random() < 0.5)
        seen = seen - back
        cache.rollback(seen)
        lists.rollback(seen)
        if int(seen.max()) > max_len - 2:
            break
    if window is None:
        assert int(cache.length.max()) == int(seen.max()), "length of a plain cache = tokens seen"
    return cache


def test_slot_cache_equals_lists():
    for window in (None, 3, 10, 30, 64):
        cache = slots_match_lists(window)
        assert cache.pos.shape[2] == (64 if window is None else min(64, window + 3)), "slots = W - 1 + margin"

    def small_ring(self, batch, max_len, widths, window=None, margin=8, **kind):  # a ring of W slots loses what a rejected draft needs
        SlotCache.init(self, batch, max_len, widths, window and max(1, window - margin + 1), margin, **kind)

    SlotCache.init = SlotCache.__init__
    with swapped(SlotCache, "__init__", small_ring):
        fails(slots_match_lists, 10)


def test_slot_cache_keep_gathers_kept_slots():
    cache = SlotCache(2, 10, ((3, 4), (3, 2)))
    k, v, pos = torch.randn(2, 3, 8, 4), torch.randn(2, 3, 8, 2), torch.arange(8).expand(2, -1)
    cache.append(k, v, pos=pos, count=torch.tensor([8, 6]))
    index = torch.tensor([[[0, 3, 7], [1, 2, 5], [4, 5, 6]], [[0, 5, -1], [1, 2, -1], [3, 4, -1]]])  # (B, heads, n): each head its own
    cache.keep(index)
    for b, h in [(b, h) for b in range(2) for h in range(3)]:
        kept = [i for i in index[b, h].tolist() if i >= 0]
        close(cache.data[0][b, h, : len(kept)], k[b, h, kept], 0, "kept keys")
        close(cache.data[1][b, h, : len(kept)], v[b, h, kept], 0, "kept values")
        assert cache.pos[b, h].tolist() == kept + [-1] * (10 - len(kept)), "kept slots carry their original positions, the rest is empty"
    assert cache.length.tolist() == [3, 2]
    cache.append(k[:, :, :1], v[:, :, :1], pos=torch.tensor([[8], [6]]), count=torch.ones(2, dtype=torch.long))
    assert cache.pos[:, 0, :4].tolist() == [[0, 3, 7, 8], [0, 5, 6, -1]], "the next token goes behind the kept ones"


def test_slot_cache_refuses_to_overflow():
    cache = SlotCache(1, 4, ((1, 2),))
    cache.append(torch.zeros(1, 1, 3, 2), pos=torch.arange(3)[None], count=torch.tensor([3]))
    try:
        cache.append(torch.zeros(1, 1, 2, 2), pos=torch.arange(3, 5)[None], count=torch.tensor([2]))
    except RuntimeError:
        return
    raise AssertionError("a full row was overwritten")


def plain_attention(q, k, v, mask, scale):
    """attend, one head at a time."""
    h, out = q.shape[1] // k.shape[1], []
    for i in range(q.shape[1]):
        see = mask[:, min(i // h, mask.shape[1] - 1)]
        out.append((q[:, i] @ k[:, i // h].mT * scale).masked_fill(~see, -torch.inf).softmax(-1) @ v[:, i // h])
    return torch.stack(out, 1)


def test_attend_equals_plain_attention_with_gradients():
    cases = [(3, 2, 8, 8, 2, 2), (40, 2, 12, 8, 2, 2), (40, 2, 8, 16, 1, 1), (40, 1, 8, 8, 2, 1)]
    for T, G, Dk, Dv, B1, G1 in [*cases, (33, 2, 192, 128, 2, 1), (33, 4, 160, 128, 1, 1)]:
        S = T + 5
        q, k, v = (torch.randn(2, h, n, d, dtype=torch.float64, requires_grad=True) for h, n, d in ((4, T, Dk), (G, S, Dk), (G, S, Dv)))
        mask = torch.rand(B1, G1, T, S) < 0.5
        mask[..., 0] = True
        results = []
        for f in (attend, plain_attention):
            o = f(q, k, v, mask, 0.3)
            results.append([o, *torch.autograd.grad((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum(), (q, k, v))])
        for a, b, what in zip(*results, ("output", "dq", "dk", "dv")):
            close(a, b, 1e-11, f"attend, {what}, T {T}, G {G}, widths {Dk}/{Dv}, mask {B1}x{G1}")


def test_window_attention_equals_a_mask_with_gradients():
    for T, W in [(1, 4), (5, 4), (31, 8), (64, 16), (40, 40), (40, 41), (33, 1), (100, 7)]:
        q, k, v = (torch.randn(2, h, T, d, dtype=torch.float64, requires_grad=True) for h, d in ((4, 12), (2, 12), (2, 8)))
        pos, results = torch.arange(T)[None], []
        for o in (la.window_attention(q, k, v, W, 0.3), plain_attention(q, k, v, visible(pos, pos[:, None], W), 0.3)):
            results.append([o, *torch.autograd.grad((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum(), (q, k, v))])
        for a, b, what in zip(*results, ("output", "dq", "dk", "dv")):
            close(a, b, 1e-11, f"window attention, {what}, T {T}, window {W}")


def test_absorbed_equals_materialised():
    for latents, window in ((1, None), (1, 7), (4, None)):  # MLA, MLA in a window, GLA
        layer = LatentAttention(64, 8, 8, latents, 24, 6, window=window).double()
        x, pos = torch.randn(2, 19, 64).double(), torch.arange(19)[None]
        parts, mask = layer.project(x, pos), visible(pos, pos[:, None], window)

        def same():
            close(layer.absorbed(*parts, mask), layer.materialised(*parts), 1e-10, f"{latents} latents, window {window}")

        same()
        scale = layer.scale
        wrong = layer.absorb
        layer.absorb = lambda q_c, q_r: wrong(q_c, q_r) * ((24 + 6) ** -0.5 / scale)  # the scale of the absorbed width: a classic
        fails(same)


def test_cache_bytes_are_the_formula():
    T, B, bf16 = 96, 2, dict(dtype=torch.bfloat16)
    H, G, D, R, P, W, margin = 8, 4, 16, 24, 8, 20, 8
    per_layer = lambda layer: la.cache_bytes([layer.new_cache(B, T, margin, **bf16)]) / (2 * B)
    assert per_layer(GQA(128, H, G, D)) == 2 * G * D * T
    assert per_layer(GQA(128, H, H, D)) == 2 * H * D * T
    assert per_layer(LatentAttention(128, H, D, 1, R, P)) == (R + P) * T
    assert per_layer(LatentAttention(128, H, D, 1, R, P, window=W)) == (R + P) * (W - 1 + margin)
    assert per_layer(LatentAttention(128, H, D, 1, R, P, window=1000)) == (R + P) * T, "a window is never larger than the text"
    assert per_layer(LatentAttention(128, H, D, G, R, P)) == (G * R + P) * T
    layer = NSA(128, H, G, D, window=W, n=4, block=32)
    assert per_layer(layer) == 2 * G * D * (T + (T - 32) // 16 + 1 + W - 1 + margin + 32 - 1 + margin)
    cache = ASAGlobal(128, H, D, G, R, P, n=4).new_cache(B, T, margin, **bf16)
    assert (cache["tokens"].nbytes + cache["blocks"].nbytes) / (2 * B) == (G * R + P) * (T + T // 16)
    assert cache["lists"].nbytes == 4 * B * G * 4 * (margin // SHARE + 2), "the lists' bytes do not depend on T"


def test_asa_halves_the_cache_of_nsa():
    for preset, most in (("base", 0.501), ("340m", 0.501), ("1.3b", 0.501)):
        cfg = Config(**{**train_lm.PRESETS[preset], "preset": preset, "vocab": 257})
        assert cfg.groups * cfg.rank + cfg.rotary == 2 * cfg.groups * cfg.head_width, "the latents are as wide as the keys and values"
        size = train_lm.count_caches(dataclasses.replace(cfg, layers=2))
        assert size["asa"] / size["nsa"] <= most, f"{preset}: {size}"


# ---------------------------------------------------------------------------------------------------------------------------------
# nsa.py


def test_block_importance_is_geometric():
    for l, d, block in ((32, 16, 64), (16, 16, 16), (32, 16, 32), (8, 4, 16), (64, 16, 64)):
        tokens = 256
        N = int(nsa.blocks_done(tokens, l, d))
        got = nsa.block_importance(torch.eye(N)[None, None], 1, l, d, block, tokens)[0, 0]  # (N, blocks): one-hot weights

        def geometric(got):
            for i, j in [(i, j) for i in range(N) for j in range(got.shape[1])]:
                # strides [i d + a d, + d) of compressed block i that lie inside selection block j
                shared = sum(block * j <= i * d + a * d < block * (j + 1) for a in range(l // d))
                assert got[i, j] == shared, f"l {l}, d {d}, l' {block}: block {i} counts {got[i, j]} for {j}, shares {shared} strides"

        geometric(got)
        if (l, d, block) == (32, 16, 64):
            assert got[:, 1].tolist()[3:8] == [1, 2, 2, 2, 1], "the weights of NSA's own sizes"
            i, j = torch.arange(N)[:, None], torch.arange(tokens // block)
            literal = sum((i == 4 * j - m - n) for m in range(4) for n in range(2)).float()  # eq. 9 read 0-based as printed
            fails(geometric, literal)


def test_select_blocks_equals_a_loop():
    for block, n in ((16, 4), (32, 3), (16, 8), (16, 50)):
        T = 150
        score = torch.rand(2, 3, T, -(-T // block))
        lists = nsa.select_blocks(score, torch.arange(T)[None], block, n)
        for b, g, t in [(b, g, t) for b in range(2) for g in range(3) for t in range(0, T, 7)]:
            own = t // block
            forced = {0, own, max(0, own - 1)}
            others = sorted(set(range(own + 1)) - forced, key=lambda j: -score[b, g, t, j])
            want = forced | set(others[: n - len(forced)])
            got = lists[b, g, t].tolist()
            valid = [j for j in got if j >= 0]
            assert got == valid + [-1] * (len(got) - len(valid)), "valid blocks first, then -1"
            assert len(set(valid)) == len(valid) == min(n, own + 1), f"block {block}, n {n}, t {t}: {valid} are unique, min(n, own + 1)"
            assert set(valid) == want, f"block {block}, n {n}, t {t}: {valid} instead of {want}"


def test_lists_are_shared_by_the_first_of_four():
    lists, T = torch.randint(9, (2, 3, 22, 5)), 22
    shared = nsa.share_lists(lists, torch.arange(T)[None])
    for t in range(T):
        assert torch.equal(shared[:, :, t], lists[:, :, t // SHARE * SHARE]), f"query {t}"
    repeated = lists[:, :, ::SHARE].repeat_interleave(SHARE, 2)[:, :, :T]
    assert torch.equal(nsa.share_lists(repeated, torch.arange(T)[None]), repeated), "shared = own when neighbours agree"


def nsa_by_loops(layer, x):
    """NSA for one text, query by query and head by head, from the paper's equations with its tokens and blocks counted from 1."""
    T, H, G, D, l, d, block = x.shape[0], layer.heads, layer.groups, layer.head_width, layer.l, layer.d, layer.block
    pos = torch.arange(T)[None]
    q0 = layer.q(x).view(T, H, D)
    kv = layer.kv(x).view(T, 6, G, D)
    turn = lambda a, p: rope(a[None], torch.as_tensor(p, dtype=torch.float64).view(1, -1), layer.base)[0]  # (heads, T, D)
    gates = layer.gate(x).sigmoid().view(T, 3, H)
    out = torch.zeros(T, H, D).double()
    for t in range(1, T + 1):
        for g in range(G):
            q = turn(q0[t - 1 : t, g * H // G : (g + 1) * H // G].transpose(0, 1), [t - 1.0])[:, 0]  # (h, D)
            n_cmp = (t - l) // d + 1 if t >= l else 0
            k_cmp, v_cmp = [], []
            for i in range(n_cmp):  # eq. 7: tokens i d + 1 .. i d + l
                k_cmp.append(turn(layer.phi_k(kv[i * d : i * d + l, 0, g]).view(1, 1, D), [i * d + (l - 1) / 2])[0, 0])
                v_cmp.append(layer.phi_v(kv[i * d : i * d + l, 1, g]))
            p = torch.zeros(q.shape[0], 0).double()
            if n_cmp:
                p = (q @ torch.stack(k_cmp).T / math.sqrt(D)).softmax(-1)  # eq. 8
                out[t - 1, g * H // G : (g + 1) * H // G] += gates[t - 1, 0, g * H // G : (g + 1) * H // G, None] * (p @ torch.stack(v_cmp))
            own, score = (t - 1) // block + 1, {}
            for j in range(1, own + 1):  # eq. 9 as printed, j and the compressed index counted from 1
                ids = [block // d * j - m - n for m in range(block // d) for n in range(l // d)]
                score[j] = sum(p[:, i - 1].sum().item() for i in ids if 1 <= i <= n_cmp)  # eq. 10
            forced = {1, own, max(1, own - 1)}
            rest = sorted(set(score) - forced, key=lambda j: -score[j])[: layer.n - len(forced)]
            for branch, keys in ((1, [s for j in sorted(forced | set(rest)) for s in range((j - 1) * block + 1, min(j * block, t) + 1)]),
                                 (2, range(max(1, t - layer.window + 1), t + 1))):
                keys = torch.tensor(list(keys)) - 1
                k = turn(kv[keys, 2 * branch, g][None], keys.double())[0]
                w = (q @ k.T / math.sqrt(D)).softmax(-1)
                mixed = gates[t - 1, branch, g * H // G : (g + 1) * H // G, None] * (w @ kv[keys, 2 * branch + 1, g])
                out[t - 1, g * H // G : (g + 1) * H // G] += mixed
    return layer.out(out.view(T, H * D))


def asa_by_loops(layer, x):
    """ASA's global layer for one text, query by query, on un-rotated keys as the definition has it; keys and values made per head."""
    T, H, G, R, P = x.shape[0], layer.heads, layer.latents, layer.rank, layer.rotary
    q_c, _, c, _ = layer.project(x[None], torch.arange(T)[None])
    q_r = layer.q_up(layer.q_norm(layer.q_down(x))).view(T, H, -1)[..., -P:]
    r = layer.kv_down(x)[:, G * R :]  # (T, P) un-rotated
    turn = lambda a, p: rope(a.view(1, 1, -1, P), torch.as_tensor(p, dtype=torch.float64).view(1, -1), layer.base)[0, 0]
    gates, D = layer.gate(x).sigmoid().view(T, 2, H), q_c.shape[-1]
    out = torch.zeros(T, H, D).double()

    def attention(t, i, latent, key_r, at):  # one query, one head
        k = torch.cat([latent @ layer.k_up[i].T, turn(key_r, at)], -1)
        q = torch.cat([q_c[0, i, t], turn(q_r[t, i], [float(t)])[0]])
        w = (k @ q / math.sqrt(D + P)).softmax(-1)
        return w, w @ (latent @ layer.v_up[i].T)

    for g in range(G):
        heads, chosen = range(g * H // G, (g + 1) * H // G), None
        weight = layer.pool[g].softmax(-1)
        for t in range(T):
            done = [b for b in range(T // 16) if 16 * b + 15 <= t]
            c_b = [(weight[:, None] * c[0, g, 16 * b : 16 * b + 16]).sum(0) for b in done]
            r_b = [r[16 * b : 16 * b + 16].mean(0) for b in done]
            score = dict.fromkeys(range(t // 16 + 1), 0.0)
            for i in heads if done else ():
                w, o = attention(t, i, torch.stack(c_b), torch.stack(r_b), [16 * b + 7.5 for b in done])
                out[t, i] += gates[t, 0, i] * o
                for b in done:
                    score[b] += w[b].item()
            if t % SHARE == 0:
                forced = {0, t // 16, max(0, t // 16 - 1)}
                chosen = forced | set(sorted(set(score) - forced, key=lambda b: -score[b])[: layer.n - len(forced)])
            keys = [s for s in range(t + 1) if s // 16 in chosen]
            for i in heads:
                out[t, i] += gates[t, 1, i] * attention(t, i, c[0, g, keys], r[keys], [float(s) for s in keys])[1]
    return layer.out(out.view(T, H * D))


@torch.no_grad()
def test_layers_equal_their_definition_in_loops():
    x = torch.randn(2, 150, 32).double()
    pos = torch.arange(150)[None]
    layer = lm("nsa", layers=1).blocks[0].attn
    assert isinstance(layer, NSA)
    close(layer(x[:1], pos)[0], nsa_by_loops(layer, x[0]), 1e-12, "NSA in loops")
    layer = lm("asa", layers=2).blocks[1].attn
    assert isinstance(layer, ASAGlobal)
    close(layer(x[:1], pos)[0], asa_by_loops(layer, x[0]), 1e-12, "ASA's global layer in loops")


@torch.no_grad()
def test_everything_selected_is_dense_attention():
    x, pos = torch.randn(2, 131, 32).double(), torch.arange(131)[None]
    layer = lm("nsa", layers=1, nsa_blocks=99).blocks[0].attn
    layer.gate.weight.zero_()
    layer.gate.bias.copy_(torch.tensor([-99.0, 99.0, -99.0]).repeat_interleave(4))  # only the selected branch
    dense = GQA(32, 4, 2, 8).double()
    dense.q, dense.out = layer.q, layer.out
    kv = layer.kv.weight.view(6, 2 * 8, 32)
    dense.k.weight.copy_(kv[2])
    dense.v.weight.copy_(kv[3])
    close(layer(x, pos), dense(x, pos), 1e-12, "NSA, all blocks selected")
    layer = lm("asa", layers=2, blocks=99).blocks[1].attn
    layer.gate.weight.zero_()
    layer.gate.bias.copy_(torch.tensor([-99.0, 99.0]).repeat_interleave(4))
    close(layer(x, pos), LatentAttention.forward(layer, x, pos), 1e-12, "ASA global, all blocks selected, against GLA")


@torch.no_grad()
def test_window():
    x, pos = torch.randn(1, 60, 32).double(), torch.arange(60)[None]
    full, local = LatentAttention(32, 4, 8, 1, 32, 4).double(), LatentAttention(32, 4, 8, 1, 32, 4, window=60).double()
    local.load_state_dict(full.state_dict())
    close(local(x, pos), full(x, pos), 1e-14, "window >= T is full attention")
    local.window = 13
    before, t = local(x, pos), 40
    for back, reaches in ((12, True), (13, False)):  # the window holds t-12 .. t
        other = x.clone()
        other[:, t - back] += 1
        moved = (local(other, pos)[:, t] - before[:, t]).abs().max() > 0
        assert moved == reaches, f"window 13: a change {back} tokens back {'reaches' if moved else 'does not reach'} the query"


def compressed_rotation():
    layer = ASAGlobal(32, 4, 8, 2, 14, 8, n=4).double()
    c, r = torch.randn(1, 2, 3, 16, 14).double(), torch.randn(1, 1, 3, 1, 8).double().expand(-1, -1, -1, 16, -1)  # r constant in a block
    keys = lambda shift: rope(r.reshape(1, 1, 48, 8), shift + torch.arange(48)[None]).view(1, 1, 3, 16, 8)
    small = layer.compress(c, keys(0))[1]
    close(small.norm(dim=-1), r[..., 0, :].norm(dim=-1), 1e-12, "the length of a compressed rotary key over a constant block")
    close(small, rope(r[..., 0, :], torch.tensor([[7.5, 23.5, 39.5]])), 1e-12, "a compressed rotary key stands at its block's middle")
    q = torch.randn(1, 1, 1, 8).double()
    score = lambda shift: (rope(q, torch.tensor([[60 + shift]])) * layer.compress(c, keys(shift))[1]).sum(-1)
    close(score(0), score(160), 1e-11, "scores after a shift of all positions")


def test_rotation_and_pooling():
    compressed_rotation()
    with swapped(ASAGlobal, "compress", lambda self, c, k_r, end=None: (c.mean(-2), k_r.mean(-2))):  # pooling after rotation
        fails(compressed_rotation)


@torch.no_grad()
def causal(attn):
    model = lm(attn)
    T = 100
    text = text_of(model, 1, T)
    before = model(text)
    for t in sorted({e + i for e in (16, 20, 32, 48, 64, 80, 96) for i in (-1, 0, 1)}):
        other = text.clone()
        other[0, t] = (other[0, t] + 1) % model.cfg.vocab
        after = model(other)
        assert torch.equal(before[:, :t], after[:, :t]), f"{attn}: a change at token {t} reached an earlier output"
        assert not torch.equal(before[:, t], after[:, t]), f"{attn}: a change at token {t} did not reach its own output"


def test_causality_is_bit_exact():
    for attn in KINDS:
        causal(attn)
    see = lambda q_pos, k_pos, window=None: visible(q_pos + 1, k_pos, window)
    shared_by_last = lambda lists, pos, earlier=None: lists.gather(  # the list of the last of the four
        2, (torch.arange(pos.shape[1]) // 4 * 4 + 3).clamp(max=pos.shape[1] - 1)[None, None, :, None].expand_as(lists))
    for attn, name, wrong in (("nsa", "visible", see), ("asa", "visible", see), ("asa", "share_lists", shared_by_last)):
        with swapped(nsa, name, wrong):
            fails(causal, attn)


def test_first_tokens_are_finite():
    for attn in KINDS:
        model = lm(attn)
        for T in (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49):
            model.zero_grad()
            logits = model(text_of(model, 2, T))
            logits.square().sum().backward()
            assert logits.isfinite().all(), f"{attn}, {T} tokens: logits"
            bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            assert not bad, f"{attn}, {T} tokens: gradients of {bad}"
    for N in (0, 3):
        q, k, v = torch.randn(1, 4, 5, 8, requires_grad=True), torch.randn(1, 2, N, 8), torch.randn(1, 2, N, 6)
        see = torch.zeros(1, 1, 5, N, dtype=torch.bool)
        o, p = nsa.compressed_attention(q, k, v, see, 1.0)
        assert (o == 0).all() and (p == 0).all(), "no finished block: exactly 0"
        assert torch.autograd.grad(o.sum(), q)[0].isfinite().all()


def test_block_scores_learn_through_the_compressed_branch():
    x, pos = torch.randn(1, 100, 32).double(), torch.arange(100)[None]
    for attn, names in (("nsa", ("phi_k.up.weight", "phi_v.down.weight", "kv.weight", "q.weight")),
                        ("asa", ("pool", "k_up", "kv_down.weight", "q_up.weight"))):
        layer = lm(attn, layers=2).blocks[1].attn
        with torch.no_grad():
            layer.gate.weight.zero_()
            layer.gate.bias.copy_(torch.tensor([0.0, -99, -99][: layer.gate.bias.numel() // 4]).repeat_interleave(4))
        layer(x, pos).square().sum().backward()
        for name in names:
            gradient = dict(layer.named_parameters())[name].grad
            assert gradient.abs().max() > 1e-8, f"{attn}: {name} gets no gradient from the compressed branch"


def test_nsa_branches_have_keys_and_values_of_their_own():
    C, H, G, D, l = 64, 4, 2, 16, 32
    layer = NSA(C, H, G, D, window=20, n=4, block=32)
    want = C * H * D * 2 + 3 * 2 * C * G * D + 3 * H * (C + 1) + 2 * (l * D + l * D * D + D * D)
    assert sum(p.numel() for p in layer.parameters()) == want, "parameters of NSA = formula with three independent k, v"


# ---------------------------------------------------------------------------------------------------------------------------------
# kernels.py: on a CPU in Triton's interpreter, fp32; on a GPU compiled

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@contextlib.contextmanager
def kernels_in_use(yes=True):
    """Let the attention files use the kernels wherever Triton can run them, in the interpreter too, or nowhere."""
    if kernels.triton is None:
        raise unittest.SkipTest("needs Triton")
    def able(x, k=None, v=None, block=16):
        return yes and x.dtype != torch.float64 and (k is None or not kernels.complaint(x, k, v, None, block))

    with swapped(kernels, "fast", able):
        yield


class Sizes:
    """One attention problem: queries, and keys [k ; k2] and values (v is k: latents) of tokens and of compressed blocks."""

    def __init__(self, T, h, G, D, Dv=None, P=0, l=32, d=16, block=64, n=4, W=20, every=1, B=1, dtype=torch.float32):
        self.T, self.l, self.d, self.block, self.n, self.W, self.every, self.G, self.scale = T, l, d, block, n, W, every, G, (D + P) ** -0.5
        new = lambda heads, S, width: torch.randn(B, heads, S, width, dtype=dtype, device=DEVICE, requires_grad=True)
        keys = lambda S: (k := new(G, S, D), new(1, S, P) if P else None, new(G, S, Dv) if Dv else k)
        self.q, self.tokens, self.entries = new(h * G, T, D + P), keys(T), keys(int(nsa.blocks_done(T, l, d)))
        self.pos = torch.arange(T, device=DEVICE)[None]
        self.end = (torch.arange(self.entries[0].shape[2], device=DEVICE) * d + l - 1)[None, None]
        lists = nsa.select_blocks(torch.rand(B, G, T, -(-T // block), device=DEVICE), self.pos, block, n)
        lists = lists[:, :, ::every].masked_fill(lists[:, :, ::every] < 0, 2**20).sort(-1)[0]  # ascending, (B, G, ceil(T / every), n)
        self.lists = lists.masked_fill(lists == 2**20, -1)
        self.name = f"T {T}, {h} x {G} heads, widths {D}/{P}/{Dv}, blocks {l}/{d}/{block}"

    def leaves(self, kv):
        k, k2, v = kv
        return [x for x in (self.q, k, k2, None if v is k else v) if x is not None]

    def masks(self):
        """What each branch may read (1, 1 or G, T, S), for the reference."""
        lists = self.lists.repeat_interleave(self.every, 2)[:, :, : self.T]
        tokens = self.pos[:, None]
        return {"window": visible(self.pos, tokens, self.W), "compressed": visible(self.pos, self.end),
                "selected": nsa.chosen_tokens(lists, tokens, self.block, visible(self.pos, tokens))}  # fmt: skip

    def fast(self, branch):
        k, k2, v = self.entries if branch == "compressed" else self.tokens
        if branch == "window":
            return kernels.window_attention(self.q, k, v, self.W, self.scale, k2)
        if branch == "compressed":
            return kernels.compressed_attention(self.q, k, v, self.l, self.d, self.scale, k2)[0]
        return kernels.selected_attention(self.q, k, v, self.lists, self.block, self.scale, k2, self.every)

    def plain(self, branch, dtype):
        """The same by attend, with copies of the leaves in another dtype -> (o, leaves)."""
        kv = self.entries if branch == "compressed" else self.tokens
        copies = [x.detach().to(dtype).requires_grad_() for x in self.leaves(kv)]
        q, k = copies[:2]
        k2, v = copies[2] if kv[1] is not None else None, k if kv[2] is kv[0] else copies[-1]
        mask = self.masks()[branch]
        none = ~mask.any(-1, keepdim=True)  # queries before the first block: exactly 0
        o = attend(q, la.join(k, k2), v, mask | none, self.scale)
        return o.masked_fill(none.expand(-1, q.shape[1] if none.shape[1] == 1 else none.shape[1], -1, -1)
                             if none.shape[1] == 1 else none.repeat_interleave(q.shape[1] // self.G, 1), 0), copies  # fmt: skip


def with_gradients(o, leaves, weight=None):
    weight = torch.linspace(-1, 1, o.numel(), device=o.device).view_as(o) if weight is None else weight
    return [o, *torch.autograd.grad((o * weight.to(o.dtype)).sum(), leaves)]


def off(a, b):
    """|a - b| / |b|."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def kernels_equal_attend(s, branch):
    kv = s.entries if branch == "compressed" else s.tokens
    ours, want = with_gradients(s.fast(branch), s.leaves(kv)), with_gradients(*s.plain(branch, torch.float64))
    for what, a, b in zip(("output", "dq", "dk", "dk2" if kv[1] is not None else "dv", "dv"), ours, want):
        assert off(a, b) < 1e-5, f"{branch} attention, {s.name}: {what} is off by {off(a, b):.1e}"


def test_attention_kernels_equal_attend_with_gradients():
    with kernels_in_use():
        for T, h, G, D, Dv, more in [
            (31, 1, 2, 16, 16, {}), (31, 2, 1, 24, 16, {}), (31, 3, 1, 16, 48, dict(P=8)), (50, 16, 1, 16, 16, {}), (31, 5, 1, 96, 64, {}),
            (31, 8, 1, 192, 128, {}), (31, 4, 1, 64, 64, dict(n=3, W=33)), (31, 12, 1, 16, 16, {}), (31, 1, 1, 128, 128, dict(B=2)),
            (100, 2, 1, 16, 16, dict(l=16, d=8, block=32, n=3)), (31, 1, 2, 64, 64, dict(P=32, W=7)),  # NSA, MLA
            (257, 4, 1, 24, None, dict(P=8, l=16, block=16, every=4)), (50, 16, 2, 30, None, dict(P=16, l=16, block=16, every=4)),  # ASA
        ]:  # fmt: skip
            s = Sizes(T, h, G, D, Dv, **{**more, "block": more.get("block", 32)})
            for branch in ("window", "selected") + ("compressed",) * (s.entries[0].shape[2] > 0):
                kernels_equal_attend(s, branch)
        s = Sizes(31, 2, 2, 16, 16)
        assert (s.fast("compressed") == 0).all(), "before the first block: exactly 0"
        k, _, v = s.tokens
        late = lambda q, k, v, W, scale, k2=None: kernels.attend("late", q, k, v, None, scale, k2, window=W + 1)[0]
        with swapped(kernels, "window_attention", late):
            fails(kernels_equal_attend, s, "window")


def test_selection_kernels_equal_the_reference():
    with kernels_in_use():
        for T, h, G, more in [(100, 2, 1, dict(n=3, block=32)), (257, 4, 1, dict(n=4, every=4, l=16, block=16)),
                              (31, 3, 2, dict(n=9, block=16, l=16)), (70, 1, 1, dict(n=3, l=32, d=8, block=32))]:  # fmt: skip
            s = Sizes(T, h, G, 16, None, P=8, **more)
            k, k2, v = s.entries
            _, lse = kernels.compressed_attention(s.q, k, v, s.l, s.d, s.scale, k2)
            lists = kernels.select(s.q, k, lse, s.l, s.d, s.block, s.n, s.scale, k2, s.every).long()
            p = nsa.compressed_attention(s.q, la.join(k, k2), v, visible(s.pos, s.end), s.scale)[1]
            score = nsa.block_importance(p, s.G, s.l, s.d, s.block, T)
            want = nsa.select_blocks(score, s.pos, s.block, s.n)[:, :, :: s.every]
            value = lambda x: torch.where(x >= 0, score[:, :, :: s.every].gather(-1, x.clamp(min=0)), 0).sum(-1)
            close(value(lists), value(want), 1e-5, f"{s.name}: score of the chosen blocks")  # near ties may be decided otherwise
            assert torch.equal((lists >= 0).sum(-1), (want >= 0).sum(-1)) and torch.equal(lists[..., 0], want[..., 0] * 0)
            valid = lists.masked_fill(lists < 0, 2**20)
            assert ((valid.diff(dim=-1) > 0) | (valid[..., 1:] == 2**20)).all(), "ascending, each block once, then -1"
            own = s.pos[:, None, :: s.every, None] // s.block
            for forced in (0, own - 1, own):
                assert (lists == torch.as_tensor(forced).clamp(min=0)).any(-1).all(), f"{s.name}: a forced block is missing"


def test_layers_on_kernels_equal_the_reference():
    pos = torch.arange(50, device=DEVICE)[None]
    for attn, depth in (("nsa", 0), ("asa", 0), ("asa", 1)):
        layer, x = lm(attn).to(DEVICE).float().blocks[depth].attn, torch.randn(1, 50, 32, device=DEVICE)
        names, leaves = zip(*layer.named_parameters())
        results = []
        for use in (True, False):
            with kernels_in_use(use):
                results.append(with_gradients(layer(x, pos), leaves))
        for name, a, b in zip(("output", *names), *results):
            assert off(a, b) < 1e-5, f"{attn}, layer {depth}: {name} is off by {off(a, b):.1e}"


def test_kernels_refuse_what_they_cannot_do():
    with kernels_in_use():
        q = lambda heads, width=16, **kind: torch.randn(1, heads, 8, width, device=DEVICE, **kind)
        for what, args in {"1 to 64 heads": (q(130), q(1), q(1)), "at most 256": (q(2, 320), q(2, 320), q(2, 64)),
                           "one dtype": (q(2), q(2, dtype=torch.float16), q(2))}.items():  # fmt: skip
            try:
                kernels.window_attention(*args, 4, 1.0)
            except ValueError as e:
                assert what in str(e) and "\n" not in str(e)
            else:
                raise AssertionError(f"not refused: {what}")
            assert not kernels.fast(*args), "what is refused is left to the reference"


def test_kernels_compiled_in_bf16():
    """Against fp64, beside SDPA in bf16 on the same data; two runs have the same bits."""
    if not CUDA:
        raise unittest.SkipTest("needs CUDA")
    asa = dict(l=16, block=16, n=12, every=4, dtype=torch.bfloat16)
    for sizes in [(1000, 16, 4, 128, 128, {}), (1000, 4, 4, 64, 64, {}), (257, 1, 2, 64, 64, {}), (257, 3, 1, 96, 96, {}),
                  (257, 16, 1, 192, 128, {}), (257, 1, 8, 64, 64, dict(P=32)), (1000, 4, 4, 120, None, dict(P=32, **asa)),
                  (1000, 16, 2, 240, None, dict(P=64, **asa))]:  # fmt: skip
        s = Sizes(*sizes[:5], **{"W": 200, "dtype": torch.bfloat16, **sizes[5]})
        for branch in ("window", "compressed", "selected"):
            leaves = s.leaves(s.entries if branch == "compressed" else s.tokens)
            grad = torch.randn(*s.q.shape[:3], leaves[1 if sizes[4] is None else -1].shape[3], device="cuda")
            one, two = (with_gradients(s.fast(branch), leaves, grad) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(one, two)), f"{branch}, {s.name}: two runs differ"
            exact, sdpa = (with_gradients(*s.plain(branch, dtype), grad) for dtype in (torch.float64, torch.bfloat16))
            for i, (a, b, c) in enumerate(zip(one, sdpa, exact)):
                ours, theirs = off(a, c), off(b, c)
                assert ours < 1.5 * theirs + 1e-4, f"{branch}, {s.name}: result {i} is off by {ours:.1e}, SDPA by {theirs:.1e}"


def test_kernels_address_more_than_2_to_31_elements():
    """A group of heads gives the same bits alone as behind 2^31 elements of other heads."""
    if not CUDA:
        raise unittest.SkipTest("needs CUDA")
    T, h, G, D = 131072 + 64, 16, 5, 256
    new = lambda heads, S: torch.randn(1, heads, S, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v, N = new(h * G, T), new(G, T), new(G, T), (T - 32) // 16 + 1
    assert q.numel() > 2**31
    k_c, v_c, weight, results = new(G, N), new(G, N), torch.randn(1, 1, T, 1, device="cuda", dtype=torch.bfloat16), []
    for only in (False, True):
        pick = lambda x, heads: x.detach()[:, -heads:].contiguous().requires_grad_() if only else x
        leaves = q_, k_, v_, kc_, vc_ = pick(q, h), pick(k, 1), pick(v, 1), pick(k_c, 1), pick(v_c, 1)
        o, lse = kernels.compressed_attention(q_, kc_, vc_, 32, 16, D**-0.5)
        lists = kernels.select(q_, kc_, lse, 32, 16, 64, 16, D**-0.5)
        o = o + kernels.selected_attention(q_, k_, v_, lists, 64, D**-0.5) + kernels.window_attention(q_, k_, v_, 512, D**-0.5)
        grads = torch.autograd.grad(o, leaves, weight.expand_as(o).contiguous())
        results.append([x[:, -heads:].clone() for x, heads in zip((o, lists, *grads), (h, 1, h, 1, 1, 1, 1))])
        del o, lse, lists, grads
    for what, a, b in zip(("output", "lists", "dq", "dk", "dv", "dk of blocks", "dv of blocks"), *results):
        same = off(a, b) < 5e-3 if "blocks" in what else torch.equal(a, b)  # few blocks are split over more programs when alone
        assert same, f"{what}: the last group alone differs by {off(a, b):.1e}"


@torch.no_grad()
def test_decoding_kernels_equal_the_reference():
    T, plan = 80, (66, [1, 3], [3, 0], 1)  # a prompt (longer than these kernels take), then a few tokens per row, ragged
    for attn in KINDS:
        model = lm(attn, layers=2).float().to(DEVICE)
        text, results = text_of(model, 2, T).to(DEVICE), []
        for use in (True, False):
            with kernels_in_use(use):
                cache, out = model.new_cache(2, T), []
                for count in plan:
                    count = torch.as_tensor(count, device=DEVICE).expand(2)
                    pos = cache.seen[:, None] + torch.arange(int(count.max()), device=DEVICE)
                    logits = model(text.gather(1, pos), cache, count)
                    real = torch.arange(pos.shape[1], device=DEVICE) < count[:, None]
                    out.append(logits[real])
                    cache.rollback(cache.seen - (count > 2).long())  # a rejected draft
                parts = [part.data[0] for layer in cache.layers for name, part in layer.items() if name != "lists"]
                results.append([torch.cat(out), *parts])
        for a, b in zip(*results):
            close(a, b, 2e-4, f"{attn}: kernels against the reference, logits and caches")


def test_decode_attention_splits_and_lists():
    with kernels_in_use():
        B, H, G, T, S, D = 2, 6, 2, 3, 600, 16
        q, k, v = (torch.randn(B, h, n, w, device=DEVICE) for h, n, w in ((H, T, D + 8), (G, S, D), (G, S, 24)))
        k2, length = torch.randn(B, 1, S, 8, device=DEVICE), torch.tensor([600, 333], device=DEVICE)
        k_pos = torch.arange(S, device=DEVICE).expand(B, G, S).masked_fill(torch.arange(S, device=DEVICE) >= length[:, None, None], -1)
        pos = length[:, None] - T + torch.arange(T, device=DEVICE)
        for window in (None, 70):
            for shared in (False, True):
                want = attend(q, la.join(k, k2), k if shared else v, visible(pos, k_pos, window), 0.3)
                got = kernels.decode_attention(q, k, k if shared else v, pos, k_pos, length, 0.3, window, k2)
                close(got, want, 1e-5, f"decode_attention, window {window}, values = keys: {shared}")
        lists = nsa.select_blocks(torch.rand(B, G, T, 38, device=DEVICE), pos, 16, 20)
        with kernels_in_use(False):
            want = nsa.selected_attention(q, k, v, lists, pos, k_pos, 16, 0.3, k2)
        close(kernels.decode_attention(q, k, v, pos, k_pos, length, 0.3, k2=k2, lists=lists, block=16), want, 1e-5, "slots of a list")


def test_draws_and_commits_on_kernels_equal_mtp():
    B, g, V, K, width = 9, 3, 37, 4, 20
    to = lambda x: x.to(DEVICE)
    with kernels_in_use():
        for temperature in (0, 0.7, 1.0):
            logits, noise = to(torch.randn(B, 2, V) * 3), to(torch.empty(B, 2, V).exponential_())
            p, token = kernels.draw(logits, temperature, noise)
            close(p, mtp.law(logits, temperature), 1e-6, f"law at temperature {temperature}")
            assert torch.equal(token, (mtp.law(logits, temperature) / noise).argmax(-1)), f"tokens at temperature {temperature}"
        for case in range(6):
            p, q = (to((torch.randn(B, n, V) * 2).softmax(-1)) for n in (g + 1, g))
            known, active = to(torch.randint(2, 9, (B,))), to(torch.rand(B) < 0.8)
            given, limit = known + to(torch.randint(-2, 3, (B,))), known + to(torch.randint(1, 8, (B,)))
            drafts, u, noise = to(torch.randint(V, (B, g))), to(torch.rand(B, g)), to(torch.empty(B, V).exponential_())
            state = [to(torch.randint(V, (B, width))), to(torch.zeros(B, width)), known, given, limit, active, to(torch.zeros(B, 4, K))]
            place = known[:, None] + torch.arange(g, device=DEVICE)
            drafts = torch.where(place < given[:, None], state[0].gather(1, place), drafts)  # a prompt is a draft that is right
            both = []
            for f in (kernels.commit, mtp.commit):
                mine = [x.clone() for x in state]
                both.append([f(p, q, drafts, u, noise, *mine, stop=case), *mine])
            for what, a, b in zip("taken text logp known given limit active counts".split(), *both):
                close(a, b, 1e-5, f"commit, case {case}: {what}")


# ---------------------------------------------------------------------------------------------------------------------------------
# decoding


def decode(model, text, plan, margin=8):
    """Feed text (B, T) in calls of plan's sizes: ints, or (B,) counts for ragged rows; -> logits (B, T, V) as they came."""
    B, T = text.shape
    cache, out = model.new_cache(B, T, margin, dtype=torch.float64), torch.full((B, T, model.cfg.vocab), torch.nan).double()
    for count in plan:
        count = torch.as_tensor(count).expand(B)
        n = max(1, int(count.max()))
        pos = cache.seen[:, None] + torch.arange(n)
        logits = model(text.gather(1, pos.clamp(max=T - 1)), cache, count)
        for b in range(B):
            out[b, cache.seen[b] - count[b] : cache.seen[b]] = logits[b, : count[b]]
    return out


@torch.no_grad()
def decoding_equals_forward(attn, plans=None, T=110):
    model = lm(attn)
    text = text_of(model, 3, T)
    full = model(text)
    draw = random.Random(1)
    ragged, left = [], [T] * 3
    while any(left):
        n = draw.choice([1, 2, 5, 8, 30])
        count = [min(rest, draw.randint(0, n)) for rest in left]
        left = [rest - c for rest, c in zip(left, count)]
        ragged.append(count)
    edges = (15, 16, 17, 20, 31, 32, 33, 47, 48, 49, 63, 64, 65)
    if plans is None:
        plans = {"1 token": [1] * T, "5 tokens": [5] * (T // 5), "all": [T], "ragged rows": ragged}
        plans.update({f"prompt of {p}, then 1": [p] + [1] * 6 + [T - p - 6] for p in edges})
    for what, plan in plans.items():
        close(decode(model, text, plan), full, 1e-12, f"{attn}, {what}")


def test_decoding_equals_forward():
    for attn in KINDS:
        decoding_equals_forward(attn)
    one = {"1 token": [1] * 110}
    with swapped(nsa.ASAGlobal, "cached_lists", lambda self, lists, pos, count, cache: lists):  # a fresh list at every step
        fails(decoding_equals_forward, "asa", one)
    with swapped(nsa, "find", lambda k_pos, want: (want - 1).clamp(0, k_pos.shape[1] - 1)):  # blocks made one token too early
        fails(decoding_equals_forward, "nsa", one)


@torch.no_grad()
def rollback_equals_forward(attn, T=100):
    model, draw = lm(attn), random.Random(2)
    text, wrong = text_of(model, 3, T + 8), text_of(model, 3, T + 8)
    full = model(text[:, :T])
    cache = model.new_cache(3, T + 8, dtype=torch.float64)
    model(text[:, :7], cache, torch.tensor([7, 3, 5]))
    while int(cache.seen.min()) < T:  # a draft of wrong tokens is read, part of it taken back; then right ones
        before = cache.seen.clone()
        pos = before[:, None] + torch.arange(8)
        keep = torch.tensor([draw.randint(0, 3) for _ in range(3)]).minimum((T - before).clamp(min=0))
        tokens = torch.where(torch.arange(8) < keep[:, None], text.gather(1, pos.clamp(max=T + 7)), wrong.gather(1, pos.clamp(max=T + 7)))
        logits = model(tokens, cache, (T + 8 - before).clamp(max=8))
        for b in [b for b in range(3) if keep[b]]:
            got, want = logits[b, : keep[b]], full[b, before[b] : before[b] + keep[b]]
            close(got, want, 1e-12, f"{attn}: row {b} at {int(before[b])} after rejected drafts")
        cache.rollback(before + keep)


def test_rejected_drafts_leave_no_trace():
    for attn in KINDS:
        rollback_equals_forward(attn)
    with swapped(train_lm.Cache, "rollback", lambda self, seen: self.seen.copy_(seen)):  # positions set back, slots not
        for attn in KINDS:
            fails(rollback_equals_forward, attn)


@torch.no_grad()
def test_rows_do_not_influence_each_other():
    for attn in KINDS:
        model = lm(attn)
        text = text_of(model, 2, 70)
        plan = [[3, 40], [20, 1], [1, 9], [5, 0], [41, 20]]
        both = decode(model, text, plan)
        for b in range(2):
            close(decode(model, text[b : b + 1], [[c[b]] for c in plan if c[b]]), both[b : b + 1], 1e-12, f"{attn}: row {b} alone")


# ---------------------------------------------------------------------------------------------------------------------------------
# train_lm.py: the model


@torch.no_grad()
def test_gqa_is_a_llama_model():
    """The whole model against Llama's forward pass, written out for one text; RoPE base and norm epsilon from the config."""
    for tied in (False, True):
        model = lm("gqa", tied=tied, rope_base=500.0, norm_eps=1e-3, layers=2, ffn=40)
        text, T, H, G, D = text_of(model, 1, 23), 23, 4, 2, 8
        norm = lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w
        x = model.embed.weight[text[0]]
        angle = torch.arange(T).double()[:, None] * 500.0 ** (-torch.arange(0, D, 2).double() / D)
        for block in model.blocks:
            y = norm(x, block.attn_norm.weight)
            q, k, v = (y @ w.weight.T for w in (block.attn.q, block.attn.k, block.attn.v))
            q, k, v = q.view(T, H, D), k.view(T, G, D).repeat_interleave(2, 1), v.view(T, G, D).repeat_interleave(2, 1)
            half = lambda z: torch.cat([-z[..., D // 2 :], z[..., : D // 2]], -1)
            cos, sin = angle.cos().repeat(1, 2)[:, None], angle.sin().repeat(1, 2)[:, None]
            q, k = q * cos + half(q) * sin, k * cos + half(k) * sin
            w = (torch.einsum("thd,shd->hts", q, k) / D**0.5).masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf).softmax(-1)
            x = x + torch.einsum("hts,shd->thd", w, v).reshape(T, H * D) @ block.attn.out.weight.T
            y = norm(x, block.ffn_norm.weight)
            x = x + (F.silu(y @ block.gate.weight.T) * (y @ block.up.weight.T)) @ block.down.weight.T
        head = model.embed.weight if tied else model.head.weight
        close(model(text)[0], norm(x, model.norm.weight) @ head.T, 1e-12, f"Llama's forward pass, tied {tied}")


def test_recompute_changes_nothing():
    for attn in KINDS:
        grads = []
        for recompute in (False, True):
            torch.manual_seed(0)
            model = lm(attn, recompute=recompute)
            model(text_of(model, 2, 50)).square().sum().backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        close(*grads, 1e-12, f"{attn}: gradients with recomputed blocks")


def test_generate_equals_forward():
    for attn in KINDS:
        model = lm(attn).float()
        prompt = text_of(model, 2, 5)
        text = train_lm.generate(model, prompt, 40, temperature=0.0)
        with torch.no_grad():
            assert torch.equal(model(text[:, :-1]).argmax(-1)[:, 4:], text[:, 5:]), f"{attn}: greedy text = argmax of the forward pass"


def test_presets_have_the_sizes_they_claim():
    for name, low, high in (("small", 0.8e6, 1.25e6), ("base", 27e6, 37e6), ("340m", 280e6, 400e6), ("1.3b", 1.1e9, 1.5e9)):
        for attn in KINDS:
            cfg = Config(**{**train_lm.PRESETS[name], "attn": attn, "vocab": 257 if name in ("small", "base") else 32000})
            with torch.device("meta"):
                size = sum(p.numel() for p in LM(cfg).parameters())
            assert low <= size <= high, f"{name} {attn}: {size / 1e6:.1f} M parameters"


# ---------------------------------------------------------------------------------------------------------------------------------
# train_lm.py: data


def prepared(folder, **changes):
    cfg = tiny("asa", **changes)
    enc = train_lm.tokenizer(cfg.tokenizer)
    train_lm.prepare(cfg, enc, folder)
    return train_lm.Data(cfg, enc, folder)


def test_data_is_split_by_text_and_read_in_pieces():
    with tempfile.TemporaryDirectory() as tmp:
        tmp, draw = pathlib.Path(tmp), random.Random(0)
        texts = [f"text {i}\n" * draw.randint(30, 60) for i in range(11)]
        texts[3] = "".join(f"line {i}, äöü 漢字\n" for i in range(120000))  # larger than a piece, characters of several bytes
        for i, t in enumerate(texts):
            (tmp / f"{i:02}.txt").write_text(t)
        (tmp / "11.txt").write_bytes(b"not utf-8: \xff\xfe\n")
        files = sorted(str(f) for f in tmp.glob("*.txt"))
        (tmp / "1").mkdir()
        data = prepared(tmp / "1", data=files)
        text = lambda part: data.enc.decode_bytes([t for t in data.tokens[part] if t != 256]).decode()
        assert text("val") == texts[9], "every tenth text is for validation"
        assert text("train") == "".join(t for i, t in enumerate(texts) if i != 9) + "not utf-8: \ufffd\ufffd\n"
        ends = [int((data.tokens[part] == 256).sum()) for part in ("train", "val")]
        assert ends == [11, 1] and isinstance(data.tokens["train"], np.memmap), "one end of text each, memory mapped"
        first = data.info["sha256"]
        (tmp / "00.txt").write_text("changed")
        (tmp / "2").mkdir()
        assert prepared(tmp / "2", data=files).info["sha256"] != first, "the hash follows the text"
        (tmp / "3").mkdir()
        one = prepared(tmp / "3", data=[files[3]])
        assert 0.05 < one.info["val"] / one.info["train"] < 0.2, "of a single text the last tenth is for validation"
    assert [n for n, _ in train_lm.sources(Config(preset="base"))] == sorted(n for n, _ in train_lm.sources(Config(preset="base")))
    assert not any({"test", "tests", "site-packages"} & set(n.split("/")) for n, _ in train_lm.sources(Config(preset="base")))


def test_recall_documents_can_be_known():
    with tempfile.TemporaryDirectory() as tmp:
        data = prepared(pathlib.Path(tmp), preset="small", context=512)
        seen = 0
        for seed in range(20):
            doc, asked = data.recall("train", np.random.default_rng(seed), data.cfg.context, 5)
            text = bytes(min(int(t), 255) for t in doc).decode("latin1")
            assert len(doc) == 513
            for distance, begin, end in asked:
                seen += 1
                lead = text[:begin].rindex("<")
                statement = text[lead : end + 1]
                assert re.fullmatch(r"<[a-z]{2}=[A-Z]>?", statement), statement
                if end > 512:
                    continue
                assert text[lead - distance :].startswith(statement), f"{statement} was told {distance} tokens before"
                assert text.rfind(statement, 0, lead + len(statement) - 1) == lead - distance, "the distance is to the latest telling"
        assert seen > 40


def test_sequences_grow_to_the_context():
    with tempfile.TemporaryDirectory() as tmp:
        data = prepared(pathlib.Path(tmp), preset="small", context=1024, batch=2, steps=10, grow=0.4)
        assert [data.length(step) for step in range(10)] == [256] * 2 + [512] * 2 + [1024] * 6, [data.length(s) for s in range(10)]
        for step in (0, 2, 9):
            x, y, w = data.batch(step)
            assert x.shape == y.shape == w.shape == (2048 // data.length(step), data.length(step)), "as many tokens at every step"
            assert torch.equal(data.batch(step, 1, 2)[0], x[1::2])
        data.cfg.grow = 0.0
        assert data.length(0) == 1024 and prepared(pathlib.Path(tmp), preset="small", context=320).length(0) == 320


def test_batches_depend_on_seed_step_and_row_alone():
    with tempfile.TemporaryDirectory() as tmp:
        data = prepared(pathlib.Path(tmp), preset="small", context=64, batch=32, keys=2)
        whole = data.batch(7)[0]
        assert torch.equal(whole, data.batch(7)[0]) and not torch.equal(whole, data.batch(8)[0])
        for rank in range(2):
            assert torch.equal(data.batch(7, rank, 2)[0], whole[rank::2]), "a process gets every world-th row"
        x, y, w = data.batch(3)
        assert torch.equal(x[:, 1:], y[:, :-1]), "targets are the next tokens"
        assert set(y[w > 1].tolist()) <= set(range(65, 91)) and (w > 1).any(), "answers, and nothing else, weigh more"


# ---------------------------------------------------------------------------------------------------------------------------------
# train_lm.py: runs

QUICK = "--small --layers 2 --width 32 --heads 2 --groups 1 --context 64 --batch 4 --micro 2 --window 16 --blocks 3".split()


def run(*args, code=0, env=None, script="train_lm.py"):
    """A subprocess; its exit code must be `code`. -> (stdout, stderr)"""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run([sys.executable, str(HERE / script), *map(str, args)], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == code, f"{script} {args}: exit code {done.returncode}, not {code}\n{done.stdout}{done.stderr}"
    return done.stdout, done.stderr


def in_process(*args):
    """train_lm.main without a new process: (exit code, stdout, stderr)."""
    out, err, handlers = io.StringIO(), io.StringIO(), {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = train_lm.main([str(a) for a in args])
    finally:
        for s, h in handlers.items():
            signal.signal(s, h)
    return code, out.getvalue(), err.getvalue()


def losses(folder):
    entries = [json.loads(line) for line in open(folder / "log.jsonl")]
    return {e["step"]: e["loss"] for e in entries if "loss" in e}


def test_resumed_training_equals_uninterrupted():
    for attn in KINDS:
        with tempfile.TemporaryDirectory() as tmp:
            common = [*QUICK, "--attn", attn, "--out", tmp, "--save-every", 3]
            assert in_process(*common, "--steps", 6, "--name", "whole")[0] == 0
            assert in_process(*common, "--steps", 6, "--name", "parts")[0] == 0
            folder = pathlib.Path(tmp, "parts")
            # go back to a checkpoint of step 3: the run is done again up to there, then continued
            half = pathlib.Path(tmp, "half")
            stop = train_lm.save_checkpoint
            with swapped(train_lm, "save_checkpoint", lambda path, state: stop(path, state) if state["step"] <= 3 else None):
                assert in_process(*common, "--steps", 6, "--name", "half")[0] == 0
            code, out, _ = in_process(*common, "--steps", 6, "--name", "half", "--resume")
            assert code == 0 and "resumed at step 3" in out, out
            a, b = (train_lm.load_checkpoint(f / "ckpt.pt") for f in (pathlib.Path(tmp, "whole"), half))
            assert a["step"] == b["step"] == 6
            for name in a["model"]:
                assert torch.equal(a["model"][name], b["model"][name]), f"{attn}: {name} differs after resuming"
            assert losses(pathlib.Path(tmp, "whole")) == losses(half) == losses(folder), f"{attn}: logged losses, none missing, none twice"


def test_two_processes_equal_one():
    with tempfile.TemporaryDirectory() as tmp:
        common = [*QUICK, "--out", tmp, "--steps", 4, "--eval-every", 100]
        assert in_process(*common, "--micro", 4, "--name", "one")[0] == 0
        assert in_process(*common, "--micro", 1, "--name", "pieces")[0] == 0
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", str(random.randint(20000, 60000))]
        done = subprocess.run([*torchrun, str(HERE / "train_lm.py"), *map(str, common), "--name", "two", "--micro", "1"],
                              capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        one, two, pieces = (losses(pathlib.Path(tmp, n)) for n in ("one", "two", "pieces"))
        assert list(one) == list(two) == [1, 2, 3, 4]
        for other, what in ((two, "two processes"), (pieces, "accumulated gradients")):
            diff = max(abs(one[s] - other[s]) for s in one)
            assert diff < 2e-5, f"{what}: losses differ by {diff}"


def test_a_model_learns_or_says_not():
    with tempfile.TemporaryDirectory() as tmp:
        code, out, _ = in_process(*QUICK, "--steps", 2, "--lr", 0, "--check", "--out", tmp, "--name", "idle")
        assert code == 1 and out.strip().endswith("NOT"), "a model that did not learn: NOT, and exit code 1 with --check"
        code, out, _ = in_process(*QUICK, "--steps", 2, "--lr", 0, "--out", tmp, "--name", "idle2")
        assert code == 0 and "NOT" in out, "without --check the exit code is 0"
        busy = ["--batch", 16, "--micro", 16, "--steps", 60, "--lr", 1e-2, "--recall", 0]
        code, out, _ = in_process(*QUICK, *busy, "--out", tmp, "--name", "busy")
        curve = losses(pathlib.Path(tmp, "busy"))
        assert curve[60] < 0.65 * curve[1], f"60 steps: loss {curve[1]} -> {curve[60]}"
        for word in ("sample", "bits per byte", "inside the window", "beyond it", "KV cache", "tokens/s", "GiB", "expected"):
            assert word in out, f"the last block lacks {word!r}"


def test_bad_input_is_one_line_and_exit_code_2():
    with tempfile.TemporaryDirectory() as tmp:
        tmp = pathlib.Path(tmp)
        (tmp / "empty.txt").write_text("")
        (tmp / "short.txt").write_text("too short")
        assert in_process(*QUICK, "--steps", 1, "--out", tmp, "--name", "run")[0] == 0
        before = (tmp / "run" / "ckpt.pt").read_bytes()
        torn = tmp / "torn"
        torn.mkdir()
        (torn / "log.jsonl").write_text("")
        (torn / "ckpt.pt").write_bytes(before[: len(before) // 2])
        (tmp / "file").write_text("")
        cases = {
            "unknown option": ["--colour", "red"],
            "unknown preset": ["--preset", "huge"],
            "not a number": ["--steps", "many"],
            "no such file": ["--data", tmp / "missing.txt"],
            "is empty": ["--data", tmp / "empty.txt"],
            "tokens, --context": ["--data", tmp / "short.txt"],
            "multiple of 16": ["--context", 70],
            "multiple of 32": ["--attn", "nsa", "--context", 80],
            "--heads": ["--heads", 3],
            "--batch": ["--batch", 3],
            "--recall": ["--recall", 2],
            "at least 1": ["--layers", 0],
            "the checkpoint has --width": ["--resume", "--name", "run", "--width", 64],
            "not a readable checkpoint": ["--resume", "--name", "torn"],
            "there is no run": ["--resume", "--name", "nothing"],
            "holds a run already": ["--name", "run"],
            "cannot write": ["--out", tmp / "file"],
            "tokenizer": ["--tokenizer", "no-such-encoding"],
        }
        if not torch.cuda.is_available():
            cases["no GPU"] = ["--device", "cuda"]
        for what, args in cases.items():
            code, out, err = in_process(*QUICK, "--steps", 2, "--out", tmp, *args)
            assert code == 2, f"{what}: exit code {code}\n{out}{err}"
            assert err.startswith("error: ") and len(err.splitlines()) == 1, f"{what}: not one line:\n{err}"
            assert what in err or what.startswith(("unknown", "not a number")), f"{what}: {err}"
        assert (tmp / "run" / "ckpt.pt").read_bytes() == before, "nothing is overwritten"
        assert len(run("--colour", "red", code=2)[1].splitlines()) == 1, "the same from the shell"


def test_a_loss_that_is_not_finite_stops_the_run():
    with tempfile.TemporaryDirectory() as tmp:
        code, out, _ = in_process(*QUICK, "--steps", 40, "--lr", 1e30, "--save-every", 1, "--out", tmp, "--name", "x")
        assert code == 1 and "stopped" in out and "nothing saved since" in out, out
        state = train_lm.load_checkpoint(pathlib.Path(tmp, "x", "ckpt.pt"))
        assert state["step"] >= 1


def test_kill_leaves_a_whole_checkpoint():
    with tempfile.TemporaryDirectory() as tmp:
        folder, draw = pathlib.Path(tmp, "k"), random.Random(0)
        args = [sys.executable, str(HERE / "train_lm.py"), *QUICK, "--width", "128", "--steps", "100000", "--save-every", "1"]
        args += ["--out", tmp, "--name", "k"]
        last = 0
        for attempt in range(4):
            process = subprocess.Popen([*args, *(["--resume"] if attempt else [])], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})
            began, size = time.time(), lambda: (folder / "ckpt.pt").stat().st_mtime_ns if (folder / "ckpt.pt").exists() else 0
            old = size()
            while size() == old and time.time() - began < 60:
                time.sleep(0.01)
            time.sleep(draw.random() * 0.5)
            process.send_signal(signal.SIGKILL)
            process.wait()
            step = train_lm.load_checkpoint(folder / "ckpt.pt")["step"]
            assert step > last, f"killed after a later step, the checkpoint is of step {step}"
            last = step
        process = subprocess.Popen([*args, "--resume"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while not process.stdout.readline().startswith("step"):
            assert process.poll() is None, "the run ended early"
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=60)[0]
        assert process.returncode == 128 + signal.SIGTERM and "saved" in out, f"SIGTERM saves and exits: {process.returncode}\n{out}"
        assert train_lm.load_checkpoint(folder / "ckpt.pt")["step"] > last


def test_no_network_and_no_triton_needed():
    code = ("import socket, sys\n"
            "def no(*a, **k): raise OSError('a network was tried')\n"
            "socket.socket.connect = socket.create_connection = socket.getaddrinfo = no\n"
            "sys.modules['triton'] = None\n"
            "import train_lm; sys.exit(train_lm.main(sys.argv[1:]))")
    with tempfile.TemporaryDirectory() as tmp:
        for attn in KINDS:
            done = subprocess.run([sys.executable, "-c", code, *QUICK, "--attn", attn, "--steps", "2", "--out", tmp], cwd=HERE,
                                  capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, timeout=120)
            assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------------------------
# documents


def test_every_option_is_read():
    tree = ast.parse((HERE / "train_lm.py").read_text())
    owners = lambda n: {n.value.id} if isinstance(n.value, ast.Name) else {n.value.attr} if isinstance(n.value, ast.Attribute) else set()
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and owners(n) & {"cfg", "self"}}
    for f in dataclasses.fields(Config):
        assert f.name in read, f"--{f.name} is never read"
        assert f.metadata["help"], f"--{f.name} has no help"


def test_readme_commands_parse():
    readme = (HERE / "README.md").read_text()
    commands = [line.strip().split("#")[0].split() for line in re.findall(r"^(?:    |\$ )(.*python.*|.*torchrun.*)$", readme, re.M)]
    assert len(commands) >= 5, "the README shows its commands"
    for words in commands:
        while "&&" in words:
            words = words[words.index("&&") + 1 :]
        script = next((w for w in words if w.endswith(".py")), None)
        if script is None:
            continue
        assert (HERE / script).exists(), f"README names {script}"
        if script == "train_lm.py":
            train_lm.parse([w for w in words[words.index(script) + 1 :] if w != "..."])
    for name in re.findall(r"`([a-z_]+\.py)`", readme):
        assert (HERE / name).exists() or (HERE / "results" / name).exists(), f"README names {name}"


def test_demos_run():
    for script, words in (("latent_attention.py", ("MHA", "MLA", "GLA")), ("nsa.py", ("compressed", "ASA global", "#"))):
        began = time.time()
        out, _ = run(script=script, env={"OMP_NUM_THREADS": "2"})
        assert all(w in out for w in words), out
        assert time.time() - began < 15, f"{script} took {time.time() - began:.0f} s"


def main(argv):
    wanted = argv[argv.index("-k") + 1] if "-k" in argv else ""
    count = {"passed": 0, "failed": 0, "skipped": 0}
    for name, test in [(n, f) for n, f in globals().items() if n.startswith("test_") and wanted in n]:
        setup_function()
        began = time.time()
        try:
            test()
            result = "passed"
        except unittest.SkipTest as e:
            result, _ = "skipped", print(f"         {e}")
        except Exception:
            result = "failed"
            traceback.print_exc()
        count[result] += 1
        print(f"{result:8} {name} ({time.time() - began:.1f} s)", flush=True)
    print(", ".join(f"{n} {result}" for result, n in count.items()))
    return int(count["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
