// The filters, tests, functions and methods that chat templates use, each as Jinja2 3.1 and Python 3 have it.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/model/text/jinja_interpreter.h"
#include "server/model/text/unicode.h"
#include "server/model/text/utf8.h"

namespace tidepool::jinja {

namespace {

// The sandbox's MAX_RANGE.
constexpr int64_t kRangeMax = 100'000;

Value MakeFn(std::string name, std::function<Value(Interpreter&, Args&)> fn) {
  auto callable = std::make_shared<Callable>();
  callable->name = std::move(name);
  callable->call = std::move(fn);
  return Value(std::shared_ptr<const Callable>(std::move(callable)));
}

int64_t Int(const Value& value, const char* what) {
  value.Require();
  if (!value.is_integral())
    TypeError(absl::StrCat(what, " must be an integer, not '", value.TypeName(), "'"));
  return value.as_int();
}

int64_t IntOr(const Value* value, const char* what, int64_t fallback) {
  return value == nullptr || value->is_none() ? fallback : Int(*value, what);
}

bool BoolOr(const Value* value, bool fallback) { return value == nullptr ? fallback : value->Truthy(); }

const std::string& StrArg(const Value& value, const char* what) {
  value.Require();
  if (!value.is_string()) TypeError(absl::StrCat(what, " must be str, not ", value.TypeName()));
  return value.str();
}

Value Generator(Interpreter& in, std::vector<Value> items) {
  in.budget().Allocate(items.size() * sizeof(Value));
  return Value::MakeSeq(SeqKind::kGenerator, std::move(items));
}

Value ListOf(Interpreter& in, std::vector<Value> items) {
  in.budget().Allocate(items.size() * sizeof(Value));
  return Value::MakeList(std::move(items));
}

Value Pair(Value a, Value b) { return Value::MakeSeq(SeqKind::kTuple, {std::move(a), std::move(b)}); }

// --- text helpers ---

std::vector<Value> SplitSpace(std::string_view text, int64_t max) {
  std::vector<Value> parts;
  while (true) {
    text = unicode::Strip(text, true, false);
    if (text.empty()) return parts;
    if (max >= 0 && static_cast<int64_t>(parts.size()) >= max) {
      parts.emplace_back(std::string(text));
      return parts;
    }
    size_t end = 0;
    while (end < text.size()) {
      size_t next = end;
      if (unicode::IsSpace(utf8::Next(text, next))) break;
      end = next;
    }
    parts.emplace_back(std::string(text.substr(0, end)));
    text.remove_prefix(end);
  }
}

std::vector<Value> SplitBy(std::string_view text, std::string_view separator, int64_t max) {
  std::vector<Value> parts;
  while (max < 0 || static_cast<int64_t>(parts.size()) < max) {
    const size_t at = text.find(separator);
    if (at == text.npos) break;
    parts.emplace_back(std::string(text.substr(0, at)));
    text.remove_prefix(at + separator.size());
  }
  parts.emplace_back(std::string(text));
  return parts;
}

std::vector<Value> RSplitBy(std::string_view text, std::string_view separator, int64_t max) {
  std::vector<Value> parts;
  while (max < 0 || static_cast<int64_t>(parts.size()) < max) {
    const size_t at = text.rfind(separator);
    if (at == text.npos) break;
    parts.emplace_back(std::string(text.substr(at + separator.size())));
    text = text.substr(0, at);
  }
  parts.emplace_back(std::string(text));
  std::reverse(parts.begin(), parts.end());
  return parts;
}

std::vector<Value> RSplitSpace(std::string_view text, int64_t max) {
  std::vector<Value> parts;
  while (true) {
    text = unicode::Strip(text, false, true);
    if (text.empty()) break;
    if (max >= 0 && static_cast<int64_t>(parts.size()) >= max) {
      parts.emplace_back(std::string(text));
      break;
    }
    const std::vector<Value> words = SplitSpace(text, -1);
    const std::string last = words.back().str();
    parts.emplace_back(last);
    text.remove_suffix(last.size());
  }
  std::reverse(parts.begin(), parts.end());
  return parts;
}

std::vector<std::string> SplitLines(std::string_view text, bool keep_ends) {
  std::vector<std::string> lines;
  size_t begin = 0;
  for (size_t pos = 0; pos < text.size();) {
    const size_t at = pos;
    const uint32_t cp = utf8::Next(text, pos);
    const bool end =
        (cp >= 10 && cp <= 13) || (cp >= 0x1C && cp <= 0x1E) || cp == 0x85 || cp == 0x2028 || cp == 0x2029;
    if (!end) continue;
    if (cp == '\r' && pos < text.size() && text[pos] == '\n') ++pos;
    lines.emplace_back(text.substr(begin, (keep_ends ? pos : at) - begin));
    begin = pos;
  }
  if (begin < text.size()) lines.emplace_back(text.substr(begin));
  return lines;
}

std::string ReplaceText(Interpreter& in, const std::string& text, const std::string& from,
                        const std::string& to, int64_t count) {
  std::string out;
  const auto add = [&](std::string_view piece) {
    out.append(piece);
    if (out.size() > in.options().output_bytes_max) in.budget().Allocate(out.size());
  };
  size_t done = 0;
  if (from.empty()) {
    while (count != 0 && done <= text.size()) {
      add(to);
      --count;
      if (done == text.size()) return out;
      size_t next = done;
      utf8::Next(text, next);
      add(std::string_view(text).substr(done, next - done));
      done = next;
    }
  } else {
    for (size_t at = text.find(from); at != text.npos && count != 0; at = text.find(from, done), --count) {
      add(std::string_view(text).substr(done, at - done));
      add(to);
      done = at + from.size();
    }
  }
  add(std::string_view(text).substr(done));
  return out;
}

template <typename Pred>
bool AllChars(const std::string& text, Pred pred) {
  if (text.empty()) return false;
  for (size_t pos = 0; pos < text.size();) {
    if (!pred(utf8::Next(text, pos))) return false;
  }
  return true;
}

// str.islower / str.isupper: at least one cased character and all of those in that case.
bool AllCased(const std::string& text, bool lower) {
  bool any = false;
  for (size_t pos = 0; pos < text.size();) {
    const uint32_t cp = utf8::Next(text, pos);
    if (lower ? unicode::IsUpper(cp) : unicode::IsLower(cp)) return false;
    any = any || (lower ? unicode::IsLower(cp) : unicode::IsUpper(cp));
  }
  return any;
}

std::string Join(Interpreter& in, const std::vector<Value>& items, std::string_view glue, bool strict) {
  std::string out;
  for (size_t i = 0; i < items.size(); ++i) {
    if (i > 0) out.append(glue);
    if (strict && !items[i].is_string()) {
      items[i].Require();
      TypeError(
          absl::StrCat("sequence item ", i, ": expected str instance, ", items[i].TypeName(), " found"));
    }
    out.append(in.Str(items[i]));
    if (out.size() > in.options().output_bytes_max) in.budget().Allocate(out.size());
  }
  return out;
}

// --- string methods ---

using StrMethod = Value (*)(Interpreter&, const std::string& self, Args& args);

template <bool kLeft, bool kRight>
Value StripMethod(Interpreter& in, const std::string& self, Args& args) {
  const Value* chars = args.Get(0, "chars");
  if (chars == nullptr || chars->is_none()) return in.Made(std::string(unicode::Strip(self, kLeft, kRight)));
  return in.Made(std::string(unicode::StripChars(self, StrArg(*chars, "strip arg"), kLeft, kRight)));
}

template <bool kRight>
Value SplitMethod(Interpreter& in, const std::string& self, Args& args) {
  const Value* separator = args.Get(0, "sep");
  const int64_t max = IntOr(args.Get(1, "maxsplit"), "maxsplit", -1);
  in.budget().Step(self.size() / 8 + 1);
  in.budget().Allocate(self.size() * 2);
  if (separator == nullptr || separator->is_none()) {
    return ListOf(in, kRight ? RSplitSpace(self, max) : SplitSpace(self, max));
  }
  const std::string& by = StrArg(*separator, "sep");
  if (by.empty()) Fail("ValueError", "empty separator");
  return ListOf(in, kRight ? RSplitBy(self, by, max) : SplitBy(self, by, max));
}

template <bool kEnd>
Value WithMethod(Interpreter&, const std::string& self, Args& args) {
  const Value* affix = args.Get(0, "prefix");
  if (affix == nullptr) TypeError("startswith/endswith takes at least 1 argument (0 given)");
  affix->Require();
  const auto test = [&](const Value& v) {
    return kEnd ? self.ends_with(StrArg(v, "tuple item")) : self.starts_with(StrArg(v, "tuple item"));
  };
  if (affix->is_seq(SeqKind::kTuple)) {
    for (const Value& v : affix->seq().items) {
      if (test(v)) return Value(true);
    }
    return Value(false);
  }
  if (!affix->is_string()) {
    TypeError(absl::StrCat(kEnd ? "endswith" : "startswith", " first arg must be str or a tuple of str, not ",
                           affix->TypeName()));
  }
  return Value(test(*affix));
}

const Value& Need(Args& args, size_t i, const char* method) {
  if (i >= args.positional.size()) {
    TypeError(
        absl::StrCat(method, " expected at least ", i + 1, " argument(s), got ", args.positional.size()));
  }
  return args.positional[i];
}

Value FindText(const std::string& self, const std::string& needle, bool last) {
  const size_t at = last ? self.rfind(needle) : self.find(needle);
  if (at == self.npos) return Value(int64_t{-1});
  return Value(static_cast<int64_t>(utf8::Count(std::string_view(self).substr(0, at))));
}

Value CountText(const std::string& self, const std::string& needle) {
  if (needle.empty()) return Value(static_cast<int64_t>(utf8::Count(self)) + 1);
  int64_t n = 0;
  for (size_t at = self.find(needle); at != self.npos; at = self.find(needle, at + needle.size())) ++n;
  return Value(n);
}

Value Partition(const std::string& self, const std::string& by, bool last) {
  if (by.empty()) Fail("ValueError", "empty separator");
  const size_t at = last ? self.rfind(by) : self.find(by);
  std::vector<Value> parts;
  if (at == self.npos) {
    parts = last ? std::vector<Value>{"", "", self} : std::vector<Value>{self, "", ""};
  } else {
    parts = {self.substr(0, at), by, self.substr(at + by.size())};
  }
  return Value::MakeSeq(SeqKind::kTuple, std::move(parts));
}

Value Pad(Interpreter& in, const std::string& self, Args& args, bool left, bool right, const char* fill) {
  const int64_t width = Int(Need(args, 0, "just"), "width");
  const std::string by = args.positional.size() > 1 ? StrArg(args.positional[1], "fill character") : fill;
  const auto size = static_cast<int64_t>(utf8::Count(self));
  if (width <= size) return Value(self);
  in.budget().Allocate(static_cast<uint64_t>(width - size) * by.size() + self.size());
  const int64_t total = width - size;
  const int64_t before = left && right ? total / 2 + (total & width & 1) : left ? total : 0;
  std::string out;
  for (int64_t i = 0; i < before; ++i) out += by;
  out += self;
  for (int64_t i = before; i < total; ++i) out += by;
  return Value(std::move(out));
}

const absl::flat_hash_map<std::string, StrMethod>& StrMethods() {
  static const auto* methods = new absl::flat_hash_map<std::string, StrMethod>{
      {"strip", StripMethod<true, true>},
      {"lstrip", StripMethod<true, false>},
      {"rstrip", StripMethod<false, true>},
      {"split", SplitMethod<false>},
      {"rsplit", SplitMethod<true>},
      {"splitlines",
       [](Interpreter& in, const std::string& self, Args& args) {
         std::vector<Value> lines;
         for (std::string& line : SplitLines(self, BoolOr(args.Get(0, "keepends"), false))) {
           lines.emplace_back(std::move(line));
         }
         in.budget().Allocate(self.size());
         return ListOf(in, std::move(lines));
       }},
      {"startswith", WithMethod<false>},
      {"endswith", WithMethod<true>},
      {"upper", [](Interpreter& in, const std::string& self, Args&) { return in.Made(unicode::Upper(self)); }},
      {"lower", [](Interpreter& in, const std::string& self, Args&) { return in.Made(unicode::Lower(self)); }},
      {"casefold", [](Interpreter& in, const std::string& self, Args&) { return in.Made(unicode::Lower(self)); }},
      {"title", [](Interpreter& in, const std::string& self, Args&) { return in.Made(unicode::Title(self)); }},
      {"capitalize",
       [](Interpreter& in, const std::string& self, Args&) { return in.Made(unicode::Capitalize(self)); }},
      {"replace",
       [](Interpreter& in, const std::string& self, Args& args) {
         const std::string& from = StrArg(Need(args, 0, "replace"), "replace() argument 1");
         const std::string& to = StrArg(Need(args, 1, "replace"), "replace() argument 2");
         const int64_t count = args.positional.size() > 2 ? Int(args.positional[2], "count") : -1;
         return in.Made(ReplaceText(in, self, from, to, count));
       }},
      {"find",
       [](Interpreter&, const std::string& self, Args& args) {
         return FindText(self, StrArg(Need(args, 0, "find"), "find() argument 1"), false);
       }},
      {"rfind",
       [](Interpreter&, const std::string& self, Args& args) {
         return FindText(self, StrArg(Need(args, 0, "rfind"), "rfind() argument 1"), true);
       }},
      {"index",
       [](Interpreter&, const std::string& self, Args& args) {
         Value at = FindText(self, StrArg(Need(args, 0, "index"), "index() argument 1"), false);
         if (at.as_int() < 0) Fail("ValueError", "substring not found");
         return at;
       }},
      {"count",
       [](Interpreter&, const std::string& self, Args& args) {
         return CountText(self, StrArg(Need(args, 0, "count"), "count() argument 1"));
       }},
      {"join",
       [](Interpreter& in, const std::string& self, Args& args) {
         return in.Made(Join(in, Iterate(Need(args, 0, "join"), in.budget()), self, true));
       }},
      {"removeprefix",
       [](Interpreter&, const std::string& self, Args& args) {
         const std::string& affix = StrArg(Need(args, 0, "removeprefix"), "removeprefix() argument");
         return Value(self.starts_with(affix) ? self.substr(affix.size()) : self);
       }},
      {"removesuffix",
       [](Interpreter&, const std::string& self, Args& args) {
         const std::string& affix = StrArg(Need(args, 0, "removesuffix"), "removesuffix() argument");
         return Value(self.ends_with(affix) ? self.substr(0, self.size() - affix.size()) : self);
       }},
      {"partition",
       [](Interpreter&, const std::string& self, Args& args) {
         return Partition(self, StrArg(Need(args, 0, "partition"), "partition() argument"), false);
       }},
      {"rpartition",
       [](Interpreter&, const std::string& self, Args& args) {
         return Partition(self, StrArg(Need(args, 0, "rpartition"), "rpartition() argument"), true);
       }},
      {"isdigit", [](Interpreter&, const std::string& self, Args&) { return Value(AllChars(self, unicode::IsNumeric)); }},
      {"isnumeric",
       [](Interpreter&, const std::string& self, Args&) { return Value(AllChars(self, unicode::IsNumeric)); }},
      {"isdecimal",
       [](Interpreter&, const std::string& self, Args&) { return Value(AllChars(self, unicode::IsNumeric)); }},
      {"isalpha", [](Interpreter&, const std::string& self, Args&) { return Value(AllChars(self, unicode::IsLetter)); }},
      {"isalnum",
       [](Interpreter&, const std::string& self, Args&) {
         return Value(AllChars(self, [](uint32_t c) { return unicode::IsLetter(c) || unicode::IsNumeric(c); }));
       }},
      {"isspace", [](Interpreter&, const std::string& self, Args&) { return Value(AllChars(self, unicode::IsSpace)); }},
      {"islower", [](Interpreter&, const std::string& self, Args&) { return Value(AllCased(self, true)); }},
      {"isupper", [](Interpreter&, const std::string& self, Args&) { return Value(AllCased(self, false)); }},
      {"ljust",
       [](Interpreter& in, const std::string& self, Args& args) { return Pad(in, self, args, false, true, " "); }},
      {"rjust",
       [](Interpreter& in, const std::string& self, Args& args) { return Pad(in, self, args, true, false, " "); }},
      {"center",
       [](Interpreter& in, const std::string& self, Args& args) { return Pad(in, self, args, true, true, " "); }},
      {"zfill",
       [](Interpreter& in, const std::string& self, Args& args) {
         const bool sign = self.starts_with('-') || self.starts_with('+');
         if (!sign) return Pad(in, self, args, true, false, "0");
         Args inner{{Value(Int(Need(args, 0, "zfill"), "width") - 1)}, {}};
         return Value(absl::StrCat(self.substr(0, 1), Pad(in, self.substr(1), inner, true, false, "0").str()));
       }},
  };
  return *methods;
}

// --- list, tuple and mapping methods ---

Value SeqMethod(const Value& object, const std::string& name) {
  return MakeFn(name, [object, name](Interpreter& in, Args& args) {
    const auto& items = object.seq().items;
    if (name == "copy") return ListOf(in, items);
    const Value& wanted = Need(args, 0, name.c_str());
    int64_t n = 0;
    for (size_t i = 0; i < items.size(); ++i) {
      if (!Equal(items[i], wanted, in.budget())) continue;
      if (name == "index") return Value(static_cast<int64_t>(i));
      ++n;
    }
    if (name == "index") Fail("ValueError", absl::StrCat(in.Str(wanted), " is not in list"));
    return Value(n);
  });
}

Value DictView(Interpreter& in, const Dict& dict, SeqKind kind) {
  std::vector<Value> items;
  in.budget().Step(dict.entries.size());
  in.budget().Allocate(dict.entries.size() * sizeof(Value) * 2);
  for (const auto& [key, value] : dict.entries) {
    items.push_back(kind == SeqKind::kDictItems  ? Pair(key, value)
                    : kind == SeqKind::kDictKeys ? key
                                                 : value);
  }
  return Value::MakeSeq(kind, std::move(items));
}

Value DictMethod(const Value& object, const std::string& name) {
  return MakeFn(name, [object, name](Interpreter& in, Args& args) {
    const Dict& dict = object.dict();
    if (name == "get") {
      if (!args.keyword.empty()) TypeError("dict.get() takes no keyword arguments");
      const Value& key = Need(args, 0, "get");
      if (key.is_dict() || key.is_seq(SeqKind::kList)) {
        TypeError(absl::StrCat("unhashable type: '", key.TypeName(), "'"));
      }
      if (const Value* value = dict.Find(key)) return *value;
      return args.positional.size() > 1 ? args.positional[1] : Value();
    }
    if (name == "copy") return object;  // a mapping never changes here
    return DictView(in, dict,
                    name == "items"  ? SeqKind::kDictItems
                    : name == "keys" ? SeqKind::kDictKeys
                                     : SeqKind::kDictValues);
  });
}

bool OneOf(std::string_view name, std::initializer_list<std::string_view> names) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// --- filters ---

// attribute="a.b.0": the value under a dotted path.
Value AttributePath(Interpreter& in, const Value& item, const Value& attribute, const Value* fallback) {
  if (attribute.is_integral()) return in.GetItem(item, attribute);
  Value value = item;
  std::string_view path = StrArg(attribute, "attribute");
  while (true) {
    const size_t dot = path.find('.');
    const std::string part(path.substr(0, dot));
    int64_t index = 0;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), index);
    const bool numeric = error == std::errc() && end == part.data() + part.size();
    value = in.GetItem(value, numeric ? Value(index) : Value(part));
    if (fallback != nullptr && value.is_undefined()) value = *fallback;
    if (dot == path.npos) return value;
    path.remove_prefix(dot + 1);
  }
}

