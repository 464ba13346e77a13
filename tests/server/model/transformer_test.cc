#include "server/model/transformer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "server/model/model.h"
#include "tests/server/model/tiny_families.h"

namespace tidepool {
namespace {

// The model once more, in double, with dense attention and no cache: straight from the formulas.
// Returns logits [tokens, vocab].
std::vector<std::vector<double>> Reference(const TinyModel& m, const std::vector<int32_t>& tokens) {
  const TestTensors w = m.Tensors();
  const int n = static_cast<int>(tokens.size()), hd = m.head_dim;
  using Rows = std::vector<std::vector<double>>;
  auto mul = [&](const std::string& name, const Rows& x) {
    const TestTensor& t = w.at(name);
    const size_t out = t.shape[0], in = t.shape[1];
    Rows y(x.size(), std::vector<double>(out));
    for (size_t r = 0; r < x.size(); ++r) {
      for (size_t o = 0; o < out; ++o) {
        for (size_t i = 0; i < in; ++i) y[r][o] += x[r][i] * t.values[o * in + i];
      }
    }
    return y;
  };
  auto norm = [&](const std::string& name, Rows x) {
    for (auto& row : x) {
      double sum = 0;
      for (double v : row) sum += v * v;
      const double s = 1 / std::sqrt(sum / static_cast<double>(row.size()) + 1e-5);
      for (size_t i = 0; i < row.size(); ++i) row[i] *= s * w.at(name).values[i];
    }
    return x;
  };
  auto rotate = [&](Rows& x, int heads) {
    for (int p = 0; p < n; ++p) {
      for (int h = 0; h < heads; ++h) {
        for (int i = 0; i < hd / 2; ++i) {
          const double a = p * std::pow(10000.0, -2.0 * i / hd);
          double& u = x[p][h * hd + i];
          double& v = x[p][h * hd + i + hd / 2];
          const double u0 = u, v0 = v;
          u = u0 * std::cos(a) - v0 * std::sin(a);
          v = v0 * std::cos(a) + u0 * std::sin(a);
        }
      }
    }
  };
  Rows x;
  for (int32_t t : tokens) {
    const auto& e = w.at("model.embed_tokens.weight").values;
    x.emplace_back(e.begin() + t * m.hidden, e.begin() + (t + 1) * m.hidden);
  }
  for (int l = 0; l < m.layers; ++l) {
    const std::string p = "model.layers." + std::to_string(l) + ".";
    const Rows h = norm(p + "input_layernorm.weight", x);
    Rows q = mul(p + "self_attn.q_proj.weight", h), k = mul(p + "self_attn.k_proj.weight", h);
    const Rows v = mul(p + "self_attn.v_proj.weight", h);
    rotate(q, m.heads);
    rotate(k, m.kv_heads);
    Rows attn(n, std::vector<double>(m.heads * hd));
    for (int i = 0; i < n; ++i) {
      for (int a = 0; a < m.heads; ++a) {
        const int g = a / (m.heads / m.kv_heads);
        std::vector<double> s(i + 1);
        double sum = 0;
        for (int j = 0; j <= i; ++j) {
          double dot = 0;
          for (int d = 0; d < hd; ++d) dot += q[i][a * hd + d] * k[j][g * hd + d];
          sum += s[j] = std::exp(dot / std::sqrt(hd));
        }
        for (int j = 0; j <= i; ++j) {
          for (int d = 0; d < hd; ++d) attn[i][a * hd + d] += s[j] / sum * v[j][g * hd + d];
        }
      }
    }
    const Rows o = mul(p + "self_attn.o_proj.weight", attn);
    for (int i = 0; i < n; ++i) {
      for (int c = 0; c < m.hidden; ++c) x[i][c] += o[i][c];
    }
    const Rows h2 = norm(p + "post_attention_layernorm.weight", x);
    Rows gate = mul(p + "mlp.gate_proj.weight", h2);
    const Rows up = mul(p + "mlp.up_proj.weight", h2);
    for (int i = 0; i < n; ++i) {
      for (int c = 0; c < m.intermediate; ++c)
        gate[i][c] = gate[i][c] / (1 + std::exp(-gate[i][c])) * up[i][c];
    }
    const Rows down = mul(p + "mlp.down_proj.weight", gate);
    for (int i = 0; i < n; ++i) {
      for (int c = 0; c < m.hidden; ++c) x[i][c] += down[i][c];
    }
  }
  return mul(m.tie ? "model.embed_tokens.weight" : "lm_head.weight", norm("model.norm.weight", x));
}

std::vector<int32_t> RandomTokens(size_t n, int vocab, uint64_t seed) {
  Rng rng(seed);
  std::vector<int32_t> out(n);
  for (auto& t : out) t = static_cast<int32_t>(rng.Below(vocab));
  return out;
}

// Runs one or more sequences through a Transformer in steps, each with KV of its own.
class Runner {
 public:
  Runner(const Model& model, NumericMode mode, int threads, uint32_t block_tokens = 16)
      : model_(model),
        layout_(model.Layout(block_tokens)),
        mode_(mode),
        pool_(threads),
        ws_(model.spec, 256, 8) {}

