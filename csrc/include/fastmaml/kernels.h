// Every CPU kernel: one function per <op>_<mode>, its operands in the order of the Plan (inputs, then outputs) and its
// formula.
//
// A trailing ? marks an operand that may be absent (null): as an input it counts as zero, as an output it is not
// wanted. Shapes: x [n, in], w packed [out, in], vectors [c] padded to kLane. "sizes" are Instruction::sizes, "numbers"
// Instruction::numbers. Row kernels see one block of rows; reductions write on the first block and add on later ones. A
// team member does the share `part` of `parts`. Kernels in stages (see stages_of) are called once for each, and a team
// meets between two of them.
#pragma once
#include "fastmaml/plan.h"

namespace fastmaml {

struct Task {
    int64_t index, n_support, n_query, ways;  // ways 0: all outputs
};

struct Call {
    void* operands[kMaxOperands];
    const int64_t* row_stride;  // by operand, bytes
    int64_t n;                  // rows of this block
    int64_t row0;               // its first row
    int64_t n_total;            // rows of the extent
    bool first, last;           // block
    int part, parts;
    int stage;
    float* scratch;  // kScratchBytes of this team member's own
    float* shared;   // kSharedBytes of the team, from one stage to the next
    const int64_t* sizes;
    const float* numbers;
    const Task* task;

