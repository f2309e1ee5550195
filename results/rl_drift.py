"""Drift against signal along a run: what part of the naive gradient carries no reward, and where it points.

    python results/rl_drift.py --out FILE --correct none [--seed 0] [--warm RUN] [--steps 150] [--every 5] [-- options of train_rl.py]
    python results/rl_drift.py --table FILE ...

The run is train_rl.py's own loop with one correction. Every few steps, before the update, three gradients are taken at the weights that have just
sampled: of the naive objective on the step's answers; of what sparse_rl.center would take away, the drift; and of the naive objective on dense
answers to the same problems, which is the true one up to noise. Signal is naive less drift. Two dense rollouts tell how noisy the true one is.
"""
import argparse
import dataclasses
import json
import pathlib
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import sparse_rl  # noqa: E402
import train_lm  # noqa: E402
import train_rl  # noqa: E402
from rl_shadow import begin  # noqa: E402
from side_by_side import divided  # noqa: E402


def gradients(model, r, cfg, recorder):
    """-> the gradient of the naive objective, and the drift in it, (parameters,) each; recorder None: dense answers, no drift."""
    advantage = sparse_rl.group_advantage(r.reward, cfg.group_size)  # (N,)
    size = len(r.text) // cfg.minibatches
    found = torch.zeros(2, sum(p.numel() for p in model.parameters()), device=r.text.device)  # (2, parameters)
    for start in range(0, len(r.text), size):
        part = slice(start, start + size)
        mask = r.mask[part]  # (n, T - 1)
        logits = train_rl.answer_logits(model, r, part)  # (n, T - 1, V)
        logp = sparse_rl.token_logp(logits, r.text[part, 1:]) * mask  # (n, T - 1)
        losses = [sparse_rl.objective(logp, logp, advantage[part], mask, mask)[0]]
        if recorder:
            with torch.no_grad():
                q = train_rl.answer_logits(model, r, part, "kept", recorder).softmax(-1)  # (n, T - 1, V)
            losses.append(-sparse_rl.center(logits, q, sparse_rl.whole, advantage[part], mask, mask))
        for i, loss in enumerate(losses):
            grads = torch.autograd.grad(loss / cfg.minibatches, list(model.parameters()), retain_graph=True)
            found[i] += torch.cat([g.flatten() for g in grads])
    return found


def run(given, extra):
    words = ["--correct", given.correct, "--seed", given.seed, "--steps", given.steps, *extra]
    words += ["--warm", given.warm] if given.warm else []
    cfg, model, task, optimizer = begin(words)
    N = cfg.problems * cfg.group_size
    recording = dataclasses.replace(cfg, correct="center")  # every arm's sampler records what it keeps
    sampler = train_rl.engine(model, task, recording, N, 1.0, True)
    dense = train_rl.engine(model, task, cfg, N, 1.0, False)
    greedy = train_rl.engine(model, task, cfg, cfg.held_out, 0.0, False)
    cos = lambda a, b: torch.nn.functional.cosine_similarity(a, b, dim=0).item()
    before = None
    start = time.time()
    pathlib.Path(given.out).parent.mkdir(parents=True, exist_ok=True)
    with open(given.out, "a", buffering=1) as out:
        for step in range(cfg.steps):
            torch.manual_seed((cfg.seed * 1_000_003 + step) % 2**63)
            train_lm.set_rate(optimizer, cfg.lr * min(1, (step + 1) / 10))
            asked = train_rl.problems(task, cfg.problems, cfg.seed, "train", step)
            asked = [prompt for prompt in asked for _ in range(cfg.group_size)]
            r = train_rl.rollout(sampler, task, asked)
            entry = {"arm": given.correct, "seed": cfg.seed, "step": step}
            if step % given.every == 0:
                naive, drift = gradients(model, r, cfg, sampler.compress)
                true, again = (gradients(model, train_rl.rollout(dense, task, asked), cfg, None)[0] for _ in range(2))
                signal = naive - drift
                norms = {"naive": naive, "drift": drift, "signal": signal, "true": true}
                entry.update({f"norm_{k}": g.norm().item() for k, g in norms.items()})
                entry.update({f"cos_{k}": cos(g, true + again) for k, g in norms.items() if k != "true"}, cos_again=cos(true, again))
                if before is not None:
                    entry["cos_drift_before"] = cos(drift, before)
                before = drift
                entry["greedy"] = train_rl.evaluate(greedy, task, cfg.held_out)[0]
            found = train_rl.learn(model, optimizer, r, cfg, sampler.compress)
            entry.update({k: v for k, v in found.items() if k in ("solved", "k3", "entropy", "vetoed", "norm") or k.startswith("p5")})
            out.write(json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in entry.items()}) + "\n")
            if step % 10 == 9:
                left = (time.time() - start) / (step + 1) * (cfg.steps - step - 1)
                print(f"step {step + 1} | solved {entry['solved']:.2f} | k3 {entry['k3']:.1e} | eta {left / 60:.1f} min", flush=True)


def table(files):
    """Means over windows of a run, one line a window."""
    lines = [json.loads(line) for file in files for line in open(file)]
    names = "solved greedy k3 p5 norm_drift norm_signal norm_true cos_drift cos_signal cos_naive cos_again cos_drift_before".split()
    print("| arm | seed | steps | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 3) + "|")
    for arm, seed in sorted({(e["arm"], e["seed"]) for e in lines}):
        of = [e for e in lines if (e["arm"], e["seed"]) == (arm, seed)]
        width = max(1, len(of) // 5)
        for i in range(0, len(of) - width + 1, width):
            some = of[i : i + width]
            values = [[e[name] for e in some if name in e] for name in names]
            print(f"| {arm} | {seed} | {some[0]['step']} to {some[-1]['step']} | " + " | ".join(f"{sum(v) / len(v):.3g}" if v else "" for v in values) + " |")


def main():
    own, extra = divided()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--table", nargs="+")
    parser.add_argument("--out", default="out/drift.jsonl")
    parser.add_argument("--correct", default="none", choices=sparse_rl.CORRECTIONS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--warm", default="")
    given = parser.parse_args(own)
    return table(given.table) if given.table else run(given, extra)


if __name__ == "__main__":
    main()
