"""How few entries a sampler keeps, and the objective that corrects for it.

Sampling answers fills the cache; a sampler that keeps only `budget` entries per head runs more answers in the same memory. But then it
samples from another policy than the one that is trained, and training on its answers as if they were the policy's own collapses.
Sparse-RL keeps three policies apart and weighs each token by what separates the first two:

    pi_s   sampler     old weights, compressed history          log-probabilities recorded while sampling
    pi_o   dense old   the same weights, full history           one pass over the finished answers
    pi     learner     current weights, full history            the pass that gets the gradient
    xi  = pi_o / pi_s  what eviction changed, per token; never has a gradient
    rho = pi / pi_o    how far the weights have moved; the ratio that PPO clips

    1) score      what an entry is worth: R-KV, SnapKV, H2O, StreamingLLM, ..., per layer and KV head
    2) keep       the best `budget` of a row, window and sinks among them, in their order and with their old positions
    3) replay     or the learner reads exactly what the sampler had: xi = 1, and the compressed policy itself is trained
    4) correct    from log xi: a weight per token, and which tokens the average counts
    5) objective  clipped policy gradient, each token's term times its weight
    6) watch      statistics of log xi that show a collapse before the reward does

Differs from the papers: no KL term (Sparse-RL: 1e-4 to a reference); an R-KV row without duplicates zeroes nothing (the released code
zeroes index 0 there: an accidental sink; ours has sinks by name). Does NOT include: kernels, paging, compression of latents.
Run `python sparse_rl.py` to see which tokens of a trace each compressor keeps, and xi along it. `python train_rl.py` trains with it.
Read: Sparse-RL 2601.10079; R-KV 2505.24133; SnapKV 2404.14469; H2O 2306.14048; StreamingLLM 2309.17453. Of Sparse-RL's objective we had
descriptions and the released code, not the typeset equations.

Letters as in latent_attention.py: B rows, H query heads, G KV heads, h = H / G, S slots, L filled ones, D head width; A recent queries.
N answers, T tokens of the longest. Scores, log-probabilities and weights are fp32 or better.

This file knows no model class. A layer's cache is a dict of latent_attention.SlotCache or the like: "tokens" (keys, values), and where the
compressor asks for them "queries" (a ring of the last A) and "mass" (the attention that each entry has received).
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------------------
# 1) score: a number (B, G, S) for every slot; what stands in slots that are empty or kept anyway does not matter


class Entries(NamedTuple):
    """What a compressor sees of one layer. Filled slots come first, oldest first; the newest `window` of them are kept anyway."""

    k: torch.Tensor  # (B, G, S, D) after RoPE
    v: torch.Tensor  # (B, G, S, D)
    pos: torch.Tensor  # (B, G, S), -1 = empty
    length: torch.Tensor  # (B,)
    window: int
    q: torch.Tensor = None  # (B, H, A, D) after RoPE, in any order
    q_pos: torch.Tensor = None  # (B, A)
    mass: torch.Tensor = None  # (B, G, S)

    @property
    def slot(self):
        return torch.arange(self.pos.shape[2], device=self.pos.device)  # (S,)

    @property
    def old(self):
        """Slots before the window -> (B, 1, S) bool."""
        return self.slot < (self.length - self.window)[:, None, None]

    def logits(self):
        """q . k / sqrt(D) of the recent queries -> (B, G, h, A, S) fp32."""
        q = self.q.unflatten(1, (self.k.shape[1], -1)).float()  # (B, G, h, A, D)
        return torch.einsum("bghad,bgsd->bghas", q, self.k.float()) * self.k.shape[3] ** -0.5

    def attention(self):
        """Attention of the recent queries to all slots, mean over them and over the heads of a group -> (B, G, S), 0 in the window."""
        see = (self.pos >= 0)[:, :, None] & (self.pos[:, :, None] <= self.q_pos[:, None, :, None])  # (B, G, A, S)
        p = self.logits().masked_fill(~see[:, :, None], -math.inf).softmax(-1)  # (B, G, h, A, S)
        return p.mean(dim=(2, 3)) * self.old


def rkv(e, mix=0.1, same=0.5, pool=7):
    """R-KV: attention, less what other keys say already. mix * I - (1 - mix) * R."""
    s = e.logits().amax(2)  # (B, G, A, S): pooled over the group's heads before the softmax
    p = s.masked_fill(~e.old[:, :, None], -math.inf).softmax(-1).nan_to_num()  # (B, G, A, S): the window does not take part
    attention = F.max_pool1d(p.mean(2), pool, 1, pool // 2)  # I (B, G, S)
    real = e.pos >= 0  # (B, G, S)
    k = F.normalize(e.k.float(), dim=-1) * real[..., None]  # (B, G, S, D)
    cos = (k @ k.transpose(-1, -2)).masked_fill(torch.eye(len(e.slot), dtype=torch.bool, device=k.device), 0)  # C (B, G, S, S)
    last = torch.where(cos > same, e.slot, -1).amax(-1, keepdim=True)  # (B, G, S, 1): each key spares the newest of its likes,
    cos = cos.masked_fill(e.slot == last, 0)
    redundancy = cos.sum(2) / e.length[:, None, None]  # (B, G, S): so that of three equal keys the oldest looks most redundant
    redundancy = redundancy.masked_fill(~real, -math.inf).softmax(-1)  # R
    return mix * attention - (1 - mix) * redundancy


def snapkv(e, pool=5):
    """SnapKV: what the recent queries attend to, smoothed over neighbours (mean over the group's heads: kvpress)."""
    return F.avg_pool1d(e.attention(), pool, 1, pool // 2)


def h2o(e):
    """H2O: the attention received so far, by all queries. New entries have had little: they need a window (a grace period)."""
    return e.mass


def streaming(e):
    """StreamingLLM: the newest, behind sinks. Positions stay the original ones (the paper counts them anew)."""
    return e.pos.float()


def random(e):
    """The honest floor."""
    return torch.rand(e.pos.shape, device=e.pos.device)


def keydiff(e):
    """KeyDiff (2504.15364): keys unlike the mean key. Needs no queries."""
    k = F.normalize(e.k.float(), dim=-1) * (e.pos >= 0)[..., None]  # (B, G, S, D)
    return -F.cosine_similarity(k, k.sum(2, keepdim=True), dim=-1)


def value(e, pool=5):
    """Ours: what would be missing from the output: attention times the length of the value, smoothed like SnapKV."""
    return F.avg_pool1d(e.attention() * e.v.float().norm(dim=-1), pool, 1, pool // 2)


SCORES = {f.__name__: f for f in (rkv, snapkv, h2o, streaming, random, keydiff, value)}


# ---------------------------------------------------------------------------------------------------------------------------------
# 2) keep


def best(score, length, budget, window, sinks=0):
    """The slots to keep: sinks (the first), window (the newest), and the best others; all of them where there are no more than budget.

    score (B, G, S), length (B,) -> (B, G, budget) ascending slots, then -1. Equal scores: the older slot stays.
    """
    slot, length = torch.arange(score.shape[2], device=score.device), length[:, None, None]
    score = score.masked_fill((slot < sinks) | (slot >= length - window), math.inf).masked_fill(slot >= length, -math.inf)
    kept = score.sort(dim=-1, descending=True, stable=True).indices[..., :budget]  # (B, G, budget)
    kept = kept.masked_fill(kept >= length, len(slot)).sort(dim=-1).values
    return kept.masked_fill(kept == len(slot), -1)


@dataclass
class Compressor:
    """Evicts down to `budget` entries per layer and KV head, every `buffer` tokens: a cache never has more than budget + buffer slots.

    Called with the caches of all layers between two decoding steps: a token's log-probability comes from the cache it was sampled from.
    Static shapes and no look from the host, so mtp.Decoder captures it in a CUDA graph.
    """

    name: str
    budget: int
    buffer: int
    window: int = 8  # the newest entries, always kept; also the number A of recent queries
    sinks: int = 0  # the first entries, always kept (StreamingLLM: 4)

    def __post_init__(self):
        if self.budget <= self.window + self.sinks or self.buffer < 1:
            raise ValueError(f"the budget {self.budget} must be more than window {self.window} + sinks {self.sinks}, the buffer at least 1")

    @property
    def slots(self):
        return self.budget + self.buffer

    @property
    def needs(self):
        """What the caches have to hold beside keys and values, as GQA.new_cache takes it."""
        return {"recent": self.window if self.name in ("rkv", "snapkv", "value") else 0, "mass": self.name == "h2o"}

    def choose(self, layer):
        """The slots of one layer to keep -> (B, G, budget)."""
        tokens, extra = layer["tokens"], {}
        if "queries" in layer:
            extra.update(q=layer["queries"].data[0], q_pos=layer["queries"].pos[:, 0])
        if "mass" in layer:
            extra.update(mass=layer["mass"].data[0][..., 0])
        entries = Entries(*tokens.data, tokens.pos, tokens.length, self.window, **extra)
        return best(SCORES[self.name](entries), tokens.length, self.budget, self.window, self.sinks)

    def __call__(self, layers):
        for layer in layers:
            kept = self.choose(layer)
            for name in ("tokens", "mass"):
                if name in layer:
                    layer[name].keep(kept)


# ---------------------------------------------------------------------------------------------------------------------------------
# 3) replay


class Recorder:
    """A compressor that remembers which positions it kept: kept (E, layers, B, G, budget) of the last E evictions, -1 = none."""

    def __init__(self, compress, evictions):
        self.compress, self.kept = compress, [None] * evictions
        self.slots, self.buffer, self.budget, self.needs = compress.slots, compress.buffer, compress.budget, compress.needs

    def __call__(self, layers):
        self.compress(layers)
        kept = torch.stack([layer["tokens"].pos[:, :, : self.budget] for layer in layers])  # (layers, B, G, budget)
        if isinstance(self.kept, list):
            self.kept = kept.new_full((len(self.kept), *kept.shape), -1)
            self.at = torch.zeros(1, dtype=torch.long, device=kept.device)  # on the device: a CUDA graph writes here
        self.kept.index_copy_(0, self.at, kept[None])
        self.at += 1

    def restart(self):
        if not isinstance(self.kept, list):
            self.at.zero_()


class Replay:
    """Stands for a cache in a pass over whole texts: every query reads exactly what its sampler had, so that xi = 1 by construction.

    kept (E, layers, B, G, n) of a Recorder, given (B,) tokens of the prompts: eviction i happened when given - 1 + i * buffer tokens had
    been read; T tokens. Trained so ("sparse learner"), the policy is the compressed one.
    """

    def __init__(self, kept, given, buffer, T):
        self.seen = self.used = torch.zeros_like(given)  # (B,)
        self.max_len = T
        t = torch.arange(T, device=given.device)
        turn = (t - given[:, None] + 1).div(buffer, rounding_mode="floor")  # (B, T): the eviction before token t, < 0 in the prompt
        since = (given[:, None] - 1 + turn * buffer)[:, None, :, None]  # (B, 1, T, 1): entries from here on are newer than it
        new = (t <= t[:, None]) & ((t >= since) | (turn < 0)[:, None, :, None])  # (B, 1, T, T)
        self.layers = []
        for layer in kept.unbind(1):  # (E, B, G, n)
            held = torch.zeros(*layer.shape[:3], T + 1, dtype=torch.bool, device=t.device)
            held.scatter_(-1, torch.where(layer >= 0, layer, T).long().clamp(max=T), True)  # (E, B, G, T + 1), the last for "none"
            which = turn.clamp(0, len(kept) - 1)[..., None, None].expand(-1, -1, *held.shape[2:])  # (B, T, G, T + 1)
            held = held.permute(1, 0, 2, 3).gather(1, which)[..., :T].transpose(1, 2)  # (B, G, T, T)
            self.layers.append({"see": new | (held & (t <= t[:, None]))})


# ---------------------------------------------------------------------------------------------------------------------------------
# 4) correct: log xi and mask (N, T), 1 on the answer's tokens -> weight (N, T) of each token's term, count (N, T) of the average


def ratio(l):
    """exp of a log-ratio, safe for what a collapse brings."""
    return l.clamp(-20, 20).exp()


def none(l, mask):
    """Naive: nothing is corrected."""
    return mask, mask


def reject(l, mask, least=1e-4):
    """The veto, per answer: one token that the dense policy would hardly have said is enough. The answer still counts in the batch."""
    alive = ((l >= math.log(least)) | (mask == 0)).all(-1, keepdim=True)  # (N, 1)
    return mask * alive, mask


def reweight(l, mask):
    return mask * ratio(l), mask


def both(l, mask):
    """Sparse-RL, the paper's form: M_i xi_t."""
    return reject(l, mask)[0] * ratio(l), mask


def released(l, mask, low=0.5, high=1.5):
    """Sparse-RL, the released code's form: truncated, tokens outside bounds left out, veto, and the mean weight made 1."""
    alive = reject(l, mask)[0]  # (N, T)
    weight = ratio(l).clamp(max=high)
    weight = weight / ((weight * mask).sum() / mask.sum().clamp(min=1))  # over all tokens, those left out included
    inside = alive * (l >= math.log(low)) * (l <= math.log(high))
    return inside * weight, inside


def tis(l, mask, high=2.0):
    """Truncated importance sampling."""
    return mask * ratio(l).clamp(max=high), mask


def mis(l, mask, low=0.5, high=2.0):
    """Masked importance sampling: tokens outside bounds leave the average."""
    inside = mask * (l >= math.log(low)) * (l <= math.log(high))
    return inside * ratio(l), inside


def icepop(l, mask, low=0.5, high=5.0):
    """IcePop: outside bounds the weight is 0, the average stays."""
    return mis(l, mask, low, high)[0], mask


def sequence_tis(l, mask, high=2.0):
    """One weight per answer, the truncated product of its xi (verl): corrects the prefixes as well, at a high variance."""
    return mask * ratio((l * mask).sum(-1, keepdim=True)).clamp(max=high), mask


def sequence_mask(l, mask, high=3.0):
    """The product of the answer's xi where it is at most `high`, else 0 (TRL)."""
    weight = ratio((l * mask).sum(-1, keepdim=True))  # (N, 1)
    return mask * weight * (weight <= high), mask


def strict(l, mask, least=1e-2):
    """Ours: the paper's form with an earlier veto."""
    return reject(l, mask, least)[0] * ratio(l), mask


CORRECTIONS = {f.__name__: f for f in (none, reject, reweight, both, released, tis, mis, icepop, sequence_tis, sequence_mask, strict)}
# Four more differ elsewhere, see train_rl.learn: bypass takes PPO's ratio against pi_s (two policies); weighted (ours) also weights the
# advantages; replay has the learner read what the sampler had; twin (ours) adds the losses of replay and of the paper's form.
CORRECTIONS |= {"bypass": none, "weighted": sequence_tis, "replay": none, "twin": both}


# ---------------------------------------------------------------------------------------------------------------------------------
# 5) objective


def group_advantage(reward, size, weight=None):
    """(R - mean) / std within groups of `size` consecutive answers: reward (N,) -> (N,). Equal rewards give 0: such a group has no signal.

    Made before any veto: vetoed answers stay in mean and std, as in the paper. weight (N,): ours, the mean and std that the dense policy
    would have, answers weighted by the product of their xi.
    """
    r = reward.view(-1, size)  # (N / size, size)
    w = torch.ones_like(r) if weight is None else weight.view(-1, size)
    w = w / w.sum(-1, keepdim=True).clamp(min=1e-6)
    centred = r - (w * r).sum(-1, keepdim=True)
    std = ((w * centred**2).sum(-1, keepdim=True) * size / (size - 1)).sqrt()  # unbiased
    return (centred / (std + 1e-6)).flatten()


def objective(logp, anchor, advantage, weight, count, clip=0.2):
    """The loss to minimise: -1/N sum_i 1/|y_i| sum_t w_it min(rho A_i, clip(rho, 1 - clip, 1 + clip) A_i).

    logp (N, T) of the learner, with gradient; anchor (N, T) log pi_o (bypass: log pi_s); advantage (N,); weight, count (N, T) of a
    correction: they stand outside the clip. N counts every answer, vetoed ones included. -> loss, and the share of clipped tokens.
    """
    rho, A = (logp - anchor.detach()).clamp(-20, 20).exp(), advantage[:, None]
    term = torch.minimum(rho * A, rho.clamp(1 - clip, 1 + clip) * A)  # (N, T)
    loss = -(weight.detach() * term).sum(-1) / count.sum(-1).clamp(min=1)  # (N,)
    clipped = ((rho * A > term) & (count > 0)).sum() / count.sum().clamp(min=1)
    return loss.mean(), clipped


def token_logp(logits, tokens):
    """Log-probability of tokens (N, T) under logits (N, T, V), in fp32 or better -> (N, T)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


# ---------------------------------------------------------------------------------------------------------------------------------
# 6) watch


def mismatch(l, mask, weight):
    """Statistics of log xi (N, T) on the answers -> a dict of 0-dimensional tensors.

    E xi = 1 whatever is evicted: a mean off by more than its standard error (xi_error) means wrong log-probabilities. The mean of -log xi
    is KL(pi_s || pi_o), and so is, with less noise, the mean of k3. ess: of n weights, as good as how many equal ones.
    """
    n, xi = mask.sum().clamp(min=1), ratio(l)
    mean = lambda x: (x * mask).sum() / n
    low = l.masked_fill(mask == 0, 0)
    spread = mean((xi - mean(xi)) ** 2)
    return {
        "xi_mean": mean(xi), "xi_error": (spread / n).sqrt(), "xi_min": low.min().clamp(-20).exp(), "xi_max": low.max().clamp(max=20).exp(),
        "kl": mean(-l), "k3": mean(xi - 1 - l), "chi2": mean(xi**2) - 1, "drift": mean(l.abs()),
        "xi_below": mean((xi < 0.5).to(xi.dtype)),
        "vetoed": 1 - (reject(l, mask)[0].amax(-1) / mask.amax(-1).clamp(min=1)).mean(),
        "dropped": mean((weight == 0).to(xi.dtype)),
        "ess": (weight * mask).sum() ** 2 / (n * (weight**2 * mask).sum()).clamp(min=1e-9),
    }  # fmt: skip


def trace(model, text, compress):
    """Read a text token by token through a cache that is compressed as in a rollout.

    -> log-probability of each next token (T - 1,), and the share of layers and heads in which each token is still held at the end (T - 1,).
    """
    cache, logp = model.new_cache(1, compress.slots, **compress.needs), []
    for t in range(len(text) - 1):
        if t % compress.buffer == 0:
            compress(cache.layers)
        logp.append(token_logp(model(text[None, t : t + 1], cache), text[None, t + 1 : t + 2])[0, 0])
    compress(cache.layers)
    pos = torch.stack([layer["tokens"].pos for layer in cache.layers]).flatten(0, 2)  # (layers * G, S)
    held = (pos[..., None] == torch.arange(len(text) - 1)).any(1).float().mean(0)  # (T - 1,)
    return torch.stack(logp), held


@torch.no_grad()
def picture(model, text, show, budget=24, buffer=8):
    """Which tokens of a text each compressor still holds at its end, and xi along the text, from the second token on."""
    dense = token_logp(model(text[None, :-1]), text[None, 1:])[0]  # (T - 1,)
    print(f"Of {len(text) - 1} tokens {budget} are held per head: # by all heads of all layers, then + - . and a space by none")
    print("xi = p(full cache) / p(compressed) of each token: = from 0.8 to 1.25, < below, > above, ! below 0.01 (below 0.0001: a veto)\n")
    print(f"{'text':12} {show(text[1:].tolist())}")
    for name, sinks in (("rkv", 0), ("snapkv", 0), ("streaming", 4)):
        logp, held = trace(model, text, Compressor(name, budget, buffer, 8, sinks))
        xi = ratio(dense - logp)
        print(f"{name:12} " + "".join(" .-+#"[math.ceil(4 * h)] for h in held[1:].tolist()))
        print(f"{'xi':12} " + "".join("!" if x < 0.01 else "<" if x < 0.8 else ">" if x > 1.25 else "=" for x in xi.tolist()))
    print("\nThe text was sampled with the full cache: what only that expects has a large xi. Where a compressed sampler writes itself,\n"
          "E xi = 1, and its errors have a small one.")  # fmt: skip


def main():
    """A tiny model learns this file's header; then it continues it, and its own text is read again through compressed caches."""
    import train_lm

    torch.manual_seed(0)
    text = torch.tensor([ord(c) for c in __doc__[:1200]])
    model = train_lm.LM(train_lm.Config(attn="gqa", layers=2, width=96, heads=4, groups=4, vocab=128, context=128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(250):
        at = torch.randint(len(text) - 129, (8,))[:, None] + torch.arange(129)
        rows = text[at]  # (8, 129)
        loss = -token_logp(model(rows[:, :-1]), rows[:, 1:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sample = train_lm.generate(model, text[None, :20], 108, temperature=0.8)[0]
    picture(model, sample, lambda tokens: "".join(map(chr, tokens)).replace("\n", "~"))


if __name__ == "__main__":
    main()
