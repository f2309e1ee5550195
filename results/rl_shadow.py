"""Which loss keeps a module that drafts in step with its policy: all of them learn beside one RL run, from the same answers.

    python results/rl_shadow.py --out FILE --task sums --seed 0               a GPU: about 3 minutes, and the warm start
    python results/rl_shadow.py --table FILE ...                              the table of some files, one a run
    python results/rl_shadow.py --small --out FILE                            a CPU: does it work?

Modules never touch the policy. So they can be compared in pairs, without the noise of different runs: in each step all are measured on the
fresh answers (mtp.expected_acceptance on 128 of them) before they learn from these, and they learn after the policy's update. Rollouts are
dense, without drafts, and the policy is read in fp32.

An arm: the loss (ce, soft or e2e), and
    advantage F   answers weigh exp(F eta A), eta from what the update did to their probabilities: train_rl.weights_of
    prefix        places weigh what the policy has made of their prefix since it was written, p(prefix) now / then, from 1/2 to 2
    ahead F       the target is the policy F updates ahead: logits go on as in the last update
    all           four updates a step instead of one, from all 512 answers instead of 128
    replay        four updates a step, from 128 answers of each of the last four rollouts; `replay 8`: eight of the last eight
    rate F        the learning rate is F times as high: does one update a step with larger steps do as well as four?

At the end, what a module is worth on texts that stay the same (those of step 0), so that only policy and module have changed: with the
policy's own law, and with both tempered until the policy has the entropy of step 0. The first tells whether drafts grow stale, the second
that entropy does not hide it.
"""
import argparse
import collections
import copy
import json
import pathlib
import sys
import time
from typing import NamedTuple

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import kernels  # noqa: E402
import mtp  # noqa: E402
import sparse_rl  # noqa: E402
import train_lm  # noqa: E402
import train_rl  # noqa: E402


class Arm(NamedTuple):
    loss: str = "e2e"
    advantage: float = 0.0  # F
    prefix: bool = False
    ahead: float = 0.0  # F
    all: int = 1  # updates in a step, from so many parts of the fresh rollout
    replay: int = 1  # and from so many rollouts
    rate: float = 1.0  # F


ARMS = {
    "ce": Arm("ce"),
    "soft": Arm("soft"),
    "e2e": Arm(),
    "advantage 1": Arm(advantage=1),
    "advantage 10": Arm(advantage=10),
    "prefix": Arm(prefix=True),
    "ahead 4": Arm(ahead=4),
    "all": Arm(all=4),
    "all, advantage 10": Arm(all=4, advantage=10),
    "replay": Arm(replay=4),
    "replay, advantage 1": Arm(replay=4, advantage=1),
    "replay, prefix": Arm(replay=4, prefix=True),
    "rate 4": Arm(rate=4),
    "replay, rate 3": Arm(replay=4, rate=3),
    "replay 8": Arm(replay=8),
}


class Lesson(NamedTuple):
    """Some answers of one rollout, and the policy that wrote them; T as in train_rl.py."""

    text: torch.Tensor  # (n, T)
    mask: torch.Tensor  # (n, T)
    z: torch.Tensor  # (n, T, V) logits of the policy that wrote them
    advantage: torch.Tensor  # (n,)


def read(model, text):
    """-> the policy's states (n, T, C) and logits (n, T, V), in fp32."""
    with torch.no_grad():
        h = model.hidden(text)
        return h, model.head(h)


def loss_of(arm, module, model, lesson, h, z, K):
    """h, z: of the policy as it is now."""
    p = mtp.law(z, 1.0)  # (n, T, V)
    if arm.ahead:
        p = mtp.law(z + arm.ahead * (z - lesson.z), 1.0)
    if arm.loss == "ce":
        p = torch.nn.functional.one_hot(lesson.text.roll(-1, 1), p.shape[-1]).float()
    weight = None
    if arm.advantage or arm.prefix:
        moved = sparse_rl.token_logp(z[:, :-1], lesson.text[:, 1:]) - sparse_rl.token_logp(lesson.z[:, :-1], lesson.text[:, 1:])
        moved = moved * lesson.mask[:, 1:]  # (n, T - 1)
        if arm.advantage:
            weight, _ = train_rl.weights_of(lesson.advantage, moved.sum(-1), arm.advantage)  # (n,)
            weight = weight[:, None].expand_as(lesson.mask)  # (n, T)
        else:
            weight = torch.nn.functional.pad(moved.cumsum(-1).exp().clamp(0.5, 2), (0, 1), value=1)  # (n, T)
    with torch.autocast("cuda", torch.bfloat16, enabled=kernels.has_bf16(z.device)):
        states = module.unroll(h, lesson.text, model.embed.weight, K)
        if arm.loss == "e2e":
            return mtp.e2e_loss(states, model.head.weight, p, lesson.mask, weight=weight)
        return mtp.soft_loss(states, model.head.weight, p, lesson.mask)


