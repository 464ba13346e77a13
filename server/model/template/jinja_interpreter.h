#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "server/model/template/jinja_ast.h"
#include "server/model/template/jinja_value.h"

namespace tidepool::jinja {

// One level of variables. `for`, macros, `with` and block bodies open one; `if` does not.
struct Scope {
  std::shared_ptr<Scope> parent;
  absl::flat_hash_map<std::string, Value> variables;
};

// Interpreter: one rendering of one template. Owned by one thread; throws Failure.
class Interpreter {
 public:
  struct Options {
    uint64_t steps_max;
    size_t output_bytes_max;
    uint64_t alloc_bytes_max;
    int depth_max;
    absl::Duration time_max;  // of the thread's processor time
    absl::Time now;
    absl::TimeZone zone;
  };

  Interpreter(const Options& options, std::shared_ptr<Scope> root);
  ~Interpreter();
  Interpreter(const Interpreter&) = delete;
  Interpreter& operator=(const Interpreter&) = delete;

  MarkedText Run(const Template& parsed);

  // What the builtins use.
  Budget& budget() { return budget_; }
  const Options& options() const { return options_; }
  Text Str(const Value& value) { return ToStr(value, budget_); }
  Value Call(const Value& callee, Args& args);
  Value GetAttr(const Value& object, const std::string& name);
  Value GetItem(const Value& object, const Value& key);
  Value ApplyFilter(const std::string& name, const Value& input, Args& args);
  bool ApplyTest(const std::string& name, const Value& input, Args& args);
  Value MakeNamespace(Dict members);
  // For a loop whose `changed` is called: what it remembers is forgotten when the rendering ends.
  void KeepChanged(const Value& loop);
  // Charges a string to the budget and wraps it.
  Value Made(Text text) {
    budget_.Allocate(text.cost() + kStringOverhead);
    return Value(std::move(text));
  }
  // The line being evaluated, for errors.
  int line() const { return line_; }

 private:
  enum class Signal { kNone, kBreak, kContinue };
  struct Depth;

  Signal Exec(const Block& block, const std::shared_ptr<Scope>& scope, Text& out);
  Signal ExecOne(const Stmt& stmt, const std::shared_ptr<Scope>& scope, Text& out);
  Signal ExecFor(const Stmt& stmt, const std::shared_ptr<Scope>& scope, Text& out);
  void Print(const Value& value, Text& out);
  Text Capture(const Block& block, const std::shared_ptr<Scope>& scope);
  // Room for `bytes` more in `out`; raises when the output grows too long.
  void CheckOutput(size_t bytes, const Text& out);
  void Assign(const Target& target, const Value& value, const std::shared_ptr<Scope>& scope);
  Value MakeMacro(const std::string& name, const Stmt& stmt, const std::shared_ptr<Scope>& scope);
  Value RunMacro(const std::string& name, const Stmt& stmt, const std::shared_ptr<Scope>& scope, Args& args);

  Value Eval(const Expr& expr, const std::shared_ptr<Scope>& scope);
  Value EvalFilter(const Expr& expr, const std::shared_ptr<Scope>& scope, const Value* body);
  Args EvalArgs(const CallArgs& args, const std::shared_ptr<Scope>& scope);
  Value Lookup(const std::string& name, const Scope* scope) const;
  Value Binary(const std::string& op, const Value& left, const Value& right);
  Value Add(const Value& left, const Value& right);  // two strings
  Value Repeat(const Value& what, int64_t times);
  Value Slice(const Expr& expr, const std::shared_ptr<Scope>& scope);
  bool CompareOp(const std::string& op, const Value& left, const Value& right);

  Options options_;
  Budget budget_;
  std::shared_ptr<Scope> root_;
  int depth_ = 0;
  int line_ = 0;
  // A macro holds its scope, which holds the macro; a namespace may hold itself. Both are taken apart at the
  // end.
  std::vector<std::shared_ptr<Scope>> captured_;
  std::vector<std::shared_ptr<Dict>> namespaces_;
  std::vector<Value> changed_;  // loops that remember a value, which may be or hold themselves
};

// The built-in filters, tests, functions and methods (jinja_builtins.cc).
using FilterFn = Value (*)(Interpreter&, const Value& input, Args& args);
using TestFn = bool (*)(Interpreter&, const Value& input, Args& args);
FilterFn FindFilter(std::string_view name);
TestFn FindTest(std::string_view name);
// nullptr if there is no such global.
const Value* FindGlobal(std::string_view name);
// The bound method `name` of a string, list, tuple or mapping; undefined with a SecurityError for those that
// change it; false if there is none.
bool FindMethod(const Value& object, const std::string& name, Value& method);
// printf-style formatting: `format % args`. `all_used`: arguments that are left over are an error.
Text PercentFormat(Interpreter& in, const Text& format, const std::vector<Value>& args, bool all_used);
}  // namespace tidepool::jinja
