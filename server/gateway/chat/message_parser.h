#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/gateway/request.h"

namespace tidepool {

// MessageDelta: the next piece of an assistant's message. A message is the pieces in their order; pieces of
// the same kind (and of the same call) that follow each other belong together.
struct MessageDelta {
  enum class Kind : uint8_t { kReasoning, kContent, kToolCall };
  Kind kind = Kind::kContent;
  std::string text;  // whole characters; of a tool call: of its arguments, which may be empty
  // Of a tool call only.
  uint32_t call = 0;     // from 0; a call's pieces are not interleaved with another's
  std::string id, name;  // with a call's first piece, then empty
  bool begins_call() const { return kind == Kind::kToolCall && !id.empty(); }

  bool operator==(const MessageDelta&) const = default;
};

// ToolCall, Message: a message as a whole.
struct ToolCall {
  std::string id, name;
  std::string arguments;  // JSON, byte for byte as the model wrote it

  bool operator==(const ToolCall&) const = default;
};
struct Message {
  std::string reasoning, content;
  std::vector<ToolCall> tool_calls;

  void Add(const MessageDelta& delta);
  bool operator==(const Message&) const = default;
};

// How a model writes tool calls.
enum class ToolSyntax : uint8_t {
  kNone,
  kHermes,   // <tool_call>{"name": ..., "arguments": {...}}</tool_call>, once for each call (Hermes, Qwen)
  kLlama3,   // [<|python_tag|>]{"name": ..., "parameters": {...}}[; {...}]
  kMistral,  // [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or for each [TOOL_CALLS]name[ARGS]{...}
};

// ParserPlan: what a request's MessageParsers have to know (ChatFormat::Plan). Plain data.
struct ParserPlan {
  ToolSyntax syntax = ToolSyntax::kNone;  // kNone: no call is looked for
  std::vector<std::string> tools;         // offered
  bool parallel = true;                   // false: what follows the first call is dropped, as in vLLM
  bool named = false;                     // tool_choice names a function: its call ends with "stop"
  bool reasoning = false;                 // <think>...</think> is looked for
  bool include_reasoning = true;          // false: it is dropped
  std::string continued;                  // the assistant's text that the answer goes on with
};

// Whether the prompt ends with an open <think>, or the assistant's text that is continued has one.
bool BeginsInThought(const ParserPlan& plan, std::string_view prompt);

class ToolCallParser;

// MessageParser: Codec of one choice's text, as the model writes it, to its message. The pieces of all Push
// and Finish calls together do not depend on how the text was cut. Text that turns out not to be a call after
// all is content; nothing but markup is lost. Holds back what may be the beginning of markup: at most a tag's
// length, but up to a whole call while its name is unknown. Not thread-safe.
class MessageParser {
 public:
  // `prompt`: the prompt as text; one that ends with an open <think> begins the answer with reasoning.
  MessageParser(const ParserPlan& plan, std::string_view prompt);
  ~MessageParser();
  MessageParser(MessageParser&&) noexcept;
  MessageParser& operator=(MessageParser&&) noexcept;

  // Appends what became known. `tokens`: of the answer, that `text` came with.
  void Push(std::string_view text, size_t tokens, std::vector<MessageDelta>& out);
  // The rest. Call once, at the end.
  void Finish(std::vector<MessageDelta>& out);

  // What an answer that ended with `reason` (stop, length) ended with, its calls considered.
  std::string_view FinishReason(std::string_view reason) const;
  // Names of the calls that have begun, in their order; nullopt where no calls are looked for.
  std::optional<std::vector<std::string>> CalledTools() const;
  // Tokens up to and with the one that ended the reasoning. Of several that came in one piece with its end,
  // those that its bytes stand for.
  uint32_t reasoning_tokens() const { return reasoning_tokens_; }

 private:
  enum class State : uint8_t { kStart, kReasoning, kAfterReasoning, kBody };

  // Each reads text from `at` on and returns where to go on.
  size_t Start(std::string_view text, size_t at, std::vector<MessageDelta>& out);
  size_t Reason(std::string_view text, size_t at, std::vector<MessageDelta>& out);
  void Think(std::string_view text, std::vector<MessageDelta>& out);
  void Body(std::string_view text, std::vector<MessageDelta>& out);
  // Of the pieces of `out` from `first` on.
  void NoteCalls(const std::vector<MessageDelta>& out, size_t first);

  std::unique_ptr<ToolCallParser> calls_;  // null: the body is content
  bool include_reasoning_, named_;
  State state_;
  bool any_reasoning_ = false;
  std::string space_, tag_;  // held back: white space, and the beginning of a tag after it
  uint32_t reasoning_tokens_ = 0;
  std::vector<std::string> called_;
};

}  // namespace tidepool
