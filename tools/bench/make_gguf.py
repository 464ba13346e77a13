"""Writes a Llama checkpoint with a byte-level BPE tokenizer as GGUF, for llama.cpp. Weights stay bfloat16.

Usage: make_gguf.py MODEL_DIR OUT.gguf       (needs PyPI's gguf; see requirements.txt)

Only what the demo model is: LlamaForCausalLM, a tokenizer.json whose pre-tokenizer is Qwen 2's.
"""

import json
import os
import struct
import sys

import gguf
import numpy

QWEN2_SPLIT = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def read_json(folder, name):
    with open(os.path.join(folder, name)) as file:
        return json.load(file)


def tensors(path):
    """(name, bfloat16 bits as uint16) of a safetensors file."""
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
        data = file.read()
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}"
        begin, end = entry["data_offsets"]
        yield name, numpy.frombuffer(data[begin:end], dtype=numpy.uint16).reshape(entry["shape"])


def to_float32(bits):
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def interleave(weight, heads):
    """Rotation pairs (i, i + half) of Hugging Face's order to (2i, 2i + 1), which llama.cpp rotates."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def target_name(name):
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}"


def write_vocabulary(writer, folder, config):
    tokenizer = read_json(folder, "tokenizer.json")
    split = tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    assert split == QWEN2_SPLIT, f"pre-tokenizer: {split}"
    special = {token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    assert [token_id for _, token_id in tokens] == list(range(config["vocab_size"]))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token_id in special else gguf.TokenType.NORMAL for _, token_id in tokens]
    )
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"][0])
    writer.add_add_bos_token(True)
    writer.add_chat_template(read_json(folder, "tokenizer_config.json")["chat_template"])


def main():
    folder, out = sys.argv[1:]
    config = read_json(folder, "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"], config["architectures"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name("demo")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    write_vocabulary(writer, folder, config)
    for name, bits in tensors(os.path.join(folder, "model.safetensors")):
        if name.endswith("q_proj.weight"):
            bits = interleave(bits, config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            bits = interleave(bits, config["num_key_value_heads"])
        if bits.ndim == 1:
            writer.add_tensor(target_name(name), to_float32(bits))
        else:
            raw = numpy.ascontiguousarray(bits).view(numpy.uint8)
            writer.add_tensor(
                target_name(name), raw, raw_shape=raw.shape, raw_dtype=gguf.GGMLQuantizationType.BF16
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
