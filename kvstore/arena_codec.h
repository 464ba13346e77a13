#pragma once

// Codec of the packets between two processes of one host that share an arena (arena_server.h). One packet is
// one SOCK_SEQPACKET message, at most kMaxArenaPacket bytes, little-endian.
//
//   packet   := type u8 | body                            str := length u16 | bytes
//   to the owner:
//   HELLO 1    := version u8 | token str | boot str | worker str | fingerprint str | layout str
//                 (boot: of the process that the peer means to talk to)
//   TAKE 2     := id u64 | time_left_ms u32 | request str | count u32 | count * key 32 bytes
//   RELEASE 3  := count u32 | count * id u64              (of grants; 0 of them: look at the claims)
//   DONE 4     := request str                             (its offers may go)
//   CANCEL 5   := id u64                                  (of a TAKE not yet answered)
//   from the owner:
//   WELCOME 16 := version u8 | arena u64 | stride u64 | slot_bytes u64 | slots u32 | directory u64 | claims
//   u64
//                 (sizes in bytes; with three descriptors: arena, directory, claims)
//   REFUSE 17  := reason u8 | text str                    (nothing more will come)
//   GRANT 18   := id u64 | short_of_room u8 | count u32 | count * (slot u32 | generation u64)
//                 (slot 2^32 - 1: absent)
//
// HELLO's and REFUSE's grammar is the same in all versions.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "kvstore/types.h"

namespace tidepool {

inline constexpr uint8_t kArenaProtocolVersion = 2;
inline constexpr size_t kMaxArenaKeys = 4096;
inline constexpr size_t kMaxArenaText = 1024;
inline constexpr size_t kMaxArenaReleases = 4096;
inline constexpr size_t kMaxArenaPacket = 64 + kMaxArenaText + kMaxArenaKeys * 32;
inline constexpr uint32_t kAbsentSlot = UINT32_MAX;

struct ArenaHello {
  uint8_t version = kArenaProtocolVersion;
  std::string token, boot, worker, fingerprint, layout;
  bool operator==(const ArenaHello&) const = default;
};
struct ArenaTake {
  uint64_t id = 0;
  uint32_t time_left_ms = 0;
  std::string request;
  std::vector<BlockKey> keys;
  bool operator==(const ArenaTake&) const = default;
};
struct ArenaRelease {
  std::vector<uint64_t> ids;
  bool operator==(const ArenaRelease&) const = default;
};
struct ArenaDone {
  std::string request;
  bool operator==(const ArenaDone&) const = default;
};
struct ArenaCancel {
  uint64_t id = 0;
  bool operator==(const ArenaCancel&) const = default;
};
struct ArenaWelcome {
  uint8_t version = kArenaProtocolVersion;
  uint64_t arena_bytes = 0, stride = 0, slot_bytes = 0;
  uint32_t slots = 0;
  uint64_t directory_bytes = 0, claims_bytes = 0;
  bool operator==(const ArenaWelcome&) const = default;
};
// Values are stable.
enum class ArenaRefusal : uint8_t {
  kToken = 1,
  kBoot = 2,
  kMismatch = 3,
  kBusy = 4,
  kMalformed = 5,
  kUser = 6
};
inline constexpr size_t kArenaRefusals = 7;  // one beyond the last
struct ArenaRefuse {
  ArenaRefusal reason = ArenaRefusal::kMalformed;
  std::string text;
  bool operator==(const ArenaRefuse&) const = default;
};
struct ArenaGrant {
  uint64_t id = 0;
  bool short_of_room = false;
  std::vector<SlotRef> slots;
  bool operator==(const ArenaGrant&) const = default;
};
using ArenaPacket = std::variant<ArenaHello, ArenaTake, ArenaRelease, ArenaDone, ArenaCancel, ArenaWelcome,
                                 ArenaRefuse, ArenaGrant>;

// Strings longer than kMaxArenaText are cut, lists beyond their limits are programmer mistakes.
std::string EncodeArenaPacket(const ArenaPacket& packet);
// DataLoss: cut short, trailing bytes, a count or a length beyond its limit, an unknown type or value.
absl::StatusOr<ArenaPacket> DecodeArenaPacket(std::span<const std::byte> bytes);

}  // namespace tidepool
