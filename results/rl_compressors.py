"""How near a compressed sampler is to the full cache, before any RL: one policy, many compressors.

    python results/rl_compressors.py RUN                                        those of TRIED, for train_rl.py's usual sums
    python results/rl_compressors.py RUN rkv-22-4-4-0-8 snapkv-22-4-4-0-8       these: name, budget, buffer, recent, sinks, queries

RUN: the folder of a run of train_rl.py that made a warm start; that samples. On a CPU about 20 seconds a line.
"""
import argparse
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import sparse_rl  # noqa: E402
import train_lm  # noqa: E402
import train_rl  # noqa: E402
from mtp import Decoder  # noqa: E402
from sparse_rl import Compressor  # noqa: E402

TRIED = """rkv-36-8-8-0-8 rkv-36-8-12-0-8 rkv-28-8-8-0-8 rkv-28-8-16-0-16 rkv-26-4-16-0-16 rkv-26-8-12-0-8 rkv-26-8-16-0-8 rkv-26-8-16-0-4
rkv-22-8-16-0-8 rkv-22-8-16-0-4 rkv-22-4-18-0-4 rkv-20-4-18-0-2 rkv-18-4-16-0-4 snapkv-26-8-8-0-8 snapkv-26-8-16-0-8 value-26-8-16-0-8
h2o-30-8-8-0-8 h2o-30-8-16-0-8 streaming-28-4-8-4-8 streaming-24-4-8-0-8 streaming-22-4-8-0-8""".split()


def named(text):
    name, *numbers = text.split("-")
    if name not in sparse_rl.SCORES or len(numbers) != 5 or not all(n.isdigit() for n in numbers):
        raise train_lm.UserError(f"{text}: not a compressor like rkv-22-4-18-0-4")
    try:
        return Compressor(name, *map(int, numbers))
    except ValueError as e:
        raise train_lm.UserError(f"{text}: {e}") from e


@torch.no_grad()
def main(run, *tried, problems=256):
    saved, cfg = train_rl.read_warm(train_rl.Config(warm=run), {})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, task = train_rl.build(cfg, device)
    model.load_state_dict(saved["model"])
    asked = train_rl.problems(task, problems, "held out")
    dense = model.new_cache(1, sum(task.most)).nbytes * problems
    print(f"{problems} held-out problems of {cfg.task}; k3: KL from the sampler to the full cache, nats a token; vetoed: share of answers\n\n"
          "compressor  entries  recent sinks queries | saved  greedy  at T = 1    k3   vetoed")  # fmt: skip
    for compress in [None, *map(named, tried or TRIED)]:
        solved = []
        for temperature in (0.0, 1.0):
            torch.manual_seed(0)
            decoder = Decoder(model, problems, sum(task.most), temperature=temperature, stop=task.stop, compress=compress)
            r = train_rl.rollout(decoder, task, asked)
            solved.append(r.reward.mean().item())
        found = sparse_rl.mismatch(train_rl.answer_logp(model, r, slice(None)) - r.sampler, r.mask, r.mask)
        c = compress
        name = f"{c.name:10} {c.budget:4} +{c.buffer:2} {c.window:7} {c.sinks:5} {c.queries:7}" if c else f"{'full cache':38}"
        print(f"{name} | {1 - decoder.cache.nbytes / dense:5.1%}  {solved[0]:6.1%}    {solved[1]:6.1%}  {found['k3']:6.4f}  {found['vetoed']:6.1%}",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", help="the folder of a run of train_rl.py that made a warm start")
    parser.add_argument("tried", nargs="*", help="compressors such as rkv-22-4-18-0-4; those of TRIED by default")
    given = parser.parse_args()
    try:
        main(given.run, *given.tried)
    except train_lm.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
