tidepool_test(fetch_codec_test LIBS tp_fetch)
tidepool_test(fetch_node_test LIBS tp_fetch)
tidepool_test(fetch_sim_test LIBS tp_fetch TIMEOUT 600)
if(TARGET tp_transport_ucx)
  tidepool_test(fetch_node_ucx_test LIBS tp_fetch tp_transport_ucx)
  # Not a test: prints figures.
  add_executable(fetch_bench EXCLUDE_FROM_ALL fetch_bench.cc)
  target_link_libraries(fetch_bench PRIVATE tp_fetch tp_transport_ucx GTest::gtest)
endif()
