#include "server/gateway/json.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "base/log.h"
#include "base/status.h"

namespace tidepool {
namespace {

// A stranger's key as a message quotes it: messages are kept, logged and sent back.
constexpr size_t kQuotedKeyBytesMax = 64;

std::string QuotedKey(std::string_view key) {
  size_t end = std::min(key.size(), kQuotedKeyBytesMax);
  while (end < key.size() && end > 0 && (key[end] & 0xC0) == 0x80) --end;  // whole characters
  return "'" + Printable(key.substr(0, end)) + (end < key.size() ? "...'" : "'");
}

// Builds the document from events and stops at the first thing that we refuse: nlohmann's own parser recurses
// nowhere, but its dump() and its destructor do, and duplicate keys would silently lose the first value.
class StrictBuilder {
 public:
  using number_integer_t = OrderedJson::number_integer_t;
  using number_unsigned_t = OrderedJson::number_unsigned_t;
  using number_float_t = OrderedJson::number_float_t;
  using string_t = OrderedJson::string_t;
  using binary_t = OrderedJson::binary_t;

  bool null() { return Add(nullptr); }
  bool boolean(bool v) { return Add(v); }
  bool number_integer(number_integer_t v) { return Add(v); }
  bool number_unsigned(number_unsigned_t v) { return Add(v); }
  bool number_float(number_float_t v, const string_t&) {
    if (!std::isfinite(v)) return Fail("a number is out of range");
    return Add(v);
  }
  bool string(string_t& v) { return Add(std::move(v)); }
  bool binary(binary_t&) { return Fail("binary values are not JSON"); }
  bool start_object(size_t) { return Push(OrderedJson::object()); }
  bool start_array(size_t) { return Push(OrderedJson::array()); }
  bool end_object() { return Pop(); }
  bool end_array() { return Pop(); }
  bool key(string_t& v) {
    if (!levels_.back().keys.insert(v).second) return Fail("the key " + QuotedKey(v) + " is given twice");
    levels_.back().key = std::move(v);
    return true;
  }
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception& e) {
    // nlohmann names a number beyond a double "out_of_range" and everything else "parse_error".
    return Fail((e.id == 406 ? "a number is out of range near byte " : "malformed JSON near byte ") +
                std::to_string(position));
  }

  OrderedJson root;
  std::string error;

 private:
  struct Level {
    OrderedJson value;
    std::string key;
    std::set<std::string> keys;
  };

  bool Fail(std::string why) {
    if (error.empty()) error = std::move(why);
    return false;
  }
  bool Push(OrderedJson container) {
    if (levels_.size() >= kJsonDepthMax) {
      return Fail("nested deeper than " + std::to_string(kJsonDepthMax) + " levels");
    }
    levels_.push_back({std::move(container), {}, {}});
    return true;
  }
  bool Pop() {
    OrderedJson value = std::move(levels_.back().value);
    levels_.pop_back();
    return Add(std::move(value));
  }
  bool Add(OrderedJson value) {
    if (levels_.empty()) {
      root = std::move(value);
    } else if (Level& top = levels_.back(); top.value.is_array()) {
      top.value.push_back(std::move(value));
    } else {
      // push_back: operator[] would look through all keys, which keys_ did already.
      top.value.get_ref<OrderedJson::object_t&>().emplace_back(std::move(top.key), std::move(value));
    }
    return true;
  }

  std::vector<Level> levels_;
};

}  // namespace

absl::StatusOr<OrderedJson> ParseJson(std::string_view text) {
  StrictBuilder builder;
  bool ok = false;
  // nlohmann skips a byte order mark; JSON that is sent has none (RFC 8259, 8.1).
  if (text.starts_with("\xef\xbb\xbf")) return absl::InvalidArgumentError("malformed JSON near byte 0");
  // nlohmann takes a NUL for the end of the text; in JSON it has no place at all.
  if (const size_t nul = text.find('\0'); nul != std::string_view::npos) {
    return absl::InvalidArgumentError("malformed JSON near byte " + std::to_string(nul));
  }
  try {
    ok = OrderedJson::sax_parse(text.begin(), text.end(), &builder);
  } catch (const std::exception&) {
    builder.error = "malformed JSON";
  }
  if (!ok) return absl::InvalidArgumentError(builder.error.empty() ? "malformed JSON" : builder.error);
  return std::move(builder.root);
}

std::string DumpJson(const OrderedJson& json) {
  return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

void AppendJsonString(std::string_view text, std::string& out) {
  static constexpr char kHex[] = "0123456789abcdef";
  out += '"';
  size_t from = 0;  // what follows goes out as it is
  for (size_t i = 0; i < text.size(); ++i) {
    const auto c = static_cast<unsigned char>(text[i]);
    if (c >= 0x20 && c != '"' && c != '\\') continue;
    out.append(text, from, i - from);
    from = i + 1;
    out += '\\';
    switch (c) {
      case '"':
      case '\\':
        out += static_cast<char>(c);
        break;
      case '\n':
        out += 'n';
        break;
      case '\r':
        out += 'r';
        break;
      case '\t':
        out += 't';
        break;
      default:
        out += "u00";
        out += kHex[c >> 4];
        out += kHex[c & 15];
    }
  }
  out.append(text, from);
  out += '"';
}

}  // namespace tidepool
