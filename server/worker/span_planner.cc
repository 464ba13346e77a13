#include "server/worker/span_planner.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

namespace tidepool {
namespace {

bool Has(const LoadSource& source, uint32_t block) {
  const auto after = std::upper_bound(source.has.begin(), source.has.end(), block,
                                      [](uint32_t b, const BlockRange& r) { return b < r.begin; });
  return after != source.has.begin() && block < std::prev(after)->end;
}

}  // namespace

SpanPlan PlanSpan(const LoadSpan& span, const std::vector<LoadSource>& sources, const PrefillCost& prefill,
                  bool load_all) {
  const auto compute = [&](uint32_t from) {
    const uint64_t cached = uint64_t{from} * span.block_tokens;
    return prefill(span.prompt_tokens - cached, cached);
  };
  SpanPlan plan;
  plan.compute_all_seconds = plan.compute_seconds = compute(span.begin);
  std::vector<uint32_t> chosen;
  std::vector<uint32_t> asked(sources.size(), 0);
  double load = 0;
  double best = plan.compute_all_seconds;
  for (uint32_t block = span.begin; block < span.end; ++block) {
    std::optional<uint32_t> first;
    double first_at = std::numeric_limits<double>::infinity();
    for (uint32_t s = 0; s < sources.size(); ++s) {
      if (!Has(sources[s], block)) continue;
      const double at = sources[s].latency_seconds + sources[s].queued_seconds +
                        (asked[s] + 1) * sources[s].seconds_per_block;
      if (at < first_at) {
        first_at = at;
        first = s;
      }
    }
    if (!first) break;
    ++asked[*first];
    chosen.push_back(*first);
    load = std::max(load, first_at);
    const double rest = compute(block + 1);
    if (!load_all && load + rest > best) continue;
    best = load + rest;
    plan.sources = chosen;
    plan.load_seconds = load;
    plan.compute_seconds = rest;
  }
  return plan;
}

SpanLoad::SpanLoad(const Options& options, const LoadSpan& span, std::vector<LoadSource> sources,
                   PrefillCost prefill, absl::Time now)
    : options_(options),
      span_(span),
      sources_(std::move(sources)),
      prefill_(std::move(prefill)),
      started_(now),
      plan_(PlanSpan(span_, sources_, prefill_, options_.load_all)),
      loss_(plan_.compute_all_seconds * options_.margin + absl::ToDoubleSeconds(options_.slack)),
      end_(span_.begin + static_cast<uint32_t>(plan_.sources.size())),
      next_(span_.begin),
      arrived_(span_.begin),
      here_(plan_.sources.size(), false),
      asked_(here_),
      moved_(here_) {
  for (const LoadSource& s : sources_) progress_.push_back({.seconds_per_block = s.seconds_per_block});
}

double SpanLoad::Compute(uint32_t from) const {
  const uint64_t cached = uint64_t{from} * span_.block_tokens;
  return prefill_(span_.prompt_tokens - cached, cached);
}

void SpanLoad::SkipAsked() {
  while (next_ < end_ && asked_[next_ - span_.begin]) ++next_;
}

bool SpanLoad::Move(uint32_t block) {
  const uint32_t i = block - span_.begin;
  if (moved_[i]) return false;
  for (uint32_t s = 0; s < sources_.size(); ++s) {
    if (s == plan_.sources[i] || progress_[s].failed || !Has(sources_[s], block)) continue;
    plan_.sources[i] = s;
    moved_[i] = true;
    asked_[i] = false;
    next_ = std::min(next_, block);
    return true;
  }
  return false;
}

std::vector<SpanLoad::Part> SpanLoad::Next(absl::Time now) {
  std::vector<Part> out;
  for (uint32_t s = 0; s < sources_.size(); ++s) {
    const LoadSource& source = sources_[s];
    const Progress& progress = progress_[s];
    uint32_t parts = 0;
    size_t under_way = 0;
    for (const Pending& p : pending_) {
      if (p.part.source != s) continue;
      ++parts;
      under_way += p.part.blocks.size();
    }
    uint32_t block = next_;
    for (; parts < source.max_parts; ++parts) {
      const auto mine = [&] { return SourceOf(block) == s && !asked_[block - span_.begin]; };
      while (block < end_ && !mine()) ++block;
      if (block >= end_) break;
      // When all that it was asked for is here.
      const double there = Since(now) + source.latency_seconds + (parts == 0 ? source.queued_seconds : 0) +
                           static_cast<double>(under_way) * progress.seconds_per_block;
      uint32_t most = source.max_part_blocks;
      if (!options_.load_all) {
        most = std::min(most, progress.next_part);
        const double left = limit() - Compute(block) - there;
        if (left < 2 * most * progress.seconds_per_block) {
          most = std::max(1u, static_cast<uint32_t>(std::max(0.0, left / 2 / progress.seconds_per_block)));
        }
      }
      Part part{.id = next_part_++, .source = s, .blocks = {}};
      for (; block < end_ && part.blocks.size() < most; ++block) {
        if (!mine()) continue;  // another source's, asked for in its own turn
        part.blocks.push_back(block);
        asked_[block - span_.begin] = true;
      }
      under_way += part.blocks.size();
      pending_.push_back(
          {.part = part,
           .asked = Since(now),
           .expected = there + static_cast<double>(part.blocks.size()) * progress.seconds_per_block});
      out.push_back(std::move(part));
    }
  }
  SkipAsked();
  return out;
}

void SpanLoad::Arrived(uint32_t part, const std::vector<bool>& filled, absl::Time now) {
  const auto it =
      std::find_if(pending_.begin(), pending_.end(), [&](const Pending& p) { return p.part.id == part; });
  if (it == pending_.end()) return;  // abandoned
  const Pending done = std::move(*it);
  pending_.erase(it);
  const uint32_t s = done.part.source;
  Progress& progress = progress_[s];
  std::vector<uint32_t> missing;
  for (size_t i = 0; i < done.part.blocks.size(); ++i) {
    const uint32_t block = done.part.blocks[i];
    if (i < filled.size() && filled[i]) {
      here_[block - span_.begin] = true;
    } else {
      missing.push_back(block);
    }
  }
  const auto blocks = static_cast<uint32_t>(done.part.blocks.size());
  if (missing.size() == blocks && sources_[s].max_part_blocks > 1) {
    progress.failed = true;
    for (uint32_t block = next_; block < end_; ++block) {
      if (SourceOf(block) == s && !asked_[block - span_.begin]) missing.push_back(block);
    }
  } else if (missing.size() < blocks) {
    // A source that was idle took its latency, too; one that was not began with this when the last had come.
    const double began = std::max(progress.last_arrival, done.asked + sources_[s].latency_seconds);
    const double seen = std::max(0.0, Since(now) - began) / blocks;
    progress.seconds_per_block = progress.last_arrival == 0 ? seen : (progress.seconds_per_block + seen) / 2;
    progress.last_arrival = Since(now);
    progress.next_part = std::max(progress.next_part, 2 * blocks);
  }
  for (const uint32_t block : missing) {
    if (block < end_ && !Move(block)) end_ = block;
  }
  next_ = std::min(next_, end_);
  SkipAsked();
  while (arrived_ < end_ && here_[arrived_ - span_.begin]) ++arrived_;
}

absl::Time SpanLoad::deadline() const {
  if (options_.load_all || done()) return absl::InfiniteFuture();
  double at = limit() - Compute(arrived_);
  // Of those on their way, the one that is asked for longest holds up the others.
  if (!pending_.empty()) at = std::min(at, pending_.front().expected + loss_);
  return started_ + absl::Seconds(at);
}

SpanLoad::Abandoned SpanLoad::Check(absl::Time now) {
  Abandoned out;
  if (now >= deadline()) {
    out.why = Stop::kComputeIsFaster;
    end_ = arrived_;
  }
  // Of a part, the rising blocks' first decides whether any of it is wanted.
  std::erase_if(pending_, [&](Pending& p) {
    if (p.part.blocks.front() < end_) return false;
    if (out.why == Stop::kNot) out.why = Stop::kMissing;
    out.parts.push_back(std::move(p.part));
    return true;
  });
  next_ = std::min(next_, end_);
  return out;
}

}  // namespace tidepool
