"""Compiles every kernel for an H100 on a machine without a GPU: `python results/compile_kernels.py`, 4 minutes on a core.

The interpreter, in which the tests run on a CPU, forgives what the compiler does not: a name whose type changes in a loop, a type that has
no such product. Here a training step and a decoding step of each kind of attention call their kernels as on a GPU, and Triton compiles
them down to machine code and runs none. So the numbers mean nothing. Triton's driver is replaced by one that knows no more than the target.
"""
import argparse
import collections
import pathlib
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import kernels  # noqa: E402
from train_lm import LM, Config  # noqa: E402

compiled = collections.Counter()


class Nothing:
    """What Triton asks of a driver before it launches, which it never does here."""

    launcher_cls = lambda *args: None

    class utils:
        load_binary = staticmethod(lambda *args: (0, 0, 0, 0, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132})

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def only_compiled(run):
    def compile(kernel, *args, grid, warmup=False, **options):
        run(kernel, *args, grid=grid, warmup=True, **options)
        compiled[kernel.__name__] += 1

    return compile


def steps(attn, dtype, **more):
    """A training step, then a decoding step of 1 and of 3 tokens."""
    model = LM(Config(attn=attn, layers=2, width=512, groups=2, context=512, vocab=257, **more)).to(dtype)
    tokens = torch.randint(256, (2, 512))
    model(tokens).float().sum().backward()
    with torch.no_grad():
        cache = model.new_cache(2, 512)
        for count in (1, 3):
            model(tokens[:, :count], cache)


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    driver.set_active(Nothing())
    jit.JITFunction.run = only_compiled(jit.JITFunction.run)
    kernels.usable = lambda x: x.dtype != torch.float64
    for attn, dtype, heads in (
        ("asa", torch.bfloat16, 32),  # 64 rows read a list
        ("asa", torch.float32, 8),
        ("nsa", torch.bfloat16, 8),
    ):
        steps(attn, dtype, heads=heads)
        print(f"{attn}, {heads} heads, {dtype}: compiled", flush=True)
    kinds = [name for name, f in vars(kernels).items() if isinstance(f, jit.JITFunction) and name.endswith("_kernel")]
    missing = sorted(set(kinds) - set(compiled))
    print(f"{len(kinds) - len(missing)} of {len(kinds)} kernels" + (f"; not called: {', '.join(missing)}" if missing else ""))
    return len(missing)


if __name__ == "__main__":
    sys.exit(main())
