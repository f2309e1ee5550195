"""How few entries a sampler keeps, and the objective that corrects for it.

Sampling answers fills the cache; a sampler that keeps only `budget` entries per head runs more answers in the same memory. But then it
samples from another policy than the one that is trained, and training on its answers as if they were the policy's own ends badly (the
README shows it). Sparse-RL keeps three policies apart, and weighs each token (ours: each answer) by what separates the first two:

    pi_s   sampler     old weights, compressed history          log-probabilities recorded while sampling
    pi_o   dense old   the same weights, full history           one pass over the finished answers
    pi     learner     current weights, full history            the pass that gets the gradient
    xi  = pi_o / pi_s  what eviction changed, per token; never has a gradient
    rho = pi / pi_o    how far the weights have moved; the ratio that PPO clips

    1) score      what an entry is worth: R-KV, SnapKV, H2O, StreamingLLM, ..., per layer and KV head
    2) keep       the best `budget` of a row, window and sinks among them, in their order and with their old positions
    3) replay     or the learner reads exactly what the sampler had: xi = 1, and the compressed policy itself is trained; `twin` does both
    4) correct    from log xi: a weight per token or answer, and which tokens the average counts
    5) objective  clipped policy gradient, each token's term times its weight
    6) watch      statistics of log xi: how far the sampler is from the dense policy, and what the correction throws away

Differs from the papers: no KL term (Sparse-RL: 1e-4 to a reference); an R-KV row without duplicates zeroes nothing (the released code
zeroes index 0 there: an accidental sink; ours has sinks by name); `released` makes the mean weight 1 per rollout (the release: per
micro-batch). Does NOT include: kernels, paging, compression of latents.
Run `python sparse_rl.py` to see which tokens of a trace each compressor keeps, and xi along it. `python train_rl.py` trains with it.
Read: Sparse-RL 2601.10079; R-KV 2505.24133; SnapKV 2404.14469; H2O 2306.14048; StreamingLLM 2309.17453. Of Sparse-RL's objective we had
descriptions and the released code, not the typeset equations.

Letters as in latent_attention.py: B rows, H query heads, G KV heads, h = H / G, S slots, L filled ones, D head width; A recent queries.
N answers, T tokens of the longest. Scores, log-probabilities and weights are fp32 or better.

This file knows no model class. A layer's cache is a dict of latent_attention.SlotCache or the like: "tokens" (keys, values), and where the
compressor asks for them "queries" (a ring of the last A) and "mass" (the attention that each entry has received).
"""
import math
from collections.abc import Callable
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
    cos = (k @ k.transpose(-1, -2)).masked_fill_(torch.eye(len(e.slot), dtype=torch.bool, device=k.device), 0)  # C (B, G, S, S)
    slot = e.slot.short()  # a (B, G, S, S) tensor of int64 would be the largest of all
    last = torch.where(cos > same, slot, -1).amax(-1, keepdim=True)  # (B, G, S, 1): each key spares the newest of its likes,
    cos.masked_fill_(slot == last, 0)
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


