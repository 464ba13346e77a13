#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/model/strings/marked_text.h"

namespace tidepool::jinja {

// Text: a string that knows which of its bytes stem from the request ("data") and which from the template or
// the server ("trusted"). Every string that a template sees is one, so provenance survives whatever the
// template does with it. There is no conversion from std::string: whoever makes a Text says where it comes
// from.
class Text {
 public:
  Text() = default;
  static Text Trusted(std::string bytes) {
    Text text;
    text.bytes_ = std::move(bytes);
    return text;
  }
  static Text Data(std::string bytes) {
    Text text;
    text.bytes_ = std::move(bytes);
    text.MarkAll();
    return text;
  }
  // Data as a whole if `data`: for operations that do not follow single bytes.
  static Text Of(std::string bytes, bool data) {
    return data ? Data(std::move(bytes)) : Trusted(std::move(bytes));
  }

  const std::string& str() const { return bytes_; }
  size_t size() const { return bytes_.size(); }
  bool empty() const { return bytes_.empty(); }
  bool has_data() const { return first_.end != 0; }
  // Memory that it takes, for the budget.
  size_t cost() const { return bytes_.size() + more_.size() * sizeof(ByteRange); }

  void AppendTrusted(std::string_view bytes) { bytes_.append(bytes); }
  void AppendData(std::string_view bytes) {
    const size_t begin = bytes_.size();
    bytes_.append(bytes);
    Mark(begin, bytes_.size());
  }
  void Append(const Text& other) { Append(other, 0, other.size()); }
  // other[begin, end), bytes.
  void Append(const Text& other, size_t begin, size_t end);
  void MarkAll() {
    first_ = {0, bytes_.size()};
    more_.clear();
  }
  void Reserve(size_t bytes) { bytes_.reserve(bytes); }

  // [begin, end), bytes.
  Text Substr(size_t begin, size_t end) const {
    Text part;
    part.Append(*this, begin, end);
    return part;
  }
  // The part that `view`, a view into str(), shows.
  Text Substr(std::string_view view) const {
    const auto begin = static_cast<size_t>(view.data() - bytes_.data());
    return Substr(begin, begin + view.size());
  }

  MarkedText Release() &&;

 private:
  // [begin, end) is data; begin is not before the last range's end.
  void Mark(size_t begin, size_t end) {
    if (begin == end) return;
    ByteRange& last = more_.empty() ? first_ : more_.back();
    if (first_.end == 0) {
      first_ = {begin, end};
    } else if (last.end == begin) {
      last.end = end;
    } else {
      more_.push_back({begin, end});
    }
  }

  std::string bytes_;
  // The ranges of data: sorted, disjoint, none touches the next, none empty. Most texts have none or one, so
  // the first ({0, 0}: none) needs no memory of its own.
  ByteRange first_;
  std::vector<ByteRange> more_;
};

// The first (last) occurrence of `needle` from byte `from` on, or npos; in linear time, which std::string's
// own do not promise.
size_t FindBytes(std::string_view text, std::string_view needle, size_t from = 0);
size_t RFindBytes(std::string_view text, std::string_view needle);

}  // namespace tidepool::jinja
