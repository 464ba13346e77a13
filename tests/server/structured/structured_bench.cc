// What a mask costs, over real schemas and documents. Not a test: speed depends on the machine.
//
//   structured_bench TOKENIZER_JSON SCHEMAS.jsonl...
//
// Each line of a file: {"schema", "tests": [{"data", "valid"}], ...} (the form of maskbench). Each schema is
// compiled within the default limits; each valid document that the grammar has a spelling for is tokenised
// and walked with a fresh matcher, a mask before each token. Prints JSON: compile times, and the cost of a
// mask (and of accepting a token) with what the cache knows (`first`: when the document is walked for the
// first time, cold states and all; `again`: a second request of the same tenant with the same schema).
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "server/model/text/tokenizer.h"
#include "server/structured/grammar_builder.h"
#include "server/structured/matcher.h"
#include "tests/server/structured/guided_writer.h"

namespace {

using Json = nlohmann::ordered_json;
using namespace tidepool;  // NOLINT

double CpuMicros() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) * 1e6 + static_cast<double>(now.tv_nsec) * 1e-3;
}

Json Summary(std::vector<double> values) {
  if (values.empty()) return {{"count", 0}};
  std::sort(values.begin(), values.end());
  double sum = 0;
  for (const double v : values) sum += v;
  const auto at = [&](double q) {
    return values[std::min(values.size() - 1, static_cast<size_t>(q * static_cast<double>(values.size())))];
  };
  return {{"count", values.size()}, {"mean_us", sum / static_cast<double>(values.size())},
          {"p50_us", at(0.5)},      {"p90_us", at(0.9)},
          {"p99_us", at(0.99)},     {"p999_us", at(0.999)},
          {"max_us", values.back()}};
}

