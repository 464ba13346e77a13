#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "server/model/template/jinja_text.h"

// Values of the template engine: Python's, as far as Jinja2's immutable sandbox lets a template see them.
// Internal to the engine, which reports errors by throwing Failure; ChatTemplate catches it and nothing else
// ever sees one.
namespace tidepool::jinja {

// An error of the template, or a limit that it ran into.
struct Failure {
  enum Kind { kTemplate, kLimit } kind;
  std::string type;  // Python's exception type
  std::string message;
};

[[noreturn]] void Fail(std::string type, std::string message);
[[noreturn]] void TypeError(std::string message);

// Deepest nesting of lists and mappings: they are printed, compared and freed by recursion.
inline constexpr int kNestingMax = 128;
// Raises where `depth` is above it.
void CheckDepth(int depth);

class Value;
struct Args;
class Interpreter;

// Budget: what one rendering may use up: steps, memory and processor time of the calling thread. Charged
// by everything whose work grows with its operands.
class Budget {
 public:
  struct Limits {
    uint64_t steps_max;
    uint64_t alloc_bytes_max;
    size_t single_bytes_max;  // of one object
    absl::Duration time_max;
  };

  explicit Budget(const Limits& limits);
  // Each raises a Failure of kind kLimit.
  void Step(uint64_t n = 1) {
    if (n >= steps_to_check_) {
      Check(n);
    } else {
      steps_to_check_ -= n;
    }
  }
  void Allocate(uint64_t bytes);
  // Work in proportion to the bytes of a text: a step for each 64.
  void Read(size_t bytes) { Step(bytes / 64 + 1); }

 private:
  void Check(uint64_t n);

  const Limits limits_;
  uint64_t steps_left_;      // beyond those of steps_to_check_
  uint64_t steps_to_check_;  // until the next look at the clock
  uint64_t alloc_left_;
  int64_t time_end_ns_;
};

// Memory of a string value beside its bytes.
inline constexpr size_t kStringOverhead = 96;

enum class SeqKind : uint8_t { kList, kTuple, kRange, kGenerator, kDictItems, kDictKeys, kDictValues };

struct Seq {
  SeqKind kind = SeqKind::kList;
  bool consumed = false;  // a generator gives its items once
  int depth = 1;
  std::vector<Value> items;
  // kRange: start, stop and step as range() was given them; absent for a slice of one.
  std::optional<std::array<int64_t, 3>> range;
};

struct Dict;
struct Loop;

struct Callable {
  std::string name;
  int depth = 0;  // of the value that a bound method belongs to, and one more
  std::function<Value(Interpreter&, Args&)> call;
};

struct UndefinedInfo {
  std::string type;     // UndefinedError or SecurityError
  std::string message;  // of the error that using it raises
};

class Value {
 public:
  struct None {};
  using Undefined = std::shared_ptr<const UndefinedInfo>;
  using String = std::shared_ptr<const Text>;
  struct Namespace {
    std::shared_ptr<Dict> members;
  };

  Value() : v_(None{}) {}
  Value(bool b) : v_(b) {}     // NOLINT: implicit on purpose, as are the next ones
  Value(int64_t i) : v_(i) {}  // NOLINT
  Value(double d) : v_(d) {}   // NOLINT
  Value(Text s) : v_(std::make_shared<const Text>(std::move(s))) {}  // NOLINT
  // Our own literals.
  Value(const char* s) : Value(Text::Trusted(s)) {}               // NOLINT
  Value(std::shared_ptr<Seq> s) : v_(std::move(s)) {}             // NOLINT
  Value(std::shared_ptr<const Dict> d) : v_(std::move(d)) {}      // NOLINT
  Value(Namespace n) : v_(std::move(n)) {}                        // NOLINT
  Value(std::shared_ptr<const Callable> c) : v_(std::move(c)) {}  // NOLINT
  Value(std::shared_ptr<Loop> l) : v_(std::move(l)) {}            // NOLINT

  static Value MakeUndefined(std::string message, std::string type = "UndefinedError");
  // Raises when nested deeper than kNestingMax.
  static Value MakeSeq(SeqKind kind, std::vector<Value> items);
  static Value MakeList(std::vector<Value> items) { return MakeSeq(SeqKind::kList, std::move(items)); }
  static Value MakeDict(Dict dict);
  // `data`: it came with the request, and so did all that it holds.
  static Value FromJson(const nlohmann::ordered_json& json, bool data, int depth = 0);

  bool is_undefined() const { return std::holds_alternative<Undefined>(v_); }
  bool is_none() const { return std::holds_alternative<None>(v_); }
  bool is_bool() const { return std::holds_alternative<bool>(v_); }
  bool is_int() const { return std::holds_alternative<int64_t>(v_); }  // not bool
  bool is_float() const { return std::holds_alternative<double>(v_); }
  bool is_number() const { return is_bool() || is_int() || is_float(); }
  bool is_integral() const { return is_bool() || is_int(); }
  bool is_string() const { return std::holds_alternative<String>(v_); }
  bool is_dict() const { return std::holds_alternative<std::shared_ptr<const Dict>>(v_); }
  bool is_seq() const { return std::holds_alternative<std::shared_ptr<Seq>>(v_); }
  bool is_seq(SeqKind kind) const { return is_seq() && seq().kind == kind; }
  bool is_namespace() const { return std::holds_alternative<Namespace>(v_); }
  bool is_callable() const { return std::holds_alternative<std::shared_ptr<const Callable>>(v_); }
  bool is_loop() const { return std::holds_alternative<std::shared_ptr<Loop>>(v_); }

