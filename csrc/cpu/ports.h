// How leaves come into the meta arena and gradients out of it.
#pragma once
#include "executor.h"

namespace fastmaml {

void pack(const Port& port, const float* from, char* meta, const Tier& tier, int part, int parts);

// A share of the rows of a leaf's gradient, out of the packed or plain form.
void unpack(const Port& port, float* to, bool add, char* meta, const Tier& tier, int part, int parts);

}  // namespace fastmaml
