// The corpus of every fuzz target, in the ordinary and the sanitizer builds: what was found once stays fixed,
// and the hostile inputs are refused in bounded time without the fuzzer's compiler.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <vector>

#include "tests/fuzz/fuzz_target.h"

namespace tidepool {
namespace {

namespace fs = std::filesystem;

// CPU time, so that a busy machine fails nothing; generous for sanitizers.
constexpr double kSecondsMax = 10;

double CpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

std::string ReadFile(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

class FuzzCorpus : public ::testing::TestWithParam<std::string> {};

TEST_P(FuzzCorpus, EveryInputIsAnsweredInBoundedTime) {
  const fuzz::Target target = fuzz::Targets().at(GetParam());
  std::vector<fs::path> inputs;
  for (const auto& entry : fs::directory_iterator("tests/fuzz/corpus/" + GetParam())) {
    inputs.push_back(entry.path());
  }
  std::sort(inputs.begin(), inputs.end());
  ASSERT_GE(inputs.size(), 8u) << "is the working folder the root of the source tree?";
  target("");
  for (const fs::path& input : inputs) {
    std::printf("%s\n", input.c_str());  // a crash ends the program: the last line names its cause
    std::fflush(stdout);
    const double before = CpuSeconds();
    target(ReadFile(input));
    EXPECT_LT(CpuSeconds() - before, kSecondsMax) << input;
  }
}

std::vector<std::string> TargetNames() {
  std::vector<std::string> names;
  for (const auto& [name, target] : fuzz::Targets()) names.push_back(name);
  return names;
}

INSTANTIATE_TEST_SUITE_P(Targets, FuzzCorpus, ::testing::ValuesIn(TargetNames()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace tidepool
