#include "server/model/template/jinja_parser.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <initializer_list>

#include "absl/strings/str_cat.h"
#include "server/model/template/jinja_lexer.h"

namespace tidepool::jinja {

namespace {

// The tree is walked and freed by recursion.
constexpr int kHeightMax = 400;
constexpr int kBlockDepthMax = 100;

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  std::shared_ptr<const Template> Run() {
    auto result = std::make_shared<Template>();
    result->body = ParseBlock({}, "");
    return result;
  }

 private:
  // --- token access ---
  const Token& Now() const { return tokens_[at_]; }
  const Token& Ahead() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  int Line() const { return Now().line; }
  void Advance() {
    if (at_ + 1 < tokens_.size()) ++at_;
  }
  bool IsOp(std::string_view op) const { return Now().kind == TokenKind::kOperator && Now().text == op; }
  bool IsName(std::string_view name) const { return Now().kind == TokenKind::kName && Now().text == name; }
  bool SkipOp(std::string_view op) {
    if (!IsOp(op)) return false;
    Advance();
    return true;
  }
  bool SkipName(std::string_view name) {
    if (!IsName(name)) return false;
    Advance();
    return true;
  }
  static std::string Describe(const Token& token) {
    switch (token.kind) {
      case TokenKind::kEnd:
        return "end of the template";
      case TokenKind::kText:
        return "text";
      case TokenKind::kString:
        return "a string";
      default:
        return absl::StrCat("'", token.text, "'");
    }
  }
  [[noreturn]] void Unexpected(std::string_view wanted) const {
    SyntaxError(Line(), absl::StrCat("expected ", std::string(wanted), ", got ", Describe(Now())));
  }
  void ExpectOp(std::string_view op) {
    if (!SkipOp(op)) Unexpected(absl::StrCat("'", std::string(op), "'"));
  }
  void ExpectName(std::string_view name) {
    if (!SkipName(name)) Unexpected(absl::StrCat("'", std::string(name), "'"));
  }
  std::string TakeName() {
    if (Now().kind != TokenKind::kName) Unexpected("a name");
    std::string name = Now().text;
    Advance();
    return name;
  }
  void ExpectBlockEnd() {
    if (Now().kind != TokenKind::kBlockEnd) Unexpected("'%}'");
    Advance();
  }

  // --- expressions ---
  ExprPtr Make(ExprKind kind, int line) const {
    auto expr = std::make_unique<Expr>();
    expr->kind = kind;
    expr->line = line;
    return expr;
  }

  ExprPtr Seal(ExprPtr expr) const {
    int height = 0;
    const auto look = [&](const ExprPtr& e) {
      if (e != nullptr) height = std::max(height, e->height);
    };
    for (const auto& item : expr->items) look(item);
    for (const auto& arg : expr->args.positional) look(arg);
    for (const auto& [name, arg] : expr->args.keyword) look(arg);
    look(expr->args.star);
    look(expr->args.star_star);
    expr->height = height + 1;
    if (expr->height > kHeightMax) {
      SyntaxError(expr->line, absl::StrCat("expression nested more than ", kHeightMax, " deep"));
    }
    return expr;
  }

  template <typename... Items>
  ExprPtr Node(ExprKind kind, int line, std::string name, Items... items) const {
    ExprPtr expr = Make(kind, line);
    expr->name = std::move(name);
    (expr->items.push_back(std::move(items)), ...);
    return Seal(std::move(expr));
  }

  // Counts the parser's own recursion, which runs ahead of the tree's height.
  struct Guard {
    explicit Guard(Parser& p) : parser(p) {
      if (++parser.depth_ > kHeightMax) {
        SyntaxError(parser.Line(), absl::StrCat("expression nested more than ", kHeightMax, " deep"));
      }
    }
    ~Guard() { --parser.depth_; }
    Parser& parser;
  };

  ExprPtr ParseExpression(bool with_condition = true) {
    Guard guard(*this);
    return with_condition ? ParseCondition() : ParseOr();
  }

