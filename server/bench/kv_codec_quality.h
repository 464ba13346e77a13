#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace tidepool {

// What KV codecs cost the demo model (tools/demo_model), which answers from its context only: a wrong answer
// is lost KV. Passages of facts in the form that it was trained on, questions whose answer stands somewhere
// in the passage, greedy decoding; an answer counts only if every token of it is right.
struct KvCodecQualityOptions {
  std::string model = "tools/demo_model/model";
  // Names of kvstore/codec/block_codec.h, and "lossless" for what kv.disk.compress does; empty: all.
  std::vector<std::string> codecs;
  std::vector<uint32_t> contexts = {128, 256, 512, 1000, 1500};  // tokens of the prompt, or just less
  uint32_t questions = 100;                                      // of each kind at each length
  uint32_t block_tokens = 32;
  uint32_t threads = 1;
  uint64_t seed = 1;
};

struct KvCodecAnswers {
  double right = 0;        // share of the questions answered right
  double right_exact = 0;  // the same with exact KV
  double top1 = 0;         // share of the answers' tokens at which the likeliest one is that of exact KV
  double kl = 0;           // mean over the answers' tokens of KL(exact || coded), nats
};

struct KvCodecQualityRow {
  std::string codec;
  uint32_t context = 0;
  double bytes_per_token = 0;
  double ratio = 0;                     // bytes of exact KV / those
  double encode_ms = 0, decode_ms = 0;  // median of a block, one thread
  KvCodecAnswers first;   // the passage with its question went through the codec, as in a handoff
  KvCodecAnswers second;  // another question on what the first left in the cache: the passage's blocks
};

// Minutes at the defaults. Errors: of loading the model; InvalidArgument: a codec that does not exist, a
// context that the model has not or that is too short for a passage.
absl::StatusOr<std::vector<KvCodecQualityRow>> MeasureKvCodecQuality(const KvCodecQualityOptions& options);

// The rows as Markdown tables.
std::string KvCodecQualityTable(const std::vector<KvCodecQualityRow>& rows);

}  // namespace tidepool
