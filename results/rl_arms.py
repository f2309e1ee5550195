"""Runs arms of train_rl.py from one warm start, several at a time on each GPU, and makes a table of them.

    python results/rl_arms.py --out FILE                        the README's table, 3 seeds: about 18 minutes, and 2 of warm start
    python results/rl_arms.py --out FILE2 --runs FOLDER2 --warm out/arms/warm_0 --arms none twin -- --lr 2e-4      two of them: about 3
    python results/rl_arms.py --table FILE                      the table of what is there

What follows -- goes to every run. Five runs share an H200; each takes 0.7 s a step there, 150 steps.
FILE: of the log.jsonl of every run what KEPT names, with arm and seed; rewritten every 20 seconds, and the table printed every 60, so that
a set that is cut off leaves what it had.
"""
import argparse
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import train_rl  # noqa: E402
from side_by_side import divided, logged, side_by_side  # noqa: E402

# An arm's name is CORRECTION, with the run's own sampler, or CORRECTION-COMPRESSOR-BUDGET-BUFFER-RECENT-SINKS-QUERIES. dense-...: what
# dense rollouts train, read by that sampler.
FIRST = ["dense", "none", "both", "twin"]
THEN = [*"bypass reject reweight released tis mis".split(), "none-rkv-26-8-16-0-8", "both-rkv-26-8-16-0-8", "both-streaming-28-4-8-4-8"]


def options(arm):
    correct, *sampler = arm.split("-")
    how = ["--rollout", "dense"] if correct == "dense" else ["--correct", correct]
    named = zip(("--compressor", "--budget", "--buffer", "--recent", "--sinks", "--queries"), sampler)
    return [*how, *(word for pair in named for word in pair)]


def work(name, folder, words):
    return train_rl.main([str(w) for w in ["--name", name, "--out", folder, *words]])


# what is kept of a run's log, to 4 digits
KEPT = ("step solved k3 vetoed xi_mean ess entropy length no_signal norm tokens_per_second dense_greedy sparse_greedy final seconds "
        "cache_bytes dense_bytes hardware options tokens_per_read rollout_s saved p5 p5_quarter_1 p5_quarter_4").split()  # fmt: skip


def short(entry):
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in entry.items() if k in KEPT}


def gather(folder, jobs, out):
    lines = []
    for name, _ in jobs:
        arm, seed = name.rsplit("_", 1)
        for entry in logged(folder / name / "log.jsonl"):
            lines.append(json.dumps({"arm": arm, "seed": int(seed), **short(entry)}) + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(lines))


def read(path):
    """-> {arm: {seed: entries}}"""
    arms = {}
    for line in open(path):
        e = json.loads(line)
        arms.setdefault(e["arm"], {}).setdefault(e["seed"], []).append(e)
    return arms


def figures(entries):
    """Of one run -> a row of the table: of steps and evaluations the mean of the last 10 and 3. None before its first step."""
    steps = [e for e in entries if "solved" in e]
    evals = list({e["step"]: e for e in entries if "dense_greedy" in e}.values())  # the final entry repeats the last evaluation
    start = next((e for e in entries if "cache_bytes" in e), None)
    if not (steps and evals and start):
        return None
    late, ends = [e for e in steps if e["step"] > steps[-1]["step"] - 10], evals[-3:]
    mean = lambda name, some: sum(e.get(name, 0) for e in some) / len(some)
    return [steps[-1]["step"], mean("solved", late), mean("dense_greedy", ends), mean("sparse_greedy", ends),
            min(e["dense_greedy"] for e in evals), mean("vetoed", late), mean("k3", late),
            1 - start["cache_bytes"] / start["dense_bytes"], mean("tokens_per_second", late)]  # fmt: skip


def table(path):
    """Mean and spread (standard deviation; - of one seed) over the finished runs of an arm. A run that was cut off: a line of its own, *."""
    print(f"{'arm':26} {'seeds':5} {'steps':5} {'solved T=1':>12} {'dense greedy':>13} {'sparse greedy':>13} {'lowest dense':>12} "
          f"{'vetoed':>7} {'k3':>8} {'KV saved':>8} {'tokens/s':>8}")  # fmt: skip
    lines = []
    for arm, seeds in read(path).items():
        finished = {seed: any(e.get("final") for e in entries) for seed, entries in seeds.items()}
        lines.append((arm, [figures(seeds[seed]) for seed in seeds if finished[seed]]))
        lines += [(f"{arm}*", [figures(seeds[seed])]) for seed in seeds if not finished[seed]]
    for name, rows in lines:
        columns = list(zip(*[row for row in rows if row]))
        if columns:
            mean, n = [sum(c) / len(c) for c in columns], len(columns[0])
            sd = [f"{(sum((x - m) ** 2 for x in c) / (n - 1)) ** 0.5:.3f}" if n > 1 else "-" for c, m in zip(columns, mean)]
            pair = lambda i: f"{mean[i]:.3f} ±{sd[i]}"
            print(f"{name:26} {n:5} {mean[0]:5.0f} {pair(1):>12} {pair(2):>13} {pair(3):>13} {mean[4]:12.3f} "
                  f"{mean[5]:7.3f} {mean[6]:8.1e} {mean[7]:8.1%} {mean[8]:8.0f}")  # fmt: skip
    print("* cut off before its last step" if any(name.endswith("*") for name, _ in lines) else "", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/arms.jsonl"), help="the file")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("out/arms"), help="folder of the runs, warm start included")
    parser.add_argument("--limit", type=float, default=3600, help="seconds, warm start included")
    parser.add_argument("--processes", type=int, default=5, help="runs at a time on each GPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=[], help="their names, see options(); all of them by default")
    parser.add_argument("--warm", help="a run whose warm start is taken instead of making one")
    parser.add_argument("--table", help="only the table of this file")
    own, extra = divided()
    given = parser.parse_args(own)
    if given.table:
        return table(given.table)
    began, folder = time.time(), given.runs
    arms = [(arm, seed) for some in ([given.arms] if given.arms else [FIRST, THEN]) for seed in given.seeds for arm in some]
    names = [f"{arm}_{seed}" for arm, seed in arms] + ["warm_0"] * (not given.warm)
    if taken := [name for name in names if (folder / name).exists()]:
        parser.error(f"{folder} holds {taken[0]} already: give another --runs")
    folder.mkdir(parents=True, exist_ok=True)
    if not given.warm:
        if code := train_rl.main([*extra, "--name", "warm_0", "--out", str(folder), "--steps", "0"]):
            return code
        print(f"warm start after {time.time() - began:.0f} s", flush=True)
    warm = ["--warm", given.warm or folder / "warm_0"]
    jobs = [(f"{arm}_{seed}", [*extra, *warm, "--seed", seed, *options(arm)]) for arm, seed in arms]
    listed = [(name, folder / f"{name}.txt", folder, words) for name, words in jobs]
    left = given.limit - (time.time() - began)
    side_by_side(work, listed, given.processes, left, lambda: gather(folder, jobs, given.out), lambda: table(given.out))


if __name__ == "__main__":
    sys.exit(main())