  ExprPtr ParseCondition() {
    ExprPtr value = ParseOr();
    while (IsName("if")) {
      const int line = Line();
      Advance();
      ExprPtr test = ParseOr();
      ExprPtr otherwise;
      if (SkipName("else")) otherwise = ParseExpression();
      value = Node(ExprKind::kCond, line, "", std::move(test), std::move(value), std::move(otherwise));
    }
    return value;
  }

  ExprPtr ParseOr() {
    ExprPtr left = ParseAnd();
    while (IsName("or")) {
      const int line = Line();
      Advance();
      left = Node(ExprKind::kBinary, line, "or", std::move(left), ParseAnd());
    }
    return left;
  }

  ExprPtr ParseAnd() {
    ExprPtr left = ParseNot();
    while (IsName("and")) {
      const int line = Line();
      Advance();
      left = Node(ExprKind::kBinary, line, "and", std::move(left), ParseNot());
    }
    return left;
  }

  ExprPtr ParseNot() {
    if (!IsName("not")) return ParseCompare();
    Guard guard(*this);
    const int line = Line();
    Advance();
    return Node(ExprKind::kUnary, line, "not", ParseNot());
  }

  ExprPtr ParseCompare() {
    ExprPtr first = ParseSum();
    ExprPtr compare;
    while (true) {
      const int line = Line();
      std::string op;
      for (const char* candidate : {"==", "!=", "<=", ">=", "<", ">"}) {
        if (op.empty() && IsOp(candidate)) op = candidate;
      }
      if (!op.empty()) {
        Advance();
      } else if (IsName("in")) {
        op = "in";
        Advance();
      } else if (IsName("not") && Ahead().kind == TokenKind::kName && Ahead().text == "in") {
        op = "not in";
        Advance();
        Advance();
      } else {
        break;
      }
      if (compare == nullptr) {
        compare = Make(ExprKind::kCompare, line);
        compare->items.push_back(std::move(first));
      }
      compare->names.push_back(op);
      compare->items.push_back(ParseSum());
    }
    return compare == nullptr ? std::move(first) : Seal(std::move(compare));
  }

  ExprPtr ParseSum() {
    ExprPtr left = ParseConcat();
    while (IsOp("+") || IsOp("-")) {
      const int line = Line();
      const std::string op = Now().text;
      Advance();
      left = Node(ExprKind::kBinary, line, op, std::move(left), ParseConcat());
    }
    return left;
  }

  ExprPtr ParseConcat() {
    ExprPtr first = ParseProduct();
    if (!IsOp("~")) return first;
    ExprPtr concat = Make(ExprKind::kConcat, Line());
    concat->items.push_back(std::move(first));
    while (SkipOp("~")) concat->items.push_back(ParseProduct());
    return Seal(std::move(concat));
  }

  ExprPtr ParseProduct() {
    ExprPtr left = ParsePower();
    while (IsOp("*") || IsOp("/") || IsOp("//") || IsOp("%")) {
      const int line = Line();
      const std::string op = Now().text;
      Advance();
      left = Node(ExprKind::kBinary, line, op, std::move(left), ParsePower());
    }
    return left;
  }

  ExprPtr ParsePower() {
    ExprPtr left = ParseUnary(true);
    while (IsOp("**")) {
      const int line = Line();
      Advance();
      left = Node(ExprKind::kBinary, line, "**", std::move(left), ParseUnary(true));
    }
    return left;
  }

  ExprPtr ParseUnary(bool with_filter) {
    Guard guard(*this);
    ExprPtr node;
    if (IsOp("-") || IsOp("+")) {
      const int line = Line();
      const std::string op = Now().text;
      Advance();
      node = Node(ExprKind::kUnary, line, op, ParseUnary(false));
    } else {
      node = ParsePrimary();
    }
    node = ParsePostfix(std::move(node));
    if (with_filter) node = ParseFilters(std::move(node));
    return node;
  }

  ExprPtr Const(Value value, int line) const {
    ExprPtr expr = Make(ExprKind::kConst, line);
    expr->value = std::move(value);
    return expr;
  }

