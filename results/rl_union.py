"""The three ideas in one loop: RL from a full, a compressed and a latent cache, each without and with drafts.

    python results/rl_union.py warm                      a warm start of each kind of model, in out/union
    python results/rl_union.py cells --out FILE          the table: 6 cells, each 3 seeds of RL from its warm start
    python results/rl_union.py batches --out FILE        off, frozen, e2e, advantage with 64, 512 and 4096 answers a step; one at a time on a GPU
    python results/rl_union.py measure --out FILE        seconds of rollouts of the cells' last policies, on a quiet GPU
    python results/rl_union.py table FILE FILE ...       what they found

What follows -- goes to every run. Each line of FILE is a line of a run's log, with the run's name; it is written every 10 seconds.
"""
import argparse
import json
import multiprocessing
import pathlib
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import train_lm  # noqa: E402
import train_rl  # noqa: E402
from rl_arms import work  # noqa: E402
from side_by_side import divided  # noqa: E402

MODELS = {"gqa": ["--attn", "gqa"], "asa": ["--attn", "asa", "--groups", 2, "--rollout", "dense"]}
CACHES = {
    "full": ("gqa", ["--rollout", "dense"], 8),
    "compressed": ("gqa", ["--correct", "twin"], 3),
    "asa": ("asa", ["--rollout", "dense"], 8),
}  # its model, its options, drafts in a round
DRAFTS = {"off": ["--draft", "off"], "drafts": ["--draft", "advantage"]}
BATCHES = {64: (8, 60, 2), 512: (64, 60, 2), 4096: (512, 24, 4)}  # answers in a step: problems, steps, minibatches
ARMS = ("off", "frozen", "e2e", "advantage")
# what is kept of a run's log
KEPT = ("step solved entropy length tokens_per_read tokens_per_second rollout_s seconds draft_loss draft_eta dense_greedy sparse_greedy final "
        "cache_bytes dense_bytes peak_bytes hardware said").split()  # fmt: skip


def jobs_of(stage, folder, seeds, answers):
    """-> [(name, options)]; answers: of the stage `batches`."""
    if stage == "warm":
        return [(f"warm-{kind}-0", [*words, "--steps", 0]) for kind, words in MODELS.items()]
    if stage == "cells":
        return [(f"{cache}-{drafts}-{seed}", ["--warm", folder / f"warm-{kind}-0", "--seed", seed, "--depths", K, *words, *more])
                for seed in seeds for drafts, more in DRAFTS.items() for cache, (kind, words, K) in CACHES.items()]  # fmt: skip
    return [(f"batch{N}-{arm}-0", ["--warm", folder / "warm-gqa-0", "--rollout", "dense", "--depths", 8, "--draft", arm,
                                   "--problems", problems, "--steps", steps, "--minibatches", parts, "--eval-every", steps])
            for N, (problems, steps, parts) in BATCHES.items() if N in answers for arm in ARMS]  # fmt: skip


def gather(folder, names, out):
    lines = []
    for name in names:
        log = folder / name / "log.jsonl"
        for line in log.read_text().splitlines() if log.exists() else []:
            try:
                entry = json.loads(line)
            except ValueError:  # the last line of a running one may be torn
                continue
            entry = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in entry.items() if k in KEPT}
            lines.append(json.dumps({"run": name, **entry}) + "\n")
        said = folder / f"{name}.txt"
        equip = [x for x in said.read_text().splitlines() if x.startswith("equip ")] if said.exists() else []
        lines += [json.dumps({"run": name, "equip": equip[0].split(maxsplit=1)[1]}) + "\n"] if equip else []
    out.write_text("".join(lines))


