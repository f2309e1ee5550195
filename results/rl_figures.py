"""Draws rl-arms.png and rl-small.png from the logs of that name (of rl_arms.py): `python results/rl_figures.py`. Needs matplotlib."""
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import rl_arms  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
PANELS = (("solved", "solved when sampling (T = 1)"), ("dense_greedy", "held out, greedy, full cache"),
          ("sparse_greedy", "held out, greedy, compressed cache"), ("k3", "KL(sampler || dense), k3"))  # fmt: skip
SHOWN = ("dense", "none", "both", "replay", "twin")


def curve(entries, name, smooth=5):
    """-> steps, values; of what is logged every step the mean of the last few."""
    points = [(e["step"], e[name]) for e in entries if name in e and not e.get("final")]
    if name in ("solved", "k3"):
        points = [(s, sum(v for _, v in points[max(0, i - smooth + 1) : i + 1]) / len(points[max(0, i - smooth + 1) : i + 1]))
                  for i, (s, _) in enumerate(points)]  # fmt: skip
    return points


def draw(name):
    arms = rl_arms.read(HERE / f"{name}.jsonl")
    figure, axes = plt.subplots(1, 4, figsize=(18, 4))
    for color, arm in [(f"C{i}", a) for i, a in enumerate(a for a in arms if a.split("-")[0] in SHOWN)]:
        for axis, (what, _) in zip(axes, PANELS):
            if arm.startswith("dense") and what == "k3":
                continue  # 0 up to rounding
            by_step = {}
            for entries in arms[arm].values():
                for step, value in curve(entries, what):
                    by_step.setdefault(step, []).append(value)
            steps = sorted(by_step)
            axis.plot(steps, [sum(by_step[s]) / len(by_step[s]) for s in steps], label=arm, color=color)
            axis.fill_between(steps, [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps], color=color, alpha=0.15)
    for axis, (_, title) in zip(axes, PANELS):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[3].set(yscale="log", ylim=(1e-2, 3))
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / f"{name}.png", dpi=110)


if __name__ == "__main__":
    for name in ("rl-arms", "rl-small"):
        draw(name)
