#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/time/time.h"
#include "kvstore/block_pool.h"
#include "kvstore/types.h"

namespace tidepool {

// OfferObserver: is told of complete offers as they come and go. Called under the table's lock, in order:
// must neither block nor call the table.
class OfferObserver {
 public:
  virtual ~OfferObserver() = default;
  virtual void OnOffered(const std::string& request, const BlockKey& key, const BlockLease& lease) = 0;
  // The request offers nothing any more. `leases`: of all its offers, dropped afterwards; whoever still needs
  // them takes them out.
  virtual void OnDropped(const std::string& request, std::vector<BlockLease>& leases) = 0;
  // Growing offers were revoked: what waits for them waits in vain.
  virtual void OnRevoked(const std::string& request) = 0;
};

// OfferTable: the blocks that this process lets peers fetch, by request, each pinned by a lease until its
// request is released or has been left alone for `lease`: whoever offers to or finds something in a request
// keeps all of its offers. A block whose layers are not all there yet is a *growing* offer. Shared by
// whatever serves peers (FetchServer over a transport, ArenaServer on this host). Thread-safe; no clock:
// `now` is passed in and only grows.
class OfferTable {
 public:
  struct Found {
    BlockLease lease;  // the finder's own
    uint32_t layers_ready;
    // Another one where the block is begun again, though it be in the same slot: layers of two epochs never
    // make one block.
    uint64_t epoch;
  };

  // `layers`: of a complete block.
  OfferTable(uint32_t layers, absl::Duration lease) : layers_(layers), lease_(lease) {}

  // At most one, set before there are offers; null drops them all. It outlives what it observes.
  void SetObserver(OfferObserver* observer);

  // Layers [0, layers_ready) of the block are final. A complete offer that is there already stays: what a
  // key names never changes.
  void Offer(const std::string& request, const BlockKey& key, BlockLease lease, uint32_t layers_ready,
             absl::Time now);
  // Raises layers_ready of the named growing offers (no names: of all of the request's).
  void Advance(const std::string& request, std::span<const BlockKey> keys, uint32_t layers_ready,
               absl::Time now);
  // Drops the request's growing offers.
  void Revoke(const std::string& request);
  // nullopt: the request does not offer the key.
  std::optional<Found> Find(const std::string& request, const BlockKey& key, absl::Time now);
  // Drops the request's offers; returns how many there were. What was found in it stays with its finders.
  size_t Release(const std::string& request);
  // As Release, and what is offered to the request later is dropped at once: its fetcher has said that it is
  // through, and nobody would come for it. The last 8192 such requests are remembered.
  size_t Close(const std::string& request);
  // Drops what has run out; returns how many blocks.
  size_t Expire(absl::Time now);
  void Clear();

  size_t size() const { return size_.load(std::memory_order_relaxed); }  // blocks on offer
  // When Expire is next needed, InfiniteFuture with nothing on offer. May be early, never late.
  absl::Time next_expiry() const;

 private:
  struct Request {
    // Of the blocks, in the order in which they were offered. The leases lie apart, to be handed on as one.
    std::vector<BlockLease> leases;
    std::vector<uint32_t> layers_ready;
    std::vector<uint64_t> epochs;
    absl::flat_hash_map<BlockKey, size_t> index;
    absl::Time until;
  };

  void Renew(Request& r, absl::Time now);
  void Raise(const std::string& request, Request& r, const BlockKey& key, size_t i, uint32_t layers_ready);
  void Drop(const std::string& request, Request& r);
  void DropAll(absl::flat_hash_map<std::string, Request>& dropped);

  const uint32_t layers_;
  const absl::Duration lease_;
  std::atomic<size_t> size_{0};
  mutable std::mutex mu_;  // guards what follows
  absl::flat_hash_map<std::string, Request> requests_;
  absl::flat_hash_set<std::string> closed_;
  std::deque<std::string> closed_order_;  // oldest first
  uint64_t next_epoch_ = 1;
  absl::Time next_expiry_ = absl::InfiniteFuture();
  OfferObserver* observer_ = nullptr;
};

}  // namespace tidepool
