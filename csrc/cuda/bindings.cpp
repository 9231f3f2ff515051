// fastmaml._cuda, and with the host's executor in place of the device's fastmaml._cuda_host: the only file that knows
// Python. Pointers and streams come as integers, the Plan as the flat list of numbers of executors/cpu/lowering.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>

#include "executor.h"
#include "fastmaml/read_plan.h"
#include "source.h"

namespace py = pybind11;
using namespace fastmaml;

#ifdef FASTMAML_CUDA_HOST
#define FASTMAML_MODULE _cuda_host
#else
#define FASTMAML_MODULE _cuda
#endif

namespace {

template <class T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

struct Flat {
    std::vector<char> bytes;
    const cuda::FlatPlan& head() const { return *reinterpret_cast<const cuda::FlatPlan*>(bytes.data()); }
};

Flat read_flat(const std::vector<int64_t>& words, int64_t scratch_at, int64_t shared_limit, int threads, int ranks) {
    const Plan plan = read_plan(words);
    const std::vector<int> known = cuda::supported_kernels();
    for (const Phase& phase : plan.phases)
        for (const Group& group : phase.groups)
            for (const Instruction& in : group.instructions)
                if (std::find(known.begin(), known.end(), in.kernel) == known.end() || in.pixels != 1)
                    throw std::runtime_error(std::string("fastmaml._cuda: no device function for ") +
                                             cuda::kernel_name(in.kernel) + (in.pixels != 1 ? " of images" : ""));
    return {cuda::flatten(plan, scratch_at, shared_limit, threads, ranks)};
}

// One half for all tasks, put on the stream. compiled: a kernel made of its source, or 0 for the walk.
void execute(const Flat& plan, int64_t compiled, int device, int64_t stream, const std::string& order, int64_t plan_at,
             int64_t tasks, int half, int blocks, int64_t support_rows, int64_t query_rows, int64_t ways,
             int64_t task_weights, double uniform_weight, const std::vector<int64_t>& pointers, bool add_to_outputs,
             bool strict, int64_t meta, int64_t arenas, int64_t sums, int64_t counters, int64_t finite) {
    const cuda::FlatPlan& p = plan.head();
    if (static_cast<int>(pointers.size()) != p.n_task_buffers + p.n_inputs + p.n_outputs)
        throw std::runtime_error("fastmaml._cuda: the pointers do not fit the Plan");
    if (tasks < 1 || tasks > 1 << 30 || blocks < 1) throw std::runtime_error("fastmaml._cuda: no tasks, or no blocks");
    cuda::Launch l = {};
    l.plan = pointer<const char>(plan_at);
    l.tasks = tasks, l.half = half, l.blocks = blocks, l.add_to_outputs = add_to_outputs, l.strict = strict;
    l.support_rows = pointer<const int64_t>(support_rows);
    l.query_rows = pointer<const int64_t>(query_rows);
    l.ways = pointer<const int64_t>(ways);
    l.task_weights = pointer<const double>(task_weights);
    l.uniform_weight = uniform_weight;
    l.meta = pointer<char>(meta), l.arenas = pointer<char>(arenas), l.sums = pointer<float>(sums);
    l.counters = pointer<int>(counters), l.finite = pointer<uint8_t>(finite);
    for (size_t i = 0; i < pointers.size(); ++i) l.pointers[i] = pointer<void>(pointers[i]);
    py::gil_scoped_release release;
    cuda::launch(plan.bytes, l, pointer<const void>(compiled), device, pointer<void>(stream), order);
}

void call_kernel(const std::string& order, int threads, const std::string& name, const std::vector<int64_t>& operands,
                 const std::vector<int64_t>& row_strides, int rows, std::vector<int64_t> sizes,
                 std::vector<float> numbers, std::tuple<int64_t, int64_t, int64_t, int64_t> task) {
    Instruction in;
    while (in.kernel < kKernelCount && name != cuda::kernel_name(in.kernel)) ++in.kernel;
    if (in.kernel == kKernelCount) throw std::runtime_error("call_kernel: no kernel is called " + name);
    if (operands.size() > kMaxOperands || operands.size() != row_strides.size())
        throw std::runtime_error("call_kernel: operands and row_strides must have one entry per operand, at most 16");
    std::vector<cuda::Place> places(kMaxOperands, cuda::Place{nullptr, 0});
    for (size_t i = 0; i < operands.size(); ++i) places[i] = {pointer<char>(operands[i]), row_strides[i]};
    sizes.resize(kMaxSizes, 0);
    numbers.resize(kMaxNumbers, 0.f);
    std::copy(sizes.begin(), sizes.end(), in.sizes);
    std::copy(numbers.begin(), numbers.end(), in.numbers);
    const Task t = {std::get<0>(task), std::get<1>(task), std::get<2>(task), std::get<3>(task)};
    cuda::call_kernel(in, places, t, rows, threads, order);
}

}  // namespace

