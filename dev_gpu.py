"""Development only: python3 dev_gpu.py {check,time} SHAPE... ; compile in parallel first."""
import os, sys, subprocess, time, traceback
import torch, triton
import kernels, nsa
from latent_attention import attend, visible

SH = {  # H G D Dv P shared l d block n W every
    "A": (64, 4, 128, 128, 0, 0, 32, 16, 64, 16, 512, 1),
    "B": (16, 4, 64, 64, 0, 0, 32, 16, 64, 16, 512, 1),
    "C": (16, 4, 120, 120, 32, 1, 16, 16, 16, 128, 512, 4),
    "E": (64, 4, 240, 240, 64, 1, 16, 16, 16, 128, 512, 4),
    "L": (16, 16, 64, 64, 32, 0, 32, 16, 64, 16, 512, 1),   # local MLA of C
    "M": (64, 64, 128, 128, 64, 0, 32, 16, 64, 16, 512, 1),  # local MLA of E
}
V = {  # variants: range kinds and listed kinds
    "forward": [(128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 4, 2)],
    "dq": [(128, 64, 8, 2), (64, 64, 4, 2), (64, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)],
    "dkv": [(64, 128, 8, 2), (64, 64, 4, 2), (128, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 3)],
    "scores": [(64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 3), (128, 128, 8, 3), (64, 64, 4, 2)],
    "forward*": [(16, 64, 4, 3), (16, 64, 2, 3), (16, 64, 1, 3), (16, 128, 4, 2), (16, 32, 1, 4)],
    "dq*": [(16, 64, 4, 2), (16, 64, 2, 3), (16, 64, 1, 2), (16, 128, 4, 2), (16, 64, 4, 3)],
    "dkv*": [(64, 64, 4, 2), (128, 64, 4, 2), (64, 64, 2, 2), (128, 64, 8, 2), (32, 64, 2, 3)],
}
VAR = 0
def tile(kind, rows, width, dtype):
    c = list(V[kind + ("*" if rows else "")]); c = c[VAR % len(c)]
    if width > 192:  # what fits
        if kind == "forward" and not rows: c = [(128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3), (64, 64, 8, 2), (128, 32, 8, 2)][VAR]
        if kind == "dq" and not rows: c = [(64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)][VAR]
        if kind == "dkv" and not rows: c = [(64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 4, 2), (64, 64, 8, 1), (64, 32, 4, 2)][VAR]
    BM, BN, w, s = c
    return (max(BM, rows) if kind == "dkv" or not rows else max(rows, 16)), BN, w, s

