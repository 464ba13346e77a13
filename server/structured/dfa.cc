#include "server/structured/dfa.h"

#include <algorithm>
#include <deque>
#include <functional>
#include <utility>

#include "server/structured/char_set.h"

namespace tidepool::structured {
namespace {

// Byte classes: bytes that no edge of `edges` tells apart share a column.
template <typename ForEachEdge>
uint32_t ByteClasses(const ForEachEdge& for_each_edge, std::array<uint8_t, 256>& classes) {
  std::array<bool, 257> cut{};
  cut[0] = true;
  for_each_edge([&](uint8_t lo, uint8_t hi) {
    cut[lo] = true;
    cut[size_t{hi} + 1] = true;
  });
  uint32_t columns = 0;
  for (size_t byte = 0; byte < 256; ++byte) {
    if (cut[byte]) ++columns;
    classes[byte] = static_cast<uint8_t>(columns - 1);
  }
  return columns;
}

using StateSet = std::vector<uint32_t>;

// Subset construction.
class Subsets {
 public:
  Subsets(const Nfa& nfa, Budget& budget) : nfa_(nfa), budget_(budget), mark_(nfa.states.size(), 0) {}

  absl::Status Close(StateSet& set) {
    ++round_;
    stack_.assign(set.begin(), set.end());
    set.clear();
    for (const uint32_t s : stack_) mark_[s] = round_;
    while (!stack_.empty()) {
      const uint32_t s = stack_.back();
      stack_.pop_back();
      // States that only pass on need not be part of the set: it is what is read next that counts.
      if (!nfa_.states[s].edges.empty() || s == end_) set.push_back(s);
      for (const uint32_t to : nfa_.states[s].epsilon) {
        if (mark_[to] == round_) continue;
        mark_[to] = round_;
        stack_.push_back(to);
      }
    }
    std::sort(set.begin(), set.end());
    // What was given may have a state twice, and each would beget its own.
    set.erase(std::unique(set.begin(), set.end()), set.end());
    return budget_.Work(set.size() + 1);
  }

  absl::StatusOr<Dfa> Run(uint32_t start, uint32_t end) {
    end_ = end;
    Dfa dfa;
    dfa.columns = ByteClasses(
        [&](const auto& edge) {
          for (const Nfa::State& state : nfa_.states) {
            for (const Nfa::Edge& e : state.edges) edge(e.lo, e.hi);
          }
        },
        dfa.classes);
    TP_RETURN_IF_ERROR(budget_.Work(nfa_.states.size()));
    std::vector<uint8_t> column_byte(dfa.columns);
    for (size_t byte = 256; byte-- > 0;) column_byte[dfa.classes[byte]] = static_cast<uint8_t>(byte);

    absl::flat_hash_map<StateSet, uint32_t> index;
    std::vector<const StateSet*> sets;
    const auto intern = [&](StateSet set) -> absl::StatusOr<uint32_t> {
      const auto [it, fresh] = index.emplace(std::move(set), static_cast<uint32_t>(sets.size()));
      if (fresh) {
        TP_RETURN_IF_ERROR(budget_.AddStates(1));
        TP_RETURN_IF_ERROR(budget_.Work(16 + dfa.columns));
        dfa.final.push_back(std::binary_search(it->first.begin(), it->first.end(), end) ? 1 : 0);
        dfa.next.resize(dfa.next.size() + dfa.columns, kDead);
        pending_.push_back(it->first);
        sets.push_back(nullptr);
      }
      return it->second;
    };
    StateSet first{start};
    TP_RETURN_IF_ERROR(Close(first));
    TP_RETURN_IF_ERROR(intern(std::move(first)).status());
    std::vector<StateSet> targets(dfa.columns);
    for (uint32_t at = 0; !pending_.empty(); ++at) {
      const StateSet set = std::move(pending_.front());
      pending_.pop_front();
      for (StateSet& target : targets) target.clear();
      size_t work = 0;
      for (const uint32_t s : set) {
        for (const Nfa::Edge& e : nfa_.states[s].edges) {
          const uint32_t hi = dfa.classes[e.hi];
          for (uint32_t c = dfa.classes[e.lo]; c <= hi; ++c) targets[c].push_back(e.to);
          work += hi - dfa.classes[e.lo] + 1;
        }
      }
      TP_RETURN_IF_ERROR(budget_.Work(work + dfa.columns));
      for (uint32_t c = 0; c < dfa.columns; ++c) {
        if (targets[c].empty()) continue;
        // Neighbouring columns often lead to the same place.
        if (c > 0 && targets[c] == targets_before_) {
          dfa.next[size_t{at} * dfa.columns + c] = before_;
          continue;
        }
        targets_before_ = targets[c];
        StateSet closed = targets[c];
        TP_RETURN_IF_ERROR(Close(closed));
        before_ = kDead;
        if (!closed.empty()) {
          TP_ASSIGN_OR_RETURN(before_, intern(std::move(closed)));
        }
        dfa.next[size_t{at} * dfa.columns + c] = before_;
      }
      targets_before_.clear();
    }
    budget_.DropStates(sets.size());
    return dfa;
  }

