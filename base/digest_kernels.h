#pragma once

#include <cstddef>
#include <cstdint>

namespace tidepool {

// The inner loop of XXH3-64 for inputs above 240 bytes (xxHash's specification): whole blocks of 16 stripes
// of 64 bytes are mixed into eight sums. No includes of ours and nothing inline: the translation units are
// built for different instruction sets, and the linker keeps one copy of what they share.
//
//   per stripe n, per 64-bit lane i:  key = data[i] ^ secret64(8 n + 8 i)
//                                     sums[i] += data[i ^ 1] + low32(key) * high32(key)
//   after 16 stripes:                 sums[i] = (sums[i] ^ sums[i] >> 47 ^ secret64(128 + 8 i)) * 0x9E3779B1
inline constexpr size_t kDigestBlock = 1024;

struct DigestKernels {
  // `sums`: 64-byte aligned. `secret`: XXH3's own, 192 bytes. Each byte of src is read once.
  void (*take)(uint64_t* sums, const std::byte* src, size_t blocks, const unsigned char* secret);
  // And stores it at dst.
  void (*copy)(uint64_t* sums, const std::byte* src, size_t blocks, const unsigned char* secret,
               std::byte* dst);
  // Past the cache; dst: 64-byte aligned.
  void (*stream)(uint64_t* sums, const std::byte* src, size_t blocks, const unsigned char* secret,
                 std::byte* dst);
};

extern const DigestKernels kDigestAvx2;
extern const DigestKernels kDigestAvx512;

}  // namespace tidepool
