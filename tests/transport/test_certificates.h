#pragma once

// Certificates for tests, made on the spot: nothing expires in the source tree, and no key lies in it.

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>

#include "base/status.h"

namespace tidepool {

// An authority with a directory of its own, which goes with it. Files are PEM.
class TestAuthority {
 public:
  TestAuthority() : dir_(std::filesystem::temp_directory_path() / "tidepool_ca_XXXXXX") {
    TP_CHECK(mkdtemp(dir_.data()) != nullptr);
    key_.reset(EVP_EC_gen("P-256"));
    cert_ = Make("authority", key_.get(), true);
    WriteCert(ca_file(), cert_.get());
  }
  ~TestAuthority() { std::filesystem::remove_all(dir_); }
  TestAuthority(const TestAuthority&) = delete;

  std::string ca_file() const { return dir_ + "/ca.pem"; }
  std::string cert_file(const std::string& name) const { return dir_ + "/" + name + ".crt"; }
  std::string key_file(const std::string& name) const { return dir_ + "/" + name + ".key"; }

  // cert_file(name) and key_file(name), with `name` and `ip` as subjectAltName; written over what is there.
  void Issue(const std::string& name, const std::string& ip = "") {
    std::unique_ptr<EVP_PKEY, KeyFree> key(EVP_EC_gen("P-256"));
    WriteCert(cert_file(name), Make(name, key.get(), false, ip).get());
    std::FILE* f = std::fopen(key_file(name).c_str(), "w");
    TP_CHECK(f != nullptr && PEM_write_PrivateKey(f, key.get(), nullptr, nullptr, 0, nullptr, nullptr) == 1);
    std::fclose(f);
  }

 private:
  struct KeyFree {
    void operator()(EVP_PKEY* key) const { EVP_PKEY_free(key); }
  };
  struct CertFree {
    void operator()(X509* cert) const { X509_free(cert); }
  };

  std::unique_ptr<X509, CertFree> Make(const std::string& name, EVP_PKEY* key, bool authority,
                                       const std::string& ip = "") {
    std::unique_ptr<X509, CertFree> cert(X509_new());
    X509* c = cert.get();
    X509_set_version(c, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(c), ++serial_);
    X509_gmtime_adj(X509_getm_notBefore(c), -3600);
    X509_gmtime_adj(X509_getm_notAfter(c), 24 * 3600);
    X509_set_pubkey(c, key);
    X509_NAME* subject = X509_get_subject_name(c);
    X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC,
                               reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
    X509_set_issuer_name(c, authority ? subject : X509_get_subject_name(cert_.get()));
    const auto extend = [&](int nid, const std::string& value) {
      X509V3_CTX context;
      X509V3_set_ctx_nodb(&context);
      X509V3_set_ctx(&context, authority ? c : cert_.get(), c, nullptr, nullptr, 0);
      X509_EXTENSION* e = X509V3_EXT_conf_nid(nullptr, &context, nid, value.c_str());
      TP_CHECK(e != nullptr);
      X509_add_ext(c, e, -1);
      X509_EXTENSION_free(e);
    };
    extend(NID_basic_constraints, authority ? "critical,CA:TRUE" : "critical,CA:FALSE");
    if (!authority) extend(NID_subject_alt_name, "DNS:" + name + (ip.empty() ? "" : ",IP:" + ip));
    TP_CHECK(X509_sign(c, key_.get(), EVP_sha256()) > 0);
    return cert;
  }
  static void WriteCert(const std::string& file, X509* cert) {
    std::FILE* f = std::fopen(file.c_str(), "w");
    TP_CHECK(f != nullptr && PEM_write_X509(f, cert) == 1);
    std::fclose(f);
  }

  std::string dir_;
  long serial_ = 0;
  std::unique_ptr<EVP_PKEY, KeyFree> key_;
  std::unique_ptr<X509, CertFree> cert_;
};

}  // namespace tidepool
