#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/model/template/jinja_value.h"

// The syntax tree of a chat template. Internal to the template engine.
namespace tidepool::jinja {

struct Expr;
using ExprPtr = std::unique_ptr<Expr>;

// Arguments of a call, filter or test as written.
struct CallArgs {
  std::vector<ExprPtr> positional;
  std::vector<std::pair<std::string, ExprPtr>> keyword;
  ExprPtr star, star_star;  // *args, **kwargs
};

enum class ExprKind {
  kConst,    // value
  kName,     // name
  kList,     // items
  kTuple,    // items
  kDict,     // items: key, value, key, value, ...
  kAttr,     // items[0].name
  kItem,     // items[0][items[1]]
  kSlice,    // items[0][items[1]:items[2]:items[3]], null where left out
  kCall,     // items[0](args)
  kFilter,   // items[0] | name(args); items[0] is null in a filter block
  kTest,     // items[0] is name(args)
  kUnary,    // name in {-, +, not}
  kBinary,   // name in {+, -, *, /, //, %, **, and, or}
  kConcat,   // items joined by ~
  kCompare,  // items[0] names[0] items[1] names[1] items[2] ...
  kCond,     // items[1] if items[0] else items[2], which may be null
};

struct Expr {
  ExprKind kind;
  int line = 0;
  int height = 1;  // levels of nodes below and including this one
  Value value;
  std::string name;
  std::vector<std::string> names;
  std::vector<ExprPtr> items;
  CallArgs args;
};

struct Stmt;
using Block = std::vector<std::unique_ptr<Stmt>>;

enum class StmtKind {
  kText,         // text
  kOutput,       // expr
  kIf,           // branches: condition (null: else) and body
  kFor,          // target, expr, condition (may be null), body, otherwise
  kSet,          // target, expr
  kSetBlock,     // target, filter (may be null), body
  kMacro,        // name, params, body
  kCallBlock,    // expr (a call), params, body
  kFilterBlock,  // filter, body
  kWith,         // assignments, body
  kGeneration,   // body
  kBreak,
  kContinue,
};

// What `set`, `for` and `with` assign to.
struct Target {
  enum Kind { kName, kAttr, kTuple } kind = kName;
  std::string name;       // kName; kAttr: the namespace's name
  std::string attribute;  // kAttr
  std::vector<Target> parts;
};

struct Param {
  std::string name;
  ExprPtr fallback;  // may be null
};

struct Stmt {
  StmtKind kind;
  int line = 0;
  std::string text;
  std::string name;
  ExprPtr expr;
  ExprPtr condition;
  ExprPtr filter;
  Target target;
  std::vector<Param> params;
  std::vector<std::pair<ExprPtr, Block>> branches;
  std::vector<std::pair<Target, ExprPtr>> assignments;
  Block body;
  Block otherwise;
};

struct Template {
  Block body;
};

}  // namespace tidepool::jinja
