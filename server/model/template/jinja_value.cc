#include "server/model/template/jinja_value.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <ctime>
#include <sstream>
#include <tuple>

#include "absl/numeric/int128.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/model/strings/unicode.h"
#include "server/model/strings/utf8.h"

namespace tidepool::jinja {

namespace {

absl::string_view Sv(std::string_view s) { return {s.data(), s.size()}; }

}  // namespace

void CheckDepth(int depth) {
  if (depth > kNestingMax) {
    throw Failure{Failure::kLimit, "RecursionError",
                  absl::StrCat("values nested more than ", kNestingMax, " deep")};
  }
}

void Fail(std::string type, std::string message) {
  throw Failure{Failure::kTemplate, std::move(type), std::move(message)};
}

void TypeError(std::string message) { Fail("TypeError", std::move(message)); }

namespace {

// A look at the clock costs as much as some steps; so many take well under a millisecond.
constexpr uint64_t kStepsPerCheck = 4096;

int64_t ThreadCpuNs() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

}  // namespace

Budget::Budget(const Limits& limits)
    : limits_(limits),
      steps_left_(limits.steps_max - std::min(limits.steps_max, kStepsPerCheck)),
      steps_to_check_(std::min(limits.steps_max, kStepsPerCheck)),
      alloc_left_(limits.alloc_bytes_max),
      time_end_ns_(limits.time_max == absl::InfiniteDuration()
                       ? INT64_MAX
                       : ThreadCpuNs() + absl::ToInt64Nanoseconds(limits.time_max)) {}

void Budget::Check(uint64_t n) {
  const uint64_t left = steps_left_ + steps_to_check_;
  if (n > left) {
    throw Failure{Failure::kLimit, "LimitError", absl::StrCat("more than ", limits_.steps_max, " steps")};
  }
  if (ThreadCpuNs() > time_end_ns_) {
    throw Failure{Failure::kLimit, "LimitError",
                  absl::StrCat("more than ", absl::FormatDuration(limits_.time_max), " of processor time")};
  }
  steps_to_check_ = std::min(left - n, kStepsPerCheck);
  steps_left_ = left - n - steps_to_check_;
}

void Budget::Allocate(uint64_t bytes) {
  if (bytes > limits_.single_bytes_max) {
    throw Failure{Failure::kLimit, "LimitError",
                  absl::StrCat("a value of more than ", limits_.single_bytes_max, " bytes")};
  }
  if (bytes > alloc_left_) {
    throw Failure{Failure::kLimit, "LimitError",
                  absl::StrCat("more than ", limits_.alloc_bytes_max, " bytes of values")};
  }
  alloc_left_ -= bytes;
}

Value Value::MakeUndefined(std::string message, std::string type) {
  Value value;
  value.v_ = std::make_shared<const UndefinedInfo>(UndefinedInfo{std::move(type), std::move(message)});
  return value;
}

int Value::depth() const {
  if (is_seq()) return seq().depth;
  if (is_dict()) return dict().depth;
  if (is_loop()) return loop().nesting;
  if (is_callable()) return callable().depth;
  return 0;
}

Value Value::MakeSeq(SeqKind kind, std::vector<Value> items) {
  auto seq = std::make_shared<Seq>();
  seq->kind = kind;
  for (const Value& item : items) seq->depth = std::max(seq->depth, item.depth() + 1);
  CheckDepth(seq->depth);
  seq->items = std::move(items);
  return Value(std::move(seq));
}

Value Value::MakeDict(Dict dict) {
  CheckDepth(dict.depth);
  return Value(std::make_shared<const Dict>(std::move(dict)));
}

Value Value::FromJson(const nlohmann::ordered_json& json, bool data, int depth) {
  CheckDepth(depth);
  using Type = nlohmann::ordered_json::value_t;
  const auto text = [&](const std::string& s) {
    return Text::Of(utf8::IsValid(s) ? s : utf8::Sanitize(s), data);
  };
  switch (json.type()) {
    case Type::boolean:
      return Value(json.get<bool>()).MarkedIf(data);
    case Type::number_integer:
      return Value(json.get<int64_t>()).MarkedIf(data);
    case Type::number_unsigned: {
      const uint64_t u = json.get<uint64_t>();
      if (u > static_cast<uint64_t>(INT64_MAX)) return Value(static_cast<double>(u)).MarkedIf(data);
      return Value(static_cast<int64_t>(u)).MarkedIf(data);
    }
    case Type::number_float:
      return Value(json.get<double>()).MarkedIf(data);
    case Type::string:
      return Value(text(json.get_ref<const std::string&>()));
    case Type::array: {
      std::vector<Value> items;
      items.reserve(json.size());
      for (const auto& item : json) items.push_back(FromJson(item, data, depth + 1));
      return MakeList(std::move(items)).MarkedIf(data);
    }
    case Type::object: {
      Dict dict;
      for (const auto& [key, item] : json.items()) dict.Set(text(key), FromJson(item, data, depth + 1));
      return MakeDict(std::move(dict)).MarkedIf(data);
    }
    default:
      return Value().MarkedIf(data);
  }
}

void Value::RaiseUndefined() const { Fail(undefined().type, undefined().message); }

bool Value::Truthy() const {
  if (is_undefined() || is_none()) return false;
  if (is_bool()) return as_bool();
  if (is_int()) return as_int() != 0;
  if (is_float()) return as_double() != 0;
  if (is_string()) return !str().empty();
  if (is_seq()) return seq().kind == SeqKind::kGenerator || !seq().items.empty();
  if (is_dict()) return !dict().entries.empty();
  return true;
}

const char* Value::TypeName() const {
  if (is_undefined()) return "Undefined";
  if (is_none()) return "NoneType";
  if (is_bool()) return "bool";
  if (is_int()) return "int";
  if (is_float()) return "float";
  if (is_string()) return "str";
  if (is_dict()) return "dict";
  if (is_namespace()) return "Namespace";
  if (is_loop()) return "LoopContext";
  if (is_callable()) return "function";
  switch (seq().kind) {
    case SeqKind::kList:
      return "list";
    case SeqKind::kTuple:
      return "tuple";
    case SeqKind::kRange:
      return "range";
    case SeqKind::kGenerator:
      return "generator";
    case SeqKind::kDictItems:
      return "dict_items";
    case SeqKind::kDictKeys:
      return "dict_keys";
    case SeqKind::kDictValues:
      return "dict_values";
  }
  return "object";
}

namespace {

// Appends what tells `key` from every other key that is not equal to it. Values that Python compares equal
// (1, 1.0, True) give the same.
void HashKey(const Value& key, std::string& out, Budget& budget) {
  budget.Step();
  const auto pointer = [&](const void* p) { absl::StrAppend(&out, "@", reinterpret_cast<uintptr_t>(p)); };
  if (key.is_string()) {
    budget.Read(key.str().size());
    absl::StrAppend(&out, "s", key.str().size(), ":", key.str());
  } else if (key.is_none() || key.is_undefined()) {
    out += key.is_none() ? 'N' : 'U';
  } else if (key.is_integral()) {
    absl::StrAppend(&out, "i", key.as_int());
  } else if (key.is_float()) {
    const double d = key.as_double();
    if (d == std::floor(d) && std::fabs(d) < 9e18) {
      absl::StrAppend(&out, "i", static_cast<int64_t>(d));
    } else {
      absl::StrAppend(&out, "f", ReprFloat(d));
    }
  } else if (key.is_dict() || key.is_seq(SeqKind::kList)) {
    TypeError(absl::StrCat("unhashable type: '", key.TypeName(), "'"));
  } else if (key.is_seq() && key.seq().kind != SeqKind::kGenerator) {
    absl::StrAppend(&out, "(", static_cast<int>(key.seq().kind), " ");
    for (const Value& item : key.seq().items) HashKey(item, out, budget);
    out += ')';
  } else if (key.is_seq()) {
    pointer(&key.seq());
  } else if (key.is_namespace()) {
    pointer(key.ns().members.get());
  } else if (key.is_callable()) {
    pointer(&key.callable());
  } else {
    pointer(&key.loop());
  }
}

}  // namespace

const Value* Dict::Find(std::string_view key) const {
  const auto it = index.find(Sv(key));
  return it == index.end() ? nullptr : &entries[it->second].second;
}

const Value* Dict::Find(const Value& key, Budget& budget) const {
  if (key.is_string()) {
    budget.Read(key.str().size());
    return Find(std::string_view(key.str()));
  }
  std::string hash;
  HashKey(key, hash, budget);
  const auto it = others.find(hash);
  return it == others.end() ? nullptr : &entries[it->second].second;
}

bool Dict::Set(Text key, Value value) {
  depth = std::max(depth, value.depth() + 1);
  const auto [it, added] = index.try_emplace(key.str(), entries.size());
  if (added) {
    entries.emplace_back(std::move(key), std::move(value));
  } else {
    entries[it->second].second = std::move(value);
  }
  return added;
}

void Dict::Set(Value key, Value value, Budget& budget) {
  if (key.is_string()) {
    const size_t bytes = key.str().size();
    budget.Read(bytes);
    if (Set(key.text(), std::move(value))) budget.Allocate(2 * bytes);
    return;
  }
  std::string hash;
  HashKey(key, hash, budget);
  depth = std::max({depth, value.depth() + 1, key.depth() + 1});
  const auto [it, added] = others.try_emplace(std::move(hash), entries.size());
  if (added) {
    entries.emplace_back(std::move(key), std::move(value));
  } else {
    entries[it->second].second = std::move(value);
  }
}

const Value* Args::Keyword(std::string_view name) const {
  for (const KeywordArg& arg : keyword) {
    if (arg.name == name) return &arg.value;
  }
  return nullptr;
}

const Value* Args::Get(size_t i, std::string_view name) const {
  return i < positional.size() ? &positional[i] : Keyword(name);
}

// Python's repr of a float: the shortest digits that read back, exponents outside 1e-4 .. 1e16.
std::string ReprFloat(double d) {
  if (std::isnan(d)) return "nan";
  if (std::isinf(d)) return d < 0 ? "-inf" : "inf";
  if (d == 0) return std::signbit(d) ? "-0.0" : "0.0";
  char buffer[64];
  const auto end = std::to_chars(buffer, buffer + sizeof(buffer), d, std::chars_format::scientific).ptr;
  const std::string text(buffer, end);
  const size_t e = text.find('e');
  const int exponent = std::atoi(text.c_str() + e + 1);
  if (exponent < -4 || exponent >= 16) {
    return absl::StrCat(text.substr(0, e), exponent < 0 ? "e-" : "e+",
                        absl::StrFormat("%02d", std::abs(exponent)));
  }
  const auto fixed_end = std::to_chars(buffer, buffer + sizeof(buffer), d, std::chars_format::fixed).ptr;
  std::string fixed(buffer, fixed_end);
  if (fixed.find('.') == fixed.npos) fixed += ".0";
  return fixed;
}

namespace {

// Writers append to one text; the budget sees the growth in steps. `data` of what is written: the value is
// the request's, or one that holds it is.
struct Writer {
  Budget& budget;
  Text out;

