#include "kvstore/codec/cachegen.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "kernels/kv_codec.h"
#include "kvstore/codec/rans.h"

namespace tidepool {
namespace {

constexpr uint32_t kAnchorGroup = 32;
constexpr uint8_t kCoded = 0, kRaw = 1;
constexpr int kMaxCode = 16000;  // anchors and differences of such codes fit int16

size_t PlaneHeadBytes(const BlockLayout& l) {
  return 2 * l.kv_heads * (sizeof(float) + 1) + (size_t{2} * l.kv_heads * l.head_dim + 1) / 2;
}
size_t StreamHeadBytes() { return 2 * sizeof(uint32_t) + kRansLanes * sizeof(uint32_t); }
uint32_t GroupsOf(const BlockLayout& l) { return (l.block_tokens + kAnchorGroup - 1) / kAnchorGroup; }

template <typename T>
void Append(std::vector<std::byte>& out, const T* values, size_t count) {
  const auto* bytes = reinterpret_cast<const std::byte*>(values);
  out.insert(out.end(), bytes, bytes + count * sizeof(T));
}

// One layer's numbers on their way into a stream (buffers kept between layers).
class LayerEncoder {
 public:
  LayerEncoder(const BlockLayout& layout, int level, CacheGenCost* cost)
      : layout_(layout), level_(level), cost_(cost) {
    values_.resize(layout.head_elems());
    codes_.resize(layout.head_elems());
    anchors_.resize(size_t{GroupsOf(layout)} * layout.head_dim);
    columns_.resize(layout.head_elems());
    sums_.resize(3 * size_t{layout.head_dim});
    totals_.resize(layout.head_dim);
  }

  bool Encode(uint32_t layer, std::span<const std::byte> raw, std::vector<std::byte>& out) {
    steps_.clear();
    anchor_classes_.clear();
    classes_.clear();
    stream_.Clear();
    ideal_bits_ = anchor_bits_ = 0;
    for (uint32_t plane = 0; plane < 2 * layout_.kv_heads; ++plane) {
      const bool v = plane >= layout_.kv_heads;
      const size_t bytes = layout_.head_elems() * DTypeBytes(layout_.dtype);
      KvWiden(layout_.dtype, raw.data() + plane * bytes, layout_.head_elems(), values_.data());
      if (!EncodePlane(CacheGenBins(level_, layer, layout_.layers, v))) return false;
    }
    Write(raw, out);
    return true;
  }

 private:
  // Loops over tokens have the channels inside, contiguous and independent: those vectorise.
  bool EncodePlane(int bins) {
    const uint32_t dim = layout_.head_dim, tokens = layout_.block_tokens;
    const float step = StepOf(bins);
    if (step < 0) return false;
    steps_.push_back(step);
    const float inverse = step > 0 ? 1.0f / step : 0.0f;
    for (size_t i = 0; i < codes_.size(); ++i) {
      const float y = std::min(std::max(values_[i] * inverse, -float{kMaxCode}), float{kMaxCode});
      codes_[i] = static_cast<int16_t>(static_cast<int32_t>(std::nearbyint(y)));
    }
    for (uint32_t g = 0; g < GroupsOf(layout_); ++g) TakeAnchors(g);
    for (uint32_t t = 0; t < tokens; ++t) {
      for (uint32_t c = 0; c < dim; ++c) columns_[size_t{c} * tokens + t] = codes_[size_t{t} * dim + c];
    }
    AddAnchors();
    for (uint32_t c = 0; c < dim; ++c) AddChannel(c);
    return true;
  }

  // Codes of one group become differences from each channel's rounded mean.
  void TakeAnchors(uint32_t group) {
    const uint32_t dim = layout_.head_dim, first = group * kAnchorGroup;
    const uint32_t count = std::min(kAnchorGroup, layout_.block_tokens - first);
    int16_t* anchor = anchors_.data() + size_t{group} * dim;
    std::fill(totals_.begin(), totals_.end(), 0);
    for (uint32_t t = first; t < first + count; ++t) {
      for (uint32_t c = 0; c < dim; ++c) totals_[c] += codes_[size_t{t} * dim + c];
    }
    const float share = 1.0f / static_cast<float>(count);
    for (uint32_t c = 0; c < dim; ++c) {
      anchor[c] =
          static_cast<int16_t>(static_cast<int32_t>(std::nearbyint(static_cast<float>(totals_[c]) * share)));
    }
    for (uint32_t t = first; t < first + count; ++t) {
      int16_t* code = codes_.data() + size_t{t} * dim;
      for (uint32_t c = 0; c < dim; ++c) code[c] = static_cast<int16_t>(code[c] - anchor[c]);
    }
  }

