#include "kvstore/disk/disk_bench.h"

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/rng.h"
#include "base/status.h"
#include "kvstore/disk/blob_reference.h"
#include "kvstore/disk/disk_io.h"
#include "kvstore/disk/disk_tier.h"
#include "kvstore/disk/record.h"
#include "kvstore/disk/rocks_index.h"

extern char** environ;

namespace tidepool {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double Median(std::vector<double> v) {
  if (v.empty()) return 0;
  std::ranges::sort(v);
  return v[v.size() / 2];
}

// A directory below `path`, removed with all it holds.
class Workspace {
 public:
  explicit Workspace(const std::string& path) {
    std::error_code error;
    std::filesystem::create_directories(path, error);
    std::string name = path + "/tidepool-bench-XXXXXX";
    if (mkdtemp(name.data()) != nullptr) path_ = name;
  }
  ~Workspace() {
    std::error_code error;
    if (!path_.empty()) std::filesystem::remove_all(path_, error);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

class Pages {
 public:
  explicit Pages(size_t bytes) : bytes_(bytes) {
    data_ = static_cast<std::byte*>(
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0));
  }
  ~Pages() {
    if (ok()) munmap(data_, bytes_);
  }
  bool ok() const { return data_ != MAP_FAILED; }
  std::span<std::byte> span() const { return {data_, bytes_}; }

 private:
  std::byte* data_;
  size_t bytes_;
};

// What a program prints; NotFound where there is no such program.
absl::StatusOr<std::string> OutputOf(const std::vector<std::string>& command) {
  int fds[2];
  if (pipe2(fds, O_CLOEXEC) != 0) return absl::UnavailableError(std::string("pipe: ") + strerror(errno));
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, fds[1], 1);
  std::vector<char*> argv;
  for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  pid_t pid = 0;
  const int rc = posix_spawnp(&pid, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(fds[1]);
  std::string out;
  if (rc == 0) {
    char buffer[4096];
    for (ssize_t n = 0; (n = read(fds[0], buffer, sizeof buffer)) > 0;)
      out.append(buffer, static_cast<size_t>(n));
  }
  close(fds[0]);
  if (rc != 0) return absl::NotFoundError(command[0] + ": " + strerror(rc));
  int status = 0;
  waitpid(pid, &status, 0);
  if (!WIFEXITED(status) || WEXITSTATUS(status) == 127)
    return absl::NotFoundError(command[0] + ": not installed");
  if (WEXITSTATUS(status) != 0)
    return absl::UnavailableError(absl::StrCat(command[0], " exited with ", WEXITSTATUS(status)));
  return out;
}

// Reference: the disk without the tier. A file as large as the tier's, all of it written before.
class DiskReference {
 public:
  DiskReference(const DiskBenchOptions& options, const std::string& directory, size_t record_bytes)
      : options_(options), file_(directory + "/reference"), record_bytes_(record_bytes) {}

  // Bytes a second. The first call lays the file out.
  absl::StatusOr<double> Measure(bool write) {
    const size_t depth = write ? options_.write_depth : options_.read_depth;
    if (fio_) {
      auto rate = Fio(write, depth);
      if (!absl::IsNotFound(rate.status())) return rate;
      fio_ = false;
    }
    return Loop(write, depth);
  }
  std::string name() const { return fio_ ? "fio" : "plain direct I/O (fio is not installed)"; }