  void Append(std::string_view text, bool data) {
    budget.Allocate(text.size());
    if (data) {
      out.AppendData(text);
    } else {
      out.AppendTrusted(text);
    }
  }

  void ReprString(const std::string& s, bool data) {
    const bool doubles = s.find('\'') != s.npos && s.find('"') == s.npos;
    const char quote = doubles ? '"' : '\'';
    std::string text(1, quote);
    for (size_t pos = 0; pos < s.size();) {
      const size_t begin = pos;
      const uint32_t cp = utf8::Next(s, pos);
      if (cp == '\\' || cp == static_cast<uint32_t>(quote)) {
        text.push_back('\\');
        text.push_back(static_cast<char>(cp));
      } else if (cp == '\n') {
        text += "\\n";
      } else if (cp == '\r') {
        text += "\\r";
      } else if (cp == '\t') {
        text += "\\t";
      } else if (unicode::IsPrintable(cp)) {
        text.append(s, begin, pos - begin);
      } else if (cp < 0x100) {
        text += absl::StrFormat("\\x%02x", cp);
      } else if (cp < 0x10000) {
        text += absl::StrFormat("\\u%04x", cp);
      } else {
        text += absl::StrFormat("\\U%08x", cp);
      }
    }
    text.push_back(quote);
    Append(text, data);
  }