  ExprPtr ParsePrimary() {
    const int line = Line();
    const Token token = Now();
    switch (token.kind) {
      case TokenKind::kName:
        Advance();
        if (token.text == "true" || token.text == "True") return Const(Value(true), line);
        if (token.text == "false" || token.text == "False") return Const(Value(false), line);
        if (token.text == "none" || token.text == "None") return Const(Value(), line);
        return Node(ExprKind::kName, line, token.text);
      case TokenKind::kString: {
        std::string text;
        while (Now().kind == TokenKind::kString) {
          text += Now().text;
          Advance();
        }
        return Const(Value(Text::Trusted(std::move(text))), line);
      }
      case TokenKind::kInteger:
        Advance();
        return Const(Value(ParseInteger(token)), line);
      case TokenKind::kFloat:
        Advance();
        return Const(Value(std::strtod(token.text.c_str(), nullptr)), line);
      default:
        break;
    }
    if (SkipOp("(")) {
      ExprPtr expr = ParseTuple(true, true);
      ExpectOp(")");
      return expr;
    }
    if (SkipOp("[")) {
      ExprPtr list = Make(ExprKind::kList, line);
      while (!IsOp("]")) {
        if (!list->items.empty()) {
          ExpectOp(",");
          if (IsOp("]")) break;
        }
        list->items.push_back(ParseExpression());
      }
      ExpectOp("]");
      return Seal(std::move(list));
    }
    if (SkipOp("{")) {
      ExprPtr dict = Make(ExprKind::kDict, line);
      while (!IsOp("}")) {
        if (!dict->items.empty()) {
          ExpectOp(",");
          if (IsOp("}")) break;
        }
        dict->items.push_back(ParseExpression());
        ExpectOp(":");
        dict->items.push_back(ParseExpression());
      }
      ExpectOp("}");
      return Seal(std::move(dict));
    }
    Unexpected("an expression");
  }

  int64_t ParseInteger(const Token& token) const {
    std::string_view text = token.text;
    int base = 10;
    if (text.size() > 2 && text[0] == '0' && std::isdigit(static_cast<unsigned char>(text[1])) == 0) {
      base = (text[1] | 0x20) == 'x' ? 16 : (text[1] | 0x20) == 'o' ? 8 : 2;
      text.remove_prefix(2);
    }
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
    if (error != std::errc() || end != text.data() + text.size()) {
      SyntaxError(token.line, absl::StrCat("integer ", token.text, " is malformed or beyond 64 bits"));
    }
    return value;
  }

  // One expression, or several with commas: a tuple. `parenthesised`: () is the empty tuple.
  ExprPtr ParseTuple(bool with_condition, bool parenthesised) {
    const int line = Line();
    ExprPtr tuple = Make(ExprKind::kTuple, line);
    bool comma = false;
    while (true) {
      const bool end =
          Now().kind == TokenKind::kVariableEnd || Now().kind == TokenKind::kBlockEnd || IsOp(")");
      if (end) break;
      tuple->items.push_back(ParseExpression(with_condition));
      if (!IsOp(",")) break;
      comma = true;
      Advance();
    }
    if (tuple->items.empty() && !parenthesised) Unexpected("an expression");
    if (tuple->items.size() == 1 && !comma) return std::move(tuple->items[0]);
    return Seal(std::move(tuple));
  }

  ExprPtr ParsePostfix(ExprPtr node) {
    while (true) {
      const int line = Line();
      if (SkipOp(".")) {
        if (Now().kind == TokenKind::kInteger) {
          const int64_t index = ParseInteger(Now());
          Advance();
          node = Node(ExprKind::kItem, line, "", std::move(node), Const(Value(index), line));
        } else {
          node = Node(ExprKind::kAttr, line, TakeName(), std::move(node));
        }
      } else if (SkipOp("[")) {
        node = ParseSubscript(std::move(node), line);
      } else if (IsOp("(")) {
        node = ParseCall(std::move(node));
      } else {
        return node;
      }
    }
  }

