#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "server/gateway/json.h"

namespace tidepool {

// Bytes of a prompt that stand for one step of its path: about half a KV block of 32 tokens, so that what two
// paths share is at most a block less than what their prompts share.
inline constexpr size_t kPathUnitBytes = 64;

// PromptPath: a prompt, as far as sharing goes: units()[i] stands for everything up to and with the i-th
// kPathUnitBytes. Two prompts share as many units as their paths have equal leading elements. Plain data.
struct PromptPath {
  std::vector<uint64_t> units;
  uint32_t decode_tokens = 0;  // as many as the answer may have; an estimate where the request does not say
};

// What a request's body will have the model read, in the order of the prompt: model, tools, then messages (or
// prompt, or instructions and input). Only bytes are looked at: nothing is rendered or tokenised.
PromptPath PathOf(std::string_view url, const OrderedJson& body);

}  // namespace tidepool