  bool as_bool() const { return std::get<bool>(v_); }
  int64_t as_int() const { return is_bool() ? as_bool() : std::get<int64_t>(v_); }  // bool or int
  double as_double() const { return is_float() ? std::get<double>(v_) : static_cast<double>(as_int()); }
  const Text& text() const { return *std::get<String>(v_); }
  const std::string& str() const { return text().str(); }  // text()'s bytes
  Seq& seq() const { return *std::get<std::shared_ptr<Seq>>(v_); }
  const Dict& dict() const { return *std::get<std::shared_ptr<const Dict>>(v_); }
  const Namespace& ns() const { return std::get<Namespace>(v_); }
  const Callable& callable() const { return *std::get<std::shared_ptr<const Callable>>(v_); }
  Loop& loop() const { return *std::get<std::shared_ptr<Loop>>(v_); }
  const UndefinedInfo& undefined() const { return *std::get<Undefined>(v_); }

  // Raises the error that an undefined value stands for.
  [[noreturn]] void RaiseUndefined() const;
  // Raises if undefined.
  void Require() const {
    if (is_undefined()) RaiseUndefined();
  }

  // A string that counts as escaped already (`| safe`): what is added to it is escaped. As markupsafe's
  // Markup, but only `+` and the filters that make one keep the mark.
  static Value Safe(Text text) {
    Value value(std::move(text));
    value.safe_ = true;
    return value;
  }
  bool is_safe() const { return safe_; }

  // Comes from the request: a string with such bytes, or any other value that does (then it prints as data).
  // What a template works out about data, as a length, an index or a comparison, does not.
  bool is_data() const { return is_string() ? text().has_data() : data_; }
  // Marks a value that is no string; a string's text carries its marks itself.
  Value&& MarkedIf(bool data) && {
    data_ = data_ || data;
    return std::move(*this);
  }

  bool Truthy() const;
  const char* TypeName() const;  // Python's
  int depth() const;

 private:
  std::variant<None, Undefined, bool, int64_t, double, String, std::shared_ptr<Seq>,
               std::shared_ptr<const Dict>, Namespace, std::shared_ptr<const Callable>, std::shared_ptr<Loop>>
      v_;
  bool safe_ = false;
  bool data_ = false;
};

// A mapping in insertion order.
struct Dict {
  std::vector<std::pair<Value, Value>> entries;
  absl::flat_hash_map<std::string, size_t> index;   // of the keys that are strings
  absl::flat_hash_map<std::string, size_t> others;  // of the rest, by HashKey
  int depth = 1;

  // Raise for unhashable keys.
  const Value* Find(const Value& key, Budget& budget) const;
  void Set(Value key, Value value, Budget& budget);
  // String keys. Set: whether the key is new.
  const Value* Find(std::string_view key) const;
  bool Set(Text key, Value value);
};

// The `loop` variable of one running loop.
struct Loop {
  std::vector<Value> items;
  size_t at = 0;
  int depth = 1;    // of loops in loops
  int nesting = 1;  // as Value::depth
  std::vector<Value> last_changed;
};

struct KeywordArg {
  std::string name;
  Value value;
  bool data = false;  // the name came out of a mapping of the request: f(**tool)
};

struct Args {
  std::vector<Value> positional;
  std::vector<KeywordArg> keyword;

  const Value* Keyword(std::string_view name) const;
  // Positional argument `i`, else keyword `name`, else nullptr.
  const Value* Get(size_t i, std::string_view name) const;
};

// str(value) and repr(value).
Text ToStr(const Value& value, Budget& budget);
Text Repr(const Value& value, Budget& budget);
std::string ReprFloat(double d);

struct JsonStyle {
  bool ensure_ascii = false;
  bool sort_keys = false;
  bool pretty = false;  // indent was given
  std::string indent;
  std::string item_separator = ", ", key_separator = ": ";
};
// json.dumps(value). The style's own strings count as trusted.
Text ToJson(const Value& value, const JsonStyle& style, Budget& budget);

// As HTML: & < > " ' escaped.
std::string EscapeHtml(std::string_view text);

bool Equal(const Value& a, const Value& b, Budget& budget);
// -1, 0, 1; raises TypeError for values without an order. `op` is for its message.
int Compare(const Value& a, const Value& b, const char* op, Budget& budget);

// The items that iterating gives (a generator is used up). Raises TypeError.
std::vector<Value> Iterate(const Value& value, Budget& budget);
// len(value). Raises TypeError.
int64_t Length(const Value& value);
bool Contains(const Value& container, const Value& item, Budget& budget);

}  // namespace tidepool::jinja
