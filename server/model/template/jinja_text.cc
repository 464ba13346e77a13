#include "server/model/template/jinja_text.h"

#include <algorithm>
#include <cstring>

namespace tidepool::jinja {

void Text::Append(const Text& other, size_t begin, size_t end) {
  const size_t at = bytes_.size();
  // Where `other` is this very text, its ranges must not be read while they are added to.
  if (&other == this) {
    const Text copy = other;
    return Append(copy, begin, end);
  }
  bytes_.append(other.bytes_, begin, end - begin);
  const auto mark = [&](const ByteRange& range) {
    const size_t from = std::max(range.begin, begin), to = std::min(range.end, end);
    if (from < to) Mark(at + from - begin, at + to - begin);
  };
  mark(other.first_);
  auto range = std::partition_point(other.more_.begin(), other.more_.end(),
                                    [&](const ByteRange& r) { return r.end <= begin; });
  for (; range != other.more_.end() && range->begin < end; ++range) mark(*range);
}

size_t FindBytes(std::string_view text, std::string_view needle, size_t from) {
  if (from > text.size()) return text.npos;
  // glibc's memmem is the two-way algorithm.
  const void* at = memmem(text.data() + from, text.size() - from, needle.data(), needle.size());
  return at == nullptr ? text.npos : static_cast<size_t>(static_cast<const char*>(at) - text.data());
}

size_t RFindBytes(std::string_view text, std::string_view needle) {
  constexpr size_t kShort = 64;
  if (needle.size() <= kShort) return text.rfind(needle);
  const std::string backwards(text.rbegin(), text.rend()), wanted(needle.rbegin(), needle.rend());
  const size_t at = FindBytes(backwards, wanted);
  return at == text.npos ? at : text.size() - at - needle.size();
}

MarkedText Text::Release() && {
  MarkedText marked;
  marked.text = std::move(bytes_);
  if (has_data()) marked.data.push_back(first_);
  marked.data.insert(marked.data.end(), more_.begin(), more_.end());
  return marked;
}

}  // namespace tidepool::jinja
