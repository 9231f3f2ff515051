// The threads of a grid as fibers of one thread of the host. A fiber runs until it meets a barrier or waits for another
// block; then the next one of its warp runs, then the next warp, in the order asked for. Not for speed: for tests.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace fastmaml {
namespace cuda {
struct Block;

namespace host {

enum Meet { kRunning, kWarpOnly, kBlock, kOthers, kDone };  // what a fiber waits for
enum class Order { kForward, kReversed, kShuffled };
struct Schedule {
    Order order = Order::kForward;
    uint64_t seed = 0;
    bool deaf = false;   // pass the block's barriers by: to show that one that is missing shows
    bool apart = false;  // let a cluster's first block meet by itself and not wait for the others: to show that too
};

class Grid;

class Fiber {
public:
    void wait(Meet what);                                    // at a barrier
    void gather(const void* mine, size_t bytes, void* all);  // what each lane of the warp has

private:
    friend class Grid;
    Grid* grid = nullptr;
    int block = 0, thread = 0;
    Meet state = kRunning;
    bool started = false;
    jmp_buf here;
};

// Runs body(block number, Block) as so many blocks of so many threads, or clusters of `ranks` such blocks, each of
// which is one Block; throws std::runtime_error where some threads wait at a barrier for others that never come.
class Grid {
public:
    Grid(int blocks, int threads, int ranks, Schedule schedule);
    ~Grid();
    void run(std::function<void(int, const Block&)> body);

private:
    friend class Fiber;
    struct Memory;
    static void begin();
    void resume(Fiber& fiber);
    std::vector<int> ordered(int n);
    void advance_warp(int block, int warp);
    bool advance_block(int block);
    Fiber& at(int block, int thread) { return fibers_[block * threads_ + thread]; }

    int blocks_, threads_, ranks_;  // threads: of all ranks
    Order order_;
    bool deaf_;
    int meeting_;  // so many threads meet at a barrier
    uint64_t seed_;
    std::vector<Fiber> fibers_;
    std::vector<char> slots_;  // of gather: 8 bytes for each thread
    std::unique_ptr<Memory> memory_;
    std::function<void(int, const Block&)> body_;
    jmp_buf back_;
};

}  // namespace host
}  // namespace cuda
}  // namespace fastmaml