  // 8 mean standard deviations of the channels in `bins` steps; 0 where all is zero, -1 where a number cannot
  // be encoded. Where all tokens are alike the step follows the magnitude instead.
  float StepOf(int bins) {
    const uint32_t dim = layout_.head_dim, tokens = layout_.block_tokens;
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    float *sum = sums_.data(), *most = sum + dim, *squares = most + dim;
    for (uint32_t t = 0; t < tokens; ++t) {
      const float* row = values_.data() + size_t{t} * dim;
      for (uint32_t c = 0; c < dim; ++c) {
        const float a = std::fabs(row[c]);
        sum[c] += a - a + row[c];  // NaN for good where one is NaN or infinite
        most[c] = std::max(most[c], a);
      }
    }
    float amax = 0;
    for (uint32_t c = 0; c < dim; ++c) {
      if (sum[c] != sum[c]) return -1;
      amax = std::max(amax, most[c]);
    }
    if (!(amax < kKvHuge)) return -1;
    if (amax < kKvTiny) return 0;
    const float scale = 1.0f / amax, share = scale / static_cast<float>(tokens);  // squares would overflow
    for (uint32_t c = 0; c < dim; ++c) sum[c] *= share;
    for (uint32_t t = 0; t < tokens; ++t) {
      const float* row = values_.data() + size_t{t} * dim;
      for (uint32_t c = 0; c < dim; ++c) {
        const float d = row[c] * scale - sum[c];
        squares[c] += d * d;
      }
    }
    double deviation = 0;
    for (uint32_t c = 0; c < dim; ++c) deviation += std::sqrt(squares[c] / static_cast<float>(tokens));
    const double mean = std::max(deviation / dim, 1.0 / 2048);
    // No code may leave int16.
    return std::max(static_cast<float>(8 * mean / bins), 1.0f / kMaxCode) * amax;
  }

  void AddAnchors() {
    const uint32_t dim = layout_.head_dim;
    const uint8_t best = Cheapest(anchors_.data(), anchors_.size(), anchor_bits_);
    anchor_classes_.push_back(best);
    for (uint32_t g = 0; g < GroupsOf(layout_); ++g)
      stream_.Add(anchors_.data() + size_t{g} * dim, dim, best);
  }

  void AddChannel(uint32_t c) {
    const uint32_t tokens = layout_.block_tokens;
    const int16_t* column = columns_.data() + size_t{c} * tokens;
    const uint8_t best = Cheapest(column, tokens, ideal_bits_);
    classes_.push_back(best);
    stream_.Add(column, tokens, best);
  }

  // The class under which n values take the fewest bits, which are added to `bits`.
  uint8_t Cheapest(const int16_t* values, size_t n, double& bits) {
    // The mean magnitude says nearly which; the neighbours are tried.
    uint32_t sum = 0;
    for (size_t i = 0; i < n; ++i) sum += static_cast<uint32_t>(std::abs(int{values[i]}));
    const float sigma = 1.25f * static_cast<float>(sum) / static_cast<float>(n);  // of a normal distribution
    size_t near = 1;
    while (near + 2 < kSymbolClasses && tables_.sigmas[near] < sigma) ++near;
    typedef float Four __attribute__((vector_size(16)));
    constexpr size_t kFour = 4;
    const size_t first = std::min(near - 1, kSymbolClasses - kFour);
    Four sums{};
    for (size_t i = 0; i < n; ++i) {
      Four row;
      std::memcpy(&row, tables_.CostOf(values[i]).data() + first, sizeof row);
      sums += row;
    }
    std::array<float, kFour> cost;
    std::memcpy(cost.data(), &sums, sizeof sums);
    const auto best = std::min_element(cost.begin(), cost.end());
    bits += *best;
    return static_cast<uint8_t>(first + static_cast<size_t>(best - cost.begin()));
  }

