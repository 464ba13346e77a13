#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace tidepool {

// Charsmap: sentencepiece's precompiled character map, which tokenizer.json keeps in base64 as
// `precompiled_charsmap`. Immutable, thread-safe. Bytes, little endian:
//   u32 n        bytes of the trie, a multiple of 4
//   u32[n / 4]   a double-array trie (Darts) from source bytes to an offset into the rest
//   the rest     replacements, UTF-8, each ended by a NUL
// Source: google/sentencepiece, normalizer.cc; huggingface/tokenizers, normalizers/precompiled.rs.
class Charsmap {
 public:
  // Errors: InvalidArgument (not base64, cut short, not UTF-8).
  static absl::StatusOr<Charsmap> Parse(std::string_view base64);

  // What stands for `chunk` (valid UTF-8, not empty); nullopt: itself. As in the library the shortest prefix
  // that the map holds decides for the whole chunk.
  std::optional<std::string_view> Find(std::string_view chunk) const;

 private:
  std::vector<uint32_t> trie_;
  std::string replacements_;
};

}  // namespace tidepool
