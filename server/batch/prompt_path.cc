#include "server/batch/prompt_path.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>

#include "base/digest.h"

namespace tidepool {
namespace {

// OpenAI's default of /v1/completions is 16, chats answer until they are done.
constexpr uint32_t kDecodeTokensUnknown = 256;
constexpr uint32_t kDecodeTokensMax = 1 << 20;

// Bytes of a prompt to the units of its path.
class PathBuilder {
 public:
  void Add(std::string_view bytes) {
    while (!bytes.empty()) {
      const size_t take = std::min(bytes.size(), kPathUnitBytes - filled_);
      std::memcpy(unit_.data() + sizeof chain_ + filled_, bytes.data(), take);
      filled_ += take;
      bytes.remove_prefix(take);
      if (filled_ == kPathUnitBytes) EndUnit();
    }
  }
  // A value and where it ends: {"a","b"} is not {"ab"}.
  void AddField(const OrderedJson& value) {
    if (const auto* text = value.get_ptr<const std::string*>()) {
      Add(*text);
    } else {
      Add(DumpJson(value));
    }
    Add(std::string_view("\0", 1));
  }
  std::vector<uint64_t> Take() { return std::move(units_); }

 private:
  // The hash of a unit covers the one before it: equal elements mean equal beginnings.
  void EndUnit() {
    std::memcpy(unit_.data(), &chain_, sizeof chain_);
    chain_ = PayloadChecksum(std::as_bytes(std::span(unit_)));
    units_.push_back(chain_);
    filled_ = 0;
  }

  std::array<char, sizeof(uint64_t) + kPathUnitBytes> unit_{};
  size_t filled_ = 0;
  uint64_t chain_ = 0;
  std::vector<uint64_t> units_;
};

void AddMember(PathBuilder& path, const OrderedJson& object, const char* key) {
  const auto it = object.find(key);
  if (it != object.end() && !it->is_null()) path.AddField(*it);
}

// Lists of messages in their order: role and content first, then whatever else there is.
void AddMessages(PathBuilder& path, const OrderedJson& body, const char* key) {
  const auto it = body.find(key);
  if (it == body.end()) return;
  if (!it->is_array()) return path.AddField(*it);
  for (const OrderedJson& message : *it) {
    if (!message.is_object()) {
      path.AddField(message);
      continue;
    }
    AddMember(path, message, "role");
    AddMember(path, message, "content");
    for (const auto& [name, value] : message.items()) {
      if (name == "role" || name == "content") continue;
      path.Add(name);
      path.AddField(value);
    }
  }
}

uint32_t DecodeTokens(std::string_view url, const OrderedJson& body) {
  if (url == "/v1/embeddings") return 0;
  for (const char* key : {"max_completion_tokens", "max_tokens", "max_output_tokens"}) {
    const auto it = body.find(key);
    if (it == body.end() || !it->is_number_unsigned()) continue;
    return static_cast<uint32_t>(std::min<uint64_t>(it->get<uint64_t>(), kDecodeTokensMax));
  }
  return url == "/v1/completions" ? 16 : kDecodeTokensUnknown;
}

}  // namespace

PromptPath PathOf(std::string_view url, const OrderedJson& body) {
  PathBuilder path;
  path.Add(url);  // another API renders another prompt
  AddMember(path, body, "model");
  AddMember(path, body, "cache_salt");
  AddMember(path, body, "chat_template_kwargs");
  AddMember(path, body, "tools");
  if (url == "/v1/chat/completions") {
    AddMessages(path, body, "messages");
  } else if (url == "/v1/responses") {
    AddMember(path, body, "instructions");
    AddMessages(path, body, "input");
  } else {
    AddMember(path, body, url == "/v1/completions" ? "prompt" : "input");
  }
  return {path.Take(), DecodeTokens(url, body)};
}

}  // namespace tidepool
