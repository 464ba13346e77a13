#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "base/digest.h"
#include "base/dtype.h"
#include "base/rng.h"

namespace tidepool {

// A directory of its own under the test's temporary directory, removed at the end.
class TempDir {
 public:
  TempDir() : path_(std::filesystem::temp_directory_path() / ("tidepool_" + RandomHexId())) {
    std::filesystem::create_directories(path_);
  }
  ~TempDir() {
    std::error_code ec;
    std::filesystem::remove_all(path_, ec);
  }
  std::string path() const { return path_.string(); }
  std::string File(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

inline void WriteFile(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

struct TestTensor {
  std::vector<int64_t> shape;
  std::vector<float> values;
};

// A safetensors file, written from the format's description: u64 header length, JSON, data.
inline std::string SafetensorsBytes(const std::string& header, const std::string& data) {
  std::string out(8, '\0');
  for (int i = 0; i < 8; ++i) out[i] = static_cast<char>(header.size() >> (8 * i) & 0xff);
  return out + header + data;
}

// IEEE binary16 of a value that it holds exactly.
inline uint16_t ExactHalf(float f) {
  static const auto halves = [] {
    std::map<float, uint16_t> out;
    for (uint32_t h = 0; h < 0xfc00; ++h) {
      if ((h & 0x7c00) != 0x7c00)
        out.emplace(HalfToFloat(static_cast<uint16_t>(h)), static_cast<uint16_t>(h));
    }
    return out;
  }();
  if (const auto it = halves.find(f); it != halves.end()) return it->second;
  return 0x7e00;
}

inline std::string EncodeTensor(const std::vector<float>& values, const std::string& dtype) {
  std::string out;
  for (float v : values) {
    if (dtype == "F32") {
      out.append(reinterpret_cast<const char*>(&v), 4);
    } else {
      const uint16_t h = dtype == "BF16" ? ToBF16(v).bits : ExactHalf(v);
      out.append(reinterpret_cast<const char*>(&h), 2);
    }
  }
  return out;
}

using TestTensors = std::map<std::string, TestTensor>;

inline std::string EncodeTensors(const TestTensors& tensors, const std::string& dtype) {
  nlohmann::json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const auto& [name, t] : tensors) {
    const std::string bytes = EncodeTensor(t.values, dtype);
    header[name] = {
        {"dtype", dtype}, {"shape", t.shape}, {"data_offsets", {data.size(), data.size() + bytes.size()}}};
    data += bytes;
  }
  return SafetensorsBytes(header.dump(), data);
}

// A random Llama of a given shape.
struct TinyModel {
  int layers = 2, hidden = 32, heads = 4, kv_heads = 2, head_dim = 8, intermediate = 48, vocab = 96;
  int max_positions = 512;
  bool tie = false;
  uint64_t seed = 1;
  float scale = 0.15f;

  nlohmann::json Config() const {
    return {{"architectures", {"LlamaForCausalLM"}},
            {"hidden_size", hidden},
            {"intermediate_size", intermediate},
            {"num_hidden_layers", layers},
            {"num_attention_heads", heads},
            {"num_key_value_heads", kv_heads},
            {"head_dim", head_dim},
            {"max_position_embeddings", max_positions},
            {"vocab_size", vocab},
            {"rms_norm_eps", 1e-5},
            {"rope_theta", 10000.0},
            {"hidden_act", "silu"},
            {"tie_word_embeddings", tie},
            {"bos_token_id", 1},
            {"eos_token_id", 2},
            {"torch_dtype", "float32"}};
  }

  TestTensors Tensors() const {
    TestTensors out;
    Rng rng(seed);
    // Multiples of 1/1024 below 1/2 in size: exact in binary16, and in float32.
    auto matrix = [&](const std::string& name, int64_t n, int64_t k) {
      TestTensor t{{n, k}, {}};
      for (int64_t i = 0; i < n * k; ++i) {
        const int range = static_cast<int>(scale * 1024);
        t.values.push_back((static_cast<float>(rng.Below(2 * range + 1)) - range) / 1024);
      }
      out[name] = std::move(t);
    };
    auto norm = [&](const std::string& name) {
      TestTensor t{{hidden}, {}};
      for (int i = 0; i < hidden; ++i) t.values.push_back(0.75f + static_cast<float>(rng.Below(64)) / 128);
      out[name] = std::move(t);
    };
    matrix("model.embed_tokens.weight", vocab, hidden);
    for (float& v : out["model.embed_tokens.weight"].values) v *= 4;
    norm("model.norm.weight");
    if (!tie) matrix("lm_head.weight", vocab, hidden);
    for (int l = 0; l < layers; ++l) {
      const std::string p = "model.layers." + std::to_string(l) + ".";
      norm(p + "input_layernorm.weight");
      norm(p + "post_attention_layernorm.weight");
      matrix(p + "self_attn.q_proj.weight", heads * head_dim, hidden);
      matrix(p + "self_attn.k_proj.weight", kv_heads * head_dim, hidden);
      matrix(p + "self_attn.v_proj.weight", kv_heads * head_dim, hidden);
      matrix(p + "self_attn.o_proj.weight", hidden, heads * head_dim);
      matrix(p + "mlp.gate_proj.weight", intermediate, hidden);
      matrix(p + "mlp.up_proj.weight", intermediate, hidden);
      matrix(p + "mlp.down_proj.weight", hidden, intermediate);
    }
    return out;
  }

  void Write(const std::string& dir, const std::string& dtype = "F32") const {
    WriteFile(dir + "/config.json", Config().dump());
    WriteFile(dir + "/model.safetensors", EncodeTensors(Tensors(), dtype));
  }

  // In two shards with an index.
  void WriteSharded(const std::string& dir) const {
    WriteFile(dir + "/config.json", Config().dump());
    TestTensors shards[2];
    nlohmann::json index = {{"metadata", {{"total_size", 0}}}, {"weight_map", nlohmann::json::object()}};
    size_t i = 0;
    for (const auto& [name, t] : Tensors()) {
      const size_t shard = i++ % 2;
      shards[shard][name] = t;
      index["weight_map"][name] = "shard-" + std::to_string(shard) + ".safetensors";
    }
    for (size_t s = 0; s < 2; ++s) {
      WriteFile(dir + "/shard-" + std::to_string(s) + ".safetensors", EncodeTensors(shards[s], "F32"));
    }
    WriteFile(dir + "/model.safetensors.index.json", index.dump());
  }
};

}  // namespace tidepool