def make(shape, T, smooth=0.0, dtype=torch.bfloat16):
    H, G, D, Dv, P, shared, l, d, block, n, W, every = SH[shape]
    torch.manual_seed(0)
    def r(*s):
        x = torch.randn(*s, device="cuda", dtype=dtype)
        if smooth:
            y = torch.randn(*s[:2], -(-s[2] // 64), s[3], device="cuda", dtype=dtype).repeat_interleave(64, 2)[:, :, :s[2]]
            x = (smooth ** .5 * y + (1 - smooth) ** .5 * x) * 1.5
        return x.requires_grad_()
    S = int(nsa.blocks_done(T, l, d))
    def kv(S):
        k, k2 = r(1, G, S, D), r(1, 1, S, P) if P else None
        return k, k2, (k if shared else r(1, G, S, Dv))
    return r(1, H, T, D + P), kv(T), kv(S)

def prof(fn, reps=3):
    fn(); torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(reps): fn()
        torch.cuda.synchronize()
    out = {}
    for e in p.key_averages():
        t = getattr(e, "device_time_total", 0) / 1000 / reps
        if t > 0.005:
            name = e.key if e.key.endswith("_kernel") and len(e.key) < 20 else "torch"
            out[name] = out.get(name, 0) + t
    return out

def xs_of(q, k, k2, v): return [x for x in (q, k, k2, None if v is k else v) if x is not None]

def run(shape, T, together=1, smooth=0.0, only=("win", "cmp", "sel"), prof_=prof):
    H, G, D, Dv, P, shared, l, d, block, n, W, every = SH[shape]
    q, kvt, kvs = make(shape, T, smooth)
    scale, res = (D + P) ** -.5, {}
    do = torch.randn(1, H, T, Dv, device="cuda", dtype=torch.bfloat16)
    def both(name, f, xs):
        try:
            res[name + " f"] = prof_(lambda: f())
            o = f(); o = o[0] if isinstance(o, tuple) else o
            res[name + " b"] = prof_(lambda: torch.autograd.grad(o, xs, do, retain_graph=True))
        except Exception as e:
            res[name + " !"] = {(type(e).__name__ + " " + str(e))[:150].replace("\n", " "): 0}
    k, k2, v = kvt
    if "win" in only: both("win", lambda: kernels.window_attention(q, k, v, W, scale, k2), xs_of(q, k, k2, v))
    if shape in "LM": return res
    kc, k2c, vc = kvs
    if "cmp" in only: both("cmp", lambda: kernels.compressed_attention(q, kc, vc, l, d, scale, k2c), xs_of(q, kc, k2c, vc))
    with torch.no_grad(): _, lse = kernels.compressed_attention(q, kc, vc, l, d, scale, k2c)
    sel = lambda: kernels.select(q, kc, lse, l, d, block, n, scale, k2c, every)
    if "cmp" in only:
        try: res["top f"] = prof_(sel)
        except Exception as e: res["top !"] = {str(e)[:150]: 0}
    lists = sel()
    if "sel" in only:
        for tg in (together if isinstance(together, tuple) else (together,)):
            words = kernels.unite(lists, tg)
            res[f"fill{tg}"] = {"words/lists": (words >= 0).sum().item() / (lists >= 0).sum().item()}
            both(f"sel{tg}", lambda: kernels.selected_attention(q, k, v, lists, block, scale, k2, every, tg), xs_of(q, k, k2, v))
    return res

def show(title, res):
    for branch, t in res.items():
        print(f"{title:14} {branch:7} {sum(t.values()):8.3f} | " + " ".join(f"{a.replace('_kernel','')} {b:.3f}" for a, b in t.items()), flush=True)

def err(a, b): return ((a.double() - b).norm() / b.norm().clamp(min=1e-12)).item()

def check(shape, T=1040):
    H, G, D, Dv, P, shared, l, d, block, n, W, every = SH[shape]
    n = min(n, 12)
    q, kvt, kvs = make(shape, T)
    scale, pos = (D + P) ** -.5, torch.arange(T, device="cuda")[None]
    do = torch.randn(1, H, T, Dv, device="cuda", dtype=torch.bfloat16)
    join = lambda k, k2: k if k2 is None else torch.cat([k, k2.expand(-1, G, -1, -1)], -1)
    def three(name, ours, mask, kvx):
        xs = xs_of(q, *kvx)
        twice = []
        for _ in range(2):
            o = ours(); twice.append([o, *torch.autograd.grad(o, xs, do)])
        same = all(torch.equal(x, y) for x, y in zip(*twice))
        refs = []
        for t in (torch.float64, torch.bfloat16):
            x = [y.detach().to(t).requires_grad_() for y in xs]
            Q, K = x[:2]; K2 = x[2] if P else None; Vv = K if shared else x[-1]
            m = mask.clone(); m[..., 0] |= ~m.any(-1)
            o = attend(Q, join(K, K2), Vv, m, scale)
            o = o * mask.any(-1).repeat_interleave(H // mask.shape[1] if mask.shape[1] > 1 else 1, 1)[..., None]
            refs.append([o, *torch.autograd.grad(o, x, do.to(t))])
        r = [(err(a, b), err(c, b)) for a, b, c in zip(twice[0], refs[0], refs[1])]
        print(f"check {shape} {name}: bit-identical {same}; error ours/SDPA " + ", ".join(f"{a:.1e}/{b:.1e}={a/b:.2f}" for a, b in r), flush=True)
    k, k2, v = kvt
    three("win", lambda: kernels.window_attention(q, k, v, W, scale, k2), visible(pos, pos[:, None], W), kvt)
    if shape in "LM": return
    kc, k2c, vc = kvs
    end = (torch.arange(kc.shape[2], device="cuda") * d + l - 1)[None, None]
    see = visible(pos, end)
    three("cmp", lambda: kernels.compressed_attention(q, kc, vc, l, d, scale, k2c)[0], see, kvs)
    _, lse = kernels.compressed_attention(q, kc, vc, l, d, scale, k2c)
    lists = kernels.select(q, kc, lse, l, d, block, n, scale, k2c, every)
    _, p = nsa.compressed_attention(q.double(), join(kc, k2c).double(), vc.double(), see, scale)
    imp = nsa.block_importance(p, G, l, d, block, T)
    want = nsa.select_blocks(imp, pos, block, n)[:, :, ::every]
    at = lambda x: (imp[:, :, ::every].gather(-1, x.long().clamp(min=0)) * (x >= 0)).sum(-1)
    gap = (at(want) - at(lists)) / at(want).clamp(min=1e-9)
    print(f"check {shape} top: blocks differ {(lists.long().sort(-1)[0] != want.sort(-1)[0]).double().mean().item():.1e}, score lost {gap.max().item():.1e}; "
          f"identical {torch.equal(lists, kernels.select(q, kc, lse, l, d, block, n, scale, k2c, every))}", flush=True)
    rep = nsa.share_lists(lists.repeat_interleave(every, 2)[:, :, :T].long(), pos, every=every)
    mask = nsa.chosen_tokens(rep, pos[:, None], block, visible(pos, pos[:, None]))
    for tg in (1, 4 if n * 4 <= 128 and every == 1 else 2):
        three(f"sel{tg}", lambda: kernels.selected_attention(q, k, v, lists, block, scale, k2, every, tg), mask, kvt)

def guarded(f, *a, **b):
    try: return f(*a, **b)
    except Exception: print("FAILED", a, traceback.format_exc()[-600:], flush=True)

def compile_only(job):
    global VAR
    shape, VAR = job[0], int(job[1:])
    kernels.tile = tile
    noprof = lambda fn: fn() and {} or {}
    guarded(run, shape, 2048, (1, 4) if shape in "AB" else 1, 0.0, prof_=noprof)

if __name__ == "__main__":
    mode, args = sys.argv[1], sys.argv[2:]
    if mode == "compile": compile_only(args[0]); sys.exit()
    if mode == "check":
        for s in args: guarded(check, s)
    if mode == "time":
        variants = int(args[0]); began = time.time()
        procs = [subprocess.Popen([sys.executable, __file__, "compile", f"{s}{i}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                 for i in range(variants) for s in args[1:]]
        for p in procs: p.wait()
        print(f"compiled in {time.time() - began:.0f} s", torch.cuda.get_device_name(), flush=True)
        kernels.tile = tile
        for s in args[1:]:
            for VAR in range(variants):
                res = guarded(run, s, 65536, (1, 4) if s in "AB" else 1)
                show(f"{s} 64k var {VAR}", res or {})
            VAR = 0
            if s in "AB": show(f"{s} 64k smooth", guarded(run, s, 65536, (1, 2, 4), 0.8, only=("sel",)) or {})
        print(f"total {time.time() - began:.0f} s")
    if mode == "dense":
        import torch.nn.functional as F
        for name, H, G, D in (("A", 64, 4, 128), ("B", 16, 4, 64)):
            for T in (8192, 65536):
                q, k, v = (torch.randn(1, h, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (H, G, G))
                f = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                o = f(); do = torch.randn_like(o)
                print("dense", name, T, triton.testing.do_bench(f, 10, 100), triton.testing.do_bench(lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True), 10, 100), flush=True)
