"""The checkpoints that make_families.py builds: one Case for every family and for what a family has of its own.

A config is spelled as the family's checkpoints on the hub spell it (`rope_theta`, `rope_scaling`, `torch_dtype`),
except where `own_spelling` leaves what `save_pretrained` of the pinned transformers wrote (`rope_parameters`).
Sizes are tiny and uneven on purpose: head_dim differs from hidden / heads where the family allows it, windows are
shorter than the prompts, scaling begins inside them.
"""

import dataclasses
import re
from typing import Any

import torch

VOCAB = 260  # 256 bytes and the four specials of the shared tokenizer, see byte_tokenizer.py
BOS, EOS, EOS2, PAD = 256, 257, 258, 259

# One token; inside a window; with every position's logits; a whole block; one more; far beyond window and scaling.
LENGTHS = (1, 5, 16, 32, 33, 50, 75, 100)


@dataclasses.dataclass(frozen=True)
class Feature:
    """Something of the family that must show in the logits, and how to take it away.

    `config` replaces fields of config.json (a dotted name reaches into text_config; None removes the field);
    `edit`, a function of the loaded model, does what no config field can.
    """

    name: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    edit: Any = None


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    config: dict[str, Any]
    features: tuple[Feature, ...] = ()
    dtype: str = "bfloat16"
    generation: dict[str, Any] | None = None  # generation_config.json
    own_spelling: bool = False
    shard_bytes: int | None = None
    lengths: tuple[int, ...] = LENGTHS
    # What the engine is told where it matters (it fixes its rotary frequencies when it loads): tokens of prompt and
    # answer. transformers chooses by the running length, so the prompts' lengths leave it no other choice.
    max_model_len: int | None = None
    # A length to which transformers' dynamic frequencies are stretched before anything is computed.
    stretch: int | None = None
    gains: dict[str, float] = dataclasses.field(default_factory=dict)  # see weights()


# What takes a feature away without a config field for it.


def zero(pattern):
    return lambda model: _each(model, pattern, lambda p: p.zero_())


def ones(pattern):
    return lambda model: _each(model, pattern, lambda p: p.fill_(1.0))


def shift(pattern, by):
    return lambda model: _each(model, pattern, lambda p: p.add_(by))


def _each(model, pattern, change):
    found = [p for name, p in model.named_parameters() if re.search(pattern, name)]
    assert found, pattern
    for parameter in found:
        change(parameter.data)


def no_norm(name):
    """Replaces each submodule of that name by one that does nothing."""

    def edit(model):
        owners = [m for _, m in model.named_modules() if hasattr(m, name)]
        assert owners, name
        for owner in owners:
            setattr(owner, name, torch.nn.Identity())

    return edit


def no_embedding_scale(model):
    model.get_input_embeddings().embed_scale.fill_(1.0)


def one_expert_less(model):
    for _, module in model.named_modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.top_k -= 1


