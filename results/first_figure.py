"""Draws results/first.png, the picture of the README: `python results/first_figure.py`. Needs matplotlib.

Three claims, one panel each, read from the committed logs:

    1) attention   attention-arms-main.jsonl: bytes of the cache per token; on the bars bits per byte and needles, means of three seeds
    2) drafts      mtp-redesign.txt: the time that the same texts take with drafts, as a share of the time without
    3) RL          rl-center.jsonl: problems solved over 150 steps, three seeds of each arm; the band is from the worst to the best
"""

import argparse
import pathlib
import re

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import attention_arms  # noqa: E402
import rl_arms  # noqa: E402
from rl_figures import curve  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
GRAY, RED, BLUE = "#808080", "#c8442f", "#2166ac"


def attention(axis):
    """How much memory each kind of attention keeps per token, and how well it predicts."""
    kinds = {"gqa": "dense (GQA)", "nsa": "sparse (NSA)", "asa": "alternating (ASA)"}
    arms = attention_arms.runs(HERE / "attention-arms-main.jsonl")
    mean = lambda values: sum(values) / len(values)
    for row, (kind, name) in enumerate(kinds.items()):
        seeds = list(arms[kind].values())
        kept = seeds[0]["kv"]
        axis.barh(row, kept, color=BLUE if kind == "asa" else GRAY, height=0.72)
        needles = mean([mean(e["needles"]["4096"]) for e in seeds])
        quality = f"{mean([e['bpb'] for e in seeds]):.2f} bits/byte\n{needles:.0%} found"
        place, color = (kept + 1300, BLUE) if kept < 3000 else (110, "white")  # beside a bar that is too short
        axis.text(place, row, f"{name}\n{quality}", va="center", color=color, fontsize=9, linespacing=1.35)
        axis.text(kept + 90, row, f"{kept:,.0f}", va="center", fontsize=10, weight="bold")
    axis.set(
        title="A third of the memory for a text", xlabel="bytes of cache per token (4096 tokens)", xlim=(0, 6900)
    )
    axis.set(yticks=[])
    axis.invert_yaxis()


def drafts(axis):
    """The time of decoding with drafts, beside the time without, by batch."""
    log = (HERE / "mtp-redesign.txt").read_text()
    lines = re.findall(r"^ +(\d+) +(none|measured) +([\d.]+) ", log, re.M)
    seconds = {(int(batch), drafts): float(s) for batch, drafts, s in lines}
    batches = sorted({batch for batch, _ in seconds})
    for place, batch in enumerate(batches):
        share = seconds[batch, "measured"] / seconds[batch, "none"]
        axis.bar(place, 1, color="#e4e4e4", width=0.72)
        axis.bar(place, share, color=BLUE, width=0.72)
        axis.text(
            place,
            (1 + share) / 2,
            f"{1 - share:.0%}\nsaved",
            ha="center",
            va="center",
            fontsize=10,
            weight="bold",
        )
    axis.axhline(1, color="black", linewidth=1)
    axis.text(-0.42, 1.03, "without drafts", fontsize=9)
    axis.text(0, 0.2, "with\ndrafts", ha="center", va="center", color="white", fontsize=9)
    axis.set(
        title="As much text, sooner", xlabel="rows decoded at once", ylabel="time to write it", ylim=(0, 1.15)
    )
    axis.set(
        xticks=range(len(batches)),
        xticklabels=batches,
        yticks=[0, 0.5, 1],
        yticklabels=["0", "50 %", "100 %"],
    )


def learning(axis):
    """Problems solved while a policy learns: from a full cache, from a compressed one, and from that with a correction."""
    arms = rl_arms.read(HERE / "rl-center.jsonl")
    shown = {
        "dense": (GRAY, "full cache", (152, 0.85)),
        "twin": (BLUE, "71 % smaller,\ncorrected", (152, 0.99)),
        "none": (RED, "71 % smaller,\nuncorrected", (152, 0.32)),
    }
    for arm, (color, label, place) in shown.items():
        seeds = [dict(curve(entries, "solved")) for entries in arms[arm].values()]
        steps = sorted(set.intersection(*map(set, seeds)))
        values = [[seed[step] for seed in seeds] for step in steps]
        axis.plot(steps, [sum(v) / len(v) for v in values], color=color, linewidth=2.2)
        axis.fill_between(
            steps, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2, linewidth=0
        )
        axis.text(*place, label, color=color, fontsize=9, va="center", weight="bold")
    axis.set(
        title="Learning from a smaller cache",
        xlabel="step of reinforcement learning",
        ylabel="problems solved",
    )
    axis.set(
        xlim=(0, 205),
        ylim=(-0.02, 1.06),
        xticks=[0, 50, 100, 150],
        yticks=[0, 0.5, 1],
        yticklabels=["0", "50 %", "100 %"],
    )


def main():
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.7), width_ratios=(1, 0.9, 1.2))
    for axis, draw in zip(axes, (attention, drafts, learning)):
        draw(axis)
        axis.title.set_weight("bold")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(w_pad=2.5)
    figure.savefig(HERE / "first.png", dpi=110)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    main()
