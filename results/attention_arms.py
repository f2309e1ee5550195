"""Kinds of attention beside each other: equal tokens, parameters and selected tokens, several seeds, one sitting.

    python results/attention_arms.py --out FILE [--english FILE] [-- options of train_lm.py]      the main table
    python results/attention_arms.py --table FILE                                                 the table of what is there

Arms: those of train_lm.py, and variants of asa and nsa, whose names say what is changed: see `changed`. The SwiGLU width of an arm is
chosen so that all have as many parameters as asa, within 1 %. After its training a run is asked for what `more` describes.
"""
import argparse
import contextlib
import json
import math
import pathlib
import re
import sys
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import nsa  # noqa: E402
import train_lm  # noqa: E402
from latent_attention import GQA, RMSNorm, SlotCache, keys_of, merge_heads, rope, window_attention  # noqa: E402
from side_by_side import divided, logged, side_by_side  # noqa: E402

MAIN = ["gqa", "nsa", "asa", "asa-R112", "nsa-n16", "window"]  # R 112: as wide as the keys and values it replaces


class WindowGQA(GQA):
    """What a local layer of asa would be with plain keys and values: GQA in a window."""

    def __init__(self, *sizes, window):
        super().__init__(*sizes)
        self.window = window

    def new_cache(self, batch, max_len, margin=8, **kind):
        widths = dict.fromkeys(("k", "v"), (self.groups, self.head_width))
        return {"tokens": SlotCache(batch, max_len, widths, self.window, margin, **kind)}

    def forward(self, x, pos, cache=None, count=None, source=None):
        qkv = rope(self.project(x, source), pos, self.base, heads=self.heads + self.groups)  # (B, H + 2 G, T, D)
        q, k, v = qkv.split([self.heads, self.groups, self.groups], dim=1)  # (B, H or G, T, D)
        scale = self.head_width**-0.5
        if cache is None:
            o = window_attention(q, keys_of(None, pos, None, k, v), self.window, scale)  # (B, H, T, D)
        else:
            o = cache["tokens"].attend(q, pos, count, scale, k=k, v=v)  # (B, H, T, D)
        return self.out(merge_heads(o).to(x.dtype))


class Mean(nsa.ASAGlobal):
    """phi is the plain mean of a block's latents."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.pool.requires_grad_(False)


class InputPhi(nsa.ASAGlobal):
    """phi as in DeepSeek-V4: weights of a place and channel that depend on the latent there, and a norm behind the sum."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.score = nn.Linear(self.rank, self.rank, bias=False)
        self.block_norm = RMSNorm(self.rank)
        nn.init.zeros_(self.score.weight)

    def compress(self, c, k_r, end):
        found = super().compress(c, k_r, end)
        logits = self.score(c.to(self.score.weight.dtype)).float() + self.pool[:, None, :, None]  # (B, G, N, 16, R)
        weight = logits.softmax(-2).to(c.dtype)  # (B, G, N, 16, R)
        return {"k": self.block_norm((c * weight).sum(-2)), "k2": found["k2"]}


class FromStart(nsa.ASAGlobal):
    """A block's rotary key is turned to its first position instead of its middle."""

    def compress(self, c, k_r, end):
        found = super().compress(c, k_r, end)
        back = torch.full((1, 1), -(nsa.ASA_BLOCK - 1) / 2, device=k_r.device)  # (1, 1)
        middle = found["k2"]  # (B, 1, N, P)
        start = rope(middle.flatten(1, 2)[:, :, None], back, self.base)  # (B, N, 1, P)
        return {"k": found["k"], "k2": start.view_as(middle)}


