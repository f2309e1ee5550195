"""How few entries a sampler keeps, and the objective that corrects for it.

Sampling answers fills the cache. A sampler that keeps only `budget` entries per head runs more answers in the
same memory, but its policy is not the one that is trained, and training on its answers as if they were the
policy's own ends badly (the README shows it). Sparse-RL keeps three policies apart:

    pi_s   sampler     old weights, compressed history    log-probabilities recorded while sampling
    pi_o   dense old   the same weights, full history     one pass over the finished answers
    pi     learner     current weights, full history      the pass that gets the gradient
    xi  = pi_o / pi_s  what eviction changed: it weighs each token or answer, and never has a gradient
    rho = pi / pi_o    how far the weights have moved: the ratio that PPO clips

    1) score      what an entry is worth, per layer and KV head: R-KV, SnapKV, H2O, StreamingLLM, ...
    2) keep       the best `budget` entries of a row, in their order and with their old positions
    3) replay     another way out: the learner reads exactly what the sampler had, so that xi = 1
    4) correct    log xi -> a weight for each token or answer, and which tokens the average counts
    5) objective  clipped policy gradient, each token's term times its weight; center: less its drift
    6) watch      how far the sampler is from the dense policy, and what the correction throws away

A new compressor is one function under @score, a new correction one line in CORRECTIONS.
Differs from the papers: there is no KL term (Sparse-RL: 1e-4 to a reference). Each head keeps its own set, as
in R-KV (Sparse-RL's release: one set for all). An R-KV row without duplicates zeroes nothing (R-KV's code:
index 0, an accidental sink). `released` has a mean weight of 1 per rollout (the release: per micro-batch).
Does NOT include: kernels, paging, compression of latents.
Run `python sparse_rl.py` to see which tokens a sampler still holds, and xi where it slips.
Read: Sparse-RL 2601.10079 (we had descriptions and the released code, not the typeset equations),
R-KV 2505.24133, SnapKV 2404.14469, H2O 2306.14048, StreamingLLM 2309.17453, score centering 2609.20807. Then
train_rl.py trains with it.

Letters as in latent_attention.py; A recent queries, E evictions, B answers of T tokens. Scores, weights and
log-probabilities are fp32 or better. A layer's cache is a dict of SlotCaches; "tokens" holds keys and values.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from latent_attention import SlotCache, attend, visible

# ------------------------------------------------------------------------------------------------------------
# 1) score


class Entries(NamedTuple):
    """What a score sees of one layer. Filled slots come first, oldest first."""

    k: torch.Tensor  # (B, G, S, D) after RoPE
    v: torch.Tensor  # (B, G, S, D)
    pos: torch.Tensor  # (B, G, S), -1 = empty
    length: torch.Tensor  # (B,)
    window: int  # the newest entries, which are kept anyway
    q: torch.Tensor = None  # (B, H, A, D) after RoPE, in any order, for a score that needs queries
    q_pos: torch.Tensor = None  # (B, A)
    mass: torch.Tensor = None  # (B, G, S) attention received so far, for a score that needs mass

    @property
    def old(self):
        """Slots before the window -> (B, 1, S) bool."""
        slot = torch.arange(self.pos.shape[2], device=self.pos.device)
        return slot < (self.length - self.window)[:, None, None]

    def attention(self):
        """Of the recent queries, the mean over them and a group's heads -> (B, G, S), 0 in the window."""
        p = attention(self.q, self.k, self.q_pos, self.pos)  # (B, G, h, A, S)
        return p.mean(dim=(2, 3)) * self.old


def logits(q, k):
    """q . k / sqrt(D): q (B, H, T, D), k (B, G, S, D) -> (B, G, h, T, S) fp32."""
    q = q.unflatten(1, (k.shape[1], -1)).float()  # (B, G, h, T, D)
    return torch.einsum("bghtd,bgsd->bghts", q, k.float()) * k.shape[3] ** -0.5


