#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

// A fuzz target is a function that takes any bytes, hands them to a parser of outside data and aborts
// (TP_CHECK) where a promise of that parser's header is broken. It is linked twice: by itself with libFuzzer
// (libfuzzer_main.cc), and with all others into replay_test, which runs the corpus in the ordinary builds.
namespace tidepool::fuzz {

using Target = void (*)(std::string_view input);

// Name to function; the name is also that of the corpus folder.
inline std::map<std::string, Target>& Targets() {
  static auto* targets = new std::map<std::string, Target>();
  return *targets;
}

struct Registration {
  Registration(const char* name, Target target) { Targets().emplace(name, target); }
};

// TIDEPOOL_FUZZ_TARGET(name) { ... uses `input` ... }
#define TIDEPOOL_FUZZ_TARGET(name)                                                      \
  static void Fuzz_##name(std::string_view input);                                      \
  static const ::tidepool::fuzz::Registration registration_##name(#name, &Fuzz_##name); \
  static void Fuzz_##name(std::string_view input)

// The input of a target that takes several texts is cut here (0x1E, ASCII's record separator, which none of
// the formats holds unescaped). Always `parts` of them; missing ones are empty, the last takes the rest.
inline std::vector<std::string_view> Split(std::string_view input, size_t parts) {
  std::vector<std::string_view> out;
  while (out.size() + 1 < parts) {
    const size_t at = input.find('\x1E');
    out.push_back(input.substr(0, at));
    input = at == input.npos ? std::string_view() : input.substr(at + 1);
  }
  out.push_back(input);
  return out;
}

// ByteReader: decisions drawn from the input (View); zeros once it is used up.
class ByteReader {
 public:
  explicit ByteReader(std::string_view input) : rest_(input) {}

  bool empty() const { return rest_.empty(); }
  uint8_t Byte() {
    if (rest_.empty()) return 0;
    const auto byte = static_cast<uint8_t>(rest_.front());
    rest_.remove_prefix(1);
    return byte;
  }
  // Little-endian.
  uint32_t Word() {
    const uint32_t low = Byte();
    return low | static_cast<uint32_t>(Byte()) << 8;
  }
  // [0, limit]; limit <= 255.
  size_t UpTo(size_t limit) { return Byte() % (limit + 1); }
  std::string_view Text(size_t bytes) {
    const std::string_view out = rest_.substr(0, bytes);
    rest_.remove_prefix(out.size());
    return out;
  }

 private:
  std::string_view rest_;
};

}  // namespace tidepool::fuzz