  ExprPtr ParseSubscript(ExprPtr node, int line) {
    ExprPtr parts[3];
    bool slice = false;
    for (size_t i = 0; i < 3; ++i) {
      if (!IsOp(":") && !IsOp("]")) parts[i] = ParseExpression();
      if (i == 0 && IsOp(",")) SyntaxError(line, "a subscript of several indices is not supported");
      if (!SkipOp(":")) break;
      slice = true;
    }
    ExpectOp("]");
    if (!slice) {
      if (parts[0] == nullptr) SyntaxError(line, "empty subscript");
      return Node(ExprKind::kItem, line, "", std::move(node), std::move(parts[0]));
    }
    return Node(ExprKind::kSlice, line, "", std::move(node), std::move(parts[0]), std::move(parts[1]),
                std::move(parts[2]));
  }

  void ParseArgs(CallArgs& args) {
    ExpectOp("(");
    bool first = true;
    while (!IsOp(")")) {
      if (!first) {
        ExpectOp(",");
        if (IsOp(")")) break;
      }
      first = false;
      if (SkipOp("**")) {
        args.star_star = ParseExpression();
      } else if (SkipOp("*")) {
        args.star = ParseExpression();
      } else if (Now().kind == TokenKind::kName && Ahead().kind == TokenKind::kOperator &&
                 Ahead().text == "=") {
        std::string name = TakeName();
        Advance();
        args.keyword.emplace_back(std::move(name), ParseExpression());
      } else {
        if (!args.keyword.empty()) SyntaxError(Line(), "a positional argument behind a keyword argument");
        args.positional.push_back(ParseExpression());
      }
    }
    ExpectOp(")");
  }

  ExprPtr ParseCall(ExprPtr callee) {
    ExprPtr call = Make(ExprKind::kCall, Line());
    call->items.push_back(std::move(callee));
    ParseArgs(call->args);
    return Seal(std::move(call));
  }

  std::string DottedName() {
    std::string name = TakeName();
    while (IsOp(".")) {
      Advance();
      absl::StrAppend(&name, ".", TakeName());
    }
    return name;
  }

  ExprPtr ParseFilters(ExprPtr node) {
    while (true) {
      if (IsOp("|")) {
        Advance();
        node = ParseFilter(std::move(node));
      } else if (IsName("is")) {
        node = ParseTest(std::move(node));
      } else if (IsOp("(")) {
        node = ParseCall(std::move(node));
      } else {
        return node;
      }
    }
  }

  // Behind the `|`. `node` may be null: the body of a filter block.
  ExprPtr ParseFilter(ExprPtr node) {
    ExprPtr filter = Make(ExprKind::kFilter, Line());
    filter->name = DottedName();
    filter->items.push_back(std::move(node));
    if (IsOp("(")) ParseArgs(filter->args);
    return Seal(std::move(filter));
  }

  ExprPtr ParseTest(ExprPtr node) {
    const int line = Line();
    Advance();
    const bool negated = SkipName("not");
    ExprPtr test = Make(ExprKind::kTest, line);
    test->name = DottedName();
    test->items.push_back(std::move(node));
    const bool bare_argument =
        Now().kind == TokenKind::kString || Now().kind == TokenKind::kInteger ||
        Now().kind == TokenKind::kFloat || IsOp("[") || IsOp("{") ||
        (Now().kind == TokenKind::kName && !IsName("else") && !IsName("or") && !IsName("and"));
    if (IsOp("(")) {
      ParseArgs(test->args);
    } else if (bare_argument && !IsName("if") && !IsName("is")) {
      Guard guard(*this);
      test->args.positional.push_back(ParsePostfix(ParsePrimary()));
    }
    test = Seal(std::move(test));
    return negated ? Node(ExprKind::kUnary, line, "not", std::move(test)) : std::move(test);
  }

