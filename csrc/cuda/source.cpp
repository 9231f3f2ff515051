#include "source.h"

#include <cmath>
#include <cstdio>
#include <stdexcept>

namespace fastmaml {
namespace cuda {
namespace {

const char* const kNames[] = {
#define FASTMAML_NAME(name) #name,
    FASTMAML_KERNELS(FASTMAML_NAME)
#undef FASTMAML_NAME
};

std::string text(int64_t v) { return std::to_string(v); }
std::string text(int v) { return std::to_string(v); }
std::string text(bool v) { return v ? "true" : "false"; }
std::string text(Rows v) { return "Rows(" + text(static_cast<int>(v)) + ")"; }
std::string text(Layout v) { return "Layout(" + text(static_cast<int>(v)) + ")"; }
std::string text(const std::string& v) { return v; }
std::string text(float v) {  // nine digits give a float back to the bit
    if (!std::isfinite(v)) throw std::runtime_error("fastmaml._cuda: the Plan has a number that is not finite");
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.9g", static_cast<double>(v));
    const std::string out = digits;
    return out + (out.find_first_of(".e") == std::string::npos ? ".f" : "f");
}

std::string text(const Operand& o);

template <class First, class... Rest>
std::string braces(const First& first, const Rest&... rest) {  // an aggregate, its members in their order
    std::string out = "{" + text(first);
    ((out += ", " + text(rest)), ...);
    return out + "}";
}

template <class T>
std::string list(const T* values, int n) {
    std::string out = "{";
    for (int i = 0; i < n; ++i) out += (i ? ", " : "") + text(values[i]);
    return out + "}";
}

std::string text(const Operand& o) {
    return braces(o.base, o.first_base, o.shift, o.offset, o.step_stride, o.row_stride, o.first_offset, o.advance);
}

std::string text(const Instruction& in) {
    return braces(in.kernel, in.n_operands, 0, in.sums, in.fixed, in.stages, in.pixels, list(in.sizes, kMaxSizes),
                  list(in.numbers, kMaxNumbers));
}

std::string text(const FlatPort& p) {
    return braces(
        braces(p.port.offset, p.port.layout, p.port.rows, p.port.cols, p.port.taps, p.port.steps, p.port.step_stride),
        p.first_chunk, p.chunks_of_slot);
}

std::string text(const FlatReduction& r) {
    return braces(r.source, r.target, r.count, r.offset, r.first_chunk, r.copied);
}

std::string text(const Scalars& s) { return braces(s.at, s.begin, s.end); }

class Writer {
public:
    Writer(const std::vector<char>& plan, int half)
        : bytes_(plan), p_(*reinterpret_cast<const FlatPlan*>(plan.data())), half_(half) {}

    std::string write(int64_t support, int64_t query, bool ways) {
        line("#include \"straight.cuh\"\n\nnamespace fastmaml {\nnamespace cuda {\n");
        line("struct Half : Straight<Half> {");
        line("    static constexpr int64_t kSupport = " + text(support) + ", kQuery = " + text(query) + ";");
        line("    static constexpr bool kWays = " + text(ways) + ";");
        line("    static constexpr int kThreads = " + text(p_.threads) + ", kRanks = " + text(p_.ranks) + ";");
        line("    using Straight::Straight;");
        write_head();
        write_task_buffers();
        write_phases();
        write_choice("input", "FlatPort", table<FlatPort>(p_.inputs), half_ == 0 ? p_.n_inputs : 0);
        write_choice("output", "FlatPort", table<FlatPort>(p_.outputs), last() ? p_.n_outputs : 0);
        write_choice("reduction", "FlatReduction", table<FlatReduction>(p_.reductions), last() ? p_.n_reductions : 0);
        write_each("each_reduction", "FlatReduction", table<FlatReduction>(p_.reductions),
                   last() ? p_.n_reductions : 0);
        write_each("each_checked", "Scalars", table<Scalars>(p_.checked), half_ == 0 ? p_.n_checked : 0);
        line("};\n\n}  // namespace cuda\n}  // namespace fastmaml\n");
        line("FM_ENTRY(Half)");
        return out_;
    }

private:
    template <class T>
    const T* table(int32_t at) const {
        return reinterpret_cast<const T*>(bytes_.data() + at);
    }
    void line(const std::string& s) { out_ += s + "\n"; }
    bool last() const { return half_ == p_.halves - 1; }

