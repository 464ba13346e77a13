#include "server/gateway/openai_response.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "server/gateway/field_reader.h"
#include "server/model/text/detokenizer.h"

namespace tidepool {
namespace {

// JSON has no infinity; vLLM's floor.
double Finite(float logprob) { return std::isfinite(logprob) ? std::max(-9999.0, double{logprob}) : -9999.0; }

OrderedJson BytesOf(const std::string& text) {
  OrderedJson bytes = OrderedJson::array();
  for (char c : text) bytes.push_back(static_cast<unsigned char>(c));
  return bytes;
}

OrderedJson StopReason(const ChoiceEnd& end) {
  if (const auto* text = std::get_if<std::string>(&end.stop_reason)) return *text;
  if (const auto* id = std::get_if<int32_t>(&end.stop_reason)) return *id;
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

OrderedJson TraceJson(const RequestTrace& trace) {
  const v1::RequestPath& path = trace.path;
  OrderedJson json;
  json["prefill_worker"] = path.prefill_worker();
  json["prefill_pid"] = path.prefill_pid();
  json["decode_worker"] = path.decode_worker();
  json["decode_pid"] = path.decode_pid();
  json["prompt_tokens"] = path.prompt_tokens();
  json["cached_tokens"] = path.cached_tokens();
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
      include_usage_(request.include_usage),
      continuous_(request.continuous_usage_stats),
      token_ids_(request.return_token_ids),
      trace_(request.return_trace),
      echo_(request.echo),
      logprobs_(request.top_logprobs),
      prompt_logprobs_(request.prompt_logprobs),
      model_(std::move(model)),
      fingerprint_("tp-" + fingerprint.substr(0, 12)),
      created_(created),
      tokenizer_(tokenizer),
      choices_(request.n) {}

void OpenAiAnswer::Begin(const Admission& admission) {
  id_ = (chat_ ? "chatcmpl-" : "cmpl-") + admission.id;
  if (token_ids_ || echo_ || prompt_logprobs_ >= 0) prompt_ids_ = admission.prompt_ids;
  if (echo_) {
    prompt_text_ =
        admission.prompt_text.empty() ? tokenizer_.Decode(admission.prompt_ids, true) : admission.prompt_text;
  }
  for (Choice& choice : choices_) choice.text_offset = CountCodePoints(prompt_text_);
}

void OpenAiAnswer::AddPromptLogprobs(std::vector<PromptScore> scores) {
  std::move(scores.begin(), scores.end(), std::back_inserter(prompt_scores_));
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

OrderedJson OpenAiAnswer::ChatLogprobs(const std::vector<DeliveredToken>& tokens) const {
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

OrderedJson OpenAiAnswer::TopOf(int32_t id, float logprob, const std::vector<OutputLogprob>& top) const {
  OrderedJson json = OrderedJson::object();
  const size_t count = std::min(top.size(), static_cast<size_t>(std::max(logprobs_, 0)));
  for (size_t i = 0; i < count; ++i) json[tokenizer_.TokenText(top[i].id)] = Finite(top[i].logprob);
  // "The API will always return the logprob of the sampled token, so there may be up to logprobs + 1
  // elements" (OpenAI's reference).
  json[tokenizer_.TokenText(id)] = Finite(logprob);
  return json;
}

void OpenAiAnswer::AddPrompt(OrderedJson& lists) const {
  StreamDecoder decoder(tokenizer_, /*skip_special_tokens=*/true);
  size_t offset = 0;
  for (size_t i = 0; i < prompt_ids_.size(); ++i) {
    const int32_t id = prompt_ids_[i];
    lists["tokens"].push_back(tokenizer_.TokenText(id));
    lists["text_offset"].push_back(offset);
    offset += CountCodePoints(decoder.Push(id));
    // Nothing stands before the first token that could foretell it.
    const bool scored = i > 0 && i <= prompt_scores_.size();
    lists["token_logprobs"].push_back(scored ? OrderedJson(Finite(prompt_scores_[i - 1].logprob)) : nullptr);
    lists["top_logprobs"].push_back(
        scored ? TopOf(id, prompt_scores_[i - 1].logprob, prompt_scores_[i - 1].top) : nullptr);
  }
}

OrderedJson OpenAiAnswer::Logprobs(Choice& choice, const std::vector<DeliveredToken>& tokens,
                                   bool with_prompt) {
  if (logprobs_ < 0) return nullptr;
  if (chat_) return ChatLogprobs(tokens);
  OrderedJson json;
  for (const char* list : {"tokens", "token_logprobs", "top_logprobs", "text_offset"}) {
    json[list] = OrderedJson::array();
  }
  if (with_prompt) AddPrompt(json);
  for (const DeliveredToken& token : tokens) {
    const std::string text = tokenizer_.TokenText(token.id);
    json["tokens"].push_back(text);
    json["token_logprobs"].push_back(Finite(token.logprob));
    json["top_logprobs"].push_back(TopOf(token.id, token.logprob, token.top));
    json["text_offset"].push_back(choice.text_offset);
    choice.text_offset += CountCodePoints(text);
  }
  return json;
}

OrderedJson OpenAiAnswer::PromptLogprobs() const {
  OrderedJson list = OrderedJson::array({nullptr});
  for (size_t i = 0; i < prompt_scores_.size(); ++i) {
    const PromptScore& score = prompt_scores_[i];
    OrderedJson one = OrderedJson::object();
    auto add = [&](int32_t id, float logprob, size_t rank) {
      one[std::to_string(id)] = {
          {"logprob", Finite(logprob)}, {"rank", rank}, {"decoded_token", tokenizer_.TokenText(id)}};
    };
    // The prompt's own token first, as vLLM has it; it may be one of the likeliest.
    add(prompt_ids_[i + 1], score.logprob, score.rank);
    const size_t count = std::min(score.top.size(), static_cast<size_t>(prompt_logprobs_));
    for (size_t t = 0; t < count; ++t) add(score.top[t].id, score.top[t].logprob, t + 1);
    list.push_back(std::move(one));
  }
  return list;
}

std::string OpenAiAnswer::FirstChunk(uint32_t index) {
  OrderedJson choice;
  choice["index"] = index;
  choice["logprobs"] = nullptr;
  if (chat_) {
    choice["delta"] = {{"role", "assistant"}, {"content", ""}};
  } else if (echo_) {
    choice["text"] = prompt_text_;
    choice["logprobs"] = Logprobs(choices_[index], {}, /*with_prompt=*/true);
  } else if (token_ids_) {
    choice["text"] = "";
  } else {
    return {};
  }
  choice["finish_reason"] = nullptr;
  OrderedJson json = ChunkWith(std::move(choice), nullptr);
  if (token_ids_) json["prompt_token_ids"] = prompt_ids_;
  return DumpJson(json);
}

std::string OpenAiAnswer::DeltaChunk(uint32_t index, const OutputDelta& delta, const TokenUsage& usage) {
  OrderedJson choice;
  choice["index"] = index;
  if (chat_) {
    choice["delta"] = {{"content", delta.text}};
  } else {
    choice["text"] = delta.text;
  }
  choice["logprobs"] = Logprobs(choices_[index], delta.tokens, /*with_prompt=*/false);
  choice["finish_reason"] = nullptr;
  if (token_ids_) choice["token_ids"] = Ids(delta.tokens);
  return DumpJson(ChunkWith(std::move(choice), &usage));
}

std::string OpenAiAnswer::FinishChunk(uint32_t index, const ChoiceEnd& end, const TokenUsage& usage,
                                      bool with_trace) {
  OrderedJson choice;
  choice["index"] = index;
  if (chat_) {
    choice["delta"] = OrderedJson::object();
  } else {
    choice["text"] = "";
  }
  choice["logprobs"] = nullptr;
  choice["finish_reason"] = end.finish_reason;
  choice["stop_reason"] = StopReason(end);
  OrderedJson json = ChunkWith(std::move(choice), &usage);
  if (trace_ && with_trace) json["tidepool_trace"] = TraceJson(end.trace);
  return DumpJson(json);
}

std::string OpenAiAnswer::UsageChunk(const Outcome& outcome, bool with_trace) {
  OrderedJson json = Head(true);
  json["choices"] = OrderedJson::array();
  json["usage"] = UsageJson(outcome.usage);
  if (trace_ && with_trace) json["tidepool_trace"] = TraceJson(outcome.trace);
  return DumpJson(json);
}

void OpenAiAnswer::Append(uint32_t choice, OutputDelta delta) {
  OutputDelta& all = choices_[choice].all;
  all.text += delta.text;
  std::move(delta.tokens.begin(), delta.tokens.end(), std::back_inserter(all.tokens));
}

void OpenAiAnswer::Clear(uint32_t choice) {
  choices_[choice].all = {};
  if (choice == 0) prompt_scores_.clear();
}

std::string OpenAiAnswer::Whole(const Outcome& outcome) {
  OrderedJson json = Head(false);
  json["choices"] = OrderedJson::array();
  for (size_t i = 0; i < choices_.size(); ++i) {
    Choice& from = choices_[i];
    OrderedJson choice;
    choice["index"] = i;
    if (chat_) {
      choice["message"] = {{"role", "assistant"}, {"content", from.all.text}};
    } else {
      choice["text"] = prompt_text_ + from.all.text;
    }
    choice["logprobs"] = Logprobs(from, from.all.tokens, /*with_prompt=*/echo_);
    choice["finish_reason"] = from.end.finish_reason;
    choice["stop_reason"] = StopReason(from.end);
    if (token_ids_) choice["token_ids"] = Ids(from.all.tokens);
    // vLLM's places for it: a completion has it in each choice, a chat once.
    if (prompt_logprobs_ >= 0 && !chat_) choice["prompt_logprobs"] = PromptLogprobs();
    json["choices"].push_back(std::move(choice));
  }
  json["usage"] = UsageJson(outcome.usage);
  if (prompt_logprobs_ >= 0 && chat_) json["prompt_logprobs"] = PromptLogprobs();
  if (token_ids_) json["prompt_token_ids"] = prompt_ids_;
  if (trace_) json["tidepool_trace"] = TraceJson(outcome.trace);
  return DumpJson(json);
}

}  // namespace tidepool
