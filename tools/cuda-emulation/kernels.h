// Every kernel of candle-cnn, compiled for the CPU, and its name.
#pragma once

#include "emulation.h"

#include "cuda/prelude.cuh"

namespace relu_source {
#include "relu/kernels.cu"
#undef KERNELS
}
namespace max_pool2d_source {
#include "max_pool2d/kernels.cu"
#undef KERNELS
}
namespace avg_pool2d_source {
#include "avg_pool2d/kernels.cu"
#undef KERNELS
}
namespace batch_norm_source {
#include "batch_norm/kernels.cu"
#undef KERNELS
}
namespace dropout_source {
#include "dropout/kernels.cu"
#undef KERNELS
}
namespace cross_entropy_source {
#include "cross_entropy/kernels.cu"
#undef KERNELS
}
namespace linear_source {
#include "linear/kernels.cu"
#undef KERNELS
}
namespace conv2d_source {
#include "conv2d/kernels.cu"
#undef KERNELS
}
namespace exactness_source {
#include "conv2d/exactness.cu"
}
namespace static_graph_source {
#include "static_graph/cuda/kernels.cu"
#undef KERNELS
}
namespace training_source {
#include "cuda/training.cu"
#undef KERNELS
}

// `ONE(FILE, NAME, SYNC)` of each; SYNC: whether its threads wait for each other.
#define TWO(FILE, NAME, SYNC) ONE(FILE, NAME##_f32, SYNC), ONE(FILE, NAME##_f64, SYNC)
#define FLOAT(FILE, NAME, SYNC) ONE(FILE, NAME##_f32, SYNC), ONE(FILE, NAME##_bf16, SYNC)
#define WHOLE(FILE, NAME, SYNC) ONE(FILE, NAME##_4_f32, SYNC), ONE(FILE, NAME##_8_bf16, SYNC)
#define PACKS(FILE, NAME, SYNC) FLOAT(FILE, NAME##_1, SYNC), WHOLE(FILE, NAME, SYNC)
#define THREE(FILE, NAME, SYNC) TWO(FILE, NAME, SYNC), ONE(FILE, NAME##_bf16, SYNC)
#define EACH_KERNEL                                                                                                    \
    THREE(relu, relu, false), THREE(max_pool2d, max_pool2d_forward, false),                                            \
        THREE(max_pool2d, max_pool2d_winners, false), THREE(max_pool2d, max_pool2d_backward, false),                   \
        THREE(avg_pool2d, avg_pool2d_forward, false), THREE(avg_pool2d, avg_pool2d_backward, false),                   \
        THREE(batch_norm, batch_norm_moments, true), TWO(batch_norm, batch_norm_join_moments, false),                  \
        TWO(batch_norm, batch_norm_invert, false), THREE(batch_norm, batch_norm_apply, false),                         \
        THREE(batch_norm, batch_norm_gradient_sums, true), TWO(batch_norm, batch_norm_join_sums, false),               \
        THREE(batch_norm, batch_norm_input_gradient, false), THREE(dropout, dropout, false),                           \
        THREE(cross_entropy, cross_entropy_rows, true), THREE(cross_entropy, cross_entropy_mean, true),                \
        THREE(cross_entropy, cross_entropy_gradient, true), THREE(linear, linear_add_to_rows, false), THREE(conv2d, conv2d_bias_activation, false),              \
        THREE(conv2d, conv2d_mask_and_sum, true), THREE(conv2d, conv2d_add_parts, false),                              \
        ONE(exactness, conv2d_draw_f32, false), ONE(exactness, conv2d_deviations_f32, true),                           \
        FLOAT(static_graph, static_graph_from_planes, false), FLOAT(static_graph, static_graph_to_planes, false),      \
        FLOAT(static_graph, static_graph_lay_weights, true), FLOAT(static_graph, static_graph_take_weights, true),     \
        FLOAT(static_graph, static_graph_join_moments, true), ONE(static_graph, static_graph_join_sums_f32, true),     \
        FLOAT(static_graph, static_graph_average, false), FLOAT(static_graph, static_graph_spread, false),             \
        PACKS(static_graph, static_graph_finish, false), PACKS(static_graph, static_graph_moments, true),              \
        PACKS(static_graph, static_graph_gradient_sums, true), PACKS(static_graph, static_graph_input_gradient, false), \
        PACKS(static_graph, static_graph_max_pool, false), PACKS(static_graph, static_graph_max_pool_gradient, false), \
        WHOLE(static_graph, static_graph_max_pool_3_1, false), WHOLE(static_graph, static_graph_max_pool_3_2, false),  \
        WHOLE(static_graph, static_graph_gradient_sums_3_1, true), WHOLE(static_graph, static_graph_gradient_sums_3_2, true), \
        WHOLE(static_graph, static_graph_max_pool_gradient_3_1, false),                                                \
        WHOLE(static_graph, static_graph_max_pool_gradient_3_2, false), THREE(training, gather_normalized, false), THREE(training, count_correct, true), TWO(training, sgd, false),    \
        TWO(training, take_up, false)