  void ReprItems(const std::vector<Value>& items, int depth, bool data) {
    bool first = true;
    for (const Value& item : items) {
      if (!first) Append(", ", data);
      first = false;
      Repr(item, depth + 1, data);
    }
  }

  void ReprDict(const Dict& dict, int depth, bool data) {
    Append("{", data);
    bool first = true;
    for (const auto& [key, value] : dict.entries) {
      if (!first) Append(", ", data);
      first = false;
      Repr(key, depth + 1, data);
      Append(": ", data);
      Repr(value, depth + 1, data);
    }
    Append("}", data);
  }

  void Repr(const Value& v, int depth, bool data) {
    data = data || v.is_data();
    budget.Step();
    CheckDepth(depth);  // a namespace may hold itself
    if (v.is_undefined()) {
      Append("Undefined", data);
    } else if (v.is_none()) {
      Append("None", data);
    } else if (v.is_bool()) {
      Append(v.as_bool() ? "True" : "False", data);
    } else if (v.is_int()) {
      Append(std::to_string(v.as_int()), data);
    } else if (v.is_float()) {
      Append(ReprFloat(v.as_double()), data);
    } else if (v.is_string()) {
      ReprString(v.str(), data);
    } else if (v.is_dict()) {
      ReprDict(v.dict(), depth, data);
    } else if (v.is_namespace()) {
      Append("<Namespace ", data);
      ReprDict(*v.ns().members, depth, data);
      Append(">", data);
    } else if (v.is_seq()) {
      ReprSeq(v, depth, data);
    } else if (v.is_loop()) {
      Append(absl::StrCat("<LoopContext ", v.loop().at + 1, "/", v.loop().items.size(), ">"), data);
    } else {
      Append(absl::StrCat("<function ", v.callable().name, ">"), data);
    }
  }

