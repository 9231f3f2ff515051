"""What stands around a batchnorm becomes one launch with it, or with the product in front: its sums, and the pool that comes first.

    linear, conv2d + batchnorm's sums   of what they make: its statistics, or of dy its two sums; of both their tangents
    maxpool2d + batchnorm               what the pool chooses is chosen as it is read
    batchnorm_bwd_input + maxpool2d_bwd where dx depends on no sum, it goes right to the images

A block of conv4 is then two launches forward (product and sums; pool, normalise and relu) and three back (gradient before the norm; of the input, and sums; of the weight).
By count: the statistics of the query's first block no longer read its 32 x 75 images of 28 x 28 x 64 numbers, 481 MB, which an H100's 3.35 TB/s bring in 0.14 ms.

To normalise in the prologue of the next 3 x 3 convolution does not pay, by count, for 14 x 14 x 64 numbers of the query, 30 million: it saves to write y, 120 MB or
0.04 ms, and a launch; reading x for y in nine taps costs the same. But every number is then normalised nine times, four operations of 30 million each, 0.04 ms of all
lanes of 132 multiprocessors, in the loop that feeds the tensor cores, where loads can no longer go to shared memory past the registers; and y is also read by the
gradient of the weight and by both in the Hessian-vector product, which would have to do it again. Small images of the support stay in the cache: there it saves less.
"""

from __future__ import annotations

import math
from dataclasses import replace

from fastmaml.executors.triton.fused import Fused, Moves, Pool, Sums, as_fused
from fastmaml.plan.instructions import Instruction, Plan, Ref

PRODUCTS = {f"{op}_{mode}" for op in ("linear", "conv2d") for mode in ("fwd", "jvp", "bwd_input", "bwd_input_jvp")}
SUMMED = {"batchnorm_stats_fwd": 0, "batchnorm_stats_jvp": 3, "batchnorm_bwd_stats": 3, "batchnorm_bwd_stats_jvp": 7}  # the operand that has just been made
CHOSEN = {"batchnorm_fwd": {"x": 0}, "batchnorm_jvp": {"x": 0, "xt": 4}}  # operands that a pool in front may choose
SCATTERED = {"batchnorm_bwd_input": "maxpool2d_bwd", "batchnorm_bwd_input_jvp": "maxpool2d_bwd_jvp"}


def fuse_norms(plan: Plan) -> Plan:
    """The same results, from fewer instructions; behind the fusion of activations."""
    return _NormFusion(plan).run()


