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

OrderedJson MessageJson(const Message& message) {
  OrderedJson json{{"role", "assistant"}, {"content", message.content}, {"refusal", nullptr}};
  if (message.content.empty() && !message.tool_calls.empty()) json["content"] = nullptr;
  if (!message.reasoning.empty()) {
    json["reasoning"] = message.reasoning;
    json["reasoning_content"] = message.reasoning;
  }
  for (const ToolCall& call : message.tool_calls) {
    json["tool_calls"].push_back({{"id", call.id},
                                  {"type", "function"},
                                  {"function", {{"name", call.name}, {"arguments", call.arguments}}}});
  }
  return json;
}

// `,"delta":{...}` of a chat's chunk.
void AppendPiece(const MessageDelta& piece, std::string& out) {
  switch (piece.kind) {
    case MessageDelta::Kind::kContent:
      out += ",\"delta\":{\"content\":";
      AppendJsonString(piece.text, out);
      out += '}';
      return;
    case MessageDelta::Kind::kReasoning:
      // vLLM's present name, and the one that it, llama.cpp and DeepSeek had first.
      out += ",\"delta\":{\"reasoning\":";
      AppendJsonString(piece.text, out);
      out += ",\"reasoning_content\":";
      AppendJsonString(piece.text, out);
      out += '}';
      return;
    case MessageDelta::Kind::kToolCall:
      out += ",\"delta\":{\"tool_calls\":[{\"index\":" + std::to_string(piece.call);
      if (piece.begins_call()) {
        out += ",\"id\":";
        AppendJsonString(piece.id, out);
        out += ",\"type\":\"function\",\"function\":{\"name\":";
        AppendJsonString(piece.name, out);
        out += ",\"arguments\":";
      } else {
        out += ",\"function\":{\"arguments\":";
      }
      AppendJsonString(piece.text, out);
      out += "}}]}";
  }
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
  json["completion_tokens_details"] = {{"reasoning_tokens", usage.reasoning_tokens}};
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

OrderedJson LogprobEntries(const Tokenizer& tokenizer, const std::vector<DeliveredToken>& tokens,
                           bool tokens_as_ids) {
  OrderedJson content = OrderedJson::array();
  auto entry = [&](int32_t id, float logprob) {
    const std::string text = tokenizer.TokenText(id);
    return OrderedJson{{"token", tokens_as_ids ? "token_id:" + std::to_string(id) : text},
                       {"logprob", Finite(logprob)},
                       {"bytes", BytesOf(text)}};
  };
  for (const DeliveredToken& token : tokens) {
    OrderedJson one = entry(token.id, token.logprob);
    one["top_logprobs"] = OrderedJson::array();
    for (const OutputLogprob& top : token.top) one["top_logprobs"].push_back(entry(top.id, top.logprob));
    content.push_back(std::move(one));
  }
  return content;
}

OpenAiAnswer::OpenAiAnswer(const InferenceRequest& request, std::string model, std::string fingerprint,
                           int64_t created, const Tokenizer& tokenizer)
    : chat_(request.chat),
      include_usage_(request.include_usage),
      continuous_(request.continuous_usage_stats),
      token_ids_(request.return_token_ids),
      trace_(request.return_trace),
      echo_(request.echo),
      tokens_as_ids_(request.tokens_as_ids),
      logprobs_(request.top_logprobs),
      prompt_logprobs_(request.prompt_logprobs),
      model_(std::move(model)),
      fingerprint_("tp-" + fingerprint.substr(0, 12)),
      // auto is what this server does by default.
      service_tier_(request.service_tier.empty() ? "" : "default"),
      created_(created),
      choices_per_prompt_(request.n),
      metadata_(request.metadata),
      tokenizer_(tokenizer),
      choices_(request.choices()) {}

void OpenAiAnswer::Begin(const Admission& admission) {
  id_ = (chat_ ? "chatcmpl-" : "cmpl-") + admission.id;
  prompts_.resize(1 + admission.more.size());
  if (token_ids_ || echo_ || prompt_logprobs_ >= 0) {
    prompts_[0] = {admission.prompt_ids, admission.prompt_text};
    std::ranges::copy(admission.more, prompts_.begin() + 1);
  }
  for (AdmittedPrompt& prompt : prompts_) {
    if (!echo_) {
      prompt.text.clear();
    } else if (prompt.text.empty()) {
      prompt.text = tokenizer_.Decode(prompt.ids, true);
    }
  }
  for (size_t i = 0; i < choices_.size(); ++i) {
    choices_[i].text_offset = CountCodePoints(PromptOf(i).text);
  }
  chunk_head_ = DumpJson(Head(true));
  chunk_head_.pop_back();
  chunk_head_ += ",\"choices\":[{\"index\":";
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
  if (!service_tier_.empty()) json["service_tier"] = service_tier_;
  return json;
}

void OpenAiAnswer::OpenChunk(uint32_t choice, std::string& out) const {
  out += "data: ";
  out += chunk_head_;
  out += std::to_string(choice);
}

void OpenAiAnswer::CloseChunk(const TokenUsage* usage, const RequestTrace* trace, std::string& out) const {
  out += "}]";
  if (continuous_ && usage != nullptr) {
    out += ",\"usage\":" + DumpJson(UsageJson(*usage));
  } else if (include_usage_) {
    out += ",\"usage\":null";
  }
  if (trace_ && trace != nullptr) out += ",\"tidepool_trace\":" + DumpJson(TraceJson(*trace));
  out += "}\n\n";
}

void OpenAiAnswer::AppendDetails(uint32_t choice, const std::vector<DeliveredToken>& tokens,
                                 std::string& out) {
  out += ",\"logprobs\":";
  // The common case, on every token's way.
  if (logprobs_ < 0) {
    out += "null";
  } else {
    out += DumpJson(Logprobs(choices_[choice], tokens, /*with_prompt=*/false));
  }
  out += ",\"finish_reason\":null";
  if (token_ids_) out += ",\"token_ids\":" + DumpJson(Ids(tokens));
}

OrderedJson OpenAiAnswer::TopOf(int32_t id, float logprob, const std::vector<OutputLogprob>& top) const {
  OrderedJson json = OrderedJson::object();
  const size_t count = std::min(top.size(), static_cast<size_t>(std::max(logprobs_, 0)));
  for (size_t i = 0; i < count; ++i) json[TokenName(top[i].id)] = Finite(top[i].logprob);
  // "The API will always return the logprob of the sampled token, so there may be up to logprobs + 1
  // elements" (OpenAI's reference).
  json[TokenName(id)] = Finite(logprob);
  return json;
}

std::string OpenAiAnswer::TokenName(int32_t id) const {
  return tokens_as_ids_ ? "token_id:" + std::to_string(id) : tokenizer_.TokenText(id);
}

// Logprobs of prompts are for requests with one.
void OpenAiAnswer::AddPrompt(OrderedJson& lists) const {
  const std::vector<int32_t>& ids = prompts_[0].ids;
  StreamDecoder decoder(tokenizer_, /*skip_special_tokens=*/true);
  size_t offset = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    const int32_t id = ids[i];
    lists["tokens"].push_back(TokenName(id));
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
  if (chat_)
    return OrderedJson{{"content", LogprobEntries(tokenizer_, tokens, tokens_as_ids_)}, {"refusal", nullptr}};
  OrderedJson json;
  for (const char* list : {"tokens", "token_logprobs", "top_logprobs", "text_offset"}) {
    json[list] = OrderedJson::array();
  }
  if (with_prompt) AddPrompt(json);
  for (const DeliveredToken& token : tokens) {
    const std::string text = tokenizer_.TokenText(token.id);
    json["tokens"].push_back(TokenName(token.id));
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
    add(prompts_[0].ids[i + 1], score.logprob, score.rank);
    const size_t count = std::min(score.top.size(), static_cast<size_t>(prompt_logprobs_));
    for (size_t t = 0; t < count; ++t) add(score.top[t].id, score.top[t].logprob, t + 1);
    list.push_back(std::move(one));
  }
  return list;
}

void OpenAiAnswer::First(uint32_t index, std::string& out) {
  if (!chat_ && !echo_ && !token_ids_) return;
  OpenChunk(index, out);
  OrderedJson logprobs;
  if (chat_) {
    out += ",\"delta\":{\"role\":\"assistant\",\"content\":\"\"}";
  } else {
    out += ",\"text\":";
    AppendJsonString(PromptOf(index).text, out);
    if (echo_) logprobs = Logprobs(choices_[index], {}, /*with_prompt=*/true);
  }
  out += ",\"logprobs\":" + DumpJson(logprobs) + ",\"finish_reason\":null";
  if (token_ids_) {
    // The ids stand beside the choices, as in vLLM.
    out += "}],\"prompt_token_ids\":" + DumpJson(PromptOf(index).ids);
    out += include_usage_ ? ",\"usage\":null}\n\n" : "}\n\n";
  } else {
    CloseChunk(nullptr, nullptr, out);
  }
}

void OpenAiAnswer::Delta(uint32_t index, const OutputDelta& delta, std::span<const MessageDelta> message,
                         const TokenUsage& usage, std::string& out) {
  static const std::vector<DeliveredToken> kNone;
  if (!chat_) {
    OpenChunk(index, out);
    out += ",\"text\":";
    AppendJsonString(delta.text, out);
    AppendDetails(index, delta.tokens, out);
    CloseChunk(&usage, nullptr, out);
    return;
  }
  const bool details = !delta.tokens.empty() && (logprobs_ >= 0 || token_ids_ || continuous_);
  if (message.empty() && details) {
    // Tokens whose text is held back.
    OpenChunk(index, out);
    out += ",\"delta\":{}";
    AppendDetails(index, delta.tokens, out);
    CloseChunk(&usage, nullptr, out);
  }
  for (const MessageDelta& piece : message) {
    OpenChunk(index, out);
    AppendPiece(piece, out);
    AppendDetails(index, &piece == message.data() ? delta.tokens : kNone, out);
    CloseChunk(&usage, nullptr, out);
  }
}

void OpenAiAnswer::Finish(uint32_t index, const ChoiceEnd& end, const TokenUsage& usage, std::string& out) {
  OpenChunk(index, out);
  out += chat_ ? ",\"delta\":{}" : ",\"text\":\"\"";
  out += ",\"logprobs\":null,\"finish_reason\":";
  AppendJsonString(end.finish_reason, out);
  out += ",\"stop_reason\":" + DumpJson(StopReason(end));
  // With usage asked for the last chunk has it.
  CloseChunk(&usage, include_usage_ ? nullptr : &end.trace, out);
}

void OpenAiAnswer::End(const Outcome& outcome, std::string& out) {
  if (include_usage_) {
    OrderedJson json = Head(true);
    json["choices"] = OrderedJson::array();
    json["usage"] = UsageJson(outcome.usage);
    if (trace_) json["tidepool_trace"] = TraceJson(outcome.trace);
    AppendEvent({}, DumpJson(json), out);
  }
  out += "data: [DONE]\n\n";
}

void OpenAiAnswer::Error(const ApiError& error, std::string& out) { AppendEvent({}, ErrorBody(error), out); }

std::string OpenAiAnswer::ErrorBody(const ApiError& error) const { return tidepool::ErrorBody(error); }

void OpenAiAnswer::Append(uint32_t index, OutputDelta delta, std::span<const MessageDelta> message) {
  Choice& choice = choices_[index];
  for (const MessageDelta& piece : message) choice.message.Add(piece);
  if (!chat_) choice.all.text += delta.text;
  if (logprobs_ < 0 && !token_ids_) return;
  std::move(delta.tokens.begin(), delta.tokens.end(), std::back_inserter(choice.all.tokens));
}

void OpenAiAnswer::Clear(uint32_t choice) {
  choices_[choice].all = {};
  choices_[choice].message = {};
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
      choice["message"] = MessageJson(from.message);
    } else {
      choice["text"] = PromptOf(i).text + from.all.text;
    }
    choice["logprobs"] = Logprobs(from, from.all.tokens, /*with_prompt=*/echo_);
    choice["finish_reason"] = from.end.finish_reason;
    choice["stop_reason"] = StopReason(from.end);
    if (token_ids_) choice["token_ids"] = Ids(from.all.tokens);
    if (token_ids_ && prompts_.size() > 1) choice["prompt_token_ids"] = PromptOf(i).ids;
    // vLLM's places for it: a completion has it in each choice, a chat once.
    if (prompt_logprobs_ >= 0 && !chat_) choice["prompt_logprobs"] = PromptLogprobs();
    json["choices"].push_back(std::move(choice));
  }
  json["usage"] = UsageJson(outcome.usage);
  if (prompt_logprobs_ >= 0 && chat_) json["prompt_logprobs"] = PromptLogprobs();
  if (token_ids_ && prompts_.size() == 1) json["prompt_token_ids"] = prompts_[0].ids;
  for (const auto& [key, value] : metadata_) json["metadata"][key] = value;
  if (trace_) json["tidepool_trace"] = TraceJson(outcome.trace);
  return DumpJson(json);
}

}  // namespace tidepool