  void ReprSeq(const Value& v, int depth, bool data) {
    const Seq& seq = v.seq();
    switch (seq.kind) {
      case SeqKind::kList:
        Append("[", data);
        ReprItems(seq.items, depth, data);
        Append("]", data);
        return;
      case SeqKind::kTuple:
        Append("(", data);
        ReprItems(seq.items, depth, data);
        Append(seq.items.size() == 1 ? ",)" : ")", data);
        return;
      case SeqKind::kGenerator:
        Append("<generator object>", data);
        return;
      case SeqKind::kRange: {
        const auto n = static_cast<int64_t>(seq.items.size());
        // Python's integers have no end, so the stop of a slice may lie outside of 64 bits.
        absl::int128 start = n > 0 ? seq.items[0].as_int() : 0;
        absl::int128 step = n > 1 ? seq.items[1].as_int() - start : 1;
        absl::int128 stop = start + n * step;
        if (seq.range) std::tie(start, stop, step) = std::tuple_cat(*seq.range);
        std::ostringstream text;
        text << "range(" << start << ", " << stop;
        if (step != 1) text << ", " << step;
        text << ")";
        Append(text.str(), data);
        return;
      }
      case SeqKind::kDictItems:
      case SeqKind::kDictKeys:
      case SeqKind::kDictValues:
        Append(absl::StrCat(v.TypeName(), "(["), data);
        ReprItems(seq.items, depth, data);
        Append("])", data);
        return;
    }
  }

  // --- JSON ---
  void JsonString(const std::string& s, bool ascii, bool data) {
    std::string text = "\"";
    for (size_t pos = 0; pos < s.size();) {
      const size_t begin = pos;
      const uint32_t cp = utf8::Next(s, pos);
      switch (cp) {
        case '"':
          text += "\\\"";
          break;
        case '\\':
          text += "\\\\";
          break;
        case '\n':
          text += "\\n";
          break;
        case '\r':
          text += "\\r";
          break;
        case '\t':
          text += "\\t";
          break;
        case '\f':
          text += "\\f";
          break;
        case '\b':
          text += "\\b";
          break;
        default:
          if (cp < 0x20 || (ascii && cp > 0x7E && cp < 0x10000)) {
            text += absl::StrFormat("\\u%04x", cp);
          } else if (ascii && cp >= 0x10000) {
            text += absl::StrFormat("\\u%04x\\u%04x", 0xD800 + ((cp - 0x10000) >> 10), 0xDC00 + (cp & 0x3FF));
          } else {
            text.append(s, begin, pos - begin);
          }
      }
    }
    text.push_back('"');
    Append(text, data);
  }

  std::string JsonScalar(const Value& v) {
    if (v.is_none()) return "null";
    if (v.is_bool()) return v.as_bool() ? "true" : "false";
    if (v.is_int()) return std::to_string(v.as_int());
    const double d = v.as_double();
    if (std::isnan(d)) return "NaN";
    if (std::isinf(d)) return d < 0 ? "-Infinity" : "Infinity";
    return ReprFloat(d);
  }

  void NewLine(const JsonStyle& style, int level, bool data) {
    if (!style.pretty) return;
    Append("\n", data);
    for (int i = 0; i < level; ++i) Append(style.indent, data);
  }