def base(architecture, model_type, **fields):
    out = {
        "architectures": [architecture],
        "model_type": model_type,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "hidden_act": "silu",
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    out.update(fields)
    return {key: value for key, value in out.items() if value is not ...}


def llama(**fields):
    return base("LlamaForCausalLM", "llama", **{"attention_bias": False, "mlp_bias": False, **fields})


LLAMA31_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
# head_dim 12: six frequencies.
LONG_FACTOR = [1.1, 1.6, 2.7, 5.0, 9.5, 14.0]
SHORT_FACTOR = [1.0, 1.05, 1.3, 1.8, 2.2, 3.1]

UNSCALED = Feature("rope_scaling", {"rope_scaling": None})
THETA = Feature("rope_theta", {"rope_theta": 10000.0})


def phi3(**fields):
    return base(
        "Phi3ForCausalLM",
        "phi3",
        **{
            "num_key_value_heads": 4,
            "original_max_position_embeddings": 256,
            "rope_scaling": None,
            "sliding_window": 24,
            "attention_bias": False,
            "pad_token_id": PAD,
            **fields,
        },
    )


def longrope(short=SHORT_FACTOR, long=LONG_FACTOR):
    return {"type": "longrope", "short_factor": short, "long_factor": long}


def gemma(architecture, model_type, **fields):
    return base(
        architecture,
        model_type,
        **{
            "hidden_act": ...,
            "hidden_activation": "gelu_pytorch_tanh",
            "head_dim": 16,
            "attention_bias": False,
            "pad_token_id": PAD,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": ...,  # on the hub: the family's default, tied
            **fields,
        },
    )


GEMMA_FEATURES = (
    Feature("embedding scale", edit=no_embedding_scale),
    Feature("norm weights count from one", edit=shift("norm", -1.0)),
)

# The scaled embedding would drown what attention and MLP add.
GEMMA_GAINS = {
    r"embed_tokens": 0.15,
    r"model\.norm": 3.0,
    r"post_attention_layernorm": 9.0,
    r"post_feedforward_layernorm": 4.0,
    r"[qk]_norm": 2.0,
}

GEMMA3_TEXT = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 30,
    "sliding_window": 12,
    "rope_local_base_freq": 100.0,
    "rope_theta": 10000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


def gemma3_features(prefix=""):
    return (
        Feature("sliding window", {prefix + "sliding_window": 4096}),
        Feature("rope_scaling", {prefix + "rope_scaling": None}),
        Feature("rope_local_base_freq", {prefix + "rope_local_base_freq": 10000.0}),
        Feature("query_pre_attn_scalar", {prefix + "query_pre_attn_scalar": 16}),
        Feature("QK norm", edit=no_norm("q_norm")),
        *GEMMA_FEATURES,
    )


def mixtral(**fields):
    return base(
        "MixtralForCausalLM",
        "mixtral",
        **{
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 24,
            "router_aux_loss_coef": 0.02,
            "output_router_logits": False,
            "sliding_window": None,
            "rope_theta": 1000000.0,
            **fields,
        },
    )


def qwen3_moe(**fields):
    return base(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        **{
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 16,
            "mlp_only_layers": [],
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_scaling": None,
            "sliding_window": None,
            "use_sliding_window": False,
            "max_window_layers": 2,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            **fields,
        },
    )


CASES = (
    Case(
        "llama2",
        llama(num_key_value_heads=4, torch_dtype="float16", rope_theta=..., rope_scaling=None, pad_token_id=PAD),
        (Feature("hidden_act", {"hidden_act": "gelu"}), Feature("rope_theta", {"rope_theta": 300.0})),
        dtype="float16",
        generation={"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "temperature": 0.6, "top_p": 0.9,
                    "do_sample": True},
    ),
    Case(
        "llama3",
        llama(num_attention_heads=6, rope_theta=500000.0),
        (THETA, Feature("rms_norm_eps", {"rms_norm_eps": 1e-2})),
        generation={"bos_token_id": BOS, "eos_token_id": [EOS, EOS2], "do_sample": True, "temperature": 0.6,
                    "top_p": 0.9},
    ),
    Case(
        "llama3.1",
        llama(num_key_value_heads=1, hidden_size=64, rope_theta=500000.0, rope_scaling=LLAMA31_ROPE,
              eos_token_id=[EOS, EOS2]),
        (UNSCALED,),
    ),
    Case(
        "llama3.2",
        llama(head_dim=12, rope_theta=500000.0, rope_scaling=dict(LLAMA31_ROPE, factor=32.0, high_freq_factor=3.0),
              tie_word_embeddings=True, eos_token_id=[EOS, EOS2]),
        (UNSCALED,),
        own_spelling=True,
    ),
    Case(
        "llama-linear",
        llama(rope_scaling={"factor": 4.0, "type": "linear"}, torch_dtype="float32", tie_word_embeddings=True,
              max_position_embeddings=64),
        (UNSCALED,),
        dtype="float32",
        max_model_len=256,
    ),
    # Shorter than max_position_embeddings: as unscaled.
    Case(
        "llama-dynamic",
        llama(rope_scaling={"factor": 2.0, "type": "dynamic"}),
        (Feature("rope_theta", {"rope_theta": 300.0}),),
        max_model_len=256,
    ),
    # Longer, all the time: transformers keeps the frequencies of the longest text that it has seen.
    Case(
        "llama-dynamic-long",
        llama(rope_scaling={"factor": 6.0, "type": "dynamic"}, max_position_embeddings=32),
        (UNSCALED, Feature("the length that fixes the frequencies")),
        lengths=(33, 34, 40, 50, 64, 65, 80, 100),
        max_model_len=192,
        stretch=192,
    ),
    Case(
        "llama-yarn",
        llama(num_attention_heads=3, num_key_value_heads=1, rope_scaling={
            "factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "yarn"}),
        (UNSCALED,
         Feature("attention factor", {"rope_scaling.attention_factor": 1.0}),
         Feature("ramp", {"rope_scaling.beta_fast": 2.0, "rope_scaling.beta_slow": 0.1})),
    ),
    Case(
        "llama-bias",
        llama(attention_bias=True, mlp_bias=True),
        (Feature("attention_bias", edit=zero(r"(q|v|o)_proj\.bias")),
         Feature("mlp_bias", edit=zero(r"(gate|up|down)_proj\.bias"))),
    ),
    Case(
        "mistral",
        base("MistralForCausalLM", "mistral", num_hidden_layers=3, head_dim=16, sliding_window=24),
        (Feature("sliding window", {"sliding_window": None}),
         Feature("sliding window's width", {"sliding_window": 25})),
        shard_bytes=48 << 10,
    ),
    # As on the hub, more rows in the embedding than the tokenizer has tokens.
    Case(
        "qwen2",
        base("Qwen2ForCausalLM", "qwen2", rope_theta=1000000.0, rms_norm_eps=1e-6, vocab_size=272,
             use_sliding_window=False, sliding_window=24, max_window_layers=1),
        (Feature("QKV bias", edit=zero(r"(q|v)_proj\.bias")), THETA,
         Feature("use_sliding_window", {"use_sliding_window": True})),
    ),
    Case(
        "qwen2.5",
        base("Qwen2ForCausalLM", "qwen2", rope_theta=1000000.0, rms_norm_eps=1e-6, num_hidden_layers=3,
             use_sliding_window=True, sliding_window=16, max_window_layers=2, tie_word_embeddings=True),
        (Feature("sliding window", {"use_sliding_window": False}),
         Feature("max_window_layers", {"max_window_layers": 1}),
         Feature("QKV bias", edit=zero(r"(q|v)_proj\.bias"))),
    ),
    Case(
        "qwen3",
        base("Qwen3ForCausalLM", "qwen3", rope_theta=1000000.0, rms_norm_eps=1e-6, head_dim=16, attention_bias=False,
             use_sliding_window=False, sliding_window=None, max_window_layers=2, tie_word_embeddings=True,
             rope_scaling=None),
        (Feature("QK norm", edit=no_norm("q_norm")), Feature("QK norm's weights", edit=ones(r"[qk]_norm")), THETA),
        own_spelling=True,
    ),
    Case(
        "qwen3-yarn",
        base("Qwen3ForCausalLM", "qwen3", rope_theta=1000000.0, rms_norm_eps=1e-6, head_dim=16, attention_bias=False,
             use_sliding_window=False, sliding_window=None, max_window_layers=2, rope_scaling={
                 "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3,
                 "beta_fast": 2.0, "beta_slow": 0.1}),
        (UNSCALED,
         Feature("attention_factor", {"rope_scaling.attention_factor": None}),
         Feature("beta_fast, beta_slow", {"rope_scaling.beta_fast": None, "rope_scaling.beta_slow": None})),
    ),
    Case(
        "smollm2",
        llama(num_attention_heads=3, num_key_value_heads=1, rope_theta=100000.0, tie_word_embeddings=True,
              rope_scaling=None, rope_interleaved=False, is_llama_config=True, pad_token_id=PAD, pretraining_tp=1),
        (THETA,),
    ),
    Case(
        "phi3",
        phi3(),
        (Feature("sliding window", {"sliding_window": None}),),
    ),
    # Up to original_max_position_embeddings tokens: short factors.
    Case(
        "phi3-longrope-short",
        phi3(sliding_window=200, max_position_embeddings=768, original_max_position_embeddings=192,
             rope_scaling=longrope()),
        (UNSCALED, Feature("short_factor", {"rope_scaling.short_factor": LONG_FACTOR}),
         Feature("attention factor", {"rope_scaling.attention_factor": 1.0})),
        max_model_len=192,
    ),
    # Beyond it, all the time: long factors.
    Case(
        "phi3-longrope-long",
        phi3(sliding_window=200, max_position_embeddings=256, original_max_position_embeddings=32,
             rope_scaling=longrope()),
        (UNSCALED, Feature("long_factor", {"rope_scaling.long_factor": SHORT_FACTOR}),
         Feature("attention factor", {"rope_scaling.attention_factor": 1.0})),
        lengths=(33, 34, 40, 50, 64, 65, 80, 100),
        max_model_len=256,
    ),
    Case(
        "phi4-mini",
        phi3(num_attention_heads=3, num_key_value_heads=1, partial_rotary_factor=0.75, tie_word_embeddings=True,
             sliding_window=200, max_position_embeddings=256, original_max_position_embeddings=32,
             rope_scaling=longrope([1.0] * 6)),
        (UNSCALED,
         Feature("partial_rotary_factor", {"partial_rotary_factor": 1.0, "rope_scaling": longrope(
             [1.0] * 8, [*LONG_FACTOR, 14.0, 14.0])})),
        lengths=(33, 34, 40, 50, 64, 65, 80, 100),
        max_model_len=256,
    ),
    Case(
        "gemma",
        gemma("GemmaForCausalLM", "gemma", num_key_value_heads=1, hidden_act="gelu", hidden_activation=None),
        (*GEMMA_FEATURES, Feature("GELU", {"hidden_act": "silu"})),
        gains={r"(o|down)_proj": 8.0},
    ),
    Case(
        "gemma2",
        gemma("Gemma2ForCausalLM", "gemma2", num_hidden_layers=2, hidden_act="gelu_pytorch_tanh",
              query_pre_attn_scalar=30, sliding_window=24, attn_logit_softcapping=4.0, final_logit_softcapping=12.0),
        (Feature("attn_logit_softcapping", {"attn_logit_softcapping": None}),
         Feature("final_logit_softcapping", {"final_logit_softcapping": None}),
         Feature("sliding window", {"sliding_window": 4096}),
         Feature("which layers slide", {"layer_types": ["full_attention", "sliding_attention"]}),
         Feature("query_pre_attn_scalar", {"query_pre_attn_scalar": 16}),
         Feature("GELU", {"hidden_activation": "silu"}),
         Feature("norm after attention", edit=no_norm("post_attention_layernorm")),
         Feature("norm after the MLP", edit=no_norm("post_feedforward_layernorm")),
         *GEMMA_FEATURES),
        gains={**GEMMA_GAINS, r"[qk]_proj": 2.5},
    ),
    Case(
        "gemma3",
        gemma("Gemma3ForCausalLM", "gemma3_text", **GEMMA3_TEXT, sliding_window_pattern=3),
        gemma3_features(),
        generation={"bos_token_id": BOS, "eos_token_id": [EOS, EOS2], "pad_token_id": PAD, "do_sample": True,
                    "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid"},
        gains=GEMMA_GAINS,
    ),
    Case(
        "gemma3-conditional",
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "boi_token_index": 250,
            "eoi_token_index": 251,
            "image_token_index": 252,
            "eos_token_id": [EOS, EOS2],
            "mm_tokens_per_image": 4,
            "text_config": {
                key: value
                for key, value in gemma("", "gemma3_text", **GEMMA3_TEXT, layer_types=[
                    "sliding_attention", "full_attention", "sliding_attention"]).items()
                if key not in ("architectures", "torch_dtype", "eos_token_id")
            },
            "torch_dtype": "bfloat16",
            "vision_config": {
                "hidden_size": 16,
                "image_size": 16,
                "intermediate_size": 16,
                "model_type": "siglip_vision_model",
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "patch_size": 4,
                "vision_use_head": False,
            },
        },
        (*gemma3_features("text_config."),
         Feature("layer_types", {"text_config.layer_types": [
             "full_attention", "sliding_attention", "sliding_attention"]})),
        gains=GEMMA_GAINS,
    ),
    Case(
        "mixtral",
        mixtral(),
        (Feature("routing weights", edit=zero(r"\.gate\.weight")),
         Feature("experts a token", edit=one_expert_less), THETA),
    ),
    Case(
        "qwen3-moe",
        qwen3_moe(),
        (Feature("routing weights", edit=zero(r"\.gate\.weight")),
         Feature("experts a token", edit=one_expert_less),
         Feature("norm_topk_prob", {"norm_topk_prob": False}),
         Feature("QK norm", edit=no_norm("q_norm"))),
    ),
    # Weights of the chosen experts as the softmax gave them, and one layer without experts.
    Case(
        "qwen3-moe-mixed",
        qwen3_moe(norm_topk_prob=False, mlp_only_layers=[1], intermediate_size=36),
        (Feature("norm_topk_prob", {"norm_topk_prob": True}),
         Feature("experts a token", edit=one_expert_less)),
        own_spelling=True,
    ),
)
