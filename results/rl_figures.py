"""Draws rl-arms.png, rl-center.png and rl-small.png from the logs of rl_arms.py, rl-drift.png from rl-drift-seeds.jsonl of rl_drift.py:
`python results/rl_figures.py`. Needs matplotlib."""
import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import rl_arms  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
PANELS = (("solved", "solved when sampling (T = 1)"), ("dense_greedy", "held out, greedy, full cache"),
          ("sparse_greedy", "held out, greedy, compressed cache"), ("k3", "KL(sampler || dense), k3"))  # fmt: skip
SHOWN = ("dense", "none", "bypass", "both", "replay", "twin", "center", "center_tis")
# a figure: its rows, each of one log
FIGURES = {
    "rl-arms": {"rl-arms": "learning rate 1.5e-4", "rl-arms-2e-4": "learning rate 2e-4"},
    "rl-center": {"rl-center": "22 + 4, lr 1.5e-4", "rl-center-2e-4": "22 + 4, lr 2e-4",
                  "rl-center-26": "26 + 8, lr 1.5e-4", "rl-center-26-2e-4": "26 + 8, lr 2e-4"},
    "rl-small": {"rl-small": ""},
}  # fmt: skip


def curve(entries, name):
    """-> steps, values; of what is logged with every step (in a committed log, every fifth and the last ten) the mean over the last 10."""
    points = [(e["step"], e[name]) for e in entries if name in e and not e.get("final")]
    if name not in ("solved", "k3"):
        return points
    near = lambda step: [v for s, v in points if step - 10 < s <= step]
    return [(step, sum(near(step)) / len(near(step))) for step, _ in points]


def draw(figure_name, rows):
    figure, grid = plt.subplots(len(rows), 4, figsize=(14, 3 * len(rows)), squeeze=False)
    for axes, (log, label) in zip(grid, rows.items()):
        arms = rl_arms.read(HERE / f"{log}.jsonl")
        for i, arm in enumerate(SHOWN):
            if arm in arms:
                band(axes, arms[arm].values(), arm, f"C{i}")
        for axis, (_, title) in zip(axes, PANELS):
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
        axes[0].set(ylabel=label)
        axes[3].set(yscale="log", ylim=(1e-4, 3))
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="upper center", ncols=len(SHOWN), fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / len(rows) / 3))
    figure.savefig(HERE / f"{figure_name}.png", dpi=80)


def band(axes, seeds, label, color):
    """The mean of some runs, between the lowest and the highest."""
    for axis, (what, _) in zip(axes, PANELS):
        if label == "dense" and what == "k3":
            continue  # 0 up to rounding
        by_step = {}
        for entries in seeds:
            for step, value in curve(entries, what):
                by_step.setdefault(step, []).append(value)
        steps = sorted(by_step)
        axis.plot(steps, [sum(by_step[s]) / len(by_step[s]) for s in steps], label=label, color=color)
        axis.fill_between(steps, [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps], color=color, alpha=0.15)


def drift():
    """Along single runs, a line each: the reward, the sampler's distance, and how large the drift is and where it points."""
    ratio = lambda e: e["norm_drift"] / e["norm_signal"]
    panels = {
        "solved when sampling (T = 1)": lambda e: e["solved"],
        "KL(sampler || dense), k3": lambda e: e["k3"],
        "drift, of the signal's norm": ratio,
        "cosine of the drift with itself 5 steps before": lambda e: e.get("cos_drift_before", 0),
    }
    runs = {}
    for line in open(HERE / "rl-drift-seeds.jsonl"):
        e = json.loads(line)
        runs.setdefault((e["arm"], e["seed"]), []).append(e)
    figure, axes = plt.subplots(1, 4, figsize=(18, 4))
    for axis, (title, value) in zip(axes, panels.items()):
        for (arm, seed), entries in runs.items():
            of_three = [sum(map(value, entries[i : i + 3])) / 3 for i in range(len(entries) - 2)]
            label = arm if seed == 4 else None
            axis.plot([e["step"] for e in entries[1:-1]], of_three, color=f"C{SHOWN.index(arm)}", linewidth=1, label=label)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[1].set(yscale="log")
    axes[2].set(yscale="log")
    axes[3].set(ylim=(-1, 1))
    figure.tight_layout()
    figure.savefig(HERE / "rl-drift.png", dpi=80)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    drift()
    for figure_name, rows in FIGURES.items():
        draw(figure_name, rows)