    void write_head() {
        line("    FM_DEVICE static int half() { return " + text(half_) + "; }");
        line("    FM_DEVICE static FlatPlan head() {\n        FlatPlan p = {};");
#define FASTMAML_FIELD(name) line("        p." #name " = " + text(p_.name) + ";");
        FASTMAML_FIELD(n_task_buffers)
        FASTMAML_FIELD(n_inputs)
        FASTMAML_FIELD(input_chunks)
        FASTMAML_FIELD(output_chunks)
        FASTMAML_FIELD(sum_chunks)
        FASTMAML_FIELD(halves)
        FASTMAML_FIELD(prologue)
        FASTMAML_FIELD(epilogue)
        FASTMAML_FIELD(threads)
        FASTMAML_FIELD(ranks)
        FASTMAML_FIELD(chunk)
        FASTMAML_FIELD(warm_bytes)
        FASTMAML_FIELD(sums_floats)
        FASTMAML_FIELD(arena_bytes)
#undef FASTMAML_FIELD
        line("        return p;\n    }");
    }

    void write_task_buffers() {
        line("    FM_DEVICE static TaskBuffer task_buffer(int i) {");
        for (int i = 0; i < p_.n_task_buffers; ++i) {
            const TaskBuffer& b = table<TaskBuffer>(p_.task_buffers)[i];
            line("        if (i == " + text(i) + ") return " + braces(b.rows, b.stride) + ";");
        }
        line("        return {};\n    }");
    }

    void write_instruction(const Instruction& in) {
        std::string operands = "{";
        for (int i = 0; i < in.n_operands; ++i)
            operands += (i ? ", " : "") + text(table<Operand>(p_.operands)[in.operands + i]);
        line("            call<" + std::string(kNames[in.kernel]) + ">(g, step, " + text(in) + ",");
        line("                " + operands + "});");
    }

    void write_phases() {
        std::string parts[3];
        for (int i = 0; i < p_.n_phases; ++i) {
            const FlatPhase& phase = table<FlatPhase>(p_.phases)[i];
            int part = 0;
            while (part < 3 && !runs(phase, static_cast<Part>(part), half_, p_.halves)) ++part;
            if (part == 3) continue;
            const std::string name = "phase" + text(i);
            parts[part] += "            phase<&Half::" + name + ", " + text(phase.start) + ", " + text(phase.stop) +
                           ", " + text(phase.stride) + ">();\n";
            line("\n    FM_DEVICE void " + name + "(int step) {");
            for (int g = phase.groups.begin; g < phase.groups.end; ++g) {
                const FlatGroup& group = table<FlatGroup>(p_.groups)[g];
                line("        {\n            Interval g = open(" + text(group.rows) + ");");
                for (int n = group.instructions.begin; n < group.instructions.end; ++n)
                    write_instruction(table<Instruction>(p_.instructions)[n]);
                line("            close(g);\n        }");
            }
            line("    }");
        }
        line("\n    FM_DEVICE void phases(Part part) {");
        const char* const names[] = {"kBefore", "kOfTask", "kBehind"};
        for (int part = 0; part < 3; ++part)
            if (!parts[part].empty())
                line("        if (part == " + std::string(names[part]) + ") {\n" + parts[part] + "        }");
        line("    }\n");
    }

    template <class T>
    void write_choice(const char* name, const char* type, const T* entries, int n) {
        line("    template <class F>\n    FM_DEVICE void " + std::string(name) + "(int chunk, F f) {");
        for (int i = 0; i < n; ++i)
            line("        " +
                 (i + 1 < n ? "if (chunk < " + text(entries[i + 1].first_chunk) + ") return " : std::string()) + "f(" +
                 text(i) + ", " + type + text(entries[i]) + ");");
        line("    }");
    }

    template <class T>
    void write_each(const char* name, const char* type, const T* entries, int n) {
        line("    template <class F>\n    FM_DEVICE void " + std::string(name) + "(F f) {");
        for (int i = 0; i < n; ++i) line("        f(" + std::string(type) + text(entries[i]) + ");");
        line("    }");
    }

    const std::vector<char>& bytes_;
    const FlatPlan& p_;
    const int half_;
    std::string out_;
};

}  // namespace

const char* kernel_name(int kernel) { return kNames[kernel]; }

std::string half_source(const std::vector<char>& plan, int half, int64_t support, int64_t query, bool ways) {
    return Writer(plan, half).write(support, query, ways);
}

}  // namespace cuda
}  // namespace fastmaml
