# Moving blocks between processes: the codec, the two cores, and the node that drives them.
add_library(tp_fetch STATIC fetch_codec.cc fetch_client.cc fetch_coder.cc fetch_server.cc fetch_driver.cc
            fetch_node.cc offer_table.cc arena_codec.cc arena_directory.cc arena_server.cc
            arena_client.cc arena_link.cc)
target_link_libraries(tp_fetch PUBLIC tp_kvstore tp_block_codec tp_transport tp_base absl::flat_hash_map absl::strings)
# g++ 12 cannot follow a std::variant's storage through its moves.
target_compile_options(tp_fetch PRIVATE -Wno-maybe-uninitialized)