 private:
  absl::StatusOr<double> Fio(bool write, size_t depth) {
    const size_t total = options_.blocks * record_bytes_;
    TP_ASSIGN_OR_RETURN(
        const std::string out,
        OutputOf({"fio", "--name=reference", "--filename=" + file_,
                  absl::StrCat("--rw=", write ? "randwrite" : "randread"),
                  absl::StrCat("--bs=", record_bytes_), absl::StrCat("--size=", total), "--direct=1",
                  "--ioengine=io_uring", absl::StrCat("--iodepth=", depth), "--norandommap=0", "--minimal"}));
    // fio's terse format 3: fields by ';', bandwidths in KiB/s at 6 (reads) and 47 (writes).
    const std::vector<std::string> fields = absl::StrSplit(out, ';');
    double kib = 0;
    if (fields.size() < 48 || !absl::SimpleAtod(fields[write ? 47 : 6], &kib) || kib <= 0)
      return absl::UnavailableError("fio printed something else than its terse format");
    return kib * 1024;
  }

  absl::StatusOr<double> Loop(bool write, size_t depth) {
    const int fd = open(file_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_DIRECT, 0600);
    if (fd < 0) return absl::UnavailableError(file_ + ": " + strerror(errno));
    auto io = MakeDiskIo(depth);
    const Pages memory(depth * record_bytes_);
    if (!io.ok() || !memory.ok()) {
      close(fd);
      return absl::UnavailableError("no memory for the reference");
    }
    (*io)->Attach(fd);
    std::vector<size_t> order(options_.blocks);
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    Rng rng(1);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[rng.Below(i)]);
    const auto start = Clock::now();
    std::vector<DiskIo::Completion> done;
    size_t next = 0, ended = 0;
    int error = 0;
    const auto submit = [&](uint64_t slot) {
      (*io)->Submit({.write = write,
                     .offset = order[next] * record_bytes_,
                     .buffer = memory.span().subspan(slot * record_bytes_, record_bytes_),
                     .tag = slot});
      ++next;
    };
    for (size_t slot = 0; slot < depth && next < order.size(); ++slot) submit(slot);
    while (ended < order.size()) {
      done.clear();
      (*io)->Wait(absl::Seconds(10), done);
      for (const auto& c : done) {
        ++ended;
        error = c.error != 0 ? c.error : error;
        if (next < order.size()) submit(c.tag);
      }
    }
    const double seconds = SecondsSince(start);
    io->reset();
    close(fd);
    if (error != 0) return absl::UnavailableError(file_ + ": " + strerror(error));
    return static_cast<double>(order.size() * record_bytes_) / seconds;
  }

  const DiskBenchOptions& options_;
  const std::string file_;
  const size_t record_bytes_;
  bool fio_ = true;
};

BlockKey KeyOf(uint64_t n) {
  BlockKey key;
  Rng rng(n);
  for (size_t i = 0; i < key.bytes.size(); i += 8) {
    const uint64_t v = rng.Next();
    std::memcpy(key.bytes.data() + i, &v, 8);
  }
  return key;
}

// Keeps `depth` operations accepted (twice what the disk has under way, so that it never waits for the
// caller) until `count` have ended. `start(i, done)` begins operation i.
absl::Status KeepBusy(size_t count, size_t depth,
                      const std::function<void(size_t, std::function<void(absl::Status)>)>& start) {
  std::mutex mu;
  std::condition_variable cv;
  size_t under_way = 0;
  absl::Status first;
  for (size_t i = 0; i < count; ++i) {
    {
      std::unique_lock lock(mu);
      cv.wait(lock, [&] { return under_way < depth; });
      ++under_way;
    }
    start(i, [&](absl::Status s) {
      std::lock_guard lock(mu);
      if (!s.ok() && first.ok()) first = std::move(s);
      --under_way;
      cv.notify_one();
    });
  }
  std::unique_lock lock(mu);
  cv.wait(lock, [&] { return under_way == 0; });
  return first;
}

// The tier under measurement, with blocks to store and room to load to: enough of both that no cache holds
// them.
class TierBench {
 public:
  static constexpr size_t kBuffers = 64;

