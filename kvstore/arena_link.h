#pragma once

#include <functional>
#include <memory>
#include <string>

#include "base/clock.h"
#include "base/probe.h"
#include "kvstore/block_pool.h"
#include "kvstore/fetch_node.h"
#include "kvstore/offer_table.h"

namespace tidepool {

// ArenaLink: the part of FetchNode that goes over the memory of processes on the same host: an ArenaServer
// for those that fetch from here, an ArenaClient for fetching from them. Thread-safe.
class ArenaLink {
 public:
  using Done = std::function<void(FetchResult)>;
  struct Options {
    std::string worker_id;
    std::string boot_id;
    std::string fingerprint;
    BlockPool* pool = nullptr;
    std::shared_ptr<OfferTable> offers;
    const Clock* clock = &Clock::Real();
    MetricRegistry* metrics = nullptr;
    // Fetches by the transport what cannot be had this way. Runs on the caller's thread or on the link's.
    std::function<void(FetchSpec, Done)> otherwise;
    // Ends with Cancelled what `otherwise` was given of (request, attempt). Called on the link's thread where
    // Abort came while the fetch was being handed over.
    std::function<void(const std::string& request_id, uint32_t attempt)> abort_otherwise;
  };

  explicit ArenaLink(Options options);
  // Ends what is under way; clears the offers.
  ~ArenaLink();

  // Empty: this process's memory cannot be shared (the log says why). Others' may be, all the same.
  const std::string& address() const { return address_; }
  // True: the link has the fetch, and `done` runs once: here, on this thread, if the peer has all of it on
  // offer, else on the link's thread, or wherever `otherwise` runs it. False: it is none for the link;
  // nothing was touched.
  bool Fetch(FetchSpec& spec, Done& done);
  void Abort(const std::string& request_id, uint32_t attempt);
  // False: the peer has to be told by the transport.
  bool SendRelease(const PeerAddress& peer, const std::string& request_id);
  size_t active() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
  std::string address_;
};

}  // namespace tidepool
