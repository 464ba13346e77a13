#pragma once

// The engine over a model double: what a token is follows from the KV that the blocks hold, so a lost,
// misplaced or stale block shows as another answer.

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "base/rng.h"
#include "kvstore/block_run.h"
#include "kvstore/keys.h"
#include "server/engine/engine.h"
#include "tests/server/engine/recording_sink.h"

namespace tidepool {

inline constexpr uint32_t kVocab = 1000;
inline constexpr uint32_t kBlock = 4;
inline constexpr uint32_t kHidden = 2;           // a token's state: its position, and itself
inline constexpr int32_t kNanToken = 990;        // a context ending in it gives NaN logits
inline constexpr int32_t kFailToken = 991;       // a batch with it fails to compute, after the last layer
inline constexpr int32_t kFailEarlyToken = 992;  // and one with this before it
inline const BlockLayout kLayout{
    .layers = 1, .kv_heads = 1, .head_dim = 2, .block_tokens = kBlock, .dtype = DType::kF32};

// The token that follows a context: any function of all of it.
inline int32_t Next(const std::vector<int32_t>& context) {
  uint64_t h = 0;
  for (int32_t t : context) h = Mix64(h + static_cast<uint64_t>(t));
  return static_cast<int32_t>(h % 900);
}

inline std::vector<int32_t> Continue(std::vector<int32_t> context, size_t n) {
  std::vector<int32_t> out;
  for (size_t i = 0; i < n; ++i) {
    out.push_back(Next(context));
    context.push_back(out.back());
  }
  return out;
}

// What the test sees and steers of the runner that the engine owns.
struct Controls {
  // Lets `n` more steps happen; by default there is no limit.
  void Allow(int n) {
    std::lock_guard lock(mu);
    allowed = n;
    cv.notify_all();
  }
  void Free() { Allow(1 << 30); }
  // Until a step waits for permission.
  bool WaitHeld() {
    std::unique_lock lock(mu);
    return cv.wait_for(lock, std::chrono::seconds(60), [&] { return held; });
  }
  std::mutex mu;
  std::condition_variable cv;
  int allowed = 1 << 30;
  bool held = false;
  std::vector<std::vector<int32_t>> steps;  // q_len of each sequence
};

class KvRunner final : public ModelRunner {
 public:
  explicit KvRunner(std::shared_ptr<Controls> c) : c_(std::move(c)) {}
  const BlockLayout& layout() const override { return kLayout; }
  uint32_t vocab() const override { return kVocab; }
  uint32_t hidden() const override { return kHidden; }
  uint32_t max_model_len() const override { return 256; }

  absl::Status Forward(const ForwardBatch& batch, float* logits) override {
    {
      std::unique_lock lock(c_->mu);
      c_->held = c_->allowed == 0;
      c_->cv.notify_all();
      c_->cv.wait_for(lock, std::chrono::seconds(60), [&] { return c_->allowed > 0; });
      c_->held = false;
      --c_->allowed;
      std::vector<int32_t> shape;
      for (const auto& s : batch.sequences) shape.push_back(s.q_len);
      c_->steps.push_back(shape);
    }
    for (int32_t t : batch.tokens) {
      if (t == kFailEarlyToken) return absl::InternalError("cannot compute this token");
    }
    if (batch.on_layer != nullptr) (*batch.on_layer)(1);
    for (int32_t t : batch.tokens) {
      if (t == kFailToken) return absl::InternalError("cannot compute this token");
    }
    for (size_t i = 0; i < batch.hidden_rows.size(); ++i) {
      const auto row = static_cast<size_t>(batch.hidden_rows[i]);
      batch.hidden[i * kHidden] = static_cast<float>(batch.positions[row]);
      batch.hidden[i * kHidden + 1] = static_cast<float>(batch.tokens[row]);
    }
    size_t next_logits = 0;
    for (const ForwardSequence& s : batch.sequences) {
      for (int32_t i = 0; i < s.q_len; ++i) {
        const int32_t p = s.context - s.q_len + i;
        reinterpret_cast<int32_t*>(s.blocks[p / kBlock])[p % kBlock] = batch.tokens[s.first_row + i];
      }
      for (int32_t i = 0; i < s.q_len && next_logits < batch.logit_rows.size(); ++i) {
        if (batch.logit_rows[next_logits] != s.first_row + i) continue;
        std::vector<int32_t> context;
        for (int32_t p = 0; p < s.context - s.q_len + i + 1; ++p) {
          context.push_back(reinterpret_cast<const int32_t*>(s.blocks[p / kBlock])[p % kBlock]);
        }
        float* row = logits + next_logits++ * kVocab;
        std::fill(row, row + kVocab, 0.0f);
        row[Next(context)] = 10;
        row[(Next(context) + 1) % 900] = 5;
        if (context.back() == kNanToken) row[3] = std::nanf("");
      }
    }
    return absl::OkStatus();
  }

