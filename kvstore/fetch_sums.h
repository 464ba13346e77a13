#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "kvstore/fetch_codec.h"
#include "kvstore/types.h"

namespace tidepool {

// KeptSums: checksums of what was sent of published blocks, so that the next fetch of a block need not read
// it all first. Core. By slot and generation: a published block's bytes never change, and its slot gets
// another generation before anybody may write to it again. (Should they change all the same, the receiver
// finds that they are not what the checksum says: a miss, where a checksum made anew would have vouched for
// them.)
//
// Bounded: slots that share a place (there are kMaxPlaces at most) push each other out, and of a block only
// kMaxRanges different ranges are kept.
class KeptSums {
 public:
  static constexpr size_t kMaxPlaces = 1 << 16;
  static constexpr size_t kMaxRanges = 64;

  explicit KeptSums(uint32_t slots) : places_(std::clamp<size_t>(slots, 1, kMaxPlaces)) {}

  // Of layers [begin, end) of the block that the slot holds.
  std::optional<uint64_t> Find(SlotRef slot, uint32_t begin, uint32_t end) const {
    const Place& place = places_[slot.slot % places_.size()];
    if (place.slot != slot) return std::nullopt;
    for (const RangeSum& range : place.ranges) {
      if (range.layer_begin == begin && range.layer_end == end) return range.checksum;
    }
    return std::nullopt;
  }

  // The block is published, and leased by the caller.
  void Keep(SlotRef slot, const RangeSum& range) {
    Place& place = places_[slot.slot % places_.size()];
    if (place.slot != slot || place.ranges.size() >= kMaxRanges) {
      place.slot = slot;
      place.ranges.clear();
    }
    place.ranges.push_back(range);
  }

 private:
  struct Place {
    SlotRef slot;  // generations begin with 1: nobody's is the one that it starts with
    absl::InlinedVector<RangeSum, 1> ranges;
  };
  std::vector<Place> places_;
};

}  // namespace tidepool
