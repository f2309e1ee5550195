"""Draws base.png, needles.png, bytes.png, 340m.png and base-249m.png in results/: `python results/figures.py`.

base.png from base-*.jsonl, the log.jsonl of `python train_lm.py --attn KIND` (one H200), copied as it was written; the others from logs
of attention_arms.py: attention-arms*.jsonl, attention-16k.jsonl, attention-340m*.jsonl and attention-base-249m.jsonl.
"""
import argparse
import json
import math
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from attention_arms import runs  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent


# the rows of needles.png: title, {panel: (log, arm there)}
MAIN, LONG, LARGE, SHORT = "attention-arms-main", "attention-16k", "attention-340m-90m", "attention-340m"
ROWS = {
    "base": {name: (MAIN, name) for name in ("gqa", "nsa", "nsa-n16", "asa", "window")},
    "base, 16k": {name: (LONG, name) for name in ("gqa", "asa")},
    "340m, 90 M": {name: (LARGE, name) for name in ("gqa", "nsa", "asa")},
    "340m, 33 M": {"gqa": (SHORT, "gqa"), "nsa": (SHORT, "nsa"), "asa": (SHORT, "asa"), "asa, global first": (SHORT, "asa-swap")},
}


def needles():
    """The share of needles found by depth and length, a panel for each arm, the mean over its seeds."""
    figure, axes = plt.subplots(len(ROWS), 5, figsize=(11, 9), sharey=True)
    for row, (title, panels) in zip(axes, ROWS.items()):
        for axis, (name, (log, arm)) in zip(row, panels.items()):
            found = list(runs(HERE / f"{log}.jsonl")[arm].values())
            lengths = sorted(map(int, found[0]["needles"]))
            share = [[sum(e["needles"][str(n)][depth] for e in found) / len(found) for n in lengths] for depth in range(8)]
            axis.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axis.set_title(f"{title}: {name} ({len(found)})", fontsize=8)
            axis.set(xticks=range(len(lengths)), yticks=range(0, 8, 2), yticklabels=["begin", "1/4", "1/2", "3/4"])
            axis.set_xticklabels(lengths, fontsize=8)
        for axis in row[len(panels) :]:
            axis.axis("off")
        row[0].set_ylabel("where it was told")
        for axis in row:
            axis.set_xlabel("length of the text", fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "needles.png", dpi=110)


def curves(log, tokens, file):
    """Bits per byte against tokens, so many a step: a line for each seed.

    Means over the seeds: bits by place in the context, recall by distance, needles by length.
    """
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4))
    entries = [json.loads(line) for line in open(HERE / f"{log}.jsonl")]
    ended = runs(HERE / f"{log}.jsonl")
    mean = lambda lists: [sum(values) / len(values) for values in zip(*lists)]
    for i, (name, seeds) in enumerate(ended.items()):
        label = f"{name} ({len(seeds)})" if len(seeds) > 1 else name
        how = dict(color=f"C{i}", marker="o", label=label)
        for seed in seeds:
            evals = {e["step"]: e["bpb"] for e in entries if (e["arm"], e["seed"]) == (name, seed) and "bpb" in e}
            [line] = axes[0].plot([step * tokens / 1e6 for step in evals], list(evals.values()), f".-C{i}")
        line.set_label(label)
        axes[1].plot([1, 2, 3, 4], mean(e["bpb_by_position"] for e in seeds.values()), **how)
        told = [e["recall_by_distance"] for e in seeds.values()]
        shares = mean([share for share, _ in by.values()] for by in told)
        axes[2].plot([math.log2(int(d)) for d in told[0]], shares, **how)
        found = [e["needles"] for e in seeds.values()]
        lengths = sorted(map(int, found[0]))
        shares = mean([sum(by[str(n)]) / 8 for n in lengths] for by in found)
        axes[3].plot([math.log2(n) for n in lengths], shares, **how)
    axes[0].set(title="code that was not trained on", xlabel="million tokens of training", ylabel="bits per byte", yscale="log")
    axes[0].set_yticks([0.7, 1, 1.5, 2, 3], ["0.7", "1", "1.5", "2", "3"], minor=False)
    axes[0].minorticks_off()
    axes[1].set(title="the same in the end", xlabel="quarter of the context", ylabel="bits per byte", xticks=[1, 2, 3, 4])
    axes[2].set(title="recall of pairs that are told often", xlabel="log2 of the distance", ylabel="share right", ylim=(0, 1.04))
    axes[3].set(title="recall of a pair told once", xlabel="log2 of the length", ylabel="share found", ylim=(0, 1.04))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / file, dpi=110)


