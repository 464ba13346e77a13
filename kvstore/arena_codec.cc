#include "kvstore/arena_codec.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "base/status.h"

namespace tidepool {
namespace {

static_assert(std::endian::native == std::endian::little, "packets are written as they lie in memory");

enum Type : uint8_t {
  kHello = 1,
  kTake = 2,
  kRelease = 3,
  kDone = 4,
  kCancel = 5,
  kWelcome = 16,
  kRefuse = 17,
  kGrant = 18
};

struct Writer {
  std::string out;

  template <typename T>
  void Put(T value) {
    static_assert(std::is_integral_v<T>);
    out.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void Put(const std::string& text) {
    const size_t n = std::min(text.size(), kMaxArenaText);
    Put(static_cast<uint16_t>(n));
    out.append(text.data(), n);
  }
  void Count(size_t n, size_t limit) {
    TP_CHECK(n <= limit);
    Put(static_cast<uint32_t>(n));
  }

  void operator()(const ArenaHello& p) {
    Put(uint8_t{kHello});
    Put(p.version);
    for (const std::string* s : {&p.token, &p.boot, &p.worker, &p.fingerprint, &p.layout}) Put(*s);
  }
  void operator()(const ArenaTake& p) {
    out.reserve(64 + p.request.size() + p.keys.size() * 32);
    Put(uint8_t{kTake});
    Put(p.id);
    Put(p.time_left_ms);
    Put(p.request);
    Count(p.keys.size(), kMaxArenaKeys);
    for (const BlockKey& k : p.keys)
      out.append(reinterpret_cast<const char*>(k.bytes.data()), k.bytes.size());
  }
  void operator()(const ArenaRelease& p) {
    Put(uint8_t{kRelease});
    Count(p.ids.size(), kMaxArenaReleases);
    for (uint64_t id : p.ids) Put(id);
  }
  void operator()(const ArenaDone& p) {
    Put(uint8_t{kDone});
    Put(p.request);
  }
  void operator()(const ArenaCancel& p) {
    Put(uint8_t{kCancel});
    Put(p.id);
  }
  void operator()(const ArenaWelcome& p) {
    Put(uint8_t{kWelcome});
    Put(p.version);
    for (uint64_t n : {p.arena_bytes, p.stride, p.slot_bytes}) Put(n);
    Put(p.slots);
    for (uint64_t n : {p.directory_bytes, p.claims_bytes}) Put(n);
  }
  void operator()(const ArenaRefuse& p) {
    Put(uint8_t{kRefuse});
    Put(static_cast<uint8_t>(p.reason));
    Put(p.text);
  }
  void operator()(const ArenaGrant& p) {
    out.reserve(32 + p.slots.size() * 12);
    Put(uint8_t{kGrant});
    Put(p.id);
    Put(uint8_t{p.short_of_room});
    Count(p.slots.size(), kMaxArenaKeys);
    for (const SlotRef& s : p.slots) {
      Put(s.slot);
      Put(s.generation);
    }
  }
};

struct Reader {
  std::span<const std::byte> in;
  bool good = true;

  const std::byte* Take(size_t n) {
    if (!good || in.size() < n) {
      good = false;
      return nullptr;
    }
    const std::byte* at = in.data();
    in = in.subspan(n);
    return at;
  }
  template <typename T>
  T Get() {
    T value{};
    if (const std::byte* at = Take(sizeof value)) std::memcpy(&value, at, sizeof value);
    return value;
  }
  std::string Text() {
    const auto n = Get<uint16_t>();
    if (n > kMaxArenaText) good = false;
    const std::byte* at = Take(n);
    return at != nullptr ? std::string(reinterpret_cast<const char*>(at), n) : std::string();
  }
  // A count whose elements are all there.
  size_t Count(size_t limit, size_t element) {
    const auto n = Get<uint32_t>();
    if (n > limit || in.size() / element < n) good = false;
    return good ? n : 0;
  }

  ArenaPacket Body(uint8_t type) {
    switch (type) {
      case kHello: {
        ArenaHello p;
        p.version = Get<uint8_t>();
        for (std::string* s : {&p.token, &p.boot, &p.worker, &p.fingerprint, &p.layout}) *s = Text();
        return p;
      }
      case kTake: {
        ArenaTake p;
        p.id = Get<uint64_t>();
        p.time_left_ms = Get<uint32_t>();
        p.request = Text();
        p.keys.resize(Count(kMaxArenaKeys, sizeof(BlockKey::bytes)));
        for (BlockKey& k : p.keys) std::memcpy(k.bytes.data(), Take(k.bytes.size()), k.bytes.size());
        return p;
      }
      case kRelease: {
        ArenaRelease p;
        p.ids.resize(Count(kMaxArenaReleases, sizeof(uint64_t)));
        for (uint64_t& id : p.ids) id = Get<uint64_t>();
        return p;
      }
      case kDone:
        return ArenaDone{Text()};
      case kCancel:
        return ArenaCancel{Get<uint64_t>()};
      case kWelcome: {
        ArenaWelcome p;
        p.version = Get<uint8_t>();
        for (uint64_t* n : {&p.arena_bytes, &p.stride, &p.slot_bytes}) *n = Get<uint64_t>();
        p.slots = Get<uint32_t>();
        for (uint64_t* n : {&p.directory_bytes, &p.claims_bytes}) *n = Get<uint64_t>();
        return p;
      }
      case kRefuse: {
        const auto reason = Get<uint8_t>();
        if (reason == 0 || reason >= kArenaRefusals) good = false;
        return ArenaRefuse{static_cast<ArenaRefusal>(reason), Text()};
      }
      case kGrant: {
        ArenaGrant p;
        p.id = Get<uint64_t>();
        p.short_of_room = Get<uint8_t>() != 0;
        p.slots.resize(Count(kMaxArenaKeys, sizeof(uint32_t) + sizeof(uint64_t)));
        for (SlotRef& s : p.slots) {
          s.slot = Get<uint32_t>();
          s.generation = Get<uint64_t>();
        }
        return p;
      }
      default:
        good = false;
        return ArenaCancel{};
    }
  }
};

}  // namespace

std::string EncodeArenaPacket(const ArenaPacket& packet) {
  Writer w;
  std::visit(w, packet);
  return std::move(w.out);
}

absl::StatusOr<ArenaPacket> DecodeArenaPacket(std::span<const std::byte> bytes) {
  Reader r{bytes};
  const auto type = r.Get<uint8_t>();
  ArenaPacket out = r.Body(type);
  if (!r.good || !r.in.empty()) {
    return absl::DataLossError("a packet of type " + std::to_string(type) + " and " +
                               std::to_string(bytes.size()) + " bytes does not decode");
  }
  return out;
}

}  // namespace tidepool
