"""How many tokens one read yields: draft several with one small module, verify them in one pass.

    python mtp.py                         a sentence of a tiny model, with its drafts
    python mtp.py out/small-asa           a text from a run of train_lm.py, its accepted drafts marked
    python results/drafts.py equip RUN    adds a module to a run that has none

Decoding is bound by reading the weights and the cache, once per token. Multi-token prediction (MTP) adds one
block to a model, unrolled K times: depth k guesses the token k + 1 places ahead. The model then reads all K
guesses at once and keeps as many as its own distribution supports, and always one more token. The text is
distributed exactly as without drafts (up to rounding), only sooner.

    1) draft     the module samples d_1 .. d_g, each from its own distribution q_k          one block each
    2) verify    the trunk reads the pending token and the drafts: g + 1 distributions p    one pass
    3) accept    d_k with probability min(1, p_k / q_k), up to the first refusal;
                 then one token from (p - q)+, or from p_{g+1} if none was refused
    4) commit    stop tokens and limits; log p of what was sampled; every row at its own length
    5) catch up  the trunk forgets refused drafts; the module makes its entries from the trunk's states

The module learns from a frozen trunk's own texts and distributions (`equip`: soft cross entropy, then
end-to-end TV) or beside the trunk (`train_lm.py --mtp K`: soft cross entropy). The trunk gets no gradient
from it. Every row of a batch accepts its own number of drafts, and rows that end are refilled. On a GPU a few
rounds are one CUDA graph, and so are the passes of a training step (`Captured`; train_lm.py uses it, too). The
engine measures whether drafts pay; where they do not, it goes on without them.

Does NOT include: trees of drafts, reduced draft vocabularies, top-p.
Read: Leviathan et al. 2211.17192 (verification); DeepSeek-V3 2412.19437 (module);
FastMTP 2509.18362 (one module for all depths); Bebop 2606.12370 (end-to-end TV). Of MTP-RL (Findings of ACL
2026, 1871), which this file follows, only the abstract is available to us: K, the losses, what is detached
and the drafting are ours.

Letters: B rows of a batch, T tokens, C model width; K depths, g <= K drafts in a round, V vocabulary; p is
the target's, q the draft's distribution. Tokens are counted from 0 and depths from 1: place s of a text holds
the trunk's state h_s at token x_s, which predicts x_{s+1}; depth k at place s predicts x_{s+k+1}.

This file knows no model class. A trunk has hidden(tokens, cache, count) -> (B, T, C) after the final norm,
for a whole text without a cache; embed.weight and head.weight (V, C), no bias; and new_cache(batch, max_len,
margin, dtype), with `compress` too if the cache is to be compressed: max_len tokens a row, of which `margin`
can be taken back. A cache has seen (B,) tokens, rollback(seen) and, for a compressor, groups (what it evicts
from) and used (B,) of max_len slots. A block is anything like train_lm.Block: block(x, pos, cache, count,
source), and block.attn.new_cache for a cache of its own.
"""

import codecs
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from latent_attention import cache_bytes, rms_norm

# ----------------------------------------------------------------------------------------------------------
# The module


class MTP(nn.Module):
    """One block for all depths: DeepSeek-V3's module at depth 1, fed with its own output from depth 2 on.

    No weight depends on K. Place s sees the same keys and values in training and in drafting: at every depth
    those that depth 1 made of places <= s. So a later draft only reads the module's cache.
    """

    def __init__(self, block, width, eps=1e-6):
        super().__init__()
        self.norm_h = nn.Parameter(torch.ones(width))
        self.norm_e = nn.Parameter(torch.ones(width))
        self.norm_out = nn.Parameter(torch.ones(width))
        self.join_h = nn.Linear(width, width, bias=False)  # with join_e the two halves of one matrix
        self.join_e = nn.Linear(width, width, bias=False)
        self.block = block
        self.eps = eps

    def norm(self, x, weight):
        return rms_norm(x, weight, self.eps)

    def embed_half(self, embedded):
        """What an embedding (..., C) adds to the input (..., C). It is the same at every depth."""
        return self.join_e(self.norm(embedded, self.norm_e))

    def forward(self, h, e, pos, cache=None, count=None, source=None):
        """One depth -> its state (B, T, C), and the block's input (B, T, C).

        h (B, T, C) state of the depth before, at depth 1 the trunk's; e (B, T, C) `embed_half` of x_{s+k},
        the token that this state predicts (in training the true one); pos (B or 1, T) of the places; cache,
        count: of the block, count None only reads; source (B, T, C): without a cache, depth 1's input from
        depth 2 on.
        """
        h = self.norm(h, self.norm_h)  # (B, T, C)
        u = torch.addmm(e.flatten(0, 1), h.flatten(0, 1), self.join_h.weight.t())  # join_h(h) + e, (B T, C)
        u = u.view_as(h)  # (B, T, C)
        return self.norm(self.block(u, pos, cache, count, source), self.norm_out), u

    def unroll(self, h, tokens, embed, K):
        """All depths of a text at once, teacher-forced.

        h (B, T, C), tokens (B, T), embed (V, C) -> [state (B, T - k, C) for k = 1..K]. The trunk gets no
        gradient: h and embed are detached. Within the module it flows through all depths.
        """
        e = self.embed_half(F.embedding(tokens, embed.detach()))  # (B, T, C)
        h = h.detach()
        source = None
        states = []
        for k in range(1, K + 1):
            rows = tokens.shape[1] - k
            pos = torch.arange(rows, device=tokens.device)[None]  # (1, T - k)
            h, u = self(h[:, :rows], e[:, k:], pos, source=source)  # (B, T - k, C) twice
            source = u[:, :-1] if source is None else source[:, :-1]  # (B, T - k - 1, C)
            states.append(h)
        return states