  void Write(std::span<const std::byte> raw, std::vector<std::byte>& out) {
    words_.clear();
    std::array<uint32_t, kRansLanes> states;
    stream_.Finish(words_, states);
    const std::span<const int16_t> escapes = stream_.escapes();
    const size_t side = PlaneHeadBytes(layout_) + StreamHeadBytes();
    const size_t coded = side + 2 * (words_.size() + escapes.size());
    if (coded >= raw.size()) {
      out.push_back(std::byte{kRaw});
      out.insert(out.end(), raw.begin(), raw.end());
      return;
    }
    out.push_back(std::byte{kCoded});
    for (size_t p = 0; p < steps_.size(); ++p) {
      Append(out, &steps_[p], 1);
      Append(out, &anchor_classes_[p], 1);
    }
    for (size_t i = 0; i < classes_.size(); i += 2) {
      const int high = i + 1 < classes_.size() ? classes_[i + 1] : 0;
      out.push_back(static_cast<std::byte>(classes_[i] | (high << 4)));
    }
    const uint32_t counts[] = {static_cast<uint32_t>(words_.size()), static_cast<uint32_t>(escapes.size())};
    Append(out, counts, 2);
    Append(out, states.data(), states.size());
    Append(out, words_.data(), words_.size());
    Append(out, escapes.data(), escapes.size());
    if (cost_ == nullptr) return;
    cost_->symbols += raw.size() / DTypeBytes(layout_.dtype);
    cost_->ideal_bits += ideal_bits_;
    cost_->anchor_bits += anchor_bits_;
    cost_->stream_bits += 16 * (words_.size() + escapes.size()) + 32 * kRansLanes;
    cost_->side_bits += 8 * (1 + side) - 32 * kRansLanes;
  }

  const BlockLayout& layout_;
  const int level_;
  CacheGenCost* const cost_;
  const SymbolTables& tables_ = Tables();
  std::vector<float> values_, sums_;
  std::vector<int16_t> codes_, columns_, anchors_;  // [token][channel], [channel][token], [group][channel]
  std::vector<int32_t> totals_;
  std::vector<float> steps_;
  std::vector<uint8_t> anchor_classes_, classes_;
  std::vector<uint16_t> words_;
  RansEncoder stream_;
  double ideal_bits_ = 0, anchor_bits_ = 0;
};

absl::Status Damaged(uint32_t layer, const char* what) {
  return absl::DataLossError("coded block: " + std::string(what) + " of layer " + std::to_string(layer));
}

// Takes bytes from the front; never past the end.
class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : rest_(bytes) {}
  bool Take(size_t n, std::span<const std::byte>& out) {
    if (n > rest_.size()) return false;
    out = rest_.first(n);
    rest_ = rest_.subspan(n);
    return true;
  }
  size_t left() const { return rest_.size(); }

 private:
  std::span<const std::byte> rest_;
};

template <typename T>
T ReadAt(std::span<const std::byte> bytes, size_t at) {
  T out;
  std::memcpy(&out, bytes.data() + at, sizeof out);
  return out;
}

class LayerDecoder {
 public:
  explicit LayerDecoder(const BlockLayout& layout) : layout_(layout) {
    values_.resize(layout.head_elems());
    codes_.resize(layout.head_elems());
    anchors_.resize(size_t{GroupsOf(layout)} * layout.head_dim);
    classes_.resize(layout.head_dim);
  }

  absl::Status Decode(uint32_t layer, Reader& in, std::span<std::byte> dst) {
    std::span<const std::byte> mode, head, stream_head, words, escapes;
    if (!in.Take(1, mode)) return Damaged(layer, "no bytes");
    if (mode[0] == std::byte{kRaw}) {
      if (!in.Take(dst.size(), words)) return Damaged(layer, "too few bytes");
      std::memcpy(dst.data(), words.data(), dst.size());
      return absl::OkStatus();
    }
    if (mode[0] != std::byte{kCoded}) return Damaged(layer, "an unknown mode");
    if (!in.Take(PlaneHeadBytes(layout_), head) || !in.Take(StreamHeadBytes(), stream_head))
      return Damaged(layer, "a short head");
    if (!in.Take(size_t{2} * ReadAt<uint32_t>(stream_head, 0), words) ||
        !in.Take(size_t{2} * ReadAt<uint32_t>(stream_head, 4), escapes))
      return Damaged(layer, "a short stream");
    std::array<uint32_t, kRansLanes> states;
    std::memcpy(states.data(), stream_head.data() + 8, sizeof states);
    RansDecoder stream(words, escapes, states);
    const size_t plane_bytes = layout_.head_elems() * DTypeBytes(layout_.dtype);
    for (uint32_t plane = 0; plane < 2 * layout_.kv_heads; ++plane) {
      DecodePlane(plane, head, stream, dst.data() + plane * plane_bytes);
      if (stream.failed()) return Damaged(layer, "too short a stream");
    }
    return stream.AtEnd() ? absl::OkStatus() : Damaged(layer, "a stream that does not end");
  }

