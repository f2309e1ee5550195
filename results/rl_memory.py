"""Tokens per second of rollouts at equal memory for the cache, dense and compressed: the compressed cache has room for more rows.

    python results/rl_memory.py                       one GPU, about a minute: 28 M parameters, bf16, 64 given + 1024 new tokens
    python results/rl_memory.py --small               a CPU, half a minute

Weights are random: speed does not depend on them. Bytes are counted from the allocated caches, the peak from the allocator.
"""
import argparse
import json
import pathlib
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from mtp import Decoder  # noqa: E402
from sparse_rl import Compressor  # noqa: E402
from train_lm import LM, Config  # noqa: E402


def measure(model, rows, prompt, new, compress):
    """-> bytes of the cache, peak bytes above the weights, tokens per second."""
    cuda = model.embed.weight.is_cuda
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    decoder = Decoder(model, rows, prompt + new, compress=compress)
    prompts = list(torch.randint(model.cfg.vocab, (rows, prompt)))
    enough = 4 * decoder.SEGMENT + (compress.budget if compress else 0)  # tokens after which evictions have begun
    for _ in range(2):  # warm-up: of every shape the first call compiles, the second is captured as a graph
        decoder.generate(prompts, min(new, enough))
    start = time.perf_counter()
    decoder.generate(prompts, new)
    seconds = time.perf_counter() - start
    return decoder.cache.nbytes, torch.cuda.max_memory_allocated() - before if cuda else 0, rows * new / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--mib", type=int, nargs="+", help="limits of the cache's bytes")
    parser.add_argument("--new", type=int, default=1024)
    parser.add_argument("--budget", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--buffer", type=int, default=32)
    parser.add_argument("--most", type=int, default=4096, help="most rows")
    parser.add_argument("--out", help="a .jsonl file to append to")
    given = parser.parse_args()
    device, prompt = "cuda" if torch.cuda.is_available() else "cpu", 64
    sizes = dict(layers=2, width=64, heads=4, groups=2) if given.small else {}
    new = 256 if given.small else given.new
    model = LM(Config(attn="gqa", vocab=257, **sizes)).to(device).eval()
    model = model.bfloat16() if device == "cuda" else model
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {next(model.parameters()).dtype}, "
          f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}; {prompt} given + {new} new tokens\n")
    print(f"{'limit MiB':>9} {'cache':>14} {'rows':>5} {'cache MiB':>9} {'peak MiB':>9} {'tokens/s':>9} {'of dense':>8}")
    for mib in given.mib or ([4, 16] if given.small else [64, 256, 1024, 4096]):
        dense = None
        for budget in (None, *given.budget):
            compress = budget and Compressor("rkv", budget // 4 if given.small else budget, given.buffer)
            slots = compress.slots if compress else prompt + new + 1
            row = model.new_cache(1, slots, dtype=model.embed.weight.dtype, compress=compress).nbytes
            rows = min(given.most, mib * 2**20 // row)
            if not rows:
                continue
            cache, peak, speed = measure(model, rows, prompt, new, compress)
            dense = dense or speed
            name = f"R-KV {compress.budget}+{compress.buffer}" if compress else "dense"
            print(f"{mib:9} {name:>14} {rows:5} {cache / 2**20:9.1f} {peak / 2**20:9.1f} {speed:9.0f} {speed / dense:8.2f}", flush=True)
            if given.out:
                with open(given.out, "a") as f:
                    hardware = torch.cuda.get_device_name() if device == "cuda" else "CPU"
                    entry = dict(hardware=hardware, limit_mib=mib, cache=name, rows=rows, cache_bytes=cache, peak_bytes=peak,
                                 tokens_per_second=speed)  # fmt: skip
                    f.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