 private:
  const Nfa& nfa_;
  Budget& budget_;
  uint32_t end_ = 0;
  std::vector<uint32_t> mark_;
  uint32_t round_ = 0;
  std::vector<uint32_t> stack_;
  std::deque<StateSet> pending_;
  StateSet targets_before_;
  uint32_t before_ = kDead;
};

// The product of two automata; `keep` says which pairs are final. A dead `b` is kept where `b_may_die`.
absl::StatusOr<Dfa> Product(const Dfa& a, const Dfa& b, bool b_may_die, Budget& budget) {
  if (a.empty()) return Dfa{};
  if (b.empty()) return b_may_die ? Minimize(a, budget) : absl::StatusOr<Dfa>(Dfa{});
  // Joint byte classes.
  Dfa dfa;
  absl::flat_hash_map<uint32_t, uint8_t> joint;
  std::vector<std::pair<uint8_t, uint8_t>> columns;
  for (size_t byte = 0; byte < 256; ++byte) {
    const uint32_t key = uint32_t{a.classes[byte]} << 8 | b.classes[byte];
    const auto [it, fresh] = joint.emplace(key, static_cast<uint8_t>(columns.size()));
    if (fresh) columns.emplace_back(a.classes[byte], b.classes[byte]);
    dfa.classes[byte] = it->second;
  }
  dfa.columns = static_cast<uint32_t>(columns.size());
  absl::flat_hash_map<uint64_t, uint32_t> index;
  std::vector<std::pair<uint32_t, uint32_t>> pairs;
  const auto intern = [&](uint32_t x, uint32_t y) {
    const auto [it, fresh] = index.emplace(uint64_t{x} << 32 | y, static_cast<uint32_t>(pairs.size()));
    if (fresh) pairs.emplace_back(x, y);
    return it->second;
  };
  intern(0, 0);
  for (size_t at = 0; at < pairs.size(); ++at) {
    TP_RETURN_IF_ERROR(budget.AddStates(1));
    TP_RETURN_IF_ERROR(budget.Work(8 * size_t{dfa.columns}));
    const auto [x, y] = pairs[at];
    const bool y_final = y != kDead && b.IsFinal(y);
    dfa.final.push_back(a.IsFinal(x) && (b_may_die ? !y_final : y_final) ? 1 : 0);
    for (const auto& [ca, cb] : columns) {
      const uint32_t nx = a.next[size_t{x} * a.columns + ca];
      const uint32_t ny = y == kDead ? kDead : b.next[size_t{y} * b.columns + cb];
      const bool dead = nx == kDead || (ny == kDead && !b_may_die);
      dfa.next.push_back(dead ? kDead : intern(nx, ny));
    }
  }
  budget.DropStates(pairs.size());
  return Minimize(dfa, budget);
}

// Hopcroft's partition refinement over the live states; kDead takes part as one more state, `sink`.
class Partition {
 public:
  Partition(const Dfa& dfa, const std::vector<uint32_t>& live, const std::vector<uint32_t>& index,
            Budget& budget)
      : dfa_(dfa), live_(live), index_(index), budget_(budget), n_(static_cast<uint32_t>(live.size()) + 1) {}

