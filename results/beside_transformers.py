"""Our plain decoding beside transformers' generate: the same weights, prompts and length, no drafts on either side.

    python results/beside_transformers.py out/base-gqa [--batch 64] [--new 256]

Needs transformers (measured with the versions that the output names). The gqa model is a Llama: its weights fit that class unchanged.
"""
import argparse
import pathlib
import sys
import time

import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import mtp  # noqa: E402
import train_lm  # noqa: E402
from drafts import crops  # noqa: E402


def as_llama(model):
    """Our LM with --attn gqa -> transformers' LlamaForCausalLM with the same weights."""
    cfg = model.cfg
    config = transformers.LlamaConfig(
        vocab_size=cfg.vocab, hidden_size=cfg.width, intermediate_size=model.blocks[0].down.in_features, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.groups, rms_norm_eps=cfg.norm_eps, tie_word_embeddings=cfg.tied,
        max_position_embeddings=cfg.context, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    llama = transformers.LlamaForCausalLM(config).to(model.embed.weight)
    state = {"model.embed_tokens": model.embed.weight, "model.norm": model.norm.weight, "lm_head": model.head.weight}
    for i, b in enumerate(model.blocks):
        q, k, v = b.attn.qkv.weight.split([part * b.attn.head_width for part in (cfg.heads, cfg.groups, cfg.groups)])
        gate, up = b.gate_up.weight.chunk(2)
        parts = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": b.attn.out.weight,
                 "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": b.down.weight,
                 "input_layernorm": b.attn_norm.weight, "post_attention_layernorm": b.ffn_norm.weight}
        state.update({f"model.layers.{i}.{name}": part for name, part in parts.items()})
    llama.load_state_dict({f"{name}.weight": weight for name, weight in state.items()})
    return llama.eval()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--new", type=int, default=256)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, cfg, folder = train_lm.load_run(given.run, device)
    data, model = train_lm.Data(cfg, train_lm.tokenizer(cfg.tokenizer), folder), train_lm.half(model)
    llama = as_llama(model)
    prompts = torch.stack(crops(data.tokens["val"], given.batch, 64, 1)).to(device)
    difference = (model(prompts).float() - llama(prompts).logits.float()).abs().max().item()
    decoder = mtp.Decoder(model, given.batch, 64 + given.new)
    how = dict(max_new_tokens=given.new, min_new_tokens=given.new, do_sample=True, temperature=1.0, top_k=0, use_cache=True)
    ways = {"ours": lambda: decoder.generate(list(prompts), given.new), "transformers": lambda: llama.generate(prompts, **how)}
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, batch {given.batch}, {given.new} new tokens, "
          f"{next(model.parameters()).dtype}, largest difference of the logits {difference:.1e}")
    for name, way in ways.items():
        way()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            way()
            torch.cuda.synchronize() if device == "cuda" else None
            times.append(time.perf_counter() - start)
        print(f"{name:12} {sorted(times)[1]:7.3f} s  {given.batch * given.new / sorted(times)[1]:9.0f} tokens/s")


if __name__ == "__main__":
    main()
