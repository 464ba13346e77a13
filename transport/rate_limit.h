#pragma once

#include <cstdint>
#include <memory>

#include "base/clock.h"
#include "base/probe.h"
#include "transport/transport.h"

namespace tidepool {

// Wraps `inner` so that at most `bytes_per_second` leave it, bulk and control together: a token bucket that
// holds at most 1 ms of sending. It behaves as a link of that speed does: what is sent is handed to `inner`
// when the link would have delivered its last byte, one thing after the other, control messages before bulk
// data. What is received is not held back. 0: no limit, `inner` comes back as it is.
//
// Bounded: 4 MiB of waiting control messages and 4096 waiting bulk transfers (whose payload stays borrowed);
// beyond: ResourceExhausted. Everything else is as Transport says.
std::unique_ptr<Transport> LimitRate(std::unique_ptr<Transport> inner, uint64_t bytes_per_second,
                                     const Clock* clock = &Clock::Real(), MetricRegistry* metrics = nullptr);

}  // namespace tidepool
