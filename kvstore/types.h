#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/digest.h"

namespace tidepool {

// BlockKey: the name of a sealed block's content; see keys.h for how it is made.
struct BlockKey {
  std::array<uint8_t, 32> bytes{};

  auto operator<=>(const BlockKey&) const = default;
  std::string ToHex() const { return HexEncode(bytes); }

  template <typename H>
  friend H AbslHashValue(H h, const BlockKey& k) {
    // The key is a cryptographic digest already: eight of its bytes are a hash.
    uint64_t v;
    std::memcpy(&v, k.bytes.data(), sizeof v);
    return H::combine(std::move(h), v);
  }
};

// SlotRef: a page of memory and the number that moves on at every reassignment. What the wire carries
// in place of an address: a frame with an old generation is dropped.
struct SlotRef {
  uint32_t slot = 0;
  uint64_t generation = 0;
  auto operator<=>(const SlotRef&) const = default;
};

// Tier: where a block lies, fastest first. The names are label values and enter the API.
enum class Tier : uint8_t { kDevice, kHost, kDisk };
inline constexpr size_t kTiers = 3;
constexpr std::string_view TierName(Tier tier) {
  constexpr std::array<std::string_view, kTiers> kNames = {"device", "host", "disk"};
  return kNames[static_cast<size_t>(tier)];
}

// BlockInfo: what is known of a sealed block besides its bytes; travels with it to lower tiers. The key is
// made from parent and tokens, so equal keys have equal tokens; whoever reads a block from a tier or a peer
// compares them all the same (a hit with other tokens is a miss).
struct BlockInfo {
  BlockKey key;
  std::optional<BlockKey>
      parent;  // the block before it in its chain, the first block's is the root; absent: not known
  std::vector<int32_t> tokens;  // block_tokens ids; empty: not known
  std::string tenant;           // who is charged for it
  uint64_t session = 0;         // of the conversation that made it; 0: none given
  uint32_t turn = 0;            // of that conversation
  uint32_t position = 0;        // index in its chain: it holds tokens [position, position + 1) * block_tokens
  float compute_seconds = 0;    // what computing it again would take; 0: not known

  bool operator==(const BlockInfo&) const = default;
};

// LeaseKind: what a lease on a slot is for. Counted by kind, so that a leak names its owner.
enum class LeaseKind : uint8_t {
  kSequence,  // a request that computes with it
  kTransfer,  // being sent to, or received from, a peer
  kTierIo,    // being read from or written to a lower tier
  kPeer,      // read in place by another process of this host
  kSwapped,   // of a request that was preempted: keeps nothing, but what it is on goes last
              // (BlockPool::SwapOut)
};
inline constexpr size_t kLeaseKinds = 5;
constexpr std::string_view LeaseKindName(LeaseKind kind) {
  constexpr std::array<std::string_view, kLeaseKinds> kNames = {"sequence", "transfer", "tier_io", "peer",
                                                                "swapped"};
  return kNames[static_cast<size_t>(kind)];
}

// Who uses the pool and what for. A request that says nothing is served all the same: conversations are
// recognised from the chains themselves (one that contains the last block of an earlier request's chain
// carries it on).
struct UseOptions {
  LeaseKind kind = LeaseKind::kSequence;
  std::string_view tenant = {};
  uint64_t session = 0;
};

// Which blocks a listing or a removal is about: those that match every field that is set.
struct BlockFilter {
  std::optional<std::string> tenant;
  std::optional<uint64_t> session;
  std::optional<BlockKey> root;  // blocks of chains that start at this root key, as far as that is known

  bool all() const { return !tenant && !session && !root; }
};

// PinKind: kHard: never evicted while pinned; kSoft: evicted only when nothing unpinned is left.
enum class PinKind : uint8_t { kSoft, kHard };
constexpr std::string_view PinKindName(PinKind kind) { return kind == PinKind::kHard ? "hard" : "soft"; }

}  // namespace tidepool
