#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "server/gateway/chat/message_parser.h"

namespace tidepool {

// Appends a piece, to the last one where both are of one kind (and call).
void AppendDelta(MessageDelta::Kind kind, std::string_view text, std::vector<MessageDelta>& out);

// ToolCallParser: Codec of the body of one message, which may hold tool calls in one syntax. Reads byte by
// byte, so that nothing depends on how the text was cut; linear, since what was held back and proves to be no
// call is given out and never read again.
//
// A call begins once its name is known and its arguments have begun; from then on every byte of its arguments
// goes out as it comes, up to the bracket that closes them. What breaks before is content, with its markup.
// An object that breaks after its arguments leaves the call as it is. Arguments that the model wrote as a
// string are taken out of it; ones that are absent or null are {}. White space around calls is markup.
class ToolCallParser {
 public:
  explicit ToolCallParser(const ParserPlan& plan);

  void Push(std::string_view text, std::vector<MessageDelta>& out);
  void Finish(std::vector<MessageDelta>& out);
  bool called() const { return calls_ > 0 || begun_; }

 private:
  enum class State : uint8_t {
    kContent,    // marker not begun
    kMarker,     // held_ ends with the beginning of marker_
    kBegin,      // the marker is complete
    kName,       // mistral: name up to [ARGS], [CALL_ID] or {
    kNameMark,   // mistral: inside one of those two
    kCallId,     // mistral: after [CALL_ID]
    kNamedArgs,  // mistral: after [ARGS]
    kObject,     // inside the call's object: see Part
    kNextItem,   // mistral: after an object in the list
    kAfter,      // hermes: before </tool_call>; llama3: before ; or a further object
    kCloseMark,  // hermes: inside </tool_call>
  };
  // What is read of {"name": ..., "arguments": ...}.
  enum class Part : uint8_t {
    kOpen,
    kKeyOrEnd,
    kString,  // after the quote that begins it
    kColon,
    kValue,
    kScalar,  // a number, true, false or null
    kNested,  // an object or a list that is not the arguments
    kArguments,
    kComma,
  };
  enum class Field : uint8_t { kKey, kName, kArguments, kOther };

  // Each reads text from `at` on and returns where to go on; none reads nothing twice without a change of
  // state.
  size_t Step(std::string_view text, size_t at, std::vector<MessageDelta>& out);
  size_t Content(std::string_view text, size_t at, std::vector<MessageDelta>& out);
  size_t Marker(std::string_view text, size_t at, std::vector<MessageDelta>& out);
  size_t Begin(std::string_view text, size_t at, std::vector<MessageDelta>& out);
  size_t Named(std::string_view text, size_t at, std::vector<MessageDelta>& out);
  size_t After(std::string_view text, size_t at, std::vector<MessageDelta>& out);
  size_t Object(std::string_view text, size_t at, std::vector<MessageDelta>& out);
  size_t Arguments(std::string_view text, size_t at, std::vector<MessageDelta>& out);

  // The next byte of a nested value: true at the bracket that closes it.
  bool Closes(char c);
  void BeginObject(bool bare);
  void BeginArguments(std::vector<MessageDelta>& out);
  // False: not what stands here in a call.
  bool Value(char c, std::vector<MessageDelta>& out);
  bool EndString(std::vector<MessageDelta>& out);
  bool EndScalar(std::vector<MessageDelta>& out);
  bool EndObject(std::vector<MessageDelta>& out);
  bool TakeArguments(std::string text, std::vector<MessageDelta>& out);
  // What comes next does not belong to the call. One that has not begun is content, as far as it is held.
  void Broken(std::vector<MessageDelta>& out);
  void Hold(char c) {
    if (!begun_) held_ += c;
  }
  MessageDelta& NewPiece(std::vector<MessageDelta>& out) const;
  void BeginCall(std::vector<MessageDelta>& out);
  void GiveArguments(std::string_view piece, std::vector<MessageDelta>& out);
  void EndCall();
  // Space, then what is held.
  void GiveHeld(std::vector<MessageDelta>& out);
  void Give(std::string_view content, std::vector<MessageDelta>& out);

  const ToolSyntax syntax_;
  const bool parallel_;
  const std::vector<std::string> tools_;
  const std::string_view marker_;

  State state_ = State::kContent;
  bool any_content_ = false;  // other than white space
  bool after_call_ = false;   // nothing but white space since the last call
  bool bare_ = false;         // llama3: the object stands without a tag, so its name must be one of tools_
  bool list_ = false;         // mistral: inside [...]
  bool named_ = false;        // mistral: name[ARGS]{...}
  std::string space_;         // white space that is dropped if a call follows
  std::string held_;          // markup so far, not yet known to be a call

  Part part_ = Part::kOpen;
  Field field_ = Field::kKey;
  bool in_string_ = false, escaped_ = false;  // of the string or the nested value
  uint32_t depth_ = 0;
  std::string token_;      // the string or scalar that is being read, raw
  std::string name_;       // of the call, empty: not known yet
  std::string arguments_;  // read before the name was known
  bool has_arguments_ = false;
  bool begun_ = false;  // the client has its name
  uint32_t calls_ = 0;
};

}  // namespace tidepool