def value(e, pool=5):
    """Ours: what would be missing from the output: attention times the length of the value, smoothed like SnapKV."""
    return F.avg_pool1d(e.attention() * e.v.float().norm(dim=-1), pool, 1, pool // 2)


SCORES = {f.__name__: f for f in (rkv, snapkv, h2o, streaming, random, value)}


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
    window: int = 8  # the newest entries, always kept
    sinks: int = 0  # the first entries, always kept (StreamingLLM: 4)
    queries: int = 8  # A, the newest queries, that score the others; beyond the window, some of them have not seen all that they score

    def __post_init__(self):
        if self.budget <= self.window + self.sinks or self.buffer < 1 or self.window < 0 or self.sinks < 0:
            raise ValueError(f"the budget {self.budget} must be more than the recent entries {self.window} + sinks {self.sinks}, both at "
                             "least 0, the buffer at least 1")  # fmt: skip
        if self.queries < 1 or self.needs["queries"] > self.budget:  # all of them have been read when the first entry goes
            raise ValueError(f"the queries that score, {self.queries}, must be 1 to the budget {self.budget}")

    @property
    def slots(self):
        return self.budget + self.buffer

    @property
    def needs(self):
        """What the caches have to hold beside keys and values, as GQA.new_cache takes it."""
        return {"queries": self.queries if self.name in ("rkv", "snapkv", "value") else 0, "mass": self.name == "h2o"}

    def extend(self, layer, heads):
        """Shim until the merge."""
        tokens = layer["tokens"]
        kind = {"margin": tokens.margin, "device": tokens.pos.device}
        B, G, S, _ = tokens.data[0].shape
        dtype = tokens.data[0].dtype
        A = self.needs["queries"]
        if A:
            sizes = ((heads, tokens.data[0].shape[3]),)
            layer["queries"] = type(tokens)(B, S, sizes, window=A, dtype=dtype, **kind)
        if self.needs["mass"]:
            layer["mass"] = type(tokens)(B, S, ((G, 1),), dtype=torch.float32, **kind)

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
    """A compressor that remembers which positions it kept: kept (E, layers, B, G, budget) of up to E evictions, -1 = none."""

    def __init__(self, compress, evictions):
        self.compress, self.kept = compress, [None] * evictions
        self.slots, self.buffer, self.budget, self.needs = compress.slots, compress.buffer, compress.budget, compress.needs

    def extend(self, layer, heads):
        self.compress.extend(layer, heads)

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

    By hand: the prompt abc, the answer def, a buffer of 2. Eviction 0 came when a and b had been read and kept both; eviction 1 when c and
    d had been read as well, and kept a and d. Each token reads what was held, and what is newer than the eviction:
        a: a    b: ab    (the prompt: nothing evicted yet)    c: ab c    d: ab cd    e: ad e    f: ad ef
    """

    def __init__(self, kept, given, buffer, T):
        self.seen = self.used = torch.zeros_like(given)  # (B,): this and max_len are what LM asks of a cache
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
# 4) correct: log xi and mask (N, T), 1 on the answer's tokens -> weight (N, T) of each token's term, counted (N, T) in the average


def ratio(log):
    """exp of a log-ratio, finite whatever the two policies are."""
    return log.clamp(-20, 20).exp()


def none(log_xi, mask):
    """Naive: nothing is corrected."""
    return mask, mask


def reject(log_xi, mask, least=1e-4):
    """The veto, per answer: one token that the dense policy would hardly have said is enough. The answer still counts in the batch."""
    alive = ((log_xi >= math.log(least)) | (mask == 0)).all(-1, keepdim=True)  # (N, 1)
    return mask * alive, mask


def reweight(log_xi, mask):
    return mask * ratio(log_xi), mask


def both(log_xi, mask):
    """Sparse-RL, the paper's form: M_i xi_t."""
    return reject(log_xi, mask)[0] * ratio(log_xi), mask


def released(log_xi, mask, low=0.5, high=1.5):
    """Sparse-RL, the released code's form: truncated, tokens outside bounds left out, veto, and the mean weight made 1."""
    alive = reject(log_xi, mask)[0]  # (N, T)
    weight = ratio(log_xi).clamp(max=high)
    weight = weight / ((weight * mask).sum() / mask.sum().clamp(min=1))  # over all tokens, those left out included
    inside = alive * (log_xi >= math.log(low)) * (log_xi <= math.log(high))
    return inside * weight, inside


def tis(log_xi, mask, high=2.0):
    """Truncated importance sampling."""
    return mask * ratio(log_xi).clamp(max=high), mask


def mis(log_xi, mask, low=0.5, high=2.0):
    """Masked importance sampling: tokens outside bounds leave the average."""
    inside = mask * (log_xi >= math.log(low)) * (log_xi <= math.log(high))
    return inside * ratio(log_xi), inside


def icepop(log_xi, mask, low=0.5, high=5.0):
    """IcePop: outside bounds the weight is 0, the average stays."""
    return mis(log_xi, mask, low, high)[0], mask


def sequence_mask(log_xi, mask, high=3.0):
    """The product of the answer's xi where it is at most `high`, else 0 (TRL)."""
    weight = ratio((log_xi * mask).sum(-1, keepdim=True))  # (N, 1)
    return mask * weight * (weight <= high), mask


def answer(log_xi, mask):
    """Ours: one weight for the whole answer, the product of its xi, at most 1: how likely the dense policy would have said all of it.

    Tokens before and after a slip of the compressed cache are not to blame for its reward; xi of their own is about 1 all the same.
    """
    return mask * ratio((log_xi * mask).sum(-1, keepdim=True).clamp(max=0)), mask  # (N, 1) -> (N, T)


class Correction(NamedTuple):
    """A form of the objective: what train_rl.learn needs to know about it."""

    weigh: Callable  # log xi, mask -> weight, counted
    anchor: str = "dense"  # whose log-probabilities PPO's ratio is taken against: pi_o, the "dense" old policy, or the "sampler", pi_s
    reads: tuple = ("full",)  # what the learner reads: the "full" history, what the sampler "kept", or one after the other
    level: str = "token"  # PPO's ratio of each "token", or of the whole "answer"


CORRECTIONS = {f.__name__: Correction(f) for f in (none, reject, reweight, both, released, tis, mis, icepop, sequence_mask, answer)}
CORRECTIONS |= {
    "bypass": Correction(none, anchor="sampler"),  # naive with two policies: rho = pi / pi_s
    "gspo": Correction(none, level="answer"),  # GSPO (2507.18071): nothing corrected, clipped per answer, at about 4e-4: --clip
    "replay": Correction(none, reads=("kept",)),  # the compressed policy itself is trained: xi = 1 by construction
    "twin": Correction(answer, reads=("full", "kept")),  # ours: the mean of the losses of `answer` and of `replay`, where xi = 1
}


# ---------------------------------------------------------------------------------------------------------------------------------
# 5) objective


def group_advantage(reward, size):
    """(R - mean) / std within groups of `size` consecutive answers: reward (N,) -> (N,). Equal rewards give 0: such a group has no signal.

    Made before any veto: vetoed answers stay in mean and std, as in the paper.
    """
    r = reward.view(-1, size)  # (N / size, size)
    return ((r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + 1e-6)).flatten()


def objective(logp, anchor, advantage, weight, counted, clip=0.2, level="token"):
    """The loss to minimise: -1/N sum_i 1/|y_i| sum_t w_it min(rho A_i, clip(rho, 1 - clip, 1 + clip) A_i).

    logp (N, T) of the learner, with gradient; anchor (N, T) log pi_o (bypass: log pi_s); advantage (N,); weight, counted (N, T) of a
    correction: they stand outside the clip. N counts every answer, vetoed ones included. level "answer": rho is the geometric mean over
    an answer's tokens. -> loss, the share of clipped tokens, the largest log rho.
    """
    log_rho, A, length = logp - anchor.detach(), advantage[:, None], counted.sum(-1).clamp(min=1)  # (N, T), (N, 1), (N,)
    if level == "answer":
        log_rho = ((log_rho * counted).sum(-1) / length)[:, None].expand_as(logp)
    rho = ratio(log_rho)
    term = torch.minimum(rho * A, rho.clamp(1 - clip, 1 + clip) * A)  # (N, T)
    loss = -(weight.detach() * term).sum(-1) / length  # (N,)
    clipped = ((rho * A > term) & (counted > 0)).sum() / counted.sum().clamp(min=1)
    return loss.mean(), clipped, log_rho.detach().masked_fill(counted == 0, -math.inf).max()


def token_logp(logits, tokens):
    """Log-probability of tokens (N, T) under logits (N, T, V), in fp32 or better -> (N, T)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


# ---------------------------------------------------------------------------------------------------------------------------------
# 6) watch


def mismatch(log_xi, mask, weight):
    """Statistics of log xi (N, T) on the answers -> a dict of 0-dimensional tensors.

    E xi = 1 whatever is evicted, but its tail is heavy: a mean several standard errors (xi_error) off is common where much is evicted. Far
    off with nothing evicted, it means wrong log-probabilities. The mean of -log xi is KL(pi_s || pi_o), and so is, with less noise, the
    mean of k3. log_xi_min and _max are not clamped. vetoed: by the paper's veto, used or not. ess: the effective share of the tokens: as
    many with equal weights would be worth as much.
    """
    n, xi = mask.sum().clamp(min=1), ratio(log_xi)
    mean = lambda x: (x * mask).sum() / n
    answer = log_xi.masked_fill(mask == 0, 0)
    spread = mean((xi - mean(xi)) ** 2)
    return {
        "xi_mean": mean(xi), "xi_error": (spread / n).sqrt(), "log_xi_min": answer.min(), "log_xi_max": answer.max(),
        "kl": mean(-log_xi), "k3": mean(xi - 1 - log_xi), "chi2": mean(xi**2) - 1, "drift": mean(log_xi.abs()),
        "xi_below": mean((xi < 0.5).to(xi.dtype)),
        "vetoed": 1 - (reject(log_xi, mask)[0].amax(-1) / mask.amax(-1).clamp(min=1)).mean(),
        "dropped": mean((weight == 0).to(xi.dtype)),
        "ess": (weight * mask).sum() ** 2 / (n * (weight**2 * mask).sum()).clamp(min=1e-9),
    }  # fmt: skip


@torch.no_grad()
def trace(model, text, compress):
    """Read a text (T,) token by token through a compressed cache, as a rollout that begins with its first token does.

    -> log-probability of each next token (T - 1,), and the share of layers and heads in which each token is still held at the end (T - 1,).
    """
    cache, logp, T = model.new_cache(1, compress.slots, 1, compress=compress), [], len(text)
    for t in range(T - 1):
        if t % compress.buffer == 0:
            compress(cache.layers)
        logp.append(token_logp(model(text[None, t : t + 1], cache), text[None, t + 1 : t + 2])[0, 0])
    compress(cache.layers)
    pos = torch.stack([layer["tokens"].pos for layer in cache.layers]).flatten(0, 2)  # (layers * G, S)
    return torch.stack(logp), (pos[..., None] == torch.arange(T - 1)).any(1).float().mean(0)


def main():
    """A tiny model learns how this file begins; then it continues it, and its own text is read again through compressed caches."""
    import train_lm

    torch.manual_seed(0)
    torch.set_num_threads(1)  # of so small a model more threads mostly wait for each other
    doc = torch.tensor([ord(c) for c in __doc__[:400]])
    model = train_lm.LM(train_lm.Config(attn="gqa", layers=1, width=96, heads=4, groups=4, vocab=128, context=96))
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    for _ in range(150):
        rows = doc[torch.randint(len(doc) - 97, (4,))[:, None] + torch.arange(97)]  # (4, 97)
        (-token_logp(model(rows[:, :-1]), rows[:, 1:]).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    import mtp

    [(new, _)] = mtp.Decoder(model, 1, 96, temperature=0.7).generate([doc[:20]], 76)
    text = torch.cat([doc[:20], new])  # (96,)
    dense = token_logp(model(text[None, :-1]), text[None, 1:])[0].detach()  # (95,)
    print("Of 95 tokens 24 are held per head: # by all heads, then + - . and a space by none\n"
          "xi = p(full cache) / p(compressed) of each token: = from 0.8 to 1.25, < below, > above, ! below 0.01 (below 0.0001: a veto)\n\n"
          f"{'text':12} " + "".join(map(chr, text[1:])).replace("\n", "~"))  # fmt: skip
    for name, sinks in (("rkv", 0), ("snapkv", 0), ("streaming", 4)):
        logp, held = trace(model, text, Compressor(name, 24, 8, 8, sinks))
        print(f"{name:12} " + "".join(" .-+#"[math.ceil(4 * h)] for h in held[1:].tolist()))
        xi = ratio(dense - logp).tolist()
        print(f"{'xi':12} " + "".join("!" if x < 0.01 else "<" if x < 0.8 else ">" if x > 1.25 else "=" for x in xi))
    print("\nThe full cache wrote this text: what only it expects has large xi. Where a compressed one wrote, its errors have a small xi.")


if __name__ == "__main__":
    main()
