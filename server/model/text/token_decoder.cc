#include "server/model/text/token_decoder.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/model/strings/hex.h"
#include "server/model/strings/utf8.h"
#include "server/model/text/json_reader.h"
#include "server/model/text/pretokenizer.h"

namespace tidepool {

using nlohmann::json;

namespace {

constexpr size_t kGrowthMax = 64;
constexpr size_t kStepsMax = 32;

// `<0x1F>` as its byte, -1 for any other token.
int FallbackByte(std::string_view piece) {
  if (piece.size() != 6 || !piece.starts_with("<0x") || piece[5] != '>') return -1;
  return HexValue(piece.substr(3, 2));
}

// A token of the byte alphabet as its bytes; one with any other character stands for itself.
std::string UnmapBytes(std::string_view piece) {
  std::string bytes;
  for (size_t pos = 0; pos < piece.size();) {
    const int byte = byte_alphabet::Byte(utf8::Next(piece, pos));
    if (byte < 0) return std::string(piece);
    bytes.push_back(static_cast<char>(byte));
  }
  return bytes;
}

std::string ReplaceAll(std::string_view text, std::string_view pattern, std::string_view content) {
  std::string out;
  size_t done = 0;
  for (size_t pos = text.find(pattern); pos != text.npos; pos = text.find(pattern, done)) {
    out.append(text.substr(done, pos - done)).append(content);
    done = pos + pattern.size();
  }
  return out.append(text.substr(done));
}

}  // namespace

absl::StatusOr<TokenDecoderSpec> TokenDecoderSpec::Parse(const json& node, const std::string& where) {
  TokenDecoderSpec spec;
  spec.steps_.clear();
  TP_RETURN_IF_ERROR(Append(node, where, spec.steps_));
  if (spec.steps_.size() > kStepsMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, " has ", spec.steps_.size(), " steps; at most ", kStepsMax, " are allowed"));
  }
  bool fused = false;
  for (Step& step : spec.steps_) {
    step.fused = fused;
    if (fused && step.kind != Kind::kReplace && step.kind != Kind::kStrip && step.kind != Kind::kFuse) {
      return absl::UnimplementedError(
          absl::StrCat(where, ": only Replace, Strip and Fuse are supported behind Fuse or ByteLevel"));
    }
    fused = fused || step.kind == Kind::kFuse || step.kind == Kind::kByteLevel;
  }
  return spec;
}