# the arms of bytes.png: log, name there, name here, where the name stands beside the point in each panel
POINTS = [("attention-arms", "gqa", "gqa", (6, 6), (6, 6)), ("attention-arms", "nsa", "nsa", (6, -12), (6, -12)),
          ("attention-arms", "window", "window", (6, -10), (6, -10)), ("attention-arms", "asa-R112", "R 112", (-38, -12), (-40, 2)),
          ("attention-arms-sweeps", "asa", "asa", (-10, 8), (-10, 26)), ("attention-arms-sweeps", "asa-R128", "R 128", (8, -8), (8, -8)),
          ("attention-arms-sweeps", "asa-R32", "R 32", (6, 6), (-32, -10)), ("attention-arms-sweeps", "asa-G1", "G 1", (-26, -6), (-26, 6)),
          ("attention-arms-sweeps", "asa-G4", "G 4", (8, 4), (8, 4))]  # fmt: skip


def quality():
    """Bits per byte and needles found, against the bytes that a token leaves in the cache."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    for log, arm, name, *places in POINTS:
        found = list(runs(HERE / f"{log}.jsonl")[arm].values())
        needles = [sum(e["needles"]["4096"]) / 8 for e in found]
        for axis, values, beside in zip(axes, ([e["bpb"] for e in found], needles), places):
            mean = sum(values) / len(values)
            spread = [[mean - min(values)], [max(values) - mean]]
            axis.errorbar(found[0]["kv"], mean, spread, marker="o", capsize=3, color="#2166ac" if "asa" in arm else "#808080")
            axis.annotate(name, (found[0]["kv"], mean), beside, textcoords="offset points", fontsize=9)
    for axis in axes:
        axis.set(xscale="log", xlabel="bytes of cache per token at 4096", xlim=(70, 14000))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="bits per byte", title="500 steps of base, from the worst to the best seed")
    axes[1].set(ylabel="share found", title="a pair told once in 4096 tokens")
    figure.tight_layout()
    figure.savefig(HERE / "bytes.png", dpi=110)


def base():
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    for log in sorted(HERE.glob("base-*.jsonl")):
        name = log.stem.removeprefix("base-")
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        evals = [e for e in entries if "bpb" in e and not e.get("final")]
        steps = [e["step"] for e in evals]
        axes[0].plot(steps, [e["bpb"] for e in evals], label=name)
        axes[1].plot(steps, [e["recall_beyond"][0] for e in evals], label=name)
        last = evals[-1]["recall_by_distance"]
        axes[2].plot([math.log2(int(d)) for d in last], [share for share, _ in last.values()], marker="o", label=name)
    axes[0].set(title="validation", xlabel="step", ylabel="bits per byte", yscale="log")
    axes[1].set(title="recall beyond the window", xlabel="step", ylabel="share right", ylim=(0, 1.02))
    axes[2].set(title="recall at the end", xlabel="log2 of the distance in tokens", ylabel="share right", ylim=(0, 1.02))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(HERE / "base.png", dpi=110)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    base()
    needles()
    curves(LARGE, 65536, "340m.png")
    curves("attention-base-249m", 32768, "base-249m.png")
    quality()