@torch.no_grad()
def acceptance(module, model, text, mask, h, p, K, temperature=1.0):
    """-> (K,) drafts 1 .. k all accepted."""
    with torch.autocast("cuda", torch.bfloat16, enabled=kernels.has_bf16(text.device)):
        states = module.unroll(h, text, model.embed.weight, K)
        return mtp.expected_acceptance(states, model.head.weight, p, text, mask, temperature)


def entropy_of(z, mask, temperature=1.0):
    """Mean entropy in nats where a token of the answer comes next."""
    p = mtp.law(z, temperature)
    own = mask[:, 1:]
    return (-(p * p.clamp(min=1e-30).log()).sum(-1)[:, :-1] * own).sum() / own.sum()


def on_fixed_texts(modules, model, text, mask, K, entropy):
    """Of every module, on texts of step 0: tokens per read with the policy's law, and tempered to an entropy."""
    h, z = read(model, text)
    low, high = 0.1, 20.0
    for _ in range(40):  # entropy grows with the temperature
        middle = (low * high) ** 0.5
        low, high = (middle, high) if entropy_of(z, mask, middle) < entropy else (low, middle)
    found = {"fixed_entropy": entropy_of(z, mask).item(), "temperature": middle}
    for name, module in modules.items():
        for what, temperature in (("fixed", 1.0), ("tempered", middle)):
            p = mtp.law(z, temperature)
            found[f"{what} {name}"] = 1 + acceptance(module, model, text, mask, h, p, K, temperature).sum().item()
    return found


def begin(words):
    """Options of train_rl.py -> its config, a policy after the warm start, the task, the policy's optimizer."""
    cfg, said = train_lm.parse([str(w) for w in words], train_rl.Config, train_rl.PRESETS)
    warm, cfg = train_rl.read_warm(cfg, said)
    device = train_lm.pick_device(cfg)
    model, task = train_rl.build(cfg, device)
    if warm:
        model.load_state_dict(warm["model"])
    else:
        train_rl.imitate(model, task, cfg, device)
    return cfg, model, task, torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0)


def run(given):
    words = ["--task", given.task, "--seed", given.seed, "--rollout", "dense", "--correct", "none", "--draft", "e2e"]
    words += ["--depths", given.depths, "--equip-steps", given.equip_steps]
    words += ["--preset", "small", "--warm-steps", 300] if given.small else []
    words += ["--warm", given.warm] if given.warm else []
    words += ["--size", given.size] if given.size else []
    cfg, model, task, optimizer = begin(words)
    device = model.embed.weight.device
    N = cfg.problems * cfg.group_size
    sampler = train_rl.engine(model, task, cfg, N, 1.0, False)
    teacher = train_rl.Teacher(model, task, cfg)
    teacher.equip(sampler, task, print)
    first = teacher.module
    modules = {name: copy.deepcopy(first) for name in ("frozen", *ARMS)}
    made = lambda name, arm: torch.optim.AdamW(modules[name].parameters(), arm.rate * cfg.draft_lr, (0.9, 0.95), weight_decay=0.0)
    pupils = {name: made(name, arm) for name, arm in ARMS.items()}
    K = cfg.depths
    recent = collections.deque(maxlen=max(arm.replay for arm in ARMS.values()))
    fixed = None
    start = time.time()
    pathlib.Path(given.out).parent.mkdir(parents=True, exist_ok=True)
    with open(given.out, "w", buffering=1) as out:
        for step in range(given.steps):
            torch.manual_seed((cfg.seed * 1_000_003 + step) % 2**63)
            train_lm.set_rate(optimizer, cfg.lr * min(1, (step + 1) / 10))
            asked = train_rl.problems(task, cfg.problems, cfg.seed, "train", step)
            r = train_rl.rollout(sampler, task, [prompt for prompt in asked for _ in range(cfg.group_size)])
            every = max(1, N // 128)
            advantage = sparse_rl.group_advantage(r.reward, cfg.group_size)  # (N,)
            fresh = []
            for part in range(4):
                rows = torch.arange((step + part) % every, N, every, device=device)
                own = torch.nn.functional.pad(r.mask[rows], (1, 0))  # (n, T)
                fresh.append(Lesson(r.text[rows], own, read(model, r.text[rows])[1], advantage[rows]))
            text, mask, z, _ = fresh[0]
            h, _ = read(model, text)
            entry = {"step": step, "task": cfg.task, "seed": cfg.seed, "entropy": entropy_of(z, mask).item()}
            if fixed is None:
                fixed = (text, mask)
                entropy = entropy_of(z, mask)
                entry.update(on_fixed_texts({"frozen": first}, model, *fixed, K, entropy))
            for name, module in modules.items():
                rates = acceptance(module, model, text, mask, h, mtp.law(z, 1.0), K)  # (K,)
                entry[name] = 1 + rates.sum().item()
            recent.appendleft(fresh[0])
            entry.update({k: v for k, v in train_rl.learn(model, optimizer, r, cfg).items() if k in ("solved", "length")})

            now = [[(lesson, *read(model, lesson.text)) for lesson in lessons] for lessons in (fresh, recent)]
            after = now[0][0][2]  # (n, T, V)
            moved = sparse_rl.token_logp(after[:, :-1], text[:, 1:]) - sparse_rl.token_logp(z[:, :-1], text[:, 1:])
            entry["eta"] = train_rl.weights_of(fresh[0].advantage, (moved * mask[:, 1:]).sum(-1))[1].item()
            for name, arm in ARMS.items():
                for lesson in now[0][: arm.all] + now[1][1 : arm.replay]:
                    loss_of(arm, modules[name], model, *lesson, K).backward()
                    torch.nn.utils.clip_grad_norm_(modules[name].parameters(), 1.0)
                    pupils[name].step()
                    pupils[name].zero_grad(set_to_none=True)
            if step + 1 == given.steps:
                entry.update(on_fixed_texts(modules, model, *fixed, K, entropy))
            out.write(json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in entry.items()}) + "\n")
            if step % 10 == 9:
                left = (time.time() - start) / (step + 1) * (given.steps - step - 1)
                print(f"step {step + 1} | solved {entry['solved']:.2f} | entropy {entry['entropy']:.4f} | frozen {entry['frozen']:.2f} | "
                      f"e2e {entry['e2e']:.2f} | eta {left / 60:.1f} min", flush=True)  # fmt: skip


