"""Decoding, launch by launch, of several versions of kernels.py side by side: one H100/H200, one process, under a minute.

    python decode_bench.py [PATH-of-worktree ...]     default: VARIANTS below; "git:REV" takes kernels.py of that commit of the current repository
    python decode_bench.py --quick ...                batches 1 and 64 only; --all: NSA, ASA local and dense as well (about 30 s more)

For each shape, batch and version: the whole step (CUDA graph of 10 repeats, median), its launches (profiler, mean over repeats), and that
outputs and lists are those of the first version. `attention` of ASA global = decode_blocks + decode_attention of the lists.
"""
import importlib.util, os, subprocess, sys, tempfile, time

import torch
import triton

VARIANTS = [".", "../decode"]
S, BATCHES, BANDWIDTH = 65536, (1, 4, 16, 64), 4.3e12


def load(path, i):
    if path.startswith("git:"):
        text = subprocess.run(["git", "show", f"{path[4:]}:kernels.py"], capture_output=True, text=True, check=True).stdout
        path = tempfile.mkdtemp() + "/kernels.py"
        open(path, "w").write(text)
    path = path if path.endswith(".py") else os.path.join(path, "kernels.py")
    spec = importlib.util.spec_from_file_location(f"kernels_{i}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Cache:
    """As much of a SlotCache as kernels.py reads: slots at positions first, first + stride, ..."""
    def __init__(self, B, heads, slots, first=0, stride=1):
        at = torch.arange(slots, device="cuda", dtype=torch.int32) * stride + first
        self.pos = at.expand(B, heads, slots).contiguous()
        self.length = torch.full((B,), slots, device="cuda", dtype=torch.int64)


def in_graph(f, repeats=10):
    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            f()
    ms = triton.testing.do_bench(graph.replay, warmup=5, rep=25, return_mode="median") / repeats
    return ms * 1e3


def launches(f, repeats=5):
    """[(name, microseconds)] in the order of the launches of one f()."""
    from torch.profiler import ProfilerActivity, profile
    f()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(repeats):
            f()
        torch.cuda.synchronize()
    events = sorted((e for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA), key=lambda e: e.time_range.start)
    events = [e for e in events if "kernel" in e.name]  # Triton's are called ..._kernel; torch's fills are not part of the step
    each = len(events) // repeats
    if not each or len(events) % repeats:
        return [("profiler saw %d" % len(events), float("nan"))]
    took = lambda e: e.time_range.end - e.time_range.start
    return [(events[i].name.replace("_kernel", ""), sum(took(events[r * each + i]) for r in range(repeats)) / repeats) for i in range(each)]


@torch.no_grad()
def main(argv):
    began = time.time()
    quick, paths = "--quick" in argv, [a for a in argv if not a.startswith("--")] or VARIANTS
    modules = [load(p, i) for i, p in enumerate(paths)]
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    for i, p in enumerate(paths):
        print(f"  [{i}] {p}")
    new = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    for H, G, D in ((64, 4, 128), (16, 4, 64)):
        P, R = D // 2, 2 * D - D // 2 // G
        for B in (1, 64) if quick else BATCHES:
            torch.manual_seed(0)
            pos, tokens = torch.full((B, 1), S - 1, device="cuda"), Cache(B, G, S)

            def steps(kind):
                """name -> f(module) -> outputs to compare"""
                if kind == "asa global":
                    c, k_r, c_b, r_b, q = new(B, G, S, R), new(B, 1, S, P), new(B, G, S // 16, R), new(B, 1, S // 16, P), new(B, H, 1, R + P)
                    entries, sizes, scale = Cache(B, G, S // 16, 15, 16), (16, 16, 16, 128), 0.5 * (R + P) ** -0.5
                    floor = (c_b.nbytes + r_b.nbytes + B * G * 128 * 16 * (R + P) * 2 + B * G * S // 16 * 4 + 2 * B * H * S // 16 * 4) / BANDWIDTH
                    v, v_b = c, c_b
                elif kind == "nsa":
                    N = (S - 32) // 16 + 1
                    c, v, k_r, c_b, v_b, r_b, q = new(B, G, S, D), new(B, G, S, D), None, new(B, G, N, D), new(B, G, N, D), None, new(B, H, 1, D)
                    entries, sizes, scale = Cache(B, G, N, 31, 16), (32, 16, 64, 16), D**-0.5
                    floor = (c_b.nbytes * 2 + B * G * 1024 * D * 4 + 2 * B * H * N * 4) / BANDWIDTH
                elif kind == "asa local":
                    ring, local, k_r, q = Cache(B, 1, 512, S - 512), new(B, 1, 512, 4 * D), new(B, 1, 512, P), new(B, H, 1, 4 * D + P)
                    floor = (local.nbytes + k_r.nbytes) / BANDWIDTH
                    return lambda m: (m.decode_attention(q, local, local, pos, ring.pos, ring.length, (5 * D) ** -0.5, 512, k_r),), floor
                else:  # dense
                    k, v, q = new(B, G, S, D), new(B, G, S, D), new(B, H, 1, D)
                    return (lambda m: (m.decode_attention(q, k, v, pos, tokens.pos, tokens.length, D**-0.5),)), 2 * k.nbytes / BANDWIDTH

                def run(m):
                    o, lists = m.decode_blocks(q, c_b, v_b if v is not c else c_b, pos, entries, S, *sizes, scale, r_b)
                    o2 = m.decode_attention(q, c, v, pos, tokens.pos, tokens.length, scale, k2=k_r, lists=lists, block=sizes[2])
                    return o, o2, lists
                return run, floor

            for kind in ("asa global",) + (("nsa", "asa local", "dense") if "--all" in argv and B in (1, 64) else ()):
                try:
                    f, floor = steps(kind)
                except torch.OutOfMemoryError:
                    print(f"{kind}: out of memory at batch {B}")
                    continue
                first = None
                for i, m in enumerate(modules):
                    try:
                        got = f(m)
                        first = first or got
                        diff = max((a.float() - b.float()).abs().max().item() for a, b in zip(got[:2], first[:2]) if a.is_floating_point())
                        lists = ""
                        if len(got) == 3:
                            a, b = got[2].sort(-1).values, first[2].sort(-1).values
                            lists = f" lists differ {(a != b).any(-1).sum().item()}/{a[..., 0].numel()}"
                        us, parts = in_graph(lambda: f(m)), launches(lambda: f(m))
                        print(f"{kind:10} {H} heads batch {B:2} [{i}] {us:7.1f} us ({floor * 1e6 / us:4.0%} of bytes)  "
                              + "  ".join(f"{n} {t:.1f}" for n, t in parts) + f"   diff {diff:.0e}{lists}", flush=True)
                    except Exception as e:
                        print(f"{kind} {H} heads batch {B} [{i}] FAILED {type(e).__name__}: {str(e)[:300]}", flush=True)
                del f, first
                got = None
                torch.cuda.empty_cache()
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
