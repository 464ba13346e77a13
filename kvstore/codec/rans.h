#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"

namespace tidepool {

// Entropy coding of small signed integers with asymmetric numeral systems, range variant (arXiv:1311.2540),
// eight interleaved states. A symbol is coded under one of sixteen fixed distributions ("classes") of rising
// width; the caller says with which. Tables are made of +, * and / of doubles only, so they are the same
// everywhere.

inline constexpr int kRansBits = 11;  // frequencies of a class add up to 2^11
inline constexpr int kRansLanes = 8;
inline constexpr int kSymbolClasses = 16;
inline constexpr uint32_t kRansLow = 1u << 16;  // states live in [2^16, 2^32)
inline constexpr int kEscape = -128;            // stands for a value outside the class's range

// One class: what is coded by a symbol of its own is [-range, range]; anything else is an escape.
struct SymbolClass {
  double sigma = 0;  // standard deviation it is made for
  int range = 0;
  // By value + 128 (the escape is entry 0).
  std::array<uint16_t, 256> start{}, freq{};
  // By the low kRansBits of a state: freq | (slot - start) << 12 | value << 24.
  std::array<uint32_t, 1 << kRansBits> slots{};
};

// How one symbol is written. inverse = ceil(2^43 / freq): x / freq == x * inverse >> 43 for every x < freq *
// 2^21, which is what an encoder divides. With e = inverse * freq - 2^43 < freq the quotient is right if e *
// x < 2^43, and freq < 2^11; and x * inverse stays below 2^64.
struct SymbolWriting {
  uint64_t inverse = 0;
  uint32_t start = 0, freq = 0;
};

struct SymbolTables {
  std::array<SymbolClass, kSymbolClasses> classes;
  std::array<float, kSymbolClasses> sigmas;                    // of the classes
  std::array<SymbolWriting, kSymbolClasses * 256> writings{};  // at class << 8 | (value + 128)
  // Bits that value v costs under each class, at cost[v + 128][class]; row 0: |v| > 127. An escape's 16 bits
  // are in.
  alignas(64) std::array<std::array<float, kSymbolClasses>, 256> cost;

  const std::array<float, kSymbolClasses>& CostOf(int value) const {
    return cost[value < -127 || value > 127 ? 0 : static_cast<size_t>(value + 128)];
  }
};
const SymbolTables& Tables();

// RansEncoder: collects runs of symbols in the order in which they will be decoded, then writes. Symbol i of
// a run is on lane i % kRansLanes.
class RansEncoder {
 public:
  void Clear() {
    symbols_.clear();
    escapes_.clear();
  }
  // values[i] for i < n, all under one class.
  void Add(const int16_t* values, size_t n, uint8_t symbol_class);
  // The words, appended, and the states to begin with. The escapes are stored beside them.
  void Finish(std::vector<uint16_t>& words, std::array<uint32_t, kRansLanes>& states);
  std::span<const int16_t> escapes() const { return escapes_; }

 private:
  std::vector<uint16_t> symbols_;  // value + 128 | class << 8 | lane << 12
  std::vector<int16_t> escapes_;
  std::vector<uint16_t> reversed_;
};

// RansDecoder (View of the words and escapes, unaligned little-endian bytes). Reads never leave them: a
// stream that asks for more sets failed() and goes on as zeros.
class RansDecoder {
 public:
  RansDecoder(std::span<const std::byte> words, std::span<const std::byte> escapes,
              const std::array<uint32_t, kRansLanes>& states)
      : word_(words.data()),
        words_end_(words.data() + words.size() / 2 * 2),
        escape_(escapes.data()),
        escapes_end_(escapes.data() + escapes.size() / 2 * 2),
        state_(states) {}

  // `runs` runs of n symbols each: symbol i of run r, under class classes[r] (< kSymbolClasses), goes to
  // out[r + i * stride].
  void Decode(const uint8_t* classes, size_t runs, size_t n, int16_t* out, size_t stride);

  // Everything was used up and every state is where an encoder begins.
  bool AtEnd() const;
  bool failed() const { return failed_; }

 private:
  template <bool kChecked>
  void Run(const uint8_t* classes, size_t runs, size_t n, int16_t* out, size_t stride);
  int16_t NextEscape();

  const std::byte* word_;
  const std::byte* words_end_;
  const std::byte* escape_;
  const std::byte* escapes_end_;
  std::array<uint32_t, kRansLanes> state_;
  bool failed_ = false;
};

}  // namespace tidepool