  // block[i]: the class of live state i; the sink's is block[n - 1].
  absl::StatusOr<std::vector<uint32_t>> Run() {
    TP_RETURN_IF_ERROR(budget_.LookNow());
    BuildReverse();
    TP_RETURN_IF_ERROR(budget_.LookNow());
    order_.resize(n_);
    place_.resize(n_);
    block_.assign(n_, 0);
    std::vector<uint32_t> count(3, 0);
    const auto group = [&](uint32_t s) -> uint32_t {
      return s + 1 == n_ ? 2 : dfa_.IsFinal(live_[s]) ? 1 : 0;
    };
    uint32_t filled = 0;
    for (uint32_t g = 0; g < 3; ++g) {
      const uint32_t begin = filled;
      for (uint32_t s = 0; s < n_; ++s) {
        if (group(s) != g) continue;
        order_[filled] = s;
        place_[s] = filled++;
      }
      if (filled == begin) continue;
      const auto b = static_cast<uint32_t>(begin_.size());
      for (uint32_t i = begin; i < filled; ++i) block_[order_[i]] = b;
      begin_.push_back(begin);
      end_.push_back(filled);
      marked_.push_back(0);
    }
    std::vector<std::pair<uint32_t, uint32_t>> work;
    std::vector<uint8_t> queued;
    const auto push = [&](uint32_t b, uint32_t c) {
      uint8_t& flag = queued[size_t{b} * dfa_.columns + c];
      if (flag != 0) return;
      flag = 1;
      work.emplace_back(b, c);
    };
    queued.assign(begin_.size() * dfa_.columns, 0);
    for (uint32_t b = 0; b < begin_.size(); ++b) {
      for (uint32_t c = 0; c < dfa_.columns; ++c) push(b, c);
    }
    std::vector<uint32_t> sources, touched;
    while (!work.empty()) {
      const auto [splitter, c] = work.back();
      work.pop_back();
      queued[size_t{splitter} * dfa_.columns + c] = 0;
      sources.clear();
      for (uint32_t i = begin_[splitter]; i < end_[splitter]; ++i) {
        const uint32_t s = order_[i];
        const size_t cell = size_t{c} * n_ + s;
        for (uint32_t e = reverse_begin_[cell]; e < reverse_begin_[cell + 1]; ++e) {
          sources.push_back(reverse_[e]);
        }
      }
      TP_RETURN_IF_ERROR(budget_.Work(sources.size() + (end_[splitter] - begin_[splitter])));
      touched.clear();
      for (const uint32_t s : sources) {
        const uint32_t b = block_[s];
        const uint32_t boundary = begin_[b] + marked_[b];
        if (place_[s] < boundary) continue;
        if (marked_[b]++ == 0) touched.push_back(b);
        const uint32_t other = order_[boundary];
        std::swap(order_[boundary], order_[place_[s]]);
        place_[other] = place_[s];
        place_[s] = boundary;
      }
      for (const uint32_t b : touched) {
        const uint32_t marked = marked_[b];
        marked_[b] = 0;
        if (marked == end_[b] - begin_[b]) continue;
        // The smaller half becomes a new block.
        const auto fresh = static_cast<uint32_t>(begin_.size());
        const uint32_t middle = begin_[b] + marked;
        if (marked <= end_[b] - middle) {
          begin_.push_back(begin_[b]);
          end_.push_back(middle);
          begin_[b] = middle;
        } else {
          begin_.push_back(middle);
          end_.push_back(end_[b]);
          end_[b] = middle;
        }
        marked_.push_back(0);
        for (uint32_t i = begin_[fresh]; i < end_[fresh]; ++i) block_[order_[i]] = fresh;
        queued.resize(queued.size() + dfa_.columns, 0);
        // If (b, c) waits, both halves have to; else the smaller one is enough, and that is `fresh`.
        for (uint32_t column = 0; column < dfa_.columns; ++column) push(fresh, column);
        TP_RETURN_IF_ERROR(budget_.Work(dfa_.columns));
      }
    }
    return std::move(block_);
  }

