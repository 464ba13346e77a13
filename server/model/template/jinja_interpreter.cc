#include "server/model/template/jinja_interpreter.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "absl/strings/str_cat.h"
#include "server/model/strings/utf8.h"

namespace tidepool::jinja {

// Counts nested evaluations: the C++ stack is what they use up.
struct Interpreter::Depth {
  explicit Depth(Interpreter& i) : in(i) {
    if (++in.depth_ > in.options_.depth_max) {
      throw Failure{Failure::kLimit, "RecursionError",
                    absl::StrCat("evaluation nested more than ", in.options_.depth_max, " deep")};
    }
  }
  ~Depth() { --in.depth_; }
  Interpreter& in;
};

namespace {

std::string ObjectName(const Value& object) {
  return object.is_none() ? "None" : absl::StrCat(object.TypeName(), " object");
}

std::shared_ptr<Scope> Child(const std::shared_ptr<Scope>& parent) {
  auto scope = std::make_shared<Scope>();
  scope->parent = parent;
  return scope;
}

[[noreturn]] void Unsupported(const std::string& op, const Value& left, const Value& right) {
  left.Require();
  right.Require();
  if (op == "+" && (left.is_string() || left.is_seq(SeqKind::kList) || left.is_seq(SeqKind::kTuple))) {
    TypeError(absl::StrCat("can only concatenate ", left.TypeName(), " (not \"", right.TypeName(), "\") to ",
                           left.TypeName()));
  }
  TypeError(absl::StrCat("unsupported operand type(s) for ", op == "**" ? "** or pow()" : op, ": '",
                         left.TypeName(), "' and '", right.TypeName(), "'"));
}

[[noreturn]] void Overflow() { Fail("OverflowError", "integer beyond 64 bits"); }

int64_t FloorDiv(int64_t a, int64_t b) {
  if (a == INT64_MIN && b == -1) Overflow();
  const int64_t q = a / b;
  return (a % b != 0 && (a < 0) != (b < 0)) ? q - 1 : q;
}

int64_t FloorMod(int64_t a, int64_t b) {
  if (b == -1) return 0;
  const int64_t r = a % b;
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}

int64_t IntPower(int64_t base, int64_t exponent) {
  int64_t result = 1;
  while (exponent > 0) {
    if ((exponent & 1) != 0 && __builtin_mul_overflow(result, base, &result)) Overflow();
    exponent >>= 1;
    if (exponent > 0 && __builtin_mul_overflow(base, base, &base)) Overflow();
  }
  return result;
}

Value IntOp(const std::string& op, int64_t a, int64_t b) {
  int64_t r = 0;
  if (op == "+") {
    if (__builtin_add_overflow(a, b, &r)) Overflow();
    return Value(r);
  }
  if (op == "-") {
    if (__builtin_sub_overflow(a, b, &r)) Overflow();
    return Value(r);
  }
  if (op == "*") {
    if (__builtin_mul_overflow(a, b, &r)) Overflow();
    return Value(r);
  }
  if (op == "**") {
    if (b < 0) return Value(std::pow(static_cast<double>(a), static_cast<double>(b)));
    return Value(IntPower(a, b));
  }
  if (b == 0) {
    Fail("ZeroDivisionError", op == "/" ? "division by zero" : "integer division or modulo by zero");
  }
  if (op == "/") return Value(static_cast<double>(a) / static_cast<double>(b));
  if (op == "//") return Value(FloorDiv(a, b));
  return Value(FloorMod(a, b));
}

Value FloatOp(const std::string& op, double a, double b) {
  if (op == "+") return Value(a + b);
  if (op == "-") return Value(a - b);
  if (op == "*") return Value(a * b);
  if (op == "**") return Value(std::pow(a, b));
  if (b == 0) Fail("ZeroDivisionError", op == "/" ? "float division by zero" : "float modulo");
  if (op == "/") return Value(a / b);
  if (op == "//") return Value(std::floor(a / b));
  const double r = std::fmod(a, b);
  return Value(r != 0 && (r < 0) != (b < 0) ? r + b : r);
}

}  // namespace

Interpreter::Interpreter(const Options& options, std::shared_ptr<Scope> root)
    : options_(options),
      budget_({.steps_max = options.steps_max,
               .alloc_bytes_max = options.alloc_bytes_max,
               .single_bytes_max = options.output_bytes_max,
               .time_max = options.time_max}),
      root_(std::move(root)) {}

Interpreter::~Interpreter() {
  for (const auto& members : namespaces_) {
    members->index.clear();
    members->entries.clear();
  }
  for (const auto& scope : captured_) scope->variables.clear();
  for (const Value& loop : changed_) loop.loop().last_changed.clear();
}

MarkedText Interpreter::Run(const Template& parsed) {
  Text out;
  try {
    Exec(parsed.body, Child(root_), out);
  } catch (Failure& failure) {
    failure.message = absl::StrCat("line ", line_, ": ", failure.type, ": ", failure.message);
    throw;
  }
  return std::move(out).Release();
}

Value Interpreter::MakeNamespace(Dict members) {
  budget_.Allocate(sizeof(Dict));
  namespaces_.push_back(std::make_shared<Dict>(std::move(members)));
  return Value(Value::Namespace{namespaces_.back()});
}

void Interpreter::KeepChanged(const Value& loop) {
  budget_.Allocate(sizeof(Value));
  changed_.push_back(loop);
}

void Interpreter::CheckOutput(size_t bytes, const Text& out) {
  if (bytes > options_.output_bytes_max - std::min(out.size(), options_.output_bytes_max)) {
    throw Failure{Failure::kLimit, "LimitError",
                  absl::StrCat("output of more than ", options_.output_bytes_max, " bytes")};
  }
  budget_.Allocate(bytes + sizeof(ByteRange));
}

void Interpreter::Print(const Value& value, Text& out) {
  if (value.is_string()) {
    CheckOutput(value.text().cost(), out);
    out.Append(value.text());
  } else {
    const Text text = Str(value);
    CheckOutput(text.cost(), out);
    out.Append(text);
  }
}

Text Interpreter::Capture(const Block& block, const std::shared_ptr<Scope>& scope) {
  Text text;
  Exec(block, scope, text);
  return text;
}

Interpreter::Signal Interpreter::Exec(const Block& block, const std::shared_ptr<Scope>& scope, Text& out) {
  Depth depth(*this);
  for (const auto& stmt : block) {
    budget_.Step();
    line_ = stmt->line;
    if (const Signal signal = ExecOne(*stmt, scope, out); signal != Signal::kNone) return signal;
  }
  return Signal::kNone;
}

Interpreter::Signal Interpreter::ExecOne(const Stmt& stmt, const std::shared_ptr<Scope>& scope, Text& out) {
  switch (stmt.kind) {
    case StmtKind::kText:
      CheckOutput(stmt.text.size(), out);
      out.AppendTrusted(stmt.text);
      break;
    case StmtKind::kOutput: {
      Print(Eval(*stmt.expr, scope), out);
      break;
    }
    case StmtKind::kIf:
      for (const auto& [condition, body] : stmt.branches) {
        if (condition == nullptr || Eval(*condition, scope).Truthy()) return Exec(body, scope, out);
      }
      break;
    case StmtKind::kFor:
      return ExecFor(stmt, scope, out);
    case StmtKind::kSet:
      Assign(stmt.target, Eval(*stmt.expr, scope), scope);
      break;
    case StmtKind::kSetBlock: {
      Value value = Made(Capture(stmt.body, Child(scope)));
      if (stmt.filter != nullptr) value = EvalFilter(*stmt.filter, scope, &value);
      Assign(stmt.target, value, scope);
      break;
    }
    case StmtKind::kMacro:
      scope->variables.insert_or_assign(stmt.name, MakeMacro(stmt.name, stmt, scope));
      break;
    case StmtKind::kCallBlock: {
      const Value callee = Eval(*stmt.expr->items[0], scope);
      Args args = EvalArgs(stmt.expr->args, scope);
      args.keyword.push_back({"caller", MakeMacro("caller", stmt, scope)});
      Print(Call(callee, args), out);
      break;
    }
    case StmtKind::kFilterBlock: {
      const Value body = Made(Capture(stmt.body, Child(scope)));
      Print(EvalFilter(*stmt.filter, scope, &body), out);
      break;
    }
    case StmtKind::kWith: {
      const auto inner = Child(scope);
      for (const auto& [target, expr] : stmt.assignments) Assign(target, Eval(*expr, scope), inner);
      return Exec(stmt.body, inner, out);
    }
    case StmtKind::kGeneration:
      return Exec(stmt.body, Child(scope), out);
    case StmtKind::kBreak:
      return Signal::kBreak;
    case StmtKind::kContinue:
      return Signal::kContinue;
  }
  return Signal::kNone;
}

Interpreter::Signal Interpreter::ExecFor(const Stmt& stmt, const std::shared_ptr<Scope>& scope, Text& out) {
  auto loop = std::make_shared<Loop>();
  loop->items = Iterate(Eval(*stmt.expr, scope), budget_);
  if (const Value outer = Lookup("loop", scope.get()); outer.is_loop()) loop->depth = outer.loop().depth + 1;
  if (stmt.condition != nullptr) {
    std::vector<Value> kept;
    for (Value& item : loop->items) {
      budget_.Step();
      const auto inner = Child(scope);
      Assign(stmt.target, item, inner);
      if (Eval(*stmt.condition, inner).Truthy()) kept.push_back(std::move(item));
    }
    loop->items = std::move(kept);
  }
  for (const Value& item : loop->items) loop->nesting = std::max(loop->nesting, item.depth() + 1);
  CheckDepth(loop->nesting);
  if (loop->items.empty()) return Exec(stmt.otherwise, Child(scope), out);
  for (; loop->at < loop->items.size(); ++loop->at) {
    budget_.Step();
    const auto inner = Child(scope);
    inner->variables.emplace("loop", Value(loop));
    Assign(stmt.target, loop->items[loop->at], inner);
    if (Exec(stmt.body, inner, out) == Signal::kBreak) break;
  }
  return Signal::kNone;
}

void Interpreter::Assign(const Target& target, const Value& value, const std::shared_ptr<Scope>& scope) {
  switch (target.kind) {
    case Target::kName:
      scope->variables.insert_or_assign(target.name, value);
      return;
    case Target::kAttr: {
      const Value object = Lookup(target.name, scope.get());
      if (!object.is_namespace()) {
        Fail("TemplateRuntimeError", "cannot assign attribute on non-namespace object");
      }
      object.ns().members->Set(Text::Trusted(target.attribute), value);
      return;
    }
    case Target::kTuple: {
      if (!value.is_seq() && !value.is_dict() && !value.is_string()) {
        value.Require();
        TypeError(absl::StrCat("cannot unpack non-iterable ", value.TypeName(), " object"));
      }
      const std::vector<Value> parts = Iterate(value, budget_);
      if (parts.size() > target.parts.size()) {
        Fail("ValueError", absl::StrCat("too many values to unpack (expected ", target.parts.size(), ")"));
      }
      if (parts.size() < target.parts.size()) {
        Fail("ValueError", absl::StrCat("not enough values to unpack (expected ", target.parts.size(),
                                        ", got ", parts.size(), ")"));
      }
      for (size_t i = 0; i < parts.size(); ++i) Assign(target.parts[i], parts[i], scope);
      return;
    }
  }
}

Value Interpreter::MakeMacro(const std::string& name, const Stmt& stmt, const std::shared_ptr<Scope>& scope) {
  budget_.Allocate(sizeof(Callable) + sizeof(Scope));
  if (captured_.empty() || captured_.back() != scope) captured_.push_back(scope);
  auto callable = std::make_shared<Callable>();
  callable->name = name;
  const Stmt* body = &stmt;
  callable->call = [name, body, scope](Interpreter& in, Args& args) {
    return in.RunMacro(name, *body, scope, args);
  };
  return Value(std::shared_ptr<const Callable>(std::move(callable)));
}

Value Interpreter::RunMacro(const std::string& name, const Stmt& stmt, const std::shared_ptr<Scope>& scope,
                            Args& args) {
  const int call_line = line_;
  const auto inner = Child(scope);
  size_t used = 0;
  std::vector<bool> taken(args.keyword.size());
  for (const Param& param : stmt.params) {
    const Value* given = nullptr;
    if (used < args.positional.size()) {
      given = &args.positional[used++];
    } else {
      for (size_t k = 0; k < args.keyword.size(); ++k) {
        if (args.keyword[k].name != param.name) continue;
        given = &args.keyword[k].value;
        taken[k] = true;
      }
    }
    Value value;
    if (given != nullptr) {
      value = *given;
    } else if (param.fallback != nullptr) {
      value = Eval(*param.fallback, inner);
    } else {
      value = Value::MakeUndefined(absl::StrCat("parameter '", param.name, "' was not provided"));
    }
    inner->variables.insert_or_assign(param.name, std::move(value));
  }
  std::vector<Value> rest(args.positional.begin() + static_cast<ptrdiff_t>(used), args.positional.end());
  Dict more;
  bool caller = false;
  for (size_t k = 0; k < args.keyword.size(); ++k) {
    if (taken[k]) continue;
    const KeywordArg& arg = args.keyword[k];
    if (arg.name == "caller") {
      inner->variables.insert_or_assign("caller", arg.value);
      caller = true;
    } else {
      more.Set(Text::Of(arg.name, arg.data), arg.value);
    }
  }
  if (!caller && name != "caller") {
    inner->variables.insert_or_assign("caller", Value::MakeUndefined("No caller defined"));
  }
  inner->variables.insert_or_assign("varargs", Value::MakeSeq(SeqKind::kTuple, std::move(rest)));
  inner->variables.insert_or_assign("kwargs", Value::MakeDict(std::move(more)));
  Value result = Made(Capture(stmt.body, inner));
  line_ = call_line;
  return result;
}

Value Interpreter::Lookup(const std::string& name, const Scope* scope) const {
  for (; scope != nullptr; scope = scope->parent.get()) {
    const auto it = scope->variables.find(name);
    if (it != scope->variables.end()) return it->second;
  }
  if (const Value* global = FindGlobal(name)) return *global;
  return Value::MakeUndefined(absl::StrCat("'", name, "' is undefined"));
}

Args Interpreter::EvalArgs(const CallArgs& args, const std::shared_ptr<Scope>& scope) {
  Args result;
  for (const auto& arg : args.positional) result.positional.push_back(Eval(*arg, scope));
  for (const auto& [name, arg] : args.keyword) result.keyword.push_back({name, Eval(*arg, scope)});
  if (args.star != nullptr) {
    for (Value& value : Iterate(Eval(*args.star, scope), budget_))
      result.positional.push_back(std::move(value));
  }
  if (args.star_star != nullptr) {
    const Value more = Eval(*args.star_star, scope);
    if (!more.is_dict()) TypeError("argument after ** must be a mapping");
    for (const auto& [key, value] : more.dict().entries) {
      if (!key.is_string()) TypeError("keywords must be strings");
      result.keyword.push_back({key.str(), value, key.is_data()});
    }
  }
  return result;
}

Value Interpreter::Eval(const Expr& expr, const std::shared_ptr<Scope>& scope) {
  Depth depth(*this);
  budget_.Step();
  switch (expr.kind) {
    case ExprKind::kConst:
      return expr.value;
    case ExprKind::kName:
      return Lookup(expr.name, scope.get());
    case ExprKind::kList:
    case ExprKind::kTuple: {
      std::vector<Value> items;
      budget_.Allocate(expr.items.size() * sizeof(Value));
      for (const auto& item : expr.items) items.push_back(Eval(*item, scope));
      return Value::MakeSeq(expr.kind == ExprKind::kList ? SeqKind::kList : SeqKind::kTuple,
                            std::move(items));
    }
    case ExprKind::kDict: {
      Dict dict;
      budget_.Allocate(expr.items.size() * sizeof(Value));
      for (size_t i = 0; i + 1 < expr.items.size(); i += 2) {
        Value key = Eval(*expr.items[i], scope);
        dict.Set(std::move(key), Eval(*expr.items[i + 1], scope), budget_);
      }
      return Value::MakeDict(std::move(dict));
    }
    case ExprKind::kAttr:
      return GetAttr(Eval(*expr.items[0], scope), expr.name);
    case ExprKind::kItem: {
      const Value object = Eval(*expr.items[0], scope);
      return GetItem(object, Eval(*expr.items[1], scope));
    }
    case ExprKind::kSlice:
      return Slice(expr, scope);
    case ExprKind::kCall: {
      const Value callee = Eval(*expr.items[0], scope);
      Args args = EvalArgs(expr.args, scope);
      line_ = expr.line;
      return Call(callee, args);
    }
    case ExprKind::kFilter:
      return EvalFilter(expr, scope, nullptr);
    case ExprKind::kTest: {
      const Value input = Eval(*expr.items[0], scope);
      Args args = EvalArgs(expr.args, scope);
      return Value(ApplyTest(expr.name, input, args));
    }
    case ExprKind::kUnary: {
      const Value value = Eval(*expr.items[0], scope);
      if (expr.name == "not") return Value(!value.Truthy());
      value.Require();
      const bool data = value.is_data();
      if (value.is_float()) {
        return Value(expr.name == "-" ? -value.as_double() : value.as_double()).MarkedIf(data);
      }
      if (!value.is_integral()) {
        TypeError(absl::StrCat("bad operand type for unary ", expr.name, ": '", value.TypeName(), "'"));
      }
      return (expr.name == "-" ? IntOp("-", 0, value.as_int()) : Value(value.as_int())).MarkedIf(data);
    }
    case ExprKind::kBinary: {
      Value left = Eval(*expr.items[0], scope);
      if (expr.name == "and") return left.Truthy() ? Eval(*expr.items[1], scope) : left;
      if (expr.name == "or") return left.Truthy() ? left : Eval(*expr.items[1], scope);
      const Value right = Eval(*expr.items[1], scope);
      line_ = expr.line;
      return Binary(expr.name, left, right);
    }
    case ExprKind::kConcat: {
      Text text;
      for (const auto& item : expr.items) {
        const Value value = Eval(*item, scope);
        if (value.is_string()) {
          text.Append(value.text());
        } else {
          text.Append(Str(value));
        }
        if (text.cost() > options_.output_bytes_max) break;  // Made raises it
      }
      return Made(std::move(text));
    }
    case ExprKind::kCompare: {
      Value left = Eval(*expr.items[0], scope);
      for (size_t i = 0; i < expr.names.size(); ++i) {
        Value right = Eval(*expr.items[i + 1], scope);
        line_ = expr.line;
        if (!CompareOp(expr.names[i], left, right)) return Value(false);
        left = std::move(right);
      }
      return Value(true);
    }
    case ExprKind::kCond:
      if (Eval(*expr.items[0], scope).Truthy()) return Eval(*expr.items[1], scope);
      if (expr.items[2] != nullptr) return Eval(*expr.items[2], scope);
      return Value::MakeUndefined(
          "the inline if-expression evaluated to false and no else section was defined.");
  }
  return Value();
}

Value Interpreter::EvalFilter(const Expr& expr, const std::shared_ptr<Scope>& scope, const Value* body) {
  Depth depth(*this);
  Value input;
  if (expr.items[0] == nullptr) {
    input = body == nullptr ? Value() : *body;
  } else if (body != nullptr && expr.items[0]->kind == ExprKind::kFilter) {
    input = EvalFilter(*expr.items[0], scope, body);
  } else {
    input = Eval(*expr.items[0], scope);
  }
  Args args = EvalArgs(expr.args, scope);
  line_ = expr.line;
  return ApplyFilter(expr.name, input, args);
}

Value Interpreter::ApplyFilter(const std::string& name, const Value& input, Args& args) {
  const FilterFn filter = FindFilter(name);
  if (filter == nullptr) Fail("TemplateRuntimeError", absl::StrCat("No filter named '", name, "' found."));
  if (input.is_string()) budget_.Read(input.str().size());
  Value result = filter(*this, input, args);
  // What is made of a list or a mapping of the request prints as data: its brackets too.
  const bool container = result.is_seq() || result.is_dict();
  return std::move(result).MarkedIf(container && input.is_data());
}

bool Interpreter::ApplyTest(const std::string& name, const Value& input, Args& args) {
  const TestFn test = FindTest(name);
  if (test == nullptr) Fail("TemplateRuntimeError", absl::StrCat("No test named '", name, "' found."));
  if (input.is_string()) budget_.Read(input.str().size());
  return test(*this, input, args);
}

bool Interpreter::CompareOp(const std::string& op, const Value& left, const Value& right) {
  if (op == "==") return Equal(left, right, budget_);
  if (op == "!=") return !Equal(left, right, budget_);
  if (op == "in") return Contains(right, left, budget_);
  if (op == "not in") return !Contains(right, left, budget_);
  // NaN is unordered; Compare calls it equal.
  const auto is_nan = [](const Value& v) { return v.is_float() && std::isnan(v.as_double()); };
  const int order = Compare(left, right, op.c_str(), budget_);
  if (is_nan(left) || is_nan(right)) return false;
  if (op == "<") return order < 0;
  if (op == "<=") return order <= 0;
  if (op == ">") return order > 0;
  return order >= 0;
}

Value Interpreter::Add(const Value& left, const Value& right) {
  Text text;
  const bool safe = left.is_safe() || right.is_safe();
  for (const Value* part : {&left, &right}) {
    if (safe && !part->is_safe()) {
      text.Append(Text::Of(EscapeHtml(part->str()), part->is_data()));
    } else {
      text.Append(part->text());
    }
  }
  budget_.Allocate(text.cost() + kStringOverhead);
  return safe ? Value::Safe(std::move(text)) : Value(std::move(text));
}

Value Interpreter::Repeat(const Value& what, int64_t times) {
  const auto n = static_cast<uint64_t>(std::clamp<int64_t>(times, 0, INT32_MAX));
  if (what.is_string()) {
    const Text& source = what.text();
    budget_.Allocate(source.cost() * n + kStringOverhead);
    Text text;
    if (source.empty()) return Value(std::move(text));
    text.Reserve(source.size() * n);
    for (uint64_t i = 0; i < n; ++i) text.Append(source);
    return Value(std::move(text));
  }
  const auto& source = what.seq().items;
  budget_.Allocate(source.size() * n * sizeof(Value));
  std::vector<Value> items;
  if (!source.empty()) {
    for (uint64_t i = 0; i < n; ++i) items.insert(items.end(), source.begin(), source.end());
  }
  return Value::MakeSeq(what.seq().kind, std::move(items)).MarkedIf(what.is_data());
}

Value Interpreter::Binary(const std::string& op, const Value& left, const Value& right) {
  const bool data = left.is_data() || right.is_data();
  if (left.is_integral() && right.is_integral()) {
    return IntOp(op, left.as_int(), right.as_int()).MarkedIf(data);
  }
  if (left.is_number() && right.is_number()) {
    return FloatOp(op, left.as_double(), right.as_double()).MarkedIf(data);
  }
  if (op == "+" && left.is_string() && right.is_string()) return Add(left, right);
  const bool left_seq = left.is_seq(SeqKind::kList) || left.is_seq(SeqKind::kTuple);
  if (op == "+" && left_seq && right.is_seq(left.seq().kind)) {
    std::vector<Value> items = left.seq().items;
    budget_.Allocate((items.size() + right.seq().items.size()) * sizeof(Value));
    items.insert(items.end(), right.seq().items.begin(), right.seq().items.end());
    return Value::MakeSeq(left.seq().kind, std::move(items)).MarkedIf(data);
  }
  if (op == "*" && left.is_integral() && !right.is_integral()) return Binary(op, right, left);
  if (op == "*" && right.is_integral() && (left.is_string() || left_seq)) return Repeat(left, right.as_int());
  if (op == "%" && left.is_string()) {
    const bool tuple = right.is_seq(SeqKind::kTuple);
    // Python takes lists and mappings for a source of named arguments, of which none need be used.
    const bool all_used = tuple || !(right.is_seq() || right.is_dict());
    return Made(
        PercentFormat(*this, left.text(), tuple ? right.seq().items : std::vector<Value>{right}, all_used));
  }
  Unsupported(op, left, right);
}

Value Interpreter::Slice(const Expr& expr, const std::shared_ptr<Scope>& scope) {
  const Value object = Eval(*expr.items[0], scope);
  std::optional<int64_t> bounds[3];
  for (size_t i = 0; i < 3; ++i) {
    if (expr.items[i + 1] == nullptr) continue;
    const Value bound = Eval(*expr.items[i + 1], scope);
    if (bound.is_none()) continue;
    bound.Require();
    if (!bound.is_integral()) TypeError("slice indices must be integers or None or have an __index__ method");
    bounds[i] = bound.as_int();
  }
  object.Require();
  const bool sliceable = object.is_string() || object.is_seq(SeqKind::kList) ||
                         object.is_seq(SeqKind::kTuple) || object.is_seq(SeqKind::kRange);
  if (object.is_dict()) TypeError("unhashable type: 'slice'");
  if (!sliceable) TypeError(absl::StrCat("'", object.TypeName(), "' object is not subscriptable"));

  // Source: CPython, PySlice_AdjustIndices.
  const int64_t step = bounds[2].value_or(1);
  if (step == 0) Fail("ValueError", "slice step cannot be zero");
  const int64_t length = Length(object);
  const auto clip = [&](std::optional<int64_t> bound, int64_t fallback) {
    if (!bound) return fallback;
    int64_t i = *bound;
    if (i < 0 && (i += length) < 0) return step < 0 ? int64_t{-1} : int64_t{0};
    if (i >= length) return step < 0 ? length - 1 : length;
    return i;
  };
  const int64_t start = clip(bounds[0], step < 0 ? length - 1 : 0);
  const int64_t stop = clip(bounds[1], step < 0 ? -1 : length);
  budget_.Step(static_cast<uint64_t>(length) / 16 + 1);

  if (object.is_string() && step == 1) {
    if (start >= stop) return Value("");
    const std::string& text = object.str();
    size_t pos = 0;
    for (int64_t i = 0; i < start; ++i) utf8::Next(text, pos);
    size_t end = pos;
    for (int64_t i = start; i < stop; ++i) utf8::Next(text, end);
    return Made(object.text().Substr(pos, end));
  }
  const std::vector<Value> items = object.is_string() ? Iterate(object, budget_) : object.seq().items;
  std::vector<Value> picked;
  for (int64_t i = start; step > 0 ? i < stop : i > stop;) {
    picked.push_back(items[static_cast<size_t>(i)]);
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  budget_.Allocate(picked.size() * sizeof(Value));
  if (!object.is_string()) {
    return Value::MakeSeq(object.seq().kind, std::move(picked)).MarkedIf(object.is_data());
  }
  Text text;
  for (const Value& c : picked) text.Append(c.text());
  return Made(std::move(text));
}

Value Interpreter::Call(const Value& callee, Args& args) {
  Depth depth(*this);
  callee.Require();
  if (!callee.is_callable()) TypeError(absl::StrCat("'", callee.TypeName(), "' object is not callable"));
  return callee.callable().call(*this, args);
}

Value Interpreter::GetAttr(const Value& object, const std::string& name) {
  object.Require();
  Value method;
  if (FindMethod(object, name, method)) return method;
  if (object.is_dict()) {
    if (const Value* value = object.dict().Find(std::string_view(name))) return *value;
  } else if (object.is_namespace()) {
    if (const Value* value = object.ns().members->Find(std::string_view(name))) return *value;
  } else if (object.is_loop()) {
    const Loop& loop = object.loop();
    const auto at = static_cast<int64_t>(loop.at), n = static_cast<int64_t>(loop.items.size());
    if (name == "index") return Value(at + 1);
    if (name == "index0") return Value(at);
    if (name == "revindex") return Value(n - at);
    if (name == "revindex0") return Value(n - at - 1);
    if (name == "first") return Value(at == 0);
    if (name == "last") return Value(at + 1 == n);
    if (name == "length") return Value(n);
    if (name == "depth") return Value(static_cast<int64_t>(loop.depth));
    if (name == "depth0") return Value(static_cast<int64_t>(loop.depth) - 1);
    if (name == "previtem") {
      return at > 0 ? loop.items[loop.at - 1] : Value::MakeUndefined("there is no previous item");
    }
    if (name == "nextitem") {
      return at + 1 < n ? loop.items[loop.at + 1] : Value::MakeUndefined("there is no next item");
    }
  }
  return Value::MakeUndefined(absl::StrCat("'", ObjectName(object), "' has no attribute '", name, "'"));
}

Value Interpreter::GetItem(const Value& object, const Value& key) {
  object.Require();
  if (object.is_dict()) {
    if (const Value* value = object.dict().Find(key, budget_)) return *value;
  } else if (key.is_integral() && (object.is_string() || object.is_seq(SeqKind::kList) ||
                                   object.is_seq(SeqKind::kTuple) || object.is_seq(SeqKind::kRange))) {
    int64_t i = key.as_int();
    if (object.is_string()) {
      const std::string& text = object.str();
      budget_.Read(text.size());
      const int64_t n = Length(object);
      if (i < 0) i += n;
      if (i >= 0 && i < n) {
        size_t pos = 0;
        for (int64_t k = 0; k < i; ++k) utf8::Next(text, pos);
        const size_t begin = pos;
        utf8::Next(text, pos);
        return Value(object.text().Substr(begin, pos));
      }
    } else {
      const auto& items = object.seq().items;
      if (i < 0) i += static_cast<int64_t>(items.size());
      if (i >= 0 && i < static_cast<int64_t>(items.size())) return items[static_cast<size_t>(i)];
    }
  }
  if (key.is_string()) {
    // `obj['name']` falls back to the attribute.
    Value method;
    if (FindMethod(object, key.str(), method)) return method;
    if (object.is_namespace() || object.is_loop()) return GetAttr(object, key.str());
    return Value::MakeUndefined(
        absl::StrCat("'", ObjectName(object), "' has no attribute ", Repr(key, budget_).str()));
  }
  return Value::MakeUndefined(absl::StrCat(ObjectName(object), " has no element ", Repr(key, budget_).str()));
}

}  // namespace tidepool::jinja
