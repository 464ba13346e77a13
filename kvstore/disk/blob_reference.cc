#include "kvstore/disk/blob_reference.h"

#include <rocksdb/cache.h>
#include <rocksdb/db.h>
#include <rocksdb/options.h>
#include <rocksdb/table.h>

#include <cstring>
#include <utility>

namespace tidepool {

struct BlobReference::State {
  std::unique_ptr<rocksdb::DB> db;
};

namespace {
absl::Status FromRocks(const rocksdb::Status& s) {
  return s.ok() ? absl::OkStatus() : absl::UnavailableError("BlobDB: " + s.ToString());
}
std::string Name(size_t key) { return "block " + std::to_string(key); }
}  // namespace

BlobReference::BlobReference(std::unique_ptr<State> state) : state_(std::move(state)) {}
BlobReference::~BlobReference() = default;

absl::StatusOr<std::unique_ptr<BlobReference>> BlobReference::Open(const std::string& directory) {
  rocksdb::Options o;
  o.create_if_missing = true;
  o.enable_blob_files = true;
  o.min_blob_size = 0;
  o.blob_file_size = 512 << 20;
  o.use_direct_reads = true;
  o.use_direct_io_for_flush_and_compaction = true;
  o.compression = rocksdb::kNoCompression;
  o.write_buffer_size = 64 << 20;  // flushes of 32 values of 2 MiB
  o.max_write_buffer_number = 4;
  o.max_background_jobs = 2;
  o.disable_auto_compactions = true;  // nothing here but what is measured
  rocksdb::DB* db = nullptr;
  const rocksdb::Status status = rocksdb::DB::Open(o, directory, &db);
  if (!status.ok()) return FromRocks(status);
  auto state = std::make_unique<State>();
  state->db.reset(db);
  return std::unique_ptr<BlobReference>(new BlobReference(std::move(state)));
}

absl::Status BlobReference::Put(size_t key, std::span<const std::byte> value) {
  rocksdb::WriteOptions options;
  options.disableWAL = true;  // a log would write every value twice
  return FromRocks(
      state_->db->Put(options, Name(key), {reinterpret_cast<const char*>(value.data()), value.size()}));
}

absl::Status BlobReference::Flush() { return FromRocks(state_->db->Flush(rocksdb::FlushOptions())); }

absl::Status BlobReference::Get(size_t key, std::span<std::byte> dst) {
  rocksdb::PinnableSlice value;
  rocksdb::ReadOptions options;
  options.fill_cache = false;
  const auto status =
      FromRocks(state_->db->Get(options, state_->db->DefaultColumnFamily(), Name(key), &value));
  if (!status.ok()) return status;
  if (value.size() != dst.size()) return absl::DataLossError("BlobDB: a value of another size");
  std::memcpy(dst.data(), value.data(), dst.size());
  return absl::OkStatus();
}

}  // namespace tidepool
