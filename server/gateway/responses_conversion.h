#pragma once

#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "server/gateway/errors.h"
#include "server/gateway/json.h"

namespace tidepool {

// What the codecs of /v1/responses and /v1/messages share. Both turn a request into the body of a chat
// completion, which openai_request then reads: one place knows what a tool, a schema or a limit is.

// Unimplemented "field: what": a field or value that we know and do not serve.
absl::Status UnsupportedField(std::string_view field, std::string_view what);
// The error of a status that UnsupportedField or FieldError made.
ApiError ConversionError(const absl::Status& status);

// A field that is not served. Passes where it asks for nothing: absent, null, "", [], {}, or `harmless`, the
// JSON text of a value that does the same (the API's default).
struct RefusedField {
  std::string_view field;
  std::string_view harmless = {};
  std::string_view instead = {};  // what to do; default "leave it out"
};
// `where`: the path of `object` with its dot, or "". Errors: UnsupportedField.
absl::Status RefuseFields(const OrderedJson& object, std::string_view where,
                          std::span<const RefusedField> fields);

// Copies every field that chat knows (sampling, what vLLM and llama.cpp add to it, and what is refused there)
// but those in `except`, which have a meaning of their own here; the chat's reader then checks them all.
void CopyShared(const OrderedJson& body, std::span<const std::string_view> except, OrderedJson& chat);

// FieldNames: the names that an error may not carry back as they are: chat's fields to those of the request
// as it came. Plain data.
class FieldNames {
 public:
  // `chat`, its elements and its members are called `own` from here on; the longest match counts.
  void Add(std::string chat, std::string own) { names_.emplace_back(std::move(chat), std::move(own)); }
  // The error with its field renamed, in `param` and where the message begins with it.
  ApiError Own(ApiError error) const;

 private:
  std::vector<std::pair<std::string, std::string>> names_;
};

}  // namespace tidepool
