#include "server/model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/rng.h"
#include "tests/server/model/tiny_model.h"

namespace tidepool {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class Safetensors : public ::testing::Test {
 protected:
  absl::StatusOr<Checkpoint> OpenWith(const std::string& header, const std::string& data) {
    WriteFile(dir_.File("model.safetensors"), SafetensorsBytes(header, data));
    return Checkpoint::Open(dir_.path());
  }
  std::string ErrorOf(const std::string& header, const std::string& data = std::string(16, 'x')) {
    return std::string(OpenWith(header, data).status().message());
  }
  TempDir dir_;
};

TEST_F(Safetensors, GivesBackWhatWasWritten) {
  WriteFile(dir_.File("model.safetensors"),
            EncodeTensors({{"a", {{2, 3}, {1, 2, 3, 4, 5, 6}}}, {"b", {{1}, {9}}}}, "F32"));
  const auto c = Checkpoint::Open(dir_.path());
  ASSERT_TRUE(c.ok()) << c.status();
  const int64_t shape[] = {2, 3};
  const auto a = c->Get("a", shape);
  ASSERT_TRUE(a.ok());
  float values[6];
  std::memcpy(values, (*a)->data.data(), sizeof values);
  EXPECT_EQ(values[5], 6);
  EXPECT_EQ(*(*a)->dtype(), DType::kF32);
  EXPECT_EQ(c->tensors().size(), 2u);
}

TEST_F(Safetensors, ZeroSizedTensorsAndScalarsAreFine) {
  const auto c = OpenWith(
      R"({"e":{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]},"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})",
      "abcd");
  EXPECT_TRUE(c.ok()) << c.status();
}

TEST_F(Safetensors, WrongShapeNamesFileTensorExpectedAndFound) {
  const auto c =
      OpenWith(R"({"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}})", std::string(16, 'x'));
  ASSERT_TRUE(c.ok());
  const int64_t shape[] = {4, 1};
  const auto got = c->Get("w", shape);
  EXPECT_EQ(got.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(got.status().message()), AllOf(HasSubstr("model.safetensors"), HasSubstr("\"w\""),
                                                         HasSubstr("[2, 2]"), HasSubstr("[4, 1]")));
}

TEST_F(Safetensors, MissingTensorNamesItAndTheFiles) {
  const auto c = OpenWith("{}", "");
  ASSERT_TRUE(c.ok());
  EXPECT_THAT(std::string(c->Find("w").status().message()),
              AllOf(HasSubstr("\"w\""), HasSubstr("model.safetensors")));
}

TEST_F(Safetensors, UnsupportedDtypeIsRefusedWhenAskedFor) {
  const auto c = OpenWith(R"({"w":{"dtype":"I64","shape":[2],"data_offsets":[0,16]}})", std::string(16, 'x'));
  ASSERT_TRUE(c.ok()) << c.status();
  const auto d = (*c->Find("w"))->dtype();
  EXPECT_EQ(d.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(d.status().message()), HasSubstr("I64"));
}

TEST_F(Safetensors, MalformedEntriesAreRefusedByTensor) {
  EXPECT_THAT(ErrorOf(R"({"w":{"dtype":"Q4","shape":[2],"data_offsets":[0,16]}})"),
              HasSubstr("unknown dtype \"Q4\""));
  EXPECT_THAT(ErrorOf(R"({"w":{"shape":[2],"data_offsets":[0,8]}})"), HasSubstr("dtype is missing"));
  EXPECT_THAT(ErrorOf(R"({"w":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})"),
              HasSubstr("not a count"));
  EXPECT_THAT(ErrorOf(R"({"w":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}})"),
              HasSubstr("not a count"));
  EXPECT_THAT(ErrorOf(R"({"w":{"dtype":"F32","shape":[2],"data_offsets":[0]}})"), HasSubstr("data_offsets"));
  EXPECT_THAT(ErrorOf(R"({"w":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})"), HasSubstr("backwards"));
  EXPECT_THAT(ErrorOf(R"({"w":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})"), HasSubstr("takes 12"));
  EXPECT_THAT(ErrorOf(R"({"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})"),
              HasSubstr("overflows"));
  EXPECT_THAT(ErrorOf(R"({"w":[]})"), HasSubstr("not an object"));
  EXPECT_THAT(ErrorOf(R"([])"), HasSubstr("not a JSON object"));
  EXPECT_THAT(
      ErrorOf(
          R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})"),
      HasSubstr("overlaps"));
}

TEST_F(Safetensors, BytesThatBelongToNoTensorAreRefused) {
  EXPECT_THAT(
      ErrorOf(
          R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})"),
      AllOf(HasSubstr("model.safetensors"), HasSubstr("\"b\""), HasSubstr("a hole of 4 bytes")));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})"),
              AllOf(HasSubstr("\"a\""), HasSubstr("a hole of 4 bytes")));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}})"),
              AllOf(HasSubstr("\"a\""), HasSubstr("4 bytes follow it")));
  EXPECT_THAT(ErrorOf("{}"), HasSubstr("16 bytes of data, but no tensor"));
}

