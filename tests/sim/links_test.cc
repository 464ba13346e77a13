#include "tools/simulate/links.h"

#include <gtest/gtest.h>

#include <map>

#include "base/rng.h"

namespace tidepool {
namespace {

std::map<uint64_t, double> Ends(Links& links) {
  std::map<uint64_t, double> out;
  while (links.running() > 0) {
    const double at = ToSeconds(links.next());
    out[links.Pop()] = at;
  }
  return out;
}

TEST(LinksTest, OneTransferHasTheWholeLink) {
  Links links(2, 1e9);
  links.Start(7, 0, 1, 5e8, kSimSecond);
  EXPECT_NEAR(Ends(links)[7], 1.5, 1e-6);
  EXPECT_EQ(links.next(), Links::kNever);
}

TEST(LinksTest, TransfersOutOfOneNodeShareItsLinkAndGetItBack) {
  Links links(3, 1e9);
  links.Start(1, 0, 1, 1e9, 0);
  links.Start(2, 0, 2, 5e8, 0);
  auto ends = Ends(links);
  EXPECT_NEAR(ends[2], 1.0, 1e-6) << "half of the link";
  EXPECT_NEAR(ends[1], 1.5, 1e-6) << "half for a second, then all";
}

TEST(LinksTest, BothDirectionsAreIndependent) {
  Links links(2, 1e9);
  links.Start(1, 0, 1, 1e9, 0);
  links.Start(2, 1, 0, 1e9, 0);
  auto ends = Ends(links);
  EXPECT_NEAR(ends[1], 1.0, 1e-6);
  EXPECT_NEAR(ends[2], 1.0, 1e-6);
}

TEST(LinksTest, CutEndsWhatTouchesTheNodeAndLeavesTheRest) {
  Links links(4, 1e9);
  links.Start(1, 0, 1, 1e9, 0);
  links.Start(2, 2, 0, 1e9, 0);
  links.Start(3, 2, 3, 1e9, 0);
  std::vector<uint64_t> cut;
  links.Cut(0, kSimSecond / 2, cut);
  EXPECT_EQ(cut, (std::vector<uint64_t>{1, 2}));
  EXPECT_NEAR(Ends(links)[3], 1.25, 1e-6) << "shared its sender for half a second";
}

TEST(LinksTest, NoLinkCarriesMoreThanItCan) {
  // Whatever comes when: all the bytes take at least as long as the fullest link needs, and none is lost.
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    SCOPED_TRACE(seed);
    Rng rng(seed);
    Links links(5, 1e9);
    double out[5] = {}, in[5] = {};
    std::map<uint64_t, double> ends;
    SimTime now = 0;
    for (uint64_t id = 1; id <= 100; ++id) {
      now += static_cast<SimTime>(rng.Below(kSimSecond / 20));
      while (links.next() <= now) {
        const double at = ToSeconds(links.next());
        ends[links.Pop()] = at;
      }
      const auto from = static_cast<uint32_t>(rng.Below(5)),
                 to = (from + 1 + static_cast<uint32_t>(rng.Below(4))) % 5;
      const double bytes = 1e6 + static_cast<double>(rng.Below(100'000'000));
      out[from] += bytes;
      in[to] += bytes;
      links.Start(id, from, to, bytes, now);
    }
    ends.merge(Ends(links));
    ASSERT_EQ(ends.size(), 100u);
    double last = 0, fullest = 0;
    for (const auto& [id, at] : ends) last = std::max(last, at);
    for (int i = 0; i < 5; ++i) fullest = std::max({fullest, out[i] / 1e9, in[i] / 1e9});
    EXPECT_GE(last, fullest * (1 - 1e-9));
  }
}

}  // namespace
}  // namespace tidepool
