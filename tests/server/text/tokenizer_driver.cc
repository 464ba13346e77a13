// Encodes and decodes for tests/integration/test_tokenizers.py, which compares with the `tokenizers` library.
//
//   tokenizer_driver TOKENIZER_JSON
//
// Reads JSON lines, writes one for each: {"b64": text, "special": bool} -> {"ids"};
// {"decode": ids, "skip": bool} -> {"text", "streamed"}, decoded at once and token by token; either may
// answer {"error"}.
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "server/model/text/detokenizer.h"
#include "server/model/text/tokenizer.h"

using nlohmann::json;

namespace {

json Answer(const tidepool::Tokenizer& tokenizer, const json& request) {
  if (request.contains("decode")) {
    const auto ids = request["decode"].get<std::vector<int32_t>>();
    const bool skip = request["skip"];
    tidepool::StreamDecoder stream(tokenizer, skip);
    std::string streamed;
    for (const int32_t id : ids) streamed += stream.Push(id);
    streamed += stream.Finish();
    return {{"text", tokenizer.Decode(ids, skip)}, {"streamed", streamed}};
  }
  std::string text;
  absl::Base64Unescape(request["b64"].get<std::string>(), &text);
  const auto ids = tokenizer.Encode(text, {.add_special_tokens = request["special"].get<bool>()});
  if (!ids.ok()) return {{"error", ids.status().ToString()}};
  return {{"ids", *ids}};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: tokenizer_driver TOKENIZER_JSON\n");
    return 2;
  }
  std::ifstream file(argv[1]);
  const std::string spec{std::istreambuf_iterator<char>(file), {}};
  const auto tokenizer = tidepool::Tokenizer::FromJson(spec, {}, argv[1]);
  if (!tokenizer.ok()) {
    std::fprintf(stderr, "%s\n", tokenizer.status().ToString().c_str());
    return 2;
  }
  std::ios::sync_with_stdio(false);
  for (std::string line; std::getline(std::cin, line);) {
    std::cout << Answer(**tokenizer, json::parse(line)).dump() << "\n";
  }
  return 0;
}