  void Json(const Value& v, const JsonStyle& style, int level, bool data) {
    data = data || v.is_data();
    budget.Step();
    if (v.is_string()) {
      JsonString(v.str(), style.ensure_ascii, data);
    } else if (v.is_none() || v.is_number()) {
      Append(JsonScalar(v), data);
    } else if (v.is_seq(SeqKind::kList) || v.is_seq(SeqKind::kTuple)) {
      if (v.seq().items.empty()) return Append("[]", data);
      Append("[", data);
      bool first = true;
      for (const Value& item : v.seq().items) {
        if (!first) Append(style.item_separator, data);
        first = false;
        NewLine(style, level + 1, data);
        Json(item, style, level + 1, data);
      }
      NewLine(style, level, data);
      Append("]", data);
    } else if (v.is_dict()) {
      JsonDict(v.dict(), style, level, data);
    } else {
      TypeError(absl::StrCat("Object of type ", v.TypeName(), " is not JSON serializable"));
    }
  }

  void JsonDict(const Dict& dict, const JsonStyle& style, int level, bool data) {
    if (dict.entries.empty()) return Append("{}", data);
    std::vector<const std::pair<Value, Value>*> entries;
    for (const auto& entry : dict.entries) entries.push_back(&entry);
    if (style.sort_keys) {
      std::stable_sort(entries.begin(), entries.end(), [&](const auto* a, const auto* b) {
        return Compare(a->first, b->first, "<", budget) < 0;
      });
    }
    Append("{", data);
    bool first = true;
    for (const auto* entry : entries) {
      if (!first) Append(style.item_separator, data);
      first = false;
      NewLine(style, level + 1, data);
      const Value& key = entry->first;
      if (key.is_string()) {
        JsonString(key.str(), style.ensure_ascii, data || key.is_data());
      } else if (key.is_none() || key.is_number()) {
        JsonString(JsonScalar(key), style.ensure_ascii, data || key.is_data());
      } else {
        TypeError(absl::StrCat("keys must be str, int, float, bool or None, not ", key.TypeName()));
      }
      Append(style.key_separator, data);
      Json(entry->second, style, level + 1, data);
    }
    NewLine(style, level, data);
    Append("}", data);
  }
};

}  // namespace

Text Repr(const Value& value, Budget& budget) {
  Writer writer{budget, {}};
  writer.Repr(value, 0, false);
  return std::move(writer.out);
}

Text ToStr(const Value& value, Budget& budget) {
  if (value.is_string()) return value.text();
  if (value.is_undefined()) {
    if (value.undefined().type == "SecurityError") value.RaiseUndefined();
    return {};
  }
  return Repr(value, budget);
}

Text ToJson(const Value& value, const JsonStyle& style, Budget& budget) {
  Writer writer{budget, {}};
  writer.Json(value, style, 0, false);
  return std::move(writer.out);
}

std::string EscapeHtml(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&#34;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out.push_back(c);
    }
  }
  return out;
}

bool Equal(const Value& a, const Value& b, Budget& budget) {
  budget.Step();
  if (a.is_undefined() || b.is_undefined()) return a.is_undefined() && b.is_undefined();
  if (a.is_none() || b.is_none()) return a.is_none() && b.is_none();
  if (a.is_number() && b.is_number()) {
    if (a.is_integral() && b.is_integral()) return a.as_int() == b.as_int();
    return a.as_double() == b.as_double();
  }
  if (a.is_string() || b.is_string()) {
    if (!a.is_string() || !b.is_string() || a.str().size() != b.str().size()) return false;
    budget.Read(a.str().size());
    return a.str() == b.str();
  }
  if (a.is_seq() && b.is_seq()) {
    if (&a.seq() == &b.seq()) return true;
    if (a.seq().kind != b.seq().kind || a.seq().kind == SeqKind::kGenerator) return false;
    const auto& x = a.seq().items;
    const auto& y = b.seq().items;
    if (x.size() != y.size()) return false;
    for (size_t i = 0; i < x.size(); ++i) {
      if (!Equal(x[i], y[i], budget)) return false;
    }
    return true;
  }
  if (a.is_dict() && b.is_dict()) {
    if (a.dict().entries.size() != b.dict().entries.size()) return false;
    for (const auto& [key, value] : a.dict().entries) {
      const Value* other = b.dict().Find(key, budget);
      if (other == nullptr || !Equal(value, *other, budget)) return false;
    }
    return true;
  }
  if (a.is_namespace() && b.is_namespace()) return a.ns().members == b.ns().members;
  if (a.is_callable() && b.is_callable()) return &a.callable() == &b.callable();
  if (a.is_loop() && b.is_loop()) return &a.loop() == &b.loop();
  return false;
}