# ----------------------------------------------------------------------------------------------------------
# Losses: z logits and p target probabilities (..., V) -> (...)


def law(logits, temperature):
    """The distribution that is sampled from: softmax(logits / temperature) in fp32 or better.

    Below temperature 1e-6, far above where the quotient overflows, all mass is on the best token. Where a
    logit is nan, all of the law is.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if temperature < 1e-6:
        best, index = logits.to(dtype).max(-1, keepdim=True)  # (..., 1) each; max finds a nan
        return F.one_hot(index[..., 0], logits.shape[-1]) + (best - best)
    return (logits.to(dtype) / temperature).softmax(-1)


def soft_ce(z, p):
    """Cross entropy to the trunk's law. Its gradient q - p is that of CE on samples of p, without noise."""
    return -(p * z.log_softmax(-1)).sum(-1)


def tv(z, p):
    """Total variation 1 - sum min(p, q): how likely a sampled draft is refused.

    Its gradient is proportional to q: dead from a cold start, so soft CE comes first.
    """
    return 1 - torch.minimum(p, z.softmax(-1)).sum(-1)


def depth_masks(mask, K):
    """Which places count at depth k: those whose tokens x_{s+1} .. x_{s+k+1} all do.

    mask (B, T) of 0 and 1 -> [(B, T - k - 1) for k = 1..K].
    """
    windows = (mask[:, 1:].unfold(1, k + 1, 1) for k in range(1, K + 1))  # (B, T - k - 1, k + 1) each
    return [window.prod(-1) for window in windows]


def depths(states, head, p, mask, weight=None):
    """Of each depth what it is measured by -> logits (B, rows, V), target law (B, rows, V), mask (B, rows).

    states of MTP.unroll, head (V, C), p (B, T, V) the trunk's law, mask (B, T) 1 on tokens that count: the
    answer, its stop token included; weight (B, T) of the places, which the masks take on. The trunk gets no
    gradient: head and p are detached.
    """
    masks = depth_masks(mask.to(p.dtype), len(states))
    for k, (h, m) in enumerate(zip(states, masks), 1):
        rows = m.shape[1]  # T - k - 1: those with a target
        z = F.linear(h[:, :rows], head.detach()).to(p.dtype)  # (B, rows, V)
        yield z, p[:, k : k + rows].detach(), m if weight is None else m * weight[:, :rows]


def soft_loss(states, head, p, mask, temperature=1.0, decay=0.6):
    """Soft CE, one number: the depths' means, weighted by decay^(k-1), normalised (FastMTP)."""
    weights = torch.tensor([decay**k for k in range(len(states))])  # (K,)
    total = 0.0
    for w, (z, target, m) in zip(weights / weights.sum(), depths(states, head, p, mask)):
        total = total + w * (m * soft_ce(z / temperature, target)).sum() / m.sum().clamp(min=1)
    return total


def e2e_loss(states, head, p, mask, temperature=1.0, weight=None):
    """End-to-end TV, one number: 1 - the expected share of accepted drafts (Bebop).

    1 - 1/K sum_k prod_{i<=k} (1 - TV_i), each product of one row. The depths' weights come out by themselves.
    weight (B, T) of the places: the mean over them is a weighted one.
    """
    lost = 0.0
    count = 0.0
    alive = torch.ones_like(p[:, :, 0])  # (B, T)
    for z, target, m in depths(states, head, p, mask, weight):
        alive = alive[:, : m.shape[1]] * (1 - tv(z / temperature, target))  # (B, rows)
        lost = lost + (m * (1 - alive)).sum()
        count = count + m.sum()
    return lost / count.clamp(min=1)


@torch.no_grad()
def expected_acceptance(states, head, p, tokens, mask, temperature=1.0):
    """How likely drafts 1..k are all accepted, (K,), estimated without drafting from text that p wrote.

    sum_v min(p_k, q_k), each prefix weighted by how likely accepted drafts write it: the product over i < k
    of min(1, q_i(x) / p_i(x)) at the token x = x_{s+i+1} that depth i predicts.
    """
    found = []
    weight = torch.ones_like(p[:, :, 0])  # (B, T)
    for z, target, m in depths(states, head, p, mask):
        rows = m.shape[1]
        q = law(z, temperature)  # (B, rows, V)
        weight = weight[:, :rows] * m  # (B, rows)
        found.append((weight * torch.minimum(target, q).sum(-1)).sum() / m.sum().clamp(min=1))
        x = tokens[:, -rows:, None]  # (B, rows, 1): x_{s+k+1}
        ratio = q.gather(-1, x) / target.gather(-1, x).clamp(min=1e-30)  # (B, rows, 1)
        weight = weight * ratio.clamp(max=1)[..., 0]  # (B, rows)
    return torch.stack(found)


# ----------------------------------------------------------------------------------------------------------
# 3) Accept, 4) commit


@kernels.fast_path
def draw(logits, temperature, noise=None):
    """The law p of logits (..., V), and a token of it -> (..., V), (...) or None without noise.

    With noise (..., V) ~ Exp(1), argmax(p / noise) is distributed as p, on any device and in a CUDA graph.
    """
    p = law(logits, temperature)  # (..., V)
    return p, None if noise is None else (p / noise).argmax(-1)


