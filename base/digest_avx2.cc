#include <immintrin.h>

#include "base/digest_kernels.h"

namespace tidepool {
namespace {

enum class Store { kNone, kCopy, kStream };

template <Store kStore>
inline void Put(std::byte* dst, __m256i v) {
  if constexpr (kStore == Store::kCopy) _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), v);
  if constexpr (kStore == Store::kStream) _mm256_stream_si256(reinterpret_cast<__m256i*>(dst), v);
}

inline __m256i Load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline __m256i Mix(__m256i sum, __m256i data, __m256i secret) {
  const __m256i key = _mm256_xor_si256(data, secret);
  const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
  const __m256i swapped = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
  return _mm256_add_epi64(sum, _mm256_add_epi64(swapped, product));
}

inline __m256i Scramble(__m256i sum, __m256i secret) {
  const __m256i prime = _mm256_set1_epi64x(0x9E3779B1);
  const __m256i x = _mm256_xor_si256(_mm256_xor_si256(sum, _mm256_srli_epi64(sum, 47)), secret);
  const __m256i low = _mm256_mul_epu32(x, prime);
  const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), prime);
  return _mm256_add_epi64(low, _mm256_slli_epi64(high, 32));
}

template <Store kStore>
void Run(uint64_t* sums, const std::byte* src, size_t blocks, const unsigned char* secret, std::byte* dst) {
  auto* const out = reinterpret_cast<__m256i*>(sums);
  __m256i a = _mm256_load_si256(out), b = _mm256_load_si256(out + 1);
  for (; blocks > 0; --blocks) {
    for (int n = 0; n < 16; ++n) {
      const __m256i first = Load(src), second = Load(src + 32);
      // Into the next blocks: the hardware's own prefetching stops at a page's end.
      _mm_prefetch(reinterpret_cast<const char*>(src) + 1024, _MM_HINT_T0);
      Put<kStore>(dst, first);
      Put<kStore>(dst + 32, second);
      a = Mix(a, first, Load(secret + 8 * n));
      b = Mix(b, second, Load(secret + 8 * n + 32));
      src += 64;
      if constexpr (kStore != Store::kNone) dst += 64;
    }
    a = Scramble(a, Load(secret + 128));
    b = Scramble(b, Load(secret + 160));
  }
  _mm256_store_si256(out, a);
  _mm256_store_si256(out + 1, b);
}

void Take(uint64_t* sums, const std::byte* src, size_t blocks, const unsigned char* secret) {
  Run<Store::kNone>(sums, src, blocks, secret, nullptr);
}

}  // namespace

const DigestKernels kDigestAvx2 = {Take, Run<Store::kCopy>, Run<Store::kStream>};

}  // namespace tidepool
