#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "kvstore/codec/block_codec.h"

namespace tidepool {

// One way to get a block from where it is.
struct CodecLevel {
  CodecId codec = CodecId::kNone;
  double bytes = 0;           // of a block's payload
  double encode_seconds = 0;  // of a block, at the sender, beside the sending of the one before
  double decode_seconds = 0;  // of a block, here, beside the arrival of the next
};

struct CodecChoice {
  bool recompute = false;  // compute the blocks instead of moving them
  size_t level = 0;        // otherwise: into the levels given
  double seconds = 0;      // what it should take
};

// Seconds until `blocks` blocks are here and readable: encoding, sending and decoding overlap between blocks,
// so the slowest of the three sets the pace, and the first block passes all of them.
double CodecLoadSeconds(const CodecLevel& level, size_t blocks, double bytes_per_second,
                        double latency_seconds);

// The one cost function of codecs and recomputation: T = min(load(level), recompute). Levels are given from
// the best quality to the worst. Chosen is the best one that arrives within `budget_seconds` and earlier than
// recomputing would be done; where none arrives in time, whatever is earliest; recomputing wherever it is
// done earlier than what would be chosen, and where nothing moves (no bandwidth). recompute_seconds may be
// infinite (nobody here can compute). Pure. Source of the rule: CacheGen (arXiv:2310.07240, section 5.3).
CodecChoice ChooseCodecLevel(std::span<const CodecLevel> levels, size_t blocks, double bytes_per_second,
                             double latency_seconds, double recompute_seconds, double budget_seconds);

// CodecLevelChooser: the same over measurements of its own (Core: no clock, not thread-safe). What a level
// costs is learnt from what was coded, the link's speed from what was sent.
class CodecLevelChooser {
 public:
  // Levels that `codec` may be sent as, from the best to the worst: of "cachegen" not encoded at all (a fast
  // link wants nothing else), then its three; else itself.
  CodecLevelChooser(const BlockCodec& codec, const BlockLayout& layout);

  void ObserveEncode(CodecId codec, size_t payload_bytes, double seconds);
  void ObserveDecode(CodecId codec, double seconds);
  // `bytes` on the wire took so long, without what ran beside them. Of less than a millisecond is not learnt
  // from: that is latency.
  void ObserveSend(double bytes, double seconds);

  // Without any bandwidth measured: the best level.
  CodecChoice Choose(size_t blocks, double recompute_seconds, double budget_seconds) const;
  std::span<const CodecLevel> levels() const { return levels_; }
  double bytes_per_second() const { return bytes_per_second_; }

 private:
  CodecLevel* Find(CodecId codec);

  std::vector<CodecLevel> levels_;
  double bytes_per_second_ = 0;
};

}  // namespace tidepool