def attention(q, k, q_pos, k_pos):
    """What each query gives to each slot: q_pos (B, T), k_pos (B, G, S) -> (B, G, h, T, S) fp32."""
    see = visible(q_pos, k_pos)[:, :, None]  # (B, G, 1, T, S)
    return logits(q, k).masked_fill(~see, -math.inf).softmax(-1)


SCORES = {}  # name -> function, with what it `needs`


def score(needs=()):
    """Register the function below, Entries -> (B, G, S): what each slot is worth.

    needs: "queries" (the newest A queries), "mass" (the attention that each slot has received) or nothing.
    What the function says of empty slots, and of those that are kept anyway, does not matter.
    """
    if not set(needs) <= {"queries", "mass"}:
        raise ValueError(f"a score can need queries and mass, not {needs}")

    def register(function):
        function.needs = needs
        SCORES[function.__name__] = function
        return function

    return register


@score(needs=["queries"])
def rkv(e, mix=0.1, same=0.5, pool=7):
    """R-KV: mix * attention - (1 - mix) * redundancy, which is high where other keys say the same."""
    s = logits(e.q, e.k).amax(2)  # (B, G, A, S): the maximum over a group's heads, before the softmax
    s = s.masked_fill(~e.old[:, :, None], -math.inf)  # the window takes no part
    p = s.softmax(-1).nan_to_num()  # (B, G, A, S)
    importance = F.max_pool1d(p.mean(2), pool, 1, pool // 2)  # (B, G, S)
    real = e.pos >= 0  # (B, G, S)
    k = F.normalize(e.k.float(), dim=-1) * real[..., None]  # (B, G, S, D)
    cos = k @ k.transpose(-1, -2)  # (B, G, S, S)
    cos.diagonal(dim1=-2, dim2=-1).zero_()
    # Each key spares the newest of its likes: of three equal keys the oldest looks most redundant.
    slot = torch.arange(cos.shape[3], dtype=torch.short, device=k.device)  # int64 would double the memory
    newest = torch.where(cos > same, slot, -1).amax(-1, keepdim=True)  # (B, G, S, 1)
    cos.masked_fill_(slot == newest, 0)
    redundancy = cos.sum(2) / e.length[:, None, None]  # (B, G, S)
    redundancy = redundancy.masked_fill(~real, -math.inf).softmax(-1)  # (B, G, S)
    return mix * importance - (1 - mix) * redundancy


@score(needs=["queries"])
def snapkv(e, pool=5):
    """SnapKV: what the recent queries attend to, smoothed over neighbours (mean over heads: kvpress)."""
    return F.avg_pool1d(e.attention(), pool, 1, pool // 2)


@score(needs=["mass"])
def h2o(e):
    """H2O: the attention received so far. New entries have had little: they need a window."""
    return e.mass


@score()
def streaming(e):
    """StreamingLLM: the newest, behind sinks. Positions stay the original ones (the paper: new ones)."""
    return e.pos.float()


@score()
def random(e):
    """The baseline."""
    return torch.rand(e.pos.shape, device=e.pos.device)


@score(needs=["queries"])
def value(e, pool=5):
    """Ours: what the output would miss, attention times the value's length (close to VATP, 2406.12335)."""
    missed = e.attention() * e.v.float().norm(dim=-1)  # (B, G, S)
    return F.avg_pool1d(missed, pool, 1, pool // 2)


# ------------------------------------------------------------------------------------------------------------
# 2) keep


def best(score, length, budget, window, sinks=0):
    """The slots to keep: sinks (the first), window (the newest), and those of the others that score best.

    score (B, G, S), length (B,) -> (B, G, budget) ascending slots, then -1. The older of two equals stays.
    """
    S = score.shape[2]
    slot = torch.arange(S, device=score.device)
    length = length[:, None, None]
    score = score.masked_fill((slot < sinks) | (slot >= length - window), math.inf)
    score = score.masked_fill(slot >= length, -math.inf)
    kept = score.sort(dim=-1, descending=True, stable=True).indices[..., :budget]  # (B, G, budget)
    kept = kept.masked_fill(kept >= length, S).sort(dim=-1).values
    return kept.masked_fill(kept == S, -1)


def add_mass(tokens, ring):
    """Add to the mass of each slot what the queries in the ring give to it, in all heads; then forget them.

    No entry has left since these queries came, and no query reads what stands behind it: so their attention
    is what it was when they came, and queries that were taken back need no undoing.
    """
    asked = ring.pos[:, 0]  # (B, A), -1 = empty
    real = asked >= 0
    mass = tokens.data["mass"]  # (B, G, S, 1)
    first = asked.masked_fill(~real, 2**30).amin(-1)  # (B,)
    mass.masked_fill_((tokens.pos >= first[:, None, None])[..., None], 0)  # as new as the queries
    p = attention(ring.data["q"], tokens.data["k"], asked, tokens.pos)  # (B, G, h, A, S)
    mass += p.where(real[:, None, None, :, None], 0).sum(dim=(2, 3))[..., None]
    ring.pos.fill_(-1)


@dataclass
class Compressor:
    """Evicts down to `budget` entries per layer and KV head from rows that are full: budget + buffer entries.

    So when a row evicts depends on nothing but how many tokens it has read: budget + buffer, and every
    `buffer` after that. Call it with the caches of all layers between two decoding steps, so that a token's
    log-probability comes from the cache that it was sampled from. Rows that are not full stay as they are. A
    CUDA graph can capture a call: shapes are static.
    """

    name: str  # of SCORES
    budget: int
    buffer: int
    window: int = 8  # the newest entries, always kept
    sinks: int = 0  # the first entries, always kept (StreamingLLM: 4)
    queries: int = 8  # A; those older than the window have not seen all that they score

    def __post_init__(self):
        self.score = SCORES[self.name]
        self.slots = self.budget + self.buffer
        if min(self.window, self.sinks) < 0 or self.buffer < 1:
            raise ValueError("recent entries and sinks must be at least 0, the buffer at least 1")
        if self.budget <= self.window + self.sinks:
            raise ValueError(f"the budget {self.budget} must be more than recent entries and sinks together")
        if self.queries < 1 or ("queries" in self.score.needs and self.queries > self.budget):
            raise ValueError(f"the queries that score, {self.queries}, must be 1 to the budget {self.budget}")

    def extend(self, layer, heads):
        """Add what the score needs to a layer's caches: a ring of the newest queries, masses. heads: H."""
        tokens = layer["tokens"]
        k = tokens.data["k"]
        B, G, S, D = k.shape
        newest = [self.queries] * ("queries" in self.score.needs)
        if "mass" in self.score.needs:
            newest.append(self.buffer)  # so many come between two calls at most
            tokens.data["mass"] = torch.zeros(B, G, S, 1, device=k.device)
        if newest:
            place = {"margin": tokens.margin, "dtype": k.dtype, "device": k.device}
            ring = SlotCache(B, 2**30, {"q": (heads, D)}, window=max(newest), **place)
            tokens.watchers.append(lambda q, pos, count: ring.append(pos, count, q=q))
            layer["queries"] = ring

    def __call__(self, layers):
        for layer in layers:
            tokens = layer["tokens"]
            ring = layer.get("queries")
            e = Entries(tokens.data["k"], tokens.data["v"], tokens.pos, tokens.length, self.window)
            if "queries" in self.score.needs:
                ago = torch.arange(self.queries, device=e.pos.device)  # (A,)
                at = (ring.length[:, None] - 1 - ago) % ring.pos.shape[2]  # (B, A): the newest in the ring
                q = ring.data["q"]  # (B, H, ring, D)
                q = q.gather(2, at[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))  # (B, H, A, D)
                e = e._replace(q=q, q_pos=e.pos[:, 0].amax(-1, keepdim=True) - ago)
            if "mass" in self.score.needs:
                add_mass(tokens, ring)
                e = e._replace(mass=tokens.data["mass"][..., 0])
            kept = best(self.score(e), e.length, self.budget, self.window, self.sinks)  # (B, G, budget)
            tokens.keep(kept, tokens.length == self.slots)

    def record(self, layers):
        """What a Recorder remembers."""


# ------------------------------------------------------------------------------------------------------------
# 3) replay


class Recorder(Compressor):
    """A compressor that remembers the positions that each row kept in its i-th eviction.

    kept (E, layers B, G, budget), for texts of at most `longest` tokens. What stands behind a row's last
    eviction is left from longer texts before, or 0.
    """

    kept = None  # until the first call

    def __init__(self, compress, longest):
        super().__init__(*astuple(compress))
        self.evictions = max(1, (longest - self.slots) // self.buffer + 1)  # E

    def record(self, layers):
        """Call it after an eviction with the same layers, all of one kind."""
        [tokens] = [layer["tokens"] for layer in layers]
        kept = tokens.pos[:, :, : self.budget]  # (layers B, G, budget)
        if self.kept is None:
            self.kept = kept.new_zeros(self.evictions, *kept.shape)
        # A row that has read slots + i buffer tokens and holds budget entries comes from its i-th eviction.
        more = tokens.pos[:, 0].amax(-1) + 1 - self.slots  # (layers B,)
        due = (tokens.length == self.budget) & (more >= 0)
        turn = (more // self.buffer).clamp(0, self.evictions - 1).long()
        turn = turn[None, :, None, None].expand(1, *kept.shape)  # (1, layers B, G, budget)
        kept = torch.where(due[:, None, None], kept, self.kept.gather(0, turn)[0])
        self.kept.scatter_(0, turn, kept[None])


class Masked(NamedTuple):
    """Stands for a SlotCache in a pass over a whole text: each query reads what a mask says."""

    see: torch.Tensor  # (B, G, T, T) bool

    def attend(self, q, pos, count, scale, k, v):
        return attend(q, k, v, self.see, scale)  # (B, H, T, D)


class Replay:
    """Stands for a model's cache in a pass over whole texts: each query reads what its sampler had.

    This is mask replay: xi = 1 by construction, and the compressed policy itself is trained.
    kept (E, layers, B, G, budget) and buffer of a Recorder, T tokens. Eviction i comes when budget + buffer +
    i * buffer tokens have been read.

    By hand: the text abcdefg, 2 + 2 entries. Eviction 0 comes after d and keeps a and c. Eviction 1 comes
    after f and keeps a and e. Each token reads what is held, and what has come since:
        a: a    b: ab    c: abc    d: abcd    (nothing evicted yet)    e: ac e    f: ac ef    g: ae g
    """

    def __init__(self, kept, buffer, T):
        E, _, B, _, budget = kept.shape
        self.seen = torch.zeros(B, dtype=torch.long, device=kept.device)
        self.used = self.seen  # a model asks a cache for these two and max_len
        self.max_len = T
        t = torch.arange(T, device=kept.device)
        turn = (t - budget - buffer).div(buffer, rounding_mode="floor")  # (T,): the eviction before token t
        since = budget + buffer + turn * buffer  # (T,): what is newer begins here
        new = (t >= since[:, None]) | (turn < 0)[:, None]  # (T, T)
        turn = turn.clamp(0, E - 1)
        self.layers = []
        for at in kept.transpose(0, 2).unbind(1):  # (B, E, G, budget)
            at = at.clamp(max=T).long()  # T: of a longer text before
            held = torch.zeros(*at.shape[:3], T + 1, dtype=torch.bool, device=t.device)
            held = held.scatter(-1, at, True)[..., :T]  # (B, E, G, T)
            held = held[:, turn].transpose(1, 2)  # (B, G, T, T)
            see = (new | held) & (t <= t[:, None])  # (B, G, T, T)
            self.layers.append({"tokens": Masked(see)})


# ------------------------------------------------------------------------------------------------------------
# 4) correct: log xi, mask (1: an answer's token) -> weight of each token, counted in the average; all (B, T)


def ratio(log):
    """exp of a log-ratio, finite whatever the two policies are."""
    return log.clamp(-20, 20).exp()


def none(log_xi, mask):
    """Naive: nothing is corrected."""
    return mask, mask


def reject(log_xi, mask, least=1e-4):
    """The veto: one token that compression made 10^4 times likelier is enough. The answer still counts."""
    alive = ((log_xi >= math.log(least)) | (mask == 0)).all(-1, keepdim=True)  # (B, 1)
    return mask * alive, mask


def reweight(log_xi, mask):
    """Importance sampling, token by token."""
    return mask * ratio(log_xi), mask


def both(log_xi, mask):
    """Sparse-RL, the paper's form: veto and xi."""
    return reject(log_xi, mask)[0] * ratio(log_xi), mask


def released(log_xi, mask, low=0.5, high=1.5):
    """Sparse-RL, the released code's form: truncated, no tokens outside bounds, veto, mean weight 1."""
    alive = reject(log_xi, mask)[0]  # (B, T)
    weight = ratio(log_xi).clamp(max=high)
    weight = weight / ((weight * mask).sum() / mask.sum().clamp(min=1))  # over all, also those left out
    inside = alive * (log_xi >= math.log(low)) * (log_xi <= math.log(high))
    return inside * weight, inside


def tis(log_xi, mask, high=2.0):
    """Truncated importance sampling."""
    return mask * ratio(log_xi).clamp(max=high), mask


def mis(log_xi, mask, low=0.5, high=2.0):
    """Masked importance sampling: tokens outside bounds leave the average, answers stay (not in verl)."""
    inside = mask * (log_xi >= math.log(low)) * (log_xi <= math.log(high))
    return inside * ratio(log_xi), inside


def sequence_mask(log_xi, mask, high=3.0):
    """The product of the answer's xi where it is at most `high`, else 0 (TRL)."""
    weight = ratio((log_xi * mask).sum(-1, keepdim=True))  # (B, 1)
    return mask * weight * (weight <= high), mask


def answer(log_xi, mask):
    """Sequence-truncated importance sampling with the cap 1, which is ours: the product of the answer's xi.

    One slip of a compressed cache spoils the reward of all tokens of an answer, also of those with xi = 1.
    """
    product = ratio((log_xi * mask).sum(-1, keepdim=True).clamp(max=0))  # (B, 1)
    return mask * product, mask


def whole(p, q):
    """What a sampler's law q (.., V) weighs in the gradient where no token is weighted; p the learner's."""
    return q


def truncated(p, q, high=2.0):
    """The same with the weights of `tis`: q min(p / q, high)."""
    return torch.minimum(p, high * q)


class Correction(NamedTuple):
    """A form of the objective: what train_rl.learn needs to know about it.

    weigh   log xi, mask -> weight, counted
    anchor  PPO's ratio is taken against the "dense" old policy pi_o, or the "sampler" pi_s
    reads   the "full" history, what the sampler "kept"; or both, with the mean of the losses
    mass    p, q -> weight times q, for every token of the vocabulary: what `center` takes away; or None
    """

    weigh: Callable
    anchor: str = "dense"
    reads: tuple = ("full",)
    mass: Callable | None = None


weights = (none, reject, reweight, both, released, tis, mis, sequence_mask, answer)
CORRECTIONS = {
    **{f.__name__: Correction(f) for f in weights},
    "bypass": Correction(none, anchor="sampler"),  # naive with two policies: rho = pi / pi_s
    "replay": Correction(none, reads=("kept",)),  # mask replay: the compressed policy is trained, xi = 1
    "twin": Correction(answer, reads=("full", "kept")),  # ours: the mean of the losses of answer and replay
    "center": Correction(none, mass=whole),  # score centering
    "center_tis": Correction(tis, mass=truncated),
    "center_twin": Correction(none, reads=("full", "kept"), mass=whole),  # ours: centered, and replay
}


# ------------------------------------------------------------------------------------------------------------
# 5) objective


def group_advantage(reward, size):
    """(reward - mean) / std within groups of `size` answers, (B,) -> (B,): 0 where all rewards are equal."""
    r = reward.view(-1, size)  # (B / size, size)
    centred = r - r.mean(-1, keepdim=True)  # vetoed answers are part of mean and std, as in the paper
    return (centred / (r.std(-1, keepdim=True) + 1e-6)).flatten()


def objective(logp, anchor, advantage, weight, counted, clip=0.2):
    """The loss -1/B sum_i 1/n_i sum_t w_it min(rho adv_i, clip(rho, 1 - clip, 1 + clip) adv_i); n_i counted.

    logp (B, T) of the learner, with gradient; anchor (B, T) log pi_o or log pi_s; advantage (B,); weight and
    counted (B, T) of a correction, outside the clip. Vetoed answers count in B. -> loss, share of clipped
    tokens, largest log rho.
    """
    advantage = advantage[:, None]  # (B, 1)
    length = counted.sum(-1).clamp(min=1)  # (B,)
    log_rho = logp - anchor.detach()  # (B, T)
    rho = ratio(log_rho)
    free = rho * advantage  # (B, T)
    term = torch.minimum(free, rho.clamp(1 - clip, 1 + clip) * advantage)  # (B, T)
    loss = -(weight.detach() * term).sum(-1) / length  # (B,)
    clipped = ((free > term) & (counted > 0)).sum() / counted.sum().clamp(min=1)
    return loss.mean(), clipped, log_rho.detach().masked_fill(counted == 0, -math.inf).max()


def center(logits, q, mass, advantage, weight, counted):
    """Score centering (2609.20807): what to add to `objective`'s loss, so that its gradient loses its drift.

    At one prefix a sampler q draws tokens for a learner p, with weights w. The expected gradient is
        E_q[w A grad log p] = E_q[A] mu + (what depends on how A and the token go together),
        mu = sum_v q_v w_v grad log p_v.
    The first part, the drift, says nothing about which token was good, and it is 0 only where w q = p, since
    sum_v p_v grad log p_v = 0. Here mu is taken from the score of each token: its loss gets
    A sum_v (q_v w_v - p_v) log p_v, the bracket without gradient.
    Where w = p / q, which is importance sampling without truncation, the bracket is 0 already.

    What is left is a covariance under q, not the gradient under p. Exact, since the whole of q is known.
    logits (B, T, V) of the learner, q (B, T, V), mass(p, q) -> w q; advantage (B,); weight, counted (B, T) as
    in `objective`. A token of weight 0 has no drift, as it has no gradient.
    """
    log_p = logits.to(q.dtype).log_softmax(-1)  # (B, T, V)
    p = log_p.detach().exp()  # (B, T, V)
    term = ((mass(p, q) - p) * log_p).sum(-1) * (weight > 0)  # (B, T)
    return (advantage * (term * counted).sum(-1) / counted.sum(-1).clamp(min=1)).mean()


def token_logp(logits, tokens):
    """Log-probability of tokens (B, T) under logits (B, T, V), in fp32 or better -> (B, T)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


# ------------------------------------------------------------------------------------------------------------
# 6) watch


def mismatch(log_xi, mask, weight):
    """Statistics of log xi (B, T) on the answers -> a dict of 0-dimensional tensors.

    E xi = 1 whatever is evicted, but its tail is heavy: where much is evicted, a mean several standard errors
    (xi_error) off is common. Where nothing is, it means wrong log-probabilities. kl is KL(pi_s || pi_o); k3
    is the same with less noise. vetoed: the share of answers under the paper's veto, used or not. ess: the
    effective share of the tokens; so many with equal weights would be worth as much. p5: the 5th percentile
    of min(1, xi), which at p = q is 1, over all tokens and over each quarter of the answers (Sparrow's
    measure).
    """
    total = mask.sum().clamp(min=1)
    mean = lambda x: (x * mask).sum() / total
    xi = ratio(log_xi)  # (B, T)
    said = log_xi.masked_fill(mask == 0, 0)  # (B, T), not clamped
    squares = (weight**2 * mask).sum()
    alive = reject(log_xi, mask)[0].amax(-1)  # (B,)
    place = (4 * mask.cumsum(-1) / mask.sum(-1, keepdim=True)).ceil()  # (B, T): 1 to 4 on an answer's tokens
    low = lambda some: xi.clamp(max=1).masked_fill(~some, math.nan).nanquantile(0.05).nan_to_num(1.0)
    return {
        "xi_mean": mean(xi),
        "xi_error": (mean((xi - mean(xi)) ** 2) / total).sqrt(),
        "log_xi_min": said.min(),
        "log_xi_max": said.max(),
        "kl": mean(-log_xi),
        "k3": mean(xi - 1 - log_xi),
        "chi2": mean(xi**2) - 1,
        "drift": mean(log_xi.abs()),
        "p5": low(mask > 0),
        **{f"p5_quarter_{i}": low((mask > 0) & (place == i)) for i in (1, 2, 3, 4)},
        "xi_below": mean((xi < 0.5).to(xi.dtype)),
        "vetoed": 1 - alive.mean(),
        "dropped": mean((weight == 0).to(xi.dtype)),
        "ess": (weight * mask).sum() ** 2 / (total * squares).clamp(min=1e-9),
    }


def main():
    """A tiny model learns how this file begins. Then it goes on from the first words, with four caches."""
    import mtp
    import train_lm

    torch.manual_seed(0)
    torch.set_num_threads(1)  # of so small a model more threads mostly wait for each other
    doc = torch.tensor([ord(c) for c in __doc__[:300]])
    sizes = {"layers": 1, "width": 96, "heads": 4, "groups": 4, "vocab": 128, "context": 96}
    model = train_lm.LM(train_lm.Config(attn="gqa", **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        start = torch.randint(len(doc) - 97, (4, 1))
        rows = doc[start + torch.arange(97)]  # (4, 97)
        loss = -token_logp(model(rows[:, :-1]), rows[:, 1:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print("held  at the end, by # all heads, then + - . and a space: by none")
    print("xi    = p(full cache) / p(this cache): = from 0.8 to 1.25, < below, > above, ! below 0.01")
    for name, budget in (("rkv", 96), ("rkv", 24), ("snapkv", 24), ("streaming", 24)):
        compress = Compressor(name, budget, buffer=8, sinks=4 if name == "streaming" else 0)
        decoder = mtp.Decoder(model, 1, 97, temperature=0.7, compress=compress)
        [(new, logp)] = decoder.generate([doc[:20]], 76)
        text = torch.cat([doc[:20], new])  # (96,)
        dense = token_logp(model(text[None, :-1]) / 0.7, text[None, 1:])[0]  # (95,)
        xi = torch.bucketize((dense[19:] - logp).exp(), torch.tensor([0.01, 0.8, 1.25]))  # (76,)
        pos = decoder.cache.layers[0]["tokens"].pos[0]  # (G, S)
        held = (pos[..., None] == torch.arange(96)).any(1).sum(0)  # (96,)
        print(f"\n{name:9} {budget} " + "".join(map(chr, text)).replace("\n", "~"))
        print(f"{'held':13}" + "".join(" .-+#"[heads] for heads in held))
        print(f"{'xi':33}" + "".join("!<=>"[i] for i in xi))


if __name__ == "__main__":
    if sys.argv[1:]:  # --help
        print(__doc__)
    else:
        main()
