"""How many tokens one read yields: draft several with one small module, verify them in one pass, keep the distribution as it was.

Decoding is bound by reading the weights and the cache, once per token. Multi-token prediction (MTP) adds one block to a model, unrolled K
times: depth k guesses the token k + 1 places ahead. The model then reads all K guesses at once and keeps as many as its own distribution
supports, and always one more token: the text is distributed exactly as without drafts (up to rounding), only sooner.

    1) draft     the module samples d_1 .. d_g, each from its own distribution q_k          one block each
    2) verify    the trunk reads the pending token and the drafts: g + 1 distributions p     one pass
    3) accept    d_k with probability min(1, p_k / q_k), up to the first refusal; then one token from (p - q)+, or from p_{g+1}
    4) commit    stop tokens and limits; log p of what was sampled; every row at its own length
    5) catch up  the trunk forgets refused drafts; the module makes its entries again from the trunk's states

The module learns from a frozen trunk's own texts and distributions (`equip`: soft cross entropy, then end-to-end TV) or beside the trunk
(`train_lm.py --mtp K`: soft cross entropy); the trunk never gets a gradient from it. Every row of a batch accepts as many drafts as it does;
rows that end are refilled. On a GPU a whole round is one CUDA graph. How many drafts pay, possibly none, is measured while decoding.

Does NOT include: trees of drafts, reduced draft vocabularies, top-p, drafts from a compressed cache.
Run `python mtp.py` to see a sentence with its drafts, `python mtp.py --equip out/base-gqa` to add a module to a run of train_lm.py,
`python mtp.py --bench out/base-gqa` to time it. Read: Leviathan et al. 2211.17192 (verification); DeepSeek-V3 2412.19437 (the module);
FastMTP 2509.18362 (one module for all depths); Bebop 2606.12370 (end-to-end TV). Of MTP-RL (Findings of ACL 2026, 1871), which this file
follows, only the abstract is available to us: K, the losses, the detach points and the drafting are ours.

Letters as in latent_attention.py; K depths, g <= K drafts in a round, V vocabulary. p target, q draft distribution. 0-based: row s holds
the trunk's state h_s at token x_s, which predicts x_{s+1}; depth k of row s predicts x_{s+k+1}.

This file knows no model class. A trunk is anything with hidden(tokens, cache, count) -> (B, T, C) after the final norm, new_cache(batch,
max_len, margin, dtype), embed.weight (V, C) and head.weight (V, C); a block is anything like train_lm.Block.
"""
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels

# ---------------------------------------------------------------------------------------------------------------------------------
# The module


class MTP(nn.Module):
    """One block for all depths: DeepSeek-V3's module at depth 1, fed with its own output from depth 2 on. No weight depends on K.

    Which keys and values a row sees is the same in training and in drafting: at every depth those that depth 1 made of rows <= s. So a
    draft behind the first reads the module's cache and writes nothing (GLM-5.2's choice).
    """

    def __init__(self, block, width, eps=1e-6):
        super().__init__()
        self.norm_h, self.norm_e, self.norm_out = (nn.Parameter(torch.ones(width)) for _ in range(3))
        self.join_h, self.join_e = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)  # two halves of one matrix
        self.block, self.eps = block, eps

    def norm(self, x, weight):
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.eps)

    def half(self, embedded):
        """The embedding half of the input, (..., C) -> (..., C): the same at every depth, so a decoder keeps a table of it."""
        return self.join_e(self.norm(embedded, self.norm_e))

    def forward(self, h, e, pos, cache=None, count=None, source=None):
        """h (B, T, C) state of the depth before (depth 1: the trunk's), e (B, T, C) `half` of x_{s+k}, which it predicted, pos (B or 1, T)
        of the rows -> (state (B, T, C), the block's input (B, T, C)); source: depth 1's input, where there is no cache."""
        h = self.norm(h, self.norm_h)  # (B, T, C)
        u = torch.addmm(e.flatten(0, 1), h.flatten(0, 1), self.join_h.weight.t()).view_as(h)  # join_h(h) + e, (B, T, C)
        return self.norm(self.block(u, pos, cache, count, source), self.norm_out), u

    def unroll(self, h, tokens, embed, K):
        """All depths of a text at once, teacher-forced: h (B, T, C), tokens (B, T), embed (V, C) -> [state (B, T - k, C) for k = 1..K].

        h and embed are detached here: nothing that is made of the result gives the trunk a gradient. Within the module it flows through
        all depths.
        """
        e, h, source, states = self.half(F.embedding(tokens, embed.detach())), h.detach(), None, []  # (B, T, C)
        for k in range(1, K + 1):
            rows = tokens.shape[1] - k
            pos = torch.arange(rows, device=tokens.device)[None]  # (1, T - k)
            h, u = self(h[:, :rows], e[:, k:], pos, source=source)  # (B, T - k, C) twice
            source = u[:, :-1] if source is None else source[:, :-1]
            states.append(h)
        return states


