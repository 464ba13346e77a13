"""Writes the corpus that is written by hand: good files in small, and each way to be bad that we know of.

Usage: make_corpus.py    (standard library only; overwrites its own files and leaves what the fuzzer found)
"""

import json
import os
import struct

HERE = os.path.dirname(os.path.abspath(__file__))
SEPARATOR = "\x1e"


def put(target, name, content):
    folder = os.path.join(HERE, "corpus", target)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, name), "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def compact(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# ---- safetensors


def checkpoint(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else compact(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin, end, dtype="BF16", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 2] if shape is None else shape, "data_offsets": [begin, end]}


def safetensors():
    good = {"__metadata__": {"format": "pt"}, "a": tensor(0, 8, shape=[2, 2]), "b": tensor(8, 12, "F32", [])}
    data = bytes(range(12))
    names = {
        "good": checkpoint(good, data),
        "good_padded_header": checkpoint(compact(good).encode() + b"   ", data),
        "good_zero_sized": checkpoint({"a": tensor(0, 0, shape=[0, 7]), "b": tensor(0, 2)}, b"xy"),
        "empty_header": checkpoint({}),
        "no_bytes": b"",
        "seven_bytes": b"\x02\0\0\0\0\0\0",
        "header_2_to_63": checkpoint(good, data, length=2**63),
        "header_2_to_64_minus_1": checkpoint(good, data, length=2**64 - 1),
        "header_minus_8": checkpoint(good, data, length=2**64 - 8),
        "header_above_limit": checkpoint(good, data, length=100_000_001),
        "header_beyond_file": checkpoint(good, b"", length=4096),
        "header_zero": checkpoint(b"", data),
        "header_cut": checkpoint(compact(good).encode()[:-5], data),
        "header_not_utf8": checkpoint(b'{"\xff\xfe":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        "header_list": checkpoint(b"[]"),
        "header_deep": checkpoint(b'{"a":' + b"[" * 2000 + b"]" * 2000 + b"}"),
        "key_twice": checkpoint(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"x",
        ),
        "truncated": checkpoint(good, data[:-1]),
        "trailing": checkpoint(good, data + b"x"),
        "overlap": checkpoint({"a": tensor(0, 8), "b": tensor(4, 12)}, data),
        "same_bytes_twice": checkpoint({"a": tensor(0, 8), "b": tensor(0, 8)}, data[:8]),
        "hole": checkpoint({"a": tensor(0, 4), "b": tensor(8, 12)}, data),
        "begin_above_end": checkpoint({"a": {"dtype": "U8", "shape": [4], "data_offsets": [8, 4]}}, data),
        "offsets_2_to_64": checkpoint(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[18446744073709551615,18446744073709551616]}}'
        ),
        "offsets_negative": checkpoint({"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}, data),
        "offsets_float": checkpoint({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0.0, 4.0]}}, data),
        # The product is 4 modulo 2^64 (times an element of one byte).
        "shape_overflow": checkpoint({"a": tensor(0, 4, "U8", [4194305, 4194305, 211106198978564])}, b"abcd"),
        "shape_overflow_zero": checkpoint({"a": tensor(0, 0, "U8", [2**32, 2**32])}),
        "shape_overflow_then_zero": checkpoint({"a": tensor(0, 0, "U8", [2**32, 2**32, 0])}),
        "shape_negative": checkpoint({"a": tensor(0, 4, "U8", [-2, -2])}, data),
        "shape_true": checkpoint({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, b"x"),
        "dtype_unknown": checkpoint({"a": tensor(0, 4, "Q4_K")}, data),
        "dtype_number": checkpoint({"a": tensor(0, 4, 7)}, data),
        "entry_null": checkpoint({"a": None}),
        "metadata_is_a_tensor": checkpoint({"__metadata__": tensor(0, 4, "U8")}, b"abcd"),
    }
    for name, content in names.items():
        put("safetensors", name, content)
    index = {"metadata": {"total_size": 12}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    put("safetensors", "index_good", compact(index))
    for name, weight_map in {
        "index_traversal": {"a": "../../../../etc/passwd"},
        "index_absolute": {"a": "/etc/passwd"},
        "index_dot": {"a": "."},
        "index_missing_shard": {"a": "c.safetensors"},
        "index_missing_tensor": {"c": "a.safetensors"},
        "index_number": {"a": 1},
        "index_list": ["a"],
        "index_nul": {"a": "a.safetensors\0x"},
    }.items():
        put("safetensors", name, compact({"weight_map": weight_map}))


# ---- config.json

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}

# Beside LLAMA: what tells the other families.
FAMILIES = {
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 64,
        "max_window_layers": 1,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 64,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 64,
        "sliding_window_pattern": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}

ROPE = {
    "linear": {"type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def config_json():
    put("config_json", "good_llama", compact(LLAMA))
    put(
        "config_json",
        "good_generation",
        compact(LLAMA) + SEPARATOR + compact({"eos_token_id": [4, 5], "temperature": 0.6, "top_p": 0.9, "top_k": 50}),
    )
    for name, fields in FAMILIES.items():
        put("config_json", f"family_{name}", compact({**LLAMA, **fields}))
    for name, scaling in ROPE.items():
        put("config_json", f"rope_{name}", compact({**LLAMA, "rope_scaling": scaling}))
        put(
            "config_json",
            f"rope_parameters_{name}",
            compact({**LLAMA, "rope_parameters": {**scaling, "rope_theta": 5e5}}),
        )
    bad = {
        "no_architecture": {"architectures": None},
        "two_architectures": {"architectures": ["LlamaForCausalLM", "GPT2LMHeadModel"]},
        "architecture_unknown": {"architectures": ["GPT2LMHeadModel"]},
        "zero_heads": {"num_attention_heads": 0},
        "zero_kv_heads": {"num_key_value_heads": 0},
        "kv_heads_do_not_divide": {"num_key_value_heads": 3},
        "negative_hidden": {"hidden_size": -64},
        "hidden_2_to_32": {"hidden_size": 2**32 + 64},
        "hidden_2_to_64": {"hidden_size": 2**64},
        "hidden_string": {"hidden_size": "64"},
        "hidden_float": {"hidden_size": 64.5},
        "layers_1e9": {"num_hidden_layers": 10**9},
        "vocab_zero": {"vocab_size": 0},
        "odd_head_dim": {"head_dim": 17},
        "window_negative": {"sliding_window": -1},
        "eps_negative": {"rms_norm_eps": -1e-5},
        "theta_huge": {"rope_theta": 1e300},
        "eos_many": {"eos_token_id": list(range(1000))},
        "eos_negative": {"eos_token_id": -1},
        "rope_scaling_text": {"rope_scaling": "linear"},
        "rope_factor_zero": {"rope_scaling": {"type": "linear", "factor": 0}},
        "rope_unknown": {"rope_scaling": {"rope_type": "spiral", "factor": 2}},
        "experts_without_choice": {
            "num_local_experts": 8,
            "num_experts_per_tok": 9,
            "architectures": ["MixtralForCausalLM"],
        },
        "quantized": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    }
    for name, fields in bad.items():
        put("config_json", f"bad_{name}", compact({**LLAMA, **fields}))
    put("config_json", "bad_eps_1e400", compact(LLAMA).replace("1e-05", "1e400"))
    put("config_json", "bad_eps_nan", compact(LLAMA).replace("1e-05", "NaN"))
    put("config_json", "bad_key_twice", '{"vocab_size":1,"vocab_size":2}')
    put("config_json", "bad_deep", "[" * 3000 + "]" * 3000)
    put("config_json", "bad_cut", compact(LLAMA)[:-20])
    put("config_json", "bad_lone_surrogate", '{"architectures":["\\ud800"]}')
    put("config_json", "bad_generation_list", compact(LLAMA) + SEPARATOR + "[]")


# ---- tokenizer.json


def byte_alphabet():
    """GPT-2's printable character for each byte."""
    keep = [b for b in range(256) if 0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or b >= 0xAE]
    out, spare = {}, 256
    for b in range(256):
        out[b] = chr(b) if b in keep else chr(spare)
        spare += b not in keep
    return out


def byte_level():
    symbols = sorted(byte_alphabet().values())
    vocab = {piece: i for i, piece in enumerate(["<s>", "</s>", *symbols, "he", "ll", "hell", "hello", "\u0120w"])}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 0,
                "content": "<s>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            },
            {
                "id": 1,
                "content": "</s>",
                "single_word": False,
                "lstrip": True,
                "rstrip": True,
                "normalized": False,
                "special": True,
            },
            {"id": len(vocab), "content": "Tool", "single_word": True, "normalized": True, "special": False},
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": "\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": ["h e", "l l", ["he", "ll"], "hell o", "\u0120 w"],
        },
    }


