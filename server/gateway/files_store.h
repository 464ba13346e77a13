#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/batch/file_io.h"

namespace tidepool {

// A stored file, as /v1/files shows it. Times are Unix seconds.
struct StoredFile {
  std::string id;        // file-HEX, made here
  std::string filename;  // as its owner calls it; never a path of ours
  std::string purpose;   // batch, batch_output
  uint64_t bytes = 0;
  int64_t created_at = 0;
  int64_t expires_at = 0;
};

struct FileLimits {
  uint64_t file_bytes_max = 0;
  uint64_t tenant_bytes_max = 0;
  size_t tenant_files_max = 0;
};

// FilesStore: the tenants' files, below one directory (0700, files 0600):
//
//   lock                         held while the store is open
//   TENANT/                      the first 32 hex digits of SHA-256 of the tenant's name
//     tenant.json                {"tenant": name}
//     file-HEX.data              contents
//     file-HEX.json              what is known of it: a file exists once this does
//     batch_HEX.json             BatchStore's
//
// Names are made here; nothing of a request becomes a part of a path. A tenant sees its own files: another's
// is NotFound. Everything is durable when a call returns. Thread-safe; calls touch the disk.
class FilesStore {
 public:
  // Reads what is there, and removes what was never completed. Errors: FailedPrecondition (the directory is
  // another user's, open to others, or another process has it), and of the files.
  static absl::StatusOr<std::unique_ptr<FilesStore>> Open(const std::string& dir, const FileLimits& limits);

  // An upload under way (Handle): destroyed without Commit, it leaves nothing. Not thread-safe.
  class Upload {
   public:
    Upload(FilesStore* store, std::string tenant, std::string id, std::string path, FileHandle file);
    ~Upload();
    // Errors: OutOfRange (larger than one file may be), Aborted (the tenant has no room left),
    // ResourceExhausted (the disk is full).
    absl::Status Append(std::string_view bytes);
    // `ttl`: until it expires.
    absl::StatusOr<StoredFile> Commit(std::string filename, std::string purpose, absl::Duration ttl);
    uint64_t bytes() const { return bytes_; }

   private:
    FilesStore* const store_;
    const std::string tenant_, id_, path_;
    FileHandle file_;
    uint64_t bytes_ = 0;
    bool committed_ = false;
  };
  // Errors: Aborted (the tenant has as many files as it may).
  absl::StatusOr<std::unique_ptr<Upload>> Begin(const std::string& tenant);

  // Errors of all: NotFound.
  absl::StatusOr<StoredFile> Get(std::string_view tenant, std::string_view id) const;
  // Errors also: FailedPrecondition (pinned).
  absl::Status Delete(std::string_view tenant, std::string_view id);
  absl::StatusOr<std::string> PathOf(std::string_view tenant, std::string_view id) const;
  // Newest last.
  std::vector<StoredFile> List(std::string_view tenant) const;

  // A batch's files. While pinned, a file is neither deleted nor expired.
  absl::Status Pin(std::string_view tenant, std::string_view id);
  void Unpin(std::string_view tenant, std::string_view id);
  // The place of an output that is being written; `id` as NewId() made it. It counts from Adopt on.
  std::string PendingPath(const std::string& tenant, const std::string& id) const;
  static std::string NewId();
  absl::StatusOr<StoredFile> Adopt(const std::string& tenant, const std::string& id, std::string filename,
                                   absl::Duration ttl);

  // Removes what has expired.
  void Sweep(absl::Time now);
  // Removes data without metadata, but for `keep` (outputs under way, as PendingPath gave them). Once, when
  // all is read.
  void RemoveOrphans(const std::set<std::string>& keep);

  // Of the tenant, made where it is not there. Errors: of the file system.
  absl::StatusOr<std::string> TenantDirectory(const std::string& tenant);
  // Those that have ever stored something.
  std::vector<std::string> Tenants() const;
  uint64_t bytes() const;  // of all
  uint64_t BytesOf(std::string_view tenant) const;

 private:
  struct Entry {
    StoredFile file;
    int pins = 0;
  };
  struct Tenant {
    std::string dir;
    std::map<std::string, Entry, std::less<>> files;  // by id
    uint64_t bytes = 0;                               // uploads under way included
    size_t uploads = 0;                               // under way
  };

  FilesStore(std::string dir, FileLimits limits, FileHandle lock);
  absl::Status Load();
  absl::Status LoadTenant(const std::string& dir);
  std::string DirOf(std::string_view tenant) const;
  // The following hold mu_.
  const Entry* Find(std::string_view tenant, std::string_view id) const;
  Entry* Find(std::string_view tenant, std::string_view id);
  absl::Status Reserve(const std::string& tenant, uint64_t have, uint64_t more);
  absl::StatusOr<StoredFile> Enter(const std::string& tenant, StoredFile file, bool counted);

  const std::string dir_;
  const FileLimits limits_;
  const FileHandle lock_;
  std::mutex directories_mu_;  // while a tenant's directory is made; taken before mu_
  // Never held over the disk: uploads take it on I/O threads.
  mutable std::mutex mu_;
  std::map<std::string, Tenant, std::less<>> tenants_;
};

}  // namespace tidepool
