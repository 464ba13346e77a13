#include "kvstore/disk/plane_codec.h"

#include <zstd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"

namespace tidepool {
namespace {

constexpr uint8_t kVersion = 1;
constexpr uint32_t kCompressed = uint32_t{1} << 31;
// A plane of mantissas is looked at by a piece from its middle first: noise costs that much and no more.
constexpr size_t kSampleBytes = 4 << 10;
// Compressed planes are read twice as slowly: less than this is not worth it.
constexpr double kWorthPlane = 0.97;

// The fastest level that codes entropy (the negative ones leave literals as they are), and as few matches as
// it can be made to look for: exponents repeat by chance only, and a match costs more than it saves. On the
// demo model's KV that is 2.5 times as fast as level 1 alone, both ways, and a fifth of a percent shorter.
constexpr std::pair<ZSTD_cParameter, int> kParameters[] = {
    {ZSTD_c_compressionLevel, 1}, {ZSTD_c_minMatch, 7}, {ZSTD_c_hashLog, 6}};

size_t HeaderBytes(size_t width) { return 4 + 4 * width; }

static_assert(std::endian::native == std::endian::little);

// Plane p of the numbers in `in`: byte width - 1 - p of each, its bits turned left by one.
template <typename T>
void Split(std::span<const std::byte> in, size_t p, std::span<std::byte> plane) {
  const int shift = static_cast<int>(8 * (sizeof(T) - 1 - p));
  const std::byte* from = in.data();
  std::byte* to = plane.data();
  for (size_t i = 0; i < plane.size(); ++i) {
    T v;
    std::memcpy(&v, from + i * sizeof(T), sizeof(T));
    to[i] = static_cast<std::byte>(std::rotl(v, 1) >> shift);
  }
}

// All planes back into numbers.
void Join2(const std::byte* high, const std::byte* low, std::span<std::byte> out) {
  for (size_t i = 0; i < out.size() / 2; ++i) {
    const auto v = static_cast<uint16_t>(static_cast<uint16_t>(high[i]) << 8 | static_cast<uint16_t>(low[i]));
    const auto turned = static_cast<uint16_t>(v >> 1 | v << 15);
    std::memcpy(out.data() + 2 * i, &turned, 2);
  }
}
void Join4(const std::byte* const planes[4], std::span<std::byte> out) {
  for (size_t i = 0; i < out.size() / 4; ++i) {
    const uint32_t v = static_cast<uint32_t>(planes[0][i]) << 24 | static_cast<uint32_t>(planes[1][i]) << 16 |
                       static_cast<uint32_t>(planes[2][i]) << 8 | static_cast<uint32_t>(planes[3][i]);
    const uint32_t turned = std::rotr(v, 1);
    std::memcpy(out.data() + 4 * i, &turned, 4);
  }
}

absl::Status Bad(const char* what) {
  return absl::DataLossError(std::string("the payload's encoding is damaged: ") + what);
}

}  // namespace

struct PlaneCodec::State {
  ZSTD_CCtx* coder = ZSTD_createCCtx();
  ZSTD_DCtx* decoder = ZSTD_createDCtx();
  std::vector<std::byte> planes;  // of a block: one to encode, all to decode
  std::vector<std::byte> sample;

