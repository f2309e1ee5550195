"""Draws rl-union.png from the logs of rl_union.py and rl_shadow.py: `python results/union_figure.py`. Needs matplotlib."""
import argparse
import collections
import json
import pathlib
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
CACHES = {"full": "full cache", "compressed": "compressed cache\n(Sparse-RL, R-KV)", "asa": "latent cache\n(ASA)"}
COLORS = {"full": "C7", "compressed": "C0", "asa": "C2"}


def smooth(values, width=5):
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def bytes_and_seconds(axis_bytes, axis_seconds, entries):
    start = {}  # cache -> MiB for 512 answers, the policy's own
    for e in entries:
        if "cache_bytes" in e and "run" in e and "-off-" in e["run"]:
            start.setdefault(e["run"].split("-")[0], e["cache_bytes"] / 2**20)
    axis_bytes.bar([CACHES[c] for c in CACHES], [start[c] for c in CACHES], color=[COLORS[c] for c in CACHES])
    for i, c in enumerate(CACHES):
        note = "" if c == "full" else f"\n−{1 - start[c] / start['full']:.0%}"
        axis_bytes.text(i, start[c], f"{start[c]:.0f} MiB{note}", ha="center", va="bottom")
    axis_bytes.set(title="memory: the cache of 512 answers", ylim=(0, 1.2 * start["full"]), yticks=[])
    measured = {(e["measured"].split("-")[0], e["drafts"]): e for e in entries if e.get("answers") == 64 and "measured" in e}
    for i, c in enumerate(CACHES):
        off, on = (1e3 * measured[c, drafts]["seconds"] for drafts in ("off", "drafts"))
        axis_seconds.bar([i - 0.2, i + 0.2], [off, on], 0.38, color=COLORS[c], alpha=1, hatch=["", "///"], edgecolor="white")
        axis_seconds.text(i - 0.2, off, f"{off:.0f}", ha="center", va="bottom")
        axis_seconds.text(i + 0.2, on, f"{on:.0f}\n({on / off - 1:+.0%})".replace("-", "−"), ha="center", va="bottom")
    axis_seconds.set(title="time: ms to write 64 answers, plain | with drafts (hatched)", xticks=range(3), ylim=(0, 65), yticks=[])
    axis_seconds.set_xticklabels([CACHES[c] for c in CACHES])


def learning(axis, entries):
    curves = collections.defaultdict(lambda: collections.defaultdict(list))
    for e in entries:
        if "solved" in e and "run" in e:
            curves[e["run"].rsplit("-", 1)[0]][e["step"]].append(e["solved"])
    for name, steps in curves.items():
        cache, drafts = name.split("-")
        label = f"{CACHES[cache].split(' ')[0]}{', drafts' if drafts == 'drafts' else ''}"
        style = "--" if drafts == "drafts" else "-"
        axis.plot(sorted(steps), smooth([statistics.mean(steps[s]) for s in sorted(steps)]), style, color=COLORS[cache], label=label)
    axis.set(title="learning: share of sums solved (sampled)", xlabel="step of RL", ylim=(0.2, 1))
    axis.legend(fontsize=8, loc="lower right")


def acceptance(axis, entries):
    shown = {"replay": "learns from the last 4 rollouts", "e2e": "learns from the newest", "frozen": "frozen"}
    for (arm, label), color in zip(shown.items(), ("C3", "C1", "C7")):
        by_step = collections.defaultdict(list)
        for e in entries:
            if e["task"] == "words":
                by_step[e["step"]].append(e[arm])
        steps = sorted(by_step)
        axis.plot(steps, smooth([statistics.mean(by_step[s]) for s in steps]), color=color, label=label)
        low, high = ([f(by_step[s]) for s in steps] for f in (min, max))
        axis.fill_between(steps, smooth(low), smooth(high), color=color, alpha=0.15)
    axis.set(title="drafts: tokens per read while the policy moves (words)", xlabel="step of RL")
    axis.legend(fontsize=8, loc="upper left", title="the module that drafts", title_fontsize=8)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    read = lambda name: [json.loads(line) for line in open(HERE / name)]
    figure, axes = plt.subplots(2, 2, figsize=(12.5, 8))
    axes = axes.flatten()
    bytes_and_seconds(axes[0], axes[1], read("rl-union.jsonl"))
    acceptance(axes[2], read("rl-shadow.jsonl"))
    learning(axes[3], read("rl-union.jsonl"))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "rl-union.png", dpi=100)