def accept(p, q, drafts, forced, u, noise):
    """Rejection sampling: accepted drafts and the token after them are distributed as p (Leviathan et al.).

    A token x is accepted with probability q min(1, p / q) = min(p, q), and drawn after a refusal with (p -
    q)+: together p.

    p       (B, g + 1, V) the target's laws at the pending token and at each draft
    q       (B, g, V) the laws that the drafts (B, g) were drawn from; one-hot where the best token was taken
    forced  (B, g) bool: not a draft but a given token, always accepted
    u       (B, g) uniform; noise (B, V) ~ Exp(1)
    -> n (B,) accepted drafts, and the token after them (B,).
    """
    g = drafts.shape[1]
    at = drafts[..., None]  # (B, g, 1)
    p_draft = p[:, :g].gather(-1, at)[..., 0]  # (B, g)
    q_draft = q.gather(-1, at)[..., 0]  # (B, g)
    ok = forced | (u * q_draft < p_draft)  # (B, g): u < p / q
    n = ok.long().cumprod(1).sum(1)  # (B,)
    # The residual (p - q)+ replaces the refused draft. Behind the last draft q is 0: the bonus comes from p.
    here = n[:, None, None].expand(-1, 1, p.shape[-1])  # (B, 1, V)
    p_n = p.gather(1, here)[:, 0]  # (B, V)
    q_n = F.pad(q, (0, 0, 0, 1)).gather(1, here)[:, 0]  # (B, V)
    rest = (p_n - q_n).clamp(min=0)  # (B, V)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p_n)  # else p = q, up to rounding
    return n, (rest / noise).argmax(-1)


class State(NamedTuple):
    """What a Decoder knows of its B rows, all on the device. Every row has a length of its own."""

    text: torch.Tensor  # (B, width) the prompt, the answer, room for drafts beyond the limit
    logp: torch.Tensor  # (B, width) log-probabilities of the tokens after the first, under the target
    known: torch.Tensor  # (B,) tokens of the row; the last is pending: the model has not read it yet
    given: torch.Tensor  # (B,) tokens of its prompt
    limit: torch.Tensor  # (B,) where it ends at the latest
    active: torch.Tensor  # (B,) bool: it has not ended
    counts: torch.Tensor  # (B, 3, K) drafts reached, accepted, expected to be accepted: sum of min(p, q)
    reads: torch.Tensor  # (B, 2) rounds that read no prompt, and the tokens that they yielded


class Answers(NamedTuple):
    """N prompts with what a model wrote behind them; T tokens of the longest."""

    text: torch.Tensor  # (N, T), padded with 0
    logp: torch.Tensor  # (N, T) log-probabilities of the answers' tokens, under the target; else 0
    mask: torch.Tensor  # (N, T) bool: the answers' tokens


@kernels.fast_path
def commit(p, q, drafts, u, noise, state, room, stop):
    """Accept drafts, then write them and the token after them behind the known text -> tokens taken (B,).

    A row ends at a token `stop` (-1: at none) and at its limit. room (B,): the most tokens that it may take
    now; laws behind them are of no use. p, q, drafts, u, noise as in `accept`. All of `state` but given and
    limit is changed in place.
    """
    text, logp, known, given, limit, active, counts, reads = state
    g = drafts.shape[1]
    j = torch.arange(g + 1, device=p.device)  # (g + 1,)
    place = known[:, None] + j  # (B, g + 1)
    forced = place < given[:, None]  # (B, g + 1): the prompt's own tokens
    n, last = accept(p, q, drafts, forced[:, :g], u, noise)  # (B,), (B,)

    # Count.
    real = active & (known >= given) & (room > 0)  # (B,)
    tried = real[:, None] & (j[:g] < room[:, None])  # (B, g)
    reached = tried & (n[:, None] >= j[:g])  # (B, g)
    passed = tried & (n[:, None] >= j[1:])  # (B, g)
    # A module that has read nothing yet gives nan, which no comparison accepts.
    chance = torch.minimum(p[:, :g], q).sum(-1).nan_to_num() * reached  # (B, g)
    counts[..., :g] += torch.stack([reached.to(p.dtype), passed.to(p.dtype), chance], dim=1)  # (B, 3, g)

    # Write.
    y = torch.where(j < n[:, None], F.pad(drafts, (0, 1)), last[:, None])  # (B, g + 1)
    y = torch.where(forced, text.gather(1, place), y)  # (B, g + 1)
    y_logp = p.gather(-1, y[..., None])[..., 0].log()  # (B, g + 1)
    take = torch.minimum(n + 1, room)  # (B,)
    stops = (y == stop) & (j < take[:, None]) & ~forced  # (B, g + 1)
    stopped = stops.any(1)  # (B,)
    take = torch.where(stopped, stops.int().argmax(1) + 1, take) * active  # (B,)
    for buffer, new in ((text, y), (logp, y_logp)):
        buffer.scatter_(1, place, torch.where(j < take[:, None], new, buffer.gather(1, place)))
    known += take
    reads += torch.stack([real, real * take], dim=1)  # (B, 2)
    active &= (known < limit) & ~stopped
    return take


# ----------------------------------------------------------------------------------------------------------
# The decoding engine


