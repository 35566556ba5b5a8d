// The functions of the extension. Each checks its arguments on the host, launches one kernel on a stream of the current
// device and returns. Device pointers and streams are integers (`data_ptr()`, `cuda_stream`; 0 stands for "absent"), so
// the bindings need neither torch nor CUDA headers.
//
// They throw std::invalid_argument for bad arguments, and std::runtime_error with CUDA's message if a launch fails.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

using Pointer = std::uintptr_t;

// A tile of logits -> log-probs of its targets, statistics and, in place, the vocab score; see
// cpt_kernels/ops/vocab_score.
void vocab_score(Pointer logits,              // (rows, columns) of dtype, rows `row_stride` elements apart
                 const std::string& dtype,    // "bfloat16", "float16" or "float32"
                 int64_t rows, int64_t columns, int64_t row_stride, int64_t vocab_size,
                 Pointer targets,             // (rows,) int64
                 Pointer bias,                // (columns,) float32, or 0
                 float logit_scale,
                 float softcap,               // 0 for none
                 Pointer logps, Pointer lse,  // (rows,) float32
                 Pointer entropy,             // (rows,) float32, or 0 as the next three: no statistics
                 Pointer mean_logit,          // (rows,) float32
                 Pointer correct,             // (rows,) bool
                 Pointer log_sum_sq,          // (rows,) float32
                 bool score, Pointer stream);

// Token log-probs -> completion log-probs -> losses -> one weight per completion. See cpt_kernels/ops/pair_loss.
void pair_loss(Pointer token_logps,           // (tokens,) float32
               int64_t tokens,
               Pointer cu_completions,        // (completions + 1,) int64, or int32 as the next argument says
               bool wide, int64_t completions,
               Pointer chosen,                // (pairs,) int64, as the next two
               Pointer rejected,              // or 0: a loss without a rejected side
               Pointer targets,               // or 0: the chosen completions
               int64_t pairs,
               Pointer ref_logps,             // (completions,) float32, or 0: a loss without a reference
               const std::string& loss,       // a built-in of cpt_kernels.losses
               double beta, double label_smoothing, double slic_delta, double slic_lambda, bool slic_length_normalize,
               double tokens_per_pair,
               Pointer completion_logps,      // (completions,) float32, written
               Pointer losses,                // (pairs,) float32, written
               Pointer weights,               // (completions,) float32, written
               Pointer stream);

// Major CUDA releases: that of the linked runtime, and the newest that the driver supports (0: there is no driver).
std::pair<int, int> cuda_releases();