def table(files):
    """Means over the runs of each task; against e2e the mean difference and its standard error over runs."""
    tasks = collections.defaultdict(list)  # its runs, each a list of entries
    for file in files:
        lines = [json.loads(line) for line in open(file)]
        for seed in sorted({e["seed"] for e in lines}):
            for name in sorted({e["task"] for e in lines}):
                some = [e for e in lines if (e["task"], e["seed"]) == (name, seed)]
                if some:
                    tasks[name].append(some)
    mean = lambda entries, key: sum(e.get(key, float("nan")) for e in entries) / len(entries)
    for name, of in tasks.items():
        average = lambda runs, part, key: sum(mean(e[part], key) for e in runs) / len(runs)
        first, last, whole = slice(10), slice(-10, None), slice(None)
        change = lambda key, form: " -> ".join(format(average(of, part, key), form) for part in (first, last))
        print(f"\n{name}, {len(of)} seeds, {len(of[0])} steps. entropy {change('entropy', '.4f')}, solved {change('solved', '.2f')}, "
              f"eta {change('eta', '.3f')}")  # fmt: skip
        print("| arm | seeds | first 10 | all | last 10 | last 10, against e2e | texts of step 0 | the same, tempered |\n" + "|---" * 8 + "|")
        for arm in ("frozen", *ARMS):
            runs = [e for e in of if arm in e[0]]
            if not runs:
                continue
            gaps = torch.tensor([mean(e[-10:], arm) - mean(e[-10:], "e2e") for e in runs])
            error = gaps.std().item() / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
            ends = [e[-1] for e in runs]
            print(f"| {arm} | {len(runs)} | {average(runs, first, arm):.2f} | {average(runs, whole, arm):.2f} | {average(runs, last, arm):.2f} | {gaps.mean():+.3f} ± {error:.3f} "
                  f"| {mean(ends, 'fixed ' + arm):.2f} | {mean(ends, 'tempered ' + arm):.2f} |")  # fmt: skip
        starts = [e[0] for e in of]
        print(f"| (step 0) | | | | | | {mean(starts, 'fixed frozen'):.2f} | {mean(starts, 'tempered frozen'):.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", nargs="+")
    parser.add_argument("--out", default="out/shadow.jsonl")
    parser.add_argument("--task", default="sums", choices=train_rl.TASKS)
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--depths", type=int, default=8)
    parser.add_argument("--equip-steps", type=int, default=600)
    parser.add_argument("--warm", default="")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    if given.table:
        return table(given.table)
    run(given)


if __name__ == "__main__":
    main()
