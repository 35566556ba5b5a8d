// Runs the kernels under the sanitizers. Buffers have exactly the size that a kernel may touch, and every CUDA thread is
// a std::thread. Prints the largest deviation from a computation in double precision, and fails if that is large.
#include "kernels.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

extern "C" void configure(int descending, int major, int shared_per_multiprocessor, int multiprocessors);

static double worst = 0;
static void compare(double found, double expected) {
    worst = std::fmax(worst, std::isfinite(found) ? std::fabs(found - expected) : INFINITY);
}
template <typename T>
static Pointer pointer(const std::vector<T>& values) {
    return reinterpret_cast<Pointer>(values.data());
}

static void score(int rows, int columns, int offset) {
    std::mt19937 random(rows + columns);
    std::normal_distribution<float> normal;
    std::vector<float> tile(offset + rows * columns), bias(columns), out[5] = {};
    for (auto& x : tile) x = 3 * normal(random);
    for (auto& x : bias) x = normal(random);
    for (auto& x : out) x.resize(rows);
    std::unique_ptr<bool[]> correct(new bool[rows]);
    std::vector<int64_t> targets(rows);
    for (int r = 0; r < rows; ++r) targets[r] = r == 0 ? columns - 1 : r == 1 ? columns + 5 : r % columns;
    const auto logits = tile;
    vocab_score(pointer(tile) + offset * sizeof(float), "float32", rows, columns, columns, columns, pointer(targets),
                pointer(bias), 1, 0, pointer(out[0]), pointer(out[1]), pointer(out[2]), pointer(out[3]),
                reinterpret_cast<Pointer>(correct.get()), pointer(out[4]), true, 0);
    for (int r = 0; r < rows; ++r) {
        if (targets[r] >= columns) continue;
        const auto logit = [&](int c) { return double(logits[offset + r * columns + c]) + bias[c]; };
        double sum = 0;
        for (int c = 0; c < columns; ++c) sum += std::exp(logit(c));
        compare(out[0][r], logit(targets[r]) - std::log(sum));
        for (int c = 0; c < columns; ++c)
            compare(tile[offset + r * columns + c], (c == targets[r]) - std::exp(logit(c)) / sum);
    }
}

static void sums(int completions, int length) {
    std::vector<float> tokens, out[3];
    std::vector<int32_t> offsets{0};
    std::vector<double> expected;
    for (int s = 0; s < completions; ++s) {
        double sum = 0;
        for (int i = 0; i < (s % 3) * length; ++i) {
            tokens.push_back(-float(i % 7) / 8);
            sum += tokens.back();
        }
        offsets.push_back(tokens.size());
        expected.push_back(sum);
    }
    std::vector<int64_t> chosen(completions), rejected(completions);
    for (int p = 0; p < completions; ++p) chosen[p] = p, rejected[p] = p == 0 ? 1 << 20 : completions - 1 - p;
    std::vector<float> reference(completions);
    for (auto& x : out) x.resize(completions);
    pair_loss(pointer(tokens), tokens.size(), pointer(offsets), false, completions, pointer(chosen), pointer(rejected), 0,
              completions, pointer(reference), "sigmoid", 0.1, 0, 1, 1, false, 1, pointer(out[0]), pointer(out[1]),
              pointer(out[2]), 0);
    for (int s = 0; s < completions; ++s) compare(out[0][s], expected[s]);
}

int main() {
    for (int major : {8, 9}) {
        for (int shared : {4 << 10, 6 << 10, 228 << 10}) {
            configure(0, major, shared, 2);
            for (int columns : {3, 509}) score(2, columns, columns % 4);
        }
        score(2, 6001, 1);  // several warps
    }
    sums(5, 300);
    std::printf("largest deviation %g\n", worst);
    return worst < 1e-3 ? EXIT_SUCCESS : EXIT_FAILURE;
}
