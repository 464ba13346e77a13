// The filters, tests, functions and methods that chat templates use, each as Jinja2 3.1 and Python 3 have it.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/model/strings/unicode.h"
#include "server/model/strings/utf8.h"
#include "server/model/template/jinja_interpreter.h"

namespace tidepool::jinja {

namespace {

// The sandbox's MAX_RANGE.
constexpr int64_t kRangeMax = 100'000;

// Unlike strchr, which finds the NUL behind every set.
bool Has(std::string_view set, char c) { return set.find(c) != set.npos; }

Value MakeFn(std::string name, std::function<Value(Interpreter&, Args&)> fn, int depth = 0) {
  CheckDepth(depth);
  auto callable = std::make_shared<Callable>();
  callable->depth = depth;
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

const Text& TextArg(const Value& value, const char* what) {
  value.Require();
  if (!value.is_string()) TypeError(absl::StrCat(what, " must be str, not ", value.TypeName()));
  return value.text();
}

const std::string& StrArg(const Value& value, const char* what) { return TextArg(value, what).str(); }

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

// Pieces of one text, each charged as it is made.
class Pieces {
 public:
  Pieces(Interpreter& in, const Text& whole) : in_(in), whole_(whole) {}
  // `view`: a view into the whole.
  void Add(std::string_view view) { items_.push_back(in_.Made(whole_.Substr(view))); }
  void Reverse() { std::reverse(items_.begin(), items_.end()); }
  int64_t count() const { return static_cast<int64_t>(items_.size()); }
  Value List() { return ListOf(in_, std::move(items_)); }

 private:
  Interpreter& in_;
  const Text& whole_;
  std::vector<Value> items_;
};

Value SplitSpace(Interpreter& in, const Text& whole, int64_t max) {
  Pieces pieces(in, whole);
  std::string_view text = whole.str();
  while (true) {
    text = unicode::Strip(text, true, false);
    if (text.empty()) return pieces.List();
    if (max >= 0 && pieces.count() >= max) {
      pieces.Add(text);
      return pieces.List();
    }
    size_t end = 0;
    while (end < text.size()) {
      size_t next = end;
      if (unicode::IsSpace(utf8::Next(text, next))) break;
      end = next;
    }
    pieces.Add(text.substr(0, end));
    text.remove_prefix(end);
  }
}

Value RSplitSpace(Interpreter& in, const Text& whole, int64_t max) {
  Pieces pieces(in, whole);
  std::string_view text = whole.str();
  while (true) {
    text = unicode::Strip(text, false, true);
    if (text.empty()) break;
    if (max >= 0 && pieces.count() >= max) {
      pieces.Add(text);
      break;
    }
    size_t begin = text.size();
    while (begin > 0) {
      size_t before = begin - 1;
      while (before > 0 && (static_cast<unsigned char>(text[before]) & 0xC0) == 0x80) --before;
      size_t pos = before;
      if (unicode::IsSpace(utf8::Next(text, pos))) break;
      begin = before;
    }
    pieces.Add(text.substr(begin));
    text = text.substr(0, begin);
  }
  pieces.Reverse();
  return pieces.List();
}

Value SplitBy(Interpreter& in, const Text& whole, std::string_view separator, int64_t max) {
  Pieces pieces(in, whole);
  std::string_view text = whole.str();
  while (max < 0 || pieces.count() < max) {
    const size_t at = FindBytes(text, separator);
    if (at == text.npos) break;
    pieces.Add(text.substr(0, at));
    text.remove_prefix(at + separator.size());
  }
  pieces.Add(text);
  return pieces.List();
}

Value RSplitBy(Interpreter& in, const Text& whole, std::string_view separator, int64_t max) {
  Pieces pieces(in, whole);
  std::string_view text = whole.str();
  // Forwards through both backwards: a search from the end is quadratic in the standard library.
  in.budget().Allocate(text.size() + separator.size());
  const std::string backwards(text.rbegin(), text.rend()), wanted(separator.rbegin(), separator.rend());
  for (size_t done = 0; max < 0 || pieces.count() < max;) {
    in.budget().Read(separator.size());
    const size_t at = FindBytes(backwards, wanted, done);
    if (at == backwards.npos) break;
    pieces.Add(text.substr(text.size() - (at - done)));
    text.remove_suffix(at - done + separator.size());
    done = at + wanted.size();
  }
  pieces.Add(text);
  pieces.Reverse();
  return pieces.List();
}

std::vector<std::string_view> SplitLines(Interpreter& in, std::string_view text, bool keep_ends) {
  std::vector<std::string_view> lines;
  size_t begin = 0;
  const auto add = [&](size_t end) {
    in.budget().Allocate(sizeof(std::string_view));
    lines.push_back(text.substr(begin, end - begin));
  };
  for (size_t pos = 0; pos < text.size();) {
    const size_t at = pos;
    const uint32_t cp = utf8::Next(text, pos);
    const bool end =
        (cp >= 10 && cp <= 13) || (cp >= 0x1C && cp <= 0x1E) || cp == 0x85 || cp == 0x2028 || cp == 0x2029;
    if (!end) continue;
    if (cp == '\r' && pos < text.size() && text[pos] == '\n') ++pos;
    add(keep_ends ? pos : at);
    begin = pos;
  }
  if (begin < text.size()) add(text.size());
  return lines;
}

Text ReplaceText(Interpreter& in, const Text& whole, const std::string& from, const Text& to, int64_t count) {
  const std::string& text = whole.str();
  Text out;
  const auto check = [&] {
    if (out.cost() > in.options().output_bytes_max) in.budget().Allocate(out.cost());
  };
  size_t done = 0;
  if (from.empty()) {
    while (count != 0 && done <= text.size()) {
      out.Append(to);
      check();
      --count;
      if (done == text.size()) return out;
      size_t next = done;
      utf8::Next(text, next);
      out.Append(whole, done, next);
      done = next;
    }
  } else {
    for (size_t at = FindBytes(text, from); at != text.npos && count != 0;
         at = FindBytes(text, from, done), --count) {
      out.Append(whole, done, at);
      out.Append(to);
      check();
      done = at + from.size();
    }
  }
  out.Append(whole, done, text.size());
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

Text Join(Interpreter& in, const std::vector<Value>& items, const Text& glue, bool strict) {
  Text out;
  for (size_t i = 0; i < items.size(); ++i) {
    if (i > 0) out.Append(glue);
    if (items[i].is_string()) {
      out.Append(items[i].text());
    } else if (strict) {
      items[i].Require();
      TypeError(
          absl::StrCat("sequence item ", i, ": expected str instance, ", items[i].TypeName(), " found"));
    } else {
      out.Append(in.Str(items[i]));
    }
    if (out.cost() > in.options().output_bytes_max) in.budget().Allocate(out.cost());
  }
  return out;
}

// For operations that change single characters in ways which depend on their neighbours: data as a whole if
// any of it was.
Text Changed(std::string bytes, const Text& from) { return Text::Of(std::move(bytes), from.has_data()); }

// --- string methods ---

using StrMethod = Value (*)(Interpreter&, const Text& self, Args& args);

Value Strip(Interpreter& in, const Text& self, const Value* chars, bool left, bool right) {
  const bool space = chars == nullptr || chars->is_none();
  return in.Made(
      self.Substr(space ? unicode::Strip(self.str(), left, right)
                        : unicode::StripChars(self.str(), StrArg(*chars, "strip arg"), left, right)));
}

template <bool kLeft, bool kRight>
Value StripMethod(Interpreter& in, const Text& self, Args& args) {
  return Strip(in, self, args.Get(0, "chars"), kLeft, kRight);
}

template <bool kRight>
Value SplitMethod(Interpreter& in, const Text& self, Args& args) {
  const Value* separator = args.Get(0, "sep");
  const int64_t max = IntOr(args.Get(1, "maxsplit"), "maxsplit", -1);
  in.budget().Step(self.size() / 8 + 1);
  if (separator == nullptr || separator->is_none()) {
    return kRight ? RSplitSpace(in, self, max) : SplitSpace(in, self, max);
  }
  const std::string& by = StrArg(*separator, "sep");
  if (by.empty()) Fail("ValueError", "empty separator");
  return kRight ? RSplitBy(in, self, by, max) : SplitBy(in, self, by, max);
}

template <bool kEnd>
Value WithMethod(Interpreter&, const Text& self, Args& args) {
  const Value* affix = args.Get(0, "prefix");
  if (affix == nullptr) TypeError("startswith/endswith takes at least 1 argument (0 given)");
  affix->Require();
  const auto test = [&](const Value& v) {
    const std::string& what = StrArg(v, "tuple item");
    return kEnd ? self.str().ends_with(what) : self.str().starts_with(what);
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
  const size_t at = last ? RFindBytes(self, needle) : FindBytes(self, needle);
  if (at == self.npos) return Value(int64_t{-1});
  return Value(static_cast<int64_t>(utf8::Count(std::string_view(self).substr(0, at))));
}

Value CountText(const std::string& self, const std::string& needle) {
  if (needle.empty()) return Value(static_cast<int64_t>(utf8::Count(self)) + 1);
  int64_t n = 0;
  for (size_t at = FindBytes(self, needle); at != self.npos;
       at = FindBytes(self, needle, at + needle.size())) {
    ++n;
  }
  return Value(n);
}

Value Partition(Interpreter& in, const Text& self, const std::string& by, bool last) {
  if (by.empty()) Fail("ValueError", "empty separator");
  const size_t at = last ? RFindBytes(self.str(), by) : FindBytes(self.str(), by);
  std::vector<Value> parts;
  if (at == std::string::npos) {
    parts = last ? std::vector<Value>{"", "", self} : std::vector<Value>{self, "", ""};
  } else {
    // The separator as it stands in the text: where that is data, so is this.
    const size_t end = at + by.size();
    parts = {in.Made(self.Substr(0, at)), in.Made(self.Substr(at, end)),
             in.Made(self.Substr(end, self.size()))};
  }
  return Value::MakeSeq(SeqKind::kTuple, std::move(parts));
}

// `before` and `after` fill characters round the text.
Value PadWith(Interpreter& in, const Text& self, const Text& fill, int64_t before, int64_t after) {
  // Each at most an output's bytes, hence so is neither sum nor product.
  in.budget().Allocate(static_cast<uint64_t>(before));
  in.budget().Allocate(static_cast<uint64_t>(after));
  in.budget().Allocate(static_cast<uint64_t>(before + after) * fill.cost() + self.cost());
  Text out;
  for (int64_t i = 0; i < before; ++i) out.Append(fill);
  out.Append(self);
  for (int64_t i = 0; i < after; ++i) out.Append(fill);
  return in.Made(std::move(out));
}

enum class Side { kLeft, kRight, kBoth };  // of the text that is filled

template <Side kSide>
Value PadMethod(Interpreter& in, const Text& self, Args& args) {
  const int64_t width = Int(Need(args, 0, "just"), "width");
  const Text fill =
      args.positional.size() > 1 ? TextArg(args.positional[1], "fill character") : Text::Trusted(" ");
  if (utf8::Count(fill.str()) != 1) TypeError("The fill character must be exactly one character long");
  const auto size = static_cast<int64_t>(utf8::Count(self.str()));
  if (width <= size) return Value(self);
  const int64_t total = width - size;
  // Source: CPython, unicode_center_impl.
  const int64_t before = kSide == Side::kBoth   ? total / 2 + (total & width & 1)
                         : kSide == Side::kLeft ? total
                                                : 0;
  return PadWith(in, self, fill, before, total - before);
}

Value ZFill(Interpreter& in, const Text& self, Args& args) {
  const int64_t width = Int(Need(args, 0, "zfill"), "width");
  const auto size = static_cast<int64_t>(utf8::Count(self.str()));
  if (width <= size) return Value(self);
  const size_t sign = self.str().starts_with('-') || self.str().starts_with('+') ? 1 : 0;
  Text out = self.Substr(0, sign);
  out.Append(PadWith(in, self.Substr(sign, self.size()), Text::Trusted("0"), width - size, 0).text());
  return in.Made(std::move(out));
}

template <std::string (*kChange)(std::string_view)>
Value ChangeMethod(Interpreter& in, const Text& self, Args&) {
  return in.Made(Changed(kChange(self.str()), self));
}

template <bool (*kPred)(uint32_t)>
Value AllMethod(Interpreter&, const Text& self, Args&) {
  return Value(AllChars(self.str(), kPred));
}

bool IsAlnum(uint32_t c) { return unicode::IsLetter(c) || unicode::IsNumeric(c); }

const absl::flat_hash_map<std::string, StrMethod>& StrMethods() {
  static const auto* methods = new absl::flat_hash_map<std::string, StrMethod>{
      {"strip", StripMethod<true, true>},
      {"lstrip", StripMethod<true, false>},
      {"rstrip", StripMethod<false, true>},
      {"split", SplitMethod<false>},
      {"rsplit", SplitMethod<true>},
      {"splitlines",
       [](Interpreter& in, const Text& self, Args& args) {
         Pieces pieces(in, self);
         for (std::string_view line : SplitLines(in, self.str(), BoolOr(args.Get(0, "keepends"), false))) {
           pieces.Add(line);
         }
         return pieces.List();
       }},
      {"startswith", WithMethod<false>},
      {"endswith", WithMethod<true>},
      {"upper", ChangeMethod<unicode::Upper>},
      {"lower", ChangeMethod<unicode::Lower>},
      {"casefold", ChangeMethod<unicode::Lower>},
      {"title", ChangeMethod<unicode::Title>},
      {"capitalize", ChangeMethod<unicode::Capitalize>},
      {"replace",
       [](Interpreter& in, const Text& self, Args& args) {
         const std::string& from = StrArg(Need(args, 0, "replace"), "replace() argument 1");
         const Text& to = TextArg(Need(args, 1, "replace"), "replace() argument 2");
         const int64_t count = args.positional.size() > 2 ? Int(args.positional[2], "count") : -1;
         return in.Made(ReplaceText(in, self, from, to, count));
       }},
      {"find",
       [](Interpreter&, const Text& self, Args& args) {
         return FindText(self.str(), StrArg(Need(args, 0, "find"), "find() argument 1"), false);
       }},
      {"rfind",
       [](Interpreter&, const Text& self, Args& args) {
         return FindText(self.str(), StrArg(Need(args, 0, "rfind"), "rfind() argument 1"), true);
       }},
      {"index",
       [](Interpreter&, const Text& self, Args& args) {
         Value at = FindText(self.str(), StrArg(Need(args, 0, "index"), "index() argument 1"), false);
         if (at.as_int() < 0) Fail("ValueError", "substring not found");
         return at;
       }},
      {"count",
       [](Interpreter&, const Text& self, Args& args) {
         return CountText(self.str(), StrArg(Need(args, 0, "count"), "count() argument 1"));
       }},
      {"join",
       [](Interpreter& in, const Text& self, Args& args) {
         return in.Made(Join(in, Iterate(Need(args, 0, "join"), in.budget()), self, true));
       }},
      {"removeprefix",
       [](Interpreter& in, const Text& self, Args& args) {
         const std::string& affix = StrArg(Need(args, 0, "removeprefix"), "removeprefix() argument");
         if (!self.str().starts_with(affix)) return Value(self);
         return in.Made(self.Substr(affix.size(), self.size()));
       }},
      {"removesuffix",
       [](Interpreter& in, const Text& self, Args& args) {
         const std::string& affix = StrArg(Need(args, 0, "removesuffix"), "removesuffix() argument");
         if (!self.str().ends_with(affix)) return Value(self);
         return in.Made(self.Substr(0, self.size() - affix.size()));
       }},
      {"partition",
       [](Interpreter& in, const Text& self, Args& args) {
         return Partition(in, self, StrArg(Need(args, 0, "partition"), "partition() argument"), false);
       }},
      {"rpartition",
       [](Interpreter& in, const Text& self, Args& args) {
         return Partition(in, self, StrArg(Need(args, 0, "rpartition"), "rpartition() argument"), true);
       }},
      {"isdigit", AllMethod<unicode::IsNumeric>},
      {"isnumeric", AllMethod<unicode::IsNumeric>},
      {"isdecimal", AllMethod<unicode::IsNumeric>},
      {"isalpha", AllMethod<unicode::IsLetter>},
      {"isalnum", AllMethod<IsAlnum>},
      {"isspace", AllMethod<unicode::IsSpace>},
      {"islower", [](Interpreter&, const Text& self, Args&) { return Value(AllCased(self.str(), true)); }},
      {"isupper", [](Interpreter&, const Text& self, Args&) { return Value(AllCased(self.str(), false)); }},
      {"ljust", PadMethod<Side::kRight>},
      {"rjust", PadMethod<Side::kLeft>},
      {"center", PadMethod<Side::kBoth>},
      {"zfill", ZFill},
  };
  return *methods;
}

// --- list, tuple and mapping methods ---

Value SeqMethod(const Value& object, const std::string& name) {
  return MakeFn(
      name,
      [object, name](Interpreter& in, Args& args) {
        const auto& items = object.seq().items;
        if (name == "copy") return ListOf(in, items).MarkedIf(object.is_data());
        const Value& wanted = Need(args, 0, name.c_str());
        int64_t n = 0;
        for (size_t i = 0; i < items.size(); ++i) {
          if (!Equal(items[i], wanted, in.budget())) continue;
          if (name == "index") return Value(static_cast<int64_t>(i));
          ++n;
        }
        if (name == "index") Fail("ValueError", absl::StrCat(in.Str(wanted).str(), " is not in list"));
        return Value(n);
      },
      object.depth() + 1);
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
  return MakeFn(
      name,
      [object, name](Interpreter& in, Args& args) {
        const Dict& dict = object.dict();
        if (name == "get") {
          if (!args.keyword.empty()) TypeError("dict.get() takes no keyword arguments");
          const Value& key = Need(args, 0, "get");
          if (key.is_dict() || key.is_seq(SeqKind::kList)) {
            TypeError(absl::StrCat("unhashable type: '", key.TypeName(), "'"));
          }
          if (const Value* value = dict.Find(key, in.budget())) return *value;
          return args.positional.size() > 1 ? args.positional[1] : Value();
        }
        if (name == "copy") return object;  // a mapping never changes here
        return DictView(in, dict,
                        name == "items"  ? SeqKind::kDictItems
                        : name == "keys" ? SeqKind::kDictKeys
                                         : SeqKind::kDictValues)
            .MarkedIf(object.is_data());
      },
      object.depth() + 1);
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
    value = in.GetItem(value, numeric ? Value(index) : Value(Text::Trusted(part)));
    if (fallback != nullptr && value.is_undefined()) value = *fallback;
    if (dot == path.npos) return value;
    path.remove_prefix(dot + 1);
  }
}

// A sort key: strings compare without case unless asked.
Value SortKey(const Value& value, bool case_sensitive) {
  if (case_sensitive || !value.is_string()) return value;
  return Value(Changed(unicode::Lower(value.str()), value.text()));
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
      const Value paths = SplitBy(in, attribute->text(), ",", -1);
      for (const Value& path : paths.seq().items) {
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
  bool data = false;  // the style's strings: they stand between everything
  style.ensure_ascii = BoolOr(args.Get(0, "ensure_ascii"), false);
  const Value* indent = args.Get(1, "indent");
  if (indent != nullptr && !indent->is_none()) {
    style.pretty = true;
    data = indent->is_data();
    style.item_separator = ",";
    style.indent =
        indent->is_string()
            ? indent->str()
            : std::string(static_cast<size_t>(std::clamp<int64_t>(Int(*indent, "indent"), 0, 100)), ' ');
  }
  if (const Value* separators = args.Get(2, "separators"); separators != nullptr && !separators->is_none()) {
    const std::vector<Value> pair = Iterate(*separators, in.budget());
    if (pair.size() != 2) Fail("ValueError", "separators must be a pair");
    data = data || pair[0].is_data() || pair[1].is_data();
    style.item_separator = StrArg(pair[0], "item separator");
    style.key_separator = StrArg(pair[1], "key separator");
  }
  style.sort_keys = BoolOr(args.Get(3, "sort_keys"), false);
  input.Require();  // json.dumps would name the type; the variable's name says more
  Text text = ToJson(input, style, in.budget());
  if (data) text.MarkAll();
  return in.Made(std::move(text));
}

Value Indent(Interpreter& in, const Value& input, Args& args) {
  const Value* width = args.Get(0, "width");
  Text indention = Text::Trusted("    ");
  if (width != nullptr && width->is_string()) {
    indention = width->text();
  } else if (width != nullptr) {
    indention =
        Text::Of(std::string(static_cast<size_t>(std::clamp<int64_t>(Int(*width, "width"), 0, 10'000)), ' '),
                 width->is_data());
  }
  const bool first = BoolOr(args.Get(1, "first"), false), blank = BoolOr(args.Get(2, "blank"), false);
  Text text = in.Str(input);
  text.AppendTrusted("\n");
  const std::vector<std::string_view> lines = SplitLines(in, text.str(), false);
  in.budget().Allocate(lines.size() * (indention.cost() + 1) + text.cost());
  Text out;
  if (first) out.Append(indention);
  for (size_t i = 0; i < lines.size(); ++i) {
    if (i > 0) out.AppendTrusted("\n");
    if (i > 0 && (blank || !lines[i].empty())) out.Append(indention);
    out.Append(text.Substr(lines[i]));
  }
  return in.Made(std::move(out));
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
  const bool data = input.is_data();
  if (input.is_integral()) return Value(input.as_int()).MarkedIf(data);
  if (input.is_float()) return from_double(input.as_double()).MarkedIf(data);
  if (!input.is_string()) return otherwise;
  std::string_view text = unicode::Strip(input.str(), true, true);
  auto base = static_cast<int>(std::clamp<int64_t>(IntOr(args.Get(1, "base"), "base", 10), 2, 36));
  if (text.starts_with('+')) text.remove_prefix(1);
  if (base == 16 && (text.starts_with("0x") || text.starts_with("0X"))) text.remove_prefix(2);
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (!text.empty() && error == std::errc() && end == text.data() + text.size()) {
    return Value(value).MarkedIf(data);
  }
  const auto d = ParseFloat(input.str());
  return d ? from_double(*d).MarkedIf(data) : otherwise;
}

Value FloatFilter(Interpreter&, const Value& input, Args& args) {
  input.Require();
  const Value* fallback = args.Get(0, "default");
  const bool data = input.is_data();
  if (input.is_number()) return Value(input.as_double()).MarkedIf(data);
  if (input.is_string()) {
    if (const auto d = ParseFloat(input.str())) return Value(*d).MarkedIf(data);
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
  const bool data = input.is_data();
  if (how == "ceil") return Value(std::ceil(d * scale) / scale).MarkedIf(data);
  if (how == "floor") return Value(std::floor(d * scale) / scale).MarkedIf(data);
  if (how != "common") Fail("FilterArgumentError", "method must be common, ceil or floor");
  return Value(std::nearbyint(d * scale) / scale).MarkedIf(data);  // Python rounds halves to even
}

Value TitleFilter(Interpreter& in, const Value& input, Args&) {
  const Text whole = in.Str(input);
  const std::string& text = whole.str();
  std::string out, word;
  const auto flush = [&] {
    out += unicode::Capitalize(word);
    word.clear();
  };
  for (size_t pos = 0; pos < text.size();) {
    const size_t begin = pos;
    const uint32_t cp = utf8::Next(text, pos);
    const bool boundary = unicode::IsSpace(cp) || (cp < 0x80 && Has("-({[<", static_cast<char>(cp)));
    if (boundary) {
      flush();
      out.append(text, begin, pos - begin);
    } else {
      word.append(text, begin, pos - begin);
    }
  }
  flush();
  return in.Made(Changed(std::move(out), whole));
}

Value Escape(Interpreter& in, const Value& input, Args&) {
  if (input.is_safe()) return input;
  const Text text = in.Str(input);
  Text escaped = Changed(EscapeHtml(text.str()), text);
  in.budget().Allocate(escaped.cost() + kStringOverhead);
  return Value::Safe(std::move(escaped));
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
  bool data = start != nullptr && start->is_data();
  int64_t exact = start != nullptr && start->is_integral() ? start->as_int() : 0;
  bool integral = start == nullptr || start->is_integral();
  for (const Value& item : Iterate(input, in.budget())) {
    const bool by = attribute != nullptr && !attribute->is_none();
    const Value v = by ? AttributePath(in, item, *attribute, nullptr) : item;
    v.Require();
    if (!v.is_number())
      TypeError(absl::StrCat("unsupported operand type(s) for +: 'int' and '", v.TypeName(), "'"));
    data = data || v.is_data();
    total += v.as_double();
    integral = integral && v.is_integral();
    if (integral && __builtin_add_overflow(exact, v.as_int(), &exact))
      Fail("OverflowError", "integer beyond 64 bits");
  }
  return (integral ? Value(exact) : Value(total)).MarkedIf(data);
}

Value Reverse(Interpreter& in, const Value& input, Args&) {
  std::vector<Value> items = Iterate(input, in.budget());
  std::reverse(items.begin(), items.end());
  if (!input.is_string()) return Generator(in, std::move(items));
  return in.Made(Join(in, items, Text(), true));
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
  const bool data = input.is_data();
  if (input.is_float()) return Value(std::fabs(input.as_double())).MarkedIf(data);
  if (!input.is_integral()) TypeError(absl::StrCat("bad operand type for abs(): '", input.TypeName(), "'"));
  if (input.as_int() == INT64_MIN) Fail("OverflowError", "integer beyond 64 bits");
  return Value(input.as_int() < 0 ? -input.as_int() : input.as_int()).MarkedIf(data);
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
  return in.Made(Join(in, items, glue == nullptr ? Text() : in.Str(*glue), false));
}

Value TrimFilter(Interpreter& in, const Value& input, Args& args) {
  return Strip(in, in.Str(input), args.Get(0, "chars"), true, true);
}

Value ReplaceFilter(Interpreter& in, const Value& input, Args& args) {
  const Value* from = args.Get(0, "old");
  const Value* to = args.Get(1, "new");
  if (from == nullptr || to == nullptr) TypeError("replace needs old and new");
  const int64_t count = IntOr(args.Get(2, "count"), "count", -1);
  return in.Made(ReplaceText(in, in.Str(input), in.Str(*from).str(), in.Str(*to), count));
}

Value CountFilter(Interpreter&, const Value& input, Args&) { return Value(Length(input)); }

// Runs of \w, as Jinja2's regular expression has it.
Value WordCount(Interpreter& in, const Value& input, Args&) {
  const Text text = in.Str(input);
  int64_t words = 0;
  bool inside = false;
  for (size_t pos = 0; pos < text.size();) {
    const bool word = unicode::IsWord(utf8::Next(text.str(), pos));
    words += word && !inside;
    inside = word;
  }
  return Value(words);
}

template <std::string (*kChange)(std::string_view)>
Value Change(Interpreter& in, const Value& input, Args&) {
  const Text text = in.Str(input);
  return in.Made(Changed(kChange(text.str()), text));
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
                    Args& args) { return in.Made(PercentFormat(in, in.Str(input), args.positional, true)); }},
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
      {"wordcount", WordCount},
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
      {"filter",
       [](Interpreter& in, const Value& v, Args&) { return FindFilter(in.Str(v).str()) != nullptr; }},
      {"test", [](Interpreter& in, const Value& v, Args&) { return FindTest(in.Str(v).str()) != nullptr; }},
      {"float", [](Interpreter&, const Value& v, Args&) { return v.is_float(); }},
      {"integer", [](Interpreter&, const Value& v, Args&) { return v.is_int(); }},
      {"number", [](Interpreter&, const Value& v, Args&) { return v.is_number(); }},
      {"in", [](Interpreter& in, const Value& v,
                Args& args) { return Contains(Need(args, 0, "in"), v, in.budget()); }},
      {"iterable",
       [](Interpreter&, const Value& v, Args&) {
         return v.is_string() || v.is_seq() || v.is_dict() || v.is_undefined() || v.is_loop();
       }},
      {"lower", [](Interpreter& in, const Value& v, Args&) { return AllCased(in.Str(v).str(), true); }},
      {"upper", [](Interpreter& in, const Value& v, Args&) { return AllCased(in.Str(v).str(), false); }},
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
  bool data = false;
  for (const Value& arg : args.positional) data = data || arg.is_data();
  std::vector<Value> items;
  for (int64_t i = start; step > 0 ? i < stop : i > stop;) {
    if (static_cast<int64_t>(items.size()) >= kRangeMax) {
      Fail("OverflowError",
           absl::StrCat("Range too big. The sandbox blocks ranges larger than MAX_RANGE (", kRangeMax, ")."));
    }
    items.push_back(Value(i).MarkedIf(data));
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  in.budget().Step(items.size());
  in.budget().Allocate(items.size() * sizeof(Value));
  Value range = Value::MakeSeq(SeqKind::kRange, std::move(items));
  range.seq().range = {start, stop, step};
  return range;
}

// dict(mapping, name=value, ...), also what namespace() takes.
Dict MakeDictFrom(Interpreter& in, Args& args) {
  Dict dict;
  for (const Value& value : args.positional) {
    if (value.is_dict()) {
      for (const auto& [k, v] : value.dict().entries) dict.Set(k, v, in.budget());
      continue;
    }
    for (const Value& pair : Iterate(value, in.budget())) {
      const std::vector<Value> parts = Iterate(pair, in.budget());
      if (parts.size() != 2) Fail("ValueError", "dictionary update sequence element must have length 2");
      dict.Set(parts[0], parts[1], in.budget());
    }
  }
  for (const KeywordArg& arg : args.keyword) dict.Set(Text::Of(arg.name, arg.data), arg.value);
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
                                        message == nullptr ? std::string() : in.Str(*message).str());
                                 })},
      {"strftime_now",
       MakeFn("strftime_now",
              [](Interpreter& in, Args& args) {
                const Text& format = TextArg(Need(args, 0, "strftime_now"), "format");
                if (format.size() > 256) Fail("ValueError", "format longer than 256 bytes");
                return in.Made(
                    Changed(absl::FormatTime(format.str(), in.options().now, in.options().zone), format));
              })},
  };
  return *globals;
}

// One conversion of `format % args`: "%" flags width .precision kind.
struct Conversion {
  std::string flags;
  int width = 0;
  int precision = -1;  // none
  char kind = 0;
};

// Reads the conversion behind the '%' at format[at - 1] and moves `at` behind it.
Conversion ReadConversion(const std::string& format, size_t& at) {
  Conversion c;
  const auto more = [&] {
    if (at >= format.size()) Fail("ValueError", "incomplete format");
    return format[at];
  };
  const auto number = [&] {
    int n = 0;
    for (; more() >= '0' && format[at] <= '9'; ++at) {
      n = n * 10 + (format[at] - '0');
      if (n > 1'000'000) Fail("ValueError", "width or precision too big");
    }
    return n;
  };
  for (; Has("-+ #0", more()); ++at) c.flags.push_back(format[at]);
  if (c.flags.size() > 16) Fail("ValueError", "too many format flags");
  c.width = number();
  if (more() == '.') {
    ++at;
    c.precision = number();
  }
  c.kind = more();
  ++at;
  return c;
}

// A string as %s shows it: cut to the precision, filled to the width.
Text Aligned(Interpreter& in, Text text, const Conversion& c) {
  auto count = static_cast<int64_t>(utf8::Count(text.str()));
  if (c.precision >= 0 && count > c.precision) {
    size_t end = 0;
    for (int i = 0; i < c.precision; ++i) utf8::Next(text.str(), end);
    text = text.Substr(0, end);
    count = c.precision;
  }
  if (count >= c.width) return text;
  const bool left = c.flags.find('-') != c.flags.npos;
  const int64_t fill = c.width - count;
  return PadWith(in, text, Text::Trusted(" "), left ? 0 : fill, left ? fill : 0).text();
}

std::string FormatNumber(Interpreter& in, const Conversion& c, const Value& value) {
  const bool integer = Has("diuxXo", c.kind);
  const bool digits = Has("xXo", c.kind);  // of an integer only, and signed in Python
  if (digits && !value.is_integral()) {
    TypeError(
        absl::StrCat("%", std::string(1, c.kind), " format: an integer is required, not ", value.TypeName()));
  }
  if (!value.is_number()) {
    TypeError(integer ? absl::StrCat("%", std::string(1, c.kind), " format: a real number is required, not ",
                                     value.TypeName())
                      : absl::StrCat("must be real number, not ", value.TypeName()));
  }
  in.budget().Allocate(static_cast<uint64_t>(c.width) + static_cast<uint64_t>(std::max(c.precision, 0)) +
                       400);
  const auto print = [&](std::string_view flags, int width, const char* size, char kind, auto number) {
    std::string spec = absl::StrCat("%", std::string(flags));
    if (width > 0) absl::StrAppend(&spec, width);
    if (c.precision >= 0) absl::StrAppend(&spec, ".", c.precision);
    absl::StrAppend(&spec, size, std::string(1, kind));
    std::string out(static_cast<size_t>(std::snprintf(nullptr, 0, spec.c_str(), number)), '\0');
    std::snprintf(out.data(), out.size() + 1, spec.c_str(), number);
    return out;
  };
  if (!integer) return print(c.flags, c.width, "", c.kind, value.as_double());
  const int64_t n =
      value.is_float() ? static_cast<int64_t>(std::clamp(value.as_double(), -9e18, 9e18)) : value.as_int();
  if (!digits) return print(c.flags, c.width, "ll", 'd', static_cast<long long>(n));
  const char* sign = n < 0                               ? "-"
                     : c.flags.find('+') != c.flags.npos ? "+"
                     : c.flags.find(' ') != c.flags.npos ? " "
                                                         : "";
  const uint64_t magnitude = n < 0 ? 0 - static_cast<uint64_t>(n) : static_cast<uint64_t>(n);
  std::string flags;
  for (const char flag : c.flags) {
    if (flag == '#' || flag == '0') flags.push_back(flag);
  }
  const bool zeros = flags.find('0') != flags.npos && c.flags.find('-') == c.flags.npos;
  if (!zeros) std::erase(flags, '0');
  const auto sign_size = static_cast<int>(std::strlen(sign));
  const std::string text = absl::StrCat(sign, print(flags, zeros ? c.width - sign_size : 0, "ll", c.kind,
                                                    static_cast<unsigned long long>(magnitude)));
  return Aligned(in, Text::Trusted(text), {c.flags, c.width, -1, 's'}).str();
}

}  // namespace

Text PercentFormat(Interpreter& in, const Text& format, const std::vector<Value>& args, bool all_used) {
  const std::string& source = format.str();
  Text out;
  size_t used = 0;
  for (size_t at = 0; at < source.size();) {
    const size_t percent = std::min(source.find('%', at), source.size());
    out.Append(format, at, percent);
    if (percent == source.size()) break;
    at = percent + 1;
    const Conversion c = ReadConversion(source, at);
    if (c.kind == '%') {
      out.Append(format, percent, percent + 1);
      continue;
    }
    if (!Has("srdiuxXofFeEgG", c.kind)) {
      Fail("ValueError", absl::StrCat("unsupported format character '", std::string(1, c.kind), "'"));
    }
    if (used >= args.size()) TypeError("not enough arguments for format string");
    const Value& value = args[used++];
    if (c.kind == 's' || c.kind == 'r') {
      out.Append(Aligned(in, c.kind == 's' ? in.Str(value) : Repr(value, in.budget()), c));
    } else {
      value.Require();
      out.Append(Text::Of(FormatNumber(in, c, value), value.is_data()));
    }
    if (out.cost() > in.options().output_bytes_max) in.budget().Allocate(out.cost());
  }
  if (all_used && used < args.size()) TypeError("not all arguments converted during string formatting");
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
      in.budget().Read(object.str().size());
      return fn(in, object.text(), args);
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
    method = MakeFn(
        name,
        [object, name](Interpreter& in, Args& args) {
          Loop& loop = object.loop();
          if (name == "cycle") {
            if (args.positional.empty()) TypeError("no items for cycling given");
            return args.positional[loop.at % args.positional.size()];
          }
          const Value now = Value::MakeSeq(SeqKind::kTuple, args.positional);
          const bool same = !loop.last_changed.empty() && Equal(loop.last_changed[0], now, in.budget());
          if (loop.last_changed.empty()) in.KeepChanged(object);
          loop.last_changed = {now};
          return Value(!same);
        },
        object.depth() + 1);
    return true;
  }
  return false;
}

}  // namespace tidepool::jinja