// A sort key: strings compare without case unless asked.
Value SortKey(const Value& value, bool case_sensitive) {
  if (case_sensitive || !value.is_string()) return value;
  return Value(unicode::Lower(value.str()));
}

std::vector<Value> SortBy(Interpreter& in, std::vector<Value> items,
                          const std::vector<std::vector<Value>>& keys, bool reverse) {
  std::vector<size_t> order(items.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  // list.sort never compares a lone item, and two undefined or none ones as little as Python: by ==.
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    const auto& x = keys[reverse ? b : a];
    const auto& y = keys[reverse ? a : b];
    for (size_t k = 0; k < x.size(); ++k) {
      if (Equal(x[k], y[k], in.budget())) continue;
      return Compare(x[k], y[k], "<", in.budget()) < 0;
    }
    return false;
  });
  std::vector<Value> sorted;
  sorted.reserve(items.size());
  for (const size_t i : order) sorted.push_back(std::move(items[i]));
  return sorted;
}

Value Sort(Interpreter& in, const Value& input, Args& args) {
  const bool reverse = BoolOr(args.Get(0, "reverse"), false);
  const bool case_sensitive = BoolOr(args.Get(1, "case_sensitive"), false);
  const Value* attribute = args.Get(2, "attribute");
  std::vector<Value> items = Iterate(input, in.budget());
  std::vector<std::vector<Value>> keys;
  for (const Value& item : items) {
    std::vector<Value> key;
    if (attribute == nullptr || attribute->is_none()) {
      key.push_back(SortKey(item, case_sensitive));
    } else if (attribute->is_string()) {
      for (const Value& path : SplitBy(attribute->str(), ",", -1)) {
        key.push_back(SortKey(AttributePath(in, item, path, nullptr), case_sensitive));
      }
    } else {
      key.push_back(SortKey(AttributePath(in, item, *attribute, nullptr), case_sensitive));
    }
    keys.push_back(std::move(key));
  }
  return ListOf(in, SortBy(in, std::move(items), keys, reverse));
}

