// Threads that meet: those that OpenMP really gave.
#pragma once
#include <sched.h>

#include <atomic>

namespace fastmaml {

template <class F>
void spin_until(F done) {  // yields where there are more threads than cores
    for (int spins = 0; !done(); ++spins) {
        if (spins > 2048) sched_yield();
#ifdef FASTMAML_X86
        __builtin_ia32_pause();
#endif
    }
}

class Barrier {
public:
    explicit Barrier(int count) : count_(count) {}
    void wait() {
        if (count_ == 1) return;
        const int turn = turn_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        spin_until([&] { return turn_.load(std::memory_order_acquire) != turn; });
    }

private:
    const int count_;
    std::atomic<int> arrived_{0}, turn_{0};
};

struct alignas(64) Counter {  // threads that count different things do not share a line
    std::atomic<int64_t> value{0};
};

}  // namespace fastmaml
