"""Development only: python3 dev_gpu.py SHAPE...: compile all variants in parallel beside the tests, then time every kernel."""
import os, sys, subprocess, time, traceback
import torch, triton
import kernels, nsa

SH = {  # H G D Dv P shared l d block n W every
    "A": (64, 4, 128, 128, 0, 0, 32, 16, 64, 16, 512, 1),
    "B": (16, 4, 64, 64, 0, 0, 32, 16, 64, 16, 512, 1),
    "C": (16, 4, 120, 120, 32, 1, 16, 16, 16, 128, 512, 4),
    "E": (64, 4, 240, 240, 64, 1, 16, 16, 16, 128, 512, 4),
    "L": (16, 16, 64, 64, 32, 0, 32, 16, 64, 16, 512, 1),
    "M": (64, 64, 128, 128, 64, 0, 32, 16, 64, 16, 512, 1),
}
NVAR = 4
narrow, middle, wide = "BL", "ACM", "E"
DQ = {"B": [(128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 3), (64, 128, 4, 2)], "A": [(128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 3), (64, 64, 4, 3)],
      "E": [(64, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2), (128, 32, 8, 2)]}
DKV = {"B": [(64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (32, 128, 8, 3)], "A": [(64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (32, 128, 8, 3)],
       "E": [(64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 4, 3), (32, 64, 4, 2)]}
DQ.update(L=DQ["B"], C=DQ["A"], M=DQ["A"]); DKV.update(L=DKV["B"], C=DKV["A"], M=DKV["A"])
SC = {"A": [(128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2), (64, 64, 4, 2)], "E": [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (128, 128, 8, 2)]}
LF = {"A": [(16, 2, 3), (16, 4, 3), (16, 4, 2), (16, 2, 2)], "B": [(16, 1, 3), (16, 2, 3), (16, 1, 2), (16, 2, 2)],
      "C": [(16, 2, 3), (16, 1, 3), (16, 1, 4), (16, 1, 2)], "E": [(64, 4, 3), (64, 8, 3), (64, 4, 4), (64, 4, 2)]}
LQ = {**LF, "E": [(64, 8, 3), (64, 8, 2), (64, 4, 2), (64, 8, 4)]}
LK = {"A": [(16, 4, 3), (16, 4, 4), (64, 8, 2), (32, 4, 2)], "B": [(64, 4, 2), (64, 4, 3), (64, 8, 2), (32, 4, 2)],
      "C": [(16, 2, 3), (16, 1, 3), (64, 4, 2), (16, 1, 2)], "E": [(64, 4, 2), (64, 8, 2), (64, 4, 3), (64, 2, 2)]}
VAR, SHAPE = 0, "A"
default = kernels.tile
def tile(kind, rows, width, dtype, block=0):
    if rows:
        BM, w, s = {"forward": LF, "dq": LQ, "dkv": LK}[kind][SHAPE][VAR]
        return BM, block, w, s
    if kind == "forward": return default(kind, rows, width, dtype, block)
    if kind == "scores": return SC["E" if SHAPE == "E" else "A"][VAR]
    return (DQ if kind == "dq" else DKV)[SHAPE][VAR]

def make(shape, T):
    H, G, D, Dv, P, shared, l, d, block, n, W, every = SH[shape]
    torch.manual_seed(0)
    r = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    def kv(S):
        k, k2 = r(1, G, S, D), r(1, 1, S, P) if P else None
        return k, k2, (k if shared else r(1, G, S, Dv))
    return r(1, H, T, D + P), kv(T), kv((T - l) // d + 1)

TIMES = {}
class Timed:
    def __init__(self, name, fn): self.name, self.fn = name, fn
    def __getitem__(self, grid):
        def go(*a, **k):
            x, y = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            x.record()
            try: self.fn[grid](*a, **k)
            except Exception as e: TIMES.setdefault((BRANCH, self.name), []).append((type(e).__name__ + " " + str(e))[:60]); return
            y.record(); TIMES.setdefault((BRANCH, self.name), []).append((x, y))
        return go
BRANCH = ""
def instrument():
    for name in ("forward", "dq", "dkv", "sum", "score", "select", "mix", "unmix"):
        setattr(kernels, name + "_kernel", Timed(name, getattr(kernels, name + "_kernel")))

def run(shape, T, reps):
    global BRANCH
    H, G, D, Dv, P, shared, l, d, block, n, W, every = SH[shape]
    q, (k, k2, v), (kc, k2c, vc) = make(shape, T)
    scale, do = (D + P) ** -.5, torch.randn(1, H, T, Dv, device="cuda", dtype=torch.bfloat16)
    xs = lambda k, k2, v: [x for x in (q, k, k2, None if v is k else v) if x is not None]
    def both(name, f, leaves):
        global BRANCH
        BRANCH = name
        for _ in range(reps):
            o = f(); torch.autograd.grad(o, leaves, do)
    both("win", lambda: kernels.window_attention(q, k, v, W, scale, k2), xs(k, k2, v))
    if shape in "LM": return
    both("cmp", lambda: kernels.compressed_attention(q, kc, vc, l, d, scale, k2c)[0], xs(kc, k2c, vc))
    with torch.no_grad(): lse = kernels.compressed_attention(q, kc, vc, l, d, scale, k2c)[1]
    BRANCH = "top"
    for _ in range(reps): lists = kernels.select(q, kc, lse, l, d, block, n, scale, k2c, every)
    both("sel", lambda: kernels.selected_attention(q, k, v, lists, block, scale, k2, every), xs(k, k2, v))
    if VAR == 0:
        o = [torch.randn(1, H, T, Dv, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2 if shared else 3)]
        g = torch.rand(1, T, len(o) * H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        both("mix", lambda: kernels.mix(g, *o), [g, *o])

if __name__ == "__main__":
    if sys.argv[1] == "compile":
        SHAPE, VAR, kernels.tile = sys.argv[2][0], int(sys.argv[2][1:]), tile
        instrument(); run(SHAPE, 2048, 1); sys.exit()
    began = time.time()
    procs = [subprocess.Popen([sys.executable, __file__, "compile", f"{s}{i}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
             for s in sys.argv[1:] for i in range(NVAR)]
    tests = [subprocess.Popen([sys.executable, "test_all.py", "-k", t], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
             for t in ("kernels_compiled", "selection_kernels", "decode_attention", "layers_on_kernels")]
    for p in procs: p.wait()
    for p in tests: print(p.communicate()[0][-700:].strip(), flush=True)
    print(f"compiled, tested in {time.time() - began:.0f} s", torch.cuda.get_device_name(), flush=True)
    kernels.tile = tile
    instrument()
    table = {}
    for SHAPE in sys.argv[1:]:
        for VAR in range(NVAR):
            TIMES.clear()
            try: run(SHAPE, 65536, 2)
            except Exception as e: print(SHAPE, VAR, "FAILED", str(e)[-200:])
            torch.cuda.synchronize()
            for key, events in TIMES.items():
                bad = [e for e in events if isinstance(e, str)]
                if bad: value = bad[0][:30]
                elif key[1] in ("score", "select"): value = f"{sum(x.elapsed_time(y) for x, y in events) / 2:.2f}"
                else: value = f"{min(x.elapsed_time(y) for x, y in events):.2f}"
                table.setdefault((SHAPE, *key), {})[VAR] = value
    for key, row in table.items(): print(" ".join(f"{x:7}" for x in key), *(f"{row.get(v, '-'):>8}" for v in range(NVAR)), flush=True)
    print(f"total {time.time() - began:.0f} s")
