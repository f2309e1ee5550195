"""Our plain decoding beside transformers' generate: the same weights, prompts and length, no drafts on either side.

    python results/beside_transformers.py out/base-gqa [--batch 64 256] [--new 256]

Needs transformers (measured with the versions that the output names). The run, of gqa, goes there through train_lm.save_pretrained.
"""
import argparse
import pathlib
import sys
import tempfile
import time

import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import mtp  # noqa: E402
import train_lm  # noqa: E402
from drafts import crops  # noqa: E402


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--new", type=int, default=256)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, cfg, folder = train_lm.load_run(given.run, device)
    data = train_lm.Data(cfg, train_lm.tokenizer(cfg.tokenizer), folder)
    model = train_lm.half(model)
    with tempfile.TemporaryDirectory() as tmp:
        train_lm.save_pretrained(given.run, tmp)
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp).to(model.embed.weight).eval()
    how = {"min_new_tokens": given.new, "max_new_tokens": given.new, "do_sample": True, "temperature": 1.0, "top_k": 0, "use_cache": True, "pad_token_id": 0}
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, "
          f"{given.new} new tokens, {next(model.parameters()).dtype}")  # fmt: skip
    for batch in given.batch:
        prompts = torch.stack(crops(data.tokens["val"], batch, 64, 1)).to(device)
        difference = (model(prompts).float() - other(prompts).logits.float()).abs().max().item()
        decoder = mtp.Decoder(model, batch, 64 + given.new)
        for name, way in {"ours": lambda: decoder.generate(list(prompts), given.new), "transformers": lambda: other.generate(prompts, attention_mask=torch.ones_like(prompts), **how)}.items():
            way()
            times = []
            for _ in range(3):
                start = time.perf_counter()
                way()
                torch.cuda.synchronize() if device == "cuda" else None
                times.append(time.perf_counter() - start)
            print(f"batch {batch:4} {name:12} {sorted(times)[1]:7.3f} s  {batch * given.new / sorted(times)[1]:9.0f} tokens/s, "
                  f"largest difference of the logits {difference:.1e}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
