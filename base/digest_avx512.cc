// Built with -mavx512f; runs only where the CPU has it.
#include <immintrin.h>

#include "base/digest_kernels.h"

namespace tidepool {
namespace {

enum class Store { kNone, kCopy, kStream };

template <Store kStore>
inline void Put(std::byte* dst, __m512i v) {
  if constexpr (kStore == Store::kCopy) _mm512_storeu_si512(dst, v);
  if constexpr (kStore == Store::kStream) _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), v);
}

inline __m512i Mix(__m512i sum, __m512i data, __m512i secret) {
  const __m512i key = _mm512_xor_si512(data, secret);
  const __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
  const __m512i swapped = _mm512_shuffle_epi32(data, static_cast<_MM_PERM_ENUM>(_MM_SHUFFLE(1, 0, 3, 2)));
  return _mm512_add_epi64(sum, _mm512_add_epi64(swapped, product));
}

inline __m512i Scramble(__m512i sum, __m512i secret) {
  const __m512i prime = _mm512_set1_epi64(0x9E3779B1);
  const __m512i x = _mm512_xor_si512(_mm512_xor_si512(sum, _mm512_srli_epi64(sum, 47)), secret);
  const __m512i low = _mm512_mul_epu32(x, prime);
  const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), prime);
  return _mm512_add_epi64(low, _mm512_slli_epi64(high, 32));
}

template <Store kStore>
void Run(uint64_t* sums, const std::byte* src, size_t blocks, const unsigned char* secret, std::byte* dst) {
  __m512i sum = _mm512_load_si512(sums);
  for (; blocks > 0; --blocks) {
    for (int n = 0; n < 16; ++n) {
      const __m512i data = _mm512_loadu_si512(src);
      // Into the next blocks: the hardware's own prefetching stops at a page's end.
      _mm_prefetch(reinterpret_cast<const char*>(src) + 1024, _MM_HINT_T0);
      Put<kStore>(dst, data);
      sum = Mix(sum, data, _mm512_loadu_si512(secret + 8 * n));
      src += 64;
      if constexpr (kStore != Store::kNone) dst += 64;
    }
    sum = Scramble(sum, _mm512_loadu_si512(secret + 128));
  }
  _mm512_store_si512(sums, sum);
}

void Take(uint64_t* sums, const std::byte* src, size_t blocks, const unsigned char* secret) {
  Run<Store::kNone>(sums, src, blocks, secret, nullptr);
}

}  // namespace

const DigestKernels kDigestAvx512 = {Take, Run<Store::kCopy>, Run<Store::kStream>};

}  // namespace tidepool
