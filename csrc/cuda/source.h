// The source of one half of a Plan: straight-line calls of the device functions in the order of the walk, for a
// compiler that then knows all shapes, strides and addresses. The flattened Plan says everything; nothing is decided
// here.
#pragma once
#include <string>

#include "flat.h"

namespace fastmaml {
namespace cuda {

// support, query: rows of every task, -1 where tasks differ; ways: whether the batch gives them. Throws
// std::runtime_error for what cannot be written as source.
std::string half_source(const std::vector<char>& plan, int half, int64_t support, int64_t query, bool ways);

const char* kernel_name(int kernel);

// (name, text) of all that the source includes, and at the end null: embedded by setup.py.
extern const char* const header_texts[][2];

}  // namespace cuda
}  // namespace fastmaml