 private:
  void DecodePlane(uint32_t plane, std::span<const std::byte> head, RansDecoder& stream, std::byte* dst) {
    const uint32_t dim = layout_.head_dim, tokens = layout_.block_tokens;
    const float step = ReadAt<float>(head, plane * 5);
    const auto anchor_class =
        static_cast<uint8_t>(std::to_integer<uint8_t>(head[plane * 5 + 4]) % kSymbolClasses);
    for (uint32_t g = 0; g < GroupsOf(layout_); ++g) {
      stream.Decode(&anchor_class, 1, dim, anchors_.data() + size_t{g} * dim, 1);
    }
    const size_t classes_at = size_t{2} * layout_.kv_heads * 5;
    for (uint32_t c = 0; c < dim; ++c) {
      const size_t i = size_t{plane} * dim + c;
      const auto pair = std::to_integer<uint8_t>(head[classes_at + i / 2]);
      classes_[c] = i % 2 == 0 ? pair & 15 : pair >> 4;
    }
    stream.Decode(classes_.data(), dim, tokens, codes_.data(), dim);
    for (uint32_t t = 0; t < tokens; ++t) {
      const int16_t* anchor = anchors_.data() + size_t{t / kAnchorGroup} * dim;
      const int16_t* code = codes_.data() + size_t{t} * dim;
      float* value = values_.data() + size_t{t} * dim;
      for (uint32_t c = 0; c < dim; ++c) value[c] = static_cast<float>(anchor[c] + code[c]) * step;
    }
    KvNarrow(layout_.dtype, values_.data(), values_.size(), dst);
  }

  const BlockLayout& layout_;
  std::vector<float> values_;
  std::vector<int16_t> codes_, anchors_;
  std::vector<uint8_t> classes_;
};

}  // namespace

int CacheGenBins(int level, uint32_t layer, uint32_t layers, bool v) {
  // Of n layers of 32, at least the first.
  const auto below = [&](uint32_t n) { return uint64_t{layer} * 32 < uint64_t{n} * layers || layer == 0; };
  if (level >= 3) return 32;
  if (v) return below(2) ? (level == 2 ? 32 : 16) : (level == 2 ? 16 : 12);
  if (below(10)) return level == 2 ? 32 : 16;
  return below(20) || level == 2 ? 16 : 12;
}

size_t CacheGenMaxBytes(const BlockLayout& layout) { return layout.layers * (1 + layout.layer_bytes()); }

bool CacheGenEncode(const BlockLayout& layout, int level, std::span<const std::byte> block,
                    std::vector<std::byte>& out, CacheGenCost* cost) {
  LayerEncoder encoder(layout, level, cost);
  for (uint32_t layer = 0; layer < layout.layers; ++layer) {
    if (!encoder.Encode(layer, block.subspan(layer * layout.layer_bytes(), layout.layer_bytes()), out))
      return false;
  }
  return true;
}

absl::Status CacheGenDecode(const BlockLayout& layout, std::span<const std::byte> body,
                            std::span<std::byte> block) {
  LayerDecoder decoder(layout);
  Reader in(body);
  for (uint32_t layer = 0; layer < layout.layers; ++layer) {
    if (absl::Status s =
            decoder.Decode(layer, in, block.subspan(layer * layout.layer_bytes(), layout.layer_bytes()));
        !s.ok())
      return s;
  }
  return in.left() == 0 ? absl::OkStatus() : absl::DataLossError("coded block: bytes after its last layer");
}

}  // namespace tidepool
