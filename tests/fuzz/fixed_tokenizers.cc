#include "tests/fuzz/fixed_tokenizers.h"

#include <cstdio>
#include <fstream>
#include <sstream>
#include <vector>

#include "base/status.h"

namespace tidepool::fuzz {
namespace {

struct Source {
  const char* name;
  const char* path;
  bool lossless;
};

constexpr Source kSources[] = {
    {"demo", "tools/demo_model/model/tokenizer.json", true},
    {"sentencepiece", "tests/fuzz/tokenizers/sentencepiece.json", false},
    {"unigram", "tests/fuzz/tokenizers/unigram.json", false},
};

std::shared_ptr<const Tokenizer> Load(const Source& source) {
  std::ifstream in(source.path, std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  auto tokenizer = Tokenizer::FromJson(text.str());
  if (!tokenizer.ok()) {
    std::fprintf(stderr, "%s (run from the source tree's root): %s\n", source.path,
                 std::string(tokenizer.status().message()).c_str());
  }
  TP_CHECK(tokenizer.ok());
  return *std::move(tokenizer);
}

}  // namespace

std::span<const FixedTokenizer> FixedTokenizers() {
  static const auto* tokenizers = [] {
    auto* out = new std::vector<FixedTokenizer>();
    for (const Source& source : kSources) out->push_back({source.name, Load(source), source.lossless});
    return out;
  }();
  return *tokenizers;
}

}  // namespace tidepool::fuzz
