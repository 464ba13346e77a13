// The JSON-Schema-Test-Suite: for each schema that we compile no instance that it calls invalid has a
// spelling in the grammar. tests/integration/test_structured_suite.py does the same with generated documents
// and counts.
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/server/structured/grammar_testing.h"
#include "tests/server/structured/guided_writer.h"

namespace tidepool {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

class JsonSuite : public ::testing::TestWithParam<const char*> {};

TEST_P(JsonSuite, InvalidInstancesHaveNoSpelling) {
  const fs::path root = fs::path("../shared/data/json_schema/JSON-Schema-Test-Suite/tests") / GetParam();
  if (!fs::is_directory(root)) GTEST_SKIP() << root << " is not here";
  int schemas = 0, compiled = 0, valid = 0, missed = 0, invalid = 0;
  for (const auto& entry : fs::recursive_directory_iterator(root)) {
    if (entry.path().extension() != ".json") continue;
    std::ifstream file(entry.path());
    const std::string group = entry.path().stem().string();
    for (Json item : Json::parse(file)) {
      ++schemas;
      // Not all files of draft 7 name their dialect.
      if (item["schema"].is_object() && !item["schema"].contains("$schema") &&
          GetParam() == std::string("draft7")) {
        item["schema"]["$schema"] = "http://json-schema.org/draft-07/schema#";
      }
      const auto grammar =
          Compile([&](GrammarBuilder& b) { return b.JsonSchema(item["schema"], JsonWhitespace::kFlexible); });
      if (!grammar.ok()) {
        // A refusal is one of the three kinds of error that are the caller's.
        EXPECT_TRUE(grammar.status().code() == absl::StatusCode::kUnimplemented ||
                    grammar.status().code() == absl::StatusCode::kInvalidArgument)
            << group << " " << item["description"] << grammar.status();
        continue;
      }
      ++compiled;
      Matcher matcher(*grammar, SmallTable(), nullptr, "");
      for (const Json& test : item["tests"]) {
        const auto text = GuidedWriter(matcher).Write(test["data"]);
        if (test["valid"].get<bool>()) {
          ++valid;
          missed += text ? 0 : 1;
        } else {
          ++invalid;
          EXPECT_FALSE(text) << group << ", " << item["description"] << ", " << test["description"] << ": "
                             << *text;
        }
      }
    }
  }
  std::printf(
      "%s: %d schemas, %d compiled; %d valid instances, %d of them without a spelling; %d invalid ones\n",
      GetParam(), schemas, compiled, valid, missed, invalid);
  // What is supported today stays supported.
  EXPECT_GT(compiled * 100, schemas * 55);
  EXPECT_LT(missed * 100, valid * 30) << "formats are asserted, which the suite's main part does not";
}

INSTANTIATE_TEST_SUITE_P(Drafts, JsonSuite, ::testing::Values("draft2020-12", "draft7"),
                         [](const auto& info) { return info.index == 0 ? "Draft2020" : "Draft7"; });

}  // namespace
}  // namespace tidepool