  static absl::StatusOr<std::unique_ptr<TierBench>> Make(const DiskBenchOptions& options,
                                                         const std::string& directory, bool lossless) {
    auto bench = std::unique_ptr<TierBench>(new TierBench(options));
    if (!bench->memory_.ok()) return absl::ResourceExhaustedError("no memory for the benchmark");
    Rng rng(7);
    for (size_t i = 0; i < bench->memory_.span().size(); i += 8) {
      const uint64_t v = lossless ? FourNumbers(rng) : rng.Next();
      std::memcpy(bench->memory_.span().data() + i, &v, 8);
    }
    DiskTierOptions o;
    o.path = directory;
    o.name = lossless ? "lossless" : "bench";
    o.compress = lossless;
    o.fingerprint = "bench";
    o.layout = {.layers = static_cast<uint32_t>(options.block_bytes / 4096),
                .kv_heads = 1,
                .head_dim = 32,
                .block_tokens = 32,
                .dtype = DType::kBF16};
    o.bytes = kDiskPageBytes + options.blocks * RecordBytes(RecordHeaderBytes(32), options.block_bytes);
    o.read_depth = options.read_depth;
    o.write_depth = options.write_depth;
    o.max_writes = 4 * options.write_depth;
    o.max_reads = 4 * options.read_depth;
    o.write_wait = absl::Seconds(30);
    o.read_timeout = absl::Seconds(30);
    o.slow_op = absl::Seconds(20);
    o.metrics = &bench->metrics_;
    TP_ASSIGN_OR_RETURN(bench->tier_, DiskTier::Create(std::move(o)));
    const TierHealth health = bench->tier_->WaitOpened(absl::Seconds(60));
    if (health.state != TierState::kOn)
      return absl::UnavailableError("the disk tier did not open: " + health.reason);
    return bench;
  }

