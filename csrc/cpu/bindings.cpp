// fastmaml._cpu: the only file that knows Python. Pointers come as integers, the Plan as flat lists of numbers (see
// executors/cpu/lowering.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <stdexcept>

#include "executor.h"
#include "fastmaml/read_plan.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace {

template <class T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// Read as they are: pybind11's way to a vector of integers costs a small network a hundredth of its time.
template <class T>
std::vector<T*> pointers(const py::list& addresses) {
    std::vector<T*> out(addresses.size());
    for (size_t i = 0; i < out.size(); ++i)
        out[i] = static_cast<T*>(PyLong_AsVoidPtr(PyList_GET_ITEM(addresses.ptr(), static_cast<Py_ssize_t>(i))));
    if (PyErr_Occurred()) throw py::error_already_set();
    return out;
}

// One half for all tasks: (written, all tasks finite). Not written: not all that was summed is finite; call again with
// the next attempt (0, 1, 2).
std::pair<bool, bool> execute(const fastmaml::Plan& plan, int64_t tasks, int half, int threads, int attempt,
                              int64_t support_rows, int64_t query_rows, int64_t ways, int64_t task_weights,
                              double uniform_weight, const py::list& task_buffers, const py::list& inputs,
                              const py::list& outputs, bool add_to_outputs, bool strict, int64_t meta, int64_t work,
                              int64_t finite) {
    fastmaml::Run run;
    run.tasks = tasks;
    run.half = half;
    run.threads = threads;
    run.careful = attempt > 0;
    run.exclude = attempt > 1;
    run.support_rows = pointer<const int64_t>(support_rows);
    run.query_rows = pointer<const int64_t>(query_rows);
    run.ways = pointer<const int64_t>(ways);
    run.task_weights = pointer<const double>(task_weights);
    run.uniform_weight = uniform_weight;
    run.task_buffers = pointers<char>(task_buffers);
    run.inputs = pointers<const float>(inputs);
    run.outputs = pointers<float>(outputs);
    run.add_to_outputs = add_to_outputs;
    run.strict = strict;
    run.meta = pointer<char>(meta);
    run.work = pointer<char>(work);
    run.finite = pointer<bool>(finite);
    if (run.task_buffers.size() != plan.task_buffers.size() || run.inputs.size() != plan.inputs.size() ||
        run.outputs.size() != plan.outputs.size())
        throw std::runtime_error("fastmaml._cpu: the pointers do not fit the Plan");
    const fastmaml::Tier& tier = fastmaml::active_tier();
    py::gil_scoped_release release;
    const bool written = fastmaml::execute(plan, run, tier);
    return {written, std::all_of(run.finite, run.finite + tasks, [](bool f) { return f; })};
}

// One kernel on its own, by a team whose members work one after another: for tests.
void call_kernel(const std::string& tier, const std::string& name, const std::vector<int64_t>& operands,
                 std::vector<int64_t> row_strides, int64_t n, int64_t row0, int64_t n_total, bool first, bool last,
                 int parts, std::vector<int64_t> sizes, std::vector<float> numbers,
                 std::tuple<int64_t, int64_t, int64_t, int64_t> task) {
    if (operands.size() > fastmaml::kMaxOperands || operands.size() != row_strides.size())
        throw std::runtime_error("call_kernel: operands and row_strides must have one entry per operand, at most 16");
    int id = 0;
    while (id < fastmaml::kKernelCount && name != fastmaml::kernel_name(id)) ++id;
    if (id == fastmaml::kKernelCount) throw std::runtime_error("call_kernel: no kernel is called " + name);
    row_strides.resize(fastmaml::kMaxOperands, 0);  // operands at the end that are not there
    sizes.resize(fastmaml::kMaxSizes, 0);
    numbers.resize(fastmaml::kMaxNumbers, 0.f);
    const fastmaml::Task t = {std::get<0>(task), std::get<1>(task), std::get<2>(task), std::get<3>(task)};
    fastmaml::Call c{};
    for (size_t i = 0; i < operands.size(); ++i) c.operands[i] = pointer<void>(operands[i]);
    c.row_stride = row_strides.data();
    c.n = n, c.row0 = row0, c.n_total = n_total, c.first = first, c.last = last, c.parts = parts;
    c.sizes = sizes.data(), c.numbers = numbers.data(), c.task = &t;
    std::vector<float> scratch(fastmaml::kScratchBytes / sizeof(float), std::nanf(""));
    std::vector<float> shared(fastmaml::kSharedBytes / sizeof(float), std::nanf(""));
    c.scratch = scratch.data(), c.shared = shared.data();
    for (; c.stage < fastmaml::stages_of(id); ++c.stage)
        for (c.part = 0; c.part < parts; ++c.part) fastmaml::find_tier(tier).table[id](c);
}

// GFLOP/s of a register-only FMA loop on `threads` threads: the machine's peak as this project means it.
double peak_gflops(int threads) {
    const fastmaml::Tier& tier = fastmaml::active_tier();
    py::gil_scoped_release release;
    double best = 0;
    for (int attempt = 0; attempt < 5; ++attempt) {
        const auto start = std::chrono::steady_clock::now();
        double flops = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) reduction(+ : flops)
#endif
        flops += tier.peak_flops(1000000);
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        if (flops / seconds.count() * 1e-9 > best) best = flops / seconds.count() * 1e-9;
    }
    (void)threads;
    return best;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "fastmaml's CPU kernels and the executor that walks a Plan over them.";
    py::class_<fastmaml::Plan>(m, "Plan").def(py::init(&fastmaml::read_plan), py::arg("words"));
    m.def("execute", &execute);
    m.def(
        "work_bytes",
        [](const fastmaml::Plan& plan, int64_t tasks, int threads) {
            return fastmaml::work_bytes(plan, tasks, threads);
        },
        "Bytes of the workspace for this many tasks and threads.");
    m.def("call_kernel", &call_kernel);
    m.def("peak_gflops", &peak_gflops, py::arg("threads"));
    m.def("kernels", [] {
        std::vector<std::string> names;
        for (int i = 0; i < fastmaml::kKernelCount; ++i) names.push_back(fastmaml::kernel_name(i));
        return names;
    });
    m.def("tiers", [] {
        std::vector<std::string> names;
        for (const fastmaml::Tier& tier : fastmaml::tiers()) names.push_back(tier.name);
        return names;
    });
    m.def("active_tier", [] { return std::string(fastmaml::active_tier().name); });
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
}
