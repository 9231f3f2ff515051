// One half of a meta-iteration, and its phases outside the tasks.
#pragma once
#include <memory>

#include "team.h"
#include "walk.h"

namespace fastmaml {

// What its threads share. Everything that crosses threads lies behind a barrier, or behind a counter of the chunks that
// are done.
struct Shared {
    const Plan& plan;
    const Run& run;
    const Tier& tier;
    Shape shape{};
    std::vector<std::unique_ptr<Barrier>> teams{};
    std::unique_ptr<Barrier> all{};
    std::vector<Counter> counters{};  // what the next three point into
    Counter* taken = nullptr;         // chunks of each team's share
    Counter* current = nullptr;       // the chunk that each team works on
    Counter* arrived = nullptr;       // by right half: halves of a sum that are complete
    std::atomic<bool> finite{true};
    std::atomic<bool> ready{false};   // a small Plan: packed, the others may begin
    bool small = false;               // see is_small
    std::atomic<bool> summed{false};  // a small Plan: all chunks, into the first
    std::atomic<bool> bad{false};
    std::atomic<bool> again{false};  // a batch phase found tasks whose own share of a sum is not finite
};

// Row kernels of a batch phase take a share of the rows of all tasks; sums take a share of their output, over the rows
// of all finite tasks. Thread `me` of `n`.
void run_batch(Shared& s, const Phase& phase, int me, int n);

}  // namespace fastmaml
