#include "server/gateway/openai_fields.h"

#include <algorithm>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "base/log.h"

namespace tidepool {
namespace {

constexpr Endpoint kChat = Endpoint::kChat, kText = Endpoint::kText, kBoth = Endpoint::kBoth;
constexpr FieldUse kServed = FieldUse::kServed, kTaken = FieldUse::kTaken, kRefused = FieldUse::kRefused;

constexpr KnownField kFields[] = {
    {"messages", kChat, kServed},
    {"prompt", kText, kServed},
    {"model", kBoth, kServed},
    {"max_tokens", kBoth, kServed},
    {"max_completion_tokens", kBoth, kServed},
    {"min_tokens", kBoth, kServed},
    {"temperature", kBoth, kServed},
    {"top_p", kBoth, kServed},
    {"top_k", kBoth, kServed},
    {"min_p", kBoth, kServed},
    {"typical_p", kBoth, kServed},
    {"repetition_penalty", kBoth, kServed},
    {"presence_penalty", kBoth, kServed},
    {"frequency_penalty", kBoth, kServed},
    {"logit_bias", kBoth, kServed},
    {"allowed_token_ids", kBoth, kServed},
    {"bad_words", kBoth, kServed},
    {"seed", kBoth, kServed},
    {"n", kBoth, kServed},
    {"best_of", kBoth, kServed},
    {"echo", kText, kServed, "false"},
    {"stop", kBoth, kServed},
    {"stop_token_ids", kBoth, kServed},
    {"include_stop_str_in_output", kBoth, kServed},
    {"ignore_eos", kBoth, kServed},
    {"skip_special_tokens", kBoth, kServed},
    {"logprobs", kBoth, kServed},
    {"top_logprobs", kChat, kServed, "0"},
    {"prompt_logprobs", kBoth, kServed},
    {"return_tokens_as_token_ids", kBoth, kServed},
    {"return_token_ids", kBoth, kServed},
    {"return_trace", kBoth, kServed},
    {"stream", kBoth, kServed},
    {"stream_options", kBoth, kServed},
    {"add_special_tokens", kBoth, kServed},
    {"truncate_prompt_tokens", kBoth, kServed},
    {"add_generation_prompt", kChat, kServed},
    {"continue_final_message", kChat, kServed, "false"},
    {"chat_template_kwargs", kChat, kServed},
    {"reasoning_effort", kChat, kServed, "\"none\""},
    {"include_reasoning", kChat, kServed, "true"},
    {"tools", kChat, kServed},
    {"tool_choice", kChat, kServed, "\"none\""},
    {"parallel_tool_calls", kChat, kServed, "true"},
    {"response_format", kBoth, kServed},
    {"structured_outputs", kBoth, kServed},
    {"guided_json", kBoth, kServed},
    {"guided_regex", kBoth, kServed},
    {"guided_choice", kBoth, kServed},
    {"guided_grammar", kBoth, kServed},
    {"json_schema", kBoth, kServed},
    {"grammar", kBoth, kServed},
    {"regex", kBoth, kServed},
    {"ebnf", kBoth, kServed},
    {"priority", kBoth, kServed},
    {"cache_salt", kBoth, kServed},
    {"request_id", kBoth, kServed},
    {"metadata", kBoth, kServed},
    {"service_tier", kBoth, kServed},

    {"user", kBoth, kTaken},
    {"safety_identifier", kBoth, kTaken},
    {"prompt_cache_key", kBoth, kServed},

    // OpenAI's.
    {"functions", kChat, kRefused, "", "use tools"},
    {"function_call", kChat, kRefused, "\"none\"", "use tool_choice"},
    {"modalities", kChat, kRefused, "[\"text\"]", "only [\"text\"] is there"},
    {"audio", kChat, kRefused},
    {"prediction", kChat, kRefused},
    {"web_search_options", kChat, kRefused},
    {"store", kBoth, kRefused, "false", "answers are not kept"},
    {"moderation", kBoth, kRefused},
    {"verbosity", kChat, kRefused, "\"medium\""},
    {"prompt_cache_options", kBoth, kRefused},
    {"prompt_cache_retention", kBoth, kRefused, "\"in_memory\""},
    {"suffix", kText, kRefused},
    {"background", kBoth, kRefused, "false"},
    // vLLM's.
    {"use_beam_search", kBoth, kRefused, "false"},
    {"length_penalty", kBoth, kRefused, "1"},
    {"early_stopping", kBoth, kRefused, "false"},
    {"logits_processors", kBoth, kRefused},
    {"logprob_token_ids", kBoth, kRefused, "", "use top_logprobs"},
    {"documents", kBoth, kRefused},
    {"chat_template", kBoth, kRefused, "", "the model's own is used"},
    {"mm_processor_kwargs", kBoth, kRefused},
    {"kv_transfer_params", kBoth, kRefused},
    {"prompt_embeds", kBoth, kRefused},
    {"thinking_token_budget", kBoth, kRefused},
    {"repetition_detection", kBoth, kRefused},
    {"guided_whitespace_pattern", kBoth, kRefused},
    {"spaces_between_special_tokens", kBoth, kRefused, "true"},
    {"vllm_xargs", kBoth, kRefused},
    // SGLang's.
    {"stop_regex", kBoth, kRefused, "", "use stop, or structured_outputs.regex"},
    {"no_stop_trim", kBoth, kRefused, "false", "use include_stop_str_in_output"},
    {"extra_key", kBoth, kRefused, "", "use cache_salt"},
    {"rid", kBoth, kRefused, "", "use request_id"},
    {"separate_reasoning", kChat, kRefused, "true"},
    {"stream_reasoning", kChat, kRefused, "true"},
    {"input_ids", kBoth, kRefused, "", "use prompt of /v1/completions"},
    {"lora_path", kBoth, kRefused},
    {"session_params", kBoth, kRefused},
    {"custom_logit_processor", kBoth, kRefused},
    {"bootstrap_host", kBoth, kRefused},
    {"bootstrap_port", kBoth, kRefused},
    {"bootstrap_room", kBoth, kRefused},
    // llama.cpp's.
    {"n_probs", kBoth, kRefused, "0", "use top_logprobs"},
    {"n_cmpl", kBoth, kRefused, "1", "use n"},
    {"n_predict", kBoth, kRefused, "", "use max_tokens"},
    {"n_keep", kBoth, kRefused, "0"},
    {"repeat_penalty", kBoth, kRefused, "1", "use repetition_penalty"},
    {"repeat_last_n", kBoth, kRefused},
    {"dynatemp_range", kBoth, kRefused, "0"},
    {"xtc_probability", kBoth, kRefused, "0"},
    {"dry_multiplier", kBoth, kRefused, "0"},
    {"mirostat", kBoth, kRefused, "0"},
    {"top_n_sigma", kBoth, kRefused, "-1"},
    {"samplers", kBoth, kRefused},
    {"cache_prompt", kBoth, kRefused, "true", "use cache_salt"},
    {"id_slot", kBoth, kRefused, "-1"},
    {"t_max_predict_ms", kBoth, kRefused},
    {"lora", kBoth, kRefused},
    {"reasoning_format", kChat, kRefused, "\"auto\"", "use include_reasoning"},
};

bool AsksForNothing(const KnownField& known, const OrderedJson& value) {
  if (value.is_null()) return true;
  if (value.is_string() && value.get_ref<const std::string&>().empty()) return true;
  // An empty object is how a search is asked for.
  if (value.is_structured() && value.empty()) return known.name != "web_search_options";
  if (known.harmless.empty()) return false;
  // 1.0 is 1, and false no more than 0.
  const OrderedJson harmless = OrderedJson::parse(known.harmless);
  return value == harmless || (harmless == OrderedJson(false) && value == OrderedJson(0));
}

const absl::flat_hash_map<std::string_view, const KnownField*>& Index() {
  static const auto* const index = [] {
    auto* map = new absl::flat_hash_map<std::string_view, const KnownField*>;
    for (const KnownField& field : kFields) map->emplace(field.name, &field);
    return map;
  }();
  return *index;
}

}  // namespace

std::span<const KnownField> KnownFields() { return kFields; }

std::optional<ApiError> CheckFields(const OrderedJson& body, Endpoint endpoint) {
  std::string unknown;
  for (const auto& [name, value] : body.items()) {
    const auto it = Index().find(name);
    if (it == Index().end()) {
      if (unknown.size() < 256) absl::StrAppend(&unknown, " ", name.substr(0, 64));
      continue;
    }
    const KnownField& known = *it->second;
    const bool elsewhere = (static_cast<int>(known.endpoint) & static_cast<int>(endpoint)) == 0;
    if ((known.use != FieldUse::kRefused && !elsewhere) || AsksForNothing(known, value)) continue;
    const std::string why =
        elsewhere
            ? absl::StrCat("is supported on ",
                           known.endpoint == Endpoint::kChat ? "/v1/chat/completions" : "/v1/completions",
                           " only; leave it out")
            : absl::StrCat("this server does not support it with that value; ", std::string(known.instead));
    return MakeError(errors::kUnsupported, absl::StrCat(name, ": ", why), name);
  }
  if (!unknown.empty()) spdlog::debug("fields of a request that nobody knows:{}", unknown);
  return std::nullopt;
}

}  // namespace tidepool
