"""How far apart losses are when a batch is cut into other passes: `python results/cut_batches.py`, on a CPU.

Two processes that took every second row of a batch had passes of other rows than one process. Here one process puts the rows in that
order. bf16 is autocast, as on a GPU; the second run of the same order is the control.
"""
import argparse
import contextlib
import io
import json
import pathlib
import statistics
import sys
import tempfile

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import train_lm  # noqa: E402

OPTIONS = "--small --device cpu --grow 0 --batch 8 --micro 4 --steps 20 --eval-every 100 --save-every 1000".split()
BATCH = train_lm.Data.batch
AUTOCAST = torch.autocast


def by_second_rows(data, step, own=range):
    return [torch.cat([x[::2], x[1::2]]) for x in BATCH(data, step, own)]  # (N, T) each


def on_a_cpu(device, dtype=torch.bfloat16, enabled=True):
    """torch.autocast, which train_lm.py asks for on a GPU only."""
    return AUTOCAST("cpu", dtype, enabled=enabled or device == "cuda")


def losses(kind, rate, bf16, batch):
    """-> the loss of each step."""
    torch.autocast = on_a_cpu if bf16 else AUTOCAST
    train_lm.Data.batch = batch
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()):
        code = train_lm.main([*OPTIONS, "--attn", kind, "--lr", rate, "--out", tmp, "--name", "run"])
        if code:
            sys.exit(code)
        entries = [json.loads(line) for line in open(pathlib.Path(tmp, "run", "log.jsonl"))]
    return [e["loss"] for e in entries if "loss" in e]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    print("rate  kind  numbers  rows of a pass   median  largest, at step")
    for rate in ("3e-3", "1e-2"):
        for kind in ("gqa", "asa"):
            for bf16 in (False, True):
                first = losses(kind, rate, bf16, BATCH)
                for what, batch in (("the same again", BATCH), ("others", by_second_rows)):
                    apart = [abs(a - b) for a, b in zip(first, losses(kind, rate, bf16, batch))]
                    numbers = f"{statistics.median(apart):.5f}  {max(apart):.5f}, {apart.index(max(apart)) + 1}"
                    print(f"{rate}  {kind:5} {'bf16' if bf16 else 'fp32':7}  {what:15}  {numbers}", flush=True)