class Drafter:
    """The module's side of a Decoder.

    seen    (B,) tokens of a row that the module has entries for: known - 1 whenever it drafts
    newest  (B, 1, C) depth 1 of the last of them, which predicts the first draft
    table   (V, C) MTP.embed_half of every token
    """

    def __init__(self, mtp, trunk, batch, room, margin, temperature, compress):
        weight = trunk.embed.weight  # (V, C)
        kind = {"dtype": weight.dtype, "device": weight.device}
        self.mtp = mtp
        self.embed = weight
        self.head = trunk.head.weight  # (V, C)
        self.temperature = temperature
        self.cache = mtp.block.attn.new_cache(batch, room, margin, **kind)
        if compress:
            compress.extend(self.cache, mtp.block.attn.heads)
        self.seen = torch.zeros(batch, dtype=torch.long, device=weight.device)
        self.newest = torch.zeros(batch, 1, weight.shape[1], **kind)
        self.table = mtp.embed_half(weight).detach()

    def restart(self):
        """The weights may have changed since the last call."""
        self.table.copy_(self.mtp.embed_half(self.embed))

    def forget(self, fresh):
        """Drop all entries of the rows `fresh` (B,) bool."""
        for part in self.cache.values():
            part.rollback(self.seen.masked_fill(fresh, 0))
        self.seen.masked_fill_(fresh, 0)

    @kernels.tensor_cores
    def draft(self, g, noise):
        """noise (> g, B, 1, V) ~ Exp(1) -> drafts (B, g), and the laws they were drawn from (B, g, V)."""
        drafts = []
        laws = []
        row = self.seen[:, None] - 1  # (B, 1)
        h = self.newest  # (B, 1, C)
        for k in range(g):
            if k > 0:  # reads the module's cache, writes nothing
                h, _ = self.mtp(h, F.embedding(drafts[-1], self.table), row, self.cache)
            q, d = draw(F.linear(h, self.head), self.temperature, noise[k])  # (B, 1, V), (B, 1)
            drafts.append(d)
            laws.append(q)
        return torch.cat(drafts, dim=1), torch.cat(laws, dim=1)

    @kernels.tensor_cores
    def catch_up(self, text, h, count):
        """Make entries of the next count[b] tokens of text (B, width) from the trunk's states h (B, T, C)."""
        row = self.seen[:, None] + torch.arange(h.shape[1], device=h.device)  # (B, T)
        after = text.gather(1, (row + 1).clamp(max=text.shape[1] - 1))  # (B, T): x_{s+1}
        out, _ = self.mtp(h, F.embedding(after, self.table), row, self.cache, count)  # (B, T, C)
        at = (count - 1).clamp(min=0)[:, None, None]  # (B, 1, 1)
        last = out.gather(1, at.expand(-1, 1, out.shape[2]))  # (B, 1, C)
        torch.where(count[:, None, None] > 0, last, self.newest, out=self.newest)
        self.seen += count