def with_more_forced(attention, more):
    """compressed_attention whose lists always name `more` blocks before those that all lists name; others make room."""

    def forced(q, q_pos, keys, tokens, sizes, scale):
        o, lists = attention(q, q_pos, keys, tokens, sizes._replace(n=sizes.n - more), scale)  # lists (B, G, tiles, n - more)
        own = q_pos[:, :: sizes.share, None] // sizes.block  # (B or 1, tiles, 1)
        near = (own - 2 - torch.arange(more, device=own.device)).clamp(min=0)  # (B or 1, tiles, more): 0 is in every list
        near = near[:, None].expand(*lists.shape[:3], more)
        blocks = -(-tokens // sizes.block)
        lists = torch.cat([lists, near.to(lists.dtype)], -1)  # (B, G, tiles, n)
        lists = lists.masked_fill(lists < 0, blocks).sort(-1).values
        twice = F.pad(lists.diff(dim=-1) == 0, (1, 0))
        lists = lists.masked_fill(twice, blocks).sort(-1).values[..., : min(sizes.n, blocks)]
        return o, lists.masked_fill(lists == blocks, -1)

    return forced


PHI = {"mean": Mean, "input": InputPhi, "start": FromStart}


@contextlib.contextmanager
def changed(arm):
    """Inside, train_lm.py builds this arm -> its --attn and more options.

    window: asa's local layers alone. nsa-n16: as many tokens in a list as asa has. asa-..: R the latents' width, G their number,
    S queries that share a list, f blocks that every list names (3: the first, its own, the one before), swap global layers
    first, gqa local layers with plain keys and values, and the names of PHI.
    """
    kind, *changes = arm.split("-")
    if kind == "window":
        kind, changes = "asa", ["local"]
    found = [re.fullmatch(r"([RGSfn])(\d+)|([a-z]+)()", change) for change in changes]
    given = dict((m[1] or m[3], m[2]) for m in found if m)
    allowed = {"gqa": set(), "nsa": {"n"}, "asa": {"R", "G", "S", "f", "local", "swap", "gqa", *PHI}}
    wrong = len(given) < len(changes) or not given.keys() <= allowed.get(kind, set()) or kind not in allowed
    if wrong or int(given.get("f", 3)) < 3:
        raise train_lm.UserError(f"--arms {arm}: not an arm like gqa or asa-R64-swap")
    build = train_lm.ATTENTION["asa"]["build"]
    kept = nsa.SHARE, nsa.compressed_attention, train_lm.ASAGlobal
    if "S" in given:
        nsa.SHARE = int(given["S"])
    if "f" in given:
        nsa.compressed_attention = with_more_forced(nsa.compressed_attention, int(given["f"]) - 3)
    if "local" in given:
        train_lm.ATTENTION["asa"]["build"] = lambda cfg, layer: build(cfg, 0)
    if "swap" in given:
        train_lm.ATTENTION["asa"]["build"] = lambda cfg, layer: build(cfg, layer + 1)
    if "gqa" in given:
        plain = lambda cfg: WindowGQA(cfg.width, cfg.heads, cfg.groups, cfg.head_width, cfg.rope_base, window=cfg.window)
        train_lm.ATTENTION["asa"]["build"] = lambda cfg, layer: build(cfg, layer) if layer % 2 else plain(cfg)
    for name in PHI.keys() & given.keys():
        train_lm.ASAGlobal = PHI[name]
    words = {"n": "--nsa-blocks", "G": "--groups", "R": "--rank"}
    try:
        yield ["--attn", kind, *(x for key, word in words.items() if key in given for x in (word, given[key]))]
    finally:
        train_lm.ATTENTION["asa"]["build"] = build
        nsa.SHARE, nsa.compressed_attention, train_lm.ASAGlobal = kept


def parameters(words):
    cfg, _ = train_lm.parse([str(w) for w in words])
    cfg.vocab = cfg.vocab or train_lm.tokenizer(cfg.tokenizer).n_vocab
    return train_lm.fits(cfg, torch.device("cpu")), cfg


def equal(arm, extra):
    """-> the options of an arm, its --ffn such that it has the parameters of asa as nearly as multiples of 32 allow."""
    aim, _ = parameters([*extra, "--attn", "asa"])
    with changed(arm) as words:
        size, cfg = parameters([*words, *extra, "--ffn", 32])
        ffn = 32 + round((aim - size) / (3 * cfg.width * cfg.layers) / 32) * 32
        return [*words, *extra, "--ffn", ffn], parameters([*words, *extra, "--ffn", ffn])[0]


def work(name, folder, arm, words, english):
    with changed(arm):
        code = train_lm.main([str(w) for w in ["--out", folder, "--name", name, *words]])
        if not code:
            found = more(folder / name, english)
            with open(folder / name / "log.jsonl", "a") as f:
                f.write(json.dumps({"final": True, **found}) + "\n")
        return code


@torch.no_grad()
def more(folder, english):
    """Of a finished run: bits per byte of more code and of another text, needles found by length and depth, bytes of its cache."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, cfg, _ = train_lm.load_run(folder, device)
    data = train_lm.Data(cfg, train_lm.tokenizer(cfg.tokenizer), folder)
    amp = partial(torch.autocast, "cuda", torch.bfloat16, enabled=device.type == "cuda")
    T = cfg.context

    def bits(rows):
        """rows (n, T + 1) -> mean bits of a token."""
        nats = []
        for part in rows.to(device).split(cfg.micro):
            with amp():
                logits = model(part[:, :-1])  # (b, T, V)
            nats.append(F.cross_entropy(logits.float().transpose(1, 2), part[:, 1:], reduction="none"))  # (b, T)
        return torch.cat(nats).mean().item() / math.log(2)

    found = {"kv": model.new_cache(1, T, dtype=torch.bfloat16, device="cpu").nbytes / T, "needles": {}}
    rng = np.random.default_rng(0)  # the same crops for all seeds, eight times as many as train_lm.py reads at long contexts
    crops = torch.from_numpy(np.stack([data.crop("val", rng, T) for _ in range(128)]))  # (128, T + 1)
    found["code"] = bits(crops) / data.bytes_per_token
    if english:
        told = open(english, encoding="utf-8").read()[: 40 * T]
        text = torch.tensor(data.enc.encode_ordinary(told))  # (tokens,)
        rows = text[: len(text) // (T + 1) * (T + 1)].view(-1, T + 1)  # (n, T + 1)
        found["english"] = bits(rows) * len(text) / len(told.encode())
    length = T
    while length >= max(64, T // 16):
        found["needles"][length] = [needles(model, data, amp, length, depth) for depth in range(8)]
        length //= 2
    return found


def needles(model, data, amp, length, depth, documents=32):
    """One pair told at depth / 8 of a text, and asked for in its last token -> the share of right answers."""
    rng = np.random.default_rng([length, depth])
    rows = []
    for _ in range(documents):
        key = "".join(chr(97 + i) for i in rng.integers(26, size=2))
        said = data.enc.encode_ordinary(f"<{key}={chr(65 + rng.integers(26))}>")
        text = data.crop("val", rng, length).tolist()
        at = (length - 2 * len(said)) * depth // 8
        text = [*text[:at], *said, *text[at:]][: length + 2 - len(said)]
        rows.append([*text, *said[:-1]])
    rows = torch.tensor(rows, device=model.embed.weight.device)  # (documents, length + 1)
    right = 0
    for part in rows.split(data.cfg.micro):
        with amp():
            logits = model(part[:, :-1])  # (b, length, V)
        right += (logits[:, -1].argmax(-1) == part[:, -1]).sum().item()
    return right / documents


KEPT = ("bpb bpb_by_position recall_inside recall_beyond recall_by_distance tokens_per_second peak_bytes parameters hardware options "
        "final kv needles code english seconds data").split()  # fmt: skip


def gather(folder, jobs, out):
    """Of each log what KEPT names, and every tenth loss."""
    lines = []
    for name, _, _, arm, *_ in jobs:
        for e in logged(folder / name / "log.jsonl"):
            kept = {k: v for k, v in e.items() if k in KEPT}
            if e.get("step", 1) % 10 == 0 and "loss" in e:
                kept["loss"] = round(e["loss"], 4)
            if kept.keys() - {"seconds"}:
                seed = int(name.rsplit("_", 1)[1])
                lines.append(json.dumps({"arm": arm, "seed": seed, "step": e.get("step"), **kept}) + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(lines))


def runs(path):
    """-> {arm: {seed: what its entries say, later ones over earlier}} of the runs that ended."""
    found = {}
    for line in open(path):
        e = json.loads(line)
        found.setdefault(e["arm"], {}).setdefault(e["seed"], {}).update(e)
    return {arm: {s: e for s, e in seeds.items() if "kv" in e} for arm, seeds in found.items()}


def table(path):
    """Mean and standard deviation over the seeds. Needles: the mean over the places in a text."""
    columns = {
        "M parameters": lambda e: e["parameters"] / 1e6,
        "bits per byte": lambda e: e["bpb"],
        "first quarter": lambda e: e["bpb_by_position"][0],
        "last quarter": lambda e: e["bpb_by_position"][-1],
        "128 contexts": lambda e: e.get("code", math.nan),
        "English": lambda e: e.get("english", math.nan),
        "recall inside": lambda e: e["recall_inside"][0],
        "recall beyond": lambda e: e["recall_beyond"][0],
        **{f"needles, context / {2**i}": lambda e, i=i: float(np.mean(list(e["needles"].values())[i])) for i in (0, 1, 2)},
        "KV bytes": lambda e: e["kv"],
        "tokens/s": lambda e: e["tokens_per_second"],
        "peak GiB": lambda e: e["peak_bytes"] / 2**30,
    }
    print("| arm | seeds | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 2) + "|")
    for arm, seeds in runs(path).items():
        if seeds:
            values = {name: [f(e) for e in seeds.values()] for name, f in columns.items()}
            spread = lambda v: f" ± {np.std(v, ddof=1):.2g}" if len(v) > 1 else ""
            print(f"| {arm} | {len(seeds)} | " + " | ".join(f"{np.mean(v):.4g}{spread(v)}" for v in values.values()) + " |")
    print(flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/attention.jsonl"), help="the file")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("out/attention"), help="folder of the runs")
    parser.add_argument("--limit", type=float, default=3600, help="seconds")
    parser.add_argument("--processes", type=int, default=5, help="runs at a time on each GPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=MAIN, help="their names; those of the main table by default")
    parser.add_argument("--english", default="", help="another text, whose bits per byte are counted too")
    parser.add_argument("--table", help="only the table of this file")
    own, extra = divided()
    given = parser.parse_args(own)
    if given.table:
        return table(given.table)
    jobs = []
    for seed in given.seeds:
        for arm in given.arms:
            words, size = equal(arm, extra)
            name = f"{arm}_{seed}"
            jobs.append((name, given.runs / f"{name}.txt", given.runs, arm, [*words, "--seed", seed], given.english))
            if seed == given.seeds[0]:
                print(f"{arm:12} {size / 1e6:.2f} M parameters: {' '.join(map(str, words))}", flush=True)
    given.runs.mkdir(parents=True, exist_ok=True)
    side_by_side(work, jobs, given.processes, given.limit, lambda: gather(given.runs, jobs, given.out), lambda: table(given.out))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except train_lm.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
