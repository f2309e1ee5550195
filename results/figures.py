"""Draws results/base.png from results/base-*.jsonl: `python results/figures.py`. The only file that needs matplotlib.

Each log is the log.jsonl of `python train_lm.py --attn KIND` (one H200), copied as it was written.
"""
import json
import math
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent


def main():
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
    main()
