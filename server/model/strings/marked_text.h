#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace tidepool {

// ByteRange: [begin, end) of a text, in bytes.
struct ByteRange {
  size_t begin = 0, end = 0;

  bool operator==(const ByteRange&) const = default;
};

// MarkedText: a rendered chat template together with where its bytes come from. `data` are the ranges that
// stem from the request (message contents, tool definitions, template arguments) and not from the template
// or the tokenizer's own configuration: sorted, disjoint, none empty, all inside `text`. A special token that
// is spelled out there is a text about the token, never the token: see Tokenizer::EncodeOptions::data.
struct MarkedText {
  std::string text;
  std::vector<ByteRange> data;
};

}  // namespace tidepool