# ---------------------------------------------------------------------------------------------------------------------------------
# Losses: z logits and p target probabilities (..., V) -> (...)


def law(logits, temperature):
    """The distribution that is sampled from: softmax(logits / temperature) in fp32 or better; at 0 all mass on the best token."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).softmax(-1)


def soft_ce(z, p):
    """Cross entropy to the trunk's distribution. Gradient q - p: the same as CE's on samples of p, without their noise."""
    return -(p * z.log_softmax(-1)).sum(-1)


def tv(z, p):
    """Total variation 1 - sum min(p, q) = the probability that a sampled draft is refused. Its gradient is proportional to q: dead from a
    cold start, so soft CE comes first."""
    return 1 - torch.minimum(p, z.softmax(-1)).sum(-1)


def depth_masks(mask, K):
    """Which rows count at depth k: those whose tokens x_{s+1} .. x_{s+k+1} all do. mask (B, T) of 0 and 1 -> [(B, T - k - 1) for k = 1..K]."""
    masks, m = [], mask[:, 1:]  # (B, T - 1)
    for k in range(1, K + 1):
        m = m[:, :-1] * mask[:, k + 1 :]  # (B, T - k - 1)
        masks.append(m)
    return masks


def draft_loss(kind, states, head, p, tokens, mask, temperature=1.0, decay=0.6):
    """The loss of all depths, one number.

    kind    "ce" hard targets x_{s+k+1} | "soft" | "tv" | "e2e"
    states  of MTP.unroll, head (V, C), p (B, T, V) the trunk's law at the same temperature, tokens (B, T), mask (B, T): 1 on tokens that
            count (the answer, its stop token included). p and head are detached here.
    The first three sum the depths' means with weights decay^(k-1), normalised (FastMTP). End-to-end TV is 1 - the expected share of
    accepted drafts, 1 - 1/K sum_k prod_{i<=k} (1 - TV_i), every product over depths of one row: the weights come out by themselves.
    """
    head, p, masks = head.detach(), p.detach(), depth_masks(mask.to(p.dtype), len(states))
    weights = torch.tensor([decay**k for k in range(len(states))])
    total, weight_sum, alive = 0.0, 0.0, None
    for k, (h, m) in enumerate(zip(states, masks), 1):
        rows = m.shape[1]  # T - k - 1: those with a target
        z = F.linear(h[:, :rows], head).to(p.dtype) / temperature  # (B, rows, V)
        target = p[:, k : k + rows]  # (B, rows, V)
        if kind == "e2e":
            kept = 1 - tv(z, target)  # (B, rows)
            alive = kept if alive is None else alive[:, :rows] * kept
            total, weight_sum = total + (m * (1 - alive)).sum(), weight_sum + m.sum()
            continue
        if kind == "ce":
            loss = F.cross_entropy(z.transpose(1, 2), tokens[:, k + 1 :], reduction="none")  # (B, rows)
        else:
            loss = {"soft": soft_ce, "tv": tv}[kind](z, target)  # (B, rows)
        total = total + weights[k - 1] / weights.sum() * (m * loss).sum() / m.sum().clamp(min=1)
    return total / weight_sum.clamp(min=1) if kind == "e2e" else total


@torch.no_grad()
def expected_acceptance(states, head, p, tokens, mask, temperature=1.0, greedy=False):
    """The probability that drafts 1..k are all accepted, without drafting: (K,), on text that was sampled from p.

    sum_v min(p_k, q_k) at prefixes that p wrote, reweighted to those that accepted drafts write: prod_{i<k} min(1, q_i(x_i) / p_i(x_i)).
    """
    found, weight = [], None
    for k, (h, m) in enumerate(zip(states, depth_masks(mask.to(p.dtype), len(states))), 1):
        rows = m.shape[1]
        z = F.linear(h[:, :rows], head).to(p.dtype)  # (B, rows, V)
        q, target = law(z, 0 if greedy else temperature), p[:, k : k + rows]  # (B, rows, V)
        weight = m if weight is None else weight[:, :rows] * m
        found.append((weight * torch.minimum(target, q).sum(-1)).sum() / m.sum().clamp(min=1))
        x = tokens[:, k + 1 :, None]  # (B, rows, 1)
        weight = weight * (q.gather(-1, x) / target.gather(-1, x).clamp(min=1e-30)).clamp(max=1)[..., 0]
    return torch.stack(found)


# ---------------------------------------------------------------------------------------------------------------------------------
# 3) Verification


def draw(logits, temperature, noise=None):
    """The law of logits (..., V), and a token of it: argmax of p / noise, noise ~ Exp(1), is distributed as p, on any device and inside
    a CUDA graph -> (..., V), (...)."""
    if kernels.fast(logits):
        return kernels.draw(logits, temperature, noise)
    p = law(logits, temperature)
    return p, None if noise is None else (p / noise).argmax(-1)


def accept(p, q, drafts, forced, u, noise):
    """Rejection sampling: the accepted drafts and the token after them are distributed as p. Greedy drafts have a one-hot q.

    p (B, g+1, V) target laws at the pending token and at each draft, q (B, g, V) draft laws, drafts (B, g) ~ q, forced (B, g) bool:
    not a draft but a given token, u (B, g) uniform, noise (B, V) ~ Exp(1) -> n (B,) accepted drafts, and the next token (B,).
    """
    g, at = drafts.shape[1], drafts[..., None]
    ok = forced | (u * q.gather(-1, at)[..., 0] < p[:, :g].gather(-1, at)[..., 0])  # (B, g): u < p / q
    n = ok.long().cumprod(1).sum(1)  # (B,)
    here = n[:, None, None].expand(-1, 1, p.shape[-1])  # (B, 1, V)
    # The residual (p - q)+ at the refused draft; behind the last draft q is 0 and the bonus is drawn from p_{g+1} itself.
    p_n, q_n = p.gather(1, here)[:, 0], F.pad(q, (0, 0, 0, 1)).gather(1, here)[:, 0]  # (B, V)
    rest = (p_n - q_n).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p_n)  # p = q up to rounding
    return n, (rest / noise).argmax(-1)


def commit(p, q, drafts, u, noise, text, logp, known, given, limit, active, counts, reads, stop):
    """Accept, then write what was accepted and the token after it behind the known text, up to a stop token (-1: none) and the limit.

    text, logp (B, width) of tokens and their log-probabilities under p; known, given, limit, active (B,): tokens that are known (read or
    about to be), of the prompt, at most; counts (B, 3, K): drafts reached, accepted, expected to be accepted (sum of min(p, q)); reads
    (B, 2): rounds and tokens. Rounds that still read a prompt do not count. text, logp, known, active, counts, reads are changed in place
    -> tokens taken (B,).
    """
    g = drafts.shape[1]
    j = torch.arange(g + 1, device=p.device)
    place, real = known[:, None] + j, active & (known >= given)  # (B, g + 1), (B,)
    forced = place < given[:, None]
    n, last = accept(p, q, drafts, forced[:, :g], u, noise)
    reached, passed = ((n[:, None] >= i) & real[:, None] for i in (j[:g], j[1:]))  # (B, g)
    chance = torch.minimum(p[:, :g], q).sum(-1).nan_to_num().masked_fill(~reached, 0)  # (B, g); nan: a module that has read nothing yet
    counts[..., :g] += torch.stack([reached.to(p.dtype), passed.to(p.dtype), chance], dim=1).to(counts.dtype)

    y = torch.where(j < n[:, None], F.pad(drafts, (0, 1)), last[:, None])  # (B, g + 1)
    y = torch.where(forced, text.gather(1, place), y)
    take = torch.minimum(n + 1, limit - known)  # (B,)
    stops = (y == stop) & (j < take[:, None]) & ~forced
    take = torch.where(stops.any(1), stops.int().argmax(1) + 1, take) * active
    for buffer, new in ((text, y), (logp, p.gather(-1, y[..., None])[..., 0].log())):
        buffer.scatter_(1, place, torch.where(j < take[:, None], new.to(buffer.dtype), buffer.gather(1, place)))
    known += take
    reads += torch.stack([real, real * take], dim=1)
    active &= (known < limit) & ~stops.any(1)
    return take


# ---------------------------------------------------------------------------------------------------------------------------------
# The decoding engine


class Pace:
    """How many drafts pay: of 0, 1, 2, 4, .., K the number with the most expected tokens, from counted acceptance, per measured time.

    All are timed at first; then one of the others is tried again now and then, ever more rarely while nothing changes.
    """

    def __init__(self, K, fixed=None):
        self.choices = [fixed] if fixed is not None else sorted({0, K, *(2**i for i in range(K.bit_length()))})
        self.ms = {}  # drafts -> milliseconds of a round
        self.reached, self.accepted = [0.0] * K, [0.0] * K  # per depth, fading
        self.now, self.turn, self.since, self.wait = self.choices[-1], 0, 0, 4  # in use; next to be tried again; since when, when

    def tokens(self, g):
        """Expected tokens of a round with g drafts: 1 + sum of the cumulative acceptance rates."""
        total = alive = 1.0
        for reached, accepted in zip(self.reached[:g], self.accepted[:g]):
            alive *= accepted / max(reached, 1e-9)
            total += alive
        return total

    def choose(self):
        """Drafts of the next segment."""
        for g in reversed(self.choices):
            if g not in self.ms:
                return g
        best = max(self.choices, key=lambda g: self.tokens(g) / self.ms[g])
        if best != self.now:
            self.now, self.wait = best, 4
        self.since += 1
        if self.since < self.wait:
            return best
        self.turn, self.since, self.wait = self.turn + 1, 0, min(2 * self.wait, 32)
        return self.choices[-(self.turn % len(self.choices)) - 1]

    def update(self, g, ms, reached, accepted):
        """After a segment: its milliseconds per round, and counts per depth (K,)."""
        self.ms[g] = min(ms, 0.7 * self.ms.get(g, ms) + 0.3 * ms)  # disturbances only ever make it longer
        for k in range(g):
            self.reached[k] = 0.9 * self.reached[k] + reached[k]
            self.accepted[k] = 0.9 * self.accepted[k] + accepted[k]


class Decoder:
    """Batched generation with or without drafts, from preallocated caches.

    trunk, mtp   see above; mtp None or drafts 0: plain decoding
    batch        rows that are decoded at once; longer lists of prompts refill the rows that end
    max_len      most tokens of a row, prompt included
    K            most drafts in a round
    temperature  of the target; greedy: drafts are the module's best tokens instead of samples
    stop         a token that ends a row, or None
    drafts       None: as many as pay; else always so many
    compress     None, or what evicts entries from the caches of all layers (sparse_rl.Compressor): the cache then has compress.slots
                 slots a row, and no text is too long for it; without drafts only
    Weights may change between calls (in place, as optimizers do): graphs stay valid.
    """

    SEGMENT = 4  # rounds without drafts between two looks of the host
    PIECE = 64  # tokens of a prompt that are read at once
    GAP = 64  # rounds without drafts after which the module catches up at the latest

    def __init__(self, trunk, batch, max_len, mtp=None, K=0, temperature=1.0, stop=None, greedy=False, drafts=None, compress=None):
        self.trunk, self.mtp, self.K = trunk, mtp, K if mtp is not None else 0
        if not 0 <= (drafts or 0) <= self.K:
            raise ValueError(f"drafts must be 0 to {self.K} here, not {drafts}")
        self.max_len, self.temperature, self.stop, self.greedy = max_len, temperature, -1 if stop is None else stop, greedy
        self.embed, self.head = trunk.embed.weight, trunk.head.weight  # (V, C)
        device, C = self.embed.device, self.embed.shape[1]
        kind = {"dtype": self.embed.dtype, "device": device}
        room, margin = max_len + self.K + 1, self.K + 1
        self.compress = compress
        if compress:
            if self.K:
                raise ValueError("drafts from a compressed cache are not supported")
            self.cache = trunk.new_cache(batch, compress.slots, margin, dtype=kind["dtype"], compress=compress)
            self.SEGMENT = self.PIECE = compress.buffer  # a row is compressed at the same tokens, whatever the other rows do
        else:
            self.cache = trunk.new_cache(batch, room, margin, dtype=kind["dtype"])
        self.text = torch.zeros(batch, room + 1, dtype=torch.long, device=device)  # prompt, answer, room for a round's overhang
        self.logp = torch.zeros(batch, room + 1, device=device, dtype=torch.promote_types(kind["dtype"], torch.float32))
        self.known = torch.ones(batch, dtype=torch.long, device=device)  # tokens of a row; the last of them is pending: not in the cache
        self.given, self.limit = torch.ones_like(self.known), torch.ones_like(self.known)  # its prompt's length, where it ends at last
        self.active = torch.zeros(batch, dtype=torch.bool, device=device)
        self.counts, self.reads = torch.zeros(batch, 3, max(1, self.K), device=device), torch.zeros(batch, 2, device=device)  # see commit
        if self.K:
            self.table = mtp.half(self.embed).detach()  # of every token
            self.own = mtp.block.attn.new_cache(batch, room, margin, **kind)  # the module's cache
            self.own_seen = torch.zeros(batch, dtype=torch.long, device=device)
            self.state = torch.zeros(batch, 1, C, **kind)  # depth 1 at the last row: it makes the first draft
            self.gap_states, self.gap_at = torch.zeros(batch, self.GAP, C, **kind), torch.zeros(1, dtype=torch.long, device=device)
        self.fresh = torch.zeros_like(self.active)  # rows whose prompt is being read
        self.gap = 0  # rounds without drafts, whose states wait in gap_states: the module has seen known - 1 - gap tokens of a row
        self.pace, self.graphs, self.pool = Pace(self.K, drafts), {}, None
        self.forget_counts()

    def forget_counts(self):
        self.counts.zero_()
        self.reads.zero_()
        self.seen_counts = [[0.0] * self.counts.shape[2]] * 2  # drafts reached, accepted: at the last look

    # -- one round

    def round(self, g):
        """Draft g tokens, verify, commit. Static shapes, no look from the host. -> (drafts (B, g), taken (B,))."""
        before, (B, V) = self.known - 1, (len(self.known), len(self.embed))  # before (B,): tokens in the trunk's cache
        pending = self.text.gather(1, before[:, None])  # (B, 1)
        noise = torch.empty(g + 1, B, 1, V, device=pending.device, dtype=self.logp.dtype).exponential_()
        u = torch.rand(B, g, device=pending.device, dtype=self.logp.dtype)

        # 1) draft
        drafts, q, row = [], [], before[:, None] - 1  # row (B, 1): the one behind the newest state
        for k in range(g):
            if k == 0:
                h = self.state  # (B, 1, C)
            else:  # reads the module's cache, writes nothing
                h, _ = self.mtp(h, F.embedding(drafts[-1], self.table), row, self.own)
            q_k, d_k = draw(F.linear(h, self.head), 0 if self.greedy else self.temperature, noise[k])  # (B, 1, V), (B, 1)
            q.append(q_k)
            drafts.append(d_k)
        drafts = torch.cat(drafts, dim=1) if g else pending[:, :0]  # (B, g)
        place = self.known[:, None] + torch.arange(g, device=pending.device)  # (B, g)
        drafts = torch.where(place < self.given[:, None], self.text.gather(1, place), drafts)  # a prompt is a draft that is right
        q = torch.cat(q, dim=1) if g else noise[:0, :, 0].transpose(0, 1)  # (B, g, V)

        # 2) verify
        h = self.trunk.hidden(torch.cat([pending, drafts], dim=1), self.cache, self.active * (g + 1))  # (B, g + 1, C)
        p, _ = draw(F.linear(h, self.head), self.temperature)  # (B, g + 1, V)

        # 3) accept, 4) commit
        state = (self.text, self.logp, self.known, self.given, self.limit, self.active, self.counts, self.reads, self.stop)
        take = (kernels.commit if kernels.fast(p) else commit)(p, q, drafts, u, noise[g, :, 0], *state)  # (B,)

        # 5) catch up
        if g:
            self.cache.rollback(self.known - 1)
            self.catch_up(h, take)
        elif self.K:
            self.gap_states.index_copy_(1, self.gap_at, h)
            self.gap_at += 1
        return drafts, take

    def catch_up(self, h, count):
        """The module's entries of the next count[b] rows, from the trunk's states h (B, T, C)."""
        pos = self.own_seen[:, None] + torch.arange(h.shape[1], device=h.device)  # (B, T)
        e = F.embedding(self.text.gather(1, (pos + 1).clamp(max=self.text.shape[1] - 1)), self.table)  # (B, T, C)
        out, _ = self.mtp(h, e, pos, self.own, count)  # (B, T, C)
        last = out.gather(1, (count - 1).clamp(min=0)[:, None, None].expand(-1, 1, h.shape[2]))  # (B, 1, C)
        torch.where(count[:, None, None] > 0, last, self.state, out=self.state)
        self.own_seen += count

    def close_gap(self):
        """After rounds without drafts: all their states at once."""
        if self.gap:
            self.catch_up(self.gap_states[:, : self.gap], self.known - 1 - self.own_seen)
            self.gap_at.zero_()
            self.gap = 0

    def run(self, work, *args):
        """work(*args); on a GPU the second time it is captured, and replayed from then on."""
        key = (work.__name__, *args)
        if self.text.device.type != "cuda" or key not in self.graphs:
            self.graphs[key] = None  # the first time is the warm-up that a capture needs
            return work(*args)
        if self.graphs[key] is None:
            torch.cuda.synchronize()
            self.graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[key], pool=self.pool):  # results stay in this object's own tensors: one pool for all graphs
                work(*args)
            self.pool = self.graphs[key].pool()
        self.graphs[key].replay()

    # -- whole texts

    @torch.no_grad()
    def fill(self, rows, prompts, limits, at_once=True):
        """Start texts in some rows, whose old entries are forgotten: prompts are read here, at once, or ride along as forced drafts."""
        self.close_gap()
        longest, cuda = max(len(p) for p in prompts), self.text.device.type == "cuda"
        host = torch.zeros(len(self.known), 3 + longest, dtype=torch.long, pin_memory=cuda)  # of each row: is it new, its prompt's length,
        host[rows, 0] = 1  # its limit, its prompt: one copy, which the host need not wait for
        host[rows, 1:3] = torch.tensor([[len(p), limit] for p, limit in zip(prompts, limits)])
        host[rows, 3:] = nn.utils.rnn.pad_sequence([p.cpu() for p in prompts], batch_first=True)
        new = host.to(self.text.device, non_blocking=True)  # (B, 3 + longest)
        self.fresh.copy_(new[:, 0])
        values = {self.given: new[:, 1], self.limit: new[:, 2], self.known: new[:, 1] if at_once else torch.ones_like(self.known)}
        for state, value in values.items():
            state.copy_(torch.where(self.fresh, value, state))
        self.text[:, :longest] = torch.where(self.fresh[:, None], new[:, 3:], self.text[:, :longest])
        self.active |= self.fresh
        self.cache.rollback(self.cache.seen.masked_fill(self.fresh, 0))
        if self.K:
            self.own_seen.masked_fill_(self.fresh, 0)
            for part in self.own.values():
                part.rollback(torch.where(self.fresh, 0, self.max_len))
        end = min(-(-(longest - 1) // 16) * 16, self.text.shape[1])  # few different shapes, since each is captured
        for start in range(0, end * at_once, self.PIECE):
            if self.compress and self.compress.budget < start < longest - 1:
                self.run(self.evict)
            self.run(self.read, start, min(start + self.PIECE, end))

    def evict(self):
        self.compress(self.cache.layers)

    def read(self, start, stop):
        """A piece of the prompts of the fresh rows, for trunk and module."""
        count = (self.known - 1 - start).clamp(0, stop - start) * self.fresh  # (B,)
        h = self.trunk.hidden(self.text[:, start:stop], self.cache, count)  # (B, <= PIECE, C)
        if self.K:
            self.catch_up(h, count)

    @torch.no_grad()
    def generate(self, prompts, new):
        """prompts: 1-D tensors of tokens, one or more; new: most tokens to add to each -> [(tokens, log-probabilities)] of what was added.

        The host looks at the rows one segment late, so that the GPU never waits for it.
        """
        for p in prompts:
            if not 1 <= len(p) < self.max_len:
                raise ValueError(f"a prompt of {len(p)} tokens: 1 to {self.max_len - 1} are possible here")
        todo, answers, batch = list(range(len(prompts)))[::-1], [None] * len(prompts), len(self.active)
        owner, since, number, looks = {}, {}, 0, []  # row -> prompt, row -> first look that knows about it
        self.active.zero_()
        if hasattr(self.compress, "restart"):  # shim until the merge
            self.compress.restart()
        if self.K:
            self.table.copy_(self.mtp.half(self.embed))  # the weights may have changed
        while todo or owner:
            free = [row for row in range(batch) if row not in owner][: len(todo)]
            if free:
                owner.update((row, todo.pop()) for row in free)
                since.update((row, number) for row in free)
                chosen = [prompts[owner[row]] for row in free]
                limits = [min(len(p) + new, self.max_len) for p in chosen]
                # A piece of reading costs every row about two rounds; riding along costs the new rows a round for every g + 1 tokens.
                longest = max(len(p) for p in chosen)
                at_once = 2 * batch * -(-longest // self.PIECE) <= len(free) * longest / (self.pace.now + 1)
                self.fill(free, chosen, limits, at_once or self.compress is not None)
            looks.append(self.segment())
            number += 1
            if len(looks) > (self.text.device.type == "cuda"):
                alive, known = self.look(looks.pop(0))
                for row in [r for r in owner if not alive[r] and since[r] < number - len(looks)]:
                    i = owner.pop(row)
                    part = slice(len(prompts[i]), int(known[row]))
                    answers[i] = (self.text[row, part].clone(), self.logp[row, part].clone())
        for late in looks:
            self.look(late)
        if not torch.cat([logp for _, logp in answers]).isfinite().all():
            raise FloatingPointError("log-probabilities of a generated text are not finite: the model's weights are broken")
        return answers

    def summary(self):
        """Tokens per read and acceptance so far, counted."""
        (reached, accepted, expected), (rounds, tokens) = self.counts.sum(0).cpu(), self.reads.sum(0).tolist()
        rate = lambda x: " ".join(f"{r:.0%}" for r in (x / reached)[reached > 0].tolist())
        return f"{tokens / max(rounds, 1):.2f} tokens per read; each depth accepted {rate(accepted)}, expected from sum min(p, q) {rate(expected)}"

    def segment(self):
        """Start a few rounds with as many drafts as pay -> what `look` needs to see how they went."""
        g, cuda = self.pace.choose(), self.text.device.type == "cuda"
        rounds = self.SEGMENT // 2 if g else self.SEGMENT  # a round with drafts takes longer, and its rows end sooner
        if g or self.gap + rounds > self.GAP:
            self.close_gap()
        timed = not cuda or self.graphs.get(("round", g)) is not None  # warm-up and capture do not count
        clock = (lambda: torch.cuda.Event(enable_timing=True)) if cuda else Clock
        start, end = clock(), clock()
        start.record()
        if self.compress:
            self.run(self.evict)
        for _ in range(rounds):
            self.gap += self.K > 0 and g == 0
            self.run(self.round, g)
        result = torch.cat([self.active, self.known, self.counts.sum(0)[:2].flatten()])
        host = torch.empty(result.shape, dtype=result.dtype, pin_memory=cuda).copy_(result, non_blocking=True)
        end.record()
        return g, rounds, timed, start, end, host

    def look(self, segment):
        """Wait for a segment and measure it -> per row: still active, tokens known."""
        g, rounds, timed, start, end, host = segment
        end.synchronize()
        B, K, host = len(self.active), self.counts.shape[2], host.tolist()
        counts = host[2 * B : 2 * B + K], host[2 * B + K :]  # drafts reached, accepted
        if self.K and timed:
            change = ([a - b for a, b in zip(x, y)] for x, y in zip(counts, self.seen_counts))
            self.pace.update(g, start.elapsed_time(end) / rounds, *change)
        self.seen_counts = counts
        return host[:B], host[B : 2 * B]


class Clock:
    """torch.cuda.Event's part for a CPU."""

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)  # ms