def sentencepiece():
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "\u2581",
        "h",
        "e",
        "l",
        "o",
        "w",
        "r",
        "d",
        "ö",
        "\u2581h",
        "he",
        "ll",
        "\u2581he",
        "llo",
        "\u2581\u2581",
        "\u2581w",
        "1",
        ".",
    ]
    special = [
        {
            "id": i,
            "content": piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, piece in enumerate(pieces[:3])
    ]
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": ["\u2581 h", "h e", "l l", "\u2581 he", "ll o", "\u2581 \u2581", "\u2581 w"],
        },
    }


def small_bpe(**changes):
    """Few bytes, so that the fuzzer reaches all of it."""
    out = {
        "added_tokens": [{"id": 5, "content": "<s>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "?",
            "vocab": {"a": 0, "b": 1, "ab": 2, "?": 3, "aba": 4},
            "merges": ["a b", "ab a"],
        },
    }
    for key, value in changes.items():
        if key == "model":
            out["model"] = {**out["model"], **value}
        else:
            out[key] = value
    return compact(out)


def unigram(**changes):
    model = {
        "type": "Unigram",
        "unk_id": 0,
        "byte_fallback": False,
        "vocab": [
            ["<unk>", 0.0],
            ["\u2581", -2.5],
            ["a", -1.0],
            ["b", -1.5],
            ["ab", -2.0],
            ["\u2581a", -1.25],
            ["aba", -3.0],
        ],
    }
    return compact(
        {
            "added_tokens": [{"id": 7, "content": "</s>", "special": True}],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}],
            },
            "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
            "post_processor": None,
            "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
            "model": {**model, **changes},
        }
    )


def unigram_of_text():
    """A Unigram that covers every text: the pieces of sentencepiece(), the rare ones dear."""
    pieces = sentencepiece()["model"]["vocab"]
    vocab = [
        [piece, 0.0 if i == 0 else -9.0 - i / 64 if piece.startswith("<0x") else -1.0 - i % 7]
        for piece, i in pieces.items()
    ]
    root = json.loads(unigram(vocab=vocab, byte_fallback=True))
    root["added_tokens"] = [{"id": i, "content": piece, "special": True} for i, piece in enumerate(list(pieces)[:3])]
    root["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "ByteFallback"},
            {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"},
        ],
    }
    return compact(root)


NORMALIZERS = {
    "nfd": {"type": "NFD"},
    "nfkc": {"type": "NFKC"},
    "nfkd": {"type": "NFKD"},
    "lowercase": {"type": "Lowercase"},
    "strip": {"type": "Strip", "strip_left": True, "strip_right": True},
    "strip_accents": {"type": "StripAccents"},
    "replace_regex": {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
    "replace_with_nothing": {"type": "Replace", "pattern": {"String": "a"}, "content": ""},
    "replace_empty": {"type": "Replace", "pattern": {"String": ""}, "content": "aa"},
    "replace_empty_regex": {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "aa"},
    "bert": {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    },
    "precompiled": {"type": "Precompiled", "precompiled_charsmap": "ALQCAACEAAAA"},
    "byte_level": {"type": "ByteLevel"},
    "prepend": {"type": "Prepend", "prepend": "\u2581"},
    # Each step makes the text longer: 2^40 characters out of one.
    "bomb": {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
    },
}
PRETOKENIZERS = {
    "byte_level": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
    "metaspace": {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True},
    "whitespace": {"type": "Whitespace"},
    "whitespace_split": {"type": "WhitespaceSplit"},
    "bert": {"type": "BertPreTokenizer"},
    "digits": {"type": "Digits", "individual_digits": True},
    "punctuation": {"type": "Punctuation", "behavior": "Isolated"},
    "char_delimiter": {"type": "CharDelimiterSplit", "delimiter": "a"},
    "unicode_scripts": {"type": "UnicodeScripts"},
    "fixed_length": {"type": "FixedLength", "length": 3},
    "split_removed": {"type": "Split", "pattern": {"String": "b"}, "behavior": "Removed", "invert": False},
    "split_next": {"type": "Split", "pattern": {"Regex": "b"}, "behavior": "MergedWithNext", "invert": True},
    "split_previous": {"type": "Split", "pattern": {"Regex": "b"}, "behavior": "MergedWithPrevious", "invert": False},
    "split_contiguous": {"type": "Split", "pattern": {"Regex": "b"}, "behavior": "Contiguous", "invert": False},
    "split_empty": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
    # Exponential where it is matched by backtracking.
    "split_backtracking": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    "split_repeated": {
        "type": "Split",
        "pattern": {"Regex": "(((a{1,999}){1,999}){1,999}){1,999}"},
        "behavior": "Isolated",
        "invert": False,
    },
    "split_nested": {
        "type": "Split",
        "pattern": {"Regex": "(" * 3000 + ")" * 3000},
        "behavior": "Isolated",
        "invert": False,
    },
    "split_recursive": {"type": "Split", "pattern": {"Regex": "(?R)?a"}, "behavior": "Isolated", "invert": False},
    "split_callout": {"type": "Split", "pattern": {"Regex": "(?C1)a\\C"}, "behavior": "Isolated", "invert": False},
}
DECODERS = {
    "metaspace": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"},
    "wordpiece": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "bpe": {"type": "BPEDecoder", "suffix": "</w>"},
    "ctc": {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    "strip": {
        "type": "Sequence",
        "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": "a", "start": 2, "stop": 65536}],
    },
    "replace": {
        "type": "Sequence",
        "decoders": [{"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "ab"}, "content": "\u2581"}],
    },
    "fallback": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    "bomb": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40},
}
TEXT = SEPARATOR + SEPARATOR + "abab a  b?\n" + "a" * 64


def tokenizer_json():
    target = "tokenizer_json"
    put(target, "good_byte_level", compact(byte_level()) + TEXT)
    put(target, "good_sentencepiece", compact(sentencepiece()) + TEXT)
    put(target, "good_small", small_bpe() + TEXT)
    put(target, "good_unigram", unigram() + TEXT)
    put(
        target,
        "good_config",
        small_bpe()
        + SEPARATOR
        + compact(
            {
                "bos_token": {"content": "<s>"},
                "eos_token": "?",
                "chat_template": [{"name": "default", "template": "{{ 1 }}"}],
            }
        )
        + SEPARATOR
        + "ab",
    )
    for kind, field, parts in (
        ("normalizer", "normalizer", NORMALIZERS),
        ("pretokenizer", "pre_tokenizer", PRETOKENIZERS),
        ("decoder", "decoder", DECODERS),
    ):
        for name, node in parts.items():
            put(target, f"{kind}_{name}", small_bpe(**{field: node}) + TEXT)
    for name, node in {
        "bert": {"type": "BertProcessing", "sep": ["<s>", 5], "cls": ["<s>", 5]},
        "roberta": {
            "type": "RobertaProcessing",
            "sep": ["<s>", 5],
            "cls": ["<s>", 5],
            "trim_offsets": True,
            "add_prefix_space": True,
        },
        "ids_outside": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x"}}, {"Sequence": {"id": "A"}}],
            "special_tokens": {"x": {"ids": [99]}},
        },
        "many_ids": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x"}}] * 50 + [{"Sequence": {"id": "A"}}],
            "special_tokens": {"x": {"ids": [5] * 100}},
        },
        "deep": json.loads('{"type":"Sequence","processors":[' * 25 + '{"type":"ByteLevel"}' + "]}" * 25),
    }.items():
        put(target, f"post_processor_{name}", small_bpe(post_processor=node) + TEXT)
    models = {
        "wordpiece": {"type": "WordPiece"},
        "no_merges": {"merges": None},
        "merges_number": {"merges": [1]},
        "merge_missing": {"merges": ["a z"]},
        "merge_empty": {"merges": [["", ""]]},
        "dropout": {"dropout": 0.5},
        "id_twice": {"vocab": {"a": 0, "b": 0, "?": 1}},
        "id_negative": {"vocab": {"a": -1, "?": 0}},
        "id_huge": {"vocab": {"a": 2**63, "?": 0}},
        "id_float": {"vocab": {"a": 1e30, "?": 0}},
        # One token, room for millions.
        "id_sparse": {"vocab": {"a": 3_999_999, "?": 0}, "merges": []},
        "unk_missing": {"unk_token": "nope"},
        "prefix": {"continuing_subword_prefix": "##", "end_of_word_suffix": "</w>"},
        "prefix_longer_than_token": {"continuing_subword_prefix": "########", "merges": ["a b"]},
        "fallback_partial": {"byte_fallback": True, "vocab": {"a": 0, "b": 1, "ab": 2, "?": 3, "aba": 4, "<0x41>": 6}},
        "empty_piece": {"vocab": {"": 0, "?": 1}, "merges": []},
    }
    for name, model in models.items():
        put(target, f"model_{name}", small_bpe(model=model) + TEXT)
    for name, tokens in {
        "empty": [{"id": 5, "content": "", "special": True}],
        "id_sparse": [{"id": 3_999_999, "content": "<s>", "special": True}],
        "clash": [{"id": 0, "content": "<s>", "special": True}],
        "twice": [{"id": 5, "content": "x"}, {"id": 6, "content": "x"}],
        "spaces": [
            {"id": 5, "content": "  ", "lstrip": True, "rstrip": True, "special": True},
            {"id": 6, "content": " ", "normalized": True},
        ],
        "overlap": [
            {"id": 5, "content": "aba", "special": True},
            {"id": 6, "content": "ab", "special": True},
            {"id": 7, "content": "bab", "normalized": True},
        ],
        "control": [{"id": 5, "content": "a\x00b", "special": True}, {"id": 6, "content": "\ufffd", "special": True}],
    }.items():
        put(target, f"added_{name}", small_bpe(added_tokens=tokens) + TEXT)
    put(target, "unigram_no_unk", unigram(unk_id=None) + TEXT)
    put(target, "unigram_unk_outside", unigram(unk_id=99) + TEXT)
    put(target, "unigram_infinite", unigram().replace("-1.25", "-1e400") + TEXT)
    put(
        target,
        "unigram_byte_fallback",
        unigram(byte_fallback=True, vocab=[["<unk>", 0], ["<0x61>", -1], ["\u2581", -2]]) + TEXT,
    )
    put(target, "unigram_positive", unigram(vocab=[["<unk>", 0], ["a", 1e308], ["aa", 1e308], ["", 1]]) + TEXT)
    put(target, "bad_deep", "[" * 3000 + "]" * 3000)
    put(target, "bad_cut", small_bpe()[:-30])
    put(target, "bad_key_twice", small_bpe().replace('"a":0', '"a":0,"a":7'))
    put(target, "bad_empty_object", "{}")
    put(target, "bad_null_model", '{"model":null}')


