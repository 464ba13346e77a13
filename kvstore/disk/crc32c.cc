#include "kvstore/disk/crc32c.h"

#include <algorithm>
#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace tidepool {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;  // reflected

constexpr std::array<uint32_t, 256> MakeByteTable() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t v = i;
    for (int bit = 0; bit < 8; ++bit) v = (v >> 1) ^ ((v & 1) != 0 ? kPolynomial : 0);
    table[i] = v;
  }
  return table;
}
constexpr auto kByteTable = MakeByteTable();

// The register's way through `bytes`, without the inversions at both ends.
uint32_t UpdatePortable(uint32_t state, const std::byte* p, size_t n) {
  for (; n > 0; --n, ++p) state = kByteTable[(state ^ static_cast<uint32_t>(*p)) & 0xff] ^ (state >> 8);
  return state;
}

#if defined(__x86_64__)

// What `Lane` zero bytes do to the register. The register's update is linear over GF(2), so that this is a
// 32 x 32 bit matrix, kept as four tables of a byte each.
template <size_t Lane>
class ZeroShift {
 public:
  ZeroShift() {
    std::array<uint32_t, 32> columns{};
    for (uint32_t bit = 0; bit < 32; ++bit) {
      uint32_t state = 1u << bit;
      for (size_t i = 0; i < Lane; ++i) state = kByteTable[state & 0xff] ^ (state >> 8);
      columns[bit] = state;
    }
    for (uint32_t byte = 0; byte < 4; ++byte) {
      for (uint32_t value = 0; value < 256; ++value) {
        uint32_t sum = 0;
        for (uint32_t bit = 0; bit < 8; ++bit) {
          if ((value >> bit & 1) != 0) sum ^= columns[byte * 8 + bit];
        }
        tables_[byte][value] = sum;
      }
    }
  }
  uint32_t operator()(uint32_t state) const {
    return tables_[0][state & 0xff] ^ tables_[1][state >> 8 & 0xff] ^ tables_[2][state >> 16 & 0xff] ^
           tables_[3][state >> 24];
  }

 private:
  std::array<std::array<uint32_t, 256>, 4> tables_;
};

inline uint64_t Load(const std::byte* p) {
  uint64_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The instruction takes one word a cycle but answers after three: three lanes of a run at once, joined by
// shifting the earlier lanes over the later ones.
template <size_t Lane>
__attribute__((target("sse4.2"))) uint32_t UpdateLanes(uint32_t state, const std::byte*& p, size_t& n) {
  static_assert(Lane % 8 == 0);
  static const ZeroShift<Lane> shift;
  while (n >= 3 * Lane) {
    uint64_t a = state, b = 0, c = 0;
    for (size_t i = 0; i < Lane; i += 8) {
      a = _mm_crc32_u64(a, Load(p + i));
      b = _mm_crc32_u64(b, Load(p + Lane + i));
      c = _mm_crc32_u64(c, Load(p + 2 * Lane + i));
    }
    state = shift(shift(static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b)) ^ static_cast<uint32_t>(c);
    p += 3 * Lane;
    n -= 3 * Lane;
  }
  return state;
}

__attribute__((target("sse4.2"))) uint32_t UpdateHardware(uint32_t state, const std::byte* p, size_t n) {
  state = UpdateLanes<4096>(state, p, n);
  state = UpdateLanes<256>(state, p, n);
  uint64_t wide = state;
  for (; n >= 8; n -= 8, p += 8) wide = _mm_crc32_u64(wide, Load(p));
  state = static_cast<uint32_t>(wide);
  for (; n > 0; --n, ++p) state = _mm_crc32_u8(state, static_cast<uint8_t>(*p));
  return state;
}

#endif

uint32_t Update(uint32_t state, const std::byte* p, size_t n) {
#if defined(__x86_64__)
  if (Crc32cInHardware()) return UpdateHardware(state, p, n);
#endif
  return UpdatePortable(state, p, n);
}

}  // namespace

bool Crc32cInHardware() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("sse4.2") != 0;
  return has;
#else
  return false;
#endif
}

uint32_t Crc32c(std::span<const std::byte> bytes, uint32_t crc) {
  return ~Update(~crc, bytes.data(), bytes.size());
}

uint32_t Crc32cPortable(std::span<const std::byte> bytes, uint32_t crc) {
  return ~UpdatePortable(~crc, bytes.data(), bytes.size());
}

uint32_t Crc32cCopy(std::span<std::byte> dst, std::span<const std::byte> src, uint32_t crc) {
  // What was copied is still in the first-level cache when the checksum reads it.
  constexpr size_t kStep = 2 * 3 * 4096;
  uint32_t state = ~crc;
  for (size_t at = 0; at < src.size(); at += kStep) {
    const size_t n = std::min(kStep, src.size() - at);
    std::memcpy(dst.data() + at, src.data() + at, n);
    state = Update(state, dst.data() + at, n);
  }
  return ~state;
}

}  // namespace tidepool