Json Ordered(const Json& value, const std::vector<std::string>& order) {
  if (value.is_array()) {
    Json out = Json::array();
    for (const Json& item : value) out.push_back(Ordered(item, order));
    return out;
  }
  if (!value.is_object()) return value;
  std::vector<std::pair<size_t, std::string>> names;
  for (const auto& item : value.items()) {
    names.emplace_back(std::find(order.begin(), order.end(), item.key()) - order.begin(), item.key());
  }
  std::stable_sort(names.begin(), names.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  Json out = Json::object();
  for (const auto& [at, name] : names) out[name] = Ordered(value[name], order);
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: structured_bench TOKENIZER_JSON SCHEMAS.jsonl...\n");
    return 2;
  }
  std::ifstream file(argv[1]);
  const std::string spec{std::istreambuf_iterator<char>(file), {}};
  const auto tokenizer = Tokenizer::FromJson(spec, {}, argv[1]);
  if (!tokenizer.ok()) {
    std::fprintf(stderr, "%s\n", tokenizer.status().ToString().c_str());
    return 2;
  }
  const double before_table = CpuMicros();
  const auto table = *TokenTable::Build(**tokenizer, (*tokenizer)->vocab_size());
  const double table_us = CpuMicros() - before_table;
  MaskCache cache(size_t{256} << 20);
  const double before_warm = CpuMicros();
  Matcher::Warm(*table, cache);
  const double warm_us = CpuMicros() - before_warm;

  std::vector<double> compile_us, refuse_us, parse_us, first_us, again_us, accept_us;
  std::map<std::string, int> refused;
  size_t schemas = 0, compiled = 0, valid = 0, written = 0, invalid = 0, wrong = 0, bytes = 0;
  std::vector<std::tuple<double, std::string, std::string>> worst;
  for (int arg = 2; arg < argc; ++arg) {
    std::ifstream lines(argv[arg]);
    for (std::string line; std::getline(lines, line);) {
      const Json item = Json::parse(line);
      ++schemas;
      const double begin = CpuMicros();
      GrammarBuilder builder;
      auto node = builder.JsonSchema(item["schema"], JsonWhitespace::kFlexible);
      absl::StatusOr<std::shared_ptr<const CompiledGrammar>> grammar = nullptr;
      if (node.ok()) {
        grammar = builder.Build(*node);
      } else {
        grammar = node.status();
      }
      const double spent = CpuMicros() - begin;
      if (!grammar.ok()) {
        refuse_us.push_back(spent);
        std::string why(grammar.status().message());
        const size_t colon = why.find(": ");
        const size_t slash = why.rfind('/', colon);
        if (why[0] == '#' && colon != why.npos && slash != why.npos) why = why.substr(slash);
        ++refused[why.substr(0, 90)];
        continue;
      }
      ++compiled;
      compile_us.push_back(spent);
      bytes += (*grammar)->bytes().size();
      const double before_parse = CpuMicros();
      const auto parsed = *CompiledGrammar::Parse((*grammar)->bytes());
      parse_us.push_back(CpuMicros() - before_parse);
      Matcher writer(parsed, table, nullptr, "");
      std::vector<std::string> order;
      PropertyOrder(item["schema"], order);
      for (const Json& test : item["tests"]) {
        const auto text = GuidedWriter(writer).Write(Ordered(test["data"], order));
        if (!test["valid"].get<bool>()) {
          ++invalid;
          wrong += text ? 1 : 0;
          if (text)
            std::fprintf(stderr, "invalid but accepted: %s %s\n", item["id"].dump().c_str(),
                         test["data"].dump().substr(0, 200).c_str());
          continue;
        }
        ++valid;
        if (!text) continue;
        ++written;
        // As models write it: a blank behind a colon and a comma.
        std::string spaced = *text;
        const auto ids = *(*tokenizer)->Encode(spaced, {.add_special_tokens = false});
        std::vector<uint32_t> mask(table->mask_words());
        for (auto* out : {&first_us, &again_us}) {
          Matcher matcher(parsed, table, &cache, item["id"].get<std::string>());
          for (const int32_t id : ids) {
            const double a = CpuMicros();
            const absl::Status status = matcher.FillMask(mask);
            const double b = CpuMicros();
            if (!status.ok() || (mask[static_cast<size_t>(id) / 32] >> (id % 32) & 1) == 0) {
              std::fprintf(stderr, "%s: token %d is not in the mask\n", item["id"].dump().c_str(), id);
              return 1;
            }
            if (!matcher.Accept(id).ok()) return 1;
            const double c = CpuMicros();
            out->push_back(b - a);
            accept_us.push_back(c - b);
            if (out == &first_us)
              worst.emplace_back(b - a, item["id"].get<std::string>(), (*tokenizer)->TokenText(id));
          }
        }
      }
    }
  }
  std::sort(worst.rbegin(), worst.rend());
  Json slow = Json::array();
  for (size_t i = 0; i < std::min<size_t>(10, worst.size()); ++i) {
    slow.push_back({std::get<0>(worst[i]), std::get<1>(worst[i]), std::get<2>(worst[i])});
  }
  std::vector<std::pair<int, std::string>> reasons;
  for (const auto& [why, count] : refused) reasons.emplace_back(count, why);
  std::sort(reasons.rbegin(), reasons.rend());
  const auto stats = cache.stats();
  Json out{
      {"vocabulary", table->vocab_size()},
      {"table_us", table_us},
      {"table_bytes", table->memory_bytes()},
      {"warm_us", warm_us},
      {"schemas", schemas},
      {"compiled", compiled},
      {"valid", valid},
      {"valid_written", written},
      {"invalid", invalid},
      {"invalid_accepted", wrong},
      {"grammar_bytes_mean", compiled == 0 ? 0 : bytes / compiled},
      {"compile", Summary(compile_us)},
      {"refuse", Summary(refuse_us)},
      {"parse", Summary(parse_us)},
      {"mask_first", Summary(first_us)},
      {"mask_again", Summary(again_us)},
      {"accept", Summary(accept_us)},
      {"cache",
       {{"bytes", stats.bytes}, {"entries", stats.entries}, {"hits", stats.hits}, {"misses", stats.misses}}},
      {"slowest", slow},
      {"refused", reasons}};
  std::printf("%s\n", out.dump(1, ' ', false, Json::error_handler_t::replace).c_str());
  return 0;
}