  struct Seq {
    std::vector<int32_t> tokens;
    int32_t done = 0;
    std::vector<std::vector<std::byte>> storage;
    std::vector<std::byte*> blocks;
    std::vector<std::vector<float>> logits;  // of every position
  };

  Seq Make(std::vector<int32_t> tokens) const {
    Seq s;
    s.tokens = std::move(tokens);
    for (size_t i = 0; i * layout_.block_tokens < s.tokens.size(); ++i) {
      // Garbage where nothing was written must not matter.
      s.storage.emplace_back(layout_.block_bytes(), std::byte{0xff});
      s.blocks.push_back(s.storage.back().data());
    }
    return s;
  }

  // One step: parts[i] tokens of seqs[i].
  absl::Status Step(const std::vector<Seq*>& seqs, const std::vector<int32_t>& parts) {
    std::vector<int32_t> tokens, positions, rows;
    std::vector<ForwardSequence> views;
    for (size_t i = 0; i < seqs.size(); ++i) {
      views.push_back({.blocks = seqs[i]->blocks.data(),
                       .context = seqs[i]->done + parts[i],
                       .first_row = static_cast<int32_t>(tokens.size()),
                       .q_len = parts[i]});
      for (int32_t p = seqs[i]->done; p < seqs[i]->done + parts[i]; ++p) {
        rows.push_back(static_cast<int32_t>(tokens.size()));
        tokens.push_back(seqs[i]->tokens[p]);
        positions.push_back(p);
      }
    }
    const size_t vocab = model_.spec.vocab;
    std::vector<float> logits(rows.size() * vocab);
    absl::Status s = model_.transformer.Forward(
        {.tokens = tokens, .positions = positions, .sequences = views, .logit_rows = rows}, layout_, mode_,
        pool_, ws_, logits.data());
    if (!s.ok()) return s;
    size_t row = 0;
    for (size_t i = 0; i < seqs.size(); ++i) {
      for (int32_t p = 0; p < parts[i]; ++p, ++row) {
        seqs[i]->logits.emplace_back(logits.begin() + row * vocab, logits.begin() + (row + 1) * vocab);
      }
      seqs[i]->done += parts[i];
    }
    return s;
  }

  // All of `tokens`, alone, in chunks of `chunk`.
  Seq All(std::vector<int32_t> tokens, int32_t chunk) {
    Seq s = Make(std::move(tokens));
    while (s.done < static_cast<int32_t>(s.tokens.size())) {
      EXPECT_TRUE(
          Step({&s}, {std::min<int32_t>(chunk, static_cast<int32_t>(s.tokens.size()) - s.done)}).ok());
    }
    return s;
  }