# ---------------------------------------------------------------------------------------------------------------------------------
# Equipping a model that has none


def equip(trunk, module, samples, prompt, K, steps, rows=32, lr=1e-3, temperature=1.0, say=print):
    """Train the module on a frozen trunk with the trunk's own samples and own distributions: soft CE first, then end-to-end TV.

    samples (N, T) tokens that the trunk wrote behind `prompt` given ones, at `temperature`; the first `rows` of them are kept for testing.
    -> expected acceptance (K,) on those, see expected_acceptance.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    held, samples, device = samples[:rows], samples[rows:], samples.device
    rng, start = torch.Generator().manual_seed(0), time.time()
    mask = torch.ones_like(held)
    mask[:, :prompt] = 0

    def unroll(text):
        """text (rows, T) -> what the losses need of it: states, head, p, tokens, mask."""
        with torch.no_grad():
            h = trunk.hidden(text)  # (rows, T, C)
            p = law(F.linear(h, trunk.head.weight), temperature)  # (rows, T, V)
        return module.unroll(h, text, trunk.embed.weight, K), trunk.head.weight, p, text, mask[: len(text)]

    for step in range(steps):
        kind = "soft" if step < 0.4 * steps else "e2e"
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * (1 - 0.95 * step / steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = draft_loss(kind, *unroll(samples[torch.randint(len(samples), (rows,), generator=rng).to(device)]), temperature)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % max(1, steps // 10) == 0 or step + 1 == steps:
                rate = expected_acceptance(*unroll(held), temperature)
                left = (time.time() - start) / (step + 1) * (steps - step - 1)
                say(f"step {step + 1:5d}/{steps} | {kind:4} {loss.item():.3f} | length per read {1 + rate.sum():.2f} | depths "
                    f"{' '.join(f'{r:.0%}' for r in rate.tolist())} | eta {left / 60:.1f} min")
    return rate


def crops(tokens, rows, length, seed):
    """Random pieces of a 1-D array of tokens -> list of `rows` tensors (length,)."""
    starts = torch.randint(len(tokens) - length, (rows,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [torch.from_numpy(tokens[s : s + length].astype("int64")) for s in starts]


def equip_run(folder, K, steps, device, samples, prompt=64, new=448):
    """Add a module to a run of train_lm.py: writes folder/mtp.pt and nothing else."""
    import train_lm

    model, cfg, folder = train_lm.load_run(folder, device, module=False)
    data, step = train_lm.Data(cfg, train_lm.tokenizer(cfg.tokenizer), folder), train_lm.load_checkpoint(folder / "ckpt.pt")["step"]
    if cfg.context <= prompt:
        raise train_lm.UserError(f"{folder} has a context of {cfg.context} tokens; {prompt} of each text are given")
    new = min(new, cfg.context - prompt)
    model.requires_grad_(False)
    torch.manual_seed(cfg.seed)
    model.mtp = MTP(train_lm.Block(cfg, 0), cfg.width, cfg.norm_eps).to(device)
    trained, total = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model.mtp, model))
    print(f"equip    {folder}: {cfg.attn}, {total - trained:.2f} M parameters frozen, {trained:.2f} M in the module, K = {K}")
    start = time.time()
    writer = Decoder(train_lm.half(model), min(samples, 512), prompt + new)
    given = crops(data.tokens["train"], samples, prompt, cfg.seed)
    texts = torch.stack([torch.cat([g.to(device), x]) for g, (x, _) in zip(given, writer.generate(given, new))])  # (samples, T)
    print(f"samples  {samples} of {prompt} given + {new} own tokens in {time.time() - start:.0f} s")
    rate = equip(model, model.mtp, texts, prompt, K, steps)
    train_lm.save_checkpoint(folder / "mtp.pt", {"module": model.mtp.state_dict(), "depths": K, "step": step})
    print(f"equipped in {time.time() - start:.0f} s: {1 + rate.sum():.2f} tokens per read expected; {folder / 'mtp.pt'} holds the module")


def bench_run(folder, device, batches, new=512, prompt=64, times=4):
    """The same generation with and without drafts: `times` prompts per row, from the run's validation text, temperature 1."""
    import train_lm

    model, cfg, folder = train_lm.load_run(folder, device)
    if not cfg.mtp:
        raise train_lm.UserError(f"{folder} has no module: python mtp.py --equip {folder}")
    data, model = train_lm.Data(cfg, train_lm.tokenizer(cfg.tokenizer), folder), train_lm.half(model)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"bench    {folder}, {cfg.attn}, {next(model.parameters()).dtype}, on {name}; {times} texts per row, "
          f"{prompt} given + {new} new tokens, temperature 1; medians of 3\n")
    print(f"{'batch':>5} {'drafts':>8} {'seconds':>8} {'tokens/s':>9} {'saved':>6}  tokens per read, acceptance per depth")
    for batch in batches:
        prompts, plain = crops(data.tokens["val"], batch * times, prompt, 1), None
        for drafts in (0, None, *sorted({(cfg.mtp + 1) // 2, cfg.mtp})):
            decoder = Decoder(model, batch, prompt + new, model.mtp if drafts != 0 else None, cfg.mtp, drafts=drafts)
            decoder.generate(prompts, 256 if drafts is None else 64)  # warm-up: graphs, and how many drafts pay
            decoder.forget_counts()
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                decoder.generate(prompts, new)
                seconds.append(time.perf_counter() - start)
            seconds = sorted(seconds)[1]
            plain = plain or seconds
            label = "measured" if drafts is None else drafts or "none"
            print(f"{batch:5} {label:>8} {seconds:8.3f} {len(prompts) * new / seconds:9.0f} {1 - seconds / plain:6.1%}  "
                  f"{decoder.summary() if drafts != 0 else ''}", flush=True)


def demo():
    """A tiny model learns this file's header, with a module beside it; then one sentence of it, read by read."""
    import train_lm

    torch.manual_seed(0)
    torch.set_num_threads(1)  # of so small a model more threads mostly wait for each other
    text = torch.tensor([ord(c) for c in __doc__[:1200]])  # so little that it learns it nearly by heart
    cfg = train_lm.Config(attn="gqa", layers=1, width=96, heads=4, groups=2, vocab=128, context=64, mtp=4)
    model = train_lm.LM(cfg)
    objective, optimizer = train_lm.Objective(model), torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(250):
        at = torch.randint(len(text) - 65, (8,))[:, None] + torch.arange(65)
        rows = text[at]  # (8, 65)
        loss, _ = objective(rows[:, :-1], rows[:, 1:], torch.ones(8, 64))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    prompt = text[:12]
    decoder = Decoder(model, 1, 64, model.mtp, cfg.mtp, temperature=0.7, drafts=cfg.mtp)
    decoder.fill([0], [prompt], [64])
    show = lambda tokens: "".join(map(chr, tokens)).replace("\n", "~")
    print(f"given    {show(prompt.tolist())}\n\nread  drafted    accepted   then")
    reads = 0
    with torch.no_grad():
        while decoder.active.item():
            known, reads = decoder.known.item(), reads + 1
            drafts, _ = decoder.round(cfg.mtp)
            new = decoder.text[0, known : decoder.known.item()].tolist()
            print(f"{reads:4}  {show(drafts[0].tolist()):10} {show(new[:-1]):10} {show(new[-1:])}")
    print(f"\nwritten  {show(decoder.text[0, : decoder.known.item()].tolist())}\n\n{decoder.summary()}")


def main(argv=None):
    import train_lm

    parser = train_lm.Parser(prog="mtp.py", description="Multi-token prediction: without options, a demo.", allow_abbrev=False)
    parser.add_argument("--equip", metavar="RUN", help="train a module for the run in this folder, e.g. out/base-gqa; writes RUN/mtp.pt")
    parser.add_argument("--bench", metavar="RUN", help="time generation with and without drafts")
    parser.add_argument("--depths", type=int, default=8, help="K of --equip [8]")
    parser.add_argument("--steps", type=int, default=2700, help="training steps of --equip, 32 texts each [2700]")
    samples = "texts that the trunk writes for --equip [16384]; on a CPU try 512, with 300 steps"
    parser.add_argument("--samples", type=int, default=16384, help=samples)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 256], help="batch sizes of --bench [1 16 64 256]")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        given = parser.parse_args(argv)
        if min(given.depths, given.steps, *given.batch) < 1 or given.samples < 64:
            raise train_lm.UserError("--depths, --steps and --batch must be at least 1, --samples at least 64")
        if given.equip:
            equip_run(given.equip, given.depths, given.steps, device, given.samples)
        if given.bench:
            bench_run(given.bench, device, given.batch)
        if not given.equip and not given.bench:
            demo()
    except train_lm.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
