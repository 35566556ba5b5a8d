// The scheduler of the emulation: see include/emulation.h.
#include "emulation.h"

#include <exception>
#include <set>

namespace emulation {

Device device;
Interceptor interceptor = nullptr;

Block::Block(const Launch& launch, unsigned index)
    : launch(&launch), index(index), barrier(launch.block.x), shared(new unsigned char[launch.shared_bytes]),
      running(launch.block.x) {
    for (int left = launch.block.x; left > 0; left -= kWarp)
        warps.push_back(std::make_unique<Warp>(std::min(left, kWarp)));
    poison();
}

#ifdef EMULATION_THREADS

thread_local Thread* current;
int Barrier::arrive() {
    std::unique_lock lock(state_->mutex);
    const int generation = state_->generation;
    if (++state_->arrived == expected_) {
        state_->arrived = 0, ++state_->generation;
        state_->changed.notify_all();
    }
    return generation;
}
void Barrier::finish(int generation) {
    std::unique_lock lock(state_->mutex);
    state_->changed.wait(lock, [&] { return state_->generation != generation; });
}

static void run_together(std::vector<Thread>& threads, const std::function<void()>& kernel) {
    std::vector<std::thread> workers;
    for (Thread& thread : threads) {
        workers.emplace_back([&] {
            current = &thread;
            kernel();
        });
    }
    for (auto& worker : workers) worker.join();
}

#else

Thread* current;

namespace {

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
};
constexpr size_t kStackBytes = 64 << 10;
std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch
std::set<size_t> runnable;
size_t running;  // index of the fiber that runs
ucontext_t scheduler;
const std::function<void()>* body;
std::exception_ptr failure;

void to_scheduler() { swapcontext(&fibers[running]->context, &scheduler); }

void start() {
    try {
        (*body)();
    } catch (...) {
        failure = std::current_exception();
    }
    if (--current->block->running == 0) current->block->poison();
    to_scheduler();
}

}  // namespace

int Barrier::arrive() {
    const int generation = generation_;
    if (++arrived_ == expected_) {
        arrived_ = 0, ++generation_;
        runnable.insert(waiting_.begin(), waiting_.end());
        waiting_.clear();
    }
    return generation;
}

// A thread that need not wait yields as well: the scheduler decides which one continues.
void Barrier::finish(int generation) {
    if (generation == generation_) {
        waiting_.push_back(running);
    } else {
        runnable.insert(running);
    }
    to_scheduler();
}

// Always runs the first (or always the last) fiber that can run, so threads are as far apart as barriers allow.
static void run_together(std::vector<Thread>& threads, const std::function<void()>& kernel) {
    body = &kernel, failure = nullptr;
    while (fibers.size() < threads.size()) {
        fibers.push_back(std::make_unique<Fiber>());
        fibers.back()->stack.reset(new char[kStackBytes]);
    }
    runnable.clear();
    for (size_t i = 0; i < threads.size(); ++i) {
        ucontext_t& context = fibers[i]->context;
        getcontext(&context);
        context.uc_stack.ss_sp = fibers[i]->stack.get();
        context.uc_stack.ss_size = kStackBytes;
        makecontext(&context, start, 0);
        runnable.insert(runnable.end(), i);
    }
    while (!runnable.empty() && !failure) {
        const auto next = device.descending ? std::prev(runnable.end()) : runnable.begin();
        running = *next, current = &threads[running];
        runnable.erase(next);
        swapcontext(&scheduler, &fibers[running]->context);
    }
    if (failure) std::rethrow_exception(failure);
    for (const Thread& thread : threads)
        if (thread.block->running) throw std::runtime_error("deadlock: a barrier that not all threads reach");
}

#endif

static Launch last;  // for last_cluster() and last_shared_bytes()

void run(const Launch& launch, const std::function<void()>& kernel) {
    last = launch;
    // Blocks that can synchronise run together: all of a cooperative launch, else those of a cluster.
    const unsigned together = launch.cooperative ? launch.grid.x : launch.cluster;
    const unsigned groups = launch.grid.x / together;
    for (unsigned n = 0; n < groups; ++n) {
        const unsigned first = (device.descending ? groups - 1 - n : n) * together;
        Barrier grid_barrier(together * launch.block.x);
        std::vector<std::unique_ptr<Barrier>> cluster_barriers;
        std::vector<Block> blocks;
        blocks.reserve(together);
        std::vector<Thread> threads;
        for (unsigned b = 0; b < together; ++b) {
            if (b % launch.cluster == 0)
                cluster_barriers.push_back(std::make_unique<Barrier>(launch.cluster * launch.block.x));
            blocks.emplace_back(launch, first + b);
            blocks[b].cluster_first = &blocks[b / launch.cluster * launch.cluster];
            blocks[b].cluster_barrier = cluster_barriers.back().get();
            blocks[b].grid_barrier = &grid_barrier;
            for (unsigned t = 0; t < launch.block.x; ++t) threads.push_back({&blocks[b], t});
        }
        run_together(threads, kernel);
    }
}

}  // namespace emulation

// The emulated device, set by the tests through ctypes.
extern "C" void configure(int descending, int major, int shared_per_multiprocessor, int multiprocessors) {
    emulation::device = {descending != 0, major, shared_per_multiprocessor, multiprocessors};
}
extern "C" void intercept_launches(emulation::Interceptor interceptor) { emulation::interceptor = interceptor; }
extern "C" int last_cluster() { return emulation::last.cluster; }
extern "C" int last_shared_bytes() { return emulation::last.shared_bytes; }