def measure(folder, names, out):
    """Median seconds of a rollout of a run's last policy without and with drafts, for each number of answers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with open(out, "w", buffering=1) as f:
        for name in names:
            saved = train_lm.load_checkpoint(folder / name / "ckpt.pt", ("model", "config", "module"), device)
            cfg = train_lm.config_of(saved, train_rl.Config, name)
            model, task = train_rl.build(cfg, device)
            model.load_state_dict(saved["model"])
            teacher = train_rl.Teacher(model, task, cfg)
            teacher.load(folder / name, saved)
            for N in BATCHES:
                for drafts, module in (("off", None), ("drafts", teacher.module)):
                    engine = train_rl.engine(model, task, cfg, N, 1.0, cfg.rollout == "sparse", module)
                    found = []
                    for i in range(16):
                        engine.forget_counts()
                        asked = train_rl.problems(task, N // cfg.group_size, "measure", i)
                        r = train_rl.rollout(engine, task, [p for p in asked for _ in range(cfg.group_size)])
                        rounds, tokens = engine.state.reads.sum(0).tolist()
                        found.append((r.seconds, tokens / rounds, sum(map(len, r.answers))))
                    seconds, reads, tokens = (statistics.median(x) for x in zip(*found[8:]))
                    entry = {"measured": name, "answers": N, "drafts": drafts, "seconds": seconds, "tokens_per_read": reads,
                             "tokens_per_second": tokens / seconds, "cache_bytes": engine.nbytes, "hardware": torch.cuda.get_device_name(),
                             "chosen": min(engine.pace.ms, key=engine.pace.ms.get)}  # fmt: skip
                    f.write(json.dumps(entry) + "\n")
                    print(entry, flush=True)


def table(files):
    runs = {}
    for file in files:
        for line in open(file):
            e = json.loads(line)
            runs.setdefault(e.get("run"), []).append(e)
    measured = {(e["measured"], e["answers"], e["drafts"]): e for e in runs.pop(None, [])}
    mean = lambda some: sum(some) / max(1, len(some))
    spread = lambda some: f"{mean(some):.3f} ± {statistics.stdev(some) if len(some) > 1 else 0:.3f}"

    def facts(entries):
        steps = [e for e in entries if "solved" in e]
        ends = [e for e in entries if "dense_greedy" in e]
        late = lambda what: mean([e[what] for e in steps[-10:]])
        start = next(e for e in entries if "cache_bytes" in e)
        return {"steps": len(steps), "solved": late("solved"), "greedy": ends[-1]["dense_greedy"] if ends else 0, "first": mean([e["tokens_per_read"] for e in steps[:10]]),
                "last": late("tokens_per_read"), "rollout": statistics.median([e["rollout_s"] for e in steps[10:] or steps]),
                "step": statistics.median([e["seconds"] for e in steps[10:] or steps]), "rollouts": sum(e["rollout_s"] for e in steps),
                "all": sum(e["seconds"] for e in steps), "cache": start["cache_bytes"] / 2**20, "dense": start["dense_bytes"] / 2**20,
                "equip": next((e["equip"] for e in entries if "equip" in e), "")}  # fmt: skip

    found = {name: facts(entries) for name, entries in runs.items() if sum("solved" in e for e in entries) > 5}
    kinds = sorted({name.rsplit("-", 1)[0] for name in found}, key=lambda k: [n.rsplit("-", 1)[0] for n in found].index(k))
    print("| run | seeds | steps | solved, last ten | greedy | tokens per read, first ten | last ten | rollout, s | step, s | rollouts, s | all steps, s | cache, MiB | equipped |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for kind in kinds:
        some = [f for name, f in found.items() if name.rsplit("-", 1)[0] == kind]
        of = lambda what: [f[what] for f in some]
        print(f"| {kind} | {len(some)} | {mean(of('steps')):.0f} | {spread(of('solved'))} | {spread(of('greedy'))} | {mean(of('first')):.2f} | {mean(of('last')):.2f} "
              f"| {mean(of('rollout')):.3f} | {mean(of('step')):.3f} | {mean(of('rollouts')):.1f} | {mean(of('all')):.1f} | {mean(of('cache')):.1f} | {some[0]['equip']} |")  # fmt: skip
    if measured:
        print("\n| last policy of | answers | off, ms | with drafts, ms | saved | drafts chosen | tokens per read | tokens/s off | with |\n|---|---|---|---|---|---|---|---|---|")
    for (name, N, drafts), e in measured.items():
        if drafts == "off":
            other = measured.get((name, N, "drafts"))
            if other:
                print(f"| {name} | {N} | {1e3 * e['seconds']:.1f} | {1e3 * other['seconds']:.1f} | {1 - other['seconds'] / e['seconds']:.0%} | {other['chosen']} "
                      f"| {other['tokens_per_read']:.2f} | {e['tokens_per_second']:.0f} | {other['tokens_per_second']:.0f} |")  # fmt: skip


def main():
    own, extra = divided()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("stage", choices=("warm", "cells", "batches", "measure", "table"))
    parser.add_argument("files", nargs="*", help="of table")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/union.jsonl"), help="the file")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("out/union"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--answers", type=int, nargs="+", default=list(BATCHES), help="in a step of batches")
    parser.add_argument("--processes", type=int, default=0, help="runs at a time on each GPU (default: 1 for batches, else 5)")
    parser.add_argument("--limit", type=float, default=3600, help="seconds")
    given = parser.parse_args(own)
    if given.stage == "table":
        return table(given.files)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.runs.mkdir(parents=True, exist_ok=True)
    if given.stage == "measure":
        names = [f"{cache}-drafts-{given.seeds[0]}" for cache in CACHES]
        return measure(given.runs, [name for name in names if (given.runs / name / "ckpt.pt").exists()], given.out)
    jobs = [(name, [*words, *extra]) for name, words in jobs_of(given.stage, given.runs, given.seeds, given.answers) if not (given.runs / name).exists()]
    began = time.time()
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    each = given.processes or (1 if given.stage == "batches" else 5)
    workers = each * max(1, torch.cuda.device_count())
    daemon = given.stage != "warm"  # whose batches come from processes of its own
    processes = [context.Process(target=work, args=(queue, given.runs, n // each), daemon=daemon) for n in range(workers)]
    for p in processes:
        p.start()
    for job in [*jobs, *[None] * workers]:
        queue.put(job)
    while any(p.is_alive() for p in processes) and time.time() - began < given.limit:
        time.sleep(10)
        gather(given.runs, [name for name, _ in jobs], given.out)
    for p in processes:
        p.kill()
    gather(given.runs, [name for name, _ in jobs], given.out)
    print(f"{given.stage}: {len(jobs)} runs, {time.time() - began:.0f} s")
    if given.stage != "warm":
        table([given.out])


if __name__ == "__main__":
    main()
