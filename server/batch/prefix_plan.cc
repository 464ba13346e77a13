#include "server/batch/prefix_plan.h"

#include <algorithm>
#include <compare>
#include <numeric>

namespace tidepool {
namespace {

uint32_t Shared(const PromptPath& a, const PromptPath& b) {
  const auto [x, y] = std::ranges::mismatch(a.units, b.units);
  return static_cast<uint32_t>(x - a.units.begin());
}

// Node: prompts [begin, end) of the sorted order, two or more, share `depth` units, and no further one does.
struct Node {
  uint32_t depth = 0;
  uint32_t begin = 0, end = 0;
  int32_t parent = -1;
  uint32_t above = 0;              // nodes above it that count, kOpenGroupsMax at most
  size_t choices = 0;              // where its choices begin
  std::vector<uint32_t> children;  // by begin
};

// PrefixTree: the radix tree over sorted prompts, without its leaves: the intervals of the array of common
// prefixes; and the best choice of groups in it.
class PrefixTree {
 public:
  PrefixTree(std::span<const PromptPath> prompts, uint32_t min_shared) : sorted_(prompts.size()) {
    std::iota(sorted_.begin(), sorted_.end(), 0u);
    std::ranges::sort(sorted_, [&](uint32_t a, uint32_t b) {
      const auto order = std::lexicographical_compare_three_way(
          prompts[a].units.begin(), prompts[a].units.end(), prompts[b].units.begin(), prompts[b].units.end());
      return order != 0 ? order < 0 : a < b;
    });
    Build(prompts, min_shared);
    Choose();
  }

  const std::vector<uint32_t>& sorted() const { return sorted_; }
  const Node& node(int32_t i) const { return nodes_[static_cast<size_t>(i)]; }
  size_t size() const { return nodes_.size(); }
  // The deepest node above a sorted position; -1: none.
  int32_t above(uint32_t position) const { return parent_of_[position]; }

  // The state of a node: which open group is above it, counted from the nearest node; node.above: none.
  bool Opens(const Node& u, uint32_t state) const { return opens_[u.choices + state]; }
  uint64_t Best(const Node& u, uint32_t state) const { return best_[u.choices + state]; }
  // A child's state, where u joins what is above it. Where u opens a group it is 0.
  static uint32_t Below(const Node& u, uint32_t state, const Node& child) {
    return state == u.above || state + 1 >= child.above ? child.above : state + 1;
  }

 private:
  Node& At(int32_t node) { return nodes_[static_cast<size_t>(node)]; }
  int32_t Add(uint32_t depth, uint32_t begin) {
    Node node;
    node.depth = depth;
    node.begin = begin;
    nodes_.push_back(std::move(node));
    return static_cast<int32_t>(nodes_.size() - 1);
  }
  void Adopt(int32_t parent, int32_t child) {
    At(child).parent = parent;
    At(parent).children.push_back(static_cast<uint32_t>(child));
  }

  void Build(std::span<const PromptPath> prompts, uint32_t min_shared) {
    const auto n = static_cast<uint32_t>(sorted_.size());
    parent_of_.assign(n, -1);
    std::vector<int32_t> open;  // a path of nodes, the deepest last
    for (uint32_t i = 1; i <= n; ++i) {
      uint32_t shared = i == n ? 0 : Shared(prompts[sorted_[i - 1]], prompts[sorted_[i]]);
      if (shared < min_shared) shared = 0;
      uint32_t begin = i - 1;
      int32_t orphan = -1;  // closed, and the node above it is not open yet
      while (!open.empty() && At(open.back()).depth > shared) {
        const int32_t closed = open.back();
        open.pop_back();
        closed_.push_back(closed);
        At(closed).end = i;
        begin = At(closed).begin;
        orphan = closed;
        if (!open.empty() && At(open.back()).depth >= shared) {
          Adopt(open.back(), closed);
          orphan = -1;
        }
      }
      if (shared == 0) continue;
      if (open.empty() || At(open.back()).depth < shared) {
        const int32_t node = Add(shared, begin);
        if (orphan >= 0) Adopt(node, orphan);
        open.push_back(node);
      }
      int32_t& left = parent_of_[i - 1];
      if (left < 0 || At(left).depth < shared) left = open.back();
      parent_of_[i] = open.back();
    }
  }

