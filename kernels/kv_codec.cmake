# The kv_codec family by itself: kvstore/codec wants no more of this room, and the builds that leave the rest of it
# out (ThreadSanitizer, fuzzing) can still have it. Included where it is needed; the first defines it.
if(NOT TARGET tp_kv_codec)
  set(kv_codec_dir ${CMAKE_CURRENT_LIST_DIR})
  add_library(tp_kv_codec_avx512 OBJECT ${kv_codec_dir}/kv_codec_avx512.cc)
  # As in CMakeLists.txt here.
  target_compile_options(tp_kv_codec_avx512 PRIVATE -mavx512f -mavx512bw -mavx512dq -mavx512vl
                         -Wno-maybe-uninitialized -Wno-uninitialized $<$<CONFIG:Release>:-O3>)
  add_library(tp_kv_codec STATIC ${kv_codec_dir}/kv_codec.cc ${kv_codec_dir}/kv_codec_avx2.cc
              ${kv_codec_dir}/kv_codec_ref.cc $<TARGET_OBJECTS:tp_kv_codec_avx512>)
  target_compile_options(tp_kv_codec PRIVATE $<$<CONFIG:Release>:-O3>)
  target_link_libraries(tp_kv_codec PUBLIC tp_base)
endif()
