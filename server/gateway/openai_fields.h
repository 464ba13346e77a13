#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "server/gateway/errors.h"
#include "server/gateway/json.h"

namespace tidepool {

// What becomes of a field of OpenAI's requests, or of vLLM's, SGLang's or llama.cpp's additions to them.
enum class FieldUse : uint8_t {
  kServed,
  kTaken,    // a hint, or for the client's own books: checked, where it has a form, and dropped
  kRefused,  // 400, unless its value asks for nothing
};

enum class Endpoint : uint8_t { kChat = 1, kText = 2, kBoth = 3 };

struct KnownField {
  std::string_view name;
  Endpoint endpoint;  // where it has a meaning; elsewhere it is refused
  FieldUse use;
  // Of a refused one: the value, as JSON, that asks for nothing, beside null, "", [], {} and, where it is
  // false, every way to say no.
  std::string_view harmless = {};
  std::string_view instead = "leave it out";  // for the error
};

// Every field that we know, sorted by use.
std::span<const KnownField> KnownFields();

// The first field of `body` that asks for what we do not serve: 400, naming it. Fields that nobody knows are
// ignored and logged, by name, at level debug.
std::optional<ApiError> CheckFields(const OrderedJson& body, Endpoint endpoint);

}  // namespace tidepool