  // Nodes are closed after those below them.
  void Choose() {
    size_t choices = 0;
    for (auto it = closed_.rbegin(); it != closed_.rend(); ++it) {
      Node& u = At(*it);
      u.above = u.parent < 0 ? 0 : std::min(kOpenGroupsMax, At(u.parent).above + 1);
      u.choices = choices;
      choices += u.above + 1;
    }
    best_.resize(choices);
    opens_.resize(choices);
    for (const int32_t i : closed_) {
      const Node& u = At(i);
      int64_t ends = u.end - u.begin;
      uint64_t below = 0;
      for (const uint32_t child : u.children) {
        const Node& c = nodes_[child];
        ends -= c.end - c.begin;
        below += Best(c, 0);
      }
      const int64_t opened = static_cast<int64_t>(below) + (ends - 1) * int64_t{u.depth};
      int32_t above = u.parent;
      for (uint32_t state = 0; state <= u.above; ++state) {
        const int64_t depth = state == u.above ? 0 : At(above).depth;
        int64_t joined = ends * depth;
        for (const uint32_t child : u.children) {
          const Node& c = nodes_[child];
          joined += static_cast<int64_t>(Best(c, Below(u, state, c)));
        }
        opens_[u.choices + state] = opened >= joined;
        best_[u.choices + state] = static_cast<uint64_t>(std::max(opened, joined));
        if (state < u.above) above = At(above).parent;
      }
    }
  }

  std::vector<uint32_t> sorted_;
  std::vector<Node> nodes_;
  std::vector<int32_t> parent_of_;
  std::vector<int32_t> closed_;  // nodes, in the order in which they were complete
  std::vector<uint64_t> best_;
  std::vector<bool> opens_;
};

// Puts a tree's prompts in order, group by group.
class Emitter {
 public:
  Emitter(std::span<const PromptPath> prompts, const PrefixTree& tree, PrefixPlan& plan)
      : prompts_(prompts), tree_(tree), plan_(plan), carrier_(tree.size(), -1) {}

  // Prompts of one tree; `root`: its node, -1 for a prompt at `begin` that shares nothing.
  void Tree(uint32_t begin, int32_t root) {
    if (root < 0) return Prompt(begin, plan_.groups++);
    std::vector<Visit> todo{{root, tree_.node(root).above}};
    while (!todo.empty()) {
      const Visit visit = todo.back();
      todo.pop_back();
      std::vector<Visit> apart;
      Group(visit, apart);
      todo.insert(todo.end(), apart.rbegin(), apart.rend());
    }
  }

 private:
  struct Visit {
    int32_t node;
    uint32_t state;
  };
  struct Frame {
    const Node* node;
    uint32_t state;  // of its children, where it opens a group; else its own
    bool opens;
    uint32_t position;
    size_t child = 0;
  };

  // The prompts of the group that opens here (or of none, each by itself), depth first; nodes that open
  // groups of their own go to `apart`.
  void Group(Visit visit, std::vector<Visit>& apart) {
    const Node& top = tree_.node(visit.node);
    const bool opens = tree_.Opens(top, visit.state);
    const uint32_t group = plan_.groups;
    if (opens) ++plan_.groups;
    const auto ends = [&](Frame& frame, uint32_t end) {
      for (; frame.position < end; ++frame.position) Prompt(frame.position, opens ? group : plan_.groups++);
    };
    std::vector<Frame> path{{&top, visit.state, opens, top.begin}};
    while (!path.empty()) {
      Frame& frame = path.back();
      if (frame.child == frame.node->children.size()) {
        ends(frame, frame.node->end);
        path.pop_back();
        continue;
      }
      const auto child = static_cast<int32_t>(frame.node->children[frame.child++]);
      const Node& c = tree_.node(child);
      ends(frame, c.begin);
      frame.position = c.end;
      const uint32_t state = frame.opens ? 0 : PrefixTree::Below(*frame.node, frame.state, c);
      if (tree_.Opens(c, state)) {
        apart.push_back({child, state});
      } else {
        path.push_back({&c, state, false, c.begin});
      }
    }
  }

