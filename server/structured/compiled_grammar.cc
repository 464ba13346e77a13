// Byte grammar, version 1, all integers little-endian:
//
//   grammar  := magic[4]="TPGR" version:u32=1 checksum:u64 body       checksum: XXH3-64 of body
//   body     := n:u32 terminal*n  n:u32 (start:u32)*n                 rules, rule 0 first
//               n:u32 state*n
//   terminal := flags:u8 min:u32 max:u32 columns:u32 class:u8[256] n:u32 (final:u8)*n (next:u32)*(n*columns)
//               flags: 1 counted; next: 0xffffffff is none
//   state    := final:u8 n:u32 edge*n
//   edge     := kind:u8 lo:u8 hi:u8 arg:u32 target:u32                kinds: Edge::Kind
#include "server/structured/compiled_grammar.h"

#include <cstring>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/status.h"
#include "server/structured/automaton.h"
#include "server/structured/serialize.h"

namespace tidepool {
namespace structured {
namespace {

constexpr std::string_view kMagic = "TPGR";
constexpr uint32_t kVersion = 1;
constexpr size_t kHeaderBytes = 16;

template <typename T>
void Put(T value, std::string& out) {
  for (size_t i = 0; i < sizeof(T); ++i) out.push_back(static_cast<char>(value >> (8 * i) & 0xFF));
}

// Reader: checked (View). After the first short read everything is zero and `ok` false.
class Reader {
 public:
  explicit Reader(std::string_view bytes) : rest_(bytes) {}

  template <typename T>
  T Get() {
    T value = 0;
    if (rest_.size() < sizeof(T)) {
      Fail();
      return 0;
    }
    for (size_t i = 0; i < sizeof(T); ++i) {
      value =
          static_cast<T>(value | static_cast<T>(static_cast<T>(static_cast<uint8_t>(rest_[i])) << (8 * i)));
    }
    rest_.remove_prefix(sizeof(T));
    return value;
  }
  // A number of things that take at least `bytes` each.
  uint32_t Count(size_t bytes) {
    const auto n = Get<uint32_t>();
    if (n > rest_.size() / bytes) {
      Fail();
      return 0;
    }
    return n;
  }
  bool ok() const { return ok_; }
  bool AtEnd() const { return rest_.empty(); }