  // Bytes of the disk that a block takes.
  double BytesOfBlock() const {
    const TierStats stats = tier_->stats();
    return static_cast<double>(stats.bytes) / static_cast<double>(std::max<uint64_t>(stats.blocks, 1));
  }
  // Stores `blocks` new ones, in place of what is there. Bytes of payload a second.
  absl::StatusOr<double> Store() {
    first_ += options_.blocks;
    const auto start = Clock::now();
    TP_RETURN_IF_ERROR(KeepBusy(options_.blocks, 2 * options_.write_depth,
                                [&](size_t i, auto done) { StoreOne(first_ + i, std::move(done)); }));
    return static_cast<double>(options_.blocks * options_.block_bytes) / SecondsSince(start);
  }
  // Loads as many as are there, in random order.
  absl::StatusOr<double> Load() {
    Rng rng(first_);
    std::vector<size_t> order(options_.blocks);
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[rng.Below(i)]);
    const auto start = Clock::now();
    TP_RETURN_IF_ERROR(KeepBusy(options_.blocks, 2 * options_.read_depth, [&](size_t i, auto done) {
      tier_->Read(KeyOf(first_ + order[i]), {}, Buffer(i), absl::Seconds(30),
                  [done](absl::StatusOr<BlockTier::Record> r) { done(r.status()); });
    }));
    return static_cast<double>(options_.blocks * options_.block_bytes) / SecondsSince(start);
  }
  // Loads while somebody stores whatever the tier takes; `stored` of it went to the disk meanwhile. Stores
  // need room of their own: they replace the older half, loads take the younger.
  absl::StatusOr<double> LoadWhileStoring(uint64_t& stored) {
    TP_RETURN_IF_ERROR(Store().status());  // so that the order of use is that of the numbers
    std::atomic<bool> stop = false;
    std::atomic<uint64_t> written = 0, under_way = 0;
    const size_t half = options_.blocks / 2;
    std::thread storer([&] {
      for (uint64_t n = first_ + 1'000'000'000; !stop; ++n) {
        while (under_way >= options_.write_depth && !stop)
          std::this_thread::sleep_for(std::chrono::microseconds(200));
        if (stop) break;
        ++under_way;
        StoreOne(n, [&](absl::Status s) {
          written += s.ok();
          --under_way;
        });
        if (written + under_way > half) break;  // what is left is being read
      }
      while (under_way > 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
    });
    Rng rng(first_);
    const auto start = Clock::now();
    // The younger half is read first, so that the older one goes.
    const absl::Status status = KeepBusy(options_.blocks, 2 * options_.read_depth, [&](size_t i, auto done) {
      tier_->Read(KeyOf(first_ + half + (i < half ? i : rng.Below(half))), {}, Buffer(i), absl::Seconds(30),
                  [done](absl::StatusOr<BlockTier::Record> r) { done(r.status()); });
    });
    const double seconds = SecondsSince(start);
    stored = written;
    stop = true;
    storer.join();
    TP_RETURN_IF_ERROR(status);
    return static_cast<double>(options_.blocks * options_.block_bytes) / seconds;
  }

 private:
  // bf16 numbers of about normal distribution, as KV has them.
  static uint64_t FourNumbers(Rng& rng) {
    uint64_t out = 0;
    for (int i = 0; i < 4; ++i) {
      double sum = 0;
      for (int k = 0; k < 4; ++k) sum += static_cast<double>(rng.Below(1 << 20)) / (1 << 19) - 1;
      out = out << 16 | std::bit_cast<uint32_t>(static_cast<float>(sum)) >> 16;
    }
    return out;
  }
  explicit TierBench(const DiskBenchOptions& options)
      : options_(options), memory_(kBuffers * options.block_bytes) {}
  std::span<std::byte> Buffer(size_t i) const {
    return memory_.span().subspan(i % kBuffers * options_.block_bytes, options_.block_bytes);
  }
  void StoreOne(uint64_t n, std::function<void(absl::Status)> done) {
    BlockInfo info;
    info.key = KeyOf(n);
    info.tokens.assign(32, static_cast<int32_t>(n));
    info.tenant = "bench";
    tier_->Write(info, Buffer(n), std::move(done));
  }

  const DiskBenchOptions& options_;
  Pages memory_;
  MetricRegistry metrics_;
  std::unique_ptr<DiskTier> tier_;
  uint64_t first_ = 0;  // number of the oldest block there
};

struct BlobRates {
  double put = 0, get = 0;
};
absl::StatusOr<BlobRates> MeasureBlobs(const DiskBenchOptions& options, const std::string& directory) {
  TP_ASSIGN_OR_RETURN(auto blobs, BlobReference::Open(directory));
  const Pages memory(TierBench::kBuffers * options.block_bytes);
  if (!memory.ok()) return absl::ResourceExhaustedError("no memory for the benchmark");
  Rng rng(7);
  for (size_t i = 0; i < memory.span().size(); i += 8) {
    const uint64_t v = rng.Next();
    std::memcpy(memory.span().data() + i, &v, 8);
  }
  const auto buffer = [&](size_t i) {
    return memory.span().subspan(i % TierBench::kBuffers * options.block_bytes, options.block_bytes);
  };
  BlobRates rates;
  const auto bytes = static_cast<double>(options.blocks * options.block_bytes);
  auto start = Clock::now();
  for (size_t i = 0; i < options.blocks; ++i) TP_RETURN_IF_ERROR(blobs->Put(i, buffer(i)));
  TP_RETURN_IF_ERROR(blobs->Flush());
  rates.put = bytes / SecondsSince(start);
  // Gets wait: as many readers as this machine has use for.
  const size_t readers = std::min<size_t>(8, options.read_depth);
  std::atomic<size_t> next = 0;
  std::atomic<bool> failed = false;
  start = Clock::now();
  std::vector<std::thread> threads;
  for (size_t t = 0; t < readers; ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = 0; (i = next++) < options.blocks;) {
        // An odd multiplier walks every key once, out of order, where the count is a power of two.
        if (!blobs->Get(i * 2654435761u % options.blocks, buffer(i)).ok()) failed = true;
      }
    });
  }
  for (std::thread& t : threads) t.join();
  rates.get = bytes / SecondsSince(start);
  if (failed) return absl::DataLossError("BlobDB: a value did not come back");
  return rates;
}