  void Prompt(uint32_t position, uint32_t group) {
    PlannedPrompt out;
    out.item = tree_.sorted()[position];
    out.group = group;
    const auto at = static_cast<int32_t>(plan_.order.size());
    // Upwards past all nodes that nobody came through yet; this one computes them.
    for (int32_t node = tree_.above(position); node >= 0; node = tree_.node(node).parent) {
      int32_t& carrier = carrier_[static_cast<size_t>(node)];
      if (carrier >= 0) {
        out.after = carrier;
        out.shared = tree_.node(node).depth;
        break;
      }
      carrier = at;
    }
    const uint64_t units = prompts_[out.item].units.size();
    plan_.units += units;
    plan_.units_computed += units - out.shared;
    plan_.order.push_back(out);
  }

  const std::span<const PromptPath> prompts_;
  const PrefixTree& tree_;
  PrefixPlan& plan_;
  std::vector<int32_t> carrier_;  // of each node: the position in the order that computes it
};

struct Tree {
  uint32_t begin = 0;
  int32_t root = -1;
  uint32_t first = 0;  // the least item in it
  double ratio = 0;
};

// Units that a tree's prompts are computed from, each prefix once.
uint64_t TreeUnits(std::span<const PromptPath> prompts, const PrefixTree& tree, uint32_t begin,
                   uint32_t end) {
  uint64_t units = 0;
  for (uint32_t i = begin; i < end; ++i) {
    const PromptPath& prompt = prompts[tree.sorted()[i]];
    units += prompt.units.size() - (i == begin ? 0 : Shared(prompts[tree.sorted()[i - 1]], prompt));
  }
  return units;
}

}  // namespace

PrefixPlan PlanPrefixes(std::span<const PromptPath> prompts, uint32_t min_shared) {
  PrefixPlan plan;
  plan.order.reserve(prompts.size());
  const PrefixTree tree(prompts, std::max(1u, min_shared));
  std::vector<Tree> trees;
  for (uint32_t begin = 0; begin < prompts.size();) {
    Tree one;
    one.begin = begin;
    for (int32_t node = tree.above(begin); node >= 0; node = tree.node(node).parent) one.root = node;
    const uint32_t end = one.root < 0 ? begin + 1 : tree.node(one.root).end;
    if (one.root >= 0) plan.units_saved_first_level += tree.Best(tree.node(one.root), 0);
    uint64_t decode = 0;
    one.first = tree.sorted()[begin];
    for (uint32_t i = begin; i < end; ++i) {
      decode += prompts[tree.sorted()[i]].decode_tokens;
      one.first = std::min(one.first, tree.sorted()[i]);
    }
    one.ratio = static_cast<double>(decode) /
                static_cast<double>(std::max<uint64_t>(1, TreeUnits(prompts, tree, begin, end)));
    trees.push_back(one);
    begin = end;
  }
  std::ranges::sort(trees, [](const Tree& a, const Tree& b) {
    return a.ratio != b.ratio ? a.ratio > b.ratio : a.first < b.first;
  });
  Emitter emitter(prompts, tree, plan);
  for (const Tree& one : trees) emitter.Tree(one.begin, one.root);
  return plan;
}

PrefixPlan PlanInOrder(std::span<const PromptPath> prompts) {
  PrefixPlan plan;
  plan.order.reserve(prompts.size());
  for (uint32_t i = 0; i < prompts.size(); ++i) {
    plan.order.push_back({i, -1, 0, plan.groups++});
    plan.units += prompts[i].units.size();
  }
  plan.units_computed = plan.units;
  return plan;
}

}  // namespace tidepool
