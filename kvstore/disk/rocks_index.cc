#include "kvstore/disk/rocks_index.h"

#include <rocksdb/cache.h>
#include <rocksdb/db.h>
#include <rocksdb/options.h>
#include <rocksdb/table.h>
#include <rocksdb/write_batch.h>

#include <cstring>
#include <filesystem>
#include <utility>
#include <vector>

#include "base/status.h"
#include "kvstore/disk/value_bytes.h"

// Keys: "b" and the 32 bytes of a block key, with an index value; "written", with a day (4 bytes) and its
// bytes (8).

namespace tidepool {
namespace {

constexpr char kWrittenKey[] = "written";

std::string DbKey(const BlockKey& key) {
  std::string out = "b";
  out.append(reinterpret_cast<const char*>(key.bytes.data()), key.bytes.size());
  return out;
}

absl::Status FromRocks(const rocksdb::Status& s) {
  if (s.ok()) return absl::OkStatus();
  const std::string text = "index: " + s.ToString();
  if (s.IsNoSpace()) return absl::ResourceExhaustedError(text);
  // A file that should be there and is not, or that holds what no version of the library wrote.
  if (s.IsCorruption() || s.IsPathNotFound() || s.IsInvalidArgument() || s.IsNotSupported() || s.IsNotFound())
    return absl::DataLossError(text);
  return absl::UnavailableError(text);
}

rocksdb::Options DbOptions() {
  rocksdb::Options o;
  o.create_if_missing = true;
  o.info_log_level = rocksdb::WARN_LEVEL;
  o.keep_log_file_num = 2;
  o.max_log_file_size = 1 << 20;
  o.stats_dump_period_sec = 0;
  o.stats_persist_period_sec = 0;
  o.compression = rocksdb::kNoCompression;  // digests and numbers
  // An entry is about 150 bytes: a write buffer holds some 50,000, and so a log is short to replay.
  o.write_buffer_size = 8 << 20;
  o.max_total_wal_size = 32 << 20;
  o.max_background_jobs = 2;
  o.max_open_files = 128;
  o.skip_stats_update_on_db_open = true;
  o.avoid_flush_during_shutdown = true;  // the log has it
  rocksdb::BlockBasedTableOptions table;
  table.block_cache = rocksdb::NewLRUCache(1 << 20);  // read once, front to back
  table.format_version = 5;
  o.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  return o;
}

}  // namespace

struct RocksIndex::State {
  std::unique_ptr<rocksdb::DB> db;
};

RocksIndex::RocksIndex(std::unique_ptr<State> state) : state_(std::move(state)) {}
RocksIndex::~RocksIndex() = default;

absl::StatusOr<std::unique_ptr<RocksIndex>> RocksIndex::Open(const std::string& directory) {
  rocksdb::DB* db = nullptr;
  const rocksdb::Status status = rocksdb::DB::Open(DbOptions(), directory, &db);
  TP_RETURN_IF_ERROR(FromRocks(status));
  auto state = std::make_unique<State>();
  state->db.reset(db);
  return std::unique_ptr<RocksIndex>(new RocksIndex(std::move(state)));
}

absl::Status RocksIndex::Destroy(const std::string& directory) {
  std::error_code error;
  std::filesystem::remove_all(directory, error);
  if (error) return absl::UnavailableError(directory + ": " + error.message());
  return absl::OkStatus();
}

absl::Status RocksIndex::Load(const std::function<void(IndexEntry)>& found, uint64_t& damaged) {
  rocksdb::ReadOptions options;
  options.fill_cache = false;
  options.verify_checksums = true;
  options.readahead_size = 1 << 20;
  rocksdb::WriteBatch drop;
  {
    const std::unique_ptr<rocksdb::Iterator> it(state_->db->NewIterator(options));
    for (it->SeekToFirst(); it->Valid(); it->Next()) {
      const std::string_view key(it->key().data(), it->key().size());
      if (key == kWrittenKey) continue;
      BlockKey block;
      absl::StatusOr<IndexEntry> entry = absl::DataLossError("no block key");
      if (key.size() == 1 + block.bytes.size() && key[0] == 'b') {
        std::memcpy(block.bytes.data(), key.data() + 1, block.bytes.size());
        entry = DecodeIndexValue(block, std::string_view(it->value().data(), it->value().size()));
      }
      if (entry.ok()) {
        found(*std::move(entry));
      } else {
        ++damaged;
        drop.Delete(it->key());
      }
    }
    TP_RETURN_IF_ERROR(FromRocks(it->status()));
  }
  if (drop.Count() == 0) return absl::OkStatus();
  return FromRocks(state_->db->Write(rocksdb::WriteOptions(), &drop));
}

absl::StatusOr<WrittenToday> RocksIndex::LoadWritten() {
  std::string value;
  const rocksdb::Status status = state_->db->Get(rocksdb::ReadOptions(), kWrittenKey, &value);
  if (status.IsNotFound()) return WrittenToday{};
  TP_RETURN_IF_ERROR(FromRocks(status));
  if (value.size() != 12) return WrittenToday{};
  std::string_view in = value;
  WrittenToday written;
  written.day = Take<uint32_t>(in);
  written.bytes = Take<uint64_t>(in);
  return written;
}

absl::Status RocksIndex::Apply(std::span<const Change> changes, const WrittenToday& written, bool sync) {
  rocksdb::WriteBatch batch;
  for (const Change& change : changes) {
    if (change.entry.has_value()) {
      batch.Put(DbKey(change.key), EncodeIndexValue(*change.entry));
    } else {
      batch.Delete(DbKey(change.key));
    }
  }
  std::string value;
  Put(value, written.day);
  Put(value, written.bytes);
  batch.Put(kWrittenKey, value);
  rocksdb::WriteOptions options;
  options.sync = sync;
  return FromRocks(state_->db->Write(options, &batch));
}

}  // namespace tidepool