// Time until a tier with so many blocks is on; the extents are a hole in a sparse file.
absl::StatusOr<double> OpenSeconds(const std::string& directory, size_t block_bytes, uint64_t bytes,
                                   uint64_t& blocks) {
  DiskTierOptions o;
  MetricRegistry metrics;
  o.path = directory;
  o.name = "open";
  o.fingerprint = "bench";
  o.layout = {.layers = static_cast<uint32_t>(block_bytes / 4096),
              .kv_heads = 1,
              .head_dim = 32,
              .block_tokens = 32,
              .dtype = DType::kBF16};
  o.bytes = bytes;
  o.preallocate = false;
  o.metrics = &metrics;
  const auto open = [&]() -> absl::Status {
    TP_ASSIGN_OR_RETURN(const auto tier, DiskTier::Create(o));
    const TierHealth health = tier->WaitOpened(absl::Seconds(300));
    blocks = tier->stats().blocks;
    return health.state == TierState::kOn ? absl::OkStatus() : absl::UnavailableError(health.reason);
  };
  TP_RETURN_IF_ERROR(open());
  {
    TP_ASSIGN_OR_RETURN(auto index, RocksIndex::Open(directory + "/open/index"));
    const Sha256Digest space = RecordSpace(o.fingerprint, o.layout, o.codec);
    const uint64_t extents =
        (bytes - kDiskPageBytes) / RecordBytes(RecordHeaderBytes(32), o.layout.block_bytes());
    std::vector<RocksIndex::Change> batch;
    for (uint64_t n = 0; n < extents; ++n) {
      IndexEntry e;
      e.key = KeyOf(n);
      e.place = n * (RecordBytes(RecordHeaderBytes(32), o.layout.block_bytes()) / kDiskPageBytes);
      e.stamp = {1, n};
      std::memcpy(&e.space, space.data(), sizeof e.space);
      if (n % 32 != 0) e.parent = KeyOf(n - 1);
      e.tenant = "bench";
      e.payload_bytes = o.layout.block_bytes();
      batch.push_back({e.key, e});
      if (batch.size() == 4096 || n + 1 == extents) {
        TP_RETURN_IF_ERROR(index->Apply(batch, {}, false));
        batch.clear();
      }
    }
  }
  const auto start = Clock::now();
  TP_RETURN_IF_ERROR(open());
  return SecondsSince(start);
}

}  // namespace

