// Compiles, accepts and generates for tests/integration/test_structured_suite.py, which validates what comes
// out with `jsonschema`.
//
//   structured_driver [TOKENIZER_JSON]      without one the vocabulary is the 256 bytes and some longer
//   tokens
//
// Reads JSON lines, writes one for each:
//   {"schema"| "regex" | "ebnf": source, "compact": bool} -> {"ok", "code", "error", "states", "bytes"};
//                                    what follows is about the grammar compiled last
//   {"accept": value}             -> {"text"}: the value in the grammar's spelling, null if it has none
//   {"generate": seed, "tokens"}  -> {"text", "complete"}: a random walk through the masks
#include <algorithm>
#include <bit>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/rng.h"
#include "server/model/text/tokenizer.h"
#include "server/structured/grammar_builder.h"
#include "server/structured/matcher.h"
#include "tests/server/structured/guided_writer.h"

using Json = nlohmann::ordered_json;

namespace tidepool {
namespace {

class Driver {
 public:
  explicit Driver(std::shared_ptr<const TokenTable> table)
      : table_(std::move(table)), cache_(size_t{64} << 20) {
    Matcher::Warm(*table_, cache_);
  }

  Json Answer(const Json& request) {
    if (request.contains("accept")) return Accept(request["accept"]);
    if (request.contains("generate")) return Generate(request["generate"], request["tokens"]);
    return Compile(request);
  }

 private:
  Json Compile(const Json& request) {
    matcher_.reset();
    CompileLimits limits;
    limits.cpu_time_max = absl::Milliseconds(request.value("ms", 50));
    GrammarBuilder builder(limits);
    absl::StatusOr<GrammarBuilder::Node> node = GrammarBuilder::Node{};
    const auto whitespace =
        request.value("compact", false) ? JsonWhitespace::kCompact : JsonWhitespace::kFlexible;
    if (request.contains("schema")) {
      schema_ = request["schema"];
      node = builder.JsonSchema(schema_, whitespace);
    } else if (request.contains("regex")) {
      node = builder.Regex(request["regex"].get<std::string>());
    } else {
      node = builder.Ebnf(request["ebnf"].get<std::string>());
    }
    absl::StatusOr<std::shared_ptr<const CompiledGrammar>> grammar = nullptr;
    if (node.ok()) {
      grammar = builder.Build(*node);
    } else {
      grammar = node.status();
    }
    if (!grammar.ok()) {
      return {{"ok", false},
              {"code", absl::StatusCodeToString(grammar.status().code())},
              {"error", std::string(grammar.status().message())}};
    }
    // As it travels.
    const auto parsed = CompiledGrammar::Parse((*grammar)->bytes());
    if (!parsed.ok())
      return {{"ok", false}, {"code", "PARSE"}, {"error", std::string(parsed.status().message())}};
    matcher_ = std::make_unique<Matcher>(*parsed, table_, &cache_, "driver");
    return {{"ok", true}, {"states", (*parsed)->state_count()}, {"bytes", (*parsed)->bytes().size()}};
  }

  Json Accept(const Json& value) {
    const auto text = GuidedWriter(*matcher_).Write(Ordered(value));
    return {{"text", text ? Json(*text) : Json(nullptr)}};
  }

  // With the properties in the order in which the schema mentions them.
  Json Ordered(const Json& value) {
    if (value.is_array()) {
      Json out = Json::array();
      for (const Json& item : value) out.push_back(Ordered(item));
      return out;
    }
    if (!value.is_object()) return value;
    std::vector<std::string> order;
    PropertyOrder(schema_, order);
    std::vector<std::pair<size_t, std::string>> names;
    for (const auto& item : value.items()) {
      names.emplace_back(std::find(order.begin(), order.end(), item.key()) - order.begin(), item.key());
    }
    std::stable_sort(names.begin(), names.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    Json out = Json::object();
    for (const auto& [at, name] : names) out[name] = Ordered(value[name]);
    return out;
  }

  // Draws a token among those that are allowed; near the end of the allowance one that closes things, so that
  // most walks come to an end.
  Json Generate(uint64_t seed, size_t tokens) {
    matcher_->Reset();
    Rng rng(seed);
    std::vector<uint32_t> mask(table_->mask_words());
    std::string text;
    size_t step = 0;
    for (; step < 4 * tokens && !matcher_->MustEnd(); ++step) {
      const bool hurry = step >= tokens;
      if (matcher_->CanEnd() && (hurry || rng.Chance(0.2))) break;
      if (const absl::Status status = matcher_->FillMask(mask); !status.ok()) {
        return {{"error", std::string(status.message())}, {"text", text}};
      }
      std::vector<int32_t> allowed, closing;
      for (size_t w = 0; w < mask.size(); ++w) {
        for (uint32_t rest = mask[w]; rest != 0; rest &= rest - 1) {
          const auto id = static_cast<int32_t>(w * 32 + static_cast<size_t>(std::countr_zero(rest)));
          allowed.push_back(id);
          const std::string_view bytes = table_->TokenBytes(id);
          if (bytes == "\"" || bytes == "}" || bytes == "]" || bytes == "0") closing.push_back(id);
        }
      }
      const std::vector<int32_t>& pool = hurry && !closing.empty() ? closing : allowed;
      const int32_t token = pool[rng.Below(pool.size())];
      if (!matcher_->Accept(token).ok())
        return {{"error", "a token of the mask was not accepted"}, {"text", text}};
      text += table_->TokenBytes(token);
    }
    const bool complete = matcher_->CanEnd();
    Json out{{"complete", complete}};
    // An unfinished text may end inside a character.
    out["text"] = complete ? Json(text) : Json(nullptr);
    return out;
  }

  std::shared_ptr<const TokenTable> table_;
  MaskCache cache_;
  std::unique_ptr<Matcher> matcher_;
  Json schema_;
};

std::shared_ptr<const TokenTable> ByteTable() {
  std::vector<std::string> tokens;
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  for (const char* longer : {"{\"", "\":", "\": \"", "\",", "\", \"", "\"}",  "true", "false", "null",
                             "[]",  "{}",  "],",     "},",  "]}",     "}}",   ", ",   ": ",    "foo",
                             "bar", "baz", "12",     "100", "e\"",    "\n  ", "é",    "日本"}) {
    tokens.emplace_back(longer);
  }
  return *TokenTable::FromBytes(std::move(tokens));
}

}  // namespace
}  // namespace tidepool

int main(int argc, char** argv) {
  std::shared_ptr<const tidepool::TokenTable> table;
  if (argc > 1) {
    std::ifstream file(argv[1]);
    const std::string spec{std::istreambuf_iterator<char>(file), {}};
    const auto tokenizer = tidepool::Tokenizer::FromJson(spec, {}, argv[1]);
    if (!tokenizer.ok()) {
      std::fprintf(stderr, "%s\n", tokenizer.status().ToString().c_str());
      return 2;
    }
    table = *tidepool::TokenTable::Build(**tokenizer, (*tokenizer)->vocab_size());
  } else {
    table = tidepool::ByteTable();
  }
  tidepool::Driver driver(std::move(table));
  std::ios::sync_with_stdio(false);
  for (std::string line; std::getline(std::cin, line);) {
    std::cout << driver.Answer(Json::parse(line)).dump(-1, ' ', false, Json::error_handler_t::replace) << "\n"
              << std::flush;
  }
  return 0;
}