Value DictSort(Interpreter& in, const Value& input, Args& args) {
  input.Require();
  if (!input.is_dict()) {
    Fail("UndefinedError", absl::StrCat("'", input.TypeName(), " object' has no attribute 'items'"));
  }
  const bool case_sensitive = BoolOr(args.Get(0, "case_sensitive"), false);
  const Value* by = args.Get(1, "by");
  const std::string field = by == nullptr ? "key" : StrArg(*by, "by");
  if (field != "key" && field != "value")
    Fail("FilterArgumentError", "You can only sort by either 'key' or 'value'");
  std::vector<Value> items;
  std::vector<std::vector<Value>> keys;
  for (const auto& [key, value] : input.dict().entries) {
    items.push_back(Pair(key, value));
    keys.push_back({SortKey(field == "key" ? key : value, case_sensitive)});
  }
  return ListOf(in, SortBy(in, std::move(items), keys, BoolOr(args.Get(2, "reverse"), false)));
}

// select, reject, selectattr and rejectattr.
template <bool kKeep, bool kAttribute>
Value Select(Interpreter& in, const Value& input, Args& args) {
  if (!input.Truthy()) return Generator(in, {});  // Jinja2 looks first: none is as good as empty here
  size_t used = 0;
  Value attribute;
  if (kAttribute) {
    if (args.positional.empty()) Fail("FilterArgumentError", "Missing parameter for attribute name");
    attribute = args.positional[used++];
  }
  std::string test;
  if (used < args.positional.size()) test = StrArg(args.positional[used++], "test name");
  Args inner{{args.positional.begin() + static_cast<ptrdiff_t>(used), args.positional.end()}, args.keyword};
  std::vector<Value> kept;
  for (const Value& item : Iterate(input, in.budget())) {
    const Value subject = kAttribute ? AttributePath(in, item, attribute, nullptr) : item;
    const bool holds = test.empty() ? subject.Truthy() : in.ApplyTest(test, subject, inner);
    if (holds == kKeep) kept.push_back(item);
  }
  return Generator(in, std::move(kept));
}

