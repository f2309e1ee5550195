"""Tokens per second of training, by preset, attention and context, and what the GPU does meanwhile.

    python results/throughput.py [--preset 340m] [--contexts 8192 32768] [--kinds gqa nsa asa] [--tokens 65536] [--eager]

Random bytes, 65,536 tokens a step in one pass, as the preset has them at 8k, AdamW and clipping included, --recompute as the preset has
it. The passes are one CUDA graph, as in train_lm.py; with --eager they are launched kernel by kernel. A step takes about as long as the
larger of two: the host's time to launch it, the GPU's to do it. The share of the matmul rate counts 6 products per weight and token, not
attention nor recomputation, over 790 TFLOP/s (bf16, measured on an H200).
"""
import argparse
import pathlib
import statistics
import sys
import time

import torch
import torch.nn as nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from mtp import Captured  # noqa: E402
from train_lm import LM, PRESETS, Config, make_optimizer, objective  # noqa: E402

# a kernel's name -> what it is for; the first that fits
KINDS = {"attention": ("flash", "fmha", "cudnn_generated", "forward_kernel", "dq_kernel", "dkv_kernel", "sum_kernel"),
         "choosing blocks": ("score_kernel", "choose_kernel", "sort", "Sort", "searchsorted", "scan"),
         "rope, gates": ("rope_kernel", "mix_kernel"), "norms, SwiGLU": ("norm_kernel", "swiglu_kernel"),
         "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas"), "optimizer": ("multi_tensor", "Adam")}  # fmt: skip


def measure(cfg, tokens, eager, steps=6):
    """-> seconds of a step and of its launches (medians), weights, GiB allocated and reserved at the peak, {kind: seconds of the GPU}."""
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    model = LM(cfg).cuda()
    optimizer = make_optimizer(cfg, model, fused=True)
    x = torch.randint(256, (tokens // cfg.context, cfg.context + 1), device="cuda")
    weight = torch.ones_like(x[:, 1:], dtype=torch.float32)

    def passes(x, weight):
        with torch.autocast("cuda", torch.bfloat16):
            loss, parts = objective(model, x[:, :-1], x[:, 1:], weight)
        loss.backward()
        return parts

    run = passes if eager else Captured(passes, optimizer.zero_grad)

    def step():
        start = time.time()
        if eager:
            optimizer.zero_grad()
        run(x, weight)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        launched.append(time.time() - start)
        torch.cuda.synchronize()
        times.append(time.time() - start)

    times = []
    launched = []
    for _ in range(3 + steps):  # two to warm up, one to capture
        step()
    peak = [most / 2**30 for most in (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())]
    found = [statistics.median(some[3:]) for some in (times, launched)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    spent = {}
    for e in profile.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(n in e.key for n in names)), "the rest")
        spent[kind] = spent.get(kind, 0) + e.self_device_time_total / 1e6
    return *found, sum(p.numel() for p in model.parameters()), peak, spent


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", default="340m", choices=list(PRESETS))
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--kinds", nargs="+", default=["gqa", "nsa", "asa"])
    parser.add_argument("--tokens", type=int, default=65536, help="of a step, in one pass")
    parser.add_argument("--eager", action="store_true", help="launch kernel by kernel")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    torch.set_float32_matmul_precision("high")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {given.preset}, {given.tokens} tokens a step, "
          f"{'kernel by kernel' if given.eager else 'one CUDA graph'}, median of 6 steps")
    for context in given.contexts:
        tokens = max(context, given.tokens)
        for attn in given.kinds:
            cfg = Config(**{**PRESETS[given.preset], "preset": given.preset, "attn": attn, "context": context, "vocab": 257})
            seconds, host, weights, peak, spent = measure(cfg, tokens, given.eager)
            rate = 6 * weights * tokens / seconds / 790e12
            gpu = sum(spent.values())
            most = ", ".join(f"{kind} {x / gpu:.0%}" for kind, x in sorted(spent.items(), key=lambda x: -x[1]))
            print(f"{context:6} {attn}: {tokens / seconds:9,.0f} tokens/s, {rate:.0%} of the matmul rate, {peak[0]:.1f} GiB, {peak[1]:.1f} reserved; a step "
                  f"{1e3 * seconds:.0f} ms, to launch {1e3 * host:.0f}, GPU {1e3 * gpu:.0f}: {most}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