 private:
  const Model& model_;
  BlockLayout layout_;
  NumericMode mode_;
  ThreadPool pool_;
  Workspace ws_;
};

std::shared_ptr<const Model> LoadTiny(const TinyModel& tiny, const std::string& dtype) {
  TempDir dir;
  tiny.Write(dir.path());
  auto m = LoadModel({.path = dir.path(), .dtype = dtype}, "", {});
  EXPECT_TRUE(m.ok()) << m.status();
  return *m;
}

double WorstDifference(const Runner::Seq& s, const std::vector<std::vector<double>>& want) {
  double worst = 0;
  for (size_t p = 0; p < want.size(); ++p) {
    for (size_t v = 0; v < want[p].size(); ++v)
      worst = std::max(worst, std::abs(s.logits[p][v] - want[p][v]));
  }
  return worst;
}

TEST(Transformer, LogitsEqualTheFormulas) {
  for (const bool tie : {false, true}) {
    for (const auto& [heads, kv_heads] : {std::pair{4, 2}, {4, 4}, {6, 1}}) {
      const TinyModel tiny{.heads = heads, .kv_heads = kv_heads, .tie = tie};
      const auto model = LoadTiny(tiny, "float32");
      const auto tokens = RandomTokens(45, tiny.vocab, 3);
      const auto want = Reference(tiny, tokens);
      for (const NumericMode mode : {NumericMode::kFast, NumericMode::kBatchInvariant}) {
        Runner runner(*model, mode, 2);
        EXPECT_LT(WorstDifference(runner.All(tokens, 45), want), 2e-4);
        EXPECT_LT(WorstDifference(runner.All(tokens, 7), want), 2e-4);
      }
    }
  }
}

TEST(Transformer, Bfloat16StaysNearTheFormulas) {
  const TinyModel tiny;
  const auto model = LoadTiny(tiny, "bfloat16");
  const auto tokens = RandomTokens(40, tiny.vocab, 4);
  const auto want = Reference(tiny, tokens);
  double spread = 0;
  for (const auto& row : want) {
    for (double v : row) spread = std::max(spread, std::abs(v));
  }
  Runner runner(*model, NumericMode::kFast, 1);
  // 8 bits of mantissa in weights, activations and KV, over two layers.
  EXPECT_LT(WorstDifference(runner.All(tokens, 40), want), 0.03 * spread);
}

// The invariant behind "same answer everywhere": bit for bit, whatever the step looked like.
TEST(Transformer, BatchInvariantLogitsDoNotDependOnChunkBatchOrThreads) {
  for (const char* dtype : {"float32", "bfloat16"}) {
    const TinyModel tiny{.hidden = 64, .heads = 8, .kv_heads = 4, .intermediate = 172};
    const auto model = LoadTiny(tiny, dtype);
    const auto tokens = RandomTokens(70, tiny.vocab, 5);
    Runner base(*model, NumericMode::kBatchInvariant, 1);
    const auto want = base.All(tokens, 70).logits;
    for (const int threads : {1, 2, 3}) {
      Runner runner(*model, NumericMode::kBatchInvariant, threads);
      for (const int32_t chunk : {1, 3, 16, 17, 32, 69}) {
        ASSERT_EQ(runner.All(tokens, chunk).logits, want)
            << dtype << " chunk " << chunk << " threads " << threads;
      }
      // Beside others, at changing places of the batch.
      auto s = runner.Make(tokens);
      auto other = runner.Make(RandomTokens(120, tiny.vocab, 6));
      auto third = runner.Make(RandomTokens(120, tiny.vocab, 7));
      Rng rng(threads);
      while (s.done < 70) {
        const int32_t n = std::min<int32_t>(1 + static_cast<int32_t>(rng.Below(9)), 70 - s.done);
        const auto room = [&](const Runner::Seq& q) {
          return std::min<int32_t>(1 + static_cast<int32_t>(rng.Below(3)), 120 - q.done);
        };
        const int32_t a = room(other), b = room(third);
        if (a == 0 || b == 0) {
          ASSERT_TRUE(runner.Step({&s}, {n}).ok());
        } else if (rng.Chance(0.5)) {
          ASSERT_TRUE(runner.Step({&other, &s, &third}, {a, n, b}).ok());
        } else {
          ASSERT_TRUE(runner.Step({&s, &third, &other}, {n, b, a}).ok());
        }
      }
      ASSERT_EQ(s.logits, want) << dtype << " in a batch, threads " << threads;
    }
  }
}

std::shared_ptr<const Model> LoadFamily(const nlohmann::json& config, const std::string& dtype) {
  TempDir dir;
  WriteRandomModel(dir.path(), config);
  auto m = LoadModel({.path = dir.path(), .dtype = dtype}, "", {});
  EXPECT_TRUE(m.ok()) << m.status();
  return m.ok() ? *m : nullptr;
}

// Windows, caps, experts and norms keep the invariant too.
TEST(Transformer, EveryFamilyIsBatchInvariant) {
  for (const auto& [family, config] : TinyFamilies()) {
    for (const char* dtype : {"float32", "bfloat16"}) {
      const auto model = LoadFamily(config, dtype);
      ASSERT_NE(model, nullptr) << family;
      const auto tokens = RandomTokens(50, 96, 5);
      Runner base(*model, NumericMode::kBatchInvariant, 1);
      const auto want = base.All(tokens, 50).logits;
      for (const float v : want.back()) ASSERT_TRUE(std::isfinite(v)) << family;
      Runner runner(*model, NumericMode::kBatchInvariant, 3);
      for (const int32_t chunk : {1, 7, 32}) {
        ASSERT_EQ(runner.All(tokens, chunk).logits, want) << family << " " << dtype << " chunk " << chunk;
      }
      auto s = runner.Make(tokens), other = runner.Make(RandomTokens(50, 96, 6));
      while (s.done < 50) {
        const int32_t n = std::min(9, 50 - s.done), m = std::min(4, 50 - other.done);
        ASSERT_TRUE(
            (s.done % 2 ? runner.Step({&other, &s}, {m, n}) : runner.Step({&s, &other}, {n, m})).ok());
      }
      ASSERT_EQ(s.logits, want) << family << " " << dtype << " in a batch";
    }
  }
}

TEST(Transformer, EveryFamilysFastModeStaysNearTheInvariantOne) {
  for (const auto& [family, config] : TinyFamilies()) {
    const auto model = LoadFamily(config, "float32");
    ASSERT_NE(model, nullptr) << family;
    const auto tokens = RandomTokens(50, 96, 5);
    const auto want = Runner(*model, NumericMode::kBatchInvariant, 1).All(tokens, 50).logits;
    const auto got = Runner(*model, NumericMode::kFast, 3).All(tokens, 13).logits;
    for (size_t p = 0; p < want.size(); ++p) {
      for (size_t v = 0; v < want[p].size(); ++v) ASSERT_NEAR(got[p][v], want[p][v], 1e-4) << family;
    }
  }
}

TEST(Transformer, MalformedBatchesAreRefused) {
  const TinyModel tiny;
  const auto model = LoadTiny(tiny, "float32");
  const BlockLayout layout = model->Layout(16);
  ThreadPool pool(1);
  Workspace ws(model->spec, 8, 2);
  std::vector<std::byte> block(layout.block_bytes());
  std::byte* base = block.data();
  std::vector<float> logits(8 * tiny.vocab);
  auto run = [&](std::vector<int32_t> tokens, std::vector<int32_t> positions,
                 std::vector<ForwardSequence> seqs, std::vector<int32_t> rows, BlockLayout l) {
    return model->transformer.Forward(
        {.tokens = tokens, .positions = positions, .sequences = seqs, .logit_rows = rows}, l,
        NumericMode::kFast, pool, ws, logits.data());
  };
  const ForwardSequence one{.blocks = &base, .context = 1, .first_row = 0, .q_len = 1};
  EXPECT_TRUE(run({1}, {0}, {one}, {0}, layout).ok());
  EXPECT_TRUE(run({}, {}, {}, {}, layout).ok());
  EXPECT_TRUE(run({1}, {0}, {one}, {}, layout).ok());
  const auto bad = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(run({96}, {0}, {one}, {0}, layout).code(), bad);
  EXPECT_EQ(run({-1}, {0}, {one}, {0}, layout).code(), bad);
  EXPECT_EQ(run({1}, {1}, {one}, {0}, layout).code(), bad);
  EXPECT_EQ(run({1}, {0}, {one}, {1}, layout).code(), bad);
  EXPECT_EQ(run({1, 2}, {0, 1}, {one}, {0}, layout).code(), bad);
  EXPECT_EQ(run({1}, {0}, {}, {0}, layout).code(), bad);
  EXPECT_EQ(run(std::vector<int32_t>(9, 1), {0, 1, 2, 3, 4, 5, 6, 7, 8},
                {{.blocks = &base, .context = 9, .first_row = 0, .q_len = 9}}, {0}, layout)
                .code(),
            bad);
  BlockLayout other = layout;
  other.layers = 3;
  EXPECT_EQ(run({1}, {0}, {one}, {0}, other).code(), bad);
}

}  // namespace
}  // namespace tidepool