def tokenizer_text():
    for name, text in {
        "ascii": "Hello, world! It's 2024's 1st test.\r\n\r\n  done\t\tx",
        "multilingual": "Привет, мир 你好世界 こんにちは مرحبا שלום नमस्ते ไทย 한국어 Ελληνικά",
        "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷 e\u0301 \u1e9b\u0323",
        "controls": "<|begin_of_text|><|end|></s><s><|user|>ignore<0x0A><unk>",
        "controls_split": "<|end<|end|>|><|en\u200bd|><|END|>",
        "space_runs": " " * 70 + "\n" * 40 + "\t" * 9 + "\u3000\u00a0\u2028 x " + "\u2581" * 9,
        "one_letter": "a" * 3000,
        "one_emoji": "🌊" * 700,
        "zero_bytes": "a\0b\0\0c",
        "joiners": "\u200d\ufeff\u202e\u0300\u0301\u0302" * 20,
        "last_code_points": "\U0010ffff\ud7ff\ue000\uffff",
    }.items():
        put("tokenizer_text", name, text)
    put("tokenizer_text", "broken_utf8", b"a\xff\xfe\xc0\x80\xed\xa0\x80\xf4\x90\x80\x80\xe2\x82 \xf0\x9f\x8c")
    put("tokenizer_text", "latin1", "naïve café".encode("latin-1"))


def detokenizer():
    def case(choices, stops, cut, ids):
        out = bytes([choices, len(stops)]) + b"".join(bytes([at, length - 1]) for at, length in stops) + bytes([cut])
        return out + b"".join(struct.pack("<H", i + 1) for i in ids)

    bytes_of = lambda text: [3 + b for b in text.encode()]  # the byte tokens of sentencepiece.json
    demo, pieces, unigrams = 0, 1, 2
    put("detokenizer", "demo_words", case(demo, [(3, 4), (9, 2)], 4, range(300, 420, 3)))
    put("detokenizer", "demo_special", case(demo | 0x80, [(0, 1)], 2, [0, 4, 400, 6, 1, 5, 500]))
    put("detokenizer", "demo_bytes", case(demo | 0x40, [(1, 3), (0, 2), (2, 9)], 9, list(range(7, 263)) + [8, 8, 8]))
    put(
        "detokenizer",
        "pieces_emoji",
        case(pieces, [(0, 4)], 2, bytes_of("🌊é") + [259, 260] + bytes_of("🌊")[:3] + [260]),
    )
    put("detokenizer", "pieces_spaces", case(pieces, [(0, 1), (1, 1)], 1, [259, 259, 272, 260, 259, 268]))
    put("detokenizer", "pieces_invalid_run", case(pieces, [], 10, [3 + 0xF0, 3 + 0x9F] * 12 + [260]))
    put("detokenizer", "pieces_prime_in_character", case(pieces, [(0, 3)], 2, bytes_of("🌊")))
    put("detokenizer", "pieces_strip_start", case(pieces | 0x80, [], 3, [1, 259, 2, 259, 260, 1]))
    put("detokenizer", "outside_ids", case(demo, [(0, 2)], 0, [-1, 1280, 400, -1, 401]))
    put(
        "detokenizer",
        "stops_overlap",
        case(pieces | 0x40, [(0, 2), (0, 3), (1, 2), (0, 5)], 0, [261, 261, 261, 260, 261, 261] * 3),
    )
    put(
        "detokenizer",
        "unigram_bytes",
        case(unigrams, [(0, 2), (3, 4)], 3, [259, *bytes_of("🌊"), 260, 1, *bytes_of("é")[:1], 261]),
    )
    put("detokenizer", "stop_at_end", case(pieces, [(5, 2), (4, 2)], 0, [260, 261, 262, 263, 264, 265, 266]))


# ---- chat templates

CHAT = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}{{ raise_exception('late') }}{% endif %}
<|{{ m.role }}|>{{ (m['content'] or '') | trim if m['content'] is string else m['content'] | tojson }}
{%- if m.tool_calls is defined and m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | tojson(indent=2) }}){{ ', ' if not loop.last }}{% endfor %}{% endif %}
<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""