Value Map(Interpreter& in, const Value& input, Args& args) {
  if (!input.Truthy()) return Generator(in, {});
  std::vector<Value> mapped;
  if (const Value* attribute = args.Keyword("attribute"); attribute != nullptr && args.positional.empty()) {
    const Value* fallback = args.Keyword("default");
    for (const Value& item : Iterate(input, in.budget())) {
      mapped.push_back(AttributePath(in, item, *attribute, fallback));
    }
    return Generator(in, std::move(mapped));
  }
  if (args.positional.empty()) Fail("FilterArgumentError", "map requires a filter argument");
  const std::string name = StrArg(args.positional[0], "filter name");
  for (const Value& item : Iterate(input, in.budget())) {
    Args inner{{args.positional.begin() + 1, args.positional.end()}, args.keyword};
    mapped.push_back(in.ApplyFilter(name, item, inner));
  }
  return Generator(in, std::move(mapped));
}

Value ToJsonFilter(Interpreter& in, const Value& input, Args& args) {
  JsonStyle style;
  style.ensure_ascii = BoolOr(args.Get(0, "ensure_ascii"), false);
  const Value* indent = args.Get(1, "indent");
  if (indent != nullptr && !indent->is_none()) {
    style.pretty = true;
    style.item_separator = ",";
    style.indent =
        indent->is_string()
            ? indent->str()
            : std::string(static_cast<size_t>(std::clamp<int64_t>(Int(*indent, "indent"), 0, 100)), ' ');
  }
  if (const Value* separators = args.Get(2, "separators"); separators != nullptr && !separators->is_none()) {
    const std::vector<Value> pair = Iterate(*separators, in.budget());
    if (pair.size() != 2) Fail("ValueError", "separators must be a pair");
    style.item_separator = StrArg(pair[0], "item separator");
    style.key_separator = StrArg(pair[1], "key separator");
  }
  style.sort_keys = BoolOr(args.Get(3, "sort_keys"), false);
  input.Require();  // json.dumps would name the type; the variable's name says more
  return Value(ToJson(input, style, in.budget()));
}