class Pace:
    """How many drafts pay: K, K / 2 or none, by the clock, list of prompts by list; or `fixed`.

    Whole lists are compared: with drafts the module reads the prompts too, and a list ends with its slowest
    row, so that single rounds promise more than a list keeps.
    """

    RETRY = 16  # after so many lists another choice is tried again, since acceptance and timings change

    def __init__(self, K, fixed=None):
        self.ms = dict.fromkeys((K, (K + 1) // 2, 0), 0.0)  # of a token; what is not timed yet counts as fast
        self.fixed = fixed
        self.lists = 0

    def choose(self):
        """Drafts in the rounds of the next list."""
        if self.fixed is not None:
            return self.fixed
        self.lists += 1
        turn, rest = divmod(self.lists, self.RETRY)
        if rest == 0:
            return list(self.ms)[turn % len(self.ms)]
        return min(self.ms, key=self.ms.get)

    def update(self, g, ms):
        """After a list with g drafts: milliseconds a token. A disturbance only adds, and counts little."""
        if g in self.ms:
            self.ms[g] = min(ms, 1.1 * (self.ms[g] or ms))


class Decoder:
    """Batched generation with or without drafts, from preallocated caches.

    trunk, mtp   see above; mtp None or drafts 0: plain decoding
    batch        rows that are decoded at once; longer lists of prompts refill the rows that end
    max_len      most tokens of a row, prompt included
    K            most drafts in a round
    temperature  of the target and of the drafts; at 0 both are the best tokens
    stop         a token that ends a row, or None
    drafts       None: none, K / 2 or K, whichever is fastest for whole lists of prompts; else always so many
    compress     None, or what evicts entries from the caches of all layers (sparse_rl.Compressor): the cache
                 then has compress.slots slots a row, and no text is too long for it; the module's likewise.
                 A round takes a row no further than its next eviction, so it has at most buffer - 1 drafts
    share        None; or (which rows these are, of how many): several engines of one seed write together
                 what one engine of all rows would
    Weights may change between calls (in place, as optimizers do): graphs stay valid. Raises ValueError for
    settings that do not go together.

    Rows are ragged: each accepts, ends and starts anew on its own. Between two rounds each row has `known`
    tokens, and the trunk has read all but the last, which is pending. A round appends 1 + g tokens to the
    trunk's cache; `commit` takes some of them, and the others are taken back. The module has seen what the
    trunk has seen; in a list without drafts it takes no part. A row that has ended reads 0 tokens in a round.
    """

    SEGMENT = 4  # rounds without drafts between two looks of the host
    PIECE = 64  # tokens of a prompt that are read at once

    def __init__(
        self, trunk, batch, max_len, mtp=None, K=0, temperature=1.0, stop=None,
        drafts=None, compress=None, share=None
    ):  # fmt: skip
        K = K if mtp is not None else 0
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, not {temperature}")
        if drafts is not None and not 0 <= drafts <= K:
            raise ValueError(f"drafts must be 0 to {K} here, not {drafts}")
        K = 0 if drafts == 0 else K
        if compress:  # a round cannot read more than fits between two evictions
            K = min(K, compress.buffer - 1)
            drafts = drafts and min(drafts, K)
        self.trunk = trunk
        self.batch = batch
        self.max_len = max_len
        self.K = K
        self.temperature = temperature
        self.stop = -1 if stop is None else stop
        self.compress = compress
        self.pace = Pace(K, drafts)
        self.graphs = {}
        self.pool = None
        self.cold = False  # a list in which something ran for the first time, or was captured

        weight = trunk.embed.weight  # (V, C)
        self.device = weight.device
        self.cuda = weight.is_cuda
        room = max_len
        if compress:
            room = compress.slots
            self.SEGMENT = compress.buffer  # without drafts, a row is full at the end of a segment
            self.PIECE = compress.buffer
        evicts = {"compress": compress} if compress else {}  # a trunk need not know of it
        self.cache = trunk.new_cache(batch, room, K + 1, dtype=weight.dtype, **evicts)
        self.module = Drafter(mtp, trunk, batch, room, K + 1, temperature, compress) if K else None
        self.drafter = self.module  # None in a list in which it takes no part
        one = torch.ones(batch, dtype=torch.long, device=self.device)  # (B,)
        width = max_len + K + 2  # a round may write behind the limit
        own, self.total = share or (range(batch), batch)
        self.own = torch.tensor(list(own), device=self.device)  # (B,)
        self.fresh = one < 1  # (B,) rows that were filled last
        self.state = State(
            text=one.new_zeros(batch, width),
            logp=one.new_zeros(batch, width, dtype=torch.promote_types(weight.dtype, torch.float32)),
            known=one.clone(),
            given=one.clone(),
            limit=one.clone(),
            active=one < 1,
            counts=one.new_zeros(batch, 3, max(1, K), dtype=torch.float32),
            reads=one.new_zeros(batch, 2, dtype=torch.float32),
        )

    @property
    def nbytes(self):
        """Bytes of the caches, the module's included."""
        return self.cache.nbytes + (cache_bytes([self.module.cache]) if self.module else 0)

    # -- what a GPU captures: static shapes, no look from the host

    def round(self, g):
        """Draft g tokens, verify, commit -> drafts (B, g)."""
        state = self.state
        V = len(self.trunk.embed.weight)
        pending = state.text.gather(1, state.known[:, None] - 1)  # (B, 1)
        noise = state.logp.new_empty(g + 1, self.total, 1, V).exponential_()
        u = torch.rand(self.total, g, device=self.device, dtype=state.logp.dtype)
        if self.total > self.batch:
            noise, u = noise[:, self.own], u[self.own]  # (g + 1, B, 1, V), (B, g)

        # 1) draft
        drafts = pending[:, :0]  # (B, 0)
        q = state.logp.new_empty(self.batch, 0, V)
        if g:
            drafts, q = self.drafter.draft(g, noise)  # (B, g), (B, g, V)
            place = state.known[:, None] + torch.arange(g, device=self.device)  # (B, g)
            forced = place < state.given[:, None]  # (B, g): tokens of a prompt that rides along
            drafts = torch.where(forced, state.text.gather(1, place), drafts)

        # 2) verify
        tokens = torch.cat([pending, drafts], dim=1)  # (B, g + 1)
        room = state.limit - state.known  # (B,)
        if self.compress:  # a row goes no further than its next eviction
            room = torch.minimum(room, self.cache.max_len - self.cache.used)
        count = room.clamp(max=g + 1) * state.active  # (B,)
        h = self.trunk.hidden(tokens, self.cache, count)  # (B, g + 1, C)
        p, _ = draw(F.linear(h, self.trunk.head.weight), self.temperature)  # (B, g + 1, V)

        # 3) accept, 4) commit
        take = commit(p, q, drafts, u, noise[g, :, 0], state, room, self.stop)  # (B,)

        # 5) catch up
        if g:
            self.cache.rollback(state.known - 1)
            self.drafter.catch_up(state.text, h, take)
        return drafts

    def rounds(self, g, n):
        """n rounds. Full rows evict before a round; without drafts before the first: rows come into step."""
        for i in range(n):
            if self.compress and (g or i == 0):
                self.evict()
            self.round(g)

    def read(self, start, stop):
        """A piece of the prompts of the fresh rows, for trunk and module."""
        text = self.state.text
        count = (self.state.known - 1 - start).clamp(0, stop - start) * self.fresh  # (B,)
        h = self.trunk.hidden(text[:, start:stop], self.cache, count)  # (B, <= PIECE, C)
        if self.drafter:
            self.drafter.catch_up(text, h, count)

    def evict(self):
        """Full rows evict, in the module's cache at the same tokens as in the trunk's."""
        self.compress(self.cache.groups + ([self.drafter.cache] if self.drafter else []))
        self.compress.record(self.cache.groups)

    def run(self, work, *args):
        """work(*args); on a GPU it is captured the second time, and replayed from then on."""
        key = (work.__name__, self.drafter is None, *args)
        self.cold |= self.cuda and self.graphs.get(key) is None
        if not self.cuda or key not in self.graphs:
            self.graphs[key] = None  # the first time is the warm-up that a capture needs
            work(*args)
            return
        if self.graphs[key] is None:
            torch.cuda.synchronize()
            self.graphs[key] = torch.cuda.CUDAGraph()
            # Results stay in tensors of this object, so that one pool serves all graphs.
            with torch.cuda.graph(self.graphs[key], pool=self.pool):
                work(*args)
            self.pool = self.graphs[key].pool()
        self.graphs[key].replay()

    # -- what the host does

    def check(self, prompts, new):
        if new < 0:
            raise ValueError(f"new must be at least 0, not {new}")
        for p in prompts:
            if not 1 <= len(p) < self.max_len:
                raise ValueError(f"a prompt of {len(p)} tokens: 1 to {self.max_len - 1} are possible here")

    @torch.no_grad()
    def stream(self, prompt, new):
        """Continue one prompt, as `generate` does -> after each round its new tokens, 1-D.

        All but the last of a round were drafts.
        """
        self.check([prompt], new)
        g = self.K if self.pace.fixed is None else self.pace.fixed
        self.restart(self.module if g else None)
        self.fill([0], [prompt], [min(len(prompt) + new, self.max_len)])
        known = len(prompt)
        while self.state.active[0]:
            self.run(self.rounds, g, 1)
            start, known = known, int(self.state.known[0])
            if not self.state.logp[0, start:known].isfinite().all():
                raise FloatingPointError("log-probabilities are not finite: the model's weights are broken")
            yield self.state.text[0, start:known].clone()

    def generate(self, prompts, new):
        """`answer`, cut up -> of each prompt the new tokens and their log-probabilities, both 1-D."""
        if not prompts:
            return []
        text, logp, mask = self.answer(prompts, new)  # (N, T) each
        counts = mask.sum(-1).tolist()
        return list(zip(text[mask].split(counts), logp[mask].split(counts)))

    @torch.no_grad()
    def answer(self, prompts, new):
        """Continue each of N prompts, 1-D tensors of tokens, by at most `new` tokens -> Answers.

        Raises ValueError for a prompt that is empty or too long, FloatingPointError if the model's
        probabilities are not finite.
        """
        self.check(prompts, new)
        todo = list(range(len(prompts)))[::-1]
        state = self.state
        text = state.text.new_zeros(len(prompts), state.text.shape[1])  # (N, width)
        logp = state.logp.new_zeros(text.shape)  # (N, width)
        ends = [0] * len(prompts)
        owner = {}  # row -> the prompt that it answers
        looks = []  # at segments that were started, each with the owners of its time
        g = self.pace.choose()
        self.cold = False
        began = time.perf_counter()
        self.restart(self.module if g else None)
        while todo or owner:
            free = [row for row in range(self.batch) if row not in owner][: len(todo)]
            if free:
                # Reading at once would hold up rows at work: beside them prompts ride along as drafts.
                at_once = not owner or self.compress is not None
                owner.update((row, todo.pop()) for row in free)
                chosen = [prompts[owner[row]] for row in free]
                self.fill(free, chosen, [min(len(p) + new, self.max_len) for p in chosen], at_once)
            looks.append((dict(owner), *self.segment(g)))
            # A look one segment late spares a GPU the wait for the host. Where no prompt waits for a row, it
            # would only keep all rows at work for nothing.
            late = self.cuda and bool(todo)
            while len(looks) > late:
                then, told, done = looks.pop(0)
                if done:
                    done.synchronize()
                active, known = told.tolist()
                ended = [(row, i) for row, i in then.items() if owner.get(row) == i and not active[row]]
                for row, i in ended:
                    del owner[row]
                    ends[i] = known[row]
                if ended:
                    row, i = self.send(torch.tensor(ended)).unbind(1)  # (ended,) each
                    text[i] = state.text[row]  # the row will hold another text
                    logp[i] = state.logp[row]
        spans = torch.tensor([[len(p), end] for p, end in zip(prompts, ends)])  # (N, 2)
        start, end = self.send(spans).split(1, dim=1)  # (N, 1) each
        T = max(ends)
        at = torch.arange(T, device=self.device)  # (T,)
        mask = (at >= start) & (at < end)  # (N, T)
        logp = logp[:, :T].masked_fill(~mask, 0)  # (N, T)
        if not logp.isfinite().all():
            raise FloatingPointError("log-probabilities are not finite: the model's weights are broken")
        if not self.cold:
            self.pace.update(g, 1e3 * (time.perf_counter() - began) / max(1, int(mask.sum())))
        return Answers(text[:, :T].masked_fill(at >= end, 0), logp, mask)

    def restart(self, drafter=None):
        """Before a new list of prompts, with a drafter or None. The weights may have changed."""
        self.state.active.zero_()
        self.state.known.fill_(1)
        self.drafter = drafter
        if drafter:
            drafter.restart()
            drafter.forget(~self.state.active)

    @torch.no_grad()
    def fill(self, rows, prompts, limits, at_once=True):
        """Start texts in some rows, which forget theirs. Prompts are read here, or ride along as drafts."""
        state = self.state
        lengths = [len(p) for p in prompts]
        longest = max(lengths)
        about = torch.tensor([*zip(rows, lengths, limits)])  # (rows, 3)
        text = nn.utils.rnn.pad_sequence([p.cpu() for p in prompts], batch_first=True)  # (rows, longest)
        new = self.send(torch.cat([about, text], dim=1))  # (rows, 3 + longest), in one copy
        row, given, limit = new[:, :3].unbind(1)  # (rows,) each
        self.fresh.zero_().index_fill_(0, row, True)
        state.active.index_fill_(0, row, True)
        state.known[row] = given if at_once else torch.ones_like(given)
        state.given[row] = given
        state.limit[row] = limit
        state.text[row, :longest] = new[:, 3:]
        self.cache.rollback(self.cache.seen.masked_fill(self.fresh, 0))
        if self.drafter:
            self.drafter.forget(self.fresh)
        end = min(-(-(longest - 1) // 16) * 16, state.text.shape[1])  # few shapes, since each is captured
        first = self.compress.budget % self.PIECE if self.compress else 0  # a row is full where a piece ends
        starts = range(first or self.PIECE, end, self.PIECE)
        for start, stop in zip((0, *starts), (*starts, end)) if at_once and end else ():
            if self.compress and start:
                self.run(self.evict)
            self.run(self.read, start, stop)

    def segment(self, g):
        """Start a few rounds -> (2, B): which rows are active, how long each is; and, on a GPU, an event.

        The numbers are there when the event has come. On a CPU it is None.
        """
        n = (self.SEGMENT + 1) // 2 if g else self.SEGMENT  # with drafts it is longer, and rows end sooner
        self.run(self.rounds, g, n)
        told = torch.stack([self.state.active, self.state.known]).to("cpu", non_blocking=self.cuda)  # (2, B)
        return told, torch.cuda.current_stream(self.device).record_event() if self.cuda else None

    def send(self, x):
        """A tensor of the host to the device, in a copy for which the host does not wait."""
        return (x.pin_memory() if self.cuda else x).to(self.device, non_blocking=self.cuda)

    # -- counts

    def forget_counts(self):
        self.state.counts.zero_()
        self.state.reads.zero_()

    def summary(self):
        """Tokens per read and acceptance so far, counted."""
        rounds, tokens = self.state.reads.sum(0).tolist()
        length = f"{tokens / max(rounds, 1):.2f} tokens per read"
        reached, *found = self.state.counts.sum(0).cpu()  # (K,) each
        if not reached.any():
            return f"{length}; no drafts"
        counted, hoped = (percent((x / reached)[reached > 0]) for x in found)
        return f"{length}; each depth accepted {counted}, expected from sum min(p, q) {hoped}"


def percent(rates):
    return " ".join(f"{r:.0%}" for r in rates.tolist())


# ----------------------------------------------------------------------------------------------------------
# The passes of a training step as one CUDA graph


class Captured:
    """f, a function of tensors on one device -> a tensor; on a GPU one CUDA graph from the third call on.

    A graph spares a training step its thousands of launches. A replay runs no Python: it reads and writes
    where the capture did. So what f reads beside its arguments, weights too, may only change in place, and an
    optimizer in f must be `capturable`. Gradients that f leaves behind are written anew by every replay;
    `clear`, the optimizer's zero_grad, drops them before each call that replays nothing. Another shape
    begins anew.
    """

    def __init__(self, f, clear=lambda: None):
        self.f = f
        self.clear = clear
        self.stream = None  # to warm up and capture on: each stream has a workspace of the matrix library
        self.forget()

    def forget(self):
        """Give the graph's memory back, gradients included. The next calls warm up and capture again."""
        self.clear()
        self.calls = 0
        self.graph = None
        self.args = ()
        self.result = None

    def __call__(self, *args):
        cuda = args[0].is_cuda
        if cuda and [x.shape for x in args] != [x.shape for x in self.args]:
            self.forget()
            self.args = [torch.empty_like(x) for x in args]
        if self.graph is None:
            self.clear()
        if not cuda:
            return self.f(*args)
        for mine, x in zip(self.args, args):
            mine.copy_(x)
        self.calls += 1
        self.stream = self.stream or torch.cuda.Stream()
        if self.calls <= 2:  # a capture needs a warm-up, on the same stream
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.f(*self.args)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):  # records f and runs nothing
                self.result = self.f(*self.args)
            self.graph = graph
        self.graph.replay()
        return self.result.clone()  # the next replay writes over it


# ----------------------------------------------------------------------------------------------------------
# Equipping a model that has none


def lesson(trunk, module, text, K, temperature=1.0):
    """text (B, T) -> what losses compare: states of MTP.unroll, head (V, C), the trunk's law (B, T, V)."""
    with torch.no_grad():
        h = trunk.hidden(text)  # (B, T, C)
        p = law(F.linear(h, trunk.head.weight), temperature)  # (B, T, V)
    return module.unroll(h, text, trunk.embed.weight, K), trunk.head.weight, p


def equip(trunk, module, samples, mask, K, steps, rows=32, lr=1e-3, temperature=1.0, say=print):
    """Train the module on a frozen trunk with the trunk's own samples and own distributions.

    Soft CE comes first, then end-to-end TV. samples (N, T) tokens, of which the trunk wrote those with mask
    (N, T) 1 at `temperature`; the first `rows` texts are kept for testing. -> expected_acceptance (K,) on
    those. FloatingPointError if a loss or a gradient is not finite: the module is then of no use.
    """
    device = samples.device
    cuda = device.type == "cuda"
    first = torch.tensor(lr, device=device) if cuda else lr  # a graph reads it from memory
    optimizer = torch.optim.AdamW(module.parameters(), first, (0.9, 0.95), weight_decay=0.0, capturable=cuda)
    rate_of = lambda step: min(1, (step + 1) / 50) * (1 - 0.95 * step / steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_of)
    amp = partial(torch.autocast, "cuda", torch.bfloat16, kernels.has_bf16(device), cache_enabled=False)
    rng = torch.Generator().manual_seed(0)
    start = time.time()
    seen = torch.zeros((), device=device)  # the sum of all losses and norms: one look in many steps

    def update(objective, text, mask):
        with amp():
            loss = objective(*lesson(trunk, module, text, K, temperature), mask, temperature)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach(), norm])

    updates = {"soft": Captured(partial(update, soft_loss)), "e2e": Captured(partial(update, e2e_loss))}
    for step in range(steps):
        kind = "soft" if step < 0.4 * steps else "e2e"
        some = torch.randint(rows, len(samples), (rows,), generator=rng).to(device)  # (rows,)
        found = updates[kind](samples[some], mask[some])  # (2,)
        seen += found.sum()
        schedule.step()
        if (step + 1) % max(1, steps // 10) == 0 or step + 1 == steps:
            held = samples[:rows]  # (rows, T)
            with torch.no_grad(), amp():  # a graph of gradients that lives on would break the next capture
                laws = lesson(trunk, module, held, K, temperature)
                rate = expected_acceptance(*laws, held, mask[:rows], temperature)  # (K,)
            if not seen.isfinite():
                raise FloatingPointError(f"the loss of the module is not finite by step {step + 1}")
            left = (time.time() - start) / (step + 1) * (steps - step - 1)
            say(
                f"step {step + 1:5d}/{steps} | {kind:4} {found[0].item():.3f} | "
                f"length per read {1 + rate.sum():.2f} | depths {percent(rate)} | eta {left / 60:.1f} min"
            )
    return rate


# ----------------------------------------------------------------------------------------------------------
# `python mtp.py`, `python mtp.py RUN`: only here is a model class known


def options():
    """-> the Config of `python mtp.py RUN`."""
    from train_lm import DEVICES, SEEDS, option

    @dataclass
    class Config:
        run: str = option("", "a run of train_lm.py, a Hugging Face folder, or smollm2", flag=False)
        prompt: str = option("", "the text to continue (default: a new text begins)")
        length: int = option(300, "tokens to write", least=1, most=2**20)
        temperature: float = option(0.8, "0: always the best token", least=0, most=100)
        seed: int = option(0, "seeds the samples", least=0, most=SEEDS)
        device: str = option("auto", "auto: an NVIDIA GPU where there is one", choices=DEVICES)

    return Config


def write(cfg, given):
    """Continue a text with a finished run, streamed to the terminal -> exit code.

    Accepted drafts are underlined, or in brackets where the output is no terminal.
    """
    import train_lm

    device = train_lm.pick_device(cfg)
    model, enc = train_lm.load_model(cfg.run, device)
    run = model.cfg
    model = train_lm.half(model)
    words = cfg.prompt.encode(errors="replace").decode()  # a shell may hand over what is no UTF-8
    prompt = torch.tensor(enc.encode_ordinary(words) or [enc.eot_token])  # (tokens,)
    room = len(prompt) + cfg.length
    if room > run.context:
        train_lm.say(f"note     {room} tokens are more than the {run.context} that the model learned from")
    engine = partial(Decoder, model, 1, room, model.mtp, run.mtp, cfg.temperature, enc.eot_token)
    decoder = engine(drafts=run.mtp)
    torch.manual_seed(cfg.seed)
    text = codecs.getincrementaldecoder("utf-8")("replace")
    on, off = ("\033[4m", "\033[0m") if sys.stdout.isatty() else ("[", "]")

    def shown(tokens):
        said = text.decode(b"".join(train_lm.token_bytes(enc, t) for t in tokens if t != enc.eot_token))
        return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in said)

    train_lm.say(words, end="")
    count = 0
    try:
        for new in decoder.stream(prompt, cfg.length):
            *drafts, last = new.tolist()
            count += len(new)
            said = shown(drafts)
            train_lm.say((on + said + off if said else "") + shown([last]), end="")
        train_lm.say("\n")
        speeds = []
        for drafts in sorted({0, run.mtp}, reverse=True):
            decoder = engine(drafts=drafts)
            for _ in range(2):  # a GPU warms up, then captures
                decoder.generate([prompt], min(cfg.length, 64))
            start = time.perf_counter()
            [(tokens, _)] = decoder.generate([prompt], cfg.length)
            speed = len(tokens) / (time.perf_counter() - start)
            speeds.append(f"{speed:.0f} tokens/s {f'with {drafts} drafts' if drafts else 'without drafts'}")
    except KeyboardInterrupt:
        train_lm.say("")
        return 130
    train_lm.say(f"{count} tokens; {', '.join(speeds)}")
    return 0


def demo():
    """A tiny model learns this file's header, a module beside it; then one sentence of it, read by read."""
    import train_lm

    torch.manual_seed(0)
    torch.set_num_threads(1)  # of so small a model more threads mostly wait for each other
    text = torch.tensor([ord(c) for c in __doc__[:600]])  # so little that it learns it nearly by heart
    cfg = train_lm.Config(attn="gqa", layers=1, width=96, heads=4, groups=2, vocab=128, context=64, mtp=4)
    model = train_lm.LM(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 250)
    for _ in range(250):
        at = torch.randint(len(text) - 65, (8,))[:, None] + torch.arange(65)  # (8, 65)
        rows = text[at]  # (8, 65)
        loss, _ = train_lm.objective(model, rows[:, :-1], rows[:, 1:], torch.ones(8, 64))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    def show(tokens):
        return "".join(map(chr, tokens.tolist())).replace("\n", "~")

    decoder = Decoder(model, 1, 64, model.mtp, cfg.mtp, temperature=0.7, drafts=cfg.mtp)
    written = decoder.state.text[0]  # (width,), in place
    print(f"given    {show(text[:12])}\n\nread  drafted    accepted   then")
    reads = 0
    with torch.no_grad():
        decoder.fill([0], [text[:12]], [64])
        while decoder.state.active.item():
            known = decoder.state.known.item()
            reads += 1
            drafts = decoder.round(cfg.mtp)
            new = written[known : decoder.state.known.item()]
            print(f"{reads:4}  {show(drafts[0]):10} {show(new[:-1]):10} {show(new[-1:])}")
    print(f"\nwritten  {show(written[: decoder.state.known.item()])}\n\n{decoder.summary()}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        return demo()
    import train_lm

    return train_lm.main(argv, write, config=options(), presets={}, script="mtp.py RUN", doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
