#include "server/bench/workload.h"

#include "absl/functional/any_invocable.h"

namespace tidepool {
namespace {

class DrawnSource final : public SessionSource {
 public:
  using Draw = absl::AnyInvocable<std::vector<Turn>(Rng&)>;
  DrawnSource(uint64_t seed, Draw draw) : rng_(seed), draw_(std::move(draw)) {}

  std::optional<Session> Next() override { return Session{.start = std::nullopt, .turns = draw_(rng_)}; }

 private:
  Rng rng_;
  Draw draw_;
};

}  // namespace

std::unique_ptr<SessionSource> MakeSource(const RandomWorkload& workload, uint64_t seed) {
  return std::make_unique<DrawnSource>(seed, [workload](Rng& rng) {
    Turn turn;
    turn.pieces = {{rng.Next(), workload.input.Draw(rng)}};
    turn.output_tokens = workload.output.Draw(rng);
    return std::vector<Turn>{std::move(turn)};
  });
}

std::unique_ptr<SessionSource> MakeSource(const SharedPrefixWorkload& workload, uint64_t seed) {
  return std::make_unique<DrawnSource>(seed, [workload, seed](Rng& rng) {
    Turn turn;
    turn.pieces = {{Mix64(seed) ^ Mix64(rng.Below(workload.groups)), workload.prefix_tokens},
                   {rng.Next(), workload.suffix.Draw(rng)}};
    turn.output_tokens = workload.output.Draw(rng);
    return std::vector<Turn>{std::move(turn)};
  });
}

std::unique_ptr<SessionSource> MakeSource(const MultiTurnWorkload& workload, uint64_t seed) {
  return std::make_unique<DrawnSource>(seed, [workload](Rng& rng) {
    std::vector<Turn> turns(workload.turns.Draw(rng));
    for (Turn& turn : turns) {
      turn.pieces = {{rng.Next(), workload.input.Draw(rng)}};
      turn.output_tokens = workload.output.Draw(rng);
      if (&turn != &turns.front()) turn.think = workload.think;
    }
    return turns;
  });
}

}  // namespace tidepool
