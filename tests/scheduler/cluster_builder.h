#pragma once

#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/rng.h"
#include "scheduler/core.h"

namespace tidepool {

// Block i of the chain called `name`.
inline BlockKey ChainKey(std::string_view name, uint32_t i) {
  uint64_t h = 0;
  for (char c : name) h = Mix64(h ^ static_cast<uint8_t>(c));
  BlockKey key;
  for (size_t word = 0; word < 4; ++word) {
    const uint64_t v = Mix64(h + i + (uint64_t{word} << 32));
    std::memcpy(key.bytes.data() + 8 * word, &v, 8);
  }
  return key;
}

inline std::vector<BlockKey> ChainKeys(std::string_view name, uint32_t n) {
  std::vector<BlockKey> keys;
  for (uint32_t i = 0; i < n; ++i) keys.push_back(ChainKey(name, i));
  return keys;
}

inline const absl::Time kStart = absl::UnixEpoch() + absl::Hours(1);

inline ModelIdentity TestModel() {
  return {.name = "demo",
          .fingerprint = "f1",
          .layout = {.layers = 4, .kv_heads = 2, .head_dim = 64, .block_tokens = 32, .dtype = DType::kBF16},
          .max_model_len = 65536,
          .vocab_size = 1000};
}

inline WorkerReport TestReport(std::string id, Role role, uint64_t seq = 1) {
  WorkerReport r;
  r.address = {.worker_id = id, .boot_id = "boot-1", .grpc = id + ":1", .transport = "t-" + id};
  r.role = role;
  r.model = TestModel();
  r.seq = seq;
  r.snapshot = seq == 1;
  r.load.slots_total = r.load.slots_free = 10'000;
  return r;
}

inline WorkerReport& Holding(WorkerReport& r, std::string_view chain, uint32_t n, Tier tier = Tier::kHost,
                             uint32_t from = 0) {
  for (uint32_t i = from; i < n; ++i) r.events.push_back({ChainKey(chain, i), false, tier});
  return r;
}

inline PlaceRequest TestRequest(std::string id, uint32_t prompt_tokens, std::string_view chain = "x") {
  PlaceRequest r;
  r.request_id = std::move(id);
  r.keys = ChainKeys(chain, prompt_tokens / 32);
  r.prompt_tokens = prompt_tokens;
  r.max_tokens = 64;
  return r;
}

}  // namespace tidepool
