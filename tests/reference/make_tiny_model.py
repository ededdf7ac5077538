"""Writes the seeded random test checkpoints of tests/testdata.

    python3 tests/reference/make_tiny_model.py [--out tests/testdata]

The weights are random, but scaled so that block scores differ enough between queries for the
selections to be diverse, and A and delta give scores c of both signs with a wide spread.
Running it again writes the same bytes.
"""

import argparse
import json
import os

import numpy as np

import safetensors_io

_NOSA = {"block_size": 64, "kernel_size": 32, "kernel_stride": 16, "init_blocks": 1,
         "window_blocks": 2, "topk_q_blocks": 2, "topk_blocks": 8}


def llama_config(hidden, query_heads, kv_heads, head_dim, intermediate, dtype, tied,
                 layers=2, vocab=416, attention_bias=False, nosa=None, max_positions=8192):
    """A complete `config.json` in Hugging Face form."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": attention_bias,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": query_heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": {"BF16": "bfloat16", "F32": "float32"}[dtype],
        "use_cache": True,
        "vocab_size": vocab,
    }
    if nosa is not None:
        config["nosa"] = dict(nosa)
    return config


def random_tensors(config, dtype, eviction_head, seed):
    """All tensors of a checkpoint, with values of `dtype` ("F32" or "BF16"), as float32."""
    rng = np.random.default_rng(seed)
    hidden, dim = config["hidden_size"], config["head_dim"]
    query = config["num_attention_heads"] * dim
    heads = config["num_key_value_heads"]
    inner = config["intermediate_size"]

    def matrix(rows, columns, gain):
        """Maps inputs of unit variance to outputs of standard deviation `gain`."""
        return rng.standard_normal((rows, columns)) * (gain / np.sqrt(columns))

    def around_one(size):
        return 1.0 + 0.1 * rng.standard_normal(size)

    # Small embeddings: the layers, not the last token itself, decide the next one.
    embeddings = rng.standard_normal((config["vocab_size"], hidden)) * 0.3
    tensors = {"model.embed_tokens.weight": embeddings}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        tensors[p + "self_attn.q_proj.weight"] = matrix(query, hidden, 2.2)
        tensors[p + "self_attn.k_proj.weight"] = matrix(heads * dim, hidden, 2.2)
        tensors[p + "self_attn.v_proj.weight"] = matrix(heads * dim, hidden, 1.0)
        tensors[p + "self_attn.o_proj.weight"] = matrix(hidden, query, 1.5)
        if config["attention_bias"]:
            for name, size in (("q", query), ("k", heads * dim), ("v", heads * dim), ("o", hidden)):
                tensors[p + f"self_attn.{name}_proj.bias"] = rng.standard_normal(size) * 0.5
        if eviction_head:
            # Magnitudes 0.6 to 1.4, signs alternate over heads and layers.
            signs = np.where((np.arange(heads) + i) % 2 == 0, 1.0, -1.0)
            tensors[p + "self_attn.A"] = signs * rng.uniform(0.6, 1.4, heads)
            tensors[p + "self_attn.delta.weight"] = matrix(heads, heads * dim, 1.8)
        tensors[p + "mlp.gate_proj.weight"] = matrix(inner, hidden, 1.0)
        tensors[p + "mlp.up_proj.weight"] = matrix(inner, hidden, 1.0)
        tensors[p + "mlp.down_proj.weight"] = matrix(hidden, inner, 1.0)
        tensors[p + "input_layernorm.weight"] = around_one(hidden)
        tensors[p + "post_attention_layernorm.weight"] = around_one(hidden)
    tensors["model.norm.weight"] = around_one(hidden)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden, 2.0)
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    if dtype == "BF16":
        tensors = {name: safetensors_io.to_bfloat16(array) for name, array in tensors.items()}
    return tensors


# name: (config, dtype, eviction head, seed, shards)
_F32_CONFIG = llama_config(hidden=32, query_heads=4, kv_heads=2, head_dim=64, intermediate=96,
                           dtype="F32", tied=False, nosa=_NOSA)
CHECKPOINTS = {
    "tiny-bf16": (llama_config(hidden=64, query_heads=4, kv_heads=2, head_dim=64, intermediate=96,
                               dtype="BF16", tied=True, nosa=_NOSA), "BF16", True, 1001, 1),
    "tiny-f32": (_F32_CONFIG, "F32", True, 1002, 1),
    "tiny-f32-sharded": (_F32_CONFIG, "F32", True, 1002, 2),
    # Plain Llama: no eviction head, no `nosa` object (the defaults hold).
    "tiny-llama": (llama_config(hidden=64, query_heads=4, kv_heads=2, head_dim=16, intermediate=96,
                                dtype="BF16", tied=True), "BF16", False, 1003, 1),
    # The same with biases on q, k, v and o.
    "tiny-llama-bias": (llama_config(hidden=32, query_heads=2, kv_heads=1, head_dim=16,
                                     intermediate=48, dtype="F32", tied=True, layers=1,
                                     attention_bias=True), "F32", False, 1004, 1),
}


def write_checkpoint(directory, config, dtype, eviction_head, seed, shards):
    os.makedirs(directory, exist_ok=True)
    tensors = random_tensors(config, dtype, eviction_head, seed)
    dtypes = {name: dtype for name in tensors}
    with open(os.path.join(directory, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
        file.write("\n")
    if shards > 1:
        safetensors_io.write_sharded(directory, tensors, dtypes, shards)
    else:
        safetensors_io.write(os.path.join(directory, "model.safetensors"), tensors, dtypes)


def main():
    testdata = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "testdata")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=testdata, help="folder that gets one folder per model")
    out = parser.parse_args().out
    for name, checkpoint in CHECKPOINTS.items():
        directory = os.path.join(out, name)
        write_checkpoint(directory, *checkpoint)
        size = sum(os.path.getsize(os.path.join(directory, f)) for f in os.listdir(directory))
        print(f"{name}: {size / 1000:.0f} kB, seed {checkpoint[3]}, {checkpoint[4]} file(s)")


if __name__ == "__main__":
    main()