  // --- statements ---
  // Statements up to one of the block tags `until`, which is left as Now() behind its `{%`.
  Block ParseBlock(std::initializer_list<std::string_view> until, std::string_view opener) {
    if (++blocks_ > kBlockDepthMax) {
      SyntaxError(Line(), absl::StrCat("blocks nested more than ", kBlockDepthMax, " deep"));
    }
    const int opened = Line();
    Block block;
    while (true) {
      const int line = Line();
      switch (Now().kind) {
        case TokenKind::kText: {
          auto stmt = NewStmt(StmtKind::kText, line);
          stmt->text = Now().text;
          Advance();
          block.push_back(std::move(stmt));
          break;
        }
        case TokenKind::kVariableBegin: {
          Advance();
          auto stmt = NewStmt(StmtKind::kOutput, line);
          stmt->expr = ParseTuple(true, false);
          if (Now().kind != TokenKind::kVariableEnd) Unexpected("'}}'");
          Advance();
          block.push_back(std::move(stmt));
          break;
        }
        case TokenKind::kBlockBegin:
          Advance();
          for (const std::string_view end : until) {
            if (IsName(end)) {
              --blocks_;
              return block;
            }
          }
          block.push_back(ParseStatement());
          break;
        case TokenKind::kEnd:
          if (until.size() != 0) {
            SyntaxError(opened, absl::StrCat("'", std::string(opener), "' without its '",
                                             std::string(*(until.end() - 1)), "'"));
          }
          --blocks_;
          return block;
        default:
          Unexpected("text or a tag");
      }
    }
  }

  static std::unique_ptr<Stmt> NewStmt(StmtKind kind, int line) {
    auto stmt = std::make_unique<Stmt>();
    stmt->kind = kind;
    stmt->line = line;
    return stmt;
  }

  std::unique_ptr<Stmt> ParseStatement() {
    const int line = Line();
    const std::string name = TakeName();
    if (name == "if") return ParseIf(line);
    if (name == "for") return ParseFor(line);
    if (name == "set") return ParseSet(line);
    if (name == "macro") return ParseMacro(line);
    if (name == "call") return ParseCallBlock(line);
    if (name == "filter") return ParseFilterBlock(line);
    if (name == "with") return ParseWith(line);
    if (name == "generation") {
      ExpectBlockEnd();
      auto stmt = NewStmt(StmtKind::kGeneration, line);
      stmt->body = ParseBlock({"endgeneration"}, name);
      CloseTag();
      return stmt;
    }
    if (name == "break" || name == "continue") {
      if (loops_ == 0) SyntaxError(line, absl::StrCat("'", name, "' outside of a loop"));
      ExpectBlockEnd();
      return NewStmt(name == "break" ? StmtKind::kBreak : StmtKind::kContinue, line);
    }
    SyntaxError(line, absl::StrCat("tag '", name, "' is unknown or not supported"));
  }

  // The end tag's name, then `%}`.
  void CloseTag() {
    Advance();
    ExpectBlockEnd();
  }

  std::unique_ptr<Stmt> ParseIf(int line) {
    auto stmt = NewStmt(StmtKind::kIf, line);
    ExprPtr condition = ParseTuple(true, false);
    while (true) {
      ExpectBlockEnd();
      Block body = ParseBlock({"elif", "else", "endif"}, "if");
      stmt->branches.emplace_back(std::move(condition), std::move(body));
      if (SkipName("elif")) {
        condition = ParseTuple(true, false);
        continue;
      }
      if (SkipName("else")) {
        ExpectBlockEnd();
        stmt->branches.emplace_back(nullptr, ParseBlock({"endif"}, "if"));
      }
      CloseTag();
      return stmt;
    }
  }

  // `end`: the word behind the target.
  Target ParseTarget(bool with_tuple, bool with_attribute) {
    Target target;
    if (SkipOp("(")) {
      target = ParseTarget(true, false);
      ExpectOp(")");
    } else {
      target.name = TakeName();
      if (target.name == "true" || target.name == "false" || target.name == "none" || target.name == "True" ||
          target.name == "False" || target.name == "None") {
        SyntaxError(Line(), absl::StrCat("cannot assign to '", target.name, "'"));
      }
      if (with_attribute && SkipOp(".")) {
        target.kind = Target::kAttr;
        target.attribute = TakeName();
      }
    }
    if (!with_tuple || !IsOp(",")) return target;
    Target tuple;
    tuple.kind = Target::kTuple;
    tuple.parts.push_back(std::move(target));
    while (SkipOp(",")) {
      if (IsName("in") || IsOp(")") || IsOp("=")) break;
      tuple.parts.push_back(ParseTarget(false, with_attribute));
    }
    return tuple;
  }

