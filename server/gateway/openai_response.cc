#include "server/gateway/openai_response.h"

#include <algorithm>
#include <cmath>

#include "server/gateway/field_reader.h"

namespace tidepool {
namespace {

// JSON has no infinity; vLLM's floor.
double Finite(float logprob) { return std::isfinite(logprob) ? std::max(-9999.0, double{logprob}) : -9999.0; }

OrderedJson BytesOf(const std::string& text) {
  OrderedJson bytes = OrderedJson::array();
  for (char c : text) bytes.push_back(static_cast<unsigned char>(c));
  return bytes;
}

OrderedJson StopReason(const Outcome& outcome) {
  if (const auto* text = std::get_if<std::string>(&outcome.stop_reason)) return *text;
  if (const auto* id = std::get_if<int32_t>(&outcome.stop_reason)) return *id;
  return nullptr;
}

OrderedJson Ids(const std::vector<DeliveredToken>& tokens) {
  OrderedJson ids = OrderedJson::array();
  for (const DeliveredToken& token : tokens) ids.push_back(token.id);
  return ids;
}

}  // namespace

OrderedJson UsageJson(const TokenUsage& usage) {
  OrderedJson json;
  json["prompt_tokens"] = usage.prompt_tokens;
  json["completion_tokens"] = usage.completion_tokens;
  json["total_tokens"] = uint64_t{usage.prompt_tokens} + usage.completion_tokens;
  json["prompt_tokens_details"] = {{"cached_tokens", usage.cached_tokens}};
  return json;
}

OrderedJson TraceJson(const Outcome& outcome) {
  const RequestTrace& trace = outcome.trace;
  const v1::RequestPath& path = trace.path;
  OrderedJson json;
  json["prefill_worker"] = path.prefill_worker();
  json["prefill_pid"] = path.prefill_pid();
  json["decode_worker"] = path.decode_worker();
  json["decode_pid"] = path.decode_pid();
  json["prompt_tokens"] = outcome.usage.prompt_tokens;
  json["cached_tokens"] = outcome.usage.cached_tokens;
  json["fetched_blocks"] = path.fetched_blocks();
  json["fetched_bytes"] = path.fetched_bytes();
  json["transport"] = path.transport();
  json["queue_ms"] = path.queue_seconds() * 1e3;
  json["prefill_ms"] = path.prefill_seconds() * 1e3;
  json["transfer_ms"] = path.transfer_seconds() * 1e3;
  json["ttft_ms"] = trace.ttft_seconds * 1e3;
  json["itl_ms_mean"] = trace.itl_mean_seconds * 1e3;
  json["itl_ms_p99"] = trace.itl_p99_seconds * 1e3;
  json["attempts"] = trace.attempts;
  json["reason"] = trace.placement_reason;
  return json;
}

OpenAiAnswer::OpenAiAnswer(const InferenceRequest& request, std::string model, std::string fingerprint,
                           int64_t created, const Tokenizer& tokenizer)
    : chat_(request.chat),
      logprobs_(request.top_logprobs >= 0),
      include_usage_(request.include_usage),
      continuous_(request.continuous_usage_stats),
      token_ids_(request.return_token_ids),
      trace_(request.return_trace),
      echo_(request.echo),
      model_(std::move(model)),
      fingerprint_("tp-" + fingerprint.substr(0, 12)),
      created_(created),
      tokenizer_(tokenizer) {}

void OpenAiAnswer::Begin(const Admission& admission) {
  id_ = (chat_ ? "chatcmpl-" : "cmpl-") + admission.id;
  if (token_ids_) prompt_ids_ = admission.prompt_ids;
  if (echo_) {
    prompt_text_ =
        admission.prompt_text.empty() ? tokenizer_.Decode(admission.prompt_ids, true) : admission.prompt_text;
  }
  text_offset_ = CountCodePoints(prompt_text_);
}

OrderedJson OpenAiAnswer::Head(bool chunk) const {
  OrderedJson json;
  json["id"] = id_;
  json["object"] = !chat_ ? "text_completion" : chunk ? "chat.completion.chunk" : "chat.completion";
  json["created"] = created_;
  json["model"] = model_;
  json["system_fingerprint"] = fingerprint_;
  return json;
}

OrderedJson OpenAiAnswer::ChunkWith(OrderedJson choice, const TokenUsage* usage) const {
  OrderedJson json = Head(true);
  json["choices"] = OrderedJson::array({std::move(choice)});
  if (continuous_ && usage != nullptr) {
    json["usage"] = UsageJson(*usage);
  } else if (include_usage_) {
    json["usage"] = nullptr;
  }
  return json;
}

OrderedJson OpenAiAnswer::Logprobs(const std::vector<DeliveredToken>& tokens) {
  if (!logprobs_) return nullptr;
  if (chat_) {
    OrderedJson content = OrderedJson::array();
    auto entry = [&](int32_t id, float logprob) {
      const std::string text = tokenizer_.TokenText(id);
      return OrderedJson{{"token", text}, {"logprob", Finite(logprob)}, {"bytes", BytesOf(text)}};
    };
    for (const DeliveredToken& token : tokens) {
      OrderedJson one = entry(token.id, token.logprob);
      one["top_logprobs"] = OrderedJson::array();
      for (const OutputLogprob& top : token.top) one["top_logprobs"].push_back(entry(top.id, top.logprob));
      content.push_back(std::move(one));
    }
    return OrderedJson{{"content", std::move(content)}};
  }
  OrderedJson json;
  for (const char* list : {"tokens", "token_logprobs", "top_logprobs", "text_offset"}) {
    json[list] = OrderedJson::array();
  }
  for (const DeliveredToken& token : tokens) {
    const std::string text = tokenizer_.TokenText(token.id);
    OrderedJson top = OrderedJson::object();
    for (const OutputLogprob& t : token.top) top[tokenizer_.TokenText(t.id)] = Finite(t.logprob);
    json["tokens"].push_back(text);
    json["token_logprobs"].push_back(Finite(token.logprob));
    json["top_logprobs"].push_back(std::move(top));
    json["text_offset"].push_back(text_offset_);
    text_offset_ += CountCodePoints(text);
  }
  return json;
}

std::string OpenAiAnswer::FirstChunk() {
  OrderedJson choice;
  choice["index"] = 0;
  if (chat_) {
    choice["delta"] = {{"role", "assistant"}, {"content", ""}};
  } else if (echo_) {
    choice["text"] = prompt_text_;
  } else if (token_ids_) {
    choice["text"] = "";
  } else {
    return {};
  }
  choice["logprobs"] = nullptr;
  choice["finish_reason"] = nullptr;
  OrderedJson json = ChunkWith(std::move(choice), nullptr);
  if (token_ids_) json["prompt_token_ids"] = prompt_ids_;
  return DumpJson(json);
}

std::string OpenAiAnswer::DeltaChunk(const OutputDelta& delta, const TokenUsage& usage) {
  OrderedJson choice;
  choice["index"] = 0;
  if (chat_) {
    choice["delta"] = {{"content", delta.text}};
  } else {
    choice["text"] = delta.text;
  }
  choice["logprobs"] = Logprobs(delta.tokens);
  choice["finish_reason"] = nullptr;
  if (token_ids_) choice["token_ids"] = Ids(delta.tokens);
  return DumpJson(ChunkWith(std::move(choice), &usage));
}

std::string OpenAiAnswer::FinishChunk(const Outcome& outcome, bool with_trace) {
  OrderedJson choice;
  choice["index"] = 0;
  if (chat_) {
    choice["delta"] = OrderedJson::object();
  } else {
    choice["text"] = "";
  }
  choice["logprobs"] = nullptr;
  choice["finish_reason"] = outcome.finish_reason;
  choice["stop_reason"] = StopReason(outcome);
  OrderedJson json = ChunkWith(std::move(choice), &outcome.usage);
  if (trace_ && with_trace) json["tidepool_trace"] = TraceJson(outcome);
  return DumpJson(json);
}

std::string OpenAiAnswer::UsageChunk(const Outcome& outcome, bool with_trace) {
  OrderedJson json = Head(true);
  json["choices"] = OrderedJson::array();
  json["usage"] = UsageJson(outcome.usage);
  if (trace_ && with_trace) json["tidepool_trace"] = TraceJson(outcome);
  return DumpJson(json);
}

void OpenAiAnswer::Append(OutputDelta delta) {
  all_.text += delta.text;
  std::move(delta.tokens.begin(), delta.tokens.end(), std::back_inserter(all_.tokens));
}

void OpenAiAnswer::Clear() { all_ = {}; }

std::string OpenAiAnswer::Whole(const Outcome& outcome) {
  OrderedJson choice;
  choice["index"] = 0;
  if (chat_) {
    choice["message"] = {{"role", "assistant"}, {"content", all_.text}};
  } else {
    choice["text"] = prompt_text_ + all_.text;
  }
  choice["logprobs"] = Logprobs(all_.tokens);
  choice["finish_reason"] = outcome.finish_reason;
  choice["stop_reason"] = StopReason(outcome);
  if (token_ids_) choice["token_ids"] = Ids(all_.tokens);
  OrderedJson json = Head(false);
  json["choices"] = OrderedJson::array({std::move(choice)});
  json["usage"] = UsageJson(outcome.usage);
  if (token_ids_) json["prompt_token_ids"] = prompt_ids_;
  if (trace_) json["tidepool_trace"] = TraceJson(outcome);
  return DumpJson(json);
}

}  // namespace tidepool