 private:
  void Fail() {
    ok_ = false;
    rest_ = {};
  }
  std::string_view rest_;
  bool ok_ = true;
};

absl::Status Bad(std::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("compiled grammar: ", std::string(what)));
}

absl::Status ReadTerminal(Reader& in, Terminal& t) {
  const auto flags = in.Get<uint8_t>();
  if (flags > 1) return Bad("unknown flags of a terminal");
  t.counted = flags == 1;
  t.min = in.Get<uint32_t>();
  t.max = in.Get<uint32_t>();
  t.dfa.columns = in.Get<uint32_t>();
  if (t.dfa.columns == 0 || t.dfa.columns > 256) return Bad("a terminal has no or too many byte classes");
  for (uint8_t& c : t.dfa.classes) {
    c = in.Get<uint8_t>();
    if (c >= t.dfa.columns) return Bad("a byte class out of range");
  }
  const uint32_t n = in.Count(1 + size_t{4} * t.dfa.columns);
  t.dfa.final.resize(n);
  for (uint8_t& f : t.dfa.final) {
    f = in.Get<uint8_t>();
    if (f > 1) return Bad("a flag that is neither 0 nor 1");
  }
  t.dfa.next.resize(size_t{n} * t.dfa.columns);
  for (uint32_t& to : t.dfa.next) {
    to = in.Get<uint32_t>();
    if (to != kDead && to >= n) return Bad("a terminal's state out of range");
  }
  return in.ok() ? absl::OkStatus() : Bad("cut short");
}

absl::StatusOr<std::unique_ptr<Automaton>> Read(std::string_view body) {
  Reader in(body);
  auto a = std::make_unique<Automaton>();
  a->terminals.resize(in.Count(1 + 4 * 3 + 256 + 4));
  for (Terminal& t : a->terminals) TP_RETURN_IF_ERROR(ReadTerminal(in, t));
  a->rules.resize(in.Count(4));
  for (uint32_t& rule : a->rules) rule = in.Get<uint32_t>();
  const uint32_t n = in.Count(5);
  a->edge_begin.reserve(size_t{n} + 1);
  for (uint32_t s = 0; s < n && in.ok(); ++s) {
    a->final.push_back(in.Get<uint8_t>());
    if (a->final.back() > 1) return Bad("a flag that is neither 0 nor 1");
    const uint32_t count = in.Count(11);
    for (uint32_t i = 0; i < count; ++i) {
      Edge e;
      const auto kind = in.Get<uint8_t>();
      if (kind > Edge::kToken) return Bad("an unknown kind of edge");
      e.kind = static_cast<Edge::Kind>(kind);
      e.lo = in.Get<uint8_t>();
      e.hi = in.Get<uint8_t>();
      e.arg = in.Get<uint32_t>();
      e.target = in.Get<uint32_t>();
      if (e.target >= n) return Bad("an edge's target out of range");
      if (e.kind == Edge::kByte && e.lo > e.hi) return Bad("an empty byte range");
      if (e.kind == Edge::kTerminal && e.arg >= a->terminals.size()) return Bad("a terminal out of range");
      if (e.kind == Edge::kCall && e.arg >= a->rules.size()) return Bad("a rule out of range");
      if (e.kind == Edge::kToken && e.arg > INT32_MAX) return Bad("a token out of range");
      a->edges.push_back(e);
    }
    a->edge_begin.push_back(static_cast<uint32_t>(a->edges.size()));
  }
  if (!in.ok()) return Bad("cut short");
  if (!in.AtEnd()) return Bad("bytes behind the end");
  if (a->rules.empty()) return Bad("no rules");
  for (const uint32_t start : a->rules) {
    if (start >= n) return Bad("a rule's start out of range");
  }
  TP_RETURN_IF_ERROR(Annotate(Finish(*a), "compiled grammar"));
  return a;
}

}  // namespace

std::string Serialize(const Automaton& a) {
  std::string body;
  Put(static_cast<uint32_t>(a.terminals.size()), body);
  for (const Terminal& t : a.terminals) {
    Put(static_cast<uint8_t>(t.counted ? 1 : 0), body);
    Put(t.min, body);
    Put(t.max, body);
    Put(t.dfa.columns, body);
    for (const uint8_t c : t.dfa.classes) Put(c, body);
    Put(static_cast<uint32_t>(t.dfa.states()), body);
    for (const uint8_t f : t.dfa.final) Put(f, body);
    for (const uint32_t to : t.dfa.next) Put(to, body);
  }
  Put(static_cast<uint32_t>(a.rules.size()), body);
  for (const uint32_t start : a.rules) Put(start, body);
  Put(static_cast<uint32_t>(a.states()), body);
  for (size_t s = 0; s < a.states(); ++s) {
    Put(a.final[s], body);
    Put(a.edge_begin[s + 1] - a.edge_begin[s], body);
    for (uint32_t i = a.edge_begin[s]; i < a.edge_begin[s + 1]; ++i) {
      const Edge& e = a.edges[i];
      Put(static_cast<uint8_t>(e.kind), body);
      Put(e.lo, body);
      Put(e.hi, body);
      Put(e.arg, body);
      Put(e.target, body);
    }
  }
  std::string out(kMagic);
  Put(kVersion, out);
  Put(PayloadChecksum(std::as_bytes(std::span(body))), out);
  return out + body;
}

}  // namespace structured

CompiledGrammar::CompiledGrammar(std::unique_ptr<const structured::Automaton> automaton, std::string bytes)
    : automaton_(std::move(automaton)), bytes_(std::move(bytes)) {
  const Sha256Digest digest = Sha256().Update(bytes_).Finish();
  digest_.assign(reinterpret_cast<const char*>(digest.data()), digest.size());
  memory_bytes_ = sizeof(*this) + bytes_.capacity() + digest_.capacity() + automaton_->MemoryBytes();
}

CompiledGrammar::~CompiledGrammar() = default;

size_t CompiledGrammar::state_count() const { return automaton_->StateCount(); }

absl::StatusOr<std::shared_ptr<const CompiledGrammar>> CompiledGrammar::Parse(std::string_view bytes) {
  using namespace structured;  // NOLINT
  if (bytes.size() > kParseBytesMax) {
    return Bad(absl::StrCat("longer than the limit of ", kParseBytesMax, " bytes"));
  }
  if (bytes.size() < kHeaderBytes || bytes.substr(0, kMagic.size()) != kMagic) return Bad("not one");
  Reader header(bytes.substr(kMagic.size(), kHeaderBytes - kMagic.size()));
  if (const auto version = header.Get<uint32_t>(); version != kVersion) {
    return Bad(absl::StrCat("version ", version, ", and this is version ", kVersion));
  }
  const auto checksum = header.Get<uint64_t>();
  const std::string_view body = bytes.substr(kHeaderBytes);
  if (PayloadChecksum(std::as_bytes(std::span(body))) != checksum) return Bad("its checksum is wrong");
  TP_ASSIGN_OR_RETURN(std::unique_ptr<const Automaton> automaton, Read(body));
  return std::shared_ptr<const CompiledGrammar>(
      new CompiledGrammar(std::move(automaton), std::string(bytes)));
}

}  // namespace tidepool