  std::unique_ptr<Stmt> ParseFor(int line) {
    auto stmt = NewStmt(StmtKind::kFor, line);
    stmt->target = ParseTarget(true, false);
    ExpectName("in");
    stmt->expr = ParseTuple(false, false);
    if (SkipName("if")) stmt->condition = ParseExpression();
    if (IsName("recursive")) SyntaxError(line, "a recursive loop is not supported");
    ExpectBlockEnd();
    ++loops_;
    stmt->body = ParseBlock({"else", "endfor"}, "for");
    --loops_;
    if (SkipName("else")) {
      ExpectBlockEnd();
      stmt->otherwise = ParseBlock({"endfor"}, "for");
    }
    CloseTag();
    return stmt;
  }

  std::unique_ptr<Stmt> ParseSet(int line) {
    Target target = ParseTarget(true, true);
    if (SkipOp("=")) {
      auto stmt = NewStmt(StmtKind::kSet, line);
      stmt->target = std::move(target);
      stmt->expr = ParseTuple(true, false);
      ExpectBlockEnd();
      return stmt;
    }
    auto stmt = NewStmt(StmtKind::kSetBlock, line);
    stmt->target = std::move(target);
    if (SkipOp("|")) stmt->filter = ParseFilterChain();
    ExpectBlockEnd();
    stmt->body = ParseBlock({"endset"}, "set");
    CloseTag();
    return stmt;
  }

  ExprPtr ParseFilterChain() {
    ExprPtr filter = ParseFilter(nullptr);
    while (SkipOp("|")) filter = ParseFilter(std::move(filter));
    return filter;
  }

  void ParseParams(std::vector<Param>& params) {
    ExpectOp("(");
    while (!IsOp(")")) {
      if (!params.empty()) {
        ExpectOp(",");
        if (IsOp(")")) break;
      }
      Param param{TakeName(), nullptr};
      if (SkipOp("=")) {
        param.fallback = ParseExpression();
      } else if (!params.empty() && params.back().fallback != nullptr) {
        SyntaxError(Line(), "a parameter without a default behind one with");
      }
      params.push_back(std::move(param));
    }
    ExpectOp(")");
  }

  std::unique_ptr<Stmt> ParseMacro(int line) {
    auto stmt = NewStmt(StmtKind::kMacro, line);
    stmt->name = TakeName();
    ParseParams(stmt->params);
    ExpectBlockEnd();
    const int loops = std::exchange(loops_, 0);
    stmt->body = ParseBlock({"endmacro"}, "macro");
    loops_ = loops;
    CloseTag();
    return stmt;
  }

  std::unique_ptr<Stmt> ParseCallBlock(int line) {
    auto stmt = NewStmt(StmtKind::kCallBlock, line);
    if (IsOp("(")) ParseParams(stmt->params);
    stmt->expr = ParseExpression();
    if (stmt->expr->kind != ExprKind::kCall) SyntaxError(line, "'call' needs a call");
    ExpectBlockEnd();
    const int loops = std::exchange(loops_, 0);
    stmt->body = ParseBlock({"endcall"}, "call");
    loops_ = loops;
    CloseTag();
    return stmt;
  }

  std::unique_ptr<Stmt> ParseFilterBlock(int line) {
    auto stmt = NewStmt(StmtKind::kFilterBlock, line);
    stmt->filter = ParseFilterChain();
    ExpectBlockEnd();
    stmt->body = ParseBlock({"endfilter"}, "filter");
    CloseTag();
    return stmt;
  }

  std::unique_ptr<Stmt> ParseWith(int line) {
    auto stmt = NewStmt(StmtKind::kWith, line);
    while (Now().kind != TokenKind::kBlockEnd) {
      if (!stmt->assignments.empty()) ExpectOp(",");
      Target target = ParseTarget(false, false);
      ExpectOp("=");
      stmt->assignments.emplace_back(std::move(target), ParseExpression());
    }
    ExpectBlockEnd();
    stmt->body = ParseBlock({"endwith"}, "with");
    CloseTag();
    return stmt;
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int depth_ = 0;
  int blocks_ = 0;
  int loops_ = 0;
};

}  // namespace

std::shared_ptr<const Template> ParseTemplate(std::string_view source) {
  return Parser(Tokenize(source)).Run();
}

}  // namespace tidepool::jinja