 private:
  void BuildReverse() {
    const size_t cells = size_t{dfa_.columns} * n_;
    reverse_begin_.assign(cells + 1, 0);
    const auto each = [&](const auto& edge) {
      for (uint32_t s = 0; s + 1 < n_; ++s) {
        for (uint32_t c = 0; c < dfa_.columns; ++c) {
          const uint32_t to = dfa_.next[size_t{live_[s]} * dfa_.columns + c];
          const uint32_t target = to == kDead || index_[to] == kDead ? n_ - 1 : index_[to];
          edge(size_t{c} * n_ + target, s);
        }
      }
    };
    each([&](size_t cell, uint32_t) { ++reverse_begin_[cell + 1]; });
    for (size_t i = 0; i < cells; ++i) reverse_begin_[i + 1] += reverse_begin_[i];
    reverse_.resize(reverse_begin_[cells]);
    std::vector<uint32_t> fill(reverse_begin_.begin(), reverse_begin_.end() - 1);
    each([&](size_t cell, uint32_t s) { reverse_[fill[cell]++] = s; });
  }

  const Dfa& dfa_;
  const std::vector<uint32_t>& live_;
  const std::vector<uint32_t>& index_;
  Budget& budget_;
  const uint32_t n_;
  std::vector<uint32_t> reverse_begin_, reverse_;
  std::vector<uint32_t> order_, place_, block_, begin_, end_, marked_;
};

// Columns that are equal in every state become one.
void MergeColumns(Dfa& dfa) {
  std::vector<uint8_t> column_of(dfa.columns);
  std::vector<uint32_t> kept;
  const size_t n = dfa.states();
  absl::flat_hash_map<std::vector<uint32_t>, uint8_t> seen;
  std::vector<uint32_t> column(n);
  // In the order of the bytes, so that equal languages give equal automata.
  std::vector<uint8_t> done(dfa.columns, 0);
  for (size_t byte = 0; byte < 256; ++byte) {
    const uint32_t c = dfa.classes[byte];
    if (done[c] != 0) continue;
    done[c] = 1;
    for (size_t s = 0; s < n; ++s) column[s] = dfa.next[s * dfa.columns + c];
    const auto [it, fresh] = seen.emplace(column, static_cast<uint8_t>(kept.size()));
    if (fresh) kept.push_back(c);
    column_of[c] = it->second;
  }
  std::vector<uint32_t> next;
  next.reserve(n * kept.size());
  for (size_t s = 0; s < n; ++s) {
    for (const uint32_t c : kept) next.push_back(dfa.next[s * dfa.columns + c]);
  }
  for (uint8_t& c : dfa.classes) c = column_of[c];
  dfa.columns = static_cast<uint32_t>(kept.size());
  dfa.next = std::move(next);
}

}  // namespace

bool Dfa::Matches(std::string_view text) const {
  if (empty()) return false;
  uint32_t state = 0;
  for (const char c : text) {
    state = Next(state, static_cast<uint8_t>(c));
    if (state == kDead) return false;
  }
  return IsFinal(state);
}

absl::StatusOr<Dfa> Determinize(const Nfa& nfa, uint32_t start, uint32_t end, Budget& budget) {
  TP_ASSIGN_OR_RETURN(const Dfa dfa, Subsets(nfa, budget).Run(start, end));
  return Minimize(dfa, budget);
}

void AddTo(const Dfa& dfa, Nfa& nfa, uint32_t from, uint32_t to) {
  if (dfa.empty()) return;
  const auto base = static_cast<uint32_t>(nfa.states.size());
  for (size_t s = 0; s < dfa.states(); ++s) nfa.Add();
  nfa.Epsilon(from, base);
  for (uint32_t s = 0; s < dfa.states(); ++s) {
    if (dfa.IsFinal(s)) nfa.Epsilon(base + s, to);
    for (size_t byte = 0; byte < 256;) {
      const uint32_t target = dfa.Next(s, static_cast<uint8_t>(byte));
      size_t last = byte;
      while (last < 255 && dfa.Next(s, static_cast<uint8_t>(last + 1)) == target) ++last;
      if (target != kDead) {
        nfa.Connect(base + s, static_cast<uint8_t>(byte), static_cast<uint8_t>(last), base + target);
      }
      byte = last + 1;
    }
  }
}

absl::StatusOr<Dfa> Minimize(const Dfa& dfa, Budget& budget) {
  const size_t n = dfa.states();
  if (n == 0) return Dfa{};
  TP_RETURN_IF_ERROR(budget.Work(n * dfa.columns + 1));
  // Live: reachable (all callers explore from the start) and reaching a final state.
  std::vector<uint32_t> count(n + 1, 0);
  for (const uint32_t to : dfa.next) {
    if (to != kDead) ++count[to + 1];
  }
  for (size_t i = 0; i < n; ++i) count[i + 1] += count[i];
  std::vector<uint32_t> sources(count[n]), fill(count.begin(), count.end() - 1);
  for (size_t s = 0; s < n; ++s) {
    for (uint32_t c = 0; c < dfa.columns; ++c) {
      const uint32_t to = dfa.next[s * dfa.columns + c];
      if (to != kDead) sources[fill[to]++] = static_cast<uint32_t>(s);
    }
  }
  std::vector<uint32_t> index(n, kDead), live;
  for (uint32_t s = 0; s < n; ++s) {
    if (!dfa.IsFinal(s)) continue;
    index[s] = 0;
    live.push_back(s);
  }
  for (size_t i = 0; i < live.size(); ++i) {
    for (uint32_t e = count[live[i]]; e < count[live[i] + 1]; ++e) {
      if (index[sources[e]] != kDead) continue;
      index[sources[e]] = 0;
      live.push_back(sources[e]);
    }
  }
  if (index[0] == kDead) return Dfa{};
  for (uint32_t i = 0; i < live.size(); ++i) index[live[i]] = i;
  TP_ASSIGN_OR_RETURN(const std::vector<uint32_t> block, Partition(dfa, live, index, budget).Run());

  // Blocks in breadth-first order of the bytes.
  Dfa out;
  out.classes = dfa.classes;
  out.columns = dfa.columns;
  std::vector<uint32_t> column_order;
  std::vector<uint8_t> seen(dfa.columns, 0);
  for (size_t byte = 0; byte < 256; ++byte) {
    if (seen[dfa.classes[byte]]++ == 0) column_order.push_back(dfa.classes[byte]);
  }
  std::vector<uint32_t> number(live.size() + 1, kDead), member;
  const auto visit = [&](uint32_t live_state) {
    uint32_t& id = number[block[live_state]];
    if (id == kDead) {
      id = static_cast<uint32_t>(member.size());
      member.push_back(live_state);
    }
    return id;
  };
  visit(index[0]);
  for (size_t at = 0; at < member.size(); ++at) {
    const uint32_t s = live[member[at]];
    out.final.push_back(dfa.final[s] != 0 ? 1 : 0);
    out.next.resize(out.next.size() + out.columns, kDead);
    for (const uint32_t c : column_order) {
      const uint32_t to = dfa.next[size_t{s} * dfa.columns + c];
      if (to == kDead || index[to] == kDead) continue;
      const uint32_t id = visit(index[to]);
      out.next[at * out.columns + c] = id;
    }
  }
  MergeColumns(out);
  return out;
}

absl::StatusOr<Dfa> Intersect(const Dfa& a, const Dfa& b, Budget& budget) {
  return Product(a, b, false, budget);
}

absl::StatusOr<Dfa> Subtract(const Dfa& a, const Dfa& b, Budget& budget) {
  return Product(a, b, true, budget);
}

absl::StatusOr<bool> Disjoint(const Dfa& a, const Dfa& b, Budget& budget) {
  TP_ASSIGN_OR_RETURN(const Dfa both, Intersect(a, b, budget));
  return both.empty();
}

absl::StatusOr<Dfa> OneOf(std::vector<std::string> texts, Budget& budget) {
  // A trie, level by level over the sorted texts; Minimize joins equal endings.
  std::sort(texts.begin(), texts.end());
  texts.erase(std::unique(texts.begin(), texts.end()), texts.end());
  Dfa dfa;
  if (texts.empty()) return dfa;
  dfa.columns = ByteClasses(
      [&](const auto& edge) {
        std::array<bool, 256> used{};
        for (const std::string& text : texts) {
          for (const char c : text) used[static_cast<uint8_t>(c)] = true;
        }
        for (size_t byte = 0; byte < 256; ++byte) {
          if (used[byte]) edge(static_cast<uint8_t>(byte), static_cast<uint8_t>(byte));
        }
      },
      dfa.classes);
  const auto add = [&] {
    dfa.final.push_back(0);
    dfa.next.resize(dfa.next.size() + dfa.columns, kDead);
    return static_cast<uint32_t>(dfa.final.size() - 1);
  };
  add();
  for (const std::string& text : texts) {
    uint32_t at = 0;
    const size_t before = dfa.states();
    for (const char c : text) {
      const size_t cell = size_t{at} * dfa.columns + dfa.classes[static_cast<uint8_t>(c)];
      if (dfa.next[cell] == kDead) {
        const uint32_t fresh = add();
        dfa.next[cell] = fresh;
      }
      at = dfa.next[cell];
    }
    dfa.final[at] = 1;
    TP_RETURN_IF_ERROR(budget.AddStates(dfa.states() - before));
    TP_RETURN_IF_ERROR(budget.Work((dfa.states() - before) * dfa.columns / 8 + text.size()));
  }
  budget.DropStates(dfa.states());
  return Minimize(dfa, budget);
}

absl::StatusOr<Dfa> AnyUtf8(Budget& budget) {
  Nfa nfa;
  const uint32_t loop = nfa.Add(), end = nfa.Add();
  CharSet::Any().AddTo(nfa, loop, loop);
  nfa.Epsilon(loop, end);
  return Determinize(nfa, loop, end, budget);
}

absl::StatusOr<Dfa> OfLength(const Dfa& dfa, uint32_t min, uint32_t max, Budget& budget) {
  if (dfa.empty()) return Dfa{};
  Dfa out;
  out.classes = dfa.classes;
  out.columns = dfa.columns;
  // A column with lead and continuation bytes is dead in every state of valid UTF-8.
  std::vector<uint8_t> begins(dfa.columns, 0);
  for (size_t byte = 0; byte < 256; ++byte) {
    if (byte < 0x80 || byte >= 0xC0) begins[dfa.classes[byte]] = 1;
  }
  const uint32_t most = max == UINT32_MAX ? min : max;
  absl::flat_hash_map<uint64_t, uint32_t> index{{0, 0}};
  std::vector<std::pair<uint32_t, uint32_t>> places{{0, 0}};
  for (size_t at = 0; at < places.size(); ++at) {
    TP_RETURN_IF_ERROR(budget.AddStates(1));
    TP_RETURN_IF_ERROR(budget.Work(8 * size_t{dfa.columns}));
    const auto [state, count] = places[at];
    out.final.push_back(dfa.IsFinal(state) && count >= min ? 1 : 0);
    for (uint32_t c = 0; c < dfa.columns; ++c) {
      const uint32_t to = dfa.next[size_t{state} * dfa.columns + c];
      uint32_t next = count + begins[c];
      if (to == kDead || (next > most && max != UINT32_MAX)) {
        out.next.push_back(kDead);
        continue;
      }
      next = std::min(next, most);
      const auto [it, fresh] = index.emplace(uint64_t{to} << 32 | next, static_cast<uint32_t>(places.size()));
      if (fresh) places.emplace_back(to, next);
      out.next.push_back(it->second);
    }
  }
  budget.DropStates(places.size());
  return Minimize(out, budget);
}

absl::StatusOr<Dfa> Utf8Without(const std::vector<std::string>& stops, Budget& budget) {
  TP_ASSIGN_OR_RETURN(const Dfa text, AnyUtf8(budget));
  if (stops.empty()) return text;
  // Any bytes, then a stop, then any bytes: what is to be left out.
  Nfa holds;
  const uint32_t before = holds.Add(), after = holds.Add();
  holds.Connect(before, 0, 255, before);
  holds.Connect(after, 0, 255, after);
  for (const std::string& stop : stops) {
    uint32_t at = before;
    for (size_t i = 0; i < stop.size(); ++i) {
      const uint32_t to = i + 1 == stop.size() ? after : holds.Add();
      holds.Connect(at, static_cast<uint8_t>(stop[i]), static_cast<uint8_t>(stop[i]), to);
      at = to;
    }
    TP_RETURN_IF_ERROR(budget.Work(stop.size()));
    TP_RETURN_IF_ERROR(budget.CheckNfa(holds.states.size()));
  }
  TP_ASSIGN_OR_RETURN(const Dfa bad, Determinize(holds, before, after, budget));
  return Subtract(text, bad, budget);
}

uint32_t CharactersMin(const Dfa& dfa) {
  if (dfa.empty()) return 0;
  // Breadth first; continuation bytes cost nothing.
  std::vector<uint32_t> best(dfa.states(), kDead);
  std::deque<uint32_t> queue{0};
  best[0] = 0;
  while (!queue.empty()) {
    const uint32_t s = queue.front();
    queue.pop_front();
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t to = dfa.Next(s, static_cast<uint8_t>(byte));
      if (to == kDead) continue;
      const bool continuation = byte >= 0x80 && byte < 0xC0;
      const uint32_t cost = best[s] + (continuation ? 0 : 1);
      if (cost >= best[to]) continue;
      best[to] = cost;
      continuation ? queue.push_front(to) : queue.push_back(to);
    }
  }
  uint32_t least = kDead;
  for (uint32_t s = 0; s < dfa.states(); ++s) {
    if (dfa.IsFinal(s)) least = std::min(least, best[s]);
  }
  return least;
}

