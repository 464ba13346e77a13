#include "server/model/synthesize.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <random>

#include "absl/strings/str_cat.h"
#include "server/model/fingerprint.h"
#include "server/model/model_config.h"
#include "server/model/safetensors.h"
#include "server/model/template/chat_template.h"
#include "server/model/tensor_list.h"
#include "server/model/text/tokenizer.h"
#include "server/model/weights.h"

namespace tidepool {
namespace {

namespace fs = std::filesystem;

class SynthesizeTest : public testing::Test {
 protected:
  SynthesizeTest()
      : root_(fs::temp_directory_path() / absl::StrCat("tidepool-synthesize-", std::random_device()())) {
    fs::create_directories(root_);
  }
  ~SynthesizeTest() override { fs::remove_all(root_); }

  SynthesisOptions Options(const std::string& name) const {
    SynthesisOptions options;
    options.out = (root_ / name).string();
    return options;
  }
  // A shape made so small that it is written in no time.
  static nlohmann::ordered_json Tiny(std::string_view like) {
    ShapeChanges changes;
    changes.layers = 2;
    changes.hidden = 64;
    changes.intermediate = 96;
    changes.vocab = 300;
    const auto config = SynthesisConfig(like, changes);
    EXPECT_TRUE(config.ok()) << like << " " << config.status();
    return config.value_or(nlohmann::ordered_json());
  }
  static std::string Bytes(const fs::path& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  // Nothing but what the tests made is beside the results.
  size_t Entries() const { return static_cast<size_t>(std::distance(fs::directory_iterator(root_), {})); }

  const fs::path root_;
};

TEST_F(SynthesizeTest, EveryShapeIsAModelOfItsAdvertisedSize) {
  for (const SynthesisShape& shape : SynthesisShapes()) {
    const auto spec = ParseModelSpec(shape.config, "", shape.name);
    ASSERT_TRUE(spec.ok()) << shape.name << " " << spec.status();
    // The name's last part: 1b, 135m, 8x7b and a3b are not plain sizes.
    const std::string name(shape.name);
    double size = 0;
    char unit = 0;
    if (std::sscanf(name.c_str() + name.rfind('-') + 1, "%lf%c", &size, &unit) == 2 &&
        (unit == 'b' || unit == 'm')) {
      const double wanted = size * (unit == 'b' ? 1e9 : 1e6);
      EXPECT_NEAR(static_cast<double>(CountParameters(*spec).total) / wanted, 1.1, 0.35) << name;
    }
  }
}

TEST_F(SynthesizeTest, EveryFamilyIsWrittenWhole) {
  for (const SynthesisShape& shape : SynthesisShapes()) {
    const std::string name(shape.name);
    const auto result = Synthesize(Tiny(shape.name), Options(name));
    ASSERT_TRUE(result.ok()) << name << " " << result.status();
    const std::string dir = (root_ / name).string();
    const auto spec = LoadModelSpec(dir);
    ASSERT_TRUE(spec.ok()) << spec.status();
    const auto checkpoint = Checkpoint::Open(dir);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    EXPECT_TRUE(CheckTensors(*checkpoint, *spec).ok()) << name << " " << CheckTensors(*checkpoint, *spec);
    EXPECT_EQ(checkpoint->tensors().size(), ExpectedTensors(*spec).size());
    const auto tokenizer = Tokenizer::Load(dir);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    EXPECT_EQ(static_cast<uint32_t>((*tokenizer)->vocab_size()), spec->vocab);
    EXPECT_EQ(spec->eos_ids, std::vector<int32_t>{*(*tokenizer)->eos_id()});
  }
}

TEST_F(SynthesizeTest, FamiliesAndShapesAreNamed) {
  EXPECT_EQ((*SynthesisConfig("llama", {}))["vocab_size"], 128256);
  EXPECT_EQ((*SynthesisConfig("gemma2", {}))["hidden_size"], 2304);
  const auto unknown = SynthesisConfig("gpt-5", {});
  EXPECT_TRUE(absl::IsNotFound(unknown.status()));
  EXPECT_NE(unknown.status().message().find("llama-3.2-1b"), std::string::npos);
}

TEST_F(SynthesizeTest, SizeChoosesTheLayers) {
  ShapeChanges changes;
  changes.parameters = 3'000'000'000;
  const auto config = SynthesisConfig("llama-3.1-8b", changes);
  ASSERT_TRUE(config.ok()) << config.status();
  const auto spec = ParseModelSpec(config->dump(), "", "x");
  EXPECT_NEAR(static_cast<double>(CountParameters(*spec).total), 3e9, 0.15e9);
  changes.parameters = 1000;
  const auto small = SynthesisConfig("llama-3.1-8b", changes);
  EXPECT_TRUE(absl::IsInvalidArgument(small.status()));
  EXPECT_EQ(small.status().message().substr(0, 5), "size:");
}

TEST_F(SynthesizeTest, BytesDependOnShapeSeedAndTypeAlone) {
  const auto config = Tiny("qwen3-0.6b");
  SynthesisOptions a = Options("a"), b = Options("b"), c = Options("c"), d = Options("d");
  a.threads = 1;
  b.threads = 3;
  c.seed = 1;
  d.shard_bytes_max = 20'000;
  for (const auto& options : {a, b, c, d}) ASSERT_TRUE(Synthesize(config, options).ok());
  for (const char* file : {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}) {
    EXPECT_EQ(Bytes(root_ / "a" / file), Bytes(root_ / "b" / file)) << file;
  }
  EXPECT_NE(Bytes(root_ / "a/model.safetensors"), Bytes(root_ / "c/model.safetensors"));
  EXPECT_TRUE(fs::exists(root_ / "d/model.safetensors.index.json"));
  const auto whole = Checkpoint::Open(a.out), sharded = Checkpoint::Open(d.out);
  ASSERT_TRUE(whole.ok() && sharded.ok()) << sharded.status();
  ASSERT_EQ(whole->tensors().size(), sharded->tensors().size());
  for (const auto& [name, tensor] : whole->tensors()) {
    const auto other = sharded->Find(name);
    ASSERT_TRUE(other.ok());
    EXPECT_TRUE(std::ranges::equal(tensor.data, (*other)->data)) << name;
  }
}

// The three types hold the same numbers, rounded.
TEST_F(SynthesizeTest, ValuesAreThoseOfAnInitialisation) {
  const auto config = Tiny("llama-3.2-1b");
  SynthesisOptions wide = Options("f32"), half = Options("f16"), brain = Options("bf16");
  wide.dtype = DType::kF32;
  half.dtype = DType::kF16;
  for (const auto& options : {wide, half, brain}) ASSERT_TRUE(Synthesize(config, options).ok());
  const auto f32 = Checkpoint::Open(wide.out), f16 = Checkpoint::Open(half.out),
             bf16 = Checkpoint::Open(brain.out);
  ASSERT_TRUE(f32.ok() && f16.ok() && bf16.ok());
  for (const auto& [name, tensor] : f32->tensors()) {
    const size_t n = tensor.data.size() / 4;
    std::vector<float> x(n);
    std::memcpy(x.data(), tensor.data.data(), tensor.data.size());
    std::vector<uint16_t> h(n), b(n);
    std::memcpy(h.data(), (*f16->Find(name))->data.data(), 2 * n);
    std::memcpy(b.data(), (*bf16->Find(name))->data.data(), 2 * n);
    double sum = 0, squares = 0;
    for (size_t i = 0; i < n; ++i) {
      sum += x[i];
      squares += double{x[i]} * x[i];
      ASSERT_NEAR(HalfToFloat(h[i]), x[i], 0x1p-11 * std::fabs(x[i]) + 0x1p-25) << name;
      ASSERT_NEAR(ToFloat(BF16{b[i]}), x[i], 0x1p-8 * std::fabs(x[i])) << name;
    }
    const double mean = sum / static_cast<double>(n),
                 deviation = std::sqrt(squares / static_cast<double>(n) - mean * mean);
    if (name.find("norm") != name.npos) {
      EXPECT_NEAR(mean, 1, 0.03) << name;
      EXPECT_NEAR(deviation, 0.05, 0.02) << name;
    } else {
      const double wanted = name.find("embed") != name.npos       ? 0.02
                            : name.find("o_proj") != name.npos    ? 0.8 / 8 / 2
                            : name.find("down_proj") != name.npos ? 0.8 / std::sqrt(96) / 2
                                                                  : 0.8 / 8;
      EXPECT_NEAR(mean, 0, wanted / 10) << name;
      EXPECT_NEAR(deviation, wanted, wanted / 10) << name;
    }
  }
}

TEST_F(SynthesizeTest, TheTokenizerGoesThereAndBack) {
  ASSERT_TRUE(Synthesize(Tiny("mistral-7b"), Options("m")).ok());
  const auto tokenizer = Tokenizer::Load((root_ / "m").string());
  ASSERT_TRUE(tokenizer.ok());
  const std::string text = "Grüße, 世界! <|im_end|>";
  const auto ids = (*tokenizer)->Encode(text, {.add_special_tokens = false, .parse_special = false});
  EXPECT_EQ((*tokenizer)->Decode(*ids, false), text);
  // Every id is text of its own.
  for (int32_t id = 256; id < (*tokenizer)->vocab_size(); ++id)
    EXPECT_NE((*tokenizer)->TokenText(id), "") << id;
  const auto parsed = ChatTemplate::Parse((*tokenizer)->chat_template());
  ASSERT_TRUE(parsed.ok());
  const auto prompt =
      parsed->Render({{"messages", {{{"role", "user"}, {"content", "hi"}}}}, {"add_generation_prompt", true}},
                     {{"bos_token", (*tokenizer)->bos_token()}});
  EXPECT_EQ(prompt->text, "<|bos|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
}

TEST_F(SynthesizeTest, TakesAnotherTokenizerAlong) {
  ASSERT_TRUE(Synthesize(Tiny("llama-3.2-1b"), Options("first")).ok());
  auto config = Tiny("qwen2.5-0.5b");
  SynthesisOptions options = Options("second");
  options.tokenizer = (root_ / "first").string();
  ASSERT_TRUE(Synthesize(config, options).ok());
  EXPECT_EQ(Bytes(root_ / "first/tokenizer.json"), Bytes(root_ / "second/tokenizer.json"));
  config["vocab_size"] = 280;
  options.out = (root_ / "third").string();
  const auto refused = Synthesize(config, options).status();
  EXPECT_TRUE(absl::IsInvalidArgument(refused));
  EXPECT_NE(refused.message().find("has 300 ids"), std::string::npos) << refused;
  EXPECT_FALSE(fs::exists(options.out));
  EXPECT_EQ(Entries(), 2u);
}

TEST_F(SynthesizeTest, OverwritesNothingAndLeavesNothingBehind) {
  const auto config = Tiny("llama-3.2-1b");
  fs::create_directories(root_ / "full");
  std::ofstream(root_ / "full/precious") << "x";
  EXPECT_TRUE(absl::IsAlreadyExists(Synthesize(config, Options("full")).status()));
  EXPECT_EQ(Bytes(root_ / "full/precious"), "x");

  SynthesisOptions stopped = Options("stopped");
  stopped.stop = [] { return true; };
  EXPECT_TRUE(absl::IsCancelled(Synthesize(config, stopped).status()));
  EXPECT_EQ(Entries(), 1u);

  fs::create_directories(root_ / "empty");
  EXPECT_TRUE(Synthesize(config, Options("empty/")).ok());
  EXPECT_TRUE(fs::exists(root_ / "empty/model.safetensors"));
  EXPECT_EQ(Entries(), 2u);
}

TEST_F(SynthesizeTest, RefusesWhatTheDiskCannotHold) {
  ShapeChanges changes;
  changes.layers = 1024;
  changes.vocab = 1 << 24;
  auto config = SynthesisConfig("llama-3.1-70b", changes);
  ASSERT_TRUE(config.ok()) << config.status();
  SynthesisOptions options = Options("huge");
  const auto status = Synthesize(*config, options).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_NE(status.message().find("GB are free at"), std::string::npos) << status;
  EXPECT_EQ(Entries(), 0u);
}

TEST_F(SynthesizeTest, ShapesThatAreNoModelsNameTheField) {
  ShapeChanges changes;
  changes.heads = 7;
  const auto status = SynthesisConfig("llama-3.2-1b", changes).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_NE(status.message().find("num_key_value_heads"), std::string::npos) << status;
  changes = {};
  changes.experts = 4;
  EXPECT_NE(SynthesisConfig("llama-3.2-1b", changes).status().message().find("experts"), std::string::npos);
}

}  // namespace
}  // namespace tidepool
