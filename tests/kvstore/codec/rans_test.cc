#include "kvstore/codec/rans.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/digest.h"
#include "base/rng.h"

namespace tidepool {
namespace {

struct Coded {
  std::vector<uint16_t> words;
  std::vector<int16_t> escapes;
  std::array<uint32_t, kRansLanes> states{};
};

// Runs of `run` symbols, run k under class classes[k].
Coded Encode(const std::vector<int>& values, size_t run, const std::vector<uint8_t>& classes) {
  RansEncoder encoder;
  const std::vector<int16_t> narrow(values.begin(), values.end());
  for (size_t i = 0; i < values.size(); i += run) {
    encoder.Add(narrow.data() + i, std::min(run, values.size() - i), classes[i / run]);
  }
  Coded out;
  encoder.Finish(out.words, out.states);
  out.escapes.assign(encoder.escapes().begin(), encoder.escapes().end());
  return out;
}
std::vector<int> Decode(const Coded& coded, size_t count, size_t run, const std::vector<uint8_t>& classes,
                        bool* at_end = nullptr) {
  RansDecoder decoder(std::as_bytes(std::span(coded.words)), std::as_bytes(std::span(coded.escapes)),
                      coded.states);
  std::vector<int16_t> out(count);
  for (size_t i = 0, k = 0; i < count; i += run, ++k) {
    decoder.Decode(&classes[k], 1, std::min(run, count - i), out.data() + i, 1);
  }
  if (at_end != nullptr) *at_end = decoder.AtEnd();
  return {out.begin(), out.end()};
}

TEST(Rans, EveryClassIsAProperDistributionThatCodesEverything) {
  for (const SymbolClass& c : Tables().classes) {
    EXPECT_EQ(std::accumulate(c.freq.begin(), c.freq.end(), 0), 1 << kRansBits);
    EXPECT_GE(c.freq[0], 1);
    for (int v = -c.range; v <= c.range; ++v) {
      EXPECT_GE(c.freq[static_cast<size_t>(v + 128)], 1);
      EXPECT_EQ(c.freq[static_cast<size_t>(v + 128)] - (v == 0 ? c.freq[128] - c.freq[128] : 0),
                c.freq[static_cast<size_t>(128 - v)]);
    }
  }
}

// The tables are part of the format: whoever changes them changes the version of the payload.
TEST(Rans, TablesAreThoseOfVersionOne) {
  Sha256 h;
  for (const SymbolClass& c : Tables().classes) {
    h.Update(std::span(reinterpret_cast<const uint8_t*>(c.slots.data()), c.slots.size() * sizeof(uint32_t)));
  }
  EXPECT_EQ(HexEncode(h.Finish()), "52184458bac1bf154850214c459e2700042030f6379fb70f750e9536dd7c6335");
}

TEST(Rans, WhatGoesInComesOut) {
  Rng rng(1);
  for (const size_t run : {1, 7, 8, 16, 32, 33}) {
    for (const size_t count : {0, 1, 5, 64, 1000, 4096}) {
      std::vector<uint8_t> classes;
      std::vector<int> values;
      for (size_t i = 0; i < count; ++i) {
        if (i % run == 0) classes.push_back(static_cast<uint8_t>(rng.Below(kSymbolClasses)));
        const int range = Tables().classes[classes.back()].range;
        values.push_back(static_cast<int>(rng.Below(2 * static_cast<uint64_t>(range) + 1)) - range);
        if (rng.Chance(0.01)) values.back() = static_cast<int>(rng.Below(65536)) - 32768;
      }
      bool at_end = false;
      EXPECT_EQ(Decode(Encode(values, run, classes), count, run, classes, &at_end), values);
      EXPECT_TRUE(at_end);
    }
  }
}

// Against the entropy of the source, not only of the table: normal symbols of every width that classes are
// made for, rounded, the class chosen by cost as the encoder of blocks does.
TEST(Rans, TheRateIsWithinTwoPercentOfTheEntropy) {
  Rng rng(2);
  for (const double sigma : {0.5, 0.8, 1.0, 1.7, 2.5, 4.0, 6.0, 10.0, 17.0}) {
    constexpr size_t kCount = 200000;
    std::vector<int> values(kCount);
    std::array<double, 2001> mass{};
    for (int v = -1000; v <= 1000; ++v) {
      const auto phi = [&](double x) { return 0.5 * std::erfc(-x / sigma / std::sqrt(2.0)); };
      mass[static_cast<size_t>(v + 1000)] = phi(v + 0.5) - phi(v - 0.5);
    }
    double entropy = 0;
    for (const double p : mass) entropy -= p > 0 ? p * std::log2(p) : 0;
    std::array<double, kSymbolClasses> cost{};
    for (int& v : values) {
      const double u = std::max(rng.Uniform(), 1e-300), w = rng.Uniform();
      v = static_cast<int>(std::lround(sigma * std::sqrt(-2 * std::log(u)) * std::cos(2 * M_PI * w)));
      for (size_t k = 0; k < kSymbolClasses; ++k) cost[k] += Tables().CostOf(v)[k];
    }
    const auto best = static_cast<uint8_t>(std::min_element(cost.begin(), cost.end()) - cost.begin());
    const Coded coded = Encode(values, kCount, {best});
    const double bits =
        16.0 * static_cast<double>(coded.words.size() + coded.escapes.size()) + 32 * kRansLanes;
    // The coder itself, against the distribution that it was given.
    EXPECT_LT(bits, cost[best] * 1.002) << sigma;
    // And that distribution, against the source.
    EXPECT_LT(bits, entropy * kCount * 1.02) << "sigma " << sigma << ", class " << int{best};
    EXPECT_GT(bits, entropy * kCount * 0.99);
  }
}

TEST(Rans, ADamagedStreamIsReadToItsEndsOnly) {
  Rng rng(3);
  const std::vector<uint8_t> classes = {0, 5, 9, 15};
  for (int i = 0; i < 2000; ++i) {
    Coded coded;
    for (size_t n = rng.Below(60); n > 0; --n) coded.words.push_back(static_cast<uint16_t>(rng.Next()));
    for (size_t n = rng.Below(5); n > 0; --n) coded.escapes.push_back(static_cast<int16_t>(rng.Next()));
    for (uint32_t& s : coded.states) s = static_cast<uint32_t>(rng.Next());
    coded.words.shrink_to_fit();
    Decode(coded, 128, 32, classes);  // the sanitizer judges
  }
}

TEST(Rans, AnyBitFlippedInTheWordsIsNoticedOrChangesOnlySymbols) {
  Rng rng(4);
  std::vector<int> values(512);
  for (int& v : values) v = static_cast<int>(rng.Below(9)) - 4;
  const std::vector<uint8_t> classes(16, 7);
  const Coded good = Encode(values, 32, classes);
  int noticed = 0;
  for (int i = 0; i < 200; ++i) {
    Coded bad = good;
    bad.words[rng.Below(bad.words.size())] ^= static_cast<uint16_t>(1u << rng.Below(16));
    bool at_end = true;
    Decode(bad, values.size(), 32, classes, &at_end);
    noticed += !at_end;
  }
  EXPECT_GT(noticed, 190);  // the payload's checksum is what finds all
}

}  // namespace
}  // namespace tidepool
