#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "base/digest.h"

namespace tidepool {

// A connection as this process sees it. Never reused within a process's life.
using EndpointId = uint64_t;

// What a receiver answers when bulk data is announced: where to put it. An empty `dst` drops the data.
// `done` runs exactly once, when nothing will write to `dst` any more: OK means that all bytes are there.
struct BulkSink {
  std::span<std::byte> dst;
  std::function<void(absl::Status)> done;
  // Of dst.size() bytes, or null. A transport may let it take the bytes as they land, in order from the
  // first, while they are in the cache: what it took is what stays in `dst`. After an OK the receiver takes
  // the rest, from digest->size() on. Borrowed until `done`.
  PayloadDigest* digest = nullptr;
};

// TransportHandler: called from inside Transport::Progress, on its caller's thread.
class TransportHandler {
 public:
  virtual ~TransportHandler() = default;
  // A control message; `message` is borrowed for the call. From an endpoint never seen before: a peer
  // connected to us.
  virtual void OnMessage(EndpointId from, std::string_view message) = 0;
  // Bulk data of `length` bytes is announced. dst.size() must be `length` or 0. Runs in the middle of the
  // transport's own work: it must not call the transport. `header` is borrowed for the call.
  virtual BulkSink OnBulk(EndpointId from, std::string_view header, size_t length) = 0;
  // The endpoint failed or was closed by the peer. The handler calls Close to learn of quiescence.
  virtual void OnEndpointDown(EndpointId endpoint, absl::Status why) = 0;
};

// Transport: moves bytes between processes by active messages; the receiver always chooses the memory,
// and no address travels. Single-threaded: one driver thread makes every call. Messages on an endpoint
// may overtake each other (bulk and control use different protocols): the layer above tolerates loss,
// duplication and reordering.
class Transport {
 public:
  virtual ~Transport() = default;

  virtual void SetHandler(TransportHandler* handler) = 0;
  // An opaque blob by which peers connect to us.
  virtual std::string Address() const = 0;
  // "ucx", "inproc": the label of metrics and traces.
  virtual std::string_view Name() const = 0;

  // InvalidArgument: a malformed address. Says nothing of whether the peer is alive: that is HELLO's work.
  virtual absl::StatusOr<EndpointId> Connect(std::string_view address) = 0;

  // At most kMaxMessageBytes; copied before returning. Unavailable: the endpoint is down.
  static constexpr size_t kMaxMessageBytes = 256 * 1024;
  virtual absl::Status Send(EndpointId to, std::string_view message) = 0;

  // Bulk: `payload` is borrowed until `done` runs (from Progress, exactly once, also on failure and Close;
  // not at all where SendBulk itself returns an error). Its OK means that the payload may be reused, never
  // that it was delivered. header: at most 512 bytes, copied.
  virtual absl::Status SendBulk(EndpointId to, std::string_view header, std::span<const std::byte> payload,
                                std::function<void(absl::Status)> done) = 0;

  // Force-closes. `quiesced` runs (from Progress) after the `done` of every transfer on the endpoint: from
  // then on nothing of it writes to our memory, and what a peer of this host still reads of a payload does
  // not count there. Closing an unknown or closed endpoint runs `quiesced` at the next Progress.
  virtual void Close(EndpointId endpoint, std::function<void()> quiesced) = 0;

  // Memory of this process that peers of its host may be given to read, so that a payload in it is copied
  // only once, by its receiver. `memory`: the whole mapping of `fd`, a memfd that nobody else can write to or
  // shrink (base/shared_memory.h). Both outlive the transport. Called before the first Connect and Progress,
  // at most once. A transport that has no use for it does nothing.
  virtual void ShareMemory(int /*fd*/, std::span<const std::byte> /*memory*/) {}

  // Moves things along; returns the number of events handled. Never blocks.
  virtual int Progress() = 0;
  // Blocks until there may be something for Progress, or `timeout_ms` passed, or Wake was called.
  virtual void Wait(int timeout_ms) = 0;
  // The one call that other threads may make.
  virtual void Wake() = 0;
};

}  // namespace tidepool