TEST_F(Safetensors, AProductThatWrapsToASmallNumberIsRefused) {
  // 4194305 * 4194305 * 211106198978564 * 4 is 16 modulo 2^64.
  EXPECT_THAT(
      ErrorOf(R"({"w":{"dtype":"F32","shape":[4194305,4194305,211106198978564],"data_offsets":[0,16]}})"),
      AllOf(HasSubstr("\"w\""), HasSubstr("overflows")));
  WriteFile(dir_.File("model.safetensors"), std::string("\0\0\0\0\0\0\0\x80{}", 10));
  EXPECT_THAT(std::string(Checkpoint::Open(dir_.path()).status().message()),
              HasSubstr("header length 9223372036854775808 is above the limit"));
}

TEST_F(Safetensors, TruncatedTensorIsDataLossAndNamed) {
  const auto c = OpenWith(R"({"w":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}})", std::string(31, 'x'));
  EXPECT_EQ(c.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(c.status().message()),
              AllOf(HasSubstr("model.safetensors"), HasSubstr("\"w\""), HasSubstr("truncated")));
}

TEST_F(Safetensors, HeaderLengthsBeyondTheFileOrTheLimitAreRefused) {
  WriteFile(dir_.File("model.safetensors"), "abc");
  EXPECT_EQ(Checkpoint::Open(dir_.path()).status().code(), absl::StatusCode::kDataLoss);
  WriteFile(dir_.File("model.safetensors"), std::string("\x10\0\0\0\0\0\0\0{}", 10));
  EXPECT_EQ(Checkpoint::Open(dir_.path()).status().code(), absl::StatusCode::kDataLoss);
  WriteFile(dir_.File("model.safetensors"), std::string(64, '\xff'));
  EXPECT_THAT(std::string(Checkpoint::Open(dir_.path()).status().message()), HasSubstr("above the limit"));
  EXPECT_THAT(ErrorOf(std::string(70, '[') + std::string(70, ']')), HasSubstr("nested deeper"));
}

TEST_F(Safetensors, NoCheckpointSaysWhatIsLookedFor) {
  const auto c = Checkpoint::Open(dir_.path());
  EXPECT_EQ(c.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(c.status().message()), HasSubstr("model.safetensors.index.json"));
}

TEST_F(Safetensors, MissingShardAndMissingTensorOfAShardAreNamed) {
  TinyModel().WriteSharded(dir_.path());
  ASSERT_TRUE(Checkpoint::Open(dir_.path()).ok());
  nlohmann::json index = {
      {"weight_map", {{"lm_head.weight", "shard-0.safetensors"}, {"gone", "shard-1.safetensors"}}}};
  WriteFile(dir_.File("model.safetensors.index.json"), index.dump());
  EXPECT_THAT(std::string(Checkpoint::Open(dir_.path()).status().message()),
              AllOf(HasSubstr("\"gone\""), HasSubstr("shard-1.safetensors")));
  index["weight_map"]["gone"] = "shard-9.safetensors";
  WriteFile(dir_.File("model.safetensors.index.json"), index.dump());
  EXPECT_EQ(Checkpoint::Open(dir_.path()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(Checkpoint::Open(dir_.path()).status().message()),
              HasSubstr("shard-9.safetensors"));
}

TEST_F(Safetensors, ShardsOutsideTheDirectoryAreRefused) {
  for (const char* file : {"../x.safetensors", "/etc/passwd", "..", ""}) {
    WriteFile(dir_.File("model.safetensors.index.json"),
              nlohmann::json{{"weight_map", {{"w", file}}}}.dump());
    EXPECT_THAT(std::string(Checkpoint::Open(dir_.path()).status().message()), HasSubstr("beside the index"))
        << file;
  }
}

// Any single damaged byte of the header is read or refused, never out of bounds (ASan watches).
TEST_F(Safetensors, DamagedHeadersNeverReadOutside) {
  const std::string good =
      EncodeTensors({{"a", {{2, 3}, {1, 2, 3, 4, 5, 6}}}, {"b", {{4}, {1, 2, 3, 4}}}}, "F32");
  const size_t header = good.size() - 40;
  Rng rng(7);
  for (int round = 0; round < 500; ++round) {
    std::string bad = good;
    bad[rng.Below(header)] = static_cast<char>(rng.Next());
    if (round % 3 == 0) bad.resize(rng.Below(bad.size() + 1));
    WriteFile(dir_.File("model.safetensors"), bad);
    const auto c = Checkpoint::Open(dir_.path());
    if (!c.ok()) continue;
    unsigned sum = 0;
    for (const auto& [name, t] : c->tensors()) {
      for (std::byte b : t.data) sum += std::to_integer<unsigned>(b);
    }
    EXPECT_GE(sum, 0u);
  }
}

}  // namespace
}  // namespace tidepool