class _NormFusion(Moves):
    def run(self) -> Plan:
        for name, code in self.code.items():
            for i in range(len(code) - 1, -1, -1):
                if code[i][1].kernel in PRODUCTS:
                    self._sums(name, i)
            for instr in [instr for _, instr in code if instr.kernel in CHOSEN or instr.kernel in SCATTERED]:
                i = next(i for i, (_, other) in enumerate(code) if other is instr)
                (self._pools if instr.kernel in CHOSEN else self._scatter)(name, i)
        return self.rebuilt()

    # ------------------------------------------------------------------------------------------------- sums of a batchnorm
    def _sums(self, name: str, i: int) -> None:
        code, (group, first) = self.code[name], self.code[name][i]
        result, weight = first.outputs[0], first.inputs[1] or first.inputs[3]
        if result is None:
            return
        shape, columns = self.buffers[result.buffer].shape, self.buffers[weight.buffer].shape["bwd" in first.kernel]
        if columns != (shape[0] if first.kernel.startswith("conv2d") and len(shape) == 3 else math.prod(shape)):
            return  # its columns are not the channels
        for j in range(i + 1, len(code)):
            instr = code[j][1]
            if SUMMED.get(instr.kernel) in (k for k, ref in enumerate(instr.inputs) if ref == result):
                if instr.inputs.count(result) == 1 and self._may_run_before(instr, (other for _, other in code[i + 1 : j]), result):
                    code[i] = group, self._summing(first, instr, result)
                    del code[j]
                return

    def _summing(self, first: Instruction, instr: Instruction, result: Ref) -> Fused:
        mode = instr.kernel.removeprefix("batchnorm_")
        operands = tuple(None if ref == result else ref for ref in instr.inputs)
        counted = instr.attrs["stat_rows"] if mode.startswith("stats") else self.buffers[result.buffer].rows
        more, outputs = tuple(ref for ref in operands if ref is not None), (*first.outputs, *instr.outputs)
        fused = as_fused(first)
        sums = Sums(mode, operands, counted, instr.attrs["eps"])
        return replace(fused, inputs=(*fused.inputs, *more), outputs=outputs, parts=(*fused.parts, instr), sums=sums)

    # ------------------------------------------------------------------------------------------------- pools
    def _pools(self, name: str, i: int) -> None:
        """What chooses an operand of a batchnorm is done in its launch."""
        code, taken = self.code[name], []
        for operand, place in CHOSEN[code[i][1].kernel].items():
            group, last = code[i]
            j = next((j for j in range(i - 1, -1, -1) if last.inputs[place] is not None and last.inputs[place] in code[j][1].outputs[:1]), None)
            if j is None or j in taken:
                continue
            pool, between = code[j][1], [instr for k, (_, instr) in enumerate(code[j + 1 : i], j + 1) if k not in taken]
            mine = self._as_pool(pool, operand, last)
            if mine is not None and self._may_run_before(pool, between):
                code[i] = group, self._pooling(last, pool, mine, place)
                taken.append(j)
        for j in sorted(taken, reverse=True):
            del code[j]

    def _as_pool(self, instr: Instruction, operand: str, last: Instruction) -> Pool | None:
        out = instr.outputs[0]
        out = None if self.uses.private(out) else out
        before = last.pools if isinstance(last, Fused) else ()
        if instr.kernel == "batchnorm_maxpool2d_fwd" and last.kernel == "batchnorm_fwd" and instr.inputs[1] == last.inputs[3]:
            return Pool(operand, "choose", instr.inputs[0], instr.outputs[1], out)
        if instr.kernel in ("maxpool2d_replay", "maxpool2d_jvp") and all(pool.index == instr.inputs[1] for pool in before):
            return Pool(operand, "gather", *instr.inputs, out)
        return None

    def _pooling(self, last: Instruction, pool: Instruction, mine: Pool, place: int) -> Fused:
        """``last``, and in front of it the pool."""
        fused = as_fused(last)
        inputs, chooses = list(fused.inputs), mine.how == "choose"
        inputs[place] = None
        inputs += (mine.images,) if chooses else (mine.images, mine.index)
        outputs = (*fused.outputs, mine.out, *((mine.index,) if chooses else ()))
        images, pooled = (self.buffers[ref.buffer].shape for ref in (mine.images, pool.outputs[0]))
        attrs = {**fused.attrs, "kernel": pool.attrs["kernel"], "stride": pool.attrs["stride"], "input_shape": images, "pooled": pooled}
        return replace(fused, inputs=tuple(inputs), outputs=outputs, attrs=attrs, parts=(pool, *fused.parts), pools=(*fused.pools, mine))

    def _scatter(self, name: str, i: int) -> None:
        """The gradient of what a pool has chosen, where it depends on no sum, goes right to the images."""
        code, (group, first) = self.code[name], self.code[name][i]
        x, mean, rstd, gamma, dy, s1, s2, *rest = first.inputs
        result = first.outputs[0]
        tangents = rest and (None, None, *rest[2:5], None, None)  # of x and mean: they are in the sums alone
        if isinstance(first, Fused) or first.attrs["stat_rows"] is not None or {s1, s2, *rest[5:]} != {None} or not self.uses.private(result):
            return
        j = next(j for j in range(i + 1, len(code)) if result in code[j][1].inputs)
        scatter = code[j][1]
        tiles = scatter.kernel == SCATTERED[first.kernel] and self._tiles(scatter)
        if tiles and self._may_run_before(scatter, (instr for _, instr in code[i + 1 : j]), result):
            kernel = first.kernel.replace("batchnorm", "batchnorm_maxpool2d")
            main = Instruction(kernel, (None, None, rstd, gamma, dy, scatter.inputs[1], None, None, *tangents), scatter.outputs, {**scatter.attrs, **first.attrs})
            code[i] = group, replace(as_fused(main), parts=(first, scatter))
            del code[j]

    @staticmethod
    def _tiles(pool: Instruction) -> bool:
        """Windows that do not overlap, all of them inside."""
        return all(k <= s for k, s in zip(pool.attrs["kernel"], pool.attrs["stride"], strict=True)) and not any(pool.attrs["padding"])