absl::Status TokenDecoderSpec::Append(const json& node, const std::string& where, std::vector<Step>& steps) {
  TP_RETURN_IF_ERROR(json_reader::RequireObject(node, where));
  TP_ASSIGN_OR_RETURN(const std::string type, json_reader::GetString(node, "type", where));
  if (type == "Sequence") {
    const json* list = json_reader::Member(node, "decoders");
    if (list == nullptr) return absl::InvalidArgumentError(absl::StrCat(where, ".decoders is missing"));
    TP_RETURN_IF_ERROR(json_reader::RequireArray(*list, where + ".decoders"));
    for (size_t i = 0; i < list->size(); ++i) {
      TP_RETURN_IF_ERROR(Append((*list)[i], absl::StrCat(where, ".decoders[", i, "]"), steps));
    }
    return absl::OkStatus();
  }
  Step step{};
  if (type == "ByteLevel") {
    step.kind = Kind::kByteLevel;
  } else if (type == "ByteFallback") {
    step.kind = Kind::kByteFallback;
  } else if (type == "Fuse") {
    step.kind = Kind::kFuse;
  } else if (type == "Replace") {
    step.kind = Kind::kReplace;
    const json* pattern = json_reader::Member(node, "pattern");
    if (pattern != nullptr && json_reader::Member(*pattern, "Regex") != nullptr) {
      return absl::UnimplementedError(
          absl::StrCat(where, ".pattern.Regex: a decoder replaces plain strings only"));
    }
    if (pattern == nullptr) return absl::InvalidArgumentError(absl::StrCat(where, ".pattern is missing"));
    TP_ASSIGN_OR_RETURN(step.pattern, json_reader::GetString(*pattern, "String", where + ".pattern"));
    if (step.pattern.empty()) {
      return absl::InvalidArgumentError(absl::StrCat(where, ".pattern.String must not be empty"));
    }
    TP_ASSIGN_OR_RETURN(step.content, json_reader::GetString(node, "content", where));
    // What all Replace steps together may make of one byte.
    size_t growth = 1;
    steps.push_back(step);
    for (const Step& s : steps) {
      if (s.kind == Kind::kReplace)
        growth *= std::max<size_t>(1, (s.content.size() + s.pattern.size() - 1) / s.pattern.size());
      if (growth > kGrowthMax) {
        return absl::InvalidArgumentError(
            absl::StrCat(where, ": the Replace decoders up to here may make a token more than ", kGrowthMax,
                         " times as long, which is not supported"));
      }
    }
    return absl::OkStatus();
  } else if (type == "Strip") {
    step.kind = Kind::kStrip;
    TP_ASSIGN_OR_RETURN(step.content, json_reader::GetString(node, "content", where));
    if (utf8::Count(step.content) != 1) {
      return absl::InvalidArgumentError(absl::StrCat(where, ".content must be one character"));
    }
    TP_ASSIGN_OR_RETURN(const int64_t start, json_reader::GetInt(node, "start", where, 0, 1 << 16));
    TP_ASSIGN_OR_RETURN(const int64_t stop, json_reader::GetInt(node, "stop", where, 0, 1 << 16));
    step.start = static_cast<size_t>(start);
    step.stop = static_cast<size_t>(stop);
  } else if (type == "Metaspace") {
    step.kind = Kind::kMetaspace;
    TP_ASSIGN_OR_RETURN(step.content, json_reader::GetString(node, "replacement", where, "\xE2\x96\x81"));
    if (utf8::Count(step.content) != 1) {
      return absl::InvalidArgumentError(absl::StrCat(where, ".replacement must be one character"));
    }
    TP_ASSIGN_OR_RETURN(const bool prefix, json_reader::GetBool(node, "add_prefix_space", where, true));
    TP_ASSIGN_OR_RETURN(const std::string scheme,
                        json_reader::GetString(node, "prepend_scheme", where, prefix ? "always" : "never"));
    step.keep_first = scheme == "never";
  } else if (type == "WordPiece") {
    step.kind = Kind::kWordPiece;
    TP_ASSIGN_OR_RETURN(step.pattern, json_reader::GetString(node, "prefix", where, "##"));
    TP_ASSIGN_OR_RETURN(step.cleanup, json_reader::GetBool(node, "cleanup", where, true));
  } else if (type == "BPEDecoder") {
    step.kind = Kind::kBpe;
    TP_ASSIGN_OR_RETURN(step.pattern, json_reader::GetString(node, "suffix", where, "</w>"));
    if (step.pattern.empty())
      return absl::InvalidArgumentError(absl::StrCat(where, ".suffix must not be empty"));
  } else {
    return absl::UnimplementedError(absl::StrCat(where, ": decoder ", type, " is not supported"));
  }
  steps.push_back(std::move(step));
  return absl::OkStatus();
}

// Source: huggingface/tokenizers, decoders/wordpiece.rs.
std::string TokenDecoderSpec::WordPiece(const Step& step, std::string_view token, bool first) {
  std::string text;
  if (!first && token.starts_with(step.pattern)) {
    text = token.substr(step.pattern.size());
  } else {
    if (!first) text = " ";
    text.append(token);
  }
  if (!step.cleanup) return text;
  static constexpr std::pair<std::string_view, std::string_view> kCleanup[] = {
      {" .", "."},   {" ?", "?"},           {" !", "!"},   {" ,", ","},     {" ' ", "'"},   {" n't", "n't"},
      {" 'm", "'m"}, {" do not", " don't"}, {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"}};
  for (const auto& [pattern, content] : kCleanup) text = ReplaceAll(text, pattern, content);
  return text;
}

std::string TokenDecoderSpec::TokenBytes(std::string_view piece) const {
  std::string text(piece);
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Kind::kByteLevel:
        text = UnmapBytes(text);
        break;
      case Kind::kReplace:
        text = ReplaceAll(text, step.pattern, step.content);
        break;
      case Kind::kByteFallback:
        if (const int byte = FallbackByte(text); byte >= 0) return std::string(1, static_cast<char>(byte));
        break;
      case Kind::kMetaspace:
        text = ReplaceAll(text, step.content, " ");
        break;
      case Kind::kWordPiece:
        text = WordPiece(step, text, false);
        break;
      case Kind::kBpe:
        text = ReplaceAll(text, step.pattern, " ");
        break;
      case Kind::kFuse:
      case Kind::kStrip:
      case Kind::kJoin:
        break;
    }
  }
  return text;
}

void TokenDecoder::TakeCharacters(std::string& held, bool subparts, std::string& text) {
  size_t pos = 0;
  while (pos < held.size()) {
    const utf8::Prefix p = utf8::Classify(std::string_view(held).substr(pos));
    if (p.kind == utf8::Prefix::kPartial) break;
    if (p.kind == utf8::Prefix::kWhole) {
      text.append(held, pos, p.bytes);
    } else {
      for (size_t i = 0; i < (subparts ? 1 : p.bytes); ++i) text.append(utf8::kReplacement);
    }
    pos += p.bytes;
  }
  held.erase(0, pos);
}