uint32_t CharactersMax(const Dfa& dfa) {
  if (dfa.empty()) return 0;
  // Longest path in topological order; a cycle (there is no cycle of continuation bytes alone in valid
  // UTF-8) means no limit.
  const size_t n = dfa.states();
  std::vector<uint32_t> incoming(n, 0);
  for (const uint32_t to : dfa.next) {
    if (to != kDead) ++incoming[to];
  }
  std::vector<uint32_t> longest(n, 0), ready;
  if (incoming[0] != 0) return UINT32_MAX;
  ready.push_back(0);
  size_t done = 0;
  std::vector<uint8_t> kind(dfa.columns, 0);  // 1: a character begins
  for (size_t byte = 0; byte < 256; ++byte) {
    if (byte < 0x80 || byte >= 0xC0) kind[dfa.classes[byte]] = 1;
  }
  while (!ready.empty()) {
    const uint32_t s = ready.back();
    ready.pop_back();
    ++done;
    for (uint32_t c = 0; c < dfa.columns; ++c) {
      const uint32_t to = dfa.next[size_t{s} * dfa.columns + c];
      if (to == kDead) continue;
      longest[to] = std::max(longest[to], longest[s] + kind[c]);
      if (--incoming[to] == 0) ready.push_back(to);
    }
  }
  if (done < n) return UINT32_MAX;
  uint32_t most = 0;
  for (size_t s = 0; s < n; ++s) {
    if (dfa.final[s] != 0) most = std::max(most, longest[s]);
  }
  return most;
}

}  // namespace tidepool::structured
