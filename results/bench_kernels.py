"""Our attention beside torch's dense attention, on a GPU: layers in training, one decoding step, memory.

    python results/bench_kernels.py                  all of it, about 5 minutes on an H200
    python results/bench_kernels.py --only layers    or decoding, or memory
    python results/bench_kernels.py --lengths 8192 65536

Random data in bf16. Times of a layer are forward / backward, of its attention without the matrices around it,
then of its operations one by one. In brackets stands how much of a time two limits of the GPU explain; 100%
cannot be beaten: products at RATE, or every tensor read or written once at BANDWIDTH.
"""

import argparse
import pathlib
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import nsa  # noqa: E402
from latent_attention import LatentAttention, SlotCache, cached_attention, keys_of, window_attention  # noqa: E402

RATE = 790e12  # bf16 products per second and
BANDWIDTH = 4.3e12  # bytes per second, both measured on an H200
SHAPES = ((64, 4, 128), (16, 4, 64))  # heads H, groups G, head width D


class Timed:
    """Milliseconds of f() and, with leaves, of its backward pass; what is possible at best; the peak in bytes.

    A floor is the time that a perfect program needs: for the products (`flop` of the forward pass), or to
    move every tensor once.
    """

    def __init__(self, f, leaves=(), flop=0.0):
        from triton.testing import do_bench

        with torch.no_grad():
            o = f()
            self.ms = [do_bench(f, warmup=20, rep=100, return_mode="median")]
        o = o[0] if isinstance(o, tuple) else o
        moved = sum(x.nbytes for x in (*leaves, o))
        forward = (flop / RATE, moved / BANDWIDTH)
        backward = (2.5 * flop / RATE, 2 * moved / BANDWIDTH)  # 5 products, not 2
        self.floors = [forward, backward]
        if leaves:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            o = f()
            o = o[0] if isinstance(o, tuple) else o
            grad = torch.randn_like(o)
            run_back = lambda: torch.autograd.grad(o, leaves, grad, retain_graph=True)
            run_back()
            self.peak = torch.cuda.max_memory_allocated() - before
            self.ms.append(do_bench(run_back, warmup=20, rep=100, return_mode="median"))

    def __str__(self):
        """1.00 / 3.00 ms (products 60% / 50%, bytes 5% / 4%)"""
        share = lambda i: " / ".join(f"{floor[i] * 1e3 / ms:.0%}" for ms, floor in zip(self.ms, self.floors))
        times = " / ".join(f"{ms:.2f}" for ms in self.ms)
        return f"{times} ms (products {share(0)}, bytes {share(1)})"


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def by_token(heads, T, width):
    """(1, H, T, D), which lies in memory as (1, T, H, D), as a layer's matrices make it."""
    return torch.randn(1, T, heads, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()


def products(reads, heads, width):
    """FLOP of a forward pass in which query t reads reads[t] keys; width of a key and a value together."""
    return 2.0 * heads * width * reads.clamp(min=0).double().sum().item()


def local_layer(T, H, D, W=512):
    """-> {name: arguments of Timed} of an ASA local layer."""
    P = D // 2
    layer = LatentAttention(H * D, H, D, 1, 4 * D, P, window=W).cuda().bfloat16()
    layer.out = torch.nn.Identity()
    pos = torch.arange(T, device="cuda")[None]
    parts = (by_token(H, T, D + P), random(1, 1, T, 4 * D), random(1, 1, T, P))
    leaves = (by_token(H, T, D + P), by_token(H, T, D), by_token(H, T, D), random(1, 1, T, P))
    q, k, v, k_r = leaves
    keys = keys_of(None, pos, None, k, v, k_r)
    flop = products((torch.arange(T) + 1).clamp(max=W), H, 2 * D + P)
    return {
        "window": (lambda: window_attention(q, keys, W, layer.scale), leaves, flop),
        "layer": (lambda: layer.materialised(*parts, pos), parts),
    }


def global_layer(kind, T, H, G, D, W=512):
    """-> {name: arguments of Timed} of an NSA layer, or of an ASA global layer; lists are those that it chooses."""
    pos = torch.arange(T, device="cuda")[None]
    P = D // 2
    if kind == "nsa":
        layer = nsa.NSA(H * D, H, G, D, W, n=16).cuda().bfloat16()
        branches = 3
        width = 2 * D
        leaves = (by_token(H, T, D), *(random(1, G, T, D) for _ in range(6)))
        q, k0, v0, k1, v1, k_w, v_w = leaves
        raw = keys_of(None, pos, None, k0, v0)  # to be compressed
        tokens = keys_of(None, pos, None, k1, v1)
        nearby = keys_of(None, pos, None, k_w, v_w)
    else:
        R = D  # a latent is as wide as a head
        layer = nsa.ASAGlobal(H * D, H, D, G, R, P, n=128).cuda().bfloat16()
        branches = 2
        width = 2 * R + P
        leaves = (by_token(H, T, R + P), random(1, G, T, R), random(1, 1, T, P))
        q, c, k_r = leaves
        raw = tokens = keys_of(None, pos, None, c, k2=k_r)
    sizes = layer.sizes
    scale = layer.scale
    gates = random(1, T, branches * H)

    def whole():
        blocks = nsa.compressed_keys(layer.compress, raw, pos, sizes)
        o_cmp, lists = nsa.compressed_attention(q, pos, blocks, T, sizes, scale)
        o = [o_cmp, nsa.selected_attention(q, pos, tokens, lists, sizes, scale)]
        o += [window_attention(q, nearby, W, scale)] if kind == "nsa" else []
        return nsa.mix(gates, *o)

    blocks = nsa.compressed_keys(layer.compress, raw, pos, sizes)
    blocks = blocks._replace(
        **{
            n: x.detach().requires_grad_()
            for n, x in blocks._asdict().items()
            if n in "k v k2" and x is not None
        }
    )
    given = lambda keys: [x for x in (q, keys.k, keys.v, keys.k2) if x is not None]
    lists = nsa.compressed_attention(q, pos, blocks, T, sizes, scale)[1]
    t = torch.arange(T)
    done = (t + 1 - sizes.l + sizes.d) // sizes.d  # entries that a query reads
    chosen = (t + 1).clamp(max=sizes.n * sizes.block)
    o = [by_token(H, T, o_width(tokens)) for _ in range(branches)]
    what = {
        "compressed": (
            lambda: nsa.compressed_attention(
                q, pos, blocks, T, sizes, scale
            ),  # its choice of blocks included
            given(blocks),
            products(done, H, width) + products(done[:: sizes.share], H, q.shape[3]),
        ),
        "selected": (
            lambda: nsa.selected_attention(q, pos, tokens, lists, sizes, scale),
            given(tokens),
            products(chosen, H, width),
        ),
        "gates": (lambda: nsa.mix(gates, *o), (gates, *o)),
        "layer": (whole, (*leaves, gates)),
    }
    if kind == "nsa":
        flop = products((t + 1).clamp(max=W), H, width)
        what["window"] = (lambda: window_attention(q, nearby, W, scale), given(nearby), flop)
    return what


def o_width(keys):
    return (keys.k if keys.v is None else keys.v).shape[3]


KINDS = {
    "nsa": lambda T, H, G, D: global_layer("nsa", T, H, G, D),
    "asa local": lambda T, H, G, D: local_layer(T, H, D),
    "asa global": lambda T, H, G, D: global_layer("asa", T, H, G, D),
}


def bench_layers(lengths):
    print("\nLayers in training, one text; 2.0x / 1.5x: so many times as fast as dense, torch's SDPA")
    for H, G, D in SHAPES:
        for T in lengths:
            q, k, v = (random(1, heads, T, D) for heads in (H, G, G))
            sdpa = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            dense = Timed(sdpa, (q, k, v), 2.0 * H * T * (T + 1) * D)
            print(f"\n{T} tokens, {H} heads in {G} groups, width {D}\n  {'dense':10} {dense}")

            def line(forward, backward):
                times = f"{dense.ms[0] / forward:.2f}x / {dense.ms[1] / backward:.2f}x"
                return f"{forward:.2f} / {backward:.2f} ms, {times}"

            layers = {}
            for kind, make in KINDS.items():
                found = {name: Timed(*args) for name, args in make(T, H, G, D).items()}
                layers[kind] = found.pop("layer").ms
                print(f"  {kind:10} {line(*layers[kind])}")
                print("\n".join(f"    {name:10} {timed}" for name, timed in found.items()), flush=True)
            mean = [(a + b) / 2 for a, b in zip(layers["asa local"], layers["asa global"])]
            print(f"  {'asa, mean':10} {line(*mean)}")


def bench_memory(lengths=(16384, 32768, 65536, 131072, 262144), H=16, G=4, D=64):
    """What a layer needs beside its inputs, forward and backward: linear in T."""
    print(
        f"\nPeak memory of the attention of one layer in training, {H} heads in {G} groups, width {D}, bf16:"
    )
    print(f"MiB per 1024 tokens, at {', '.join(map(str, lengths))} tokens\n")
    for kind, make in KINDS.items():
        peaks = [Timed(*make(T, H, G, D)["layer"]).peak / 2**20 / (T / 1024) for T in lengths]
        print(f"  {kind:10} " + ", ".join(f"{peak:.2f}" for peak in peaks), flush=True)


def in_graph(f, repeats=10):
    """Milliseconds of f() inside a CUDA graph: without the time that launching takes."""
    from triton.testing import do_bench

    f()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            f()
    return do_bench(graph.replay, warmup=10, rep=50, return_mode="median") / repeats


def filled(B, heads, slots, first=0, stride=1):
    """Positions and lengths of a cache whose slots lie at first, first + stride, ..."""
    cache = SlotCache(B, slots, {"k": (heads, 1)}, device="cuda")
    cache.pos += torch.arange(slots, device="cuda", dtype=torch.int32) * stride + first + 1  # they were -1
    cache.length += slots
    return cache.pos, cache.length


@torch.no_grad()
def bench_decoding(S=65536, batches=(1, 4, 16, 64)):
    """The attention of one step, S tokens cached in every row: dense beside NSA and ASA."""
    from latent_attention import Keys

    print(
        f"\nAttention of one decoding step, one new token a row, {S} tokens cached: microseconds a layer, in a CUDA graph"
    )
    print(
        "dense: the faster of torch's and ours, beside the time to read its cache once; 2.0x: so many times as fast\n"
    )
    new = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    for H, G, D in SHAPES:
        for B in batches:
            P = D // 2
            W = 512
            R = D
            N = (S - 32) // 16 + 1  # entries of NSA; ASA has S / 16
            pos = torch.full((B, 1), S - 1, device="cuda")
            keys = lambda k, v, k2, *place: Keys(k, v, k2, *filled(B, *place))

            def global_step(q, tokens, blocks, sizes):
                def run():
                    _, lists = nsa.compressed_attention(q, pos, blocks, S, sizes, 1.0)
                    nsa.selected_attention(q, pos, tokens, lists, sizes, 1.0)

                return in_graph(run)

            def local_step(q, ring):
                return in_graph(lambda: cached_attention(q, pos, ring, 1.0, W))

            q = new(B, H, 1, D)
            tokens = keys(new(B, G, S, D), new(B, G, S, D), None, G, S)
            sdpa = lambda: F.scaled_dot_product_attention(q, tokens.k, tokens.v, enable_gqa=True)
            dense = min(in_graph(sdpa), in_graph(lambda: cached_attention(q, pos, tokens, 1.0)))
            floor = (tokens.k.nbytes + tokens.v.nbytes) / BANDWIDTH * 1e3
            blocks = keys(new(B, G, N, D), new(B, G, N, D), None, G, N, 31, 16)
            three = global_step(q, tokens, blocks, nsa.Blocks(32, 16, 64, 16))
            three += local_step(q, keys(new(B, G, W, D), new(B, G, W, D), None, G, W, S - W))
            tokens = blocks = None  # their memory is needed
            tokens = keys(new(B, G, S, R), None, new(B, 1, S, P), 1, S)
            blocks = keys(new(B, G, S // 16, R), None, new(B, 1, S // 16, P), 1, S // 16, 15, 16)
            far = global_step(new(B, H, 1, R + P), tokens, blocks, nsa.Blocks(16, 16, 16, 128))
            tokens = blocks = None  # their memory is needed
            near = local_step(
                new(B, H, 1, 4 * D + P), keys(new(B, 1, W, 4 * D), None, new(B, 1, W, P), 1, W, S - W)
            )
            asa = (near + far) / 2
            print(
                f"  {H} heads in {G} groups, width {D:3}, batch {B:2}:  dense {dense * 1e3:.1f} ({floor / dense:.0%} bytes), "
                f"nsa {three * 1e3:.1f} ({dense / three:.1f}x), asa {asa * 1e3:.1f} ({dense / asa:.1f}x: "
                f"local {near * 1e3:.1f}, global {far * 1e3:.1f})",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", choices=("layers", "decoding", "memory"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if given.only in (None, "layers"):
        bench_layers(given.lengths)
    if given.only in (None, "decoding"):
        bench_decoding()
    if given.only in (None, "memory"):
        bench_memory()


if __name__ == "__main__":
    main()