void TokenDecoder::Feed(size_t index, std::string text, std::string& out) {
  using Kind = TokenDecoderSpec::Kind;
  if (index == states_.size()) {
    out.append(text);
    return;
  }
  const TokenDecoderSpec::Step& step = spec_->steps_[index];
  State& state = states_[index];
  std::string next;
  switch (step.kind) {
    case Kind::kJoin:
      if (state.seen++ > 0) next = " ";
      next.append(text);
      break;
    case Kind::kFuse:
      next = std::move(text);
      break;
    case Kind::kByteLevel:
      state.held.append(UnmapBytes(text));
      TakeCharacters(state.held, true, next);
      break;
    case Kind::kByteFallback:
      if (const int byte = FallbackByte(text); byte >= 0) {
        state.held.push_back(static_cast<char>(byte));
        TakeCharacters(state.held, false, next);
        break;
      }
      // Another kind of token ends the run of bytes; it is a token of its own.
      if (!state.held.empty()) Flush(index, out);
      next = std::move(text);
      break;
    case Kind::kMetaspace:
      next = ReplaceAll(text, step.content, state.seen++ == 0 && !step.keep_first ? "" : " ");
      break;
    case Kind::kWordPiece:
      next = TokenDecoderSpec::WordPiece(step, text, state.seen++ == 0);
      break;
    case Kind::kBpe: {
      // A suffix is a space unless the token is the last: what follows the first one waits for the next
      // token.
      next = ReplaceAll(state.held, step.pattern, " ");
      const size_t suffix = std::min(text.find(step.pattern), text.size());
      next.append(text, 0, suffix);
      state.held = text.substr(suffix);
      break;
    }
    case Kind::kReplace: {
      if (!step.fused) {
        next = ReplaceAll(text, step.pattern, step.content);
        break;
      }
      // One token in fragments: hold back an end that may be the beginning of the pattern.
      state.held.append(text);
      size_t done = 0;
      for (size_t pos = state.held.find(step.pattern); pos != std::string::npos;
           pos = state.held.find(step.pattern, done)) {
        next.append(state.held, done, pos - done).append(step.content);
        done = pos + step.pattern.size();
      }
      size_t keep = std::min(state.held.size() - done, step.pattern.size() - 1);
      while (keep > 0 &&
             !step.pattern.starts_with(std::string_view(state.held).substr(state.held.size() - keep))) {
        --keep;
      }
      next.append(state.held, done, state.held.size() - keep - done);
      state.held.erase(0, state.held.size() - keep);
      break;
    }
    case Kind::kStrip: {
      std::string_view rest = text;
      size_t dropped = step.fused ? state.seen : 0;
      while (dropped < step.start && rest.starts_with(step.content)) {
        rest.remove_prefix(step.content.size());
        ++dropped;
      }
      if (step.fused && !rest.empty()) dropped = step.start;  // the beginning is over
      state.seen = dropped;
      if (!step.fused) {
        for (size_t i = 0; i < step.stop && rest.ends_with(step.content); ++i)
          rest.remove_suffix(step.content.size());
        next = std::string(rest);
        break;
      }
      // The last `stop` characters may yet be the end: hold those back.
      state.held.append(rest);
      size_t keep = 0;
      while (keep < step.stop * step.content.size() &&
             std::string_view(state.held).substr(0, state.held.size() - keep).ends_with(step.content)) {
        keep += step.content.size();
      }
      next = state.held.substr(0, state.held.size() - keep);
      state.held.erase(0, next.size());
      break;
    }
  }
  // An empty token matters only to the steps that count tokens.
  if (!next.empty() || step.kind == Kind::kReplace) Feed(index + 1, std::move(next), out);
}

void TokenDecoder::Flush(size_t index, std::string& out) {
  using Kind = TokenDecoderSpec::Kind;
  State& state = states_[index];
  if (state.held.empty()) return;
  std::string rest;
  switch (spec_->steps_[index].kind) {
    case Kind::kByteLevel:
      rest = utf8::kReplacement;
      break;
    case Kind::kByteFallback:
      for (size_t i = 0; i < state.held.size(); ++i) rest.append(utf8::kReplacement);
      break;
    case Kind::kReplace:
      rest = state.held;
      break;
    case Kind::kBpe:
      rest = ReplaceAll(state.held, spec_->steps_[index].pattern, "");
      break;
    default:  // kStrip holds what is to be dropped; the others hold nothing
      break;
  }
  state.held.clear();
  if (!rest.empty()) Feed(index + 1, std::move(rest), out);
}

void TokenDecoder::Finish(std::string& out) {
  for (size_t i = 0; i < states_.size(); ++i) Flush(i, out);
}

}  // namespace tidepool
