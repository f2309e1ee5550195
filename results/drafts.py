"""Drafts for a run of train_lm.py: train a module on the finished model, then time generation with it.

    python results/drafts.py equip RUN [--depths 8] [--steps 2700] [--samples 16384]    writes RUN/mtp.pt
    python results/drafts.py bench RUN [--batch 1 16 64 256]

RUN is the run's folder, for instance out/base-gqa. On one GPU each takes a few minutes. On a CPU try 512 samples
and 300 steps. Read mtp.py first: it holds what is trained and timed here.
"""

import pathlib
import sys
import time
from dataclasses import dataclass

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import train_lm  # noqa: E402
from mtp import MTP, Decoder, equip as equip_module  # noqa: E402
from train_lm import UserError, option  # noqa: E402


def crops(tokens, rows, length, seed):
    """Random pieces of a 1-D array of tokens -> list of `rows` tensors (length,)."""
    starts = torch.randint(len(tokens) - length, (rows,), generator=torch.Generator().manual_seed(seed))
    return [torch.from_numpy(tokens[s : s + length].astype("int64")) for s in starts.tolist()]


def equip_run(folder, K, steps, device, samples, prompt=64, new=448):
    """Train a module of K depths on `samples` texts that the run's model wrote: `prompt` tokens given + `new`."""
    model, cfg, folder = train_lm.load_run(folder, device, module=False)
    data = train_lm.Data(cfg, train_lm.tokenizer(cfg.tokenizer), folder)
    step = train_lm.load_checkpoint(folder / "ckpt.pt")["step"]
    if cfg.context <= prompt:
        raise UserError(
            f"{folder} has a context of {cfg.context} tokens; {prompt} of each text are given"
        )
    new = min(new, cfg.context - prompt)
    if K + 2 > new:
        raise UserError(f"--depths {K} looks beyond texts of {new} new tokens")
    model.requires_grad_(False)
    torch.manual_seed(cfg.seed)
    model.mtp = MTP(train_lm.Block(cfg, 0), cfg.width, cfg.norm_eps).to(device)
    trained = sum(p.numel() for p in model.mtp.parameters()) / 1e6
    frozen = sum(p.numel() for p in model.parameters()) / 1e6 - trained
    print(
        f"equip    {folder}: {cfg.attn}, {frozen:.2f} M parameters frozen, {trained:.2f} M in the module, "
        f"K = {K}"
    )

    # 1) the model's own texts
    start = time.time()
    writer = Decoder(train_lm.half(model), min(samples, 512), prompt + new)
    given = crops(data.tokens["train"], samples, prompt, cfg.seed)
    answers = writer.generate(given, new)
    texts = torch.stack([torch.cat([g.to(device), x]) for g, (x, _) in zip(given, answers)])  # (samples, T)
    print(f"samples  {samples} of {prompt} given + {new} own tokens in {time.time() - start:.0f} s")

    # 2) the module
    mask = torch.ones_like(texts)
    mask[:, :prompt] = 0
    rows = max(4, min(32, 2**28 // (texts.shape[1] * cfg.vocab)))  # logits of a depth fit in 1 GiB
    rate = equip_module(model, model.mtp, texts, mask, K, steps, rows)
    train_lm.look("after training: nothing was saved", **{"module's norm": train_lm.norm_of(model.mtp)})
    module = {"module": model.mtp.state_dict(), "depths": K, "step": step}
    train_lm.save_checkpoint(folder / "mtp.pt", module)
    print(
        f"equipped in {time.time() - start:.0f} s: {1 + rate.sum():.2f} tokens per read expected; "
        f"{folder / 'mtp.pt'} holds the module"
    )


def bench_run(folder, device, batches, new=512, prompt=64, times=4):
    """The same generation with and without drafts: `times` prompts a row, from the run's validation text."""
    model, cfg, folder = train_lm.load_run(folder, device)
    if not cfg.mtp:
        raise UserError(f"{folder} has no module: python results/drafts.py equip {folder}")
    data = train_lm.Data(cfg, train_lm.tokenizer(cfg.tokenizer), folder)
    if len(data.tokens["val"]) <= prompt:
        raise UserError(f"{folder}: its validation text has fewer than the {prompt} tokens that are given")
    model = train_lm.half(model)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(
        f"bench    {folder}, {cfg.attn}, {next(model.parameters()).dtype}, on {name}; {times} texts per row, "
        f"{prompt} given + {new} new tokens, temperature 1; medians of 3\n"
    )
    print(
        f"{'batch':>5} {'drafts':>8} {'seconds':>8} {'tokens/s':>9} {'saved':>6}  "
        f"tokens per read, acceptance per depth"
    )
    for batch in batches:
        prompts = crops(data.tokens["val"], batch * times, prompt, 1)
        plain = None
        for drafts in (0, None, *sorted({(cfg.mtp + 1) // 2, cfg.mtp})):
            decoder = Decoder(model, batch, prompt + new, model.mtp, cfg.mtp, drafts=drafts)
            for _ in range(12):  # warm-up: graphs, and whether drafts pay
                decoder.generate(prompts, 256 if drafts is None else 64)
                if drafts is not None or all(decoder.pace.ms.values()):
                    break
            decoder.forget_counts()
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                decoder.generate(prompts, new)
                seconds.append(time.perf_counter() - start)
            seconds = sorted(seconds)[1]
            plain = plain or seconds
            label = "measured" if drafts is None else drafts or "none"
            found = decoder.summary() if drafts != 0 else ""
            print(
                f"{batch:5} {label:>8} {seconds:8.3f} {len(prompts) * new / seconds:9.0f} "
                f"{1 - seconds / plain:6.1%}  {found}",
                flush=True,
            )


@dataclass
class Equip:
    run: str = option("", "the run's folder", flag=False)
    depths: int = option(8, "K", least=1, most=64)
    steps: int = option(2700, "training steps, 32 texts each, fewer where the vocabulary is large", least=1)
    samples: int = option(16384, "texts that the model writes", least=64, most=2**20)


@dataclass
class Bench:
    run: str = option("", "the run's folder", flag=False)
    batch: list = option([1, 16, 64, 256], "rows that are decoded at once", least=1, most=2**16)


def equip(cfg, given):
    equip_run(cfg.run, cfg.depths, cfg.steps, DEVICE, cfg.samples)
    return 0


def bench(cfg, given):
    bench_run(cfg.run, DEVICE, cfg.batch)
    return 0


WAYS = {"equip": (equip, Equip), "bench": (bench, Bench)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(argv=None):
    way, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if way in ("-h", "--help"):
        print(__doc__)
        return 0
    if way not in WAYS:
        print(f"error: {way}: there is only {' and '.join(WAYS)}", file=sys.stderr)
        return 2
    work, config = WAYS[way]
    about = {"presets": {}, "script": f"results/drafts.py {way} RUN", "doc": __doc__}
    return train_lm.main(rest, work, config=config, **about)


if __name__ == "__main__":
    sys.exit(main())