  ~State() {
    ZSTD_freeCCtx(coder);
    ZSTD_freeDCtx(decoder);
  }
};

PlaneCodec::PlaneCodec(size_t width) : width_(width), state_(std::make_unique<State>()) {
  TP_CHECK(width == 1 || width == 2 || width == 4);
  TP_CHECK(state_->coder != nullptr && state_->decoder != nullptr);
  for (const auto& [parameter, value] : kParameters)
    TP_CHECK(ZSTD_isError(ZSTD_CCtx_setParameter(state_->coder, parameter, value)) == 0);
  state_->sample.resize(ZSTD_compressBound(kSampleBytes));
}
PlaneCodec::~PlaneCodec() = default;

std::optional<size_t> PlaneCodec::Encode(std::span<const std::byte> in, std::span<std::byte> out) {
  const size_t n = in.size() / width_, rest = in.size() % width_;
  if (out.size() < HeaderBytes(width_) + rest || n >= kCompressed) return std::nullopt;
  State& s = *state_;
  if (s.planes.size() < n) s.planes.resize(n);
  const auto plane = std::span(s.planes).first(n);
  size_t at = HeaderBytes(width_);
  out[0] = std::byte{kVersion};
  out[1] = static_cast<std::byte>(width_);
  out[2] = out[3] = std::byte{0};
  for (size_t p = 0; p < width_; ++p) {
    if (width_ == 1) std::copy(in.begin(), in.end(), plane.begin());
    if (width_ == 2) Split<uint16_t>(in.first(2 * n), p, plane);
    if (width_ == 4) Split<uint32_t>(in.first(4 * n), p, plane);
    const auto piece = plane.subspan((n - std::min(n, kSampleBytes)) / 2, std::min(n, kSampleBytes));
    const auto worth = [](size_t bytes, size_t of) {
      return ZSTD_isError(bytes) == 0 && static_cast<double>(bytes) < kWorthPlane * static_cast<double>(of);
    };
    size_t length = 0;
    bool compressed = p == 0;
    if (!compressed) {
      length = ZSTD_compress2(s.coder, s.sample.data(), s.sample.size(), piece.data(), piece.size());
      compressed = worth(length, piece.size());
    }
    if (compressed) {
      const size_t room = std::min(out.size() - at, n);
      length = ZSTD_compress2(s.coder, out.data() + at, room, plane.data(), n);
      compressed = worth(length, n);
    }
    if (!compressed) {
      if (n > out.size() - at) return std::nullopt;
      if (n > 0) std::memcpy(out.data() + at, plane.data(), n);
      length = n;
    }
    const uint32_t field = static_cast<uint32_t>(length) | (compressed ? kCompressed : 0);
    std::memcpy(out.data() + 4 + 4 * p, &field, sizeof field);
    at += length;
  }
  if (rest > out.size() - at) return std::nullopt;
  std::copy(in.end() - static_cast<std::ptrdiff_t>(rest), in.end(),
            out.begin() + static_cast<std::ptrdiff_t>(at));
  return at + rest;
}

absl::Status PlaneCodec::Decode(std::span<const std::byte> in, std::span<std::byte> out) {
  const size_t n = out.size() / width_, rest = out.size() % width_;
  if (in.size() < HeaderBytes(width_)) return Bad("too short");
  if (in[0] != std::byte{kVersion} || in[1] != static_cast<std::byte>(width_) || in[2] != std::byte{0} ||
      in[3] != std::byte{0}) {
    return Bad("of another version or width");
  }
  State& s = *state_;
  if (s.planes.size() < n * width_) s.planes.resize(n * width_);
  const std::byte* planes[4] = {};
  size_t at = HeaderBytes(width_);
  for (size_t p = 0; p < width_; ++p) {
    uint32_t field;
    std::memcpy(&field, in.data() + 4 + 4 * p, sizeof field);
    const size_t length = field & ~kCompressed;
    if (length > in.size() - at) return Bad("a plane ends behind it");
    const std::byte* from = in.data() + at;
    at += length;
    if ((field & kCompressed) == 0) {
      if (length != n) return Bad("a plane of another length");
      planes[p] = from;
      continue;
    }
    std::byte* to = width_ == 1 ? out.data() : s.planes.data() + p * n;
    const size_t bytes = ZSTD_decompressDCtx(s.decoder, to, n, from, length);
    if (ZSTD_isError(bytes) != 0 || bytes != n) return Bad("a plane does not unpack");
    planes[p] = to;
  }
  if (in.size() - at != rest) return Bad("another length");
  if (width_ == 1 && planes[0] != out.data() && n > 0) std::memcpy(out.data(), planes[0], n);
  if (width_ == 2) Join2(planes[0], planes[1], out);
  if (width_ == 4) Join4(planes, out);
  std::copy(in.end() - static_cast<std::ptrdiff_t>(rest), in.end(),
            out.end() - static_cast<std::ptrdiff_t>(rest));
  return absl::OkStatus();
}

}  // namespace tidepool
