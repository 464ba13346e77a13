#include "kvstore/codec/rans.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace tidepool {
namespace {

// Library functions may differ in their last bit between two machines, and with it the tables. Only exactly
// rounded operations here; 1e-9 is far more than the frequencies resolve.
double ExpOfMinus(double x) {
  if (x > 60) return 0;
  double t = x / 1048576;
  double y = 1 - t + t * t / 2;
  for (int i = 0; i < 20; ++i) y *= y;
  return y;
}

// Density of the classes, up to a factor: what the rounded deltas of keys and values look like, channel by
// channel, is a normal distribution with somewhat more weight in its tails.
double Density(double x, double sigma) {
  const double narrow = sigma * 0.86, wide = sigma * 1.55;
  const double a = ExpOfMinus(x * x / (2 * narrow * narrow)) / narrow;
  const double b = ExpOfMinus(x * x / (2 * wide * wide)) / wide;
  return 0.84 * a + 0.16 * b;
}

// Probability of rounding to v.
double MassOf(int v, double sigma) {
  constexpr int kSteps = 32;
  double sum = 0;
  for (int i = 0; i < kSteps; ++i) sum += Density(v - 0.5 + (i + 0.5) / kSteps, sigma);
  return sum / kSteps;
}

void Build(SymbolClass& c, double sigma) {
  c.sigma = sigma;
  c.range = std::clamp(static_cast<int>(sigma * 4.2) + 1, 1, 127);
  std::array<double, 128> mass{};
  double total = 0;
  for (int v = 0; v <= c.range; ++v) {
    mass[static_cast<size_t>(v)] = MassOf(v, sigma);
    total += mass[static_cast<size_t>(v)] * (v == 0 ? 1 : 2);
  }
  const int symbols = 2 * c.range + 2;
  // One slot for each, so that everything can be coded; the rest by probability.
  const double share = ((1 << kRansBits) - symbols) / total;
  int used = 1;
  c.freq[0] = 1;
  for (int v = -c.range; v <= c.range; ++v) {
    const int f = 1 + static_cast<int>(mass[static_cast<size_t>(v < 0 ? -v : v)] * share);
    c.freq[static_cast<size_t>(v + 128)] = static_cast<uint16_t>(f);
    used += f;
  }
  c.freq[128] = static_cast<uint16_t>(c.freq[128] + (1 << kRansBits) - used);  // what rounding down left
  uint32_t start = 0;
  for (size_t i = 0; i < c.freq.size(); ++i) {
    c.start[i] = static_cast<uint16_t>(start);
    for (uint32_t k = 0; k < c.freq[i]; ++k) {
      const uint32_t value = static_cast<uint8_t>(static_cast<int8_t>(static_cast<int>(i) - 128));
      c.slots[start + k] = c.freq[i] | (k << 12) | (value << 24);
    }
    start += c.freq[i];
  }
}

uint16_t LoadWord(const std::byte* p) {
  uint16_t out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

}  // namespace

const SymbolTables& Tables() {
  static const SymbolTables* const tables = [] {
    static_assert(std::endian::native == std::endian::little);
    auto* t = new SymbolTables;
    double sigma = 0.15;  // the narrowest: a channel that hardly moves
    for (SymbolClass& c : t->classes) {
      Build(c, sigma);
      sigma *= sigma < 0.2 ? 2.0 : 1.38;
    }
    for (size_t k = 0; k < kSymbolClasses; ++k) {
      const SymbolClass& c = t->classes[k];
      t->sigmas[k] = static_cast<float>(c.sigma);
      for (size_t at = 0; at < 256; ++at) {
        const uint64_t freq = c.freq[at];
        if (freq > 0)
          t->writings[k << 8 | at] = {((uint64_t{1} << 43) + freq - 1) / freq, c.start[at], c.freq[at]};
      }
    }
    for (int v = -128; v < 128; ++v) {
      for (size_t k = 0; k < kSymbolClasses; ++k) {
        const SymbolClass& c = t->classes[k];
        const bool escape = v < -c.range || v > c.range;
        const double f = escape ? c.freq[0] : c.freq[static_cast<size_t>(v + 128)];
        t->cost[static_cast<size_t>(v + 128)][k] =
            static_cast<float>(kRansBits - std::log2(f) + (escape ? 16 : 0));
      }
    }
    return t;
  }();
  return *tables;
}

void RansEncoder::Add(const int16_t* values, size_t n, uint8_t symbol_class) {
  const int range = Tables().classes[symbol_class].range;
  const size_t before = symbols_.size();
  symbols_.resize(before + n);
  uint16_t* out = symbols_.data() + before;
  const uint32_t base = uint32_t{symbol_class} << 8;
  for (size_t i = 0; i < n; ++i) {
    const int value = values[i];
    uint32_t at = static_cast<uint32_t>(value + 128);
    if (value < -range || value > range) [[unlikely]] {
      escapes_.push_back(static_cast<int16_t>(value));
      at = 0;
    }
    out[i] = static_cast<uint16_t>(base | at | (i % kRansLanes) << 12);
  }
}

void RansEncoder::Finish(std::vector<uint16_t>& words, std::array<uint32_t, kRansLanes>& states) {
  const SymbolWriting* writings = Tables().writings.data();
  std::array<uint32_t, kRansLanes> state;
  state.fill(kRansLow);
  // A word for each symbol at most, from the back: the last symbol goes in first, so that decoding runs
  // forwards.
  reversed_.resize(symbols_.size() + 1);
  uint16_t* word = reversed_.data() + reversed_.size();
  for (size_t i = symbols_.size(); i-- > 0;) {
    const uint32_t symbol = symbols_[i];
    const SymbolWriting& w = writings[symbol & 0xfff];
    uint32_t x = state[symbol >> 12];
    // Written in any case, kept where it is needed: no branch, which nobody could predict.
    const uint32_t full = (x >> (32 - kRansBits)) >= w.freq ? 1 : 0;
    word[-1] = static_cast<uint16_t>(x);
    word -= full;
    x >>= 16 * full;
    const auto quotient = static_cast<uint32_t>(x * w.inverse >> 43);
    state[symbol >> 12] = (quotient << kRansBits) + (x - quotient * w.freq) + w.start;
  }
  states = state;
  words.insert(words.end(), word, reversed_.data() + reversed_.size());
}

int16_t RansDecoder::NextEscape() {
  if (escape_ == escapes_end_) {
    failed_ = true;
    return 0;
  }
  const auto value = static_cast<int16_t>(LoadWord(escape_));
  escape_ += 2;
  return value;
}

template <bool kChecked>
void RansDecoder::Run(const uint8_t* classes, size_t runs, size_t n, int16_t* out, size_t stride) {
  const auto& tables = Tables().classes;
  const std::byte* word = word_;
  uint32_t state[kRansLanes];
  for (size_t lane = 0; lane < kRansLanes; ++lane) state[lane] = state_[lane];
  for (size_t r = 0; r < runs; ++r, ++out) {
    const uint32_t* slots = tables[classes[r]].slots.data();
    const auto step = [&](uint32_t x, int16_t * to) __attribute__((always_inline)) {
      const uint32_t slot = slots[x & ((1 << kRansBits) - 1)];
      int value = static_cast<int32_t>(slot) >> 24;
      x = (slot & 0xfff) * (x >> kRansBits) + ((slot >> 12) & 0x7ff);
      if constexpr (kChecked) {
        if (x < kRansLow) {
          if (word == words_end_) {
            failed_ = true;
            x = kRansLow;
          } else {
            x = (x << 16) | LoadWord(word);
            word += 2;
          }
        }
      } else {
        // About every third symbol takes a word, which no predictor foresees: arithmetic, so that no compiler
        // makes a branch of it.
        const uint32_t low = x < kRansLow ? 1 : 0;
        x = (x << (16 * low)) | (LoadWord(word) & (0 - low));
        word += 2 * low;
      }
      if (value == kEscape) [[unlikely]]
        value = NextEscape();
      *to = static_cast<int16_t>(value);
      return x;
    };
    size_t i = 0;
    int16_t* to = out;
    for (; i + kRansLanes <= n; i += kRansLanes, to += kRansLanes * stride) {
#pragma GCC unroll 8
      for (size_t lane = 0; lane < kRansLanes; ++lane) state[lane] = step(state[lane], to + lane * stride);
    }
    for (size_t lane = 0; i < n; ++i, ++lane, to += stride) state[lane] = step(state[lane], to);
  }
  word_ = word;
  for (size_t lane = 0; lane < kRansLanes; ++lane) state_[lane] = state[lane];
}

void RansDecoder::Decode(const uint8_t* classes, size_t runs, size_t n, int16_t* out, size_t stride) {
  while (runs > 0) {
    // A symbol takes one word at most, and the loop without checks looks at one more.
    const size_t words = static_cast<size_t>(words_end_ - word_) / 2;
    const size_t safe = words > 1 ? std::min(runs, (words - 1) / std::max<size_t>(n, 1)) : 0;
    const size_t now = safe > 0 ? safe : 1;
    if (safe > 0) {
      Run<false>(classes, now, n, out, stride);
    } else {
      Run<true>(classes, now, n, out, stride);
    }
    classes += now;
    out += now;
    runs -= now;
  }
}

bool RansDecoder::AtEnd() const {
  return !failed_ && word_ == words_end_ && escape_ == escapes_end_ &&
         std::all_of(state_.begin(), state_.end(), [](uint32_t x) { return x == kRansLow; });
}

}  // namespace tidepool
