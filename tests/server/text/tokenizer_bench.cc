// How fast Tokenizer::Encode is, on one thread. Not a test: tools/fidelity/tokenizer_speed.py runs it next to
// the `tokenizers` library on the same texts and prints the ratio.
//
//   tokenizer_bench TOKENIZER_JSON TEXTS.jsonl ROUNDS
//
// TEXTS.jsonl holds one JSON string a line. Every round encodes them all. Prints one JSON line: bytes,
// tokens, the rounds' seconds (of this thread's CPU time, so that other work on the machine counts less), in
// order.
#include <time.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "server/model/text/tokenizer.h"

namespace {

double CpuSeconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: tokenizer_bench TOKENIZER_JSON TEXTS.jsonl ROUNDS\n");
    return 2;
  }
  std::ifstream file(argv[1]);
  const std::string spec{std::istreambuf_iterator<char>(file), {}};
  const auto tokenizer = tidepool::Tokenizer::FromJson(spec, {}, argv[1]);
  if (!tokenizer.ok()) {
    std::fprintf(stderr, "%s\n", tokenizer.status().ToString().c_str());
    return 2;
  }
  std::vector<std::string> texts;
  std::ifstream lines(argv[2]);
  size_t bytes = 0;
  for (std::string line; std::getline(lines, line);) {
    texts.push_back(nlohmann::json::parse(line).get<std::string>());
    bytes += texts.back().size();
  }
  nlohmann::json out = {{"bytes", bytes}, {"seconds", nlohmann::json::array()}};
  for (int round = 0; round < std::atoi(argv[3]); ++round) {
    size_t tokens = 0;
    const double start = CpuSeconds();
    for (const std::string& text : texts) {
      const auto ids = (*tokenizer)->Encode(text, {.add_special_tokens = false});
      if (!ids.ok()) {
        std::fprintf(stderr, "%s\n", ids.status().ToString().c_str());
        return 1;
      }
      tokens += ids->size();
    }
    out["seconds"].push_back(CpuSeconds() - start);
    out["tokens"] = tokens;
  }
  std::printf("%s\n", out.dump().c_str());
  return 0;
}