PYBIND11_MODULE(FASTMAML_MODULE, m) {
    m.doc() = "fastmaml's CUDA device functions and the kernel that walks a Plan over them.";
    py::class_<Flat>(m, "Plan")
        .def(py::init(&read_flat), py::arg("words"), py::arg("scratch_at"), py::arg("shared_limit"),
             py::arg("threads") = 0, py::arg("ranks") = 1)
        .def(
            "source",
            [](const Flat& p, int half, int64_t support, int64_t query, bool ways) {
                return cuda::half_source(p.bytes, half, support, query, ways);
            },
            "Of one half, for tasks of so many rows (-1: they differ), whose batch gives `ways` or does not.")
        .def_property_readonly("bytes", [](const Flat& p) { return py::bytes(p.bytes.data(), p.bytes.size()); })
        .def_property_readonly("threads", [](const Flat& p) { return p.head().threads; })
        .def_property_readonly("ranks", [](const Flat& p) { return p.head().ranks; })
        .def_property_readonly("meta_bytes", [](const Flat& p) { return p.head().meta_bytes; })
        .def_property_readonly("arena_bytes", [](const Flat& p) { return p.head().arena_bytes; })
        .def_property_readonly("shared_arena_bytes", [](const Flat& p) { return p.head().shared_arena_bytes; })
        .def_property_readonly("sums_floats", [](const Flat& p) { return p.head().sums_floats; });
    m.attr("can_load") = cuda::can_load();
    m.attr("counters") = static_cast<int>(cuda::kCounters);
    m.def("execute", &execute);
    m.def(
        "headers",
        [] {
            py::dict out;
            for (auto header = cuda::header_texts; (*header)[0]; ++header) out[(*header)[0]] = (*header)[1];
            return out;
        },
        "What a Plan's source includes: name to text.");
    m.def(
        "load",
        [](const py::bytes& cubin, int device) {
            return static_cast<int64_t>(reinterpret_cast<uintptr_t>(cuda::load(cubin, device)));
        },
        "A compiled source, for execute(): it stays loaded.");
    m.def("call_kernel", &call_kernel);
    m.def(
        "resident_blocks",
        [](const Flat& p, int device, int ranks) {
            cuda::FlatPlan head = p.head();
            head.ranks = ranks;
            return cuda::resident_blocks(head, device);
        },
        "How many blocks of the Plan run at once, or clusters of so many of them.");
    m.def("devices", [] {
        std::string why;
        const int count = cuda::device_count(why);
        return std::make_pair(count, why);
    });
    m.def("why_not", &cuda::why_not, "Why a device cannot run what was built, or an empty text.");
    m.def("device", [](int index) {
        const cuda::Device d = cuda::device(index);
        py::dict out;
        out["name"] = d.name, out["shared_bytes"] = d.shared_bytes, out["multiprocessors"] = d.multiprocessors;
        out["capability"] = std::make_pair(d.major, d.minor);
        return out;
    });
    m.def("kernels", [] {
        std::vector<std::string> names;
        for (int id : cuda::supported_kernels()) names.push_back(cuda::kernel_name(id));
        return names;
    });
    m.def(
        "all_kernels",
        [] {
            std::vector<std::string> names;
            for (int id = 0; id < kKernelCount; ++id) names.push_back(cuda::kernel_name(id));
            return names;
        },
        "In the order of their numbers in a Plan.");
}
