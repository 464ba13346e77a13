#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tidepool {

// TokenDecoderSpec: the `decoder` part of tokenizer.json: Sequence, ByteLevel, Replace, ByteFallback, Fuse,
// Strip, Metaspace, WordPiece and BPEDecoder. Immutable, thread-safe. Without a decoder tokens are joined by
// spaces, as Hugging Face does.
class TokenDecoderSpec {
 public:
  TokenDecoderSpec() : steps_{Step{Kind::kJoin}} {}

  // Errors: InvalidArgument; Unimplemented (another kind by name, or an order that cannot be streamed, such
  // as ByteFallback after Fuse).
  static absl::StatusOr<TokenDecoderSpec> Parse(const nlohmann::json& node, const std::string& where);

  // The bytes that one token stands for, wherever it stands: without stripping, possibly half a character.
  std::string TokenBytes(std::string_view piece) const;

 private:
  friend class TokenDecoder;
  enum class Kind { kByteLevel, kReplace, kByteFallback, kFuse, kStrip, kMetaspace, kWordPiece, kBpe, kJoin };
  struct Step {
    Kind kind;
    // kReplace; kStrip and kMetaspace: content, one character; kWordPiece: pattern, the prefix; kBpe:
    // pattern, the suffix
    std::string pattern, content;
    size_t start = 0, stop = 0;  // kStrip
    bool keep_first = false;     // kMetaspace: prepend_scheme never
    bool cleanup = false;        // kWordPiece
    bool fused = false;          // set behind kFuse and kByteLevel: the input is one token in fragments
  };
  static absl::Status Append(const nlohmann::json& node, const std::string& where, std::vector<Step>& steps);
  static std::string WordPiece(const Step& step, std::string_view token, bool first);
  std::vector<Step> steps_;
};

// TokenDecoder: the state of one decoding, which runs the spec's steps over tokens as they come. Text leaves
// as soon as no later token can change it. The one difference from Hugging Face's ByteFallback: there a run
// of byte tokens that holds one invalid byte becomes U+FFFD throughout, which could be known only at its end;
// here valid characters stay and each invalid byte becomes one U+FFFD, streamed or not. Owned by one thread;
// copyable. `spec` is borrowed.
class TokenDecoder {
 public:
  explicit TokenDecoder(const TokenDecoderSpec& spec) : spec_(&spec), states_(spec.steps_.size()) {}

  // Appends to `out` what became certain.
  void Push(std::string_view piece, std::string& out) { Feed(0, std::string(piece), out); }
  // Appends the rest.
  void Finish(std::string& out);

 private:
  struct State {
    std::string held;
    size_t seen = 0;
  };
  void Feed(size_t step, std::string text, std::string& out);
  void Flush(size_t step, std::string& out);
  // Moves whole characters from `held` to `text`; each invalid byte (or, with `subparts`, sequence) as
  // U+FFFD.
  static void TakeCharacters(std::string& held, bool subparts, std::string& text);

  const TokenDecoderSpec* spec_;
  std::vector<State> states_;
};

}  // namespace tidepool
