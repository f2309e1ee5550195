"""Every claim of the code as a test.

    python test_all.py               all tests but the longest, in about 3 minutes on two cores
    python test_all.py --quick       those that take a moment
    python test_all.py --all         the longest as well: every mode with 200,000 draws, storms of kills
    python test_all.py -k WORD       those whose name contains WORD
    python -m pytest -q test_all.py  the same tests

Identities are checked in fp64 at small sizes, and messages carry the largest and the mean difference. A subtle test
is also run on a deliberately wrong implementation (a mutant), which it has to catch. On a CPU as many tests run at a
time as there are cores (at most 4), each in one thread. The kernels then run in Triton's interpreter.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import io
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import unittest

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run on a CPU

import kernels
import latent_attention as la
import mtp
import nsa
import sparse_rl
import train_lm
import train_rl
from latent_attention import GQA, LatentAttention, SlotCache, attend, rope, visible
from nsa import ASA_BLOCK, NSA, SHARE, ASAGlobal
from sparse_rl import Compressor
from train_lm import LM, Config

HERE = pathlib.Path(__file__).resolve().parent
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
KINDS = ("gqa", "nsa", "asa")


EVERYTHING = False  # --all


def slow(test):
    """A test that takes more than a moment: --quick leaves it out."""
    test.slow = True
    return test


def longest(test):
    """A test that is long by nature: it runs with --all only."""

    @functools.wraps(test)
    def only_with_all():
        if not EVERYTHING:
            raise unittest.SkipTest("only with --all")
        test()

    return slow(only_with_all)


def setup_function(fn=None):  # before each test, by pytest and by main
    torch.manual_seed(0)
    torch.set_num_threads(1)  # of such small tensors more threads mostly wait for each other


def close(a, b, tol, what):
    diff = (a.double() - b.double()).abs()
    assert a.shape == b.shape and a.numel(), f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    assert diff.max() <= tol, (
        f"{what}: max difference {diff.max():.2e}, mean {diff.mean():.2e}, allowed {tol:.0e}"
    )  # NaN fails


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


def mutant(function, right, wrong):
    """The function with one expression of its source changed."""
    source = textwrap.dedent(inspect.getsource(function)).removeprefix("@fast_path\n")
    scope = dict(inspect.unwrap(function).__globals__)
    assert source.count(right) == 1, f"{function.__name__} has {source.count(right)} times {right!r}"
    exec(source.replace(right, wrong), scope)
    return scope[function.__name__]


def tiny(attn, **changes):
    """A config whose block and window edges all lie within 160 tokens."""
    sizes = dict(
        layers=4,
        width=32,
        heads=4,
        groups=2,
        window=20,
        blocks=4,
        nsa_blocks=4,
        nsa_block=32,
        vocab=61,
        context=160,
    )
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
    turn = torch.polar(
        torch.ones(4).double(), torch.ones(4).double() * 7 * 10000.0 ** (-torch.arange(4).double() / 4)
    )
    turned = pairs * turn
    close(
        rope(x, torch.full((2, 5), 7)),
        torch.cat([turned.real, turned.imag], -1),
        1e-12,
        "rotation in complex numbers",
    )


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
    cache = SlotCache(3, max_len, {"k": (2, 1), "v": (1, 3)}, window, margin)
    lists = ListCache(3)
    seen = torch.zeros(3, dtype=torch.long)
    for _ in range(60):
        T = draw.choice([1, 1, 2, margin, 11, 25])
        count = torch.tensor([draw.randint(0, T) for _ in range(3)]).minimum(max_len - seen)
        pos, value = seen[:, None] + torch.arange(T), torch.randn(3, T)
        shaped = value[:, None, :, None]
        read = cache.append(pos, count, k=shaped.expand(-1, 2, -1, 1), v=shaped.expand(-1, 1, -1, 3))
        lists.append(value, pos, count)
        for b in range(3):
            for i in range(int(count[b])):  # what every new query sees
                see = visible(pos[b : b + 1, i : i + 1], read.pos[b : b + 1], window)[0, 0, 0]
                got = sorted(zip(read.pos[b, 0][see].tolist(), read.k[b, 1, :, 0][see].tolist()))
                want = sorted(
                    e
                    for e in lists.rows[b]
                    if e[0] <= pos[b, i] and (window is None or e[0] > pos[b, i] - window)
                )
                assert [p for p, _ in got] == [p for p, _ in want], (
                    f"window {window}: row {b} sees {got}, expected {want}"
                )
                assert all(abs(x - y) < 1e-6 for (_, x), (_, y) in zip(got, want)), (
                    f"window {window}: values of row {b}"
                )
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

    def small_ring(self, batch, max_len, widths, window=None, margin=8, **kind):
        # A ring of W slots loses what a rejected draft needs.
        SlotCache.init(self, batch, max_len, widths, window and max(1, window - margin + 1), margin, **kind)

    SlotCache.init = SlotCache.__init__
    with swapped(SlotCache, "__init__", small_ring):
        fails(slots_match_lists, 10)


def test_slot_cache_keep_gathers_kept_slots():
    cache = SlotCache(2, 10, {"k": (3, 4), "v": (3, 2)})
    k, v, pos = torch.randn(2, 3, 8, 4), torch.randn(2, 3, 8, 2), torch.arange(8).expand(2, -1)
    cache.append(pos, torch.tensor([8, 6]), k=k, v=v)
    index = torch.tensor(
        [[[0, 3, 7], [1, 2, 5], [4, 5, 6]], [[0, 5, -1], [1, 2, -1], [3, 4, -1]]]
    )  # (B, heads, n): each head its own
    cache.keep(index)
    for b, h in [(b, h) for b in range(2) for h in range(3)]:
        kept = [i for i in index[b, h].tolist() if i >= 0]
        close(cache.data["k"][b, h, : len(kept)], k[b, h, kept], 0, "kept keys")
        close(cache.data["v"][b, h, : len(kept)], v[b, h, kept], 0, "kept values")
        assert cache.pos[b, h].tolist() == kept + [-1] * (10 - len(kept)), (
            "kept slots carry their original positions, the rest is empty"
        )
    assert cache.length.tolist() == [3, 2]
    one = torch.ones(2, dtype=torch.long)
    cache.append(torch.tensor([[8], [6]]), one, k=k[:, :, :1], v=v[:, :, :1])
    assert cache.pos[:, 0, :4].tolist() == [[0, 3, 7, 8], [0, 5, 6, -1]], (
        "the next token goes behind the kept ones"
    )


def test_slot_cache_refuses_to_overflow():
    cache = SlotCache(1, 4, {"k": (1, 2)})
    cache.append(torch.arange(3)[None], torch.tensor([3]), k=torch.zeros(1, 1, 3, 2))
    try:
        cache.append(torch.arange(3, 5)[None], torch.tensor([2]), k=torch.zeros(1, 1, 2, 2))
    except RuntimeError:
        return
    raise AssertionError("a full row was overwritten")


def plain_attention(q, k, v, mask, scale):
    """attend, one head at a time."""
    h, out = q.shape[1] // k.shape[1], []
    for i in range(q.shape[1]):
        see = mask[:, min(i // h, mask.shape[1] - 1)]
        out.append(
            (q[:, i] @ k[:, i // h].mT * scale).masked_fill(~see, -torch.inf).softmax(-1) @ v[:, i // h]
        )
    return torch.stack(out, 1)


def test_attend_equals_plain_attention_with_gradients():
    cases = [(3, 2, 8, 8, 2, 2), (40, 2, 12, 8, 2, 2), (40, 2, 8, 16, 1, 1), (40, 1, 8, 8, 2, 1)]
    for T, G, Dk, Dv, B1, G1 in [*cases, (33, 2, 192, 128, 2, 1), (33, 4, 160, 128, 1, 1)]:
        S = T + 5
        q, k, v = (
            torch.randn(2, h, n, d, dtype=torch.float64, requires_grad=True)
            for h, n, d in ((4, T, Dk), (G, S, Dk), (G, S, Dv))
        )
        mask = torch.rand(B1, G1, T, S) < 0.5
        mask[..., 0] = True
        results = []
        for f in (attend, plain_attention):
            o = f(q, k, v, mask, 0.3)
            results.append(
                [o, *torch.autograd.grad((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum(), (q, k, v))]
            )
        for a, b, what in zip(*results, ("output", "dq", "dk", "dv")):
            close(a, b, 1e-11, f"attend, {what}, T {T}, G {G}, widths {Dk}/{Dv}, mask {B1}x{G1}")


def test_window_attention_equals_a_mask_with_gradients():
    for T, W in [(1, 4), (5, 4), (31, 8), (64, 16), (40, 40), (40, 41), (33, 1), (100, 7)]:
        q, k, v = (
            torch.randn(2, h, T, d, dtype=torch.float64, requires_grad=True)
            for h, d in ((4, 12), (2, 12), (2, 8))
        )
        pos, results = torch.arange(T)[None], []
        for o in (
            la.window_attention(q, la.keys_of(None, pos, None, k, v), W, 0.3),
            plain_attention(q, k, v, visible(pos, pos[:, None], W), 0.3),
        ):
            results.append(
                [o, *torch.autograd.grad((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum(), (q, k, v))]
            )
        for a, b, what in zip(*results, ("output", "dq", "dk", "dv")):
            close(a, b, 1e-11, f"window attention, {what}, T {T}, window {W}")


@torch.no_grad()
def test_absorbed_equals_materialised():
    for latents, window in ((1, None), (1, 7), (4, None)):  # MLA, MLA in a window, GLA
        layer = LatentAttention(64, 8, 8, latents, 24, 6, window=window).double()
        x = torch.randn(2, 19, 64).double()
        pos = torch.arange(19).expand(2, -1)
        all19 = torch.tensor([19, 19])

        def same():
            cache = layer.new_cache(2, 19, dtype=torch.float64)
            close(layer(x, pos, cache, all19), layer(x, pos), 1e-10, f"{latents} latents, window {window}")

        same()
        right = layer.absorb
        wrong = ((24 + 6) / (8 + 6)) ** -0.5  # a classic: the scale of the absorbed width
        layer.absorb = lambda q_c, q_r: right(q_c, q_r) * wrong
        fails(same)


def test_cache_bytes_are_the_formula():
    T, B, bf16 = 96, 2, dict(dtype=torch.bfloat16)
    H, G, D, R, P, W, margin = 8, 4, 16, 24, 8, 20, 8
    per_layer = lambda layer: la.cache_bytes([layer.new_cache(B, T, margin, **bf16)]) / (2 * B)
    assert per_layer(GQA(128, H, G, D)) == 2 * G * D * T
    assert per_layer(GQA(128, H, H, D)) == 2 * H * D * T
    assert per_layer(LatentAttention(128, H, D, 1, R, P)) == (R + P) * T
    assert per_layer(LatentAttention(128, H, D, 1, R, P, window=W)) == (R + P) * (W - 1 + margin)
    assert per_layer(LatentAttention(128, H, D, 1, R, P, window=1000)) == (R + P) * T, (
        "a window is never larger than the text"
    )
    assert per_layer(LatentAttention(128, H, D, G, R, P)) == (G * R + P) * T
    layer = NSA(128, H, G, D, window=W, n=4, block=32)
    assert per_layer(layer) == 2 * G * D * (T + (T - 32) // 16 + 1 + W - 1 + margin + 32 - 1 + margin)
    cache = ASAGlobal(128, H, D, G, R, P, n=4).new_cache(B, T, margin, **bf16)
    assert (cache["tokens"].nbytes + cache["blocks"].nbytes) / (2 * B) == (G * R + P) * (T + T // 16)
    assert cache["lists"].nbytes == 4 * B * G * 4 * (margin // SHARE + 2), (
        "the lists' bytes do not depend on T"
    )


def test_asa_halves_the_cache_of_nsa():
    for preset, most in (("base", 0.501), ("340m", 0.501), ("1.3b", 0.501)):
        cfg = Config(**{**train_lm.PRESETS[preset], "preset": preset, "vocab": 257})
        assert cfg.groups * cfg.rank + cfg.rotary == 2 * cfg.groups * cfg.head_width, (
            "the latents are as wide as the keys and values"
        )
        size = train_lm.count_caches(dataclasses.replace(cfg, layers=2))
        assert size["asa"] / size["nsa"] <= most, f"{preset}: {size}"


# ---------------------------------------------------------------------------------------------------------------------------------
# nsa.py


def test_block_importance_is_geometric():
    for l, d, block in ((32, 16, 64), (16, 16, 16), (32, 16, 32), (8, 4, 16), (64, 16, 64)):
        tokens = 256
        N = int(nsa.blocks_done(tokens, l, d))
        sizes = nsa.Blocks(l, d, block, n=4)
        got = nsa.block_importance(torch.eye(N)[None, None], 1, sizes, tokens)[0, 0]  # (N, blocks)

        def geometric(got):
            for i, j in [(i, j) for i in range(N) for j in range(got.shape[1])]:
                # strides [i d + a d, + d) of compressed block i that lie inside selection block j
                shared = sum(block * j <= i * d + a * d < block * (j + 1) for a in range(l // d))
                assert got[i, j] == shared, (
                    f"l {l}, d {d}, l' {block}: block {i} counts {got[i, j]} for {j}, shares {shared} strides"
                )

        geometric(got)
        if (l, d, block) == (32, 16, 64):
            assert got[:, 1].tolist()[3:8] == [1, 2, 2, 2, 1], "the weights of NSA's own sizes"
            i, j = torch.arange(N)[:, None], torch.arange(tokens // block)
            literal = sum(
                (i == 4 * j - m - n) for m in range(4) for n in range(2)
            ).float()  # eq. 9 read 0-based as printed
            fails(geometric, literal)


def test_select_blocks_equals_a_loop():
    for block, n in ((16, 4), (32, 3), (16, 8), (16, 50)):
        T = 150
        score = torch.rand(2, 3, T, -(-T // block))
        lists = nsa.select_blocks(score, torch.arange(T)[None], nsa.Blocks(16, 16, block, n))
        for b, g, t in [(b, g, t) for b in range(2) for g in range(3) for t in range(0, T, 7)]:
            own = t // block
            forced = {0, own, max(0, own - 1)}
            others = sorted(set(range(own + 1)) - forced, key=lambda j: -score[b, g, t, j])
            want = forced | set(others[: n - len(forced)])
            got = lists[b, g, t].tolist()
            valid = [j for j in got if j >= 0]
            assert got == sorted(valid) + [-1] * (len(got) - len(valid)), "ascending blocks, then -1"
            assert len(set(valid)) == len(valid) == min(n, own + 1), (
                f"block {block}, n {n}, t {t}: {valid} are unique, min(n, own + 1)"
            )
            assert set(valid) == want, f"block {block}, n {n}, t {t}: {valid} instead of {want}"


def lists_are_shared_by_the_first_of_four():
    """However a text is cut into calls, a query has the list of the first of its four."""
    layer = ASAGlobal(32, 4, 8, 3, 14, 8, n=5)
    lists = torch.randint(9, (2, 3, 60, 5), dtype=torch.int32)
    for cuts in ((1,) * 30, (3, 1, 7, 2, 9, 4), (22, 1, 1, 5), (40, 6)):
        cache = layer.new_cache(2, 96)["lists"]
        at = 0
        for T in cuts:
            pos = at + torch.arange(T).expand(2, -1)
            got = layer.shared_lists(lists[:, :, at : at + T], pos, torch.tensor([T, T]), cache)
            for t in range(T):
                first = (at + t) // SHARE * SHARE
                assert torch.equal(got[:, :, t], lists[:, :, first]), f"cuts {cuts}: query {at + t}"
            at += T


def test_lists_are_shared_by_the_first_of_four():
    lists_are_shared_by_the_first_of_four()
    own = mutant(ASAGlobal.shared_lists, "pos - pos % SHARE", "pos - (pos + 1) % SHARE")
    with swapped(ASAGlobal, "shared_lists", own):
        fails(lists_are_shared_by_the_first_of_four)


def nsa_by_loops(layer, x):
    """NSA for one text, query by query and head by head, from the paper's equations with its tokens and blocks counted from 1."""
    T, H, G, D = len(x), layer.heads, layer.groups, layer.head_width
    l, d, block, n, _ = layer.sizes
    pos = torch.arange(T)[None]
    q0 = layer.q(x).view(T, H, D)
    kv = layer.kv(x).view(T, 6, G, D)
    turn = lambda a, p: rope(a[None], torch.as_tensor(p, dtype=torch.float64).view(1, -1), layer.base)[
        0
    ]  # (heads, T, D)
    gates = layer.gate(x).sigmoid().view(T, 3, H)
    out = torch.zeros(T, H, D).double()
    for t in range(1, T + 1):
        for g in range(G):
            q = turn(q0[t - 1 : t, g * H // G : (g + 1) * H // G].transpose(0, 1), [t - 1.0])[:, 0]  # (h, D)
            n_cmp = (t - l) // d + 1 if t >= l else 0
            k_cmp, v_cmp = [], []
            for i in range(n_cmp):  # eq. 7: tokens i d + 1 .. i d + l
                k_cmp.append(
                    turn(layer.phi_k(kv[i * d : i * d + l, 0, g]).view(1, 1, D), [i * d + (l - 1) / 2])[0, 0]
                )
                v_cmp.append(layer.phi_v(kv[i * d : i * d + l, 1, g]))
            p = torch.zeros(q.shape[0], 0).double()
            if n_cmp:
                p = (q @ torch.stack(k_cmp).T / math.sqrt(D)).softmax(-1)  # eq. 8
                out[t - 1, g * H // G : (g + 1) * H // G] += gates[
                    t - 1, 0, g * H // G : (g + 1) * H // G, None
                ] * (p @ torch.stack(v_cmp))
            own, score = (t - 1) // block + 1, {}
            for j in range(1, own + 1):  # eq. 9 as printed, j and the compressed index counted from 1
                ids = [block // d * j - m - a for m in range(block // d) for a in range(l // d)]
                score[j] = sum(p[:, i - 1].sum().item() for i in ids if 1 <= i <= n_cmp)  # eq. 10
            forced = {1, own, max(1, own - 1)}
            rest = sorted(set(score) - forced, key=lambda j: -score[j])[: n - len(forced)]
            for branch, keys in (
                (
                    1,
                    [
                        s
                        for j in sorted(forced | set(rest))
                        for s in range((j - 1) * block + 1, min(j * block, t) + 1)
                    ],
                ),
                (2, range(max(1, t - layer.window + 1), t + 1)),
            ):
                keys = torch.tensor(list(keys)) - 1
                k = turn(kv[keys, 2 * branch, g][None], keys.double())[0]
                w = (q @ k.T / math.sqrt(D)).softmax(-1)
                mixed = gates[t - 1, branch, g * H // G : (g + 1) * H // G, None] * (
                    w @ kv[keys, 2 * branch + 1, g]
                )
                out[t - 1, g * H // G : (g + 1) * H // G] += mixed
    return layer.out(out.view(T, H * D))


def asa_by_loops(layer, x):
    """ASA's global layer for one text, query by query, on un-rotated keys as the definition has it; keys and values made per head."""
    T, H, G, R, P = x.shape[0], layer.heads, layer.latents, layer.rank, layer.rotary
    q_c, _, c, _ = layer.project(x[None], torch.arange(T)[None])
    q_r = layer.q_up(layer.q_norm(layer.q_down(x))).view(T, H, -1)[..., -P:]
    r = layer.kv_down(x)[:, G * R :]  # (T, P) un-rotated
    turn = lambda a, p: rope(
        a.view(1, 1, -1, P), torch.as_tensor(p, dtype=torch.float64).view(1, -1), layer.base
    )[0, 0]
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
                chosen = forced | set(
                    sorted(set(score) - forced, key=lambda b: -score[b])[: layer.sizes.n - len(forced)]
                )
            keys = [s for s in range(t + 1) if s // 16 in chosen]
            for i in heads:
                out[t, i] += (
                    gates[t, 1, i] * attention(t, i, c[0, g, keys], r[keys], [float(s) for s in keys])[1]
                )
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
    close(
        layer(x, pos),
        LatentAttention.forward(layer, x, pos),
        1e-12,
        "ASA global, all blocks selected, against GLA",
    )


@torch.no_grad()
def test_window():
    x, pos = torch.randn(1, 60, 32).double(), torch.arange(60)[None]
    full, local = (
        LatentAttention(32, 4, 8, 1, 32, 4).double(),
        LatentAttention(32, 4, 8, 1, 32, 4, window=60).double(),
    )
    local.load_state_dict(full.state_dict())
    close(local(x, pos), full(x, pos), 1e-14, "window >= T is full attention")
    local.window = 13
    before, t = local(x, pos), 40
    for back, reaches in ((12, True), (13, False)):  # the window holds t-12 .. t
        other = x.clone()
        other[:, t - back] += 1
        moved = (local(other, pos)[:, t] - before[:, t]).abs().max() > 0
        assert moved == reaches, (
            f"window 13: a change {back} tokens back {'reaches' if moved else 'does not reach'} the query"
        )


def compressed_rotation():
    layer = ASAGlobal(32, 4, 8, 2, 14, 8, n=4).double()
    c, r = (
        torch.randn(1, 2, 3, 16, 14).double(),
        torch.randn(1, 1, 3, 1, 8).double().expand(-1, -1, -1, 16, -1),
    )  # r constant in a block
    keys = lambda shift: rope(r.reshape(1, 1, 48, 8), shift + torch.arange(48)[None]).view(1, 1, 3, 16, 8)
    small = layer.compress(c, keys(0), None)["k2"]
    close(
        small.norm(dim=-1),
        r[..., 0, :].norm(dim=-1),
        1e-12,
        "the length of a compressed rotary key over a constant block",
    )
    close(
        small,
        rope(r[..., 0, :], torch.tensor([[7.5, 23.5, 39.5]])),
        1e-12,
        "a compressed rotary key stands at its block's middle",
    )
    q = torch.randn(1, 1, 1, 8).double()
    score = lambda shift: (
        rope(q, torch.tensor([[60 + shift]])) * layer.compress(c, keys(shift), None)["k2"]
    ).sum(-1)
    close(score(0), score(160), 1e-11, "scores after a shift of all positions")


def test_rotation_and_pooling():
    compressed_rotation()
    pooled_after_rotation = lambda self, c, k_r, end: {"k": c.mean(-2), "k2": k_r.mean(-2)}
    with swapped(ASAGlobal, "compress", pooled_after_rotation):
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
        assert torch.equal(before[:, :t], after[:, :t]), (
            f"{attn}: a change at token {t} reached an earlier output"
        )
        assert not torch.equal(before[:, t], after[:, t]), (
            f"{attn}: a change at token {t} did not reach its own output"
        )


def test_causality_is_bit_exact():
    for attn in KINDS:
        causal(attn)
    see = lambda q_pos, k_pos, window=None: visible(q_pos + 1, k_pos, window)
    of_the_last = (
        "p.detach()[:, :, :: sizes.share]",
        "p.detach().roll(1 - sizes.share, 2)[:, :, :: sizes.share]",
    )
    shared_by_last = mutant(nsa.compressed_attention, *of_the_last)  # the list of the last of the four
    for attn, name, wrong in (
        ("nsa", "visible", see),
        ("asa", "visible", see),
        ("asa", "compressed_attention", shared_by_last),
    ):
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
            bad = [
                n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
            ]
            assert not bad, f"{attn}, {T} tokens: gradients of {bad}"
    for N in (0, 3):
        q, k, v = (
            torch.randn(1, 4, 5, 8, requires_grad=True),
            torch.randn(1, 2, N, 8),
            torch.randn(1, 2, N, 6),
        )
        see = torch.zeros(1, 1, 5, N, dtype=torch.bool)
        o, p = nsa.attend_with_weights(q, k, v, see, 1.0)
        assert (o == 0).all() and (p == 0).all(), "no finished block: exactly 0"
        assert torch.autograd.grad(o.sum(), q)[0].isfinite().all()


def test_block_scores_learn_through_the_compressed_branch():
    x, pos = torch.randn(1, 100, 32).double(), torch.arange(100)[None]
    for attn, names in (
        ("nsa", ("phi_k.up.weight", "phi_v.down.weight", "kv.weight", "q.weight")),
        ("asa", ("pool", "k_up", "kv_down.weight", "q_up.weight")),
    ):
        layer = lm(attn, layers=2).blocks[1].attn
        with torch.no_grad():
            layer.gate.weight.zero_()
            layer.gate.bias.copy_(
                torch.tensor([0.0, -99, -99][: layer.gate.bias.numel() // 4]).repeat_interleave(4)
            )
        layer(x, pos).square().sum().backward()
        for name in names:
            gradient = dict(layer.named_parameters())[name].grad
            assert gradient.abs().max() > 1e-8, f"{attn}: {name} gets no gradient from the compressed branch"


def test_nsa_branches_have_keys_and_values_of_their_own():
    C, H, G, D, l = 64, 4, 2, 16, 32
    layer = NSA(C, H, G, D, window=20, n=4, block=32)
    want = C * H * D * 2 + 3 * 2 * C * G * D + 3 * H * (C + 1) + 2 * (l * D + l * D * D + D * D)
    assert sum(p.numel() for p in layer.parameters()) == want, (
        "parameters of NSA = formula with three independent k, v"
    )


# ---------------------------------------------------------------------------------------------------------------------------------
# kernels.py: on a CPU in Triton's interpreter, fp32; on a GPU compiled


@contextlib.contextmanager
def kernels_in_use(yes=True):
    """Let the decorated definitions use their kernels wherever Triton can run them, or nowhere."""
    if kernels.triton is None:
        raise unittest.SkipTest("needs Triton")
    with swapped(kernels, "usable", lambda x: yes and x.dtype != torch.float64):
        yield


@contextlib.contextmanager
def fast(name, wrong):
    """Replace the fast function of a pair by a mutant for a while."""
    pair = kernels.PAIRS[name]
    kernels.PAIRS[name] = (pair[0], wrong)
    try:
        yield
    finally:
        kernels.PAIRS[name] = pair


class Sizes:
    """One attention problem: queries, and Keys of tokens and of compressed blocks (Dv None: latents)."""

    def __init__(self, T, h, G, D, Dv=None, P=0, W=20, B=1, dtype=torch.float32, **blocks):
        sizes = {"l": 32, "d": 16, "block": 64, "n": 4, "share": 1, **blocks}
        self.T, self.G, self.W, self.sizes, self.scale = T, G, W, nsa.Blocks(**sizes), (D + P) ** -0.5
        new = lambda *shape: torch.randn(B, *shape, dtype=dtype, device=DEVICE, requires_grad=True)

        def keys(pos):
            S = pos.shape[1]
            return la.keys_of(
                None, pos, None, new(G, S, D), new(G, S, Dv) if Dv else None, new(1, S, P) if P else None
            )

        self.pos = torch.arange(T, device=DEVICE)[None]
        N = int(nsa.blocks_done(T, self.sizes.l, self.sizes.d))
        end = torch.arange(N, device=DEVICE)[None] * self.sizes.d + self.sizes.l - 1
        self.q, self.tokens, self.entries = new(h * G, T, D + P), keys(self.pos), keys(end)
        t0 = self.pos[:, :: self.sizes.share]
        scores = torch.rand(B, G, t0.shape[1], -(-T // self.sizes.block), device=DEVICE)
        self.lists = nsa.select_blocks(scores, t0, self.sizes)
        self.name = f"T {T}, {h} x {G} heads, widths {D}/{P}/{Dv}, {self.sizes}"

    def given(self, branch):
        return self.entries if branch == "compressed" else self.tokens

    def leaves(self, branch):
        keys = self.given(branch)
        return [x for x in (self.q, keys.k, keys.k2, keys.v) if x is not None]

    def run(self, branch, q=None, keys=None):
        """The decorated function, which runs the kernel or the definition."""
        q, keys = self.q if q is None else q, self.given(branch) if keys is None else keys
        if branch == "window":
            return la.window_attention(q, keys, self.W, self.scale)
        if branch == "compressed":
            return nsa.compressed_attention(q, self.pos, keys, self.T, self.sizes, self.scale)[0]
        return nsa.selected_attention(q, self.pos, keys, self.lists, self.sizes, self.scale)

    def plain(self, branch, dtype):
        """By the definition, with copies of the leaves in another dtype -> (o, leaves)."""
        copy = lambda x: None if x is None else x.detach().to(dtype).requires_grad_()
        q, keys = copy(self.q), self.given(branch)
        keys = keys._replace(k=copy(keys.k), v=copy(keys.v), k2=copy(keys.k2))
        with kernels_in_use(False):
            o = self.run(branch, q, keys)
        return o, [x for x in (q, keys.k, keys.k2, keys.v) if x is not None]


def with_gradients(o, leaves, weight=None):
    weight = torch.linspace(-1, 1, o.numel(), device=o.device).view_as(o) if weight is None else weight
    return [o, *torch.autograd.grad((o * weight.to(o.dtype)).sum(), leaves)]


def off(a, b):
    """|a - b| / |b|."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def kernels_equal_attend(s, branch):
    ours = with_gradients(s.run(branch), s.leaves(branch))
    want = with_gradients(*s.plain(branch, torch.float64))
    for what, a, b in zip(
        ("output", "dq", "dk", "dk2" if s.tokens.k2 is not None else "dv", "dv"), ours, want
    ):
        assert off(a, b) < 1e-5, f"{branch} attention, {s.name}: {what} is off by {off(a, b):.1e}"


def test_attention_kernels_equal_attend_with_gradients():
    with kernels_in_use():
        for T, h, G, D, Dv, more in [
            (31, 1, 2, 16, 16, {}),
            (31, 2, 1, 24, 16, {}),
            (31, 3, 1, 16, 48, dict(P=8)),
            (50, 16, 1, 16, 16, {}),
            (31, 5, 1, 96, 64, {}),
            (31, 8, 1, 192, 128, {}),
            (31, 4, 1, 64, 64, dict(n=3, W=33)),
            (31, 12, 1, 16, 16, {}),
            (31, 1, 1, 128, 128, dict(B=2)),
            (100, 2, 1, 16, 16, dict(l=16, d=8, n=3)),
            (31, 1, 2, 64, 64, dict(P=32, W=7)),  # NSA, MLA
            (257, 4, 1, 24, None, dict(P=8, l=16, block=16, share=4)),
            (50, 16, 2, 30, None, dict(P=16, l=16, block=16, share=4)),  # ASA
        ]:
            s = Sizes(T, h, G, D, Dv, **{"block": 32, **more})
            for branch in ("window", "selected") + ("compressed",) * (s.entries.k.shape[2] > 0):
                kernels_equal_attend(s, branch)
        right, chunks = kernels.invert, []
        with swapped(kernels, "L2", 2**12):  # the last one, 16 heads x 4 queries to a list, in chunks
            with swapped(kernels, "invert", lambda *args: [chunks.append(args[3]), right(*args)][1]):
                kernels_equal_attend(s, "selected")
            with swapped(kernels, "invert", lambda *args: (right(*args)[0].flip(0), *right(*args)[1:])):
                fails(kernels_equal_attend, s, "selected")
        assert min(chunks) > 4, f"chunks: {chunks}"
        s = Sizes(31, 2, 2, 16, 16)
        none = with_gradients(s.run("compressed"), s.leaves("compressed"))
        assert all((x == 0).all() for x in none), "before the first block: 0, and so are the gradients"
        with fast("window_attention", lambda q, keys, W, scale: kernels.attend(q, keys, scale, W + 1)[0]):
            fails(kernels_equal_attend, s, "window")


def test_selection_kernels_equal_the_reference():
    with kernels_in_use():
        for T, h, G, more in [
            (100, 2, 1, dict(n=3, block=32)),
            (257, 4, 1, dict(n=4, share=4, l=16, block=16)),
            (31, 3, 2, dict(n=9, block=16, l=16)),
            (70, 1, 1, dict(n=3, l=32, d=8, block=32)),
        ]:
            s = Sizes(T, h, G, 16, None, P=8, **more)
            problem = (s.q, s.pos, s.entries, T, s.sizes, s.scale)
            lists = nsa.compressed_attention(*problem)[1].long()
            want = nsa.compressed_attention.definition(*problem)[1]
            assert lists.shape == want.shape and lists.dtype == want.dtype
            p = nsa.attend_with_weights(s.q, *s.entries.joined(), visible(s.pos, s.entries.pos), s.scale)[1]
            score = nsa.block_importance(p[:, :, :: s.sizes.share], s.G, s.sizes, T)
            value = lambda x: torch.where(x >= 0, score.gather(-1, x.clamp(min=0)), 0).sum(-1)
            close(
                value(lists), value(want), 1e-5, f"{s.name}: score of the chosen blocks"
            )  # near ties differ
            assert torch.equal(lists >= 0, want >= 0) and torch.equal(lists[..., 0], want[..., 0] * 0)
            valid = lists.masked_fill(lists < 0, 2**20)
            assert ((valid.diff(dim=-1) > 0) | (valid[..., 1:] == 2**20)).all(), "ascending, then -1"
            own = s.pos[:, None, :: s.sizes.share, None] // s.sizes.block
            for forced in (0, own - 1, own):
                found = (lists == torch.as_tensor(forced).clamp(min=0)).any(-1)
                assert found.all(), f"{s.name}: a forced block is missing"


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
    """One clear line, before anything is launched; a decorated function then gives what the definition gives."""
    if kernels.triton is None:
        raise unittest.SkipTest("needs Triton")
    new = lambda heads, width=16, **kind: torch.randn(1, heads, 8, width, device=DEVICE, **kind)
    pos = torch.arange(8, device=DEVICE)[None]
    keys = lambda k, v: la.keys_of(None, pos, None, k, v)
    lists = torch.zeros(1, 1, 2, 1, dtype=torch.int32, device=DEVICE)
    sizes = lambda **more: nsa.Blocks(**{"l": 16, "d": 16, "block": 16, "n": 3, **more})
    for what, f, args in (
        ("1 to 64 heads", la.window_attention, (new(130), keys(new(1), new(1)), 4, 1.0)),
        ("at most 256", la.window_attention, (new(2, 320), keys(new(2, 320), new(2, 64)), 4, 1.0)),
        ("one dtype", la.window_attention, (new(2), keys(new(2, dtype=torch.float16), new(2)), 4, 1.0)),
        (
            "128 rows",
            nsa.selected_attention,
            (new(64), pos, keys(new(1), new(1)), lists, sizes(share=4), 1.0),
        ),
        (
            "blocks of 24",
            nsa.compressed_attention,
            (new(2), pos, keys(new(2), new(2)), 8, sizes(block=24), 1.0),
        ),
        ("side by side", la.cached_attention, (new(2), pos, keys(new(2), new(2)), 1.0)),
    ):
        try:
            kernels.PAIRS[f.__name__][1](*args)
        except kernels.Refused as e:
            assert what in str(e) and "\n" not in str(e), str(e)
        else:
            raise AssertionError(f"not refused: {what}")
        with kernels_in_use():
            if what != "one dtype":
                a, b = f(*args), f.definition(*args)
                assert torch.equal(a[0], b[0]), f"{what}: what is refused is left to the definition"


def test_kernels_compiled_in_bf16():
    """Against fp64, beside SDPA in bf16 on the same data; two runs have the same bits."""
    if not CUDA:
        raise unittest.SkipTest("needs CUDA")
    asa = dict(l=16, block=16, n=12, share=4, dtype=torch.bfloat16)
    for sizes in [
        (1000, 16, 4, 128, 128, {}),
        (1000, 4, 4, 64, 64, {}),
        (257, 1, 2, 64, 64, {}),
        (257, 3, 1, 96, 96, {}),
        (257, 16, 1, 192, 128, {}),
        (257, 1, 8, 64, 64, dict(P=32)),
        (1000, 4, 4, 120, None, dict(P=32, **asa)),
        (1000, 16, 2, 240, None, dict(P=64, **asa)),
    ]:
        s = Sizes(*sizes[:5], **{"W": 200, "dtype": torch.bfloat16, **sizes[5]})
        for branch in ("window", "compressed", "selected"):
            leaves = s.leaves(branch)
            grad = torch.randn(*s.q.shape[:3], sizes[4] or sizes[3], device="cuda")
            one, two = (with_gradients(s.run(branch), leaves, grad) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(one, two)), f"{branch}, {s.name}: two runs differ"
            exact = with_gradients(*s.plain(branch, torch.float64), grad)
            sdpa = with_gradients(*s.plain(branch, torch.bfloat16), grad)
            for i, (a, b, c) in enumerate(zip(one, sdpa, exact)):
                ours, theirs = off(a, c), off(b, c)
                assert ours < 1.5 * theirs + 1e-4, (
                    f"{branch}, {s.name}: result {i} is off by {ours:.1e}, SDPA by {theirs:.1e}"
                )


def test_kernels_address_more_than_2_to_31_elements():
    """A group of heads gives the same bits alone as behind 2^31 elements of other heads."""
    if not CUDA:
        raise unittest.SkipTest("needs CUDA")
    T, h, G, D = 131072 + 64, 16, 5, 256
    new = lambda heads, S: torch.randn(
        1, heads, S, D, device="cuda", dtype=torch.bfloat16, requires_grad=True
    )
    sizes, pos = nsa.Blocks(32, 16, 64, 16), torch.arange(T, device="cuda")[None]
    q, k, v, N = new(h * G, T), new(G, T), new(G, T), (T - 32) // 16 + 1
    assert q.numel() > 2**31
    k_c, v_c, results = new(G, N), new(G, N), []
    weight = torch.randn(1, 1, T, 1, device="cuda", dtype=torch.bfloat16)
    end = torch.arange(N, device="cuda")[None] * 16 + 31
    for only in (False, True):
        pick = lambda x, heads: x.detach()[:, -heads:].contiguous().requires_grad_() if only else x
        leaves = q_, k_, v_, kc_, vc_ = pick(q, h), pick(k, 1), pick(v, 1), pick(k_c, 1), pick(v_c, 1)
        entries, tokens = la.keys_of(None, end, None, kc_, vc_), la.keys_of(None, pos, None, k_, v_)
        o, lists = kernels.compressed_attention(q_, pos, entries, T, sizes, D**-0.5)
        o = o + kernels.selected_attention(q_, pos, tokens, lists, sizes, D**-0.5)
        o = o + kernels.window_attention(q_, tokens, 512, D**-0.5)
        grads = torch.autograd.grad(o, leaves, weight.expand_as(o).contiguous())
        results.append([x[:, -heads:].clone() for x, heads in zip((o, lists, *grads), (h, 1, h, 1, 1, 1, 1))])
        del o, lists, grads
    for what, a, b in zip(("output", "lists", "dq", "dk", "dv", "dk of blocks", "dv of blocks"), *results):
        # Few blocks are split over more programs when alone. Where they are not, a sum runs over 2 million
        # rows on the tensor cores: 0.55 % were seen, and we think that they truncate.
        same = off(a, b) < 1e-2 if "blocks" in what else torch.equal(a, b)
        assert same, f"{what}: the last group alone differs by {off(a, b):.1e}"


def test_rope_kernel_equals_rope_with_gradient():
    x, pos = (
        torch.randn(2, 3, 31, 12, device=DEVICE, requires_grad=True),
        torch.randint(4096, (2, 31), device=DEVICE),
    )
    for at, part in (
        (pos, x),
        (pos[:1] + 0.5, x[..., 1:11]),
        (pos[:, ::2], x[:, :, ::2]),
    ):  # fractions, one row of positions, strides
        results = []
        for wanted in (True, False):
            with kernels_in_use(wanted):
                y = rope(part, at)
            weight = torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y)
            results.append([y, *torch.autograd.grad((y * weight).sum(), x, retain_graph=True)])
        for what, a, b in zip(("output", "gradient"), *results):
            close(a, b, 2e-3, f"rope, {what}, x of {tuple(part.shape)}")


def test_rope_and_append_reach_far():
    """Elements 2^31 apart are addressed, and more than 2^16 tokens fit into the grid of one launch, whose second and third axis end there."""
    if kernels.triton is None:
        raise unittest.SkipTest("needs Triton")
    try:
        memory = torch.empty(
            2**31 + 32, dtype=torch.float16, device=DEVICE
        )  # 4 GB of addresses; three rows of it are touched
    except RuntimeError:
        raise unittest.SkipTest("needs 4 GB")
    x = memory.as_strided((1, 1, 3, 8), (8, 8, 2**30 + 8, 1)).copy_(torch.arange(24).view(1, 1, 3, 8))
    close(
        kernels.rope(x, torch.zeros(1, 3, device=DEVICE)),
        torch.arange(24.0, device=DEVICE).view(1, 1, 3, 8).half(),
        0,
        "turned by nothing",
    )

    class Grid:
        def __getitem__(self, grid):
            self.grid = grid
            return lambda *args, **more: None

    T, grid = 70_000, Grid()
    with swapped(kernels, "write_slots_kernel", grid):
        new, buffer = torch.empty(3, 2, T, 1), torch.empty(3, 2, T, 1)
        kernels.write_slots(
            torch.zeros(3), [buffer, buffer[..., 0]], [new, new[..., 0]], torch.zeros(3), False
        )
    assert grid.grid == (T, 3, 2), f"(tokens, rows, heads), not {grid.grid}"


@torch.no_grad()
def decode_equals_attend():
    """Ragged rows, positions per head or not, windows, latents as values, few and many queries, one share of the slots and several."""
    for G, h, T, D, D2, window, S, heads in (
        (2, 3, 1, 16, 0, None, 600, 2),
        (2, 4, 7, 16, 0, None, 70, 1),
        (1, 8, 7, 40, 8, 30, 70, 1),
        (2, 4, 3, 24, 8, None, 300, 2),
        (1, 1, 100, 12, 4, 9, 40, 1),
        (1, 16, 9, 24, 8, 30, 70, 1),
    ):
        B, length = 3, torch.tensor([S, S // 3, 5], device=DEVICE)
        slot = torch.arange(S, device=DEVICE)
        k_pos = torch.where(slot < length[:, None, None], slot * 2, -1)  # others were evicted
        k_pos = k_pos.expand(B, heads, S).int()
        q, k = torch.randn(B, G * h, T, D + D2, device=DEVICE), torch.randn(B, G, S, D, device=DEVICE)
        v = None if D2 else torch.randn(B, G, S, 20, device=DEVICE)
        k2 = torch.randn(B, 1, S, D2, device=DEVICE) if D2 else None
        hide = lambda x: (
            x if x is None else x.masked_fill(slot[:, None] >= length[:, None, None, None], math.nan)
        )
        pos = (2 * length - 2)[:, None] + torch.arange(T, device=DEVICE)
        got = la.cached_attention(q, pos, la.Keys(hide(k), hide(v), hide(k2), k_pos, length), 0.3, window)
        want = la.cached_attention.definition(q, pos, la.Keys(k, v, k2, k_pos, length), 0.3, window)
        seen = visible(pos, k_pos, window).any(-1).repeat_interleave(G * h // heads, 1)[..., None]
        close(
            got,
            torch.where(seen, want, 0),
            1e-5,
            f"{G} x {h} heads, T {T}, {D} + {D2}, window {window}, S {S}",
        )


def test_decode_attention_kernel_equals_attend():
    with kernels_in_use():
        right = kernels.cached_attention
        decode_equals_attend()
        late = lambda q, q_pos, *rest: right(q, q_pos + 2, *rest)  # one entry too many is read
        short = lambda q, q_pos, keys, *rest: right(q, q_pos, keys._replace(length=keys.length - 1), *rest)
        for wrong in (late, short):
            with fast("cached_attention", wrong):
                fails(decode_equals_attend)


@torch.no_grad()
def test_decoding_on_kernels_equals_the_reference():
    """Whole models, token by token and ragged, through all kernels; rings, rejected drafts, one-number counts."""
    T, plan = 80, (66, [1, 3], [3, 0], 1)
    for attn in KINDS:
        model = lm(attn, layers=2).float().to(DEVICE)
        text, results = text_of(model, 2, T).to(DEVICE), []
        for wanted in (True, False):
            with kernels_in_use(wanted):
                cache, out = model.new_cache(2, T), []
                for count in plan:
                    count = torch.as_tensor(count, device=DEVICE).expand(2)
                    pos = cache.seen[:, None] + torch.arange(int(count.max()), device=DEVICE)
                    logits = model(text.gather(1, pos), cache, count)
                    out.append(logits[torch.arange(pos.shape[1], device=DEVICE) < count[:, None]])
                    cache.rollback(cache.seen - (count > 2).long())  # a rejected draft
                parts = [part for layer in cache.layers for name, part in layer.items() if name != "lists"]
                results.append([torch.cat(out), *(part.data["k"] for part in parts)])
        for a, b in zip(*results):
            close(a, b, 2e-4, f"{attn}: kernels against the reference, logits and caches")


@torch.no_grad()
def test_decode_attention_splits_and_lists():
    with kernels_in_use():
        B, H, G, T, S, D = 2, 6, 2, 3, 600, 16
        new = lambda *shape: torch.randn(B, *shape, device=DEVICE)
        q, k, v, k2 = new(H, T, D + 8), new(G, S, D), new(G, S, 24), new(1, S, 8)
        length = torch.tensor([600, 333], device=DEVICE)
        slot = torch.arange(S, device=DEVICE)
        k_pos = torch.where(slot < length[:, None, None], slot, -1).expand(B, G, S).int()
        pos = length[:, None] - T + torch.arange(T, device=DEVICE)
        for value in (v, None):
            keys = la.Keys(k, value, k2, k_pos, length)
            for window in (None, 70):
                want = la.cached_attention.definition(q, pos, keys, 0.3, window)
                close(la.cached_attention(q, pos, keys, 0.3, window), want, 1e-5, f"slots, window {window}")
        keys = la.Keys(k, v, k2, k_pos, length)
        for block, n, size in ((16, 20, kernels.BYTES), (64, 4, 0)):  # the second: tiles of half a block
            sizes = nsa.Blocks(block, block, block, n)
            lists = nsa.select_blocks(torch.rand(B, G, T, -(-S // block), device=DEVICE), pos, sizes)
            want = nsa.selected_attention.definition(q, pos, keys, lists, sizes, 0.3)
            with swapped(kernels, "BYTES", size):
                got = nsa.selected_attention(q, pos, keys, lists, sizes, 0.3)
            close(got, want, 1e-5, f"slots of a list, blocks of {block}")


@torch.no_grad()
def decode_blocks_equals_read_blocks():
    """Outputs and lists: NSA's and ASA's blocks, rows of all lengths, one query and several, heads that fill a tile, one share and more."""
    for l, d, block, n, h, T, S in (
        (16, 16, 16, 6, 4, 1, 400),
        (32, 16, 64, 12, 3, 2, 150),
        (16, 16, 16, 20, 16, 8, 140),
        (8, 4, 16, 5, 1, 1, 90),
    ):
        B, G, D, sizes = 3, 2, 16, nsa.Blocks(l, d, block, n)
        count = torch.tensor([S, S // 2, 0], device=DEVICE)  # entries of each row
        at = torch.arange(S, device=DEVICE)
        k_pos = torch.where(at < count[:, None], at * d + l - 1, -1)[:, None].int()
        new = lambda *shape: torch.randn(B, *shape, device=DEVICE)
        q, keys = new(G * h, T, D + 8), la.Keys(new(G, S, D), None, new(1, S, 8), k_pos, count)
        end = (count - 1) * d + l - 1  # where the last entry ends: the first queries do not see it
        pos, tokens = (end[:, None] - T // 2 + torch.arange(T, device=DEVICE)).clamp(min=0), S * d + l + T
        want, lists = nsa.compressed_attention.definition(q, pos, keys, tokens, sizes, 0.3)
        for sms in (132, 1):  # several shares, or one
            with swapped(kernels, "SMS", sms):
                o, got = nsa.compressed_attention(q, pos, keys, tokens, sizes, 0.3)
            close(o, want, 1e-5, f"compressed entries, {h} heads, {T} queries, {sms} SMs: outputs")
            assert torch.equal(got.long(), lists), (
                f"compressed entries, blocks of {block} by {l} / {d}: lists"
            )


def test_decode_blocks_kernel_equals_read_blocks():
    with kernels_in_use():
        right = kernels.compressed_attention
        decode_blocks_equals_read_blocks()
        turned = lambda q, pos, keys, *rest: right(q, pos, keys._replace(k=keys.k.flip(2)), *rest)
        # entries as long as their stride
        short = lambda q, pos, keys, tokens, sizes, scale: right(
            q, pos, keys, tokens, sizes._replace(l=sizes.d), scale
        )
        for wrong in (turned, short):
            with fast("compressed_attention", wrong):
                fails(decode_blocks_equals_read_blocks)


def test_draws_and_commits_compiled_equal_mtp():
    """On a GPU torch.compile makes kernels of them; on a CPU there is nothing to compare."""
    if not CUDA:
        raise unittest.SkipTest("needs CUDA")
    draw, commit = (kernels.PAIRS[name][1] for name in ("draw", "commit"))
    B, V, K, width = 9, 37, 4, 20
    to = lambda x: x.to(DEVICE)
    if True:
        for temperature in (0, 0.7, 1.0):
            logits, noise = to(torch.randn(B, 2, V) * 3), to(torch.empty(B, 2, V).exponential_())
            p, token = draw(logits, temperature, noise)
            close(p, mtp.law(logits, temperature), 1e-6, f"law at temperature {temperature}")
            assert torch.equal(token, (mtp.law(logits, temperature) / noise).argmax(-1)), (
                f"tokens at temperature {temperature}"
            )
        for case in range(20):
            g = case % 5
            p, q = (to((torch.randn(B, n, V) * 2).softmax(-1)) for n in (g + 1, g))
            q = p[:, :g] if case % 7 == 6 else q  # q = p: nothing is refused
            known, active = to(torch.randint(2, 9, (B,))), to(torch.rand(B) < 0.8)
            given, limit = known + to(torch.randint(-2, 3, (B,))), known + to(torch.randint(1, 8, (B,)))
            drafts, u, noise = (
                to(torch.randint(V, (B, g))),
                to(torch.rand(B, g)),
                to(torch.empty(B, V).exponential_()),
            )
            text = to(torch.randint(V, (B, width)))
            state = mtp.State(
                text,
                to(torch.zeros(B, width)),
                known,
                given,
                limit,
                active,
                to(torch.zeros(B, 3, K)),
                to(torch.zeros(B, 2)),
            )
            place = known[:, None] + torch.arange(g, device=DEVICE)
            drafts = torch.where(
                place < given[:, None], text.gather(1, place), drafts
            )  # a prompt is a draft that is right
            both = []
            for f in (commit, mtp.commit.definition):
                mine = mtp.State(*(x.clone() for x in state))
                both.append([f(p, q, drafts, u, noise, mine, case), *mine])
            for what, a, b in zip("taken text logp known given limit active counts reads".split(), *both):
                close(a, b, 1e-5, f"commit, case {case}: {what}")


def test_pairs_have_one_signature():
    """A definition and its fast function take the same arguments; a definition without one is compiled."""
    for name, (definition, f) in kernels.PAIRS.items():
        if not isinstance(f, kernels.Compiled):
            assert inspect.signature(definition) == inspect.signature(f), name
            assert definition.__name__ == f.__name__ == name and "jit" not in type(f).__name__.lower()


# ---------------------------------------------------------------------------------------------------------------------------------
# decoding


def decode(model, text, plan, margin=8):
    """Feed text (B, T) in calls of plan's sizes: ints, or (B,) counts for ragged rows; -> logits (B, T, V) as they came."""
    B, T = text.shape
    cache, out = (
        model.new_cache(B, T, margin, dtype=torch.float64),
        torch.full((B, T, model.cfg.vocab), torch.nan).double(),
    )
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


@slow
def test_decoding_equals_forward():
    for attn in KINDS:
        decoding_equals_forward(attn)
    one = {"1 token": [1] * 110}
    fresh_at_every_step = lambda self, lists, pos, count, cache: lists
    with swapped(nsa.ASAGlobal, "shared_lists", fresh_at_every_step):
        fails(decoding_equals_forward, "asa", one)
    with swapped(
        nsa, "find", lambda k_pos, want: (want - 1).clamp(0, k_pos.shape[1] - 1)
    ):  # blocks made one token too early
        fails(decoding_equals_forward, "nsa", one)


@torch.no_grad()
def rollback_equals_forward(attn, T=100):
    model, draw = lm(attn), random.Random(2)
    text, wrong = text_of(model, 3, T + 8), text_of(model, 3, T + 8)
    full = model(text[:, :T])
    cache = model.new_cache(3, T + 8, dtype=torch.float64)
    model(text[:, :7], cache, torch.tensor([7, 3, 5]))
    while (
        int(cache.seen.min()) < T
    ):  # a draft of wrong tokens is read, part of it taken back; then right ones
        before = cache.seen.clone()
        pos = before[:, None] + torch.arange(8)
        keep = torch.tensor([draw.randint(0, 3) for _ in range(3)]).minimum((T - before).clamp(min=0))
        tokens = torch.where(
            torch.arange(8) < keep[:, None],
            text.gather(1, pos.clamp(max=T + 7)),
            wrong.gather(1, pos.clamp(max=T + 7)),
        )
        logits = model(tokens, cache, (T + 8 - before).clamp(max=8))
        for b in [b for b in range(3) if keep[b]]:
            got, want = logits[b, : keep[b]], full[b, before[b] : before[b] + keep[b]]
            close(got, want, 1e-12, f"{attn}: row {b} at {int(before[b])} after rejected drafts")
        cache.rollback(before + keep)


def test_rejected_drafts_leave_no_trace():
    for attn in KINDS:
        rollback_equals_forward(attn)
    with swapped(
        train_lm.Cache, "rollback", lambda self, seen: self.seen.copy_(seen)
    ):  # positions set back, slots not
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
            close(
                decode(model, text[b : b + 1], [[c[b]] for c in plan if c[b]]),
                both[b : b + 1],
                1e-12,
                f"{attn}: row {b} alone",
            )


# ---------------------------------------------------------------------------------------------------------------------------------
# mtp.py: the module and its losses


def test_losses_have_their_gradients():
    """TV and end-to-end TV against finite differences and against their formulas; the other losses against what they reduce to."""
    K, V, T = 3, 7, 8
    p = torch.randn(2, T, V).double().softmax(-1)
    tokens, mask = torch.randint(V, (2, T)), torch.ones(2, T).double()
    head = torch.eye(V).double()  # the states are the logits
    z = [torch.randn(2, T - k, V).double() for k in range(1, K + 1)]
    e2e = lambda z: mtp.e2e_loss(z, head, p, mask)
    leaves = [x.clone().requires_grad_() for x in z]
    grads = torch.autograd.grad(e2e(leaves), leaves)
    for k, t, v in [(k, t, v) for k in range(K) for t in (0, T - k - 3) for v in range(V)]:
        step = [x.clone() for x in z]
        step[k][1, t, v] += 1e-6
        up = e2e(step)
        step[k][1, t, v] -= 2e-6
        what = f"end-to-end TV, depth {k + 1}, row {t}, logit {v}"
        close(grads[k][1, t, v], (up - e2e(step)) / 2e-6, 1e-8, what)
    z1, p1 = torch.randn(5, V).double().requires_grad_(), torch.randn(5, V).double().softmax(-1)
    q = z1.softmax(-1)
    below = (q <= p1).double()
    formula = -q * (below - (below * q).sum(-1, keepdim=True))
    close(
        torch.autograd.grad(mtp.tv(z1, p1).sum(), z1)[0], formula, 1e-12, "TV's gradient, -q (1[q <= p] - S)"
    )
    close(torch.autograd.grad(mtp.soft_ce(z1, p1).sum(), z1)[0], q - p1, 1e-12, "soft CE's gradient, q - p")
    one = mtp.tv(z[0][:, : T - 2], p[:, 1 : T - 1]).mean()
    close(e2e(z[:1]), one, 1e-12, "end-to-end TV at one depth is TV")
    hot = F.one_hot(tokens, V).double().roll(-1, 1)  # row s of the trunk predicts x_{s+1}
    hard = [
        F.cross_entropy(x[:, : T - k - 1].transpose(1, 2), tokens[:, k + 1 :]) for k, x in enumerate(z, 1)
    ]
    weight = [1 / 1.96, 0.6 / 1.96, 0.36 / 1.96]
    want = sum(w * x for w, x in zip(weight, hard))
    close(mtp.soft_loss(z, head, hot, mask), want, 1e-7, "soft CE on one-hot is CE; weights fall by 0.6")
    flat = [torch.zeros_like(x) for x in z]
    close(
        mtp.e2e_loss(flat, head, torch.full_like(p, 1 / V), mask) + 1,
        one.new_ones(()),
        1e-12,
        "q = p: no loss",
    )
    far = [100 * F.one_hot(torch.zeros(2, T - k).long(), V).double() for k in range(1, 4)]
    other = F.one_hot(torch.ones(2, T).long(), V).double()
    close(mtp.e2e_loss(far, head, other, mask), one.new_ones(()), 1e-12, "nothing in common: all is lost")


def test_depth_masks_equal_a_loop():
    mask, K = (torch.rand(3, 20) < 0.8).double(), 4
    for k, m in enumerate(mtp.depth_masks(mask, K), 1):
        for b, s in [(b, s) for b in range(3) for s in range(20 - k - 1)]:
            want = all(mask[b, s + j] for j in range(1, k + 2))  # every token between, and the target
            assert bool(m[b, s]) == want, f"depth {k}, row {s} of text {b}"
        assert m.shape == (3, 20 - k - 1), "the last row with a target"


def drafter(attn, K, **changes):
    """A tiny model in fp64 with a module, whose distributions are far from uniform."""
    model = lm(attn, mtp=K, **changes)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model.eval()


def test_the_trunk_gets_no_gradient_from_the_module():
    for attn in KINDS:
        model = drafter(attn, 3, layers=2)
        x, y, w = text_of(model, 2, 70), text_of(model, 2, 70), torch.ones(2, 70)
        trunk = [p for n, p in model.named_parameters() if not n.startswith("mtp.")]
        with_module = torch.autograd.grad(train_lm.Objective(model)(x, y, w)[0], trunk)
        module, model.mtp = model.mtp, None
        without = torch.autograd.grad(train_lm.Objective(model)(x, y, w)[0], trunk)
        assert all(torch.equal(a, b) for a, b in zip(with_module, without)), (
            f"{attn}: the trunk's gradient changes with the module"
        )
        h = model.hidden(x)
        p = model.head(h).softmax(-1)
        for kind in (mtp.soft_loss, mtp.e2e_loss):
            states = module.unroll(h, x, model.embed.weight, 3)
            loss = kind(states, model.head.weight, p, torch.ones(2, 70))
            found = torch.autograd.grad(loss, trunk, allow_unused=True, retain_graph=True)
            assert all(g is None for g in found), f"{attn}, {kind.__name__}: the draft loss reaches the trunk"
            own = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
            assert all(g is not None and g.abs().max() > 0 for g in own), (
                f"{attn}, {kind.__name__}: the module learns"
            )


def test_one_module_for_all_depths():
    count = lambda K: sum(p.numel() for p in LM(tiny("gqa", mtp=K)).mtp.parameters())
    assert count(1) == count(5), "parameters do not depend on K"
    model = drafter("gqa", 1)
    x = text_of(model, 2, 20)
    h, m = model.hidden(x), model.mtp
    norm = lambda x, w: F.rms_norm(x, w.shape, w, 1e-6)
    W = torch.cat([m.join_h.weight, m.join_e.weight], dim=1)  # (C, 2C): DeepSeek-V3's one matrix
    u = torch.cat([norm(h[:, :-1], m.norm_h), norm(model.embed(x[:, 1:]), m.norm_e)], -1) @ W.T
    want = norm(m.block(u, torch.arange(19)[None]), m.norm_out)
    close(m.unroll(h, x, model.embed.weight, 1)[0], want, 1e-12, "depth 1 is DeepSeek-V3's module")
    two = m.unroll(h, x, model.embed.weight, 3)
    assert [t.shape[1] for t in two] == [19, 18, 17] and torch.equal(
        two[0], m.unroll(h, x, model.embed.weight, 1)[0]
    )


@torch.no_grad()
def drafts_see_what_training_saw(attn, K=4):
    """Every draft's distribution, over rounds of ragged acceptance, equals the training pass's on the same tokens."""
    model, seen = drafter(attn, K), []
    decoder = mtp.Decoder(model, 3, 120, model.mtp, K, drafts=K)
    prompts = [text_of(model, 1, n)[0] for n in (2, 17, 33)]
    decoder.fill(range(3), prompts, [110] * 3)
    original = mtp.draw
    for number in range(20):
        g = (K, 2, 0, 1)[
            number % 4
        ]  # while there are no drafts the module falls behind, and catches up at once
        if g == 0:
            decoder.rounds(0, 3)
            continue
        known, drawn = decoder.state.known.clone(), []
        with swapped(mtp, "draw", lambda z, *a: (drawn.append(original(z, *a)), drawn[-1])[1]):
            drafts, _ = decoder.round(g)
        for b in range(3):
            text = torch.cat([decoder.state.text[b, : known[b]], drafts[b]])[
                None
            ]  # what was known, then the drafts
            states = model.mtp.unroll(model.hidden(text), text, model.embed.weight, g)
            for k in range(g):
                want = model.head(states[k][0, known[b] - 2]).softmax(-1)
                close(
                    drawn[k][0][b, 0],
                    want,
                    1e-12,
                    f"{attn}: row {b} at {int(known[b])}, draft {k + 1} of {g}",
                )
                seen.append(k)
    assert seen.count(K - 1) == 15 and decoder.state.known.min() > 30, "a test of many rounds"


def test_drafts_see_what_training_saw():
    for attn in KINDS:
        drafts_see_what_training_saw(attn)
    catch_up = mtp.Drafter.catch_up
    with swapped(
        mtp.Drafter, "catch_up", lambda self, text, h, count: catch_up(self, text, h.roll(1, 1), count)
    ):  # states of the token before
        fails(drafts_see_what_training_saw, "gqa")


# ---------------------------------------------------------------------------------------------------------------------------------
# mtp.py: verification and decoding

DRAWS = 200_000


def within_errors(count, law, what, errors=4):
    """Counted outcomes against exact probabilities: each within `errors` standard errors (one that is expected less than 10 times, of 10)."""
    n = count.sum()
    rate = law.clamp(10 / n, 1 - 10 / n)
    miss = (count / n - law).abs() / (rate * (1 - rate) / n).sqrt()
    assert miss.max() <= errors, (
        f"{what}: outcome {miss.argmax()} is {miss.max():.1f} standard errors off over {int(n)} draws"
    )


def accept_is_lossless(g, greedy, temperature):
    """Drafts from q, verified against p, where both depend on the whole path: the first g + 1 tokens are distributed as p."""
    V = 3 if g < 4 else 2
    rng = torch.Generator().manual_seed(10 * g + greedy)
    table = lambda depth, t: mtp.law(
        2 * torch.randn(*[V] * (depth + 1), generator=rng).double(), t
    )  # (V, .., V): a law for each path
    p, q = (
        [table(k, temperature) for k in range(g + 1)],
        [table(k, 0 if greedy else temperature) for k in range(g)],
    )
    sample = lambda law: (law / torch.empty(DRAWS, V).double().exponential_()).argmax(-1)
    at = lambda tables, path: tables[tuple(path.T)] if path.shape[1] else tables.expand(DRAWS, V)
    drafts = torch.zeros(DRAWS, 0).long()
    for k in range(g):
        drafts = torch.cat([drafts, sample(at(q[k], drafts))[:, None]], 1)
    p_rows, q_rows = (
        torch.stack([at(law, drafts[:, :k]) for k, law in enumerate(laws)], 1) for laws in (p, q)
    )
    n, last = mtp.accept(
        p_rows,
        q_rows,
        drafts,
        torch.zeros_like(drafts).bool(),
        torch.rand(DRAWS, g).double(),
        torch.empty(DRAWS, V).double().exponential_(),
    )
    text = torch.where(
        torch.arange(g + 1) < n[:, None], F.pad(drafts, (0, 1)), last[:, None]
    )  # (DRAWS, g + 1)
    exact = p[0]
    for k in range(1, g + 1):  # what the round left open is drawn from p
        text[:, k] = torch.where(n < k, sample(at(p[k], text[:, :k])), text[:, k])
        exact = exact[..., None] * p[k]
    code = (text * V ** torch.arange(g, -1, -1)).sum(-1)
    kind = "greedy" if greedy else "sampled"
    within_errors(
        torch.bincount(code, minlength=V ** (g + 1)),
        exact.flatten(),
        f"{g} {kind} drafts, temperature {temperature}",
    )


@slow
def test_verification_is_lossless():
    for g, greedy, temperature in [
        (g, greedy, t) for g in range(1, 6) for greedy in (False, True) for t in (0.7, 1.0)
    ]:
        accept_is_lossless(g, greedy, temperature)
    for greedy in (False, True):
        accept_is_lossless(3, greedy, 0)
    for wrong in (
        ("(p_n - q_n).clamp(min=0)", "p_n"),
        ("(p_n - q_n)", "(q_n - p_n)"),  # what is drawn after a refusal
        (
            "here = n[:, None, None]",
            "here = n.clamp(max=g - 1)[:, None, None]",
        ),  # the bonus from p_g instead of p_{g+1}
        ("cumprod(1).sum(1)", "sum(1)"),
        ("u * q_draft", "u"),
    ):
        with swapped(mtp, "accept", mutant(mtp.accept, *wrong)):
            fails(accept_is_lossless, 3, False, 1.0)


def test_verification_at_its_extremes():
    B, g, V = 50_000, 3, 6
    u, noise, free = torch.rand(B, g), torch.empty(B, V).exponential_(), torch.zeros(B, g).bool()
    p = torch.randn(1, g + 1, V).softmax(-1).expand(B, -1, -1)
    drafts = torch.multinomial(p[0, :g], B, replacement=True).T
    assert (mtp.accept(p, p[:, :g], drafts, free, u, noise)[0] == g).all(), "q = p: every draft is accepted"
    low, high = torch.tensor([0.5, 0.5, 0, 0, 0, 0]), torch.tensor([0, 0, 0.7, 0.2, 0.1, 0])
    drafts = torch.multinomial(low, B * g, replacement=True).view(B, g)
    n, last = mtp.accept(high.expand(B, g + 1, V), low.expand(B, g, V), drafts, free, u, noise)
    assert (n == 0).all(), "nothing in common: no draft is accepted"
    within_errors(torch.bincount(last, minlength=V)[2:5], high[2:5], "and the first token comes from p")
    one = torch.ones(1, V)
    for forced in (
        False,
        True,
    ):  # a given token counts as accepted whatever p says, and the token behind it is drawn from its own law
        n, last = mtp.accept(
            torch.stack([high, low], 0)[None],
            low[None, None],
            torch.tensor([[1]]),
            torch.tensor([[forced]]),
            torch.zeros(1, 1) + 0.5,
            one,
        )
        assert n.item() == int(forced) and (last.item() in (0, 1)) == forced


def speculator(V=3, dtype=torch.float32, attn="gqa", **changes):
    """As `drafter`, so small that every continuation can be enumerated."""
    return drafter(
        attn, 5, vocab=V, **{"layers": 1, "width": 8, "heads": 2, "groups": 1, "ffn": 8, **changes}
    ).to(dtype)


@torch.no_grad()
def decoding_is_lossless(K, temperature, draws=DRAWS, new=3, rows=12_000):
    """The engine's texts, rows of three prompts side by side, against the exact law of all continuations."""
    model, V = speculator(), 3
    prompts = [text_of(model, 1, n)[0] for n in (1, 2, 4)]
    decoder = mtp.Decoder(model, rows, 7, model.mtp, K, temperature, drafts=K)
    given, count = [prompts[i % 3] for i in range(rows)], torch.zeros(3, V**new)
    for _ in range(-(-draws // rows)):
        decoder.fill(
            range(rows), given, [len(p) + new for p in given], at_once=K == 2
        )  # else prompts ride along as forced drafts
        while decoder.state.active.any():
            decoder.round(K)
        for i, p in enumerate(prompts):
            code = (decoder.state.text[i::3, len(p) : len(p) + new] * V ** torch.arange(new - 1, -1, -1)).sum(
                -1
            )
            count[i] += torch.bincount(code, minlength=V**new)
    texts = torch.cartesian_prod(*[torch.arange(V)] * new)  # (V^new, new)
    for i, p in enumerate(prompts):
        whole = torch.cat([p.expand(len(texts), -1), texts], 1)
        logp = mtp.law(model(whole[:, :-1]), temperature).log()[:, len(p) - 1 :]
        exact = logp.gather(-1, texts[..., None])[..., 0].sum(-1).exp()
        within_errors(count[i], exact, f"{K} drafts, temperature {temperature}, prompt of {len(p)}")


@slow
def test_decoding_is_lossless():
    for K, temperature in ((1, 0.7), (2, 0.7), (3, 1.0), (4, 1.0), (5, 0.7)):
        decoding_is_lossless(K, temperature)
    stays = mutant(
        mtp.Decoder.round, "rollback(state.known - 1)", "rollback(state.known)"
    )  # a refused draft, in the cache
    with swapped(mtp.Decoder, "round", stays):
        fails(decoding_is_lossless, 3, 1.0, 40_000)


@slow
@torch.no_grad()
def test_greedy_text_is_the_same_with_drafts():
    """Temperature 0: plain decoding, the full forward pass and every way of drafting agree, token for token; refills, stops, limits."""
    for attn in KINDS:
        model = drafter(attn, 5, vocab=11)
        prompts = [text_of(model, 1, n)[0] for n in (1, 2, 30, 17, 5, 40, 33)]
        plain = [t for t, _ in mtp.Decoder(model, 7, 80, temperature=0).generate(prompts, 14)]
        for prompt, answer in zip(prompts, plain):
            whole = torch.cat([prompt, answer])[None]
            want = model(whole)[0, len(prompt) - 1 : -1].argmax(-1)
            assert torch.equal(answer, want) and len(answer) == 14, (
                f"{attn}: plain decoding against the full forward pass"
            )
        stop = plain[0][6].item()
        cut = [t[: t.tolist().index(stop) + 1] if stop in t else t for t in plain]
        assert any(len(t) < 14 for t in cut)
        for K, batch in ((1, 1), (2, 7), (3, 2), (4, 16), (5, 3)):
            drafts = None if batch == 3 else K
            decoder = mtp.Decoder(model, batch, 80, model.mtp, K, temperature=0, stop=stop, drafts=drafts)
            for (got, _), want in zip(decoder.generate(prompts, 14), cut):
                assert torch.equal(got, want), (
                    f"{attn}, K {K}, batch {batch}: {got.tolist()} instead of {want.tolist()}"
                )


@torch.no_grad()
def test_weights_may_change_between_calls():
    """A decoder that was made before an update draws and drafts like one that was made after it."""
    model, text, counts = drafter("gqa", 3, vocab=11), [], []
    prompts = [text_of(model, 1, n)[0] for n in (4, 9, 2)]
    decoder = mtp.Decoder(model, 3, 60, model.mtp, 3, temperature=0, drafts=3)
    first = decoder.generate(prompts, 30)
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
    decoder.state.counts.zero_()
    for d in (decoder, mtp.Decoder(model, 3, 60, model.mtp, 3, temperature=0, drafts=3)):
        text.append(torch.stack([t for t, _ in d.generate(prompts, 30)]))
        counts.append(d.state.counts)
    assert torch.equal(*text) and not torch.equal(text[0], torch.stack([t for t, _ in first]))
    close(*counts, 1e-9, "drafts reached, accepted, expected")


@slow
@torch.no_grad()
def test_any_number_of_drafts_at_any_time():
    """Drafts change from segment to segment, long stretches have none, looks come late as on a GPU, windows are shorter than drafts."""
    draw, late = (random.Random(0), mutant(mtp.Decoder.generate, "self.cuda and bool(todo)", "True"))
    for attn in KINDS:
        model = drafter(attn, 6, vocab=5, layers=2, window=2, context=400)
        prompts = [text_of(model, 1, n)[0] for n in (1, 2, 70, 17, 1, 40)]
        plain = [t for t, _ in mtp.Decoder(model, 6, 160, temperature=0).generate(prompts, 80)]
        decoder, plan = mtp.Decoder(model, 3, 160, model.mtp, 6, temperature=0), []

        def choose():
            if not plan:
                plan.extend([draw.randint(1, 6)] * draw.choice([1, 2]) + [0] * draw.choice([0, 1, 17, 33]))
            return plan.pop()

        with swapped(decoder.pace, "choose", choose), swapped(mtp.Decoder, "generate", late):
            for again in range(2):
                for (got, _), want in zip(decoder.generate(prompts, 80), plain):
                    assert torch.equal(got, want), (
                        f"{attn}, call {again + 1}: {got.tolist()} instead of {want.tolist()}"
                    )


@torch.no_grad()
def recorded_equals_forward(attn, temperature):
    model = drafter(attn, 3, vocab=11).float()
    prompts = [text_of(model, 1, n)[0] for n in (1, 20, 9, 33)]
    decoder = mtp.Decoder(model, 3, 80, model.mtp, 3, temperature=temperature, drafts=3)
    for prompt, (answer, logp) in zip(prompts, decoder.generate(prompts, 30)):
        logits = model(torch.cat([prompt, answer])[None])[0, len(prompt) - 1 : -1]
        want = (logits / temperature).log_softmax(-1).gather(-1, answer[:, None])[:, 0]
        close(logp, want, 1e-5, f"{attn}, temperature {temperature}: recorded log-probabilities")


@slow
def test_recorded_log_probabilities_are_the_targets():
    for attn, temperature in [(attn, t) for attn in KINDS for t in (0.7, 1.0)]:
        recorded_equals_forward(attn, temperature)
    drafters = mutant(
        mtp.commit, "p.gather(-1, y[..., None])", "F.pad(q, (0, 0, 0, 1), value=0.5).gather(-1, y[..., None])"
    )
    with swapped(mtp, "commit", drafters):
        fails(recorded_equals_forward, "gqa", 1.0)


@slow
@torch.no_grad()
def test_acceptance_is_predicted():
    """Counted over first rounds from one prompt: each depth, against sum min(p, q) there, and against the estimate without drafting."""
    K, rows, model = 3, 15_000, speculator(V=5)
    prompt = text_of(model, 1, 6)[0]
    for temperature in (1.0, 0.0):
        decoder = mtp.Decoder(model, rows, 12, model.mtp, K, temperature, drafts=K)
        decoder.fill(range(rows), [prompt] * rows, [12] * rows)
        decoder.round(K)
        (reached, accepted, chance), (rounds, tokens) = (
            decoder.state.counts.sum(0),
            decoder.state.reads.sum(0),
        )
        assert (
            rounds == rows == reached[0]
            and tokens == rows + accepted.sum()
            and torch.equal(reached[1:], accepted[:-1])
        )
        assert ((accepted - chance).abs() <= 4 * (reached / 4).sqrt()).all(), (
            f"temperature {temperature}: {accepted} counted, {chance} expected"
        )
        plain = mtp.Decoder(model, rows, 12, temperature=temperature)
        text = torch.cat(
            [prompt.expand(rows, -1), torch.stack([t for t, _ in plain.generate([prompt] * rows, 4)])], 1
        )
        for k in range(1, K + 1):
            x = text[
                :, : len(prompt) + k
            ]  # so long that depth k has one row with a target: the one that the decoder drafts from
            mask = (torch.arange(x.shape[1]) >= len(prompt) - 1).float().expand(rows, -1)
            h = model.hidden(x)
            rate = mtp.expected_acceptance(
                model.mtp.unroll(h, x, model.embed.weight, K)[:k],
                model.head.weight,
                mtp.law(model.head(h), temperature),
                x,
                mask,
                temperature,
            )[k - 1]
            error = (2 * 0.25 / rows) ** 0.5
            assert (rate - accepted[k - 1] / rows).abs() < 4 * error, (
                f"temperature {temperature}, depth {k}: {rate} estimated, {accepted[k - 1] / rows} counted"
            )


def test_the_number_of_drafts_follows_measurements():
    """Speculation that does not pay is switched off, and on again when it does, whatever the first measurement said."""
    for K in (1, 3, 4, 8):
        for odd in (None, 0, K):  # the first time of one choice is disturbed
            pace, disturbed = mtp.Pace(K), {odd}

            def play(rate, segments):
                used = []
                for _ in range(segments):
                    g = pace.choose()
                    tokens = 100 * sum(rate**k for k in range(g + 1))
                    pace.update(g, (1 + g / K / 2) * (5 if g in disturbed else 1), 100, tokens)
                    disturbed.discard(g)
                    used.append(g)
                return used[-100:]

            assert play(0.99, 400).count(K) > 90, f"K {K}, {odd} disturbed: accepted drafts pay"
            assert play(0.02, 400).count(0) > 90, (
                f"K {K}, {odd} disturbed: refused drafts do not, and are tried only now and then"
            )
            assert play(0.99, 400).count(K) > 90, (
                f"K {K}, {odd} disturbed: they are used again when they pay again"
            )
    fixed = mtp.Pace(4, fixed=2)
    assert [fixed.choose() for _ in range(9)] == [2] * 9


@torch.no_grad()
def test_counts_are_of_what_was_taken():
    """Tokens per read are those that were kept, and forgetting the counts leaves the measurements of the pace right."""
    model = drafter("gqa", 3, vocab=11)
    model.mtp.forward = lambda h, e, pos, cache=None, count=None, source=None: (
        torch.zeros_like(h),
        h,
    )  # drafts that mean nothing
    decoder = mtp.Decoder(model, 2, 60, model.mtp, 3, temperature=0, drafts=3)
    texts = decoder.generate([text_of(model, 1, n)[0] for n in (4, 9, 1, 30)], 2)
    rounds, tokens = decoder.state.reads.sum(0).tolist()
    assert tokens == sum(len(t) for t, _ in texts) == 8 and rounds <= 8, (rounds, tokens)
    decoder.forget_counts()
    heard = []
    with swapped(decoder.pace, "update", lambda g, ms, rounds, tokens: heard.append((rounds, tokens))):
        decoder.generate([text_of(model, 1, 4)[0]] * 2, 20)
    assert all(0 <= rounds <= tokens <= 16 for rounds, tokens in heard), heard
    assert sum(tokens for _, tokens in heard) == 40, heard
    for drafts in (-1, 4):
        try:
            mtp.Decoder(model, 2, 60, model.mtp, 3, drafts=drafts)
        except ValueError:
            continue
        raise AssertionError(f"{drafts} drafts of a module with 3 depths")
    model.norm.weight.fill_(math.nan)
    try:
        mtp.Decoder(model, 2, 60).generate([text_of(model, 1, 4)[0]], 3)
    except FloatingPointError:
        return
    raise AssertionError("a broken model went unnoticed")


def test_equip_trains_the_module_and_nothing_else():
    model = drafter("gqa", 3, vocab=11, layers=2)
    before = {n: p.clone() for n, p in model.named_parameters()}
    given = [text_of(model, 1, 4)[0] for _ in range(64)]
    with torch.no_grad():
        texts = torch.stack(
            [torch.cat([g, t]) for g, (t, _) in zip(given, mtp.Decoder(model, 64, 40).generate(given, 36))]
        )
    lines, rates = [], []
    for steps in (1, 60):
        rates.append(mtp.equip(model, model.mtp, texts, 4, 3, steps, rows=16, lr=1e-2, say=lines.append))
    assert rates[1].sum() > rates[0].sum() + 0.1, f"acceptance grows: {rates}"
    for n, p in model.named_parameters():
        assert n.startswith("mtp.") or torch.equal(p, before[n]) and p.grad is None, (
            f"{n} is not the module's"
        )
        assert not n.startswith("mtp.") or not torch.equal(p, before[n]), f"{n} was not trained"
    assert "length per read" in lines[-1]


class Counts(torch.nn.Module):
    """A trunk that shares no code with ours: its state is a matrix times how often each of the last 5 tokens of a row occurred, and where."""

    def __init__(self, V=9, C=32):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(V, C), torch.nn.Linear(C, V, bias=False)
        self.mix = torch.nn.Linear(5 * C, C)
        torch.nn.init.normal_(self.head.weight)

    class Cache:
        def __init__(self, batch, max_len):
            self.text, self.seen = torch.zeros(batch, max_len).long(), torch.zeros(batch).long()

        def rollback(self, seen):
            self.seen.clamp_(max=seen)

    def new_cache(self, batch, max_len, margin, dtype):
        return self.Cache(batch, max_len)

    def hidden(self, tokens, cache=None, count=None):
        B, T = tokens.shape
        cache = cache or self.Cache(B, T)
        place = cache.seen[:, None] + torch.arange(T)  # (B, T)
        real = torch.arange(T) < (torch.full((B,), T) if count is None else count)[:, None]
        for b, t in real.nonzero().tolist():
            cache.text[b, place[b, t]] = tokens[b, t]
        cache.seen += real.sum(1)
        back = place[..., None] - torch.arange(5)  # (B, T, 5)
        e = (
            self.embed(cache.text.gather(1, back.clamp(0, cache.text.shape[1] - 1).flatten(1)).view(B, T, 5))
            * (back >= 0)[..., None]
        )
        return self.mix(e.flatten(2)).tanh() * 3


def test_any_trunk_will_do():
    """mtp.py on a model that is no Transformer and has a cache of its own: equipped, then decoded with and without drafts."""
    trunk, cfg = Counts(), tiny("gqa", vocab=9, mtp=3)
    module = mtp.MTP(train_lm.Block(cfg, 0), 32)
    given = [torch.randint(9, (n,)) for n in (1, 6, 3)]
    with torch.no_grad():
        texts = torch.stack(
            [
                torch.cat([p, t])
                for p, (t, _) in zip(
                    [given[1]] * 48, mtp.Decoder(trunk, 48, 40).generate([given[1]] * 48, 30)
                )
            ]
        )
    before, after = (
        mtp.equip(trunk, module, texts, 6, 3, steps, rows=16, lr=1e-2, say=lambda line: None)
        for steps in (1, 60)
    )
    assert after.sum() > before.sum() + 0.1, f"acceptance grows: {before} to {after}"
    plain = mtp.Decoder(trunk, 3, 60, temperature=0).generate(given, 40)
    drafted = mtp.Decoder(trunk, 2, 60, module, 3, temperature=0, drafts=3).generate(given, 40)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(plain, drafted))


@slow
def test_a_run_with_a_module():
    """train_lm.py --mtp trains the trunk bit for bit as without; results/drafts.py works on a run and refuses anything else."""
    with tempfile.TemporaryDirectory() as tmp:
        tmp = pathlib.Path(tmp)
        common = [*QUICK, "--attn", "gqa", "--steps", 3, "--out", tmp]
        assert in_process(*common, "--name", "plain")[0] == 0
        code, out, _ = in_process(*common, "--name", "with", "--mtp", 2)
        assert code == 0 and "tokens per read" in out, out
        plain, both = (train_lm.load_checkpoint(tmp / n / "ckpt.pt")["model"] for n in ("plain", "with"))
        assert all(torch.equal(plain[n], both[n]) for n in plain) and any(n.startswith("mtp.") for n in both)
        assert losses(tmp / "plain") == losses(tmp / "with")
        drafts = results_script("drafts")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            drafts.equip_run(tmp / "plain", 3, 4, "cpu", samples=40, prompt=8, new=24)
            drafts.bench_run(tmp / "plain", "cpu", [2], new=12, prompt=8, times=2)
        assert (tmp / "plain" / "mtp.pt").exists() and out.getvalue().count("tokens per read;") == 3, (
            out.getvalue()
        )
        assert train_lm.load_run(tmp / "plain")[0].mtp is not None
        for args, word in (
            (["equip", tmp / "none"], "no checkpoint"),
            (["equip", tmp / "plain", "--steps", "0"], "at least 1"),
            (["bench", tmp / "with", "--batch", "0"], "at least 1"),
            (["bench", tmp / "with", "--colour", "red"], "unrecognized"),
            (["equip"], "required"),
        ):
            with contextlib.redirect_stderr(io.StringIO()) as err:
                code = drafts.main([str(a) for a in args])
            assert code == 2 and word in err.getvalue() and len(err.getvalue().splitlines()) == 1, (
                f"{args}: {code}, {err.getvalue()}"
            )
        state = train_lm.load_checkpoint(tmp / "plain" / "mtp.pt")
        train_lm.save_checkpoint(tmp / "plain" / "mtp.pt", {**state, "step": 2})
        with contextlib.redirect_stderr(io.StringIO()) as err:
            assert drafts.main(["bench", str(tmp / "plain")]) == 2 and "equip it again" in err.getvalue(), (
                err.getvalue()
            )
        (tmp / "plain" / "mtp.pt").write_bytes((tmp / "plain" / "mtp.pt").read_bytes()[:1000])
        with contextlib.redirect_stderr(io.StringIO()) as err:
            assert (
                drafts.main(["bench", str(tmp / "plain")]) == 2
                and "not a readable checkpoint" in err.getvalue()
            )


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
            q, k, v = (
                q.view(T, H, D),
                k.view(T, G, D).repeat_interleave(2, 1),
                v.view(T, G, D).repeat_interleave(2, 1),
            )
            half = lambda z: torch.cat([-z[..., D // 2 :], z[..., : D // 2]], -1)
            cos, sin = angle.cos().repeat(1, 2)[:, None], angle.sin().repeat(1, 2)[:, None]
            q, k = q * cos + half(q) * sin, k * cos + half(k) * sin
            w = (
                (torch.einsum("thd,shd->hts", q, k) / D**0.5)
                .masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf)
                .softmax(-1)
            )
            x = x + torch.einsum("hts,shd->thd", w, v).reshape(T, H * D) @ block.attn.out.weight.T
            y = norm(x, block.ffn_norm.weight)
            x = x + (F.silu(y @ block.gate.weight.T) * (y @ block.up.weight.T)) @ block.down.weight.T
        head = model.embed.weight if tied else model.head.weight
        close(
            model(text)[0], norm(x, model.norm.weight) @ head.T, 1e-12, f"Llama's forward pass, tied {tied}"
        )


def test_recompute_changes_nothing():
    for attn in KINDS:
        grads = []
        for recompute in (False, True):
            torch.manual_seed(0)
            model = lm(attn, recompute=recompute)
            model(text_of(model, 2, 50)).square().sum().backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        close(*grads, 1e-12, f"{attn}: gradients with recomputed blocks")


def test_greedy_decoding_equals_forward():
    for attn in KINDS:
        model = lm(attn).float()
        prompt = text_of(model, 2, 5)
        answers = mtp.Decoder(model, 2, 45, temperature=0.0).generate(list(prompt), 40)
        text = torch.cat([prompt, torch.stack([tokens for tokens, _ in answers])], dim=1)
        with torch.no_grad():
            assert torch.equal(model(text[:, :-1]).argmax(-1)[:, 4:], text[:, 5:]), (
                f"{attn}: greedy text = argmax of the forward pass"
            )


def test_presets_have_the_sizes_they_claim():
    for name, low, high in (
        ("small", 0.8e6, 1.25e6),
        ("base", 27e6, 37e6),
        ("340m", 280e6, 400e6),
        ("1.3b", 1.1e9, 1.5e9),
    ):
        for attn in KINDS:
            cfg = Config(
                **{
                    **train_lm.PRESETS[name],
                    "attn": attn,
                    "vocab": 257 if name in ("small", "base") else 32000,
                }
            )
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


@slow
def test_data_is_split_by_text_and_read_in_pieces():
    with tempfile.TemporaryDirectory() as tmp:
        tmp, draw = pathlib.Path(tmp), random.Random(0)
        texts = [f"text {i}\n" * draw.randint(30, 60) for i in range(11)]
        texts[3] = "".join(
            f"line {i}, äöü 漢字\n" for i in range(120000)
        )  # larger than a piece, characters of several bytes
        for i, t in enumerate(texts):
            (tmp / f"{i:02}.txt").write_text(t)
        (tmp / "11.txt").write_bytes(b"not utf-8: \xff\xfe\n")
        files = sorted(str(f) for f in tmp.glob("*.txt"))
        (tmp / "1").mkdir()
        data = prepared(tmp / "1", data=files)
        text = lambda part: data.enc.decode_bytes([t for t in data.tokens[part] if t != 256]).decode()
        assert text("val") == texts[9], "every tenth text is for validation"
        assert (
            text("train") == "".join(t for i, t in enumerate(texts) if i != 9) + "not utf-8: \ufffd\ufffd\n"
        )
        ends = [int((data.tokens[part] == 256).sum()) for part in ("train", "val")]
        assert ends == [11, 1] and isinstance(data.tokens["train"], np.memmap), (
            "one end of text each, memory mapped"
        )
        first = data.info["sha256"]
        (tmp / "00.txt").write_text("changed")
        (tmp / "2").mkdir()
        assert prepared(tmp / "2", data=files).info["sha256"] != first, "the hash follows the text"
        (tmp / "3").mkdir()
        one = prepared(tmp / "3", data=[files[3]])
        assert 0.05 < one.info["val"] / one.info["train"] < 0.2, (
            "of a single text the last tenth is for validation"
        )
    assert [n for n, _ in train_lm.sources(Config(preset="base"))] == sorted(
        n for n, _ in train_lm.sources(Config(preset="base"))
    )
    assert not any(
        {"test", "tests", "site-packages"} & set(n.split("/"))
        for n, _ in train_lm.sources(Config(preset="base"))
    )


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
                assert text[lead - distance :].startswith(statement), (
                    f"{statement} was told {distance} tokens before"
                )
                assert text.rfind(statement, 0, lead + len(statement) - 1) == lead - distance, (
                    "the distance is to the latest telling"
                )
        assert seen > 40


def test_sequences_grow_to_the_context():
    with tempfile.TemporaryDirectory() as tmp:
        data = prepared(pathlib.Path(tmp), preset="small", context=1024, batch=2, steps=10, grow=0.4)
        assert [data.length(step) for step in range(10)] == [256] * 2 + [512] * 2 + [1024] * 6, [
            data.length(s) for s in range(10)
        ]
        for step in (0, 2, 9):
            x, y, w = data.batch(step)
            assert x.shape == y.shape == w.shape == (2048 // data.length(step), data.length(step)), (
                "as many tokens at every step"
            )
            assert torch.equal(data.batch(step, 1, 2)[0], x[1::2])
        data.cfg.grow = 0.0
        assert (
            data.length(0) == 1024
            and prepared(pathlib.Path(tmp), preset="small", context=320).length(0) == 320
        )


def test_batches_depend_on_seed_step_and_row_alone():
    with tempfile.TemporaryDirectory() as tmp:
        data = prepared(pathlib.Path(tmp), preset="small", context=64, batch=32, keys=2)
        whole = data.batch(7)[0]
        assert torch.equal(whole, data.batch(7)[0]) and not torch.equal(whole, data.batch(8)[0])
        for rank in range(2):
            assert torch.equal(data.batch(7, rank, 2)[0], whole[rank::2]), "a process gets every world-th row"
        x, y, w = data.batch(3)
        assert torch.equal(x[:, 1:], y[:, :-1]), "targets are the next tokens"
        assert set(y[w > 1].tolist()) <= set(range(65, 91)) and (w > 1).any(), (
            "answers, and nothing else, weigh more"
        )


# ---------------------------------------------------------------------------------------------------------------------------------
# train_lm.py: runs

QUICK = "--small --layers 2 --width 32 --heads 2 --groups 1 --context 64 --batch 4 --micro 2 --window 16 --blocks 3".split()


def run(*args, code=0, env=None, script="train_lm.py"):
    """A subprocess; its exit code must be `code`. -> (stdout, stderr)"""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, args)],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )
    assert done.returncode == code, (
        f"{script} {args}: exit code {done.returncode}, not {code}\n{done.stdout}{done.stderr}"
    )
    return done.stdout, done.stderr


def in_process(*args, main=train_lm.main):
    """A script without a new process: (exit code, stdout, stderr)."""
    out, err, handlers = (
        io.StringIO(),
        io.StringIO(),
        {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)},
    )
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(a) for a in args])
    finally:
        for s, h in handlers.items():
            signal.signal(s, h)
    return code, out.getvalue(), err.getvalue()


def losses(folder):
    entries = [json.loads(line) for line in open(folder / "log.jsonl")]
    return {e["step"]: e["loss"] for e in entries if "loss" in e}


@slow
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
            with swapped(
                train_lm,
                "save_checkpoint",
                lambda path, state: stop(path, state) if state["step"] <= 3 else None,
            ):
                assert in_process(*common, "--steps", 6, "--name", "half")[0] == 0
            code, out, _ = in_process(*common, "--steps", 6, "--name", "half", "--resume")
            assert code == 0 and "resumed at step 3" in out, out
            a, b = (train_lm.load_checkpoint(f / "ckpt.pt") for f in (pathlib.Path(tmp, "whole"), half))
            assert a["step"] == b["step"] == 6
            for name in a["model"]:
                assert torch.equal(a["model"][name], b["model"][name]), (
                    f"{attn}: {name} differs after resuming"
                )
            assert losses(pathlib.Path(tmp, "whole")) == losses(half) == losses(folder), (
                f"{attn}: logged losses, none missing, none twice"
            )


@slow
def test_two_processes_equal_one():
    with tempfile.TemporaryDirectory() as tmp:
        common = [*QUICK, "--out", tmp, "--steps", 4, "--eval-every", 100]
        assert in_process(*common, "--micro", 4, "--name", "one")[0] == 0
        assert in_process(*common, "--micro", 1, "--name", "pieces")[0] == 0
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_port",
            str(random.randint(20000, 60000)),
        ]
        done = subprocess.run(
            [*torchrun, str(HERE / "train_lm.py"), *map(str, common), "--name", "two", "--micro", "1"],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        one, two, pieces = (losses(pathlib.Path(tmp, n)) for n in ("one", "two", "pieces"))
        assert list(one) == list(two) == [1, 2, 3, 4]
        for other, what in ((two, "two processes"), (pieces, "accumulated gradients")):
            diff = max(abs(one[s] - other[s]) for s in one)
            assert diff < 2e-5, f"{what}: losses differ by {diff}"


@slow
def test_a_model_learns_or_says_not():
    with tempfile.TemporaryDirectory() as tmp:
        code, out, _ = in_process(*QUICK, "--steps", 2, "--lr", 0, "--check", "--out", tmp, "--name", "idle")
        assert code == 1 and out.strip().endswith("NOT"), (
            "a model that did not learn: NOT, and exit code 1 with --check"
        )
        code, out, _ = in_process(*QUICK, "--steps", 2, "--lr", 0, "--out", tmp, "--name", "idle2")
        assert code == 0 and "NOT" in out, "without --check the exit code is 0"
        busy = ["--batch", 16, "--micro", 16, "--steps", 60, "--lr", 1e-2, "--recall", 0]
        code, out, _ = in_process(*QUICK, *busy, "--out", tmp, "--name", "busy")
        curve = losses(pathlib.Path(tmp, "busy"))
        assert curve[60] < 0.65 * curve[1], f"60 steps: loss {curve[1]} -> {curve[60]}"
        for word in (
            "sample",
            "bits per byte",
            "inside the window",
            "beyond it",
            "KV cache",
            "tokens/s",
            "GiB",
            "expected",
        ):
            assert word in out, f"the last block lacks {word!r}"


@slow
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
            "--layers must be at least 1, not 0": ["--layers", 0],
            "must be 0 to 1, not nan": ["--grow", "nan"],
            "--lr must be at least 0, not inf": ["--lr", "inf"],
            "is at step 1, beyond --steps 0": ["--resume", "--name", "run", "--steps", 0],
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


def refused(check, cfg):
    """Whether the check says, in one line, that an option is wrong."""
    try:
        check(cfg)
    except train_lm.UserError as e:
        return "must be" in str(e)
    return False


def test_options_are_what_their_definitions_allow():
    """Every number has a range that --help shows; what lies outside it, nan and infinity are refused."""
    for script in (train_lm, train_rl):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            script.main(["--help"])
        said = " ".join(said.getvalue().split())
        cfg = script.Config(vocab=257) if script is train_lm else script.Config()
        assert not refused(script.validate, cfg)
        for f in dataclasses.fields(cfg):
            facts = f.metadata
            assert not facts["group"] or f" {facts['group']}: --{f.name}" in said, (
                f"--help: no {facts['group']}"
            )
            if f.type in (int, float):
                assert f"({facts['allowed']}) [{f.default}]" in said, f"--help: no range of --{f.name}"
                for wrong in (facts["least"] - 1, facts["most"] + 1, math.nan, math.inf):
                    bad = dataclasses.replace(cfg, **{f.name: wrong})
                    assert refused(script.validate, bad), f"--{f.name} {wrong} is not refused"


def test_a_loss_that_is_not_finite_stops_the_run():
    with tempfile.TemporaryDirectory() as tmp:
        code, out, _ = in_process(
            *QUICK, "--steps", 40, "--lr", 1e30, "--save-every", 1, "--out", tmp, "--name", "x"
        )
        assert code == 1 and "stopped" in out and "nothing saved since" in out, out
        state = train_lm.load_checkpoint(pathlib.Path(tmp, "x", "ckpt.pt"))
        assert state["step"] >= 1


@slow
def test_kill_leaves_a_whole_checkpoint():
    with tempfile.TemporaryDirectory() as tmp:
        folder, draw = pathlib.Path(tmp, "k"), random.Random(0)
        args = [
            sys.executable,
            str(HERE / "train_lm.py"),
            *QUICK,
            "--width",
            "128",
            "--steps",
            "100000",
            "--save-every",
            "1",
        ]
        args += ["--out", tmp, "--name", "k"]
        last = 0
        for attempt in range(4):
            process = subprocess.Popen(
                [*args, *(["--resume"] if attempt else [])],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            began, size = (
                time.time(),
                lambda: (folder / "ckpt.pt").stat().st_mtime_ns if (folder / "ckpt.pt").exists() else 0,
            )
            old = size()
            while size() == old and time.time() - began < 60:
                time.sleep(0.01)
            time.sleep(draw.random() * 0.5)
            process.send_signal(signal.SIGKILL)
            process.wait()
            step = train_lm.load_checkpoint(folder / "ckpt.pt")["step"]
            assert step > last, f"killed after a later step, the checkpoint is of step {step}"
            last = step
        process = subprocess.Popen(
            [*args, "--resume"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        while not process.stdout.readline().startswith("step"):
            assert process.poll() is None, "the run ended early"
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=60)[0]
        assert process.returncode == 128 + signal.SIGTERM and "saved" in out, (
            f"SIGTERM saves and exits: {process.returncode}\n{out}"
        )
        assert train_lm.load_checkpoint(folder / "ckpt.pt")["step"] > last


@slow
def test_no_network_and_no_triton_needed():
    code = (
        "import socket, sys\n"
        "def no(*a, **k): raise OSError('a network was tried')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = no\n"
        "sys.modules['triton'] = None\n"
        "import train_lm; sys.exit(train_lm.main(sys.argv[1:]))"
    )
    with tempfile.TemporaryDirectory() as tmp:
        for attn in KINDS:
            done = subprocess.run(
                [sys.executable, "-c", code, *QUICK, "--attn", attn, "--steps", "2", "--out", tmp],
                cwd=HERE,
                capture_output=True,
                text=True,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                timeout=120,
            )
            assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------------------------
# sparse_rl.py


def entries(B=3, H=4, G=2, S=20, D=8, A=3, window=4, lengths=(20, 13, 5)):
    """Random caches of three different lengths, some keys much alike."""
    length = torch.tensor(lengths)
    pos = torch.arange(S).expand(B, G, S).masked_fill(torch.arange(S) >= length[:, None, None], -1)
    k = torch.randn(B, G, S, D)
    k[:, :, 3:S:3] = k[:, :, :1] + 0.3 * torch.randn(B, G, len(range(3, S, 3)), D)
    q_pos = length[:, None] - 1 - torch.arange(A)
    return sparse_rl.Entries(
        k, torch.randn(B, G, S, D), pos, length, window, torch.randn(B, H, A, D), q_pos, torch.rand(B, G, S)
    )


def best_is_sound():
    for budget, sinks, window in ((8, 0, 3), (8, 2, 4), (19, 1, 2)):
        e = entries()
        score = (
            torch.rand(3, 2, 20)
            .masked_fill(torch.arange(20) == 17, math.nan)
            .masked_fill(torch.arange(20) == 6, 2.0)
        )
        kept = sparse_rl.best(score.nan_to_num(0), e.length, budget, window, sinks)
        for b in range(3):
            for g in range(2):
                L, want = int(e.length[b]), set()
                forced = [j for j in range(L) if j < sinks or j >= L - window]
                rest = sorted(
                    (j for j in range(L) if j not in forced),
                    key=lambda j: (-float(score.nan_to_num(0)[b, g, j]), j),
                )
                want = sorted(forced + rest[: budget - len(forced)])
                got = kept[b, g].tolist()
                assert got == want + [-1] * (budget - len(want)), (
                    f"budget {budget}, row of {L}: kept {got}, expected {want}"
                )


def test_kept_slots_are_forced_best_and_in_order():
    best_is_sound()
    for right, wrong in (
        ("slot >= length - window", "slot > length - window"),
        ("slot < sinks", "slot < 0"),
        (".sort(dim=-1).values", ""),
        (".masked_fill(slot >= length, -math.inf)", ""),
        ("descending=True", "descending=False"),
    ):
        with swapped(sparse_rl, "best", mutant(sparse_rl.best, right, wrong)):
            fails(best_is_sound)


def scores_apart():
    """What is registered meanwhile (a mutant too: it brings its decorator along) is forgotten afterwards."""
    return swapped(sparse_rl, "SCORES", dict(sparse_rl.SCORES))


def rkv_by_loops(e, b, g, mix=0.1, same=0.5, pool=7):
    """R-KV's score of one row and head, from its definition, for the slots before the window."""
    L, h = int(e.length[b]), e.q.shape[1] // e.k.shape[1]
    old, k = L - e.window, e.k[b, g].double()
    mean = [0.0] * old
    for q in e.q[b, g * h : (g + 1) * h].double().transpose(0, 1):  # (h, D), one recent position at a time
        logit = [max(float(q[i] @ k[j]) / math.sqrt(k.shape[1]) for i in range(h)) for j in range(old)]
        total = sum(math.exp(x) for x in logit)
        mean = [m + math.exp(x) / total / e.q.shape[2] for m, x in zip(mean, logit)]
    attention = [max(mean[max(0, j - pool // 2) : j + pool // 2 + 1]) for j in range(old)]
    received = [0.0] * L
    for i in range(L):
        cos = [0.0 if i == j else float(F.cosine_similarity(k[i], k[j], dim=0)) for j in range(L)]
        alike = [j for j in range(L) if cos[j] > same]
        if alike:
            cos[alike[-1]] = 0.0
        received = [r + c / L for r, c in zip(received, cos)]
    total = sum(math.exp(r) for r in received)
    return torch.tensor([mix * a - (1 - mix) * math.exp(r) / total for a, r in zip(attention, received)])


def rkv_equals_loops():
    e = entries()
    score = sparse_rl.rkv(e)
    for b in range(3):
        for g in range(2):
            close(score[b, g, : e.length[b] - 4], rkv_by_loops(e, b, g), 1e-6, f"row {b} head {g}")
            L = int(e.length[b])
            kept = sparse_rl.best(score, e.length, 9, 4)[b, g]
            want = sorted(rkv_by_loops(e, b, g).argsort(descending=True)[:5].tolist() + list(range(L - 4, L)))
            assert L <= 9 or kept.tolist() == want, f"row {b} head {g}: kept {kept.tolist()}, by loops {want}"


def test_rkv_equals_a_loop():
    rkv_equals_loops()
    for right, wrong in (
        (".amax(2)", ".mean(2)"),
        (".amax(-1, keepdim=True)", ".amin(-1, keepdim=True)"),
        ("~e.old[:, :, None]", "(e.pos < 0)[:, :, None]"),
        (".masked_fill(~real, -math.inf).softmax", ".softmax"),
        ("/ e.length[:, None, None]", "/ e.pos.shape[2]"),
    ):
        with scores_apart(), swapped(sparse_rl, "rkv", mutant(sparse_rl.rkv, right, wrong)):
            fails(rkv_equals_loops)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor made."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        many = out if isinstance(out, (list, tuple)) else [out]
        self.bytes = max([self.bytes, *(x.nbytes for x in many if isinstance(x, torch.Tensor))])
        return out


def rkv_makes_nothing_larger_than_the_cosines():
    e = entries(S=40, lengths=(40, 33, 25))
    with Largest() as largest:
        sparse_rl.rkv(e)
    assert largest.bytes == 4 * 3 * 2 * 40 * 40, f"{largest.bytes} bytes for (3, 2, 40, 40)"


def test_rkv_makes_nothing_larger_than_the_cosines():
    rkv_makes_nothing_larger_than_the_cosines()
    int64 = lambda: mutant(sparse_rl.rkv, "dtype=torch.short", "dtype=torch.long")
    with scores_apart(), swapped(sparse_rl, "rkv", int64()):
        fails(rkv_makes_nothing_larger_than_the_cosines)


def test_rkv_spares_the_newest_of_three():
    k = torch.eye(8)[None, None, :6].clone()  # (1, 1, S, D): unlike each other, except
    k[0, 0, [1, 3, 4]] = k[0, 0, 1].clone()  # three equal keys
    k[0, 0, 5] = k[0, 0, 0]  # and a pair
    e = sparse_rl.Entries(
        k,
        k,
        torch.arange(6).expand(1, 1, 6),
        torch.tensor([6]),
        2,
        torch.randn(1, 1, 2, 8),
        torch.tensor([[4, 5]]),
    )
    R = (-sparse_rl.rkv(e, mix=0.0)[0, 0]).log()  # of a softmax: differences are those of the mean similarity
    close((R - R[2]) * 6, torch.tensor([0.0, 2, 0, 1, 0, 0]), 1e-4, "how often a key is called redundant")


def plain_attention_of(e, b, g):
    """Attention of each recent query and head of a group to each slot it may see: (queries x heads, L)."""
    L, h, rows = int(e.length[b]), e.q.shape[1] // e.k.shape[1], []
    for a in range(e.q.shape[2]):
        for i in range(g * h, (g + 1) * h):
            s = torch.stack(
                [e.q[b, i, a] @ e.k[b, g, j] / math.sqrt(8) for j in range(L) if j <= e.q_pos[b, a]]
            )
            rows.append(F.pad(s.softmax(0), (0, L - len(s))))
    return torch.stack(rows)


def other_scores():
    e = entries()
    for b in range(3):
        for g in range(2):
            old, v = int(e.length[b]) - 4, e.v[b, g, : e.length[b]]
            received = plain_attention_of(e, b, g).mean(0)[:old]
            pooled = lambda x: torch.stack([F.pad(x, (2, 2))[j : j + 5].mean() for j in range(old)])
            close(sparse_rl.snapkv(e)[b, g, :old], pooled(received), 1e-6, "SnapKV")
            close(sparse_rl.value(e)[b, g, :old], pooled(received * v[:old].norm(dim=-1)), 1e-6, "value")
            assert sparse_rl.streaming(e)[b, g, : old + 4].tolist() == list(range(old + 4)), "StreamingLLM"


def test_other_scores_equal_loops():
    other_scores()
    acausal = mutant(sparse_rl.attention, "visible(q_pos, k_pos)", "visible(q_pos + 99, k_pos)")
    with swapped(sparse_rl, "attention", acausal):
        fails(other_scores)


def sampled(model, prompts, new, compress=None, batch=None, temperature=1.0, watch=None, seed=0):
    """Answers of a Decoder; watch(decoder) after every round."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # threads of so small a model mostly wait for each other
    decoder = mtp.Decoder(
        model,
        batch or len(prompts),
        max(map(len, prompts)) + new + 1,
        temperature=temperature,
        compress=compress,
    )
    if watch:
        one = decoder.round
        decoder.round = lambda g: (one(g), watch(decoder))[0]
        decoder.round.__name__ = "round"
    return decoder.generate(prompts, new), decoder


def prompts_of(model, *lengths):
    return [torch.randint(model.cfg.vocab, (n,)) for n in lengths]


def test_nothing_evicted_nothing_changed():
    """A budget that is never reached: the same text bit for bit, and xi = 1 to 1e-5."""
    model = LM(tiny("gqa"))
    prompts = prompts_of(model, 5, 9, 13)
    plain, _ = sampled(model, prompts, 40)
    for name in ("rkv", "h2o", "snapkv", "streaming"):  # random draws numbers of its own
        answers, _ = sampled(model, prompts, 40, Compressor(name, 60, 6, 4))
        for prompt, (a, logp), (b, _) in zip(prompts, answers, plain):
            assert torch.equal(a, b), f"{name}: another text"
            text = torch.cat([prompt, a])[None]
            old = sparse_rl.token_logp(model(text[:, :-1]), text[:, 1:])[0, len(prompt) - 1 :]
            close(old, logp, 1e-5, f"{name}: log xi")


@slow
def test_ragged_rows_equal_single_rows():
    """A row's kept sets do not depend on the other rows, nor on when they begin or end, even with prompts longer than the cache."""
    model = lm("gqa")
    prompts = prompts_of(model, 3, 40, 17, 8, 29)
    for name in ("rkv", "h2o", "snapkv"):
        compress = Compressor(name, 12, 4, 4, sinks=1)
        together, _ = sampled(model, prompts, 20, compress, batch=2, temperature=0)
        for prompt, (text, _) in zip(prompts, together):
            alone, _ = sampled(model, [prompt], 20, compress, temperature=0)
            assert torch.equal(alone[0][0], text), (
                f"{name}: a row of {len(prompt)} tokens depends on the others"
            )
    one, two = (sampled(model, prompts, 20, Compressor("random", 12, 4, 4), seed=s)[0][1][0] for s in (1, 1))
    assert torch.equal(one, two), "random: by its seed"


def no_slot_beyond_the_cap(name="rkv"):
    model, most = lm("gqa"), []
    compress = Compressor(name, 12, 5, 4, queries=3)
    count = lambda decoder: most.append(decoder.cache.layers[0]["tokens"].length.clone())
    _, decoder = sampled(model, prompts_of(model, 3, 44), 40, compress, watch=count)
    most = torch.stack(most)  # (rounds, rows)
    assert most.max() == 17 and most[-1].min() > 12, f"slots in use: {most.max()}"
    layers = decoder.cache.layers
    assert {
        t.shape[2] for layer in layers for t in (*layer["tokens"].data.values(), layer["tokens"].pos)
    } == {17}, "allocated"
    per_slot = 2 * 8 * 8  # 2 groups of width 8, fp64
    extra = {"rkv": 3 * 4 * 8 * 8, "h2o": 17 * 2 * 4}.get(
        name, 0
    )  # the ring of 3 queries of 4 heads; masses in fp32
    assert decoder.cache.nbytes == 4 * 2 * (17 * 2 * per_slot + extra), (
        "layers x rows x slots x (keys, values), and what scores need"
    )
    for layer in layers:
        pos = layer["tokens"].pos
        for row in pos.flatten(0, 1):
            filled = row[row >= 0].tolist()
            assert filled == sorted(set(filled)) and row[: len(filled)].min() >= 0, (
                "positions ascend, holes at the end"
            )
        assert (pos.amax((1, 2)) == decoder.state.known - 2).all(), (
            "the newest entry is the token before the pending one"
        )


def test_no_slot_beyond_the_cap():
    for name in ("rkv", "h2o", "streaming"):
        no_slot_beyond_the_cap(name)
    model = lm("gqa")
    cache = model.new_cache(1, 6, compress=Compressor("streaming", 5, 1, 2))
    with torch.no_grad():
        model(text_of(model, 1, 6), cache)
        try:
            model(text_of(model, 1, 1), cache)
        except RuntimeError:
            return
    raise AssertionError("a token was written beyond the cap")


def replay_equals_record(name="rkv"):
    """Teacher-forced attention to exactly the entries that the sampler had gives the recorded log-probabilities."""
    model, held = lm("gqa"), []
    prompts = prompts_of(model, 7, 7)

    def watch(decoder):
        held.append(
            torch.stack([layer["tokens"].pos.clone() for layer in decoder.cache.layers])
        )  # (layers, B, G, S)

    answers, decoder = sampled(model, prompts, 33, Compressor(name, 12, 4, 4, sinks=1), watch=watch)
    text = torch.stack([torch.cat([p, a]) for p, (a, _) in zip(prompts, answers)])  # (B, T)
    T = text.shape[1] - 1
    see = torch.ones(T, T, dtype=torch.bool).tril().repeat(4, 2, 2, 1, 1)  # (layers, B, G, T, T)
    for i in range(33):  # round i wrote entry 6 + i, and then all that was held was read
        see[:, :, :, 6 + i] = (held[i][..., None] == torch.arange(T)).any(-2)
    layers = iter(see)

    def forward(self, x, pos, cache=None, count=None, source=None):
        q, k = (rope(la.split_heads(f(x), n), pos) for f, n in ((self.q, 4), (self.k, 2)))
        v = la.split_heads(self.v(x), 2)
        return self.out(la.merge_heads(attend(q, k, v, next(layers), 8**-0.5)))

    with swapped(GQA, "forward", forward):
        logp = sparse_rl.token_logp(model(text[:, :-1]), text[:, 1:])[:, 6:]
    close(
        logp, torch.stack([l for _, l in answers]), 1e-9, f"{name}: replayed and recorded log-probabilities"
    )


def test_replayed_eviction_gives_the_recorded_probabilities():
    for name in ("rkv", "h2o", "random"):
        replay_equals_record(name)
    with swapped(SlotCache, "keep", mutant(SlotCache.keep, "buffer.gather(2, i)", "buffer[:, :, :n]")):
        fails(replay_equals_record)  # positions move, keys and values stay behind
    anew = "torch.arange(n).expand(len(index), 2, -1)"
    with swapped(
        SlotCache,
        "keep",
        mutant(SlotCache.keep, "self.pos.gather(2, index.expand(-1, self.pos.shape[1], -1))", anew),
    ):
        fails(replay_equals_record)  # positions counted anew


def test_h2o_mass_and_its_grace():
    """The mass is the attention received, and without a window each new entry is evicted, since it has received little."""
    model = lm("gqa")
    layer, T = model.blocks[0].attn, 14
    x, pos = torch.randn(2, T, 32).double(), torch.arange(T)[None]
    q, k = rope(la.split_heads(layer.q(x), 4), pos), rope(la.split_heads(layer.k(x), 2), pos)
    s = q.unflatten(1, (2, 2)) @ k[:, :, None].transpose(-1, -2) * 8**-0.5
    p = s.masked_fill(~torch.ones(T, T).tril().bool(), -math.inf).softmax(-1)
    cache = layer.new_cache(2, 20, dtype=torch.float64)
    Compressor("h2o", 12, 8).extend(cache, 4)
    for a, b in ((0, 5), (5, 6), (6, 12)):
        layer(x[:, a:b], pos[:, a:b].expand(2, -1), cache, torch.tensor([b - a, b - a]))
    close(cache["mass"].data["mass"][..., :12, 0], p[:, :, :, :12, :12].sum((2, 3)), 1e-5, "mass")
    kept = (
        sampled(model, prompts_of(model, 8), 40, Compressor("h2o", 12, 1, 1))[1].cache.layers[0]["tokens"].pos
    )
    assert (kept < 24).sum() >= 2 * 10, f"without grace the cache freezes on old entries: {kept.tolist()}"
    kept = (
        sampled(model, prompts_of(model, 8), 40, Compressor("h2o", 12, 1, 8))[1].cache.layers[0]["tokens"].pos
    )
    assert (kept >= 24).sum() >= 2 * 8, f"with a window of 8 new entries stay: {kept.tolist()}"


def test_xi_has_mean_one():
    """E xi = 1 under the sampler, here within 4 standard errors (a mild eviction, a light tail); at another temperature it is not."""
    model = LM(tiny("gqa", vocab=11))
    with torch.no_grad():
        model.head.weight *= 6
    prompts = prompts_of(model, *[6] * 400)
    answers, _ = sampled(model, prompts, 30, Compressor("rkv", 9, 3, 3))
    text = torch.stack([torch.cat([p, a]) for p, (a, _) in zip(prompts, answers)])
    sampler = torch.stack([l for _, l in answers])  # (N, T)
    with torch.no_grad():
        logits = model(text[:, :-1])[:, 5:]  # (N, T, V)
    ones = torch.ones_like(sampler)
    found = sparse_rl.mismatch(sparse_rl.token_logp(logits, text[:, 6:]) - sampler, ones, ones)
    assert found["k3"] > 1e-3, f"compression changes something: {found}"
    assert abs(found["xi_mean"] - 1) < 4 * found["xi_error"], (
        f"E xi = {found['xi_mean']} +- {found['xi_error']}"
    )
    found = sparse_rl.mismatch(sampler - sparse_rl.token_logp(logits / 0.8, text[:, 6:]), ones, ones)
    assert abs(found["xi_mean"] - 1) > 4 * found["xi_error"], "another temperature went unnoticed"


def test_mismatch_by_enumeration():
    """On a small vocabulary all tokens can be listed, each as often as the sampler draws it: the identities are exact."""
    p_o, p_s = torch.randn(2, 7).double().softmax(-1)
    N = 10**6  # tokens; shares of them instead of draws
    l, mask = (p_o.log() - p_s.log())[None], (p_s * N)[None]
    found = sparse_rl.mismatch(l, mask, torch.ones_like(mask))
    kl = (p_s * (p_s / p_o).log()).sum()
    one, chi2 = torch.tensor(1.0), (p_o**2 / p_s).sum() - 1
    for name, want in (("xi_mean", one), ("kl", kl), ("k3", kl), ("chi2", chi2), ("ess", one)):
        close(found[name], want, 1e-9, name)


def test_extremes_are_logged_as_they_are():
    log_xi, mask = torch.tensor([[-31.0, 0.5, 27.0, -99.0]]), torch.tensor([[1.0, 1, 1, 0]])
    found = sparse_rl.mismatch(log_xi, mask, mask)
    assert found["log_xi_min"] == -31 and found["log_xi_max"] == 27, (
        "neither clamped nor of tokens outside the answer"
    )
    assert all(x.isfinite() for x in found.values()), found
    _, _, largest = sparse_rl.objective(log_xi, torch.zeros(1, 4), torch.ones(1), mask, mask)
    assert largest == 27, "log rho"


def batch_of(N=8, T=6):
    """Log-probabilities of three policies, advantages, ragged answers."""
    logp = (-torch.rand(N, T).double() * 3).requires_grad_()
    mask = (torch.arange(T) < torch.randint(2, T + 1, (N, 1))).double()
    return (
        logp,
        logp.detach() + 0.1 * torch.randn(N, T),
        logp.detach() + 0.3 * torch.randn(N, T),
        torch.randn(N).double(),
        mask,
    )


def replay_is_the_samplers(name="rkv"):
    """The learner's replay: xi = 1 for prompts of different lengths, whatever was evicted."""
    cfg = train_rl.Config(compressor=name, budget=14, buffer=3, recent=3, correct="replay", size=3)
    task = train_rl.Sums(3)
    model = LM(tiny("gqa", vocab=len(task.symbols))).double()
    asked = train_rl.problems(task, 12, 0)
    sampler = train_rl.engine(model, task, cfg, 12, 1.0, sparse=True)
    for _ in range(2):  # the second time from a used recorder
        r = train_rl.rollout(sampler, task, asked)
    assert len(set(map(len, asked))) > 1 and len(set(map(len, r.answers))) > 4
    close(
        train_rl.answer_logp(model, r, slice(None), "kept", sampler.compress),
        r.sampler,
        1e-9,
        f"{name}: replayed and recorded",
    )
    assert (train_rl.answer_logp(model, r, slice(None)) - r.sampler).abs().max() > 1e-3, (
        "the dense policy is another"
    )


def test_replay_is_what_the_sampler_read():
    for name in ("rkv", "snapkv", "h2o", "streaming", "random"):
        replay_is_the_samplers(name)
    for right, wrong in (("t - given[:, None] + 1", "t - given[:, None]"), ("(t >= since)", "(t > since)")):
        with swapped(sparse_rl.Replay, "__init__", mutant(sparse_rl.Replay.__init__, right, wrong)):
            fails(replay_is_the_samplers)


def test_replay_by_hand():
    """The example of the docstring: which tokens each token reads."""
    held = torch.tensor([[0, 1], [0, 3]])[
        :, None, None, None
    ]  # (E, layers, B, G, n): eviction 0 kept a and b, eviction 1 a and d
    see = sparse_rl.Replay(held, torch.tensor([3]), 2, 6).layers[0]["tokens"].see[0, 0]  # (T, T)
    reads = ["".join(c for c, one in zip("abcdef", row) if one) for row in see.tolist()]
    assert reads == ["a", "ab", "abc", "abcd", "ade", "adef"], reads
    shown = re.search(r"a: a  .*", sparse_rl.Replay.__doc__)[0]
    assert re.findall(r"[a-f]: ([a-f]+(?: [a-f]+)?)(?=  |$)", shown) == [
        "a",
        "ab",
        "ab c",
        "ab cd",
        "ad e",
        "ad ef",
    ], shown


def loss_of(correct, logp, old, sampler, advantage, mask, clip=0.2):
    how = sparse_rl.CORRECTIONS[correct]  # learn itself is tested in test_learn_by_hand
    weight, counted = how.weigh(old - sampler, mask)
    anchor = old if how.anchor == "dense" else sampler
    return sparse_rl.objective(logp, anchor, advantage, weight, counted, clip)[0]


def objective_is_the_papers():
    """The paper's form, token by token, and its gradient."""
    logp, old, sampler, advantage, mask = batch_of()
    sampler[2, 0] = old[2, 0] + 10  # log xi = -10 < log 1e-4: vetoed
    sampler[3, 1] = old[3, 1] - 10  # a large xi is no reason
    want = 0.0
    for i in range(8):
        T, total = int(mask[i].sum()), 0.0
        alive = all(math.exp(old[i, t] - sampler[i, t]) >= 1e-4 for t in range(T))
        for t in range(T):
            rho, xi = (logp[i, t] - old[i, t]).exp(), math.exp(old[i, t] - sampler[i, t])
            total = total + alive * xi * torch.minimum(rho * advantage[i], rho.clamp(0.8, 1.2) * advantage[i])
        want = want - total / T / 8
    loss = loss_of("both", logp, old, sampler, advantage, mask)
    close(loss, want, 1e-9, "the paper's objective")
    a, b = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (loss, want))
    close(a, b, 1e-9, "its gradient")
    assert (a[2] == 0).all() and (a[3] != 0).any(), "a vetoed answer has exactly no gradient"


def test_objective_is_the_papers():
    objective_is_the_papers()
    inside = mutant(
        sparse_rl.objective,
        "torch.minimum(free, rho.clamp(1 - clip, 1 + clip) * advantage)",
        "torch.minimum(free * weight, (rho * weight).clamp(1 - clip, 1 + clip) * advantage)"
        " / weight.clamp(min=1e-9)",
    )
    survivors = mutant(sparse_rl.objective, "loss.mean()", "loss.sum() / (weight.sum(-1) > 0).sum()")
    tokens = mutant(
        sparse_rl.objective,
        "counted.sum(-1).clamp(min=1)",
        "(counted.sum() / len(counted)).expand(len(counted))",
    )
    for wrong in (inside, survivors, tokens):
        with swapped(sparse_rl, "objective", wrong):
            fails(objective_is_the_papers)
    for right, wrong in (
        ("log_xi >= math.log(least)", "log_xi <= -math.log(least)"),
        (".all(-1, keepdim=True)", ""),
        ("math.log(least)", "least"),
    ):
        with swapped(sparse_rl, "reject", mutant(sparse_rl.reject, right, wrong)):
            fails(objective_is_the_papers)


def test_objective_identities():
    logp, old, sampler, advantage, mask = batch_of()
    gradient = lambda correct, l, o, s: torch.autograd.grad(loss_of(correct, l, o, s, advantage, mask), l)[0]
    # ratio 1: the gradient of REINFORCE, whatever is corrected when nothing was evicted
    same = logp.detach()
    reinforce = torch.autograd.grad(-(advantage * (logp * mask).sum(-1) / mask.sum(-1)).mean(), logp)[0]
    for name in sparse_rl.CORRECTIONS:
        close(gradient(name, logp, same, same), reinforce, 1e-12, f"{name}: xi = rho = 1")
    # a constant xi: the normalised form does not see it, the paper's is scaled by it
    plain = gradient("none", logp, old, old)
    close(gradient("released", logp, old, old - math.log(1.3)), plain, 1e-12, "normalised, xi = 1.3")
    close(gradient("both", logp, old, old - math.log(1.3)), 1.3 * plain, 1e-12, "paper, xi = 1.3")
    # two tokens with equal rho and A: gradients in the ratio of their xi; none where the ratio is clipped
    logp = torch.zeros(1, 3).double().requires_grad_()
    rho = torch.tensor([[0.1, 0.1, 0.5]]).double()  # log; the last is above the clip
    weight, counted = sparse_rl.reweight(torch.tensor([[0.2, -0.7, 0.0]]).double(), torch.ones(1, 3).double())
    loss, clipped, _ = sparse_rl.objective(logp, -rho, torch.ones(1).double(), weight, counted)
    g = torch.autograd.grad(loss, logp)[0][0]
    close(g[0] / g[1], torch.tensor(0.9).exp(), 1e-6, "gradients in the ratio of xi")
    assert g[2] == 0 and abs(float(clipped) - 1 / 3) < 1e-6, "clipped"
    # all vetoed: loss 0, gradient 0, no NaN
    logp, old, sampler, advantage, mask = batch_of()
    for name in ("reject", "both", "released"):
        loss = loss_of(name, logp, old, old + 30, advantage, mask)
        assert loss == 0 and (torch.autograd.grad(loss, logp)[0] == 0).all(), f"{name}: all vetoed"


def test_corrections_at_their_bounds():
    l = torch.tensor([[0.5, 1.5, 2.0, 3.0, 0.4, 1.0]]).double().log()
    ones = torch.ones_like(l)
    weights = lambda name, l=l: sparse_rl.CORRECTIONS[name].weigh(l, torch.ones_like(l))
    mean = (0.5 + 1.5 + 1.5 + 1.5 + 0.4 + 1) / 6  # truncated at 1.5, rejected ones included
    close(
        weights("released")[0] * mean,
        torch.tensor([[0.5, 1.5, 0, 0, 0, 1.0]]).double(),
        1e-6,
        "released: both bounds are inside",
    )
    assert weights("released")[1].tolist() == [[1, 1, 0, 0, 0, 1]], "rejected tokens leave the average"
    close(weights("tis")[0], torch.tensor([[0.5, 1.5, 2, 2, 0.4, 1]]).double(), 1e-6, "TIS")
    close(weights("mis")[0], torch.tensor([[0.5, 1.5, 2, 0, 0, 1]]).double(), 1e-6, "MIS")
    assert weights("mis")[1].sum() == 4 and weights("tis")[1].sum() == 6, "MIS shortens the average"
    close(weights("sequence_mask")[0][:, 0], l.sum().exp()[None], 1e-6, "product of 1.8")
    assert weights("sequence_mask", 2 * l)[0].max() == 0, "product of 3.24: rejected"
    sampler, dense = (
        torch.rand(2, 3, 4).double().softmax(1) for _ in range(2)
    )  # two tokens of three symbols each, independent
    said = torch.cartesian_prod(torch.arange(3), torch.arange(3))  # (9, 2) all answers
    p_s, p_o = (torch.stack([p[i, said[:, i], 0] for i in (0, 1)], -1) for p in (sampler, dense))  # (9, 2)
    weight = sparse_rl.answer((p_o / p_s).log(), torch.ones(9, 2))[0]
    close(
        weight * p_s.prod(-1, keepdim=True),
        torch.minimum(p_s.prod(-1), p_o.prod(-1))[:, None].expand(9, 2),
        1e-12,
        "answer: an answer counts as often as both policies say it",
    )
    assert weight.max() == 1 and weight.min() < 0.9
    raw = torch.tensor([[0.0, -9.3], [0.0, -9.1]]).double()  # log 1e-4 = -9.21
    assert weights("reject", raw)[0].sum(-1).tolist() == [0, 2], "veto below 1e-4"
    assert (sparse_rl.ratio(torch.tensor([1e4, -1e4])).isfinite()).all(), "xi stays finite"


def test_group_advantages():
    r = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])
    a = sparse_rl.group_advantage(r, 4)
    close(
        a[:4], (r[:4] - 0.25) / (r[:4].std() + 1e-6), 1e-6, "mean and unbiased standard deviation of a group"
    )
    assert (a[4:] == 0).all(), "equal rewards: no signal"


# ---------------------------------------------------------------------------------------------------------------------------------
# train_rl.py


def test_tasks_have_exact_rewards():
    story = "tom has 12 pens. he buys 3 bags of 4. he loses 5. how many="
    for name, prompt, answer in (
        ("sums", "32-84+9=", "-52+9=-43."),
        ("ledger", "a4b7c9:cab=", "c9a13b20."),
        ("words", story, "3*4=12;12+12=24;24-5=19."),
    ):
        task, rng = train_rl.TASKS[name](2), random.Random(0)
        assert task.work(prompt) == answer and answer in task.__doc__ and prompt in task.__doc__, (
            f"{name}: the docstring's example"
        )
        right = train_rl.result(answer)
        for said, reward in (
            (answer, 1),
            (f"{right}.", 1),
            (f"={right}.", 1),
            (answer[:-1], 0),
            (f"1{right}.", 0),
            (answer + ".", 0),
            (".", 0),
            ("", 0),
            (f"{right}+1.", 0),
            (f"={right}..", 0),
        ):
            assert task.reward(prompt, said) == reward, (
                f"{name}: {said!r} is worth {task.reward(prompt, said)}, not {reward}"
            )
        rewards = []
        for size in (1, 4, 9):
            task = train_rl.TASKS[name](size)
            for _ in range(300):
                asked = task.problem(rng)
                assert task.reward(asked, task.work(asked)) == 1
                shown = task.work(asked, rng)
                assert task.decode(task.encode(asked + shown)) == asked + shown
                assert len(asked) <= task.room[0] and len(shown) <= task.room[1], (
                    f"{name}: {asked}{shown} does not fit in {task.room}"
                )
                rewards.append(task.reward(asked, shown))
        assert 0.3 < np.mean(rewards) < 0.9, f"{name}: {np.mean(rewards):.0%} of the demonstrations are right"
    asked = train_rl.problems(train_rl.Sums(6), 300, 0, "train", 5)
    assert asked == train_rl.problems(train_rl.Sums(6), 300, 0, "train", 5) and len(set(asked)) == 300
    assert not set(asked) & set(train_rl.problems(train_rl.Sums(6), 300, "held out")), (
        "held-out problems are others"
    )


RL_QUICK = "--size 2 --largest 9 --layers 1 --width 32 --heads 2 --groups 2 --warm-steps 30 --warm-batch 16 --problems 4".split()
RL_QUICK += "--group-size 4 --held-out 8 --eval-every 4 --device cpu --budget 8 --buffer 2 --recent 2".split()


def in_rl(*args):
    return in_process(*RL_QUICK, *args, main=train_rl.main)


def test_rollouts_are_what_the_learner_scores():
    """Tokens, masks, log-probabilities and rewards of a rollout; rho is 1 before the first update, and no signal means no update."""
    cfg = train_rl.Config(
        size=2, largest=9, problems=4, group_size=4, rollout="dense", minibatches=1, correct="none"
    )
    task = train_rl.Sums(2, 9)
    model = LM(Config(attn="gqa", layers=2, width=32, heads=2, groups=2, vocab=len(task.symbols)))
    asked = [p for p in train_rl.problems(task, 4, 0) for _ in range(4)]
    r = train_rl.rollout(train_rl.engine(model, task, cfg, 16, 1.0, sparse=False), task, asked)
    for prompt, row, mask, logp, answer in zip(asked, r.text, r.mask, r.sampler, r.answers):
        whole = prompt + answer
        assert task.decode(row[: len(whole)].tolist()) == whole
        assert mask.nonzero()[:, 0].tolist() == list(range(len(prompt) - 1, len(whole) - 1)), (
            "the mask is the whole answer"
        )
        assert "." not in answer[:-1] and (answer.endswith(".") or len(answer) == task.room[1])
        text = torch.tensor(task.encode(whole))[None]
        own = sparse_rl.token_logp(model(text[:, :-1]), text[:, 1:])[0, len(prompt) - 1 :]
        close(own, logp[mask > 0], 1e-5, "recorded log-probabilities")
    optimizer, before = torch.optim.AdamW(model.parameters(), lr=0.1), [p.clone() for p in model.parameters()]
    r.reward[:] = 1.0
    found = train_rl.learn(model, optimizer, r, cfg)
    assert found["no_signal"] == 1 and all(torch.equal(a, b) for a, b in zip(before, model.parameters())), (
        "no signal, no update"
    )
    r.reward[0] = 0.0
    found = train_rl.learn(model, optimizer, r, cfg)
    assert found["clipped"] == 0 and found["no_signal"] == 0.75 and abs(found["k3"]) < 1e-6, found
    assert not torch.equal(before[0], next(model.parameters())), "a group with a signal moves the weights"


def answered(correct="none", name="rkv", **changes):
    """Compressed answers of a tiny model in fp64, two groups of 4 with right and wrong ones -> model, rollout, config, engine."""
    cfg = train_rl.Config(
        **{
            **dict(
                compressor=name,
                budget=14,
                buffer=3,
                recent=3,
                correct=correct,
                size=3,
                group_size=4,
                clip=0.02,
                max_norm=0.0,
            ),
            **changes,
        }
    )
    task = train_rl.Sums(3)
    torch.manual_seed(1)
    model = LM(tiny("gqa", layers=2, vocab=len(task.symbols))).double()
    asked = [p for p in train_rl.problems(task, 2, 0) for _ in range(4)]
    engine = train_rl.engine(model, task, cfg, 8, 1.0, sparse=True)
    r = train_rl.rollout(engine, task, asked)
    r.reward = torch.tensor([1.0, 0, 1, 0, 0, 0, 1, 0]).double()
    return model, r, cfg, engine


def learn_equals_formulas(correct, lr=3.0):
    """Two minibatches of plain gradient descent: the weights afterwards, and the logged loss, are those of the formulas."""
    model, r, cfg, engine = answered(correct)
    other = LM(model.cfg).double()
    other.load_state_dict(model.state_dict())
    found = train_rl.learn(model, torch.optim.SGD(model.parameters(), lr=lr), r, cfg, engine.compress)

    def logp(i, kept):
        text, cache = r.text[i : i + 1], None
        if kept:
            cache = sparse_rl.Replay(
                engine.compress.kept[:, :, i : i + 1], r.given[i : i + 1], 3, text.shape[1] - 1
            )
        return sparse_rl.token_logp(other(text[:, :-1], cache), text[:, 1:])[0][r.mask[i] > 0]

    replays = correct in ("replay", "twin")
    with torch.no_grad():
        old, old_kept = (
            [logp(i, False) for i in range(8)],
            [logp(i, True) if replays else None for i in range(8)],
        )
    losses = []
    for group in (range(4), range(4, 8)):
        reward, total = r.reward[group[0] : group[-1] + 1], 0.0
        for i in group:
            A, pi_s, pi = (
                (r.reward[i] - reward.mean()) / (reward.std() + 1e-6),
                r.sampler[i][r.mask[i] > 0],
                logp(i, False),
            )
            clipped = lambda log_rho: torch.minimum(log_rho.exp() * A, log_rho.exp().clamp(0.98, 1.02) * A)
            xi = (old[i] - pi_s).exp()
            paper = (xi.min() >= 1e-4) * (xi * clipped(pi - old[i])).mean()
            answer = xi.prod().clamp(max=1) * clipped(pi - old[i]).mean()
            replay = clipped(logp(i, True) - old_kept[i]).mean() if replays else 0.0
            total = (
                total
                - {
                    "none": clipped(pi - old[i]).mean(),
                    "bypass": clipped(pi - pi_s).mean(),
                    "both": paper,
                    "replay": replay,
                    "answer": answer,
                    "twin": (answer + replay) / 2,
                }[correct]
                / 4
            )
        losses.append(total.detach())
        for p, g in zip(other.parameters(), torch.autograd.grad(total, list(other.parameters()))):
            p.data -= lr * g
    before = answered(correct)[0]
    moved = max((a - b).abs().max() for a, b in zip(before.parameters(), other.parameters()))
    assert moved > 1e-2 and found["updates"] == 2, f"{correct}: moved by {moved}"
    for a, b in zip(model.parameters(), other.parameters()):
        close(a.detach(), b.detach(), 1e-9, f"{correct}: weights after two updates")
    close(
        torch.tensor(found["loss"], dtype=torch.double), sum(losses) / 2, 1e-9, f"{correct}: the logged loss"
    )


@slow
def test_learn_by_hand():
    for correct in ("none", "both", "answer", "bypass", "replay", "twin"):
        learn_equals_formulas(correct)
    for correct, right, wrong in (
        ("bypass", 'how.anchor == "dense"', "True"),
        ("both", 'how.anchor == "dense"', "False"),
        ("twin", " / len(views)", ""),
        ("twin", "loss.mean()", "loss[-1]"),
        ("replay", "logp = answer_logp(model, r, part, reads,", 'logp = answer_logp(model, r, part, "full",'),
        ("twin", "how.weigh(old[reads]", 'how.weigh(old["full"]'),
    ):
        with swapped(train_rl, "learn", mutant(train_rl.learn, right, wrong)):
            fails(learn_equals_formulas, correct)


def test_statistics_of_a_replay_are_of_the_dense_policy():
    """Its own xi is 1 by construction: what is logged says how far its sampler is from the dense policy, as for the other arms."""
    found = []
    for correct in ("none", "replay"):
        model, r, cfg, engine = answered(correct)
        found.append(
            train_rl.learn(model, torch.optim.SGD(model.parameters(), lr=0.0), r, cfg, engine.compress)
        )
    assert found[0]["k3"] > 1e-5 and all(
        abs(found[0][n] - found[1][n]) < 1e-9 for n in ("k3", "xi_mean", "log_xi_min", "vetoed")
    ), found


def extended_by_a_compressor(needs):
    """A rollout with a score that is one function: it gets what it asks for, and what it says is what stays."""
    model, calls = lm("gqa"), []

    @sparse_rl.score(needs=[needs])
    def mine(e):
        assert (e.q is not None) == (e.q_pos is not None) == (needs == "queries"), "queries, if asked for"
        assert (e.mass is not None) == (needs == "mass"), "masses, if asked for"
        worth = -e.attention() if needs == "queries" else -e.mass  # the least read: no other score's choice
        calls.append(([x.clone() if torch.is_tensor(x) else x for x in e], worth))
        return worth

    prompts = prompts_of(model, 7, 9)
    record = sparse_rl.Recorder(Compressor("mine", 12, 4, 4, sinks=1, queries=3), 99)
    answers, _ = sampled(model, prompts, 60, record)
    texts = [torch.cat([p, a]) for p, (a, _) in zip(prompts, answers)]
    evictions = 0
    for i, (e, worth) in enumerate(calls):
        e = sparse_rl.Entries(*e)
        for b, g in ((0, 0), (0, 1), (1, 0), (1, 1)):
            pos = e.pos[b, g, : e.length[b]].tolist()
            rest = sorted(range(1, len(pos) - 4), key=lambda j: (-float(worth[b, g, j]), j))[:7]
            want = [pos[j] for j in sorted({0, *rest, *range(len(pos) - 4, len(pos))})]
            if len(pos) > 12:
                evictions += 1
                kept = record.kept[i // 4, i % 4, b, g].tolist()
                assert kept == want, f"layer {i % 4}: kept {kept}, by the score {want}"
        if i % 4 or e.length.min() <= 12:
            continue
        for b, text in enumerate(texts):  # the first layer, once its caches are full
            T, attn = int(e.pos[b].max()) + 1, model.blocks[0].attn
            x, at = model.blocks[0].attn_norm(model.embed(text[None, :T])), torch.arange(T)[None]
            q, k = rope(la.split_heads(attn.q(x), 4), at), rope(la.split_heads(attn.k(x), 2), at)
            if needs == "queries":
                newest = e.q_pos[b].long()
                assert sorted(newest.tolist()) == [T - 3, T - 2, T - 1], "the newest queries"
                close(e.q[b], q[0, :, newest], 1e-9, "the queries themselves")
            elif T == e.length[b]:  # nothing was evicted before
                s = q.unflatten(1, (2, 2)) @ k[:, :, None].transpose(-1, -2) * 8**-0.5
                p = s.masked_fill(~torch.ones(T, T).tril().bool(), -math.inf).softmax(-1)
                close(e.mass[b, :, :T], p.sum((2, 3))[0], 1e-5, "the masses")
    assert evictions > 100, f"{evictions} evictions"


def extended_by_a_correction():
    """A correction that is one line: learn's loss and its gradient are those of the formula."""
    model, r, cfg, _ = answered("geometric", minibatches=1)
    old = train_rl.answer_logp(model, r, slice(None))  # (B, T - 1)
    xi = (
        ((old - r.sampler).sum(-1) / r.mask.sum(-1)).exp().detach()
    )  # (B,), the geometric mean of each answer's
    assert xi.std() > 1e-3, "something was evicted"
    advantage = sparse_rl.group_advantage(r.reward, 4)  # (B,)
    want = -(xi * advantage * (old - old.detach()).exp().mul(r.mask).sum(-1) / r.mask.sum(-1)).mean()
    close(loss_of("geometric", old, old.detach(), r.sampler, advantage, r.mask), want, 1e-12, "its loss")
    gradients = torch.autograd.grad(want, list(model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    found = train_rl.learn(model, torch.optim.SGD(model.parameters(), lr=1.0), r, cfg)
    assert abs(found["loss"] - want) < 1e-9 and found["updates"] == 1
    for a, b, g in zip(model.parameters(), before, gradients):
        close(a.detach(), b - g, 1e-9, "its step")


def test_extend_a_compressor_and_a_correction():
    """A new compressor is one function that says what it needs; a new correction one line."""
    for needs in ("queries", "mass"):
        with scores_apart():
            extended_by_a_compressor(needs)
        by_name = f'"{needs}" in self.score.needs', 'self.name in ("rkv", "snapkv", "value", "h2o")'
        with scores_apart(), swapped(Compressor, "extend", mutant(Compressor.extend, *by_name)):
            fails(extended_by_a_compressor, needs)
    longer = mutant(Compressor.extend, "window=self.queries", "window=self.queries + 1")
    with scores_apart(), swapped(Compressor, "extend", longer):
        fails(extended_by_a_compressor, "queries")
    padded = mutant(sparse_rl.add_mass, "p.where(real[:, None, :, None], 0)", "p")
    with scores_apart(), swapped(sparse_rl, "add_mass", padded):
        fails(extended_by_a_compressor, "mass")
    assert "mine" not in sparse_rl.SCORES
    try:
        sparse_rl.score(needs=["querys"])
    except ValueError as e:
        assert "querys" in str(e)
    else:
        raise AssertionError("a need that nobody can meet")

    mean = lambda log_xi, mask: (log_xi * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    geometric = sparse_rl.Correction(lambda log_xi, mask: (mask * mean(log_xi, mask).exp(), mask))
    sparse_rl.CORRECTIONS["geometric"] = geometric
    try:
        extended_by_a_correction()
    finally:
        del sparse_rl.CORRECTIONS["geometric"]


def updates_only_where_there_is_a_signal():
    model, r, cfg, engine = answered("both")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    updates = lambda: (
        train_rl.learn(model, optimizer, r, cfg)["updates"],
        int(optimizer.state[next(model.parameters())]["step"]),
    )
    assert updates() == (2, 2), "both minibatches"
    r.reward[4:] = 1.0
    assert updates() == (1, 3), "all of the second minibatch's answers are right: no signal in it"
    r.reward[4:6], r.sampler[4:] = 0.0, r.sampler[4:] + 30 * r.mask[4:]
    assert updates() == (1, 4), "all of its answers are vetoed"
    r.reward[:] = 1.0
    before = [p.clone() for p in model.parameters()]
    assert updates() == (0, 4) and all(torch.equal(a, b) for a, b in zip(before, model.parameters())), (
        "no signal at all"
    )


def test_updates_only_where_there_is_a_signal():
    updates_only_where_there_is_a_signal()
    for right, wrong in (
        ("in zip(parts, useful) if some", "in zip(parts, useful) if any(useful)"),
        ("(weights.amax((0, 2)) > 0) & signal", "signal"),
        (" & signal.repeat_interleave(cfg.group_size)", ""),
    ):
        with swapped(train_rl, "learn", mutant(train_rl.learn, right, wrong)):
            fails(updates_only_where_there_is_a_signal)


def test_idle_evictions_are_left_out():
    """While no row has more than budget entries, evictions change nothing: they are left out, except where they are recorded."""
    task, compress = train_rl.Sums(3), Compressor("rkv", 24, 3, 3)
    model, found = LM(tiny("gqa", layers=2, vocab=len(task.symbols))), []
    asked = train_rl.problems(task, 12, 0)
    for record in (False, True):
        decoder, count = mtp.Decoder(model, 12, sum(task.room), stop=task.stop, compress=compress), []
        decoder.compress = sparse_rl.Recorder(compress, 99) if record else compress
        evict = decoder.evict
        decoder.evict = lambda: (count.append(decoder.cache.seen.max().item()), evict())
        decoder.evict.__name__ = "evict"
        torch.manual_seed(0)
        found.append((train_rl.rollout(decoder, task, asked), count))
    (a, some), (b, every) = found
    assert torch.equal(a.text, b.text) and torch.equal(a.sampler, b.sampler), (
        "evictions that were left out would have changed something"
    )
    assert 1 <= len(some) < len(every) and some == [n for n in every if n > 24], (
        f"evictions after {some} tokens of {every}"
    )


def test_rl_resumed_equals_uninterrupted():
    with tempfile.TemporaryDirectory() as tmp:
        out = ["--out", tmp, "--save-every", 3]
        assert in_rl(*out, "--steps", 6, "--name", "whole")[0] == 0
        code, said, _ = in_rl(*out, "--steps", 3, "--name", "half", "--warm", pathlib.Path(tmp, "whole"))
        assert code == 0, said
        code, said, _ = in_rl(*out, "--steps", 6, "--name", "half", "--resume")
        assert code == 0 and "expected" in said, said
        a, b = (train_lm.load_checkpoint(pathlib.Path(tmp, n, "ckpt.pt")) for n in ("whole", "half"))
        assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]), (
            "weights differ after resuming"
        )
        assert losses(pathlib.Path(tmp, "whole")) == losses(pathlib.Path(tmp, "half")), (
            "logged losses, none missing, none twice"
        )


def test_rl_runs_every_task_and_attention():
    with tempfile.TemporaryDirectory() as tmp:
        for i, options in enumerate(
            (
                "--task ledger --compressor h2o",
                "--task words --correct released",
                "--attn asa --rollout dense",
                "--compressor streaming --sinks 2 --correct tis",
                "--correct bypass --compressor random",
                "--correct twin --compressor snapkv",
            )
        ):
            code, said, err = in_rl(
                "--out", tmp, "--name", i, "--steps", 1, "--warm-steps", 2, *options.split()
            )
            assert code == 0, f"{options}: {said}{err}"
            for word in ("solved when sampling", "MiB, counted", "vetoed", "expected"):
                assert word in said, f"{options}: the output lacks {word!r}"


def test_rl_bad_input_is_one_line_and_exit_code_2():
    with tempfile.TemporaryDirectory() as tmp:
        torn = pathlib.Path(tmp, "torn.pt")
        torn.write_bytes(b"no checkpoint")
        for name, args in (
            ("words", "--task words"),
            ("asa", "--attn asa --rollout dense"),
        ):  # what a warm start brings along counts
            assert in_rl("--out", tmp, "--name", name, "--steps", 0, "--warm-steps", 1, *args.split())[0] == 0
        for args in (
            f"--warm {tmp}/words --correct twin",
            f"--warm {tmp}/asa",
            "--resume --warm nowhere",
            "--lr -1",
            "--warm-steps 0",
            "--max-norm -1",
            "--recent -1",
            "--wrong",
            "--task chess",
            "--budget 2",
            "--buffer 0",
            "--queries 0",
            "--group-size 1",
            "--minibatches 3",
            "--attn asa",
            "--width 30",
            "--warm nowhere",
            f"--warm {torn}",
            "--resume",
            "--clip 2",
            "--correct twice",
            "--size 0",
            "--sinks 7",
            "--task words --correct replay",
            *["--device cuda"] * (not torch.cuda.is_available()),
        ):
            code, _, err = in_rl("--out", tmp, "--name", "bad", *args.split())
            assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (
                f"{args}: exit code {code}, {err!r}"
            )
            assert not pathlib.Path(tmp, "bad", "ckpt.pt").exists(), f"{args}: something was written"


def test_rl_learns_or_says_not():
    quick = {
        name[2:].replace("-", "_"): int(v) if v.isdigit() else v
        for name, v in zip(RL_QUICK[::2], RL_QUICK[1::2])
    }
    preset = lambda **more: swapped(
        train_rl, "PRESETS", {"small": {**quick, **more}}
    )  # as if these were the preset's own settings
    with tempfile.TemporaryDirectory() as tmp:
        with preset(steps=1):
            code, said, _ = in_rl("--small", "--out", tmp, "--name", "idle", "--steps", 1, "--check")
        assert code == 1 and said.strip().endswith("NOT"), (
            "a model that did not learn: NOT, and exit code 1 with --check"
        )
        usual = ("small", "both", 0)
        easy = {usual: {**train_rl.EXPECTED[usual], "greedy": (0.0, 1.0)}}  # as if the warm start were enough
        with swapped(train_rl, "EXPECTED", easy), preset(steps=3, lr=0.0):
            code, said, _ = in_rl(
                "--small", "--out", tmp, "--name", "still", "--steps", 3, "--lr", 0, "--check"
            )
        assert code == 1 and said.strip().endswith("NOT"), "a learning rate of 0: NOT"
    cfg = train_rl.Config(preset="small", **train_rl.PRESETS["small"])
    for solved, greedy, ok in (
        ([0.2] * 30 + [0.7] * 30, 0.95, True),
        ([0.2] * 60, 0.95, False),
        ([0.2] * 30 + [0.7] * 30, 0.5, False),
    ):
        line, got = train_rl.verdict(cfg, greedy, solved)
        assert got is ok and line.endswith("OK" if ok else "NOT"), line
    for other in ({"correct": "none"}, {"task": "words"}, {"seed": 7}, {"lr": 1.0}, {"steps": 0}):
        assert train_rl.verdict(dataclasses.replace(cfg, **other), 0.0, [])[1] is None, (
            f"{other}: no expectation, no verdict"
        )


def test_rl_stopped_where_it_evaluates():
    """A signal in a step that is due for an evaluation costs no evaluation; what a resumed run cannot change is refused, and fewer steps."""
    learn = train_rl.learn

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return learn(*args)

    with tempfile.TemporaryDirectory() as tmp:
        common = ["--out", tmp, "--name", "run", "--eval-every", 1]
        with swapped(train_rl, "learn", interrupted):
            assert in_rl(*common, "--steps", 3)[0] == 130
        for args in (["--steps", 0], ["--seed", 1], ["--queries", 3], ["--warm-steps", 31]):
            code, _, err = in_rl(*common, "--resume", *args)
            assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (
                f"{args}: {code}, {err!r}"
            )
        assert in_rl(*common, "--steps", 3, "--resume")[0] == 0
        log = [json.loads(line) for line in pathlib.Path(tmp, "run", "log.jsonl").read_text().splitlines()]
    found = [e["step"] for e in log if "dense_greedy" in e and not e.get("final")]
    assert found == [0, 1, 2, 3], f"evaluated at {found}"


@slow
def test_arms_script_runs_and_makes_a_table():
    with tempfile.TemporaryDirectory() as tmp:
        own = [
            "--out",
            f"{tmp}/arms.jsonl",
            "--runs",
            f"{tmp}/runs",
            "--processes",
            1,
            "--seeds",
            0,
            "--arms",
            "dense",
            "none-rkv-8-2-2-0-2",
        ]
        said, _ = run(*own, "--", *RL_QUICK[:-6], "--steps", 2, script="results/rl_arms.py")
        run(*own, script="results/rl_arms.py", code=2)  # the folder of the runs is taken
        assert re.search(r"dense +1 +2", said) and re.search(r"none-rkv-8-2-2-0-2 +1 +2", said), said


def results_script(name):
    spec = importlib.util.spec_from_file_location(name, HERE / "results" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@slow
def test_compressors_script_knows_the_full_cache():
    """The sampler that evicts nothing is the dense policy; one that evicts is not, and saves bytes."""
    script = results_script("rl_compressors")
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()) as said:
        assert (
            in_rl("--out", tmp, "--name", "start", "--steps", 0, "--warm-steps", 150, "--warm-lr", 8e-3)[0]
            == 0
        )
        script.main(f"{tmp}/start", "rkv-6-2-2-0-2", "streaming-6-2-2-0-2", problems=8)
        for wrong in (
            ["no such folder"],
            *([f"{tmp}/start", c] for c in ("rkv-6", "x-6-2-2-0-2", "rkv-2-2-2-0-2")),
        ):
            _, err = run(*wrong, script="results/rl_compressors.py", code=2)
            assert err.startswith("error: ") and err.count("\n") == 1, err
    full, rkv, streaming = (
        [float(x) for x in re.findall(r"(-?[\d.]+)%? ", line.split("|")[1] + " ")]
        for line in said.getvalue().splitlines()[3:]
    )
    assert full[0] == 0 and abs(full[3]) < 1e-4 and full[4] == 0, full
    assert rkv[0] > 20 and rkv[3] > 1e-3 and streaming[0] > rkv[0], (rkv, streaming)


def test_arms_table_leaves_out_unfinished_runs():
    lines = []
    for arm, seed, value, final in (
        ("one", 0, 0.5, True),
        ("two", 0, 0.25, True),
        ("two", 1, 0.75, True),
        ("two", 2, 0.0, False),
    ):
        log = [
            {"step": 0, "cache_bytes": 1, "dense_bytes": 2},
            {"step": 0, "dense_greedy": 1.0, "sparse_greedy": 1.0},
            *({"step": s, "solved": value, "vetoed": 0, "k3": 1, "tokens_per_second": 9} for s in (1, 2)),
            {"step": 2, "dense_greedy": value, "sparse_greedy": value},
        ]
        log += [{"step": 2, "final": True, "dense_greedy": value, "sparse_greedy": value}] * final
        lines += [json.dumps({"arm": arm, "seed": seed, **e}) + "\n" for e in log]
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()) as said:
        pathlib.Path(tmp, "arms.jsonl").write_text("".join(lines))
        results_script("rl_arms").table(f"{tmp}/arms.jsonl")
    said = said.getvalue()
    assert re.search(r"^one +1 +2 +0\.500 ±- +0\.750 ±- ", said, re.M), (
        f"one seed has no spread; each evaluation counts once:\n{said}"
    )
    assert re.search(r"^two +2 +2 +0\.500 ±0\.354 ", said, re.M), f"the mean of the finished ones:\n{said}"
    assert re.search(r"^two\* +1 +2 +0\.000 ±- ", said, re.M), f"an unfinished run is marked:\n{said}"


def test_memory_script_warms_every_shape_twice():
    """The first call of a shape warms up, the second is captured: neither may fall into the timed one."""
    script, calls, before = results_script("rl_memory"), [], []
    model = LM(tiny("gqa", layers=1))
    count = lambda self, work, *args: (calls.append((work.__name__, *args)), work(*args))[1]
    clock = type(
        "time", (), {"perf_counter": staticmethod(lambda: (before.append(list(calls)), float(len(calls)))[1])}
    )
    with swapped(script.Decoder, "run", count), swapped(script, "time", clock):
        for compress in (None, Compressor("rkv", 20, 4, 4)):
            calls.clear(), before.clear()
            script.measure(model, 2, 40, 24, compress)
            assert all(before[0].count(key) >= 2 for key in set(calls)), f"{set(calls)} of {before[0]}"


@slow
def test_rl_options_are_read_and_the_demo_runs():
    tree = ast.parse((HERE / "train_rl.py").read_text())
    owner = lambda n: n.value.id if isinstance(n.value, ast.Name) else None
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and owner(n) in ("cfg", "self")}
    helpers = {
        "attn",
        "layers",
        "width",
        "heads",
        "groups",
        "window",
        "out",
        "name",
        "device",
        "check",
    }  # read by build and by train_lm
    for f in dataclasses.fields(train_rl.Config):
        assert f.name in read | helpers, f"--{f.name} is never read"
        assert f.metadata["help"], f"--{f.name} has no help"
    began = time.time()
    out, _ = run(script="sparse_rl.py")
    assert all(w in out for w in ("rkv", "snapkv", "streaming", "xi", "#")), out
    assert time.time() - began < 40, f"the demo took {time.time() - began:.0f} s"


# ---------------------------------------------------------------------------------------------------------------------------------
# documents


def test_every_option_is_read():
    tree = ast.parse((HERE / "train_lm.py").read_text())
    owners = lambda n: (
        {n.value.id}
        if isinstance(n.value, ast.Name)
        else {n.value.attr}
        if isinstance(n.value, ast.Attribute)
        else set()
    )
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and owners(n) & {"cfg", "self"}}
    for f in dataclasses.fields(Config):
        assert f.name in read, f"--{f.name} is never read"
        assert f.metadata["help"], f"--{f.name} has no help"


def test_readme_commands_parse():
    readme = (HERE / "README.md").read_text()
    commands = [
        line.strip().split("#")[0].split()
        for line in re.findall(r"^(?:    |\$ )(.*python.*|.*torchrun.*)$", readme, re.M)
    ]
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


@slow
def test_demos_run():
    for script, words in (
        ("latent_attention.py", ("MHA", "MLA", "GLA")),
        ("nsa.py", ("compressed", "ASA global", "#")),
        ("mtp.py", ("drafted", "tokens per read")),
        *([("kernels.py", ("window", "lists"))] if kernels.triton else []),
    ):
        began = time.time()
        out, _ = run(script=script, env={"OMP_NUM_THREADS": "1"})
        assert all(w in out for w in words), out
        assert time.time() - began < 60, f"{script} took {time.time() - began:.0f} s"
    out, err = run("--bnch", script="kernels.py", code=2)
    assert err.startswith("error: ") and err.count("\n") == 1 and not out, (
        f"kernels.py, a wrong option: {err!r}"
    )


def run_one(name, everything):
    """-> result, seconds, what the test printed."""
    globals()["EVERYTHING"] = everything
    setup_function()
    began = time.time()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            globals()[name]()
            result = "passed"
        except unittest.SkipTest as e:
            result = "skipped"
            print(f"         {e}")
        except Exception:
            result = "failed"
            print(traceback.format_exc())
    return result, time.time() - began, said.getvalue()


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("-k", metavar="WORD", default="", help="only tests whose name contains this")
    parser.add_argument("--quick", action="store_true", help="leave the slow tests out")
    parser.add_argument("--all", action="store_true", help="run the longest tests as well")
    given = parser.parse_args(argv)
    tests = {name: f for name, f in globals().items() if name.startswith("test_") and given.k in name}
    if given.quick:
        tests = {name: f for name, f in tests.items() if not hasattr(f, "slow")}
    names = sorted(tests, key=lambda name: not hasattr(tests[name], "slow"))  # the slow ones first
    workers = 1 if CUDA else min(4, os.cpu_count(), max(1, len(names)))
    count = {"passed": 0, "failed": 0, "skipped": 0}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
        running = {pool.submit(run_one, name, given.all): name for name in names}
        for future in concurrent.futures.as_completed(running):
            result, seconds, said = future.result()
            count[result] += 1
            print(f"{result:8} {running[future]} ({seconds:.1f} s)", flush=True)
            if result != "passed":
                print(said, end="")
    print(", ".join(f"{n} {result}" for result, n in count.items()))
    return int(count["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
