#undef _FORTIFY_SOURCE  // its longjmp takes a jump to another stack for a mistake
#include "fibers.h"

#include <ucontext.h>

#include <cstring>
#include <stdexcept>

#include "../block.cuh"

namespace fastmaml {
namespace cuda {
namespace host {

constexpr size_t kStack = 128 * 1024;
static thread_local Fiber* starting = nullptr;

static char* stacks(size_t fibers) {  // of this thread of the host, kept for its next grid
    static thread_local std::unique_ptr<char[]> memory;
    static thread_local size_t room = 0;
    if (fibers > room) memory.reset(new char[kStack * fibers]), room = fibers;
    return memory.get();
}

struct Grid::Memory {
    char* stacks;
    ucontext_t context;
};

Grid::Grid(int blocks, int threads, int ranks, Schedule schedule)
    : blocks_(blocks),
      threads_(threads * ranks),
      ranks_(ranks),
      order_(schedule.order),
      deaf_(schedule.deaf),
      meeting_(schedule.apart ? threads : threads_),
      seed_(schedule.seed * 2 + 1),
      fibers_(blocks * threads_),
      slots_(8 * blocks * threads_),
      memory_(new Memory{stacks(fibers_.size()), {}}) {}

Grid::~Grid() = default;

void Fiber::wait(Meet what) {
    if (what == kBlock && grid->deaf_) return;
    state = what;
    if (!_setjmp(here)) _longjmp(grid->back_, 1);
}

void Fiber::gather(const void* mine, size_t bytes, void* all) {
    const int first = block * grid->threads_ + thread / kWarp * kWarp;
    std::memcpy(&grid->slots_[8 * (first + thread % kWarp)], mine, bytes);
    wait(kWarpOnly);
    for (int lane = 0; lane < kWarp; ++lane)
        std::memcpy(static_cast<char*>(all) + lane * bytes, &grid->slots_[8 * (first + lane)], bytes);
    wait(kWarpOnly);
}

void Grid::begin() {  // on the fiber's own stack
    Fiber* const fiber = starting;
    fiber->grid->body_(fiber->block, Block{fiber->thread, fiber->grid->threads_, fiber->grid->ranks_, fiber});
    fiber->state = kDone;
    _longjmp(fiber->grid->back_, 1);
}

void Grid::resume(Fiber& fiber) {
    fiber.state = kRunning;
    if (_setjmp(back_)) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    starting = &fiber;
    ucontext_t& context = memory_->context;
    getcontext(&context);
    context.uc_stack.ss_sp = memory_->stacks + kStack * (&fiber - fibers_.data());
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, &Grid::begin, 0);
    setcontext(&context);
}

std::vector<int> Grid::ordered(int n) {
    std::vector<int> numbers(n);
    for (int i = 0; i < n; ++i) numbers[i] = order_ == Order::kReversed ? n - 1 - i : i;
    for (int i = n - 1; order_ == Order::kShuffled && i > 0; --i) {
        seed_ = seed_ * 6364136223846793005u + 1442695040888963407u;
        std::swap(numbers[i], numbers[(seed_ >> 33) % (i + 1)]);
    }
    return numbers;
}

// Until every thread of the warp waits for more than the warp.
void Grid::advance_warp(int block, int warp) {
    for (;;) {
        int waiting = 0;
        for (int lane : ordered(kWarp)) {
            Fiber& fiber = at(block, warp * kWarp + lane);
            if (fiber.state == kRunning) resume(fiber);
            waiting += fiber.state == kWarpOnly;
        }
        if (waiting == 0) return;
        if (waiting != kWarp)
            throw std::runtime_error("block " + std::to_string(block) + ", warp " + std::to_string(warp) + ": " +
                                     std::to_string(waiting) + " threads of 32 wait for the others at a barrier");
        for (int lane = 0; lane < kWarp; ++lane) at(block, warp * kWarp + lane).state = kRunning;
    }
}

// Until every thread waits for another block, or is done, or a barrier is passed. Whether any had more to do than to
// look at what another block has done.
bool Grid::advance_block(int block) {
    bool ready = false;
    for (int t = 0; t < meeting_; ++t) {
        Fiber& fiber = at(block, t);
        ready |= fiber.state == kRunning;
        if (fiber.state == kOthers) fiber.state = kRunning;
    }
    for (int warp : ordered(meeting_ / kWarp)) advance_warp(block, warp);
    int waiting = 0, done = 0;
    for (int t = 0; t < meeting_; ++t) waiting += at(block, t).state == kBlock, done += at(block, t).state == kDone;
    if (waiting == meeting_)
        for (int t = 0; t < meeting_; ++t) at(block, t).state = kRunning;
    else if (done && waiting)
        throw std::runtime_error("block " + std::to_string(block) + ": " + std::to_string(done) +
                                 " threads ended while " + std::to_string(waiting) + " wait for all");
    return ready;
}

void Grid::run(std::function<void(int, const Block&)> body) {
    body_ = std::move(body);
    for (int b = 0; b < blocks_; ++b)
        for (int t = 0; t < threads_; ++t) {
            Fiber& fiber = at(b, t);
            fiber.grid = this, fiber.block = b, fiber.thread = t, fiber.started = false;
            fiber.state = t < meeting_ ? kRunning : kDone;
        }
    for (int idle = 0, done = 0; done < blocks_ * threads_;) {
        bool ready = false;
        for (int block : ordered(blocks_)) ready |= advance_block(block);
        idle = ready ? 0 : idle + 1;
        if (idle > 1000) throw std::runtime_error("the blocks wait for each other");
        done = 0;
        for (const Fiber& fiber : fibers_) done += fiber.state == kDone;
    }
}

}  // namespace host
}  // namespace cuda
}  // namespace fastmaml
