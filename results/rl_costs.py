"""Seconds that a step of RL takes with each correction, one arm after the other, nothing else on the GPU.

    python results/rl_costs.py --warm out/sums [--out out/costs.jsonl] [-- options of train_rl.py]

`none` runs first, so that no other arm pays for what a process does once, then again after the others, to tell how far two runs of one arm
lie apart. Medians of the steps but the first two.
"""
import argparse
import contextlib
import io
import json
import pathlib
import statistics
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import train_rl  # noqa: E402
from side_by_side import divided, logged  # noqa: E402

ARMS = "none none dense both released center center_tis twin center_twin answer replay none".split()


def main():
    own, extra = divided()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/costs.jsonl"), help="the file")
    parser.add_argument("--warm", required=True, help="a run whose warm start is taken")
    parser.add_argument("--steps", type=int, default=14, help="of each arm")
    given = parser.parse_args(own)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, open(given.out, "w", buffering=1) as out:
        for order, arm in enumerate(ARMS):
            how = ["--rollout", "dense"] if arm == "dense" else ["--correct", arm]
            words = ["--out", folder, "--name", order, "--warm", given.warm, "--steps", given.steps, "--eval-every", given.steps, *how, *extra]
            with contextlib.redirect_stdout(io.StringIO()):
                if code := train_rl.main([str(word) for word in words]):
                    return code
            steps = [e for e in logged(pathlib.Path(folder, str(order), "log.jsonl")) if "rollout_s" in e][2:]
            middle = {name: round(statistics.median(e[name] for e in steps), 4) for name in ("seconds", "rollout_s")}
            learn = round(statistics.median(e["seconds"] - e["rollout_s"] for e in steps), 4)
            out.write(json.dumps({"order": order, "arm": arm, "steps": len(steps), **middle, "learn_s": learn}) + "\n")
            print(f"{arm:12} {middle['seconds']:.3f} s a step, of them the learner's {learn:.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
