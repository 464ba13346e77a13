#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "server/bench/random.h"
#include "server/bench/session.h"

namespace tidepool {

// One record of a file of prompts.
struct DatasetRecord {
  std::vector<std::vector<ChatMessage>> turns;  // what each turn adds; not empty
  uint32_t output_tokens = 0;                   // 0: the file does not say
};

// Reads prompts: JSONL, or one JSON list, of objects in any of these shapes:
//   {"prompt": "..."} or {"input": "..."}
//   {"messages": [{"role", "content"}, ...]}            one turn with all of them
//   {"conversations": [{"from": "human"|"gpt"|"system", "value"}, ...]}   ShareGPT: each human message a turn
// with the answer's length, where known, in max_tokens, output_tokens or output_length (a number, or its
// text). Errors: NotFound, or InvalidArgument with the path and the record's number.
absl::StatusOr<std::vector<DatasetRecord>> ReadDataset(const std::string& path);
absl::StatusOr<std::vector<DatasetRecord>> ParseDataset(std::string_view text, const std::string& name);

struct DatasetReplay {
  LengthSpec output = LengthSpec::Fixed(128);  // where a record does not say
  bool multi_turn = false;                     // false: the first turn of each
  bool shuffle = false;
  absl::Duration think;
};

// The records in order, or shuffled, over and over.
std::unique_ptr<SessionSource> MakeSource(std::shared_ptr<const std::vector<DatasetRecord>> records,
                                          const DatasetReplay& replay, uint64_t seed);

}  // namespace tidepool