    float* f(int i) const { return static_cast<float*>(operands[i]); }
    uint8_t* mask(int i) const { return static_cast<uint8_t*>(operands[i]); }
    const int64_t* label(int i) const { return static_cast<const int64_t*>(operands[i]); }
    int64_t stride(int i) const { return row_stride[i] / static_cast<int64_t>(sizeof(float)); }
};

constexpr int64_t kScratchBytes = 608 * 1024;  // of a Plan with kernels that use it: conv2d, patches
constexpr int64_t kSharedBytes = 64 * 1024;    // of a Plan with kernels in stages

using Kernel = void (*)(const Call&);

// clang-format off
#define FASTMAML_KERNELS(K) \
    /* linear: sizes {in, out}. The results of the first five may pass through a piecewise linear activation ("act"): numbers {0 none, \
       1 y = relu(y) and mask? = y > 0, 2 the mask given, slope}. Epilogue of bwd_weight: base + numbers[0] * scale * dw instead of dw, \
       and bbase + numbers[1] * bscale * db instead of db */ \
    K(linear_fwd)            /* x, w, b?, y, mask?:                y = act(x w^T + b) */ \
    K(linear_jvp)            /* x, w, xt?, wt?, bt?, yt, mask?:    yt = act(xt w^T + x wt^T + bt) */ \
    K(linear_bwd_input)      /* dy, w, dx, mask?, turned?:         dx = act(dy w); turned: w packed as its transpose would be */ \
    K(linear_bwd_input_jvp)  /* dy?, w, dyt?, wt?, dxt, mask?, turned?: dxt = act(dyt w + dy wt) */ \
    K(linear_bwd_input_both) /* dy, w, dyt, wt?, dx, dxt, mask?, turned?: both of these, w read once */ \
    K(linear_bwd_weight)     /* x, dy, dw?, db?, base?, scale?, bbase?, bscale?: dw = dy^T x, db = sum dy */ \
    K(linear_bwd_weight_jvp) /* x, dy, xt?, dyt?, dwt?, dbt?, base?, scale?, bbase?, bscale?: dwt = dyt^T x + dy^T xt, dbt = sum dyt */ \
    K(row_sum_bwd)           /* dy, db:                            sum dy; sizes {0, out} */ \
    /* conv2d: sizes {c, h, w, o, kh, kw, stride h, w, pad top, left, out h, w, 1 where x is the caller's [c][h][w]}, images [h][w][c]; act as of linear */ \
    K(conv2d_fwd)            /* x, w, b?, y, mask?:                y = act(x * w + b) */ \
    K(conv2d_jvp)            /* x, w, xt?, wt?, bt?, yt, mask?:    yt = act(xt * w + x * wt + bt) */ \
    K(conv2d_bwd_input)      /* dy, w, dx, mask?:                  dx = act(the transposed convolution of dy with w) */ \
    K(conv2d_bwd_input_jvp)  /* dy?, w, dyt?, wt?, dxt, mask?:     the same of dyt with w, and of dy with wt */ \
    K(conv2d_bwd_weight)     /* x, dy, dw?, db?:                   dw[o, c, tap] = sum over pixels dy[o] x[c] at the tap; db = sum dy */ \
    K(conv2d_bwd_weight_jvp) /* x, dy?, xt?, dyt?, dwt?, dbt? */ \
    /* batch statistics of a convolution of the samples (plan/patches.py): moments [2][1 + size][size], size = channels * taps in the order of \
       the plain weight: m, then C of the patches, as a float and what it leaves of a double. sizes {channels, taps, outputs}, numbers {eps} */ \
    K(patch_moments_fwd)     /* x, moments: of the support rows; sizes as of conv2d; whole extents, never blocks */ \
    K(patch_stats_fwd)       /* moments, w, mean, rstd:            mean = w m, rstd = 1 / sqrt(w^T C w + eps) */ \
    K(patch_stats_jvp)       /* moments, w, rstd, wt, meant, rstdt: meant = wt m, rstdt = -rstd^3 w^T C wt */ \
    K(patch_stats_bwd)       /* moments, w, gamma?, rstd, s1, s2, dw: dw = -gamma rstd (s1 m + rstd s2 C w) */ \
    K(patch_stats_bwd_jvp)   /* moments, w, gamma?, rstd, s1?, s2?, wt?, gammat?, rstdt?, s1t?, s2t?, dwt: its tangent */ \
    /* factored first layers (plan/rewrite.py): sizes {out, extent of the rows, as enum Rows}; whole extents, never blocks */ \
    K(gram_fwd)              /* x, xs, g:                          x xs^T, in double; sizes {in, extent} */ \
    K(factored_linear_fwd)   /* a, g, d, b?, y:                    y = a + g d + b */ \
    K(factored_linear_jvp)   /* d?, bt, yt:                        yt = d + bt, row by row */ \
    K(factored_linear_bwd)   /* g, dy, dd:                         dd = g^T dy */ \
    /* batchnorm over rows: sizes {c, stat rows: 0, -1 all, -2 those of the support; pixels of a row}, numbers {eps} of stats_fwd and running, \
       "act" of the linear kernels in those with a mask?. xhat = (x - mean) rstd, xhatt its tangent */ \
    K(batchnorm_stats_fwd)   /* x, mean, rstd:                     rstd = 1 / sqrt(biased variance + eps) */ \
    K(batchnorm_running_fwd) /* running_mean, running_var, mean, rstd */ \
    K(batchnorm_stats_jvp)   /* x, mean, rstd, xt, meant, rstdt:   meant = E[xt], rstdt = -rstd^3 E[(x - mean) xt] */ \
    K(batchnorm_fwd)         /* x, mean, rstd, gamma?, beta?, y, mask?: y = act(gamma xhat + beta) */ \
    K(batchnorm_jvp)         /* x, mean, rstd, gamma?, xt?, meant?, rstdt?, gammat?, betat?, yt, mask? */ \
    K(batchnorm_bwd_stats)   /* x, mean, rstd, dy, s1, s2:         s1 = sum dy, s2 = sum dy xhat (also dbeta, dgamma) */ \
    K(batchnorm_bwd_input)   /* x, mean, rstd, gamma?, dy, s1, s2, dx, mask?: dx = gamma rstd (dy - [stat row] (s1 + xhat s2) / N) */ \
    K(batchnorm_bwd_stats_jvp) /* x, mean, rstd, dy?, xt?, meant?, rstdt?, dyt?, s1t?, s2t? */ \
    K(batchnorm_bwd_input_jvp) /* x, mean, rstd, gamma?, dy?, s1?, s2?, xt?, meant?, rstdt?, gammat?, dyt?, s1t?, s2t?, dxt, mask? */ \
    /* the same of what a max pooling chooses (plan/pooling.py), windows as in maxpool2d below, sizes[10] as stat rows above */ \
    K(batchnorm_maxpool2d_fwd) /* x, gamma?, y?, index?:           of each window the first maximum of x times the sign of gamma */ \
    K(batchnorm_maxpool2d_bwd_input) /* x, mean, rstd, gamma?, dy, index, s1, s2, dx: as batchnorm_bwd_input, dy at the chosen pixels */ \
    K(batchnorm_maxpool2d_bwd_input_jvp) /* x, mean, rstd, gamma?, dy?, index, s1?, s2?, xt?, meant?, rstdt?, gammat?, dyt?, s1t?, s2t?, dxt */ \
    /* layernorm and groupnorm, statistics within a row: sizes {c, pixels, slabs, groups, affine}, numbers {eps}; a row is `slabs` images \
       [pixels][c padded], a set of statistics a group of channels in one of them; gamma is 0 [c], 1 [pixels], 2 [c, pixels]. \
       xhatt = rstd (xt - E[xt] - xhat E[xt xhat]), h = gamma dy, ht = gamma dyt + gammat dy */ \
    K(layernorm_fwd)         /* x, gamma?, beta?, y:               y = gamma xhat + beta */ \
    K(layernorm_jvp)         /* x, gamma?, xt?, gammat?, betat?, yt: yt = gamma xhatt + gammat xhat + betat */ \
    K(layernorm_bwd_input)   /* x, gamma?, dy, dx:                 dx = rstd (h - E[h] - xhat E[h xhat]) */ \
    K(layernorm_bwd_input_jvp) /* x, gamma?, dy?, xt?, gammat?, dyt?, dxt: its tangent */ \
    K(layernorm_bwd_weight)  /* x, dy, dgamma?, dbeta?:            sums of dy xhat and of dy */ \
    K(layernorm_bwd_weight_jvp) /* x, dy?, xt?, dyt?, dgammat?, dbetat?: sums of dyt xhat + dy xhatt and of dyt */ \
    /* images: a row is [h][w][channels padded to kLane], the padding zeros. Windows: sizes {c, h, w, kh, kw, sh, sw, ph, pw, flag} of the \
       larger image x */ \
    K(maxpool2d_fwd)         /* x, y?, index?: the position i kw + j of the first maximum in its window; flag: int32 instead of bytes */ \
    K(maxpool2d_replay)      /* x, index, y: also the jvp */ \
    K(maxpool2d_bwd)         /* dy, index, dx: also the bwd_jvp */ \
    K(avgpool2d_fwd)         /* x, y; flag: the padding counts. Also the jvp, as for all of the following */ \
    K(avgpool2d_bwd)         /* dy, dx */ \
    K(global_avgpool2d_fwd)  /* x, y [c]; sizes {c, h, w} */ \
    K(global_avgpool2d_bwd)  /* dy, dx */ \
    K(pad2d_fwd)             /* x, y; sizes {c, h, w, top, bottom, left, right}, negative ones crop: so it is its own reverse */ \
    K(flatten_image_fwd)     /* x, y [c h w] in torch's order; sizes {c, h, w, 1 if the rows of y are not padded} */ \
    K(unflatten_image_fwd)   /* x [c h w], rows of any stride, y; sizes {c, h, w} */ \
    K(reshape_image_fwd)     /* x, y: another image of the same elements in torch's order; sizes {c, h, w of x, of y} */ \
    /* piecewise linear: numbers {slope}, sizes {c} */ \
    K(relu_fwd)              /* x, y?, mask?:                      mask = x > 0, y = x or slope x */ \
    K(relu_replay)           /* x, mask, y */ \
    K(relu_bwd)              /* mask, dy, dx: also the jvp and bwd_jvp */ \
    /* smooth activations f: sizes {c}, numbers {alpha or beta, threshold} */ \
    K(tanh_fwd) K(tanh_jvp) K(tanh_bwd) K(tanh_bwd_jvp)              /* x, y;  x, xt, yt;  x, dy, dx; */ \
    K(sigmoid_fwd) K(sigmoid_jvp) K(sigmoid_bwd) K(sigmoid_bwd_jvp)  /* x, xt?, dy?, dyt?, dxt: dxt = f'(x) dyt + f''(x) xt dy */ \
    K(exp_fwd) K(exp_jvp) K(exp_bwd) K(exp_bwd_jvp) \
    K(elu_fwd) K(elu_jvp) K(elu_bwd) K(elu_bwd_jvp) \
    K(gelu_fwd) K(gelu_jvp) K(gelu_bwd) K(gelu_bwd_jvp)              /* sizes {c, 1 for the tanh form} */ \
    K(silu_fwd) K(silu_jvp) K(silu_bwd) K(silu_bwd_jvp) \
    K(softplus_fwd) K(softplus_jvp) K(softplus_bwd) K(softplus_bwd_jvp) \
    /* losses: sizes {classes or outputs, reduction: 0 mean 1 sum 2 divisor}, numbers {label smoothing, divisor} */ \
    K(cross_entropy_fwd)     /* z, label, weight?, loss?, correct?: -sum q log softmax(z) / normaliser over the first `ways` classes */ \
    K(cross_entropy_bwd)     /* z, label, weight?, step_weight?, dz: ((sum q) p - q) / normaliser */ \
    K(cross_entropy_jvp)     /* z, label, weight?, zt, losst:      <dz, zt> */ \
    K(cross_entropy_bwd_jvp) /* z, label, weight?, zt, dzt:        (sum q) p (zt - <p, zt>) / normaliser */ \
    K(mse_fwd) K(mse_bwd) K(mse_jvp) K(mse_bwd_jvp)  /* the same operands with a float target; sum (z - target)^2 / normaliser */ \
    /* whole arrays: sizes {floats, axpy and scale: 1 for a scalar}; numbers {sign} */ \
    K(sgd_fwd)               /* theta, g, rate, theta_next; sizes {floats, 1 for a rate per element}: theta - rate g */ \
    K(sgd_bwd)               /* theta_bar, rate, u:                -rate theta_bar */ \
    K(sgd_bwd_rate)          /* theta_bar, g, acc?, out:           acc - theta_bar g, summed where the rate is scalar; sizes {floats, per element, 1 for support rows} */ \
    K(clip_value_fwd)        /* g, c; numbers {bound}:             g between -bound and bound */ \
    K(clip_value_bwd)        /* g, dc, dg; numbers {bound}:        dc where |g| <= bound, else 0 */ \
    K(dot_fwd)               /* x, y, acc?, out:                   acc + <x, y> */ \
    K(ratio_fwd)             /* x, y, out:                         x / y of two scalars, 0 where y is */ \
    K(clip_norm_fwd)         /* square, scale, slope?; numbers {max norm}: norm = sqrt(square), scale = min(1, max / (norm + 1e-6)), \
                                slope = -scale / ((norm + 1e-6) norm) where it clips, else 0 */ \
    K(axpy_fwd)              /* acc, x, scale?, out:               acc + sign scale x */ \
    K(scale_fwd)             /* x, scale?, out:                    sign scale x */ \
    K(add_fwd)               /* x?, y?, z */ \
    K(zero_fwd)              /* out */ \
    K(copy_fwd)              /* x, y */ \
    /* rows: sizes {c, 1 if the source's rows are not padded, 1 if the target's are not} */ \
    K(copy_rows_fwd)         /* x, y */ \
    K(add_rows_fwd)          /* x, y, z */ \
    K(axpy_rows_fwd)         /* acc, x, scale?, out */ \
    K(scale_rows_fwd)        /* x, scale?, out */ \
    K(sgd_rows_fwd)          /* theta, g, rate, theta_next */ \
    K(sgd_rows_bwd)          /* theta_bar, rate, u */ \
    K(zero_rows_fwd)         /* out */ \
    K(join_rows_fwd)         /* support, query, joint; sizes {c} */ \
    K(support_rows_fwd)      /* joint, support */ \
    K(query_rows_fwd)        /* joint, query */ \
    K(query_rows_bwd)        /* dquery, djoint: zeros in the support rows */ \
    /* weight expressions on plain arrays of up to 4 axes: sizes {z0..z3, x strides are 0 where x is broadcast: bit i of sizes[4] (x), [5] (y)} */ \
    K(add_expr_fwd)          /* x?, y?, z */ \
    K(mul_expr_fwd)          /* x, y, z */ \
    K(mul_expr_jvp)          /* x, y, xt?, yt?, zt:                xt y + x yt */ \
    K(sum_expr)              /* a, b?, c?, d?, out: out = sum over the broadcast axes (bits of sizes[4]) of a b + c d; b, d broadcast by sizes[5] */ \
    K(matmul_fwd)            /* a, b, c?, d?, out; sizes {m, n, k, transpose bits a=1 b=2, packed}: out = a b + c d. packed (never a narrow one): \
                                b, d and out lie so; a, b, c and d where b is transposed */ \
    K(transpose_fwd)         /* x, y; sizes {rows, cols} of x */ \
    K(slice_fwd)             /* x, y; sizes {outer, whole, start, length, inner} */ \
    K(slice_bwd)             /* dy, dx */ \
    K(pack_fwd)              /* plain [out, in], packed; sizes {in, out, taps of a convolution or 0} */ \
    K(unpack_fwd)            /* packed, plain; sizes[3]: 0 an array of ours, whose padding becomes zeros; 1 the caller's own; 2 added to it */
// clang-format on

enum KernelId {
#define FASTMAML_ENUM(name) kId_##name,
    FASTMAML_KERNELS(FASTMAML_ENUM)
#undef FASTMAML_ENUM
        kKernelCount
};

// Sums over so many rows that a team shares the rows: pieces first, then what they come to.
inline int stages_of(int kernel) {
    return kernel == kId_batchnorm_stats_fwd || kernel == kId_batchnorm_stats_jvp ||
                   kernel == kId_batchnorm_bwd_stats || kernel == kId_batchnorm_bwd_stats_jvp
               ? 2
               : 1;
}

#define FASTMAML_DECLARE(name) void name(const Call&);
namespace baseline {
FASTMAML_KERNELS(FASTMAML_DECLARE)
extern const Kernel kTable[kKernelCount];
float peak_flops(int64_t iterations);
}  // namespace baseline
#ifdef FASTMAML_X86
namespace avx2 {
FASTMAML_KERNELS(FASTMAML_DECLARE)
extern const Kernel kTable[kKernelCount];
float peak_flops(int64_t iterations);
}  // namespace avx2
namespace avx512 {
FASTMAML_KERNELS(FASTMAML_DECLARE)
extern const Kernel kTable[kKernelCount];
float peak_flops(int64_t iterations);
}  // namespace avx512
#endif
#undef FASTMAML_DECLARE

}  // namespace fastmaml