TEMPLATES = {
    "good_chat": CHAT,
    "good_macro": "{% macro f(x, y=2) %}{{ x }}-{{ y }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}{% call f(2, y='q') %}body{% endcall %}",
    "good_namespace": "{% set ns = namespace(i=0, l=[]) %}{% for m in messages %}{% set ns.i = ns.i + loop.index0 %}{% set ns.l = ns.l + [m.role] %}{% endfor %}{{ ns.i }}{{ ns.l | join(',') }}",
    "good_filters": "{{ [3,1,2] | sort | reverse | list }}{{ 'aB c' | upper | lower | title | capitalize | replace('a','b') | length }}{{ {'b':1,'a':2} | dictsort }}{{ messages | map(attribute='role') | unique | join(' ') }}{{ messages | selectattr('role','equalto','user') | list | length }}{{ 3.7 | round | int }}{{ '%s %05.2f %r' | format('a', 2.5, none) }}",
    "good_slices": "{{ messages[-1].content }}{{ messages[1:][::-1][0].role }}{{ 'abc'[::-1] }}{{ 'abcdef'[1:-1:2] }}{{ (1, 2) + (3,) }}{{ 'a' ~ 1 ~ none }}",
    "good_strings": "{{ ' a,b '.strip().split(',') }}{{ 'x'.startswith('x') }}{{ 'a-b'.replace('-', '+') }}{{ 'A'.lower() }}{{ 'abc'.find('c') }}{{ '{}{}'.format(1, 'a') }}",
    "good_whitespace": "  {%- if true -%}  a  {%+ endif %}\n{# c #}\n\n  {{- 'x' -}}  \n{% raw %}{{ no }}{% endraw %}",
    "good_loop": "{% for k, v in {'a': 1}.items() recursive %}{{ loop.index }}{{ loop.cycle('x','y') }}{{ loop.previtem }}{% else %}none{% endfor %}{% for i in range(10) if i is odd %}{% if i > 6 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "good_set_block": "{% set x %}a{{ 1 }}{% endset %}{{ x | upper }}{% filter upper %}b{% endfilter %}{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{% generation %}g{% endgeneration %}",
    "good_time": "{{ strftime_now('%d %b %Y %H:%M %j %A %%') }}",
    "good_arithmetic": "{{ 7 // -2 }} {{ 7 % -2 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 1 / 3 }} {{ -n }} {{ 1 if big > 0 else 2 }} {{ 1 < 2 < 3 }}",
    # Each asks for much more than a chat needs.
    "hostile_long_loop": "{% for i in range(1000000000) %}{% endfor %}",
    "hostile_nested_loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}x{% endfor %}{% endfor %}{% endfor %}",
    "hostile_recursive_macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "hostile_two_macros": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "hostile_fan_out_macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "hostile_gigabyte": "{{ 'x' * 1073741824 }}",
    "hostile_gigabyte_twice": "{{ ('x' * 30000) * 40000 }}",
    "hostile_doubling": "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "hostile_doubling_list": "{% set ns = namespace(s=[1]) %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "hostile_nested_list": "{% set ns = namespace(s=[]) %}{% for i in range(100000) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s }}",
    "hostile_nested_dict": "{% set ns = namespace(s={}) %}{% for i in range(100000) %}{% set ns.s = {'a': ns.s} %}{% endfor %}{{ ns.s | tojson }}{{ ns.s == ns.s }}",
    "hostile_self_namespace": "{% set ns = namespace() %}{% set ns.ns = ns %}{{ ns }}{{ ns == ns }}{{ ns | tojson }}",
    "hostile_wide_format": "{{ '%1000000000d' % 1 }}",
    "hostile_wide_format_2": "{{ '%*d' % (2147483647, 1) }}{{ '%.2147483647f' % 1.5 }}{{ '{:>999999999}'.format(1) }}",
    "hostile_indent": "{{ messages | tojson(indent=1000000000) }}",
    "hostile_indent_negative": "{{ messages | tojson(indent=-9223372036854775808) }}{{ 'a\nb' | indent(99999999) }}",
    "hostile_center": "{{ 'x' | center(1000000000) }}{{ 'x'.ljust(1000000000) }}",
    "hostile_join": "{{ range(100000) | join('x' * 100000) }}",
    "hostile_replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "hostile_replace_empty": "{{ ('a' * 100000) | replace('', 'b' * 100000) }}{{ 'abc'.replace('', '-') }}",
    "hostile_power": "{{ 9 ** 999999999 }}{{ 10 ** 100 }}{{ (-2) ** 63 }}{{ 0 ** -1 }}",
    "hostile_division": "{{ 1 // 0 }}{{ 1 % 0 }}",
    "hostile_minimum": "{{ (-9223372036854775807 - 1) // -1 }}{{ (-9223372036854775807 - 1) % -1 }}{{ -(-9223372036854775807 - 1) }}{{ (-9223372036854775807 - 1) | abs }}",
    "hostile_overflow": "{{ big + 1 }}{{ big * big }}{{ -big - 2 }}{{ 99999999999999999999 }}{{ 1e999 | int }}{{ 'inf' | float | int }}",
    "hostile_range": "{{ range(-9223372036854775807, 9223372036854775807, 9223372036854775807) | list }}{{ range(1, 2, 0) }}",
    "hostile_slice": "{{ 'abc'[-9223372036854775808:9223372036854775807:-9223372036854775808] }}{{ [1,2][::0] }}",
    "hostile_batch": "{{ [1,2,3] | batch(0) | list }}{{ [1,2,3] | slice(0) | list }}{{ [1] | batch(1000000000, 'x') | list }}",
    "hostile_round": "{{ 1.5 | round(999999999) }}{{ 1.5 | round(-999999999) }}{{ big | round(-400) }}",
    "hostile_sandbox": "{{ messages.append(1) }}{{ ''.__class__.__mro__ }}{{ messages.__class__ }}{{ self }}{{ cycler }}{{ lipsum(100) }}",
    "hostile_time": "{{ strftime_now('%Y' * 100000) }}{{ strftime_now('%') }}{{ strftime_now('%999999d') }}",
    "hostile_parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "hostile_brackets": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "hostile_not": "{{ " + "not " * 1500 + "1 }}",
    "hostile_minus": "{{ " + "-" * 3000 + "1 }}",
    "hostile_sum": "{{ 1" + "+1" * 2500 + " }}",
    "hostile_filters": "{{ x" + "|list" * 1500 + " }}",
    "hostile_attributes": "{{ x" + ".a" * 3000 + " }}",
    "hostile_conditions": "{{ " + "1 if 1 else " * 600 + "1 }}",
    "hostile_ifs": "{% if 1 %}" * 600 + "{% endif %}" * 600,
    "hostile_elifs": "{% if 0 %}" + "{% elif 0 %}" * 500 + "{% endif %}",
    "hostile_fors": "{% for a in [1] %}" * 400 + "{% endfor %}" * 400,
    "bad_no_end": "{% for a in b %}",
    "bad_open": "{{",
    "bad_open_block": "{% if",
    "bad_comment": "{# x",
    "bad_raw": "{% raw %}x",
    "bad_else": "{% else %}",
    "bad_include": "{% include 'x' %}",
    "bad_import": "{% import 'x' as y %}",
    "bad_extends": "{% extends 'x' %}",
    "bad_block": "{% block x %}{% endblock %}",
    "bad_string": "{{ 'abc }}",
    "bad_escape": "{{ '\\x' '\\u12' '\\N{x}' '\\' }}",
    "bad_number": "{{ 1__2 0x 1e 1.2.3 }}",
    "bad_filter": "{{ 1 | nope }}",
    "bad_test": "{{ 1 is nope }}",
    "bad_keyword": "{{ f(a=1, 2) }}",
    "bad_target": "{% set 1 = 2 %}{% for 1 in x %}{% endfor %}",
    "bad_not_utf8": b"{{ '\xff\xfe' | upper | length }}\xc3{{ '\xe2\x82'[0] | tojson }}",
    "bad_nul": "a\0{{ 'b\0c' | tojson }}",
    "bad_macro_twice": "{% macro f(a, a) %}{% endmacro %}{{ f(1, a=2) }}",
    "bad_unpack": "{% for a, b in [1] %}{% endfor %}{% set a, b = 1, 2, 3 %}",
    "bad_star": "{{ f(*1, **2) }}{{ dict(**{'a': 1}) }}{{ range(*[1, 2, 3, 4]) }}",
}


def chat_template():
    for name, text in TEMPLATES.items():
        put("chat_template", name, text)
    put("chat_template", "variables_deep", "{{ x | tojson }}" + SEPARATOR + '{"x":' + "[" * 50 + "]" * 50 + "}")
    put(
        "chat_template",
        "variables_unicode",
        "{{ x | upper }}{{ x | title }}{{ x[1] }}{{ x | length }}{{ x | tojson }}"
        + SEPARATOR
        + compact({"x": "ǆ ß ﬁ İ 👩‍👧 \u0345"}),
    )
    put(
        "chat_template",
        "variables_numbers",
        "{% for v in x %}{{ v }}{{ v | int }}{{ v | string }}{{ v | tojson }} {% endfor %}"
        + SEPARATOR
        + '{"x":[1e308,-0.0,5e-324,18446744073709551615,-9223372036854775808,1e16,0.1]}',
    )


# ---- http: how to cut, SEPARATOR, one connection's bytes


def http():
    host = "Host: localhost\r\n"
    post = "POST /v1/completions?x=1 HTTP/1.1\r\n" + host
    names = {
        "get": f"GET /livez HTTP/1.1\r\n{host}\r\n",
        "http_1_0": "GET /livez HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        "pipelined": f"GET /a HTTP/1.1\r\n{host}\r\n{post}Content-Length: 2\r\n\r\nhiGET /c%20d HTTP/1.1\r\n{host}\r\n",
        "chunked": post + "Transfer-Encoding: chunked\r\n\r\n3;e=\"1\"\r\nabc\r\n2\r\nde\r\n0\r\nTrailer: x\r\n\r\n",
        "chunked_above_limit": post + "Transfer-Encoding: chunked\r\n\r\n" + ("64\r\n" + "x" * 100 + "\r\n") * 3,
        "chunk_too_long": post + "Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n",
        "chunk_size_2_to_64": post + "Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n",
        "chunk_extension_endless": post + "Transfer-Encoding: chunked\r\n\r\n1;" + "x" * 700,
        "length_and_chunks": post + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
        "lengths_twice": post + "Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        "length_negative": post + "Content-Length: -1\r\n\r\n",
        "length_2_to_64": post + "Content-Length: 18446744073709551616\r\n\r\n",
        "body_above_limit": post + "Content-Length: 257\r\n\r\n",
        "gzip": post + "Transfer-Encoding: gzip, chunked\r\n\r\n",
        "continue": post + "Expect: 100-continue\r\nContent-Length: 2\r\n\r\nhi",
        "absolute_target": "GET http://u@h:80/p?q#f HTTP/1.1\r\nHost: other\r\n\r\n",
        "authority_only": "GET http://h HTTP/1.1\r\nHost: h\r\n\r\n",
        "connect": "CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n",
        "star": "OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n",
        "escapes": f"GET /%2e%2e/%00/%zz/%4 HTTP/1.1\r\n{host}\r\n",
        "no_host": "GET / HTTP/1.1\r\n\r\n",
        "hosts_twice": f"GET / HTTP/1.1\r\n{host}{host}\r\n",
        "folded": f"GET / HTTP/1.1\r\n{host}X: a\r\n b\r\n\r\n",
        "space_before_colon": "GET / HTTP/1.1\r\nHost : h\r\n\r\n",
        "bare_line_feeds": "GET / HTTP/1.1\nHost: h\n\n",
        "nul": "GET /a\0b HTTP/1.1\r\nHost: h\r\nX: \0\r\n\r\n",
        "many_headers": f"GET / HTTP/1.1\r\n{host}" + "".join(f"A{i}: b\r\n" for i in range(9)) + "\r\n",
        "long_header": f"GET / HTTP/1.1\r\n{host}X: " + "a" * 200 + "\r\n\r\n",
        "long_target": "GET /" + "a" * 200 + f" HTTP/1.1\r\n{host}\r\n",
        "http_2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "empty_lines_first": f"\r\n\r\nGET / HTTP/1.1\r\n{host}\r\n",
    }
    for name, content in names.items():
        put("http", name, "\x03\x01\x07" + SEPARATOR + content)
    put("http", "tls", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")


# ---- request_json: which reader, then the body


def request_json():
    message = {"role": "user", "content": "hi"}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}
    chat = {
        "model": "m",
        "messages": [{"role": "system", "content": [{"type": "text", "text": "s"}]}, message],
        "max_completion_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 2**64 - 1,
        "stop": ["a", "b"],
        "logit_bias": {"5": -100},
        "logprobs": True,
        "top_logprobs": 3,
        "n": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True}},
        "metadata": {"a": "b"},
        "cache_salt": "s",
    }
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    bodies = {
        "chat": (0, chat),
        "chat_turns": (0, {"messages": [message, calls, {"role": "tool", "tool_call_id": "c", "content": "1"}]}),
        "chat_choice": (0, {"messages": [message], "structured_outputs": {"choice": ["a", "b"]}}),
        "completion": (1, {"prompt": "a", "echo": True, "logprobs": 2, "best_of": 3, "n": 2}),
        "completion_ids": (1, {"prompt": [1, 2, 3], "max_tokens": 0, "echo": True}),
        "completion_prompts": (1, {"prompt": ["a", "b"]}),
        "tokenize": (2, {"prompt": "a", "add_special_tokens": False, "return_token_strs": True}),
        "tokenize_chat": (2, {"messages": [message]}),
        "detokenize": (3, {"tokens": [0, 2**31 - 1]}),
        "template": (4, {"messages": [message], "add_generation_prompt": False, "continue_final_message": True}),
        "responses": (5, {"model": "m", "input": "a", "instructions": "b", "max_output_tokens": 5, "tools": [{"type": "function", "name": "f", "parameters": {}}]}),
        "responses_items": (5, {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]}], "stream": True}),
        "messages": (6, {"model": "m", "max_tokens": 5, "messages": [message], "system": "s", "stop_sequences": ["x"]}),
        "messages_blocks": (6, {"max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "tools": [{"name": "f", "input_schema": {"type": "object"}}]}),
        "count_tokens": (7, {"messages": [message]}),
        "embeddings": (8, {"input": ["a", "b"], "encoding_format": "base64", "dimensions": 8}),
        "embeddings_ids": (8, {"input": [[1, 2], [3]]}),
    }
    for name, (which, body) in bodies.items():
        put("request_json", name, bytes([which]) + compact(body).encode())
    bad = {
        "depth_65": b"[" * 65 + b"]" * 65,
        "depth_5000": b'{"a":' * 5000,
        "key_twice": b'{"prompt":"a","prompt":"b"}',
        "number_1e400": b'{"prompt":"a","temperature":1e400}',
        "number_2_to_63": b'{"prompt":"a","max_tokens":9223372036854775808}',
        "number_2_to_64": b'{"prompt":"a","seed":18446744073709551616}',
        "number_minus_1": b'{"prompt":"a","max_tokens":-1}',
        "number_half": b'{"prompt":"a","n":1.5}',
        "number_nan": b'{"prompt":"a","temperature":NaN}',
        "lone_surrogate": b'{"prompt":"\\ud800"}',
        "not_utf8": b'{"prompt":"\xff\xfe"}',
        "nul": b'{"prompt":"\\u0000"}',
        "trailing": b'{"prompt":"a"} x',
        "top_level_list": b"[1]",
        "null": b"null",
    }
    for name, body in bad.items():
        put("request_json", name, b"\x01" + body)


# ---- structured: kind, source


def structured():
    schemas = {
        "object": {"type": "object", "properties": {"a": {"type": "integer", "minimum": -3}, "b": {"type": "string", "maxLength": 3}}, "required": ["b"], "additionalProperties": False},
        "open_object": {"type": "object", "properties": {"name": {"type": "string"}}, "patternProperties": {"^x": {"type": "null"}}, "additionalProperties": {"type": "number"}},
        "tree": {"$ref": "#/$defs/t", "$defs": {"t": {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/t"}}}}}},
        "cycle": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        "cycle_all": {"allOf": [{"$ref": "#"}]},
        "never_ends": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        "array": {"type": "array", "prefixItems": [{"type": "boolean"}], "items": {"enum": [1, "a", None, {"k": []}]}, "minItems": 1, "maxItems": 4},
        "one_of": {"oneOf": [{"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]}, {"type": "object", "properties": {"k": {"const": "b"}}, "required": ["k"]}]},
        "all_of": {"allOf": [{"minLength": 2}, {"maxLength": 4, "pattern": "a+"}], "type": "string"},
        "formats": {"type": "array", "prefixItems": [{"type": "string", "format": f} for f in ("date", "uuid", "ipv6", "email")]},
        "number": {"type": "number", "exclusiveMinimum": 0.1, "maximum": 1e3, "multipleOf": 0.25},
        "counts": {"type": "object", "minProperties": 1, "maxProperties": 2, "propertyNames": {"maxLength": 3}},
        "dependencies": {"type": "object", "dependentRequired": {"a": ["b"]}, "dependentSchemas": {"c": {"minProperties": 2}}},
        "true": True,
        "false": False,
        "not_supported": {"type": "array", "uniqueItems": True},
        "long_repeat": {"type": "string", "minLength": 1000000, "pattern": "(ab|c)*"},
        "enum_1000": {"enum": [f"v{i}" for i in range(1000)]},
    }
    for name, schema in schemas.items():
        put("structured", f"schema_{name}", "s" + compact(schema))
    put("structured", "schema_compact", "S" + compact(schemas["tree"]))
    put("structured", "schema_key_twice", 's{"type":"null","type":"null"}')
    put("structured", "schema_deep", "s" + '{"items":' * 900 + "1" + "}" * 900)
    put("structured", "schema_cut", 's{"type":')
    patterns = {
        "email": r"[a-z0-9.]+@[a-z]+\.(com|org)",
        "classes": r"(?i)[^\x00-\x1f\p{Lu}]{2,5}\d\D\w\W\s\S.",
        "anchors": r"^(a|^b)$|\Ac\z",
        "blow_up": "((a|aa)*){1000}",
        "blow_up_nested": "(.{0,1999}){0,1999}",
        "blow_up_dfa": "(a|b)*a(a|b){25}",
        "back_reference": r"(a)\1",
        "look_around": "(?<=a)b",
        "deep": "(" * 3000,
        "empty": "",
        "broken": "[a-",
    }
    for name, pattern in patterns.items():
        put("structured", f"regex_{name}", "r" + pattern)
    grammars = {
        "sum": 'root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"',
        "brackets": 'root ::= [^()]* ("(" root ")" [^()]*)*',
        "ambiguous": 'root ::= a root "b" | b root "c" | ""\na ::= "a"\nb ::= "a" | "aa"',
        "left_recursive": 'root ::= x root "a" | "b"\nx ::= ""',
        "endless": 'root ::= "a" root',
        "undefined": "root ::= foo",
        "palindromes": 'root ::= [a-z] root [a-z] | "a" root "a" | "b" root "b" | ""',
        "repeats": 'root ::= ("a" | b{2,5}){1,3} # c\nb ::= [\\x41-\\u00e9]',
    }
    for name, grammar in grammars.items():
        put("structured", f"ebnf_{name}", "e" + grammar)
    put("structured", "stops", "t<tool_call>" + SEPARATOR + "aba" + SEPARATOR + "abab")
    put("structured", "bytes_short", "bTPGR")
    put("structured", "bytes_zero", b"b" + bytes(200))
    # One rule: a token, then a byte; no terminals.
    state = struct.pack("<BI", 0, 1) + struct.pack("<BBBII", 4, 0, 0, 300, 1)
    state += struct.pack("<BI", 0, 1) + struct.pack("<BBBII", 0, 97, 99, 0, 2) + struct.pack("<BI", 1, 0)
    put("structured", "bytes_token", b"b" + bytes(16) + struct.pack("<III", 0, 1, 0) + struct.pack("<I", 3) + state)
    # A rule that calls itself first.
    state = struct.pack("<BI", 0, 2) + struct.pack("<BBBII", 3, 0, 0, 0, 1) + struct.pack("<BBBII", 0, 97, 97, 0, 1)
    state += struct.pack("<BI", 1, 0)
    put("structured", "bytes_left_recursive", b"b" + bytes(16) + struct.pack("<III", 0, 1, 0) + struct.pack("<I", 2) + state)


# ---- batch: a form with the boundary B, the separator, lines of a batch


def batch():
    def part(name, data, filename=None):
        more = f'; filename="{filename}"' if filename else ""
        return f'--B\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{data}\r\n'

    def line(**fields):
        good = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x" * 200}}
        return compact({**good, **fields})

    form = part("purpose", "batch") + part("file", line(), "in.jsonl") + "--B--\r\n"
    chat = {"messages": [{"role": "user", "content": "y" * 90}], "tools": [{"type": "function"}], "max_tokens": 5}
    lines = [
        line(),
        line(url="/v1/chat/completions", body=chat),
        line(url="/v1/responses", body={"instructions": "z" * 70, "input": ["a", {"role": "user", "content": []}]}),
        line(url="/v1/embeddings", body={"input": [list(range(50))]}),
    ]
    names = {
        "good": form + SEPARATOR + "\n".join(lines) + "\n",
        "form_cut": form[:-9],
        "form_empty_part": part("file", "", "f") + "--B--",
        "form_many_parts": part("a", "b") * 17 + "--B--",
        "form_no_name": "--B\r\n\r\nx\r\n--B--",
        "form_preamble": "before\r\n" + form + "after",
        "form_quoted": part('a\\"b', "x", 'c\\"d') + "--B--",
        "form_nearly_delimiters": part("f", "\r\n--\r\n-\r\r\n--A\r\n--") + "--B--",
        "form_headers_long": "--B\r\nX: " + "x" * 8000 + "\r\n\r\n",
        "line_no_id": SEPARATOR + line(custom_id=None),
        "line_long_id": SEPARATOR + line(custom_id="\u00e9" * 513),
        "line_stream": SEPARATOR + line(body={"stream": True}),
        "line_url": SEPARATOR + line(url="/v1/files"),
        "line_deep": SEPARATOR + '{"custom_id":"a","body":' + "[" * 80 + "]" * 80 + "}",
        "line_twice": SEPARATOR + '{"custom_id":"a","custom_id":"b"}',
        "line_newline_id": SEPARATOR + line(custom_id="a\nb\u2028"),
    }
    for name, content in names.items():
        put("batch", name, content)


# ---- kv_codec


def kv_codec():
    """[shape byte | payload]; with 0x40 in the shape the target itself repairs header and checksum, so zeros do.

    Valid streams of the entropy coder, `encoded_*`, come from the encoder and are not written here.
    """
    # (layers, kv_heads, head_dim, block_tokens, bytes of a number), as in the target.
    layouts = [(1, 1, 16, 32, 2), (2, 2, 8, 16, 4), (2, 1, 5, 33, 2), (1, 1, 1, 1, 2), (3, 2, 20, 7, 2), (1, 1, 64, 64, 2)]
    codecs = ["none", "int8", "fp8", "int4", "cachegen-1", "cachegen-2", "cachegen-3", "cachegen"]

    def shape(layout, codec, repaired=True):
        return next(b for b in range(256) if b % 6 == layout and (b >> 3) % 8 == codec and bool(b & 0x40) == repaired)

    def body(layout, codec):
        layers, heads, dim, tokens, size = layouts[layout]
        if codec in ("int8", "fp8"):
            return 2 * layers * heads * (4 + tokens * dim)
        if codec == "int4":
            row = dim // 32 * 16 + (dim % 32 + 1) // 2
            k = -(-tokens // 32) * dim * 2 * size + tokens * row
            v = tokens * (-(-dim // 32) * 2 * size + row)
            return layers * heads * (k + v)
        return 2 * layers * heads * tokens * dim * size

    for layout in range(len(layouts)):
        for c, codec in enumerate(codecs[:4]):
            try:
                head = bytes([shape(layout, c)])
            except StopIteration:  # not every pair has a byte
                continue
            content = bytes((i * 37 + i // 11) % 256 for i in range(body(layout, codec)))
            put("kv_codec", f"good_{codec}_{layout}", head + bytes(28) + content + bytes(8))
    layers, heads, dim, tokens, size = layouts[0]
    raw = b"\x01" + bytes(range(256)) * (2 * layers * heads * dim * tokens * size // 256)
    for c in (4, 7):
        for layout in (0, 3):
            try:
                head = bytes([shape(layout, c)])
            except StopIteration:
                continue
            put("kv_codec", f"stream_raw_{c}_{layout}", head + bytes(28) + raw + bytes(8))
            put("kv_codec", f"stream_coded_{c}_{layout}", head + bytes(28) + b"\0" + bytes(range(200)) + bytes(8))
    put("kv_codec", "unrepaired", b"\x01TPKC\x01\x01\x02\0" + bytes(60))
    put("kv_codec", "no_bytes", b"")
    put("kv_codec", "short", b"\x41TPKC")


def disk_record():
    """[kind | bytes]: r a record's header area, i key and value of the index; R and I have their checksum repaired.
    [width | bytes that are to come out, u16 | encoded payload]."""

    def record(layout=b"l2 h1 d8 b4 bfloat16", tenant=b"tenant", tokens=(1, 2, 3, 4), used=None, parent=bytes(range(32)), flags=1,
               count=None, seconds=0.5, area=640, version=1, stored=None):
        fixed = struct.pack("<QQQ", 1, 2, 3) + bytes([7]) * 32 + bytes([8]) * 32 + parent
        fixed += struct.pack("<QIIfI", 9, 1, 0, seconds, flags) + struct.pack("<QIHHI", 256, 0xDEADBEEF, len(layout), len(tenant),
                                                                              len(tokens) if count is None else count)
        fixed += b"" if stored is None else struct.pack("<QII", *stored)
        body = fixed + layout + tenant + struct.pack(f"<{len(tokens)}i", *tokens)
        text = b"TPKVREC" + b"%d" % version + struct.pack("<II", 0, 16 + len(body) if used is None else used) + body
        return text + bytes(max(0, area - len(text)))

    headers = {
        "good": record(),
        "no_parent": record(parent=bytes(32), flags=0),
        "nothing": record(layout=b"", tenant=b"", tokens=()),
        "parent_without_flag": record(flags=0),
        "unknown_flag": record(flags=2),
        "many_tokens": record(count=2**32 - 1),
        "used_0": record(used=0),
        "used_beyond": record(used=2**31),
        "not_finite": record(seconds=float("nan")),
        "short": record()[:100],
        "bytes_behind": record()[:-1] + b"x",
        "long_tenant": record(tenant=b"t" * 300),
        # Of more tokens than a block has: they fit, and with version 2's longer fixed part would not.
        "tokens_to_the_end": record(layout=b"", tenant=b"", tokens=tuple(range(115))),
        "version_2": record(version=2, stored=(256, 0xDEADBEEF, 0)),
        "version_2_encoded": record(version=2, stored=(200, 1, 1)),
        "version_2_plain_of_other_length": record(version=2, stored=(200, 1, 0)),
        "version_2_unknown_encoding": record(version=2, stored=(200, 1, 2)),
        "version_3": record(version=3, stored=(200, 1, 1)),
    }
    for name, content in headers.items():
        put("disk_record", f"record_{name}", b"R" + content)
    put("disk_record", "record_unrepaired", b"r" + record())

    def entry(version=1, flags=1, tenant=b"tenant", length=None, seconds=1.5, parent=bytes(range(32)), stored=b""):
        return bytes([3]) * 32 + struct.pack("<BBHIQQQQQQIIf", version, flags, len(tenant) if length is None else length, 1, 2, 3, 4,
                                             5, 4096, 6, 7, 8, seconds) + parent + stored + tenant + bytes(4)

    entries = {
        "good": entry(),
        "no_parent": entry(flags=0, parent=bytes(32)),
        "parent_without_flag": entry(flags=0),
        "version_2": entry(version=2, stored=struct.pack("<QB", 4096, 0)),
        "version_2_encoded": entry(version=2, stored=struct.pack("<QB", 3000, 1)),
        "version_2_cut": entry(version=2),
        "version_2_unknown_encoding": entry(version=2, stored=struct.pack("<QB", 3000, 9)),
        "flags_7": entry(flags=7),
        "long_tenant": entry(tenant=b"t" * 300),
        "length_beyond": entry(length=65535),
        "not_finite": entry(seconds=float("inf")),
        "short": entry()[:40],
    }
    for name, content in entries.items():
        put("disk_record", f"index_{name}", b"I" + content)
    put("disk_record", "index_unrepaired", b"i" + entry())
    put("disk_record", "no_bytes", b"")

    def plane(content):
        return struct.pack("<I", len(content)), content

    def zeros(count):  # a zstd frame of one block: so many zeros
        frame = b"\x28\xb5\x2f\xfd\x20" + bytes([count]) + struct.pack("<I", count << 3 | 3)[:3] + b"\0"
        return struct.pack("<I", len(frame) | 1 << 31), frame

    def payload(width, count, planes, rest=b"", version=1):
        return (b"%d" % width + struct.pack("<H", count) + bytes([version, width, 0, 0]) + b"".join(p[0] for p in planes) +
                b"".join(p[1] for p in planes) + rest)

    payloads = {
        "bytes": payload(1, 5, [plane(b"hello")]),
        "halves": payload(2, 9, [zeros(4), plane(b"abcd")], b"x"),
        "floats": payload(4, 12, [zeros(3), plane(b"abc"), plane(b"def"), zeros(3)]),
        "nothing": payload(2, 0, [plane(b""), plane(b"")]),
        "plane_of_other_length": payload(2, 8, [zeros(5), plane(b"abcd")]),
        "plane_beyond": payload(1, 5, [(struct.pack("<I", 2**31 - 1), b"hello")]),
        "rest_missing": payload(2, 9, [zeros(4), plane(b"abcd")]),
        "other_version": payload(1, 5, [plane(b"hello")], version=2),
        "short": b"2\x08\x00\x01\x02",
    }
    for name, content in payloads.items():
        put("disk_record", f"payload_{name}", content)


def fetch_frame():
    """[kind | bytes]: F a frame without its sum, D count and bytes of a batch; f and d are not repaired."""

    def text(content):
        return struct.pack("<H", len(content)) + content

    def fid(request=b"req-1"):
        return text(request) + struct.pack("<III", 1, 2, 3)

    def data_range(index=0, begin=0, end=4, codec=0, length=64, slot=5, generation=9):
        return struct.pack("<IIQIIBQQ", index, slot, generation, begin, end, codec, length, 0x1122334455667788)

    def frame(kind, body, version=3, magic=b"TPKV", boots=(b"boot-a", b"boot-b")):
        return magic + bytes([version, kind]) + text(boots[0]) + text(boots[1]) + body

    def fetch(count, items, window=1 << 20):
        return fid() + struct.pack("<IQI", 5000, window, count) + (bytes(range(32)) + struct.pack("<IQ", 3, 7)) * items

    frames = {
        "hello": frame(1, text(b"worker") + text(b"fp") + text(b"l2 h1 d8 b4 bfloat16")),
        "hello_v1": frame(1, text(b"worker") + text(b"fp") + text(b"l2"), version=1),
        "hello_ack": frame(2, text(b"worker")),
        "refuse": frame(3, fid() + b"\x03" + text(b"busy")),
        "refuse_v9": frame(3, fid(b"") + b"\x02" + text(b"differs"), version=9),
        "fetch": frame(4, fetch(2, 2)),
        "fetch_none": frame(4, fetch(0, 0)),
        "fetch_short": frame(4, fetch(3, 2)),
        "fetch_huge_count": frame(4, fetch(2**32 - 1, 1)),
        "fetch_beyond": frame(4, fetch(4097, 4097)),
        "data": frame(5, fid() + data_range()),
        "data_codec": frame(5, fid() + data_range(codec=3, length=2**63)),
        "data_backwards": frame(5, fid() + data_range(begin=4, end=1)),
        "data_v1": frame(5, fid() + data_range(), version=1),
        "commit": frame(6, fid() + struct.pack("<IQQI", 1, 64, 77, 2) + struct.pack("<BQ", 1, 5) + struct.pack("<BQ", 0, 0)),
        "commit_ack": frame(7, fid()),
        "abort": frame(8, fid()),
        "release": frame(9, text(b"req-1")),
        "credit": frame(10, fid() + struct.pack("<QQB", 4096, 1 << 20, 1)),
        "progress": frame(11, fid() + struct.pack("<Q", 4096)),
        "batch": frame(12, fid() + struct.pack("<IQQ", 2, 210, 99)),
        "unknown_type": frame(13, fid()),
        "type_0": frame(0, fid()),
        "other_magic": frame(7, fid(), magic=b"TPKW"),
        "long_id": frame(7, fid(b"r" * 129)),
        "long_boot": frame(7, fid(), boots=(b"b" * 65, b"")),
        "trailing": frame(7, fid() + b"x"),
        "only_magic": b"TPKV",
        "string_beyond": frame(9, b"\xff\xff" + b"abc"),
    }
    for name, content in frames.items():
        put("fetch_frame", name, b"F" + content)
    put("fetch_frame", "unrepaired", b"f" + frames["commit_ack"] + bytes(8))
    payload = bytes(64)
    batches = {
        "one": (1, data_range() + payload),
        "two": (2, data_range() + data_range(index=1, length=32) + payload + payload[:32]),
        "none": (0, b""),
        "short": (2, data_range() + payload),
        "longer": (1, data_range() + payload + b"x"),
        "overflow": (2, data_range(length=2**64 - 1) + data_range(length=65) + payload),
    }
    for name, (count, content) in batches.items():
        put("fetch_frame", f"batch_{name}", b"D" + bytes([count]) + content)
    put("fetch_frame", "batch_unrepaired", b"d\x01" + data_range() + payload)


# ---- frames of the TLS transport


def tls_frame():
    def head(kind, header_bytes=0, length=0, version=1, zero=0):
        return struct.pack("<BBHIQ", version, kind, header_bytes, zero, length)

    message, bulk, chunk, alive = 1, 2, 3, 4
    hello = head(message, length=5) + b"hello"
    open_bulk = head(bulk, 2, 10) + b"hd"
    streams = {
        "message": hello,
        "empty_message": head(message),
        "keepalive": head(alive) + hello,
        "bulk": open_bulk + head(chunk, length=4) + b"0123" + hello + head(chunk, length=6) + b"456789",
        "empty_bulk": head(bulk) + hello,
        "dropped_bulk": head(bulk, length=5000) + head(chunk, length=5000) + bytes(5000) + hello,
        "cut_head": hello[:9],
        "cut_bulk": open_bulk + head(chunk, length=10) + b"0123",
        "version": head(message, version=2),
        "reserved": head(message, zero=1),
        "type": head(9),
        "message_header": head(message, 1),
        "message_huge": head(message, length=2**64 - 1),
        "message_above": head(message, length=256 * 1024 + 1),
        "bulk_huge": head(bulk, length=2**64 - 1),
        "bulk_header_above": head(bulk, 513),
        "chunk_alone": head(chunk, length=1),
        "chunk_above": open_bulk + head(chunk, length=11),
        "chunk_empty": open_bulk + head(chunk),
        "bulk_twice": open_bulk + open_bulk,
        "keepalive_body": head(alive, length=1),
    }
    for name, content in streams.items():
        put("tls_frame", name, content)


def cluster_value():
    member = {
        "id": "decode-1",
        "role": "decode",
        "boot_id": "a" * 32,
        "address": "10.0.0.1:8100",
        "version": "0.1",
        "fingerprint": "f" * 64,
        "pid": 4711,
        "host": "h",
        "term": "7",
    }
    members = {
        "good": compact(member),
        "newer": compact(dict(member, colour={"of": ["the", "sea"]})),
        "term_number": compact(dict(member, term=7)),
        "term_2_to_64_minus_1": compact(dict(member, term=str(2**64 - 1))),
        "term_2_to_64": compact(dict(member, term=str(2**64))),
        "term_negative": compact(dict(member, term="-1")),
        "address_none": compact(dict(member, address="nowhere")),
        "id_empty": compact(dict(member, id="")),
        "key_twice": compact(member)[:-1] + ',"id":"x"}',
        "deep": "[" * 200 + "]" * 200,
        "cut": compact(member)[:-5],
        "list": "[]",
        "not_utf8": b"m{\"id\":\"\xff\xfe\"}",
        "above": compact(dict(member, host="h" * 5000)),
    }
    for name, content in members.items():
        put("cluster_value", "member_" + name, content if isinstance(content, bytes) else "m" + content)
    for number in ("", "0", "7", "007", "-1", " 7", "7x", str(2**62), str(2**64 - 1), str(2**64)):
        put("cluster_value", "term_" + (number.replace(" ", "_") or "empty"), "t" + number)
    authors = {
        "good": compact({"who": "root@here", "when": "2026-01-02T03:04:05Z"}),
        "zone": compact({"who": "root@here", "when": "2026-01-02T03:04:05.678+09:30"}),
        "infinite": compact({"who": "x", "when": "infinite-future"}),
        "control": '{"who":"a\\nb\\u202e","when":"2026-01-02T03:04:05Z"}',
        "number": compact({"who": 1, "when": 2}),
    }
    for name, content in authors.items():
        put("cluster_value", "author_" + name, "a" + content)
    documents = {
        "empty": "",
        "comment": "# as in the files\n",
        "live": "scheduler:\n  slo: {ttft: 8s, itl: 200ms}\n  classes: {batch: {ttft: 10m}}\n  placement: mooncake\n"
        "kv:\n  tenant_quota_bytes: 1GiB\n  tenant_quotas: {a: 256MiB, b: 0B}\n"
        "gateway:\n  tenant_limits: {requests_per_minute: 60, max_inflight: 4}\nlog: {level: debug}\n",
        "restart": "engine: {max_batch: 64, order: fcfs}\nworker: {prefill_timeout: 5s}\nstore: {follow: all}\n",
        "refused": "worker: {id: a}\ncluster: {etcd: [h:1]}\ngateway: {server_key: x, tls: {cert: y}}\n",
        "keys": "gateway:\n  api_keys:\n    - {key_sha256: ab, tenant: t}\n",
        "quotas_twice": "kv: {tenant_quotas: {a: 1MiB, a: 2MiB}}\n",
        "quotas_parted": 'kv: {tenant_quotas: {"a,b": 1MiB, "c:d": "1MiB,e:2MiB"}}\n',
        "unknown": "scheduler: {placment: tidepool}\n",
        "together": "engine: {max_batch: 512}\n",
        "two": "kv: {}\n---\nkv: {}\n",
        "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nscheduler: {slo: *b}\n",
        "own_alias": "scheduler: &s {slo: *s}\n",
        "merge": "scheduler: {<<: {slo: {ttft: 1s}}}\n",
        "tag": "scheduler: !!binary aGk=\n",
        "key_list": "? [a, b]\n: c\n",
        "deep": "[" * 3000,
        "deep_map": "{a: " * 1500,
        "not_utf8": b"cscheduler: {placement: \xff\xfe}\n",
        "nul": b"clog: {level: \"in\\0fo\"}\n",
    }
    for name, content in documents.items():
        put("cluster_value", "config_" + name, content if isinstance(content, bytes) else "c" + content)


def main():
    for make in (cluster_value, tls_frame, batch, structured, kv_codec, disk_record, fetch_frame, safetensors, config_json, tokenizer_json, tokenizer_text, detokenizer, chat_template, http, request_json):
        make()
    folder = os.path.join(HERE, "tokenizers")
    os.makedirs(folder, exist_ok=True)
    for name, content in (("sentencepiece", sentencepiece()), ("unigram", json.loads(unigram_of_text()))):
        with open(os.path.join(folder, f"{name}.json"), "w") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
