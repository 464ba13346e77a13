#pragma once

#include <cstdint>

#include "kernels/thread_pool.h"

namespace tidepool {

// The steps around the experts of a sparse layer (arXiv:2401.04088, section 2.1): choose, bring the rows of
// one expert together, and add up what the experts gave. The experts themselves are Linears.

inline constexpr int kMoeTopKMax = 64;

// MoeRoute: p = softmax(logits[r, :]); the top_k most probable experts of each row (ties: lower id), in
// rising order of their ids, with weights[r, s] = p[ids[r, s]], divided by their sum where `renormalise`.
// logits: [rows, experts] float32; ids, weights: [rows, top_k]. 1 <= top_k <= min(experts, kMoeTopKMax).
// A row's result depends on that row only. Relative error of a weight below 1e-6. NaN logits give valid
// ids.
void MoeRoute(const float* logits, int64_t rows, int experts, int top_k, bool renormalise, int32_t* ids,
              float* weights, ThreadPool& pool);

// MoeGroup: an order of all (row, slot) pairs in which each expert's lie together, in the order of the rows:
// expert e has places [offsets[e], offsets[e + 1]), and place[r, s] is where (r, s) went.
// ids: [rows, top_k], each in [0, experts); offsets: [experts + 1]; place: [rows, top_k].
void MoeGroup(const int32_t* ids, int64_t rows, int top_k, int experts, int32_t* offsets, int32_t* place);

// MoeGather: y[place[r, s], :] = x[r, :]. x: [rows, hidden], y: [rows * top_k, hidden].
void MoeGather(const float* x, const int32_t* place, int64_t rows, int top_k, int64_t hidden, float* y,
               ThreadPool& pool);

// MoeCombine: y[r, :] = sum_s weights[r, s] * x[place[r, s], :], in rising s: an order that only the row's
// own experts decide. x: [rows * top_k, hidden], y: [rows, hidden].
void MoeCombine(const float* x, const float* weights, const int32_t* place, int64_t rows, int top_k,
                int64_t hidden, float* y, ThreadPool& pool);

// The obvious loops in double.
void MoeRouteRef(const float* logits, int64_t rows, int experts, int top_k, bool renormalise, int32_t* ids,
                 double* weights);

}  // namespace tidepool