 private:
  const std::shared_ptr<Controls> c_;
};

// Memory of a peer on this host, with the KV of a prompt's blocks.
class PeerMemory final : public RunOwner {
 public:
  explicit PeerMemory(const std::vector<int32_t>& prompt) : bytes_(prompt.size() / kBlock) {
    for (size_t i = 0; i < bytes_.size(); ++i) {
      bytes_[i].resize(kLayout.block_bytes());
      std::memcpy(bytes_[i].data(), prompt.data() + i * kBlock, kBlock * sizeof(int32_t));
    }
  }
  std::span<const std::byte> SlotBytes(uint32_t slot) const override { return bytes_[slot]; }
  void Drop() override { --leases; }
  // Of the prompt's blocks [begin, end).
  BlockRun Run(uint32_t begin, uint32_t end) {
    ++leases;
    std::vector<uint32_t> slots;
    for (; begin < end; ++begin) slots.push_back(begin);
    return BlockRun(this, std::move(slots));
  }
  const std::vector<std::vector<std::byte>>& bytes() const { return bytes_; }

  std::atomic<int> leases{0};

 private:
  std::vector<std::vector<std::byte>> bytes_;
};

class EngineTest : public ::testing::Test {
 protected:
  void Start(EngineConfig config = {.max_batch = 4, .max_step_tokens = 16, .max_waiting = 8},
             uint32_t slots = 128, absl::Duration mask_deadline = absl::Seconds(10)) {
    auto pool = BlockPool::Create({.layout = kLayout, .slots = slots, .metrics = &metrics_});
    ASSERT_TRUE(pool.ok()) << pool.status();
    pool_ = *std::move(pool);
    auto engine = Engine::Start({.config = config,
                                 .runner = std::make_unique<KvRunner>(controls_),
                                 .pool = pool_.get(),
                                 .role = "both",
                                 .metrics = &metrics_,
                                 .mask_deadline = mask_deadline,
                                 .on_short = on_short_});
    ASSERT_TRUE(engine.ok()) << engine.status();
    engine_ = *std::move(engine);
  }
  void TearDown() override {
    controls_->Free();
    engine_.reset();
  }

  std::shared_ptr<RecordingSink> MakeSpec(SequenceSpec& spec, const std::string& id,
                                          std::vector<int32_t> tokens, uint32_t max_tokens) {
    auto sink = std::make_shared<RecordingSink>();
    spec.request_id = id;
    spec.tokens = std::move(tokens);
    spec.blocks = *pool_->Reserve((spec.tokens.size() + kBlock - 1) / kBlock);
    spec.sampling.temperature = 0;
    spec.max_tokens = max_tokens;
    spec.sink = sink;
    return sink;
  }
  std::shared_ptr<RecordingSink> Submit(const std::string& id, std::vector<int32_t> tokens,
                                        uint32_t max_tokens) {
    SequenceSpec spec;
    auto sink = MakeSpec(spec, id, std::move(tokens), max_tokens);
    const absl::Status s = engine_->Submit(std::move(spec));
    EXPECT_TRUE(s.ok()) << s;
    return sink;
  }
  static std::vector<int32_t> Prompt(size_t n, int32_t from = 1) {
    std::vector<int32_t> out(n);
    for (size_t i = 0; i < n; ++i) out[i] = from + static_cast<int32_t>(i);
    return out;
  }
  std::string Metrics() { return metrics_.Render(); }

  MetricRegistry metrics_;
  std::function<void()> on_short_;  // Engine::Options
  std::shared_ptr<Controls> controls_ = std::make_shared<Controls>();
  std::unique_ptr<BlockPool> pool_;
  std::unique_ptr<Engine> engine_;
};

}  // namespace tidepool
