#include <pybind11/pybind11.h>

#include "kernels.h"

namespace py = pybind11;
using namespace pybind11::literals;

PYBIND11_MODULE(_C, m) {
    m.doc() = "CUDA kernels of cpt_kernels. Tensors are device pointers; see csrc/kernels.h.";
    m.def("vocab_score", &vocab_score, "logits"_a, "dtype"_a, "rows"_a, "columns"_a, "row_stride"_a, "vocab_size"_a,
          "targets"_a, "bias"_a, "logit_scale"_a, "softcap"_a, "logps"_a, "lse"_a, "entropy"_a, "mean_logit"_a,
          "correct"_a, "log_sum_sq"_a, "score"_a, "stream"_a);
    m.def("pair_loss", &pair_loss, "token_logps"_a, "tokens"_a, "cu_completions"_a, "wide"_a, "completions"_a,
          "chosen"_a, "rejected"_a, "targets"_a, "pairs"_a, "ref_logps"_a, "loss"_a, "beta"_a, "label_smoothing"_a,
          "slic_delta"_a, "slic_lambda"_a, "slic_length_normalize"_a, "tokens_per_pair"_a, "completion_logps"_a,
          "losses"_a, "weights"_a, "stream"_a);
    m.def("cuda_releases", &cuda_releases);
}
