#include "server/model/model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "server/model/fingerprint.h"
#include "tests/server/model/tiny_model.h"

namespace tidepool {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

absl::StatusOr<std::shared_ptr<const Model>> Load(const std::string& dir, const std::string& dtype = "auto",
                                                  const LoadProgress& progress = {}) {
  return LoadModel({.path = dir, .dtype = dtype}, "tokenizer", progress);
}

class ModelLoad : public ::testing::Test {
 protected:
  // The model with one tensor changed by `edit`.
  template <typename F>
  std::string ErrorWith(F edit) {
    TestTensors t = TinyModel().Tensors();
    edit(t);
    WriteFile(dir_.File("config.json"), TinyModel().Config().dump());
    WriteFile(dir_.File("model.safetensors"), EncodeTensors(t, "F32"));
    const auto m = Load(dir_.path());
    EXPECT_FALSE(m.ok());
    return std::string(m.status().message());
  }
  TempDir dir_;
};

TEST_F(ModelLoad, BadCheckpointsNameTheModelTheFileAndTheTensor) {
  EXPECT_THAT(
      ErrorWith([](TestTensors& t) { t.erase("model.layers.1.mlp.up_proj.weight"); }),
      AllOf(HasSubstr(dir_.path()), HasSubstr("model.layers.1.mlp.up_proj.weight"), HasSubstr("missing")));
  EXPECT_THAT(ErrorWith([](TestTensors& t) { t.erase("model.norm.weight"); }),
              HasSubstr("model.norm.weight"));
  EXPECT_THAT(ErrorWith([](TestTensors& t) { t.erase("lm_head.weight"); }), HasSubstr("lm_head.weight"));
  EXPECT_THAT(ErrorWith([](TestTensors& t) {
                t["model.layers.0.self_attn.k_proj.weight"].shape = {32, 16};
              }),
              AllOf(HasSubstr("model.layers.0.self_attn.k_proj.weight"), HasSubstr("[32, 16]"),
                    HasSubstr("[16, 32]")));
}

TEST_F(ModelLoad, AutoDtypeFollowsTheCheckpoint) {
  TinyModel().Write(dir_.path(), "F32");
  EXPECT_EQ((*Load(dir_.path()))->kv_dtype, DType::kF32);
  EXPECT_EQ((*Load(dir_.path(), "bfloat16"))->kv_dtype, DType::kBF16);
  TinyModel().Write(dir_.path(), "BF16");
  EXPECT_EQ((*Load(dir_.path()))->kv_dtype, DType::kBF16);
  EXPECT_EQ((*Load(dir_.path(), "float32"))->kv_dtype, DType::kF32);
  TinyModel().Write(dir_.path(), "F16");
  EXPECT_EQ((*Load(dir_.path()))->kv_dtype, DType::kF32);
  EXPECT_THAT(std::string(Load(dir_.path(), "int8").status().message()),
              HasSubstr("model.dtype is \"int8\""));
}

TEST_F(ModelLoad, HalfPrecisionIsWidenedExactly) {
  TinyModel().Write(dir_.path(), "F16");
  const auto half = *Load(dir_.path());
  TinyModel().Write(dir_.path(), "F32");  // the same values
  const auto full = *Load(dir_.path());
  EXPECT_EQ(half->transformer.weights().embedding_f32, full->transformer.weights().embedding_f32);
  EXPECT_EQ(half->transformer.weights().final_norm, full->transformer.weights().final_norm);
}

TEST_F(ModelLoad, ProgressRisesToTheTotal) {
  TinyModel().Write(dir_.path());
  uint64_t last = 0, total = 0;
  int calls = 0;
  ASSERT_TRUE(Load(dir_.path(), "auto", [&](uint64_t done, uint64_t all) {
                EXPECT_GT(done, last);
                last = done;
                total = all;
                ++calls;
              }).ok());
  EXPECT_EQ(last, total);
  EXPECT_GT(total, 0u);
  EXPECT_GT(calls, 10);
}

TEST_F(ModelLoad, NameAndLengthComeFromTheConfigElseFromTheModel) {
  EXPECT_EQ(ServedModelName({.path = "a/b/some-model/"}), "some-model");
  EXPECT_EQ(ServedModelName({.path = "a/some-model"}), "some-model");
  EXPECT_EQ(ServedModelName({.path = "a/some-model", .name = "mine"}), "mine");
  TinyModel().Write(dir_.path());
  EXPECT_EQ((*Load(dir_.path()))->max_model_len, 512u);
  EXPECT_EQ((*LoadModel({.path = dir_.path(), .max_model_len = 100}, "", {}))->max_model_len, 100u);
  EXPECT_THAT(std::string(LoadModel({.path = dir_.path(), .max_model_len = 513}, "", {}).status().message()),
              AllOf(HasSubstr("513"), HasSubstr("512")));
}

TEST_F(ModelLoad, FingerprintIgnoresShardingAndTellsEverythingElseApart) {
  TinyModel tiny;
  tiny.Write(dir_.path());
  const auto base = (*Load(dir_.path()))->fingerprint;
  EXPECT_EQ(base.size(), 64u);
  EXPECT_EQ((*Load(dir_.path()))->fingerprint, base);
  EXPECT_NE((*Load(dir_.path(), "bfloat16"))->fingerprint, base);
  EXPECT_NE((*LoadModel({.path = dir_.path(), .dtype = "auto"}, "another tokenizer", {}))->fingerprint, base);

  TempDir sharded;
  tiny.WriteSharded(sharded.path());
  EXPECT_EQ((*Load(sharded.path()))->fingerprint, base);

  auto config = tiny.Config();
  config["rope_theta"] = 10001.0;
  WriteFile(dir_.File("config.json"), config.dump());
  EXPECT_NE((*Load(dir_.path()))->fingerprint, base);
  config = tiny.Config();
  config["eos_token_id"] = 5;  // does not enter KV
  WriteFile(dir_.File("config.json"), config.dump());
  EXPECT_EQ((*Load(dir_.path()))->fingerprint, base);

  TestTensors t = tiny.Tensors();
  t["model.layers.1.mlp.down_proj.weight"].values[7] += 1.0f / 1024;
  WriteFile(dir_.File("model.safetensors"), EncodeTensors(t, "F32"));
  EXPECT_NE((*Load(dir_.path()))->fingerprint, base);
}

TEST(StoriesModel, AllFormsLoadAndShardingKeepsTheFingerprint) {
  const std::string dir = "../shared/data/tiny_llms/stories260K/";
  if (!std::filesystem::exists(dir)) GTEST_SKIP() << dir << " is not there";
  const auto full = Load(dir + "hf"), sharded = Load(dir + "hf-sharded"), b16 = Load(dir + "hf-bfloat16"),
             f16 = Load(dir + "hf-float16");
  ASSERT_TRUE(full.ok()) << full.status();
  ASSERT_TRUE(sharded.ok()) << sharded.status();
  ASSERT_TRUE(b16.ok()) << b16.status();
  ASSERT_TRUE(f16.ok()) << f16.status();
  EXPECT_EQ((*full)->fingerprint, (*sharded)->fingerprint);
  EXPECT_NE((*full)->fingerprint, (*b16)->fingerprint);
  EXPECT_EQ((*b16)->kv_dtype, DType::kBF16);
  EXPECT_EQ((*f16)->kv_dtype, DType::kF32);
}

}  // namespace
}  // namespace tidepool