Value Indent(Interpreter& in, const Value& input, Args& args) {
  const Value* width = args.Get(0, "width");
  std::string indention = "    ";
  if (width != nullptr && width->is_string()) {
    indention = width->str();
  } else if (width != nullptr) {
    indention.assign(static_cast<size_t>(std::clamp<int64_t>(Int(*width, "width"), 0, 10'000)), ' ');
  }
  const bool first = BoolOr(args.Get(1, "first"), false), blank = BoolOr(args.Get(2, "blank"), false);
  const std::vector<std::string> lines = SplitLines(in.Str(input) + "\n", false);
  uint64_t total = 0;
  for (const std::string& line : lines) total += line.size() + indention.size() + 1;
  in.budget().Allocate(total);
  std::string out = first ? indention : "";
  for (size_t i = 0; i < lines.size(); ++i) {
    if (i > 0) out += "\n";
    if (i > 0 && (blank || !lines[i].empty())) out += indention;
    out += lines[i];
  }
  return Value(std::move(out));
}

std::optional<double> ParseFloat(std::string_view text) {
  const std::string trimmed(unicode::Strip(text, true, true));
  if (trimmed.empty()) return std::nullopt;
  char* end = nullptr;
  const double d = std::strtod(trimmed.c_str(), &end);
  if (end != trimmed.c_str() + trimmed.size() || trimmed.find_first_of("xXpP") != trimmed.npos)
    return std::nullopt;
  return d;
}

Value IntFilter(Interpreter&, const Value& input, Args& args) {
  input.Require();
  const Value* fallback = args.Get(0, "default");
  const Value otherwise = fallback == nullptr ? Value(int64_t{0}) : *fallback;
  const auto from_double = [&](double d) {
    return std::isfinite(d) && std::fabs(d) < 9.2e18 ? Value(static_cast<int64_t>(d)) : otherwise;
  };
  if (input.is_integral()) return Value(input.as_int());
  if (input.is_float()) return from_double(input.as_double());
  if (!input.is_string()) return otherwise;
  std::string_view text = unicode::Strip(input.str(), true, true);
  auto base = static_cast<int>(std::clamp<int64_t>(IntOr(args.Get(1, "base"), "base", 10), 2, 36));
  if (text.starts_with('+')) text.remove_prefix(1);
  if (base == 16 && (text.starts_with("0x") || text.starts_with("0X"))) text.remove_prefix(2);
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (!text.empty() && error == std::errc() && end == text.data() + text.size()) return Value(value);
  const auto d = ParseFloat(input.str());
  return d ? from_double(*d) : otherwise;
}

Value FloatFilter(Interpreter&, const Value& input, Args& args) {
  input.Require();
  const Value* fallback = args.Get(0, "default");
  if (input.is_number()) return Value(input.as_double());
  if (input.is_string()) {
    if (const auto d = ParseFloat(input.str())) return Value(*d);
  }
  return fallback == nullptr ? Value(0.0) : *fallback;
}

Value Round(Interpreter&, const Value& input, Args& args) {
  input.Require();
  if (!input.is_number())
    TypeError(absl::StrCat("type ", input.TypeName(), " doesn't define __round__ method"));
  const int64_t precision = std::clamp<int64_t>(IntOr(args.Get(0, "precision"), "precision", 0), -300, 300);
  const Value* method = args.Get(1, "method");
  const std::string how = method == nullptr ? "common" : StrArg(*method, "method");
  const double scale = std::pow(10.0, static_cast<double>(precision));
  const double d = input.as_double();
  if (how == "ceil") return Value(std::ceil(d * scale) / scale);
  if (how == "floor") return Value(std::floor(d * scale) / scale);
  if (how != "common") Fail("FilterArgumentError", "method must be common, ceil or floor");
  return Value(std::nearbyint(d * scale) / scale);  // Python rounds halves to even
}

Value TitleFilter(Interpreter& in, const Value& input, Args&) {
  const std::string text = in.Str(input);
  std::string out, word;
  const auto flush = [&] {
    out += unicode::Capitalize(word);
    word.clear();
  };
  for (size_t pos = 0; pos < text.size();) {
    const size_t begin = pos;
    const uint32_t cp = utf8::Next(text, pos);
    const bool boundary =
        unicode::IsSpace(cp) || (cp < 0x80 && std::strchr("-({[<", static_cast<int>(cp)) != nullptr);
    if (boundary) {
      flush();
      out.append(text, begin, pos - begin);
    } else {
      word.append(text, begin, pos - begin);
    }
  }
  flush();
  return in.Made(std::move(out));
}

Value Escape(Interpreter& in, const Value& input, Args&) {
  if (input.is_safe()) return input;
  std::string text = EscapeHtml(in.Str(input));
  in.budget().Allocate(text.size());
  return Value::Safe(std::move(text));
}

Value Unique(Interpreter& in, const Value& input, Args& args) {
  const bool case_sensitive = BoolOr(args.Get(0, "case_sensitive"), false);
  const Value* attribute = args.Get(1, "attribute");
  std::vector<Value> kept, seen;
  for (const Value& item : Iterate(input, in.budget())) {
    const bool by = attribute != nullptr && !attribute->is_none();
    const Value key = SortKey(by ? AttributePath(in, item, *attribute, nullptr) : item, case_sensitive);
    const bool known =
        std::any_of(seen.begin(), seen.end(), [&](const Value& v) { return Equal(v, key, in.budget()); });
    if (known) continue;
    seen.push_back(key);
    kept.push_back(item);
  }
  return Generator(in, std::move(kept));
}

template <bool kMax>
Value Extreme(Interpreter& in, const Value& input, Args& args) {
  const bool case_sensitive = BoolOr(args.Get(0, "case_sensitive"), false);
  const Value* attribute = args.Get(1, "attribute");
  std::optional<Value> best, best_key;
  for (const Value& item : Iterate(input, in.budget())) {
    const bool by = attribute != nullptr && !attribute->is_none();
    Value key = SortKey(by ? AttributePath(in, item, *attribute, nullptr) : item, case_sensitive);
    if (best && (kMax ? Compare(key, *best_key, ">", in.budget()) <= 0
                      : Compare(key, *best_key, "<", in.budget()) >= 0)) {
      continue;
    }
    best = item;
    best_key = std::move(key);
  }
  return best ? *best : Value::MakeUndefined("No aggregated item, sequence was empty.");
}

Value Sum(Interpreter& in, const Value& input, Args& args) {
  const Value* attribute = args.Get(0, "attribute");
  const Value* start = args.Get(1, "start");
  double total = start == nullptr ? 0 : (start->Require(), start->is_number() ? start->as_double() : 0);
  int64_t exact = start != nullptr && start->is_integral() ? start->as_int() : 0;
  bool integral = start == nullptr || start->is_integral();
  for (const Value& item : Iterate(input, in.budget())) {
    const bool by = attribute != nullptr && !attribute->is_none();
    const Value v = by ? AttributePath(in, item, *attribute, nullptr) : item;
    v.Require();
    if (!v.is_number())
      TypeError(absl::StrCat("unsupported operand type(s) for +: 'int' and '", v.TypeName(), "'"));
    total += v.as_double();
    integral = integral && v.is_integral();
    if (integral && __builtin_add_overflow(exact, v.as_int(), &exact))
      Fail("OverflowError", "integer beyond 64 bits");
  }
  return integral ? Value(exact) : Value(total);
}

Value Reverse(Interpreter& in, const Value& input, Args&) {
  std::vector<Value> items = Iterate(input, in.budget());
  std::reverse(items.begin(), items.end());
  if (!input.is_string()) return Generator(in, std::move(items));
  return in.Made(Join(in, items, "", true));
}

Value Last(Interpreter& in, const Value& input, Args&) {
  if (input.is_seq(SeqKind::kGenerator)) TypeError("'generator' object is not reversible");
  std::vector<Value> items = Iterate(input, in.budget());
  return items.empty() ? Value::MakeUndefined("No last item, sequence was empty.") : items.back();
}

Value First(Interpreter& in, const Value& input, Args&) {
  std::vector<Value> items = Iterate(input, in.budget());
  return items.empty() ? Value::MakeUndefined("No first item, sequence was empty.") : items.front();
}

Value ItemsFilter(Interpreter& in, const Value& input, Args&) {
  if (input.is_undefined()) return Generator(in, {});
  if (!input.is_dict()) TypeError("Can only get item pairs from a mapping.");
  return Generator(in, DictView(in, input.dict(), SeqKind::kDictItems).seq().items);
}

Value Batch(Interpreter& in, const Value& input, Args& args) {
  if (args.positional.empty()) TypeError("batch needs a line count");
  const int64_t size = Int(args.positional[0], "linecount");
  if (size <= 0) Fail("ValueError", "linecount must be positive");
  const Value* fill = args.Get(1, "fill_with");
  std::vector<Value> rows, row;
  for (Value& item : Iterate(input, in.budget())) {
    row.push_back(std::move(item));
    if (static_cast<int64_t>(row.size()) == size) rows.push_back(ListOf(in, std::exchange(row, {})));
  }
  if (!row.empty()) {
    while (fill != nullptr && !fill->is_none() &&
           static_cast<int64_t>(row.size()) < std::min(size, kRangeMax)) {
      row.push_back(*fill);
    }
    rows.push_back(ListOf(in, std::move(row)));
  }
  return Generator(in, std::move(rows));
}

Value AbsFilter(Interpreter&, const Value& input, Args&) {
  input.Require();
  if (input.is_float()) return Value(std::fabs(input.as_double()));
  if (!input.is_integral()) TypeError(absl::StrCat("bad operand type for abs(): '", input.TypeName(), "'"));
  if (input.as_int() == INT64_MIN) Fail("OverflowError", "integer beyond 64 bits");
  return Value(input.as_int() < 0 ? -input.as_int() : input.as_int());
}

Value Default(Interpreter&, const Value& input, Args& args) {
  const Value* fallback = args.Get(0, "default_value");
  if (input.is_undefined() || (BoolOr(args.Get(1, "boolean"), false) && !input.Truthy())) {
    return fallback == nullptr ? Value("") : *fallback;
  }
  return input;
}

Value JoinFilter(Interpreter& in, const Value& input, Args& args) {
  const Value* glue = args.Get(0, "d");
  const Value* attribute = args.Get(1, "attribute");
  std::vector<Value> items = Iterate(input, in.budget());
  if (attribute != nullptr && !attribute->is_none()) {
    for (Value& item : items) item = AttributePath(in, item, *attribute, nullptr);
  }
  return in.Made(Join(in, items, glue == nullptr ? std::string() : in.Str(*glue), false));
}

Value TrimFilter(Interpreter& in, const Value& input, Args& args) {
  const std::string text = in.Str(input);
  const Value* chars = args.Get(0, "chars");
  if (chars == nullptr || chars->is_none()) return in.Made(std::string(unicode::Strip(text, true, true)));
  return in.Made(std::string(unicode::StripChars(text, StrArg(*chars, "chars"), true, true)));
}

Value ReplaceFilter(Interpreter& in, const Value& input, Args& args) {
  const Value* from = args.Get(0, "old");
  const Value* to = args.Get(1, "new");
  if (from == nullptr || to == nullptr) TypeError("replace needs old and new");
  const int64_t count = IntOr(args.Get(2, "count"), "count", -1);
  return in.Made(ReplaceText(in, in.Str(input), in.Str(*from), in.Str(*to), count));
}

Value CountFilter(Interpreter&, const Value& input, Args&) { return Value(Length(input)); }

template <std::string (*kChange)(std::string_view)>
Value Change(Interpreter& in, const Value& input, Args&) {
  return in.Made(kChange(in.Str(input)));
}

const absl::flat_hash_map<std::string, FilterFn>& Filters() {
  static const auto* filters = new absl::flat_hash_map<std::string, FilterFn>{
      {"abs", AbsFilter},
      {"attr", [](Interpreter& in, const Value& input,
                  Args& args) { return in.GetAttr(input, StrArg(Need(args, 0, "attr"), "attribute name")); }},
      {"batch", Batch},
      {"capitalize", Change<unicode::Capitalize>},
      {"count", CountFilter},
      {"d", Default},
      {"default", Default},
      {"dictsort", DictSort},
      {"e", Escape},
      {"escape", Escape},
      {"first", First},
      {"float", FloatFilter},
      {"format", [](Interpreter& in, const Value& input,
                    Args& args) { return in.Made(PercentFormat(in, in.Str(input), args.positional)); }},
      {"indent", Indent},
      {"int", IntFilter},
      {"items", ItemsFilter},
      {"join", JoinFilter},
      {"last", Last},
      {"length", CountFilter},
      {"list",
       [](Interpreter& in, const Value& input, Args&) { return ListOf(in, Iterate(input, in.budget())); }},
      {"lower", Change<unicode::Lower>},
      {"map", Map},
      {"max", Extreme<true>},
      {"min", Extreme<false>},
      {"reject", Select<false, false>},
      {"rejectattr", Select<false, true>},
      {"replace", ReplaceFilter},
      {"reverse", Reverse},
      {"round", Round},
      {"safe", [](Interpreter& in, const Value& input, Args&) { return Value::Safe(in.Str(input)); }},
      {"select", Select<true, false>},
      {"selectattr", Select<true, true>},
      {"sort", Sort},
      {"string", [](Interpreter& in, const Value& input,
                    Args&) { return input.is_string() ? input : Value(in.Str(input)); }},
      {"sum", Sum},
      {"title", TitleFilter},
      {"tojson", ToJsonFilter},
      {"trim", TrimFilter},
      {"unique", Unique},
      {"upper", Change<unicode::Upper>},
      {"wordcount", [](Interpreter& in, const Value& input,
                       Args&) { return Value(static_cast<int64_t>(SplitSpace(in.Str(input), -1).size())); }},
  };
  return *filters;
}

// --- tests ---

template <int kOp>
bool OrderTest(Interpreter& in, const Value& input, Args& args) {
  const Value& other = Need(args, 0, "test");
  if (kOp == 0) return Equal(input, other, in.budget());
  if (kOp == 1) return !Equal(input, other, in.budget());
  static constexpr const char* kNames[] = {"", "", "<", "<=", ">", ">="};
  const int order = Compare(input, other, kNames[kOp], in.budget());
  return kOp == 2 ? order < 0 : kOp == 3 ? order <= 0 : kOp == 4 ? order > 0 : order >= 0;
}

bool Divides(const Value& input, int64_t by) {
  if (by == 0) Fail("ZeroDivisionError", "integer modulo by zero");
  return by == -1 || Int(input, "value") % by == 0;
}

const absl::flat_hash_map<std::string, TestFn>& Tests() {
  static const auto* tests = new absl::flat_hash_map<std::string, TestFn>{
      {"boolean", [](Interpreter&, const Value& v, Args&) { return v.is_bool(); }},
      {"callable", [](Interpreter&, const Value& v, Args&) { return v.is_callable() || v.is_undefined(); }},
      {"defined", [](Interpreter&, const Value& v, Args&) { return !v.is_undefined(); }},
      {"divisibleby", [](Interpreter&, const Value& v,
                         Args& args) { return Divides(v, Int(Need(args, 0, "divisibleby"), "num")); }},
      {"==", OrderTest<0>},
      {"eq", OrderTest<0>},
      {"equalto", OrderTest<0>},
      {"!=", OrderTest<1>},
      {"ne", OrderTest<1>},
      {"<", OrderTest<2>},
      {"lt", OrderTest<2>},
      {"lessthan", OrderTest<2>},
      {"<=", OrderTest<3>},
      {"le", OrderTest<3>},
      {">", OrderTest<4>},
      {"gt", OrderTest<4>},
      {"greaterthan", OrderTest<4>},
      {">=", OrderTest<5>},
      {"ge", OrderTest<5>},
      {"escaped", [](Interpreter&, const Value&, Args&) { return false; }},
      {"even", [](Interpreter&, const Value& v, Args&) { return Int(v, "value") % 2 == 0; }},
      {"odd", [](Interpreter&, const Value& v, Args&) { return Int(v, "value") % 2 != 0; }},
      {"false", [](Interpreter&, const Value& v, Args&) { return v.is_bool() && !v.as_bool(); }},
      {"true", [](Interpreter&, const Value& v, Args&) { return v.is_bool() && v.as_bool(); }},
      {"filter", [](Interpreter& in, const Value& v, Args&) { return FindFilter(in.Str(v)) != nullptr; }},
      {"test", [](Interpreter& in, const Value& v, Args&) { return FindTest(in.Str(v)) != nullptr; }},
      {"float", [](Interpreter&, const Value& v, Args&) { return v.is_float(); }},
      {"integer", [](Interpreter&, const Value& v, Args&) { return v.is_int(); }},
      {"number", [](Interpreter&, const Value& v, Args&) { return v.is_number(); }},
      {"in", [](Interpreter& in, const Value& v,
                Args& args) { return Contains(Need(args, 0, "in"), v, in.budget()); }},
      {"iterable",
       [](Interpreter&, const Value& v, Args&) {
         return v.is_string() || v.is_seq() || v.is_dict() || v.is_undefined() || v.is_loop();
       }},
      {"lower", [](Interpreter& in, const Value& v, Args&) { return AllCased(in.Str(v), true); }},
      {"upper", [](Interpreter& in, const Value& v, Args&) { return AllCased(in.Str(v), false); }},
      {"mapping", [](Interpreter&, const Value& v, Args&) { return v.is_dict(); }},
      {"none", [](Interpreter&, const Value& v, Args&) { return v.is_none(); }},
      {"sameas",
       [](Interpreter& in, const Value& v, Args& args) {
         const Value& other = Need(args, 0, "sameas");
         return std::string_view(v.TypeName()) == other.TypeName() && Equal(v, other, in.budget());
       }},
      {"sequence",
       [](Interpreter&, const Value& v, Args&) {
         return v.is_string() || v.is_dict() || v.is_undefined() || v.is_seq(SeqKind::kList) ||
                v.is_seq(SeqKind::kTuple) || v.is_seq(SeqKind::kRange);
       }},
      {"string", [](Interpreter&, const Value& v, Args&) { return v.is_string(); }},
      {"undefined", [](Interpreter&, const Value& v, Args&) { return v.is_undefined(); }},
  };
  return *tests;
}

// --- functions ---

Value Range(Interpreter& in, Args& args) {
  const size_t n = args.positional.size();
  if (n == 0 || n > 3) TypeError(absl::StrCat("range expected 1 to 3 arguments, got ", n));
  const int64_t start = n == 1 ? 0 : Int(args.positional[0], "range() argument");
  const int64_t stop = Int(args.positional[n == 1 ? 0 : 1], "range() argument");
  const int64_t step = n == 3 ? Int(args.positional[2], "range() argument") : 1;
  if (step == 0) Fail("ValueError", "range() arg 3 must not be zero");
  std::vector<Value> items;
  for (int64_t i = start; step > 0 ? i < stop : i > stop;) {
    if (static_cast<int64_t>(items.size()) >= kRangeMax) {
      Fail("OverflowError",
           absl::StrCat("Range too big. The sandbox blocks ranges larger than MAX_RANGE (", kRangeMax, ")."));
    }
    items.emplace_back(i);
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  in.budget().Step(items.size());
  in.budget().Allocate(items.size() * sizeof(Value));
  return Value::MakeSeq(SeqKind::kRange, std::move(items));
}

// dict(mapping, name=value, ...), also what namespace() takes.
Dict MakeDictFrom(Interpreter& in, Args& args) {
  Dict dict;
  for (const Value& value : args.positional) {
    if (value.is_dict()) {
      for (const auto& [k, v] : value.dict().entries) dict.Set(k, v);
      continue;
    }
    for (const Value& pair : Iterate(value, in.budget())) {
      const std::vector<Value> parts = Iterate(pair, in.budget());
      if (parts.size() != 2) Fail("ValueError", "dictionary update sequence element must have length 2");
      dict.Set(parts[0], parts[1]);
    }
  }
  for (const auto& [name, value] : args.keyword) dict.Set(Value(name), value);
  in.budget().Allocate(dict.entries.size() * sizeof(Value));
  return dict;
}

const absl::flat_hash_map<std::string, Value>& Globals() {
  static const auto* globals = new absl::flat_hash_map<std::string, Value>{
      {"range", MakeFn("range", Range)},
      {"dict",
       MakeFn("dict", [](Interpreter& in, Args& args) { return Value::MakeDict(MakeDictFrom(in, args)); })},
      {"namespace", MakeFn("namespace", [](Interpreter& in,
                                           Args& args) { return in.MakeNamespace(MakeDictFrom(in, args)); })},
      {"raise_exception", MakeFn("raise_exception",
                                 [](Interpreter& in, Args& args) -> Value {
                                   const Value* message = args.Get(0, "message");
                                   Fail("TemplateError",
                                        message == nullptr ? std::string() : in.Str(*message));
                                 })},
      {"strftime_now", MakeFn("strftime_now",
                              [](Interpreter& in, Args& args) {
                                const std::string& format = StrArg(Need(args, 0, "strftime_now"), "format");
                                if (format.size() > 256) Fail("ValueError", "format longer than 256 bytes");
                                return in.Made(absl::FormatTime(format, in.options().now, in.options().zone));
                              })},
  };
  return *globals;
}

}  // namespace

std::string PercentFormat(Interpreter& in, const std::string& format, const std::vector<Value>& args) {
  std::string out;
  size_t used = 0;
  for (size_t i = 0; i < format.size(); ++i) {
    if (format[i] != '%') {
      out.push_back(format[i]);
      continue;
    }
    size_t end = i + 1;
    while (end < format.size() && std::strchr("+- #0123456789.", format[end]) != nullptr) ++end;
    if (end >= format.size()) Fail("ValueError", "incomplete format");
    const char kind = format[end];
    if (kind == '%') {
      out.push_back('%');
      i = end;
      continue;
    }
    const std::string flags = format.substr(i + 1, end - i - 1);
    if (flags.size() > 6) Fail("ValueError", "format field too wide");
    if (used >= args.size()) TypeError("not enough arguments for format string");
    const Value& value = args[used++];
    if (kind != 's' && kind != 'r') value.Require();
    char buffer[512];
    if (kind == 's' || kind == 'r') {
      if (!flags.empty()) Fail("ValueError", "widths are supported for numbers only");
      out += kind == 's' ? in.Str(value) : Repr(value, in.budget());
    } else if (std::strchr("dixX", kind) != nullptr) {
      if (!value.is_number())
        TypeError(absl::StrCat("%", std::string(1, kind), " format: a real number is required, not ",
                               value.TypeName()));
      const int64_t n = value.is_float() ? static_cast<int64_t>(std::clamp(value.as_double(), -9e18, 9e18))
                                         : value.as_int();
      const std::string spec = absl::StrCat("%", flags, "ll", std::string(1, kind == 'i' ? 'd' : kind));
      std::snprintf(buffer, sizeof(buffer), spec.c_str(), static_cast<long long>(n));
      out += buffer;
    } else if (std::strchr("feEgG", kind) != nullptr) {
      if (!value.is_number()) TypeError(absl::StrCat("must be real number, not ", value.TypeName()));
      const std::string spec = absl::StrCat("%", flags, std::string(1, kind));
      std::snprintf(buffer, sizeof(buffer), spec.c_str(), value.as_double());
      out += buffer;
    } else {
      Fail("ValueError", absl::StrCat("unsupported format character '", std::string(1, kind), "'"));
    }
    i = end;
  }
  if (used < args.size()) TypeError("not all arguments converted during string formatting");
  return out;
}

FilterFn FindFilter(std::string_view name) {
  const auto it = Filters().find(absl::string_view(name.data(), name.size()));
  return it == Filters().end() ? nullptr : it->second;
}

TestFn FindTest(std::string_view name) {
  const auto it = Tests().find(absl::string_view(name.data(), name.size()));
  return it == Tests().end() ? nullptr : it->second;
}

const Value* FindGlobal(std::string_view name) {
  const auto it = Globals().find(absl::string_view(name.data(), name.size()));
  return it == Globals().end() ? nullptr : &it->second;
}

bool FindMethod(const Value& object, const std::string& name, Value& method) {
  const auto unsafe = [&] {
    method = Value::MakeUndefined(
        absl::StrCat("access to attribute '", name, "' of '", object.TypeName(), "' object is unsafe."),
        "SecurityError");
    return true;
  };
  if (name.starts_with("__")) return unsafe();
  if (object.is_string()) {
    const auto it = StrMethods().find(name);
    if (it == StrMethods().end()) return false;
    const StrMethod fn = it->second;
    const bool keywords = OneOf(name, {"split", "rsplit", "splitlines"});
    method = MakeFn(name, [object, fn, name, keywords](Interpreter& in, Args& args) {
      if (!args.keyword.empty() && !keywords)
        TypeError(absl::StrCat("str.", name, "() takes no keyword arguments"));
      in.budget().Step(object.str().size() / 64 + 1);
      return fn(in, object.str(), args);
    });
    return true;
  }
  if (object.is_dict()) {
    if (OneOf(name, {"pop", "popitem", "update", "setdefault", "clear"})) return unsafe();
    if (!OneOf(name, {"get", "items", "keys", "values", "copy"})) return false;
    method = DictMethod(object, name);
    return true;
  }
  const bool list = object.is_seq(SeqKind::kList);
  if (list && OneOf(name, {"append", "clear", "pop", "reverse", "insert", "sort", "extend", "remove"}))
    return unsafe();
  if ((list && OneOf(name, {"index", "count", "copy"})) ||
      (object.is_seq(SeqKind::kTuple) && OneOf(name, {"index", "count"}))) {
    method = SeqMethod(object, name);
    return true;
  }
  if (object.is_loop() && OneOf(name, {"cycle", "changed"})) {
    method = MakeFn(name, [object, name](Interpreter& in, Args& args) {
      Loop& loop = object.loop();
      if (name == "cycle") {
        if (args.positional.empty()) TypeError("no items for cycling given");
        return args.positional[loop.at % args.positional.size()];
      }
      const Value now = Value::MakeSeq(SeqKind::kTuple, args.positional);
      const bool same = !loop.last_changed.empty() && Equal(loop.last_changed[0], now, in.budget());
      loop.last_changed = {now};
      return Value(!same);
    });
    return true;
  }
  return false;
}

}  // namespace tidepool::jinja
