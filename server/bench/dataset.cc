#include "server/bench/dataset.h"

#include <simdjson.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/small_file.h"
#include "base/status.h"

namespace tidepool {
namespace {

namespace dom = simdjson::dom;

constexpr uint64_t kDatasetBytesMax = uint64_t{2} << 30;

std::string_view StringAt(dom::object object, std::string_view key) {
  std::string_view text;
  return object[key].get(text) == simdjson::SUCCESS ? text : std::string_view();
}

// A number, or its text as some files have it; 0: neither.
uint32_t CountAt(dom::object object, std::string_view key) {
  uint64_t number = 0;
  std::string_view text;
  if (object[key].get(number) != simdjson::SUCCESS && object[key].get(text) == simdjson::SUCCESS &&
      !absl::SimpleAtoi(absl::string_view(text.data(), text.size()), &number)) {
    return 0;
  }
  return number <= LengthSpec::kTokensMax ? static_cast<uint32_t>(number) : 0;
}

absl::StatusOr<std::vector<ChatMessage>> Messages(dom::array list) {
  std::vector<ChatMessage> out;
  for (const auto element : list) {
    dom::object message;
    std::string_view content;
    if (element.get(message) != simdjson::SUCCESS || message["content"].get(content) != simdjson::SUCCESS ||
        StringAt(message, "role").empty()) {
      return absl::InvalidArgumentError("messages: each needs a role and a content that are strings");
    }
    out.push_back({std::string(StringAt(message, "role")), std::string(content)});
  }
  if (out.empty()) return absl::InvalidArgumentError("messages: is empty");
  return out;
}

// ShareGPT. The recorded answers are left out: the server gives its own.
absl::StatusOr<std::vector<std::vector<ChatMessage>>> Conversation(dom::array list) {
  std::vector<std::vector<ChatMessage>> turns;
  std::vector<ChatMessage> adding;
  for (const auto element : list) {
    dom::object message;
    std::string_view value;
    if (element.get(message) != simdjson::SUCCESS || message["value"].get(value) != simdjson::SUCCESS) {
      return absl::InvalidArgumentError("conversations: each needs from and value");
    }
    const std::string_view from = StringAt(message, "from");
    if (from == "system") {
      adding.push_back({"system", std::string(value)});
    } else if (from == "human" || from == "user") {
      adding.push_back({"user", std::string(value)});
      turns.push_back(std::exchange(adding, {}));
    }
  }
  return turns;
}

absl::StatusOr<DatasetRecord> Record(dom::element element) {
  dom::object object;
  if (element.get(object) != simdjson::SUCCESS) return absl::InvalidArgumentError("is not a JSON object");
  DatasetRecord record;
  dom::array list;
  std::string_view text;
  if (object["messages"].get(list) == simdjson::SUCCESS) {
    TP_ASSIGN_OR_RETURN(auto messages, Messages(list));
    record.turns.push_back(std::move(messages));
  } else if (object["conversations"].get(list) == simdjson::SUCCESS) {
    TP_ASSIGN_OR_RETURN(record.turns, Conversation(list));
  } else if (object["prompt"].get(text) == simdjson::SUCCESS ||
             object["input"].get(text) == simdjson::SUCCESS) {
    record.turns = {{{"user", std::string(text)}}};
  } else {
    return absl::InvalidArgumentError("has none of prompt, input, messages, conversations");
  }
  for (const char* key : {"max_tokens", "output_tokens", "output_length"}) {
    if (record.output_tokens == 0) record.output_tokens = CountAt(object, key);
  }
  return record;
}

class DatasetSource final : public SessionSource {
 public:
  DatasetSource(std::shared_ptr<const std::vector<DatasetRecord>> records, const DatasetReplay& replay,
                uint64_t seed)
      : records_(std::move(records)), replay_(replay), rng_(seed), order_(records_->size()) {
    std::iota(order_.begin(), order_.end(), size_t{0});
  }

  std::optional<Session> Next() override {
    if (next_ == 0 && replay_.shuffle) {
      for (size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[rng_.Below(i)]);
    }
    const DatasetRecord& record = (*records_)[order_[next_]];
    next_ = (next_ + 1) % order_.size();
    Session session;
    const size_t count = replay_.multi_turn ? record.turns.size() : 1;
    for (size_t i = 0; i < count; ++i) {
      Turn turn;
      turn.messages = record.turns[i];
      turn.output_tokens = record.output_tokens > 0 ? record.output_tokens : replay_.output.Draw(rng_);
      if (i > 0) turn.think = replay_.think;
      session.turns.push_back(std::move(turn));
    }
    return session;
  }

 private:
  const std::shared_ptr<const std::vector<DatasetRecord>> records_;
  const DatasetReplay replay_;
  Rng rng_;
  std::vector<size_t> order_;
  size_t next_ = 0;
};

}  // namespace

absl::StatusOr<std::vector<DatasetRecord>> ParseDataset(std::string_view text, const std::string& name) {
  std::vector<DatasetRecord> out;
  size_t number = 0;
  const auto add = [&](dom::element element) {
    ++number;
    auto record = Record(element);
    if (!record.ok()) return Annotate(record.status(), absl::StrCat(name, ": record ", number));
    // A ShareGPT conversation in which nobody asks anything.
    if (!record->turns.empty()) out.push_back(*std::move(record));
    return absl::OkStatus();
  };
  dom::parser parser;
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin != text.npos && text[begin] == '[') {
    dom::array list;
    if (const auto error = parser.parse(text.data(), text.size()).get(list)) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": ", simdjson::error_message(error)));
    }
    for (const auto element : list) TP_RETURN_IF_ERROR(add(element));
  } else {
    while (!text.empty()) {
      const size_t end = text.find('\n');
      const std::string_view line = text.substr(0, end);
      text.remove_prefix(end == text.npos ? text.size() : end + 1);
      if (line.find_first_not_of(" \t\r") == line.npos) continue;
      dom::element element;
      if (const auto error = parser.parse(line.data(), line.size()).get(element)) {
        return absl::InvalidArgumentError(
            absl::StrCat(name, ": record ", number + 1, ": ", simdjson::error_message(error)));
      }
      TP_RETURN_IF_ERROR(add(element));
    }
  }
  if (out.empty()) return absl::InvalidArgumentError(name + ": holds no prompt");
  return out;
}

absl::StatusOr<std::vector<DatasetRecord>> ReadDataset(const std::string& path) {
  TP_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kDatasetBytesMax));
  return ParseDataset(text, path);
}

std::unique_ptr<SessionSource> MakeSource(std::shared_ptr<const std::vector<DatasetRecord>> records,
                                          const DatasetReplay& replay, uint64_t seed) {
  return std::make_unique<DatasetSource>(std::move(records), replay, seed);
}

}  // namespace tidepool
