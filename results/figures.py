"""Draws base.png, needles.png and bytes.png in results/: `python results/figures.py`.

base.png from base-*.jsonl, the log.jsonl of `python train_lm.py --attn KIND` (one H200), copied as it was written; needles.png from
attention-arms.jsonl, and bytes.png from this and attention-arms-swap.jsonl, which are of attention_arms.py.
"""
import json
import math
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from attention_arms import runs  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent


def needles():
    """The share of needles found by depth and length, a panel for each arm, the mean over its seeds."""
    arms = {arm: list(seeds.values()) for arm, seeds in runs(HERE / "attention-arms.jsonl").items() if seeds}
    figure, axes = plt.subplots(1, len(arms), figsize=(2.1 * len(arms), 2.6), sharey=True)
    for axis, (arm, found) in zip(axes, arms.items()):
        lengths = sorted(map(int, found[0]["needles"]))
        share = [[sum(e["needles"][str(n)][depth] for e in found) / len(found) for n in lengths] for depth in range(8)]
        axis.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set(title=f"{arm} ({len(found)})", xticks=range(len(lengths)), xlabel="length")
        axis.set_xticklabels(lengths, rotation=60)
    axes[0].set(yticks=range(0, 8, 2), yticklabels=["begin", "1/4", "1/2", "3/4"], ylabel="where it was told")
    figure.tight_layout()
    figure.savefig(HERE / "needles.png", dpi=110)


# the arms of bytes.png: log, name there, name here, where the name stands beside the point in each panel
POINTS = [("attention-arms", "gqa", "gqa", (6, 6), (6, 6)), ("attention-arms", "nsa", "nsa", (6, -12), (6, -12)),
          ("attention-arms", "asa-R112", "asa, R 112", (6, -10), (6, -10)), ("attention-arms", "asa-R64", "asa", (-30, 8), (8, -12)),
          ("attention-arms", "asa-R32", "asa, R 32", (6, 4), (-60, 0)), ("attention-arms", "window", "window", (6, -10), (6, -10)),
          ("attention-arms-swap", "asa-swap", "asa, global first", (-60, -18), (-104, 4))]  # fmt: skip


def quality():
    """Bits per byte and needles found, against the bytes that a token leaves in the cache."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    for log, arm, name, *places in POINTS:
        found = list(runs(HERE / f"{log}.jsonl")[arm].values())
        needles = [sum(e["needles"]["4096"]) / 8 for e in found]
        for axis, values, beside in zip(axes, ([e["bpb"] for e in found], needles), places):
            mean = sum(values) / len(values)
            spread = [[mean - min(values)], [max(values) - mean]]
            axis.errorbar(found[0]["kv"], mean, spread, marker="o", capsize=3, color="#2166ac" if "asa" in name else "#808080")
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
    base()
    needles()
    quality()