absl::StatusOr<std::vector<BenchRow>> RunDiskBench(const DiskBenchOptions& options) {
  if (options.block_bytes == 0 || options.block_bytes % 4096 != 0 || options.blocks < 16)
    return absl::InvalidArgumentError(absl::StrCat("disk benchmark: ", options.blocks, " blocks of ",
                                                   options.block_bytes,
                                                   " bytes; it needs at least 16, of a multiple of 4096"));
  const Workspace work(options.path);
  if (work.path().empty()) return absl::UnavailableError(options.path + ": no directory can be made there");
  const size_t record_bytes = RecordBytes(RecordHeaderBytes(32), options.block_bytes);
  DiskReference reference(options, work.path(), record_bytes);
  TP_ASSIGN_OR_RETURN(auto tier, TierBench::Make(options, work.path(), /*lossless=*/false));
  TP_ASSIGN_OR_RETURN(auto lossless, TierBench::Make(options, work.path(), /*lossless=*/true));
  // Once over everything: the first write to an extent is dearer than the next ones.
  TP_RETURN_IF_ERROR(reference.Measure(true).status());
  TP_RETURN_IF_ERROR(tier->Store().status());
  TP_RETURN_IF_ERROR(lossless->Store().status());

  std::vector<double> shorter_store, shorter_load, ref_write, ref_read, store, load, beside, blob_put,
      blob_get, store_ratio, load_ratio, beside_ratio;
  uint64_t stored = 0;
  for (int round = 0; round < options.rounds; ++round) {
    TP_ASSIGN_OR_RETURN(const double rw, reference.Measure(true));
    TP_ASSIGN_OR_RETURN(const double s, tier->Store());
    TP_ASSIGN_OR_RETURN(const double rr, reference.Measure(false));
    TP_ASSIGN_OR_RETURN(const double l, tier->Load());
    TP_ASSIGN_OR_RETURN(const double ls, lossless->Store());
    TP_ASSIGN_OR_RETURN(const double ll, lossless->Load());
    shorter_store.push_back(ls / s);
    shorter_load.push_back(ll / l);
    uint64_t meanwhile = 0;
    TP_ASSIGN_OR_RETURN(const double b, tier->LoadWhileStoring(meanwhile));
    ref_write.push_back(rw);
    store.push_back(s);
    store_ratio.push_back(s / rw);
    ref_read.push_back(rr);
    load.push_back(l);
    load_ratio.push_back(l / rr);
    beside.push_back(b);
    beside_ratio.push_back(b / l);
    stored += meanwhile;
    if (options.blob_db) {
      TP_ASSIGN_OR_RETURN(const BlobRates blob,
                          MeasureBlobs(options, absl::StrCat(work.path(), "/blobs", round)));
      std::error_code error;
      std::filesystem::remove_all(absl::StrCat(work.path(), "/blobs", round), error);
      blob_put.push_back(blob.put);
      blob_get.push_back(blob.get);
    }
  }
  const double giga = 1e9;
  const std::string size = absl::StrCat(options.block_bytes >> 10, " KiB");
  std::vector<BenchRow> rows;
  rows.push_back({absl::StrCat("disk load, ", size, ", depth ", options.read_depth), Median(load) / giga,
                  "GB/s", reference.name(), Median(ref_read) / giga, Median(load_ratio)});
  rows.push_back({absl::StrCat("disk store, ", size, ", depth ", options.write_depth), Median(store) / giga,
                  "GB/s", reference.name(), Median(ref_write) / giga, Median(store_ratio)});
  rows.push_back({absl::StrCat("disk load while storing (", stored, " stores meanwhile)"),
                  Median(beside) / giga, "GB/s", "disk load alone", Median(load) / giga,
                  Median(beside_ratio)});
  rows.push_back({"lossless: bytes of a block on the disk", lossless->BytesOfBlock(), "bytes", "plain",
                  tier->BytesOfBlock(), lossless->BytesOfBlock() / tier->BytesOfBlock()});
  rows.push_back({"lossless: disk load", Median(shorter_load) * Median(load) / giga, "GB/s", "plain",
                  Median(load) / giga, Median(shorter_load)});
  rows.push_back({"lossless: disk store", Median(shorter_store) * Median(store) / giga, "GB/s", "plain",
                  Median(store) / giga, Median(shorter_store)});
  if (options.blob_db) {
    rows.push_back({"disk store", Median(store) / giga, "GB/s", "RocksDB BlobDB put", Median(blob_put) / giga,
                    Median(store) / Median(blob_put)});
    rows.push_back({"disk load", Median(load) / giga, "GB/s", "RocksDB BlobDB get, 8 readers",
                    Median(blob_get) / giga, Median(load) / Median(blob_get)});
  }
  if (options.open_large) {
    uint64_t blocks = 0;
    TP_ASSIGN_OR_RETURN(const double seconds,
                        OpenSeconds(work.path(), options.block_bytes, uint64_t{100} << 30, blocks));
    rows.push_back({absl::StrCat("disk open, 100 GiB, ", blocks, " blocks"), seconds, "s", "", 0, 0});
  }
  return rows;
}

}  // namespace tidepool