int Compare(const Value& a, const Value& b, const char* op, Budget& budget) {
  budget.Step();
  a.Require();
  b.Require();
  if (a.is_number() && b.is_number()) {
    if (a.is_integral() && b.is_integral()) return a.as_int() < b.as_int() ? -1 : a.as_int() > b.as_int();
    return a.as_double() < b.as_double() ? -1 : a.as_double() > b.as_double();
  }
  // UTF-8 sorts by bytes as its characters do by code point.
  if (a.is_string() && b.is_string()) {
    budget.Read(std::min(a.str().size(), b.str().size()));
    return std::clamp(a.str().compare(b.str()), -1, 1);
  }
  if (a.is_seq() && b.is_seq() && a.seq().kind == b.seq().kind &&
      (a.seq().kind == SeqKind::kList || a.seq().kind == SeqKind::kTuple)) {
    const auto& x = a.seq().items;
    const auto& y = b.seq().items;
    for (size_t i = 0; i < std::min(x.size(), y.size()); ++i) {
      if (!Equal(x[i], y[i], budget)) return Compare(x[i], y[i], op, budget);
    }
    return x.size() < y.size() ? -1 : x.size() > y.size();
  }
  TypeError(absl::StrCat("'", op, "' not supported between instances of '", a.TypeName(), "' and '",
                         b.TypeName(), "'"));
}

std::vector<Value> Iterate(const Value& value, Budget& budget) {
  std::vector<Value> items;
  if (value.is_undefined()) {
    if (value.undefined().type == "SecurityError") value.RaiseUndefined();
    return items;
  }
  if (value.is_seq()) {
    Seq& seq = value.seq();
    if (seq.kind == SeqKind::kGenerator) {
      if (seq.consumed) return items;
      seq.consumed = true;
    }
    budget.Step(seq.items.size());
    budget.Allocate(seq.items.size() * sizeof(Value));
    return seq.items;
  }
  if (value.is_dict()) {
    budget.Step(value.dict().entries.size());
    budget.Allocate(value.dict().entries.size() * sizeof(Value));
    for (const auto& [key, v] : value.dict().entries) items.push_back(key);
    return items;
  }
  if (value.is_string()) {
    const std::string& s = value.str();
    const size_t n = utf8::Count(s);
    budget.Step(n);
    budget.Allocate(n * (kStringOverhead + sizeof(Value)));
    items.reserve(n);
    for (size_t pos = 0; pos < s.size();) {
      const size_t begin = pos;
      utf8::Next(s, pos);
      items.emplace_back(value.text().Substr(begin, pos));
    }
    return items;
  }
  TypeError(absl::StrCat("'", value.TypeName(), "' object is not iterable"));
}

int64_t Length(const Value& value) {
  if (value.is_undefined()) {
    if (value.undefined().type == "SecurityError") value.RaiseUndefined();
    return 0;
  }
  if (value.is_string()) return static_cast<int64_t>(utf8::Count(value.str()));
  if (value.is_dict()) return static_cast<int64_t>(value.dict().entries.size());
  if (value.is_loop()) return static_cast<int64_t>(value.loop().items.size());
  if (value.is_seq() && value.seq().kind != SeqKind::kGenerator) {
    return static_cast<int64_t>(value.seq().items.size());
  }
  TypeError(absl::StrCat("object of type '", value.TypeName(), "' has no len()"));
}

bool Contains(const Value& container, const Value& item, Budget& budget) {
  if (container.is_string()) {
    if (!item.is_string()) {
      TypeError(absl::StrCat("'in <string>' requires string as left operand, not ", item.TypeName()));
    }
    budget.Read(container.str().size());
    return FindBytes(container.str(), item.str()) != std::string::npos;
  }
  if (container.is_dict()) {
    if (item.is_dict() || item.is_seq(SeqKind::kList)) {
      TypeError(absl::StrCat("unhashable type: '", item.TypeName(), "'"));
    }
    return container.dict().Find(item, budget) != nullptr;
  }
  if (!container.is_seq() && !container.is_undefined()) {
    TypeError(absl::StrCat("argument of type '", container.TypeName(), "' is not iterable"));
  }
  if (container.is_seq() && container.seq().kind != SeqKind::kGenerator) {
    for (const Value& v : container.seq().items) {
      if (Equal(v, item, budget)) return true;
    }
    return false;
  }
  for (const Value& v : Iterate(container, budget)) {
    if (Equal(v, item, budget)) return true;
  }
  return false;
}

}  // namespace tidepool::jinja
